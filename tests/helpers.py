"""What several tests share: shards of real text, random parameters, log checks, processes."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ARMS = Path(__file__).resolve().parent / "arms"
for _folder in (ROOT, ROOT / "tests"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import train_gpt as T  # noqa: E402

EOT = 256  # of the tokenizer that is bytes
BYTE_VOCAB = 257

# Every form of differential attention, and the baseline.
FORMS = ("diff_v2,form=full", "diff_v2,form=light")  # of one code path with matched and light+
BUILT_IN = (
    "softmax",
    "diff_v1",
    "diff_v2",
    "diff_v2,form=full",
    "diff_v2,form=light",
    "diff_v2,form=light+",
)


# ---- shards -------------------------------------------------------------------------------------


def write_shard(path: Path, tokens, *, magic=T.SHARD_MAGIC, version=1, count=None) -> Path:
    """A token shard as data/ writes it; the keywords make broken ones."""
    tokens = np.asarray(tokens, np.uint16)
    head = np.zeros(256, np.int32)
    head[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.tobytes() + tokens.tobytes())
    return path


def write_corpus(
    folder: Path, splits: dict[str, list], vocab: int = BYTE_VOCAB, eot: int = EOT
) -> Path:
    """A folder with manifest.json, token_bytes.bin and one shard for each array of a split."""
    rows = []
    for split, shards in splits.items():
        for i, tokens in enumerate(shards):
            tokens = np.asarray(tokens, np.uint16)
            path = write_shard(folder / f"tokens_{split}_{i:06d}.bin", tokens)
            docs = int((tokens == eot).sum())
            rows.append(
                {"name": path.name, "split": split, "tokens": len(tokens), "documents": docs}
                | {"text_bytes": len(tokens) - docs, "sha256": T.sha256(path)}
            )
    manifest = {"version": 1, "tokenizer": "bytes", "vocab": vocab, "eot": eot, "files": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sizes = np.ones(vocab, np.uint16)
    sizes[eot:] = 0
    (folder / "token_bytes.bin").write_bytes(sizes.tobytes())
    return folder


def docstrings(most: int) -> list[bytes]:
    """Docstrings of the standard library, at most `most` bytes, in a fixed order."""
    found, size, seen = [], 0, set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if not text or len(text) < 100 or text in seen:
                continue
            seen.add(text)
            found.append(text.encode())
            size += len(found[-1])
            if size > most:
                return found
    return found


def tokens_of(texts: list[bytes]) -> np.ndarray:
    """Bytes with the end-of-text token before each document."""
    return np.concatenate([np.array([EOT, *text], np.uint16) for text in texts])


def write_text_corpus(folder: Path) -> Path:
    """Real English: standard-library docstrings, every 8th document to val, every 8th to dev."""
    texts = docstrings(500_000)
    val, dev = texts[3::8], texts[7::8]
    train = [t for i, t in enumerate(texts) if i % 8 not in (3, 7)]
    half = len(train) // 2
    return write_corpus(
        folder,
        {
            "train": [tokens_of(train[:half]), tokens_of(train[half:])],
            "dev": [tokens_of(dev)],
            "val": [tokens_of(val)],
        },
    )


def bigram_nats(tokens: np.ndarray, vocab: int = BYTE_VOCAB) -> float:
    """Nats a token that the best table of next-token chances, fitted to these very tokens, needs:
    no function of the present token alone can do better on them."""
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (tokens[:-1].astype(int), tokens[1:].astype(int)), 1)
    rows = pairs.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(pairs > 0, pairs * np.log(pairs / rows), 0.0)
    return float(-terms.sum() / pairs.sum())


# ---- models and runs ----------------------------------------------------------------------------


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Every parameter anew: heads, gates and output projections are zero at init, and a zero hides
    whatever stands before it. Matrices are scaled to keep their input's size."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            value = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(value * (p.size(-1) ** -0.5 if p.ndim == 2 else std))


def tiny(data: Path | str, out: Path | str, **changes) -> T.Config:
    """A run of a few small steps on the CPU: 2 layers x 32, 256 tokens a step."""
    small = {
        **{"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (1,)},
        **{"backout": 0, "value_tables": 1, "row_tokens": 32, "micro_batch_tokens": 256},
        **{"val_row_tokens": 64, "val_call_tokens": 256, "val_tokens": 512, "dev_tokens": 512},
        **{"stages": (T.Stage(1.0, 256, 1.0, (128, 128)),), "tokens": 256 * 8, "looks": 2},
        **{"matrix_lr": 0.02, "momentum_warmup": 4, "momentum_cooldown": 2},
        **{"embed_lr": 0.1, "value_lr": 0.1, "cooldown": 0.45, "ext_window": 0, "passes": 2},
        **{"save_final": False, "data": str(data), "out": str(out)},
    }
    return T.make_config("demo", **{**small, **changes})


def argv_of(cfg: T.Config) -> list[str]:
    """The command line that says what `cfg` is."""
    argv, base = ["--preset", cfg.preset], T.make_config(cfg.preset).flat()
    for name, value in cfg.flat().items():
        if value != base[name]:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(f"--{'' if value else 'no-'}{flag}")
            else:
                argv += [f"--{flag}", str(value)]
    return argv


def tiny_argv(data: Path | str, out: Path | str, **changes) -> list[str]:
    return argv_of(tiny(data, out, **changes))


def read_log(run: Path | str, kind: str | None = None) -> list[dict]:
    """The lines of RUN/run.jsonl, of one kind or all."""
    lines = [json.loads(line) for line in (Path(run) / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["t"])]


def chain_breaks(run: Path | str) -> list[int]:
    """Numbers of the lines whose hash is wrong, by what a log promises and not by RunLog's code."""
    h, wrong = "", []
    for i, line in enumerate((Path(run) / "run.jsonl").read_bytes().decode().splitlines()):
        said = json.loads(line)["h"]
        tail = f', "h": "{said}"}}'
        if not line.endswith(tail):
            return [*wrong, i]
        bare = line[: -len(tail)] + "}"
        h = hashlib.sha256((h + bare).encode()).hexdigest()[:16]
        if h != said:
            wrong.append(i)
    return wrong


def losses(run: Path | str) -> list[float]:
    return [line["loss"] for line in read_log(run, "step")]


def run_script(argv: list[str], env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """`python train_gpt.py ARGV` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *argv],
        **{"capture_output": True, "text": True, "timeout": 240, **kwargs},
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


# ---- processes ----------------------------------------------------------------------------------

# What they are forks of has imported these, and done nothing else.
multiprocessing.set_forkserver_preload(
    ["pytest", "train_gpt", "torch._dynamo", "torch.distributed.run"]
)


class Forked:
    """A Python script or module in a process of its own, with the part of subprocess.Popen that
    tests use. It is not started by exec but a fork, which saves the 6 s of CPU that importing torch
    and its compiler's front end takes. Where the start itself is what is tested, use Popen."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin=None,
        stdout=None,
        stderr=None,
        env: dict | None = None,
        start_new_session: bool = False,
        pass_fds: tuple[int, ...] = (),
    ):
        """command: [sys.executable, FILE or -m MODULE, argument, ...]. A file of `pass_fds` stays
        open, by another number. None for a stream is the one of this process."""
        assert command[0] == sys.executable
        theirs, self.stdin, self.stdout = [], None, None
        if stdin == subprocess.PIPE:
            stdin, ours = os.pipe()
            theirs.append(stdin)
            self.stdin = os.fdopen(ours, "wb")
        if stdout == subprocess.PIPE:
            ours, stdout = os.pipe()
            theirs.append(stdout)
            self.stdout = os.fdopen(ours, "rb")
        if stderr == subprocess.STDOUT:
            stderr = stdout
        streams = [
            n if s is None else s if isinstance(s, int) else s.fileno()
            for n, s in enumerate((stdin, stdout, stderr))
        ]
        fds = _Fds([*streams, *pass_fds])
        env = dict(os.environ if env is None else env)
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_script, args=(command[1:], fds, env, start_new_session)
        )
        self.process.start()
        self.pid = self.process.pid
        for fd in theirs:
            os.close(fd)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def torchrun(
    launch: list[str], script: Path, argv: list[str], say: Path, *, fork: bool, gloo: bool = True
) -> Forked | subprocess.Popen:
    """`torchrun LAUNCH SCRIPT ARGV`; all that it prints goes to the file `say`. With `fork`,
    torchrun and its ranks are forks that need not import torch."""
    words = ["-m", "torch.distributed.run", *launch]
    if fork:
        words += ["--run-path", "--start-method", "fork"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if gloo else {})
    with say.open("w") as out:
        return (Forked if fork else subprocess.Popen)(
            [sys.executable, *words, str(script), *argv], stdout=out, stderr=out, env=env
        )


def run_forked(
    argv: list[str], script: Path = ROOT / "train_gpt.py"
) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGV`, forked."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, str(script), *argv]
        process = Forked(command, stdout=out, stderr=err)
        try:
            code = process.wait(240)
        finally:
            process.kill()
        texts = [f.seek(0) or f.read() for f in (out, err)]
    return subprocess.CompletedProcess(command, code, *texts)


class _Fds(list):
    """Numbers of open files, which travel to the process that they are pickled for."""

    def __reduce__(self):
        return _arrived, ([DupFd(fd) for fd in self],)


def _arrived(fds: list) -> list[int]:
    return [fd.detach() for fd in fds]


def _script(command: list[str], fds: list[int], env: dict, start_new_session: bool) -> None:
    """What Python does with `command` where it starts."""
    if start_new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


# ---- ranks --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, size: int, port: int, work, folder: str, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    result = work(*args)
    torch.save(result, f"{folder}/rank{rank}.pt")
    T.World(torch.device("cpu"), rank, size).close()


def on_ranks(size: int, work, folder: Path, *args) -> list:
    """What `work(*args)`, a function of a module, returns on each of `size` gloo processes, forked
    as above."""
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        try:
            torch.multiprocessing.start_processes(
                _rank,
                (size, free_port(), work, str(folder), args),
                nprocs=size,
                start_method="forkserver",
            )
            break
        except torch.multiprocessing.ProcessRaisedException as e:
            # The port was free a moment ago: someone else may have taken it since.
            if attempt == 2 or not re.search("EADDRINUSE|[Aa]ddress already in use", str(e)):
                raise
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(size)]


@contextlib.contextmanager
def own_modules_cache(folder: Path):
    """The code of loaded folders is copied below `folder`, not to the home directory. Python keeps
    the package that such copies are in, and the path to it: both are forgotten, or those of another
    cache would be found."""
    from transformers import dynamic_module_utils

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [*sys.path])
        forget()
        yield patch
        forget()


def add_gradient(p: torch.Tensor, g: torch.Tensor) -> None:
    """As backward does: into what is there, or g where there is nothing."""
    if p.grad is None:
        p.grad = g.clone()
    else:
        p.grad.add_(g)


# ---- orthogonalisation --------------------------------------------------------------------------


def of_known_spectra(rows: int, cols: int) -> torch.Tensor:
    """[6, rows, cols]: singular values as gradients have them, few large and many small ones."""
    n = min(rows, cols)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    spectra = [i**-0.5, 1 / i, i**-2, 10 ** (-5 * (i - 1) / (n - 1))]
    spectra += [torch.where(i <= k, 1.0, small) for k, small in ((16, 1e-3), (1, 3e-3))]
    gen = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(6, side, n, generator=gen, dtype=torch.float64)).Q
        for side in (rows, cols)
    )
    return (u * torch.stack(spectra)[:, None] @ v.mT).float()


def polar_loop(u: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Polar Express as in the textbook, step after step on the whole matrices, wide or square."""
    x = u.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for a, b, c in T.POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.double()


def muon_errors(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """||x - exact|| / ||exact|| of matrices of known spectra: `orthogonalize` in float16, of u that
    were rounded to bfloat16 as in `muon_direction`, and the textbook's loop in bfloat16."""
    u = of_known_spectra(rows, cols).to(device)
    mine = T.orthogonalize(T.unit(u.bfloat16(), torch.float16)).double()
    if rows > cols:
        u, mine = u.mT, mine.mT
    exact = polar_loop(u, torch.float64)
    length = exact.norm(dim=(1, 2))
    loop = polar_loop(u, torch.bfloat16)
    return (mine - exact).norm(dim=(1, 2)) / length, (loop - exact).norm(dim=(1, 2)) / length


def small_gpt(arm: str, dtype: torch.dtype = torch.float32, **changes) -> T.GPT:
    """Of four blocks, one without attention, in rows of up to 64 tokens; no parameter, and no row
    of a table of n-grams, is 0: zero projections would hide attention."""
    settings = {"n_layer": 4, "d_model": 32, "n_head": 2, "head_dim": 16, "no_attention": (2,)}
    settings |= {"long_layers": (0,), "skip": (), "backout": 1, "value_tables": 1, "vocab": 64}
    model = T.GPT(T.make_config(arm=arm, **settings, **changes).model, 64, dtype)
    T.init_parameters(model, 0)
    tensors = list(model.parameters())
    if model.ngram is not None:
        model.ngram.make()
        tensors.append(model.ngram.table)
    with torch.no_grad():
        for i, t in enumerate(tensors):
            t.add_(0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)))
    return model
