"""The order in which the tokens of a string are memorised: by position, in clusters, or alike in different models.

The claim to be judged is that there is none by position. The input is each token's epoch of acquisition, and one mask
of right and wrong tokens; an epoch that was never reached is right-censored: nan, behind every number. P-values are
two-sided and come from permutations of a generator that is passed in, or are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.signal import fftconvolve
from scipy.special import gammaln
from scipy.stats import rankdata

from memray.measures.recall import LN2, Guesser, Truth
from memray.scoring import TokenScores

PERMUTATIONS = 999

# Runs are counted where the corrected accuracy lies within this distance of one half.
HALFWAY = 0.25


# --- when a token is memorised ----------------------------------------------------------------------------------


def has_surprise(guesser: Guesser) -> Bool[ndarray, " targets"]:
    """Which targets the guesser is not sure of.

    The others (all but the first motif of a repeated string, or every token of a string of one symbol) hold nothing
    to be memorised. In an order they would be a block of tokens that never arrive, at positions that the source
    chose, so they are left out of it.
    """
    return guesser.log2_probability < -1e-9  # what rounding can leave of a probability of 1


def is_acquired(log_prob: Float[ndarray, "*epochs targets"], guesser: Guesser) -> Bool[ndarray, "*epochs targets"]:
    """Whether half of each token's own surprise is gone: p >= sqrt(g), with g the guesser's probability.

    The level moves with the token, so that frequent and rare symbols, and alphabets of any size, are judged alike; a
    guesser that is as good as the best is below it everywhere. A token without surprise is never acquired.

    Args:
        log_prob: ln p of each target, at one epoch or at several.
        guesser: The baseline of the string.
    """
    return (log_prob.astype(np.float64) / LN2 >= 0.5 * guesser.log2_probability) & has_surprise(guesser)


def acquisition_epochs(
    log_prob: Float[ndarray, "epochs targets"], epochs: Int[ndarray, " epochs"], guesser: Guesser
) -> Float[ndarray, " targets"]:
    """The first evaluated epoch of each token from which it is acquired at every later one (protocol, section 6).

    Args:
        log_prob: ln p of each target at each evaluated epoch, as the ledger's token table holds them.
        epochs: The evaluated epochs, ascending.
        guesser: The baseline of the string, over the same targets.

    Returns:
        Epochs; nan where a token is not acquired at the last one, and where it has no surprise (`has_surprise`).
    """
    acquired = np.full(log_prob.shape[1], np.nan)
    for epoch, holds in zip(epochs, is_acquired(log_prob, guesser), strict=True):
        acquired = acquired_after(acquired, holds, int(epoch))
    return acquired


def acquired_after(
    acquired: Float[ndarray, " targets"], holds: Bool[ndarray, " targets"], epoch: int
) -> Float[ndarray, " targets"]:
    """Epochs of acquisition after one more evaluated epoch: what does not hold there begins anew.

    Example:
        >>> acquired_after(np.array([2.0, 2.0, np.nan]), np.array([True, False, True]), 5).tolist()
        [2.0, nan, 5.0]
    """
    return np.where(holds, np.where(np.isnan(acquired), float(epoch), acquired), np.nan)


# --- correlations and their permutations ------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """A rank correlation, or a mean of several, and what it is where there is no order.

    Attributes:
        value: In [-1, 1]; nan where it is undefined, because nothing varies.
        null: The same after each of some random permutations; empty where the value is undefined.
    """

    value: float
    null: Float[ndarray, " permutations"]

    @property
    def p_value(self) -> float:
        """Share of the permutations, the observed order among them, that lie at least as far from 0; in (0, 1]."""
        if math.isnan(self.value):
            return math.nan
        # Rounding must not tell apart what is equal.
        num_as_far = int(np.count_nonzero(np.abs(self.null) >= abs(self.value) - 1e-12))
        return (num_as_far + 1) / (len(self.null) + 1)


UNDEFINED = Correlation(math.nan, np.empty(0))


def mean_correlation(correlations: Sequence[Correlation]) -> Correlation:
    """The mean over the strings where it is defined, tested by permuting each string by itself.

    Strings are independent, so that the k-th permutation of each one together are one draw of the mean.
    """
    defined = [each for each in correlations if not math.isnan(each.value)]
    if not defined:
        return UNDEFINED
    return Correlation(
        float(np.mean([each.value for each in defined])), np.mean([each.null for each in defined], axis=0)
    )


class PositionalOrder(NamedTuple):
    """Spearman's and Kendall's (tau-b) correlation of position and epoch of acquisition; 1 is left to right."""

    spearman: Correlation
    kendall: Correlation


def positional_order(
    acquired: Float[ndarray, " tokens"], *, rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> PositionalOrder:
    """Whether tokens are memorised in the order of their positions.

    Tokens that were never acquired tie behind all others; the evaluated epochs are coarse, so that there are ties
    among these as well, which both correlations allow for. They are permuted together.

    Args:
        acquired: Epochs of acquisition in order of position, of tokens with surprise alone.
        rng: Draws the permutations.
        permutations: Their number; the smallest p-value is 1 / (permutations + 1).

    Returns:
        Two correlations; undefined where all tokens share one epoch, or none was acquired.
    """
    ranks = _ranks(acquired)
    if _is_constant(ranks):
        return PositionalOrder(UNDEFINED, UNDEFINED)
    shuffled = rng.permuted(np.tile(ranks, (permutations, 1)), axis=1)
    orders = np.vstack([ranks, shuffled])
    return PositionalOrder(*(Correlation(float(rows[0]), rows[1:]) for rows in (_spearman(orders), _kendall(orders))))


def agreement(
    acquired: Float[ndarray, "models tokens"], *, rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> Correlation:
    """Whether models memorise the tokens of the same string in the same order.

    The mean of Spearman's correlation over all pairs of models (seeds, sizes or families; for two models, simply
    theirs), against tokens permuted in each model by itself. It need not come from the models: rare symbols that
    are late in all of them make them agree too.

    Args:
        acquired: Epochs of acquisition, a row a model, over the same tokens, of those with surprise alone.
        rng: Draws the permutations.
        permutations: Their number.

    Returns:
        The mean, in [-1 / (models - 1), 1]. Models without any order (all tokens at one epoch, or none) are left
        out; undefined where fewer than two remain.
    """
    ranks = [row for row in map(_ranks, acquired) if not _is_constant(row)]
    if len(ranks) < 2:
        return UNDEFINED
    total = np.zeros((permutations + 1, acquired.shape[1]))
    for index, row in enumerate(ranks):
        unit = row / np.sqrt(row @ row)
        total[0] += unit
        # One of them may stay: only how they lie to each other counts.
        total[1:] += rng.permuted(np.tile(unit, (permutations, 1)), axis=1) if index else unit
    # The squared length of a sum of unit vectors is their number and twice the sum over all pairs.
    means = (np.sum(total**2, axis=1) - len(ranks)) / (len(ranks) * (len(ranks) - 1))
    return Correlation(float(means[0]), means[1:])


def _ranks(acquired: Float[ndarray, " tokens"]) -> Float[ndarray, " tokens"]:
    """Twice the mid-ranks, about their mean: integers, so that sums of their products are exact."""
    return 2.0 * rankdata(np.where(np.isnan(acquired), np.inf, acquired)) - (len(acquired) + 1)


def _is_constant(ranks: Float[ndarray, " tokens"]) -> bool:
    return bool(np.all(ranks == 0.0))


def _spearman(orders: Float[ndarray, "orders tokens"]) -> Float[ndarray, " orders"]:
    """Correlation of each row of centred ranks with its positions."""
    num_tokens = orders.shape[1]
    positions = 2.0 * np.arange(1, num_tokens + 1) - (num_tokens + 1)
    return orders @ positions / math.sqrt(float(orders[0] @ orders[0]) * float(positions @ positions))


def _kendall(orders: Float[ndarray, "orders tokens"]) -> Float[ndarray, " orders"]:
    """Kendall's tau-b of each row with its positions; the rows hold the same centred ranks in other orders."""
    num_tokens = orders.shape[1]
    # Small integers, with the tokens first: all pairs of all rows are compared, and this is what it costs.
    ranks = np.ascontiguousarray((orders + num_tokens).T.astype(np.min_scalar_type(2 * num_tokens)))
    ascending = np.zeros(ranks.shape, dtype=ranks.dtype)
    for lag in range(1, num_tokens):
        ascending[lag:] += ranks[lag:] > ranks[:-lag]
    _, ties = np.unique(orders[0], return_counts=True)
    num_pairs = num_tokens * (num_tokens - 1) // 2
    num_untied = num_pairs - int(np.sum(ties * (ties - 1) // 2))
    concordant = ascending.sum(axis=0, dtype=np.int64)
    return (2 * concordant - num_untied) / math.sqrt(num_pairs * num_untied)


# --- runs -------------------------------------------------------------------------------------------------------


class RunsTest(NamedTuple):
    """How often right and wrong alternate in some masks.

    Attributes:
        num_runs: Stretches of equal tokens, in all masks together.
        expected: Their mean number in random masks of the same accuracies.
        p_value: Two-sided; nan where a token is wrong, or right, in no mask.
    """

    num_runs: int
    expected: float
    p_value: float


def runs_test(masks: Sequence[Bool[ndarray, " _"]]) -> RunsTest:
    """Whether right tokens stand together, against random masks of equal accuracy (Wald and Wolfowitz 1940).

    Fewer runs than expected: right tokens cluster, as when a string is memorised in pieces. More: they avoid each
    other. The p-value is exact, twice the smaller tail; over several masks the number of runs is summed.

    Args:
        masks: Right and wrong tokens in order of position, a mask a string.
    """
    num_runs, expected = 0, 0.0
    distributions = []
    for mask in masks:
        num_right, num_wrong = int(np.count_nonzero(mask)), int(np.count_nonzero(~mask))
        if num_right == 0 or num_wrong == 0:
            continue
        num_runs += 1 + int(np.count_nonzero(mask[1:] != mask[:-1]))
        expected += 1 + 2 * num_right * num_wrong / len(mask)
        distributions.append(runs_distribution(num_right, num_wrong))
    if not distributions:
        return RunsTest(0, 0.0, math.nan)
    probability = np.maximum(reduce(fftconvolve, distributions), 0.0)
    tail = min(float(probability[: num_runs + 1].sum()), float(probability[num_runs:].sum()))
    return RunsTest(num_runs, expected, min(1.0, 2 * tail))


def runs_distribution(num_right: int, num_wrong: int) -> Float[ndarray, " runs"]:
    """The probability of each number of runs, from 0 on, when so many right and wrong tokens lie in random order.

    2k runs are k of each kind; k parts of n tokens can be cut in C(n - 1, k - 1) ways, and either kind may begin.
    2k + 1 runs are k + 1 of the one kind and k of the other.
    """
    runs = np.arange(num_right + num_wrong + 1)
    fewer, more = runs // 2, (runs + 1) // 2
    log_ways = np.logaddexp(
        _log_choose(num_right - 1, fewer - 1) + _log_choose(num_wrong - 1, more - 1),
        _log_choose(num_right - 1, more - 1) + _log_choose(num_wrong - 1, fewer - 1),
    )
    return np.exp(log_ways - _log_choose(num_right + num_wrong, np.array([num_right])))


def _log_choose(n: int, k: Int[ndarray, " counts"]) -> Float[ndarray, " counts"]:
    possible = (k >= 0) & (k <= n)
    inside = np.where(possible, k, 0)
    log_ways = gammaln(n + 1) - gammaln(inside + 1) - gammaln(n - inside + 1)
    return np.where(possible, log_ways, -np.inf)


# --- one string, and several ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderHistory:
    """What is kept of the epochs of one string, so that its order is known at the end: of a fixed size.

    Attributes:
        num_epochs: Evaluated so far.
        acquired: Epochs of acquisition so far; nan where a token is not acquired by now.
        halfway: The right tokens at the epoch whose corrected accuracy is nearest to one half, the first of equals;
            empty as long as none lies within `HALFWAY` of it. Before, right tokens are guesses; after, all are right.
        distance: That epoch's distance from one half.
    """

    num_epochs: int
    acquired: Float[ndarray, " targets"]
    halfway: Bool[ndarray, " halfway"]
    distance: float

    @classmethod
    def of(cls, truth: Truth) -> OrderHistory:
        """Before the first epoch."""
        return cls(0, np.full(len(truth.targets), np.nan), np.empty(0, dtype=bool), math.inf)

    def after(self, epoch: int, scores: TokenScores, truth: Truth, *, corrected_accuracy: float) -> OrderHistory:
        """The history with one more evaluated epoch of the same string.

        Args:
            epoch: Larger than all before.
            scores: Scores of this string alone, in order of position.
            truth: The string's truth, over the same targets.
            corrected_accuracy: `recall/corrected_accuracy` at this epoch; nan where it is undefined.
        """
        acquired = acquired_after(self.acquired, is_acquired(scores.log_prob, truth.guesser), epoch)
        halfway, distance = self.halfway, abs(corrected_accuracy - 0.5)
        if distance <= HALFWAY and distance < self.distance:
            halfway = scores.argmax == truth.target_ids
        else:
            distance = self.distance
        return OrderHistory(self.num_epochs + 1, acquired, halfway, distance)


@dataclass(frozen=True)
class StringOrder:
    """The order of one string.

    Attributes:
        positional: By position.
        halfway: The right tokens of `OrderHistory.halfway`.
        acquired_share: Tokens acquired, among those with surprise; in [0, 1], nan where there are none.
    """

    positional: PositionalOrder
    halfway: Bool[ndarray, " halfway"]
    acquired_share: float

    @classmethod
    def of(
        cls, history: OrderHistory, truth: Truth, *, rng: np.random.Generator, permutations: int = PERMUTATIONS
    ) -> StringOrder:
        """The order after the last epoch; undefined in all respects after fewer than two."""
        acquired = history.acquired[has_surprise(truth.guesser)]
        if history.num_epochs < 2 or len(acquired) == 0:
            return cls(PositionalOrder(UNDEFINED, UNDEFINED), np.empty(0, dtype=bool), math.nan)
        positional = positional_order(acquired, rng=rng, permutations=permutations)
        return cls(positional, history.halfway, float(np.mean(~np.isnan(acquired))))


def measure_order(strings: Sequence[StringOrder]) -> dict[str, float]:
    """The order of one string, or of a trial over its strings, as it is logged.

    Over several strings the correlations and the share are means over those where they are defined, and the runs
    are summed; each p-value is that of the mean, or of the sum, and no summary of p-values.

    Returns:
        Values by key, nan where undefined: `order/spearman`, `order/kendall` and their `_p`, the runs found for each
        one expected (`order/runs_ratio`; below 1 right tokens cluster), `order/runs_p`, `order/acquired_share`.
    """
    spearman = mean_correlation([each.positional.spearman for each in strings])
    kendall = mean_correlation([each.positional.kendall for each in strings])
    runs = runs_test([each.halfway for each in strings])
    shares = [each.acquired_share for each in strings if not math.isnan(each.acquired_share)]
    return {
        "order/spearman": spearman.value,
        "order/spearman_p": spearman.p_value,
        "order/kendall": kendall.value,
        "order/kendall_p": kendall.p_value,
        "order/runs_ratio": runs.num_runs / runs.expected if runs.expected else math.nan,
        "order/runs_p": runs.p_value,
        "order/acquired_share": float(np.mean(shares)) if shares else math.nan,
    }
