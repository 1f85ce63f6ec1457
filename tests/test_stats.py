"""records/stats.py against scipy, closed forms, simulation, and data with known answers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from records import stats
from records.stats import Estimate, Fit, Ladder

LOSSES = [3.2791, 3.2803, 3.2778, 3.2812, 3.2795, 3.2784]
OTHERS = [3.2763, 3.2790, 3.2771, 3.2780, 3.2779, 3.2752]


# ---- One sample ---------------------------------------------------------------------------------


def test_mean_interval_is_scipys_and_right_by_hand():
    ours = stats.mean_interval(LOSSES)
    theirs = scipy_stats.ttest_1samp(LOSSES, 0).confidence_interval(0.95)
    assert ours.value == pytest.approx(np.mean(LOSSES), rel=1e-15)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=1e-12)
    by_hand = stats.mean_interval([1.0, 2.0, 3.0])  # t of 2 degrees is 4.302653
    assert (by_hand.low, by_hand.high) == pytest.approx(
        (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6
    )


def test_sd_interval_by_the_tables_of_chi_square():
    values = [math.sqrt(0.9) * s for s in (1, -1)] * 5  # ten values, sd 1
    found = stats.sd_interval(values)
    assert found.value == pytest.approx(1.0, rel=1e-12)
    assert found.low == pytest.approx(math.sqrt(9 / 19.0228), rel=1e-5)  # upper 2.5 % of 9 degrees
    assert found.high == pytest.approx(math.sqrt(9 / 2.70039), rel=1e-5)


@pytest.mark.parametrize("alternative", ["less", "greater", "two-sided"])
def test_t_test_on_differences_is_the_paired_test(alternative):
    found = stats.t_test(stats.differences(OTHERS, LOSSES), 0.0, alternative)
    theirs = scipy_stats.ttest_rel(OTHERS, LOSSES, alternative=alternative).pvalue
    assert found == pytest.approx(theirs, rel=1e-12)


def test_t_test_by_its_closed_form_and_threshold():
    t = 2 * math.sqrt(3)  # of 1, 2, 3 against 0; with 2 degrees p = 1 - t / sqrt(t^2 + 2)
    p = 1 - t / math.sqrt(t * t + 2)
    assert stats.t_test([1, 2, 3], 0, "two-sided") == pytest.approx(p, rel=1e-12)
    assert stats.t_test([1, 2, 3], 4, "less") == pytest.approx(p / 2, rel=1e-12)
    assert stats.t_test([1, 2, 3], 0, "less") == pytest.approx(1 - p / 2, rel=1e-12)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [3.28],
        [3.28, 3.28, 3.28],
        [0.1 + 0.2 - 0.3, 0.0, 1e-16],  # alike but for rounding
        [3.28, math.nan, 3.29],
        [3.28, math.inf],
    ],
)
def test_what_the_data_do_not_give_is_none(values):
    for found in (stats.mean_interval(values), stats.sd_interval(values)):
        assert found.low is None and found.high is None
    assert stats.t_test(values, 3.0, "less") is None


def test_point_estimates_of_small_and_broken_samples():
    assert stats.mean_interval([3.28]) == Estimate(3.28)
    assert stats.mean_interval([2.0, 2.0]) == Estimate(2.0)
    assert stats.sd_interval([2.0, 2.0]) == Estimate(0.0)
    assert stats.sd_interval([2.0]) == Estimate(None)
    assert stats.mean_interval([]) == Estimate(None)
    assert stats.mean_interval([1.0, math.nan]) == Estimate(None)
    assert stats.mean_interval([1.0, 2.0]).high == pytest.approx(1.5 + 0.5 * 12.70620, rel=1e-6)


def test_sums_are_exact():
    values = [1e16, 1.0, -1e16, 1.0]
    assert stats.mean(values) == 0.5
    assert stats.mean(values[::-1]) == 0.5


# ---- Pairs --------------------------------------------------------------------------------------


def test_blocks_cancel_what_they_share():
    level = [0.0, 0.5, -0.3, 0.2, 0.1, 0.4]
    shifted = [[v + s for v, s in zip(arm, level)] for arm in (OTHERS, LOSSES)]
    plain = stats.mean_interval(stats.differences(OTHERS, LOSSES))
    paired = stats.mean_interval(stats.differences(*shifted))
    for a, b in zip(vars(plain).values(), vars(paired).values()):
        assert a == pytest.approx(b, abs=1e-12)


def test_differences_want_both_arms_in_every_block():
    with pytest.raises(ValueError):
        stats.differences([1.0, 2.0], [1.0])


def test_time_ratio_is_geometric():
    found = stats.ratio_interval([2.0, 8.0, 4.0], [1.0, 2.0, 4.0])  # ratios 2, 4, 1
    assert found.value == pytest.approx(2.0, rel=1e-12)
    logs = stats.mean_interval([math.log(2), math.log(4), 0.0])
    assert math.log(found.low) == pytest.approx(logs.low, rel=1e-12)
    assert found.low * found.high == pytest.approx(4.0, rel=1e-12)
    inverse = stats.ratio_interval([1.0, 2.0, 4.0], [2.0, 8.0, 4.0])
    assert inverse.low == pytest.approx(1 / found.high, rel=1e-12)
    assert stats.ratio_interval([3.0], [2.0]) == Estimate(pytest.approx(1.5))


def test_heterogeneity_between_sittings():
    groups = [[-0.004, -0.005, -0.003], [-0.001, 0.0005]]
    assert stats.heterogeneity(groups) == pytest.approx(scipy_stats.f_oneway(*groups).pvalue)
    assert stats.heterogeneity(groups[:1]) is None
    assert stats.heterogeneity([[-0.004], [-0.003]]) is None
    assert stats.heterogeneity([[-0.004, math.nan], [-0.003, -0.002]]) is None


# ---- Power --------------------------------------------------------------------------------------


def test_blocks_for_an_effect():
    """Figures that a plan is made by: sd 0.0015 an arm, one-sided 0.01, power 0.8."""
    assert stats.power(0.002, 14, 0.0015) == pytest.approx(0.8, abs=0.005)
    assert stats.blocks_needed(0.002, 0.0015) == 15
    assert stats.blocks_needed(0.003, 0.0015) == 8
    assert stats.blocks_needed(0.005, 0.0015) == 5
    assert stats.detectable(3, 0.0015) == pytest.approx(0.011, abs=1e-4)


def test_power_against_simulation():
    rng = np.random.default_rng(0)
    arms = rng.normal(0, 0.0015, (2, 20_000, 8))
    p = scipy_stats.ttest_1samp(arms[0] - arms[1] - 0.003, 0, axis=1, alternative="less").pvalue
    # sd of a share of 20,000 near 0.81: 0.0028
    assert stats.power(0.003, 8, 0.0015) == pytest.approx((p < 0.01).mean(), abs=4 * 0.0028)


def test_power_at_its_ends():
    assert stats.power(0.0, 8, 0.0015, alpha=0.05) == pytest.approx(0.05, rel=1e-9)
    assert stats.power(1.0, 1, 0.0015) == 0.0
    effect = stats.detectable(6, 0.002, alpha=0.05, power_wanted=0.9)
    assert stats.power(effect, 6, 0.002, alpha=0.05) == pytest.approx(0.9, abs=2e-4)


# ---- Loss, tokens and time ----------------------------------------------------------------------

TOKENS = np.array([60e6, 80e6, 100e6, 120e6])


def ladder(a: float, b: float, rate: float, blocks: int = 6, sd: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    losses = a + b * np.log(TOKENS) + sd * rng.normal(size=(blocks, 4))
    return Ladder(TOKENS, losses, np.tile(TOKENS / rate, (blocks, 1)))


def test_fit_finds_the_line_it_was_made_from():
    fit = Fit(ladder(8.5, -0.28, 5e5))
    assert fit.a == pytest.approx(np.full(len(fit.a), 8.5), rel=1e-12)
    assert fit.b == pytest.approx(np.full(len(fit.b), -0.28), rel=1e-11)
    assert fit.rate[0] == pytest.approx(5e5, rel=1e-12)
    assert np.abs(fit.residual).max() < 1e-12
    assert fit.tokens(fit.loss(9e7))[0] == pytest.approx(9e7, rel=1e-9)
    assert fit.seconds(9e7)[0] == pytest.approx(180.0, rel=1e-12)


def test_every_resample_is_fitted_as_numpy_would():
    data = ladder(8.5, -0.28, 5e5, sd=0.004)
    fit, share = Fit(data), stats.resamples(6)
    for row in (0, 1, 77, 9_999):
        b, a = np.polyfit(np.log(TOKENS), share[row] @ data.losses, 1)
        assert (fit.a[row], fit.b[row]) == pytest.approx((a, b), rel=1e-9)
    b, a = np.polyfit(np.tile(np.log(TOKENS), 6), data.losses.ravel(), 1)  # all points at once
    assert (fit.a[0], fit.b[0]) == pytest.approx((a, b), rel=1e-9)


def test_residuals_show_a_curve():
    data = ladder(8.5, -0.28, 5e5)
    bent = Ladder(data.tokens, data.losses + np.array([0.01, -0.01, -0.01, 0.01]), data.seconds)
    assert np.sign(Fit(bent).residual).tolist() == [1, -1, -1, 1]


def test_an_arm_at_equal_time():
    """Better by 0.02 at equal tokens, 10 % slower: worse by 0.28 ln 1.1 - 0.02 at equal time."""
    base, arm = Fit(ladder(8.5, -0.28, 5.5e5)), Fit(ladder(8.48, -0.28, 5e5))
    reach = base.seconds(1e8) * arm.rate
    assert reach[0] == pytest.approx(1e8 / 1.1)
    difference = (arm.loss(reach) - base.loss(1e8))[0]
    assert difference == pytest.approx(0.28 * math.log(1.1) - 0.02, rel=1e-9)


def test_break_even_is_where_equal_time_ties():
    overhead = stats.break_even(-0.02, -0.28)
    base, arm = Fit(ladder(8.5, -0.28, 5e5 * (1 + overhead))), Fit(ladder(8.48, -0.28, 5e5))
    assert arm.loss(base.seconds(1e8) * arm.rate)[0] == pytest.approx(base.loss(1e8)[0], abs=1e-9)
    assert stats.break_even(-0.28 * math.log(1.05), -0.28) == pytest.approx(0.05)
    assert stats.break_even(0.28 * math.log(1.25), -0.28) == pytest.approx(-0.2)
    assert stats.break_even(-0.01, 0.0) is None
    assert stats.break_even(-0.01, 0.1) is None
    assert stats.break_even(None, -0.28) is None


def test_a_loss_that_does_not_fall_reaches_no_target():
    fit = Fit(ladder(3.0, 0.01, 5e5))
    assert stats.bootstrap_interval(fit.tokens(3.1), 6) == Estimate(None)
    assert not fit.covers(fit.tokens(3.1))


def test_what_was_not_run_is_not_covered():
    fit = Fit(ladder(8.5, -0.28, 5e5))
    for tokens, inside in ((59e6, False), (60e6, True), (120e6, True), (121e6, False)):
        assert fit.covers(np.full_like(fit.a, tokens)) is inside


def test_one_length_is_no_line():
    with pytest.raises(ValueError, match="two lengths"):
        Fit(Ladder(TOKENS[:1], np.ones((3, 1)), np.ones((3, 1))))


def test_resamples_are_the_same_everywhere():
    share = stats.resamples(5)
    assert share.shape == (1 + stats.RESAMPLES, 5)
    assert np.allclose(share.sum(1), 1) and (share[0] == 0.2).all()
    draw = random.Random(0).random  # Python promises these numbers
    first = [int(5 * draw()) for _ in range(5)]
    assert share[1] == pytest.approx([first.count(i) / 5 for i in range(5)])
    assert share[1:].mean(0) == pytest.approx(np.full(5, 0.2), abs=0.006)


def test_bootstrap_intervals_cover():
    """Means of 6 normal values: measured 93.5 %; plain percentiles would reach 86."""
    rng, share = np.random.default_rng(1), stats.resamples(6)
    found = [stats.bootstrap_interval(share @ rng.normal(size=6), 6) for _ in range(600)]
    assert 0.91 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.965


def test_bootstrap_invents_nothing():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert stats.bootstrap_interval(stats.resamples(4) @ values, 4) == Estimate(2.5)
    assert stats.bootstrap_interval(stats.resamples(6) @ np.ones(6), 6).low is None
    rows = stats.resamples(6) @ np.arange(6.0)
    rows[500] = math.nan
    assert stats.bootstrap_interval(rows, 6) == Estimate(2.5)


def test_pairs_of_fits_are_resampled_together():
    """What the blocks share cancels in a difference of two arms' fits, in every resample."""
    shared = np.random.default_rng(2).normal(0, 0.05, (6, 1))
    base, arm = (ladder(a, -0.28, 5e5) for a in (8.5, 8.48))
    base, arm = (Fit(Ladder(x.tokens, x.losses + shared, x.seconds)) for x in (base, arm))
    rows = arm.loss(1e8) - base.loss(1e8)
    assert rows == pytest.approx(np.full(len(rows), -0.02), abs=1e-9)
