"""Compiled FlexAttention, forward, on the CPU against the dense path that every other test uses.

Flex has no backward on the CPU (tests/test_gpu.py has it) and refuses inputs that need gradients
even under no_grad. One graph holds several attention shapes, as every graph costs seconds.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU, and there is none"
)

LENGTH = 384  # three blocks
compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def no_recompile():
    """Nothing inside may compile: dynamo raises at a guard that fails, and counts new graphs."""
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert graphs() == before


def docs_of(*rows: list[int]) -> torch.Tensor:
    """Rows of document lengths -> docs [B, T] int32, counted from 1 as the loader does."""
    ids = [torch.repeat_interleave(torch.arange(1, len(r) + 1), torch.tensor(r)) for r in rows]
    return torch.stack(ids).int()


DOCS = {
    "one": docs_of([384], [384]),
    "block edges": docs_of([128, 256], [256, 128]),
    "odd": docs_of([100, 57, 227], [1, 300, 83]),
    "short": docs_of([7] * 54 + [6], [129, 1, 1, 127, 126]),
}
WINDOWS = (1, 100, 128, 129, 200, 384, 1000)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- attention alone ----------------------------------------------------------------------------

# query heads, KV heads, D of q and k, D of v, share of the window that each head has
SHAPES = {
    "plain": (2, 2, 32, 32, (1.0,)),
    "d_qk < d_v, windows by head": (4, 4, 16, 32, (1.0, 0.5, 0.3, 2.0)),
    "GQA, windows by head, d_qk > d_v": (4, 2, 32, 16, (1.0, 0.25, 1.0, 0.25)),
    "GQA, one KV head": (3, 1, 16, 16, (1.0,)),
}


def inputs(seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    gen = torch.Generator().manual_seed(seed)

    def rand(heads, dim):
        return torch.randn(2, LENGTH, heads, dim, generator=gen)

    return [(rand(hq, d), rand(hkv, d), rand(hkv, dv)) for hq, hkv, d, dv, _ in SHAPES.values()]


def head_windows(window: int) -> list[torch.Tensor]:
    return [int32(*(max(1, int(window * s)) for s in shape[-1])) for shape in SHAPES.values()]


def attend_all(make, qkv, docs, by_head):
    out = []
    for (q, k, v), window in zip(qkv, by_head, strict=True):
        ctx = T.Context(make(docs, window), {}, lambda dim: 2 * dim**-0.5)
        out.append(T.attend(q, k, v, ctx))
    return out


dense = functools.partial(attend_all, T.dense_mask)


@pytest.fixture(scope="module")
def flex():
    """One graph of all SHAPES, compiled here, on other inputs than any test's."""
    run = compiled(functools.partial(attend_all, T.block_mask))
    with torch.no_grad():
        run(inputs(1), DOCS["odd"], head_windows(77))
    return run


@torch.no_grad()
@pytest.mark.parametrize("docs", DOCS)
def test_attend(flex, docs):
    """Every window and shape on one graph."""
    for window in WINDOWS:
        by_head, qkv = head_windows(window), inputs()
        with no_recompile():
            got = flex(qkv, DOCS[docs], by_head)
        want = dense(qkv, DOCS[docs], by_head)
        for name, a, b in zip(SHAPES, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_no_stale_mask(flex):
    """The same window tensors and documents, changed in place: the next call must see it."""
    qkv, by_head, docs = inputs(), head_windows(384), DOCS["one"].clone()
    with no_recompile():
        first = flex(qkv, docs, by_head)
        for w in by_head:
            w.fill_(40)
        second = flex(qkv, docs, by_head)
        docs.copy_(DOCS["odd"])
        third = flex(qkv, docs, by_head)
    narrow = head_windows(384)
    for w in narrow:
        w.fill_(40)
    for got, old, want in zip(second, first, dense(qkv, DOCS["one"], narrow), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        assert (got - old).abs().max() > 0.01
    for got, old, want in zip(third, second, dense(qkv, DOCS["odd"], narrow), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        assert (got - old).abs().max() > 0.01


def allowed(mask, head: int) -> torch.Tensor:
    """[B, T, T]: what a block mask lets through: blocks whole, or by element."""
    length = mask.seq_lengths[0]
    batch, n = mask.kv_num_blocks.size(0), length // T.BLOCK
    at = torch.arange(length)
    head = min(head, mask.kv_num_blocks.size(1) - 1)
    out = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        by_element = mask.mask_mod(b, head, at[:, None], at[None, :])
        for i in range(n):
            rows = slice(i * T.BLOCK, (i + 1) * T.BLOCK)
            for number, index, whole in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                for j in index[b, head, i, : number[b, head, i]].tolist():
                    cols = slice(j * T.BLOCK, (j + 1) * T.BLOCK)
                    assert not out[b, rows, cols].any(), "a block is listed twice"
                    out[b, rows, cols] = True if whole else by_element[rows, cols]
    return out


@pytest.mark.parametrize("docs", DOCS)
def test_block_lists(docs):
    """The lists themselves, whatever a kernel makes of them: what is allowed is the dense mask."""
    for window in WINDOWS:
        by_head = int32(window, max(1, window // 3))
        mask, want = T.block_mask(DOCS[docs], by_head), T.dense_mask(DOCS[docs], by_head)
        for head in range(2):
            assert torch.equal(allowed(mask, head), want[:, head]), (window, head)
    whole = T.block_mask(DOCS["one"], int32(1000))
    assert whole.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2], "full blocks are not used"


@torch.no_grad()
@pytest.mark.parametrize("selective", [False, True])
def test_forward_tile(monkeypatch, selective):
    """Where values are wider than queries, in 16 bits, FlexAttention is told a tile; on the CPU,
    too, and there gives what the dense path gives."""
    seen, flex = [], T.flex_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["kernel_options"])
        return flex(*args, **kwargs)

    monkeypatch.setattr(T, "flex_attention", spy)
    gen, window = torch.Generator().manual_seed(0), int32(200)
    q, k, v = (torch.randn(2, LENGTH, 2, d, generator=gen).bfloat16() for d in (64, 64, 128))
    taken = torch.rand(2, LENGTH, LENGTH, generator=gen) if selective else None

    def attend(make, *qkv):
        ctx = T.Context(make(DOCS["odd"], window), {}, lambda dim: 0.1)
        return T.attend(*qkv, ctx, taken)

    narrow = attend(T.block_mask, q, k, v)
    error = narrow.float() - attend(T.dense_mask, *(t.float() for t in (q, k, v)))
    assert error.norm() / narrow.float().norm() < 0.01
    run = compiled(functools.partial(attend, T.block_mask))
    torch.testing.assert_close(run(q, k, v), narrow, rtol=0.02, atol=0.02)
    attend(T.block_mask, q, k, v[..., :64])
    attend(T.block_mask, *(t.float() for t in (q, k, v)))
    stages = {"num_stages": 2} if selective else {}
    tile = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, **stages}
    assert seen == [tile, tile, stages, stages]


# ---- a whole model ------------------------------------------------------------------------------

# Not window2: on the CPU, Inductor (2.13) takes the tensors that a mask captures only as they come
# into the graph, not computed there as `contexts` does. Windows by head stand above, window2 is in
# test_gpu.py.
ARMS = ("softmax", "diff_v1", "diff_v2", "softmax,qk_dim=16,xsa=true")


def small_gpt(arm: str) -> T.GPT:
    cfg = T.make_config("demo", arm=arm, n_layer=2, d_model=64, n_head=2, vocab=96)
    cfg = cfg.with_(long_layers=(1,), backout=0, skip=(), value_tables=1)
    assert not T.check_config(cfg)
    model = T.GPT(cfg.model, LENGTH)
    T.init_parameters(model, 3)
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():  # zero projections and gates would hide attention
            p.add_(0.05 * torch.randn(p.shape, generator=gen))
    return model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_gpt(arm):
    model = small_gpt(arm)
    tokens = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(5)).int()
    run, results = compiled(model), []
    model.flex = True
    run(tokens, DOCS["block edges"], int32(250, 120))
    for docs in ("odd", "short"):
        for window in (int32(256, 128), int32(100, 60)):
            model.flex = True
            with no_recompile():
                got = run(tokens, DOCS[docs], window)
            model.flex = False
            want = model(tokens, DOCS[docs], window)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
            results.append(got)
    assert min((a - results[0]).abs().max() for a in results[1:]) > 0.01
