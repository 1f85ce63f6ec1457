"""Everything that is filed below records/, read from its logs: what pages.py shows and
leaderboard.py checks."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from records import logs, verify
from records.verify import Filed, Finding

VAL_LINE = re.compile(r'^\{"t": "val".*"split": "val"', re.MULTILINE)


@dataclass(frozen=True)
class Board:
    """A checkout's records."""

    root: Path
    tracks: dict[str, dict]  # tracks.json
    filed: dict[str, list[Filed]]  # by track, in the order of folder names, which are dates
    findings: tuple[Finding, ...]  # what could not be read

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def all(self) -> list[Filed]:
        return [filed for found in self.filed.values() for filed in found]

    def held(self, track: str) -> list[Filed]:
        """The track's records, oldest first."""
        found = (f for f in self.filed[track] if f.claim["kind"] == "record")
        return [f for f in found if f.arm is not None and shown(f)]

    def current(self, track: str) -> Filed | None:
        """The track's fastest record."""
        return min(self.held(track), key=lambda f: of_record(f)["train_s"]["mean"], default=None)

    def val_looks(self, track: str) -> int:
        """How often a filed run of the track has opened val, runs set aside included."""
        looks = 0
        for path in logs.logs_in(self.records / track, "**"):
            with contextlib.suppress(logs.BadLog):  # packed and damaged: a finding of verify's
                looks += len(VAL_LINE.findall(logs.read_text(path, "replace")))
        return looks


def read_board(root: Path) -> Board:
    """Reads all of it. OSError or ValueError where there is no good tracks.json."""
    tracks = json.loads((root / "records" / "tracks.json").read_text(encoding="utf-8"))
    filed: dict[str, list[Filed]] = {track: [] for track in tracks}
    findings = []
    for track in tracks:
        for folder in sorted(p for p in (root / "records" / track).glob("[!._]*") if p.is_dir()):
            try:
                found, broken = verify.load(folder, tracks)
            except verify.Unreadable as e:
                findings.append(e.finding)
                continue
            filed[track].append(found)
            findings += broken
    for folder in sorted({p.parents[2] for p in logs.logs_in(root / "records", "*/*/*")}):
        if folder.name not in tracks:
            findings.append(Finding(folder, "is no track of tracks.json, and has runs"))
    return Board(root, tracks, filed, tuple(findings))


def shown(filed: Filed) -> bool:
    """Whether a folder has figures: finished runs that go together."""
    try:
        return bool(filed.runs and filed.figures)
    except (KeyError, TypeError, ValueError, IndexError):
        return False


def full_schedule(filed: Filed) -> dict:
    """The figures of the whole budget."""
    said = filed.figures
    return next(s for s in said["schedules"] if s["fraction"] == said["full"])


def of_record(filed: Filed) -> dict:
    """Figures of the arm that a record is for."""
    return full_schedule(filed)["arms"][filed.arm]
