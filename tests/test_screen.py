"""A screen's runs are those of processes of their own, from one warm trainer."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import types

import helpers as H
import pytest

from records import folder as folder_module
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
    assert screen.main([*argv, "--seeds", "0", "0", "1"]) == 0, "a seed named twice is one run"
    assert ended(folder) == before
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[-3:]] == [
        *[["base", "2"], ["fast", "2"], ["cut", "2"]],
    ]
    assert screen.main(["base", "fast:matrix_lr=0.06", *argv[len(LINE) :]]) == 2
    assert "has fast with other settings" in capsys.readouterr().err


def test_runs_on_other_text_are_refused(screened, text_data, tmp_path, capsys):
    folder, argv = screened
    before, shards = ended(folder), sorted(text_data.glob("*train*.bin"))
    assert screen.main([*argv, "--data-seed", "7"]) == 2
    assert "with other settings: use --out" in capsys.readouterr().err
    assert screen.main([*argv, "--dev", str(shards[-1])]) == 2
    assert "on other data, or by another train_gpt.py: use --out" in capsys.readouterr().err
    assert ended(folder) == before


def test_a_folder_is_one_screens(screened, monkeypatch, capsys):
    """Another that asks for it would move its runs aside."""
    folder, argv = screened
    monkeypatch.setattr(folder_module.time, "sleep", lambda _: None)
    with folder_module.locked(folder):
        assert screen.main(argv) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_budgets_of_their_own(text_data, tmp_path, capsys):
    """Stages of all are planned with the largest; who asks for too much is named before any run."""
    line = ["short:tokens=512", "large:tokens=8192,stages=1:4096:1:128"]
    assert screen.main([*line, *H.tiny_argv(text_data, tmp_path, looks=1)]) == 0
    assert len(screen.rows_of(tmp_path)) == 2
    capsys.readouterr()
    more = ["more:tokens=99999999", *H.tiny_argv(text_data, tmp_path / "more", looks=1)]
    assert screen.main(["base", *more]) == 2
    assert "screen: more: " in capsys.readouterr().err
    assert screen.rows_of(tmp_path / "more") == []


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
        {"name": name, "seed": seed, "dev_loss": loss, "train_s": 10.0, "shared": False}
        for name, losses in (("a", (3.5, 3.6)), ("b", (3.4, 3.52)))
        for seed, loss in enumerate(losses)
    ]
    first, second = screen.table(made, ["a", "b", "none"]).splitlines()[1:]
    assert first.split() == ["a", "2", "3.5500", "10.0"]
    assert second.split() == ["b", "2", "3.4600", "-0.0900", "-0.2171", "to", "+0.0371", "10.0"]
    (alone,) = screen.table(made[:3], ["b", "a"]).splitlines()[1:2]
    assert alone.split() == ["b", "1", "3.4000", "10.0"]


def test_times_on_a_shared_gpu_are_marked():
    made = [
        {"name": "a", "seed": i, "dev_loss": 3.5, "train_s": 9 + i, "shared": shared}
        for i, shared in enumerate((False, True))
    ]
    assert screen.table(made, ["a"]).splitlines()[1].split() == ["a", "2", "3.5000", "~9.5"]


def test_all_stages_are_compiled_before_the_first_run(text_data, tmp_path, monkeypatch):
    """The first variant's settings do not hide what another one's steps are like."""
    tried, began = [], []
    try_call, run = T.WarmUp.try_call, T.Trainer.run
    monkeypatch.setattr(
        T.WarmUp,
        "try_call",
        lambda self, shape, window: (tried.append(shape), try_call(self, shape, window)),
    )
    monkeypatch.setattr(T.Trainer, "run", lambda self: (began.append(len(tried)), run(self)))
    assert screen.main([*LINE, *H.tiny_argv(text_data, tmp_path, looks=1)]) == 0
    tokens = {rows * row for rows, row, _ in tried}
    assert tokens == {128, 256} and began == [len(tried)] * 3


def test_one_trains_at_a_time(tmp_path):
    """On each GPU, whichever process comes; each leaves it when it ends, however it ends."""
    code = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]); from records import screen\n"
    )
    code += "with screen.turn(pathlib.Path(sys.argv[2]), True):\n"
    code += "    print(time.time()); time.sleep(0.5); print(time.time()); 1 / int(sys.argv[3])"
    start = [sys.executable, "-c", code, str(T.HERE), str(tmp_path)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    all_of_them = [subprocess.Popen([*start, n], **how) for n in "101"]
    spans = sorted([float(t) for t in p.communicate()[0].split()] for p in all_of_them)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    with screen.turn(tmp_path / "nowhere", False):
        pass


@pytest.mark.parametrize(
    "words, said",
    [
        (["a:arm=diff_v2"], "'arm=diff_v2' is no key=value of a run's settings"),
        (["a:seed=3"], "'seed=3' is no key=value"),
        (["a:cooldown"], "'cooldown' is no key=value"),
        (["../a:cooldown=0.5"], "a name of letters"),
        (["a", "a:cooldown=0.5"], "two variants of one name"),
        (["a", "b:cooldown=2"], "b: --warmup and --cooldown: together at most 1"),
        (["a", "b:n_head=3,d_model=31"], "b: --d-model 31 must be"),
        (["a", "--at-a-time", "0"], "--at-a-time 1 or more"),
        (["a", "--run-id", "mine"], "a screen names its runs itself"),
    ],
)
def test_what_is_refused(words, said, text_data, tmp_path, capsys):
    assert screen.main([*words, *H.tiny_argv(text_data, tmp_path)]) == 2
    assert said in capsys.readouterr().err


# ---- settings with a graph of their own ---------------------------------------------------------

APART = ("base", "off:smear=true", "fast:matrix_lr=0.05", "both:matrix_lr=0.05,smear=true")


def test_who_shares_a_process():
    groups = screen.by_graph(dict(map(screen.parse_variant, (*APART, "no:normuon=0.5"))))
    assert groups == [["base", "fast"], ["off", "both"], ["no"]]


def test_processes_of_their_own(text_data, tmp_path, capsys):
    """Two at once: the runs are those of `train`, and the same line makes none again."""
    argv = [*APART, "--at-a-time", "2", *H.tiny_argv(text_data, tmp_path, looks=1)]
    assert screen.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[-4:]] == [
        [text.partition(":")[0], "1"] for text in APART
    ]
    assert said[0] == f"2 processes, 2 at a time; see {tmp_path}/*.out"
    assert sorted(said[1:3]) == ["base: ended with 0", "off: ended with 0"]
    for text in APART:
        name, changes = screen.parse_variant(text)
        alone = H.tiny(text_data, tmp_path / "alone", looks=1, **changes, run_id=name)
        T.train(alone)
        assert H.losses(tmp_path / f"{name}_s0") == H.losses(tmp_path / "alone" / name)
    assert all(row["shared"] and row["train_s"] > 0 for row in screen.rows_of(tmp_path))
    before = ended(tmp_path)
    assert screen.main(argv) == 0 and ended(tmp_path) == before
    exits = [json.loads(p.read_text())["code"] for p in tmp_path.glob("*_s0/exit.json")]
    assert exits == [0] * len(APART)
    other = [text.replace("0.05", "0.06") for text in argv]
    assert screen.main(other) == 2 and ended(tmp_path) == before, "before any process starts"
    assert "has both, fast with other settings" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(text_data, tmp_path, capsys):
    """Ends as train_gpt.py does."""
    line = ["a:matrix_lr=1e9,embed_lr=1e9", *H.tiny_argv(text_data, tmp_path)]
    assert screen.main(line) == T.EXIT_CODES["non-finite"]
    assert "loss" in capsys.readouterr().err
    assert json.loads((tmp_path / "a_s0" / "exit.json").read_text())["code"] == 3


SCRIPT = """
import sys, time
from pathlib import Path
me = Path(sys.argv[1])
me.touch()
time.sleep(float(sys.argv[2]))
print(sorted(p.name for p in me.parent.glob("*.on")))
me.unlink()
sys.exit(int(sys.argv[3]))
"""


def commands(folder, seconds: float, codes: dict[str, int]) -> dict[str, list[str]]:
    start = [sys.executable, "-c", SCRIPT]
    return {n: [*start, str(folder / f"{n}.on"), str(seconds), str(c)] for n, c in codes.items()}


def test_one_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    todo = commands(tmp_path, 0.5, {"a": 3, "b": 0, "c": 0, "d": 1})
    assert sorted(screen.run_apart(todo, 2, tmp_path, False)) == ["a", "d"]
    beside = [(tmp_path / f"{n}.out").read_text() for n in "abcd"]
    assert all(1 <= text.count(".on") <= 2 for text in beside), beside
    assert "d: ended with 1" in capsys.readouterr().out


@pytest.mark.parametrize("deaf", [False, True])
def test_none_outlives_it(tmp_path, monkeypatch, deaf):
    """Nor one that a signal does not end."""
    started, waits = [], []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        def terminate(self):
            waits.append(self)
            if not deaf:
                super().terminate()

        def wait(self, timeout=None):
            return super().wait(timeout and 1.0)

    def end(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(screen.subprocess, "Popen", Noted)
    monkeypatch.setattr(screen, "time", types.SimpleNamespace(sleep=end))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        screen.run_apart(commands(tmp_path, 60, {"a": 0, "b": 0}), 2, tmp_path, False)
    code = -signal.SIGKILL if deaf else -signal.SIGTERM
    assert [p.returncode for p in started] == [code, code] and waits == started
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_that_are_no_screens_are_passed_over(screened, text_data, tmp_path):
    T.train(H.tiny(text_data, tmp_path, run_id="alone", final_val=False))
    assert screen.rows_of(tmp_path) == []
    assert screen.table([], ["base"]).endswith("nothing to measure the others against")


def test_gpus_in_turn(tmp_path, monkeypatch):
    """Each place has its own of the GPUs, and knows whether it has it alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    said = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('%s'))"
    todo = {n: [sys.executable, "-c", said % screen.SHARED] for n in "abc"}
    for shared in (False, True):
        assert screen.run_apart(todo, 3, tmp_path, shared) == []
        found = [(tmp_path / f"{n}.out").read_text().split()[-2:] for n in "abc"]
        assert found == [[card, "1" if shared else "None"] for card in ("3", "5", "3")]
