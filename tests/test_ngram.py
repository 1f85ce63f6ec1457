"""The n-gram table: rows and signs against a loop in Python's integers, the update of its rows
against Adam on all of them, and what it asks of checkpoints, ranks and memory."""

from __future__ import annotations

import math

import helpers as H
import pytest
import torch
from test_ideas import build, opens, rows_of_text, window

T = H.T
CPU = T.World(torch.device("cpu"))
ROWS, DIM, TOKENS = 256, 16, 24
GROUP = T.Group("adam", 0.5, (0.0, 0.95), wd=0.02, eps=1e-10, cautious_wd=0.3)


def naive_places(rows: int, tokens, docs) -> tuple[torch.Tensor, torch.Tensor]:
    half, at = rows // 2, torch.zeros(*tokens.shape, 2, dtype=torch.int64)
    signs = torch.zeros_like(at)
    for b in range(tokens.size(0)):
        for t in range(tokens.size(1)):
            first = opens(docs, b, t)
            early = first or opens(docs, b, t - 1)
            x = int(tokens[b, t])
            y = 0 if first else int(tokens[b, t - 1])
            z = 0 if early else int(tokens[b, t - 2])
            pair = ((36_313 * x) ^ (27_191 * y)) % (half - 1)
            triple = ((17_351 * x) ^ (60_961 * y) ^ (45_259 * z)) % (half - 1)
            at[b, t, 0] = half - 1 if first else pair
            at[b, t, 1] = rows - 1 if early else half + triple
            signs[b, t, 0] = ((52_711 * x) ^ (39_119 * y)) // 256 % 8192
            signs[b, t, 1] = ((48_611 * x) ^ (21_379 * y) ^ (57_241 * z)) // 256 % 8192
    return at, signs


def filled(model: T.GPT, seed: int = 0) -> T.Ngram:
    model.ngram.make()
    model.ngram.table.normal_(generator=torch.Generator().manual_seed(seed))
    return model.ngram


# ---- rows and signs -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [128, 2**24])
def test_places_and_sums(rows):
    model, (tokens, docs) = build(ngram=rows), rows_of_text()
    ngram, tokens = model.ngram, tokens * 701 + 13  # up to 44,000
    at, signs = naive_places(rows, tokens, docs)
    got = ngram.places(tokens, T.starts_of(docs))
    assert torch.equal(got[0], at) and torch.equal(got[1], signs)
    if rows == 128:
        want = (filled(model).table[at] * ngram.signs[signs]).sum(2)
        torch.testing.assert_close(ngram.lookup(tokens, docs), want)


def test_signs_are_fair_and_kept():
    ngram = build(ngram=256).ngram
    signs = ngram.signs
    assert set(signs.unique().tolist()) == {-1, 1} and abs(float(signs.float().mean())) < 0.02
    assert torch.equal(build(ngram=256).ngram.signs, signs)
    assert "signs" in ngram.state_dict()


def test_the_largest_tokens_stay_in_their_half():
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_000, 50_257, (64, 256), generator=gen, dtype=torch.int32)
    docs = torch.zeros_like(tokens)
    rows = 1 << 24
    at, signs = build(ngram=rows).ngram.places(tokens, T.starts_of(docs))
    half = rows // 2
    assert (at[:, 1:, 0] >= 0).all() and (at[:, 1:, 0] < half - 1).all()
    assert (at[:, 2:, 1] >= half).all() and (at[:, 2:, 1] < rows - 1).all()
    assert (at[:, 0] == torch.tensor([half - 1, rows - 1])).all() and (
        at[:, 1, 1] == rows - 1
    ).all()
    assert (signs >= 0).all() and (signs < 8192).all()


def test_what_shares_a_row_rarely_shares_signs():
    """Of pairs and of triples of frequent tokens, in a table that is much too small."""
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(3000, (1, 200_000), generator=gen, dtype=torch.int32)
    at, signs = build(ngram=1280).ngram.places(tokens, T.starts_of(torch.zeros_like(tokens)))
    for kind in (0, 1):
        row, sign = at[0, 2:, kind], signs[0, 2:, kind]
        order = row.argsort(stable=True)
        same = row[order[1:]] == row[order[:-1]]
        both = same & (sign[order[1:]] == sign[order[:-1]])
        assert same.sum() > 190_000 and both.sum() < 4 * same.sum() / 8192, (kind, both.sum())


def test_it_joins_every_block():
    model, (tokens, docs) = build(ngram=256), rows_of_text()
    filled(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_(), block.mlp.down.weight.zero_()
        model.resid.copy_(torch.tensor([1.0, 0.0]))
        x = T.norm(model.embed[tokens.long()])
        x = x + model.ngram.scale.sum() * model.ngram.lookup(tokens, docs)
    torch.testing.assert_close(model(tokens, docs, window()), T.norm(x), rtol=1e-5, atol=1e-5)


def test_what_was_looked_up_is_what_forward_looks_up():
    model, (tokens, docs) = build(ngram=256), rows_of_text()
    filled(model)
    own = model(tokens, docs, window())
    assert torch.equal(model(tokens, docs, window(), model.ngram.lookup(tokens, docs)), own)
    assert not torch.equal(model(tokens, docs, window(), torch.zeros(2, 12, 32)), own)


# ---- a table that is not there ------------------------------------------------------------------


def test_a_fresh_model_has_no_table_and_any_number_of_rows():
    """1.6 TB of rows: nothing is allocated, and the logits are those of a model without."""
    (tokens, docs), rows = rows_of_text(), 2**31 - 128
    big, plain = build(False, ngram=rows), build(False)
    big.load_state_dict(build(False, ngram=rows).state_dict())
    assert big.ngram.table is None and "ngram.table" not in big.state_dict()
    assert torch.equal(big(tokens, docs, window()), plain(tokens, docs, window()))
    more = T.count_parameters(big)["stored"] - T.count_parameters(plain)["stored"]
    assert more == rows * 32 + 4
    active = [T.count_parameters(m)["active_matmul"] for m in (big, plain)]
    assert active[0] == active[1]


def test_states_with_and_without_a_table_are_loaded_in_place():
    full, fresh = build(ngram=256), build(ngram=256)
    table = filled(full).table.clone()
    fresh.load_state_dict(full.state_dict())
    assert torch.equal(fresh.ngram.table, table)
    assert fresh.ngram.table.data_ptr() != full.ngram.table.data_ptr()
    at = fresh.ngram.table.data_ptr()
    fresh.load_state_dict(build(ngram=256).state_dict())
    assert fresh.ngram.table.data_ptr() == at and not fresh.ngram.table.any()
    with pytest.raises(RuntimeError, match=r"ngram\.table"):
        fresh.load_state_dict({**full.state_dict(), "ngram.table": table[:-1]})


@pytest.mark.parametrize(
    "flag, changes",
    [
        ("--ngram", {"ngram": 100}),
        ("--ngram", {"ngram": 2**31}),
    ],
)
def test_what_cannot_be(flag, changes):
    (said,) = T.check_config(T.make_config(**changes))
    assert said.startswith(flag)


# ---- the update ---------------------------------------------------------------------------------


def event(seed: int, some: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [N, 2, 2] with rows that come often, once and not at all; a gradient [N, DIM]."""
    gen = torch.Generator().manual_seed(seed)
    row = torch.randint(some, (TOKENS, 2), generator=gen)
    row[::3] //= 16
    sign = torch.randint(T.SIGN_ROWS, (TOKENS, 2), generator=gen)
    grad = torch.randn(TOKENS, DIM, generator=gen)
    return torch.stack([row, sign], -1).int(), grad


class Dense:
    """Adam with beta1 = 0 on the whole table, in fp64: every row in every event."""

    def __init__(self, table: torch.Tensor, signs: torch.Tensor):
        self.w, self.signs = table.double(), signs.double()
        self.v = torch.zeros(len(table), 1, dtype=torch.float64)
        self.count = 0

    def step(self, events, rate: float, factor: float = 1.0) -> None:
        g, touched = torch.zeros_like(self.w), torch.zeros(len(self.w), 1, dtype=torch.bool)
        for places, grad in events:
            for n in range(len(places)):
                for row, sign in places[n].tolist():
                    g[row] += factor * self.signs[sign] * grad[n].double()
                    touched[row] = True
        self.count += 1
        self.v = 0.95 * self.v + 0.05 * g.square().mean(1, keepdim=True)
        step = rate * g / ((self.v / (1 - 0.95**self.count)).sqrt() + 1e-10)
        new = self.w * (1 - rate * GROUP.wd) - step
        new = torch.where(new * g > 0, new * (1 - rate**2 * GROUP.cautious_wd), new)
        self.w = torch.where(touched, new, self.w)


def row_adam(group: T.Group = GROUP) -> T.RowAdam:
    cfg = T.make_config("demo", ngram=ROWS, d_model=DIM, n_layer=2).model
    ngram = T.Ngram(cfg, torch.float32)
    ngram.make()
    return T.RowAdam(ngram, group, CPU)


NO = torch.zeros((), dtype=torch.bool)
ONE = torch.ones(())


@pytest.mark.parametrize("every", [1, 2])
def test_the_update_is_adam_on_all_rows(every):
    """Rows that come again after a while, rows of several tokens, gradients of several steps."""
    rows = row_adam()
    dense = Dense(rows.ngram.table.clone(), rows.ngram.signs)
    held, repeated = [], 0
    for i in range(12):
        places, grad = event(i, some=ROWS if i % 3 else 20)
        repeated += len(places[..., 0].flatten()) - len(places[..., 0].unique())
        rows.fresh = [(places[:9], grad[:9]), (places[9:], grad[9:])]  # of two micro-batches
        want = grad.double().square().sum()
        torch.testing.assert_close(rows.collect().double(), want.view(1), rtol=1e-5, atol=0)
        held.append((places, grad))
        if (i + 1) % every:
            continue
        lr, factor = 1 - 0.05 * i, 0.5 if i == 7 else 1.0
        rows.update(lr, factor * ONE, NO)
        dense.step(held, 0.5 * lr, factor)
        held = []
        torch.testing.assert_close(rows.ngram.table.double(), dense.w, rtol=1e-4, atol=1e-5)
    assert repeated > 60 and int(rows.count) == 12 // every == dense.count
    late = int(rows.count) - rows.seen
    assert (rows.seen == 0).any() and (late == 0).any() and (late > 2).any()
    decayed = rows.second * 0.95**late
    torch.testing.assert_close(decayed.double()[:, None], dense.v, rtol=1e-4, atol=0)


def bits(rows: T.RowAdam) -> list[torch.Tensor]:
    tensors = (rows.ngram.table, rows.second, rows.seen, rows.count)
    return [t.clone().flatten().view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("first", [True, False])
def test_a_bad_update_leaves_the_bits(first):
    rows = row_adam()
    if not first:
        rows.fresh = [event(0)]
        rows.collect()
        rows.update(1.0, ONE, NO)
    before = bits(rows)
    places, grad = event(1)
    grad[3] = math.nan
    rows.fresh = [(places, grad)]
    assert not rows.collect().isfinite()
    rows.update(1.0, ONE, ~NO)
    assert all(map(torch.equal, bits(rows), before)) and not rows.held


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_of_the_table_alone_closes_the_gate(value):
    """All else is finite: no parameter moves in that step, nor in the next."""
    model, (tokens, docs) = build(ngram=256), rows_of_text()
    model.ngram.make()
    opt = T.Optimizer(model, T.parameter_groups(T.OptimConfig()), CPU)
    grad = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))

    def step(grad):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.rows.hold(tokens, docs, grad)
        norm = opt.step(1.0, 0.9, torch.ones(2))
        assert norm.isfinite() == grad.isfinite().all(), "or nobody hears of it"
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        return {**state, **dict(enumerate(bits(opt.rows)))}

    before = step(grad)
    bad = grad.clone()
    bad[1, 3, 5] = value
    for g in (bad, grad):
        after = step(g)
        assert all(torch.equal(after[key], before[key]) for key in before)
    opt.reset()
    assert not torch.equal(step(grad)["embed"], before["embed"])
    assert int(opt.rows.count) == 1


def test_a_run_stops_where_the_tables_gradient_alone_is_not_finite(text_data, tmp_path):
    trainer = T.Trainer(H.tiny(text_data, tmp_path, ngram=256, looks=0))
    hold = trainer.optimizer.rows.hold

    def broken(tokens, docs, grad):
        hold(tokens, docs, grad * math.nan if int(trainer.optimizer.rows.count) == 2 else grad)

    trainer.optimizer.rows.hold = broken
    with pytest.raises(T.NonFinite, match=r"^step 3: .*gradient of ngram\.table first"):
        trainer.run()


def test_ranks_do_not_go_apart_where_the_kernel_fails(text_data, tmp_path, monkeypatch):
    class TwoGpus(T.World):
        cuda = True
        gather = staticmethod(lambda found: [found, found])

    monkeypatch.setattr(T, "probe_rows", lambda device: "broken here")
    trainer = T.Trainer(H.tiny(text_data, tmp_path, ngram=256))
    trainer.world = TwoGpus(trainer.world.device)
    given = (trainer.cfg, trainer.world, trainer.model, trainer.dtype)
    assert T.choose_kernels(*given)["ngram"] == "broken here"
    trainer.world.size = 2
    with pytest.raises(T.InputError, match="several GPUs needs its kernel: broken here"):
        T.choose_kernels(*given)


def test_clipping_falls_on_the_table_too():
    """Adam does not care for a factor, its second moment does."""
    seconds = []
    for clip in (0.0, 1e-4):
        model, (tokens, docs) = build(ngram=256), rows_of_text()
        model.ngram.make()
        opt = T.Optimizer(model, T.parameter_groups(T.OptimConfig()), CPU)
        opt.clip = clip
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.rows.hold(tokens, docs, torch.ones(2, 12, 32))
        norm = opt.step(1.0, 0.9)
        factor = clip * T.LOSS_SCALE / float(norm) if clip else 1.0
        seconds.append(opt.rows.second.clone() / factor**2)
    assert factor < 0.5
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=0)


# ---- in the trainer -----------------------------------------------------------------------------


def config(data, out, **changes) -> T.Config:
    changes = {"ngram": 1024, "n_layer": 4, "micro_batch_tokens": 128, **changes}
    return H.tiny(data, out, muon_dtype="float32", looks=1, **changes)


def first_batch(trainer: T.Trainer) -> T.Batch:
    return next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))


def test_rows_get_the_gradient_that_autograd_has_for_the_table(text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path))
    H.randomise(trainer.model)
    ngram, step, batch = filled(trainer.model), trainer.steps[0], first_batch(trainer)
    trainer.gradients(step, batch)
    (a, b), got = trainer.optimizer.rows.fresh, torch.zeros_like(ngram.table)
    for places, grad in (a, b):
        row, sign = places.long().unbind(-1)
        each = grad[:, None] * ngram.signs[sign]
        got.index_add_(0, row.flatten(), each.flatten(0, 1))
    want = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.optimizer.zero_grad()
    ngram.table.requires_grad_()
    both = T.windows(step.window, torch.device("cpu"))
    h = trainer.model(batch.tokens, batch.docs, both)
    trainer.head.prepare()
    scale = torch.tensor(T.LOSS_SCALE / step.tokens)
    _, grad = trainer.head.backward(h.detach().flatten(0, 1), batch.targets.flatten(), scale)
    h.backward(grad.view_as(h))
    torch.testing.assert_close(got, ngram.table.grad, rtol=1e-3, atol=1e-3 * float(got.abs().max()))
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(want[name], p.grad, rtol=1e-2, atol=1e-2)


def test_a_run_learns_with_it_and_says_its_size(text_data, tmp_path):
    results = {}
    for rows in (0, 8192):
        cfg = config(text_data, tmp_path, ngram=rows, run_id=f"r{rows}", tokens=256 * 40)
        results[rows] = T.train(cfg)["dev_loss"]
        (header,) = H.read_log(tmp_path / f"r{rows}", "header")
        assert header["params"]["stored"] > rows * 32
    assert results[8192] < results[0] - 0.1, results


def final(out, run_id: str) -> dict[str, torch.Tensor]:
    state, _ = T.load_checkpoint(out / run_id)
    tensors = {f"model {n}": t for n, t in state["model"].items()}
    for name, values in state["optimizer"].items():
        tensors |= {f"{name} {key}": t for key, t in values.items()}
    return tensors


@pytest.mark.parametrize("every", [1, 2])
def test_resumed_it_is_the_same_to_the_bit(text_data, tmp_path, every):
    """From a step whose gradient is held for the next, too."""
    changes = {"save_final": True, "save_every": 5, "keep": 9, "adam_every": every}
    T.train(config(text_data, tmp_path, run_id="a", **changes))
    whole, losses = final(tmp_path, "a"), H.losses(tmp_path / "a")
    at = tmp_path / "a" / "ckpt" / "step_00000005"
    held = {"places", "grad"} if every == 2 else set()
    state, _ = T.load_checkpoint(at)
    assert set(state["optimizer"]["ngram.table"]) == {"second", "seen", "step"} | held
    assert state["model"]["ngram.table"].any()
    T.train(config(text_data, tmp_path, run_id="a", **changes, resume=str(at)))
    again = final(tmp_path, "a")
    assert H.losses(tmp_path / "a") == losses and set(again) == set(whole)
    for name, t in whole.items():
        assert torch.equal(again[name], t), name
    assert whole["ngram.table seen"].max() == 8 // every == whole["ngram.table step"]


def test_a_table_s_file_is_shared(tmp_path, monkeypatch):
    """By a second name, or a copy where there are none; whole or refused, as the rest is."""
    table = torch.arange(8.0).view(4, 2)
    state, meta = {"model": {"w": torch.ones(2), "ngram.table": table}}, {"step": 1}
    first = T.save_checkpoint(tmp_path / "a", state, meta, 1)
    _, saved = T.load_checkpoint(first)
    second = T.save_checkpoint(tmp_path / "b", state, saved, 1, first / "table.pt")
    assert (first / "table.pt").samefile(second / "table.pt")

    def no_links(*_):
        raise OSError

    monkeypatch.setattr(T.os, "link", no_links)
    third = T.save_checkpoint(tmp_path / "c", state, saved, 1, first / "table.pt")
    assert not (first / "table.pt").samefile(third / "table.pt")
    for folder in (first, second, third):
        got, meta = T.load_checkpoint(folder)
        assert torch.equal(got["model"]["ngram.table"], table) and "w" in got["model"]
        assert meta["table_sha256"] == saved["table_sha256"]
    plain = T.save_checkpoint(tmp_path / "d", {"model": {"w": torch.ones(2)}}, saved, 1)
    assert "table_sha256" not in T.load_checkpoint(plain)[1]
    with (third / "table.pt").open("r+b") as f:
        f.seek(-4, 2)
        f.write(b"oops")
    with pytest.raises(T.InputError, match=r"table\.pt is damaged"):
        T.load_checkpoint(third)
    (third / "table.pt").unlink()
    with pytest.raises(T.InputError, match="is no checkpoint"):
        T.load_checkpoint(third)


def test_reset_and_park_start_afresh(text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path, run_id="a"))
    trainer.run()
    assert trainer.model.ngram.table.any()
    trainer.reset(0, run_id="b")
    assert not trainer.model.ngram.table.any() and not trainer.optimizer.rows.second.any()
    trainer.run()
    trainer.park()
    assert trainer.model.ngram.table is None, "its memory is the largest of all"
    trainer.reset(0, run_id="c")
    trainer.run()
    assert H.losses(tmp_path / "a") == H.losses(tmp_path / "b") == H.losses(tmp_path / "c")


def test_the_tail_leaves_the_table_as_it_is(text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path, run_id="a", tail=0.5, tail_every=1))
    tables = []
    trainer.hooks.after_step = lambda t, step: tables.append(t.model.ngram.table.clone())
    trainer.run()
    assert H.read_log(tmp_path / "a", "event")[-1]["kind"] == "tail"
    assert torch.equal(trainer.model.ngram.table, tables[-1]) and not torch.equal(*tables[-2:])


def test_blame_names_the_table(text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path))
    step, batch = trainer.steps[0], first_batch(trainer)
    assert "suspect the machine" in T.blame(trainer, step, batch)
    hold = trainer.optimizer.rows.hold
    trainer.optimizer.rows.hold = lambda *a: hold(*a[:-1], a[-1] * math.nan)
    assert "gradient of ngram.table first, 1 of" in T.blame(trainer, step, batch)
    trainer.model.ngram.table[700, 3] = math.inf
    assert T.blame(trainer, step, batch) == "rank 0: the weight ngram.table is not finite"


def test_a_checkpoint_is_a_model(text_data, tmp_path):
    trainer = T.Trainer(config(text_data, tmp_path, run_id="a", save_final=True))
    trainer.run()
    model, _ = T.load_model(tmp_path / "a")
    batch = first_batch(trainer)
    inputs = (batch.tokens, batch.docs, T.windows(128, torch.device("cpu")))
    assert torch.equal(model.ngram.table, trainer.model.ngram.table)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), trainer.model(*inputs))


def test_a_table_made_for_a_checkpoint_has_its_dtype():
    """That of a GPU's run is in bfloat16, and in an fp32 model it stays so; one that is there takes
    what it is given."""
    model = build(ngram=256)
    model.ngram.make(torch.bfloat16)
    model.ngram.table.normal_()
    loaded, inputs = build(ngram=256), (*rows_of_text(), window())
    loaded.load_state_dict(model.state_dict())
    assert loaded.ngram.table.dtype == torch.bfloat16
    widened = build(ngram=256)
    widened.ngram.make()
    widened.load_state_dict(model.state_dict())
    assert widened.ngram.table.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), widened(*inputs)), "rows are added up in the model's"


def test_evals_take_a_checkpoint_of_it(text_data, tmp_path):
    """Fine-tuning starts from the checkpoint's table, also after its memory was given away."""
    pytest.importorskip("transformers")
    import fake_tasks
    import test_finetune

    from evals import csqa, finetune, look, sample

    run = T.train(config(text_data, tmp_path, run_id="a", save_final=True))["run"]
    assert sample.main([run, "--prompt", "The", "--tokens", "4"]) == 0
    assert look.main([run, "Some text", "--out", str(tmp_path / "page.html")]) == 0
    start = finetune.Start.load(run, "")
    task = csqa.make(fake_tasks.write_csqa(tmp_path / "tasks"), start.words, 0)[0]
    tuning = finetune.Tuning(start, task, test_finetune.arguments(tmp_path / "a", tmp_path / "f"))
    for seed in (0, 1):
        tuning.trainer.reset(seed, seed)
        assert test_finetune.same(tuning.trainer.model.state_dict(), start.weights)
        tuning.trainer.park()
    assert start.weights["ngram.table"].any()


# ---- ranks --------------------------------------------------------------------------------------

RANKED = {"adam_every": 2, "save_every": 5, "save_final": True, "keep": 9}


def work(data: str, out: str) -> dict:
    trainer = T.Trainer(config(data, out, run_id="two", **RANKED))
    trainer.run()
    return {"table": trainer.model.ngram.table, "second": trainer.optimizer.rows.second}


def test_two_ranks_are_one_and_go_on_as_one(text_data, tmp_path):
    """The same table on both, that of one rank within rounding; a held gradient from both ranks is
    in the checkpoint, from which one rank goes on."""
    a, b = H.on_ranks(2, work, tmp_path / "ranks", str(text_data), str(tmp_path))
    assert all(torch.equal(a[key], b[key]) for key in a)
    T.train(config(text_data, tmp_path, run_id="one", **RANKED))
    two, one = (final(tmp_path, name) for name in ("two", "one"))
    assert set(two) == set(one)
    places = [T.load_checkpoint(tmp_path / n / "ckpt" / "step_00000005")[0] for n in ("one", "two")]
    held = [state["optimizer"]["ngram.table"] for state in places]
    assert held[0]["grad"].shape == (256, 32)
    assert torch.equal(held[0]["places"], held[1]["places"])
    torch.testing.assert_close(held[0]["grad"], held[1]["grad"], rtol=1e-3, atol=0.05)
    off = (one["model ngram.table"] - two["model ngram.table"]).norm()
    assert off < 1e-3 * one["model ngram.table"].norm()
    losses = H.losses(tmp_path / "two")
    assert losses == pytest.approx(H.losses(tmp_path / "one"), abs=2e-5)
    resume = str(tmp_path / "two" / "ckpt" / "step_00000005")
    T.train(config(text_data, tmp_path, **RANKED, resume=resume))
    assert H.losses(tmp_path / "two") == pytest.approx(losses, abs=2e-5)


# ---- compiled -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_compiled_run_makes_all_its_graphs_in_warm_up(text_data, tmp_path):
    """A recompile after it is an error; the losses are those of the plain run."""
    for compiled in (False, True):
        changes = {"compile": compiled, "n_layer": 2, "adam_every": 2}
        T.train(config(text_data, tmp_path, run_id=f"c{compiled}", **changes))
    plain, compiled = (H.losses(tmp_path / f"c{c}") for c in (False, True))
    assert plain == pytest.approx(compiled, abs=1e-4)


gpu = pytest.mark.gpu
here = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


@gpu
@here
def test_gpu_lookup_compiled_in_a_table_beyond_32_bits():
    """2^31 numbers and more: the last rows are found, by Inductor's kernel, too."""
    torch._dynamo.reset()
    cfg = T.make_config(ngram=1 << 22, vocab=50_304).model
    ngram = T.Ngram(cfg, torch.bfloat16).cuda()
    ngram.make()
    assert ngram.table.numel() > 2**31
    ngram.table.normal_()
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_257, (4, 4096), generator=gen, dtype=torch.int32)
    docs = (torch.rand(4, 4096, generator=gen) < 0.01).cumsum(1).int()
    at, signs = (t.cuda() for t in ngram.places(tokens, T.starts_of(docs)))
    want = torch.zeros(4, 4096, 768, device="cuda")
    for kind in (0, 1):
        want += ngram.table[at[..., kind]].float() * ngram.signs[signs[..., kind]]
    look = torch.compile(ngram.lookup, fullgraph=True, dynamic=False)
    for call in (ngram.lookup, look):
        got = call(tokens.cuda(), docs.cuda())
        assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def no_wait(trainer: T.Trainer, part: T.Batch) -> None:
    rows, one = trainer.optimizer.rows, torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (e,) = trainer.lm.looked_up(part)
        for _ in range(2):
            rows.hold(part.tokens, part.docs, torch.ones_like(e))
            rows.collect()
        rows.update(1.0, one, trainer.optimizer.bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@here
def test_gpu_run(text_data, tmp_path):
    """Compiled, with the kernel: nothing compiles after warm-up, no step waits for the device, and
    the losses follow those of the plain update."""
    changes = {"device": "cuda", "dtype": "bfloat16", "compile": True, "adam_every": 2}
    changes |= {
        "row_tokens": 128,
        "val_row_tokens": 128,
        "stages": (T.Stage(1.0, 1024, 1.0, (128, 128)),),
    }
    changes |= {"micro_batch_tokens": 512, "val_call_tokens": 1024, "tokens": 1024 * 20}
    losses = []
    for run_id in ("kernel", "plain"):
        trainer = T.Trainer(config(text_data, tmp_path, **changes, run_id=run_id))
        assert trainer.uses("ngram") and trainer.optimizer.rows.update_rows is T.fused_row_update
        if run_id == "plain":
            trainer.optimizer.rows.update_rows = T.row_update
        trainer.warm_up()
        if run_id == "kernel":
            no_wait(trainer, first_batch(trainer).split(4)[0].to(trainer.world.device))
            trainer.start()
        trainer.run()
        losses.append(H.losses(tmp_path / run_id))
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0][-1] < losses[0][0] - 0.3
