"""Skew against scipy and numpy, enumeration of every probe, and planted distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import stats

from memray.measures.match_curves import MatchFit, fit
from memray.measures.skew import (
    LARGEST_SHARE,
    MIN_SAMPLES,
    bootstrap_intervals,
    describe,
    dispersion_against_geometric,
    expected_max,
    max_quantile,
    miss_probability,
    skewness_reproduced,
)

nan = math.nan

GEOMETRIC = MatchFit(name="geometric", parameters={"p": 0.8}, log_likelihood=nan)
DIFFERING = MatchFit(name="beta_geometric", parameters={"a": 1.0, "b": 2.0}, log_likelihood=nan)

some_matches = st.lists(st.integers(0, 12), min_size=1, max_size=40)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lengths(num_samples: int) -> ndarray:
    return generator(9).integers(20, 80, num_samples)


# --- describing -------------------------------------------------------------------------------------------------


def literal_gini(matches: list[int]) -> float:
    differences = sum(abs(x - y) for x, y in itertools.product(matches, repeat=2)) / len(matches) ** 2
    return differences / (2 * sum(matches) / len(matches))


@settings(deadline=None)
@given(matches=some_matches)
def test_the_description_is_that_of_numpy_scipy_and_the_definitions(matches):
    num_match, length = np.array(matches), np.full(len(matches), 12)
    described = describe(num_match, length)
    assert described["match/mean"] == pytest.approx(np.mean(matches))
    for key, q in (("median", 0.5), ("q90", 0.9), ("q95", 0.95), ("q99", 0.99)):
        assert described[f"match/{key}"] == pytest.approx(np.quantile(matches, q))
    assert described["match/max"] == max(matches)
    assert described["match/censored"] == pytest.approx(matches.count(12) / len(matches))
    assert described["match/zero"] == pytest.approx(matches.count(0) / len(matches))
    if len(set(matches)) > 1:
        assert described["match/skewness"] == pytest.approx(stats.skew(num_match), abs=1e-9)
        assert described["match/gini"] == pytest.approx(literal_gini(matches))
        assert described["match/top_share"] == pytest.approx(max(matches) / sum(matches))


@pytest.mark.parametrize(("num_samples", "num_top"), [(1, 1), (99, 1), (199, 1), (200, 2), (350, 3)])
def test_the_top_is_one_percent_of_the_samples_and_at_least_one(num_samples, num_top):
    num_match = DIFFERING.draw(lengths(num_samples), generator())
    num_match[0] = 7
    held = np.sort(num_match)[::-1][:num_top].sum() / num_match.sum()
    assert describe(num_match, lengths(num_samples))["match/top_share"] == pytest.approx(held)


def test_a_distribution_without_spread_or_without_tokens_has_no_skewness():
    equal = describe(np.full(100, 3), np.full(100, 5))
    assert math.isnan(equal["match/skewness"])
    assert equal["match/gini"] == 0.0
    assert equal["match/top_share"] == pytest.approx(0.01)
    nothing = describe(np.zeros(4, dtype=int), np.full(4, 5))
    assert nothing["match/zero"] == 1.0
    for key in ("match/skewness", "match/gini", "match/top_share"):
        assert math.isnan(nothing[key])


def test_one_sample_that_holds_everything_is_as_unequal_as_can_be():
    described = describe(np.array([0] * 9 + [5]), np.full(10, 5))
    assert described["match/gini"] == pytest.approx(0.9)
    assert described["match/top_share"] == 1.0


def test_matches_beyond_their_references_are_refused_everywhere():
    num_match, length = np.array([3]), np.array([2])
    for call in (
        lambda: describe(num_match, length),
        lambda: bootstrap_intervals(num_match, length, rng=generator()),
        lambda: dispersion_against_geometric(num_match, length, generator()),
        lambda: skewness_reproduced(num_match, length, GEOMETRIC, generator()),
    ):
        with pytest.raises(ValueError, match=r"0 <= num_match <= length .*num_match=\[3\], length=\[2\]"):
            call()


# --- intervals --------------------------------------------------------------------------------------------------


def intervals_of(num_samples: int, *, seed: int = 0):
    length = lengths(num_samples)
    return bootstrap_intervals(DIFFERING.draw(length, generator(seed)), length, rng=generator(), resamples=499)


def test_only_what_has_a_valid_interval_gets_one():
    always = {"match/mean", "match/gini", "match/censored", "match/zero"}
    assert intervals_of(19) == {}
    assert set(intervals_of(39)) == always
    assert set(intervals_of(400)) == always | {"match/median", "match/q90", "match/q95"}
    assert set(intervals_of(1_999)) == always | {"match/median", "match/q90", "match/q95"}
    every = set(intervals_of(5_000))
    assert every == always | set(MIN_SAMPLES)
    assert "match/max" not in every


def test_the_quantiles_with_an_interval_have_twenty_samples_above_them():
    for key, q in (("median", 0.5), ("q90", 0.9), ("q95", 0.95), ("q99", 0.99)):
        assert MIN_SAMPLES[f"match/{key}"] * (1 - q) == pytest.approx(20)


def test_drawing_values_is_drawing_samples():
    """Bounds of 2,000 resamples each: they agree within a tenth of the interval's width."""
    length = lengths(500)
    num_match = DIFFERING.draw(length, generator())
    intervals = bootstrap_intervals(num_match, length, rng=generator())
    rows = num_match[generator(1).integers(500, size=(2_000, 500))]
    tops = np.sort(rows, axis=1)
    rank = np.arange(1, 501)
    literal = {
        "match/mean": rows.mean(axis=1),
        "match/zero": (rows == 0).mean(axis=1),
        "match/gini": (tops @ (2 * rank - 501)) / (500 * rows.sum(axis=1)),
        "match/q90": np.quantile(rows, 0.9, axis=1),
    }
    for key, resampled in literal.items():
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert intervals[key] == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_interval_of_the_censored_share_is_that_of_a_proportion():
    length = np.full(1_000, 4)
    low, high = bootstrap_intervals(np.repeat([4, 1], [200, 800]), length, rng=generator())["match/censored"]
    expected = stats.binom.ppf([0.025, 0.975], 1_000, 0.2) / 1_000
    assert (low, high) == pytest.approx(expected, abs=0.004)


def test_intervals_cover_the_mean_and_the_gini_as_often_as_they_say():
    """95 % of 100 within four standard errors of 2.2 %."""
    large = DIFFERING.draw(np.full(2_000_000, 40), generator(1))
    truth = describe(large, np.full(len(large), 40))
    hits = dict.fromkeys(("match/mean", "match/gini", "match/zero"), 0)
    length = np.full(1_000, 40)
    for seed in range(100):
        num_match = DIFFERING.draw(length, generator(seed))
        intervals = bootstrap_intervals(num_match, length, rng=generator(), resamples=199)
        for key in hits:
            hits[key] += intervals[key].low <= truth[key] <= intervals[key].high
    assert all(hit / 100 >= 0.86 for hit in hits.values())


# --- probes -----------------------------------------------------------------------------------------------------


def test_a_probe_of_two_hundred_misses_the_ten_worst_of_all_four_times_out_of_five():
    exact = math.comb(9_713, 200) / math.comb(9_723, 200)
    assert float(miss_probability(9_723, 10, 200)) == pytest.approx(exact, rel=1e-10)
    assert exact == pytest.approx(0.812, abs=5e-4)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_the_miss_probability_counts_probes(num_samples):
    for k, z in itertools.product(range(num_samples + 1), repeat=2):
        probes = list(itertools.combinations(range(num_samples), z))
        missing = sum(not set(probe) & set(range(k)) for probe in probes)
        assert float(miss_probability(num_samples, k, z)) == pytest.approx(missing / len(probes))


def test_the_miss_probability_is_the_hypergeometric_one():
    k, z = np.array([[0], [1], [100], [9_000]]), np.array([0, 1, 200, 1_944, 9_723])
    np.testing.assert_allclose(miss_probability(9_723, k, z), stats.hypergeom.pmf(0, 9_723, k, z), rtol=1e-9)


def test_numbers_missed_and_sizes_broadcast():
    table = miss_probability(50, np.array([[1], [5]]), np.array([1, 10, 50]))
    assert table.shape == (2, 3)
    np.testing.assert_allclose(table[0], [0.98, 0.8, 0.0])


@settings(deadline=None)
@given(matches=st.lists(st.integers(0, 6), min_size=1, max_size=7), probability=st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_the_distribution_of_the_maximum_is_that_of_all_probes(matches, probability):
    values, sizes = np.array(matches), np.arange(1, len(matches) + 1)
    expected, quantile = expected_max(values, sizes), max_quantile(values, sizes, probability)
    for z, mean, bound in zip(sizes, expected, quantile, strict=True):
        maxima = sorted(max(probe) for probe in itertools.combinations(matches, int(z)))
        assert mean == pytest.approx(sum(maxima) / len(maxima))
        # The least with at least this share of all probes at or below it; in integers, without rounding.
        assert bound == maxima[math.ceil(round(probability * len(maxima), 9)) - 1]


def test_the_expected_maximum_of_a_large_set_is_that_of_its_order_statistics():
    values = DIFFERING.draw(lengths(9_723), generator())
    ordered = np.sort(values)
    for z in (1, 200, 9_723 // LARGEST_SHARE, 9_723):
        whole = math.comb(9_723, z)
        # C(r - 1, z - 1) / C(M, z), in integers.
        chance, literal, total = math.comb(9_722, z - 1), 0.0, 0.0
        for r in range(9_723, 0, -1):
            share = chance / whole
            literal, total = literal + ordered[r - 1] * share, total + share
            if share < 1e-18 or r == z:
                break
            chance = chance * (r - z) // (r - 1)
        assert total == pytest.approx(1.0)
        assert expected_max(values, np.array([z]))[0] == pytest.approx(literal, rel=1e-9)


def test_probes_of_no_sample_or_of_more_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"at least one sample, but got z=\[0\]"):
        expected_max(np.array([1, 2]), np.array([0]))
    with pytest.raises(ValueError, match=r"0 <= z <= num_samples must hold, but got .*num_samples=2"):
        expected_max(np.array([1, 2]), np.array([3]))
    with pytest.raises(ValueError, match="0 <= k <= num_samples"):
        miss_probability(3, -1, 1)
    with pytest.raises(ValueError, match=r"inside \(0, 1\), but got 1"):
        max_quantile(np.array([1, 2]), np.array([1]), 1.0)


# --- against simulated tokens -----------------------------------------------------------------------------------


def test_geometric_matches_are_no_more_dispersed_than_geometric_ones():
    """P-values of true distributions are uniform or larger: of 20, fewer than 7 lie below a tenth but in 1 of 400."""
    length = lengths(500)
    p_values = []
    for seed in range(20):
        against = dispersion_against_geometric(GEOMETRIC.draw(length, generator(seed)), length, generator(), 99)
        p_values.append([each.p_value for each in against.values()])
        assert against["dispersion"].ratio == pytest.approx(1.0, abs=0.5)
    assert np.all(np.sum(np.array(p_values) <= 0.1, axis=0) < 7)


def test_samples_that_differ_are_more_dispersed_than_geometric_ones():
    length = lengths(2_000)
    against = dispersion_against_geometric(DIFFERING.draw(length, generator()), length, generator(), 199)
    for name in ("dispersion", "top_share", "skewness"):
        assert against[name].ratio == pytest.approx(against[name].observed / against[name].simulated_mean)
        assert against[name].ratio > 1.3
        assert against[name].p_value == pytest.approx(1 / 200)


def test_the_dispersion_is_variance_by_mean_and_of_a_geometric_the_inverse_of_its_failures():
    length = np.full(20_000, 200)
    num_match = GEOMETRIC.draw(length, generator())
    dispersion = dispersion_against_geometric(num_match, length, generator(), 49)["dispersion"]
    assert dispersion.observed == pytest.approx(np.var(num_match) / np.mean(num_match))
    # Variance p / q^2 by mean p / q is 1 / q = 5; its standard error is about 5 sqrt(8 / 20,000).
    assert dispersion.observed == pytest.approx(5.0, abs=0.4)
    assert dispersion.simulated_mean == pytest.approx(5.0, abs=0.2)


def test_references_that_differ_in_length_alone_are_no_evidence():
    """All samples are known whole: matches are as skewed as the references, and so is what is simulated."""
    length = np.minimum(generator().geometric(0.05, 1_000), 400)
    skewness = dispersion_against_geometric(length, length, generator(), 49)["skewness"]
    assert skewness.observed > 1.0
    assert skewness.ratio == pytest.approx(1.0)
    assert skewness.p_value == 1.0


def test_nothing_matched_leaves_nothing_to_compare():
    against = dispersion_against_geometric(np.zeros(5, dtype=int), np.full(5, 3), generator(), 9)
    for each in against.values():
        np.testing.assert_equal(tuple(each), (nan, nan, nan, nan))


def test_a_large_maximum_alone_is_no_evidence_of_skew():
    """The largest of 20,000 geometric matches is ten times their mean, and the skewness theirs."""
    length = np.full(20_000, 200)
    num_match = GEOMETRIC.draw(length, generator())
    assert num_match.max() > 9 * num_match.mean()
    assert dispersion_against_geometric(num_match, length, generator(), 99)["skewness"].p_value > 0.01
    assert skewness_reproduced(num_match, length, GEOMETRIC, generator(), 99).is_reproduced


def test_the_distribution_that_made_the_matches_reproduces_their_skewness():
    """By the fitted true one in at least 95 % of cases, of which 10 miss 2 in 1 of 12; by a geometric never."""
    length = lengths(1_000)
    true, geometric = 0, 0
    for seed in range(10):
        num_match = DIFFERING.draw(length, generator(seed))
        fitted = fit("beta_geometric", num_match, length)
        true += skewness_reproduced(num_match, length, fitted, generator(), 99).is_reproduced
        geometric += skewness_reproduced(
            num_match, length, fit("geometric", num_match, length), generator(), 99
        ).is_reproduced
    assert true >= 8
    assert geometric == 0


def test_the_reproduction_reports_what_it_compared():
    length = lengths(300)
    num_match = DIFFERING.draw(length, generator())
    observed, simulated, is_reproduced = skewness_reproduced(num_match, length, DIFFERING, generator(), 399)
    assert observed == pytest.approx(stats.skew(num_match))
    rng = generator()
    literal = np.sort([stats.skew(DIFFERING.draw(length, rng)) for _ in range(399)])
    assert simulated == pytest.approx((literal[9], literal[-10]))
    assert is_reproduced == (simulated.low <= observed <= simulated.high)


def test_matches_that_are_all_equal_have_no_skewness_to_reproduce():
    observed, _, is_reproduced = skewness_reproduced(np.full(5, 2), np.full(5, 3), GEOMETRIC, generator(), 19)
    assert math.isnan(observed)
    assert not is_reproduced
