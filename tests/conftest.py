"""One thread a worker, so that results are the same bits on every run; shared text."""

from __future__ import annotations

import os
import shutil
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
