"""evals/memory.py: what a process may hold of a GPU that it shares, and too big batches."""

from __future__ import annotations

import weakref

import pytest
import torch

from evals import memory

GPU = torch.device("cuda")
ALL = 80 * 10**9


class Work:
    """Held by whoever is in a call, as a batch's tensors are."""


def batches(count: int, rows: int, fit: list[int]) -> list[tuple[int, int]]:
    """The calls; the one with number i fits where it is of at most fit[i] rows (the last: from then
    on). None of a failed call's objects is there any more when the next one begins."""
    calls, work = [], []

    def call(first: int, past: int) -> None:
        assert all(ref() is None for ref in work)
        held = Work()
        work.append(weakref.ref(held))
        calls.append((first, past))
        if past - first > fit[min(len(calls), len(fit)) - 1]:
            raise torch.OutOfMemoryError("no room")

    memory.in_batches(count, lambda _: rows, call)
    return calls


@pytest.fixture(autouse=True)
def nothing_said():
    memory.say_halved.cache_clear()


def test_batches_in_order():
    assert batches(7, 3, [3]) == [(0, 3), (3, 6), (6, 7)]
    assert batches(0, 3, [3]) == []


def test_too_big_a_batch_is_halved_until_it_fits(capsys):
    """And later ones are no larger: what was in the way may still be there."""
    assert batches(12, 8, [3]) == [(0, 8), (0, 4), *((i, i + 2) for i in range(0, 12, 2))]
    assert batches(12, 8, [8, 1, 9]) == [(0, 8), (8, 12), (8, 10), (10, 12)]
    assert capsys.readouterr().err == "out of GPU memory: batches are halved until they fit\n"


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        batches(9, 4, [4, 0])


@pytest.mark.parametrize(
    "sharers, free, reserved, allowed",
    [
        (1, ALL, 0, ALL),
        (2, ALL, 0, ALL // 2),
        (1, 20 * 10**9, 5 * 10**9, 25 * 10**9),  # others have the rest
        (4, 30 * 10**9, 19 * 10**9, 20 * 10**9),
    ],
)
def test_allowed(sharers, free, reserved, allowed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, ALL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setenv(memory.SHARERS, str(sharers))
    assert memory.allowed(GPU) == allowed


def test_in_words():
    text = "CUDA out of memory. Tried to allocate 2 GiB. If reserved but unallocated"
    said = "out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB)"
    assert memory.out(torch.OutOfMemoryError(text)) == said
    assert memory.out(torch.OutOfMemoryError("no room")) == "out of GPU memory (no room)"


@pytest.mark.gpu
def test_a_share_is_kept_to(monkeypatch):
    """Of a 64th of the card half is had, all of it and more is not, and then half again is."""
    total = torch.cuda.mem_get_info()[1]
    monkeypatch.setenv(memory.SHARERS, "64")
    memory.keep_to_share()
    try:
        memory.release()
        assert memory.allowed(GPU) <= total // 64
        held = torch.empty(total // 128, dtype=torch.uint8, device=GPU)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(total // 64, dtype=torch.uint8, device=GPU)
        del held
        memory.release()
        torch.empty(total // 128, dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        memory.release()
