"""CommonsenseQA: a question with five answers, one of them right; chance is 20 %.

Two forms, each tuned by itself:
- cloze: `Question: ...` / `Answer: ...`, and the answer whose text is the likeliest is chosen, by
  its log-probability per character (as the Evaluation Harness's acc_norm) or in all. Tuned as a
  language model on the right answers. It needs no tuning, so it is scored before, too.
- head: each answer is read after its question, and a new vector on the last hidden state scores it;
  cross-entropy over the five (as GPT-1 and BERT are tuned). The vector is the first padding row of
  the language-model head, which no token uses: so a checkpoint keeps its form.

Trained on train (9,741) but for a tenth; scored on validation (1,221).
The labels of test are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt as T
from evals import task
from evals.task import Document, Scores, Task, Unit, Words

CHOICES = 5
NEW_STD = 0.02  # of the new vector, as GPT-1 starts its own


# ---- Questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    choices: tuple[str, ...]
    right: int

    @classmethod
    def read(cls, where: str, row: dict) -> Question:
        """InputError where it is not as tau/commonsense_qa has it."""
        try:
            labels, choices = row["choices"]["label"], tuple(row["choices"]["text"])
            found = cls(str(row["id"]), row["question"], choices, labels.index(row["answerKey"]))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise T.InputError(
                f"{where} is no question as tau/commonsense_qa has it: {e!r}"
            ) from None
        if len(choices) != CHOICES:
            raise T.InputError(f"{where} has {len(choices)} choices, not {CHOICES}")
        return found


def read_questions(data: Path, name: str) -> list[Question]:
    return [Question.read(*row) for row in task.read_rows(data / "commonsense_qa", name)]


def texts(question: Question) -> list[str]:
    """The prompt, then each choice as it goes on from it."""
    return [f"Question: {question.text}\nAnswer:", *(f" {choice}" for choice in question.choices)]


def cloze(words: Words, question: Question) -> Unit:
    """A document for each choice; the choice's own tokens are asked for."""
    prompt, *choices = words(texts(question))
    return tuple(Document.of(words.eot, [(prompt, False), (c, True)]) for c in choices)


def pairs(words: Words, question: Question) -> Unit:
    """A document for each choice; at its last token, a line end, asked: 1 if right, else 0."""
    prompt, *choices, end = words([*texts(question), "\n"])
    out = []
    for i, choice in enumerate(choices):
        ids = Document.of(words.eot, [(prompt, False), (choice, False), (end, False)]).ids
        out.append(Document(ids, np.append(np.full(len(ids) - 1, -1), int(i == question.right))))
    return tuple(out)


def accuracy(chosen: Sequence[int], questions: Sequence[Question]) -> float:
    """Percent."""
    return 100 * float(np.mean([c == q.right for c, q in zip(chosen, questions)]))


def items(questions: Sequence[Question], scores: np.ndarray) -> list[dict]:
    """A line for each question: which choice was taken, which is right, all five scores."""
    return [
        {"id": q.id, "chosen": int(s.argmax()), "right": q.right, "scores": s.round(4).tolist()}
        for q, s in zip(questions, scores)
    ]


class ByAccuracy(Task):
    """The most accurate look is the best; of equally accurate ones, that with the least loss."""

    def rank(self, look):
        return look["accuracy"], -look["nats"]


# ---- Cloze --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Cloze(ByAccuracy):
    """units and held_out are right answers; held_choices and choices are all five of them."""

    held_questions: list[Question]
    held_choices: list[Unit]
    questions: list[Question]
    choices: list[Unit]

    def reported(self):
        return [(document,) for unit in (*self.held_choices, *self.choices) for document in unit]

    def chances(self, model, questions, choices, window) -> tuple[np.ndarray, np.ndarray]:
        """ln p [n, 5] of each choice after its question; and the same a character."""
        documents = [document for unit in choices for document in unit]
        nats = task.answer_nats(model, documents, self.row, window, self.words.eot)
        total = -np.array([float(n.double().sum()) for n in nats]).reshape(-1, CHOICES)
        return total, total / [[max(1, len(c)) for c in q.choices] for q in questions]

    def look(self, model, window):
        total, each = self.chances(model, self.held_questions, self.held_choices, window)
        right = [q.right for q in self.held_questions]
        return {
            "accuracy": accuracy(each.argmax(1), self.held_questions),
            "nats": float(-total[np.arange(len(right)), right].mean()),  # of the right answer
        }

    def score(self, model, meta, window):
        total, each = self.chances(model, self.questions, self.choices, window)
        figures = {"accuracy": accuracy(each.argmax(1), self.questions)}
        figures["accuracy, sums"] = accuracy(total.argmax(1), self.questions)
        return Scores(figures, items(self.questions, each))


# ---- Head ---------------------------------------------------------------------------------------


def choice_losses(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """scores [n, 5] fp32, right [n, 5] (one 1 a row) -> (cross-entropy [n], d sum / d scores)."""
    log_p = scores.log_softmax(1)
    return -(log_p * right).sum(1), log_p.exp() - right


class ChoiceHead(T.Head):
    """The loop's head with the loss of a choice: targets are 1 and 0 at the end of each pair, five
    pairs in a row are a question. `losses`, for dev_loss, is the language model's as ever, but for
    what a copy head adds to it."""

    def __init__(self, head: T.Head, row: int):
        super().__init__(head.weight, head.cap, head.dtype, fp8=False, compiled=False)
        self.row = row

    def prepare(self) -> None:
        """Nothing to cast: one row is used."""

    @torch.no_grad()
    def backward(self, h: Tensor, targets: Tensor, scale: Tensor, *_) -> tuple[Tensor, Tensor]:
        """See T.Head. Each of a question's five ends bears the question's loss, as the loop takes
        the mean over ends. Ends that are no five (the loop's warm-up has no questions) are left."""
        at = (targets >= 0).nonzero()[:, 0]
        at = at[: len(at) // CHOICES * CHOICES]
        x, w = h[at].float(), self.weight[self.row]
        nats, grad = choice_losses((x @ w).view(-1, CHOICES), targets[at].view(-1, CHOICES))
        grad = (grad * CHOICES * scale).view(-1)
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad[self.row] += grad @ x
        losses, dh = torch.zeros_like(targets, dtype=torch.float32), torch.zeros_like(h)
        losses[at] = nats.repeat_interleave(CHOICES)
        dh[at] = (grad[:, None] * w).to(h.dtype)
        return losses, dh


@dataclass(kw_only=True)
class Choice(ByAccuracy):
    questions: list[Question]
    choices: list[Unit]

    def reported(self):
        return self.choices

    @property
    def new_row(self) -> int:
        return self.words.tokenizer.vocab.size

    def start(self, model, seed):
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.head[self.new_row].normal_(0, NEW_STD, generator=gen)

    def adapt(self, trainer):
        lm = trainer.lm
        lm.head, lm.pointer = ChoiceHead(lm.head, self.new_row), None

    def scores(self, model, units: Sequence[Unit], window) -> tuple[Tensor, Tensor]:
        """(scores [n, 5], right [n, 5]) fp32, on the CPU."""
        documents = [document for unit in units for document in unit]
        h, targets = task.asked_states(model, documents, self.row, window, self.words.eot)
        scores = h.float() @ model.head[self.new_row].float()
        return scores.view(-1, CHOICES).detach().cpu(), targets.view(-1, CHOICES).float().cpu()

    def look(self, model, window):
        scores, right = self.scores(model, self.held_out, window)
        hit = scores.argmax(1) == right.argmax(1)
        nats, _ = choice_losses(scores, right)
        return {"accuracy": 100 * float(hit.double().mean()), "nats": float(nats.double().mean())}

    def before(self, model, meta, window):
        return None  # a head that was never trained

    def score(self, model, meta, window):
        scores = self.scores(model, self.choices, window)[0].double().numpy()
        figures = {"accuracy": accuracy(scores.argmax(1), self.questions)}
        return Scores(figures, items(self.questions, scores))


# ---- Making them --------------------------------------------------------------------------------


def make(data: Path, words: Words, limit: int) -> list[Task]:
    """Both forms; `limit`: score the first questions alone (0: all). InputError for bad data."""
    vocab = words.tokenizer.vocab.size
    if T.padded(vocab) == vocab:
        raise T.InputError(f"a head of {vocab} rows has none to spare for a choice")
    train, reported = (read_questions(data, name) for name in ("train", "validation"))
    shared = {q.id for q in train} & {q.id for q in reported}
    if shared:
        raise T.InputError(f"{len(shared)} questions are in train and in validation")
    reported = reported[:limit] if limit else reported
    held = task.split_off([q.id for q in train], task.HELD_OUT)
    kept, held_out = ([q for q in train if (q.id in held) == there] for there in (False, True))
    parts = (kept, held_out, reported)
    about = {
        "trained_on": "CommonsenseQA train",
        "questions": len(kept),
        "held_out": f"{len(held_out)} of train",
        "scored_on": f"{len(reported)} validation questions",
    }
    how = {"chosen_by": "accuracy", "about": about, "questions": reported}
    of_all = [[cloze(words, q) for q in part] for part in parts]
    right = [[(unit[q.right],) for q, unit in zip(*part)] for part in zip(parts, of_all)]
    held = {"held_questions": held_out, "held_choices": of_all[1]}
    asked = [[pairs(words, q) for q in part] for part in parts]
    return [
        Cloze("csqa_cloze", words, *right[:2], choices=of_all[2], step_tokens=2048, **held, **how),
        Choice("csqa_head", words, *asked[:2], choices=asked[2], **how),
    ]
