"""Token shards: the format that train_gpt.py reads, its writer and its checker.

A shard is 256 int32 (magic, version, token count, vocabulary size, tokenizer id, zeros), then the
tokens as uint16, little-endian; every document starts with the tokenizer's end-of-text token.
Beside the shards stand `manifest.json` {version, tokenizer, vocab, eot, files: [{name, split,
tokens, documents, text_bytes, sha256}]} and `token_bytes.bin`, uint16 [vocab]: the bytes of text
that each token stands for, 0 for end-of-text, so that a loss can be given in bits a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the header counts in int32
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.bin"
SPLITS = ("train", "dev", "val")


class InputError(ValueError):
    """What was asked for cannot be done; the message is one sentence for the user."""


class Vocab(NamedTuple):
    """What a shard says of its tokens; `number` is the header's tokenizer id, 0 for unknown."""

    name: str
    size: int
    eot: int
    number: int


GPT2 = Vocab("gpt2", 50_257, 50_256, 1)
BYTES = Vocab("bytes", 257, 256, 2)


class Batch(NamedTuple):
    """Documents in order: all tokens end to end, and two counts for each document."""

    tokens: np.ndarray  # uint16 [n], each document with its end-of-text token in front
    lengths: np.ndarray  # int64 [documents], tokens
    text_bytes: np.ndarray  # int64 [documents], bytes of UTF-8 text


def byte_tokens(texts: list[str]) -> Batch:
    """Documents as bytes: token = byte, 256 in front of each document."""
    raw = [text.encode() for text in texts]
    sizes = np.array([len(r) for r in raw], np.int64)
    tokens = np.empty(int(sizes.sum()) + len(raw), np.uint16)
    starts = np.cumsum(sizes + 1) - (sizes + 1)
    is_text = np.ones(len(tokens), bool)
    is_text[starts] = False
    tokens[starts] = BYTES.eot
    tokens[is_text] = np.frombuffer(b"".join(raw), np.uint8)
    return Batch(tokens, sizes + 1, sizes)


def byte_token_bytes() -> np.ndarray:
    """`token_bytes.bin` of the byte tokenizer: uint16 [257]."""
    return np.array([1] * 256 + [0], np.uint16)


# ---- Reading ------------------------------------------------------------------------------------


def read_header(path: Path) -> np.ndarray:
    """The 256 integers of a shard; InputError if it is none, or longer or shorter than it says."""
    try:
        header, size = np.fromfile(path, "<i4", HEADER_INTS), path.stat().st_size
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from None
    if header.size < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise InputError(f"{path} is no token shard: no magic {MAGIC} and version {VERSION}")
    want = HEADER_BYTES + 2 * int(header[2])
    if size != want:
        raise InputError(f"{path} is cut or padded: {size:,} bytes, its header says {want:,}")
    return header


def read_tokens(path: Path) -> np.ndarray:
    """All tokens of a shard, uint16, after `read_header`'s checks."""
    count = int(read_header(path)[2])
    return np.fromfile(path, "<u2", count, offset=HEADER_BYTES)


def read_manifest(folder: Path) -> dict:
    """`manifest.json` of a folder of shards; InputError if missing, damaged or incomplete."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        for key in ("version", "tokenizer", "vocab", "eot"):
            manifest[key]
        if not 0 <= manifest["eot"] < manifest["vocab"] <= 2**16:
            raise ValueError(f"end-of-text {manifest['eot']} of {manifest['vocab']} tokens")
        for row in manifest["files"]:
            Path(row["name"])
            for key in ("split", "tokens", "documents", "text_bytes", "sha256"):
                row[key]
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {MANIFEST}: it is not a whole folder of shards"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{path} is damaged ({e!r}): make the folder again") from None
    return manifest


def sha256(path: Path) -> str:
    """Digest of a file's bytes, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- Writing ------------------------------------------------------------------------------------


class CorpusWriter:
    """Writes a folder of shards, manifest and token_bytes; all of it appears, or nothing.

    Files grow under `NAME.tmp` in the same folder; `commit` renames them, the manifest last. Use
    it in a `with`: what leaves the block without `commit` is removed.
    """

    def __init__(
        self,
        folder: Path,
        vocab: Vocab,
        token_bytes: np.ndarray,
        *,
        shard_tokens: int = 100_000_000,
        overwrite: bool = False,
    ):
        """`shard_tokens`: most tokens in a shard; only one longer document may exceed it.

        InputError if the folder holds shards already and `overwrite` is not set.
        """
        if not 1 <= shard_tokens <= MAX_TOKENS:
            raise InputError(f"shard_tokens is {shard_tokens}: give 1 to {MAX_TOKENS}")
        self.folder, self.vocab, self.token_bytes = Path(folder), vocab, token_bytes
        self.shard_tokens = shard_tokens
        self.rows: list[dict] = []
        self.split = "train"
        self.shard: _OpenShard | None = None
        self._claim(overwrite)

    def _claim(self, overwrite: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot make the folder {self.folder}: {e.strerror}") from None
        held = [p for p in (self.folder / MANIFEST, *self.folder.glob("*.bin")) if p.exists()]
        if held and not overwrite:
            raise InputError(
                f"{self.folder} already holds {held[0].name}: "
                "give another --out, or --overwrite to replace it"
            )
        self._remove_unfinished()  # of a run that was killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shard:
            self.shard.file.close()
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for name in (*(f"{split}_*.bin" for split in SPLITS), TOKEN_BYTES, MANIFEST):
            for left in self.folder.glob(f"{name}.tmp"):
                left.unlink()

    def begin(self, split: str) -> None:
        """Ends the current shard: the next document opens a new one in `split`."""
        self._close_shard()
        self.split = split

    def add(self, batch: Batch) -> None:
        """Appends documents; a document is never cut between shards."""
        ends = np.cumsum(batch.lengths)
        document, at = 0, 0  # first of each that is not yet written
        while document < len(ends):
            room = self.shard_tokens - (self.shard.tokens if self.shard else 0)
            last = int(np.searchsorted(ends, at + room, "right"))
            if last <= document and self.shard:
                self._close_shard()
                continue
            last = max(last, document + 1)
            if not self.shard:
                self.shard = _OpenShard(self.folder / self._next_name(), self.vocab)
            text_bytes = int(batch.text_bytes[document:last].sum())
            self.shard.write(batch.tokens[at : ends[last - 1]], last - document, text_bytes)
            document, at = last, int(ends[last - 1])

    def _next_name(self) -> str:
        index = sum(row["split"] == self.split for row in self.rows)
        return f"{self.split}_{index:06d}.bin"

    def _close_shard(self) -> None:
        if self.shard:
            name = self._next_name()
            self.rows.append({"name": name, "split": self.split, **self.shard.close()})
            self.shard = None

    def commit(self) -> dict:
        """Makes the whole folder appear; the manifest. InputError if there is no train document."""
        self._close_shard()
        if not any(row["split"] == "train" for row in self.rows):
            raise InputError("there is no document to train on in what was given")
        manifest = {
            "version": VERSION,
            "tokenizer": self.vocab.name,
            "vocab": self.vocab.size,
            "eot": self.vocab.eot,
            "files": self.rows,
        }
        old = self._old_files()
        with _aside(self.folder / TOKEN_BYTES) as f:
            f.write(self.token_bytes.astype("<u2").tobytes())
        with _aside(self.folder / MANIFEST) as f:
            f.write(json.dumps(manifest, indent=1).encode() + b"\n")
        # From here a kill leaves whole shards without a manifest, never a manifest that lies.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in old:
            path.unlink(missing_ok=True)
        for name in [row["name"] for row in self.rows] + [TOKEN_BYTES, MANIFEST]:
            (self.folder / f"{name}.tmp").replace(self.folder / name)
        _sync_folder(self.folder)
        return manifest

    def _old_files(self) -> list[Path]:
        """What an older manifest names: it goes when the new one comes."""
        with contextlib.suppress(InputError):
            return [
                self.folder / Path(row["name"]).name for row in read_manifest(self.folder)["files"]
            ]
        return []


class _OpenShard:
    """A shard that grows under its temporary name; `close` completes its header."""

    def __init__(self, path: Path, vocab: Vocab):
        self.path, self.vocab = path.with_name(f"{path.name}.tmp"), vocab
        self.tokens = self.documents = self.text_bytes = 0
        self.file = self.path.open("wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        if self.tokens + len(tokens) > MAX_TOKENS:
            raise InputError(f"a document of {len(tokens):,} tokens is too long for a shard")
        self.file.write(tokens.astype("<u2", copy=False).tobytes())
        self.tokens += len(tokens)
        self.documents += documents
        self.text_bytes += text_bytes

    def close(self) -> dict:
        """Syncs the file to disk; its counts and digest for the manifest."""
        header = np.zeros(HEADER_INTS, "<i4")
        header[:5] = MAGIC, VERSION, self.tokens, self.vocab.size, self.vocab.number
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "sha256": sha256(self.path),
        }


@contextlib.contextmanager
def _aside(path: Path) -> Iterator:
    """A file under `NAME.tmp`, on disk when the block ends; the caller renames it."""
    with path.with_name(f"{path.name}.tmp").open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    """Puts the renames themselves on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Checking -----------------------------------------------------------------------------------


def verify(folder: Path) -> list[str]:
    """Everything wrong with a folder of shards, a sentence each; empty if it is whole.

    Checks headers, lengths and digests against the manifest, that token counts, documents and
    bytes are what the tokens say, and token_bytes. Without a manifest (shards published by others):
    headers and lengths alone. InputError if there is nothing to check.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        paths = sorted(p for p in folder.glob("*.bin") if p.name != TOKEN_BYTES)
        if not paths:
            raise InputError(f"{folder} holds no shards and no {MANIFEST}")
        return [str(e) for e in map(_header_problem, paths) if e]
    manifest = read_manifest(folder)
    problems = []
    table = np.zeros(0, np.uint16)
    if (folder / TOKEN_BYTES).is_file():
        table = np.fromfile(folder / TOKEN_BYTES, "<u2")
    if len(table) != manifest["vocab"] or table[manifest["eot"]] != 0:
        problems.append(f"{folder / TOKEN_BYTES} is not uint16 [{manifest['vocab']}], 0 for eot")
        table = None
    for row in manifest["files"]:
        problems += _shard_problems(folder / Path(row["name"]).name, row, manifest, table)
    return problems


def _header_problem(path: Path) -> InputError | None:
    try:
        read_header(path)
    except InputError as e:
        return e
    return None


def _shard_problems(path: Path, row: dict, manifest: dict, table: np.ndarray | None) -> list[str]:
    """What is wrong with one shard; `table` = bytes of each token, None if that is bad itself."""
    problem = _header_problem(path)
    if problem:
        return [str(problem)]
    tokens, vocab, _ = (int(x) for x in read_header(path)[2:5])
    if (tokens, vocab) != (row["tokens"], manifest["vocab"]):
        return [f"{path} has {tokens:,} tokens of {vocab:,}: {MANIFEST} says otherwise"]
    if sha256(path) != row["sha256"]:
        return [f"{path} is not the file that {MANIFEST} describes: its sha256 differs"]
    counts, first = _count_tokens(path)
    if counts[vocab:].any():
        return [f"{path} has tokens beyond its vocabulary of {vocab:,}"]
    if first != manifest["eot"] or counts[manifest["eot"]] != row["documents"]:
        return [f"{path} does not open {row['documents']:,} documents with end-of-text"]
    if table is not None and counts[:vocab] @ table.astype(np.int64) != row["text_bytes"]:
        return [f"{path} does not stand for {row['text_bytes']:,} bytes of text"]
    return []


def _count_tokens(path: Path) -> tuple[np.ndarray, int]:
    """How often each of 65,536 tokens occurs, and the first token; in pieces of 32 MB."""
    counts = np.zeros(65_536, np.int64)
    first = -1
    with path.open("rb") as f:
        f.seek(HEADER_BYTES)
        while raw := f.read(2**25):
            tokens = np.frombuffer(raw, "<u2")
            first = int(tokens[0]) if first < 0 else first
            counts += np.bincount(tokens, minlength=65_536)
    return counts, first
