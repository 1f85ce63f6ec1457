"""Resume, determinism and the cost of saving, on the machine at hand:
`python tests/gpu_trust.py --data DIR --out FOLDER`, some 6 minutes for preset r28 on an H100.

Two processes compile at the same time, one as runs usually are ("fast") and one with
--deterministic ("det"), and then train in turn; a third ("fresh") resumes a run of the second.

1. det: a run, its twin, and the run resumed at a stage's last step but one, at its end and at the
   next one's; fresh: the first of these in a process of its own. Same losses, weights, optimizer?
2. fast: RUNS whole runs of one seed, and RUNS resumed from the first of them where its first stage
   ends. Are the resumed ones further from the whole ones than these are from one another?
3. tokens/s of both.
4. What training loses by a checkpoint, in seconds on the wall: runs that save against runs that do
   not. (A run's own clock stands still while the state is copied.)

Flags that are not listed are the trainer's. FOLDER/trust.json has all figures, the tables come
last. Six checkpoints stay in FOLDER, some 3 GB each for r28.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers as H
import torch
from torch import Tensor

T = H.T
ROLES = ("fast", "det", "fresh")
PATIENCE_S = 900  # for another process; a hang is an error
SAVE_EVERY = (
    250  # steps: what README says to --save-every; nothing by default, as no record resumes
)


# ---- in the processes that train ----------------------------------------------------------------


def digests(trainer: T.Trainer) -> dict[str, str]:
    """{tensor's name: 16 hex digits of the sha256 of its bytes}: weights and optimizer."""
    tensors = {name: t.detach().cpu() for name, t in trainer.model.state_dict().items()}
    for name, state in trainer.optimizer.state_dict().items():
        tensors |= {f"{name}.{key}": value for key, value in state.items()}

    def digest(t: Tensor) -> str:
        return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy()).hexdigest()[:16]

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def places(steps: list[T.Step]) -> list[int]:
    """Steps after which to resume: a stage's last but one, its last, and that of the next stage;
    with one stage, thirds of the run."""
    ends = [a.index + 1 for a, b in itertools.pairwise(steps) if a.stage != b.stage][:2]
    ends = ends or [len(steps) // 3, 2 * len(steps) // 3]
    return sorted({max(1, ends[0] - 1), *ends})


class Bench:
    """One Trainer that runs again and again; saves where it is told, and times on the wall."""

    def __init__(self, cfg: T.Config):
        self.began = time.perf_counter()
        self.trainer = T.Trainer(cfg, T.Hooks(after_step=self.after_step))
        self.trainer.warm_up()
        self.save_at: tuple[int, ...] = ()
        self.saves: list[dict] = []
        self.marks: list[float] = []

    def mark(self) -> None:
        self.trainer.world.synchronize()
        self.marks.append(time.perf_counter())

    def after_step(self, trainer: T.Trainer, step: T.Step) -> None:
        done, run = step.index + 1, trainer.running
        if done in (run.first + 1, len(run.steps)):
            self.mark()
        if done not in self.save_at:
            return
        with run.paused():
            start = time.perf_counter()
            run.checkpoints.settle()
            waited = time.perf_counter()
            run.save(done)
            copied = time.perf_counter()
        row = {"step": done, "waited_s": waited - start, "copy_s": copied - waited}
        self.saves.append(row)
        run.checkpoints.saving.add_done_callback(
            lambda _: row.update(write_s=time.perf_counter() - copied)
        )

    def run(self, name: str, save_at: tuple[int, ...] = (), resume: Path | None = None) -> dict:
        """A run under this name: from the start, or on from the checkpoint `resume`."""
        trainer, cfg = self.trainer, self.trainer.cfg
        self.save_at, self.saves, self.marks = save_at, [], []
        if resume is None:
            trainer.reset(cfg.run.seed, cfg.data.data_seed, run_id=name)
        else:
            trainer.cfg = cfg.with_(run_id=name, resume=str(resume))
        end = trainer.run()
        steps = H.read_log(end["run"], "step")
        return {
            "name": name,
            "losses": [s["loss"] for s in steps],
            "norms": [s["grad_norm"] for s in steps],
            "ms": [s["ms"] for s in steps],
            "tokens": [step.tokens for step in trainer.steps],
            "dev_loss": end["dev_loss"],
            "wall_s": self.marks[-1] - self.marks[0],
            "saves": self.saves,
        }

    def facts(self, run: str) -> dict:
        """Of the machine and the model, from a run's header."""
        out = Path(self.trainer.cfg.run.out) / run
        (header,) = H.read_log(out, "header")
        keys = ("env", "fp8", "dtype", "world", "compile_s", "source_sha256", "git", "params")
        sizes = [p.stat().st_size for p in out.glob("ckpt/*/state.pt")]
        return {key: header[key] for key in keys} | {"checkpoint_bytes": max(sizes, default=0)}


def branch(out: Path, run: str, step: int, name: str) -> Path:
    """A run folder of its own, OUT/name, with a run's logs and its checkpoint of this step (linked,
    as it is large); returns the checkpoint's path."""
    source, target = out / run, out / name
    place = target / "ckpt" / f"step_{step:08d}"
    place.mkdir(parents=True)
    for log in ("run.log", "run.jsonl"):
        shutil.copy(source / log, target / log)
    for file in (source / "ckpt" / place.name).iterdir():
        os.link(file, place / file.name)
    return place


def work_fast(bench: Bench, out: Path, runs: int) -> dict:
    steps = bench.trainer.steps
    *_, end, later = places(steps)
    whole = [bench.run(f"whole{i}", (end,) if i == 0 else ()) for i in range(runs)]
    saving = bench.run("saving", (2, min(later + 1, len(steps) - 1)))
    resumed = [
        bench.run(f"resumed{i}", resume=branch(out, "whole0", end, f"resumed{i}"))
        for i in range(runs)
    ]
    result = {"whole": whole, "resumed": resumed, "saving": saving, "resumed_at": end}
    return result | bench.facts("whole0")


def work_det(bench: Bench, out: Path, tell) -> dict:
    at = places(bench.trainer.steps)
    result: dict = {"places": at, "runs": []}

    def add(run: dict, first: int) -> None:
        result["runs"].append(run | {"from": first, "digests": digests(bench.trainer)})

    add(bench.run("whole", tuple(at)), 0)
    add(bench.run("twin"), 0)
    tell("timed")
    for step in at:
        add(bench.run(f"from{step}", resume=branch(out, "whole", step, f"from{step}")), step)
    return result | bench.facts("whole")


def work_fresh(bench: Bench, out: Path) -> dict:
    step = places(bench.trainer.steps)[0]
    run = bench.run("fresh", resume=branch(out, "whole", step, "fresh"))
    return {"runs": [run | {"from": step, "digests": digests(bench.trainer)}]}


def work(role: str, folder: Path, runs: int, cfg: T.Config) -> None:
    """What a process of this role does; FOLDER/role.json has its results."""
    out = folder / ("fast" if role == "fast" else "det")
    cfg = cfg.with_(out=str(out), run_id=role, deterministic=role != "fast")
    T.set_environment()
    bench = Bench(cfg)

    def tell(what: str) -> None:
        (folder / f"{role}.{what}").touch()

    tell("ready")
    wait_for(folder / f"{role}.go")
    began = time.perf_counter()
    if role == "fast":
        result = work_fast(bench, out, runs)
    else:
        result = work_det(bench, out, tell) if role == "det" else work_fresh(bench, out)
    result |= {"ready_s": began - bench.began, "work_s": time.perf_counter() - began}
    (folder / f"{role}.json").write_text(json.dumps(result))


# ---- in the process that asks -------------------------------------------------------------------


def wait_for(file: Path, process: subprocess.Popen | None = None) -> None:
    """Until the file is there; RuntimeError where the process ends without it."""
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if process is not None and process.poll() is not None and not file.exists():
            said = file.with_suffix(".txt").read_text()[-3000:]
            raise RuntimeError(f"{file.stem}: exit code {process.returncode}\n{said}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{file} did not come in {PATIENCE_S} s")
        time.sleep(0.05)


def train(folder: Path, roles: tuple[str, ...], own: list[str]) -> dict[str, dict]:
    """The results of each role's process; they compile together and train in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen] = {}

    def start(role: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *own, "--role", role]
        with (folder / f"{role}.txt").open("w") as said:
            processes[role] = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)

    def finish(role: str) -> None:
        wait_for(folder / f"{role}.json", processes[role])
        processes[role].wait(60)

    try:
        first = [role for role in roles if role != "fresh"]
        for role in first:
            start(role)
        for role in first:  # nothing is timed while another compiles
            wait_for(folder / f"{role}.ready", processes[role])
        for role in first:
            (folder / f"{role}.go").touch()
            if role == "det":
                wait_for(folder / "det.timed", processes["det"])
                if "fresh" in roles:
                    (folder / "fresh.go").touch()
                    start("fresh")
            finish(role)
        if "fresh" in roles:
            finish("fresh")
    finally:
        for process in processes.values():
            process.kill()
    return {role: json.loads((folder / f"{role}.json").read_text()) for role in roles}


def bitwise(reference: dict, run: dict) -> list[str]:
    """What differs between two runs, steps by their number and tensors by their name."""
    differ = []
    for key in ("losses", "norms"):
        pairs = itertools.zip_longest(reference[key], run[key])
        differ += [f"{key} of step {i + 1}" for i, (a, b) in enumerate(pairs) if a != b]
    names = sorted(reference["digests"].keys() | run["digests"].keys())
    return differ + [n for n in names if reference["digests"].get(n) != run["digests"].get(n)]


def gap(a: dict, b: dict, first: int) -> dict:
    """How far two runs are apart after step `first`, nats."""
    pairs = zip(a["losses"][first:], b["losses"][first:], strict=True)
    rms = math.sqrt(statistics.fmean((x - y) ** 2 for x, y in pairs))
    pair = [a["name"], b["name"]]
    return {"pair": pair, "rms": rms, "dev_loss": abs(a["dev_loss"] - b["dev_loss"])}


def gaps(whole: list[dict], resumed: list[dict], first: int) -> dict:
    """All pairs by what they share, and whether a resumed run is as near as its like.

    `whole[0]` is the source of the resumed runs and has their first steps in common with them, as
    they have with one another: two comparisons, each of pairs that share as much. A mean is no
    larger where it is at most the largest of what it is compared with.
    """
    of = {
        "whole, whole": [gap(a, b, first) for a, b in itertools.combinations(whole, 2)],
        "whole, resumed": [gap(a, b, first) for a in whole[1:] for b in resumed],
        "resumed, resumed": [gap(a, b, first) for a, b in itertools.combinations(resumed, 2)],
        "source, resumed": [gap(whole[0], b, first) for b in resumed],
    }
    asked = {"whole, resumed": "whole, whole", "source, resumed": "resumed, resumed"}
    no_larger = {
        kind: {
            key: statistics.fmean(g[key] for g in of[kind]) <= max(g[key] for g in of[usual])
            for key in ("rms", "dev_loss")
        }
        for kind, usual in asked.items()
    }
    return {"pairs": of, "no_larger": no_larger}


def rate(runs: list[dict]) -> float:
    """Tokens/s over all steps but a run's first, by the device's own time."""
    ms = sum(sum(run["ms"][1:]) for run in runs)
    return 1000 * sum(sum(run["tokens"][1:]) for run in runs) / ms


def cost_of_saving(fast: dict) -> dict:
    """Seconds on the wall that a save takes from training, the first of a process (which gets
    pinned memory from the system) apart; the interval at which a save is 1 %."""
    usual = [run["wall_s"] for run in fast["whole"][1:]]
    saving, first = fast["saving"], fast["whole"][0]

    def lost(run: dict) -> float:
        waited = sum(save["waited_s"] for save in run["saves"])
        return (run["wall_s"] - statistics.fmean(usual) - waited) / len(run["saves"])

    seconds, later = statistics.fmean(s["write_s"] for s in saving["saves"]), lost(saving)
    step = statistics.fmean(usual) / (len(first["ms"]) - 1)  # the mark is after the first step
    return {
        "usual_wall_s": usual,
        "first_lost_s": lost(first),
        "lost_s": later,
        "saves": first["saves"] + saving["saves"],
        "write_s": seconds,  # until it is on the disk; a save that comes sooner waits
        "share": later / (SAVE_EVERY * step + later),
        "one_percent_s": max(100 * later, seconds),
        "one_percent_steps": math.ceil(max(100 * later, seconds, 0.0) / step),
    }


def summary(results: dict[str, dict]) -> dict:
    """Everything that is asked, from what the processes found."""
    report: dict = {}
    det, fast = results.get("det"), results.get("fast")
    if det:
        reference, others = det["runs"][0], det["runs"][1:]
        others = [*others, *results.get("fresh", {"runs": []})["runs"]]
        report["bitwise"] = {run["name"]: bitwise(reference, run) for run in others}
        report["tensors"] = len(reference["digests"])
        report["det_tokens_per_s"] = rate(det["runs"][1:2])
    if fast:
        report["gaps"] = gaps(fast["whole"], fast["resumed"], fast["resumed_at"])
        report["fast_tokens_per_s"] = rate(fast["whole"][1:])
        report["saving"] = cost_of_saving(fast)
    if det and fast:
        report["det_cost"] = 1 - report["det_tokens_per_s"] / report["fast_tokens_per_s"]
    return report


def table(report: dict, results: dict[str, dict]) -> str:
    some = results.get("fast") or results["det"]
    env = some["env"]
    where = f"{some['world']} x {env['gpu'] or 'CPU'}, torch {env['torch']}"
    head = "FP8" if some["fp8"] else some["dtype"]
    params = some["params"]["stored"]
    lines = [f"{where}, {params:,} parameters, head in {head}", "", "| question | answer |"]
    lines += ["| --- | --- |"]
    for name, differ in report.get("bitwise", {}).items():
        said = f"losses, norms and {report['tensors']} tensors equal"
        said = f"{len(differ)} differ: {', '.join(differ[:4])}" if differ else said
        lines.append(f"| --deterministic: `{name}` against `whole` | {said} |")
    for key in ("fast", "det"):
        if f"{key}_tokens_per_s" in report:
            lines.append(f"| tokens/s, {key} | {report[f'{key}_tokens_per_s']:,.0f} |")
    if "det_cost" in report:
        lines.append(f"| --deterministic costs | {report['det_cost']:.1%} |")
    if "saving" in report:
        s, size = report["saving"], some["checkpoint_bytes"] / 1e9
        lines += [
            f"| a save of {size:.2f} GB loses (the first of a process) "
            f"| {s['lost_s']:.2f} s ({s['first_lost_s']:.2f} s) |",
            f"| runs without a save, on the wall "
            f"| {min(s['usual_wall_s']):.2f} to {max(s['usual_wall_s']):.2f} s |",
            f"| share of a run with --save-every {SAVE_EVERY} | {s['share']:.2%} |",
            f"| it is on the disk after | {s['write_s']:.1f} s |",
            f"| interval at which that is 1 % "
            f"| {s['one_percent_s']:.0f} s, {s['one_percent_steps']} steps |",
        ]
    if "gaps" in report:
        lines += gap_table(report["gaps"], results["fast"]["resumed_at"])
    return "\n".join(lines)


def gap_table(found: dict, first: int) -> list[str]:
    lines = ["", f"| fast runs, after step {first} | pairs | rms of losses: mean, most "]
    lines[-1] += "| dev_loss apart: mean, most | no larger |"
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    for kind, pairs in found["pairs"].items():
        cells = [kind, str(len(pairs))]
        for key in ("rms", "dev_loss"):
            values = [g[key] for g in pairs]
            cells.append(f"{statistics.fmean(values):.1e}, {max(values):.1e}")
        said = found["no_larger"].get(kind, {})
        cells.append(", ".join("yes" if ok else "NO" for ok in said.values()) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def config(rest: list[str], steps: int) -> T.Config:
    """The trainer's flags as they are, for so many steps, one call of dev at the end, and no other
    evaluation or checkpoint than what is asked for here."""
    cfg = T.parse_args(rest if "--preset" in rest else ["--preset", "r28", *rest])
    stages = cfg.schedule.stages
    mean = sum(s.share * s.tokens for s in stages) / sum(s.share for s in stages)
    changes = {"tokens": round(steps * mean), "dev_tokens": cfg.data.val_call_tokens}
    changes |= {"looks": 0, "final_val": False, "save_every": 0, "save_final": False, "keep": 20}
    return cfg.with_(**changes)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--out", type=Path, default=Path("runs/trust"), help="a folder, not yet there")
    p.add_argument("--steps", type=int, default=18, help="of a run")
    p.add_argument("--runs", type=int, default=3, help="whole and resumed fast runs, each")
    p.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help="fresh needs det")
    p.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    args, rest = p.parse_known_args(argv)
    try:
        cfg = config(rest, args.steps)
    except T.InputError as e:
        p.error(str(e))
    if args.role:
        work(args.role, args.out, args.runs, cfg)
        return 0
    if args.steps < 6 or args.runs < 2:
        p.error("--steps 6 and --runs 2 at least")
    if args.out.exists():
        p.error(f"--out {args.out} is there already")
    results = train(args.out, tuple(r for r in ROLES if r in args.roles), argv)
    report = summary(results)
    file = args.out / "trust.json"
    file.write_text(json.dumps({"report": report, **results}, indent=1))
    print(table(report, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
