"""records/demo.py: the whole path at a tiny size, its arithmetic, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import sys

import helpers as H
import pytest

from data import docstrings
from records import demo

T = H.T
ABOUT = {
    **{"bigram": 3.5, "gzip": {"alone": 2.6, "conditioned": 2.4}},
    **{"xz": {"alone": 2.5, "conditioned": 2.0}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of 60 kB of docstrings to train on."""
    tokens = H.tokens_of(H.docstrings(80_000))
    splits = {"train": [tokens[:60_000]], "dev": [tokens[60_000:65_000]]}
    return H.write_corpus(
        tmp_path_factory.mktemp("demo"), {**splits, "val": [tokens[65_000:70_000]]}
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The preset, but narrow."""
    narrow = {"d_model": 32, "n_head": 2, "head_dim": 16}
    monkeypatch.setitem(T.PRESETS, "demo", {**T.PRESETS["demo"], **narrow})


def run_demo(text, tmp_path, *words) -> int:
    return demo.main(["--minutes", "0.01", "--data", str(text), "--out", str(tmp_path), *words])


def test_whole_path(text, tmp_path, capsys, monkeypatch):
    (text / docstrings.ABOUT).touch()  # as if docstrings.build had made the folder
    monkeypatch.setattr(docstrings, "build", lambda folder: ABOUT)
    try:
        assert run_demo(text, tmp_path) == 0
    finally:
        (text / docstrings.ABOUT).unlink()
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert names >= {"softmax", "diff_v2", "demo.txt", "look.html"}
    assert '"name":"softmax"' in (folder / "look.html").read_text("utf-8")
    assert '"name":"diff_v2"' in (folder / "look.html").read_text("utf-8")
    tokens = set()
    said, out = (folder / "demo.txt").read_text(), capsys.readouterr().out
    assert said in out
    (line,) = [x for x in said.splitlines() if x.startswith("cut to the fewest steps, 20 of ")]
    before, training, after = out.partition("step:2/20 loss:")
    assert training and line in before.splitlines() and line in after.splitlines()
    for arm in ("softmax", "diff_v2"):
        assert not H.chain_breaks(folder / arm)
        assert json.loads((folder / arm / "exit.json").read_text())["code"] == 0
        steps = H.read_log(folder / arm, "step")
        tokens.add(steps[-1]["tokens"])
        assert len(steps) == demo.FEWEST_STEPS  # 0.01 minutes leave no more
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
        val = H.read_log(folder / arm, "val")[-1]
        (row,) = [x for x in said.splitlines() if x.startswith(arm + " ") and "goes on" not in x]
        assert f"{val['bpb']:.4f}" in row
    assert len(tokens) == 1  # both arms the same
    assert demo.ONE_SEED in said
    words = said.split()
    for name, value in (("bigram", "3.5000"), ("gzip", "-9"), ("xz", "-9")):
        assert words[words.index(name) + 1] == value
    assert "2.5000  alone; 2.0000 knowing train" in said
    assert "./run.sh speedrun" in said
    assert f"./run.sh sample {folder}/diff_v2" in said
    pytest.importorskip("matplotlib")
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_demo_that_is_not_cut_does_not_say_so(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "measure", lambda cfg: demo.Speed(5.0, 0.0))
    monkeypatch.setattr(demo, "FEWEST_STEPS", 1)
    assert run_demo(text, tmp_path, "--arms", "softmax", "--minutes", "1") == 0
    out = capsys.readouterr().out
    assert "a step takes softmax 5000 ms" in out and "cut to" not in out


@pytest.mark.long
def test_other_shards_and_no_matplotlib(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_demo(text, tmp_path, "--arms", "diff_v1") == 0
    out = capsys.readouterr().out
    assert "no plot: matplotlib is not installed" in out
    assert "bigram" not in out.split("tokens/s  seconds")[1]


def test_plan(text):
    """Time is shared by the arms, the slower one sets the steps, looks and val are paid for."""
    cfg = T.make_config("demo", looks=2, data=str(text))
    corpus, batch = T.Corpus.open(str(text)), cfg.schedule.stages[0].tokens
    fast, slow = demo.Speed(0.05, 0.0), demo.Speed(0.1, 0.0)
    plan = demo.make_plan(cfg, corpus, [fast, slow], 6.0)
    assert (plan.steps, plan.cut) == (30, "")
    # 2 looks at 5,000 tokens and 5,000 of val at 0.1 ms each: 1.5 s an arm
    slow = demo.Speed(0.1, 1e-4)
    assert demo.make_plan(cfg, corpus, [fast, slow], 9.0).steps == 30
    most = 60_000 * cfg.schedule.passes // batch
    for seconds, room in ((0.0, 0), (2.25, 7), (3.45, 19)):
        plan = demo.make_plan(cfg, corpus, [slow], seconds)
        assert plan.steps == demo.FEWEST_STEPS
        for part in (f"{plan.steps} of the {most} ", "100 ms", "2 s an arm", f"time for {room};"):
            assert part in plan.cut
    assert demo.make_plan(cfg, corpus, [slow], 3.55).cut == ""
    assert demo.Plan(5, 0, most=5, step=0.1, looking=1.5).cut == "", "all of a short text"
    plan = demo.make_plan(cfg, corpus, [fast], 1e6)
    assert (plan.steps, plan.cut) == (most, "")


def test_step_lines_come_in_tenths():
    out = io.StringIO()
    lines = [f"step:{i}/40 loss:1" for i in range(1, 41)] + ["step:40/40 dev_loss:2", "done"]
    print("\n".join(lines), file=demo.Tenths(out))
    want = [f"step:{i}/40 loss:1" for i in range(4, 41, 4)] + lines[-2:]
    assert out.getvalue().splitlines() == want


@pytest.mark.parametrize(
    "words, said",
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--arms", "softmax", "sofmax"], "no arm 'sofmax'"),
        (["--arms", "softmax", "softmax"], "twice"),
        (["--arms", "diff_v2,form=none"], "form"),
    ],
)
def test_bad_words(words, said, text, tmp_path, capsys):
    assert run_demo(text, tmp_path, *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_folders(tmp_path, capsys):
    tokens = H.tokens_of(H.docstrings(30_000))
    no_val = H.write_corpus(tmp_path / "a", {"train": [tokens]})
    assert run_demo(no_val, tmp_path / "out") == 2
    assert "val" in capsys.readouterr().err
    others = H.write_corpus(tmp_path / "b", {"train": [tokens], "val": [tokens]}, vocab=300)
    assert run_demo(others, tmp_path / "out") == 2
    assert "bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_signal_saves_and_ends(text, tmp_path, capsys, monkeypatch):
    report = T.Reporter.report

    def send(self, step, *rest):
        report(self, step, *rest)
        if step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(T.Reporter, "report", send)
    before = signal.getsignal(signal.SIGINT)
    assert run_demo(text, tmp_path) == 75
    assert signal.getsignal(signal.SIGINT) is before
    (folder,) = tmp_path.iterdir()
    assert T.find_checkpoint(folder / "softmax")
    assert json.loads((folder / "softmax" / "exit.json").read_text())["code"] == 75
    assert "checkpoint" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(text, tmp_path, monkeypatch):
    def blow_up(self, *_):
        raise T.NonFinite("step 4: loss nan")

    monkeypatch.setattr(T.Reporter, "report", blow_up)
    assert run_demo(text, tmp_path) == 3
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "softmax" / "exit.json").read_text())["code"] == 3
