"""What the claims about the samples of a corpus are judged by: as `estimands`, for cells that have one.

The replicate is a trial. Its tail is E[max_z], the expected largest match length among z of its samples, with z a fifth
of them: the maximum itself has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from memray.corpora import CorpusSpec, name_of
from memray.report import column
from memray.report.estimands import Estimand, Evidence, between, within
from memray.report.mixes import MIX, TRAININGS_WANTED, control, mixes, overlaps
from memray.report.replicates import Quantity, Seen, groups, last, spearman
from memray.report.samples_seen import FEW_WHOLE, HALF_WHOLE
from memray.spec import TrialSpec

NUM_SAMPLES = "corpus.num_samples"
OPTIONS = "corpus.rows.options"
FROZEN = "training.frozen_embeddings"
TAIL, MEAN, LOSS = "match/expected_max", "match/mean", "recall/nll_nats"
SKEWNESS, RANK = "match/skewness", "collapse/effective_rank"

# Less than this is left of a correlation by rounding alone.
ROUNDING = 1e-9

# The loss is flat from where on it stays so near to what it comes to.
FLAT = 0.01


def corpus_of(cell: Seen) -> CorpusSpec:
    """What the trials of a cell fine-tune on."""
    assert cell.spec.corpus is not None  # a claim about corpora sees no other cells
    return cell.spec.corpus


def where_whole(key: str, share: float = FEW_WHOLE) -> Quantity:
    """A metric where that share of the samples is recited whole: what is compared has come equally far.

    Interpolated between the looks before and after; at the last one, where fewer are recited whole to the end; nan
    where more are from the first look of training on.
    """

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        whole, values = column(rows, "match/censored"), column(rows, key)
        is_known = (column(rows, "epoch") > 0) & ~np.isnan(whole) & ~np.isnan(values)
        whole, values = whole[is_known], values[is_known]
        beyond = np.flatnonzero(whole > share)
        if not len(beyond):
            return float(values[-1]) if len(values) else math.nan
        if beyond[0] == 0:
            return math.nan
        ends = slice(beyond[0] - 1, beyond[0] + 1)
        return float(np.interp(share, whole[ends], values[ends]))

    return quantity


def growth_while_flat(key: str, *, of_first: bool) -> Quantity:
    """How much a metric grows from where on the loss is flat to the end; nan where it is flat at the last look alone.

    Args:
        of_first: Whether flat means within 1 % of the loss before training, as a curve looks flat beside where it
            began; else within 1 % of itself.
    """

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        loss, values = column(rows, LOSS), column(rows, key)
        is_flat = np.abs(loss - loss[-1]) < FLAT * (loss[0] if of_first else loss)
        is_flat &= column(rows, "epoch") > 0  # before training nothing has been learned that could be flat
        begins = len(loss) - int(np.logical_and.accumulate(is_flat[::-1]).sum())
        return float(values[-1] - values[begins]) if begins < len(loss) - 1 else math.nan

    return quantity


def growth_after_loss(cells: Sequence[Seen]) -> list[Evidence]:
    """How much the tail grows while the loss is flat, in both readings of flat."""
    found = []
    for cell in cells:
        for key, name in ((TAIL, "E[max_z]"), ("match/q99", "q99")):
            for of_first, scale in ((True, "the loss before training"), (False, "itself")):
                what = f"{name}, from where on the loss stays within 1 % of {scale}"
                found += within(cell, growth_while_flat(key, of_first=of_first), where=cell.where(), what=what)
    return found


def inside_fitted_interval(cells: Sequence[Seen]) -> list[Evidence]:
    """Where the skewness lies in the fitted curve's interval: -1 and 1 are its ends."""

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        observed, low, high = (
            where_whole(f"match/{name}")(trial, rows) for name in ("skewness", "skewness_low", "skewness_high")
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
    at: Callable[[str], Quantity] = last,
) -> Estimand:
    """Metrics over the values of one option of the generator, where all else is equal.

    Args:
        option: Numbers ascend,
        order: and names are in this order.
        quantities: Metrics, and what to call them.
        held: Another option, and the value at which it is asked.
        at: When.
    """

    def estimand(cells: Sequence[Seen]) -> list[Evidence]:
        # Arms with frozen embeddings are there for another question.
        cells = [cell for cell in cells if option in _options(cell) and not cell.spec.training.frozen_embeddings]
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
                levels = [(f"{_options(cell)[option]}", cell.values(at(metric))) for cell in ordered]
                found += between(levels, where=where, what=what)
        return found

    return estimand


def foreign_against_native(cells: Sequence[Seen]) -> list[Evidence]:
    """How the samples that two mixes share change with what is added to them: foreign samples, against as many native
    ones. The replicate is the draw of samples, its value the rank-biserial effect over them.

    It needs the records of the samples: without them there is no evidence.
    """
    found = []
    for foreign, native in mixes(cells):
        shared = overlaps(foreign, native)
        if not shared:
            continue
        corpus = corpus_of(foreign)
        assert corpus.foreign is not None
        notes = [control(shared)]
        compared = foreign.spec.probes.compared_strings or corpus.num_samples
        if (fewest := min(len(each.rows) for each in shared)) < compared:
            notes.append(f"{fewest} of the {compared} samples to be compared are trained in both")
        if (fewest := min(each.num_trainings for each in shared)) < TRAININGS_WANTED:
            notes.append(f"training seeds a mix: {fewest}, where {TRAININGS_WANTED} are wanted")
        found.append(
            Evidence(
                where=foreign.where(MIX),
                levels=("effect",),
                values=(np.array([each.between.effect for each in shared]),),
                what=f"{corpus.num_foreign} of {name_of(corpus.foreign)} added, against as many native ones",
                notes=tuple(notes),
            )
        )
    return found


def free_against_frozen(cells: Sequence[Seen]) -> list[Evidence]:
    """The skewness of match lengths with embeddings that are trained, less that with embeddings that stay as they were.

    The value of a replicate is its mean difference over the pairs of cells that are equal in all else.
    """
    pairs = []
    for group in groups([cell for cell in cells if FROZEN in cell.params], lambda cell: cell.held((FROZEN,))):
        by_frozen = {bool(cell.params[FROZEN]): cell for cell in group}
        if len(by_frozen) == 2:
            pairs.append((by_frozen[False], by_frozen[True]))
    of_pairs = [[cell.by_string(where_whole(SKEWNESS)) for cell in pair] for pair in pairs]
    differences = [
        {seed: free[seed] - frozen[seed] for seed in free.keys() & frozen.keys()} for free, frozen in of_pairs
    ]
    values = _means_by_seed(differences)
    if not len(values):
        return []
    ranks = [np.median([cell.median(last(RANK)) for cell in own]) for own in zip(*pairs, strict=True)]
    note = f"effective rank of the embeddings at the end: {ranks[0]:.3g} free, {ranks[1]:.3g} frozen"
    return [Evidence(where="", levels=("effect",), values=(values,), what=over_pairs(len(pairs)), notes=(note,))]


def _means_by_seed(arms: Sequence[Mapping[int, float]]) -> Float[ndarray, " replicates"]:
    """One value a replicate: of each string seed the mean over the arms that have it."""
    seeds = sorted({seed for arm in arms for seed in arm})
    return np.array([np.mean([arm[seed] for arm in arms if seed in arm]) for seed in seeds])


def over_pairs(number: int) -> str:
    return "" if number == 1 else f"mean over {number} arms"


def skew_with_collapse(cells: Sequence[Seen]) -> list[Evidence]:
    """Whether looks at which embeddings have fewer directions than the mean match length tells are more skewed.

    Both change with every epoch: the rank correlation of a trial is taken with the mean match length held (partial), or
    any two trends would agree. The value of a replicate is its mean over the cells.
    """

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        is_seen = (column(rows, "epoch") > 0) & (column(rows, "match/censored") < HALF_WHOLE)
        rank, skewness, mean = (column(rows, key)[is_seen] for key in (RANK, SKEWNESS, MEAN))
        both, with_rank, with_skewness = spearman(rank, skewness), spearman(rank, mean), spearman(skewness, mean)
        left = (1 - with_rank**2) * (1 - with_skewness**2)
        return (both - with_rank * with_skewness) / math.sqrt(left) if left > ROUNDING else math.nan

    values = _means_by_seed([cell.by_string(quantity) for cell in cells])
    what = over_pairs(len(cells))
    return [Evidence(where="", levels=("effect",), values=(values,), what=what)] if len(values) else []


def _options(cell: Seen) -> dict[str, int | float | str]:
    """All options of the cell's generator, those at their default too; none of a file."""
    return corpus_of(cell).rows.all_options()


def _others(cell: Seen, option: str) -> dict[str, str]:
    return {name: str(value) for name, value in _options(cell).items() if name != option}
