"""evals/finetune.py: what a seed changes, loss on answers alone, early stopping, a tiny model that
learns a constructed task, and checkpoints that everything else takes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import fake_tasks as F
import helpers as H
import pytest
import torch

pytest.importorskip("transformers")

from evals import coqa, csqa, export, finetune, sample, task
from records import logs
from variants import gpt2

T = H.T
NEW_ROW = 257  # of a byte model's head: the first that no token uses


@pytest.fixture(scope="module")
def base(text_data, tmp_path_factory):
    """A run of 8 steps."""
    out = tmp_path_factory.mktemp("base")
    return Path(T.train(H.tiny(text_data, out, save_final=True, run_id="base"))["run"])


@pytest.fixture(scope="module")
def mixed(text_data, tmp_path_factory):
    """A run with paired heads, a copy head and a table of n-grams."""
    out = tmp_path_factory.mktemp("mixed")
    how = {"copy": True, "ngram": 1024, "paired": (0,), "save_final": True, "run_id": "mixed"}
    return Path(T.train(H.tiny(text_data, out, **how))["run"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return F.write_csqa(F.write_coqa(folder))


def arguments(base: Path, out: Path, *words: str, name: str = "csqa") -> argparse.Namespace:
    args = finetune.parse(
        [name, str(base), "--task-data", ".", "--out", str(out), "--device", "cpu", *words]
    )
    finetune.check(args)
    return args


def tuning_of(base: Path, data: Path, out: Path, kind: str, *words: str) -> finetune.Tuning:
    """Of the task of this name, in steps of 1,024 tokens: a handful an epoch."""
    start = finetune.Start.load(str(base), "")
    made = csqa.make(data, start.words, 0)
    made += coqa.make(data, start.meta, start.words, "train_partial", 0, out)
    chosen = next(t for t in made if t.name == kind)
    chosen.step_tokens = 1024
    return finetune.Tuning(start, chosen, arguments(base, out, *words))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return T.load_checkpoint(folder)[0]["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def first_batches(tuning: finetune.Tuning, seed: int, count: int = 6) -> torch.Tensor:
    cfg = tuning.cfg.with_(seed=seed, data_seed=seed)
    batches = tuning.batches(tuning.trainer.steps[:count], cfg, tuning.trainer.world)
    return torch.stack([batch.tokens for batch in batches])


# ---- What a seed is -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csqa_cloze", "csqa_head", "coqa"])
def test_a_seed_starts_nothing_but_the_new_vector(kind, base, data, tmp_path):
    """Every parameter is the checkpoint's, whatever the seed; the choice's vector is the seed's."""
    tuning, saved = tuning_of(base, data, tmp_path, kind), weights(base)
    starts = []
    for seed in (0, 1):
        tuning.trainer.reset(seed, seed)
        starts.append({k: v.clone() for k, v in tuning.trainer.model.state_dict().items()})
    new = [start["head"][NEW_ROW].clone() for start in starts]
    if kind == "csqa_head":
        assert not torch.equal(*new)
        assert all(0 < v.std() < 3 * csqa.NEW_STD for v in new)
    for start in starts:
        start["head"][NEW_ROW] = saved["head"][NEW_ROW]
        assert same(start, saved) or kind == "csqa_head"
        assert same(start, saved)
    assert torch.equal(first_batches(tuning, 0), first_batches(tuning, 0))
    assert not torch.equal(first_batches(tuning, 0), first_batches(tuning, 1))


def test_every_epoch_has_every_unit_once(base, data, tmp_path):
    tuning = tuning_of(base, data, tmp_path, "csqa_head")
    wanted = sorted(tuple(d.ids) for unit in tuning.task.units for d in unit)
    got, orders = [], []
    for row in tuning.rows(0):
        assert sum(map(len, row)) <= tuning.task.row
        got += [tuple(document.ids) for document in row]
        if len(got) >= len(wanted):
            assert sorted(got) == wanted
            orders.append(got)
            got = []
        if len(orders) == 2:
            break
    assert orders[0] != orders[1]


def test_bitwise_reproducible(base, data, tmp_path):
    """The same seed, in this process or after another seed: the same bits. Another seed: others."""
    found = []
    for place, seeds in (("a", [0]), ("b", [1, 0])):
        tuning = tuning_of(
            base, data, tmp_path / place, "csqa_head", "--lr", "0.5", "--epochs", "1"
        )
        results = [tuning.run(seed) for seed in seeds]
        folder = tmp_path / place
        found.append((results[-1], weights(folder / "csqa_head_s0")))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert not same(found[0][1], weights(tmp_path / "b" / "csqa_head_s1"))


# ---- Loss on answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csqa_cloze", "coqa"])
def test_the_loops_loss_is_that_of_the_answers(kind, base, data, tmp_path):
    """The first step's loss is the mean over answer tokens, each document read by itself with the
    checkpoint's model, and the gradient's norm is that of this mean."""
    tuning = tuning_of(base, data, tmp_path, kind)
    tuning.trainer.reset(3, 3)
    step = tuning.trainer.steps[0]
    cfg = tuning.cfg.with_(data_seed=3)
    (batch,) = tuning.batches([step], cfg, tuning.trainer.world)
    loss, norm = tuning.trainer.train_step(step, batch)
    model = T.load_model(base)[0].train()
    chances, asked = [], 0
    for row in range(len(batch.tokens)):
        for number in batch.docs[row].unique():
            at = batch.docs[row] == number
            ids = batch.tokens[row, at][None]
            text = bytes(ids[0, 1:].clamp(max=255).tolist()).decode("latin-1")
            h = model(ids, torch.zeros_like(ids), T.windows(128, "cpu"))[0]
            z = T.softcap(h @ model.head.t(), model.softcap).log_softmax(-1)
            for begin, end in answers_in(text, kind):
                asked += end - begin
                # behind end-of-text, byte i is token i + 1, and what stands before it predicts it
                chances += [z[i, ids[0, i + 1].long()] for i in range(begin, end)]
    wanted = -torch.stack(chances).mean()
    assert asked > 50
    assert float(loss[0]) == pytest.approx(wanted.item(), rel=1e-5)
    grads = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    length = sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5
    assert float(norm) == pytest.approx(length, rel=1e-4)


def of_the_mixture(model, task, window) -> float:
    """nats of a held-out answer token, each document by itself, by `logits`."""
    found = []
    for unit in task.held_out:
        for document in unit:
            ids = torch.from_numpy(document.ids)[None]
            log_p = model.logits(ids, torch.zeros_like(ids), window)[0].log_softmax(-1)
            at = document.targets >= 0
            found.append(-log_p[at, document.targets[at]])
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("kind", ["csqa_cloze", "csqa_head", "coqa"])
def test_a_copy_head_is_tuned_and_a_table_is_not(kind, mixed, data, tmp_path):
    """What is looked at is the mixture; nothing is trained by a choice that it has no part in; the
    table is there once, and a seed's run has it as it was."""
    tuning, saved = tuning_of(mixed, data, tmp_path, kind, "--lr", "0.5"), weights(mixed)
    table = tuning.start.weights["ngram.table"]
    tuning.trainer.reset(0, 0)
    model, window = tuning.trainer.model, T.windows(tuning.start.window, "cpu")
    assert model.ngram.table.data_ptr() == table.data_ptr()
    if kind == "coqa":
        look = tuning.task.look(model, window)["nats"]
        assert look == pytest.approx(of_the_mixture(model, tuning.task, window), rel=1e-4)
    figures = tuning.run(0)["figures"]
    assert all(0 <= value <= 100 for value in figures.values())
    tuned = weights(tmp_path / f"{kind}_s0")
    assert tuning.kept.weights["ngram.table"].data_ptr() == table.data_ptr()
    assert torch.equal(tuned["ngram.table"], saved["ngram.table"]) and table.any()
    files = [T.find_checkpoint(f) / "table.pt" for f in (mixed, tuning.trainer.folder)]
    assert files[0].samefile(files[1])  # a table may be 13 GB
    moved = {name for name in tuned if not torch.equal(tuned[name], saved[name])}
    assert "blocks.0.attn.arm.q.weight" in moved
    assert ("pointer.gate" in moved) == ("pointer.q.weight" in moved) == (kind != "csqa_head")


def answers_in(text: str, kind: str) -> list[tuple[int, int]]:
    """Where the answers stand in a document's text, found without the task's code."""
    mark = "\nAnswer:" if kind == "csqa_cloze" else "A:"
    found, at = [], text.find(mark)
    while at >= 0:
        begin = at + len(mark)
        end = text.find("\n", begin) + 1 or len(text)  # the line end is asked for, too
        found.append((begin, end))
        at = text.find(mark, end)
    return found


# ---- Early stopping -----------------------------------------------------------------------------


def scripted(tuning: finetune.Tuning, monkeypatch, nats: list[float]) -> list[dict]:
    """Looks say these figures and then 9, whatever the model; the weights that each has seen."""
    seen, said = [], itertools.chain(nats, itertools.repeat(9.0))

    def look(self, model, window):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"nats": next(said)}

    monkeypatch.setattr(coqa.CoQA, "look", look)
    return seen


def test_the_best_look_is_kept(base, data, tmp_path, monkeypatch):
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "3", "--lr", "0.5")
    seen = scripted(tuning, monkeypatch, [3.0, 1.0, 1.0, 2.0])
    result = tuning.run(5)
    nats = [3.0, 1.0, 1.0, 2.0, 9.0]
    assert [look["nats"] for look in result["looks"]] == nats
    assert result["best_step"] == result["looks"][1]["step"]  # the first of two equal ones
    folder = tmp_path / "coqa_s5"
    (kept,) = (folder / "ckpt").iterdir()
    assert kept.name == f"step_{result['best_step']:08d}"
    assert same(weights(folder), seen[1])
    assert not same(seen[1], seen[2])
    log = H.read_log(folder, "held_out")
    assert [line["nats"] for line in log] == nats
    assert [line["best"] for line in log] == [result["looks"][i]["step"] for i in (0, 1, 1, 1, 1)]
    run = logs.load_run(folder)  # the chain is whole
    assert run.done
    assert run.labels["finetuned"][0]["task"] == "coqa"
    says_its_own_step(folder, result["best_step"])


def says_its_own_step(folder: Path, step: int) -> None:
    """The checkpoint's meta is that step's: its clock, its tokens, and a log that ends there."""
    meta = T.load_checkpoint(folder)[1]
    (look,) = [line for line in H.read_log(folder, "val") if line["step"] == step]
    assert (meta["step"], meta["tokens"]) == (step, look["tokens"])
    assert meta["train_s"] == pytest.approx(look["train_s"], abs=1e-3)
    told = (folder / "run.jsonl").read_bytes()[: meta["log"]["jsonl"]].decode().splitlines()
    last = json.loads(told[-1])
    assert (last["t"], last["step"], last["h"]) == ("held_out", step, meta["h"])


ENDS = {
    "loss": (T.NonFinite("step 9"), 3),
    "memory": (torch.OutOfMemoryError("9 GiB"), 5),
    "signal": (KeyboardInterrupt(), finetune.INTERRUPTED),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_that_ends_early_keeps_its_best_look(name, base, data, tmp_path, monkeypatch):
    """Whatever ends it after the fourth look, in the middle of a step."""
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "3", "--lr", "0.5")
    seen = scripted(tuning, monkeypatch, [3.0, 1.0, 2.0])
    fault, code = ENDS[name]
    step = tuning.trainer.train_step

    def fails(*args, **how):
        if len(seen) == 4:
            raise fault
        return step(*args, **how)

    monkeypatch.setattr(tuning.trainer, "train_step", fails)
    with pytest.raises(type(fault)):
        tuning.run(5)
    folder = tmp_path / "coqa_s5"
    assert same(weights(folder), seen[1])
    says_its_own_step(folder, tuning.looks[1]["step"])
    said = json.loads((folder / "exit.json").read_text())
    assert said["code"] == code
    if name == "memory":  # the flag is one that this command takes, and it makes a call smaller
        flag = said["reason"].partition("out of GPU memory (9 GiB): run again with ")[2].split()
        rows, row = tuning.trainer.call_shape(tuning.cfg.data.row_tokens * tuning.task.rows)
        again = tuning_of(base, data, tmp_path / "again", "coqa", *flag)
        assert again.trainer.call_shape(tuning.trainer.steps[0].tokens) == (rows // 2, row)


def test_a_signal_to_the_trainer_does_not_put_the_last_weights_first(
    base, data, tmp_path, monkeypatch
):
    """Its own handler saves the step that it stopped at: what is kept stands, and nothing else."""
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "3", "--lr", "0.5")
    seen = scripted(tuning, monkeypatch, [3.0, 1.0, 2.0])
    count = tuning.count

    def stop(trainer, step):
        count(trainer, step)
        trainer.stop = len(seen) >= 3

    monkeypatch.setattr(tuning.trainer.hooks, "after_step", stop)
    with pytest.raises(SystemExit, match="75"):
        tuning.run(5)
    (kept,) = (tmp_path / "coqa_s5" / "ckpt").iterdir()
    assert kept.name == f"step_{tuning.looks[1]['step']:08d}"
    assert same(weights(kept), seen[1])


def test_ended_before_the_first_look_nothing_is_kept(base, data, tmp_path, monkeypatch):
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "1")
    tuning.run(0)

    def fails(*_, **__):
        raise T.NonFinite("step 1")

    monkeypatch.setattr(tuning.trainer, "train_step", fails)
    with pytest.raises(T.NonFinite):
        tuning.run(1)
    assert not (tmp_path / "coqa_s1" / "ckpt").exists()
    assert len([*(tmp_path / "coqa_s0" / "ckpt").iterdir()]) == 1  # the seed before has its own


def test_a_full_disk_does_not_hide_what_ended_the_run(base, data, tmp_path, monkeypatch, capsys):
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "3", "--lr", "0.5")
    seen, step = scripted(tuning, monkeypatch, [1.0]), tuning.trainer.train_step

    def fails(*args, **how):
        if seen:
            raise T.NonFinite("step 2")
        return step(*args, **how)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.trainer, "train_step", fails)
    monkeypatch.setattr(T, "save_checkpoint", full)
    with pytest.raises(T.NonFinite):
        tuning.run(0)
    assert "the best look was not saved: [Errno 28]" in capsys.readouterr().err


def test_sigterm_saves_the_best_look(base, data, tmp_path):
    """The command itself, once its first look, of 20, is in the log."""
    out = tmp_path / "out"
    script = str(H.ROOT / "evals" / "finetune.py")
    words = ["csqa", str(base), "--task-data", str(data), "--out", str(out), "--epochs", "200"]
    with (tmp_path / "said").open("w") as said:
        process = H.Forked(
            [sys.executable, script, *words, "--device", "cpu"], stdout=said, stderr=said
        )
    try:
        log, until = out / "csqa_cloze_s0" / "run.jsonl", time.monotonic() + 200
        while not (log.is_file() and '"held_out"' in log.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == finetune.INTERRUPTED, (tmp_path / "said").read_text()
    finally:
        process.kill()
    assert "interrupted" in (tmp_path / "said").read_text().splitlines()[-1]
    best = H.read_log(log.parent, "held_out")[-1]["best"]
    says_its_own_step(log.parent, best)


def test_a_signal_between_a_look_s_line_and_its_copy_waits(base, data, tmp_path, monkeypatch):
    tuning = tuning_of(base, data, tmp_path, "csqa_cloze", "--epochs", "1")
    write = T.RunLog.write

    def wrote(log, kind, **values):
        write(log, kind, **values)
        if kind == "held_out":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(T.RunLog, "write", wrote)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt):
        tuning.run(0)
    folder = tmp_path / "csqa_cloze_s0"
    (look,) = H.read_log(folder, "held_out")
    says_its_own_step(folder, look["best"])


def test_the_held_out_slice_alone_is_looked_at(base, data, tmp_path, monkeypatch):
    """No document of a look is one of train or of the reported set."""
    tuning = tuning_of(base, data, tmp_path, "csqa_cloze", "--epochs", "1")
    seen = []
    nats = task.answer_nats

    def spy(model, documents, *args):
        seen.append({tuple(d.ids) for d in documents})
        return nats(model, documents, *args)

    monkeypatch.setattr(task, "answer_nats", spy)
    result = tuning.run(0)
    assert len(seen) == len(result["looks"]) + 1  # and at the end what is reported
    *looked, reported = seen
    trained = {tuple(d.ids) for unit in tuning.task.units for d in unit}
    held = {tuple(d.ids) for unit in tuning.task.held_choices for d in unit}
    assert all(look == held for look in looked)
    assert not held & trained
    assert not reported & (held | trained)


# ---- Learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words", "figure", "most", "least"),
    [
        ("csqa_cloze", ("--lr", "1", "--epochs", "3"), "accuracy", 40, 90),
        ("csqa_head", ("--lr", "1", "--epochs", "3"), "accuracy", 101, 90),
        ("coqa", ("--lr", "2", "--epochs", "10"), "F1", 1, 90),
    ],
)
def test_a_tiny_model_learns(kind, words, figure, most, least, base, data, tmp_path):
    tuning = tuning_of(base, data, tmp_path, kind, *words)
    model, meta = sample.load(base, context=tuning.task.row)
    before = tuning.task.before(model, meta, T.windows(tuning.start.window, "cpu"))
    if before is not None:
        assert before.figures[figure] < most
    result = tuning.run(0)
    assert result["figures"][figure] >= least
    items = json.loads((tmp_path / f"{kind}_s0" / "items.json").read_text())
    assert len(items) == 20 if kind != "coqa" else len(items) == 19


# ---- Normal checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    tuning_of(base, data, out, "csqa_head", "--epochs", "1", "--lr", "0.5").run(0)
    return out / "csqa_head_s0"


def test_a_tuned_run_is_a_run(tuned, base, data, tmp_path):
    """sample and export take it; a second tuning starts from it and remembers the first."""
    model, meta = sample.load(tuned)
    assert len(sample.generate(model, meta, [256], 256, tokens=5, end=False)) == 5
    done = export.export(tuned, tmp_path / "hf")
    assert done.difference < export.TOLERANCE
    assert task.lineage(tmp_path / "hf") == task.lineage(tuned)
    again, run = (finetune.Start.load(str(path), "") for path in (tmp_path / "hf", tuned))
    assert (again.lineage, again.window, again.as_json) == (
        *(run.lineage, run.window),
        {**run.as_json, "run": "hf"},
    )
    rounded = {name: value.bfloat16().float() for name, value in run.weights.items()}
    assert again.weights.keys() == rounded.keys()
    vocab = H.BYTE_VOCAB  # rows after it are kept as they were
    for name, value in again.weights.items():
        assert torch.allclose(value[:vocab], rounded[name][:vocab], rtol=2**-8)
    assert "| fine-tuned on | CommonsenseQA train |" in (tmp_path / "hf/README.md").read_text()
    again = tuning_of(tuned, data, tmp_path / "again", "csqa_cloze", "--epochs", "1")
    result = again.run(0)
    entries = task.lineage(tmp_path / "again" / result["run"])
    assert [e["task"] for e in entries] == ["csqa_head", "csqa_cloze"]
    assert entries[0]["start"]["run"] == "base"
    assert entries[1]["start"]["sha256"] == T.load_checkpoint(tuned)[1]["sha256"]
    assert task.lineage(base) == []
    assert again.start.window == 128


def write_meta(folder: Path, meta: dict) -> None:
    """As a checkpoint holds it: DONE vouches for it."""
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "DONE").write_text(T.sha256(folder / "meta.json"))


def change_config(run: Path, **changes) -> dict:
    """The checkpoint's new meta."""
    folder = T.find_checkpoint(run)
    meta = json.loads((folder / "meta.json").read_text())
    meta["config"] |= changes
    write_meta(folder, meta)
    return meta


def test_windows_are_the_exports(base, data, tmp_path):
    """Tuned with the extended window where the checkpoint's export has it, and exported so."""
    run = tmp_path / "base"
    shutil.copytree(base, run)
    meta = change_config(run, ext_window=384)
    tuning = tuning_of(run, data, tmp_path / "out", "csqa_head", "--epochs", "1")
    tuning.run(0)
    tuned = json.loads(
        (T.find_checkpoint(tmp_path / "out" / "csqa_head_s0") / "meta.json").read_text()
    )
    assert tuned["window"] == 384
    assert export.windows_of(tuned) == ([384, 128], [384, 128])
    assert export.windows_of(meta)[0] == [384, 128]


def test_resumed_is_as_if_never_stopped(base, data, tmp_path, monkeypatch):
    """From a checkpoint on the way (what is kept of the best look has no optimizer), through the
    same hooks, the last weights are the same bits."""
    words = ("--epochs", "3", "--lr", "0.5")
    tuning = tuning_of(base, data, tmp_path, "coqa", *words)
    tuning.trainer.cfg = tuning.trainer.cfg.with_(save_every=2, keep=9)
    seen = scripted(tuning, monkeypatch, [5.0, 4.0, 3.0, 2.0, 1.0])  # the last is kept, too
    tuning.run(4)
    shutil.rmtree(tmp_path / "tokens")
    shutil.move(tmp_path / "coqa_s4", tmp_path.parent / "kept")
    again = tuning_of(base, data, tmp_path, "coqa", *words)
    after = scripted(again, monkeypatch, [])
    again.done = 2
    again.trainer.reset(4, 4)
    halfway = tmp_path.parent / "kept" / "ckpt" / "step_00000002"
    again.trainer.cfg = again.trainer.cfg.with_(resume=str(halfway))
    again.trainer.run()
    assert len(after) == 3
    assert same(after[-1], seen[-1])


def test_what_is_kept_cannot_be_resumed(base, data, tmp_path):
    tuning = tuning_of(base, data, tmp_path, "coqa", "--epochs", "1")
    tuning.run(0)
    tuning.trainer.reset(0, 0)
    tuning.trainer.cfg = tuning.trainer.cfg.with_(resume=str(tmp_path / "coqa_s0"))
    with pytest.raises(T.InputError, match="weights alone, to be used, not resumed"):
        tuning.trainer.run()


# ---- The command --------------------------------------------------------------------------------


def test_command_line(base, data, tmp_path, capsys):
    """Both forms, two seeds: folders, table, curves and JSON."""
    out = tmp_path / "out"
    words = ["csqa", str(base), "--task-data", str(data), "--seeds", "0", "7", "--out", str(out)]
    assert finetune.main([*words, "--epochs", "1", "--limit", "15", "--device", "cpu"]) == 0
    said = json.loads((out / "result.json").read_text())
    assert said["start"]["run"] == "base"
    cloze, head = said["results"]
    assert [r["task"] for r in said["results"]] == ["csqa_cloze", "csqa_head"]
    assert cloze["about"]["scored_on"] == "15 validation questions"
    for r in said["results"]:
        values = [s["figures"]["accuracy"] for s in r["seeds"]]
        assert [s["seed"] for s in r["seeds"]] == [0, 7]
        assert r["after"]["accuracy"]["n"] == 2
        assert r["after"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert r["after"]["accuracy"]["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        for seed in r["seeds"]:
            assert logs.load_run(out / seed["run"]).done
            assert json.loads((out / seed["run"] / "exit.json").read_text())["code"] == 0
        for kind in ("png", "svg"):
            assert (out / f"{r['task']}_curves.{kind}").stat().st_size > 1000
    assert head["before"] is None
    assert set(cloze["before"]) == {"accuracy", "accuracy, sums"}
    table = (out / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert "says nothing about other ones" in table


def test_gpt2(text_data, data, tmp_path):
    """The variant is tuned by its own AdamW, within its 1,024 positions."""
    small = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0, 1)}
    cfg = T.make_config(
        "gpt2",
        **{**small, "row_tokens": 32, "val_row_tokens": 32, "val_call_tokens": 256},
        **{"stages": (T.Stage(1.0, 256, 1.0, (1024, 1024)),), "tokens": 256 * 2, "looks": 0},
        **{"require_gpu": False, "device": "cpu", "compile": False, "dev_tokens": 256},
        **{"val_tokens": 256, "data": str(text_data), "out": str(tmp_path), "run_id": "g"},
        **{"tail": 1.0, "tail_every": 1},
    )
    run = T.train(cfg, hooks=gpt2.make_hooks(cfg))["run"]
    tuning = tuning_of(run, data, tmp_path / "out", "coqa", "--epochs", "2", "--lr", "20")
    assert tuning.task.most == 1024
    assert [b.group.kind for b in tuning.trainer.optimizer.banks] == ["adam", "adam"]
    assert isinstance(tuning.trainer.model, gpt2.GPT2)
    assert not any(step.sample for step in tuning.trainer.steps), "pretraining's tail"
    result = tuning.run(0)
    assert result["looks"][-1]["nats"] < result["looks"][0]["nats"]


# ---- Refusals -----------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_and_2(base, data, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    folder = tmp_path / "hf"
    F.write_jsonl(folder / "config.json", [{}])
    few = tmp_path / "few.tiktoken"
    few.write_bytes(b"".join(b"%s %d\n" % (b64(b), b) for b in range(255)))
    good = [str(base), "--task-data", str(data), "--device", "cpu"]
    cases = {
        ("csqa", str(tmp_path / "none"), *good[1:]): "holds no whole checkpoint",
        ("csqa", str(folder), *good[1:]): "without trainer.npz",
        ("coqa", *good, "--split", "train"): "coqa/train.jsonl",
        ("csqa", *good, "--split", "dev400"): "one of coqa's",
        ("csqa", str(base), "--task-data", str(taken)): "commonsense_qa/train.jsonl",
        ("csqa", *good, "--out", str(taken)): "is there already",
        ("csqa", *good, "--seeds", "1", "1"): "different numbers",
        ("csqa", *good, "--lr", "-1"): "--lr and --micro-batch-tokens are 0",
        ("csqa", *good, "--tokenizer", str(few)): "few.tiktoken",
    }
    for words, said in cases.items():
        extra = [] if "--out" in words else ["--out", str(tmp_path / "new")]
        assert finetune.main([*words, *extra]) == 2, words
        err = capsys.readouterr().err
        assert said in err, err
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists(), words
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finetune.main(["csqa", *good]) == 2
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["squad", *good])


def b64(byte: int) -> bytes:
    import base64

    return base64.b64encode(bytes([byte]))


def test_another_vocabulary(base, data, tmp_path, capsys):
    run = tmp_path / "other"
    shutil.copytree(base, run)
    change_config(run, vocab=300)
    words = ["csqa", str(run), "--task-data", str(data), "--out", str(tmp_path / "new")]
    assert finetune.main(words) == 2
    assert "300 tokens are an unknown vocabulary" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(base, data, tmp_path, capsys):
    run = tmp_path / "broken"
    shutil.copytree(base, run)
    folder = T.find_checkpoint(run)
    state, meta = T.load_checkpoint(folder)
    state["model"]["embed"][:] = torch.nan
    torch.save(state, folder / "state.pt")
    meta["sha256"] = T.sha256(folder / "state.pt")
    write_meta(folder, meta)
    words = ["csqa", str(run), "--task-data", str(data), "--out", str(tmp_path / "new")]
    assert finetune.main([*words, "--device", "cpu"]) == 3
    assert "smaller --lr" in capsys.readouterr().err
    assert json.loads((tmp_path / "new/csqa_cloze_s0/exit.json").read_text())["code"] == 3


def test_settings_are_the_checkpoints_own(base, data, tmp_path):
    """But for the schedule, the data, the place and what makes a run fast on a GPU."""
    tuning = tuning_of(base, data, tmp_path, "csqa_cloze")
    mine, theirs = tuning.cfg, T.config_from_flat(T.load_checkpoint(base)[1]["config"])
    assert mine.model == theirs.model
    momentum = {"momentum_warmup": 4, "momentum_cooldown": 2}
    assert dataclasses.replace(mine.optim, **momentum) == theirs.optim
    assert mine.schedule.stages[0].lr == finetune.USUAL_LR
    lrs = [step.lr for step in tuning.trainer.steps]
    assert max(lrs) == pytest.approx(finetune.USUAL_LR)
    assert lrs[-1] < 0.25 * finetune.USUAL_LR


def test_kernels_of_the_pretraining_are_left_behind(base, data, tmp_path):
    run = tmp_path / "fast"
    shutil.copytree(base, run)
    fast = {"mlp_kernel": True, "loss_kernel": True, "fp8": True, "compile": True}
    change_config(run, attention="fa4", **fast, cuda_graphs=True)
    cfg = tuning_of(run, data, tmp_path / "out", "csqa_cloze").cfg.run
    assert (cfg.attention, cfg.mlp_kernel, cfg.loss_kernel) == ("flex", False, False)
    assert not cfg.fp8 and not cfg.compile and not cfg.cuda_graphs
