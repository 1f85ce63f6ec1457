"""What the logs make as text: records/README.md, and the figures on README.md's first screen."""

from __future__ import annotations

import json
import re
from pathlib import Path

from records.board import Board, full_schedule, of_record, shown
from records.verify import Filed

FIGURES = re.compile(r"(<!-- figures:begin\b.*?-->\n)(.*?)(<!-- figures:end -->)", re.DOTALL)
NOTHING = """\
**No GPU result is filed yet**, so there is no figure of speed or quality here, nor a claim about
which attention is better."""
ONLY_SINGLE_RUNS = """
One run of each arm, so far: this says nothing about which attention is better, and no record is
filed yet."""
MADE = "<!-- Made by `./run.sh records` from the filed logs: edit those, not this. -->"
HEAD = """\
Timed runs to a validation loss, and matched comparisons of attention. What counts, and what
`./run.sh records --check` verifies: [RULES.md](RULES.md). What was tried, and mostly failed:
[LAB_LOG.md](LAB_LOG.md). Losses are nats a token; seconds are those of training; brackets hold 95 %
intervals, and ± is one standard deviation between runs."""
FOOT = """
Differences are nats a token at equal tokens, negative where the arm is better. A screen has few
blocks: it shows what to test, and decides nothing."""
MAY_COST = """
An arm also wins at equal time where it takes less extra time than "may cost" says; the intervals
of that leave out the error of the slope that it takes."""
LONGEST = """
The longest runs so far:
"""

Row = dict[str, str]  # column -> cell; a column whose name ends in `:` holds numbers


# ---- Cells --------------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[str]:
    """Markdown; numbers to the right."""
    names = list(rows[0])
    lines = [[name.removesuffix(":") for name in names]]
    lines.append(["---:" if name.endswith(":") else "---" for name in names])
    lines += [[row[name] for name in names] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale if scale != 1.0 else value, form)


def with_sd(value: float | None, sd: float | None, form: str) -> str:
    return number(value, form) + ("" if sd is None else f" ± {sd:{form}}")


def with_interval(estimate: dict | None, form: str, scale: float = 1.0) -> str:
    """`-0.0031 [-0.0052, -0.0010]`."""
    if estimate is None or estimate["value"] is None:
        return ""
    value, low, high = (number(estimate[k], form, scale) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if low else value


def millions(tokens: int | None, form: str = ",.1f") -> str:
    return "" if tokens is None else f"{tokens / 1e6:{form}}M"


def place(filed: Filed) -> str:
    return f"{filed.path.parent.name}/{filed.path.name}/"


def link(filed: Filed, below: str = "") -> str:
    return f"[{filed.claim['title']}]({below}{place(filed)})"


def plots(filed: Filed) -> str:
    """Links to a folder's pictures."""
    there = sorted(filed.path.glob("*.svg"))
    return ", ".join(f"[{p.stem}]({place(filed)}{p.name})" for p in there)


def kind(filed: Filed) -> str:
    """The claim's kind; of a plan that lacks runs, how far it is."""
    said = filed.figures
    if said["stage"] == "interim":
        return f"*interim*: {said['blocks']} of {said['plan']['blocks']} blocks"
    return filed.claim["kind"]


def setting(filed: Filed) -> str:
    """The preset by its present name, and what the claim's "setting" says that comparisons under it
    do not share. What is r28 was called speedrun until 2026-11-28."""
    preset = filed.figures["preset"]
    if preset == "speedrun" and not filed.runs[0].header["config"].get("copy"):
        preset = "r28"
    return ", ".join(filter(None, [preset, filed.claim.get("setting")]))


def p_value(filed: Filed, arm: str, against: str | None = None) -> str:
    """Of the plan's test: of a pair, or of a record's arm."""
    for d in filed.figures["decision"] or ():
        if d["arm"] == arm and against in (None, d["against"]):
            return "none" if d["p"] is None else f"{d['p']:.2g}"
    return ""


def seconds(arm: dict) -> str:
    return with_sd(arm["train_s"]["mean"], arm["train_s"]["sd"], ".1f")


def loss(arm: dict) -> str:
    return with_sd(arm["loss"]["value"], arm["sd"]["value"], ".4f")


# ---- records/README.md --------------------------------------------------------------------------


def history(board: Board, track: str) -> list[str]:
    """The track's records, oldest first."""
    rows = [
        {
            "date": f.claim["date"],
            "record": link(f),
            "arm": f"`{f.arm}`",
            "n:": str(of_record(f)["n"]),
            "loss:": loss(of_record(f)),
            "p:": p_value(f, f.arm),
            "seconds:": seconds(of_record(f)),
            "tokens/s:": number(of_record(f)["tokens_per_s"], ",.0f"),
            "machine": ", ".join(f.figures["machines"]),
            "by": ", ".join(f.claim["by"]),
            "plots": plots(f),
        }
        for f in board.held(track)
    ]
    return table(rows) if rows else ["No record is filed yet."]


def pairs(filed: Filed) -> list[dict]:
    """Figures of the pairs of arms that have blocks in common."""
    return [pair for pair in full_schedule(filed)["pairs"] if pair["n"]]


def what(filed: Filed) -> Row:
    """The first columns of a folder's rows."""
    return {
        "date": filed.claim["date"],
        "folder": link(filed),
        "kind": kind(filed),
        "preset": setting(filed),
    }


def comparisons(board: Board, track: str) -> list[str]:
    """A row for every pair of arms that ran in blocks, newest first."""
    rows = [
        {
            **what(f),
            "tokens:": millions(full_schedule(f)["tokens"]),
            "arm": f"`{pair['arm']}`",
            "against": f"`{pair['against']}`",
            "blocks:": str(pair["n"]),
            "loss": f"`{f.figures['metric']}`",
            "difference:": with_interval(pair["difference"], "+.4f"),
            "time, ratio:": with_interval(pair["time_ratio"], ".3f"),
            "p:": p_value(f, pair["arm"], pair["against"]),
            "plots": "" if i else plots(f),
        }
        for f in filter(shown, reversed(board.filed[track]))
        for i, pair in enumerate(pairs(f))
    ]
    return ["### Comparisons", "", *table(rows), ""] if rows else []


def single_arms(board: Board, track: str) -> list[str]:
    """Folders of one arm that are no record: what a baseline gives, and how much it varies."""
    rows = [
        {
            **what(f),
            "arm": f"`{arm}`",
            "tokens:": millions(full_schedule(f)["tokens"]),
            "n:": str(a["n"]),
            "loss:": f"`{f.figures['metric']}` {number(a['loss']['value'], '.4f')}",
            "sd:": with_interval(a["sd"], ".5f"),
            "seconds:": seconds(a),
            "tokens/s:": number(a["tokens_per_s"], ",.0f"),
            "plots": plots(f),
        }
        for f in filter(shown, reversed(board.filed[track]))
        for arm, a in full_schedule(f)["arms"].items()
        if f.claim["kind"] != "record" and not full_schedule(f)["pairs"]
    ]
    return ["### One arm", "", *table(rows), ""] if rows else []


def without_runs(board: Board, track: str) -> list[str]:
    """Notes, with runs or without, and plans whose first run is to come."""
    rows = [
        f"- {f.claim['date']}: {link(f)}, {'planned' if f.plan else f.claim['kind']}"
        for f in board.filed[track]
        if not f.runs or f.claim["kind"] == "note"
    ]
    return [*rows, ""] if rows else []


def section(board: Board, track: str) -> list[str]:
    rules, best, looks = board.tracks[track], board.current(track), board.val_looks(track)
    lines = [f"## {track}", "", f"{rules['about']}."]
    if rules["target"] is not None:
        goal = f"`{rules['metric']}` <= {rules['target']} on {rules['machine']}"
        lines.append(f"Target: {goal}. It is {rules['target_from']}.")
    if rules["data_document"]:
        lines.append(f"The text: [{rules['data_document']}]({rules['data_document']}).")
    lines.append(f"Filed runs of this track have opened val {looks:,} time{'s' * (looks != 1)}.")
    if best is not None:
        mean = of_record(best)["train_s"]["mean"]
        lines += ["", f"**Current record: {mean:.1f} s**, {link(best)}.", ""]
        there = sorted(best.path.glob("*.svg"))
        lines += [f"![{p.stem.replace('_', ' ')}]({place(best)}{p.name})" for p in there]
    if rules["target"] is not None:
        lines += ["", "### Records", "", *history(board, track)]
    parts = (comparisons, single_arms, without_runs)
    return [*lines, "", *(line for part in parts for line in part(board, track))]


def elsewhere(records: Path) -> list[str]:
    """What others have published, kept apart."""
    said = json.loads((records / "elsewhere.json").read_text(encoding="utf-8"))
    rows = [
        {
            "record": r["record"],
            "date": r["date"],
            "what": r["what"],
            "minutes:": number(r["minutes"], ".4g"),
            "log, s:": number(r["log_s"], ".1f"),
            "steps:": number(r["steps"], ",d"),
            "tokens:": millions(r["tokens"], ",.0f"),
            "hardware": r["hardware"],
            "read from": r["source"],
        }
        for r in said["rows"]
    ]
    title = f"**{said['title']}** ({said['read_from']}). {said['note']}"
    return ["## Elsewhere: published by others, not measured here", "", title, "", *table(rows)]


EVALS = """\
Checkpoints asked by the Evaluation Harness, fine-tuned, and asked again, by `evals/real_runs.py`.
They are no runs of a track: below 3 pretraining seeds an arm, checkpoints and not architectures."""


def evaluations(records: Path) -> list[str]:
    """Folders that evals/real_table.py made; no line where there is none."""
    rows = []
    for path in sorted((records / "evals").glob("*/results.json"), reverse=True):
        trained = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        seeds: dict[str, set[int]] = {}
        for one in trained:
            seeds.setdefault(one["arm"], set()).add(one["seed"])
        title = path.with_name("README.md").read_text(encoding="utf-8").partition("\n")[0]
        date, _, name = path.parent.name.partition("_")
        rows.append(
            {
                "date": date,
                "folder": f"[{title.removeprefix('# ') or name}](evals/{path.parent.name}/)",
                "arms": ", ".join(f"`{arm}`" for arm in seeds),
                "seeds an arm:": str(min(map(len, seeds.values()))),
                "tokens an arm:": millions(max(one["tokens"] for one in trained)),
            }
        )
    return ["## Evaluations", "", EVALS, "", *table(rows)] if rows else []


def readme(board: Board) -> str:
    """The text of records/README.md."""
    lines = ["# Records", "", MADE, "", HEAD]
    for track in board.tracks:
        lines += ["", *section(board, track)]
    lines += ["", *evaluations(board.records)]
    text = "\n".join([*lines, "", *elsewhere(board.records)]) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


# ---- The figures of README.md -------------------------------------------------------------------


def headlines(board: Board) -> list[str]:
    """Each track's current record."""
    lines = []
    for track in board.tracks:
        best = board.current(track)
        if best is not None:
            said, machines = of_record(best), ", ".join(best.figures["machines"])
            goal = f"`{best.track['metric']}` {loss(said)} (target {best.track['target']})"
            lines.append(
                f"**{track}: {seconds(said)} s** to {goal}, n = {said['n']}, {machines}: "
                f"{link(best, 'records/')}.\n"
            )
    return lines


def on_gpu(filed: Filed) -> bool:
    return shown(filed) and filed.figures["machines"] != ["CPU"]


def front_pairs(board: Board) -> list[tuple[Filed, dict]]:
    """For each track, setting and pair of arms the best founded comparison on GPUs that has an
    interval: of a whole plan before a screen, then the newest."""
    found: dict[tuple, tuple[Filed, dict]] = {}
    for f in sorted(filter(shown, board.all), key=lambda f: (f.plan is not None, f.path.name)):
        said = f.figures
        if not on_gpu(f) or said["stage"] == "interim" or f.claim["kind"] == "note":
            continue
        for pair in pairs(f):
            if pair["difference"]["low"] is not None:
                key = (f.claim["track"], setting(f), pair["arm"], pair["against"])
                found[key] = (f, pair)
    return [found[key] for key in sorted(found)]


def front_row(filed: Filed, pair: dict) -> Row:
    """What an arm gains, and what it costs. ms a step: of the last stage, the longest steps."""
    arms = full_schedule(filed)["arms"]
    mine, other = arms[pair["arm"]], arms[pair["against"]]
    ms = [number([*a["ms_by_stage"].values()][-1]["ms"], ".1f") for a in (mine, other)]
    extra = {"value": pair["time_ratio"]["value"] - 1, "low": None, "high": None}
    p = p_value(filed, pair["arm"], pair["against"])
    return {
        "track": filed.claim["track"],
        "preset": setting(filed),
        "arm": f"`{pair['arm']}`",
        "against": f"`{pair['against']}`",
        "tokens:": millions(full_schedule(filed)["tokens"]),
        "blocks:": str(pair["n"]),
        "loss": f"`{filed.figures['metric']}`",
        "difference:": with_interval(pair["difference"], "+.4f"),
        "ms a step:": " / ".join(ms),
        "GB:": number(mine["peak_alloc"], ".1f", 1e-9),
        "extra time, %:": with_interval(extra, "+.1f", 100),
        "may cost, %:": with_interval(pair["break_even"], "+.1f", 100),
        "kind": f"[{kind(filed)}](records/{place(filed)})" + (p and f", p = {p}"),
    }


def alone(board: Board) -> list[Filed]:
    """Folders with runs on GPUs."""
    return [f for f in filter(on_gpu, board.all) if f.claim["kind"] != "note"]


def longest(filed: list[Filed]) -> list[Filed]:
    """Of each track, the folders with the largest budget."""
    most: dict[str, int] = {}
    for f in filed:
        track = f.claim["track"]
        most[track] = max(most.get(track, 0), full_schedule(f)["tokens"])
    return [f for f in filed if full_schedule(f)["tokens"] == most[f.claim["track"]]]


def front_runs(filed: list[Filed]) -> list[Row]:
    """Every arm of these folders."""
    return [
        {
            "track": f.claim["track"],
            "preset": setting(f),
            "arm": f"`{arm}`",
            "tokens:": millions(full_schedule(f)["tokens"]),
            "n:": str(a["n"]),
            "loss:": f"`{f.figures['metric']}` {number(a['loss']['value'], '.4f')}",
            "train s:": number(a["train_s"]["mean"], ".1f"),
            "tokens/s:": number(a["tokens_per_s"], ",.0f"),
            "GB:": number(a["peak_alloc"], ".1f", 1e-9),
            "machine": ", ".join(f.figures["machines"]),
            "from": f"[{kind(f)}](records/{place(f)})",
        }
        for f in filed
        for arm, a in full_schedule(f)["arms"].items()
    ]


def without_empty(rows: list[Row], name: str) -> list[Row]:
    """The rows, without this column where no row has anything in it."""
    if any(row[name] for row in rows):
        return rows
    return [{key: cell for key, cell in row.items() if key != name} for row in rows]


def figures(board: Board) -> str:
    """What stands between README.md's markers."""
    lines, filed = headlines(board), alone(board)
    rows = without_empty([front_row(*pair) for pair in front_pairs(board)], "may cost, %:")
    if rows:
        lines += [*table(rows), FOOT]
        if "may cost, %:" in rows[0]:
            lines.append(MAY_COST)
        lines += [LONGEST, *table(front_runs(longest(filed)))]
    if not lines:
        lines = [*table(front_runs(filed)), ONLY_SINGLE_RUNS] if filed else [NOTHING]
    return "\n".join(lines) + "\n"


def with_figures(text: str, board: Board) -> str | None:
    """README.md with its figures made anew; None where it has no place for them."""
    made = figures(board)
    found, count = FIGURES.subn(lambda m: m[1] + made + m[3], text)
    return found if count == 1 else None
