"""Shows where every head of a trained model looks: one HTML file, for a browser, without network.

    python -m evals.look RUN [RUN ...] ["text"] [--out look.html] [--max-tokens 64]

Each layer and head: the first map, the second, lambda for each token, and their difference, which
is what a differential head uses; for softmax its one map. Beside them the weight on the first token
(the sink), entropy, and how much of the first map the second one cancels.

The maps are not computed again: each is what the layer's own call of `attend` does to one-hot
values, so that masks, windows, scales and a user's arm count as they are. evals/look.html is the
page that the data are put into.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import json
import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import encode, shards
from evals import exported, sample

PAGE = Path(__file__).with_name("look.html")
NAMES = {arm: name for name, arm in T.ARMS.items()} | {T.Paired: "softmax"}
TEXT = (
    "The cat sat on the mat. The dog saw that the cat sat on the mat. Anna gave the book to Ben, "
    "because Anna had read the book twice, and Ben had not read it once. Then Ben read the book "
    "and gave it back to Anna."
)
MOST_TOKENS = 256  # a map of more cannot be read, and the file grows with the square
FULL = 65_535  # a weight of 1 in the file: uint16, within 8e-6


# ---- Maps ---------------------------------------------------------------------------------------


@dataclass
class Layer:
    """What the heads of a layer did. Maps [H, T, T], row = query; lam [H, T], a query's lambda.

    second and lam are None where a head has one map; first has no heads where none could be seen.
    masks [T, T], of a selective arm: the share 1 - exp(-F) that earlier queries took from what
    exp(score) gives a key, before the rest is made to sum to 1.
    """

    arm: str
    first: Tensor
    second: Tensor | None = None
    lam: Tensor | None = None
    note: str = ""
    masks: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """[H, T, T]: the weights that the values are summed with."""
        return self.first if self.second is None else self.first - self.lam[..., None] * self.second


@dataclass
class Record:
    """One layer's forward pass: what came in, [1, T, d], each call's maps, [Hq, T, T], and what
    selective attention masked, [T, T]."""

    x: Tensor
    maps: list[Tensor] = field(default_factory=list)
    masks: Tensor | None = None


@contextlib.contextmanager
def recording(model: nn.Module):
    """Yields {layer: Record}, filled by a forward pass of one row while the context is open."""
    records: dict[int, Record] = {}
    attend, current = T.attend, []

    def enter(layer: int):
        def hook(arm, args):
            records[layer] = Record(args[0])
            current[:] = [records[layer]]

        return hook

    def attend_and_keep(q, k, v, ctx, *selected):
        length, heads = k.shape[1:3]
        one_hot = torch.eye(length, dtype=v.dtype, device=v.device)  # the value of key s is e_s
        one_hot = one_hot[None, :, None].expand(1, length, heads, length)
        maps = attend(q, k, one_hot, ctx, *selected)
        current[0].maps.append(maps[0].transpose(0, 1))
        if selected:
            seen, taken = T.dense_mask(ctx.docs, ctx.window[:1])[0, 0], selected[0][0]
            current[0].masks = torch.where(seen, 1 - torch.exp(-taken), 0.0)
        return attend(q, k, v, ctx, *selected)

    hooks = [
        block.attn.arm.register_forward_pre_hook(enter(i))
        for i, block in enumerate(model.blocks)
        if block.attn is not None
    ]
    T.attend = attend_and_keep
    try:
        yield records
    finally:
        T.attend = attend
        for hook in hooks:
            hook.remove()


def second_weight(arm: nn.Module, x: Tensor) -> Tensor:
    """lambda of a differential arm, [pairs, T], from its input x [1, T, d]."""
    if isinstance(arm, T.DiffV2):
        return arm.weight(x)[0, ..., 0].t()
    return arm.mixing().expand(arm.heads, x.size(1))


def layer_of(arm: nn.Module, record: Record) -> Layer:
    """A layer's maps by head, as far as they are known."""
    name = NAMES.get(type(arm), type(arm).__name__)
    if not record.maps:
        none = torch.zeros(0, record.x.size(1), record.x.size(1))
        return Layer(name, none, note="This arm does not call T.attend: its maps cannot be shown.")
    maps, note = torch.cat(record.maps), ""
    if isinstance(arm, (T.DiffV1, T.DiffV2)) and len(maps) == 2 * arm.heads:
        first, second = maps.unflatten(0, (arm.heads, 2)).unbind(1)
        if arm.head_windows:
            note = f"The second map sees {arm.cfg.window2} tokens back."
        return Layer(name, first, second, second_weight(arm, record.x), note, record.masks)
    if isinstance(arm, T.Paired):
        note = "Two heads are one: what one sees of a token is its weight on both their keys."
        maps = maps.unflatten(2, (-1, 2)).sum(-1)  # [H / 2, 2 T, T]
        maps = maps.unflatten(1, (-1, 2)).movedim(2, 0).flatten(0, 1)
    elif type(arm) not in NAMES:
        note = "The maps that T.attend made; what this arm does to them afterwards is not shown."
    return Layer(name, maps, note=note, masks=record.masks)


@torch.no_grad()
def attention_maps(
    model: nn.Module, tokens: Tensor, docs: Tensor, window: Tensor
) -> list[Layer | None]:
    """Every block's Layer, None where it has no attention. tokens, docs [T] int32, window [2]."""
    with recording(model) as records:
        model(tokens[None], docs[None], window)
    return [
        layer_of(block.attn.arm, records[i]) if i in records else None
        for i, block in enumerate(model.blocks)
    ]


# ---- Figures ------------------------------------------------------------------------------------


def entropy(weights: Tensor) -> Tensor:
    """Bits, of each row of weights [..., T], which need neither sum to 1 nor be positive."""
    share = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return -torch.special.xlogy(share, share).sum(-1) / np.log(2)


def head_figures(layer: Layer, docs: Tensor) -> list[dict]:
    """What is said of each head, means over the queries that are not the first of their document,
    as that one can only look at itself. Lists are of the first map, the second, and what is used.

    sink: weight on the document's first token. entropy: bits, of absolute weights. cancelled: how
    much of the first map lambda times the second takes away; negative: what it takes beyond that.
    masked: mean of the layer's masks over a document's pairs of a query and a key.
    """
    at = torch.arange(len(docs))
    start = (docs[:, None] == docs).int().argmax(1)
    rows = at != start
    maps = [layer.first] if layer.second is None else [layer.first, layer.second, layer.used]

    def means(values: Tensor) -> list[float]:  # [H, T] -> [H]
        return values[:, rows].double().mean(1).tolist()

    columns = {
        "sink": zip(*[means(m[:, at, start]) for m in maps]),
        "entropy": zip(*[means(entropy(m)) for m in maps]),
    }
    if layer.second is not None:
        taken = layer.lam[..., None] * layer.second
        columns["cancelled"] = means(torch.minimum(layer.first, taken).clamp_min(0).sum(-1))
        columns["negative"] = means((-layer.used).clamp_min(0).sum(-1))
        columns["lambda"] = means(layer.lam)
    if layer.masks is not None:
        seen = (docs[:, None] == docs).tril()
        columns["masked"] = [float(layer.masks[seen].double().mean())] * len(layer.first)
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


# ---- The page -----------------------------------------------------------------------------------


def visible(piece: bytes) -> str:
    """A token's bytes as text that can be seen: line ends, tabs and the like as signs, bytes that
    are no UTF-8 and characters that would not show, or turn the text around, in hexadecimal."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(
        signs.get(c)
        or (f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c)
        for c in text
    )


def packed(layers: list[Layer | None]) -> str:
    """Base64 of uint16 FULL x weight: layer by layer, head by head, the first map and, where there
    is one, the second, then the layer's masks; of each the lower triangle, row by row."""
    parts = []
    for layer in layers:
        if layer is None:
            continue
        both = [layer.first] if layer.second is None else [layer.first, layer.second]
        rows, columns = np.tril_indices(layer.first.size(-1))
        triangles = torch.stack(both, 1).numpy()[..., rows, columns]
        parts.append(np.rint(triangles.ravel() * FULL).astype("<u2"))
        if layer.masks is not None:
            shares = layer.masks.numpy()[..., rows, columns]
            parts.append(np.rint(shares.ravel() * FULL).astype("<u2"))
    return base64.b64encode(np.concatenate(parts or [np.zeros(0, "<u2")])).decode()


def packed_lambda(layers: list[Layer | None]) -> str:
    """Base64 of float32: each differential layer's lambda [H, T]."""
    parts = [x.lam.numpy().astype("<f4").tobytes() for x in layers if x and x.lam is not None]
    return base64.b64encode(b"".join(parts)).decode()


def described(layer: Layer | None, docs: Tensor) -> dict | None:
    """A layer for the page, without its maps."""
    if layer is None:
        return None
    return {
        **{"arm": layer.arm, "note": layer.note, "two": layer.second is not None},
        "masks": layer.masks is not None,
        "heads": head_figures(layer, docs),
    }


def model_entry(model: nn.Module, meta: dict, path: Path, ids: list[int]) -> dict:
    """All that the page shows of one model on one document."""
    tokens = torch.tensor(ids, dtype=torch.int32)
    docs = torch.zeros_like(tokens)
    layers = attention_maps(model, tokens, docs, T.windows(int(meta["window"]), "cpu"))
    run = path.parents[1].name if path.parent.name == "ckpt" else path.name
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "name": meta["config"]["arm"],
        "about": f"{run}: {parameters:,} parameters, {meta['tokens']:,} tokens trained",
        "layers": [described(layer, docs) for layer in layers],
        "maps": packed(layers),
        "lambda": packed_lambda(layers),
    }


def page(entries: list[dict], tokens: list[str], total: int) -> str:
    """The HTML. tokens: what is shown of each; total: how many the whole text has."""
    data = json.dumps({"tokens": tokens, "total": total, "models": entries}, separators=(",", ":"))
    parts = {
        "title": html.escape("Where the heads look: " + ", ".join(x["name"] for x in entries)),
        "data": data.replace("<", "\\u003c"),  # no text can end the script that holds it
    }
    # In one pass, so that a text which names a part stays text.
    return re.sub(r"\{\{(title|data)\}\}", lambda m: parts[m[1]], PAGE.read_text("utf-8"))


def ids_of(tokenizer: encode.Tokenizer, text: str) -> list[int]:
    """End-of-text and the text's tokens; InputError where there is nothing to look at."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise T.InputError("the text is not UTF-8") from None
    ids = tokenizer.encoder()([text]).tokens.tolist()
    if len(ids) < 2:
        raise T.InputError("the text is empty: give one, or none for the usual one")
    return ids


def write(
    models: list[str | Path],
    text: str,
    out: str | Path,
    max_tokens: int = 64,
    tokenizer: str = "",
) -> Path:
    """Writes the page on `models`, run, checkpoint or exported folders of one vocabulary, reading
    the first `max_tokens` tokens of `text`, end-of-text before it. InputError before anything is
    written."""
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise T.InputError(f"--out {out}: name a file in a folder that is there")
    if not 2 <= max_tokens <= MOST_TOKENS:
        raise T.InputError(f"--max-tokens {max_tokens}: 2 to {MOST_TOKENS}")
    folders = [
        Path(path).resolve() if exported.is_folder(path) else T.find_checkpoint(path)
        for path in models
    ]
    metas = [sample.meta_of(folder) for folder in folders]
    if len({meta["config"]["vocab"] for meta in metas}) > 1:
        raise T.InputError("these models have different vocabularies: look at them one by one")
    kind = sample.tokenizer_of(metas[0], tokenizer)
    ids = ids_of(kind, text)
    shown = ids[:max_tokens]
    entries = []
    for folder in folders:
        model, meta = sample.load(folder, "cpu", len(shown))
        entries.append(model_entry(model, meta, folder, shown))
    pieces = sample.token_pieces(kind)
    tokens = ["⟨start⟩" if i == kind.vocab.eot else visible(pieces[i]) for i in shown]
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_text(page(entries, tokens, len(ids)), "utf-8")
    aside.replace(out)
    return out


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="look", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "words",
        nargs="+",
        metavar="MODEL",
        help="run folders, checkpoints in them (ckpt/step_*) or folders that were exported; then, "
        "if you like, the text that they are to read",
    )
    add("--out", default="look.html", metavar="FILE", help="the page (look.html)")
    add("--max-tokens", type=int, default=64, metavar="N", help="tokens shown at most (64)")
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="gpt2.tiktoken, where it cannot be fetched; not needed for bytes",
    )
    args = parser.parse_args(argv)
    *models, last = args.words
    is_path = os.path.isdir(last) or ("/" in last and " " not in last)  # a path mistyped is no text
    args.models, args.text = (args.words, TEXT) if is_path or not models else (models, last)
    return args


def main(argv: list[str] | None = None) -> int:
    """Writes the page and says where it is; 2 for bad input, with one sentence."""
    args = parse(argv)
    try:
        out = write(args.models, args.text, args.out, args.max_tokens, args.tokenizer)
    except (T.InputError, shards.InputError) as e:
        print(f"look: {e}", file=sys.stderr)
        return 2
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
