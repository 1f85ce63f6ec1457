"""Files what evals/real_runs.py found: tables, plots, figures and the training logs, made from its
results folders alone.

    python -m evals.real_table RESULTS [RESULTS ...] --out records/evals/DATE_NAME --title TEXT

A results folder is a sitting. Arms are compared within one sitting and one pretraining seed only,
each with the first arm of the recipe, paired item by item; where several seeds were trained, their
differences are pooled. Sittings with other recipes or other code go into tables of their own. A
difference is called noise unless every interval that there is leaves 0 out, and is said to rest on
tuning seeds alone where none is over items. Without scipy or matplotlib there is no table:
./run.sh records has both.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from evals import bits, real_runs, score_table
from evals.real_runs import STAGES, TUNED, Checkpoint
from evals.score_table import grid
from records import plots, stats

ENOUGH = 3  # pretraining seeds an arm, below which nothing is said of architectures
NUMBERS = {1: "One", 2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}
CHANCE = {"csqa_cloze": 20.0, "csqa_head": 20.0}
DOMAIN = "F1 "  # figures of one of CoQA's sources begin so
SEEDS_ALONE = "clear over seeds alone"


# ---- What is there ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """All arms of one sitting and one pretraining seed: {arm: {stage: what its file holds}}.
    base: the recipe's first arm, which the others are compared with; it may be missing."""

    number: int  # of the sitting, from 1 on
    sitting: str
    seed: int
    base: str
    arms: dict[str, dict[str, dict]]

    @property
    def title(self) -> str:
        return f"sitting {self.number}, pretraining seed {self.seed}"

    def results(self, stage: str) -> dict[str, dict]:
        """{arm: result} of those that have it."""
        return {arm: s[stage]["result"] for arm, s in self.arms.items() if stage in s}


@dataclass(frozen=True)
class Sitting:
    folder: Path
    number: int
    said: dict  # sitting.json
    blocks: list[Block]


def load(folders: Sequence[Path]) -> list[Sitting]:
    """InputError where a folder is no sitting, has no trained arm, or is there twice, and where
    sittings are not alike."""
    out = []
    for number, folder in enumerate(folders, 1):
        said = real_runs.read(folder / "sitting.json")
        if said["sitting"] in [s.said["sitting"] for s in out]:
            raise T.InputError(f"{folder} is the sitting of another of these folders")
        blocks = [block_of(folder, number, said, seed) for seed in said["recipe"]["seeds"]]
        blocks = [block for block in blocks if block.arms]
        if not blocks:
            raise T.InputError(f"{folder} has no arm that was trained to the end")
        out.append(Sitting(folder, number, said, blocks))
        refuse_other_recipe(out[0], out[-1])
    refuse_other_code(out)
    return out


def refuse_other_recipe(first: Sitting, other: Sitting) -> None:
    """InputError where they differ in anything but pretraining seeds."""
    a, b = (s.said["recipe"] for s in (first, other))
    differ = [k for k in dict.fromkeys((*a, *b)) if k != "seeds" and a.get(k) != b.get(k)]
    if differ:
        said = "; ".join(f"{k} {a.get(k)!r} and {b.get(k)!r}" for k in differ)
        raise T.InputError(f"{first.folder} and {other.folder} have other recipes: {said}")


def refuse_other_code(sittings: list[Sitting]) -> None:
    """InputError where a stage was not done by the same code for all arms and seeds."""
    first: dict[str, tuple[str, str]] = {}
    for block in (b for s in sittings for b in s.blocks):
        for arm, files in block.arms.items():
            for stage, file in files.items():
                here = f"{arm} of {block.title}"
                code, where = first.setdefault(stage, (file["code_sha256"], here))
                if file["code_sha256"] != code:
                    said = f"stage {stage} of {here} ran on other code than that of {where}"
                    raise T.InputError(said)


def block_of(folder: Path, number: int, said: dict, seed: int) -> Block:
    arms = {}
    for arm in said["recipe"]["arms"]:
        place = folder / Checkpoint(arm, seed).name
        files = {name: place / f"{name}.json" for name in STAGES}
        found = {name: real_runs.read(path) for name, path in files.items() if path.is_file()}
        if "train" not in found:
            continue
        whose = found["train"]["checkpoint"]
        for name, file in found.items():
            if file["checkpoint"] != whose:
                raise T.InputError(f"{files[name]} is of another checkpoint than train.json")
        arms[arm] = found
    return Block(number, said["sitting"], seed, said["recipe"]["arms"][0], arms)


def others(base: str, arms: Iterable[str]) -> list[str]:
    """What can be compared with `base`: all other arms, none where it is not there itself."""
    arms = list(arms)
    return [arm for arm in arms if arm != base] if base in arms else []


# ---- Differences --------------------------------------------------------------------------------


def grouped_difference(ids: Sequence, a: Sequence[float], b: Sequence[float]) -> bits.Difference:
    """Mean of b - a over items; the interval resamples groups of items that belong together (the
    turns of a story), as bits.difference does items."""
    d = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    _, group = np.unique(np.asarray(ids), return_inverse=True)
    count = np.bincount(group)
    if len(count) == len(d):
        return bits.difference(a, b)
    if len(count) < bits.FEWEST:
        return bits.Difference(float(d.mean()), None, None, len(d))
    total, rng = np.bincount(group, weights=d), np.random.default_rng(0)
    means = []
    for _ in range(bits.RESAMPLES):
        some = rng.integers(0, len(count), len(count))
        means.append(total[some].sum() / count[some].sum())
    low, high = np.quantile(means, [(1 - bits.LEVEL) / 2, (1 + bits.LEVEL) / 2])
    return bits.Difference(float(d.mean()), float(low), float(high), len(d))


def holds_zero(low: float | None, high: float | None) -> bool:
    return low is None or high is None or low <= 0 <= high


def interval(value: float, low: float | None, high: float | None, digits: int = 2) -> str:
    if low is None or high is None:
        return f"{value:+.{digits}f} (no interval)"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


# ---- Tables: checkpoints ------------------------------------------------------------------------


def checkpoints(sittings: list[Sitting]) -> list[dict]:
    """One row for each trained arm: what it is, and how well it predicts dev."""
    out = []
    for block in (b for s in sittings for b in s.blocks):
        for arm, files in block.arms.items():
            whose, run = files["train"]["checkpoint"], files["train"]["result"]
            env = run["env"]
            row = {"sitting": block.number, **whose, "tokens": run["tokens"], **run["losses"]}
            row |= {name: run[name] for name in ("train_s", "compile_s", "peak_alloc", "params")}
            row |= {"machine": f"{env['count']}x {env['gpu'] or 'CPU'}", "torch": env["torch"]}
            out.append(row | {"arm": arm, "log_h": run["log_h"]})
    return out


def checkpoint_table(rows: list[dict]) -> str:
    head = ["arm", "seed", "sitting", "tokens", "dev loss", "bits/byte", "train s", "GB"]
    head += ["active M", "stored M"]
    lines = [
        [
            *(row["arm"], str(row["seed"]), str(row["sitting"]), f"{row['tokens']:,}"),
            f"{row['dev_loss']:.4f}",
            "-" if row["dev_bpb"] is None else f"{row['dev_bpb']:.4f}",
            f"{row['train_s']:.1f}",
            "-" if row["peak_alloc"] is None else f"{row['peak_alloc'] / 1e9:.1f}",
            *(f"{row['params'][name] / 1e6:.1f}" for name in ("active_matmul", "stored")),
            f"`{row['parameters_sha256'][:12]}`",
        ]
        for row in rows
    ]
    return grid([*head, "parameters"], lines)


def stages_of(block: Block) -> list[dict]:
    """How long each stage's process took: it shared its device with others but for training."""
    return [
        {"stage": name, **{arm: files[name]["seconds"] for arm, files in block.arms.items()}}
        for name in STAGES
        if all(name in files for files in block.arms.values())
    ]


def stage_table(block: Block, rows: list[dict]) -> str:
    lines = [
        [row["stage"], STAGES[row["stage"]].does, *(f"{row[arm]:.0f}" for arm in block.arms)]
        for row in rows
    ]
    return grid(["stage", "", *(f"{arm}, s" for arm in block.arms)], lines)


def tuned_checkpoints(block: Block) -> list[dict]:
    out = []
    for stage in TUNED:
        for arm, result in block.results(stage).items():
            for form in result["results"]:
                for seed in form["seeds"]:
                    best = next(k for k in seed["looks"] if k["step"] == seed["best_step"])
                    out.append(
                        {
                            **{"sitting": block.number, "arm": arm, "pretraining_seed": block.seed},
                            **{"form": form["task"], "seed": seed["seed"], "held_out": best},
                            **{"best_step": seed["best_step"], "steps": seed["steps"]},
                            "parameters_sha256": seed["parameters_sha256"],
                        }
                    )
    return out


def tuned_table(rows: list[dict]) -> str:
    head = ["tuned", "arm", "seed", "kept at step", "held-out loss on answers", "parameters"]
    lines = [
        [
            *(row["form"], row["arm"], str(row["seed"]), f"{row['best_step']} of {row['steps']}"),
            *(f"{row['held_out']['nats']:.4f}", f"`{row['parameters_sha256'][:12]}`"),
        ]
        for row in rows
    ]
    return grid(head, lines)


# ---- Tables: the Evaluation Harness -------------------------------------------------------------


def harness_models(block: Block) -> list[dict]:
    """The arms' answers before tuning, as score_table.py takes them."""
    out = []
    zero, five = block.results("zero"), block.results("five")
    for arm in block.arms:
        parts = [found[arm] for found in (zero, five) if arm in found]
        parts = [part for part in parts if part["results"]]  # none where --tasks left nothing
        if parts:
            digest = block.arms[arm]["train"]["checkpoint"]["parameters_sha256"][:12]
            model = {**parts[0]["model"], "path": f"seed {block.seed}, parameters {digest}"}
            results = [result for part in parts for result in part["results"]]
            out.append({"name": arm, "model": model, "results": results})
    return out


def parts_rows(block: Block) -> list[dict]:
    """What a difference in bits a byte consists of, where there are options: how expected any of
    them is, and how expected the right one is among them. Two prompts' forms differ in the first,
    what is known in the second."""
    models = harness_models(block)
    if not models or models[0]["name"] != block.base:
        return []
    by_arm = [
        {(r["task"], r["shots"], r["bos"]): r for r in model["results"] if has_options(r)}
        for model in models
    ]
    out = []
    for model, found in zip(models[1:], by_arm[1:]):
        for setting, result in found.items():
            first = by_arm[0].get(setting)
            if first is None or first["keys"] != result["keys"]:
                continue
            a, b = (
                bits.parts(r["log_likelihoods"], r["right"], r["bytes"]) for r in (first, result)
            )
            row = dict(zip(("task", "shots", "bos"), setting)) | {"arm": model["name"]}
            for name, x, y in zip(("any", "right"), a, b):
                d = bits.difference(x, y)
                row[name] = {**asdict(d), "noise": d.noise}
            out.append(row)
    return out


def has_options(result: dict) -> bool:
    return len(result.get("log_likelihoods", [[]])[0]) > 1


def parts_table(base: str, rows: list[dict]) -> str:
    lines = []
    for row in rows:
        task = row["task"] if row["bos"] else f"{row['task']}, bare"
        found = [
            bits.Difference(*(row[part][k] for k in ("value", "low", "high", "n")))
            for part in ("any", "right")
        ]
        line = [f"{task}, {row['shots']}-shot", f"{row['arm']} - {base}"]
        lines.append(line + [score_table.shift(d, score_table.BITS) for d in found])
    head = ["task", "arms", "any of the options [95 %]", "the right one, given the options [95 %]"]
    return grid(head, lines)


# ---- Tables: fine-tuning ------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """One figure of one form, percent: for each arm {before, mean, sd, n}; and where the first arm
    of the recipe is there, the others against it: over items (seeds averaged), and over tuning
    seeds, paired."""

    form: str
    figure: str
    arms: dict[str, dict]
    differences: dict[str, dict]


def tuned_rows(block: Block) -> list[Tuned]:
    out = []
    for stage in TUNED:
        by_arm = block.results(stage)
        forms = dict.fromkeys(f["task"] for r in by_arm.values() for f in r["results"])
        for form in forms:
            found = {
                arm: next(f for f in result["results"] if f["task"] == form)
                for arm, result in by_arm.items()
            }
            names = next(iter(found.values()))["after"]
            out += [
                tuned_row(block.base, form, name, found)
                for name in names
                if not name.startswith(DOMAIN)
            ]
    return out


def tuned_row(base: str, form: str, figure: str, found: dict[str, dict]) -> Tuned:
    arms = {
        arm: {"before": (f["before"] or {}).get(figure), **f["after"][figure]}
        for arm, f in found.items()
    }
    differences = {
        other: tuned_difference(figure, found[base], found[other]) for other in others(base, found)
    }
    return Tuned(form, figure, arms, differences)


def tuned_difference(figure: str, first: dict, other: dict) -> dict:
    """Percent points, other - first."""
    by_seed = [{s["seed"]: s for s in found["seeds"]} for found in (first, other)]
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    each = [by_seed[1][s]["figures"][figure] - by_seed[0][s]["figures"][figure] for s in seeds]
    over_seeds, items = stats.mean_interval(each), None
    if figure in by_seed[0][seeds[0]]["items"]:
        ids = [by_seed[i][s]["items"]["ids"] for i in (0, 1) for s in seeds]
        if any(some != ids[0] for some in ids):
            raise T.InputError(f"{figure}: the arms were not scored on the same items")
        a, b = (np.mean([by[s]["items"][figure] for s in seeds], axis=0) * 100 for by in by_seed)
        items = grouped_difference(ids[0], a, b)
    noise = holds_zero(over_seeds.low, over_seeds.high)
    noise |= items is not None and items.noise
    return {
        "value": statistics.fmean(each),
        "seeds": [over_seeds.low, over_seeds.high],
        "items": None if items is None else [items.low, items.high],
        "noise": noise,
    }


def tuning_table(base: str, rows: list[Tuned]) -> str:
    arms = list(dict.fromkeys(arm for row in rows for arm in row.arms))
    compared = others(base, arms)
    head = ["tuned", "figure", "chance"]
    head += [f"{arm}, {when}" for arm in arms for when in ("before", "after")]
    head += [
        f"{other} - {base} {what}"
        for other in compared
        for what in ("over seeds", "over items", "is")
    ]
    lines = []
    for row in rows:
        chance = CHANCE.get(row.form)
        line = [row.form, row.figure, "-" if chance is None else f"{chance:.0f}"]
        for arm in arms:
            one = row.arms.get(arm)
            before = None if one is None else one["before"]
            line.append("-" if before is None else f"{before:.2f}")
            sd = "" if one is None or one["sd"] is None else f" ± {one['sd']:.2f}"
            line.append("-" if one is None else f"{one['mean']:.2f}{sd}")
        for other in compared:
            d = row.differences.get(other)
            line += ["-", "-", "-"] if d is None else difference_cells(d)
        lines.append(line)
    return grid(head, lines)


def difference_cells(d: dict) -> list[str]:
    items = "-" if d["items"] is None else interval(d["value"], *d["items"])
    return [interval(d["value"], *d["seeds"]), items, called(d)]


def called(d: dict) -> str:
    """What a difference of `tuned_difference` may be called."""
    return "noise" if d["noise"] else SEEDS_ALONE if d["items"] is None else "clear"


def domains_of(block: Block) -> list[dict]:
    """F1 by CoQA's domain: for each arm before, mean and sd over tuning seeds, percent."""
    out = []
    for arm, result in block.results("coqa").items():
        for form in result["results"]:
            before = form["before"] or {}
            out += [
                {"arm": arm, "domain": name[len(DOMAIN) :], "before": before.get(name), **after}
                for name, after in form["after"].items()
                if name.startswith(DOMAIN)
            ]
    return out


def domain_table(rows: list[dict]) -> str:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["domain"], row["arm"]): row for row in rows}
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        line = [domain]
        for arm in arms:
            row = cells.get((domain, arm))
            before, sd = row and row["before"], row and row["sd"]
            line.append("-" if before is None else f"{before:.2f}")
            spread = "" if sd is None else f" ± {sd:.2f}"
            line.append("-" if row is None else f"{row['mean']:.2f}{spread}")
        lines.append(line)
    head = [f"{arm}, {when}" for arm in arms for when in ("before", "after")]
    return grid(["CoQA's domain, F1", *head], lines)


# ---- Tables: the Evaluation Harness after tuning ------------------------------------------------


def answers_after(result: dict) -> dict[tuple, dict[int, dict]]:
    """{(task, bos): {tuning seed: its answers}} of a stage that asked what was tuned."""
    out: dict[tuple, dict[int, dict]] = {}
    for seed in result["seeds"]:
        for found in seed["results"]:
            out.setdefault((found["task"], found["bos"]), {})[seed["seed"]] = found
    return out


def after_rows(block: Block) -> list[dict]:
    """What tuning changed, by arm: a measure of a task before, after (mean over tuning seeds), and
    the change, paired item by item."""
    out = []
    zero = block.results("zero")
    for tuned in TUNED:
        for arm, result in block.results(f"{tuned}_after").items():
            before = {(r["task"], r["bos"]): r for r in zero.get(arm, {"results": []})["results"]}
            for setting, found in answers_after(result).items():
                out += change_rows(tuned, arm, before.get(setting), [*found.values()])
    return out


def after_differences(block: Block) -> list[dict]:
    """What other arms do better or worse than the recipe's first one after tuning, where the items
    are the same: as `tuned_difference`, over the tuning seeds that both have."""
    out = []
    for tuned in TUNED:
        by_arm = {a: answers_after(r) for a, r in block.results(f"{tuned}_after").items()}
        for other in others(block.base, by_arm):
            for setting, found in by_arm[other].items():
                first = by_arm[block.base].get(setting, {})
                seeds = [seed for seed in found if seed in first]
                pairs = [(first[seed], found[seed]) for seed in seeds]
                if not pairs or any(a["keys"] != b["keys"] for a, b in pairs):
                    continue
                where = {"tuned": tuned, "arm": other, "task": setting[0], "bos": setting[1]}
                for measure in found[seeds[0]]["values"]:
                    if measure != "perplexity":
                        d = after_difference(measure, pairs)
                        out.append({**where, "measure": measure, "n": len(pairs), **d})
    return out


def after_difference(measure: str, pairs: list[tuple[dict, dict]]) -> dict:
    """`pairs`: both arms' answers, a pair for each tuning seed. A measure's own unit."""
    each = [statistics.fmean(b["values"][measure]) for _, b in pairs]
    each = [y - statistics.fmean(a["values"][measure]) for y, (a, _) in zip(each, pairs)]
    seeds = stats.mean_interval(each)
    a, b = (np.mean([pair[i]["values"][measure] for pair in pairs], axis=0) for i in (0, 1))
    items = bits.difference(a, b)
    noise = items.noise or (len(each) > 1 and holds_zero(seeds.low, seeds.high))
    return {
        **{"value": items.value, "seeds": [seeds.low, seeds.high]},
        **{"items": [items.low, items.high], "noise": noise},
    }


def after_differences_table(base: str, rows: list[dict]) -> str:
    lines = []
    for row in rows:
        raw = row["measure"] == score_table.BITS
        factor, digits = (1, 4) if raw else (100, 2)
        over_seeds, over_items = (
            interval(row["value"] * factor, *(v and v * factor for v in row[what]), digits)
            for what in ("seeds", "items")
        )
        task = row["task"] if row["bos"] else f"{row['task']}, bare"
        lines.append(
            [
                *(row["tuned"], f"{row['arm']} - {base}", task, row["measure"], str(row["n"])),
                *(over_seeds if row["n"] > 1 else "-", over_items),
                "noise" if row["noise"] else "clear",
            ]
        )
    head = ["tuned on", "arms", "task", "measure", "seeds", "over seeds", "over items", "is"]
    return grid(head, lines)


def change_rows(tuned: str, arm: str, before: dict | None, after: list[dict]) -> Iterator[dict]:
    for measure in dict.fromkeys((*after[0]["values"], *after[0]["metrics"])):
        values = [score_table.mean_of(one, measure).value for one in after]
        start = score_table.mean_of(before, measure)
        change, comparable = None, before is not None and measure != "perplexity"
        if comparable and measure in before["values"] and before["keys"] == after[0]["keys"]:
            mean = np.mean([one["values"][measure] for one in after], axis=0)
            change = bits.difference(before["values"][measure], mean)
        yield {
            **{"tuned": tuned, "arm": arm, "task": after[0]["task"], "bos": after[0]["bos"]},
            **{"measure": measure, "before": None if start is None else start.value},
            **{"after": statistics.fmean(values), "n": len(values)},
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "change": change and {**asdict(change), "noise": change.noise},
        }


def after_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        measure, change = row["measure"], row["change"]
        task = row["task"] if row["bos"] else f"{row['task']}, bare"
        before, after = (
            "-" if v is None else score_table.number(v, e, measure)
            for v, e in ((row["before"], None), (row["after"], row["sd"]))
        )
        d = None
        if change is not None:
            d = bits.Difference(*(change[k] for k in ("value", "low", "high", "n")))
        text = score_table.shift(d, measure)
        lines.append([row["tuned"], row["arm"], task, measure, before, after, str(row["n"]), text])
    head = ["tuned on", "arm", "task", "measure", "before", "after", "seeds", "change [95 %]"]
    return grid(head, lines)


# ---- Tables: over pretraining seeds -------------------------------------------------------------


def pooled(sittings: list[Sitting]) -> list[dict]:
    """Differences of the arms, pretraining seed by pretraining seed, with the interval over them:
    dev loss, bits a byte, and what was tuned. A seed that was trained in two sittings counts once,
    as the first has it."""
    each: dict[tuple[str, str], dict[int, float]] = {}
    for block in (b for s in sittings for b in s.blocks):
        for other, name, value in differences_of(block):
            each.setdefault((other, name), {}).setdefault(block.seed, value)
    out = []
    for (other, name), by_seed in each.items():
        if len(by_seed) > 1:
            found = stats.mean_interval([*by_seed.values()])
            row = {"arm": other, "figure": name, "each": by_seed, **asdict(found)}
            out.append(row | {"noise": holds_zero(found.low, found.high)})
    return out


def differences_of(block: Block) -> Iterator[tuple[str, str, float]]:
    """(arm, what, its difference from the recipe's first arm), as far as that one is there."""
    for other in others(block.base, block.arms):
        a, b = (block.arms[arm]["train"]["checkpoint"]["dev_loss"] for arm in (block.base, other))
        yield other, "dev loss, nats a token", b - a
    models = harness_models(block)
    if models and models[0]["name"] == block.base:
        for row in score_table.rows_of(models):
            for model, d in zip(models[1:], row.differences):
                if d is not None and row.measure == score_table.BITS:
                    yield model["name"], f"{row.label}, {row.shots}-shot, bits a byte", d.value
    for row in tuned_rows(block):
        for other, d in row.differences.items():
            yield other, f"{row.form} {row.figure}, points", d["value"]


def pooled_table(rows: list[dict]) -> str:
    lines = [
        [
            *(row["figure"], row["arm"], str(len(row["each"]))),
            interval(row["value"], row["low"], row["high"], 4),
            "noise" if row["noise"] else "clear",
        ]
        for row in rows
    ]
    return grid(["figure", "arm, against the first", "seeds", "difference [95 %]", ""], lines)


def verdict(sittings: list[Sitting]) -> str:
    """What the tables may be taken to say."""
    seeds: dict[str, set] = {}
    count = 0
    for block in (b for s in sittings for b in s.blocks):
        for arm in block.arms:
            seeds.setdefault(arm, set()).add(block.seed)
            count += 1
    fewest = min(map(len, seeds.values()))
    if fewest >= ENOUGH:
        return f"{fewest} pretraining seeds an arm or more: differences are pooled over them below."
    if count == 1:
        return "**One checkpoint**: it says nothing of what another arm or seed would give."
    number, arms = (NUMBERS.get(n, str(n)) for n in (count, len(seeds)))
    return (
        f"**{number} checkpoints, not {arms.lower()} architectures.** The unit of a claim about an "
        f"architecture is the pretraining seed, of which there are {fewest} an arm: intervals over "
        "items and over tuning seeds say nothing of another one."
    )


# ---- In short -----------------------------------------------------------------------------------


def in_short(
    block: Block, asked: list[score_table.Row], parts: list[dict], tuned: list[Tuned]
) -> list[str]:
    """A sentence a kind of figure for each arm against the first: what differs, and which way.
    `asked`, `parts`, `tuned`: the block's rows before tuning, their parts, and of tuning."""
    out, names = [], [model["name"] for model in harness_models(block)]
    for other in others(block.base, block.arms):
        a, b = (block.arms[arm]["train"]["checkpoint"]["dev_loss"] for arm in (block.base, other))
        pair = f"{other} - {block.base}"
        out.append(f"{pair}, dev loss: {b - a:+.4f} nats a token; one run each, so no interval.")
        there = other in names and names[0] == block.base
        column = names.index(other) - 1 if there else 0
        rows = [row for row in asked if row.differences[column]] if there else []
        for title, lead in (("bits a byte", True), ("scores, points", False)):
            found = {
                f"{r.label}{'' if lead else ' ' + r.measure} {r.shots}-shot": r.differences[column]
                for r in rows
                if (r.measure == score_table.BITS) == lead
            }
            factor, digits = (1, 3) if lead else (100, 2)
            shown = {k: (d.value * factor, d.noise) for k, d in found.items()}
            out += sentence(f"{pair} before tuning, {title}", shown, digits)
        choice = {
            f"{row['task']} {row['shots']}-shot": (row["right"]["value"], row["right"]["noise"])
            for row in parts
            if row["arm"] == other
        }
        out += sentence(f"{pair} before tuning, bits a byte given the options", choice, 3)
        pairs = {
            f"{row.form} {row.figure}": row.differences[other]
            for row in tuned
            if other in row.differences
        }
        both = {k: (d["value"], d["noise"]) for k, d in pairs.items() if d["items"]}
        out += sentence(f"{pair} fine-tuned, points", both, 2)
    return out


def sentence(about: str, found: dict[str, tuple[float, bool]], digits: int) -> list[str]:
    """`found`: {name: (value, noise)}. One sentence, or none where nothing was found."""
    if not found:
        return []
    clear = [f"{name} {v:+.{digits}f}" for name, (v, noise) in found.items() if not noise]
    said = f"{about}: {len(clear)} of {len(found)} clear of noise over items"
    return [f"{said}{': ' * bool(clear)}{'; '.join(clear)}."]


# ---- Plots --------------------------------------------------------------------------------------


def draw_bits(block: Block, out: Path) -> bool:
    """Differences of bits a byte, task by task; False where there are none."""
    models = harness_models(block)
    rows = (
        [r for r in score_table.rows_of(models) if r.measure == score_table.BITS] if models else []
    )
    rows = [row for row in rows if any(row.differences)]
    if not rows:
        return False
    names = tuple(model["name"] for model in models)
    with plots.style(plots.LIGHT):
        figure, (axis,) = plots.new_figure(1, 1.4 + 0.32 * len(rows) * max(1, len(names) - 1))
        for i, name in enumerate(names[1:]):
            colour, marker = plots.styles_of(names)[name]
            for y, row in enumerate(rows):
                d = row.differences[i]
                if d is None:
                    continue
                at, filled = y + 0.25 * i, "none" if d.noise else colour
                if d.low is not None:
                    axis.plot([d.low, d.high], [at, at], color=colour)
                label = f"{plots.short(name)} (hollow: noise)" if y == 0 else None
                style = {"markerfacecolor": filled, "markeredgewidth": 1.0, "linestyle": "none"}
                axis.plot(d.value, at, marker, color=colour, label=label, **style)
        axis.axvline(0, color=plots.LIGHT.muted, linewidth=0.8)
        axis.set_yticks(range(len(rows)), [f"{row.label}, {row.shots}-shot" for row in rows])
        axis.set_ylim(len(rows) - 0.3, -1.4)  # room for the legend above the first task
        title = f"Bits a byte of the right answer, minus those of {plots.short(names[0])}"
        plots.say(axis, title, f"95 % over items; left is better ({block.title})", "")
        axis.legend(frameon=False, loc="upper left")
        plots.save(figure, out)
    return True


def draw_looks(block: Block, out: Path) -> bool:
    """Learning curves of tuning: the loss on answers held out, a line a seed, a mark where it was
    kept."""
    by_form: dict[str, dict[str, list[dict]]] = {}
    for stage in TUNED:
        for arm, result in block.results(stage).items():
            for form in result["results"]:
                by_form.setdefault(form["task"], {})[arm] = form["seeds"]
    if not by_form:
        return False
    arms = tuple(block.arms)
    with plots.style(plots.LIGHT):
        figure, axes = plots.new_figure(len(by_form))
        for axis, (form, found) in zip(axes, by_form.items()):
            for arm, seeds in found.items():
                colour, marker = plots.styles_of(arms)[arm]
                for i, seed in enumerate(seeds):
                    x, y = ([look[k] for look in seed["looks"]] for k in ("step", "nats"))
                    label = plots.short(arm) if i == 0 else None
                    axis.plot(x, y, color=colour, linewidth=1.0, label=label)
                    kept = x.index(seed["best_step"])
                    axis.plot(x[kept], y[kept], marker, color=colour)
            by = block.results("coqa" if form == "coqa" else "csqa")
            chosen = next(f for r in by.values() for f in r["results"] if f["task"] == form)
            kept = {"nats": "loss"}.get(chosen["chosen_by"], chosen["chosen_by"])
            title = f"{form}: each tuning seed; marks: kept, by held-out {kept} ({block.title})"
            plots.say(axis, title, "step", "nats, answers held out")
            axis.legend(frameon=False)
        plots.save(figure, out)
    return True


def draw_tuning(block: Block, out: Path) -> bool:
    """The main figure of each form before and after, every tuning seed a dot."""
    rows = {row.form: row for row in reversed(tuned_rows(block))}  # the first figure of each
    rows = dict(reversed(rows.items()))
    if not rows:
        return False
    arms = tuple(block.arms)
    with plots.style(plots.LIGHT):
        figure, axes = plots.new_figure(len(rows))
        for axis, (form, row) in zip(axes, rows.items()):
            stage = "coqa" if form == "coqa" else "csqa"
            for x, arm in enumerate(row.arms):
                colour, marker = plots.styles_of(arms)[arm]
                found = block.results(stage)[arm]["results"]
                seeds = next(f for f in found if f["task"] == form)["seeds"]
                y = [seed["figures"][row.figure] for seed in seeds]
                axis.plot(np.full(len(y), x + 0.1), y, marker, color=colour)
                if row.arms[arm]["before"] is not None:
                    hollow = {"markerfacecolor": "none", "markeredgewidth": 1.0}
                    axis.plot(x - 0.1, row.arms[arm]["before"], marker, color=colour, **hollow)
            if form in CHANCE:
                axis.axhline(CHANCE[form], color=plots.LIGHT.muted, linestyle=":", linewidth=0.8)
            axis.set_xticks(range(len(row.arms)), [plots.short(arm) for arm in row.arms])
            axis.set_xlim(-0.5, len(row.arms) - 0.5)
            title = f"{form}: hollow before tuning, dots each tuning seed ({block.title})"
            plots.say(axis, title, "", f"{row.figure}, percent")
        plots.save(figure, out)
    return True


# ---- The folder ---------------------------------------------------------------------------------


PARTS = (
    "What these differences in bits a byte consist of: how expected any of the options is, which "
    "is a matter of the prompt's form, and how expected the right one is among them, which is what "
    "scores are about. The two columns add up to the difference above."
)
AFTER_TUNING = (
    "`seeds`: of tuning. `csqa`: its cloze form, in which the model learns to write an option's "
    "text; the harness's commonsense_qa lists the options and asks for a letter, which was not "
    "taught. The choice head writes no text."
)


def how_noise_is_called() -> str:
    return (
        "± is one standard deviation over tuning seeds, or a standard error over items where only "
        "one model answers. Intervals hold 95 %: over items by resampling them (stories, for "
        "CoQA), over tuning seeds by Student's t, paired by seed. `noise`: one of them holds 0, or "
        f"there is none; `{SEEDS_ALONE}`: there is none over items. No correction is made for how "
        "many figures are looked at."
    )


def block_text(block: Block, out: Path) -> tuple[str, dict]:
    """A block's part of README.md, and the same for programs; writes its plots."""
    text, said = f"\n## S{block.title[1:]}\n", {"sitting": block.number, "seed": block.seed}
    models, parts, tuned = harness_models(block), parts_rows(block), tuned_rows(block)
    rows = score_table.rows_of(models) if models else []
    said["in_short"] = in_short(block, rows, parts, tuned)
    text += "".join(f"\n- {line}" for line in said["in_short"]) + "\n"
    stem = f"s{block.number}_seed{block.seed}"
    if models:
        text += f"\n### Evaluation Harness\n\n{score_table.render(models, rows)}"
        said["harness"], said["parts"] = score_table.figures(models, rows), parts
        if parts:
            text += f"\n{PARTS}\n\n{parts_table(block.base, parts)}"
        if draw_bits(block, out / f"{stem}_bits"):
            text += f"\n![Bits a byte, task by task]({stem}_bits.svg)\n"
    if tuned:
        about = {
            form["task"]: form["about"]
            for stage in TUNED
            for result in block.results(stage).values()
            for form in result["results"]
        }
        text += f"\n### Fine-tuning, percent\n\n{tuning_table(block.base, tuned)}\n"
        for form, facts in about.items():
            text += f"- {form}: trained on {facts['trained_on']}, scored on {facts['scored_on']}.\n"
        said["tuning"], said["domains"] = [asdict(row) for row in tuned], domains_of(block)
        if said["domains"]:
            text += f"\n{domain_table(said['domains'])}"
        said["tuned_checkpoints"] = tuned_checkpoints(block)
        if draw_tuning(block, out / f"{stem}_tuning"):
            text += f"\n![Before and after tuning]({stem}_tuning.svg)\n"
        if draw_looks(block, out / f"{stem}_looks"):
            text += f"\n![Learning curves]({stem}_looks.svg)\n"
        text += f"\nWhat was kept:\n\n{tuned_table(said['tuned_checkpoints'])}"
    after = after_rows(block)
    if after:
        text += f"\n### Evaluation Harness, after fine-tuning\n\n{after_table(after)}"
        text += f"\n{AFTER_TUNING}\n"
        said["after"], said["after_differences"] = after, after_differences(block)
        if said["after_differences"]:
            text += "\nBoth after tuning:\n\n"
            text += after_differences_table(block.base, said["after_differences"])
    said["stages"] = stages_of(block)
    if said["stages"]:
        text += f"\n### Seconds of each process\n\n{stage_table(block, said['stages'])}"
        text += (
            "\nStart and compilation included; but for `train` beside others on the same card.\n"
        )
    return text, said


def file_logs(sitting: Sitting, out: Path) -> None:
    for log in sorted(sitting.folder.glob("*/run.jsonl")):
        there = out / "logs" / f"s{sitting.number}_{log.parent.name}"
        there.mkdir(parents=True)
        shutil.copy(log, there / log.name)


def files_of(sitting: Sitting) -> dict[str, str]:
    """sha256 of every file that the tables are made of."""
    paths = sorted(sitting.folder.glob("*/*.json"))
    return {str(path.relative_to(sitting.folder)): T.sha256(path) for path in paths}


def missing(sitting: Sitting) -> list[str]:
    said = sitting.said["recipe"]
    names = [Checkpoint(arm, seed).name for seed in said["seeds"] for arm in said["arms"]]
    return [
        f"{n}/{s}"
        for n in names
        for s in STAGES
        if not (sitting.folder / n / f"{s}.json").is_file()
    ]


def sitting_text(sitting: Sitting) -> str:
    recipe = sitting.said["recipe"]
    words = [f"preset {recipe['preset']}", f"at most {recipe['tokens']:,} tokens an arm"]
    words += [f"tuning seeds {', '.join(map(str, recipe['tune_seeds']))}"]
    if recipe["trainer"]:
        words.append(f"`{' '.join(recipe['trainer'])}`")
    began, left = sitting.said["sitting"].split()[0], missing(sitting)
    text = f"- Sitting {sitting.number}, begun {began}: {', '.join(words)}."
    if left:
        text += f" Not done: {', '.join(left)}."
    return f"{text}\n{machine_text(sitting)}"


def machine_text(sitting: Sitting) -> str:
    """Machine, software and code; what the exports were."""
    rows, git, exported = checkpoints([sitting]), sitting.said["git"], {}
    machines = dict.fromkeys(f"{row['machine']}, torch {row['torch']}" for row in rows)
    text = f"- Each arm on {'; '.join(machines)}"
    models = [model["model"] for block in sitting.blocks for model in harness_models(block)]
    if models:
        text += "".join(f", {name} {models[0][name]}" for name in ("transformers", "lm_eval"))
    text += f"; commit {git['commit'][:7]}{', changed' * git['dirty']}.\n" if git else ".\n"
    for block in sitting.blocks:
        for arm, done in block.results("export").items():
            exported[f"{arm}_s{block.seed}"] = done
    if exported:
        said = [f"{name} {x['difference']:g} ({x['architecture']})" for name, x in exported.items()]
        text += "- Largest difference of an export's logits from the trainer's, both in float32: "
        text += f"{'; '.join(said)}.\n"
    return text


def command(recipe: dict) -> str:
    """That does the same again, but for the places of data and models."""
    words = ["python", "-m", "evals.real_runs", "--data", "TOKENS", "--task-data", "EVALS"]
    words += ["--tasks-dir", "EVALS/lm_eval_tasks", "--tokenizer", "gpt2.tiktoken"]
    words += ["--results", "RESULTS", "--work", "WORK", "--arms", *recipe["arms"]]
    for name in ("seeds", "tune_seeds"):
        words += [f"--{name.replace('_', '-')}", *map(str, recipe[name])]
    words += ["--preset", recipe["preset"], "--tokens", str(recipe["tokens"])]
    for name in ("epochs", "limit"):
        words += [f"--{name}", str(recipe[name])] if recipe[name] else []
    words += ["--tasks", *recipe["tasks"]] if recipe["tasks"] else []
    return shlex.join(words + (["--", *recipe["trainer"]] if recipe["trainer"] else []))


def file(folders: Sequence[Path], out: Path, title: str, items: bool) -> Path:
    """Writes the folder `out`: README.md, results.json, plots, logs/ and, if asked for,
    items.json.xz with everything that was answered. InputError before anything is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise T.InputError(f"--out {out} is there already: name a folder that is empty or new")
    sittings = load(folders)
    out.mkdir(parents=True, exist_ok=True)
    rows = checkpoints(sittings)
    made = "<!-- Made by evals/real_table.py from the results of evals/real_runs.py. -->"
    text = f"# {title}\n\n{made}\n\n{verdict(sittings)}\n"
    if any(s.said["recipe"]["limit"] or s.said["recipe"]["tasks"] for s in sittings):
        text += "\n**A trial: only some items or tasks were asked; these are no scores.**\n"
    text += f"\n{checkpoint_table(rows)}\n"
    text += "".join(map(sitting_text, sittings))
    text += (
        "- Arms of a row are of one sitting. dev loss: nats a token, on text never trained on.\n"
    )
    text += f"- {how_noise_is_called()}\n"
    again = dict.fromkeys(command(s.said["recipe"]) for s in sittings)
    text += "\nThe same again:\n\n```sh\n" + "".join(f"{words}\n" for words in again) + "```\n"
    said = {"schema": real_runs.SCHEMA, "checkpoints": rows, "blocks": []}
    said["sittings"] = [{**s.said, "files": files_of(s)} for s in sittings]
    across = pooled(sittings)
    if across:
        text += f"\n## Over pretraining seeds\n\n{pooled_table(across)}"
        said["pooled"] = across
    for block in (b for s in sittings for b in s.blocks):
        more, found = block_text(block, out)
        text += more
        said["blocks"].append(found)
    for sitting in sittings:
        file_logs(sitting, out)
    (out / "README.md").write_text(text)
    (out / "results.json").write_text(json.dumps(said, indent=1) + "\n")
    if items:
        answers = {str(b.number): {str(b.seed): b.arms} for s in sittings for b in s.blocks}
        with lzma.open(out / "items.json.xz", "wt") as f:
            json.dump(answers, f, separators=(",", ":"))
    return out


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="real_table", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS", help="folders of evals/real_runs.py")
    add("--out", required=True, type=Path, metavar="DIR", help="records/evals/DATE_NAME")
    add("--title", default="Trained, asked, fine-tuned, asked again", help="of README.md")
    add("--items", action="store_true", help="file every item's answer, too (items.json.xz)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """2 for bad input, with one sentence."""
    args = parse(argv)
    try:
        print(f"{file(args.results, args.out, args.title, args.items)}: README.md, results.json")
    except T.InputError as e:
        print(f"real_table: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
