"""Where a training step's time goes, on any GPU: `python tests/bench_step.py --data DIR`.

For each arm: seconds of warm-up (compilation), ms a step and tokens/s at some long windows, peak
memory; with --profile, also the GPU time of one step by kind of kernel. Not a test: it asserts
nothing and prints what it measures.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T

KINDS = (
    ("attention forward", r"flex_attention(?!.*backward)"),
    ("attention backward", r"flex_attention.*backward|flex_attention_backward"),
    ("what selective attention takes, running sums", r"cumsum|scan_outer"),
    ("cross-entropy", r"triton_.*(exp_|_log_|gather)"),
    ("FP8 matmul", r"nvjet_sm90_q|e4m3|e5m2"),
    ("matmul", r"gemm|cutlass|cublas|nvjet|sm90_xmma"),
    ("Adam", r"adam|multi_tensor"),
    ("embedding gradient", r"index_put|embedding_dense"),
    ("fused pointwise and reductions", r"triton_"),
    ("copies and fills", r"memcpy|memset|copy_|fill|FillFunctor"),
)


def kind_of(kernel: str) -> str:
    return next((k for k, pattern in KINDS if re.search(pattern, kernel, re.I)), "other")


def build(arm: str, args) -> T.Trainer:
    stage = T.Stage(1.0, args.tokens, 1.0, (args.windows[-1], args.windows[-1]))
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


def profile(trainer: T.Trainer, top: int) -> None:
    batch = next(iter(trainer.default_batches(trainer.steps[:2], trainer.cfg, trainer.world)))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as p:
        trainer.train_step(trainer.steps[0], batch)
        trainer.world.synchronize()
    sums, names = collections.Counter(), collections.Counter()
    for event in p.key_averages():
        ms = event.self_device_time_total / 1000
        sums[kind_of(event.key)] += ms
        names[(event.key[:90], event.count)] += ms
    total = sum(sums.values())
    print(f"GPU time of one step by kind, {total:.1f} ms:")
    for name, ms in sums.most_common():
        print(f"  {name:34s} {ms:8.2f} ms {ms / total:6.1%}")
    for (name, count), ms in names.most_common(top):
        print(f"  {ms:8.2f} ms x{count:<5d} {name}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True, help="folder of token shards")
    p.add_argument("--arms", nargs="+", default=["softmax"])
    p.add_argument("--preset", default="speedrun")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    p.add_argument("--tokens", type=int, default=393_216, help="tokens a step")
    p.add_argument("--steps", type=int, default=5, help="steps timed at each window")
    p.add_argument("--windows", type=int, nargs="+", default=[384, 896, 1408], help="tokens")
    p.add_argument("--profile", type=int, default=0, metavar="N", help="print the N top kernels")
    p.add_argument("--out", default="", help="write the rows here as JSON")
    args = p.parse_args()
    rows = []
    for arm in args.arms:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer = build(arm, args)
        trainer.warm_up()
        ms = {w: round(timed(trainer, w, args.steps), 2) for w in args.windows}
        peak = torch.cuda.max_memory_allocated() / 1e9 if trainer.world.cuda else 0.0
        rows.append({"arm": arm, "compile_s": round(trainer.compile_s, 1), "peak_gb": peak})
        rows[-1] |= {"ms": ms, "tokens_per_s": {w: args.tokens / v * 1000 for w, v in ms.items()}}
        if args.profile:
            profile(trainer, args.profile)
        print(json.dumps(rows[-1]), flush=True)
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for r in rows:
        rates = "  ".join(
            f"{w}: {r['ms'][w]:.1f} ms {v:,.0f}/s" for w, v in r["tokens_per_s"].items()
        )
        print(f"{r['arm']:28s} warm-up {r['compile_s']:.0f} s  {r['peak_gb']:.1f} GB  {rates}")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
