"""Statistics against closed forms, literal definitions and scipy."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import stats

from memray.measures import statistics
from memray.measures.statistics import (
    Alternative,
    bootstrap_interval,
    censored_median,
    censored_quantile,
    holm,
    jonckheere_terpstra,
)

nan, inf = math.nan, math.inf


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def strictly(values: list[float]) -> ndarray:
    return np.array(values, dtype=np.float64)


# --- medians and quantiles with censoring -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([3.0, 1.0, 2.0], 2.0),
        ([3.0, 1.0, 2.0, 4.0], 2.5),
        ([nan, 1.0, 2.0], 2.0),
        ([nan, 1.0, 2.0, nan, 3.0], 3.0),
        ([nan, 1.0, nan, 3.0], nan),  # the centre lies between 3 and infinity
        ([nan, nan, 1.0], nan),
        ([nan], nan),
        ([], nan),
        ([5.0], 5.0),
    ],
)
def test_the_censored_median_counts_missing_values_as_infinite(values, median):
    np.testing.assert_equal(censored_median(strictly(values)), median)


def test_a_quantile_below_the_censored_values_is_known():
    values = strictly([10.0, 20.0, nan, nan, nan])
    assert censored_quantile(values, 0.0) == 10.0
    assert censored_quantile(values, 0.125) == 15.0
    assert censored_quantile(values, 0.25) == 20.0
    assert math.isnan(censored_quantile(values, 0.3))
    assert math.isnan(censored_quantile(values, 1.0))


def test_a_quantile_that_falls_on_a_value_owes_nothing_to_its_censored_neighbour():
    values = np.where(np.arange(101) <= 29, np.arange(101.0), nan)
    assert 0.29 * 100 < 29, "the trap: the product falls short of the position"
    assert censored_quantile(values, 0.29) == 29.0


finite = st.floats(-1e6, 1e6)


@given(values=st.lists(finite, min_size=1, max_size=30), q=st.floats(0.0, 1.0))
def test_quantiles_without_censoring_are_those_of_numpy(values, q):
    assert censored_quantile(strictly(values), q) == pytest.approx(np.quantile(values, q), rel=1e-6, abs=1e-2)
    assert censored_median(strictly(values)) == pytest.approx(np.median(values))


@given(values=st.lists(finite, min_size=1, max_size=12), num_censored=st.integers(0, 12))
def test_the_censored_median_is_the_median_with_any_huge_number_in_place_of_missing(values, num_censored):
    huge = np.median(values + [1e30] * num_censored)
    expected = nan if huge > 1e29 else huge
    np.testing.assert_allclose(censored_median(strictly(values + [nan] * num_censored)), expected)


# --- bootstrap intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicates", [3, 5, 7, 11])
def test_the_interval_of_a_median_is_that_of_its_exact_bootstrap_distribution(num_replicates):
    """The resampled median is at most the k-th value when more than half of the draws are (Efron 1979)."""
    needed = (num_replicates + 1) // 2
    share = np.arange(1, num_replicates + 1) / num_replicates
    cumulative = stats.binom.sf(needed - 1, num_replicates, share)
    # The Monte-Carlo error of a tail of 0.025 is 0.0016: the distribution may not jump within three of it.
    assert np.abs(np.concatenate([cumulative - 0.025, cumulative - 0.975])).min() > 0.005
    values = np.arange(1.0, num_replicates + 1)
    interval = bootstrap_interval(generator().permutation(values), rng=generator())
    assert interval == (values[np.argmax(cumulative >= 0.025)], values[np.argmax(cumulative >= 0.975)])


def test_the_interval_of_a_mean_agrees_with_scipy():
    values = generator().gamma(2.0, size=25)
    low, high = bootstrap_interval(values, statistic=np.mean, level=0.9, rng=np.random.default_rng(1))
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Same resamples; the bounds differ by no more than the distance of two neighbours among 9,999.
    assert low == pytest.approx(expected.low, abs=2e-3)
    assert high == pytest.approx(expected.high, abs=2e-3)


@pytest.mark.parametrize(("num_replicates", "most"), [(3, 0.75), (5, 0.9375)])
def test_the_stated_coverage_of_a_median_of_few_replicates_is_what_simulation_finds(num_replicates, most):
    rng = generator()
    hits = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.standard_normal(num_replicates), rng=rng, resamples=999)
        hits += low <= 0.0 <= high
    assert hits / 400 == pytest.approx(most, abs=4 * math.sqrt(most * (1 - most) / 400))


def test_censored_replicates_leave_the_upper_bound_open():
    values = strictly([40.0, 50.0, 60.0, nan, nan])
    assert bootstrap_interval(values, rng=generator()) == (40.0, inf)


def test_few_censored_replicates_leave_the_interval_closed():
    values = np.append(np.arange(20.0), nan)
    low, high = bootstrap_interval(values, rng=generator())
    assert 0.0 < low < 10.0 < high < 19.0


def test_an_interval_of_censored_replicates_alone_is_infinite_at_both_ends():
    assert bootstrap_interval(np.full(5, nan), rng=generator()) == (inf, inf)


def difference_of_medians(first: ndarray, second: ndarray, axis: int) -> ndarray:
    return np.median(first, axis=axis) - np.median(second, axis=axis)


def test_resamples_without_a_defined_statistic_open_the_interval_on_both_sides():
    censored = strictly([50.0, 60.0, nan, nan, nan])
    interval = bootstrap_interval(censored, censored, statistic=difference_of_medians, rng=generator())
    assert interval == (-inf, inf)
    never = np.full(4, nan)
    assert bootstrap_interval(never, never, statistic=difference_of_medians, rng=generator()) == (-inf, inf)


def test_an_effect_on_a_censored_group_is_bounded_on_the_side_that_is_known():
    slow, fast = strictly([nan, nan, nan, 90.0, 95.0]), strictly([10.0, 11.0, 12.0, 13.0, 14.0])
    low, high = bootstrap_interval(slow, fast, statistic=difference_of_medians, rng=generator())
    assert low > 70.0
    assert high == inf


def test_paired_samples_are_resampled_together():
    first = 100.0 * generator().standard_normal(8)
    second = first - 3.0
    apart = bootstrap_interval(first, second, statistic=difference_of_medians, rng=generator())
    paired = bootstrap_interval(first, second, statistic=difference_of_medians, rng=generator(), paired=True)
    assert paired == pytest.approx((3.0, 3.0))
    assert apart.high - apart.low > 50.0


def test_one_replicate_has_no_interval():
    interval = bootstrap_interval(strictly([4.0]), rng=generator())
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_an_interval_is_reproducible_from_its_generator():
    values = generator().standard_normal(30)
    assert bootstrap_interval(values, rng=generator()) == bootstrap_interval(values, rng=generator())


def test_paired_samples_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"same replicates, but got \[3, 2\] of them"):
        bootstrap_interval(np.arange(3.0), np.arange(2.0), paired=True, rng=generator())


# --- trends over ordered groups -----------------------------------------------------------------------------


def literal_count(groups: list[list[float]]) -> float:
    count = 0.0
    for earlier, later in itertools.combinations(groups, 2):
        for x, y in itertools.product(earlier, later):
            x, y = (inf if math.isnan(value) else value for value in (x, y))
            count += 1.0 if x < y else 0.5 if x == y else 0.0
    return count


def literal_p_values(groups: list[list[float]]) -> dict[Alternative, float]:
    """All orders of the pooled values, dealt to the groups one after another."""
    pooled, observed = [value for group in groups for value in group], literal_count(groups)
    at_least = at_most = total = 0
    for order in itertools.permutations(pooled):
        values = iter(order)
        count = literal_count([[next(values) for _ in group] for group in groups])
        at_least, at_most, total = at_least + (count >= observed), at_most + (count <= observed), total + 1
    return {
        "increasing": at_least / total,
        "decreasing": at_most / total,
        "two-sided": min(1.0, 2 * min(at_least, at_most) / total),
    }


levels = st.sampled_from([0.0, 1.0, 2.0, 3.0, nan])


@pytest.mark.parametrize("counted_in_pairs", [statistics._COUNTED_IN_PAIRS, 2])
@settings(deadline=None, max_examples=12)
@given(
    groups=st.lists(st.lists(levels, min_size=1, max_size=3), min_size=2, max_size=4).filter(
        lambda groups: sum(map(len, groups)) <= 6
    )
)
def test_the_trend_test_equals_a_literal_count_over_all_permutations(counted_in_pairs, groups):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_COUNTED_IN_PAIRS", counted_in_pairs)
        for alternative, expected in literal_p_values(groups).items():
            statistic, p_value = jonckheere_terpstra(
                [strictly(group) for group in groups], alternative=alternative, rng=generator()
            )
            assert statistic == literal_count(groups)
            assert p_value == pytest.approx(expected)


def test_many_values_are_counted_exactly():
    rng = generator()
    groups = [rng.integers(0, 200, size=size).astype(float) for size in (400, 1, 350, 500)]
    later = [(first, second) for k, first in enumerate(groups) for second in groups[k + 1 :]]
    count = sum(np.sum(a[:, None] < b) + 0.5 * np.sum(a[:, None] == b) for a, b in later)
    assert jonckheere_terpstra(groups, alternative="increasing", rng=rng, permutations=9).statistic == count


@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "scipys"), [("increasing", "greater"), ("decreasing", "less"), ("two-sided", "two-sided")]
)
def test_for_two_groups_the_trend_test_is_the_exact_mann_whitney_test(ours, scipys, with_ties):
    rng = generator()
    first, second = rng.normal(size=5), rng.normal(0.8, size=6)
    if with_ties:
        first, second = first.round(), second.round()
    method: Any = stats.PermutationMethod(n_resamples=10_000) if with_ties else "exact"
    expected = stats.mannwhitneyu(second, first, alternative=scipys, method=method)
    result = jonckheere_terpstra([first, second], alternative=ours, rng=generator())
    assert result.statistic == expected.statistic
    assert result.p_value == pytest.approx(expected.pvalue)


def test_the_count_of_the_trend_test_is_the_numerator_of_kendalls_tau():
    rng = generator()
    groups = [rng.normal(0.3 * k, size=size) for k, size in enumerate([4, 6, 5])]
    level = np.repeat([0, 1, 2], [4, 6, 5])
    num_pairs = 4 * 6 + 4 * 5 + 6 * 5
    tau_c: Any = stats.kendalltau(level, np.concatenate(groups), variant="c")
    # Stuart's tau-c of n pairs with m = 3 levels is 2 m (concordant - discordant) / (n^2 (m - 1)).
    concordant_minus_discordant = tau_c.statistic * 15**2 * (3 - 1) / (2 * 3)
    result = jonckheere_terpstra(groups, alternative="increasing", rng=generator())
    assert 2 * result.statistic - num_pairs == pytest.approx(concordant_minus_discordant)


def test_a_perfect_order_has_the_smallest_p_value_that_there_is():
    groups = [strictly([1.0, 2.0]), strictly([3.0, 4.0]), strictly([5.0, nan])]
    increasing = jonckheere_terpstra(groups, alternative="increasing", rng=generator())
    assert increasing == (12.0, pytest.approx(1 / 90))  # 6! / (2! 2! 2!) ways to deal
    assert jonckheere_terpstra(groups, alternative="decreasing", rng=generator()).p_value == 1.0


def test_three_replicates_against_three_cannot_go_below_a_tenth():
    groups = [strictly([1.0, 2.0, 3.0]), strictly([7.0, 8.0, nan])]
    assert jonckheere_terpstra(groups, alternative="two-sided", rng=generator()).p_value == pytest.approx(0.1)


def test_censored_replicates_come_last_and_tie_with_each_other():
    result = jonckheere_terpstra(
        [strictly([nan, 5.0]), strictly([nan, nan])], alternative="increasing", rng=generator()
    )
    assert result.statistic == 2 * 0.5 + 2 * 1.0


def test_values_that_are_all_equal_show_no_trend():
    for alternative in ("increasing", "decreasing", "two-sided"):
        result = jonckheere_terpstra([np.full(3, nan)] * 3, alternative=alternative, rng=generator())
        assert result == (13.5, 1.0)


def test_random_permutations_agree_with_all_of_them():
    groups = [strictly(group) for group in ([3.0, 1.0], [2.0, 4.0], [5.0, nan], [3.5, 6.0])]
    exact = jonckheere_terpstra(groups, alternative="increasing", rng=generator()).p_value  # 2,520 ways
    random = jonckheere_terpstra(groups, alternative="increasing", rng=generator(), permutations=2_000)
    assert exact * 2520 == pytest.approx(round(exact * 2520))
    assert random.p_value != exact
    assert random.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2_000))


def test_a_random_p_value_is_never_zero():
    groups = [np.arange(10.0) + 10 * k for k in range(5)]
    result = jonckheere_terpstra(groups, alternative="increasing", rng=generator(), permutations=999)
    assert result == (1000.0, pytest.approx(1 / 1000))


@pytest.mark.parametrize("groups", [[[1.0, 2.0]], [[1.0], []], []])
def test_a_trend_needs_two_groups_with_replicates(groups):
    with pytest.raises(ValueError, match="at least two groups with a replicate each, but got groups of"):
        jonckheere_terpstra([strictly(group) for group in groups], alternative="increasing", rng=generator())


# --- many tests at once -------------------------------------------------------------------------------------


def test_holm_agrees_with_a_known_example():
    """p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") of R."""
    adjusted = holm(np.array([0.01, 0.02, 0.03, 0.04, 0.05]))
    np.testing.assert_allclose(adjusted, [0.05, 0.08, 0.09, 0.09, 0.09])


def literal_holm_rejections(p_values: list[float], level: float) -> set[int]:
    """Step down: reject the smallest while it is at most level / (number of hypotheses left)."""
    left, rejected = list(range(len(p_values))), set()
    while left:
        smallest = min(left, key=lambda k: p_values[k])
        if p_values[smallest] > level / len(left):
            break
        rejected.add(smallest)
        left.remove(smallest)
    return rejected


@given(
    p_values=st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=1, max_size=8),
    level=st.sampled_from([0.0107, 0.0513, 0.211, 0.503]),
)
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values, level):
    adjusted = holm(np.array(p_values))
    assert {k for k, p in enumerate(adjusted) if p <= level} == literal_holm_rejections(p_values, level)
    assert np.all(adjusted >= p_values)
    assert np.all(adjusted <= 1.0)


def test_tests_that_were_not_made_do_not_count():
    np.testing.assert_allclose(holm(np.array([0.04, nan, 0.01])), [0.04, nan, 0.02])
    assert holm(np.array([])).shape == (0,)
