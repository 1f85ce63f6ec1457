"""Models in the Evaluation Harness, side by side: the seven tasks of the differential-transformer
paper and LAMBADA, zero-shot and 5-shot.

    python -m evals.harness runs/A runs/B                     # run or checkpoint folders
    python -m evals.harness FOLDER --tasks piqa --shots 0     # a Hugging Face folder
    python -m evals.harness A B --tasks-dir lm_eval_tasks     # tasks with their data: no network
    python -m evals.harness 1/A.scores.json 2/B.scores.json   # a table of two sittings

A run is exported to a temporary folder first. OUT gets NAME.scores.json for each model, with every
item's log-likelihoods, and table.md and table.json. Every document was trained behind
<|endoftext|>, so every prompt stands behind it; LAMBADA is shown without it, too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import doctor, shards
from evals import memory, sample, score_table, task

SCHEMA = 1
PAPER = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
TASKS = (*PAPER, "lambada_openai")
BOTH_WAYS = "lambada"  # tasks of which this is the beginning are run without <|endoftext|>, too


# ---- What is asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A MODEL of the command line. kind: "run" (or one of its checkpoints), "folder" (a Hugging
    Face one) or "scores" (of an earlier evaluation)."""

    path: Path
    kind: str
    name: str
    scores: dict | None = None


def look_at(word: str) -> Asked:
    """InputError where it is none of the three; nothing big is read."""
    path = Path(word)
    if path.suffix == ".json" and path.is_file():
        scores = read_scores(path)
        return Asked(path, "scores", scores["name"], scores)
    if (path / "config.json").is_file():
        return Asked(path, "folder", path.resolve().name)
    if not path.exists():
        raise T.InputError(f"there is no {word}: give a run, checkpoint or Hugging Face folder")
    return Asked(path, "run", sample.meta_of(path)["config"]["arm"])


def read_scores(path: Path) -> dict:
    try:
        scores = json.loads(path.read_text())
        if scores["schema"] != SCHEMA:
            raise ValueError(f"schema {scores['schema']}")
        scores["name"], scores["model"]["path"], scores["results"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{path} is no file of scores that this command wrote: {e!r}") from None
    return scores


def look_at_all(words: list[str]) -> list[Asked]:
    """With a name of its own for each: a run's is its arm, a folder's the folder's."""
    found = [look_at(word) for word in words]
    often, seen, out = Counter(asked.name for asked in found), Counter(), []
    for asked in found:
        seen[asked.name] += 1
        name = f"{asked.name} #{seen[asked.name]}" if often[asked.name] > 1 else asked.name
        out.append(Asked(asked.path, asked.kind, name, asked.scores))
    return out


def go_offline_or_refuse(tasks_dir: str) -> None:
    """A folder of tasks needs no network, and then none is tried; the harness's own tasks need the
    hub, unless HF_HUB_OFFLINE says that its cache has them. Before anything imports the hub."""
    if tasks_dir:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    elif "HF_HUB_OFFLINE" not in os.environ:
        problem = doctor.hub_problem()
        if problem:
            raise T.InputError(
                f"the tasks come from the Hugging Face hub, and {problem}: give --tasks-dir, or "
                "set HF_HUB_OFFLINE=1 if they are in its cache"
            )


def new_folder(name: str) -> Path:
    out = Path(name or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise T.InputError(f"--out {out} is there already: name a folder that is empty or new")
    return out


# ---- Running ------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_folder(asked: Asked, dtype: str, tokenizer: str) -> Iterator[Path]:
    """The model as a Hugging Face folder; one that is exported goes again."""
    if asked.kind == "folder":
        yield asked.path
        return
    from evals import export

    with tempfile.TemporaryDirectory(prefix="eval-") as scratch:
        folder = Path(scratch) / "model"
        export.export(asked.path, folder, dtype, tokenizer)
        yield folder


def run_facts(asked: Asked) -> dict | None:
    """What a checkpoint's own files say of it; None for a Hugging Face folder."""
    if asked.kind != "run":
        return None
    from evals import export

    meta, run = sample.meta_of(asked.path), export.run_of(asked.path)
    names = ("arm", "step", "steps", "tokens", "window")
    return {
        **{name: meta[name] for name in names},
        **{name: meta["config"][name] for name in ("preset", "seed", "data_seed")},
        "state_sha256": meta["sha256"],
        "figures": export.figures(run, meta) if run else None,
    }


def evaluate(asked: Asked, tasks, args: argparse.Namespace, device: torch.device) -> dict:
    """Everything about one model; see scores.evaluate for `results`."""
    from evals import scores

    dtype = args.dtype if args.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    twice = {name: task for name, task in tasks.loaded.items() if name.startswith(BOTH_WAYS)}
    settings = [(tasks, True)]
    if twice:
        settings.append((scores.Tasks(tasks.manager, twice), False))
    with as_folder(asked, dtype, args.tokenizer) as folder:
        lm = scores.load_model(
            folder,
            device=str(device),
            dtype=dtype,
            batch_size=args.batch_size,
            max_length=args.max_length,
            trust=args.trust_remote_code,
        )
        facts = {"path": str(asked.path), **scores.facts(lm, folder), "run": run_facts(asked)}
        results = []
        for shots in args.shots:
            for some, bos in settings:
                print(f"{asked.name}: {', '.join(some.loaded)}, {shots}-shot", file=sys.stderr)
                results += scores.evaluate(lm, some, shots, bos, args.limit)
        del lm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"schema": SCHEMA, "name": asked.name, "model": facts, "results": results}


def check(models: list[Asked], args: argparse.Namespace, tasks: list[str]) -> None:
    """What would stop a later model, or make its figures worthless, said before hours go into the
    first. tasks: the Harness's names."""
    from evals import export, hf_tokenizer, scores

    for asked in models:
        if asked.kind in ("folder", "run"):
            task.refuse_trained_on(asked.path, tasks)
        if asked.kind == "folder":
            scores.checked(asked.path, args.trust_remote_code)
        elif asked.kind == "run":
            meta = sample.meta_of(asked.path)
            export.refuse_own_arm(meta)
            hf_tokenizer.load(meta, args.tokenizer)


def write(out: Path, name: str, text: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    except OSError as e:
        raise T.InputError(f"cannot write {out / name}: {e.strerror or e}") from None


def file_name(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", name) + ".scores.json"


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes each model as soon as it is done, then the table, and prints it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise T.InputError("one process evaluates: start it without torchrun")
    models, found = look_at_all(args.models), []
    if any(asked.kind != "scores" for asked in models):
        go_offline_or_refuse(args.tasks_dir)
        tasks, device = tasks_of(args), T.World.start(args.device).device
        check(models, args, tasks.names())
    out = new_folder(args.out)
    for asked in models:
        if asked.scores is None:
            found.append(evaluate(asked, tasks, args, device))
            write(out, file_name(asked.name), json.dumps(found[-1], separators=(",", ":")) + "\n")
        else:
            found.append({**asked.scores, "name": asked.name})
    rows = score_table.rows_of(found)
    text = score_table.render(found, rows)
    write(out, "table.md", text)
    write(out, "table.json", json.dumps(score_table.figures(found, rows), indent=1) + "\n")
    print(f"{text}\n{out}: table.md, table.json and each model's items")


def tasks_of(args: argparse.Namespace):
    try:
        from evals import scores
    except ImportError as e:
        raise T.InputError(f"this needs lm-eval[hf] ({e}): ./run.sh eval installs it") from None
    return scores.find_tasks(args.tasks_dir, args.tasks)


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    model = "run, checkpoint or Hugging Face folder, or NAME.scores.json of an earlier one"
    add("models", nargs="+", metavar="MODEL", help=model)
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"({' '.join(TASKS)})")
    add("--shots", nargs="+", type=int, default=[0, 5], metavar="N", help="examples shown (0 5)")
    add("--tasks-dir", default="", metavar="DIR", help="task files with their data: no network")
    add("--limit", type=int, default=0, metavar="N", help="the first N items of a task (0: all)")
    add("--batch-size", default="16", metavar="N", help="(16; auto: so many tokens)")
    shown = "tokens of prompt and answer shown to a model (0: 1,024, or 4,096 bytes)"
    add("--max-length", type=int, default=0, metavar="N", help=shown)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="(bf16 on a GPU)")
    tokenizer = "of a run: tiktoken file, tokenizer.json, or a folder with one; bytes need none"
    add("--tokenizer", default="", metavar="PATH", help=tokenizer)
    add("--trust-remote-code", action="store_true", help="run a folder's code that is not ours")
    add("--out", default="", metavar="DIR", help="a new folder (runs/eval-DATE-TIME)")
    args = parser.parse_args(argv)
    if min(args.shots) < 0 or args.limit < 0 or args.max_length < 0:
        parser.error("--shots, --limit and --max-length are 0 or more")
    if args.batch_size != "auto" and not re.fullmatch("[1-9][0-9]*", args.batch_size):
        parser.error(f"--batch-size {args.batch_size}: a number from 1 on, or auto")
    args.shots = list(dict.fromkeys(args.shots))
    return args


def smaller(args: argparse.Namespace) -> str:
    """The one flag to change when memory is out."""
    if args.batch_size in ("auto", "1"):  # auto has tried single rows
        return "a smaller --max-length"
    return f"--batch-size {int(args.batch_size) // 2}"


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 for bad input, 5 for want of memory, with one sentence."""
    args = parse(argv)
    try:
        run(args)
    except (T.InputError, shards.InputError) as e:
        print(f"eval: {e}", file=sys.stderr)
        return T.EXIT_CODES["input"]
    except torch.OutOfMemoryError as e:
        print(f"eval: {memory.out(e)}: run again with {smaller(args)}", file=sys.stderr)
        return T.EXIT_CODES["memory"]
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
