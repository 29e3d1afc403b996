"""What the claims about the samples of a corpus are judged by: as `estimands`, for cells that have one.

The replicate is a trial. Its tail is E[max_z], the expected largest match length among z of its samples, with z a fifth
of them: the maximum itself has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from memray.corpora import CorpusSpec
from memray.report import column
from memray.report.estimands import Estimand, Evidence, between, within
from memray.report.replicates import Quantity, Seen, groups, last
from memray.spec import TrialSpec

NUM_SAMPLES = "corpus.num_samples"
OPTIONS = "corpus.rows.options"
TAIL, MEAN, LOSS = "match/expected_max", "match/mean", "recall/nll_nats"

# Between two probe epochs the loss is flat where it changes by less than this.
FLAT = 0.01


def corpus_of(cell: Seen) -> CorpusSpec:
    """What the trials of a cell fine-tune on."""
    assert cell.spec.corpus is not None  # a claim about corpora sees no other cells
    return cell.spec.corpus


def growth_while_flat(key: str, *, of_first: bool) -> Quantity:
    """How much a metric grows between probe epochs between which the loss is flat; nan where it never is.

    Args:
        of_first: Whether flat means a change below 1 % of the loss before training, as a curve looks flat beside
            where it began; else 1 % of the loss itself.
    """

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        loss, values = column(rows, LOSS), column(rows, key)
        scale = np.full(len(loss) - 1, loss[0]) if of_first else loss[:-1]
        is_flat = np.abs(np.diff(loss)) < FLAT * scale
        # From before training to the first look nothing has been learned that could be flat.
        is_flat[: int(np.argmax(column(rows, "epoch") > 0))] = False
        return float(np.diff(values)[is_flat].sum()) if is_flat.any() else math.nan

    return quantity


def growth_after_loss(cells: Sequence[Seen]) -> list[Evidence]:
    """How much the tail grows while the loss is flat, in both readings of flat."""
    found = []
    for cell in cells:
        for key, name in ((TAIL, "E[max_z]"), ("match/q99", "q99")):
            for of_first, scale in ((True, "the loss before training"), (False, "itself")):
                what = f"{name}, while the loss changes by less than 1 % of {scale}"
                found += within(cell, growth_while_flat(key, of_first=of_first), where=cell.where(), what=what)
    return found


def inside_fitted_interval(cells: Sequence[Seen]) -> list[Evidence]:
    """Where the skewness lies in the fitted curve's interval: -1 and 1 are its ends."""

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        observed, low, high = (
            last(f"match/{name}")(trial, rows) for name in ("skewness", "skewness_low", "skewness_high")
        )
        return (observed - (low + high) / 2) / ((high - low) / 2) if high > low else math.nan

    return [each for cell in cells for each in within(cell, quantity, where=cell.where())]


def over_corpus_size(cells: Sequence[Seen]) -> list[Evidence]:
    """Mean and tail of the samples that all share, from the smallest to the largest corpus: after equally many epochs,
    and after equally many optimiser steps."""

    def steps(cell: Seen) -> str:
        return str(cell.spec.num_epochs * cell.spec.steps_per_epoch)

    found = []
    for arm, key in (
        ("equal epochs", lambda cell: cell.held((NUM_SAMPLES,))),
        ("equal steps", lambda cell: cell.held((NUM_SAMPLES, "training.epochs")) | {"": steps(cell)}),
    ):
        for group in groups(cells, key):
            if arm == "equal steps" and len({cell.spec.num_epochs for cell in group}) == 1:
                continue  # of equal epochs as well
            ordered = sorted(group, key=lambda cell: corpus_of(cell).num_samples)
            for metric, what in ((MEAN, "mean match length"), (TAIL, "E[max_z]")):
                levels = [(str(corpus_of(cell).num_samples), cell.values(last(metric))) for cell in ordered]
                where = ", ".join(filter(None, (arm, ordered[0].where((NUM_SAMPLES, "training.epochs")))))
                found += between(levels, where=where, what=what)
    return found


def over_option(
    option: str,
    quantities: Sequence[tuple[str, str]],
    order: Sequence[str] = (),
    *,
    held: tuple[str, str] | None = None,
) -> Estimand:
    """Metrics at the end over the values of one option of the generator, where all else is equal.

    Args:
        option: Numbers ascend,
        order: and names are in this order.
        quantities: Metrics, and what to call them.
        held: Another option, and the value at which it is asked.
    """

    def estimand(cells: Sequence[Seen]) -> list[Evidence]:
        cells = [cell for cell in cells if option in _options(cell)]
        if held is not None:
            cells = [cell for cell in cells if _options(cell).get(held[0]) == held[1]]
        found = []
        for group in groups(cells, lambda cell: cell.held((OPTIONS,)) | _others(cell, option)):
            place = (
                (lambda cell: order.index(str(_options(cell)[option])))
                if order
                else (lambda cell: _options(cell)[option])
            )
            ordered = sorted(group, key=place)
            where = ", ".join(f"{name} {value}" for name, value in _others(ordered[0], option).items())
            where = ", ".join(filter(None, (ordered[0].where((OPTIONS,)), where)))
            for metric, what in quantities:
                levels = [(f"{_options(cell)[option]}", cell.values(last(metric))) for cell in ordered]
                found += between(levels, where=where, what=what)
        return found

    return estimand


def _options(cell: Seen) -> dict[str, int | float | str]:
    """All options of the cell's generator, those at their default too; none of a file."""
    return corpus_of(cell).rows.all_options()


def _others(cell: Seen, option: str) -> dict[str, str]:
    return {name: str(value) for name, value in _options(cell).items() if name != option}
