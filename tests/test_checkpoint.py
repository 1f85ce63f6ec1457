"""A run that stops and goes on is, to the bit on the CPU, the run that never stopped: losses,
parameters, optimizer state and log. And nothing half-written or damaged is ever used."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import threading

import helpers as H
import pytest
import torch

T = H.T
STAGES = (T.Stage(0.5, 256, 1.0, (128, 256)), T.Stage(0.5, 512, 1.5, (256, 512)))  # 6 + 6 steps


def config(data, out, **changes) -> T.Config:
    base = {"stages": STAGES, "tokens": 256 * 18, "data_seed": 3, "looks": 3, "keep": 20}
    base |= {"save_every": 1, "save_final": True, "run_id": "whole", "arm": "diff_v2"}
    return H.tiny(data, out, **{**base, **changes})


def state_of(folder) -> dict:
    return T.load_checkpoint(folder)[0]


def assert_same(a, b, where="state"):
    """Nested dicts of tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert a.dtype == b.dtype and torch.equal(a, b), where


def without_times(run, kinds=("step", "val")) -> list[dict]:
    drop = {"train_s", "ms", "h"}
    lines = [line for line in H.read_log(run) if line["t"] in kinds]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.fixture(scope="module")
def whole(text_data, tmp_path_factory):
    """A run of 12 steps over two stages, with a checkpoint after each; never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    T.train(config(text_data, out))
    return out / "whole"


def copy_until(whole, out, step: int):
    """The run folder as it was after `step` steps, plus what was logged later."""
    run = out / "whole"
    run.mkdir(parents=True)
    for name in ("run.log", "run.jsonl"):
        (run / name).write_bytes((whole / name).read_bytes())
    name = f"ckpt/step_{step:08d}"
    (run / name).mkdir(parents=True)
    for path in (whole / name).iterdir():
        (run / name / path.name).write_bytes(path.read_bytes())
    return run


def test_what_a_checkpoint_holds(whole):
    saved = sorted(p.name for p in (whole / "ckpt").iterdir())
    assert saved == [f"step_{i:08d}" for i in range(1, 13)]
    assert {p.name for p in (whole / "ckpt" / saved[0]).iterdir()} == {
        *("state.pt", "meta.json", "DONE")
    }
    state, meta = T.load_checkpoint(whole / "ckpt" / saved[6])
    assert (meta["step"], meta["tokens"]) == (7, 6 * 256 + 512)
    assert meta["sha256"] == T.sha256(whole / "ckpt" / saved[6] / "state.pt")
    assert {"config", "train_s", "log", "h", "window", "arm", "schema"} <= set(meta)
    names = {n for n, _ in T.GPT(T.config_from_flat(meta["config"]).model, 64).named_parameters()}
    assert set(state["model"]) == set(state["optimizer"]) == names, "per-layer logical names"


@pytest.mark.parametrize("step", range(1, 13), ids=lambda s: f"from-{s}")
def test_resume_is_bitwise(whole, text_data, tmp_path, step):
    """From every step: while the window grows, at the transition to larger steps (6), around the
    looks (4, 8), in the cooldown, and where only the end is left (12)."""
    run = copy_until(whole, tmp_path, step)
    result = T.train(config(text_data, tmp_path, resume=str(run)))
    assert_same(state_of(run / "ckpt/step_00000012"), state_of(whole / "ckpt/step_00000012"))
    assert without_times(run) == without_times(whole)
    assert result["status"] == "done" and result["tokens"] == 256 * 18
    assert H.chain_breaks(run) == []
    events = H.read_log(run, "event")
    assert [e["kind"] for e in events] == ["resume"] and str(step) in events[0]["text"]
    assert len(H.read_log(run, "header")) == len(H.read_log(run, "end")) == 1
    text = (run / "run.log").read_text()
    for i in range(1, 13):
        assert text.count(f"\nstep:{i}/12 loss") == 1, "lines after the checkpoint are cut off"


def test_state_after_the_resumed_steps_is_bitwise_too(whole, text_data, tmp_path):
    """Not the end alone: each later checkpoint is the same, optimizer and generator included."""
    run = copy_until(whole, tmp_path, 5)
    T.train(config(text_data, tmp_path, resume=str(run / "ckpt/step_00000005")))
    for step in range(6, 13):
        name = f"ckpt/step_{step:08d}"
        assert_same(state_of(run / name), state_of(whole / name), name)


def test_garbage_after_the_checkpoint_is_cut_off(whole, text_data, tmp_path):
    """A kill leaves half a line; the log goes on from where the checkpoint says."""
    run = copy_until(whole, tmp_path, 8)
    for name in ("run.log", "run.jsonl"):
        with (run / name).open("a") as f:
            f.write('{"t": "step", "step": 99, "lo')
    T.train(config(text_data, tmp_path, resume=str(run)))
    assert H.chain_breaks(run) == []
    assert without_times(run) == without_times(whole)


# A process of its own (whose torch generator starts elsewhere than pytest's, hence "rng" below).
CHILD = """
import os, signal, sys, time
import torch
import train_gpt as T
torch.set_num_threads(1)

def after_step(trainer, step):
    if step.index == 6:  # after 7 steps, in the second stage
        due = trainer.folder / "ckpt" / "step_00000006"
        while trainer.cfg.run.save_every and not due.exists():  # a thread writes it
            time.sleep(0.01)
        os.kill(os.getpid(), signal.{signal})

sys.exit(T.main(sys.argv[1:], lambda cfg: T.Hooks(after_step=after_step)))
"""


def argv_of(data, out, **changes) -> list[str]:
    return H.argv_of(config(data, out, **changes))


def run_child(which: str, data, out, **changes) -> subprocess.CompletedProcess:
    file = out / "child.py"
    file.write_text(CHILD.format(signal=which))
    return H.run_forked(argv_of(data, out, **changes), file)


def test_sigterm_saves_and_exits_75(whole, text_data, tmp_path):
    """No checkpoint is due, and yet one is there; going on is bitwise."""
    done = run_child("SIGTERM", text_data, tmp_path, save_every=0)
    assert done.returncode == 75, done.stderr
    run = tmp_path / "whole"
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    (saved,) = (run / "ckpt").iterdir()
    assert saved.name == "step_00000008", "the signal is heeded at the end of the next step"
    (end,) = H.read_log(run, "end")
    assert (end["status"], end["code"], end["tokens"]) == ("signal", 75, 6 * 256 + 2 * 512)
    assert H.chain_breaks(run) == []
    assert "--resume" in (run / "run.log").read_text()
    assert T.main([*argv_of(text_data, tmp_path, save_every=0), "--resume", str(run)]) == 0
    assert without_times(run) == without_times(whole)
    assert_same(*({k: v for k, v in state_of(r).items() if k != "rng"} for r in (run, whole)))
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert [e["status"] for e in H.read_log(run, "end")] == ["done"]
    assert H.chain_breaks(run) == []


def test_kill_9_loses_nothing_but_the_steps_since(whole, text_data, tmp_path):
    done = run_child("SIGKILL", text_data, tmp_path, save_every=3)
    assert done.returncode == -signal.SIGKILL
    run = tmp_path / "whole"
    assert [s["step"] for s in H.read_log(run, "step")] == list(range(1, 8))
    assert T.find_checkpoint(run).name == "step_00000006"
    T.train(config(text_data, tmp_path, save_every=3, resume=str(run)))
    assert without_times(run) == without_times(whole)
    assert_same(*({k: v for k, v in state_of(r).items() if k != "rng"} for r in (run, whole)))
    assert H.chain_breaks(run) == []


@pytest.fixture(autouse=True)
def signals():
    """main() installs handlers; they are none of the next test's business."""
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


# ---- what must not be used ----------------------------------------------------------------------


def test_an_incomplete_folder_is_ignored(whole, tmp_path):
    run = copy_until(whole, tmp_path, 4)
    for name in ("step_00000009", ".step_00000010.123", "step_x"):
        (run / "ckpt" / name).mkdir()
        (run / "ckpt" / name / "state.pt").write_bytes(b"half")
    assert T.find_checkpoint(run).name == "step_00000004"
    (run / "ckpt/step_00000004/DONE").unlink()
    with pytest.raises(T.InputError, match="no whole checkpoint"):
        T.find_checkpoint(run)
    with pytest.raises(T.InputError, match="no whole checkpoint"):
        T.find_checkpoint(tmp_path / "nothing")


def test_a_save_that_dies_leaves_the_last_one(tmp_path, monkeypatch):
    """Whatever the moment: before the rename nothing of the new one is to be seen."""
    state, meta = {"model": {"w": torch.arange(4.0)}}, {"step": 1}
    T.save_checkpoint(tmp_path / "ckpt", state, meta, 3)

    def die(*_):
        raise KeyboardInterrupt

    for target, name in ((T.torch, "save"), (T.os, "fsync"), (T.os, "rename"), (T, "sha256")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, die)
            T.save_checkpoint(tmp_path / "ckpt", state, {"step": 2}, 3)
        assert T.find_checkpoint(tmp_path).name == "step_00000001"
        assert_same(T.load_checkpoint(tmp_path)[0], state)
    T.save_checkpoint(tmp_path / "ckpt", state, {"step": 2}, 3)  # leftovers do not hinder the next
    assert T.find_checkpoint(tmp_path).name == "step_00000002"


def kill_in(name: str, folder) -> None:
    """A process of its own that saves step 2 and is killed, as by kill -9, in one function."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        owner, _, attribute = name.rpartition(".")
        setattr({"": T, "os": os, "torch": torch, "shutil": shutil}[owner], attribute, die)
        T.save_checkpoint(folder / "ckpt", {"w": torch.full((4,), 2.0)}, {"step": 2}, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("moment", ["torch.save", "sha256", "os.fsync", "os.rename", "T", "rmtree"])
def test_kill_9_at_any_moment_of_saving(tmp_path, moment):
    """The old one until the rename, the new one after; what is left over goes with the next."""
    T.save_checkpoint(tmp_path / "ckpt", {"w": torch.ones(4)}, {"step": 1}, 1)
    name = {"T": "write_checkpoint", "rmtree": "whole_checkpoints"}.get(moment, moment)
    kill_in(name, tmp_path)
    state, meta = T.load_checkpoint(tmp_path)
    assert meta["step"] == (2 if moment == "rmtree" else 1)
    assert state["w"].tolist() == [float(meta["step"])] * 4
    T.save_checkpoint(tmp_path / "ckpt", {"w": torch.ones(4)}, {"step": 3}, 1)
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_00000003"]


def hurt(folder, damage: str) -> None:
    raw = bytearray((folder / "state.pt").read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        (folder / "state.pt").write_bytes(raw)
    elif damage == "cut":
        (folder / "state.pt").write_bytes(raw[:-100])
    elif damage == "missing state":
        (folder / "state.pt").unlink()
    elif damage == "bad meta":
        (folder / "meta.json").write_text("{")
    elif damage == "edited meta":
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text.replace('"step": 4', '"step": 5'))
    else:
        (folder / "meta.json").unlink()


DAMAGE = ["flip", "cut", "missing state", "bad meta", "edited meta", "missing meta"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_damaged_ones_the_newest_whole_one_is_used(whole, text_data, tmp_path, capsys, damage):
    """And the message says so; going on from there is bitwise."""
    run = copy_until(whole, tmp_path, 4)
    shutil.copytree(whole / "ckpt/step_00000003", run / "ckpt/step_00000003")
    shutil.copytree(whole / "ckpt/step_00000004", run / "ckpt/step_00000009")
    hurt(run / "ckpt/step_00000004", damage)
    hurt(run / "ckpt/step_00000009", "cut")
    assert T.load_checkpoint(run)[1]["step"] == 3
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("using" in e and "step_00000003" in e for e in err)
    T.train(config(text_data, tmp_path, resume=str(run)))
    events = H.read_log(run, "event")
    assert [e["kind"] for e in events] == ["warning", "warning", "resume"]
    assert "step_00000009" in events[0]["text"] and "step_00000004" in events[1]["text"]
    assert "step_00000003" in events[2]["text"]
    assert_same(state_of(run), state_of(whole))
    assert without_times(run) == without_times(whole)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(whole, text_data, tmp_path, capsys, damage):
    """Where there is no other: in one sentence with exit code 2, and the logs stay as they were."""
    run = copy_until(whole, tmp_path, 4)
    folder = run / "ckpt/step_00000004"
    hurt(folder, damage)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert T.main([*argv_of(text_data, tmp_path), "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert str(folder) in err and ("damaged" in err or "no checkpoint" in err), err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("inside", ["", "ckpt/step_00000004"])
def test_another_name_is_refused(whole, text_data, tmp_path, capsys, inside):
    """A resumed run keeps its folder: in one sentence with exit code 2, and nothing is written."""
    run = copy_until(whole, tmp_path, 4)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    argv = argv_of(text_data, tmp_path, run_id="new")
    assert T.main([*argv, "--resume", str(run / inside)]) == T.EXIT_CODES["input"] == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--run-id new: --resume goes on in" in err, err
    assert str(run.resolve()) in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["", "whole", "link"])
def test_its_own_name_is_none_other(whole, text_data, tmp_path, name):
    """No name, the folder's, or that of a link to it, as a restarted worker has it."""
    run = copy_until(whole, tmp_path, 12)
    (tmp_path / "link").symlink_to(run)
    cfg = config(text_data, tmp_path, run_id=name, resume=str(tmp_path / (name or "whole")))
    T.check_folders(cfg.run)


def test_other_settings_are_refused(whole, text_data, tmp_path, capsys):
    """All that differs is named; what may differ (how a step is cut, where, what the preset is
    called today) is not."""
    run = copy_until(whole, tmp_path, 4)
    argv = argv_of(text_data, tmp_path, matrix_lr=0.5, arm="softmax", seed=9)
    assert T.main([*argv, "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    for part in ("matrix_lr", "arm 'diff_v2', now 'softmax'", "seed 0, now 9"):
        assert part in err, err
    cfg = config(text_data, tmp_path, micro_batch_tokens=128, looks=0, keep=1, resume=str(run))
    T.train(cfg.with_(preset="plain"))
    a, b = H.losses(run), H.losses(whole)
    assert a[:4] == b[:4] and a == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("name", ["mlp_kernel", "loss_kernel", "deterministic"])
def test_other_kernels_are_refused(whole, text_data, tmp_path, name):
    """A run that goes on with other arithmetic is another run."""
    run = copy_until(whole, tmp_path, 4)
    trainer = T.Trainer(config(text_data, tmp_path, resume=str(run)))
    now = not getattr(trainer.cfg.run, name)  # set here: the mode would be the whole process's
    trainer.cfg = trainer.cfg.with_(**{name: now})
    with pytest.raises(T.InputError, match=f"{name} {not now}, now {now}"):
        trainer.run()


def change_settings(checkpoint, *lacks, **has) -> None:
    """The checkpoint as one was saved before some settings existed, or while others did."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    for name in lacks:
        del meta["config"][name]
    meta["config"] |= has
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    (checkpoint / "DONE").write_text(T.sha256(checkpoint / "meta.json"))


def test_what_an_old_checkpoint_lacks_was_off(whole, text_data, tmp_path, capsys):
    run = copy_until(whole, tmp_path, 4)
    change_settings(run / "ckpt/step_00000004", "smear", "selective")
    assert T.main([*argv_of(text_data, tmp_path, smear=True), "--resume", str(run)]) == 2
    assert "smear False, now True" in capsys.readouterr().err
    change_settings(run / "ckpt/step_00000004", "mlp_kernel")  # on by default, and was not
    on = [*argv_of(text_data, tmp_path, mlp_kernel=True), "--resume", str(run)]
    assert T.main(on) == 2 and "mlp_kernel False, now True" in capsys.readouterr().err
    T.train(config(text_data, tmp_path, resume=str(run), mlp_kernel=False))
    assert without_times(run) == without_times(whole)


def test_a_setting_that_was_deleted_since_must_have_been_off(whole, text_data, tmp_path, capsys):
    """Resumed or only loaded; refused before the logs are touched."""
    run = copy_until(whole, tmp_path, 4)
    folder, argv = run / "ckpt/step_00000004", argv_of(text_data, tmp_path)
    change_settings(folder, mtp=True)
    assert T.main([*argv, "--resume", str(run)]) == 2
    assert f"{folder} has mtp True, which was deleted since: use" in capsys.readouterr().err
    assert without_times(run) == without_times(whole)
    with pytest.raises(T.InputError, match=f"^{run} has mtp True, which was deleted since: use"):
        T.load_model(run)
    change_settings(folder, mtp=False, fused_update=True)
    T.load_model(run)
    T.train(config(text_data, tmp_path, resume=str(run)))
    assert without_times(run) == without_times(whole)


def test_fallbacks_are_said_again(text_data, tmp_path, monkeypatch):
    """Where it goes on may be another machine than where it began."""
    monkeypatch.setattr(T, "choose_kernels", lambda *_: {"mlp_kernel": "broken here"})
    cfg = config(text_data, tmp_path, save_every=6)
    T.train(cfg)
    run = tmp_path / "whole"
    shutil.rmtree(run / "ckpt/step_00000012")
    T.train(cfg.with_(resume=str(run)))
    said = [(e["kind"], e["text"].partition(":")[0]) for e in H.read_log(run, "event")]
    assert said[0] == said[-1] == ("fallback", "mlp_kernel")
    assert [kind for kind, _ in said] == ["fallback", "resume", "fallback"]


def test_other_data_is_refused(whole, text_data, tmp_path, capsys):
    """The same settings over another text: not the same run."""
    run = copy_until(whole, tmp_path, 4)
    texts = [t[::-1] for t in H.docstrings(60_000)]
    data = H.write_corpus(tmp_path / "d", {s: [H.tokens_of(texts)] for s in T.SPLITS})
    assert T.main([*argv_of(data, tmp_path), "--resume", str(run)]) == 2
    assert "other files" in capsys.readouterr().err
    assert without_times(run) == without_times(whole)


def test_shortened_logs_are_refused(whole, text_data, tmp_path, capsys):
    """A log that does not reach to its checkpoint cannot be gone on with."""
    run = copy_until(whole, tmp_path, 9)
    os.truncate(run / "run.jsonl", 500)
    assert T.main([*argv_of(text_data, tmp_path), "--resume", str(run)]) == 2
    assert "run.jsonl is shorter" in capsys.readouterr().err


def test_what_is_refused_loses_nothing(whole, text_data, tmp_path):
    """Later checkpoints stay where the logs do not reach to the one that is asked for."""
    run = copy_until(whole, tmp_path, 5)
    shutil.copytree(whole / "ckpt", run / "ckpt", dirs_exist_ok=True)
    before = T.whole_checkpoints(run / "ckpt")
    os.truncate(run / "run.log", 100)
    line = [*argv_of(text_data, tmp_path), "--resume", str(before[1])]
    assert T.main(line) == 2 and T.whole_checkpoints(run / "ckpt") == before


def test_going_back_drops_the_later_checkpoints(whole, text_data, tmp_path):
    """From an older checkpoint: what came after it belongs to a run that does not happen."""
    run = copy_until(whole, tmp_path, 5)
    shutil.copytree(whole / "ckpt", run / "ckpt", dirs_exist_ok=True)
    cfg = config(text_data, tmp_path, save_every=0, resume=str(run / "ckpt/step_00000005"))
    T.train(cfg)
    saved = [int(p.name[5:]) for p in sorted((run / "ckpt").iterdir())]
    assert saved == [1, 2, 3, 4, 5, 12]
    assert_same(state_of(run), state_of(whole))


def test_the_one_just_saved_stays(tmp_path):
    """Beside later ones of another run whose logs somebody removed."""
    for step in (6, 8, 2):
        T.save_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"step": step}, keep=2)
    assert [p.name[-1] for p in T.whole_checkpoints(tmp_path)] == ["2", "6", "8"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keep(tmp_path, keep):
    for step in range(1, 8):
        T.save_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"step": step}, keep)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [f"step_{i:08d}" for i in range(8 - keep, 8)]


def test_keep_in_a_run(text_data, tmp_path):
    T.train(config(text_data, tmp_path, keep=2, save_every=4, looks=0, final_val=False))
    saved = sorted(p.name for p in (tmp_path / "whole" / "ckpt").iterdir())
    assert saved == ["step_00000008", "step_00000012"]


# ---- while training goes on ---------------------------------------------------------------------


def test_saving_does_not_hold_up_training(whole, text_data, tmp_path, monkeypatch):
    """The step that lets the writer go on comes after the save has begun; what is written is the
    state as it was then."""
    go, write, waited = threading.Event(), T.write_checkpoint, []

    def slow(*args):
        waited.append(go.wait(timeout=120))
        write(*args)

    def after_step(trainer, step):
        if step.index == 5:
            go.set()

    monkeypatch.setattr(T, "write_checkpoint", slow)
    cfg = config(text_data, tmp_path, save_every=4)
    T.train(cfg, hooks=T.Hooks(after_step=after_step))
    assert waited == [True, True, True]
    for step in (4, 8, 12):
        name = f"ckpt/step_{step:08d}"
        assert_same(state_of(tmp_path / "whole" / name), state_of(whole / name), name)
    text = (tmp_path / "whole" / "run.log").read_text()
    assert text.count("\nsaved ") == 3


def test_a_full_disk_does_not_end_the_run(whole, text_data, tmp_path):
    """A real refusal by the kernel, of files beyond a size, for the saves of steps 6 and 9."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("no RLIMIT_FSIZE here")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after_step(trainer, step):
        small = 60_000 if step.index in (5, 6, 7, 8) else old[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, old[1]))

    run = tmp_path / "whole"
    try:
        cfg = config(text_data, tmp_path, save_every=3, keep=2)
        result = T.train(cfg, hooks=T.Hooks(after_step=after_step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert result["status"] == "done"
    events = [e["text"] for e in H.read_log(run, "event") if e["kind"] == "warning"]
    assert len(events) == 2 and all("step_00000003 is the newest" in e for e in events)
    saved = sorted(p.name for p in (run / "ckpt").iterdir())
    assert saved == ["step_00000003", "step_00000012"], "nothing half-written is left"
    for name in saved:
        assert_same(state_of(run / "ckpt" / name), state_of(whole / "ckpt" / name), name)
    assert H.losses(run) == H.losses(whole) and H.chain_breaks(run) == []


@pytest.mark.parametrize("key, value", [("log", {}), ("log", 3), ("config", None), ("h", ...)])
def test_a_forged_meta_is_refused(whole, text_data, tmp_path, capsys, key, value):
    """Digests right, content not: exit code 2, not a traceback."""
    run = copy_until(whole, tmp_path, 4)
    folder = run / "ckpt/step_00000004"
    meta = json.loads((folder / "meta.json").read_text())
    meta[key] = value
    if value is ...:
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "DONE").write_text("")
    assert T.main([*argv_of(text_data, tmp_path), "--resume", str(run)]) == 2
    assert str(folder) in capsys.readouterr().err
    assert without_times(run) == without_times(whole)


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would touch a file is refused, whatever its digest says."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = T.save_checkpoint(tmp_path / "ckpt", {"w": Evil()}, {"step": 1}, 1)
    with pytest.raises(T.InputError, match="no checkpoint"):
        T.load_checkpoint(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/tmp/x"])
def test_a_run_cannot_be_written_outside(text_data, tmp_path, capsys, name):
    argv = [*H.tiny_argv(text_data, tmp_path / "runs"), "--run-id", name]
    assert T.main(argv) == 2
    assert "plain names" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- and what it is good for --------------------------------------------------------------------


def test_load_model(whole, text_data):
    """From a run folder or a checkpoint: ready to use, and it says what the log's loss says."""
    model, meta = T.load_model(whole)
    again, _ = T.load_model(whole / "ckpt" / "step_00000012")
    assert meta["step"] == 12 and not model.training
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    corpus = T.Corpus.open(str(text_data))
    cfg = T.config_from_flat(meta["config"])
    batch = T.make_batch(T.TokenStream(corpus.splits["dev"], corpus.eot), 0, 8, 64)
    window = T.windows(meta["window"], torch.device("cpu"))
    logits = model.logits(batch.tokens, batch.docs, window)
    assert logits.shape == (8, 64, H.BYTE_VOCAB)
    h = model(batch.tokens, batch.docs, window)
    z = T.softcap(h @ model.head.t(), cfg.model.softcap).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(z, batch.targets.flatten())
    said = [v["dev_loss"] for v in H.read_log(whole, "val") if v["split"] == "dev"][-1]
    assert float(loss.detach()) == pytest.approx(said, rel=1e-5)
