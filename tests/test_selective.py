"""Selective attention (2410.02703), alone and under differential attention, against the paper's
recipe written out in float64: scores, relu, protected tokens, a shift, a running sum over queries.
Values, gradients, the chunked gradient, documents, windows, FlexAttention forward, a run."""

from __future__ import annotations

import base64
import re
import shutil

import helpers as H
import numpy as np
import pytest
import test_attention as A
import torch

from evals import look

T = H.T
LENGTH = A.LENGTH


# ---- the recipe, by hand ------------------------------------------------------------------------


def paper_masks(scores, docs):
    """F [T, T] of one row from head 0's scores [T, T] and documents [T]: for each document by
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
    dim = cfg.qk_dim or cfg.head_dim
    scale = A.scale_of(cfg, dim)
    q, k, v = (
        A.heads_of(x, p[f"arm.{s}.weight"], None, p[f"arm.{s}.weight"].size(0) // width)
        for s, width in (("q", dim), ("k", dim), ("v", cfg.head_dim))
    )
    if diff:  # map-major in store: a pair's two heads follow each other
        half = len(q) // 2
        q = [q[m * half + i] for i in range(half) for m in range(2)]
    q, k = ([A.ready(cfg, t) for t in ts] for ts in (q, k))
    share = len(q) // len(k)
    first = q[0] @ k[0].transpose(1, 2) * scale
    masks = torch.stack([paper_masks(s, d) for s, d in zip(first, docs)])
    heads = []
    for h, query in enumerate(q):
        most = min(window, cfg.window2) if cfg.window2 and h % 2 else window
        score = query @ k[h // share].transpose(1, 2) * scale - masks
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
    "selective,half_rope=false,score_scale=0.4",
    "selective,qk_norm=false,rope=false",
    "diff_v2,selective=true",
    "diff_v2,selective=true,form=full",
    "diff_v2,selective=true,form=light",
    "diff_v2,selective=true,form=light+,window2=3",
    "selective,head_dim=32,qk_dim=16",
    "diff_v2,selective=true,head_dim=32,qk_dim=16",
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


@pytest.mark.parametrize("change", ["window2", "qk_norm", "half_rope"])
def test_the_comparison_has_power(change):
    cfg, attn, ctx = build("diff_v2,selective=true")
    value = 3 if change == "window2" else not getattr(cfg, change)
    with pytest.raises(AssertionError):
        compare("", T.dataclasses.replace(cfg, **{change: value}), attn, ctx, 7)


def row_docs(length: int) -> torch.Tensor:
    rows = ([100, 1, 60, length - 161], [length])
    ids = [torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows]
    return torch.stack(ids).int()


def eager_flex(
    q, k, v, score_mod, block_mask, scale, enable_gqa, return_aux=None, kernel_options=None
):
    """FlexAttention by its definition, with a backward on the CPU, which the real one lacks."""
    assert kernel_options["num_stages"] == 2  # an H100 has no shared memory for three
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


def test_the_running_sum_is_one_operation():
    """Also in a compiled graph, where Inductor would make a scan of its own of it."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=gen).mT.requires_grad_()
    torch.library.opcheck(T.running_sum, (x,))
    weight = torch.randn(x.shape, generator=gen)
    got, want = (
        torch.autograd.grad((f(x) * weight).sum(), x)[0]
        for f in (T.running_sum, lambda x: x.cumsum(-2))
    )
    assert torch.equal(got, want)


COMPILED = ("chunked", "diff_v2,selective=true,window2=30")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", ["flex", "chunked"])
@pytest.mark.parametrize(
    "arm",
    [
        "selective",
        "diff_v2,selective=true,form=full",
        "diff_v2,selective=true,window2=30",
    ],
)
def test_both_gradients_beside_flex(arm, way, compiled, monkeypatch):
    """The path of a GPU, FlexAttention replaced by its definition: in several chunks."""
    if compiled and (shutil.which("g++") is None or (way, arm) != COMPILED):
        pytest.skip("one graph is enough, and compilation needs g++")
    monkeypatch.setattr(T, "flex_attention", eager_flex)
    monkeypatch.setattr(T, "SELECTIVE_CHUNK", 96)
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


# ---- FlexAttention itself, forward --------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
@torch.no_grad()
def test_flex_forward():
    """Compiled, `taken` given: on the CPU Inductor takes only what enters the graph as it is."""
    docs, window = row_docs(256), torch.tensor([90], dtype=torch.int32)
    gen = torch.Generator().manual_seed(0)
    q = T.norm(torch.randn(2, 256, 4, 16, generator=gen))
    k, v = (T.norm(torch.randn(2, 256, 2, 16, generator=gen)) for _ in range(2))

    def context(make):
        return T.Context(make(docs, window), {}, lambda d: 0.3, T.starts_of(docs), docs, window)

    taken = T.selection(q[:, :, 0], k[:, :, 0], context(T.dense_mask))
    torch._dynamo.reset()
    run = torch.compile(T.attend, fullgraph=True, dynamic=False)
    got = run(q, k, v, context(T.block_mask), taken)
    want = T.attend(q, k, v, context(T.dense_mask), taken)
    assert (want - T.attend(q, k, v, context(T.dense_mask))).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


# ---- settings, and what other rooms make of it --------------------------------------------------

FITS = {"row_tokens": 2048, "val_row_tokens": 2048}


@pytest.mark.parametrize(
    "arm, changes, said",
    [
        ("selective", {"row_tokens": 16_384}, "--row-tokens 16384: selective arms keep row x row"),
        ("selective", {"val_row_tokens": 262_144}, "--val-row-tokens 262144: "),
        ("selective", {"val_call_tokens": 2**20}, "--val-call-tokens 1048576: 2147483648 numbers"),
        ("selective", {"val_call_tokens": 2**20}, "; 524288 would do"),
        ("selective", {"val_row_tokens": 1536, "val_call_tokens": 3 * 2**19}, "; 786432 would do"),
        ("selective", {"deterministic": True}, "--deterministic needs chunked"),
        ("diff_v2,selective=true", {"row_tokens": 16_384}, "row x row"),
        ("softmax,selective=true", {}, "has the arm selective"),
        ("diff_v1,selective=true", {}, "has the arm selective"),
        ("selective,selective_grad=atomic", {}, "flex or chunked"),
    ],
)
def test_what_is_refused(arm, changes, said):
    problems = T.check_config(T.make_config("plain", arm=arm, **{**FITS, **changes}))
    assert len(problems) == 1
    assert said in problems[0]
    assert not re.search(r"--\w*_", problems[0])  # flags as the command line has them


@pytest.mark.parametrize("preset", ["r28", "plain"])
@pytest.mark.parametrize(
    "arm, plain", [("selective", "softmax"), ("diff_v2,selective=true", "diff_v2")]
)
def test_what_it_costs(arm, plain, preset):
    """No parameters of its own, and no FLOPs that nobody else has."""
    sizes = []
    for spec in (arm, plain):
        cfg = T.make_config(preset, arm=spec, vocab=50_257, **FITS)
        assert not T.check_config(cfg)
        with torch.device("meta"):
            model = T.GPT(cfg.model, 128)
        sizes.append((T.count_parameters(model)["stored"], T.flops_per_token(model, 900.0, 500.0)))
    assert sizes[0] == sizes[1]


def test_only_the_arms_layers_select():
    cfg = T.make_config("demo", arm="diff_v2,selective=true,layers=1", **A.SMALL)
    arms = [block.attn.arm for block in T.GPT(cfg.model, 64).blocks]
    assert [arm.selective for arm in arms] == [False, True, False, False]


@torch.no_grad()
@pytest.mark.parametrize("arm", ["selective", "diff_v2,selective=true,layers=1"])
def test_look(arm):
    """The maps are what the values are summed with, and the page has the share that was masked."""
    docs = A.documents()[0]
    cfg = T.make_config("demo", arm=arm, **{**A.SMALL, "long_layers": (1,), "value_tables": 0})
    model = T.GPT(cfg.model, LENGTH)
    H.randomise(model)
    seen = {}
    block = model.blocks[1]
    block.attn.arm.register_forward_hook(lambda m, x, y: seen.update(y=y, ctx=x[2]))
    tokens = torch.arange(LENGTH, dtype=torch.int32)
    layers = look.attention_maps(model, tokens, docs, torch.tensor([9, 5], dtype=torch.int32))
    layer, (y, v) = layers[1], seen["y"]
    assert layer.arm == arm.partition(",")[0]
    heads = v[0].transpose(0, 1).repeat_interleave(len(layer.first) // v.size(2), 0)
    sums = (layer.used @ heads).transpose(0, 1).flatten(1)
    torch.testing.assert_close(sums, y[0], atol=2e-5, rtol=1e-4)
    assert layer.masks.shape == (LENGTH, LENGTH)
    hidden = ~A.allowed(docs[None], 9)[0]
    assert (layer.masks[hidden] == 0).all()
    assert (layer.masks[:, T.starts_of(docs[None])[0]] == 0).all()
    assert layer.masks.max() > 0.5
    told = look.described(layer, docs)
    assert told["masks"] is True
    mean = float(layer.masks[(docs[:, None] == docs).tril()].double().mean())
    assert [head["masked"] for head in told["heads"]] == pytest.approx([mean] * len(layer.first))
    values = np.frombuffer(base64.b64decode(look.packed([layer])), "<u2") / look.FULL
    rows, columns = np.tril_indices(LENGTH)
    want = layer.masks.numpy()[rows, columns]
    assert np.abs(values[-len(want) :] - want).max() < 1e-5
    assert (layers[0].masks is None) == ("layers" in arm)
