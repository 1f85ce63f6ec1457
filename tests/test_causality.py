"""No logit before a token moves with it, nothing crosses documents, rows or the window: every arm,
every preset, a user's arm; and the check itself refuses what it must."""

from __future__ import annotations

import helpers as H
import pytest
import torch

from records import causality
from records.causality import NoPower, NotCausal, check_causal

T = H.T
PRESETS = ("r28", "demo", "plain")  # plain is r28 with less
ARMS = (
    *H.BUILT_IN,
    "diff_v2,window2=7",
    "diff_v2,layers=0+3",
    "diff_v2,form=full,xsa=true,window2=9",
    "softmax,xsa=true",
    "selective",
    "diff_v2,selective=true",
    "diff_v2,selective=true,form=full,window2=9",
    f"{H.ARMS / 'temperature.py'}:Temperature",
    f"{H.ARMS / 'plain_module.py'}:Plain",
)


@pytest.mark.parametrize(
    "arm, preset",
    [
        pytest.param(arm, p, id=f"{arm.rpartition('/')[2]}-{p}", marks=[pytest.mark.long] * long)
        for arm in ARMS
        for p in PRESETS
        for long in [p == "plain" and arm not in ("softmax", "diff_v2")]
    ],
)
def test_arm_is_causal(arm, preset):
    done = check_causal(arm, preset=preset)
    layers = 4 if preset == "demo" else 11
    assert done == {"positions": 8, "documents": 7, "rows": 2, "window": 2 * layers}


@pytest.mark.parametrize(
    "arm", ["softmax", "softmax,xsa=true", "diff_v2,form=light+", "diff_v2,form=full,layers=0+4+11"]
)
def test_the_speedrun_is_causal(arm):
    check_causal(arm, preset="speedrun")


def test_one_thread_checks_and_the_others_come_back():
    seen = []

    def make(cfg, length, dtype):
        seen.append(torch.get_num_threads())
        return T.GPT(cfg.model, length, dtype)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_causal("softmax", preset="demo", make_model=make)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("preset, qk_dim", [("r28", 64), ("demo", 16)])
@pytest.mark.parametrize(
    "arm",
    [
        *("softmax,xsa=true,value_gate=true", "softmax,paired=1,key_offset=true"),
        *("selective", "diff_v2,form=full,window2=9", "diff_v2,selective=true"),
    ],
)
def test_narrow_queries_and_keys(arm, preset, qk_dim):
    check_causal(arm, {"qk_dim": qk_dim}, preset=preset)


def test_other_settings():
    check_causal("diff_v1", {"qk_norm": False, "rope": False, "bias": True, "softcap": 0.0})
    check_causal("diff_v2", {"half_rope": False, "x0": False, "skip": (), "backout": -1})


@pytest.mark.parametrize("preset", ["r28", "demo"])
@pytest.mark.parametrize(
    "name, message",
    [
        ("FutureNorm", "before it"),
        ("OneAhead", "before it"),
        ("CrossDocument", "another document"),
        ("BeyondWindow", "window"),
        ("CrossRow", "another row"),
    ],
)
def test_what_must_be_refused(name, message, preset):
    with pytest.raises(NotCausal, match=message):
        check_causal(f"{H.ARMS / 'broken.py'}:{name}", preset=preset)


def test_an_arm_without_attention_is_no_proof():
    with pytest.raises(NoPower):
        check_causal(f"{H.ARMS / 'broken.py'}:Zero")


def test_zero_projections_would_hide_a_leak(monkeypatch):
    """At init the same leak passes unseen: this is why the check randomises every parameter."""
    monkeypatch.setattr(causality, "randomise", T.init_parameters)
    with pytest.raises(NoPower):
        check_causal(f"{H.ARMS / 'broken.py'}:FutureNorm")


def test_a_model_of_another_shape():
    """`make_model` as variants use it; a window check only where there are arms to ask."""
    cfg = {"n_layer": 4, "no_attention": (), "long_layers": (0,), "skip": (), "backout": -1}
    cfg["value_tables"] = 1
    seen = []

    def make(config, length, dtype):
        seen.append(config.model.n_layer)
        return T.GPT(config.model, length, dtype)

    assert check_causal("softmax", cfg, make_model=make)["window"] == 8
    assert seen == [4]


def test_bad_arm_is_an_input_error():
    with pytest.raises(T.InputError, match="no arm"):
        check_causal("nonsense")
