"""run.sh: usage, dispatch (RUN_SH_DRY=1), GPUs by a fake nvidia-smi, exit codes, environments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_doctor import H100, fake_smi, write_shard

ROOT = Path(__file__).resolve().parents[1]
SHELLS = [s for s in ("bash", "dash") if shutil.which(s)]  # dash: nothing newer than POSIX sh
COPIED = ("run.sh", "requirements.txt", "data/doctor.py")
SCRIPTS = ("train_gpt.py", "records/demo.py", "data/get.py", "variants/gpt2.py", "evals/sample.py")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell script")


class Door:
    """A copy of run.sh with scripts that say how they were called, and a Python that has all."""

    def __init__(self, folder: Path):
        self.root = folder / "the tree"  # a space, so that quoting is tested throughout
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in COPIED:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name in SCRIPTS:
            self.script(name, "import sys; print(sys.argv)")
        self.stub()
        self.gpus()
        self.env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES",)}
        self.env.update(HF_HUB_OFFLINE="1", PYTHON=str(self.bin / "python"), PYTHONPATH="")
        self.env["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        for name in ("NPROC", "RUN_SH_DRY", "VIRTUAL_ENV"):
            self.env.pop(name, None)

    def script(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text + "\n")

    def stub(self, missing: str = "", launcher: str = "exit 1") -> None:
        """The Python: `missing` is what doctor.py says of packages, `launcher` runs as torchrun."""
        python = self.bin / "python"
        python.write_text(
            "#!/bin/sh\ncase $* in\n"
            f"  *--missing*) printf '%s' '{missing}' ;;\n"
            f"  *torch.distributed.run*) {launcher} ;;\n"
            f'  *) exec {sys.executable} "$@" ;;\nesac\n'
        )
        python.chmod(0o755)

    def gpus(self, *lines: str) -> None:
        fake_smi(self.bin, *lines, code=0 if lines else 9)

    def tokens(self) -> None:
        for name in ("train_000001", "val_000000"):
            write_shard(self.root / "data/tokens/fineweb-edu" / f"finewebedu_{name}.bin", 9)

    def run(self, *argv: str, shell: str = "bash", cwd: Path | None = None, **env):
        return subprocess.run(
            [shell, str(self.root / "run.sh") if cwd else "run.sh", *argv],
            cwd=cwd or self.root,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def dry(self, *argv: str, **kwargs) -> list[str]:
        """The commands that it would run, without the path of Python."""
        done = self.run(*argv, RUN_SH_DRY="1", **kwargs)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
        return [line.replace(f"{self.bin}/", "")[2:] for line in lines]


@pytest.fixture
def door(tmp_path) -> Door:
    return Door(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_usage(door, shell):
    said = door.run("--help", shell=shell)
    assert said.returncode == 0 and "Usage: ./run.sh" in said.stdout and "RUN_SH_DRY" in said.stdout
    assert said.stdout == door.run("-h").stdout == door.run("help").stdout
    listed = [line.split()[0] for line in said.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["speedrun", "demo", "data", "sample", "doctor", "test"]
    (door.root / "evals/sample.py").unlink()
    assert "sample" not in door.run("--help", shell=shell).stdout, "its file is not there"


def test_the_script_is_short():
    lines = (ROOT / "run.sh").read_text().splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 100


def test_bad_commands(door):
    for word in ("nonsense", "speed"):
        said = door.run(word)
        assert said.returncode == 2 and said.stderr.count("\n") == 1, said
        assert f"there is no command '{word}'" in said.stderr
    (door.root / "evals/sample.py").unlink()
    said = door.run("sample")
    assert said.returncode == 2 and "evals/sample.py is not there" in said.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_speedrun_without_a_gpu(door, shell):
    said = door.run("speedrun", shell=shell)
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.count("\n") == 1 and "no NVIDIA GPU" in said.stderr
    assert "run ./run.sh demo" in said.stderr


def test_speedrun_without_tokens(door, tmp_path):
    door.gpus(H100)
    said = door.run("speedrun")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "no tokens in data/tokens/fineweb-edu" in said.stderr and "--data DIR" in said.stderr
    assert door.run("speedrun", "--data", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("shell", SHELLS)
def test_bare_without_a_gpu_is_the_demo(door, shell):
    for words in ([], ["--tokens", "5"]):
        said = door.run(*words, shell=shell)
        assert said.returncode == 0 and said.stdout == "['records/demo.py']\n"
        why, command = said.stderr.splitlines()
        assert "no NVIDIA GPU" in why and command.startswith("+ ")


def test_bare_with_gpu_and_tokens_is_the_speedrun(door):
    door.gpus(H100)
    assert door.dry() == ["python records/demo.py"], "no tokens, no hub"
    door.tokens()
    main = "python train_gpt.py --preset speedrun --data data/tokens/fineweb-edu"
    assert door.dry() == door.dry("speedrun") == [main]
    assert door.dry("--seed", "3") == [f"{main} --seed 3"]


@pytest.mark.parametrize("shell", SHELLS)
def test_dispatch(door, shell):
    for argv, command in (
        (["demo", "--arm", "x y"], "python records/demo.py --arm 'x y'"),
        (["data", "fineweb", "--shards", "2"], "python data/get.py fineweb --shards 2"),
        (["sample", "runs/a"], "python evals/sample.py runs/a"),
        (["doctor", "--json"], "python data/doctor.py --json"),
        (
            ["test", "-k", "a*"],
            "python -m pytest -q -n auto --maxprocesses 8 --dist worksteal -k 'a*'",
        ),
        (["speedrun", "--help"], "python train_gpt.py --help"),
        (["speedrun", "--preset", "gpt2", "-h"], "python variants/gpt2.py --help"),
    ):
        assert door.dry(*argv, shell=shell) == [command]


def test_words_reach_the_script_whole(door, tmp_path):
    said = door.run("data", "text", "two words", "*", "", "it's", cwd=tmp_path)
    script = door.root / "data/get.py"
    assert (
        said.stdout == f"{[str(script), 'text', 'two words', '*', '', chr(39).join(['it', 's'])]}\n"
    )


def test_from_another_folder(door, tmp_path):
    """The repository's paths are whole, the user's start from where the user is."""
    door.gpus(H100)
    write_shard(tmp_path / "mine" / "a_train_0.bin", 9)
    said = door.run("speedrun", "--data", "mine", "--arm", "softmax", cwd=tmp_path)
    words = [str(door.root / "train_gpt.py"), "--preset", "speedrun", "--data", "mine"]
    assert said.stdout == f"{[*words, '--arm', 'softmax']}\n", said.stderr


def test_gpt2_is_a_script_of_its_own(door):
    door.gpus(H100)
    door.tokens()
    tail = "--preset gpt2 --data data/tokens/fineweb-edu --arm diff_v1"
    for words in (["--preset", "gpt2"], ["--preset=gpt2"]):
        assert door.dry("speedrun", *words, "--arm", "diff_v1") == [
            f"python variants/gpt2.py {tail}"
        ]


@pytest.mark.parametrize("shell", SHELLS)
def test_several_gpus(door, shell):
    door.gpus(*[H100] * 4)
    door.tokens()
    start = "python -m torch.distributed.run --standalone --nproc-per-node"
    main = "train_gpt.py --preset r28 --data data/tokens/fineweb-edu"
    (line,) = door.dry(shell=shell)
    assert line.startswith(f"{start} 4 {main} --run-id ") and line.endswith("_r28_4gpus")
    for words, env, n in ((["--gpus", "2"], {}, 2), (["--gpus=3"], {}, 3), ([], {"NPROC": "2"}, 2)):
        line = door.dry("speedrun", *words, "--run-id", "r", shell=shell, **env)
        assert line == [f"{start} {n} {main} --run-id r"]
    alone = [f"python {main.replace('r28', 'speedrun')}"]
    assert door.dry("speedrun", "--gpus", "1", shell=shell) == alone
    said = door.run("speedrun", "--gpus", "5", shell=shell)
    assert said.returncode == 2 and "number from 1 to 4" in said.stderr


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("said, returned, code", [(3, 1, 3), (75, 1, 75), (None, 1, 1), (0, 0, 0)])
def test_exit_code_of_several_gpus(door, shell, said, returned, code):
    door.gpus(H100, H100)
    door.tokens()
    write = (
        "" if said is None else f'echo {{\\"code\\": {said}, \\"reason\\": 1}} >runs/r/exit.json;'
    )
    door.stub(launcher=f"mkdir -p runs/r; {write} exit {returned}")
    done = door.run("speedrun", "--run-id", "r", shell=shell)
    assert done.returncode == code, done.stderr


def test_an_old_exit_code_does_not_count(door):
    door.gpus(H100, H100)
    door.tokens()
    old = door.root / "runs/r/exit.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"code": 75}')
    os.utime(old, (1, 1))
    door.stub(launcher="exit 1")
    assert door.run("speedrun", "--resume", "runs/r").returncode == 1
    door.stub(launcher="echo '{\"code\": 5}' >runs/r/exit.json; exit 1")
    assert door.run("speedrun", "--resume", "runs/r/ckpt/step_00000001").returncode == 5


@pytest.mark.parametrize("shell", SHELLS)
def test_a_signal_reaches_torchrun(door, shell):
    """SIGTERM to run.sh alone: torchrun has it, saves, and its code is returned."""
    door.gpus(H100, H100)
    door.tokens()
    save = 'mkdir -p runs/r; echo {\\"code\\": 75} >runs/r/exit.json; exit 1'
    door.stub(launcher=f"trap '{save}' TERM; touch started; while :; do sleep 0.1; done")
    process = subprocess.Popen(
        [shell, "run.sh", "speedrun", "--run-id", "r"],
        cwd=door.root,
        env=door.env,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 30
    while not (door.root / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_exit_code_of_one_gpu(door):
    door.gpus(H100)
    door.tokens()
    door.script("train_gpt.py", "import sys; sys.exit(5)")
    assert door.run("speedrun").returncode == 5


# ---- downloading --------------------------------------------------------------------------------


@pytest.fixture
def hub_door(door):
    """A door whose doctor believes that the hub answers."""
    doctor = door.root / "data/doctor.py"
    text = doctor.read_text()
    asked = "    problem = hub_problem()\n"
    assert asked in text
    doctor.write_text(text.replace(asked, '    problem = ""\n'))
    door.gpus(H100)
    return door


def test_tokens_are_fetched_first(hub_door):
    get = "python data/get.py fineweb-edu --shards 9"
    main = "python train_gpt.py --preset speedrun --data data/tokens/fineweb-edu"
    assert hub_door.dry("speedrun") == [get, main]
    said = hub_door.run("speedrun").stdout.splitlines()
    assert said[0] == "['data/get.py', 'fineweb-edu', '--shards', '9']" and len(said) == 2


def test_a_download_that_fails(hub_door):
    hub_door.script("data/get.py", "import sys; sys.exit(2)")
    assert hub_door.run("speedrun").returncode == 2
    bare = hub_door.run()
    assert bare.returncode == 0 and bare.stdout == "['records/demo.py']\n"
    hub_door.script("data/get.py", "import sys; sys.exit(130)")
    assert hub_door.run().returncode == 130, "stopped by the user"


# ---- packages -----------------------------------------------------------------------------------


def test_packages_that_cannot_be_installed(door):
    """A Python with torch, without a network: what is needed stops it, what is nice does not."""
    door.stub()
    text = (door.bin / "python").read_text()
    case = "  *--missing*) printf '%s' '' ;;\n"
    assert case in text

    def lacking(package: str, must: str) -> subprocess.CompletedProcess:
        # torch alone is there; `demo` asks for more, and pip fails.
        (door.bin / "python").write_text(
            text.replace(
                case,
                "  *'--missing torch') ;;\n"
                f"  *--missing*--must) printf '%s' '{must}' ;;\n"
                f"  *--missing*) echo {package} ;;\n"
                "  *'-m pip'*) echo no network >&2; exit 1 ;;\n",
            )
        )
        return door.run("demo")

    nice = lacking("matplotlib==9", "")
    assert nice.returncode == 0 and nice.stdout == "['records/demo.py']\n"
    assert "could not install matplotlib==9 and goes on without" in nice.stderr
    needed = lacking("numpy==9", "numpy==9")
    assert needed.returncode == 2 and needed.stdout == ""
    assert "could not install numpy==9" in needed.stderr
    assert not (door.root / ".venv").exists(), "a Python that has torch is used as it is"


def test_no_python(door, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sed", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    said = door.run("demo", shell=shutil.which("bash"), PATH=str(tools), PYTHON="none")
    assert said.returncode == 2 and "no Python 3.11 or newer" in said.stderr
