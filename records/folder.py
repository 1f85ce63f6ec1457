"""A comparison's folder: what records/compare.py writes, refuses, plans and sets aside in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import train_gpt as T
from records import logs
from records.comparison import Comparison, slug

# Where a run stands, not what it computes: may differ from sitting to sitting.
PLACE = {"out", "run_id", "resume", "seed", "data_seed", "tokens", "data", "dev"}
ALPHA = 0.01


# ---- What it holds -------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def place(out: Path | None, plan: str, comparison: Comparison) -> Path:
    """--out, else a dated folder of this name: an earlier day's where there is one."""
    if out is not None:
        return out
    track, preset = comparison.config.run.track, comparison.config.preset
    if plan and not track:
        raise T.InputError("--plan needs --track, or --out FOLDER in a git repository")
    base = T.HERE / "records" / track if track else Path("runs")
    name = plan or "_".join(["compare", preset, *map(slug, comparison.arms)])[:100]
    earlier = sorted(base.glob(f"[0-9]*_{name}"))
    return earlier[-1] if earlier else base / f"{time.strftime('%Y-%m-%d', time.gmtime())}_{name}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds the folder, which is made; workers inherit the lock, so that it also waits for those
    of a `compare` that was killed a moment ago."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        for attempt in range(100):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 99:
                    raise T.InputError(f"{folder} is in use by another process") from None
                time.sleep(0.1)
        yield handle
    finally:
        os.close(handle)


def kind_of(comparison: Comparison, plan: str) -> str:
    if not plan:
        return "screen"
    return "improvement" if comparison.target is None else "record"


def claim_of(comparison: Comparison, plan: str) -> dict:
    preset, track = comparison.config.preset, comparison.config.run.track
    tokens = " and ".join(f"{t:,}" for t in comparison.trained.values())
    return {
        "kind": kind_of(comparison, plan),
        "title": f"{', '.join(comparison.arms)}: preset {preset}, {tokens} tokens",
        "track": track,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "arms": comparison.arms,
        "baseline": comparison.baseline,
        "compare": [list(pair) for pair in comparison.pairs()],
        "metric": comparison.metric,
        "target": comparison.target,
        "by": [],
    }


def settings_of(comparison: Comparison) -> dict:
    """What the flags change of the preset, for all arms, by name; a plan has the rest itself."""
    plain = T.make_config(comparison.config.preset).flat()
    given = T.parse_args(list(comparison.flags)).flat()
    free = PLACE | {"arm", "track"}
    return {k: v for k, v in given.items() if v != plain[k] and k not in free}


def plan_of(comparison: Comparison, name: str) -> dict:
    numbers = range(1, comparison.blocks + 1)
    seeds, data_seeds = zip(*map(comparison.seeds, numbers))
    if comparison.target is None:
        rule = {"test": "paired t, one-sided", "threshold": 0.0, "compare": comparison.pairs()}
    else:
        rule = {"test": "one-sample t, one-sided", "threshold": comparison.target, "compare": []}
    return {
        "name": name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "track": comparison.config.run.track,
        "preset": comparison.config.preset,
        "arms": comparison.arms,
        "baseline": comparison.baseline,
        "tokens": list(comparison.trained.values()),
        "fractions": list(comparison.budgets),
        "blocks": comparison.blocks,
        "seeds": list(seeds),
        "data_seeds": list(data_seeds),
        "metric": comparison.metric,
        "rule": {**rule, "alpha": ALPHA, "alternative": "less"},
        "settings": settings_of(comparison),
        "source_sha256": {name: T.sha256(path) for name, path in comparison.code.items()},
    }


def check_folder(folder: Path, comparison: Comparison) -> None:
    """Refuses a folder of something else, and code that is not what its runs ran."""
    claim = folder / "claim.json"
    if not claim.is_file():
        if any(p.name != ".claim.json.new" for p in folder.iterdir()):
            raise T.InputError(f"{folder} holds something else: choose another --out")
        return
    said = json.loads(claim.read_text())
    for key, mine in (("arms", comparison.arms), ("track", comparison.config.run.track)):
        if said.get(key) != mine:
            raise T.InputError(
                f"{folder} is another comparison: {key} {said.get(key)}, now {mine}: use --out"
            )
    for name, path in comparison.code.items():
        kept = folder / "code" / name
        if kept.is_file() and T.sha256(kept) != T.sha256(path):
            raise T.InputError(
                f"{path} is not {kept}, which this comparison runs: restore it, or use --out"
            )


def fill_folder(folder: Path, comparison: Comparison, plan: str) -> None:
    """claim.json and the code that runs, where they are not there yet."""
    if not (folder / "claim.json").is_file():
        write_json(folder / "claim.json", claim_of(comparison, plan))
    for name, path in comparison.code.items():
        kept = folder / "code" / name
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)


# ---- The plan ------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`git words` in a folder; code 127 where there is no git."""
    try:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, b"", b"")


def plan_stands(folder: Path, comparison: Comparison, name: str, runs: bool) -> bool:
    """Whether the plan is committed, so that its runs may start; False where it was written now.
    InputError where it may not be written, says something else, or is not in the last commit."""
    path, plan = folder / "plan.json", plan_of(comparison, name)
    if not path.is_file():
        if runs:
            raise T.InputError(f"{folder} has runs: a plan comes before the first one")
        if git(folder, "rev-parse", "--is-inside-work-tree").stdout.strip() != b"true":
            raise T.InputError(f"--plan needs git, and {folder} is not in a repository")
        if git(folder, "check-ignore", "-q", "plan.json").returncode == 0:
            raise T.InputError(f"git ignores {folder}: give --out or --track for the plan")
        fill_folder(folder, comparison, name)
        write_json(path, plan)
        print(
            f"wrote {path}: {plan['blocks']} blocks of {', '.join(plan['arms'])}; "
            f"{plan['metric']}, {plan['rule']['test']}, p < {ALPHA}. Commit it, then give the same "
            f"line again:\n    git add {folder} && git commit -m 'Plan {name}' {folder}"
        )
        return False
    said = json.loads(path.read_text())
    said.setdefault("settings", plan["settings"])  # those before 2026-11-28 had none
    differ = [key for key in plan if key != "created" and said.get(key) != plan[key]]
    if differ:
        was = ", ".join(f"{key} {said.get(key)}, now {plan[key]}" for key in differ)
        raise T.InputError(f"{path} plans something else: {was}")
    if git(folder, "show", "HEAD:./plan.json").stdout != path.read_bytes():
        raise T.InputError(f"{path} is not in the last commit as it stands: commit it first")
    return True


# ---- Runs that are there -------------------------------------------------------------------------


def finished(folder: Path) -> logs.Run | None:
    """A run, or None where it did not come to its end; InputError where its log was edited."""
    path = logs.log_of(folder)
    try:
        run = logs.load_run(folder)
        return run if run.done else None
    except FileNotFoundError:
        return None
    except logs.BadLog as e:  # a line that was being written when the machine stopped?
        last = logs.read_text(path, "replace").rstrip().rpartition("\n")[2]
        if last.startswith('{"t": "end"'):
            raise T.InputError(f"{e}; take {folder} away to run its block anew") from None
        return None


def check_run(run: logs.Run, comparison: Comparison) -> None:
    """A finished run must be one of this comparison's."""
    header, labels = run.header, run.labels
    jobs = {job.run_id: job for job in comparison.jobs(labels.get("block", 0))}
    job = jobs.get(run.path.parent.name)
    wrong = []
    if job is None or (run.arm, labels.get("fraction")) != (job.arm, job.fraction):
        wrong.append("arm or fraction")
    else:
        if (header["seed"], header["data_seed"]) != (job.seed, job.data_seed):
            wrong.append(f"seed {header['seed']}, data_seed {header['data_seed']}")
        if header["tokens"] != comparison.trained[job.fraction]:
            wrong.append(f"tokens {header['tokens']}")
        mine, ran = comparison.configs[run.arm].flat(), header["config"]
        wrong += [f"{k} {ran.get(k)}" for k in mine if k not in PLACE and ran.get(k) != mine[k]]
    if wrong:
        raise T.InputError(
            f"{run.path.parent} is another comparison's ({', '.join(wrong)}): use --out"
        )


def survey(folder: Path, comparison: Comparison) -> tuple[dict[int, list[logs.Run]], list[Path]]:
    """(whole blocks, folders of runs that belong to none). A block is whole when every run of it
    was finished in one sitting."""
    found: dict[int, list[logs.Run]] = {}
    folders = sorted(p for p in folder.iterdir() if re.match(r"b\d+_", p.name) and p.is_dir())
    for path in folders:
        run = finished(path)
        if run is not None:
            check_run(run, comparison)
            found.setdefault(run.labels["block"], []).append(run)
    size = len(comparison.arms) * len(comparison.budgets)
    whole = {
        block: runs
        for block, runs in found.items()
        if len(runs) == size and len({run.labels.get("sitting") for run in runs}) == 1
    }
    kept = {run.path.parent for runs in whole.values() for run in runs}
    return whole, [path for path in folders if path not in kept]


def set_aside(folder: Path, left: list[Path], what: str = "its block") -> None:
    """Moves runs out of sight of whatever reads the folder. what: was cut, for the message."""
    for path in left:
        number = 1
        while (to := folder / "aside" / f"{path.name}.broken-{number}").exists():
            number += 1
        to.parent.mkdir(exist_ok=True)
        path.rename(to)
        print(f"{path.name}: {what} was cut, so it runs anew; the old one is {to}")
