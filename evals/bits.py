"""Numbers about answers: bits a byte, means with their errors, two models on the same items.

Accuracy moves only when the order of two options flips, and at 100M parameters most options are
nearly level. How many bits the model needs for the right answer moves with every improvement, and
pairing item by item takes out how hard the items are. Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 20  # items: below, percentiles of resamples are no interval
AT_ONCE = 2**22  # drawn numbers held in memory


def context_of(vocab: int) -> int:
    """Tokens of prompt and answer that every model is shown unless told otherwise: GPT-2's 1,024,
    or about as much text where a token is a byte."""
    return 4096 if vocab <= 257 else 1024


def bits_a_byte(nats: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """[N], from the log-likelihoods of N answers (nats, <= 0) and their UTF-8 bytes."""
    return -np.asarray(nats, np.float64) / math.log(2) / np.asarray(sizes, np.float64)


def parts(
    nats: Sequence[Sequence[float]], right: Sequence[int], sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bits a byte of N right answers in two summands, [N] each: of any of an item's options, and of
    the right one given that it is one of them. `nats`: log-likelihoods of each item's options."""
    known = [np.logaddexp.reduce(np.asarray(options, np.float64)) for options in nats]
    of_right = [options[i] for options, i in zip(nats, right)]
    any_of_them = bits_a_byte(known, sizes)
    return any_of_them, bits_a_byte(of_right, sizes) - any_of_them


def scored_bytes(context: str, answer: str) -> int:
    """Bytes of what is scored: the answer, and the white space that a context ends with, which the
    Evaluation Harness moves into it, so that tokens are not torn apart."""
    return len((context[len(context.rstrip()) :] + answer).encode())


@dataclass(frozen=True)
class Mean:
    """Of n values, with the standard error of the mean; None for one value."""

    value: float
    error: float | None
    n: int


def mean(values: Sequence[float]) -> Mean:
    x = np.asarray(values, np.float64)
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
    return Mean(float(x.mean()), error, len(x))


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over n items with its 95 % interval over items; None: too few for one."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.low is None or self.low <= 0 <= self.high


def difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """b - a on the same items in the same order; percentile bootstrap over items. The interval is
    about these two sets of weights: it knows nothing of another training seed."""
    d = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if len(d) < FEWEST:
        return Difference(float(d.mean()), None, None, len(d))
    rng = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // len(d))
    means = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(d))
        means.append(d[rng.integers(0, len(d), shape, dtype=np.int32)].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(d.mean()), float(low), float(high), len(d))
