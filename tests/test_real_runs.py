"""evals/real_runs.py and evals/real_table.py: two tiny arms from training to filed tables; order,
devices and failures of stages; what a results folder refuses; the arithmetic of the tables."""

from __future__ import annotations

import gc
import json
import lzma
import shlex
import shutil
import signal
import sys
from pathlib import Path

import fake_tasks as F
import helpers as H
import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from lm_eval import evaluator

from evals import bits, finetune, harness, real_runs, real_table
from records import board

T = H.T
TASK = """\
task: {name}_offline
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{' ' + choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
WRITTEN = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {max_gen_toks: 4, until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""
KINDS = {"lambada_openai": WORDS, "coqa": WRITTEN}


def write_tasks(folder: Path) -> Path:
    """All that is asked, of 24 made-up items each."""
    docs = [
        {"question": f"{i} and {i * i}?", "choices": ["yes", f"no {i}"], "label": i % 2}
        for i in range(24)
    ]
    data = F.write_jsonl(folder / "docs.jsonl", docs)
    for name in (*harness.TASKS, *real_runs.TUNED.values()):
        head = TASK.format(name=name, data=data, cache=folder / "cache")
        (folder / f"{name}_offline.yaml").write_text(head + KINDS.get(name, CHOICE))
    return folder


class Sitting:
    """The folders of a sitting of two arms on a CPU, and its command line."""

    def __init__(self, base: Path, text: Path, device: str = "cpu"):
        self.results, self.work, self.out = base / "results", base / "work", base / "filed"
        tasks = write_tasks(base / "lm_eval_tasks")
        data = F.write_csqa(F.write_coqa(base / "tasks", dev=22), validation=30)
        self.argv = [
            *("--data", text, "--task-data", data, "--tasks-dir", tasks, "--device", device),
            *("--results", self.results, "--work", self.work, "--epochs", "1"),
            *("--arms", "softmax", "diff_v2", "--tune-seeds", "0", "1", "--preset", "demo"),
            *("--", *H.tiny_argv(text, base)),
        ]
        self.argv = [str(word) for word in self.argv]

    def main(self, *words: str) -> int:
        return real_runs.main([*words, *self.argv])

    def args(self):
        args, _ = real_runs.parse(self.argv)
        real_runs.check(args)
        return args

    def run(self, jobs: list[real_runs.Job], modules: Path) -> None:
        """Stages in this process, as imports take long, and without learning curves, which
        tests/test_finetune.py draws. Frozen, a library's objects are in no collection's way."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with H.own_modules_cache(modules) as patch:
            patch.setattr(evaluator, "add_env_info", lambda results: None)
            patch.setattr(finetune, "draw", lambda *_: "")
            for job in jobs:
                assert job.ready
                gc.freeze()
                assert self.main("--stage", job.name) == 0
        gc.unfreeze()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def sitting(text_data, tmp_path_factory) -> Sitting:
    """Done; its first stage as a process of its own, by the runner."""
    made = Sitting(tmp_path_factory.mktemp("sitting"), text_data)
    real_runs.open_sitting(made.args())
    first, *others = real_runs.jobs_of(made.args())
    runner = real_runs.Runner(made.args(), made.argv)
    runner.waiting = [first]
    assert runner.run() == real_runs.DONE, first.log.read_text()
    made.run(others, tmp_path_factory.mktemp("modules"))
    return made


@pytest.mark.gpu
def test_on_a_gpu(text_data, tmp_path):
    """Trained on the CPU, as tests/test_gpu.py trains; everything after it on the GPU."""
    made = Sitting(tmp_path, text_data, "cuda")
    jobs = real_runs.jobs_of(made.args())
    made.run(jobs, tmp_path / "modules")
    for job in jobs:
        assert real_runs.read(job.file)["stage"] == job.stage.name
    zero = real_runs.read(made.results / "softmax_s0" / "zero.json")["result"]
    assert zero["model"]["dtype"] == "bfloat16" and "NVIDIA" in zero["model"]["device"]
    real_table.file([made.results], made.out, "Tiny", False)


# ---- From training to tables --------------------------------------------------------------------


def test_every_stage_leaves_a_file_of_its_checkpoint(sitting, capsys):
    jobs = real_runs.jobs_of(sitting.args())
    assert len(jobs) == 2 * len(real_runs.STAGES)
    whose = {job.checkpoint: set() for job in jobs}
    for job in jobs:
        said = real_runs.read(job.file)
        assert said["stage"] == job.stage.name
        whose[job.checkpoint].add(said["checkpoint"]["parameters_sha256"])
        model = T.load_checkpoint(job.run)[0]["model"]
        assert said["checkpoint"]["parameters_sha256"] == real_runs.parameter_digest(model)
        dev = H.read_log(job.run, "val")[-1]["dev_loss"]
        assert said["checkpoint"]["dev_loss"] == dev
    assert all(len(digests) == 1 for digests in whose.values())
    assert sitting.main() == real_runs.DONE  # nothing is left to do
    assert capsys.readouterr().out == ""


def test_val_was_not_opened(sitting):
    for log in sitting.results.glob("*/run.jsonl"):
        assert {look["split"] for look in H.read_log(log.parent, "val")} == {"dev"}


def test_what_was_asked(sitting):
    def asked(stage: str) -> list[tuple]:
        found = real_runs.read(sitting.results / "diff_v2_s0" / f"{stage}.json")["result"]
        seeds = found.get("seeds", [found])
        return [
            (i, r["task"], r["shots"], r["bos"]) for i, s in enumerate(seeds) for r in s["results"]
        ]

    names = (*harness.TASKS, *real_runs.TUNED.values())
    bare = (0, "lambada_openai", 0, False)
    assert asked("zero") == [*((0, name, 0, True) for name in names), bare]
    assert asked("five") == [(0, "arc_easy", 5, True), (0, "piqa", 5, True)]
    for tuned, name in real_runs.TUNED.items():
        first = [(0, t, 0, True) for t in (name, *real_runs.ASKED_AFTER)]
        assert asked(f"{tuned}_after") == [*first, bare, (1, name, 0, True)]


@pytest.fixture(scope="module")
def filed(sitting) -> Sitting:
    """With its tables, made while its models are away."""
    sitting.out.parent.mkdir(exist_ok=True)
    shutil.move(sitting.work, sitting.work.with_name("gone"))
    try:
        words = [str(sitting.results), "--out", str(sitting.out), "--title", "Tiny"]
        assert real_table.main(words) == 0
    finally:
        shutil.move(sitting.work.with_name("gone"), sitting.work)
    return sitting


@pytest.fixture
def quick(monkeypatch):
    """Tables without plots and with few resamples: `filed` has all of both."""
    for name in ("draw_bits", "draw_looks", "draw_tuning"):
        monkeypatch.setattr(real_table, name, lambda *_: False)
    monkeypatch.setattr(bits, "RESAMPLES", 100)


def test_filed(filed):
    """README.md, figures, plots and logs, from the results alone; items only where they are
    wanted."""
    sitting = filed
    text = (sitting.out / "README.md").read_text()
    assert "**Two checkpoints, not two architectures.**" in text
    assert "Not done" not in text and "A trial" not in text and str(sitting.work) not in text
    for part in ("### Evaluation Harness\n", "### Fine-tuning, percent", ", after fine-tuning"):
        assert part in text
    names = {path.name for path in sitting.out.iterdir()}
    plots = {f"s1_seed0_{what}.svg" for what in ("bits", "looks", "tuning")}
    assert {*plots, "README.md", "results.json", "logs"} == {n for n in names if ".png" not in n}
    said = json.loads((sitting.out / "results.json").read_text())
    (block,) = said["blocks"]
    assert {row["arm"] for row in said["checkpoints"]} == {"softmax", "diff_v2"}
    assert all(row["parameters_sha256"][:12] in text for row in block["tuned_checkpoints"])
    assert len(block["tuned_checkpoints"]) == 2 * 3 * 2  # arms, forms, seeds
    forms = {(row["form"], row["figure"]) for row in block["tuning"]}
    assert forms >= {("csqa_cloze", "accuracy"), ("csqa_head", "accuracy"), ("coqa", "F1")}
    assert len(block["parts"]) == 10  # what has options, 5-shot included
    assert [row["stage"] for row in block["stages"]] == [*real_runs.STAGES]
    after = [
        (row["tuned"], row["task"], row["bos"], row["n"]) for row in block["after_differences"]
    ]
    for tuned, name in real_runs.TUNED.items():  # the tuned task for both seeds, others for one
        asked = {(name, True, 2), *((t, True, 1) for t in real_runs.ASKED_AFTER)}
        asked |= {("lambada_openai", False, 1)}
        assert {row[1:] for row in after if row[0] == tuned} == asked
    assert all(line.startswith("diff_v2 - softmax") for line in block["in_short"])
    assert len(said["sittings"][0]["files"]) == 2 * len(real_runs.STAGES)
    assert (sitting.out / "logs" / "s1_softmax_s0" / "run.jsonl").is_file()


def test_the_filed_command_is_the_sitting_s(filed):
    """But for the places of data and models, which are the reader's."""
    text = (filed.out / "README.md").read_text()
    words = shlex.split(text.split("```sh\n")[1].split("\n```")[0])
    assert words[:3] == ["python", "-m", "evals.real_runs"]
    again, wanted = real_runs.parse(words[3:])[0], filed.args()
    for name in ("arms", "seeds", "tune_seeds", "preset", "tokens", "epochs", "tasks", "limit"):
        assert getattr(again, name) == getattr(wanted, name)
    assert again.trainer == wanted.trainer


def test_items_are_filed_where_they_are_wanted(sitting, quick, tmp_path):
    real_table.file([sitting.results], tmp_path / "out", "Tiny", items=True)
    with lzma.open(tmp_path / "out" / "items.json.xz", "rt") as f:
        found = json.load(f)["1"]["0"]
    assert len(found["softmax"]["zero"]["result"]["results"][0]["log_likelihoods"]) == 24


def test_the_board_takes_the_folder(filed, tmp_path):
    """A folder below records/evals/ is no track, and its logs must not look like runs of one."""
    root = tmp_path / "repo"
    (root / "records").mkdir(parents=True)
    shutil.copy(H.ROOT / "records" / "tracks.json", root / "records")
    shutil.copytree(filed.out, root / "records" / "evals" / "2026_x")
    assert board.read_board(root).findings == ()


def another(sitting: Sitting, folder: Path, **recipe) -> Path:
    """The same results under another seed and sitting, and recipe."""
    shutil.copytree(sitting.results, folder)
    said = json.loads((folder / "sitting.json").read_text())
    said["sitting"] = "later elsewhere"
    said["recipe"] |= {"seeds": [1], **recipe}
    (folder / "sitting.json").write_text(json.dumps(said))
    for arm in ("softmax", "diff_v2"):
        (folder / f"{arm}_s0").rename(folder / f"{arm}_s1")
    return folder


def test_two_sittings_and_seeds(sitting, quick, tmp_path):
    """Rows stay apart, differences are pooled."""
    other = another(sitting, tmp_path / "other")
    (other / "diff_v2_s1" / "coqa_after.json").unlink()
    real_table.file([sitting.results, other], tmp_path / "out", "Two", False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Four checkpoints, not two architectures.**" in text
    assert "## Sitting 1, pretraining seed 0" in text and "## Sitting 2, pretraining seed 1" in text
    assert "Not done: diff_v2_s1/coqa_after" in text
    pooled = json.loads((tmp_path / "out" / "results.json").read_text())["pooled"]
    assert {"dev loss, nats a token", "coqa F1, points"} <= {row["figure"] for row in pooled}
    assert all(len(row["each"]) == 2 for row in pooled)
    with pytest.raises(T.InputError, match="sitting of another"):
        real_table.load([sitting.results, sitting.results])


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 2}, {"arms": ["diff_v2", "softmax"]}, {"data": "x"}, {"device": "cuda"}],
    ids=lambda changes: next(iter(changes)),
)
def test_sittings_of_other_recipes_are_not_put_together(changes, sitting, tmp_path):
    other = another(sitting, tmp_path / "other", **changes)
    with pytest.raises(T.InputError, match=f"have other recipes: {next(iter(changes))} "):
        real_table.load([sitting.results, other])
    assert real_table.load([other])  # each by itself


def test_other_code_is_refused(sitting, tmp_path):
    """Stage by stage: what is compared was done by the same code for all arms, seeds and
    sittings."""
    other = another(sitting, tmp_path / "other")

    def patch(arm: str) -> None:
        path = other / f"{arm}_s1" / "zero.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "code_sha256": "newer"}))

    patch("softmax")
    said = "stage zero of diff_v2 of sitting 1, pretraining seed 1 ran on other code than that of"
    with pytest.raises(T.InputError, match=f"{said} softmax"):
        real_table.load([other])
    patch("diff_v2")
    assert real_table.load([other])
    with pytest.raises(
        T.InputError, match=r"zero of softmax of sitting 2, .* softmax of sitting 1"
    ):
        real_table.load([sitting.results, other])


# ---- What a results folder refuses --------------------------------------------------------------


def copy_of(sitting: Sitting, folder: Path) -> Sitting:
    made = object.__new__(Sitting)
    made.results, made.work, made.out = folder / "results", sitting.work, folder / "filed"
    shutil.copytree(sitting.results, made.results)
    made.argv = [str(made.results) if w == str(sitting.results) else w for w in sitting.argv]
    return made


def test_another_recipe_is_refused(sitting, tmp_path, capsys):
    made = copy_of(sitting, tmp_path)
    assert real_runs.main(["--limit", "3", "--tokens", "9", *made.argv]) == 2
    said = capsys.readouterr().err
    assert "another recipe: tokens 60000000, now 9; limit 0, now 3" in said


def test_other_data_are_another_recipe(sitting, tmp_path):
    """Digests of what is read, whatever the folders are called."""
    args, base = sitting.args(), sitting.results.parent
    before = real_runs.recipe_of(args)
    assert before == real_runs.read(sitting.results / "sitting.json")["recipe"]
    shutil.copytree(args.data, tmp_path / "text")
    shutil.copytree(base / "tasks", tmp_path / "tasks")
    args.data, args.task_data = tmp_path / "text", tmp_path / "tasks"
    assert real_runs.recipe_of(args) == before
    with (tmp_path / "tasks" / "coqa" / "validation.jsonl").open("a") as f:
        f.write("\n")
    shard = max((tmp_path / "text").glob("*train*"))
    told = bytearray(shard.read_bytes())
    told[-2] ^= 1  # another last token
    shard.write_bytes(told)
    with pytest.raises(T.InputError, match=r"is not what manifest\.json says"):
        real_runs.recipe_of(args)
    (tmp_path / "text" / "manifest.json").unlink()
    (tmp_path / "words").write_text("a")
    args.tokenizer, args.device = str(tmp_path / "words"), "cuda"
    after = real_runs.recipe_of(args)
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {"data", "task_data", "tokenizer", "device"}


def test_files_of_other_weights_are_refused(sitting, tmp_path, capsys):
    made = copy_of(sitting, tmp_path)
    path = made.results / "softmax_s0" / "zero.json"
    shutil.copy(made.results / "diff_v2_s0" / "zero.json", path)
    assert made.main() == 2
    assert "softmax_s0/zero.json is of another checkpoint" in capsys.readouterr().err
    with pytest.raises(T.InputError, match="of another checkpoint"):
        real_table.load([made.results])


def test_a_model_that_is_gone_is_not_trained_again_in_the_same_folder(sitting, tmp_path, capsys):
    made = copy_of(sitting, tmp_path)
    (made.results / "softmax_s0" / "five.json").unlink()
    made.argv = [str(tmp_path / "w") if w == str(sitting.work) else w for w in made.argv]
    assert made.main() == 2
    assert "holds no whole checkpoint" in capsys.readouterr().err


def test_bad_input(sitting, tmp_path, capsys):
    def said(*words: str) -> str:
        assert real_runs.main([*sitting.argv[: sitting.argv.index("--")], *words]) == 2
        return capsys.readouterr().err

    assert "there is no such folder" in said("--data", str(tmp_path / "none"))
    assert "cannot be exported" in said("--arms", "softmax", "mine.py:Arm")
    assert "one of them is there twice" in said("--seeds", "1", "1")
    assert "there is none of this name" in said("--stage", "softmax_s9/zero")
    (tmp_path / "x").write_text("")
    assert "holds other things" in said("--results", str(tmp_path))
    assert real_table.main([str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no file of evals/real_runs.py" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("asked", ["hellaswag", "commonsense_qa", "piqa"])
def test_a_stage_without_a_task_is_done(asked, sitting, monkeypatch):
    """--tasks leaves a stage nothing to ask: an empty result, and no call of the Harness."""
    calls = []

    def evaluate(one, tasks, how, device):
        calls.append(how.tasks)
        return {"model": {}, "results": [*how.tasks]}

    monkeypatch.setattr(harness, "evaluate", evaluate)
    monkeypatch.setattr(harness, "go_offline_or_refuse", lambda *_: None)
    args, found = sitting.args(), {}
    args.tasks = [asked]
    for job in real_runs.jobs_of(args)[: len(real_runs.STAGES)]:
        if job.stage.name in ("five", "csqa_after", "coqa_after"):
            found[job.stage.name] = real_runs.WORK_OF[job.stage.name](job, args)
    assert found["five"]["results"] == [t for t in ("piqa",) if t == asked]
    first, second = ([s["results"] for s in found[f"{t}_after"]["seeds"]] for t in ("csqa", "coqa"))
    assert (
        first
        == {
            **{"hellaswag": [["hellaswag"], []], "piqa": [[], []]},
            "commonsense_qa": [["commonsense_qa"]] * 2,
        }[asked]
    )
    assert second == ([["hellaswag"], []] if asked == "hellaswag" else [[], []])
    assert calls and all(some == [asked] for some in calls)
    files = {stage: {"result": result} for stage, result in found.items()}
    block = real_table.Block(1, "", 0, "softmax", {"softmax": files})
    if asked == "piqa":
        assert real_table.after_rows(block) == []
    else:
        assert real_table.harness_models(block) == []


# ---- The runner ---------------------------------------------------------------------------------

STUB = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}')"


class Stub(real_runs.Runner):
    """Stages are processes that leave an empty file, or do what `does` says."""

    def __init__(self, args, does: dict[str, str]):
        super().__init__(args, [])
        self.does, self.begun = does, []

    def command(self, job):
        beside = [one.job.name for one in self.running]
        self.begun.append((job.name, beside))
        return [sys.executable, "-c", self.does.get(job.name, STUB), str(job.file)]


@pytest.fixture
def args(sitting, tmp_path):
    """Of an empty sitting on two made-up GPUs."""
    args = sitting.args()
    args.results, args.work = tmp_path / "r", tmp_path / "w"
    args.gpus, args.at_once = ["0", "1"], 2
    return args


def test_order_and_devices(args):
    """Each arm on its device, two stages at once there, none beside training; none before what it
    needs; what is done already is not begun."""
    done = args.results / "softmax_s0" / "train.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    runner = Stub(args, {})
    assert runner.run() == real_runs.DONE
    names = [name for name, _ in runner.begun]
    assert sorted(names) == sorted(j.name for j in real_runs.jobs_of(args) if j.file != done)
    for at, (name, beside) in enumerate(runner.begun):
        arm, _, stage = name.partition("/")
        for need in real_runs.STAGES[stage].after:
            assert f"{arm}/{need}" in ["softmax_s0/train", *names[:at]]
        here = [other for other in beside if other.startswith(arm)]
        assert len(here) < 2 and not (here and stage == "train")


def test_a_failure_stops_what_needs_it_and_nothing_else(args, capsys):
    runner = Stub(args, {"softmax_s0/csqa": "print('out of luck'); raise SystemExit(3)"})
    assert runner.run() == real_runs.FAILED
    left = [job.name for job in real_runs.jobs_of(args) if not job.file.is_file()]
    assert left == ["softmax_s0/csqa", "softmax_s0/csqa_after"]
    said = capsys.readouterr().out
    assert "softmax_s0/csqa: FAILED, exit code 3" in said and "out of luck" in said
    assert "softmax_s0/csqa_after: not begun" in said
    assert Stub(args, {}).run() == real_runs.DONE  # again: what is missing


def test_a_stage_without_memory_runs_once_more_alone(args, capsys):
    runner = Stub(args, {"softmax_s0/csqa": "print('no room'); raise SystemExit(5)"})
    assert runner.run() == real_runs.FAILED
    tries = [beside for name, beside in runner.begun if name == "softmax_s0/csqa"]
    assert len(tries) == 2
    assert not any(name.startswith("softmax_s0/") for name in tries[1])
    said = capsys.readouterr().out
    assert "softmax_s0/csqa: out of memory, so once more" in said and said.count("no room") == 2
    assert "softmax_s0/csqa: FAILED, exit code 5" in said


def test_a_stage_that_has_its_card_is_not_tried_again(args):
    args.at_once = 1
    runner = Stub(args, {"softmax_s0/zero": "raise SystemExit(5)"})
    assert runner.run() == real_runs.FAILED
    assert [name for name, _ in runner.begun].count("softmax_s0/zero") == 1


@pytest.mark.parametrize(
    "sharers, advice", [("1", "free its GPU of other processes"), ("4", "run with --at-once 1")]
)
def test_a_stage_without_memory_says_so(sharers, advice, sitting, monkeypatch, capsys):
    """In the Harness, too: with the exit code that the runner goes by."""

    def ask(*_):
        raise T.torch.OutOfMemoryError("no room")

    monkeypatch.setenv(real_runs.memory.SHARERS, sharers)
    monkeypatch.setattr(harness, "go_offline_or_refuse", lambda *_: None)
    monkeypatch.setitem(real_runs.WORK_OF, "five", ask)
    assert sitting.main("--stage", "softmax_s0/five") == T.EXIT_CODES["memory"]
    assert f"real_runs: out of GPU memory (no room): {advice}" in capsys.readouterr().err


def test_time_is_up_and_a_stage_that_hangs(args, monkeypatch):
    hangs = {"softmax_s0/train": "import time; time.sleep(600)"}
    args.minutes = 0.02
    runner = Stub(args, hangs)
    assert runner.run() == real_runs.UNFINISHED
    assert all(one.process.poll() is not None for one in runner.running)
    args.minutes = 0
    short = T.dataclasses.replace(real_runs.STAGES["train"], limit_s=1)
    monkeypatch.setitem(real_runs.STAGES, "train", short)
    runner = Stub(args, hangs)
    assert runner.run() == real_runs.FAILED
    assert [job.name for job in runner.failed] == ["softmax_s0/train"]
    assert (args.results / "diff_v2_s0" / "coqa_after.json").is_file()


def test_dry_run(sitting, tmp_path, capsys):
    argv = [str(tmp_path / "r") if w == str(sitting.results) else w for w in sitting.argv]
    assert real_runs.main(["--dry-run", *argv]) == 0
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if " s at most" in line]) == 16
    assert "ready  softmax_s0/train" in said and "waits  diff_v2_s0/zero" in said
    assert not (tmp_path / "r").exists()


# ---- Arithmetic ---------------------------------------------------------------------------------


def test_a_storys_turns_are_resampled_together():
    """30 stories of 10 turns, all alike within a story: as wide as 30 items are, not 300."""
    story = np.random.default_rng(0).normal(0.1, 1, 30)
    ids, d = np.repeat(np.arange(30), 10), np.repeat(story, 10)
    found = real_table.grouped_difference(ids, np.zeros(300), d)
    whole = bits.difference(np.zeros(30), story)
    assert found.value == pytest.approx(story.mean())
    width = whole.high - whole.low
    assert found.high - found.low == pytest.approx(width, rel=0.05)
    assert real_table.grouped_difference(ids[:100], np.zeros(100), d[:100]).low is None


def tuned(values: list[float], items: list[list[float]]) -> dict:
    """A form's part of a tuning stage's file."""
    ids = list(range(len(items[0])))
    return {
        "seeds": [
            {"seed": i, "figures": {"accuracy": v}, "items": {"ids": ids, "accuracy": some}}
            for i, (v, some) in enumerate(zip(values, items))
        ]
    }


def test_noise_is_what_any_interval_does_not_rule_out():
    """Items and tuning seeds both have a word."""
    zeros, ones = [0.0] * 50, [1.0] * 50
    mixed = [float(i % 2) for i in range(50)]
    first = tuned([10.0, 11.0, 12.0], [zeros] * 3)
    clear = real_table.tuned_difference("accuracy", first, tuned([20.0, 21.5, 22.0], [ones] * 3))
    assert not clear["noise"]
    assert clear["value"] == pytest.approx((10 + 10.5 + 10) / 3)
    by_seeds = tuned([20.0, 2.0, 30.0], [ones] * 3)
    assert real_table.tuned_difference("accuracy", first, by_seeds)["noise"]
    by_items = [[0.5 - v for v in mixed]] * 3
    assert real_table.tuned_difference("accuracy", first, tuned([20, 21.5, 22], by_items))["noise"]
    one = real_table.tuned_difference("accuracy", tuned([10.0], [zeros]), tuned([30.0], [ones]))
    assert one["noise"] and one["seeds"] == [None, None]  # a single seed has no interval


def asked_after(*values: list[float], keys: str = "abc") -> dict:
    """A stage's result: what each tuning seed scored, item by item."""
    return {
        "seeds": [
            {
                "seed": i,
                "results": [{"task": "coqa", "bos": True, "keys": keys, "values": {"f1": v}}],
            }
            for i, v in enumerate(values)
        ]
    }


def test_arms_after_tuning_are_paired_by_item_and_by_seed():
    def found(first: dict, other: dict) -> list[dict]:
        arms = {"softmax": first, "diff_v2": other}
        files = {arm: {"coqa_after": {"result": result}} for arm, result in arms.items()}
        return real_table.after_differences(real_table.Block(1, "", 0, "softmax", files))

    a, b, mixed = [0.0] * 40, [0.5] * 40, [float(i % 2) for i in range(40)]
    (row,) = found(asked_after(a, a), asked_after(b, [0.7] * 40, b))
    assert (row["n"], row["value"], row["noise"]) == (2, pytest.approx(0.6), True)  # by seeds
    assert row["items"] == pytest.approx([0.6, 0.6]) and row["seeds"][0] < 0 < row["seeds"][1]
    (row,) = found(asked_after(a), asked_after(b))
    assert not row["noise"] and row["seeds"] == [None, None]  # one seed: items alone
    table = real_table.after_differences_table("softmax", [row])
    assert "| +50.00 [+50.00, +50.00] | clear |" in table
    (row,) = found(asked_after(mixed), asked_after(b))
    assert row["noise"]
    assert found(asked_after(a, keys="abd"), asked_after(b)) == []


def test_what_no_item_says_rests_on_seeds_alone():
    first, other = (
        tuned([10.0, 11.0, 12.0], [[0.0] * 50] * 3),
        tuned([20, 21.5, 22], [[0.0] * 50] * 3),
    )
    for found in (first, other):
        for seed in found["seeds"]:
            del seed["items"]["accuracy"]
    d = real_table.tuned_difference("accuracy", first, other)
    assert real_table.difference_cells(d)[1:] == ["-", "clear over seeds alone"]


def test_sentence_names_what_is_clear():
    say = real_table.sentence
    assert say("x", {"a": (1.25, False), "b": (-3.0, True)}, 1) == [
        "x: 1 of 2 clear of noise over items: a +1.2."
    ]
    assert say("x", {"b": (-3.0, True)}, 1) == ["x: 0 of 1 clear of noise over items."]
    assert say("x", {}, 1) == []


def block_of(seed: int, **accuracy: float) -> real_table.Block:
    """Arms with a dev loss of a tenth and a CommonsenseQA accuracy as told, of a recipe that begins
    with softmax."""
    arms = {}
    for arm, value in accuracy.items():
        form = {**tuned([value] * 2, [[value / 100] * 40] * 2), "task": "csqa_head", "before": None}
        form["after"] = {"accuracy": {"mean": value, "sd": 0.0, "n": 2}}
        train = {"checkpoint": {"dev_loss": value / 10}}
        arms[arm] = {"train": train, "csqa": {"result": {"results": [form]}}}
    return real_table.Block(1, "", seed, "softmax", arms)


def test_a_seed_without_the_first_arm_is_in_no_difference():
    """diff_v1 is compared with softmax, never with diff_v2, which comes first where it is gone."""
    blocks = [
        block_of(0, softmax=20.0, diff_v2=30.0, diff_v1=50.0),
        block_of(1, diff_v2=30.0, diff_v1=90.0),
        block_of(2, softmax=21.0, diff_v2=30.0, diff_v1=52.0),
    ]
    assert [*real_table.differences_of(blocks[1])] == []
    sitting = real_table.Sitting(Path(), 1, {}, blocks)
    found = {(row["arm"], row["figure"]): row["each"] for row in real_table.pooled([sitting])}
    assert found.pop(("diff_v1", "dev loss, nats a token")) == pytest.approx({0: 3.0, 2: 3.1})
    assert found.pop(("diff_v2", "dev loss, nats a token")) == pytest.approx({0: 1.0, 2: 0.9})
    assert found.pop(("diff_v1", "csqa_head accuracy, points")) == pytest.approx({0: 30, 2: 31})
    assert found.pop(("diff_v2", "csqa_head accuracy, points")) == pytest.approx({0: 10, 2: 9})
    assert found == {}
    assert real_table.pooled([real_table.Sitting(Path(), 1, {}, blocks[:2])]) == []
    tables = [real_table.tuning_table(b.base, real_table.tuned_rows(b)) for b in blocks[:2]]
    whole, without = (table.splitlines()[0] for table in tables)
    assert "diff_v1 - softmax over seeds" in whole and "diff_v2 - softmax over" in whole
    assert " - " not in without and "diff_v1, after" in without


def test_parameter_digest_knows_names_shapes_and_values():
    a = {"x": T.torch.arange(6.0).view(2, 3), "y": T.torch.ones(2)}
    same = {"y": a["y"].clone(), "x": a["x"].clone()}
    assert real_runs.parameter_digest(a) == real_runs.parameter_digest(same)
    for other in ({**a, "x": a["x"].view(3, 2)}, {**a, "y": a["y"] + 1}, {**a, "z": a["y"]}):
        assert real_runs.parameter_digest(other) != real_runs.parameter_digest(a)
