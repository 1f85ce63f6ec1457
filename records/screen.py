"""Whole runs of one arm under several settings, in one process and from one compilation.

    python -m records.screen base c75:cooldown=0.75 lr:matrix_lr=0.02,embed_lr=0.4 \\
        --preset speedrun --data DIR --tokens 98304000 --seeds 0 1

A variant is NAME, or NAME:key=value,..., with what needs no graph of its own: the schedule (steps
of other sizes, windows and classes of the loss, too: all are compiled before the first clock),
learning rates, momentum, adam_every, the tail. Other settings are arms, for `compare`. The first
variant is what the others are measured against. Every seed runs all variants; the order turns.

Judged on dev_loss; val stays closed. FOLDER/NAME_sSEED are the runs. The same line goes on after a
stop: a finished run is not made again, one that was cut goes to FOLDER/aside. A screen shows what
to test, and decides nothing (RULES.md). Every other flag is train_gpt.py's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from records import logs, stats
from records.folder import PLACE, finished, set_aside

SCHEDULE = {f.name for f in dataclasses.fields(T.ScheduleConfig)}
RATES = {f.name for f in dataclasses.fields(T.OptimConfig) if f.name.endswith("_lr")}
STEPS = {"momentum", "momentum_start", "momentum_warmup", "momentum_cooldown", "adam_every"}
FREE = SCHEDULE | RATES | STEPS | {"tail", "tail_every", "tail_blend"}


def parse_variant(text: str) -> tuple[str, dict]:
    """`NAME[:key=value,...]` -> (NAME, fields of Config)."""
    name, _, rest = text.partition(":")
    changes = {}
    for pair in filter(None, rest.split(",")):
        key, eq, value = pair.partition("=")
        if not eq or key not in FREE:
            raise T.InputError(
                f"variant {text!r}: {pair!r} needs a graph of its own, or is no key=value: without "
                f"one there are {', '.join(sorted(FREE))}; for others give arms to compare"
            )
        changes[key] = T.parse_value(key, value)
    return name, changes


def all_stages(configs: list[T.Config]) -> tuple[T.Stage, ...]:
    """Those of all variants as one schedule, which a warm-up compiles."""
    stages = [
        (s, sum(t.share for t in c.schedule.stages)) for c in configs for s in c.schedule.stages
    ]
    return tuple(
        dataclasses.replace(s, share=s.share / whole / len(configs)) for s, whole in stages
    )


def rows_of(folder: Path) -> list[dict]:
    """Of the finished runs below it, in their order: name, seed, dev_loss, train_s."""
    found = filter(None, map(finished, sorted({p.parent for p in logs.logs_in(folder)})))
    return [
        {"name": run.labels["variant"], "seed": run.header["seed"]}
        | {"dev_loss": run.final("dev_loss"), "train_s": run.end["train_s"]}
        for run in sorted(found, key=lambda run: run.labels["order"])
    ]


class Screen:
    """A warm Trainer, and the runs so far."""

    def __init__(self, base: T.Config, variants: dict[str, dict], folder: Path):
        self.folder = folder
        self.configs = {name: base.with_(**changes) for name, changes in variants.items()}
        problems = [f"{n}: {p}" for n, c in self.configs.items() for p in T.check_config(c)]
        if problems:
            raise T.InputError("; ".join(problems))
        self.trainer = T.Trainer(base.with_(stages=all_stages(list(self.configs.values()))))
        if self.trainer.world.size > 1:
            raise T.InputError("one GPU a screen: start one on each, with CUDA_VISIBLE_DEVICES")
        vocab = self.trainer.cfg.model.vocab
        self.configs = {name: cfg.with_(vocab=vocab) for name, cfg in self.configs.items()}

    def prepare(self, cfg: T.Config) -> None:
        """The trainer's settings and rates; a group with another rate compiles nothing anew."""
        optimizer = self.trainer.optimizer
        self.trainer.cfg = cfg
        groups = T.parameter_groups(cfg.optim)
        for bank in optimizer.banks:
            name, (_, p) = next(iter(bank.slots.items()))
            bank.group = dataclasses.replace(bank.group, lr=groups[T.group_of(name, p)].lr)
        if optimizer.rows is not None:
            rate = groups["ngram"].lr
            optimizer.rows.group = dataclasses.replace(optimizer.rows.group, lr=rate)

    def is_done(self, name: str, path: Path) -> bool:
        """Whether this run is there. InputError where it had other settings."""
        run = finished(path)
        if run is None:
            return False
        mine, ran = self.configs[name].flat(), run.header["config"]
        if any(ran.get(k) != mine[k] for k in mine.keys() - PLACE | {"tokens"}):
            raise T.InputError(f"{self.folder} has {name} with other settings: use --out")
        return True

    def sit(self, seeds: list[int]) -> None:
        """Every run that is missing."""
        names = list(self.configs)
        for turn, seed in enumerate(seeds):
            at = turn % len(names)
            for place, name in enumerate(names[at:] + names[:at]):
                path = self.folder / f"{name}_s{seed}"
                if self.is_done(name, path):
                    continue
                if path.exists():
                    set_aside(self.folder, [path], "it")
                self.prepare(self.configs[name])
                self.trainer.labels = {"variant": name, "order": turn * len(names) + place}
                self.trainer.reset(seed, self.trainer.cfg.data.data_seed, run_id=path.name)
                self.trainer.run()
                print(table(rows_of(self.folder), names), flush=True)


def table(rows: list[dict], names: list[str]) -> str:
    """Of every variant: runs, dev_loss, difference to the first one's at the same seeds, time."""
    of = {name: {r["seed"]: r for r in rows if r["name"] == name} for name in names}
    first = of[names[0]]
    wide = max(map(len, names))
    lines = [f"{'':{wide}}  runs  dev_loss  difference  95 %                train s"]
    for name in names:
        mine = of[name]
        if not mine:
            continue
        loss, seconds = (
            stats.mean([r[key] for r in mine.values()]) for key in ("dev_loss", "train_s")
        )
        both = [mine[s]["dev_loss"] - first[s]["dev_loss"] for s in mine if s in first]
        gain = stats.mean_interval(both)
        apart = f"{gain.value:+.4f}" if both and name != names[0] else ""
        limits = f"{gain.low:+.4f} to {gain.high:+.4f}" if apart and gain.low is not None else ""
        cells = f"{len(mine):4d}  {loss:8.4f}  {apart:>10}  {limits:18}  {seconds:7.1f}"
        lines.append(f"{name:{wide}}  {cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="screen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", metavar="NAME[:key=value,...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="[0]")
    parser.add_argument("--out", type=Path, default=Path("runs/screen"), metavar="FOLDER")
    args, rest = parser.parse_known_args(argv)
    try:
        variants = dict(map(parse_variant, args.variants))
        if len(variants) < len(args.variants):
            raise T.InputError("two variants of one name")
        flags = ["--no-final-val", "--no-save-final", "--out", str(args.out)]
        screen = Screen(T.parse_args([*rest, *flags]), variants, args.out)
        screen.sit(args.seeds)
        print(table(rows_of(args.out), list(variants)))
    except T.InputError as e:
        print(f"screen: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
