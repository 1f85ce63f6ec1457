"""The ideas that a config field turns on: each against loops written from its equations, causal and
within its document, nothing where it is off, and a short run that learns."""

from __future__ import annotations

import shutil

import helpers as H
import pytest
import test_sharding as S
import torch
from torch import nn

from records.causality import check_causal

T = H.T
VOCAB = 64
SMALL = {
    **{"n_layer": 4, "d_model": 32, "n_head": 2, "head_dim": 16, "vocab": VOCAB},
    **{"long_layers": (0, 3), "no_attention": (), "skip": (), "backout": -1, "value_tables": 1},
}
# What a config says to have an idea, and nothing else.
IDEAS = {
    "ngram": {"ngram": 256},
    "key offset": {"key_offset": True},
    "smear": {"smear": True},
    "value gate": {"value_gate": True},
    "value layers": {"value_layers": (1, 2, 3)},
    "shifted cap": {"shifted_cap": True},
    "tie": {"tie": True},
    "copy": {"copy": True},
}
TRAINING = {"optimizer": {"normuon": 0.95, "cautious_wd": 1.2}}
TRAINING |= {"adam every 2": {"adam_every": 2}, "cautious Adam": {"cautious_adam_wd": 0.005}}
TRAINING["betas"] = {"head_betas": (0.5, 0.95), "value_betas": (0.75, 0.95)}
TRAINING["betas"] |= {"scalar_betas": (0.9, 0.99)}
# Without a parameter that starts as a no-op.
ACTS_AT_ONCE = {"key offset", "value layers", "tie"}


def build(random: bool = True, **changes) -> T.GPT:
    cfg = T.make_config("r28", **{**SMALL, "require_gpu": False, **changes})
    assert not T.check_config(cfg)
    model = T.GPT(cfg.model, 64)
    T.init_parameters(model, 0)
    if random:
        H.randomise(model)
    return model


def rows_of_text(length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens, all different, and documents [2, T]: one that starts at once, one of a single token,
    and a row that starts in the middle of a document (number 0)."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(VOCAB, generator=gen)[: 2 * length].view(2, length).int()
    first = torch.zeros(2, length, dtype=torch.int32)
    first[0, [0, 4, 5]] = 1
    first[1, 7] = 1
    return tokens, first.cumsum(1).int()


def window(long: int = 64, short: int = 64) -> torch.Tensor:
    return torch.tensor([long, short], dtype=torch.int32)


def opens(docs, b: int, t: int) -> bool:
    return t == 0 or bool(docs[b, t] != docs[b, t - 1])


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("idea", IDEAS)
@pytest.mark.parametrize("arm", ["softmax", "diff_v2"])
def test_causal_and_within_the_document(idea, arm):
    check_causal(arm, IDEAS[idea], preset="demo")


def test_causal_all_together():
    """At the full depth: blocks without attention, a skip, long layers 0, 4 and 11."""
    changes = {k: v for idea in IDEAS.values() for k, v in idea.items()}
    changes |= {"value_layers": (1, 9, 11), "xsa": True}
    check_causal("diff_v2,form=full", changes)


@pytest.mark.parametrize("idea", [i for i in IDEAS if i not in ACTS_AT_ONCE])
def test_starts_as_nothing(idea):
    """At init the logits are those without it, and parameters that both have start the same; so
    whatever the idea brings has been learned."""
    tokens, docs = rows_of_text()
    with_it, without = build(False, **IDEAS[idea]), build(False)
    mine = dict(with_it.named_parameters())
    for name, p in without.named_parameters():
        if name in mine and mine[name].shape == p.shape:
            assert torch.equal(mine[name], p), name
    assert torch.equal(with_it(tokens, docs, window()), without(tokens, docs, window()))


@pytest.mark.parametrize("idea", [*IDEAS, *TRAINING])
def test_every_parameter_has_a_group_and_learns(idea, text_data, tmp_path):
    """Eight steps on text: the loss falls, and each new parameter has moved by then."""
    changes = {**IDEAS, **TRAINING}[idea]
    new = set(dict(build(False, **changes).named_parameters()))
    new -= set(dict(build(False).named_parameters()))
    cfg = H.tiny(text_data, tmp_path, n_layer=4, **changes)
    trainer = T.Trainer(cfg)
    fresh = T.new_model(trainer.cfg, trainer.hooks, trainer.dtype)
    fresh = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    trainer.run()
    losses = H.losses(trainer.folder)
    assert losses[-1] < losses[0] - 0.5, losses
    groups = T.parameter_groups(cfg.optim)
    for name, p in trainer.model.named_parameters():
        assert T.group_of(name, p) in groups
        if name in new:
            assert not torch.equal(p, fresh[name]), name


# ---- key offset ---------------------------------------------------------------------------------


def test_key_offset_moves_what_stands_still():
    """By position and dimension: the dimensions that RoPE does not turn, found by turning them."""
    _, docs = rows_of_text()
    length, dim, heads = docs.size(1), 16, 3
    table = T.rope_table(length, dim, half=True)
    ctx = T.Context(None, {dim: table}, lambda d: 1.0)
    k = torch.randn(2, length, heads, dim, generator=torch.Generator().manual_seed(1))
    turned = (T.rotate(torch.ones_like(k), ctx) != 1).any(0).any(0).any(0)
    assert turned.sum() == dim // 2
    want = k.clone()
    for b in range(2):
        for t in range(length):
            if not opens(docs, b, t):
                want[b, t, :, ~turned] = k[b, t - 1, :, ~turned]
    assert torch.equal(T.offset_keys(k, T.starts_of(docs)), want)


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2"])
def test_key_offset_is_on_long_layers_alone(arm, monkeypatch):
    seen = []
    attend = T.attend

    def spy(q, k, v, ctx):
        seen.append((q, k))
        return attend(q, k, v, ctx)

    monkeypatch.setattr(T, "attend", spy)
    (tokens, docs), changes = rows_of_text(), {"arm": arm, "backout": -1}
    for on in (False, True):  # the same weights: the idea brings none
        build(key_offset=on, **changes)(tokens, docs, window())
    without, with_it = seen[:4], seen[4:]
    assert torch.equal(without[0][0], with_it[0][0]), "queries stay"
    starts, moved = T.starts_of(docs), (without[0][1] != with_it[0][1]).any(-1)
    assert moved[~starts].all() and not moved[starts].any(), "every head, but no document's start"

    def keys(layer, on, x):
        arm = build(key_offset=on, **changes).blocks[layer].attn.arm
        ctx = build(key_offset=True, **changes).contexts(docs, window())[layer]
        return arm.position(x, x, ctx)[1]

    x = torch.randn(2, docs.size(1), 2, 16, generator=torch.Generator().manual_seed(2))
    x = x[..., : T.v1_qk_dim(build(**changes).cfg)]
    for layer in range(4):
        assert torch.equal(keys(layer, True, x), keys(layer, False, x)) == (layer in (1, 2))


@pytest.mark.parametrize(
    "flag, changes",
    [
        ("--key-offset", {"key_offset": True, "half_rope": False}),
        ("--key-offset", {"key_offset": True, "rope": False}),
        ("--normuon", {"normuon": 1.0}),
        ("--backout", {"backout": 12}),
        ("--untie", {"tie": True, "untie": 1.5}),
        ("--head-betas", {"head_betas": (0.5,)}),
        ("--scalar-betas", {"scalar_betas": (0.9, 1.0)}),
        ("--adam-every", {"adam_every": 0}),
        ("--grad-clip", {"adam_every": 2, "grad_clip": 1.0}),
        ("--paired", {"paired": (7,)}),
        ("--paired", {"paired": (12,)}),
        ("--paired", {"paired": (1,), "n_head": 3}),
        ("--paired", {"paired": (1,), "arm": "diff_v2"}),
        ("--paired", {"paired": (1, 3), "arm": "diff_v1,layers=0+3"}),
        ("--paired", {"paired": (1,), "arm": "selective"}),
        ("--paired", {"paired": (0, 1), "key_offset": True}),
        ("--qk-dim 96: a divisor of --head-dim 128", {"qk_dim": 96}),
        ("--qk-dim 256: a divisor of --head-dim 128", {"qk_dim": 256}),
        ("--qk-dim 8: a divisor", {"qk_dim": 8}),
        ("--qk-dim -64: a divisor", {"qk_dim": -64}),
        ("--qk-dim 64: diff_v1", {"arm": "diff_v1,layers=0+3", "qk_dim": 64}),
    ],
)
def test_what_cannot_be_is_refused(flag, changes):
    assert any(flag in p for p in T.check_config(T.make_config("r28", **changes)))


# ---- smear --------------------------------------------------------------------------------------


def test_smear():
    model, (_, docs) = build(smear=True), rows_of_text()
    e = torch.randn(2, docs.size(1), 32, generator=torch.Generator().manual_seed(1))
    got = model.smear(e, T.starts_of(docs))
    w, s = model.smear.gate.detach(), model.smear.share.item()
    assert abs(s) > 0.01
    for b in range(2):
        for t in range(docs.size(1)):
            want = e[b, t].clone()
            if not opens(docs, b, t):
                want += s * torch.sigmoid(w @ e[b, t, :12]) * e[b, t - 1]
            torch.testing.assert_close(got[b, t], want)


def test_smear_comes_before_the_norm():
    model, (tokens, docs) = build(smear=True), rows_of_text()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(tokens, docs, window())
    x0 = T.norm(model.smear(model.embed[tokens.long()], T.starts_of(docs)))
    torch.testing.assert_close(seen[0], model.resid[0].sum() * x0)


# ---- NorMuon, cautious weight decay -------------------------------------------------------------

BETA2, DECAY = 0.9, 1.5
GROUPS = {
    "matrix": T.Group("muon", 0.05, beta2=BETA2, cautious_wd=DECAY),
    "gate": T.Group("adam", 0.02),
}


def naive_step(w, g, m, v, lr: float, mu: float) -> None:
    """One matrix, in place, by TECHNIQUES' equations: m, v are its momentum and row averages."""
    m += (1 - mu) * (g - m)
    u = g + mu * (m - g)
    o = T.orthogonalize(T.unit(u[None], torch.float32))[0]
    norm = o.norm()
    tall = o.size(0) >= o.size(1)
    for i in range(len(v)):
        line = o[i] if tall else o[:, i]
        v[i] = BETA2 * v[i] + (1 - BETA2) * (line**2).mean()
    o = o / v.clamp(min=1e-10).sqrt().view((-1, 1) if tall else (1, -1))
    o = o * norm / o.norm()
    s = max(1, w.size(0) / w.size(1)) ** 0.5
    mask = (o * w >= 0).float()
    w -= lr * s * (o + DECAY * lr * mask * w)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (32, 8)])
def test_normuon_and_cautious_decay_equal_a_loop(shape):
    maps = 2 if shape == (32, 8) else 1
    p = T.parameter(shape, ("zeros",), "matrix", (maps, shape[0] // maps, shape[1]))
    gen = torch.Generator().manual_seed(0)
    p.data = torch.randn(shape, generator=gen)
    model = nn.Module()
    model.register_parameter("w", p)
    w = p.detach().clone().view(maps, -1, shape[1])
    opt = T.Optimizer(model, GROUPS, T.World(torch.device("cpu")))
    m, v = torch.zeros_like(w), torch.zeros(maps, max(w.shape[1:]))
    for step in range(4):
        g = torch.randn(shape, generator=gen)
        p.grad = g.clone()
        opt.step(1.0 - 0.1 * step, 0.9)
        for i in range(maps):
            lr = 0.05 * (1.0 - 0.1 * step)
            naive_step(w[i], g.view_as(w)[i], m[i], v[i], lr, 0.9)
    torch.testing.assert_close(p.detach().view_as(w), w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(opt.state_dict()["w"]["second"], v, rtol=1e-5, atol=1e-7)


def test_normuon_of_nothing_is_nothing():
    """A matrix whose gradient is zero so far (a block behind a zero projection), and a bank's
    padding."""
    second = torch.zeros(2, 8)
    step = torch.zeros(2, 8, 4)
    step[1, 0] = 1.0
    out = T.even_out(step, second, 0.95, torch.tensor(False))
    assert torch.isfinite(out).all() and (out[0] == 0).all()
    torch.testing.assert_close(out.norm(dim=(1, 2)), step.norm(dim=(1, 2)))


def steps_of(ranks: list[int], world: T.World, saved: dict | None = None) -> dict:
    """Three steps of the mixed bag of shapes on the sum of these ranks' gradients, from the start
    or from `saved`."""
    model = S.Mixed()
    opt = T.Optimizer(model, GROUPS, world)
    if saved is not None:
        opt.load_state_dict(saved)
    for step in range(3):
        for name, p in model.named_parameters():
            for rank in ranks:
                H.add_gradient(p, S.gradient(name, p.shape, step, rank))
        opt.step(1.0, 0.9)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = [b.second.numel() for b in opt.banks if b.group.kind == "muon"]
    return {"params": params, "state": opt.state_dict(), "own": own}


def two_ranks(saved: dict) -> list[dict]:
    world = T.World.start("cpu")
    return [steps_of([world.rank], world), steps_of([world.rank], world, saved)]


def test_normuon_sharded_equals_unsharded(tmp_path):
    """From the start, and from a checkpoint that one rank wrote."""
    alone = T.World(torch.device("cpu"))
    first = steps_of([0, 1], alone)
    wanted = [first, steps_of([0, 1], alone, first["state"])]
    assert not torch.equal(wanted[0]["params"]["m0"], wanted[1]["params"]["m0"]), "state matters"
    for rank in H.on_ranks(2, two_ranks, tmp_path, first["state"]):
        for got, want in zip(rank, wanted, strict=True):
            for name, p in want["params"].items():
                torch.testing.assert_close(got["params"][name], p, rtol=1e-5, atol=1e-6, msg=name)
            for name, state in want["state"].items():
                for key, value in state.items():
                    torch.testing.assert_close(
                        got["state"][name][key], value, rtol=1e-5, atol=1e-6, msg=f"{name} {key}"
                    )
            assert 0 < sum(got["own"]) < sum(want["own"]), "each rank holds its own share"
    assert first["state"]["doubled"]["second"].shape == (2, 16)


def test_normuon_run_resumes(text_data, tmp_path):
    """A whole run, and one that went on from its middle, end with the same losses."""
    cfg = H.tiny(text_data, tmp_path, normuon=0.95, cautious_wd=1.2, save_every=4, run_id="a")
    T.train(cfg)
    whole = H.losses(tmp_path / "a")
    assert whole[-1] < whole[0] - 0.5
    T.train(cfg.with_(run_id="", resume=str(tmp_path / "a" / "ckpt" / "step_00000004")))
    assert H.losses(tmp_path / "a") == pytest.approx(whole, abs=1e-6)


# ---- value embeddings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm", ["softmax", "diff_v1", "diff_v2", f"{H.ARMS}/plain_module.py:Plain"]
)
def test_value_gate(arm):
    """The arm gets its table's row, each value head's part times 2 sigmoid(G x[:12])."""
    model = build(arm=arm, value_gate=True)
    attn, seen = model.blocks[0].attn, []
    attn.arm.register_forward_pre_hook(lambda _, args: seen.append(args))
    tokens, docs = rows_of_text()
    model(tokens, docs, window())
    (x, ve, _), table = seen[0], model.values[0][tokens.long()]
    heads, width = attn.value_gate.size(0), attn.arm.kv_width
    assert heads * attn.arm.n_out == width * attn.arm.heads, "heads as wide as those of y"
    gate = 2 * torch.sigmoid(x[..., :12] @ attn.value_gate.t())
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        torch.testing.assert_close(ve[..., part], table[..., part] * gate[..., h : h + 1])
    assert model.blocks[1].attn.value_gate is None, "it has no value embedding"


def test_value_layers():
    """Each block reads its own table, in the order given; the others read none."""
    model = build(value_layers=(3, 1))
    slots = [T.value_slot(model.cfg, i) for i in range(4)]
    assert slots == [None, 1, None, 0] and len(model.values) == 2
    for off, message in (((7,), "--value-layers"), ((2,), "--value-layers")):
        changes = {**SMALL, "value_layers": off, "no_attention": (2,)}
        assert any(message in p for p in T.check_config(T.make_config("r28", **changes)))


# ---- the shifted cap ----------------------------------------------------------------------------


def test_shifted_cap_and_its_gradient():
    cap, gen = T.SHIFTED_CAP, torch.Generator().manual_seed(0)
    z = (6 * torch.randn(40, 96, generator=gen, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(96, (40,), generator=gen)
    targets[::5] = -1
    logits = 23 * torch.sigmoid((z + 5) / 7.5)
    losses = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    losses = losses * (targets >= 0)
    (want,) = torch.autograd.grad(losses.sum(), z)
    z = z.detach().float()
    torch.testing.assert_close(T.softcap(z, cap).double(), logits.detach(), rtol=1e-6, atol=1e-5)
    got, grad = T.losses_and_grad(z, targets, cap)
    torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(T.token_losses(z, targets, cap), got)
    assert grad.abs().max() <= 1, "what G8_SCALE is made for"


def test_a_number_is_the_symmetric_cap():
    z = torch.linspace(-60, 60, 101)
    assert torch.equal(T.softcap(z, 30.0), 30 * torch.sigmoid(z * (4 / 30)))


def test_shifted_cap_reaches_head_and_logits():
    model = build(shifted_cap=True)
    assert model.softcap == (23.0, 5.0, 7.5)
    tokens, docs = rows_of_text()
    z = model(tokens, docs, window()) @ model.head.t()
    want = 23 * torch.sigmoid((z + 5) / 7.5)[..., :VOCAB]
    torch.testing.assert_close(model.logits(tokens, docs, window()), want)


def test_fp8_weights_of_the_shifted_cap_have_room():
    """Weights up to 1.6 do not saturate, and dh follows the scale that they were cast with."""
    weight = nn.Parameter(torch.full((32, 32), 1.6))
    head = T.Head(weight, T.SHIFTED_CAP, torch.bfloat16, True, False)
    head.prepare()
    assert head._cast[0].float().max() * head.w8_scale == pytest.approx(1.6, rel=0.07)
    assert T.Head(weight, 30.0, torch.bfloat16, True, False).w8_scale == T.W8_SCALE


# ---- head and embedding as one, then apart ------------------------------------------------------

TIED = {"tie": True, "tokens": 256 * 9, "untie": 2 / 3}  # 9 steps, the first 6 tied


def test_tied_start():
    model, other = build(False, tie=True), build(False)
    assert torch.equal(model.embed, model.head) and model.embed is not model.head
    assert 0.0045 < float(model.head.detach().std()) < 0.0055
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert name in ("embed", "head") or torch.equal(p, q), name
    assert T.count_parameters(model) == T.count_parameters(other)


def test_a_small_embedding_survives_its_norm_in_bfloat16():
    """rms_norm's default eps is float32's: bfloat16's would shrink rows of 0.005 to a sixteenth."""
    x = (0.005 * torch.randn(4, 768, generator=torch.Generator().manual_seed(0))).bfloat16()
    for f in (T.norm, torch.compile(T.norm)):
        assert f(x).float().square().mean().sqrt() == pytest.approx(1.0, abs=0.01)


def test_tied_plan():
    cfg = T.make_config("r28", tie=True)
    steps = T.plan_steps(cfg, 50_000_000)
    tied = [s.tied for s in steps]
    assert sum(tied) == round(len(steps) * 2 / 3) and all(tied[: sum(tied)])
    assert not any(s.tied for s in T.plan_steps(cfg.with_(tie=False), 50_000_000))
    assert not any(s.tied for s in T.plan_steps(cfg.with_(untie=0.0), 50_000_000))


class Two(nn.Module):
    """Head and embedding of 7 x 6, and a matrix beside them."""

    def __init__(self):
        super().__init__()
        start = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
        for name, group in (("head", "head"), ("embed", "tied"), ("m", "matrix")):
            p = T.parameter((7, 6), ("zeros",), group)
            p.data = start.clone()
            self.register_parameter(name, p)


def tied_steps(ranks: list[int], world: T.World) -> dict:
    """Three tied steps and three apart, on the sum of these ranks' gradients."""
    model = Two()
    groups = T.parameter_groups(T.OptimConfig(head_lr=0.02, cautious_adam_wd=0.01))
    opt, norms, along = T.Optimizer(model, groups, world), [], []
    for step in range(6):
        for name, p in model.named_parameters():
            for rank in ranks:
                H.add_gradient(p, S.gradient(name, p.shape, step, rank))
        norms.append(opt.step(1.0, 0.9, tied=step < 3))
        along.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return {"along": along, "norms": torch.stack(norms), "state": opt.state_dict()}


def naive_adam(w, g, m, v, t: int, lr: float, betas=(0.8, 0.95), decay: float = 0.0) -> None:
    """One parameter's update number t, in place; then cautious decay where it shrank the weight."""
    m += (1 - betas[0]) * (g - m)
    v += (1 - betas[1]) * (g * g - v)
    w -= lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-10)
    w -= lr**2 * decay * (w * m > 0) * w


def test_tied_steps_equal_one_matrix_whose_state_is_copied():
    got = tied_steps([0], T.World(torch.device("cpu")))
    start = Two().head.detach()
    one = [start.clone(), torch.zeros(7, 6), torch.zeros(7, 6)]  # w, m, v
    for step in range(6):
        grads = {n: S.gradient(n, (7, 6), step, 0) for n in ("head", "embed", "m")}
        if step < 3:
            g = grads.pop("embed") + grads["head"]
            naive_adam(one[0], g, *one[1:], step + 1, 0.02, decay=1.5)
            grads["head"], two = g, {n: [t.clone() for t in one] for n in ("head", "embed")}
        else:
            for name, (w, m, v) in two.items():
                naive_adam(w, grads[name], m, v, step + 1, 0.02, decay=1.5)
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert got["norms"][step] == pytest.approx(float(norm), rel=1e-5)
        along = got["along"][step]
        assert torch.equal(along["head"], along["embed"]) == (step < 3)
        for name, (w, _, _) in two.items():
            torch.testing.assert_close(along[name], w, rtol=1e-5, atol=1e-6)


def two_ranks_tied() -> dict:
    world = T.World.start("cpu")
    return tied_steps([world.rank], world)


def test_tied_sharded_equals_unsharded(tmp_path):
    want = tied_steps([0, 1], T.World(torch.device("cpu")))
    for got in H.on_ranks(2, two_ranks_tied, tmp_path):
        torch.testing.assert_close(got["norms"], want["norms"], rtol=1e-5, atol=0)
        for a, b in zip(got["along"], want["along"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["state"], want["state"], rtol=1e-5, atol=1e-6)
        assert torch.equal(got["along"][2]["head"], got["along"][2]["embed"])


@pytest.fixture(scope="module")
def tied_run(text_data, tmp_path_factory):
    """A whole tied run with a checkpoint after each step, Adam every second step."""
    out, seen = tmp_path_factory.mktemp("tied"), []
    changes = {**TIED, "adam_every": 2, "cautious_adam_wd": 0.005, "keep": 20}
    cfg = H.tiny(text_data, out, **changes, save_every=1, save_final=True, run_id="whole")
    hooks = T.Hooks(after_step=lambda trainer, _: seen.append(is_one(trainer.model)))
    trainer = T.Trainer(cfg, hooks)
    trainer.run()
    return cfg, trainer, seen


def is_one(model: T.GPT) -> bool:
    return torch.equal(model.embed, model.head)


def test_they_part_when_they_should(tied_run):
    """Steps 1 to 6 are tied, and Adam updates after steps 1, 3, 5, 7, 9."""
    cfg, trainer, seen = tied_run
    assert [s.adam for s in trainer.steps] == [i % 2 == 0 for i in range(9)]
    assert seen == [True] * 6 + [False] * 3
    whole = H.losses(trainer.folder)
    assert whole[-1] < whole[0] - 0.3


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7, 8])
def test_resume_is_bitwise_around_the_split(tied_run, tmp_path, step):
    """Also where Adam holds a gradient (after an even step)."""
    cfg, trainer, _ = tied_run
    folder = tmp_path / "whole"
    shutil.copytree(trainer.folder, folder)
    at = folder / "ckpt" / f"step_{step:08d}"
    held = "grad" in T.load_checkpoint(at)[0]["optimizer"]["head"]
    assert held == (step % 2 == 0)
    T.train(cfg.with_(run_id="", out=str(tmp_path), resume=str(at)))
    assert H.losses(folder) == H.losses(trainer.folder)
    want, got = (
        T.load_checkpoint(f / "ckpt" / "step_00000009")[0] for f in (trainer.folder, folder)
    )
    for part in ("model", "optimizer"):
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=0)


def test_reset_ties_again(tied_run, tmp_path):
    cfg, trainer, seen = tied_run
    first = H.losses(trainer.folder)
    assert not is_one(trainer.model)
    trainer.reset(cfg.run.seed, cfg.data.data_seed, run_id="again")
    assert is_one(trainer.model)
    trainer.run()
    assert H.losses(trainer.folder) == first
    assert seen[9:] == seen[:9]


@pytest.mark.parametrize("tied, room", [(False, 0.875), (True, 1.75)])
def test_fp8_weights_of_a_tied_head_have_room(tied, room):
    head = T.Head(nn.Parameter(torch.zeros(16, 16)), 30.0, torch.float32, False, False, tied=tied)
    assert head.w8_scale * 448 == room


# ---- Adam: betas, cautious decay, updates of several steps ---------------------------------------


def test_betas_and_decay_of_the_groups():
    plain = T.parameter_groups(T.OptimConfig())
    assert {g.betas for n, g in plain.items() if n in ("head", "embed", "value", "scalar")} == {
        (0.8, 0.95)
    }
    assert not any(g.cautious_wd for g in plain.values())
    groups = T.parameter_groups(
        T.OptimConfig(
            head_betas=(0.5, 0.9),
            value_betas=(0.75, 0.8),
            scalar_betas=(0.9, 0.99),
            cautious_adam_wd=0.005,
        )
    )
    betas = {"head": (0.5, 0.9), "embed": (0.5, 0.9), "tied": (0.5, 0.9), "value": (0.75, 0.8)}
    betas |= {"scalar": (0.9, 0.99), "gate": (0.9, 0.99), "ngram": (0.0, 0.95)}
    assert all(groups[n].betas == b for n, b in betas.items())
    decay = {"head": 0.75, "tied": 0.75, "embed": 0.025, "value": 0.025, "ngram": 0.025}
    for name, group in groups.items():
        assert group.cautious_wd == pytest.approx(decay.get(name, 0.0)), name
    assert T.make_config(head_betas=(0.5, 0.95)).flat()["head_betas"] == "0.5+0.95"
    assert T.parse_value("head_betas", "0.5+0.95") == (0.5, 0.95)


def adam_alone(every: int, steps: int = 6, **group) -> tuple[nn.Module, T.Optimizer, torch.Tensor]:
    """A parameter after `steps` steps, its optimizer, and what the equations say it should be."""
    gen = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.register_parameter("p", T.parameter((9, 7), ("zeros",), "gate"))
    model.p.data = torch.randn(9, 7, generator=gen)
    w = model.p.detach().clone()
    m, v, held = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    opt = T.Optimizer(model, {"gate": T.Group("adam", 0.05, **group)}, T.World(torch.device("cpu")))
    for step in range(steps):
        g, factor = torch.randn(9, 7, generator=gen), 1.0 - 0.1 * step
        H.add_gradient(model.p, g)
        held += g
        norm = opt.step(factor, 0.9, adam=(step + 1) % every == 0)
        assert float(norm) == pytest.approx(float(held.norm()), rel=1e-5)
        if (step + 1) % every == 0:
            number, decay = (step + 1) // every, group.get("cautious_wd", 0.0)
            naive_adam(w, held, m, v, number, 0.05 * factor, opt.banks[0].group.betas, decay)
            held.zero_()
    return model, opt, w


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("decay", [0.0, 30.0])
def test_adam_equals_a_loop(every, decay):
    model, _, w = adam_alone(every, betas=(0.5, 0.9), cautious_wd=decay)
    torch.testing.assert_close(model.p.detach(), w, rtol=1e-5, atol=1e-6)


def test_a_held_gradient_is_dropped_by_reset_and_by_load():
    _, opt, _ = adam_alone(2, steps=1)
    assert opt.banks[0].held and "grad" in opt.state_dict()["p"]
    saved = opt.state_dict()
    opt.reset()
    (p,) = (p for _, p in opt.banks[0].slots.values())
    assert not opt.banks[0].held and p.grad is None and opt.state_dict() == {}
    opt.load_state_dict(saved)
    assert opt.banks[0].held and torch.equal(p.grad, saved["p"]["grad"])
    opt.load_state_dict({})
    assert not opt.banks[0].held and p.grad is None


def every_two(ranks: list[int], world: T.World, saved: dict | None = None) -> dict:
    """Steps 0 to 4, or 3 and 4 from the state after step 2, with Adam in steps 1 and 3."""
    model = S.Mixed()
    opt = T.Optimizer(model, GROUPS, world)
    if saved is not None:
        model.load_state_dict(saved["params"])
        opt.load_state_dict(saved["state"])
    norms, middle = [], None
    for step in range(0 if saved is None else 3, 5):
        for name, p in model.named_parameters():
            for rank in ranks:
                H.add_gradient(p, S.gradient(name, p.shape, step, rank))
        norms.append(opt.step(1.0, 0.9, adam=step % 2 == 1))
        if step == 2:
            params = {n: p.detach().clone() for n, p in model.named_parameters()}
            middle = {"params": params, "state": opt.state_dict()}
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = {"params": params, "state": opt.state_dict(), "norms": torch.stack(norms)}
    return {**out, "middle": middle}


def two_ranks_every_two() -> list[dict]:
    world = T.World.start("cpu")
    whole = every_two([world.rank], world)
    return [whole, every_two([world.rank], world, whole["middle"])]


def test_adam_every_2_sharded_equals_unsharded_and_resumes(tmp_path):
    """With a held gradient in the middle and at the end; a resumed rank has the same bits."""
    want = every_two([0, 1], T.World(torch.device("cpu")))
    assert "grad" in want["state"]["a"] and "grad" not in want["state"]["m0"]
    for whole, again in H.on_ranks(2, two_ranks_every_two, tmp_path):
        for key in ("params", "state", "norms", "middle"):
            torch.testing.assert_close(whole[key], want[key], rtol=1e-5, atol=1e-6)
        for key in ("params", "state"):
            torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0)


# ---- paired heads -------------------------------------------------------------------------------


def naive_paired(arm: T.Paired, x, ve, docs, window: int) -> torch.Tensor:
    """Query by query: head h of token t, at place 2 t or 2 t + 1, over both heads of its pair."""
    heads, half, dim = arm.heads, arm.heads // 2, arm.cfg.qk_dim or arm.cfg.head_dim
    wide = arm.cfg.head_dim
    table = T.rope_table(2 * x.size(1), dim, half=True)
    ctx = T.Context(None, {dim: table}, lambda d: 15.36 / d)

    def place(h: int, t: int) -> int:
        return 2 * t + h // half

    def turned(proj, h: int, b: int, t: int) -> torch.Tensor:
        rows = torch.zeros(1, 2 * x.size(1), 1, dim)
        rows[0, place(h, t), 0] = T.norm(proj(x[b, t])[h * dim : (h + 1) * dim])
        return T.rotate(rows, ctx)[0, place(h, t), 0]

    v = arm.mix(arm.v(x).unflatten(-1, (heads, wide)), ve)
    out = torch.zeros(*x.shape[:2], heads, wide)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            for h in range(heads):
                q, scores, values = turned(arm.q, h, b, t), [], []
                for s in range(t + 1):
                    for other in (h % half, h % half + half):
                        back = place(h, t) - place(other, s)
                        if docs[b, s] == docs[b, t] and 0 <= back < window:
                            scores.append(q @ turned(arm.k, other, b, s) * 15.36 / dim)
                            values.append(v[b, s, other])
                out[b, t, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out.flatten(2)


@pytest.mark.parametrize("layer, reach, narrow", [(1, 5, 0), (1, 64, 0), (0, 64, 0), (1, 5, 1)])
def test_paired_equals_a_loop(layer, reach, narrow):
    width = {"head_dim": 32, "qk_dim": 16, "n_head": 4} if narrow else {"n_head": 4}
    model = build(paired=(0, 1), d_model=64, value_tables=2, **width)
    _, docs = rows_of_text(8)
    arm = model.blocks[layer].attn.arm
    assert type(arm) is T.Paired and type(model.blocks[2].attn.arm) is T.Softmax
    gen = torch.Generator().manual_seed(1)
    x, ve = (torch.randn(2, 8, n, generator=gen) for n in (64, arm.kv_width))
    context = model.contexts(docs, window(64, reach))[layer]
    got, v = arm(x, ve, context)
    torch.testing.assert_close(got, naive_paired(arm, x, ve, docs, reach), rtol=1e-4, atol=1e-5)
    assert v.shape == (2, 8, 4, model.cfg.head_dim), "XSA's own value, by token"


PAIRED = {"paired": (1, 2)}  # the demo's short layers


@pytest.mark.parametrize(
    "arm",
    ["softmax", "softmax,xsa=true", "diff_v2,layers=0+3", "diff_v1,layers=3", "selective,layers=0"],
)
def test_paired_is_causal(arm):
    check_causal(arm, {**PAIRED, "key_offset": True, "value_gate": True}, preset="demo")


def test_paired_is_causal_at_full_depth():
    check_causal("softmax", {"paired": (0, 2, 5, 9)})


def test_paired_changes_no_parameter():
    model, other = build(False, **PAIRED), build(False)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert T.count_parameters(model) == T.count_parameters(other)
    H.randomise(model), H.randomise(other)
    tokens, docs = rows_of_text()
    assert not torch.equal(model(tokens, docs, window()), other(tokens, docs, window()))


def test_paired_flexattention_equals_dense():
    """Forward, compiled on the CPU: documents that begin within blocks, windows that bind."""
    model = build(**PAIRED).requires_grad_(False)
    model.register_rope(2 * 256)
    gen = torch.Generator().manual_seed(3)
    docs = (torch.rand(2, 256, generator=gen) < 0.02).cumsum(1).int()
    x = torch.randn(2, 256, 32, generator=gen)
    arm = model.blocks[2].attn.arm

    def attention(x, docs, short):
        return arm(x, None, model.contexts(docs, short)[2])[0]

    want = [attention(x, docs, window(200, short)) for short in (130, 40)]
    model.flex = True
    compiled = torch.compile(attention, fullgraph=True, dynamic=False)
    for short, right in zip((130, 40), want, strict=True):
        got = compiled(x, docs, window(200, short))
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_paired_trains_and_samples(text_data, tmp_path):
    cfg = H.tiny(text_data, tmp_path, n_layer=4, **PAIRED, save_final=True, run_id="a")
    T.train(cfg)
    losses = H.losses(tmp_path / "a")
    assert losses[-1] < losses[0] - 0.5
    model, _ = T.load_model(tmp_path / "a")
    tokens, docs = rows_of_text()
    assert torch.isfinite(model.logits(tokens, docs, window())).all()


# ---- the optimizer's pointwise work, compiled ---------------------------------------------------


@pytest.mark.parametrize("idea", [{}, {"beta2": 0.95, "cautious_wd": 1.2, "wd": 0.1}])
def test_compiled_update_equals_eager(idea, monkeypatch):
    """Steps with other factors make no new graph; a bad step moves nothing."""
    monkeypatch.setattr(T.AdamBank, "FEW", 0)
    groups = {
        "matrix": T.Group("muon", 0.05, **idea),
        "gate": T.Group("adam", 0.02, cautious_wd=30.0 if idea else 0.0, wd=idea.get("wd", 0.0)),
    }
    ends = []
    for compiled in (False, True):
        model = S.Mixed()
        opt = T.Optimizer(model, groups, T.World(torch.device("cpu")))
        for bank in opt.banks if compiled else ():
            bank.compile()
        for step in range(4):
            for name, p in model.named_parameters():
                H.add_gradient(p, S.gradient(name, p.shape, step, 0))
            if step == 3:
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                model.m0.grad[0, 0] = torch.nan
            with torch._dynamo.config.patch(error_on_recompile=compiled and step > 0):
                opt.step(1.0 - 0.1 * step, 0.85 + 0.02 * step)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name
        ends.append((before, opt.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
