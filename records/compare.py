"""Matched arms, block by block, so that a difference is the arm's and nothing else's.

    ./run.sh compare softmax diff_v2 mine.py:Class --blocks 3 --preset plain --data DIR --tokens N
    ./run.sh compare ... --plan NAME        writes a plan to commit; the same line then runs it

A **block** is one run of every arm (at each of --fractions of the budget), with the same seed and
the same data, one after another on one machine in one sitting; the order turns from block to block.
Differences are taken within a block only. Each arm has one process, compiled once and kept warm;
one computes, the others have given their memory back.

Seeds: block b (from 1) has seed seed0 + b - 1. All blocks read the text in the same order, that of
the files (or --data-seed), as records do: an interval then covers initialisation and the machine,
not the order of the text. --vary-data gives block b the order data_seed + b, and covers both.

Sittings: the same line again goes on. Whole blocks stay; --blocks is the number wanted in all, so a
larger one appends. A block that was cut is run anew as a whole, since its runs would otherwise be
paired across sittings: its runs, finished ones too, go to FOLDER/aside, where nothing reads them
and nobody can say that they were dropped in silence. Another train_gpt.py, arm, flag or data is
another comparison, and is refused.

Judged on dev_loss, val closed, unless there is a plan or --final-val: then on val_loss_ext.
Exit codes: those of train_gpt.py; of a failed arm, its own; 75 where a signal ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from records import logs, summary, tables, worker
from records.comparison import Comparison, Job, check_causality, make_comparison, slug
from records.folder import (
    check_folder,
    fill_folder,
    locked,
    place,
    plan_stands,
    set_aside,
    survey,
)

OURS = {"arm", "out", "run_id", "resume", "seed", "data_seed"}  # set here for every run

# ---- Processes -----------------------------------------------------------------------------------


class ArmFailed(RuntimeError):
    """An arm's process could not go on; `code` is this program's exit code."""

    def __init__(self, arm: str, code: int, reason: str):
        super().__init__(f"{arm}: {reason}")
        self.code = code


class Worker:
    """An arm's warm process, or torchrun's group of them; see records/worker.py."""

    def __init__(self, arm: str, comparison: Comparison, folder: Path, lock: int):
        self.arm, self.log = arm, folder / f"{slug(arm)}.log"
        script = os.path.relpath(worker.__file__)  # a header has it, and is filed
        start = [sys.executable, script]
        if comparison.gpus > 1:
            n = str(comparison.gpus)
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
            start = [sys.executable, *launcher, script]
        env = {**os.environ, worker.ALONE: str(int(len(comparison.arms) == 1))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*start, *comparison.flags, "--arm", arm, "--out", str(folder)],
                env=env,
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log},
                **{"start_new_session": True, "pass_fds": (lock,)},  # Ctrl-C is for us alone
            )

    def hear(self, kind: str, tick: Callable[[], None] = lambda: None) -> dict:
        """Waits for its next word, with a `tick` a second; ArmFailed where it is a bad one."""
        out = self.process.stdout
        while not select.select([out], [], [], 1.0)[0]:
            tick()
        text = out.readline()
        if not text:
            code = self.process.wait()
            lines = self.log.read_text(errors="replace").rstrip().splitlines()[-5:]
            reason = "\n    ".join([f"its process ended ({code}); {self.log} ends with", *lines])
            raise ArmFailed(self.arm, T.EXIT_CODES["peer lost"], reason)
        said = json.loads(text)
        if "failed" in said:
            raise ArmFailed(self.arm, said["failed"]["code"], said["failed"]["reason"])
        return said[kind]

    def tell(self, job: Job, sitting: str) -> None:
        labels = {"sitting": sitting, "block": job.block, "order": job.order}
        command = {k: getattr(job, k) for k in ("seed", "data_seed", "tokens", "run_id")}
        command["labels"] = labels | {"fraction": job.fraction}
        with contextlib.suppress(BrokenPipeError):  # it is gone, which `hear` will find
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()

    def end(self, in_peace: bool) -> None:
        """Closes the line. Its log goes with it, unless there was a failure."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if not in_peace:
            self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        if in_peace:
            self.log.unlink(missing_ok=True)


# ---- The table while it goes ---------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Table:
    """A line for every run that is done; on a terminal also one, redrawn, for the run at work."""

    def __init__(self, comparison: Comparison, jobs: list[Job]):
        self.comparison, self.left, self.live = comparison, list(jobs), sys.stdout.isatty()
        self.wide = max(len(slug(a)) for a in (*comparison.arms, "arm"))
        self.spent: dict[str, list[tuple[int, float]]] = {}  # arm -> (tokens, seconds) of its runs
        self.line("block", "arm", "budget", comparison.metric, "ms/step", "tokens/s", "to go")

    def line(self, block, arm, budget, loss, ms, rate, left, end="\n") -> None:
        clear = "\r\033[K" if self.live else ""
        text = f"{block:>7}  {arm:{self.wide}}  {budget:>6}  {loss:>12}  {ms:>9}  {rate:>11}  "
        print(f"{clear}{text}{left:>8}", end=end, flush=True)

    def name(self, job: Job) -> tuple[str, str, str]:
        return f"{job.block}/{self.comparison.blocks}", slug(job.arm), f"{job.fraction} %"

    def to_go(self) -> str:
        """Time for the runs that are left, from each arm's own pace where it has run."""
        everyone = [pair for pairs in self.spent.values() for pair in pairs]
        if not everyone:
            return "?"
        total = 0.0
        for job in self.left:
            tokens, seconds = map(sum, zip(*self.spent.get(job.arm, everyone)))
            total += job.tokens * seconds / tokens
        return duration(total)

    def done(self, job: Job, result: dict, seconds: float) -> None:
        self.left.remove(job)
        self.spent.setdefault(job.arm, []).append((job.tokens, seconds))
        steps = len(T.plan_steps(self.comparison.config, job.tokens))
        ms, loss = 1000 * result["train_s"] / steps, result[self.comparison.metric]
        rate = f"{result['tokens_per_s']:,.0f}"
        self.line(*self.name(job), f"{loss:.4f}", f"{ms:.1f}", rate, self.to_go())

    def working(self, job: Job, log: Path) -> None:
        """The run's last step, from the end of its log."""
        if not self.live or not log.is_file():
            return
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - 4096))
            lines = f.read().decode(errors="replace").split("\n")[:-1]
        steps = [text for text in lines if text.startswith('{"t": "step"')]
        if steps:
            s = json.loads(steps[-1])
            loss, rate = f"step {s['step']}", f"{s['tokens'] / max(1e-9, s['train_s']):,.0f}"
            self.line(*self.name(job), loss, f"{s['ms']:.1f}", rate, self.to_go(), end="")


# ---- A sitting -----------------------------------------------------------------------------------


def start_workers(
    comparison: Comparison, folder: Path, lock: int, workers: dict[str, Worker]
) -> list[dict]:
    """Starts one process an arm, `warm_together` of them at a time; the data that all of them read.
    Fills `workers` as it goes, so that the caller ends what it has started."""
    digests = {T.sha256(folder / "code" / name) for name in comparison.code}
    data = None
    for i, arm in enumerate(comparison.arms):
        if arm not in workers:
            for each in comparison.arms[i : i + comparison.warm_together]:
                workers[each] = Worker(each, comparison, folder, lock)
        said = workers[arm].hear("ready")
        if not set(said["source_sha256"].values()) <= digests:
            raise T.InputError(f"{arm}: its code was edited a moment ago: start again")
        if data not in (None, said["data"]):
            raise T.InputError("the data changed a moment ago: start again")
        data, params = said["data"], said["params"]
        print(
            f"{arm}: {params['active_matmul']:,} active matmul parameters, "
            f"{params['attention']:,} in attention, {params['stored']:,} stored; "
            f"{said['flops_per_token'] / 1e9:.4g} GFLOP a token; warm in {said['compile_s']:.0f} s",
            flush=True,
        )
    return data


def sit(
    comparison: Comparison, folder: Path, lock: int, whole: dict[int, list], left: list[Path]
) -> None:
    """Runs the blocks that are missing."""
    sitting = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    missing = [b for b in range(1, comparison.blocks + 1) if b not in whole]
    jobs = [job for block in missing for job in comparison.jobs(block)]
    workers: dict[str, Worker] = {}
    in_peace = False
    try:
        data = start_workers(comparison, folder, lock, workers)
        if any(run.header["data"] != data for runs in whole.values() for run in runs):
            raise T.InputError(f"{folder} has runs on other data: use --out")
        set_aside(folder, left)
        table = Table(comparison, jobs)
        for job in jobs:
            began, log = time.monotonic(), folder / job.run_id / "run.jsonl"
            workers[job.arm].tell(job, sitting)
            result = workers[job.arm].hear("done", functools.partial(table.working, job, log))
            table.done(job, result, time.monotonic() - began)
        in_peace = True
    finally:
        for w in workers.values():
            w.end(in_peace)


def compare(args: argparse.Namespace, flags: list[str]) -> None:
    """All of it. InputError before anything runs, ArmFailed where an arm cannot go on."""
    comparison = make_comparison(args, flags)
    folder = place(args.out, args.plan, comparison)
    check_causality(comparison)
    with locked(folder) as lock:
        check_folder(folder, comparison)
        whole, left = survey(folder, comparison)
        if args.plan:
            if not plan_stands(folder, comparison, args.plan, bool(whole or left)):
                return
        elif (folder / "plan.json").is_file():
            raise T.InputError(f"{folder} has a plan: give its --plan NAME, or another --out")
        fill_folder(folder, comparison, args.plan)
        print(f"{folder}: {len(whole)} of {comparison.blocks} blocks; by {comparison.metric}")
        if set(range(1, comparison.blocks + 1)) - set(whole):
            sit(comparison, folder, lock, whole, left)
        report(folder)


def report(folder: Path) -> None:
    """What the logs say: summary.json, plots, the table."""
    print(tables.tables(summary.write(folder)), flush=True)
    try:
        from records import plots
    except ImportError as e:  # nice to have
        print(f"no plots: {e.name} is not installed")
    else:
        print("plots:", *plots.draw(folder))


# ---- Command line --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our own settings, train_gpt.py's flags as given)."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="compare",
        description=first,
        epilog=rest + "\nEvery other flag is train_gpt.py's (--help there), the same for all arms.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("arms", nargs="+", metavar="ARM", help="NAME or path.py:Class, then ,key=value")
    add("--blocks", type=int, required=True, metavar="N", help="blocks wanted in all")
    add("--preset", default="plain", help="of train_gpt.py, or gpt2 [plain]")
    add("--plan", default="", metavar="NAME", help="a plan in git comes before the first run")
    add("--target", type=float, metavar="LOSS", help="plans a record: a mean of at most this")
    add("--out", type=Path, metavar="FOLDER", help="(records/TRACK/DATE_NAME, or below runs)")
    add("--fractions", type=int, nargs="+", default=[100], metavar="PERCENT", help="of --tokens")
    add("--seed0", type=int, default=0, metavar="S", help="seed of the first block (0)")
    add("--data-seed", type=int, default=0, metavar="S", help="order of the text (0: the files')")
    add("--vary-data", action="store_true", help="another order in every block")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs that a run has (1)")
    add(
        "--warm-together",
        **{"type": int, "default": 1, "metavar": "N"},
        help="arms that compile at a time, before any clock; each takes a run's memory (1)",
    )
    theirs = [name for name in T.FLAGS if name not in OURS]
    for name in theirs:
        boolean = {"action": argparse.BooleanOptionalAction}
        kind = boolean if T.FLAGS[name][1].type == "bool" else {}
        add("--" + name.replace("_", "-"), default=None, help=argparse.SUPPRESS, **kind)
    args = parser.parse_intermixed_args(argv)
    if args.save_final is None:
        args.save_final = False  # gigabytes a run
    if args.final_val is None and not args.plan:
        args.final_val = False
    flags = ["--preset", args.preset]
    for name in theirs:
        value, flag = getattr(args, name), name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", value]
    return args, flags


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    args, flags = parse(argv)
    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        compare(args, flags)
        return 0
    except (T.InputError, logs.BadLog) as e:
        code, reason = T.EXIT_CODES["input"], str(e)
    except ArmFailed as e:
        code, reason = e.code, str(e)
    except KeyboardInterrupt:
        code, reason = T.EXIT_CODES["signal"], "ended by a signal; the same line goes on from here"
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"compare: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
