"""The kernels of section 11 against plain PyTorch: on a CPU in Triton's interpreter, which must be
asked for before Triton is imported and so has a process of its own; on a Hopper GPU with
`python -m pytest -m gpu tests/test_kernels.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import helpers as H
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

T = H.T
tl = getattr(T, "tl", None)
CUDA = torch.device("cuda")
CAPS = (30.0, T.SHIFTED_CAP)
REST = torch.tensor(
    [40.0, 1.5]
)  # of 40 candidates that are targets, and others for 4.5 classes each

# What opcheck asks of an op in FP8: its others compare numbers in ways that FP8 does not have.
REGISTERED = ("test_autograd_registration", "test_faketensor")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")


def rand(*shape: int, seed: int = 0, std: float = 1.0, dtype=torch.float32, device="cpu") -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (std * torch.randn(*shape, generator=gen)).to(device, dtype)


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where either has one, which fails every bound."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def mlp_case(rows: int, width: int, d: int, **kind) -> tuple[list[Tensor], Tensor]:
    """([x, up, down], gradient of the output)."""
    inputs = [rand(rows, d, seed=1), rand(width, d, seed=2), rand(d, width, seed=3)]
    inputs[1] *= d**-0.5
    inputs[2] *= width**-0.5
    return [t.to(**kind).requires_grad_() for t in inputs], rand(rows, d, seed=4).to(**kind)


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.relu(x @ up.t()).square() @ down.t()


def with_gradients(call, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def loss_case(rows: int, vocab: int, dtype=torch.bfloat16, device="cpu", known: int | None = None):
    """(logits, targets with some masked, below `known` where that is given)."""
    z = rand(rows, vocab, seed=5, std=8.0, dtype=dtype, device=device)
    gen = torch.Generator().manual_seed(6)
    targets = torch.randint(known or vocab, (rows,), generator=gen)
    targets[torch.rand(rows, generator=gen) < 0.1] = -1
    targets[0], targets[1], targets[2] = -1, 0, (known or vocab) - 1
    return z, targets.to(device)


def copied_case(rows: int, device="cpu") -> Tensor:
    """[rows] log weights of a copy: from next to all of the probability to none of it."""
    copied = rand(rows, seed=7, std=6.0) - 6
    copied[3], copied[4], copied[5] = T.NO_COPY, 20.0, -30.0
    return copied.to(device)


def release(module) -> tuple[int, ...]:
    """(major, minor) of a package's version."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


# ---- in the interpreter -------------------------------------------------------------------------


def test_in_the_interpreter():
    """Runs every test below that is marked `interpreted`."""
    if T.triton is None:
        pytest.skip("Triton is not installed: pip install triton")
    if INTERPRETED:
        pytest.skip("this is that process")
    if release(T.triton) < (3, 7) and release(np) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes arrays for numbers, which NumPy 2.4 refuses")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "interpreted", "-rs"]
    done = subprocess.run(
        [sys.executable, *argv], env=env, cwd=H.ROOT, capture_output=True, text=True, timeout=600
    )
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:]


@interpreted
@pytest.mark.parametrize("rows, width", [(1, 8), (300, 264)])
def test_interpreted_mlp(rows, width):
    """Output and all three gradients; rows and columns that fill no tile."""
    inputs, grad = mlp_case(rows, width, 72)
    got = with_gradients(lambda *t: T.fused_mlp(*t)[0], inputs, grad)
    for g, w in zip(got, with_gradients(plain_mlp, inputs, grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@interpreted
def test_interpreted_mlp_by_other_tiles(monkeypatch):
    tile = T.Tile(32, 64, 16, warps=4, stages=2, programs=1)
    monkeypatch.setattr(T, "UP_TILE", tile)
    monkeypatch.setattr(T, "BACK_TILE", tile)
    test_interpreted_mlp(100, 136)


@interpreted
def test_interpreted_mlp_in_the_model():
    """`MLP` with the kernel is `MLP` without, its weights' gradients included; in a whole graph."""
    cfg = T.make_config("demo", vocab=257).model
    mlp, x = T.MLP(cfg, 0), rand(2, 12, cfg.d_model)
    H.randomise(mlp)
    want = with_gradients(lambda *_: mlp(x), list(mlp.parameters()), torch.ones_like(x))
    mlp.fused = True
    whole = torch.compile(mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    for call in (mlp, whole):
        got = with_gradients(
            lambda *_, call=call: call(x), list(mlp.parameters()), torch.ones_like(x)
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def fp8_case(rows: int, width: int, d: int, device="cpu", times: float = 40.0):
    """`mlp_case` as `mlp_in_fp8` wants it. A unit is `times` as long as the others, and five rows
    of x are along it: relu^2 is there as large as it can be, d, or times^2 d before `unit_rows`."""
    inputs, grad = mlp_case(rows, width, d, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        x, up, down = (t.float() for t in inputs)
        x[:5] = up[3]
        up[3] *= times
        inputs = [T.norm(x), *T.unit_rows(up, down)]
    return [t.to(grad.dtype).requires_grad_() for t in inputs], grad


def test_unit_rows_are_the_same_mlp():
    """Output and gradients, of a unit of no length, too; relu^2 within what e4m3 is to hold."""
    inputs, grad = mlp_case(40, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        inputs[1][5] *= 1e4
        inputs[1][6] = 0
    found = with_gradients(lambda x, *w: plain_mlp(x, *T.unit_rows(*w)), inputs, grad)
    for g, w in zip(found, with_gradients(plain_mlp, inputs, grad), strict=True):
        torch.testing.assert_close(g, w)
    x, (up, _) = T.norm(inputs[0]), T.unit_rows(*inputs[1:])
    x = torch.cat([x, up[:1] * 4])  # a row of x along one of up
    post = torch.relu(x @ up.t()).square()
    assert 15.99 < post.max() < 16.01


@interpreted
def test_interpreted_mlp_in_fp8():
    """Its products are those of the rounded operands, its gradients the other one's."""
    inputs, grad = fp8_case(304, 272, 80)
    x8, up8, down8, down_scale = eights = T.mlp_in_fp8(*inputs)
    assert {t.dtype for t in (x8, up8, down8)} == {T.E4M3}
    for t, scale, of in zip((x8, up8, down8), (80**0.5 / 448, 1 / 448, down_scale), inputs):
        assert error(t.double() * scale, of.detach()) < 0.04
    assert down8.float().abs().max() == 448
    y, post = T.fused_mlp_fp8(*inputs, *eights, False)
    post = post.detach()
    want, exact = T.exact_in_fp8(*eights)
    assert error(post, exact) < 5e-3 and 78 < post.max() < 82
    assert error(y.detach(), want) < 0.06  # the interpreter's cast to FP8 cuts bits off
    plain = plain_mlp(*(t.detach().double() for t in inputs))
    assert error(y[:5].detach(), plain[:5]) < 0.15 and error(y[5:].detach(), plain[5:]) < 0.1
    got = torch.autograd.grad(y, inputs, grad)
    inner = T.mlp_back(grad, inputs[2].detach(), post)
    want = inner @ inputs[1], inner.t() @ inputs[0], grad.t() @ post
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def back_case(rows: int, width: int, d: int, device="cpu"):
    """(inputs of an MLP in bfloat16, the gradient of its output, what `fused_mlp_fp8` takes of the
    inputs). Two rows of the gradient are far smaller and larger than the others, one is zero."""
    inputs, grad = fp8_case(rows, width, d, device, times=1)
    grad[5] *= 1e-5
    grad[6] = 0
    grad[7] *= 100
    return inputs, grad, T.mlp_in_fp8(*inputs)


@interpreted
@pytest.mark.parametrize("tile", [None, T.Tile(32, 64, 16, warps=4, stages=2, programs=1)])
def test_interpreted_mlp_in_fp8_both_ways(monkeypatch, tile):
    """Each gradient is that of the rounded operands, small rows' too; rows and columns that fill no
    tile."""
    if tile is not None:
        monkeypatch.setattr(T, "BACK8_TILE", tile)
    inputs, grad, eights = back_case(304, 272, 80)
    y, post = T.fused_mlp_fp8(*inputs, *eights, True)
    dx, d_up, d_down = torch.autograd.grad(y, inputs, grad)
    x, up, down = (t.detach().float() for t in inputs)
    post = post.detach()
    assert torch.equal(d_down, grad.t() @ post)
    *operands, of_rows = T.gradient_in_fp8(grad, *eights[1:])
    inner, by_rows = T.mlp_back_fp8(*operands, post)
    want = T.exact_back(*operands, post)
    assert error(inner, want[0]) < 5e-3
    assert error(by_rows, want[1]) < 0.12  # the interpreter's cast to FP8 cuts bits off
    assert torch.equal(dx, (by_rows * of_rows).bfloat16())
    assert torch.equal(d_up, inner.t() @ inputs[0])
    exact = grad.float() @ down * 2 * post.float().sqrt()
    for rows, bound in ((slice(None), 0.15), (5, 0.25), (7, 0.25)):
        assert error(inner[rows], exact[rows]) < 0.05
        assert error(dx[rows], (exact @ up)[rows]) < bound
    assert not dx[6].any() and not inner[6].any()


def check_nan_of_fp8_back(device) -> None:
    """What is not finite in a row of the gradient or of post reaches that row of both results."""
    _, grad, eights = back_case(304, 272, 80, device)
    post = rand(304, 272, seed=9, dtype=torch.bfloat16, device=device).square()
    grad[9, 3], grad[10, 4] = float("nan"), float("inf")
    *operands, of_rows = T.gradient_in_fp8(grad, *eights[1:])
    post[11, 5] = float("nan")
    inner, by_rows = T.mlp_back_fp8(*operands, post)
    dx = by_rows * of_rows
    for t in (inner, dx):
        assert not t[[9, 10]].isfinite().any() and t.isfinite().all(1).sum() == 301
    assert inner[11].isnan().sum() == 1 and dx[11].isnan().all()


@interpreted
def test_interpreted_fp8_back_keeps_nan():
    check_nan_of_fp8_back("cpu")


@interpreted
def test_interpreted_mlp_in_fp8_in_the_model():
    """In a whole graph, its weights' gradients included, as without a graph."""
    cfg = T.make_config("demo", vocab=257).model
    mlp, x = T.MLP(cfg, 0), T.norm(rand(2, 16, cfg.d_model)).bfloat16()
    H.randomise(mlp)
    mlp.fused, mlp.fp8 = True, "both"
    found = []
    for call in (mlp, torch.compile(mlp, fullgraph=True, dynamic=False, backend="aot_eager")):
        x.requires_grad_()
        found.append(
            with_gradients(
                lambda *_, call=call: call(x), [x, *mlp.parameters()], torch.ones_like(x)
            )
        )
    for g, w in zip(*found, strict=True):
        assert g.isfinite().all() and g.any() and error(g, w) < 1e-2


@interpreted
def test_interpreted_ops_are_registered(cast_by_bits):
    """torch's own checks: schema, shapes without data, gradient, all of it in a compiled graph."""
    inputs, grad = mlp_case(24, 40, 16)
    opcheck(T.fused_mlp, inputs)
    opcheck(T.mlp_back, (grad, inputs[2].detach(), rand(24, 40).square()))
    inputs, grad, eights = back_case(32, 48, 16)
    for both in (False, True):
        opcheck(T.fused_mlp_fp8, (*inputs, *eights, both), test_utils=REGISTERED)
    *operands, _ = T.gradient_in_fp8(grad, *eights[1:])
    post = rand(32, 48, dtype=torch.bfloat16).square()
    opcheck(T.mlp_back_fp8, (*operands, post), test_utils=REGISTERED)
    for extra in ((None, None), (copied_case(6), None), (None, REST), (copied_case(6), REST)):
        opcheck(T.loss_and_grad, (*loss_case(6, 48), *T.cap_constants(30.0), *extra))


@T.jit
def bits_of(x):
    """fp32 -> the bits of e5m2, to nearest, by way of fp16, whose first half it is."""
    bits = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    return (bits + 127 + ((bits >> 8) & 1)) >> 8


@T.jit
def pair_by_bits(low, high):
    """`pair_of` without the instruction, which the interpreter does not know. (Its own cast to e5m2
    loses the carry where a mantissa rounds up to 2.)"""
    return (bits_of(low) | (bits_of(high) << 8)).to(tl.int16)


@pytest.fixture
def cast_by_bits(monkeypatch):
    monkeypatch.setattr(T, "pair_of", pair_by_bits)


@interpreted
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rest", [None, REST])
@pytest.mark.parametrize(
    "cap, rows, vocab", [*((cap, 6, 48) for cap in CAPS), (CAPS[1], 134, 2096)]
)
def test_interpreted_loss_and_gradient(cast_by_bits, cap, rows, vocab, rest, mixed):
    """Both caps; rows and columns that fill no tile, masked targets, the first and last column;
    with a copy beside the softmax and without, classes that stand for others and none."""
    z, targets = loss_case(rows, vocab, known=None if rest is None else 40)
    extra = copied_case(rows) if mixed else None, rest
    losses, grad, turned = T.loss_and_grad(z, targets, *T.cap_constants(cap), *extra)
    want, exact = T.losses_and_grad(z, targets, cap, *extra)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad.view(torch.uint8).t(), turned.view(torch.uint8))
    rounded = T.to_fp8(exact, T.G8_SCALE, T.E5M2).float()
    torch.testing.assert_close(grad.float(), rounded, rtol=0.26, atol=2e-5)  # one step of e5m2
    off = (grad.float() != rounded).float().mean()
    assert off < 1e-2, "rounding twice, to fp16 first, should decide one in 400"


@interpreted
@pytest.mark.parametrize("tile", [(16, 32, 2, 4, 64), (32, 16, 4, 4, 64), (64, 64, 1, 4, 64)])
def test_interpreted_loss_by_other_tiles(cast_by_bits, monkeypatch, tile):
    """Whole groups of tiles, one that is cut short, and none."""
    monkeypatch.setattr(T, "GRAD_TILE", tile)
    monkeypatch.setattr(T, "ROW_BLOCK", (64, 4))
    test_interpreted_loss_and_gradient(None, 30.0, 134, 144, REST, True)


def plain_fp8_mm(a, b, scale_a, scale_b, out_dtype, fast):
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


@interpreted
def test_interpreted_loss_over_candidates(cast_by_bits, monkeypatch):
    """Two pieces of the head with the kernels and without; 144 candidates are 2.25 tiles."""
    monkeypatch.setattr(T, "fp8_mm", plain_fp8_mm)
    monkeypatch.setattr(T, "HEAD_PIECE", 80)
    h = T.norm(rand(144, 48, dtype=torch.bfloat16))
    weight = rand(512, 48, seed=1, std=0.1)
    gen = torch.Generator().manual_seed(6)
    targets = torch.randint(60, (144,), generator=gen) * 37 % 512
    targets[::7], results = -1, []
    for fused in (False, True):
        head = T.Head(torch.nn.Parameter(weight), 30.0, torch.bfloat16, True, False, fused)
        head.prepare()
        got = head.backward(h, targets, torch.tensor(3.0), 144, 5 * 80)
        results.append((*got, head.weight.grad))
    far = [error(f, p) for p, f in zip(*results, strict=True)]
    assert far[0] < 1e-5 and max(far) < 1e-2, far
    assert (results[1][2].abs().sum(1) > 0).sum() > 144, "two pieces, two sets"


def rows_case(tokens: int, d: int, rows: int, dtype=torch.float32, device="cpu", seed: int = 0):
    """(table, state of it, the other arguments of `row_update`): rows that come once, some times
    and, a quarter of all, one of them."""
    gen = torch.Generator().manual_seed(seed)
    at = torch.randint(rows, (tokens, 2), generator=gen)
    at[torch.rand(tokens, 2, generator=gen) < 0.25] = rows - 1
    at[tokens // 2 :, 0] //= 7
    sign = torch.randint(T.SIGN_ROWS, (tokens, 2), generator=gen)
    seen = torch.randint(9, (rows,), generator=gen, dtype=torch.int32)
    state = torch.rand(rows, generator=gen) * seen, seen, torch.tensor(9, dtype=torch.int32)
    table, grad = rand(rows, d, seed=seed + 1), rand(tokens, d, seed=seed + 2)
    group = T.Group("adam", 1.0, (0.0, 0.95), wd=0.01, cautious_wd=0.5)
    rest = (torch.stack([at, sign], dim=-1).int(), T.random_signs(d), grad.to(dtype))
    rest = (*rest, torch.tensor(0.7))
    table, *moved = (t.to(device) for t in (table.to(dtype), *state, *rest))
    return table, tuple(moved[:3]), (*moved[3:], 0.3), group


def rows_updated(update, table, state, rest, group, bad: bool = False) -> list[Tensor]:
    table, state = table.clone(), tuple(t.clone() for t in state)
    update(table, state, *rest, torch.tensor(bad, device=table.device), group)
    return [table, *state]


@interpreted
@pytest.mark.parametrize(
    "tokens, d, rows, some", [(1, 16, 128, 16), (70, 48, 128, 4), (70, 96, 640, 16)]
)
def test_interpreted_rows(monkeypatch, tokens, d, rows, some):
    """Table, second moments and times against PyTorch; what was not looked up keeps its bits."""
    monkeypatch.setattr(T, "ROWS_AT_ONCE", (some, 4))
    table, state, rest, group = rows_case(tokens, d, rows)
    got, want = (
        rows_updated(f, table, state, rest, group) for f in (T.fused_row_update, T.row_update)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    still = torch.ones(rows, dtype=torch.bool)
    still[rest[0][..., 0].long()] = False
    assert still.any() and (got[2][~still] == 9).all()
    for g, before in zip(got, (table, *state[:2]), strict=False):
        assert torch.equal(g[still], before[still])


@interpreted
def test_interpreted_rows_of_a_bad_step():
    table, state, rest, group = rows_case(40, 48, 128)
    rest[2].fill_(float("nan"))
    for update in (T.fused_row_update, T.row_update):
        got = rows_updated(update, table, state, rest, group, bad=True)
        assert all(map(torch.equal, got, (table, *state)))


# ---- where the kernels do not run ---------------------------------------------------------------


def test_on_by_default_and_nothing_is_said_on_a_cpu(text_data, tmp_path):
    run = T.make_config().run
    assert run.mlp_kernel and run.loss_kernel and run.fp8
    assert not run.mlp_fp8
    off = {"mlp_kernel": False, "loss_kernel": False}
    for run_id, changes in (("on", {}), ("off", off)):
        T.train(H.tiny(text_data, tmp_path, tokens=256 * 2, run_id=run_id, **changes))
        (header,) = H.read_log(tmp_path / run_id, "header")
        assert [header[name] for name in T.KERNELS] == [False] * len(T.KERNELS)
        assert not H.read_log(tmp_path / run_id, "event")
    assert H.losses(tmp_path / "on") == H.losses(tmp_path / "off")


class FakeCuda(T.World):
    """A GPU to who chooses kernels; the kernels' own tests say what they make of it."""

    cuda = True


def reasons(monkeypatch, data, out, *, loss="broken here", **changes) -> dict[str, str]:
    """What is chosen for a Trainer where the probe of the loss kernel says `loss`."""
    monkeypatch.setattr(T, "fp8_works", lambda device: True)
    monkeypatch.setattr(T, "probe_mlp", lambda device: "")
    monkeypatch.setattr(T, "probe_loss", lambda device, mixed: loss)
    trainer = T.Trainer(H.tiny(data, out, **changes))
    trainer.world = FakeCuda(trainer.world.device)
    return T.choose_kernels(trainer.cfg, trainer.world, trainer.model, trainer.dtype)


def test_what_a_gpu_cannot_do_is_kept(monkeypatch, text_data, tmp_path):
    both = {"dtype": "bfloat16", "softcap": 30.0, "fp8": True}
    found = reasons(monkeypatch, text_data, tmp_path, **both)
    assert found == {"fp8": "", "mlp_kernel": "", "loss_kernel": "broken here"}
    found = reasons(monkeypatch, text_data, tmp_path, **both, arm="softmax,mlp=100")
    assert found["mlp_kernel"] == "it wants widths by 8, not [100]"
    found = reasons(monkeypatch, text_data, tmp_path, **both | {"dtype": "float32"})
    assert found["mlp_kernel"] == "it computes in bfloat16, not in torch.float32"
    assert "loss_kernel" not in found  # of an FP8 head
    monkeypatch.setattr(T, "probe_mlp_fp8", lambda device, both: f"broken, too: {both}")
    eight = both | {"mlp_fp8": "forward"}
    for changes, reason in (
        ({}, "broken, too: False"),
        ({"mlp_fp8": "both"}, "broken, too: True"),
        ({"arm": "softmax,mlp=72"}, "it wants widths by 16, not [72]"),
        ({"mlp_kernel": False}, "--mlp-kernel is off"),
        ({"dtype": "float32"}, "it computes in bfloat16, not in torch.float32"),
    ):
        found = reasons(monkeypatch, text_data, tmp_path, **eight | changes)
        assert found["mlp_fp8"] == reason


def test_one_rank_without_fp8_decides_for_all(monkeypatch, text_data, tmp_path):
    """It has not tried the loss of an FP8 head, so no rank uses that kernel."""
    lacks = {"fp8": "no FP8 products here", "mlp_kernel": ""}
    monkeypatch.setattr(FakeCuda, "gather", lambda self, mine: [mine, lacks], raising=False)
    both = {"dtype": "bfloat16", "softcap": 30.0, "fp8": True}
    found = reasons(monkeypatch, text_data, tmp_path, loss="", **both)
    assert found["fp8"] == "no FP8 products here" and found["mlp_kernel"] == ""
    assert found["loss_kernel"] == "a rank lacks what it goes with"


def test_fp8_of_the_mlp_is_named_by_its_ways():
    """A switch of the way forward, in checkpoints and logs of before."""
    flat = T.make_config().flat()
    assert flat["mlp_fp8"] == ""
    for saved, read in ((False, ""), (True, "forward"), ("both", "both")):
        assert T.config_from_flat(flat | {"mlp_fp8": saved}).run.mlp_fp8 == read
    bad = T.check_config(T.make_config().with_(mlp_fp8="true"))
    assert "--mlp-fp8 'true': forward or both" in bad


def test_without_triton(monkeypatch):
    """`pip install torch` on a CPU brings no Triton: the file must still import and run."""
    monkeypatch.setattr(T, "triton", None)
    assert not T.hopper(torch.device("cpu")) and not T.hopper(CUDA)
    code = "import sys; sys.modules['triton'] = None; import train_gpt as T; print(T.triton)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=H.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "None", done.stderr[-2000:]


# ---- the probes ---------------------------------------------------------------------------------


def plain_loss(z, targets, top, shift, width, copied=None, rest=None):
    losses, grad = T.grad_in_fp8(z, targets, (top, shift, width), copied, rest)
    return losses, grad, T.transposed(grad)


def plain_product(a, b, post, tile, out8=None, scale=None):
    if out8 is not None and post is not None:
        out = (a.float() @ b.float().t()) * 2 * post.float().sqrt()
        out8.copy_(T.to_fp8(out, T.INNER8_SCALE, T.E5M2))
        return (out * scale[:, None]).bfloat16()
    if out8 is not None:
        d = a.size(1)
        out = torch.relu(a.float() @ b.float().t() * (d**0.5 / 448**2)).square()
        out8.copy_(T.to_fp8(out, d / 448, T.E4M3))
        return out.bfloat16()
    if post is None:
        return torch.relu(a @ b.t()).square()
    return (a @ b) * (2 * post.sqrt())


def broken(*_):
    raise RuntimeError("out of\nregisters")


@pytest.fixture
def on_cpu(monkeypatch):
    """Plain PyTorch in the kernels' place, on a CPU that passes for a Hopper GPU."""
    monkeypatch.setattr(T, "hopper", lambda device: True)
    monkeypatch.setattr(T, "loss_and_grad", plain_loss)
    monkeypatch.setattr(T, "relu2_product", plain_product)


@pytest.mark.parametrize("fp8", ["forward", "both"])
@pytest.mark.parametrize("times", [1, 30])
def test_gradients_of_an_fp8_mlp_are_of_what_it_computes(on_cpu, fp8, times):
    """Of a unit that is `times` as long as the others, too: what gradients say of its growth is
    what the output does, and none is larger than without FP8. (relu^2 was cut at 448 once, there a
    255th of it, and its gradients were not.)"""
    mlp, x = T.MLP(T.make_config("demo", vocab=257).model, 0), rand(48, 128)
    H.randomise(mlp)
    up, down = mlp.up.weight, mlp.down.weight
    with torch.no_grad():
        up.div_(up.norm(dim=1, keepdim=True))
        x[:9] = up[3] + 0.03 * x[:9]
        up[3] *= times
    inputs = [T.norm(x).bfloat16().requires_grad_(), up, down]
    grad = rand(48, 128, seed=8, dtype=torch.bfloat16)
    grad[:9] = down[:, 3].sign()  # so that what the unit adds does not cancel
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = with_gradients(plain_mlp, exact, grad.double())
    mlp.fused, mlp.fp8 = True, fp8
    found = with_gradients(lambda *_: mlp(inputs[0]), inputs, grad)
    for g, w in zip(found, want, strict=True):
        assert error(g, w) < 0.08 and 0.93 < g.double().norm() / w.norm() < 1.07
    for weight, part, by in ((up, (3,), found[2]), (down, (slice(None), 3), found[3])):
        slope, before, ends = (by * weight.detach())[part].sum(), weight[part].clone(), []
        with torch.no_grad():
            for factor in (1.5, 0.5):
                weight[part] = factor * before
                ends.append(float((mlp(inputs[0]).double() * grad).sum()))
            weight[part] = before
        assert ends[0] - ends[1] == pytest.approx(float(slope), rel=0.05)


def probes() -> dict[str, str]:
    cpu = torch.device("cpu")
    found = {"mlp": T.probe_mlp, "fp8": T.probe_mlp_fp8, "loss": T.probe_loss}
    found = {name: probe.__wrapped__(cpu) for name, probe in found.items()}
    return {**found, "both": T.probe_mlp_fp8.__wrapped__(cpu, True)}


def test_probes_pass_what_is_right(on_cpu):
    assert probes() == {"mlp": "", "fp8": "", "loss": "", "both": ""}
    assert T.probe_loss.__wrapped__(torch.device("cpu"), True) == ""


def test_probes_do_not_raise(on_cpu, monkeypatch):
    monkeypatch.setattr(T, "loss_and_grad", broken)
    monkeypatch.setattr(T, "relu2_product", broken)
    assert set(probes().values()) == {"RuntimeError: out of registers"}


def test_without_a_hopper_gpu_they_say_so():
    assert set(probes().values()) == {T.NO_HOPPER}


@pytest.mark.parametrize("wrong", ["losses", "grad", "turned", "nan"])
def test_the_loss_probe_has_power(on_cpu, monkeypatch, wrong):
    def off(*args):
        losses, grad, turned = plain_loss(*args)
        if wrong == "losses":
            losses = losses * 1.001
        elif wrong == "grad":
            grad = (2 * grad.float()).to(grad.dtype)
            turned = T.transposed(grad)
        elif wrong == "turned":
            turned.view(torch.uint8)[3, 5] ^= 1
        else:
            losses[7] = torch.nan
        return losses, grad, turned

    monkeypatch.setattr(T, "loss_and_grad", off)
    assert probes()["loss"].startswith("computes wrongly on this card")


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_the_mlp_probe_has_power(on_cpu, monkeypatch, wrong):
    def off(a, b, post, *rest):
        out = plain_product(a, b, post, *rest)
        out[-1] = 0 if (post is None) == (wrong == "forward") else out[-1]
        return out

    monkeypatch.setattr(T, "relu2_product", off)
    assert probes()["mlp"].startswith("computes wrongly on this card")
    assert probes()["fp8"].startswith("computes wrongly" if wrong == "forward" else "")
    assert probes()["both"].startswith("computes wrongly on this card")


@pytest.mark.parametrize("back", [False, True])
def test_the_fp8_probe_sees_what_the_second_product_reads(on_cpu, monkeypatch, back):
    def off(a, b, post, tile, out8=None, scale=None):
        out = plain_product(a, b, post, tile, out8, scale)
        if out8 is not None and back == (post is not None):
            out8[5] = 0
        return out

    monkeypatch.setattr(T, "relu2_product", off)
    assert probes()["both"].startswith("computes wrongly on this card")
    assert bool(probes()["fp8"]) != back


def test_the_fp8_probe_sees_a_cut(on_cpu, monkeypatch):
    """Of what the second product reads, at half of the largest e4m3: of one number."""

    def cut(a, b, post, tile, out8=None, scale=None):
        out = plain_product(a, b, post, tile, out8, scale)
        if out8 is not None and post is None:
            assert (out8.float() > 224).sum() == 1
            out8.copy_(out8.float().clamp(max=224).to(T.E4M3))
        return out

    monkeypatch.setattr(T, "relu2_product", cut)
    assert probes()["fp8"].startswith("computes wrongly on this card")


@pytest.mark.parametrize("wrong", ["table", "second", "seen", "raises", ""])
def test_the_probe_of_rows_has_power(monkeypatch, wrong):
    """With PyTorch in the kernel's place, and something off in one row."""

    def off(table, state, *rest):
        if wrong == "raises":
            broken()
        T.row_update(table, state, *rest)
        row = rest[0][0, 0, 0]
        if wrong == "table":
            table[row] *= 1.1
        elif wrong:
            state[wrong == "seen"][row] += 1

    monkeypatch.setattr(T, "triton", True)
    monkeypatch.setattr(T, "fused_row_update", off)
    said = T.probe_rows.__wrapped__(torch.device("cpu"))
    right = {"": "", "raises": "RuntimeError: out of registers"}
    assert said == right[wrong] if wrong in right else said.startswith("computes wrongly")


def test_a_table_has_its_kernel_on_a_gpu(monkeypatch, text_data, tmp_path):
    """Chosen by the probe, with the reason kept where it fails."""
    for reason in ("", "broken here"):
        monkeypatch.setattr(T, "probe_rows", lambda device, reason=reason: reason)
        assert reasons(monkeypatch, text_data, tmp_path, ngram=256)["ngram"] == reason
    assert "ngram" not in reasons(monkeypatch, text_data, tmp_path)


def test_a_model_without_our_mlp_has_no_use_for_the_kernel(on_cpu, text_data, tmp_path):
    """GPT-2's MLP is another, though the kernel would run."""
    from test_gpt2 import TINY, gpt2

    cfg = T.make_config("gpt2", **TINY, data=str(text_data), out=str(tmp_path), run_id="r")
    cfg = cfg.with_(mlp_kernel=True, dtype="bfloat16", tokens=256 * 2)
    T.train(cfg, hooks=gpt2.make_hooks(cfg))
    (header,) = H.read_log(tmp_path / "r", "header")
    assert header["mlp_kernel"] is False and not H.read_log(tmp_path / "r", "event")


def chosen(data: str, out: str, failing: int) -> tuple:
    """On a rank, whose kernel fails on one of them."""
    rank = int(os.environ["RANK"])
    T.probe_mlp = lambda device: "broken here" if rank == failing else ""
    trainer = T.Trainer(H.tiny(data, out, mlp_kernel=True, dtype="bfloat16"))
    fused = {m.fused for m in trainer.model.modules() if isinstance(m, T.MLP)}
    return trainer.kernels, fused


@pytest.mark.parametrize("failing", [1, pytest.param(-1, marks=pytest.mark.long)])
def test_ranks_agree(text_data, tmp_path, failing):
    """A kernel that fails on one rank is used on none."""
    works, found = failing < 0, H.on_ranks(2, chosen, tmp_path, str(text_data), "runs", failing)
    assert found == [({"mlp_kernel": ""} if works else {}, {works})] * 2


# ---- on a GPU -----------------------------------------------------------------------------------

gpu = pytest.mark.gpu
here = pytest.mark.skipif(
    not torch.cuda.is_available() or not T.hopper(CUDA), reason="no GPU here that runs the kernels"
)


@gpu
@here
def test_gpu_says_that_they_work():
    assert T.probe_mlp(CUDA) == T.probe_mlp_fp8(CUDA) == T.probe_loss(CUDA) == ""
    assert T.probe_mlp_fp8(CUDA, True) == ""


@gpu
@here
@pytest.mark.parametrize("rows, width", [(4096, 3072), (1000, 3456), (640, 3648)])
def test_gpu_mlp(rows, width):
    """Against fp64; no further off than today's products in bfloat16 are."""
    inputs, grad = mlp_case(rows, width, 768, device=CUDA, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = with_gradients(plain_mlp, exact, grad.double())
    plain = with_gradients(plain_mlp, inputs, grad)
    fused = with_gradients(lambda *t: T.fused_mlp(*t)[0], inputs, grad)
    far = [(error(f, w), error(p, w)) for f, p, w in zip(fused, plain, want, strict=True)]
    print([f"{f:.1e} {p:.1e}" for f, p in far])
    assert all(f < 1e-2 and f < 1.1 * p + 1e-4 for f, p in far), far


@gpu
@here
def test_gpu_mlp_gives_the_same_bits_again():
    """Loads and stores run beside the products: a race would show sooner or later."""
    inputs, grad = mlp_case(16_384, 3072, 768, device=CUDA, dtype=torch.bfloat16)
    x, up, down = (t.detach() for t in inputs)
    post = T.fused_mlp(x, up, down)[1]
    inner = T.mlp_back(grad, down, post)
    for _ in range(300):
        assert torch.equal(T.relu2_product(x, up, None, T.UP_TILE), post)
        assert torch.equal(T.mlp_back(grad, down, post), inner)


@gpu
@here
@pytest.mark.parametrize("rows, width", [(4096, 3072), (1008, 3456), (640, 3648)])
def test_gpu_mlp_in_fp8(rows, width):
    """On the same FP8 numbers against fp64; from the unrounded ones some 4 % off, also where relu^2
    is as large as it can be; the same bits again."""
    inputs, _ = fp8_case(rows, width, 768, CUDA)
    x, up, down = (t.detach() for t in inputs)
    eights = T.mlp_in_fp8(x, up, down)
    y, post = T.fused_mlp_fp8(x, up, down, *eights, False)
    want, exact = T.exact_in_fp8(*eights)
    far = error(post, exact), error(y, want), error(y, plain_mlp(x, up, down))
    print(" ".join(f"{e:.1e}" for e in far))
    assert far[0] < 0.02 and far[1] < 0.03 and far[2] < 0.06, far
    for _ in range(100):
        again = T.fused_mlp_fp8(x, up, down, *eights, False)
        assert torch.equal(again[0], y) and torch.equal(again[1], post)


@gpu
@here
@pytest.mark.parametrize("rows, width", [(4096, 3072), (1008, 3456), (640, 3648)])
def test_gpu_mlp_in_fp8_both_ways(rows, width):
    """On the same FP8 numbers against fp64; the gradients against those in BF16, by rows, too; the
    same bits again."""
    inputs, grad, eights = back_case(rows, width, 768, CUDA)
    *operands, _ = T.gradient_in_fp8(grad, *eights[1:])
    post = T.fused_mlp(*(t.detach() for t in inputs))[1]
    back = T.mlp_back_fp8(*operands, post)
    far = [error(g, w) for g, w in zip(back, T.exact_back(*operands, post), strict=True)]
    found = with_gradients(lambda *t: T.fused_mlp_fp8(*t, *eights, True)[0], inputs, grad)
    plain = with_gradients(plain_mlp, inputs, grad)
    off = [error(g, w) for g, w in zip(found, plain, strict=True)]
    dx, want = found[1].float(), plain[1].float()
    by_row = ((dx - want).norm(dim=1) / want.norm(dim=1))[[5, 7, *range(8, rows)]]
    print(*(f"{e:.1e}" for e in (*far, *off, by_row.max())))
    assert far[0] < 0.02 and far[1] < 0.04, far
    assert all(e < 0.1 for e in off) and by_row.max() < 0.2 and not dx[6].any(), off
    for _ in range(100):
        again = T.mlp_back_fp8(*operands, post)
        assert all(torch.equal(a, b) for a, b in zip(again, back, strict=True))


@gpu
@here
def test_gpu_fp8_back_keeps_nan():
    check_nan_of_fp8_back(CUDA)


def check_nan_of_mlp(device, dtype) -> None:
    """A NaN in one row of x reaches that row of both outputs and of the gradient, and no other."""
    inputs, grad = mlp_case(300, 264, 72, device=device, dtype=dtype)
    x, up, down = (t.detach() for t in inputs)
    x[7, 3] = float("nan")
    y, post = T.fused_mlp(x, up, down)
    for t in (y, post, T.mlp_back(grad, down, post)):
        assert t[7].isnan().all() and t.isfinite().all(1).sum() == 299
    post[7, 1:] = 0
    back = T.mlp_back(grad, down, post)
    assert back[7].isnan().sum() == 1 and back.isnan().sum() == 1


@interpreted
def test_interpreted_mlp_keeps_nan():
    check_nan_of_mlp("cpu", torch.float32)


@gpu
@here
def test_gpu_mlp_keeps_nan():
    """What is not finite must reach the loss, or no one would notice: a GPU's maximum drops it."""
    check_nan_of_mlp(CUDA, torch.bfloat16)


@gpu
@here
@pytest.mark.parametrize("fp8", ["", "forward", "both"])
def test_gpu_mlp_compiled(fp8):
    """The trainer's way: a whole graph from Inductor, weights in fp32, two shapes of input."""
    torch._dynamo.reset()
    mlp = T.MLP(T.make_config(vocab=50_304).model, 0).to(CUDA)
    mlp.fp8 = fp8
    H.randomise(mlp)
    run = torch.compile(mlp, fullgraph=True, dynamic=False)
    for rows in (2, 3):
        x = rand(rows, 1024, 768, seed=rows, dtype=torch.bfloat16, device=CUDA).requires_grad_()
        grad, inputs = torch.randn_like(x), [x, *mlp.parameters()]
        mlp.fused = False
        want = with_gradients(lambda *_, x=x: mlp(x), inputs, grad)
        mlp.fused = True
        got = with_gradients(lambda *_, x=x: run(x), inputs, grad)
        bound = {"": 1e-2, "forward": 0.06, "both": 0.1}[fp8]
        assert all(error(g, w) < bound for g, w in zip(got, want, strict=True))


@gpu
@here
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("rows, vocab", [(16_384, 50_304), (1026, 50_304), (130, 272)])
@pytest.mark.parametrize("rest", [None, REST])
@pytest.mark.parametrize("mixed", [False, True])
def test_gpu_loss_and_gradient(cap, rows, vocab, mixed, rest):
    z, targets = loss_case(rows, vocab, device=CUDA, known=None if rest is None else 40)
    copied = copied_case(rows, CUDA) if mixed else None
    rest = None if rest is None else rest.to(CUDA)
    losses, grad, turned = T.loss_and_grad(z, targets, *T.cap_constants(cap), copied, rest)
    assert torch.equal(grad.view(torch.uint8).t(), turned.view(torch.uint8))
    some = slice(None, 1026)
    copied = copied[some] if mixed else None
    want, exact = T.losses_and_grad(z[some], targets[some], cap, copied, rest)
    torch.testing.assert_close(losses[some], want, rtol=1e-4, atol=1e-4)
    plain = T.to_fp8(exact, T.G8_SCALE, T.E5M2).float()
    assert (grad[some].float() != plain).float().mean() < 1e-3, "beyond what rounding decides"
    assert error(grad[some].float() * T.G8_SCALE, exact) < 0.1
    masked = targets < 0
    assert (losses[masked] == 0).all() and (grad[masked].float() == 0).all()


@gpu
@here
def test_gpu_loss_keeps_nan():
    """What is not finite must reach the loss and the gradient, or no one would notice."""
    z, targets = loss_case(256, 1024, device=CUDA)
    z[7, 11] = float("nan")
    targets[7] = 3
    losses, grad, turned = T.loss_and_grad(z, targets, *T.cap_constants(30.0))
    assert (
        losses[7].isnan() and grad[7].float().isnan().all() and turned[:, 7].float().isnan().all()
    )
    assert losses.isfinite().sum() == 255 and grad.float().isfinite().sum() == 255 * 1024


@gpu
@here
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("candidates", [0, 24_576])
def test_gpu_head(candidates, mixed):
    """Pieces of the head with the kernels and without: losses, dh, dw; over all classes, over some.
    (A piece of targets drawn evenly has some 14,000 different ones.)"""
    h = T.norm(rand(20_480, 768, dtype=torch.bfloat16, device=CUDA))
    weight = rand(50_304, 768, seed=1, std=0.05, device=CUDA)
    _, targets = loss_case(20_480, 50_304, device=CUDA)
    scale, results = torch.full((), 3.0, device=CUDA), []
    for fused in (False, True):
        head = T.Head(torch.nn.Parameter(weight), 30.0, torch.bfloat16, True, False, fused)
        head.weight.grad = torch.zeros_like(weight)
        head.prepare()
        copied = copied_case(20_480, CUDA) if mixed else None
        got = head.backward(h, targets, scale, candidates, 7 * T.HEAD_PIECE, copied)
        results.append((*got, head.weight.grad))
        assert head.left_out == 0
    far = [error(f, p) for p, f in zip(*results, strict=True)]
    print(far)
    assert far[0] < 1e-5 and max(far) < 5e-3


@gpu
@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_rows(dtype):
    """At the size of a step, against PyTorch and, with a row of 100,000 places, for equal bits."""
    assert T.probe_rows(CUDA) == ""
    case = rows_case(200_000, 768, 1 << 18, dtype, CUDA)
    got, want = (rows_updated(f, *case) for f in (T.fused_row_update, T.row_update))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) < (1e-5 if dtype == torch.float32 else 1e-3)
    for _ in range(20):
        assert all(map(torch.equal, rows_updated(T.fused_row_update, *case), got))
