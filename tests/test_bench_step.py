"""What bench_step.py makes of a profile, by hand; its collectives on two gloo processes; and what
records/scaling.py calculates from its figures."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import types

import bench_step as B
import helpers as H
import pytest

from records import scaling

RS, AG = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(void)", "ncclDevKernel_AllGather_RING_LL(x)"


def trace(*events: tuple[str, str, float, float]) -> dict:
    """Chrome's: category, name, from, to, in ms."""
    rows = [{"cat": c, "name": n, "ts": a * 1000, "dur": (b - a) * 1000} for c, n, a, b in events]
    return {"traceEvents": [*rows, {"ph": "M", "name": "process_name"}]}


def test_what_hides_communication_is_another_kernel_at_that_time():
    spans = B.spans_of(
        trace(
            ("kernel", "nvjet_sm90", 0, 10),
            ("kernel", RS, 8, 14),  # 2 ms of it beside the product, 4 bare
            ("kernel", RS, 12, 16),  # a second stream: 2 ms more, bare
            ("gpu_memset", "Memset (Device)", 18, 19),
            ("kernel", AG, 18, 21),  # 1 ms beside the fill, 0.5 beside the kernel that follows
            ("kernel", "triton_poi", 20.5, 22),
            ("gpu_user_annotation", "nccl:all_gather", 0, 22),  # no work, a label
            ("cpu_op", "aten::mm", 0, 22),
        )
    )
    assert len(spans) == 6
    got = B.communication(spans)
    by_name = got.pop("by_name")
    assert by_name == pytest.approx({RS.partition("(")[0]: 10.0, AG.partition("(")[0]: 3.0})
    assert got == pytest.approx(
        {"step_ms": 22, "nccl_ms": 11, "hidden_ms": 3.5, "exposed_ms": 7.5, "idle_ms": 2}
    )
    assert B.kind_of(RS) == B.kind_of(AG) == "communication"


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90Flash", "attention forward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocess", "attention backward"),
        ("triton_tem_fused_flex_attention_backward_3", "attention backward"),
        ("relu2_tiles", "matmul with relu^2"),
        ("grad_tiles", "cross-entropy"),
        ("sm90_xmma_gemm_bf16", "matmul"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert B.kind_of(kernel) == kind


def test_when_the_host_had_asked():
    """A launch is known by its number, from the runtime or, as Triton's, from the driver."""

    def event(kind: str, name: str, at: float, end: float, number: int) -> dict:
        return trace((kind, name, at, end))["traceEvents"][0] | {"args": {"correlation": number}}

    events = [
        event("cuda_runtime", "cudaLaunchKernel", 1.0, 1.5, 7),
        event("kernel", "nvjet", 2.0, 3.0, 7),
        event("cuda_driver", "cuLaunchKernelEx", 3.0, 3.5, 8),
        event("kernel", "triton_poi", 4.0, 5.0, 8),
        event("kernel", "orphan", 6.0, 7.0, 9),
        *trace(("kernel", "old", 7.0, 8.0), ("cuda_runtime", "cudaMalloc", 0, 1))["traceEvents"],
    ]
    assert B.spans_of({"traceEvents": events}) == [
        B.Span("nvjet", 2.0, 3.0, 1.5),
        B.Span("triton_poi", 4.0, 5.0, 3.5),
        B.Span("orphan", 6.0, 7.0, None),
        B.Span("old", 7.0, 8.0, None),
    ]


MARK = "void spin_kernel(long)"
STEPS = [  # ms; two streams, two steps after one that is none of ours
    B.Span("before", 0, 5),
    B.Span(MARK, 5, 5.5, 1),
    B.Span("a", 6, 10, 5.75),  # 0.5 idle, for 0.25 of it the host was late
    B.Span("long", 10, 20, 5.75),
    B.Span("beside", 11, 12, 5.75),  # ends before: what follows waits for `long`
    B.Span("b", 20.0625, 24, 6),  # 0.0625, all asked for
    B.Span(MARK, 24, 24.5, 6),
    B.Span("a", 24.515625, 30, 24.75),  # 0.015625, below 20 us; the host was late
    B.Span("b", 32, 33),  # 2 of an unknown cause
    B.Span(MARK, 33, 33.5, 6),
    B.Span("after", 40, 50, 6),
]


def test_steps_are_between_marks():
    assert B.between_marks(list(reversed(STEPS))) == STEPS[1:-1]


def test_gaps_and_who_was_late():
    assert B.gaps([]) == [] == B.gaps(STEPS[:1])
    spans = B.between_marks(STEPS)
    found = [
        (0.5, MARK, "a", 0.25),
        (0.0625, "long", "b", 0.0),
        (0.015625, MARK, "a", 0.015625),
        (2, "a", "b", None),
    ]
    assert B.gaps(list(reversed(spans))) == [B.Gap(*gap) for gap in found]
    got = B.idleness(spans, steps=2, top=2)
    longest = got.pop("longest")
    assert [(gap["ms"], gap["before"], gap["after"]) for gap in longest] == [
        (2, "a", "b"),
        (0.5, MARK, "a"),
    ]
    assert got == {
        "idle_ms": 2.578125 / 2,
        "long_gaps": 1.5,
        "long_gaps_ms": 2.5625 / 2,
        "host_late_ms": 0.125,
    }
    assert got["idle_ms"] == B.communication(spans, 2)["idle_ms"]
    unknown = B.idleness([s._replace(asked=None) for s in spans])
    assert unknown["host_late_ms"] is None and unknown["long_gaps"] == 3


def test_idleness_is_printed(capsys):
    B.print_kinds(B.between_marks(STEPS), 2, steps=2)
    B.print_idleness(B.idleness(B.between_marks(STEPS), steps=2))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("GPU time of one step, mean of 2 by kind, ")
    assert not any("spin" in line for line in said)
    assert "      5.00 ms x0.5   long" in said
    idle = next(i for i, line in enumerate(said) if line.startswith("GPU idle"))
    assert "1.29 ms of a step: 1.28 in 1.5 gaps above 20 us" in said[idle]
    assert "the host was late for 0.12" in said[idle]
    assert said[idle + 1].split() == ["2000", "us", "a", "->", "b"]
    assert said[idle + 2].endswith("500 us  host late   250 us  (a step begins) -> a")


def test_the_floor_of_a_step(text_data, tmp_path):
    """FLOPs by hand: 2 blocks of width 32 (4 d^2 of attention, 8 d^2 of MLP) and 272 classes."""
    trainer = B.T.Trainer(H.tiny(text_data, tmp_path))
    block, mlp, head, scores = 4 * 32**2, 8 * 32**2, 272 * 32, 4 * 32
    keys = 3 * scores * (10 + 5)  # the last layer is long
    whole = 6 * (2 * (block + mlp) + head) + keys
    gates = sum(p.numel() for n, p in trainer.model.named_parameters() if "gate" in n)
    got = B.flops_of(trainer, 100, 0, (10.0, 5.0))
    assert got["FP8"] == 0 and got["BF16"] / 100 == pytest.approx(whole, abs=6 * gates)
    fewer = B.flops_of(trainer, 100, 128, (10.0, 5.0))
    assert got["BF16"] - fewer["BF16"] == 100 * 6 * (272 - 128) * 32
    trainer.head.fp8 = True
    for module in trainer.model.modules():
        if isinstance(module, B.T.MLP):
            module.fp8 = "both"
    eight = B.flops_of(trainer, 100, 0, (10.0, 5.0))
    assert eight["FP8"] == 100 * (6 * head + 4 * 2 * mlp)
    assert sum(eight.values()) == pytest.approx(sum(got.values()))
    assert B.floor({"BF16": 4e12, "FP8": 3e12}, {"BF16": 800.0, "FP8": 1500.0}) == 7.0
    assert B.floor({"BF16": 4e12, "FP8": 0}, {"BF16": 800.0}) == 5.0


def test_the_table_of_arms():
    rows = [
        {"arm": "softmax", "tokens": 65_536, "gpu": "X", "floor_ms": 40.0}
        | {"kinds": {"matmul": 50.04, "Adam": 2.0}, "idle": [{"idle_ms": 1.0}]},
        {"arm": "not profiled", "tokens": 1, "gpu": "X"},
        {"arm": "diff_v2", "tokens": 65_536, "gpu": "X", "floor_ms": 30.0}
        | {"kinds": {"matmul": 40.0, "communication": 3.0}, "idle": [{"idle_ms": 0.5}]},
    ]
    said = B.profile_table(rows).splitlines()
    assert said[:2] == ["A: softmax, 65,536 tokens, X", "B: diff_v2, 65,536 tokens, X"]
    assert said[3:5] == ["| ms of a step | A | B |", "| --- | ---: | ---: |"]
    assert said[5:] == [
        *("| matmul | 50.0 | 40.0 |", "| Adam | 2.0 |  |", "| communication |  | 3.0 |"),
        *("| nothing | 1.0 | 0.5 |", "| all of it | 53.0 | 43.5 |"),
        "| its products alone, at this card's rates | 40.0 | 30.0 |",
    ]
    assert B.profile_table(rows[1:2]) == ""


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_profiled(every, kept, tmp_path, monkeypatch):
    """Twice: as many steps to be ahead as are recorded, each of these after a mark, and a last."""
    done = []

    class Profile:
        def __init__(self, **_):
            done.clear()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            done.append("end")

        def export_chrome_trace(self, path):
            names = [MARK if name == "mark" else name for name in done]
            spans = [("kernel", name, 2 * i, 2 * i + 1) for i, name in enumerate(names)]
            with gzip.open(path, "wt") as f:
                json.dump(trace(*spans), f)

    calm = types.SimpleNamespace(synchronize=lambda: None, barrier=lambda: None)
    trainer = types.SimpleNamespace(
        **{"steps": ["s0", "s1", "s2"], "world": calm, "cfg": B.T.make_config(adam_every=every)},
        default_batches=lambda steps, *_: iter([f"batch of {s}" for s in steps]),
        train_step=lambda step, batch: done.append(f"{step}, {batch}"),
    )
    monkeypatch.setattr(B.torch.profiler, "profile", Profile)
    monkeypatch.setattr(B.torch.cuda, "_sleep", lambda _: done.append("mark"), raising=False)
    folder = tmp_path / "traces"
    spans, steps = B.record(trainer, str(folder) if kept else "", "arm0_rank0")
    own = [f"s{i}, batch of s{i}" for i in range(every)]
    assert done == [*own, *(w for step in own for w in ("mark", step)), "mark", "end"]
    assert steps == every
    assert [s.name for s in spans] == [MARK if n == "mark" else n for n in done[every:-1]]
    assert [f.name for f in folder.glob("*")] == (["arm0_rank0.json.gz"] if kept else [])


def test_merged_joins_what_touches():
    spans = [B.Span("a", *t) for t in ((5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (2.0, 3.0))]
    assert B.merged(spans) == [(0.0, 3.0), (5.0, 6.0)] and B.length(B.merged(spans)) == 4
    assert B.merged([]) == []


def rows() -> tuple[dict, dict]:
    one = {"arm": "softmax", "tokens": 400_000, "gpu": "H100", "world": 1, "ms": {"384": 800.0}}
    two = {**one, "world": 2, "ms": {"384": 410.0}}
    two["communication"] = [{"exposed_ms": 4.0}, {"exposed_ms": 5.0}]
    two["collectives"] = [{"ms": 3.0}, {"ms": 5.0}]
    return one, two


def test_eight_gpus_by_calculation():
    """410 = 400 + 4 of links + 6 fixed; eight links carry 7/8 where two carried 1/2."""
    (row,) = scaling.projection(*rows(), 8)
    assert row["fixed_ms"] == pytest.approx(6) and row["measured_efficiency"] == 400 / 410
    assert row["ms"] == pytest.approx(100 + 6 + 4 * 1.75)
    assert row["efficiency"] == pytest.approx(100 / 113)
    assert row["none_hidden_ms"] == pytest.approx(100 + 6 + 8 * 1.75)
    (same,) = scaling.projection(*rows(), 2)
    assert same["ms"] == pytest.approx(410), "what was measured comes out for what was measured"


def test_rows_that_do_not_fit_are_refused(tmp_path, capsys):
    one, two = rows()
    for a, b in ((two, one), (one, {**two, "arm": "diff_v2"}), (one, {**one, "world": 2})):
        with pytest.raises(ValueError, match="give one arm"):
            scaling.projection(a, b, 8)
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, row in zip(files, (one, two), strict=True):
        file.write_text(json.dumps([row]))
    assert scaling.main(["--steps", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "| 384 | 800.0 | 410.0, 97.6% | 6.00 | 113.0, 3,539,823, 88.5% | 120.0, 83.3% |" in said
    assert "calculated from these and were not measured" in said
    assert scaling.main(["--steps", *map(str, reversed(files))]) == 2
    with pytest.raises(SystemExit):
        scaling.main([])


def small(data) -> list[str]:
    """`--set` for the demo's preset in the size of `helpers.tiny`."""
    keys = ("n_layer", "d_model", "n_head", "head_dim", "long_layers", "backout")
    flat = H.tiny(data, "runs").flat()
    return [*(f"{k}={flat[k]}" for k in keys), "row_tokens=32"]


def test_larger_steps_of_the_same_calls(text_data, tmp_path):
    how = [*small(text_data), "micro_batch_tokens=256", f"out={tmp_path}"]
    args = {"preset": "demo", "data": str(text_data), "set": how, "windows": [128]}
    args = types.SimpleNamespace(**args, tokens=256, candidates=0, steps=2, also=[512])
    trainer = B.build("softmax", args)
    B.refuse_also(trainer, args)
    B.other_steps(trainer, 512)
    assert [step.tokens for step in trainer.steps] == [512] * 4
    assert B.timed(trainer, 128, 2) > 0
    args.also = [128]
    with pytest.raises(ValueError, match="--also 128: calls of 8 x 16 tokens, not 8 x 32"):
        B.refuse_also(trainer, args)


@pytest.mark.long
def test_two_ranks_time_their_collectives(text_data, tmp_path):
    out = tmp_path / "two.json"
    argv = ["--preset", "demo", "--data", str(text_data), "--tokens", "256", "--steps", "1"]
    argv += ["--windows", "128", "--profile", "3", "--out", str(out)]
    argv += ["--also", "512", "--set", *small(text_data), "micro_batch_tokens=128"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(H.ROOT / "tests/bench_step.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())
    assert row["world"] == 2 and row["ms"]["128"] > 0 and "communication" not in row
    assert row["also"]["512"]["128"] > 0 and "steps of 512 tokens  128: " in done.stdout
    assert row["host_ms"]["step"] > 0 and row["host_ms"]["batch"] >= 0
    whats = [c["what"] for c in row["collectives"]]
    assert whats == ["reduce-scatter", "all-gather"] * (len(whats) // 2)
    assert all(c["ms"] > 0 and c["bytes"] % (2 * 4) == 0 for c in row["collectives"])
    assert done.stdout.count("| all-gather |") == len(whats) // 2, "printed by one rank"
