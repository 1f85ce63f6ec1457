"""The command line says everything that is wrong at once, in words, with exit code 2 and nothing
written; configs survive a round trip; the table of steps is what the stages say."""

from __future__ import annotations

import json
import math
import os
import re

import helpers as H
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

T = H.T


def refusal(argv: list[str], capsys) -> str:
    """The one sentence that main() prints as it refuses `argv` with exit code 2."""
    assert T.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_gpt.py: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


# ---- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--unknown-flag", "3"], ["unknown flag '--unknown-flag'", "stray word '3'"]),
        (["--look", "3"], ["unknown flag '--look'"]),  # no abbreviations
        (["hello"], ["stray word 'hello'"]),
        (["--preset", "nope"], ["no preset 'nope'", "speedrun, r28, plain, gpu24, demo"]),
        (["--looks", "many"], ["--looks 'many' is no int"]),
        (["--matrix-lr", "fast"], ["--matrix-lr 'fast' is no float"]),
        (["--matrix-lr", "nan"], ["--matrix-lr nan must be >= 0 and finite"]),
        (["--long-layers", "0+x"], ["--long-layers '0+x' is no tuple"]),
        (["--stages", "1:2"], ["--stages '1:2' is no SHARE:TOKENS"]),
        (
            ["--arm", "nonsense"],
            ["no arm 'nonsense'", "softmax, diff_v1, diff_v2, selective or path.py:Class"],
        ),
        (["--arm", "softmax,colour=red"], ["'colour=red' is no key=value"]),
        (["--arm", "softmax,mlp"], ["'mlp' is no key=value"]),
        (["--arm", "softmax,seed=3"], ["'seed=3' is no key=value"]),
        (["--arm", "softmax,mlp=wide"], ["--mlp 'wide' is no int"]),
        (["--arm", "diff_v2,form=heavy"], ["--form 'heavy'", "matched, full, light, light+"]),
        (["--arm", "diff_v2", "--n-head", "5"], ["matched needs an even --n-head"]),
        (["--arm", "diff_v1", "--n-head", "3", "--head-dim", "32"], ["3 heads of 32 do not split"]),
        (["--arm", "diff_v1", "--head-dim", "0"], ["--head-dim 0: 16 or more"]),
        (["--arm", "diff_v1", "--xsa"], ["--xsa"]),
        (["--arm", "diff_v2,layers=0+7", "--preset", "plain"], ["names blocks of --no-attention"]),
        (["--arm", "diff_v2,layers=0+44"], ["--layers names block [44], there are 0 to 3"]),
        (["--head-dim", "24", "--d-model", "100"], ["--d-model 100 must be a multiple of 16"]),
        (["--skip", "3"], ["--skip is from+to"]),
        (["--value-tables", "5"], ["--value-tables 5"]),
        (["--stages", "0.5:2048:1:256-256"], ["shares must sum to 1"]),
        (["--stages", "1:2052:1:256-256"], ["tokens by 8"]),
        (["--stages", "1:4104:1:256-256"], ["tokens are not whole rows of"]),
        (["--stages", "1:0:1:256-256"], ["tokens by 8"]),
        (["--stages", "1:2048:1:0-256"], ["windows must be > 0"]),
        (["--row-tokens", "0"], ["--row-tokens and --val-row-tokens must be > 0"]),
        (["--micro-batch-tokens", "0"], ["--micro-batch-tokens must be > 0"]),
        (["--val-call-tokens", "0"], ["--val-call-tokens: whole rows"]),
        (["--val-call-tokens", "300"], ["--val-call-tokens: whole rows"]),
        (["--dev-tokens", "0"], ["--dev-tokens and --val-tokens must be > 0"]),
        (["--looks", "21"], ["--looks 21: at most 20"]),
        (["--warmup", "0.9"], ["--warmup and --cooldown: together at most 1"]),
        (["--keep", "0"], ["--keep 1 or more"]),
        (["--softcap", "100"], ["--softcap 100.0: 80 or less"]),
        (["--device", "tpu"], ["--device 'tpu': auto, cuda or cpu"]),
        (["--dtype", "float16"], ["--dtype 'float16'"]),
        (["--muon-dtype", "int8"], ["--muon-dtype 'int8'"]),
        (["--run-id", "../x"], ["--run-id '../x': plain names"]),
        (["--grad-clip", "-1"], ["--grad-clip -1.0 must be >= 0"]),
    ],
    ids=lambda v: " ".join(v)[:40] if v and v[0].startswith(("-", "hello")) else "",
)
def test_bad_values(argv, parts, capsys):
    base = [] if "--preset" in argv else ["--preset", "demo"]
    message = refusal([*base, *argv], capsys)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("preset", ["speedrun", "demo"])
@pytest.mark.parametrize("name", T.MOST)
def test_an_absurd_size_is_refused_at_once(name, preset):
    """Also by what looks at every block: an arm that takes settings of the preset away, or gives
    its own to some blocks."""
    flag, most = f"--{name.replace('_', '-')}", T.MOST[name]
    for value in (most + 1, T.LARGEST, 10**30):
        for arm in ("softmax", "diff_v2", "diff_v1,paired=1"):
            with pytest.raises(T.InputError) as said:
                T.parse_args(["--preset", preset, "--arm", arm, flag, str(value)])
            assert f"{flag} {value} must be >= 0 and <= {most}" in str(said.value)
    assert not any(f"<= {most}" in p for p in T.check_config(T.make_config(preset, **{name: most})))


def test_all_bad_values_at_once(capsys):
    bad = {
        "--looks": "99",
        "--device": "tpu",
        "--n-head": "5",
        "--arm": "diff_v2,layers=44",
        "--keep": "0",
        "--stages": "0.7:2048:1:256-256",
        "--run-id": "a/b",
    }
    message = refusal(
        ["--preset", "demo", "--nonsense", *(w for pair in bad.items() for w in pair)], capsys
    )
    for word in ("--nonsense", "--looks", "--device", "--n-head", "--layers", "--keep"):
        assert word in message, word
    assert "shares must sum" in message and "--run-id" in message
    assert message.count(";") >= 7


def test_bad_texts_of_several_flags_at_once(capsys):
    message = refusal(["--preset", "demo", "--looks", "x", "--mlp", "y", "--keep", "0"], capsys)
    assert "--looks 'x'" in message and "--mlp 'y'" in message and "--keep" in message


def test_every_flag_named_in_a_message_exists():
    """What check_config tells a user to change must be a flag that the command line knows."""
    flags = {name.replace("_", "-") for name in T.FLAGS}
    cfg = T.make_config("demo", arm="diff_v2,form=x", layers=(99,), n_head=5, d_model=100)
    cfg = cfg.with_(head_dim=7, looks=99, device="z", dtype="z", keep=0, value_tables=9, skip=(1,))
    cfg = cfg.with_(backout=99, run_id="/", val_call_tokens=1, no_attention=(99,), grad_clip=-1.0)
    problems = T.check_config(cfg)
    assert len(problems) > 12
    for flag in re.findall(r"--([\w-]+)", " ".join(problems)):
        assert flag in flags, flag


def test_exit_code_of_the_process(tmp_path):
    """As a user meets it: a process of its own, no GPU, no data."""
    done = H.run_script(["--preset", "speedrun", "--out", str(tmp_path / "runs")])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = H.run_script(["--preset", "demo", "--looks"])  # argparse's own: a flag without its value
    assert done.returncode == 2 and "--looks" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        T.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for name, (_, field) in T.FLAGS.items():
        assert f"--{name.replace('_', '-')}" in text, name
        assert " ".join(field.metadata["help"].split()) in flat, name
        assert len(field.metadata["help"]) > 3, name
    for preset in T.PRESETS:
        assert preset in text
    for part in T.PARTS:
        assert f"\n{part}:" in text


# ---- GPU, data ----------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("preset", ["speedrun", "plain", "gpu24"])
def test_a_gpu_preset_without_a_gpu(no_gpu, preset, text_data, tmp_path, capsys):
    tokens = ["--stages", "1:131072:1:128-640", "--out", str(tmp_path / "runs")]
    message = refusal(["--preset", preset, "--data", str(text_data), *tokens], capsys)
    assert "no NVIDIA GPU here" in message and "--preset demo" in message
    assert not (tmp_path / "runs").exists()
    assert "no NVIDIA GPU here" in refusal(["--preset", preset], capsys), "before the data"
    cpu = refusal(["--preset", preset, "--device", "cpu", "--data", str(tmp_path)], capsys)
    assert "GPU" not in cpu and str(tmp_path) in cpu, "the user's own word"


def ramp(n: int) -> np.ndarray:
    return np.arange(n) % 250


def demo(folder, tmp_path) -> list[str]:
    return ["--preset", "demo", "--data", str(folder), "--out", str(tmp_path / "runs")]


def test_bad_data(tmp_path, capsys):
    """Each kind of bad folder in one sentence that names the file; nothing is written."""
    good = H.write_corpus(tmp_path / "good", {"train": [ramp(9000)], "val": [ramp(600)]})
    shard = good / "tokens_train_000000.bin"

    def broken(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for path in good.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        message = refusal(demo(folder, tmp_path), capsys)
        assert not (tmp_path / "runs").exists()
        return message

    assert "give --data DIR" in refusal(["--preset", "demo"], capsys)
    assert "no folder of tokens" in refusal(demo(tmp_path / "nowhere", tmp_path), capsys)
    (tmp_path / "empty").mkdir()
    assert "no train shards" in refusal(demo(tmp_path / "empty", tmp_path), capsys)

    name = shard.name
    said = broken("missing", lambda f: (f / name).unlink())
    assert "no shard" in said and name in said
    said = broken("magic", lambda f: H.write_shard(f / name, ramp(9000), magic=1))
    assert "is no token shard (magic 20240520" in said and name in said
    said = broken("version", lambda f: H.write_shard(f / name, ramp(9000), version=2))
    assert "is no token shard" in said
    said = broken("short header", lambda f: (f / name).write_bytes(b"\0" * 100))
    assert "is no token shard" in said
    said = broken("cut", lambda f: os.truncate(f / name, 1024 + 2 * 9000 - 7))
    assert "cut or padded" in said and str(1024 + 18_000 - 7) in said
    said = broken("long", lambda f: (f / name).write_bytes(shard.read_bytes() + b"xx"))
    assert "cut or padded" in said
    said = broken("other count", lambda f: H.write_shard(f / name, ramp(8999)))
    assert "disagree" in said
    said = broken("edited", lambda f: H.write_shard(f / name, ramp(9000)[::-1].copy()))
    assert "sha256" in said and name in said
    said = broken("bad json", lambda f: (f / "manifest.json").write_text("{"))
    assert "manifest.json is damaged" in said
    said = broken("no vocab", lambda f: (f / "manifest.json").write_text('{"files": []}'))
    assert "manifest.json is damaged" in said


def test_too_few_tokens(tmp_path, capsys):
    data = H.write_corpus(tmp_path / "d", {"train": [ramp(3000)], "dev": [ramp(300)]})
    said = refusal([*demo(data, tmp_path), "--tokens", "1_000_000", "--passes", "2"], capsys)
    assert "--tokens 1000000 is more than 2 pass(es) over the 3000 train tokens" in said
    assert "--passes" in said
    tiny = H.write_corpus(tmp_path / "t", {"train": [ramp(500)], "dev": [ramp(300)]})
    assert "too few tokens for one step" in refusal(demo(tiny, tmp_path), capsys)
    assert not (tmp_path / "runs").exists()


def test_a_user_arm_that_is_not_there(tmp_path, text_data, capsys):
    base = demo(text_data, tmp_path)
    assert "there is no file" in refusal([*base, "--arm", "nowhere.py:Mine"], capsys)
    here = str(H.ARMS / "temperature.py")
    assert "no class 'Mine'" in refusal([*base, "--arm", f"{here}:Mine"], capsys)
    assert not (tmp_path / "runs").exists()


def test_an_old_run_is_not_written_over(text_data, tmp_path, capsys):
    """A second run of the same name is refused, and the first one's files stay as they are."""
    argv = H.tiny_argv(text_data, tmp_path, run_id="mine", tokens=512, looks=0, final_val=False)
    assert T.main(argv) == 0
    capsys.readouterr()
    run = tmp_path / "mine"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert T.main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


# ---- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", T.PRESETS)
@pytest.mark.parametrize("arm", [*H.BUILT_IN, "diff_v2,form=full,layers=0+2,window2=64"])
def test_flat_round_trip(preset, arm):
    cfg = T.make_config(preset, arm=arm, seed=3, lambda_bias=-1.5, xsa=False, vocab=257)
    flat = cfg.flat()
    assert set(flat) == {"preset", *T.FLAGS}
    assert T.config_from_flat(json.loads(json.dumps(flat))) == cfg
    assert not T.check_config(cfg)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flat_round_trip_of_anything(data):
    numbers = {"int": st.integers(0, 10**9), "bool": st.booleans()}
    numbers["float"] = st.floats(0, 1e6, allow_nan=False)
    some = st.floats(0, 0.999, exclude_max=True)
    numbers["tuple[float, ...]"] = st.lists(some, min_size=1, max_size=3).map(tuple)
    numbers["tuple[int, ...]"] = st.lists(st.integers(0, 99), max_size=5).map(tuple)
    names = data.draw(st.lists(st.sampled_from(sorted(T.FLAGS)), max_size=8, unique=True))
    changes = {}
    for name in names:
        kind = T.FLAGS[name][1].type
        if kind in numbers:
            changes[name] = data.draw(numbers[kind])
    cfg = T.Config().with_(**changes)
    assert T.config_from_flat(json.loads(json.dumps(cfg.flat()))) == cfg


def test_stages_keep_their_shares_in_flat():
    """A third does not survive six digits: the plan made from the copy must be the same."""
    cfg = T.make_config("speedrun")
    again = T.config_from_flat(json.loads(json.dumps(cfg.flat())))
    assert T.plan_steps(again, 10**8) == T.plan_steps(cfg, 10**8)


def test_what_was_deleted_is_read_where_it_was_off():
    cfg = T.make_config("demo")
    assert T.config_from_flat({**cfg.flat(), **T.DELETED}) == cfg
    assert not set(T.DELETED) & set(T.FLAGS)
    on = {"mtp": True, "bigram": 192, "token_shares": True, "mudd": True, "attention_from": 8}
    on |= {"selector": "own"}
    for name, value in on.items():
        said = f"the config has {name} {value!r}, which was deleted since"
        with pytest.raises(T.InputError, match=said):
            T.config_from_flat({**cfg.flat(), name: value})


def test_the_command_line_is_the_config():
    argv = ["--preset", "demo", "--arm", "diff_v2,form=light+,mlp_layers=0+3,lambda_bias=-2"]
    argv += ["--no-gate", "--tokens", "1_000", "--stages", "0.5:512:1:128+0.5:1024:0.5:128-256"]
    cfg = T.parse_args(argv)
    m = cfg.model
    assert (m.form, m.mlp_layers, m.lambda_bias, m.gate, m.mlp) == (
        "light+",
        (0, 3),
        -2,
        False,
        608,
    )
    assert m.arm == argv[3], "recorded verbatim"
    assert cfg.schedule.tokens == 1000
    assert cfg.data == T.make_config("demo").data, "what no flag names stays the preset's"
    assert cfg.schedule.stages == (
        T.Stage(0.5, 512, 1.0, (128, 128)),
        T.Stage(0.5, 1024, 0.5, (128, 256)),
    )
    assert T.parse_args(["--preset", "demo", "--arm", "softmax,gate=false"]).model.gate is False


def test_an_arm_may_carry_settings_of_the_optimizer():
    """What compare's ablations are made of; the arm's own keys win over flags."""
    cfg = T.parse_args(["--arm", "softmax,normuon=0.9,ngram=640,fp8=false", "--normuon", "0.5"])
    assert (cfg.optim.normuon, cfg.model.ngram, cfg.run.fp8) == (0.9, 640, False)
    assert T.config_from_flat(cfg.flat()) == cfg
    plain = T.parse_args(["--ngram", "640", "--no-fp8", "--normuon", "0.9"])
    assert cfg.with_(arm="softmax") == plain
    with pytest.raises(T.InputError, match="'tokens=5' is no key=value of model or optimizer"):
        T.parse_args(["--arm", "softmax,tokens=5"])


def test_configs_are_frozen_and_presets_untouched():
    before = repr(T.PRESETS)
    cfg = T.make_config("demo", n_layer=3)
    with pytest.raises(T.dataclasses.FrozenInstanceError):
        cfg.model.n_layer = 5
    with pytest.raises(T.InputError, match="no setting 'colour'"):
        cfg.with_(colour="red")
    assert cfg.with_(n_layer=7).model.n_layer == 7 and cfg.model.n_layer == 3
    assert repr(T.PRESETS) == before


# ---- the table of steps -------------------------------------------------------------------------


def stages(draw_shares, tokens, windows, lrs):
    total = sum(draw_shares)
    return tuple(
        T.Stage(s / total, t, lr, w) for s, t, lr, w in zip(draw_shares, tokens, lrs, windows)
    )


@settings(max_examples=150, deadline=None)
@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    budget=st.integers(2048, 3_000_000),
    cooldown=st.floats(0, 0.7),
    warmup=st.floats(0, 0.3),
    floor=st.floats(0, 1),
)
def test_plan_steps(shares, data, budget, cooldown, warmup, floor):
    n = len(shares)
    table = stages(
        shares,
        data.draw(st.lists(st.sampled_from([2048, 4096, 6144]), min_size=n, max_size=n)),
        data.draw(
            st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=n, max_size=n)
        ),
        data.draw(st.lists(st.floats(0.1, 3), min_size=n, max_size=n)),
    )
    cfg = T.make_config(
        "demo", stages=table, cooldown=cooldown, warmup=warmup, lr_floor=floor, momentum_warmup=9
    )
    steps = T.plan_steps(cfg, budget)
    trained = sum(s.tokens for s in steps)
    assert trained <= budget
    mean = sum(s.share * s.tokens for s in table)
    assert trained > budget - mean - 6144 * (n + 1), "no more is left over than rounding explains"
    start = 0
    for i, step in enumerate(steps):
        assert (step.index, step.start) == (i, start), "no gap, no overlap"
        start += step.tokens
        stage = table[step.stage]
        assert step.tokens == stage.tokens
        low, high = sorted(stage.window)
        assert step.window % 128 == 0 and low <= step.window <= math.ceil(high / 128) * 128
        assert 0 <= step.lr <= max(stage.lr, floor) + 1e-9
        assert cfg.optim.momentum_start <= step.momentum <= cfg.optim.momentum
        if warmup == 0:
            assert step.lr >= min(floor, stage.lr) - 1e-9
    order = [s.stage for s in steps]
    assert order == sorted(order)
    total = int(budget / mean + 1e-6)
    for k in range(n):  # each stage has its share of the steps, give or take rounding
        if len(steps) == total:
            assert abs(order.count(k) - table[k].share * total) <= 1.001


def test_the_schedule_of_r28():
    """Stage boundaries, windows, lr and momentum at the steps that matter."""
    cfg = T.make_config("r28", momentum_warmup=300, momentum_cooldown=50)
    budget = 157_286_400
    steps = T.plan_steps(cfg, budget)
    assert len(steps) == 600 and sum(s.tokens for s in steps) == budget
    assert [s.tokens for s in (steps[0], steps[199], steps[200], steps[400], steps[-1])] == [
        *[131_072] * 2,
        *[262_144, 393_216, 393_216],
    ]
    assert (steps[0].window, steps[199].window, steps[-1].window) == (128, 640, 1792)
    windows = [s.window for s in steps]
    assert windows == sorted(windows)
    assert [steps[i].lr for i in (0, 199, 200, 329)] == [1.0, 1.0, 1.52, 1.52]
    # 45 % = 270 steps of linear cool-down to the floor, each stage's factor fading
    assert steps[330].lr == pytest.approx(1.52)
    assert steps[-1].lr == pytest.approx(1.73 / 270 + 0.1 * (269 / 270))
    assert steps[465].lr == pytest.approx(1.73 / 2 + 0.05, rel=1e-6)
    assert steps[0].momentum == pytest.approx(0.85)
    assert steps[300].momentum == pytest.approx(0.95) == steps[549].momentum
    assert steps[-1].momentum == pytest.approx(0.85)


def test_the_speedrun():
    """Its whole budget: steps, windows and classes of the loss, rates, and what is averaged."""
    cfg = T.make_config("speedrun")
    budget = cfg.schedule.most_tokens
    steps = T.plan_steps(cfg, budget)
    assert len(steps) == 2825 and sum(s.tokens for s in steps) == budget == 148_111_360
    assert {(s.stage, s.tokens, s.candidates) for s in steps} == {
        *[(0, 32_768, 10_240), (1, 65_536, 14_336)],
    }
    ends = [steps[i] for i in (0, 1129, 1130, -1)]
    assert [s.window for s in ends] == [128, 768, 768, 1792]
    assert [s.lr for s in ends[:3]] == [0.7, 0.7, 1.0]
    assert steps[-1].lr == pytest.approx(0.15, abs=1e-3)
    assert sum(s.adam for s in steps) == 1413 and sum(s.sample for s in steps) == 177


@pytest.mark.parametrize(
    "arm, paired, qk_dim",
    [
        ("softmax", (1, 2, 5, 9), 64),
        ("softmax,paired=2,qk_dim=0", (2,), 0),
        ("diff_v2", (), 64),
        ("diff_v2,form=light+", (), 64),
        ("diff_v2,form=full,layers=0+4+11", (1, 2, 5, 9), 64),
        ("diff_v1", (), 0),
        (f"{H.ARMS / 'temperature.py'}:Temperature", (), 0),
        (f"{H.ARMS / 'temperature.py'}:Temperature,qk_dim=64", (), 64),
    ],
)
def test_what_of_the_speedrun_an_arm_cannot_have(arm, paired, qk_dim):
    """Is left out where the preset alone says it, and refused where the user does."""
    cfg = T.make_config("speedrun", arm=arm)
    assert (cfg.model.paired, cfg.model.qk_dim) == (paired, qk_dim)
    assert T.check_config(cfg) == []
    assert T.config_from_flat(json.loads(json.dumps(cfg.flat()))) == cfg


@pytest.mark.parametrize(
    "arm, said", [("diff_v2,paired=1", "--paired"), ("diff_v1,xsa=true", "--xsa")]
)
def test_what_an_arm_cannot_have_is_refused_where_it_is_asked_for(arm, said):
    (problem,) = T.check_config(T.make_config("speedrun", arm=arm))
    assert problem.startswith(said)


def test_warm_up_of_the_rate():
    stages = (T.Stage(1.0, 2048, 1.0, (256, 256)),)
    cfg = T.make_config("demo", stages=stages, warmup=0.1, cooldown=0.2, lr_floor=0.0)
    lr = [s.lr for s in T.plan_steps(cfg, 2048 * 100)]
    assert lr[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert lr[10:81] == [1.0] * 71
    assert lr[80:] == pytest.approx([(100 - i) / 20 for i in range(80, 100)])
