"""Curves of match lengths: by which of them a distribution is described best, and whether tokens get easier within a
sample, which no curve tells.

The input is match lengths, and for the last question the correctness that they come from: see `match_length`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import optimize
from scipy.special import betaln, expit, gammaln, logit, ndtr, xlog1py, xlogy

from memray.measures.fading import SURE
from memray.measures.match_length import Correctness, counts_at_risk, require_matches
from memray.measures.statistics import Interval

ModelName = Literal["geometric", "linear", "beta_geometric"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)

# Natural logarithm of Beta's a + b, within which it is sought. Beyond e^14 nobody's samples differ; below e^-7 each is
# either known whole or not at all.
_CONCENTRATION = Interval(-7.0, 14.0)


@dataclass(frozen=True, kw_only=True)
class MatchFit:
    """The most likely distribution of one kind.

    Each kind is a curve of the conditional p_j, and only that is seen of it. A rising curve may come from tokens that
    get easier, or from samples that differ (the beta-geometric: p_j rises because the hard samples leave). No match
    lengths tell one from the other; `within_sample_slope` does.

    Attributes:
        name: geometric: constant p_j = p. linear: p_j = alpha j + p0, kept 1e-6 from 0 and 1. beta_geometric: each
            sample has its own constant p, drawn from Beta(a, b), so that p_j = (a + j - 1) / (a + b + j - 1).
        parameters: By their names above.
        log_likelihood: Nats, at most 0.
    """

    name: ModelName
    parameters: dict[str, float]
    log_likelihood: float

    @property
    def aic(self) -> float:
        """Akaike's criterion, 2 (parameters - log-likelihood), in nats; the lower the better."""
        return 2.0 * (len(self.parameters) - self.log_likelihood)

    def survival(self, n: Int[ndarray, " matches"]) -> Float[ndarray, " matches"]:
        """P(N >= n) of a reference without end, for n of at least 0."""
        parameters = self.parameters
        if self.name == "geometric":
            return parameters["p"] ** n.astype(np.float64)
        if self.name == "linear":
            return linear_survival(n, parameters["alpha"], parameters["p0"])
        return np.exp(betaln(parameters["a"] + n, parameters["b"]) - betaln(parameters["a"], parameters["b"]))

    def draw(self, length: Int[ndarray, " samples"], rng: np.random.Generator) -> Int[ndarray, " samples"]:
        """A match length for each reference, censored at its end."""
        falling = self.survival(np.arange(1, length.max() + 1))
        # As many n have P(N >= n) above a uniform number as lie before its place in the ascending order.
        num_match = len(falling) - np.searchsorted(falling[::-1], rng.random(len(length)), side="right")
        return np.minimum(num_match, length)


def fit(name: ModelName, num_match: Int[ndarray, " samples"], length: Int[ndarray, " samples"]) -> MatchFit:
    """The most likely distribution of one kind, of matches censored at the end of their references.

    Args:
        name: The kind: see `MatchFit`.
        num_match: Match length of each sample.
        length: Tokens of each reference.

    Raises:
        ValueError: If there is no sample, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    require_matches(num_match, length)
    num_at_risk, num_right = counts_at_risk(num_match, length)
    last = int(np.count_nonzero(num_at_risk))
    right, wrong = num_right[:last], (num_at_risk - num_right)[:last]
    if name == "geometric":
        parameters = {"p": float(right.sum() / num_at_risk.sum())}
    elif name == "linear":
        parameters = _fit_linear(right, wrong)
    else:
        parameters = _fit_beta_geometric(right, wrong)
    log_likelihood = _log_likelihood(_curve(name, parameters, last)[None], right, wrong)
    return MatchFit(name=name, parameters=parameters, log_likelihood=float(log_likelihood[0]))


def fit_all(num_match: Int[ndarray, " samples"], length: Int[ndarray, " samples"]) -> dict[ModelName, MatchFit]:
    """Every kind fitted to the same matches; `min` by `aic` is the best.

    The geometric lies inside both others (alpha = 0; a + b without bound). Where it is true, AIC still prefers one of
    them by chance, in about one of seven cases. The linear and the beta-geometric rise alike at first; what tells them
    apart is that the second bends, which takes matches long enough to see p_j over a good part of its range. Where few
    matches are longer than a few tokens, all three describe them equally well, and differences below 2 say nothing.
    """
    return {name: fit(name, num_match, length) for name in MODELS}


def linear_survival(n: Int[ndarray, " matches"], alpha: float, p0: float) -> Float[ndarray, " matches"]:
    """P(N >= n) where p_j = alpha j + p0, kept 1e-6 from 0 and 1: the product of the first n.

    Where the line lies inside, it is alpha^n Gamma(n + 1 + p0 / alpha) / Gamma(1 + p0 / alpha) for alpha > 0. For
    alpha < 0 these have no logarithms: with b = -alpha the factors are b (p0 / b - j), and their product is b^n
    Gamma(p0 / b) / Gamma(p0 / b - n). Positions before the line enters and after it leaves are counted apart.

    Args:
        n: At least 0.
        alpha: Slope a position.
        p0: The line at position 0, which no token has.
    """
    if abs(alpha) < 1e-15:  # p0 / alpha would leave the floats' range long before such a slope is felt
        return float(np.clip(p0, SURE, 1.0 - SURE)) ** n.astype(np.float64)
    before, after = (SURE, 1.0 - SURE) if alpha > 0.0 else (1.0 - SURE, SURE)
    num_before = np.clip(np.floor((before - p0) / alpha), 0, n)
    num_inside = np.clip(np.ceil((after - p0) / alpha) - 1, num_before, n) - num_before
    first, last = num_before + 1 + p0 / alpha, num_before + num_inside + p0 / alpha
    smallest = np.where(num_inside > 0, first if alpha > 0.0 else -last, 1.0)
    factors = np.maximum(num_inside, 1)
    # Gamma(x + m) / Gamma(x) as Gamma(m) / B(x, m): for the huge x of a slight slope the Gammas cancel to nothing.
    log_inside = factors * math.log(abs(alpha)) + gammaln(factors) - betaln(smallest, factors)
    return np.exp(
        num_before * math.log(before)
        + np.where(num_inside > 0, log_inside, 0.0)
        + (n - num_before - num_inside) * math.log(after)
    )


def _curve(name: ModelName, parameters: dict[str, float], num_positions: int) -> Float[ndarray, " positions"]:
    """The conditional p_j of a kind."""
    position = np.arange(1, num_positions + 1)
    if name == "geometric":
        return np.full(num_positions, parameters["p"])
    if name == "linear":
        return np.clip(parameters["alpha"] * position + parameters["p0"], SURE, 1.0 - SURE)
    at = parameters["a"] + position - 1
    return at / (at + parameters["b"])


def _log_likelihood(
    curves: Float[ndarray, "curves positions"], right: Int[ndarray, " positions"], wrong: Int[ndarray, " positions"]
) -> Float[ndarray, " curves"]:
    return np.sum(xlogy(right, curves) + xlog1py(wrong, -curves), axis=1)


def _fit_linear(right: Int[ndarray, " positions"], wrong: Int[ndarray, " positions"]) -> dict[str, float]:
    """The best line of a grid, then improved without derivatives.

    The likelihood has kinks wherever the line reaches 0 or 1 at a position, so it need not have one maximum. The grid
    runs over p_1 and over where the line reaches 1, or 0.
    """
    position = np.arange(1, len(right) + 1)
    if len(position) == 1:
        return {"alpha": 0.0, "p0": float(np.clip(right[0] / (right + wrong)[0], SURE, 1.0 - SURE))}

    def badness(lines: Float[ndarray, "lines two"]) -> Float[ndarray, " lines"]:
        curves = np.clip(lines[:, :1] + lines[:, 1:] * (position - 1), SURE, 1.0 - SURE)
        return -_log_likelihood(curves, right, wrong)

    first = expit(np.linspace(-7.0, 7.0, 29))[:, None]
    inverse = 1.0 / np.geomspace(0.5, 20.0 * len(position), 24)
    slopes = np.concatenate([(1.0 - first) * inverse, -first * inverse, np.zeros_like(first)], axis=1)
    lines = np.stack([np.broadcast_to(first, slopes.shape), slopes], axis=-1).reshape(-1, 2)
    best = lines[np.argmin(badness(lines))]
    # A simplex may shrink onto a kink: a fresh one around where it ended gets it off.
    for _ in range(2):
        aside = np.array([0.1 * min(max(best[0], 0.01), max(1.0 - best[0], 0.01)), 0.2 * abs(best[1]) + 1e-4])
        simplex = np.vstack([best, best + np.diag(aside)])
        options = {"initial_simplex": simplex, "xatol": 1e-9, "fatol": 1e-9, "maxiter": 2_000}
        best = optimize.minimize(lambda line: badness(line[None])[0], best, method="Nelder-Mead", options=options).x
    return {"alpha": float(best[1]), "p0": float(best[0] - best[1])}


def _fit_beta_geometric(right: Int[ndarray, " positions"], wrong: Int[ndarray, " positions"]) -> dict[str, float]:
    """Sought in the logit of Beta's mean and the logarithm of its a + b, from samples that differ much and little."""

    def shape(point: Float[ndarray, " two"]) -> dict[str, float]:
        concentration = math.exp(point[1])
        return {"a": float(expit(point[0])) * concentration, "b": float(expit(-point[0])) * concentration}

    def badness(point: Float[ndarray, " two"]) -> float:
        return -float(_log_likelihood(_curve("beta_geometric", shape(point), len(right))[None], right, wrong)[0])

    sure = float(logit(1.0 - SURE))
    mean = float(logit(np.clip(right[0] / (right[0] + wrong[0]), SURE, 1.0 - SURE)))
    tries = [
        optimize.minimize(badness, np.array([mean, start]), method="L-BFGS-B", bounds=[(-sure, sure), _CONCENTRATION])
        for start in (-2.0, 1.0, 4.0, 8.0)
    ]
    return shape(min(tries, key=lambda found: found.fun).x)


# --- whether tokens get easier within a sample ------------------------------------------------------------------


class WithinSampleSlope(NamedTuple):
    """Change of the logit of P(right) a position, within samples.

    Attributes:
        slope: Logits a position; infinite where every sample has its right tokens last (or first); nan without samples.
        standard_error: Logits a position; nan where the slope is not finite.
        p_value: Two-sided, by Wald: of a slope of 0; nan where the slope is not finite.
        num_samples: Samples that informed it: neither all right nor all wrong.
    """

    slope: float
    standard_error: float
    p_value: float
    num_samples: int


def within_sample_slope(correctness: Correctness, *, num_tokens: int = 64) -> WithinSampleSlope:
    """Whether tokens are right more often later in a reference, in logit P(c_ij) = u_i + slope j.

    Samples that differ make the pooled p_j rise although no token gets easier, because the hard samples leave. Here
    each sample has its own level u_i of any size. Given how many of its tokens are right, the chance of which ones does
    not depend on it (Rasch 1960; Andersen 1970), so the slope is sought in that conditional likelihood. Fitting all
    u_i instead would overstate it: twofold for two tokens a sample.

    The standard error is the larger of two: that of independent tokens, and that of the scatter of the samples' scores,
    which holds where the errors of a sample cluster. In simulation a slope of 0 is rejected at 5 % in 4 to 7 % of cases
    from 20 samples on, in up to 15 % with fewer whose errors cluster.

    Args:
        correctness: Teacher-forced correctness of all tokens, those behind the first error among them.
        num_tokens: First tokens of each reference that are used: a line in the position holds for so long at most, and
            time and memory grow with its square.

    Raises:
        ValueError: If fewer than two tokens are used.
    """
    if num_tokens < 2:
        raise ValueError(f"a slope needs at least two tokens a sample, but got num_tokens={num_tokens}")
    bits, is_there = (matrix[:, :num_tokens] for matrix in correctness.as_matrix())
    used, right = is_there.sum(axis=1), bits.sum(axis=1)
    is_informative = (right > 0) & (right < used)
    used, right = used[is_informative], right[is_informative]
    total = bits[is_informative] @ np.arange(1, bits.shape[1] + 1)  # of the positions of right tokens
    if len(used) == 0:
        return WithinSampleSlope(math.nan, math.nan, math.nan, 0)
    least = right * (right + 1) // 2
    for limit, extreme in ((-math.inf, least), (math.inf, least + right * (used - right))):
        if np.array_equal(total, extreme):
            return WithinSampleSlope(limit, math.nan, math.nan, len(used))

    def score(slope: float) -> float:
        return float((total - _moments(slope, bits.shape[1])[0][used, right]).sum())

    reach = 1.0 / bits.shape[1]
    while score(-reach) < 0.0 or score(reach) > 0.0:
        reach *= 2.0
    slope = float(optimize.root_scalar(score, bracket=(-reach, reach), xtol=1e-12).root)
    mean, variance = _moments(slope, bits.shape[1])
    information = variance[used, right].sum()
    scatter = ((total - mean[used, right]) ** 2).sum()
    standard_error = math.sqrt(max(information, scatter)) / float(information)
    return WithinSampleSlope(slope, standard_error, 2.0 * float(ndtr(-abs(slope) / standard_error)), len(used))


def _moments(
    slope: float, num_tokens: int
) -> tuple[Float[ndarray, "tokens_up_to right_up_to"], Float[ndarray, "tokens_up_to right_up_to"]]:
    """Mean and variance of the sum of the positions of right tokens, given how many there are, for every such case.

    The elementary symmetric functions e(t, r) of the odds exp(slope j) obey e(t, r) = e(t - 1, r) + odds_t e(t - 1,
    r - 1): token t is wrong, or it is right. The share of the second is the chance that it is right, by which the
    moments of both are mixed. Samples share their positions, so that one table serves them all.
    """
    shape = (num_tokens + 1, num_tokens + 1)
    mean, variance = np.full(shape, np.nan), np.full(shape, np.nan)
    mean[0, 0] = variance[0, 0] = 0.0
    log_sum = np.zeros(1)
    for token in range(1, num_tokens + 1):
        if_wrong, if_right = np.append(log_sum, -np.inf), np.append(-np.inf, log_sum + slope * token)
        log_sum = np.logaddexp(if_wrong, if_right)
        chance = np.exp(if_right - log_sum)
        mean_wrong, mean_right = (
            np.append(mean[token - 1, :token], 0.0),
            np.append(0.0, mean[token - 1, :token] + token),
        )
        wrong, right = np.append(variance[token - 1, :token], 0.0), np.append(0.0, variance[token - 1, :token])
        mean[token, : token + 1] = mean_wrong + chance * (mean_right - mean_wrong)
        spread = chance * (1.0 - chance) * (mean_right - mean_wrong) ** 2
        variance[token, : token + 1] = wrong + chance * (right - wrong) + spread
    return mean, variance
