"""Comparisons of two arms against literal ranks, all assignments of signs, and laws of swapping."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import stats

from memray.measures.paired import PairedComparison, UnpairedComparison, mann_whitney, paired_comparison
from memray.measures.statistics import Interval, bootstrap_interval, jonckheere_terpstra


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def values_of(numbers: list[int] | list[float]) -> ndarray:
    return np.array(numbers, dtype=np.float64)


def compare(first: ndarray, second: ndarray) -> PairedComparison:
    return paired_comparison(first, second, generator(), resamples=9)


# Few distinct ones: ties and zeros come up.
pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6)


# --- paired -----------------------------------------------------------------------------------------------------


def literal_ranks(sizes: list[float]) -> list[float]:
    return [sum(other < size for other in sizes) + (sum(other == size for other in sizes) + 1) / 2 for size in sizes]


def literal_sums(differences: list[float]) -> tuple[float, float]:
    """R+ and R-: zeros are ranked, and then they are left out (Pratt 1959)."""
    ranks = literal_ranks([abs(difference) for difference in differences])
    above = sum(rank for rank, difference in zip(ranks, differences, strict=True) if difference > 0)
    below = sum(rank for rank, difference in zip(ranks, differences, strict=True) if difference < 0)
    return above, below


def literal_p_value(differences: list[float]) -> float:
    """Over all signs that the differences could have had; twice the smaller tail."""
    sizes = [abs(difference) for difference in differences]
    signs = itertools.product((-1, 1), repeat=len(sizes))
    sums = np.array([literal_sums([sign * size for sign, size in zip(s, sizes, strict=True)])[0] for s in signs])
    observed = literal_sums(differences)[0]
    return float(min(1.0, 2 * min(np.mean(sums >= observed - 1e-9), np.mean(sums <= observed + 1e-9))))


@settings(deadline=None, max_examples=40)
@given(values=pairs)
def test_the_paired_comparison_equals_its_literal_definition(values):
    found = compare(*values_of(values).T)
    differences = [float(x - y) for x, y in values]
    above, below = literal_sums(differences)
    assert found.effect == pytest.approx((above - below) / (above + below) if above + below else 0.0)
    assert found.p_value == pytest.approx(literal_p_value(differences))
    assert (found.num_pairs, found.num_zeros) == (len(values), differences.count(0.0))


def test_the_p_value_of_many_pairs_with_zeros_is_curetons():
    rng = generator()
    differences = rng.integers(-3, 5, 200).astype(float)
    above, below = literal_sums([*differences])
    n, num_zeros = len(differences), np.count_nonzero(differences == 0)
    mean = (n * (n + 1) - num_zeros * (num_zeros + 1)) / 4
    variance = (n * (n + 1) * (2 * n + 1) - num_zeros * (num_zeros + 1) * (2 * num_zeros + 1)) / 24
    _, ties = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    variance -= np.sum(ties**3 - ties) / 48
    assert mean == (above + below) / 2
    expected = 2 * stats.norm.sf(abs(above - mean) / math.sqrt(variance))
    assert compare(differences, np.zeros(n)).p_value == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(values=pairs)
def test_swapping_the_arms_turns_the_effect_and_keeps_the_p_value(values):
    first, second = values_of(values).T
    found, swapped = compare(first, second), compare(second, first)
    assert swapped.effect == -found.effect
    assert swapped.p_value == pytest.approx(found.p_value)
    assert -1.0 <= found.effect <= 1.0


@settings(deadline=None, max_examples=40)
@given(values=pairs, divisor=st.sampled_from([3.0, 7.0, 1e-4, 1e6]))
def test_means_over_seeds_tie_where_their_sums_do(values, divisor):
    """1 - 2/3 and 2/3 - 1/3 are equal on paper alone."""
    assert 3 / 3 - 2 / 3 != 2 / 3 - 1 / 3
    first, second = values_of(values).T
    found, expected = compare(first / divisor, second / divisor), compare(first, second)
    assert found._replace(interval=expected.interval) == expected
    assert found.interval == pytest.approx(expected.interval, nan_ok=True)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_arms_that_differ_one_way_alone_have_the_largest_effect_and_the_smallest_p_value(count):
    smaller = generator().permutation(np.arange(float(count)))
    found = compare(2 * smaller + 1, smaller)
    assert found.effect == 1.0
    assert found.p_value == pytest.approx(min(1.0, 2 * 0.5**count))


def test_a_tail_that_moves_alone_has_a_large_effect_and_zeros_say_that_the_rest_does_not():
    first, second = np.zeros(1_000), np.zeros(1_000)
    first[:20] = np.arange(1.0, 21.0)
    found = paired_comparison(first, second, generator(), resamples=99)
    assert found.effect == 1.0
    assert found.p_value < 1e-4
    assert found.num_zeros == 980


def test_arms_without_a_difference_have_no_effect():
    values = generator().normal(size=12)
    assert compare(values, values) == PairedComparison(0.0, Interval(0.0, 0.0), 1.0, 12, 12)
    assert compare(np.zeros(3), np.zeros(3)).p_value == 1.0


@pytest.mark.parametrize("num_zeros", [0, 4])
def test_the_interval_is_the_bootstrap_of_ranks_that_are_taken_anew(num_zeros):
    differences = np.concatenate([generator().integers(-4, 9, 25).astype(float), np.zeros(num_zeros)])

    def effect(resampled: ndarray, axis: int) -> ndarray:
        ranks = stats.rankdata(np.abs(resampled), axis=axis) * (resampled != 0)
        return np.sum(np.sign(resampled) * ranks, axis=axis) / np.sum(ranks, axis=axis)

    found = paired_comparison(differences, np.zeros_like(differences), generator(), resamples=499)
    expected = bootstrap_interval(differences, statistic=effect, rng=generator(), resamples=499)
    assert found.interval == pytest.approx(expected)
    assert found.interval.low < found.effect < found.interval.high


def test_the_interval_covers_no_effect_as_often_as_it_says():
    rng, hits = generator(), 0
    for _ in range(300):
        first, second = rng.geometric(0.4, size=(2, 60)).astype(float)
        low, high = paired_comparison(first, second, rng, resamples=199).interval
        hits += low <= 0.0 <= high
    # A percentile bootstrap of 60 pairs covers a little less than 0.95.
    assert hits / 300 == pytest.approx(0.94, abs=4 * math.sqrt(0.95 * 0.05 / 300))


def test_one_pair_has_an_effect_and_no_interval():
    found = compare(values_of([2.0]), values_of([1.0]))
    assert found.effect == 1.0
    assert math.isnan(found.interval.low)


# --- unpaired ---------------------------------------------------------------------------------------------------

arms = st.lists(st.integers(0, 6), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(first=arms, second=arms)
def test_the_unpaired_effect_counts_pairs_and_swapping_turns_it(first, second):
    found = mann_whitney(values_of(first), values_of(second))
    signs = [(x > y) - (x < y) for x, y in itertools.product(first, second)]
    assert found.effect == pytest.approx(np.mean(signs))
    assert found.statistic == sum((sign + 1) / 2 for sign in signs)
    swapped = mann_whitney(values_of(second), values_of(first))
    assert swapped.effect == pytest.approx(-found.effect)
    assert swapped.p_value == pytest.approx(found.p_value)


def test_the_unpaired_p_value_of_few_samples_is_that_of_all_ways_to_deal_them():
    rng = generator()
    first, second = rng.normal(size=5), rng.normal(0.9, size=6)
    found = mann_whitney(first, second)
    exact = jonckheere_terpstra([second, first], alternative="two-sided", rng=rng, permutations=462)  # 11! / (5! 6!)
    assert (found.statistic, found.p_value) == pytest.approx(tuple(exact))


def test_regimes_that_lie_apart_have_the_largest_effect_and_equal_ones_none():
    apart = mann_whitney(values_of([7.0, 8.0, 9.0]), values_of([1.0, 2.0, 3.0]))
    assert (apart.effect, apart.statistic) == (1.0, 9.0)
    assert apart.p_value == pytest.approx(2 / 20)
    assert mann_whitney(np.ones(4), np.ones(3)) == UnpairedComparison(0.0, 6.0, 1.0)
    assert mann_whitney(np.zeros(40), np.zeros(30)).p_value == 1.0


# --- refusals ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="both arms must have the same samples, but got 3 and 2; leave out"):
        compare(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="the first has 0 of which 0 are not finite"):
        compare(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="the second has 3 of which 1 are not finite"):
        compare(np.zeros(3), values_of([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="the second has 0 of which"):
        mann_whitney(np.zeros(3), np.zeros(0))
