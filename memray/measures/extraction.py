"""The older measures of memorisation, to show their bias: what can be extracted in one piece, and what a string's loss
says beside that of strings never seen.

The first kind is contiguous: it understates, because one wrong token in the middle hides what stands on both sides of
it. The second compares losses. Every one is a function of one teacher-forced pass; that greedy decoding follows a
string exactly as long as every prediction is right is what makes this enough.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import log_ndtr, logsumexp, roots_laguerre
from scipy.stats import skewnorm

from memray.measures.recall import LN2, Truth
from memray.scoring import TokenScores

# The lengths of extraction that are reported.
WINDOWS = (32, 50)

MIN_HELDOUT = 5
# The largest skewness of a skew-normal is 0.9953; this near to it the shape runs away.
MAX_SKEWNESS = 0.99


def measure_extraction(scores: TokenScores, truth: Truth) -> dict[str, float]:
    """The contiguous measures of one string at one epoch.

    Args:
        scores: Scores of this string alone, in order of position.
        truth: The same string's truth, over the same targets.

    Returns:
        Values by key; nan where the string is shorter than a window.
    """
    correct = scores.argmax == truth.target_ids
    run = longest_run(correct)
    return {
        "older/longest_run": run / len(correct),
        "older/longest_run_tokens": float(run),
        "older/extraction_strength": extraction_strength(correct),
    } | {f"older/windows_right_{length}": windows_right(correct, length) for length in WINDOWS}


def compare_with_heldout(
    nll_nats: Float[ndarray, " strings"], heldout_nll_nats: Float[ndarray, " held_out"], *, least_heldout: float
) -> dict[str, Float[ndarray, " strings"]]:
    """The measures of trained strings at one epoch that need the losses of held-out ones.

    Args:
        nll_nats: `recall/nll_nats` of each trained string.
        heldout_nll_nats: The same of each held-out string at this epoch; none where they were not scored.
        least_heldout: Least mean of the held-out losses at any evaluated epoch so far; nan before the first.

    Returns:
        Values by key, one a trained string; nan where undefined.
    """
    heldout = float(np.mean(heldout_nll_nats)) if len(heldout_nll_nats) else math.nan
    return {
        "older/contextual": contextual(nll_nats, least_heldout),
        "older/counterfactual": counterfactual(nll_nats, heldout),
        "older/exposure_bits": exposure_bits(nll_nats, heldout_nll_nats),
    }


# --- contiguous -------------------------------------------------------------------------------------------------


def run_lengths(correct: Bool[ndarray, " targets"]) -> Int[ndarray, " gaps"]:
    """Right tokens before the first wrong one, between each two wrong ones, and after the last: 0 where none are.

    Example:
        >>> run_lengths(np.array([True, True, False, False, True])).tolist()
        [2, 0, 1]
    """
    wrong = np.flatnonzero(~correct)
    return np.diff(wrong, prepend=-1, append=len(correct)) - 1


def longest_run(correct: Bool[ndarray, " targets"]) -> int:
    """Tokens of the longest run without an error: as many are recited from the right prefix."""
    return int(run_lengths(correct).max())


def extraction_strength(correct: Bool[ndarray, " targets"]) -> float:
    """Share of a string that greedy decoding recites from the shortest prefix.

    With T targets and k the fewest leading ones that must be given for greedy decoding to reproduce the rest, the
    strength is 1 - k / T (Carlini et al. 2021). It is 1 when the string is recited from its beginning, 0 when even
    the last target is mispredicted. The run of right tokens at the end gives k without generation.

    Args:
        correct: Whether each target was the top prediction given the true prefix; a tie is wrong.

    Returns:
        Strength in [0, 1]; unitless.

    Raises:
        ValueError: If there are no targets, where the strength is undefined.

    Example:
        >>> [extraction_strength(np.array(each)) for each in ([True, True], [False, True], [True, False])]
        [1.0, 0.5, 0.0]
    """
    if len(correct) == 0:
        raise ValueError("a string must have at least one scored target, but got 0; use longer strings")
    return float(run_lengths(correct)[-1]) / len(correct)


def windows_right(correct: Bool[ndarray, " targets"], length: int) -> float:
    """Share of all windows of `length` consecutive targets in which every one is right, given all that precedes.

    It is what a test for verbatim extraction of so many tokens finds, if the whole prefix is the prompt. A prompt of
    the few tokens before the window is another question, which needs other forward passes.

    Args:
        correct: Whether each target was the top prediction given the true prefix.
        length: Targets a window, at least 1.

    Returns:
        Share in [0, 1]; nan for a string shorter than the window.

    Example:
        >>> windows_right(np.array([True, True, True, False]), 2)
        0.6666666666666666
    """
    num_windows = len(correct) - length + 1
    if num_windows < 1:
        return math.nan
    return float(np.maximum(run_lengths(correct) - length + 1, 0).sum()) / num_windows


def windows_right_if_independent(accuracy: float, length: int) -> float:
    """The share of windows that would be right if each token were so with the same chance, whatever its neighbours.

    The reference that shows how far contiguous measures understate: long after most tokens are known, few windows are.

    Args:
        accuracy: Chance of each token, in [0, 1].
        length: Targets a window.

    Example:
        >>> round(windows_right_if_independent(0.96, 50), 2)
        0.13
    """
    return accuracy**length


# --- against held-out strings -----------------------------------------------------------------------------------


def contextual(nll_nats: Float[ndarray, " strings"], least_heldout: float) -> Float[ndarray, " strings"]:
    """Contextual memorisation: max(0, 1 - L / c), the part of the loss that context never explained.

    c stands for the best loss of a model that learned the language but not the string. Clipped, so that noise about
    c makes its mean over strings positive, never negative.

    Args:
        nll_nats: Loss L of each trained string, mean over its targets.
        least_heldout: c, nats; nan is unknown.

    Returns:
        In [0, 1]; unitless; nan without a positive c.
    """
    if not least_heldout > 0:
        return np.full(len(nll_nats), np.nan)
    return np.maximum(0.0, 1.0 - nll_nats / least_heldout)


def counterfactual(nll_nats: Float[ndarray, " strings"], heldout_nll_nats: float) -> Float[ndarray, " strings"]:
    """A proxy of counterfactual memorisation: 1 - L_trained / L_heldout at the same epoch.

    Counterfactual memorisation compares with models that were trained without the string; fresh strings of its
    source take their place. Late in training the held-out loss rises, and this rises with it, although nothing more
    is known of the string.

    Args:
        nll_nats: Loss of each trained string, mean over its targets.
        heldout_nll_nats: Mean loss of the held-out strings at the same epoch; nan is unknown.

    Returns:
        At most 1, signed; unitless; nan without a positive held-out loss.
    """
    if not heldout_nll_nats > 0:
        return np.full(len(nll_nats), np.nan)
    return 1.0 - nll_nats / heldout_nll_nats


def exposure_bits(
    nll_nats: Float[ndarray, " strings"], heldout_nll_nats: Float[ndarray, " held_out"]
) -> Float[ndarray, " strings"]:
    """Exposure: the rank of a trained string's loss among all strings that could have been trained, in bits.

    -log2 of the probability that a string never seen has as small a loss, under a skew-normal distribution of these
    (Carlini et al. 2019). The distribution has the mean, the variance and the skewness of the held-out losses:
    matched moments always exist where maximum likelihood of few values puts the shape at infinity.

    Beyond the held-out losses it is an extrapolation. Ten of them leave the skewness nearly unknown (its standard
    error is 0.6), so hundreds of bits say "far outside", and no more. Fewer than `MIN_HELDOUT`, losses without
    spread, and a sample more skewed than skew-normals are (nearly one of ten samples of ten normal losses is)
    have no fit: missing.

    Args:
        nll_nats: Loss of each trained string.
        heldout_nll_nats: Loss of each held-out string at the same epoch.

    Returns:
        Bits, at least 0; 1 at the median of the held-out losses; nan without a fit.
    """
    undefined = np.full(len(nll_nats), np.nan)
    if len(heldout_nll_nats) < MIN_HELDOUT:
        return undefined
    mean, spread = float(np.mean(heldout_nll_nats)), float(np.std(heldout_nll_nats))
    if not spread > 1e-9 * abs(mean):
        return undefined
    if abs(float(np.mean(((heldout_nll_nats - mean) / spread) ** 3))) > MAX_SKEWNESS:
        return undefined
    shape, location, scale = np.array(skewnorm.fit(heldout_nll_nats, method="MM"), dtype=np.float64)
    log_tail = skew_normal_log_cdf((nll_nats - location) / scale, float(shape))
    return np.maximum(-log_tail / LN2, 0.0) + 0.0  # no -0.0


def skew_normal_log_cdf(x: Float[ndarray, " values"], shape: float) -> Float[ndarray, " values"]:
    """ln P(X <= x) of the standard skew-normal distribution, accurate however far x lies in the lower tail.

    Recalled strings lie hundreds of standard deviations below the others, where the probability itself is no float.
    There the density falls at least as fast as the exponential of its slope, for it is log-concave: Gauss-Laguerre
    nodes on that scale integrate what is left.
    """
    log_cdf = np.empty(len(x))
    cdf = skewnorm.cdf(x, shape)
    is_near = cdf > 1e-4
    log_cdf[is_near] = np.log(cdf[is_near])
    far = x[~is_near]
    # The derivative of the log-density: positive below the mode, and large in the tail.
    slope = -far + shape * np.exp(-0.5 * math.log(2 * math.pi) - 0.5 * (shape * far) ** 2 - log_ndtr(shape * far))
    nodes, weights = roots_laguerre(64)
    density = _log_density(far, shape)
    relative = _log_density(far[:, None] - nodes / slope[:, None], shape) - density[:, None] + nodes
    log_cdf[~is_near] = density - np.log(slope) + logsumexp(relative, b=weights, axis=1)
    return log_cdf


def _log_density(x: Float[ndarray, "*values"], shape: float) -> Float[ndarray, "*values"]:
    return math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * x**2 + log_ndtr(shape * x)
