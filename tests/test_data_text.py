"""Tokenising text: what goes in comes out, whole or not at all, on any number of cores."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents, encode, get, shards
from data.shards import Batch, CorpusWriter, InputError

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "The cat sat on the mat.\n",
    "  Zwei Wörter, 三 words, <|endoftext|> as text — and 🙂.",
    "x",
    "the the\n\nthe\tthe " * 50,
]


def open_text() -> Path:
    """The folder with text/ and tokenizer/ that OPEN_TEXT_DIR or a sibling of the clone holds."""
    folder = Path(os.environ.get("OPEN_TEXT_DIR") or ROOT.parent / "shared" / "data")
    if not (folder / "tokenizer" / "gpt2.tiktoken").is_file():
        pytest.skip("no tokenizer/gpt2.tiktoken: OPEN_TEXT_DIR names no folder that has it")
    return folder


@pytest.fixture
def small_tokenizer(tmp_path) -> Path:
    """A vocabulary of all bytes and a few merges, in tiktoken's format."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"at"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def jsonl(texts: list[str], **options) -> bytes:
    return "".join(json.dumps({"text": t}, **options) + "\n" for t in texts).encode()


def tokenise(*args: object) -> int:
    """`data text ...`, with one worker unless told; the exit status."""
    return get.main(["text", *map(str, args), *([] if "--workers" in args else ["--workers", "1"])])


def byte_texts(folder: Path, name: str = "train_000000.bin") -> list[str]:
    """The documents of a shard of bytes."""
    tokens = shards.read_tokens(folder / name)
    starts = np.flatnonzero(tokens == shards.BYTES.eot)
    parts = np.split(tokens, starts)
    assert len(parts[0]) == 0
    return [part[1:].astype(np.uint8).tobytes().decode() for part in parts[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---- What goes in comes out ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=12))
def test_byte_tokens_stand_for_the_text(texts):
    batch = shards.byte_tokens(texts)
    ends = np.cumsum(batch.lengths)
    parts = np.split(batch.tokens, ends[:-1]) if texts else []
    assert [bytes(part[1:].tolist()).decode() for part in parts] == texts
    assert all(part[0] == 256 for part in parts)
    assert batch.text_bytes.tolist() == [len(t.encode()) for t in texts]


def write_format(folder: Path, suffix: str) -> list[Path]:
    """TEXTS as files of one format."""
    pack = {
        "": bytes,
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": lambda data: pytest.importorskip("zstandard").compress(data),
    }
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = folder / "a.parquet"
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=3)
        return [path]
    kind, _, packed = suffix[1:].partition(".")
    packed = f".{packed}" if packed else ""
    if kind in ("txt", "md"):
        paths = [folder / f"{i}{suffix}" for i in range(len(TEXTS))]
        for path, text in zip(paths, TEXTS, strict=True):
            path.write_bytes(pack[packed](text.encode()))
        return paths
    path = folder / f"a{suffix}"
    path.write_bytes(pack[packed](jsonl(TEXTS)))
    return [path]


SUFFIXES = [
    *(f".{kind}{packed}" for kind in ("txt", "jsonl") for packed in ("", ".xz", ".gz", ".zst")),
    ".md",
    ".json",
    ".parquet",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_the_same_text(tmp_path, suffix):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    paths = write_format(source, suffix)
    assert tokenise(*paths, "--tokenizer", "bytes", "--out", out) == 0
    assert byte_texts(out) == TEXTS
    (row,) = shards.read_manifest(out)["files"]
    assert row["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert row["tokens"] == row["text_bytes"] + len(TEXTS)
    assert shards.verify(out) == []
    assert tokenise(source, "--tokenizer", "bytes", "--out", tmp_path / "folder") == 0
    assert contents(tmp_path / "folder") == contents(out)


def test_the_header_names_the_tokenizer(tmp_path, small_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[0])
    for tokenizer, fields in {"bytes": (257, 2), str(small_tokenizer): (261, 0)}.items():
        out = tmp_path / f"out{fields[1]}"
        assert tokenise(path, "--tokenizer", tokenizer, "--out", out) == 0
        header = shards.read_header(out / "train_000000.bin")
        assert header[:2].tolist() == [20240520, 1]
        assert tuple(header[3:5]) == fields and not header[5:].any()


def check_tiktoken(tokenizer: Path, out: Path, source: Path) -> None:
    """Decodes what was encoded with tiktoken's own decoder and with token_bytes."""
    source.write_bytes(jsonl(TEXTS))
    assert tokenise(source, "--tokenizer", tokenizer, "--out", out) == 0
    manifest = shards.read_manifest(out)
    tokens = shards.read_tokens(out / "train_000000.bin")
    loaded = encode.load_tokenizer(str(tokenizer))
    pieces = {rank: token for token, rank in loaded.ranks.items()}
    parts = np.split(tokens, np.flatnonzero(tokens == manifest["eot"]))[1:]
    assert [b"".join(pieces[t] for t in part[1:].tolist()).decode() for part in parts] == TEXTS
    table = np.fromfile(out / "token_bytes.bin", np.uint16)
    assert len(table) == manifest["vocab"] and table[manifest["eot"]] == 0
    assert table[tokens].sum() == sum(len(t.encode()) for t in TEXTS)
    assert shards.verify(out) == []


def test_a_tiktoken_file_round_trips(tmp_path, small_tokenizer):
    pytest.importorskip("tiktoken")
    check_tiktoken(small_tokenizer, tmp_path / "out", tmp_path / "a.jsonl")
    assert len(shards.read_tokens(tmp_path / "out" / "train_000000.bin")) < sum(map(len, TEXTS))


def test_gpt2_round_trips(tmp_path):
    pytest.importorskip("tiktoken")
    folder = open_text() / "tokenizer"
    check_tiktoken(folder, tmp_path / "out", tmp_path / "a.jsonl")
    manifest = shards.read_manifest(tmp_path / "out")
    assert (manifest["tokenizer"], manifest["vocab"], manifest["eot"]) == ("gpt2", 50_257, 50_256)
    loaded = encode.load_tokenizer(str(folder))
    assert loaded.encoder()(["Hello world"]).tokens.tolist() == [50_256, 15_496, 995]


def test_open_text_has_the_tokens_that_its_list_says(tmp_path):
    pytest.importorskip("tiktoken")
    folder = open_text()
    path = folder / "text" / "train_007.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the tokenizer")
    out = tmp_path / "out"
    assert tokenise(path, "--tokenizer", folder / "tokenizer", "--out", out, "--workers", 2) == 0
    (row,) = shards.read_manifest(out)["files"]
    assert (row["tokens"], row["documents"]) == (2_049_698, 1_621)


# ---- Shards, splits, workers --------------------------------------------------------------------


def test_workers_do_not_change_a_byte(tmp_path, small_tokenizer, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(documents, "PIECE_BYTES", 2_000)
    texts = [f"document {i}: " + "the cat at the mat " * (i % 37) for i in range(600)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(jsonl(texts[::-1])))
    made = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        args = (tmp_path / "a.jsonl", "--val", tmp_path / "b.jsonl.xz", "--shard-tokens", 9_000)
        options = ("--tokenizer", small_tokenizer, "--out", out, "--workers", workers)
        assert tokenise(*args, *options) == 0
        made.append(contents(out))
    assert made[0] == made[1] and len(made[0]) > 6


def test_a_file_opens_a_shard_and_single_documents_share_one(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "dev.jsonl"):
        (tmp_path / name).write_bytes(jsonl([f"text of {name}"] * 2))
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(name)
    paths = [tmp_path / name for name in ("b.jsonl", "a.jsonl", "1.txt", "2.txt")]
    out = tmp_path / "out"
    assert (
        tokenise(*paths, "--dev", tmp_path / "dev.jsonl", "--tokenizer", "bytes", "--out", out) == 0
    )
    rows = shards.read_manifest(out)["files"]
    names = ["train_000000.bin", "train_000001.bin", "train_000002.bin", "dev_000000.bin"]
    assert [row["name"] for row in rows] == names
    assert byte_texts(out, names[0]) == ["text of b.jsonl"] * 2
    assert byte_texts(out, names[2]) == ["1.txt", "2.txt"]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["dev"]


def test_documents_stay_whole_in_shards(tmp_path):
    texts = ["a" * 10, "b" * 10, "c" * 50, "d"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    out = tmp_path / "out"
    args = ("--tokenizer", "bytes", "--out", out, "--shard-tokens", 25)
    assert tokenise(tmp_path / "a.jsonl", *args) == 0
    held = [byte_texts(out, row["name"]) for row in shards.read_manifest(out)["files"]]
    assert held == [texts[:2], texts[2:3], texts[3:]]


def test_empty_documents_are_skipped_and_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(["one", "", " \n", "two"]))
    assert tokenise(tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "out") == 0
    assert byte_texts(tmp_path / "out") == ["one", "two"]
    assert "skipped 2 empty documents" in capsys.readouterr().out


def test_half_a_surrogate_pair_becomes_a_replacement(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude42"}')
    assert tokenise(tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "out") == 0
    assert byte_texts(tmp_path / "out") == ["a\ufffdb 🙂"]


def test_byte_order_marks_and_carriage_returns(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\r\n{"text": "three"}\r\n')
    out = tmp_path / "out"
    paths = (tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert tokenise(*paths, "--tokenizer", "bytes", "--out", out) == 0
    assert byte_texts(out) + byte_texts(out, "train_000001.bin") == ["one\r\n", "two", "three"]


def test_lines_are_joined_across_pieces_and_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    monkeypatch.setattr(documents, "READ_BYTES", 7)
    zstandard = pytest.importorskip("zstandard")
    texts = [f"{i} " * (i % 50) + "end" for i in range(120)]
    data = jsonl(texts, ensure_ascii=False)
    for name, packed in {
        "a.jsonl": data,
        "b.jsonl.xz": lzma.compress(data[:999]) + lzma.compress(data[999:]),
        "c.jsonl.gz": gzip.compress(data[:999]) + gzip.compress(data[999:]) + b"\0" * 9,
        "d.jsonl.zst": zstandard.compress(data[:999]) + zstandard.compress(data[999:]),
    }.items():
        (tmp_path / name).write_bytes(packed)
        out = tmp_path / f"out-{name}"
        assert tokenise(tmp_path / name, "--tokenizer", "bytes", "--out", out) == 0
        assert byte_texts(out) == texts


# ---- Bad input ----------------------------------------------------------------------------------


def bad_file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


GOOD = jsonl(["a good line"])
BAD_FILES = {
    "not-json.jsonl": (GOOD + b"{broken\n", ", line 2 is not JSON"),
    "list.jsonl": (GOOD + b"[1]\n", ", line 2 is JSON but no object"),
    "key.jsonl": (GOOD + b'{"body": "x"}\n', ", line 2 has no key 'text' (it has: body)"),
    "number.jsonl": (GOOD + b'{"text": 7}\n', ", line 2: 'text' is int, not text"),
    "latin.jsonl": (GOOD + b'{"text": "\xe9t\xe9"}\n', ", line 2 is not UTF-8"),
    "latin.txt": (b"one\ntwo \xe9\n", "is not UTF-8: byte 8 (line 2 of it) is 0xe9"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 99)[:-20], "is cut: it ends inside its .xz stream"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-4], "is cut: it ends inside its .gz stream"),
    "empty.jsonl.gz": (b"", "is cut"),
    "zeros.jsonl.xz": (bytes(1_000), "is damaged"),
    "noise.jsonl.xz": (GOOD, "is damaged"),
    "noise.jsonl.gz": (GOOD, "is damaged"),
    "noise.parquet": (GOOD, "is no parquet file or is damaged"),
    "notes.docx": (GOOD, "is of no known format"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_nothing_is_written(tmp_path, capsys, name):
    data, sentence = BAD_FILES[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    good, bad = bad_file(tmp_path, "good.jsonl", GOOD), bad_file(tmp_path, name, data)
    out = tmp_path / "out"
    assert tokenise(good, bad, "--tokenizer", "bytes", "--out", out) == 2
    error = capsys.readouterr().err
    assert sentence in error and str(bad) in error and error.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_cut_and_damaged_zst(tmp_path, capsys):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(os.urandom(50_000).hex().encode())
    for data, sentence in ((packed[:-100], "ends inside its .zst stream"), (GOOD, "is damaged")):
        path = bad_file(tmp_path, "a.jsonl.zst", data)
        assert tokenise(path, "--tokenizer", "bytes", "--out", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err


def test_bad_columns(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    for table, sentence in (
        ({"body": ["x"]}, "has no column 'text' (it has body)"),
        ({"text": [1]}, "column 'text' is int64, not text"),
        ({"text": ["x", None]}, "row 2: 'text' is null"),
    ):
        pq.write_table(pa.table(table), path)
        assert tokenise(path, "--tokenizer", "bytes", "--out", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
    pq.write_table(pa.table({"body": ["x"]}), path)
    args = ("--tokenizer", "bytes", "--out", tmp_path / "out", "--text-key", "body")
    assert tokenise(path, *args) == 0 and byte_texts(tmp_path / "out") == ["x"]


def test_the_first_bad_line_is_told_whatever_the_workers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    lines = [b'{"text": "%d"}' % i for i in range(400)]
    lines[50] = lines[300] = b"{"
    path = bad_file(tmp_path, "a.jsonl.gz", gzip.compress(b"\n".join(lines))[:-8])
    for workers in (1, 2):
        args = ("--tokenizer", "bytes", "--out", tmp_path / "out", "--workers", workers)
        assert tokenise(path, *args) == 2
        assert "line 51 is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"YQ== 0\nnonsense\n", "line 2 is not `base64 rank`"),
        (b"YQ== 0\nYg== 5\n", "is no vocabulary"),
        (b"", "is no vocabulary"),
        (None, "cannot read the tokenizer"),
    ],
)
def test_bad_tokenizers(tmp_path, capsys, data, sentence):
    good, path = bad_file(tmp_path, "a.jsonl", GOOD), tmp_path / "a.tiktoken"
    if data is not None:
        path.write_bytes(data)
    assert tokenise(good, "--tokenizer", path, "--out", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err


def test_gpt2_offline_says_what_to_pass(tmp_path, capsys, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    good = bad_file(tmp_path, "a.jsonl", GOOD)
    assert tokenise(good, "--tokenizer", "gpt2", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--tokenizer FILE" in error and "--tokenizer bytes" in error


def test_a_missing_library_is_one_sentence(tmp_path, capsys, monkeypatch, small_tokenizer):
    for name in ("tiktoken", "zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, tokenizer in (
        ("a.jsonl", str(small_tokenizer)),
        ("a.jsonl.zst", "bytes"),
        ("a.parquet", "bytes"),
    ):
        path = bad_file(tmp_path, name, GOOD)
        assert tokenise(path, "--tokenizer", tokenizer, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "pip install" in error and error.count("\n") == 1


def test_paths_that_cannot_be_used(tmp_path, capsys):
    good, out = bad_file(tmp_path, "a.jsonl", GOOD), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for paths, sentence in (
        ([tmp_path / "none.txt"], f"no file or folder {tmp_path / 'none.txt'}"),
        ([tmp_path / "empty"], "holds no file that ends in"),
        ([good, good], "is given twice: for train and for train"),
        ([good, "--val", tmp_path / "empty" / ".." / "a.jsonl"], "for train and for val"),
        ([bad_file(tmp_path, "blank.txt", b" \n")], "no document to train on"),
    ):
        assert tokenise(*paths, "--tokenizer", "bytes", "--out", out) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not list(out.iterdir())


@pytest.mark.parametrize("flag", [("--workers", "0"), ("--shard-tokens", "-1"), ("--workers", "x")])
def test_bad_numbers_are_refused(tmp_path, flag):
    with pytest.raises(SystemExit) as stopped:
        tokenise(tmp_path, "--tokenizer", "bytes", "--out", tmp_path / "out", *flag)
    assert stopped.value.code == 2


def test_old_shards_go_only_when_told(tmp_path, capsys):
    one, two = bad_file(tmp_path, "1.jsonl", GOOD * 5), bad_file(tmp_path, "2.jsonl", GOOD)
    bad, out = bad_file(tmp_path, "3.jsonl", b"{"), tmp_path / "out"
    args = ("--tokenizer", "bytes", "--out", out)
    assert tokenise(one, two, *args) == 0
    before = contents(out)
    assert tokenise(two, *args) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tokenise(two, bad, *args, "--overwrite") == 2
    assert contents(out) == before
    assert tokenise(two, *args, "--overwrite") == 0
    assert sorted(contents(out)) == ["manifest.json", "token_bytes.bin", "train_000000.bin"]
    assert shards.verify(out) == []


# ---- Whole or absent ----------------------------------------------------------------------------


def write(folder: Path, texts: list[str], **options) -> None:
    table = shards.byte_token_bytes()
    with CorpusWriter(folder, shards.BYTES, table, **options) as writer:
        for split in ("train", "val"):
            writer.begin(split)
            writer.add(shards.byte_tokens(texts))
        writer.commit()


def test_no_name_is_final_before_the_end(tmp_path):
    table = shards.byte_token_bytes()
    with CorpusWriter(tmp_path, shards.BYTES, table, shard_tokens=10) as writer:
        for _ in range(3):
            writer.add(shards.byte_tokens(["some text"]))
            assert all(p.suffix == ".tmp" for p in tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []  # left without commit


KILLED = """
import os, signal, sys
from pathlib import Path
from data import shards
calls, replace = int(sys.argv[2]), Path.replace
def dying(self, target):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
table = shards.byte_token_bytes()
with shards.CorpusWriter(Path(sys.argv[1]), shards.BYTES, table, overwrite=True) as writer:
    for split in ("train", "val"):
        writer.begin(split)
        writer.add(shards.byte_tokens(["new"]))
    writer.commit()
"""


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_leaves_whole_shards_and_no_lying_manifest(tmp_path, renames):
    write(tmp_path, ["old text"])
    (tmp_path / "train_000000.bin.tmp").write_bytes(b"of an earlier kill")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(renames)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert done.returncode == (0 if renames == 4 else -signal.SIGKILL), done.stderr
    for path in tmp_path.glob("*_*.bin"):
        if path.name != shards.TOKEN_BYTES:
            assert byte_texts(tmp_path, path.name) == ["new"]
    if (tmp_path / shards.MANIFEST).exists():
        assert renames == 4 and shards.verify(tmp_path) == []
    write(tmp_path, ["newer"], overwrite=True)
    assert shards.verify(tmp_path) == [] and not list(tmp_path.glob("*.tmp"))


def test_a_batch_is_cut_only_between_documents(tmp_path):
    with CorpusWriter(tmp_path, shards.BYTES, shards.byte_token_bytes(), shard_tokens=7) as writer:
        writer.add(shards.byte_tokens(["ab", "cd", "ef"]))
        writer.add(Batch(np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.int64)))
        writer.add(shards.byte_tokens(["g"]))
        rows = writer.commit()["files"]
    assert [row["documents"] for row in rows] == [2, 2]
    assert byte_texts(tmp_path, "train_000001.bin") == ["ef", "g"]


# ---- Checking -----------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": (lambda p: flip(p, 1024 + 5), "sha256 differs"),
    "a wrong magic": (lambda p: flip(p, 0), "no magic"),
    "a wrong count": (lambda p: flip(p, 8), "cut or padded"),
    "a wrong vocabulary": (lambda p: flip(p, 12), "says otherwise"),
    "a cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut or padded"),
    "no header": (lambda p: p.write_bytes(b"x"), "no token shard"),
    "no file": (lambda p: p.unlink(), "cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds(tmp_path, capsys, damage):
    write(tmp_path, ["some text", "more"])
    assert get.main(["verify", str(tmp_path)]) == 0
    act, sentence = DAMAGE[damage]
    act(tmp_path / "val_000000.bin")
    (problem,) = shards.verify(tmp_path)
    assert sentence in problem and str(tmp_path / "val_000000.bin") in problem
    capsys.readouterr()
    assert get.main(["verify", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("sha256", "0" * 64, "sha256 differs"),
        ("tokens", 3, "says otherwise"),
        ("documents", 7, "does not open 7 documents"),
        ("text_bytes", 99, "does not stand for 99 bytes"),
    ],
)
def test_verify_finds_a_manifest_that_lies(tmp_path, key, value, sentence):
    write(tmp_path, ["some text", "more"])
    path = tmp_path / shards.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][0][key] = value
    path.write_text(json.dumps(manifest))
    (problem,) = shards.verify(tmp_path)
    assert sentence in problem


def test_verify_of_damaged_and_foreign_folders(tmp_path, capsys):
    assert get.main(["verify", str(tmp_path)]) == 2
    assert "holds no shards" in capsys.readouterr().err
    write(tmp_path, ["some text"])
    (tmp_path / shards.TOKEN_BYTES).write_bytes(b"\1\0")
    assert "token_bytes.bin is not uint16 [257]" in shards.verify(tmp_path)[0]
    (tmp_path / shards.MANIFEST).write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        shards.verify(tmp_path)
    (tmp_path / shards.MANIFEST).unlink()
    assert shards.verify(tmp_path) == []
    flip(tmp_path / "train_000000.bin", 0)
    assert "no magic" in shards.verify(tmp_path)[0]


# ---- The command --------------------------------------------------------------------------------


def test_the_command_runs_from_anywhere(tmp_path):
    path = bad_file(tmp_path, "a.jsonl", jsonl(TEXTS))
    command = [sys.executable, str(ROOT / "data" / "get.py")]
    args = ["text", str(path), "--tokenizer", "bytes", "--out", "out", "--workers", "2"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*command, *args], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert byte_texts(tmp_path / "out") == TEXTS
    assert "train: " in done.stdout and "Traceback" not in done.stderr
    shown = subprocess.run([*command, "text", "--help"], check=False, **options)
    assert shown.returncode == 0 and "--shard-tokens" in shown.stdout
