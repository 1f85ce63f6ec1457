"""Training calls as CUDA graphs (`--cuda-graphs`): on a CPU, where a recording is its work run
again, the same losses as without; on a GPU (`-m gpu`) the real ones."""

from __future__ import annotations

import math

import helpers as H
import pytest
import test_gpu as G
import torch
from helpers import T

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


def trained(cfg, monkeypatch, graphed: bool):
    """(trainer, its losses, how many recordings there were)."""
    trainer, recorded = T.Trainer(cfg), []

    def record(work, pool):
        recorded.append(work)
        return work

    monkeypatch.setattr(T, "record", record)
    trainer.graphed = graphed
    trainer.run()
    return trainer, H.losses(trainer.folder), len(recorded)


def test_as_without(text_data, tmp_path, monkeypatch):
    """One call a step and two, Adam every other step, a table of n-grams, a copy head; again after
    memory was given back, which makes new graphs."""
    _, want, none = trained(config(text_data, tmp_path, "plain"), monkeypatch, False)
    trainer, got, made = trained(config(text_data, tmp_path, "graphed"), monkeypatch, True)
    shapes = {(8, 32, 128), (4, 64, 128), (4, 64, 0)}
    assert none == 0 and made == 3 and set(trainer.calls) == shapes
    assert got == pytest.approx(want, rel=1e-5) and want[-1] < want[0] - 0.3
    trainer.park()
    assert not trainer.calls
    trainer.reset(0, run_id="again")
    trainer.run()
    assert H.losses(trainer.folder) == got and set(trainer.calls) == shapes


def test_gradients_of_two_calls_add(text_data, tmp_path, monkeypatch):
    """And to what an earlier step left; each call's rows of the table are kept."""
    monkeypatch.setattr(T, "record", lambda work, pool: work)
    trainer, grads = T.Trainer(config(text_data, tmp_path, "two")), []
    step = next(s for s in trainer.steps if s.tokens == 512)
    batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
    H.randomise(trainer.model)
    for graphed in (False, True):
        trainer.graphed = graphed
        trainer.optimizer.zero_grad()
        for _ in range(2):
            trainer.gradients(step, batch)
        found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        grads.append({n: grad.clone() for n, grad in found.items()})
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-4, atol=1e-5, msg=name)
    rows = trainer.optimizer.rows.fresh
    assert len(rows) == 4 and not torch.equal(rows[0][1], rows[1][1])


def test_refused_with_fa4():
    cfg = T.make_config("speedrun", arm="softmax,attention=fa4,cuda_graphs=true")
    assert any("without --cuda-graphs" in x for x in T.check_config(cfg))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Three shapes recorded in the warm-up; losses as without graphs; nothing recorded later."""
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
    plain, graphed = results
    assert all(math.isfinite(x) for x in graphed)
    assert graphed[:3] == pytest.approx(plain[:3], abs=2e-3)
    assert graphed == pytest.approx(plain, abs=3e-2)
