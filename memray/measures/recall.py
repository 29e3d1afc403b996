"""Recall of one string at one epoch: what a model remembers of it beyond what it could guess.

Every measure is a function of per-token scores and of what is known about the string without a model, so that
it can be computed again from the ledger. This module knows no model, no epoch and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import rel_entr

from memray.scoring import TokenScores

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Guesser:
    """The best guesser without memory of one string: the baseline that recall is measured against.

    Attributes:
        log2_probability: Bits, at most 0: log2 of the probability that it gives each target.
        accuracy: Share of targets in (0, 1] that always naming the likeliest symbol gets right.
    """

    log2_probability: Float[ndarray, " targets"]
    accuracy: float


def best_guesser(
    targets: Int[ndarray, " targets"],
    conditional: Float[ndarray, "targets alphabet"],
) -> Guesser:
    """The best of three guessers: the string's own symbol frequencies, its source, and both together.

    Models learn the frequencies of the string itself, not those of its source, which is worth
    (alphabet_size - 1) / (2 n ln 2) bits a symbol: against the source alone this would count as memory. For a
    source of independent symbols the own frequencies never lose. A source with structure can do better; then
    the bound on constant guessers holds for their bits on every string, for `recall/uncorrected` on average.

    Where structure fixes some symbols, the third knows these, and of the others their own frequencies. Without it a
    model that only copies a motif's repetitions would seem to remember the motif: by 0.2 of `recall/uncorrected` for a
    motif of 64 symbols of 1 bit, and less at higher entropy, which would manufacture an effect of entropy.

    The accuracy is that of naming each guesser's likeliest symbol, of the best of the three.

    Args:
        targets: Symbol indices of the scored targets. Only these count towards the frequencies, which is what
            makes every constant guesser of independent symbols score at most 0 on each string.
        conditional: The source's prediction of each target from the symbols before it; rows sum to 1.

    Raises:
        ValueError: If there are no targets.
    """
    if len(targets) == 0:
        raise ValueError("a string must have at least one scored target, but got 0; use longer strings")
    frequencies = symbol_frequencies(targets, conditional.shape[1])
    own = np.log2(frequencies[targets])
    with np.errstate(divide="ignore"):
        source = np.log2(conditional[np.arange(len(targets)), targets].astype(np.float64))
    is_fixed = conditional.max(axis=1) == 1.0
    foretold = conditional.argmax(axis=1) == targets
    both, accuracy_of_both = source.copy(), float(np.mean(is_fixed & foretold))
    if not is_fixed.all():
        open_targets = targets[~is_fixed]
        open_frequencies = symbol_frequencies(open_targets, conditional.shape[1])
        both[~is_fixed] = np.log2(open_frequencies[open_targets])
        accuracy_of_both += float(open_frequencies.max()) * float(np.mean(~is_fixed))
    return Guesser(
        log2_probability=max((own, source, both), key=lambda guesses: guesses.sum()),
        accuracy=max(float(frequencies.max()), float(np.mean(foretold)), accuracy_of_both),
    )


def symbol_frequencies(targets: Int[ndarray, " targets"], alphabet_size: int) -> Float[ndarray, " alphabet"]:
    """The share of each symbol of the alphabet among the targets; sums to 1."""
    return np.bincount(targets, minlength=alphabet_size) / len(targets)


@dataclass(frozen=True)
class Truth:
    """What is known of one string without any model.

    Attributes:
        targets: Symbol index of each scored target.
        target_ids: Token id of each scored target.
        marginal: The source's marginal distribution over the alphabet; sums to 1.
        guesser: The baseline of this string.
    """

    targets: Int[ndarray, " targets"]
    target_ids: Int[ndarray, " targets"]
    marginal: Float[ndarray, " alphabet"]
    guesser: Guesser

    @classmethod
    def of(
        cls,
        targets: Int[ndarray, " targets"],
        *,
        symbol_ids: Int[ndarray, " alphabet"],
        conditional: Float[ndarray, "targets alphabet"],
        marginal: Float[ndarray, " alphabet"],
    ) -> Truth:
        """The truth about the scored targets of one string.

        Args:
            targets: Symbol indices of the scored targets (without BOS, the string but for its first symbol).
            symbol_ids: Token id of each symbol.
            conditional: The source's prediction of each target from the symbols before it.
            marginal: The source's marginal distribution.

        Raises:
            ValueError: If there are no targets.
        """
        return cls(
            targets=targets,
            target_ids=symbol_ids[targets],
            marginal=marginal,
            guesser=best_guesser(targets, conditional),
        )


def measure_string(scores: TokenScores, truth: Truth) -> dict[str, float]:
    """Every measure of one string at one epoch that needs no other string.

    The keys are those that are logged. `recall/robust` is missing here because it needs the held-out strings:
    it is `robust(measures["recall/uncorrected"], heldout_floor(...))`.

    Args:
        scores: Scores of this string alone, in order of position.
        truth: The same string's truth, over the same targets.

    Returns:
        Values by key; nan where a measure is undefined, as for the shares of a string with a single symbol.
    """
    assert scores.num_strings == 1, "one string at a time: TokenScores.of"
    return {key: float(values[0]) for key, values in measure_strings(scores, [truth]).items()}


def measure_strings(scores: TokenScores, truths: Sequence[Truth]) -> dict[str, Float[ndarray, " strings"]]:
    """The measures of `measure_string` for many strings at once, which is faster and gives the same bits.

    Args:
        scores: Scores of the strings, in order of string and position.
        truths: Theirs, in the same order; all of the same number of targets over an alphabet of the same size.
    """
    shape = len(truths), len(truths[0].targets)
    assert scores.num_strings == shape[0]
    assert len(scores.log_prob) == shape[0] * shape[1], "strings of different lengths: measure them one by one"
    return _recall_measures(scores, truths, shape) | _guessing_measures(scores, truths, shape)


def _recall_measures(
    scores: TokenScores, truths: Sequence[Truth], shape: tuple[int, int]
) -> dict[str, Float[ndarray, " strings"]]:
    log_prob = scores.log_prob.reshape(shape).astype(np.float64)
    log_mass = scores.log_mass.reshape(shape).astype(np.float64)
    argmax = scores.argmax.reshape(shape)
    token_accuracy = np.mean(argmax == np.stack([truth.target_ids for truth in truths]), axis=1)
    baseline = np.array([truth.guesser.accuracy for truth in truths])
    log2_guesses = np.stack([truth.guesser.log2_probability for truth in truths])
    log2_gain = log_prob / LN2 - log2_guesses
    mixture = mixture_bits(log2_gain)
    largest_mixture = np.mean(mixture_bits(-log2_guesses), axis=1)
    num_targets = shape[1]
    return {
        "recall/token_accuracy": token_accuracy,
        "recall/nll_nats": -np.mean(log_prob, axis=1),
        "recall/nll_mass_nats": -np.mean(log_mass, axis=1),
        "recall/nll_alphabet_nats": -np.mean(log_prob - log_mass, axis=1),
        "recall/corrected_accuracy": _ratios(token_accuracy - baseline, 1.0 - baseline),
        "recall/memorised_bits": np.mean(log2_gain, axis=1),
        "recall/mixture_bits": np.mean(mixture, axis=1),
        "recall/mixture_bits_se": _deviations(mixture) / math.sqrt(num_targets),
        "recall/uncorrected": _ratios(np.mean(mixture, axis=1), largest_mixture),
        "health/tie_rate": np.mean(argmax == -1, axis=1),
    }


def _deviations(values: Float[ndarray, "strings targets"]) -> Float[ndarray, " strings"]:
    """The standard deviation of each string's targets; nan of a single one."""
    if values.shape[1] == 1:
        return np.full(len(values), math.nan)
    return np.asarray(np.std(values, axis=1, ddof=1))


def _guessing_measures(
    scores: TokenScores, truths: Sequence[Truth], shape: tuple[int, int]
) -> dict[str, Float[ndarray, " strings"]]:
    alphabet_size = len(truths[0].marginal)
    marginals = np.stack([truth.marginal for truth in truths])
    frequencies = np.stack([symbol_frequencies(truth.targets, alphabet_size) for truth in truths])
    mass = np.exp(scores.log_mass.reshape(shape).astype(np.float64))
    entropy_bits, kl_position = (
        np.asarray(np.mean(each.reshape(shape), axis=1, dtype=np.float64))
        for each in (scores.entropy_bits, scores.kl_bits)
    )
    return {
        "guessing/alphabet_mass": np.mean(mass, axis=1),
        "guessing/entropy_bits": entropy_bits,
        "guessing/kl_bits": kl_bits(marginals, scores.mean_q),
        "guessing/kl_own_bits": kl_bits(frequencies, scores.mean_q),
        "guessing/kl_position_bits": np.where(np.isfinite(kl_position), kl_position, math.nan),
    }


def mixture_bits(log2_gain: Float[ndarray, "*strings targets"]) -> Float[ndarray, "*strings targets"]:
    """Bits that a half-and-half mixture of model and guesser gains on each target over the guesser.

    With p the model's and g the guesser's probability of the target this is log2(1/2 + p / (2 g)). Nothing is
    clipped: a clip per token would turn an over-confident guesser into a memoriser. The mixture bounds the
    loss instead.

    Args:
        log2_gain: log2(p / g); bits.

    Returns:
        Bits above -1: no token, however wrong, costs more than one.
    """
    # logaddexp keeps the ratio of a probability of 1 to a tiny guess, and the reverse, from overflowing.
    return np.logaddexp2(0.0, log2_gain) - 1.0


def kl_bits(p: Float[ndarray, "strings alphabet"], q: Float[ndarray, "strings alphabet"]) -> Float[ndarray, " strings"]:
    """Kullback-Leibler divergences KL(p || q) in bits, at least 0; nan where q misses a symbol of p."""
    found = np.sum(rel_entr(p.astype(np.float64), q.astype(np.float64)), axis=1) / LN2
    return np.where(np.isfinite(found), found, math.nan)


def heldout_floor(mean_uncorrected: Float[ndarray, " epochs"]) -> float:
    """What recall may be claimed for strings never seen: the floor below which a score shows no memory.

    Args:
        mean_uncorrected: `recall/uncorrected`, averaged over the held-out strings, at every epoch so far at
            which these were scored; nan where it is undefined.

    Returns:
        The largest of the values and 0; 0 before the first evaluation.
    """
    return float(np.fmax.reduce(mean_uncorrected, initial=0.0))


def robust(uncorrected: float, floor: float) -> float:
    """The robust measure of recall: `recall/uncorrected`, scaled to 0 at the floor and 1 at full recall.

    Args:
        uncorrected: `recall/uncorrected` of a trained string.
        floor: The held-out floor at the same epoch.

    Returns:
        At most 1, signed; nan for a string of one symbol, and where held-out strings are recalled in full.
    """
    return _ratio(uncorrected - floor, 1.0 - floor)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0.0 else math.nan


def _ratios(
    numerators: Float[ndarray, " strings"], denominators: Float[ndarray, " strings"]
) -> Float[ndarray, " strings"]:
    undefined = np.full(len(numerators), math.nan)
    return np.divide(numerators, denominators, out=undefined, where=denominators > 0.0)
