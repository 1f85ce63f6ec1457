"""Selective attention on a GPU: `python -m pytest -m gpu tests/test_gpu_selective.py`.

FlexAttention with what is taken as a bias, compiled, forward and both ways to its gradient, against
the dense path in fp32; a Trainer that steps without a recompile, and the same bits again. Bounds
are wider than test_gpu's: what is taken are sums of many scores, of which bfloat16 rounds each, and
they stand in an exponent.
"""

from __future__ import annotations

import functools

import helpers as H
import pytest
import test_gpu as G
import torch
from test_gpu import T, exact_references  # noqa: F401 - a fixture

pytestmark = G.pytestmark
FORWARD, BACKWARD, FEW = 4e-2, 8e-2, 1.5e-1
ARMS = (
    "selective",
    "selective,qk_dim=64",
    "diff_v2,selective=true",
    "diff_v2,selective=true,form=full,window2=150",
)
WAYS = ("flex", "chunked")


@pytest.fixture(scope="module")
def errors_of():
    """{way: {(arm, window): {tensor: (error of Flex, of the dense path)}}}, made when asked for."""
    made = {}

    def errors(way: str) -> dict:
        if way not in made:
            torch._dynamo.reset()
            wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
            arms = {f"{arm},selective_grad={way}": {} for arm in ARMS}
            made[way] = G.compare_arms(arms, wrap=wrap)
        return made[way]

    return errors


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("way", WAYS)
def test_arm(errors_of, way, arm):
    """Output and every gradient: within the bound, and at most three times as far off as the dense
    path in bfloat16, which rounds what is taken, too."""
    for span in G.SPANS:
        found = errors_of(way)[f"{arm},selective_grad={way}", span]
        print({name: f"{flex:.1e} {dense:.1e}" for name, (flex, dense) in found.items()})
        for name, (flex, dense) in found.items():
            bound = FEW if name[0] == "~" else FORWARD if name == "out" else BACKWARD
            assert flex <= bound, f"{name}: {flex:.2e} from fp32, allowed {bound:.0e}"
            assert flex <= 3 * max(dense, G.ROUNDING), f"{name}: {flex:.2e}, dense {dense:.2e}"


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_what_is_taken(way):
    """Through what is taken alone, in fp32: nothing but the order of sums is left to differ."""
    batch, length, heads, dim = 2, 512, 4, 64
    docs, window = G.random_docs(batch, length, 200).to(G.DEVICE), G.int32(300)
    gen = torch.Generator().manual_seed(0)
    rand = functools.partial(torch.randn, batch, length, generator=gen)
    q, k, v, seed = (T.norm(rand(n, dim)).to(G.DEVICE) for n in (heads, 2, 2, heads))
    taken = torch.rand(batch, length, length, generator=gen).to(G.DEVICE).requires_grad_()

    def gradient(make, call):
        ctx = T.Context(make(docs, window), {}, lambda d: 0.12, T.starts_of(docs), docs, window)
        return torch.autograd.grad(call(q, k, v, ctx, taken, way == "chunked"), taken, seed)[0]

    torch._dynamo.reset()
    flex = torch.compile(T.attend, fullgraph=True, dynamic=False)
    got, want = gradient(T.block_mask, flex), gradient(T.dense_mask, T.attend)
    assert G.error(got, want) < 5e-3
    unseen = ~T.dense_mask(docs, window)[:, 0]
    assert (got[unseen] == 0).all()


@pytest.mark.parametrize("arm", ["selective", "diff_v2,selective=true"])
@pytest.mark.parametrize("way", WAYS)
def test_trainer_steps(tmp_path, arm, way):
    """Two batch sizes and growing windows: one graph each, finite losses that fall."""
    cfg = small(tmp_path, f"{arm},selective_grad={way}", run_id="r")
    torch._dynamo.reset()
    trainer = T.Trainer(cfg)
    trainer.warm_up()
    with G.no_recompile():
        trainer.run()
    losses = H.losses(tmp_path / "out" / "r")
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("arm", ["selective", "diff_v2,selective=true"])
def test_deterministic(tmp_path, arm):
    """In processes of their own, as the mode is a whole process's: twice the same losses."""
    runs = []
    for run_id in ("one", "two"):
        spec = f"{arm},selective_grad=chunked"
        cfg = small(tmp_path, spec, run_id=run_id, deterministic=True, final_val=False)
        done = H.run_script(H.argv_of(cfg), timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(H.losses(tmp_path / "out" / run_id))
    assert runs[0] == runs[1] and len(runs[0]) > 8


def small(folder, arm: str, **changes) -> T.Config:
    """A run of two batch sizes and growing windows on FOLDER/text."""
    if not (folder / "text").exists():
        H.write_text_corpus(folder / "text")
    stages = (T.Stage(0.5, 8192, 1.0, (128, 256)), T.Stage(0.5, 16_384, 1.0, (256, 512)))
    shape = {"n_layer": 4, "n_head": 4, "head_dim": 64, "d_model": 256, "no_attention": ()}
    shape |= {"long_layers": (0, 3), "skip": (), "backout": -1, "passes": 4}
    rows = {"row_tokens": 1024, "val_row_tokens": 1024, "val_call_tokens": 8192}
    where = {"data": str(folder / "text"), "out": str(folder / "out")}
    cfg = T.make_config("plain", arm=arm, **where).with_(**shape, **rows, stages=stages)
    return cfg.with_(tokens=12_288 * 16, looks=1, save_final=False, **changes)
