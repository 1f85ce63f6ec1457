"""Every command refuses what it cannot use: one sentence that names all that is wrong, exit code 2,
nothing written, no traceback. Flags of train_gpt.py alone stand in test_config.py; here are the
files, folders and commands around them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import helpers as H
import numpy as np
import pytest

from data import get, shards
from evals import sample
from variants import gpt2

T = H.T


def ramp(n: int, most: int = 250) -> np.ndarray:
    return np.arange(n) % most


def write_good(folder: Path, **splits) -> Path:
    """A corpus that can be trained on, but for the splits that are given."""
    good = {"train": ramp(3000), "dev": ramp(300), "val": ramp(300)}
    return H.write_corpus(folder, {k: [tokens] for k, tokens in {**good, **splits}.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a good corpus `good`, a run `runs/r`, and whatever the tables below damage."""
    root = tmp_path_factory.mktemp("bad")
    write_good(root / "good")
    cfg = H.tiny(root / "good", root / "runs", save_final=True, run_id="r", tokens=512, looks=0)
    T.train(cfg)
    (root / "a.txt").write_text("Some text to train on.\n")
    return root


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `root` with its size and time of change."""
    found = {str(p): p.lstat() for p in root.rglob("*")}
    return {name: (s.st_size, s.st_mtime_ns) for name, s in found.items()}


def refusal(main, argv: list, place: Path, capsys, monkeypatch) -> str:
    """What `main` says as it refuses `argv`, run in an empty folder of `place`."""
    (place / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(place / "cwd")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's cache of a loaded arm
    before = listing(place)
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert listing(place) == before, "nothing is written"
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


# ---- train_gpt.py -------------------------------------------------------------------------------


def train_argv(place: Path, *more, data="good") -> list[str]:
    base = H.tiny_argv(place / data, place / "runs", tokens=512, looks=0)
    return [*base, *map(str, more)]


@pytest.mark.parametrize(
    "more, parts",
    [
        (["--out", "{}/a.txt"], ["--out", "a.txt is no folder"]),
        (["--out", "{}/a.txt/runs"], ["--out", "a.txt is no folder"]),
        (["--run-id", ".."], ["--run-id '..'"]),
        (["--run-id", "."], ["--run-id '.'"]),
        (["--data", "{}/a.txt"], ["no folder of tokens", "a.txt"]),
        (["--dev", "{}/nowhere.bin"], ["nowhere.bin"]),
        (["--dev", "{}/good"], ["good"]),
        (["--dev", "{}/a.txt"], ["a.txt is no token shard"]),
        (["--dev", "{}/good/tokens_train_000000.bin"], ["--dev", "the only train shard"]),
        (["--resume", "{}/nowhere"], ["nowhere holds no whole checkpoint"]),
        (["--resume", "{}/a.txt"], ["a.txt holds no whole checkpoint"]),
        (["--vocab", "256"], ["--vocab 256", "257"]),
        (["--passes", "0", "--tokens", "0"], ["too few tokens"]),
        (["--arm", "{}/syntax.py:A"], ["syntax.py cannot be imported", "line 2"]),
        (["--arm", "{}/imports.py:A"], ["imports.py cannot be imported", "no_such_package"]),
        (["--arm", "{}/number.py:A"], ["number.py has no class 'A'"]),
        (["--seed", 10**400], ["--seed"]),
        (["--lambda-bias", "nan"], ["--lambda-bias"]),
        (["--backout", "-2"], ["--backout"]),
        (["--stages", "1:256:nan:128"], ["--stages", "nan"]),
        (["--stages", "2:256:1:128+-1:256:1:128"], ["--stages"]),
        (["--looks=--"], ["--looks"]),
        (
            ["--arm", "softmax,colour=red", "--looks", "99", "--keep", "0", "--mlp", "x"],
            ["colour=red", "--looks 99", "--keep", "--mlp 'x'"],
        ),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if v and str(v[0]).startswith("--") else "",
)
def test_train(more, parts, place, capsys, monkeypatch):
    (place / "syntax.py").write_text("import os\ndef (:\n")
    (place / "imports.py").write_text("import no_such_package\n")
    (place / "number.py").write_text("A = 3\n")
    argv = train_argv(place, *(str(m).replace("{}", str(place)) for m in more))
    said = refusal(T.main, argv, place, capsys, monkeypatch)
    assert said.startswith("train_gpt.py: ")
    for part in parts:
        assert part in said


def manifest_with(**values):
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def shards_with(**splits):
    return lambda folder: write_good(folder, **splits)


def by_others(folder: Path) -> None:
    """No manifest: GPT-2 tokens are taken for granted, and these are another tokenizer's."""
    for path in folder.iterdir():
        path.unlink()
    H.write_shard(folder / "their_train_0.bin", 60_000 + ramp(3000))
    H.write_shard(folder / "their_val_0.bin", ramp(300))


DATA = {
    "no UTF-8": (
        lambda f: (f / "manifest.json").write_bytes(b"\x80{}"),
        "manifest.json is damaged",
    ),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "vocab in words": (manifest_with(vocab="many"), "manifest.json is damaged"),
    "vocab of 0": (manifest_with(vocab=0), "manifest.json is damaged"),
    "vocab for no uint16": (manifest_with(vocab=10**9), "manifest.json is damaged"),
    "eot beyond vocab": (manifest_with(eot=257), "manifest.json is damaged"),
    "no files": (manifest_with(files=None), "manifest.json is damaged"),
    "a number for a row": (manifest_with(files=[3]), "manifest.json is damaged"),
    "short token_bytes": (lambda f: (f / "token_bytes.bin").write_bytes(b"12"), "token_bytes.bin"),
    "odd token_bytes": (lambda f: (f / "token_bytes.bin").write_bytes(b"1" * 515), "token_bytes"),
    "no train token": (shards_with(train=[]), "too few tokens"),
    "no dev token": (shards_with(dev=[]), "the dev split is empty"),
    "one dev token": (shards_with(dev=[256]), "the dev split is empty"),
    "no val token": (shards_with(val=[]), "the val split is empty"),
    "train beyond vocab": (shards_with(train=ramp(3000, 400)), "train_000000.bin has token 399"),
    "dev beyond vocab": (shards_with(dev=ramp(300, 258)), "dev_000000.bin has token 257"),
    "val beyond vocab": (shards_with(val=ramp(300, 259)), "val_000000.bin has token 258"),
    "another tokenizer": (by_others, "their_train_0.bin has token 60249"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_trained_on(name, place, capsys, monkeypatch):
    change, part = DATA[name]
    change(write_good(place / name))
    argv = train_argv(place, "--tokens", 0, "--final-val", data=name)
    said = refusal(T.main, argv, place, capsys, monkeypatch)
    assert part in said


def test_names_in_a_manifest_stay_in_its_folder(place, capsys, monkeypatch):
    """A shard named `../x` or `/x` is looked for beside the manifest, whatever lies there."""
    H.write_shard(place / "outside.bin", ramp(3000))
    folder = write_good(place / "names")
    for name in ("../outside.bin", str(place / "outside.bin"), ".."):
        rows = json.loads((folder / "manifest.json").read_text())["files"]
        rows[0]["name"] = name
        manifest_with(files=rows)(folder)
        said = refusal(T.main, train_argv(place, data="names"), place, capsys, monkeypatch)
        assert f"no shard {folder}" in said
        assert shards.verify(folder)[0].startswith(f"cannot read {folder}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(place, capsys, monkeypatch):
    (place / "locked").mkdir(mode=0o500)
    argv = train_argv(place, "--out", place / "locked" / "runs")
    assert "is no folder" in refusal(T.main, argv, place, capsys, monkeypatch)
    argv = ["text", place / "a.txt", "--tokenizer", "bytes", "--out", place / "locked" / "tokens"]
    assert "cannot make the folder" in refusal(get.main, argv, place, capsys, monkeypatch)


# ---- variants/gpt2.py ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--device", "cpu"], ["no folder of tokens", "--data DIR"]),
        (["--rope", "--softcap", "3"], ["--rope, --softcap", "--preset gpt2"]),
        (["--preset", "demo"], ["--rope", "--preset gpt2"]),
        (["--preset=demo"], ["--rope", "--preset gpt2"]),
        (["--n-head", "5", "--arm", "diff_v2", "--keep", "0"], ["even --n-head", "--keep"]),
        (["--gate", "--looks", "many"], ["--looks 'many'"]),
        (
            ["--x0", "--row-tokens", "2048", "--stages", "1:65536:1:1024"],
            ["--x0", "1024 positions"],
        ),
    ],
    ids=lambda v: " ".join(v)[:30] if not v or v[0].startswith("--") else "",
)
def test_gpt2(argv, parts, place, capsys, monkeypatch):
    said = refusal(gpt2.main, [*argv, "--out", place / "runs"], place, capsys, monkeypatch)
    for part in parts:
        assert part in said


# ---- evals/sample.py ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["{}/good"], ["good holds no whole checkpoint"]),
        (["{}/a.txt"], ["a.txt holds no whole checkpoint"]),
        (["{}/runs/r/run.jsonl"], ["no whole checkpoint"]),
        (["{}/runs/r", "--tokenizer", "{}/good"], ["good holds 0 .tiktoken files"]),
        (["{}/runs/r", "--seed", 10**30], ["--seed"]),
        (
            ["{}/runs/r", "--tokens", "0", "--temperature", "-1", "--context", "-1"],
            ["--tokens 0", "--temperature -1", "--context"],
        ),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if str(v[0]).startswith("{}") else "",
)
def test_sample(argv, parts, place, capsys, monkeypatch):
    argv = [str(a).replace("{}", str(place)) for a in argv]
    said = refusal(sample.main, argv, place, capsys, monkeypatch)
    assert said.startswith("sample: ")
    for part in parts:
        assert part in said


# ---- data/get.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, part",
    [
        (["verify", "{}/nowhere"], "nowhere holds no shards"),
        (["verify", "{}/a.txt"], "a.txt holds no shards"),
        (
            ["text", "{}/a.txt", "--out", "{}/a.txt", "--tokenizer", "bytes"],
            "cannot make the folder",
        ),
        (["text", "{}/a.txt", "--out", "{}/good", "--tokenizer", "bytes"], "--overwrite"),
        (["text", "{}/a.txt", "--out", "{}/new", "--tokenizer", "{}/good"], "0 .tiktoken files"),
        (
            ["text", "{}/a.txt", "--out", "{}/new", "--tokenizer", "{}/no"],
            "cannot read the tokenizer",
        ),
        (["text", "{}/no.txt", "--out", "{}/new", "--tokenizer", "bytes"], "no file or folder"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_data_commands(argv, part, place, capsys, monkeypatch):
    argv = [a.replace("{}", str(place)) for a in argv]
    said = refusal(get.main, argv, place, capsys, monkeypatch)
    assert said.startswith("data: ") and part in said


ROW = {"name": "x", "split": "train", "tokens": 1, "documents": 1, "text_bytes": 0, "sha256": ""}


@pytest.mark.parametrize(
    "values",
    [
        {"eot": 300},
        {"eot": "end"},
        {"vocab": "many"},
        {"vocab": -1},
        {"files": [ROW | {"name": 5}]},
    ],
    ids=str,
)
def test_verify_a_manifest_of_nonsense(values, place, capsys, monkeypatch):
    folder = H.write_corpus(place / "nonsense", {"train": [ramp(300)]})
    manifest_with(**values)(folder)
    said = refusal(get.main, ["verify", folder], place, capsys, monkeypatch)
    assert "manifest.json is damaged" in said


# ---- words that are no command line -------------------------------------------------------------


@pytest.mark.parametrize(
    "main, argv, part",
    [
        (T.main, ["--preset", "demo", "--gate=maybe"], "--gate"),
        (gpt2.main, ["--row-tokens"], "--row-tokens: expected one argument"),
        (sample.main, [], "required: MODEL"),
        (sample.main, ["runs/r", "--tokens", "many"], "--tokens: invalid int value: 'many'"),
        (sample.main, ["runs/r", "--device", "tpu"], "'tpu'"),
        (sample.main, ["runs/r", "--colour", "red"], "--colour red"),
        (get.main, [], "required: COMMAND"),
        (get.main, ["c4"], "'c4'"),
        (get.main, ["fineweb", "--shards", "0"], "'0' is not a number"),
        (get.main, ["fineweb-edu", "--shards", "1e3"], "'1e3' is not a number"),
        (get.main, ["verify"], "required: DIR"),
        (get.main, ["text"], "required: PATH, --out, --tokenizer"),
    ],
)
def test_usage(main, argv, part, place, capsys, monkeypatch):
    """argparse's own refusals: the same code, and the last line says what is wrong."""
    monkeypatch.chdir(place)
    before = listing(place)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and listing(place) == before
    assert part in capsys.readouterr().err.splitlines()[-1]
