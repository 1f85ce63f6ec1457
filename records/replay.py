"""Reruns the first steps of a filed run from the record's own files and compares the losses.

    python -m records.replay RECORD [--run RUN_ID] [--steps 20] [--data DIR]

RECORD is a folder below records/. Its code/ and the config in the run's header go into a temporary
folder, and train there as they did: the same schedule, stopped after some steps of it. What may
differ is stated beside each step (`allowance`). Exit code 0: the losses agree; 1: they do not; 2:
cannot be rerun here, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from records import logs, verify

ROOT = Path(__file__).resolve().parents[1]
AGREES, DISAGREES, BAD_INPUT = 0, 1, 2

# Allowed difference in a step's loss, nats a token, over the step's number, where sums may round
# otherwise than in the filed run. Measured: bfloat16, five runs of one code on H100s, alone or two,
# 40 steps (2026-11-24_two-gpus, _first-block): at most 6.5e-4. fp32, 4 x 128 on a CPU, 26 steps,
# other micro-batches and threads: at most 1e-6 at any step. What is not rounding is larger: another
# arm from the same seed is off by 5e-3 at step 3 and by 3e-2 at step 5.
ROUNDING = {"float32": 1e-5, "bfloat16": 1.3e-3}
SAME_MACHINE = ("host", "python", "torch", "cpu_threads", "gpu")


class CannotReplay(ValueError):
    """The rerun could not be made; the message says what to do. Exit code 2."""


class AnotherSchedule(ValueError):
    """The record's code does other steps than its log says. Exit code 1."""


@dataclass(frozen=True)
class Row:
    """A step's two losses, nats a token, and by how much they may differ."""

    step: int
    filed: float
    rerun: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return abs(self.rerun - self.filed) <= self.allowed + 1e-12  # both have six decimals


# ---- What to run --------------------------------------------------------------------------------


def find_record(name: str) -> Path:
    """A record's folder, by its path or by its name below records/TRACK/."""
    places = [Path(name), ROOT / "records" / name, *ROOT.glob(f"records/*/{Path(name).name}")]
    for place in places:
        if (place / "code" / "train_gpt.py").is_file():
            return place.resolve()
    raise CannotReplay(f"{name} is no folder of a record: it has no code/train_gpt.py")


def find_run(record: Path, run_id: str) -> logs.Run:
    """The run of that id, or the record's first one."""
    runs = logs.load_runs(record)
    if not runs:
        raise CannotReplay(f"{record} holds no run: */run.jsonl, plain or packed")
    if not run_id:
        return runs[0]
    for run in runs:
        if run.run_id == run_id:
            return run
    raise CannotReplay(f"{record} has no run {run_id}: {', '.join(r.run_id for r in runs)}")


def again(run: logs.Run, steps: int, data: str, folder: Path) -> dict:
    """What first_steps.py is told: the filed config, with this machine's paths, and no looks."""
    header = run.header
    config = {**header["config"], "data": data, "out": str(folder), "run_id": "rerun"}
    config |= {"looks": 0, "final_val": False, "save_every": 0, "save_final": False, "resume": ""}
    path, colon, rest = header["arm"].partition(":")
    if colon:  # a user's arm lies beside the trainer
        config["arm"] = f"{Path(path).name}:{rest}"
    if config["dev"]:
        config["dev"] = str(Path(data) / Path(config["dev"]).name)
    threads = header["env"]["cpu_threads"]
    return {"config": config, "steps": steps, "data": header["data"], "threads": threads}


def lay_out(record: Path, folder: Path) -> None:
    """The record's code, and first_steps.py beside it. `variants` must be a package: a namespace
    would lose to one of that name elsewhere on the path."""
    shutil.copytree(record / "code", folder, dirs_exist_ok=True)
    shutil.copy(Path(__file__).with_name("first_steps.py"), folder)
    if (folder / "variants").is_dir():
        (folder / "variants" / "__init__.py").touch()


def rerun(record: Path, run: logs.Run, steps: int, data: str) -> logs.Run:
    """Trains the first steps in a temporary folder, prints as a run does, returns its log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(record, folder)
        told = folder / "again.json"
        told.write_text(json.dumps(again(run, steps, data, folder / "runs")))
        command, world = [sys.executable, "first_steps.py", told.name], run.header["world"]
        if world > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command[1:1] = launch
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        # What train_gpt.py sets in its main; compiled graphs outlive the temporary folder.
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
        code = subprocess.run(command, cwd=folder, env=env).returncode
        if code:
            raise CannotReplay(f"{run.path}: its rerun ended with exit code {code}, see above")
        return logs.load_run(folder / "runs" / "rerun")


# ---- Comparison ---------------------------------------------------------------------------------


def allowance(filed: dict, here: dict) -> tuple[float, str]:
    """(allowed difference a step, its reason) between a run with one header and one with another.

    On a CPU the same machine gives the same bits. On a GPU sums of gradients are made in the order
    in which blocks happen to finish.
    """
    a, b = filed["env"], here["env"]
    if a["gpu"] is None and all(a.get(k) == b.get(k) for k in SAME_MACHINE):
        return 0.0, "exact: a CPU, and the same machine"
    where = "the same GPU" if a["gpu"] and a["gpu"] == b["gpu"] else "another machine"
    rounding = ROUNDING[filed["dtype"]]
    return rounding, f"{rounding:g} times the step's number: rounding in {filed['dtype']}, {where}"


def compare(filed: logs.Run, here: logs.Run, steps: int) -> list[Row]:
    """The first `steps` steps of both; AnotherSchedule where they are not the same ones."""
    rounding, _ = allowance(filed.header, here.header)
    pairs = list(zip(filed.steps[:steps], here.steps[:steps]))
    if len(pairs) < min(steps, len(filed.steps)):
        raise AnotherSchedule(
            f"{filed.path}: its rerun logged {len(pairs)} of {min(steps, len(filed.steps))} steps"
        )
    for a, b in pairs:
        for key in ("step", "tokens", "window", "lr"):
            if a[key] != b[key]:
                said = f"{key} {a[key]} in the filed log, {b[key]} in its rerun"
                raise AnotherSchedule(f"{filed.path}: step {a['step']} has {said}")
    return [Row(a["step"], a["loss"], b["loss"], rounding * a["step"]) for a, b in pairs]


def table(rows: list[Row]) -> str:
    lines = ["step  filed loss  rerun loss  difference    allowed"]
    lines += [
        f"{r.step:4}  {r.filed:10.6f}  {r.rerun:10.6f}  {r.rerun - r.filed:+10.6f}  "
        f"{r.allowed:9.6f}{'' if r.agrees else '  <-- disagrees'}"
        for r in rows
    ]
    return "\n".join(lines)


def verdict(run: logs.Run, rows: list[Row], reason: str) -> str:
    worst = max(abs(r.rerun - r.filed) for r in rows)
    wrong = [r.step for r in rows if not r.agrees]
    said = f"DISAGREES at step {wrong[0]}" if wrong else "agrees"
    return (
        f"{run.run_id}: {said}; {len(rows)} steps, largest difference {worst:.6f} nats a token "
        f"(allowed: {reason})"
    )


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="records replay", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("record", metavar="RECORD", help="a record's folder, or its name")
    parser.add_argument("--run", default="", metavar="RUN_ID", help="(the record's first run)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to rerun (20)")
    parser.add_argument("--data", default="", metavar="DIR", help="shards (those of the header)")
    return parser.parse_args(argv)


def replay(args: argparse.Namespace) -> int:
    """All of it. CannotReplay and BadLog before any training where a file is not what ran."""
    if args.steps < 1:
        raise CannotReplay(f"--steps {args.steps}: 1 or more")
    record = find_record(args.record)
    run = find_run(record, args.run)
    for finding in verify.check_ran(record, run):
        raise CannotReplay(finding)
    data = str(Path(args.data or run.header["config"]["data"]).absolute())
    if not Path(data).is_dir():
        raise CannotReplay(f"no folder of tokens {data}: give --data DIR")
    here = rerun(record, run, args.steps, data)
    rows = compare(run, here, args.steps)
    print("\n" + table(rows))
    print(verdict(run, rows, allowance(run.header, here.header)[1]), flush=True)
    return AGREES if all(r.agrees for r in rows) else DISAGREES


def main(argv: list[str] | None = None) -> int:
    try:
        return replay(parse(argv))
    except (CannotReplay, logs.BadLog) as e:
        print(f"replay: {e}", file=sys.stderr)
        return BAD_INPUT
    except AnotherSchedule as e:
        print(f"replay: DISAGREES: {e}", file=sys.stderr)
        return DISAGREES


if __name__ == "__main__":
    sys.exit(main())
