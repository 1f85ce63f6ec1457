"""Gets tokens: downloads published shards, tokenises any text, checks a folder of shards.

python data/get.py fineweb-edu|fineweb --shards N | text PATH... --out DIR | verify DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import documents, encode, hub, shards
from data.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
BAD_INPUT, STOPPED = 2, 130


def make_parser() -> argparse.ArgumentParser:
    """The command line; every flag says its unit and default."""
    parser = argparse.ArgumentParser(prog="./run.sh data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for dataset, (repo, _) in hub.DATASETS.items():
        _add_hub(commands, dataset, repo)
    _add_text(commands)
    check = commands.add_parser("verify", help="check a folder of shards against its manifest")
    check.add_argument("folder", metavar="DIR", type=Path, help="folder of shards")
    check.set_defaults(run=run_verify)
    return parser


def _add_hub(commands: argparse._SubParsersAction, dataset: str, repo: str) -> None:
    p = commands.add_parser(
        dataset,
        help=f"download GPT-2 tokens of {repo}",
        description=f"Downloads token shards of {repo} from the Hugging Face hub (HF_ENDPOINT "
        "names a mirror). What is whole stays; what stopped half-way goes on there.",
    )
    p.add_argument(
        "--shards",
        metavar="N",
        type=_count,
        default=9,
        help="training shards, 100M tokens or 200 MB each; the validation shard comes too (9)",
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=ROOT / "data" / "tokens" / dataset,
        help=f"folder for the shards (data/tokens/{dataset} in the repository)",
    )
    p.set_defaults(run=run_hub)


def _add_text(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "text",
        help="tokenise files of text",
        description=f"Tokenises files into token shards. PATH: {documents.FORMATS}, or a folder "
        "of these, taken in sorted order. A .txt or .md file is one document; .jsonl and .json "
        "have one JSON object a line. DIR is written whole or not at all.",
    )
    p.add_argument("paths", metavar="PATH", nargs="+", help="what to train on")
    p.add_argument("--dev", metavar="PATH", nargs="+", default=[], help="held out, to choose by")
    p.add_argument("--val", metavar="PATH", nargs="+", default=[], help="held out, to report")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    p.add_argument(
        "--tokenizer",
        metavar="FILE|bytes|gpt2",
        required=True,
        help="a tiktoken file (gpt2.tiktoken) or a folder with one; bytes: a token a byte; "
        "gpt2: fetched by tiktoken",
    )
    p.add_argument(
        "--text-key", metavar="KEY", default="text", help="JSON key or column of the text (text)"
    )
    p.add_argument(
        "--shard-tokens",
        metavar="N",
        type=_count,
        default=100_000_000,
        help="most tokens in a shard; a longer document has one alone (100000000)",
    )
    p.add_argument(
        "--workers",
        metavar="N",
        type=_count,
        default=_cores(),
        help=f"processes; the output is the same for any number (all cores: {_cores()})",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the shards in --out")
    p.set_defaults(run=run_text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= shards.MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {shards.MAX_TOKENS}")
    return int(text)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_hub(args: argparse.Namespace) -> None:
    """Downloads the shards of a published data set."""
    with Progress() as progress:
        hub.fetch_shards(args.command, args.shards, args.out, progress)
    print(f"{args.out} has {args.shards} training shards and the validation shard")


def run_text(args: argparse.Namespace) -> None:
    """Tokenises what `args` names and prints the counts of each shard."""
    given = {"train": args.paths, "dev": args.dev, "val": args.val}
    sources = {split: documents.find(paths) for split, paths in given.items() if paths}
    tokenizer = encode.load_tokenizer(args.tokenizer)
    options = {
        name: getattr(args, name) for name in ("text_key", "shard_tokens", "workers", "overwrite")
    }
    with Progress() as progress:
        report = _Report(sources, progress)
        manifest = encode.write_corpus(sources, args.out, tokenizer, on_piece=report.add, **options)
    for row in manifest["files"]:
        print(
            f"{row['name']}  {row['tokens']:,} tokens, {row['documents']:,} documents, "
            f"{row['text_bytes']:,} bytes of text"
        )
    for split in sources:
        rows = [row for row in manifest["files"] if row["split"] == split]
        total = sum(row["tokens"] for row in rows)
        print(f"{split}: {total:,} tokens of {manifest['tokenizer']} in {len(rows)} shards")
    if report.empty:
        print(f"skipped {report.empty:,} empty documents")
    print(f"wrote {args.out} in {progress.seconds:.1f} s")


class _Report:
    """Progress of `text`: bytes of input read, tokens made."""

    def __init__(self, sources: dict[str, list[Path]], progress: Progress):
        self.sizes = {path: path.stat().st_size for paths in sources.values() for path in paths}
        self.progress = progress
        progress.expect(sum(self.sizes.values()))
        self.tokens = self.empty = self.before = 0
        self.path: Path | None = None

    def add(self, piece: encode.Encoded) -> None:
        if piece.path != self.path:
            self.before += self.sizes.get(self.path, 0)
            self.path = piece.path
        self.tokens += len(piece.batch.tokens)
        self.empty += piece.empty
        self.progress.update(self.before + piece.read, f", {self.tokens / 1e6:,.1f}M tokens")


def run_verify(args: argparse.Namespace) -> None:
    """Prints what is wrong with a folder of shards; InputError if anything is."""
    problems = shards.verify(args.folder)
    if problems:
        raise shards.InputError("\n".join(problems))
    if (args.folder / shards.MANIFEST).exists():
        print(f"{args.folder} is what its {shards.MANIFEST} says")
    else:
        print(f"{args.folder} has no {shards.MANIFEST}: headers and lengths are right")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one sentence on stderr), 130 stopped by Ctrl-C."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except shards.InputError as e:
        print(f"data: {e}", file=sys.stderr)
        return BAD_INPUT
    except OSError as e:  # a full disk, a folder without rights
        print(f"data: {e}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("data: stopped; no half file has a final name", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
