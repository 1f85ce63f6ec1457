"""records/interaction.py: the figures are those of the numbers written out, and what has no block
with all four arms is refused."""

from __future__ import annotations

import fake_runs
import numpy as np
import pytest
from scipy import stats

from records import interaction

LOSSES = {
    "softmax": (3.50, 100.0),
    "diff_v2": (3.48, 110.0),
    "selective": (3.45, 150.0),
    "diff_v2,selective=true": (3.44, 170.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("four")
    return fake_runs.fake_comparison(where, LOSSES, blocks=4, noise_sd=0.002)


def test_figures(folder):
    """Both gain 0.02 and 0.05 alone, 0.06 together: 0.01 less than their sum."""
    metric, found = interaction.losses(folder, list(interaction.ARMS))
    assert metric == "val_loss_ext"
    a, b, c, d = np.array(found)
    got = interaction.contrasts(found)
    np.testing.assert_allclose(got["one"], b - a, atol=1e-12)
    np.testing.assert_allclose(got["other"], c - a, atol=1e-12)
    np.testing.assert_allclose(got["both"], d - a, atol=1e-12)
    np.testing.assert_allclose(got["interaction"], d - b - c + a, atol=1e-12)
    assert np.mean(got["interaction"]) == pytest.approx(0.01, abs=0.006)
    said = interaction.report(folder, list(interaction.ARMS)).splitlines()[-1].split()
    low, high = stats.t.interval(0.95, 3, np.mean(d - b - c + a), np.std(d - b - c + a, ddof=1) / 2)
    assert said[:2] == ["interaction", "4"]
    assert [float(said[i]) for i in (3, 5)] == pytest.approx([low, high], abs=6e-5)


def test_the_command(folder, capsys):
    assert interaction.main([str(folder)]) == 0
    assert "diff_v2,selective=true - softmax" in capsys.readouterr().out
    assert interaction.main([str(folder), "--arms", "softmax", "diff_v1", "selective", "x"]) == 2
    assert "no block with all of softmax, diff_v1" in capsys.readouterr().err
    assert interaction.main([str(folder / "code")]) == 2
