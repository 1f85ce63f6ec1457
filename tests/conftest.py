"""One thread a worker, so that results are the same bits on every run; shared text; what a test
changes of its process; the table of faults over NCCL."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> Path:
    """Shards of standard-library docstrings, made once for all workers."""
    import helpers

    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    final = base / "text"
    if not final.exists():
        aside = helpers.write_text_corpus(base / f"text.{os.getpid()}")
        try:
            os.rename(aside, final)
        except OSError:  # the other worker was first
            shutil.rmtree(aside)
    return final


@pytest.fixture(autouse=True)
def signals_as_before():
    """What hears signals after a test that calls `main` is not what the next one finds."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# torch's own, by module: a test may be the first that imports the compiler
COMPILER = {
    "torch._dynamo.config": {
        "recompile_limit": 8,
        "fail_on_recompile_limit_hit": False,
        "error_on_recompile": False,
    },
    "torch._functorch.config": {"force_non_lazy_backward_lowering": False},
}


@contextlib.contextmanager
def compiler_as_before():
    """The settings that a Trainer with --compile leaves in its process. Without an import that no
    test needs: that one takes seconds."""
    before = {
        name: {key: getattr(sys.modules[name], key) for key in own} if name in sys.modules else own
        for name, own in COMPILER.items()
    }
    yield
    for name in before.keys() & sys.modules.keys():
        for key, value in before[name].items():
            setattr(sys.modules[name], key, value)


@pytest.fixture(autouse=True)
def compiler_as_before_a_test():
    with compiler_as_before():
        yield


@pytest.fixture(scope="module", autouse=True)
def compiler_as_before_a_file():
    """Its graphs go, too: another file would count them, and its guards would be compared."""
    with compiler_as_before():
        yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter) -> None:
    """What test_ranks.py noted of NCCL, from all of xdist's workers; as JSON in FAULTS_JSON."""
    reports = [r for of_kind in terminalreporter.stats.values() for r in of_kind]
    made = [r for r in reports if getattr(r, "when", "") == "call"]
    rows = [value for r in made for key, value in r.user_properties if key == "fault"]
    if not rows:
        return
    lines = [f"{rows[0]['gpu']}, NCCL", "", "| fault | exit.json | seconds | what it says |"]
    lines.append("| --- | ---: | ---: | --- |")
    for row in sorted(rows, key=lambda row: row["fault"]):
        lines.append(f"| {row['fault']} | {row['code']} | {row['seconds']} | {row['reason']} |")
    terminalreporter.write_line("\n" + "\n".join(lines))
    if os.environ.get("FAULTS_JSON"):
        Path(os.environ["FAULTS_JSON"]).write_text(json.dumps(rows, indent=1))
