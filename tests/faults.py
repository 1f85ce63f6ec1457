"""One rank of a run with a fault: `faults.py FAULT TRAINER-ARGUMENTS`, by hand or under torchrun.

FAULT: none | nan (the last rank's gradients, from step 5 on) | kill or oom, of the last rank after
step 6 | term (SIGTERM to the last rank after step 4: where the host reads steps one late it takes
two more, and some of 8 should be left) | bad-input (rank 0 after step 6) | long (steps of 0.4 s) |
deaf (the last rank waits outside Python after step 6, for ever; ranks give up 5 s after a signal).
A fault happens once: not in a process that torchrun restarted. OUT/weights<rank>.pt holds the
weights that a rank ended with, OUT/fault the time of a kill or the wait.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt as T

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", 0))
LAST = RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1


def wait_outside_python() -> None:
    """As a host waits for a GPU whose collective never ends: no signal ends it and no handler of
    Python's runs. A mutex of zeros is an unlocked one; locked twice, it is never had."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


class Fault:
    """Hooks that let the fault happen, and the trainer that it happened to."""

    def __init__(self, kind: str):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.kind, self.trainer, self.poisoned = kind if first else "none", None, False

    def after_step(self, trainer: T.Trainer, step: T.Step) -> None:
        if self.trainer is None:
            self.trainer = trainer
            weight = trainer.model.blocks[1].mlp.up.weight
            weight.register_hook(lambda g: g * float("nan") if self.poisoned else g)
        self.poisoned = self.kind == "nan" and LAST and step.index >= 3
        if self.kind == "long":
            time.sleep(0.4)
        if step.index != (3 if self.kind == "term" else 5):
            return
        if self.kind in ("kill", "deaf") and LAST:
            (Path(trainer.cfg.run.out) / "fault").write_text(str(time.time()))
        if self.kind == "deaf" and LAST:
            wait_outside_python()
        if self.kind == "kill" and LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "term" and LAST:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "oom" and LAST:
            raise torch.OutOfMemoryError("made up")
        if self.kind == "bad-input" and RANK == 0:
            raise T.InputError("made up")


if __name__ == "__main__":
    fault = Fault(sys.argv[1])
    if fault.kind == "deaf":
        T.GRACE_SECONDS = 5
    code = T.main(sys.argv[2:], lambda cfg: T.Hooks(after_step=fault.after_step))
    if fault.trainer is not None:
        weights = {n: p.detach().cpu() for n, p in fault.trainer.model.named_parameters()}
        torch.save(weights, Path(fault.trainer.cfg.run.out) / f"weights{RANK}.pt")
    sys.exit(code)
