"""Two processes under torchrun, with faults: all ranks end the same way, exit.json says how, and a
restart goes on where there is something to go on with. Over gloo on a CPU; over NCCL, the tests
that NCCL could fail alone, with two GPUs: `python -m pytest -m gpu -n 6 tests/test_ranks.py`, which
ends with a table of what was seen (also as JSON, where FAULTS_JSON names a file)."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import dataclass, field

import helpers as H
import pytest
import torch

T = H.T
GUARD = 240  # seconds; a hang is a failure, a busy machine is not
TORCHRUN_S = 30  # torchrun's own patience after a SIGTERM


@dataclass(frozen=True)
class Kind:
    """Where the two ranks run: tokens a step, and what else differs from `helpers.tiny`."""

    name: str
    tokens: int
    changes: dict = field(hash=False)


GLOO = Kind("gloo", 256, {"micro_batch_tokens": 128})
# FlexAttention has blocks of 128 tokens; not compiled, as these tests are about what is between
# ranks; deterministic, as two runs are compared to the bit.
NCCL = Kind(
    "nccl",
    1024,
    {
        **{"device": "cuda", "fp8": False, "deterministic": True},
        **{"stages": (T.Stage(1.0, 1024, 1.0, (128, 128)),), "tokens": 8 * 1024},
        **{"row_tokens": 128, "micro_batch_tokens": 256, "val_row_tokens": 128},
    },
)
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two NVIDIA GPUs here"),
]
EVERYWHERE = pytest.mark.parametrize(
    "kind", [GLOO, pytest.param(NCCL, marks=TWO_GPUS)], ids=lambda k: k.name, indirect=True
)


@pytest.fixture(scope="module")
def kind(request) -> Kind:
    return getattr(request, "param", GLOO)


@pytest.fixture
def note(kind, record_property):
    """note(fault, exit.json, seconds) files what NCCL did, for the table at the end (conftest.py).
    seconds: to the end of the job, from the fault where its time is known, else all of them."""

    def add(fault: str, said: dict, seconds: float) -> None:
        if kind is NCCL:
            row = {"fault": fault, "code": said["code"], "seconds": round(seconds, 1)}
            gpu = torch.cuda.get_device_name()
            record_property("fault", row | {"reason": said["reason"], "gpu": gpu})

    return add


def start(fault: str, data, place, *launch: str, kind: Kind = GLOO, fork: bool = True, **changes):
    """`torchrun LAUNCH tests/faults.py FAULT ...` with two ranks; its output in PLACE/said. Forks
    with gloo alone."""
    place.mkdir(exist_ok=True)
    gloo = kind is GLOO
    base = {"run_id": "r", "save_every": 2, "keep": 20, "looks": 0, **kind.changes}
    argv = H.tiny_argv(data, changes.pop("out", place), **{**base, **changes})
    launch, faults = ["--standalone", "--nproc-per-node", "2", *launch], H.ROOT / "tests/faults.py"
    return H.torchrun(launch, faults, [fault, *argv], place / "said", fork=fork and gloo, gloo=gloo)


def ended(process: H.Forked | subprocess.Popen, out) -> dict:
    """Waits for the whole job; RUN/exit.json."""
    try:
        process.wait(GUARD)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError((out / "said").read_text()[-4000:]) from None
    file = out / "r" / "exit.json"
    assert file.exists(), (out / "said").read_text()[-4000:]
    return json.loads(file.read_text())


def run(fault: str, data, out, *launch: str, **how) -> dict:
    return ended(start(fault, data, out, *launch, **how), out)


def since(out) -> float:
    """Seconds since the fault."""
    return time.time() - float((out / "fault").read_text())


def weights(out, rank: int) -> dict:
    """On the CPU: over NCCL each rank had its own GPU."""
    return torch.load(out / f"weights{rank}.pt", map_location="cpu", weights_only=True)


def assert_same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_not_replayed(out) -> None:
    """torchrun started the workers again, and they left at once."""
    text = (out / "said").read_text()
    assert text.count("step:1/8 loss") == 1 and "not started again: " in text


@pytest.fixture(scope="module")
def calm(kind, text_data, tmp_path_factory):
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("calm")
    assert run("none", text_data, out, kind=kind)["code"] == 0
    assert_same(weights(out, 0), weights(out, 1))
    return out


@EVERYWHERE
def test_a_nan_on_one_rank_stops_both_with_the_weights_before(
    kind, calm, note, text_data, tmp_path
):
    began = time.time()
    said = run("nan", text_data, tmp_path, "--max-restarts", "2", kind=kind)
    note("NaN on rank 1, two restarts allowed", said, time.time() - began)
    assert said["code"] == 3
    assert said["reason"].startswith("step 5: loss ")
    assert "rank 1: loss" in said["reason"] and "blocks.1.mlp.up.weight first" in said["reason"]
    assert "rank 0" not in said["reason"]
    saved, meta = T.load_checkpoint(tmp_path / "r")
    assert meta["step"] == 4
    assert_same(saved["model"], T.load_checkpoint(calm / "r/ckpt/step_00000004")[0]["model"])
    for rank in (0, 1):
        ended_with = weights(tmp_path, rank)
        assert_same(ended_with, {name: saved["model"][name] for name in ended_with})
    (end,) = H.read_log(tmp_path / "r", "end")
    assert (end["status"], end["code"], end["tokens"]) == ("non-finite", 3, 4 * kind.tokens)
    assert H.chain_breaks(tmp_path / "r") == []
    assert_not_replayed(tmp_path)


@EVERYWHERE
def test_a_killed_rank_ends_the_job_with_4(kind, note, text_data, tmp_path):
    """gloo notices at once; over NCCL torchrun's SIGTERM does it, before its SIGKILL."""
    said = run("kill", text_data, tmp_path, kind=kind, fork=False)
    took = since(tmp_path)
    note("kill -9 of rank 1", said, took)
    assert said["code"] == 4
    assert took < TORCHRUN_S + 15, "the rank that is left should end before torchrun kills it"
    assert T.find_checkpoint(tmp_path / "r").name in ("step_00000004", "step_00000006")
    assert not (tmp_path / "weights1.pt").exists()


@EVERYWHERE
def test_a_killed_rank_comes_back_from_the_last_checkpoint(kind, calm, note, text_data, tmp_path):
    """Without help, and the run is the one that nothing happened to."""
    said = run("kill", text_data, tmp_path, "--max-restarts", "1", kind=kind)
    note("kill -9 of rank 1, one restart allowed", said, since(tmp_path))
    assert said["code"] == 0, (tmp_path / "said").read_text()[-3000:]
    for rank in (0, 1):
        assert_same(weights(tmp_path, rank), weights(calm, rank))
    assert H.losses(tmp_path / "r") == H.losses(calm / "r")
    assert [e["kind"] for e in H.read_log(tmp_path / "r", "event")] == ["resume"]
    assert H.chain_breaks(tmp_path / "r") == []


@pytest.mark.slow
def test_ranks_that_wait_outside_python_say_so_in_time(text_data, tmp_path):
    """NCCL's way to wait: after a signal, rank 0 still writes the 4 before torchrun kills it."""
    process = start("deaf", text_data, tmp_path, fork=False)
    deadline = time.monotonic() + GUARD
    while time.monotonic() < deadline and not (tmp_path / "fault").exists():
        time.sleep(0.05)
    time.sleep(1)  # rank 0 is in its collective by then, or will be before it can see the signal
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = ended(process, tmp_path)
    assert said["code"] == 4 and "no step ended within 5 s" in said["reason"]
    assert time.monotonic() - began < TORCHRUN_S


@pytest.mark.long
def test_a_restart_without_a_checkpoint_starts_over(calm, text_data, tmp_path):
    """The log of the first attempt is set aside, not mixed in and not lost."""
    said = run("kill", text_data, tmp_path, "--max-restarts", "1", save_every=0)
    assert said["code"] == 0
    assert_same(weights(tmp_path, 0), weights(calm, 0))
    assert H.losses(tmp_path / "r") == H.losses(calm / "r")
    assert (tmp_path / "r" / "run.jsonl.1").exists() and H.chain_breaks(tmp_path / "r") == []


@EVERYWHERE
@pytest.mark.parametrize(
    "fault, code", [pytest.param("oom", 5, marks=pytest.mark.long), ("bad-input", 2)]
)
def test_what_a_restart_cannot_mend_is_not_replayed(kind, note, text_data, tmp_path, fault, code):
    """Memory of rank 1, too: its own word, not what rank 0 makes of it."""
    began = time.time()
    said = run(fault, text_data, tmp_path, "--max-restarts", "2", kind=kind)
    note(f"{fault}, two restarts allowed", said, time.time() - began)
    assert said["code"] == code
    assert_not_replayed(tmp_path)
    if code == 5:
        assert "--micro-batch-tokens" in said["reason"]


@pytest.mark.long
def test_a_folder_of_another_job_is_left_alone(calm, text_data, tmp_path):
    """Not even by a second attempt, which finds a run there and did not make it."""
    held = calm / "r"
    before = {p: p.read_bytes() for p in held.rglob("*") if p.is_file()}
    process = start("none", text_data, tmp_path, "--max-restarts", "1", out=str(calm))
    assert process.wait(GUARD) != 0
    assert "holds a run already" in (tmp_path / "said").read_text()
    assert {p: p.read_bytes() for p in held.rglob("*") if p.is_file()} == before


@pytest.mark.long
def test_restarts_need_a_name(text_data, tmp_path):
    process = start("none", text_data, tmp_path, "--max-restarts", "1", run_id="")
    assert process.wait(GUARD) != 0
    assert "needs --run-id" in (tmp_path / "said").read_text()
    assert not list(tmp_path.glob("2*"))


@EVERYWHERE
@pytest.mark.parametrize("to", ["one rank", pytest.param("torchrun", marks=pytest.mark.long)])
def test_all_ranks_agree_on_a_signal(kind, calm, note, text_data, tmp_path, to):
    """Step finished, saved, 75; resumed, it is the run that nothing happened to."""
    began = time.time()
    if to == "one rank":
        said = run("term", text_data, tmp_path, kind=kind, save_every=0)
    else:
        process = start("long", text_data, tmp_path, kind=kind, save_every=0)
        log = tmp_path / "r" / "run.log"
        deadline = time.monotonic() + GUARD
        while time.monotonic() < deadline and not (log.exists() and "step:2/" in log.read_text()):
            time.sleep(0.05)
        began = time.time()
        process.send_signal(signal.SIGTERM)
        said = ended(process, tmp_path)
    note(f"SIGTERM to {to}", said, time.time() - began)
    assert said["code"] == 75, (tmp_path / "said").read_text()[-3000:]
    step = T.load_checkpoint(tmp_path / "r")[1]["step"]
    assert 2 <= step < 8
    (end,) = H.read_log(tmp_path / "r", "end")
    assert (end["status"], end["tokens"]) == ("signal", step * kind.tokens)
    changes = {"resume": str(tmp_path / "r"), "save_every": 0}
    assert run("none", text_data, tmp_path, kind=kind, **changes)["code"] == 0
    assert_same(weights(tmp_path, 1), weights(calm, 1))
    assert H.losses(tmp_path / "r") == H.losses(calm / "r")
