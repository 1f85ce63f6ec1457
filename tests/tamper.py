"""A forger's tools: logs changed after the fact, with or without a new hash chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from records import logs


def read(run: Path) -> list[dict]:
    """The lines of RUN/run.jsonl, hashes included."""
    return [json.loads(text) for text in (run / "run.jsonl").read_text().splitlines()]


def write(run: Path, rows: list[dict]) -> None:
    """RUN/run.jsonl of these lines, with a hash chain that holds."""
    h, text = "", ""
    for row in rows:
        line = json.dumps({k: v for k, v in row.items() if k != "h"})
        h = logs.chain(line, h)
        text += f'{line[:-1]}, "h": "{h}"}}\n'
    (run / "run.jsonl").write_text(text)


def edit(run: Path, kind: str, change: Callable[[dict], None], which: int = -1) -> None:
    """Applies `change` to one line of a kind (the last), and makes the chain anew."""
    rows = read(run)
    change([row for row in rows if row["t"] == kind][which])
    write(run, rows)


def edit_json(path: Path, **changes) -> None:
    """Changes top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1) + "\n")
