"""The training loss over candidate classes on a GPU: `python -m pytest -m gpu
tests/test_gpu_sampled.py`. Which classes, against the CPU's; the FP8 head's pieces against fp32; a
whole trainer without a recompile."""

from __future__ import annotations

import contextlib
import math

import pytest
import test_gpu as G
import torch
from test_gpu import T, exact_references  # noqa: F401 - a fixture
from torch import nn

pytestmark = G.pytestmark
SOME = 10_240


@contextlib.contextmanager
def no_wait():
    """What makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def mode(request, monkeypatch):
    """As `be_deterministic` has it, or not."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def some_targets(kinds: int) -> torch.Tensor:
    """A piece's, of so many kinds at most, over all of the vocabulary."""
    gen = torch.Generator().manual_seed(6)
    targets = torch.randint(kinds, (G.PIECE,), generator=gen) * 7919 % G.VOCAB
    targets[torch.rand(G.PIECE, generator=gen) < 0.03] = -1
    return targets


@pytest.mark.parametrize("kinds", [6000, 50_000])
def test_candidates_are_the_cpu_s(kinds, mode):
    """With more targets than places, too; nothing waits, though how many differ is not known."""
    targets = some_targets(kinds)
    there = targets.to(G.DEVICE)
    with contextlib.nullcontext() if mode else no_wait():
        got = T.candidate_set(there, G.VOCAB, SOME, 123_456)
    want = T.candidate_set(targets, G.VOCAB, SOME, 123_456)
    for mine, there in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(mine.cpu(), there, rtol=1e-6, atol=0)


def fp32_loss(h, w, targets, scale, turn):
    """(losses, dh, dw) of a piece over the same candidates."""
    (ids, rest), places = T.candidate_set(targets, G.VOCAB, SOME, turn)
    _, losses, dh, dw = G.fp32_head(h, w[ids], places, scale, rest=rest)
    return losses, dh, torch.zeros_like(w).index_copy_(0, ids, dw)


@pytest.mark.parametrize("fp8, fused", [(False, False), (True, False), (True, True)])
def test_pieces_over_candidates(fp8, fused, mode):
    """The compiled head: two pieces against fp32; a second step, other turns, makes no graph."""
    if fp8 and not T.fp8_works(torch.device(G.DEVICE)):
        pytest.skip("this GPU does not multiply FP8")
    if fused and T.probe_loss(torch.device(G.DEVICE)):
        pytest.skip(T.probe_loss(torch.device(G.DEVICE)))
    h, w, _ = G.head_inputs(0.05)
    targets = some_targets(6000).to(G.DEVICE)
    h, targets = torch.cat([h, h.flip(0)]), torch.cat([targets, targets.roll(5)])
    scale = G.scale_of(targets)
    head = T.Head(nn.Parameter(w), 30.0, torch.bfloat16, fp8, True, fused)
    head.prepare()
    head.backward(h, targets, scale, SOME, 0)  # compiles
    head.weight.grad = None
    with G.no_recompile():
        losses, dh = head.backward(h, targets, scale, SOME, 8 * G.PIECE)
    parts = zip(h.split(G.PIECE), targets.split(G.PIECE))
    want = [fp32_loss(x, w, t, scale, 8 + i) for i, (x, t) in enumerate(parts)]
    want_losses, want_dh = (torch.cat([part[i] for part in want]) for i in range(2))
    far = {"losses": G.error(losses, want_losses), "dh": G.error(dh, want_dh)}
    far["dw"] = G.error(head.weight.grad, want[0][2] + want[1][2])
    print(far)
    assert far["losses"] <= 1e-2 and max(far["dh"], far["dw"]) <= G.GRADIENT
    assert head.left_out == 0 and (losses[targets < 0] == 0).all()


def test_trainer_over_candidates(tmp_path):
    """Three stages, 1024 and 4096 classes, then all: no graph after the warm-up; it learns."""
    torch._dynamo.reset()
    folder = G.write_tokens(tmp_path, G.SIZES)
    cfg = G.trainer_config(folder, arm="softmax", layers=())
    stages = [
        T.dataclasses.replace(stage, candidates=some)
        for stage, some in zip(cfg.schedule.stages, (1024, 4096, 0), strict=True)
    ]
    _, logs, made, strict = G.train_twice(cfg.with_(stages=tuple(stages)))
    assert strict and made == 0
    for log in logs:
        steps = log["step"]
        assert [s.get("candidates") for s in steps] == [1024] * 4 + [4096] * 4 + [None] * 4
        assert steps[0]["loss"] == pytest.approx(math.log(G.VOCAB), abs=1e-2)
        assert steps[-1]["loss"] < math.log(G.VOCAB) - 2
        seen = [x["dev_loss"] for x in log["val"] if "dev_loss" in x]
        assert abs(seen[-1] - steps[-1]["loss"]) < 0.5
        assert not [e for e in log.get("event", ()) if e["kind"] == "warning"]
