"""Recall of one string at one epoch: what a model remembers of it beyond what it could guess.

Every measure is a function of per-token scores and of what is known about the string without a model, so that
it can be computed again from the ledger. This module knows no model, no epoch and no file.
"""

from __future__ import annotations

import math
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
    return _recall_measures(scores, truth) | _guessing_measures(scores, truth)


def _recall_measures(scores: TokenScores, truth: Truth) -> dict[str, float]:
    log_prob = scores.log_prob.astype(np.float64)
    log_mass = scores.log_mass.astype(np.float64)
    token_accuracy = float(np.mean(scores.argmax == truth.target_ids))
    baseline = truth.guesser.accuracy
    log2_gain = log_prob / LN2 - truth.guesser.log2_probability
    mixture = mixture_bits(log2_gain)
    largest_mixture = float(np.mean(mixture_bits(-truth.guesser.log2_probability)))
    num_targets = len(mixture)
    return {
        "recall/token_accuracy": token_accuracy,
        "recall/nll_nats": -float(np.mean(log_prob)),
        "recall/nll_mass_nats": -float(np.mean(log_mass)),
        "recall/nll_alphabet_nats": -float(np.mean(log_prob - log_mass)),
        "recall/corrected_accuracy": _ratio(token_accuracy - baseline, 1.0 - baseline),
        "recall/memorised_bits": float(np.mean(log2_gain)),
        "recall/mixture_bits": float(np.mean(mixture)),
        "recall/mixture_bits_se": (
            float(np.std(mixture, ddof=1)) / math.sqrt(num_targets) if num_targets > 1 else math.nan
        ),
        "recall/uncorrected": _ratio(float(np.mean(mixture)), largest_mixture),
        "health/tie_rate": float(np.mean(scores.argmax == -1)),
    }


def _guessing_measures(scores: TokenScores, truth: Truth) -> dict[str, float]:
    assert scores.num_strings == 1, "one string at a time: TokenScores.of"
    mean_q = scores.mean_q[0]
    frequencies = symbol_frequencies(truth.targets, len(truth.marginal))
    return {
        "guessing/alphabet_mass": float(np.mean(np.exp(scores.log_mass.astype(np.float64)))),
        "guessing/entropy_bits": float(np.mean(scores.entropy_bits, dtype=np.float64)),
        "guessing/kl_bits": kl_bits(truth.marginal, mean_q),
        "guessing/kl_own_bits": kl_bits(frequencies, mean_q),
        "guessing/kl_position_bits": _finite(float(np.mean(scores.kl_bits, dtype=np.float64))),
    }


def mixture_bits(log2_gain: Float[ndarray, " targets"]) -> Float[ndarray, " targets"]:
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


def kl_bits(p: Float[ndarray, " alphabet"], q: Float[ndarray, " alphabet"]) -> float:
    """Kullback-Leibler divergence KL(p || q) in bits, at least 0; nan where q misses a symbol of p."""
    return _finite(float(np.sum(rel_entr(p.astype(np.float64), q.astype(np.float64)))) / LN2)


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


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
