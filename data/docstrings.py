"""The demo's text: English that is on any machine, the docstrings of Python's own libraries.

Docstrings of the standard library, numpy and torch (those installed), read from their source files
with `ast`, nothing imported. Whole modules go to train, dev or val, and a long line is kept once,
so that what a model is tested with is not what it was shown.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.util
import inspect
import json
import lzma
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import shards
from data.shards import BYTES, SPLITS, CorpusWriter, InputError, byte_tokens

ROOT = Path(__file__).resolve().parents[1]
ABOUT = "about.json"
LIBRARIES = ("numpy", "torch")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__"}
SHORTEST = 200  # characters of a docstring
LONG_LINE = 40  # characters: a line this long is kept once


def build(out_dir: Path, max_bytes: int = 3_000_000) -> dict:
    """Makes `out_dir` a folder of byte shards of at most `max_bytes` of text, or finds it there.

    The result holds `bytes` and `modules` by split, `sha256` of the text, and what simple
    compressors and a bigram need for val, bits a byte: `gzip` and `xz` {alone, conditioned} (the
    second knows train), `bigram`. It is the same on every call on one machine. InputError if
    there is too little text, or if the folder holds other tokens.
    """
    out_dir = Path(out_dir)
    about = _cached(out_dir, max_bytes)
    if about:
        return about
    found = collect(source_files(), max_bytes)
    texts = {split: [text for _, text in found[split]] for split in SPLITS}
    if not all(texts.values()):
        raise InputError(f"too few docstrings on this machine for {max_bytes:,} bytes in 3 splits")
    ours = (out_dir / ABOUT).exists() or not (out_dir / shards.MANIFEST).exists()
    table = shards.byte_token_bytes()
    with CorpusWriter(out_dir, BYTES, table, overwrite=ours) as writer:
        for split in SPLITS:
            writer.begin(split)
            writer.add(byte_tokens(texts[split]))
        manifest = writer.commit()
    about = {
        "max_bytes": max_bytes,
        "bytes": {row["split"]: row["text_bytes"] for row in manifest["files"]},
        "modules": {split: len({module for module, _ in found[split]}) for split in SPLITS},
        "sha256": hashlib.sha256(b"".join(map(_joined, texts.values()))).hexdigest(),
        **_baselines(texts["train"], texts["val"]),
        "manifest_sha256": shards.sha256(out_dir / shards.MANIFEST),
    }
    aside = out_dir / f"{ABOUT}.tmp"
    aside.write_text(json.dumps(about, indent=1) + "\n")
    aside.replace(out_dir / ABOUT)
    return about


def _cached(out_dir: Path, max_bytes: int) -> dict | None:
    """What an earlier call made, if it is whole and was asked the same."""
    try:
        about = json.loads((out_dir / ABOUT).read_text())
        digest = shards.sha256(out_dir / shards.MANIFEST)
        if about["max_bytes"] != max_bytes or about["manifest_sha256"] != digest:
            return None
        return None if shards.verify(out_dir) else about
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- Text ---------------------------------------------------------------------------------------


def source_files() -> list[tuple[str, Path]]:
    """(module, file) of the libraries' Python sources, in an order shuffled once for all."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            roots.append((name, Path(spec.origin).parent))
    found = {}
    for prefix, root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts):
                found[".".join([prefix, *parts]).strip(".")] = path
    return sorted(found.items(), key=lambda item: _hash("order", item[0]))


def collect(files: list[tuple[str, Path]], max_bytes: int) -> dict[str, list[tuple[str, str]]]:
    """(module, docstring) by split, in the files' order, until `max_bytes` of UTF-8 are full."""
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    left = max_bytes
    for module, path in files:
        for text in docstrings(path):
            text = _without_repeats(text, seen)
            if len(text) < SHORTEST:
                continue
            left -= len(text.encode())
            if left < 0:
                return found
            found[split_of(module)].append((module, text))
    return found


def split_of(module: str) -> str:
    """Where a module's text goes: a twentieth to val, a twentieth to dev, by its name alone."""
    return {0: "val", 1: "dev"}.get(_hash("split", module) % 20, "train")


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file that are long enough and clean; none if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in others' sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").rstrip()
            if len(text) >= SHORTEST and _is_clean(text):
                yield text


def _is_clean(text: str) -> bool:
    """Printable but for newlines and tabs: no control characters, no half surrogates."""
    return text.translate({10: None, 9: None}).isprintable()


def _without_repeats(text: str, seen: set[str]) -> str:
    """The text without long lines that came before, anywhere; adds its own to `seen`."""
    kept = []
    for line in text.split("\n"):
        words = line.strip()
        if len(words) >= LONG_LINE:
            if words in seen:
                continue
            seen.add(words)
        kept.append(line)
    return "\n".join(kept).strip("\n")


def _hash(purpose: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose} {name}".encode()).digest()[:8], "big")


# ---- What val costs without a neural network ----------------------------------------------------


def _joined(texts: list[str]) -> bytes:
    return "".join(text + "\0" for text in texts).encode()


def _baselines(train: list[str], val: list[str]) -> dict:
    """Bits a byte of val for gzip -9, xz -9 and a bigram; see `build`."""
    before, after = _joined(train), _joined(val)
    size = sum(len(text.encode()) for text in val)
    rows: dict = {}
    for name, packed in (("gzip", _gzipped), ("xz", _xzipped)):
        known = packed(before + after) - packed(before)
        rows[name] = {"alone": 8 * packed(after) / size, "conditioned": 8 * known / size}
    return {**rows, "bigram": _bigram(byte_tokens(train).tokens, byte_tokens(val).tokens)}


def _gzipped(data: bytes) -> int:
    return len(gzip.compress(data, 9, mtime=0))


def _xzipped(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def _bigram(train: np.ndarray, val: np.ndarray, prior: float = 8.0) -> float:
    """Bits a byte of val where a byte depends on the one before it, counted on train.

    A pair's probability leans on the byte's own with the weight of `prior` occurrences, and that
    on 1/256 with one. End-of-text is a context, never a target, as in the trainer's bits a byte.
    """
    pairs = np.zeros((257, 257))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    pairs = pairs[:, :256]
    alone = (pairs.sum(0) + 1 / 256) / (pairs.sum() + 1)
    given = (pairs + prior * alone) / (pairs.sum(1, keepdims=True) + prior)
    target = val[1:] != BYTES.eot
    return float(-np.log2(given[val[:-1][target], val[1:][target]]).mean())


def main(argv: list[str] | None = None) -> int:
    """Builds the folder and prints what is in it; 2 if that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=ROOT / "data" / "tokens" / "demo",
        help="folder for the shards (data/tokens/demo in the repository)",
    )
    parser.add_argument(
        "--max-bytes", metavar="N", type=int, default=3_000_000, help="most bytes of text (3000000)"
    )
    args = parser.parse_args(argv)
    try:
        about = build(args.out, args.max_bytes)
    except InputError as e:
        print(f"data: {e}", file=sys.stderr)
        return 2
    for split in SPLITS:
        print(f"{split}: {about['bytes'][split]:,} bytes of {about['modules'][split]:,} modules")
    for name in ("gzip", "xz"):
        alone, known = about[name]["alone"], about[name]["conditioned"]
        print(f"val, bits a byte: {name} -9 {alone:.3f} alone, {known:.3f} knowing train")
    print(f"val, bits a byte: bigram {about['bigram']:.3f}")
    print(f"text sha256 {about['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
