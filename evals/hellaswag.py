"""HellaSwag by the trainer's own model, without the Evaluation Harness: after training, or during.

    python -m evals.hellaswag score RUN --items hellaswag_val.jsonl
    torchrun --nproc-per-node 8 -m evals.hellaswag train --items hellaswag_val.jsonl --data DIR ...

`train` is train_gpt.py with all its options, and scores the items whenever it looks at dev. Ranks
share the items. Prompts and scores are those of the harness's task `hellaswag`, zero-shot behind
<|endoftext|>: the log-likelihood of each ending (acc), and the same divided by its characters
(acc_norm). Items: JSON lines as their authors or the Hugging Face hub have them, also .xz or .gz.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import lzma
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import shards
from evals import bits, sample
from variants import gpt2

OPTIONS = 4
CALL_TOKENS = 16_384  # in a forward pass
OPEN = {".xz": lzma.open, ".gz": gzip.open}


# ---- Items --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """N questions as tokens.

    labels: [N], the right ending's index. rows: 4 N arrays of tokens: end-of-text, context, ending.
    scored: [4 N] how many of a row's last tokens are the ending. characters: [N, 4] of the endings;
    sizes: [N, 4] bytes that are scored.
    """

    labels: np.ndarray
    rows: list[np.ndarray]
    scored: np.ndarray
    characters: np.ndarray
    sizes: np.ndarray


def clean(text: str) -> str:
    """Without the marks of WikiHow's mark-up, exactly as the harness takes them out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read(path: str | Path, limit: int = 0) -> list[tuple[str, list[str], int]]:
    """(context, four endings, index of the right one) of each item, of the first `limit` if that
    is not 0. InputError says which line is none."""
    path, found = Path(path), []
    try:
        with OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                found.append(parsed(line, f"{path}, line {number}"))
                if len(found) == limit:
                    break
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
        raise T.InputError(f"cannot read HellaSwag items from {path}: {e}") from None
    if not found:
        raise T.InputError(f"{path} holds no HellaSwag items")
    return found


def parsed(line: str, where: str) -> tuple[str, list[str], int]:
    try:
        item = json.loads(line)
        context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
        endings, label = [clean(ending) for ending in item["endings"]], int(item["label"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise T.InputError(f"{where} is no HellaSwag item: {e!r}") from None
    if len(endings) != OPTIONS or not 0 <= label < OPTIONS:
        raise T.InputError(f"{where} is no HellaSwag item: it needs 4 endings and a label 0 to 3")
    return clean(context), endings, label


def load(path: str | Path, vocab: int, tokenizer: str = "", limit: int = 0) -> Items:
    """Items as the tokens of a model with `vocab` tokens; `tokenizer` as evals/sample.py takes it.
    InputError where the file or the tokenizer is not to be had."""
    found = read(path, limit)
    try:
        encode = sample.tokenizer_of({"config": {"vocab": vocab}}, tokenizer).encoder()
    except shards.InputError as e:
        raise T.InputError(str(e)) from None
    # White space at the end of a context belongs to the ending's first token.
    contexts = [context.rstrip() for context, _, _ in found]
    whole = [f"{context} {ending}" for context, endings, _ in found for ending in endings]
    batch = encode(whole)
    rows = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
    before = np.repeat(encode(contexts).lengths, OPTIONS)
    return Items(
        labels=np.array([label for _, _, label in found]),
        rows=rows,
        scored=batch.lengths - before,
        characters=np.array([[len(e) for e in endings] for _, endings, _ in found]),
        sizes=np.array([[bits.scored_bytes(c, f" {e}") for e in es] for c, es, _ in found]),
    )


# ---- Scores -------------------------------------------------------------------------------------


def longest(model: nn.Module) -> int:
    """Positions that a model has: learned ones, or those of its RoPE tables."""
    if isinstance(model, gpt2.GPT2):
        return gpt2.BLOCK_SIZE
    tables = [t.size(1) for name, t in model.named_buffers() if name.startswith("rope_")]
    return min(tables, default=T.NO_LIMIT)


def calls_of(lengths: np.ndarray) -> list[np.ndarray]:
    """Rows of similar length together, the longest first, CALL_TOKENS a call with padding."""
    order, calls, at = np.argsort(-lengths, kind="stable"), [], 0
    while at < len(order):
        rows = max(1, CALL_TOKENS // int(lengths[order[at]]))
        calls.append(order[at : at + rows])
        at += rows
    return calls


def right_padded(inputs: list[np.ndarray], targets: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """tokens int32 and targets int64 [B, T]: a row's targets end where it does, the rest is -1."""
    width = max(map(len, inputs))
    tokens = torch.zeros(len(inputs), width, dtype=torch.int32)
    wanted = torch.full((len(inputs), width), -1, dtype=torch.int64)
    for i, (x, y) in enumerate(zip(inputs, targets)):
        tokens[i, : len(x)] = torch.from_numpy(x.astype(np.int32))
        wanted[i, len(x) - len(y) : len(x)] = torch.from_numpy(y.astype(np.int64))
    return tokens, wanted


@torch.no_grad()
def log_likelihoods(model: nn.Module, items: Items, window: Tensor, world: T.World) -> np.ndarray:
    """[N, 4] of the endings, nats, the same on every rank. window: [2], see train_gpt.windows.

    Rows that are longer than the model's positions or `bits.context_of` lose tokens on the left, as
    in the harness. Attention is dense and nothing is compiled: lengths differ from call to call.
    """
    device, vocab = world.device, model.cfg.vocab
    most = min(longest(model), bits.context_of(vocab))
    inputs = [row[-(most + 1) :][:-1] for row in items.rows]
    targets = [row[-min(n, most) :] for row, n in zip(items.rows, items.scored)]
    calls = calls_of(np.array([len(x) for x in inputs]))
    nats = torch.zeros(len(inputs), dtype=torch.float64, device=device)
    flex = model.flex
    sample.by_dense_masks(model)
    try:
        for call in calls[world.rank :: world.size]:
            padded = right_padded([inputs[i] for i in call], [targets[i] for i in call])
            tokens, wanted = (t.to(device) for t in padded)
            docs = torch.zeros_like(tokens)
            h = model(tokens, docs, window)
            losses = sample.token_nats(model, h, tokens, docs, wanted)
            rows = torch.from_numpy(call).to(device)[(wanted >= 0).nonzero()[:, 0]]
            nats.index_add_(0, rows, -losses.double())
    finally:
        sample.by_dense_masks(model, flex)
    return world.sum(nats).view(-1, OPTIONS).cpu().numpy()


def predictions(items: Items, nats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen endings [N]: by log-likelihood, and by log-likelihood a character."""
    return nats.argmax(1), (nats / items.characters).argmax(1)


def figures(items: Items, nats: np.ndarray) -> dict[str, bits.Mean]:
    """acc, acc_norm and the right ending's bits a byte, with standard errors over items."""
    plain, normed = predictions(items, nats)
    right = np.arange(len(items.labels)), items.labels
    return {
        "acc": bits.mean(plain == items.labels),
        "acc_norm": bits.mean(normed == items.labels),
        "bits_a_byte": bits.mean(bits.bits_a_byte(nats[right], items.sizes[right])),
    }


def sentence(found: dict[str, bits.Mean]) -> str:
    def shown(name: str, factor: float, digits: int) -> str:
        value, error = found[name].value * factor, found[name].error
        return f"{value:.{digits}f}" + (f" ± {error * factor:.{digits}f}" if error else "")

    return (
        f"hellaswag: acc_norm {shown('acc_norm', 100, 2)} %, acc {shown('acc', 100, 2)} %, "
        f"{shown('bits_a_byte', 1, 4)} bits a byte, {found['acc'].n:,} items"
    )


# ---- During training ----------------------------------------------------------------------------


def watch(items: Items) -> Callable[[T.Trainer, dict], dict]:
    """A hook: `train(cfg, hooks=Hooks(on_eval=watch(items)))` scores at every look, outside the
    clock, puts hellaswag_acc, _acc_norm and _bits_a_byte among the look's figures, and returns
    them. The windows are those of the run's end, which an export of it has."""

    def on_eval(trainer: T.Trainer, out: dict) -> dict:
        began = time.perf_counter()
        wide = trainer.cfg.schedule.ext_window or trainer.steps[-1].window
        window = T.windows(wide, trainer.world.device)
        found = figures(items, log_likelihoods(trainer.model, items, window, trainer.world))
        if trainer.world.main:
            print(f"{sentence(found)} ({time.perf_counter() - began:.1f} s)", flush=True)
        named = {f"hellaswag_{name}": value.value for name, value in found.items()}
        out.update(named)
        return named

    return on_eval


def train(args: argparse.Namespace, argv: list[str]) -> int:
    """train_gpt.py's command line, or that of variants/gpt2.py, with the hook."""

    def make_hooks(cfg: T.Config) -> T.Hooks:
        hooks = gpt2.make_hooks(cfg) if cfg.preset == "gpt2" else T.Hooks()
        vocab = cfg.model.vocab or T.Corpus.open(cfg.data.data, cfg.data.dev).vocab
        items = load(args.items, vocab, args.tokenizer, args.limit)
        return dataclasses.replace(hooks, on_eval=watch(items))

    return T.main(argv, make_hooks)


# ---- After training -----------------------------------------------------------------------------


def score(args: argparse.Namespace) -> dict[str, bits.Mean]:
    """Prints and returns the figures of a run or checkpoint folder; InputError."""
    meta = sample.meta_of(args.model)
    vocab = int(meta["config"]["vocab"])
    items = load(args.items, vocab, args.tokenizer, args.limit)
    world, most = T.World.start(args.device), bits.context_of(vocab)
    if meta["config"]["preset"] == "gpt2":
        most = min(most, gpt2.BLOCK_SIZE)
    model, meta = sample.load(args.model, world.device.type, most)
    window = T.windows(sample.best_window(meta), world.device)
    found = figures(items, log_likelihoods(model, items, window, world))
    if world.main:
        print(sentence(found) + (f": the first {args.limit:,} alone" if args.limit else ""))
    world.close()
    return found


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our options, the trainer's)."""
    parser = argparse.ArgumentParser(
        prog="hellaswag", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="score|train")
    for kind, help in (
        ("score", "a run folder, or a checkpoint in it"),
        ("train", "trains, with train_gpt.py's options, and scores at every look at dev"),
    ):
        sub = kinds.add_parser(kind, help=help, description=help, allow_abbrev=False)
        add = sub.add_argument
        if kind == "score":
            add("model", metavar="RUN", help="run folder, or a checkpoint in it (ckpt/step_*)")
            add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
        add("--items", required=True, metavar="FILE", help="JSON lines, also .xz or .gz")
        add("--limit", type=int, default=0, metavar="N", help="the first N items (0: all)")
        add(
            "--tokenizer",
            default="",
            metavar="FILE",
            help="gpt2.tiktoken, where it cannot be fetched; not needed for bytes",
        )
    args, rest = parser.parse_known_args(argv)
    if rest and args.kind == "score":
        parser.error(f"unknown: {' '.join(rest)}")
    if args.limit < 0:
        parser.error("--limit is 0 or more")
    return args, rest


def main(argv: list[str] | None = None) -> int:
    """The trainer's exit codes; 2 for bad input, with one sentence."""
    args, rest = parse(argv)
    if args.kind == "train":
        return train(args, rest)
    try:
        score(args)
    except (T.InputError, shards.InputError) as e:
        print(f"hellaswag: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
