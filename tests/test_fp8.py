"""The FP8 head on the CPU, where torch._scaled_mm runs in 2.13: all three products, the layouts it
refuses, and the gradient made by hand against autograd. The real machine's are in test_gpu.py."""

from __future__ import annotations

import helpers as H
import pytest
import torch

T = H.T
E4M3, E5M2 = T.E4M3, T.E5M2
N, D, V = 64, 48, 96  # rows, width, vocabulary
ONE = torch.ones(())


def can_multiply() -> bool:
    try:
        a = torch.ones(16, 32).to(E5M2)
        b = torch.ones(16, 32).to(E4M3).t()
        return bool((T.fp8_mm(a, b, ONE, ONE, torch.float32, False) == 32).all())
    except (RuntimeError, NotImplementedError):
        return False


on_cpu = pytest.mark.skipif(not can_multiply(), reason="torch._scaled_mm does not run on this CPU")


def rand(*shape, seed=0, std=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- casts and the product ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_to_fp8_saturates(dtype):
    """Whatever torch's own cast makes of what is too large: NaN, infinity (e5m2) or the top."""
    top = torch.finfo(dtype).max
    x = torch.tensor([0.0, 1.0, -1.0, top, 2 * top, -1e30, float("inf"), -float("inf")])
    y = T.to_fp8(x, 1.0, dtype).float()
    assert y.tolist() == [0.0, 1.0, -1.0, top, top, -top, top, -top]
    scaled = T.to_fp8(x, 2.0, dtype).float()
    assert scaled[3] == pytest.approx(top / 2, rel=0.07) and scaled[4] == top
    assert T.to_fp8(torch.ones(3, dtype=torch.bfloat16), 0.5, dtype).float().tolist() == [2.0] * 3


@on_cpu
@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_fp8_mm_is_exact_on_fp8_numbers(a_dtype, out):
    """Operands that are FP8 already: nothing but the accumulation and the output may round."""
    a, b = rand(N, D).to(a_dtype), rand(V, D, seed=1).to(E4M3)
    scale_a, scale_b = torch.tensor(0.25), torch.tensor(3.0)
    got = T.fp8_mm(a, b.t(), scale_a, scale_b, out, False)
    want = (a.double() @ b.double().t()) * 0.75
    assert got.dtype == out and got.shape == (N, V)
    assert closeness(got, want) < (1e-6 if out == torch.float32 else 3e-3)


@pytest.mark.parametrize(
    "change",
    ["a dtype", "b dtype", "a layout", "b layout", "M", "K", "N", "scale dtype"],
)
def test_fp8_mm_refuses_what_it_must(change):
    """_scaled_mm takes a row-major B, and K = 60, without a word."""
    a, b = rand(N, D).to(E4M3), rand(V, D).to(E4M3).t()
    scale = ONE
    if change == "a dtype":
        a = a.to(torch.bfloat16)
    elif change == "b dtype":
        b = b.t().to(E5M2).t()
    elif change == "a layout":
        a = a.t().contiguous().t()
    elif change == "b layout":
        b = b.contiguous()
    elif change == "M":
        a = a[:60].contiguous()
    elif change == "K":
        a, b = a[:, :40].contiguous(), b.t()[:, :40].contiguous().t()
    elif change == "N":
        b = b.t()[:90].contiguous().t()
    else:
        scale = scale.double()
    with pytest.raises(AssertionError):
        T.fp8_mm(a, b, scale, scale, torch.float32, False)


def test_the_cpu_does_not_claim_fp8():
    """A run on the CPU never takes the FP8 path by itself."""
    assert T.fp8_works(torch.device("cpu")) is False


def test_fp8_mm_has_a_fake():
    """The custom op is traced with shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a = torch.empty(N, D).to(E4M3)
        b = torch.empty(V, D).to(E4M3).t()
        one = torch.ones(())
        y = T.fp8_mm(a, b, one, one, torch.bfloat16, False)
    assert y.shape == (N, V) and y.dtype == torch.bfloat16


# ---- the loss and its gradient by hand ----------------------------------------------------------


@pytest.mark.parametrize("cap", [30.0, 15.0, 0.0])
@pytest.mark.parametrize("std", [0.5, 8.0])
def test_losses_and_grad_equal_autograd(cap, std):
    z = rand(N, V, std=std).double().float().requires_grad_()
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[::5] = -1  # masked
    exact = z.detach().double().requires_grad_()
    logits = cap * torch.sigmoid(4 * exact / cap) if cap else exact
    loss = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none") * (
        targets >= 0
    )
    (want,) = torch.autograd.grad(loss.sum(), exact)
    got, grad = T.losses_and_grad(z.detach(), targets, cap)
    torch.testing.assert_close(got.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)
    assert (got[::5] == 0).all() and (grad[::5] == 0).all()
    alone = T.token_losses(z.detach(), targets, cap)
    torch.testing.assert_close(alone, got, rtol=1e-6, atol=1e-6)


def test_softcap():
    """Slope 1 at 0, range (0, cap), off at 0; fp32 whatever comes in."""
    z = torch.linspace(-500, 500, 1001, dtype=torch.bfloat16)
    y = T.softcap(z, 30.0)
    assert y.dtype == torch.float32 and y.min() >= 0 and y.max() <= 30
    assert T.softcap(torch.zeros(1), 30.0) == 15
    slope = (T.softcap(torch.tensor([1e-3]), 30.0) - T.softcap(torch.tensor([-1e-3]), 30.0)) / 2e-3
    assert slope.item() == pytest.approx(1, rel=1e-3)
    assert torch.equal(T.softcap(z, 0.0), z.float())


# ---- Head ---------------------------------------------------------------------------------------


def head(fp8: bool, cap: float = 30.0, dtype=torch.float32, vocab=V, dim=D) -> T.Head:
    weight = torch.nn.Parameter(rand(vocab, dim, seed=2, std=0.1))
    weight.grad = torch.zeros_like(weight)
    made = T.Head(weight, cap, dtype, fp8, False)
    made.prepare()
    return made


def rows(n=N, dim=D, dtype=torch.float32):
    """As they reach the head: unit RMS."""
    return T.norm(rand(n, dim, seed=3)).to(dtype)


def by_autograd(weight, h, targets, scale, cap):
    """fp64: losses, d (scale x sum) / dh, / dw."""
    w, x = (t.detach().double().requires_grad_() for t in (weight, h))
    z = x @ w.t()
    logits = cap * torch.sigmoid(4 * z / cap) if cap else z
    losses = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    losses = losses * (targets >= 0)
    dh, dw = torch.autograd.grad(losses.sum() * scale, [x, w])
    return losses.detach(), dh, dw


def some_targets(n=N, vocab=V):
    targets = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(4))
    targets[::7] = -1
    return targets


@pytest.mark.parametrize("cap", [30.0, 0.0])
@pytest.mark.parametrize("piece", [16, 24, 1000])
def test_pieces_equal_autograd_of_the_whole(monkeypatch, cap, piece):
    """Any size of the pieces, a last one that is shorter, gradients added to what is there."""
    monkeypatch.setattr(T, "HEAD_PIECE", piece)
    made, h, targets = head(False, cap), rows(), some_targets()
    made.weight.grad.fill_(0.5)
    losses, dh = made.backward(h, targets, torch.tensor(3.0))
    want, want_dh, want_dw = by_autograd(made.weight, h, targets, 3.0, cap)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dh.double(), want_dh, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.weight.grad.double() - 0.5, want_dw, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(made.losses(h, targets), losses, rtol=1e-5, atol=1e-6)


def test_prepare_follows_the_weight():
    """The cast is of the weight as it is now, once a step."""
    made, h, targets = head(False), rows(), some_targets()
    first = made.backward(h, targets, ONE)[0]
    with torch.no_grad():
        made.weight.mul_(2)
    made.prepare()
    assert not torch.equal(made.backward(h, targets, ONE)[0], first)


@on_cpu
@pytest.mark.parametrize("cap", [30.0, 15.0])
def test_three_fp8_products(cap):
    """Forward, dh and dw in FP8 against float64: e4m3 keeps 3 bits and e5m2 2, so single numbers
    are off by up to 6 and 12 %, sums over many by far less; and there is no bias of size."""
    n, dim, vocab = 256, 128, 512
    made = head(True, cap, torch.bfloat16, vocab, dim)
    h, targets = rows(n, dim, torch.bfloat16), some_targets(n, vocab)
    scale = torch.tensor(T.LOSS_SCALE / n)
    losses, dh = made.backward(h, targets, scale)
    want, want_dh, want_dw = by_autograd(made.weight, h, targets, float(scale), cap)
    assert dh.dtype == torch.bfloat16 and made.weight.grad.dtype == torch.float32
    assert (losses[::7] == 0).all()
    assert closeness(losses, want) < 0.01
    assert abs(float(losses.sum() / want.sum()) - 1) < 2e-3
    for got, exact in ((dh, want_dh), (made.weight.grad, want_dw)):
        assert closeness(got, exact) < 0.09
        size = float((got.double() * exact).sum() / (exact * exact).sum())
        assert abs(size - 1) < 0.02, "a wrong scale would show here"
    # Against the same FP8 operands multiplied exactly, only BF16 outputs and rounding are left.
    x_scale = dim**0.5 / 448
    x8 = T.to_fp8(h, x_scale, E4M3).double() * x_scale
    w8 = T.to_fp8(made.weight.detach(), T.W8_SCALE, E4M3).double() * T.W8_SCALE
    assert closeness(losses, by_autograd(w8, x8, targets, 1.0, cap)[0]) < 2e-3


@on_cpu
def test_fp8_close_to_bf16_head():
    """The yardstick of what FP8 costs: the BF16 head's own distance from float64 is smaller, and
    the FP8 loss still is within 0.5 % in every token of a trained-like head."""
    made, plain = head(True, 30.0, torch.bfloat16), head(False, 30.0, torch.bfloat16)
    h, targets = rows(dtype=torch.bfloat16), some_targets()
    a, b = (m.backward(h, targets, ONE)[0] for m in (made, plain))
    keep = targets >= 0
    assert ((a - b).abs()[keep] / b[keep]).max() < 0.05
    assert closeness(a, b) < 0.01


@on_cpu
def test_pieces_of_the_fp8_head(monkeypatch):
    made, h, targets = head(True, 30.0, torch.bfloat16), rows(dtype=torch.bfloat16), some_targets()
    whole = made.backward(h, targets, ONE)
    whole_dw = made.weight.grad.clone()
    monkeypatch.setattr(T, "HEAD_PIECE", 16)
    made.weight.grad.zero_()
    parts = made.backward(h, targets, ONE)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    torch.testing.assert_close(made.weight.grad, whole_dw, rtol=1e-5, atol=1e-6)


@on_cpu
def test_scales_have_room():
    """What the fixed scales promise: unit-RMS rows and weights up to 0.875 do not saturate, and a
    token's largest gradient and the smallest that counts (of 1 / vocabulary) are both there."""
    worst = torch.zeros(1, D)
    worst[0, 0] = D**0.5  # all of a unit-RMS row in one place
    x_scale = D**0.5 / 448
    assert T.to_fp8(worst, x_scale, E4M3).float().max() * x_scale == pytest.approx(D**0.5)
    assert T.to_fp8(torch.tensor([0.875]), T.W8_SCALE, E4M3).float() * T.W8_SCALE == 0.875
    for g in (1.0, 1 / 50_304, 7e-9):
        back = T.to_fp8(torch.tensor([g]), T.G8_SCALE, E5M2).float() * T.G8_SCALE
        assert float(back) == pytest.approx(g, rel=0.13)
