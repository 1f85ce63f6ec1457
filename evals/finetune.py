"""Fine-tunes a trained model on CoQA or CommonsenseQA and scores it, for several seeds.

    python -m evals.finetune coqa RUN --task-data DIR        # a run, checkpoint or exported folder
    python -m evals.finetune coqa RUN --task-data DIR --split dev400
    python -m evals.finetune csqa RUN --task-data DIR --seeds 0 1 2

DIR holds coqa/ (train_partial, validation) and commonsense_qa/ (train, validation), .jsonl or
.jsonl.xz with the fields of EleutherAI/coqa and tau/commonsense_qa.

train_gpt.py's own loop does the training, through its hooks: weights from the checkpoint, whole
documents in rows, loss on answers alone. A seed is the order of the data and, where a task has a
new vector, its start; nothing else is new. The held-out slice of train is looked at twice an epoch,
and the weights of its best look are what is saved and scored (early stopping; the schedule is run
to its end, for a later look may be better). They are saved, too, where a seed ends early: by a loss
that is not finite, for want of memory or by a signal. They have no optimizer and are not resumed.
Windows are those that an export of the checkpoint has. A table of n-grams stays as it is: a tuned
text reads few of its rows, and a second copy of it, for the best look, may not fit the GPU.

OUT/TASK_sN are runs like any other: sample, look, export and finetune take them. Beside them:
result.json, table.txt and, for each task, learning curves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import shards
from evals import coqa, csqa, export, exported, memory, sample
from evals.task import Document, Scores, Task, Words, batch_of, lineage, pack, size
from records import logs
from records.demo import Tenths
from variants import gpt2

LOOKS_AN_EPOCH = 2
CALL_TOKENS = {"cuda": 8192, "cpu": 4096}  # of a training call: dense masks, no compilation
LR = {"gpt2": 0.1}  # factor on every learning rate of the checkpoint's own recipe
USUAL_LR = 0.05  # in r28's: for a matrix about what AdamW does at 5e-5
WARMUP = 0.1
TABLE = T.RowAdam.NAME  # of an n-gram table among a model's weights
INTERRUPTED = 130  # the exit code of a shell's Ctrl-C


@dataclass(frozen=True)
class Start:
    """The checkpoint that tuning starts from. window: the long one, as its export has it."""

    path: Path
    meta: dict
    weights: dict
    words: Words
    window: int
    lineage: list[dict]

    @classmethod
    def load(cls, path: str, tokenizer: str) -> Start:
        meta = sample.meta_of(path)
        words = Words(sample.tokenizer_of(meta, tokenizer))
        if exported.is_folder(path):
            weights = sample.load(path)[0].state_dict()
        else:
            weights = T.load_checkpoint(path)[0]["model"]
        window = export.windows_of(meta)[0][0]
        return cls(Path(path), meta, weights, words, window, lineage(path))

    @property
    def table(self) -> Path | None:
        """The file of its table of n-grams, which checkpoints that are tuned from it share."""
        if exported.is_folder(self.path):
            return None
        path = T.find_checkpoint(self.path) / "table.pt"
        return path if path.exists() else None

    @property
    def is_gpt2(self) -> bool:
        return self.meta["config"]["preset"] == "gpt2"

    def model(self, cfg: T.ModelConfig, length: int, dtype: torch.dtype) -> nn.Module:
        """As trained; dense attention, as rows are short and nothing is compiled."""
        model = exported.model_class(self.meta)(cfg, length, dtype)
        if cfg.ngram:
            model.ngram.table = self.weights[TABLE]  # frozen, so one is enough
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as e:  # a parameter too many, or of another shape
            said = str(e).splitlines()[0]
            raise T.InputError(f"{self.path} does not fit its model: {said}") from None
        sample.by_dense_masks(model)
        return model

    @property
    def as_json(self) -> dict:
        meta = self.meta
        return {
            "run": name_of(self.path),
            "arm": meta["arm"],
            "step": meta["step"],
            "sha256": meta["sha256"],
        }


def name_of(path: str | Path) -> str:
    """Of the run that a checkpoint is in, or of the folder that was exported."""
    if exported.is_folder(path):
        return Path(path).resolve().name
    return T.find_checkpoint(path).parents[1].name


# ---- Through the trainer's loop -----------------------------------------------------------------


def write_tokens(task: Task, folder: Path) -> None:
    """The task's documents as shards: the run's header has their digests, and dev_loss is the loss
    on all tokens of the held-out slice."""
    table = task.words.tokenizer.token_bytes().astype(np.int64)
    with shards.CorpusWriter(folder, task.words.tokenizer.vocab, table) as writer:
        for split, units in (("train", task.units), ("dev", task.held_out)):
            writer.begin(split)
            ids = [document.ids for unit in units for document in unit]
            lengths, text = (np.array([f(i) for i in ids]) for f in (len, lambda i: table[i].sum()))
            writer.add(shards.Batch(np.concatenate(ids).astype(np.uint16), lengths, text))
        writer.commit()


def tuning_config(start: Start, task: Task, steps: int, args: argparse.Namespace) -> T.Config:
    """The checkpoint's own settings with another schedule, data and place."""
    tokens, row = task.rows * task.row, task.row
    have = sum(map(size, task.units))
    lr = args.lr or LR.get(start.meta["config"]["preset"], USUAL_LR)
    call = args.micro_batch_tokens or CALL_TOKENS[args.device]
    looks = min(20, steps, LOOKS_AN_EPOCH * (args.epochs or task.epochs))
    changes = {
        "stages": (T.Stage(1.0, tokens, lr, (start.window, start.window)),),
        **{"tokens": tokens * steps, "passes": math.ceil(tokens * steps / have)},
        **{"warmup": WARMUP, "cooldown": 1 - WARMUP, "lr_floor": 0.0, "ext_window": 0},
        **{"momentum_warmup": 0, "momentum_cooldown": 0, "untie": 0.0, "tail": 0.0},
        **{"data": str(args.out / "tokens" / task.name), "dev": "", "row_tokens": row},
        **{"micro_batch_tokens": call, "val_row_tokens": row},
        **{"val_call_tokens": row * max(1, call // row)},
        **{"device": args.device, "dtype": "auto", "fp8": False, "compile": False},
        "cuda_graphs": False,
        # Kernels of the pretraining machine: nothing is compiled here, and rows are short.
        **{"attention": "flex", "mlp_kernel": False, "mlp_fp8": "", "loss_kernel": False},
        **{"looks": looks, "final_val": False, "out": str(args.out), "run_id": "", "track": ""},
        **{"save_every": 0, "save_final": False, "keep": 1, "resume": "", "require_gpu": False},
    }
    return T.config_from_flat(start.meta["config"], start.path).with_(**changes)


@dataclass(frozen=True)
class Kept:
    """A model as it was at a look. weights stay on its device, an n-gram table, which is as it was,
    the model's own; meta: its checkpoint's."""

    weights: dict[str, torch.Tensor]
    meta: dict

    @classmethod
    def of(cls, trainer: T.Trainer, done: int) -> Kept:
        state = trainer.model.state_dict()
        weights = {n: p if n == TABLE else p.detach().clone() for n, p in state.items()}
        return cls(weights, trainer.running.checkpoints.meta(done))

    @property
    def step(self) -> int:
        return self.meta["step"]

    def save(self, run: Path, keep: int, table: Path | None = None) -> Path:
        """RUN's newest checkpoint, without what a later step has left there. OSError and `table`
        as T.save_checkpoint: what was there before stands."""
        folder = run / "ckpt"
        later = [p for p in T.whole_checkpoints(folder) if p.name > f"step_{self.step:08d}"]
        state = {"model": {name: p.cpu() for name, p in self.weights.items()}}
        saved = T.save_checkpoint(folder, state, self.meta, keep + len(later), table)
        for path in later:
            shutil.rmtree(path)
        return saved


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are heard at its end (in the main thread, where alone
    Python hears signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    for s in came:
        signal.raise_signal(s)


class Tuning:
    """One task on one checkpoint: a Trainer that runs once for each seed."""

    def __init__(self, start: Start, task: Task, args: argparse.Namespace):
        self.start, self.task = start, task
        self.epochs = args.epochs or task.epochs
        self.rows_an_epoch = len(pack([size(unit) for unit in task.units], task.row))
        steps = math.ceil(self.epochs * self.rows_an_epoch / task.rows)
        write_tokens(task, args.out / "tokens" / task.name)
        self.cfg = tuning_config(start, task, steps, args)
        hooks = T.Hooks(
            model=self.new_model,
            optimizer=gpt2.make_optimizer if start.is_gpt2 else None,
            batches=self.batches,
            loss_mask=lambda batch: batch.targets >= 0,
            after_step=self.count,
            on_eval=self.look,
        )
        self.trainer = T.Trainer(self.cfg, hooks)
        self.trainer.lm.ngram = self.trainer.optimizer.rows = None  # nobody updates the table
        task.adapt(self.trainer)
        self.looks: list[dict] = []
        self.done = 0
        self.kept: Kept | None = None  # the best look's

    def new_model(self, cfg: T.Config, length: int, dtype: torch.dtype) -> nn.Module:
        """The loop's model: the seed starts nothing but what the task calls new."""
        model = self.start.model(cfg.model, length, dtype)
        self.task.start(model, cfg.run.seed)
        for p in model.parameters():
            p.init = None  # the loop leaves what has no rule as it was built
        return model

    def rows(self, seed: int) -> Iterator[list[Document]]:
        """Rows of whole units, without end: each epoch in an order of its own."""
        units, row = self.task.units, self.task.row
        for epoch in itertools.count():
            order = np.random.default_rng((seed, epoch)).permutation(len(units))
            for part in pack([size(units[i]) for i in order], row):
                yield [document for k in part for document in units[order[k]]]

    def batches(self, steps: list[T.Step], cfg: T.Config, world: T.World) -> Iterator[T.Batch]:
        """What each step trains on follows from the seed and the step's number."""
        before = steps[0].index * self.task.rows if steps else 0
        rows = itertools.islice(self.rows(cfg.data.data_seed), before, None)
        for _ in steps:
            some = list(itertools.islice(rows, self.task.rows))
            yield batch_of(some, self.task.row, self.task.words.eot)

    def count(self, trainer: T.Trainer, step: T.Step) -> None:
        self.done = step.index + 1

    def look(self, trainer: T.Trainer, out: dict) -> None:
        """Figures of the held-out slice. The best ones' model is kept beside the one that goes on,
        for writing it takes longer than the steps between two looks; `run` saves it."""
        window = T.windows(self.start.window, trainer.world.device)
        found = {"step": self.done, **self.task.look(trainer.model, window)}
        self.looks.append(found)
        best = max(self.looks, key=self.task.rank)  # of equal ones, the first
        log, text = trainer.running.log, " ".join(f"{k}:{v:.4g}" for k, v in found.items())
        with undisturbed():  # a best look that the log names is one that will be saved
            log.write("held_out", **found, best=best["step"])
            log.say(f"held out: {text}" + (", the best" if best is found else ""))
            if best is found:  # after its line, which the log has then
                self.kept = Kept.of(trainer, self.done)

    def save_kept(self) -> None:
        """Whatever has ended the run. Where the disk does not take it, the reason why the run ended
        must still be heard."""
        if self.kept is None:
            return
        running = self.trainer.running
        try:
            keep, table = self.trainer.cfg.run.keep, self.start.table
            running.log.say(f"saved {self.kept.save(running.folder, keep, table)}")
        except OSError as e:
            print(f"finetune: the best look was not saved: {e}", file=sys.stderr)

    def entry(self, seed: int) -> dict:
        """What `lineage` tells of this tuning."""
        said = {"task": self.task.name, "trained_on": self.task.about["trained_on"]}
        said |= {"tainted": list(self.task.tainted), "start": self.start.as_json, "seed": seed}
        return {**said, "epochs": self.epochs, "lr": self.cfg.schedule.stages[0].lr}

    @property
    def smaller(self) -> str:
        """The one flag to change when the loop's memory is out; "" where no call is smaller."""
        rows, row = self.trainer.call_shape(self.trainer.steps[0].tokens)
        return f"--micro-batch-tokens {rows // 2 * row}" if rows > 1 else ""

    def run(self, seed: int) -> dict:
        """Trains with this seed and scores the best look; its figures, for result.json. Writes
        RUN/items.json. NonFinite as the loop; whatever ends it, the best look so far is saved."""
        self.looks, self.done, self.kept = [], 0, None
        trainer, name = self.trainer, f"{self.task.name}_s{seed}"
        trainer.labels = {"finetuned": [*self.start.lineage, self.entry(seed)]}
        trainer.reset(seed, seed, run_id=name)
        try:
            with contextlib.redirect_stdout(Tenths(sys.stdout)):
                trainer.run()
        except ENDS as e:
            if isinstance(e, torch.OutOfMemoryError) and self.smaller:
                e.add_note(f"run again with {self.smaller}")
            T.write_exit(trainer.folder, *said_of(e))
            raise
        finally:
            self.save_kept()
        folder = trainer.folder
        T.write_exit(folder, T.EXIT_CODES["done"], "done")
        trainer.model.load_state_dict(self.kept.weights)  # a second table of n-grams may not fit
        window = T.windows(self.start.window, trainer.world.device)
        scores = self.task.score(trainer.model, sample.meta_of(folder), window)
        (folder / "items.json").write_text(json.dumps(scores.items))
        steps = {"best_step": self.kept.step, "steps": len(trainer.steps)}
        return {"seed": seed, "run": name, **steps, "looks": self.looks, "figures": scores.figures}


# ---- What is shown ------------------------------------------------------------------------------


def spread(values: list[float]) -> dict:
    """mean, sd (of a sample; None for one value), n."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def result_of(tuning: Tuning, before: Scores | None, seeds: list[dict]) -> dict:
    """A task's part of result.json."""
    names = list(seeds[0]["figures"])
    task = tuning.task
    return {
        "task": task.name,
        "about": task.about,
        **{"epochs": tuning.epochs, "lr": tuning.cfg.schedule.stages[0].lr},
        **{"rows_a_step": task.rows, "row_tokens": task.row, "window": tuning.start.window},
        "chosen_by": task.chosen_by,
        "before": before and before.figures,
        "after": {name: spread([s["figures"][name] for s in seeds]) for name in names},
        "seeds": seeds,
    }


def table(results: list[dict]) -> str:
    """Every task's figures, percent: before, and after as mean, sd and each seed."""
    out = []
    for r in results:
        about = r["about"]
        out += [
            f"{r['task']}: trained on {about['trained_on']}, scored on {about['scored_on']}",
            f"{'percent':20} {'before':>7} {'after':>7} {'sd':>6} {'n':>3}  seeds",
        ]
        for name, after in r["after"].items():
            before = f"{r['before'][name]:.2f}" if r["before"] else "-"
            sd = "-" if after["sd"] is None else f"{after['sd']:.2f}"
            each = " ".join(f"{s['figures'][name]:.2f}" for s in r["seeds"])
            out.append(f"{name:20} {before:>7} {after['mean']:7.2f} {sd:>6} {after['n']:3}  {each}")
        out.append("")
    out.append("sd is over fine-tuning seeds of one checkpoint: it says nothing about other ones.")
    return "\n".join(out)


def draw(tuning: Tuning, result: dict, out: Path) -> str:
    """Learning curves of a task as OUT/TASK.png and .svg; a line about them."""
    try:
        from records import plots
    except ImportError as e:
        return f"no plot: {e.name} is not installed"
    path, task = out / f"{tuning.task.name}_curves", tuning.task
    epoch = tuning.rows_an_epoch / task.rows
    key = task.chosen_by
    with plots.style(plots.LIGHT):
        figure, axes = plots.new_figure(2)
        for (colour, marker), seed in zip(itertools.cycle(plots.STYLES), result["seeds"]):
            x, y = (np.array([look[name] for look in seed["looks"]]) for name in ("step", key))
            axes[0].plot(x / epoch, y, color=colour, marker=marker, label=f"seed {seed['seed']}")
            best = x == seed["best_step"]
            axes[0].plot(x[best] / epoch, y[best], "o", color=colour, markersize=9, alpha=0.5)
            steps = logs.load_run(out / seed["run"]).steps
            parts = np.array_split([[s["step"], s["loss"]] for s in steps], min(len(steps), 60))
            at, loss = np.array([part.mean(0) for part in parts]).T
            axes[1].plot(at / epoch, loss, color=colour)
        what, unit = ("accuracy", "percent") if key == "accuracy" else ("loss on answers", "nats")
        plots.say(axes[0], f"{task.name}: held-out {what} (large dots: kept)", "epochs", unit)
        plots.say(axes[1], "Training loss on answers", "epochs", "nats")
        axes[0].legend(frameon=False)
        plots.save(figure, path)
    return f"plot: {path}.png"


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("task", choices=("coqa", "csqa"), help="csqa: CommonsenseQA, cloze form and choice head")
    add(
        "model",
        metavar="MODEL",
        help="run folder, checkpoint in it (ckpt/step_*) or exported folder",
    )
    folder = {"type": Path, "metavar": "DIR"}
    add("--task-data", required=True, **folder, help="holds coqa/ or commonsense_qa/")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    add("--epochs", type=int, default=0, metavar="N", help="(coqa 4, csqa 3)")
    add(
        "--lr",
        type=float,
        default=0.0,
        metavar="X",
        help="factor on every learning rate that the checkpoint was trained with (gpt2 0.1, "
        "others 0.05)",
    )
    call = "of a training call: less takes less memory (GPU 8192, CPU 4096)"
    add("--micro-batch-tokens", type=int, default=0, metavar="N", help=call)
    add("--split", choices=coqa.SPLITS, default="train_partial", help="coqa: (train_partial)")
    add("--limit", type=int, default=0, metavar="N", help="score the first N alone, to try it out")
    add("--out", default=None, **folder, help="new or empty (runs/TIME_finetune_TASK_RUN)")
    add("--tokenizer", default="", metavar="FILE", help="gpt2.tiktoken, if it cannot be fetched")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """What can be found wrong at once; fills in device and folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise T.InputError("fine-tuning takes minutes on one GPU: start it without torchrun")
    numbers = args.epochs, args.limit, args.lr, args.micro_batch_tokens
    if not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise T.InputError(
            "--epochs, --limit, --lr and --micro-batch-tokens are 0 (for the usual) or more"
        )
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise T.InputError("--seeds are different numbers, 0 or more")
    if args.split != "train_partial" and args.task != "coqa":
        raise T.InputError(f"--split {args.split} is one of coqa's")
    args.device = T.World.start(args.device).device.type
    if args.out is None:
        name = f"finetune_{args.task}_{name_of(args.model)}"
        args.out = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}_{name}"
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise T.InputError(f"{args.out} is there already: name a folder that is empty or new")


def finetune(args: argparse.Namespace) -> list[dict]:
    """All tasks and seeds; what is in result.json. InputError before any training."""
    check(args)
    start = Start.load(args.model, args.tokenizer)
    if args.task == "coqa":
        tasks = coqa.make(args.task_data, start.meta, start.words, args.split, args.limit, args.out)
    else:
        tasks = csqa.make(args.task_data, start.words, args.limit)
    results = []
    for task in tasks:
        results.append(tune(start, task, args))
        memory.release()  # its trainer is in a cycle with its hooks
        said = {"schema": T.SCHEMA, "start": start.as_json, "lineage": start.lineage}
        said |= {"source_sha256": {p.name: T.sha256(p) for p in sources()}, "results": results}
        (args.out / "result.json").write_text(json.dumps(said, indent=1))
    (args.out / "table.txt").write_text(table(results) + "\n")
    print(f"\n{table(results)}\nin {args.out}", flush=True)
    return results


def tune(start: Start, task: Task, args: argparse.Namespace) -> dict:
    """One task, all seeds."""
    tuning = Tuning(start, task, args)
    window = T.windows(start.window, tuning.trainer.world.device)
    before = task.before(tuning.trainer.model, start.meta, window)  # nothing has trained it yet
    tuning.trainer.park()  # after scoring, torch keeps many times what training needs
    if before is not None:
        (args.out / f"{task.name}_before.json").write_text(json.dumps(before.items))
        print(f"{task.name} before: {shown(before.figures)}", flush=True)
    seeds = []
    for seed in args.seeds:
        seeds.append(tuning.run(seed))
        tuning.trainer.park()
        print(f"{task.name} seed {seed}: {shown(seeds[-1]['figures'])}", flush=True)
    result = result_of(tuning, before, seeds)
    print(draw(tuning, result, args.out), flush=True)
    return result


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def sources() -> list[Path]:
    here = Path(__file__)
    return [
        here.with_name(f"{name}.py") for name in ("finetune", "task", "coqa", "coqa_score", "csqa")
    ]


# What ends a run early, beside bad input.
ENDS = (T.NonFinite, torch.OutOfMemoryError, KeyboardInterrupt)


def said_of(e: BaseException) -> tuple[int, str]:
    """Exit code and reason of one of ENDS."""
    if isinstance(e, T.NonFinite):
        return T.EXIT_CODES["non-finite"], f"{e}: try a smaller --lr"
    if isinstance(e, torch.OutOfMemoryError):
        alone = ["free it of other processes: a row alone is too much"]
        advice = getattr(e, "__notes__", alone)[-1]
        return T.EXIT_CODES["memory"], f"{memory.out(e)}: {advice}"
    return INTERRUPTED, "interrupted; finished seeds are in their run folders"


def main(argv: list[str] | None = None) -> int:
    """0 done; 2 bad input, with one sentence; 3 loss not finite; 5 out of memory; 130 a signal."""
    T.set_environment()
    args = parse(argv)
    try:
        finetune(args)
        return 0
    except (T.InputError, shards.InputError) as e:
        code, reason = T.EXIT_CODES["input"], str(e)
    except ENDS as e:
        code, reason = said_of(e)
    print(f"finetune: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is best so far is saved
    sys.exit(main())
