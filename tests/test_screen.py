"""A screen's runs are those of processes of their own, from one warm trainer."""

from __future__ import annotations

import helpers as H
import pytest

from records import logs, screen

T = H.T
LINE = (
    "base",
    "fast:matrix_lr=0.05,value_lr=0.3",
    "cut:stages=0.5:128:1:128+0.5:256:2:128,tail=0.5",
)
MORE = {"ngram": 1280, "looks": 1, "adam_every": 2, "final_val": False}


@pytest.fixture(scope="module")
def screened(text_data, tmp_path_factory):
    """(folder, the command line) of a screen of two seeds."""
    folder = tmp_path_factory.mktemp("screen")
    argv = [*LINE, "--seeds", "0", "1", *H.tiny_argv(text_data, folder, **MORE)]
    assert screen.main(argv) == 0
    return folder, argv


def ended(folder) -> dict:
    """When each run's log was last written to."""
    return {path.parent.name: path.stat().st_mtime_ns for path in logs.logs_in(folder)}


def test_the_order_turns(screened):
    order = [(row["name"], row["seed"]) for row in screen.rows_of(screened[0])]
    when = ended(screened[0])
    assert sorted(when, key=when.get) == [f"{name}_s{seed}" for name, seed in order]
    assert order == [
        *[("base", 0), ("fast", 0), ("cut", 0)],
        *[("fast", 1), ("cut", 1), ("base", 1)],
    ]


@pytest.mark.parametrize("text", LINE)
def test_a_run_is_that_of_a_process_of_its_own(screened, text_data, tmp_path, text):
    name, changes = screen.parse_variant(text)
    cfg = H.tiny(text_data, tmp_path, **{**MORE, **changes, "seed": 1, "run_id": "alone"})
    T.train(cfg)
    assert H.losses(screened[0] / f"{name}_s1") == H.losses(tmp_path / "alone")
    (row,) = [r for r in screen.rows_of(screened[0]) if (r["name"], r["seed"]) == (name, 1)]
    looks = [v["dev_loss"] for v in H.read_log(tmp_path / "alone", "val")]
    assert row["dev_loss"] == looks[-1]


def test_what_is_done_is_not_done_again(screened, capsys):
    folder, argv = screened
    before = ended(folder)
    assert screen.main(argv) == 0
    assert ended(folder) == before
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[-3:]] == [
        *[["base", "2"], ["fast", "2"], ["cut", "2"]],
    ]
    assert screen.main(["base", "fast:matrix_lr=0.06", *argv[len(LINE) :]]) == 2
    assert "has fast with other settings" in capsys.readouterr().err


def test_a_run_that_was_cut_goes_aside(screened, capsys):
    """And is made anew, as it was."""
    folder, argv = screened
    losses, rows = H.losses(folder / "base_s1"), screen.rows_of(folder)
    log = folder / "base_s1" / "run.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert screen.main(argv) == 0
    (aside,) = (folder / "aside").iterdir()
    assert aside.name.startswith("base_s1") and H.losses(aside) == losses
    assert H.losses(folder / "base_s1") == losses and len(screen.rows_of(folder)) == len(rows)


def test_the_table():
    made = [
        {"name": name, "seed": seed, "dev_loss": loss, "train_s": 10.0}
        for name, losses in (("a", (3.5, 3.6)), ("b", (3.4, 3.52)))
        for seed, loss in enumerate(losses)
    ]
    first, second = screen.table(made, ["a", "b", "none"]).splitlines()[1:]
    assert first.split() == ["a", "2", "3.5500", "10.0"]
    assert second.split() == ["b", "2", "3.4600", "-0.0900", "-0.2171", "to", "+0.0371", "10.0"]
    (alone,) = screen.table(made[:3], ["b", "a"]).splitlines()[1:2]
    assert alone.split() == ["b", "1", "3.4000", "10.0"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["a:normuon=0.9"], "'normuon=0.9' needs a graph of its own"),
        (["a:cooldown"], "'cooldown' needs a graph"),
        (["a", "a:cooldown=0.5"], "two variants of one name"),
        (["a", "b:cooldown=2"], "b: --warmup and --cooldown: together at most 1"),
    ],
)
def test_what_is_refused(words, said, text_data, tmp_path, capsys):
    assert screen.main([*words, *H.tiny_argv(text_data, tmp_path)]) == 2
    assert said in capsys.readouterr().err
