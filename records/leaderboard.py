"""The leaderboard, rebuilt from the filed logs alone, and the check of everything that is claimed.

./run.sh records                     rebuilds records/README.md, the figures of README.md and
                                     every summary.json
./run.sh records --check             verifies all folders (verify.py, RULES.md) and that nothing
                                     generated is out of date; exit code 1 with the findings
./run.sh records replay RECORD       reruns a record's first steps (replay.py)
./run.sh records --pack FOLDER       packs the logs of a folder's runs (run.jsonl.xz), a fifth of
                                     their size, read like plain ones
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from records import logs, pages, replay, summary, verify
from records.board import Board, of_record, read_board, shown
from records.verify import Finding

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 8_000_000  # of all tracked files of records/
NO_PLACE = "needs a line <!-- figures:begin --> and, after it, one <!-- figures:end -->"
OK, FOUND, BAD_INPUT = 0, 1, 2


# ---- The check ----------------------------------------------------------------------------------


def check_history(board: Board) -> Iterator[Finding]:
    """A record is faster than all before it."""
    for track in board.tracks:
        best, holder = float("inf"), ""
        for filed in board.held(track):
            seconds = of_record(filed)["train_s"]["mean"]
            if seconds >= best:
                text = f"claims a record of {seconds:.1f} s, and {holder} took {best:.1f} s"
                yield Finding(filed.path / "claim.json", text)
            else:
                best, holder = seconds, filed.path.name


def check_generated(board: Board) -> Iterator[Finding]:
    """What `rebuild` makes is what lies there."""
    path, again = board.records / "README.md", "run ./run.sh records"
    if not path.is_file() or path.read_text(encoding="utf-8") != pages.readme(board):
        yield Finding(path, f"is not what the logs make: {again}")
    path = board.root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    made = pages.with_figures(text, board)
    if made is None:
        yield Finding(path, NO_PLACE)
    elif made != text:
        yield Finding(path, f"has figures that the logs do not make: {again}")


def tracked(board: Board) -> list[Path]:
    """Files of records/ that git has or would take; without git all but caches and PNG copies."""
    words = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "records")
    said = verify.git(board.root, *words)
    if said is not None:
        return [board.root / name for name in said.decode().split("\0") if name]
    found = (p for p in board.records.rglob("*") if "__pycache__" not in p.parts)
    return [p for p in found if p.suffix != ".png"]


def check_size(board: Board) -> Iterator[Finding]:
    total = sum(p.stat().st_size for p in tracked(board) if p.is_file())
    if total > MOST_BYTES:
        yield Finding(board.records, f"has {total:,} bytes of tracked files, over {MOST_BYTES:,}")


def check(board: Board) -> list[Finding]:
    """Everything."""
    found = list(board.findings)
    for filed in board.all:
        found += verify.check(filed, board.root)
    return [*found, *check_history(board), *check_generated(board), *check_size(board)]


# ---- Command line -------------------------------------------------------------------------------


def rebuild(board: Board) -> None:
    """Writes all that is generated. ValueError, with nothing written, where README.md has no place
    for the figures."""
    path = board.root / "README.md"
    made = pages.with_figures(path.read_text(encoding="utf-8"), board)
    if made is None:
        raise ValueError(f"{path} {NO_PLACE}")
    path.write_text(made, encoding="utf-8")
    (board.records / "README.md").write_text(pages.readme(board), encoding="utf-8")
    for filed in filter(shown, board.all):
        summary.write(filed.path)
    print(f"rebuilt {board.records / 'README.md'}, the figures of {path}, and the summaries")


def report(board: Board) -> int:
    """Prints the findings, one a line; the exit code."""
    found = check(board)
    for finding in found:
        print(str(finding).replace(f"{board.root}/", ""))
    runs = sum(len(filed.runs) for filed in board.all)
    print(f"folders: {len(board.all)}, runs: {runs}, findings: {len(found)}")
    return FOUND if found else OK


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["replay"]:
        return replay.main(argv[1:])
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="records",
        description=first,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="verify, write nothing")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="pack its logs, and stop")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="(this checkout)")
    args = parser.parse_args(argv)
    try:
        if args.pack:
            if not args.pack.is_dir():
                raise ValueError(f"--pack {args.pack}: there is no such folder")
            print(f"packed {logs.pack(args.pack)} logs in {args.pack}")
            return OK
        board = read_board(args.root.resolve())
        if args.check:
            return report(board)
        rebuild(board)
        return OK
    except (OSError, ValueError) as e:
        print(f"records: {e}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
