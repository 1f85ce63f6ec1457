"""Arms from training to fine-tuned scores, stage by stage, on one machine in one sitting.

    python -m evals.real_runs --data TOKENS --task-data DIR --tasks-dir DIR/lm_eval_tasks \\
        --tokenizer gpt2.tiktoken --results RESULTS --work WORK --dry-run
    python -m evals.real_table RESULTS --out records/evals/DATE_NAME     # then files them

Every arm is trained with the same recipe, tokens and seed, exported, asked zero-shot (all tasks)
and 5-shot (ARC-E, PIQA), fine-tuned on CommonsenseQA and CoQA with several seeds, and asked again:
the tuned task for every seed, LAMBADA and HellaSwag for the first.

A stage is a process of its own that leaves one file, RESULTS/CHECKPOINT/STAGE.json, when it is
done, and a .log. The same command again does what is missing. Stages that share a device keep to
equal parts of its memory; one to which that was too little is tried once more alone. Models stay in
WORK, which is large and need not outlive the sitting; RESULTS is small. A results folder is one
sitting: what was trained again elsewhere is another checkpoint, if with the same seeds, and gets a
folder of its own.
Options of train_gpt.py go behind `--`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import shards
from evals import harness, memory, sample
from records import logs

SCHEMA = 1
MOST_TOKENS = 60_000_000  # an arm, unless told otherwise
FIVE_SHOT = ("arc_easy", "piqa")
TUNED = {"csqa": "commonsense_qa", "coqa": "coqa"}  # our name: the Evaluation Harness's
ASKED_AFTER = ("lambada_openai", "hellaswag")  # whether tuning cost what was there before
LANGUAGE_MODEL = {"csqa": "csqa_cloze", "coqa": "coqa"}  # the form that the harness can ask
AT_ONCE = {
    "cuda": 3,
    "cpu": 1,
}  # stages on one device: most of them wait for the host half the time
LAST_LINES = 15  # of a failed stage's log that are shown
POLL_S = 0.1
DONE, FAILED, UNFINISHED = 0, 1, T.EXIT_CODES["signal"]


# ---- What is to be done -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """after: stages of the same checkpoint that must be done. limit_s: it is stopped then, for it
    hangs. alone: nothing else runs on its device, as its time is a result."""

    name: str
    after: tuple[str, ...]
    limit_s: int
    does: str
    alone: bool = False


STAGES = {
    stage.name: stage
    for stage in (  # in the order in which they are begun: what takes long, or is waited for, first
        Stage("train", (), 900, "trains the arm", alone=True),
        Stage("export", ("train",), 300, "writes a Hugging Face folder"),
        Stage("csqa", ("train",), 900, "fine-tunes on CommonsenseQA, both forms, all seeds"),
        Stage("coqa", ("train",), 900, "fine-tunes on CoQA, all seeds"),
        Stage("zero", ("export",), 600, "asks all tasks, zero-shot"),
        Stage("five", ("export",), 600, "asks ARC-E and PIQA, 5-shot"),
        Stage("csqa_after", ("csqa",), 600, "asks what was tuned on CommonsenseQA"),
        Stage("coqa_after", ("coqa",), 600, "asks what was tuned on CoQA"),
    )
}


@dataclass(frozen=True)
class Checkpoint:
    """One arm at one pretraining seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '-', self.arm)}_s{self.seed}"


@dataclass(frozen=True)
class Job:
    """A stage of a checkpoint, and where its file and its models are."""

    checkpoint: Checkpoint
    stage: Stage
    results: Path
    work: Path

    @property
    def name(self) -> str:
        return f"{self.checkpoint.name}/{self.stage.name}"

    @property
    def file(self) -> Path:
        return self.results / self.checkpoint.name / f"{self.stage.name}.json"

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")

    def sibling(self, stage: str) -> Job:
        return dataclasses.replace(self, stage=STAGES[stage])

    def folder(self, stage: str = "") -> Path:
        """Of a stage's models, its own if none is named."""
        return self.work / self.checkpoint.name / (stage or self.stage.name)

    @property
    def run(self) -> Path:
        """The trained run."""
        return self.folder("train") / "run"

    @property
    def ready(self) -> bool:
        return all(self.sibling(name).file.is_file() for name in self.stage.after)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All of them; arms of one seed before the next seed."""
    checkpoints = [Checkpoint(arm, seed) for seed in args.seeds for arm in args.arms]
    return [Job(c, s, args.results, args.work) for c in checkpoints for s in STAGES.values()]


# ---- Files --------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """A file that this program wrote; InputError where it is none."""
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{path} is no file of evals/real_runs.py: {e!r}") from None
    return found


def write(path: Path, found: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({"schema": SCHEMA, **found}, separators=(",", ":")) + "\n")
    os.replace(aside, path)


def parameter_digest(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes of all parameters: of what was learned, and of nothing
    else that a checkpoint holds."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {[*value.shape]}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def code_digest() -> str:
    """sha256 over the code that scores depend on: tables are made of them later."""
    root = Path(__file__).resolve().parents[1]
    evals = [p for p in (root / "evals").glob("*.py") if p.name != "real_table.py"]
    paths = [root / "train_gpt.py", root / "variants" / "gpt2.py", *evals]
    return hashlib.sha256("".join(T.sha256(p) for p in sorted(paths)).encode()).hexdigest()


def digest_of(files: dict[str, str]) -> str:
    """sha256 over names and digests."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def data_digests(args: argparse.Namespace) -> dict[str, str]:
    """sha256 over names and bytes: of all token shards, of what is tuned on and of the tokenizer's
    file. What the Evaluation Harness asks has keys of its own in its results."""
    tokens = T.Corpus.open(str(args.data)).check_digests()
    tasks = [path for name in TUNED.values() for path in (args.task_data / name).glob("*.jsonl*")]
    tokenizer = Path(args.tokenizer)
    return {
        "data": digest_of({row["name"]: row["sha256"] for row in tokens}),
        "task_data": digest_of({f"{p.parent.name}/{p.name}": T.sha256(p) for p in tasks}),
        "tokenizer": T.sha256(tokenizer) if tokenizer.is_file() else args.tokenizer,
    }


def recipe_of(args: argparse.Namespace) -> dict:
    """What must not change while a results folder is being filled, nor, but for the seeds, between
    sittings that are put into one table."""
    names = ("arms", "seeds", "tune_seeds", "preset", "tokens", "epochs", "tasks", "limit")
    asked = {name: getattr(args, name) for name in (*names, "trainer", "device")}
    return {**asked, **data_digests(args)}


def open_sitting(args: argparse.Namespace) -> None:
    """Begins RESULTS/sitting.json, or compares with it. InputError where it was another recipe, or
    the models of files that are there are gone."""
    path, recipe = args.results / "sitting.json", recipe_of(args)
    if not path.is_file():
        if args.results.exists() and any(args.results.iterdir()):
            raise T.InputError(f"--results {args.results} holds other things: name a new folder")
        began, host = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), socket.gethostname()
        write(path, {"sitting": f"{began} {host}", "recipe": recipe, "git": T.git_state()})
        return
    before = read(path)["recipe"]
    other = [name for name in recipe if before.get(name) != recipe[name]]
    if other:
        said = "; ".join(f"{name} {before.get(name)!r}, now {recipe[name]!r}" for name in other)
        raise T.InputError(f"{path} was begun with another recipe: {said}")
    for job in jobs_of(args):
        check_identity(job)


def check_identity(job: Job) -> None:
    """InputError where a stage's file is of other weights than train.json, or the weights that
    stages to come need are not the ones that were trained."""
    trained = job.sibling("train").file
    if not trained.is_file():
        if job.file.is_file():
            raise T.InputError(f"{job.file} is there without {trained.name}")
        return
    whose = read(trained)["checkpoint"]
    if job.file.is_file():
        if read(job.file)["checkpoint"] != whose:
            raise T.InputError(f"{job.file} is of another checkpoint than {trained}")
    elif sample.meta_of(job.run)["sha256"] != whose["state_sha256"]:
        raise T.InputError(f"{job.run} is not the model of {trained}: that was another sitting")


# ---- Stages -------------------------------------------------------------------------------------


def train(job: Job, args: argparse.Namespace) -> dict:
    """Through the trainer's own command line, on dev alone; its log goes to RESULTS, too."""
    from variants import gpt2

    arm, seed = job.checkpoint.arm, str(job.checkpoint.seed)
    argv = ["--preset", args.preset, "--arm", arm, "--seed", seed, "--data-seed", seed]
    argv += ["--tokens", str(args.tokens), "--data", str(args.data), "--no-final-val"]
    argv += [*args.trainer, "--out", str(job.folder()), "--run-id", "run", "--save-final"]
    made = T.main(argv, lambda cfg: gpt2.make_hooks(cfg) if cfg.preset == "gpt2" else T.Hooks())
    if made:
        raise SystemExit(made)
    run, log = logs.load_run(job.run), job.run / "run.jsonl"
    shutil.copy(log, job.file.with_name("run.jsonl"))
    dev = [look for look in run.vals if look["split"] == "dev"][-1]
    figures = ("tokens", "train_s", "tokens_per_s", "compile_s", "door_s", "peak_alloc")
    return {
        **{name: run.end[name] for name in figures},
        **{name: run.header[name] for name in ("params", "env", "data", "config", "steps")},
        "losses": {"dev_loss": dev["dev_loss"], "dev_bpb": dev["bpb"], "window": dev["window"]},
        "log_h": run.last_h,
    }


def identity(job: Job) -> dict:
    """Which weights a file is about, and how well they predict dev."""
    state, meta = T.load_checkpoint(job.run)
    dev_loss = logs.load_run(job.run).final("dev_loss")
    return {
        "arm": job.checkpoint.arm,
        "seed": job.checkpoint.seed,
        "parameters_sha256": parameter_digest(state["model"]),
        "state_sha256": meta["sha256"],
        "dev_loss": dev_loss,
    }


def write_folder(job: Job, args: argparse.Namespace) -> dict:
    from evals import export

    dtype = "bf16" if args.device == "cuda" else "fp32"
    done = export.export(job.run, job.folder() / "model", dtype, args.tokenizer)
    said = {"difference": done.difference, "parameters": done.parameters, "dtype": dtype}
    return {**said, "architecture": type(done.model).__name__}


def ask(path: Path, name: str, tasks: list[str], shots: int, args: argparse.Namespace) -> dict:
    """What the Evaluation Harness says of a run or a Hugging Face folder, as `evals/harness.py`
    writes it: one entry of `results` for each task, and nothing else where no task is left."""
    if not tasks:
        return {"results": []}
    words = [str(path), "--tasks", *tasks, "--shots", str(shots), "--limit", str(args.limit)]
    words += ["--tasks-dir", str(args.tasks_dir), "--tokenizer", args.tokenizer]
    how = harness.parse([*words, "--device", args.device, "--batch-size", "auto"])
    asked = dataclasses.replace(harness.look_at(str(path)), name=name)
    found = harness.tasks_of(how)
    harness.check([asked], how, found.names())
    return harness.evaluate(asked, found, how, T.World.start(how.device).device)


def ask_zero_shot(job: Job, args: argparse.Namespace) -> dict:
    tasks = args.tasks or [*harness.TASKS, *TUNED.values()]
    return ask(job.folder("export") / "model", job.checkpoint.arm, tasks, 0, args)


def ask_five_shot(job: Job, args: argparse.Namespace) -> dict:
    tasks = [task for task in FIVE_SHOT if not args.tasks or task in args.tasks]
    return ask(job.folder("export") / "model", job.checkpoint.arm, tasks, 5, args)


def tune(job: Job, args: argparse.Namespace) -> dict:
    """All seeds through evals/finetune.py; its result.json, with what was right item by item and
    the digest of each seed's weights."""
    from evals import finetune

    out = job.folder() / "out"
    words = [job.stage.name, str(job.run), "--task-data", str(args.task_data), "--out", str(out)]
    words += ["--seeds", *map(str, args.tune_seeds), "--epochs", str(args.epochs)]
    words += ["--limit", str(args.limit), "--tokenizer", args.tokenizer, "--device", args.device]
    code = finetune.main(words)
    if code:
        raise SystemExit(code)
    found = json.loads((out / "result.json").read_text())["results"]
    for result in found:
        before = out / f"{result['task']}_before.json"
        result["items_before"] = items_of(before) if before.is_file() else None
        for seed in result["seeds"]:
            run = out / seed["run"]
            seed["items"] = items_of(run / "items.json")
            seed["parameters_sha256"] = parameter_digest(T.load_checkpoint(run)[0]["model"])
    return {"results": found}


def items_of(path: Path) -> dict:
    """{ids: what belongs together, a question or a story; and what each item scored, 0 to 1, by
    the figure's name}."""
    rows = json.loads(path.read_text())
    out = {"ids": [row["id"] for row in rows]}
    if "chosen" in rows[0]:
        return out | {"accuracy": [int(row["chosen"] == row["right"]) for row in rows]}
    return out | {name: [round(row[name.lower()], 4) for row in rows] for name in ("F1", "EM")}


def ask_tuned(job: Job, args: argparse.Namespace) -> dict:
    """The tuned task for every seed; for the first one also ASKED_AFTER."""
    (tuned,) = job.stage.after
    out = []
    for seed in args.tune_seeds:
        run = job.folder(tuned) / "out" / f"{LANGUAGE_MODEL[tuned]}_s{seed}"
        tasks = [TUNED[tuned], *(ASKED_AFTER if seed == args.tune_seeds[0] else ())]
        tasks = [task for task in tasks if not args.tasks or task in args.tasks]
        out.append({"seed": seed, **ask(run, f"{job.checkpoint.arm}, {tuned}", tasks, 0, args)})
    return {"seeds": out}


WORK_OF: dict[str, Callable[[Job, argparse.Namespace], dict]] = {
    "train": train,
    "export": write_folder,
    "zero": ask_zero_shot,
    "five": ask_five_shot,
    "csqa": tune,
    "coqa": tune,
    "csqa_after": ask_tuned,
    "coqa_after": ask_tuned,
}


def run_stage(args: argparse.Namespace) -> int:
    """One stage, in this process."""
    job = next((job for job in jobs_of(args) if job.name == args.stage), None)
    if job is None:
        raise T.InputError(f"--stage {args.stage}: there is none of this name")
    harness.go_offline_or_refuse(str(args.tasks_dir))
    T.set_environment()
    memory.keep_to_share()
    shutil.rmtree(job.folder(), ignore_errors=True)  # of an attempt that did not end
    for folder in (job.folder(), job.file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    result = WORK_OF[job.stage.name](job, args)
    trained = job.sibling("train")
    whose = identity(job) if job.stage.name == "train" else read(trained.file)["checkpoint"]
    said = {"stage": job.stage.name, "checkpoint": whose, "code_sha256": code_digest()}
    write(job.file, {**said, "seconds": round(T.process_age(), 1), "result": result})
    return DONE


# ---- Running them -------------------------------------------------------------------------------


@dataclass
class Running:
    job: Job
    place: str
    process: subprocess.Popen
    began: float


class Runner:
    """Starts stages as they become ready, on several devices."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args, self.argv = args, argv
        self.began = time.monotonic()
        self.waiting = [job for job in jobs_of(args) if not job.file.is_file()]
        self.running: list[Running] = []
        self.failed: list[Job] = []
        self.again: set[str] = set()  # had no memory beside others, and get a card of their own

    def alone(self, job: Job) -> bool:
        return job.stage.alone or job.name in self.again

    def place(self, job: Job) -> str:
        """The device of a checkpoint: all its stages are on one."""
        order = [Checkpoint(a, s) for s in self.args.seeds for a in self.args.arms]
        return self.args.gpus[order.index(job.checkpoint) % len(self.args.gpus)]

    def may_start(self, job: Job) -> bool:
        beside = [other.job for other in self.running if other.place == self.place(job)]
        free = len(beside) < self.args.at_once and not any(map(self.alone, beside))
        return job.ready and free and not (self.alone(job) and beside)

    def command(self, job: Job) -> list[str]:
        """A stage's process."""
        return [sys.executable, str(Path(__file__).resolve()), "--stage", job.name, *self.argv]

    def start(self, job: Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // (len(self.args.gpus) * self.args.at_once))
        cache = self.args.work / "cache" / job.checkpoint.name / job.stage.name
        scratch = self.args.work / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "HF_HOME": str(cache),  # of its own: stages that begin together would write one file
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "TMPDIR": str(scratch),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONUNBUFFERED": "1",
            memory.SHARERS: str(1 if self.alone(job) else self.args.at_once),
        }
        if self.place(job):
            env["CUDA_VISIBLE_DEVICES"] = self.place(job)
        with job.log.open("w") as log:
            process = subprocess.Popen(
                self.command(job), stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0
            )
        self.running.append(Running(job, self.place(job), process, time.monotonic()))
        self.say(job, f"begun{f' on GPU {self.place(job)}' if self.place(job) else ''}")

    def say(self, job: Job, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {job.name}: {text}", flush=True)

    def settle(self) -> None:
        """Takes note of stages that have ended, and ends those over their limit."""
        for one in list(self.running):
            seconds = time.monotonic() - one.began
            code = one.process.poll()
            if code is None and seconds <= one.job.stage.limit_s:
                continue
            self.running.remove(one)
            if code == 0:
                self.say(one.job, f"done in {seconds:.0f} s")
                continue
            if code is None:
                end(one.process)
            shared = self.args.at_once > 1 and not self.alone(one.job)
            if code == T.EXIT_CODES["memory"] and shared:
                self.again.add(one.job.name)
                self.waiting.insert(0, one.job)
                said = (
                    f"out of memory, so once more with nothing beside it; {one.job.log} ended with"
                )
                self.say(one.job, f"{said}\n{tail(one.job.log)}")
                continue
            why = f"exit code {code}" if code is not None else f"stopped after {seconds:.0f} s"
            self.failed.append(one.job)
            self.say(one.job, f"FAILED, {why}; {one.job.log} ends with\n{tail(one.job.log)}")

    def run(self) -> int:
        """DONE; FAILED where a stage did not end well; UNFINISHED after --minutes."""
        try:
            while self.waiting or self.running:
                if self.args.minutes and time.monotonic() - self.began > 60 * self.args.minutes:
                    print("time is up: the same command goes on with what is missing")
                    return UNFINISHED
                for job in [job for job in self.waiting if self.may_start(job)]:
                    if self.may_start(job):  # one that was started just now may be in its way
                        self.waiting.remove(job)
                        self.start(job)
                if not self.running:
                    break  # the rest waits for what failed
                time.sleep(POLL_S)
                self.settle()
        finally:
            for one in self.running:
                end(one.process)
        for job in self.waiting:
            self.say(job, "not begun, as what it needs failed")
        return FAILED if self.failed else DONE


def end(process: subprocess.Popen) -> None:
    """A stage and what it started."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])


def listing(args: argparse.Namespace) -> str:
    """What --dry-run shows: the recipe, and each stage with its state, device and limit."""
    runner = Runner(args, [])
    lines = [f"{name}: {value}" for name, value in recipe_of(args).items()]
    lines += [f"devices: {', '.join(args.gpus) or 'CPU'}, {args.at_once} stages at once on each"]
    for job in jobs_of(args):
        state = "done" if job.file.is_file() else "ready" if job.ready else "waits"
        where = runner.place(job) or "cpu"
        lines.append(
            f"{state:6} {job.name:24} {where:4} {job.stage.limit_s:5} s at most  {job.stage.does}"
        )
    return "\n".join(lines)


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, the command line that a stage's process gets)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="real_runs", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add, folder = parser.add_argument, {"type": Path, "metavar": "DIR"}
    add("--data", required=True, **folder, help="token shards to train on, with a dev split")
    add("--task-data", required=True, **folder, help="holds coqa/ and commonsense_qa/")
    add("--tasks-dir", required=True, **folder, help="the Evaluation Harness's tasks, with data")
    add("--results", required=True, **folder, help="one small file a stage")
    add("--work", required=True, **folder, help="models: tens of gigabytes")
    add("--tokenizer", default="", metavar="PATH", help="gpt2.tiktoken; bytes need none")
    arms = ["softmax", "diff_v2"]
    add("--arms", nargs="+", default=arms, metavar="ARM", help=f"({' '.join(arms)})")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of pretraining (0)")
    add("--tune-seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    add("--preset", default="r28", help="of training (r28)")
    add("--tokens", type=int, default=MOST_TOKENS, metavar="N", help=f"an arm ({MOST_TOKENS:,})")
    add("--epochs", type=int, default=0, metavar="N", help="of fine-tuning (0: the task's)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="these alone, to try it out")
    add("--limit", type=int, default=0, metavar="N", help="the first N items, to try it out")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    add("--gpus", nargs="+", default=[], metavar="N", help="one checkpoint on each (all)")
    add("--at-once", type=int, default=0, metavar="N", help="stages on a device (GPU 3, CPU 1)")
    add("--minutes", type=float, default=0, metavar="X", help="stop then; run again to go on")
    add("--dry-run", action="store_true", help="list the stages and stop")
    add("--stage", default="", metavar="NAME", help="this stage in this process; for the runner")
    ours = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:ours])
    args.trainer = argv[ours + 1 :]
    return args, argv


def check(args: argparse.Namespace) -> None:
    """What can be found wrong at once; fills in devices."""
    for name in ("data", "task_data", "tasks_dir"):
        if not getattr(args, name).is_dir():
            flag = f"--{name.replace('_', '-')}"
            raise T.InputError(f"{flag} {getattr(args, name)}: there is no such folder")
    for name in ("arms", "seeds", "tune_seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise T.InputError(f"--{name.replace('_', '-')}: one of them is there twice")
    if min(*args.seeds, *args.tune_seeds, args.tokens, args.epochs, args.limit, args.at_once) < 0:
        raise T.InputError("numbers are 0 or more")
    for arm in args.arms:
        if T.parse_arm(arm)[0] not in T.ARMS:
            raise T.InputError(f"arm {arm!r} cannot be exported: {', '.join(T.ARMS)} can")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not args.gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        args.gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    args.gpus = args.gpus if args.device == "cuda" else [""]
    args.at_once = args.at_once or AT_ONCE[args.device]
    for name in ("data", "task_data", "tasks_dir", "results", "work"):
        setattr(args, name, getattr(args, name).resolve())


def main(argv: list[str] | None = None) -> int:
    """0 all is done; 1 a stage failed; 2 bad input, with one sentence; 5 a stage was out of memory;
    75 time was up."""
    args, words = parse(argv)
    try:
        check(args)
        if args.stage:
            return run_stage(args)
        if args.dry_run:
            print(listing(args))
            return DONE
        open_sitting(args)
        return Runner(args, words).run()
    except (T.InputError, shards.InputError, logs.BadLog) as e:
        print(f"real_runs: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    except torch.OutOfMemoryError as e:
        shared = "run with --at-once 1, for the whole card's memory"
        advice = shared if memory.sharers() > 1 else "free its GPU of other processes"
        print(f"real_runs: {memory.out(e)}: {advice}", file=sys.stderr)
        return T.EXIT_CODES["memory"]
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its stages, too
    sys.exit(main())
