"""Where a training step's time goes, on any GPU: `python tests/bench_step.py --data DIR`, or under
`torchrun --standalone --nproc-per-node N` on several.

For each arm: seconds of warm-up (compilation), ms a step and tokens/s at some long windows, ms of
host time a step, peak memory. With --profile, also the GPU time of a step by kind of kernel, for
all arms side by side, what its products alone would take at the rates that this card reaches in one
large product, and between which kernels the GPU was idle; --trace FOLDER keeps the profiles, for
Perfetto. --also TOKENS times larger steps of calls of the same shape, from the same compilation.
`--show ONE.json ...` prints that table of earlier --out files again. On several GPUs also every
collective alone, and with --profile how much of NCCL's time no other kernel covers.
Not a test: it asserts nothing and prints what it measures. `python -m records.scaling --steps
ONE.json TWO.json` makes of two of its --out files what more GPUs would cost.

A profile is of as many consecutive steps as --adam-every says, after as many others, so that the
host is as far ahead as in training. Its figures are of one step, on average.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import gzip
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_kernels

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


def refuse_also(trainer: T.Trainer, args) -> None:
    """ValueError where a call of an --also step has another shape, and would be compiled anew."""
    before = trainer.call_shape(args.tokens)
    for tokens in args.also:
        after = trainer.call_shape(tokens)
        if before != after:
            said = f"--also {tokens}: calls of {after[0]} x {after[1]} tokens"
            raise ValueError(f"{said}, not {before[0]} x {before[1]}: --set row_tokens=N")


def other_steps(trainer: T.Trainer, tokens: int) -> None:
    """From now on the trainer's steps have so many tokens."""
    (stage,), steps = trainer.cfg.schedule.stages, len(trainer.steps)
    stages = (T.dataclasses.replace(stage, tokens=tokens),)
    trainer.cfg = trainer.cfg.with_(stages=stages, tokens=steps * tokens)
    trainer.steps = T.steps_of(trainer.cfg, trainer.corpus)


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


def host_times(trainer: T.Trainer, steps: int) -> dict:
    """ms that the host takes to queue a step, and to get its batch; means over `steps` after one
    unmeasured. The device has nothing else to do, so that the host waits for it only where a step
    waits, or has more launches than the device's queue takes."""
    sums = {"step": 0.0, "batch": 0.0}
    batches = trainer.default_batches(trainer.steps[: steps + 1], trainer.cfg, trainer.world)
    for i, step in enumerate(trainer.steps[: steps + 1]):
        began = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        trainer.world.synchronize()
        ready = time.perf_counter()
        trainer.train_step(step, batch)
        if i:
            sums["step"] += time.perf_counter() - ready
            sums["batch"] += got - began
    trainer.world.synchronize()
    return {name: 1000 * seconds / steps for name, seconds in sums.items()}


class Span(NamedTuple):
    """What the GPU did, from when to when, ms; when the host had asked for it, if that is known."""

    name: str
    start: float
    end: float
    asked: float | None = None


def spans_of(trace: dict) -> list[Span]:
    """Kernels, copies and fills of a profile in Chrome's format, whose times are in us."""
    kinds, calls = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
    asked = {
        e["args"]["correlation"]: (e["ts"] + e["dur"]) / 1000
        for e in trace["traceEvents"]
        if e.get("cat") in calls and "correlation" in e.get("args", ())
    }
    return [
        Span(
            e["name"],
            e["ts"] / 1000,
            (e["ts"] + e["dur"]) / 1000,
            asked.get(e.get("args", {}).get("correlation")),
        )
        for e in trace["traceEvents"]
        if e.get("cat") in kinds
    ]


MARK = "spin_kernel"  # of torch.cuda._sleep, which nothing else calls: a step begins


def between_marks(spans: list[Span]) -> list[Span]:
    """Those from the first mark to the last, both included, in order of their beginning."""
    marks = [s.start for s in spans if MARK in s.name]
    inside = (s for s in spans if min(marks) <= s.start <= max(marks))
    return sorted(inside, key=lambda s: s.start)


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


class Gap(NamedTuple):
    """ms in which the GPU did nothing, after which kernel and before which; how many of them were
    over before the host had asked for the latter, if that is known."""

    ms: float
    before: str
    after: str
    host: float | None


LONG_GAP = 0.02  # ms


def gaps(spans: list[Span]) -> list[Gap]:
    """In order of time."""
    out, last = [], None
    for s in sorted(spans, key=lambda s: s.start):
        if last is not None and s.start > last.end:
            ms = s.start - last.end
            host = None if s.asked is None else min(ms, max(0.0, s.asked - last.end))
            out.append(Gap(ms, last.name, s.name, host))
        if last is None or s.end > last.end:
            last = s
    return out


def idleness(spans: list[Span], steps: int = 1, top: int = 10) -> dict:
    """Of a step: ms without any work; in how many gaps above LONG_GAP, of how many ms together, and
    for how many of these the host was late, or None where no launch is known. The `top` longest
    gaps of all steps."""
    found = gaps(spans)
    far = [gap for gap in found if gap.ms > LONG_GAP]
    late = [gap.host for gap in far if gap.host is not None]
    return {
        "idle_ms": sum(gap.ms for gap in found) / steps,
        "long_gaps": len(far) / steps,
        "long_gaps_ms": sum(gap.ms for gap in far) / steps,
        "host_late_ms": sum(late) / steps if late else None,
        "longest": [gap._asdict() for gap in sorted(found, key=lambda gap: -gap.ms)[:top]],
    }


def communication(spans: list[Span], steps: int = 1) -> dict:
    """ms of a step: of NCCL's kernels (a moment counts once), of these with and without another
    kernel beside them, of nothing at all; and NCCL's by its kernel. A rank that is early waits in
    a collective for the others, and that counts as the collective's time."""
    nccl = [s for s in spans if kind_of(s.name) == "communication"]
    other = [s for s in spans if kind_of(s.name) != "communication"]
    busy, total, by_name = length(merged(spans)), length(merged(nccl)), collections.Counter()
    exposed = busy - length(merged(other))
    for s in nccl:
        by_name[s.name.partition("(")[0]] += (s.end - s.start) / steps
    whole = max(s.end for s in spans) - min(s.start for s in spans)
    return {
        "step_ms": whole / steps,
        "nccl_ms": total / steps,
        "hidden_ms": (total - exposed) / steps,
        "exposed_ms": exposed / steps,
        "idle_ms": (whole - busy) / steps,
        "by_name": dict(by_name.most_common()),
    }


def record(trainer: T.Trainer, keep: str, name: str) -> tuple[list[Span], int]:
    """(the work of steps on this rank's GPU, how many steps); all ranks begin them together. The
    profile itself: NAME.json.gz in the folder `keep`, if that is one."""
    first = trainer.steps[: trainer.cfg.optim.adam_every]
    for _ in range(2):  # the first starts the profiler itself
        batches = trainer.default_batches([*first, *first], trainer.cfg, trainer.world)
        trainer.world.synchronize()
        trainer.world.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for ahead, step in itertools.product((True, False), first):
                if not ahead:
                    torch.cuda._sleep(1)
                trainer.train_step(step, next(batches))
            torch.cuda._sleep(1)
            trainer.world.synchronize()
    with contextlib.ExitStack() as stack:
        folder = keep or stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder) / f"{name}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        p.export_chrome_trace(str(file))
        with gzip.open(file) as f:
            return between_marks(spans_of(json.load(f))), len(first)


def by_kind(spans: list[Span], steps: int = 1) -> dict[str, float]:
    """ms of a step, the most first."""
    sums = collections.Counter()
    for s in spans:
        if MARK not in s.name:
            sums[kind_of(s.name)] += (s.end - s.start) / steps
    return dict(sums.most_common())


def print_kinds(spans: list[Span], top: int, steps: int = 1) -> None:
    names, counts = collections.Counter(), collections.Counter()
    for s in spans:
        if MARK not in s.name:
            names[s.name[:90]] += (s.end - s.start) / steps
            counts[s.name[:90]] += 1
    sums = by_kind(spans, steps)
    total = sum(sums.values())
    of = "" if steps == 1 else f", mean of {steps}"
    print(f"GPU time of one step{of} by kind, {total:.1f} ms:")
    for name, ms in sums.items():
        print(f"  {name:34s} {ms:8.2f} ms {ms / total:6.1%}")
    for name, ms in names.most_common(top):
        print(f"  {ms:8.2f} ms x{counts[name] / steps:<5g} {name}")


@functools.cache
def ceilings(device: torch.device, n: int = 8192) -> dict[str, float]:
    """TFLOP/s of an n x n x n product of random numbers here, in BF16 and, if there is any, FP8."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"BF16": lambda: a @ b}
    if T.fp8_works(device):
        a8, b8, one = (
            T.to_fp8(a, 1.0, T.E4M3),
            T.to_fp8(b, 1.0, T.E4M3),
            a.new_ones((), dtype=torch.float32),
        )
        calls["FP8"] = lambda: T.fp8_mm(a8, b8.t(), one, one, torch.bfloat16, True)
    ms = bench_kernels.in_turns(*calls.values())
    return {name: 2 * n**3 / each / 1e9 for name, each in zip(calls, ms, strict=True)}


def flops_of(trainer: T.Trainer, tokens: int, candidates: int, keys: tuple[float, float]) -> dict:
    """FLOPs of a step's products, forward and backward, by the kind of number that they are in.
    keys: what a query sees in long and short layers, on average. Not counted: a copy head's scores,
    Muon, what is computed a second time."""
    model, rest = trainer.model, T.flops_per_token(trainer.model, *keys)
    classes, width = model.head.shape
    head = 6.0 * (candidates or classes) * width
    rest -= 6.0 * classes * width
    units = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n and p.ndim == 2)
    some = {"": 0.0, "forward": 2.0, "both": 4.0}  # of 6 FLOPs for each weight
    fused = next((b.mlp.fp8 for b in model.blocks if isinstance(b.mlp, T.MLP)), "")
    eight = some[fused] * units + (head if trainer.head.fp8 else 0.0)
    return {"BF16": tokens * (rest + head - eight), "FP8": tokens * eight}


def floor(flops: dict, rates: dict) -> float:
    """ms that these products take at these rates, and nothing else."""
    return sum(1000 * n / (rates[kind] * 1e12) for kind, n in flops.items() if n)


def profile_table(rows: list[dict]) -> str:
    """ms of a step by kind, a column for each arm; "" where nothing was profiled."""
    rows = [row for row in rows if "kinds" in row]
    if not rows:
        return ""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    lines = [
        f"{chr(65 + i)}: {row['arm']}, {row['tokens']:,} tokens, {row['gpu']}"
        for i, row in enumerate(rows)
    ]
    lines += ["", "| ms of a step | " + " | ".join(chr(65 + i) for i in range(len(rows))) + " |"]
    lines.append("| --- |" + " ---: |" * len(rows))

    def line(name: str, values: list) -> None:
        cells = " | ".join("" if v is None else f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {cells} |")

    for kind in kinds:
        line(kind, [row["kinds"].get(kind) for row in rows])
    line("nothing", [row["idle"][0]["idle_ms"] for row in rows])
    line("all of it", [sum(row["kinds"].values()) + row["idle"][0]["idle_ms"] for row in rows])
    line("its products alone, at this card's rates", [row.get("floor_ms") for row in rows])
    return "\n".join(lines)


def print_idleness(idle: dict) -> None:
    late = idle["host_late_ms"]
    print(
        f"GPU idle for {idle['idle_ms']:.2f} ms of a step: {idle['long_gaps_ms']:.2f} in "
        f"{idle['long_gaps']:g} gaps above {1000 * LONG_GAP:.0f} us, of which the host was late "
        f"for {'an unknown time' if late is None else f'{late:.2f}'}. The longest:"
    )
    for gap in idle["longest"]:
        before, after = (
            "(a step begins)" if MARK in gap[k] else gap[k][:60] for k in ("before", "after")
        )
        late = "" if gap["host"] is None else f"host late {1000 * gap['host']:5.0f} us"
        print(f"  {1000 * gap['ms']:6.0f} us  {late}  {before} -> {after}")


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


def measure(arm: str, number: int, args) -> dict:
    """A row of the results, of the arm of this number; on every rank, rank 0's is printed."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build(arm, args)
    refuse_also(trainer, args)
    trainer.warm_up()
    world = trainer.world
    ms = {w: round(timed(trainer, w, args.steps), 2) for w in args.windows}
    peak = torch.cuda.max_memory_allocated() / 1e9 if world.cuda else 0.0
    gpu = torch.cuda.get_device_name() if world.cuda else None
    row = {"arm": arm, "world": world.size, "gpu": gpu, "tokens": args.tokens}
    row |= {"candidates": args.candidates} if args.candidates else {}
    row |= {"compile_s": round(trainer.compile_s, 1), "peak_gb": peak, "ms": ms}
    row["tokens_per_s"] = {w: args.tokens / v * 1000 for w, v in ms.items()}
    row["host_ms"] = host_times(trainer, args.steps)
    row["also"] = {}
    row["collectives"] = collectives(trainer)
    if args.profile and world.cuda:
        spans, steps = record(trainer, args.trace, f"arm{number}_rank{world.rank}")
        row["communication"] = world.gather(communication(spans, steps))
        row["idle"] = world.gather(idleness(spans, steps))
        row["kinds"] = by_kind(spans, steps)
        batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, world))
        both = T.windows(trainer.steps[0].window, torch.device("cpu")).tolist()
        keys = tuple(batch.mean_keys(window) for window in both)
        row["flops"] = flops_of(trainer, args.tokens // world.size, args.candidates, keys)
        row["ceilings"] = ceilings(world.device)
        row["floor_ms"] = floor(row["flops"], row["ceilings"])
        if world.main:
            print_kinds(spans, args.profile, steps)
            print_idleness(row["idle"][0])
    for tokens in args.also:
        other_steps(trainer, tokens)
        row["also"][tokens] = {w: round(timed(trainer, w, args.steps), 2) for w in args.windows}
    if world.main:
        print(json.dumps(row), flush=True)
        if world.size > 1:
            print_collectives(row)
    return row


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", help="folder of token shards")
    p.add_argument(
        "--show", nargs="+", metavar="FILE", help="tables of earlier --out files, no run"
    )
    p.add_argument("--arms", nargs="+", default=["softmax"])
    p.add_argument("--preset", default="r28")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    p.add_argument("--tokens", type=int, default=393_216, help="tokens a step")
    p.add_argument(
        "--also", type=int, nargs="+", default=[], metavar="TOKENS", help="of other steps, timed"
    )
    p.add_argument(
        "--candidates", type=int, default=0, metavar="P", help="classes of the loss (0: all)"
    )
    p.add_argument("--steps", type=int, default=5, help="steps timed at each window")
    p.add_argument("--windows", type=int, nargs="+", default=[384, 896, 1408], help="tokens")
    p.add_argument("--profile", type=int, default=0, metavar="N", help="print the N top kernels")
    p.add_argument(
        "--trace", default="", metavar="FOLDER", help="keep the profiles there: arm0_rank0.json.gz"
    )
    p.add_argument("--out", default="", help="write the rows here as JSON")
    args = p.parse_args()
    if args.show:
        rows = [row for file in args.show for row in json.loads(Path(file).read_text())]
        print(profile_table(rows))
        return
    if not args.data:
        p.error("--data DIR")
    if args.trace and not args.profile:
        p.error("--trace keeps what --profile N records")
    T.set_environment()
    rows = []
    for number, arm in enumerate(args.arms):
        rows.append(measure(arm, number, args))
        if args.out and int(os.environ.get("RANK", 0)) == 0:  # now: a later arm may be cut
            Path(args.out).write_text(json.dumps(rows, indent=1))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    world = T.World.start()
    if world.main:
        for r in rows:
            rates = "  ".join(
                f"{w}: {r['ms'][w]:.1f} ms {v:,.0f}/s" for w, v in r["tokens_per_s"].items()
            )
            host = f"host {r['host_ms']['step']:.1f} ms a step, {r['host_ms']['batch']:.1f} a batch"
            begin = f"{r['arm']:28s} warm-up {r['compile_s']:.0f} s  {r['peak_gb']:.1f} GB"
            print(f"{begin}  {rates}  {host}")
            for tokens, ms in r["also"].items():
                each = "  ".join(f"{w}: {v:.1f} ms" for w, v in ms.items())
                rate = 1000 * tokens * len(ms) / sum(ms.values())
                print(f"  steps of {tokens:,} tokens  {each}  by equal shares {rate:,.0f}/s")
        if any("kinds" in row for row in rows):
            print(profile_table(rows))
    world.close()


if __name__ == "__main__":
    main()
