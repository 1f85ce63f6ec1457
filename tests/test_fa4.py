"""FlashAttention-4's call: on a CPU with plain kernels in its place, and on a Hopper GPU as it is.

The plain kernels take the arguments as the package documents them (cumulative lengths, a window
that counts the tokens to the left), so the CPU tests see everything but the kernels themselves:
`python -m pytest -m gpu tests/test_fa4.py` sees those, where flash-attn-4 is installed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_log, small_gpt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 15.36 / 128


def installed() -> bool:
    try:
        T.fa4_kernels()
    except ImportError:
        return False
    return True


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="no Hopper GPU here"),
    pytest.mark.skipif(HOPPER and not installed(), reason="flash-attn-4 is not installed"),
]

# query heads, KV heads, caps on the window, width of q and k: what FlashAttention-4 serves
SHAPES = {
    "softmax": (6, 6, (T.NO_LIMIT,), 128),
    "softmax, 64": (6, 6, (T.NO_LIMIT,), 64),
    "matched": (12, 3, (T.NO_LIMIT,), 128),
    "full": (12, 6, (T.NO_LIMIT,), 128),
    "matched, 64": (12, 3, (T.NO_LIMIT,), 64),
    "full, 64": (12, 6, (T.NO_LIMIT,), 64),
    "light": (6, 3, (T.NO_LIMIT,), 128),
    "light, 64": (6, 3, (T.NO_LIMIT,), 64),
    "matched, window2": (12, 3, (T.NO_LIMIT, 150), 128),
    "full, window2": (12, 6, (T.NO_LIMIT, 150), 128),
    "light, window2": (6, 3, (T.NO_LIMIT, 150), 128),
    "light, window2, 64": (6, 3, (T.NO_LIMIT, 150), 64),
    "matched, window2, 64": (12, 3, (T.NO_LIMIT, 150), 64),
}
ONE = (1, 1, (T.NO_LIMIT,), 128)


def inputs(shape, docs: Tensor, width: int = 128) -> list[Tensor]:
    """q, k, v and y's gradient, on the CPU: values of `width`, queries and keys in proportion."""
    heads_q, heads_kv, _, dim = shape
    narrow, gen = dim * width // 128, torch.Generator().manual_seed(0)
    heads = ((heads_q, narrow), (heads_kv, narrow), (heads_kv, width), (heads_q, width))
    return [torch.randn(*docs.shape, *head, generator=gen) for head in heads]


# ---- plain kernels ------------------------------------------------------------------------------


def plain_scores(q, k, spans: dict, scale: float) -> Tensor:
    """[H, N, N] fp32, minus infinity where a query does not see a key."""
    assert spans["causal"] and spans["window_size_right"] == 0
    cuts, n = spans["cu_seqlens_q"], q.size(0)
    assert cuts is spans["cu_seqlens_k"] and cuts.dtype == torch.int32
    assert int(cuts[0]) == 0 and int(cuts[-1]) == n and bool((cuts.diff() >= 0).all())
    at = torch.arange(n, dtype=torch.int32)
    document = torch.searchsorted(cuts, at, right=True)
    back = at[:, None] - at
    seen = (back >= 0) & (back <= spans["window_size_left"])
    seen &= document[:, None] == document
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    s = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    return s.masked_fill(~seen, -torch.inf)


def plain_forward(q, k, v, *, softmax_scale, out, lse, **spans):
    s = plain_scores(q, k, spans, softmax_scale)
    v = v.float().repeat_interleave(q.size(1) // v.size(1), dim=1)
    out.copy_(torch.einsum("hqk,khd->qhd", s.softmax(-1), v))
    lse.copy_(s.logsumexp(-1))


def plain_backward(q, k, v, y, dy, lse, *, softmax_scale, dq, dk, dv, **spans):
    group = q.size(1) // k.size(1)
    assert group == 1 or q.size(2) == v.size(2), "the package's backward has no such thing"
    p = torch.exp(plain_scores(q, k, spans, softmax_scale) - lse[..., None])
    many_k, many_v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    dy = dy.float()
    dp = torch.einsum("qhd,khd->hqk", dy, many_v) - (dy * y.float()).sum(-1).t()[..., None]
    ds = p * dp * softmax_scale
    dq.copy_(torch.einsum("hqk,khd->qhd", ds, many_k))
    for out, grad in ((dk, "hqk,qhd->khd"), (dv, "hqk,qhd->khd")):
        full = torch.einsum(grad, *((ds, q.float()) if out is dk else (p, dy)))
        out.copy_(full.unflatten(1, (-1, group)).sum(2))


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(T, "fa4_kernels", lambda: (plain_forward, plain_backward))


# ---- documents ----------------------------------------------------------------------------------


def random_docs(rows: int, length: int, mean: float, seed: int = 0) -> Tensor:
    """docs [B, T] int32 as the loader has them: a row may go on with a document or open one."""
    first = np.random.default_rng(seed).random((rows, length)) < 1 / mean
    return torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int32))


def limits_of(docs: Tensor, long: int, short: int = 1) -> Tensor:
    both = torch.tensor([long, short], dtype=torch.int32)
    return torch.cat([both, T.count_documents(docs.cpu())])


def plain_bounds(docs: Tensor) -> list[int]:
    starts = []
    for row, ids in enumerate(docs.tolist()):
        for i, doc in enumerate(ids):
            if i == 0 or doc != ids[i - 1]:
                starts.append(row * len(ids) + i)
    return starts + [docs.numel()] * (docs.numel() + 1 - len(starts))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.integers(1, 60), st.floats(1, 50), st.integers(0, 2**32 - 1))
def test_bounds(rows, length, mean, seed):
    docs = random_docs(rows, length, mean, seed)
    limits = limits_of(docs, 7)
    bounds = T.document_bounds(docs, limits)
    assert bounds.dtype == torch.int32 and bounds.tolist() == plain_bounds(docs)
    cuts = T.fa4_arguments(bounds, limits, False, T.NO_LIMIT)["cu_seqlens_q"]
    assert int(cuts[-1]) == docs.numel(), "the last document is cut off"


def test_every_token_its_own_document():
    docs = torch.arange(300, dtype=torch.int32)[None]
    assert T.document_bounds(docs, limits_of(docs, 7)).tolist() == list(range(301))


def test_bounds_of_a_real_batch(text_data):
    corpus = T.Corpus.open(str(text_data))
    batch = T.make_batch(T.TokenStream(corpus.splits["train"], corpus.eot), 1000, 8, 512)
    bounds = T.document_bounds(batch.docs, limits_of(batch.docs, 7))
    assert bounds.tolist() == plain_bounds(batch.docs)
    number = int(T.count_documents(batch.docs))
    assert int(bounds[number]) == batch.docs.numel() > int(bounds[number - 1]), "not exact"


def test_too_small_a_limit_stops_the_process():
    docs = random_docs(2, 64, 4)
    limits = limits_of(docs, 7)
    limits[2] -= 1
    with pytest.raises(RuntimeError, match="more documents than limits say"):
        T.document_bounds(docs, limits)


def test_limits_on_the_device_are_no_limits():
    with pytest.raises(AssertionError, match="limits"):
        T.document_bounds(random_docs(2, 64, 4), torch.tensor([7, 7], dtype=torch.int32))


def test_arguments():
    """A window of w tokens counts the query's own; documents come in powers of two."""
    bounds = torch.arange(5001, dtype=torch.int32)
    for documents, want in ((1, 128), (128, 128), (129, 256), (257, 512), (4000, 4096)):
        limits = torch.tensor([1024, 512, documents], dtype=torch.int32)
        got = T.fa4_arguments(bounds, limits, True, 300)
        assert got["window_size_left"] == 299 and got["window_size_right"] == 0 and got["causal"]
        assert len(got["cu_seqlens_q"]) == want + 1
    assert T.fa4_arguments(bounds, limits, True, T.NO_LIMIT)["window_size_left"] == 511
    assert T.fa4_arguments(bounds, limits, False, T.NO_LIMIT)["window_size_left"] == 1023


# ---- against the dense path ---------------------------------------------------------------------


def both_ways(shape, docs: Tensor, window: int, dtype, width=128):
    """({y, dq, dk, dv} by FlashAttention-4, by the dense path in fp32)."""
    (heads_q, _, caps, _), device = shape, docs.device
    *qkv, dy = (t.to(device, dtype) for t in inputs(shape, docs, width))
    limits = limits_of(docs, 9, window)
    spans = T.Documents(T.document_bounds(docs, limits), limits, True, caps)
    by_head = torch.tensor(caps).clamp(max=window).repeat(heads_q // len(caps)).to(device)
    results = []
    for mask, kind in ((spans, dtype), (T.dense_mask(docs, by_head), torch.float32)):
        leaves = [t.to(kind).requires_grad_() for t in qkv]
        y = T.attend(*leaves, T.Context(mask, {}, lambda dim: SCALE))
        grads = torch.autograd.grad(y, leaves, dy.to(kind))
        results.append(dict(zip(("y", "dq", "dk", "dv"), (y.detach(), *grads), strict=True)))
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 37, 200])
def test_attend(plain, shape, window):
    got, want = both_ways(SHAPES[shape], random_docs(2, 96, 30), window, torch.float32, width=16)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-5)


def test_ops_are_registered_right(plain):
    docs = random_docs(2, 40, 10)
    limits, gen = limits_of(docs, 20), torch.Generator().manual_seed(0)
    bounds = T.document_bounds(docs, limits)
    torch.library.opcheck(T.document_bounds, (docs, limits))
    q, k, v = (torch.randn(80, h, 16, generator=gen).requires_grad_() for h in (4, 2, 2))
    rest = (bounds, limits, False, T.NO_LIMIT, 0.2)
    torch.library.opcheck(T.fa4, (q, k, v, *rest))
    y, lse = T.fa4(q, k, v, *rest)
    saved = [t.detach() for t in (q, k, v, y, lse)]
    torch.library.opcheck(T.fa4_backward, (torch.ones_like(y), *saved, *rest))


ARMS = (
    "softmax",
    "diff_v2",
    "diff_v2,form=full",
    "diff_v2,form=light",
    "diff_v2,form=light+",
    "diff_v2,window2=5",
    "diff_v2,form=full,window2=5",
    "diff_v2,form=light,window2=5",
)


def gradients(run, model: T.GPT, tokens: Tensor, docs: Tensor, window) -> list[Tensor]:
    h = run(tokens, docs, window)
    dh = torch.randn(h.shape, generator=torch.Generator().manual_seed(7)).to(h)
    params = [p for n, p in model.named_parameters() if n != "head"]
    return [h.detach(), *torch.autograd.grad(h, params, dh)]


@pytest.mark.parametrize("arm", (*ARMS, *(f"{arm},qk_dim=8" for arm in ARMS)))
def test_model(plain, arm):
    model, docs = small_gpt(arm), random_docs(2, 48, 15)
    tokens = torch.randint(64, docs.shape, generator=torch.Generator().manual_seed(1)).int()
    want = gradients(model, model, tokens, docs, torch.tensor([20, 7], dtype=torch.int32))
    got = gradients(model, model, tokens, docs, T.Limits(limits_of(docs, 20, 7)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_no_new_graph_for_windows_and_documents(plain):
    """Compiled: another window and other documents, more of them than before, take no new graph,
    and are not ignored."""
    torch._dynamo.reset()
    model = small_gpt("diff_v2,form=full,window2=5")
    run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(1)).int()
    before, seen = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    for mean, (long, short) in itertools.product((20, 4), ((40, 20), (9, 3))):
        docs = random_docs(4, 64, mean)
        got = gradients(run, model, tokens, docs, T.Limits(limits_of(docs, long, short)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
        window = torch.tensor([long, short], dtype=torch.int32)
        want = gradients(model, model, tokens, docs, window)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        seen.append(got[0])
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(seen, 2)) > 1e-3


# ---- the trainer --------------------------------------------------------------------------------


def tiny_fa4(data, out, **changes) -> T.Config:
    base = {"device": "auto", "n_head": 1, "head_dim": 128, "attention": "fa4"}
    stages = (T.Stage(0.5, 256, 1.0, (128, 128)), T.Stage(0.5, 512, 1.0, (128, 256)))
    return tiny(data, out, **{**base, "stages": stages, "row_tokens": 64, **changes})


@pytest.mark.skipif(torch.cuda.is_available(), reason="plain kernels are for the CPU")
def test_trainer(plain, monkeypatch, text_data, tmp_path):
    """The same losses as on the dense path, looks and final validation among them."""
    monkeypatch.setattr(T, "probe_fa4", lambda device, shapes: "")
    found, looks = {}, []

    def look(trainer, out):
        """A user's: the model as it is, with windows as any model takes them."""
        docs = random_docs(2, 64, 20)
        window = T.windows(128, trainer.world.device)
        looks.append(trainer.model.logits(docs % 7, docs, window))

    for name in ("fa4", "flex"):
        cfg = tiny_fa4(text_data, tmp_path, attention=name, run_id=name)
        T.train(cfg, hooks=T.Hooks(on_eval=look))
        log = read_log(tmp_path / name)
        assert log[0]["fa4"] is (name == "fa4") and log[0]["config"]["attention"] == name
        keys = ("loss", "dev_loss", "val_loss", "val_loss_ext")
        found[name] = [line[k] for line in log for k in keys if k in line]
    assert len(found["fa4"]) > 8 and len(looks) == 4
    torch.testing.assert_close(looks[1], looks[3], rtol=1e-3, atol=1e-3)
    assert found["fa4"] == pytest.approx(found["flex"], abs=2e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plain kernels are for the CPU")
def test_a_run_goes_on_with_the_attention_that_it_began_with(
    plain, monkeypatch, text_data, tmp_path
):
    monkeypatch.setattr(T, "probe_fa4", lambda device, shapes: "")
    cfg = tiny_fa4(text_data, tmp_path, run_id="it", save_every=2, final_val=False)
    T.train(cfg)
    again = cfg.with_(resume=str(tmp_path / "it"), attention="flex")
    with pytest.raises(T.InputError, match="attention 'fa4', now 'flex'"):
        T.train(again)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plain kernels are for the CPU")
def test_deterministic_runs_on_flex_and_says_so(text_data, tmp_path):
    """In a process of its own: the mode is the whole process's."""
    from helpers import argv_of, run_script

    cfg = tiny_fa4(text_data, tmp_path, deterministic=True, run_id="same", final_val=False)
    done = run_script(argv_of(cfg))
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "same")
    assert log[0]["fa4"] is False
    said = [line["text"] for line in log if line["t"] == "event" and line["kind"] == "fallback"]
    assert len(said) == 1 and said[0].startswith("fa4: its backward adds in any order"), said


REFUSED = {
    "fa3": ({"attention": "fa3"}, "--attention 'fa3': flex or fa4"),
    "v1": ({"arm": "diff_v1"}, "--attention fa4 has no diff_v1: use flex for that arm"),
    "own": ({"arm": "mine.py:Arm"}, "--attention fa4 has no mine.py:Arm: use flex for that arm"),
    "64": ({"head_dim": 64, "n_head": 12}, "--attention fa4: heads of 128, not of --head-dim 64"),
    "qk 32": (
        {"qk_dim": 32},
        "--attention fa4 has no gradients at --qk-dim 32: use flex, or --qk-dim 0",
    ),
    "cpu": ({"device": "cpu"}, "--attention fa4 runs on a GPU, not on --device cpu"),
    "fp32": ({"dtype": "float32"}, "--attention fa4 computes in bfloat16, not in --dtype float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_serve_is_refused(case):
    changes, sentence = REFUSED[case]
    said = T.check_config(T.make_config(**{"attention": "fa4", **changes}))
    assert said == [sentence]


def test_what_it_serves_is_not_refused():
    for arm, dim in itertools.product(ARMS, (0, 64, 128)):
        assert T.check_config(T.make_config(arm=arm, qk_dim=dim, attention="fa4")) == []


def package(monkeypatch, version: str | None, interface=None) -> None:
    """flash-attn-4 as if it were installed in this version; None: as if it were not."""

    def look_up(name: str) -> str:
        assert name == "flash-attn-4"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", look_up)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)


def test_packages(monkeypatch):
    whole = types.SimpleNamespace(_flash_attn_fwd=1, _flash_attn_bwd=2)
    find = T.fa4_kernels.__wrapped__
    package(monkeypatch, None)
    with pytest.raises(ImportError, match=r"needs the package flash-attn-4.*PackageNotFound"):
        find()
    for old in ("4.0.0b9", "4.0.0b35", "4.0.0a1"):
        package(monkeypatch, old, whole)
        with pytest.raises(ImportError, match=f"{T.FA4_OLDEST} or newer .*{old} is too old"):
            find()
    for good in (T.FA4_OLDEST, "4.0.0b112", "4.0.0", "4.1.0"):
        package(monkeypatch, good, whole)
        assert find() == (1, 2)
    package(monkeypatch, "4.1.0", types.SimpleNamespace())
    with pytest.raises(ImportError, match="_flash_attn_fwd"):
        find()


def test_the_tile_of_narrow_heads():
    """Another one where values are wider than 64 and queries are not, and there alone."""
    asked = []

    def tile(*args, **kwargs):
        asked.append((args, kwargs))
        return len(asked)

    interface = types.SimpleNamespace(_tile_size_bwd_sm90=tile)
    T.fit_narrow_heads(interface)
    for i, (dims, want) in enumerate(
        {(64, 128): 96, (32, 128): 96, (64, 64): 64, (128, 128): 128, (96, 128): 96}.items()
    ):
        assert interface._tile_size_bwd_sm90(*dims, False, True, sparse_block_size_q=None) == i + 1
        args = (want, dims[1], False, True)
        assert asked[-1] == (args, {"sparse_block_size_q": None})
    T.fit_narrow_heads(types.SimpleNamespace())  # a version without it


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_hopper_gpu_it_ends_with_2(monkeypatch, text_data, tmp_path):
    with pytest.raises(T.InputError, match=r"--attention fa4: no Hopper GPU.*; use --attention"):
        T.Trainer(tiny_fa4(text_data, tmp_path))


def probed(monkeypatch, kernels, *shapes) -> str:
    """What the probe says on the CPU of these kernels."""
    monkeypatch.setattr(T, "hopper", lambda device: True)
    monkeypatch.setattr(T, "fa4_kernels", kernels)
    return T.probe_fa4.__wrapped__(torch.device("cpu"), shapes)


@pytest.mark.parametrize(
    "shape",
    [
        ONE,
        (2, 2, (T.NO_LIMIT,), 64),
        (4, 2, (T.NO_LIMIT,), 64),
        (4, 2, (T.NO_LIMIT, 150), 128),
        (4, 2, (T.NO_LIMIT, 150), 64),
    ],
)
def test_the_probe_passes_right_kernels(monkeypatch, shape):
    assert probed(monkeypatch, lambda: (plain_forward, plain_backward), shape) == ""


def test_what_the_probe_says_without_them(monkeypatch):
    """Of a card, a package and a model that cannot have the kernels: a reason, no exception."""
    assert T.probe_fa4(torch.device("cpu"), (ONE,)) == T.NO_HOPPER
    package(monkeypatch, None)
    missing = probed(monkeypatch, T.fa4_kernels.__wrapped__, ONE)
    assert missing.startswith("ImportError: it needs the package flash-attn-4")
    assert "attention is not" in probed(monkeypatch, lambda: (plain_forward, plain_backward))


def test_shapes_of_a_model():
    found = T.fa4_shapes(small_gpt("diff_v2,window2=5,layers=1"))
    assert found == ((2, 2, (T.NO_LIMIT,), 16), (4, 1, (T.NO_LIMIT, 5), 16))
    assert T.fa4_shapes(small_gpt("softmax", qk_dim=8)) == ((2, 2, (T.NO_LIMIT,), 8),)
    assert T.fa4_shapes(torch.nn.Linear(2, 2)) == ()


def off_by_one(q, k, v, **spans):
    return plain_forward(q, k, v, **{**spans, "window_size_left": spans["window_size_left"] + 1})


def forgets_documents(q, k, v, **spans):
    cuts = torch.tensor([0, q.size(0)], dtype=torch.int32)
    return plain_forward(q, k, v, **{**spans, "cu_seqlens_q": cuts, "cu_seqlens_k": cuts})


def first_window(q, k, v, **spans):
    """As if the window had been compiled into the kernel."""
    return plain_forward(q, k, v, **{**spans, "window_size_left": 36})


def half_dq(*args, dq, **spans):
    plain_backward(*args, dq=dq, **spans)
    dq.mul_(0.5)


def nan_dv(*args, dv, **spans):
    plain_backward(*args, dv=dv, **spans)
    dv[-1] = torch.nan


@pytest.mark.parametrize("wrong", [off_by_one, forgets_documents, first_window, half_dq, nan_dv])
def test_the_probe_has_power(monkeypatch, wrong):
    pair = (plain_forward, wrong) if wrong in (half_dq, nan_dv) else (wrong, plain_backward)
    said = probed(monkeypatch, lambda: pair, ONE)
    assert said.startswith("computes wrongly on this card")


# ---- on the card --------------------------------------------------------------------------------


def off(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where either has one, which fails every bound."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class TestCard:
    pytestmark = on_hopper

    @pytest.mark.parametrize("mean", [300, 3])
    @pytest.mark.parametrize("window", [1, 128, 200, 896, 4096])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_attend(self, shape, window, mean):
        """Forward and backward in bfloat16 against the dense path in fp32."""
        docs = random_docs(2, 2048, mean).cuda()
        got, want = both_ways(SHAPES[shape], docs, window, torch.bfloat16)
        errors = {name: off(got[name], want[name]) for name in want}
        print(errors)
        for name, e in errors.items():
            if window == 1 and name in ("dq", "dk"):  # one key: no gradient, but rounding's
                scale = float(got["dv"].float().norm())
                assert float(got[name].float().norm()) < 1e-2 * scale
            else:
                assert e < T.FA4_ERROR, f"{name}: {e:.2e}"

    def test_as_the_probe_has_it(self):
        assert T.probe_fa4(torch.device("cuda"), tuple(SHAPES.values())) == ""

    def test_windows_and_documents_build_no_new_kernel(self):
        """Whatever the window, one kernel; above 256 documents another, which the probe builds."""
        assert T.probe_fa4(torch.device("cuda"), tuple(SHAPES.values())) == ""
        caches = [kernel.compile_cache for kernel in T.fa4_kernels()]

        def built() -> list[int]:
            return [len(c.cache if hasattr(c, "cache") else c) for c in caches]

        before = built()
        for window, mean in itertools.product((1, 128, 640, 1792, 16_384), (2000, 200, 20)):
            docs = random_docs(4, 4096, mean).cuda()
            both = both_ways_fast(SHAPES["softmax"], docs, window)
            assert all(bool(t.isfinite().all()) for t in both)
        assert built() == before, "flash-attn-4 compiled inside the clock"

    @pytest.mark.parametrize(
        "shape", ["softmax", "softmax, 64", "light, 64", "full", "matched, window2"]
    )
    def test_races(self, shape):
        """Thousands of launches whose inputs another kernel has just written, where a kernel that
        starts too early reads the ones before (flash-attn-4's pull request 2481): each against the
        first result of these inputs, which was computed with nothing else under way."""
        heads_q, heads_kv, caps, dim = SHAPES[shape]
        docs = random_docs(4, 4096, 600).cuda()
        limits = limits_of(docs, 1024)
        spans = T.Documents(T.document_bounds(docs, limits), limits, False, caps)
        gen = torch.Generator().manual_seed(0)
        ctx = T.Context(spans, {}, lambda dim: SCALE)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen).to("cuda", torch.bfloat16)

        x, maps = rand(4 * 4096, 512), {}
        widths = {"q": heads_q * dim, "k": heads_kv * dim, "v": heads_kv * 128, "dy": heads_q * 128}
        for name, width in widths.items():
            maps[name] = [rand(512, width) / 512**0.5 for _ in range(4)]

        def launch(turn: int, apart: bool) -> list[Tensor]:
            made = {}
            for name, choices in maps.items():
                width = dim if name in "qk" else 128
                made[name] = (x @ choices[turn % 4]).view(*docs.shape, -1, width)
            leaves = [made[n].requires_grad_() for n in "qkv"]
            if apart:
                torch.cuda.synchronize()
            y = T.attend(*leaves, ctx)
            dy = (x @ maps["dy"][turn % 4]).view_as(y)  # the kernel before the backward
            if apart:
                torch.cuda.synchronize()
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        first = [launch(turn, apart=True) for turn in range(4)]
        sizes = [[t.float().norm() for t in result] for result in first]
        worst = torch.zeros(4, device="cuda")
        for turn in range(3000):
            result = launch(turn, apart=False)
            differ = zip(result, first[turn % 4], sizes[turn % 4], strict=True)
            now = torch.stack([(a.float() - b.float()).norm() / s for a, b, s in differ])
            worst = torch.where(now > worst, now, worst)
            worst = torch.where(now.isnan(), torch.inf, worst)
        y, dq, dk, dv = worst.tolist()
        print(f"y {y:.1e}, dq {dq:.1e}, dk {dk:.1e}, dv {dv:.1e}")
        assert y == 0, "the forward pass has one order of its sums"
        assert max(dq, dk, dv) < 5e-4, "rounding of sums in another order is less"

    @pytest.mark.parametrize("documents", [256, 1024])
    @pytest.mark.parametrize("shape", ["softmax", "softmax, 64", "full, window2"])
    def test_in_a_cuda_graph(self, shape, documents):
        """One recording, room for so many documents: a replay takes what lies there now, and gives
        what the kernels give one by one for the number of documents that there are."""
        caps, docs = SHAPES[shape][2], random_docs(4, 4096, 600).cuda()
        *qkv, dy = (t.to("cuda", torch.bfloat16) for t in inputs(SHAPES[shape], docs))
        room = torch.tensor([1024, 512, documents], dtype=torch.int32)

        def both(limits: Tensor) -> list[Tensor]:
            spans = T.Documents(T.document_bounds(docs, limits), limits, False, caps)
            leaves = [t.requires_grad_() for t in qkv]
            y = T.attend(*leaves, T.Context(spans, {}, lambda dim: SCALE))
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        both(room)  # compiles
        kept: list[Tensor] = []
        replay = T.Recorder().record(lambda: kept.extend(both(room)))
        for seed in range(4):
            docs.copy_(random_docs(4, 4096, 600, seed))
            for t in (*qkv, dy):
                t.data.normal_()
            replay()
            want = both(limits_of(docs, 1024, 512))
            errors = [off(a, b) for a, b in zip(kept, want, strict=True)]
            print(errors)
            assert documents > 256 or errors[0] == 0, "the same kernel has one order of its sums"
            assert max(errors) < 5e-4, "rounding of sums in another order is less"

    @pytest.mark.parametrize(
        "arm", ["softmax", "diff_v2,form=full,window2=150", "diff_v2,form=light,qk_dim=64"]
    )
    def test_compiled_model(self, arm):
        """A compiled model: no new graph for windows and documents, and the dense path's result."""
        torch._dynamo.reset()
        model = card_gpt(arm)
        run = torch.compile(model, fullgraph=True, dynamic=False)
        tokens = torch.randint(64, (2, 1024), generator=torch.Generator().manual_seed(1)).int()
        tokens, graphs = tokens.cuda(), None
        for mean, (long, short) in itertools.product((150, 3), ((700, 300), (256, 128))):
            docs = random_docs(2, 1024, mean).cuda()
            model.flex = None
            got = gradients(run, model, tokens, docs, T.Limits(limits_of(docs, long, short)))
            graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            model.flex = False
            window = torch.tensor([long, short], dtype=torch.int32, device="cuda")
            want = gradients(model, model, tokens, docs, window)
            pairs = [(a, b) for a, b in zip(got, want, strict=True) if b.norm() > 0]
            for least, bound in ((256, 0.06), (1, 0.3)):  # errors of few numbers do not average out
                errors = [off(a, b) for a, b in pairs if b.numel() >= least]
                print(f"{least} numbers and more: largest {max(errors):.1e}")
                assert max(errors) < bound


def card_gpt(arm: str) -> T.GPT:
    settings = {"n_layer": 3, "d_model": 256, "n_head": 2, "no_attention": (), "vocab": 64}
    settings |= {"long_layers": (0,), "skip": (), "backout": 1, "value_tables": 1}
    model = T.GPT(T.make_config(arm=arm, **settings).model, 1024, torch.bfloat16)
    T.init_parameters(model, 0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.cuda()


def both_ways_fast(shape, docs: Tensor, window: int) -> list[Tensor]:
    """y and the gradients by FlashAttention-4 alone: T x T would not fit."""
    limits = limits_of(docs, window)
    spans = T.Documents(T.document_bounds(docs, limits), limits, False, shape[2])
    *qkv, dy = (t.to("cuda", torch.bfloat16) for t in inputs(shape, docs))
    leaves = [t.requires_grad_() for t in qkv]
    y = T.attend(*leaves, T.Context(spans, {}, lambda dim: SCALE))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
