"""What conftest.py promises: the compiler's settings stay with the test or file that made them."""

from __future__ import annotations

import ast
import sys

import conftest
import helpers as H
import pytest
import torch

CONFIG, OWN = "torch._dynamo.config", conftest.COMPILER


def settings() -> dict:
    return {m: {key: getattr(sys.modules[m], key) for key in own} for m, own in OWN.items()}


def test_settings_as_torch_has_them(tmp_path):
    """In a process where nothing was set: what a test finds that is the first to compile."""
    script = tmp_path / "script.py"
    of = {m: f"{{k: getattr(sys.modules[{m!r}], k) for k in {[*own]}}}" for m, own in OWN.items()}
    said = ", ".join(f"{m!r}: {values}" for m, values in of.items())
    script.write_text(f"import sys, {', '.join(OWN)}\nprint({{{said}}})")
    done = H.run_forked([], script)
    assert ast.literal_eval(done.stdout) == OWN, done.stderr


@pytest.mark.parametrize("first", [False, True])
def test_settings_come_back(first, monkeypatch):
    """What a Trainer with --compile sets; where the test is the first that imports the compiler,
    and where another set something before it."""
    config, before = torch._dynamo.config, settings()
    if not first:
        config.recompile_limit = 13
    with monkeypatch.context() as patch:
        if first:
            patch.delitem(sys.modules, CONFIG)
        with conftest.compiler_as_before():
            sys.modules[CONFIG] = config
            H.T.configure_compiler(torch.device("cpu"))
            config.error_on_recompile = True
            assert settings() != before
    if not first:
        before[CONFIG]["recompile_limit"] = 13
    assert settings() == before


def test_without_the_compiler(monkeypatch):
    """A test that compiles nothing imports nothing."""
    monkeypatch.delitem(sys.modules, CONFIG, raising=False)
    with conftest.compiler_as_before():
        pass
    assert CONFIG not in sys.modules
