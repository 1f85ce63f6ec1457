"""How much of its key-value cache does a model need? Loss against the share of the cache kept.

    python -m evals.prune RUN [RUN ...] --data DIR [--kept 1 0.5 0.25 0.125] [--out FOLDER]
    python -m evals.prune --out FOLDER      draws what is there

Every layer may keep a share of the keys that it would hold otherwise: its window, or the text where
that is shorter. When a new key is one too many, one goes for good. Which one:

    masked   the one that most was taken from (selective attention's F, 2410.02703): F never falls,
             so a key that is gone would be masked ever after. Layers that mask nothing go by age
    age      the oldest: what any model can do

The newest key and a document's first are never given up, nor any of a copy head's. What is read:
documents of dev that have more tokens than --tokens, cut there, one a row. The loss is the mean
over all their tokens, and the other one over those of the second half, where small caches are full.
Attention is computed on dense masks: this measures loss and not speed. FOLDER gets prune.json after
every measurement, prune.svg and prune.png at the end; the same line again, or one with other runs,
goes on with that prune.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from evals import exported, sample

# Numbers in T x T of all heads and rows of a forward pass: a map in fp32 takes 4 bytes of each.
CALL_NUMBERS = {"cuda": 2**30, "cpu": 2**27}
QUERIES = 256  # whose ranks are put in order at a time
POLICIES = ("masked", "age")


@dataclass(frozen=True)
class Point:
    """One measurement. weights: sha256 of the checkpoint's; None where it is not known. kept: keys
    that layers may hold, of those that they would; share: what was asked for. Losses in nats a
    token, of all tokens and of those in the second half of a document's piece."""

    run: str
    weights: str | None
    arm: str
    policy: str
    share: float
    kept: float
    loss: float
    loss_late: float
    targets: int


# ---- Eviction -----------------------------------------------------------------------------------


def in_order(rank: Tensor) -> Tensor:
    """rank [..., T] fp32 -> int64, no two of a row the same: larger for a larger rank and, of
    equals, for an older key."""
    bits = (rank + 0.0).contiguous().view(torch.int32).long()  # + 0.0: one zero, not two
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits + 1) * rank.size(-1) - 1 - torch.arange(rank.size(-1), device=rank.device)


def kept_keys(rank: Tensor, seen: Tensor, first: Tensor, budget: int) -> Tensor:
    """Which keys are still there for each query: bool [B, T, T], at most `budget` of a row.

    rank [B, T, T]: at query i, of the keys that are there, the one with the largest goes; of
    equals, the oldest. seen [B, T, T]: what a full cache would hold; what leaves the window or
    belongs to a finished document makes room by itself. first [B, T]: never given up.

    One query after the other, since what is there follows from what went. On a GPU that takes the
    time to start some nine kernels a query, whatever B: so give it many rows at once.
    """
    first = first[:, None] & seen
    free = seen & ~first  # with each query's own token, the newest
    room = budget - 1 - (first.tril(-1)).sum(-1, keepdim=True)
    left, nothing = free.clone(), torch.iinfo(torch.int64).min
    for i in range(budget, rank.size(-1)):
        if i == budget or i % QUERIES == 0:
            start, order = i, in_order(rank[:, i : i + QUERIES - i % QUERIES])
        there = left[:, i - 1, :i] & free[:, i, :i]
        may_go = torch.where(there, order[:, i - start, :i], nothing)
        stays = may_go != may_go.amax(-1, keepdim=True)
        fits = there.sum(-1, keepdim=True) <= room[:, i]
        left[:, i, :i] = there & (stays | fits)
    return left | first


def newest_keys(seen: Tensor, first: Tensor, budget: int) -> Tensor:
    """`kept_keys` by age, for rows in which a query sees one document."""
    at, first = torch.arange(seen.size(-1), device=seen.device), first[:, None] & seen
    return first | seen & (at[:, None] - at < budget - first.sum(-1, keepdim=True))


@contextlib.contextmanager
def pruning(share: float, policy: str, sizes: list[tuple[int, int]]):
    """While open, every layer keeps `share` of its cache, at least two keys. Fills `sizes` with a
    pair (keys kept, keys of a full cache) for each call of `T.attend`. For models whose masks are
    dense (`model.flex` False)."""
    attend = T.attend

    def attend_pruned(q, k, v, ctx, taken=None, *how):
        length = q.size(1)
        full = min(length, int(ctx.window.max()))
        budget = min(full, max(2, round(share * full)))
        sizes.append((budget, full))
        if budget < full:
            seen = ctx.mask.any(1)  # by the head that sees farthest
            first = T.repeated(ctx.starts, length // ctx.starts.size(1))  # paired heads: two keys
            if taken is None or policy == "age":
                kept = newest_keys(seen, first, budget)
            else:
                kept = kept_keys(taken, seen, first, budget)
            ctx = T.dataclasses.replace(ctx, mask=ctx.mask & kept[:, None])
        return attend(q, k, v, ctx, taken, *how)

    T.attend = attend_pruned
    try:
        yield
    finally:
        T.attend = attend


# ---- Losses -------------------------------------------------------------------------------------


def long_documents(corpus: T.Corpus, length: int, most: int) -> np.ndarray:
    """int64 [N, length + 1]: how the first `most` documents of dev begin that have so many tokens,
    end-of-text among them. InputError where there is none."""
    tokens = np.concatenate([shard.load() for shard in corpus.splits["dev"]])
    starts = np.flatnonzero(tokens == corpus.eot)
    ends = np.append(starts[1:], len(tokens))
    fit = starts[ends - starts > length][:most]
    if not len(fit):
        raise T.InputError(f"no document of dev has more than {length} tokens: lower --tokens")
    return np.stack([tokens[i : i + length + 1] for i in fit]).astype(np.int64)


def arms_of(model: nn.Module) -> list[nn.Module]:
    return [b.attn.arm for b in model.blocks if b.attn is not None]


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor, window: Tensor) -> Tensor:
    """rows [N, T + 1] on the CPU -> nats of each target, [N, T] fp32 on the CPU."""
    head = T.Head(model.head, model.softcap, model.dtype, False, False)
    out, device = [], model.head.device
    heads = max(arm.heads_q for arm in arms_of(model))
    for part in rows.split(max(1, CALL_NUMBERS[device.type] // (heads * rows.size(1) ** 2))):
        part = part.to(device)
        docs = torch.zeros_like(part[:, :-1], dtype=torch.int32)
        tokens, targets = part[:, :-1].int(), part[:, 1:]
        h, copied, kept = model(tokens, docs, window), None, 0.0
        if model.pointer is not None:
            copied, kept = (t.flatten() for t in model.pointer(h, tokens, docs, targets))
        nats = head.losses(h.flatten(0, 1), targets.flatten(), copied) - kept
        out.append(nats.view_as(docs).cpu())
    return torch.cat(out)


def run_of(path: Path) -> str:
    return path.parents[1].name if path.parent.name == "ckpt" else path.name


def weights_of(path: Path) -> str | None:
    """sha256 of a checkpoint's weights. An exported folder has rounded them."""
    return None if exported.is_folder(path) else sample.meta_of(path).get("sha256")


def measure(
    path: Path, rows: np.ndarray, shares: list[float], device: str, done: set[tuple[str, float]]
) -> Iterator[Point]:
    """A run's points, one by one, without the (policy, share) that are `done`. InputError where it
    is no model of this text."""
    model, meta = sample.load(path, device, rows.shape[1])
    tokens = torch.from_numpy(rows)
    if int(tokens.max()) >= model.cfg.vocab:
        raise T.InputError(f"{path} has {model.cfg.vocab} tokens: --data is of another vocabulary")
    window = T.windows(sample.best_window(meta), device)
    selective = any(getattr(arm, "selective", False) for arm in arms_of(model))
    who = {"run": run_of(path), "weights": weights_of(path), "arm": meta["config"]["arm"]}
    lines = itertools.product(POLICIES if selective else ("age",), shares)
    for policy, share in (pair for pair in lines if pair not in done):
        sizes: list[tuple[int, int]] = []
        with pruning(share, policy, sizes):
            nats = losses(model, tokens, window).double()
        if not sizes:
            raise T.InputError(f"{path}: its arm does not call T.attend, so nothing is pruned")
        kept, full = map(sum, zip(*sizes, strict=True))
        late = nats[:, nats.size(1) // 2 :].mean()
        said = {"loss": float(nats.mean()), "loss_late": float(late), "targets": nats.numel()}
        yield Point(**who, policy=policy, share=share, kept=kept / full, **said)


# ---- What is written ----------------------------------------------------------------------------


def say_what(said: dict) -> None:
    print(f"{said['documents']} documents of dev, {said['tokens']} tokens each")
    print(f"{'run':28s} {'policy':7s} {'kept':>7s} {'loss':>9s} {'2nd half':>9s}")


def line(p: Point) -> str:
    return f"{p.run:28s} {p.policy:7s} {p.kept:7.2%} {p.loss:9.4f} {p.loss_late:9.4f}"


def draw(points: list[Point], length: int, out: Path) -> None:
    """OUT.svg and OUT.png: the loss over the share of the cache, a line for each run and policy, in
    the arm's colour."""
    from records import plots

    by_line: dict[tuple[str, str, str], list[Point]] = {}
    for p in points:
        by_line.setdefault((p.run, p.arm, p.policy), []).append(p)
    styles = plots.styles_of(tuple(dict.fromkeys(arm for _, arm, _ in by_line)))
    with plots.style(plots.LIGHT):
        figure, (axis,) = plots.new_figure()
        ends = []
        for (_, arm, policy), own in by_line.items():
            own = sorted(own, key=lambda p: -p.kept)
            colour, marker = styles[arm]
            dashes = "-" if policy == "masked" else ":"
            xs, ys = [p.kept for p in own], [p.loss for p in own]
            axis.plot(xs, ys, dashes, color=colour, marker=marker)
            ends.append((f"{plots.short(arm)}, {policy}", colour, (xs[-1], ys[-1])))
        axis.set_xscale("log", base=2)
        axis.invert_xaxis()
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
        title = f"Loss with a pruned cache, {length:,} tokens of dev documents"
        plots.say(axis, title, "share of the keys that are kept", "nats a token")
        plots.name_ends(axis, ends)
        plots.save(figure, out)


def read(file: Path) -> dict:
    """A prune.json, its points as Point; InputError where it is none."""
    try:
        said = json.loads(file.read_text())
        said["tokens"], said["documents"], said["text"]
        return {**said, "points": [Point(**p) for p in said["points"]]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{file} is no file of evals/prune.py: {e!r}") from None


def write(file: Path, said: dict) -> None:
    """Whole or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({**said, "points": [asdict(p) for p in said["points"]]}, indent=1))
    os.replace(aside, file)


def measure_all(args: argparse.Namespace, file: Path) -> dict:
    """Measures what `file` lacks, and writes it after every point -> its content."""
    paths = [Path(p) for p in args.models]
    names = [run_of(path) for path in paths]
    if len(set(names)) < len(names):
        raise T.InputError(f"two runs of one name, which is all that the plot has: {names}")
    metas = [sample.meta_of(path) for path in paths]
    length = args.tokens or min(int(meta["config"]["row_tokens"]) for meta in metas)
    rows = long_documents(T.Corpus.open(args.data, args.dev), length, args.documents)
    text = hashlib.sha256(rows.tobytes()).hexdigest()
    said = {"tokens": length, "documents": len(rows), "text": text}
    if file.is_file():
        before = read(file)
        if any(before[key] not in (None, value) for key, value in said.items()):
            raise T.InputError(f"{file} is of other documents: name another --out")
        said = before
    said.setdefault("points", [])
    file.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device
    device = "cpu" if device == "auto" else device
    say_what(said)
    for path, name in zip(paths, names):
        weights = weights_of(path)
        old = [p for p in said["points"] if p.run == name and weights and p.weights == weights]
        said["points"] = [p for p in said["points"] if p.run != name] + old
        for point in old:
            print(line(point))
        done = {(p.policy, p.share) for p in old}
        for point in measure(path, rows, args.kept, device, done):
            print(line(point), flush=True)
            said["points"].append(point)
            write(file, said)
    return said


def run(args: argparse.Namespace) -> None:
    file = args.out / "prune.json"
    if args.models:
        said = measure_all(args, file)
    else:
        said = read(file)
        say_what(said)
        print(*map(line, said["points"]), sep="\n")
    try:
        draw(said["points"], said["tokens"], args.out / "prune")
    except ImportError as e:  # nice to have
        print(f"no plot: {e.name} is not installed")
    else:
        print(args.out / "prune.svg")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prune", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="RUN", help="run folders, or checkpoints in them")
    add("--data", default="", metavar="DIR", help="folder of token shards, read from dev")
    add("--dev", default="", metavar="FILE", help="a shard to read, where no manifest names dev")
    add("--tokens", type=int, default=0, metavar="N", help="of each document (0: a trained row)")
    add("--documents", type=int, default=64, metavar="N", help="documents at most (64)")
    shares = [1.0, 0.5, 0.25, 0.125, 0.0625]
    add("--kept", type=float, nargs="+", default=shares, metavar="SHARE", help="of the cache")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    add("--out", type=Path, default=Path("."), metavar="FOLDER", help="for prune.json and .svg")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, writes; 2 for bad input, with one sentence."""
    args = parse(argv)
    try:
        if args.models and not args.data:
            raise T.InputError("--data DIR: which text?")
        if not all(0 < share <= 1 for share in args.kept):
            raise T.InputError("--kept are shares above 0, at most 1")
        if args.tokens < 0 or args.tokens == 1 or args.documents < 1:
            raise T.InputError("--tokens is 2 or more (0: a trained row), --documents 1 or more")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise T.InputError("no NVIDIA GPU here: leave out --device")
        run(args)
    except (T.InputError, FileExistsError) as e:
        print(f"prune: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
