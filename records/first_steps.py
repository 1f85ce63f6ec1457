"""Runs the first steps of a filed run again. replay.py copies this file beside the record's own
train_gpt.py and starts it there, so that `import train_gpt` finds the one that ran:

    python first_steps.py again.json      # or under torchrun, as the filed run was

again.json: config (of the filed header, with paths of this machine), steps, data (the filed shards)
and threads. The schedule is the full one, and training stops after `steps` of it through a hook:
the filed file runs unedited. Neither dev nor val is evaluated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import torch

import train_gpt as T


class Enough(Exception):
    """The losses that were asked for are in the log."""


def stop_after(steps: int):
    """A hook that ends training once `steps` losses are logged: a GPU's come a step late."""

    def after_step(trainer: T.Trainer, step: T.Step) -> None:
        if step.index >= steps - (not trainer.world.cuda):
            raise Enough

    return after_step


def contents(data: list[dict]) -> list[tuple]:
    """What shards hold, whatever they are called."""
    return [(row["split"], row["tokens"], row["sha256"]) for row in data]


def rerun(again: dict) -> None:
    """Trains; the log lies in config.out. InputError where other tokens are at hand."""
    cfg, hooks = T.config_from_flat(again["config"]), T.Hooks()
    if Path("variants", f"{cfg.preset}.py").is_file():
        hooks = importlib.import_module(f"variants.{cfg.preset}").make_hooks(cfg)
    stop = stop_after(again["steps"])
    trainer = T.Trainer(cfg, dataclasses.replace(hooks, after_step=stop))
    if contents(trainer.data_digests) != contents(again["data"]):
        raise T.InputError(f"{cfg.data.data} does not hold the tokens that the filed run trained")
    if not trainer.world.cuda:  # sums of another number of threads round otherwise
        torch.set_num_threads(min(again["threads"], os.cpu_count() or 1))
    with contextlib.suppress(Enough):
        trainer.run()
    trainer.world.close()


if __name__ == "__main__":
    try:
        rerun(json.loads(Path(sys.argv[1]).read_text()))
    except T.InputError as e:
        print(f"replay: {e}", file=sys.stderr)
        sys.exit(T.EXIT_CODES["input"])
