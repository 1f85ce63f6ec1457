"""Says whether a GPU has seen the present FP8, attention and kernels: exit 1 if not.

`python tests/gpu_tests_fresh.py` compares records/gpu-tests.json, which gpu_report.py writes, with
train_gpt.py. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))
from gpu_report import section_hashes  # noqa: E402

WATCHED = ("FP8", "Attention", "Kernels")  # how the names of the sections start


def stale(record: Path, trainer: Path) -> list[str]:
    """One sentence for everything that no GPU test has seen; empty when all is fresh."""
    try:
        seen = json.loads(record.read_text())
        sections, results = dict(seen["sections"]), list(seen["results"])
    except FileNotFoundError:
        return [f"{record.name} is missing: run tests/gpu_report.py on a GPU"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [f"{record.name} is damaged ({e!r}): run tests/gpu_report.py on a GPU"]
    now = section_hashes(trainer)
    names = [n for n in dict.fromkeys([*now, *sections]) if n.startswith(WATCHED)]
    said = [
        f"section {name!r} of {trainer.name} changed since the GPU tests"
        for name in names
        if now.get(name) != sections.get(name)
    ]
    bad = [r["test"] for r in results if r.get("outcome") in ("failed", "error")]
    return said + ([f"GPU tests failed: {', '.join(bad)}"] if bad else [])


def main() -> int:
    said = stale(ROOT / "records" / "gpu-tests.json", ROOT / "train_gpt.py")
    print(
        "\n".join(said) if said else "the GPU tests have seen the present FP8, attention, kernels"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
