"""Training calls as CUDA graphs (`--cuda-graphs`): on a CPU, where a recording is its work run
again, the same losses as without; on a GPU (`-m gpu`) the real ones."""

from __future__ import annotations

import math

import helpers as H
import pytest
import test_gpu as G
import torch
from helpers import T

from variants import gpt2

SMALL = "softmax,ngram=256,tie=true,adam_every=2,copy=true"
STAGES = (
    *(T.Stage(0.4, 256, 1.0, (128, 128), 128), T.Stage(0.3, 512, 1.0, (128, 128), 128)),
    T.Stage(0.3, 512, 1.0, (128, 128)),
)


def config(text_data, tmp_path, run_id: str, **changes):
    """In steps of 512 tokens two calls, in those of 256 one."""
    cfg = T.make_config("demo", arm=SMALL, data=str(text_data), out=str(tmp_path), run_id=run_id)
    sizes = {"row_tokens": 128, "micro_batch_tokens": 256, "stages": STAGES, "tokens": 256 * 24}
    return cfg.with_(**sizes, looks=2, final_val=False, cautious_wd=1.2, normuon=0.95, **changes)


class Recorder:
    """In the place of the trainer's."""

    def __init__(self):
        self.recorded, self.renewed = [], 0

    def record(self, work):
        self.recorded.append(work)
        return work

    def renew(self):
        self.renewed += 1


def trainer_of(cfg, graphed: bool, hooks=None):
    trainer = T.Trainer(cfg, hooks)
    trainer.graphed, trainer.recorder = graphed, Recorder()
    return trainer


def trained(cfg, graphed: bool):
    """(trainer, its losses, how many recordings there were)."""
    trainer = trainer_of(cfg, graphed)
    trainer.run()
    return trainer, H.losses(trainer.folder), len(trainer.recorder.recorded)


def gradients(trainer, graphed: bool, step, batch, times: int = 1) -> dict:
    """Of each parameter that has one, after so many steps without an update."""
    trainer.graphed = graphed
    trainer.optimizer.zero_grad()
    for _ in range(times):
        trainer.gradients(step, batch)
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {n: grad.clone() for n, grad in found.items()}


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_as_without(text_data, tmp_path, monkeypatch):
    """One call a step and two, Adam every other step, a table of n-grams, a copy head; again after
    memory was given back, which makes new graphs."""
    evaluate = T.evaluate  # in full it would take most of the time
    monkeypatch.setattr(T, "evaluate", lambda trainer, *at: evaluate(trainer, *at[:2], 1))
    _, want, none = trained(config(text_data, tmp_path, "plain"), False)
    trainer, got, made = trained(config(text_data, tmp_path, "graphed"), True)
    shapes = {(8, 32, 128), (4, 64, 128), (4, 64, 0)}
    assert none == 0 and made == 3 and set(trainer.calls) == shapes
    assert got == pytest.approx(want, rel=1e-5) and want[-1] < want[0] - 0.3
    trainer.park()  # nothing that was made in a recording is kept
    assert not trainer.calls and trainer.recorder.renewed == 1 and trainer.head._cast is None
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.reset(0, run_id="again")
    trainer.run()
    assert H.losses(trainer.folder) == got and set(trainer.calls) == shapes


def test_gradients_of_two_calls_add(text_data, tmp_path):
    """And to what an earlier step left; each call's rows of the table are kept."""
    trainer = trainer_of(config(text_data, tmp_path, "two"), False)
    step = next(s for s in trainer.steps if s.tokens == 512)
    batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
    H.randomise(trainer.model)
    want, got = (gradients(trainer, graphed, step, batch, 2) for graphed in (False, True))
    assert_same(got, want)
    rows = trainer.optimizer.rows.fresh
    assert len(rows) == 4 and not torch.equal(rows[0][1], rows[1][1])


def test_a_head_that_is_the_embedding(text_data, tmp_path):
    """GPT-2's one matrix gets the gradients of both, in the step that compiles and in a replay."""
    cfg = T.make_config("gpt2", data=str(text_data), out=str(tmp_path), run_id="tied")
    cfg = cfg.with_(n_layer=2, d_model=64, n_head=2, head_dim=32, long_layers=(0,))
    cfg = cfg.with_(row_tokens=128, val_row_tokens=128, val_call_tokens=256, tokens=1024)
    cfg = cfg.with_(stages=(T.Stage(1.0, 256, 1.0, (128, 128)),), ext_window=0)
    cfg = cfg.with_(device="cpu", require_gpu=False, compile=False, fp8=False)
    trainer = trainer_of(cfg, False, gpt2.make_hooks(cfg))
    step = trainer.steps[0]
    batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
    want, *got = (gradients(trainer, graphed, step, batch) for graphed in (False, True, True))
    for grads in got:
        assert_same(grads, want)


def test_the_largest_call_is_recorded_first(text_data, tmp_path):
    trainer = trainer_of(config(text_data, tmp_path, "order"), True)
    trainer.warm_up()
    sizes = [rows * row for rows, row, _ in trainer.calls]
    assert sizes == sorted(sizes, reverse=True)


def test_refused_with_fa4():
    cfg = T.make_config("speedrun", arm="softmax,attention=fa4,cuda_graphs=true")
    assert any("without --cuda-graphs" in x for x in T.check_config(cfg))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Three shapes recorded in the warm-up; losses as without graphs; nothing recorded later. Once
    parked, which gives the memory back, it records and trains again."""
    torch._dynamo.reset()
    folder = G.write_tokens(tmp_path, G.SIZES)
    arm = "softmax,ngram=4096,tie=true,adam_every=2,copy=true"
    results = []
    for graphs in (False, True):
        cfg = G.trainer_config(folder, arm=arm, layers=()).with_(cuda_graphs=graphs)
        stages = [
            T.dataclasses.replace(stage, candidates=some)
            for stage, some in zip(cfg.schedule.stages, (1024, 4096, 0), strict=True)
        ]
        trainer = T.Trainer(cfg.with_(stages=tuple(stages), run_id=f"graphs-{graphs}"))
        trainer.warm_up()
        before = {shape: call.replay for shape, call in trainer.calls.items()}
        trainer.run()
        assert before == {shape: call.replay for shape, call in trainer.calls.items()}
        assert len(before) == (3 if graphs else 0)
        results.append(H.losses(trainer.folder))
    taken = torch.cuda.memory_reserved()
    trainer.park()
    assert torch.cuda.memory_reserved() < taken
    trainer.reset(cfg.run.seed, cfg.data.data_seed, run_id="graphs-again")
    trainer.run()
    assert len(trainer.calls) == 3
    results.append(H.losses(trainer.folder))
    plain, *graphed = results
    for losses in graphed:
        assert all(math.isfinite(x) for x in losses)
        assert losses[:3] == pytest.approx(plain[:3], abs=2e-3)
        assert losses == pytest.approx(plain, abs=3e-2)
