"""Match lengths against literal definitions, scipy's survival curve and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from memray.measures.match_length import Correctness, Hazards, extraction_probability, num_draws_needed

nan, inf = math.nan, math.inf

bits_of_samples = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8)


def correctness_of(samples: list[list[bool]]) -> Correctness:
    return Correctness(np.array(list(itertools.chain(*samples))), np.array([len(sample) for sample in samples]))


def literal_match(sample: list[bool]) -> int:
    return next((j for j, right in enumerate(sample) if not right), len(sample))


# --- counting ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(samples=bits_of_samples)
def test_the_run_from_every_token_is_counted_within_its_sample(samples):
    correctness = correctness_of(samples)
    expected = [literal_match(sample[begin:]) for sample in samples for begin in range(len(sample))]
    assert correctness.run_lengths().tolist() == expected
    assert correctness.num_match.tolist() == [literal_match(sample) for sample in samples]
    assert correctness.is_censored.tolist() == [all(sample) for sample in samples]
    assert correctness.num_samples == len(samples)


@settings(deadline=None)
@given(samples=bits_of_samples)
def test_the_matrix_holds_each_token_once(samples):
    bits, is_there = correctness_of(samples).as_matrix()
    assert [row[there].tolist() for row, there in zip(bits, is_there, strict=True)] == samples
    assert not np.any(bits & ~is_there)


@pytest.mark.parametrize(
    ("num_tokens", "length", "complaint"),
    [
        (3, [2, 2], "add up to the tokens, but got 4 for 3"),
        (2, [2, 0], "a token in each reference"),
        (0, [], "lengths"),
    ],
)
def test_tokens_and_lengths_that_do_not_fit_are_refused(num_tokens, length, complaint):
    with pytest.raises(ValueError, match=complaint):
        Correctness(np.ones(num_tokens, dtype=bool), np.array(length, dtype=int))


@settings(deadline=None)
@given(samples=bits_of_samples)
def test_hazards_count_what_their_names_say(samples):
    hazards = Hazards.of(correctness_of(samples))
    for j in range(max(map(len, samples))):
        there = [sample for sample in samples if len(sample) > j]
        at_risk = [sample for sample in there if all(sample[:j])]
        assert hazards.num_there[j] == len(there)
        assert hazards.num_right_there[j] == sum(sample[j] for sample in there)
        assert hazards.num_at_risk[j] == len(at_risk)
        assert hazards.num_right[j] == sum(sample[j] for sample in at_risk)
    np.testing.assert_allclose(hazards.marginal, hazards.num_right_there / hazards.num_there)


@settings(deadline=None)
@given(samples=bits_of_samples)
def test_without_censoring_the_product_of_conditionals_is_the_empirical_distribution(samples):
    ended = [[*sample, False] for sample in samples]
    hazards = Hazards.of(correctness_of(ended))
    matches = [literal_match(sample) for sample in ended]
    longest = max(map(len, ended))
    np.testing.assert_allclose(hazards.pmf, [matches.count(n) / len(ended) for n in range(longest)], atol=1e-12)
    assert hazards.survival[-1] == 0.0


@settings(deadline=None)
@given(samples=bits_of_samples)
def test_survival_under_censoring_is_that_of_scipy(samples):
    """A match that ends with its reference is not at risk at the next token: censored just before its length."""
    correctness = correctness_of(samples)
    matches, is_censored = correctness.num_match.astype(float), correctness.is_censored
    data = stats.CensoredData(uncensored=matches[~is_censored], right=matches[is_censored] - 0.5)
    curve = stats.ecdf(data).sf
    survival = Hazards.of(correctness).survival
    known = ~np.isnan(survival)
    expected = curve.evaluate(np.arange(len(survival)) - 1.0)
    np.testing.assert_allclose(survival[known], np.asarray(expected)[known], atol=1e-12)


def test_survival_is_unknown_behind_the_last_sample_and_zero_behind_the_last_match():
    all_censored = correctness_of([[True], [True, True], [False, True, True]])
    np.testing.assert_equal(Hazards.of(all_censored).survival, [1.0, 2 / 3, 2 / 3, nan])
    np.testing.assert_equal(Hazards.of(all_censored).conditional, [2 / 3, 1.0, nan])
    none_left = correctness_of([[False, True, True], [True, False, True]])
    np.testing.assert_equal(Hazards.of(none_left).survival, [1.0, 0.5, 0.0, 0.0])


# --- sampling at temperature 1 ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(p=st.floats(0.001, 0.999), num_draws=st.integers(1, 200))
def test_extraction_is_the_complement_of_missing_every_time(p, num_draws):
    value = extraction_probability(np.log([p]), num_draws)
    np.testing.assert_allclose(value, 1 - (1 - p) ** num_draws, rtol=1e-11)


@settings(deadline=None)
@given(p=st.floats(0.001, 0.999), probability=st.floats(0.001, 0.999))
def test_the_draws_needed_are_the_fewest(p, probability):
    needed = num_draws_needed(np.log([p]), probability)[0]
    literal = next(n for n in itertools.count(1) if 1 - (1 - p) ** n >= probability - 1e-10)
    assert needed == literal or abs(1 - (1 - p) ** min(needed, literal) - probability) < 1e-9


@pytest.mark.parametrize(
    ("p", "probability", "needed"), [(0.1, 0.19, 2), (0.5, 0.75, 2), (0.2, 0.488, 3), (0.5, 0.5, 1)]
)
def test_a_probability_that_is_reached_exactly_needs_no_further_draw(p, probability, needed):
    assert num_draws_needed(np.log([p]), probability).tolist() == [needed]


def test_certain_and_impossible_and_underflowing_references_are_handled():
    log_prob = np.array([0.0, -inf, -60.0, -720.0, -5_000.0])
    np.testing.assert_allclose(
        extraction_probability(log_prob, 10**6), [1.0, 0.0, 1e6 * math.exp(-60), 1e6 * math.exp(-720), 0.0], rtol=1e-10
    )
    # e^-5000 is no float, but so many draws find it two times in seven.
    expected = -math.expm1(-math.exp(2171 * math.log(10) - 5_000))
    assert extraction_probability(np.array([-5_000.0]), 10**2171)[0] == pytest.approx(expected, rel=1e-9)
    needed = num_draws_needed(log_prob, 0.5)
    np.testing.assert_allclose(needed[:4], [1.0, inf, math.log(2) * math.exp(60), inf], rtol=1e-10)


def test_draws_cannot_be_asked_of_what_is_no_probability():
    with pytest.raises(ValueError, match=r"at most 0, but got 0\.1; clip"):
        extraction_probability(np.array([0.1]), 1)
    with pytest.raises(ValueError, match="num_draws=0"):
        extraction_probability(np.array([-0.1]), 0)
    with pytest.raises(ValueError, match=r"inside \(0, 1\), but got 1"):
        num_draws_needed(np.array([-0.1]), 1.0)
