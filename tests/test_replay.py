"""records/replay.py: a filed run's first steps come out again, and a doctored log's do not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import helpers as H
import pytest
import tamper

from records import logs, replay
from variants import gpt2

T = H.T


def file_run(folder: Path, cfg: T.Config, hooks: T.Hooks | None = None) -> Path:
    """A record of one run, filed as compare does."""
    T.train(cfg.with_(out=str(folder), run_id="b01_run"), hooks=hooks)
    code = {"train_gpt.py": H.ROOT / "train_gpt.py"}
    if hooks:
        code["variants/gpt2.py"] = H.ROOT / "variants" / "gpt2.py"
    if ".py:" in cfg.model.arm:
        path = Path(cfg.model.arm.rpartition(":")[0])
        code[path.name] = path
    for name, path in code.items():
        (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "code" / name)
    return folder


@pytest.fixture(scope="module")
def filed(text_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("track") / "2026-01-01_tiny"
    return file_run(folder, H.tiny(text_data, "", seed=3, data_seed=2))


@pytest.fixture
def record(filed, tmp_path) -> Path:
    return shutil.copytree(filed, tmp_path / filed.name)


def test_a_filed_run_comes_out_again_to_the_bit(filed, capfd):
    before = {p: p.read_bytes() for p in filed.rglob("*") if p.is_file()}
    assert replay.main([str(filed), "--steps", "99"]) == 0  # it has 8
    out = capfd.readouterr().out
    table = out[out.index("step  filed loss") :].splitlines()
    assert [float(line.split()[1]) for line in table[1:9]] == H.losses(filed / "b01_run")
    assert [line.split()[3:] for line in table[1:9]] == [["+0.000000", "0.000000"]] * 8
    assert table[9].startswith("b01_run: agrees; 8 steps, largest difference 0.000000")
    assert "exact: a CPU, and the same machine" in table[9]
    assert {p: p.read_bytes() for p in filed.rglob("*") if p.is_file()} == before


def test_a_doctored_loss_disagrees(record, capfd):
    tamper.edit(record / "b01_run", "step", lambda row: row.update(loss=row["loss"] - 1e-5), 2)
    logs.load_run(record / "b01_run")  # the chain holds
    assert replay.main([str(record), "--steps", "4"]) == 1
    out = capfd.readouterr().out
    assert "b01_run: DISAGREES at step 3; 4 steps, largest difference 0.000010" in out
    assert [line for line in out.splitlines() if line.endswith("<-- disagrees")] == [
        line for line in out.splitlines() if line.startswith("   3  ")
    ]


@pytest.mark.long
def test_another_seed_disagrees(record, capfd):
    """The header does not say what ran."""

    def reseed(row):
        row["config"]["seed"] = row["seed"] = 4

    tamper.edit(record / "b01_run", "header", reseed)
    assert replay.main([str(record), "--steps", "3"]) == 1
    assert "DISAGREES at step 2" in capfd.readouterr().out  # at step 1 the head is still zero


@pytest.mark.parametrize("what", ["arm", "variant"])
def test_arms_of_users_and_variants(what, text_data, tmp_path, capfd):
    """Both import train_gpt, and must find the record's."""
    if what == "arm":
        arm = tmp_path / "elsewhere" / "mine.py"
        arm.parent.mkdir()
        shutil.copy(H.ARMS / "temperature.py", arm)
        cfg, hooks = H.tiny(text_data, "", arm=f"{arm}:Temperature,gate=false"), None
    else:
        small = H.tiny(text_data, "", backout=-1, value_tables=0).flat()
        same = ("n_layer", "d_model", "n_head", "head_dim", "row_tokens", "micro_batch_tokens")
        same += ("val_row_tokens", "val_call_tokens", "val_tokens", "dev_tokens", "tokens", "data")
        changes = {name: small[name] for name in same} | {"require_gpu": False, "device": "cpu"}
        stages = (T.Stage(1.0, 256, 1.0, (128, 128)),)
        changes |= {"stages": stages, "long_layers": (0, 1), "matrix_lr": 3e-3, "compile": False}
        cfg = T.make_config("gpt2", **changes, save_final=False, looks=1)
        hooks = gpt2.make_hooks(cfg)
    record = file_run(tmp_path / "2026-01-01_other", cfg, hooks)
    if what == "arm":
        arm.unlink()  # the record's own copy is all there is
        (record / "code" / "other.py").touch()  # of another run of the record
    assert replay.main([str(record), "--steps", "3"]) == 0
    assert "agrees; 3 steps, largest difference 0.000000" in capfd.readouterr().out


def test_refused_before_any_training(record, text_data, tmp_path, capfd):
    """Each with one sentence and exit code 2."""

    def said(*argv):
        assert replay.main([str(a) for a in argv]) == 2
        out, err = capfd.readouterr()
        assert "step:1/" not in out
        return err

    assert "is no folder of a record" in said(tmp_path)
    assert "has no run b09: b01_run" in said(record, "--run", "b09")
    assert "--steps 0: 1 or more" in said(record, "--steps", 0)
    gone = tmp_path / "gone"
    assert f"no folder of tokens {gone}" in said(record, "--data", gone)
    texts = [H.tokens_of(H.docstrings(20_000))]
    other = H.write_corpus(tmp_path / "other", dict.fromkeys(("train", "dev", "val"), texts))
    assert "does not hold the tokens" in said(record, "--data", other)
    with (record / "code" / "train_gpt.py").open("a") as f:
        f.write("# faster\n")
    assert "train_gpt.py: is not what b01_run ran" in said(record)
    log = record / "b01_run" / "run.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    assert "the hash chain is broken" in said(record)


# ---- What may differ ----------------------------------------------------------------------------


def make_run(losses, gpu=None, dtype="float32", host="a") -> logs.Run:
    env = {"host": host, "python": "3", "torch": "2", "cpu_threads": 1, "gpu": gpu}
    steps = [
        {"step": i, "loss": x, "tokens": 256 * i, "window": 128, "lr": 1.0}
        for i, x in enumerate(losses, 1)
    ]
    header = {"run_id": "r", "env": env, "dtype": dtype}
    return logs.Run(Path("r/run.jsonl"), header, tuple(steps), (), (), None)


@pytest.mark.parametrize(
    "gpu,dtype,host,off,agrees",
    [
        (None, "float32", "a", 1e-6, False),  # the same machine
        (None, "float32", "b", 1.9e-5, True),  # 1e-5 times step 2
        (None, "float32", "b", 2.1e-5, False),
        ("H100", "bfloat16", "a", 2.5e-3, True),  # 1.3e-3 times step 2, on the same card too
        ("H100", "bfloat16", "b", 2.7e-3, False),
    ],
)
def test_allowance(gpu, dtype, host, off, agrees):
    filed, here = make_run([5.0, 4.0], gpu, dtype), make_run([5.0, 4.0 + off], gpu, dtype, host)
    rows = replay.compare(filed, here, 2)
    assert [r.agrees for r in rows] == [True, agrees]
    assert ("agrees" in replay.verdict(filed, rows, "why").split("; ")[0].split()) == agrees


def test_allowance_of_filed_runs():
    """Two runs of one code on H100s agree, two arms do not."""
    folder = H.ROOT / "records" / "open-text"
    one, two, other = (
        logs.load_run(folder / f"2026-11-24_{name}")
        for name in ("two-gpus/w1a", "two-gpus/w2b", "first-block/half_diff_v2")
    )
    assert all(row.agrees for row in replay.compare(one, two, 20))
    wrong = [row.step for row in replay.compare(one, other, 6) if not row.agrees]
    assert wrong == [3, 4, 5, 6]


def test_another_schedule_is_no_agreement(monkeypatch, filed, capsys):
    run = make_run([5.0, 4.0, 3.0])
    short = dataclasses.replace(run, steps=run.steps[:1])
    with pytest.raises(replay.AnotherSchedule, match="logged 1 of 2 steps"):
        replay.compare(run, short, 2)
    faster = [{**s, "lr": s["lr"] * 0.5} for s in run.steps]
    with pytest.raises(replay.AnotherSchedule, match=r"step 1 has lr 1\.0 in the filed log, 0\.5"):
        replay.compare(run, dataclasses.replace(run, steps=tuple(faster)), 2)
    here = logs.load_run(filed / "b01_run")
    here = dataclasses.replace(here, steps=here.steps[:2])
    monkeypatch.setattr(replay, "rerun", lambda *_: here)
    assert replay.main([str(filed), "--steps", "3"]) == 1
    assert "replay: DISAGREES" in capsys.readouterr().err
