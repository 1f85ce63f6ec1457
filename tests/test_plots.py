"""records/plots.py: which plots are drawn, that they read on white and on black, and sameness."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from fake_runs import fake_comparison, fake_run
from helpers import ROOT, T, tiny
from hypothesis import given
from hypothesis import strategies as st

from records import logs, plots, summary

MINE = f"{ROOT}/tests/arms/temperature.py:Temperature"
ARMS = {"softmax": (3.50, 100.0), "diff_v2": (3.49, 110.0), MINE: (3.51, 105.0)}
SVG = "{http://www.w3.org/2000/svg}"


def names(paths) -> set[str]:
    return {path.name for path in paths}


def colours(text: str) -> set[str]:
    """Every colour that an SVG's shapes have."""
    body = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    return set(re.findall(r"#[0-9a-f]{6}\b|#[0-9a-f]{3}\b", body))


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three arms, two lengths, three blocks."""
    path = tmp_path_factory.mktemp("plots") / "x"
    return fake_comparison(path, ARMS, blocks=3, fractions=(60, 100), noise_sd=0.0015)


@pytest.fixture(scope="module")
def drawn(folder):
    return plots.draw(folder)


# ---- What is drawn ------------------------------------------------------------------------------


def test_every_plot_is_an_svg_and_a_png(folder, drawn):
    want = ["loss_tokens", "loss_seconds", "seed_bands", "differences", "positions", "lengths"]
    assert [path.name for path in drawn] == [f"{name}.svg" for name in want]
    for path in drawn:
        assert ET.parse(path).getroot().tag == f"{SVG}svg"
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 80_000


def test_text_is_text_and_names_the_arms(drawn):
    for path in drawn:
        words = " ".join(t for e in ET.parse(path).iter(f"{SVG}text") for t in e.itertext())
        for arm in ("softmax", "diff_v2", "temperature.py:Temperature"):
            assert arm in words, (path.name, arm)
        assert "tests/arms" not in words


@pytest.mark.parametrize(
    "name, words",
    [
        ("loss_tokens", ["training tokens", "nats a token", "mean of n = 3"]),
        ("loss_seconds", ["training seconds", "nats a token"]),
        ("seed_bands", ["training tokens", "nats a token", "softmax, n = 3"]),
        ("differences", ["val_loss_ext, nats a token", "a screen", "- softmax, n = 3"]),
        ("positions", ["position in the document", "4096+", "nats a token", "95 % intervals"]),
        ("lengths", ["training tokens", "training seconds", "val_loss_ext, nats a token"]),
    ],
)
def test_axes_say_what_they_count(folder, drawn, name, words):
    tree = ET.parse(folder / f"{name}.svg")
    text = " ".join(t for e in tree.iter(f"{SVG}text") for t in e.itertext())
    assert all(word in text for word in words), text


def test_one_arm_has_no_pairs_to_draw(tmp_path):
    path = fake_comparison(tmp_path / "x", {"softmax": (3.5, 100.0)}, blocks=2)
    want = {"loss_tokens.svg", "loss_seconds.svg", "seed_bands.svg", "positions.svg"}
    assert names(plots.draw(path)) == want


def test_a_real_run(tmp_path, text_data):
    T.Trainer(tiny(text_data, tmp_path / "real", run_id="one", looks=0)).run()
    assert "positions.svg" in names(plots.draw(tmp_path / "real"))


def test_interim_and_complete_are_said(tmp_path):
    path = fake_comparison(tmp_path / "x", dict(list(ARMS.items())[:2]), blocks=2, plan={})

    def title() -> str:
        figure = plots.draw_differences(summary.read(path), summary.summarise(path))
        return figure.axes[0].get_title("left") or figure.axes[0].get_title()

    assert title().endswith("all planned blocks")
    log = path / "b02_softmax" / "run.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert title().endswith("interim")


def test_the_same_runs_give_the_same_bytes(folder, drawn, tmp_path):
    again = plots.draw(folder, out=tmp_path)
    for old, new in zip(drawn, again):
        assert old.read_bytes() == new.read_bytes()
        assert old.with_suffix(".png").read_bytes() == new.with_suffix(".png").read_bytes()


def test_the_command(tmp_path, capsys):
    fake_run(tmp_path / "x", "a")
    assert plots.main([str(tmp_path / "x")]) == 0
    made = capsys.readouterr().out.split()
    want = ("loss_tokens", "loss_seconds", "seed_bands", "positions")
    assert made == [str(tmp_path / "x" / f"{name}.svg") for name in want]
    assert plots.main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


# ---- Curves -------------------------------------------------------------------------------------


def test_curves_are_means_with_few_points(tmp_path):
    runs = [
        logs.load_run(fake_run(tmp_path, f"r{seed}", seed=seed, block=seed, tokens=4 * 39_321_600))
        for seed in (1, 2)
    ]
    curve = plots.curve_of(runs)
    assert len(curve.tokens) == plots.MOST_POINTS < len(runs[0].steps)
    assert curve.tokens[-1] == runs[0].header["tokens"]
    assert curve.seconds[-1] == pytest.approx(runs[0].end["train_s"], abs=1e-3)
    steps = np.array([[s["loss"] for s in run.steps] for run in runs]).mean(0)
    assert curve.loss[0] == pytest.approx(steps[:4].mean(), rel=1e-12)  # 600 steps, 150 points
    assert curve.looks.shape == (2, 8) and curve.look_tokens[-1] == curve.tokens[-1]
    assert curve.looks[1, -1] == runs[1].final("dev_loss")


def test_a_sampled_loss_is_no_line(tmp_path):
    """A gap in the curve, and the rest is drawn to its own scale; all of it a gap, too."""
    some, rest = "0.5:262144:1:128:10240", "0.5:262144:1:128"
    for name, stages in (("half", f"{some}+{rest}"), ("all", f"{some}+{some}")):
        folder = fake_comparison(tmp_path / name, ARMS, blocks=2, stages=stages)
        curve = plots.curve_of(logs.load_runs(folder)[:1])
        sampled = curve.tokens <= curve.tokens[-1] / 2
        assert (np.isnan(curve.loss) == (sampled | (name == "all"))).all()
        assert plots.main([str(folder)]) == 0


def test_fits_are_drawn_through_their_points(folder, drawn):
    """The fitted line ends at the mean of the runs it stands for: two lengths, so exactly."""
    said = summary.summarise(folder)
    long = said["schedules"][-1]
    for arm, fit in said["time"]["fits"].items():
        end = fit["a"]["value"] + fit["b"]["value"] * np.log(long["tokens"])
        assert end == pytest.approx(long["arms"][arm]["loss"]["value"], abs=1e-5)


@given(st.lists(st.floats(-1e3, 1e3), max_size=8), st.floats(-100, 100))
def test_names_stand_apart_in_order(wanted, least):
    placed = plots.apart(wanted, 12.0, least)
    assert all(at >= least - 1e-6 for at in placed)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in itertools.pairwise(order):
        assert placed[b] - placed[a] >= 12.0 - 1e-6


def test_names_that_have_room_stay():
    assert plots.apart([50.0, 0.0, 100.0], 12.0, -10.0) == [50.0, 0.0, 100.0]
    assert plots.apart([50.0, 50.0], 12.0, 0.0) == [44.0, 56.0]


# ---- Colours ------------------------------------------------------------------------------------


def test_colours_are_seen_on_both_grounds():
    for colour, _ in plots.STYLES:
        for theme in (plots.LIGHT, plots.DARK):
            assert contrast(colour, theme.ground) >= 3, colour  # WCAG 2.2, 1.4.11: graphics
    for theme in (plots.LIGHT, plots.DARK):
        assert contrast(theme.ink, theme.ground) >= 7 and contrast(theme.muted, theme.ground) >= 4.5


def test_the_dark_scheme_changes_all_that_is_not_an_arm(drawn):
    """Every colour in a file is an arm's, or one that the style sheet swaps."""
    arms = {colour for colour, _ in plots.STYLES}
    swapped = set(vars(plots.LIGHT).values())
    for path in drawn:
        text = path.read_text()
        assert text.count("prefers-color-scheme:dark") == 1
        assert colours(text) <= arms | swapped, path.name
        assert {plots.LIGHT.ink, plots.LIGHT.ground} <= colours(text)
        for light, dark in zip(vars(plots.LIGHT).values(), vars(plots.DARK).values()):
            assert f'[style*="fill: {light}"]{{fill:{dark} !important}}' in text
        for element in ET.parse(path).iter(f"{SVG}text"):  # black where nothing is said
            assert f"fill: {plots.LIGHT.ink}" in element.get("style", ""), path.name


def test_arms_keep_their_colours():
    alone, many = plots.styles_of(("softmax", "diff_v2")), plots.styles_of(tuple(plots.USUAL))
    assert all(alone[arm] == many[arm] for arm in alone)
    arms = ("softmax", "a.py:A", "diff_v2", "b.py:B", "c.py:C", "diff_v1", "d.py:D")
    found = plots.styles_of(arms)
    assert len({colour for colour, _ in found.values()}) == len(arms)
    assert len({marker for _, marker in found.values()}) == len(arms)
    assert found["diff_v2"] == alone["diff_v2"]
    more = tuple(f"{i}.py:X" for i in range(12))  # more than there are colours
    assert plots.styles_of(more).keys() == set(more)
