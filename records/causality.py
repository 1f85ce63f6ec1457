"""`check_causal`: does anything before a token move when that token changes? `compare` asks it of
every arm before its clock starts, and so do the tests.

A published "12 % win" of differential attention was measured with a GroupNorm over time, whose
statistics see the future: a loss like that is worth nothing, and nothing in it looks wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

import train_gpt as T

LENGTH = 96
ROWS = {"row_tokens": 128, "val_row_tokens": 128}  # none is longer here, whatever a preset says
WINDOWS = (48, 25)  # long and short layers, tokens: below a row, so that both bind
EDGES = (30, 31, 70)  # where documents begin, besides at 0; one is a single token
FAINT = 0.02  # score scale of the selective arms: a token that is masked wholly moves nothing more
REACH = 20  # so many tokens after a changed one must move, or the check proves nothing
NARROW = {"d_model": 96, "vocab": 64}
NGRAM_ROWS = 1024  # at most: an arm's millions would be filled with random numbers


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread; where 16 cores had other work, threads
    that waited for each other made 140 s of 3."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class NotCausal(ValueError):
    """Something that comes before a token, or stands in another document, moves with it."""


class NoPower(ValueError):
    """The check could not have found anything: what it perturbs reaches no later token."""


@one_thread()
def check_causal(
    arm: str,
    overrides: dict | None = None,
    preset: str = "r28",
    make_model: Callable[[T.Config, int, torch.dtype], torch.nn.Module] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Checks one arm at the preset's full depth and heads, scaled down in width, all parameters
    random (heads and projections are zero at init and would hide everything), in fp32 on the CPU.

    - logits before a changed token are bit-equal, for tokens all over the row;
    - another document's logits, before and after, and another row's, are bit-equal;
    - in a single layer, a key one window back or further does not move the output.
    And each time something that should move does. Raises NotCausal or NoPower; returns how many
    comparisons of each kind were made. `overrides`: settings of the model, as in make_config.
    `make_model(cfg, length, dtype)`: another model than GPT, as in Hooks.model.
    """
    cfg = T.make_config(preset, **{"arm": arm, **NARROW, **(overrides or {})})
    cfg = cfg.with_(require_gpu=False, ngram=min(cfg.model.ngram, NGRAM_ROWS), **ROWS)
    if T.parse_arm(arm)[0] == "selective" or cfg.model.selective:
        cfg = cfg.with_(score_scale=FAINT)
    problems = T.check_config(cfg)
    if problems:
        raise T.InputError("; ".join(problems))
    make = make_model or (lambda c, n, dtype: T.GPT(c.model, n, dtype))
    model = make(cfg, LENGTH, torch.float32)
    randomise(model, seed)
    probe = Probe(model, cfg.model.vocab, seed)
    counts = {"positions": probe.positions(), "documents": probe.documents(), "rows": probe.rows()}
    counts["window"] = sum(
        check_window(block.attn, context, cfg.model, i)
        for i, (block, context) in enumerate(probe.layers())
        if block.attn is not None
    )
    return counts


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter anew, at a size that keeps signals and differences alive for 12 blocks."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.size(-1) ** -0.5 if p.ndim == 2 else 0.5
            p.copy_(torch.randn(p.shape, generator=gen) * scale)
        ngram = getattr(model, "ngram", None)
        if ngram is not None:  # its table is no parameter
            ngram.make()
            ngram.table.normal_(generator=gen).mul_(ngram.dim**-0.5)


class Probe:
    """A model, two rows of tokens, and their logits; asks what moves with a token."""

    def __init__(self, model: torch.nn.Module, vocab: int, seed: int):
        self.model, self.vocab = model.requires_grad_(False), vocab
        gen = torch.Generator().manual_seed(seed + 1)
        self.tokens = torch.randint(vocab, (2, LENGTH), generator=gen, dtype=torch.int32)
        self.one = torch.ones(2, LENGTH, dtype=torch.int32)  # a single document
        starts = torch.zeros(2, LENGTH, dtype=torch.int32)
        starts[:, [0, *EDGES]] = 1
        self.many = starts.cumsum(1).int()
        self.window = torch.tensor(WINDOWS, dtype=torch.int32)
        self.before = {}

    def logits(self, tokens: torch.Tensor, docs: torch.Tensor) -> torch.Tensor:
        if hasattr(self.model, "logits"):
            return self.model.logits(tokens, docs, self.window)
        return self.model(tokens, docs, self.window) @ self.model.head.t()

    def moved(self, docs: torch.Tensor, at: int) -> torch.Tensor:
        """[2, T] bool: which positions' logits change, bit by bit, with token `at` of row 0."""
        if id(docs) not in self.before:
            self.before[id(docs)] = self.logits(self.tokens, docs)
        before = self.before[id(docs)]
        changed = self.tokens.clone()
        changed[0, at] = (changed[0, at] + 1 + self.vocab // 2) % self.vocab
        after = self.logits(changed, docs)
        if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise NoPower("the logits are not finite")
        return (before != after).any(-1)

    @staticmethod
    def near(at: int) -> torch.Tensor:
        t = torch.arange(LENGTH)
        return (t >= at) & (t < at + REACH)

    def positions(self) -> int:
        spots = (1, 2, 23, 24, 47, 64, LENGTH - 2, LENGTH - 1)
        for at in spots:
            moved = self.moved(self.one, at)[0]
            if moved[:at].any():
                first = int(moved.nonzero()[0])
                raise NotCausal(f"token {at} moves the logits of token {first}, before it")
            if not moved[self.near(at)].all():
                raise NoPower(f"token {at} does not move the logits of the tokens after it")
        return len(spots)

    def documents(self) -> int:
        spots = (10, EDGES[0], EDGES[1], 45, EDGES[2] - 1, EDGES[2], 90)
        for at in spots:
            moved = self.moved(self.many, at)[0]
            own = self.many[0] == self.many[0, at]
            if moved[~own].any():
                there = int((moved & ~own).nonzero()[0])
                raise NotCausal(f"token {at} moves the logits of token {there}: another document")
            if not moved[own & self.near(at)].all():
                raise NoPower(f"token {at} does not move its document from there on")
        return len(spots)

    def rows(self) -> int:
        for docs in (self.one, self.many):
            if self.moved(docs, 20)[1].any():
                raise NotCausal("a token of one row moves the logits of another row")
        return 2

    def layers(self):
        """(block, context) of the blocks, where the model has them as GPT does."""
        blocks = getattr(self.model, "blocks", ())
        if not hasattr(self.model, "contexts"):
            return
        yield from zip(blocks, self.model.contexts(self.one, self.window), strict=True)


def check_window(attn: torch.nn.Module, context: T.Context, cfg: T.ModelConfig, layer: int) -> int:
    """One layer's attention: a key moves the outputs from its place to one window on, no others."""
    gen = torch.Generator().manual_seed(layer)
    x = torch.randn(2, LENGTH, cfg.d_model, generator=gen)
    ve = None
    if T.has_values(cfg, layer):
        ve = torch.randn(2, LENGTH, attn.arm.kv_width, generator=gen)
    caps = getattr(attn.arm, "head_windows", None)
    long = layer in cfg.long_layers
    window = min(WINDOWS[0 if long else 1], max(caps or (T.NO_LIMIT,)))
    if layer in cfg.paired:  # a row has each token twice, and from the first of two the other's...
        window = window // 2 + 1  # ... key, w - 1 places back, is w / 2 tokens back
    window += long and cfg.key_offset  # the last key in the window has a half of the one before
    spots = (5, 40)
    for at in spots:
        changed = [x.clone(), None if ve is None else ve.clone()]
        for t in changed:
            if t is not None:
                t[0, at] += torch.randn(t.size(-1), generator=gen)
        moved = (attn(x, ve, context) != attn(*changed, context)).any(-1)[0]
        far = torch.arange(LENGTH) >= at + window
        if moved[:at].any() or moved[far].any():
            where = int((moved & (far | (torch.arange(LENGTH) < at))).nonzero()[0])
            raise NotCausal(
                f"block {layer}, window {window}: token {at} moves the output of token {where}"
            )
        if not moved[at : at + window].all():
            raise NoPower(f"block {layer}: token {at} does not move all outputs in its window")
    return len(spots)
