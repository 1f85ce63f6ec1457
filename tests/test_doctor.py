"""data/doctor.py: packages, GPUs by a fake nvidia-smi, tokens, the hub, what to run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from data import doctor  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.95.05"


def write_shard(path: Path, tokens: int, cut: int = 0) -> None:
    head = b"".join(n.to_bytes(4, "little") for n in (doctor.SHARD_MAGIC, 1, tokens))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.ljust(doctor.HEADER_BYTES, b"\0") + bytes(2 * tokens - cut))


def fake_smi(folder: Path, *lines: str, code: int = 0) -> Path:
    """A folder with an nvidia-smi that prints these lines."""
    folder.mkdir(parents=True, exist_ok=True)
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncat <<'EOF'\n" + "\n".join(lines) + f"\nEOF\nexit {code}\n")
    smi.chmod(0o755)
    return folder


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the GPUs of this machine; the hub is off and there are no tokens."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "MAIN_TOKENS", tmp_path / "main")
    path = os.environ["PATH"]

    def gpus(*lines: str, code: int = 0) -> None:
        monkeypatch.setenv("PATH", f"{fake_smi(tmp_path / 'bin', *lines, code=code)}:{path}")

    gpus("No devices were found", code=6)
    return gpus


@pytest.fixture
def main_tokens(tmp_path) -> Path:
    write_shard(tmp_path / "main" / "finewebedu_train_000001.bin", 500)
    write_shard(tmp_path / "main" / "finewebedu_val_000000.bin", 50)
    return tmp_path / "main"


# ---- packages -----------------------------------------------------------------------------------


def test_requirement_groups_cover_the_file():
    text = (ROOT / "requirements.txt").read_text()
    groups = doctor.requirement_groups(text)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for group in groups.values() for line in group] == lines
    assert [line.partition("==")[0] for line in lines[:4]] == [
        *("torch", "numpy", "huggingface-hub", "lm-eval[hf]")
    ]
    assert all("==" in line for line in lines), "pinned"


def test_run_sh_names_groups_that_exist():
    groups = doctor.requirement_groups((ROOT / "requirements.txt").read_text())
    script = (ROOT / "run.sh").read_text()
    lists = re.findall(r'(?:\bgo |use \$torch |^tested=")([+a-z ]+)', script, re.MULTILINE)
    words = {w.lstrip("+") for line in lists for w in line.split()}
    assert {"torch", "numpy", "plot", "hub", "test"} <= words <= set(groups)


@pytest.mark.parametrize(
    "version, fits",
    [("2.10.1", False), ("2.11.0+cu130", True), ("2.13.0", True), ("2.14.1", False), ("x", False)],
)
def test_fitting_torch(version, fits):
    assert doctor.fitting(version) is fits


@pytest.mark.parametrize(
    "requirement, installed, exact, cuda, ok",
    [
        ("numpy==2.4.6", "1.26.4", False, False, True),
        ("numpy==2.4.6", "1.26.4", True, False, False),
        ("torch==2.13.0", "2.11.0+cu130", False, True, True),
        ("torch==2.13.0", "2.11.0+cu130", True, False, False),
        ("torch==2.13.0", "2.13.0+cpu", True, False, True),
        ("torch==2.13.0", "2.13.0+cpu", False, True, False),
        ("torch==2.13.0", "2.14.0", False, False, False),
        ("lm-eval[hf]==0.4.13", "0.4.13", True, False, True),
        ("scipy==1.17.1", None, False, False, False),
    ],
)
def test_satisfied(monkeypatch, requirement, installed, exact, cuda, ok):
    def version(name):
        assert name == requirement.partition("==")[0].partition("[")[0]
        if installed is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.satisfied(requirement, exact=exact, cuda=cuda) is ok


def test_missing_leaves_out_what_is_nice_to_have(monkeypatch):
    monkeypatch.setattr(doctor, "satisfied", lambda line, **how: line.startswith("numpy"))
    assert [m.partition("==")[0] for m in doctor.missing(["torch", "numpy", "+plot", "cuda"])] == [
        *("torch", "matplotlib")
    ]
    assert len(doctor.missing(["torch", "numpy", "+plot"], must=True)) == 1
    assert doctor.missing([]) == []


# ---- GPUs, tokens, hub --------------------------------------------------------------------------


def test_gpus(machine, monkeypatch):
    assert doctor.find_gpus().cards == ()
    assert "No devices were found" in doctor.find_gpus().problem
    machine(H100, H100)
    card = doctor.Card("NVIDIA H100 80GB HBM3", 81559, 9.0, "580.95.05")
    assert doctor.find_gpus() == doctor.Gpus((card, card), "")
    for visible, count in (("1", 1), ("0,1", 2), ("", 0), ("-1", 0), ("0,7,1", 1), ("GPU-89", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(doctor.find_gpus().cards) == count, visible


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_gpus() == doctor.Gpus((), "nvidia-smi is not there")


def test_tokens_by_names_and_by_manifest(tmp_path, main_tokens):
    found = doctor.find_tokens(main_tokens)
    assert (found.train, found.val, found.tokens, found.problem) == (1, 1, 500, "")
    assert not found.manifest and not found.partial
    (main_tokens / "finewebedu_train_000002.bin.abc.part").write_bytes(b"")
    assert doctor.find_tokens(main_tokens).partial
    files = [{"name": "finewebedu_train_000001.bin", "split": "train"}]
    (main_tokens / "manifest.json").write_text(json.dumps({"files": files}))
    assert doctor.find_tokens(main_tokens).manifest
    assert "no train shards" in doctor.find_tokens(tmp_path / "nowhere").problem


@pytest.mark.parametrize(
    "manifest, problem",
    [
        ('{"files": [{"name": "gone.bin", "split": "train"}]}', "gone.bin is not there"),
        ('{"files": 3}', "manifest.json is damaged"),
        ("{", ""),
    ],
)
def test_bad_manifest(tmp_path, manifest, problem):
    (tmp_path / "manifest.json").write_text(manifest)
    found = doctor.find_tokens(tmp_path)
    assert found.problem and problem in found.problem


def test_bad_shards(tmp_path):
    write_shard(tmp_path / "a_train_0.bin", 40, cut=2)
    assert "cut or padded" in doctor.find_tokens(tmp_path).problem
    (tmp_path / "a_train_0.bin").write_bytes(b"no shard")
    assert "no token shard" in doctor.find_tokens(tmp_path).problem


def test_hub(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    assert doctor.hub_problem() == ""
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in doctor.hub_problem()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hub_problem() == "HF_HUB_OFFLINE is set"


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    """Not even where the look-up of its name hangs, which no socket's timeout ends."""

    answer = Event()

    def look_up(*_, **__):
        answer.wait(30)
        raise OSError("no such name")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", look_up)
    assert doctor.reach("http://example.invalid", timeout_s=0.05) is False
    assert not answer.is_set()
    answer.set()


# ---- what to run --------------------------------------------------------------------------------


def plan(*words, how="asked"):
    main, gpus, tokens, script, run, *line = doctor.plan(how, list(words))
    return main, int(gpus), tokens, script, run, line


def test_no_gpu(machine, capsys):
    with pytest.raises(doctor.InputError, match=r"no NVIDIA GPU .*: run \./run\.sh demo"):
        plan()
    assert plan("--tokens", "9", how="bare")[0] == "demo"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no NVIDIA GPU" in said and "without --tokens 9" in said


def test_old_gpu(machine, main_tokens, capsys):
    machine("NVIDIA GeForce GTX 1080, 8192, 6.1, 550.1")
    assert plan(how="bare")[0] == "demo"
    assert "compute capability 6.1" in capsys.readouterr().err


def test_no_tokens(machine, tmp_path):
    machine(H100)
    with pytest.raises(doctor.InputError, match="HF_HUB_OFFLINE is set: give --data DIR"):
        plan()
    with pytest.raises(doctor.InputError, match=r"no tokens in .*nothing"):
        plan("--data", str(tmp_path / "nothing"))
    assert plan(how="bare")[0] == "demo"


def test_tokens_to_fetch(machine, monkeypatch, main_tokens):
    machine(H100)
    monkeypatch.setattr(doctor, "hub_problem", lambda: "")
    assert plan()[2] == "have"
    part = main_tokens / "finewebedu_train_000002.bin.abc.part"
    part.write_bytes(b"")
    assert plan()[2] == "9", "a half download goes on"
    monkeypatch.setattr(doctor, "hub_problem", lambda: "no hub")
    assert plan()[2] == "have", "or is used as it is"
    part.unlink()
    (main_tokens / "finewebedu_val_000000.bin").unlink()
    with pytest.raises(doctor.InputError):
        plan()


def test_one_gpu(machine, main_tokens):
    machine(H100)
    line = ["--preset", "speedrun", "--data", str(main_tokens), "--arm", "diff_v2"]
    assert plan("--arm", "diff_v2") == ("speedrun", 1, "have", "train_gpt.py", "runs", line)


def test_words_of_the_user_win(machine, main_tokens, tmp_path):
    machine(H100)
    write_shard(tmp_path / "my data" / "a_train_0.bin", 9)
    words = ["--preset=plain", "--data", str(tmp_path / "my data"), "--out=o", "--run-id", "r"]
    main, gpus, tokens, script, run, line = plan(*words, "--seed", "3")
    assert (main, gpus, tokens, script, run) == ("speedrun", 1, "have", "train_gpt.py", "o/r")
    assert line[:4] == ["--preset", "plain", "--data", str(tmp_path / "my data")]
    assert line[4:] == ["--out", "o", "--run-id", "r", "--seed", "3"]


@pytest.mark.parametrize(
    "card, flags",
    [
        (H100, ["--preset", "speedrun"]),
        ("NVIDIA L40S, 46068, 8.9, 5", ["--preset", "r28"]),
        ("NVIDIA A100-SXM4-40GB, 40960, 8.0, 5", ["--preset", "gpu24"]),
        ("NVIDIA GeForce RTX 4090, 24564, 8.9, 5", ["--preset", "gpu24"]),
        (
            "NVIDIA GeForce RTX 3060, 12288, 8.6, 5",
            ["--preset", "gpu24", "--micro-batch-tokens", "8192"],
        ),
    ],
)
def test_preset_fits_the_card(machine, main_tokens, card, flags):
    machine(H100, card)
    assert plan("--gpus", "1")[5][:-2] == flags


@pytest.mark.parametrize("here, used", [(2, 2), (3, 2), (5, 4), (7, 4), (8, 8), (10, 8)])
def test_gpus_that_divide_a_step(machine, main_tokens, here, used):
    machine(*[H100] * here)
    assert plan()[1] == used


def test_asked_gpus(machine, main_tokens, monkeypatch):
    machine(*[H100] * 4)
    assert plan("--gpus", "3")[1] == 3
    assert "--gpus" not in plan("--gpus=2")[5]
    for bad in ("5", "0", "x", "-1"):
        with pytest.raises(doctor.InputError, match="give a number from 1 to 4"):
            plan(f"--gpus={bad}")
    monkeypatch.setenv("NPROC", "1")
    assert plan()[1] == 1
    assert plan("--gpus", "2")[1] == 2


def test_a_run_goes_on_with_its_own_preset(machine, main_tokens, tmp_path):
    """Whatever the number of GPUs now, from the run or from one of its checkpoints."""
    machine(H100, H100)
    (tmp_path / "run.jsonl").write_text('{"t": "header", "preset": "speedrun"}\n{"t": "st')
    for resume in (tmp_path, tmp_path / "ckpt" / "step_00000010"):
        line = plan("--resume", str(resume))[5]
        assert line[:2] == ["--preset", "speedrun"] and line[-2:] == ["--resume", str(resume)]
        assert plan("--resume", str(resume), "--preset", "plain")[5][:2] == ["--preset", "plain"]
    (tmp_path / "run.jsonl").write_text('{"t": "header", "preset": "gpt2"}')
    assert plan("--resume", str(tmp_path))[3] == "variants/gpt2.py"
    (tmp_path / "run.jsonl").write_text("torn")
    assert plan("--resume", str(tmp_path))[5][:2] == ["--preset", "r28"]


def test_run_folder_of_several_gpus(machine, main_tokens):
    machine(H100, H100)
    *_, run, line = plan()
    assert run == f"runs/{line[line.index('--run-id') + 1]}" and run.endswith("_r28_2gpus")
    for resume in ("some/run", "some/run/ckpt/step_00000010"):
        *_, run, line = plan("--resume", resume)
        assert run == "some/run" and "--run-id" not in line


def test_gpt2_has_a_script_of_its_own(machine, main_tokens, monkeypatch, tmp_path):
    machine(H100)
    for name in ("train_gpt.py", "variants/gpt2.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert plan("--preset", "gpt2")[3] == "variants/gpt2.py"
    (tmp_path / "variants" / "gpt2.py").unlink()
    with pytest.raises(doctor.InputError, match="not here"):
        plan("--preset", "gpt2")


def test_help_needs_no_gpu(machine):
    assert plan("--help")[0] == "help"


# ---- the list -----------------------------------------------------------------------------------


def doctor_process(*argv, path: str | None = None, **env):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    if path:
        env["PATH"] = path
    command = [sys.executable, str(ROOT / "data" / "doctor.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_list_and_json_say_the_same(tmp_path):
    write_shard(tmp_path / "t_train_0.bin", 7)
    plain = doctor_process("--data", str(tmp_path))
    assert plain.returncode == 0, plain.stderr
    for word in ("python", "torch", "GPU", "BF16", "FP8", "FlexAttention", "disk", "hub"):
        assert word in plain.stdout
    assert "7 tokens in 1 train shards, 0 val" in plain.stdout
    assert plain.stdout.splitlines()[-1].startswith("./run.sh would run: demo, because")
    said = json.loads(doctor_process("--data", str(tmp_path), "--json").stdout)
    assert {c["state"] for c in said["checks"]} <= {"OK", "warn", "missing"}
    assert said["decision"]["main"] == "demo"
    assert [c["name"] for c in said["checks"]] == [
        line[9:].partition("  ")[0].strip() for line in plain.stdout.splitlines()[:-1]
    ]


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    torch, problem = doctor.import_torch()
    checks = {c.name: c for c in doctor.check_python(torch, problem)}
    assert checks["torch"].state == "missing" and "./run.sh installs it" in checks["torch"].text
    card = doctor.Card("X", 81559, 9.0, "1")
    states = [c.state for c in doctor.check_trials(torch, doctor.Gpus((card,), ""))]
    assert states == ["missing"] * 3


def test_a_trial_that_fails_is_an_answer(monkeypatch):
    class Torch:
        class cuda:
            is_available = staticmethod(lambda: True)

        def __getattr__(self, name):
            raise RuntimeError("no kernel\nimage")

    gpus = doctor.Gpus((doctor.Card("X", 81559, 9.0, "1"),), "")
    found = {c.name: c for c in doctor.check_trials(Torch(), gpus)}
    assert found["FP8"].state == "warn" and "RuntimeError: no kernel" in found["FP8"].text
    assert found["BF16"].state == found["FlexAttention"].state == "missing"


@pytest.mark.gpu
def test_trials_run_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    found = {c.name: c for c in doctor.check_trials(torch, doctor.find_gpus())}
    assert found["BF16"].state == found["FlexAttention"].state == "OK", found
