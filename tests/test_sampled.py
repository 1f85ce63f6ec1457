"""The training loss over some classes (`--stages ...:candidates`): which they are, against plain
Python; losses and gradients against autograd; runs with it. On a GPU: test_gpu.py."""

from __future__ import annotations

import math
import shutil

import helpers as H
import numpy as np
import pytest
import test_checkpoint as C
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fp8 import closeness, on_cpu, rand

T = H.T
STAGES = (  # 6 + 4 + 4 steps
    *(T.Stage(0.4, 256, 1.0, (128, 128), 128), T.Stage(0.3, 256, 1.0, (128, 128), 256)),
    T.Stage(0.3, 256, 1.0, (128, 128)),
)


# ---- which classes ------------------------------------------------------------------------------


def by_hand(targets: list[int], classes: int, size: int, turn: int) -> tuple[list, list]:
    """candidate_set in words: targets first, then the rest, both in the turn's order."""
    order = [(k * T.stride_of(classes) + turn) % classes for k in range(classes)]
    wanted = {t for t in targets if t >= 0}
    chosen = [c for c in order if c in wanted] + [c for c in order if c not in wanted]
    place = {c: i for i, c in enumerate(chosen[:size])}
    return chosen[:size], [place.get(t, -1) for t in targets]


@settings(max_examples=200, deadline=None)
@given(
    classes=st.integers(1, 300),
    size=st.floats(0, 1),
    targets=st.lists(st.integers(-1, 10_000), max_size=120),
    turn=st.integers(0, 10**9),
)
def test_candidates_against_plain_python(classes, size, targets, turn):
    """Too few places included; -1 stays -1."""
    targets = [t if t < 0 else t % classes for t in targets]
    size = max(1, round(size * classes))
    given = torch.tensor(targets, dtype=torch.int64)
    (ids, rest), places = T.candidate_set(given, classes, size, turn)
    assert (ids.tolist(), places.tolist()) == by_hand(targets, classes, size, turn)
    assert len(set(ids.tolist())) == size and set(ids.tolist()) <= set(range(classes))
    assert torch.equal(ids[places[places >= 0]], given[places >= 0])
    distinct = {t for t in targets if t >= 0}
    if len(distinct) <= size:
        assert distinct <= set(ids.tolist()) and torch.equal(places < 0, given < 0)
        assert rest[0] == len(distinct)
        total = len(distinct) + (size - len(distinct)) * float(rest[1].exp())
        assert total == pytest.approx(classes if size > len(distinct) else size)
    else:
        assert set(ids.tolist()) < distinct, "no negatives where targets have no room"
        assert rest[0] == size


@pytest.mark.parametrize("classes, size", [(272, 128), (256, 128), (393, 128)])
def test_over_all_turns_every_class_comes_up_equally_often(classes, size):
    """As a negative, where no target is in its way; and never twice in a turn."""
    none = torch.full((4,), -1)
    turns = [T.candidate_set(none, classes, size, turn)[0].ids for turn in range(classes)]
    assert torch.cat(turns).bincount(minlength=classes).tolist() == [size] * classes


def test_negatives_move_on_and_lie_evenly():
    """GPT-2's vocabulary, a piece's worth of targets: each turn's negatives take the same share of
    every tenth of the ids, which the tokeniser has frequent ones first; two turns in a row have few
    in common; and ten come by every id nearly as often."""
    classes, size = 50_304, 10_240
    zipf = np.random.default_rng(0).zipf(1.2, 16_384) % 50_257
    targets = torch.from_numpy(zipf)
    wanted = torch.zeros(classes, dtype=torch.bool)
    wanted[targets] = True
    count, before = torch.zeros(classes), None
    for turn in range(1000, 1010):
        (ids, rest), places = T.candidate_set(targets, classes, size, turn)
        assert (places >= 0).all()
        others = classes - wanted.sum(), size - wanted.sum()
        torch.testing.assert_close(rest[1], (others[0] / others[1]).log())
        negatives = ids[~wanted[ids]]
        assert len(negatives) == size - int(wanted.sum()) > 5000
        count[negatives] += 1
        tenths = (negatives * 10 // classes).bincount(minlength=10)
        free = (torch.arange(classes)[~wanted] * 10 // classes).bincount(minlength=10)
        share = tenths / free
        assert share.max() / share.min() < 1.1
        if before is not None:
            assert len(np.intersect1d(before, negatives)) < 0.1 * len(negatives)
        before = negatives.numpy()
    assert count[~wanted].max() - count[~wanted].min() <= 2, "7 where drawn at random"


def test_strides():
    """Of every vocabulary's size, round ones too, all multiples are different classes."""
    for classes in (1, 2, 3, 16, 128, 257, 272, 2**15, 50_304, 100_352, 20_011 * 128):
        stride = T.stride_of(classes)
        assert math.gcd(stride, classes) == 1
        assert abs(stride - 0.618034 * classes) < 32


# ---- losses and gradients -----------------------------------------------------------------------

N, D, V, P = 96, 64, 512, 128


def head(fp8: bool = False, dtype=torch.float32, cap: T.Cap = 30.0) -> T.Head:
    weight = torch.nn.Parameter(rand(V, D, seed=2, std=0.1))
    made = T.Head(weight, cap, dtype, fp8, False)
    made.prepare()
    return made


def case(dtype=torch.float32, kinds: int = 60):
    """(h, targets of some 60 kinds, some masked)."""
    gen = torch.Generator().manual_seed(4)
    targets = torch.randint(kinds, (N,), generator=gen) * 37 % V
    targets[::7] = -1
    return T.norm(rand(N, D, seed=3)).to(dtype), targets


def by_autograd(weight, h, targets, scale, cap, turn, piece):
    """fp64, piece by piece: a softmax over `by_hand`'s classes of the same head, in whose sum each
    class that is no target counts for as many as share its place."""
    w, x = (t.detach().double().requires_grad_() for t in (weight, h))
    losses = []
    for i, (part, t) in enumerate(zip(x.split(piece), targets.split(piece))):
        ids, places = by_hand(t.tolist(), V, P, turn + i)
        logits = T.softcap((part @ w[ids].t()), cap).double()
        known = len({c for c in t.tolist() if c >= 0})
        logits = logits + torch.tensor(
            [0.0] * known + [math.log((V - known) / (P - known))] * (P - known)
        )
        places = torch.tensor(places)
        nats = torch.nn.functional.cross_entropy(logits, places.clamp(min=0), reduction="none")
        losses.append(nats * (places >= 0))
    losses = torch.cat(losses)
    return losses.detach(), *torch.autograd.grad(losses.sum() * scale, [x, w])


@pytest.mark.parametrize("cap", [30.0, 0.0, T.SHIFTED_CAP])
@pytest.mark.parametrize("piece", [40, 1000])
@pytest.mark.parametrize("before", [None, 0.5])
def test_loss_and_gradients_equal_autograd(monkeypatch, cap, piece, before):
    """In pieces, a last one that is shorter; with a gradient there and without."""
    monkeypatch.setattr(T, "HEAD_PIECE", piece)
    made, (h, targets) = head(cap=cap), case()
    if before is not None:
        made.weight.grad = torch.full_like(made.weight, before)
    losses, dh = made.backward(h, targets, torch.tensor(3.0), P, 7 * min(piece, N))
    want, want_dh, want_dw = by_autograd(made.weight, h, targets, 3.0, cap, 7, piece)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dh.double(), want_dh, rtol=1e-4, atol=1e-6)
    got = made.weight.grad.double() - (before or 0)
    torch.testing.assert_close(got, want_dw, rtol=1e-4, atol=2e-6)
    assert (losses[::7] == 0).all() and (dh[::7] == 0).all() and made.left_out == 0


def test_over_all_turns_the_sum_is_the_whole_softmax_s():
    """What the weights are for: the mean of exp(loss), a row's partition function over the target's
    share, is over all turns the one over all classes, but for 0.2 %, as places that targets take
    make other classes come up a little unevenly."""
    made, (h, targets) = head(), case()
    scale = torch.tensor(1.0)
    whole, _ = made.backward(h, targets, scale)
    some = torch.stack([made.backward(h, targets, scale, P, turn * N)[0] for turn in range(V)])
    kept = targets >= 0
    torch.testing.assert_close(some.exp().mean(0)[kept], whole.exp()[kept], rtol=2e-3, atol=0)


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=on_cpu)])
def test_all_classes_as_candidates_are_the_whole_loss(fp8):
    dtype = torch.bfloat16 if fp8 else torch.float32
    h, targets = case(dtype)
    whole, some = head(fp8, dtype), head(fp8, dtype)
    scale = torch.tensor(3.0)
    want = (*whole.backward(h, targets, scale), whole.weight.grad)
    got = (*some.backward(h, targets, scale, V, 12_345), some.weight.grad)
    for a, b in zip(got, want, strict=True):
        assert closeness(a, b) < (1e-6 if a.dtype == torch.float32 else 3e-3)


@on_cpu
@pytest.mark.parametrize("cap", [30.0, T.SHIFTED_CAP])
def test_fp8_products_over_candidates(monkeypatch, cap):
    """Two pieces, against float64; bounds as over all classes (test_fp8.py)."""
    monkeypatch.setattr(T, "HEAD_PIECE", N // 2)
    made, (h, targets) = head(True, torch.bfloat16, cap), case(torch.bfloat16)
    losses, dh = made.backward(h, targets, torch.tensor(700.0), P, 3 * N // 2)
    want = by_autograd(made.weight, h, targets, 700.0, cap, 3, N // 2)
    assert closeness(losses, want[0]) < 0.01
    assert closeness(dh, want[1]) < 0.09 and closeness(made.weight.grad, want[2]) < 0.09
    untouched = want[2].abs().sum(1) == 0
    assert untouched.any() and (made.weight.grad[untouched] == 0).all()


def test_targets_without_a_place_have_no_loss_and_are_counted():
    """300 different ones, 128 places: a piece of its own so that all are known."""
    made, h = head(), T.norm(rand(300, D, seed=3))
    targets = torch.arange(300)
    losses, dh = made.backward(h, targets, torch.tensor(1.0), P, 0)
    _, places = by_hand(targets.tolist(), V, P, 0)
    without = torch.tensor(places) < 0
    assert without.sum() == made.left_out == 300 - P
    assert (losses[without] == 0).all() and (dh[without] == 0).all()
    assert (losses[~without] > 0).all()
    made.backward(h, targets, torch.tensor(1.0), P, 0)
    assert made.left_out == 2 * (300 - P)


def test_the_same_candidates_on_any_number_of_ranks(monkeypatch):
    """Two calls of a step are two ranks' calls: the position alone counts."""
    monkeypatch.setattr(T, "HEAD_PIECE", 24)
    h, targets = case()
    one, two, scale = head(), head(), torch.tensor(1.0)
    whole = one.backward(h, targets, scale, P, 10 * N)
    parts = [
        two.backward(x, t, scale, P, 10 * N + 48 * i)
        for i, (x, t) in enumerate(zip(h.split(48), targets.split(48)))
    ]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))
    torch.testing.assert_close(one.weight.grad, two.weight.grad, rtol=1e-6, atol=1e-7)


# ---- the schedule -------------------------------------------------------------------------------


def test_stages_are_read_and_written():
    text = "0.5:512:1.0:128-256:10240+0.5:512:1.0:256-256"
    cfg = T.parse_args(["--preset", "demo", "--stages", text])
    assert [s.candidates for s in cfg.schedule.stages] == [10_240, 0]
    assert cfg.flat()["stages"] == text, "as before where all classes count"
    assert T.config_from_flat(cfg.flat()) == cfg
    assert T.Stage.parse("1:512:1:128-256:0") == T.Stage.parse("1:512:1:128-256")
    steps = T.plan_steps(cfg, 512 * 10)
    assert [s.candidates for s in steps] == [10_240] * 5 + [0] * 5
    plain = [T.dataclasses.replace(s, candidates=0) for s in steps]
    whole = cfg.with_(stages=tuple(T.Stage.parse(s[:19]) for s in text.split("+")))
    assert T.plan_steps(whole, 512 * 10) == plain, "nothing else changes"


@pytest.mark.parametrize(
    "stage, part",
    [
        ("1:512:1:128:100", "candidates by 128, or 0 for the whole vocabulary"),
        ("1:512:1:128:-128", "candidates by 128"),
        ("1:512:1:128:x", "is no SHARE:TOKENS"),
        ("1:512:1:128:", "is no SHARE:TOKENS"),
        ("1:512:1:128:128:128", "is no SHARE:TOKENS"),
    ],
)
def test_bad_candidates(stage, part):
    with pytest.raises(T.InputError, match=part):
        T.parse_args(["--preset", "demo", "--stages", stage])


def test_no_more_candidates_than_classes(text_data, tmp_path):
    assert T.padded(H.BYTE_VOCAB) == 272
    cfg = H.tiny(text_data, tmp_path, stages=(T.Stage(1.0, 256, 1.0, (128, 128), 384),))
    with pytest.raises(T.InputError, match="candidates of the 272 classes that this data has"):
        T.Trainer(cfg)


# ---- runs ---------------------------------------------------------------------------------------


def config(data, out, **changes) -> T.Config:
    base = {"stages": STAGES, "tokens": 256 * 14, "save_every": 1, "keep": 20, "run_id": "whole"}
    return H.tiny(data, out, **{**base, **changes})


@pytest.fixture(scope="module")
def whole(text_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled")
    T.train(config(text_data, out))
    return out / "whole"


def test_what_a_log_says(whole):
    steps = H.read_log(whole, "step")
    assert [s.get("candidates") for s in steps] == [128] * 6 + [256] * 4 + [None] * 4
    lines = [x for x in (whole / "run.log").read_text().splitlines() if x.startswith("step:")]
    said = [x for x in lines if " candidates:" in x]
    assert len(said) == 10 and " candidates:128 train_s:" in said[0]
    assert steps[0]["loss"] == pytest.approx(math.log(272), abs=1e-5)  # a head of zeros
    assert steps[-1]["loss"] > 1 and not H.read_log(whole, "event")
    assert H.chain_breaks(whole) == []


def test_validation_is_over_all_classes(text_data, tmp_path):
    """And the model learns: a sampled loss of 0 everywhere would be seen here."""
    stages = (T.Stage(1.0, 256, 1.0, (128, 128), 128),)
    cfg = config(text_data, tmp_path, stages=stages, tokens=256 * 60, save_every=0)
    result = T.train(cfg.with_(looks=1))
    assert result["dev_loss"] < math.log(272) - 1.5
    losses = H.losses(tmp_path / "whole")
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("step", [3, 6, 8, 10, 12])
def test_resume_is_bitwise(whole, text_data, tmp_path, step):
    run = C.copy_until(whole, tmp_path, step)
    T.train(config(text_data, tmp_path, resume=str(run)))
    name = "ckpt/step_00000013"
    C.assert_same(C.state_of(run / name), C.state_of(whole / name))
    assert C.without_times(run) == C.without_times(whole)


def test_a_checkpoint_of_another_loss_is_refused(whole, text_data, tmp_path):
    run = C.copy_until(whole, tmp_path, 3)
    stages = tuple(T.dataclasses.replace(s, candidates=0) for s in STAGES)
    with pytest.raises(T.InputError, match="saved with other settings: stages"):
        T.train(config(text_data, tmp_path, resume=str(run), stages=stages))
    with pytest.raises(T.InputError, match="other settings: micro_batch_tokens"):
        T.train(config(text_data, tmp_path, resume=str(run), micro_batch_tokens=128))


def test_a_log_names_targets_without_a_place(text_data, tmp_path):
    """Of the calls since the last look; the warm-up's do not count."""

    def all_bytes(steps, cfg, world):
        every, zeros = torch.arange(256).view(8, 32), torch.zeros(8, 32, dtype=torch.int32)
        for _ in steps:
            yield T.Batch(every.int(), every, zeros, zeros)

    stages = (T.Stage(1.0, 256, 1.0, (128, 128), 128),)
    cfg = config(text_data, tmp_path, stages=stages, tokens=256 * 4, save_every=0, looks=2)
    T.train(cfg, hooks=T.Hooks(batches=all_bytes))
    events = H.read_log(tmp_path / "whole", "event")
    assert [e["kind"] for e in events] == ["warning"] * 2
    assert all(e["text"].startswith("256 targets had no place") for e in events)


@pytest.mark.long
def test_the_same_run_in_deterministic_mode(whole, text_data, tmp_path):
    argv = H.argv_of(config(text_data, tmp_path, save_every=0))
    done = H.run_forked([*argv, "--deterministic"])
    assert done.returncode == 0, done.stderr
    assert H.losses(tmp_path / "whole") == H.losses(whole)


def test_flops_of_a_step_are_those_of_its_classes(text_data, tmp_path):
    """144 of 272 classes x 32 fewer in each of three products, 2 a weight."""
    trainer = T.Trainer(config(text_data, tmp_path))
    said: list[float] = []

    class Log:
        say = progress = staticmethod(lambda *_: None)
        write = staticmethod(lambda kind, **row: said.append(row["mfu"]))

    reporter = T.Reporter(trainer, Log, T.Clock(trainer.world), peak=1e6)
    for seconds, candidates in ((1.0, 128), (2.0, 0)):
        step = T.dataclasses.replace(trainer.steps[0], candidates=candidates)
        reporter.report(step, seconds, 5.0, 1.0, [10.0, 10.0])
    assert said[1] - said[0] == pytest.approx(6 * 144 * 32 * 256 / 1e6, abs=2e-4)


def sampled_run(data: str, out: str) -> None:
    T.train(config(data, out, micro_batch_tokens=128, save_every=0, looks=0))


@pytest.mark.long
def test_two_ranks_train_alike(text_data, tmp_path):
    """Calls of the same size: of one piece each."""
    two = tmp_path / "two"
    H.on_ranks(2, sampled_run, two, str(text_data), str(two))
    sampled_run(str(text_data), str(tmp_path))
    a, b = (H.losses(path / "whole") for path in (two, tmp_path))
    assert len(a) == 14 and a == pytest.approx(b, abs=1e-4)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_equals_eager_without_recompiling(text_data, tmp_path):
    """Warm-up makes the graphs of every size of candidates, and turns make none."""
    cfg = config(text_data, tmp_path, save_every=0, looks=2, n_layer=1, long_layers=(0,))
    cfg = cfg.with_(value_tables=0)
    T.train(cfg.with_(compile=True, run_id="compiled"))
    T.train(cfg.with_(run_id="eager"))
    a, b = (H.losses(tmp_path / name) for name in ("compiled", "eager"))
    assert len(a) == 14 and a == pytest.approx(b, abs=1e-4)
