"""Dependence: whether a token is more often right after right ones than its sample and its position account for.

The input is which reference tokens of each sample are right under teacher forcing, a row a sample, and how many tokens
each has. Pooled over samples, right tokens go together even if each is an independent coin: some samples are easier,
and some positions. What counts is the information beyond that of random matrices with as many right tokens in every
sample and at every position. This module knows no model and no token.

Strata of sample accuracy do not work, for they call independent bits dependent. A stratum of equal accuracy fixes the
sum of its bits, so that each tells of the others (of two tokens, one of them right, each tells all); a wide one still
holds samples of different difficulty; and neither takes out the positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats
from scipy.special import rel_entr

from memray.measures.statistics import Interval

# Trades between two draws, for each sample.
TRADES_PER_SAMPLE = 10
# The first draw comes after as many trades as lie between this many later ones. Where half of all tokens are copies of
# the one before, nothing is left of that after two.
BURN_IN_DRAWS = 5


# --- information ------------------------------------------------------------------------------------------------


def lag_information(bits: Bool[ndarray, "samples positions"], length: Int[ndarray, " samples"], lag: int) -> float:
    """I(C_j; C_{j+lag}) in bits, pooled over all pairs of tokens of a sample at that distance.

    Corrected after Miller and Madow (1955): for independent bits it is 0 in the mean, so that it may fall below.

    Args:
        bits: Whether each token is right; False beyond the length of its sample.
        length: Tokens of each sample.
        lag: Distance of the tokens of a pair, at least 1.

    Returns:
        Bits; nan where no sample is longer than the lag.

    Raises:
        ValueError: If the matrix and the lengths contradict each other, or the lag is below 1.

    Example:
        >>> copied = np.array([[True, True], [False, False]] * 500)
        >>> round(lag_information(copied, np.full(1000, 2), lag=1), 2)
        1.0
    """
    if lag < 1:
        raise ValueError(f"a lag must be at least 1, the next token, but got {lag}; give the distance of two tokens")
    return _information_bits(bits[:, :-lag], bits[:, lag:], _present(bits, length)[:, lag:])


def history_information(bits: Bool[ndarray, "samples positions"], length: Int[ndarray, " samples"]) -> float:
    """I(C_j; all earlier tokens of the sample are right) in bits, pooled over all tokens but the first ones.

    Corrected as `lag_information` is, of the same matrix and lengths; nan where no sample has two tokens.
    """
    all_right = np.logical_and.accumulate(bits, axis=1)
    return _information_bits(all_right[:, :-1], bits[:, 1:], _present(bits, length)[:, 1:])


def _information_bits(
    first: Bool[ndarray, "samples pairs"],
    second: Bool[ndarray, "samples pairs"],
    is_present: Bool[ndarray, "samples pairs"],
) -> float:
    """The corrected information of pairs of bits, of which the second one is False where it is absent."""
    num_pairs = np.count_nonzero(is_present)
    if num_pairs == 0:
        return math.nan
    both, one, other = (np.count_nonzero(each) for each in (first & second, first & is_present, second))
    cells = np.array([[both, one - both], [other - both, num_pairs - one - other + both]])
    rows, columns = cells.sum(axis=1), cells.sum(axis=0)
    nats = rel_entr(cells / num_pairs, np.outer(rows / num_pairs, columns / num_pairs)).sum()
    occupied_cells, occupied_rows, occupied_columns = (np.count_nonzero(each) for each in (cells, rows, columns))
    bias_nats = (occupied_cells - occupied_rows - occupied_columns + 1) / (2 * num_pairs)
    return float((nats - bias_nats) / math.log(2))


def lag_contrast(
    bits: Bool[ndarray, "samples positions"], length: Int[ndarray, " samples"], lag: int, far_lag: int
) -> float:
    """cov(lag) - cov(far lag) of the bits, over samples: what near tokens share beyond any two tokens of a sample.

    Both are taken at the same first positions, over the samples that reach the far lag from there, about the means of
    each position; else they would differ as long samples differ from short ones. What samples differ in adds to both,
    equally where all positions are alike: only there is the contrast of independent bits 0 in the mean.

    Returns:
        Covariance, pooled over the first positions; nan where no two samples reach the far lag.

    Raises:
        ValueError: If the matrix and the lengths contradict each other, or 1 <= lag < far_lag does not hold.
    """
    if not 1 <= lag < far_lag:
        raise ValueError(f"1 <= lag < far_lag must hold, but got (lag={lag}, far_lag={far_lag}); leave this lag out")
    reaches = _present(bits, length)[:, far_lag:]
    num_first = reaches.shape[1]
    first = np.where(reaches, bits[:, :num_first], 0.0)
    difference = np.where(reaches, bits[:, lag : lag + num_first] * 1.0 - bits[:, far_lag:], 0.0)
    num_samples = reaches.sum(axis=0)
    of_means = first.sum(axis=0) * difference.sum(axis=0) / np.maximum(num_samples, 1)
    freedom = int(np.sum(np.maximum(num_samples - 1, 0)))
    return float(np.sum(first * difference) - np.sum(of_means)) / freedom if freedom else math.nan


# --- matrices with the same margins -----------------------------------------------------------------------------


def permuted(
    bits: Bool[ndarray, "samples positions"], length: Int[ndarray, " samples"], rng: np.random.Generator, num_draws: int
) -> Iterator[Bool[ndarray, "samples positions"]]:
    """Random matrices with as many right tokens in every sample and at every position, each such matrix as likely.

    If tokens are independent, with odds that are a factor of the sample times one of the position, then all matrices
    with the observed margins are equally likely, whatever the factors (Rasch 1960). This holds for samples of different
    lengths too: absent tokens add nothing to the likelihood, so that the margins of the others stay sufficient. It
    holds for no other model: where odds rise along the positions in some samples more than in others, or go by the
    distance from the sample's end, independent bits look dependent.

    Draws come from curveball trades (Strona et al. 2014), of all samples at once in random pairs (Carstens et al.
    2018): the tokens that only one of the two has right, at positions that both have, are dealt anew. A round is as
    likely as its reverse, so that no matrix is preferred. All are reached: since absent tokens come last, the longer
    of two samples has every position of the shorter, and the exchanges of two tokens that join any two matrices of
    equal margins can be made. (Where absent tokens are anywhere, they cannot.)

    Args:
        bits: Whether each token is right; False beyond the length of its sample.
        length: Tokens of each sample.
        rng: Draws pairs and tokens.
        num_draws: Number of matrices.

    Yields:
        The matrices; between two of them lie at least ten trades for each sample, and fifty before the first.

    Raises:
        ValueError: If the matrix and the lengths contradict each other.
    """
    _present(bits, length)
    num_samples = len(bits)
    rounds = math.ceil(TRADES_PER_SAMPLE * num_samples / max(1, num_samples // 2))
    # Positions first: a trade goes through them one by one, for all pairs together.
    columns = bits.T.copy()
    for draw in range(num_draws):
        for _ in range(rounds if draw else rounds * BURN_IN_DRAWS):
            _trade(columns, length, rng)
        yield columns.T.copy()


def _trade(
    columns: Bool[ndarray, "positions samples"], length: Int[ndarray, " samples"], rng: np.random.Generator
) -> None:
    """Let each sample, but for one of an odd number, trade with another, in place."""
    num_positions, num_samples = columns.shape
    one, other = rng.permutation(num_samples)[: num_samples // 2 * 2].reshape(2, -1)
    ones, others = columns[:, one], columns[:, other]
    shared = np.arange(num_positions)[:, None] < np.minimum(length[one], length[other])
    differs = (ones ^ others) & shared
    # Of the tokens that are left, the next goes to the one sample with the share of them that it still wants: every
    # choice of as many tokens as it had is then equally likely.
    left, wanted = differs.sum(axis=0), (ones & differs).sum(axis=0)
    chance = rng.random(differs.shape)
    to_one = np.empty_like(differs)
    for position in range(num_positions):
        to_one[position] = differs[position] & (chance[position] * left < wanted)
        wanted -= to_one[position]
        left -= differs[position]
    flips = differs & (to_one ^ ones)
    columns[:, one], columns[:, other] = ones ^ flips, others ^ flips


# --- observed against the null ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excess:
    """A statistic of the observed bits beyond that of matrices with the same margins, in its own unit.

    All nan where the statistic is undefined.

    Attributes:
        observed: Mostly what differences of samples and of positions make of it.
        null_mean: Mean over the draws.
        interval: 95 % interval of the excess, as wide as the statistic varies among the draws (a t interval, which
            allows for their number).
        p_value: Share of the matrices, the observed one among them, with at least the observed statistic. One-sided:
            where right tokens avoid each other, so that the excess is negative, it is near 1.
    """

    observed: float
    null_mean: float
    interval: Interval
    p_value: float

    @property
    def excess(self) -> float:
        """The observed statistic less the mean of the null."""
        return self.observed - self.null_mean

    @classmethod
    def of(cls, observed: float, null: Float[ndarray, " draws"]) -> Excess:
        """The observed statistic against that of at least two draws."""
        if math.isnan(observed):
            return cls(math.nan, math.nan, Interval(math.nan, math.nan), math.nan)
        num_draws, mean = len(null), float(np.mean(null))
        spread = float(np.std(null, ddof=1)) * math.sqrt(1 + 1 / num_draws)
        half = float(stats.t.ppf(0.975, num_draws - 1)) * spread
        # Rounding must not tell apart what is equal.
        num_as_large = int(np.count_nonzero(null >= observed - 1e-12))
        interval = Interval(observed - mean - half, observed - mean + half)
        return cls(observed, mean, interval, (1 + num_as_large) / (1 + num_draws))


@dataclass(frozen=True)
class Dependence:
    """How the right tokens of a sample depend on each other.

    Attributes:
        lags: Information between tokens at each distance, in bits.
        history: Information between a token and whether all earlier ones are right, in bits.
        lag_contrast: Covariance at each distance less that at the far one; its sign tells copies from opposites. It
            has a null of its own, since positions of unequal difficulty keep it off 0.
    """

    lags: dict[int, Excess]
    history: Excess
    lag_contrast: dict[int, Excess]


def dependence(
    bits: Bool[ndarray, "samples positions"],
    length: Int[ndarray, " samples"],
    rng: np.random.Generator,
    lags: Sequence[int] = (1, 2, 3, 5, 10),
    far_lag: int = 20,
    num_draws: int = 199,
) -> Dependence:
    """Whether right tokens depend on each other beyond what samples and positions account for (see `permuted`).

    Dependence is not yet a mechanism: that stretches of a text are easy, whatever was right before, shows as well.

    Args:
        bits: Whether each token is right; False beyond the length of its sample.
        length: Tokens of each sample.
        rng: Draws the matrices of the null.
        lags: Distances of tokens, each at least 1.
        far_lag: The distance that the others are contrasted with, above all of them.
        num_draws: Matrices of the null, at least 2; the smallest p-value is 1 / (num_draws + 1).

    Raises:
        ValueError: If the matrix and the lengths contradict each other, 1 <= lag < far_lag does not hold for each lag,
            or there are fewer than two draws.
    """
    if num_draws < 2:
        raise ValueError(f"a spread needs at least two draws, but got num_draws={num_draws}; 199 are the default")

    def statistics(matrix: Bool[ndarray, "samples positions"]) -> list[float]:
        information = [lag_information(matrix, length, lag) for lag in lags]
        contrasts = [lag_contrast(matrix, length, lag, far_lag) for lag in lags]
        return [history_information(matrix, length), *information, *contrasts]

    observed = statistics(bits)
    null = np.array([statistics(draw) for draw in permuted(bits, length, rng, num_draws)])
    history, *of_lags = (Excess.of(*each) for each in zip(observed, null.T, strict=True))
    information, contrasts = of_lags[: len(lags)], of_lags[len(lags) :]
    return Dependence(dict(zip(lags, information, strict=True)), history, dict(zip(lags, contrasts, strict=True)))


def _present(
    bits: Bool[ndarray, "samples positions"], length: Int[ndarray, " samples"]
) -> Bool[ndarray, "samples positions"]:
    """Which cells are tokens."""
    num_positions = bits.shape[1]
    if np.any(length < 0) or np.any(length > num_positions):
        raise ValueError(
            f"each sample must have a length from 0 to {num_positions}, but got {length}; count the tokens of each row"
        )
    is_present = np.arange(num_positions) < length[:, None]
    if np.any(bits & ~is_present):
        sample, position = np.argwhere(bits & ~is_present)[0]
        raise ValueError(
            f"cells beyond a sample's length must be False, but sample {sample} of length {length[sample]} is right at "
            f"position {position}; set the padding to False"
        )
    return is_present
