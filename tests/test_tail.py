"""--tail: the final weights are blended with the mean of those that the last steps went through.
Against means made by hand; bit-identical resumed; nothing where it is off."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers as H
import pytest
import torch

T = H.T
Weights = dict[str, torch.Tensor]
TIED = {"tie": True, "untie": 1.0, "head_lr": 0.01}


def config(data: Path, out: Path, **changes) -> T.Config:
    """12 steps; samples after steps 4, 6, 8, 10 and 12."""
    base = {"tail": 0.75, "tail_every": 2, "tail_blend": 0.5, "tokens": 256 * 12, "keep": 20}
    base |= {"save_final": True, "run_id": "r", "micro_batch_tokens": 128}
    return H.tiny(data, out, **{**base, **changes})


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def watched(cfg: T.Config) -> tuple[T.Trainer, list[Weights]]:
    """A trainer that has run, and the weights after each step."""
    seen: list[Weights] = []
    hooks = T.Hooks(after_step=lambda trainer, _: seen.append(weights_of(trainer.model)))
    trainer = T.Trainer(cfg, hooks)
    trainer.run()
    return trainer, seen


def by_hand(seen: list[Weights], after: list[int], blend: float) -> Weights:
    """What the final weights are to be: `after` numbers steps from 1."""
    last = seen[-1]
    means = {n: sum(seen[i - 1][n].double() for i in after) / len(after) for n in last}
    return {n: (w + blend * (means[n] - w)).float() for n, w in last.items()}


def assert_same(a: Weights, b: Weights, **bounds) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, **(bounds or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def plain(text_data, tmp_path_factory) -> tuple[T.Trainer, list[Weights]]:
    return watched(config(text_data, tmp_path_factory.mktemp("plain"), tail=0.0))


@pytest.fixture(scope="module")
def whole(text_data, tmp_path_factory) -> tuple[T.Trainer, list[Weights]]:
    """With a checkpoint after each step."""
    return watched(config(text_data, tmp_path_factory.mktemp("whole"), save_every=1))


def final(run: Path) -> dict:
    return T.load_checkpoint(run)[0]


def test_final_weights_are_the_blend(whole, plain):
    """Of the weights that were trained without it: on the way nothing changes."""
    trainer, seen = whole
    assert_same(weights_of(trainer.model), by_hand(seen, [4, 6, 8, 10, 12], 0.5), atol=1e-6, rtol=0)
    for a, b in zip(seen, plain[1], strict=True):
        assert_same(a, b)
    moved = [not torch.equal(a, seen[-1][n]) for n, a in weights_of(trainer.model).items()]
    assert all(moved), "every group is averaged"


def test_which_weights_are_evaluated_and_saved(whole, plain):
    """The look on the way sees plain weights; the last one, val and the checkpoint the blend."""
    trainer, _ = whole
    assert_same(dict(final(trainer.folder)["model"]), weights_of(trainer.model))
    a, b = (H.read_log(t.folder, "val") for t in (trainer, plain[0]))
    assert [v["step"] for v in a] == [v["step"] for v in b] == [6, 12, 12]
    assert a[0]["dev_loss"] == b[0]["dev_loss"]
    assert a[1]["dev_loss"] != b[1]["dev_loss"] and a[2]["val_loss"] != b[2]["val_loss"]
    said = trainer.evaluate("dev", trainer.steps[-1].window)["loss"]
    assert a[1]["dev_loss"] == said


def test_it_is_said_once(whole, plain):
    trainer, _ = whole
    (event,) = H.read_log(trainer.folder, "event")
    assert event["kind"] == "tail"
    text = "5 samples of the weights, after steps 4 to 12: their mean is 0.5 of the final ones"
    assert event["text"] == text
    assert f"[tail] {text}\n" in (trainer.folder / "run.log").read_text()
    assert H.chain_breaks(trainer.folder) == []
    assert not H.read_log(plain[0].folder, "event")


def test_the_blend_is_inside_the_clock(text_data, tmp_path, monkeypatch):
    blend, seconds = T.Tail.blend, []

    def slow(self, share):
        began = trainer.running.clock.now()
        while trainer.running.clock.now() < began + 0.3:
            pass
        blend(self, share)
        seconds.append(trainer.running.clock.now())

    monkeypatch.setattr(T.Tail, "blend", slow)
    trainer = T.Trainer(config(text_data, tmp_path))
    result = trainer.run()
    assert result["train_s"] >= round(seconds[0], 3)
    last = H.read_log(trainer.folder, "step")[-1]["train_s"]
    assert all(v["train_s"] > last + 0.3 for v in H.read_log(trainer.folder, "val")[1:])
    assert T.load_checkpoint(trainer.folder)[1]["train_s"] >= seconds[0]


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_no_share_and_the_whole(text_data, tmp_path, plain, blend):
    trainer, seen = watched(config(text_data, tmp_path, tail_blend=blend))
    want = by_hand(seen, [4, 6, 8, 10, 12], blend)
    exact = {} if blend == 0 else {"atol": 1e-6, "rtol": 0}
    assert_same(weights_of(trainer.model), want, **exact)
    if blend == 0:
        assert_same(weights_of(trainer.model), plain[1][-1])


@pytest.mark.parametrize(
    "tail, every, after",
    [
        (0.2, 4, [12]),  # 2 steps: fewer than from one sample to the next
        (0.5, 4, [8, 12]),
        (1.0, 5, [2, 7, 12]),
        (1.0, 1, list(range(1, 13))),
        (0.01, 1, []),  # less than half a step
        (0.0, 1, []),
    ],
)
def test_steps_that_are_samples(text_data, tmp_path, tail, every, after):
    cfg = config(text_data, tmp_path, tail=tail, tail_every=every)
    assert [s.index + 1 for s in T.plan_steps(cfg, 256 * 12) if s.sample] == after


def test_one_sample_changes_nothing(text_data, tmp_path, plain):
    """It is the last step's weights: to the bit."""
    trainer, _ = watched(config(text_data, tmp_path, tail=0.2, tail_every=4))
    assert len(H.read_log(trainer.folder, "event")) == 1
    assert_same(weights_of(trainer.model), plain[1][-1])


def test_off_leaves_no_trace(plain):
    trainer, seen = plain
    assert_same(weights_of(trainer.model), seen[-1])
    assert not any(
        {"tail", "samples"} & set(s) for s in final(trainer.folder)["optimizer"].values()
    )


# ---- resume, reset ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4, 5, 9, 11, 12])
def test_resume_is_bitwise(whole, text_data, tmp_path, step):
    """Before the tail, in it (on a sample and between two), and from the end, which is not
    blended again."""
    first, _ = whole
    run = tmp_path / "r"
    shutil.copytree(first.folder, run)
    at = run / "ckpt" / f"step_{step:08d}"
    state = T.load_checkpoint(at)[0]["optimizer"]
    count = {3: None, 4: 1, 5: 1, 9: 3, 11: 4, 12: None}[step]
    assert {"tail" in s for s in state.values()} == {count is not None}
    assert {None if "samples" not in s else int(s["samples"]) for s in state.values()} == {count}
    T.train(config(text_data, tmp_path, save_every=1, resume=str(at)))
    a, b = final(run), final(first.folder)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert [e["kind"] for e in H.read_log(run, "event")].count("tail") == 1
    drop = {"train_s", "ms", "h"}
    logs = (
        [{k: v for k, v in line.items() if k not in drop} for line in H.read_log(f, "val")]
        for f in (run, first.folder)
    )
    assert next(logs) == next(logs)


def test_stopped_after_the_last_step_it_is_still_blended(whole, text_data, tmp_path):
    """A signal that the last step hears leaves a checkpoint of plain weights with their samples."""
    first, seen = whole

    def after_step(trainer, step):
        trainer.stop = step.index >= 10  # heard with the figures of the step after

    with pytest.raises(SystemExit):
        T.train(config(text_data, tmp_path), hooks=T.Hooks(after_step=after_step))
    state, meta = T.load_checkpoint(tmp_path / "r")
    assert meta["step"] == 12 and "tail" in state["optimizer"]["head"]
    assert_same({n: state["model"][n] for n in seen[-1]}, seen[-1])
    T.train(config(text_data, tmp_path, resume=str(tmp_path / "r")))
    torch.testing.assert_close(
        final(tmp_path / "r")["model"], final(first.folder)["model"], rtol=0, atol=0
    )


def test_other_tails_are_refused(whole, text_data, tmp_path):
    shutil.copytree(whole[0].folder, tmp_path / "r")
    at = tmp_path / "r/ckpt/step_00000005"
    cfg = config(text_data, tmp_path, resume=str(at), tail=0.0)
    with pytest.raises(T.InputError, match=r"tail 0\.75, now 0\.0"):
        T.train(cfg)


def test_reset_and_park_drop_the_samples(whole, text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path))
    trainer.warm_up()
    kept = trainer.optimizer
    assert kept.tail.samples == 0 and all(b.tail is None for b in kept.banks)
    for clear in (trainer.start, trainer.park):
        kept.tail.sample()
        assert kept.tail.samples == 1 and all(b.tail.dtype == torch.float32 for b in kept.banks)
        clear()
        assert kept.tail.samples == 0 and all(b.tail is None for b in kept.banks)
    for run_id in ("a", "b"):
        trainer.reset(0, run_id=run_id)
        trainer.run()
        assert_same(weights_of(trainer.model), weights_of(whole[0].model))
        assert kept.tail.samples == 0 and all(b.tail is None for b in kept.banks)


# ---- what it meets ------------------------------------------------------------------------------


@pytest.mark.parametrize("untie", [1.0, 0.5], ids=["still-tied", "parted"])
def test_a_tied_head_stays_the_embedding(text_data, tmp_path, untie):
    """To the bit where they never part; else each has a mean of its own."""
    trainer, seen = watched(config(text_data, tmp_path, **{**TIED, "untie": untie}))
    model = trainer.model
    assert torch.equal(seen[-1]["embed"], seen[-1]["head"]) == (untie == 1.0)
    assert torch.equal(model.embed, model.head) == (untie == 1.0)
    assert_same(weights_of(model), by_hand(seen, [4, 6, 8, 10, 12], 0.5), atol=1e-6, rtol=0)


def test_with_every_kind_of_state(text_data, tmp_path):
    """Held gradients, NorMuon's averages: resumed between two samples."""
    changes = {"adam_every": 2, "normuon": 0.95, "cautious_wd": 1.2, "cautious_adam_wd": 0.005}
    changes |= {"save_every": 7}
    trainer, seen = watched(config(text_data, tmp_path / "a", **changes))
    assert_same(weights_of(trainer.model), by_hand(seen, [4, 6, 8, 10, 12], 0.5), atol=1e-6, rtol=0)
    state = T.load_checkpoint(trainer.folder / "ckpt/step_00000007")[0]["optimizer"]["head"]
    assert {"tail", "grad", "exp_avg", "samples"} <= set(state)
    shutil.copytree(trainer.folder, tmp_path / "b/r")
    at = tmp_path / "b/r/ckpt/step_00000007"
    T.train(config(text_data, tmp_path / "b", **changes, resume=str(at)))
    a, b = (final(f) for f in (tmp_path / "b/r", trainer.folder))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def test_samples_are_taken_up_in_order():
    """A running mean in fp32 is within a few roundings of the mean in fp64."""
    gen = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(8, 8)
    groups = {"matrix": T.Group("muon", 0.1), "gate": T.Group("adam", 0.1)}
    opt, seen = T.Optimizer(model, groups, T.World(torch.device("cpu"))), []
    for _ in range(50):
        for p in model.parameters():
            p.data.copy_(1 + 1e-3 * torch.randn(p.shape, generator=gen))
        opt.tail.sample()
        seen.append(weights_of(model))
    opt.tail.blend(1.0)
    want = by_hand(seen, list(range(1, 51)), 1.0)
    assert_same(weights_of(model), want, atol=3e-7, rtol=0)


def ranks(data: str, out: str) -> dict:
    """What both ranks do: a whole run, and the same once more from between two samples."""
    changes = {"muon_dtype": "float32", "save_every": 7}
    whole = T.Trainer(config(Path(data), Path(out), **changes))
    whole.run()
    size = [b.own.numel() for b in whole.optimizer.banks]
    whole.optimizer.tail.sample()
    assert [b.tail.numel() for b in whole.optimizer.banks] == size
    weights, at = weights_of(whole.model), Path(out) / "r/ckpt/step_00000007"
    whole.world.barrier()  # or rank 0 cuts off what rank 1 still reads
    again = T.Trainer(config(Path(data), Path(out), **changes, resume=str(at)))
    again.run()
    return {"weights": weights, "again": weights_of(again.model)}


@pytest.mark.long
def test_two_ranks_equal_one(text_data, tmp_path):
    """Each averages its own slice; a checkpoint of two goes on at one."""
    a, b = H.on_ranks(2, ranks, tmp_path / "ranks", str(text_data), str(tmp_path / "two"))
    assert_same(a["weights"], b["weights"])
    assert_same(a["again"], a["weights"])
    one, _ = watched(config(text_data, tmp_path / "one", muon_dtype="float32"))
    assert_same(weights_of(one.model), a["weights"], rtol=1e-4, atol=2e-5)
    at = tmp_path / "two/r/ckpt/step_00000007"
    assert "tail" in T.load_checkpoint(at)[0]["optimizer"]["head"]
    changes = {"muon_dtype": "float32", "save_every": 7, "resume": str(at)}
    alone = T.Trainer(config(text_data, tmp_path / "two", **changes))
    alone.run()
    assert_same(weights_of(alone.model), a["weights"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tail": 1.5}, "--tail 1.5: a share of the steps, 0 to 1"),
        ({"tail": -0.1}, "--tail -0.1 must be >= 0 and finite"),
        ({"tail_every": 0}, "--tail-every 0: 1 or more"),
        ({"tail_blend": 1.5}, "--tail-blend 1.5: a share, 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    assert T.check_config(T.make_config("r28", **changes)) == [said]


def test_an_arm_can_have_a_tail():
    cfg = T.make_config("demo", arm="softmax,tail=0.25,tail_every=2,tail_blend=0.75")
    assert (cfg.optim.tail, cfg.optim.tail_every, cfg.optim.tail_blend) == (0.25, 2, 0.75)
    assert not T.check_config(cfg)
