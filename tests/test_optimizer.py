"""Muon and Adam banks against torch's own, orthogonalisation by its singular values, gradients that
land in the banks, and the seeds of parameters."""

from __future__ import annotations

import functools
import inspect
import shutil

import helpers as H
import pytest
import torch
from torch import nn

T = H.T
KELLER = ((3.4445, -4.775, 2.0315),) * 5  # the constants of torch.optim.Muon
WORLD = T.World(torch.device("cpu"))


class Bag(nn.Module):
    """Parameters of given shapes under one group."""

    def __init__(self, shapes: dict[str, tuple], group: str, views: dict | None = None):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            p = T.parameter(shape, ("zeros",), group, (views or {}).get(name))
            p.data = torch.randn(shape, generator=gen)
            self.register_parameter(name, p)


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(p.shape, generator=gen) for n, p in model.named_parameters()}


def fill(model: nn.Module, step: int) -> None:
    for name, g in gradients(model, step).items():
        H.add_gradient(dict(model.named_parameters())[name], g)


MATRICES = {"square": (32, 32), "square2": (32, 32), "tall": (64, 16), "wide": (16, 48)}


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 3e-2), (torch.float32, 1e-3)])
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_muon_equals_torchs(monkeypatch, wd, dtype, bound):
    """The same coefficients, nesterov, sqrt(max(1, rows / cols)); inside, ours in float16 and
    torch's in bfloat16, whose rounding is what is left (up to 1.6e-2), or both in float32."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(T, "orthogonalize", functools.partial(T.orthogonalize, coefficients=KELLER))
    ours = Bag(MATRICES, "matrix")
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in ours.named_parameters()}
    opt = T.Optimizer(ours, {"matrix": T.Group("muon", 0.05, wd=wd)}, WORLD)
    opt.muon_dtype = dtype
    other = torch.optim.Muon(
        theirs.values(), lr=0.05, weight_decay=wd, momentum=0.9, nesterov=True, ns_steps=5
    )
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    for step in range(6):
        fill(ours, step)
        for name, g in gradients(ours, step).items():
            theirs[name].grad = g
        opt.step(1.0, 0.9)
        other.step()
        for name, p in ours.named_parameters():
            moved = (p - start[name]).norm()
            error = (p - theirs[name]).norm() / moved
            assert error < bound, f"{name} after step {step}: {error:.1e}"
    assert moved > 0.5


def test_muon_equals_torchs_in_float32(monkeypatch):
    """Without bfloat16 on either side the two agree to rounding."""
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    scope = {"torch": torch, "Tensor": torch.Tensor}
    exec(source.replace(".bfloat16()", ".clone()"), scope)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    monkeypatch.setattr(T, "orthogonalize", functools.partial(T.orthogonalize, coefficients=KELLER))
    ours = Bag(MATRICES, "matrix")
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in ours.named_parameters()}
    opt = T.Optimizer(ours, {"matrix": T.Group("muon", 0.05)}, WORLD)
    other = torch.optim.Muon(theirs.values(), lr=0.05, weight_decay=0.0, momentum=0.9)
    for step in range(4):
        fill(ours, step)
        for name, g in gradients(ours, step).items():
            theirs[name].grad = g
        opt.step(1.0, 0.9)
        other.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-5)


SHAPES = {"a": (7,), "b": (3, 5), "c": (130,), "d": (1,), "e": (64, 3)}


@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_adam_equals_torchs(wd):
    """One bank of odd sizes, padding between, a changing lr factor: bit for bit nearly."""
    ours = Bag(SHAPES, "a")
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in ours.named_parameters()}
    group = T.Group("adam", 0.02, (0.8, 0.95), wd, 1e-10)
    opt = T.Optimizer(ours, {"a": group}, WORLD)
    other = torch.optim.AdamW(
        theirs.values(), lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=wd
    )
    for step in range(6):
        fill(ours, step)
        for name, g in gradients(ours, step).items():
            theirs[name].grad = g
        factor = 1.0 - 0.1 * step
        other.param_groups[0]["lr"] = 0.02 * factor
        opt.step(factor, 0.9)
        other.step()
    assert len(opt.banks) == 1
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-7)


def test_gradient_norm_and_clipping():
    ours = Bag(SHAPES, "a")
    opt = T.Optimizer(ours, {"a": T.Group("adam", 0.02)}, WORLD)
    fill(ours, 0)
    whole = torch.cat([g.flatten() for g in gradients(ours, 0).values()]).norm()
    assert opt.step(1.0, 0.9) == pytest.approx(float(whole), rel=1e-5)
    assert all(p.grad is None for p in ours.parameters()), "step clears the gradients"
    matrix = Bag({"m": (8, 8)}, "matrix")
    opt = T.Optimizer(matrix, {"matrix": T.Group("muon", 0.0)}, WORLD)
    opt.clip = 1e-3  # of the loss; gradients are of LOSS_SCALE x loss
    fill(matrix, 0)
    matrix.m.grad.mul_(T.LOSS_SCALE)
    g = matrix.m.grad.clone()
    opt.step(1.0, 0.0)
    torch.testing.assert_close(opt.banks[0].momentum.norm(), torch.tensor(1e-3 * T.LOSS_SCALE))
    torch.testing.assert_close(
        opt.banks[0].momentum.view(8, 8) / opt.banks[0].momentum.norm(), g / g.norm()
    )


# ---- orthogonalisation --------------------------------------------------------------------------


def with_singular_values(rows, cols, seed, smallest=1e-3):
    """A matrix by its SVD; no singular value below `smallest` of its Frobenius norm."""
    gen = torch.Generator().manual_seed(seed)
    n = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, n, generator=gen, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(cols, n, generator=gen, dtype=torch.float64)).Q
    s = torch.exp(torch.rand(n, generator=gen, dtype=torch.float64) * 7 - 7)
    s[0], s[-1] = 1.0, 0.0
    for _ in range(50):  # the floor raises the norm, which raises the floor
        s = s.clamp(min=smallest * s.norm() * 1.0001)
    return (u * s) @ v.T, u, v


@pytest.mark.parametrize(
    "dtype, low, high", [(torch.float32, 0.846, 1.142), (torch.float16, 0.79, 1.18)]
)
@pytest.mark.parametrize("rows, cols", [(48, 48), (96, 32), (32, 96), (128, 128), (16, 64)])
def test_singular_values_in_the_stated_band(rows, cols, dtype, low, high):
    """The five polynomials map [0.001, 1] into [0.847, 1.141]; float16 blurs the smallest ones.
    At any scale of the matrix; directions are kept."""
    made = [with_singular_values(rows, cols, seed) for seed in range(6)]
    batch = torch.stack([m * 10.0 ** (i - 3) for i, (m, _, _) in enumerate(made)]).float()
    out = T.orthogonalize(T.unit(batch, dtype)).double()
    s = torch.linalg.svdvals(out)
    assert s.min() >= low and s.max() <= high, (s.min(), s.max())
    if dtype == torch.float32:
        for y, (_, u, v) in zip(out, made):
            inner = u.T @ y @ v
            off = inner - torch.diag(inner.diag())
            assert off.abs().max() < 2e-2 and inner.diag().min() > 0


@pytest.mark.parametrize("rows, cols", [(64, 64), (64, 256), (256, 64)])
def test_float16_errs_less_than_the_textbook_loop_in_bfloat16(rows, cols):
    """Which it replaced: at most 0.76 of that loop's errors here."""
    mine, theirs = H.muon_errors(rows, cols, torch.device("cpu"))
    assert (mine < 0.8 * theirs).all(), (mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_matrix_gives_zeros(dtype):
    batch = torch.stack([torch.zeros(16, 24), torch.randn(16, 24)])
    out = T.orthogonalize(T.unit(batch, dtype))
    assert (out[0] == 0).all() and torch.isfinite(out).all() and out[1].abs().max() > 0.1


def test_matrices_of_a_batch_do_not_mix():
    gen = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 24, 16, generator=gen)
    one_by_one = torch.cat([T.orthogonalize(T.unit(m[None], torch.float32)) for m in batch])
    torch.testing.assert_close(T.orthogonalize(T.unit(batch, torch.float32)), one_by_one)


@pytest.mark.parametrize("arm, doubled", [("diff_v2", ["q"]), ("diff_v1", ["q", "k"])])
def test_maps_are_orthogonalised_one_by_one(arm, doubled):
    """Scaling one map's gradient must not change the other's update, and a map's update is what
    that half alone would get (the shape factor too)."""
    cfg = T.make_config("demo", arm=arm, vocab=64, n_layer=2, long_layers=(0,), backout=-1)
    model = T.GPT(cfg.model, 16)
    T.init_parameters(model, 0)
    groups = T.parameter_groups(cfg.optim)
    opt = T.Optimizer(model, groups, WORLD)
    gen = torch.Generator().manual_seed(1)
    for name in doubled:
        w = getattr(model.blocks[0].attn.arm, name).weight
        assert w.muon_view == (2, w.size(0) // 2, w.size(1))
        first, second = torch.randn(2, w.size(0) // 2, w.size(1), generator=gen)
        before = w.detach().clone()
        w.grad = torch.cat([first, 1000 * second])
        opt.step(1.0, 0.95)
        rows, cols = first.shape
        rate = groups["matrix"].lr * max(1, rows / cols) ** 0.5
        for half, g in zip((before - w).split(rows), (first, second)):
            want = rate * T.orthogonalize(T.unit(g[None], torch.float32))[0]
            torch.testing.assert_close(half, want, rtol=2e-3, atol=2e-5)


# ---- banks --------------------------------------------------------------------------------------


def small_model(arm="diff_v2", **changes) -> T.GPT:
    base = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0,)}
    base |= {"backout": 0, "vocab": 40, "value_tables": 1, "xsa": arm != "diff_v1"}
    cfg = T.make_config("demo", arm=arm, **{**base, **changes})
    return T.GPT(cfg.model, 32)


def in_bank(p: torch.Tensor, flat: torch.Tensor) -> bool:
    start = p.data_ptr() - flat.data_ptr()
    return 0 <= start and start + 4 * p.numel() <= 4 * flat.numel()


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long), "inductor"]
)
def test_gradients_land_in_the_bank(backend):
    """Once the optimizer has taken them, p.grad are views of the bank with the gradients of all
    backward passes, from before and after."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on the CPU")
    torch._dynamo.reset()
    model = small_model()
    H.randomise(model)
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    opt = T.Optimizer(model, T.parameter_groups(T.OptimConfig()), WORLD)
    run = model
    if backend != "eager":
        run = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    tokens = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0)).int()
    docs, window = torch.ones_like(tokens), torch.tensor([12, 8], dtype=torch.int32)
    weight = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        (run(tokens, docs, window) * weight).sum().backward()
        (twin(tokens, docs, window) * weight).sum().backward()
        if i:  # with two backward passes before, then one into the views
            for bank in opt.banks:
                bank.take()
    slots = {name: b for b in opt.banks for name in b.slots}
    assert set(slots) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        if name == "head":  # its gradient is made by hand
            continue
        assert in_bank(p.grad, slots[name].grad) and in_bank(p.data, slots[name].data), name
        other = dict(twin.named_parameters())[name].grad
        if other is None:
            assert (p.grad == 0).all(), name
            continue
        assert other.abs().max() > 0, name
        torch.testing.assert_close(p.grad, other, rtol=2e-4, atol=2e-4)
    total = sum(float(b.grad.square().sum()) for b in opt.banks)
    want = sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None)
    assert total == pytest.approx(want, rel=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("arm", H.BUILT_IN)
@pytest.mark.parametrize("preset", ["r28", "plain", "demo"])
def test_parameter_groups_cover_every_tag(arm, preset):
    """Every parameter is in exactly one bank; matrices in Muon's, and nothing else."""
    groups = T.parameter_groups(T.OptimConfig())
    cfg = T.make_config(preset, arm=arm, vocab=64, d_model=32, bias=True)
    cfg = cfg.with_(xsa=arm != "diff_v1")
    model = T.GPT(cfg.model, 16)
    tags = {p.group for p in model.parameters()}
    assert tags <= set(groups)
    opt = T.Optimizer(model, groups, WORLD)
    named = [n for b in opt.banks for n in b.slots]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters())
    for bank in opt.banks:
        for name, (_, p) in bank.slots.items():
            is_matrix = name.endswith((".weight",))
            assert (bank.group.kind == "muon") == is_matrix, name
            if is_matrix:
                n, rows, cols = p.muon_view
                assert n * rows * cols == p.numel() and (rows, cols) == bank.matrix


def test_plain_modules_have_groups_too():
    model = small_model(f"{H.ARMS / 'plain_module.py'}:Plain", xsa=False)
    opt = T.Optimizer(model, T.parameter_groups(T.OptimConfig()), WORLD)
    kinds = {n: b.group.kind for b in opt.banks for n in b.slots}
    assert kinds["blocks.0.attn.arm.qkv.weight"] == "muon"
    assert kinds["blocks.0.attn.arm.qkv.bias"] == kinds["blocks.0.attn.arm.norm.weight"] == "adam"


def test_state_dict_round_trip():
    """Two steps, saved, loaded into a fresh model and optimizer: the next steps are equal bits."""
    groups = T.parameter_groups(T.OptimConfig(adam_wd=0.1, matrix_wd=0.1))
    runs = []
    for _ in range(2):
        model = small_model()
        T.init_parameters(model, 5)
        runs.append((model, T.Optimizer(model, groups, WORLD)))
    (model, opt), (fresh, other) = runs
    for step in range(2):
        fill(model, step)
        opt.step(0.5, 0.9)
    state = opt.state_dict()
    assert set(state) == {n for n, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in state[name].items():
            assert key == "step" or value.shape == p.shape, (name, key)
    fresh.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    other.load_state_dict(state)
    for step in range(2, 4):
        fill(model, step)
        fill(fresh, step)
        assert torch.equal(opt.step(1.0, 0.95), other.step(1.0, 0.95))
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert in_bank(b.data, next(k for k in other.banks if name in k.slots).data)


def test_reset_is_a_fresh_optimizer():
    model, fresh = small_model(), small_model()
    T.init_parameters(model, 1)
    T.init_parameters(fresh, 1)
    groups = T.parameter_groups(T.OptimConfig())
    opt, other = T.Optimizer(model, groups, WORLD), T.Optimizer(fresh, groups, WORLD)
    for step in range(2):
        fill(model, step)
        opt.step(1.0, 0.9)
    fill(model, 2)
    opt.reset()
    T.init_parameters(model, 1)
    for step in range(3, 5):
        fill(model, step)
        fill(fresh, step)
        opt.step(1.0, 0.9)
        other.step(1.0, 0.9)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- seeds --------------------------------------------------------------------------------------


def parameters(arm: str, seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    model = small_model(arm, xsa=False, **changes)
    T.init_parameters(model, seed)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_arms_share_the_start_of_what_they_share():
    """Same name and shape: the same bytes, whatever was built or drawn before."""
    by_arm = {}
    for arm in H.BUILT_IN:
        torch.randn(len(by_arm) + 1)  # the global generator must not matter
        by_arm[arm] = parameters(arm)
    for arm in reversed(H.BUILT_IN):
        again = parameters(arm)
        assert all(torch.equal(again[n], p) for n, p in by_arm[arm].items())
    base = by_arm["softmax"]
    for arm, params in by_arm.items():
        shared = [n for n in params if n in base and params[n].shape == base[n].shape]
        for name in shared:
            assert torch.equal(params[name], base[name]), (arm, name)
        wanted = {"embed", "head", "resid", "blocks.0.mlp.up.weight", "blocks.0.attn.o.weight"}
        if arm.endswith(("light", "light+")):  # half as wide an output, and a wider MLP
            wanted -= {"blocks.0.mlp.up.weight", "blocks.0.attn.o.weight"}
        assert wanted <= set(shared), arm


def test_seeds_and_names_give_different_numbers():
    a, b = parameters("softmax", 0), parameters("softmax", 1)
    drawn = [n for n, p in a.items() if p.std() > 0 and p.numel() > 8]
    assert len(drawn) > 8
    for name in drawn:
        assert not torch.equal(a[name], b[name]), name
    values = [a[n].flatten()[:8] for n in drawn]
    for i, x in enumerate(values):
        assert not any(torch.equal(x, y) for y in values[i + 1 :]), drawn[i]


def test_inits_are_what_they_say():
    model = small_model("diff_v1", d_model=256, head_dim=64, vocab=500)
    T.init_parameters(model, 0)
    for name, p in model.named_parameters():
        kind, *args = p.init
        if kind == "zeros":
            assert (p == 0).all(), name
        elif kind == "constant":
            assert (p == args[0]).all(), name
        elif kind in ("normal", "uniform"):
            assert abs(float(p.detach().std()) / args[0] - 1) < 0.15, name
            if kind == "uniform":
                assert p.abs().max() <= 3**0.5 * args[0], name
    assert model.resid[:, 0].unique().tolist() == [pytest.approx(1.1)]


def test_user_modules_keep_what_they_were_built_with():
    model = small_model(f"{H.ARMS / 'plain_module.py'}:Plain", xsa=False)
    before = model.blocks[0].attn.arm.qkv.weight.detach().clone()
    T.init_parameters(model, 0)
    assert torch.equal(model.blocks[0].attn.arm.qkv.weight, before)
