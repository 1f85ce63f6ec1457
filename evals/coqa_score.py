"""CoQA's arithmetic: normalised exact match and F1, leave-one-out over the human answers.

Only the standard library is needed (`load` asks for `datasets`): evals/coqa.py copies this file
beside the Evaluation Harness task of the stories that it holds out.

Two forms of a figure, and they differ:
- the official script's: every turn, all references of it; the mean over turns;
- the Harness's task `coqa`: a story's last turn, references that say the same (but for case)
  counted once; the mean over stories.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus space, in this order."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def exact(reference: str, answer: str) -> float:
    return float(normal(reference) == normal(answer))


def f1(reference: str, answer: str) -> float:
    """Of the two bags of words. Where one is empty: 1 if both are, else 0."""
    wanted, said = normal(reference).split(), normal(answer).split()
    if not wanted or not said:
        return float(wanted == said)
    shared = sum((Counter(wanted) & Counter(said)).values())
    return 2 * shared / (len(wanted) + len(said))


def turn_score(references: Sequence[str], answer: str) -> tuple[float, float]:
    """(EM, F1) of one answer, 0 to 1: leaves each reference out in turn, takes the best of the
    others, and averages, as a person who wrote one of them is compared with the rest."""
    left = [references[:i] + references[i + 1 :] for i in range(len(references))]
    if len(references) == 1:
        left = [references]
    best = [[max(score(r, answer) for r in some) for some in left] for score in (exact, f1)]
    em, overlap = (sum(scores) / len(scores) for scores in best)
    return em, overlap


def different(references: Sequence[str]) -> list[str]:
    """References as the Harness counts them: the first of those that are alike but for case."""
    first: dict[str, str] = {}
    for text in references:
        first.setdefault(text.lower(), text)
    return list(first.values())


# ---- The Harness's task -------------------------------------------------------------------------


def load(data_files: dict[str, str], **_):
    """The task's `custom_dataset`: paths are relative to this file."""
    import datasets

    here, found = Path(__file__).resolve().parent, datasets.DatasetDict()
    for split, name in data_files.items():
        lines = (here / name).read_text(encoding="utf-8").splitlines()
        found[split] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return found


def doc_to_text(doc: dict) -> str:
    """The story, all earlier turns with the first person's answers, and the last question."""
    turns = zip(doc["questions"]["input_text"], doc["answers"]["input_text"])
    told = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in turns]
    return f"{doc['story']}\n\n{''.join(told[:-1])}Q: {doc['questions']['input_text'][-1]}\n\nA:"


def doc_to_target(doc: dict) -> list[str]:
    """The last turn's references."""
    others = doc["additional_answers"].values()
    return different([told["input_text"][-1] for told in (doc["answers"], *others)])


def first_line(text: str) -> str:
    """What of a generated text is the answer."""
    return text.strip().split("\n")[0]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    em, overlap = turn_score(doc_to_target(doc), first_line(results[0]))
    return {"em": em, "f1": overlap}
