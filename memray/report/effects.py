"""Effects and how sure they are, from few replicates: an estimate, an interval, and p-values of lying beyond a bound.

Two kinds. A `Shift` says how far one sample of replicates lies from another; it stands on ranks alone, so that a
replicate that was never reached (+infinity) is like any other that is late. A `Mean` says where one sample lies whose
values are never censored, as the difference of two measures of the same trial.

Neither is a bootstrap. The percentile bootstrap of five replicates cannot leave their range, and so covers the median
with at most 94 % and, asked for more by Holm's adjustment, still with 94 %. The interval of a shift is exact for any
distribution, and unbounded where so few replicates cannot give the asked level; that of a mean is Student's, exact for
a normal distribution (what it is for others the tests say). Interval and p-value are two sides of one test: the
1 - alpha interval lies beyond a bound exactly where the p-value does not exceed alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from memray.measures.statistics import Interval

UNBOUNDED = Interval(-math.inf, math.inf)
POWER = 0.8
MAX_SEEDS = 1000


@runtime_checkable
class Effect(Protocol):
    """What an effect can say of itself; p-values are two-sided."""

    @property
    def num_replicates(self) -> int:
        """Replicates of its smallest sample."""
        ...

    @property
    def estimate(self) -> float:
        """Where it lies; nan where the data do not say."""
        ...

    def interval(self, level: float) -> Interval:
        """What covers it with a probability; infinite where the data do not bound it."""
        ...

    def p_above(self, bound: float) -> float:
        """The p-value of lying above a bound."""
        ...

    def p_below(self, bound: float) -> float:
        """The p-value of lying below a bound."""
        ...

    def seeds_above(self, bound: float, alpha: float) -> float:
        """Replicates a sample that would show it above the bound at that level with 80 %, if it stayed as it is.

        Infinite where that takes more than a thousand, nan where it does not lie above the bound.
        """
        ...

    def seeds_below(self, bound: float, alpha: float) -> float:
        """The same below the bound."""
        ...


@dataclass(frozen=True)
class Shift:
    """By how much the values of a second sample exceed those of a first (Hodges and Lehmann 1963).

    The estimate is the median of the differences of all pairs, the interval that of Mann and Whitney's test. Of two
    censored values the difference is unknown: it counts as the least possible wherever a large one would show
    something, and as the largest possible wherever a small one would. Ties make interval and p-values wider, never
    narrower.

    Replicates of the same string may be in both samples. They are not paired: a positive correlation, which shared
    random numbers bring, makes the test cautious.

    Attributes:
        first: One value a replicate; +infinity is never reached.
        second: The same of the other sample.
    """

    first: Float[ndarray, " first"]
    second: Float[ndarray, " second"]

    @property
    def num_replicates(self) -> int:
        return min(len(self.first), len(self.second))

    @property
    def estimate(self) -> float:
        # Not np.median, which interpolates between infinite neighbours.
        least, most = self._differences()
        middle = [(len(least) - 1) // 2, len(least) // 2]
        ends = [float(least[middle[0]]), float(most[middle[1]])]
        if ends[0] == ends[1]:
            return ends[0]
        return (ends[0] + ends[1]) / 2 if np.isfinite(ends).all() else math.nan

    def interval(self, level: float) -> Interval:
        least, most = self._differences()
        tails = _cumulative(len(self.first), len(self.second))
        outside = int(np.sum(tails <= (1 - level) / 2 + 1e-12))  # of three against three 1 / 20 is a tail of 90 %
        if outside == 0:
            return UNBOUNDED
        return Interval(float(least[outside - 1]), float(most[-outside]))

    def p_above(self, bound: float) -> float:
        least, _ = self._differences()
        return self._p_value(int(np.sum(least > bound)))

    def p_below(self, bound: float) -> float:
        _, most = self._differences()
        return self._p_value(int(np.sum(most < bound)))

    def seeds_above(self, bound: float, alpha: float) -> float:
        least, most = self._differences()
        return self._seeds(float(np.mean(least > bound) + np.mean(most > bound)) / 2, alpha)

    def seeds_below(self, bound: float, alpha: float) -> float:
        least, most = self._differences()
        return self._seeds(float(np.mean(least < bound) + np.mean(most < bound)) / 2, alpha)

    def _differences(self) -> tuple[Float[ndarray, " pairs"], Float[ndarray, " pairs"]]:
        """The differences of all pairs, ascending: with the unknown ones as small, and as large, as can be."""
        with np.errstate(invalid="ignore"):
            pairs = np.ravel(self.second[:, None] - self.first[None, :])
        unknown = np.isnan(pairs)
        return np.sort(np.where(unknown, -np.inf, pairs)), np.sort(np.where(unknown, np.inf, pairs))

    def _p_value(self, num_beyond: int) -> float:
        cumulative = _cumulative(len(self.first), len(self.second))
        return min(1.0, 2 * float(cumulative[len(cumulative) - 1 - num_beyond]))

    def _seeds(self, share_beyond: float, alpha: float) -> float:
        """Noether's (1987) number of replicates, from the share of pairs that lie beyond the bound."""
        if share_beyond <= 0.5:
            return math.nan
        # A sample in which all pairs do would be decided by the fewest replicates that can decide anything.
        fewest = next(n for n in range(2, MAX_SEEDS) if 2 / math.comb(2 * n, n) <= alpha)
        quantiles = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER)
        needed = 0 if share_beyond == 1.0 else math.ceil(quantiles**2 / (6 * (share_beyond - 0.5) ** 2))
        return float(max(fewest, needed)) if needed <= MAX_SEEDS else math.inf


@dataclass(frozen=True)
class Mean:
    """The mean of one value a replicate, with Student's interval.

    Attributes:
        values: One value a replicate. Where one is infinite, or there is only one, nothing is known of the mean but
            the median of the values.
    """

    values: Float[ndarray, " replicates"]

    @property
    def num_replicates(self) -> int:
        return len(self.values)

    @property
    def estimate(self) -> float:
        if not len(self.values):
            return math.nan
        return float(np.mean(self.values) if np.isfinite(self.values).all() else np.median(self.values))

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite where it is unknown."""
        if len(self.values) < 2 or not np.isfinite(self.values).all():
            return math.inf
        return float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))

    def interval(self, level: float) -> Interval:
        if not math.isfinite(self.error):
            return UNBOUNDED
        reach = float(stats.t.ppf((1 + level) / 2, len(self.values) - 1)) * self.error
        return Interval(self.estimate - reach, self.estimate + reach)

    def p_above(self, bound: float) -> float:
        return self._p_value(self.estimate - bound)

    def p_below(self, bound: float) -> float:
        return self._p_value(bound - self.estimate)

    def seeds_above(self, bound: float, alpha: float) -> float:
        return self._seeds(self.estimate - bound, alpha)

    def seeds_below(self, bound: float, alpha: float) -> float:
        return self._seeds(bound - self.estimate, alpha)

    def _p_value(self, beyond: float) -> float:
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0.0:
            return 0.0 if beyond > 0 else 1.0
        return min(1.0, 2 * float(stats.t.sf(beyond / self.error, len(self.values) - 1)))

    def _seeds(self, beyond: float, alpha: float) -> float:
        if not beyond > 0 or not math.isfinite(self.error):
            return math.nan
        numbers = np.arange(2, MAX_SEEDS + 1)
        spread = self.error * math.sqrt(len(self.values))
        quantiles = stats.t.ppf(1 - alpha / 2, numbers - 1) + stats.t.ppf(POWER, numbers - 1)
        enough = numbers[quantiles * spread / np.sqrt(numbers) <= beyond]
        return float(enough[0]) if len(enough) else math.inf


@cache
def _cumulative(num_first: int, num_second: int) -> Float[ndarray, " counts"]:
    """P(U <= u) of Mann and Whitney's count of pairs, for u = 0, 1, …, where both samples are of one distribution.

    The largest of all values is of the first sample or of the second, and leaves the same question with one value
    fewer: of the second, it exceeds all of the first.
    """
    row = [np.ones(1) for _ in range(num_second + 1)]
    for i in range(1, num_first + 1):
        fewer, row = row, [np.ones(1)]
        for j in range(1, num_second + 1):
            probability = np.zeros(i * j + 1)
            probability[: (i - 1) * j + 1] += fewer[j] * i / (i + j)
            probability[i:] += row[j - 1] * j / (i + j)
            row.append(probability)
    return np.cumsum(row[num_second])
