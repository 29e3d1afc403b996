"""Two arms compared sample by sample: a rank test, and an effect that says how large a difference is.

Paired arms have the same samples; regimes have samples of their own. The input is a value a sample, higher or lower
under one of the two. This module knows no measure and no trial. Many comparisons at once are adjusted by
`memray.measures.statistics.holm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from memray.measures.statistics import Interval, bootstrap_interval

# Smaller differences, relative to the largest value, are rounding: means over seeds that are equal on paper are not
# equal in floating point, and neither are differences that should tie.
_DECIMALS = 12


class PairedComparison(NamedTuple):
    """Two arms over the same samples.

    Attributes:
        effect: Matched-pairs rank-biserial correlation in [-1, 1]; above 0 where the first arm is larger.
        interval: Its 95 % bootstrap interval over samples; nan with fewer than two, or where none was asked for.
        p_value: Of Wilcoxon's signed-rank test, two-sided.
        num_pairs: Samples.
        num_zeros: Those with equal values under both arms.
    """

    effect: float
    interval: Interval
    p_value: float
    num_pairs: int
    num_zeros: int


class UnpairedComparison(NamedTuple):
    """Two regimes with samples of their own.

    Attributes:
        effect: Rank-biserial correlation in [-1, 1]: the share of pairs of one sample of each regime in which the first
            is larger, less the share in which it is smaller.
        statistic: Mann and Whitney's U of the first regime; ties count one half.
        p_value: Two-sided.
    """

    effect: float
    statistic: float
    p_value: float


def paired_comparison(
    first: Float[ndarray, " first"],
    second: Float[ndarray, " second"],
    rng: np.random.Generator | None,
    resamples: int = 9_999,
) -> PairedComparison:
    """Wilcoxon's signed-rank test of two arms over the same samples, and its effect.

    Samples without a difference are treated after Pratt (1959): they take the lowest ranks, which are then left out, so
    that the others keep the ranks that they have among all samples. The effect is (R+ - R-) / (R+ + R-) with the sums
    of the ranks that are left (Kerby 2014). It says which way those samples change that do change; how many these are,
    `num_zeros` says. With the ranks of zeros in the denominator no change of a tail alone could ever be large.

    The p-value is exact up to 13 pairs, and up to 50 without ties and zeros; else it is that of the normal
    approximation with both allowed for (Cureton 1967).

    Args:
        first: Value of each sample under one arm.
        second: The same samples, in the same order, under the other.
        rng: Draws the resamples of the interval; None: no interval.
        resamples: Their number.

    Returns:
        Effect and test; where no sample differs, an effect of 0 and a p-value of 1.

    Raises:
        ValueError: If the arms differ in length, there is no sample, or a value is not finite.

    Example:
        >>> first, second = np.array([5.0, 7.0, 4.0, 9.0]), np.array([5.0, 4.0, 5.0, 2.0])
        >>> found = paired_comparison(first, second, np.random.default_rng(0))
        >>> round(found.effect, 3), found.p_value, found.num_zeros
        (0.556, 0.5, 1)
    """
    if len(first) != len(second):
        raise ValueError(
            f"both arms must have the same samples, but got {len(first)} and {len(second)}; leave out the unpaired"
        )
    _check_values(first, second)
    levels = _signed_levels(first, second)
    num_zeros = int(np.count_nonzero(levels == 0.0))
    # The test sees only signs and order, and they are those of the differences.
    test: Any = stats.wilcoxon(levels, zero_method="pratt") if num_zeros < len(levels) else None
    interval = Interval(np.nan, np.nan)
    if rng is not None:
        interval = bootstrap_interval(levels, statistic=_matched_pairs_effect, rng=rng, resamples=resamples)
    return PairedComparison(
        effect=float(_matched_pairs_effect(levels[None])[0]),
        interval=interval,
        p_value=float(test.pvalue) if test else 1.0,
        num_pairs=len(levels),
        num_zeros=num_zeros,
    )


def mann_whitney(first: Float[ndarray, " first"], second: Float[ndarray, " second"]) -> UnpairedComparison:
    """Mann and Whitney's test of two regimes with samples of their own, and its effect (Kerby 2014).

    `jonckheere_terpstra` of two groups counts the same pairs, against permutations, which is for a few replicates; this
    is for thousands of samples. The p-value is exact where a regime has at most 8 samples and nothing ties; else that
    of the normal approximation, with ties and continuity corrected.

    Args:
        first: Value of each sample of one regime.
        second: Of each sample of the other.

    Raises:
        ValueError: If a regime has no sample, or a value is not finite.

    Example:
        >>> found = mann_whitney(np.array([5.0, 7.0]), np.array([5.0, 1.0, 2.0]))
        >>> round(found.effect, 3), found.statistic
        (0.833, 5.5)
    """
    _check_values(first, second)
    test: Any = stats.mannwhitneyu(first, second)
    statistic, num_pairs = float(test.statistic), len(first) * len(second)
    return UnpairedComparison(2.0 * statistic / num_pairs - 1.0, statistic, float(test.pvalue))


def _signed_levels(first: Float[ndarray, " samples"], second: Float[ndarray, " samples"]) -> Float[ndarray, " samples"]:
    """Differences with their sizes replaced by whole numbers in the same order, equal where sizes are; 0 stays 0."""
    largest = max(np.abs(first).max(), np.abs(second).max()) or 1.0
    differences = np.round(first / largest - second / largest, _DECIMALS)
    return np.sign(differences) * stats.rankdata(np.abs(differences), method="dense")


def _matched_pairs_effect(levels: Float[ndarray, "resamples samples"], axis: int = -1) -> Float[ndarray, " resamples"]:
    """Matched-pairs rank-biserial correlation of each row of signed levels; 0 in a row of zeros.

    Ranks are read off the numbers of samples at each level, for sorting thousands of resamples takes a minute.
    """
    assert axis == -1
    num_rows, num_levels = len(levels), int(np.abs(levels).max())
    width = 2 * num_levels + 1
    cells = levels.astype(np.int64) + num_levels + width * np.arange(num_rows)[:, None]
    counts = np.bincount(cells.ravel(), minlength=width * num_rows).reshape(num_rows, width)
    zeros, above, below = counts[:, num_levels], counts[:, num_levels + 1 :], counts[:, :num_levels][:, ::-1]
    differing = above + below
    ranks = zeros[:, None] + np.cumsum(differing, axis=1) - (differing - 1) / 2
    total = np.sum(differing * ranks, axis=1)
    return np.sum((above - below) * ranks, axis=1) / np.where(total > 0.0, total, 1.0)


def _check_values(*arms: Float[ndarray, " _"]) -> None:
    for name, values in zip(("first", "second"), arms, strict=True):
        if len(values) == 0 or not np.all(np.isfinite(values)):
            raise ValueError(
                f"each arm needs samples, with finite values, but the {name} has {len(values)} of which "
                f"{np.count_nonzero(~np.isfinite(values))} are not finite; leave these samples out of both"
            )
