"""evals/prune.py: which key goes, that it never comes back, and that a pruned layer computes what a
cache that really forgets would."""

from __future__ import annotations

import json

import helpers as H
import pytest
import test_attention as A
import torch

from evals import prune

T = H.T
LENGTH = A.LENGTH


# ---- which key goes -----------------------------------------------------------------------------


def by_hand(rank, seen, first, budget: int) -> torch.Tensor:
    """One row [T, T] with a list for the cache."""
    out, cache = torch.zeros_like(seen), []
    for i in range(len(rank)):
        cache = [j for j in [*cache, i] if seen[i, j]]
        if len(cache) > budget:
            may_go = [j for j in cache if j != i and not first[j]]
            cache.remove(max(may_go, key=lambda j: (float(rank[i, j]), -j)))
        out[i, cache] = True
    return out


@pytest.mark.parametrize("queries", [5, 256])
@pytest.mark.parametrize("budget", [2, 3, 7, LENGTH])
def test_kept_keys(budget, queries, monkeypatch):
    """Against the list, with documents and a window; at most the budget; what is gone stays gone;
    the newest and a document's first stay."""
    monkeypatch.setattr(prune, "QUERIES", queries)
    docs = A.documents().repeat(3, 1)
    seen, first = T.dense_mask(docs, torch.tensor([11]))[:, 0], T.starts_of(docs)
    gen = torch.Generator().manual_seed(0)
    rank = torch.rand(6, LENGTH, LENGTH, generator=gen).round(decimals=1).cumsum(1)
    got = prune.kept_keys(rank, seen, first, budget)
    for row, *of_row in zip(got, rank, seen, first, strict=True):
        assert torch.equal(row, by_hand(*of_row, budget))
    assert got.sum(-1).max() <= budget
    assert got.diagonal(dim1=-2, dim2=-1).all()
    assert not (got[:, 1:] & ~got[:, :-1]).tril(-1)[..., :-1, :].tril(0).any()
    kept_first = got | ~(seen & first[:, None])
    assert kept_first.all()
    if budget == LENGTH:
        assert torch.equal(got, seen)


@pytest.mark.parametrize("window", [3, 11, LENGTH])
@pytest.mark.parametrize("budget", [2, 3, 7, LENGTH])
def test_newest_keys(budget, window):
    """What goes by age is known without a look at what went before, also where a document's first
    token leaves the window."""
    at = torch.arange(LENGTH)
    docs, age = A.documents(), (at[:, None] - at).float().expand(2, -1, -1)
    seen, first = T.dense_mask(docs, torch.tensor([window]))[:, 0], T.starts_of(docs)
    want = prune.kept_keys(age, seen, first, budget)
    assert torch.equal(prune.newest_keys(seen, first, budget), want)
    assert torch.equal(by_hand(age[0], seen[0], first[0], budget), want[0])


def test_order_of_ranks():
    """By rank, of equals the older; zeros of both signs are equal."""
    rank = torch.tensor([0.5, -torch.inf, 0.0, -0.0, -2.0, 3e-39, -torch.inf, -1.0, 0.5, torch.inf])
    order = prune.in_order(rank).tolist()
    want = sorted(range(len(rank)), key=lambda j: (float(rank[j]), -j))
    assert sorted(range(len(rank)), key=order.__getitem__) == want
    assert len(set(order)) == len(rank) and min(order) > torch.iinfo(torch.int64).min


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_of_equals_the_oldest_goes(device):
    """Long rows of one and the same rank, whatever the order in which a device compares them."""
    length, budget = 200, 7
    rank = torch.zeros(2, length, length, device=device)
    rank[1] = -torch.inf
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(2, -1, -1)
    first = torch.zeros(2, length, dtype=torch.bool, device=device)
    first[:, 0] = True
    got = prune.kept_keys(rank, seen, first, budget)
    at = torch.arange(length, device=device)
    back = at[:, None] - at
    want = (back >= 0) & ((back < budget - 1) | (at == 0)) | (back >= 0) & (at[:, None] < budget)
    assert torch.equal(got, want.expand_as(got))


# ---- what a pruned layer computes ---------------------------------------------------------------


class Forgetful:
    """A layer's cache as a decoder would hold it: keys and values that are there, and what was
    taken from each so far."""

    def __init__(self, budget: int, by_age: bool):
        self.budget, self.by_age, self.items = budget, by_age, {}

    def step(self, i: int, q, k, v, select_q, select_k, scale: float) -> torch.Tensor:
        """q [H, D], k and v [H, D] of token i, the selecting head's q and k [D] -> [H, D]."""
        self.items[i] = [k, v, select_k, torch.zeros(())]
        if len(self.items) > self.budget:
            may_go = [j for j in self.items if j not in (0, i)]
            oldest = (lambda j: -j) if self.by_age else (lambda j: (float(self.items[j][3]), -j))
            del self.items[max(may_go, key=oldest)]
        keys, values, _, taken = map(torch.stack, zip(*self.items.values()))
        score = scale * torch.einsum("hd,jhd->hj", q, keys) - taken
        y = torch.einsum("hj,jhd->hd", torch.softmax(score, -1), values)
        for j, item in self.items.items():
            if j not in (0, i):
                item[3] = item[3] + torch.relu(scale * select_q @ item[2])
        return y


@torch.no_grad()
@pytest.mark.parametrize("policy", prune.POLICIES)
@pytest.mark.parametrize("budget", [2, 5, 13, LENGTH])
def test_a_pruned_layer_is_a_forgetful_one(budget, policy):
    """Selective attention in a single document: token by token, with keys deleted."""
    cfg, attn, _ = A.build("selective", 3, value_tables=0, score_scale=0.1)
    arm, docs = attn.arm, torch.zeros(1, LENGTH, dtype=torch.int32)
    ctx = T.GPT(cfg, LENGTH).contexts(docs, torch.tensor([99, 99], dtype=torch.int32))[3]
    x = torch.randn(1, LENGTH, cfg.d_model, generator=torch.Generator().manual_seed(1))
    sizes = []
    with prune.pruning(budget / LENGTH, policy, sizes):
        got = arm(x, None, ctx)[0][0].unflatten(-1, (arm.heads, -1))
    assert sizes == [(budget, LENGTH)]
    q, k, v = ((x[0] @ m.weight.T).unflatten(-1, (arm.heads, -1)) for m in (arm.q, arm.k, arm.v))
    q, k = (t[0] for t in arm.position(q[None], k[None], ctx))
    cache = Forgetful(budget, policy == "age")
    want = [
        cache.step(i, q[i], k[i], v[i], q[i, 0], k[i, 0], ctx.scale(cfg.head_dim))
        for i in range(LENGTH)
    ]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
    if budget < LENGTH:
        assert (got - arm(x, None, ctx)[0][0].view_as(got)).abs().max() > 1e-3


@torch.no_grad()
def test_paired_heads_have_two_keys_a_token():
    """Rows of twice the length: half of them kept are so many keys; all, the layer's own output."""
    cfg = T.make_config("demo", **{**SMALL, "paired": (1,)}).model
    model = T.GPT(cfg, LENGTH).eval()
    H.randomise(model)
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0)).int()
    inputs = (tokens, torch.zeros_like(tokens), torch.tensor([99, 99], dtype=torch.int32))
    want, found = model(*inputs), {}
    for share in (1.0, 0.5):
        sizes = []
        with prune.pruning(share, "age", sizes):
            found[share] = model(*inputs)
        full = 2 * LENGTH
        assert sizes[1] == (round(share * full), full)
        assert sizes[0] == (round(share * LENGTH), LENGTH)
    assert torch.equal(found[1.0], want) and not torch.equal(found[0.5], want)


# ---- the command --------------------------------------------------------------------------------

SMALL = {
    **{"n_layer": 3, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0, 1, 2)},
    **{"backout": -1, "vocab": H.BYTE_VOCAB, "row_tokens": 64, "value_tables": 1},
}


def checkpoint(folder, **changes):
    cfg = T.make_config("demo", **{**SMALL, **changes})
    model = T.GPT(cfg.model, 64)
    H.randomise(model)
    meta = {"schema": T.SCHEMA, "step": 8, "steps": 8, "tokens": 4096, "window": 128}
    meta |= {"arm": cfg.model.arm, "config": cfg.flat()}
    T.save_checkpoint(folder / "ckpt", {"model": model.state_dict()}, meta, 1)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return H.write_text_corpus(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("arm", ["selective", "diff_v2,selective=true,layers=1,window2=9"])
def test_command(arm, text, tmp_path, capsys):
    soft, own = checkpoint(tmp_path / "soft"), checkpoint(tmp_path / "own", arm=arm)
    out = tmp_path / "out"
    argv = [str(soft), str(own), "--data", str(text), "--documents", "5", "--out", str(out)]
    assert prune.main([*argv, "--kept", "1", "0.5", "0.1"]) == 0
    said = json.loads((out / "prune.json").read_text())
    assert (said["tokens"], said["documents"]) == (64, 5)
    lines = [(p["run"], p["policy"]) for p in said["points"]]
    assert sorted(set(lines)) == [("own", "age"), ("own", "masked"), ("soft", "age")]
    assert [p["kept"] for p in said["points"][:3]] == pytest.approx([1, 0.5, 6 / 64])
    points = {(p["run"], p["policy"], round(p["kept"], 1)): p["loss"] for p in said["points"]}
    assert points["own", "age", 1.0] == points["own", "masked", 1.0]
    assert points["own", "age", 0.1] != points["own", "masked", 0.1]
    assert points["soft", "age", 0.5] != points["soft", "age", 1.0]
    assert "5 documents of dev, 64 tokens each" in capsys.readouterr().out
    rows = prune.long_documents(T.Corpus.open(str(text)), 64, 5)
    assert rows.shape == (5, 65)
    assert (rows[:, 0] == H.EOT).all()
    assert not (rows[:, 1:] == H.EOT).any()
    model, meta = T.load_model(own)
    model.requires_grad_(False)
    tokens, docs = torch.from_numpy(rows[:, :-1]), torch.zeros(5, 64, dtype=torch.int32)
    h = model(tokens, docs, T.windows(meta["window"], "cpu"))
    z = T.softcap(h @ model.head.t(), model.softcap)
    nats = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten()
    )
    assert points["own", "masked", 1.0] == pytest.approx(float(nats), rel=1e-5)


@pytest.fixture
def command(text, tmp_path):
    """(words -> exit code) of two runs on 5 documents, in one folder; what prune.json then says."""
    checkpoint(tmp_path / "soft")
    checkpoint(tmp_path / "own", arm="selective")
    file = tmp_path / "out" / "prune.json"

    def call(*runs, more=()) -> int:
        words = [str(tmp_path / run) for run in runs] + ["--out", str(file.parent)]
        words += ["--data", str(text), "--documents", "5", "--kept", "1", "0.5", *more]
        return prune.main(words)

    return call, file


def test_goes_on(command, monkeypatch):
    """What was measured before it ended is there, and is not measured again; another run joins."""
    call, file = command
    losses, count = prune.losses, []

    def two(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "losses", two)
        with pytest.raises(KeyboardInterrupt):
            call("own")
    before = prune.read(file)["points"]
    assert [(p.policy, p.share) for p in before] == [("masked", 1), ("masked", 0.5)]
    assert not (file.parent / "prune.svg").exists()
    count.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prune, "losses", two)
        assert call("own") == 0
    first = prune.read(file)["points"]
    assert first[:2] == before and len(first) == 4
    assert call("soft") == 0
    both = prune.read(file)["points"]
    assert both[:4] == first and [p.run for p in both[4:]] == ["soft"] * 2
    assert [f.name for f in file.parent.glob("*.json")] == ["prune.json"]
    assert call("own", more=["--documents", "4"]) == 2
    assert call("own", "soft", "own") == 2
    assert prune.read(file)["points"] == both


def test_other_weights_are_measured(command):
    """A run that was trained anew, or of which nobody knows the weights: its points go."""
    call, file = command
    assert call("soft", "own") == 0
    said = prune.read(file)
    strange = {"soft": "0" * 64, "own": None}
    said["points"] = [
        prune.Point(**{**vars(p), "weights": strange[p.run], "loss": -1.0}) for p in said["points"]
    ]
    prune.write(file, {**said, "text": None})
    assert call("soft") == 0
    points = prune.read(file)["points"]
    assert {p.run: p.loss > 0 for p in points} == {"soft": True, "own": False}
    assert call("own") == 0
    points = prune.read(file)["points"]
    assert len(points) == 6 and all(p.loss > 0 for p in points)


def test_draws_what_is_there(command, capsys):
    call, file = command
    assert call("soft") == 0
    plot = file.parent / "prune.svg"
    plot.unlink()
    text = file.read_text()
    assert prune.main(["--out", str(file.parent)]) == 0
    assert plot.is_file() and file.read_text() == text
    plot.unlink()
    file.write_text("{}")
    assert prune.main(["--out", str(file.parent)]) == 2
    assert "is no file of evals/prune.py" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["softmax", "selective"])
def test_documents_in_one_call_or_several(arm, text, tmp_path, monkeypatch):
    run = checkpoint(tmp_path / "r", arm=arm)
    rows = prune.long_documents(T.Corpus.open(str(text)), 64, 5)
    want = list(prune.measure(run, rows, [1.0, 0.1], "cpu", set()))
    assert len(want) == (4 if "selective" in arm else 2)
    monkeypatch.setitem(prune.CALL_NUMBERS, "cpu", 2 * 2 * 64**2)  # two rows of two heads
    for a, b in zip(prune.measure(run, rows, [1.0, 0.1], "cpu", set()), want, strict=True):
        assert (a.kept, a.loss) == (b.kept, pytest.approx(b.loss, rel=1e-6))


def test_bad_words(text, tmp_path, capsys):
    run = str(checkpoint(tmp_path / "r"))
    for words, said in (
        (["--kept", "0"], "shares above 0"),
        (["--tokens", "1"], "2 or more"),
        (["--tokens", str(10**6)], "lower --tokens"),
        (["--data", str(tmp_path / "no")], "no folder of tokens"),
        (["--data", ""], "which text"),
    ):
        argv = [run, "--data", str(text), "--out", str(tmp_path / "o"), *words]
        assert prune.main(argv) == 2, words
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()
