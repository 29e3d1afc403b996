"""Curves of match lengths against literal definitions, other optimisers, enumeration and planted curves."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import integrate, optimize, stats

from memray.measures.match_curves import (
    MODELS,
    MatchFit,
    ModelName,
    fit,
    fit_all,
    linear_survival,
    within_sample_slope,
)
from memray.measures.match_length import Correctness, Hazards

from .test_match_length import correctness_of

nan, inf = math.nan, math.inf

PLANTED: dict[ModelName, MatchFit] = {
    "geometric": MatchFit(name="geometric", parameters={"p": 0.8}, log_likelihood=nan),
    "linear": MatchFit(name="linear", parameters={"alpha": -0.02, "p0": 0.95}, log_likelihood=nan),
    "beta_geometric": MatchFit(name="beta_geometric", parameters={"a": 2.0, "b": 1.0}, log_likelihood=nan),
}
RISING = MatchFit(name="linear", parameters={"alpha": 0.02, "p0": 0.7}, log_likelihood=nan)


def simulated(chance: ndarray, length: ndarray, rng: np.random.Generator) -> Correctness:
    """Independent tokens of the given chance, samples by positions."""
    is_there = np.arange(chance.shape[1]) < length[:, None]
    return Correctness((rng.random(chance.shape) < chance)[is_there], length)


def literal_curve(fitted: MatchFit, j: int) -> float:
    parameters = fitted.parameters
    if fitted.name == "geometric":
        return parameters["p"]
    if fitted.name == "linear":
        return min(max(parameters["alpha"] * j + parameters["p0"], 1e-6), 1 - 1e-6)
    return (parameters["a"] + j - 1) / (parameters["a"] + parameters["b"] + j - 1)


@settings(deadline=None)
@given(alpha=st.floats(-0.6, 0.6), p0=st.floats(-1.0, 2.0))
def test_linear_survival_is_the_literal_product(alpha, p0):
    factors = [min(max(alpha * j + p0, 1e-6), 1 - 1e-6) for j in range(1, 41)]
    literal = np.cumprod([1.0, *factors])
    np.testing.assert_allclose(linear_survival(np.arange(41), alpha, p0), literal, rtol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "p0"), [(0.01, 0.2), (-0.01, 0.7), (1e-7, 0.5), (-1e-9, 0.5), (-1e-13, 0.5), (0.0, 0.5)]
)
def test_linear_survival_is_the_product_where_the_line_stays_inside(alpha, p0):
    literal = np.cumprod([1.0, *(alpha * j + p0 for j in range(1, 61))])
    np.testing.assert_allclose(linear_survival(np.arange(61), alpha, p0), literal, rtol=1e-6)


def test_linear_survival_has_the_closed_form_of_the_paper():
    alpha, p0, n = 0.03, 0.2, 12
    closed = alpha**n * math.gamma(n + 1 + p0 / alpha) / math.gamma(1 + p0 / alpha)
    assert linear_survival(np.array([n]), alpha, p0)[0] == pytest.approx(closed, rel=1e-10)


@pytest.mark.parametrize("planted", [*PLANTED.values(), RISING])
def test_survival_is_the_product_of_the_curve(planted):
    literal = np.cumprod([1.0, *(literal_curve(planted, j) for j in range(1, 51))])
    np.testing.assert_allclose(planted.survival(np.arange(51)), literal, rtol=1e-9)


def test_the_beta_geometric_is_the_mean_over_samples_that_differ():
    planted = PLANTED["beta_geometric"]
    for n in (0, 1, 5, 20):
        mean, _ = integrate.quad(lambda p, n=n: p**n * stats.beta.pdf(p, 2.0, 1.0), 0.0, 1.0)
        assert planted.survival(np.array([n]))[0] == pytest.approx(mean)


matches_and_lengths = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda pair: (min(pair), pair[0])), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=6)
@given(samples=matches_and_lengths)
def test_the_log_likelihood_is_that_of_each_match_one_by_one(samples):
    for fitted in fit_all(np.array([n for n, _ in samples]), np.array([length for _, length in samples])).values():
        literal = 0.0
        for n, length in samples:
            literal += sum(math.log(literal_curve(fitted, j)) for j in range(1, n + 1))
            literal += math.log(1.0 - literal_curve(fitted, n + 1)) if n < length else 0.0
        assert fitted.log_likelihood == pytest.approx(literal, rel=1e-6, abs=1e-6)
        assert fitted.aic == pytest.approx(2 * len(fitted.parameters) - 2 * literal, rel=1e-6, abs=1e-5)


@settings(deadline=None)
@given(samples=matches_and_lengths)
def test_the_geometric_has_its_closed_form(samples):
    num_tokens = sum(n for n, _ in samples)
    num_wrong = sum(n < length for n, length in samples)
    fitted = fit("geometric", np.array([n for n, _ in samples]), np.array([length for _, length in samples]))
    assert fitted.parameters["p"] == pytest.approx(num_tokens / (num_tokens + num_wrong))


@pytest.mark.parametrize("planted", [*PLANTED.values(), RISING])
@pytest.mark.parametrize("num_samples", [8, 60])
def test_no_other_optimiser_finds_a_better_curve(planted, num_samples):
    rng = np.random.default_rng(num_samples)
    length = rng.integers(2, 30, num_samples)
    num_match = planted.draw(length, rng)
    positions = np.arange(1, 31)
    right = np.array([np.sum(num_match >= j) for j in positions])
    wrong = np.array([np.sum((num_match == j - 1) & (length >= j)) for j in positions])

    def badness(curve: ndarray) -> float:
        curve = np.clip(curve, 1e-6, 1 - 1e-6)
        return -float(np.sum(right * np.log(curve) + wrong * np.log1p(-curve)))

    def line(end: ndarray) -> float:
        return badness(end[0] + (end[1] - end[0]) * (positions - 1) / 5)

    def mixture(logs: ndarray) -> float:
        a, b = np.exp(logs)
        return badness((a + positions - 1) / (a + b + positions - 1))

    rivals: list[tuple[ModelName, Callable[[ndarray], float], tuple[float, float]]] = [
        ("linear", line, (-1.0, 2.0)),
        ("beta_geometric", mixture, (-8.0, 8.0)),
    ]
    for name, function, bounds in rivals:
        rival = optimize.differential_evolution(function, [bounds, bounds], rng=0, tol=1e-8, maxiter=40, popsize=10)
        assert fit(name, num_match, length).log_likelihood > -rival.fun - 1e-3


@pytest.mark.parametrize("planted", [*PLANTED.values(), RISING])
def test_draws_follow_the_survival_and_stop_at_the_reference(planted):
    num_draws = 20_000
    length = np.repeat([7, 40], num_draws)
    drawn = planted.draw(length, np.random.default_rng(0))
    assert drawn[:num_draws].max() <= 7
    for part, longest in ((drawn[:num_draws], 7), (drawn[num_draws:], 40)):
        n = np.arange(longest + 1)
        expected = planted.survival(n)
        frequency = np.array([np.mean(part >= each) for each in n])
        assert np.all(np.abs(frequency - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / num_draws) + 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_planted_curves_are_recovered_and_found_best(name: ModelName):
    """Chance prefers another to the geometric in a seventh of the draws, of 8 in 1.1 +- 1.0; never to the others."""
    times_best, estimates = 0, []
    length = np.random.default_rng(1).integers(10, 60, 1_000)
    for seed in range(100, 108):
        fits = fit_all(PLANTED[name].draw(length, np.random.default_rng(seed)), length)
        times_best += min(fits.values(), key=lambda fitted: fitted.aic).name == name
        estimates.append(list(fits[name].parameters.values()))
    assert times_best >= (5 if name == "geometric" else 8)
    spread = np.std(estimates, axis=0, ddof=1) / math.sqrt(8)
    assert np.all(np.abs(np.mean(estimates, axis=0) - list(PLANTED[name].parameters.values())) < 4.5 * spread)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_match", [[0, 0, 0], [5, 3, 1]])
def test_all_wrong_and_all_right_samples_have_a_fit(name: ModelName, num_match: list[int]):
    length = np.array([5, 3, 1])
    fitted = fit(name, np.array(num_match), length)
    assert fitted.log_likelihood == pytest.approx(0.0, abs=1e-4)
    assert fitted.draw(length, np.random.default_rng(0)).tolist() == num_match


@pytest.mark.parametrize(("num_match", "length"), [([3], [2]), ([-1], [2]), ([0], [0]), ([], [])])
def test_matches_that_cannot_be_are_refused(num_match, length):
    with pytest.raises(ValueError, match="must"):
        fit("geometric", np.array(num_match, dtype=int), np.array(length, dtype=int))


# --- within samples ---------------------------------------------------------------------------------------------


def literal_slope(samples: list[list[bool]]) -> tuple[float, float]:
    """The conditional likelihood by enumeration: its maximum, and minus its curvature there."""

    def badness(slope: float) -> float:
        total = 0.0
        for sample in samples:
            sums = [sum(chosen) for chosen in itertools.combinations(range(1, len(sample) + 1), sum(sample))]
            observed = sum(j for j, right in enumerate(sample, start=1) if right)
            total -= slope * observed - math.log(sum(math.exp(slope * each) for each in sums))
        return total

    best = optimize.minimize_scalar(badness, bracket=(-0.5, 0.5), options={"xtol": 1e-10})
    step = 1e-3
    curvature = (badness(best.x + step) - 2 * best.fun + badness(best.x - step)) / step**2
    return best.x, curvature


@settings(deadline=None, max_examples=40)
@given(samples=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_slope_is_that_of_the_enumerated_conditional_likelihood(samples):
    result = within_sample_slope(correctness_of(samples))
    assert result.num_samples == sum(0 < sum(sample) < len(sample) for sample in samples)
    if math.isfinite(result.slope):
        slope, curvature = literal_slope(samples)
        assert result.slope == pytest.approx(slope, abs=1e-5)
        assert result.standard_error >= 1 / math.sqrt(curvature) * (1 - 1e-3)
        assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(result.slope) / result.standard_error))


def logistic_samples(slope: float, spread: float, *, num_samples: int = 400, num_tokens: int = 40) -> Correctness:
    rng = np.random.default_rng(3)
    position = np.arange(1, num_tokens + 1)
    level = rng.normal(0.0, spread, (num_samples, 1))
    chance = 1 / (1 + np.exp(-level - slope * (position - num_tokens / 2)))
    return simulated(chance, rng.integers(10, num_tokens + 1, num_samples), rng)


@pytest.mark.parametrize("slope", [-0.08, 0.03, 0.2])
def test_a_planted_slope_is_recovered_whatever_the_levels(slope):
    result = within_sample_slope(logistic_samples(slope, spread=2.0))
    assert result.slope == pytest.approx(slope, abs=4 * result.standard_error)
    assert result.standard_error < 0.006
    assert result.p_value < 1e-4


def test_samples_that_differ_make_the_pooled_hazard_rise_but_not_the_slope():
    correctness = logistic_samples(0.0, spread=2.0)
    conditional = Hazards.of(correctness).conditional
    assert conditional[8] > conditional[0] + 0.2
    result = within_sample_slope(correctness)
    assert abs(result.slope) < 4 * result.standard_error
    assert result.p_value > 0.01


def test_the_slope_tells_apart_what_no_match_lengths_can():
    """Samples that differ, and tokens that get easier for all alike by the same curve."""
    rng = np.random.default_rng(5)
    length, position = np.full(1_500, 30), np.arange(1, 31)
    differing = simulated(np.repeat(rng.beta(2.0, 1.0, (1_500, 1)), 30, axis=1), length, rng)
    easing = simulated(np.broadcast_to((1 + position) / (2 + position), (1_500, 30)), length, rng)
    for correctness in (differing, easing):
        fits = fit_all(correctness.num_match, correctness.length)
        assert min(fits.values(), key=lambda fitted: fitted.aic).name == "beta_geometric"
    assert within_sample_slope(differing).p_value > 0.01
    assert within_sample_slope(easing).slope > 0.05


def test_clustered_errors_widen_the_standard_error():
    rng = np.random.default_rng(7)
    length = np.full(1_000, 40)
    blocks = simulated(np.full((1_000, 10), 0.5), np.full(1_000, 10), rng).as_matrix()[0]
    clustered = Correctness(np.repeat(blocks, 4, axis=1).ravel(), length)
    independent = simulated(np.full((1_000, 40), 0.5), length, rng)
    # Four copies of a token have four times the variance of four tokens, and the mean of right times wrong, by which
    # information is measured, is 16 x 22.5 instead of 390. The scatter of 1,000 scores is known to 2 %.
    ratio = within_sample_slope(clustered).standard_error / within_sample_slope(independent).standard_error
    assert ratio == pytest.approx(2.0 * 390 / 360, rel=0.08)
    assert within_sample_slope(clustered).p_value > 0.01


def test_only_the_first_tokens_are_used():
    correctness = logistic_samples(0.1, spread=1.0)
    bits, is_there = correctness.as_matrix()
    short = Correctness(bits[:, :12][is_there[:, :12]], np.minimum(correctness.length, 12))
    assert within_sample_slope(correctness, num_tokens=12) == pytest.approx(within_sample_slope(short))
    with pytest.raises(ValueError, match="num_tokens=1"):
        within_sample_slope(correctness, num_tokens=1)


def test_a_slope_without_a_finite_maximum_or_without_samples_is_said_to_be_so():
    rising = within_sample_slope(correctness_of([[False, True, True], [False, True]]))
    np.testing.assert_equal(tuple(rising), (inf, nan, nan, 2))
    falling = within_sample_slope(correctness_of([[True, False]]))
    np.testing.assert_equal(tuple(falling), (-inf, nan, nan, 1))
    nothing = within_sample_slope(correctness_of([[True, True], [False], [False, False]]))
    np.testing.assert_equal(tuple(nothing), (nan, nan, nan, 0))
