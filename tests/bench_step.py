"""Where a training step's time goes, on any GPU: `python tests/bench_step.py --data DIR`, or under
`torchrun --standalone --nproc-per-node N` on several.

For each arm: seconds of warm-up (compilation), ms a step and tokens/s at some long windows, peak
memory; with --profile, also the GPU time of one step by kind of kernel. On several GPUs also every
collective alone, and with --profile how much of NCCL's time no other kernel covers. Not a test: it
asserts nothing and prints what it measures. `python -m records.scaling --steps ONE.json TWO.json`
makes of two of its --out files what more GPUs would cost.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

KINDS = (
    ("communication", r"nccl"),
    ("attention forward", r"flex_attention(?!.*backward)|flash_fwd|cu_blocks"),
    ("attention backward", r"flex_attention.*backward|flash_bwd"),  # flash-attn-4: kernel_cutlass_
    ("what selective attention takes, running sums", r"cumsum|scan_outer"),
    ("cross-entropy", r"triton_.*(exp_|_log_|gather)|^loss_rows|^grad_tiles"),
    ("matmul with relu^2", r"^relu2_tiles"),
    ("FP8 matmul", r"nvjet_sm90_q|e4m3|e5m2"),
    ("matmul", r"gemm|cutlass|cublas|nvjet|sm90_xmma"),
    ("Adam", r"adam|multi_tensor|^update_rows"),
    ("embedding gradient", r"index_put|embedding_dense"),
    ("fused pointwise and reductions", r"triton_"),
    ("copies and fills", r"memcpy|memset|copy_|fill|FillFunctor"),
)


def kind_of(kernel: str) -> str:
    return next((k for k, pattern in KINDS if re.search(pattern, kernel, re.I)), "other")


def build(arm: str, args) -> T.Trainer:
    limits = (args.windows[-1], args.windows[-1])
    stage = T.Stage(1.0, args.tokens, 1.0, limits, args.candidates)
    changes = dict(kv.split("=", 1) for kv in args.set)
    cfg = T.make_config(
        args.preset, arm=arm, data=args.data, stages=(stage,), tokens=(args.steps + 2) * args.tokens
    )
    cfg = cfg.with_(**{k: T.parse_value(k, v) for k, v in changes.items()})
    return T.Trainer(cfg)


def timed(trainer: T.Trainer, window: int, steps: int) -> float:
    """Milliseconds a step, mean over `steps` after one unmeasured."""
    trainer.steps = [T.dataclasses.replace(s, window=window) for s in trainer.steps]
    batches = trainer.default_batches(trainer.steps[: steps + 1], trainer.cfg, trainer.world)
    for i, (step, batch) in enumerate(zip(trainer.steps, batches, strict=False)):
        if i == 1:
            trainer.world.synchronize()
            began = time.perf_counter()
        trainer.train_step(step, batch)
    trainer.world.synchronize()
    return 1000 * (time.perf_counter() - began) / steps


class Span(NamedTuple):
    """What the GPU did, from when to when, ms."""

    name: str
    start: float
    end: float


def spans_of(trace: dict) -> list[Span]:
    """Kernels, copies and fills of a profile in Chrome's format, whose times are in us."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("cat") in kinds]
    return [Span(e["name"], e["ts"] / 1000, (e["ts"] + e["dur"]) / 1000) for e in events]


def merged(spans: list[Span]) -> list[tuple[float, float]]:
    """Their union, as intervals in order that do not touch."""
    out: list[tuple[float, float]] = []
    for start, end in sorted((s.start, s.end) for s in spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def communication(spans: list[Span]) -> dict:
    """ms of a step: of NCCL's kernels (a moment counts once), of these with and without another
    kernel beside them, of nothing at all; and NCCL's by its kernel. A rank that is early waits in
    a collective for the others, and that counts as the collective's time."""
    nccl = [s for s in spans if kind_of(s.name) == "communication"]
    other = [s for s in spans if kind_of(s.name) != "communication"]
    busy, total, by_name = length(merged(spans)), length(merged(nccl)), collections.Counter()
    exposed = busy - length(merged(other))
    for s in nccl:
        by_name[s.name.partition("(")[0]] += s.end - s.start
    whole = max(s.end for s in spans) - min(s.start for s in spans)
    return {
        "step_ms": whole,
        "nccl_ms": total,
        "hidden_ms": total - exposed,
        "exposed_ms": exposed,
        "idle_ms": whole - busy,
        "by_name": dict(by_name.most_common()),
    }


def record(trainer: T.Trainer) -> list[Span]:
    """One step's work on this rank's GPU; all ranks begin it together."""
    batch = next(iter(trainer.default_batches(trainer.steps[:2], trainer.cfg, trainer.world)))
    for _ in range(2):  # the first starts the profiler itself
        trainer.world.synchronize()
        trainer.world.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            trainer.train_step(trainer.steps[0], batch)
            trainer.world.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        p.export_chrome_trace(str(file))
        return spans_of(json.loads(file.read_text()))


def print_kinds(spans: list[Span], top: int) -> None:
    sums, names, counts = (collections.Counter() for _ in range(3))
    for s in spans:
        sums[kind_of(s.name)] += s.end - s.start
        names[s.name[:90]] += s.end - s.start
        counts[s.name[:90]] += 1
    total = sum(sums.values())
    print(f"GPU time of one step by kind, {total:.1f} ms:")
    for name, ms in sums.most_common():
        print(f"  {name:34s} {ms:8.2f} ms {ms / total:6.1%}")
    for name, ms in names.most_common(top):
        print(f"  {ms:8.2f} ms x{counts[name]:<5d} {name}")


def collectives(trainer: T.Trainer, times: int = 10) -> list[dict]:
    """Each bank's reduce-scatter and all-gather alone: bytes of the whole bank, ms, and GB/s that
    cross a GPU's link in a ring, which moves (ranks - 1) / ranks of the bytes."""
    world, rows = trainer.world, []
    for bank in trainer.optimizer.banks if world.size > 1 else []:
        calls = {
            "reduce-scatter": lambda b=bank: world.reduce_scatter(b.grad, b.own_grad),
            "all-gather": lambda b=bank: world.all_gather(b.data, b.own),
        }
        for name, call in calls.items():
            for i in range(times + 2):
                if i == 2:
                    world.synchronize()
                    world.barrier()
                    began = time.perf_counter()
                call().wait()
            world.synchronize()
            ms, size = 1000 * (time.perf_counter() - began) / times, bank.data.nbytes
            rate = size * (world.size - 1) / world.size / ms / 1e6
            rows.append({"what": name, "bytes": size, "ms": ms, "gb_s": rate})
    return rows


def print_collectives(row: dict) -> None:
    print("| collective | MB | ms alone | GB/s a link |\n| --- | ---: | ---: | ---: |")
    for c in row["collectives"]:
        print(f"| {c['what']} | {c['bytes'] / 1e6:.1f} | {c['ms']:.3f} | {c['gb_s']:.0f} |")
    if "communication" not in row:
        return
    print("\n| rank | step ms | NCCL ms | hidden | not hidden | idle |")
    print("| --- " + "| ---: " * 5 + "|")
    for rank, c in enumerate(row["communication"]):
        cells = [c[k] for k in ("step_ms", "nccl_ms", "hidden_ms", "exposed_ms", "idle_ms")]
        print(f"| {rank} | {' | '.join(f'{x:.2f}' for x in cells)} |")


def measure(arm: str, args) -> dict:
    """A row of the results; on every rank, rank 0's is printed."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build(arm, args)
    trainer.warm_up()
    world = trainer.world
    ms = {w: round(timed(trainer, w, args.steps), 2) for w in args.windows}
    peak = torch.cuda.max_memory_allocated() / 1e9 if world.cuda else 0.0
    gpu = torch.cuda.get_device_name() if world.cuda else None
    row = {"arm": arm, "world": world.size, "gpu": gpu, "tokens": args.tokens}
    row |= {"candidates": args.candidates} if args.candidates else {}
    row |= {"compile_s": round(trainer.compile_s, 1), "peak_gb": peak, "ms": ms}
    row["tokens_per_s"] = {w: args.tokens / v * 1000 for w, v in ms.items()}
    row["collectives"] = collectives(trainer)
    if args.profile and world.cuda:
        spans = record(trainer)
        row["communication"] = world.gather(communication(spans))
        if world.main:
            print_kinds(spans, args.profile)
    if world.main:
        print(json.dumps(row), flush=True)
        if world.size > 1:
            print_collectives(row)
    return row


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", required=True, help="folder of token shards")
    p.add_argument("--arms", nargs="+", default=["softmax"])
    p.add_argument("--preset", default="speedrun")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    p.add_argument("--tokens", type=int, default=393_216, help="tokens a step")
    p.add_argument(
        "--candidates", type=int, default=0, metavar="P", help="classes of the loss (0: all)"
    )
    p.add_argument("--steps", type=int, default=5, help="steps timed at each window")
    p.add_argument("--windows", type=int, nargs="+", default=[384, 896, 1408], help="tokens")
    p.add_argument("--profile", type=int, default=0, metavar="N", help="print the N top kernels")
    p.add_argument("--out", default="", help="write the rows here as JSON")
    args = p.parse_args()
    T.set_environment()
    rows = []
    for arm in args.arms:
        rows.append(measure(arm, args))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    world = T.World.start()
    if world.main:
        for r in rows:
            rates = "  ".join(
                f"{w}: {r['ms'][w]:.1f} ms {v:,.0f}/s" for w, v in r["tokens_per_s"].items()
            )
            print(f"{r['arm']:28s} warm-up {r['compile_s']:.0f} s  {r['peak_gb']:.1f} GB  {rates}")
        if args.out:
            Path(args.out).write_text(json.dumps(rows, indent=1))
    world.close()


if __name__ == "__main__":
    main()
