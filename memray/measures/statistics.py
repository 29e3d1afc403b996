"""Statistics over replicates: medians with censoring, intervals, trends over ordered factors, many tests at
once.

A replicate is one independently drawn string. Throughout, nan is a right-censored value (never reached, or
not before training stopped): it counts as +infinity, behind every number. Nothing is averaged over the
replicates that arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from scipy import stats

Alternative = Literal["increasing", "decreasing", "two-sided"]

# Elements of the largest temporary array, so that memory stays flat whatever the number of replicates.
_BATCH_ELEMENTS = 10_000_000
# Values of a trend whose pairs are counted one by one; of more, sorting is faster (1.3 against 0.3 ms at a thousand).
_COUNTED_IN_PAIRS = 500


class Interval(NamedTuple):
    """A two-sided interval. An infinite bound means that the data do not bound that side; nan, that it is
    undefined."""

    low: float
    high: float


class TrendTest(NamedTuple):
    """A test statistic and the p-value that permutations give it."""

    statistic: float
    p_value: float


def censored_median(values: Float[ndarray, " replicates"]) -> float:
    """The median with nan as +infinity; nan when it is itself censored, or there are no values.

    Example:
        >>> censored_median(np.array([40.0, np.nan, 60.0]))
        60.0
    """
    return censored_quantile(values, 0.5)


def censored_quantile(values: Float[ndarray, " replicates"], q: float) -> float:
    """The q-quantile with nan as +infinity, interpolated linearly between neighbours (as numpy's default).

    Args:
        values: One value a replicate.
        q: Share of the replicates that lie below; in [0, 1].

    Returns:
        The quantile in the unit of the values; nan when it is censored, which it is as soon as a censored
        neighbour has any weight, or when there are no values.
    """
    if len(values) == 0:
        return math.nan
    ordered = np.sort(_uncensor(values))
    # Without rounding 0.29 * 100 falls short of 29, and a censored neighbour would get a weight of 4e-15.
    position = round(q * (len(ordered) - 1), 9)
    below = math.floor(position)
    weight = position - below
    if weight == 0.0 or ordered[below] == np.inf:
        quantile = float(ordered[below])
    else:
        quantile = float(ordered[below] + weight * (ordered[below + 1] - ordered[below]))
    return quantile if math.isfinite(quantile) else math.nan


def bootstrap_interval(
    *samples: Float[ndarray, " _"],
    statistic: Callable[..., Any] = np.median,
    rng: np.random.Generator,
    paired: bool = False,
    level: float = 0.95,
    resamples: int = 9_999,
) -> Interval:
    """Percentile bootstrap interval of a statistic of one or more samples of replicates.

    Censored values enter the statistic as +infinity, so that a median may be infinite in some resamples, and
    a bound of the interval with it. A resample in which the statistic is undefined (the difference of two
    infinite medians) could have taken any value: it counts as -infinity for the lower bound and as +infinity
    for the upper one. Bounds are values that occurred, never interpolated between a number and infinity.

    The interval never leaves the range of the resampled statistic. For a median of n replicates its coverage
    is therefore at most 1 - 2^(1 - n): 0.75 with 3 replicates, 0.94 with 5.

    Args:
        *samples: One value a replicate. Independent samples are resampled apart.
        statistic: Takes the samples and the keyword `axis`, along which the replicates lie.
        rng: Draws the resamples.
        paired: Whether the samples share their replicates, in the same order, and are resampled together.
        level: Coverage aimed at, in (0, 1).
        resamples: Number of resamples.

    Returns:
        The interval in the unit of the statistic; nan at both ends where a sample has fewer than two values.

    Raises:
        ValueError: If paired samples differ in length.
    """
    lengths = [len(sample) for sample in samples]
    if paired and len(set(lengths)) > 1:
        raise ValueError(
            f"paired samples must have the same replicates, but got {lengths} of them; leave out the unpaired"
        )
    if min(lengths) < 2:
        return Interval(math.nan, math.nan)
    uncensored = [_uncensor(sample) for sample in samples]
    batch = _batch(sum(lengths))
    # Not scipy.stats.bootstrap: it interpolates between infinite neighbours, which makes nan of its bounds.
    parts = []
    for begin in range(0, resamples, batch):
        drawn = _resample(uncensored, count=min(batch, resamples - begin), paired=paired, rng=rng)
        with np.errstate(invalid="ignore"):
            parts.append(statistic(*drawn, axis=-1))
    resampled = np.concatenate(parts)
    tail = math.floor((1.0 - level) / 2.0 * (resamples - 1))
    lowest_first = np.sort(np.where(np.isnan(resampled), -np.inf, resampled))
    highest_last = np.sort(np.where(np.isnan(resampled), np.inf, resampled))
    return Interval(float(lowest_first[tail]), float(highest_last[-1 - tail]))


def jonckheere_terpstra(
    groups: Sequence[Float[ndarray, " _"]],
    *,
    alternative: Alternative,
    rng: np.random.Generator,
    permutations: int = 9_999,
) -> TrendTest:
    """Jonckheere-Terpstra test for a trend of the values over ordered groups.

    The statistic counts the pairs of replicates of two groups in which the later group has the larger value;
    ties, among them two censored values, count one half. For two groups it is Mann and Whitney's U of the
    second (Jonckheere 1954).

    The p-value is exact where there are at most `permutations` ways to deal the values to the groups (1,680
    for three groups of three), or orders of all values if a group has only one; otherwise it is estimated
    from as many random ones. These count the observed one in, so that it is never 0. Two-sided, it is twice
    the smaller one-sided one.

    Args:
        groups: One value a replicate, a group per level, in the order of the factor.
        alternative: Whether the values increase or decrease with the factor, or either.
        rng: Draws the permutations where they are not exhausted.
        permutations: Most permutations that are looked at.

    Returns:
        The count, between 0 and the number of pairs of replicates of two groups, and its p-value.

    Raises:
        ValueError: If there are fewer than two groups, or an empty one.

    Example:
        >>> groups = [np.array([9.0, 8.0, 7.0]), np.array([6.0, 5.0, 4.0])]
        >>> rng = np.random.default_rng(0)
        >>> statistic, p_value = jonckheere_terpstra(groups, alternative="two-sided", rng=rng)
        >>> statistic, round(p_value, 6)
        (0.0, 0.1)
    """
    sizes = [len(group) for group in groups]
    if len(sizes) < 2 or min(sizes) == 0:
        raise ValueError(
            f"a trend needs at least two groups with a replicate each, but got groups of {sizes}; "
            "leave out empty levels"
        )
    # Ranks instead of values: infinities are finite among them, and ties stay ties.
    ranks = stats.rankdata(_uncensor(np.concatenate(groups)))
    bounds = np.cumsum(sizes)[:-1]
    # scipy deals to groups only if each has two values; else it can still put all values in another order.
    can_deal = min(sizes) > 1
    result = stats.permutation_test(
        np.split(ranks, bounds) if can_deal else [ranks],
        lambda *dealt, axis: _concordant_pairs(np.concatenate(dealt, axis=axis), bounds),
        permutation_type="independent" if can_deal else "pairings",
        vectorized=True,
        n_resamples=permutations,
        batch=_batch(len(ranks) ** 2 if len(ranks) <= _COUNTED_IN_PAIRS else len(ranks)),
        alternative={"increasing": "greater", "decreasing": "less", "two-sided": "two-sided"}[alternative],
        axis=-1,
        rng=rng,
    )
    return TrendTest(float(result.statistic), float(result.pvalue))


def holm(p_values: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """P-values adjusted for the number of tests (Holm 1979).

    Rejecting where they are at most a level keeps the chance of any false rejection below it. The i-th
    smallest of m is multiplied by m - i + 1, and is at least as large as those before it.

    Args:
        p_values: In [0, 1]. A nan is a test that was not made: it stays nan and does not count towards m.

    Returns:
        Adjusted p-values in [0, 1], in the order given.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(6).tolist()
        [0.03, 0.06, 0.06]
    """
    num_tests = int(np.sum(~np.isnan(p_values)))
    order = np.argsort(p_values)[:num_tests]  # nan sorts last
    scaled = p_values[order] * np.arange(num_tests, 0, -1)
    adjusted = np.full(len(p_values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def _concordant_pairs(
    ranks: Float[ndarray, "*batch values"], bounds: Int[ndarray, " inner_bounds"]
) -> Float[ndarray, "*batch"]:
    """Pairs of values of two groups in order, ties as halves; `bounds` say where the later groups begin."""
    if ranks.shape[-1] > _COUNTED_IN_PAIRS:
        return _concordant_by_tau(ranks, bounds)
    count = np.zeros(ranks.shape[:-1])
    for later, begin in zip(np.split(ranks, bounds, axis=-1)[1:], bounds, strict=True):
        difference = later[..., None, :] - ranks[..., :begin, None]
        count += np.sum(0.5 * (np.sign(difference) + 1.0), axis=(-1, -2))
    return count


def _concordant_by_tau(
    ranks: Float[ndarray, "*batch values"], bounds: Int[ndarray, " inner_bounds"]
) -> Float[ndarray, "*batch"]:
    """The same from Kendall's tau-b of groups and values, which scipy counts in n log n steps instead of n^2.

    Every row holds the same values, in another order.
    """
    groups = np.searchsorted(bounds, np.arange(ranks.shape[-1]), side="right")
    of_two_groups = _untied_pairs(groups)
    of_two_values = _untied_pairs(ranks.reshape(-1, ranks.shape[-1])[0])
    if of_two_values == 0:
        return np.full(ranks.shape[:-1], of_two_groups / 2)

    def tau(row: Float[ndarray, " values"]) -> float:
        result: Any = stats.kendalltau(groups, row, method="asymptotic")
        return result.statistic

    # Concordant pairs less discordant ones: a whole number.
    excess = np.rint(np.apply_along_axis(tau, -1, ranks) * math.sqrt(of_two_groups) * math.sqrt(of_two_values))
    return np.asarray((of_two_groups + excess) / 2)


def _untied_pairs(values: Shaped[ndarray, " values"]) -> int:
    """Pairs of values that differ."""
    _, sizes = np.unique(values, return_counts=True)
    return (len(values) ** 2 - int(np.sum(sizes**2))) // 2


def _resample(
    samples: Sequence[Float[ndarray, " _"]], *, count: int, paired: bool, rng: np.random.Generator
) -> list[Float[ndarray, "resamples _"]]:
    if paired:
        shared = rng.integers(len(samples[0]), size=(count, len(samples[0])))
        return [sample[shared] for sample in samples]
    return [sample[rng.integers(len(sample), size=(count, len(sample)))] for sample in samples]


def _uncensor(values: Float[ndarray, " replicates"]) -> Float[ndarray, " replicates"]:
    return np.where(np.isnan(values), np.inf, values)


def _batch(elements_per_resample: int) -> int:
    return max(1, _BATCH_ELEMENTS // elements_per_resample)


def median_interval(values: Float[ndarray, " replicates"], *, level: float = 0.95) -> Interval:
    """The interval of the median that order statistics give, whatever the distribution.

    It is the narrowest pair of order statistics, symmetric in rank, that covers the median with at least the
    stated probability. Fewer than six replicates cannot reach 95 %: their whole range is given, which covers
    the median with probability 1 - 2^(1 - n). A censored bound is infinite.

    Example:
        >>> median_interval(np.array([3.0, 1.0, 2.0]))
        Interval(low=1.0, high=3.0)
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan)
    ordered = np.sort(_uncensor(values))
    # The largest rank k with P(fewer than k of n below the median) <= (1 - level) / 2.
    outside = int(stats.binom.ppf((1 - level) / 2, count, 0.5))
    return Interval(float(ordered[max(0, outside - 1)]), float(ordered[min(count - 1, count - outside)]))
