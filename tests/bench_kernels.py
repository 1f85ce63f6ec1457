"""What the kernels of train_gpt.py's section 11 gain, on one NVIDIA GPU that runs them:
`python tests/bench_kernels.py`; with --sweep also every way to cut their work.

Each row: what the trainer does now (cuBLAS and Inductor's graphs) and the kernel, milliseconds and
TFLOP/s or GB/s, at the trainer's shapes. Both are timed in turns, so that a card that slows down
slows both. GB/s counts what must be moved at least once. Not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

DEVICE = torch.device("cuda")
D, VOCAB = 768, 50_304

# m, n, k, warps, stages, programs
UP_TILES = (
    (128, 256, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 1),
    (256, 128, 64, 8, 3, 1),
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 8, 3, 2),
    (128, 128, 128, 8, 3, 1),
)
UP8_TILES = (
    (128, 256, 128, 8, 3, 1),
    (128, 256, 128, 8, 2, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 128, 128, 8, 4, 1),
    (128, 128, 128, 4, 3, 2),
    (256, 128, 128, 8, 3, 1),
)
BACK_TILES = (
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 4, 2, 2),
    (128, 128, 64, 8, 3, 2),
    (128, 256, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 1),
    (256, 128, 64, 8, 3, 1),
)
BACK8_TILES = (
    (128, 128, 64, 4, 4, 2),
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 4, 3, 3),
    (128, 128, 128, 4, 2, 2),
    (128, 128, 128, 8, 2, 2),
    (128, 256, 128, 8, 3, 1),
)
ROW_BLOCKS = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
# rows, columns, tiles of a group, warps, registers a thread
GRAD_TILES = (
    *((128, 64, 8, 8, 64), (128, 64, 1, 8, 64), (128, 64, 32, 8, 64), (128, 64, 8, 8, 96)),
    *((128, 32, 8, 8, 64), (64, 64, 8, 4, 64), (64, 128, 8, 8, 64), (128, 128, 8, 16, 64)),
)


def rand(*shape: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def once(call: Callable) -> float:
    """Milliseconds of a few calls in a row, a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(5):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 5


def in_turns(*calls: Callable, rounds: int = 12) -> list[float]:
    """Median milliseconds of each call, timed in turns."""
    times = [[once(call) for call in calls] for _ in range(rounds + 2)]  # two to warm up
    return [statistics.median(column) for column in zip(*times[2:], strict=True)]


def row(name: str, plain: float, fused: float, amount: float, unit: str) -> None:
    rates = [f"{ms:8.3f} ms {amount / ms / 1e9:7.1f} {unit}" for ms in (plain, fused)]
    print(f"{name:34s} now {rates[0]}   kernel {rates[1]}   {plain / fused:5.2f}x", flush=True)


def compiled(f: Callable) -> Callable:
    return torch.compile(f, fullgraph=True, dynamic=False)


def relu2(x: Tensor, up: Tensor) -> Tensor:
    return F.relu(x @ up.t()).square()


def relu2_back(grad: Tensor, down: Tensor, before: Tensor) -> Tensor:
    return (grad @ down) * 2 * F.relu(before)


def bench_products(tokens: int, width: int) -> None:
    """The two products with their epilogues; `now`: a product and a graph that is pointwise."""
    x, up, down, grad = rand(tokens, D), rand(width, D, std=0.04), rand(D, width), rand(tokens, D)
    before = x @ up.t()
    post = T.relu2_product(x, up, None, T.UP_TILE)
    flops = 2 * tokens * D * width
    f, b = compiled(relu2), compiled(relu2_back)
    bare = in_turns(lambda: x @ up.t(), lambda: grad @ down)
    forward = in_turns(lambda: f(x, up), lambda: T.relu2_product(x, up, None, T.UP_TILE))
    back = in_turns(
        lambda: b(grad, down, before), lambda: T.relu2_product(grad, down, post, T.BACK_TILE)
    )
    row(f"up, relu^2, {width}", *forward, flops, "TFLOP/s")
    row(f"its gradient, {width}", *back, flops, "TFLOP/s")
    rates = " and ".join(f"{ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s" for ms in bare)
    print(f"    cuBLAS's bare products: {rates}", flush=True)


def bench_mlp(tokens: int) -> None:
    """The whole MLP as the trainer compiles it, weights in fp32."""
    cfg = T.make_config(vocab=VOCAB).model
    mlps = [T.MLP(cfg, 0).to(DEVICE) for _ in range(4)]
    for i, mlp in enumerate(mlps):
        mlp.fused, mlp.fp8 = i > 0, ("", "", "forward", "both")[i]
        torch.nn.init.normal_(mlp.up.weight, std=0.04)
        torch.nn.init.normal_(mlp.down.weight, std=0.02)
    x = rand(tokens // 16_384, 16_384, D).requires_grad_()
    grad = torch.randn_like(x)
    runs = [compiled(mlp) for mlp in mlps]

    def both(i: int) -> None:
        runs[i](x).backward(grad)
        x.grad = mlps[i].up.weight.grad = mlps[i].down.weight.grad = None

    def forward(i: int) -> None:
        with torch.no_grad():
            runs[i](x)

    flops = 4 * tokens * D * 4 * D
    began = time.perf_counter()
    both(0), both(1), both(2), both(3)
    print(f"    (compiled in {time.perf_counter() - began:.0f} s)", flush=True)
    times = in_turns(lambda: both(0), lambda: both(1))
    row("MLP, forward + backward, 3072", *times, 3 * flops, "TFLOP/s")
    row("MLP, forward, 3072", *in_turns(lambda: forward(0), lambda: forward(1)), flops, "TFLOP/s")
    times = in_turns(lambda: both(1), lambda: both(2))
    row("... in FP8, `now`: the kernel", *times, 3 * flops, "TFLOP/s")
    times = in_turns(lambda: both(2), lambda: both(3))
    row("... both ways, `now`: forward", *times, 3 * flops, "TFLOP/s")
    times = in_turns(lambda: forward(1), lambda: forward(2))
    row("... forward", *times, flops, "TFLOP/s")


def bench_loss(rows: int) -> None:
    """Loss and gradient of a piece of the head; `now`: its two graphs."""
    z, targets = rand(rows, VOCAB, std=3.0), torch.randint(50_257, (rows,), device=DEVICE)
    grad, turn = compiled(T.grad_in_fp8), compiled(T.transposed)
    cap = T.cap_constants(30.0)

    def now() -> None:
        turn(grad(z, targets, 30.0)[1])

    g8 = grad(z, targets, 30.0)[1]
    times = in_turns(now, lambda: T.loss_and_grad(z, targets, *cap))
    row("loss and gradient", *times, z.nbytes * 2e3, "GB/s")
    parts = in_turns(lambda: grad(z, targets, 30.0), lambda: turn(g8))
    print(f"    now: loss and gradient {parts[0]:.3f} ms, transpose {parts[1]:.3f} ms", flush=True)
    sums = torch.empty(3, rows, device=DEVICE)
    block, warps = T.ROW_BLOCK
    args = (z, targets, sums[0], None, *sums, VOCAB, *cap, block, False)
    (first,) = in_turns(lambda: T.loss_rows[(rows,)](*args, num_warps=warps))
    print(f"    kernel: sums {first:.3f} ms, the rest is the gradient's pass", flush=True)


def bench_head(rows: int) -> None:
    """A piece of the head as the trainer runs it, its three FP8 products included."""
    weight = torch.nn.Parameter(0.05 * torch.randn(VOCAB, D, device=DEVICE))
    weight.grad = torch.zeros_like(weight)
    h = T.norm(rand(rows, D))
    targets = torch.randint(50_257, (rows,), device=DEVICE)
    scale = torch.full((), 1.0, device=DEVICE)
    heads = [T.Head(weight, 30.0, torch.bfloat16, True, True, fused) for fused in (False, True)]
    for head in heads:
        head.prepare()
    times = in_turns(*(lambda head=head: head.backward(h, targets, scale) for head in heads))
    row("head, one piece of the step", *times, 6 * rows * D * VOCAB, "TFLOP/s")


def sweep(tokens: int, rows: int) -> None:
    """Every candidate's milliseconds, or why it does not run here."""
    x, up, down, grad = rand(tokens, D), rand(4 * D, D, std=0.04), rand(D, 4 * D), rand(tokens, D)
    post = T.relu2_product(x, up, None, T.UP_TILE)
    z, targets = rand(rows, VOCAB, std=3.0), torch.randint(50_257, (rows,), device=DEVICE)
    cap = T.cap_constants(30.0)

    def loss(name: str, value: tuple) -> None:
        before = getattr(T, name)
        setattr(T, name, value)
        try:
            T.loss_and_grad(z, targets, *cap)
        finally:
            setattr(T, name, before)

    x8, up8, *eights = T.mlp_in_fp8(T.norm(x), *T.unit_rows(up, down))
    post8, inner8 = (torch.empty_like(post, dtype=kind) for kind in (T.E4M3, T.E5M2))
    grad8, _, down8t, scales, *_ = T.gradient_in_fp8(grad, up8, *eights)

    def eight(t: tuple) -> None:
        T.relu2_product(x8, up8, None, T.Tile(*t), post8)

    def eight_back(t: tuple) -> None:
        T.relu2_product(grad8, down8t, post, T.Tile(*t), inner8, scales)

    cases = [("up", t, lambda t: T.relu2_product(x, up, None, T.Tile(*t))) for t in UP_TILES]
    cases += [("up, FP8", t, eight) for t in UP8_TILES]
    cases += [
        ("back", t, lambda t: T.relu2_product(grad, down, post, T.Tile(*t))) for t in BACK_TILES
    ]
    cases += [("back, FP8", t, eight_back) for t in BACK8_TILES]
    cases += [("ROW_BLOCK", t, lambda t: loss("ROW_BLOCK", t)) for t in ROW_BLOCKS]
    cases += [("GRAD_TILE", t, lambda t: loss("GRAD_TILE", t)) for t in GRAD_TILES]
    for name, value, call in cases:
        try:
            (ms,) = in_turns(lambda value=value, call=call: call(value), rounds=8)
            print(f"{name:10s} {value!s:32s} {ms:8.3f} ms", flush=True)
        except Exception as e:  # Triton has errors of many kinds
            print(f"{name:10s} {value!s:32s} {str(e).splitlines()[0][:80]}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tokens", type=int, default=65_536, help="rows of the MLP's products")
    p.add_argument("--rows", type=int, default=T.HEAD_PIECE, help="rows of a piece of the head")
    p.add_argument("--widths", type=int, nargs="+", default=[3072, 3456], help="of the MLP")
    p.add_argument("--sweep", action="store_true", help="time every tile and block instead")
    args = p.parse_args()
    if not torch.cuda.is_available() or not T.hopper(DEVICE):
        sys.exit("no GPU here that runs these kernels (compute capability 9.0, Triton)")
    torch.manual_seed(0)
    T.configure_compiler(torch.device("cuda"))
    began = time.perf_counter()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {T.triton.__version__}"
    )
    for name, reason in (
        ("MLP", T.probe_mlp(DEVICE)),
        ("MLP in FP8", T.probe_mlp_fp8(DEVICE)),
        ("MLP in FP8, both ways", T.probe_mlp_fp8(DEVICE, True)),
        ("loss", T.probe_loss(DEVICE)),
    ):
        print(f"{name}: {reason or 'works here'}")
    print(f"    (tried in {time.perf_counter() - began:.0f} s)", flush=True)
    if args.sweep:
        sweep(args.tokens, args.rows)
        return
    for width in args.widths:
        bench_products(args.tokens, width)
    bench_mlp(args.tokens)
    bench_loss(args.rows)
    bench_head(args.rows)
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
