"""The order of memorisation against literal definitions, scipy, exhaustive enumeration and planted orders."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy import stats

from memray.measures.order import (
    HALFWAY,
    OrderHistory,
    StringOrder,
    acquisition_epochs,
    agreement,
    has_surprise,
    is_acquired,
    measure_order,
    positional_order,
    runs_distribution,
    runs_test,
)
from memray.measures.phases import stays_from
from memray.measures.recall import Guesser, Truth
from memray.scoring import TokenScores

nan = math.nan


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spearman(first: ndarray, second: ndarray) -> float:
    result: Any = stats.spearmanr(first, second)
    return float(result.statistic)


def kendall(first: ndarray, second: ndarray) -> float:
    result: Any = stats.kendalltau(first, second)
    return float(result.statistic)


def p_value_of_all_permutations(
    correlate: Callable[[ndarray, ndarray], float], first: ndarray, second: ndarray
) -> float:
    """By scipy, which takes all orders of six values where more than these are asked for."""
    result = stats.permutation_test(
        (second,),
        lambda values: correlate(first, values),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=1_000,
    )
    return float(result.pvalue)


def guesser_of(probability: Sequence[float] | ndarray) -> Guesser:
    return Guesser(np.log2(np.asarray(probability, dtype=np.float64)), accuracy=0.5)


def log_of(probability: Sequence[float] | ndarray) -> ndarray:
    return np.log(np.asarray(probability)).astype(np.float32)


# --- when a token is memorised ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    guesses=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5),
    num_epochs=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_epoch_of_acquisition_equals_its_literal_definition(guesses, num_epochs, seed):
    rng = generator(seed)
    probability = rng.uniform(size=(num_epochs, len(guesses))) ** 0.5
    epochs = np.cumsum(rng.integers(1, 5, num_epochs))
    acquired = acquisition_epochs(log_of(probability), epochs, guesser_of(guesses))
    for token, guess in enumerate(guesses):
        holds = np.exp(log_of(probability[:, token]).astype(np.float64)) >= math.sqrt(guess)
        np.testing.assert_equal(acquired[token], stays_from(holds, epochs))


def test_a_token_that_is_lost_again_is_acquired_where_it_begins_to_stay():
    probability = np.array([[0.9, 0.9, 0.1], [0.1, 0.9, 0.1], [0.9, 0.9, 0.1], [0.9, 0.1, 0.1]])
    acquired = acquisition_epochs(log_of(probability), np.array([0, 3, 5, 9]), guesser_of([0.25, 0.25, 0.25]))
    np.testing.assert_equal(acquired, [5.0, nan, nan])


@pytest.mark.parametrize("probability", [[0.5, 0.5], [1 / 26] * 26, [0.89] + [0.11 / 25] * 25])
def test_the_guesser_acquires_no_token_and_full_recall_acquires_all_whatever_the_alphabet_or_the_skew(probability):
    guesser = guesser_of(probability)
    assert not is_acquired(log_of(probability), guesser).any()
    assert is_acquired(np.zeros(len(probability), dtype=np.float32), guesser).all()


def test_tokens_that_structure_fixes_hold_no_surprise_and_stay_out_of_the_order():
    """A motif of four, tiled: the first four are learned in random order, the rest is certain from the start."""
    guesser = guesser_of([0.5] * 4 + [1.0] * 12)
    probability = np.full((6, 16), 1.0)
    for token, epoch in enumerate([2, 4, 1, 3]):
        probability[:epoch, token] = 0.5
    acquired = acquisition_epochs(log_of(probability), np.arange(6), guesser)
    np.testing.assert_equal(acquired, [2.0, 4.0, 1.0, 3.0] + [nan] * 12)
    order = positional_order(acquired[has_surprise(guesser)], rng=generator())
    assert order.spearman.value == pytest.approx(0.0)
    naive = positional_order(acquired, rng=generator())
    assert naive.spearman.value > 0.6, "what counting them as never acquired would make of it"


# --- by position ------------------------------------------------------------------------------------------------

epochs_or_never = st.one_of(st.integers(0, 6).map(float), st.just(nan))


@settings(deadline=None, max_examples=80)
@given(acquired=st.lists(epochs_or_never, min_size=2, max_size=40))
def test_both_correlations_are_those_of_scipy_with_censored_tokens_last(acquired):
    order = positional_order(np.array(acquired), rng=generator(), permutations=3)
    last = np.where(np.isnan(acquired), 1e9, acquired)
    if len(set(last)) == 1:
        assert math.isnan(order.spearman.value)
        assert math.isnan(order.kendall.value)
        assert math.isnan(order.spearman.p_value)
        return
    positions = np.arange(len(acquired))
    assert order.spearman.value == pytest.approx(spearman(positions, last))
    assert order.kendall.value == pytest.approx(kendall(positions, last))


@pytest.mark.parametrize("acquired", [[1.0, 3.0, 2.0, nan, 3.0, nan], [5.0, 4.0, 3.0, 2.0, 1.0], [nan, 1.0, nan, 1.0]])
def test_p_values_are_those_of_all_permutations_by_scipy(acquired):
    last = np.where(np.isnan(acquired), 1e9, acquired)
    positions = np.arange(len(acquired))
    order = positional_order(np.array(acquired), rng=generator(), permutations=9_999)
    # Four standard errors of a share of 9,999 draws.
    assert order.spearman.p_value == pytest.approx(p_value_of_all_permutations(spearman, positions, last), abs=0.02)
    assert order.kendall.p_value == pytest.approx(p_value_of_all_permutations(kendall, positions, last), abs=0.02)


def planted(order: str, num_tokens: int = 200, seed: int = 0) -> ndarray:
    """Epochs of acquisition between 10 and 50, with noise of some epochs, and the last tenth never."""
    rng = generator(seed)
    rank = np.arange(num_tokens) if order == "left to right" else rng.permutation(num_tokens)
    acquired = np.round(10 + 40 * rank / num_tokens + rng.normal(0, 5, num_tokens))
    return np.where(rank >= 0.9 * num_tokens, nan, acquired)


def test_planted_left_to_right_and_planted_random_orders_are_told_apart():
    ordered = positional_order(planted("left to right"), rng=generator())
    assert ordered.spearman.value > 0.85
    assert ordered.kendall.value > 0.65
    assert ordered.spearman.p_value == ordered.kendall.p_value == 1 / 1000
    reverse = positional_order(planted("left to right")[::-1], rng=generator())
    assert reverse.spearman.value == pytest.approx(-ordered.spearman.value)
    assert reverse.kendall.value == pytest.approx(-ordered.kendall.value)
    random = positional_order(planted("random"), rng=generator())
    # 2.6 standard errors of a correlation of 200 tokens: one of a hundred random orders lies beyond.
    assert abs(random.spearman.value) < 2.6 / math.sqrt(199)
    assert random.spearman.p_value > 0.01
    assert random.kendall.p_value > 0.01


def is_uniform(p_values: list[float]) -> bool:
    """Kolmogorov and Smirnov's distance at the level 1 %, and the coarseness of 99 permutations."""
    distance = stats.kstest(p_values, "uniform").statistic
    return distance <= 1.63 / math.sqrt(len(p_values)) + 0.01


def test_p_values_of_random_orders_are_uniform():
    rng = generator()
    orders = [
        positional_order(np.where(rng.random(40) < 0.2, nan, rng.integers(0, 12, 40)), rng=rng, permutations=99)
        for _ in range(300)
    ]
    assert is_uniform([each.spearman.p_value for each in orders])
    assert is_uniform([each.kendall.p_value for each in orders])


def string_order(acquired: ndarray, seed: int = 0, halfway: Sequence[bool] = ()) -> StringOrder:
    share = float(np.mean(~np.isnan(acquired)))
    return StringOrder(positional_order(acquired, rng=generator(seed)), np.array(halfway, dtype=bool), share)


def test_the_mean_over_strings_has_a_p_value_of_its_own():
    """A weak order in twelve strings, of which hardly one shows it by itself."""
    rng = generator(5)
    orders = [string_order(0.25 * np.arange(30.0) / 9 + rng.normal(size=30), seed) for seed in range(12)]
    each = [measure_order([order]) for order in orders]
    together = measure_order(orders)
    assert together["order/spearman"] == pytest.approx(np.mean([one["order/spearman"] for one in each]))
    assert together["order/kendall"] == pytest.approx(np.mean([one["order/kendall"] for one in each]))
    assert np.median([one["order/spearman_p"] for one in each]) > 0.05
    assert together["order/spearman_p"] < 0.01
    # As many random strings: the mean is as rare as its normal approximation says.
    null = 1 / math.sqrt(29 * 12)
    expected = 2 * stats.norm.sf(together["order/spearman"] / null)
    assert together["order/spearman_p"] == pytest.approx(expected, abs=0.01)


def test_strings_without_an_order_are_left_out_of_the_mean():
    ordered, empty = string_order(planted("left to right")), string_order(np.full(200, nan))
    together = measure_order([ordered, empty])
    assert together["order/spearman"] == ordered.positional.spearman.value
    assert together["order/spearman_p"] == ordered.positional.spearman.p_value
    assert together["order/acquired_share"] == pytest.approx(0.45), "a string of which nothing was acquired counts"


# --- agreement of models ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.lists(epochs_or_never, min_size=6, max_size=6), min_size=2, max_size=5),
)
def test_agreement_is_the_mean_of_scipys_spearman_over_all_pairs(rows):
    last = [np.where(np.isnan(row), 1e9, row) for row in rows]
    ordered = [row for row in last if len(set(row)) > 1]
    found = agreement(np.array(rows), rng=generator(), permutations=3)
    pairs = [spearman(a, b) for a, b in itertools.combinations(ordered, 2)]
    if pairs:
        assert found.value == pytest.approx(np.mean(pairs))
    else:
        assert math.isnan(found.value)
        assert math.isnan(found.p_value)


def test_the_p_value_of_two_models_is_that_of_all_permutations_by_scipy():
    first, second = np.array([1.0, 2.0, 2.0, 4.0, 5.0, 6.0]), np.array([2.0, 1.0, 4.0, 4.0, 3.0, 9.0])
    found = agreement(np.stack([first, second]), rng=generator(), permutations=9_999)
    assert found.p_value == pytest.approx(p_value_of_all_permutations(spearman, first, second), abs=0.02)


def test_models_that_share_an_order_agree_and_models_that_do_not_have_uniform_p_values():
    rng = generator(2)
    shared = rng.permutation(np.arange(100.0))
    models = np.stack([shared + rng.normal(0, 40, 100) for _ in range(4)])
    found = agreement(models, rng=rng)
    assert 0.2 < found.value < 0.6
    assert found.p_value == 1 / 1000
    assert agreement(np.stack([shared, shared]), rng=rng).value == pytest.approx(1.0)
    p_values = [agreement(rng.permuted(models, axis=1), rng=rng, permutations=99).p_value for _ in range(200)]
    assert is_uniform(p_values)


# --- runs -------------------------------------------------------------------------------------------------------


def count_runs(mask: Sequence[bool]) -> int:
    return len(list(itertools.groupby(mask)))


def masks_with(num_right: int, num_wrong: int) -> list[list[bool]]:
    length = num_right + num_wrong
    chosen = itertools.combinations(range(length), num_right)
    return [[place in places for place in range(length)] for places in chosen]


@pytest.mark.parametrize(("num_right", "num_wrong"), [(1, 1), (1, 4), (3, 2), (4, 4), (6, 3), (2, 7)])
def test_the_distribution_of_runs_is_that_of_all_masks(num_right, num_wrong):
    runs = [count_runs(mask) for mask in masks_with(num_right, num_wrong)]
    shares = np.bincount(runs, minlength=num_right + num_wrong + 1) / len(runs)
    np.testing.assert_allclose(runs_distribution(num_right, num_wrong), shares, atol=1e-12)


@pytest.mark.parametrize(("num_right", "num_wrong"), [(128, 127), (1000, 23), (300, 724)])
def test_the_distribution_of_runs_has_the_mean_and_the_variance_of_wald_and_wolfowitz(num_right, num_wrong):
    distribution, n = runs_distribution(num_right, num_wrong), num_right + num_wrong
    runs = np.arange(n + 1)
    mean = 1 + 2 * num_right * num_wrong / n
    assert distribution.sum() == pytest.approx(1.0, abs=1e-9)
    assert distribution @ runs == pytest.approx(mean, rel=1e-9)
    assert distribution @ (runs - mean) ** 2 == pytest.approx((mean - 1) * (mean - 2) / (n - 1), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    first=st.lists(st.booleans(), min_size=1, max_size=7),
    second=st.lists(st.booleans(), min_size=0, max_size=5),
)
def test_the_runs_test_of_masks_is_that_of_all_masks_of_the_same_accuracies(first, second):
    masks = [mask for mask in (first, second) if len(set(mask)) == 2]
    found = runs_test([np.array(first, dtype=bool), np.array(second, dtype=bool)])
    if not masks:
        assert math.isnan(found.p_value)
        return
    every = [masks_with(sum(mask), len(mask) - sum(mask)) for mask in masks]
    totals = np.array([sum(map(count_runs, chosen)) for chosen in itertools.product(*every)])
    observed = sum(map(count_runs, masks))
    assert found.num_runs == observed
    assert found.expected == pytest.approx(totals.mean())
    literal = min(1.0, 2 * min(np.mean(totals <= observed), np.mean(totals >= observed)))
    assert found.p_value == pytest.approx(literal)


def test_clustered_and_alternating_masks_are_told_from_random_ones():
    random = runs_test([generator().random(400) < 0.6])
    clustered = runs_test([np.repeat(generator().random(40) < 0.6, 10)])
    alternating = runs_test([np.arange(400) % 2 == 0])
    assert random.p_value > 0.05
    assert clustered.num_runs < clustered.expected / 4
    assert clustered.p_value < 1e-9
    assert alternating.num_runs > 1.9 * alternating.expected
    assert alternating.p_value < 1e-9


def test_p_values_of_runs_are_uniform_as_far_as_counts_can_be():
    """Over all numbers of runs of 255 tokens: never too small, and no more too large than one of them is likely."""
    distribution = runs_distribution(128, 127)
    tails = 2 * np.minimum(np.cumsum(distribution), np.cumsum(distribution[::-1])[::-1])
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = distribution[tails <= level].sum()
        assert level - 2 * distribution.max() <= rejected <= level + 1e-9
    rng = generator()
    p_values = [runs_test([rng.permutation(np.arange(255) < 128)]).p_value for _ in range(300)]
    # Two-sided p-values jump by twice the largest probability, 0.05 a side here.
    assert stats.kstest(p_values, "uniform").statistic <= 1.63 / math.sqrt(300) + 2 * distribution.max()


# --- from the epochs of a string to its measures ----------------------------------------------------------------

ALPHABET_SIZE = 4


def truth_of(targets: ndarray) -> Truth:
    marginal = np.full(ALPHABET_SIZE, 1 / ALPHABET_SIZE)
    conditional = np.broadcast_to(marginal, (len(targets), ALPHABET_SIZE))
    return Truth.of(targets, symbol_ids=np.arange(ALPHABET_SIZE), conditional=conditional, marginal=marginal)


def scores_of(truth: Truth, is_known: ndarray) -> TokenScores:
    """A model that knows some tokens, and is wrong about the others."""
    n = len(truth.targets)
    zeros = np.zeros(n, dtype=np.float32)
    return TokenScores(
        string=np.zeros(n, dtype=np.int32),
        position=np.arange(n, dtype=np.int32),
        log_prob=np.where(is_known, log_of([0.97]), log_of([0.01])),
        log_mass=zeros,
        argmax=np.where(is_known, truth.target_ids, (truth.target_ids + 1) % ALPHABET_SIZE).astype(np.int32),
        rank=np.where(is_known, 0, 1).astype(np.int32),
        margin=zeros,
        entropy_bits=zeros,
        kl_bits=zeros,
        mean_q=np.full((1, ALPHABET_SIZE), 1 / ALPHABET_SIZE),
    )


def history_of(truth: Truth, acquired: ndarray, epochs: Sequence[int]) -> OrderHistory:
    history = OrderHistory.of(truth)
    for epoch in epochs:
        is_known = acquired <= epoch
        history = history.after(epoch, scores_of(truth, is_known), truth, corrected_accuracy=float(is_known.mean()))
    return history


def test_the_history_of_a_string_gives_the_epochs_that_its_records_give():
    rng = generator(1)
    truth = truth_of(rng.integers(ALPHABET_SIZE, size=60))
    epochs = np.array([0, 1, 2, 5, 9, 12])
    known = [rng.random(60) < share for share in (0, 0.3, 0.5, 0.8, 0.9, 0.9)]
    history = OrderHistory.of(truth)
    for epoch, is_known in zip(epochs, known, strict=True):
        history = history.after(int(epoch), scores_of(truth, is_known), truth, corrected_accuracy=nan)
    log_prob = np.stack([scores_of(truth, is_known).log_prob for is_known in known])
    np.testing.assert_equal(history.acquired, acquisition_epochs(log_prob, epochs, truth.guesser))
    assert len(history.halfway) == 0


@pytest.mark.parametrize(
    ("order", "least_and_most_spearman", "least_and_most_runs"),
    [("left to right", (0.99, 1.0), (0.0, 0.1)), ("random", (-0.2, 0.2), (0.8, 1.2))],
)
def test_a_string_that_is_memorised_in_a_planted_order_shows_it(order, least_and_most_spearman, least_and_most_runs):
    truth = truth_of(generator(3).integers(ALPHABET_SIZE, size=200))
    rank = np.arange(200) if order == "left to right" else generator(4).permutation(200)
    history = history_of(truth, 5 + rank // 10, range(30))
    measures = measure_order([StringOrder.of(history, truth, rng=generator())])
    assert least_and_most_spearman[0] <= measures["order/spearman"] <= least_and_most_spearman[1]
    assert least_and_most_runs[0] <= measures["order/runs_ratio"] <= least_and_most_runs[1]
    assert measures["order/acquired_share"] == 1.0
    for key in ("order/spearman_p", "order/kendall_p", "order/runs_p"):
        assert (measures[key] < 0.01) == (order == "left to right")


def test_runs_are_counted_at_the_epoch_that_is_nearest_to_half_recall():
    truth = truth_of(np.arange(64) % ALPHABET_SIZE)
    nearest = history_of(truth, np.arange(64), [0, 20, 29, 40, 63])
    assert np.count_nonzero(nearest.halfway) == 30
    first_of_equals = history_of(truth, np.arange(64), [0, 20, 27, 35, 63])
    assert np.count_nonzero(first_of_equals.halfway) == 28


def test_no_runs_are_counted_where_no_epoch_is_near_half_recall():
    truth = truth_of(np.arange(100) % ALPHABET_SIZE)
    jump = history_of(truth, np.arange(100), [0, 10, 99])
    assert HALFWAY < 0.5 - 0.11
    measures = measure_order([StringOrder.of(jump, truth, rng=generator())])
    assert math.isnan(measures["order/runs_p"])
    assert math.isnan(measures["order/runs_ratio"])
    assert not math.isnan(measures["order/spearman"])


@pytest.mark.parametrize(
    ("acquired", "epochs"),
    [
        (np.where(np.arange(40) < 20, 0, 99), [0]),  # one evaluated epoch
        (np.full(40, 99), [0, 1, 2]),  # nothing is ever acquired
        (np.full(40, 1), [0, 1, 2]),  # everything at once
    ],
    ids=["one epoch", "all censored", "constant"],
)
def test_where_there_is_no_order_it_is_missing_and_never_zero(acquired, epochs):
    truth = truth_of(np.arange(40) % ALPHABET_SIZE)
    measures = measure_order([StringOrder.of(history_of(truth, acquired, epochs), truth, rng=generator())])
    defined = {key for key, value in measures.items() if not math.isnan(value)}
    assert defined == ({"order/acquired_share"} if len(epochs) > 1 else set())


@pytest.mark.parametrize("targets", [np.zeros(20, dtype=np.int64), np.array([1])], ids=["one symbol", "one target"])
def test_a_string_without_surprise_has_no_order(targets):
    truth = truth_of(targets)
    history = history_of(truth, np.zeros(len(targets)), [0, 1])
    measures = measure_order([StringOrder.of(history, truth, rng=generator())])
    assert all(math.isnan(value) for value in measures.values())
