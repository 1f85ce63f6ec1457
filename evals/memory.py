"""How much of a GPU's memory a process may count on: real_runs.py puts several on one card."""

from __future__ import annotations

import os

import torch

SHARERS = "NCA_GPU_SHARERS"  # environment: processes on this card, 1 where it is not set


def share_of(device: torch.device) -> int:
    """Bytes of the card's memory for this process."""
    total = torch.cuda.get_device_properties(device).total_memory
    return total // int(os.environ.get(SHARERS, 1))
