"""What a folder of runs says, from its logs, claim.json and plan.json alone.

    python -m records.summary FOLDER [--markdown] [--write]

prints the tables; --write also writes FOLDER/summary.json. A comparison without a plan is a screen:
n and intervals, no p. So is one whose plan still lacks runs, and its intervals are marked interim:
looking after each block and stopping when it suits makes 4 % of false alarms out of 1 %. With all
planned runs there, the plan's rule is applied, once, to exactly these runs.

Pairs are the plan's, those of claim.json ("compare": [[arm, against], ...], for controls) and
every arm against the baseline. Break-even, how much longer a step may be, takes the slope of the
baseline's own fit; where all runs have one length, the claim may name folders beside it ("slope":
["2026-11-27_softmax-seeds"]) with complete schedules of other lengths: one line through all runs
of the baseline there and here, each a point, machines and sittings mixed.

How figures are made: losses are those of the end of a run, by the claim's metric. ms a step is the
median over a stage's steps without the first, then the mean over runs (a step after a pause or a
stage's change is slower, and both are in train seconds and tokens a second, which leave nothing
out). Memory is the largest of the runs. `train_minus_dev` is the training loss, mean over the last
5 % of the tokens, minus the dev loss at the end; steps whose loss was over some classes alone do
not count, and where there are no others it is not known. Joules include validation. Floats are
rounded to 7 digits, so that a summary made again elsewhere is the same, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from records import logs, stats
from records.logs import BadLog, Run
from records.stats import Estimate
from records.tables import tables

SCHEMA = 1
FULL = 100  # percent of the budget: the schedule that a claim is judged at
DIGITS = 7
LATE = 0.05  # share of the tokens over which the training loss is averaged
FEWEST_FOR_RECORD = 5
LOSSES = ("val_loss_ext", "val_loss", "dev_loss")  # by preference, where no claim names one
PLAN = ("name", "preset", "arms", "tokens", "fractions", "blocks", "seeds", "data_seeds", "metric")
RULE = ("test", "alpha", "alternative", "threshold", "compare")


# ---- What is in the folder ----------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A folder, read: finished runs and what they are compared by."""

    claim: dict
    plan: dict | None
    runs: tuple[Run, ...]  # finished, and planned where there is a plan
    missing: tuple[tuple[int, str, int], ...]  # planned, not there: block, arm, fraction
    unplanned: tuple[str, ...]
    unfinished: tuple[str, ...]
    metric: str
    arms: tuple[str, ...]  # that have runs; the claim's order
    baseline: str | None

    @property
    def stage(self) -> str:
        """'screen', 'interim' or 'complete' (all runs of a plan)."""
        if self.plan is None:
            return "screen"
        return "interim" if self.missing else "complete"

    @property
    def fractions(self) -> list[int]:
        return sorted({fraction(run) for run in self.runs})

    @property
    def full(self) -> int:
        """The fraction that equal tokens are judged at."""
        return FULL if FULL in self.fractions else self.fractions[-1]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, what it is measured against): the planned ones, the claim's, and every arm against
        the baseline; each once."""
        planned = self.plan["rule"]["compare"] if self.plan else []
        rest = [(arm, self.baseline) for arm in self.arms if arm != self.baseline]
        pairs = [tuple(pair) for pair in (*planned, *self.claim.get("compare", []), *rest)]
        there = [pair for pair in pairs if len(pair) == 2 and set(pair) <= set(self.arms)]
        return list(dict.fromkeys(there))

    def at(self, percent: int, arm: str) -> dict[tuple, Run]:
        """{block: run} of an arm at a fraction, in the order of blocks."""
        return {place(run): run for run in self.runs if run.arm == arm and fraction(run) == percent}


def fraction(run: Run) -> int:
    return run.labels.get("fraction", FULL)


def place(run: Run) -> tuple:
    """What runs of one block share at every fraction: sitting, number, seeds. Without a number the
    seeds and the machine make the block."""
    h, labels = run.header, run.labels
    sitting = labels.get("sitting", h["env"]["host"])
    return sitting, labels.get("block", -1), h["seed"], h["data_seed"]


def planned(runs: Iterable[Run], plan: dict) -> tuple[list[Run], list[tuple[int, str, int]]]:
    """(the runs that a plan asks for, what it asks for and is not there)."""
    slots: dict[tuple, Run | None] = {}
    blocks = zip(range(1, plan["blocks"] + 1), plan["seeds"], plan["data_seeds"], strict=True)
    for block, *seeds in blocks:
        for part, tokens in zip(plan["fractions"], plan["tokens"], strict=True):
            for arm in plan["arms"]:
                slots[block, arm, part, *seeds, tokens, plan["preset"]] = None
    for run in runs:
        slot = [run.labels.get("block"), run.arm, fraction(run)]
        slot += [run.header[k] for k in ("seed", "data_seed", "tokens", "preset")]
        if tuple(slot) in slots:
            slots[tuple(slot)] = run
    missing = [slot[:3] for slot, run in slots.items() if run is None]
    return [run for run in slots.values() if run is not None], missing


def read_json(path: Path) -> dict | None:
    """None where there is no such file; BadLog where it is no JSON object."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadLog(f"{path} is no JSON: {e}") from None
    if not isinstance(value, dict):
        raise BadLog(f"{path} is no JSON object")
    return value


def read_plan(path: Path) -> dict | None:
    """None where there is none; BadLog where it lacks something or has not a seed a block."""
    plan = read_json(path)
    if plan is None:
        return None
    lacks = [k for k in PLAN if k not in plan]
    lacks += [f"rule.{k}" for k in RULE if k not in plan.get("rule", {})]
    if lacks:
        raise BadLog(f"{path} lacks {', '.join(lacks)}")
    if not plan["blocks"] == len(plan["seeds"]) == len(plan["data_seeds"]):
        raise BadLog(f"{path} plans {plan['blocks']} blocks, and seeds for another number")
    if len(plan["fractions"]) != len(plan["tokens"]):
        raise BadLog(f"{path} has not the tokens of each fraction")
    return plan


def check_alike(runs: list[Run], metric: str | None) -> None:
    """BadLog where runs cannot be summarised together."""
    folder, seen = runs[0].path.parent.parent, {}
    for name in ("preset", "data"):
        if any(run.header[name] != runs[0].header[name] for run in runs):
            raise BadLog(f"{folder} holds runs of more than one {name}: give each a folder")
    for run in runs:
        if metric is None or run.final(metric) is None:
            raise BadLog(f"{run.path} has no {metric or 'loss'}, by which {folder} is judged")
        key = (place(run), run.arm, fraction(run))
        if key in seen:
            raise BadLog(f"{seen[key]} and {run.path} are the same arm in one block")
        seen[key] = run.path


def read(folder: Path) -> Study:
    """A folder of runs. BadLog, with a sentence, where they cannot be summarised together."""
    every = logs.load_runs(folder)
    claim, plan = read_json(folder / "claim.json") or {}, read_plan(folder / "plan.json")
    done = [run for run in every if run.done]
    runs, missing = (done, []) if plan is None else planned(done, plan)
    if not runs:
        raise BadLog(f"{folder} holds no finished run{' of its plan' if plan else ''}")
    found = (name for name in LOSSES if runs[0].final(name) is not None)
    metric = (plan or claim).get("metric") or next(found, None)
    check_alike(runs, metric)
    has = {run.arm for run in runs}
    arms = [arm for arm in (*claim.get("arms", []), *sorted(has)) if arm in has]
    baseline = claim.get("baseline", "softmax")
    return Study(
        **{"claim": claim, "plan": plan, "missing": tuple(missing), "metric": metric},
        **{"runs": tuple(sorted(runs, key=order_key)), "arms": tuple(dict.fromkeys(arms))},
        unplanned=tuple(run.run_id for run in done if run not in runs),
        unfinished=tuple(run.run_id for run in every if not run.done),
        baseline=baseline if baseline in has and len(has) > 1 else None,
    )


def order_key(run: Run) -> tuple:
    return run.labels.get("block", 0), run.run_id


# ---- One arm ------------------------------------------------------------------------------------


def finals(runs: list[Run], metric: str) -> list[float | None]:
    return [run.final(metric) for run in runs]


def train_seconds(runs: list[Run]) -> list[float]:
    return [run.end["train_s"] for run in runs]


def look(run: Run, metric: str) -> dict:
    """The last line of val, or dev, that has the metric."""
    return [v for v in run.vals if metric in v][-1]


def step_tokens(run: Run) -> list[int]:
    ends = [s["tokens"] for s in run.steps]
    return [end - start for start, end in zip([0, *ends], ends)]


def ms_by_stage(runs: list[Run]) -> dict[str, dict]:
    """{stage: tokens a step, ms a step}."""
    found: dict[int, list[float]] = {}
    size: dict[int, int] = {}
    for run in runs:
        steps: dict[int, list[float]] = {}
        for s, tokens in zip(run.steps, step_tokens(run)):
            steps.setdefault(s["stage"], []).append(s["ms"])
            size[s["stage"]] = tokens
        for stage, ms in steps.items():
            found.setdefault(stage, []).append(statistics.median(ms[1:] or ms))
    return {str(k): {"tokens": size[k], "ms": stats.mean(v)} for k, v in sorted(found.items())}


def late_train_loss(run: Run) -> float | None:
    """Mean over the tokens of the last 5 % of the run, the last step at least, without sampled
    losses; None where all of these are."""
    least = run.steps[-1]["tokens"] * (1 - LATE)
    late = [(s, n) for s, n in zip(run.steps, step_tokens(run)) if s["tokens"] > least]
    late = [(s["loss"], n) for s, n in late if not logs.sampled(s)]
    return math.fsum(loss * n for loss, n in late) / sum(n for _, n in late) if late else None


def same(runs: list[Run], name: str):
    """A header's value, which all runs of an arm must share."""
    values = [run.header[name] for run in runs]
    if any(v != values[0] for v in values):
        raise BadLog(f"{runs[0].path.parent.parent}: runs of {runs[0].arm} differ in their {name}")
    return values[0]


def positions(runs: list[Run], metric: str) -> dict[str, list[float]]:
    """{positions in the document: loss of each run}."""
    tables = [look(run, metric)["by_position"] for run in runs]
    return {name: [t[name] for t in tables] for name in tables[0] if all(name in t for t in tables)}


def known(values: list, figure: Callable):
    """The figure of the values; None where one is not known."""
    return None if None in values else figure(values)


def arm_figures(runs: list[Run], metric: str) -> dict:
    """Everything about one arm's runs of one schedule."""
    losses, seconds, dev = finals(runs, metric), train_seconds(runs), finals(runs, "dev_loss")
    late = [late_train_loss(run) for run in runs]
    gap = known([*late, *dev], lambda _: stats.mean(stats.differences(late, dev)))
    end = {k: [run.end[k] for run in runs] for k in ("peak_alloc", "peak_reserved", "joules")}
    return {
        "n": len(runs),
        "runs": [run.run_id for run in runs],
        "seeds": [[run.header["seed"], run.header["data_seed"]] for run in runs],
        "losses": losses,
        "loss": vars(stats.mean_interval(losses)),
        "sd": vars(stats.sd_interval(losses)),
        "means": {name: known(finals(runs, name), stats.mean) for name in LOSSES},
        "bits_a_byte": known([look(run, metric)["bpb"] for run in runs], stats.mean),
        "by_position": {k: stats.mean(v) for k, v in positions(runs, metric).items()},
        "train_loss": known(late, stats.mean),
        "train_minus_dev": gap,
        "train_s": {"mean": stats.mean(seconds), "sd": stats.sd(seconds)},
        "ms_by_stage": ms_by_stage(runs),
        "tokens_per_s": stats.mean([run.end["tokens"] / run.end["train_s"] for run in runs]),
        "peak_alloc": known(end["peak_alloc"], max),
        "peak_reserved": known(end["peak_reserved"], max),
        "joules": known(end["joules"], stats.mean),
        "params": same(runs, "params"),
        "flops_per_token": same(runs, "flops_per_token"),
    }


# ---- Two arms, at equal tokens ------------------------------------------------------------------


def both(mine: dict[tuple, Run], other: dict[tuple, Run]) -> tuple[list[Run], list[Run]]:
    """The runs of two arms in the blocks that have both."""
    shared = [key for key in mine if key in other]
    return [mine[key] for key in shared], [other[key] for key in shared]


def by_sitting(runs: list[Run], values: list[float]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for run, value in zip(runs, values):
        groups.setdefault(place(run)[0], []).append(value)
    return groups


def compared(mine: list[Run], other: list[Run], metric: str) -> dict:
    """Paired differences of the final loss and ratios of training seconds, over blocks."""
    values = stats.differences(finals(mine, metric), finals(other, metric))
    groups = by_sitting(mine, values)
    return {
        "n": len(values),
        "differences": values,
        "difference": vars(stats.mean_interval(values)),
        "sd": stats.sd(values),
        "by_sitting": {k: {"n": len(v), "mean": stats.mean(v)} for k, v in groups.items()},
        "time_ratio": vars(stats.ratio_interval(train_seconds(mine), train_seconds(other))),
    }


def pair_figures(study: Study, percent: int, arm: str, against: str, slope: dict | None) -> dict:
    """Two arms at equal tokens: the same complete schedule."""
    mine, other = both(study.at(percent, arm), study.at(percent, against))
    for a, b in zip(mine, other):
        if logs.schedule_key(a) != logs.schedule_key(b):
            raise BadLog(f"{a.run_id} and {b.run_id} trained on different schedules: no pair")
    found = {"arm": arm, "against": against, "n": 0}
    if not mine:
        return found
    found |= compared(mine, other, study.metric)
    parts = positions(mine, study.metric), positions(other, study.metric)
    found["by_position"] = {
        k: vars(stats.mean_interval(stats.differences(parts[0][k], parts[1][k])))
        for k in parts[0]
        if k in parts[1]
    }
    found["break_even"] = None
    if slope is not None:
        d = found["difference"]
        ends = [stats.break_even(d[k], slope["b"]) for k in ("value", "high", "low")]
        found["break_even"] = vars(Estimate(*ends)) | slope
    return found


# ---- Two arms, at equal time --------------------------------------------------------------------


def whole_blocks(study: Study) -> list[tuple]:
    """Blocks that have every arm at every fraction."""
    cells = [study.at(part, arm) for part in study.fractions for arm in study.arms]
    return [key for key in cells[0] if all(key in cell for cell in cells)]


def fit_arm(study: Study, arm: str, blocks: list[tuple]) -> stats.Fit:
    grid = [[study.at(part, arm)[key] for part in study.fractions] for key in blocks]
    return stats.Fit(
        stats.Ladder(
            np.array([run.header["tokens"] for run in grid[0]], float),
            np.array([finals(row, study.metric) for row in grid]),
            np.array([train_seconds(row) for row in grid]),
        )
    )


def equal_time(mine: stats.Fit, other: stats.Fit, tokens: int) -> dict:
    """Loss of two arms after the seconds that the second needs for `tokens`."""
    seconds = other.seconds(tokens)
    reach = seconds * mine.rate
    said = {"seconds": float(seconds[0]), "tokens": float(reach[0]), "difference": None}
    if mine.covers(reach):
        rows = mine.loss(reach) - other.loss(tokens)
        said["difference"] = vars(stats.bootstrap_interval(rows, mine.blocks))
    return said


def to_target(mine: stats.Fit, other: stats.Fit, target: float | None, tokens: int) -> dict:
    """Tokens and seconds to a loss: the claim's target, else what the second arm has after
    `tokens`."""
    goal = other.loss(tokens) if target is None else np.full_like(other.a, target)
    said = {"target": float(goal[0]), "tokens": None, "seconds": None, "ratio": None}
    need, theirs = mine.tokens(goal), other.tokens(goal)
    if mine.covers(need):
        said["tokens"] = vars(stats.bootstrap_interval(need, mine.blocks))
        said["seconds"] = vars(stats.bootstrap_interval(mine.seconds(need), mine.blocks))
        if other.covers(theirs):
            rows = mine.seconds(need) / other.seconds(theirs)
            said["ratio"] = vars(stats.bootstrap_interval(rows, mine.blocks))
    return said


def nearest(study: Study, arm: str, against: str) -> dict | None:
    """The arm's own schedule whose seconds come nearest those of `against` at the full one, and
    what these runs say without any fit."""
    base = study.at(study.full, against)
    options = []
    for part in study.fractions:
        mine, other = both(study.at(part, arm), base)
        if mine:
            ratio = stats.ratio_interval(train_seconds(mine), train_seconds(other))
            options.append((abs(math.log(ratio.value)), part, mine, other))
    if not options:
        return None
    _, part, mine, other = min(options, key=lambda option: option[:2])
    tokens = mine[0].header["tokens"]
    return {"fraction": part, "tokens": tokens} | compared(mine, other, study.metric)


def time_figures(study: Study) -> dict | None:
    """Fits of loss against tokens, loss at equal time and time to a loss; None where all runs have
    one length, or no block is whole."""
    blocks = whole_blocks(study)
    if len(study.fractions) < 2 or not blocks:
        return None
    fits = {arm: fit_arm(study, arm, blocks) for arm in study.arms}
    full = next(iter(study.at(study.full, study.arms[0]).values())).header["tokens"]
    target, pairs = study.claim.get("target"), []
    for arm, against in study.pairs:
        mine, other = fits[arm], fits[against]
        found = {"arm": arm, "against": against, "equal_time": equal_time(mine, other, full)}
        found["to_target"] = to_target(mine, other, target, full)
        found["nearest"] = nearest(study, arm, against)
        pairs.append(found)
    return {
        "blocks": len(blocks),
        "lengths": len(study.fractions),
        "fits": {arm: fit_figures(fit) for arm, fit in fits.items()},
        "pairs": pairs,
    }


def fit_figures(fit: stats.Fit) -> dict:
    """loss = a + b ln(tokens)."""
    rows = {"a": fit.a, "b": fit.b, "tokens_per_s": fit.rate}
    said = {name: vars(stats.bootstrap_interval(row, fit.blocks)) for name, row in rows.items()}
    return said | {"residuals": fit.residual.tolist()}


# What may differ between runs whose lengths a slope is taken from; all else in the configs of both
# is the same.
FREE = {"tokens", "seed", "data_seed", "data", "dev", "looks", "final_val", "track", "require_gpu"}
FREE |= {"out", "run_id", "save_every", "save_final", "keep", "resume"}


def slope_of(study: Study, times: dict | None, folder: Path) -> dict | None:
    """{"b": nats a token for each ln(tokens), "from": what it is taken from}, for break-even; None
    without a baseline, or with one length and no folder named in the claim."""
    if times is not None and study.baseline is not None:
        return {"b": times["fits"][study.baseline]["b"]["value"], "from": "its own schedules"}
    named = study.claim.get("slope")
    if not named or study.baseline is None:
        return None
    runs = [run for run in study.runs if run.arm == study.baseline]
    for name in named:
        runs += [run for run in read(folder.parent / name).runs if run.arm == study.baseline]
    for run in runs[1:]:
        ours, theirs = runs[0].header["config"], run.header["config"]
        odd = [k for k in ours.keys() & theirs.keys() - FREE if ours[k] != theirs[k]]
        if odd:
            raise BadLog(f"no slope from {runs[0].run_id} and {run.run_id}: {sorted(odd)} differ")
    lengths = [run.header["tokens"] for run in runs]
    if len(set(lengths)) < 2:
        raise BadLog(f"no slope from {', '.join(named)}: all runs there and here have one length")
    line = np.polyfit(np.log(lengths), finals(runs, study.metric), 1)
    return {"b": float(line[0]), "from": ", ".join(named)}


# ---- The plan's rule ----------------------------------------------------------------------------


def decide(study: Study) -> list[dict] | None:
    """The plan's test on its runs at the full schedule, for each pair (or arm) by itself; None
    before all runs are there, and without a plan."""
    if study.stage != "complete":
        return None
    rule = study.plan["rule"]
    if rule["test"].startswith("one-sample"):
        return [decide_record(study, arm, rule) for arm in record_arms(study)]
    return [decide_pair(study, arm, against, rule) for arm, against in rule["compare"]]


def record_arms(study: Study) -> list[str]:
    """The arms that a one-sample rule tests: those it names, else all but the baseline."""
    named = [pair[0] for pair in study.plan["rule"]["compare"]]
    return named or [arm for arm in study.arms if arm != study.baseline]


def verdict(values: list[float], rule: dict) -> dict:
    p = stats.t_test(values, rule["threshold"], rule["alternative"])
    return {"n": len(values), "p": p, "passed": p is not None and p < rule["alpha"]}


def decide_pair(study: Study, arm: str, against: str, rule: dict) -> dict:
    mine, other = both(study.at(study.full, arm), study.at(study.full, against))
    values = stats.differences(finals(mine, study.metric), finals(other, study.metric))
    return {
        **{"arm": arm, "against": against, **verdict(values, rule)},
        "p_two_sided": stats.t_test(values, rule["threshold"], "two-sided"),
        "p_sittings_differ": stats.heterogeneity(list(by_sitting(mine, values).values())),
    }


def decide_record(study: Study, arm: str, rule: dict) -> dict:
    """The mean is below the threshold; a record takes five runs or more."""
    values = finals(list(study.at(study.full, arm).values()), study.metric)
    said = {"arm": arm, "against": rule["threshold"], **verdict(values, rule)}
    return said | {"passed": said["passed"] and len(values) >= FEWEST_FOR_RECORD}


# ---- All of it ----------------------------------------------------------------------------------


def rounded(value):
    """Floats to 7 digits; what is not finite is None, which JSON has a word for."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def machine(run: Run) -> str:
    """`1x NVIDIA H100 80GB HBM3`, or `CPU`."""
    env = run.header["env"]
    return f"{env['count']}x {env['gpu']}" if env["gpu"] else "CPU"


def schedule_figures(study: Study, percent: int, slope: dict | None) -> dict:
    arms = {arm: list(study.at(percent, arm).values()) for arm in study.arms}
    tokens = {run.header["tokens"] for runs in arms.values() for run in runs}
    if len(tokens) > 1:
        said = " and ".join(f"{t:,}" for t in sorted(tokens))
        raise BadLog(f"runs of {percent} % of the budget have {said} tokens: give each a folder")
    return {
        "fraction": percent,
        "tokens": tokens.pop(),
        "arms": {arm: arm_figures(runs, study.metric) for arm, runs in arms.items() if runs},
        "pairs": [pair_figures(study, percent, *pair, slope) for pair in study.pairs],
    }


def summarise(folder: Path | str) -> dict:
    """Every figure of a folder of runs (see the head of this file for how they are made), as plain
    JSON values in a fixed order. BadLog where its runs cannot be summarised together."""
    study = read(Path(folder))
    times, claim, plan = time_figures(study), study.claim, study.plan
    slope, first = slope_of(study, times, Path(folder)), study.runs[0].header
    said = {
        "schema": SCHEMA,
        "kind": claim.get("kind", "screen"),
        "stage": study.stage,
        "preset": first["preset"],
        "metric": study.metric,
        "baseline": study.baseline,
        "target": claim.get("target"),
        "machines": sorted({machine(run) for run in study.runs}),
        "sittings": sorted({place(run)[0] for run in study.runs}),
        "blocks": len(whole_blocks(study)),
        "plan": plan
        and {
            **{"name": plan["name"], "blocks": plan["blocks"], "rule": plan["rule"]},
            "missing": [list(slot) for slot in study.missing],
        },
        "unplanned": list(study.unplanned),
        "unfinished": list(study.unfinished),
        "resumed": [run.run_id for run in study.runs if run.resumed],
        "decision": decide(study),
        "full": study.full,
        "schedules": [schedule_figures(study, part, slope) for part in study.fractions],
        "time": times,
    }
    return rounded(said)


def text_of(said: dict) -> str:
    """summary.json's content."""
    return json.dumps(said, indent=1) + "\n"


def write(folder: Path | str) -> dict:
    """Summarises a folder into its summary.json, whole or not at all."""
    said, path = summarise(folder), Path(folder) / "summary.json"
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text_of(said))
    os.replace(aside, path)
    return said


# ---- Command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="summary",
        description=first,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="with one folder a run below it")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--write", action="store_true", help="write FOLDER/summary.json")
    args = parser.parse_args(argv)
    try:
        said = write(args.folder) if args.write else summarise(args.folder)
    except BadLog as e:
        print(f"summary: {e}", file=sys.stderr)
        return 2
    print(tables(said, args.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
