"""records/summary.py: figures of made-up runs with known effects, plans, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics

import numpy as np
import pytest
from fake_runs import BUDGET, DEV_GAP, WATTS, WINDOW_GAP, fake_comparison, fake_run
from helpers import T, chain_breaks, read_log, tiny
from scipy import stats as scipy_stats

from records import logs, summary, tables
from records.logs import BadLog

TWO = {"softmax": (3.50, 100.0), "diff_v2": (3.49, 110.0)}
LENGTHS = (60, 80, 100, 120)


def cut(run, lines: int = 1) -> None:
    """Takes the last lines of a log away."""
    path = run / "run.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-lines]))


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def keys_of(value) -> set[str]:
    """Every key anywhere in a JSON value."""
    if isinstance(value, dict):
        return set(value) | {k for v in value.values() for k in keys_of(v)}
    return {k for v in value for k in keys_of(v)} if isinstance(value, list) else set()


def the_pair(said: dict) -> dict:
    (schedule,) = said["schedules"]
    (pair,) = schedule["pairs"]
    return pair


# ---- Made-up runs -------------------------------------------------------------------------------


def test_made_up_runs_are_logs(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=2)
    runs = logs.load_runs(folder)
    assert [r.run_id for r in runs] == ["b01_diff_v2", "b01_softmax", "b02_diff_v2", "b02_softmax"]
    assert all(r.done and chain_breaks(r.path.parent) == [] for r in runs)
    assert [sorted(block) for block in logs.blocks(runs)] == [["diff_v2", "softmax"]] * 2


def test_made_up_lines_have_the_fields_of_real_ones(tmp_path, text_data):
    trainer = T.Trainer(tiny(text_data, tmp_path / "real"))
    trainer.labels = {"sitting": "s", "block": 1, "order": 0, "fraction": 100}
    real = read_log(trainer.run()["run"])
    made = read_log(fake_run(tmp_path, "a"))
    fields = [
        {(line["t"], line.get("split")): list(line) for line in lines} for lines in (made, real)
    ]
    assert fields[0] == fields[1]  # the same keys in the same order
    assert made[0]["config"].keys() == real[0]["config"].keys()


# ---- One arm ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen") / "x"
    return fake_comparison(folder, TWO, blocks=3, noise_sd=0.0015, first_ms=500.0)


def test_figures_of_an_arm(screen):
    said = summary.summarise(screen)
    arm = said["schedules"][0]["arms"]["softmax"]
    runs = [logs.load_run(screen / f"b{b:02d}_softmax") for b in (1, 2, 3)]
    losses = [r.final("val_loss_ext") for r in runs]
    assert arm["runs"] == [r.run_id for r in runs] and arm["n"] == 3
    assert arm["seeds"] == [[0, 0], [1, 0], [2, 0]]
    assert arm["losses"] == pytest.approx(losses, rel=1e-6)
    low, high = scipy_stats.ttest_1samp(losses, 0).confidence_interval(0.95)
    assert (arm["loss"]["low"], arm["loss"]["high"]) == pytest.approx((low, high), rel=1e-6)
    assert arm["sd"]["value"] == pytest.approx(statistics.stdev(losses), rel=1e-6)
    mean = statistics.mean(losses)
    assert arm["means"]["dev_loss"] == pytest.approx(mean + DEV_GAP, rel=1e-6)
    assert arm["means"]["val_loss"] == pytest.approx(mean + WINDOW_GAP, rel=1e-6)
    assert arm["params"]["attention"] == 25_952_256 and arm["flops_per_token"] == 793_313_300.0
    assert arm["peak_alloc"] == 35_700_000_000 and arm["peak_reserved"] == 41_200_000_000


def test_time_of_an_arm(screen):
    """Stages of 131k, 262k and 393k tokens, 50 steps each, 100 ms for the smallest; the first step
    of a stage takes half a second longer: not part of ms a step, but of everything else."""
    arm = summary.summarise(screen)["schedules"][0]["arms"]["softmax"]
    assert arm["ms_by_stage"] == {
        "0": {"tokens": 131_072, "ms": 100.0},
        "1": {"tokens": 262_144, "ms": 200.0},
        "2": {"tokens": 393_216, "ms": 300.0},
    }
    assert arm["train_s"]["mean"] == pytest.approx(50 * 0.6 + 1.5, abs=1e-6)
    assert arm["tokens_per_s"] == pytest.approx(BUDGET / 31.5, rel=1e-6)
    assert arm["joules"] == pytest.approx(WATTS * 31.5, rel=1e-6)


def test_train_minus_dev_is_over_the_last_twentieth(screen):
    said = summary.summarise(screen)["schedules"][0]["arms"]["diff_v2"]
    gaps = []
    for b in (1, 2, 3):
        steps = read_log(screen / f"b{b:02d}_diff_v2", "step")
        late = [s["loss"] for s in steps if s["tokens"] > 0.95 * BUDGET]  # all of 393k tokens
        assert len(late) == 5
        dev = [
            v["dev_loss"] for v in read_log(screen / f"b{b:02d}_diff_v2", "val") if "dev_loss" in v
        ]
        gaps.append(statistics.mean(late) - dev[-1])
    assert said["train_minus_dev"] == pytest.approx(statistics.mean(gaps), rel=1e-5)


SAMPLED = "0.5:262144:1:128:10240+0.47:262144:1:128:24576+0.03:262144:1:128"


def test_a_sampled_loss_is_not_set_against_dev(tmp_path):
    """Of the last 7 of 150 steps the last 4 have a whole loss; in the second case none has."""
    for name, stages, whole in (("some", SAMPLED, 4), ("none", "1:262144:1:128:10240", 0)):
        folder = fake_comparison(tmp_path / name, TWO, blocks=2, stages=stages)
        said = summary.summarise(folder)["schedules"][0]
        arm = said["arms"]["diff_v2"]
        steps = [read_log(folder / f"b0{b}_diff_v2", "step") for b in (1, 2)]
        late = [[s["loss"] for s in run[-7:] if "candidates" not in s] for run in steps]
        assert [len(losses) for losses in late] == [whole] * 2
        if whole:
            mean = statistics.mean(statistics.mean(losses) for losses in late)
            assert arm["train_loss"] == pytest.approx(mean, rel=1e-6)
        else:
            assert arm["train_loss"] is arm["train_minus_dev"] is None
            assert [row[-1] for row in tables.loss_table(said)] == ["train - dev", "-", "-"]


def test_a_sampled_loss_is_another_schedule(tmp_path):
    """And the key of a schedule without one is what it was."""
    whole = SAMPLED.replace(":10240", "").replace(":24576", "")
    runs = [
        logs.load_run(fake_run(tmp_path, f"r{i}", stages=stages))
        for i, stages in enumerate((SAMPLED, whole))
    ]
    assert len({logs.schedule_key(run) for run in runs}) == 2
    steps = [[s["tokens"], s["lr"], s["window"]] for s in runs[1].steps]
    digest = hashlib.sha256(json.dumps(steps).encode()).hexdigest()
    assert logs.schedule_key(runs[1]) == digest[:16]


def test_loss_by_position(screen):
    said = summary.summarise(screen)["schedules"][0]
    runs = [read_log(screen / f"b{b:02d}_diff_v2", "val")[-1] for b in (1, 2, 3)]
    mean = statistics.mean(v["by_position"]["4096-"] for v in runs)
    assert said["arms"]["diff_v2"]["by_position"]["4096-"] == pytest.approx(mean, rel=1e-6)
    pair = said["pairs"][0]
    for part in pair["by_position"].values():  # made-up arms differ by the same everywhere
        assert part == pytest.approx(pair["difference"], rel=1e-5)


# ---- Pairs --------------------------------------------------------------------------------------


def test_a_screen_has_intervals_and_no_p(screen):
    said = summary.summarise(screen)
    pair = the_pair(said)
    losses = {
        arm: [logs.load_run(screen / f"b{b:02d}_{arm}").final("val_loss_ext") for b in (1, 2, 3)]
        for arm in TWO
    }
    test = scipy_stats.ttest_rel(losses["diff_v2"], losses["softmax"])
    ends = test.confidence_interval(0.95)
    assert (pair["difference"]["low"], pair["difference"]["high"]) == pytest.approx(tuple(ends))
    assert pair["time_ratio"]["value"] == pytest.approx((33 + 1.5) / (30 + 1.5), rel=1e-6)
    assert said["stage"] == "screen" and said["decision"] is None
    assert not {"p", "p_two_sided", "passed"} & keys_of(said)
    text = summary.tables(said)
    assert text.startswith("Screen, 3 blocks, without a plan: no p.")
    assert "Decision" not in text and " p " not in text


def test_sittings_are_blocks_of_blocks(tmp_path):
    """A machine that adds 0.1 nats and half the time to both arms changes no difference."""
    folder = tmp_path / "x"
    for block in range(1, 7):
        late = block > 3
        for order, (arm, (loss, ms)) in enumerate(TWO.items()):
            fake_run(
                folder,
                f"b{block:02d}_{arm}",
                **{"arm": arm, "block": block, "seed": block - 1, "order": order},
                **{"final": loss + 0.1 * late + 0.001 * block * order, "ms": ms * (1 + late / 2)},
                **{"sitting": f"2026010{1 + late}T000000Z", "env": {"host": f"node-{late}"}},
            )
    pair = the_pair(summary.summarise(folder))
    assert pair["difference"]["value"] == pytest.approx(-0.01 + 0.0035, rel=1e-6)
    assert pair["sd"] == pytest.approx(0.001 * math.sqrt(3.5), rel=1e-5)
    assert pair["time_ratio"]["value"] == pytest.approx(1.1, rel=1e-6)
    assert pair["by_sitting"] == {
        "20260101T000000Z": {"n": 3, "mean": pytest.approx(-0.008)},
        "20260102T000000Z": {"n": 3, "mean": pytest.approx(-0.005)},
    }


def test_a_block_that_lacks_an_arm_is_no_pair(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=3)
    cut(folder / "b02_softmax")
    said = summary.summarise(folder)
    assert the_pair(said)["n"] == 2 and said["blocks"] == 2
    assert said["unfinished"] == ["b02_softmax"]
    assert {a: v["n"] for a, v in said["schedules"][0]["arms"].items()} == {
        "softmax": 2,
        "diff_v2": 3,
    }
    assert "Unfinished: b02_softmax." in summary.tables(said)


def test_one_block_gives_differences_without_intervals(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=1)
    said = summary.summarise(folder)
    pair = the_pair(said)
    assert pair["difference"] == {"value": pytest.approx(-0.01), "low": None, "high": None}
    assert pair["time_ratio"]["low"] is None and pair["sd"] is None
    assert "diff_v2 - softmax  1     -0.0100" in summary.tables(said)


def test_controls_are_pairs_of_their_own(tmp_path):
    arms = TWO | {"diff_v2,form=full": (3.485, 120.0), "softmax,mlp=3456": (3.488, 104.0)}
    folder = fake_comparison(tmp_path / "x", arms, blocks=2)
    edit_json(folder / "claim.json", compare=[["diff_v2,form=full", "softmax,mlp=3456"]])
    pairs = summary.summarise(folder)["schedules"][0]["pairs"]
    assert [(p["arm"], p["against"]) for p in pairs] == [
        ("diff_v2,form=full", "softmax,mlp=3456"),
        *((arm, "softmax") for arm in list(arms)[1:]),
    ]
    assert pairs[0]["difference"]["value"] == pytest.approx(-0.003, rel=1e-5)


def test_a_loss_that_is_not_finite_spoils_its_own_figures_alone(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=3)
    (folder / "b02_diff_v2" / "run.jsonl").unlink()
    fake_run(folder, "b02_diff_v2", arm="diff_v2", block=2, seed=1, final=math.nan, ms=110.0)
    said = summary.summarise(folder)
    assert the_pair(said)["difference"] == {"value": None, "low": None, "high": None}
    assert said["schedules"][0]["arms"]["softmax"]["loss"]["value"] is not None
    assert "NaN" not in summary.text_of(said)
    summary.tables(said)


# ---- Plans --------------------------------------------------------------------------------------


def test_a_plan_decides_when_its_last_run_is_there(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=5, noise_sd=0.0015, plan={})
    whole = summary.summarise(folder)
    (found,) = whole["decision"]
    losses = {
        arm: [logs.load_run(folder / f"b0{b}_{arm}").final("val_loss_ext") for b in range(1, 6)]
        for arm in TWO
    }
    pair = (losses["diff_v2"], losses["softmax"])
    one = scipy_stats.ttest_rel(*pair, alternative="less").pvalue
    assert found["p"] == pytest.approx(one, rel=1e-5) and found["passed"] and found["n"] == 5
    assert found["p_two_sided"] == pytest.approx(scipy_stats.ttest_rel(*pair).pvalue, rel=1e-5)
    assert whole["stage"] == "complete" and "Decision" in summary.tables(whole)

    cut(folder / "b05_softmax")
    said = summary.summarise(folder)
    assert said["stage"] == "interim" and said["decision"] is None
    assert said["plan"]["missing"] == [[5, "softmax", 100]]
    assert not {"p", "p_two_sided", "passed"} & keys_of(said)
    text = summary.tables(said)
    assert text.startswith("*Interim*: plan made-up of 5 blocks lacks 1 runs.")
    titles = [part for part in text.split("\n\n")[1:] if "\n" not in part]
    assert titles and all(title.endswith("(interim)") for title in titles)
    assert the_pair(said)["difference"]["low"] is not None


@pytest.mark.parametrize(
    "plan, passed",
    [
        ({}, True),
        ({"threshold": -0.02}, False),  # better, but not by that much
        ({"alpha": 1e-12}, False),
    ],
)
def test_the_rule_is_the_plans(tmp_path, plan, passed):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=5, noise_sd=0.001, plan={})
    rule = json.loads((folder / "plan.json").read_text())["rule"]
    edit_json(folder / "plan.json", rule=rule | plan)
    assert summary.summarise(folder)["decision"][0]["passed"] is passed


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"data_seed": 1},
        {"block": 6},
        {"tokens": BUDGET - 393_216},
        {"fraction": 80},
        {"arm": "diff_v1"},
    ],
)
def test_a_run_that_was_not_planned_counts_for_nothing(tmp_path, changes):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=5, noise_sd=0.0015, plan={})
    before = summary.summarise(folder)
    planned = {"arm": "diff_v2", "block": 5, "seed": 4, "final": 3.3}
    fake_run(folder, "more", **(planned | changes))
    said = summary.summarise(folder)
    assert said == before | {"unplanned": ["more"]}
    assert "Unplanned: more." in summary.tables(said)


def test_every_fraction_is_needed(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=2, fractions=(60, 100), plan={})
    assert summary.summarise(folder)["stage"] == "complete"
    cut(folder / "b02_diff_v2_f60")
    said = summary.summarise(folder)
    assert said["stage"] == "interim" and said["plan"]["missing"] == [[2, "diff_v2", 60]]


@pytest.mark.parametrize("blocks, passed", [(4, False), (5, True)])
def test_a_record_takes_five_runs(tmp_path, blocks, passed):
    """Runs near 3.49 against 3.5."""
    folder = fake_comparison(
        tmp_path / "x", {"diff_v2": (3.49, 100.0)}, blocks=blocks, block_sd=0.001, plan={}
    )
    rule = {"test": "one-sample t, one-sided", "alpha": 0.01, "alternative": "less"}
    edit_json(folder / "plan.json", rule=rule | {"threshold": 3.5, "compare": []})
    said = summary.summarise(folder)
    losses = said["schedules"][0]["arms"]["diff_v2"]["losses"]
    (found,) = said["decision"]
    p = scipy_stats.ttest_1samp(losses, 3.5, alternative="less").pvalue
    assert found["p"] == pytest.approx(p, rel=1e-3) and p < 0.01
    assert found["passed"] is passed and found["arm"] == "diff_v2"


# ---- Equal time ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths") / "x"
    return fake_comparison(folder, TWO, blocks=5, fractions=LENGTHS, noise_sd=0.001)


def test_fits_find_what_the_runs_were_made_of(lengths):
    times = summary.summarise(lengths)["time"]
    assert times["blocks"] == 5 and times["lengths"] == 4
    for arm, (loss, ms) in TWO.items():
        fit = times["fits"][arm]
        assert fit["b"]["low"] < -0.3 < fit["b"]["high"]
        at_full = fit["a"]["value"] + fit["b"]["value"] * math.log(BUDGET)
        assert at_full == pytest.approx(loss, abs=0.004)  # the blocks' own level, sd 0.003
        assert fit["tokens_per_s"]["value"] == pytest.approx(131_072_000 / ms, rel=1e-5)


def test_equal_time_and_time_to_target(lengths):
    """10 % slower and 0.01 better: worse by 0.3 ln 1.1 - 0.01 after the same seconds, and
    1.1 exp(-0.01 / 0.3) times the seconds to the same loss."""
    (pair,) = summary.summarise(lengths)["time"]["pairs"]
    equal, to = pair["equal_time"], pair["to_target"]
    assert equal["seconds"] == pytest.approx(30.0, rel=1e-5)
    assert equal["tokens"] == pytest.approx(BUDGET / 1.1, rel=1e-5)
    truth = 0.3 * math.log(1.1) - 0.01
    assert equal["difference"]["low"] < truth < equal["difference"]["high"]
    truth = 1.1 * math.exp(-0.01 / 0.3)
    assert to["ratio"]["low"] < truth < to["ratio"]["high"]
    assert to["seconds"]["value"] == pytest.approx(30 * truth, rel=0.01)
    assert to["tokens"]["value"] == pytest.approx(BUDGET * truth / 1.1, rel=0.01)


def test_a_target_beyond_the_schedules_is_not_guessed(lengths):
    edit_json(lengths / "claim.json", target=3.2)
    try:
        (pair,) = summary.summarise(lengths)["time"]["pairs"]
    finally:
        edit_json(lengths / "claim.json", target=None)
    assert pair["to_target"] == {"target": 3.2, "tokens": None, "seconds": None, "ratio": None}


def test_the_nearest_schedule_that_ran(tmp_path):
    """At 110 % of the time, 90 % of the tokens come nearest: 0.99 of the seconds."""
    folder = fake_comparison(tmp_path / "x", TWO, blocks=5, fractions=(80, 90, 100))
    (pair,) = summary.summarise(folder)["time"]["pairs"]
    near = pair["nearest"]
    assert near["fraction"] == 90 and near["n"] == 5
    assert near["time_ratio"]["value"] == pytest.approx(0.99, abs=0.002)
    tokens = near["tokens"] / BUDGET
    assert near["difference"]["value"] == pytest.approx(-0.01 - 0.3 * math.log(0.9), rel=1e-4)
    assert tokens == pytest.approx(0.9, abs=0.01)


def test_break_even_from_its_own_fit_or_the_claims_slope(lengths, screen):
    said = summary.summarise(lengths)
    schedule = next(s for s in said["schedules"] if s["fraction"] == 100)
    even, d = schedule["pairs"][0]["break_even"], schedule["pairs"][0]["difference"]
    slope = said["time"]["fits"]["softmax"]["b"]["value"]
    assert even["b"] == slope and even["low"] < even["value"] < even["high"]
    assert even["value"] == pytest.approx(math.exp(d["value"] / slope) - 1, rel=1e-4)
    assert even["low"] == pytest.approx(math.exp(d["high"] / slope) - 1, rel=1e-4)

    assert the_pair(summary.summarise(screen))["break_even"] is None
    edit_json(screen / "claim.json", slope=[os.path.relpath(lengths, screen.parent)])
    said = summary.summarise(screen)
    edit_json(screen / "claim.json", slope=None)
    even, d = the_pair(said)["break_even"], the_pair(said)["difference"]
    runs = [run for folder in (screen, lengths) for run in summary.read(folder).runs]
    runs = [run for run in runs if run.arm == "softmax"]
    x = np.log([run.header["tokens"] for run in runs])
    y = np.array(summary.finals(runs, said["metric"]))
    b = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert even["b"] == pytest.approx(b, rel=1e-5) and even["from"].endswith("/x")
    assert even["value"] == pytest.approx(math.exp(d["value"] / b) - 1, rel=1e-4)


def test_a_slope_from_other_settings_or_one_length_is_refused(lengths, screen):
    edit_json(screen / "claim.json", slope=[screen.name])
    with pytest.raises(BadLog, match="one length"):
        summary.summarise(screen)
    edit_json(screen / "claim.json", slope=[os.path.relpath(lengths, screen.parent)])
    first = next(run for run in summary.read(lengths).runs if run.arm == "softmax")
    first.header["config"]["matrix_lr"] = 0.5
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadLog, match="matrix_lr"):
        read = summary.read
        other = dataclasses.replace(read(lengths), runs=(first,))
        patch.setattr(summary, "read", lambda f: read(f) if f == screen else other)
        summary.summarise(screen)
    edit_json(screen / "claim.json", slope=None)


def test_few_blocks_give_no_bootstrap_interval(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=3, fractions=(60, 100), noise_sd=0.001)
    said = summary.summarise(folder)
    (pair,) = said["time"]["pairs"]
    assert pair["equal_time"]["difference"]["value"] is not None
    assert pair["equal_time"]["difference"]["low"] is None
    assert "no intervals from fewer than 5 whole blocks" in summary.tables(said)


def test_a_block_without_all_lengths_is_in_no_fit(lengths, tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=3, fractions=LENGTHS)
    cut(folder / "b03_diff_v2_f60")
    said = summary.summarise(folder)
    assert said["time"]["blocks"] == 2
    assert {s["fraction"]: s["pairs"][0]["n"] for s in said["schedules"]} == {
        60: 2,
        80: 3,
        100: 3,
        120: 3,
    }


# ---- Files --------------------------------------------------------------------------------------


def test_a_summary_made_again_is_the_same(lengths):
    summary.write(lengths)
    stored = (lengths / "summary.json").read_text()
    again = summary.summarise(lengths)
    assert stored == summary.text_of(again)
    assert json.loads(stored) == again
    floats: list[float] = []

    def collect(value):
        if isinstance(value, dict | list):
            for v in value.values() if isinstance(value, dict) else value:
                collect(v)
        elif isinstance(value, float):
            floats.append(value)

    collect(again)
    assert len(floats) > 100 and all(v == float(f"{v:.7g}") for v in floats)


def test_a_real_run_without_claim_or_labels(tmp_path, text_data):
    run = T.Trainer(tiny(text_data, tmp_path, run_id="one")).run()
    said = summary.summarise(tmp_path)
    (schedule,) = said["schedules"]
    arm = schedule["arms"]["softmax"]
    assert arm["n"] == 1 and said["metric"] == "val_loss_ext" and said["machines"] == ["CPU"]
    assert arm["losses"] == [pytest.approx(run["val_loss_ext"], rel=1e-6)]
    assert arm["train_s"]["mean"] == pytest.approx(run["train_s"], rel=1e-6)
    assert schedule["tokens"] == run["tokens"] and schedule["pairs"] == []
    assert arm["peak_alloc"] is None and arm["joules"] is None
    assert "softmax  1" in summary.tables(said)


def test_the_command(screen, capsys):
    assert summary.main([str(screen)]) == 0
    plain = capsys.readouterr().out
    assert not (screen / "summary.json").exists()
    assert summary.main([str(screen), "--markdown", "--write"]) == 0
    marked = capsys.readouterr().out
    assert (screen / "summary.json").read_text() == summary.text_of(summary.summarise(screen))
    assert "| arm | n | loss |" in marked and "diff_v2 - softmax  3" in plain
    for table in (block for block in marked.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def spoil_chain(folder):
    path = folder / "b01_softmax" / "run.jsonl"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))


def spoil_schedule(folder):
    (folder / "b01_diff_v2" / "run.jsonl").unlink()
    fake_run(folder, "b01_diff_v2", arm="diff_v2", tokens=BUDGET - 393_216)


def spoil_data(folder):
    fake_run(folder, "other", arm="diff_v1", data=[{"name": "x", "sha256": "0"}])


def spoil_params(folder):
    fake_run(folder, "other", block=9, seed=9, params={"stored": 1})


BAD = {
    "hash chain is broken": spoil_chain,
    "have 38,797,312 and 39,321,600 tokens": spoil_schedule,
    "more than one data": spoil_data,
    "more than one preset": lambda f: fake_run(f, "other", arm="diff_v1", preset="speedrun"),
    "differ in their params": spoil_params,
    "are the same arm in one block": lambda f: fake_run(f, "twice"),
    "has no val_loss_ext": lambda f: fake_run(f, "other", arm="diff_v1", final_val=False),
    "is no JSON": lambda f: (f / "claim.json").write_text("{"),
    "is no JSON object": lambda f: (f / "claim.json").write_text("[]"),
    "plan.json lacks preset, arms": lambda f: (f / "plan.json").write_text('{"name": "x"}'),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_summarised_is_refused(tmp_path, capsys, reason):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=2)
    BAD[reason](folder)
    assert summary.main([str(folder), "--write"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and reason in said.err and said.err.count("\n") == 1
    assert not (folder / "summary.json").exists()


def test_other_schedules_of_the_same_length_are_no_pair(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=1)
    path = folder / "b01_diff_v2"
    lines = read_log(path)
    (path / "run.jsonl").unlink()
    log = T.RunLog(path, active=True)
    for line in lines:
        kind, _ = line.pop("t"), line.pop("h")
        log.write(kind, **(line | {"window": 128} if kind == "step" else line))
    with pytest.raises(BadLog, match="different schedules"):
        summary.summarise(folder)


def test_plans_that_do_not_add_up_are_refused(tmp_path):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=2, plan={"seeds": [0]})
    with pytest.raises(BadLog, match="plans 2 blocks"):
        summary.summarise(folder)
    edit_json(folder / "plan.json", seeds=[0, 1], tokens=[])
    with pytest.raises(BadLog, match="tokens of each fraction"):
        summary.summarise(folder)


@pytest.mark.parametrize("plan", [False, True])
def test_an_empty_folder_holds_no_run(tmp_path, plan):
    folder = fake_comparison(tmp_path / "x", TWO, blocks=1, plan={} if plan else None)
    for path in folder.glob("*/run.jsonl"):
        path.unlink()
    with pytest.raises(BadLog, match="holds no finished run"):
        summary.summarise(folder)
