"""Selective attention (2410.02703), alone and under differential attention, against the paper's
recipe written out in float64: scores, relu, protected tokens, a shift, a running sum over queries.
Values, gradients, the piecewise gradient, documents, windows, FlexAttention forward, a run."""

from __future__ import annotations

import shutil

import helpers as H
import pytest
import test_attention as A
import torch

T = H.T
LENGTH = A.LENGTH


# ---- the recipe, by hand ------------------------------------------------------------------------


def paper_masks(scores, docs):
    """F [T, T] of one row from a selector's scores [T, T] and documents [T]: for each document by
    itself, as if it were a text of its own."""
    out = torch.zeros_like(scores)
    for d in docs.unique():
        at = (docs == d).nonzero().flatten()
        s = scores[at][:, at].tril()  # causal; what is masked comes out of relu as 0
        s = torch.relu(s)
        first = torch.ones_like(s)
        first[:, 0] = 0  # never the document's first token
        s = s * first * (1 - torch.eye(len(at), dtype=s.dtype))  # never itself
        s = torch.cat([torch.zeros_like(s[:1]), s[:-1]])  # masks for later queries alone
        out[at[:, None], at] = s.cumsum(0)
    return out


def reference(cfg, p, x, docs, window):
    """train_gpt.Attention of a selective arm without value embeddings, in the dtype of x."""
    diff = cfg.arm.startswith("diff_v2")
    dim, scale = cfg.head_dim, A.scale_of(cfg, cfg.head_dim)
    q, k, v = (
        A.heads_of(x, p[f"arm.{s}.weight"], None, p[f"arm.{s}.weight"].size(0) // dim)
        for s in ("q", "k", "v")
    )
    if diff:  # map-major in store: a pair's two heads follow each other
        half = len(q) // 2
        q = [q[m * half + i] for i in range(half) for m in range(2)]
    q, k = ([A.ready(cfg, t) for t in ts] for ts in (q, k))
    share = len(q) // len(k)
    if cfg.selector == "own":
        own = (A.ready(cfg, x @ p[f"arm.select_{s}.weight"].T) for s in ("q", "k"))
        selectors = [tuple(own)]
    else:
        first = range(0, len(q), len(q) // int(cfg.selector))
        selectors = [(q[h], k[h // share]) for h in first]
    masks = []
    for a, b in selectors:
        scores = a @ b.transpose(1, 2) * scale
        masks.append(torch.stack([paper_masks(s, d) for s, d in zip(scores, docs)]))
    heads = []
    for h, query in enumerate(q):
        most = min(window, cfg.window2) if cfg.window2 and h % 2 else window
        score = query @ k[h // share].transpose(1, 2) * scale
        score = score - masks[h * len(masks) // len(q)]
        score = score.masked_fill(~A.allowed(docs, most), -torch.inf)
        heads.append(torch.softmax(score, -1) @ v[h // share])
    if diff:
        lam = torch.sigmoid(x @ p["arm.lam"].T + p["arm.lam_bias"])
        pairs = zip(heads[::2], heads[1::2])
        heads = [a - lam[..., i, None] * b for i, (a, b) in enumerate(pairs)]
    if cfg.gate:
        gates = torch.sigmoid(x[..., :12] @ p["gate"].T)
        heads = [y * gates[..., i, None] for i, y in enumerate(heads)]
    return torch.cat(heads, -1) @ p["o.weight"].T


# ---- values and gradients -----------------------------------------------------------------------

ARMS = (
    "selective",
    "selective,selector=2",
    "selective,selector=4",
    "selective,selector=own",
    "selective,half_rope=false,score_scale=0.4",
    "selective,qk_norm=false,rope=false",
    "diff_v2,selective=true",
    "diff_v2,selective=true,selector=2",
    "diff_v2,selective=true,selector=own",
    "diff_v2,selective=true,form=full,selector=4",
    "diff_v2,selective=true,form=light",
    "diff_v2,selective=true,form=light+,window2=3",
)


def build(arm, layer=3, **changes):
    return A.build(arm, layer, value_tables=0, **changes)


def compare(arm, attn_cfg, attn, ctx, window, most=3e-5):
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(A.BATCH, LENGTH, attn_cfg.d_model, generator=gen).requires_grad_()
    weight = torch.randn(x.shape, generator=gen)
    names, params = zip(*attn.named_parameters())
    got = attn(x, None, ctx)
    got_grads = torch.autograd.grad((got * weight).sum(), [x, *params])
    exact = [t.detach().double().requires_grad_() for t in (x, *params)]
    want = reference(attn_cfg, dict(zip(names, exact[1:])), exact[0], A.documents(), window)
    want_grads = torch.autograd.grad((want * weight).sum(), exact)
    assert want.abs().mean() > 0.05
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    for name, a, b in zip(["x", *names], got_grads, want_grads, strict=True):
        assert b.abs().max() > 1e-6, f"no gradient reaches {name}"
        error = float((a.double() - b).norm() / b.norm())
        assert error < most, f"d {name}: {error:.1e}"


@pytest.mark.parametrize("layer, window", [(0, 4), (3, 7)])
@pytest.mark.parametrize("arm", ARMS)
def test_forward_and_gradients(arm, layer, window):
    cfg, attn, ctx = build(arm, layer)
    compare(arm, cfg, attn, ctx, window)


@pytest.mark.parametrize("change", ["selector", "window2", "qk_norm", "half_rope"])
def test_the_comparison_has_power(change):
    cfg, attn, ctx = build("diff_v2,selective=true")
    values = {"selector": "2", "window2": 3}.get(change, not getattr(cfg, change))
    with pytest.raises(AssertionError):
        compare("", T.dataclasses.replace(cfg, **{change: values}), attn, ctx, 7)


def row_docs(length: int) -> torch.Tensor:
    rows = ([100, 1, 60, length - 161], [length])
    ids = [torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows]
    return torch.stack(ids).int()


def eager_flex(q, k, v, score_mod, block_mask, scale, enable_gqa, return_aux=None):
    """FlexAttention by its definition, with a backward on the CPU, which the real one lacks."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    b, h, i, j = (
        torch.arange(n).view([-1 if d == at else 1 for d in range(4)])
        for at, n in enumerate((*q.shape[:3], k.size(2)))
    )
    score = score_mod((q @ k.mT).float() * scale, b, h, i, j)
    score = score.masked_fill(~block_mask.mask_mod(b, h, i, j), -torch.inf)
    y = torch.softmax(score, -1).to(v.dtype) @ v
    return (y, T.AuxRequest(lse=torch.logsumexp(score, -1))) if return_aux else y


def long_layer(arm: str, length=256, window=90):
    cfg = T.make_config("demo", arm=arm, **{**A.SMALL, "value_tables": 0, "long_layers": (0,)})
    model = T.GPT(cfg.model, length)
    H.randomise(model, std=0.4)
    docs, windows = row_docs(length), torch.tensor([window, 40], dtype=torch.int32)
    model.flex = True
    flex = model.contexts(docs, windows)[0]
    model.flex = False
    return model.blocks[0].attn, flex, model.contexts(docs, windows)[0]


def grads(attn, ctx, x, weight):
    names, params = zip(*attn.named_parameters())
    y = attn(x, None, ctx)
    got = torch.autograd.grad((y * weight).sum(), [x, *params])
    return {"y": y.detach(), **dict(zip(["x", *names], got, strict=True))}


COMPILED = ("pieces", "diff_v2,selective=true,window2=30")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", ["flex", "pieces"])
@pytest.mark.parametrize(
    "arm",
    [
        "selective",
        "selective,selector=2",
        "diff_v2,selective=true,window2=30",
        "diff_v2,selective=true,selector=own",
        "diff_v2,selective=true,selector=2",
    ],
)
def test_both_gradients_beside_flex(arm, way, compiled, monkeypatch):
    """The path of a GPU, FlexAttention replaced by its definition: in several pieces."""
    if compiled and (shutil.which("g++") is None or (way, arm) != COMPILED):
        pytest.skip("one graph is enough, and compilation needs g++")
    monkeypatch.setattr(T, "flex_attention", eager_flex)
    monkeypatch.setattr(T, "SELECTIVE_PIECE", 96)
    attn, flex, dense = long_layer(f"{arm},selective_grad={way}")
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(2, 256, 64, generator=gen).requires_grad_()
    weight = torch.randn(x.shape, generator=gen)
    want = grads(attn, dense, x, weight)
    run = attn
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(attn, fullgraph=True, dynamic=False)
        run.named_parameters = attn.named_parameters
    got = grads(run, flex, x, weight)
    for name, t in want.items():
        assert t.norm() > 1e-3
        assert float((got[name] - t).norm() / t.norm()) < 2e-5, name
