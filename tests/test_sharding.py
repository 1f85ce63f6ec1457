"""Two gloo processes against one: the same parameters, losses and gradients, with really sharded
state; and a checkpoint that does not care how many ranks wrote it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import helpers as H
import pytest
import torch
from torch import nn

T = H.T

# Counts that do not divide by two, and sizes that do not divide by 64.
MATRICES = {f"m{i}": (16, 8) for i in range(5)} | {f"w{i}": (8, 24) for i in range(3)}
MATRICES["single"] = (12, 12)
VECTORS = {"a": (7,), "b": (3, 5), "c": (130,)}
GROUPS = {"matrix": T.Group("muon", 0.05, wd=0.1), "gate": T.Group("adam", 0.02, wd=0.1)}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        for shapes, group in ((MATRICES, "matrix"), (VECTORS, "gate")):
            for name, shape in shapes.items():
                p = T.parameter(shape, ("zeros",), group)
                p.data = torch.randn(shape, generator=gen)
                self.register_parameter(name, p)
        self.register_parameter("doubled", T.parameter((32, 8), (), "matrix", (2, 16, 8)))
        self.doubled.data = torch.randn(32, 8, generator=gen)


def gradient(name: str, shape, step: int, rank: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * step + 100_000 * rank
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimize(ranks: list[int], world: T.World, clip: float) -> dict:
    """3 steps on the sum of these ranks' gradients."""
    model = Mixed()
    opt = T.Optimizer(model, GROUPS, world)
    opt.clip = clip
    norms = []
    for step in range(3):
        for name, p in model.named_parameters():
            for rank in ranks:
                H.add_gradient(p, gradient(name, p.shape, step, rank))
        norms.append(opt.step(1.0 - 0.1 * step, 0.9))
    return {
        "params": {n: p.detach().clone() for n, p in model.named_parameters()},
        "state": opt.state_dict(),
        "norms": torch.stack(norms),
        "own": [{k: v.numel() for k, v in b.state().items()} for b in opt.banks],
        "total": [b.data.numel() for b in opt.banks],
        "adam_holds": [b.adam["exp_avg"].numel() for b in opt.banks if b.group.kind == "adam"],
    }


def counting(trainer: T.Trainer) -> list[bool]:
    """Records, for each forward call, whether it was an evaluation (no gradients)."""
    calls, forward = [], trainer.lm.forward

    def spy(*args):
        calls.append(not torch.is_grad_enabled())
        return forward(*args)

    trainer.lm.forward = spy
    return calls


def one_step(cfg: T.Config) -> dict:
    """Gradients of the first step: Adam's first moment is (1 - beta1) of them, Muon's 1 - mu."""
    trainer = T.Trainer(cfg)
    calls = counting(trainer)
    trainer.warm_up()
    evaluated = sum(calls)
    step = trainer.steps[0]
    batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
    figures, norm = trainer.train_step(step, batch)
    state = trainer.optimizer.state_dict()
    grads = {n: s.get("momentum", s.get("exp_avg")) for n, s in state.items()}
    return {"grads": grads, "loss": float(figures[0]), "norm": float(norm), "evaluated": evaluated}


def work(data: str, out: str) -> dict:
    """Everything that two ranks do in this file, as starting them is what takes time."""
    world = T.World.start("cpu")
    results = {
        "optimizer": optimize([world.rank], world, 0.0),
        "clipped": optimize([world.rank], world, 1e-5),
    }
    for arm in ("softmax", "diff_v2"):
        results[arm] = one_step(config(data, out, arm))
        results[f"run {arm}"] = T.train(config(data, out, arm, run_id=f"two-{arm}", save_every=4))
    return results


def config(data, out, arm, **changes) -> T.Config:
    changes = {"micro_batch_tokens": 128, "muon_dtype": "float32", "looks": 1, **changes}
    return H.tiny(data, out, arm=arm, dev_tokens=200, **changes)


@pytest.fixture(scope="module")
def runs(text_data, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("ranks")
    return H.on_ranks(2, work, out / "ranks", str(text_data), str(out)), out


@pytest.mark.parametrize("kind, clip", [("optimizer", 0.0), ("clipped", 1e-5)])
def test_sharded_equals_unsharded(runs, kind, clip):
    one = optimize([0, 1], T.World(torch.device("cpu")), clip)
    for rank in runs[0]:
        two = rank[kind]
        for name, p in one["params"].items():
            torch.testing.assert_close(two["params"][name], p, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-5, atol=0)
        assert set(two["state"]) == set(one["state"])
        for name, state in one["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(two["state"][name][key], value, rtol=1e-5, atol=1e-6)


def test_ranks_hold_the_same_parameters(runs):
    a, b = (rank["optimizer"]["params"] for rank in runs[0])
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_state_is_really_sharded(runs):
    """Each rank's momentum and moments are half of the bank, padding included."""
    for rank in runs[0]:
        banks = rank["optimizer"]
        assert len(banks["own"]) == len(banks["total"]) == 4
        for own, total in zip(banks["own"], banks["total"], strict=True):
            assert own and all(2 * n == total for n in own.values())
        assert len(banks["adam_holds"]) == 1 and 2 * banks["adam_holds"][0] in banks["total"]
    padded = sum(runs[0][0]["optimizer"]["total"])
    assert padded > sum(p.numel() for p in runs[0][0]["optimizer"]["params"].values())


@pytest.mark.parametrize("arm", ["softmax", "diff_v2"])
def test_one_rank_with_two_micro_batches_equals_two_ranks(runs, text_data, arm):
    """Losses, gradient norms and gradients of a step; then the losses of a whole run."""
    ranks, out = runs
    one = one_step(config(text_data, out, arm))
    for rank in ranks:
        two = rank[arm]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
        for name, g in one["grads"].items():
            torch.testing.assert_close(
                two["grads"][name], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()) + 1e-12, msg=name
            )
    assert max(float(g.abs().max()) for g in one["grads"].values()) > 1
    result = T.train(config(text_data, out, arm, run_id=f"one-{arm}"))
    a, b = H.losses(out / f"one-{arm}"), H.losses(out / f"two-{arm}")
    assert len(a) == 8 and a[-1] < a[0]
    assert a == pytest.approx(b, abs=2e-5)
    for key in ("dev_loss", "val_loss"):  # every target counted once, wherever
        assert ranks[0][f"run {arm}"][key] == pytest.approx(result[key], abs=2e-5)
        assert ranks[0][f"run {arm}"][key] == ranks[1][f"run {arm}"][key]
    header = H.read_log(out / f"two-{arm}", "header")
    assert len(header) == 1 and header[0]["world"] == 2, "rank 0 alone writes the log"


def test_every_rank_warms_up_every_graph(runs):
    """dev of one call leaves rank 1 without work; val may not, and a graph that is new then would
    be a recompilation inside the clock."""
    assert [rank["softmax"]["evaluated"] for rank in runs[0]] == [1, 1]


def test_a_checkpoint_of_two_ranks_goes_on_at_one(runs, text_data):
    _, out = runs
    saved = out / "two-diff_v2"
    whole = H.losses(saved)
    T.train(config(text_data, out, "diff_v2", resume=str(saved / "ckpt" / "step_00000004")))
    again = H.losses(saved)
    assert again[:4] == whole[:4]
    assert again == pytest.approx(whole, abs=2e-5)
    assert H.chain_breaks(saved) == []
    assert H.read_log(saved, "event")[0]["kind"] == "resume"


@pytest.mark.parametrize("ranks, tokens, ok", [(3, 256, False), (2, 256, True), (8, 256, True)])
def test_world_sizes_that_do_not_divide_are_refused(
    monkeypatch, capsys, tmp_path, ranks, tokens, ok
):
    assert T.step_rows(tokens, 32)[0] == 8
    cfg = H.tiny(tmp_path, tmp_path)
    refusal = f"its 8 rows do not divide over {ranks} ranks"
    assert any(refusal in p for p in T.check_config(cfg, ranks)) is not ok
    if not ok:
        monkeypatch.setitem(os.environ, "WORLD_SIZE", str(ranks))
        assert T.main(H.tiny_argv(tmp_path / "no data", tmp_path)) == 2
        assert refusal in capsys.readouterr().err


def test_every_recipe_divides_by_eight():
    for preset in T.PRESETS:
        for ranks in (1, 2, 4, 8):
            cfg = T.make_config(preset)
            assert not T.check_config(cfg, ranks), (preset, ranks)
            for stage in cfg.schedule.stages:
                rows, row = T.step_rows(stage.tokens, cfg.data.row_tokens)
                assert rows * row == stage.tokens and rows % ranks == 0
                calls = T.micro_rows(rows // ranks, row, cfg.data.micro_batch_tokens)
                assert (rows // ranks) % calls == 0
                assert math.prod((calls, row)) <= max(row, cfg.data.micro_batch_tokens)
