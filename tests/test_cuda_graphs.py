"""Training calls as CUDA graphs (`--cuda-graphs`): on a CPU, where a recording is its work run
again, the same losses as without; on a GPU (`-m gpu`) the real ones."""

from __future__ import annotations

import math

import helpers as H
import pytest
import test_fa4 as F
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
    """In the place of the trainer's. As graphs share their memory, a replay spoils what the one
    before it left."""

    def __init__(self):
        self.recorded, self.left, self.renewed = [], [], 0

    def record(self, work):
        self.recorded.append(work)

        def replay():
            for t in self.left:
                t.fill_(math.nan)
            work()
            call = work.__self__
            self.left = [call.losses, *(g for _, g in call.grads), *call.found]

        work()
        return replay

    def lend(self, t):
        return t

    def renew(self):
        self.renewed += 1


def trainer_of(cfg, graphed: bool, hooks=None):
    trainer = T.Trainer(cfg, hooks)
    trainer.graphed, trainer.graphs.recorder = graphed, Recorder()
    return trainer


def trained(cfg, graphed: bool):
    """(trainer, its losses, how many recordings there were)."""
    trainer = trainer_of(cfg, graphed)
    trainer.run()
    return trainer, H.losses(trainer.folder), len(trainer.graphs.recorder.recorded)


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
    assert none == 0 and made == 3 and set(trainer.graphs.calls) == shapes
    assert got == pytest.approx(want, rel=1e-5) and want[-1] < want[0] - 0.3
    trainer.park()  # nothing that was made in a recording is kept
    assert not trainer.graphs.calls and trainer.graphs.recorder.renewed == 1
    assert trainer.head._cast is None
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.reset(0, run_id="again")
    trainer.run()
    assert H.losses(trainer.folder) == got and set(trainer.graphs.calls) == shapes


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
    assert all(bool(grad.isfinite().all()) for _, grad in rows)


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
    sizes = [rows * row for rows, row, _ in trainer.graphs.calls]
    assert sizes == sorted(sizes, reverse=True)


# ---- FlashAttention-4, whose windows and number of documents are a graph's own ------------------


@pytest.fixture
def plain_fa4(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("plain kernels are for the CPU")
    monkeypatch.setattr(T, "fa4_kernels", lambda: (F.plain_forward, F.plain_backward))
    monkeypatch.setattr(T, "probe_fa4", lambda device, shapes: "")
    evaluate = T.evaluate
    monkeypatch.setattr(T, "evaluate", lambda trainer, *at: evaluate(trainer, *at[:2], 1))


def fa4_config(text_data, tmp_path, run_id: str, **changes):
    """A step of 1,024 tokens is one call, one of 2,048 two, of rows longer than the first window;
    its window grows."""
    stages = (T.Stage(0.25, 1024, 1.0, (128, 128)), T.Stage(0.75, 2048, 1.0, (128, 512)))
    sizes = {"row_tokens": 256, "micro_batch_tokens": 1024, "tokens": 2048 * 6}
    cfg = F.tiny_fa4(text_data, tmp_path, run_id=run_id, cuda_graphs=True, final_val=False)
    return cfg.with_(stages=stages, **{**sizes, **changes})


def test_fa4_as_without(plain_fa4, text_data, tmp_path):
    """A graph for each window that a shape has, all of them before the clock starts."""
    assert T.check_config(T.make_config("r28", attention="fa4", cuda_graphs=True)) == []
    _, want, none = trained(fa4_config(text_data, tmp_path, "plain"), False)
    trainer = trainer_of(fa4_config(text_data, tmp_path, "graphed"), True)
    trainer.warm_up()
    graphs = {(8, 128, 0, 128, 128, 256)}  # rows, tokens, candidates, windows, documents
    graphs |= {(4, 256, 0, *both, 256) for both in ((128, 128), (256, 128), (384, 128), (512, 256))}
    assert set(trainer.graphs.calls) == graphs and none == 0
    assert len(trainer.graphs.recorder.recorded) == 5
    trainer.run()
    assert H.losses(trainer.folder) == pytest.approx(want, rel=1e-5) and want[-1] < want[0] - 0.1
    assert len({line["window"] for line in H.read_log(trainer.folder, "step")}) == 4
    assert len(trainer.graphs.recorder.recorded) == 5, "recorded inside the clock"


def test_fa4_gradients(plain_fa4, text_data, tmp_path):
    """Of the same step at two windows, in one call and in two, each with the graph of its own."""
    trainer = trainer_of(fa4_config(text_data, tmp_path, "grads"), False)
    H.randomise(trainer.model)
    for tokens in (1024, 2048):
        step = next(s for s in trainer.steps if s.tokens == tokens)
        batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
        found = []
        for window in (128, 256, 128):
            step = T.dataclasses.replace(step, window=window)
            want = gradients(trainer, False, step, batch)
            for _ in range(2):  # the first call of a shape is no replay
                assert_same(gradients(trainer, True, step, batch), want)
            found.append(want["head"])
        apart = float((found[0] - found[1]).abs().max())
        assert (apart > 1e-3) == (tokens == 2048), "rows of 128 have no use for a wider window"
    assert len(trainer.graphs.recorder.recorded) == 4


def test_more_documents_need_another_graph(plain_fa4, text_data, tmp_path, monkeypatch):
    """As many as any call had, by powers of two; a graph for fewer is never used again."""
    monkeypatch.setattr(T, "FA4_FEWEST", 1)
    monkeypatch.setattr(T, "FA4_GRAPHED", 4)
    _, want, _ = trained(fa4_config(text_data, tmp_path, "plain"), False)
    trainer, got, made = trained(fa4_config(text_data, tmp_path, "graphed"), True)
    assert got == pytest.approx(want, rel=1e-5)
    told = [key[5] for key in trainer.graphs.calls]
    assert told == sorted(told) and len(set(told)) > 1 and trainer.graphs.documents == told[-1]
    assert len(trainer.graphs.calls) == made and all(n & (n - 1) == 0 for n in told)


def test_more_documents_than_a_graph_has_room_for_stop_the_process(
    plain_fa4, text_data, tmp_path, monkeypatch
):
    """Should the host count wrongly: a replay finds out on the device."""
    monkeypatch.setattr(T, "FA4_FEWEST", 1)
    monkeypatch.setattr(T, "FA4_GRAPHED", 1)
    trainer = trainer_of(fa4_config(text_data, tmp_path, "guard"), True)
    monkeypatch.setattr(T, "count_documents", lambda docs: torch.tensor([8], dtype=torch.int32))
    step = next(s for s in trainer.steps if s.tokens == 1024)
    batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
    few, many = torch.zeros(8, 128, dtype=torch.int32), torch.arange(128).expand(8, -1).int()
    for docs in (few, few, few):
        trainer.gradients(step, T.dataclasses.replace(batch, docs=docs.clone()))
    assert len(trainer.graphs.recorder.recorded) == 1
    with pytest.raises(RuntimeError, match="more documents than limits say"):
        trainer.gradients(step, T.dataclasses.replace(batch, docs=many.clone()))


def test_a_longer_plan_records_its_windows_before_it_starts(plain_fa4, text_data, tmp_path):
    trainer = trainer_of(fa4_config(text_data, tmp_path, "short", tokens=2048 * 2), True)
    trainer.warm_up()
    assert {key[3] for key in trainer.graphs.calls} < {128, 256, 384, 512}
    trainer.reset(0, tokens=2048 * 6, run_id="longer")
    assert {key[3] for key in trainer.graphs.calls} == {128, 256, 384, 512}
    made = len(trainer.graphs.recorder.recorded)
    trainer.reset(1, tokens=2048 * 6, run_id="again")
    assert len(trainer.graphs.recorder.recorded) == made


@pytest.mark.gpu
def test_what_is_lent():
    """The same numbers at the same place, of any layout and type."""
    recorder, kept = T.Recorder(), torch.randn(6, 8, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64):
        for t in (kept.to(dtype), kept.to(dtype).t()[1:5], kept.to(dtype)[0, 0]):
            lent = recorder.lend(t)
            same = ("shape", "dtype", "device")
            assert all(getattr(lent, name) == getattr(t, name) for name in same)
            assert lent.data_ptr() == t.data_ptr() and lent.stride() == t.stride()
            assert torch.equal(lent.float(), t.float())


def taken() -> int:
    """Bytes that the process keeps."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize(("arm", "layers"), [("diff_v2,window2=128", (0, 2)), ("softmax", ())])
class TestFlashAttention:
    pytestmark = F.on_hopper

    def test_as_without(self, tmp_path, arm, layers):
        """Losses of two runs, then gradients of a step at two windows, as without graphs but for
        the order of sums, and nothing recorded inside the clock; graphs of more windows take no
        memory for gradients."""
        torch._dynamo.reset()
        folder, losses = G.write_tokens(tmp_path, G.SIZES), []
        for graphs in (False, True):
            kind = {"arm": arm, "layers": layers, "attention": "fa4", "cuda_graphs": graphs}
            trainer = T.Trainer(G.trainer_config(folder, **kind, run_id=f"graphs-{graphs}"))
            trainer.warm_up()
            before = {key: call.replay for key, call in trainer.graphs.calls.items()}
            trainer.run()
            assert before == {key: call.replay for key, call in trainer.graphs.calls.items()}
            assert len(before) >= (6 if graphs else 0) and None not in before.values()
            losses.append(H.losses(trainer.folder))
        plain, graphed = losses
        assert all(math.isfinite(x) for x in graphed)
        assert graphed[:3] == pytest.approx(plain[:3], abs=2e-3)
        assert graphed == pytest.approx(plain, abs=3e-2)
        step = trainer.steps[-1]
        batch = next(iter(trainer.default_batches([step], trainer.cfg, trainer.world)))
        eager = []
        for window in (step.window, 128):
            step = T.dataclasses.replace(step, window=window)
            eager.append(gradients(trainer, False, step, batch))
            got = gradients(trainer, True, step, batch)
            errors = {name: F.off(got[name], want) for name, want in eager[-1].items()}
            worst = max(errors, key=errors.get)
            print(f"window {window}: largest {errors[worst]:.1e} in {worst}")
            large = [e for name, e in errors.items() if got[name].numel() >= 256]
            assert got.keys() == eager[-1].keys() and max(large) < 0.05
        apart = [F.off(eager[1][name], want) for name, want in eager[0].items()]
        assert max(apart) > 0.1, "a graph of the wrong window would not have shown"
        warm_up = T.WarmUp(trainer)
        shape, before = next(iter(trainer.graphs.calls))[:3], taken()
        for window in (1280, 1408, 1536):
            warm_up.try_call(shape, window)
        grown = taken() - before
        size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        print(f"three more graphs: {grown / 2**20:.0f} MB; gradients are {size / 2**20:.0f} MB")
        assert grown < size / 2


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
        before = {shape: call.replay for shape, call in trainer.graphs.calls.items()}
        trainer.run()
        assert before == {shape: call.replay for shape, call in trainer.graphs.calls.items()}
        assert len(before) == (3 if graphs else 0)
        del before  # or its graphs outlive `park`
        results.append(H.losses(trainer.folder))
    taken = torch.cuda.memory_reserved()
    trainer.park()
    assert torch.cuda.memory_reserved() < taken
    trainer.reset(cfg.run.seed, cfg.data.data_seed, run_id="graphs-again")
    trainer.run()
    assert len(trainer.graphs.calls) == 3
    results.append(H.losses(trainer.folder))
    plain, *graphed = results
    for losses in graphed:
        assert all(math.isfinite(x) for x in losses)
        assert losses[:3] == pytest.approx(plain[:3], abs=2e-3)
        assert losses == pytest.approx(plain, abs=3e-2)
