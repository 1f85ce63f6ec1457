"""Every form of differential attention against two-softmax maths written here from the papers
(arXiv 2410.05258 section 2.1; unilm Diff-Transformer-V2), in float64 with loops over heads, and
against transformers' DiffLlama. Masks against brute force."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import helpers as H
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

T = H.T
LENGTH, BATCH = 24, 2
SMALL = {"n_layer": 4, "d_model": 64, "n_head": 4, "head_dim": 16, "vocab": 64, "backout": -1}
BARE = {"gate": False, "value_tables": 0, "bias": True, "qk_norm": False, "rope": False}


# ---- the maths, by hand -------------------------------------------------------------------------


def rms(x, gain=None, eps=1e-7):
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if gain is None else y * gain


def allowed(docs, window: int):
    """[B, T, T] bool, by three loops: not the future, not another document, not too far back."""
    batch, length = docs.shape
    out = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            for s in range(t + 1):
                out[b, t, s] = docs[b, s] == docs[b, t] and t - s < window
    return out


def softmax_map(q, k, mask, scale):
    """q, k [B, T, D] -> weights [B, T, T]."""
    score = (q @ k.transpose(1, 2)) * scale
    e = torch.exp(score - score.max()) * mask
    return e / e.sum(-1, keepdim=True)


def turn(x, half: bool):
    """RoPE as a complex product: pair (j, j + D/2) turns by -angle."""
    dim = x.size(-1)
    n = dim // 4 if half else dim // 2
    at = torch.arange(n, dtype=torch.float64)
    freq = 1024.0 ** (-at / max(1, n - 1)) if half else 10_000.0 ** (-2 * at / dim)
    freq = torch.cat([freq, torch.zeros(dim // 2 - n, dtype=torch.float64)])
    angle = torch.arange(x.size(1), dtype=torch.float64)[:, None] * freq
    z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(
        torch.ones_like(angle), -angle
    )
    return torch.cat([z.real, z.imag], -1)


def heads_of(x, w, b, n):
    """x [B, T, d], w [rows, d] -> n tensors [B, T, rows / n], rows in order."""
    y = x @ w.T
    return (y if b is None else y + b).chunk(n, dim=-1)


def ready(cfg, x):
    x = rms(x) if cfg.qk_norm else x
    return turn(x, cfg.half_rope) if cfg.rope else x


def scale_of(cfg, dim):
    return cfg.score_scale or (15.36 / dim if cfg.qk_norm else 1 / math.sqrt(dim))


def naive_v2(cfg, p, x, ve, docs, window):
    pairs = p["arm.lam"].size(0)
    dim = cfg.qk_dim or cfg.head_dim
    kv = p["arm.k.weight"].size(0) // dim
    q = heads_of(x, p["arm.q.weight"], p.get("arm.q.bias"), 2 * pairs)  # map 0's, then map 1's
    k = heads_of(x, p["arm.k.weight"], p.get("arm.k.bias"), kv)
    v = mixed(p, heads_of(x, p["arm.v.weight"], p.get("arm.v.bias"), kv), ve)
    masks = [allowed(docs, window), allowed(docs, min(window, cfg.window2 or window))]
    out = []
    for i in range(pairs):
        group = i // (pairs // kv)  # both maps of a pair read one K and one V
        key = ready(cfg, k[group])
        a1, a2 = (
            softmax_map(ready(cfg, q[m * pairs + i]), key, masks[m], scale_of(cfg, dim)) @ v[group]
            for m in range(2)
        )
        lam = 1 / (1 + torch.exp(-(x @ p["arm.lam"][i] + p["arm.lam_bias"][i])))
        out.append(a1 - lam[..., None] * a2)
    return out, [v[i // (pairs // kv)] for i in range(pairs)]


def naive_v1(cfg, p, x, ve, docs, window, layer):
    dim = p["arm.lam"].size(1)
    pairs = p["arm.q.weight"].size(0) // (2 * dim)
    q = heads_of(x, p["arm.q.weight"], p.get("arm.q.bias"), 2 * pairs)
    k = heads_of(x, p["arm.k.weight"], p.get("arm.k.bias"), 2 * pairs)
    v = mixed(p, heads_of(x, p["arm.v.weight"], p.get("arm.v.bias"), pairs), ve)
    lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lq1, lk1, lq2, lk2 = p["arm.lam"]
    lam = torch.exp(torch.dot(lq1, lk1)) - torch.exp(torch.dot(lq2, lk2)) + lam_init
    mask, out = allowed(docs, window), []
    for i in range(pairs):
        m1, m2 = (
            softmax_map(
                ready(cfg, q[m * pairs + i]), ready(cfg, k[m * pairs + i]), mask, scale_of(cfg, dim)
            )
            for m in range(2)
        )
        head = (m1 - lam * m2) @ v[i]
        out.append((1 - lam_init) * rms(head, p["arm.gain"], 1e-5))
    return out, None


def naive_softmax(cfg, p, x, ve, docs, window):
    n = cfg.n_head
    q, k, v = (
        heads_of(x, p[f"arm.{s}.weight"], p.get(f"arm.{s}.bias"), n) for s in ("q", "k", "v")
    )
    v, mask, dim = mixed(p, v, ve), allowed(docs, window), cfg.qk_dim or cfg.head_dim
    maps = (
        softmax_map(ready(cfg, a), ready(cfg, b), mask, scale_of(cfg, dim)) for a, b in zip(q, k)
    )
    return [m @ value for m, value in zip(maps, v)], v


def mixed(p, v, ve):
    if ve is None:
        return v
    c = p["arm.ve_mix"]
    return [c[0] * a + c[1] * b for a, b in zip(v, ve.chunk(len(v), dim=-1))]


def naive_attention(cfg, p, x, ve, docs, window, layer):
    """The whole of train_gpt.Attention: arm, XSA, gate, output projection."""
    name = cfg.arm.split(",")[0]
    if name == "diff_v1":
        heads, own = naive_v1(cfg, p, x, ve, docs, window, layer)
    else:
        heads, own = {"diff_v2": naive_v2, "softmax": naive_softmax}[name](
            cfg, p, x, ve, docs, window
        )
    done = []
    for i, y in enumerate(heads):
        if cfg.xsa:
            share = (y * own[i]).sum(-1) / ((own[i] ** 2).sum(-1) + 1e-6)
            y = y - torch.tanh(p["xsa"][i]) * share[..., None] * own[i]
        if cfg.gate:
            y = y / (1 + torch.exp(-(x[..., :12] @ p["gate"][i])))[..., None]
        done.append(y)
    y = torch.cat(done, -1) @ p["o.weight"].T
    return y + p["o.bias"] if cfg.bias else y


# ---- every form, forward and gradients ----------------------------------------------------------

CASES = {
    "softmax": {},
    "softmax,xsa=true": {},
    "diff_v1": {},
    "diff_v1,head_dim=128,n_head=2": {},
    "diff_v1,half_rope=false": {"gate": False},
    "diff_v1 as in GPT-2": {"arm": "diff_v1", **BARE},
    "diff_v2": {},
    "diff_v2,window2=3": {},
    "diff_v2,window2=3,form=full,xsa=true": {},
    "diff_v2,form=full": {},
    "diff_v2,form=light": {"lambda_bias": -2.0},
    "diff_v2,form=light+": {},
    "diff_v2,half_rope=false,score_scale=0.3": {},
    "diff_v2,xsa=true": {"value_tables": 0},
    "softmax,qk_dim=16,xsa=true": {"head_dim": 32},
    "softmax,qk_dim=16,half_rope=false": {"head_dim": 64},
    "diff_v2,qk_dim=16,xsa=true": {"head_dim": 32},
    "diff_v2,qk_dim=16,window2=3,form=full": {"head_dim": 32},
    "diff_v2,qk_dim=16,form=light": {"head_dim": 32},
    "narrow softmax as in GPT-2": {"arm": "softmax,qk_dim=16", "head_dim": 32, **BARE},
    "narrow diff_v2 as in GPT-2": {"arm": "diff_v2,qk_dim=16", "head_dim": 32, **BARE},
    "diff_v2 as in GPT-2": {"arm": "diff_v2", **BARE},
    "full as in GPT-2": {"arm": "diff_v2,form=full,window2=5", **BARE},
    "light as in GPT-2": {"arm": "diff_v2,form=light", **BARE},
}


def documents(length=LENGTH) -> torch.Tensor:
    lengths = ([5, 1, 9, length - 15], [length])
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]
    return torch.stack(rows).int()


def build(arm, layer, **changes):
    """A small GPT's attention of one layer, all parameters random, and its context."""
    cfg = T.make_config("demo", **{"arm": arm, **SMALL, "long_layers": (1, 2, 3), **changes})
    assert not T.check_config(cfg)
    model = T.GPT(cfg.model, LENGTH)
    H.randomise(model, std=0.4)
    context = model.contexts(documents(), torch.tensor([7, 4], dtype=torch.int32))[layer]
    return cfg.model, model.blocks[layer].attn, context


@pytest.mark.parametrize("layer, window", [(0, 4), (3, 7)])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, layer, window):
    changes = dict(CASES[case])
    cfg, attn, ctx = build(changes.pop("arm", case), layer, **changes)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, cfg.d_model, generator=gen).requires_grad_()
    ve = None
    if T.has_values(cfg, layer):
        ve = torch.randn(BATCH, LENGTH, attn.arm.kv_width, generator=gen).requires_grad_()
    assert (ve is not None) == (cfg.value_tables > 0)
    weight = torch.randn(BATCH, LENGTH, cfg.d_model, generator=gen)

    names, params = zip(*attn.named_parameters())
    given_ = [t for t in (x, ve) if t is not None]
    got = attn(x, ve, ctx)
    got_grads = torch.autograd.grad((got * weight).sum(), [*given_, *params])

    exact = [t.detach().double().requires_grad_() for t in (*given_, *params)]
    p = dict(zip(names, exact[len(given_) :]))
    ve64 = exact[1] if ve is not None else None
    want = naive_attention(cfg, p, exact[0], ve64, documents(), window, layer)
    want_grads = torch.autograd.grad((want * weight).sum(), exact)

    assert want.abs().mean() > 0.05, "the test must not compare zeros"
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    labels = ["x", "ve"][: len(given_)] + list(names)
    for label, a, b in zip(labels, got_grads, want_grads, strict=True):
        if label == "arm.k.bias" and not cfg.qk_norm and not cfg.rope:
            assert a.abs().max() < 1e-4  # adds the same to all scores of a query: no gradient
            continue
        assert b.abs().max() > 1e-6, f"no gradient reaches {label}"
        error = (a.double() - b).norm() / b.norm()
        assert error < 3e-5, f"d {label}: {error:.1e}"


WIDE = ("softmax", "diff_v2", "diff_v2,form=light", "selective")


@pytest.mark.parametrize("arm", WIDE)
def test_queries_as_wide_as_values_are_the_default(arm):
    """The same parameters, output and gradients, bit by bit; narrower ones score by their width."""
    runs = []
    for qk_dim in (0, 16):
        _, attn, ctx = build(arm, 3, qk_dim=qk_dim, value_tables=0)
        x = torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(1))
        y = attn(x.requires_grad_(), None, ctx)
        grads = torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])
        runs.append([y, *attn.parameters(), *grads])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    _, attn, ctx = build(arm, 3, qk_dim=16, head_dim=32)
    assert ctx.scale(attn.arm.dim) == 15.36 / 16 and set(ctx.rope) == {16, 32}


@pytest.mark.parametrize("change", ["half_rope", "rope", "qk_norm", "window2", "xsa", "gate"])
def test_the_comparison_has_power(change):
    """The same weights under one changed rule must not agree."""
    base = {"gate": True, "xsa": False, "window2": 0}
    cfg, attn, ctx = build("diff_v2", 3, **base)
    x = torch.randn(BATCH, LENGTH, cfg.d_model, generator=torch.Generator().manual_seed(1))
    other = T.make_config("demo", arm="diff_v2", **{**SMALL, **base}).model
    values = {"window2": 3}.get(change, not getattr(other, change))
    other = T.dataclasses.replace(other, **{change: values})
    p = {k: v.detach().double() for k, v in attn.named_parameters()}
    p["xsa"] = torch.ones(attn.arm.heads).double()
    p["arm.ve_mix"] = p["arm.ve_mix"] * 0 + torch.tensor([1.0, 0.0])
    attn.arm.ve_mix.data.copy_(p["arm.ve_mix"])
    ve = torch.zeros(BATCH, LENGTH, attn.arm.kv_width)
    want = naive_attention(other, p, x.double(), ve.double(), documents(), 7, 3)
    assert (attn(x, ve, ctx) - want).abs().max() > 1e-2


# ---- mixing forced to 0 -------------------------------------------------------------------------


@pytest.mark.parametrize("form", T.V2_FORMS)
def test_v2_without_mixing_is_gqa_softmax(form):
    """lambda -> 0 leaves ordinary grouped-query attention of the pairs' first (even) heads."""
    cfg, attn, ctx = build("diff_v2", 3, form=form, value_tables=0)
    arm = attn.arm
    with torch.no_grad():
        arm.lam.zero_()
        arm.lam_bias.fill_(-1e9)
    x = torch.randn(BATCH, LENGTH, cfg.d_model, generator=torch.Generator().manual_seed(2))
    y, _ = arm(x, None, ctx)
    first = arm.q.weight.view(2, -1, cfg.d_model)[0]  # map-major: the even heads
    q, k, v = (
        (x @ w.T).unflatten(-1, (-1, cfg.head_dim)) for w in (first, arm.k.weight, arm.v.weight)
    )
    q, k = arm.position(q, k, ctx)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=allowed(documents(), 7)[:, None],
        scale=15.36 / cfg.head_dim,
        enable_gqa=True,
    )
    torch.testing.assert_close(y, want.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)
    if form == "full":  # the softmax arm itself, with those weights
        soft = T.Softmax(cfg, 3)
        for a, b in ((soft.q, first), (soft.k, arm.k.weight), (soft.v, arm.v.weight)):
            a.weight.data.copy_(b)
        torch.testing.assert_close(y, soft(x, None, ctx)[0], rtol=1e-5, atol=1e-5)


def test_v1_without_mixing_is_a_normed_softmax():
    """(1 - lambda_init) RMSNorm(softmax(Q1 K1) V); lambda_init stays in the factor."""
    cfg, attn, ctx = build("diff_v1", 2, value_tables=0)
    arm, init = attn.arm, 0.8 - 0.6 * math.exp(-0.6)
    with torch.no_grad():
        arm.gain.fill_(1.0)
        arm.lam.zero_()
        arm.lam[2:, 0] = math.sqrt(math.log(1 + init))  # exp(0) - exp(ln(1 + init)) + init = 0
    assert arm.mixing().abs() < 1e-6
    x = torch.randn(BATCH, LENGTH, cfg.d_model, generator=torch.Generator().manual_seed(2))
    y, _ = arm(x, None, ctx)
    half = arm.n_out // 2
    q, k = ((x @ w.weight[:half].T).unflatten(-1, (arm.heads, -1)) for w in (arm.q, arm.k))
    v = (x @ arm.v.weight.T).unflatten(-1, (arm.heads, -1))
    q, k = arm.position(q, k, ctx)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=allowed(documents(), 7)[:, None],
        scale=15.36 / arm.dim,
    ).transpose(1, 2)
    want = (1 - init) * rms(want, eps=1e-5)
    torch.testing.assert_close(y, want.flatten(2), rtol=1e-4, atol=1e-5)


def test_lambda_init_by_depth():
    """PAPER: 0.8 - 0.6 exp(-0.3 (l - 1)) for l = 1..12, here with l - 1 = the block's number."""
    want = [0.200, 0.356, 0.471, 0.556, 0.619, 0.666, 0.701, 0.727, 0.746, 0.760, 0.770, 0.778]
    cfg = T.make_config("plain", arm="diff_v1", vocab=64, no_attention=()).model
    with torch.device("meta"):
        got = [T.DiffV1(cfg, layer).lam_init for layer in range(12)]
    assert [round(v, 3) for v in got] == want


@torch.no_grad()
def test_lambda_starts_where_it_should():
    """V1: lam within 0.5 of lam_init (std of the dot product is 0.08 at 64); V2: sigmoid(bias)."""
    cfg = T.make_config("plain", arm="diff_v1", vocab=64, d_model=128, n_layer=3, long_layers=(0,))
    cfg = cfg.with_(skip=(), backout=-1, no_attention=())
    model = T.GPT(cfg.model, 32)
    T.init_parameters(model, 0)
    for block in model.blocks:
        off = float(block.attn.arm.mixing()) - block.attn.arm.lam_init
        assert 0 < abs(off) < 0.5
        assert block.attn.arm.lam.std() == pytest.approx(0.1, rel=0.2)
        assert (block.attn.arm.gain == 1).all()
    model = T.GPT(cfg.with_(arm="diff_v2", lambda_bias=-2.0).model, 32)
    T.init_parameters(model, 0)
    lam = model.blocks[1].attn.arm.weight(torch.randn(1, 5, 128))
    torch.testing.assert_close(lam, torch.full_like(lam, 1 / (1 + math.exp(2))))


# ---- what each form costs -----------------------------------------------------------------------


def full_size(arm: str, preset: str = "plain", **changes) -> tuple[T.Config, T.GPT]:
    cfg = T.make_config(preset, arm=arm, vocab=50_257, **changes)
    with torch.device("meta"):
        return cfg, T.GPT(cfg.model, 128)


def attention_parameters(arm: str) -> tuple[int, int]:
    """(matrices, the rest) of one layer's attention at d_model 768, output projection included."""
    _, model = full_size(arm)
    parts = {n: p.numel() for n, p in model.blocks[0].attn.named_parameters()}
    matrices = sum(v for n, v in parts.items() if n.endswith(".weight"))
    return matrices, sum(parts.values()) - matrices


def test_parameter_counts():
    d = 768
    assert attention_parameters("softmax") == (4 * d * d, 0)
    assert attention_parameters("diff_v2") == (4 * d * d, 6 * d + 6)  # lambda and its bias
    assert attention_parameters("diff_v2,form=full") == (5 * d * d, 6 * d + 6)
    assert attention_parameters("diff_v2,form=light") == (5 * d * d // 2, 3 * d + 3)
    assert attention_parameters("diff_v2,form=light+") == (5 * d * d // 2, 3 * d + 3)
    assert attention_parameters("diff_v1") == (4 * d * d, 4 * 64 + 2 * 64)  # lambda, gain
    assert attention_parameters("softmax,qk_dim=64") == (3 * d * d, 0)
    assert attention_parameters("softmax,qk_dim=128") == attention_parameters("softmax")
    assert attention_parameters("selective,qk_dim=64") == (3 * d * d, 0)
    assert attention_parameters("diff_v2,qk_dim=64") == (11 * d * d // 4, 6 * d + 6)
    assert attention_parameters("diff_v2,qk_dim=64,form=full") == (7 * d * d // 2, 6 * d + 6)
    assert attention_parameters("diff_v2,qk_dim=64,form=light+") == (7 * d * d // 4, 3 * d + 3)


def test_narrow_queries_and_keys_halve_the_work_on_scores():
    """Of a token at 100 keys, 2 FLOPs for each dimension of scores and of values."""
    for spec, heads in (
        *(("softmax", 6), ("softmax,paired=0", 6), ("selective", 6)),
        *(("diff_v2", 12), ("diff_v2,form=light", 6)),
    ):
        for qk in (128, 64):
            arm = full_size(spec, qk_dim=qk)[1].blocks[0].attn.arm
            want = 2 * 100 * heads * (qk + 128)
            assert arm.flops_per_token(100.0) == pytest.approx(want, rel=1e-12), spec
            assert arm.q.weight.muon_view == (arm.q.maps, heads * qk // arm.q.maps, 768)


@pytest.mark.parametrize(
    "arm, heads, queries, kv",
    [
        ("softmax", 6, 6 * 128, 6 * 128),
        ("diff_v2", 6, 12 * 128, 3 * 128),
        ("diff_v2,form=full", 6, 12 * 128, 6 * 128),
        ("diff_v2,form=light", 3, 6 * 128, 3 * 128),
        ("diff_v1", 6, 12 * 64, 6 * 128),
        ("softmax,qk_dim=64", 6, 6 * 64, 6 * 128),
        ("diff_v2,qk_dim=64", 6, 12 * 64, 3 * 128),
    ],
)
def test_heads_at_768(arm, heads, queries, kv):
    _, model = full_size(arm, "r28")
    a = model.blocks[0].attn.arm
    assert (a.heads, a.q.weight.size(0), a.v.weight.size(0)) == (heads, queries, kv)
    assert a.n_out == model.blocks[0].attn.o.weight.size(1) == heads * 128
    assert {t.size(1) for t in model.values} == {kv}


@pytest.mark.parametrize("preset", ["r28", "plain"])
@pytest.mark.parametrize("layers", ["", ",layers=0+4+11"])
@pytest.mark.parametrize("qk_dim", [0, 64, 32])
def test_light_plus_has_softmaxs_active_parameters(preset, layers, qk_dim):
    counts, flops = {}, {}
    for arm in ("softmax", "diff_v2,form=light+"):
        spec = arm + (layers if arm != "softmax" else "")
        _, model = full_size(spec, preset, qk_dim=qk_dim)
        counts[arm] = T.count_parameters(model)["active_matmul"]
        flops[arm] = T.flops_per_token(model, 1000.0, 500.0)
        small = sum(
            p.numel()
            for n, p in model.named_parameters()
            if n.endswith((".lam", ".attn.gate")) and p.ndim == 2
        )
        counts[arm] -= small  # lambda, and the gate's row for each head
        flops[arm] -= 6 * small
    assert counts["softmax"] == counts["diff_v2,form=light+"]
    assert flops["softmax"] == pytest.approx(flops["diff_v2,form=light+"], rel=1e-12)


def test_light_plus_widens_the_mlp_only_beside_differential_attention():
    _, model = full_size("diff_v2,form=light+,layers=0+4+11")
    widths = [b.mlp.up.weight.size(0) for b in model.blocks]
    assert widths == [3648 if i in (0, 4, 11) else 3072 for i in range(12)]
    _, model = full_size("diff_v2,form=light+")
    widths = [b.mlp.up.weight.size(0) for b in model.blocks]
    assert widths == [3072 if i == 7 else 3648 for i in range(12)]  # block 7 has no attention
    _, model = full_size("softmax,mlp=3456,mlp_layers=0+4+11")
    widths = [b.mlp.up.weight.size(0) for b in model.blocks]
    assert widths == [3456 if i in (0, 4, 11) else 3072 for i in range(12)]
    kinds = [type(b.attn.arm).__name__ for b in full_size("diff_v1,layers=0+4")[1].blocks if b.attn]
    assert kinds == ["DiffV1" if i in (0, 4) else "Softmax" for i in range(12) if i != 7]


# ---- code that is not ours ----------------------------------------------------------------------


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("layer", [0, 5])
def test_v1_equals_diffllama(layer, rope):
    """transformers' pair i is heads i and i + h, its V is the concatenation of heads i and i + h,
    its norm has no gain, and it turns q and k the other way round (hence -sin)."""
    pytest.importorskip("transformers")
    from transformers.models.diffllama import modeling_diffllama as D

    d, pairs, dim = 64, 2, 16
    theirs_cfg = D.DiffLlamaConfig(
        **{"hidden_size": d, "num_attention_heads": 2 * pairs, "num_key_value_heads": 2 * pairs},
        **{"attention_bias": False, "rms_norm_eps": 1e-5, "head_dim": dim},
    )
    theirs_cfg._attn_implementation = "eager"
    theirs = D.DiffLlamaAttention(theirs_cfg, layer_idx=layer)
    cfg, attn, ctx = build(
        "diff_v1",
        layer % 4,
        **{"gate": False, "value_tables": 0, "qk_norm": False},
        **{"rope": rope, "half_rope": False},
    )
    attn.arm.lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    assert (attn.arm.heads, attn.arm.dim) == (pairs, dim)
    attn.arm.gain.data.fill_(1.0)
    with torch.no_grad():
        for a, b in (
            (theirs.q_proj, attn.arm.q),
            (theirs.k_proj, attn.arm.k),
            (theirs.o_proj, attn.o),
        ):
            a.weight.copy_(b.weight)
        v = attn.arm.v.weight.view(pairs, 2, dim, d).transpose(0, 1)
        theirs.v_proj.weight.copy_(v.reshape(2 * pairs * dim, d))
        lambdas = (theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2)
        for a, b in zip(lambdas, attn.arm.lam):
            a.copy_(b)
    x = torch.randn(
        BATCH, LENGTH, d, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    if rope:
        ids = torch.arange(LENGTH)[None].expand(BATCH, -1)
        cos, sin = D.DiffLlamaRotaryEmbedding(theirs_cfg)(x, ids)
    else:
        cos, sin = torch.ones(BATCH, LENGTH, dim), torch.zeros(BATCH, LENGTH, dim)
    mask = torch.zeros(ctx.mask.shape).masked_fill(~ctx.mask, float("-inf"))
    theirs_out = theirs(x, (cos, -sin), mask)[0]
    ours = attn(x, None, ctx)
    torch.testing.assert_close(ours, theirs_out, rtol=1e-5, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    a, b = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs_out))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- masks --------------------------------------------------------------------------------------


def rows_of(lengths: list[int], length: int) -> list[int]:
    """Document lengths -> ids, cut or filled up to `length`."""
    ids = [i for i, n in enumerate(lengths) for _ in range(n)][:length]
    return ids + [len(lengths)] * (length - len(ids))


@settings(max_examples=40, deadline=None)
@given(
    docs=st.lists(st.lists(st.integers(1, 12), max_size=8), min_size=1, max_size=2),
    windows=st.lists(st.integers(1, 30), min_size=1, max_size=3),
)
def test_dense_mask_is_brute_force(docs, windows):
    docs = torch.tensor([rows_of(d, 20) for d in docs], dtype=torch.int32)
    mask = T.dense_mask(docs, torch.tensor(windows, dtype=torch.int32))
    for h, window in enumerate(windows):
        assert torch.equal(mask[:, h], allowed(docs, window))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 5),
    docs=st.lists(st.lists(st.integers(1, 400), max_size=6), min_size=1, max_size=2),
    windows=st.lists(
        st.one_of(st.integers(1, 700), st.sampled_from([1, 127, 128, 129, 255, 256, 257, 2**30])),
        min_size=1,
        max_size=3,
    ),
)
def test_block_mask_is_the_dense_mask_block_by_block(blocks, docs, windows):
    """A block is listed as full where all of it is allowed (none on the diagonal is), as partial
    where some is, and not at all where none is; and element by element it says the same."""
    length = blocks * T.BLOCK
    docs = torch.tensor([rows_of(d, length) for d in docs], dtype=torch.int32)
    window = torch.tensor(windows, dtype=torch.int32)
    dense = T.dense_mask(docs, window)
    mask = T.block_mask(docs, window)
    batch, heads = dense.shape[:2]
    tiles = dense.view(batch, heads, blocks, T.BLOCK, blocks, T.BLOCK)
    some, whole = tiles.any(5).any(3), tiles.all(5).all(3)
    assert torch.equal(mask.to_dense().bool(), some)
    for number, index, want in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
    ):
        for b in range(batch):
            for h in range(heads):
                for i in range(blocks):
                    got = index[b, h, i, : number[b, h, i]].tolist()
                    assert got == want[b, h, i].nonzero().flatten().tolist(), (b, h, i)
    t = torch.arange(length)
    for b in range(batch):
        for h in range(heads):
            elements = mask.mask_mod(b, h, t[:, None], t[None, :])
            assert torch.equal(elements, dense[b, h])


def test_windows_are_token_exact():
    """The oldest key that a query of window w sees is w - 1 back."""
    docs = torch.zeros(1, 40, dtype=torch.int32)
    mask = T.dense_mask(docs, torch.tensor([5], dtype=torch.int32))[0, 0]
    assert mask[20].nonzero().flatten().tolist() == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("places", [(8,), (8, 2)])
def test_norm_and_turn_in_one_have_their_gradients(places):
    """Against both as PyTorch differentiates them; with two places a token heads come out flat."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, *places, 3, 16, dtype=torch.double, generator=gen)
    x.requires_grad_()
    table = T.rope_table(16, 16, True).double()
    ctx = T.Context(None, {16: table}, None)
    together = functools.partial(T.rotate, ctx=ctx, normed=True)
    assert torch.autograd.gradcheck(together, x)
    torch.testing.assert_close(together(x), T.rotate(T.norm(x), ctx), rtol=1e-6, atol=1e-6)


def test_norm_that_is_kept_has_its_gradient():
    """x comes back as it went in, and the gradient is that of both outputs."""
    x = torch.randn(2, 5, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    h, same = T.NormKeep.apply(x)
    assert torch.autograd.gradcheck(T.NormKeep.apply, x)
    torch.testing.assert_close(same, x)
    torch.testing.assert_close(h, T.norm(x))


@pytest.mark.parametrize("scale", [-1.1, 1.1, 0.01, -0.01])
def test_sum_whose_norm_is_kept_has_its_gradient(scale):
    gen = torch.Generator().manual_seed(0)
    x, one, other = (torch.randn(2, 5, 16, dtype=torch.double, generator=gen) for _ in range(3))
    scales = torch.tensor([scale, 0.3, 0.0], dtype=torch.double)
    leaves = [t.requires_grad_() for t in (x, scales, one, other)]
    h, same = T.NormKeep.apply(*leaves)
    assert torch.autograd.gradcheck(T.NormKeep.apply, leaves)
    assert torch.autograd.gradcheck(T.NormKeep.apply, (x, scales[:2], one))
    assert torch.autograd.gradcheck(T.NormKeep.apply, (x, scales[:1]))
    torch.testing.assert_close(same, scale * x + 0.3 * one)
    torch.testing.assert_close(h, T.norm(same))


@pytest.mark.parametrize(
    "arm",
    [
        "softmax",
        "softmax,ngram=64,xsa=true,smear=true",
        "softmax,ngram=64,x0=false",
        f"{Path(__file__).parent / 'arms/temperature.py'}:Temperature",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_is_the_model(arm, dtype):
    """With gradients and, as in validation, without: Dynamo takes these apart in two ways."""
    torch._dynamo.reset()
    model = H.small_gpt(arm, dtype)
    run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    gen = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (2, 64), generator=gen).int()
    docs = (torch.rand(2, 64, generator=gen) < 0.05).cumsum(1).int()
    window = torch.tensor([40, 20], dtype=torch.int32)
    found = []
    for function in (model, run):
        h = function(tokens, docs, window)
        params = [block.mlp.up.weight for block in model.blocks] + [model.embed, model.mix]
        params += [model.resid] if model.cfg.x0 else [model.ngram.scale]
        grads = torch.autograd.grad(h.float().square().sum() + h.float().sum(), params)
        with torch.no_grad():
            found.append([h.detach(), function(tokens, docs, window), *grads])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-4 if h.itemsize > 2 else 0.5)
    assert all(float(g.abs().max()) > 0 for g in found[0][2:])


@pytest.mark.parametrize("gated", [True, False])
def test_exclusion_has_its_gradient(gated):
    """And takes out of y what is along v."""
    gen = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 5, 3, 8, dtype=torch.double, generator=gen) for _ in range(2))
    leaves = [y, v, torch.tensor([0.0, 0.4, 30.0], dtype=torch.double)]
    leaves += [torch.randn(2, 5, 3, dtype=torch.double, generator=gen)] if gated else []
    rest = () if gated else (None,)
    out = T.Excluded.apply(*leaves, *rest)
    s = torch.sigmoid(leaves[3])[..., None] if gated else 1.0
    torch.testing.assert_close(out[:, :, :1], (s * y)[:, :, :1])
    assert float((out * v).sum(-1)[..., 2].abs().max()) < 1e-5, "all of it, where tanh is 1"
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: T.Excluded.apply(*t, *rest), leaves)
