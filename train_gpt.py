"""train_gpt.py: train a GPT-2-small-class model fast, with softmax or differential attention.

One file, one process a GPU: torch.compile, FlexAttention with causal x document x sliding-window
block masks, Muon for matrices and Adam for the rest (sharded over ranks), an FP8 language-model
head. Attention is a switch (`--arm softmax | diff_v1 | diff_v2,form=light+ | mine.py:Class`), so
that two arms differ in nothing else. What has been measured stands in README.md and records/; the
record there, with `--attention fa4`: 3.079 on open text after 205 s of training on one H100.

    python train_gpt.py --preset speedrun --data DIR             # one GPU, an H100
    torchrun --standalone --nproc-per-node 8 train_gpt.py --preset r28 --data DIR   # eight
    python train_gpt.py --preset demo --data DIR                 # a CPU, in minutes
    python train_gpt.py --help                                   # every knob, with its unit

Sections: 1 Config, 2 World, 3 FP8 and the head's loss, 4 Attention, 5 GPT, 6 Optimizer, 7 Data,
8 Run folder, 9 Process, 10 Train (the loop is `Run.loop`), 11 Kernels. Nothing runs at import;
every piece can be used alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.optim.adamw import adamw

try:  # for section 11 alone
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

SCHEMA = 1  # of run.jsonl and meta.json
HERE = Path(__file__).resolve().parent
IMPORTED_AT = time.time()


class InputError(ValueError):
    """What the user gave cannot be run; the message says what to do. Exit code 2."""


# ---- 1. Config ----------------------------------------------------------------------------------


def knob(default, help: str):
    """A dataclass field that becomes a command-line flag with this help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """What is computed. Every field is also a key of an arm, `softmax,mlp=3456,mlp_layers=0+4`, as
    are OptimConfig's and those of ARM_ALSO: so compare can take away or add any idea."""

    arm: str = knob(
        "softmax",
        "attention: softmax | diff_v1 | diff_v2 | selective | path.py:Class, then ,key=value",
    )
    form: str = knob("matched", "diff_v2: matched (4 d^2) | full (5 d^2) | light | light+")
    layers: tuple[int, ...] = knob((), "layers that have the arm, softmax elsewhere (empty: all)")
    mlp: int = knob(0, "width of the MLP in mlp_layers, units (0: 4 x d_model)")
    mlp_layers: tuple[int, ...] = knob((), "layers with that width (empty: those of the arm)")
    lambda_bias: float = knob(0.0, "diff_v2: lambda starts at sigmoid(this)")
    window2: int = knob(0, "diff_v2: window of the second map, tokens (0: the layer's own)")
    selective: bool = knob(
        False, "diff_v2: tokens mask earlier ones for later ones, as in the arm selective"
    )
    selective_grad: str = knob(
        "flex", "selective, its own gradient on a GPU: flex (atomic adds) | chunked (PyTorch)"
    )
    n_layer: int = knob(12, "number of blocks")
    d_model: int = knob(768, "width of the residual stream")
    n_head: int = knob(6, "heads of the softmax arm; the other arms derive theirs")
    head_dim: int = knob(128, "dimension of a head")
    qk_dim: int = knob(
        0, "width of its queries and keys, a divisor of head_dim (record 92: 64; 0: head_dim)"
    )
    vocab: int = knob(0, "tokens in the vocabulary (0: as the data says)")
    no_attention: tuple[int, ...] = knob((7,), "blocks without attention (record 17)")
    long_layers: tuple[int, ...] = knob((0, 4, 11), "blocks with the long window, half elsewhere")
    qk_norm: bool = knob(True, "RMS norm of q and k over the head, before RoPE (record 5)")
    rope: bool = knob(True, "rotary positions")
    half_rope: bool = knob(True, "rotate half of each head, base 1024 (record 17)")
    score_scale: float = knob(0.0, "factor on q.k (0: 15.36 / qk_dim, or its -1/2 power bare)")
    softcap: float = knob(30.0, "logits = c sigmoid(4 z / c) (record 18; 0: off)")
    shifted_cap: bool = knob(False, "logits = 23 sigmoid((z + 5) / 7.5) instead (record 54)")
    tie: bool = knob(
        False, "head and embedding start as one matrix, with the head's lr (record 51); see --untie"
    )
    x0: bool = knob(True, "x <- a x + b x0 before each block (record 9)")
    skip: tuple[int, ...] = knob((4, 7), "from+to: output of one block joins a later (empty: off)")
    backout: int = knob(7, "block whose output the head subtracts, learned (record 40; -1: off)")
    value_tables: int = knob(3, "value embeddings, first and last n blocks (record 14; 0: off)")
    smear: bool = knob(False, "a gated share of the embedding of the token before (record 34)")
    value_layers: tuple[int, ...] = knob(
        (), "blocks with a value embedding of their own, instead of those (record 63)"
    )
    value_gate: bool = knob(False, "a gate on each head's value embedding (record 55)")
    gate: bool = knob(True, "a sigmoid gate on each head's output (record 28)")
    xsa: bool = knob(False, "take the own value out of each head's output (2603.09078)")
    key_offset: bool = knob(
        False, "long layers: the unrotated half of a key is the token before's (record 49)"
    )
    paired: tuple[int, ...] = knob(
        (), "softmax layers whose heads see a partner's keys, half as far back (record 58: short)"
    )
    ngram: int = knob(
        0, "rows of a table looked up by pairs and triples of tokens (record 92: many; 0: off)"
    )
    copy: bool = knob(
        False, "a pointer to the document's last 2,048 tokens (in use 16,384), beside the softmax"
    )
    bias: bool = knob(False, "biases in projections (variants/gpt2.py)")


@dataclass(frozen=True)
class OptimConfig:
    """One table of parameter groups is made of these (`parameter_groups`)."""

    matrix_lr: float = knob(0.03, "Muon, block matrices; times sqrt(max(1, rows / cols))")
    matrix_wd: float = knob(0.0, "Muon, decoupled weight decay, 1 / lr")
    cautious_wd: float = knob(
        0.0, "Muon, decay where the update agrees, 1 / lr^2 (record 43: 1.2; 0: off)"
    )
    normuon: float = knob(0.0, "Muon, beta2 of its rows' mean squares (record 41: 0.95; 0: off)")
    momentum: float = knob(0.95, "Muon")
    momentum_start: float = knob(0.85, "Muon at step 0, and at the end after momentum_cooldown")
    momentum_warmup: int = knob(300, "steps from momentum_start to momentum")
    momentum_cooldown: int = knob(50, "last steps, back to momentum_start")
    muon_dtype: str = knob("auto", "orthogonalisation in: auto | float16 | float32")
    head_lr: float = knob(0.008, "Adam, language-model head")
    embed_lr: float = knob(0.6, "Adam, token embedding")
    value_lr: float = knob(0.6, "Adam, value embeddings")
    scalar_lr: float = knob(0.04, "Adam, residual scalars")
    gate_lr: float = knob(0.008, "Adam, gates and lambda")
    adam_eps: float = knob(1e-10, "Adam, as the gradients of a zero head are tiny (record 20)")
    adam_every: int = knob(1, "Adam, steps whose gradients make one update (record 39: 2)")
    adam_wd: float = knob(0.0, "Adam, decoupled weight decay, 1 / lr")
    head_betas: tuple[float, ...] = knob(
        (0.8, 0.95), "Adam, head and token embedding, beta1+beta2 (record 57: 0.5+0.95)"
    )
    value_betas: tuple[float, ...] = knob(
        (0.8, 0.95), "Adam, value embeddings (record 57: 0.75+0.95)"
    )
    scalar_betas: tuple[float, ...] = knob(
        (0.8, 0.95), "Adam, residual scalars (record 52: 0.9+0.99)"
    )
    cautious_adam_wd: float = knob(
        0.0, "Adam, as cautious_wd: x 150 head and tied embedding, x 5 tables (record 50: 0.005)"
    )
    grad_clip: float = knob(0.0, "largest norm of the whole gradient (0: off)")
    tail: float = knob(
        0.0, "share of the steps, at the end, over which weights are averaged (record 92; 0: off)"
    )
    tail_every: int = knob(4, "tail: steps from one sample of the weights to the next")
    tail_blend: float = knob(0.5, "tail: share of the samples' mean in the final weights")


@dataclass(frozen=True)
class Stage:
    """A row of the schedule: share of the steps, tokens a step, lr factor, long window from-to,
    candidates of the training loss (`candidate_set`; 0: the whole vocabulary)."""

    share: float
    tokens: int
    lr: float
    window: tuple[int, int]
    candidates: int = 0

    def __str__(self) -> str:
        text = f"{self.share}:{self.tokens}:{self.lr}:{self.window[0]}-{self.window[1]}"
        return f"{text}:{self.candidates}" if self.candidates else text

    @classmethod
    def parse(cls, text: str) -> Stage:
        share, tokens, lr, window, *rest = text.split(":")
        first, _, last = window.partition("-")
        (candidates,) = rest or ("0",)
        limits = (int(first), int(last or first))
        return cls(float(share), int(tokens), float(lr), limits, int(candidates))


@dataclass(frozen=True)
class ScheduleConfig:
    """What `plan_steps` makes the table of steps of."""

    stages: tuple[Stage, ...] = knob(
        (
            Stage(1 / 3, 131_072, 1.0, (128, 640)),
            Stage(1 / 3, 262_144, 1.52, (640, 1216)),
            Stage(1 / 3, 393_216, 1.73, (1216, 1792)),
        ),
        "share:tokens a step:lr factor:window-window[:classes that the training loss is over, all "
        "by default (record 92: 10240, then more, then all)], joined by + (record 46)",
    )
    tokens: int = knob(0, "tokens to train (0: the preset's most, or one pass where that is less)")
    most_tokens: int = knob(666_501_120, "what --tokens 0 means where there is enough text")
    passes: int = knob(1, "how often the train text may be read")
    warmup: float = knob(0.0, "share of the steps in which lr rises from 0")
    cooldown: float = knob(0.45, "share of the steps in which lr falls to lr_floor, linearly")
    lr_floor: float = knob(0.1, "lr factor that the cooldown falls to")
    untie: float = knob(2 / 3, "with --tie: share of the steps after which they part (record 53)")
    ext_window: int = knob(2560, "long window of val_loss_ext, tokens (0: as trained)")


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in rows and calls of which length."""

    data: str = knob("", "folder of token shards (manifest.json, or *train*.bin and *val*.bin)")
    dev: str = knob("", "a shard to choose by, where the manifest names none")
    row_tokens: int = knob(16_384, "tokens in a row; a step has at least 8 rows, else shorter ones")
    micro_batch_tokens: int = knob(65_536, "tokens in a kernel call: halve it when memory is out")
    val_row_tokens: int = knob(262_144, "tokens in a validation row")
    val_call_tokens: int = knob(262_144, "tokens in a validation call")
    val_tokens: int = knob(10_485_760, "validation targets at most")
    dev_tokens: int = knob(1_835_008, "dev targets at most")
    data_seed: int = knob(0, "order of documents and shards (0: as in the files)")


@dataclass(frozen=True)
class RunConfig:
    """Where and with which kernels it runs, and what it leaves in its folder."""

    seed: int = knob(0, "of every tensor, together with its name")
    device: str = knob("auto", "auto | cuda | cpu")
    dtype: str = knob("auto", "activations: auto | bfloat16 | float32")
    fp8: bool = knob(True, "FP8 head where the GPU has it, a loud fall-back where not")
    compile: bool = knob(True, "torch.compile, outside the clock")
    mlp_kernel: bool = knob(True, "fused MLP (record 59) on Hopper, a loud fall-back elsewhere")
    mlp_fp8: str = knob(
        "", "FP8 in the fused MLP: forward (looks and val too; 84, 89) | both: dx in FP8 as well"
    )
    loss_kernel: bool = knob(True, "fused loss of the FP8 head (records 60, 67), likewise")
    attention: str = knob(
        "flex",
        "kernels: flex | fa4 (FlashAttention-4 on Hopper, softmax and diff_v2, heads of 128)",
    )
    cuda_graphs: bool = knob(
        False,
        "a training call's kernels launched as one CUDA graph (record 92), under fa4 one for each "
        "window; keeps a call's memory",
    )
    deterministic: bool = knob(False, "same bits in every run on one GPU, 5 % slower on an H100")
    looks: int = knob(8, "dev_loss evaluations on the way, at most 20")
    final_val: bool = knob(True, "evaluate val once, at the end")
    out: str = knob("runs", "folder of run folders")
    run_id: str = knob("", "name of the run folder (default: made from preset, arm, seed, time)")
    save_every: int = knob(0, "steps between checkpoints (0: none but the last)")
    save_final: bool = knob(True, "a checkpoint at the end")
    keep: int = knob(2, "checkpoints kept")
    resume: str = knob("", "run folder or checkpoint to go on from")
    track: str = knob("", "leaderboard track, for the record")
    require_gpu: bool = knob(False, "refuse to start without one, unless --device is cpu")

    @property
    def wanted_device(self) -> str:
        """auto | cuda | cpu"""
        return "cuda" if self.require_gpu and self.device == "auto" else self.device


@dataclass(frozen=True)
class Config:
    """All settings of a run, in parts; no two of these have a field of one name."""

    preset: str = "r28"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def with_(self, **changes) -> Config:
        """A copy with fields of any part changed by name: `cfg.with_(arm="diff_v2", seed=3)`."""
        parts = {name: {} for name in PARTS}
        for key, value in changes.items():
            if key == "preset":
                continue
            if key not in FLAGS:
                raise InputError(f"there is no setting {key!r}")
            parts[FLAGS[key][0]][key] = value
        new = {p: dataclasses.replace(getattr(self, p), **kv) for p, kv in parts.items() if kv}
        return dataclasses.replace(self, preset=changes.get("preset", self.preset), **new)

    def flat(self) -> dict:
        """Every field by name, as plain JSON values; `config_from_flat` is the inverse."""
        out = {"preset": self.preset}
        for name, (part, f) in FLAGS.items():
            value = getattr(getattr(self, part), name)
            out[name] = format_value(value) if f.type.startswith("tuple") else value
        return out


PARTS = {
    "model": ModelConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "data": DataConfig,
    "run": RunConfig,
}
# A field's name -> its part's name, the field.
FLAGS = {f.name: (part, f) for part, cls in PARTS.items() for f in dataclasses.fields(cls)}

PRESETS: dict[str, dict] = {
    "speedrun": {  # for one H100; each idea in LAB_LOG, 2026-11-27 and 28
        **{"normuon": 0.95, "cautious_wd": 1.2, "cautious_adam_wd": 0.005, "matrix_lr": 0.023},
        **{"head_betas": (0.5, 0.95), "value_betas": (0.75, 0.95), "scalar_betas": (0.9, 0.99)},
        **{"adam_every": 2, "tail": 0.25, "cooldown": 0.6, "lr_floor": 0.15, "tie": True},
        **{"smear": True, "shifted_cap": True, "xsa": True, "copy": True, "ngram": 8_388_608},
        **{"value_layers": (0, 1, 8, 9, 10), "value_gate": True},
        **{"key_offset": True, "paired": (1, 2, 5, 9), "qk_dim": 64},
        "stages": (
            Stage(0.4, 32_768, 0.7, (128, 768), 10_240),
            Stage(0.6, 65_536, 1.0, (768, 1792), 14_336),
        ),
        **{"most_tokens": 148_111_360, "ext_window": 0},
        **{"mlp_fp8": "both", "cuda_graphs": True, "require_gpu": True},
    },
    "r28": {"require_gpu": True},  # about record 28's, and what every knob's default is
    "plain": {"require_gpu": True, "gate": False, "value_tables": 0},
    "gpu24": {
        **{"require_gpu": True, "micro_batch_tokens": 16_384},
        **{"val_row_tokens": 65_536, "val_call_tokens": 65_536},
    },
    "demo": {  # learning rates, batch and cooldown from 21 runs of 1.2M bytes, on dev
        **{"n_layer": 4, "d_model": 128, "n_head": 4, "head_dim": 32, "no_attention": ()},
        **{"long_layers": (0, 3), "skip": (), "backout": 2, "value_tables": 1},
        **{"stages": (Stage(1.0, 1024, 1.0, (128, 128)),), "ext_window": 0},
        **{"row_tokens": 128, "micro_batch_tokens": 1024, "val_row_tokens": 128},
        **{"val_call_tokens": 8192, "most_tokens": 3_000_000, "passes": 2},
        **{"matrix_lr": 0.02, "embed_lr": 0.1, "value_lr": 0.1, "momentum_warmup": 100},
        **{"cooldown": 0.8, "compile": False, "device": "cpu", "looks": 3},
    },
}


def format_value(value) -> str:
    if isinstance(value, tuple):
        return "+".join(str(v) for v in value)
    return str(value)


def parse_value(name: str, text: str):
    """One flag's or arm key's text as its field's type; InputError names the flag."""
    kind = FLAGS[name][1].type
    try:
        if kind == "tuple[int, ...]":
            return tuple(int(v) for v in text.split("+") if v)
        if kind == "tuple[float, ...]":
            return tuple(float(v) for v in text.split("+"))
        if kind == "tuple[Stage, ...]":
            return tuple(Stage.parse(v) for v in text.split("+"))
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"int": lambda t: int(t.replace("_", "")), "float": float, "str": str}[kind](text)
    except (ValueError, KeyError, TypeError, AttributeError):  # `--flag=--` is a list to argparse
        wanted = "SHARE:TOKENS:LR:WINDOW[-WINDOW][:CLASSES], joined by +"
        what = wanted if "Stage" in kind else kind
        raise InputError(f"--{name.replace('_', '-')} {text!r} is no {what}") from None


# What an arm may set of RunConfig, beside all of ModelConfig and OptimConfig.
ARM_ALSO = ("fp8", "attention", "mlp_kernel", "mlp_fp8", "loss_kernel", "cuda_graphs")


def parse_arm(spec: str) -> tuple[str, dict]:
    """`NAME[,key=value...]` -> (NAME, fields of Config). Lists are joined by `+`."""
    name, *pairs = spec.split(",")
    keys = {}
    for pair in pairs:
        key, eq, text = pair.partition("=")
        part = FLAGS.get(key, ("",))[0]
        if not eq or key == "arm" or (part not in ("model", "optim") and key not in ARM_ALSO):
            raise InputError(f"arm {spec!r}: {pair!r} is no key=value of model or optimizer")
        keys[key] = parse_value(key, text)
    return name, keys


def make_config(preset: str = "r28", **changes) -> Config:
    """Defaults, the preset, `changes`, then what the arm's own keys say; not yet checked."""
    if preset not in PRESETS:
        elsewhere = "; gpt2 is that of variants/gpt2.py"
        raise InputError(f"no preset {preset!r}: choose from {', '.join(PRESETS)}{elsewhere}")
    cfg = Config(preset=preset).with_(**{**PRESETS[preset], **changes})
    name, keys = parse_arm(cfg.model.arm)
    cfg = leave_out(cfg.with_(**keys), name, given={*changes, *keys})
    if name == "diff_v2" and cfg.model.form == "light+" and not cfg.model.mlp and "mlp" not in keys:
        cfg = cfg.with_(mlp=light_plus_mlp(cfg.model))
    return cfg


def leave_out(cfg: Config, name: str, given: set[str]) -> Config:
    """Without what the preset alone asks for and an arm of that name cannot have. What was `given`
    stays, and check_config refuses it."""
    m = cfg.model
    if name != "softmax" and "paired" not in given:
        cfg = cfg.with_(paired=tuple(i for i in m.paired if not has_arm(m, i)))
    if name not in ("softmax", "selective", "diff_v2") and "qk_dim" not in given:
        cfg = cfg.with_(qk_dim=0)
    if name == "diff_v1" and "xsa" not in given:
        cfg = cfg.with_(xsa=False)
    return cfg


def light_plus_mlp(m: ModelConfig) -> int:
    """Width of light+'s MLP, which has the attention parameters that `light` saves in its layers:
    d^2 of values and outputs and, where they are as wide, d^2 / 2 of queries and keys."""
    qk = m.d_model * (m.qk_dim or m.head_dim) // (2 * max(1, m.head_dim))
    return 4 * m.d_model + (m.d_model + qk) // 2


# Settings that older checkpoints and logs have: what they were when off. None: it did not matter.
DELETED = {"mtp": False, "fused_update": None, "compile_ahead": None, "bigram": 0, "bigram_dim": 0}
DELETED |= {"token_shares": False, "mudd": False, "attention_from": -1, "selector": "1"}


def without_deleted(flat: dict, source: str | Path) -> dict:
    """A saved `Config.flat` less the settings that are gone; InputError where one was on. mlp_fp8
    was a switch, for the way forward."""
    for name, off in DELETED.items():
        if off is not None and flat.get(name, off) != off:
            said = f"{source} has {name} {flat[name]!r}, which was deleted since"
            raise InputError(f"{said}: use the train_gpt.py that it was made with")
    flat = {name: value for name, value in flat.items() if name not in DELETED}
    if isinstance(flat.get("mlp_fp8"), bool):
        flat["mlp_fp8"] = "forward" if flat["mlp_fp8"] else ""
    return flat


def config_from_flat(flat: dict, source: str | Path = "the config") -> Config:
    """The inverse of `Config.flat`, as a checkpoint's meta.json or a log's header holds it.
    InputError, which names `source`, where it turns on what was deleted since."""
    out = {}
    for name, value in without_deleted(flat, source).items():
        if name in FLAGS:
            is_tuple = FLAGS[name][1].type.startswith("tuple")
            out[name] = parse_value(name, value) if is_tuple else value
    return Config(preset=flat["preset"]).with_(**out)


LARGEST = 2**63 - 1  # of any number on the command line: an int64 holds it
LEAST = {"lambda_bias": -LARGEST, "backout": -1}  # of the others: 0
# Sizes that only a slip of the hand is above; of the others: LARGEST.
MOST = {"n_layer": 1024, "d_model": 65_536, "n_head": 1024, "head_dim": 4096}
MOST |= {"mlp": 2**20, "vocab": 2**20}

Need = Callable[[bool, str], None]  # takes note of the sentence where it is not so


def check_config(cfg: Config, world_size: int = 1) -> list[str]:
    """Everything that cannot run, one sentence each; needs neither GPU nor data."""
    bad = []

    def need(ok: bool, message: str) -> None:
        if not ok:  # flags as the command line writes them
            bad.append(re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), message))

    check_numbers(cfg, need)
    check_shape(cfg.model, need)
    check_blocks(cfg.model, need)
    check_arm(cfg.model, need)
    check_selective(cfg, need)
    check_optimizer(cfg.optim, need)
    check_schedule(cfg, world_size, need)
    check_data(cfg.data, need)
    check_run(cfg.run, need)
    check_fa4(cfg, need)
    return bad


def check_numbers(cfg: Config, need: Need) -> None:
    """Every number is finite, none is below the least that it can mean, and no size above MOST."""
    for name, (part, f) in FLAGS.items():
        value = getattr(getattr(cfg, part), name)
        if f.type in ("int", "float"):
            least, most = LEAST.get(name, 0), MOST.get(name, LARGEST)
            end = f"<= {most}" if most < value < math.inf else "finite"
            need(least <= value <= most, f"--{name} {value} must be >= {least} and {end}")


def check_shape(m: ModelConfig, need: Need) -> None:
    """Widths that divide as the model divides them, and what acts on parts of them."""
    need(m.n_layer > 0 and m.d_model > 0 and m.n_head > 0, "layers, width and heads must be > 0")
    need(m.head_dim >= 16 and m.head_dim % 8 == 0, f"--head_dim {m.head_dim}: 16 or more, by 8")
    need(m.d_model % 16 == 0, f"--d_model {m.d_model} must be a multiple of 16")
    fits = m.qk_dim >= 16 and m.qk_dim % 8 == 0 and m.head_dim % m.qk_dim == 0
    need(
        not m.qk_dim or fits,
        f"--qk_dim {m.qk_dim}: a divisor of --head_dim {m.head_dim}, 16 or more, by 8",
    )
    half = m.rope and m.half_rope
    fits = not half or m.head_dim % 4 == 0
    need(fits, f"--half_rope needs --head_dim {m.head_dim} divisible by 4")
    need(half or not m.key_offset, "--key_offset moves what --half_rope leaves unrotated")
    fits = m.ngram % 128 == 0 and m.ngram < 2**31
    need(fits, f"--ngram {m.ngram}: rows by 128, fewer than 2^31")
    need(m.softcap <= 80, f"--softcap {m.softcap}: 80 or less, or exp(-softcap) is 0 in fp32")


def check_blocks(m: ModelConfig, need: Need) -> None:
    """What names blocks names some that are there and, where it matters, have attention."""
    names = ("layers", "mlp_layers", "no_attention", "long_layers", "skip", "value_layers")
    for name in (*names, "paired"):
        over = [i for i in getattr(m, name) if not 0 <= i < m.n_layer]
        need(not over, f"--{name} names block {over}, there are 0 to {m.n_layer - 1}")
    need(m.backout < m.n_layer, f"--backout {m.backout}: the last block is {m.n_layer - 1}")
    for name in ("layers", "value_layers", "paired"):
        without = set(getattr(m, name)) & set(m.no_attention)
        need(not without, f"--{name} names blocks of --no_attention")
    skip = not m.skip or (len(m.skip) == 2 and m.skip[0] < m.skip[1])
    need(skip, "--skip is from+to, from < to")
    paired, name = set(m.paired), parse_arm(m.arm)[0]
    need(not paired or m.n_head % 2 == 0, f"--paired needs an even --n_head, not {m.n_head}")
    apart = name == "softmax" or not any(has_arm(m, i) for i in paired)
    need(apart, f"--paired is for layers with softmax attention, not for those of {name}")
    offset = m.key_offset and paired & set(m.long_layers)
    need(not offset, f"--paired {format_value(m.paired)}: no long layers under --key_offset")
    need(2 * m.value_tables <= m.n_layer, f"--value_tables {m.value_tables}: half the blocks")


def check_arm(m: ModelConfig, need: Need) -> None:
    """An arm that is there, and heads that it can be made of."""
    name, _ = parse_arm(m.arm)
    need(name in ARMS or ".py:" in name, f"no arm {name!r}: {', '.join(ARMS)} or path.py:Class")
    need(m.form in V2_FORMS, f"--form {m.form!r}: choose from {', '.join(V2_FORMS)}")
    if name == "diff_v2":
        need(m.form == "full" or m.n_head % 2 == 0, f"{m.form} needs an even --n_head")
    if name == "diff_v1":
        qk = v1_qk_dim(m)
        need(
            (m.n_head * m.head_dim) % max(1, 2 * qk) == 0,
            f"diff_v1: {m.n_head} heads of {m.head_dim} do not split into pairs of {qk}",
        )
        need(
            not m.qk_dim,
            f"--qk_dim {m.qk_dim}: diff_v1's queries and keys have a width of their own",
        )
        need(not m.xsa, "--xsa: diff_v1 normalises its heads, no own value")


def check_selective(cfg: Config, need: Need) -> None:
    """What the selective arms ask for: rows that can be squared."""
    m, d = cfg.model, cfg.data
    name, _ = parse_arm(m.arm)
    diff = name == "diff_v2" and m.form in V2_FORMS
    need(diff or not m.selective, "--selective is diff_v2's; softmax has the arm selective")
    if name != "selective" and not (diff and m.selective):
        return
    way = m.selective_grad
    need(way in ("flex", "chunked"), f"--selective_grad {way!r}: flex or chunked")
    ordered = way != "flex" or not cfg.run.deterministic
    need(ordered, "--selective_grad flex adds in any order: --deterministic needs chunked")
    for row, call in (("row_tokens", "micro_batch_tokens"), ("val_row_tokens", "val_call_tokens")):
        length, tokens = getattr(d, row), max(getattr(d, row), getattr(d, call))
        if length > SELECTIVE_ROW:
            need(False, f"--{row} {length}: selective arms keep row x row, {SELECTIVE_ROW} at most")
        elif length * tokens >= 2**31:  # FlexAttention counts a bias in 32 bits (pytorch #146724)
            fit = length << ((2**31 - 1) // length**2).bit_length() - 1  # 2^n rows
            said = f"{length * tokens} numbers of row x row, 2^31 are too many"
            need(False, f"--{call} {tokens}: {said}; {fit} would do")


def check_optimizer(o: OptimConfig, need: Need) -> None:
    """Shares, betas and the like within what they can be."""
    need(o.normuon < 1, f"--normuon {o.normuon} must be < 1")
    need(o.adam_every >= 1, f"--adam_every {o.adam_every}: 1 or more")
    clips = o.grad_clip > 0
    need(o.adam_every == 1 or not clips, "--grad_clip is for one step's gradient: --adam_every 1")
    need(o.tail <= 1, f"--tail {o.tail}: a share of the steps, 0 to 1")
    need(o.tail_every >= 1, f"--tail_every {o.tail_every}: 1 or more")
    need(o.tail_blend <= 1, f"--tail_blend {o.tail_blend}: a share, 0 to 1")
    for name in ("head_betas", "value_betas", "scalar_betas"):
        betas = getattr(o, name)
        fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        need(fits, f"--{name} {format_value(betas)}: beta1+beta2, each 0 or more and below 1")
    known = o.muon_dtype in ("auto", "float16", "float32")
    need(known, f"--muon_dtype {o.muon_dtype!r}: auto, float16 or float32")


def check_schedule(cfg: Config, world_size: int, need: Need) -> None:
    """Stages that a run can be planned of, and phases of it that leave room for each other."""
    s = cfg.schedule
    need(len(s.stages) > 0, "--stages is empty")
    need(abs(sum(st.share for st in s.stages) - 1) < 1e-3, "--stages: shares must sum to 1")
    for st in s.stages:
        check_stage(st, cfg.data.row_tokens, world_size, need)
    need(s.warmup + s.cooldown <= 1, "--warmup and --cooldown: together at most 1")
    need(s.untie <= 1, f"--untie {s.untie}: a share of the steps, 0 to 1")


def check_stage(st: Stage, row_tokens: int, world_size: int, need: Need) -> None:
    """One stage, whose steps are whole rows that divide over the ranks."""
    rows, row = step_rows(st.tokens, max(1, row_tokens))
    need(st.tokens > 0 and st.tokens % 8 == 0, f"--stages {st}: tokens by 8")
    need(0 <= st.share <= 1, f"--stages {st}: shares are 0 to 1")
    need(0 <= st.lr < math.inf, f"--stages {st}: the lr factor must be >= 0 and finite")
    need(min(st.window) > 0, f"--stages {st}: windows must be > 0")
    sampled = st.candidates >= 0 and st.candidates % 128 == 0
    need(sampled, f"--stages {st}: candidates by 128, or 0 for the whole vocabulary")
    need(st.tokens == rows * row, f"--stages {st}: tokens are not whole rows of {row}")
    divides = rows % world_size == 0
    need(divides, f"--stages {st}: its {rows} rows do not divide over {world_size} ranks")


def check_data(d: DataConfig, need: Need) -> None:
    """Rows, and calls of whole rows."""
    need(d.row_tokens > 0 and d.val_row_tokens > 0, "--row_tokens and --val_row_tokens must be > 0")
    need(d.micro_batch_tokens > 0, "--micro_batch_tokens must be > 0")
    whole = d.val_call_tokens > 0 and d.val_call_tokens % max(1, d.val_row_tokens) == 0
    need(whole, "--val_call_tokens: whole rows")
    need(min(d.dev_tokens, d.val_tokens) > 0, "--dev_tokens and --val_tokens must be > 0")


def check_run(r: RunConfig, need: Need) -> None:
    """Words that are known, and a folder's name that stays inside --out."""
    need(r.device in ("auto", "cuda", "cpu"), f"--device {r.device!r}: auto, cuda or cpu")
    known = r.dtype in ("auto", "bfloat16", "float32")
    need(known, f"--dtype {r.dtype!r}: auto, bfloat16 or float32")
    need(r.mlp_fp8 in ("", "forward", "both"), f"--mlp_fp8 {r.mlp_fp8!r}: forward or both")
    need(r.attention in ("flex", "fa4"), f"--attention {r.attention!r}: flex or fa4")
    need(r.looks <= 20, f"--looks {r.looks}: at most 20")
    need(r.keep >= 1, "--keep 1 or more")
    plain = re.fullmatch(r"[\w.,=+-]*", r.run_id) and r.run_id not in (".", "..")
    need(bool(plain), f"--run_id {r.run_id!r}: plain names")


def check_fa4(cfg: Config, need: Need) -> None:
    """What FlashAttention-4's kernels ask for, where they are to run."""
    m, r = cfg.model, cfg.run
    if r.attention != "fa4":
        return
    name, _ = parse_arm(m.arm)
    need(name in ("softmax", "diff_v2"), f"--attention fa4 has no {name}: use flex for that arm")
    need(not m.selective, "--attention fa4 has no --selective: use flex")
    need(m.head_dim == 128, f"--attention fa4: heads of 128, not of --head_dim {m.head_dim}")
    need(
        m.qk_dim in (0, 64, m.head_dim),
        f"--attention fa4 has no gradients at --qk_dim {m.qk_dim}: use flex, or --qk_dim 0",
    )
    need(r.device != "cpu", "--attention fa4 runs on a GPU, not on --device cpu")
    need(r.dtype != "float32", "--attention fa4 computes in bfloat16, not in --dtype float32")


def make_parser() -> argparse.ArgumentParser:
    """--preset, and a flag for every field of the config."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = f"{' | '.join(PRESETS)} [speedrun]; the defaults in brackets below are r28's"
    parser.add_argument("--preset", default="speedrun", help=presets)
    for part, cls in PARTS.items():
        group = parser.add_argument_group(part)
        for f in dataclasses.fields(cls):
            flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
            default = format_value(f.default)
            text = f"{text} [{default}]".replace("%", "%%")
            if f.type == "bool":
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            else:
                group.add_argument(flag, metavar=f.type.upper()[:5], help=text)
    return parser


def parse_args(argv: list[str]) -> Config:
    """The command line; raises one InputError that names everything wrong with it at once."""
    args, unknown = make_parser().parse_known_args(argv)
    errors = [f"unknown flag {u!r} (--help lists them)" for u in unknown if u.startswith("-")]
    errors += [f"stray word {u!r}" for u in unknown if not u.startswith("-")]
    changes = {}
    for name in FLAGS:
        value = getattr(args, name)
        if value is not None:
            try:
                changes[name] = value if isinstance(value, bool) else parse_value(name, value)
            except InputError as e:
                errors.append(str(e))
    try:
        cfg = make_config(args.preset, **changes)
    except InputError as e:
        errors.append(str(e))
        changes["arm"] = "softmax"  # what else is wrong is said in the same breath
        cfg = make_config(args.preset, **changes) if args.preset in PRESETS else None
    if cfg is not None:
        errors += check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    if errors:
        raise InputError("; ".join(errors))
    return cfg


def step_rows(tokens: int, row_tokens: int) -> tuple[int, int]:
    """(rows, tokens a row) of a step: rows of `row_tokens`, or 8 shorter ones."""
    row = min(row_tokens, max(1, tokens // 8))
    return tokens // row, row


@dataclass(frozen=True)
class Step:
    """One optimizer step's settings, made from the stages alone."""

    index: int
    stage: int
    tokens: int
    lr: float  # factor on every group's lr
    momentum: float
    window: int  # tokens, long layers
    start: int  # tokens trained before it
    tied: bool = False  # head and embedding are one
    adam: bool = True  # Adam updates; else it keeps the gradient for the next step
    sample: bool = False  # the weights after it count in the tail's mean
    candidates: int = 0  # classes that the loss of a piece is over; 0: all

    @property
    def end(self) -> int:
        """Tokens trained after it."""
        return self.start + self.tokens


def plan_steps(cfg: Config, budget: int) -> list[Step]:
    """The whole run as a table of steps that trains at most `budget` tokens. The long window grows
    linearly within its stage, in multiples of 128 (record 13)."""
    s, o = cfg.schedule, cfg.optim
    counts = count_steps(s.stages, budget)
    total, steps, start = sum(counts), [], 0
    for k, (stage, count) in enumerate(zip(s.stages, counts, strict=True)):
        first, (low, high) = len(steps), stage.window
        for i in range(first, first + count):
            after = total - 1 - i  # steps; the last one updates all and is a sample
            grown = low + (high - low) * ((i - first) / max(1, count - 1))
            step = Step(
                index=i,
                stage=k,
                tokens=stage.tokens,
                lr=lr_at(i, total, stage, s),
                momentum=momentum_at(i, total, o),
                window=math.ceil(grown / 128) * 128,
                start=start,
                tied=cfg.model.tie and i < round(s.untie * total),
                adam=after % o.adam_every == 0,
                sample=after < round(o.tail * total) and after % o.tail_every == 0,
                candidates=stage.candidates,
            )
            steps.append(step)
            start = step.end
    return steps


def count_steps(stages: tuple[Stage, ...], budget: int) -> list[int]:
    """Steps of each stage: as many as the budget has tokens for, dealt out by their shares."""
    whole = sum(st.share for st in stages)  # 1, but for rounding
    shares = np.cumsum([st.share for st in stages]) / whole
    mean = sum(st.share * st.tokens for st in stages) / whole
    total = int(budget / mean + 1e-6)
    while True:
        ends = [round(total * share) for share in shares]
        counts = [end - first for first, end in zip([0, *ends], ends, strict=False)]
        if sum(n * st.tokens for n, st in zip(counts, stages, strict=True)) <= budget:
            return counts
        total -= 1  # rounding may favour the larger stages


def lr_at(i: int, total: int, stage: Stage, s: ScheduleConfig) -> float:
    """Step i's factor on every group's lr: its stage's, in the cooldown linear to the floor
    (records 18-46)."""
    left = (total - i) / max(1, round(s.cooldown * total))  # 1 at the cooldown's first step
    lr = stage.lr if left >= 1 else stage.lr * left + s.lr_floor * (1 - left)
    return lr * min(1.0, (i + 1) / max(1, round(s.warmup * total)))


def momentum_at(i: int, total: int, o: OptimConfig) -> float:
    """Step i's momentum of Muon: it rises from its start, and falls back to it at the end."""
    warm = i / o.momentum_warmup if o.momentum_warmup else 1.0
    cool = (total - i - 1) / o.momentum_cooldown if o.momentum_cooldown else 1.0
    return o.momentum_start + (o.momentum - o.momentum_start) * min(1.0, warm, cool)


# ---- 2. World -----------------------------------------------------------------------------------


PEER_SECONDS = 300  # a collective fails where a rank is missing for so long; compilation counts


@dataclass
class World:
    """Ranks and their collectives, which vanish at world size 1. CUDA and NCCL, or CPU and gloo."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @staticmethod
    def check(device: str) -> None:
        """InputError where a GPU is asked for and there is none."""
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "no NVIDIA GPU here: --preset demo trains in minutes on a CPU; --device cpu takes "
                "any preset there, slowly"
            )

    @classmethod
    def start(cls, device: str = "auto") -> World:
        """Reads torchrun's variables; raises InputError where the device asked for is not there."""
        cls.check(device)
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = device != "cpu" and torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        if gpu and local >= torch.cuda.device_count():
            raise InputError(
                f"rank {local} has no GPU: start {torch.cuda.device_count()} processes"
            )
        where = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(where)
        if size > 1 and not dist.is_initialized():
            limit = datetime.timedelta(seconds=PEER_SECONDS)
            # torchrun's store outlives a restart, and with it the addresses of dead processes.
            store = next(dist.rendezvous("env://", rank, size, timeout=limit))[0]
            store = dist.PrefixStore(f"attempt {restarts()}", store)
            backend = "nccl" if gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        return cls(where, rank, size)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sum(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def reduce_scatter(self, full: Tensor, own: Tensor):
        """own <- this rank's slice of the sum of `full` over ranks; returns a handle to wait on."""
        # torch 2.13 renames the *_tensor collectives, 2.11 and 2.12 lack the new names.
        op = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return op(own, full, async_op=True) if self.size > 1 else None

    def all_gather(self, full: Tensor, own: Tensor):
        """full <- the slices `own` of all ranks in order; returns a handle to wait on."""
        op = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return op(full, own, async_op=True) if self.size > 1 else None

    def gather(self, item) -> list:
        """Each rank's (small, plain) object, in order, on every rank; for what is rare."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- 3. FP8 and the head's loss -----------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HEAD_PIECE = 16_384  # rows of logits at a time: 65,536 x 50,304 would be 6.6 GB in bfloat16
LOSS_SCALE = 65_536.0  # backward runs from this constant times the step's mean loss
W8_SCALE = 2.0**-9  # head weights up to 0.875 (record 28's constant)
G8_SCALE = 2.0**-13  # |dloss / dz| <= 1 a token under the softcap: range 7, smallest normal 7e-9


@torch.library.custom_op("nca::fp8_mm", mutates_args=())
def fp8_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """(scale_a a) @ (scale_b b), [M, K] x [K, N] -> [M, N]: FP8 operands, fp32 accumulation.

    a e4m3 or e5m2, row-major; b e4m3, column-major; all of M, K, N divisible by 16; scales fp32,
    one element each, at a multiple of 16 bytes as cuBLAS wants it of pointers: none of a row of
    scales. `fast` accumulates in fewer bits. torch._scaled_mm takes wrong layouts on some back ends
    without a word, hence the assertions.
    """
    assert a.dtype in (E4M3, E5M2) and b.dtype == E4M3, (a.dtype, b.dtype)
    assert a.is_contiguous() and b.t().is_contiguous(), (a.stride(), b.stride())
    assert all(n % 16 == 0 for n in (*a.shape, b.size(1))), (a.shape, b.shape)
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert not a.is_cuda or scale_a.data_ptr() % 16 == scale_b.data_ptr() % 16 == 0
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=fast
    )


@fp8_mm.register_fake
def _(a, b, scale_a, scale_b, out_dtype, fast):
    return a.new_empty((a.size(0), b.size(1)), dtype=out_dtype)


def to_fp8(x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in FP8, saturating: on a GPU torch's own cast may turn an overflow into NaN."""
    top = torch.finfo(dtype).max
    return (x.float() * (1 / scale)).clamp(-top, top).to(dtype)


@functools.cache
def fp8_works(device: torch.device) -> bool:
    """Whether this GPU multiplies FP8: tried, not looked up."""
    if device.type != "cuda":
        return False
    try:
        one = torch.ones((), device=device)
        a = torch.ones(16, 32, device=device).to(E5M2)
        b = torch.ones(16, 32, device=device).to(E4M3).t()
        return bool((fp8_mm(a, b, one, one, torch.bfloat16, False) == 32).all())
    except (RuntimeError, AssertionError):
        return False


# c, or (top, shift, width) of top x sigmoid((z + shift) / width)
Cap = float | tuple[float, float, float]
SHIFTED_CAP = (23.0, 5.0, 7.5)  # more room for "very unlikely" than for "very likely" (record 54)


def cap_constants(cap: Cap) -> tuple[float, float, float]:
    """(top, shift, width); a number c stands for c sigmoid(4 z / c): slope 1 at 0 (record 19)."""
    return cap if isinstance(cap, tuple) else (cap, 0.0, cap / 4)


def softcap(z: Tensor, cap: Cap) -> Tensor:
    """top sigmoid((z + shift) / width), range (0, top); z itself where cap is 0; fp32."""
    if not cap:
        return z.float()
    top, shift, width = cap_constants(cap)
    return top * torch.sigmoid((z.float() + shift) * (1 / width))


def log_partition(logits: Tensor, cap: Cap) -> Tensor:
    """log sum exp over the last dimension, kept. Logits under a cap need no maximum first, which
    saves a pass over them."""
    if cap:
        top, _, _ = cap_constants(cap)
        return torch.exp(logits - top).sum(-1, keepdim=True).log() + top
    return torch.logsumexp(logits, -1, keepdim=True)


def token_losses(z: Tensor, targets: Tensor, cap: Cap, copied: Tensor | None = None) -> Tensor:
    """Cross-entropy [N] in nats of softcapped logits z [N, V]; 0 where the target is negative.

    copied [N] fp32: log of what the target's probability has beside the softmax's (`Pointer`): the
    loss is -log(p + exp(copied)).
    """
    logits = softcap(z, cap)
    hit = logits.gather(1, targets.clamp(min=0)[:, None])
    losses = (log_partition(logits, cap) - hit)[:, 0]
    if copied is not None:
        losses = -torch.logaddexp(-losses, copied)
    return torch.where(targets >= 0, losses, 0.0)


def losses_and_grad(
    z: Tensor, targets: Tensor, cap: Cap, copied: Tensor | None = None, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(losses [N], d sum(losses) / dz [N, V] fp32), by hand, so that no logits are kept. With
    `copied`, see `token_losses`: the softmax's gradient times its share of the probability. That of
    `copied` is -exp(copied + losses), which is left to the caller. rest: see `Candidates`."""
    logits = softcap(z, cap)
    columns = torch.arange(z.size(1), device=z.device)
    weighed = logits if rest is None else logits + torch.where(columns < rest[0], 0.0, rest[1])
    total = log_partition(weighed, cap)
    targets = targets[:, None]
    valid = targets >= 0
    hit = logits.gather(1, targets.clamp(min=0))
    losses, counts = total - hit, valid.float()
    if copied is not None:
        mixed = torch.logaddexp(-losses, copied[:, None])
        counts = counts * torch.exp(-losses - mixed)
        losses = -mixed
    losses = torch.where(valid, losses, 0.0)[:, 0]
    grad = torch.exp(weighed - total) * counts - torch.where(columns == targets, counts, 0.0)
    if cap:
        top, _, width = cap_constants(cap)
        grad = grad * (logits * (1 / width) * (1 - logits / top))
    return losses, grad


def grad_in(
    z: Tensor,
    targets: Tensor,
    scale: Tensor,
    cap: Cap,
    copied: Tensor | None = None,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """losses_and_grad with scale x grad in z's dtype."""
    losses, g = losses_and_grad(z, targets, cap, copied, rest)
    return losses, (g * scale).to(z.dtype)


def grad_in_fp8(
    z: Tensor, targets: Tensor, cap: Cap, copied: Tensor | None = None, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """losses_and_grad with grad / G8_SCALE in e5m2."""
    losses, g = losses_and_grad(z, targets, cap, copied, rest)
    return losses, to_fp8(g, G8_SCALE, E5M2)


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous()


def stride_of(classes: int) -> int:
    """Without a factor in common with `classes`, and near their golden section: so its multiples
    go through all classes, and any few in a row lie evenly among them."""
    start = round(classes * (math.sqrt(5) - 1) / 2)
    return next(n for n in itertools.count(max(1, start)) if math.gcd(n, classes) == 1)


class Candidates(NamedTuple):
    """The classes that a training softmax is over: the targets' first, then some of the others."""

    ids: Tensor  # [size] int64, all different
    # fp32 [2]: how many are targets'; log of how many classes each of the others stands for, which
    # is added to its capped logit. So the partition function is what all classes would give but for
    # chance, and loss and gradient are of the same objective.
    rest: Tensor


def candidate_set(
    targets: Tensor, classes: int, size: int, turn: int | Tensor
) -> tuple[Candidates, Tensor]:
    """What a softmax over `size` of `classes` ids is over (record 92); the host waits for nothing.

    targets [N] int64 -> (candidates, the targets' places among them [N]). First come the ids that
    are targets, then others, in a fixed order that each turn begins one id further: over turns
    every class is a negative equally often. Of more than `size` different targets those last in
    that order are left out: their tokens get the place -1, no loss, which negative targets have,
    too.
    """
    ids = torch.arange(classes, device=targets.device)
    order = (ids * stride_of(classes) + turn) % classes
    wanted = torch.zeros(classes + 1, dtype=torch.bool, device=targets.device)
    wanted.index_fill_(0, torch.where(targets < 0, classes, targets), True)
    wanted = wanted[order]
    so_far = wanted.cumsum(0)
    place = torch.where(wanted, so_far - 1, so_far[-1] + ids - so_far)
    chosen = torch.empty_like(ids).index_copy_(0, place, order)[:size]
    place_of = torch.empty_like(ids).index_copy_(0, order, place)
    at = place_of[targets.clamp(min=0)]
    known = so_far[-1].clamp(max=size)
    weight = ((classes - so_far[-1]).clamp(min=1) / (size - known).clamp(min=1)).log()
    rest = torch.stack([known.float(), weight])
    return Candidates(chosen, rest), torch.where((targets >= 0) & (at < size), at, -1)


class Head:
    """The language-model head with its loss, [N, d] -> nats, in pieces, gradient by hand.

    `weight` [V, d] is the model's own parameter. `prepare` casts it once a step. Evaluation is
    always in the activations' dtype with an fp32 loss. Only what is pointwise or a reduction is
    compiled, in graphs of their own: fused into the reduction, the transpose of the gradient cost
    3 ms a piece (LAB_LOG 2026-11-24).
    """

    def __init__(
        self,
        weight: nn.Parameter,
        cap: Cap,
        dtype,
        fp8: bool,
        compiled: bool,
        fused: bool = False,
        tied: bool = False,
    ):
        self.weight, self.cap, self.dtype, self.fp8 = weight, cap, dtype, fp8
        self.fused = fused  # FP8: losses and gradient by the kernels of section 11
        # A flatter cap asks for larger logits, and a head that began as the embedding is larger:
        # records 51 and 58 have room for weights up to 1.5 and 1.6.
        self.w8_scale = 2 * W8_SCALE if cap == SHIFTED_CAP or tied else W8_SCALE
        wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        wrap = wrap if compiled else lambda f: f
        self._grad = wrap(grad_in_fp8 if fp8 else grad_in)
        self._losses, self._to_fp8 = wrap(token_losses), wrap(to_fp8)
        self._transposed, self._transposed_x = wrap(transposed), wrap(transposed)
        self._cast = None
        self.left_out = torch.zeros((), dtype=torch.int64, device=weight.device)  # of sampled loss

    @torch.no_grad()
    def prepare(self) -> None:
        if self.fp8:
            w8 = self._to_fp8(self.weight, self.w8_scale, E4M3)
            self._cast = (w8, self._transposed(w8))
        else:
            self._cast = (self.weight.to(self.dtype),)

    def drop(self) -> None:
        """Gives up what `prepare` made."""
        self._cast = None

    def piece(
        self,
        h: Tensor,
        targets: Tensor,
        scale: Tensor,
        some: Candidates | None,
        copied: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """h [N, d] in its own dtype -> (losses [N], dh); weight.grad += dw. some: the classes that
        the softmax is over and targets are places in; None: all. copied: see `losses_and_grad`."""
        (w,) = self._cast
        ids, rest = some or (None, None)
        w = w if ids is None else w[ids]
        losses, g = self._grad(h @ w.t(), targets, scale, self.cap, copied, rest)
        self.add_to_grad(g.t() @ h, ids)
        return losses, g @ w

    def piece_fp8(
        self,
        h: Tensor,
        targets: Tensor,
        scale: Tensor,
        some: Candidates | None,
        copied: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same through three FP8 products (record 19)."""
        w8, w8t = self._cast  # [V, d], [d, V], e4m3
        ids, rest = some or (None, None)
        if ids is not None:
            w8 = w8.view(torch.int64)[ids].view(E4M3)  # rows of bytes, eight at a time
            w8t = self._transposed(w8)
        x_scale = h.size(1) ** 0.5 / 448  # a unit-RMS row of d values cannot exceed sqrt(d)
        xs, ws = scale.new_full((), x_scale), scale.new_full((), self.w8_scale)
        gs = scale * G8_SCALE
        x8 = self._to_fp8(h, x_scale, E4M3)
        z = fp8_mm(x8, w8.t(), xs, ws, torch.bfloat16, True)
        if self.fused and len(z) % 2 == 0:
            losses, g8, g8t = loss_and_grad(z, targets, *cap_constants(self.cap), copied, rest)
        else:
            losses, g8 = self._grad(z, targets, self.cap, copied, rest)
            g8t = self._transposed(g8)
        dh = fp8_mm(g8, w8t.t(), gs, ws, torch.bfloat16, False)
        x8t = self._transposed_x(x8)
        self.add_to_grad(fp8_mm(g8t, x8t.t(), gs, xs, torch.float32, False), ids)
        return losses, dh

    def add_to_grad(self, dw: Tensor, ids: Tensor | None) -> None:
        """weight.grad[ids] += dw [len(ids), d]; None: all of it, and dw becomes it where there is
        none. No id comes twice, so the order of additions is that of the calls."""
        if ids is not None:
            if self.weight.grad is None:
                self.weight.grad = torch.zeros_like(self.weight)
            self.weight.grad.index_add_(0, ids, dw.to(self.weight.dtype))
        elif self.weight.grad is None:
            self.weight.grad = dw.to(self.weight.dtype)
        else:
            self.weight.grad.add_(dw)

    @staticmethod
    def pieces(
        h: Tensor, targets: Tensor, copied: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        hs, rest = h.split(HEAD_PIECE), targets.split(HEAD_PIECE)
        weights = [None] * len(hs) if copied is None else copied.split(HEAD_PIECE)
        return zip(hs, rest, weights, strict=True)

    @torch.no_grad()
    def backward(
        self,
        h: Tensor,
        targets: Tensor,
        scale: Tensor,
        candidates: int = 0,
        position: int | Tensor = 0,
        copied: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h [N, d], targets [N] -> (losses [N], d (scale x sum) / dh); adds to weight.grad.

        candidates: how many classes the softmax of a piece is over; 0: all. position (int64 on the
        device, or a number): the tokens that the run trained before h, which decides whose turn it
        is: so a piece's candidates are the same on any number of ranks and after --resume, if calls
        are of whole pieces or of one size. Targets without a place are counted in `left_out`.
        copied [N] fp32: see `losses_and_grad`.
        """
        run, turn = self.piece_fp8 if self.fp8 else self.piece, position // min(HEAD_PIECE, len(h))
        out, some = [], None
        for i, (x, t, c) in enumerate(self.pieces(h, targets, copied)):
            if candidates:
                some, places = candidate_set(t, len(self.weight), candidates, turn + i)
                self.left_out += ((t >= 0) & (places < 0)).sum()
                t = places
            out.append(run(x, t, scale, some, c))
        losses, grads = zip(*out, strict=True)
        return torch.cat(losses), torch.cat(grads)

    @torch.no_grad()
    def losses(self, h: Tensor, targets: Tensor, copied: Tensor | None = None) -> Tensor:
        """h [N, d], targets [N] -> [N] fp32, nats; 0 where the target is negative. copied: see
        `token_losses`."""
        w, parts = self.weight.to(self.dtype), self.pieces(h, targets, copied)
        return torch.cat([self._losses(x @ w.t(), t, self.cap, c) for x, t, c in parts])


# ---- 4. Attention -------------------------------------------------------------------------------

BLOCK = 128  # tokens in a FlexAttention block
NO_LIMIT = 2**30  # a head window that never binds
SELECTIVE_ROW = 4096  # longest row of the selective arms, which hold T x T in fp32 for each layer


def parameter(shape: tuple[int, ...], init: tuple, group: str, muon_view=None) -> nn.Parameter:
    """A parameter that says how it starts and who updates it.

    init: ("zeros",) | ("constant", c) | ("normal", std) | ("uniform", std); see `init_parameters`.
    group: a key of `parameter_groups`. muon_view: (n, rows, cols), orthogonalised one by one.
    """
    p = nn.Parameter(torch.empty(shape))
    p.init, p.group, p.muon_view = init, group, muon_view
    return p


class Linear(nn.Module):
    """Weight [n_out, n_in] in fp32, cast to the input's dtype inside the graph; `maps` splits
    the rows into that many matrices for Muon, map-major."""

    def __init__(self, n_out: int, n_in: int, *, bias=False, maps: int = 1, zero=False):
        super().__init__()
        init = ("zeros",) if zero else ("uniform", 0.5 * n_in**-0.5)
        self.weight = parameter((n_out, n_in), init, "matrix", (maps, n_out // maps, n_in))
        self.bias = parameter((n_out,), ("zeros",), "scalar") if bias else None
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), cast(self.bias, x.dtype))


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The first k columns of x [..., d] by weight [n, k], a row for each of a few heads: [..., n].

    Zeros fill the rows up to eight and the columns, of which x has more anyway: for rows of three
    or six numbers, aligned to nothing, cuBLAS has but slow kernels (LAB_LOG, 2026-11-29).
    """
    (n, k), dtype = weight.shape, x.dtype
    more, wide = -n % 8, min(x.size(-1), k + -k % 8)
    weight = F.pad(weight.to(dtype), (0, wide - k, 0, more))
    bias = None if bias is None else F.pad(bias.to(dtype), (0, more))
    return F.linear(x[..., :wide], weight, bias)[..., :n]


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def project(x: Tensor, layers: list[Linear], dim: int) -> tuple[Tensor, ...]:
    """x [..., d] through several layers in one product -> a tensor [..., heads, dim] for each.

    A layer of two maps, stored map-major as (2, heads, dim) rows, comes out with its heads in
    pairs: 0 of map 0, 0 of map 1, 1 of map 0, ... Reordering weights costs less than activations.
    The split is of heads, not of columns: so Inductor fuses its way back with QK norm's (else
    gradients of q and k go to memory in fp32, for one more kernel to read them).
    """

    def rows(t: Tensor, maps: int) -> Tensor:
        t = t.to(x.dtype)
        if maps == 2:
            t = t.unflatten(0, (2, -1, dim)).transpose(0, 1).flatten(0, 2)
        return t

    w = torch.cat([rows(layer.weight, layer.maps) for layer in layers])
    b = None
    if layers[0].bias is not None:
        b = torch.cat([rows(layer.bias, layer.maps) for layer in layers])
    heads = [layer.weight.size(0) // dim for layer in layers]
    return F.linear(x, w, b).unflatten(-1, (-1, dim)).split(heads, dim=-2)


def norm(x: Tensor) -> Tensor:
    """x / RMS(x) over the last dimension, no gain."""
    return F.rms_norm(x, (x.size(-1),))


def inverse_rms(x: Tensor) -> Tensor:
    """1 / RMS(x) [..., 1], as `norm` has it of an x in fp32 or wider."""
    return (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype, for what an autograd.Function gives: where `to` gives t itself, the Function,
    compiled by torch 2.11, has no gradient by it."""
    return t if t.dtype == dtype else t.to(dtype)


class NormKeep(torch.autograd.Function):
    """`norm` of y, and y as h x RMS: the residual stream is then kept as h alone, which a product
    keeps for its weights' gradient anyway, and neither way needs y in memory. h is as fine as y.

    y is x; given scales [1 + n], n up to two, it is scales[0] x + scales[1] one + scales[2] two.
    The way back finds the gradient of scales[0] without x: grad . x is grad . (y - the others'
    part) by scales[0], so where that is nearer to 0 than 0.001 it is too small, and at 0 none.
    """

    @staticmethod
    def forward(ctx, x, scales=None, one=None, two=None):
        # By name, not *others: with as many of them as there are names Dynamo, where nothing needs
        # a gradient, takes ctx for one. No cast by name before the sum: the partitioner would keep
        # what it makes, in fp32.
        others = [other for other in (one, two) if other is not None]
        for i, other in enumerate((x, *others) if scales is not None else ()):
            x = scales[i] * other + (x if i else 0)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        root = inverse_rms(x32)
        h = narrowed(x32 * root, x.dtype)
        ctx.save_for_backward(h, root, scales, *others)
        return h, narrowed(h / root, x.dtype)

    @staticmethod
    def backward(ctx, grad, rest):
        h, root, scales, *others = ctx.saved_tensors
        wide, h, g = root.dtype, h.to(root.dtype), grad.to(root.dtype)
        g = (rest + root * (g - (g * h).mean(-1, keepdim=True) * h)).to(grad.dtype)
        if scales is None:
            return g, None, None, None
        shares = [(g * other).sum(dtype=wide) for other in others]
        first, *more = scales.to(wide)
        apart = (g * (h / root)).sum() - sum(a * b for a, b in zip(more, shares, strict=True))
        first = first.abs().clamp(min=1e-3) * torch.where(first < 0, -1.0, 1.0)
        dscales = torch.stack([apart / first, *shares]).to(scales.dtype)
        dothers = [scale * g for scale in scales[1:]]
        return scales[0] * g, dscales, *dothers, *[None] * (2 - len(others))


def rope_table(length: int, dim: int, half: bool) -> Tensor:
    """[2, length, dim / 2]: cos and sin for pairs (j, j + dim / 2).

    half (record 17): dim/4 frequencies from 1 to 1/1024 radians a token, the other pairs stand
    still, so that half of each head is free of position. Else base 10,000 on all pairs.
    """
    if half:
        n = dim // 4
        freq = (1 / 1024) ** (torch.arange(n, dtype=torch.float64) / max(1, n - 1))
        freq = torch.cat([freq, freq.new_zeros(dim // 2 - n)])
    else:
        freq = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq  # fp32 is off by 0.02 at 2^18
    return torch.stack([angle.cos(), angle.sin()]).float()


def starts_of(docs: Tensor) -> Tensor:
    """docs [B, T] -> bool [B, T]: tokens that nothing comes before in their row and document."""
    return docs != F.pad(docs[:, :-1], (1, 0), value=-1)


def before(x: Tensor) -> Tensor:
    """x [B, T, ...] of the token before; the first of a row keeps its own."""
    return torch.cat([x[:, :1], x[:, :-1]], dim=1)


@dataclass
class Context:
    """What the model tells an arm about the rows at hand."""

    mask: BlockMask | Documents | Tensor  # a tensor is bool [B, 1 or Hq, T, T]
    rope: dict[int, Tensor]  # head dimension -> [2, T, D / 2]; empty: no rotation
    scale: Callable[[int], float]  # factor on q.k for a head dimension
    starts: Tensor | None = None  # as `starts_of` has them, where keys are offset or selected
    docs: Tensor | None = None  # [B, T], and the window [1 or Hq]: what the mask is made of
    window: Tensor | None = None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] in fp32, each pair (a, b) of split halves as (a cos + b sin, b cos - a sin).
    cos [..., 1, D / 2], sin [..., 2, D / 2]: with the sign for a and for b."""
    pairs = x.unflatten(-1, (2, -1))
    # Of a torch.cat Inductor computes both halves, with masks, and on the way back it writes an
    # fp32 copy to memory.
    return (pairs * cos + pairs.flip(-2) * sin).flatten(-2)


class NormTurn(torch.autograd.Function):
    """`rotate` of `norm`, of x in fp32, in `dtype`. Its way back reads y, which attention keeps
    anyway, where PyTorch's reads x and turns the gradient before it sums: Inductor would write that
    to memory, in fp32. It still would if grad were cast by name, or root and 1 / D stood later."""

    @staticmethod
    def forward(ctx, x, cos, sin, dtype):
        root = inverse_rms(x)
        # Flat before the last product: FlexAttention wants what it reads as an operation made it.
        y = narrowed(turn(x, cos, sin).flatten(1, -3) * root.flatten(1, -3), dtype)
        ctx.save_for_backward(y, root, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, root, cos, sin = ctx.saved_tensors
        places = root.shape[1:-2]
        grad, y = grad.unflatten(1, places), y.to(root.dtype).unflatten(1, places)
        along = (grad * y / y.size(-1)).sum(-1, keepdim=True)
        return turn(grad - along * y, cos, -sin) * root, None, None, None


def rotate(x: Tensor, ctx: Context, normed: bool = False) -> Tensor:
    """RoPE on x [B, T, H, D], in fp32; normed: on `norm` of it. With [B, T, n, H, D], n places a
    token, it gives [B, n T, H, D], without a copy of what is no contiguous x."""
    if not ctx.rope:  # FlexAttention's lowering wants q and k to come out of an operation
        return (norm(x) if normed else x).flatten(1, -3).contiguous()
    places, wide = x.shape[1:-2], x.to(torch.promote_types(x.dtype, torch.float32))
    table = ctx.rope[x.size(-1)][:, : places.numel()].unflatten(1, places)
    cos, sin = table[..., None, None, :].unbind(0)
    sin = torch.cat([sin, -sin], dim=-2)
    if normed:
        return NormTurn.apply(wide, cos, sin, x.dtype)
    return turn(wide, cos, sin).flatten(1, -3).to(x.dtype)


def offset_keys(k: Tensor, starts: Tensor) -> Tensor:
    """k [B, T, H, D] with the dimensions that half RoPE leaves alone taken from the token before,
    or its own where there is none: one layer then finds what followed a token (record 49)."""
    still = torch.arange(k.size(-1), device=k.device) // (k.size(-1) // 4) % 2 == 1
    return torch.where(still & ~starts[:, :, None, None], before(k), k)


@torch.library.custom_op("nca::running_sum", mutates_args=())
def running_sum(x: Tensor) -> Tensor:
    """x [..., T, n] -> the sums over T so far, by PyTorch's own kernel, which goes down a column.

    Inductor's, where columns are few, splits one over programs that add in the order in which they
    come, so that equal runs differ; and torch 2.11 cannot generate all such kernels.
    """
    return x.cumsum(-2)


@running_sum.register_fake
def _(x):
    return x.new_empty(x.shape)


running_sum.register_autograd(lambda ctx, grad: running_sum(grad.flip(-2)).flip(-2))


def selection(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """F of selective attention (2410.02703): one head's q, k [B, T, D] -> [B, T, T] fp32.

    F[i, j] = sum of relu(score[n, j]) over the queries n with j < n < i: what query i's score of
    token j loses. No token masks itself, and a document's first token is never masked. Documents
    and windows need no rule: where i sees j, all queries between them do, and no other entry of F
    is read.
    """
    at = torch.arange(q.size(1), device=q.device)
    earlier = (at[:, None] - at > 1) & ~ctx.starts[:, None, :]
    # Row i has the scores of query i - 1, so that a plain running sum leaves out query i itself.
    scores = before(q) @ k.mT
    scores = torch.where(earlier, F.relu(scores), 0.0).float() * ctx.scale(q.size(-1))
    return running_sum(scores)


SELECTIVE_CHUNK = 512  # queries at a time


class SelectionGrad(torch.autograd.Function):
    """Hands y on as it is and gives F its gradient, in chunks of queries: no T x T for all heads at
    once and no atomic adds, as where FlexAttention does it, but scores are computed once more."""

    @staticmethod
    def forward(ctx, y, taken, q, k, v, lse, docs, window, scale):
        """y [B, Hq, T, Dv], taken [B, T, T] and q, k, v [B, H, T, D] as `attend_selected` has them;
        lse [B, Hq, T] in nats."""
        ctx.save_for_backward(y, taken, q, k, v, lse, docs, window)
        ctx.scale = scale
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        y, taken, q, k, v, lse, docs, window = ctx.saved_tensors
        length = y.size(2)
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        own = (dy.float() * y.float()).sum(-1)
        seen, chunks = dense_mask(docs, window), []
        for start in range(0, length, SELECTIVE_CHUNK):
            end = min(start + SELECTIVE_CHUNK, length)
            i, j = slice(start, end), slice(end)
            score = (q[:, :, i] @ k[:, :, j].mT).float() * ctx.scale - lse[:, :, i, None]
            score = score - taken[:, None, i, j]
            weight = torch.where(seen[:, :, i, j], torch.exp(score), 0.0)
            dweight = (dy[:, :, i] @ v[:, :, j].mT).float() - own[:, :, i, None]
            chunk = -(weight * dweight).sum(1)
            chunks.append(F.pad(chunk, (0, length - end)))
        return dy, torch.cat(chunks, dim=1), *(None,) * 7


def forward_tile(q: Tensor, v: Tensor) -> dict:
    """Options for FlexAttention, which looks up its tile by the width of q alone: beside values of
    128, that for a q of 64 (128 x 128 in 4 warps) spills 680 bytes a thread on an H100. So it is
    told the one that it has for heads of 128; on the way back both have the same."""
    if q.size(-1) < v.size(-1) == 128 and q.dtype.itemsize == 2:
        return {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
    return {}


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, taken: Tensor, chunked: bool
) -> Tensor:
    """`attend`, on [B, H, T, D], with taken [B, T, T] subtracted from every head's scores. chunked:
    its gradient by `SelectionGrad` where FlexAttention is used."""
    scale, gqa = ctx.scale(q.size(-1)), q.size(1) != k.size(1)
    if not isinstance(ctx.mask, BlockMask):
        bias = torch.where(ctx.mask, -taken[:, None], -math.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=gqa)
    fixed = taken.detach() if chunked else taken

    def less(score, b, h, i, j):
        return score - fixed[b, i, j]

    # F is loaded block by block, too: in the usual three stages the way back (heads of 128) takes
    # 264 kB of shared memory and the way forth (heads of 64) 247, of which an H100 has 232.
    options = {"num_stages": 2, **forward_tile(q, v)}
    flex = functools.partial(
        flex_attention, score_mod=less, block_mask=ctx.mask, kernel_options=options
    )
    if not chunked:
        return flex(q, k, v, scale=scale, enable_gqa=gqa)
    y, aux = flex(q, k, v, scale=scale, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    return SelectionGrad.apply(y, taken, q, k, v, aux.lse, ctx.docs, ctx.window, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    taken: Tensor | None = None,
    chunked: bool = False,
) -> Tensor:
    """Softmax attention: q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv] -> [B, T, Hq, Dv].

    Query head n reads key and value head n // (Hq / Hkv). taken, chunked: see `attend_selected`.
    """
    scale, gqa = ctx.scale(q.size(-1)), q.size(2) != k.size(2)
    if isinstance(ctx.mask, Documents):
        return attend_documents(q, k, v, ctx.mask, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if taken is not None:
        y = attend_selected(q, k, v, ctx, taken, chunked)
    elif isinstance(ctx.mask, BlockMask):
        how = {"scale": scale, "enable_gqa": gqa, "kernel_options": forward_tile(q, v)}
        y = flex_attention(q, k, v, block_mask=ctx.mask, **how)
    else:
        y = F.scaled_dot_product_attention(q, k, v, ctx.mask, scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


def repeated(docs: Tensor, each: int) -> Tensor:
    """docs [B, T] -> [B, each T], of rows that have every token so many times (`Paired`)."""
    return docs if each == 1 else docs.repeat_interleave(each, dim=1)


def dense_mask(docs: Tensor, window: Tensor, each: int = 1) -> Tensor:
    """docs [B, T], window [1 or H] -> bool [B, 1 or H, T, T]: causal, same document, in
    window; of the rows that `repeated` makes of them, whose tokens the window then counts."""
    docs = repeated(docs, each)
    t = torch.arange(docs.size(1), device=docs.device)
    back = t[:, None] - t
    near = (back >= 0) & (back < window[:, None, None])
    return near & (docs[:, None, :, None] == docs[:, None, None, :])


@torch.library.custom_op("nca::block_lists", mutates_args=())
def block_lists(docs: Tensor, window: Tensor) -> list[Tensor]:
    """The lists of a BlockMask, from document bounds: no T x T.

    docs [B, T] int32, never falling along a row; window [1 or H] int32. Returns, for partners
    along KV and then along Q, counts and indices of the blocks that are `partial` (some elements
    masked) and `full` (none): counts [B, 1 or H, T / BLOCK], indices [..., T / BLOCK], int32.

    Both sets are runs next to the diagonal, so lists follow from counts; sorting them, as
    create_block_mask does, took Triton minutes to compile. And this is a custom op, for its outputs
    have plain strides: FlexAttention finds a row's counts by the stride of H even where H is 1, and
    Inductor gave that dimension the stride 0, so that every row read the first row's blocks.
    """
    batch, length = docs.shape
    n = length // BLOCK
    first, last = docs.view(batch, n, BLOCK)[..., 0], docs.view(batch, n, BLOCK)[..., -1]
    i = torch.arange(n, device=docs.device, dtype=torch.int32)
    back = (i[:, None] - i) * BLOCK  # [Q, KV], distance of the blocks' first tokens
    w = window[:, None, None]
    touch = (first[:, :, None] <= last[:, None, :])[:, None]  # [B, 1, Q, KV], for KV <= Q
    whole = (last[:, :, None] == first[:, None, :])[:, None]
    seen = (back >= 0) & (back - BLOCK + 1 < w) & touch
    full = (back > 0) & (back + BLOCK - 1 < w) & whole & seen
    at = i[:, None]  # a row's own block; i counts along its list
    s, f = (t.sum(-1, dtype=torch.int32)[..., None] for t in (seen, full))
    by_query = [  # partial: q - s + 1 ... q - f - 1, then q itself; full: q - f ... q - 1
        (s - f)[..., 0],
        torch.where(i < s - f - 1, at - s + 1 + i, at),
        f[..., 0],
        at - f + i,
    ]
    s, f = (t.sum(-2, dtype=torch.int32)[..., None] for t in (seen, full))
    by_key = [  # partial: k itself, then k + f + 1 ... k + s - 1; full: k + 1 ... k + f
        (s - f)[..., 0],
        torch.where(i > 0, at + f + i, at),
        f[..., 0],
        (at + 1 + i).expand(*f.shape[:2], n, n),
    ]
    lists = [*by_query, *by_key]
    indices = [t.clamp(0, n - 1) if t.ndim == 4 else t for t in lists]
    return [t.clone(memory_format=torch.contiguous_format) for t in indices]


@block_lists.register_fake
def _(docs, window):
    n = docs.size(1) // BLOCK
    counts = (docs.size(0), window.size(0), n)
    return [docs.new_empty(shape) for _ in range(4) for shape in (counts, (*counts, n))]


def block_mask(docs: Tensor, window: Tensor, each: int = 1) -> BlockMask:
    """dense_mask for FlexAttention, token-exact. The window is a tensor on the device, so that a
    new one needs no new graph (record 13)."""
    per_head = window.size(0) > 1
    rows = repeated(docs, each)  # the kernel reads `docs`, which is no product of the graph

    def document(b, i):
        return docs[b, i] if each == 1 else docs[b, i // each]

    def visible(b, h, q, kv):
        near = q - kv < (window[h] if per_head else window[0])
        return (kv <= q) & (document(b, q) == document(b, kv)) & near

    fields = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    fields += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    return BlockMask(
        seq_lengths=(rows.size(1), rows.size(1)),
        **dict(zip(fields, block_lists(rows, window), strict=True)),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


@dataclass
class Limits:
    """The model's `window` where FlashAttention-4 attends. Its kernels take numbers from the host:
    in a tensor there a new value needs no new graph, and nothing waits for the device to tell."""

    values: Tensor  # int32 [3], on the CPU: windows long and short, documents in the rows at most


@dataclass
class Documents:
    """The mask as FlashAttention-4 takes it: rows laid end to end, N = B T tokens, and cut into
    documents."""

    bounds: Tensor  # int32 [N + 1], on the device, as `document_bounds` makes it
    limits: Tensor  # `Limits`' values
    short: bool  # of the windows, the short one
    caps: tuple[int, ...] = (NO_LIMIT,)  # on that of heads n, n + len(caps), n + 2 len(caps), ...


class Arm(nn.Module):
    """The attention of one layer, up to the output projection. Subclass this for your own.

    heads: heads of y. n_out = heads x Dv: width of y. kv_width: width of the value embedding.
    dim: width of a head of q and k, cfg.qk_dim or head_dim, which divides Dv.
    head_windows: a cap on the window for each query head, tokens, or None.
    forward(x [B, T, d], ve [B, T, kv_width] or None, ctx) -> (y [B, T, n_out],
    v [B, T, Hkv, Dv] with ve mixed in, or None where XSA makes no sense).
    Everything must be causal: perturb token t, and nothing before t may move.
    """

    head_windows: tuple[int, ...] | None = None

    def __init__(
        self,
        cfg: ModelConfig,
        layer: int,
        *,
        pairs: int,
        heads_q: int,
        heads_kv: int,
        selective: bool = False,
    ):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.heads, self.heads_q, self.heads_kv = pairs, heads_q, heads_kv
        self.dim = cfg.qk_dim or cfg.head_dim
        self.selective = selective
        self.ve_mix = None
        if has_values(cfg, layer):
            self.ve_mix = parameter((2,), ("constant", 0.5), "scalar")  # record 15

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, d] -> q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, heads, Dv], by the layers q, k
        and v: of heads as wide as q's, of which v then has several in one."""
        q, k, v = project(x, [self.q, self.k, self.v], self.dim)
        return q, k, v.unflatten(-2, (-1, self.n_out // (self.heads * self.dim))).flatten(-2)

    def mix(self, v: Tensor, ve: Tensor | None) -> Tensor:
        """v [B, T, H, Dv] and its value embedding, weighed by two learned scalars."""
        if ve is None:
            return v
        c = self.ve_mix.to(v.dtype)
        return c[0] * v + c[1] * ve.view_as(v)

    def position(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """QK norm, RoPE and key offset on [B, T, H, D], or as `rotate` has them."""
        q, k = (rotate(t, ctx, self.cfg.qk_norm) for t in (q, k))
        if self.cfg.key_offset and self.layer in self.cfg.long_layers:
            k = offset_keys(k, ctx.starts)
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """`attend`, selective where the arm is: q and k [B, T, H, D] in position."""
        if not self.selective:
            return attend(q, k, v, ctx)
        # Head 0's scores, which the kernel computes once more.
        taken = selection(q[:, :, 0], k[:, :, 0], ctx)
        return attend(q, k, v, ctx, taken, self.cfg.selective_grad == "chunked")


class Softmax(Arm):
    """The baseline: n_head heads of head_dim, with queries and keys of qk_dim."""

    def __init__(self, cfg: ModelConfig, layer: int, selective: bool = False):
        h, d, dim = cfg.n_head, cfg.d_model, cfg.head_dim
        super().__init__(cfg, layer, pairs=h, heads_q=h, heads_kv=h, selective=selective)
        self.n_out = self.kv_width = h * dim
        self.q, self.k = (Linear(h * self.dim, d, bias=cfg.bias) for _ in range(2))
        self.v = Linear(h * dim, d, bias=cfg.bias)

    def forward(self, x, ve, ctx):
        q, k, v = self.project(x)
        q, k = self.position(q, k, ctx)
        v = self.mix(v, ve)
        return self.attend(q, k, v, ctx).flatten(2), v

    def flops_per_token(self, mean_keys: float) -> float:
        """Forward FLOPs of scores and values, without projections."""
        widths = self.heads * self.dim + self.n_out
        return 2 * mean_keys * widths


class Paired(Softmax):
    """Softmax in which heads i and i + n_head / 2 are one head on a row of twice the length: a
    token's query and key of the first, then those of the second (record 58). A query then chooses
    among both heads' keys, and a window reaches half as many tokens back."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.heads_q = self.heads_kv = self.heads // 2

    def forward(self, x, ve, ctx):
        q, k, v = self.project(x)
        v = self.mix(v, ve)
        q, k, both = (t.unflatten(2, (2, -1)) for t in (q, k, v))
        q, k = self.position(q, k, ctx)
        return attend(q, k, both.flatten(1, 2), ctx).reshape(*x.shape[:2], -1), v


class Selective(Softmax):
    """Softmax in which a token can mask earlier ones for all later ones (2410.02703): what head 0
    scores above 0 is taken, summed over the queries so far, from every head's scores."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer, selective=True)


# (differential heads, KV heads) as shares of n_head. Attention parameters in d^2, softmax 4:
# matched 4, full 5 (V2 as published beside an equal K/V), light 2.5 with softmax's FLOPs.
V2_FORMS = {"matched": (1.0, 0.5), "full": (1.0, 1.0), "light": (0.5, 0.5), "light+": (0.5, 0.5)}


class DiffV2(Arm):
    """Differential attention V2: out = a1 - sigmoid(lambda(x)) a2, both maps on the same K and V.

    One ordinary grouped-query call with twice the query heads; heads 2i and 2i + 1 are a pair and
    share a KV head (Microsoft, 2026-01; unilm Diff-Transformer-V2). Published without a bias in
    lambda; ours is learned from `lambda_bias`, so that a pair can start near softmax.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        share, share_kv = V2_FORMS[cfg.form]
        pairs, kv = int(cfg.n_head * share), int(cfg.n_head * share_kv)
        shape = {"pairs": pairs, "heads_q": 2 * pairs, "heads_kv": kv}
        super().__init__(cfg, layer, **shape, selective=cfg.selective)
        d, dim = cfg.d_model, cfg.head_dim
        self.n_out, self.kv_width = pairs * dim, kv * dim
        self.q = Linear(2 * pairs * self.dim, d, bias=cfg.bias, maps=2)
        self.k, self.v = (Linear(kv * n, d, bias=cfg.bias) for n in (self.dim, dim))
        self.lam = parameter((pairs, d), ("zeros",), "gate")
        self.lam_bias = parameter((pairs,), ("constant", cfg.lambda_bias), "gate")
        if cfg.window2:
            self.head_windows = (NO_LIMIT, cfg.window2) * pairs

    def forward(self, x, ve, ctx):
        q, k, v = self.project(x)
        q, k = self.position(q, k, ctx)
        v = self.mix(v, ve)
        a1, a2 = self.attend(q, k, v, ctx).unflatten(2, (self.heads, 2)).unbind(3)
        return (a1 - self.weight(x) * a2).flatten(2), v

    def weight(self, x: Tensor) -> Tensor:
        """sigmoid(lambda): x [B, T, d] -> [B, T, pairs, 1]."""
        return torch.sigmoid(gate_logits(x, self.lam, self.lam_bias))[..., None]

    def flops_per_token(self, mean_keys: float) -> float:
        widths = self.heads * self.dim + self.n_out
        return 4 * mean_keys * widths


def v1_qk_dim(cfg: ModelConfig) -> int:
    """Halves a head of 128, as V1 asks for V twice as wide as q; a smaller head keeps its own."""
    return cfg.head_dim // 2 if cfg.head_dim >= 128 else cfg.head_dim


class DiffV1(Arm):
    """Differential attention as published first (2410.05258, section 2.1).

    ((softmax(Q1 K1') - lam softmax(Q2 K2')) V, RMS norm per head with gain, times 1 - lam_init;
    lam = exp(lq1.lk1) - exp(lq2.lk2) + lam_init, one scalar a layer, lam_init = 0.8 - 0.6
    exp(-0.3 layer). q and k heads 2i and 2i + 1 are a pair; V is twice as wide as q.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        d, dim = cfg.d_model, v1_qk_dim(cfg)
        pairs = cfg.n_head * cfg.head_dim // (2 * dim)
        super().__init__(cfg, layer, pairs=pairs, heads_q=2 * pairs, heads_kv=2 * pairs)
        self.dim, self.n_out, self.kv_width = dim, 2 * dim * pairs, 2 * dim * pairs
        self.q, self.k = (Linear(self.n_out, d, bias=cfg.bias, maps=2) for _ in range(2))
        self.v = Linear(self.n_out, d, bias=cfg.bias)
        self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lam = parameter((4, dim), ("normal", 0.1), "gate")  # lq1, lk1, lq2, lk2
        self.gain = parameter((2 * dim,), ("constant", 1.0), "gate")

    def forward(self, x, ve, ctx):
        q, k, v = self.project(x)
        q, k = self.position(q, k, ctx)
        v = self.mix(v, ve)
        both = v.repeat_interleave(2, dim=2)  # one call for both maps: V once for each
        a1, a2 = attend(q, k, both, ctx).unflatten(2, (self.heads, 2)).unbind(3)
        y = a1.float() - self.mixing() * a2.float()
        y = F.rms_norm(y, (2 * self.dim,), self.gain, eps=1e-5) * (1 - self.lam_init)
        return y.to(x.dtype).flatten(2), None

    def mixing(self) -> Tensor:
        """lambda, one fp32 scalar."""
        q1, k1, q2, k2 = self.lam.float().unbind(0)
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lam_init

    def flops_per_token(self, mean_keys: float) -> float:
        return 2 * mean_keys * (2 * self.dim + 4 * self.dim) * self.heads


ARMS: dict[str, type] = {
    "softmax": Softmax,
    "diff_v1": DiffV1,
    "diff_v2": DiffV2,
    "selective": Selective,
}


@functools.cache
def user_arm(name: str) -> type:
    """`path.py:Class` -> the class; raises InputError where it is not there."""
    path, _, cls = name.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"arm {name!r}: there is no file {path!r}")
    digest = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{digest}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # the arm's `import train_gpt`
    sys.modules[spec.name] = module  # Dynamo looks it up there
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as e:
        del sys.modules[spec.name]
        raise InputError(f"arm {name!r}: {path} cannot be imported: {e}") from None
    if not inspect.isclass(getattr(module, cls, None)):
        raise InputError(f"arm {name!r}: {path} has no class {cls!r}")
    return getattr(module, cls)


def has_arm(cfg: ModelConfig, layer: int) -> bool:
    """Whether a block's attention is the arm's."""
    return layer in (cfg.layers or range(cfg.n_layer)) and layer not in cfg.no_attention


def build_arm(cfg: ModelConfig, layer: int) -> nn.Module:
    name, _ = parse_arm(cfg.arm)
    if layer in cfg.paired:
        return Paired(cfg, layer)
    if not has_arm(cfg, layer):
        return Softmax(cfg, layer)
    return (ARMS[name] if name in ARMS else user_arm(name))(cfg, layer)


class Excluded(torch.autograd.Function):
    """XSA (2603.09078), then the gate: s (y - tanh(xsa) c v), c = y.v / v.v, s = sigmoid(logits) or
    1. y and v [B, T, H, D], xsa [H], logits [B, T, H] or None.

    The way back takes y and v, which attention keeps anyway, and not, as PyTorch's would, y without
    v's part: a write on one way and a read on the other. The way forward has no cast by name: the
    partitioner would keep what it makes, for both ways, in fp32."""

    @staticmethod
    def forward(ctx, y, v, xsa, logits):
        ctx.save_for_backward(y, v, xsa, logits)
        c = (y * v).sum(-1, keepdim=True) / ((v * v).sum(-1, keepdim=True) + 1e-6)
        z = y - torch.tanh(xsa.to(y.dtype))[:, None] * c * v
        return z if logits is None else z * torch.sigmoid(logits)[..., None]

    @staticmethod
    def backward(ctx, grad):
        y, v, xsa, logits = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)
        a, b, g, t = y.to(wide), v.to(wide), grad.to(wide), torch.tanh(xsa.to(wide))[:, None]

        def dot(one: Tensor, other: Tensor) -> Tensor:
            return (one * other).sum(-1, keepdim=True)

        square, along = dot(b, b) + 1e-6, dot(g, b)
        c, dlogits = dot(a, b) / square, None
        if logits is not None:
            s = torch.sigmoid(logits.to(wide))[..., None]
            dlogits = ((dot(g, a) - t * c * along) * s * (1 - s))[..., 0].to(logits.dtype)
            g, along = g * s, along * s
        dxsa = -(1 - t * t)[:, 0] * (c * along).flatten(0, 1).sum(0)[:, 0]
        dy = g - t * (along / square) * b
        dv = -t * (c * g + along / square * (a - 2 * c * b))
        return dy.to(y.dtype), dv.to(v.dtype), dxsa.to(xsa.dtype), dlogits


class Attention(nn.Module):
    """An arm with what all arms share: XSA, the gates and the output projection."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.arm = build_arm(cfg, layer)
        heads = self.arm.heads
        self.o = Linear(cfg.d_model, self.arm.n_out, bias=cfg.bias, zero=True)
        self.gate = parameter((heads, 12), ("zeros",), "gate") if cfg.gate else None
        self.xsa = parameter((heads,), ("zeros",), "gate") if cfg.xsa else None
        self.value_gate = None
        if cfg.value_gate and has_values(cfg, layer):
            value_heads = self.arm.kv_width * heads // self.arm.n_out
            self.value_gate = parameter((value_heads, 12), ("zeros",), "gate")
        if getattr(self.arm, "head_windows", None) is not None:
            caps = torch.tensor(self.arm.head_windows, dtype=torch.int32)
            self.register_buffer("window_caps", caps, persistent=False)

    def forward(self, x: Tensor, ve: Tensor | None, ctx: Context) -> Tensor:
        if self.value_gate is not None:  # record 55; starts as a no-op
            open_ = 2 * torch.sigmoid(gate_logits(x, self.value_gate))
            ve = (ve.unflatten(-1, (open_.size(-1), -1)) * open_[..., None]).flatten(2)
        y, v = self.arm(x, ve, ctx)
        y = y.unflatten(-1, (self.arm.heads, -1))
        logits = None if self.gate is None else gate_logits(x, self.gate)
        if self.xsa is not None:  # starts as a no-op (record 82)
            if y.size(2) != v.size(2):  # else it copies v
                v = v.repeat_interleave(y.size(2) // v.size(2), dim=2)
            y = Excluded.apply(y, v, self.xsa, logits)
        elif logits is not None:
            y = y * torch.sigmoid(logits)[..., None]
        return self.o(y.flatten(2))


# ---- 5. GPT -------------------------------------------------------------------------------------


def value_slot(cfg: ModelConfig, layer: int) -> int | None:
    """Which value table a block reads: the first n blocks and, mirrored in order, the last n; or
    each of `value_layers` its own."""
    n = cfg.value_tables
    if layer in cfg.no_attention:
        return None
    if cfg.value_layers:
        return cfg.value_layers.index(layer) if layer in cfg.value_layers else None
    slots = {**{i: i for i in range(n)}, **{cfg.n_layer - n + i: i for i in range(n)}}
    return slots.get(layer)


def has_values(cfg: ModelConfig, layer: int) -> bool:
    return value_slot(cfg, layer) is not None


def mlp_width(cfg: ModelConfig, layer: int) -> int:
    wide = layer in cfg.mlp_layers if cfg.mlp_layers else has_arm(cfg, layer)
    return cfg.mlp if cfg.mlp and wide else 4 * cfg.d_model


def padded(vocab: int) -> int:
    """Rows of the head: a multiple of 128 for the tensor cores, of 16 for a vocabulary of bytes."""
    unit = 128 if vocab > 1024 else 16
    return math.ceil(vocab / unit) * unit


class Smear(nn.Module):
    """e <- e + s sigmoid(w . e[:12]) x the embedding of the token before (record 34)."""

    def __init__(self):
        super().__init__()
        self.gate = parameter((12,), ("zeros",), "smear")
        self.share = parameter((1,), ("zeros",), "scalar")

    def forward(self, e: Tensor, starts: Tensor) -> Tensor:
        """e [B, T, d] before its norm; nothing crosses a document's start."""
        gate = torch.sigmoid(F.linear(e[..., :12], self.gate[None].to(e.dtype)))
        share = torch.where(starts[..., None], 0.0, gate * self.share.to(e.dtype))
        return e + share * before(e)


SIGN_ROWS = 8192


def random_signs(columns: int) -> Tensor:
    """[SIGN_ROWS, columns] of -1 and 1, int8, always the same."""
    gen = torch.Generator().manual_seed(0)
    return 2 * torch.randint(2, (SIGN_ROWS, columns), generator=gen, dtype=torch.int8) - 1


COPY_DIM = 128
# Tokens that a copy head looks back, in training and in use: further costs no training and takes
# 0.009 nats off (LAB_LOG 2026-11-28).
COPY_BAND, COPY_REACH = 2048, 16_384
NO_COPY = -1e4  # nats: exp of it is 0 in fp32, and no row's scores are all -inf, whose log is NaN's


class Pointer(nn.Module):
    """A copy head (after modded-nanogpt's CPLM, 2026-10): p(y) = p_lm(y) (1 - a (1 - s)) + a c(y).

    A softmax over the last `band` tokens of the document, the present one included, and a
    learned sink says which token comes next: c(y) is its weight on positions that hold y, s that on
    the sink, 1 - s = sum c. a is a gate. Theirs is a slot of the vocabulary; a sigmoid asks nothing
    of the head's kernels. Starts with a = 0.018.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.q, self.k = (Linear(COPY_DIM, cfg.d_model) for _ in range(2))
        self.gain = parameter((1,), ("constant", 1.0), "scalar")
        self.sink = parameter((1,), ("zeros",), "scalar")
        self.gate = parameter((cfg.d_model,), ("zeros",), "gate")
        self.bias = parameter((1,), ("constant", -4.0), "gate")
        band = torch.tensor([COPY_REACH], dtype=torch.int32)  # in training it is COPY_BAND
        self.register_buffer("band", band, persistent=False)
        self.flex: bool | None = None  # as GPT's

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, T, d] -> q, k [B, T, COPY_DIM]; q . k is the score, nats."""
        q, k = (t.squeeze(2) for t in project(h, [self.q, self.k], COPY_DIM))
        return norm(q) * (self.gain * (15.36 / COPY_DIM)).to(q.dtype), norm(k)

    def forward(
        self, h: Tensor, tokens: Tensor, docs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h [B, T, d], ready for the head; tokens, docs [B, T] int32; targets [B, T] int64 ->
        (copied, kept) [B, T] fp32: kept = log(1 - a (1 - s)), copied = log(a c(target)) - kept, so
        that p(target) = exp(kept) (p_lm(target) + exp(copied)). kept is 0 where the target is
        negative, copied below NO_COPY / 2 where no token in reach is the target."""
        q, k = self.heads(h)
        flex = docs.is_cuda if self.flex is None else self.flex
        partitions = self.by_flex if flex and docs.size(1) % BLOCK == 0 else self.by_hand
        every, hits = partitions(q, k, tokens, docs, targets)
        log_a, kept, total = self.shares(h, every)
        return log_a + hits - total - kept, torch.where(targets >= 0, kept, 0.0)

    def shares(self, h: Tensor, every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """every [B, T], log sum exp of the scores of all tokens in reach -> log a,
        log(1 - a (1 - s)) = log(1 - a + a s), and that sum's log with the sink."""
        gate = h.float() @ self.gate + self.bias
        total, log_a = torch.logaddexp(every, self.sink), F.logsigmoid(gate)
        kept = torch.logaddexp(F.logsigmoid(-gate), log_a + self.sink - total)
        return log_a, kept, total

    def by_flex(self, q, k, tokens, docs, targets) -> tuple[Tensor, Tensor]:
        """`by_hand` by FlexAttention, no T x T: two heads over the same keys, of which the second
        sees other tokens than the target as ones of score NO_COPY."""

        def asked(score, b, head, i, j):
            return torch.where((head == 0) | (tokens[b, j] == targets[b, i]), score, NO_COPY)

        q, k = q[:, None].repeat(1, 2, 1, 1), k[:, None]
        y, aux = flex_attention(
            q,
            k,
            torch.zeros_like(k[..., :16]),  # nobody asks for values
            score_mod=asked,
            block_mask=block_mask(docs, self.band),
            scale=1.0,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        # Inductor's way back multiplies with y's gradient: there has to be one.
        return (aux.lse + 0.0 * y[..., 0]).unbind(1)

    def by_hand(self, q, k, tokens, docs, targets) -> tuple[Tensor, Tensor]:
        """Logs of the sums of exp(score) over the tokens in reach, [B, T] each, nats: of all, and
        of those that are the target (others count as NO_COPY)."""
        scores, seen = q.float() @ k.float().mT, dense_mask(docs, self.band)[:, 0]
        hit = tokens[:, None, :] == targets[:, :, None]
        both = torch.stack([scores, torch.where(hit, scores, NO_COPY)])
        return both.masked_fill(~seen, -math.inf).logsumexp(-1).unbind(0)

    def mix(self, logits: Tensor, h: Tensor, tokens: Tensor, docs: Tensor) -> Tensor:
        """logits [B, n, V] of the last n of T positions -> log p [B, n, V] of the mixture; h [B, T,
        d]. n x T scores at once: for sampling and tests."""
        q, k = self.heads(h)
        n = logits.size(1)
        seen = dense_mask(docs, self.band)[:, 0, -n:]
        scores = (q[:, -n:].float() @ k.float().mT).masked_fill(~seen, -math.inf)
        log_a, kept, total = self.shares(h[:, -n:], scores.logsumexp(-1))
        weight = torch.exp(scores - total[..., None])
        where = tokens[:, None, :].expand_as(weight).long()
        copied = torch.zeros_like(logits).scatter_add_(2, where, weight).log()
        plain = logits.log_softmax(-1) + kept[..., None]
        return torch.logaddexp(plain, log_a[..., None] + copied)


class Ngram(nn.Module):
    """A table of embeddings for pairs of tokens and, its second half, for triples, so large that
    few of them share a row (record 92). What does share one rarely shares its row of random signs,
    too, so that what they learn adds up to noise of mean zero (record 83).

    The last row of each half is for tokens with too few before them in their document. The table
    is no parameter: backward gives the gradient of what was looked up, and `RowAdam` updates the
    rows that were. Before training it is None, which stands for zeros and takes no memory.
    """

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.rows, self.dim, self.dtype = cfg.ngram, cfg.d_model, dtype
        self.scale = parameter((cfg.n_layer,), ("constant", 0.1), "scalar")  # of each block's share
        self.register_buffer("table", None)
        self.register_buffer("signs", random_signs(self.dim))
        self.register_load_state_dict_pre_hook(Ngram.make_room)

    def make(self, dtype: torch.dtype | None = None) -> None:
        """The table, all zero, beside the signs, where there is none; dtype: the model's."""
        if self.table is None:
            shape, device = (self.rows, self.dim), self.signs.device
            self.table = torch.zeros(shape, dtype=dtype or self.dtype, device=device)

    def make_room(self, state: dict, prefix: str, *_) -> None:
        """Before `load_state_dict`: who brings no table brings zeros. One made for a checkpoint has
        its dtype: in an fp32 model the table of a GPU's run would take twice its memory."""
        if prefix + "table" in state:
            self.make(state[prefix + "table"].dtype)
        elif self.table is not None:
            state[prefix + "table"] = self.table.zero_()

    def places(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T], starts as `starts_of` has them -> int64 [B, T, 2], of the pair and of the
        triple that end with a token: rows of the table, and of the signs by an independent hash."""
        early, half = starts | before(starts), self.rows // 2
        x = tokens.long()
        y = torch.where(starts, 0, before(x))
        z = torch.where(early, 0, before(y))
        pair = (x * 36_313) ^ (y * 27_191)
        triple = (x * 17_351) ^ (y * 60_961) ^ (z * 45_259)
        row = torch.where(starts, half - 1, pair % (half - 1))
        row3 = torch.where(early, half - 1, triple % (half - 1))
        sign = (x * 52_711) ^ (y * 39_119)
        sign3 = (x * 48_611) ^ (y * 21_379) ^ (z * 57_241)
        # Not the lowest bits, which those of the tokens alone would decide.
        signs = torch.stack([sign, sign3], dim=-1) // 256 % SIGN_ROWS
        return torch.stack([row, half + row3], dim=-1), signs

    def forward(self, tokens: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens and starts as in `places` -> [B, T, d]: the sum of both signed rows."""
        if self.table is None:
            return self.signs.new_zeros(*tokens.shape, self.dim, dtype=dtype)
        rows, signs = self.places(tokens, starts)
        return (F.embedding(rows, self.table).to(dtype) * self.signs[signs]).sum(-2)

    @torch.no_grad()
    def lookup(self, tokens: Tensor, docs: Tensor) -> Tensor:
        """`forward` as GPT's takes it in `pairs`, a leaf of its own."""
        return self(tokens, starts_of(docs), self.dtype)


class MLP(nn.Module):
    """relu(x W1)^2 W2; `fused` and `fp8` ("", forward or both: RunConfig.mlp_fp8) are set by who
    has seen that the kernels work here."""

    fused, fp8 = False, ""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        width = mlp_width(cfg, layer)
        self.up = Linear(width, cfg.d_model)
        self.down = Linear(cfg.d_model, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            weights = self.up.weight, self.down.weight
            weights = unit_rows(*weights) if self.fp8 else weights
            up, down = (weight.to(x.dtype) for weight in weights)
            x, shape = x.flatten(0, -2), x.shape
            if self.fp8:
                eights = mlp_in_fp8(x, *weights)
                return fused_mlp_fp8(x, up, down, *eights, self.fp8 == "both")[0].view(shape)
            return fused_mlp(x, up, down)[0].view(shape)
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attn = None if layer in cfg.no_attention else Attention(cfg, layer)
        self.mlp = MLP(cfg, layer)

    def forward(self, h: Tensor, x: Tensor, ve: Tensor | None, ctx: Context) -> Tensor:
        """h: `norm` of x, both as `NormKeep` has them."""
        if self.attn is not None:
            h, x = NormKeep.apply(x + self.attn(h, ve, ctx))
        return x + self.mlp(h)


def value_tables(cfg: ModelConfig, blocks: nn.ModuleList) -> nn.ParameterList:
    """Each as wide as its widest reader; a narrower one takes the first columns."""
    widths: list[list[int]] = [[] for _ in range(len(cfg.value_layers) or cfg.value_tables)]
    for i, block in enumerate(blocks):
        slot = value_slot(cfg, i)
        if slot is not None:
            widths[slot].append(block.attn.arm.kv_width)
    shapes = [(padded(cfg.vocab), max(some, default=cfg.d_model)) for some in widths]
    return nn.ParameterList(parameter(shape, ("normal", 1.0), "value") for shape in shapes)


class GPT(nn.Module):
    """The speedrun stack. forward(tokens, docs [B, T] int32, window [2]) -> hidden [B, T, d], ready
    for the head. window: long and short, tokens, int32 on the device; or `Limits`, which ask for
    FlashAttention-4. pairs [B, T, d]: what the n-gram table has for tokens; else it is asked."""

    def __init__(self, cfg: ModelConfig, max_length: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.softcap: Cap = SHIFTED_CAP if cfg.shifted_cap else cfg.softcap
        self.flex: bool | None = None  # None: FlexAttention on CUDA, dense on CPU
        shape = (padded(cfg.vocab), cfg.d_model)
        self.embed = parameter(shape, ("normal", 1.0), "embed")
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.head = parameter(shape, ("zeros",), "head")
        if cfg.tie:  # stored twice; `Optimizer.step` keeps them equal
            self.head.init = self.embed.init = ("normal", 0.005)
            self.embed.group, self.embed.starts_as = "tied", "head"
        self.resid = parameter((cfg.n_layer, 2), ("columns", 1.1, 0.0), "scalar")  # a, b
        self.mix = parameter((2,), ("columns", -1.5, 0.5), "scalar")  # skip, backout
        self.values = value_tables(cfg, self.blocks)
        self.ngram = Ngram(cfg, dtype) if cfg.ngram else None
        self.smear = Smear() if cfg.smear else None
        self.pointer = Pointer(cfg) if cfg.copy else None
        self.register_rope(2 * max_length if cfg.paired else max_length)

    def register_rope(self, length: int) -> None:
        cfg = self.cfg
        widths = {cfg.head_dim, cfg.qk_dim or cfg.head_dim, v1_qk_dim(cfg)}
        dims = widths if cfg.rope else set()
        for dim in dims:
            table = rope_table(length, dim, cfg.half_rope)
            self.register_buffer(f"rope_{dim}", table, persistent=False)
        self.rope_dims = sorted(dims)

    def score_scale(self, dim: int) -> float:
        """Under QK norm |score| <= scale x dim, so the scale follows the width of q and k (15.36 /
        dim: 0.12 at 128, record 20; 0.24 at 64); bare q and k take dim^-1/2."""
        if self.cfg.score_scale:
            return self.cfg.score_scale
        return 15.36 / dim if self.cfg.qk_norm else dim**-0.5

    def contexts(self, docs: Tensor, window: Tensor | Limits) -> list[Context | None]:
        """A context for each block; blocks with the same windows share a mask."""
        flex = docs.is_cuda if self.flex is None else self.flex
        make = block_mask if flex and docs.size(1) % BLOCK == 0 else dense_mask
        limits = window.values if isinstance(window, Limits) else None
        sizes = (1, 2) if self.cfg.paired else (1,)
        bounds = (
            {} if limits is None else {n: document_bounds(repeated(docs, n), limits) for n in sizes}
        )
        rope = {dim: getattr(self, f"rope_{dim}") for dim in self.rope_dims}
        starts = starts_of(docs)
        masks, out = {}, []
        for i, block in enumerate(self.blocks):
            if block.attn is None:
                out.append(None)
                continue
            caps = getattr(block.attn.arm, "head_windows", None)
            each = 2 if i in self.cfg.paired else 1  # times that a row has a token
            key = (i in self.cfg.long_layers, caps, each)
            short = not key[0]
            if key not in masks and limits is not None:  # caps come in pairs: one of each map
                of_maps = (caps or (NO_LIMIT,))[:2]
                masks[key] = Documents(bounds[each], limits, short, of_maps), None
            elif key not in masks:
                w = window[int(short)].view(1)
                if caps is not None:
                    w = torch.minimum(w, block.attn.window_caps)
                masks[key] = (make(docs, w, each), w)
            mask, w = masks[key]
            out.append(Context(mask, rope, self.score_scale, starts, docs, w))
        return out

    def forward(
        self, tokens: Tensor, docs: Tensor, window: Tensor | Limits, pairs: Tensor | None = None
    ) -> Tensor:
        cfg = self.cfg
        contexts = self.contexts(docs, window)
        tables = [F.embedding(tokens, t).to(self.dtype) for t in self.values]
        x = F.embedding(tokens, self.embed).to(self.dtype)
        starts = starts_of(docs)
        if self.smear is not None:
            x = self.smear(x, starts)
        x = x0 = norm(x)
        if self.ngram is not None and pairs is None:
            pairs = self.ngram(tokens, starts, self.dtype)
        resid, saved = self.resid.to(self.dtype), {}
        for i, block in enumerate(self.blocks):
            if cfg.skip and i == cfg.skip[1]:  # one skip is worth keeping (record 45)
                x = x + torch.sigmoid(self.mix[0]).to(x.dtype) * saved[cfg.skip[0]]
            if not cfg.x0:
                scales, others = [resid.new_ones(1)], []
            elif i == 0:  # x is x0
                scales, others = [resid[0].sum(0, keepdim=True)], []
            else:
                scales, others = [resid[i]], [x0]
            if self.ngram is not None:
                scales.append(self.ngram.scale[i : i + 1].to(x.dtype))
                others.append(pairs)
            h, x = NormKeep.apply(x, torch.cat(scales), *others)
            slot, ve = value_slot(cfg, i), None
            if slot is not None:
                ve = tables[slot][..., : block.attn.arm.kv_width]
            x = block(h, x, ve, contexts[i])
            if i in (*cfg.skip[:1], cfg.backout):
                saved[i] = x
        if cfg.backout >= 0:
            x = x - self.mix[1].to(x.dtype) * saved[cfg.backout]
        return norm(x)

    @torch.no_grad()
    def logits(self, tokens: Tensor, docs: Tensor, window: Tensor) -> Tensor:
        """[B, T, V] fp32, without the head's padding rows; with a copy head log-probabilities. For
        sampling and tests, not for training."""
        h = self(tokens, docs, window)
        logits = softcap(h @ self.head[: self.cfg.vocab].to(h.dtype).t(), self.softcap)
        if self.pointer is not None:
            logits = self.pointer.mix(logits, h, tokens, docs)
        return logits


def init_parameters(model: nn.Module, seed: int) -> None:
    """Starts every parameter from a generator of its own, seeded by `seed` and its *name*, so that
    tensors that two arms share start byte-identical; `starts_as` is the name of one to equal. A
    parameter without `init` (a user's plain module) keeps the value that it was built with."""
    for name, p in model.named_parameters():
        if getattr(p, "init", None) is None:
            continue
        kind, *args = p.init
        name = getattr(p, "starts_as", name)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        gen = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = torch.empty(p.shape)
        if kind == "normal":
            value.normal_(0, args[0], generator=gen)
        elif kind == "uniform":
            bound = 3**0.5 * args[0]
            value.uniform_(-bound, bound, generator=gen)
        elif kind == "columns":
            value.copy_(torch.tensor(args).expand(p.shape))
        else:
            value.fill_(0.0 if kind == "zeros" else args[0])
        with torch.no_grad():
            p.copy_(value)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """stored; active_matmul (matrices that a token is multiplied with, head included);
    attention (arms and output projections)."""
    active = attention = stored = 0
    for name, p in model.named_parameters():
        group = getattr(p, "group", "")
        stored += p.numel()
        if ".attn." in name:
            attention += p.numel()
        if p.ndim == 2 and group not in ("embed", "tied", "value", "scalar"):
            active += p.numel()
    stored += sum(m.rows * m.dim for m in model.modules() if isinstance(m, Ngram))
    return {"active_matmul": active, "stored": stored, "attention": attention}


def flops_per_token(model: nn.Module, keys_long: float, keys_short: float) -> float:
    """Forward and backward: 6 for each active parameter, and three times each arm's own count. Of a
    loss over the whole vocabulary; `Reporter` takes off what a sampled one saves. The scores of
    `Pointer` are not counted."""
    total = 6.0 * count_parameters(model)["active_matmul"]
    for i, block in enumerate(getattr(model, "blocks", ())):
        if block.attn is not None and hasattr(block.attn.arm, "flops_per_token"):
            keys = keys_long if i in model.cfg.long_layers else keys_short
            total += 3 * block.attn.arm.flops_per_token(keys)
    return total


# ---- 6. Optimizer -------------------------------------------------------------------------------

# Polar Express (record 38): five steps whose polynomials are tuned one by one. The first is of
# x / 1.02, as rounding may take no singular value out of their range.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def unit(u: Tensor, dtype: torch.dtype) -> Tensor:
    """u [n, rows, cols] in dtype, each matrix divided by its norm."""
    norm = torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True, dtype=torch.float32)
    return (u / (norm + 1e-7)).to(dtype)


def orthogonalize(x: Tensor, coefficients=POLAR_EXPRESS) -> Tensor:
    """x [n, rows, cols] of norm 1 -> the nearest semi-orthogonal matrices, roughly: singular values
    that were >= 0.001 come out in [0.847, 1.141] (16 bits blur the smallest ones).

    A step multiplies x by a polynomial of its Gram matrix. Of a long x the Gram matrix itself takes
    the steps, and x the product of their polynomials (dao-lab.ai, "Gram Newton-Schulz"): cheaper,
    but rounding makes small eigenvalues negative, and each step enlarges them: so not all five, and
    not in bfloat16.
    """
    rows, cols = x.shape[1:]
    tall = rows > cols  # then from the right, so that the result is laid out as x is
    long = max(rows, cols) > 2 * min(rows, cols)  # where it pays
    for part in (coefficients[:2], coefficients[2:]) if long else zip(coefficients):
        gram = x.mT @ x if tall else x @ x.mT
        poly = product = None
        for a, b, c in part:
            if poly is not None:
                gram = poly @ gram @ poly
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            poly.diagonal(dim1=1, dim2=2).add_(a)
            product = poly if product is None else poly @ product
        x = x @ product.mT if tall else product @ x  # symmetric but for rounding
    return x


def even_out(step: Tensor, second: Tensor, beta2: float, bad: Tensor) -> Tensor:
    """NorMuon (record 41): step [n, rows, cols] with its rows (columns where they are more) divided
    by the root of their mean squares, which `second` [n, max(rows, cols)] averages over time; each
    matrix keeps its norm. Where `bad`, `second` stays as it is."""
    squares = step.square().mean(2 if step.size(1) >= step.size(2) else 1, keepdim=True)
    second.lerp_(squares.flatten(1), torch.where(bad, 0.0, 1 - beta2))
    mean = second.view_as(squares).clamp(min=1e-10)
    kept = squares.sum((1, 2), keepdim=True)
    norm = (squares / mean).sum((1, 2), keepdim=True).clamp(min=1e-30)
    return step * (kept / (norm * mean)).sqrt()


@dataclass(frozen=True)
class Group:
    """A row of the optimizer's table."""

    kind: str  # muon | adam
    lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    wd: float = 0.0
    eps: float = 1e-10
    beta2: float = 0.0  # muon: see `even_out`
    cautious_wd: float = 0.0  # see `muon_update`, `adam_decay`


def add_(t: Tensor, x: Tensor, factor: float | Tensor) -> Tensor:
    """t += factor x in place. In a compiled graph only a tensor may change from step to step."""
    return t.add_(x * factor) if isinstance(factor, Tensor) else t.add_(x, alpha=factor)


def muon_direction(grad: Tensor, momentum: Tensor, mu, rest, bad: Tensor, dtype) -> Tensor:
    """Nesterov momentum as interpolations (TECHNIQUES 2.1); rest = 1 - mu, floats or tensors. Of
    matrices [n, rows, cols], each of which comes out divided by its norm."""
    grad = torch.where(bad, momentum, grad)  # NaN x 0 is NaN; drawn towards itself it stays
    momentum.lerp_(grad, rest)
    u = grad.lerp(momentum, mu)
    if dtype == torch.float16:  # compiled, it waits in memory for the norm: in 16 bits of any size
        u = u.to(torch.bfloat16)
    return unit(u, dtype)


def muon_update(
    weights: Tensor, step: Tensor, second: Tensor | None, rate, bad: Tensor, group: Group
) -> None:
    """weights [n, rows, cols] -= rate x sqrt(max(1, rows / cols)) x step, an orthogonal one."""
    step = step.to(weights.dtype)
    if group.beta2:
        step = even_out(step, second, group.beta2, bad)
    if group.cautious_wd:  # only where both shrink the weight; cools with lr squared
        agrees = torch.where(step * weights >= 0, weights, 0.0)
        step = add_(step, agrees, rate * group.cautious_wd)
    if group.wd:
        weights.mul_(torch.where(bad, 1.0, 1 - rate * group.wd))
    tall = max(1, step.size(1) / step.size(2)) ** 0.5
    add_(weights, step.masked_fill_(bad, 0), -rate * tall)


def adam_decay(weights: Tensor, mean: Tensor, rate, bad: Tensor, group: Group) -> None:
    """Cautious decay after an Adam step: where its first moment says that it shrank the weight."""
    if group.cautious_wd:
        share = torch.where(bad, 0.0, rate**2 * group.cautious_wd)
        weights.mul_(torch.where(weights * mean > 0, 1 - share, 1.0))


def adam_update(
    weights: Tensor, grad: Tensor, state: dict[str, Tensor], rate, bad: Tensor, group: Group
) -> None:
    """AdamW (1711.05101) on flat tensors, by PyTorch's own kernel."""
    keys = ("exp_avg", "exp_avg_sq", "step")
    mean, square, steps = ([state[key]] for key in keys)
    rest = {"beta1": group.betas[0], "beta2": group.betas[1], "eps": group.eps, "lr": rate}
    rest |= {"amsgrad": False, "maximize": False, "weight_decay": group.wd}
    adamw(*([weights], [grad], mean, square, [], steps), fused=True, found_inf=bad.float(), **rest)
    adam_decay(weights, mean[0], rate, bad, group)


def adam_pass(
    weights: Tensor, grad: Tensor, state: dict[str, Tensor], rate, bad: Tensor, group: Group
) -> None:
    """The same for a compiled graph, which makes one pass of it, decay included."""
    mean, square, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
    steps.add_(bad.logical_not())
    grow, root = (1 / (1 - beta**steps) for beta in group.betas)  # of what started at 0
    mean.lerp_(torch.where(bad, mean, grad), 1 - group.betas[0])
    square.lerp_(torch.where(bad, square, grad.square()), 1 - group.betas[1])
    step = rate * grow * mean / (square.sqrt() * root.sqrt() + group.eps)
    if group.wd:
        weights.mul_(torch.where(bad, 1.0, 1 - rate * group.wd))
    weights.sub_(step.masked_fill_(bad, 0))
    adam_decay(weights, mean, rate, bad, group)


def parameter_groups(o: OptimConfig) -> dict[str, Group]:
    """The one table: what `p.group` names (constants of records 20 to 57, see OptimConfig)."""
    adam = functools.partial(Group, "adam", eps=o.adam_eps, wd=o.adam_wd)
    decay = o.cautious_adam_wd
    head = adam(o.head_lr, o.head_betas, cautious_wd=150 * decay)
    return {
        "matrix": Group(
            "muon", o.matrix_lr, wd=o.matrix_wd, beta2=o.normuon, cautious_wd=o.cautious_wd
        ),
        "head": head,
        "embed": adam(o.embed_lr, o.head_betas, cautious_wd=5 * decay),  # a table by its lr
        "tied": head,  # the embedding under --tie: as the head, also after they part
        "value": adam(o.value_lr, o.value_betas, cautious_wd=5 * decay),
        "ngram": adam(o.value_lr, (0.0, 0.95), cautious_wd=5 * decay),  # record 92; see RowAdam
        "scalar": adam(o.scalar_lr, o.scalar_betas, wd=0.0),
        "gate": adam(o.gate_lr, (0.9, 0.99), wd=0.0),
        "smear": adam(0.01 * o.gate_lr, (0.9, 0.99), wd=0.0),  # record 52
    }


def group_of(name: str, p: nn.Parameter) -> str:
    """A parameter's own tag; a plain module's matrices go to Muon, the rest to Adam."""
    return getattr(p, "group", "matrix" if p.ndim == 2 else "gate")


def matrix_view(p: nn.Parameter) -> tuple[int, int, int]:
    return getattr(p, "muon_view", None) or (1, *p.shape)


def wait_for(handles: list) -> None:
    """Until these collectives are through; None stands for one of a single rank."""
    for handle in handles:
        if handle is not None:
            handle.wait()


class Bank:
    """Parameters of one group and matrix shape, behind one flat tensor and one flat gradient.

    `p.data` are views of the first, so a collective needs no copies; `take` brings what backward
    left into the second. Each rank owns one slice: its optimizer state exists there alone. How a
    slice is updated is for `MuonBank` and `AdamBank` to say.
    """

    def __init__(
        self, group: Group, items: list[tuple[str, nn.Parameter]], world: World, unit: int
    ):
        """unit: elements; each parameter and each slice takes a multiple of it."""
        self.group, self.world, self.slots = group, world, {}
        offset = 0
        for name, p in items:
            self.slots[name] = (offset, p)
            offset += math.ceil(p.numel() / unit) * unit
        total = math.ceil(offset / (unit * world.size)) * unit * world.size
        device = items[0][1].device
        self.data = torch.zeros(total, device=device)
        self.grad = torch.zeros(total, device=device)
        self.views: list[tuple[nn.Parameter, Tensor]] = []  # of the flat gradient
        for offset, p in self.slots.values():
            part = slice(offset, offset + p.numel())
            self.data[part] = p.data.flatten()
            p.data = self.data[part].view(p.shape)
            self.views.append((p, self.grad[part].view(p.shape)))
        own = total // world.size
        part = slice(world.rank * own, (world.rank + 1) * own)
        self.own, self.kept = self.data[part], self.grad[part]
        self.own_grad = self.grad if world.size == 1 else torch.zeros_like(self.own)
        self.held = False  # `kept` has the gradient of earlier steps
        self.tail: Tensor | None = None  # mean of the owned weights, see `Tail`
        self.compiled = False

    def clear(self) -> None:
        for p, _ in self.views:
            p.grad = None
        self.held = False

    def take(self) -> None:
        """The parameters' gradients become views of the flat one. What backward left in tensors of
        its own is copied there: one pass, where zeroing and adding would be two."""
        filled, fresh = [], []
        for p, view in self.views:
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                filled.append(view)
                fresh.append(p.grad)
            p.grad = view
        if fresh:
            torch._foreach_copy_(filled, fresh)

    def hold(self, own: Tensor | None = None) -> None:
        """Leaves the gradient to a later step: of the sum over ranks, each rank its own slice."""
        if own is not None or self.world.size > 1:
            self.grad.zero_()
            self.kept.copy_(self.own_grad if own is None else own)
        self.held = True

    def gather(self):
        """The weights <- all ranks' slices; a handle, see `wait_for`."""
        return self.world.all_gather(self.data, self.own)

    def factors(self, lr: float, momentum: float) -> tuple:
        """The rate, momentum and what that leaves to 1; tensors for a compiled graph."""
        factors = (self.group.lr * lr, momentum, 1 - momentum)
        if self.compiled:
            factors = on_device(torch.tensor(factors), self.own.device).unbind()
        return factors

    def state(self) -> dict[str, Tensor]:
        """Name of each state tensor -> its owned slice."""
        return {} if self.tail is None else {"tail": self.tail}

    def counts(self) -> dict[str, Tensor]:
        """State that is one number for all weights."""
        return {}

    def load(self, key: str, own: Tensor) -> None:
        """One tensor of `state` or `counts`, this rank's own."""
        setattr(self, key, own)

    def state_dict(self, wanted: bool) -> dict[str, dict[str, Tensor]]:
        """This bank's share in that of `Optimizer`."""
        out: dict[str, dict[str, Tensor]] = {}
        for key, own in self.state().items():
            full, k = own, self.own.numel() // own.numel()
            if self.world.size > 1:
                full = own.new_empty(own.numel() * self.world.size)
                self.world.all_gather(full, own).wait()
            for name, (offset, p) in self.slots.items() if wanted else ():
                part = full[offset // k : (offset + p.numel()) // k]
                shape = p.shape if k == 1 else (matrix_view(p)[0], -1)
                out.setdefault(name, {})[key] = to_host(part.view(shape))
        for key, count in self.counts().items() if wanted else ():
            for name in self.slots:
                out[name][key] = to_host(count)
        return out

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """After `reset` and `clear`."""
        first = state.get(next(iter(self.slots)), {})
        for key in (key for key in first if key not in ("step", "samples")):
            k = next(iter(self.slots.values()))[1].numel() // first[key].numel()
            full = self.data.new_zeros(self.data.numel() // k)
            for name, (offset, p) in self.slots.items():
                full[offset // k : (offset + p.numel()) // k] = state[name][key].flatten()
            n = self.own.numel() // k
            self.load(key, full[self.world.rank * n : (self.world.rank + 1) * n].clone())
        if "step" in first:
            self.load("step", first["step"].to(self.own.device, copy=True))


class MuonBank(Bank):
    """Matrices of one shape, each of which lies on one rank whole."""

    def __init__(self, group: Group, items: list[tuple[str, nn.Parameter]], world: World):
        self.matrix: tuple[int, int] = matrix_view(items[0][1])[1:]
        super().__init__(group, items, world, unit=self.matrix[0] * self.matrix[1])
        self.direct, self.turn = muon_direction, muon_update
        self.reset()

    def reset(self) -> None:
        """State as at step 0."""
        self.momentum = torch.zeros_like(self.own)
        if self.group.beta2:
            self.second = self.own.new_zeros(self.own.numel() // min(self.matrix))

    def compile(self) -> None:
        """What is pointwise around the products, in a pass or two."""
        self.compiled = True
        wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self.direct, self.turn = wrap(muon_direction), wrap(muon_update)

    @torch.no_grad()
    def update(self, lr: float, momentum: float, dtype: torch.dtype, bad: Tensor) -> None:
        """One step on the owned slice. lr: the schedule's factor on the group's. bad: a bool on the
        device; where it is true, weights and state stay as they are, to the bit."""
        group, factors = self.group, self.factors(lr, momentum)
        grad, mean = (t.view(-1, *self.matrix) for t in (self.own_grad, self.momentum))
        step = orthogonalize(self.direct(grad, mean, *factors[1:], bad, dtype))
        second = self.second.view(len(step), -1) if group.beta2 else None
        self.turn(self.own.view_as(step), step, second, factors[0], bad, group)

    def state(self) -> dict[str, Tensor]:
        """`second` has a number for every min(rows, cols) weights."""
        mine = {k: getattr(self, k) for k in ("momentum", "second") if hasattr(self, k)}
        return mine | super().state()


class AdamBank(Bank):
    """Parameters of any shapes."""

    ALIGN = 64  # elements: Inductor copies inputs that are not aligned
    FEW = 1 << 20  # elements; fewer do not pay for a graph

    def __init__(self, group: Group, items: list[tuple[str, nn.Parameter]], world: World):
        super().__init__(group, items, world, unit=self.ALIGN)
        self.adam_update = adam_update
        self.reset()

    def reset(self) -> None:
        """State as at step 0."""
        self.adam: dict[str, Tensor] = {}  # from the first step on: a parked run has no need

    def compile(self) -> None:
        """In a pass or two."""
        if self.own.numel() < self.FEW:
            return
        self.compiled = True
        self.adam_update = torch.compile(adam_pass, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def update(self, lr: float, momentum: float, dtype: torch.dtype, bad: Tensor) -> None:
        """As that of `MuonBank`; momentum and dtype are Muon's."""
        factors = self.factors(lr, momentum)
        if not self.adam:
            self.adam = {key: torch.zeros_like(self.own) for key in ("exp_avg", "exp_avg_sq")}
            self.adam["step"] = self.own.new_zeros(())
        self.adam_update(self.own, self.own_grad, self.adam, factors[0], bad, self.group)

    def state(self) -> dict[str, Tensor]:
        """Both moments, and a gradient that it holds."""
        moments = {key: t for key, t in self.adam.items() if key != "step"}
        return moments | ({"grad": self.kept} if self.held else {}) | super().state()

    def counts(self) -> dict[str, Tensor]:
        return {"step": self.adam["step"]} if self.adam else {}

    def load(self, key: str, own: Tensor) -> None:
        if key == "grad":
            self.take()
            self.hold(own)
        elif key == "tail":
            super().load(key, own)
        else:
            self.adam[key] = own


def banks_of(
    model: nn.Module,
    groups: dict[str, Group],
    world: World,
    assign: Callable[[str, nn.Parameter], str],
) -> list[tuple[str, Bank]]:
    """(group's name, bank) for all that is trained; Muon's has a bank for each shape of matrix."""
    items: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        group = assign(name, p)
        shape = matrix_view(p)[1:] if groups[group].kind == "muon" else ()
        items.setdefault((group, shape), []).append((name, p))
    kinds = {"muon": MuonBank, "adam": AdamBank}
    return [
        (group, kinds[groups[group].kind](groups[group], some, world))
        for (group, _), some in items.items()
    ]


def row_update(
    table: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    places: Tensor,
    signs: Tensor,
    grad: Tensor,
    factor: Tensor,
    rate: float,
    bad: Tensor,
    group: Group,
) -> None:
    """An update of the rows of `table` [rows, d] that `places` int32 [N, 2, 2] names, in place.

    places: of two rows that a token had looked up, the row and its row of `signs`; grad [N, d] is
    the gradient of their sum, to be multiplied with `factor`. state: the rows' second moments
    [rows], the updates in which they last moved [rows], and the number of this one, int32.
    """
    second, seen, count = state
    rows, which = places[..., 0].flatten().unique(return_inverse=True)
    each = grad[:, None].float() * signs[places[..., 1].long()]
    total = second.new_zeros(len(rows), table.size(1)).index_add_(0, which, each.flatten(0, 1))
    total *= factor
    old, old_second, beta2 = table[rows], second[rows], group.betas[1]
    square = beta2 ** (count - seen[rows]) * old_second + (1 - beta2) * total.square().mean(1)
    root = (square / (1 - beta2**count)).sqrt() + group.eps
    new = old.float() * (1 - rate * group.wd) - rate * total / root[:, None]
    new = torch.where(new * total > 0, new * (1 - rate**2 * group.cautious_wd), new)
    table[rows] = torch.where(bad, old, new.to(old.dtype))
    second[rows] = torch.where(bad, old_second, square)
    seen[rows] = torch.where(bad, seen[rows], count)


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of tensors as a pair."""
    if len(parts) == 1:
        return parts[0]
    first, second = (torch.cat(some) for some in zip(*parts, strict=True))
    return first, second


class RowAdam:
    """Adam for the table of an `Ngram` (record 92): without a first moment, with one second moment
    for a row, and in an update only what was looked up since the last one moves or decays. What
    the second moments of other rows miss is made up for when they are next looked up.

    Every rank has the whole table and makes the same update, from all ranks' gradients.
    """

    NAME = "ngram.table"  # of the table in the model's state, and of this one's in the optimizer's

    def __init__(self, ngram: Ngram, group: Group, world: World):
        self.ngram, self.group, self.world = ngram, group, world
        self.update_rows = row_update
        device = ngram.signs.device
        self.second = torch.zeros(ngram.rows, device=device)
        self.seen = torch.zeros(ngram.rows, dtype=torch.int32, device=device)
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        # (places, gradient) as in `row_update`: this rank's of a step; all ranks' of earlier ones.
        self.fresh: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """State as at step 0."""
        self.clear()
        for t in (self.second, self.seen, self.count):
            t.zero_()

    @torch.no_grad()
    def hold(self, tokens: Tensor, docs: Tensor, grad: Tensor) -> None:
        """Takes the gradient [B, T, d] of what was looked up for tokens [B, T]."""
        places = torch.stack(self.ngram.places(tokens, starts_of(docs)), dim=-1).int()
        self.fresh.append((places.flatten(0, 1), grad.flatten(0, 1)))

    def collect(self) -> Tensor:
        """Holds a step's gradients, of all ranks; returns the sum of squares [1] of this rank's,
        which is finite where they are."""
        mine, self.fresh = self.fresh, []
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for _, grad in mine]
        if self.world.size > 1:
            own = joined(mine)
            full = [t.new_empty(self.world.size * len(t), *t.shape[1:]) for t in own]
            wait_for([self.world.all_gather(*pair) for pair in zip(full, own, strict=True)])
            mine = [tuple(full)]
        self.held += mine
        return torch.stack(norms).square().sum().view(1)

    @torch.no_grad()
    def update(self, lr: float, factor: Tensor, bad: Tensor) -> None:
        """One step from all that is held. factor: on the gradient; lr, bad: as a bank's."""
        places, grad = joined(self.held)
        self.clear()
        self.count.add_(bad.logical_not())
        state = (self.second, self.seen, self.count)
        rest = (factor, self.group.lr * lr, bad, self.group)
        self.update_rows(self.ngram.table, state, places, self.ngram.signs, grad, *rest)

    def state(self) -> dict[str, Tensor]:
        """Name of each state tensor -> it, the same on every rank."""
        out = {"second": self.second, "seen": self.seen, "step": self.count}
        if self.held:
            out["places"], out["grad"] = joined(self.held)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        self.reset()
        for t, key in ((self.second, "second"), (self.seen, "seen"), (self.count, "step")):
            if key in state:
                t.copy_(state[key])
        if "grad" in state:
            device = self.second.device
            self.held.append((state["places"].to(device), state["grad"].to(device)))


class Tail:
    """A running mean of samples of the weights, of which each bank keeps its owned slice (--tail).
    Not of an n-gram table, beside which there may be no room for another."""

    def __init__(self, banks: list[Bank]):
        self.banks, self.samples = banks, 0

    def drop(self) -> None:
        self.samples = 0
        for bank in self.banks:
            bank.tail = None

    @torch.no_grad()
    def sample(self) -> None:
        """The weights as they are count in the mean."""
        self.samples += 1
        for bank in self.banks:
            if bank.tail is None:
                bank.tail = bank.own.clone()
            else:
                bank.tail.lerp_(bank.own, 1 / self.samples)

    @torch.no_grad()
    def blend(self, share: float) -> None:
        """weights += share x (mean of the samples - weights), on every rank, all groups alike; then
        there are no samples. What was one matrix (`Optimizer.tied`) stays one."""
        gathers = []
        for bank in self.banks:
            bank.own.lerp_(bank.tail, share)
            gathers.append(bank.gather())
        wait_for(gathers)
        self.drop()


class Optimizer:
    """Muon and Adam over banks, sharded over ranks; the same numbers at every world size.

    Three phases: launch every reduce-scatter, the largest first; update the owned slices, the
    smallest first, each followed by its all-gather; wait. At world size 1 the collectives vanish.
    """

    def __init__(
        self, model: nn.Module, groups: dict[str, Group], world: World, *, assign=group_of
    ):
        self.world, self.clip, self.muon_dtype = world, 0.0, torch.float32
        banks = banks_of(model, groups, world, assign)
        self.banks = sorted((bank for _, bank in banks), key=lambda b: b.data.numel())
        named = dict(banks)
        self.tied = [named[group] for group in ("head", "tied") if "tied" in named]
        ngram = getattr(model, "ngram", None)
        self.rows = None if ngram is None else RowAdam(ngram, groups["ngram"], world)
        self.bad = torch.zeros((), dtype=torch.bool, device=self.banks[0].data.device)
        self.tail = Tail(self.banks)

    def zero_grad(self) -> None:
        for bank in self.banks:
            bank.clear()
        if self.rows is not None:
            self.rows.clear()

    def reset(self) -> None:
        self.zero_grad()
        self.bad.zero_()
        self.tail.drop()
        for bank in self.banks:
            bank.reset()
        if self.rows is not None:
            self.rows.reset()

    @torch.no_grad()
    def step(
        self,
        lr: float,
        momentum: float,
        beside: Tensor | None = None,
        *,
        tied: bool = False,
        adam: bool = True,
    ) -> Tensor:
        """Updates, clears the gradients, returns the gradient's norm (of LOSS_SCALE x loss), in
        which the rows of an n-gram table do not count.

        tied: head and embedding get the sum of their gradients. As their weights, state and
        settings are equal, so are their updates: they are one matrix until this stops.
        adam: else Adam's gradients stay and count in the next step, its norm included.
        beside [n]: figures that are summed over ranks in place, in the norm's own collective. Where
        the norm or one of them is not finite, `bad` becomes true and stays so: no rank updates
        anything from this step on, and no host waited to find out.
        """
        for bank in self.banks:
            bank.take()
        wait_for([self.world.reduce_scatter(b.grad, b.own_grad) for b in reversed(self.banks)])
        grads = [b.own_grad for b in self.banks]
        if tied and adam:
            head, embed = (b.own_grad for b in self.tied)
            embed.copy_(head.add_(embed))
            grads = [g for g in grads if g is not embed]  # the norm counts it once
        length = self.norm(grads, beside)
        if self.clip:
            factor = (self.clip * LOSS_SCALE / (length + 1e-6)).clamp(max=1.0)
            factor = torch.where(self.bad, 1.0, factor)  # between parameters zeros stay zeros
            torch._foreach_mul_([b.own_grad for b in self.banks], factor)
        elif self.rows is not None:
            factor = torch.ones_like(length)
        gathers = []
        for bank in self.banks:
            if bank.group.kind == "muon" or adam:
                bank.update(lr, momentum, self.muon_dtype, self.bad)
                gathers.append(bank.gather())
                bank.clear()
            else:
                bank.hold()
        if self.rows is not None and adam:
            self.rows.update(lr, factor, self.bad)
        wait_for(gathers)
        return length

    def norm(self, grads: list[Tensor], beside: Tensor | None) -> Tensor:
        """Of the gradient, over all ranks; takes in that of the table's rows, and closes the gate
        `bad`: see `step`, for `beside`, too."""
        squares = torch.stack(torch._foreach_norm(grads)).square()
        mine = [squares.sum().view(1)] + ([] if beside is None else [beside])
        if self.rows is not None:
            mine.append(self.rows.collect())
        sums = self.world.sum(torch.cat(mine))
        self.bad.logical_or_(sums.isfinite().all().logical_not())
        length = sums[0].sqrt()
        if beside is not None:
            beside.copy_(sums[1 : 1 + len(beside)])
        if self.rows is not None:  # who looks at the norm is to see what closed the gate
            length = torch.where(sums[-1].isfinite(), length, sums[-1])
        return length

    def state_dict(self, wanted: bool = True) -> dict[str, dict[str, Tensor]]:
        """{parameter's name: {state's name: tensor of the parameter's shape, `second` [n, max(rows,
        cols)], counts}}, in the CPU's memory, the same at any world size. A collective call; a rank
        that does not want it gets {}."""
        out: dict[str, dict[str, Tensor]] = {}
        for bank in self.banks:
            out |= bank.state_dict(wanted)
        if self.tail.samples:
            for states in out.values():
                states["samples"] = torch.tensor(self.tail.samples)
        if wanted and self.rows is not None:
            out[RowAdam.NAME] = {key: to_host(t) for key, t in self.rows.state().items()}
        self.world.synchronize()
        return out

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.reset()
        for bank in self.banks:
            bank.load_state_dict(state)
        samples = (int(states["samples"]) for states in state.values() if "samples" in states)
        self.tail.samples = max(samples, default=0)
        if self.rows is not None:
            self.rows.load(state.get(RowAdam.NAME, {}))


# ---- 7. Data ------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
HEADER_BYTES = 256 * 4
SPLITS = ("train", "dev", "val")
DEV_TOKENS = 2_097_152  # held out of train where nothing else is named
EDGES = (128, 512, 1024, 2048, 4096)  # of the positions that losses are reported by


@dataclass(frozen=True)
class Shard:
    """Tokens [lo, hi) of a file: 256 int32 header (magic, version, count, ...), then uint16."""

    path: Path
    lo: int
    hi: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Checks header and length; InputError says which file is bad and how."""
        if not path.is_file():
            raise InputError(f"no shard {path}: ./run.sh data fetches or makes them")
        head = np.fromfile(path, np.int32, 256)
        if head.size < 256 or head[0] != SHARD_MAGIC or head[1] != 1:
            raise InputError(f"{path} is no token shard (magic {SHARD_MAGIC}, version 1)")
        want, have = HEADER_BYTES + 2 * int(head[2]), path.stat().st_size
        if want != have:
            raise InputError(f"{path} is cut or padded: {have} bytes, its header says {want}")
        return cls(path, 0, int(head[2]))

    @property
    def tokens(self) -> int:
        return self.hi - self.lo

    def load(self) -> np.ndarray:
        return np.fromfile(self.path, np.uint16, self.tokens, offset=HEADER_BYTES + 2 * self.lo)


@dataclass
class Corpus:
    """A folder of shards with its splits; `bytes_of` counts a token's bytes, or is None."""

    splits: dict[str, list[Shard]]
    vocab: int
    eot: int
    files: list[dict]  # name, split, sha256, tokens: for the header
    bytes_of: np.ndarray | None

    @classmethod
    def open(cls, folder: str, dev: str = "") -> Corpus:
        root = Path(folder)
        if not folder or not root.is_dir():
            raise InputError(
                f"no folder of tokens {folder!r}: give --data DIR (./run.sh data --help makes one)"
            )
        if (root / "manifest.json").is_file():
            corpus = cls.from_manifest(root)
        else:
            corpus = cls.from_names(root)
        if not corpus.splits.get("train"):
            raise InputError(f"{root} holds no train shards (*train*.bin)")
        if dev:
            corpus.name_dev(Path(dev))
        corpus.hold_out_dev()
        return corpus

    @classmethod
    def from_manifest(cls, root: Path) -> Corpus:
        try:
            m = json.loads((root / "manifest.json").read_text())
            rows, vocab, eot = m["files"], int(m["vocab"]), int(m["eot"])
            if not 0 <= eot < vocab <= 2**16:
                raise ValueError(f"end-of-text {eot} in a vocabulary of {vocab}")
            splits: dict[str, list[Shard]] = {}
            for row in rows:
                shard = Shard.open(root / Path(row["name"]).name)
                if shard.tokens != row["tokens"]:
                    raise InputError(f"{shard.path} and manifest.json disagree on its tokens")
                splits.setdefault(row["split"], []).append(shard)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as e:  # ValueError: no JSON, no UTF-8, no int
            raise InputError(f"{root}/manifest.json is damaged: {e!r}") from None
        table = root / "token_bytes.bin"
        bytes_of = np.fromfile(table, np.uint16) if table.is_file() else None
        if bytes_of is not None and 2 * vocab != table.stat().st_size:
            raise InputError(f"{table} is not uint16 [{vocab}]: remove it, or make the data again")
        return cls(splits, vocab, eot, rows, bytes_of)

    @classmethod
    def from_names(cls, root: Path) -> Corpus:
        """Shards published by others: GPT-2 tokens, sorted by name, no manifest."""
        for path in root.glob("*.bin"):
            named = [s for s in SPLITS if s in path.name]
            if len(named) > 1:
                raise InputError(f"{path} names two splits, {' and '.join(named)}: rename it")
        splits = {s: [Shard.open(p) for p in sorted(root.glob(f"*{s}*.bin"))] for s in SPLITS}
        rows = [
            {"name": s.path.name, "split": split, "tokens": s.tokens}
            for split, shards in splits.items()
            for s in shards
        ]
        return cls({k: v for k, v in splits.items() if v}, 50_257, 50_256, rows, None)

    def name_dev(self, path: Path) -> None:
        """Makes a file the dev split; where it is a train shard, it is trained on no more."""
        held = Shard.open(path)
        rest = [s for s in self.splits["train"] if not s.path.samefile(path)]
        if not rest:
            raise InputError(f"--dev {path} is the only train shard")
        self.splits |= {"dev": [held], "train": rest}

    def hold_out_dev(self) -> None:
        """Where there is no dev split, the end of one train shard becomes it."""
        if self.splits.get("dev"):
            return
        train = self.splits["train"]
        names = [s.path.name for s in train]
        i = next((i for i, n in enumerate(names) if n.endswith("_train_000001.bin")), -1)
        n = min(DEV_TOKENS, train[i].tokens, max(1, sum(s.tokens for s in train) // 20))
        cut = train[i].hi - n
        self.splits["dev"] = [dataclasses.replace(train[i], lo=cut)]
        train[i] = dataclasses.replace(train[i], hi=cut)

    def tokens(self, split: str) -> int:
        return sum(s.tokens for s in self.splits.get(split, ()))

    def check_digests(self) -> list[dict]:
        """Hashes every file in use, compares with the manifest; the rows for the log's header."""
        said = {Path(row["name"]).name: row.get("sha256") for row in self.files}
        used = [(split, s) for split, shards in self.splits.items() for s in shards]
        paths = list(dict.fromkeys(s.path for _, s in used))
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(paths, pool.map(sha256, paths), strict=True))
        for path, digest in digests.items():
            if (said.get(path.name) or digest) != digest:
                raise InputError(f"{path} is not what manifest.json says: sha256")
        return [
            {"name": s.path.name, "split": split, "tokens": s.tokens, "sha256": digests[s.path]}
            for split, s in used
        ]

    def check_tokens(self) -> None:
        """Refuses shards of another tokenizer: on a GPU an assertion would kill the context."""
        paths = list({s.path for shards in self.splits.values() for s in shards})
        with ThreadPoolExecutor() as pool:
            for path, token in zip(paths, pool.map(largest_token, paths), strict=True):
                if token >= self.vocab:
                    said = f"token {token}, beyond the vocabulary of {self.vocab}"
                    raise InputError(f"{path} has {said}: it was made with another tokenizer")


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def largest_token(path: Path) -> int:
    """Of a whole shard; -1 where it holds none."""
    size = path.stat().st_size - HEADER_BYTES
    return int(np.memmap(path, np.uint16, "r", HEADER_BYTES).max()) if size else -1


class TokenStream:
    """A split as one endless string of tokens: shards after another, pass after pass.

    data_seed 0 keeps the files' order; else shards, and documents inside each, are permuted anew
    on every pass. No token is lost or repeated within a pass.
    """

    def __init__(self, shards: list[Shard], eot: int, data_seed: int = 0):
        self.shards, self.eot, self.seed = shards, eot, data_seed
        self.total = sum(s.tokens for s in shards)
        self.cache: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def order(self, turn: int) -> np.ndarray:
        """Indices of the shards as this pass reads them."""
        if not self.seed:
            return np.arange(len(self.shards))
        return np.random.default_rng((self.seed, turn)).permutation(len(self.shards))

    def load(self, turn: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, first: whether a token opens a document) of a shard as this pass has it."""
        key = (turn if self.seed else 0, index)
        if key not in self.cache:
            tokens = self.shards[index].load()
            first = tokens == self.eot
            first[:1] = True
            if self.seed:
                rng = np.random.default_rng((self.seed, turn, index))
                tokens, first = permute_documents(tokens, first, rng)
            while len(self.cache) >= 2:  # a read may run over from one into the next
                self.cache.pop(next(iter(self.cache)))
            self.cache[key] = (tokens, first)
        return self.cache[key]

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from absolute position `start`, and which of them open a document."""
        tokens, first = np.empty(count, np.uint16), np.empty(count, bool)
        done = 0
        while done < count:
            turn, at = divmod(start + done, self.total)
            for index in self.order(turn):
                size = self.shards[index].tokens
                if at < size:
                    break
                at -= size
            part = slice(at, at + min(count - done, size - at))
            t, f = self.load(turn, int(index))
            n = part.stop - part.start
            tokens[done : done + n], first[done : done + n] = t[part], f[part]
            done += n
        return tokens, first


def permute_documents(tokens: np.ndarray, first: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, first) with the documents, each of which a True of `first` opens, in other order."""
    parts = np.split(tokens, np.flatnonzero(first)[1:])
    parts = [parts[i] for i in rng.permutation(len(parts))]
    first = np.zeros(len(tokens), bool)
    first[np.cumsum([0] + [len(p) for p in parts[:-1]])] = True
    return np.concatenate(parts), first


@dataclass
class Batch:
    """Rows of a step or of a validation call; [rows, row_tokens] each, on the CPU or the device."""

    tokens: Tensor  # int32
    targets: Tensor  # int64, the next token; -1: no loss
    docs: Tensor  # int32, counts documents along a row
    position: Tensor  # int32, in the document's piece

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))

    def pin(self) -> Batch:
        return Batch(*(t.pin_memory() for t in vars(self).values()))

    def split(self, rows: int) -> list[Batch]:
        return [Batch(*p) for p in zip(*(t.split(rows) for t in vars(self).values()), strict=True)]

    def mean_keys(self, window: int) -> float:
        """Keys that a query sees in its document and window, mean over the batch."""
        return float((self.position + 1).clamp(max=window).double().mean())


def make_batch(stream: TokenStream, start: int, rows: int, row: int, limit: int = 0) -> Batch:
    """Rows [start + i row, ... + row) of the stream; targets are the tokens after. With `limit`,
    targets at absolute positions beyond it are -1."""
    n = rows * row
    tokens, first = stream.read(start, n + 1)
    targets = tokens[1:].astype(np.int64)
    if limit and start + n > limit:
        keep = max(0, limit - start)
        targets[keep:] = -1
    first = first[:-1].reshape(rows, row)
    at = np.arange(row, dtype=np.int32)
    opened = np.maximum.accumulate(np.where(first, at, 0), axis=1)
    return Batch(
        torch.from_numpy(tokens[:-1].astype(np.int32).reshape(rows, row)),
        torch.from_numpy(targets.reshape(rows, row)),
        torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int32)),
        torch.from_numpy(at - opened.astype(np.int32)),
    )


def train_batches(stream: TokenStream, steps: list[Step], cfg: Config, world: World):
    """Yields this rank's Batch of each step, prepared one step ahead in a thread.

    A step's rows depend on its position in the stream alone; ranks take consecutive shares.
    """

    def make(step: Step) -> Batch:
        rows, row = step_rows(step.tokens, cfg.data.row_tokens)
        share = rows // world.size
        batch = make_batch(stream, step.start + world.rank * share * row, share, row)
        return batch.pin() if world.cuda else batch

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, steps[0]) if steps else None
        for i in range(len(steps)):
            batch = ahead.result()
            if i + 1 < len(steps):
                ahead = pool.submit(make, steps[i + 1])
            yield batch


def micro_rows(rows: int, row: int, micro_batch_tokens: int) -> int:
    """Rows of a kernel call: the largest divisor of `rows` within the micro-batch."""
    most = max(1, min(rows, micro_batch_tokens // row))
    return next(n for n in range(most, 0, -1) if rows % n == 0)


# ---- 8. Run folder ------------------------------------------------------------------------------
# run.log and run.jsonl, and ckpt/step_*: what is written, and how it is read again.


def sync(path: Path) -> None:
    """A file's or folder's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class RunLog:
    """run.log for people, run.jsonl for programs: a hash chain catches edits, not forgery.

    Rank 0's is `active`, the others' write nothing. On a terminal there is a bar, too.
    """

    def __init__(self, folder: Path, active: bool):
        self.folder, self.active = folder, active
        self.h, self.bar = "", active and sys.stderr.isatty()
        if active:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, /, **values) -> None:
        """A line of run.jsonl."""
        if not self.active:
            return
        line = json.dumps({"t": kind, **values})
        self.h = hashlib.sha256((self.h + line).encode()).hexdigest()[:16]
        with (self.folder / "run.jsonl").open("a") as f:
            f.write(f'{line[:-1]}, "h": "{self.h}"}}\n')

    def say(self, text: str) -> None:
        """Lines of run.log, and on the terminal."""
        if not self.active:
            return
        if self.bar:
            sys.stderr.write("\r\033[K")
        print(text, flush=True)
        with (self.folder / "run.log").open("a") as f:
            f.write(text + "\n")

    def event(self, kind: str, text: str) -> None:
        self.write("event", kind=kind, text=text)
        self.say(f"[{kind}] {text}")

    def progress(self, done: int, total: int, text: str) -> None:
        if self.bar:
            full = 24 * done // max(1, total)
            sys.stderr.write(f"\r\033[K[{'=' * full}{' ' * (24 - full)}] {text}")
            sys.stderr.flush()

    @property
    def files(self) -> dict[str, Path]:
        """By the names that a checkpoint's offsets have."""
        return {"log": self.folder / "run.log", "jsonl": self.folder / "run.jsonl"}

    def offsets(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk by then."""
        for path in self.files.values():
            if path.exists():
                sync(path)
        return {k: p.stat().st_size if p.exists() else 0 for k, p in self.files.items()}

    def check(self, offsets: dict[str, int]) -> None:
        """InputError where the logs do not reach as far as when a checkpoint was saved."""
        for key, file in self.files.items() if self.active else ():
            if not file.is_file() or file.stat().st_size < offsets[key]:
                raise InputError(f"{file} is shorter than its checkpoint says: start a new run")

    def truncate(self, offsets: dict[str, int], h: str) -> None:
        """Back to where a checkpoint was saved, after `check`."""
        for key, file in self.files.items() if self.active else ():
            os.truncate(file, offsets[key])
        self.h = h


def machine(world: World) -> dict:
    """The environment as the header has it."""
    env = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": None,
        "driver": None,
        "triton": None,
        "count": world.size,
    }
    if world.cuda:
        name = torch.cuda.get_device_name()
        env |= {"gpu": name, "cuda": torch.version.cuda}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            env["driver"] = subprocess.check_output(query, text=True).split("\n")[0]
        with contextlib.suppress(ImportError):
            env["triton"] = importlib.import_module("triton").__version__
    return env


PEAK_BF16 = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L40S": 362e12}
PEAK_BF16 |= {"RTX 4090": 165.2e12, "RTX 3090": 71e12, "A10G": 70e12, "B200": 2250e12}


def peak_flops(env: dict) -> float | None:
    """Of `machine`'s GPU in BF16, a second, dense, as its datasheet says; None of others."""
    return next((v for k, v in PEAK_BF16.items() if env["gpu"] and k in env["gpu"]), None)


def joules(world: World) -> float | None:
    """Energy counter of this process's GPU, J, or None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(world.device))
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # any failure of an optional meter
        return None


def process_age() -> float:
    """Seconds since this process started, imports included."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - IMPORTED_AT


def git_state() -> dict | None:
    """The commit that this file is of, and whether tracked files differ; None outside of git."""
    how = {"cwd": HERE, "text": True, "stderr": subprocess.DEVNULL}
    run = functools.partial(subprocess.check_output, **how)
    try:
        return {
            "commit": run(["git", "rev-parse", "HEAD"]).strip(),
            "dirty": bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def to_host(t: Tensor) -> Tensor:
    """A copy in the CPU's memory (pinned for a GPU), complete once the device is synchronised."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True)


def save_checkpoint(
    folder: Path, state: dict, meta: dict, keep: int, table: Path | None = None
) -> Path:
    """folder/step_%08d/{state.pt, meta.json, DONE, table.pt if there is one of n-grams}: written
    aside, synced, renamed; then all but the newest `keep` go. A checkpoint is whole or absent;
    OSError where the disk does not take it, and then nothing of it is left.

    table: the table.pt of a checkpoint whose table this one has, too: a second name for that file
    where the file system gives one, since a table of 8.4M rows is 13 GB.
    """
    final = folder / f"step_{meta['step']:08d}"
    aside = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write_checkpoint(aside, state, meta, table)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():  # of the same step: kept until the new one stands
        os.rename(final, folder / f".old.{final.name}")
    os.rename(aside, final)
    sync(folder)
    old = [path for path in whole_checkpoints(folder)[:-keep] if path != final]
    for left in (*folder.glob(".old.*"), *folder.glob(".step_*"), *old):
        shutil.rmtree(left, ignore_errors=True)
    return final


def write_checkpoint(folder: Path, state: dict, meta: dict, table: Path | None = None) -> None:
    """state.pt and table.pt; meta.json with their digests; DONE with meta.json's. All of it is on
    the disk then."""
    folder.mkdir(parents=True)
    model = dict(state.get("model", {}))
    parts = {"state.pt": state}
    if RowAdam.NAME in model:
        parts = {"table.pt": model.pop(RowAdam.NAME), "state.pt": {**state, "model": model}}
    if table is not None:
        del parts["table.pt"]
        try:
            os.link(table, folder / "table.pt")
        except OSError:  # another file system, or one without links
            shutil.copyfile(table, folder / "table.pt")
    try:
        for name, part in parts.items():
            with (folder / name).open("wb") as f:
                torch.save(part, f)
    except RuntimeError as e:  # while torch closes its archive on a disk that is full
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None
    meta = {**meta, "sha256": sha256(folder / "state.pt")}
    meta.pop("table_sha256", None)  # of what a tuned one began from
    if (folder / "table.pt").exists():
        meta["table_sha256"] = sha256(folder / "table.pt")
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    (folder / "DONE").write_text(sha256(folder / "meta.json"))
    for path in (*folder.iterdir(), folder):
        sync(path)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished ones of a ckpt folder, oldest first; they may have been damaged since."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(p for p in found if (p / "DONE").is_file())


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder itself, or the newest finished one of a run folder."""
    path = Path(path).resolve()
    if (path / "DONE").is_file():
        return path
    whole = whole_checkpoints(path / "ckpt")
    if not whole:
        raise InputError(f"{path} holds no whole checkpoint (ckpt/step_*/DONE)")
    return whole[-1]


# What the disk, JSON, text and torch.load raise of a damaged checkpoint.
CANNOT_READ = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError),
    pickle.UnpicklingError,
)


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(state, meta) of one folder; InputError where it is damaged. Nothing untrusted is unpickled:
    `weights_only`."""
    try:
        if (folder / "DONE").read_text() not in ("", sha256(folder / "meta.json")):
            raise InputError(f"{folder}/meta.json is damaged (sha256)")
        meta = json.loads((folder / "meta.json").read_text())
        parts = {}
        for name, key in (("state.pt", "sha256"), ("table.pt", "table_sha256")):
            if key == "sha256" or key in meta:
                if sha256(folder / name) != meta[key]:
                    raise InputError(f"{folder}/{name} is damaged (sha256)")
                parts[name] = torch.load(folder / name, map_location="cpu", weights_only=True)
        state = parts["state.pt"]
        if "table.pt" in parts:
            state["model"][RowAdam.NAME] = parts["table.pt"]
        return state, meta
    except InputError:
        raise
    except CANNOT_READ as e:
        raise InputError(f"{folder} is no checkpoint: {e!r}") from None


def open_checkpoint(path: str | Path) -> tuple[Path, dict, dict, list[str]]:
    """(folder, state, meta, what was wrong with newer ones): of a run folder the newest that is
    whole and undamaged; of a checkpoint folder that one. InputError where there is none."""
    found = find_checkpoint(path)
    own = found == Path(path).resolve()
    wrong: list[str] = []
    for folder in [found] if own else reversed(whole_checkpoints(found.parent)):
        try:
            return (folder, *read_checkpoint(folder), wrong)
        except InputError as e:
            wrong.append(str(e))
    raise InputError("; ".join(wrong))


def load_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """(state, meta) of `open_checkpoint`, which says on stderr what it passed over."""
    folder, state, meta, wrong = open_checkpoint(path)
    for text in wrong:
        print(f"{text}: using {folder}", file=sys.stderr)
    return state, meta


def load_model(
    path: str | Path, device: str = "cpu", max_length: int = 8192, make: type[GPT] | None = None
) -> tuple[GPT, dict]:
    """A trained GPT (or variant, `make`) from a run or checkpoint folder, ready for `model.logits`;
    and its meta."""
    state, meta = load_checkpoint(path)
    cfg = config_from_flat(meta["config"], path)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = (make or GPT)(cfg.model, max_length, dtype)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), meta


# ---- 9. Process ---------------------------------------------------------------------------------
# Exit codes and exit.json, which says them; whose a run folder is; restarts by torchrun; signals
# and lost peers; what is set for a whole process.

EXIT_CODES = {"done": 0, "input": 2, "non-finite": 3, "peer lost": 4, "memory": 5, "signal": 75}
# What any rank may write, and not rank 0 alone: others see it as no more than a lost peer.
OWN_FAULTS = tuple(EXIT_CODES[name] for name in ("input", "peer lost", "memory"))
# What a restart cannot mend.
FINAL = tuple(EXIT_CODES[name] for name in ("done", "input", "non-finite", "memory"))
GRACE_SECONDS = 25  # torchrun kills its workers 30 s after a SIGTERM


def job() -> str:
    """This torchrun job's name, the same on all ranks and over its restarts, of no other job."""
    env = os.environ
    one = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")  # then all have one parent
    where = f"{platform.node()}-{os.getppid()}" if one else env.get("MASTER_ADDR", "")
    return f"{env.get('TORCHELASTIC_RUN_ID', '')}/{where}"


def own_exit(folder: Path) -> dict:
    """exit.json of a run folder, {} where this job has written none: code (null while it runs),
    reason, job."""
    try:
        said = json.loads((folder / "exit.json").read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and said.get("job") == job() else {}


def put_exit(folder: Path, code: int | None, reason: str) -> None:
    """Writes exit.json, whole or not at all."""
    aside = folder / f".exit.{os.getpid()}"
    aside.write_text(json.dumps({"code": code, "reason": reason, "job": job()}))
    os.replace(aside, folder / "exit.json")


def mark_running(folder: Path) -> None:
    put_exit(folder, None, "running, or killed")


def write_exit(folder: Path | None, code: int, reason: str) -> None:
    """RUN/exit.json, because torchrun returns 1 whatever its workers return.

    Rank 0 speaks for all; another rank for a fault of its own, if nobody has spoken before. Rank 0
    may have the last word, but for 4: that it lost a peer never replaces why.
    """
    if folder is None or not folder.is_dir():
        return
    main, first = int(os.environ.get("RANK", 0)) == 0, own_exit(folder).get("code") is None
    if (main and (first or code != EXIT_CODES["peer lost"])) or (first and code in OWN_FAULTS):
        put_exit(folder, code, reason)


def named_folder(argv: list[str]) -> Path | None:
    """The folder that --out and --run-id name, made where it is missing: there a run under torchrun
    that ends before it has a folder leaves its exit.json. None where it has no name, or where
    another's run lies."""
    if "--run-id" not in argv[:-1] or int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        return None
    after = dict(itertools.pairwise(argv))
    folder = Path(after.get("--out", "runs")) / Path(after["--run-id"]).name
    if has_log(folder):  # another run's: nothing is written over
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def has_log(folder: Path) -> bool:
    """Whether a run's log lies there, also as `./run.sh records --pack` leaves it."""
    return any((folder / name).exists() for name in ("run.jsonl", "run.jsonl.xz"))


def refuse_held(folder: Path) -> None:
    """A folder that holds a run is another's, but for a worker that torchrun restarted in it."""
    if has_log(folder) and not (restarts() and own_exit(folder)):
        raise InputError(f"{folder} holds a run already: another --run-id, or --resume it")


def refuse_place(out: str) -> None:
    """Refuses an --out in which no folder can be made, before minutes of compilation."""
    path = Path(out).absolute()
    place = next(p for p in (path, *path.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {out}: {place} is no folder to write in")


def restarts() -> int:
    """How often torchrun (--max-restarts) has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Ended(Exception):
    """A restarted worker finds that its run has ended in a way that a restart cannot mend; args:
    exit code, reason."""


def after_restart(cfg: Config) -> Config:
    """`cfg` as a worker goes on with that torchrun restarted: from the newest whole checkpoint of
    its own run. Raises Ended after bad input, a non-finite step or too little memory."""
    named = cfg.run.run_id or cfg.run.resume
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not named:
        raise InputError("torchrun --max-restarts needs --run-id: by it a restart finds its run")
    folder = Path(cfg.run.out) / cfg.run.run_id
    if cfg.run.resume:
        path = Path(cfg.run.resume).resolve()
        folder = path.parents[1] if (path / "DONE").is_file() else path
    said = own_exit(folder)
    if not restarts() or not said:
        return cfg
    if said.get("code") in FINAL:
        raise Ended(said["code"], f"not started again: {said.get('reason')}")
    return cfg.with_(resume=str(folder)) if whole_checkpoints(folder / "ckpt") else cfg


def heed_signals(trainer: Trainer) -> None:
    """SIGTERM and SIGINT: all ranks finish the step, save and exit 75. torchrun sends SIGTERM also
    where a rank has died; a collective of NCCL waits for that rank, so this one gives up in time to
    say so."""

    def give_up() -> None:
        if trainer.agreed or trainer.folder is None:
            return
        code = EXIT_CODES["peer lost"]
        reason = f"no step ended within {GRACE_SECONDS} s of a signal: a rank is lost"
        write_exit(trainer.folder, code, reason)
        os._exit(code)

    def watch(wake: int) -> None:
        os.read(wake, 1)
        time.sleep(GRACE_SECONDS)
        give_up()

    def stop(*_) -> None:
        trainer.stop = True

    if trainer.world.size > 1:
        # While the main thread waits for the device, Python runs no handler: but the number of the
        # signal is in this pipe at once.
        wake, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # not theirs
        threading.Thread(target=watch, args=(wake,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def peer_lost(e: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    said = re.search(r"[Cc]onnection (closed|reset|refused)|[Tt]imed out|gloo|NCCL", str(e))
    return dist.is_initialized() and (isinstance(e, dist.DistError) or said is not None)


def set_environment() -> None:
    """What every training process sets before its first GPU work."""
    # Fewer holes between blocks of memory: sizes differ from call to call (record 28 on).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HERE / ".cache" / "inductor"))


def configure_compiler(device: torch.device) -> None:
    """A silent fall-back to unfused attention, or a new graph inside the clock, is an error.

    On a GPU Inductor may compute longer sums of products at their reader before it puts one in
    memory, and does so sooner where few reads are saved: a model's pass of speedrun then moves 57.1
    GB through pointwise kernels for 59.3 (counted, torch 2.11: LAB_LOG, 2026-11-29).

    Inductor's choices are the calling thread's alone, and in torch 2.13 so are its settings. So a
    graph's way back is compiled with its way forward, and not when autograd's own thread comes to
    it."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.force_non_lazy_backward_lowering = True
    if device.type == "cuda":
        inductor = torch._inductor.config
        inductor.realize_acc_reads_threshold = 64  # reads of one kernel
        inductor.realize_opcount_threshold = 300  # its operations
        inductor.realize_reads_threshold = 3  # reads of what has several readers
        reduce_in_one_pass()


def reduce_in_one_pass() -> None:
    """Rows of up to 1,024 stay in registers where a kernel reduces them in several ways, such as by
    their largest value for FP8 and by the terms of a sum over all tokens. As these differ in
    Inductor's hints, it would read the rows again for each result that the next reduction needs,
    and once more to write: kernels of 13 of those 57 GB did. For the calling thread."""
    from torch._inductor.choices import InductorChoices  # takes 2 s
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    by_rows = {ReductionHint.INNER, ReductionHint.DEFAULT}

    class OnePass(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            known = V.graph.sizevars
            return (
                not cooperative_reduction  # of several programs a row
                and known.statically_known_leq(features.reduction_numel, 1024)
                and known.statically_known_geq(features.numel, 4096)  # rows
                and {features.reduction_hint(n) for n in features.reduction_nodes()} <= by_rows
            )

    V.set_choices_handler(OnePass())
    # The caches of compiled graphs do not ask for choices.
    config, mark = torch.compiler.config, "rows in one pass"
    config.cache_key_tag = config.cache_key_tag.removesuffix(mark) + mark


def be_deterministic() -> None:
    """The same bits in every run of the same program on the same machine: cuBLAS with a fixed
    workspace, scatters without atomics, Inductor without choices by timing. FlexAttention's own
    kernels have no atomics. For the whole process, before its first GPU work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch._inductor.config.deterministic = True


# ---- 10. Train ----------------------------------------------------------------------------------
# A `LanguageModel` turns tokens into losses and gradients, on a GPU as `CallGraphs`; `WarmUp` has
# every graph compiled before the clock starts; a `Trainer` holds what one compilation serves; a
# `Run` is the loop, with its looks, checkpoints and log.


class NonFinite(RuntimeError):
    """Loss or gradient is not finite. Exit code 3; nothing was updated in that step or after."""


@dataclass
class Hooks:
    """What fine-tuning and variants change instead of copying the loop; None keeps the default."""

    model: Callable[[Config, int, torch.dtype], nn.Module] | None = None
    optimizer: Callable[[nn.Module, Config, World], Optimizer] | None = None
    batches: Callable[[list[Step], Config, World], Iterator[Batch]] | None = None
    loss_mask: Callable[[Batch], Tensor] | None = None  # bool [rows, T]: where the loss counts
    after_step: Callable[[Trainer, Step], None] | None = None
    on_eval: Callable[[Trainer, dict], None] | None = None


def windows(long: int, device: torch.device) -> Tensor:
    """[2] int32: the long window, and half of it in whole blocks for the other layers."""
    both = torch.tensor([long, max(BLOCK, long // 2 // BLOCK * BLOCK)], dtype=torch.int32)
    return on_device(both, device)


def count_documents(docs: Tensor) -> Tensor:
    """docs [B, T], never falling along a row -> int32 [1]: documents in all rows, at most."""
    return (docs[:, -1] - docs[:, 0] + 1).sum(dtype=torch.int32)[None]


def on_device(t: Tensor, device: torch.device) -> Tensor:
    """A copy from pageable memory would make the host wait for all that the device has to do."""
    if torch.device(device).type == "cpu":
        return t
    return t.pin_memory().to(device, non_blocking=True)


def source_digests(cfg: Config, hooks: Hooks) -> dict[str, str]:
    """sha256 of the files that run: trainer, a user's arm, a variant's model."""
    files, arm = {"trainer": Path(__file__)}, parse_arm(cfg.model.arm)[0]
    if ".py:" in arm:
        files["arm"] = Path(arm.rpartition(":")[0])
    if hooks.model is not None:
        files["variant"] = Path(inspect.getfile(hooks.model))
    return {name: sha256(path) for name, path in files.items()}


class Clock:
    """Training seconds: the device is drained wherever it starts or stops."""

    def __init__(self, world: World, seconds: float = 0.0):
        self.world, self.seconds, self.mark = world, seconds, 0.0

    def start(self) -> None:
        self.world.synchronize()
        self.mark = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.seconds = self.now()

    def now(self) -> float:
        return self.seconds + time.perf_counter() - self.mark


def steps_of(cfg: Config, corpus: Corpus) -> list[Step]:
    """The steps of the budget, or of the text where there is none; refuses more than the text has
    (`passes` times)."""
    s, have = cfg.schedule, corpus.tokens("train")
    if s.tokens > have * s.passes:
        raise InputError(
            f"--tokens {s.tokens} is more than {s.passes} pass(es) over the {have} train "
            "tokens found: get more shards (./run.sh data), or raise --passes"
        )
    steps = plan_steps(cfg, s.tokens or min(s.most_tokens, have * s.passes))
    if not steps:
        raise InputError("too few tokens for one step: train on more text or smaller --stages")
    return steps


def check_folders(run: RunConfig) -> None:
    """InputError where there is nothing to go on from, or no place for a new run. A resumed run
    keeps its name, so no other may be given."""
    if run.resume:
        folder = find_checkpoint(run.resume).parents[1]
        own = run.run_id in ("", folder.name) or Path(run.out, run.run_id).resolve() == folder
        if not own:
            said = f"--resume goes on in {folder}, under that name: leave one of them out"
            raise InputError(f"--run-id {run.run_id}: {said}")
    elif run.run_id:
        refuse_held(Path(run.out) / run.run_id)
    if not run.resume:
        refuse_place(run.out)


def check_with_data(cfg: Config, corpus: Corpus, steps: list[Step]) -> None:
    """InputError where these settings do not go with this data."""
    run, data = cfg.run, cfg.data
    for split in ("dev", *(["val"] if run.final_val else [])):
        if corpus.splits.get(split) and corpus.tokens(split) < 2:
            raise InputError(f"the {split} split is empty: give it 2 tokens or more")
    if cfg.model.vocab < corpus.vocab:
        raise InputError(f"--vocab {cfg.model.vocab}: the data has {corpus.vocab}")
    classes = padded(cfg.model.vocab)
    for stage in cfg.schedule.stages:
        if stage.candidates >= classes:
            raise InputError(
                f"--stages {stage}: {stage.candidates} candidates of the {classes} classes "
                "that this data has: leave them out, or take --preset demo or r28"
            )
    rows = {step_rows(s.tokens, data.row_tokens)[1] for s in steps} | {data.val_row_tokens}
    odd = sorted(r for r in rows if r % BLOCK)
    if odd and run.device != "cpu" and torch.cuda.is_available():
        raise InputError(f"rows of {odd} tokens: on a GPU they are multiples of {BLOCK}")


def dtype_of(name: str, world: World, half: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The setting `name`; "auto" is `half` on a GPU and float32 on a CPU."""
    auto = half if world.cuda else torch.float32
    return auto if name == "auto" else getattr(torch, name)


def new_model(cfg: Config, hooks: Hooks, dtype: torch.dtype) -> nn.Module:
    """A model as the seed has it, on the CPU: also in what a user's plain modules draw."""
    torch.manual_seed(cfg.run.seed)
    length = max(cfg.data.row_tokens, cfg.data.val_row_tokens)
    if hooks.model is not None:
        model = hooks.model(cfg, length, dtype)
    else:
        model = GPT(cfg.model, length, dtype)
    init_parameters(model, cfg.run.seed)
    return model


def make_optimizer(model: nn.Module, cfg: Config, hooks: Hooks, world: World) -> Optimizer:
    """From then on the model's weights lie in its banks."""
    if hooks.optimizer is not None:
        optimizer = hooks.optimizer(model, cfg, world)
    else:
        optimizer = Optimizer(model, parameter_groups(cfg.optim), world)
    optimizer.clip = cfg.optim.grad_clip
    optimizer.muon_dtype = dtype_of(cfg.optim.muon_dtype, world, torch.float16)
    return optimizer


def announce(cfg: Config, world: World, what: str) -> None:
    """A line for who waits: what is being compiled now."""
    if world.main and cfg.run.compile:
        print(f"compiling: {what} ({process_age():.0f} s)", file=sys.stderr, flush=True)


# What may fall back on plain PyTorch.
KERNELS = ("fp8", "fa4", "mlp_kernel", "mlp_fp8", "loss_kernel")


def try_kernels(cfg: Config, world: World, model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """{what this model could use of KERNELS, and the one of an n-gram table: why plain PyTorch
    takes its place on this rank, or ""}."""
    run, device = cfg.run, world.device
    bf16, why = dtype == torch.bfloat16, {}
    if run.fp8 and world.cuda:
        works = bf16 and fp8_works(device)
        why["fp8"] = "" if works else f"no FP8 products here in {dtype}"
    if run.attention == "fa4" and run.deterministic:
        why["fa4"] = "its backward adds in any order, which --deterministic is against"
    elif run.attention == "fa4":
        announce(cfg, world, "FlashAttention-4's kernels")
        why["fa4"] = probe_fa4(device, fa4_shapes(model))
    widths = {m.up.weight.size(0) for m in model.modules() if isinstance(m, MLP)}
    if run.mlp_kernel and widths:
        reason = "" if bf16 else f"it computes in bfloat16, not in {dtype}"
        odd = [width for width in widths if width % 8]
        reason = f"it wants widths by 8, not {odd}" if odd else reason
        why["mlp_kernel"] = reason or probe_mlp(device)
    if run.mlp_fp8 and widths:
        odd = [width for width in widths if width % 16]
        reason = f"it wants widths by 16, not {odd}" if odd else ""
        reason = why.get("mlp_kernel", "--mlp-kernel is off") or reason
        why["mlp_fp8"] = reason or probe_mlp_fp8(device, run.mlp_fp8 == "both")
    if run.loss_kernel and why.get("fp8") == "" and model.softcap:
        mixed = getattr(model, "pointer", None) is not None
        why["loss_kernel"] = probe_loss(device, mixed)
    if getattr(model, "ngram", None) is not None and world.cuda:
        why["ngram"] = probe_rows(device)
    return why


def choose_kernels(
    cfg: Config, world: World, model: nn.Module, dtype: torch.dtype
) -> dict[str, str]:
    """What `try_kernels` finds, the same on every rank. On by default, so what has no use is left
    out, and a CPU's reasons are. Raises InputError where --attention fa4 cannot be served."""
    why = try_kernels(cfg, world, model, dtype)
    found = world.gather(why)  # each rank tried for itself: one that fails decides for all
    names = dict.fromkeys(name for one in found for name in one)
    untried = "a rank lacks what it goes with"
    said = {name: [one.get(name, untried) for one in found] for name in names}
    why = {name: next(filter(None, reasons), "") for name, reasons in said.items()}
    if not world.cuda:
        why = {name: reason for name, reason in why.items() if not reason or name == "fa4"}
    if why.get("ngram") and world.size > 1:
        raise InputError(f"--ngram on several GPUs needs its kernel: {why['ngram']}")
    if why.get("fa4") and not cfg.run.deterministic:
        raise InputError(f"--attention fa4: {why['fa4']}; use --attention flex")
    return why


class LanguageModel:
    """A model with its table of n-grams, its copy head and the head's loss: tokens to losses, and
    back. compiled: the model, the table and the copy head, each a graph of its own. fa4: attention
    is FlashAttention-4's, which reads windows on the host."""

    def __init__(self, model: nn.Module, head: Head, compiled: bool = False, fa4: bool = False):
        wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        wrap = wrap if compiled else lambda f: f
        self.model, self.head, self.fa4 = model, head, fa4
        self.forward = wrap(model)
        self.ngram: Ngram | None = getattr(model, "ngram", None)
        self.lookup = None if self.ngram is None else wrap(self.ngram.lookup)
        pointer = getattr(model, "pointer", None)
        self.pointer = None if pointer is None else wrap(pointer)

    @classmethod
    def of(
        cls, model: nn.Module, cfg: Config, dtype: torch.dtype, kernels: dict[str, str]
    ) -> LanguageModel:
        """A run's, with the kernels that `choose_kernels` found no reason against; its copy head
        looks back as in training."""
        run, runs = cfg.run, {name for name, reason in kernels.items() if not reason}
        for module in model.modules():
            if isinstance(module, MLP):
                module.fused = "mlp_kernel" in runs
                module.fp8 = run.mlp_fp8 if "mlp_fp8" in runs else ""
        fp8, fused = "fp8" in runs, "loss_kernel" in runs
        head = Head(model.head, model.softcap, dtype, fp8, run.compile, fused, cfg.model.tie)
        if run.compile:
            configure_compiler(model.head.device)
        made = cls(model, head, run.compile, "fa4" in runs)
        made.look_back(COPY_BAND)
        return made

    def look_back(self, tokens: int) -> None:
        """How far a copy head does from now on."""
        if getattr(self.model, "pointer", None) is not None:
            self.model.pointer.band.fill_(tokens)

    def windows(self, long: int) -> Tensor:
        """Those of the function of the same name, where the attention reads them; once a step."""
        return windows(long, torch.device("cpu") if self.fa4 else self.head.weight.device)

    def window_of(self, both: Tensor, docs: Tensor) -> Tensor | Limits:
        """The model's `window` for a call on rows `docs`, which are still on the CPU."""
        return Limits(torch.cat([both, count_documents(docs)])) if self.fa4 else both

    def looked_up(self, part: Batch) -> tuple[Tensor, ...]:
        """What the forward gets of an n-gram table, whose gradient is the rows': () without one."""
        if self.ngram is None:
            return ()
        return (self.lookup(part.tokens, part.docs).requires_grad_(),)

    def through_head(
        self,
        part: Batch,
        window: Tensor | Limits,
        scale: Tensor,
        candidates: int,
        position: int | Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[list[Tensor], list[Tensor]]]:
        """Forward, and the way back as far as `backward` begins it: (losses [N], what an n-gram
        table gave, what is left of the way back). `head.prepare` comes before."""
        pairs = self.looked_up(part)
        h = self.forward(part.tokens, part.docs, window, *pairs)
        losses, back = self.backward(h, part, scale, candidates, position)
        return losses, pairs, back

    def backward(
        self,
        h: Tensor,
        part: Batch,
        scale: Tensor,
        candidates: int = 0,
        position: int | Tensor = 0,
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        """Begins the way back of scale x the sum of the losses [N], which it returns with what is
        left of it, (tensors, their gradients): the head's is in its .grad. h [B, T, d]: what the
        model returned; candidates, position: see `Head.backward`."""
        flat, targets = h.detach().flatten(0, 1), part.targets.flatten()
        if self.pointer is None:
            losses, grad = self.head.backward(flat, targets, scale, candidates, position)
            return losses, ([h], [grad.view_as(h)])
        copied, kept = self.pointer(h, part.tokens, part.docs, part.targets)
        apart = copied.detach().flatten()
        losses, grad = self.head.backward(flat, targets, scale, candidates, position, apart)
        counts = losses != 0 if candidates else targets >= 0  # or it is no candidate
        share = torch.where(counts, torch.exp(apart + losses), 0.0)  # of p that is copied
        grads = (grad, -scale * share, torch.where(counts, -scale, 0.0))
        roots = [h, copied, kept]
        back = roots, [g.view_as(t) for g, t in zip(grads, roots, strict=True)]
        return losses - torch.where(counts, kept.detach().flatten(), 0.0), back

    @torch.no_grad()
    def losses(self, h: Tensor, batch: Batch) -> Tensor:
        """[N] fp32, nats, of the model's output h [B, T, d]; 0 where the target is negative."""
        flat, targets = h.flatten(0, 1), batch.targets.flatten()
        if self.pointer is None:
            return self.head.losses(flat, targets)
        copied, kept = self.pointer(h, batch.tokens, batch.docs, batch.targets)
        return self.head.losses(flat, targets, copied.flatten()) - kept.flatten()


class Recorder:
    """Makes CUDA graphs that use each other's memory, but for what outlives a recording. What one
    leaves, `lend` gives to the next one, too.

    On a stream of its own: the kernels of cuBLAS have a workspace for each stream, which PyTorch
    2.13 frees with any graph that was recorded there, another trainer's too.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.renew()

    def renew(self) -> None:
        """Other memory for the graphs to come, when those before are gone: what is left of theirs
        (a workspace is) would be of a pool that PyTorch lets nobody enter again."""
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does again what `work` now asks of the GPU, in the same memory: a replay."""
        gc.collect()  # no node of a way back that was made on another stream may be met again
        graph, how = torch.cuda.CUDAGraph(), {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, **how):
            work()
        return graph.replay

    def lend(self, t: Tensor) -> Tensor:
        """What lies where `t` does, in memory that is free for the next recording."""
        size = t.element_size()
        strides, data = tuple(size * n for n in t.stride()), (t.data_ptr(), False)
        place = {"shape": tuple(t.shape), "strides": strides, "typestr": f"<i{size}", "data": data}
        place = types.SimpleNamespace(__cuda_array_interface__=place | {"version": 3})
        return torch.as_tensor(place, device=t.device).view(t.dtype)


class CallGraph:
    """Forward and backward of training calls of one shape as one CUDA graph (record 92), which the
    GPU runs without a pause between kernels.

    Inputs are copied to where the graph reads them, `part` among them, but for `Limits`: their
    numbers are the graph's own. Losses and gradients lie where it left them until the next call of
    any graph: all of them use the same memory, that of a call's activations, which stays taken. The
    first call runs the kernels one by one, which compiles them, the second records. ran: a call of
    the same shape did the first.
    """

    def __init__(
        self,
        lm: LanguageModel,
        recorder: Recorder,
        part: Batch,
        window: Tensor | Limits,
        scale: Tensor,
        candidates: int,
        ran: bool,
    ):
        self.lm, self.recorder, self.candidates, device = lm, recorder, candidates, scale.device
        self.part = Batch(*(torch.empty_like(t, device=device) for t in vars(part).values()))
        self.window = window if isinstance(window, Limits) else torch.empty_like(window)
        self.scale = torch.empty_like(scale)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.params = [p for p in lm.model.parameters() if p.requires_grad]
        self.replay: Callable[[], None] | None = None
        self.ran = ran

    def __call__(
        self, part: Batch, window: Tensor | Limits, scale: Tensor, position: int, *, alone: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(losses [N], gradients of what an n-gram table gave); adds to .grad. alone: no other call
        in this step, so that a gradient may stay where it is until the update."""
        mine, given = [*vars(self.part).values(), self.scale], [*vars(part).values(), scale]
        if not isinstance(window, Limits):
            mine.append(self.window)
            given.append(window)
        for here, t in zip(mine, given, strict=True):
            here.copy_(t, non_blocking=True)
        self.position.fill_(position)
        if self.ran and self.replay is None:
            self.record()
        if self.replay is None:
            self.work()
        else:
            self.replay()
        self.ran = True
        held = [(p.grad, g) for p, g in self.grads if p.grad is not None]
        if held:
            torch._foreach_add_(*zip(*held, strict=True))
        for p, g in self.grads:
            if p.grad is None:
                p.grad = g if alone else g.clone()
        return self.losses, [g.clone() for g in self.found]  # which may wait for a later step

    def record(self) -> None:
        recorder = self.recorder
        self.replay = recorder.record(self.work)
        self.losses = recorder.lend(self.losses)
        self.grads = [(p, recorder.lend(g)) for p, g in self.grads]
        self.found = [recorder.lend(g) for g in self.found]

    def work(self) -> None:
        """Leaves `losses`, `grads` of the parameters that have one, and those of the table's rows;
        .grad as it was."""
        lm, weight = self.lm, self.lm.head.weight
        before, weight.grad = weight.grad, None
        lm.head.prepare()
        self.losses, pairs, (roots, grads) = lm.through_head(
            self.part, self.window, self.scale, self.candidates, self.position
        )
        inputs = [*self.params, *pairs]
        grads = torch.autograd.grad(roots, inputs, grads, allow_unused=True)
        both = dict(zip(self.params, grads[: len(self.params)], strict=True))
        if both[weight] is not None:  # the head is the embedding, too
            weight.grad.add_(both[weight])
        both[weight], weight.grad = weight.grad, before
        self.grads = [(p, g) for p, g in both.items() if g is not None]
        self.found = grads[len(self.params) :]


class CallGraphs:
    """The graphs of a language model's training calls, each made when it is first asked for."""

    def __init__(self, lm: LanguageModel, recorder: Recorder | None):
        self.lm, self.recorder = lm, recorder
        self.calls: dict[tuple, CallGraph] = {}
        self.documents = FA4_GRAPHED  # that a graph's kernels are told of; it only grows

    def of(self, part: Batch, window: Tensor | Limits, scale: Tensor, candidates: int) -> CallGraph:
        """That of calls of this shape and, under FlashAttention-4, of these windows, with room for
        the documents of any call so far."""
        key = shape = (*part.tokens.shape, candidates)
        if isinstance(window, Limits):
            self.documents = max(self.documents, documents_told(window.values))
            values = [*window.values[:2].tolist(), self.documents]
            window, key = Limits(torch.tensor(values, dtype=torch.int32)), (*shape, *values)
        if key not in self.calls:
            ran = any(other[:3] == shape and call.ran for other, call in self.calls.items())
            self.calls[key] = CallGraph(
                self.lm, self.recorder, part, window, scale, candidates, ran
            )
        return self.calls[key]

    def missing(self, wanted: set[tuple]) -> list[tuple]:
        """Which of `wanted`, (rows, tokens a row, candidates, long window), have no graph yet with
        room for the documents of any call so far; under FlashAttention-4."""
        have = {key[:4] for key in self.calls if key[5] == self.documents}
        return sorted(wanted - have)

    def drop(self) -> None:
        """Gives up the graphs and their memory."""
        self.calls.clear()
        if self.recorder is not None:
            self.recorder.renew()


class WarmUp:
    """Training calls that train nothing and one of validation, so that every graph that a trainer's
    stages need is compiled, and recorded, before the clock starts, whatever the budget."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.stream = TokenStream(trainer.corpus.splits["train"], trainer.corpus.eot)

    def run(self) -> float:
        """Returns the seconds that it took; after it a recompile is an error."""
        trainer, cfg, world = self.trainer, self.trainer.cfg, self.trainer.world
        began = time.perf_counter()
        if world.cuda:
            torch.cuda.reset_peak_memory_stats()
        dynamo = torch._dynamo.config
        dynamo.error_on_recompile = False
        if trainer.lm.ngram is not None:
            trainer.lm.ngram.make()
        stages = cfg.schedule.stages
        shapes = {(*trainer.call_shape(s.tokens), s.candidates) for s in stages}
        # The largest first: a graph of smaller calls then fits into its memory.
        shapes = sorted(shapes, key=lambda s: (-s[0] * s[1], s))
        for shape in shapes:
            of = f", loss over {shape[2]} classes" if shape[2] else ""
            announce(cfg, world, f"training graph, {shape[0]} x {shape[1]} tokens a call{of}")
            for _ in range(2 if trainer.graphed else 1):  # compiles, then records
                self.try_call(shape, trainer.steps[0].window)
        self.record_windows()
        announce(cfg, world, f"validation graph, {cfg.data.val_call_tokens} tokens a call")
        trainer.evaluate("dev", trainer.steps[-1].window, calls=1)
        world.synchronize()
        dynamo.error_on_recompile = cfg.run.compile
        return time.perf_counter() - began

    def try_call(self, shape: tuple[int, int, int], window: int) -> None:
        """A step of one call (rows, tokens a row, candidates) on a rank, which trains nothing."""
        trainer, (rows, row, some) = self.trainer, shape
        changes = {"tokens": rows * row * trainer.world.size, "candidates": some, "window": window}
        step = dataclasses.replace(trainer.steps[0], **changes, adam=True, sample=False)
        trainer.train_step(step, make_batch(self.stream, 0, rows, row), lr=0.0)

    def record_windows(self) -> None:
        """Where a graph is one window's: those of the plan's windows that have none yet."""
        trainer = self.trainer
        if not (trainer.graphed and trainer.lm.fa4):
            return
        steps = trainer.steps
        wanted = {(*trainer.call_shape(s.tokens), s.candidates, s.window) for s in steps}
        missing = trainer.graphs.missing(wanted)
        if missing:
            announce(trainer.cfg, trainer.world, f"{len(missing)} graphs of other windows")
        for *shape, window in missing:
            self.try_call(tuple(shape), window)


class Trainer:
    """A model, its optimizer, its data and its compiled graphs.

    `run` trains once from the start; `reset` then starts afresh in place, so that one compilation
    serves many seeds and budgets; `park` frees memory in between. Raises InputError before any GPU
    work where the data cannot serve the schedule.
    """

    def __init__(self, cfg: Config, hooks: Hooks | None = None, world: World | None = None):
        problems = check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if problems:
            raise InputError("; ".join(problems))
        World.check(cfg.run.wanted_device)
        self.hooks = hooks or Hooks()
        self.corpus = Corpus.open(cfg.data.data, cfg.data.dev)
        self.cfg = cfg.with_(vocab=cfg.model.vocab or self.corpus.vocab)
        self.steps = steps_of(self.cfg, self.corpus)
        check_folders(self.cfg.run)
        check_with_data(self.cfg, self.corpus, self.steps)
        self.data_digests = self.corpus.check_digests()
        self.corpus.check_tokens()
        if cfg.run.deterministic:
            be_deterministic()
        self.world = world or World.start(cfg.run.wanted_device)
        self.dtype = dtype_of(self.cfg.run.dtype, self.world)
        self.compile_s, self.warm, self.stop, self.agreed = 0.0, False, False, False
        self.folder: Path | None = None
        self.labels: dict = {}  # who compares runs marks them: block, sitting, ...
        self.running: Run | None = None  # the present run, for hooks: log, clock, checkpoints
        self.set_up()
        self.source_sha256 = source_digests(self.cfg, self.hooks)  # now: this process may live long

    def set_up(self) -> None:
        """What is made once and serves all runs."""
        cfg, world = self.cfg, self.world
        self.model = new_model(cfg, self.hooks, self.dtype).to(world.device)
        self.optimizer = make_optimizer(self.model, cfg, self.hooks, world)
        self.kernels = choose_kernels(cfg, world, self.model, self.dtype)
        self.lm = LanguageModel.of(self.model, cfg, self.dtype, self.kernels)
        if self.lm.ngram is not None:
            self.lm.ngram.make()
            if self.uses("ngram"):
                self.optimizer.rows.update_rows = fused_row_update
        for bank in self.optimizer.banks if cfg.run.compile and world.cuda else ():
            bank.compile()
        self.graphed = cfg.run.cuda_graphs and world.cuda
        self.graphs = CallGraphs(self.lm, Recorder() if self.graphed else None)

    @property
    def head(self) -> Head:
        return self.lm.head

    def uses(self, name: str) -> bool:
        """Whether one of KERNELS is asked for and runs."""
        return self.kernels.get(name) == ""

    def call_shape(self, tokens: int) -> tuple[int, int]:
        """(rows, tokens a row) of a kernel call in a step of so many tokens."""
        rows, row = step_rows(tokens, self.cfg.data.row_tokens)
        return micro_rows(rows // self.world.size, row, self.cfg.data.micro_batch_tokens), row

    def warm_up(self) -> None:
        """Compiles and runs every graph that the stages need, whatever the budget."""
        if self.warm:
            return
        seconds = WarmUp(self).run()
        self.compile_s = self.compile_s or seconds  # later ones compile nothing
        self.warm = True
        self.start()

    def start(self) -> None:
        """Weights, buffers, random numbers (a user's dropout) and optimizer as at step 0."""
        fresh = new_model(self.cfg, self.hooks, self.dtype)
        self.model.load_state_dict(fresh.state_dict())
        self.optimizer.reset()
        self.head.left_out.zero_()
        self.lm.look_back(COPY_BAND)  # an evaluation may have failed

    def reset(
        self, seed: int, data_seed: int = 0, *, tokens: int | None = None, run_id: str = ""
    ) -> None:
        """Everything as a new process would have it with these seeds, this budget (None: the same
        as before) and this run_id. A budget changes how many steps a stage has and no shape."""
        tokens = self.cfg.schedule.tokens if tokens is None else tokens
        changes = {"seed": seed, "data_seed": data_seed, "tokens": tokens, "run_id": run_id}
        self.cfg = self.cfg.with_(**changes, resume="")
        self.steps = steps_of(self.cfg, self.corpus)
        self.stop, self.folder = False, None
        if self.warm:
            WarmUp(self).record_windows()
            self.start()
        else:
            self.warm_up()

    def park(self) -> None:
        """Gives the GPU's memory to other processes until `reset`: of a 124M model with its value
        tables some 4.5 GB stay (weights, gradients, optimizer, RoPE), and the CUDA context. An
        n-gram table does not: it is gone."""
        self.warm = False  # reset warms up again, or the clock would pay for allocations
        self.optimizer.zero_grad()  # after a step that failed they may lie in a graph's memory
        self.graphs.drop()
        self.head.drop()
        self.optimizer.tail.drop()  # of a run that did not come to its end
        if self.lm.ngram is not None:
            self.lm.ngram.table = None
        gc.collect()
        if self.world.cuda:
            torch.cuda.empty_cache()

    def train_step(
        self, step: Step, batch: Batch, lr: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Forward, backward, update; nothing waits for the device. Returns, on it, ([mean loss,
        ranks that want to stop], gradient norm), over all ranks."""
        stop = torch.full((), float(self.stop), device=self.world.device)
        figures = torch.stack([self.gradients(step, batch), stop])
        lr = step.lr if lr is None else lr
        norm = self.optimizer.step(lr, step.momentum, figures, tied=step.tied, adam=step.adam)
        if step.sample:
            self.optimizer.tail.sample()
        return figures, norm / LOSS_SCALE

    def gradients(self, step: Step, batch: Batch) -> Tensor:
        """Adds this rank's gradients of LOSS_SCALE x the step's mean loss to .grad; returns its
        share of that mean, on the device."""
        device, mask = self.world.device, self.hooks.loss_mask
        counted = torch.full((), float(step.tokens), device=device)
        if mask is not None:
            batch.targets = batch.targets.masked_fill(~mask(batch), -1)
            counted = self.world.sum((batch.targets >= 0).sum().to(device)).float().clamp(min=1)
        if not self.graphed:
            self.head.prepare()
        scale = LOSS_SCALE / counted
        total = torch.zeros((), device=device)
        both = self.lm.windows(step.window)
        rows = micro_rows(*batch.tokens.shape, self.cfg.data.micro_batch_tokens)
        at = step.start + self.world.rank * batch.tokens.numel()
        parts = batch.split(rows)
        for part in parts:
            window = self.lm.window_of(both, part.docs)
            if self.graphed:
                call = self.graphs.of(part, window, scale, step.candidates)
                losses, found = call(part, window, scale, at, alone=len(parts) == 1)
                part = call.part
            else:
                part = part.to(device)
                losses, pairs, back = self.lm.through_head(part, window, scale, step.candidates, at)
                torch.autograd.backward(*back)
                found = [e.grad for e in pairs]
            at += len(losses)
            for grad in found:
                self.optimizer.rows.hold(part.tokens, part.docs, grad)
            total += losses.sum() / counted
        return total

    def evaluate(self, split: str, long_window: int, calls: int = 0) -> dict:
        """See the function of the same name; `calls` limits each rank's (warm-up)."""
        return evaluate(self, split, long_window, calls)

    def default_batches(self, steps: list[Step], cfg: Config, world: World) -> Iterator[Batch]:
        stream = TokenStream(self.corpus.splits["train"], self.corpus.eot, cfg.data.data_seed)
        return train_batches(stream, steps, cfg, world)

    def run(self) -> dict:
        """Trains from the start, or from --resume, and returns the figures of the `end` line with
        the last losses. Raises NonFinite, InputError; SystemExit(75) after a signal."""
        self.warm_up()
        return Run(self).train()


def blame(trainer: Trainer, step: Step, batch: Batch) -> str:
    """Which rank and which tensor made `step` non-finite: computed once more, from the same
    weights, as no update has touched them. Collective; every rank returns the same."""
    trainer.optimizer.zero_grad()
    loss = float(trainer.gradients(step, batch))
    params = dict(trainer.model.named_parameters())
    weights = [n for n, p in params.items() if not p.isfinite().all()]
    # In the order of the way back: the head, blocks from the last, what all of them share.
    way = sorted(reversed(params), key=lambda n: (n != "head", not n.startswith("blocks.")))
    got = {n: params[n].grad for n in way if params[n].grad is not None}
    if trainer.lm.ngram is not None:
        way.append(RowAdam.NAME)
        got[RowAdam.NAME] = trainer.optimizer.rows.collect()
        parts = trainer.lm.ngram.table.split(1 << 20)  # what isfinite makes of it is large, too
        if not all(part.isfinite().all() for part in parts):
            weights.append(RowAdam.NAME)
    grads = [n for n, grad in got.items() if not grad.isfinite().all()]
    found = ""
    if weights:
        found = f"the weight {weights[0]} is not finite"
    elif grads:
        found = f"loss {loss}, gradient of {grads[0]} first, {len(grads)} of {len(way)} tensors"
    elif not math.isfinite(loss):
        found = f"loss {loss}, all gradients finite"
    said = [f"rank {i}: {text}" for i, text in enumerate(trainer.world.gather(found)) if text]
    again = "computed once more it is finite on every rank: suspect the machine"
    return "; ".join(said) or again


@torch.no_grad()
def evaluate(trainer: Trainer, split: str, long_window: int, calls: int = 0) -> dict:
    """Loss on a split at one window, nats a token (records/RULES.md).

    Targets are tokens 1 to n of the split in rows of val_row_tokens; attention stays within the
    document. bpb: nats of the targets that are text / ln 2 / their bytes. by_position: loss by
    position in the document. Ranks share the calls; every rank returns the same.
    """
    d, world, corpus, lm = trainer.cfg.data, trainer.world, trainer.corpus, trainer.lm
    total = min(d.val_tokens if split == "val" else d.dev_tokens, corpus.tokens(split) - 1)
    stream = TokenStream(corpus.splits[split], corpus.eot)
    edges = torch.tensor(EDGES, device=world.device)
    kinds, rows = len(EDGES) + 1, d.val_call_tokens // d.val_row_tokens
    sums = torch.zeros(3, 2 * kinds, dtype=torch.float64, device=world.device)
    bytes_of = corpus.bytes_of if corpus.bytes_of is not None else np.zeros(padded(corpus.vocab))
    table = torch.from_numpy(bytes_of.astype(np.float64)).to(world.device)
    number, both = math.ceil(total / d.val_call_tokens), lm.windows(long_window)
    lm.look_back(COPY_REACH)
    # In warm-up every rank evaluates: one without a call of dev may have one of val.
    for call in range(calls) if calls else range(world.rank, number, world.size):
        start = call * d.val_call_tokens
        batch = make_batch(stream, start, rows, d.val_row_tokens, total)
        window = lm.window_of(both, batch.docs)
        batch = batch.to(world.device)
        h = lm.forward(batch.tokens, batch.docs, window, *lm.looked_up(batch))
        targets = batch.targets.flatten()
        losses = lm.losses(h, batch).double()
        valid = (targets >= 0).double()
        kind = torch.bucketize(batch.position.flatten(), edges, right=True)
        kind += kinds * (targets == corpus.eot)
        for row, values in zip(
            sums, (losses, valid, table[targets.clamp(min=0)] * valid), strict=True
        ):
            row.index_add_(0, kind, values)
    lm.look_back(COPY_BAND)
    nats, count, size = world.sum(sums).cpu().view(3, 2, kinds)
    names = [f"{a}-{b}" for a, b in zip((0, *EDGES), (*EDGES, ""), strict=True)]
    by_position = zip(names, (nats.sum(0) / count.sum(0)).tolist(), strict=True)
    text_bytes = float(size.sum())
    return {
        "loss": float(nats.sum() / count.sum()),
        "bpb": float(nats[0].sum()) / math.log(2) / text_bytes if text_bytes else None,
        "targets": int(count.sum()),
        "window": long_window,
        "by_position": {name: value for name, value in by_position if value == value},
    }


SPIKE = 10.0  # times the usual gradient norm


class Reporter:
    """Reads a step's figures once the device has finished it, checks and logs them."""

    def __init__(self, trainer: Trainer, log: RunLog, clock: Clock, peak: float | None):
        self.trainer, self.log, self.clock, self.peak = trainer, log, clock, peak
        self.world, self.total = trainer.world, len(trainer.steps)
        base = flops_per_token(trainer.model, 0, 0)
        slopes = [flops_per_token(trainer.model, *keys) - base for keys in ((1, 0), (0, 1))]
        self.flops = (base, *slopes)  # linear in the mean keys of long and short layers
        self.waiting: list[tuple] = []
        self.began = self.last = clock.seconds
        self.mark: torch.cuda.Event | None = None
        self.stopping, self.done = False, 0
        self.late = 1 if self.world.cuda else 0  # steps that the host reads behind the launched one
        self.norms: deque[float] = deque(maxlen=64)

    def start(self) -> None:
        """Starts the clock. On a GPU a step's time is the device's own: the host, which is ahead
        of it by a launched step, would book a step's end late."""
        self.began = self.clock.seconds
        self.clock.start()
        self.mark = self.event()

    def event(self) -> torch.cuda.Event | None:
        if not self.world.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def push(self, step: Step, batch: Batch, figures: tuple[Tensor, Tensor]) -> None:
        """Queues a step that was launched; the one before it is read meanwhile."""
        keys = [batch.mean_keys(int(w)) for w in windows(step.window, torch.device("cpu"))]
        values = torch.cat([figures[0], figures[1].view(1)])
        if self.world.cuda:
            host = torch.empty(3, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values = host
        self.waiting.append((step, values, self.event(), keys, batch))
        self.settle(keep=self.late)

    def settle(self, keep: int = 0) -> None:
        while len(self.waiting) > keep:
            step, values, event, keys, batch = self.waiting.pop(0)
            now = self.clock.now()
            if event is not None:
                event.synchronize()
                now = self.began + self.mark.elapsed_time(event) / 1000
            loss, stop, norm = values.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                where = blame(self.trainer, step, batch)
                text = f"step {step.index + 1}: loss {loss}, gradient norm {norm}; {where}"
                self.log.event("non-finite", text)
                raise NonFinite(text)
            self.stopping = self.stopping or stop > 0
            self.report(step, now, loss, norm, keys)
            self.done = step.index + 1
            self.watch(norm)

    def watch(self, norm: float) -> None:
        """The policy on spikes: a gradient norm above SPIKE times the median of the last 64 steps
        is logged and nothing is skipped; --grad-clip bounds what it does."""
        usual = statistics.median(self.norms) if len(self.norms) >= 16 else math.inf
        if norm > SPIKE * usual:
            text = f"step {self.done}: gradient norm {norm:.3g}, median before {usual:.3g}"
            self.log.event("spike", text)
        self.norms.append(norm)

    def report(self, step: Step, now: float, loss: float, norm: float, keys: list[float]) -> None:
        ms, self.last = 1000 * (now - self.last), now
        rate, done = step.tokens / ms * 1000, step.index + 1
        flops = self.flops[0] + self.flops[1] * keys[0] + self.flops[2] * keys[1]
        sampled = {"candidates": step.candidates} if step.candidates else {}
        if sampled:
            classes, width = self.trainer.head.weight.shape
            flops -= 6 * (classes - step.candidates) * width
        mfu = flops * rate / (self.peak * self.world.size) if self.peak else None
        self.log.write(
            "step",
            step=done,
            loss=round(loss, 6),
            tokens=step.end,
            train_s=round(now, 4),
            ms=round(ms, 3),
            stage=step.stage,
            lr=round(step.lr, 6),
            window=step.window,
            grad_norm=float(f"{norm:.6g}"),
            mfu=mfu and round(mfu, 4),
            **sampled,
        )
        of = f" candidates:{step.candidates}" if sampled else ""
        self.log.say(
            f"step:{done}/{self.total} loss:{loss:.4f}{of} train_s:{now:.2f} ms:{ms:.1f} "
            f"tok/s:{rate:,.0f} lr:{step.lr:.3f} window:{step.window} norm:{norm:.3g}"
            + (f" mfu:{mfu:.1%}" if mfu else "")
        )
        left = now / done * (self.total - done)
        of = f" over {step.candidates} classes" if sampled else ""
        text = f"{done}/{self.total} loss {loss:.3f}{of}, {left:.0f} s"
        self.log.progress(done, self.total, text)


class Looks:
    """A run's looks at the dev loss; the last one is at val, too."""

    def __init__(self, trainer: Trainer, log: RunLog, clock: Clock):
        self.trainer, self.log, self.clock = trainer, log, clock
        self.cfg, self.steps = trainer.cfg, trainer.steps
        n, looks = len(self.steps), self.cfg.run.looks
        self.after = {round(n * (i + 1) / looks) for i in range(looks)} - {n}

    def look(self, done: int, final: bool = False) -> dict:
        """dev_loss at the present window; at the end also val, once, at two windows."""
        at = self.steps[done - 1]
        if any(step.candidates for step in self.steps):
            self.say_left_out()
        where = {"step": done, "tokens": at.end}
        where["train_s"] = round(self.clock.seconds, 3)
        dev = self.trainer.evaluate("dev", at.window)
        out = {"dev_loss": dev.pop("loss"), "dev_bpb": dev["bpb"]}
        self.log.write("val", **where, split="dev", dev_loss=out["dev_loss"], **dev)
        self.log.say(f"step:{done}/{len(self.steps)} dev_loss:{out['dev_loss']:.4f}{bpb_text(dev)}")
        if final and self.cfg.run.final_val and self.trainer.corpus.splits.get("val"):
            out |= self.look_at_val(at, where)
        hook = self.trainer.hooks.on_eval
        if hook is not None:
            hook(self.trainer, out)
        return out

    def look_at_val(self, at: Step, where: dict) -> dict:
        """val_loss at the last step's window, val_loss_ext at --ext-window."""
        wide = self.cfg.schedule.ext_window or at.window
        val = self.trainer.evaluate("val", at.window)
        ext = self.trainer.evaluate("val", wide) if wide != at.window else dict(val)
        losses = {"val_loss": val["loss"], "val_loss_ext": ext.pop("loss")}
        ext |= {"window": at.window, "ext_window": wide}
        self.log.write("val", **where, split="val", **losses, **ext)
        self.log.say(
            f"val_loss:{losses['val_loss']:.4f} (window {at.window}) val_loss_ext:"
            f"{losses['val_loss_ext']:.4f} (window {wide}){bpb_text(ext)}"
        )
        return {**losses, "val_bpb": ext["bpb"]}

    def say_left_out(self) -> None:
        """An event where a sampled loss had less room than targets since the last look."""
        count = self.trainer.world.sum(self.trainer.head.left_out)
        if count:
            text = f"{int(count):,} targets had no place among the candidates, so no loss"
            self.log.event("warning", f"{text}: give --stages more of them")
        count.zero_()


class Account:
    """What a run's log says of the run as a whole, before its first step and after its last."""

    def __init__(self, trainer: Trainer, log: RunLog, clock: Clock):
        self.trainer, self.log, self.clock = trainer, log, clock
        self.cfg, self.world, self.steps = trainer.cfg, trainer.world, trainer.steps
        self.env = machine(self.world)
        self.peak = peak_flops(self.env)
        self.energy: float | None = None  # of this GPU, J, when the run began

    def begin(self) -> None:
        """Header and opening lines; a resumed run's log has those already. Which kernels fall back
        is said again."""
        if not self.cfg.run.resume:
            header = self.header()
            self.log.write("header", **header)
            self.log.say(self.opening(header))
        for name, reason in self.trainer.kernels.items():
            if reason:
                self.log.event("fallback", f"{name}: {reason}; plain PyTorch instead")
        self.energy = joules(self.world)

    def header(self) -> dict:
        """What a reader needs to know of a run."""
        cfg, trainer, last = self.cfg, self.trainer, self.steps[-1]
        have, trained = trainer.corpus.tokens("train"), last.end
        keys = windows(last.window, torch.device("cpu")).tolist()
        return {
            "schema": SCHEMA,
            "run_id": self.log.folder.name,
            "arm": cfg.model.arm,
            "preset": cfg.preset,
            "track": cfg.run.track,
            "labels": trainer.labels,
            "seed": cfg.run.seed,
            "data_seed": cfg.data.data_seed,
            "argv": sys.argv,
            "config": cfg.flat(),
            "source_sha256": trainer.source_sha256,
            "git": git_state(),
            "env": self.env,
            "data": trainer.data_digests,
            "params": count_parameters(trainer.model),
            "flops_per_token": float(flops_per_token(trainer.model, *keys)),
            "peak_flops": self.peak,
            "world": self.world.size,
            **{name: trainer.uses(name) for name in KERNELS},
            "dtype": str(trainer.dtype).removeprefix("torch."),
            "compile_s": round(trainer.compile_s, 2),
            "steps": len(self.steps),
            "tokens": trained,
            "distinct": min(trained, have),
            "repeated": max(0, trained - have),
        }

    def opening(self, header: dict) -> str:
        """The header for people."""
        cfg, params, size = self.cfg, header["params"], self.world.size
        shapes = sorted({(s.tokens, *self.trainer.call_shape(s.tokens)) for s in self.steps})
        calls = ", ".join(f"{t:,} = {t // (r * w)} x {r} x {w:,}" for t, r, w in shapes)
        peak = f"; BF16 peak {self.peak / 1e12} TFLOP/s" if self.peak else ""
        targets = min(cfg.data.dev_tokens, self.trainer.corpus.tokens("dev") - 1)
        return (
            f"run {self.log.folder}: arm {cfg.model.arm}, preset {cfg.preset}, {size} x "
            f"{self.env['gpu'] or 'CPU'}, torch {self.env['torch']}, head in "
            f"{'FP8' if header['fp8'] else header['dtype']}, warm-up {header['compile_s']} s\n"
            f"parameters: {params['active_matmul']:,} active matmul, {params['attention']:,} in "
            f"attention, {params['stored']:,} stored; {header['flops_per_token'] / 1e9:.3f} GFLOP "
            f"a token with full windows{peak}\n"
            f"{len(self.steps)} steps, {header['tokens']:,} tokens, {header['distinct']:,} "
            f"distinct; a step on {size} rank(s), tokens = calls x rows x tokens: {calls}\n"
            f"dev_loss {max(1, cfg.run.looks)} x over {targets:,} targets (--looks, --dev-tokens)"
        )

    def end(self, status: str, done: int) -> dict:
        """The figures of the `end` line and the run's folder; collective."""
        after, cuda, seconds = joules(self.world), self.world.cuda, self.clock.seconds
        tokens = self.steps[done - 1].end if done else 0
        spent = math.nan if after is None or self.energy is None else after - self.energy
        spent = float(
            self.world.sum(torch.tensor(spent, dtype=torch.float64, device=self.world.device))
        )
        end = {
            "status": status,
            "code": EXIT_CODES[status],
            "train_s": round(seconds, 3),
            "compile_s": round(self.trainer.compile_s, 2),
            "door_s": round(process_age(), 2),
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(1e-9, seconds), 1),
            "peak_alloc": torch.cuda.max_memory_allocated() if cuda else None,
            "peak_reserved": torch.cuda.max_memory_reserved() if cuda else None,
            "joules": None if math.isnan(spent) else spent,  # of all GPUs, validation included
        }
        self.log.write("end", **end)
        memory = f", peak {end['peak_alloc'] / 1e9:.2f} GB" if cuda else ""
        self.log.say(
            f"{status}: {seconds:.2f} s of training, {end['tokens_per_s']:,.0f} tokens/s, "
            f"door to loss {end['door_s']:.1f} s{memory}"
        )
        return {**end, "run": str(self.log.folder)}


def snapshot(trainer: Trainer) -> dict:
    """Weights, optimizer and random numbers, in the host's memory once the device is synchronised;
    collective, {} on all ranks but the main one."""
    world = trainer.world
    state = {"rng": torch.get_rng_state()}
    state["optimizer"] = trainer.optimizer.state_dict(world.main)
    if not world.main:
        return {}
    weights = trainer.model.state_dict()
    state["model"] = {k: to_host(v.detach()) for k, v in weights.items()}
    if world.cuda:
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def restore(trainer: Trainer, state: dict) -> None:
    """A `snapshot` of the same run."""
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if trainer.world.cuda and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])


def refuse_others(trainer: Trainer, path: Path, state: dict, meta: dict) -> None:
    """InputError where a checkpoint is not one of the same run, from which it could go on."""
    if "optimizer" not in state:  # evals/finetune.py keeps such
        raise InputError(f"{path} does not fit: it has weights alone, to be used, not resumed")
    free = {*PARTS["run"].__dataclass_fields__, "preset", "data", "micro_batch_tokens"}
    free -= {"seed", "dtype", "deterministic", "attention", *KERNELS}
    if any(step.candidates for step in trainer.steps):
        free -= {"micro_batch_tokens"}  # which may make other pieces of the head's rows
    # A setting that the checkpoint is too old to know was off, as its default is or was.
    off = {**Config().flat(), "mlp_kernel": False, "loss_kernel": False}
    mine, saved = trainer.cfg.flat(), {**off, **without_deleted(meta["config"], path)}
    differ = [k for k in saved if k not in free and saved[k] != mine.get(k)]
    if differ:
        said = ", ".join(f"{k} {saved[k]!r}, now {mine.get(k)!r}" for k in differ)
        raise InputError(f"{path} was saved with other settings: {said}")
    if meta["data"] != trainer.data_digests or meta["steps"] != len(trainer.steps):
        raise InputError(f"{path} was trained on other files, or for another number of steps")


class Checkpoints:
    """What a run saves. The state is copied to the host's memory at once, and a thread writes it
    while training goes on."""

    def __init__(self, trainer: Trainer, log: RunLog, clock: Clock):
        self.trainer, self.log, self.clock = trainer, log, clock
        self.folder = log.folder / "ckpt"
        self.writer, self.saving = ThreadPoolExecutor(1), None

    def save(self, done: int) -> None:
        """See `Run.save`."""
        self.settle()
        state, world = snapshot(self.trainer), self.trainer.world
        if not world.main:
            return
        meta = self.meta(done)
        world.synchronize()
        keep = self.trainer.cfg.run.keep
        self.saving = self.writer.submit(save_checkpoint, self.folder, state, meta, keep)

    def meta(self, done: int) -> dict:
        """What a checkpoint after `done` steps says of itself, taken at that step."""
        cfg, steps = self.trainer.cfg, self.trainer.steps
        at = steps[done - 1]
        return {
            "schema": SCHEMA,
            "step": done,
            "tokens": at.end,
            "train_s": self.clock.seconds,
            "window": at.window,
            "arm": cfg.model.arm,
            "labels": self.trainer.labels,
            "config": cfg.flat(),
            "data": self.trainer.data_digests,
            "steps": len(steps),
            "log": self.log.offsets(),
            "h": self.log.h,
        }

    def settle(self, wait: bool = True) -> None:
        """Takes note of a checkpoint that was being written. Where the disk does not take it the
        run goes on, loudly, and the one before it stands."""
        if self.saving is None or not (wait or self.saving.done()):
            return
        job, self.saving = self.saving, None
        try:
            self.log.say(f"saved {job.result()}")
        except OSError as e:
            stands = [p.name for p in whole_checkpoints(self.folder)[-1:]]
            text = f"no checkpoint was saved: {e}; {', '.join(stands) or 'none'} is the newest"
            self.log.event("warning", text)

    def close(self) -> None:
        self.settle()
        self.writer.shutdown()


def new_run_id(cfg: Config, world: World) -> str:
    """When, what and with which seeds: the main rank's, on every rank."""
    arm, stamp = re.sub(r"[^\w.,=+-]", "-", cfg.model.arm), time.strftime("%Y%m%d-%H%M%S")
    seeds = f"s{cfg.run.seed}-{cfg.data.data_seed}"
    box = [f"{stamp}_{cfg.preset}_{arm}_{seeds}"]
    if world.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def new_log(trainer: Trainer) -> RunLog:
    """The log of a new run, in a folder that holds no other."""
    cfg, world = trainer.cfg, trainer.world
    folder = Path(cfg.run.out) / (cfg.run.run_id or new_run_id(cfg, world))
    refuse_held(folder)
    world.barrier()
    trainer.folder = folder
    log = RunLog(folder, world.main)
    if world.main:
        for old in (folder / "run.log", folder / "run.jsonl"):
            if old.exists():  # of an attempt that ended before its first checkpoint
                os.replace(old, folder / f"{old.name}.{restarts()}")
        mark_running(folder)
    return log


def resume(trainer: Trainer) -> tuple[RunLog, int, float]:
    """Loads --resume and cuts the logs back to it; refuses other settings. (The log, the steps and
    the training seconds that are done.)"""
    path, state, meta, wrong = open_checkpoint(trainer.cfg.run.resume)
    try:
        refuse_others(trainer, path, state, meta)
        restore(trainer, state)
        offsets = {key: int(meta["log"][key]) for key in ("log", "jsonl")}
        h, first, seconds = str(meta["h"]), int(meta["step"]), float(meta["train_s"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path} does not fit: {e!r}") from None
    world = trainer.world
    world.barrier()  # every rank has read it
    log = RunLog(path.parents[1], world.main)
    log.check(offsets)  # before anything goes
    if world.main:  # what came after it belongs to a run that now does not happen
        for later in whole_checkpoints(path.parent):
            if later.name > path.name:
                shutil.rmtree(later)
    trainer.folder = log.folder
    log.truncate(offsets, h)
    if world.main:
        mark_running(trainer.folder)
    for text in wrong:
        log.event("warning", f"{text}: passed over and removed")
    log.event("resume", f"from {path} at step {first}")
    return log, first, seconds


class Run:
    """One training run of a Trainer: the loop, with what keeps its log, clock, looks and
    checkpoints."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.cfg, self.world = trainer, trainer.cfg, trainer.world
        self.steps, self.hooks = trainer.steps, trainer.hooks
        trainer.running = self
        if self.world.cuda and not trainer.graphed:  # a replay allocates nothing: the warm-up did
            torch.cuda.reset_peak_memory_stats()
        if self.cfg.run.resume:
            self.log, self.first, seconds = resume(trainer)
        else:
            self.log, self.first, seconds = new_log(trainer), 0, 0.0
        self.folder, self.clock = self.log.folder, Clock(self.world, seconds)
        tell = trainer, self.log, self.clock
        self.account = Account(*tell)
        self.reporter = Reporter(*tell, self.account.peak)
        self.looks, self.checkpoints = Looks(*tell), Checkpoints(*tell)
        self.reporter.done = self.first
        self.account.begin()

    def train(self) -> dict:
        try:
            return self.loop()
        except NonFinite:
            self.clock.stop()
            self.checkpoints.settle()
            self.account.end("non-finite", self.reporter.done)
            raise
        finally:
            self.checkpoints.close()

    def loop(self) -> dict:
        n, steps = len(self.steps), self.steps[self.first :]
        every = self.cfg.run.save_every
        batches = (self.hooks.batches or self.trainer.default_batches)(steps, self.cfg, self.world)
        gc.collect()
        self.reporter.start()
        for step, batch in zip(steps, batches, strict=True):
            self.reporter.push(step, batch, self.trainer.train_step(step, batch))
            done = step.index + 1
            if self.hooks.after_step is not None:
                self.hooks.after_step(self.trainer, step)
            if done in self.looks.after:
                with self.paused():
                    self.looks.look(done)
            if every and done % every == 0 and done < n:  # after the look, which its log holds
                with self.paused():
                    self.save(done)
            self.checkpoints.settle(wait=False)
            if self.reporter.stopping:
                self.stop_on_signal(done)
        self.reporter.settle()
        self.blend()
        if self.cfg.run.save_final:  # before the evaluation, which may run out of memory
            self.save(n)
        losses = self.looks.look(n, final=True)
        self.checkpoints.settle()
        return {**losses, **self.account.end("done", n)}

    def blend(self) -> None:
        """The run's last training: what --tail asks for. A run that goes on from its own end has no
        samples left. Stops the clock."""
        tail, share = self.trainer.optimizer.tail, self.cfg.optim.tail_blend
        samples = tail.samples
        if samples:
            tail.blend(share)
        self.clock.stop()
        if samples:
            at = [step.index + 1 for step in self.steps if step.sample]
            text = f"{samples} samples of the weights, after steps {at[0]} to {at[-1]}"
            self.log.event("tail", f"{text}: their mean is {share} of the final ones")

    @contextlib.contextmanager
    def paused(self):
        self.reporter.settle()
        self.clock.stop()
        yield
        self.reporter.start()

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps; collective."""
        self.checkpoints.save(done)

    def stop_on_signal(self, done: int) -> None:
        self.trainer.agreed = True
        self.reporter.settle()
        self.clock.stop()
        self.save(done)
        self.checkpoints.settle()
        self.account.end("signal", done)
        self.log.say(f"stopped by a signal; go on with the same command and --resume {self.folder}")
        raise SystemExit(EXIT_CODES["signal"])


def bpb_text(result: dict) -> str:
    return "" if result["bpb"] is None else f" bpb:{result['bpb']:.4f}"


def train(cfg: Config, *, hooks: Hooks | None = None) -> dict:
    """Trains `cfg` once and returns its figures (see `Trainer.run`)."""
    return Trainer(cfg, hooks).run()


def smaller(trainer: Trainer | None) -> str:
    """The one flag to change when memory is out."""
    if trainer is None:
        return "--micro-batch-tokens 32768"
    rows, row = max(trainer.call_shape(s.tokens) for s in trainer.steps)
    if rows > 1:
        return f"--micro-batch-tokens {rows // 2 * row}"
    return f"--row-tokens {row // 2}, or --val-row-tokens where it was validating"


def main(argv: list[str] | None = None, make_hooks: Callable[[Config], Hooks] | None = None) -> int:
    """The command line; returns one of EXIT_CODES."""
    set_environment()
    argv, trainer = sys.argv[1:] if argv is None else argv, None
    try:
        cfg = after_restart(parse_args(argv))
        trainer = Trainer(cfg, make_hooks(cfg) if make_hooks else None)
        heed_signals(trainer)
        trainer.run()
        code, reason = 0, "done"
    except InputError as e:
        code, reason = EXIT_CODES["input"], str(e)
    except NonFinite as e:
        code, reason = EXIT_CODES["non-finite"], str(e)
    except Ended as e:
        code, reason = e.args
    except torch.OutOfMemoryError:
        code, reason = EXIT_CODES["memory"], f"out of GPU memory: run again with {smaller(trainer)}"
    except RuntimeError as e:
        if not peer_lost(e):
            raise
        code, reason = EXIT_CODES["peer lost"], f"a rank is lost: {str(e).splitlines()[0]}"
    except SystemExit as e:
        if e.code != EXIT_CODES["signal"]:
            raise
        code, reason = EXIT_CODES["signal"], "saved on a signal"
    rank = int(os.environ.get("RANK", 0))
    if code and (rank == 0 or code in OWN_FAULTS):
        print(f"train_gpt.py: {reason}", file=sys.stderr)
    write_exit(getattr(trainer, "folder", None) or named_folder(argv), code, reason)
    if trainer is not None and code not in OWN_FAULTS:  # else it would wait for the other ranks
        trainer.world.close()
    return code


# ---- 11. Kernels --------------------------------------------------------------------------------
# What each replaces, and is tested against, stands in sections 3 to 6.

jit = triton.jit if triton else lambda function: function


def hopper(device: torch.device) -> bool:
    """Whether Triton is there and the GPU has the units that the kernels are cut for."""
    gpu = triton is not None and device.type == "cuda"
    return gpu and torch.cuda.get_device_capability(device) == (9, 0)


# A probe runs a kernel once on the card at hand and compares: it returns why it must not be used,
# or "". (Rare races it cannot see: the tests repeat for that.)
NO_HOPPER = "no Hopper GPU (H100, H200) with Triton here"


def failure(e: Exception) -> str:
    """What ended a probe, on one line: Triton and its like have errors of many kinds and pages."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def errors_of(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """||got - want|| / ||want|| of each pair; NaN, below no bound, where either has one."""
    pairs = zip(got, want, strict=True)
    return [float((g.float() - w.float()).norm() / w.float().norm()) for g, w in pairs]


def verdict(errors: list[float], bound: float) -> str:
    if all(error < bound for error in errors):
        return ""
    return f"computes wrongly on this card: off by {', '.join(f'{e:.1e}' for e in errors)}"


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows, columns and depth of a tile; warps, loads in flight, and programs
    on a multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int


UP_TILE = Tile(128, 256, 64, warps=8, stages=4, programs=1)
UP8_TILE = Tile(128, 256, 128, warps=8, stages=3, programs=1)  # operands in FP8
BACK_TILE = Tile(128, 128, 64, warps=4, stages=3, programs=2)
BACK8_TILE = Tile(128, 128, 64, warps=4, stages=4, programs=2)


@jit
def halves(t):
    """[R, C] -> left and right [R, C / 2]; a whole tile on its way out would take much memory."""
    return tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1))


UP8_SCALE = 1 / 448  # of rows of length 1

# By this the FP8 sums of an MLP's way back are divided: e5m2 then holds what is from 4 to 1.5e10,
# three bits of it from 16 on. None is above 448^2 d x 2 sqrt(d), 8.5e9 at d = 768.
INNER8_SCALE = 2.0**18


@jit
def relu2_part(t, rows, post, out, out8, m, n, K: tl.constexpr, BACK: tl.constexpr):
    if BACK:
        t = t * (2 * tl.sqrt(post.load([m, n]).to(tl.float32)))
        if out8 is not None:
            eight = t * 2.0**-18  # / INNER8_SCALE; then the largest e5m2
            eight = tl.clamp(eight, -57344.0, 57344.0, tl.PropagateNan.ALL)
            out8.store([m, n], eight.to(out8.dtype))
            t *= rows[:, None]
        out.store([m, n], t.to(out.dtype))
    else:
        t = tl.maximum(t, 0.0, tl.PropagateNan.ALL)
        t = t * t
        out.store([m, n], t.to(out.dtype))
        if out8 is not None:
            eight = t * (448.0 / K)  # relu^2 is K at most; then the largest e4m3
            eight = tl.minimum(eight, 448.0, tl.PropagateNan.ALL)
            out8.store([m, n], eight.to(out8.dtype))


@jit
def relu2_tiles(
    a,
    b,
    scale,
    post,
    out,
    out8,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BACK: tl.constexpr,
):
    """out [M, N] = relu(a [M, K] b [N, K]^T)^2; with BACK (a [M, K] b [K, N]) x 2 sqrt(post).
    Operands in FP8, as `mlp_in_fp8` makes them, have the result in out8, too, x 448 / K in e4m3.
    With BACK b is [N, K] then, `scale` [M] that of the product's rows, and out8 without it, /
    INNER8_SCALE, in e5m2.

    A program computes every so many tiles, columns first, so that all of b stays in the L2 cache;
    flattened, the loop loads the next tile while this one leaves.
    """
    columns = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BM, tile % columns * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if BACK and out8 is None:
                total = tl.dot(a.load([m, k]), b.load([k, n]), total)
            else:
                total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
        rows = scale
        if out8 is not None:
            if BACK:
                row = m + tl.arange(0, BM)
                rows = tl.load(scale + row, row < M, 0.0)
            else:
                total *= K**0.5 / (448.0 * 448.0)  # see `mlp_in_fp8`
        left, right = halves(total)
        if BACK:  # in quarters, as post comes in beside it
            first, second = halves(left)
            third, fourth = halves(right)
            relu2_part(first, rows, post, out, out8, m, n, K, BACK)
            relu2_part(second, rows, post, out, out8, m, n + BN // 4, K, BACK)
            relu2_part(third, rows, post, out, out8, m, n + BN // 2, K, BACK)
            relu2_part(fourth, rows, post, out, out8, m, n + 3 * BN // 4, K, BACK)
        else:
            relu2_part(left, rows, post, out, out8, m, n, K, BACK)
            relu2_part(right, rows, post, out, out8, m, n + BN // 2, K, BACK)


def relu2_product(
    a: Tensor, b: Tensor, post: Tensor | None, tile: Tile, out8: Tensor | None = None, scale=None
) -> Tensor:
    """`relu2_tiles` on contiguous matrices; the TMA unit wants rows by 16 B: K and N by 8, in FP8
    by 16. Where out8 [M, N] is given it and the operands are in FP8, the result is in bfloat16; on
    the way back its product has a `scale` for each row, [M]."""
    back, unit = post is not None, 8 if out8 is None else 16
    across = back and out8 is None  # b [K, N]
    (m, k), n = a.shape, b.size(1 if across else 0)
    assert a.is_contiguous() and b.is_contiguous(), (a.stride(), b.stride())
    assert b.size(0 if across else 1) == k and k % unit == n % unit == 0, (a.shape, b.shape)
    out = a.new_empty(m, n, dtype=a.dtype if out8 is None else torch.bfloat16)
    described, part = TensorDescriptor.from_tensor, [tile.m, tile.n // (4 if back else 2)]
    programs = 1
    if a.is_cuda:
        card = torch.cuda.get_device_properties(a.device)
        programs = tile.programs * card.multi_processor_count
    relu2_tiles[(min(programs, triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)),)](
        described(a, [tile.m, tile.k]),
        described(b, [tile.k, tile.n] if across else [tile.n, tile.k]),
        scale,
        described(post, part) if back else None,
        described(out, part),
        None if out8 is None else described(out8, part),
        *(m, n, k, tile.m, tile.n, tile.k, back),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@torch.library.custom_op("nca::mlp", mutates_args=())
def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, d], up [width, d], down [d, width] -> (relu(x up^T)^2 down^T, relu(x up^T)^2).

    `MLP` without its rounding before relu. The way back needs the second output alone: its root
    is relu(x up^T), and half as far off as that rounded to bfloat16 (records 59, 87).
    """
    post = relu2_product(x, up, None, UP_TILE)
    return post @ down.t(), post


@torch.library.custom_op("nca::mlp_back", mutates_args=())
def mlp_back(grad: Tensor, down: Tensor, post: Tensor) -> Tensor:
    """The gradient of x up^T [M, width] from that of the MLP's output [M, d]."""
    return relu2_product(grad, down, post, BACK_TILE)


@fused_mlp.register_fake
def _(x, up, down):
    return x.new_empty(x.size(0), down.size(0)), x.new_empty(x.size(0), up.size(0))


@mlp_back.register_fake
def _(grad, down, post):
    return torch.empty_like(post)


def mlp_keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def mlp_gradients(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, Tensor]:
    x, up, down, post = ctx.saved_tensors
    grad = grad.contiguous()
    inner = mlp_back(grad, down, post)
    return inner @ up, inner.t() @ x, grad.t() @ post


fused_mlp.register_autograd(mlp_gradients, setup_context=mlp_keep)


def unit_rows(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """up [width, d], down [d, width] -> those of the same MLP whose rows of up have length 1.

    relu(c z)^2 = c^2 relu(z)^2, so the square of a row's length can go into the column of down.
    What FP8 has to hold is bounded by that: relu^2 by d for x of unit RMS, whatever was trained.
    (Cut at a constant instead, a unit beyond it grows on, as gradients see it and the loss does
    not.) Lengths are constants to the gradients, which so are those of the weights given.
    """
    length = up.detach().norm(dim=1).clamp(min=1e-12)
    return up / length[:, None], down * length.square()


def mlp_in_fp8(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """x [M, d] of unit RMS, weights of `unit_rows` -> all three in e4m3, and the last one's scale.
    x and up by what cannot be exceeded: a value by sqrt(d) in the one, 1 in the other; down by its
    largest value, so that a step that made one large spoils no product."""
    x, up, down = (t.detach() for t in (x, up, down))
    of_down = down.abs().amax().float().clamp(min=1e-12) / 448
    x8, up8 = to_fp8(x, x.size(1) ** 0.5 / 448, E4M3), to_fp8(up, UP8_SCALE, E4M3)
    return x8, up8, to_fp8(down, of_down, E4M3), of_down


@torch.library.custom_op("nca::mlp_fp8", mutates_args=())
def fused_mlp_fp8(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    x8: Tensor,
    up8: Tensor,
    down8: Tensor,
    down_scale: Tensor,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """`fused_mlp` of what `mlp_in_fp8` made of its inputs, rows of up of length 1: both products in
    FP8. The way back, from x, up and down, is the same but for `both`, where the gradient of x
    comes by FP8, too."""
    post8 = torch.empty(x.size(0), up.size(0), dtype=E4M3, device=x.device)
    post = relu2_product(x8, up8, None, UP8_TILE, post8)
    post_scale = down_scale.new_full((), x.size(1) / 448)
    return fp8_mm(post8, down8.t(), post_scale, down_scale, x.dtype, True), post


@torch.library.custom_op("nca::mlp_back_fp8", mutates_args=())
def mlp_back_fp8(
    grad8: Tensor, up8t: Tensor, down8t: Tensor, rows: Tensor, scale: Tensor, post: Tensor
) -> tuple[Tensor, Tensor]:
    """grad8 [M, d], up8t [d, width], down8t [width, d] in e4m3 -> gradients of x up^T [M, width],
    with rows [M] as scales of its product's rows, and of x [M, d], in bfloat16; the second with one
    `scale` for all, so that what made rows differ is left to the caller."""
    inner8 = torch.empty_like(post, dtype=E5M2)
    inner = relu2_product(grad8, down8t, post, BACK8_TILE, inner8, rows)
    return inner, fp8_mm(inner8, up8t.t(), scale.new_ones(()), scale, inner.dtype, True)


@fused_mlp_fp8.register_fake
def _(x, up, down, x8, up8, down8, down_scale, both):
    shape = x.size(0), up.size(0)
    return x.new_empty(x.size(0), down.size(0)), x.new_empty(shape, dtype=torch.bfloat16)


@mlp_back_fp8.register_fake
def _(grad8, up8t, down8t, rows, scale, post):
    return torch.empty_like(post), torch.empty_like(grad8, dtype=post.dtype)


def mlp_keep_fp8(ctx, inputs, output) -> None:
    *_, ctx.both = inputs
    if not ctx.both:
        return mlp_keep(ctx, inputs[:3], output)
    x, _, _, _, *eights, _ = inputs
    mlp_keep(ctx, (x, *eights), output)


def gradient_in_fp8(grad: Tensor, up8, down8, down_scale) -> tuple[Tensor, ...]:
    """The gradient of the MLP's output [M, d] -> what `mlp_back_fp8` takes before post, and the
    scales [M, 1] by which its rows were cut: each by its largest value, in the pass that reads it,
    where one for all would need another pass."""
    of_rows = grad.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / 448
    scale = INNER8_SCALE * UP8_SCALE * down_scale
    eights = to_fp8(grad, of_rows, E4M3), transposed(up8), transposed(down8)
    return *eights, of_rows[:, 0] * down_scale, scale, of_rows


def mlp_gradients_fp8(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    if not ctx.both:
        return *mlp_gradients(ctx, grad, _), *(None,) * 5
    x, *eights, post = ctx.saved_tensors
    grad = grad.contiguous()
    *operands, of_rows = gradient_in_fp8(grad, *eights)
    inner, dx = mlp_back_fp8(*operands, post)
    dx = (dx * of_rows).to(x.dtype)
    return dx, inner.t() @ x, grad.t() @ post, *(None,) * 5


fused_mlp_fp8.register_autograd(mlp_gradients_fp8, setup_context=mlp_keep_fp8)


@functools.cache
def probe_mlp_fp8(device: torch.device, both: bool = False) -> str:
    """Of its way forward, and back where that is in FP8, too: against fp64 on the same FP8 numbers,
    relu^2 as large as it can be in one place. What is left are sums in fewer bits, and what they
    make round the other way."""
    if not hopper(device):
        return NO_HOPPER
    gen = torch.Generator(device).manual_seed(0)
    shapes = (304, 128), (528, 128), (128, 528), (304, 128)
    x, up, down, grad = (torch.randn(shape, generator=gen, device=device) for shape in shapes)
    x = norm(x)
    up[3] = x[3]
    up, down = unit_rows(up, down)
    try:
        x8, up8, down8, down_scale = eights = mlp_in_fp8(x, up, down)
        bf16 = (t.to(torch.bfloat16) for t in (x, up, down))
        got = y, post = fused_mlp_fp8(*bf16, *eights, both)
        want = exact_in_fp8(*eights)
        if both:
            *operands, _ = gradient_in_fp8(grad.bfloat16(), *eights[1:])
            got += mlp_back_fp8(*operands, post)
            want += exact_back(*operands, post)
        return verdict(errors_of(got, want), 0.03)
    except Exception as e:
        return failure(e)


def exact_in_fp8(x8, up8, down8, down_scale) -> tuple[Tensor, Tensor]:
    """`fused_mlp_fp8` in fp64."""
    d = x8.size(1)
    exact = F.relu(x8.double() @ up8.double().t() * (d**0.5 * UP8_SCALE / 448)).square()
    post8 = to_fp8(exact, d / 448, E4M3).double() * (d / 448)
    return post8 @ down8.double().t() * down_scale, exact


def exact_back(grad8, up8t, down8t, rows, scale, post) -> tuple[Tensor, Tensor]:
    """`mlp_back_fp8` in fp64."""
    inner = grad8.double() @ down8t.double().t() * 2 * post.double().sqrt()
    inner8 = to_fp8(inner, INNER8_SCALE, E5M2).double()
    return inner * rows[:, None], inner8 @ up8t.double().t() * scale


@functools.cache
def probe_mlp(device: torch.device) -> str:
    """Of the fused MLP, both ways, against fp64."""
    if not hopper(device):
        return NO_HOPPER
    gen = torch.Generator(device).manual_seed(0)
    shapes = (300, 128), (520, 128), (128, 520), (300, 128)
    x, up, down, grad = (
        torch.randn(shape, generator=gen, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    try:
        post = fused_mlp(x, up, down)[1]
        got = post, mlp_back(grad, down, post)
        root = F.relu(x.double() @ up.double().t())
        want = root.square(), grad.double() @ down.double() * 2 * root
        return verdict(errors_of(got, want), 0.01)
    except Exception as e:
        return failure(e)


ROW_BLOCK = 2048, 4  # logits at a time, warps
# Rows, columns, tiles of a group (see `grad_tiles`), warps, registers a thread: 64 let four
# programs wait for memory on a multiprocessor.
GRAD_TILE = 128, 64, 8, 8, 64


@jit
def sigmoid_of(z, shift, width):
    """sigmoid((z + shift) / width) by a power of two; 0 at -inf. A root's reciprocal, squared, is
    two instructions where Triton's division is five."""
    slope = -1.4426950408889634 / width
    root = tl.rsqrt(1 + tl.exp2(z * slope + shift * slope))
    return root * root


@jit
def counts_of(columns, rest):
    """For how many classes each column stands, by `Candidates.rest`."""
    other = columns.to(tl.float32) >= tl.load(rest)
    return tl.where(other, tl.exp(tl.load(rest + 1)), 1.0)


@jit
def loss_rows(
    z,
    targets,
    copied,
    rest,
    losses,
    totals,
    shares,
    V,
    top,
    shift,
    width,
    CHUNK: tl.constexpr,
    MIXED: tl.constexpr,
):
    """A row of z [N, V] a program: totals [N] = log sum exp of its capped logits, losses [N]; MIXED
    with copied [N]: shares [N], that of the softmax in the target's probability. rest: see
    `Candidates`, or None."""
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    sums = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, V, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        x = tl.load(z + columns, columns < V, float("-inf")).to(tl.float32)
        below = (sigmoid_of(x, shift, width) - 1) * (top * 1.4426950408889634)
        e = tl.exp2(below)
        if rest is not None:
            e *= counts_of(columns, rest)
        sums += tl.where(columns < V, e, 0.0)
    total = top + tl.log(tl.sum(sums))
    target = tl.load(targets + row)
    hit = top * sigmoid_of(tl.load(z + tl.maximum(target, 0)).to(tl.float32), shift, width)
    loss = total - hit
    if MIXED:
        other = tl.load(copied + row)
        most = tl.maximum(-loss, other)
        mixed = most + tl.log(tl.exp(-loss - most) + tl.exp(other - most))
        tl.store(shares + row, tl.exp(-loss - mixed))
        loss = -mixed
    tl.store(totals + row, total)
    tl.store(losses + row, tl.where(target >= 0, loss, 0.0))


@jit
def grad_of(z, targets, totals, shares, rest, rows, columns, N, V, cap, MIXED: tl.constexpr):
    """scale x the gradient of the loss at these rows [R] and columns [C] of z, fp32. What depends
    on the row alone is multiplied there."""
    top, shift, width, scale = cap
    inside = (rows < N)[:, None] & (columns < V)[None, :]
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    s = sigmoid_of(tl.load(z + at, inside, 0.0).to(tl.float32), shift, width)
    total = tl.load(totals + rows, rows < N, 0.0) * 1.4426950408889634
    p = tl.exp2(s * (top * 1.4426950408889634) - total[:, None])
    target = tl.load(targets + rows, rows < N, -1).to(tl.int32)
    share = tl.where(target >= 0, top / width * scale, 0.0)
    if MIXED:
        share *= tl.load(shares + rows, rows < N, 0.0)
    hits = tl.where(columns[None, :] == target[:, None], share[:, None], 0.0)
    grad = (p * share[:, None] - hits) * (s * (1 - s))
    if rest is not None:  # no hit's column stands for others
        grad *= counts_of(columns, rest)[None, :]
    return grad


@jit
def pair_of(low, high):
    """Two fp32 numbers in e5m2, to nearest, saturating, as the halves of an int16. The machine's
    own instruction, as Triton would compute all before it twice to have its result in two layouts.

    In 32 bits at first: where two 16-bit results were packed for one store and used alone for
    another, ptxas 12.8 took the second from a register that nothing had written.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 pair; cvt.rn.satfinite.e5m2x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }",
        "=r,f,f",
        [low, high],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    ).to(tl.int16)


@jit
def grad_tiles(
    z,
    targets,
    totals,
    shares,
    rest,
    grad,
    turned,
    PAIRS,
    V,
    top,
    shift,
    width,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    MIXED: tl.constexpr,
):
    """A tile of z [2 PAIRS, V] a program -> grad, the same in bytes, and turned [V, PAIRS]. A pair
    of rows is one 16-bit number from the cast on: those the machine can transpose, bytes not.

    Programs go down GROUP tiles, then to the next column of tiles: what runs at one time reads and
    writes long runs of memory in both directions.
    """
    down, across = tl.cdiv(2 * PAIRS, ROWS), tl.cdiv(V, COLUMNS)
    top_tile = tl.program_id(0) // (GROUP * across) * GROUP
    place, height = tl.program_id(0) % (GROUP * across), tl.minimum(down - top_tile, GROUP)
    pairs = (top_tile + place % height) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    columns = place // height * COLUMNS + tl.arange(0, COLUMNS)
    N = 2 * PAIRS
    cap = (top, shift, width, scale)
    low = grad_of(z, targets, totals, shares, rest, 2 * pairs, columns, N, V, cap, MIXED)
    high = grad_of(z, targets, totals, shares, rest, 2 * pairs + 1, columns, N, V, cap, MIXED)
    pair = pair_of(low, high)
    inside = (pairs < PAIRS)[:, None] & (columns < V)[None, :]
    at = pairs.to(tl.int64)[:, None] * (2 * V) + columns[None, :]
    tl.store(grad + at, pair.to(tl.int8), inside)
    tl.store(grad + at + V, (pair >> 8).to(tl.int8), inside)
    there = columns.to(tl.int64)[:, None] * PAIRS + pairs[None, :]
    tl.store(turned + there, pair.T, inside.T)


@torch.library.custom_op("nca::loss_and_grad", mutates_args=())
def loss_and_grad(
    z: Tensor,
    targets: Tensor,
    top: float,
    shift: float,
    width: float,
    copied: Tensor | None = None,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, V], N even -> (losses [N], grad [N, V], grad^T [V, N]), gradients / G8_SCALE in e5m2:
    what `grad_in_fp8` and `transposed` give, in one pass for the sums and one for the gradient.

    targets [N] int64; top, shift, width: `cap_constants`; copied [N] fp32 and rest: see
    `losses_and_grad`.
    """
    assert z.is_contiguous() and targets.is_contiguous(), (z.stride(), targets.stride())
    mixed = copied is not None
    for t in (copied, rest):
        assert t is None or (t.is_contiguous() and t.dtype == torch.float32), t
    n, v = z.shape
    assert n % 2 == 0, n
    losses, totals = (z.new_empty(n, dtype=torch.float32) for _ in range(2))
    shares = torch.empty_like(totals) if mixed else totals  # not mixed: read by nobody
    copied = copied if mixed else totals
    grad, turned = z.new_empty((n, v), dtype=E5M2), z.new_empty((v, n), dtype=E5M2)
    cap = (top, shift, width)
    block, warps = ROW_BLOCK
    rows_out = losses, totals, shares
    loss_rows[(n,)](z, targets, copied, rest, *rows_out, v, *cap, block, mixed, num_warps=warps)
    rows, columns, group, warps, registers = GRAD_TILE
    tiles = triton.cdiv(v, columns) * triton.cdiv(n, rows)
    outs = grad.view(torch.int8), turned.view(torch.int16), n // 2, v, *cap, 1 / G8_SCALE
    how, limits = (rows, columns, group, mixed), {"num_warps": warps, "maxnreg": registers}
    grad_tiles[(tiles,)](z, targets, totals, shares, rest, *outs, *how, **limits)
    return losses, grad, turned


@loss_and_grad.register_fake
def _(z, targets, top, shift, width, copied=None, rest=None):
    n, v = z.shape
    grads = z.new_empty((n, v), dtype=E5M2), z.new_empty((v, n), dtype=E5M2)
    return z.new_empty(n, dtype=torch.float32), *grads


@functools.cache
def probe_loss(device: torch.device, mixed: bool = False) -> str:
    """Of the kernels of the loss, with `copied` or without, over all classes and over candidates,
    against what they replace."""
    if not hopper(device):
        return NO_HOPPER
    gen = torch.Generator(device).manual_seed(0)
    z = 8 * torch.randn(256, 512, generator=gen, device=device, dtype=torch.bfloat16)
    copied = 4 * torch.randn(256, generator=gen, device=device) - 6 if mixed else None
    try:
        for known, rest in ((512, None), (400, torch.tensor([400.0, 2.0], device=device))):
            targets = torch.randint(-1, known, (256,), generator=gen, device=device)
            losses, grad, turned = loss_and_grad(z, targets, *cap_constants(30.0), copied, rest)
            want, exact = losses_and_grad(z, targets, 30.0, copied, rest)
            # torch compares no FP8 numbers, and a transpose has the same bytes.
            if not torch.equal(grad.view(torch.uint8).t(), turned.view(torch.uint8)):
                return "computes wrongly on this card: the gradient is not its own transpose's"
            wrong = verdict(errors_of((losses,), (want,)), 1e-4)
            wrong = wrong or verdict(errors_of((grad.float() * G8_SCALE,), (exact,)), 0.1)
            if wrong:
                return wrong
        return ""
    except Exception as e:
        return failure(e)


ROWS_AT_ONCE = 8, 4  # gradients of a row, warps


@jit
def signed_sum(grad, signs, tokens, places, i, mine, columns, D):
    """Of the gradients at [R] in `tokens`, where `mine`, each as its row has it: [columns] fp32."""
    token, sign = tl.load(tokens + i, mine, 0).to(tl.int64), tl.load(places + i, mine, 0)
    inside = mine[:, None] & (columns < D)[None, :]
    g = tl.load(grad + token[:, None] * D + columns[None, :], inside, 0.0)
    s = tl.load(signs + sign[:, None] * D + columns[None, :], inside, 0)
    return tl.sum(g.to(tl.float32) * s.to(tl.float32), 0)


@jit
def update_rows(
    table,
    second,
    seen,
    count,
    bad,
    factor,
    rows,
    tokens,
    places,
    signs,
    grad,
    rate,
    wd,
    cautious,
    BETA2: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SOME: tl.constexpr,
):
    """A program for each of the sorted `rows`: the first of a row's sums over them all and updates
    it. tokens, places: to whose gradient, by which row of signs, each is a share.

    Most rows are there once, so one gradient is taken alone; then SOME at a time, or the program of
    the commonest pair would wait for memory long after the others have ended.
    """
    i, end = tl.program_id(0), tl.num_programs(0)
    row = tl.load(rows + i)
    if (row != tl.load(rows + i - 1, i > 0, -1)) & (tl.load(bad) == 0):
        columns = tl.arange(0, WIDTH)
        here, now = table + row.to(tl.int64) * D + columns, tl.load(count)
        w = tl.load(here, columns < D, 0.0)
        square, missed = tl.load(second + row), now - tl.load(seen + row)
        one = i + tl.arange(0, 1)
        total = signed_sum(grad, signs, tokens, places, one, one < end, columns, D)
        i += 1
        more = tl.load(rows + i, i < end, -1) == row
        while more:
            at = i + tl.arange(0, SOME)
            mine = tl.load(rows + at, at < end, -1) == row
            total += signed_sum(grad, signs, tokens, places, at, mine, columns, D)
            i += SOME
            more = tl.sum(mine.to(tl.int32)) == SOME
        total *= tl.load(factor)
        square *= tl.exp2(missed * LOG_BETA2)
        square += tl.sum(total * total) * ((1 - BETA2) / D)
        root = tl.sqrt(square / (1 - tl.exp2(now * LOG_BETA2))) + EPS
        w = w.to(tl.float32) * (1 - rate * wd) - total * (rate / root)
        w = tl.where(w * total > 0, w * (1 - rate * rate * cautious), w)
        tl.store(here, w.to(table.dtype.element_ty), columns < D)
        tl.store(second + row, square)
        tl.store(seen + row, now)


def fused_row_update(
    table: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    places: Tensor,
    signs: Tensor,
    grad: Tensor,
    factor: Tensor,
    rate: float,
    bad: Tensor,
    group: Group,
) -> None:
    """`row_update` in one pass after a sort. Nothing waits for the device, and sums are in the
    order of the tokens: the same bits in every run."""
    for t in (table, *state, signs, grad):
        assert t.is_contiguous(), t.stride()
    rows, order = places[..., 0].flatten().sort(stable=True)
    sign, token = places[..., 1].flatten()[order], (order // 2).int()
    (some, warps), beta2, d = ROWS_AT_ONCE, group.betas[1], table.size(1)
    sizes = (beta2, math.log2(beta2), group.eps, d, triton.next_power_of_2(d), some)
    numbers = (float(rate), float(group.wd), float(group.cautious_wd))
    inputs = (bad.view(torch.uint8), factor, rows, token, sign, signs, grad)
    update_rows[(len(rows),)](table, *state, *inputs, *numbers, *sizes, num_warps=warps)


@functools.cache
def probe_rows(device: torch.device) -> str:
    """Of the update of an n-gram table's rows, against `row_update`."""
    if triton is None:
        return "no Triton here"
    gen = torch.Generator(device).manual_seed(0)
    kind = {"generator": gen, "device": device}
    n, rows, d = 600, 64, 96
    table = torch.randn(rows, d, **kind, dtype=torch.bfloat16)
    state = torch.rand(rows, **kind), torch.randint(3, (rows,), **kind, dtype=torch.int32)
    state += (torch.full((), 5, dtype=torch.int32, device=device),)
    where = torch.randint(rows, (n, 2), **kind) // torch.randint(1, 9, (n, 2), **kind)
    places = torch.stack([where, torch.randint(SIGN_ROWS, (n, 2), **kind)], dim=-1).int()
    grad = torch.randn(n, d, **kind, dtype=torch.bfloat16)
    rest = (random_signs(d).to(device), grad, torch.ones((), device=device), 0.1)
    rest += (torch.zeros((), dtype=torch.bool, device=device), Group("adam", 1.0, cautious_wd=0.5))
    try:
        results = []
        for update in (fused_row_update, row_update):
            got = table.clone(), *(t.clone() for t in state)
            update(got[0], got[1:], places, *rest)
            results.append(got)
        return verdict(errors_of(*results), 1e-3)
    except Exception as e:
        return failure(e)


@torch.library.custom_op("nca::document_bounds", mutates_args=())
def document_bounds(docs: Tensor, limits: Tensor) -> Tensor:
    """docs [B, T] -> int32 [N + 1]: where each row's documents start, then N to the end. A shape
    that holds as many documents as there are tokens: how many there are is no matter of a graph.

    limits: as in `Documents`; the device stops the process where the third is too small.
    """
    assert limits.device.type == "cpu" and limits.shape == (3,), "FlashAttention-4's limits"
    first = starts_of(docs).flatten()
    n = first.numel()
    at = torch.arange(n, dtype=torch.int32, device=docs.device)
    slot = torch.where(first, first.cumsum(0) - 1, n)
    bounds = at.new_full((n + 1,), n).scatter_(0, slot, torch.where(first, at, n))
    torch._assert_async(bounds[min(int(limits[2]), n)] == n, "more documents than limits say")
    return bounds


@document_bounds.register_fake
def _(docs, limits):
    return docs.new_empty((docs.numel() + 1,))


FA4_FEWEST = 128  # documents that its kernels are told of; above 256 they are other kernels
FA4_GRAPHED = 256  # in a CUDA graph, where more than it has room for need another graph
FA4_OLDEST = "4.0.0b36"  # tested here; before b10 its backward could read dO too early (PR 2481)


@functools.cache
def fa4_kernels() -> tuple[Callable, Callable]:
    """FlashAttention-4's own forward and backward, which compile themselves for what they first
    meet. Raises ImportError where the package is missing, too old or broken."""
    try:
        version = importlib.metadata.version("flash-attn-4")
        if torch.torch_version.TorchVersion(version) < FA4_OLDEST:
            raise ImportError(f"{version} is too old")
        interface = importlib.import_module("flash_attn.cute.interface")
        fit_narrow_heads(interface)
        return interface._flash_attn_fwd, interface._flash_attn_bwd
    except Exception as e:  # its own packages fail in their own ways
        raise ImportError(
            f"it needs the package flash-attn-4[cu13] {FA4_OLDEST} or newer ({failure(e)})"
        ) from None


def fit_narrow_heads(interface) -> None:
    """Another tile for the backward of queries and keys of 64 beside values of 128. The package
    looks at the first width alone, and its tile for 64 needs 242 KB of shared memory then, where a
    block has 227. That for 96 needs 145, and no more registers than at 96 / 96."""
    tile = getattr(interface, "_tile_size_bwd_sm90", None)
    if tile is not None:  # else it is another version, and the probe finds out what that can do

        @functools.wraps(tile)
        def fitting(dim: int, dim_v: int, *args, **kwargs):
            return tile(96 if dim <= 64 < dim_v else dim, dim_v, *args, **kwargs)

        interface._tile_size_bwd_sm90 = fitting


def documents_told(limits: Tensor) -> int:
    """By powers of two, so that few sizes of buffers come up: the rest are empty."""
    return max(FA4_FEWEST, 1 << (int(limits[2]) - 1).bit_length())


def fa4_arguments(bounds: Tensor, limits: Tensor, short: bool, cap: int) -> dict:
    """Its words for our mask. A window of w tokens, the query's own among them, is w - 1 to the
    left."""
    cut = bounds[: documents_told(limits) + 1]
    left = min(int(limits[int(short)]), cap) - 1
    spans = {"window_size_left": left, "window_size_right": 0, "causal": True}
    return {"cu_seqlens_q": cut, "cu_seqlens_k": cut, **spans}


@torch.library.custom_op("nca::fa4", mutates_args=())
def fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    limits: Tensor,
    short: bool,
    cap: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, Dv], bfloat16 -> (y [N, Hq, Dv], lse [Hq, N] fp32).

    bounds, limits, short: as in `Documents`; cap: on the window, tokens. Dv = 128, and so is D, or
    64 without grouped heads. Its backward adds dq, and dk and dv of grouped heads, in any order:
    equal runs differ in the last bits.
    """
    forward, _ = fa4_kernels()
    q, k, v = (t.detach() for t in (q, k, v))
    y = torch.empty((*q.shape[:2], v.size(2)), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.size(1), q.size(0)), dtype=torch.float32, device=q.device)
    spans = fa4_arguments(bounds, limits, short, cap)
    if q.size(2) < v.size(2):  # its tile for 64 fills all registers with S, P and y alone
        spans["tile_mn"] = (128, 128)
    forward(q, k, v, out=y, lse=lse, softmax_scale=scale, **spans)
    return y, lse


@fa4.register_fake
def _(q, k, v, bounds, limits, short, cap, scale):
    y = q.new_empty((*q.shape[:2], v.size(2)))
    return y, q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("nca::fa4_backward", mutates_args=())
def fa4_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    bounds: Tensor,
    limits: Tensor,
    short: bool,
    cap: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fa4` by q, k and v."""
    _, backward = fa4_kernels()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    spans = fa4_arguments(bounds, limits, short, cap)
    backward(q, k, v, y, dy, lse, softmax_scale=scale, dq=dq, dk=dk, dv=dv, **spans)
    return dq, dk, dv


@fa4_backward.register_fake
def _(dy, q, k, v, y, lse, bounds, limits, short, cap, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def fa4_save(ctx, inputs, output) -> None:
    q, k, v, bounds, limits, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, limits)


def fa4_gradients(ctx, dy: Tensor, _) -> tuple:
    return *fa4_backward(dy, *ctx.saved_tensors, *ctx.rest), *[None] * 5


fa4.register_autograd(fa4_gradients, setup_context=fa4_save)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: Documents, scale: float) -> Tensor:
    """`attend` by FlashAttention-4: a call for each cap, on the heads that have it. Where queries
    are narrower than values, each has keys and values of its own, as `fa4` wants them there."""
    n, parts = len(mask.caps), []
    each = q.size(2) // (n * k.size(2)) if q.size(3) < v.size(3) else 1
    if each > 1:
        k, v = (t.repeat_interleave(each, dim=2) for t in (k, v))
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    for i, cap in enumerate(mask.caps):
        part = q[:, :, i::n].flatten(0, 1)
        spans = (mask.bounds, mask.limits, mask.short, cap)
        parts.append(fa4(part, flat_k, flat_v, *spans, scale)[0])
    y = parts[0] if n == 1 else torch.stack(parts, dim=2).flatten(1, 2)
    return y.unflatten(0, q.shape[:2])


FA4_ERROR = 0.01  # rounding to bfloat16 makes 0.002 to 0.003 on any path
FA4_CASES = ((150, 37), (600, 333), (3, 333))  # tokens in a document, window: see `probe_fa4`


def fa4_shapes(model: nn.Module) -> tuple:
    """(query heads, KV heads, caps on the window, width of q and k) of a model's attention, each
    once."""
    arms = [module.arm for module in model.modules() if isinstance(module, Attention)]
    shapes = {(a.heads_q, a.heads_kv, (a.head_windows or (NO_LIMIT,))[:2], a.dim) for a in arms}
    return tuple(sorted(shapes))


def fa4_errors(shape: tuple, mean: int, window: int, device: torch.device) -> list[float]:
    """`errors_of` y, dq, dk, dv in bfloat16 against a dense mask in fp32."""
    heads_q, heads_kv, caps, dim = shape
    length, gen = 1024, torch.Generator().manual_seed(0)
    heads = ((heads_q, dim), (heads_kv, dim), (heads_kv, 128), (heads_q, 128))
    sizes = [(2, length, *head) for head in heads]
    *qkv, dy = (torch.randn(s, generator=gen).to(device, torch.bfloat16) for s in sizes)
    docs = (torch.rand(2, length, generator=gen) < 1 / mean).cumsum(1).int()
    limits = torch.cat([torch.tensor([window, 1], dtype=torch.int32), count_documents(docs)])
    docs = docs.to(device)
    spans = Documents(document_bounds(docs, limits), limits, False, caps)
    by_head = torch.tensor(caps).clamp(max=window).repeat(heads_q // len(caps)).to(device)
    results = []
    for mask, dtype in ((spans, torch.bfloat16), (dense_mask(docs, by_head), torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in qkv]
        y = attend(*leaves, Context(mask, {}, lambda dim: 15.36 / dim))
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))))
    return errors_of(*results)


@functools.cache
def probe_fa4(device: torch.device, shapes: tuple) -> str:
    """Of FlashAttention-4 for every shape that the arms have: two windows, one narrow enough for a
    token too many to show, with few documents and with many, which are other kernels."""
    if not hopper(device):
        return NO_HOPPER
    if not shapes:
        return "the model's attention is not train_gpt.py's"
    try:
        fa4_kernels()
        for shape, (mean, window) in itertools.product(shapes, FA4_CASES):
            wrong = verdict(fa4_errors(shape, mean, window, device), FA4_ERROR)
            if wrong:
                return f"{wrong} in y, dq, dk, dv ({shape[0]} heads on {shape[1]})"
        return ""
    except Exception as e:
        return failure(e)


if __name__ == "__main__":
    sys.exit(main())
