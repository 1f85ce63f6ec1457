"""What only a GPU can show: `python -m pytest -m gpu tests/test_gpu.py`, minutes on an H100.

FlexAttention against the dense path, forward and backward; the FP8 head; a whole Trainer without
a recompile. Compilation is nearly all of the time, so cases share graphs (a graph's kernels
compile in parallel) and a fixture runs a graph once for all the tests that read it.
`python tests/gpu_report.py` runs this file and writes records/gpu-tests.json.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
from pathlib import Path

import helpers as H
import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD, BACKWARD = 1e-2, 2e-2  # largest ||got - reference|| / ||reference|| in bfloat16
FEW = 6e-2  # for gradients that sum all tokens into a few numbers: their errors do not average out
ROUNDING = 2e-3  # one rounding to bfloat16 is 1.7e-3 in that norm


@pytest.fixture(scope="module", autouse=True)
def exact_references():
    """fp32 products in fp32, not TF32; the compiler as in a run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    T.configure_compiler(torch.device("cuda"))
    yield
    torch.set_float32_matmul_precision(before)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def no_recompile():
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert graphs() == before


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where either has one, which fails every bound."""
    length = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    return float(length(got.float() - want.float()) / length(want.float()))


def random_docs(batch: int, length: int, mean: int, seed: int = 0) -> Tensor:
    """docs [B, T] int32: geometric lengths, so that edges fall anywhere in a block; row 0 also has
    an edge between blocks."""
    first = np.random.default_rng(seed).random((batch, length)) < 1 / mean
    first[:, 0] = first[0, length // 2] = True
    return torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int32))


def int32(*values: int, device: str = DEVICE) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run_with_grad(call, inputs: dict[str, Tensor], seeds: list[Tensor]) -> dict[str, Tensor]:
    """{out.i: outputs, name: gradient of sum(out_i x seed_i) for each input}."""
    outs = call()
    seeds = [s.to(o) for s, o in zip(seeds, outs, strict=True)]
    grads = torch.autograd.grad(outs, list(inputs.values()), seeds)
    named = {f"out.{i}": o.detach() for i, o in enumerate(outs)}
    return named | dict(zip(inputs, grads, strict=True))


SPANS = (200, 700)  # windows: token-exact, no multiples of a block
DRAWS = 4  # of the outputs' gradients: a scalar's gradient may all but cancel for one of them


def check_errors(errors: dict[str, tuple[float, float]]) -> None:
    """Flex within the bound, and at most twice as far off as the dense path in bfloat16 (or as two
    roundings, where the dense path computes in fp32 inside)."""
    print({k: f"{flex:.1e} {dense:.1e}" for k, (flex, dense) in errors.items()})
    for name, (flex, dense) in errors.items():
        bound = FEW if name[0] == "~" else FORWARD if name == "out" else BACKWARD
        assert flex <= bound, f"{name}: {flex:.2e} from fp32, allowed {bound:.0e}"
        most = bound if name[0] == "~" else 2 * max(dense, ROUNDING)
        assert flex <= most, f"{name}: {flex:.2e} from fp32, the dense path only {dense:.2e}"


# ---- attention arms, whole: projections, QK norm, RoPE, mixing, gate, output projection ---------

ARMS = {
    "softmax": {},
    "diff_v1": {},
    "diff_v2": {},
    "diff_v2,form=full": {},
    "diff_v2,form=light": {},
    "diff_v2,form=light+": {},
    "diff_v2,window2=150": {},
    "softmax, paired": {"paired": (0,)},
    "softmax, narrow": {"qk_dim": 64, "xsa": True},
    "softmax, narrow, paired": {"qk_dim": 64, "paired": (0,)},
    "diff_v2,form=full, narrow": {"qk_dim": 64},
    "softmax, 64": {"n_head": 12, "head_dim": 64, "xsa": True},
    "diff_v2,form=light,window2=150, 64": {"n_head": 12, "head_dim": 64},
}


class Holder(nn.Module):
    """A block that is attention alone."""

    def __init__(self, attn: T.Attention):
        super().__init__()
        self.attn = attn


class Layers(T.GPT):
    """A layer of attention for each arm, side by side; masks, RoPE and scale are GPT's own."""

    def __init__(self, arms: dict[str, dict], length: int):
        nn.Module.__init__(self)
        make = functools.partial(T.make_config, n_layer=2, no_attention=(), value_tables=1)
        cfgs = [make(arm=name.split(", ")[0], **changes).model for name, changes in arms.items()]
        self.blocks = nn.ModuleList(Holder(T.Attention(cfg, 0)) for cfg in cfgs)
        paired = tuple(i for i, changes in enumerate(arms.values()) if "paired" in changes)
        self.cfg = make(long_layers=tuple(range(len(arms))), paired=paired).model
        self.flex = True
        self.register_rope(2 * length)  # of head dims 64 and 128; paired heads have longer rows
        T.init_parameters(self, 0)
        gen = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in self.named_parameters():  # zero projections and gates would hide things
                std = 0.03 if p.ndim == 2 else 0.3
                p.add_(std * torch.randn(p.shape, generator=gen))
                if name.endswith("weight"):  # exact in bfloat16, as the reference is of attention
                    p.copy_(p.bfloat16())

    def forward(self, xs: list[Tensor], ves: list[Tensor], docs: Tensor, window: Tensor):
        parts = zip(self.blocks, xs, ves, self.contexts(docs, window), strict=True)
        return [block.attn(x, ve, ctx) for block, x, ve, ctx in parts]


def compare_arms(arms: dict[str, dict], batch=2, length=1024, mean=400, device=DEVICE, wrap=None):
    """{(arm, window): {tensor: (error of Flex, of the dense path)}}, all parameters and inputs; a
    gradient's is that of all draws together."""
    layers = Layers(arms, length).to(device)
    compiled = wrap(layers) if wrap else layers
    docs, gen = random_docs(batch, length, mean).to(device), torch.Generator().manual_seed(4)

    def rand(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=gen).to(device)

    d = layers.blocks[0].attn.o.weight.size(0)
    xs = [T.norm(rand(d)).bfloat16().requires_grad_() for _ in arms]
    ves = [rand(b.attn.arm.kv_width).bfloat16().requires_grad_() for b in layers.blocks]
    draws = [[rand(d).bfloat16() for _ in arms] for _ in range(DRAWS)]
    params = {
        n.removeprefix("blocks.").replace(".attn.", "."): p for n, p in layers.named_parameters()
    }
    few = {n for n, p in params.items() if p.numel() < 32}
    few |= {f"{i}.arm.lam" for i, arm in enumerate(arms) if arm == "diff_v1"}  # one scalar's

    def leaves(xs, ves):
        named = {f"{i}.x": x for i, x in enumerate(xs)} | {f"{i}.ve": v for i, v in enumerate(ves)}
        return named | params

    def run(call, xs, ves, flex, window):
        layers.flex = flex
        inputs = leaves(xs, ves)
        each = [run_with_grad(lambda: call(xs, ves, docs, window), inputs, s) for s in draws]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    exact = [[t.detach().float().requires_grad_() for t in ts] for ts in (xs, ves)]
    result = {}
    for number, span in enumerate(SPANS):
        window = int32(span, 1, device=device)
        with no_recompile() if number else contextlib.nullcontext():
            flex = run(compiled, xs, ves, wrap is not None, window)
        low = run(layers, xs, ves, False, window)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = run(layers, *exact, False, window)
        for i, arm in enumerate(arms):
            names = {f"out.{i}": "out"}
            mine = [k for k in want if k.startswith(f"{i}.")]
            names |= {k: "~" * (k in few) + k.partition(".")[2] for k in mine}
            result[arm, span] = {
                short: (error(flex[k], want[k]), error(low[k], want[k]))
                for k, short in names.items()
            }
    return result


@pytest.fixture(scope="module")
def arm_errors():
    wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return compare_arms(ARMS, wrap=wrap)


@pytest.mark.parametrize("arm", ARMS)
def test_arm(arm_errors, arm):
    """An arm's layer, compiled on Flex, against fp32 on the dense path: output, every gradient."""
    for span in SPANS:
        check_errors(arm_errors[arm, span])


# ---- the FP8 head -------------------------------------------------------------------------------

VOCAB, PIECE, WIDTH = 50_304, 16_384, 768
# Of e4m3 x e4m3 and e5m2 x e4m3 products against fp32 ones. Rounding to e4m3 (3 bits) is 2.6e-2 in
# this norm, to e5m2 (2 bits) 5.2e-2; the gradient carries the logits' error besides.
LOGITS, GRADIENT = 4.5e-2, 6e-2
PRODUCT = 5e-3  # of one product against fp32 on the same FP8 operands: accumulation and bfloat16


def head_inputs(std: float, rows=PIECE, vocab=VOCAB, width=WIDTH, device=DEVICE):
    """h with unit RMS as the final norm makes it, bfloat16; w; targets, some without a loss."""
    gen = torch.Generator().manual_seed(6)
    h = T.norm(torch.randn(rows, width, generator=gen)).bfloat16()
    w = std * torch.randn(vocab, width, generator=gen)
    targets = torch.randint(vocab, (rows,), generator=gen)
    targets[torch.rand(rows, generator=gen) < 0.03] = -1
    return h.to(device), w.to(device), targets.to(device)


def fp32_head(h, w, targets, scale, cap=30.0, rest=None):
    """(logits, losses, dh, dw) of scale x sum of losses, all in fp32."""
    z = h.float() @ w.t()
    losses, g = T.losses_and_grad(z, targets, cap, rest=rest)
    g *= scale
    return z, losses, g @ w, g.t() @ h.float()


def fp8_products(h, w, targets, scale, monkeypatch):
    """The head's own three products, as it asks for them: [(output, error against fp32 on the same
    operands)]; and (losses, dh, dw)."""
    real, seen = T.fp8_mm, []

    def checked(a, b, scale_a, scale_b, *rest):
        out = real(a, b, scale_a, scale_b, *rest)
        want = (a.float() * scale_a) @ (b.float() * scale_b)
        seen.append((out, error(out, want)))
        return out

    head = T.Head(nn.Parameter(w), 30.0, torch.bfloat16, True, False)
    head.weight.grad = torch.zeros_like(w)
    with monkeypatch.context() as patch:
        patch.setattr(T, "fp8_mm", checked)
        head.prepare()
        losses, dh = head.backward(h, targets, scale)
    return seen, (losses, dh, head.weight.grad)


def scale_of(targets: Tensor) -> Tensor:
    return torch.full((), T.LOSS_SCALE / targets.numel(), device=targets.device)


needs_fp8 = pytest.mark.skipif(
    not T.fp8_works(torch.device(DEVICE)), reason="this GPU does not multiply FP8"
)


@needs_fp8
@pytest.mark.parametrize("std", [0.02, 0.05, 0.1])
def test_fp8_products(std, monkeypatch):
    """Logits, dh and dw, each against fp32; and each product against its own operands."""
    h, w, targets = head_inputs(std)
    scale = scale_of(targets)
    seen, (losses, dh, dw) = fp8_products(h, w, targets, scale, monkeypatch)
    z, want_losses, want_dh, want_dw = fp32_head(h, w, targets, scale)
    assert len(seen) == 3
    far = {"logits": error(seen[0][0], z), "dh": error(dh, want_dh), "dw": error(dw, want_dw)}
    far["losses"] = error(losses, want_losses)
    print(far, [e for _, e in seen])
    assert max(e for _, e in seen) <= PRODUCT
    assert far["logits"] <= LOGITS
    assert far["dh"] <= GRADIENT and far["dw"] <= GRADIENT
    assert far["losses"] <= 1e-2
    assert abs(losses.sum() / want_losses.sum() - 1) <= 2e-3
    assert (losses[targets < 0] == 0).all() and (dh[targets < 0] == 0).all()


@needs_fp8
def test_fp8_saturates(monkeypatch):
    """Far outside the range of the scales: clamped, never NaN or infinite."""
    h, w, targets = head_inputs(0.05)
    h[: PIECE // 2] *= 100
    w[:1000] *= 1000
    _, got = fp8_products(h, w, targets, 1e4 * scale_of(targets), monkeypatch)
    assert all(torch.isfinite(t).all() for t in got)


@needs_fp8
def test_fp8_compiled():
    """The graph that trains: two pieces, weights changed between two steps, no second graph."""
    h, w, targets = head_inputs(0.05)
    h, targets = torch.cat([h, h.flip(0)]), torch.cat([targets, targets.flip(0)])
    scale = scale_of(targets)
    head = T.Head(nn.Parameter(w), 30.0, torch.bfloat16, True, True)
    head.weight.grad = torch.zeros_like(w)
    head.prepare()
    head.backward(h, targets, scale)  # compiles
    with torch.no_grad():
        head.weight.mul_(1.5)
    head.weight.grad.zero_()
    with no_recompile():
        head.prepare()
        losses, dh = head.backward(h, targets, scale)
    _, want_losses, want_dh, half = fp32_head(h[:PIECE], head.weight.data, targets[:PIECE], scale)
    assert error(losses[:PIECE], want_losses) <= 1e-2
    assert error(dh[:PIECE], want_dh) <= GRADIENT
    assert error(dh[PIECE:].flip(0), want_dh) <= GRADIENT
    assert error(head.weight.grad, 2 * half) <= GRADIENT


# ---- a whole trainer ----------------------------------------------------------------------------

STEPS = 12


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = T.SHARD_MAGIC, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def write_tokens(folder: Path, sizes: dict[str, int]) -> Path:
    """Shards of Zipf-like tokens (4.9 nats) in documents of 300 on average."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 1001)
    for split, n in sizes.items():
        tokens = rng.choice(1000, n, p=p / p.sum())
        tokens[rng.random(n) < 1 / 300] = 50_256
        tokens[0] = 50_256
        write_shard(folder / f"some_{split}_000000.bin", tokens)
    return folder


def trainer_config(folder: Path, **changes) -> T.Config:
    """The speedrun's width on 4 blocks, softmax and differential ones: three stages of one call
    shape, whose windows also grow within a stage; 12 steps."""
    stages = tuple(
        T.Stage(1 / 3, tokens, lr, window)
        for tokens, lr, window in (
            (32_768, 1.0, (128, 384)),
            (65_536, 1.3, (384, 640)),
            (98_304, 1.5, (640, 1152)),
        )
    )
    model = {"arm": "diff_v2,window2=128", "layers": (0, 2), "n_layer": 4, "no_attention": ()}
    model |= {"long_layers": (0, 3), "skip": (0, 2), "backout": 2, "value_tables": 1}
    data = {"data": str(folder), "row_tokens": 4096, "micro_batch_tokens": 32_768}
    data |= {"val_row_tokens": 16_384, "val_call_tokens": 32_768}
    rest = {"stages": stages, "tokens": STEPS * 65_536, "ext_window": 1536, "looks": 2}
    rest |= {"out": str(folder / "runs"), "run_id": "first", "save_final": False}
    return T.make_config("r28", **{**model, **data, **rest, **changes})


SIZES = {"train": 800_000, "dev": 100_000, "val": 100_000}


def read_log(folder: Path) -> dict[str, list[dict]]:
    lines = [json.loads(x) for x in (folder / "run.jsonl").read_text().splitlines()]
    return {kind: [x for x in lines if x["t"] == kind] for kind in {x["t"] for x in lines}}


def train_twice(cfg: T.Config) -> tuple[T.Trainer, list[dict], int, bool]:
    """Warm-up, a run, reset, the same run: (trainer, both logs, graphs made after the warm-up,
    whether a recompile was an error then). For fixtures of a file, too: it is none afterwards."""
    with torch._dynamo.config.patch(error_on_recompile=False):
        trainer = T.Trainer(cfg)
        trainer.warm_up()
        before, strict = graphs(), torch._dynamo.config.error_on_recompile
        trainer.run()
        trainer.reset(cfg.run.seed)
        trainer.cfg = trainer.cfg.with_(run_id="second")
        trainer.run()
    logs = [read_log(Path(cfg.run.out) / name) for name in ("first", "second")]
    return trainer, logs, graphs() - before, strict


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch._dynamo.reset()
    folder = write_tokens(tmp_path_factory.mktemp("tokens"), SIZES)
    return train_twice(trainer_config(folder))


def test_trainer_does_not_recompile(trained):
    """Two runs over three stages and eight windows, looks and final validation at two windows."""
    trainer, logs, made, strict = trained
    assert strict, "warm_up does not set error_on_recompile"
    assert made == 0
    assert trainer.uses("fp8") == T.fp8_works(torch.device(DEVICE))
    for log in logs:
        assert len({x["window"] for x in log["step"]}) >= 6
        assert {x["stage"] for x in log["step"]} == {0, 1, 2}


def check_losses(logs: list[dict]) -> None:
    for log in logs:
        losses = [x["loss"] for x in log["step"]]
        print(losses)
        assert len(losses) == STEPS and all(math.isfinite(x["grad_norm"]) for x in log["step"])
        assert losses[0] == pytest.approx(math.log(VOCAB), abs=1e-2)  # the head starts at zero
        assert losses[-1] < losses[0] - 2
        seen = [x["dev_loss"] for x in log["val"] if "dev_loss" in x]
        assert len(seen) == 2 and seen[-1] < seen[0]
        final = log["val"][-1]
        assert abs(final["val_loss"] - seen[-1]) < 0.2
        assert abs(final["val_loss_ext"] - final["val_loss"]) < 0.2


def test_trainer_learns(trained):
    check_losses(trained[1])


def check_reset(logs: list[dict]) -> None:
    """Atomic additions in the embeddings' gradients leave the last bits open, no more."""
    first, second = ([x["loss"] for x in log["step"]] for log in logs)
    print(max(abs(a - b) for a, b in zip(first, second, strict=True)))
    assert second[0] == pytest.approx(first[0], abs=1e-5)
    assert second[1] == pytest.approx(first[1], abs=1e-3)
    assert second == pytest.approx(first, abs=0.1)


def test_trainer_reset(trained):
    check_reset(trained[1])


# ---- attention alone, Flex against dense --------------------------------------------------------

# query heads, KV heads, D of q and k, D of v, shares of the window by head (repeated over heads)
SHAPES = {
    "6x128": (6, 6, 128, 128, (1.0,)),
    "12q/6kv": (12, 6, 128, 128, (1.0, 0.5)),
    "12q/3kv": (12, 3, 128, 128, (1.0, 0.25, 0.6)),
    "6q/3kv": (6, 3, 128, 128, (1.0, 0.5)),
    "qk 64, v 128": (12, 12, 64, 128, (1.0, 0.3)),
    "24q/6kv, 64": (24, 6, 64, 64, (1.0, 0.5)),
}
LONG = ("6x128", "12q/3kv", "qk 64, v 128")  # at T = 4096
LONG_SPANS = (900, 2560)


def attention_inputs(names, batch: int, length: int, device: str = DEVICE) -> dict[str, Tensor]:
    """bfloat16 leaves; q and k have unit RMS, as QK norm makes them."""
    gen, out = torch.Generator().manual_seed(1), {}
    for name in names:
        hq, hkv, d, dv, _ = SHAPES[name]
        for key, heads, dim in (("q", hq, d), ("k", hkv, d), ("v", hkv, dv)):
            x = torch.randn(batch, length, heads, dim, generator=gen)
            out[f"{name}.{key}"] = x.to(device, torch.bfloat16).requires_grad_()
    return out


def by_head(names, window: int, device: str = DEVICE) -> dict[str, Tensor]:
    out = {}
    for name in names:
        heads, shares = SHAPES[name][0], SHAPES[name][-1]
        share = shares * (heads // len(shares)) if len(shares) > 1 else shares
        out[name] = int32(*(max(1, int(window * s)) for s in share), device=device)
    return out


def attend_all(make, inputs: dict[str, Tensor], docs: Tensor, windows: dict) -> list[Tensor]:
    out = []
    for name, window in windows.items():
        q, k, v = (inputs[f"{name}.{key}"] for key in "qkv")
        ctx = T.Context(make(docs, window), {}, lambda dim: 15.36 / dim)
        out.append(T.attend(q, k, v, ctx))
    return out


def compare_attention(compiled, names, batch, length, mean, spans, device=DEVICE):
    """{(name, window): {tensor: (error of Flex, of the dense path)}}: both in bfloat16, against
    the dense path in fp32, at each window without a new graph."""
    inputs = attention_inputs(names, batch, length, device)
    docs = random_docs(batch, length, mean).to(device)
    gen = torch.Generator().manual_seed(2)
    shapes = [(batch, length, SHAPES[n][0], SHAPES[n][3]) for n in names]
    seeds = [torch.randn(s, generator=gen).to(device) for s in shapes]
    exact = {k: v.detach().float().requires_grad_() for k, v in inputs.items()}
    result = {}
    for number, span in enumerate(spans):
        windows = by_head(names, span, device)
        with no_recompile() if number else contextlib.nullcontext():
            flex = run_with_grad(lambda w=windows: compiled(inputs, docs, w), inputs, seeds)
        for i, name in enumerate(names):  # one shape at a time: T x T for every head is large
            one = {name: windows[name]}

            def dense(leaves, name=name, one=one, i=i):
                mine = {k: v for k, v in leaves.items() if k.startswith(f"{name}.")}
                call = functools.partial(attend_all, T.dense_mask, mine, docs, one)
                return run_with_grad(call, mine, [seeds[i]])

            low = dense(inputs)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                want = dense(exact)
            got = {k: flex[k] if k in flex and k in inputs else flex[f"out.{i}"] for k in want}
            result[name, span] = {
                ("out" if k == "out.0" else k.rpartition(".")[2]): (
                    error(got[k], want[k]),
                    error(low[k], want[k]),
                )
                for k in want
            }
    return result


def compile_attention():
    """A new code object for each call, so that its graphs count as no recompile of another's."""
    torch._dynamo.reset()
    run = functools.partial(attend_all, T.block_mask)
    return torch.compile(run, fullgraph=True, dynamic=False)


@pytest.fixture(scope="module")
def shape_errors():
    return compare_attention(compile_attention(), list(SHAPES), 2, 1024, 400, SPANS)


@pytest.mark.parametrize("name", SHAPES)
def test_attend(shape_errors, name):
    """Grouped queries, windows by head, head dims 64 and 128: output, dq, dk and dv."""
    for span in SPANS:
        check_errors(shape_errors[name, span])


@pytest.fixture(scope="module")
def long_errors():
    return compare_attention(compile_attention(), LONG, 1, 4096, 2000, LONG_SPANS)


@pytest.mark.parametrize("name", LONG)
def test_attend_long(long_errors, name):
    for span in LONG_SPANS:
        check_errors(long_errors[name, span])


# ---- the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (3072, 768)])
def test_orthogonalize_in_float16(shape):
    """Nearer to the exact polynomials than the plain loop in bfloat16 is, at a run's shapes."""
    mine, theirs = H.muon_errors(*shape, torch.device(DEVICE))
    assert (mine < theirs).all(), (mine, theirs)


def test_rows_in_one_pass():
    """Where a row's reductions differ in kind, no kernel loops over it."""
    from torch._inductor.utils import run_and_get_code

    def rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = x.float() * y.float()
        largest = t.abs().amax(1, keepdim=True)
        return (t / largest).to(x.dtype), largest, (t * t.sum(1, keepdim=True)).sum()

    x, y = (torch.randn(16_384, 768, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with torch._inductor.config.patch(force_disable_caches=True):
        got, code = run_and_get_code(torch.compile(rows, fullgraph=True), x, y)
    text = "\n".join(code)
    assert "persistent_reduction(" in text
    looped = re.findall(r"triton_heuristics\.reduction\(.*?r0_numel = (\d+)", text, re.DOTALL)
    assert "768" not in looped
    for mine, exact in zip(got, rows(x.double(), y.double()), strict=True):
        assert error(mine, exact) < FORWARD


def test_fused_update():
    """Against the eager one, with everything on; other lr and momentum make no new graph."""
    shapes = {"q": (768, 768), "up": (3072, 768), "down": (768, 3072), "table": (4096, 768)}
    groups = {
        "matrix": T.Group("muon", 0.02, beta2=0.95, cautious_wd=1.2, wd=0.05),
        "value": T.Group("adam", 0.6, cautious_wd=0.025),
    }
    gen, ends = torch.Generator(DEVICE).manual_seed(0), []
    grads = [torch.randn(s, generator=gen, device=DEVICE) for s in shapes.values()]
    for compiled in (False, True):
        model = nn.Module()
        for name, shape in shapes.items():
            group = "value" if name == "table" else "matrix"
            p = T.parameter(shape, (), group)
            p.data = torch.full(shape, 0.02, device=DEVICE)
            model.register_parameter(name, p)
        opt = T.Optimizer(model, groups, T.World(torch.device(DEVICE)))
        for bank in opt.banks if compiled else ():
            bank.compile()
        for step in range(4):
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.roll(step, 0)
            with no_recompile() if compiled and step else contextlib.nullcontext():
                opt.step(1.0 - 0.1 * step, 0.85 + 0.02 * step)
        ends.append([p.detach().clone() for p in model.parameters()])
    for name, got, want in zip(shapes, *ends, strict=True):
        assert error(got, want) < 1e-4, name
