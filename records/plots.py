"""Plots of a folder of runs, as SVG (filed) and PNG (a copy to look at).

    python -m records.plots FOLDER

loss_tokens, loss_seconds: training loss (line; none of steps whose loss was over some classes
  alone) and dev loss (points), mean over runs
seed_bands: dev loss minus the baseline's mean, all seeds of an arm as a band
differences: paired differences of the final loss, block by block, with 95 % intervals
positions: final loss by position in the document, and its paired differences
lengths: final losses of complete schedules of several lengths, with the fits

An SVG brings its own ground, white or GitHub's dark one as the reader's colour scheme asks, and its
text is text. Arms keep their colour in every plot; colours have a contrast above 3 on both grounds,
stay apart for the colour-blind, and every arm has its own marker and its name where its line ends.
The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from records import summary
from records.logs import BadLog, Run, sampled
from records.summary import Study

MOST_POINTS = 150  # of a training curve
HIDDEN = 0.1  # share of the tokens whose losses may lie above the picture
LEADER = {"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
LABEL_GAP = 12.0  # points between the middles of two names


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the arms."""

    ground: str
    ink: str
    muted: str
    grid: str


LIGHT = Theme("#ffffff", "#1f2328", "#59636e", "#d1d9e0")
DARK = Theme("#0d1117", "#f0f6fc", "#9198a1", "#3d444d")

# Found by search: the smallest difference of two, seen with any of three colour blindnesses, is as
# large as contrast above 3 on both grounds allows (CIELAB 20 for the first six).
STYLES = (
    ("#777777", "o"),
    ("#1177bb", "s"),
    ("#dd6611", "^"),
    ("#9900ff", "D"),
    ("#ff11dd", "v"),
    ("#bb8855", "P"),
    ("#449955", "X"),
)
USUAL = {"softmax": 0, "diff_v2": 1, "diff_v1": 2, "diff_v2,form=light+": 3, "diff_v2,form=full": 4}


def styles_of(arms: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """{arm: (colour, marker)}: built-in arms have theirs in every folder; others, in the claim's
    order, those that no built-in arm has, then those of built-in arms that are not there."""
    spare = [i for i in range(len(STYLES)) if i not in USUAL.values()]
    spare += [i for arm, i in reversed(USUAL.items()) if arm not in arms]
    others = [arm for arm in arms if arm not in USUAL]
    places = USUAL | {arm: spare[i % len(spare)] for i, arm in enumerate(others)}
    return {arm: STYLES[places[arm]] for arm in arms}


def short(arm: str) -> str:
    """An arm's name without the folders of its file."""
    path, colon, rest = arm.partition(".py:")
    return f"{Path(path).name}{colon}{rest}" if colon else arm


# ---- Drawing ------------------------------------------------------------------------------------


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    changes = {
        **{"svg.fonttype": "none", "svg.hashsalt": "records", "font.size": 10},
        **{"font.family": ["DejaVu Sans", "sans-serif"], "text.color": theme.ink},
        **{"axes.edgecolor": theme.muted, "axes.labelcolor": theme.ink, "axes.linewidth": 0.8},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"axes.facecolor": theme.ground, "figure.facecolor": theme.ground},
        **{"savefig.facecolor": theme.ground, "axes.grid": True, "grid.color": theme.grid},
        **{"grid.linewidth": 0.6, "xtick.color": theme.muted, "ytick.color": theme.muted},
        **{"xtick.labelcolor": theme.ink, "ytick.labelcolor": theme.ink},
        **{"axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1.6},
        **{"lines.markersize": 4.5, "lines.markeredgewidth": 0.0},
    }
    with matplotlib.rc_context(changes):
        yield


def new_figure(panels: int = 1, height: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Panels one below the other; inches."""
    height = height or (4.0 if panels == 1 else 3.4 * panels)
    figure = Figure(figsize=(7.4, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures text without a display
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def apart(wanted: list[float], gap: float, least: float) -> list[float]:
    """Positions in the same order, at least `gap` from each other and not below `least`, near the
    wanted ones."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []  # (sum of wanted, count): neighbours that touch
    for i in order:
        total, n = wanted[i], 1
        while groups and total / n - groups[-1][0] / groups[-1][1] < gap * (n + groups[-1][1]) / 2:
            more, count = groups.pop()
            total, n = total + more, n + count
        groups.append((total, n))
    found, last = {}, least - gap
    placed = (total / n + gap * (k - (n - 1) / 2) for total, n in groups for k in range(n))
    for i, at in zip(order, placed):
        found[i] = last = max(at, last + gap)
    return [found[i] for i in range(len(wanted))]


def name_ends(axis: Axes, ends: list[tuple[str, str, tuple[float, float]]]) -> None:
    """(name, colour, end of its line in data coordinates): each name to the right of the picture,
    a thin line of the same colour from the end to the name."""
    axis.figure.draw_without_rendering()  # fixes limits and layout
    unit, box = 72 / axis.figure.dpi, axis.get_window_extent()
    heights = [axis.transData.transform(at)[1] * unit for _, _, at in ends]
    places = apart(heights, LABEL_GAP, box.y0 * unit + LABEL_GAP / 2)
    for (name, colour, at), y in zip(ends, places):
        axis.annotate(
            name,
            at,
            xytext=(1.03, (y / unit - box.y0) / box.height),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={"color": colour, "linewidth": 0.7, **LEADER},
        )


def say(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x or axis.get_xlabel())
    axis.set_ylabel(y)


def count_by(axis: Axes, by: str) -> None:
    """An x axis of training 'tokens' or 'seconds'."""
    axis.set_xlabel(f"training {by}")
    if by == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def dark_css() -> str:
    """Swaps the theme's colours where the reader's scheme is dark; others see the light one."""
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in zip(vars(LIGHT).values(), vars(DARK).values())
        for kind in ("fill", "stroke")
    ]
    return f"<style>@media (prefers-color-scheme:dark){{{''.join(rules)}}}</style>"


def save(figure: Figure, path: Path) -> None:
    """PATH.svg and PATH.png."""
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    svg = path.with_suffix(".svg")
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    text = svg.read_text(encoding="utf-8")
    start = text.index(">", text.index("<svg")) + 1
    svg.write_text(f"{text[:start]}\n {dark_css()}{text[start:]}", encoding="utf-8")


# ---- Curves -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """An arm's runs of one schedule, mean over runs. Arrays of one length each."""

    tokens: np.ndarray  # of the training curve
    seconds: np.ndarray
    loss: np.ndarray
    look_tokens: np.ndarray
    look_seconds: np.ndarray
    looks: np.ndarray  # [runs, looks]: dev loss


def shown(step: dict) -> float:
    return np.nan if sampled(step) else step["loss"]


def curve_of(runs: list[Run]) -> Curve:
    """The training loss, averaged over steps side by side until few points are left. It has a gap
    (NaN) where it is over some classes alone: such a loss is no other's equal."""
    steps = [np.array([[s["tokens"], s["train_s"], shown(s)] for s in run.steps]) for run in runs]
    mean = np.mean(steps, axis=0)
    parts = np.array_split(mean, min(len(mean), MOST_POINTS))
    points = np.array([[*part[-1, :2], part[:, 2].mean()] for part in parts])
    looks = [[v for v in run.vals if v["split"] == "dev"] for run in runs]
    at = [[[v["tokens"], v["train_s"]] for v in row] for row in looks]
    at = np.mean(at, axis=0).reshape(-1, 2)
    dev = np.array([[v["dev_loss"] for v in row] for row in looks])
    return Curve(*points.T, *at.T, dev)


def curves_of(study: Study) -> dict[str, Curve]:
    runs = {arm: list(study.at(study.full, arm).values()) for arm in study.arms}
    return {arm: curve_of(found) for arm, found in runs.items() if found}


def draw_loss(study: Study, by: str) -> Figure:
    """Loss against 'tokens' or 'seconds'."""
    figure, (axis,) = new_figure()
    ends, seen = [], []
    for arm, curve in curves_of(study).items():
        colour, marker = styles_of(study.arms)[arm]
        x, look_x = getattr(curve, by), getattr(curve, f"look_{by}")
        axis.plot(x, curve.loss, color=colour, linewidth=1.0, alpha=0.8)
        dev = curve.looks.mean(0)
        axis.plot(look_x, dev, marker, color=colour)
        ends.append((short(arm), colour, (x[-1], dev[-1])))
        late = (curve.tokens >= HIDDEN * curve.tokens[-1]) & np.isfinite(curve.loss)
        seen += [*curve.loss[late], *dev]
    low, high = min(seen), max(seen)
    axis.set_ylim(low - 0.04 * (high - low), high)
    axis.set_xlim(left=0)
    count_by(axis, by)
    n = max(len(study.at(study.full, arm)) for arm in study.arms)
    say(axis, f"Training loss (line), dev loss (points): mean of n = {n}", "", "nats a token")
    name_ends(axis, ends)
    return figure


def draw_bands(study: Study) -> Figure | None:
    """Dev loss minus the baseline's mean at the same tokens; bands from the lowest to the highest
    seed. None where arms did not look at the same places."""
    curves = curves_of(study)
    base = curves.get(study.baseline or study.arms[0])
    if base is None or any(c.looks.shape[1] != base.looks.shape[1] for c in curves.values()):
        return None
    figure, (axis,) = new_figure()
    middle, ends = base.looks.mean(0), []
    for arm, curve in curves.items():
        colour, marker = styles_of(study.arms)[arm]
        above = curve.looks - middle
        x, mean = curve.look_tokens, above.mean(0)
        if len(above) > 1:
            axis.fill_between(x, above.min(0), above.max(0), color=colour, alpha=0.15, linewidth=0)
            axis.plot(x, above.T, color=colour, linewidth=0.5, alpha=0.6)
        axis.plot(x, mean, color=colour, marker=marker)
        ends.append((f"{short(arm)}, n = {len(above)}", colour, (x[-1], mean[-1])))
    count_by(axis, "tokens")
    title = (
        f"Dev loss minus the mean of {short(study.baseline or study.arms[0])}; bands hold all seeds"
    )
    say(axis, title, "", "nats a token")
    name_ends(axis, ends)
    return figure


# ---- Final losses -------------------------------------------------------------------------------


def full_schedule(said: dict) -> dict:
    return next(s for s in said["schedules"] if s["fraction"] == said["full"])


def draw_differences(study: Study, said: dict) -> Figure | None:
    """A row a pair: blocks as dots, the mean with its interval under them."""
    pairs = [p for p in full_schedule(said)["pairs"] if p["n"]]
    if not pairs:
        return None
    figure, (axis,) = new_figure(height=1.5 + 0.62 * len(pairs))
    styles = styles_of(study.arms)
    for row, p in enumerate(pairs):
        colour, marker = styles[p["arm"]]
        axis.plot(p["differences"], [row - 0.13] * p["n"], marker, color=colour, alpha=0.75)
        d = p["difference"]
        if d["low"] is not None:
            axis.plot([d["low"], d["high"]], [row + 0.17] * 2, color=colour, linewidth=2.2)
        axis.plot(d["value"], row + 0.17, "|", color=colour, markersize=13, markeredgewidth=2.2)
    axis.axvline(0, color=matplotlib.rcParams["text.color"], linewidth=0.9)
    names = [f"{short(p['arm'])}\n- {short(p['against'])}, n = {p['n']}" for p in pairs]
    axis.set_yticks(range(len(pairs)), names)
    axis.set_ylim(len(pairs) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    kind = {"screen": "a screen", "interim": "interim", "complete": "all planned blocks"}
    title = f"Blocks (dots), mean with 95 % interval: {kind[said['stage']]}"
    say(axis, title, f"difference of {said['metric']}, nats a token (below 0: better)", "")
    return figure


def draw_positions(study: Study, said: dict) -> Figure:
    """Final loss by position in the document, and below it what pairs differ by."""
    schedule, styles = full_schedule(said), styles_of(study.arms)
    pairs = [p for p in schedule["pairs"] if p["n"]]
    figure, axes = new_figure(2 if pairs else 1)
    names = list(dict.fromkeys(k for a in schedule["arms"].values() for k in a["by_position"]))
    place, ends = {name: i for i, name in enumerate(names)}, []
    for arm, a in schedule["arms"].items():
        colour, marker = styles[arm]
        x, y = [place[k] for k in a["by_position"]], list(a["by_position"].values())
        axes[0].plot(x, y, color=colour, marker=marker)
        ends.append((short(arm), colour, (x[-1], y[-1])))
    say(axes[0], f"Loss by position, {said['metric']}", "position in the document", "nats a token")
    for axis in axes:
        axis.set_xticks(range(len(names)), [n if n[-1] != "-" else f"{n[:-1]}+" for n in names])
        axis.tick_params(axis="x", labelrotation=30)
        axis.set_xlim(-0.4, len(names) - 0.6)
    if pairs:
        draw_position_pairs(axes[1], pairs, place, styles)
    name_ends(axes[0], ends)
    return figure


def draw_position_pairs(axis: Axes, pairs: list[dict], place: dict[str, int], styles: dict) -> None:
    """Paired differences with 95 % intervals; pairs stand side by side at a position."""
    axis.axhline(0, color=matplotlib.rcParams["text.color"], linewidth=0.9)
    against = {p["against"] for p in pairs}
    ends = []
    for i, p in enumerate(pairs):
        colour, marker = styles[p["arm"]]
        shift = 0.5 * ((i + 0.5) / len(pairs) - 0.5)
        x, parts = [place[k] + shift for k in p["by_position"]], list(p["by_position"].values())
        axis.plot(x, [d["value"] for d in parts], marker, color=colour)
        for at, d in zip(x, parts):
            if d["low"] is not None:
                axis.plot([at, at], [d["low"], d["high"]], color=colour)
        name = (
            short(p["arm"]) if len(against) == 1 else f"{short(p['arm'])} - {short(p['against'])}"
        )
        ends.append((name, colour, (x[-1], parts[-1]["value"])))
    to = f" to {short(against.pop())}" if len(against) == 1 else ""
    title = f"Paired differences{to}, 95 % intervals"
    say(axis, title, "position in the document", "nats a token")
    name_ends(axis, ends)


def draw_lengths(study: Study, said: dict) -> Figure | None:
    """Final losses of complete schedules against tokens and seconds, with loss = a + b ln(tokens);
    None where all have one length."""
    times = said["time"]
    if times is None:
        return None
    figure, axes = new_figure(2)
    for axis, by in zip(axes, ("tokens", "seconds")):
        ends = []
        for arm, fit in times["fits"].items():
            colour, marker = styles_of(study.arms)[arm]
            runs = [r for part in study.fractions for r in study.at(part, arm).values()]
            tokens = np.array([r.header["tokens"] for r in runs])
            x = tokens if by == "tokens" else np.array(summary.train_seconds(runs))
            axis.plot(x, summary.finals(runs, said["metric"]), marker, color=colour, alpha=0.75)
            line = np.geomspace(tokens.min(), tokens.max(), 50)
            loss = fit["a"]["value"] + fit["b"]["value"] * np.log(line)
            scale = 1.0 if by == "tokens" else fit["tokens_per_s"]["value"]
            axis.plot(line / scale, loss, color=colour, linewidth=1.2)
            ends.append((short(arm), colour, (line[-1] / scale, loss[-1])))
        count_by(axis, by)
        title = f"Complete schedules, {times['blocks']} blocks; lines: a + b ln(tokens)"
        say(axis, title if by == "tokens" else "", "", f"{said['metric']}, nats a token")
        name_ends(axis, ends)
    return figure


# ---- All of them --------------------------------------------------------------------------------


def figures(study: Study, said: dict) -> dict[str, Callable[[], Figure | None]]:
    return {
        "loss_tokens": lambda: draw_loss(study, "tokens"),
        "loss_seconds": lambda: draw_loss(study, "seconds"),
        "seed_bands": lambda: draw_bands(study),
        "differences": lambda: draw_differences(study, said),
        "positions": lambda: draw_positions(study, said),
        "lengths": lambda: draw_lengths(study, said),
    }


def draw(folder: Path | str, theme: Theme = LIGHT, out: Path | None = None) -> list[Path]:
    """Draws what a folder's runs allow into `out` (the folder itself); the SVGs' paths. BadLog as
    `summarise`. An SVG of the light theme is also dark where the reader is."""
    folder = Path(folder)
    study, said, made = summary.read(folder), summary.summarise(folder), []
    with style(theme):
        for name, make in figures(study, said).items():
            figure = make()
            if figure is not None:
                path = (out or folder) / f"{name}.svg"
                save(figure, path)
                made.append(path)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="plots", description="plots of a folder of runs, into it", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="with one folder a run below it")
    args = parser.parse_args(argv)
    try:
        for path in draw(args.folder):
            print(path)
    except BadLog as e:
        print(f"plots: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
