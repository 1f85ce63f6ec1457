"""Shards that hold an integer ramp: what comes out says where it came from. No token is lost or
repeated, over steps, shards and passes, at any number of ranks; documents stay whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import helpers as H
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = H.T
EOT = 0  # here: the ramp itself begins at 1
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ramps")


def ramps(folder: Path, shards: list[list[int]], skip_first: bool = False) -> list[T.Shard]:
    """Shards of documents of these lengths: end-of-text, then a ramp that goes on through all."""
    out, value = [], 1
    for i, lengths in enumerate(shards):
        tokens = []
        for n in lengths:
            tokens += [EOT, *range(value, value + n - 1)]
            value += n - 1
        tokens = tokens[1:] if skip_first else tokens
        out.append(T.Shard.open(H.write_shard(folder / f"ramp_{i}.bin", tokens)))
    return out


def whole(shards: list[T.Shard]) -> np.ndarray:
    return np.concatenate([s.load() for s in shards])


def documents(tokens: np.ndarray, first: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(d.tolist()) for d in np.split(tokens, np.flatnonzero(first)[1:])]


LENGTHS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(lengths=LENGTHS, seed=st.sampled_from([0, 1, 7]), cuts=st.lists(st.integers(1, 90)))
def test_no_gap_or_repeat(folder, lengths, seed, cuts):
    """Read in pieces of any size, three passes: each pass is every token once; file order at 0."""
    shards = ramps(folder, lengths)
    stream = T.TokenStream(shards, EOT, seed)
    total = stream.total
    assert total == sum(map(sum, lengths))
    pieces, at = [], 0
    for n in [*cuts, 3 * total]:
        n = min(n, 3 * total - at)
        pieces.append(stream.read(at, n))
        at += n
    tokens = np.concatenate([p[0] for p in pieces])
    first = np.concatenate([p[1] for p in pieces])
    assert len(tokens) == 3 * total
    want = whole(shards)
    for turn in range(3):
        part = slice(turn * total, (turn + 1) * total)
        assert sorted(tokens[part].tolist()) == sorted(want.tolist())
        assert first[part.start], "a pass begins a document"
        assert (tokens[part][first[part]] == EOT).all()
        assert first[part].sum() == sum(map(len, lengths))
        if seed == 0:
            assert (tokens[part] == want).all()


@quick
@given(lengths=LENGTHS, seed=st.integers(1, 99))
def test_permuted_documents_stay_whole(folder, lengths, seed):
    """Another order of the same documents, in order inside, shards not mixed."""
    shards = ramps(folder, lengths)
    stream = T.TokenStream(shards, EOT, seed)
    tokens, first = stream.read(0, 2 * stream.total)
    plain = T.TokenStream(shards, EOT)
    want = documents(*plain.read(0, plain.total))
    for turn in range(2):
        part = slice(turn * stream.total, (turn + 1) * stream.total)
        assert sorted(documents(tokens[part], first[part])) == sorted(want)
        at = 0
        for index in stream.order(turn):  # a shard's documents come together
            shard = shards[index]
            mine = tokens[part][at : at + shard.tokens]
            assert sorted(mine.tolist()) == sorted(shard.load().tolist())
            at += shard.tokens


def test_the_order_follows_the_seed_and_the_pass(folder):
    shards = ramps(folder, [[5] * 30, [4] * 30, [7] * 30])
    total = sum(s.tokens for s in shards)

    def read(seed, turn=0):
        return T.TokenStream(shards, EOT, seed).read(turn * total, total)[0].tolist()

    assert read(3) == read(3), "an order is a function of the seed"
    assert read(0, 1) == read(0, 0)
    different = [read(0), read(3), read(4), read(3, 1), read(4, 1)]
    assert len(set(map(tuple, different))) == 5
    assert read(3, 1) == T.TokenStream(shards, EOT, 3).read(0, 2 * total)[0][total:].tolist()


def test_reading_backwards_and_far(folder):
    """A position means the same whatever was read before it (resume jumps)."""
    shards = ramps(folder, [[9, 3, 12], [8, 8], [5, 1, 6]])
    for seed in (0, 2):
        stream = T.TokenStream(shards, EOT, seed)
        all_of = stream.read(0, 4 * stream.total)
        for start in (3 * stream.total + 5, 0, stream.total - 3, 17, 2 * stream.total):
            again = T.TokenStream(shards, EOT, seed).read(start, 40)
            mine = stream.read(start, 40)
            for a, b, c in zip(again, mine, all_of):
                assert (a == b).all() and (a == c[start : start + 40]).all()


def test_part_of_a_shard(folder):
    """A held-out end is never read, and its own first token opens a document."""
    (shard,) = ramps(folder, [[10, 10, 10]])
    cut = dataclasses.replace(shard, hi=17)
    rest = dataclasses.replace(shard, lo=17)
    assert (whole([cut, rest]) == shard.load()).all()
    tokens, first = T.TokenStream([cut], EOT).read(0, 34)
    assert (tokens[:17] == tokens[17:]).all() and first[0] and first[17]
    tokens, first = T.TokenStream([rest], EOT).read(0, 13)
    assert first.nonzero()[0].tolist() == [0, 3]


# ---- rows ---------------------------------------------------------------------------------------


@quick
@given(
    lengths=LENGTHS,
    seed=st.sampled_from([0, 5]),
    rows=st.integers(1, 6),
    row=st.integers(1, 40),
    start=st.integers(0, 200),
)
def test_make_batch(folder, lengths, seed, rows, row, start):
    stream = T.TokenStream(ramps(folder, lengths), EOT, seed)
    n = rows * row
    want, first = stream.read(start, n + 1)
    batch = T.make_batch(stream, start, rows, row)
    assert all(t.shape == (rows, row) for t in vars(batch).values())
    kinds = [t.dtype for t in (batch.tokens, batch.targets, batch.docs, batch.position)]
    assert kinds == [torch.int32, torch.int64, torch.int32, torch.int32]
    assert batch.tokens.flatten().tolist() == want[:-1].tolist()
    assert batch.targets.flatten().tolist() == want[1:].tolist(), "the next token, over row ends"
    opens = first[:-1].reshape(rows, row)
    for r in range(rows):  # by hand: a document goes on as a new piece in the next row
        at = doc = 0
        for t in range(row):
            if opens[r, t]:
                at, doc = 0, doc + 1
            assert batch.position[r, t] == at and batch.docs[r, t] == doc
            at += 1


def test_documents_come_from_the_loader_not_from_tokens(folder):
    """A shard that does not begin with end-of-text (the held-out end of one, or a file cut in
    mid-document) begins a document all the same; a row does not."""
    shards = ramps(folder, [[6, 6], [6, 6]], skip_first=True)  # 11 tokens each
    batch = T.make_batch(T.TokenStream(shards, EOT), 0, 1, 22)
    assert batch.docs[0].tolist() == [1] * 5 + [2] * 6 + [3] * 5 + [4] * 6
    assert batch.position[0, [0, 5, 11, 16]].tolist() == [0, 0, 0, 0]
    rows = T.make_batch(T.TokenStream(shards, EOT), 3, 2, 4)
    assert rows.docs.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert rows.position.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]


@quick
@given(length=st.integers(2, 200), rows=st.integers(1, 4), row=st.integers(1, 16), data=st.data())
def test_validation_counts_every_target_once(folder, length, rows, row, data):
    """Targets are tokens 1 to `total`; the last call is filled up with targets of -1."""
    stream = T.TokenStream(ramps(folder, [[length]]), EOT)
    total = data.draw(st.integers(1, length - 1))
    call, seen = rows * row, []
    for i in range(-(-total // call)):
        batch = T.make_batch(stream, i * call, rows, row, total)
        seen += batch.targets[batch.targets >= 0].tolist()
        tail = batch.targets.flatten() < 0
        assert not tail[: max(0, min(call, total - i * call))].any()
    assert seen == list(range(1, total + 1))


def test_evaluate_counts_every_target_once(tmp_path, text_data):
    """Through Trainer.evaluate itself: a number of targets that no row or call divides, and a loss
    that does not depend on how they are cut into calls."""
    results = {}
    for call, cap in ((64, 2000), (256, 2000), (1024, 2000), (256, 333), (256, 10**9)):
        cfg = H.tiny(text_data, tmp_path, val_call_tokens=call, val_tokens=cap)
        trainer = T.Trainer(cfg)
        H.randomise(trainer.model)
        results[call, cap] = trainer.evaluate("val", 128)
        want = min(cap, trainer.corpus.tokens("val") - 1)
        assert results[call, cap]["targets"] == want
    losses = [results[call, 2000]["loss"] for call in (64, 256, 1024)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert results[256, 333]["loss"] != pytest.approx(losses[0], rel=1e-3)


def test_bits_a_byte_and_positions(tmp_path, text_data):
    """A model that says nothing: log(padded vocabulary) nats for every token; bits a byte leave
    out the end-of-text targets, the mean does not."""
    rows = {"val_tokens": 10**9, "val_row_tokens": 512, "val_call_tokens": 4096}
    trainer = T.Trainer(H.tiny(text_data, tmp_path, **rows))
    result = trainer.evaluate("val", 128)
    flat = float(np.log(T.padded(H.BYTE_VOCAB)))
    assert result["loss"] == pytest.approx(flat, rel=1e-6)
    assert result["bpb"] == pytest.approx(flat / np.log(2), rel=1e-6)
    assert set(result["by_position"]) == {"0-128", "128-512"}
    assert all(v == pytest.approx(flat, rel=1e-6) for v in result["by_position"].values())


# ---- steps and ranks ----------------------------------------------------------------------------


def run_of(world_size: int, cfg: T.Config, shards, steps) -> list[list[T.Batch]]:
    """The batches of each step, rank by rank."""
    stream = [T.TokenStream(shards, EOT, cfg.data.data_seed) for _ in range(world_size)]
    parts = [
        list(T.train_batches(stream[r], steps, cfg, T.World(CPU, r, world_size)))
        for r in range(world_size)
    ]
    return [list(ranks) for ranks in zip(*parts, strict=True)]


@pytest.mark.parametrize("seed", [0, 11])
def test_every_world_size_sees_the_same_rows(folder, seed):
    """Two stages, three shards, two passes: steps are consecutive, whole, and the same."""
    gen = np.random.default_rng(3)
    shards = ramps(folder, [gen.integers(1, 60, 40).tolist() for _ in range(3)])
    have = sum(s.tokens for s in shards)
    stages = (T.Stage(0.5, 128, 1.0, (128, 128)), T.Stage(0.5, 256, 1.0, (128, 128)))
    cfg = T.make_config("demo", stages=stages, row_tokens=16, data_seed=seed)
    steps = T.plan_steps(cfg, 2 * have)
    assert len({s.stage for s in steps}) == 2 and steps[-1].start > have
    alone = run_of(1, cfg, shards, steps)
    text, _ = T.TokenStream(shards, EOT, seed).read(0, 2 * have)
    got = torch.cat([b[0].tokens.flatten() for b in alone])
    assert got.tolist() == text[: len(got)].tolist(), "no gap or repeat between steps"
    for size in (2, 4, 8):
        many = run_of(size, cfg, shards, steps)
        for (one,), ranks in zip(alone, many, strict=True):
            for name, whole_ in vars(one).items():
                joined = torch.cat([getattr(b, name) for b in ranks])
                assert torch.equal(joined, whole_), (size, name)


def test_data_seed_changes_order_not_content(folder):
    shards = ramps(folder, [[5] * 30, [4] * 30])
    have = sum(s.tokens for s in shards)
    cfg = T.make_config("demo", stages=(T.Stage(1.0, have // 6 // 8 * 8, 1, (128, 128)),))
    texts = {}
    for seed in (0, 1, 2):
        stream = T.TokenStream(shards, EOT, seed)
        texts[seed] = stream.read(0, have)[0].tolist()
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2])
    assert texts[0] != texts[1] != texts[2] and texts[0] != texts[2]
    assert cfg.data.data_seed == 0, "records use file order"


def test_a_run_may_go_on_from_any_step(folder):
    """Batches from step k on equal the rest of the batches from the start."""
    shards = ramps(folder, [[13] * 20, [9] * 30])
    cfg = T.make_config("demo", stages=(T.Stage(1.0, 64, 1, (128, 128)),), data_seed=4)
    steps = T.plan_steps(cfg, 1000)
    all_of = run_of(1, cfg, shards, steps)
    rest = run_of(1, cfg, shards, steps[5:])
    for (a,), (b,) in zip(all_of[5:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))
    assert run_of(1, cfg, shards, []) == []


@given(rows=st.integers(1, 64), row=st.sampled_from([16, 256, 16384]), most=st.integers(0, 200_000))
def test_micro_rows(rows, row, most):
    n = T.micro_rows(rows, row, most)
    assert rows % n == 0 and (n == 1 or n * row <= most)
    assert all(rows % k or k * row > most for k in range(n + 1, rows + 1)), "the largest divisor"


@given(
    tokens=st.sampled_from([65_536, 131_072, 262_144, 393_216]), world=st.sampled_from([1, 2, 4, 8])
)
def test_rows_of_a_step(tokens, world):
    """Rows of 16,384, 8 / 16 / 24 a step; a smaller step has 8 shorter rows."""
    rows, row = T.step_rows(tokens, 16_384)
    want = {65_536: (8, 8192), 131_072: (8, 16_384), 262_144: (16, 16_384), 393_216: (24, 16_384)}
    assert (rows, row) == want[tokens] and rows % world == 0


def test_batch_pieces(folder):
    stream = T.TokenStream(ramps(folder, [[40] * 4]), EOT)
    batch = T.make_batch(stream, 0, 6, 20)
    parts = batch.split(2)
    assert len(parts) == 3
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    assert batch.mean_keys(7) == pytest.approx(
        float(np.mean([min(7, p + 1) for p in batch.position.flatten().tolist()]))
    )


# ---- splits -------------------------------------------------------------------------------------


def test_dev_is_held_out_of_train(tmp_path):
    """Without a dev split, the end of train (5 % at most) becomes it and is trained on no more."""
    data = H.write_corpus(tmp_path / "a", {"train": [np.arange(300), np.arange(300, 1000)]})
    corpus = T.Corpus.open(str(data))
    assert (corpus.tokens("train"), corpus.tokens("dev"), corpus.tokens("val")) == (950, 50, 0)
    assert whole(corpus.splits["dev"]).tolist() == list(range(950, 1000))
    assert whole(corpus.splits["train"]).tolist() == list(range(950))


def test_dev_of_published_shards_is_the_end_of_shard_000001(tmp_path):
    """However many shards there are; and their names and bare headers are enough."""
    for i, first in ((1, 0), (2, 1000), (3, 2000)):
        H.write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", np.arange(first, first + 1000))
    H.write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(50))
    corpus = T.Corpus.open(str(tmp_path))
    assert (corpus.vocab, corpus.eot, corpus.bytes_of) == (50_257, 50_256, None)
    assert whole(corpus.splits["dev"]).tolist() == list(range(850, 1000))
    assert whole(corpus.splits["train"]).tolist() == [*range(850), *range(1000, 3000)]
    rows = corpus.check_digests()
    assert all(row["sha256"] == T.sha256(tmp_path / row["name"]) for row in rows)
    said = {(row["name"], row["split"], row["tokens"]) for row in rows}
    assert ("fineweb_val_000000.bin", "val", 50) in said
    assert ("fineweb_train_000001.bin", "train", 850) in said
    assert ("fineweb_train_000001.bin", "dev", 150) in said


def test_a_named_dev_shard(tmp_path):
    data = H.write_corpus(tmp_path / "a", {"train": [np.arange(1000)]})
    other = H.write_shard(tmp_path / "other.bin", np.arange(77))
    corpus = T.Corpus.open(str(data), str(other))
    assert (corpus.tokens("train"), corpus.tokens("dev")) == (1000, 77)
    assert {row["name"] for row in corpus.check_digests()} >= {"other.bin"}, "it is in the log"


def test_a_train_shard_named_as_dev_is_not_trained_on(tmp_path):
    data = H.write_corpus(tmp_path, {"train": [np.arange(500), np.arange(500, 900)]})
    corpus = T.Corpus.open(str(data), str(data / "tokens_train_000001.bin"))
    assert whole(corpus.splits["dev"]).tolist() == list(range(500, 900))
    assert whole(corpus.splits["train"]).tolist() == list(range(500))


def test_a_file_of_two_splits(tmp_path):
    """Of other people's names: what is trained on would be reported, too."""
    H.write_shard(tmp_path / "retrieval_train_000001.bin", np.arange(100))
    with pytest.raises(T.InputError, match=r"names two splits, train and val: rename it"):
        T.Corpus.from_names(tmp_path)
