"""Runs the GPU tests and writes what they found: `python tests/gpu_report.py`.

The record, records/gpu-tests.json, names the card and hashes every section of train_gpt.py, so that
anyone can tell which sections have changed since a GPU last saw them. Importing needs nothing but
the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"^# ---- \d+\. (.+?) -+$", re.MULTILINE)


def section_hashes(path: str | Path) -> dict[str, str]:
    """Name of each section (`# ---- 4. Attention ---`) -> first 16 hex digits of the sha256 of its
    text, from the line after its own to the next section's. Numbers and order do not matter."""
    parts = SECTION.split(Path(path).read_text(encoding="utf-8"))
    names, texts = parts[1::2], parts[2::2]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has two sections of one name: {names}")
    hashes = [hashlib.sha256(t.strip().encode()).hexdigest()[:16] for t in texts]
    return dict(zip(names, hashes, strict=True))


class Collect:
    """A pytest plugin: outcome and seconds of every test; set-up counts for the test that pays."""

    def __init__(self):
        self.results: dict[str, dict] = {}

    def pytest_configure(self, config) -> None:
        config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")

    def pytest_runtest_logreport(self, report) -> None:
        file, _, test = report.nodeid.partition("::")  # a test's parameters may have slashes
        name = f"{file.rpartition('/')[2]}::{test}"
        row = self.results.setdefault(name, {"test": name, "outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            error = report.when != "call" and report.outcome == "failed"
            row["outcome"] = "error" if error else report.outcome


def run_tests(paths: list[str]) -> tuple[int, list[dict]]:
    """(pytest's exit code, a row for each test)."""
    import pytest

    collect = Collect()
    code = pytest.main(["-m", "gpu", "-rfEs", *paths], plugins=[collect])
    return int(code), list(collect.results.values())


def output(*command: str) -> str | None:
    """First line of a command's output, or None where there is no such program or it fails."""
    try:
        text = subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip().partition("\n")[0] or None


def machine() -> dict:
    import torch

    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    gpu = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if gpu else None,
        "torch": torch.__version__,
        "triton": triton,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--out", type=Path, default=ROOT / "records/gpu-tests.json", help="the record")
    p.add_argument("--commit", help="what was tested, where git cannot say")
    args = p.parse_args(argv)
    before = section_hashes(ROOT / "train_gpt.py")
    code, results = run_tests([str(ROOT / "tests/test_gpu.py")])
    if all(r["outcome"] == "skipped" for r in results):
        print("gpu_report.py: no test ran here, nothing written: it takes an NVIDIA GPU")
        return code or 2
    if section_hashes(ROOT / "train_gpt.py") != before:
        print("gpu_report.py: train_gpt.py changed meanwhile, nothing written: run it again")
        return 2
    record = {
        "commit": args.commit or output("git", "rev-parse", "HEAD"),
        "sections": before,
        **machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    bad = [r["test"] for r in results if r["outcome"] in ("failed", "error")]
    print(f"{args.out}: {len(results)} tests, {len(bad)} failed, on {record['card']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
