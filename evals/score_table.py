"""Several models' scores side by side: a table for people, and the same figures for programs.

A model here is what evals/harness.py writes for it: {"name", "model": facts, "results": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import train_gpt as T
from evals import bits

BITS = "bits_a_byte"
RAW = (BITS, "perplexity")  # not shown in per cent
SHOTS = {0: "Zero-shot", 1: "1-shot"}
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())


# ---- Figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measure of one task, over models: means has one entry for each, differences one for each
    but the first, which they are from. None: not measured, or not on the same items."""

    task: str
    shots: int
    bos: bool
    measure: str
    items: int
    of: int
    chance: float | None
    published: list[float] | None  # value and its standard error
    means: list[bits.Mean | None]
    differences: list[bits.Difference | None]

    @property
    def label(self) -> str:
        return self.task if self.bos else f"{self.task}, bare"


def rows_of(models: list[dict]) -> list[Row]:
    """By shots; bits a byte first, then the harness's own measures; tasks in their order.
    InputError where models were not asked the same."""
    by_setting: dict[tuple, list[dict | None]] = {}
    for i, model in enumerate(models):
        for result in model["results"]:
            setting = result["task"], result["shots"], result["bos"]
            by_setting.setdefault(setting, [None] * len(models))[i] = result
    for (task, shots, _), found in by_setting.items():
        if len({tuple(result["keys"]) for result in found if result}) > 1:
            raise T.InputError(
                f"{task}, {shots}-shot: the models were not asked the same items in the same "
                "words: evaluate them with the same tasks and the same --limit"
            )
    rows = []
    for (task, shots, bos), found in by_setting.items():
        like_published = shots == PUBLISHED["shots"] and not (
            bos and (task, 0, False) in by_setting
        )
        published = PUBLISHED["figures"].get(task, {}) if like_published else {}
        rows += rows_of_task(found, published)
    return sorted(rows, key=lambda row: (row.shots, row.measure != BITS))


def rows_of_task(found: list[dict | None], published: dict) -> Iterator[Row]:
    """`found`: a task's results of each model. `published`: its figures by measure."""
    some = next(result for result in found if result)
    measures = [m for result in found if result for m in (*result["values"], *result["metrics"])]
    for measure in dict.fromkeys(measures):
        first, *rest = found
        yield Row(
            task=some["task"],
            shots=some["shots"],
            bos=some["bos"],
            measure=measure,
            items=some["items"],
            of=some["of"],
            chance=some.get("chance") if measure in ("acc", "acc_norm") else None,
            published=published.get(measure),
            means=[mean_of(result, measure) for result in found],
            differences=[difference_of(first, result, measure) for result in rest],
        )


def mean_of(result: dict | None, measure: str) -> bits.Mean | None:
    """The harness's figure, or the mean over items, with the standard error over items."""
    if result is None:
        return None
    value, values = result["metrics"].get(measure), result["values"].get(measure)
    if values is None:
        return None if value is None else bits.Mean(value, None, result["items"])
    mean = bits.mean(values)
    error = mean.error
    if measure == "perplexity" and error is not None:  # of log-likelihoods, to first order
        error *= value
    return bits.Mean(mean.value if value is None else value, error, mean.n)


def difference_of(first: dict | None, other: dict | None, measure: str) -> bits.Difference | None:
    """other - first, where both have it item by item. Perplexity is no mean over items; bits a byte
    say the same."""
    if first is None or other is None or measure == "perplexity":
        return None
    if measure not in first["values"] or measure not in other["values"]:
        return None
    return bits.difference(first["values"][measure], other["values"][measure])


# ---- Text ---------------------------------------------------------------------------------------


def grid(head: Sequence[str], lines: list[list[str]]) -> str:
    """A Markdown table, aligned to be read as it is; numbers stand on the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    right = [
        bool(lines) and all(line[i][:1] in "0123456789-+" for line in lines)
        for i in range(len(head))
    ]
    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)]

    def row(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)]
        return f"| {' | '.join(padded)} |\n"

    return row(head) + row(rule) + "".join(map(row, lines))


def number(value: float, error: float | None, measure: str) -> str:
    factor, digits = (1, 4 if measure == BITS else 2) if measure in RAW else (100, 2)
    text = f"{value * factor:.{digits}f}"
    return text if error is None else f"{text} ± {error * factor:.{digits}f}"


def shift(d: bits.Difference | None, measure: str) -> str:
    """A difference with its interval; `noise` where that holds 0."""
    if d is None:
        return "-"
    factor, digits = (1, 4) if measure == BITS else (100, 2)
    value = f"{d.value * factor:+.{digits}f}"
    if d.low is None:
        return f"{value} too few items"
    interval = f"[{d.low * factor:+.{digits}f}, {d.high * factor:+.{digits}f}]"
    return f"{value} {interval}{' noise' * d.noise}"


def section(rows: list[Row], names: list[str]) -> str:
    """A table of rows that share their shots: of bits a byte, or of all other measures."""
    lead = rows[0].measure == BITS
    before = ["task", "items"] if lead else ["task", "measure", "chance", PUBLISHED["name"]]
    lines = []
    for row in rows:
        known = "-" if row.published is None else number(*row.published, row.measure)
        chance = "-" if row.chance is None else number(row.chance, None, row.measure)
        lines.append(
            [
                row.label,
                *([f"{row.items:,}"] if lead else [row.measure, chance, known]),
                *("-" if m is None else number(m.value, m.error, row.measure) for m in row.means),
                *(shift(d, row.measure) for d in row.differences),
            ]
        )
    return grid([*before, *names, *(f"{name} - {names[0]} [95 %]" for name in names[1:])], lines)


def legend(model: dict) -> str:
    """One line on what a column is."""
    facts, run = model["model"], model["model"].get("run")
    said = [facts["path"]]
    if run:
        said.append(f"arm {run['arm']}, seed {run['seed']}")
        said.append(f"step {run['step']:,} of {run['steps']:,}, {run['tokens']:,} tokens")
    said.append(f"{facts['parameters']:,} parameters in {facts['dtype']}")
    said.append(f"{facts['max_length']:,} tokens shown, weights {facts['weights_sha256'][:12]}")
    return f"- {model['name']}: {', '.join(said)}\n"


def notes(models: list[dict], rows: list[Row]) -> Iterator[str]:
    """What a reader must know to read the table right."""
    results = [(model["name"], result) for model in models for result in model["results"]]
    few = dict.fromkeys(
        f"{row.task} {row.items:,} of {row.of:,}" for row in rows if row.items < row.of
    )
    if few:
        yield f"NOT the tasks' scores: --limit took the first items alone ({', '.join(few)})."
    yield "Errors are standard errors over items; chance is one over the number of options."
    constant = {r["task"]: r["constant"] for _, r in results if r.get("constant")}
    for task, share in constant.items():
        yield f"{task}: the same answer to every item would score {100 * share:.2f}."
    yield (
        "Every prompt stands behind <|endoftext|>, as every training document did, for all models "
        "alike (add_bos_token=True); `bare`: without."
    )
    cut = [f"{name} {r['task']} {r['shots']}-shot {r['cut']:,}" for name, r in results if r["cut"]]
    if cut:
        yield f"Items with a prompt cut on the left to fit: {', '.join(cut)}."
    if any(row.published for row in rows):
        yield (
            f"{PUBLISHED['name']}: {PUBLISHED['about']}. {PUBLISHED['missing']}. "
            f"Source: {PUBLISHED['source']}."
        )
    if len(models) > 1:
        yield from notes_on_differences(len(models), rows)


def notes_on_differences(models: int, rows: list[Row]) -> Iterator[str]:
    intervals = [d for row in rows for d in row.differences if d and d.low is not None]
    if intervals:
        clear = sum(not d.noise for d in intervals)
        yield (
            f"Differences are paired, item by item; intervals are percentiles of "
            f"{bits.RESAMPLES:,} resamples of the items; `noise`: the interval holds 0. Of "
            f"{len(intervals)} intervals {clear} do not; were nothing but noise there, about "
            f"{len(intervals) * (1 - bits.LEVEL):.1f} would not."
        )
    number = {2: "two"}.get(models, str(models))
    yield (
        f"{number.capitalize()} checkpoints, not {number} architectures: another training seed is "
        "in no interval here, and a claim about an architecture takes 3 seeds an arm or more."
    )


def render(models: list[dict], rows: list[Row]) -> str:
    """The table as Markdown; `rows` of `rows_of`."""
    names = [model["name"] for model in models]
    out = "".join(map(legend, models))
    for shots in dict.fromkeys(row.shots for row in rows):
        title = SHOTS.get(shots, f"{shots}-shot")
        here = [row for row in rows if row.shots == shots]
        for heading, some in (
            (
                "bits a byte of the right answer; fewer are better",
                [r for r in here if r.measure == BITS],
            ),
            ("scores, per cent; perplexity as it is", [r for r in here if r.measure != BITS]),
        ):
            if some:
                out += f"\n{title}: {heading}\n\n{section(some, names)}"
    return out + "\n" + "".join(f"- {note}\n" for note in notes(models, rows))


def figures(models: list[dict], rows: list[Row]) -> dict:
    """The same for programs: models without their items, and every row of the table."""
    kept = [{"name": model["name"], **model["model"]} for model in models]
    table = [{**asdict(row), "noise": [d and d.noise for d in row.differences]} for row in rows]
    return {
        "models": kept,
        "rows": table,
        "published": PUBLISHED,
        "notes": [*notes(models, rows)],
    }
