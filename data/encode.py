"""From files of text to token shards, on all cores; the output does not depend on their number."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import documents
from data.documents import Piece
from data.shards import (
    BYTES,
    GPT2,
    Batch,
    CorpusWriter,
    InputError,
    Vocab,
    byte_token_bytes,
    byte_tokens,
)

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
AHEAD = 4  # pieces in flight for each worker: bounds memory


# ---- Tokenizers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and, for byte-pair encodings, the rank of each token's bytes."""

    vocab: Vocab
    ranks: dict[bytes, int] | None = None

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, uint16 [vocab]; 0 for end-of-text."""
        if self.ranks is None:
            return byte_token_bytes()
        table = np.zeros(self.vocab.size, np.uint16)
        for piece, rank in self.ranks.items():
            table[rank] = len(piece)
        return table

    def encoder(self) -> Callable[[list[str]], Batch]:
        """A function from documents to tokens; special tokens inside a text are text."""
        if self.ranks is None:
            return byte_tokens
        encoding = _tiktoken().Encoding(
            self.vocab.name,
            explicit_n_vocab=self.vocab.size,
            pat_str=GPT2_SPLIT,
            mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": self.vocab.eot},
        )

        def encode(texts: list[str]) -> Batch:
            rows = [[self.vocab.eot, *encoding.encode_ordinary(text)] for text in texts]
            lengths = np.array([len(row) for row in rows], np.int64)
            tokens = np.empty(int(lengths.sum()), np.uint16)
            for row, end in zip(rows, np.cumsum(lengths), strict=True):
                tokens[end - len(row) : end] = row
            return Batch(tokens, lengths, np.array([len(t.encode()) for t in texts], np.int64))

        return encode


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, `gpt2` (fetched by tiktoken), or a tiktoken file or a folder that holds one.

    A file has lines `base64(bytes) rank`; GPT-2's is known by its digest, any other is taken with
    GPT-2's rule for splitting words and end-of-text as its last token. InputError if it is bad.
    """
    if name == "bytes":
        return Tokenizer(BYTES)
    if name == "gpt2":
        return Tokenizer(GPT2, _fetched_ranks())
    path = Path(name)
    if path.is_dir():
        inside = sorted(path.glob("*.tiktoken"))
        if len(inside) != 1:
            raise InputError(f"the folder {path} holds {len(inside)} .tiktoken files, not one")
        path = inside[0]
    try:
        return _parsed(path.read_bytes(), path)
    except OSError as e:
        raise InputError(
            f"cannot read the tokenizer {path}: {e.strerror}; "
            "--tokenizer takes a tiktoken file, a folder with one, gpt2 or bytes"
        ) from None


def _parsed(raw: bytes, path: Path) -> Tokenizer:
    ranks = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"{path}, line {number} is not `base64 rank`") from None
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"{path} is no vocabulary: ranks must be 0 to n - 1, every byte a token")
    if n >= 2**16:
        raise InputError(f"{path} has {n:,} tokens: a shard holds at most 65,536, end-of-text too")
    lines = [base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=_rank)]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    if digest == GPT2_SHA256:
        return Tokenizer(GPT2, ranks)
    return Tokenizer(Vocab(f"tiktoken-{digest[:8]}", n + 1, n, 0), ranks)


def _rank(item: tuple[bytes, int]) -> int:
    return item[1]


def _fetched_ranks() -> dict[bytes, int]:
    tiktoken = _tiktoken()
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # requests' errors; tiktoken's own for a bad digest
        raise InputError(
            f"tiktoken cannot fetch GPT-2's vocabulary ({type(e).__name__}): offline, pass "
            "--tokenizer FILE with a gpt2.tiktoken, or --tokenizer bytes"
        ) from None
    return {encoding.decode_single_token_bytes(i): i for i in range(GPT2.eot)}


def _tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise InputError(
            "this tokenizer needs tiktoken: pip install tiktoken (or --tokenizer bytes)"
        ) from None
    return tiktoken


# ---- Workers ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A piece of a file as tokens."""

    path: Path
    read: int  # bytes of the file read so far
    batch: Batch
    empty: int  # documents without text, skipped


class PieceEncoder:
    """Parses and tokenises pieces; a worker process holds one."""

    def __init__(self, tokenizer: Tokenizer, text_key: str):
        self.encode, self.text_key = tokenizer.encoder(), text_key

    def __call__(self, piece: Piece) -> Encoded:
        found = [_whole(text) for text in documents.texts(piece, self.text_key)]
        kept = [text for text in found if text and not text.isspace()]
        return Encoded(piece.path, piece.read, self.encode(kept), len(found) - len(kept))


def _whole(text: str) -> str:
    """JSON can escape half a surrogate pair, which no UTF-8 holds: U+FFFD stands for it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_worker: PieceEncoder  # of this process, set when the pool starts it


def _start_worker(tokenizer: Tokenizer, text_key: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = PieceEncoder(tokenizer, text_key)


def _end_with_parent() -> None:
    """A killed parent closes no queue: without this its workers would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(piece: Piece) -> Encoded:
    return _worker(piece)


def encoded(
    pieces: Iterator[Piece], tokenizer: Tokenizer, text_key: str, workers: int
) -> Iterator[Encoded]:
    """Every piece as tokens, in order, whatever the number of processes.

    InputError of the first piece that is bad, in the order of the pieces.
    """
    if workers == 1:
        yield from map(PieceEncoder(tokenizer, text_key), pieces)
        return
    # spawn: a forked child of a process with threads (torch, in a test) can hang.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, text_key),
    )
    waiting: deque[Future] = deque()
    failure = None
    try:
        try:
            for piece in pieces:
                waiting.append(pool.submit(_run_in_worker, piece))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
        except InputError as e:
            failure = e  # what was read before it may be worse, and comes first
        while waiting:
            yield waiting.popleft().result()
        if failure:
            raise failure
    except BrokenProcessPool:
        raise InputError(
            "a worker process died, perhaps for lack of memory: try a smaller --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- The whole job ------------------------------------------------------------------------------


def write_corpus(
    sources: dict[str, list[Path]],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    overwrite: bool = False,
    on_piece: Callable[[Encoded], None] = lambda piece: None,
) -> dict:
    """Tokenises the files of each split into a folder of shards; its manifest.

    Each file of many documents opens a new shard; files that are one document share shards.
    InputError if anything is bad; then the folder is as it was.
    """
    _refuse_repeats(sources)
    jobs = [(split, path) for split, paths in sources.items() for path in paths]
    splits = {path: split for split, path in jobs}
    pieces = (piece for _, path in jobs for piece in documents.pieces(path, text_key))
    table = tokenizer.token_bytes()
    options = {"shard_tokens": shard_tokens, "overwrite": overwrite}
    with CorpusWriter(folder, tokenizer.vocab, table, **options) as writer:
        open_for = None
        stream = encoded(pieces, tokenizer, text_key, workers)
        with contextlib.closing(stream):
            for piece in stream:
                split, single = splits[piece.path], documents.kind_of(piece.path) == "text"
                wanted = (split, None if single else piece.path)
                if wanted != open_for:
                    writer.begin(split)
                    open_for = wanted
                writer.add(piece.batch)
                on_piece(piece)
        return writer.commit()


def _refuse_repeats(sources: dict[str, list[Path]]) -> None:
    """A file in two splits would be trained on and tested with; twice in one, counted twice."""
    seen: dict[Path, str] = {}
    for split, paths in sources.items():
        for path in paths:
            key = path.resolve()
            if key in seen:
                raise InputError(f"{path} is given twice: for {seen[key]} and for {split}")
            seen[key] = split
