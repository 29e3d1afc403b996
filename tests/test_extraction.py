"""The older measures against literal definitions, closed forms and planted distributions."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from scipy import integrate, stats
from scipy.special import log_ndtr

from memray.measures.extraction import (
    MIN_HELDOUT,
    compare_with_heldout,
    contextual,
    counterfactual,
    exposure_bits,
    extraction_strength,
    longest_run,
    measure_extraction,
    run_lengths,
    skew_normal_log_cdf,
    windows_right,
    windows_right_if_independent,
)
from memray.measures.recall import Truth
from memray.scoring import TokenScores

nan = math.nan

masks = st.lists(st.booleans(), min_size=1, max_size=30)


# --- contiguous -------------------------------------------------------------------------------------------------


@given(mask=masks, length=st.integers(1, 31))
def test_the_contiguous_measures_equal_their_literal_definitions(mask, length):
    correct, n = np.array(mask), len(mask)
    runs = [len(list(run)) for is_right, run in itertools.groupby(mask) if is_right]
    assert longest_run(correct) == max(runs, default=0)
    assert sorted(each for each in run_lengths(correct).tolist() if each) == sorted(runs)
    fewest = min(k for k in range(n + 1) if all(mask[k:]))
    assert extraction_strength(correct) == pytest.approx(1 - fewest / n)
    windows = [all(mask[begin : begin + length]) for begin in range(n - length + 1)]
    expected = sum(windows) / len(windows) if windows else nan
    np.testing.assert_allclose(windows_right(correct, length), expected)


class LookupModel:
    """A deterministic model of a string: mostly right given the true prefix, arbitrary anywhere else."""

    def __init__(self, string: list[int], seed: int) -> None:
        self.string = string
        self.seed = seed

    def top(self, prefix: list[int]) -> int:
        rng = random.Random(f"{self.seed} {prefix}")
        on_track = prefix == self.string[: len(prefix)]
        return self.string[len(prefix)] if on_track and rng.random() < 0.8 else rng.randrange(3)

    def recites_from(self, num_given: int) -> bool:
        text = self.string[:num_given]
        while len(text) < len(self.string):
            text.append(self.top(text))
        return text == self.string


@pytest.mark.parametrize("seed", range(20))
def test_the_strength_is_that_of_greedy_decoding_from_every_prefix(seed):
    string = random.Random(seed).choices(range(3), k=12)
    model = LookupModel(string, seed)
    correct = np.array([model.top(string[:t]) == string[t] for t in range(12)])
    fewest = min(k for k in range(13) if model.recites_from(k))
    assert extraction_strength(correct) == pytest.approx(1 - fewest / 12)


def test_a_string_whose_last_target_is_wrong_has_no_strength_and_one_known_in_full_has_all():
    assert extraction_strength(np.array([True] * 9 + [False])) == 0.0
    assert extraction_strength(np.zeros(10, dtype=bool)) == 0.0
    assert extraction_strength(np.ones(10, dtype=bool)) == 1.0


def test_the_strength_of_no_targets_is_refused():
    with pytest.raises(ValueError, match="at least one scored target, but got 0"):
        extraction_strength(np.empty(0, dtype=bool))


def test_at_an_independent_accuracy_of_096_thirteen_percent_of_50_token_runs_are_right():
    """So that a contiguous measure says 0.13 of a string that is known to 0.96."""
    assert windows_right_if_independent(0.96, 50) == pytest.approx(0.13, abs=0.001)
    rng = np.random.default_rng(0)
    shares = [windows_right(rng.random(1024) < 0.96, 50) for _ in range(400)]
    assert np.mean(shares) == pytest.approx(0.13, abs=4 * float(np.std(shares)) / math.sqrt(len(shares)))


def scores_of(argmax: list[int]) -> TokenScores:
    n = len(argmax)
    zeros = np.zeros(n, dtype=np.float32)
    return TokenScores(
        string=np.zeros(n, dtype=np.int32),
        position=np.arange(n, dtype=np.int32),
        log_prob=zeros,
        log_mass=zeros,
        argmax=np.array(argmax, dtype=np.int32),
        rank=np.zeros(n, dtype=np.int32),
        margin=zeros,
        entropy_bits=zeros,
        kl_bits=zeros,
        mean_q=np.array([[0.5, 0.5]]),
    )


def truth_of(targets: ndarray) -> Truth:
    half = np.full(2, 0.5)
    conditional = np.broadcast_to(half, (len(targets), 2))
    return Truth.of(targets, symbol_ids=np.array([7, 9]), conditional=conditional, marginal=half)


def test_a_tie_ends_a_run():
    truth = truth_of(np.zeros(40, dtype=np.int64))
    measures = measure_extraction(scores_of([7] * 5 + [-1] + [7] * 33 + [9]), truth)
    assert measures == {
        "older/longest_run": 33 / 40,
        "older/longest_run_tokens": 33.0,
        "older/extraction_strength": 0.0,
        "older/windows_right_32": pytest.approx(2 / 9),
        "older/windows_right_50": pytest.approx(nan, nan_ok=True),
    }


# --- against held-out strings -----------------------------------------------------------------------------------


def test_contextual_and_counterfactual_memorisation_are_their_closed_forms():
    losses = np.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(contextual(losses, 2.0), [1.0, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(counterfactual(losses, 2.0), [1.0, 0.5, 0.0, -0.5])


@pytest.mark.parametrize("unknown", [nan, 0.0])
def test_without_a_held_out_loss_there_is_nothing_to_compare_with(unknown):
    assert np.isnan(contextual(np.array([1.0]), unknown)).all()
    assert np.isnan(counterfactual(np.array([1.0]), unknown)).all()


def test_between_probe_epochs_the_least_held_out_loss_stays_known():
    compared = compare_with_heldout(np.array([1.0]), np.empty(0), least_heldout=4.0)
    assert compared["older/contextual"].tolist() == [0.75]
    assert np.isnan(compared["older/counterfactual"]).all()
    assert np.isnan(compared["older/exposure_bits"]).all()


def test_exposure_against_symmetric_losses_is_the_closed_form_of_a_normal():
    heldout = np.array([2.9, 3.0, 3.1, 3.2, 3.3])
    mean, spread = 3.1, np.std(heldout)
    losses = np.array([mean + 3 * spread, mean, mean - spread, mean - 5 * spread, mean - 200 * spread])
    expected = -log_ndtr((losses - mean) / spread) / math.log(2)
    np.testing.assert_allclose(exposure_bits(losses, heldout), expected, rtol=1e-7)
    assert exposure_bits(losses, heldout)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [-3.0, 0.0, 3.0])
def test_exposure_is_that_of_the_planted_skew_normal(shape):
    planted = stats.skewnorm(shape, loc=3.2, scale=0.1)
    heldout = planted.rvs(20_000, random_state=np.random.default_rng(1))
    losses = planted.ppf([2.0**-8, 2.0**-4, 0.5, 0.9])
    # The skewness of 20,000 values is known to 0.02, which is worth a tenth of a bit at one in 256.
    assert exposure_bits(losses, heldout) == pytest.approx([8.0, 4.0, 1.0, -math.log2(0.9)], abs=0.2)


def test_the_smaller_a_loss_the_larger_its_exposure_down_to_nothing():
    heldout = stats.skewnorm(2.0, loc=3.2, scale=0.05).rvs(10, random_state=np.random.default_rng(3))
    exposure = exposure_bits(np.linspace(0.0, 4.0, 400), heldout)
    assert np.all(np.isfinite(exposure))
    assert np.all(np.diff(exposure) <= 0)
    assert exposure[0] > 1000.0
    assert exposure[-1] == 0.0


@pytest.mark.parametrize(
    "heldout",
    [
        np.linspace(3.0, 3.3, MIN_HELDOUT - 1),
        np.full(10, 3.2),
        np.append(np.full(20, 3.2), 9.0),
        np.append(np.linspace(3.0, 3.3, 9), nan),
    ],
    ids=["too few", "without spread", "too skewed", "a missing one"],
)
def test_without_a_fit_exposure_is_missing(heldout):
    assert np.isnan(exposure_bits(np.array([0.1, 3.0]), heldout)).all()


GRID = np.array([-300.0, -60.0, -12.0, -5.0, -3.8, -3.6, -1.0, 0.0, 2.0])


def test_the_log_tail_of_a_skew_normal_is_its_closed_form_for_shapes_0_and_1():
    """F is Phi(x) for shape 0, Phi(x)^2 for shape 1, and Phi(x) (2 - Phi(x)) for shape -1 (Azzalini 1985)."""
    log_phi = log_ndtr(GRID)
    np.testing.assert_allclose(skew_normal_log_cdf(GRID, 0.0), log_phi, rtol=1e-9)
    np.testing.assert_allclose(skew_normal_log_cdf(GRID, 1.0), 2 * log_phi, rtol=1e-9)
    np.testing.assert_allclose(skew_normal_log_cdf(GRID, -1.0), log_phi + np.log(2 - np.exp(log_phi)), rtol=1e-9)


@pytest.mark.parametrize("shape", [-8.0, -0.4, 0.7, 5.0])
def test_the_log_tail_of_a_skew_normal_is_that_of_numerical_integration(shape):
    for x in (-40.0, -9.0, -4.0, -2.5, -0.5):
        peak = stats.norm.logpdf(x) + log_ndtr(shape * x)

        def relative_density(t: float, peak: float = peak) -> float:
            return 2 * math.exp(stats.norm.logpdf(t) + log_ndtr(shape * t) - peak)

        breaks = [x - 2.0**-k for k in range(12)]
        area, _ = integrate.quad(relative_density, x - 12, x, points=breaks, limit=400)
        assert skew_normal_log_cdf(np.array([x]), shape)[0] == pytest.approx(peak + math.log(area), rel=1e-7)
