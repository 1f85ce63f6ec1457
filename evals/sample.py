"""Writes text with a trained model: a run folder, or one of its checkpoints.

    python evals/sample.py RUN --prompt "Returns the" --tokens 200 --temperature 0.8 --top-k 50

The text starts a document: end-of-text, then the prompt; it ends with the document, or after
--tokens. Each token costs a whole forward pass, as there is no key-value cache yet.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import encode, shards
from evals import exported

TOKENIZERS = {257: "bytes", 50_257: "gpt2"}  # by the vocabulary's size
HEAD_PIECE = 2048  # logits rows at a time


# ---- Tokens -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0: the likeliest; top_k 0: among all tokens.

    context: tokens that the model is shown, the last ones (0: as many as it was trained on).
    end: stop at end-of-text; otherwise that token is never drawn.
    """

    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    context: int = 0
    end: bool = True

    def __post_init__(self):
        wrong = []
        if self.tokens < 1:
            wrong.append(f"--tokens {self.tokens}: ask for 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            wrong.append(f"--temperature {self.temperature}: 0 or more")
        if self.top_k < 0 or self.context < 0:
            wrong.append("--top-k and --context are 0 or more")
        if not -(2**63) <= self.seed < 2**64:
            wrong.append(f"--seed {self.seed}: 64 bits at most")
        if wrong:
            raise T.InputError("; ".join(wrong))


def trained_context(meta: dict) -> int:
    """Tokens of context that the checkpoint has met: its row, or less where its window is."""
    return min(int(meta["config"]["row_tokens"]), int(meta["window"]))


def next_token(logits: Tensor, how: Sampling, gen: torch.Generator) -> int:
    """Draws from logits [V], fp32, on the CPU."""
    if how.temperature == 0 or how.top_k == 1:
        return int(logits.argmax())
    if 0 < how.top_k < logits.numel():
        least = logits.topk(how.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    chances = torch.softmax(logits / how.temperature, 0)
    return int(torch.multinomial(chances, 1, generator=gen))


@torch.no_grad()
def stream(
    model: nn.Module, meta: dict, prompt_ids: list[int], eot: int, how: Sampling
) -> Iterator[int]:
    """Yields the tokens after `prompt_ids`, one by one; end-of-text itself is never yielded.

    `model` and `meta` as `load` gives them. The model sees the last `context` tokens at the
    checkpoint's own window. The same seed gives the same tokens on the same machine.
    """
    device = model.head.device
    most = how.context or trained_context(meta)
    window = T.windows(int(meta["window"]), device)
    gen = torch.Generator().manual_seed(how.seed)
    ids = list(prompt_ids) or [eot]
    for _ in range(how.tokens):
        shown = torch.tensor([ids[-most:]], dtype=torch.int32, device=device)
        docs = torch.zeros_like(shown)
        h = model(shown, docs, window)
        z = h[:, -1:] @ model.head[: model.cfg.vocab].to(h.dtype).t()
        logits = T.softcap(z, model.softcap)
        if pointer_of(model) is not None:
            logits = model.pointer.mix(logits, h, shown, docs)
        logits = logits[0, 0].cpu()
        if not how.end:
            logits[eot] = -math.inf
        token = next_token(logits, how, gen)
        if token == eot:
            return
        ids.append(token)
        yield token


def generate(model: nn.Module, meta: dict, prompt_ids: list[int], eot: int, **how) -> list[int]:
    """All tokens that `stream` yields; `how`: fields of Sampling."""
    return list(stream(model, meta, prompt_ids, eot, Sampling(**how)))


# ---- Models and text ----------------------------------------------------------------------------


def meta_of(path: str | Path) -> dict:
    """meta.json of a run or checkpoint folder, or what an exported one has of it; InputError where
    it lacks what sampling needs."""
    if exported.is_folder(path):
        return exported.meta_of(path)
    file = T.find_checkpoint(path) / "meta.json"
    try:
        meta = json.loads(file.read_text())
        for key in ("preset", "vocab", "row_tokens"):
            meta["config"][key]
        meta["window"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{file} is damaged: {e!r}") from None
    return meta


def pointer_of(model: nn.Module) -> T.Pointer | None:
    """The copy head, whose part of p the head's softmax lacks, where the model has one."""
    return getattr(model, "pointer", None)


def by_dense_masks(model: nn.Module, flex: bool | None = False) -> None:
    """No FlexAttention, for a model that is called with many lengths and not compiled. flex: of a
    new model None."""
    model.flex = flex
    if pointer_of(model) is not None:
        model.pointer.flex = flex


@torch.no_grad()
def token_nats(
    model: nn.Module, h: Tensor, tokens: Tensor, docs: Tensor, targets: Tensor
) -> Tensor:
    """-ln p of each target that is not negative, row by row, fp32: over the vocabulary alone,
    without the head's padding, as an exported model has it. h [B, T, d]: the model's output for
    tokens and docs [B, T]; targets [B, T] int64."""
    asked, head = targets >= 0, model.head[: model.cfg.vocab].to(h.dtype).t()
    parts = [h[asked], targets[asked]]
    if pointer_of(model) is not None:
        parts += [t[asked] for t in model.pointer(h, tokens, docs, targets)]
    nats = []
    for x, y, *mixed in zip(*(t.split(HEAD_PIECE) for t in parts)):
        copied, kept = mixed or (None, 0.0)
        nats.append(T.token_losses(x @ head, y, model.softcap, copied) - kept)
    return torch.cat(nats)


def best_window(meta: dict) -> int:
    """The long window, tokens, that a checkpoint is used with: that of `val_loss_ext` after the
    last step, its own before."""
    extended = int(meta["config"]["ext_window"])
    return extended if extended and meta["step"] == meta["steps"] else int(meta["window"])


def load(path: str | Path, device: str = "cpu", context: int = 0) -> tuple[nn.Module, dict]:
    """(model, meta) of a run, checkpoint or exported folder, train_gpt.py's or variants/gpt2.py's,
    ready for `stream`; InputError where it is none."""
    meta = meta_of(path)
    make = exported.model_class(meta)
    if make is not T.GPT and context > make.positions:
        raise T.InputError(f"--context {context}: this model has {make.positions} positions")
    length = max(context, trained_context(meta))
    try:
        if exported.is_folder(path):
            model, meta = exported.load(path, device, length)
        else:
            model, meta = T.load_model(path, device, length, make)
    except RuntimeError as e:  # a parameter too many, or of another shape
        raise T.InputError(f"{path} does not fit its model: {str(e).splitlines()[0]}") from None
    by_dense_masks(model)
    return model, meta


def tokenizer_of(meta: dict, name: str = "") -> encode.Tokenizer:
    """The tokenizer that a checkpoint was trained with. `name`: a tiktoken file, where it cannot be
    fetched or is not GPT-2's. InputError if it is not there, or another one."""
    size = int(meta["config"]["vocab"])
    if not name and size not in TOKENIZERS:
        raise T.InputError(f"{size} tokens are an unknown vocabulary: give --tokenizer FILE")
    tokenizer = encode.load_tokenizer(name or TOKENIZERS[size])
    if tokenizer.vocab.size != size:
        raise T.InputError(
            f"--tokenizer {name} has {tokenizer.vocab.size} tokens, the model {size}"
        )
    return tokenizer


def token_pieces(tokenizer: encode.Tokenizer) -> list[bytes]:
    """The bytes that each token stands for; end-of-text stands for none."""
    if tokenizer.ranks is None:
        return [bytes([i]) for i in range(256)] + [b""]
    pieces = [b""] * tokenizer.vocab.size
    for piece, rank in tokenizer.ranks.items():
        pieces[rank] = piece
    return pieces


def write(model: nn.Module, meta: dict, tokenizer: encode.Tokenizer, prompt: str, how: Sampling):
    """Yields text, piece by piece, the prompt first; broken UTF-8 becomes U+FFFD."""
    ids = tokenizer.encoder()([prompt]).tokens.tolist()
    pieces = token_pieces(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield prompt
    for token in stream(model, meta, ids, tokenizer.vocab.eot, how):
        yield decoder.decode(pieces[token])
    yield decoder.decode(b"", True)


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="run folder, checkpoint in it (ckpt/step_*) or exported folder",
    )
    add("--prompt", default="", metavar="TEXT", help="how the text starts (nothing)")
    add("--tokens", type=int, default=200, metavar="N", help="tokens to write at most (200)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (0.8)")
    add(
        "--top-k", type=int, default=50, metavar="K", help="draw among the K likeliest (50; 0: all)"
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed, another text (0)")
    add(
        "--context",
        type=int,
        default=0,
        metavar="N",
        help="tokens shown to the model, the last ones (0: as many as it was trained on)",
    )
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="gpt2.tiktoken, where it cannot be fetched; not needed for bytes",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the text; 2 for bad input, with one sentence."""
    args = parse(argv)
    try:
        fields = ("tokens", "temperature", "top_k", "seed", "context")
        how = Sampling(**{name: getattr(args, name) for name in fields})
        device = T.World.start(args.device).device.type
        model, meta = load(args.model, device, args.context)
        tokenizer = tokenizer_of(meta, args.tokenizer)
        for text in write(model, meta, tokenizer, args.prompt, how):
            print(text, end="", flush=True)
        print()
    except (T.InputError, shards.InputError) as e:
        print(f"sample: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
