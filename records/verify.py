"""Verifies a filed folder from its logs: every figure that can be derived is derived again.

    filed, findings = load(folder, tracks)
    findings += check(filed, root)

What is checked, and what no check can see, stands in RULES.md. A finding names a file and is one
sentence. Needs scipy for p; nothing here runs a record's code (replay.py does).
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.shards import sha256
from records import logs, summary
from records.logs import BadLog, Run
from records.summary import fraction, machine

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("record", "improvement", "planned", "screen", "baseline", "note")
CLAIMS = ("record", "improvement", "planned")  # what needs a plan and a p
ALPHA = 0.01

CLAIM = {"kind", "title", "track", "date", "arms", "baseline", "metric", "target", "by"}
PLAN = {"name", "created", "track", "preset", "arms", "baseline", "tokens", "fractions", "blocks"}
PLAN |= {"seeds", "data_seeds", "metric", "rule", "source_sha256"}
HEADER = {"schema", "run_id", "arm", "preset", "track", "labels", "seed", "data_seed", "argv"}
HEADER |= {"config", "source_sha256", "git", "env", "data", "params", "flops_per_token"}
HEADER |= {"peak_flops", "world", "fp8", "dtype", "compile_s", "steps", "tokens", "distinct"}
HEADER |= {"repeated"}
ENV = {"python", "torch", "host", "cpu_threads", "gpu", "driver", "triton", "count"}
PARAMS = {"active_matmul", "stored", "attention"}

MOST_LOOKS = 20  # at dev on the way; one more at the end
CLOCK = 1.1e-4  # s: two times of a step line are rounded to 1e-4 each, ms to 1e-6
SLACK = 1.0  # s: between the last step's line and the clock's stop there is nothing to do
END_NATS = 20.0  # more than any model loses on an end-of-text token, nats
EXACT = 1e-6  # relative: losses are logged with all their digits
NEARLY = 1e-6  # relative: figures of another scipy


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a file, and a sentence."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Filed:
    """A filed folder as its files tell it."""

    path: Path
    claim: dict
    plan: dict | None
    runs: tuple[Run, ...]
    track: dict  # its row of tracks.json

    @property
    def claims(self) -> bool:
        return self.claim["kind"] in CLAIMS

    @property
    def arm(self) -> str | None:
        """The arm that a record is for: what its plan tests, or all but the baseline. None where
        that is not one arm."""
        named = [pair[0] for pair in self.plan["rule"]["compare"]] if self.plan else []
        arms = named or [a for a in self.claim["arms"] if a != self.claim["baseline"]]
        return arms[0] if len(arms) == 1 else None

    @functools.cached_property
    def figures(self) -> dict:
        """What summary.json must hold. BadLog where the runs do not go together."""
        return json.loads(json.dumps(summary.summarise(self.path)))


class Unreadable(ValueError):
    """A folder that cannot be verified at all; `finding` says why."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


# ---- Reading ------------------------------------------------------------------------------------


def read_json(path: Path, keys: set[str]) -> dict:
    """A JSON object with all of `keys`; Unreadable otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable(Finding(path, "is missing")) from None
    except ValueError as e:
        raise Unreadable(Finding(path, f"is no JSON: {e}")) from None
    if not isinstance(value, dict) or keys - value.keys():
        lacks = sorted(keys - value.keys()) if isinstance(value, dict) else sorted(keys)
        raise Unreadable(Finding(path, f"lacks {', '.join(lacks)}"))
    return value


def read_plan(path: Path) -> dict | None:
    """None where there is no plan; Unreadable where it lacks something."""
    if not path.exists():
        return None
    plan = read_json(path, PLAN)
    lacks = [name for name in summary.RULE if name not in plan["rule"]]
    if lacks:
        raise Unreadable(Finding(path, f"lacks {', '.join(lacks)} in its rule"))
    return plan


def load(folder: Path, tracks: dict) -> tuple[Filed, list[Finding]]:
    """A folder and what is wrong with its logs' chains, whose runs are left out. Unreadable where
    claim or plan cannot be read."""
    claim = read_json(folder / "claim.json", CLAIM)
    plan = read_plan(folder / "plan.json")
    if claim["track"] not in tracks or claim["track"] != folder.parent.name:
        text = f"has track {claim['track']!r}, and lies in the folder of {folder.parent.name!r}"
        raise Unreadable(Finding(folder / "claim.json", text))
    runs, found = [], []
    for path in logs.logs_in(folder):
        try:
            runs.append(logs.load_run(path))
        except (BadLog, UnicodeDecodeError) as e:
            found.append(Finding(path, str(e).removeprefix(f"{path}:").strip()))
    return Filed(folder, claim, plan, tuple(runs), tracks[claim["track"]]), found


# ---- One run ------------------------------------------------------------------------------------


def missing(header: dict) -> list[str]:
    """Names of what a complete header has and this one lacks."""
    lacks = sorted(HEADER - header.keys())
    if lacks:
        return lacks
    env, params = header["env"], header["params"]
    lacks = [f"env.{name}" for name in sorted(ENV - env.keys())]
    lacks += [f"params.{name}" for name in sorted(PARAMS - params.keys())]
    if env.get("gpu"):
        lacks += [f"env.{name}" for name in ("driver", "triton") if not env.get(name)]
    return lacks


def check_header(run: Run) -> Iterator[str]:
    """At one with itself."""
    h = run.header
    for name in ("arm", "seed", "data_seed", "track"):
        if h["config"][name] != h[name]:
            yield f"its header says {name} {h[name]!r}, and {h['config'][name]!r} in its config"
    if h["run_id"] != run.path.parent.name:
        yield f"is the log of run {h['run_id']!r}, in another run's folder"
    largest = max(stage_tokens(h["config"]))
    if h["config"]["tokens"] - len(stage_tokens(h["config"])) * largest >= h["tokens"]:
        yield f"trained {h['tokens']} tokens of the {h['config']['tokens']} in its config"
    if h["distinct"] + h["repeated"] != h["tokens"]:
        yield "distinct and repeated tokens in its header do not add up to its tokens"
    if h["world"] != h["env"]["count"]:
        yield f"its header counts {h['world']} ranks and {h['env']['count']} devices"


def stage_tokens(config: dict) -> list[int]:
    """Tokens a step of each stage, from `share:tokens:lr:window+...`."""
    return [int(stage.split(":")[1]) for stage in config["stages"].split("+")]


def check_steps(run: Run) -> Iterator[str]:
    """Every step there once, with its stage's tokens; times add up. One finding of a kind."""
    steps, sizes = run.steps, stage_tokens(run.header["config"])
    if [s["step"] for s in steps] != list(range(1, run.header["steps"] + 1)):
        yield f"has {len(steps)} step lines, not one for each of the {run.header['steps']} steps"
        return
    tokens, seconds, stage, wrong = 0, 0.0, 0, set()
    for s in steps:
        tokens += sizes[s["stage"]]
        if s["tokens"] != tokens or s["stage"] < stage:
            wrong.add(f"step {s['step']} has {s['tokens']} tokens, its schedule {tokens}")
            break
        stage = s["stage"]
    for s in steps:
        spent = s["train_s"] - seconds
        if s["ms"] <= 0 or abs(spent - s["ms"] / 1000) > CLOCK:
            wrong.add(
                f"step {s['step']} took {s['ms']} ms by its own line and {1000 * spent:.3f} ms by "
                "the train_s of its line and the one before"
            )
            break
        seconds = s["train_s"]
    yield from sorted(wrong)


def check_end(run: Run) -> Iterator[str]:
    """Tokens, seconds and tokens a second at the end are those of the steps and looks."""
    end, header = run.end, run.header
    if end is None or end["status"] != "done" or end["code"] != 0:
        yield f"did not finish: {end['status'] if end else 'it has no end line'}"
        return
    if not run.steps or not run.steps[-1]["tokens"] == end["tokens"] == header["tokens"]:
        yield "its header, last step and end line do not have the same number of tokens"
        return
    last, seconds = run.steps[-1], end["train_s"]
    if not -CLOCK - 5e-4 <= seconds - last["train_s"] <= SLACK:
        yield f"ends with {seconds} s of training, and its last step at {last['train_s']} s"
    late = [v["train_s"] for v in run.vals if v["step"] == last["step"] and v["train_s"] != seconds]
    if late:
        yield f"ends with {seconds} s of training, and its last look at {late[0]} s"
    rate = end["tokens"] / seconds
    if abs(end["tokens_per_s"] - rate) > 0.051 + rate * 5.1e-4 / seconds:
        yield f"says {end['tokens_per_s']} tokens a second, and its end line makes {rate:.1f}"
    if end["door_s"] + 0.02 < seconds + end["compile_s"]:
        yield (
            f"went from door to loss in {end['door_s']} s, less than its {seconds} s of training "
            f"and {end['compile_s']} s of compilation"
        )


def check_looks(run: Run, slices: dict | None) -> Iterator[str]:
    """Looks stand at steps; val is opened once, at the end; losses follow from their parts."""
    at = {s["step"]: s for s in run.steps}
    for v in run.vals:
        step, after = at.get(v["step"]), at.get(v["step"] + 1)
        if step is None or v["tokens"] != step["tokens"]:
            yield f"looks at {v['split']} after step {v['step']}, which its steps do not have"
            continue
        latest = after["train_s"] if after else math.inf
        if not step["train_s"] - 6e-4 <= v["train_s"] <= latest + 6e-4:
            yield (
                f"looks at {v['split']} after step {v['step']} at {v['train_s']} s, and the steps "
                f"around it are at {step['train_s']} and {latest} s"
            )
        yield from check_loss(run, v, (slices or {}).get(v["split"]))
    splits = [v["split"] for v in run.vals]
    vals = [v["step"] for v in run.vals if v["split"] == "val"]
    if len(vals) > 1 or (vals and vals != [len(run.steps)]):
        yield f"opened val after steps {vals}: it opens once, at the end"
    if splits.count("dev") > MOST_LOOKS + 1:
        yield f"looked at dev {splits.count('dev')} times: {MOST_LOOKS} at most, and at the end"


def check_loss(run: Run, v: dict, counts: dict | None) -> Iterator[str]:
    """A look's loss is the mean of its parts, by position and by kind of target, as far as the
    track's counts of targets tell (records/slices.py)."""
    name = "dev_loss" if v["split"] == "dev" else "val_loss_ext"
    loss, where = v[name], f"after step {v['step']}"
    if v["split"] == "val" and v["window"] == v["ext_window"] and v["val_loss"] != loss:
        yield "has two losses of val at one window"
    if counts is None:
        return
    if v["targets"] != counts["targets"]:
        yield f"its {name} is over {v['targets']} targets, the track's over {counts['targets']}"
        return
    weights = counts["by_position"].get(str(run.header["config"]["val_row_tokens"]))
    if weights is not None:
        kept = [w for w in weights if w]
        parts = list(v["by_position"].values())
        mean = sum(w * x for w, x in zip(kept, parts)) / sum(kept)
        if len(kept) != len(parts) or abs(mean - loss) > EXACT * loss:
            yield f"its {name} {where} is {loss:.6f}, and by position it is {mean:.6f}"
    if counts["text_bytes"] and v["bpb"] is not None:
        text = v["bpb"] * math.log(2) * counts["text_bytes"]
        ends = (loss * counts["targets"] - text) / counts["ends"]
        if not 0 <= ends <= END_NATS:
            yield (
                f"its {name} {where} is {loss:.6f}, and with {v['bpb']:.6f} bits a byte an "
                f"end-of-text token would cost {ends:.1f} nats"
            )


def check_data(run: Run, track: dict) -> Iterator[str]:
    """The shards are the track's, in its order."""
    if track["data"] is None:
        return
    for split in ("train", "dev", "val"):
        has, want = (
            [(d["tokens"], d["sha256"]) for d in rows if d["split"] == split]
            for rows in (run.header["data"], track["data"])
        )
        if has != want:
            yield f"its {split} shards are not the track's: other sha256 or order in its header"


def check_run(run: Run, track: dict) -> Iterator[str]:
    lacks = missing(run.header)
    if lacks:
        yield f"its header lacks {', '.join(lacks)}"
        return
    yield from check_header(run)
    yield from check_steps(run)
    yield from check_end(run)
    yield from check_looks(run, track["slices"])
    yield from check_data(run, track)
    if run.resumed:
        yield "was resumed: neither its time nor its memory is one run's"


def run_findings(filed: Filed) -> Iterator[Finding]:
    for run in filed.runs:
        yield from guarded(run.path, lambda run=run: check_run(run, filed.track))


def guarded(path: Path, check: Callable[[], Iterator[str]]) -> Iterator[Finding]:
    """A check's sentences as findings; what it trips over is one, too."""
    try:
        for text in check():
            yield Finding(path, text)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as e:
        yield Finding(path, f"has a line that no trainer writes: {type(e).__name__} {e}")


# ---- The folder ---------------------------------------------------------------------------------


def code_files(folder: Path, run: Run) -> dict[Path, str]:
    """{file of code/ that a run ran: its sha256}."""
    names = {"trainer": "train_gpt.py", "variant": f"variants/{run.header['preset']}.py"}
    names["arm"] = Path(run.arm.partition(".py:")[0] + ".py").name
    sources = run.header["source_sha256"]
    return {folder / "code" / names.get(name, name): sources[name] for name in sources}


def check_ran(folder: Path, run: Run) -> Iterator[Finding]:
    """code/ holds what the run ran."""
    for path, digest in code_files(folder, run).items():
        if not path.is_file():
            yield Finding(path, f"is missing: {run.run_id} ran it")
        elif sha256(path) != digest:
            yield Finding(path, f"is not what {run.run_id} ran: another sha256")


def check_code(filed: Filed) -> Iterator[Finding]:
    """code/ holds what ran, and nothing else; before the first run it is the plan's affair."""
    used = set()
    for run in filed.runs:
        used |= code_files(filed.path, run).keys()
        yield from check_ran(filed.path, run)
    for path in sorted((filed.path / "code").rglob("*.py")) if filed.runs else []:
        if path not in used and path.name != "__init__.py":
            yield Finding(path, "is not named by any run's header")


def check_blocks(filed: Filed) -> Iterator[Finding]:
    """Every block has every arm, on one seed, machine and sitting; no block is missing."""
    arms = {run.arm for run in filed.runs}
    for arm in sorted(set(filed.claim["arms"]) ^ arms) if filed.runs else []:
        said = "has no run" if arm not in arms else "has runs and is not in claim.json"
        yield Finding(filed.path, f"arm {arm} {said}")
    by_block: dict[int, list[Run]] = {}
    for run in filed.runs:
        if "block" in run.labels:
            by_block.setdefault(run.labels["block"], []).append(run)
        elif filed.claims:
            yield Finding(run.path, "belongs to no block: labels has none")
    for number in sorted(set(range(1, max(by_block, default=0) + 1)) - by_block.keys()):
        yield Finding(filed.path, f"block {number} is missing: its seed was dropped")
    want = {(r.header["preset"], r.arm, fraction(r)) for r in filed.runs if "block" in r.labels}
    seeds: dict[tuple, int] = {}
    for number, runs in sorted(by_block.items()):
        for finding in check_block(runs, want):
            yield Finding(filed.path, f"block {number} {finding}")
        seed = (runs[0].header["seed"], runs[0].header["data_seed"])
        if seed in seeds:
            yield Finding(filed.path, f"blocks {seeds[seed]} and {number} have the same seeds")
        seeds[seed] = number


def check_block(runs: list[Run], want: set[tuple]) -> Iterator[str]:
    presets = {r.header["preset"] for r in runs}
    has = [(r.header["preset"], r.arm, fraction(r)) for r in runs]
    for preset, arm, part in sorted(k for k in want - set(has) if k[0] in presets):
        yield f"lacks the run of {arm} ({preset}, {part} %)"
    if len(set(has)) < len(has):
        yield "has an arm twice"
    facts = {
        "seed": {r.header["seed"] for r in runs},
        "data_seed": {r.header["data_seed"] for r in runs},
        "machine": {f"{machine(r)} of {r.header['env']['host']}" for r in runs},
        "sitting": {r.labels.get("sitting") for r in runs},
    }
    for name, values in facts.items():
        if len(values) > 1:
            yield f"is not one block: {name} {' and '.join(map(str, sorted(values)))}"
    for preset, part in sorted({(r.header["preset"], fraction(r)) for r in runs}):
        same = [r for r in runs if (r.header["preset"], fraction(r)) == (preset, part)]
        if len({logs.schedule_key(r) for r in same}) > 1:
            yield f"compares arms on different schedules ({preset}, {part} %)"


def check_aside(filed: Filed) -> Iterator[Finding]:
    """compare sets aside blocks that were cut; a whole one there was dropped."""
    found: dict[tuple, set] = {}
    for path in logs.logs_in(filed.path, "aside/*"):
        try:
            run = logs.load_run(path)
        except (BadLog, UnicodeDecodeError):
            continue  # cut in the middle of a line
        if run.done:
            where = (run.labels.get("block"), run.labels.get("sitting"))
            found.setdefault(where, set()).add((run.arm, fraction(run)))
    want = {(arm, fraction(run)) for run in filed.runs for arm in filed.claim["arms"]}
    for (block, _), has in sorted(found.items(), key=str):
        if want and want <= has:
            yield Finding(filed.path / "aside", f"holds a whole block {block}: it was dropped")


# ---- The plan -----------------------------------------------------------------------------------


def utc(stamp: str) -> datetime.datetime:
    """`2026-11-24T17:18:00Z`, or without signs between the digits. ValueError for others."""
    digits = re.sub(r"\D", "", stamp)
    return datetime.datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=datetime.UTC)


def started(filed: Filed) -> datetime.datetime | None:
    """When the first sitting began; None where no run says."""
    stamps = [r.labels["sitting"] for r in filed.runs if "sitting" in r.labels]
    return min(map(utc, stamps), default=None)


def check_plan(filed: Filed, root: Path) -> Iterator[Finding]:
    """The plan was there first, and what ran is what it says."""
    path, plan, claim = filed.path / "plan.json", filed.plan, filed.claim
    if plan is None:
        if filed.claims:
            yield Finding(
                path,
                f"is missing: kind {claim['kind']} needs a plan, committed before its first run",
            )
        return
    for key in ("track", "arms", "baseline", "metric"):
        if claim[key] != plan[key]:
            yield Finding(path, f"has {key} {plan[key]}, and claim.json {claim[key]}")
    for name, digest in plan["source_sha256"].items():
        file = filed.path / "code" / name
        if not file.is_file() or sha256(file) != digest:
            yield Finding(path, f"was made for another code/{name}")
    yield from check_planned_runs(filed)
    yield from check_order(filed, root)


def check_order(filed: Filed, root: Path) -> Iterator[Finding]:
    """The plan was made, and committed, before the first run."""
    path, first = filed.path / "plan.json", started(filed)
    if first is None:
        if filed.runs and filed.claims:
            yield Finding(path, "cannot be shown to come first: no run says when it began")
        return
    created = filed.plan["created"]
    if utc(created) > first:
        yield Finding(path, f"was created at {created}, after the first run began")
    yield from check_commit(path, first, root)


def check_planned_runs(filed: Filed) -> Iterator[Finding]:
    """All planned runs and no others. Before the first one a plan is only a plan."""
    plan, path = filed.plan, filed.path / "plan.json"
    blocks = range(1, plan["blocks"] + 1)
    want = {(b, a, f) for b in blocks for a in plan["arms"] for f in plan["fractions"]}
    absent = sorted(want - {place(r) for r in filed.runs if r.done})
    if absent and filed.runs and filed.claims:
        block, arm, part = absent[0]
        yield Finding(
            path,
            f"{len(absent)} of its {len(want)} runs are missing, first {arm} of block {block} at "
            f"{part} %: before all are there claim.json says screen, not {filed.claim['kind']}",
        )
    tokens = dict(zip(plan["fractions"], plan["tokens"]))
    for run in filed.runs:
        if place(run) not in want:
            yield Finding(run.path, "is not in plan.json")
            continue
        i = run.labels["block"] - 1
        planned = {"seed": plan["seeds"][i], "data_seed": plan["data_seeds"][i]}
        planned |= {"tokens": tokens[fraction(run)], "preset": plan["preset"]}
        for name, value in planned.items():
            if run.header[name] != value:
                yield Finding(run.path, f"has {name} {run.header[name]}, and plan.json {value}")
        own = {pair.partition("=")[0] for pair in run.arm.split(",")[1:]}  # the arm's keys win
        for name, value in plan.get("settings", {}).items():
            has = run.header["config"].get(name)
            if name not in own and has != value:
                yield Finding(run.path, f"has {name} {has}, and plan.json {value}")


def place(run: Run) -> tuple:
    return run.labels.get("block"), run.arm, fraction(run)


def git(root: Path, *words: str) -> bytes | None:
    """What git says at `root`; None without git, outside a repository, or where it fails."""
    try:
        return subprocess.check_output(["git", *words], cwd=root, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None


def check_commit(path: Path, first: datetime.datetime, root: Path) -> Iterator[Finding]:
    """The plan's last commit is older than the first run, where there is a history to ask: not in
    an exported tree, nor in a shallow clone."""
    name = f"./{path.relative_to(root).as_posix()}"
    if (git(root, "rev-parse", "--is-shallow-repository") or b"true").strip() == b"true":
        return
    said = git(root, "log", "--follow", "--diff-filter=AM", "--format=%ct", "--", name)
    times = [datetime.datetime.fromtimestamp(int(t), datetime.UTC) for t in (said or b"").split()]
    if not times:
        yield Finding(path, "is not committed, and its runs have begun")
    elif max(times) > first:
        when = f"{max(times):%Y-%m-%dT%H:%M:%SZ}"
        yield Finding(path, f"was committed at {when}, after the first run began")
    elif git(root, "show", f"HEAD:{name}") != path.read_bytes():
        yield Finding(path, "is not as it was committed")


# ---- What is claimed ----------------------------------------------------------------------------


def check_claim(filed: Filed) -> Iterator[Finding]:
    """What the folder claims follows from its logs, by the rule that was planned."""
    claim, path = filed.claim, filed.path / "claim.json"
    if claim["kind"] not in KINDS:
        yield Finding(path, f"has kind {claim['kind']!r}: one of {', '.join(KINDS)}")
    if not re.match(r"\d{4}-\d\d-\d\d_", filed.path.name):
        yield Finding(filed.path, "is not named DATE_NAME")
    if not filed.claims or filed.plan is None or not filed.runs:
        return
    if not (filed.path / "README.md").is_file():
        yield Finding(filed.path / "README.md", "is missing: what changed, why, how to rerun")
    for run in filed.runs:
        if run.header["track"] != claim["track"]:
            yield Finding(run.path, f"ran for track {run.header['track']!r}")
    rule = filed.plan["rule"]
    if rule["alternative"] != "less" or not 0 < rule["alpha"] <= ALPHA:
        yield Finding(filed.path / "plan.json", f"must test for less, at alpha {ALPHA} or below")
    yield from check_record(filed) if claim["kind"] == "record" else check_improvement(filed)


def undecided(filed: Filed, wanted: str) -> Iterator[Finding]:
    """Tests of the plan that did not come out as claimed. A plan with runs missing has none."""
    for d in filed.figures["decision"] or ():
        if not d["passed"]:
            p = "no p" if d["p"] is None else f"p = {d['p']:.2g}"
            yield Finding(
                filed.path / "claim.json",
                f"claims {wanted}, and {d['arm']} against {d['against']} has {p} over {d['n']}: "
                f"it takes p < {filed.plan['rule']['alpha']}"
                + (f" and {summary.FEWEST_FOR_RECORD} runs" if wanted == "a record" else ""),
            )


def check_improvement(filed: Filed) -> Iterator[Finding]:
    """Paired differences within blocks, each planned pair by itself. What is only planned may come
    out either way."""
    rule = filed.plan["rule"]
    if not rule["test"].startswith("paired") or not rule["compare"] or rule["threshold"] > 0:
        text = "must plan a paired test of differences below 0: an improvement is nothing else"
        yield Finding(filed.path / "plan.json", text)
    if filed.claim["kind"] == "improvement":
        yield from undecided(filed, "an improvement")


def check_record(filed: Filed) -> Iterator[Finding]:
    """The record's arm reached the track's target, by the track's rules."""
    path, track, rule = filed.path / "claim.json", filed.track, filed.plan["rule"]
    if track["target"] is None or filed.arm is None:
        what = "is on a track without a target" if track["target"] is None else "names several arms"
        yield Finding(path, f"is a record, and {what}")
        return
    if (filed.claim["metric"], filed.claim["target"]) != (track["metric"], track["target"]):
        yield Finding(path, f"must have the track's {track['metric']} <= {track['target']}")
    if track["data"] is None:
        yield Finding(path, "is on a track whose shards have no digests in tracks.json yet")
    if not rule["test"].startswith("one-sample") or rule["threshold"] > track["target"]:
        text = f"must plan a one-sample test of the mean against the target {track['target']}"
        yield Finding(filed.path / "plan.json", text)
    yield from undecided(filed, "a record")
    for run in filed.runs:
        if run.arm == filed.arm:
            yield from guarded(run.path, lambda run=run: check_track_rules(run, track))


def check_track_rules(run: Run, track: dict) -> Iterator[str]:
    """What a track asks of a record's runs."""
    header, config = run.header, run.header["config"]
    if machine(run) != track["machine"]:
        yield f"ran on {machine(run)}, the track's machine is {track['machine']}"
    if config["val_row_tokens"] != track["val_row_tokens"]:
        yield (
            f"validates in rows of {config['val_row_tokens']} tokens, the track in rows of "
            f"{track['val_row_tokens']}"
        )
    if header["params"]["active_matmul"] < track["least_active_matmul"]:
        yield (
            f"has {header['params']['active_matmul']} active matmul parameters, the track wants "
            f"{track['least_active_matmul']}"
        )
    if header["tokens"] > track["passes"] * sum(
        d["tokens"] for d in header["data"] if d["split"] == "train"
    ):
        yield f"read the train text more than {track['passes']} time(s)"


# ---- What is derived ----------------------------------------------------------------------------


def difference(a, b, at: str = "") -> str | None:
    """Where two JSON values first differ, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for k in sorted(a.keys() | b.keys()):
            found = difference(a.get(k), b.get(k), f"{at}.{k}" if at else k)
            if found:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = (difference(x, y, f"{at}[{i}]") for i, (x, y) in enumerate(zip(a, b)))
        return next((f for f in found if f), None)
    if isinstance(a, float) and isinstance(b, float):
        return None if math.isclose(a, b, rel_tol=NEARLY, abs_tol=1e-12) else at
    return None if a == b else at or "everything"


def check_summary(filed: Filed) -> Iterator[Finding]:
    """summary.json is what the logs make. A note's runs may be unlike, and have none."""
    if not any(run.done for run in filed.runs):
        return
    path = filed.path / "summary.json"
    try:
        made = filed.figures
        stored = read_json(path, set())
    except BadLog as e:
        if filed.claim["kind"] != "note":
            yield Finding(filed.path, f"has runs that do not go together: {e}")
        return
    except Unreadable as e:
        yield e.finding
        return
    at = difference(stored, made)
    if at:
        yield Finding(path, f"is not what the logs make: {at} differs")


def check_gpu_tests(filed: Filed, root: Path) -> Iterator[Finding]:
    """A GPU has passed its tests with the attention, FP8 and kernels of the record's trainer. The
    folder's own gpu-tests.json counts before records/gpu-tests.json, which follows the present
    trainer."""
    if not any(run.header["env"]["gpu"] for run in filed.runs):
        return
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from gpu_tests_fresh import stale

    own, trainer = filed.path / "gpu-tests.json", filed.path / "code" / "train_gpt.py"
    report = own if own.is_file() else root / "records" / "gpu-tests.json"
    if trainer.is_file():
        for text in stale(report, trainer):
            yield Finding(trainer, text)


def check(filed: Filed, root: Path) -> Iterator[Finding]:
    """Everything about one folder."""
    yield from run_findings(filed)
    for part in (
        lambda: check_code(filed),
        lambda: check_blocks(filed),
        lambda: check_aside(filed),
        lambda: check_plan(filed, root),
        lambda: check_claim(filed),
        lambda: check_summary(filed),
        lambda: check_gpu_tests(filed, root),
    ):
        try:
            yield from part()
        except (KeyError, TypeError, ValueError, IndexError) as e:
            yield Finding(filed.path, f"cannot be verified: {type(e).__name__} {e}")
