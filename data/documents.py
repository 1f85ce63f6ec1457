"""Reading documents out of files, in order, in pieces that other processes can parse.

Formats: .txt and .md are one document each; .jsonl and .json have one JSON object a line; these may
end in .xz, .gz or .zst too; .parquet has a text column. Memory is bounded by the piece (about 1
MB) and by the longest document, whatever the size of a file.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.shards import InputError

PIECE_BYTES = 1 << 20
READ_BYTES = 1 << 16  # compressed bytes at a time: some streams expand a thousandfold
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".json")
PACKED_SUFFIXES = (".xz", ".gz", ".zst")
FORMATS = ".txt, .md, .jsonl, .json (each also .xz, .gz, .zst) or .parquet"

Kind = Literal["text", "lines", "rows"]


@dataclass(frozen=True)
class Piece:
    """Some consecutive documents of a file, not yet parsed."""

    path: Path
    kind: Kind  # text: one document; lines: JSON lines; rows: a list of documents
    data: bytes | list[bytes]
    first: int  # number of the first line or row, from 1
    read: int  # bytes of the file read so far, for progress


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by its name; None if it is of no known format."""
    if path.suffix == ".parquet":
        return "rows"
    suffix = Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix
    if suffix in TEXT_SUFFIXES:
        return "text"
    return "lines" if suffix in LINE_SUFFIXES else None


def find(paths: list[str]) -> list[Path]:
    """The files that the paths name, folders expanded in sorted order.

    InputError for what is missing, of unknown format, or an empty folder.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
            if not inside:
                raise InputError(f"the folder {path} holds no file that ends in {FORMATS}")
            files += inside
        elif not path.is_file():
            raise InputError(f"no file or folder {path}")
        elif not kind_of(path):
            raise InputError(f"{path} is of no known format: its name must end in {FORMATS}")
        else:
            files.append(path)
    return files


def pieces(path: Path, text_key: str) -> Iterator[Piece]:
    """A file in pieces, in order; InputError if it cannot be read or decompressed."""
    kind = kind_of(path)
    try:
        if kind == "rows":
            yield from _rows(path, text_key)
        elif kind == "lines":
            yield from _lines(path)
        else:
            data = b"".join(part for part, _ in _decompressed(path))
            yield Piece(path, "text", data, 1, path.stat().st_size)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from None


def _lines(path: Path) -> Iterator[Piece]:
    """Pieces of whole lines, about PIECE_BYTES each."""
    held: list[bytes] = []
    size, first, read = 0, 1, 0
    for part, read in _decompressed(path):
        size += len(part)
        cut = part.rfind(b"\n") + 1
        if size < PIECE_BYTES or not cut:
            held.append(part)
            continue
        data = b"".join([*held, part[:cut]])
        yield Piece(path, "lines", data, first, read)
        first += data.count(b"\n")
        held, size = [part[cut:]], len(part) - cut
    if size:
        yield Piece(path, "lines", b"".join(held), first, read)


def _decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes of content, bytes of the file read so far); checks that the stream is whole."""
    unpacker, error = _unpacker(path)
    with path.open("rb") as f:
        if unpacker is None:
            while part := f.read(PIECE_BYTES):
                yield part, f.tell()
            return
        stream = unpacker()
        while part := f.read(READ_BYTES):
            while part:
                if stream.eof:  # another stream may follow; padding of zeros is none
                    part = part.lstrip(b"\0")
                    if not part:
                        break
                    stream = unpacker()
                try:
                    data = stream.decompress(part)
                except error as e:
                    raise InputError(f"{path} is damaged: {e}; fetch it again") from None
                yield data, f.tell()
                part = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise InputError(f"{path} is cut: it ends inside its {path.suffix} stream; fetch it again")


def _unpacker(path: Path) -> tuple:
    """What makes a decompressor for the file's suffix, and the error it raises."""
    if path.suffix == ".xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError
    if path.suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if path.suffix != ".zst":
        return None, None
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path} needs zstandard: pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def _rows(path: Path, text_key: str) -> Iterator[Piece]:
    """Pieces of a parquet file's text column."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install pyarrow") from None
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                names = ", ".join(schema.names)
                raise InputError(f"{path} has no column {text_key!r} (it has {names}): --text-key")
            kind = schema.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column {text_key!r} is {kind}, not text")
            first, total = 1, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(256, columns=[text_key]):
                column = batch.column(0)
                if column.null_count:
                    row = first + column.is_null().to_pylist().index(True)
                    raise InputError(f"{path}, row {row}: {text_key!r} is null, not text")
                rows = column.cast(pa.large_binary()).to_pylist()
                last = first + len(rows)
                yield Piece(path, "rows", rows, first, size * (last - 1) // total)
                first = last
    except pa.ArrowException as e:
        raise InputError(f"{path} is no parquet file or is damaged: {e}") from None


# ---- Parsing ------------------------------------------------------------------------------------


def texts(piece: Piece, text_key: str) -> Iterator[str]:
    """The documents of a piece; InputError names the file and the line that is bad."""
    if piece.kind == "text":
        yield _decode(piece.data, f"{piece.path}").removeprefix("\ufeff")
    elif piece.kind == "rows":
        for row, data in enumerate(piece.data, piece.first):
            yield _decode(data, f"{piece.path}, row {row}")
    else:
        for number, line in enumerate(piece.data.split(b"\n"), piece.first):
            if line and not line.isspace():
                yield _text_of_line(line, text_key, f"{piece.path}, line {number}")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise InputError(
            f"{where} is not UTF-8: byte {e.start} (line {line} of it) is 0x{data[e.start]:02x}"
        ) from None


def _text_of_line(line: bytes, text_key: str, where: str) -> str:
    try:
        record = json.loads(_decode(line, where).removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as e:
        raise InputError(f"{where} is not JSON: {e}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} is JSON but no object: one object a line is needed")
    if text_key not in record:
        names = ", ".join(record) or "none"
        raise InputError(f"{where} has no key {text_key!r} (it has: {names}): see --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: {text_key!r} is {type(text).__name__}, not text")
    return text
