"""records/leaderboard.py: what it builds from logs, and that no doctored folder passes --check.

Most forgeries here are careful: the hash chain is made anew, and so is everything generated, so
that only what --check derives again can catch them.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import fake_runs
import gpu_report
import helpers as H
import pytest
import tamper

from records import leaderboard, logs, pages, slices, verify
from records.board import read_board

T = H.T
TRACK = "open-text"
COMPARED, RECORD, SEEDS = "2026-01-01_compared", "2026-01-02_record", "2026-01-03_seeds"
TARGET = 3.095
ONE_SAMPLE = {"test": "one-sample t, one-sided", "alpha": 0.01, "alternative": "less"}
ONE_SAMPLE |= {"threshold": TARGET, "compare": []}
README = "# Title\n\nBefore.\n\n<!-- figures:begin: made -->\n<!-- figures:end -->\n\nAfter.\n"


def file_record(folder: Path, final=3.09, ms=400.0, **changes) -> Path:
    """A folder that claims a record of softmax."""
    arms = {"softmax": (final, ms)}
    how = {"blocks": 5, "block_sd": 0.001, "kind": "record", "plan": {"rule": ONE_SAMPLE}}
    fake_runs.fake_comparison(folder, arms, **{**how, **changes})
    tamper.edit_json(folder / "claim.json", target=TARGET, title="A record, made up")
    (folder / "README.md").write_text("What changed, why, how to run it again.\n")
    return folder


def file_improvement(folder: Path, gain=0.01, **changes) -> Path:
    """A folder that claims that diff_v2 is better than softmax."""
    arms = {"softmax": (3.5, 400.0), "diff_v2": (3.5 - gain, 440.0)}
    how = {"blocks": 5, "noise_sd": 0.001, "kind": "improvement", "plan": {}}
    fake_runs.fake_comparison(folder, arms, **{**how, **changes})
    (folder / "README.md").write_text("What changed, why, how to run it again.\n")
    return folder


def make_root(root: Path) -> Path:
    """A checkout without records."""
    (root / "records" / TRACK).mkdir(parents=True)
    for name in ("tracks.json", "elsewhere.json"):
        shutil.copy(H.ROOT / "records" / name, root / "records")
    report = {"sections": gpu_report.section_hashes(H.ROOT / "train_gpt.py"), "results": []}
    (root / "records" / "gpu-tests.json").write_text(json.dumps(report))
    (root / "README.md").write_text(README)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An improvement, a record and a baseline, all in order."""
    root = make_root(tmp_path_factory.mktemp("checkout"))
    track = root / "records" / TRACK
    file_improvement(track / COMPARED)
    file_record(track / RECORD)
    fake_runs.fake_comparison(
        track / SEEDS, {"softmax": (3.5, 400.0)}, blocks=3, kind="baseline", block_sd=0.001
    )
    (track / RECORD / "loss_tokens.svg").write_text("<svg/>")
    assert leaderboard.main(["--root", str(root)]) == 0
    return root


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkout")


@pytest.fixture
def folder(root) -> Path:
    """The improvement's."""
    return root / "records" / TRACK / COMPARED


def found(root: Path, rebuilt: bool = True) -> list[str]:
    """--check's findings, as it prints them."""
    if rebuilt:
        assert leaderboard.main(["--root", str(root)]) == 0
    findings = leaderboard.check(read_board(root))
    return [str(f).removeprefix(f"{root}/records/{TRACK}/") for f in findings]


def only(findings: list[str], *patterns: str) -> None:
    """Each finding fits one pattern, and each pattern has one."""
    for pattern in patterns:
        assert any(re.search(pattern, f) for f in findings), (pattern, findings)
    rest = [f for f in findings if not any(re.search(p, f) for p in patterns)]
    assert not rest, rest


# ---- What it builds -----------------------------------------------------------------------------


def test_a_sound_checkout_passes(whole, capsys):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert leaderboard.main(["--root", str(whole), "--check"]) == 0
    assert capsys.readouterr().out == "folders: 3, runs: 18, findings: 0\n"
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def column(text: str, title: str, head: str, name: str) -> list[str]:
    """A column of the table under a title that starts with `head`."""
    lines = text[text.index(title) :].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")][names.index(name)])
    return rows


def test_readme_lists_evaluations(root):
    folder = root / "records" / "evals" / "2026-01-05_two"
    assert "## Evaluations" not in (root / "records" / "README.md").read_text()
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Two arms, asked\n\nMore.\n")
    rows = [
        {"arm": arm, "seed": i, "tokens": 60e6} for arm in ("softmax", "diff_v2") for i in (0, 1)
    ]
    (folder / "results.json").write_text(json.dumps({"checkpoints": rows[:3]}))
    assert leaderboard.main(["--root", str(root)]) == 0
    text = (root / "records" / "README.md").read_text()
    line = "| [Two arms, asked](evals/2026-01-05_two/) | `softmax`, `diff_v2` | 1 | 60.0M |"
    assert f"| 2026-01-05 {line}\n" in text
    assert leaderboard.main(["--check", "--root", str(root)]) == 0


def test_readme_of_the_records(whole):
    text = (whole / "records" / "README.md").read_text()
    log = [logs.load_run(p) for p in sorted((whole / "records" / TRACK / RECORD).glob("b*"))]
    seconds = sum(run.end["train_s"] for run in log) / 5
    loss = sum(run.final("val_loss_ext") for run in log) / 5
    assert column(text, "### Records", "| date", "seconds")[0].startswith(f"{seconds:.1f} ± ")
    assert column(text, "### Records", "| date", "loss")[0].startswith(f"{loss:.4f} ± 0.00")
    assert f"**Current record: {seconds:.1f} s**, [A record, made up]({TRACK}/{RECORD}/)" in text
    assert f"![loss tokens]({TRACK}/{RECORD}/loss_tokens.svg)" in text
    compared = column(text, "### Comparisons", "| date", "difference")
    assert len(compared) == 1 and re.fullmatch(r"-0\.0\d+ \[-0\.\d+, -0\.0\d+\]", compared[0])
    assert column(text, "### Comparisons", "| date", "blocks") == ["5"]
    assert float(column(text, "### Comparisons", "| date", "p")[0]) < 0.01
    assert column(text, "### One arm", "| date", "n") == ["3"]
    assert "Filed runs of this track have opened val 18 times." in text
    # Others' figures stand apart, after every track of ours.
    ours, _, theirs = text.partition("## Elsewhere: published by others, not measured here")
    assert "## demo" in ours and "modded-nanogpt, track 1" in theirs and "| 339M |" in theirs
    assert "339M" not in ours


def test_figures_of_the_first_screen(whole, root):
    text = (whole / "README.md").read_text()
    assert text.startswith("# Title\n\nBefore.\n\n<!-- figures:begin: made -->\n**open-text: ")
    assert text.endswith("<!-- figures:end -->\n\nAfter.\n")
    assert "(target 3.095), n = 5, 1x NVIDIA H100 80GB HBM3: [A record, made up](records/" in text
    assert column(text, "**open-text", "| track", "extra time, %") == ["+10.0"]
    assert column(text, "**open-text", "| track", "ms a step") == ["1320.0 / 1200.0"]
    for name in (COMPARED, RECORD):
        shutil.rmtree(root / "records" / TRACK / name)
    found(root)
    text = (root / "README.md").read_text()
    assert "says nothing about which attention is better, and no record is\nfiled yet" in text
    assert column(text, "figures:begin", "| track", "arm") == ["`softmax`"]
    shutil.rmtree(root / "records" / TRACK / SEEDS)
    assert found(root) == []
    assert "**No GPU result is filed yet**" in (root / "README.md").read_text()


def test_a_screen_never_hides_a_whole_plan(root):
    track = root / "records" / TRACK
    arms = {"softmax": (3.5, 400.0), "diff_v2": (3.6, 440.0)}
    fake_runs.fake_comparison(track / "2026-02-02_later", arms, blocks=2, noise_sd=0.001)
    assert found(root) == []
    text = (root / "README.md").read_text()
    assert column(text, "**open-text", "| track", "blocks") == ["5"]
    assert column((root / "records/README.md").read_text(), "### Comp", "| date", "kind") == [
        "screen",
        "improvement",
    ]


def test_a_plan_before_and_between_its_runs(root, folder):
    """Neither is a fault as long as nothing is claimed; interim is called so."""
    for path in sorted(folder.glob("b0[2-5]_*")):
        shutil.rmtree(path)
    only(found(root), "plan.json: 8 of its 10 runs are missing, first diff_v2 of block 2 at 100 %")
    tamper.edit_json(folder / "claim.json", kind="screen")
    assert found(root) == []
    text = (root / "records" / "README.md").read_text()
    assert column(text, "### Comparisons", "| date", "kind") == ["*interim*: 1 of 5 blocks"]
    assert column(text, "### Comparisons", "| date", "p") == [""]
    assert COMPARED not in (root / "README.md").read_text()
    for path in folder.glob("b0*"):
        shutil.rmtree(path)
    tamper.edit_json(folder / "claim.json", kind="improvement")
    (folder / "summary.json").unlink()
    assert found(root) == []
    assert f"]({TRACK}/{COMPARED}/), planned\n" in (root / "records" / "README.md").read_text()


# ---- Forged logs --------------------------------------------------------------------------------

RUN = "b03_diff_v2"


def lower(row, by=0.003):
    row["val_loss_ext"] -= by


def lower_positions(row):
    for name in row["by_position"]:
        row["by_position"][name] -= 0.05
    lower(row, 0.05)


def faster_end(row):
    row["train_s"] -= 5.0
    row["tokens_per_s"] = round(row["tokens"] / row["train_s"], 1)


def test_an_edit_breaks_the_chain(root, folder):
    log = folder / RUN / "run.jsonl"
    text = log.read_text()
    log.write_text(re.sub(r'"val_loss_ext": 3\.4', '"val_loss_ext": 3.3', text))
    findings = found(root)
    assert f"{COMPARED}/{RUN}/run.jsonl: 160: the hash chain is broken: edited after the run" in (
        findings
    )
    log.write_text(re.sub(r'"h": "[0-9a-f]{4}', '"h": "0000', text, count=1))
    assert any(f"{RUN}/run.jsonl: 1: the hash chain is broken" in f for f in found(root))


def faster_step(row):
    row["train_s"] -= 0.3


def second_val(row):
    row.update(split="val", val_loss=3.6, val_loss_ext=3.6, ext_window=2560)


# Kind of line, change, which of its kind, what is found.
FORGED = [
    ("val", lower, -1, r"its val_loss_ext after step 150 is 3\.48\d+, and by position it is 3"),
    ("val", lower_positions, -1, r"an end-of-text token would cost -58\.\d nats"),
    ("val", lambda r: r.update(dev_loss=r["dev_loss"] + 1), 0, r"its dev_loss after step 19"),
    ("val", lambda r: r.update(targets=5), -1, r"over 5 targets, the track's over 10485760"),
    ("val", lambda r: r.update(tokens=1), 2, r"looks at dev after step 56, which its steps do"),
    ("val", lambda r: r.update(train_s=9.0), 2, r"looks at dev after step 56 at 9\.0 s"),
    ("val", second_val, 2, r"opened val after steps \[56, 150\]: it opens once, at the end"),
    ("end", lambda r: r.update(train_s=100.0), -1, r"ends with 100\.0 s .* last step at 132"),
    ("end", faster_end, -1, r"ends with 127\.0 s of training, and its last look at 132"),
    ("end", lambda r: r.update(tokens_per_s=9e5), -1, r"says 900000\.0 tokens a second"),
    ("end", lambda r: r.update(door_s=60.0), -1, r"from door to loss in 60\.0 s, less than"),
    ("end", lambda r: r.update(tokens=r["tokens"] * 2), -1, r"the same number of tokens"),
    ("end", lambda r: r.update(status="signal", code=75), -1, r"did not finish: signal"),
    ("step", faster_step, 70, r"step 71 took 880\.0 ms by its own line and 580\.000 ms by the"),
    ("step", lambda r: r.update(ms=40.0), 70, r"step 71 took 40\.0 ms by its own line and 880"),
    ("step", lambda r: r.update(tokens=9), 70, r"step 71 has 9 tokens, its schedule 12058624"),
    ("step", lambda r: r.update(stage=2), 70, r"step 71 has 12058624 tokens, its schedule 12189"),
    ("step", lambda r: r.update(step=70), 70, r"has 150 step lines, not one for each of the"),
    ("step", lambda r: r.pop("ms"), 70, r"has a line that no trainer writes: KeyError 'ms'"),
    ("header", lambda r: r.pop("flops_per_token"), 0, r"its header lacks flops_per_token"),
    ("header", lambda r: r["env"].update(driver=None), 0, r"its header lacks env.driver"),
    ("header", lambda r: r.update(seed=9), 0, r"its header says seed 9, and 2 in its config"),
    ("header", lambda r: r.update(run_id="x"), 0, r"the log of run 'x', in another run's fold"),
    ("header", lambda r: r["config"].update(tokens=78_643_200), 0, r"trained 39321600 tokens of "),
    ("header", lambda r: r.update(repeated=1), 0, r"distinct and repeated tokens"),
    ("header", lambda r: r.update(world=2), 0, r"counts 2 ranks and 1 devices"),
]


@pytest.mark.parametrize("kind,change,which,pattern", FORGED)
def test_a_forged_line_with_a_chain_that_holds(root, folder, kind, change, which, pattern):
    tamper.edit(folder / RUN, kind, change, which)
    logs.load_run(folder / RUN)
    said = "\n".join(found(root))
    assert re.search(rf"{COMPARED}/{RUN}/run.jsonl: .*{pattern}", said), said


def test_every_time_of_a_run_forged_alike(root, folder):
    """All seconds by one factor, step by step: what is left is the time from door to loss."""

    def shrink(row):
        for name in ("train_s", "ms"):
            if name in row:
                row[name] = round(row[name] * 0.5, 4)

    rows = tamper.read(folder / RUN)
    for row in rows:
        shrink(row)
    rows[-1]["tokens_per_s"] = round(rows[-1]["tokens"] / rows[-1]["train_s"], 1)
    tamper.write(folder / RUN, rows)
    only(found(root))  # nothing is wrong with it in itself, as RULES.md admits; replay.py remains
    rows[-1]["door_s"] = rows[-1]["train_s"]
    tamper.write(folder / RUN, rows)
    only(found(root), "from door to loss")


def test_foreign_data(root, folder):
    def swap(row):
        row["data"][-1]["sha256"] = "0" * 64

    for run in folder.glob("b*"):
        tamper.edit(run, "header", swap)
    only(found(root), r"run.jsonl: its val shards are not the track's: other sha256 or order")


def test_a_resumed_run(root, folder):
    rows = tamper.read(folder / RUN)
    rows.insert(80, {"t": "event", "kind": "resume", "text": "from step 78"})
    tamper.write(folder / RUN, rows)
    only(found(root), rf"{RUN}/run.jsonl: was resumed")


def test_damaged_files(root, folder):
    (folder / "claim.json").write_text("{")
    (root / "records" / TRACK / RECORD / "plan.json").write_text("{}")
    stray = shutil.copytree(folder, root / "records" / "other" / "2026-01-01_x")
    only(
        found(root),
        rf"{COMPARED}/claim.json: is no JSON",
        rf"{RECORD}/plan.json: lacks arms, baseline, blocks",
        r"records/other: is no track of tracks.json",
    )
    shutil.rmtree(stray.parent)
    (folder / RUN / "run.jsonl").write_bytes(b"\xff\xfe")
    (folder / "claim.json").unlink()
    only(found(root), "claim.json: is missing", "plan.json: lacks")


def test_packed_logs_are_read_like_plain_ones(root, folder, capsys):
    made = (root / "records" / "README.md").read_text(), (folder / "summary.json").read_text()
    size = (folder / RUN / "run.jsonl").stat().st_size
    assert leaderboard.main(["--pack", str(root / "records" / TRACK)]) == 0
    assert "packed 18 logs" in capsys.readouterr().out
    assert not list(root.rglob("run.jsonl"))
    packed = folder / RUN / "run.jsonl.xz"
    assert packed.stat().st_size < size / 2
    assert found(root) == []
    assert made == (
        (root / "records" / "README.md").read_text(),
        (folder / "summary.json").read_text(),
    )
    text = lzma.decompress(packed.read_bytes())
    packed.write_bytes(lzma.compress(text.replace(b'"val_loss_ext": 3.4', b'"val_loss_ext": 3.3')))
    assert any(f"{RUN}/run.jsonl.xz: 160: the hash chain" in f for f in found(root))
    packed.write_bytes(lzma.compress(text)[:-40])
    assert any(f"{RUN}/run.jsonl.xz: cannot be unpacked" in f for f in found(root))
    assert leaderboard.main(["--pack", str(root / "nowhere")]) == 2


# ---- Forged folders -----------------------------------------------------------------------------


def test_dropped_seeds(root, folder):
    away = [folder / f"b02_{arm}" for arm in ("softmax", "diff_v2")]
    shutil.rmtree(away[0])
    only(found(root), r"block 2 lacks the run of softmax \(plain, 100 %\)", "1 of its 10 runs are")
    shutil.rmtree(away[1])
    only(found(root), "block 2 is missing: its seed was dropped", "2 of its 10 runs are missing")


def test_the_last_seed_dropped_of_a_plan(root, folder):
    for arm in ("softmax", "diff_v2"):
        shutil.rmtree(folder / f"b05_{arm}")
    only(found(root), "2 of its 10 runs are missing, first diff_v2 of block 5")


def test_a_whole_block_set_aside(root, folder):
    for arm in ("softmax", "diff_v2"):
        run = folder / f"b05_{arm}"
        shutil.copytree(run, folder / "aside" / f"{run.name}.broken-1")
    only(found(root), r"aside: holds a whole block 5: it was dropped")
    assert "opened val 20 times" in (root / "records" / "README.md").read_text()
    shutil.rmtree(folder / "aside" / "b05_softmax.broken-1")
    assert found(root) == []


def other_order(header):
    header["data_seed"] = header["config"]["data_seed"] = 1


@pytest.mark.parametrize(
    "change,pattern",
    [
        (lambda h: h["labels"].update(sitting="2026-01-02T00:00:00Z"), "is not one block: sitting"),
        (lambda h: h["env"].update(host="node-2"), "is not one block: machine 1x NVIDIA H100"),
        (other_order, "is not one block: data_seed 0 and 1"),
        (lambda h: h.update(labels={}), "belongs to no block"),
    ],
)
def test_what_is_no_block(root, folder, change, pattern):
    tamper.edit(folder / RUN, "header", change)
    assert any(pattern in f for f in found(root))


def test_one_seed_in_two_blocks(root, folder):
    def reseed(row):
        row["seed"] = row["config"]["seed"] = 0

    for arm in ("softmax", "diff_v2"):
        tamper.edit(folder / f"b03_{arm}", "header", reseed)
    findings = found(root)
    assert any("blocks 1 and 3 have the same seeds" in f for f in findings)
    assert any("has seed 0, and plan.json 2" in f for f in findings)


def test_changed_code(root, folder):
    trainer = folder / "code" / "train_gpt.py"
    text = trainer.read_text()
    trainer.write_text(text + "# faster\n")
    findings = found(root)
    assert f"{COMPARED}/code/train_gpt.py: is not what {RUN} ran: another sha256" in findings
    assert f"{COMPARED}/plan.json: was made for another code/train_gpt.py" in findings
    trainer.write_text(text)
    (folder / "code" / "mine.py").write_text("")
    only(found(root), "code/mine.py: is not named by any run's header")
    trainer.unlink()
    assert any("train_gpt.py: is missing" in f for f in found(root))


def test_gpu_tests_must_have_seen_the_record_s_own_trainer(root, folder):
    report = root / "records" / "gpu-tests.json"
    fresh = report.read_text()
    said = json.loads(fresh)
    said["sections"] = {**said["sections"], "Attention": "0" * 16}
    report.write_text(json.dumps(said))
    stale = "section 'Attention' of train_gpt.py changed since the GPU tests"
    only(found(root), rf"{COMPARED}/code/.*{stale}", f"{RECORD}/.*{stale}", f"{SEEDS}/.*{stale}")
    for name in (COMPARED, RECORD, SEEDS):  # a folder's own report outlives later trainers
        (root / "records" / TRACK / name / "gpu-tests.json").write_text(fresh)
    assert found(root) == []


# ---- Plans and claims ---------------------------------------------------------------------------


LATE = "2026-01-01T00:00:01Z"
FOUR_BLOCKS = {"blocks": 4, "seeds": [0, 1, 2, 3], "data_seeds": [0] * 4}


@pytest.mark.parametrize(
    "change,pattern",
    [
        ({"created": LATE}, f"was created at {LATE}, after the first run began"),
        ({"metric": "dev_loss"}, "has metric dev_loss, and claim.json val_loss_ext"),
        ({"seeds": [7, 1, 2, 3, 4]}, "has seed 0, and plan.json 7"),
        ({"tokens": [1]}, "has tokens 39321600, and plan.json 1"),
        ({"settings": {"matrix_lr": 0.5}}, ", and plan.json 0.5"),
        (FOUR_BLOCKS, "b05_diff_v2/run.jsonl: is not in plan.json"),
        ({"source_sha256": {"train_gpt.py": "0"}}, "was made for another code/train_gpt.py"),
        ({"rule": {**ONE_SAMPLE, "threshold": 4.0}}, "must plan a paired test of differences"),
    ],
)
def test_a_plan_that_says_something_else(root, folder, change, pattern):
    tamper.edit_json(folder / "plan.json", **change)
    assert any(pattern in f for f in found(root))


def test_a_lax_rule(root, folder):
    rule = json.loads((folder / "plan.json").read_text())["rule"]
    tamper.edit_json(folder / "plan.json", rule={**rule, "alpha": 0.05})
    only(found(root), "plan.json: must test for less, at alpha 0.01 or below")


def test_a_claim_without_its_plan(root, folder):
    (folder / "plan.json").unlink()
    only(found(root), "plan.json: is missing: kind improvement needs a plan, committed before")


def test_an_improvement_that_is_none(root, folder):
    shutil.rmtree(folder)
    file_improvement(folder, gain=0.0)
    only(found(root), r"claims an improvement, and diff_v2 against softmax has p = 0\.\d+ over 5")
    tamper.edit_json(folder / "claim.json", kind="planned")
    only(found(root))
    assert re.search(rf"\[planned\]\(records/{TRACK}/{COMPARED}/\), p = 0\.\d+", front(root))
    shutil.rmtree(next(folder.glob("b05_diff_v2*")))
    only(found(root), "1 of its 10 runs are missing", "block 5 lacks the run of diff_v2")


def front(root: Path) -> str:
    return (root / "README.md").read_text()


def test_comparisons_in_another_setting_have_rows_of_their_own(root, folder):
    other = file_improvement(folder.parent / "2026-01-09_other", gain=0.02)
    assert leaderboard.main(["--root", str(root)]) == 0
    assert front(root).count("| `diff_v2` | `softmax` |") == 1  # the newest of two alike
    tamper.edit_json(other / "claim.json", setting="rows of 2,048")
    assert leaderboard.main(["--root", str(root)]) == 0
    assert front(root).count("| `diff_v2` | `softmax` |") == 2 and ", rows of 2,048 |" in front(
        root
    )


@pytest.mark.parametrize(
    "preset, copy, shown",
    [("speedrun", False, "r28"), ("speedrun", True, "speedrun"), ("plain", False, "plain")],
)
def test_a_preset_has_its_present_name(preset, copy, shown):
    """What is r28 ran as speedrun before that had a copy head."""
    run = SimpleNamespace(header={"config": {"copy": copy}})
    filed = SimpleNamespace(figures={"preset": preset}, claim={"setting": "x"}, runs=[run])
    assert pages.setting(filed) == f"{shown}, x"


@pytest.mark.parametrize(
    "changes,pattern",
    [
        ({"final": 3.0945}, r"claims a record, and softmax against 3\.095 has p = 0\.\d+ over 5"),
        ({"blocks": 4}, r"has p = 0\.00\d+ over 4: it takes p < 0\.01 and 5 runs"),
        ({"env": {"gpu": "NVIDIA H200"}}, "ran on 1x NVIDIA H200, the track's machine is 1x NVI"),
        ({"params": {"active_matmul": 9}}, "has 9 active matmul parameters, the track wants 11"),
        ({"preset": "gpu24"}, "validates in rows of 65536 tokens, the track in rows of 262144"),
        ({"ms": 500.0}, r"claims a record of 15\d\.. s, and 2026-01-02_record took 12\d\.. s"),
        ({"track": "fineweb"}, "ran for track 'fineweb'"),
    ],
)
def test_a_record_that_is_none(root, changes, pattern):
    file_record(root / "records" / TRACK / "2026-02-01_next", **{"ms": 390.0, **changes})
    findings = found(root)
    assert any(re.search(pattern, f) for f in findings), findings
    assert all(f.startswith("2026-02-01_next") for f in findings)


def test_a_record_of_another_target(root):
    folder = file_record(root / "records" / TRACK / "2026-02-01_next", ms=390.0)
    tamper.edit_json(folder / "claim.json", target=3.2)
    tamper.edit_json(folder / "plan.json", rule={**ONE_SAMPLE, "threshold": 3.2})
    only(found(root), "have the track's val_loss_ext <= 3.095", "mean against the target 3.095")


def git(root: Path, when: str, *words: str) -> None:
    stamp = {"GIT_COMMITTER_DATE": when, "GIT_AUTHOR_DATE": when}
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *words], cwd=root, env={**os.environ, **stamp}, check=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_plan_s_commit(root, folder):
    """Runs began at 2026-01-01 00:00 UTC."""
    plans = [str(p.relative_to(root)) for p in root.glob("records/*/*/plan.json")]
    before, after = "2025-12-31T12:00:00Z", "2026-01-01T12:00:00Z"
    git(root, before, "init", "-q")
    only(found(root), *[f"{n}/plan.json: is not committed" for n in (COMPARED, RECORD)])
    git(root, before, "add", *plans)
    git(root, before, "commit", "-q", "-m", "plans")
    assert found(root) == []
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text + "\n")
    only(found(root), rf"{COMPARED}/plan.json: is not as it was committed")
    git(root, after, "commit", "-q", "-a", "-m", "a second thought")
    only(found(root), rf"{COMPARED}/plan.json: was committed at {after}, after the first run")


# ---- What is generated --------------------------------------------------------------------------


def test_stale_files(root, folder):
    tamper.edit_json(folder / "summary.json", blocks=6)
    only(found(root, rebuilt=False), rf"{COMPARED}/summary.json: is not what the logs make: blocks")
    summary = json.loads((folder / "summary.json").read_text())
    summary["schedules"][0]["pairs"][0]["difference"]["value"] -= 1e-4
    summary["blocks"] = 5
    (folder / "summary.json").write_text(json.dumps(summary))
    only(found(root, rebuilt=False), r"make: schedules\[0\].pairs\[0\].difference.value differs")
    (folder / "summary.json").unlink()
    for name in ("README.md", "records/README.md"):
        path = root / name
        path.write_text(path.read_text().replace("softmax", "hardmax"))
    only(
        found(root, rebuilt=False),
        "summary.json: is missing",
        "/records/README.md: is not what the logs make: run ./run.sh records",
        "/README.md: has figures that the logs do not make",
    )
    assert found(root) == []


def test_no_place_for_figures(root, capsys):
    (root / "README.md").write_text("# Title\n")
    only(found(root, rebuilt=False), r"README.md: needs a line <!-- figures:begin -->")
    before = (root / "records" / "README.md").read_bytes()
    assert leaderboard.main(["--root", str(root)]) == 2
    assert "README.md needs a line <!-- figures:begin -->" in capsys.readouterr().err
    assert (root / "records" / "README.md").read_bytes() == before
    assert leaderboard.main(["--root", str(root / "nowhere")]) == 2


def test_size(root):
    (root / "records" / "big.bin").write_bytes(bytes(8_000_001))
    (root / "records" / "copy.png").write_bytes(bytes(8_000_001))
    (finding,) = found(root)
    size = int(re.search(r"has ([\d,]+) bytes", finding)[1].replace(",", ""))
    assert 8_000_000 < size < 16_000_000


def test_exit_code_and_sentences(root, folder, capsys):
    (folder / "README.md").unlink()
    assert leaderboard.main(["--root", str(root), "--check"]) == 1
    said = f"records/{TRACK}/{COMPARED}/README.md: is missing: what changed, why, how to rerun"
    assert capsys.readouterr().out.splitlines() == [said, "folders: 3, runs: 18, findings: 1"]


# ---- Against the trainer ------------------------------------------------------------------------


def test_what_a_real_run_logs_is_derived_again(text_data, tmp_path):
    """Counts of targets, made by slices.py, against the losses that the trainer logs."""
    rows = {"val_row_tokens": 1024, "val_call_tokens": 2048}
    cfg = H.tiny(text_data, tmp_path, run_id="b01_run", val_tokens=9000, dev_tokens=2001, **rows)
    T.train(cfg)
    track = slices.describe(str(text_data), [1024, 64], 9000, 2001)
    run = logs.load_run(tmp_path / "b01_run")
    counts = track["slices"]["val"]
    assert sum(counts["by_position"]["1024"]) == sum(counts["by_position"]["64"]) == 9000
    assert min(counts["by_position"]["1024"][:3]) > 0 and counts["ends"] > 0
    assert list(verify.check_run(run, track)) == []
    tamper.edit(run.path.parent, "val", lambda row: row.update(dev_loss=row["dev_loss"] - 1e-4), -2)
    (finding,) = verify.check_run(logs.load_run(run.path), track)
    assert re.match(r"its dev_loss after step 8 is \d\.\d+, and by position it is", finding)


def test_the_open_text_track_is_what_its_shards_hold():
    folder = os.environ.get("OPEN_TEXT_TOKENS")
    if not folder:
        pytest.skip("OPEN_TEXT_TOKENS names no folder with the shards of open-text")
    track = json.loads((H.ROOT / "records" / "tracks.json").read_text())[TRACK]
    rows = [int(n) for n in track["slices"]["val"]["by_position"]]
    made = slices.describe(folder, rows, T.DataConfig().val_tokens, T.DataConfig().dev_tokens)
    assert {"data": track["data"], "slices": track["slices"]} == made


def test_this_repository_s_tracks():
    """Every track has what verify.py and pages.py ask of it."""
    tracks = json.loads((H.ROOT / "records" / "tracks.json").read_text())
    keys = {frozenset(track) for track in tracks.values()}
    assert len(keys) == 1
    text = (H.ROOT / "records" / TRACK / "DATA.md").read_text()
    for row in tracks[TRACK]["data"]:
        assert row["sha256"] in text and f"{row['tokens']:,}" in text
