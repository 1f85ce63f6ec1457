"""Runs that never ran: logs with known effects, for tests of statistics, summaries, plots and the
leaderboard.

    fake_run(folder, "b01_softmax", arm="softmax", seed=0, block=1, final=3.50, ms=100.0)
    fake_comparison(folder, {"softmax": (3.50, 100.0), "diff_v2": (3.49, 110.0)}, blocks=3)

A log has the lines, fields, rounding and hash chain of train_gpt.py's Run on one H100: its steps
are `T.plan_steps` of a real config, its data and counts of targets are open text's of
records/tracks.json, and its times and losses follow from each other, so that a verifier is content.
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from helpers import ROOT, T

SITTING = "20260101T000000Z"
BUDGET = 39_321_600  # 150 steps of the default stages; also whole steps at 60, 80 and 120 %
DEV_GAP = 0.02  # dev_loss - val_loss_ext, nats a token
WINDOW_GAP = 0.004  # val_loss - val_loss_ext
END_NATS = 4.0  # of an end-of-text target
WATTS = 650.0
ENV = {
    **{"python": "3.12.3", "torch": "2.11.0+cu130", "host": "node-1", "cpu_threads": 16},
    **{"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.95.05", "triton": "3.6.0", "count": 1},
    "cuda": "13.0",
}
SIZES = {  # of the preset `plain`: active_matmul, attention, FLOPs a token at 1,024 and 512 keys
    "softmax": (121_208_832, 25_952_256, 793_313_280.0),
    "diff_v1": (121_211_648, 25_956_480, 826_360_320.0),
    "diff_v2": (121_259_520, 26_003_010, 859_677_696.0),
    "diff_v2,form=light+": (121_234_176, 16_245_537, 793_465_344.0),
    "diff_v2,form=full": (127_747_584, 32_491_074, 898_606_080.0),
    "softmax,mlp=3456": (127_696_896, 25_952_256, 832_241_664.0),
}


@functools.cache
def open_text() -> dict:
    """The track's row: digests of shards, counts of targets."""
    return json.loads((ROOT / "records" / "tracks.json").read_text())["open-text"]


@functools.cache
def digest(path: Path) -> str:
    return T.sha256(path)


def sources(arm: str) -> dict[str, Path]:
    """The files that would run."""
    files = {"trainer": ROOT / "train_gpt.py"}
    if ".py:" in arm:
        files["arm"] = Path(arm.partition(".py:")[0] + ".py")
    return files


def slug(arm: str) -> str:
    """An arm in a run's name."""
    return arm.rpartition("/")[2].replace(".py:", "-")


def make_header(cfg: T.Config, steps: list[T.Step], labels: dict) -> dict:
    arm, trained = cfg.model.arm, steps[-1].end
    source = {name: digest(path) for name, path in sources(arm).items()}
    active, attention, flops = SIZES.get(arm, SIZES["softmax"])
    data = open_text()["data"]
    have = sum(d["tokens"] for d in data if d["split"] == "train")
    return {
        **{"schema": T.SCHEMA, "run_id": cfg.run.run_id, "arm": arm, "preset": cfg.preset},
        **{"track": cfg.run.track, "labels": labels, "seed": cfg.run.seed},
        **{"data_seed": cfg.data.data_seed, "argv": ["train_gpt.py", "--arm", arm]},
        **{"config": cfg.flat(), "source_sha256": source, "git": None, "env": ENV},
        "data": data,
        "params": {"active_matmul": active, "stored": active + 38_633_498, "attention": attention},
        **{"flops_per_token": flops, "peak_flops": 989.4e12, "world": 1},
        **{"fp8": True, "fa4": False, "mlp_kernel": False, "mlp_fp8": False},
        "loss_kernel": False,
        **{"dtype": "bfloat16", "compile_s": 78.5, "steps": len(steps)},
        **{"tokens": trained, "distinct": min(trained, have), "repeated": max(0, trained - have)},
    }


def by_position(split: str, loss: float, row: int) -> dict[str, float]:
    """Losses that fall with the position and whose mean over the track's targets is `loss`."""
    counts = open_text()["slices"][split]["by_position"][str(row)]
    names = [f"{a}-{b}" for a, b in zip((0, *T.EDGES), (*T.EDGES, ""))]
    falls = [0.3 * 0.5**i for i in range(len(counts))]
    mean = sum(c * f for c, f in zip(counts, falls)) / sum(counts)
    return {n: loss + f - mean for n, f, c in zip(names, falls, counts) if c}


def look(split: str, loss: float, window: int, row: int) -> dict:
    """What `evaluate` says of a split beside its loss."""
    counts = open_text()["slices"][split]
    text = loss * counts["targets"] - END_NATS * counts["ends"]
    return {
        "bpb": text / math.log(2) / counts["text_bytes"],
        **{"targets": counts["targets"], "window": window},
        "by_position": by_position(split, loss, row),
    }


def write_looks(log: T.RunLog, cfg: T.Config, at: T.Step, loss: float, where: dict, last: bool):
    """The dev line of a look, and at the end val's; `loss` is the val_loss_ext at that place."""
    row, dev = cfg.data.val_row_tokens, loss + DEV_GAP
    said = look("dev", dev, at.window, row)
    log.write("val", **where, split="dev", dev_loss=dev, **said)
    if last and cfg.run.final_val:
        losses = {"val_loss": loss + WINDOW_GAP, "val_loss_ext": loss}
        said = look("val", loss, at.window, row) | {"ext_window": cfg.schedule.ext_window}
        log.write("val", **where, split="val", **losses, **said)


def write_steps(
    log: T.RunLog, cfg: T.Config, steps: list[T.Step], final: float, ms: float, first_ms: float
) -> float:
    """Step and val lines; the training seconds."""
    n, total = len(steps), steps[-1].end
    looks = {round(n * (i + 1) / cfg.run.looks) for i in range(cfg.run.looks)}
    noise = random.Random(f"{cfg.run.seed} {cfg.model.arm} {total}")
    seconds, stage = 0.0, -1
    for s in steps:
        took = ms * s.tokens / steps[0].tokens + (first_ms if s.stage != stage else 0.0)
        seconds, stage, done = seconds + took / 1000, s.stage, s.end
        loss = min(final + 1.1 * ((done / total) ** -0.35 - 1), 10.8)  # nan stays nan
        log.write(
            "step",
            **{"step": s.index + 1, "loss": round(loss + noise.gauss(0, 0.02), 6)},
            **{"tokens": done, "train_s": round(seconds, 4), "ms": round(took, 3)},
            **{"stage": s.stage, "lr": round(s.lr, 6), "window": s.window},
            **{"grad_norm": float(f"{0.4 + 0.1 * noise.random():.6g}"), "mfu": 0.41},
            **({"candidates": s.candidates} if s.candidates else {}),
        )
        if s.index + 1 in looks | {n}:
            where = {"step": s.index + 1, "tokens": done, "train_s": round(seconds, 3)}
            write_looks(log, cfg, s, loss, where, last=s.index + 1 == n)
    return seconds


def fake_run(
    folder: Path | str,
    run_id: str,
    *,
    arm: str = "softmax",
    seed: int = 0,
    data_seed: int = 0,
    block: int = 1,
    order: int = 0,
    sitting: str = SITTING,
    tokens: int = BUDGET,
    final: float = 3.5,
    ms: float = 100.0,
    first_ms: float = 0.0,
    fraction: int = 100,
    preset: str = "plain",
    track: str = "open-text",
    final_val: bool = True,
    stages: str = "",
    **header_overrides,
) -> Path:
    """Writes FOLDER/RUN_ID/run.jsonl, a finished run of one H100; returns FOLDER/RUN_ID.

    `tokens` is the budget of this very run (a `fraction` is a label only); `final` its val_loss_ext
    (dev_loss is DEV_GAP higher, val_loss WINDOW_GAP); `ms` a step of the first stage takes, later
    stages in proportion to their tokens, so that tokens/s is the same throughout, plus `first_ms`
    for the first step of each stage. `stages`: instead of the preset's. `header_overrides` replace
    keys of the header; a dict is merged with what is there: `env={"host": "node-2"}`. For an
    unfinished run drop its last line.
    """
    cfg = T.make_config(
        preset,
        **{"arm": arm, "seed": seed, "data_seed": data_seed, "tokens": tokens, "track": track},
        **{"run_id": run_id, "out": "runs", "data": "tokens", "final_val": final_val},
    )
    if stages:
        cfg = cfg.with_(stages=T.parse_value("stages", stages))
    steps = T.plan_steps(cfg, tokens)
    labels = {"sitting": sitting, "block": block, "order": order, "fraction": fraction}
    header = make_header(cfg, steps, labels)
    for name, value in header_overrides.items():
        header[name] = {**header[name], **value} if isinstance(value, dict) else value
    log = T.RunLog(Path(folder) / run_id, active=True)
    log.write("header", **header)
    seconds = write_steps(log, cfg, steps, final, ms, first_ms)
    end = {
        **{"status": "done", "code": 0, "train_s": round(seconds, 3), "compile_s": 78.5},
        **{"door_s": round(seconds + 78.5 + 30, 2), "tokens": header["tokens"]},
        "tokens_per_s": round(header["tokens"] / seconds, 1),
        **{"peak_alloc": 35_700_000_000, "peak_reserved": 41_200_000_000},
        "joules": WATTS * seconds,
    }
    log.write("end", **end)
    return log.folder


def fake_comparison(
    folder: Path | str,
    arms: dict[str, tuple[float, float]],
    *,
    blocks: int = 3,
    fractions: Iterable[int] = (100,),
    tokens: int = BUDGET,
    slope: float = -0.3,
    block_sd: float = 0.003,
    noise_sd: float = 0.0,
    sittings: tuple[str, ...] = (SITTING,),
    kind: str = "screen",
    plan: dict | None = None,
    **run,
) -> Path:
    """Fills FOLDER as `compare` does: claim.json, code/, a run for each block, fraction and arm.

    arms: {arm: (val_loss_ext at 100 % of `tokens`, ms a step of the first stage)}; the first is the
    baseline. A run's final loss = its arm's + slope ln(fraction / 100) + a number that the block's
    runs share (block_sd) + its own noise (noise_sd), all from fixed seeds. Blocks go to `sittings`
    in turn, in equal shares. plan: None, or changes to the plan.json of exactly these runs ({} for
    none). `run` goes to `fake_run`.
    """
    folder, names, fractions = Path(folder), list(arms), list(fractions)
    shared, own = random.Random(f"blocks {block_sd}"), random.Random(f"noise {noise_sd}")
    trained = {}
    for b in range(1, blocks + 1):
        level = shared.gauss(0, block_sd)
        for f in fractions:
            for order, (arm, (loss, ms)) in enumerate(arms.items()):
                final = loss + slope * math.log(f / 100) + level + own.gauss(0, noise_sd)
                where = {"block": b, "seed": b - 1, "order": order, "fraction": f}
                where["sitting"] = sittings[(b - 1) * len(sittings) // blocks]
                name = f"b{b:02d}_{slug(arm)}" + (f"_f{f}" if len(fractions) > 1 else "")
                mine = {"arm": arm, "tokens": tokens * f // 100, "final": final, "ms": ms}
                path = fake_run(folder, name, **mine, **where, **run)
                if f not in trained:
                    with (path / "run.jsonl").open() as lines:
                        trained[f] = json.loads(next(lines))["tokens"]
    (folder / "code").mkdir(exist_ok=True)
    for path in {path for arm in names for path in sources(arm).values()}:
        shutil.copy(path, folder / "code")
    claim = {
        **{"kind": kind, "title": f"{' and '.join(names)}, made up", "track": "open-text"},
        **{"date": "2026-01-01", "arms": names, "metric": "val_loss_ext", "target": None},
        **{"baseline": names[0] if len(names) > 1 else None, "by": ["a test"]},
    }
    (folder / "claim.json").write_text(json.dumps(claim, indent=1) + "\n")
    if plan is not None:
        said = make_plan(claim, trained, blocks, run.get("preset", "plain")) | plan
        (folder / "plan.json").write_text(json.dumps(said, indent=1) + "\n")
    return folder


def make_plan(claim: dict, trained: dict[int, int], blocks: int, preset: str) -> dict:
    """plan.json of a comparison: every arm against the baseline."""
    others = [arm for arm in claim["arms"] if arm != claim["baseline"]]
    return {
        **{"name": "made-up", "created": "2025-12-31T00:00:00Z", "track": claim["track"]},
        **{"preset": preset, "arms": claim["arms"], "baseline": claim["baseline"]},
        **{"tokens": list(trained.values()), "fractions": list(trained), "blocks": blocks},
        **{"seeds": list(range(blocks)), "data_seeds": [0] * blocks, "metric": claim["metric"]},
        "rule": {
            **{"test": "paired t, one-sided", "alpha": 0.01, "alternative": "less"},
            **{"threshold": 0.0, "compare": [[arm, claim["baseline"]] for arm in others]},
        },
        "source_sha256": {"train_gpt.py": digest(ROOT / "train_gpt.py")},
    }
