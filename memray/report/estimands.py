"""What each claim is judged by: values per replicate, by the levels of a factor or in a single cell.

An estimand takes the cells of a sweep that have results and gives the evidence that is in them, one piece for each
place where its question can be asked; none where the sweep lacks the cells or the columns. A replicate for which a
value is undefined is left out; one that never reached it counts as the latest. Levels that were not followed for
equally long are compared up to the shortest horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from memray import families
from memray.report import is_number, value_text
from memray.report.replicates import (
    Quantity,
    Seen,
    difference,
    first,
    followed,
    followed_in_steps,
    groups,
    local_key,
    local_lengths,
    onset,
    short_prefix,
    small_prefix,
    speed,
    speed_in_steps,
    up_to_common_horizon,
)

ENTROPY = "strings.entropy_bits"
ALPHABET_SIZE = "strings.alphabet_size"
NUM_STRINGS = "strings.num_strings"
SKEW = "strings.skew"
LEARNING_RATE = "training.learning_rate"
# The fields that decide how much of a string its source makes predictable.
STRUCTURE = (
    "strings.kind", "strings.order", "strings.conditional_entropy_bits", "strings.motif_length", "strings.depth",
    "strings.branching",
)  # fmt: skip
# The fields that bring a model to where it meets the strings.
PRETRAINING = ("model.pretrained", "model.revision", "model.path", "model.in_context.")
MODELS_WANTED = 6


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Values per replicate.

    Attributes:
        where: In which cells, in words; empty where the sweep has no others.
        levels: Names of the levels in their order. Of a single one the values are effects themselves.
        values: One value a replicate, by level; nan is unknown.
        what: What the values are, where a claim asks for several things.
        notes: What a reader should know before believing it.
    """

    where: str
    levels: tuple[str, ...]
    values: tuple[Float[ndarray, " _"], ...]
    what: str = ""
    notes: tuple[str, ...] = ()


Estimand = Callable[[Sequence[Seen]], list[Evidence]]
Values = Float[ndarray, " _"]


def between(levels: Sequence[tuple[str, Values]], *, where: str, what: str = "") -> list[Evidence]:
    """The evidence of the levels that have values, if there are two."""
    present = [(name, values) for name, values in levels if len(values)]
    if len(present) < 2:
        return []
    names, values = zip(*present, strict=True)
    return [Evidence(where=where, levels=names, values=values, what=what)]


def within(cell: Seen, quantity: Quantity, *, where: str, what: str = "") -> list[Evidence]:
    """The evidence of a cell, if the quantity is defined there."""
    values = cell.values(quantity)
    return [Evidence(where=where, levels=("effect",), values=(values,), what=what)] if len(values) else []


def together(*estimands: Estimand) -> Estimand:
    """The evidence of several estimands."""
    return lambda cells: [each for estimand in estimands for each in estimand(cells)]


def in_each_cell(quantity: Quantity, what: str = "") -> Estimand:
    """The quantity itself, cell by cell."""

    def estimand(cells: Sequence[Seen]) -> list[Evidence]:
        return [each for cell in cells for each in within(cell, quantity, where=cell.where(), what=what)]

    return estimand


def over(factor: str, quantity: Quantity = speed, *, what: str = "", kinds: Sequence[str] = ()) -> Estimand:
    """A quantity over the levels of a numeric field, wherever cells are equal in all others that the study moves.

    Args:
        factor: The field; a uniform source has its nominal entropy.
        kinds: The sources that the question is about; all, if none is named.
    """

    def estimand(cells: Sequence[Seen]) -> list[Evidence]:
        cells = [
            cell
            for cell in cells
            if is_number(cell.params.get(factor)) and (not kinds or cell.params["strings.kind"] in kinds)
        ]
        found = []
        for group in groups(cells, lambda cell: cell.held((factor,))):
            comparable = up_to_common_horizon(group, quantity)
            levels = {float(cell.params[factor]): cell.values(comparable) for cell in group}
            named = [(value_text(level), levels[level]) for level in sorted(levels)]
            found += between(named, where=group[0].where((factor,)), what=what)
        return found

    return estimand


# --- one claim's own -----------------------------------------------------------------------------------------------


def over_alphabets_at_entropy(cells: Sequence[Seen]) -> list[Evidence]:
    """T over alphabet sizes whose sources have the same entropy and the same skew, or are uniform."""
    found = []
    for group in _of_equal_entropy(cells, (ALPHABET_SIZE,)):
        comparable = up_to_common_horizon(group, speed)
        levels = {int(cell.params[ALPHABET_SIZE]): cell.values(comparable) for cell in group}
        named = [(str(level), levels[level]) for level in sorted(levels)]
        found += between(named, where=_at_entropy(group))
    return found


def over_compressibility(cells: Sequence[Seen]) -> list[Evidence]:
    """T from the most to the least compressible strings (by zlib) that differ in their structure alone."""
    zlib_bits = first("string/zlib_bits")
    cells = [cell for cell in cells if not math.isnan(cell.median(zlib_bits))]
    found = []
    for group in _of_equal_entropy(cells, STRUCTURE):
        ordered = sorted(group, key=lambda cell: cell.median(zlib_bits))
        comparable = up_to_common_horizon(group, speed)
        named = [(f"{cell.median(zlib_bits):.3g} zlib bits", cell.values(comparable)) for cell in ordered]
        found += between(named, where=_at_entropy(group))
    return found


def _of_equal_entropy(cells: Sequence[Seen], moved: Sequence[str]) -> list[list[Seen]]:
    """Cells of the same entropy, to a hundredth of a bit, and skew that differ in some fields at most.

    A uniform source has no skew: it is the end of each, and stands with all of them.
    """

    def held(cell: Seen) -> dict[str, str]:
        return cell.held((*moved, ENTROPY, SKEW)) | {ENTROPY: f"{cell.params[ENTROPY]:.2f}"}

    found = []
    for alike in groups([cell for cell in cells if is_number(cell.params[ENTROPY])], held):
        skews = dict.fromkeys(skew for cell in alike if (skew := _skew(cell)))
        found += [[cell for cell in alike if _skew(cell) in ("", skew)] for skew in skews or [""]]
    return found


def _skew(cell: Seen) -> str:
    """The skew; empty of a uniform source."""
    strings = cell.spec.strings.canonical()
    return "" if strings.entropy_bits is None else strings.skew


def _at_entropy(group: Sequence[Seen]) -> str:
    entropy = f"entropy {group[0].params[ENTROPY]:.3g} bits"
    skew = max(map(_skew, group))  # uniform ones have an empty one
    return f"{entropy}, skew {skew}" if skew and SKEW in group[0].factors else entropy


def pretrained_and_untrained(cells: Sequence[Seen]) -> list[Evidence]:
    """T of a pre-trained and of an untrained model: from published weights, or after the most steps done here.

    Each has its own default epochs and rate, unless the study sets them.
    """

    def training(cell: Seen) -> tuple[bool, int]:
        return cell.spec.model.pretrained, cell.spec.model.in_context.steps

    moved = (*PRETRAINING, "training.epochs", LEARNING_RATE)
    found = []
    for group in groups(cells, lambda cell: cell.held(moved)):
        ordered = sorted(group, key=training)
        if training(ordered[0]) == (False, 0) < training(ordered[-1]):
            comparable = up_to_common_horizon((ordered[-1], ordered[0]), speed)
            named = [("pre-trained", ordered[-1].values(comparable)), ("untrained", ordered[0].values(comparable))]
            found += between(named, where=group[0].where(moved))
    return found


def onset_by_in_context_inference(cells: Sequence[Seen]) -> list[Evidence]:
    """By how many epochs the guessing phase grows with each bit of held-out KL before training, string by string.

    The slope of a regression over the models that met a string, with the family (and whatever else the study moves
    but for the pre-training) and the logarithm of the size as covariates. Where a model never came to memorise the
    string, its slope is unknown.
    """
    others = (*PRETRAINING, "model.size", "training.epochs", LEARNING_RATE)
    points = [(cell.by_string(first("guessing/heldout_kl_bits")), cell.by_string(onset)) for cell in cells]
    seeds = sorted(set().union(*({*x} & {*y} for x, y in points)))
    slopes = []
    for seed in seeds:
        met = [index for index, (x, y) in enumerate(points) if seed in x and seed in y]
        strata = [str(cells[index].held(others)) for index in met]
        covariates = [[float(stratum == each) for stratum in strata] for each in dict.fromkeys(strata)]
        covariates.append([_log_size(cells[index]) for index in met])
        x, y = (np.array([points[index][axis][seed] for index in met]) for axis in (0, 1))
        slope = _slope(x, y, np.array(covariates).T)
        if slope is not None:
            slopes.append(slope)
    if not slopes:
        return []
    notes = () if len(cells) >= MODELS_WANTED else (f"{len(cells)} models, where {MODELS_WANTED} are wanted",)
    return [Evidence(where="", levels=("slope",), values=(np.array(slopes),), notes=notes)]


def _log_size(cell: Seen) -> float:
    """Of a model read from a directory nothing is known here, and nothing is adjusted for."""
    model = cell.spec.model
    return 0.0 if model.path else math.log(families.size(model.family, model.size).num_parameters)


def _slope(x: Values, y: Values, covariates: Float[ndarray, "points covariates"]) -> float | None:
    """The slope of y on x with covariates; infinite where a y is, None where the covariates tell all of x.

    It is the slope on what the covariates leave of x (Frisch, Waugh and Lovell).
    """
    own = x - covariates @ np.linalg.lstsq(covariates, x, rcond=None)[0]
    if own @ own <= 1e-9 * (x @ x) or len(x) <= np.linalg.matrix_rank(covariates) + 1:
        return None
    return float(own @ y / (own @ own)) if np.isfinite(y).all() else math.inf


def short_prefix_against_full(cells: Sequence[Seen]) -> list[Evidence]:
    """Recall from k = 5–10 % of the string after fresh symbols of its source, less recall from the full prefix."""
    found = []
    for cell in cells:
        k = short_prefix(local_lengths(cell.columns, "source"), cell.spec.strings.length)
        if k is not None:
            quantity = difference(local_key(k, "source"), local_key("full", "source"))
            found += within(cell, quantity, where=cell.where(), what=f"k = {k} less full")
    return found


def source_against_foreign(cells: Sequence[Seen]) -> list[Evidence]:
    """Recall from few local tokens after fresh symbols of the source, less that after symbols foreign to it."""
    found = []
    for cell in cells:
        for foreign in ("wrong", "outside"):
            both = {*local_lengths(cell.columns, "source")} & {*local_lengths(cell.columns, foreign)}
            k = small_prefix(sorted(both), cell.spec.strings.length)
            if k is not None:
                quantity = difference(local_key(k, "source"), local_key(k, foreign))
                found += within(cell, quantity, where=cell.where(), what=f"k = {k}, source less {foreign}")
    return found


def interaction_with_entropy(cells: Sequence[Seen]) -> list[Evidence]:
    """How the entropy effect differs between procedures: T at the highest entropy over T at the lowest, string by
    string, under the sweep's first procedure and under each other one.

    Procedures differ in anything but the rate, and each has its best rate at each entropy, that of the smallest
    median T. The rates themselves are compared within the first procedure.
    """

    cells = [cell for cell in cells if is_number(cell.params[ENTROPY])]
    others = (ENTROPY, "model.", "training.", "compute.")
    return [each for alike in groups(cells, lambda cell: cell.held(others)) for each in _interactions(alike)]


def _interactions(cells: Sequence[Seen]) -> list[Evidence]:
    """The same among cells whose strings differ in entropy alone."""
    procedures = groups(cells, lambda cell: cell.held((ENTROPY, LEARNING_RATE)))
    entropies = [cell.params[ENTROPY] for cell in procedures[0]]
    ends = min(entropies), max(entropies)
    rates = groups(procedures[0], lambda cell: {LEARNING_RATE: str(cell.params[LEARNING_RATE])})
    found = []
    for parts, moved in ((procedures, (ENTROPY, LEARNING_RATE)), (rates, (ENTROPY,))) if ends[0] < ends[1] else ():
        reference = parts[0][0]
        for part in parts[1:]:
            name = part[0].where(moved, unlike=reference)
            other_name = reference.where(moved, unlike=part[0]) or "the first procedure"
            named = [(other_name, _entropy_ratio(parts[0], ends)), (name, _entropy_ratio(part, ends))]
            found += between(named, where=name, what=f"against {other_name}")
    return found


def _entropy_ratio(cells: Sequence[Seen], ends: tuple[float, float]) -> Values:
    """T at the higher entropy over T at the lower, of each string that has both; nan unless both were reached.

    With one of them censored, the ratio is known to lie beyond some number, which is not to be 0 or infinite.
    """
    by_end = []
    for entropy in ends:
        # A median that is undefined is no best one.
        at_end = [cell for cell in cells if cell.params[ENTROPY] == entropy and not math.isnan(cell.median(speed))]
        if not at_end:
            return np.empty(0)
        by_end.append(min(at_end, key=lambda cell: cell.median(speed)).by_string(speed))
    low, high = by_end
    pairs = [(low[seed], high[seed]) for seed in sorted(low.keys() & high.keys())]
    return np.array([y / x if math.isfinite(x) and math.isfinite(y) else math.nan for x, y in pairs])


def over_num_strings(cells: Sequence[Seen]) -> list[Evidence]:
    """T of the shared strings over the number of strings, in epochs and in steps, in three arms: of equal epochs, of
    equal optimiser steps, and of equal tokens in all.

    Levels that were followed for equally many epochs were not for equally many steps, nor the other way round; so
    each comparison ends, in its own unit, with the level of the shortest horizon.
    """

    def steps(cell: Seen) -> int:
        return cell.spec.num_epochs * cell.spec.steps_per_epoch

    def tokens(cell: Seen) -> int:
        return cell.spec.strings.num_strings * cell.spec.strings.length

    arms: dict[str, Callable[[Seen], Mapping[str, Any]]] = {
        "equal epochs": lambda cell: cell.held((NUM_STRINGS,)),
        "equal steps": lambda cell: cell.held((NUM_STRINGS, "training.epochs")) | {"": str(steps(cell))},
        "equal tokens": lambda cell: cell.held((NUM_STRINGS, "strings.length")) | {"": str(tokens(cell))},
    }
    found = []
    for arm, key in arms.items():
        for group in groups(cells, key):
            if arm == "equal steps" and len({cell.spec.num_epochs for cell in group}) == 1:
                continue  # of equal epochs as well
            ordered = sorted(group, key=lambda cell: cell.spec.strings.num_strings)
            for unit, quantity, horizon in (
                ("epochs", speed, followed),
                ("steps", speed_in_steps, followed_in_steps),
            ):
                comparable = up_to_common_horizon(group, quantity, horizon)
                levels = {cell.spec.strings.num_strings: cell.values(comparable) for cell in ordered}
                named = [(str(level), values) for level, values in levels.items()]
                elsewhere = ordered[0].where((NUM_STRINGS, "training.epochs", "strings.length"))
                found += between(named, where=", ".join(filter(None, (arm, elsewhere))), what=f"in {unit}")
    return found
