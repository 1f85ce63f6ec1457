"""evals/hellaswag.py: the same tokens, log-likelihoods and choices as the Evaluation Harness's own
task; ranks; the hook in a run, and the command that trains with it; what is refused."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import helpers as H
import numpy as np
import pytest
import torch
from test_data_text import open_text

from evals import hellaswag, sample
from variants import gpt2

os.environ.setdefault("HF_HUB_OFFLINE", "1")
T = H.T

# ---- items --------------------------------------------------------------------------------------

WORDS = ("the", "a", "man", "dog", "river", "ladder", "slowly", "red", "up", "paints", "climbs")


def made_items(number: int) -> list[dict]:
    """Items with what the real ones have: WikiHow's marks, endings that begin with a space once
    cleaned, characters of several bytes, an empty second context, labels as text. One context is
    longer than the 1,024 positions of GPT-2, one ends in white space once cleaned."""
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    items = []
    for i in range(number):
        endings = [f"{text(int(rng.integers(2, 9)))}." for _ in range(4)]
        if i % 3 == 0:
            endings = [f"[substeps] {e.replace('a', 'ä€')}  [title] {text(2)}." for e in endings]
            endings[1] = "日本語のテキスト、長い。" * 2
        item = {
            "ind": i,
            "activity_label": text(2),
            "ctx_a": f"[header] {text(9)}. [step] {text(4)}.",
        }
        item |= {"ctx_b": "" if i % 2 else text(2), "endings": endings, "label": str(i % 4)}
        items.append(item)
    items[4]["ctx_a"] = text(260)
    items[5]["ctx_b"] = "the man [substeps]"
    return items


def write_items(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


TASK = """\
task: hellaswag_made
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function stock.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def items_file(tmp_path_factory) -> Path:
    return write_items(tmp_path_factory.mktemp("items") / "hellaswag.jsonl", made_items(24))


@pytest.fixture(scope="module")
def tasks(items_file):
    """The harness's own task on these items: its prompts, and its code for cleaning them."""
    pytest.importorskip("lm_eval")
    from evals import scores

    folder = items_file.parent / "tasks"
    folder.mkdir()
    (folder / "hellaswag.yaml").write_text(TASK.format(data=items_file, cache=folder / "cache"))
    (folder / "stock.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    return scores.find_tasks(str(folder), ["hellaswag"])


SMALL = {
    **{"n_layer": 3, "d_model": 64, "n_head": 4, "head_dim": 16, "long_layers": (0, 2)},
    **{"vocab": 257, "row_tokens": 512},
}
SPEEDRUN = {"skip": (0, 2), "backout": 1, "value_tables": 2, "ext_window": 384}


def checkpoint(folder: Path, preset: str, window: int = 256, **changes) -> Path:
    """A run folder whose checkpoint has random parameters; windows are [384, 128], or `window`."""
    more = {"ext_window": 0} if preset == "gpt2" else SPEEDRUN
    cfg = T.make_config(preset, **{**SMALL, **more, **changes})
    model = (gpt2.GPT2 if preset == "gpt2" else T.GPT)(cfg.model, 512)
    H.randomise(model)
    meta = {"step": 8, "steps": 8, "tokens": 2048, "train_s": 1.5, "window": window}
    meta |= {"arm": cfg.model.arm, "config": cfg.flat()}
    T.save_checkpoint(folder / "ckpt", {"model": model.state_dict()}, meta, 1)
    return folder


def ours(run: Path, items: hellaswag.Items, positions: int = 4096) -> np.ndarray:
    model, meta = sample.load(run, "cpu", positions)
    window = T.windows(sample.best_window(meta), "cpu")
    sample.by_dense_masks(model, None)
    found = hellaswag.log_likelihoods(model, items, window, T.World(torch.device("cpu")))
    parts = [part for part in (model, model.pointer) if part is not None]
    assert all(part.flex is None for part in parts), "the trainer's next step needs it as it was"
    return found


# ---- the harness --------------------------------------------------------------------------------

CASES = {
    "softmax": ("demo", {"arm": "softmax"}),
    "diff_v2": ("demo", {"arm": "diff_v2", "softcap": 0.0}),
    "copy": ("demo", {"copy": True, "paired": (1,)}),
    "gpt2": ("gpt2", {"arm": "softmax", "window": 1024}),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_harness(name, items_file, tasks, tmp_path):
    """Log-likelihoods to 1e-3 nats (measured: 4e-5 of up to 445), every choice, every figure. The
    vocabulary is padded from 257 to 384, windows are shorter than many rows, and rows are cut."""
    from evals import export, scores

    preset, changes = CASES[name]
    run = checkpoint(tmp_path / "run", preset, **changes)
    export.export(run, tmp_path / "folder", "fp32")
    how = {"device": "cpu", "dtype": "fp32", "batch_size": "8", "max_length": 0, "trust": False}
    with H.own_modules_cache(tmp_path / "modules"):
        lm = scores.load_model(tmp_path / "folder", **how)
    (theirs,) = scores.evaluate(lm, tasks, 0, True, 0)
    assert theirs["cut"] == (1 if preset == "gpt2" else 0)

    items = hellaswag.load(items_file, 257)
    nats = ours(run, items, 1024 if preset == "gpt2" else 4096)
    np.testing.assert_allclose(nats, np.array(theirs["log_likelihoods"]), atol=1e-3, rtol=0)
    plain, normed = hellaswag.predictions(items, nats)
    assert (plain == items.labels).tolist() == theirs["values"]["acc"]
    assert (normed == items.labels).tolist() == theirs["values"]["acc_norm"]
    by_byte = (nats / items.sizes).argmax(1)
    assert (by_byte != normed).any(), "the items tell characters from bytes"
    assert len(set(plain)) > 1
    found = hellaswag.figures(items, nats)
    assert found["acc"].value == theirs["metrics"]["acc"]
    assert found["acc_norm"].value == theirs["metrics"]["acc_norm"]
    assert found["bits_a_byte"].value == pytest.approx(
        np.mean(theirs["values"]["bits_a_byte"]), abs=1e-5
    )


def real_items() -> Path:
    path = open_text() / "evals" / "hellaswag" / "validation.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"no {path.name} of HellaSwag beside the tokenizer")
    return path


def test_real_items_are_the_harness_s_tokens():
    """1,000 real items: contexts, endings and labels by its code, and its split of tokens."""
    for name in ("tiktoken", "lm_eval"):
        pytest.importorskip(name)
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    from evals import hf_tokenizer

    path, tokenizer = real_items(), str(open_text() / "tokenizer")
    with lzma.open(path, "rt") as f:
        raw = [json.loads(next(f)) for _ in range(1_000)]
    items = hellaswag.load(path, 50_257, tokenizer, limit=1_000)
    encode = hf_tokenizer.load({"config": {"vocab": 50_257}}, tokenizer).encode
    for i, doc in enumerate(process_docs(Dataset.from_list(raw))):
        assert items.labels[i] == doc["gold"]
        assert items.characters[i].tolist() == [len(c) for c in doc["choices"]]
        before = len(encode(doc["query"]).ids)
        for j, choice in enumerate(doc["choices"]):
            whole = encode(f"{doc['query']} {choice}").ids
            assert items.rows[4 * i + j].tolist() == whole
            assert items.scored[4 * i + j] == len(whole) - before


# ---- ranks, cleaning ----------------------------------------------------------------------------


def on_rank(run: str, file: str) -> np.ndarray:
    world = T.World.start("cpu")
    model, meta = sample.load(run, "cpu", 4096)
    window = T.windows(sample.best_window(meta), "cpu")
    return hellaswag.log_likelihoods(model, hellaswag.load(file, 257), window, world)


def test_ranks_share_the_items(items_file, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "CALL_TOKENS", 2_048)
    run = checkpoint(tmp_path / "run", "demo")
    alone = ours(run, hellaswag.load(items_file, 257))
    both = H.on_ranks(2, on_rank, tmp_path / "ranks", str(run), str(items_file))
    assert np.array_equal(both[0], both[1])
    np.testing.assert_allclose(both[0], alone, atol=1e-4)


def test_calls_hold_every_row_once(monkeypatch):
    monkeypatch.setattr(hellaswag, "CALL_TOKENS", 100)
    lengths = np.array([3, 50, 101, 7, 49, 50, 1, 3])
    calls = hellaswag.calls_of(lengths)
    assert sorted(np.concatenate(calls)) == list(range(8))
    for call in calls:
        assert len(call) == 1 or len(call) * lengths[call].max() <= 100
    assert [call.tolist() for call in calls] == [[2], [1, 5], [4, 3], [0, 7, 6]]


def test_clean():
    assert hellaswag.clean(" [header] How to [title] Do it  now [step] ") == " How to. Do it now "


# ---- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def small_run(text_data, tmp_path):
    return {"data": text_data, "out": tmp_path, "ext_window": 128, "save_final": True}


def test_the_hook_scores_at_every_look_and_changes_no_loss(small_run, items_file, capsys):
    items = hellaswag.load(items_file, 257, limit=6)
    without = T.train(H.tiny(**small_run, run_id="without"))
    with_it = T.train(
        H.tiny(**small_run, run_id="with"), hooks=T.Hooks(on_eval=hellaswag.watch(items))
    )
    assert H.losses(without["run"]) == H.losses(with_it["run"])
    assert with_it["val_loss"] == without["val_loss"]
    printed = [s for s in capsys.readouterr().out.splitlines() if s.startswith("hellaswag: ")]
    assert len(printed) == 2  # looks
    assert "6 items" in printed[0]
    # The model in training has the positions of its rows; the saved one is built with the same.
    run = Path(with_it["run"])
    found = hellaswag.figures(items, ours(run, items, 64))
    for name, value in found.items():
        assert with_it[f"hellaswag_{name}"] == pytest.approx(value.value, abs=1e-5)


def test_command_trains_and_scores(small_run, items_file, capfd):
    argv = ["train", "--items", str(items_file), "--limit", "5"]
    assert hellaswag.main([*argv, *H.tiny_argv(**small_run, run_id="r")]) == 0
    assert capfd.readouterr().out.count("hellaswag: acc_norm") == 2
    run = small_run["out"] / "r"
    score = ["score", str(run), "--items", str(items_file), "--device", "cpu"]
    assert hellaswag.main(score) == 0
    assert "24 items\n" in capfd.readouterr().out
    assert hellaswag.main([*score, "--limit", "5"]) == 0
    assert "5 items: the first 5 alone" in capfd.readouterr().out


def test_packed_items_are_the_same(items_file, tmp_path):
    packed = tmp_path / "items.jsonl.xz"
    packed.write_bytes(lzma.compress(items_file.read_bytes()))
    plain, again = hellaswag.load(items_file, 257), hellaswag.load(packed, 257, limit=7)
    assert len(again.rows) == 28
    assert all(np.array_equal(a, b) for a, b in zip(plain.rows, again.rows))


# ---- what is refused ----------------------------------------------------------------------------


def refused(argv: list, capsys) -> str:
    assert hellaswag.main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence_and_2(small_run, items_file, tmp_path, capsys):
    run = checkpoint(tmp_path / "ck", "demo")
    assert "no whole checkpoint" in refused(["score", tmp_path, "--items", items_file], capsys)
    assert "cannot read" in refused(["score", run, "--items", tmp_path / "none.jsonl"], capsys)
    good = made_items(8)
    for broken, said in (
        ([{**good[0], "label": ""}], "line 1 is no HellaSwag item"),  # the hidden test split
        ([good[0], {"text": "x"}], "line 2 is no HellaSwag item"),
        ([{**good[0], "endings": ["a", "b"]}], "4 endings"),
        ([{**good[0], "label": 4}], "label 0 to 3"),
        ([], "holds no"),
    ):
        file = write_items(tmp_path / "broken.jsonl", broken)
        assert said in refused(["score", run, "--items", file], capsys)
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(items_file.read_bytes())[:-40])
    assert "cannot read" in refused(["score", run, "--items", tmp_path / "cut.jsonl.xz"], capsys)
    odd = checkpoint(tmp_path / "odd", "demo", vocab=999)
    assert "--tokenizer FILE" in refused(["score", odd, "--items", items_file], capsys)
    # in a run: before anything is trained
    argv = H.tiny_argv(**small_run, run_id="r")
    assert "cannot read" in refused(["train", "--items", tmp_path / "none", *argv], capsys)
    assert not (tmp_path / "r").exists()
    with pytest.raises(SystemExit) as e:
        hellaswag.main(["score", str(run), "--items", str(items_file), "--nonsense"])
    assert e.value.code == 2
