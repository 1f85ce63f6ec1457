"""--copy: the head's softmax mixed with a pointer to earlier tokens. Against loops in fp64, by
FlexAttention and without, and with whatever computes the loss."""

from __future__ import annotations

import dataclasses
import math
import shutil
import types

import helpers as H
import pytest
import torch
from test_kernels import copied_case, loss_case
from torch import Tensor
from torch.nn.attention import flex_attention

from evals import prune, sample
from records.causality import check_causal

T = H.T
VOCAB, WIDTH, CAP = 64, 32, 15.0
SMALL = {"n_layer": 2, "d_model": WIDTH, "n_head": 2, "head_dim": 16, "long_layers": (1,)}
SMALL |= {"backout": 0, "value_tables": 1, "copy": True}


def pointer(seed: int = 0, gate: float = 0.5) -> T.Pointer:
    """With every parameter random; gate: the bias, so that a copy is worth something."""
    made = T.Pointer(T.make_config("demo", d_model=WIDTH).model)
    H.randomise(made, seed)
    with torch.no_grad():
        made.gain.fill_(1.7), made.bias.fill_(gate)
    return made


def text(rows: int = 2, length: int = 24, kinds: int = 6, seed: int = 0) -> T.Batch:
    """Rows of few kinds of tokens, so that most of them came before; documents that begin at odd
    places, one of a single token; some targets masked, some that no document has."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(kinds, (rows, length), generator=gen).int()
    targets = torch.randint(kinds + 1, (rows, length), generator=gen)
    targets[torch.rand(rows, length, generator=gen) < 0.1] = -1
    first = torch.zeros(rows, length, dtype=torch.int32)
    first[0, [3, 4, length // 2]] = 1
    docs = first.cumsum(1).int()
    return T.Batch(tokens, targets, docs, torch.zeros_like(docs))


def hidden(batch: T.Batch, seed: int = 1) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return T.norm(torch.randn(*batch.tokens.shape, WIDTH, generator=gen))


def naive(made: T.Pointer, h: Tensor, batch: T.Batch, z: Tensor, band: int) -> Tensor:
    """p [B, T, V] in fp64, query by query, from the equations. z: raw logits."""
    p = {n: t.double() for n, t in made.named_parameters()}
    lm, out = (CAP * torch.sigmoid(4 * z / CAP)).softmax(-1), []
    unit = torch.nn.functional.normalize
    q, k = (128**0.5 * unit(h @ p[f"{n}.weight"].T, dim=-1) for n in "qk")
    for b in range(h.size(0)):
        for t in range(h.size(1)):
            near = range(max(0, t - band + 1), t + 1)
            near = [j for j in near if batch.docs[b, j] == batch.docs[b, t]]
            scores = [p["gain"] * 15.36 / 128 * (q[b, t] @ k[b, j]).view(1) for j in near]
            weight = torch.cat([*scores, p["sink"]]).softmax(0)
            a = torch.sigmoid(h[b, t] @ p["gate"] + p["bias"])
            c = torch.zeros(z.size(-1), dtype=torch.float64)
            for j, w in zip(near, weight[:-1], strict=True):
                c = c + w * (torch.arange(len(c)) == batch.tokens[b, j])
            out.append(lm[b, t] * (1 - a * (1 - weight[-1])) + a * c)
    return torch.stack(out).view_as(z)


def both_ways(batch: T.Batch, band: int, monkeypatch, head: T.Head, made: T.Pointer) -> list[dict]:
    """Losses and the gradients of 3 x their sum: ours, and autograd's through `naive`."""
    monkeypatch.setattr(T, "HEAD_PIECE", 32)
    made.band.fill_(band)
    lm = T.LanguageModel(types.SimpleNamespace(pointer=made), head)
    leaf, results = hidden(batch).requires_grad_(), []
    head.prepare()
    losses = the_way_back(lm, leaf * 1, batch, torch.tensor(3.0))
    grads = {n: p.grad.clone() for n, p in made.named_parameters()}
    results.append({"losses": losses, "h": leaf.grad, "w": head.weight.grad.clone(), **grads})
    still = lm.losses(leaf.detach(), batch)
    torch.testing.assert_close(still, losses, rtol=2e-2 if head.fp8 else 1e-6, atol=1e-6)

    exact = leaf.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    made.zero_grad()
    p = naive(made, exact, batch, exact @ weight.T, band)
    hit = p.gather(-1, batch.targets.clamp(min=0)[..., None]).flatten()
    losses = torch.where(batch.targets.flatten() >= 0, -hit.log(), 0.0)
    (3 * losses.sum()).backward()
    grads = {n: p.grad.double() for n, p in made.named_parameters()}
    results.append({"losses": losses.detach(), "h": exact.grad, "w": weight.grad, **grads})
    return results


def the_way_back(lm: T.LanguageModel, *args) -> torch.Tensor:
    losses, rest = lm.backward(*args)
    torch.autograd.backward(*rest)
    return losses


def make_head(fp8: bool = False, seed: int = 2) -> T.Head:
    gen = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(0.2 * torch.randn(VOCAB, WIDTH, generator=gen))
    return T.Head(weight, CAP, torch.float32, fp8, False)


# ---- the mixture --------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [1, 5, 2048])
@pytest.mark.parametrize("gate", [-4.0, 0.5, 6.0])
def test_loss_and_gradients(band, gate, monkeypatch):
    ours, want = both_ways(text(), band, monkeypatch, make_head(), pointer(gate=gate))
    for name, value in want.items():
        bound = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-3, atol=bound, msg=name)


def test_the_comparison_has_power(monkeypatch):
    made = pointer()
    ours, _ = both_ways(text(), 5, monkeypatch, make_head(), made)
    for name in ("losses", "h", "w", "q.weight", "k.weight", "gain", "sink", "gate", "bias"):
        value = ours[name]
        assert value.abs().max() > 1e-2, name
    plain = make_head().losses(hidden(text()).flatten(0, 1), text().targets.flatten())
    assert (ours["losses"] - plain).abs().max() > 0.5


def test_fp8_head_has_the_same_gradients(monkeypatch):
    """Within what FP8 rounds."""
    batch = text(2, 24)
    ours, want = both_ways(batch, 5, monkeypatch, make_head(True), pointer())
    for name, value in want.items():
        far = float((ours[name].double() - value).norm() / value.norm())
        assert far < 0.1, (name, far)


@pytest.mark.parametrize("cap", [30.0, 0.0, T.SHIFTED_CAP])
def test_the_heads_part(cap):
    """losses_and_grad against autograd through token_losses; the copy's gradient as promised."""
    z, targets = loss_case(40, VOCAB)
    z, copied = z.float().requires_grad_(), copied_case(40).requires_grad_()
    want = T.token_losses(z, targets, cap, copied)
    want.sum().backward()
    losses, grad = T.losses_and_grad(z.detach(), targets, cap, copied.detach())
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(grad, z.grad, rtol=1e-4, atol=1e-6)
    share = torch.where(targets >= 0, -torch.exp(copied.detach() + losses), 0.0)
    torch.testing.assert_close(share, copied.grad, rtol=1e-4, atol=1e-6)


def test_what_is_no_candidate_is_no_copy():
    """Under a sampled loss a target that is left out gives no gradient, as if it were masked."""
    batch, found = text(2, 24, kinds=12), []
    flat = batch.targets.flatten()
    _, places = T.candidate_set(flat, VOCAB, 8, 0)
    assert (places[flat >= 0] < 0).any() and (places >= 0).any()
    for targets in (batch.targets, torch.where(places < 0, -1, flat).view_as(batch.targets)):
        part = T.Batch(batch.tokens, targets, batch.docs, batch.position)
        made, head, leaf = pointer(), make_head(), hidden(batch).requires_grad_()
        head.prepare()
        lm = T.LanguageModel(types.SimpleNamespace(pointer=made), head)
        losses = the_way_back(lm, leaf * 1, part, torch.tensor(3.0), 8)
        grads = [p.grad for p in made.parameters()]
        found.append([losses, leaf.grad, head.weight.grad, *grads, head.left_out])
    *got, left_out = found[0]
    *want, none = found[1]
    assert left_out > 0 and none == 0 and (got[0] != 0).any()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_a_copy_the_loss_is_the_softmaxs():
    z, targets = loss_case(40, VOCAB)
    z = z.float()
    none = torch.full((40,), T.NO_COPY)
    for a, b in zip(T.losses_and_grad(z, targets, CAP, none), T.losses_and_grad(z, targets, CAP)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    minus = torch.full((40,), -math.inf)
    for a, b in zip(T.losses_and_grad(z, targets, CAP, minus), T.losses_and_grad(z, targets, CAP)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_what_never_came_before_is_no_copy():
    """Nor what another document has; nothing is NaN, gradients included."""
    batch, made = text(), pointer()
    h = hidden(batch).requires_grad_()
    batch.targets = torch.full_like(batch.targets, VOCAB - 1)
    batch.targets[0, 3] = batch.tokens[0, 2]  # the token before, in the document before
    batch.tokens[0, 3] = (batch.tokens[0, 2] + 1) % 6
    copied, kept = made(h, batch.tokens, batch.docs, batch.targets)
    assert (copied < T.NO_COPY / 2).all() and (torch.exp(copied) == 0).all()
    (copied.sum() * 0 + kept.sum()).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters()) and h.grad.isfinite().all()
    assert (kept < 0).all() and kept.isfinite().all()


@pytest.mark.parametrize("gate, sink", [(200.0, -200.0), (200.0, 200.0), (-200.0, 0.0)])
def test_extremes_are_finite(gate, sink):
    """A gate that is 1 in fp32 with nothing on the sink leaves the softmax next to nothing."""
    batch, made = text(), pointer(gate=gate)
    with torch.no_grad():
        made.sink.fill_(sink), made.gate.zero_()
    h = hidden(batch).requires_grad_()
    copied, kept = made(h, batch.tokens, batch.docs, batch.targets)
    assert copied.isfinite().all() and kept.isfinite().all()
    head = make_head()
    head.prepare()
    lm = T.LanguageModel(types.SimpleNamespace(pointer=made), head)
    losses = the_way_back(lm, h * 1, batch, torch.tensor(1.0))
    assert losses.isfinite().all() and h.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in made.parameters())


# ---- by FlexAttention ---------------------------------------------------------------------------


def long_text(length: int = 512) -> T.Batch:
    """Whole blocks in reach, documents that end in blocks and at their edges."""
    batch = text(2, length, kinds=40)
    lengths = torch.tensor([100, 156, 1, length - 257])
    batch.docs[0] = torch.repeat_interleave(torch.arange(4), lengths).int()
    return batch


@pytest.fixture
def quarter(monkeypatch):
    """A pointer whose band ends within rows of 512 tokens."""
    made = pointer()
    made.band.fill_(200)
    return made


@torch.no_grad()
def test_flex_equals_the_dense_form(quarter):
    """Not compiled: on a CPU Inductor has no lse."""
    batch = long_text()
    h = hidden(batch)
    want = quarter(h, batch.tokens, batch.docs, batch.targets)
    quarter.flex = True
    quarter.requires_grad_(False)  # FlexAttention on a CPU refuses what asks for gradients
    got = quarter(h, batch.tokens, batch.docs, batch.targets)
    miss = want[0] < T.NO_COPY / 2
    assert 0.1 < miss.float().mean() < 0.9
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-5)


def test_gradients_through_flex(quarter, monkeypatch):
    """FlexAttention's own way back, of lse, in PyTorch: it refuses CPUs for what Inductor lacks."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    flex = torch.compile(quarter, fullgraph=True, dynamic=False, backend="aot_eager")
    batch, found = long_text(384), []
    for call in (quarter, flex):
        quarter.flex = call is flex
        quarter.zero_grad()
        h = hidden(batch).requires_grad_()
        copied, kept = call(h, batch.tokens, batch.docs, batch.targets)
        hits = copied.detach() > T.NO_COPY / 2
        torch.autograd.backward((copied, kept), (hits.float(), torch.full_like(kept, 2.0)))
        found.append([h.grad, *(p.grad.clone() for p in quarter.parameters())])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


# ---- in the model -------------------------------------------------------------------------------


def model_of(**changes) -> T.GPT:
    cfg = T.make_config("demo", **{**SMALL, "vocab": VOCAB, **changes})
    assert not T.check_config(cfg)
    model = T.GPT(cfg.model, 64)
    H.randomise(model)
    return model


WINDOWS = torch.tensor([64, 64], dtype=torch.int32)


@torch.no_grad()
def test_logits_are_the_mixtures_log_probabilities():
    """They sum to 1, are those of the loops, and the loss is theirs."""
    assert T.padded(VOCAB) == VOCAB
    model, batch = model_of(), text()
    model.pointer.band.fill_(7)
    logits = model.logits(batch.tokens, batch.docs, WINDOWS)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 24), rtol=1e-5, atol=0)
    padded = model_of(vocab=VOCAB - 7)
    padded = padded.logits(batch.tokens, batch.docs, WINDOWS)  # of tokens alone
    torch.testing.assert_close(padded.exp().sum(-1), torch.ones(2, 24), rtol=1e-5, atol=0)
    h = model(batch.tokens, batch.docs, WINDOWS)
    z = h.double() @ model.head.double().T
    model.softcap = CAP
    want = naive(model.pointer, h.double(), batch, z, 7)
    logits = model.logits(batch.tokens, batch.docs, WINDOWS)
    torch.testing.assert_close(logits.exp().double(), want, rtol=1e-4, atol=1e-6)
    head = T.Head(model.head, CAP, torch.float32, False, False)
    losses = T.LanguageModel(model, head).losses(h, batch)
    said = -logits.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    said = torch.where(batch.targets >= 0, said, 0.0).flatten()
    torch.testing.assert_close(losses, said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["softmax", "diff_v2,copy=true"])
def test_causal_and_within_the_document(arm):
    check_causal(arm, {"copy": True})


@torch.no_grad()
def test_nothing_beyond_the_band_is_copied():
    """A token that holds what is asked, one back too far."""
    made, batch = pointer(), text(1, 24, kinds=1)
    made.band.fill_(6)
    batch.tokens[0, 10], batch.targets = 5, torch.full((1, 24), 5)
    batch.docs.zero_()
    copied, _ = made(hidden(batch), batch.tokens, batch.docs, batch.targets)
    found = (copied[0] > T.NO_COPY / 2).nonzero()[:, 0].tolist()
    assert found == list(range(10, 16)), "the present token is one of the band"


def test_it_looks_back_further_in_use_than_in_training(text_data, tmp_path, monkeypatch):
    """In training 2,048 tokens; in looks, as a loaded model and in an exported one 16,384."""
    bands, by_hand = set(), T.Pointer.by_hand

    def seen(self, *inputs):
        bands.add((torch.is_grad_enabled(), *self.band.tolist()))
        return by_hand(self, *inputs)

    monkeypatch.setattr(T.Pointer, "by_hand", seen)
    trainer = T.Trainer(run(text_data, tmp_path))
    trainer.run()
    assert bands == {(True, 2048), (False, 16_384)}
    assert trainer.model.pointer.band.tolist() == [2048]
    assert T.load_model(trainer.folder)[0].pointer.band.tolist() == [16_384]
    assert "pointer.band" not in trainer.model.state_dict()


def run(data, out, **changes) -> T.Config:
    return H.tiny(data, out, **{"copy": True, "save_final": True, "run_id": "r", **changes})


@pytest.fixture(scope="module")
def trained(text_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("copy")
    trainer = T.Trainer(run(text_data, out, save_every=5))
    trainer.run()
    return trainer


def test_a_run(trained, text_data, tmp_path):
    """It learns, says the loss of what it samples from, and goes on to the bit."""
    losses = H.losses(trained.folder)
    assert losses[-1] < losses[0] - 0.5
    model, meta = T.load_model(trained.folder)
    corpus = T.Corpus.open(str(text_data))
    batch = T.make_batch(T.TokenStream(corpus.splits["dev"], corpus.eot), 0, 8, 64)
    model.cfg = dataclasses.replace(model.cfg, vocab=len(model.head))  # the loss counts its padding
    logits = model.logits(batch.tokens, batch.docs, T.windows(meta["window"], "cpu"))
    nats = torch.nn.functional.nll_loss(logits.flatten(0, 1), batch.targets.flatten())
    said = [v["dev_loss"] for v in H.read_log(trained.folder, "val") if v["split"] == "dev"][-1]
    assert float(nats) == pytest.approx(said, rel=1e-4)
    assert (model.pointer.gate != 0).all()
    again = tmp_path / "r"
    shutil.copytree(trained.folder, again)
    T.train(run(text_data, tmp_path, save_every=5, resume=str(again / "ckpt/step_00000005")))
    assert H.losses(again) == losses
    a, b = (T.load_checkpoint(f)[0] for f in (again, trained.folder))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def test_off_it_is_not_there(text_data, tmp_path):
    trainer = T.Trainer(run(text_data, tmp_path, copy=False))
    assert trainer.lm.pointer is None and trainer.model.pointer is None
    assert not any("pointer" in name for name in trainer.model.state_dict())


def ranks(data: str, out: str) -> list[float]:
    trainer = T.Trainer(run(data, out, micro_batch_tokens=128, tokens=256 * 4, looks=1))
    trainer.run()
    return [float(p.detach().double().norm()) for p in trainer.model.parameters()]


@pytest.mark.long
def test_two_ranks_equal_one(text_data, tmp_path):
    a, b = H.on_ranks(2, ranks, tmp_path / "ranks", str(text_data), str(tmp_path / "two"))
    one = ranks(str(text_data), str(tmp_path / "one"))
    assert a == b and a == pytest.approx(one, rel=1e-4)
    two, alone = (H.losses(tmp_path / name / "r") for name in ("two", "one"))
    assert two == pytest.approx(alone, abs=2e-5)


# ---- who reads it -------------------------------------------------------------------------------


def test_samples_are_of_the_mixture(trained):
    model, meta = sample.load(trained.folder)
    with torch.no_grad():
        model.pointer.bias.fill_(8.0)  # it copies, whatever the head says
        model.pointer.sink.fill_(-50.0)
    ids = [256, *b"abcdefgh"]
    got = sample.generate(model, meta, ids, 256, tokens=12, temperature=0.0, end=False)
    assert len(got) == 12 and set(got) <= set(ids)
    for i, token in enumerate(got):
        shown = torch.tensor([[*ids, *got[:i]]], dtype=torch.int32)
        logits = model.logits(shown, torch.zeros_like(shown), T.windows(meta["window"], "cpu"))
        logits = logits[0, -1].clone()
        logits[256] = -math.inf
        assert token == int(logits.argmax())


@torch.no_grad()
def test_token_nats_are_the_mixtures():
    """What HellaSwag and fine-tuning score by: `logits` of what is asked, in order."""
    for copy in (True, False):
        model, batch = model_of(copy=copy, vocab=VOCAB - 7), text()
        h = model(batch.tokens, batch.docs, WINDOWS)
        got = sample.token_nats(model, h, batch.tokens, batch.docs, batch.targets)
        log_p = model.logits(batch.tokens, batch.docs, WINDOWS).log_softmax(-1)
        asked = batch.targets >= 0
        want = -log_p[asked].gather(1, batch.targets[asked][:, None])[:, 0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_pruned_losses_are_the_mixtures(trained):
    """With the whole cache kept, those of training."""
    model, meta = sample.load(trained.folder, "cpu", 64)
    rows = torch.randint(256, (3, 65), generator=torch.Generator().manual_seed(0))
    window = T.windows(meta["window"], "cpu")
    got = prune.losses(model, rows, window)
    batch = T.Batch(rows[:, :-1].int(), rows[:, 1:], torch.zeros_like(rows[:, 1:]), None)
    h = model(batch.tokens, batch.docs, window)
    torch.testing.assert_close(got.flatten(), trained.lm.losses(h, batch), rtol=1e-4, atol=0)
    (point,) = prune.measure(trained.folder, rows.numpy(), [1.0], "cpu", set())
    assert point.loss == pytest.approx(float(got.mean()), rel=1e-4)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
def test_gpu_flex(dtype, bound):
    """Compiled, both ways, against the dense form in fp32: bands that end within the rows, rows
    where the target never came before."""
    torch._dynamo.reset()
    batch, found = long_text(1024).to(torch.device("cuda")), []
    made = pointer().cuda()
    made.band.fill_(300)
    flex = torch.compile(made, fullgraph=True, dynamic=False)
    for call, kind in ((made, torch.float32), (flex, dtype)):
        made.flex = call is flex
        made.zero_grad()
        h = hidden(batch.to(torch.device("cpu"))).to("cuda", kind).requires_grad_()
        copied, kept = call(h, batch.tokens, batch.docs, batch.targets)
        hits = copied.detach() > T.NO_COPY / 2
        grads = torch.where(hits, 1.0, 0.0), torch.full_like(kept, 2.0)
        torch.autograd.backward((copied, kept), grads)
        parameters = [p.grad.clone() for p in made.parameters()]
        found.append([torch.where(hits, copied, 0.0).detach(), kept.detach(), h.grad, *parameters])
        found[-1].append(hits)
    *want, hits = found[0]
    *got, same = found[1]
    assert torch.equal(hits, same) and 0.1 < hits.float().mean() < 0.9
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        assert float((g.double() - w.double()).norm() / w.double().norm()) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_run(tmp_path):
    """The whole trainer, with whatever kernels this card has: no graph is made inside the clock,
    and the loss falls."""
    import test_gpu

    torch._dynamo.reset()
    folder = test_gpu.write_tokens(tmp_path, test_gpu.SIZES)
    cfg = test_gpu.trainer_config(folder, copy=True)
    trainer, logs, made, strict = test_gpu.train_twice(cfg)
    print(trainer.kernels)
    assert strict and made == 0
    for log in logs:
        losses = [x["loss"] for x in log["step"]]
        assert losses[-1] < losses[0] - 2 and all(
            math.isfinite(x["grad_norm"]) for x in log["step"]
        )
        final = log["val"][-1]
        assert abs(final["val_loss"] - log["val"][-2]["dev_loss"]) < 0.2
