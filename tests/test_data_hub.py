"""Downloads from a hub on this machine that cuts, stalls, refuses and lies."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub, Fault

from data import hub, shards
from data.progress import Progress
from data.shards import InputError

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parents[1]
REPO = hub.DATASETS["fineweb-edu"][0]
QUICK = hub.Patience(stall_s=0.5, tries=3, wait_s=0.0)


def shard_bytes(tokens: int, seed: int) -> bytes:
    """A shard as others publish it: three header fields, then tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = shards.MAGIC, shards.VERSION, tokens
    values = np.random.default_rng(seed).integers(0, 50_257, tokens).astype("<u2")
    return header.tobytes() + values.tobytes()


FILES = {
    name: shard_bytes(40_000 + seed, seed)
    for seed, name in enumerate(hub.shard_names("fineweb-edu", 2))
}
VAL = "finewebedu_val_000000.bin"


@pytest.fixture
def fake(monkeypatch):
    with FakeHub(REPO, dict(FILES)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        # test_eval.py is offline from its import on, for all that shares its process
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def fetch(folder: Path, count: int = 1, patience: hub.Patience = QUICK) -> None:
    with Progress() as progress:
        hub.fetch_shards("fineweb-edu", count, folder, progress, patience)


def failure(folder: Path, count: int = 1, patience: hub.Patience = QUICK) -> str:
    """The sentence that a download ends in."""
    with pytest.raises(InputError) as caught:
        fetch(folder, count, patience)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_whole_files_are_fetched_once(fake, tmp_path, capsys):
    fetch(tmp_path, 2)
    assert names(tmp_path) == sorted(FILES)
    assert all((tmp_path / name).read_bytes() == data for name, data in FILES.items())
    assert shards.verify(tmp_path) == []
    asked = len(fake.requests)
    capsys.readouterr()
    fetch(tmp_path, 2)
    assert len(fake.requests) == asked
    assert capsys.readouterr().err.count("is here already") == 3


def test_only_as_many_as_asked(fake, tmp_path):
    fetch(tmp_path, 1)
    assert names(tmp_path) == sorted(hub.shard_names("fineweb-edu", 1))


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_connection_is_resumed(fake, tmp_path, seed):
    rng = random.Random(seed)
    size = len(FILES[VAL])
    cut = rng.randrange(1, size)
    fake.cdn_faults += [Fault(after=cut), Fault(after=rng.randrange(0, size - cut))]
    fetch(tmp_path)
    assert (tmp_path / VAL).read_bytes() == FILES[VAL]
    assert f"bytes={cut}-" in [r.range for r in fake.asked("GET", "cdn")]
    assert fake.sent == sum(len(FILES[name]) for name in names(tmp_path))


def test_another_process_goes_on_where_one_stopped(fake, tmp_path):
    fake.cdn_faults.append(Fault(after=5_000))
    once = dataclasses.replace(QUICK, tries=1)
    assert "run the same command again" in failure(tmp_path, patience=once)
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(VAL) and part.suffix == ".part" and part.stat().st_size == 5_000
    fetch(tmp_path)
    assert names(tmp_path) == sorted(hub.shard_names("fineweb-edu", 1))
    assert fake.sent == sum(len(FILES[name]) for name in names(tmp_path))


def test_a_part_of_another_version_is_not_used(fake, tmp_path):
    fake.cdn_faults.append(Fault(after=5_000))
    failure(tmp_path, patience=dataclasses.replace(QUICK, tries=1))
    fake.files[VAL] = shard_bytes(30_000, 99)
    fetch(tmp_path)
    assert (tmp_path / VAL).read_bytes() == fake.files[VAL]
    assert not list(tmp_path.glob("*.part"))


def test_a_server_without_ranges_starts_again(fake, tmp_path):
    fake.cdn_faults += [Fault(after=5_000), Fault(no_ranges=True)]
    fetch(tmp_path)
    assert (tmp_path / VAL).read_bytes() == FILES[VAL]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_never_gets_the_name(fake, tmp_path, change):
    body = FILES[VAL][:change] if change < 0 else FILES[VAL] + b"x"
    # What comes after a short body is asked for with a range that yields nothing.
    fake.cdn_faults += [Fault(body=body)] + [Fault(body=b"")] * 5
    size = f"{len(FILES[VAL]):,}"
    assert size in failure(tmp_path)  # longer: the part goes too
    assert VAL not in names(tmp_path)


def test_a_damaged_file_is_removed(fake, tmp_path):
    body = bytearray(FILES[VAL])
    body[5_000] ^= 1
    fake.cdn_faults.append(Fault(body=bytes(body)))
    assert "sha256" in failure(tmp_path)
    assert names(tmp_path) == []
    fetch(tmp_path)
    assert (tmp_path / VAL).read_bytes() == FILES[VAL]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"<html>log in</html>" * 100, "no magic"), (FILES[VAL][:-2], "cut or padded")],
)
def test_what_is_no_shard_is_removed(fake, tmp_path, data, reason):
    fake.files[VAL] = data
    assert reason in failure(tmp_path)
    assert names(tmp_path) == []


def test_too_many_shards_end_before_the_first_byte(fake, tmp_path):
    assert "has no finewebedu_train_000003.bin (404)" in failure(tmp_path, 3)
    assert not fake.asked("GET", "cdn") and names(tmp_path) == []


@pytest.mark.parametrize("where", ["hub_faults", "cdn_faults"])
def test_too_many_requests_are_waited_for(fake, tmp_path, where):
    getattr(fake, where).extend([Fault(status=429, retry_after="0")] * 2)
    fetch(tmp_path)
    assert (tmp_path / VAL).read_bytes() == FILES[VAL]


@pytest.mark.parametrize("where", ["hub_faults", "cdn_faults"])
def test_too_many_requests_end_at_last(fake, tmp_path, where):
    getattr(fake, where).extend([Fault(status=429, retry_after="0")] * 9)
    assert "too many requests (429), 3 tries" in failure(tmp_path)
    getattr(fake, where).clear()
    getattr(fake, where).append(Fault(status=429, retry_after="4000"))
    assert "asks to wait 4000 s" in failure(tmp_path)


def test_a_stall_is_told_with_its_time(fake, tmp_path):
    stall = Fault(after=3_000, stall=True)
    patience = dataclasses.replace(QUICK, stall_s=0.3)
    fake.cdn_faults += [stall] * 3
    assert "nothing came for 0.3 s" in failure(tmp_path, patience=patience)
    fake.cdn_faults.append(stall)
    fetch(tmp_path, patience=patience)
    assert (tmp_path / VAL).read_bytes() == FILES[VAL]


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "hf auth login"), (403, "hf auth login"), (418, "status 418")]
)
def test_a_refusal_is_not_repeated(fake, tmp_path, status, sentence):
    fake.hub_faults.append(Fault(status=status))
    assert sentence in failure(tmp_path)
    assert len(fake.requests) == 1


def test_no_network_is_one_sentence(fake, tmp_path, monkeypatch):
    fake.__exit__()
    assert f"cannot reach {fake.endpoint}" in failure(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "must start with https://" in failure(tmp_path)


def test_good_files_are_kept_and_bad_ones_replaced(fake, tmp_path):
    own = shard_bytes(100, 7)
    (tmp_path / VAL).write_bytes(own)
    train = tmp_path / "finewebedu_train_000001.bin"
    train.write_bytes(FILES[train.name][:-1])
    fake.cdn_faults += [Fault(after=100)] * 3
    failure(tmp_path)
    assert train.read_bytes() == FILES[train.name][:-1]  # until the new one is whole
    fetch(tmp_path)
    assert train.read_bytes() == FILES[train.name]
    assert (tmp_path / VAL).read_bytes() == own


def test_the_token_stays_with_the_hub(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    fetch(tmp_path)
    assert all(r.token == (r.server == "hub") for r in fake.requests)


def test_a_full_disk_is_told_before_the_first_byte(fake, tmp_path, monkeypatch):
    usage = hub.shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: usage)
    assert "fewer --shards or another --out" in failure(tmp_path)
    assert not fake.asked("GET", "cdn")


def test_the_library_missing_is_one_sentence(fake, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface-hub" in failure(tmp_path)


def test_the_command(fake, tmp_path):
    command = [sys.executable, "data/get.py", "fineweb-edu", "--out", str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    good = subprocess.run([*command, "--shards", "2"], check=False, **options)
    assert (good.returncode, names(tmp_path)) == (0, sorted(FILES)), good.stderr
    bad = subprocess.run([*command, "--shards", "3"], check=False, **options)
    assert bad.returncode == 2 and "ask for fewer --shards" in bad.stderr.splitlines()[-1]
    assert "Traceback" not in bad.stderr
