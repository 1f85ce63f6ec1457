"""The same steps at several world sizes: `python -m records.scaling FOLDER` prints, from the logs,
what more GPUs save and whether they compute the same.

Efficiency = (mean train seconds on 1 GPU / GPUs) / train seconds. Losses are compared step by step:
runs of one world size differ by the noise of the GPU's atomics alone, so two world sizes agree
where they differ by no more than that. FOLDER/resumed/ holds runs that went on at another world
size than they began with; they are compared with the run that they came from.

`python -m records.scaling --steps ONE.json MORE.json` says what further GPUs would cost, from what
tests/bench_step.py measured on one and on more (with --profile) of one machine. It is calculation:

    ms(n) = ms(1) / n + fixed + links(n)

links is the communication that nothing hides; with rings of one bandwidth a link it grows with
(n - 1) / n. fixed is what else the measured GPUs lose against ms(1) / n, and is taken to stay. The
pessimistic column hides none of the collectives' time alone. Neither knows what is not measured:
that a GPU's share of a step becomes small, and how the links of more GPUs share a switch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from records.logs import Run, load_run, load_runs, logs_in
from records.summary import ms_by_stage

RANGES = ((0, 1), (1, 5), (5, 25), (25, 50), (50, 75), (75, 100))  # in percent of the steps


def stage_ms(run: Run) -> list[float]:
    """ms a step of each stage, as summaries have it."""
    return [stage["ms"] for stage in ms_by_stage([run]).values()]


def rms(a: Run, b: Run, low: int, high: int) -> float:
    """Root mean square of the losses' differences over steps low to high, nats."""
    pairs = zip(a.steps[low:high], b.steps[low:high], strict=True)
    return math.sqrt(statistics.fmean((x["loss"] - y["loss"]) ** 2 for x, y in pairs))


def speed(runs: list[Run]) -> list[str]:
    one = [r for r in runs if r.header["world"] == 1]
    base = statistics.fmean(r.end["train_s"] for r in one) if one else math.nan
    stages = [statistics.fmean(ms) for ms in zip(*map(stage_ms, one), strict=True)]
    lines = ["| run | GPUs | train s | tokens/s | a GPU | efficiency | by stage | peak GB | kJ |"]
    lines += ["| --- " + "| ---: " * 8 + "|"]
    for r in runs:
        n, end = r.header["world"], r.end
        of = [f"{b / n / ms:.1%}" for b, ms in zip(stages, stage_ms(r), strict=True)]
        kj = "-" if end["joules"] is None else f"{end['joules'] / 1000:.1f}"
        lines.append(
            f"| {r.path.parent.name} | {n} | {end['train_s']:.2f} | {end['tokens_per_s']:,.0f} | "
            f"{end['tokens_per_s'] / n:,.0f} | {base / n / end['train_s']:.1%} | {' / '.join(of)} "
            f"| {(end['peak_alloc'] or 0) / 1e9:.2f} | {kj} |"
        )
    return lines


def agreement(pairs: list[tuple[Run, Run]]) -> list[str]:
    steps = len(pairs[0][0].steps)
    ranges = [(low * steps // 100, high * steps // 100) for low, high in RANGES]
    titles = [f"{low + 1}-{high}" if high > low + 1 else f"{high}" for low, high in ranges]
    lines = ["| runs | GPUs | " + " | ".join(titles) + " | dev loss |"]
    lines += ["| --- | --- " + "| ---: " * (len(titles) + 1) + "|"]
    for a, b in pairs:
        worlds = f"{a.header['world']}, {b.header['world']}"
        gap = b.final("dev_loss") - a.final("dev_loss")
        cells = [f"{rms(a, b, *r):.1e}" if rms(a, b, *r) else "0" for r in ranges]
        names = f"{a.path.parent.name}, {b.path.parent.name}"
        lines.append(f"| {names} | {worlds} | {' | '.join(cells)} | {gap:+.4f} |")
    return lines


def report(folder: Path) -> str:
    """The tables of a folder in Markdown; ValueError where it has no finished run on one GPU."""
    runs = [r for r in load_runs(folder) if r.done]
    if not any(r.header["world"] == 1 for r in runs):
        raise ValueError(f"{folder} has no finished run on one GPU to compare with")
    resumed = [load_run(p) for p in logs_in(folder, "resumed/*")]
    came_from = {r.run_id: r for r in runs}
    text = [*speed(runs), "", "Root mean square of the differences of the losses, by step:", ""]
    text += agreement(list(itertools.combinations(runs, 2)))
    if resumed:
        text += ["", "Resumed half-way at another world size, against the run that went on"]
        text[-1] += " (GPUs: those of the first half):"
        text += [""]
        text += agreement([(came_from[r.run_id], r) for r in resumed])
    return "\n".join(text)


def ring(world: int) -> float:
    """Share of a collective's bytes that crosses each GPU's link."""
    return (world - 1) / world


def projection(one: dict, more: dict, world: int) -> list[dict]:
    """For each long window, ms a step measured and by calculation on `world` GPUs; see the top.

    one, more: rows of bench_step.py of the same arm and tokens. ValueError where they do not fit.
    """
    same = all(one[key] == more[key] for key in ("arm", "tokens", "gpu"))
    if not same or one["world"] != 1 or more["world"] < 2 or "communication" not in more:
        raise ValueError("give one arm's steps on one GPU, then on more of them with --profile")
    had, rows = more["world"], []
    # Of the ranks' figures the least: what a rank waits for the others is in `fixed` already.
    exposed = min(c["exposed_ms"] for c in more["communication"])
    alone = sum(c["ms"] for c in more["collectives"])
    for window in sorted(one["ms"].keys() & more["ms"].keys(), key=int):
        single, measured = one["ms"][window], more["ms"][window]
        fixed = max(0.0, measured - single / had - exposed)
        row = {"window": int(window), "one_ms": single, "measured_ms": measured, "fixed_ms": fixed}
        row["measured_efficiency"] = single / had / measured
        for name, cost in (("", exposed), ("none_hidden_", max(alone, exposed))):
            ms = single / world + fixed + cost * ring(world) / ring(had)
            row |= {f"{name}ms": ms, f"{name}efficiency": single / world / ms}
        rows.append(row)
    return rows


def projected(one: dict, more: dict, world: int) -> str:
    had, tokens = more["world"], one["tokens"]
    lines = [f"{one['arm']}, {tokens:,} tokens a step, {had} x {more['gpu']}; {world} GPUs are"]
    lines[0] += " calculated from these and were not measured."
    title = f"| window | ms on 1 | on {had}, efficiency | fixed ms | ms on {world}, tokens/s, "
    lines += ["", title + "efficiency | nothing hidden |", "| ---: " * 6 + "|"]
    for r in projection(one, more, world):
        rate = 1000 * tokens / r["ms"]
        bare = f"{r['none_hidden_ms']:.1f}, {r['none_hidden_efficiency']:.1%}"
        lines.append(
            f"| {r['window']} | {r['one_ms']:.1f} | {r['measured_ms']:.1f}, "
            f"{r['measured_efficiency']:.1%} | {r['fixed_ms']:.2f} | {r['ms']:.1f}, {rate:,.0f}, "
            f"{r['efficiency']:.1%} | {bare} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("folder", type=Path, nargs="?", help="of run folders at several world sizes")
    p.add_argument("--steps", type=Path, nargs=2, metavar=("ONE", "MORE"), help="of bench_step.py")
    p.add_argument("--to", type=int, default=8, help="GPUs that --steps calculates")
    args = p.parse_args(argv)
    if (args.folder is None) == (args.steps is None):
        p.error("a folder, or --steps with two files")
    try:
        if args.folder is not None:
            print(report(args.folder))
        else:
            one, more = (json.loads(path.read_text()) for path in args.steps)
            for a, b in zip(one, more, strict=True):
                print(projected(a, b, args.to))
    except (OSError, ValueError, KeyError) as e:
        print(f"scaling.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
