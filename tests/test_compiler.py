"""What `configure_compiler` changes of torch.compile. Whether a GPU gains by it: bench_step.py."""

from __future__ import annotations

import threading
import types

import helpers as H
import pytest
import sympy
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.runtime.hints import ReductionHint as Hint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V

T = H.T


def test_the_way_back_is_compiled_by_the_caller():
    """With its settings: in torch 2.13 they are a thread's own, and on a GPU backward has another
    one."""
    compiled = []

    def note(graph, _):
        compiled.append((threading.get_ident(), torch._dynamo.config.recompile_limit))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    T.configure_compiler(torch.device("cpu"))
    x = torch.randn(4, 8, requires_grad=True)
    y = torch.compile(lambda x: x.sin().square(), backend=backend, fullgraph=True)(x)
    assert compiled == [(threading.get_ident(), 64)] * 2
    y.sum().backward()
    assert len(compiled) == 2
    torch.testing.assert_close(x.grad, 2 * x.detach().sin() * x.detach().cos())


@pytest.fixture
def choices():
    """Inductor's choices as they are here for a GPU, and as they were again afterwards; a graph
    whose sizes are numbers."""
    before, tag = V.choices, torch.compiler.config.cache_key_tag
    T.reduce_in_one_pass()
    with V.set_graph_handler(types.SimpleNamespace(sizevars=SizeVarAllocator())):
        yield V.choices
    V.set_choices_handler(before)
    torch.compiler.config.cache_key_tag = tag


def test_caches_know_of_the_choices(choices):
    """Or an older graph would be taken for one of these; told again, it is the same."""
    tag = torch.compiler.config.cache_key_tag
    T.reduce_in_one_pass()
    assert tag == torch.compiler.config.cache_key_tag == "rows in one pass"


class Features:
    """Of a kernel, as Inductor sees them: rows, their length, and hints of its reductions."""

    def __init__(self, numel: int, reduction_numel: int, *hints: Hint):
        self.numel, self.reduction_numel = sympy.Integer(numel), sympy.Integer(reduction_numel)
        self.hints = hints
        for name in ("reduction_nodes", "reduction_hint", "get_reduction_hint"):
            assert hasattr(SIMDKernelFeatures, name), "of this torch"

    def reduction_nodes(self) -> tuple[Hint, ...]:
        return self.hints

    @staticmethod
    def reduction_hint(node: Hint) -> Hint:
        return node

    def get_reduction_hint(self) -> Hint:
        return self.hints[0] if len(set(self.hints)) == 1 else Hint.DEFAULT


@pytest.mark.parametrize(
    "rows, length, hints, theirs, ours",
    [
        (65_536, 768, (Hint.INNER,), True, True),
        (65_536, 768, (Hint.INNER, Hint.DEFAULT), False, True),  # an MLP's way back in FP8
        (393_216, 128, (Hint.DEFAULT, Hint.DEFAULT), False, True),  # XSA's
        (65_536, 768, (Hint.INNER, Hint.OUTER), False, False),
        (65_536, 1025, (Hint.INNER, Hint.DEFAULT), False, False),
        (4095, 768, (Hint.INNER, Hint.DEFAULT), False, False),
    ],
)
def test_rows_that_are_reduced_in_several_ways(choices, rows, length, hints, theirs, ours):
    features = Features(rows, length, *hints)
    of_torch = super(type(choices), choices).should_use_persistent_reduction
    assert of_torch(features, False) == theirs
    assert choices.should_use_persistent_reduction(features, False) == ours
    assert choices.should_use_persistent_reduction(features, True) == of_torch(features, True)
