"""What gpu_trust.py says of runs: by hand, and of real ones on the CPU, where all are equal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gpu_trust as G
import helpers as H
import pytest

T = H.T
STAGES = tuple(T.Stage(1 / 3, tokens, 1.0, (128, 128)) for tokens in (256, 512, 768))


def argv(data: Path, *own: str) -> list[str]:
    return [*H.tiny_argv(data, "runs", stages=STAGES, passes=5), *own]


def run(name: str, losses: list[float], **more) -> dict:
    made = {"name": name, "losses": losses, "norms": [1.0] * len(losses), "dev_loss": losses[-1]}
    return made | {"digests": {"w": "a", "w.momentum": "b"}} | more


def test_places_are_around_the_ends_of_stages(text_data):
    cfg = G.config(argv(text_data), 12)
    steps = T.plan_steps(cfg, cfg.schedule.tokens)
    assert len(steps) == 12 and G.places(steps) == [3, 4, 8]
    assert [steps[i].tokens for i in (2, 3, 4, 7, 8)] == [256, 256, 512, 512, 768]
    one = T.plan_steps(H.tiny(text_data, "runs"), 256 * 9)
    assert G.places(one) == [2, 3, 6], "with one stage: thirds"
    assert not cfg.run.save_every and not cfg.run.looks and not cfg.run.save_final


def test_bitwise_names_what_differs():
    a = run("a", [3.0, 2.0, 1.0])
    assert G.bitwise(a, run("b", [3.0, 2.0, 1.0])) == []
    assert G.bitwise(a, run("b", [3.0, 2.5, 1.0])) == ["losses of step 2"]
    assert G.bitwise(a, run("b", [3.0, 2.0])) == ["losses of step 3", "norms of step 3"]
    assert G.bitwise(a, run("b", [3.0, 2.0, 1.0], digests={"w": "a"})) == ["w.momentum"]
    assert G.bitwise(a, run("b", [3.0, 2.0, 1.0], digests={"w": "z", "w.momentum": "b"})) == ["w"]


def test_gaps_compare_what_shares_as_much():
    whole = [run(f"w{i}", [3.0, 2.0 + e, 1.0 + e]) for i, e in enumerate((0.0, 0.1, -0.1))]
    near = [run(f"r{i}", [3.0, 2.0 + e, 1.0 + e]) for i, e in enumerate((0.01, 0.02, -0.01))]
    found = G.gaps(whole, near, 1)
    assert {kind: len(pairs) for kind, pairs in found["pairs"].items()} == {
        "whole, whole": 3,
        "whole, resumed": 6,
        "resumed, resumed": 3,
        "source, resumed": 3,
    }
    rms = [g["rms"] for g in found["pairs"]["whole, whole"]]
    assert rms == pytest.approx([0.1, 0.1, 0.2])
    assert all(ok for said in found["no_larger"].values() for ok in said.values())
    off = [run(f"r{i}", [3.0, 2.05 + e, 1.05 + e]) for i, e in enumerate((0.01, 0.02, -0.01))]
    said = G.gaps(whole, off, 1)["no_larger"]
    assert said["whole, resumed"]["rms"], "within what whole runs do"
    assert not said["source, resumed"]["rms"], "but not within what resumed runs do"


def test_the_cost_of_a_save_is_time_on_the_wall_without_the_wait_for_the_one_before():
    def fast(wall: float, *waited: float) -> dict:
        saves = [{"step": 1, "waited_s": w, "copy_s": 0.1, "write_s": 4.0} for w in waited]
        return run("f", [1.0] * 11) | {"wall_s": wall, "saves": saves, "ms": [1000.0] * 11}

    whole = [fast(13.0, 0.0), fast(10.0), fast(10.2)]
    cost = G.cost_of_saving({"whole": whole, "saving": fast(12.1, 0.0, 1.0)})
    assert cost["first_lost_s"] == pytest.approx(2.9)
    assert cost["lost_s"] == pytest.approx(0.5) and cost["one_percent_s"] == pytest.approx(50)
    assert cost["one_percent_steps"] == math.ceil(50 / 1.01)
    assert cost["share"] == pytest.approx(0.5 / (250 * 1.01 + 0.5))
    assert G.cost_of_saving({"whole": whole, "saving": fast(10.0, 0.0)})["one_percent_s"] == 4.0


def test_tokens_a_second_leave_the_first_step_out():
    one = {"ms": [9000.0, 500.0, 1000.0], "tokens": [100, 100, 200]}
    assert G.rate([one, one]) == pytest.approx(200)


@pytest.mark.long
def test_on_a_cpu_all_runs_are_equal(text_data, tmp_path, capsys):
    out = tmp_path / "trust"
    own = ["--out", str(out), "--steps", "6", "--runs", "2"]
    assert G.main(argv(text_data, *own)) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "trust.json").read_text())
    report = found["report"]
    assert report["bitwise"] == {name: [] for name in ("twin", "from1", "from2", "from4", "fresh")}
    pairs = report["gaps"]["pairs"]
    assert all(g["rms"] == g["dev_loss"] == 0 for kind in pairs.values() for g in kind)
    assert found["fast"]["resumed_at"] == 2 and len(report["saving"]["saves"]) == 3
    events = [e["text"] for e in H.read_log(out / "fast/resumed1", "event")]
    assert len(events) == 1 and events[0].endswith("at step 2")
    assert "| --deterministic: `fresh` against `whole` | losses, norms and" in said
    assert "| source, resumed | 2 | 0.0e+00, 0.0e+00 | 0.0e+00, 0.0e+00 | yes, yes |" in said


def test_it_writes_over_nothing_and_says_which_process_failed(text_data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        G.main(argv(text_data, "--out", str(tmp_path)))
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        G.main(argv(text_data, "--out", str(tmp_path / "t"), "--n-layer", "0"))
    assert "--backout 0" in capsys.readouterr().err
    bad = argv(text_data, "--out", str(tmp_path / "t"), "--roles", "det", "--steps", "6")
    bad[bad.index("--data") + 1] = str(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"(?s)det: exit code 1.*nothing"):
        G.main(bad)
