"""Several machines by plain torchrun, here two "nodes" of one process each on this machine: the
numbers of one node with two processes, and one log; a node that dies ends the job, without a hang.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import helpers as H
import pytest
import torch

T = H.T
pytestmark = pytest.mark.slow
GUARD_S = 180  # far beyond what anything here takes: what is still there then, hangs


Node = subprocess.Popen | H.Forked


def torchrun(launch: list[str], argv: list[str], say: Path, fork: bool = False) -> Node:
    """`torchrun LAUNCH train_gpt.py ARGV`, without restarts."""
    launch = [*launch, "--max-restarts", "0"]
    return H.torchrun(launch, H.ROOT / "train_gpt.py", argv, say, fork=fork)


def two_nodes(folder: Path, data: Path, fork: bool = False, **changes) -> list[Node]:
    """Two launchers that meet at one address; each has an --out of its own, as without a shared
    disk."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{H.free_port()}"]
    launch = ["--nnodes", "2", "--nproc-per-node", "1", *meet, "--local-addr", "127.0.0.1"]
    nodes = []
    for i in range(2):
        argv = H.tiny_argv(data, folder / f"disk{i}", run_id="r", **changes)
        nodes.append(torchrun(launch, argv, folder / f"node{i}.txt", fork))
    return nodes


def family(pid: int) -> list[int]:
    """A process and all below it."""
    below = []
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        below = [p for child in text.split() for p in family(int(child))]
    return [pid, *below]


def kill(node: Node) -> None:
    """As when its power is cut: launcher and worker at once, without a word."""
    for pid in family(node.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


@contextlib.contextmanager
def ended(nodes: list[Node]):
    """Leaves none of them behind, whatever a test finds."""
    try:
        yield nodes
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)


def run_of(folder: Path) -> Path:
    """The run folder; the node that has no rank 0 leaves nothing on its disk."""
    (run,) = folder.glob("disk*/r")
    return run


def test_two_nodes_are_one_node_with_two_processes(text_data, tmp_path):
    (tmp_path / "one").mkdir()
    argv = H.tiny_argv(text_data, tmp_path / "one", run_id="r", arm="diff_v2", save_final=True)
    launch = ["--standalone", "--nproc-per-node", "2"]
    with ended([torchrun(launch, argv, tmp_path / "one.txt", fork=True)]) as (one,):
        assert one.wait(GUARD_S) == 0, (tmp_path / "one.txt").read_text()
    with ended(two_nodes(tmp_path, text_data, True, arm="diff_v2", save_final=True)) as nodes:
        codes = [node.wait(GUARD_S) for node in nodes]
    assert codes == [0, 0], [(tmp_path / f"node{i}.txt").read_text() for i in range(2)]
    a, b = tmp_path / "one" / "r", run_of(tmp_path)
    assert H.read_log(b, "header")[0]["world"] == 2 and H.chain_breaks(b) == []
    # Two numbers have one sum in either order: bits, not tolerances.
    assert H.losses(a) == H.losses(b) and len(H.losses(b)) == 8
    figures = [[v.get("dev_loss", v.get("val_loss")) for v in H.read_log(r, "val")] for r in (a, b)]
    assert figures[0] == figures[1]
    one, two = (T.load_checkpoint(run)[0]["model"] for run in (a, b))
    assert all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.mark.parametrize(
    "victim", ["with rank 0", pytest.param("without rank 0", marks=pytest.mark.long)]
)
def test_a_node_that_dies_ends_the_job(text_data, tmp_path, victim):
    """A run of hours whose one node goes after some steps: the other ends by itself, with an error
    and a whole checkpoint to go on from."""
    long = {"tokens": 256 * 100_000, "passes": 1000, "looks": 0, "save_every": 10}
    with ended(two_nodes(tmp_path, text_data, **long)) as nodes:
        start = time.monotonic()
        while not list(tmp_path.glob("disk*/r/ckpt/step_00000030")):
            texts = [(tmp_path / f"node{i}.txt").read_text() for i in range(2)]
            assert all(node.poll() is None for node in nodes), texts
            assert time.monotonic() - start < GUARD_S, texts
            time.sleep(0.05)
        run = run_of(tmp_path)
        first = int(run.parent.name.removeprefix("disk"))
        gone = first if victim == "with rank 0" else 1 - first
        kill(nodes[gone])
        assert nodes[1 - gone].wait(GUARD_S) != 0
    state, meta = T.load_checkpoint(run)
    assert meta["step"] >= 30 and set(state["model"]) == set(state["optimizer"])
    assert run_of(tmp_path) == run, "the node without rank 0 still writes nothing"
