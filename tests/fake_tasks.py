"""Constructed CoQA and CommonsenseQA files, which a model of 50,000 parameters can learn."""

from __future__ import annotations

import json
from pathlib import Path

LETTERS = "ABCDE"
SOURCES = ("cnn", "mctest")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def story(number: int, answers: list[str], **changes) -> dict:
    """A story of a line with a question for each answer; three others answer as the first did."""
    turns = list(range(1, len(answers) + 1))
    told = {"input_text": answers, "turn_id": turns}
    questions = {"input_text": [f"Item {t}?" for t in turns], "turn_id": turns}
    return {
        **{"id": f"id{number:03d}", "source": SOURCES[number % 2], "story": f"Tale {number}."},
        **{"questions": questions, "answers": told},
        "additional_answers": {str(i): told for i in range(3)},
        **changes,
    }


def write_coqa(folder: Path, train: int = 30, dev: int = 10) -> Path:
    """FOLDER/coqa: every answer is `yes`."""
    rows = [story(i, ["yes"] * (1 + i % 3)) for i in range(train + dev)]
    write_jsonl(folder / "coqa" / "train_partial.jsonl", rows[:train])
    write_jsonl(folder / "coqa" / "validation.jsonl", rows[train:])
    return folder


def question(number: int, right: int, choices: list[str] | None = None) -> dict:
    """The right answer, of all, ends with a z; lengths are the same."""
    choices = choices or [f"{'ab'[(number + i) % 2]}{'z' if i == right else 'q'}" for i in range(5)]
    return {
        **{"id": f"q{number}", "question": f"Number {number}?", "answerKey": LETTERS[right]},
        "choices": {"label": list(LETTERS), "text": choices},
    }


def write_csqa(folder: Path, train: int = 60, validation: int = 20) -> Path:
    """FOLDER/commonsense_qa."""
    rows = [question(i, i * 7 % 5) for i in range(train + validation)]
    write_jsonl(folder / "commonsense_qa" / "train.jsonl", rows[:train])
    write_jsonl(folder / "commonsense_qa" / "validation.jsonl", rows[train:])
    return folder
