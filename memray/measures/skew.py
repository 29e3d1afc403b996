"""Skew of match lengths over samples: how few samples hold how much, what a small probe sees of it, and whether it is
more than tokens drawn one after another would give.

The input is match lengths and the lengths of the references that censor them. This module knows no model and no text.
Censored matches count as long as they were seen to be, so that everything here describes what was recited, not what
could have been.

A large maximum alone is no evidence of skew: that of independent geometric matches grows with the logarithm of the
number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import gammaln

from memray.measures.match_curves import MatchFit, fit
from memray.measures.match_length import require_matches
from memray.measures.statistics import Interval

# Samples from which on an interval is given. A quantile needs 20 above it. In simulation (geometric matches and
# mixtures of them, at most 100 tokens) intervals of 95 % covered the skewness in 5 to 70 % of cases with 200 samples,
# in about 80 % with 2,000 and in 93 % with 5,000; the top share in 50 to 70, 90 and 94 %.
MIN_SAMPLES = {
    "match/median": 40,
    "match/q90": 200,
    "match/q95": 400,
    "match/q99": 2_000,
    "match/skewness": 5_000,
    "match/top_share": 2_000,
}
_FEWEST = 20

# A probe may be this part of all samples at most where E[max_z] is a headline: see `expected_max`.
LARGEST_SHARE = 5


def describe(num_match: Int[ndarray, " samples"], length: Int[ndarray, " samples"]) -> dict[str, float]:
    """The distribution of match lengths in numbers.

    Lengths in tokens: `match/mean`, `match/median`, `match/q90`, `match/q95`, `match/q99` (interpolated linearly) and
    `match/max`. Without unit: `match/skewness`, the third standardised moment; `match/gini`, 0 where all samples have
    equal matches and 1 - 1/M where one of M has all; `match/top_share`, the share of all matched tokens that the top
    1 % of samples hold (rounded down, but at least one sample: 0.01 where all are equal, more below a hundred samples).
    Shares of samples: `match/censored`, whose match reaches the end of its reference, and `match/zero`.

    Args:
        num_match: Match length of each sample.
        length: Tokens of each reference.

    Returns:
        Values by key; skewness is nan where all matches are equal, Gini and top share where none has a token.

    Raises:
        ValueError: If there is no sample, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    require_matches(num_match, length)
    tallies = Tallies.of(num_match)
    described = {key: float(statistic(tallies)[0]) for key, statistic in _STATISTICS.items()}
    return described | {"match/max": float(num_match.max()), "match/censored": float(np.mean(num_match == length))}


def bootstrap_intervals(
    num_match: Int[ndarray, " samples"],
    length: Int[ndarray, " samples"],
    *,
    rng: np.random.Generator,
    resamples: int = 1_999,
) -> dict[str, Interval]:
    """Percentile intervals of 95 % over samples, of what `describe` gives, where such an interval is valid.

    There is none for the maximum, which no resample exceeds; none for a quantile with fewer than 20 samples above its
    rank; and none for skewness and top share of fewer samples than `MIN_SAMPLES`, which rest on as few of them. Fewer
    than 20 samples have none at all.

    Samples are what is resampled; a model trained again would differ by more.

    Args:
        num_match: Match length of each sample.
        length: Tokens of each reference.
        rng: Draws the resamples.
        resamples: Number of resamples.

    Returns:
        Intervals by key, only of what has one. A resample in which a value is undefined could have had any: it counts
        as -infinity for the lower bound and as +infinity for the upper one.

    Raises:
        ValueError: If there are no samples, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    require_matches(num_match, length)
    data, num_samples = Tallies.of(num_match), len(num_match)
    # How often each distinct value is drawn: the same as drawing samples, at the price of the values.
    tallies = Tallies(data.values, rng.multinomial(num_samples, data.counts[0] / num_samples, size=resamples))
    resampled = {key: statistic(tallies) for key, statistic in _STATISTICS.items()}
    resampled["match/censored"] = rng.binomial(num_samples, np.mean(num_match == length), size=resamples) / num_samples
    return {
        key: _percentiles(value) for key, value in resampled.items() if num_samples >= MIN_SAMPLES.get(key, _FEWEST)
    }


# --- what a probe of few samples sees ---------------------------------------------------------------------------


def miss_probability(
    num_samples: int, k: int | Int[ndarray, "..."], z: int | Int[ndarray, "..."]
) -> Float[ndarray, "..."]:
    """P(a probe of z of all samples, without replacement, holds none of k given ones): C(M - k, z) / C(M, z).

    Args:
        num_samples: M, all samples.
        k: How many may be missed, the k longest matches, say; from 0 to M.
        z: Samples in the probe, from 0 to M; broadcasts with k.

    Raises:
        ValueError: If k or z lies outside 0 to M.

    Example:
        >>> round(float(miss_probability(9_723, 10, 200)), 3)
        0.812
    """
    for name, number in (("k", np.asarray(k)), ("z", np.asarray(z))):
        if np.any(number < 0) or np.any(number > num_samples):
            raise ValueError(
                f"0 <= {name} <= num_samples must hold, but got {name}={number.tolist()}, num_samples={num_samples}; "
                "probe no more samples than there are"
            )
    left = num_samples - np.asarray(k) - z
    # scipy.stats.hypergeom is as exact and a hundred times slower. Paired so that it is exactly 1 for k = 0 and z = 0.
    kept = gammaln(num_samples - np.asarray(k) + 1) - gammaln(num_samples + 1)
    log_chance = kept + (gammaln(num_samples - np.asarray(z) + 1) - gammaln(np.maximum(left, 0) + 1))
    return np.asarray(np.where(left >= 0, np.exp(log_chance), 0.0))


def expected_max(values: Int[ndarray, " samples"], z: Int[ndarray, " sizes"]) -> Float[ndarray, " sizes"]:
    """E[max] of z of these values drawn without replacement, exactly: what a probe of z samples finds on average.

    Only z <= M / `LARGEST_SHARE` is a headline of the tail: there it is a mean over many samples, which another
    set of M samples would give too. Towards z = M it becomes the maximum of these M, which none other need have.

    Args:
        values: Match length of each of the M samples.
        z: Sizes of the probe, from 1 to M.

    Returns:
        Tokens, by size; non-decreasing in z.

    Raises:
        ValueError: If a size lies outside 1 to M.

    Example:
        >>> expected_max(np.array([0, 1, 5]), np.array([1, 2, 3])).round(6).tolist()
        [2.0, 3.666667, 5.0]
    """
    distinct, at_most = _max_distribution(values, z)
    return distinct[0] + (1.0 - at_most[:, :-1]) @ np.diff(distinct)


def max_quantile(
    values: Int[ndarray, " samples"], z: Int[ndarray, " sizes"], probability: float
) -> Int[ndarray, " sizes"]:
    """The least value that the maximum of z of these values stays within with at least this probability, exactly.

    Args:
        values: Match length of each of the M samples.
        z: Sizes of the probe, from 1 to M.
        probability: In (0, 1); 0.5 is the median of the maximum.

    Returns:
        Tokens, by size.

    Raises:
        ValueError: If a size lies outside 1 to M, or the probability is not inside (0, 1).
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"the probability must lie inside (0, 1), but got {probability}")
    distinct, at_most = _max_distribution(values, z)
    # The margin is rounding: probabilities that are equal as fractions must compare as equal.
    return distinct[np.argmax(at_most >= probability - 1e-9, axis=1)]


def _max_distribution(
    values: Int[ndarray, " samples"], z: Int[ndarray, " sizes"]
) -> tuple[Int[ndarray, " distinct"], Float[ndarray, "sizes distinct"]]:
    """The distinct values, and P(max <= each): that of missing all samples above it."""
    if np.any(z < 1):
        raise ValueError(f"a probe needs at least one sample, but got z={z.tolist()}")
    distinct, counts = np.unique(values, return_counts=True)
    num_above = len(values) - np.cumsum(counts)
    return distinct, miss_probability(len(values), num_above, z[:, None])


# --- against simulated tokens -----------------------------------------------------------------------------------


class AgainstGeometric(NamedTuple):
    """One statistic beside those of simulated geometric matches.

    Attributes:
        observed: Of the data.
        simulated_mean: Mean over the simulations.
        ratio: Observed by simulated mean; for the skewness only where the simulated one is well above 0.
        p_value: Share of the simulations with at least as large a value, the observed one counted in; never 0.
    """

    observed: float
    simulated_mean: float
    ratio: float
    p_value: float


def dispersion_against_geometric(
    num_match: Int[ndarray, " samples"],
    length: Int[ndarray, " samples"],
    rng: np.random.Generator,
    num_draws: int = 999,
) -> dict[str, AgainstGeometric]:
    """Whether matches are spread wider over samples than tokens of one and the same chance would spread them.

    The reference is the geometric distribution of the same data, drawn with the actual lengths of the references: a
    geometric is skewed too (its skewness is at least 2 without censoring), and so are lengths. The p-value takes the
    fitted chance for the true one, which makes it a little too large.

    A large maximum alone is no evidence of skew, and therefore not among the statistics.

    Args:
        num_match: Match length of each sample.
        length: Tokens of each reference.
        rng: Draws the simulations.
        num_draws: Number of simulations.

    Returns:
        `dispersion` (variance by mean, tokens), `top_share` and `skewness`, as `describe` defines them. All nan where
        the observed one is undefined; a simulation in which one is counts as at least as large.

    Raises:
        ValueError: If there are no samples, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    fitted = fit("geometric", num_match, length)
    simulated = Tallies.simulated(fitted, length, rng=rng, num_draws=num_draws)
    observed = Tallies.of(num_match)
    return {
        "dispersion": _against(float(observed.dispersion()[0]), simulated.dispersion()),
        "top_share": _against(float(observed.top_share()[0]), simulated.top_share()),
        "skewness": _against(float(observed.skewness()[0]), simulated.skewness()),
    }


class Reproduction(NamedTuple):
    """Whether a fitted distribution is as skewed as the data.

    Attributes:
        observed: Skewness of the data; nan where all matches are equal.
        simulated: Interval of 95 % of the skewness of simulations.
        is_reproduced: Whether the observed one lies within; not where it is undefined.
    """

    observed: float
    simulated: Interval
    is_reproduced: bool


def skewness_reproduced(
    num_match: Int[ndarray, " samples"],
    length: Int[ndarray, " samples"],
    fit: MatchFit,
    rng: np.random.Generator,
    num_draws: int = 999,
) -> Reproduction:
    """Whether drawing tokens from a fitted distribution gives the observed skewness: claim C5.

    Lengths of the references are the actual ones, taken to say nothing of how well each is known. Parameters are taken
    as known: fitted to the very data, they bring the simulations nearer to it, not farther. A few percent of true
    distributions fail nevertheless, and a wrong one passes easily where samples are few, since the skewness of a long
    tail then scatters widely.

    A large maximum alone is no evidence of skew: it is no part of this judgement.

    Args:
        num_match: Match length of each sample.
        length: Tokens of each reference.
        fit: The distribution, of these samples or of others.
        rng: Draws the simulations.
        num_draws: Number of simulations.

    Raises:
        ValueError: If there is no sample, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    require_matches(num_match, length)
    observed = float(Tallies.of(num_match).skewness()[0])
    simulated = _percentiles(Tallies.simulated(fit, length, rng=rng, num_draws=num_draws).skewness())
    return Reproduction(observed, simulated, simulated.low <= observed <= simulated.high)


@dataclass(frozen=True)
class Tallies:
    """Match lengths of several sets of as many samples each: how many samples of a set have which.

    Resamples and simulations are thousands of sets of the same few hundred values. Every statistic is one number a set.

    Attributes:
        values: Distinct match lengths, ascending.
        counts: Samples of each set that have them.
    """

    values: Int[ndarray, " distinct"]
    counts: Int[ndarray, "sets distinct"]

    @classmethod
    def of(cls, num_match: Int[ndarray, " samples"]) -> Tallies:
        """One set."""
        values, counts = np.unique(num_match, return_counts=True)
        return cls(values, counts[None])

    @classmethod
    def simulated(
        cls, fitted: MatchFit, length: Int[ndarray, " samples"], *, rng: np.random.Generator, num_draws: int
    ) -> Tallies:
        """Sets drawn from a distribution, with the actual lengths of the references."""
        values = np.arange(length.max() + 1)
        drawn = [np.bincount(fitted.draw(length, rng), minlength=len(values)) for _ in range(num_draws)]
        return cls(values, np.stack(drawn))

    @property
    def num_samples(self) -> int:
        """Samples of each set."""
        return int(self.counts[0].sum())

    def mean(self) -> Float[ndarray, " sets"]:
        """Mean match, tokens."""
        return self.counts @ self.values / self.num_samples

    def quantile(self, q: float) -> Float[ndarray, " sets"]:
        """The q-quantile in tokens, interpolated linearly between neighbours (as numpy's default)."""
        rank = round(q * (self.num_samples - 1), 9)  # see `statistics.censored_quantile`
        num_up_to = np.cumsum(self.counts, axis=1)
        low, high = (self.values[np.sum(num_up_to <= at, axis=1)] for at in (math.floor(rank), math.ceil(rank)))
        return low + rank % 1.0 * (high - low)

    def skewness(self) -> Float[ndarray, " sets"]:
        """Third central moment by the 1.5th power of the variance; nan where all are equal."""
        return _quotient(self._moment(3), self._moment(2) ** 1.5)

    def dispersion(self) -> Float[ndarray, " sets"]:
        """Variance by mean, tokens; nan where none has a token."""
        return _quotient(self._moment(2), self.mean())

    def gini(self) -> Float[ndarray, " sets"]:
        """Half the mean difference of two samples, by the mean; nan where none has a token."""
        # Two samples lie on both sides of a gap between values with chance 2 F (1 - F).
        share = np.cumsum(self.counts, axis=1)[:, :-1] / self.num_samples
        return _quotient((share * (1.0 - share)) @ np.diff(self.values), self.mean())

    def top_share(self) -> Float[ndarray, " sets"]:
        """Share of all matched tokens that the top 1 % of samples hold; nan where none has a token."""
        num_above = self.num_samples - np.cumsum(self.counts, axis=1)
        top = np.clip(max(self.num_samples // 100, 1) - num_above, 0, self.counts)
        return _quotient(top @ self.values, self.counts @ self.values)

    def zero(self) -> Float[ndarray, " sets"]:
        """Share of samples whose first token is wrong."""
        return self.counts @ (self.values == 0) / self.num_samples

    def _moment(self, order: int) -> Float[ndarray, " sets"]:
        return np.sum(self.counts * (self.values - self.mean()[:, None]) ** order, axis=1) / self.num_samples


_STATISTICS: dict[str, Callable[[Tallies], Float[ndarray, " sets"]]] = {
    "match/mean": Tallies.mean,
    "match/median": partial(Tallies.quantile, q=0.5),
    "match/q90": partial(Tallies.quantile, q=0.9),
    "match/q95": partial(Tallies.quantile, q=0.95),
    "match/q99": partial(Tallies.quantile, q=0.99),
    "match/skewness": Tallies.skewness,
    "match/gini": Tallies.gini,
    "match/top_share": Tallies.top_share,
    "match/zero": Tallies.zero,
}


def _against(observed: float, simulated: Float[ndarray, " draws"]) -> AgainstGeometric:
    is_defined = ~np.isnan(simulated)
    if math.isnan(observed) or not np.any(is_defined):
        return AgainstGeometric(observed, math.nan, math.nan, math.nan)
    mean = float(np.mean(simulated[is_defined]))
    # Few samples have few possible values: rounding must not tell equal ones apart.
    num_as_large = np.count_nonzero(~(simulated < observed - 1e-9 * abs(observed)))
    ratio = observed / mean if mean != 0.0 else math.nan
    return AgainstGeometric(observed, mean, ratio, (1 + int(num_as_large)) / (1 + len(simulated)))


def _percentiles(resampled: Float[ndarray, " resamples"]) -> Interval:
    """The middle 95 %, by values that occurred."""
    tail = math.floor(0.025 * (len(resampled) - 1))
    lowest_first = np.sort(np.where(np.isnan(resampled), -np.inf, resampled))
    highest_last = np.sort(np.where(np.isnan(resampled), np.inf, resampled))
    return Interval(float(lowest_first[tail]), float(highest_last[-1 - tail]))


def _quotient(above: ndarray, below: ndarray) -> Float[ndarray, " sets"]:
    """nan where it would be that of a zero."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
