"""evals/csqa.py and evals/task.py: constructed models that must be right always and never, the
choice head's gradient, whole documents in rows, and what is refused."""

from __future__ import annotations

import lzma
import types

import fake_tasks as F
import helpers as H
import numpy as np
import pytest
import torch

from evals import csqa, sample, task

T = H.T
WORDS = task.Words(sample.tokenizer_of({"config": {"vocab": 257}}))
ROWS = T.padded(257)
WINDOW = T.windows(1024, "cpu")


def questions(data, name="validation"):
    return csqa.read_questions(data, name)


@pytest.fixture
def tasks(tmp_path):
    return csqa.make(F.write_csqa(tmp_path), WORDS, 0)


class Stub(torch.nn.Module):
    """A model whose hidden state is what `say(document's text, next token)` gives."""

    def __init__(self, head: torch.Tensor, say):
        super().__init__()
        self.head, self.say, self.softcap = head, say, 0.0
        self.cfg = types.SimpleNamespace(vocab=257)

    def forward(self, tokens, docs, window):
        out = torch.zeros(*tokens.shape, self.head.size(1))
        for row in range(len(tokens)):
            for number in docs[row].unique():
                at = (docs[row] == number).nonzero()[:, 0]
                ids = tokens[row, at].tolist()
                for place, after in zip(at, [*ids[1:], 256]):
                    out[row, place] = self.say(WORDS.text(ids), after)
        return out


def right_texts(asked) -> set[str]:
    return {f"Question: {q.text}\nAnswer: {q.choices[q.right]}" for q in asked}


def reader(asked, plus: float) -> Stub:
    """Adds `plus` to the logit of the token that comes next, where the answer is right."""
    right, one = right_texts(asked), torch.eye(ROWS)
    return Stub(one, lambda text, after: one[after] * plus * (text in right))


# ---- Accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("plus", "wanted"), [(5.0, 100.0), (0.0, 20.0), (-5.0, 0.0)])
def test_cloze_knows_all_nothing_or_the_opposite(plus, wanted, tasks):
    """Nothing: all five are alike and the first is taken, which is right one time in five."""
    cloze = tasks[0]
    model = reader([*cloze.questions, *cloze.held_questions], plus)
    scores = cloze.score(model, {}, WINDOW)
    assert scores.figures == {"accuracy": wanted, "accuracy, sums": wanted}
    assert [i["right"] for i in scores.items] == [q.right for q in cloze.questions]
    hits = [i["chosen"] == i["right"] for i in scores.items]
    assert 100 * np.mean(hits) == wanted
    if plus:
        assert cloze.look(model, WINDOW)["accuracy"] == wanted


def test_cloze_is_by_character_and_by_sum(tmp_path):
    """A long right answer, likelier a token than the short wrong ones and less likely in all."""
    F.write_csqa(tmp_path, validation=0)
    long = [F.question(i, 2, ["no", "ya", "considerably", "we", "us"]) for i in range(100, 104)]
    F.write_jsonl(tmp_path / "commonsense_qa" / "validation.jsonl", long)
    cloze = csqa.make(tmp_path, WORDS, 0)[0]
    scores = cloze.score(reader(cloze.questions, 1.0), {}, WINDOW)
    assert scores.figures == {"accuracy": 100.0, "accuracy, sums": 0.0}
    # ln p of a token: 1 - ln(256 + e) where right, -ln 257 where not; a space is no character
    wanted = [-3 * np.log(257) / 2] * 5
    wanted[2] = 13 * (1 - np.log(256 + np.e)) / 12
    assert scores.items[0]["scores"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("sign", "wanted"), [(1.0, 100.0), (-1.0, 0.0)])
def test_head_knows_all_or_the_opposite(sign, wanted, tasks):
    choice = tasks[1]
    asked = [*choice.questions, *questions_of(choice)]
    right = {text + "\n" for text in right_texts(asked)}
    head = torch.zeros(ROWS, 2)
    head[257, 0] = sign
    head[:257] = 9.0  # rows of tokens have no say
    model = Stub(head, lambda text, after: torch.tensor([1.0 if text in right else -1.0, 0.0]))
    assert choice.score(model, {}, WINDOW).figures == {"accuracy": wanted}
    look = choice.look(model, WINDOW)
    # scores 1 and four times -1, or their opposites
    chance = np.exp(sign) / (np.exp(sign) + 4 * np.exp(-sign))
    assert look["nats"] == pytest.approx(-np.log(chance), abs=1e-6)
    assert look["accuracy"] == wanted


def questions_of(choice) -> list:
    """The held-out questions, read back from their tokens."""
    found = []
    for unit in choice.held_out:
        text = [WORDS.text(document.ids) for document in unit]
        prompt = text[0].partition("\nAnswer: ")[0].removeprefix("Question: ")
        choices = tuple(t.partition("\nAnswer: ")[2].rstrip("\n") for t in text)
        right = [document.targets[-1] for document in unit].index(1)
        found.append(csqa.Question("", prompt, choices, right))
    return found


# ---- What is trained on -------------------------------------------------------------------------


def test_only_the_right_answer_is_asked_for(tasks):
    cloze, choice = tasks
    for unit in (*cloze.units, *cloze.held_out):
        (document,) = unit
        asked = np.flatnonzero(document.targets >= 0)
        assert (document.targets[asked] == document.ids[asked + 1]).all()
        answer = WORDS.text(document.targets[asked])
        assert WORDS.text(document.ids).endswith(f"\nAnswer:{answer}")
        assert answer.startswith(" ")
        assert answer.endswith("z")  # the mark of the right one
        assert asked[-1] == len(document) - 2
    for unit in choice.units:
        for document in unit:
            assert (document.targets[:-1] == -1).all()
            assert WORDS.text(document.ids).endswith("z\n") == document.targets[-1]
        assert sum(document.targets[-1] for document in unit) == 1


def test_held_out_is_a_fixed_slice_of_train(tmp_path):
    F.write_csqa(tmp_path)
    first, again = (csqa.make(tmp_path, WORDS, 0) for _ in range(2))
    held = {q.id for q in first[0].held_questions}
    assert held == {q.id for q in again[0].held_questions}
    assert len(held) == 6
    trained = {WORDS.text(d.ids).partition("\n")[0] for unit in first[1].units for d in unit}
    assert len(trained) == 54
    assert not trained & {f"Question: {q.text}" for q in first[0].held_questions}
    assert not trained & {f"Question: {q.text}" for q in first[0].questions}
    assert len(csqa.make(tmp_path, WORDS, 7)[0].questions) == 7


# ---- The choice head ----------------------------------------------------------------------------


def test_choice_head_is_autograds_cross_entropy():
    """Loss and gradients of the mean over questions, as the loop scales them."""
    gen, d, asked = torch.Generator().manual_seed(0), 6, 4
    weight = torch.nn.Parameter(torch.randn(ROWS, d, generator=gen))
    weight.grad = torch.zeros_like(weight)
    h = torch.randn(40, d, generator=gen, requires_grad=True)
    at = torch.randperm(40, generator=gen)[: 5 * asked].sort().values
    right = torch.tensor([2, 0, 4, 2])
    targets = torch.full((40,), -1)
    targets[at] = torch.nn.functional.one_hot(right, 5).flatten()
    wanted = torch.nn.functional.cross_entropy((h[at] @ weight[257]).view(-1, 5), right)
    dh, dw = torch.autograd.grad(wanted, [h, weight])
    wanted = wanted.item()
    base = T.Head(weight, 15.0, torch.float32, False, False)
    head, counted = csqa.ChoiceHead(base, 257), 5 * asked
    losses, got = head.backward(h.detach(), targets, torch.tensor(7.0 / counted))
    assert float(losses.sum() / counted) == pytest.approx(wanted, rel=1e-6)
    assert torch.allclose(got, 7 * dh, atol=1e-6)
    assert torch.allclose(weight.grad, 7 * dw, atol=1e-6)
    # in evaluation it is the language model's head
    lm = torch.randint(257, (40,), generator=gen)
    assert torch.equal(head.losses(h.detach(), lm), base.losses(h.detach(), lm))


# ---- Rows ---------------------------------------------------------------------------------------


def test_pack_keeps_units_whole():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 500).tolist()
    rows = task.pack(sizes, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(sizes[i] for i in row) <= 128 for row in rows)
    assert len(rows) <= 1.15 * sum(sizes) / 128  # measured 1.08
    with pytest.raises(ValueError, match="do not fit"):
        task.pack([129], 128)


def test_batch_of_documents():
    documents = [
        task.Document.of(256, [(np.array([1, 2]), False), (np.array([3]), True)]),
        task.Document.of(256, [(np.array([4]), True)]),
    ]
    batch = task.batch_of([documents, documents[1:]], 8, 256)
    assert batch.tokens.tolist()[0] == [256, 1, 2, 3, 256, 4, 256, 256]
    assert batch.targets.tolist() == [[-1, -1, 3, -1, 4, -1, -1, -1], [4] + [-1] * 7]
    assert batch.docs.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.position.tolist()[0] == [0, 1, 2, 3, 0, 1, 0, 1]


def test_scores_do_not_depend_on_the_packing():
    """A document's nats are those that it has alone in a row, in the order that was asked for."""
    cfg = H.tiny("", "").model
    model = T.GPT(T.dataclasses.replace(cfg, vocab=257), 512)
    H.randomise(model)
    rng = np.random.default_rng(1)
    documents = [
        task.Document.of(256, [(rng.integers(0, 256, n), False), (rng.integers(0, 256, m), True)])
        for n, m in rng.integers(1, 40, (25, 2))
    ]
    got = task.answer_nats(model, documents, 128, WINDOW, 256)
    for document, nats in zip(documents, got):
        ids = torch.from_numpy(document.ids)[None]
        logits = model.logits(ids, torch.zeros_like(ids), WINDOW)[0]
        asked = document.targets >= 0
        chances = torch.log_softmax(logits[asked], -1)
        wanted = -chances.gather(1, torch.from_numpy(document.targets[asked])[:, None])[:, 0]
        assert torch.allclose(nats, wanted, atol=2e-5)


def test_a_long_document_loses_its_beginning():
    parts = [(np.arange(10), False), (np.arange(10, 14), True)]
    document = task.Document.of(256, parts, most=7)
    assert document.ids.tolist() == [256, 8, 9, 10, 11, 12, 13]
    assert document.targets.tolist() == [-1, -1, 10, 11, 12, 13, -1]


# ---- Bad input ----------------------------------------------------------------------------------


def without(row: dict, key: str) -> dict:
    return {k: v for k, v in row.items() if k != key}


BAD = {
    "no question": (without(F.question(1, 1), "question"), "validation.jsonl:1 is no question"),
    "another key": ({**F.question(1, 1), "answerKey": "F"}, "validation.jsonl:1 is no question"),
    "four": (F.question(1, 1, ["a", "b", "c", "d"]), "has 4 choices, not 5"),
    "in train": (F.question(3, 1), "1 questions are in train and in validation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions(name, tmp_path):
    row, said = BAD[name]
    F.write_csqa(tmp_path)
    F.write_jsonl(tmp_path / "commonsense_qa" / "validation.jsonl", [row])
    with pytest.raises(T.InputError, match=said):
        csqa.make(tmp_path, WORDS, 0)


def test_bad_files(tmp_path):
    with pytest.raises(T.InputError, match=r"no .*train\.jsonl"):
        csqa.make(tmp_path, WORDS, 0)
    F.write_csqa(tmp_path)
    path = tmp_path / "commonsense_qa" / "train.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(T.InputError, match=r"train\.jsonl:60 cannot be read"):
        csqa.make(tmp_path, WORDS, 0)
    path.write_text("")
    with pytest.raises(T.InputError, match="is empty"):
        csqa.make(tmp_path, WORDS, 0)


def test_xz_files_are_read(tmp_path):
    F.write_csqa(tmp_path)
    path = tmp_path / "commonsense_qa" / "train.jsonl"
    packed = lzma.compress(path.read_bytes())
    path.unlink()
    path.with_name("train.jsonl.xz").write_bytes(packed)
    assert len(questions(tmp_path, "train")) == 60
    path.with_name("train.jsonl.xz").write_bytes(packed[:-20])
    with pytest.raises(T.InputError, match="cannot be read"):
        questions(tmp_path, "train")


def test_a_head_without_a_spare_row(tmp_path):
    words = types.SimpleNamespace(tokenizer=types.SimpleNamespace(vocab=types.SimpleNamespace()))
    words.tokenizer.vocab.size = 50_304
    with pytest.raises(T.InputError, match="none to spare"):
        csqa.make(tmp_path, words, 0)
