"""A small CPU run that is killed, told to stop and damaged again and again, and resumed each time,
ends as the run that nobody disturbed: parameters, optimizer and losses to the bit, log unbroken.

    python tests/soak.py --faults 50 --seed 0              # about 10 s a fault on one core
    python tests/soak.py --faults 15 --seed 0 --world 2    # two gloo processes under torchrun

Not a test that pytest collects: it takes minutes, and what it meets depends on the machine's pace.
The seed says which faults come and after how many steps. Exit code 0: all of the above held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import helpers as H
import torch

from records import logs

T = H.T
GUARD_S = 300  # a process that is still there after so long hangs
STAGES = (T.Stage(0.5, 256, 1.0, (128, 256)), T.Stage(0.5, 512, 1.5, (256, 512)))


class Failed(AssertionError):
    """The trainer broke a promise; the message says which."""


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Subject:
    """One training run in a folder, started and resumed in processes of its own."""

    def __init__(self, folder: Path, data: Path, steps: int, world: int):
        self.run, self.world, self.steps = folder / "r", world, steps
        self.words = folder / "words.txt"  # what its processes print
        cfg = {"stages": STAGES, "tokens": 384 * steps, "passes": 10, "data_seed": 3, "looks": 4}
        cfg |= {"save_every": 4, "keep": 3, "save_final": True, "arm": "diff_v2", "run_id": "r"}
        self.argv = [str(H.ROOT / "train_gpt.py"), *H.tiny_argv(data, folder, **cfg)]
        self.process: subprocess.Popen | None = None

    def start(self) -> int:
        """Starts or resumes it; the step of its newest checkpoint. Without one there is nothing to
        go on from: the folder goes, and it starts anew."""
        saved = self.saved()
        if not saved:
            shutil.rmtree(self.run, ignore_errors=True)
        python = [sys.executable]
        if self.world > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
            python += ["--nproc-per-node", str(self.world)]
        (self.run / "exit.json").unlink(missing_ok=True)  # what is there at the end is of now
        self.words.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self.words.open("w") as out:
            resume = ["--resume", str(self.run)] if saved else []
            command = [*python, *self.argv, *resume]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        return int(saved[-1].name[5:]) if saved else 0

    def saved(self) -> list[Path]:
        """Its checkpoints that say DONE, oldest first."""
        return [p.parent for p in sorted(self.run.glob("ckpt/step_*/DONE"))]

    def step(self) -> int:
        """The last step that this process has told of; 0 before its first."""
        with self.words.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 20_000))
            found = re.findall(rb"^step:(\d+)/\d+ loss", f.read(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def resumed(self) -> int:
        """The step that this process went on from: an older one where the newest was damaged."""
        found = re.search(r"^\[resume\] .* at step (\d+)$", self.words.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def wait_for(self, what) -> bool:
        """Until `what()` is true, or the process has ended: False."""
        start = time.monotonic()
        while self.process.poll() is None:
            if what():
                return True
            if time.monotonic() - start > GUARD_S:
                raise Failed(f"it hangs: {self.last_words()}")
            time.sleep(0.003)
        return False

    def workers(self) -> list[int]:
        return [self.process.pid] if self.world == 1 else children(self.process.pid)

    def kill(self, rng: random.Random) -> None:
        """-9 to the run's process; of several ranks, to one of them, and the others must end."""
        workers = self.workers() or [self.process.pid]
        send(rng.choice(workers), signal.SIGKILL)

    def end(self) -> int:
        """Waits for the end; the run's own exit code (torchrun has 1 for all of them)."""
        self.wait_for(lambda: False)
        said = self.run / "exit.json"
        code = json.loads(said.read_text())["code"] if self.world > 1 and said.is_file() else None
        return self.process.returncode if code is None else code  # None: it was killed

    def last_words(self) -> str:
        return self.words.read_text()[-1500:] if self.words.is_file() else ""


# ---- faults -------------------------------------------------------------------------------------
# Each strikes a running subject and returns what it did, or "" where the run ended before it could.


def at_some_step(subject: Subject, rng: random.Random, first: int) -> bool:
    """Some steps further than what is saved, and then anywhere inside a step."""
    goal = first + rng.randint(1, 14)
    reached = subject.wait_for(lambda: subject.step() >= goal)
    time.sleep(rng.uniform(0, 0.03))
    return reached and subject.process.poll() is None


def kill_at_a_step(subject, rng, first) -> str:
    if not at_some_step(subject, rng, first):
        return ""
    subject.kill(rng)
    return "kill -9"


def kill_at_the_start(subject, rng, first) -> str:
    time.sleep(rng.uniform(0.2, 6))
    if subject.process.poll() is not None:
        return ""
    subject.kill(rng)
    return "kill -9 at a random moment of the start"


def kill_in_a_save(subject, rng, first) -> str:
    if not at_some_step(subject, rng, first):
        return ""
    if not subject.wait_for(lambda: any(subject.run.glob("ckpt/.step_*"))):
        return ""
    time.sleep(rng.uniform(0, 0.01))
    subject.kill(rng)
    return "kill -9 in a save"


def stop(number: int):
    def strike(subject, rng, first) -> str:
        if not at_some_step(subject, rng, first):
            return ""
        send(subject.process.pid, number)
        return signal.Signals(number).name

    return strike


def damage_newest(how):
    """Kills it, then damages a file of its newest checkpoint, where an older one is whole."""

    def strike(subject, rng, first) -> str:
        said = kill_at_a_step(subject, rng, first)
        if not said:
            return ""
        subject.end()
        saved = subject.saved()
        if len(saved) < 2 or any((p / "damaged").exists() for p in saved):
            return said
        path = saved[-1] / rng.choice(["state.pt", "state.pt", "meta.json", "DONE"])
        raw = path.read_bytes()
        done, raw = how(raw, rng)
        path.write_bytes(raw)
        (saved[-1] / "damaged").touch()  # for the line above: never the last whole one
        return f"{said}, {done} {path.parent.name}/{path.name}"

    return strike


def cut(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    n = rng.randrange(len(raw))
    return f"{n} of {len(raw)} bytes left of", raw[:n]


def flip(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    at, bit = rng.randrange(len(raw)), rng.randrange(8)
    return f"bit {bit} of byte {at} flipped in", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[
        at + 1 :
    ]


def leave_stray(subject, rng, first) -> str:
    """Kills it; half a checkpoint and half a line are left, as by a machine that lost power."""
    said = kill_at_a_step(subject, rng, first)
    if not said or not subject.end() or not subject.saved():
        return said
    raw = (subject.saved()[-1] / "state.pt").read_bytes()
    step = subject.step() + rng.randint(1, 9)
    for name in (f"step_{step:08d}", f".step_{step:08d}.{rng.randint(2, 9999)}"):
        (subject.run / "ckpt" / name).mkdir(exist_ok=True)
        (subject.run / "ckpt" / name / "state.pt").write_bytes(raw[: rng.randrange(len(raw))])
    for name in ("run.jsonl", "run.log"):
        with (subject.run / name).open("a") as f:
            f.write('{"t": "step", "step": 12345, "lo')
    return f"{said}, half a checkpoint of step {step} and half a line"


FAULTS = {
    "kill": (kill_at_a_step, 3),
    "start": (kill_at_the_start, 2),
    "save": (kill_in_a_save, 3),
    "term": (stop(signal.SIGTERM), 2),
    "int": (stop(signal.SIGINT), 2),
    "cut": (damage_newest(cut), 2),
    "flip": (damage_newest(flip), 3),
    "stray": (leave_stray, 2),
}


# ---- the soak -----------------------------------------------------------------------------------


def disturb(subject: Subject, rng: random.Random, name: str) -> str:
    """One fault; what happened, or "" where the run finished first."""
    first = subject.start()
    said = FAULTS[name][0](subject, rng, first)
    code = subject.end()
    if not said or (code == 0 and name in ("term", "int")):  # it was done before it could hear
        if code:
            raise Failed(f"exit code {code} before the fault: {subject.last_words()}")
        return ""
    if name in ("term", "int"):
        if code != 75:
            raise Failed(f"exit code {code} after {said}: {subject.last_words()}")
        if not subject.saved():
            raise Failed(f"exit code 75 after {said}, and no checkpoint")
    return f"from step {subject.resumed():4d}, at {subject.step():4d}: {said} -> {code}"


def compare(a, b, where: str = "state") -> None:
    """Nested dicts of tensors, bit for bit."""
    if isinstance(a, dict):
        if set(a) != set(b):
            raise Failed(f"{where}: other names")
        for key in a:
            compare(a[key], b[key], f"{where}.{key}")
    elif a.dtype != b.dtype or not torch.equal(a, b):
        raise Failed(f"{where} differs from the undisturbed run's")


def check(subject: Subject, whole: Subject) -> str:
    """The finished `subject` is the undisturbed `whole`."""
    compare(T.load_checkpoint(subject.run)[0], T.load_checkpoint(whole.run)[0])
    mine, other = (logs.load_run(s.run) for s in (subject, whole))  # checks the chain of hashes
    if not mine.done:
        raise Failed("its log has no end")
    keys = ("step", "loss", "tokens", "lr", "window", "grad_norm")
    lines = [[[s[k] for k in keys] for s in run.steps] for run in (mine, other)]
    if lines[0] != lines[1]:
        raise Failed("its log tells of other steps than the undisturbed run's")
    looks = [
        [(v["step"], v.get("dev_loss"), v.get("val_loss")) for v in r.vals] for r in (mine, other)
    ]
    if looks[0] != looks[1]:
        raise Failed("its log tells of other looks than the undisturbed run's")
    return f"{len(mine.steps)} steps, hash {mine.last_h}, {len(mine.events)} events"


def finish(subject: Subject) -> None:
    subject.start()
    code = subject.end()
    if code:
        raise Failed(f"exit code {code}: {subject.last_words()}")


def soak(args: argparse.Namespace, folder: Path) -> int:
    """Strikes args.faults times, over as many whole runs as that takes."""
    rng, begun = random.Random(args.seed), time.monotonic()
    data = H.write_text_corpus(folder / "data")
    names = [name for name, (_, weight) in FAULTS.items() for _ in range(weight)]
    whole = Subject(folder / "whole", data, args.steps, args.world)
    finish(whole)
    print(f"undisturbed: {args.steps} steps on {args.world} rank(s)", flush=True)
    struck, laps = 0, 0
    while struck < args.faults:
        subject = Subject(folder / f"lap{laps}", data, args.steps, args.world)
        said = "-"
        while said and struck < args.faults:
            name = rng.choice(names)
            said = disturb(subject, rng, name)
            struck += bool(said)
            if said:
                print(f"fault {struck:3d}  {name:5s}  {said}", flush=True)
        if said:
            finish(subject)
        laps += 1
        print(f"run {laps} equals the undisturbed one: {check(subject, whole)}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    print(f"PASSED: {struck} faults in {laps} run(s), {minutes:.1f} minutes, seed {args.seed}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="how many (50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (0)")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="gloo processes (1)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of the run (400)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        code = soak(args, folder)
    except Failed as e:
        print(f"FAILED: {e}\nits folder is kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
