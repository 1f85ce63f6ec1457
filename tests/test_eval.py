"""evals/harness.py and what it stands on: bits a byte, pairing, the harness on tiny models with
local tasks, the table, scores of earlier sittings; what is refused. The real tasks, where a folder
of them is there: EVAL_TASKS_DIR, or one beside the clone."""

from __future__ import annotations

import json
import math
import os
import shutil
import types
from pathlib import Path

import helpers as H
import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.models.utils import Collator
from test_export import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from data import doctor
from evals import bits, export, harness, sample, score_table, scores

T = H.T
EOT, N = 256, 24

# ---- numbers ------------------------------------------------------------------------------------


def test_bits_a_byte_by_hand():
    """An answer of 4 bytes at 8 bits, one of 3 bytes (é has two) at 6."""
    nats = [-8 * math.log(2), -6 * math.log(2)]
    sizes = [bits.scored_bytes("Is it?", " yes"), bits.scored_bytes("Is it?", "té")]
    assert sizes == [4, 3]
    assert bits.bits_a_byte(nats, sizes) == pytest.approx([2.0, 2.0])
    assert bits.scored_bytes("Is it? \n", " yes") == 6  # the harness moves " \n" into the answer


def test_bits_in_two_parts():
    """Options of 1/4 and 1/4, the answer of 1 byte: a bit for one of them, a bit for which. One of
    1/8 alone, of 3 bytes: nothing is left to choose."""
    quarter, eighth = math.log(1 / 4), math.log(1 / 8)
    any_of_them, right = bits.parts([[quarter, quarter], [eighth]], [1, 0], [1, 3])
    assert any_of_them.tolist() == pytest.approx([1, 1])
    assert right.tolist() == pytest.approx([1, 0])


def test_mean():
    found = bits.mean([1.0, 2.0, 4.0, 5.0])
    assert (found.value, found.n) == (3.0, 4)
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4))
    assert bits.mean([7.0]) == bits.Mean(7.0, None, 1)


def test_difference_is_paired_and_its_interval_is_that_of_the_mean():
    """Items differ by 1, the models by 0.05: pairing sees it, two separate errors would not. The
    resampled interval is the normal one of a mean, half a width of 1.96 s / sqrt(n), within 5 %
    (10,000 resamples pin a percentile to about 2 % of the half width)."""
    rng = np.random.default_rng(1)
    hard = rng.normal(3, 1, 500)
    a, b = hard, hard - 0.05 + rng.normal(0, 0.2, 500)
    found = bits.difference(a, b)
    d = b - a
    assert found.value == pytest.approx(d.mean())
    half = 1.96 * d.std(ddof=1) / math.sqrt(500)
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)
    assert not found.noise
    assert bits.mean(a).error > abs(found.value) / 2
    back = bits.difference(b, a)
    assert back.value == -found.value
    assert back.high == pytest.approx(-found.low, rel=0.05)


def test_noise():
    same = bits.difference(np.ones(50), np.ones(50))
    assert same.noise and (same.low, same.high) == (0, 0)
    flips = np.tile([1.0, -1.0, 0.0, 0.0], 25)
    assert bits.difference(np.zeros(100), flips).noise
    assert not bits.difference(np.zeros(100), np.ones(100)).noise
    few = bits.difference(np.zeros(19), np.ones(19))
    assert few.noise and (few.value, few.low) == (1.0, None)


# ---- tiny models, local tasks -------------------------------------------------------------------

COMMON = "dataset_path: json\ntest_split: test\n"
TASKS = {
    # answers of several lengths; the name by which GPT-2's figures are known
    "piqa_offline": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "yesno": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{label % 2}}"
metric_list: [{metric: acc}]
""",
    # as in WinoGrande: options stand in the context, the same words follow
    "wino_tiny": """\
output_type: multiple_choice
doc_to_text: label
doc_to_choice: "{{choices}}"
doc_to_target: question
metric_list: [{metric: acc}]
""",
    "lambada_tiny": """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{' ' + choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "words": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {max_gen_toks: 4, until: ["\\n\\n"]}
metric_list: [{metric: exact_match}]
""",
}
WORDS = ("yes", "perhaps not", "träge", "on the moon", "never", "it is said to be so", "no")


def docs() -> list[dict]:
    draw = np.random.default_rng(0).integers
    return [
        {
            "question": f"Item {i}: {' '.join(WORDS[j] for j in draw(0, 7, draw(2, 6)))}?",
            "choices": [WORDS[(i + k) % 7] for k in range(3 if i % 4 else 2)],
            "label": i % 2,
        }
        for i in range(N)
    ]


def write_tasks(folder: Path, names=TASKS) -> Path:
    folder.mkdir(parents=True)
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs()))
    kwargs = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
    for name in names:
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{kwargs}{TASKS[name]}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_and_clean(tmp_path_factory):
    """The harness lists every package that is installed, a second a call."""
    with H.own_modules_cache(tmp_path_factory.mktemp("modules")) as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


class Sitting:
    """Two models through the command: a run of diff_v2, and a stock GPT-2 in a folder."""

    def __init__(self, base: Path):
        self.run = checkpoint(base / "run", "demo", {"arm": "diff_v2"})
        gpt2 = checkpoint(base / "gpt2", "gpt2", {"arm": "softmax"}, window=1024)
        self.folder, self.out = base / "gpt2-tiny", base / "out"
        export.export(gpt2, self.folder, "fp32")
        self.tasks = write_tasks(base / "tasks")
        self.code = harness.main(self.argv(self.run, self.folder, "--shots", 0, 1, out=self.out))
        # the scorer of the first model, by the trainer's code
        self.ours, meta = T.load_model(self.run, "cpu", 512)
        self.window = T.windows(int(meta["config"]["ext_window"]), "cpu")

    def argv(self, *words, out: Path) -> list[str]:
        names = ["piqa", "yesno", "wino", "lambada_tiny", "words"]
        fixed = ["--tasks", *names, "--tasks-dir", self.tasks, "--device", "cpu", "--out", out]
        return [str(word) for word in (*words, *fixed)]

    def scores(self, name: str) -> dict:
        return json.loads((self.out / f"{name}.scores.json").read_text())

    def result(self, name: str, task: str, shots: int = 0, bos: bool = True) -> dict:
        (found,) = (
            r
            for r in self.scores(name)["results"]
            if (r["task"], r["shots"], r["bos"]) == (task, shots, bos)
        )
        return found

    @torch.no_grad()
    def nats(self, context: str, answer: str, bos: bool = True) -> float:
        ids = torch.tensor([[EOT] * bos + [*f"{context}{answer}".encode()]])
        logits = self.ours.logits(ids, torch.zeros_like(ids), self.window)[0, :-1]
        each = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        return float(each[-len(answer.encode()) :].double().sum())


@pytest.fixture(scope="module")
def sitting(tmp_path_factory) -> Sitting:
    made = Sitting(tmp_path_factory.mktemp("sitting"))
    assert made.code == 0
    return made


def test_multiple_choice_is_the_trainer_s(sitting):
    """Log-likelihoods behind end-of-text, the right answer's bits a byte, both accuracies."""
    found = sitting.result("diff_v2", "piqa")
    assert (found["items"], found["of"], found["harness_task"]) == (N, N, "piqa_offline")
    plain = normed = 0
    for i, doc in enumerate(docs()):
        nats = [sitting.nats(doc["question"], f" {c}") for c in doc["choices"]]
        assert found["log_likelihoods"][i] == pytest.approx(nats, abs=1e-3)
        gold, answer = doc["label"], f" {doc['choices'][doc['label']]}".encode()
        wanted = -nats[gold] / math.log(2) / len(answer)
        assert found["values"]["bits_a_byte"][i] == pytest.approx(wanted, abs=1e-3)
        plain += int(np.argmax(nats)) == gold
        normed += int(np.argmax([n / len(c) for n, c in zip(nats, doc["choices"])])) == gold
    assert found["metrics"] == {"acc": plain / N, "acc_norm": normed / N}
    assert np.mean(found["values"]["acc_norm"]) == normed / N
    assert found["chance"] == pytest.approx((6 / 2 + 18 / 3) / N)
    assert found["constant"] is None


def test_options_in_the_context_and_yes_or_no(sitting):
    wino, yesno = sitting.result("diff_v2", "wino"), sitting.result("diff_v2", "yesno")
    for i, doc in enumerate(docs()):
        nats = [sitting.nats(option, f" {doc['question']}") for option in doc["choices"]]
        assert wino["log_likelihoods"][i] == pytest.approx(nats, abs=1e-3)
        size = len(f" {doc['question']}".encode())
        wanted = -nats[doc["label"]] / math.log(2) / size
        assert wino["values"]["bits_a_byte"][i] == pytest.approx(wanted, abs=1e-3)
    assert wino["right"] == [doc["label"] for doc in docs()]
    assert wino["constant"] is None
    assert (yesno["chance"], yesno["constant"]) == (0.5, 0.5)


def test_lambada_is_run_behind_end_of_text_and_without(sitting):
    for bos in (True, False):
        found = sitting.result("diff_v2", "lambada_tiny", bos=bos)
        nats = [sitting.nats(d["question"], f" {d['choices'][0]}", bos) for d in docs()]
        assert [row[0] for row in found["log_likelihoods"]] == pytest.approx(nats, abs=1e-3)
        assert found["metrics"]["perplexity"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    settings = [(r["task"], r["bos"]) for r in sitting.scores("gpt2-tiny")["results"]]
    bare = [task for task, bos in settings if not bos]
    assert bare == ["lambada_tiny"] * 2  # in both shots


def test_auto_batches_hold_so_many_tokens(monkeypatch):
    """Requests come sorted, the longest first; the harness asks for each one which batch it ends.
    Everything is asked once, no batch is above the budget unless a single request is."""
    lm = object.__new__(scores.LM)
    lm.chunk = 0, 0
    monkeypatch.setattr(scores.LM, "call_tokens", 100)
    monkeypatch.setattr(scores.LM, "max_length", 60)
    lengths = [70, 60, 50, 33, 33, 33, 20, *[9] * 30]
    requests = [(None, [0] * (n - 1), [0]) for n in lengths]
    chunks = [*Collator.get_chunks(requests, fn=lm._batch_scheduler)]
    assert [r for chunk in chunks for r in chunk] == requests
    assert [len(chunk) for chunk in chunks] == [1, 1, 2, 3, 11, 11, 8]
    again = [*Collator.get_chunks(requests[-5:], fn=lm._batch_scheduler)]  # of another task
    assert [len(chunk) for chunk in again] == [5]
    assert lm._detect_batch_size() == scores.WRITING * 100 // 60


def test_auto_batches_keep_to_what_the_process_may_hold(monkeypatch):
    lm = object.__new__(scores.LM)
    lm.halved, lm._device = 0, torch.device("cuda")
    lm._model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=50_000))
    card = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    for allowed, tokens in ((80, 16_000), (40, 16_000), (20, 10_000)):
        monkeypatch.setattr(scores.memory, "allowed", lambda _, n=allowed: n * 10**9)
        assert lm.call_tokens == tokens
    lm.halved = 2
    assert lm.call_tokens == 2_500


@pytest.mark.parametrize("fault", ["auto", "16"])
def test_too_big_a_batch_is_asked_again_in_halves(fault, sitting, tmp_path, monkeypatch, capsys):
    """The results are those of batches that fit; whose rows were told ends with 5 and a flag."""
    model, generate, rows = scores.LM._model_call, scores.LM._model_generate, []

    def small(self, inps, *args, **kwargs):
        rows.append(len(inps))
        if len(inps) > 3:
            raise torch.OutOfMemoryError("no room. If reserved")
        return model(self, inps, *args, **kwargs)

    def small_too(self, context, **kwargs):
        if len(context) > 3:
            raise torch.OutOfMemoryError("no room")
        return generate(self, context, **kwargs)

    monkeypatch.setattr(scores.LM, "_model_call", small)
    monkeypatch.setattr(scores.LM, "_model_generate", small_too)
    out = tmp_path / "out"
    argv = sitting.argv(sitting.folder, "--shots", 0, "--batch-size", fault, out=out)
    if fault != "auto":
        assert harness.main(argv) == 5
        said = capsys.readouterr().err
        assert "eval: out of GPU memory (no room): run again with --batch-size 8" in said
        return
    assert harness.main(argv) == 0
    assert max(rows) > 3 and rows[-1] <= 3
    for found in json.loads((out / "gpt2-tiny.scores.json").read_text())["results"]:
        before = sitting.result("gpt2-tiny", found["task"], 0, found["bos"])
        assert found.get("texts") == before.get("texts")
        for a, b in zip(found.get("log_likelihoods", []), before.get("log_likelihoods", [])):
            assert a == pytest.approx(b, abs=1e-3)


def test_auto_batches_and_texts_tokenized_at_once_change_nothing(sitting, tmp_path):
    argv = sitting.argv(sitting.folder, "--shots", 0, "--batch-size", "auto", out=tmp_path / "out")
    assert harness.main(argv) == 0
    path = tmp_path / "out" / "gpt2-tiny.scores.json"
    for found in json.loads(path.read_text())["results"]:
        before = sitting.result("gpt2-tiny", found["task"], 0, found["bos"])
        assert found["keys"] == before["keys"]
        for a, b in zip(found.get("log_likelihoods", []), before.get("log_likelihoods", [])):
            assert a == pytest.approx(b, abs=1e-3)


def test_generated_answers_have_no_bits(sitting):
    found = sitting.result("diff_v2", "words")
    assert list(found["values"]) == ["exact_match"]
    assert len(found["texts"]) == N


def test_few_shot_prompts_are_other_prompts(sitting):
    zero, one = (sitting.result("diff_v2", "piqa", shots) for shots in (0, 1))
    assert not set(zero["keys"]) & set(one["keys"])
    assert one["keys"] == sitting.result("gpt2-tiny", "piqa", 1)["keys"]
    assert zero["log_likelihoods"] != one["log_likelihoods"]


def test_facts_identify_the_weights(sitting):
    run, folder = (sitting.scores(name)["model"] for name in ("diff_v2", "gpt2-tiny"))
    assert run["run"]["arm"] == "diff_v2"
    assert run["run"]["state_sha256"] == sample.meta_of(sitting.run)["sha256"]
    assert (run["dtype"], run["max_length"]) == ("float32", 4096)
    assert (folder["architecture"], folder["max_length"]) == ("GPT2LMHeadModel", 1024)
    assert folder["run"] is None
    model = AutoModelForCausalLM.from_pretrained(sitting.folder)
    assert folder["parameters"] == sum(p.numel() for p in model.parameters())
    assert len({run["weights_sha256"], folder["weights_sha256"]}) == 2


# ---- the table ----------------------------------------------------------------------------------


def row_of(table: dict, task: str, measure: str, shots: int = 0, bos: bool = True) -> dict:
    wanted = (task, measure, shots, bos)
    (row,) = (r for r in table["rows"] if (r["task"], r["measure"], r["shots"], r["bos"]) == wanted)
    return row


def test_table_pairs_models_and_shows_what_is_published(sitting):
    table = json.loads((sitting.out / "table.json").read_text())
    for measure in ("bits_a_byte", "acc", "acc_norm"):
        a, b = (
            np.array(sitting.result(name, "piqa")["values"][measure])
            for name in ("diff_v2", "gpt2-tiny")
        )
        row = row_of(table, "piqa", measure)
        (d,) = row["differences"]
        assert d["value"] == pytest.approx((b - a).mean())
        assert d["low"] <= d["value"] <= d["high"]
        assert row["noise"] == [d["low"] <= 0 <= d["high"]]
        for x, mean in zip((a, b), row["means"]):
            assert mean["value"] == pytest.approx(x.mean())
            assert mean["error"] == pytest.approx(x.std(ddof=1) / math.sqrt(N))
    assert row_of(table, "piqa", "acc")["published"] == [0.6289, 0.0113]
    assert row_of(table, "piqa", "acc", shots=1)["published"] is None
    perplexity = row_of(table, "lambada_tiny", "perplexity", bos=False)
    assert perplexity["differences"] == [None]
    nats = sitting.result("diff_v2", "lambada_tiny", bos=False)["values"]["perplexity"]
    value, error = perplexity["means"][0]["value"], perplexity["means"][0]["error"]
    assert value == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    assert error == pytest.approx(value * np.std(nats, ddof=1) / math.sqrt(N), rel=1e-4)


def test_table_for_people(sitting):
    text = (sitting.out / "table.md").read_text()
    lines = text.splitlines()
    lead, scores_ = (
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in ("Zero-shot: bits a byte", "Zero-shot: scores")
    )
    assert lead < scores_
    rows = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in rows if "chance" not in line}) == 2  # of two shapes
    (piqa,) = [
        line for line in lines[scores_:][:9] if line.startswith("| piqa") and "norm" not in line
    ]
    assert "62.89 ± 1.13" in piqa
    assert "lambada_tiny, bare" in text
    assert "yesno: the same answer to every item would score 50.00" in text
    assert "Two checkpoints, not two architectures" in text
    assert "--limit" not in text
    table = json.loads((sitting.out / "table.json").read_text())
    quiet = sum(all(row["noise"]) for row in table["rows"] if row["differences"] != [None])
    assert sum(line.endswith("noise |") or " noise " in line for line in rows) == quiet


def test_earlier_scores_make_the_same_table(sitting, tmp_path, capsys):
    files = [str(sitting.out / f"{name}.scores.json") for name in ("diff_v2", "gpt2-tiny")]
    assert harness.main([*files, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "table.md").read_text() == (sitting.out / "table.md").read_text()
    capsys.readouterr()
    assert harness.main([files[0], files[0], "--out", str(tmp_path / "self")]) == 0
    rows = json.loads((tmp_path / "self" / "table.json").read_text())["rows"]
    values = {d["value"] for row in rows for d in row["differences"] if d}
    assert values == {0.0}
    assert "diff_v2 #2 - diff_v2 #1" in capsys.readouterr().out


def test_limit_says_so_and_items_must_be_the_same(sitting, tmp_path, capsys):
    argv = [sitting.run, "--limit", 5, "--tasks", "piqa", "--shots", 0, "--device", "cpu"]
    argv = [*map(str, argv), "--tasks-dir", str(sitting.tasks)]
    assert harness.main([*argv, "--out", str(tmp_path / "few")]) == 0
    assert "NOT the tasks' scores: --limit took the first items alone (piqa 5 of 24)" in (
        capsys.readouterr().out
    )
    few, all_of_them = (
        tmp_path / "few" / "diff_v2.scores.json",
        sitting.out / "gpt2-tiny.scores.json",
    )
    assert json.loads(few.read_text())["results"][0]["items"] == 5
    assert "were not asked the same items" in refused([few, all_of_them], tmp_path, capsys)


def test_cut_prompts_are_counted(sitting, tmp_path, capsys):
    """A model sees all but the last token: what has one token more than it is shown is not cut."""
    answers = [[f"{d['question']} {c}".encode() for c in d["choices"]] for d in docs()]
    lengths = [1 + max(map(len, row)) for row in answers]  # <|endoftext|>
    most = sorted(lengths)[N // 2] - 1
    argv = [sitting.folder, "--tasks", "piqa", "--shots", 0, "--device", "cpu", "--tasks-dir"]
    argv = [*argv, sitting.tasks, "--max-length"]
    assert harness.main([str(word) for word in (*argv, most, "--out", tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "gpt2-tiny.scores.json").read_text())["results"][0]
    assert 0 < found["cut"] == sum(n > most + 1 for n in lengths) < N
    assert f"cut on the left to fit: gpt2-tiny piqa 0-shot {found['cut']}" in (
        capsys.readouterr().out
    )
    assert "longer than --max-length 8" in refused([*argv, 8], tmp_path, capsys)


# ---- what is refused ----------------------------------------------------------------------------


def refused(words: list, tmp_path: Path, capsys) -> str:
    """The one sentence; nothing is written."""
    out = tmp_path / "refused"
    capsys.readouterr()
    assert harness.main([*map(str, words), "--out", str(out)]) == 2
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("eval: ")]
    assert len(lines) == 1
    assert not list(out.glob("table*"))
    return lines[0]


def test_bad_input_is_one_sentence_and_2(sitting, tmp_path, capsys, monkeypatch):
    run, tasks = sitting.run, ["--tasks-dir", sitting.tasks, "--tasks", "piqa"]
    assert "there is no" in refused([tmp_path / "none", *tasks], tmp_path, capsys)
    assert "no whole checkpoint" in refused([tmp_path, *tasks], tmp_path, capsys)
    assert "no such folder" in refused([run, "--tasks-dir", tmp_path / "x"], tmp_path, capsys)
    bad = [run, *tasks[:2], "--tasks", "piqa", "hellaswag"]
    assert "has no task 'hellaswag'; it has" in refused(bad, tmp_path, capsys)
    twice = [run, *tasks[:2], "--tasks", "piqa", "piqa_offline"]
    assert "two of them are the same" in refused(twice, tmp_path, capsys)
    odd = checkpoint(tmp_path / "odd", "demo", {"vocab": 999})
    assert "--tokenizer FILE" in refused([run, odd, *tasks], tmp_path, capsys)
    assert not list(tmp_path.glob("refused/*")), "the first model was not run"
    arm = f"{H.ARMS / 'temperature.py'}:Temperature"
    mine = checkpoint(tmp_path / "mine", "demo", {"arm": arm})
    assert "not built in" in refused([run, mine, *tasks], tmp_path, capsys)
    (tmp_path / "other.json").write_text("{}")
    assert "no file of scores" in refused([tmp_path / "other.json"], tmp_path, capsys)
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "mine.txt").write_text("keep")
    assert "empty or new" in refused([run, *tasks], tmp_path, capsys)
    shutil.rmtree(tmp_path / "refused")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused([run, *tasks], tmp_path, capsys)


def test_bad_folders(sitting, tmp_path, capsys):
    tasks = ["--tasks-dir", sitting.tasks, "--tasks", "piqa"]

    def changed(name: str, **settings) -> Path:
        folder = tmp_path / name
        shutil.copytree(sitting.folder, folder)
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    bare = changed("bare")
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused([bare, *tasks], tmp_path, capsys)
    small = changed("small", vocab_size=200)
    assert "cannot be loaded" in refused([small, *tasks], tmp_path, capsys)
    theirs = changed("theirs", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    assert "--trust-remote-code" in refused([theirs, *tasks], tmp_path, capsys)
    tuned = changed("tuned", finetuned=[{"trained_on": "piqa's own items", "tainted": ["piqa"]}])
    assert "was fine-tuned on piqa's own items" in refused([tuned, *tasks], tmp_path, capsys)
    unknown = changed("unknown", model_type="mine")
    assert "cannot be loaded" in refused([unknown, *tasks], tmp_path, capsys)


def test_a_smaller_vocabulary_than_the_tokenizer_s_is_refused(sitting, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "folder")
    for path in sitting.folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "folder")
    how = {"device": "cpu", "dtype": "fp32", "batch_size": "1", "max_length": 0, "trust": False}
    with pytest.raises(T.InputError, match="tokenizer has 257 tokens, its model 200"):
        scores.load_model(tmp_path / "folder", **how)


def test_no_network_is_said_at_once(sitting, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "reach", lambda url, timeout_s=3.0: False)
    said = refused([sitting.run, "--tasks", "piqa"], tmp_path, capsys)
    assert "cannot be reached" in said
    assert "--tasks-dir" in said
    harness.go_offline_or_refuse(str(sitting.tasks))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_task_without_its_data_is_refused(sitting, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks", ["yesno"])
    (folder / "docs.jsonl").unlink()
    said = refused([sitting.run, "--tasks-dir", folder, "--tasks", "yesno"], tmp_path, capsys)
    assert "task yesno cannot be loaded" in said


# ---- the published figures, the real tasks ------------------------------------------------------


SIZES = {
    **{"arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270, "hellaswag": 10042},
    **{"piqa": 1838, "winogrande": 1267, "lambada_openai": 5153},
}


def test_published_figures_have_a_source_and_errors_that_fit():
    said = score_table.PUBLISHED
    assert said["source"].startswith("https://")
    assert set(said["figures"]) == set(SIZES)
    for task, measures in said["figures"].items():
        for measure, (value, error) in measures.items():
            if measure != "perplexity":  # a proportion's standard error follows from the count
                wanted = math.sqrt(value * (1 - value) / SIZES[task])
                assert error == pytest.approx(wanted, rel=0.02)


def real_tasks() -> Path:
    default = H.ROOT.parent / "shared" / "data" / "evals" / "lm_eval_tasks"
    folder = Path(os.environ.get("EVAL_TASKS_DIR") or default)
    if not list(folder.glob("*.yaml")):
        pytest.skip("EVAL_TASKS_DIR names no folder of task files with their data")
    return folder


@pytest.mark.slow
def test_the_eight_tasks_run_offline(tmp_path, capsys):
    one_layer = {"n_layer": 1, "long_layers": (0,), "skip": (), "backout": -1, "value_tables": 1}
    run = checkpoint(tmp_path / "run", "demo", one_layer)
    argv = [run, "--tasks-dir", real_tasks(), "--limit", 2, "--shots", 0, "--batch-size", 4]
    argv = [*argv, "--device", "cpu", "--out", tmp_path / "out"]
    assert harness.main([str(word) for word in argv]) == 0
    found = json.loads((tmp_path / "out" / "softmax.scores.json").read_text())["results"]
    sizes = {**SIZES, "openbookqa": 500}
    assert {r["task"]: r["of"] for r in found} == sizes
    assert all(len(r["values"]["bits_a_byte"]) == 2 for r in found)
    assert "NOT the tasks' scores" in capsys.readouterr().out
