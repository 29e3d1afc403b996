"""What may be wrong with a study before any claim is believed, and what was looked at and found in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from memray.report import column, has_corpus, has_curriculum
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
    by_epoch: bool = False  # a curriculum has no row but the ends of its stages


LOOKED = (
    _Looked(
        "Plateau", "phase/memorisation",
        "guessing and memorisation are apart in every trial that memorised",
    ),
    _Looked(
        "Guessing", "string/guesser_accuracy",
        "token accuracy lies below that of the best guesser for five epochs on end at most",
        by_epoch=True,
    ),
    _Looked(
        "Held-out strings", "guessing/heldout_uncorrected",
        "no memory is shown on strings that were never trained",
    ),
    _Looked("Ties", "health/tie_rate", "at most 1 % of the predictions of any epoch in the results are ties"),
)  # fmt: skip


class _Bounded(NamedTuple):
    """A sign that a metric of the samples of a corpus gives above some value, at any epoch of any trial."""

    name: str
    key: str
    most: float
    found: str
    fine: str


LOOKED_OF_CORPUS = (
    _Bounded(
        "Match lengths", "generation/disagreement", 0.0,
        "of the samples that were generated too, match lengths differ from those of generation",
        "those of the samples that were generated too are what generation gives",
    ),
    _Bounded(
        "Held-out samples", "match/heldout_censored", 0.01,
        "of the held-out samples are recited whole: duplicates, or references that can be guessed",
        "at most 1 % of the samples that were never trained are recited whole",
    ),
    _Bounded(
        "Ties", "match/tie_rate", 0.01,
        "of the predictions of an epoch are ties, which count as wrong",
        "at most 1 % of the predictions of any epoch are ties",
    ),
)  # fmt: skip


def _of_corpus(frame: pd.DataFrame) -> list[Sign]:
    found = []
    for looked in LOOKED_OF_CORPUS:
        values = column(frame, looked.key)
        if np.isnan(values).all():
            found.append(Sign(looked.name, "not measured", f"no trial has {looked.key}"))
        elif (most := float(np.nanmax(values))) > looked.most:
            found.append(Sign(looked.name, "found", f"up to {most:.1%} {looked.found}"))
        else:
            found.append(Sign(looked.name, "fine", looked.fine))
    return found


def signs(sweep: Sweep, frame: pd.DataFrame) -> list[Sign]:
    """All signs of failure, in the order in which they are reported."""
    if has_corpus(sweep):
        return _of_corpus(frame)
    warnings = health_warnings(sweep, frame)
    whole = [trial.trial_id() for trial in sweep.trials if trial.curriculum is None]
    found = []
    for looked in LOOKED:
        rows = frame.loc[frame["trial_id"].isin(whole)] if looked.by_epoch else frame
        if looked.name in warnings:
            found.append(Sign(looked.name, "found", warnings[looked.name]))
        elif len(rows) < len(frame) and not len(rows):
            found.append(Sign(looked.name, "not measured", "the results of a curriculum are those at its stages' ends"))
        elif np.isnan(column(rows, looked.key)).all():
            found.append(Sign(looked.name, "not measured", f"no trial has {looked.key}"))
        else:
            found.append(Sign(looked.name, "fine", looked.fine + _aside(sweep, looked)))
    return [*found[:2], _relation_to_entropy(trends(sweep, frame)), *found[2:]]


def _aside(sweep: Sweep, looked: _Looked) -> str:
    """Of which trials of a study with curricula that is not said, or of what in them it is."""
    if not has_curriculum(sweep):
        return ""
    if looked.by_epoch:
        return "; curricula were not looked at"
    return "; of a curriculum, in the first stage that measured its own strings" if looked.name == "Plateau" else ""


def _relation_to_entropy(found: Sequence[Trend]) -> Sign:
    """Whether speed moves with the entropy, which it does wherever the paper's experiments were repeated."""
    over_entropy = [each for each in found if each.factor == ENTROPY or any(ENTROPY in note for note in each.notes)]
    if not over_entropy:
        return Sign("Entropy", "not measured", "the entropy does not move by itself in this study")
    related = [each for each in over_entropy if each.adjusted_p_value <= SIGNIFICANT]
    if not related:
        return Sign("Entropy", "found", "no relation of speed to entropy; " + over_entropy[0].sentence())
    return Sign("Entropy", "fine", "speed moves with the entropy: " + related[0].sentence())
