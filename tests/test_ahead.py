"""--compile-ahead: its graphs are those that a run compiles, and its processes can do no harm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import helpers as H
import pytest
import torch
from helpers import T
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensor

CALLS = [(16, 32), (8, 32), (16, 32)]


def ahead(hooks: T.Hooks | None = None, compile_s: float = 0.0, **changes) -> T.Ahead:
    """For two shapes of training calls and validation, of a trainer that has nothing else."""
    cfg = H.tiny("data", "out", **{"compile": True, "compile_ahead": True, **changes})
    rest = {"hooks": hooks or T.Hooks(), "kernels": {}, "world": T.World(torch.device("cpu"))}
    rest["compile_s"] = compile_s
    return T.Ahead(SimpleNamespace(cfg=cfg, **rest), CALLS)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Another program in the place of the processes' Python."""

    def put(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_one_process_for_each_later_call_and_none_where_it_is_off(stand_in):
    stand_in("exit 0")
    with closing(ahead()) as one:
        assert list(one.children) == [(8, 32), None]
    assert not one.children
    assert not ahead(compile_ahead=False).children
    assert not ahead(compile=False).children
    assert not ahead(compile_s=9.0).children, "a second warm-up, after park, finds all compiled"


def test_a_users_model_is_compiled_by_the_run_alone(stand_in):
    stand_in("exit 0")
    assert not ahead(T.Hooks(model=lambda *_: None)).children


@pytest.mark.parametrize("script, said", [("exit 3", "exit code 3"), ("exec sleep 60", "code -9")])
def test_a_process_that_dies_or_hangs_costs_one_line(stand_in, capsys, script, said):
    stand_in(script)
    began = time.monotonic()
    with closing(ahead()) as one:
        children = list(one.children.values())
        one.misses -= 1  # as if the first graph had been compiled
        time.sleep(0.5)
        for call in (*CALLS, None):
            one.wait(call)
    assert time.monotonic() - began < 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(said in line for line in lines)
    assert lines[0].startswith("warning: (8, 32) not") and "validation not" in lines[1]
    assert all(child.returncode is not None for child in children)


def test_nobody_is_waited_for_where_the_caches_had_the_first_graph(stand_in, capsys):
    stand_in("exec sleep 60")
    with closing(ahead()) as one:
        children = list(one.children.values())
        time.sleep(0.2)
        one.wait((8, 32))
        assert not one.children
        assert [child.returncode for child in children] == [-9, -9]
    assert not capsys.readouterr().err


def test_none_lives_on_when_the_warm_up_fails(stand_in):
    stand_in("exec sleep 60")
    with pytest.raises(ValueError), closing(ahead()) as one:
        children = list(one.children.values())
        raise ValueError
    assert [child.returncode for child in children] == [-9, -9]


def test_a_program_that_is_not_there_costs_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert not ahead().children
    assert capsys.readouterr().err.count("not compiled ahead") == 2


def test_an_orphan_ends(monkeypatch):
    """Whatever it does: its life is limited before it reads its job."""
    code = "import train_gpt as t; t.Ahead.SECONDS = 1; "
    code += "t.json.loads = lambda _: t.time.sleep(60); t.Hollow.main()"
    run = subprocess.run([sys.executable, "-c", code, "", ""], cwd=T.HERE, timeout=120)
    assert run.returncode == -14


def test_a_hollow_model_takes_no_memory():
    """Its weights, table and optimizer are fake, and aligned as a real one's."""
    cfg = H.tiny("data", "out", vocab=257, ngram=1024, copy=True)
    job = {"config": cfg.flat(), "kernels": {}, "device": "cpu", "rank": 1, "size": 2}
    hollow = T.Hollow(job)
    model, optimizer = hollow.lm.model, hollow.optimizer
    tensors = [*model.parameters(), *model.buffers(), model.ngram.table]
    tensors += [bank.data for bank in optimizer.banks] + [optimizer.rows.second]
    assert tensors and all(isinstance(t, FakeTensor) for t in tensors)
    assert all(p.requires_grad for p in model.parameters())
    assert len({p.storage_offset() for p in model.parameters()}) > 3  # views of banks


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"ngram": 1024, "copy": True}], ids=["plain", "table"])
def test_later_graphs_come_from_the_caches_and_losses_are_the_same_bits(
    text_data, tmp_path, monkeypatch, more
):
    stages = (T.Stage(0.5, 256, 1.0, (128, 128)), T.Stage(0.5, 512, 1.0, (128, 128)))
    more |= {"stages": stages, "micro_batch_tokens": 512, "tokens": 256 * 12, "compile": True}
    monkeypatch.setattr(T.Ahead, "PATIENCE", 10)  # two cores may serve many
    hits, found, losses = [], [], []
    for on in (False, True):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache{on}"))
        torch._dynamo.reset()
        counters.clear()
        T.train(H.tiny(text_data, tmp_path, run_id=str(on), compile_ahead=on, **more))
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
        found.append(counters["aot_autograd"]["autograd_cache_hit"])
        losses.append(H.losses(tmp_path / str(on)))
    graphs = 8 if "copy" in more else 3  # model, both ways, then without; lookup; pointer alike
    assert hits == [0, graphs] and losses[0] == losses[1]
    assert found == [0, 6 if "copy" in more else 2]  # nor are they traced again: one key for both


EDITED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, train_gpt as T
from torch._dynamo.utils import counters

factor = float(sys.argv[2])

@torch.library.custom_op("edited::same", mutates_args=())
def same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()

same.register_fake(torch.empty_like)
same.register_autograd(lambda ctx, grad: grad * factor)

class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad

x = torch.ones(8, requires_grad=True)
with T.whole_graphs({"trainer": sys.argv[2]}):
    torch.compile(lambda x: same(Passed.apply(x)), fullgraph=True)(x).sum().backward()
print(float(x.grad[0]), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.long
def test_an_edited_gradient_is_not_taken_from_the_caches(tmp_path):
    """A key has the name of a custom op alone, so the sources are part of it."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for factor in ("2", "2", "7"):
        command = [sys.executable, "-c", EDITED, str(H.ROOT), factor]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.split())
    assert said == [["2.0", "0"], ["2.0", "1"], ["7.0", "0"]]
