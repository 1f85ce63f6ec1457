"""The demo's text: the same on every call, no module in two splits, no long line twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data import docstrings, shards

LINE = "a line of documentation that is certainly longer than forty characters, number {}"


def module(folder: Path, name: str, *texts: str) -> tuple[str, Path]:
    """A source file with a function for each docstring."""
    path = folder / f"{name}.py"
    path.write_text("".join(f"def f{i}():\n    {text!r}\n" for i, text in enumerate(texts)))
    return name, path


def long_text(start: int) -> str:
    return "\n".join(LINE.format(i) for i in range(start, start + 4))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, docstrings.build(folder, 400_000)


def test_the_folder_is_whole_and_below_the_cap(built):
    folder, about = built
    assert shards.verify(folder) == []
    assert 300_000 < sum(about["bytes"].values()) <= 400_000
    manifest = shards.read_manifest(folder)
    assert {row["split"]: row["text_bytes"] for row in manifest["files"]} == about["bytes"]
    assert about["bytes"]["train"] > 4 * about["bytes"]["val"] > 0 < about["bytes"]["dev"]


def test_it_is_the_same_every_time(built, tmp_path):
    folder, about = built
    assert docstrings.build(tmp_path / "again", 400_000) == about
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_second_call_reads_the_cache(built, monkeypatch):
    folder, about = built
    monkeypatch.setattr(docstrings, "source_files", lambda: pytest.fail("read sources again"))
    assert docstrings.build(folder, 400_000) == about


def test_a_damaged_cache_is_made_again(built, tmp_path):
    _, about = built
    assert docstrings.build(tmp_path, 400_000) == about
    path = tmp_path / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert docstrings.build(tmp_path, 400_000) == about
    assert shards.verify(tmp_path) == []


def test_other_tokens_are_not_overwritten(tmp_path):
    (tmp_path / shards.MANIFEST).write_text("{}")
    with pytest.raises(shards.InputError, match="already holds"):
        docstrings.build(tmp_path, 400_000)
    assert (tmp_path / shards.MANIFEST).read_text() == "{}"


def test_whole_modules_and_all_libraries(built):
    files = docstrings.source_files()
    assert [name for name, _ in files] == list(dict(files))
    found = docstrings.collect(files, 400_000)
    modules = {split: {name for name, _ in rows} for split, rows in found.items()}
    assert not modules["train"] & modules["val"] and not modules["train"] & modules["dev"]
    assert not modules["val"] & modules["dev"]
    assert {split: len(names) for split, names in modules.items()} == built[1]["modules"]
    everything = set().union(*modules.values())
    for library in docstrings.LIBRARIES:
        if any(name.startswith(f"{library}.") for name, _ in files):
            assert any(name.startswith(f"{library}.") for name in everything)
    assert any(name.partition(".")[0] in sys.stdlib_module_names for name in everything)


def test_a_split_is_about_a_twentieth():
    splits = [docstrings.split_of(f"package.module{i}") for i in range(4_000)]
    assert 150 < splits.count("val") < 250 and 150 < splits.count("dev") < 250


def test_no_long_line_comes_twice(built):
    tokens = np.concatenate([shards.read_tokens(p) for p in sorted(built[0].glob("*_0*.bin"))])
    text = "".join(map(chr, np.where(tokens == shards.BYTES.eot, 10, tokens).tolist()))
    lines = [line.strip() for line in text.split("\n")]
    long = [line for line in lines if len(line) >= docstrings.LONG_LINE]
    assert len(long) == len(set(long)) > 1_000


def test_short_repeated_and_unclean_texts_are_left_out(tmp_path):
    files = [
        module(tmp_path, "a", long_text(0), "short", long_text(0)),
        module(tmp_path, "b", long_text(0) + "\n" + long_text(10)),
        module(tmp_path, "c", long_text(20) + "\x00", long_text(30) + "\ud800"),
    ]
    (tmp_path / "d.py").write_text("def broken(:\n")
    files += [("d", tmp_path / "d.py"), ("e", tmp_path / "none.py")]
    found = docstrings.collect(files, 10_000)
    texts = sorted(text for rows in found.values() for _, text in rows)
    assert texts == [long_text(0), long_text(10)]


def test_the_cap_is_never_passed(tmp_path):
    files = [module(tmp_path, f"m{i}", long_text(10 * i)) for i in range(20)]
    size = len(long_text(0))
    for cap in (size - 1, 3 * size + 60):
        found = docstrings.collect(files, cap)
        assert sum(len(text) for rows in found.values() for _, text in rows) <= cap


def test_too_little_text_is_told(tmp_path):
    with pytest.raises(shards.InputError, match="too few docstrings"):
        docstrings.build(tmp_path, 1_000)
    assert not (tmp_path / shards.MANIFEST).exists()


def test_baselines_are_in_order(built):
    about = built[1]
    assert about["xz"]["conditioned"] < about["xz"]["alone"] < about["bigram"] < 8
    assert about["gzip"]["conditioned"] <= about["gzip"]["alone"]


def test_the_bigram_against_counting_by_hand():
    train = shards.byte_tokens(["ab" * 500]).tokens
    val = shards.byte_tokens(["abab"]).tokens
    pairs = {"256a": 1, "ab": 500, "ba": 499}
    alone = {"a": (500 + 1 / 256) / 1_001, "b": (500 + 1 / 256) / 1_001}
    p = [
        (pairs["256a"] + 8 * alone["a"]) / (1 + 8),
        (pairs["ab"] + 8 * alone["b"]) / (500 + 8),
        (pairs["ba"] + 8 * alone["a"]) / (499 + 8),
        (pairs["ab"] + 8 * alone["b"]) / (500 + 8),
    ]
    assert docstrings._bigram(train, val) == pytest.approx(-np.log2(p).mean(), rel=1e-12)


def test_the_command_prints_a_digest(built, capsys):
    folder, about = built
    assert docstrings.main(["--out", str(folder), "--max-bytes", "400000"]) == 0
    shown = capsys.readouterr().out
    assert about["sha256"] in shown and "bigram" in shown
    assert json.loads((folder / docstrings.ABOUT).read_text()) == about
