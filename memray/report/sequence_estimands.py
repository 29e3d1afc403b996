"""What the claims about strings one after another are judged by: as `estimands`, for cells with a curriculum.

The replicate is a trial, which is one sequence; what it shows at several stages is one number of it, or one a level.
So the levels of a trend over the stages hold the same trials. They are compared as if they did not, which errs on the
side of caution where the stages of a trial are alike.

A control that begins every stage from the base weights carries no past: it is what others are held against, and
forgets nothing that it could be judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from memray.curriculum import CurriculumSpec
from memray.measures.fading import CURVES
from memray.report import SPEED, column, stage_ends
from memray.report.estimands import NUM_STRINGS, Estimand, Evidence, between, within
from memray.report.replicates import (
    Quantity,
    Seen,
    followed,
    groups,
    late_median,
    speed,
    up_to_common_horizon,
)
from memray.spec import TrialSpec

WEIGHTS = "curriculum.weights"
REVISITS = "curriculum.revisits"
UNREPEATED = "curriculum.unrepeated"
OTHER = "curriculum.other."  # the whole part

FORGETTING = "sequence/forgetting"
BEYOND_HELDOUT = "sequence/oldest_beyond_heldout_bits"


# --- stages --------------------------------------------------------------------------------------------------------


def curriculum_of(cell: Seen) -> CurriculumSpec:
    """What the trials of a cell train one after another."""
    assert cell.spec.curriculum is not None  # a claim about sequences sees no other cells
    return cell.spec.curriculum


def carrying(cells: Iterable[Seen]) -> list[Seen]:
    """The cells whose stages begin with what the ones before them have left."""
    return [cell for cell in cells if curriculum_of(cell).weights == "carried"]


def by_stage(cell: Seen) -> dict[int, Seen]:
    """The cell as it stood at the end of each stage, with epochs counted from the stage's beginning.

    Only what gives T is kept: there may be a thousand stages, and a row of all measures takes its time.
    """
    found: dict[int, list[tuple[TrialSpec, pd.DataFrame]]] = {}
    for trial, rows in cell.rows:
        ends = stage_ends(rows)
        of_speed = ends.reindex(columns=["epoch", "recall/robust", SPEED])
        for place, number in enumerate(ends["stage"]):
            found.setdefault(number, []).append((trial, of_speed.iloc[[place]]))
    return {number: replace(cell, rows=tuple(found[number])) for number in sorted(found)}


def last_stage(cell: Seen) -> Seen:
    """The cell at the end of its last stage, with the epochs of that alone; without rows where they are not there."""
    return by_stage(cell).get(len(cell.spec.stages()) - 1) or replace(cell, rows=())


def new_stages(cell: Seen) -> dict[int, Seen]:
    """Of `by_stage`, the stages that train strings of the trial's own source for the first time."""
    new = {each.index for each in cell.spec.stages() if not (each.is_revisit or each.is_unrepeated or each.is_other)}
    return {number: seen for number, seen in by_stage(cell).items() if number in new}


def at_end(key: str) -> Quantity:
    """A metric at the very end of a trial; nan where it is not defined there, whatever it was before."""
    return lambda trial, rows: float(column(rows, key)[-1])


def _medians(stages: Iterable[Seen], quantity: Quantity) -> Float[ndarray, " replicates"]:
    """The median over the stages, one value a replicate."""
    values: dict[int, list[float]] = {}
    for each in stages:
        for seed, value in each.by_string(quantity).items():
            values.setdefault(seed, []).append(value)
    return np.array([late_median(values[seed]) for seed in sorted(values)], dtype=np.float64)


def stage_bins(stages: Iterable[int]) -> list[list[int]]:
    """Stages in bins that double: what is learned from the first strings is learned from few of them.

    Example:
        >>> stage_bins(range(10))
        [[0], [1], [2, 3], [4, 5, 6, 7], [8, 9]]
    """
    bins: dict[int, list[int]] = {}
    for stage in sorted(stages):
        bins.setdefault(stage.bit_length(), []).append(stage)
    return list(bins.values())


def _named(stages: Sequence[int]) -> str:
    return str(stages[0]) if len(stages) == 1 else f"{stages[0]}–{stages[-1]}"


# --- one claim's own -----------------------------------------------------------------------------------------------


def over_stages(cells: Sequence[Seen]) -> list[Evidence]:
    """T over the stages, each bin of them by its median, in every cell that carries its weights."""
    found = []
    for cell in carrying(cells):
        stages = new_stages(cell)
        comparable = up_to_common_horizon([*stages.values()], speed)
        levels = [
            (_named(numbers), _medians((stages[number] for number in numbers), comparable))
            for numbers in stage_bins(stages)
        ]
        found += between(levels, where=cell.where(), what="over the stages")
    return found


def carried_against_fresh_weights(cells: Sequence[Seen]) -> list[Evidence]:
    """T in the later half of the stages, from weights that begin anew with each to weights that were carried there."""
    found = []
    for group in groups(cells, lambda cell: cell.held((WEIGHTS,))):
        stages = {curriculum_of(cell).weights: new_stages(cell) for cell in group}
        shared = sorted(set.intersection(*map(set, stages.values())))
        later = shared[len(shared) // 2 :]
        if len(stages) < 2 or not later:
            continue
        seen = {weights: [each[number] for number in later] for weights, each in stages.items()}
        comparable = up_to_common_horizon([*seen["base"], *seen["carried"]], speed)
        levels = [
            ("fresh weights", _medians(seen["base"], comparable)),
            ("carried weights", _medians(seen["carried"], comparable)),
        ]
        found += between(levels, where=group[0].where((WEIGHTS,)), what=f"same strings, stages {_named(later)}")
    return found


def at_end_of_each(key: str) -> Estimand:
    """A metric at the end of the sequence, in every cell that carries its weights."""

    def estimand(cells: Sequence[Seen]) -> list[Evidence]:
        return [each for cell in carrying(cells) for each in within(cell, at_end(key), where=cell.where())]

    return estimand


def retention_curves(cells: Sequence[Seen]) -> list[Evidence]:
    """For each curve its AIC less the least of the others, over the sequences in which curves can be told apart."""
    found = []
    for cell in carrying(cells):
        is_identifiable = cell.values(at_end("retention/identifiable"))
        unknown = int(np.sum(is_identifiable == 0))
        notes = (f"not identifiable in {unknown} of {len(is_identifiable)} sequences",) if unknown else ()
        for curve in CURVES if len(is_identifiable) else ():
            values = cell.values(_beyond_others(curve))
            found.append(
                Evidence(
                    where=cell.where(), levels=("effect",), values=(values,), what=f"{curve} curve", notes=notes,
                )
            )  # fmt: skip
    return found


def _beyond_others(curve: str) -> Quantity:
    own, *others = (at_end(f"retention/aic_{name}") for name in (curve, *(each for each in CURVES if each != curve)))
    return lambda trial, rows: own(trial, rows) - float(np.fmin.reduce([other(trial, rows) for other in others]))


def savings_on_relearning(cells: Sequence[Seen]) -> list[Evidence]:
    """1 - T(a stage that is visited again) / T(a new one in its place), sequence by sequence, after the same strings.

    Where the new one was never reached and the other was, T of the new one is at least as long as it was followed, and
    the savings at least what that gives. Of the reverse nothing is known but that they are below all others, and
    nothing at all where neither was reached.
    """
    found = []
    for group in groups(carrying(cells), lambda cell: cell.held((REVISITS, NUM_STRINGS))):
        new = {cell.spec.strings.num_strings: cell for cell in group if not curriculum_of(cell).revisits}
        for cell in group:
            curriculum = curriculum_of(cell)
            other = new.get(cell.spec.strings.num_strings + curriculum.strings_per_stage)
            if len(curriculum.revisits) == 1 and other is not None:
                where = cell.where((REVISITS, NUM_STRINGS))
                what = f"stage {curriculum.revisits[0]} again"
                found += _savings(last_stage(cell), last_stage(other), where=where, what=what)
    return found


def _savings(again: Seen, anew: Seen, *, where: str, what: str) -> list[Evidence]:
    t_again, t_anew, t_followed = again.by_string(speed), anew.by_string(speed), anew.by_string(followed)
    # A new string that was known before it was trained leaves nothing to be saved.
    seeds = [seed for seed in t_again if t_anew.get(seed, 0.0) > 0.0]
    if not seeds:
        return []
    values = np.array([_saved(t_again[seed], t_anew[seed], t_followed[seed]) for seed in seeds])
    late = sum(math.isinf(t_again[seed]) or math.isinf(t_anew[seed]) for seed in seeds)
    notes = (f"not reached in one or both, in {late} of {len(seeds)} sequences",) if late else ()
    return [Evidence(where=where, levels=("effect",), values=(values,), what=what, notes=notes)]


def _saved(t_again: float, t_anew: float, t_followed: float) -> float:
    if math.isinf(t_again):
        return math.nan if math.isinf(t_anew) else -math.inf
    return 1.0 - t_again / (t_followed if math.isinf(t_anew) else t_anew)


def memorising_against_fresh_strings(cells: Sequence[Seen]) -> list[Evidence]:
    """T of the last stage, from as many steps on strings that never came again to stages that were memorised before.

    A row each for stages of the same source, and of every other one that was memorised in its place: against fresh
    strings of the trial's source, and of that other one.
    """
    found = []
    for group in groups(carrying(cells), lambda cell: cell.held((UNREPEATED, OTHER))):
        of_last = [cell for cell in group if _is_plain_at_end(cell)]
        fresh = [cell for cell in of_last if _is_fresh_before(cell)]
        memorised = [cell for cell in of_last if not curriculum_of(cell).unrepeated]
        for cell in memorised:
            own = curriculum_of(cell).other
            for control in (each for each in fresh if curriculum_of(each).other in (None, own)):
                ends = last_stage(control), last_stage(cell)
                comparable = up_to_common_horizon(ends, speed)
                names = "after fresh strings", "after memorising"
                levels = [(name, end.values(comparable)) for name, end in zip(names, ends, strict=True)]
                is_matched = curriculum_of(control).other == own
                found += between(
                    levels, where=cell.where((UNREPEATED, OTHER)), what=_before(cell, is_matched=is_matched)
                )
    return found


def _before(cell: Seen, *, is_matched: bool) -> str:
    """What was memorised before, and against fresh strings of what."""
    other = curriculum_of(cell).other
    if other is None:
        return "memorised before: the same source"
    changes = ", ".join(f"{name} {value}" for name, value in other.changes().items())
    return f"memorised before: {changes}; fresh strings of {'that' if is_matched else 'the same source'}"


def _is_plain_at_end(cell: Seen) -> bool:
    """Whether the last stage trains new strings of the trial's own source, after others."""
    *before, last = cell.spec.stages()
    return bool(before) and not (last.is_revisit or last.is_unrepeated or last.is_other)


def _is_fresh_before(cell: Seen) -> bool:
    """Whether all stages before the last are unrepeated."""
    return all(stage.is_unrepeated for stage in cell.spec.stages()[:-1])
