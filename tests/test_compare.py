"""Blocks of matched arms, end to end on a CPU: what is run, refused, resumed, planned and filed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers as H
import pytest
import torch

from records import compare, comparison, folder, logs, verify, worker

T = H.T
BROKEN = H.ARMS / "broken.py"

# Arms for this file's tests. Train calls have 8 rows, which nothing in the causality check has.
USER_ARMS = """
import os, time
import torch
import train_gpt as T

print("noise on stdout, which is the line to compare")

class Loud(T.Softmax):
    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        os.system("echo more of it")

class Stateful(T.Softmax):
    '''Everything that a process could carry from one run into the next.'''
    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.plain = torch.nn.Linear(self.n_out, self.n_out)  # as torch built it
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        self.calls += 1
        y = torch.nn.functional.dropout(self.plain(y), 0.1)
        return y / (1 + 0.01 * self.calls), v

class Slow(T.Softmax):
    def forward(self, x, ve, ctx):
        if x.size(0) == 8 and self.layer == 0:
            time.sleep(float(os.environ.get("SLOW_ARM_S", 0)))
        return super().forward(x, ve, ctx)

class Nan(T.Softmax):
    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        return y * (float("nan") if x.size(0) == 8 else 1.0), v

class Big(T.Softmax):
    def forward(self, x, ve, ctx):
        if x.size(0) == 8:
            raise torch.OutOfMemoryError("no room")
        return super().forward(x, ve, ctx)

class Gone(T.Softmax):
    def forward(self, x, ve, ctx):
        if x.size(0) == 8:
            os.system("echo the last words >&2")
            os._exit(9)
        return super().forward(x, ve, ctx)
"""


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("arms") / "mine.py"
    path.write_text(USER_ARMS)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def forked_workers():
    """Workers that this process starts are forks. Those of `records/compare.py` in a process of its
    own start as a user's do."""
    with pytest.MonkeyPatch.context() as patch:
        popen = {**vars(subprocess), "Popen": H.Forked}
        patch.setattr(compare, "subprocess", SimpleNamespace(**popen))
        yield


def flags_of(data: Path, **changes) -> list[str]:
    """train_gpt.py's flags for runs of 8 steps, in which train calls have 8 rows."""
    argv = H.tiny_argv(data, "nowhere", **{"looks": 1, **changes})
    return [a for a in argv if a not in ("--out", "nowhere", "--no-save-final")]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def run_ids(path: Path) -> set[str]:
    return {p.parent.name for p in path.glob("*/run.jsonl")}


# ---- reset --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("park", [True, False])
def test_reset_equals_a_fresh_process(text_data, arms, tmp_path, park):
    """A worker, after a run of another seed and budget: the same losses, weights, buffers and
    optimizer, to the bit, as train_gpt.py gives in a process of its own."""
    cfg = {"arm": f"{arms}:Stateful", "save_final": True, "looks": 2}
    argv = H.tiny_argv(text_data, tmp_path, **cfg)
    script = str(H.ROOT / "records" / "worker.py")
    pipe = subprocess.PIPE
    how = {"stdin": pipe, "stdout": pipe, "text": True}
    how["env"] = {**os.environ, worker.ALONE: str(int(not park))}
    process = subprocess.Popen([sys.executable, script, *argv], **how)
    try:
        ready = json.loads(process.stdout.readline())["ready"]
        for seed, tokens, run_id in ((1, 256 * 12, "first"), (5, 256 * 8, "second")):
            command = {"seed": seed, "data_seed": 2, "tokens": tokens, "run_id": run_id}
            command["labels"] = {"block": seed}
            print(json.dumps(command), file=process.stdin, flush=True)
            said = json.loads(process.stdout.readline())["done"]
            assert said["tokens"] == tokens and Path(said["run"]) == tmp_path / run_id
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()
    fresh = {**cfg, "seed": 5, "data_seed": 2, "run_id": "fresh"}
    done = H.run_script(H.tiny_argv(text_data, tmp_path, **fresh))
    assert done.returncode == 0, done.stderr
    first, second, fresh = (tmp_path / name for name in ("first", "second", "fresh"))
    assert len(H.losses(first)) == 12
    assert H.losses(second) == H.losses(fresh) and len(H.losses(fresh)) == 8
    assert H.losses(second) != H.losses(first)[:8]
    val = [[v.get("val_loss") for v in H.read_log(f, "val")] for f in (second, fresh)]
    assert val[0] == val[1] and val[0][-1] is not None
    (a, meta), (b, other) = (T.load_checkpoint(f) for f in (second, fresh))
    assert any(name.endswith(".calls") for name in a["model"])
    assert set(a["model"]) == set(b["model"]) and meta["steps"] == other["steps"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for name, state in a["optimizer"].items():
        assert all(torch.equal(t, b["optimizer"][name][key]) for key, t in state.items()), name
    header = logs.load_run(second).header
    assert header["labels"] == {"block": 5} and header["params"] == ready["params"]
    assert header["source_sha256"] == {"arm": T.sha256(Path(arms))} | {
        "trainer": T.sha256(H.ROOT / "train_gpt.py")
    }


def test_a_budget_needs_no_new_shapes(text_data, tmp_path, monkeypatch):
    """The warm-up runs every stage's shapes, also those that the first budget has no step of."""
    stages = (T.Stage(0.1, 256, 1.0, (128, 128)), T.Stage(0.9, 512, 1.0, (128, 128)))
    cfg = H.tiny(text_data, tmp_path, stages=stages, tokens=1024, looks=0, final_val=False)
    trainer, shapes = T.Trainer(cfg.with_(micro_batch_tokens=512)), []
    forward = trainer.lm.forward

    def watch(tokens, docs, window):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, docs, window)

    monkeypatch.setattr(trainer.lm, "forward", watch)
    assert {s.tokens for s in trainer.steps} == {512}
    trainer.warm_up()
    warm = set(shapes)
    trainer.reset(0, tokens=512 * 20)
    assert {s.tokens for s in trainer.steps} == {256, 512}
    trainer.run()
    assert set(shapes) == warm


def test_a_parked_trainer_warms_up_again_and_names_its_code_once(text_data, arms, tmp_path):
    """Warm-up refills the allocator outside the clock; a file that is edited meanwhile is not what
    runs."""
    path = tmp_path / "edited.py"
    shutil.copy(arms, path)
    cfg = H.tiny(text_data, tmp_path, arm=f"{path}:Loud", looks=0, final_val=False)
    trainer = T.Trainer(cfg)
    trainer.run()
    first, compile_s = trainer.folder, trainer.compile_s
    trainer.park()
    assert not trainer.warm
    path.write_text("raise RuntimeError")
    trainer.reset(0, run_id="again")
    assert trainer.warm and trainer.folder is None and trainer.compile_s == compile_s
    trainer.run()
    assert H.losses(trainer.folder) == H.losses(first)
    sources = [logs.load_run(f).header["source_sha256"] for f in (first, trainer.folder)]
    assert sources[0] == sources[1] and sources[0]["arm"] == T.sha256(Path(arms))


def test_an_arm_alone_stays_warm(text_data, tmp_path, monkeypatch):
    """Where no other arm waits for the memory, a worker is told not to park."""
    trainer = T.Trainer(H.tiny(text_data, tmp_path))
    monkeypatch.setenv(worker.ALONE, "1")
    worker.ready(trainer)
    assert trainer.warm
    monkeypatch.delenv(worker.ALONE)
    worker.ready(trainer)
    assert not trainer.warm
    told = []
    fake = SimpleNamespace(PIPE=None, Popen=lambda command, **how: told.append(how["env"]))
    monkeypatch.setattr(compare, "subprocess", fake)
    for arms in (("softmax",), ("softmax", "diff_v2")):
        compare.Worker("softmax", comparison_of(text_data, *arms), tmp_path, 0)
    assert [env[worker.ALONE] for env in told] == ["1", "0"]


@pytest.mark.gpu
def test_a_parked_trainer_leaves_the_gpu_to_others(tmp_path):
    """A 12 x 768 model with value tables: at most 6 GB of allocator stay, and it runs on."""
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50_000, (700_000,), generator=gen).numpy()
    tokens[::500] = 50_256
    splits = {"train": [tokens], "dev": [tokens[:70_000]], "val": [tokens[:70_000]]}
    data = H.write_corpus(tmp_path / "d", splits, vocab=50_257, eot=50_256)
    small = {"val_row_tokens": 16_384, "val_call_tokens": 65_536, "looks": 0, "final_val": False}
    small |= {"data": str(data), "out": str(tmp_path), "save_final": False}
    trainer = T.Trainer(T.make_config("r28", tokens=131_072 * 2, **small))
    trainer.run()
    busy = torch.cuda.memory_reserved()
    trainer.park()
    assert torch.cuda.memory_reserved() < 6e9 < busy
    first = H.losses(trainer.folder)
    trainer.reset(0, run_id="again")
    trainer.run()
    assert H.losses(trainer.folder) == pytest.approx(first, abs=1e-3)


# ---- end to end ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(text_data, arms, tmp_path_factory):
    """(folder, command line) of softmax and a user's loud arm, 2 blocks. Never changed: copy it."""
    out = tmp_path_factory.mktemp("compared") / "demo" / "2026-01-01_two-arms"
    line = ["softmax", f"{arms}:Loud", "--out", str(out), *flags_of(text_data, track="demo")]
    assert compare.main([*line, "--blocks", "2", "--warm-together", "2"]) == 0
    return out, line


def test_two_blocks(compared, arms):
    out, line = compared
    assert run_ids(out) == {f"b{b:02d}_{a}" for b in (1, 2) for a in ("softmax", "mine-Loud")}
    runs = logs.load_runs(out)
    assert all(run.done and H.chain_breaks(run.path.parent) == [] for run in runs)
    first, second = logs.blocks(runs)
    assert set(first) == set(second) == {"softmax", f"{arms}:Loud"}
    for number, block in enumerate((first, second), 1):
        headers = [run.header for run in block.values()]
        assert {h["seed"] for h in headers} == {number - 1}
        assert {h["data_seed"] for h in headers} == {0}
        assert {h["labels"]["fraction"] for h in headers} == {100}
        assert len({h["labels"]["sitting"] for h in headers}) == 1
        order = sorted(headers, key=lambda h: h["labels"]["order"])
        assert [h["labels"]["order"] for h in order] == [0, 1]
        assert (order[0]["arm"] == "softmax") == (number == 1), "the order turns"
    code = {p.name: T.sha256(p) for p in (out / "code").rglob("*.py")}
    for run in runs:
        assert set(run.header["source_sha256"].values()) <= set(code.values())
    assert code == {
        "train_gpt.py": T.sha256(H.ROOT / "train_gpt.py"),
        "mine.py": T.sha256(Path(arms)),
    }
    claim = json.loads((out / "claim.json").read_text())
    keys = {"kind", "title", "track", "date", "arms", "baseline", "metric", "target", "by"}
    assert set(claim) == keys | {"compare"} and claim["arms"] == line[:2]
    assert [claim[k] for k in ("kind", "track", "baseline")] == ["screen", "demo", "softmax"]
    assert claim["metric"] == "dev_loss", "a screen leaves val closed"
    assert all(run.final("dev_loss") and run.final("val_loss") is None for run in runs)
    assert json.loads((out / "summary.json").read_text())["blocks"] == 2
    assert not list(out.glob("*.log")) and not list(out.glob("*/ckpt"))
    filed, findings = verify.load(out, json.loads((H.ROOT / "records/tracks.json").read_text()))
    assert [*findings, *verify.check(filed, H.ROOT)] == [], "a folder that can be filed"


def test_a_run_of_a_block_is_a_run_of_its_own(compared, text_data, tmp_path):
    """Block 2's softmax, from a warm process, has the losses of train_gpt.py's seed 1."""
    out, _ = compared
    T.train(H.tiny(text_data, tmp_path, looks=1, seed=1, run_id="alone"))
    assert H.losses(out / "b02_softmax") == H.losses(tmp_path / "alone")


def copied(compared, tmp_path) -> tuple[Path, list[str]]:
    """The comparison in a folder that a test may spoil."""
    source, line = compared
    out = shutil.copytree(source, tmp_path / "copy")
    return out, [str(out) if word == str(source) else word for word in line]


def test_a_later_sitting_appends(compared, tmp_path, capsys):
    out, line = copied(compared, tmp_path)
    before = {p: p.read_bytes() for p in out.glob("*/run.jsonl")}
    claim = json.loads((out / "claim.json").read_text())
    (out / "claim.json").write_text(json.dumps(claim | {"title": "by hand"}))
    assert compare.main([*line, "--blocks", "3"]) == 0
    said = capsys.readouterr().out
    assert "3/3" in said and "1/3" not in said and "2/3" not in said
    assert all(p.read_bytes() == b for p, b in before.items())
    blocks = logs.blocks(logs.load_runs(out))
    assert len(blocks) == 3 and all(len(block) == 2 for block in blocks)
    sittings = [{run.labels["sitting"] for run in block.values()} for block in blocks]
    assert sittings[0] == sittings[1] != sittings[2]
    assert {run.labels["block"] for run in blocks[2].values()} == {3}
    assert json.loads((out / "claim.json").read_text())["title"] == "by hand"


def test_a_kill_in_mid_block(text_data, arms, tmp_path, monkeypatch, capsys):
    """kill -9 while block 2 has one run done and one at work: no worker goes on, and the same line
    runs block 2 anew as a whole; block 1 stays as it is."""
    out = tmp_path / "out"
    line = [f"{arms}:Slow", "softmax", "--blocks", "2", "--out", str(out), *flags_of(text_data)]
    script = [sys.executable, str(H.ROOT / "records" / "compare.py"), *line]
    process = subprocess.Popen(script, env={**os.environ, "SLOW_ARM_S": "0.15"})
    cut = out / "b02_mine-Slow" / "run.jsonl"
    try:
        while process.poll() is None and len(lines(cut)) < 3:  # a header and two steps
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder.locked(out):  # workers hold it too: they are gone
        assert 3 <= len(lines(cut)) < 9
    kept = {p: p.read_bytes() for p in out.glob("b01_*/run.jsonl")}
    lost = lines(out / "b02_softmax" / "run.jsonl")
    assert len(kept) == 2 and '"t": "end"' in lost[-1]
    assert compare.main(line) == 0
    said = capsys.readouterr().out
    assert "b02_softmax: its block was cut" in said and "1 of 2 blocks" in said
    assert all(p.read_bytes() == b for p, b in kept.items())
    aside = out / "aside"
    assert lines(aside / "b02_softmax.broken-1" / "run.jsonl") == lost
    assert len(lines(aside / "b02_mine-Slow.broken-1" / "run.jsonl")) < 9
    blocks = logs.blocks(logs.load_runs(out))
    assert [len(block) for block in blocks] == [2, 2]
    sittings = [{run.labels["sitting"] for run in block.values()} for block in blocks]
    assert len(sittings[0]) == len(sittings[1]) == 1 and sittings[0] != sittings[1]


def test_workers_hold_the_lock(text_data, tmp_path, monkeypatch):
    """A successor waits for the workers of a killed compare, too."""
    monkeypatch.setattr(compare, "subprocess", subprocess)  # a start hands the lock on
    out = tmp_path / "out"
    with folder.locked(out) as lock:
        one = compare.Worker("softmax", comparison_of(text_data, "softmax"), out, lock)
    monkeypatch.setattr(folder.time, "sleep", lambda s: None)
    try:
        with pytest.raises(T.InputError, match="in use"), folder.locked(out):
            pass
    finally:
        one.end(in_peace=False)
    with folder.locked(out):
        pass


def test_a_worker_that_died_while_idle(text_data, tmp_path):
    c = comparison_of(text_data, "softmax")
    with folder.locked(tmp_path / "out") as lock:
        one = compare.Worker("softmax", c, tmp_path / "out", lock)
        one.process.kill()
        one.process.wait()
        one.tell(c.jobs(1)[0], "now")
        with pytest.raises(compare.ArmFailed, match=r"softmax: its process ended \(-9\)") as error:
            one.hear("done")
        assert error.value.code == 4
        one.end(in_peace=False)


@pytest.mark.parametrize(
    "cls, code, message",
    [
        ("Nan", 3, "mine.py:Nan: step 1: loss nan"),
        ("Big", 5, "mine.py:Big: out of GPU memory: run again with --micro-batch-tokens 128"),
        ("Gone", 4, "the last words"),
    ],
)
def test_a_failed_arm_ends_the_others(text_data, arms, tmp_path, capsys, cls, code, message):
    others = ["softmax"] if cls == "Nan" else []
    line = [*others, f"{arms}:{cls}", "--blocks", "1", "--out", str(tmp_path / "out")]
    started = []
    real = compare.Worker
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Worker", lambda *a: started.append(real(*a)) or started[-1])
        assert compare.main([*line, *flags_of(text_data)]) == code
    assert message in capsys.readouterr().err
    assert len(started) == 1 + len(others)
    assert all(w.process.poll() is not None for w in started)
    assert (tmp_path / "out" / f"mine-{cls}.log").exists(), "what it said is kept"
    if cls == "Nan":
        said = json.loads((tmp_path / "out" / "b01_mine-Nan" / "exit.json").read_text())
        assert said["code"] == 3


def test_a_workers_bad_input(text_data, tmp_path, capsys):
    """Digests are checked by the workers: 2, with the arm's name, and no run."""
    data = shutil.copytree(text_data, tmp_path / "data")
    shard = next(data.glob("*train_000001.bin"))
    raw = bytearray(shard.read_bytes())
    raw[-2] ^= 1
    shard.write_bytes(bytes(raw))
    line = ["softmax", "--blocks", "1", "--out", str(tmp_path / "out"), *flags_of(data)]
    assert compare.main(line) == 2
    assert "softmax: " in (said := capsys.readouterr().err) and "manifest" in said
    assert not run_ids(tmp_path / "out")


def test_a_signal_ends_it_with_75(text_data, arms, tmp_path):
    out = tmp_path / "out"
    line = [f"{arms}:Slow", "--blocks", "1", "--out", str(out), *flags_of(text_data)]
    script = [sys.executable, str(H.ROOT / "records" / "compare.py"), *line]
    env = {**os.environ, "SLOW_ARM_S": "0.15"}
    process = subprocess.Popen(script, env=env, stderr=subprocess.PIPE, text=True)
    cut = out / "b01_mine-Slow" / "run.jsonl"
    while process.poll() is None and len(lines(cut)) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "the same line goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 75
    with folder.locked(out):
        assert len(lines(cut)) < 9


@pytest.mark.long
def test_two_ranks(compared, text_data, tmp_path):
    """Under torchrun an arm is a group that hears each command; the losses are those of one."""
    out = tmp_path / "out"
    line = ["softmax", "--blocks", "2", "--gpus", "2", "--out", str(out), *flags_of(text_data)]
    assert compare.main(line) == 0
    for run in logs.load_runs(out):
        assert run.done and run.header["world"] == 2
        alone = H.losses(compared[0] / run.path.parent.name)
        assert H.losses(run.path.parent) == pytest.approx(alone, abs=2e-5)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def sittings(monkeypatch) -> list:
    """Instead of training: what `sit` was asked to do."""
    seen = []
    monkeypatch.setattr(compare, "sit", lambda *args: seen.append(args))
    monkeypatch.setattr(compare, "report", lambda folder: None)
    return seen


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    assert compare.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("compare: ") and said.count("\n") == 1, "one sentence"
    return said


@pytest.mark.parametrize(
    "words, message",
    [
        (["softmax", "nonsense"], "no arm 'nonsense'"),
        (["softmax", "softmax"], "named twice"),
        (["softmax", "nowhere.py:Mine"], "nowhere.py"),
        (["softmax", "diff_v2,form=round"], "--form"),
        ([f"{BROKEN}:FutureNorm"], "FutureNorm is not causal and is not run"),
        ([f"{BROKEN}:Zero"], "nobody can say"),
        ([f"{BROKEN}:Nothing"], "has no class"),
        (["softmax", "--blocks", "0"], "--blocks"),
        (["softmax", "--fractions", "60", "60"], "--fractions"),
        (["softmax", "--fractions", "99", "100", "--tokens", "600"], "too few tokens"),
        (["softmax", "--fractions", "100", "10000000"], "--fractions"),
        (["softmax", "--fractions", "100", "900", "--tokens", "300000"], "--tokens"),
        (["softmax", "--data", "/nowhere"], "/nowhere"),
        (["softmax", "--looks", "70", "--row-tokens", "31"], "--looks"),
        (["softmax", "--gpus", "3"], "3 ranks"),
        (["softmax", "--warm-together", "0"], "--warm-together 1 or more"),
        (["softmax", "--device", "cuda"], "NVIDIA GPU"),
        (["softmax", "--preset", "nonsense"], "nonsense"),
        (["softmax", "--plan", "p"], "two arms"),
        (["softmax", "--target", "3.1"], "--target"),
        (["softmax", "diff_v2", "--plan", "a/b"], "--plan NAME"),
    ],
)
def test_refused_before_anything_runs(text_data, tmp_path, sittings, capsys, words, message):
    if words == ["softmax", "--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    argv = ["--blocks", "1", "--out", str(tmp_path / "out"), *flags_of(text_data), *words]
    arms = [w for w in words if not w.startswith("-") and words.index(w) < 2]
    argv = [*arms, *[w for w in argv if w not in arms]]
    assert message in refused(argv, capsys)
    assert not sittings and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["softmax"], ["--blocks", "1"], ["softmax", "--blocks", "1", "--run-id", "x"]]
)
def test_a_wrong_command_line(words, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main(words)
    assert error.value.code == 2
    capsys.readouterr()


def test_arms_may_stand_anywhere(compared, tmp_path, sittings):
    """Also between flags that compare does not know itself."""
    out, line = copied(compared, tmp_path)
    softmax, loud, *rest = line
    assert compare.main(["--blocks", "4", softmax, *rest, loud]) == 0
    assert sittings[0][0].arms == [softmax, loud]


def test_a_folder_of_something_else(compared, tmp_path, sittings, capsys, monkeypatch):
    out, line = copied(compared, tmp_path)
    line += ["--blocks", "2"]
    tree = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "arms" in refused([*line, "diff_v2"], capsys)
    assert "track" in refused([*line, "--track", "other"], capsys)
    assert "matrix_lr" in refused([*line, "--matrix-lr", "0.01"], capsys)
    assert "seed 0" in refused([*line, "--seed0", "3"], capsys)
    assert "data_seed 0" in refused([*line, "--vary-data"], capsys)
    assert "tokens 2048" in refused([*line, "--tokens", "1024"], capsys)
    assert "fraction" in refused([*line, "--fractions", "50", "100"], capsys)
    assert "plan" in refused([*line, "--plan", "late", "--no-final-val"], capsys)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == tree
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "something else" in refused([*line, "--out", str(other)], capsys)
    (out / "code" / "train_gpt.py").write_text("older")
    assert "restore it" in refused(line, capsys)
    assert not sittings
    monkeypatch.setattr(folder.time, "sleep", lambda s: None)
    with folder.locked(out):
        assert "in use" in refused(line, capsys)


def test_what_is_whole(compared, tmp_path, sittings, capsys):
    """A whole block stays; of a cut one everything is rerun; an edited log is refused."""
    out, line = copied(compared, tmp_path)
    line += ["--blocks", "2"]
    assert compare.main(line) == 0 and not sittings, "nothing is missing"
    log = out / "b02_softmax" / "run.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"loss": 5', '"loss": 4'))
    assert "edited after the run" in refused(line, capsys)
    log.write_text(text[: len(text) // 2])  # the machine stopped within a line
    assert compare.main(line) == 0
    _, _, _, whole, left = sittings.pop()
    assert set(whole) == {1} and {p.name for p in left} == {"b02_softmax", "b02_mine-Loud"}
    folder.set_aside(out, left)
    left[0].mkdir()
    folder.set_aside(out, left[:1])
    names = {p.name for p in (out / "aside").iterdir()}
    assert names == {"b02_softmax.broken-1", "b02_mine-Loud.broken-1", "b02_mine-Loud.broken-2"}
    assert run_ids(out) == {"b01_softmax", "b01_mine-Loud"}


def test_a_block_is_of_one_sitting(compared, tmp_path, sittings):
    out, line = copied(compared, tmp_path)
    run = out / "b01_softmax" / "run.jsonl"
    h, rows = "", []
    for row in map(json.loads, run.read_text().splitlines()):
        row.pop("h")
        if row["t"] == "header":
            row["labels"]["sitting"] = "another"
        body = json.dumps(row)
        h = logs.chain(body, h)
        rows.append(f'{body[:-1]}, "h": "{h}"}}\n')
    run.write_text("".join(rows))
    assert compare.main([*line, "--blocks", "2"]) == 0
    _, _, _, whole, left = sittings.pop()
    assert set(whole) == {2} and {p.name for p in left} == {"b01_softmax", "b01_mine-Loud"}


# ---- the order, the controls, the plan ----------------------------------------------------------


def comparison_of(data: Path, *words: str, **changes) -> comparison.Comparison:
    return comparison.make_comparison(
        *compare.parse([*words, "--blocks", "6", *flags_of(data, **changes)])
    )


def test_order_turns(text_data):
    c = comparison_of(text_data, "softmax", "diff_v1", "diff_v2")
    places = [[job.arm for job in c.jobs(block)] for block in range(1, 7)]
    for place in zip(*places):
        assert sorted(place) == sorted(c.arms * 2), "every arm has every place as often"
    assert places[0] == ["softmax", "diff_v1", "diff_v2"] == places[3]


def test_fractions_stand_side_by_side(text_data):
    c = comparison_of(text_data, "softmax", "diff_v2", "--fractions", "50", "100", "120")
    assert c.budgets == {50: 1024, 100: 2048, 120: 2457} and c.trained[120] == 2304
    jobs = c.jobs(2)
    assert [job.order for job in jobs] == list(range(6))
    assert [job.fraction for job in jobs] == [50, 50, 100, 100, 120, 120]
    assert [job.arm for job in jobs] == [
        *("diff_v2", "softmax"),
        *("softmax", "diff_v2"),
        *("diff_v2", "softmax"),
    ]
    assert {job.run_id for job in jobs} >= {"b02_softmax_f50", "b02_diff_v2_f120"}
    assert len({job.run_id for block in (1, 2) for job in c.jobs(block)}) == 12
    assert {job.seed for job in jobs} == {1} and {job.data_seed for job in jobs} == {0}


def test_seeds(text_data):
    c = comparison_of(text_data, "softmax", "--seed0", "7", "--vary-data", "--data-seed", "2")
    assert [c.seeds(block) for block in (1, 2, 3)] == [(7, 3), (8, 4), (9, 5)]
    c = comparison_of(text_data, "softmax", "--data-seed", "2")
    assert [c.seeds(block) for block in (1, 2)] == [(0, 2), (1, 2)]


def matrix_parameters(arm: str, preset: str, **changes) -> int:
    with torch.device("meta"):
        model = T.GPT(T.make_config(preset, arm=arm, vocab=50_257, **changes).model, 128)
    return sum(p.numel() for p in model.parameters() if p.group == "matrix")


@pytest.mark.parametrize(
    "preset, arm, control",
    [
        ("plain", "diff_v2,form=full", "softmax,mlp=3456"),
        ("r28", "diff_v2,form=full,layers=0+4+11", "softmax,mlp=3456,mlp_layers=0+4+11"),
        ("plain", "diff_v2,form=full,window2=128,qk_norm=false", "softmax,mlp=3456,qk_norm=false"),
        ("plain", "diff_v2,form=full,mlp=1024", "softmax,mlp=1408"),
        ("plain", "diff_v2,form=full,qk_dim=64", "softmax,mlp=3264,qk_dim=64"),
        ("demo", "diff_v2,form=full", "softmax,mlp=576"),
        (
            "plain",
            "diff_v2,form=full,selective=true,layers=0+4",
            "selective,mlp=3456,layers=0+4",
        ),
    ],
)
def test_control(preset, arm, control):
    assert comparison.control_of(T.make_config(preset, arm=arm)) == control
    assert matrix_parameters(arm, preset) == matrix_parameters(control, preset)
    plain = "softmax,mlp=1024" if "mlp=1024" in arm else control.partition(",")[0]
    plain += ",qk_dim=64" * ("qk_dim" in arm)
    assert matrix_parameters(arm, preset) > matrix_parameters(plain, preset)


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2", "diff_v2,form=light+"])
def test_no_control_needed(arm):
    assert comparison.control_of(T.make_config("plain", arm=arm)) is None


def test_selective_arms_are_accepted(text_data, capsys):
    arms = ("softmax", "diff_v2", "selective", "diff_v2,selective=true")
    c = comparison_of(text_data, *arms)
    comparison.check_causality(c)
    assert f"causal in everything: {', '.join(arms)}" in capsys.readouterr().out


def test_controls_join_the_blocks(text_data, capsys):
    full, control = "diff_v2,form=full", "softmax,mlp=144"
    c = comparison_of(text_data, "softmax", full, "diff_v1")
    assert c.arms == ["softmax", full, "diff_v1", control]
    assert f"{control} joins every block: the control of {full}" in capsys.readouterr().out
    assert c.pairs() == [[full, control], ["diff_v1", "softmax"]]
    c = comparison_of(text_data, "selective,mlp=144", full, "softmax")
    assert c.arms[-1] == control and c.controls == {full: control}
    capsys.readouterr()
    c = comparison_of(text_data, control, full, "softmax")
    assert c.arms == [control, full, "softmax"] and "joins" not in capsys.readouterr().out
    with pytest.raises(T.InputError, match="no control"):
        comparison_of(text_data, "diff_v2,form=full,mlp=64,mlp_layers=1")


def git(where: Path, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(where), *who, *words], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_plan_is_committed_first(text_data, tmp_path, sittings, capsys):
    repo = tmp_path / "repo"
    repo.mkdir()
    out = repo / "records" / "planned"
    line = ["softmax", "diff_v2", "--plan", "does-it", "--blocks", "5", "--out", str(out)]
    line += flags_of(text_data, track="demo")
    assert "needs git" in refused(line, capsys)
    git(repo, "init", "-q")
    (repo / ".gitignore").write_text("ignored/\n")
    ignored = ["--out" if w == "--out" else w.replace("records", "ignored") for w in line]
    assert "git ignores" in refused(ignored, capsys)

    assert compare.main(line) == 0
    assert "git add" in capsys.readouterr().out and not sittings
    plan = json.loads((out / "plan.json").read_text())
    assert plan["rule"] == {
        **{"test": "paired t, one-sided", "alpha": 0.01, "alternative": "less"},
        **{"threshold": 0.0, "compare": [["diff_v2", "softmax"]]},
    }
    assert plan["seeds"] == [0, 1, 2, 3, 4] and plan["data_seeds"] == [0] * 5
    assert (plan["tokens"], plan["fractions"], plan["blocks"]) == ([2048], [100], 5)
    assert (plan["metric"], plan["baseline"]) == ("val_loss_ext", "softmax"), "a plan opens val"
    assert plan["source_sha256"] == {"train_gpt.py": T.sha256(H.ROOT / "train_gpt.py")}
    assert json.loads((out / "claim.json").read_text())["kind"] == "improvement"

    git(repo, "commit", "-q", "--allow-empty", "-m", "before")
    assert "commit it first" in refused(line, capsys)
    git(repo, "add", ".")
    assert "commit it first" in refused(line, capsys)
    git(repo, "commit", "-q", "-m", "plan")
    assert compare.main(line) == 0 and len(sittings) == 1, "now it runs"

    assert "blocks 5, now 6" in refused([*line, "--blocks", "6"], capsys)
    assert "'matrix_lr': 0.07" in refused([*line, "--matrix-lr", "0.07"], capsys)
    assert "metric" in refused([*line, "--no-final-val"], capsys)
    without = [w for w in line if w not in ("--plan", "does-it")]
    assert "has a plan" in refused(without, capsys)
    (out / "plan.json").write_text((out / "plan.json").read_text() + "\n")
    assert "commit it first" in refused(line, capsys)
    (out / "plan.json").write_text(json.dumps(plan | {"blocks": 4}))
    assert "plans something else: blocks 4, now 5" in refused(line, capsys)
    assert len(sittings) == 1

    record = ["softmax", "--plan", "fast", "--target", "3.2", "--blocks", "5"]
    record += [*flags_of(text_data, track="demo"), "--out", str(repo / "record")]
    assert compare.main(record) == 0 and len(sittings) == 1
    rule = json.loads((repo / "record" / "plan.json").read_text())["rule"]
    assert (rule["test"], rule["threshold"]) == ("one-sample t, one-sided", 3.2)
    claim = json.loads((repo / "record" / "claim.json").read_text())
    assert [claim[k] for k in ("kind", "target", "baseline")] == ["record", 3.2, None]


def test_the_folders_name(text_data, tmp_path, monkeypatch):
    """By the plan or the arms, and the same one on another day."""
    monkeypatch.chdir(tmp_path)
    c = comparison_of(text_data, "softmax", "diff_v2,form=light+")
    name = folder.place(None, "", c)
    assert name.parent == Path("runs")
    assert name.name.endswith("_compare_demo_softmax_diff_v2,form=light+")
    name.with_name("2020-01-01" + name.name[10:]).mkdir(parents=True)
    assert folder.place(None, "", c).name.startswith("2020-01-01")
    with pytest.raises(T.InputError, match="--track"):
        folder.place(None, "planned", c)
    c = comparison_of(text_data, "softmax", track="demo")
    assert folder.place(None, "planned", c).parent == H.ROOT / "records" / "demo"
    assert folder.place(Path("here"), "planned", c) == Path("here")


# ---- variants, the table ------------------------------------------------------------------------


def test_a_variants_preset(text_data, tmp_path):
    """gpt2 runs in a worker as it does by itself; the header and code/ have its file."""
    small = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0, 1)}
    argv = ["--preset", "gpt2", "--n-layer", "2", "--d-model", "32", "--n-head", "2"]
    argv += ["--head-dim", "16", "--long-layers", "0+1", "--device", "cpu", "--no-require-gpu"]
    argv += ["--row-tokens", "32", "--val-row-tokens", "64", "--val-call-tokens", "256"]
    argv += ["--stages", "1.0:256:1.0:128-128", "--no-compile", "--looks", "0"]
    argv += ["--tokens", "1024", "--data", str(text_data), "--dev-tokens", "512"]
    c = comparison.make_comparison(*compare.parse(["softmax", "diff_v2", "--blocks", "1", *argv]))
    assert set(c.code) == {"train_gpt.py", "variants/gpt2.py"}
    comparison.check_causality(c)
    trainer = worker.make_trainer([*c.flags, "--arm", "diff_v2", "--out", str(tmp_path)])
    said = worker.ready(trainer)
    assert said["source_sha256"]["variant"] == T.sha256(c.code["variants/gpt2.py"])
    command = {"seed": 3, "data_seed": 0, "tokens": 512, "run_id": "one"}
    command["labels"] = {}
    assert worker.run(trainer, command)["tokens"] == 512
    header = logs.load_run(tmp_path / "one").header
    assert header["source_sha256"] == said["source_sha256"] and header["seed"] == 3
    assert type(trainer.model).__name__ == "GPT2" and trainer.model.cfg.n_layer == small["n_layer"]


def test_the_table_is_redrawn_on_a_terminal(text_data, compared, monkeypatch, capsys):
    c = comparison_of(text_data, "softmax", "diff_v2")
    jobs = [job for block in (1, 2) for job in c.jobs(block)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table = compare.Table(c, jobs)
    table.working(jobs[0], compared[0] / "b01_softmax" / "run.jsonl")
    said = capsys.readouterr().out
    assert said.endswith("?") and "\r\033[K    1/6  softmax" in said and "step 8" in said
    end = {"train_s": 0.4, "tokens_per_s": 5120.0, "dev_loss": 4.25}
    table.done(jobs[0], end, seconds=10.0)
    assert capsys.readouterr().out.split()[-6:] == ["%", "4.2500", "50.0", "5,120", "30", "s"]
    table.done(jobs[1], end, seconds=600.0)
    assert table.to_go() == "10 min", "each arm at its own pace"
    assert [compare.duration(s) for s in (59, 600, 7200)] == ["59 s", "10 min", "2.0 h"]
