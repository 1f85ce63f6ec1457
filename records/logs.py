"""Reading run logs: everything under records/ knows a run by its run.jsonl alone.

    runs = load_runs("records/open-text/2026-11-24_first-block")
    for block in blocks(runs):  # {arm: Run} of one seed, schedule, machine and sitting
        ...

Needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LOG, PACKED = "run.jsonl", "run.jsonl.xz"  # the second as `pack` leaves it: the same lines
MOST_BYTES = 1 << 28  # of a log, unpacked


class BadLog(ValueError):
    """A run.jsonl that is not what a trainer wrote. The message names file, line and reason."""


@dataclass(frozen=True)
class Run:
    """One finished or unfinished run, as its log tells it."""

    path: Path  # of run.jsonl or run.jsonl.xz
    header: dict
    steps: tuple[dict, ...]
    vals: tuple[dict, ...]  # dev and val looks, in order
    events: tuple[dict, ...]
    end: dict | None  # None: the run did not finish, or was killed
    last_h: str = field(repr=False, default="")

    @property
    def run_id(self) -> str:
        return self.header["run_id"]

    @property
    def arm(self) -> str:
        return self.header["arm"]

    @property
    def done(self) -> bool:
        return self.end is not None and self.end["status"] == "done"

    @property
    def resumed(self) -> bool:
        return any(e["kind"] == "resume" for e in self.events)

    def final(self, name: str) -> float | None:
        """The last dev_loss, val_loss or val_loss_ext (nats a token), or None."""
        found = [v[name] for v in self.vals if name in v]
        return found[-1] if found else None

    @property
    def labels(self) -> dict:
        """block, sitting, order, share as compare wrote them; {} for a single run."""
        return self.header.get("labels") or {}


def chain(line: str, h: str) -> str:
    """The hash that a line (without its own `, "h": "..."`) has after one whose hash is h."""
    return hashlib.sha256((h + line).encode()).hexdigest()[:16]


def log_of(folder: Path) -> Path:
    """A run's log in its folder, plain or packed; the plain path where there is neither."""
    packed = folder / PACKED
    return packed if packed.is_file() and not (folder / LOG).is_file() else folder / LOG


def logs_in(folder: str | Path, below: str = "*") -> list[Path]:
    """Logs of all runs in folders that match `below`, plain or packed: one a folder."""
    found = (p.parent for name in (LOG, PACKED) for p in Path(folder).glob(f"{below}/{name}"))
    return [log_of(run) for run in sorted(set(found))]


def read_text(path: Path, errors: str = "strict") -> str:
    """A log's text. BadLog where it cannot be unpacked; `errors` as in bytes.decode."""
    if path.suffix != ".xz":
        return path.read_text(encoding="utf-8", errors=errors)
    try:
        with lzma.open(path) as f:
            data = f.read(MOST_BYTES + 1)
    except (lzma.LZMAError, EOFError) as e:
        raise BadLog(f"{path}: cannot be unpacked ({e})") from None
    if len(data) > MOST_BYTES:
        raise BadLog(f"{path}: has more than {MOST_BYTES:,} bytes unpacked")
    return data.decode("utf-8", errors)


def pack(folder: str | Path) -> int:
    """Packs the logs below a folder (xz, a fifth of the size), of runs that have ended or were set
    aside; returns how many. Lines and hashes stay what they are, so a record's readers see no
    difference; a run that is to go on needs its plain log."""
    found = []
    for path in sorted(Path(folder).rglob(LOG)):
        data, to = path.read_bytes(), path.with_name(PACKED)
        if b'{"t": "end"' not in data and "aside" not in path.parts:
            continue
        found.append(path)
        half = to.with_suffix(".half")
        half.write_bytes(lzma.compress(data, preset=9))
        os.replace(half, to)
        path.unlink()
    return len(found)


def read_lines(path: Path) -> tuple[list[dict], str]:
    """(the objects of a log, its last hash); BadLog where the hash chain is broken."""
    rows, h = [], ""
    for number, text in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(text)
            said = row.pop("h")
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise BadLog(f"{path}:{number}: not a line of a run log") from None
        body, _, _ = text.rpartition(', "h": "')
        h = chain(body + "}", h)
        if h != said:
            raise BadLog(f"{path}:{number}: the hash chain is broken: edited after the run")
        rows.append(row)
    if not rows or rows[0].get("t") != "header":
        raise BadLog(f"{path}: does not begin with a header")
    return rows, h


def load_run(path: str | Path) -> Run:
    """A run from its folder or its log."""
    path = Path(path)
    path = log_of(path) if path.is_dir() else path
    rows, h = read_lines(path)
    of = {k: tuple(r for r in rows if r["t"] == k) for k in ("step", "val", "event", "end")}
    end = of["end"][-1] if of["end"] else None
    return Run(path, rows[0], of["step"], of["val"], of["event"], end, h)


def load_runs(folder: str | Path) -> list[Run]:
    """Every run one level below a folder, by run id. Raises BadLog for a broken one."""
    return [load_run(p) for p in logs_in(folder)]


def sampled(step: dict) -> int:
    """Over how many classes the step's loss is: an estimate of one over all, in the mean lower, as
    it is the logarithm of one; 0: over all."""
    return step.get("candidates", 0)


def schedule_key(run: Run) -> str:
    """Same key = same tokens in the same steps: what two arms at equal tokens must share."""
    some = [[sampled(s)] if sampled(s) else [] for s in run.steps]
    steps = [[s["tokens"], s["lr"], s["window"], *of] for s, of in zip(run.steps, some)]
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16]


def block_key(run: Run) -> tuple:
    """Runs of one key are one block: same machine and sitting, seeds, schedule and data."""
    h, labels = run.header, run.labels
    sitting = labels.get("sitting", h["env"].get("host", ""))
    data = json.dumps(h["data"], sort_keys=True)
    digest = hashlib.sha256(data.encode()).hexdigest()[:16]
    place = (sitting, labels.get("block", -1), h["preset"], h["world"])
    return (*place, h["seed"], h["data_seed"], h["tokens"], digest)


def blocks(runs: Iterable[Run]) -> list[dict[str, Run]]:
    """Finished runs grouped into blocks, {arm: run} each, in order of first appearance; BadLog
    where a block has an arm twice."""
    found: dict[tuple, dict[str, Run]] = {}
    for run in runs:
        if not run.done:
            continue
        block = found.setdefault(block_key(run), {})
        if run.arm in block:
            raise BadLog(f"{run.path}: {run.arm} ran twice in one block: {block[run.arm].path}")
        block[run.arm] = run
    return list(found.values())
