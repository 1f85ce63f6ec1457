"""A loss or gradient that is not finite changes nothing on any rank; spikes are logged, no more;
FP8 scales and casts stay finite."""

from __future__ import annotations

import math

import helpers as H
import pytest
import torch

T = H.T
WORLD = T.World(torch.device("cpu"))


def optimizer_of(wd: float = 0.1) -> tuple[torch.nn.Module, T.Optimizer]:
    model = torch.nn.Module()
    for name, shape, group in (
        ("a", (8, 16), "matrix"),
        ("b", (8, 16), "matrix"),
        ("c", (70,), "gate"),
    ):
        model.register_parameter(name, T.parameter(shape, ("normal", 1.0), group))
    T.init_parameters(model, 3)
    groups = {"matrix": T.Group("muon", 0.05, wd=wd), "gate": T.Group("adam", 0.02, wd=wd)}
    return model, T.Optimizer(model, groups, WORLD)


def fill(model, step: int) -> None:
    gen = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=gen)


def everything(model, opt) -> dict[str, torch.Tensor]:
    """Bytes of weights, momentum, moments and step counts (so that -0 is not 0)."""
    out = {n: p.detach() for n, p in model.named_parameters()}
    for name, state in opt.state_dict().items():
        out |= {f"{name}.{key}": value for key, value in state.items()}
    return {k: v.clone().flatten().view(torch.uint8) for k, v in out.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "c", "loss"])
@pytest.mark.parametrize("clip", [0.0, 1e-5])
def test_nothing_moves_from_a_bad_step_on(value, where, clip):
    """Not in the bad step, and not in the next one, which the host has launched by then."""
    model, opt = optimizer_of()
    opt.clip = clip
    for step in range(3):
        fill(model, step)
        opt.step(1.0, 0.9, torch.tensor([2.0, 0.0]))
    before = everything(model, opt)
    fill(model, 3)
    figures = torch.tensor([value if where == "loss" else 2.0, 0.0])
    if where != "loss":
        getattr(model, where).grad.view(-1)[5] = value
    opt.step(1.0, 0.9, figures)
    fill(model, 4)
    opt.step(1.0, 0.9, torch.tensor([2.0, 0.0]))
    after = everything(model, opt)
    assert set(after) == set(before) and len(before) == 3 + 2 + 3
    for name, bits in before.items():
        assert torch.equal(after[name], bits), name
    opt.reset()
    fill(model, 5)
    opt.step(1.0, 0.9)
    assert not torch.equal(everything(model, opt)["a"], before["a"]), "a fresh start moves again"


def test_a_first_step_that_is_bad_leaves_a_fresh_state():
    model, opt = optimizer_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.c.grad = torch.full_like(model.c, math.nan)
    opt.step(1.0, 0.9)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    for state in opt.state_dict().values():
        assert all(not value.any() for value in state.values())


def test_a_good_step_is_what_it_was():
    """The gate costs no digit: Muon and Adam by hand."""
    model, opt = optimizer_of()
    fill(model, 0)
    a, g = model.a.detach().clone(), model.a.grad.clone()
    c, h = model.c.detach().clone().requires_grad_(), model.c.grad.clone()
    opt.step(0.5, 0.9)
    u = torch.stack([g * 0.1 * 0.9 + g * 0.1])
    update = T.orthogonalize(T.unit(u, torch.float32))[0]
    torch.testing.assert_close(
        model.a, a * (1 - 0.025 * 0.1) - 0.025 * update, rtol=1e-5, atol=1e-6
    )
    c.grad = h
    torch.optim.AdamW([c], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1).step()
    torch.testing.assert_close(model.c, c)


@pytest.mark.parametrize("late", [0, 1])
def test_a_run_stops_with_the_weights_before(text_data, tmp_path, monkeypatch, late):
    """Read at once, and one step late as on a GPU: the same message, weights and log."""
    init = T.Reporter.__init__

    def patched(self, *args):
        init(self, *args)
        self.late = late

    monkeypatch.setattr(T.Reporter, "__init__", patched)
    cfg = H.tiny(text_data, tmp_path, run_id="bad", save_every=4, looks=0)
    trainer = T.Trainer(cfg)
    weight, bad = trainer.model.blocks[1].mlp.up.weight, []
    weight.register_hook(lambda g: g * math.nan if bad else g)
    trainer.hooks.after_step = lambda _, step: bad.append(1) if step.index == 3 else None
    with pytest.raises(
        T.NonFinite, match=r"^step 5: loss \d.*; rank 0: .*blocks.1.mlp.up.weight fi"
    ):
        trainer.run()
    run = tmp_path / "bad"
    state, meta = T.load_checkpoint(run)
    assert meta["step"] == 4, "the last whole checkpoint stands"
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, state["model"][name]), name
    for name, values in trainer.optimizer.state_dict().items():
        for key, value in values.items():
            assert torch.equal(value, state["optimizer"][name][key]), (name, key)
    assert len(H.losses(run)) == 4 and H.read_log(run, "event")[-1]["kind"] == "non-finite"
    (end,) = H.read_log(run, "end")
    assert (end["status"], end["code"], end["tokens"]) == ("non-finite", 3, 4 * 256)
    assert H.chain_breaks(run) == []


def test_blame_names_a_weight_and_admits_what_it_cannot_find(text_data, tmp_path):
    trainer = T.Trainer(H.tiny(text_data, tmp_path))
    batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
    assert "suspect the machine" in T.blame(trainer, trainer.steps[0], batch)
    with torch.no_grad():
        trainer.model.blocks[0].mlp.up.weight[0, 0] = math.inf
    said = T.blame(trainer, trainer.steps[0], batch)
    assert said == "rank 0: the weight blocks.0.mlp.up.weight is not finite"


def test_spikes_are_logged_and_nothing_is_skipped(text_data, tmp_path):
    """Norms by hand: the median of what came before, a plateau that becomes usual, no false alarm
    in the first steps, where norms differ wildly."""
    log = T.RunLog(tmp_path / "r", True)
    trainer = T.Trainer(H.tiny(text_data, tmp_path))
    reporter = T.Reporter(trainer, log, T.Clock(WORLD), None)
    norms = [1000.0, *[1.0] * 14, 50.0, 1.0, 9.9, 10.1, *[20.0] * 40, 20.0, 300.0]
    for i, norm in enumerate(norms):
        reporter.done = i + 1
        reporter.watch(norm)
    spikes = [e["text"] for e in H.read_log(tmp_path / "r", "event") if e["kind"] == "spike"]
    steps = [int(text.split(":")[0].split()[1]) for text in spikes]
    assert steps == [19, *range(20, 31), len(norms)], "until half of the steps so far are at 20"
    assert "norm 10.1, median before 1" in spikes[0]


# ---- FP8 ----------------------------------------------------------------------------------------


def test_fp8_casts_saturate_and_keep_nan():
    """An overflow becomes the largest value, a NaN stays one for the gate to see."""
    x = torch.tensor([0.0, 1.0, 1e9, -1e9, math.inf, -math.inf, math.nan])
    for dtype, top in ((T.E4M3, 448.0), (T.E5M2, 57344.0)):
        y = T.to_fp8(x, 0.5, dtype).float()
        assert y[:6].tolist() == [0.0, 2.0, top, -top, top, -top] and y[6].isnan()


def test_fp8_scales_are_finite_whatever_the_batch():
    """Fixed or of the width alone; a step in which no token counts divides by 1, not by 0."""
    for counted in (1, 393_216):
        gs = torch.tensor(T.LOSS_SCALE / counted) * T.G8_SCALE
        assert gs.isfinite() and gs > torch.finfo(torch.float32).tiny
    assert 0 < T.W8_SCALE < 1 and 0 < T.G8_SCALE < 1


def test_a_loss_hidden_by_saturation_still_stops(text_data, tmp_path):
    """Where every gradient is finite, the loss alone closes the gate."""
    trainer = T.Trainer(H.tiny(text_data, tmp_path))
    backward = trainer.head.backward
    trainer.head.backward = lambda *a: (backward(*a)[0] * math.inf, torch.zeros_like(a[0]))
    batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    figures, norm = trainer.train_step(trainer.steps[0], batch)
    assert not figures[0].isfinite() and norm.isfinite()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert "all gradients finite" in T.blame(trainer, trainer.steps[0], batch)
