"""What selective attention costs by part, on any GPU: `python tests/bench_selective.py`.

A layer's attention on rows as the trainer has them, from q, k and v on: softmax as it is; F, the
running sum that is taken; attention with F as a bias; and F's gradient both ways
(--selective-grad).
`bench_step.py --arms selective --set row_tokens=2048 ...` has the whole step. Not a test: it
asserts nothing. Without a GPU, for trying, masks are dense and nothing is compiled.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_attention as B

import train_gpt as T

HEADS = {  # query heads, KV heads
    "selective": (6, 6),
    "diff_v2,selective=true": (12, 3),
    "diff_v2,selective=true,form=light": (6, 3),
}
WARM_UP = 3


def parts(heads: tuple[int, int], args, device: str) -> dict:
    """{part: (function, its inputs)}: forward, and backward by its output's gradient."""
    query, kv = heads
    gen = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def rand(n: int) -> torch.Tensor:
        x = T.norm(torch.randn(args.rows, args.length, n, args.head_dim, generator=gen))
        return x.to(device, dtype).requires_grad_()

    q, k, v = rand(query), rand(kv), rand(kv)
    docs = B.documents(args.length, args.doc_mean, args.rows).to(device)
    window = torch.tensor([args.window], dtype=torch.int32, device=device)
    make = T.block_mask if device == "cuda" else T.dense_mask
    ctx = T.Context(make(docs, window), {}, B.scale, T.starts_of(docs), docs, window)
    wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    wrap = wrap if device == "cuda" else lambda f: f

    def select(q, k):
        return T.selection(q[:, :, 0], k[:, :, 0], ctx)

    def attend(q, k, v, taken=None, chunked=False):
        return T.attend(q, k, v, ctx, taken, chunked)

    def whole(q, k, v, chunked=False):
        return T.attend(q, k, v, ctx, select(q, k), chunked)

    fixed = select(q, k).detach()
    learned = fixed.clone().requires_grad_()
    chunks = {"chunked": True}
    return {
        "softmax, none taken": (wrap(attend), (q, k, v)),
        "F alone": (wrap(select), (q, k)),
        "attention, F fixed": (wrap(attend), (q, k, v, fixed)),
        "attention, dF by flex": (wrap(attend), (q, k, v, learned)),
        "attention, dF in chunks": (wrap(functools.partial(attend, **chunks)), (q, k, v, learned)),
        "all, dF by flex": (wrap(whole), (q, k, v)),
        "all, dF in chunks": (wrap(functools.partial(whole, **chunks)), (q, k, v)),
    }


def measure(call, inputs, repeats: int, cuda: bool) -> dict:
    """Milliseconds forward and forward + backward, peak memory in 1e9 bytes."""
    leaves = [t for t in inputs if t.requires_grad]

    def both():
        y = call(*inputs)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    for _ in range(WARM_UP):
        both()
    row = {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for name, timed in (("forward_ms", lambda: call(*inputs)), ("ms", both)):
        row[name] = statistics.median(B.milliseconds(timed, repeats, cuda))
    if cuda:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--rows", type=int, default=32, help="rows in a call")
    p.add_argument("--length", type=int, default=2048, help="tokens in a row")
    p.add_argument("--window", type=int, default=1024, help="tokens")
    p.add_argument("--doc-mean", type=float, default=1000.0, help="tokens in a document")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--arms", nargs="+", default=list(HEADS), choices=list(HEADS))
    p.add_argument("--out", default="", help="write the rows here as JSON")
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T.configure_compiler(torch.device("cuda"))
    rows = []
    for arm in args.arms:
        torch._dynamo.reset()
        for part, (call, inputs) in parts(HEADS[arm], args, device).items():
            try:
                row = measure(call, inputs, args.repeats, device == "cuda")
            except Exception as e:
                row = {"reason": B.first_line(e)}
            rows.append({"arm": arm, "part": part, **row})
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        said = {**vars(args), "device": device, "torch": torch.__version__, "rows_measured": rows}
        Path(args.out).write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
