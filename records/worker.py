"""An arm's warm process: records/compare.py starts one for each arm and tells it what to run.

    python records/worker.py --preset plain --arm diff_v2 --data DIR --out FOLDER   # train_gpt.py's

One JSON object a line, over stdin and stdout:

    worker   {"ready": {source_sha256, data, params, flops_per_token, compile_s}}, compiled
    compare  {"seed", "data_seed", "tokens", "run_id", "labels"}
    worker   {"done": figures of `Trainer.run`}; or
             {"failed": {code, reason}}, and it ends with that exit code

Before a word it has parked, so that other arms have the GPU's memory, unless its environment says
RECORDS_WORKER_ALONE=1: there are none.

It ends when its stdin does, in the middle of a run too: no orphan of a killed `compare` goes on
computing beside its successor. Under torchrun rank 0 alone has the line, and the ranks are one.
"""

from __future__ import annotations

import datetime
import importlib
import itertools
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

import train_gpt as T

ABANDONED = T.EXIT_CODES["signal"]
ALONE = "RECORDS_WORKER_ALONE"  # in the environment, "1": no other arm waits for the GPU's memory


def hooks_of(preset: str) -> Callable[[T.Config], T.Hooks] | None:
    """How a variant changes the loop; None for train_gpt.py's own presets. A variant's preset has
    its file's name, variants/PRESET.py, and is in T.PRESETS after this."""
    if preset.isidentifier() and (T.HERE / "variants" / f"{preset}.py").is_file():
        return importlib.import_module(f"variants.{preset}").make_hooks
    return None


class Line:
    """The line to compare. Rank 0 holds it; every rank hears the same commands."""

    def __init__(self):
        # Nothing else may use it: neither a print, in C or Python, nor a child process.
        self.inbox, self.outbox = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self.heard: queue.Queue[dict | None] = queue.Queue()
        self.idle = threading.Event()
        self.main = int(os.environ.get("RANK", 0)) == 0
        if self.main:
            threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for text in self.inbox:
            self.idle.clear()
            self.heard.put(json.loads(text))
        if not self.idle.is_set():
            os._exit(ABANDONED)
        self.heard.put(None)

    def say(self, **what) -> None:
        if self.main:
            self.idle.set()  # before the word, as the answer to it may come at once
            print(json.dumps(what), file=self.outbox)

    def commands(self, world: T.World) -> Iterator[dict]:
        """Each command, on every rank, until the line ends."""
        group = None
        if world.size > 1:
            # NCCL would wait on the GPU, under the nose of the arm that is being timed.
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        while True:
            box = [None]
            if self.main:
                box = [self.heard.get()]
            if group is not None:
                dist.broadcast_object_list(box, group=group)
            if box[0] is None:
                return
            yield box[0]


def make_trainer(argv: list[str]) -> T.Trainer:
    """A Trainer of train_gpt.py's flags, or of a variant's."""
    make_hooks = hooks_of(dict(itertools.pairwise(argv)).get("--preset", ""))
    cfg = T.parse_args(argv)
    return T.Trainer(cfg, make_hooks(cfg) if make_hooks else None)


def make_room(trainer: T.Trainer) -> None:
    """Parks, where other arms wait for the memory."""
    if os.environ.get(ALONE) != "1":
        trainer.park()


def ready(trainer: T.Trainer) -> dict:
    """Warms up; what compare wants to know before the first run."""
    trainer.warm_up()
    last = T.windows(trainer.steps[-1].window, torch.device("cpu")).tolist()
    said = {
        "source_sha256": trainer.source_sha256,
        "data": trainer.data_digests,
        "params": T.count_parameters(trainer.model),
        "flops_per_token": float(T.flops_per_token(trainer.model, *last)),
        "compile_s": round(trainer.compile_s, 2),
    }
    make_room(trainer)
    return said


def run(trainer: T.Trainer, command: dict) -> dict:
    """One run from a fresh start."""
    trainer.labels = command.pop("labels")
    trainer.reset(**command)
    result = trainer.run()
    T.write_exit(trainer.folder, T.EXIT_CODES["done"], "done")
    make_room(trainer)
    return result


def failure(error: Exception, trainer: T.Trainer | None) -> tuple[int, str]:
    """(exit code, reason), as train_gpt.py has them; 1 for what nobody foresaw."""
    if isinstance(error, T.InputError):
        return T.EXIT_CODES["input"], str(error)
    if isinstance(error, T.NonFinite):
        return T.EXIT_CODES["non-finite"], str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return T.EXIT_CODES["memory"], f"out of GPU memory: run again with {T.smaller(trainer)}"
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}"


def main(argv: list[str]) -> int:
    T.set_environment()
    line, trainer = Line(), None
    try:
        trainer = make_trainer(argv)
        line.say(ready=ready(trainer))
        for command in line.commands(trainer.world):
            line.say(done=run(trainer, command))
        trainer.world.close()
        return 0
    except Exception as error:  # whatever it is, compare is waiting for a word
        code, reason = failure(error, trainer)
        T.write_exit(getattr(trainer, "folder", None), code, reason)
        line.say(failed={"code": code, "reason": reason})
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
