"""What a fine-tuning task is made of: documents that say where an answer is asked for, whole in
their rows, and what a model thinks of those answers. Tasks are in coqa.py and csqa.py."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import train_gpt as T
from data import encode
from evals import memory, sample

OPEN_ROWS = 32  # rows that may still take a document: packing stays linear
CALL_TOKENS = {"cuda": 32_768, "cpu": 4096}  # of a forward pass while scoring
HELD_OUT = 0.1  # of what there is to train on: early stopping looks at it
LONGEST = 4096  # tokens in a row; positions are rotary, and windows bound what they tell apart


# ---- Text ---------------------------------------------------------------------------------------


class Words:
    """A tokenizer without the end-of-text token in front."""

    def __init__(self, tokenizer: encode.Tokenizer):
        self.tokenizer, self.eot = tokenizer, tokenizer.vocab.eot
        self.pieces = sample.token_pieces(tokenizer)
        self._encode = tokenizer.encoder()

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text."""
        batch = self._encode(list(texts))
        ends = np.cumsum(batch.lengths)
        tokens = batch.tokens.astype(np.int32)
        return [tokens[end - n + 1 : end] for end, n in zip(ends, batch.lengths)]

    def text(self, ids: Sequence[int]) -> str:
        """Broken UTF-8 becomes U+FFFD; end-of-text is nothing."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def read_rows(folder: Path, name: str) -> list[tuple[str, dict]]:
    """[(file and line, object)] of NAME.jsonl or NAME.jsonl.xz; InputError where there is none."""
    paths = [p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz") if p.is_file()]
    if not paths:
        raise T.InputError(
            f"no {folder / name}.jsonl (or .jsonl.xz): --task-data is the folder above"
        )
    rows = []
    try:
        with (lzma.open if paths[0].suffix == ".xz" else open)(
            paths[0], "rt", encoding="utf-8"
        ) as f:
            for number, line in enumerate(f, 1):
                rows.append((f"{paths[0]}:{number}", json.loads(line)))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as e:
        raise T.InputError(f"{paths[0]}:{len(rows) + 1} cannot be read: {e}") from None
    if not rows:
        raise T.InputError(f"{paths[0]} is empty")
    return rows


def split_off(keys: Sequence[str], share: float, seed: int = 0) -> set[str]:
    """A share of the different keys, at least one, the same whenever the keys are the same."""
    unique = sorted(set(keys))
    count = max(1, round(share * len(unique)))
    return {unique[i] for i in np.random.default_rng(seed).permutation(len(unique))[:count]}


# ---- Documents and rows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """ids [n] int32, end-of-text first. targets [n] int64: what is asked for at each position, -1
    where nothing is. In a language-model task that is the next token."""

    ids: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, eot: int, parts: Sequence[tuple[np.ndarray, bool]], most: int = 0) -> Document:
        """Tokens one after another, each part asked for or not. Over `most` tokens (0: no limit),
        those after end-of-text go first: what is asked for is at the end."""
        ids = np.concatenate([[eot], *(tokens for tokens, _ in parts)]).astype(np.int32)
        asked = np.concatenate([[False], *(np.full(len(tokens), a) for tokens, a in parts)])
        targets = np.where(np.append(asked[1:], False), np.append(ids[1:], -1), -1)
        if most and len(ids) > most:
            ids, targets = (np.append(t[:1], t[len(t) - most + 1 :]) for t in (ids, targets))
        return cls(ids, targets.astype(np.int64))


Unit = tuple[Document, ...]  # documents that share a row


def round_up(n: int, unit: int = T.BLOCK) -> int:
    return -(-n // unit) * unit


def size(unit: Unit) -> int:
    return sum(map(len, unit))


def pack(sizes: Sequence[int], row: int) -> list[list[int]]:
    """Indices of the units in each row, every unit whole: each goes into the first of the last
    OPEN_ROWS rows that has room, else it opens another."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i, n in enumerate(sizes):
        if n > row:
            raise ValueError(f"{n} tokens do not fit a row of {row}")
        open_rows = range(max(0, len(rows) - OPEN_ROWS), len(rows))
        at = next((r for r in open_rows if room[r] >= n), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(row)
        rows[at].append(i)
        room[at] -= n
    return rows


def batch_of(rows: Sequence[Sequence[Document]], row: int, eot: int) -> T.Batch:
    """Documents in rows, as the trainer's loop takes them. What is left of a row is a document of
    end-of-text tokens, of which nothing is asked."""
    shape = len(rows), row
    tokens, targets = np.full(shape, eot, np.int32), np.full(shape, -1, np.int64)
    docs, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, documents in enumerate(rows):
        at = 0
        for number, document in enumerate(documents):
            part = slice(at, at + len(document))
            tokens[r, part], targets[r, part] = document.ids, document.targets
            docs[r, part], position[r, part] = number, np.arange(len(document))
            at = part.stop
        docs[r, at:], position[r, at:] = len(documents), np.arange(row - at)
    return T.Batch(*map(torch.from_numpy, (tokens, targets, docs, position)))


# ---- What a model thinks ------------------------------------------------------------------------


@torch.no_grad()
def read_asked(
    model: nn.Module,
    documents: Sequence[Document],
    row: int,
    window: Tensor,
    eot: int,
    of: Callable[[Tensor, T.Batch], Tensor],
) -> Tensor:
    """What `of(hidden [B, T, d], batch)` makes of the positions where something is asked, row by
    row: [n, ...], here in the documents' order. window: as T.windows has it, on the model's device.
    """
    rows = pack([len(d) for d in documents], row)
    some = max(1, CALL_TOKENS[window.device.type] // row)
    found, order = [], []

    def read(first: int, past: int) -> None:
        part = rows[first:past]
        batch = batch_of([[documents[i] for i in r] for r in part], row, eot).to(window.device)
        found.append(of(model(batch.tokens, batch.docs, window), batch))
        order.extend(i for r in part for i in r)

    memory.in_batches(len(rows), lambda _: some, read)
    number = np.repeat(order, [(documents[i].targets >= 0).sum() for i in order])
    back = torch.from_numpy(np.argsort(number, kind="stable")).to(window.device)
    return torch.cat(found)[back]


def asked_states(
    model: nn.Module, documents: Sequence[Document], row: int, window: Tensor, eot: int
) -> tuple[Tensor, Tensor]:
    """(hidden [n, d], targets [n]) of every position where something is asked, in the documents'
    order. window: as T.windows gives it, on the model's device."""
    states = read_asked(model, documents, row, window, eot, lambda h, batch: h[batch.targets >= 0])
    targets = np.concatenate([d.targets[d.targets >= 0] for d in documents])
    return states, torch.from_numpy(targets).to(window.device)


def answer_nats(
    model: nn.Module, documents: Sequence[Document], row: int, window: Tensor, eot: int
) -> list[Tensor]:
    """-ln p of each asked token, fp32, a tensor for each document, on the CPU. Over the vocabulary
    alone, without the head's padding, as an exported model has it."""

    def of(h: Tensor, batch: T.Batch) -> Tensor:
        return sample.token_nats(model, h, batch.tokens, batch.docs, batch.targets)

    nats = read_asked(model, documents, row, window, eot, of)
    return list(nats.cpu().split([int((d.targets >= 0).sum()) for d in documents]))


# ---- Tasks --------------------------------------------------------------------------------------


@dataclass
class Scores:
    """figures: percentages by name, the main one first. items: what was said of each item."""

    figures: dict[str, float]
    items: list[dict]


@dataclass
class Task:
    """Something to fine-tune on and to be scored by.

    units: to train on, what is kept in one row together; held_out: the slice of train that early
    stopping looks at, never what is reported. about: what a reader must know, for the JSON.
    tainted: tasks of the Evaluation Harness that mean nothing after this training.
    """

    name: str
    words: Words
    units: list[Unit]
    held_out: list[Unit]
    about: dict
    epochs: int = 3
    step_tokens: int = 8192  # about: whole rows, at least 8
    chosen_by: str = "nats"  # the key of `look` that is drawn, and that `rank` puts first
    tainted: tuple[str, ...] = ()
    row: int = field(init=False)  # tokens: the shortest that holds every unit

    def __post_init__(self):
        self.row = round_up(max(map(size, (*self.units, *self.held_out, *self.reported()))))

    def reported(self) -> list[Unit]:
        """What of the reported set has to fit a row, too."""
        return []

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return max(8, self.step_tokens // self.row)

    def start(self, model: nn.Module, seed: int) -> None:
        """What of the model is new and therefore random; nothing, unless a task says so."""

    def adapt(self, trainer: T.Trainer) -> None:
        """Gives the trainer another head; none, unless a task says so."""

    def look(self, model: nn.Module, window: Tensor) -> dict[str, float]:
        """Figures on the held-out slice; `nats`: the loss on answers."""
        raise NotImplementedError

    def rank(self, look: dict[str, float]) -> tuple[float, ...]:
        """Of two looks the better has the greater; of equal ones the first is kept."""
        return (-look["nats"],)

    def before(self, model: nn.Module, meta: dict, window: Tensor) -> Scores | None:
        """`score` of the checkpoint as it came; None where that has no meaning."""
        return self.score(model, meta, window)

    def score(self, model: nn.Module, meta: dict, window: Tensor) -> Scores:
        """The reported set."""
        raise NotImplementedError


# ---- What a model was tuned on ------------------------------------------------------------------


def lineage(path: str | Path) -> list[dict]:
    """What a run, checkpoint or exported folder was fine-tuned on, oldest first; [] if nothing.
    An entry: {task, trained_on, tainted, epochs, lr, seed, start}."""
    config = Path(path) / "config.json"
    if config.is_file():
        try:
            return json.loads(config.read_text()).get("finetuned") or []
        except (OSError, ValueError, AttributeError) as e:
            raise T.InputError(f"{config} is damaged: {e}") from None
    return (sample.meta_of(path).get("labels") or {}).get("finetuned") or []


def refuse_trained_on(path: str | Path, tasks: Sequence[str]) -> None:
    """InputError where a task of the Evaluation Harness asks what the model was tuned on."""
    for entry in lineage(path):
        for task in tasks:
            if task.removesuffix("_offline").removesuffix("_local") in entry["tainted"]:
                raise T.InputError(
                    f"{path} was fine-tuned on {entry['trained_on']}: {task} would ask what it was "
                    "trained on; use the task of the held-out items beside its results"
                )
