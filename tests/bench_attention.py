"""What attention costs, on any NVIDIA GPU: `python tests/bench_attention.py --out FILE.json`.

Forward, forward + backward and peak memory of every arm on the trainer's own path, beside torch's
SDPA, transformers' DiffLlama and plain FlexAttention; NOTES says what is timed and how. Rows run in
--workers processes: as many are compiled at a time, then each is timed while the others wait. One
that fails, hangs or runs out of memory is a row with its reason, and the rest goes on. FILE.json is
written after each row; the same line again, or one with other cases or lengths, goes on with it.
Not a test: it asserts nothing. Without a GPU, for trying, every mask is dense and nothing is
compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_report

import train_gpt as T

NOTES = (
    "Timed: from q, k and v (rows of T tokens, as the projections give them) to the mixed "
    "output, flat, and back to the gradients of all inputs. In: V1's V repeated for both maps, "
    "lambda (V2: the sigmoid of its logits; V1: from its four vectors), the difference, V1's norm. "
    "Out: every projection, lambda's too; QK norm, RoPE, value embeddings, output gate, XSA; the "
    "mask, which is built before.",
    "ms: median of the device's time for single calls, by CUDA events, after warm-up (on a CPU, "
    "wall-clock). The host queues its launches behind a wait, so its own time is not in it; L2 is "
    "as the call before left it.",
    "TFLOP/s: of forward + backward, counted as the trainer does: forward 2 x heads x pairs of a "
    "query and a key that it sees x (D of k + D of v), backward twice that. What a kernel computes "
    "again or masks inside a block counts nothing, nor does DiffLlama's second pass over the "
    "scores. Where D is one, 7/6 of it is FlashAttention's count.",
    "`flex` is T.attend with the trainer's block lists, documents and window; `flex causal` is "
    "FlexAttention with nothing but the causal triangle, which all other rows see too. Between the "
    "two kinds compare TFLOP/s, not ms. `diff_v2,form=light+` has `light`'s operation. SDPA's "
    "flash back end wants one D for k and v, which diff_v1 has not.",
    "`fa4` is T.attend under the trainer's --attention fa4: flash-attn-4's own call for documents, "
    "a call for each map where window2 is set. Its cuts between documents are built before, too.",
    "GB (1e9 bytes): the most that torch had allocated in one forward + backward, inputs, mask and "
    "gradients included. error: the largest ||got - want|| / ||want|| of output, dq, dk and dv "
    "against a dense mask in fp32, at T <= 2,048. first call: seconds, compilation included, while "
    "other rows compile beside it.",
    "block lists: T.block_lists, run in the trainer once a call of the model for each window.",
)
CHECKED = 2048  # longest row that is compared with T x T in fp32
WRONG = 0.03  # bfloat16 is 0.003 to 0.012 off; block lists of another row were 0.37
WARM_UP = 3
CPU_LENGTH = 2048  # T x T is all there is without a GPU
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
EAGER_BYTES = 4  # DiffLlama's softmax is fp32


# ---- cases --------------------------------------------------------------------------------------

ARMS = (
    "softmax",
    "softmax,n_head=12,head_dim=64",
    "diff_v2",
    "diff_v2,form=full",
    "diff_v2,form=light",
    "diff_v1",
)


NARROW = "softmax,qk_dim=64"  # torch's flash kernel wants values as wide as queries
WINDOW2 = "diff_v2,form=full,window2=128"
FA4_ARMS = ("softmax", NARROW, "diff_v2", "diff_v2,form=full", "diff_v2,form=light", WINDOW2)


@dataclass(frozen=True)
class Case:
    """An arm, as the trainer's command line has it, on one way to compute attention."""

    path: str
    arm: str = ""
    compiled: bool = True

    @property
    def name(self) -> str:
        how = self.path if self.compiled else f"{self.path}, not compiled"
        return f"{how}: {self.arm}" if self.arm else how


LISTS = Case("block lists")
DIFFLLAMA = {"DiffLlama sdpa": "sdpa", "DiffLlama eager": "eager"}
CASES = (
    *(Case("flex", arm) for arm in (*ARMS, NARROW, WINDOW2)),
    *(Case("fa4", arm) for arm in FA4_ARMS),
    Case("flex causal", "softmax"),
    *(Case("SDPA flash", arm) for arm in ARMS),
    *(Case(path, "diff_v1", compiled) for path in DIFFLLAMA for compiled in (True, False)),
    LISTS,
)


@dataclass(frozen=True)
class Given:
    """Stands in for x: what an arm computes from x first is given. q, k, v [B, T, heads x D];
    lam [B, T, pairs], V2's logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    lam: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def tensors(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, "lam": self.lam}


def scale(dim: int) -> float:
    return 15.36 / dim  # the trainer's under QK norm


def build_arm(spec: str) -> T.Arm:
    """The arm without what is not timed. Its projections, never used, are small."""
    bare = {"qk_norm": False, "rope": False, "value_tables": 0, "d_model": 16}
    arm = T.build_arm(T.make_config(arm=spec, **bare).model, 0)
    T.init_parameters(arm, 0)
    return arm


def head_dims(arm: T.Arm) -> tuple[int, int]:
    """D of q and k, D of v."""
    return arm.q.weight.size(0) // arm.heads_q, arm.n_out // arm.heads


def heads_text(arm: T.Arm) -> str:
    d, dv = head_dims(arm)
    return f"{arm.heads_q}q {arm.heads_kv}kv x {d}" + (f"/{dv}" if dv != d else "")


def make_inputs(arm: T.Arm, length: int, device: str, dtype: torch.dtype, rows: int = 1) -> Given:
    """Leaves; the heads of q and k have unit RMS, as QK norm makes them."""
    gen, (d, dv) = torch.Generator(device).manual_seed(0), head_dims(arm)

    def rand(heads: int, dim: int, unit: bool = False) -> Tensor:
        x = torch.randn(rows, length, heads, dim, generator=gen, device=device)
        x = (T.norm(x) if unit else x).flatten(2)
        return x.to(dtype).requires_grad_()

    q, k = rand(arm.heads_q, d, unit=True), rand(arm.heads_kv, d, unit=True)
    return Given(q, k, rand(arm.kv_width // dv, dv), rand(arm.heads, 1))


def documents(length: int, mean: float, rows: int = 1) -> Tensor:
    """docs [B, T] int32: documents of geometric length, so that edges fall anywhere in a block."""
    first = np.random.default_rng(0).random((rows, length)) < 1 / mean
    return torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int32))


def bounds(case: Case, length: int, settings: dict) -> tuple[Tensor, Tensor]:
    """(docs [B, T], window [1], or [heads] where they differ), int32 on the device: what a query
    may see in this case."""
    rows, caps = settings.get("rows", 1), None
    if case.path in ("flex", "fa4", "block lists"):
        docs, window = documents(length, settings["doc_mean"], rows), settings["window"]
        caps = build_arm(case.arm).head_windows if case.arm else None
    else:
        docs, window = torch.zeros(rows, length, dtype=torch.int32), length
    device = settings["device"]
    by_head = torch.tensor(caps or [T.NO_LIMIT], dtype=torch.int32).clamp(max=window)
    return docs.to(device), by_head.to(device)


def mean_keys(docs: Tensor, window: Tensor) -> float:
    """Keys that a query sees, itself among them, mean over rows and heads."""
    at = torch.arange(docs.size(1), device=docs.device)
    first = torch.searchsorted(docs, docs)  # where each token's document starts
    return float(torch.minimum(at - first + 1, window[:, None, None]).double().mean())


def cuts(docs: Tensor, window: Tensor) -> T.Documents:
    """What FlashAttention-4 is told of the same documents and window."""
    largest = window.max().cpu().view(1)
    limits = torch.cat([largest, largest, T.count_documents(docs.cpu())])
    caps = tuple(window.tolist()[:2]) if window.numel() > 1 else (T.NO_LIMIT,)
    return T.Documents(T.document_bounds(docs, limits), limits, False, caps)


# ---- ways to compute attention ------------------------------------------------------------------


def causal(b, h, q, kv):
    return q >= kv


def flash(q: Tensor, k: Tensor, v: Tensor, ctx: T.Context) -> Tensor:
    """T.attend by torch's SDPA, the whole causal triangle."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = {"enable_gqa": q.size(1) != k.size(1), "scale": ctx.scale(q.size(-1))}
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa).transpose(1, 2)


class Pick(nn.Module):
    """A projection that is given."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Given) -> Tensor:
        return getattr(x, self.name)


def diffllama(arm: T.DiffV1, kind: str) -> nn.Module:
    """transformers' attention with diff_v1's lambda, from q, k and v on."""
    from transformers.models.diffllama import modeling_diffllama as D

    n = 2 * arm.heads
    heads = {"num_attention_heads": n, "num_key_value_heads": n, "head_dim": arm.dim}
    cfg = D.DiffLlamaConfig(hidden_size=arm.n_out, rms_norm_eps=1e-5, **heads)
    cfg._attn_implementation = kind
    module = D.DiffLlamaAttention(cfg, layer_idx=0)
    module.q_proj, module.k_proj, module.v_proj = Pick("q"), Pick("k"), Pick("v")
    module.o_proj, module.scaling = nn.Identity(), scale(arm.dim)
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    for name, value in zip(names, arm.lam.detach(), strict=True):
        getattr(module, name).data = value.clone()
    return module


def additive_mask(length: int, like: Tensor) -> Tensor:
    """[1, 1, T, T] in the dtype of `like`: 0 where a query sees a key, else very negative."""
    low = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), low, device=like.device, dtype=like.dtype).triu_(1)


def operation(
    case: Case, arm: T.Arm, x: Given, docs: Tensor, window: Tensor, flex: bool
) -> tuple[Callable, list[nn.Parameter]]:
    """(what is timed: Given -> [B, T, n_out]; the parameters in it). Run it in `replaced(case)`.
    Without `flex`, FlexAttention's masks are dense ones."""
    if case.path in DIFFLLAMA:
        kind = DIFFLLAMA[case.path]
        module = diffllama(arm, kind).to(x.q)
        mask = additive_mask(docs.size(1), x.q) if kind == "eager" else None
        return lambda x: module(x, (None, None), mask)[0], list(module.parameters())
    if case.path == "SDPA flash":
        mask = None
    elif not flex:
        mask = T.dense_mask(docs, window)
    elif case.path == "fa4":
        mask = cuts(docs, window)
    elif case.path == "flex causal":
        mask = create_block_mask(causal, None, None, *docs.shape[1:] * 2, device=docs.device)
    else:
        mask = T.block_mask(docs, window)
    ctx = T.Context(mask, {}, scale)
    return lambda x: arm(x, None, ctx)[0], list(arm.parameters())


def given_projections(x: Given, layers, dim: int) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(-1, (-1, dim)) for t in (x.q, x.k, x.v))


def given_weight(arm: T.DiffV2, x: Given) -> Tensor:
    return torch.sigmoid(x.lam)[..., None]


def no_rotation(q: Tensor, k: Tensor, *_) -> tuple[Tensor, Tensor]:
    return q, k


@contextlib.contextmanager
def replaced(case: Case):
    """What an arm or DiffLlama computes from x is given; flash takes the place of T.attend."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(T, "project", given_projections))
        stack.enter_context(mock.patch.object(T.DiffV2, "weight", given_weight))
        if case.path in DIFFLLAMA:
            rope = "transformers.models.diffllama.modeling_diffllama.apply_rotary_pos_emb"
            stack.enter_context(mock.patch(rope, no_rotation))
        if case.path == "SDPA flash":
            stack.enter_context(mock.patch.object(T, "attend", flash))
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        yield


# ---- right, then fast ---------------------------------------------------------------------------


def with_gradients(call: Callable, x: Given, dy: Tensor, learned=()) -> dict[str, Tensor]:
    """{y: output; q, k, v, lam: gradients}, those of the parameters `learned` computed besides."""
    y = call(x)
    inputs = x.tensors()
    grads = torch.autograd.grad(y, [*inputs.values(), *learned], dy.to(y), allow_unused=True)
    return {"y": y.detach(), **dict(zip(inputs, grads))}


def paired(x: Tensor, pairs: int) -> Tensor:
    """DiffLlama's heads i and i + pairs, neighbours as in diff_v1; its V likewise."""
    return x.unflatten(-1, (2, pairs, -1)).transpose(-3, -2).flatten(-3)


def errors(case: Case, arm: T.Arm, x: Given, dy: Tensor, docs, window, got: dict) -> dict:
    """{y, q, k, v: ||got - want|| / ||want||} against fp32 on a dense mask."""
    exact = Given(*(t.detach().float().requires_grad_() for t in x.tensors().values()))
    ctx = T.Context(T.dense_mask(docs, window), {}, scale)

    def dense(x: Given) -> Tensor:
        if case.path in DIFFLLAMA:
            x = Given(*(paired(t, arm.heads) for t in (x.q, x.k, x.v)), x.lam)
        return arm(x, None, ctx)[0]

    with replaced(Case("dense", case.arm)), sdpa_kernel(SDPBackend.MATH):
        want = with_gradients(dense, exact, dy)
    length = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    return {
        name: float(length(got[name].float() - want[name]) / length(want[name]))
        for name in ("y", "q", "k", "v")
    }


def milliseconds(call: Callable, repeats: int, cuda: bool) -> list[float]:
    """Device time of `repeats` calls, one by one; on a CPU, wall-clock."""

    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    if not cuda:
        return [round(1000 * seconds(), 4) for _ in range(repeats)]
    torch.cuda.synchronize()
    host = seconds()  # to queue a call; while the device waits longer than all take, none is late
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9 * max(0.05, 1.5 * repeats * host)))  # cycles; clocks are below 2 GHz
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [round(start.elapsed_time(end), 4) for start, end in events]


def too_large(case: Case, length: int, arm: T.Arm, cuda: bool) -> str | None:
    """Why a case that holds T x T is not tried."""
    if case.path != "DiffLlama eager" or not cuda:
        return None
    need, most = EAGER_BYTES * arm.heads_q * length**2, torch.cuda.mem_get_info()[1]
    if need <= most:
        return None
    return f"skipped: one T x T map of all heads takes {need / 1e9:.0f} of {most / 1e9:.0f} GB"


def measure_lists(length: int, settings: dict, alone: Callable[[], None]) -> dict:
    docs, window = bounds(LISTS, length, settings)
    call = functools.partial(T.block_lists, docs, window)
    alone()
    for _ in range(WARM_UP):
        call()
    times = milliseconds(call, settings["repeats"], docs.is_cuda)
    return {"forward_ms": statistics.median(times), "forward_ms_all": times}


def figures(call: Callable, both: Callable, repeats: int, cuda: bool) -> dict:
    """Times of `call`, forward, and of `both`, forward and backward; peak memory of `both`."""
    row = {}
    for _ in range(WARM_UP):
        both()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        both()
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    for name, timed in (("forward_ms", call), ("ms", both)):
        times = milliseconds(timed, repeats, cuda)
        row |= {name: statistics.median(times), f"{name}_all": times}
    return row


def measure(
    case: Case, length: int, settings: dict, alone: Callable[[], None] = lambda: None
) -> dict:
    """The figures of one row, or {reason} where there are none. `alone` is called once, before what
    must have the GPU to itself: the timing, or all of what fills its memory."""
    cuda = settings["device"] == "cuda"
    if case is LISTS:
        return measure_lists(length, settings, alone)
    arm = build_arm(case.arm)
    row = {"heads": heads_text(arm)}
    if reason := too_large(case, length, arm, cuda):
        return row | {"reason": reason}
    fills = case.path == "DiffLlama eager"
    if fills:
        alone()
    arm = arm.to(settings["device"])
    rows = settings.get("rows", 1)
    x = make_inputs(arm, length, settings["device"], getattr(torch, settings["dtype"]), rows)
    gen = torch.Generator(settings["device"]).manual_seed(1)
    dy = torch.randn(rows, length, arm.n_out, generator=gen, device=settings["device"]).to(x.q)
    docs, window = bounds(case, length, settings)
    row["mean_keys"] = mean_keys(docs, window)
    with replaced(case):
        call, learned = operation(case, arm, x, docs, window, flex=cuda)
        if cuda and case.compiled:
            call = torch.compile(call, fullgraph=True, dynamic=False)
        both = functools.partial(with_gradients, call, x, dy, learned)
        began = time.perf_counter()
        got = both()
        row["first_call_s"] = time.perf_counter() - began
    if length <= CHECKED:
        row["errors"] = errors(case, arm, x, dy, docs, window, got)
        bad = {name: f"{e:.2g}" for name, e in row["errors"].items() if not e <= WRONG}
        if bad:
            return row | {"reason": f"wrong: so far from the dense reference: {bad}"}
    del got
    if not fills:
        alone()
    with replaced(case):
        row |= figures(functools.partial(call, x), both, settings["repeats"], cuda)
    flops = 3 * rows * length * arm.flops_per_token(row["mean_keys"])
    return row | {"tflops": flops / row["ms"] / 1e9}


# ---- a process that may fail --------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """What went wrong, in one line; the compiler wraps the error that it met into long text."""
    inner = re.search(r"got (\w+\('.*'\))", str(error))
    text = inner[1] if inner else f"{type(error).__name__}: {error}"
    return " ".join(text.partition("\n")[0].split())[:300]


def serve(pipe, settings: dict) -> None:
    """Measures what it is sent, (number of the case, length), until the pipe closes. Answers with
    the row; before that with None, and waits for an answer, when it must be alone."""
    T.configure_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def alone() -> None:
        if settings["device"] == "cuda":
            torch.cuda.synchronize()
        pipe.send(None)
        pipe.recv()

    while True:
        try:
            number, length = pipe.recv()
        except EOFError:
            return
        try:
            row = measure(CASES[number], length, settings, alone)
        except ImportError as e:  # before anything ran: this process can go on
            row = {"reason": f"skipped: {first_line(e)}"}
        except Exception as e:
            row = {"reason": first_line(e)}
        torch._dynamo.reset()
        gc.collect()
        if settings["device"] == "cuda":
            with contextlib.suppress(RuntimeError):  # after an error, which the row has
                torch.cuda.empty_cache()
        pipe.send(row)


class Worker:
    """A process for `serve`. A new one follows a row that failed: after a CUDA error the old one
    could do nothing more."""

    def __init__(self, settings: dict):
        self.settings, self.process, self.pipe = settings, None, None

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, self.settings), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.join()
            self.process = None

    def begin(self, case: Case, length: int) -> None:
        if self.process is None:
            self.start()
        with contextlib.suppress(OSError):  # it is gone, which `hear` will find
            self.pipe.send((CASES.index(case), length))

    def go_on(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("alone")

    def hear(self, seconds: float) -> dict | None:
        """The row, within so many seconds or with the reason why not; None where it must be alone
        from here on, and waits for `go_on`."""
        try:
            ready = self.pipe.poll(seconds)
            row = self.pipe.recv() if ready else {"reason": f"not done after {seconds:.0f} s"}
        except (EOFError, OSError):
            self.process.join(10)
            row = {"reason": f"its process ended with code {self.process.exitcode}"}
        if row is not None and not row.get("reason", "skipped").startswith("skipped"):
            self.stop()
        return row


def side_by_side(
    workers: list[Worker], jobs: list[tuple[Case, int]], row_seconds: float, ends: float
) -> Iterator[dict]:
    """The rows of jobs, at most one for each worker, in order: prepared by all at once, timed one
    after the other. ends: when to give up, of time.monotonic."""

    def left(until: float) -> float:
        return max(0.0, min(until, ends) - time.monotonic())

    busy = workers[: len(jobs)]
    for worker, job in zip(busy, jobs):
        worker.begin(*job)
    until = time.monotonic() + row_seconds
    for worker, row in [(worker, worker.hear(left(until))) for worker in busy]:
        if row is None:
            worker.go_on()
            row = worker.hear(left(time.monotonic() + row_seconds))
        yield row


# ---- report -------------------------------------------------------------------------------------


def cells(row: dict) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    worst = f"{max(row['errors'].values()):.1e}" if "errors" in row else ""
    return [
        row["case"],
        row.get("heads", ""),
        number("mean_keys", ",.0f"),
        number("forward_ms", ".3f"),
        number("ms", ".3f"),
        number("tflops", ".3g"),
        number("peak_gb", ".2f"),
        worst,
        number("first_call_s", ".0f"),
        row.get("reason", ""),
    ]


def markdown(report: dict) -> str:
    """A report as `--out` writes it -> a table for each length, and what its columns mean."""
    m, s = report["machine"], report["settings"]
    head = ["case", "heads", "keys a query", "forward ms", "forward + backward ms", "TFLOP/s"]
    head += ["GB", "error", "first call s", "not measured, because"]
    lines = [
        f"{m['card'] or 'CPU, dense masks, nothing compiled'}, driver {m['driver']}, torch "
        f"{m['torch']}, Triton {m['triton']}, transformers {m['transformers']}; {s['dtype']}; "
        f"{s['repeats']} repeats; {report['date']}. Documents of {s['doc_mean']:g} tokens in the "
        f"mean (geometric), window {s['window']:,}; {s.get('rows', 1)} row(s) of T tokens.",
        "",
    ]
    for length in dict.fromkeys(row["length"] for row in report["rows"]):
        lines += [f"### T = {length:,}", "", "| " + " | ".join(head) + " |"]
        lines += ["| --- | --- |" + " ---: |" * 7 + " --- |"]
        for row in report["rows"]:
            if row["length"] == length:
                lines.append("| " + " | ".join(c.replace("|", "/") for c in cells(row)) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in report["notes"])])


def read_report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text())
        markdown(report)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{path} is no report of this program ({first_line(e)})") from None
    return report


def transformers_version() -> str | None:
    try:
        import transformers
    except ImportError:
        return None
    return transformers.__version__


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 49152], help="tokens")
    p.add_argument("--rows", type=int, default=1, help="rows of so many tokens each")
    p.add_argument("--window", type=int, default=1024, help="tokens")
    p.add_argument("--doc-mean", type=float, default=600, help="mean length of documents, tokens")
    p.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name has this")
    p.add_argument("--repeats", type=int, default=20, help="timed calls; their median counts")
    p.add_argument("--row-seconds", type=float, default=150, help="most to prepare, to time a row")
    p.add_argument("--minutes", type=float, default=20, help="most for all rows")
    p.add_argument(
        "--workers",
        **{"type": int, "default": max(1, min(8, CORES // 2)), "metavar": "N"},
        help="rows that are compiled at a time (half as many as CPUs, 8 at most)",
    )
    p.add_argument("--out", type=Path, help="write the report here after each row, as JSON")
    p.add_argument("--markdown", action="store_true", help="print a table at the end")
    p.add_argument("--show", type=Path, nargs="+", help="print the tables of reports, time nothing")
    return p.parse_args(argv)


def chosen_cases(args) -> list[Case]:
    """The cases asked for; raises InputError for what cannot be run."""
    bad = [n for n in args.lengths if n <= 0 or n % T.BLOCK]
    if bad:
        raise T.InputError(f"--lengths {bad[0]}: give multiples of {T.BLOCK}")
    if min(args.rows, args.window, args.repeats, args.workers, args.doc_mean) < 1:
        words = "--rows, --window, --repeats, --workers and --doc-mean"
        raise T.InputError(f"{words} must be at least 1")
    if not torch.cuda.is_available() and max(args.lengths) > CPU_LENGTH:
        raise T.InputError(
            f"no NVIDIA GPU here, so every mask is T x T: give --lengths of at most {CPU_LENGTH}"
        )
    if args.out and not args.out.parent.is_dir():
        raise T.InputError(f"--out {args.out}: make the folder {args.out.parent} first")
    try:
        cases = [case for case in CASES if re.search(args.cases, case.name)]
    except re.error as e:
        raise T.InputError(f"--cases {args.cases!r} is no regular expression: {e}") from None
    if not cases:
        names = "\n  ".join(case.name for case in CASES)
        raise T.InputError(f"--cases {args.cases!r} fits none of\n  {names}")
    return cases


def begin_report(args) -> dict:
    """An empty one, or that of --out to go on with; InputError where that is of another machine,
    other settings or another version of this program."""
    cuda = torch.cuda.is_available()
    settings = {"device": "cuda" if cuda else "cpu", "dtype": "bfloat16" if cuda else "float32"}
    settings |= {k: getattr(args, k) for k in ("rows", "window", "doc_mean", "repeats")}
    report = {
        "machine": gpu_report.machine() | {"transformers": transformers_version()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings,
        "notes": list(NOTES),
        "rows": [],
    }
    if not (args.out and args.out.exists()):
        return report
    old = read_report(args.out)
    other = [key for key in ("machine", "settings", "notes") if old[key] != report[key]]
    if other:
        raise T.InputError(f"{args.out} has other {', '.join(other)}: name another --out")
    return old


def is_done(row: dict) -> bool:
    """A row that is not tried again: one with figures, or one that failed by itself."""
    return not row.get("reason", "").startswith(("not run", "not done", "skipped"))


def write_report(report: dict, path: Path) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(aside, path)


def measure_rows(
    args, settings: dict, jobs: list[tuple[Case, int]]
) -> Iterator[tuple[Case, int, dict]]:
    """Each job with its row; those that --minutes leaves no time for have that as their reason."""
    ends, n = time.monotonic() + 60 * args.minutes, args.workers
    workers = [Worker(settings) for _ in range(min(n, len(jobs)))]
    threads = str(max(1, CORES // n))
    try:
        with mock.patch.dict(os.environ, {"TORCHINDUCTOR_COMPILE_THREADS": threads}):
            while jobs and time.monotonic() < ends:
                some, jobs = jobs[:n], jobs[n:]
                rows = side_by_side(workers, some, args.row_seconds, ends)
                for job, row in zip(some, rows, strict=True):
                    yield *job, row
    finally:
        for worker in workers:
            worker.stop()
    for job in jobs:
        yield *job, {"reason": f"not run: {args.minutes:g} minutes were over"}


def bench(args, cases: list[Case]) -> dict:
    """Every case at every length -> the report; a line for each row as it goes."""
    report = begin_report(args)
    rows = {(row["case"], row["length"]): row for row in report["rows"]}
    jobs = [(case, length) for length in args.lengths for case in cases]
    todo = [(c, n) for c, n in jobs if (c.name, n) not in rows or not is_done(rows[c.name, n])]
    done = len(jobs) - len(todo)
    if done:
        print(f"{done} of {len(jobs)} rows are there already")
    for case, length, row in measure_rows(args, report["settings"], todo):
        rows[case.name, length] = {"case": case.name, "length": length, **row}
        report["rows"], done = list(rows.values()), done + 1
        words = filter(None, cells(rows[case.name, length]))
        print(f"{done}/{len(jobs)}  T {length:,}  " + "  ".join(words), flush=True)
        if args.out:
            write_report(report, args.out)
    return report


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.show:
            print("\n\n".join(markdown(read_report(path)) for path in args.show))
            return 0
        report = bench(args, chosen_cases(args))
    except T.InputError as e:
        print(f"bench_attention.py: {e}", file=sys.stderr)
        return 2
    if args.markdown:
        print("\n" + markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
