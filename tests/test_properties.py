"""Laws that must hold for any input, not for chosen ones: flags, damaged shards, the rows of a step
at any world size, the table of steps. Examples are drawn from a fixed seed: the same on every run.
"""

from __future__ import annotations

import json
import math

import helpers as H
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data import shards as written

T = H.T
EOT = 0  # of the integer ramps: no other token of them is 0


def examples(number: int) -> settings:
    """So many examples, the same ones every time, however slow the machine."""
    shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=shared,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# ---- flags --------------------------------------------------------------------------------------

CHOICES = {
    "form": [*T.V2_FORMS],
    "device": ["auto", "cuda", "cpu"],
    "dtype": ["auto", "bfloat16", "float32"],
    "muon_dtype": ["auto", "float16", "float32"],
    "arm": [*H.BUILT_IN, "diff_v2,layers=0+2", "softmax,mlp=96,mlp_layers=1", "mine.py:Mine"],
    "run_id": ["", "a-run", "x=1,y"],
}
NO_CHOICE = ["nonsense!", "a/b", "../x", ".."]
INTS = st.one_of(st.integers(-3, 40), st.sampled_from([64, 128, 1024, 10**6, 2**63, 10**400]))
FLOATS = st.one_of(
    st.floats(-2, 3), st.sampled_from([math.inf, -math.inf, math.nan, 1e300, 5e-324])
)


@st.composite
def stage_texts(draw) -> str:
    part = st.tuples(FLOATS, INTS, FLOATS, INTS, INTS).map(
        "{0[0]}:{0[1]}:{0[2]}:{0[3]}-{0[4]}".format
    )
    good = st.sampled_from(
        ["1:1024:1:128", "0.5:512:1:128-256+0.5:1024:1.5:256", "1:96:1:64-64", "1:512:1:64:128"]
    )
    return draw(st.one_of(good, st.lists(part, min_size=1, max_size=2).map("+".join)))


@st.composite
def flags(draw, name: str) -> tuple[str, bool]:
    """(a value's text, whether it is wrong whatever the other flags say)."""
    kind = T.FLAGS[name][1].type
    if name in CHOICES:
        text = draw(st.sampled_from(CHOICES[name] + NO_CHOICE))
        return text, text in NO_CHOICE
    if kind == "str":
        return draw(st.text(max_size=8)), False
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(["x", "", "1,2", "0x", "--", "é", "1 2"])), kind[:5] != "tuple"
    if kind == "tuple[Stage, ...]":
        return draw(stage_texts()), False
    if kind == "tuple[float, ...]":
        return draw(st.lists(FLOATS, min_size=1, max_size=3).map(T.format_value)), False
    if kind == "tuple[int, ...]":
        return draw(st.lists(st.integers(-1, 14), max_size=4).map(T.format_value)), False
    value = draw({"int": INTS, "float": FLOATS}[kind])
    return str(value), not T.LEAST.get(name, 0) <= value <= T.MOST.get(name, T.LARGEST)


VALUED = sorted(name for name, (_, f) in T.FLAGS.items() if f.type != "bool")
SWITCHES = sorted(name for name, (_, f) in T.FLAGS.items() if f.type == "bool")


@st.composite
def command_lines(draw) -> tuple[list[str], set[str]]:
    """(a command line, the flags on it whose values are wrong whatever the others say)."""
    argv, wrong, arm = [f"--preset={draw(st.sampled_from(sorted(T.PRESETS)))}"], set(), "softmax"
    for name in draw(st.lists(st.sampled_from(VALUED), max_size=6, unique=True)):
        text, bad = draw(flags(name))
        flag = "--" + name.replace("_", "-")
        argv.append(f"{flag}={text}")
        wrong |= {flag} if bad else set()
        arm = text if name == "arm" else arm
    for name in draw(st.lists(st.sampled_from(SWITCHES), max_size=3, unique=True)):
        argv.append(f"--{draw(st.sampled_from(['', 'no-']))}{name.replace('_', '-')}")
    return argv, wrong - {f"--{key}" for key in T.parse_arm(arm)[1]}  # the arm's own keys win


@examples(500)
@given(line=command_lines())
def test_any_command_line_is_a_config_or_names_what_is_wrong(line):
    """A config that survives its own JSON and plans its steps, or one InputError that names every
    flag whose value no other flag can save; never another exception."""
    argv, wrong = line
    try:
        cfg = T.parse_args(argv)
    except T.InputError as e:
        named = str(e).replace("no arm", "--arm").replace("arm '", "--arm '")
        assert not [flag for flag in wrong if flag not in named], (argv, str(e))
        return
    assert not wrong, argv
    assert T.config_from_flat(json.loads(json.dumps(cfg.flat()))) == cfg
    assert T.check_config(cfg) == []
    steps = T.plan_steps(cfg, 20_000)
    assert sum(step.tokens for step in steps) <= 20_000
    assert all(math.isfinite(step.lr) and step.lr >= 0 for step in steps)


# ---- shards -------------------------------------------------------------------------------------

DAMAGE = ("flip", "cut", "pad", "header")


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """`raw` after one accident."""
    kind, data = draw(st.sampled_from(DAMAGE)), bytearray(raw)
    if kind == "flip":
        # As often among the three fields that matter as anywhere.
        at = draw(st.one_of(st.integers(0, 11), st.integers(0, len(raw) - 1)))
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "pad":
        data += draw(st.binary(min_size=1, max_size=40))
    else:
        at, value = draw(st.integers(0, 4)), draw(st.integers(-(2**31), 2**31 - 1))
        data[4 * at : 4 * at + 4] = value.to_bytes(4, "little", signed=True)
    return bytes(data)


def says_so(raw: bytes) -> bool:
    """Whether these bytes are a shard, by the format's words."""
    if len(raw) < 1024:
        return False
    magic, version, count = np.frombuffer(raw[:12], "<i4").tolist()
    return magic == 20240520 and version == 1 and 1024 + 2 * count == len(raw)


@examples(200)
@given(data=st.data(), count=st.integers(0, 50))
def test_a_damaged_shard_is_refused_or_read_as_it_stands(folder, data, count):
    """By the trainer's reader and by data/: the documented error, or the tokens that are there."""
    path = H.write_shard(folder / "one.bin", np.arange(count) * 1009)
    raw = data.draw(damaged(path.read_bytes()))
    path.write_bytes(raw)
    for read, error in (
        (lambda: T.Shard.open(path).load(), T.InputError),
        (lambda: written.read_tokens(path), written.InputError),
    ):
        if says_so(raw):
            assert read().tobytes() == raw[1024:]
        else:
            with pytest.raises(error, match=r"one\.bin"):
                read()


@examples(120)
@given(data=st.data(), which=st.sampled_from(["train_000000", "train_000001", "dev_000000"]))
def test_a_folder_with_digests_lets_no_damage_through(folder, data, which):
    """One bit anywhere in a shard, header included, and training does not start."""
    tokens = [np.arange(700) % 250, np.arange(300) % 99, np.arange(90)]
    H.write_corpus(folder / "all", {"train": tokens[:2], "dev": tokens[2:]})
    path = folder / "all" / f"tokens_{which}.bin"
    raw = path.read_bytes()
    changed = data.draw(damaged(raw))
    assume(changed != raw)
    path.write_bytes(changed)
    with pytest.raises(T.InputError, match=path.name):
        T.Corpus.open(str(folder / "all")).check_digests()


@examples(200)
@given(data=st.data())
def test_a_damaged_manifest_is_refused_or_changes_no_token(folder, data):
    """Any byte of it: the documented error, or the tokens as they were."""
    tokens = np.arange(700) % 250
    H.write_corpus(folder / "listed", {"train": [tokens], "dev": [tokens[:90]]})
    path = folder / "listed" / "manifest.json"
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        corpus = T.Corpus.open(str(folder / "listed"))
        corpus.check_digests()
    except T.InputError:
        return
    read = np.concatenate([s.load() for s in corpus.splits["train"]])
    assert read.tolist() == tokens[: len(read)].tolist()
    assert 0 <= corpus.eot < corpus.vocab <= 2**16


# ---- rows ---------------------------------------------------------------------------------------


@st.composite
def loads(draw) -> dict:
    """Shards of documents (1 token to many rows), and how a run over them is cut."""
    length = st.one_of(st.just(1), st.integers(1, 6), st.integers(20, 150))
    row = draw(st.sampled_from([1, 4, 16]))
    stage = st.sampled_from([8 * row, 16 * row, 24 * row])
    return {
        "lengths": draw(st.lists(st.lists(length, min_size=1, max_size=9), min_size=1, max_size=3)),
        "row": row,
        "tokens": draw(st.lists(stage, min_size=1, max_size=2)),
        "world": draw(st.sampled_from([2, 4, 8])),
        "micro": draw(st.sampled_from([1, row, 2 * row, 3 * row, 10**6])),
        "data_seed": draw(st.sampled_from([0, 1, 99])),
        "passes": draw(st.floats(0.3, 3.2)),
        "resume": draw(st.floats(0, 1)),
    }


def shards_of(folder, lengths: list[list[int]]) -> list:
    """Each document is end-of-text and then tokens that occur nowhere else."""
    out, value = [], 1
    for i, each in enumerate(lengths):
        tokens = []
        for n in each:
            tokens += [EOT, *range(value, value + n - 1)]
            value += n - 1
        out.append(T.Shard.open(H.write_shard(folder / f"ramp_{i}.bin", tokens)))
    return out


def batches(shards, steps, cfg, world: int, rank: int) -> list:
    """The batches of one rank's loader, from its own stream; kernel calls put together again."""
    stream = T.TokenStream(shards, EOT, cfg.data.data_seed)
    out = []
    place = T.World(torch.device("cpu"), rank, world)
    for batch in T.train_batches(stream, steps, cfg, place):
        rows = T.micro_rows(*batch.tokens.shape, cfg.data.micro_batch_tokens)
        parts = [vars(part) for part in batch.split(rows)]
        assert {part["tokens"].size(0) for part in parts} == {rows}, "calls of one shape"
        out.append(T.Batch(**{k: torch.cat([p[k] for p in parts]) for k in parts[0]}))
    return out


def united(shards, steps, cfg, world: int) -> list:
    """The steps' batches, the ranks' shares one below another."""
    ranks = [batches(shards, steps, cfg, world, r) for r in range(world)]
    fields = [f.name for f in T.dataclasses.fields(T.Batch)]
    return [
        T.Batch(*(torch.cat([getattr(b, name) for b in step]) for name in fields))
        for step in zip(*ranks, strict=True)
    ]


def by_hand(rows: list[list[int]]) -> tuple[list, list]:
    """Document numbers and positions of rows of tokens, counted one by one."""
    docs, positions = [], []
    for row in rows:
        doc = at = 0
        docs.append([])
        positions.append([])
        for token in row:
            doc, at = (doc + 1, 0) if token == EOT else (doc, at)
            docs[-1].append(doc)
            positions[-1].append(at)
            at += 1
    return docs, positions


def check_passes(text: list[int], lengths: list[list[int]], data_seed: int) -> None:
    """Every pass has every token once, document by document; file order with data_seed 0."""
    values = iter(range(1, 10**6))
    want = [tuple([EOT, *(next(values) for _ in range(n - 1))]) for s in lengths for n in s]
    total = sum(map(len, want))
    for start in range(0, len(text), total):
        part = text[start : start + total]
        starts = [i for i, token in enumerate(part) if token == EOT]
        assert starts[0] == 0, "a pass opens a document"
        got = [tuple(part[a:b]) for a, b in zip(starts, [*starts[1:], len(part)])]
        if len(part) < total:  # the run ends here, perhaps inside a document
            tail = got.pop()
            assert any(tail == document[: len(tail)] for document in want)
            left = sorted(want)
            for document in got:
                left.remove(document)
        else:
            assert sorted(got) == sorted(want)
        if data_seed == 0:
            assert part == [t for document in want for t in document][: len(part)]


@examples(100)
@given(load=loads())
def test_no_token_is_lost_or_repeated(folder, load):
    """Any documents, world size, accumulation, order and place to go on from."""
    shards, tokens = shards_of(folder, load["lengths"]), load["tokens"]
    table = tuple(T.Stage(1 / len(tokens), n, 1.0, (128, 128)) for n in tokens)
    how = {"row_tokens": load["row"], "micro_batch_tokens": load["micro"]}
    cfg = T.make_config("demo", stages=table, data_seed=load["data_seed"], **how)
    budget = int(load["passes"] * sum(map(sum, load["lengths"])))
    steps = T.plan_steps(cfg, budget)
    assume(steps)
    alone = united(shards, steps, cfg, 1)
    text = [t for batch in alone for t in batch.tokens.flatten().tolist()]
    assert len(text) == sum(step.tokens for step in steps) <= budget
    check_passes(text, load["lengths"], load["data_seed"])
    targets = [t for batch in alone for t in batch.targets.flatten().tolist()]
    assert targets[:-1] == text[1:], "the next token, over the ends of rows, steps and passes"
    for batch in alone:
        docs, positions = by_hand(batch.tokens.tolist())
        assert batch.docs.tolist() == docs and batch.position.tolist() == positions
    # The ranks' shares are the same rows, and a run may go on from any step with other ranks.
    k = round(load["resume"] * len(steps))
    for first, world in ((0, load["world"]), (k, 1), (k, load["world"])):
        again = united(shards, steps[first:], cfg, world)
        assert len(again) == len(steps) - first
        for a, b in zip(alone[first:], again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


# ---- the table of steps -------------------------------------------------------------------------


@examples(200)
@given(
    table=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 4096), st.integers(1, 3000)),
        min_size=1,
        max_size=4,
    ),
    row=st.integers(1, 5000),
    micro=st.integers(1, 70_000),
    world=st.sampled_from((1, 2, 4, 8)) | st.integers(1, 16),  # which divide 8 rows, or any
    budget=st.integers(0, 2_000_000),
)
def test_a_plan_that_is_accepted_can_be_cut(table, row, micro, world, budget):
    """What check_config lets through divides: a step is ranks x calls x rows x tokens, exactly; the
    plan spends no more than the budget, less than a step short of it for each stage, and how a
    step is cut does not change it."""
    whole = sum(share for share, _, _ in table)
    stages = tuple(T.Stage(s / whole, 8 * n, 1.0, (w, w)) for s, n, w in table)
    how = {"row_tokens": row, "micro_batch_tokens": micro, "val_row_tokens": 8}
    cfg = T.make_config("demo", stages=stages, val_call_tokens=64, **how)
    problems = T.check_config(cfg, world)
    for stage in stages:
        rows, length = T.step_rows(stage.tokens, row)
        fits = rows * length == stage.tokens and rows % world == 0
        assert fits or any(f"--stages {stage}" in problem for problem in problems)
    assume(not problems)
    steps = T.plan_steps(cfg, budget)
    spent = sum(step.tokens for step in steps)
    most = max(stage.tokens for stage in stages)
    assert budget - most * (len(stages) + 2) < spent <= budget
    for step in steps:
        rows, length = T.step_rows(step.tokens, row)
        share, rest = divmod(rows, world)
        call = T.micro_rows(share, length, micro)
        assert rest == 0 and share % call == 0
        assert world * (share // call) * call * length == step.tokens
        assert call == 1 or call * length <= micro
    assert T.plan_steps(cfg.with_(micro_batch_tokens=7, row_tokens=8), budget) == steps
    assert len(T.plan_steps(cfg, budget + most)) >= len(steps), "more tokens, no fewer steps"
