"""What may be wrong with a study before any claim is believed, and what was looked at and found in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from memray.report import column
from memray.report.table import SIGNIFICANT, Trend, health_warnings, trends
from memray.sweep import Sweep

ENTROPY = "strings.entropy_bits"

State = Literal["found", "fine", "not measured"]


class Sign(NamedTuple):
    """One sign of failure (protocol, section 3, health): whether it was found, and what was."""

    name: str
    state: State
    sentence: str


class _Looked(NamedTuple):
    """How a sign is called, what it is read from, and what it means that there is none."""

    name: str
    key: str
    fine: str


LOOKED = (
    _Looked(
        "Plateau", "phase/memorisation",
        "guessing and memorisation are apart in every trial that memorised",
    ),
    _Looked(
        "Guessing", "string/guesser_accuracy",
        "token accuracy lies below that of the best guesser for five epochs on end at most",
    ),
    _Looked(
        "Held-out strings", "guessing/heldout_uncorrected",
        "no memory is shown on strings that were never trained",
    ),
    _Looked("Ties", "health/tie_rate", "at most 1 % of the predictions of any epoch are ties"),
)  # fmt: skip


def signs(sweep: Sweep, frame: pd.DataFrame) -> list[Sign]:
    """All signs of failure, in the order in which they are reported."""
    warnings = health_warnings(sweep, frame)
    found = []
    for looked in LOOKED:
        if looked.name in warnings:
            found.append(Sign(looked.name, "found", warnings[looked.name]))
        elif np.isnan(column(frame, looked.key)).all():
            found.append(Sign(looked.name, "not measured", f"no trial has {looked.key}"))
        else:
            found.append(Sign(looked.name, "fine", looked.fine))
    return [*found[:2], _relation_to_entropy(trends(sweep, frame)), *found[2:]]


def _relation_to_entropy(found: Sequence[Trend]) -> Sign:
    """Whether speed moves with the entropy, which it does wherever the paper's experiments were repeated."""
    over_entropy = [each for each in found if each.factor == ENTROPY or any(ENTROPY in note for note in each.notes)]
    if not over_entropy:
        return Sign("Entropy", "not measured", "the entropy does not move by itself in this study")
    related = [each for each in over_entropy if each.adjusted_p_value <= SIGNIFICANT]
    if not related:
        return Sign("Entropy", "found", "no relation of speed to entropy; " + over_entropy[0].sentence())
    return Sign("Entropy", "fine", "speed moves with the entropy: " + related[0].sentence())
