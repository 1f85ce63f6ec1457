"""What a process may hold of a GPU's memory, as real_runs.py puts several on one card, and batches
that were too big."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable

import torch

SHARERS = "NCA_GPU_SHARERS"  # environment: processes on this card, 1 where it is not set


def sharers() -> int:
    return int(os.environ.get(SHARERS, 1))


def keep_to_share() -> None:
    """From now on torch raises OutOfMemoryError where this process would hold more than its share
    of its GPU, though more were free: several that keep to theirs leave each other in peace."""
    if sharers() > 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1 / sharers())


def allowed(device: torch.device) -> int:
    """Bytes that this process may hold of a GPU in all: its share, but no more than what it has
    and what is free now, as processes that keep to no share may be there, too."""
    free, total = torch.cuda.mem_get_info(device)
    return min(total // sharers(), free + torch.cuda.memory_reserved(device))


def release() -> None:
    """Gives back what torch keeps for later: other processes may want it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def out(e: torch.OutOfMemoryError) -> str:
    """For a sentence: that memory was out, and where, without torch's general advice."""
    return f"out of GPU memory ({str(e).partition(' If reserved')[0].rstrip('.')})"


@functools.cache
def say_halved() -> None:
    """Once a process."""
    print("out of GPU memory: batches are halved until they fit", file=sys.stderr, flush=True)


def in_batches(count: int, rows: Callable[[int], int], call: Callable[[int, int], None]) -> None:
    """`call(first, past)` for batches of rows 0 to count, one after another, of `rows(first)` each.
    One that the GPU's memory does not hold is called again with half as many, and no later one is
    larger; OutOfMemoryError where that is less than one row."""
    done, most = 0, count
    while done < count:
        size = min(rows(done), most, count - done)
        try:
            call(done, done + size)
            done += size
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Outside of the handler, where the error no longer holds the call's tensors.
        most = size // 2
        say_halved()
        release()
