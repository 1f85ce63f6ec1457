"""What is fixed about a track's text: digests of its shards, and counts of the targets that dev and
val losses are means over. records/tracks.json holds them, so that a filed loss can be derived again
from the parts that its log gives (by position, bits a byte).

    python -m records.slices DIR [--row-tokens 262144 1024] [--val-tokens N] [--dev-tokens N]

prints the "data" and "slices" of the track whose shards are in DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T

DEFAULTS = T.DataConfig()


def count(corpus: T.Corpus, split: str, most: int, rows: list[int]) -> dict:
    """Counts over targets 1 to `most` of a split: all, those that end a document, bytes of the rest
    (None where the corpus has no token_bytes.bin), and, for each row length, targets by position in
    the document's piece, in the order of a log's by_position."""
    total = min(most, corpus.tokens(split) - 1)
    stream = T.TokenStream(corpus.splits[split], corpus.eot)
    targets = stream.read(1, total)[0]
    text = targets[targets != corpus.eot]
    found = {"targets": total, "ends": total - len(text), "text_bytes": None, "by_position": {}}
    if corpus.bytes_of is not None:
        found["text_bytes"] = int(corpus.bytes_of[text].astype(np.int64).sum())
    for row in rows:
        counts = np.zeros(len(T.EDGES) + 1, np.int64)
        for start in range(0, total, row):
            position = T.make_batch(stream, start, 1, row).position[0, : total - start].numpy()
            kinds = np.searchsorted(T.EDGES, position, side="right")
            counts += np.bincount(kinds, minlength=len(counts))
        found["by_position"][str(row)] = counts.tolist()
    return found


def describe(folder: str, rows: list[int], val_tokens: int, dev_tokens: int) -> dict:
    """{"data": [...], "slices": {split: counts}} of a folder; InputError for a bad one."""
    corpus = T.Corpus.open(folder)
    most = {"dev": dev_tokens, "val": val_tokens}
    slices = {s: count(corpus, s, n, rows) for s, n in most.items() if corpus.splits.get(s)}
    return {"data": corpus.check_digests(), "slices": slices}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="slices", description="digests and counts of a track's text", allow_abbrev=False
    )
    add = parser.add_argument
    add("data", metavar="DIR", help="folder of token shards")
    add("--row-tokens", type=int, nargs="+", default=[DEFAULTS.val_row_tokens], metavar="N")
    add("--val-tokens", type=int, default=DEFAULTS.val_tokens, metavar="N", help="targets of val")
    add("--dev-tokens", type=int, default=DEFAULTS.dev_tokens, metavar="N", help="targets of dev")
    args = parser.parse_args(argv)
    try:
        said = describe(args.data, args.row_tokens, args.val_tokens, args.dev_tokens)
    except T.InputError as e:
        print(f"slices: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    print(json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
