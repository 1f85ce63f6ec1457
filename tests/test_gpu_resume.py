"""Resume and the non-finite gate on a GPU, FP8 head and compiled graphs on, at the speedrun's width
and 4 blocks: `python -m pytest -m gpu tests/test_gpu_resume.py`. The full size, and what runs
without --deterministic do: gpu_trust.py."""

from __future__ import annotations

import json
import math

import gpu_trust
import helpers as H
import pytest
import test_gpu as G
import torch

T = H.T
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return G.write_tokens(tmp_path_factory.mktemp("tokens"), G.SIZES)


def test_deterministic_resume_is_bitwise(tokens, tmp_path):
    """A run, its twin, and that run resumed before, at and after a stage's end (steps 3, 4, 8 of
    12) in one process, which compiles once; and from step 3 in a fresh one."""
    argv = H.argv_of(G.trainer_config(tokens, run_id=""))
    out = tmp_path / "trust"
    own = ["--out", str(out), "--steps", str(G.STEPS), "--roles", "det", "fresh"]
    assert gpu_trust.main([*argv, *own]) == 0
    found = json.loads((out / "trust.json").read_text())
    assert found["det"]["fp8"], "this GPU should have an FP8 head"
    assert found["report"]["bitwise"] == {
        name: [] for name in ("twin", "from3", "from4", "from8", "fresh")
    }


def test_a_bad_step_changes_nothing_though_the_next_was_launched(tokens):
    """Compiled, read one step late, without eager's hooks: the loss's gradient itself is bad."""
    cfg = G.trainer_config(tokens, run_id="bad", looks=0, final_val=False, save_every=4, keep=20)
    trainer = T.Trainer(cfg)
    trainer.warm_up()
    backward, bad = trainer.head.backward, []

    def poisoned(*args):
        losses, grad = backward(*args)
        return losses, grad * math.nan if bad else grad

    trainer.head.backward = poisoned
    trainer.hooks.after_step = lambda _, step: bad.append(1) if step.index == 3 else None
    with pytest.raises(T.NonFinite, match=r"^step 5: .*rank 0: loss \d.*first"):
        trainer.run()
    state, meta = T.load_checkpoint(tokens / "runs" / "bad")
    assert meta["step"] == 4
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p.cpu(), state["model"][name]), name
    for name, values in trainer.optimizer.state_dict().items():
        for key, value in values.items():
            assert torch.equal(value, state["optimizer"][name][key]), (name, key)
