"""Phases and speeds of one string: when guessing ends, when memorisation sets in, how fast it runs.

The input is the history of the measures of `recall` by epoch; the output is epochs. An epoch that was never
reached, or not before training stopped, is right-censored: nan, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from memray.measures.statistics import censored_median

ROBUST_PERCENTS = (25, 50, 75, 90)
ACCURACY_PERCENTS = (50, 90, 99)

# The measures that are epochs which may never be reached; they are censored, where others are merely undefined.
DURATIONS = (
    "phase/memorisation",
    "phase/distribution_learned",
    *(f"phase/epochs_to_robust_{percent}" for percent in ROBUST_PERCENTS),
    *(f"phase/epochs_to_accuracy_{percent}" for percent in ACCURACY_PERCENTS),
)


def centre(key: str, values: Float[ndarray, " replicates"]) -> float:
    """The median of one measure over strings or replicates; nan where it is censored or unknown.

    A duration that is missing was not reached: it counts as infinitely late. Any other measure that is missing is
    undefined, and without it nothing is known of the median.
    """
    return censored_median(values) if key in DURATIONS or bool(np.isfinite(values).all()) else math.nan


@dataclass(frozen=True, kw_only=True)
class PhaseRules:
    """Where the phases begin.

    Attributes:
        onset_standard_errors: Memorisation has set in when the mean of `recall/mixture_bits` exceeds 0 by
            more than so many of its standard errors. (A rule on the NLL against the source degenerates: its
            error is 0 for uniform sources and huge for skewed ones, which would manufacture an effect of
            entropy.)
        min_alphabet_mass: The alphabet is learned from this mean probability of its symbols on; in (0, 1].
        max_kl_share: The distribution is learned when KL(own frequencies || mean prediction) is at most this
            share of the source's entropy.
    """

    onset_standard_errors: float = 3.0
    min_alphabet_mass: float = 0.95
    max_kl_share: float = 0.05


def string_phases(
    history: Mapping[str, Float[ndarray, " epochs"]],
    epochs: Int[ndarray, " epochs"],
    *,
    entropy_bits: float,
    num_targets: int,
    steps_per_epoch: float,
    rules: PhaseRules = PhaseRules(),
) -> dict[str, float]:
    """The phases and speeds of one string.

    `phase/memorisation` (onset, the length of the guessing phase) is the first epoch from which the onset
    rule holds at every later one. `phase/distribution_learned` is the first epoch at which the alphabet and
    the string's own frequencies are learned; a string that is recalled in full has both. `phase/plateau` is
    onset minus distribution learned. Positive means two phases; at most 0, or missing although there is an
    onset, means overlapping ones.

    Args:
        history: The measures of this string at each evaluated epoch, by key: those of `measure_string`, and
            `recall/robust`. A nan reaches no level.
        epochs: The evaluated epochs, ascending.
        entropy_bits: Entropy of the source's marginal distribution, bits a symbol.
        num_targets: Scored targets of the string.
        steps_per_epoch: Optimiser steps in one epoch.
        rules: Where the phases begin.

    Returns:
        Epochs by key, nan where they were not reached, and `phase/bits_per_step`.
    """
    assert np.all(np.diff(epochs) > 0), "epochs must ascend"
    least_memory = rules.onset_standard_errors * history["recall/mixture_bits_se"]
    onset = stays_from(history["recall/mixture_bits"] > least_memory, epochs)
    learned = first_at(
        (history["guessing/alphabet_mass"] >= rules.min_alphabet_mass)
        & (history["guessing/kl_own_bits"] <= rules.max_kl_share * entropy_bits),
        epochs,
    )
    phases = {
        "phase/memorisation": onset,
        "phase/distribution_learned": learned,
        "phase/plateau": onset - learned,
    }
    for percent in ROBUST_PERCENTS:
        reached = history["recall/robust"] >= percent / 100
        phases[f"phase/epochs_to_robust_{percent}"] = stays_from(reached, epochs)
    for percent in ACCURACY_PERCENTS:
        reached = history["recall/token_accuracy"] >= percent / 100
        phases[f"phase/epochs_to_accuracy_{percent}"] = stays_from(reached, epochs)
    phases["phase/bits_per_step"] = _bits_per_step(
        history["recall/memorised_bits"] * num_targets,
        epochs * steps_per_epoch,
        start=epochs == phases["phase/epochs_to_robust_25"],
        end=epochs == phases["phase/epochs_to_robust_75"],
    )
    return phases


def first_at(holds: Bool[ndarray, " epochs"], epochs: Int[ndarray, " epochs"]) -> float:
    """The first epoch at which something holds; nan if it never does."""
    return float(epochs[holds.argmax()]) if holds.any() else math.nan


def stays_from(holds: Bool[ndarray, " epochs"], epochs: Int[ndarray, " epochs"]) -> float:
    """The first epoch from which something holds at every evaluated epoch; nan if it does not hold at the
    last.

    A level that is crossed and lost again does not count: during guessing noisy measures touch a level by
    chance.

    Example:
        >>> stays_from(np.array([True, False, True, True]), np.array([0, 1, 2, 5]))
        2.0
    """
    return first_at(np.logical_and.accumulate(holds[::-1])[::-1], epochs)


def _bits_per_step(
    memorised_bits: Float[ndarray, " epochs"],
    steps: Float[ndarray, " epochs"],
    *,
    start: Bool[ndarray, " epochs"],
    end: Bool[ndarray, " epochs"],
) -> float:
    """Bits of the whole string gained an optimiser step between two epochs, each given as a mask of at most
    one epoch.

    Signed; nan if either was not reached, or both at the same epoch, where the evaluations are too coarse to
    tell.
    """
    if not (start.any() and end.any()) or np.array_equal(start, end):
        return math.nan
    return float((memorised_bits[end] - memorised_bits[start]).item() / (steps[end] - steps[start]).item())
