"""Looks at the machine: what is there, what is missing, and what `./run.sh` would run and why.

`./run.sh doctor [--json] [--data DIR]` prints it. run.sh asks the rest of it too, so that there is
one source of truth: which packages are missing, where torch for CPUs is, what to run. The standard
library is enough; with torch installed, FP8 and FlexAttention are tried, not looked up.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # this folder has names like `hub` that no import should find
    sys.path[0] = str(ROOT)

TOKENS = ROOT / "data" / "tokens"
MAIN_TOKENS = TOKENS / "fineweb-edu"
FETCH_SHARDS = 9
FETCH_BYTES = (FETCH_SHARDS + 1) * 200_000_000
RUN_BYTES = 40_000_000_000  # of a speedrun 17 GB stay, mostly its n-gram table
TORCH = ((2, 11), (2, 13))  # first and last version that the GPU code runs on
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SHARD_MAGIC, HEADER_BYTES = 20240520, 256 * 4
OLDEST = 8.0  # compute capability: BF16 tensor cores
# (MiB of the card, preset, tokens a kernel call): at 65,536 the speedrun takes 56e9 bytes, r28's
# softmax arm 36e9 and the differential ones 40e9, so that a 40 GB card needs the smaller calls.
GPU24_MICRO = 16_384  # what preset gpu24 has
FITS = (
    *((64_000, "speedrun", 65_536), (44_000, "r28", 65_536)),
    *((20_000, "gpu24", GPU24_MICRO), (0, "gpu24", 8_192)),
)
OK, WARN, MISSING = "OK", "warn", "missing"


# ---- packages -----------------------------------------------------------------------------------


def requirement_groups(text: str) -> dict[str, list[str]]:
    """Group -> its lines of requirements.txt; a line `# [NAME] ...` starts a group."""
    groups: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if mark := re.match(r"# \[(\w+)\]", line):
            name = mark[1]
            groups[name] = []
        elif name and (wanted := line.partition("#")[0].strip()):
            groups[name].append(wanted)
    return groups


def fitting(version: str) -> bool:
    """Whether a torch version is one that the GPU code runs on."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and TORCH[0] <= (int(numbers[1]), int(numbers[2])) <= TORCH[1]


def satisfied(requirement: str, *, exact: bool, cuda: bool) -> bool:
    """Whether this Python has `NAME[extra]==VERSION`; not `exact`: any version, of torch a fitting
    one. `cuda`: a CPU build of torch does not count."""
    name, _, pin = requirement.partition("==")
    try:
        version = importlib.metadata.version(name.partition("[")[0].strip())
    except importlib.metadata.PackageNotFoundError:
        return False
    public, _, build = version.partition("+")
    if name == "torch" and cuda and build.startswith("cpu"):
        return False
    if exact and pin:
        return public == pin
    return name != "torch" or fitting(version)


def missing(wanted: list[str], *, must: bool = False) -> list[str]:
    """Lines of requirements.txt that this Python lacks, of the named groups.

    `+GROUP` is nice to have, and left out under `must`; the word `cuda` asks for a CUDA build of
    torch. The project's own .venv must have exactly what is pinned.
    """
    groups = requirement_groups((ROOT / "requirements.txt").read_text())
    how = {"exact": Path(sys.prefix) == ROOT / ".venv", "cuda": "cuda" in wanted}
    names = [w.lstrip("+") for w in wanted if w != "cuda" and not (must and w.startswith("+"))]
    lines = [line for name in names for line in groups[name]]
    return [line for line in dict.fromkeys(lines) if not satisfied(line, **how)]


def cpu_wheels() -> str:
    """pip's flag for torch's CPU wheels, or "". PyPI's own wheel for Linux is one for CUDA, which
    brings 3 GB; without their index, what PyPI has will do."""
    if platform.system() != "Linux" or find_gpus().cards or not reach(f"{CPU_WHEELS}/torch/"):
        return ""
    return f"--extra-index-url {CPU_WHEELS}"


def reach(url: str, timeout_s: float = 3.0) -> bool:
    """Whether a server answers at all, be it with an error, within `timeout_s`."""
    answered = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=timeout_s
            ):
                answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except (OSError, ValueError):
            pass

    # A thread, because the timeout of a socket does not bound the look-up of its name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answered)


# ---- what the machine has -----------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    name: str
    mib: int  # memory
    capability: float
    driver: str


@dataclass(frozen=True)
class Gpus:
    cards: tuple[Card, ...]  # those that a process here may use
    problem: str  # why there are none


def find_gpus() -> Gpus:
    """NVIDIA GPUs as nvidia-smi and CUDA_VISIBLE_DEVICES have them; torch is not needed."""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as e:
        why = "is not there" if isinstance(e, FileNotFoundError) else f"does not run: {e}"
        return Gpus((), f"nvidia-smi {why}")
    cards = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdecimal():
            capability = float(fields[2]) if re.fullmatch(r"\d+\.\d+", fields[2]) else 0.0
            cards.append(Card(fields[0], int(fields[1]), capability, fields[3]))
    if done.returncode or not cards:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        return Gpus((), f"nvidia-smi finds none: {said or 'it prints nothing'}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return Gpus(tuple(cards), "")
    picked = []
    for v in visible.split(","):  # numbers, or names such as GPU-8932f937-...
        if v.strip().isdecimal() and int(v) < len(cards):
            picked.append(cards[int(v)])
        elif v.strip().startswith(("GPU-", "MIG-")):
            picked.append(cards[0])
        else:
            break  # CUDA, too, stops at the first one that does not exist
    return Gpus(tuple(picked), "" if picked else f"CUDA_VISIBLE_DEVICES is {visible!r}")


@dataclass(frozen=True)
class Tokens:
    """A folder of token shards; `problem` says what is wrong with it, or ""."""

    folder: Path
    train: int  # shards
    val: int
    tokens: int  # of the train shards
    manifest: bool
    partial: bool  # a download stopped half-way
    problem: str


def header_tokens(path: Path) -> int:
    """The header's token count; ValueError if this is no whole shard."""
    with path.open("rb") as f:
        head = f.read(HEADER_BYTES)
    magic, version, count = (int.from_bytes(head[i : i + 4], "little") for i in (0, 4, 8))
    if magic != SHARD_MAGIC or version != 1:
        raise ValueError(f"{path.name} is no token shard")
    if path.stat().st_size != HEADER_BYTES + 2 * count:
        raise ValueError(f"{path.name} is cut or padded")
    return count


def find_tokens(folder: Path) -> Tokens:
    """What train_gpt.py would find in a folder: by its manifest, else by the names of files."""
    manifest = folder / "manifest.json"
    paths: dict[str, list[Path]] = {"train": [], "val": []}
    problem, count = "", 0
    try:
        if manifest.is_file():
            for row in json.loads(manifest.read_text())["files"]:
                paths.setdefault(row["split"], []).append(folder / Path(row["name"]).name)
        else:
            paths = {split: sorted(folder.glob(f"*{split}*.bin")) for split in paths}
        count = sum(header_tokens(path) for path in paths["train"])
        for path in paths["val"]:
            header_tokens(path)
    except FileNotFoundError as e:
        problem = f"{Path(e.filename).name} is not there"
    except (OSError, KeyError, TypeError, ValueError) as e:
        problem = "manifest.json is damaged" if isinstance(e, (KeyError, TypeError)) else str(e)
    if not paths["train"] and not problem:
        problem = "no train shards (*train*.bin)"
    return Tokens(
        folder,
        len(paths["train"]),
        len(paths["val"]),
        count,
        manifest.is_file(),
        any(folder.glob("*.part")),
        problem,
    )


def hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_problem() -> str:
    """Why nothing can be downloaded, or ""."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    return "" if reach(hub_endpoint()) else f"{hub_endpoint()} cannot be reached"


# ---- what to run --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    main: str  # speedrun | demo: what a bare ./run.sh runs
    gpus: int  # that are there
    tokens: str  # have | fetch | none
    preset: str  # that fits the memory
    micro: int  # tokens a kernel call
    why: str
    fix: str  # what to do to get the speedrun, or ""


def fit(mib: int) -> tuple[str, int]:
    """(preset, tokens a kernel call) for a card's memory."""
    return next((preset, micro) for least, preset, micro in FITS if mib >= least)


def shown(path: Path) -> str:
    """A path as the user would type it."""
    path = Path(path)
    here = path.absolute()
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(path)


def decide(data: str = "") -> Decision:
    """What `./run.sh` runs here, with the tokens in `data` or, if empty, the main ones."""
    gpus = find_gpus()
    if not gpus.cards:
        why = f"no NVIDIA GPU ({gpus.problem})"
        return Decision("demo", 0, "none", "demo", 0, why, "run ./run.sh demo, which needs none")
    oldest = min(gpus.cards, key=lambda c: c.capability)
    smallest = min(gpus.cards, key=lambda c: c.mib)
    count = len(gpus.cards)
    if oldest.capability < OLDEST:
        why = f"{oldest.name} has compute capability {oldest.capability}, BF16 needs {OLDEST}"
        fix = "run ./run.sh demo, which needs no GPU"
        return Decision("demo", count, "none", "demo", 0, why, fix)
    state, why, fix = token_state(Path(data) if data else MAIN_TOKENS, bool(data))
    preset, micro = fit(smallest.mib)
    main = "demo" if state == "none" else "speedrun"
    return Decision(main, count, state, preset, micro, f"{count}x {smallest.name}, {why}", fix)


def token_state(folder: Path, given: bool) -> tuple[str, str, str]:
    """(have | fetch | none, why, what to do) for a folder that the user gave, or the main one."""
    found = find_tokens(folder)
    usable = not found.problem and (given or found.val > 0)
    text = f"{found.train} train shards in {shown(folder)}"
    if usable and (given or not found.partial):
        return "have", text, ""
    make = "./run.sh data text PATH... --out DIR --tokenizer FILE makes one of your text"
    if given:
        return "none", f"no tokens in {shown(folder)} ({found.problem})", f"give --data DIR; {make}"
    problem = hub_problem()
    if not problem:
        return "fetch", f"tokens to download from {hub_endpoint()}", ""
    if usable:  # a half download, and no way to go on with it
        return "have", text, ""
    return "none", f"no tokens in {shown(folder)} and {problem}", f"give --data DIR; {make}"


class InputError(ValueError):
    """What the user asked for cannot run here; the message says what to do."""


def speedrun_parser() -> argparse.ArgumentParser:
    """The options of the speedrun that decide what to run; the rest is train_gpt.py's affair."""
    p = argparse.ArgumentParser("./run.sh speedrun", add_help=False, allow_abbrev=False)
    p.add_argument("-h", "--help", action="store_true")
    for name in ("--preset", "--data", "--out", "--run-id", "--resume"):
        p.add_argument(name)
    p.add_argument("--gpus", default=os.environ.get("NPROC", ""))
    return p


def count_gpus(asked: str, here: int) -> int:
    """GPUs to use: what is asked for, else the most that divide the 8 rows of a step."""
    if not asked:
        return next(n for n in (8, 4, 2, 1) if n <= here)
    if not asked.isdecimal() or not 1 <= int(asked) <= here:
        raise InputError(f"--gpus (or NPROC) is {asked}: give a number from 1 to {here}")
    return int(asked)


def run_folder(args: argparse.Namespace) -> Path:
    """Where the run's exit.json will be."""
    if not args.resume:
        return Path(args.out or "runs", args.run_id or "")
    given = Path(args.resume)  # a run, or one of its checkpoints
    return given.parents[1] if given.parent.name == "ckpt" else given


def saved_preset(run: Path) -> str:
    """The preset of a run that is to go on, as its log says it; "" where there is none."""
    try:
        with (run / "run.jsonl").open(encoding="utf-8") as log:
            return str(json.loads(log.readline())["preset"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def plan(how: str, words: list[str]) -> list[str]:
    """What run.sh is to run for `speedrun WORDS`, or for a bare `./run.sh WORDS`: speedrun, demo
    or help; GPUs; `have`, or how many shards to download; script; run folder; its words."""
    args, rest = speedrun_parser().parse_known_args(words)
    if args.resume and not args.preset:
        args.preset = saved_preset(run_folder(args))
    script = "variants/gpt2.py" if args.preset == "gpt2" else "train_gpt.py"
    if not (ROOT / script).exists():
        raise InputError(f"--preset {args.preset} needs {script}, which is not here")
    if args.help:
        return ["help", "0", "have", script, ""]
    d = decide(args.data)
    if d.main == "demo" and how == "bare":
        left_out = f" (without {' '.join(words)})" if words else ""
        print(f"run.sh: {d.why}: this is the demo{left_out}", file=sys.stderr)
        return ["demo", "0", "have", "", ""]
    if d.main == "demo":
        raise InputError(f"the speedrun cannot run, {d.why}: {d.fix}")
    n = count_gpus(args.gpus, d.gpus)
    line = ["--preset", args.preset] if args.preset else fit_flags(d, n)
    line += ["--data", args.data or shown(MAIN_TOKENS)]
    if n > 1 and not args.run_id and not args.resume:  # to find its exit.json
        args.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}_{line[1]}_{n}gpus"
    for name, value in (("--out", args.out), ("--run-id", args.run_id), ("--resume", args.resume)):
        line += [name, value] if value else []
    tokens = str(FETCH_SHARDS) if d.tokens == "fetch" else "have"
    return ["speedrun", str(n), tokens, script, str(run_folder(args)), *line, *rest]


def preset_for(d: Decision, n: int) -> str:
    """The preset that fits the card; the speedrun's steps are for one GPU, r28's for eight."""
    return "r28" if n > 1 and d.preset == "speedrun" else d.preset


def fit_flags(d: Decision, n: int) -> list[str]:
    """The flags of that preset on n GPUs."""
    smaller = ["--micro-batch-tokens", str(d.micro)] if d.micro < GPU24_MICRO else []
    return ["--preset", preset_for(d, n), *smaller]


# ---- the doctor's list --------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # OK | warn | missing
    text: str


def import_torch():
    """(torch or None, why not)."""
    try:
        return importlib.import_module("torch"), ""
    except ImportError as e:
        return None, "not installed" if e.name == "torch" else f"does not import: {e}"
    except OSError as e:  # a CUDA library that does not load
        return None, f"does not import: {e}"


def check_python(torch, problem: str) -> Iterator[Check]:
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    yield Check("python", OK if ok else MISSING, f"{version}, {sys.executable}")
    first, last = (".".join(map(str, v)) for v in TORCH)
    if torch is None:
        text = f"{problem}; ./run.sh installs it into .venv for the commands that need it"
        yield Check("torch", MISSING, text)
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    if fitting(torch.__version__):
        yield Check("torch", OK, f"{torch.__version__}, {built}")
    else:
        text = f"{torch.__version__}, {built}: {first} to {last} fit, so ./run.sh makes a .venv"
        yield Check("torch", WARN, text)


def check_gpus(gpus: Gpus) -> Iterator[Check]:
    if not gpus.cards:
        yield Check("GPU", MISSING, f"none, {gpus.problem}; ./run.sh demo needs none")
        return
    for i, card in enumerate(gpus.cards):
        text = f"{card.name}, {card.mib:,} MiB, capability {card.capability}, driver {card.driver}"
        if card.capability < OLDEST:
            yield Check(f"GPU {i}", WARN, f"{text}: BF16 needs capability {OLDEST}")
        else:
            yield Check(f"GPU {i}", OK, text)


def try_bf16(torch) -> str:
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    if not bool(((a @ a) == 64).all()):
        raise RuntimeError("a product of ones is wrong")
    return "a product ran"


def try_fp8(torch) -> str:
    """The forward product as the head has it: e4m3 x e4m3, the second column-major."""
    one = torch.ones((), device="cuda")
    a = torch.ones(16, 32, device="cuda").to(torch.float8_e4m3fn)
    b = torch.ones(16, 32, device="cuda").to(torch.float8_e4m3fn).t()
    y = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if not bool((y == 32).all()):
        raise RuntimeError("a product of ones is wrong")
    return "a product ran"


def try_flex(torch) -> str:
    """Compiled FlexAttention, forward and backward, against torch's own attention."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    triton = importlib.import_module("triton").__version__
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    qkv = [torch.randn(1, 2, 256, 64, **shape) for _ in range(3)]
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cuda")
    attend = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)
    reference = torch.nn.functional.scaled_dot_product_attention
    results = []
    for y in (attend(*qkv, block_mask=mask), reference(*qkv, is_causal=True)):
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), qkv)])
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results))
    if not worst < 2e-2:
        raise RuntimeError(f"it differs from torch's attention by {worst:.1e}")
    return f"Triton {triton}: compiled, forward and backward within {worst:.0e} of torch's own"


TRIALS = (
    ("BF16", MISSING, try_bf16, "the speedrun needs it"),
    ("FP8", WARN, try_fp8, "the head falls back to BF16, slower"),
    ("FlexAttention", MISSING, try_flex, "the speedrun needs it: pip install triton, a C compiler"),
)


def check_trials(torch, gpus: Gpus) -> Iterator[Check]:
    for name, state, trial, advice in TRIALS:
        if not gpus.cards or torch is None:
            lack = "an NVIDIA GPU" if not gpus.cards else "torch"
            yield Check(name, MISSING, f"not tried: it needs {lack}")
        elif not torch.cuda.is_available():
            text = "not tried: torch sees no GPU (a build for CPUs, or an old driver)"
            yield Check(name, MISSING, text)
        else:
            try:
                yield Check(name, OK, trial(torch))
            except Exception as e:  # whatever a driver or a compiler throws is the answer
                said = f"{type(e).__name__}: {e}".strip().splitlines()[0][:200]
                yield Check(name, state, f"{said}: {advice}")


def check_compiler() -> Check:
    found = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if found:
        return Check("C++ compiler", OK, shutil.which(found))
    return Check("C++ compiler", WARN, "none: torch.compile on a CPU needs one (apt install g++)")


def check_disk() -> Iterator[Check]:
    for name, need in (("data", FETCH_BYTES), ("runs", RUN_BYTES)):
        folder = ROOT / name if (ROOT / name).exists() else ROOT
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:,.1f} GB free at {shown(ROOT / name)}"
        few = f": {need / 1e9:.0f} GB are wanted for " + (
            f"{FETCH_SHARDS} shards" if name == "data" else "a few runs with checkpoints"
        )
        yield Check(f"disk {name}/", OK if free > need else WARN, text + few * (free <= need))


def check_tokens(data: str) -> Iterator[Check]:
    folders = [p for p in sorted(TOKENS.glob("*")) if p.is_dir()]
    if data:
        folders.append(Path(data))
    for folder in folders:
        found = find_tokens(folder)
        name = f"tokens {shown(folder)}"
        if found.problem:
            yield Check(name, WARN, f"{found.problem}: ./run.sh data --help")
            continue
        half = ", a half download: ./run.sh data goes on with it" if found.partial else ""
        kind = "manifest" if found.manifest else "no manifest"
        text = f"{found.tokens:,} tokens in {found.train} train shards, {found.val} val, {kind}"
        yield Check(name, WARN if half else OK, text + half)
    if not folders:
        text = "none in data/tokens: ./run.sh data --help says how to get or make them"
        yield Check("tokens", MISSING, text)


def check_hub() -> Check:
    problem = hub_problem()
    if problem:
        return Check("hub", WARN, f"{problem}: no downloads; HF_ENDPOINT names a mirror")
    return Check("hub", OK, f"{hub_endpoint()} answers")


def explain(decision: Decision) -> str:
    """The last line: what a bare ./run.sh runs, and why."""
    if decision.main == "demo":
        return f"demo, because: {decision.why}. For the speedrun: " + (
            "an NVIDIA GPU of compute capability 8.0 or more is needed"
            if decision.preset == "demo"
            else decision.fix
        )
    untested = ", not tried on so small a card" if decision.micro < GPU24_MICRO else ""
    preset = preset_for(decision, decision.gpus)
    flags = f"--preset {preset} --micro-batch-tokens {decision.micro}{untested}"
    return f"speedrun, because: {decision.why}. What fits the memory: {flags}"


def examine(data: str) -> tuple[list[Check], Decision]:
    torch, problem = import_torch()
    gpus = find_gpus()
    if gpus.cards and torch is not None:
        print("trying FP8 and FlexAttention (compiling takes up to a minute) ...", file=sys.stderr)
    checks = [
        *check_python(torch, problem),
        *check_gpus(gpus),
        *check_trials(torch, gpus),
        check_compiler(),
        *check_disk(),
        *check_tokens(data),
        check_hub(),
    ]
    return checks, decide(data)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="./run.sh doctor", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    p.add_argument("--json", action="store_true", help="the same as JSON")
    p.add_argument("--data", metavar="DIR", default="", help="a folder of tokens to look at")
    asks = p.add_argument_group("what run.sh asks")
    asks.add_argument("--missing", nargs="*", metavar="GROUP", help="requirements not met")
    asks.add_argument("--must", action="store_true", help="leave out +GROUPs")
    asks.add_argument("--cpu-wheels", action="store_true", help="pip's flag for CPU builds")
    asks.add_argument(
        "--plan", action="store_true", help="`--plan asked|bare WORD...`: what to run"
    )
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--plan"]:  # the words are the speedrun's
        try:
            print(shlex.join(plan(argv[1], argv[2:])))
        except InputError as e:
            print(f"run.sh: {e}", file=sys.stderr)
            return 2
        return 0
    args = p.parse_args(argv)
    if args.missing is not None:
        print("\n".join(missing(args.missing, must=args.must)))
    elif args.cpu_wheels:
        print(cpu_wheels())
    elif args.json:
        checks, decision = examine(args.data)
        print(json.dumps({"checks": [asdict(c) for c in checks], "decision": asdict(decision)}))
    else:
        checks, decision = examine(args.data)
        width = max(len(c.name) for c in checks)
        for c in checks:
            print(f"{c.state:<7}  {c.name:<{width}}  {c.text}")
        print(f"./run.sh would run: {explain(decision)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
