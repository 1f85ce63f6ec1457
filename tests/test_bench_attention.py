"""tests/bench_attention.py on the CPU: every case computes what it says, and a row that fails does
not stop the others. No times."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from typing import ClassVar

import bench_attention as B
import pytest
import torch

T = B.T
LENGTH = 256
SETTINGS = {"device": "cpu", "dtype": "float32", "doc_mean": 150, "window": 160, "repeats": 1}
NO_KERNEL = B.Case("SDPA flash", "diff_v1")
ATTENTION = [case for case in B.CASES if case not in (B.LISTS, NO_KERNEL)]
FLEX = [case for case in B.CASES if case.path in ("flex", "flex causal")]

LIKE = B.Case("fa4", "diff_v2,form=full")

# query heads, KV heads, heads of v, D of q and k, D of v
HEADS = {
    "softmax": (6, 6, 6, 128, 128),
    "softmax,n_head=12,head_dim=64": (12, 12, 12, 64, 64),
    "diff_v2": (12, 3, 3, 128, 128),
    "diff_v2,form=full": (12, 6, 6, 128, 128),
    "diff_v2,form=light": (6, 3, 3, 128, 128),
    B.NARROW: (6, 6, 6, 64, 128),
    B.WINDOW2: (12, 6, 6, 128, 128),
    "diff_v1": (12, 12, 6, 64, 128),
}
names = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def clean_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- the maths, by hand -------------------------------------------------------------------------


def visible(case: B.Case, head: int = 0) -> torch.Tensor:
    """[T, T] bool: not the future and, where the case has them, same document and in window, which
    is the second map's own in WINDOW2."""
    at = torch.arange(LENGTH)
    back = at[:, None] - at
    if case.path not in ("flex", "fa4"):
        return back >= 0
    window = 128 if case.arm == B.WINDOW2 and head % 2 else SETTINGS["window"]
    docs = B.documents(LENGTH, SETTINGS["doc_mean"])[0]
    return (back >= 0) & (back < window) & (docs[:, None] == docs)


def by_hand(case: B.Case, arm: T.Arm, x: B.Given) -> torch.Tensor:
    """[1, T, n_out] in float64, one head after another, from the papers."""
    hq, hkv, hv, d, dv = HEADS[case.arm]
    if case.path in B.DIFFLLAMA:  # its V has heads of D, of which i and i + half are one of diff_v1
        hv, dv = hq, d
    q, k = (t[0].unflatten(-1, (h, d)).double() for t, h in ((x.q, hq), (x.k, hkv)))
    v = x.v[0].unflatten(-1, (hv, dv)).double()
    sees, half = [visible(case, i) for i in range(2)], hq // 2

    def attention_map(i: int) -> torch.Tensor:
        score = (q[:, i] @ k[:, i * hkv // hq].T) * 15.36 / d
        return torch.softmax(score.masked_fill(~sees[i % 2], -torch.inf), -1)

    if case.arm.startswith("softmax"):
        return torch.cat([attention_map(i) @ v[:, i] for i in range(hq)], -1)[None]
    if case.arm.startswith("diff_v2"):
        lam = torch.sigmoid(x.lam[0].double())
        pair = [
            attention_map(2 * i) - lam[:, i, None] * attention_map(2 * i + 1) for i in range(half)
        ]
        return torch.cat([m @ v[:, 2 * i * hkv // hq] for i, m in enumerate(pair)], -1)[None]
    a, b, c, e = arm.lam.double()
    lam, out = torch.exp(a @ b) - torch.exp(c @ e) + 0.2, []
    for i in range(half):
        first, second = (i, i + half) if case.path in B.DIFFLLAMA else (2 * i, 2 * i + 1)
        mine = torch.cat([v[:, i], v[:, i + half]], -1) if case.path in B.DIFFLLAMA else v[:, i]
        y = (attention_map(first) - lam * attention_map(second)) @ mine
        out.append(0.8 * y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5))
    return torch.cat(out, -1)[None]


def prepare(case: B.Case):
    """(arm, inputs, gradient of the output, docs, window)"""
    if case.path in B.DIFFLLAMA:
        pytest.importorskip("transformers")
    arm = B.build_arm(case.arm)
    x = B.make_inputs(arm, LENGTH, "cpu", torch.float32)
    dy = torch.randn(1, LENGTH, arm.n_out, generator=torch.Generator().manual_seed(5))
    return arm, x, dy, *B.bounds(case, LENGTH, SETTINGS)


def run(case: B.Case, backend: str | None = None) -> tuple[dict, dict]:
    """(what the case gives, what the maths by hand gives): {y, q, k, v, lam}"""
    arm, x, dy, docs, window = prepare(case)
    with B.replaced(case):
        call, learned = B.operation(case, arm, x, docs, window, flex=False)
        if backend:
            call = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)
        got = B.with_gradients(call, x, dy, learned)
    want = B.with_gradients(functools.partial(by_hand, case, arm), x, dy)
    return got, want


def assert_same(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    for name, value in want.items():
        if value is None:  # lambda's logits, where there are none
            assert got[name] is None
        else:
            error = (got[name].double() - value.double()).norm() / value.double().norm()
            assert error <= tolerance, f"{name}: {float(error):.1e}"


@names(ATTENTION)
def test_output_and_gradients(case):
    """fp32 against float64: 1e-6 and less was measured."""
    assert_same(*run(case))


@pytest.mark.long
@names([case for case in ATTENTION if case not in FLEX and case.arm in ("diff_v1", "diff_v2")])
def test_one_graph(case):
    """What the GPU compiles is one graph, backward too, and the same numbers."""
    assert_same(*run(case, "aot_eager"))


@names(FLEX)
def test_one_graph_of_flex(case):
    """The block mask comes from outside the graph. Forward: Flex has no backward on a CPU."""
    arm, x, dy, docs, window = prepare(case)
    arm.requires_grad_(False)
    x = B.Given(*(t.detach() for t in x.tensors().values()))
    with B.replaced(case):
        call, _ = B.operation(case, arm, x, docs, window, flex=True)
        got = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)(x)
    assert_same({"y": got}, {"y": by_hand(case, arm, x)})


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_flash_has_no_kernel_for_diff_v1():
    with pytest.raises(RuntimeError, match="No available kernel"):
        run(NO_KERNEL)


@pytest.mark.parametrize("spec", HEADS)
def test_given_is_the_whole_arm(spec):
    """The arm itself, projections included, equals the timed part on what they give."""
    cfg = T.make_config(arm=spec, qk_norm=False, rope=False, value_tables=0, d_model=32).model
    arm = T.build_arm(cfg, 0)
    T.init_parameters(arm, 1)
    x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    lam = None
    if spec.startswith("diff_v2"):
        arm.lam.data.normal_(generator=torch.Generator().manual_seed(3))
        lam = T.gate_logits(x, arm.lam, arm.lam_bias)
    docs, window = B.bounds(B.Case("flex", spec), LENGTH, SETTINGS)
    ctx = T.Context(T.dense_mask(docs, window), {}, B.scale)
    want, _ = arm(x, None, ctx)
    projected = T.project(x, [arm.q, arm.k, arm.v], HEADS[spec][3])
    given = B.Given(*(t.flatten(-2) for t in projected), lam)
    with B.replaced(B.Case("flex", spec)):
        assert torch.equal(arm(given, None, ctx)[0], want)


def test_the_second_window_binds():
    assert int(visible(B.Case("fa4", B.WINDOW2), 1).sum()) < int(visible(LIKE).sum())


def test_rows():
    """Rows of their own documents, as many figures; FLOPs of all of them."""
    several = SETTINGS | {"rows": 3, "doc_mean": 20}
    docs, window = B.bounds(B.Case("fa4", "softmax"), LENGTH, several)
    assert docs.shape == (3, LENGTH) and len({tuple(row) for row in docs.tolist()}) == 3
    position = torch.stack([(docs == docs[:, i : i + 1])[:, : i + 1].sum(1) for i in range(LENGTH)])
    want = position.clamp(max=int(window)).double().mean()
    assert B.mean_keys(docs, window) == pytest.approx(float(want))
    row = B.measure(B.Case("fa4", "softmax"), LENGTH, several)
    flops = 3 * 3 * LENGTH * 4 * row["mean_keys"] * 6 * 128
    assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(flops)


def test_cuts():
    """FlashAttention-4 is told the documents and windows that the other paths see."""
    docs, window = B.bounds(B.Case("fa4", B.WINDOW2), LENGTH, SETTINGS | {"rows": 2})
    mask = B.cuts(docs, window)
    assert mask.caps == (160, 128) and mask.limits.tolist()[:2] == [160, 160]
    starts = T.starts_of(docs).flatten().nonzero().flatten().tolist()
    assert mask.bounds.tolist()[: len(starts) + 1] == [*starts, 2 * LENGTH]
    docs, window = B.bounds(B.Case("fa4", "softmax"), LENGTH, SETTINGS)
    assert B.cuts(docs, window).caps == (T.NO_LIMIT,)


def test_light_plus_is_light():
    a, b = (B.build_arm(f"diff_v2,form={form}") for form in ("light", "light+"))
    assert B.heads_text(a) == B.heads_text(b) == "6q 3kv x 128"


# ---- what a row says ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", HEADS)
def test_figures(spec):
    """Heads, pairs and FLOPs of a row; the rest of its keys."""
    hq, hkv, hv, d, dv = HEADS[spec]
    case = B.Case("flex", spec)
    row = B.measure(case, LENGTH, SETTINGS)
    pairs = sum(int(visible(case, i).sum()) for i in range(2)) / 2
    assert row["heads"] == f"{hq}q {hkv}kv x {d}" + ("/128" if dv != d else "")
    assert row["mean_keys"] == pytest.approx(pairs / LENGTH)
    assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(3 * 2 * pairs * hq * (d + dv))
    assert "reason" not in row and max(row["errors"].values()) < 1e-5
    assert len(row["ms_all"]) == len(row["forward_ms_all"]) == SETTINGS["repeats"]


def test_wrong_is_a_reason(monkeypatch):
    """An attention that also looks one token ahead is not timed."""

    def peeking(q, k, v, ctx):
        ctx = T.Context(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1), {}, ctx.scale)
        return attend(q, k, v, ctx)

    attend = T.attend
    monkeypatch.setattr(B, "flash", peeking)
    monkeypatch.setattr(B, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    row = B.measure(B.Case("SDPA flash", "softmax"), LENGTH, SETTINGS)
    assert row["reason"].startswith("wrong") and "ms" not in row


def test_too_large_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80_000_000_000))
    arm, eager = B.build_arm("diff_v1"), B.Case("DiffLlama eager", "diff_v1")
    assert "takes 116 of 80 GB" in B.too_large(eager, 49_152, arm, cuda=True)
    assert B.too_large(eager, 8192, arm, cuda=True) is None
    assert B.too_large(B.Case("DiffLlama sdpa", "diff_v1"), 49_152, arm, cuda=True) is None


# ---- rows that fail -----------------------------------------------------------------------------


@pytest.mark.long
def test_report(tmp_path, capsys):
    """A case without a kernel is a row with its reason, and the next one is measured."""
    pytest.importorskip("transformers")
    out = tmp_path / "report.json"
    argv = ["--lengths", "128", "--cases", "(flash|lists|eager, not).*(v1|$)", "--repeats", "1"]
    assert B.main([*argv, "--markdown", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    by_case = {row["case"]: row for row in report["rows"]}
    assert list(by_case) == [
        *(f"SDPA flash: {arm}" for arm in B.ARMS),
        *("DiffLlama eager, not compiled: diff_v1", "block lists"),
    ]
    bad = [name for name, row in by_case.items() if "reason" in row]
    assert bad == ["SDPA flash: diff_v1"]
    assert by_case[bad[0]]["reason"] == "RuntimeError: No available kernel. Aborting execution."
    assert all("forward_ms" in row for name, row in by_case.items() if name not in bad)
    assert B.markdown(report) in printed
    assert B.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out.strip() == B.markdown(report).strip()
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(by_case) and len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("name", ["flex: softmax", "block lists", "DiffLlama eager"])
def test_alone_before_it_is_timed(name, monkeypatch):
    """Once; what fills the memory already before it has any."""
    if name in B.DIFFLLAMA:
        pytest.importorskip("transformers")
    said = []
    for what in ("milliseconds", "make_inputs"):
        own = getattr(B, what)
        monkeypatch.setattr(B, what, lambda *a, w=what, own=own: said.append(w) or own(*a))
    case = next(case for case in B.CASES if case.name.startswith(name))
    assert "forward_ms" in B.measure(case, LENGTH, SETTINGS, lambda: said.append("alone"))
    timed = ["milliseconds"] * (1 if case is B.LISTS else 2)
    inputs = [] if case is B.LISTS else ["make_inputs"]
    first = ["alone", *inputs] if name in B.DIFFLLAMA else [*inputs, "alone"]
    assert said == [*first, *timed]


class Fake:
    """A Worker that says what it is asked: of length 128 it measures, of 256 it has a reason at
    once, of 384 only when alone. said: of all of them."""

    said: ClassVar[list] = []

    def __init__(self, settings: dict):
        self.row = None

    def begin(self, case, length):
        self.said.append(f"begin {length}")
        self.row, self.length = None, length

    def hear(self, seconds):
        if self.row is None and self.length != 256:
            return None
        return self.row or {"reason": "skipped: at once"}

    def go_on(self):
        self.said.append(f"alone {self.length}")
        self.row = {"reason": "wrong"} if self.length == 384 else {"ms": 1.0}

    def stop(self):
        self.said.append("stop")


def test_prepared_together_timed_one_by_one(monkeypatch):
    monkeypatch.setattr(Fake, "said", [])
    workers = [Fake({}) for _ in range(4)]
    jobs = [(B.LISTS, n) for n in (128, 256, 384)]
    rows = B.side_by_side(workers, jobs, 60, time.monotonic() + 60)
    assert next(rows) == {"ms": 1.0}
    assert Fake.said == ["begin 128", "begin 256", "begin 384", "alone 128"]
    assert list(rows) == [{"reason": "skipped: at once"}, {"reason": "wrong"}]
    assert Fake.said[4:] == ["alone 384"]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_goes_on(workers, tmp_path, monkeypatch):
    """The same line again measures what is missing, other lengths and cases join, in their place;
    a report of other settings stays as it is."""
    monkeypatch.setattr(Fake, "said", [])
    monkeypatch.setattr(B, "Worker", Fake)
    out = tmp_path / "report.json"
    line = ["--cases", "block lists|^flex: softmax$", "--out", str(out), "--workers", str(workers)]
    assert B.main([*line, "--lengths", "128", "256", "--minutes", "0"]) == 0
    rows = json.loads(out.read_text())["rows"]
    order = [(row["case"], row["length"]) for row in rows]
    assert [n for _, n in order] == [128, 128, 256, 256]
    assert Fake.said == ["stop"] * min(workers, 4)
    assert B.main([*line, "--lengths", "128", "256", "384"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["length"]) for row in rows][:4] == order and len(rows) == 6
    assert [row.get("ms") for row in rows[:2]] == [1.0, 1.0]
    assert [row.get("reason") for row in rows[2:]] == ["skipped: at once"] * 2 + ["wrong"] * 2
    Fake.said.clear()
    assert B.main([*line, "--lengths", "128", "256", "384"]) == 0
    assert [word for word in Fake.said if word != "stop"] == ["begin 256"] * 2  # skipped: once more
    assert json.loads(out.read_text())["rows"] == rows
    before = out.read_text()
    assert B.main([*line, "--lengths", "128", "--repeats", "3"]) == 2
    assert out.read_text() == before and [f.name for f in tmp_path.iterdir()] == ["report.json"]


def strange(pipe, settings: dict) -> None:
    """Stands in for `serve`: dies at length 1, hangs at length 2, else says who it is; at length 5
    when it is alone."""
    while True:
        length = pipe.recv()[1]
        if length == 1:
            os._exit(7)
        if length == 2:
            time.sleep(600)
        if length == 5:
            pipe.send(None)
            assert pipe.recv()
        pipe.send({"pid": os.getpid()} | ({"reason": "skipped: no"} if length == 3 else {}))


@pytest.mark.long
def test_worker_outlives_its_process(monkeypatch):
    monkeypatch.setattr(B, "serve", strange)
    worker = B.Worker(SETTINGS)

    def run(length: int, seconds: float = 60) -> dict | None:
        worker.begin(B.LISTS, length)
        return worker.hear(seconds)

    try:
        first = run(3)
        assert run(4)["pid"] == first["pid"]  # a skipped row costs nothing
        assert run(5) is None
        worker.go_on()
        assert worker.hear(60)["pid"] == first["pid"]
        assert run(2, 0.5) == {"reason": "not done after 0 s"}
        assert run(1) == {"reason": "its process ended with code 7"}
        assert run(4)["pid"] != first["pid"]
    finally:
        worker.stop()


def test_a_missing_package_ends_no_process(monkeypatch):
    """Its rows are skipped, and what follows is measured where it is."""

    class Pipe:
        asked, sent = [(0, 128)], []

        def recv(self):
            if not self.asked:
                raise EOFError
            return self.asked.pop()

        def send(self, row):
            self.sent.append(row)

    def missing(*_):
        raise ImportError("it needs a package")

    monkeypatch.setattr(B, "measure", missing)
    B.serve(Pipe(), {"device": "cpu"})
    assert Pipe.sent == [{"reason": "skipped: ImportError: it needs a package"}]


def test_minutes_end_a_run(tmp_path):
    out = tmp_path / "report.json"
    assert B.main(["--lengths", "128", "--minutes", "0", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in B.CASES]
    assert {row["reason"] for row in rows} == {"not run: 0 minutes were over"}


def test_reason_of_a_compiler_error():
    text = (
        "Explanation: Dynamo failed: call(FakeTensor(size=(1, 2))): got ValueError('no (x)')\nHint"
    )
    assert B.first_line(RuntimeError(text)) == "ValueError('no (x)')"
    assert B.first_line(RuntimeError("one\ntwo")) == "RuntimeError: one"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lengths", "200"], "--lengths 200: give multiples of 128"),
        (["--lengths", "0"], "--lengths 0"),
        (["--window", "0"], "at least 1"),
        (["--doc-mean", "0.5"], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--rows", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--cases", "("], "no regular expression"),
        (["--cases", "nobody"], "flex causal: softmax"),
        (["--out", "there.json"], "no report"),
        (["--out", "no/such.json"], "make the folder no first"),
        (["--show", "there.json"], "no report"),
        (["--show", "absent.json"], "no report"),
        pytest.param(
            ["--lengths", "4096"],
            "at most 2048",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_bad_input(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    assert B.main(["--lengths", "128", *argv]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.out == ""
    assert (tmp_path / "there.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1
