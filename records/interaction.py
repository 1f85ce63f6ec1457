"""Do two gains add up? The interaction of two changes, block by block, from a folder of runs.

    python -m records.interaction FOLDER [--arms NEITHER ONE OTHER BOTH]

Interaction = both - one - other + neither, nats a token: 0 where the gains add up, positive where
together they give less than their sum, negative where more. Each block gives one value; the mean
comes with its 95 % t interval, beside the gains of each change and of both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from records import stats, summary, tables
from records.logs import BadLog, schedule_key

ARMS = ("softmax", "diff_v2", "selective", "diff_v2,selective=true")


def losses(folder: Path, arms: list[str]) -> tuple[str, list[list[float]]]:
    """(the metric, [arm][block] final losses in the blocks that have all of `arms`). BadLog where
    there is none, or where a block's runs had different schedules."""
    study = summary.read(folder)
    runs = [study.at(study.full, arm) for arm in arms]
    shared = [place for place in runs[0] if all(place in r for r in runs)]
    if not shared:
        raise BadLog(f"{folder} has no block with all of {', '.join(arms)}")
    for place in shared:
        if len({schedule_key(r[place]) for r in runs}) > 1:
            raise BadLog(f"{folder}: block {place[1]} has runs of different schedules")
    return study.metric, [summary.finals([r[p] for p in shared], study.metric) for r in runs]


def contrasts(found: list[list[float]]) -> dict[str, list[float]]:
    """Block by block: what each change does alone, both together, and the interaction."""
    neither, one, other, both = found
    alone = stats.differences(one, neither), stats.differences(other, neither)
    together = stats.differences(both, neither)
    summed = [a + b for a, b in zip(*alone, strict=True)]
    rest = stats.differences(together, summed)
    return {"one": alone[0], "other": alone[1], "both": together, "interaction": rest}


def report(folder: Path, arms: list[str]) -> str:
    metric, found = losses(folder, arms)
    neither, one, other, both = arms
    names = (f"{one} - {neither}", f"{other} - {neither}", f"{both} - {neither}", "interaction")
    rows = [["", "n", metric, "95 %", "p, two-sided"]]
    for name, values in zip(names, contrasts(found).values(), strict=True):
        estimate, p = stats.mean_interval(values), stats.t_test(values, 0.0, "two-sided")
        middle = tables.number(estimate.value, sign=True)
        spans = tables.interval(vars(estimate), sign=True)
        rows.append([name, str(len(values)), middle, spans, tables.number(p)])
    return tables.render(rows, markdown=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="interaction", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="with one folder a run below it")
    parser.add_argument("--arms", nargs=4, default=list(ARMS), metavar="ARM", help="in that order")
    args = parser.parse_args(argv)
    try:
        print(report(args.folder, args.arms))
    except BadLog as e:
        print(f"interaction: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
