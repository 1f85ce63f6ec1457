"""What records/compare.py compares: arms with their controls, budgets, blocks, seeds; and whether
all of it can run, which is found out before anything does."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import train_gpt as T
from records import causality, worker


@dataclass(frozen=True)
class Job:
    """One run of a block."""

    block: int
    order: int  # place in the block, from 0
    arm: str
    fraction: int  # of the budget, percent
    tokens: int  # --tokens
    seed: int
    data_seed: int
    run_id: str


@dataclass(frozen=True)
class Comparison:
    """What a folder holds, the same in every sitting."""

    configs: dict[str, T.Config]  # by arm, in the order of block 1
    controls: dict[str, str]  # arm -> the control that stands beside it
    flags: tuple[str, ...]  # train_gpt.py's, the same for every arm
    budgets: dict[int, int]  # fraction in percent -> --tokens
    trained: dict[int, int]  # fraction in percent -> tokens of its schedule
    blocks: int
    seed0: int
    data_seed: int
    vary_data: bool
    gpus: int
    metric: str
    target: float | None  # a record's: its mean is to be at most this
    code: dict[str, Path]  # name in code/ -> the file that runs
    warm_together: int = 1  # of this sitting alone: arms that compile at the same time

    @property
    def arms(self) -> list[str]:
        return list(self.configs)

    @property
    def config(self) -> T.Config:
        """Any arm's: what is asked of it is the same for all."""
        return next(iter(self.configs.values()))

    @property
    def baseline(self) -> str | None:
        if len(self.arms) < 2:
            return None
        return "softmax" if "softmax" in self.arms else self.arms[0]

    def pairs(self) -> list[list[str]]:
        """[arm, what it is measured against]: its control, else the baseline."""
        others = [a for a in self.arms if a not in (self.baseline, *self.controls.values())]
        return [[a, self.controls.get(a, self.baseline)] for a in others if self.baseline]

    def seeds(self, block: int) -> tuple[int, int]:
        """(seed, data_seed) of a block."""
        return self.seed0 + block - 1, self.data_seed + (block if self.vary_data else 0)

    def run_id(self, block: int, arm: str, fraction: int) -> str:
        share = f"_f{fraction}" if len(self.budgets) > 1 else ""
        return f"b{block:02d}_{slug(arm)}{share}"

    def jobs(self, block: int) -> list[Job]:
        """The block's runs in order: arms of one fraction side by side, turned by one from block
        to block and from fraction to fraction."""
        found, seeds = [], self.seeds(block)
        for j, (fraction, tokens) in enumerate(self.budgets.items()):
            turn = (block - 1 + j) % len(self.arms)
            for arm in self.arms[turn:] + self.arms[:turn]:
                name = self.run_id(block, arm, fraction)
                found.append(Job(block, len(found), arm, fraction, tokens, *seeds, name))
        return found


def slug(arm: str) -> str:
    """An arm as a part of a file name: `a/b/mine.py:Class,key=1` -> `mine-Class,key=1`."""
    name, comma, keys = arm.partition(",")
    if ".py:" in name:
        path, _, cls = name.rpartition(":")
        name = f"{Path(path).stem}-{cls}"
    return re.sub(r"[^\w.,=+-]", "-", name + comma + keys)


def control_of(cfg: T.Config) -> str | None:
    """What `diff_v2,form=full` needs beside it: softmax that has the same number of matrix
    parameters in the same layers, by a wider MLP, and is selective where full is; None for arms
    that need nothing.

    full has one matrix of queries more, n_head heads x d_model, and an MLP two of d_model x width:
    so the width grows by half of those heads, from 3,072 to 3,456 at 6 x 128.
    """
    m = cfg.model
    name, *keys = m.arm.split(",")
    if name != "diff_v2" or m.form != "full":
        return None
    if m.mlp_layers:
        raise T.InputError(f"arm {m.arm}: form=full with mlp_layers has no control of its size")
    width = (m.mlp or 4 * m.d_model) + m.n_head * (m.qk_dim or m.head_dim) // 2
    kind, places = ("selective", "layers") if m.selective else ("softmax", "mlp_layers")
    where = [f"{places}={T.format_value(m.layers)}"] if m.layers else []
    own = ("form", "layers", "mlp", "lambda_bias", "window2", "selective")
    shared = [key for key in keys if key.partition("=")[0] not in own]
    return ",".join([kind, f"mlp={width}", *where, *shared])


def configure(arms: list[str], flags: list[str], gpus: int) -> dict[str, T.Config]:
    """Each arm's Config; one InputError that names everything wrong."""
    make_hooks = worker.hooks_of(flags[flags.index("--preset") + 1])
    configs, problems = {}, []
    for arm in arms:
        try:
            cfg = configs[arm] = T.parse_args([*flags, "--arm", arm])
            problems += T.check_config(cfg, gpus)
            if make_hooks is not None:
                make_hooks(cfg)
        except T.InputError as e:
            problems.append(str(e))
    if problems:
        raise T.InputError("; ".join(dict.fromkeys(problems)))
    return configs


def with_controls(
    configs: dict[str, T.Config], flags: list[str], gpus: int
) -> tuple[dict[str, T.Config], dict[str, str]]:
    """The configs with missing controls at the end, and {arm: its control}."""

    def computes(cfg: T.Config) -> tuple:
        model = dataclasses.replace(cfg.model, arm=T.parse_arm(cfg.model.arm)[0])
        return model, cfg.optim, cfg.schedule, cfg.run

    configs, controls = dict(configs), {}
    for arm, cfg in list(configs.items()):
        control = control_of(cfg)
        if control is None:
            continue
        (new,) = configure([control], flags, gpus).values()
        same = [a for a, c in configs.items() if computes(c) == computes(new)]
        controls[arm] = same[0] if same else control
        if not same:
            configs[control] = new
            print(f"{control} joins every block: the control of {arm}, of as many parameters")
    return configs, controls


def budgets_of(cfg: T.Config, corpus: T.Corpus, fractions: list[int]) -> dict[int, int]:
    """Fraction in percent -> tokens to train; refuses more than the text has."""
    s, have = cfg.schedule, corpus.tokens("train") * cfg.schedule.passes
    full = s.tokens or min(s.most_tokens, have)
    budgets = {f: full * f // 100 for f in fractions}
    if max(budgets.values()) > have:
        raise T.InputError(
            f"{max(fractions)} % of {full:,} tokens is more than the {have:,} that {s.passes} "
            f"pass(es) over the text have: --tokens {have * 100 // max(fractions)} at most"
        )
    return budgets


def schedule_tokens(cfg: T.Config, budgets: dict[int, int]) -> dict[int, int]:
    """Fraction -> tokens that its schedule trains, in whole steps."""
    trained = {}
    for fraction, tokens in budgets.items():
        steps = T.plan_steps(cfg, tokens)
        trained[fraction] = steps[-1].end if steps else 0
    if len(set(trained.values()) - {0}) < len(budgets):
        raise T.InputError(f"too few tokens for schedules of {list(budgets)} %: they are {trained}")
    return trained


def code_of(arms: list[str], preset: str) -> dict[str, Path]:
    """Name in code/ -> each file whose digest a run's header has; a variant keeps its folder."""
    code = {"train_gpt.py": Path(T.__file__)}
    if worker.hooks_of(preset) is not None:
        code[f"variants/{preset}.py"] = T.HERE / "variants" / f"{preset}.py"
    for arm in arms:
        name, _ = T.parse_arm(arm)
        if ".py:" not in name:
            continue
        path = Path(name.rpartition(":")[0])
        if not path.is_file():
            raise T.InputError(f"arm {name!r}: there is no file {str(path)!r}")
        if code.setdefault(path.name, path).resolve() != path.resolve():
            raise T.InputError(f"{code[path.name]} and {path}: give one of them another file name")
    return code


def make_comparison(args: argparse.Namespace, flags: list[str]) -> Comparison:
    """Everything that can be found wrong without training is found here, with InputError."""
    for name, ok in (
        ("--blocks 1 or more", args.blocks >= 1),
        ("--gpus 1 or more", args.gpus >= 1),
        ("--warm-together 1 or more", args.warm_together >= 1),
        ("--seed0 and --data-seed 0 or more", min(args.seed0, args.data_seed) >= 0),
        ("--fractions: percent, each once, 1 to 1000", all(0 < f <= 1000 for f in args.fractions)),
        ("--fractions names one twice", len(set(args.fractions)) == len(args.fractions)),
        ("an arm is named twice", len(set(args.arms)) == len(args.arms)),
        ("--target is a record's, which has a --plan", args.target is None or args.plan),
        (
            "--plan compares: name two arms, or a record's --target",
            not args.plan or len(args.arms) > 1 or args.target is not None,
        ),
        ("--plan NAME: letters, digits, . and -", re.fullmatch(r"[\w.-]*", args.plan)),
    ):
        if not ok:
            raise T.InputError(name)
    configs, controls = with_controls(configure(args.arms, flags, args.gpus), flags, args.gpus)
    cfg = next(iter(configs.values()))
    here = torch.cuda.device_count()
    if cfg.run.wanted_device == "cuda" and here < args.gpus:
        raise T.InputError(f"{args.gpus} NVIDIA GPU(s) wanted, {here} here: --preset demo has none")
    corpus = T.Corpus.open(cfg.data.data, cfg.data.dev)
    budgets = budgets_of(cfg, corpus, args.fractions)
    names = [slug(arm) for arm in configs]
    if len(set(names)) < len(names):
        raise T.InputError(f"arms that would share a folder name: {', '.join(sorted(names))}")
    opens_val = cfg.run.final_val and corpus.splits.get("val")
    return Comparison(
        configs={a: c.with_(vocab=c.model.vocab or corpus.vocab) for a, c in configs.items()},
        controls=controls,
        flags=tuple(flags),
        budgets=budgets,
        trained=schedule_tokens(cfg, budgets),
        **{k: getattr(args, k) for k in ("blocks", "seed0", "data_seed", "vary_data", "gpus")},
        warm_together=args.warm_together,
        target=args.target,
        metric="val_loss_ext" if opens_val else "dev_loss",
        code=code_of(list(configs), args.preset),
    )


def check_causality(comparison: Comparison) -> None:
    """Refuses an arm in which anything moves before its cause, before any clock starts."""
    plain = T.make_config(comparison.config.preset).model
    base = T.parse_args(list(comparison.flags)).model
    changed = {k: v for k, v in vars(base).items() if v != getattr(plain, k)}
    overrides = {k: v for k, v in changed.items() if k not in ("arm", "d_model", "vocab")}
    make_hooks = worker.hooks_of(comparison.config.preset)
    for arm, cfg in comparison.configs.items():
        make = make_hooks(cfg).model if make_hooks else None
        try:
            causality.check_causal(arm, overrides, cfg.preset, make)
        except T.InputError:
            raise
        except causality.NotCausal as e:
            raise T.InputError(f"{arm} is not causal and is not run: {e}") from None
        except causality.NoPower as e:
            raise T.InputError(f"{arm}: nobody can say that it is causal: {e}") from None
        except Exception as e:  # a user's code
            raise T.InputError(f"{arm} does not run: {type(e).__name__}: {e}") from e
    print(f"causal in everything: {', '.join(comparison.arms)}")
