"""One moving line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

QUIET_S = 15.0  # seconds between plain lines
MOVING_S = 0.1


class Progress:
    """Reports bytes done of a known total, in MB (10^6 bytes), and the time left, on stderr."""

    def __init__(self):
        self.stream = sys.stderr
        self.moving = self.stream.isatty()
        self.start = self.shown = time.monotonic()
        self.total = self.already = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.moving:  # what comes next starts on a clean line
            self._write("\r\x1b[K")

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.start

    def expect(self, total: int, already: int = 0) -> None:
        """What is to be done, bytes, and how much of it an earlier run did."""
        self.total, self.already = total, already

    def update(self, done: int, note: str = "") -> None:
        """`done` bytes of the total, the earlier run's included."""
        now = time.monotonic()
        if now - self.shown < (MOVING_S if self.moving else QUIET_S):
            return
        self.shown = now
        text = f"{done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB{note}"
        if done > self.already:
            left = (self.total - done) * (now - self.start) / (done - self.already)
            text += f", {left:.0f} s left"
        self._write(f"\r\x1b[K{text}" if self.moving else f"{text}\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(f"\r\x1b[K{text}\n" if self.moving else f"{text}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
