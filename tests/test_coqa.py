"""evals/coqa.py and its arithmetic: hand-worked scores, the Harness's own functions, conversations
as tokens, greedy answers in batches, and the task of the held-out stories."""

from __future__ import annotations

import base64
import itertools
import json
import os
import weakref
from pathlib import Path

import fake_tasks as F
import helpers as H
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from evals import coqa, coqa_score, export, sample, task

T = H.T
WORDS = task.Words(sample.tokenizer_of({"config": {"vocab": 257}}))
META = {"config": {"preset": "demo", "arm": "softmax", "vocab": 257}}


def story(*args, **changes) -> coqa.Story:
    return coqa.Story.read("here", F.story(*args, **changes), scored=True)


# ---- Arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("a.n the-theory", "thetheory"),  # punctuation goes first: `an`, `thetheory`
        ("An apple a day", "apple day"),
        ("U.S. dollar's", "us dollars"),
        ("«18.4\xa0million»", "«184 million»"),  # ASCII punctuation alone
        ("the", ""),
    ],
)
def test_normal_form(text, wanted):
    assert coqa_score.normal(text) == wanted


@pytest.mark.parametrize(
    ("reference", "answer", "em", "f1"),
    [
        ("a red car", "The red car!", 1, 1),
        ("red car", "red", 0, 2 / 3),  # precision 1, recall 1/2
        ("red red car", "red car car", 0, 2 / 3),  # two shared of three each: bags, not sets
        ("yes", "no", 0, 0),
        ("the", "a", 1, 1),  # nothing left of either
        ("the", "yes", 0, 0),
        ("yes", "", 0, 0),
    ],
)
def test_one_answer(reference, answer, em, f1):
    assert coqa_score.exact(reference, answer) == em
    assert coqa_score.f1(reference, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("references", "answer", "em", "f1"),
    [
        # without the first: 0 and 2/3; without another: 1 and 1
        (["a red car", "the car", "red", "Car"], "The red car", 3 / 4, (2 / 3 + 3) / 4),
        (["yes", "Yes.", "no"], "yes", 1, 1),  # two say it: leaving one out leaves the other
        (["no", "yes"], "yes", 1 / 2, 1 / 2),
        (["yes"], "yes", 1, 1),  # one alone cannot be left out
    ],
)
def test_leave_one_out(references, answer, em, f1):
    assert coqa_score.turn_score(references, answer) == pytest.approx((em, f1))


def test_the_harness_counts_alike_references_once():
    assert coqa_score.different(['"Ok"', "Ok", "ok", "No", "OK"]) == ['"Ok"', "Ok", "No"]
    # officially 3/4: only without "no" there is always a "yes" left; here 1/2
    row = F.story(0, ["yes"])
    row["additional_answers"]["2"] = {"input_text": ["no"], "turn_id": [1]}
    assert coqa_score.process_results(row, ["yes"]) == {"em": 1 / 2, "f1": 1 / 2}
    (references,) = coqa.Story.read("", row, scored=True).references
    assert coqa_score.turn_score(references, "yes") == (1, 1)
    assert coqa_score.turn_score(references, "no") == (3 / 4, 3 / 4)


def test_figures_are_means_over_turns():
    """Three turns right of a story with four, none of a story with one: 3/5, and by domain."""
    stories = [story(0, ["a b", "c", "d", "e"]), story(1, ["f"])]
    scores = coqa.figures(stories, ["b", "c", "d", "x", "g"])
    assert scores.figures == pytest.approx(
        {"F1": 100 * 3 / 5, "EM": 100 * 3 / 5, "F1 cnn": 75, "F1 mctest": 0}
        | {"last-turn F1": 0, "last-turn EM": 0}
    )
    assert [(i["id"], i["turn_id"], i["answer"]) for i in scores.items] == [
        *(("id000", t, a) for t, a in zip((1, 2, 3, 4), "bcdx")),
        ("id001", 1, "g"),
    ]
    assert coqa.figures(stories, ["b", "c", "d", "e", "f"]).figures["last-turn EM"] == 100


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(" yes\n\nQ: no?", "yes"), ("\n\n yes", "yes"), (" \n", ""), ("", ""), ("a b\rc", "a b\rc")],
)
def test_first_line(text, wanted):
    assert coqa_score.first_line(text) == wanted


# ---- On the real files, where they are ----------------------------------------------------------


@pytest.fixture(scope="module")
def dev():
    here = os.environ.get("OPEN_TEXT_DIR") or H.ROOT.parent / "shared" / "data"
    folder = Path(here) / "evals"
    if not (folder / "coqa").is_dir():
        pytest.skip("no evals/coqa: OPEN_TEXT_DIR names no folder that has it")
    return coqa.read_stories(folder, "validation")


def test_dev_is_what_others_report(dev):
    """Counts of the data set; people's own scores, as published (Reddy et al. 2019: F1 89.8 in the
    five domains of dev); and what the Harness gives to the gold answers themselves."""
    assert len(dev) == 500
    assert sum(len(s.questions) for s in dev) == 7983
    people = [
        max(coqa_score.f1(other, mine) for j, other in enumerate(turn) if j != i)
        for s in dev
        for turn in s.references
        for i, mine in enumerate(turn)
    ]
    assert 100 * np.mean(people) == pytest.approx(89.8, abs=0.05)
    gold = coqa.figures(dev, [turn[0] for s in dev for turn in s.references]).figures
    assert gold["last-turn EM"] == pytest.approx(83.4, abs=0.05)
    assert gold["last-turn F1"] == pytest.approx(89.9, abs=0.05)


def test_dev400_holds_out_20_of_each_domain(dev):
    train, held = coqa.split_dev(dev)
    assert (len(train), len(held)) == (400, 100)
    assert not {s.text for s in train} & {s.text for s in held}
    for source in {s.source for s in dev}:
        assert sum(s.source == source for s in held) == 20
    again = coqa.split_dev(dev[::-1])[1]
    assert {s.id for s in again} == {s.id for s in held}


def test_a_story_that_is_told_twice_is_not_held_out():
    """Its other conversation is trained on. A fifth of each domain is held out none the less."""
    stories = [story(i, ["yes"]) for i in range(20)]
    stories += [story(i + 100, ["no"], story=f"Tale {i}.") for i in range(10)]
    train, held = coqa.split_dev(stories)
    assert [sum(s.source == source for s in held) for source in F.SOURCES] == [3, 3]
    assert {s.text for s in held} <= {f"Tale {i}." for i in range(10, 20)}
    assert len(train) == 24


# ---- Conversations ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bytes", "merges"])
def words(request, tmp_path_factory):
    """Bytes, and a vocabulary in which a line's end and the next letter could merge."""
    if request.param == "bytes":
        return WORDS
    pytest.importorskip("tiktoken")
    tokens = [bytes([b]) for b in range(256)] + b"\n\n| y|ye| yes|Q:|A:|: |er|It".split(b"|")
    path = tmp_path_factory.mktemp("words") / "few.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return task.Words(sample.tokenizer_of({"config": {"vocab": len(tokens) + 1}}, str(path)))


def test_a_conversation_is_the_text_of_the_harness(words):
    """Its tokens are those of the whole text; prompts are the Harness's, token by token; asked are
    answers, and the line end after each."""
    talk = story(3, ["yes", "Not  so: 3.", "'er", "yes yes"], story="It was. \n\nSo it was. ")
    document, prompts = coqa.conversation(words, talk, 10_000)
    text = coqa_score.doc_to_text(talk.row)
    (prompt,) = words([text])
    assert prompts[-1].tolist() == [words.eot, *prompt]
    (whole,) = words([f"{text} yes yes\n"])
    assert document.ids.tolist() == [words.eot, *whole]
    asked = document.targets >= 0
    assert (document.targets[asked] == np.append(document.ids[1:], -1)[asked]).all()
    assert words.text(document.targets[asked]) == " yes\n Not  so: 3.\n 'er\n yes yes\n"
    for turn, prompt in enumerate(prompts, 1):
        said = words.text(prompt)
        assert said.endswith(f"Q: Item {turn}?\n\nA:")
        assert said.count("A:") == turn
        assert document.ids[: len(prompt)].tolist() == prompt.tolist()
        assert asked[len(prompt) - 1]  # where the answer begins
        assert not asked[len(prompt) - 2]


def test_long_conversations_lose_the_storys_beginning():
    talk = story(0, ["yes", "no"], story="x" * 500)
    whole, prompts = coqa.conversation(WORDS, talk, 10_000)
    short, cut = coqa.conversation(WORDS, talk, 200)
    assert len(short) == 200
    assert short.ids[0] == 256
    assert short.ids[1:].tolist() == whole.ids[-199:].tolist()
    assert short.targets[1:].tolist() == whole.targets[-199:].tolist()
    for a, b in zip(prompts, cut):
        assert len(b) == 200 - coqa.ANSWER_TOKENS
        assert b.tolist() == [256, *a[-len(b) + 1 :]]


def test_make_splits_by_story(tmp_path):
    """Segments of one story stay together; the same slice is held out each time."""
    rows = [F.story(i, ["yes"], story=f"Tale {i // 3}.", source="cnn") for i in range(60)]
    F.write_coqa(tmp_path)
    F.write_jsonl(tmp_path / "coqa" / "train_partial.jsonl", rows)
    (made,) = coqa.make(tmp_path, META, WORDS, "train_partial", 0, tmp_path)

    def tales(units) -> set[str]:
        return {WORDS.text(d.ids).partition("\n")[0] for (d,) in units}

    assert len(tales(made.held_out)) == 2
    assert len(made.held_out) == 6
    assert len(tales(made.units)) == 18
    assert not tales(made.held_out) & tales(made.units)
    assert made.about["trained_on"] == "CoQA train_partial (20 different stories)"
    assert made.tainted == ()
    (again,) = coqa.make(tmp_path, META, WORDS, "train_partial", 4, tmp_path)
    assert tales(again.held_out) == tales(made.held_out)
    assert len(again.stories) == 4


BAD = {
    "no story": ({"id": 1}, "validation.jsonl:1 is no story"),
    "too few": (
        {**F.story(0, ["a", "b"]), "answers": {"input_text": ["a"]}},
        "answers each question",
    ),
    "none": (F.story(0, []), "at least one"),
    "a list": ([1], "validation.jsonl:1 is no story"),
    "in train": (F.story(3, ["yes"]), "1 stories are in train_partial and in what is to be scored"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_stories(name, tmp_path):
    row, said = BAD[name]
    F.write_coqa(tmp_path)
    F.write_jsonl(tmp_path / "coqa" / "validation.jsonl", [row])
    with pytest.raises(T.InputError, match=said):
        coqa.make(tmp_path, META, WORDS, "train_partial", 0, tmp_path)


def test_no_file_and_own_arm(tmp_path):
    F.write_coqa(tmp_path)
    with pytest.raises(T.InputError, match=r"no .*coqa/train\.jsonl"):
        coqa.make(tmp_path, META, WORDS, "train", 0, tmp_path)
    own = {"config": {**META["config"], "arm": "mine.py:Mine"}}
    with pytest.raises(T.InputError, match="not built in"):
        coqa.make(tmp_path, own, WORDS, "train_partial", 0, tmp_path)


# ---- Answers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """A random model as the trainer has it and as transformers has it, with windows that bind."""
    changes = {"vocab": 257, "ext_window": 0, "row_tokens": 512, "arm": "diff_v2"}
    cfg = H.tiny("", "", **changes)
    ours = T.GPT(cfg.model, 1024)
    H.randomise(ours, 3)
    with torch.no_grad():
        ours.head *= 3  # greedy choices that no rounding turns
    meta = {"config": cfg.flat(), "window": 128, "step": 1, "steps": 2}
    return ours, export.build(ours, meta, 256)


def greedy(model: T.GPT, prompt: np.ndarray) -> str:
    """The first line, a whole forward pass of the trainer's model for each token."""
    ids = prompt.tolist()
    for _ in range(coqa.ANSWER_TOKENS):
        row = torch.tensor([ids])
        logits = model.logits(row, torch.zeros_like(row), T.windows(128, "cpu"))[0, -1]
        ids.append(int(logits.argmax()))
        new = WORDS.text(ids[len(prompt) :])
        if ids[-1] == 256 or "\n" in new.lstrip():
            break
    return coqa_score.first_line(WORDS.text(ids[len(prompt) :]))


def test_answers_are_greedy_whatever_the_batch(pair, monkeypatch):
    """Batches of several lengths, one at a time, and no cache at all: the same lines."""
    ours, theirs = pair
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 8)
    prompts = [np.append(256, rng.integers(32, 127, n)).astype(np.int32) for n in lengths]
    monkeypatch.setattr(coqa, "CPU_BATCH_TOKENS", 700)
    got = coqa.answers(theirs, WORDS, prompts)
    assert got == [coqa.answers(theirs, WORDS, [p])[0] for p in prompts]
    monkeypatch.setattr(coqa, "FIRST_TOKENS", 3)  # nearly all are gone on with
    assert got == coqa.answers(theirs, WORDS, prompts)
    assert got == [greedy(ours, p) for p in prompts]
    assert len(set(got)) > 4


def test_answers_of_halved_batches_are_the_same(pair, monkeypatch):
    """Memory is out in the middle of an answer: nothing is lost, nothing is there twice."""
    _, theirs = pair
    rng = np.random.default_rng(1)
    prompts = [np.append(256, rng.integers(32, 127, n)).astype(np.int32) for n in (9, 40, 30, 80)]
    wanted, sizes, forward = coqa.answers(theirs, WORDS, prompts), [], theirs.forward

    def small(*args, **kwargs):
        out = forward(*args, **kwargs)
        sizes.append(len(out.logits))
        if sizes[-1] > 1 and len(sizes) % 3 == 0:
            raise torch.OutOfMemoryError("no room")
        return out

    monkeypatch.setattr(theirs, "forward", small)
    assert coqa.answers(theirs, WORDS, prompts) == wanted
    assert {4, 2, 1} == {*sizes}

    def none(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(theirs, "forward", none)
    with pytest.raises(torch.OutOfMemoryError):
        coqa.answers(theirs, WORDS, prompts)


def test_no_prompts_have_no_answers(pair):
    assert coqa.answers(pair[1], WORDS, []) == []


def built(arm: str):
    """An exported model in bf16, 8 query heads if differential, else 4."""
    cfg = H.tiny("", "", vocab=257, ext_window=0, row_tokens=512, arm=arm, n_head=4)
    ours = T.GPT(cfg.model, 256)
    H.randomise(ours, 3)
    meta = {"config": cfg.flat(), "window": 128, "step": 1, "steps": 2}
    return export.cast(export.build(ours, meta, 256), torch.bfloat16).eval()


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of tensors that were there at once, of those made within."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


@pytest.mark.parametrize(
    "arm, most",
    [
        ("softmax", 0),
        ("selective", coqa.SELECTIVE_BYTES),
        ("diff_v2,selective=true", coqa.SELECTIVE_BYTES),
        ("diff_v2,selective=true,window2=20", coqa.SELECTIVE_BYTES + 8 * coqa.HEAD_BYTES),
        ("diff_v2,form=full,window2=20", 8 * coqa.HEAD_BYTES),
    ],
)
@torch.no_grad()
def test_a_pair_of_tokens_takes_no_more_than_is_reckoned(arm, most, monkeypatch):
    """What grows with the square of a row's length, SDPA itself aside."""
    model, found = built(arm), []
    assert coqa.pair_bytes(model) == most

    def attention(q, k, v, mask, scale):
        assert mask.dtype in (torch.bool, q.dtype)
        return torch.zeros_like(v[:, : q.size(1)])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for length in (256, 512):
        with Live() as live:
            model(torch.full((2, length), 65), use_cache=True, logits_to_keep=1)
        found.append(live.most)
    a_pair = (found[1] - 2 * found[0]) / (512**2 - 2 * 256**2) / 2
    assert a_pair <= (most or 8)  # of a mask that all heads share


def test_rows_at_once(monkeypatch):
    """What a row takes grows with the square of its length where attention is selective."""
    plain, selective = built("softmax"), built("selective")
    assert coqa.rows_at_once(selective, 1000) == coqa.CPU_BATCH_TOKENS // 1000
    assert coqa.rows_at_once(selective, 10**5) == 1
    memory, held = 80 * 10**9, 5 * 10**9
    monkeypatch.setattr(coqa.memory, "allowed", lambda _: memory + held)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held)
    for model in (plain, selective):
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for length in (100, 1000, 4000):
        assert coqa.rows_at_once(plain, length) == memory // (200_000 * length)
        row = 200_000 * length + coqa.SELECTIVE_BYTES * length**2
        assert coqa.rows_at_once(selective, length) == memory // row


def test_a_line_ends_after_something_visible():
    rule = coqa.FirstLine(WORDS, torch.zeros(3, dtype=torch.bool))
    rows = ["\n \nab\nc", "x y\n\n\n.", "abcdefg"]
    done = [
        rule(torch.tensor([[*r[:n]] for r in map(str.encode, rows)]), None) for n in range(1, 8)
    ]
    ended = torch.stack(done).int()
    first = [int(e.argmax()) if e.any() else None for e in ended.T]
    assert first == [5, 3, None]  # the third line of the first row is its first with a letter
    again = coqa.FirstLine(WORDS, torch.tensor([True]))  # of an answer that is gone on with
    assert again(torch.tensor([[10]]), None).tolist() == [True]


@pytest.mark.parametrize(
    "said, ended",
    [("\n \nab\nc", True), ("x\n", True), ("\n\n ", False), ("abc", False), ("", False)],
)
def test_an_answer_that_has_ended_is_not_gone_on_with(said, ended):
    assert coqa.has_ended(WORDS, np.frombuffer(said.encode(), np.uint8)) == ended
    assert coqa.has_ended(WORDS, np.array([*said.encode(), 256]))  # end-of-text


# ---- The Harness's task of the held-out stories -------------------------------------------------


def test_the_written_task_scores_as_ours(tmp_path):
    """lm_eval reads it, asks with our prompts, and gives our last-turn figures."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    said = itertools.cycle([" yes\n\nQ: and?", "\nno.", " yes indeed", ""])
    asked = []

    class Parrot(LM):
        def generate_until(self, requests, **_):
            asked.extend(request.args[0] for request in requests)
            return [next(said) for _ in requests]

        def loglikelihood(self, requests, **_):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    F.write_coqa(tmp_path / "data", dev=40)
    coqa.make(tmp_path / "data", META, WORDS, "dev400", 0, tmp_path / "out")
    folder = tmp_path / "out" / "lm_eval_tasks"
    rows = [json.loads(x) for x in (folder / "coqa_dev100.jsonl").read_text().splitlines()]
    assert len(rows) == 8  # a fifth
    result = lm_eval.simple_evaluate(
        model=Parrot(),
        tasks=["coqa_dev100"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["coqa_dev100"]
    stories = [coqa.Story.read("", row, scored=True) for row in rows]
    prompts = [WORDS.text(coqa.conversation(WORDS, s, 10_000)[1][-1]) for s in stories]
    assert sorted(asked) == sorted(prompts)
    # yes, no, yes indeed, nothing: exact 1 in 4; F1 1, 0, 2/3, 0
    assert result["em,none"] == pytest.approx(1 / 4)
    assert result["f1,none"] == pytest.approx((1 + 2 / 3) / 4)


def test_dev400_taints_stock_coqa(tmp_path):
    F.write_coqa(tmp_path / "data")
    made = coqa.make(tmp_path / "data", META, WORDS, "dev400", 0, tmp_path / "out")[0]
    assert made.tainted == ("coqa",)
    assert len(made.stories) == 2
    folder = tmp_path / "hf"
    entry = {"trained_on": made.about["trained_on"], "tainted": list(made.tainted)}
    F.write_jsonl(folder / "config.json", [{"finetuned": [entry]}])
    assert task.lineage(folder) == [entry]
    task.refuse_trained_on(folder, ["coqa_dev100", "lambada_openai", "commonsense_qa"])
    for name in ("coqa", "coqa_offline", "coqa_local"):
        with pytest.raises(T.InputError, match="8 of CoQA's dev stories: coqa"):
            task.refuse_trained_on(folder, ["arc_easy", name])
    F.write_jsonl(folder / "config.json", [{"model_type": "gpt2"}])
    assert task.lineage(folder) == []
