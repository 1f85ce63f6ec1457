"""Resume and the non-finite gate on a GPU, FP8 head and compiled graphs on, at the speedrun's width
and 4 blocks: `python -m pytest -m gpu tests/test_gpu_resume.py`, some minutes for the first of the
processes that compile."""

from __future__ import annotations

import math
import shutil

import helpers as H
import pytest
import test_gpu as G
import torch

T = H.T
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


def run(folder, **changes):
    """A process of its own, as a resumed run is one; its run folder."""
    cfg = G.trainer_config(folder, looks=0, final_val=False, keep=20, **changes)
    done = H.run_script(H.argv_of(cfg), timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / cfg.run.run_id


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return G.write_tokens(tmp_path_factory.mktemp("tokens"), G.SIZES)


def test_deterministic_resume_is_bitwise(tokens):
    """Twice the same run, then resumed before, at and after a stage's end (steps 3, 4, 8 of 12)."""
    changes = {"deterministic": True, "save_every": 1, "save_final": True}
    whole = run(tokens, run_id="whole", **changes)
    assert H.read_log(whole, "header")[0]["fp8"], "this GPU should have an FP8 head"
    assert H.losses(run(tokens, run_id="twin", **changes)) == H.losses(whole)
    last = T.load_checkpoint(whole)[0]
    for step in (3, 4, 8):
        name = f"from-{step}"
        folder = tokens / "runs" / name
        shutil.copytree(whole, folder)
        run(tokens, run_id=name, resume=str(folder / f"ckpt/step_{step:08d}"), **changes)
        assert H.losses(folder) == H.losses(whole), step
        again = T.load_checkpoint(folder)[0]
        for key, value in last["model"].items():
            assert torch.equal(again["model"][key], value), (step, key)
        for key, state in last["optimizer"].items():
            for part, value in state.items():
                assert torch.equal(again["optimizer"][key][part], value), (step, key, part)
        assert torch.equal(again["cuda_rng"], last["cuda_rng"])


def test_a_bad_step_changes_nothing_though_the_next_was_launched(tokens):
    """Compiled, read one step late, without eager's hooks: the loss's gradient itself is bad."""
    cfg = G.trainer_config(tokens, run_id="bad", looks=0, final_val=False, save_every=4, keep=20)
    trainer = T.Trainer(cfg)
    trainer.warm_up()
    backward, bad = trainer.head.backward, []

    def poisoned(h, targets, scale):
        losses, grad = backward(h, targets, scale)
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
