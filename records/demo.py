"""The whole path on a CPU, in minutes: two small models, one with softmax, one with differential
attention, on the docstrings of this machine's Python; a table, a plot, a text of each, and a page
that shows where their heads look.

    ./run.sh demo [--minutes 5] [--arms softmax diff_v2] [--out DIR] [--data DIR]

Both arms train the same tokens in the same order from the same seed. How many is found by timing
ten steps of each; the slower one sets the number. Where there is time for fewer than 20, it is 20,
and the demo says so. Every figure is read from the runs' run.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import docstrings, shards
from evals import look, sample

TIMED_STEPS = 10
FEWEST_STEPS = 20
DATA_SEED = 1  # documents shuffled: in the files' order, module by module, dev is 0.2 bits worse
LAST_SECONDS = 15.0  # samples, plot, page, checkpoints
PROMPT, SAMPLE_BYTES = "Return the ", 300
ONE_SEED = "n = 1: says nothing about which arm is better"


# ---- Text and time ------------------------------------------------------------------------------


def open_text(folder: Path) -> dict:
    """What `docstrings.build` says of `folder`, made where it is not there yet; {} for a folder of
    other byte shards, which has no figures of compressors. InputError for other vocabularies."""
    if (folder / shards.MANIFEST).is_file() and not (folder / docstrings.ABOUT).is_file():
        vocab = shards.read_manifest(folder)["vocab"]
        if vocab != shards.BYTES.size:
            raise T.InputError(f"{folder} holds tokens of {vocab}: the demo trains on bytes")
        return {}
    if not (folder / shards.MANIFEST).is_file():
        print("collecting the docstrings of this machine's Python (under a minute, once)")
    return docstrings.build(folder)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds a training step, and a token of validation."""

    step: float
    token: float


def measure(cfg: T.Config) -> Speed:
    """Times ten steps and one validation call of an arm; leaves nothing behind."""
    trainer = T.Trainer(cfg)
    stream = T.TokenStream(trainer.corpus.splits["train"], trainer.corpus.eot)
    rows, row = T.step_rows(trainer.steps[0].tokens, cfg.data.row_tokens)
    times = []
    for i in range(TIMED_STEPS + 1):
        batch = T.make_batch(stream, i * rows * row, rows, row)
        began = time.perf_counter()
        trainer.train_step(trainer.steps[0], batch)
        times.append(time.perf_counter() - began)
    calls = []
    for _ in range(2):
        began = time.perf_counter()
        trainer.evaluate("dev", trainer.steps[0].window, calls=1)
        calls.append(time.perf_counter() - began)
    return Speed(statistics.mean(times[1:]), calls[-1] / cfg.data.val_call_tokens)


def choose_threads(cfg: T.Config) -> None:
    """Sets torch's threads to 1, 2, 4 or 8, at most as many as it has: the fastest. A second thread
    on a core that others use makes a step ten times slower."""
    most = torch.get_num_threads()
    step_s = {}
    for n in (1, 2, 4, 8):
        if n <= most:
            torch.set_num_threads(n)
            step_s[n] = measure(cfg).step
    torch.set_num_threads(min(step_s, key=step_s.get))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps that each arm trains, those that there is time for, and those that the text has."""

    steps: int
    room: int
    most: int
    step: float  # seconds, the slower arm
    looking: float  # seconds of an arm's validation

    @property
    def cut(self) -> str:
        """A line for the user where there is no time for the fewest steps; "" where there is, or
        where the text has no more."""
        if self.room >= self.steps or self.steps == self.most:
            return ""
        return (
            f"cut to the fewest steps, {self.steps} of the {self.most:,} that the text has: a step "
            f"takes {1000 * self.step:.0f} ms and validation {self.looking:.0f} s an arm, which "
            f"leaves time for {self.room}; take more --minutes or a less busy machine"
        )


def make_plan(cfg: T.Config, corpus: T.Corpus, speeds: list[Speed], seconds: float) -> Plan:
    """So many steps that all arms with their validation take `seconds`, or the fewest."""
    dev = min(cfg.data.dev_tokens, corpus.tokens("dev"))
    val = min(cfg.data.val_tokens, corpus.tokens("val"))
    slow = Speed(max(s.step for s in speeds), max(s.token for s in speeds))
    looking = (cfg.run.looks * dev + val) * slow.token
    room = max(0, int((seconds / len(speeds) - looking) / slow.step))
    most = corpus.tokens("train") * cfg.schedule.passes // cfg.schedule.stages[0].tokens
    steps = max(min(room, most), min(FEWEST_STEPS, most))
    return Plan(steps, room, most, slow.step, looking)


# ---- Runs ---------------------------------------------------------------------------------------


class Tenths(io.TextIOBase):
    """Standard output that lets ten of a run's many step lines through, and all others."""

    def __init__(self, out):
        self.out, self.line = out, ""

    def write(self, text: str) -> int:
        self.line += text
        *whole, self.line = self.line.split("\n")
        for line in whole:
            match = re.match(r"step:(\d+)/(\d+) loss:", line)
            done, steps = map(int, match.groups()) if match else (0, 1)
            if 10 * done // steps > 10 * (done - 1) // steps or not match:
                self.out.write(line + "\n")
                self.out.flush()
        return len(text)


def train(cfg: T.Config) -> Path:
    """One arm's run; its folder. SIGINT and SIGTERM end it after the step, with a checkpoint."""
    trainer, code, reason = T.Trainer(cfg), T.EXIT_CODES["done"], "done"
    stop = {n: lambda *_: setattr(trainer, "stop", True) for n in (signal.SIGTERM, signal.SIGINT)}
    before = {number: signal.signal(number, handler) for number, handler in stop.items()}
    try:
        with contextlib.redirect_stdout(Tenths(sys.stdout)):
            return Path(trainer.run()["run"])
    except T.NonFinite as e:
        code, reason = T.EXIT_CODES["non-finite"], str(e)
        raise
    except SystemExit:
        code, reason = T.EXIT_CODES["signal"], "saved on a signal"
        raise
    finally:
        T.write_exit(trainer.folder, code, reason)
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Result:
    """What a run's log says. Losses in bits a byte; steps: tokens, seconds and bits a token."""

    arm: str
    folder: Path
    dev: float
    val: float
    rate: float
    seconds: float
    params: int
    steps: np.ndarray  # [n, 3]
    looks: np.ndarray  # [n, 3]: the same of dev, in bits a byte

    @classmethod
    def read(cls, folder: Path) -> Result:
        lines = [json.loads(x) for x in (folder / "run.jsonl").read_text().splitlines()]
        by = {kind: [x for x in lines if x["t"] == kind] for kind in ("header", "step", "val")}
        header, end = by["header"][0], lines[-1]
        looks = [x for x in by["val"] if x["split"] == "dev"]
        val = [x["bpb"] for x in by["val"] if x["split"] == "val"]
        return cls(
            **{"arm": header["arm"], "folder": folder, "dev": looks[-1]["bpb"]},
            **{"val": val[-1] if val else math.nan, "rate": end["tokens_per_s"]},
            **{"seconds": end["train_s"], "params": header["params"]["stored"]},
            steps=np.array(
                [[x["tokens"], x["train_s"], x["loss"] / math.log(2)] for x in by["step"]]
            ),
            looks=np.array([[x["tokens"], x["train_s"], x["bpb"]] for x in looks]),
        )


# ---- What is shown ------------------------------------------------------------------------------


def table(results: list[Result], about: dict) -> str:
    """The arms' figures, and beside them what needs no neural network."""
    wide = max(12, *(len(r.arm) for r in results))
    head = f"{'':{wide}}  val bits/byte  dev bits/byte  tokens/s  seconds  parameters"
    lines = [head, "-" * len(head)]
    lines += [
        f"{r.arm:{wide}}  {r.val:13.4f}  {r.dev:13.4f}  {r.rate:8,.0f}  {r.seconds:7.1f}  "
        f"{r.params:10,}"
        for r in results
    ]
    if about:
        lines.append(f"{'bigram':{wide}}  {about['bigram']:13.4f}")
        for name in ("gzip", "xz"):
            alone, known = about[name]["alone"], about[name]["conditioned"]
            lines.append(f"{name + ' -9':{wide}}  {alone:13.4f}  alone; {known:.4f} knowing train")
    tokens = int(results[0].steps[-1, 0])
    return "\n".join([*lines, f"{tokens:,} tokens (bytes) for each arm. {ONE_SEED}."])


def plot(results: list[Result], about: dict, path: Path) -> None:
    """Loss against tokens and against seconds; a white ground, so that a dark page shows it too.
    ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    lowest = gzip_known(about) or 6.0
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito
    for axis, column, name in zip(axes, (0, 1), ("training tokens", "training seconds")):
        for i, r in enumerate(results):
            colour, x, y = colours[i % len(colours)], r.steps[:, column], r.steps[:, 2]
            axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.6)
            n = max(1, len(y) // 40)
            smooth = np.convolve(y, np.ones(n) / n, "valid")
            axis.plot(x[n - 1 :], smooth, color=colour, linewidth=1.6, label=r.arm)
            lowest = min(lowest, smooth.min(), r.looks[:, 2].min())
            axis.plot(r.looks[:, column], r.looks[:, 2], "o", color=colour, label=f"{r.arm}, dev")
        for label, value in (("bigram", about.get("bigram")), ("gzip -9", gzip_known(about))):
            if value:
                axis.axhline(value, color="#555555", linestyle="--", linewidth=1)
                axis.annotate(
                    label,
                    (0, value),
                    xytext=(4, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="left",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
                )
        axis.set_xlabel(name)
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.grid(color="#dddddd", linewidth=0.5)
    axes[0].set_ylim(lowest - 0.2, 6)
    axes[0].set_ylabel("bits a byte")
    axes[0].legend(frameon=False, loc="upper right")
    figure.suptitle(ONE_SEED, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def gzip_known(about: dict) -> float | None:
    return about["gzip"]["conditioned"] if about else None


def text_of(folder: Path) -> str:
    """A text of about 300 bytes from a run's model, with the prompt."""
    model, meta = sample.load(folder)
    how = sample.Sampling(tokens=SAMPLE_BYTES - len(PROMPT), end=False)
    return "".join(sample.write(model, meta, sample.tokenizer_of(meta), PROMPT, how))


def show(results: list[Result], about: dict, folder: Path, cut: str) -> None:
    """Prints table, `Plan.cut`, plot and texts, and keeps them in `folder`, with a page of the
    heads."""
    out = [table(results, about), *([cut] if cut else []), ""]
    for r in results:
        said = "\n".join("    " + line for line in text_of(r.folder).splitlines())
        out += [f"{r.arm} goes on from {PROMPT!r}:", said, ""]
    try:
        plot(results, about, folder / "demo.png")
        out.append(f"plot: {folder / 'demo.png'}")
    except ImportError as e:
        out.append(f"no plot: {e.name} is not installed")
    page = look.write([r.folder for r in results], look.TEXT, folder / "look.html")
    out.append(f"where the heads look, for a browser: {page}")
    out += [
        "What next:",
        f"    ./run.sh sample {results[-1].folder} --prompt 'Raises'    more text of this model",
        "    ./run.sh speedrun    GPT-2 small, on a machine with an NVIDIA GPU",
        "    ./run.sh --help      everything else",
    ]
    text = "\n".join(out)
    (folder / "demo.txt").write_text(text + "\n")
    print("\n" + text, flush=True)


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, metavar="X", help="about how long it may take (5)")
    arms = ["softmax", "diff_v2"]
    add("--arms", nargs="+", default=arms, metavar="ARM", help="(softmax diff_v2)")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for run folders (runs)")
    text = T.HERE / "data" / "tokens" / "demo"
    add("--data", type=Path, default=text, metavar="DIR", help="byte shards (data/tokens/demo)")
    return parser.parse_args(argv)


def demo(args: argparse.Namespace) -> Path:
    """All of it; the folder with the runs, demo.png, demo.txt and look.html. InputError before any
    training, NonFinite and SystemExit(75) as the trainer."""
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        raise T.InputError(f"--minutes {args.minutes}: more than 0")
    if len(set(args.arms)) < len(args.arms):
        raise T.InputError("--arms names an arm twice")
    end = time.monotonic() + 60 * args.minutes
    folder = args.out / time.strftime(f"%Y%m%d-%H%M%S_demo_{os.getpid()}")
    make = functools.partial(
        T.make_config, "demo", data=str(args.data), out=str(folder), data_seed=DATA_SEED
    )
    bad = [problem for arm in args.arms for problem in T.check_config(make(arm=arm))]
    if bad:
        raise T.InputError("; ".join(dict.fromkeys(bad)))
    about = open_text(args.data)
    cfgs = [make(arm=arm, run_id=re.sub(r"[^\w.,=+-]", "-", arm)) for arm in args.arms]
    corpus = T.Corpus.open(str(args.data))
    if not corpus.splits.get("val") or corpus.bytes_of is None:
        raise T.InputError(f"{args.data} lacks val shards or token_bytes.bin: the demo needs both")
    choose_threads(cfgs[0])
    speeds = [measure(cfg) for cfg in cfgs]
    seconds = end - time.monotonic() - LAST_SECONDS
    plan = make_plan(cfgs[0], corpus, speeds, seconds)
    tokens = plan.steps * cfgs[0].schedule.stages[0].tokens
    ms = ", ".join(f"{a} {1000 * s.step:.0f} ms" for a, s in zip(args.arms, speeds))
    threads = torch.get_num_threads()
    print(f"a step takes {ms} on {threads} thread(s): {plan.steps} steps for each arm")
    if plan.cut:
        print(plan.cut)
    results = [Result.read(train(cfg.with_(tokens=tokens))) for cfg in cfgs]
    show(results, about, folder, plan.cut)
    return folder


def main(argv: list[str] | None = None) -> int:
    """The exit codes of train_gpt.py: 2 for bad input, 3 for a loss that is not finite, 75 where a
    signal ended it."""
    try:
        demo(parse(argv))
        return 0
    except (T.InputError, shards.InputError) as e:
        code, reason = T.EXIT_CODES["input"], str(e)
    except T.NonFinite as e:
        code, reason = T.EXIT_CODES["non-finite"], str(e)
    except KeyboardInterrupt:
        code, reason = T.EXIT_CODES["signal"], "ended by a signal"
    except SystemExit as e:
        if e.code != T.EXIT_CODES["signal"]:
            raise
        code, reason = T.EXIT_CODES["signal"], "ended by a signal, with a checkpoint"
    print(f"demo: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
