"""Dependence of tokens against literal sums, closed forms, all matrices of the same margins, and planted bits."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import stats

from memray.measures.dependence import (
    Dependence,
    Excess,
    dependence,
    history_information,
    lag_contrast,
    lag_information,
    permuted,
)

LN2 = math.log(2)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ragged(rows: Sequence[Sequence[bool]]) -> tuple[ndarray, ndarray]:
    length = np.array([len(row) for row in rows])
    bits = np.zeros((len(rows), max(length)), dtype=bool)
    for padded, row in zip(bits, rows, strict=True):
        padded[: len(row)] = row
    return bits, length


def independent(rng: np.random.Generator, num_samples: int, num_positions: int) -> tuple[ndarray, ndarray]:
    """Bits of a Rasch model: strong effects of samples and of positions, and nothing else; half of them cut short."""
    length = np.minimum(rng.integers(num_positions // 3, 2 * num_positions, num_samples), num_positions)
    logit = rng.normal(0.5, 1.5, num_samples)[:, None] + rng.normal(0, 1, num_positions)
    is_present = np.arange(num_positions) < length[:, None]
    return (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))) & is_present, length


def copied(
    rng: np.random.Generator, bits: ndarray, length: ndarray, share: float, *, inverted: bool = False
) -> ndarray:
    """Each token repeats the one before it, or does the opposite, with a small probability."""
    copy = bits.copy()
    for position in range(1, bits.shape[1]):
        copies = (rng.random(len(bits)) < share) & (position < length)
        copy[:, position] = np.where(copies, copy[:, position - 1] ^ inverted, copy[:, position])
    return copy


samples = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8)


# --- information ------------------------------------------------------------------------------------------------


def literal_information(pairs: list[tuple[bool, bool]]) -> float:
    if not pairs:
        return math.nan
    n = len(pairs)
    cells, rows, columns = Counter(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    nats = sum(count / n * math.log(count * n / (rows[x] * columns[y])) for (x, y), count in cells.items())
    return (nats - (len(cells) - len(rows) - len(columns) + 1) / (2 * n)) / LN2


@settings(deadline=None, max_examples=60)
@given(rows=samples, lag=st.integers(1, 7))
def test_both_informations_equal_their_literal_sums_over_ragged_samples(rows, lag):
    bits, length = ragged(rows)
    pairs = [(row[j], row[j + lag]) for row in rows for j in range(len(row) - lag)]
    np.testing.assert_allclose(lag_information(bits, length, lag), literal_information(pairs), atol=1e-12)
    pairs = [(all(row[:j]), row[j]) for row in rows for j in range(1, len(row))]
    np.testing.assert_allclose(history_information(bits, length), literal_information(pairs), atol=1e-12)


def test_a_copied_fair_bit_tells_one_bit_and_an_independent_one_nothing_but_for_the_correction():
    all_cells = np.array([[False, False], [False, True], [True, False], [True, True]] * 25)
    length = np.full(100, 2)
    one_parameter = 1 / (2 * 100 * LN2)
    assert lag_information(all_cells, length, 1) == pytest.approx(-one_parameter)
    assert lag_information(all_cells[:, [0, 0]], length, 1) == pytest.approx(1 + one_parameter)
    assert lag_information(np.ones((5, 4), dtype=bool), np.full(5, 4), 2) == 0.0


def test_the_history_of_two_tokens_is_the_first_one():
    bits = generator().random((50, 2)) < 0.6
    assert history_information(bits, np.full(50, 2)) == pytest.approx(lag_information(bits, np.full(50, 2), 1))


def test_independent_bits_have_no_information_in_the_mean():
    rng, num_pairs, count = generator(), 100, 2_000
    values = [lag_information(rng.random((num_pairs, 2)) < 0.5, np.full(num_pairs, 2), 1) for _ in range(count)]
    # Twice the number of pairs times the nats is chi-squared of one degree: its standard deviation is sqrt(2).
    error = math.sqrt(2) / (2 * num_pairs * LN2) / math.sqrt(count)
    assert np.mean(values) == pytest.approx(0.0, abs=4 * error)
    assert 4 * error < 1 / (2 * num_pairs * LN2) / 5, "without its correction it would fail"


def test_samples_of_equal_accuracy_make_independent_bits_tell_all():
    """Why strata do not do: within each, the two tokens of a sample are copies of each other, or opposites."""
    bits = np.array([[False, False], [False, True], [True, False], [True, True]] * 500)
    assert lag_information(bits, np.full(len(bits), 2), 1) == pytest.approx(0.0, abs=1e-3)
    stratum = bits[bits.sum(axis=1) == 1]
    assert lag_information(stratum, np.full(len(stratum), 2), 1) == pytest.approx(1.0, abs=1e-3)


# --- contrast of lags -------------------------------------------------------------------------------------------


def literal_contrast(rows: list[list[bool]], lag: int, far_lag: int) -> float:
    total, freedom = 0.0, 0
    for j in range(max(map(len, rows))):
        reaching = np.array([[row[j], row[j + lag], row[j + far_lag]] for row in rows if len(row) > j + far_lag])
        if len(reaching) > 1:
            covariance = np.cov(reaching.T.astype(float))
            total += (len(reaching) - 1) * (covariance[0, 1] - covariance[0, 2])
            freedom += len(reaching) - 1
    return total / freedom if freedom else math.nan


@settings(deadline=None, max_examples=60)
@given(rows=samples, lag=st.integers(1, 3), further=st.integers(1, 4))
def test_the_contrast_equals_its_literal_covariances_at_the_same_positions_of_the_same_samples(rows, lag, further):
    found = lag_contrast(*ragged(rows), lag, lag + further)
    np.testing.assert_allclose(found, literal_contrast(rows, lag, lag + further), atol=1e-12)


def test_what_samples_differ_in_is_in_no_contrast_and_a_copied_neighbour_is():
    easy_and_hard = np.repeat([[True], [False]], 6, axis=1)
    assert lag_contrast(easy_and_hard, np.full(2, 6), 1, 4) == 0.0
    doubled = np.array([[a, a, b, b] for a in (False, True) for b in (False, True)])
    assert lag_contrast(doubled, np.full(4, 4), 1, 3) == pytest.approx(1 / 3)  # the variance of two of four


# --- matrices with the same margins -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(rows=samples, seed=st.integers(0, 2**32 - 1))
def test_draws_keep_both_margins_and_leave_absent_cells_and_the_input_alone(rows, seed):
    bits, length = ragged(rows)
    before = bits.copy()
    draws = list(permuted(bits, length, generator(seed), num_draws=2))
    assert len(draws) == 2
    for draw in draws:
        np.testing.assert_array_equal(draw.sum(axis=0), bits.sum(axis=0))
        np.testing.assert_array_equal(draw.sum(axis=1), bits.sum(axis=1))
        assert not np.any(draw & (np.arange(bits.shape[1]) >= length[:, None]))
    np.testing.assert_array_equal(bits, before)


def all_of_the_same_margins(bits: ndarray, length: ndarray) -> set[bytes]:
    choices = []
    for row, tokens in zip(bits, length, strict=True):
        chosen = itertools.combinations(range(tokens), int(row.sum()))
        choices.append([np.isin(np.arange(bits.shape[1]), right) for right in chosen])
    matrices = (np.array(rows) for rows in itertools.product(*choices))
    return {matrix.tobytes() for matrix in matrices if np.array_equal(matrix.sum(axis=0), bits.sum(axis=0))}


@pytest.mark.parametrize(
    ("rows", "num_matrices"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 6),
        ([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], 12),
        ([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1], [1, 0]], 14),
        ([[1, 0, 1], [0, 1, 0], [1, 0], [0, 1]], 8),
    ],
    ids=["permutations", "three by four", "ragged", "one column of few"],
)
def test_draws_are_uniform_over_all_matrices_of_the_same_margins(rows, num_matrices):
    bits, length = ragged([[bool(bit) for bit in row] for row in rows])
    possible = all_of_the_same_margins(bits, length)
    assert len(possible) == num_matrices
    counts = Counter(draw.tobytes() for draw in permuted(bits, length, generator(), num_draws=25 * num_matrices))
    assert set(counts) == possible
    # One seed in a thousand would fail for no reason; this one does not.
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_a_single_sample_has_no_other_matrix():
    bits, length = ragged([[True, False, True, True]])
    assert all(np.array_equal(draw, bits) for draw in permuted(bits, length, generator(), 3))
    assert dependence(bits, length, generator(), lags=(1,), far_lag=2, num_draws=4).lags[1].p_value == 1.0


# --- observed against the null ----------------------------------------------------------------------------------


def test_the_excess_and_its_p_value_are_those_of_the_definitions():
    excess = Excess.of(0.5, np.array([0.1, 0.2, 0.5, 0.6]))
    assert excess.null_mean == pytest.approx(0.35)
    assert excess.excess == pytest.approx(0.15)
    assert excess.p_value == (1 + 2) / (1 + 4), "what equals the observed one counts"
    half = stats.t.ppf(0.975, 3) * np.std([0.1, 0.2, 0.5, 0.6], ddof=1) * math.sqrt(1 + 1 / 4)
    assert excess.interval == pytest.approx((0.15 - half, 0.15 + half))


def test_independent_bits_of_unequal_samples_and_positions_show_no_dependence():
    """The p-values of 20 seeds are uniform: at most 0.1 in 2 of them, and in 8 with probability 0.0004."""
    results: list[Dependence] = []
    for seed in range(20):
        rng = generator(seed)
        results.append(dependence(*independent(rng, 80, 8), rng, lags=(1,), far_lag=4, num_draws=9))
    for found in ([each.lags[1] for each in results], [each.history for each in results]):
        p_values = np.array([each.p_value for each in found])
        assert np.mean(p_values) == pytest.approx(0.55, abs=4 * 0.29 / math.sqrt(20))
        assert np.count_nonzero(p_values <= 0.1) < 8
        # Fewer than 15 of 20 intervals of 95 % are right with probability 0.0003.
        assert sum(each.interval.low <= 0 <= each.interval.high for each in found) >= 15
        assert np.mean([each.observed for each in found]) > 0.02, "pooled, they look dependent"


def test_copying_of_one_token_in_twenty_is_found_and_only_where_it_is():
    rng = generator(1)
    bits, length = independent(rng, 2_500, 24)
    found = dependence(copied(rng, bits, length, 0.05), length, rng, lags=(1, 8), far_lag=12, num_draws=29)
    assert found.lags[1].p_value == 1 / 30
    assert found.lags[1].interval.low > 0.002
    assert abs(found.lags[8].excess) < found.lags[1].excess / 3
    assert found.lag_contrast[1].interval.low > 0
    assert abs(found.lag_contrast[8].excess) < found.lag_contrast[1].excess


def test_tokens_that_go_wrong_more_often_after_the_first_error_depend_on_their_history():
    rng = generator(4)
    bits = np.ones((1_000, 12), dtype=bool)
    for position in range(12):
        bits[:, position] = rng.random(1_000) < np.where(bits[:, :position].all(axis=1), 0.9, 0.7)
    found = dependence(bits, np.full(1_000, 12), rng, lags=(1,), far_lag=6, num_draws=19)
    assert found.history.p_value == 1 / 20
    assert found.history.interval.low > 0.002


def test_tokens_that_avoid_each_other_have_a_negative_excess_and_contrast():
    rng = generator(2)
    bits, length = independent(rng, 1_500, 24)
    found = dependence(copied(rng, bits, length, 0.1, inverted=True), length, rng, lags=(1,), num_draws=19)
    assert found.lags[1].interval.high < 0
    assert found.lags[1].p_value == 1.0
    assert found.lag_contrast[1].interval.high < 0


def test_easy_ends_of_samples_of_different_lengths_are_taken_for_dependence():
    """The limit that is stated: margins know no distance from the end."""
    rng = generator(3)
    length = rng.integers(6, 25, 1_500)
    from_end = length[:, None] - np.arange(24)
    bits = (rng.random((1_500, 24)) < np.where(from_end <= 2, 0.95, 0.4)) & (from_end > 0)
    found = dependence(bits, length, rng, lags=(1,), num_draws=19)
    assert found.lags[1].interval.low > 0


def test_what_no_sample_is_long_enough_for_is_missing_and_never_zero():
    bits, length = ragged([[True, False, True], [False, True]])
    found = dependence(bits, length, generator(), lags=(1, 3), num_draws=3)
    assert not math.isnan(found.lags[1].p_value)
    for missing in (found.lags[3], *found.lag_contrast.values()):
        assert np.isnan([missing.observed, missing.excess, missing.p_value, *missing.interval]).all()
    assert math.isnan(history_information(np.ones((3, 1), dtype=bool), np.ones(3, dtype=np.int64)))


def test_a_result_is_reproducible_from_its_generator():
    bits, length = independent(generator(), 40, 8)
    first, again = (dependence(bits, length, generator(5), lags=(1,), far_lag=4, num_draws=5) for _ in range(2))
    assert first == again


def test_contradictory_input_is_refused():
    bits, length = ragged([[True, False, True], [False, True]])
    with pytest.raises(ValueError, match=r"sample 1 of length 2 is right at position 2; set the padding to False"):
        history_information(np.ones_like(bits), length)
    with pytest.raises(ValueError, match=r"must have a length from 0 to 3, but got \[4 2\]"):
        next(permuted(bits, np.array([4, 2]), generator(), 1))
    with pytest.raises(ValueError, match="a lag must be at least 1, the next token, but got 0"):
        lag_information(bits, length, 0)
    with pytest.raises(ValueError, match=r"1 <= lag < far_lag must hold, but got \(lag=2, far_lag=2\)"):
        dependence(bits, length, generator(), lags=(1, 2), far_lag=2)
    with pytest.raises(ValueError, match="at least two draws, but got num_draws=1"):
        dependence(bits, length, generator(), num_draws=1)
