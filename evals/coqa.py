"""CoQA: questions about a story, each with all earlier turns before it; answers are free text.

Trained as the Evaluation Harness asks: the story, then `Q: ...` and `A: ...` turns with blank lines
between them, a whole conversation as one document, loss on answers and the line end after each.
Scored on every turn: the history holds the first person's answers (gold history, as the official
script's users do), the model's own answer is greedy, its first line counts.

Splits: `train_partial` (954 stories with runs of a few turns each, selected by the authors of
Abg-CoQA; it is not CoQA's train set) and `train` (the real one, where you have it) are scored on
all dev stories; `dev400` trains on 400 dev stories and is scored on the other 100, 20 a domain,
for which it writes a task for the Harness.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import train_gpt as T
from evals import coqa_score, export, memory, task
from evals.task import Document, Scores, Task, Words
from variants import gpt2

SPLITS = ("train_partial", "train", "dev400")
ANSWER_TOKENS = 64  # a longer line is cut; the longest human answer of dev has 45 (GPT-2 tokens)
FIRST_TOKENS = 16  # by then most answers have ended; only the others are asked for more
# Prompts and answers in the cache at once; on a GPU, as many as this process may still take of its
# memory in these bytes, of which a token's keys and values (12 layers of 768) are a fifth.
CPU_BATCH_TOKENS, GPU_TOKEN_BYTES = 8192, 200_000
# Bytes of each pair of a row's tokens, in the layer that makes most of them at once: for what
# selective attention masks 13 were counted, for a head with a mask of its own 4, and on a GPU up to
# 4 of its mask's copies.
SELECTIVE_BYTES, HEAD_BYTES = 16, 8
DEV_TASK = "coqa_dev100"


TASK_YAML = f"""\
# The 100 dev stories that a model fine-tuned on the other 400 has not seen. Else as the stock task.
task: {DEV_TASK}
custom_dataset: !function coqa_score.load
dataset_kwargs:
  data_files:
    validation: {DEV_TASK}.jsonl
output_type: generate_until
validation_split: validation
doc_to_text: !function coqa_score.doc_to_text
doc_to_target: !function coqa_score.doc_to_target
process_results: !function coqa_score.process_results
generation_kwargs:
  until:
    - "\\nQ:"
metric_list:
  - metric: em
    aggregation: mean
    higher_is_better: true
  - metric: f1
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


# ---- Stories ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """references: for each question all people's answers; the first person's make the history."""

    id: str
    source: str
    text: str
    questions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    row: dict  # as it was read

    @classmethod
    def read(cls, where: str, row: dict, scored: bool) -> Story:
        """Other people's answers only where they are scored by: train has placeholders for them.
        InputError where a field is missing, or questions and answers differ in number."""
        try:
            people = [row["answers"]]
            if scored:
                people += (row.get("additional_answers") or {}).values()
            questions, answers = row["questions"]["input_text"], [p["input_text"] for p in people]
            if not questions or any(len(told) != len(questions) for told in answers):
                raise T.InputError(f"{where}: each person answers each question, at least one")
            told = tuple(zip(*answers))
            return cls(str(row["id"]), row["source"], row["story"], tuple(questions), told, row)
        except (KeyError, TypeError, AttributeError) as e:
            raise T.InputError(f"{where} is no story as EleutherAI/coqa has it: {e!r}") from None


def read_stories(data: Path, name: str) -> list[Story]:
    rows = task.read_rows(data / "coqa", name)
    return [Story.read(*row, scored=name == "validation") for row in rows]


def split_dev(stories: list[Story]) -> tuple[list[Story], list[Story]]:
    """(to train on, held out): of each domain as many as a fifth of its stories are held out,
    always the same ones; none whose text another conversation of dev is about, too."""
    told, held = Counter(s.text for s in stories), set()
    for source in sorted({s.source for s in stories}):
        ids = [s.id for s in stories if s.source == source]
        once = [s.id for s in stories if s.source == source and told[s.text] == 1]
        held |= task.split_off(once, 0.2 * len(ids) / max(1, len(once)))
    return [s for s in stories if s.id not in held], [s for s in stories if s.id in held]


# ---- Tokens -------------------------------------------------------------------------------------


def conversation(words: Words, story: Story, most: int) -> tuple[Document, list[np.ndarray]]:
    """(the conversation, for training; the prompt of each turn, end-of-text first, up to `A:`).

    The tokens are those of the whole text: its parts are cut where GPT-2's rule cuts, too. Where
    `most` tokens do not hold a conversation, the start of the story is left out; a prompt leaves
    ANSWER_TOKENS of them free.
    """
    turns = list(zip(story.questions, (answers[0] for answers in story.references)))
    lead = [f"{story.text}\n\n", *["\n\n"] * (len(turns) - 1)]
    texts = [
        text for start, (q, a) in zip(lead, turns) for text in (f"{start}Q: {q}\n\nA:", f" {a}")
    ]
    *parts, end = words([*texts, "\n"])
    ends = [part[:1] for part in parts[2::2]] + [end]  # the line end that an answer stops with
    rest = [parts[0]] + [part[1:] for part in parts[2::2]]
    pieces = [
        piece
        for question, answer, stop in zip(rest, parts[1::2], ends)
        for piece in ((question, False), (answer, True), (stop, True))
    ]
    whole = Document.of(words.eot, pieces).ids
    asked_at = 1 + np.cumsum([len(p) for p, _ in pieces])[::3]
    room = most - ANSWER_TOKENS - 1
    prompts = [np.append(whole[:1], whole[max(1, at - room) : at]) for at in asked_at]
    return Document.of(words.eot, pieces, most), prompts


# ---- Answers ------------------------------------------------------------------------------------


class FirstLine(transformers.StoppingCriteria):
    """A row is done at the first line end that follows something visible. begun: [rows] bool, where
    there was something visible before."""

    def __init__(self, words: Words, begun: torch.Tensor):
        device = begun.device
        self.ends = torch.tensor([b"\n" in piece for piece in words.pieces], device=device)
        self.shows = torch.tensor([bool(piece.strip()) for piece in words.pieces], device=device)
        self.begun = begun

    def __call__(self, input_ids, scores, **_):
        last = input_ids[:, -1]
        self.begun |= self.shows[last]
        return self.begun & self.ends[last]


def has_ended(words: Words, said: np.ndarray) -> bool:
    """Whether these tokens hold a whole answer, as FirstLine and end-of-text say."""
    begun = False
    for i in said:
        begun |= bool(words.pieces[i].strip())
        if i == words.eot or (begun and b"\n" in words.pieces[i]):
            return True
    return False


def pair_bytes(model: transformers.PreTrainedModel) -> int:
    """What attention makes of each pair of a row's tokens; 0 where all heads share a mask, which is
    little beside the rest."""
    most = 0
    for block in getattr(model.config, "blocks", ()):  # stock GPT-2 has none
        spec = block["attention"]
        if spec is None:
            continue
        heads = spec["query_heads"] if spec["second_window"] else 0
        most = max(most, SELECTIVE_BYTES * spec["selectors"] + HEAD_BYTES * heads)
    return most


def rows_at_once(model: transformers.PreTrainedModel, tokens: int) -> int:
    """How many prompts, with their answers `tokens` long, a batch takes."""
    device = model.device
    if device.type != "cuda":
        return max(1, CPU_BATCH_TOKENS // tokens)
    row = tokens * (GPU_TOKEN_BYTES + tokens * pair_bytes(model))
    return max(1, (memory.allowed(device) - torch.cuda.memory_allocated(device)) // row)


def answers(
    model: transformers.PreTrainedModel, words: Words, prompts: Sequence[np.ndarray]
) -> list[str]:
    """The first line that the model writes after each prompt, greedily, at most ANSWER_TOKENS long.

    A batch takes as many steps as its longest answer, and a step costs the same for few rows as for
    many: so all are asked for FIRST_TOKENS, and those that have not ended for the rest.
    """
    said = [np.zeros(0, np.int32) for _ in prompts]
    going = list(range(len(prompts)))
    for most in (FIRST_TOKENS, ANSWER_TOKENS - FIRST_TOKENS):
        more = write_on(model, words, [prompts[i] for i in going], [said[i] for i in going], most)
        for i, new in zip(going, more):
            said[i] = np.append(said[i], new)
        going = [i for i in going if not has_ended(words, said[i])]
    return [coqa_score.first_line(words.text(ids.tolist())) for ids in said]


@torch.no_grad()
def write_on(
    model: transformers.PreTrainedModel,
    words: Words,
    prompts: Sequence[np.ndarray],
    said: Sequence[np.ndarray],
    most: int,
) -> list[np.ndarray]:
    """Up to `most` tokens after each prompt and what was said to it, end-of-text after an answer's
    end. Prompts of similar length share a batch, padded on the left."""
    shown = [np.append(prompt, before) for prompt, before in zip(prompts, said)]
    begun = [any(words.pieces[i].strip() for i in before) for before in said]
    order = sorted(range(len(shown)), key=lambda i: len(shown[i]), reverse=True)
    out, device = [np.zeros(0, np.int64)] * len(shown), model.device

    def write_batch(first: int, past: int) -> None:
        some, longest = order[first:past], len(shown[order[first]])
        ids = torch.full((len(some), longest), words.eot)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(some):
            ids[row, longest - len(shown[i]) :] = torch.from_numpy(shown[i])
            mask[row, longest - len(shown[i]) :] = 1
        stop = FirstLine(words, torch.tensor([begun[i] for i in some], device=device))
        new = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=words.eot,
            pad_token_id=words.eot,
            stopping_criteria=[stop],
        )
        for i, tokens in zip(some, new[:, longest:].cpu().numpy()):
            out[i] = tokens
        progress(past, len(order))

    def rows(first: int) -> int:
        return rows_at_once(model, len(shown[order[first]]) + most)

    memory.in_batches(len(order), rows, write_batch)
    return out


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{done:,}/{total:,} turns answered" + "\n" * (done == total))
        sys.stderr.flush()


# ---- The task -----------------------------------------------------------------------------------


def figures(stories: Sequence[Story], said: Sequence[str]) -> Scores:
    """Scores of an answer to each turn of the stories, in order: official (mean over all turns, and
    by domain) and in the Harness's form (last turns). Items are lines of the official format."""
    items, last, by_source = [], [], {}
    answer = iter(said)
    for story in stories:
        for turn, references in enumerate(story.references, 1):
            text = next(answer)
            em, overlap = coqa_score.turn_score(references, text)
            items.append({"id": story.id, "turn_id": turn, "answer": text, "em": em, "f1": overlap})
            by_source.setdefault(story.source, []).append(overlap)
        last.append(coqa_score.turn_score(coqa_score.different(references), text))

    def percent(values) -> float:
        return 100 * float(np.mean(values))

    out = {"F1": percent([i["f1"] for i in items]), "EM": percent([i["em"] for i in items])}
    out |= {f"F1 {source}": percent(by_source[source]) for source in sorted(by_source)}
    out |= {"last-turn F1": percent([f for _, f in last])}
    out |= {"last-turn EM": percent([em for em, _ in last])}
    return Scores(out, items)


@dataclass(kw_only=True)
class CoQA(Task):
    """stories: the reported ones; most: tokens that the model has positions for."""

    stories: list[Story]
    most: int

    def look(self, model, window):
        documents = [document for unit in self.held_out for document in unit]
        nats = task.answer_nats(model, documents, self.row, window, self.words.eot)
        return {"nats": float(torch.cat(nats).double().mean())}

    def score(self, model, meta, window):
        theirs = export.build(model, meta, self.words.eot)
        if window.is_cuda:
            theirs = export.cast(theirs, torch.bfloat16)
        theirs = theirs.to(window.device)
        prompts = [p for s in self.stories for p in conversation(self.words, s, self.most)[1]]
        return figures(self.stories, answers(theirs, self.words, prompts))


def make(data: Path, meta: dict, words: Words, split: str, limit: int, out: Path) -> list[CoQA]:
    """The task, on one of SPLITS; `limit`: score the first stories alone (0: all). Writes the
    Harness's task of dev400 to `out`. InputError for bad data, or an arm that cannot answer."""
    export.refuse_own_arm(meta)
    dev = read_stories(data, "validation")
    if split == "dev400":
        train, reported = split_dev(dev)
        trained_on = f"{len(train)} of CoQA's dev stories"
    else:
        train, reported = read_stories(data, split), dev
        trained_on = f"CoQA {split} ({len({s.text for s in train})} different stories)"
    both = {s.text for s in train} & {s.text for s in reported}
    if both:
        raise T.InputError(f"{len(both)} stories are in {split} and in what is to be scored")
    if split == "dev400":
        write_task(out / "lm_eval_tasks", reported)
    most = gpt2.BLOCK_SIZE if meta["config"]["preset"] == "gpt2" else task.LONGEST
    held = task.split_off([s.text for s in train], task.HELD_OUT)
    units = [[], []]
    for story in train:
        units[story.text in held].append((conversation(words, story, most)[0],))
    reported = reported[:limit] if limit else reported
    turns = sum(len(s.questions) for s in reported)
    about = {
        "trained_on": trained_on,
        "conversations": len(units[0]),
        "held_out": f"{len(held)} of these stories, {len(units[1])} conversations",
        "scored_on": f"{len(reported)} dev stories, {turns} turns, gold history",
    }
    tainted = ("coqa",) if split == "dev400" else ()
    size = {"epochs": 4, "step_tokens": 12_288, "tainted": tainted}
    return [CoQA("coqa", words, *units, about, stories=reported, most=most, **size)]


def write_task(folder: Path, stories: Sequence[Story]) -> None:
    """The Harness's task of these stories alone, as its stock one: `--include_path FOLDER`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(coqa_score.__file__), folder / "coqa_score.py")
    lines = [json.dumps(story.row) + "\n" for story in stories]
    (folder / f"{DEV_TASK}.jsonl").write_text("".join(lines))
    (folder / f"{DEV_TASK}.yaml").write_text(TASK_YAML)
