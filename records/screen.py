"""Whole runs of one arm under several settings, on dev: what is worth a comparison?

    python -m records.screen base c75:cooldown=0.75 lr:matrix_lr=0.02,embed_lr=0.4 \\
        --preset speedrun --data DIR --tokens 98304000 --seeds 0 1
    python -m records.screen base xsa:xsa=false smear:smear=false --at-a-time 2 --preset ...

Variants come first, before any flag: NAME, or NAME:key=value,... The first one is what the others
are measured against. Variants of one graph share a process and its compilation, and the order turns
from seed to seed: they differ in the schedule (steps of other sizes, windows and classes of the
loss, too: all are compiled before the first clock), learning rates, momentum, adam_every, the tail.
Another setting of the model, the optimizer or the kernels has a process of its own. --at-a-time of
them are there at once: one trains while others compile, which is what makes an ablation short. Each
takes a run's memory; several GPUs are dealt out to them. On a shared GPU one trains at a time, and
its times bear a ~, as what the others compile is also tried there.

Judged on dev_loss; val stays closed. FOLDER/NAME_sSEED are the runs, FOLDER/NAME.out is what a
process said. The same line goes on after a stop: a finished run is not made again, one that was cut
goes to FOLDER/aside. A process that fails is named, and the others go on. A screen shows what to
test, and decides nothing (RULES.md). Every other flag is train_gpt.py's; an --arm is the same for
all variants (arms are for `compare`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import train_gpt as T
from records import logs, stats, worker
from records.compare import interrupted
from records.folder import PLACE, finished, locked, set_aside

SCHEDULE = {f.name for f in dataclasses.fields(T.ScheduleConfig)}
RATES = {f.name for f in dataclasses.fields(T.OptimConfig) if f.name.endswith("_lr")}
STEPS = {"momentum", "momentum_start", "momentum_warmup", "momentum_cooldown", "adam_every"}
ENDS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
PART = "RECORDS_SCREEN_PART"  # in the environment, "1": a process of a screen that holds the folder
SHARED = "RECORDS_SCREEN_SHARED"  # in the environment, "1": others have the same GPU
FREE = SCHEDULE | RATES | STEPS | {"tail", "tail_every", "tail_blend"}  # need no graph of their own
KERNELS = {"attention", "fp8", "mlp_kernel", "mlp_fp8", "loss_kernel", "cuda_graphs"}
OWN = {name for name, (part, _) in T.FLAGS.items() if part in ("model", "optim")} | KERNELS
OWN -= FREE | {"arm", "vocab"}


def parse_variant(text: str) -> tuple[str, dict]:
    """`NAME[:key=value,...]` -> (NAME, fields of Config)."""
    name, _, rest = text.partition(":")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise T.InputError(
            f"variant {text!r}: a name of letters, digits, . + and -, then :key=value"
        )
    changes = {}
    for pair in filter(None, rest.split(",")):
        key, eq, value = pair.partition("=")
        if not eq or key not in FREE | OWN:
            raise T.InputError(f"variant {text!r}: {pair!r} is no key=value of a run's settings")
        changes[key] = T.parse_value(key, value)
    return name, changes


def by_graph(variants: dict[str, dict]) -> list[list[str]]:
    """Names of variants that can share a process, those that have the same of OWN, in order."""
    groups: dict[frozenset, list[str]] = {}
    for name, changes in variants.items():
        own = frozenset((key, value) for key, value in changes.items() if key in OWN)
        groups.setdefault(own, []).append(name)
    return list(groups.values())


def all_stages(configs: list[T.Config]) -> tuple[T.Stage, ...]:
    """Those of all variants as one schedule, which a warm-up compiles."""
    stages = [
        (s, sum(t.share for t in c.schedule.stages)) for c in configs for s in c.schedule.stages
    ]
    return tuple(
        dataclasses.replace(s, share=s.share / whole / len(configs)) for s, whole in stages
    )


def runs_of(folder: Path) -> list[logs.Run]:
    """A screen's finished runs below it, in their order."""
    found = filter(None, map(finished, sorted({p.parent for p in logs.logs_in(folder)})))
    return sorted((r for r in found if "variant" in r.labels), key=lambda r: r.labels["order"])


def rows_of(folder: Path) -> list[dict]:
    """Of those: name, seed, dev_loss, train_s; shared, where others compiled on the same GPU."""
    return [
        {"name": run.labels["variant"], "seed": run.header["seed"]}
        | {"dev_loss": run.final("dev_loss"), "train_s": run.end["train_s"]}
        | {"shared": run.labels.get("shared", False)}
        for run in runs_of(folder)
    ]


def configure(base: T.Config, variants: dict[str, dict]) -> dict[str, T.Config]:
    """Each variant's Config; one InputError that names everything wrong."""
    configs = {name: base.with_(**changes) for name, changes in variants.items()}
    problems = [f"{n}: {p}" for n, c in configs.items() for p in T.check_config(c)]
    if problems:
        raise T.InputError("; ".join(problems))
    return configs


def refuse_others(folder: Path, configs: dict[str, T.Config]) -> None:
    """InputError where the folder has finished runs of these names with other settings."""
    others = set()
    for run in runs_of(folder):
        name = run.labels["variant"]
        if name in configs:
            mine, ran = configs[name].flat(), run.header["config"]
            free = PLACE - {"tokens", "data_seed"}
            free |= set() if mine["vocab"] else {"vocab"}  # the data has it
            others |= {name for key in mine.keys() - free if ran.get(key) != mine[key]}
    if others:
        names = ", ".join(sorted(others))
        raise T.InputError(f"{folder} has {names} with other settings: use --out")


@contextlib.contextmanager
def turn(folder: Path, shared: bool) -> Iterator[None]:
    """Until no other process of this screen trains on the same GPU, and then it is this one's."""
    if not shared:
        yield
        return
    with (folder / f".turn{os.environ.get('CUDA_VISIBLE_DEVICES', '')}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Screen:
    """A warm Trainer of variants that share a graph, and the runs so far. shared: others have the
    same GPU."""

    def __init__(self, configs: dict[str, T.Config], folder: Path, shared: bool = False):
        self.folder, self.configs, self.shared = folder, configs, shared
        each = list(configs.values())
        corpus = T.Corpus.open(each[0].data.data, each[0].data.dev)
        ends = {}
        for name, cfg in configs.items():
            try:
                ends[name] = T.steps_of(cfg, corpus)[-1].end
            except T.InputError as e:
                raise T.InputError(f"{name}: {e}") from None
        longest = configs[max(ends, key=ends.get)].schedule
        budget = {key: getattr(longest, key) for key in ("tokens", "most_tokens", "passes")}
        self.trainer = T.Trainer(each[0].with_(stages=all_stages(each), **budget))
        if self.trainer.world.size > 1:
            raise T.InputError("one GPU a screen: start one on each, with CUDA_VISIBLE_DEVICES")
        self.refuse_other_text()
        vocab = self.trainer.cfg.model.vocab
        self.configs = {name: cfg.with_(vocab=vocab) for name, cfg in self.configs.items()}

    def refuse_other_text(self) -> None:
        """InputError where the folder has runs on other data, or of another train_gpt.py."""
        mine = self.trainer.data_digests, self.trainer.source_sha256
        for run in runs_of(self.folder):
            if (run.header["data"], run.header["source_sha256"]) != mine:
                name = run.labels["variant"]
                said = f"{self.folder} has {name} on other data, or by another train_gpt.py"
                raise T.InputError(f"{said}: use --out")

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

    def missing(self, seeds: list[int]) -> list[tuple[int, str, int, Path]]:
        """(place in the order, variant, seed, folder) of the runs that there are not yet."""
        names = list(self.configs)
        order = [
            (name, seed)
            for at, seed in enumerate(seeds)
            for name in names[at % len(names) :] + names[: at % len(names)]
        ]
        runs = [(i, n, seed, self.folder / f"{n}_s{seed}") for i, (n, seed) in enumerate(order)]
        return [run for run in runs if finished(run[-1]) is None]

    def sit(self, seeds: list[int]) -> None:
        """Every run that is missing, one after another, the GPU's only ones."""
        todo = self.missing(seeds)
        if not todo:
            return
        self.trainer.warm_up()  # of the stages of all variants, before any run sets its own
        with turn(self.folder, self.shared):
            for place, name, seed, path in todo:
                if path.exists():
                    set_aside(self.folder, [path], "it")
                self.prepare(self.configs[name])
                self.trainer.labels = {"variant": name, "order": place}
                self.trainer.labels |= {"shared": True} if self.shared else {}
                self.trainer.reset(seed, self.trainer.cfg.data.data_seed, run_id=path.name)
                self.trainer.run()
                T.write_exit(self.trainer.folder, T.EXIT_CODES["done"], "done")
                print(table(rows_of(self.folder), list(self.configs)), flush=True)


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
        loss = stats.mean([r["dev_loss"] for r in mine.values()])
        about = "~" if any(r["shared"] for r in mine.values()) else ""
        seconds = f"{about}{stats.mean([r['train_s'] for r in mine.values()]):.1f}"
        both = [mine[s]["dev_loss"] - first[s]["dev_loss"] for s in mine if s in first]
        gain = stats.mean_interval(both)
        apart = f"{gain.value:+.4f}" if both and name != names[0] else ""
        limits = f"{gain.low:+.4f} to {gain.high:+.4f}" if apart and gain.low is not None else ""
        cells = f"{len(mine):4d}  {loss:8.4f}  {apart:>10}  {limits:18}  {seconds:>7}"
        lines.append(f"{name:{wide}}  {cells}".rstrip())
    if not first:
        lines.append(f"{names[0]} has no run, so there is nothing to measure the others against")
    return "\n".join(lines)


# ---- Processes -----------------------------------------------------------------------------------


def gpus_here() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def run_apart(
    commands: dict[str, list[str]], at_a_time: int, folder: Path, shared: bool, lock: int = -1
) -> list[str]:
    """Runs each command, at_a_time of them at once, with what it says in FOLDER/NAME.out; names of
    those that failed. None outlives this process, unless that one is killed outright: they have
    the folder's `lock` then."""
    cards = gpus_here()
    waiting, failed = list(commands), []
    running: dict[int, tuple[str, subprocess.Popen]] = {}  # by place, from 0
    print(f"{len(commands)} processes, {at_a_time} at a time; see {folder}/*.out", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            for place in sorted(set(range(at_a_time)) - set(running)):
                if waiting:
                    name, env = waiting.pop(0), {**os.environ, PART: "1"}
                    if cards:
                        env["CUDA_VISIBLE_DEVICES"] = cards[place % len(cards)]
                    if shared:
                        env[SHARED] = "1"
                    with (folder / f"{name}.out").open("a") as out:
                        how = {"stdout": out, "stderr": subprocess.STDOUT, "env": env}
                        how |= {"pass_fds": () if lock < 0 else (lock,)}
                        running[place] = name, subprocess.Popen(commands[name], **how)
            time.sleep(0.2)
            for place, (name, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    print(f"{name}: ended with {process.returncode}", flush=True)
                    failed += [name] if process.returncode else []
    finally:
        stop([process for _, process in running.values()])
    return failed


def stop(processes: list[subprocess.Popen]) -> None:
    """Ends them, and is not to be interrupted in it: who does not end in a minute is killed."""
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in ENDS} if processes else {}
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for sig, handler in before.items():
        signal.signal(sig, handler)


def run_groups(
    groups: list[list[str]], args: argparse.Namespace, rest: list[str], lock: int
) -> list[str]:
    """A process of this program for each group of variants; names of those that failed."""
    texts = {text.partition(":")[0]: text for text in args.variants}
    seeds = ["--seeds", *map(str, args.seeds)]
    start = [sys.executable, str(Path(__file__).resolve())]
    commands = {
        group[0]: [*start, *(texts[name] for name in group), *seeds, "--out", str(args.out), *rest]
        for group in groups
    }
    before = {sig: signal.signal(sig, interrupted) for sig in ENDS}
    try:
        shared = min(args.at_a_time, len(groups)) > max(1, len(gpus_here()))
        failed = run_apart(commands, args.at_a_time, args.out, shared, lock)
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    for name in failed:
        print(f"screen: {name} failed: see {args.out / name}.out", file=sys.stderr)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="screen",
        usage="%(prog)s NAME[:key=value,...] ... [--seeds N ...] [--out FOLDER] [--at-a-time N] "
        "[train_gpt.py's flags]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("variants", nargs="+", metavar="NAME[:key=value,...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="[0]")
    parser.add_argument("--out", type=Path, default=Path("runs/screen"), metavar="FOLDER")
    parser.add_argument(
        "--at-a-time", type=int, default=1, metavar="N", help="processes that run at once [1]"
    )
    args, rest = parser.parse_known_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    screen = None
    try:
        variants = dict(map(parse_variant, args.variants))
        if len(variants) < len(args.variants):
            raise T.InputError("two variants of one name")
        if args.at_a_time < 1:
            raise T.InputError("--at-a-time 1 or more")
        flags = ["--no-final-val", "--no-save-final", "--out", str(args.out)]
        base = T.parse_args([*rest, *flags])
        if base.run.run_id or base.run.resume:
            raise T.InputError("a screen names its runs itself: no --run-id, no --resume")
        configs = configure(base, variants)
        groups = by_graph(variants)
        held = contextlib.nullcontext(-1) if os.environ.get(PART) == "1" else locked(args.out)
        with held as lock:
            refuse_others(args.out, configs)
            if len(groups) == 1:
                screen = Screen(configs, args.out, os.environ.get(SHARED) == "1")
                screen.sit(args.seeds)
                failed = []
            else:
                failed = run_groups(groups, args, rest, lock)
        print(table(rows_of(args.out), list(variants)))
    except T.InputError as e:
        print(f"screen: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    except KeyboardInterrupt:
        print(
            "screen: ended by a signal; the same line goes on with the runs that are missing",
            file=sys.stderr,
        )
        return T.EXIT_CODES["signal"]
    except Exception as error:  # as train_gpt.py ends, and its run's exit.json says so
        trainer = screen and screen.trainer
        code, reason = worker.failure(error, trainer)
        T.write_exit(getattr(trainer, "folder", None), code, reason)
        print(f"screen: {reason}", file=sys.stderr)
        return code
    return T.EXIT_CODES["peer lost"] if failed else 0


if __name__ == "__main__":
    sys.exit(main())
