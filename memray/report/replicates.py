"""One number a replicate: what is read off a trial's rows, and which cells are equal but for what is compared.

The unit is the string: trials of one cell that share their string are one replicate, their median. Here +infinity
means never reached, and nan undefined.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from memray.measures.phases import DURATIONS
from memray.measures.statistics import censored_median
from memray.report import SEEDS, SPEED, column, factors, spec_values, value_text
from memray.report.records import RecordsOf
from memray.spec import TrialSpec
from memray.sweep import Sweep

ONSET, PLATEAU = "phase/memorisation", "phase/plateau"
# Between no recall and full recall, where all measures of it are the same.
PARTLY_RECALLED = (0.25, 0.9)

# Fewer points than these have a correlation by chance.
FEWEST_POINTS = 4

# Of a trial and its rows by epoch: one number.
Quantity = Callable[[TrialSpec, pd.DataFrame], float]


# --- cells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A cell with the rows of its trials that have results, each ascending by epoch.

    Attributes:
        spec: What its trials share, with the seeds of the first.
        params: The flattened spec: a uniform source has its nominal entropy there.
        factors: The fields that the study moves, seeds apart, as `spec_values` gives them.
        rows: By trial.
        records: Of each trial by its id, for what its rows do not hold; None where nobody has them.
    """

    spec: TrialSpec
    params: Mapping[str, Any]
    factors: Mapping[str, Any]
    rows: tuple[tuple[TrialSpec, pd.DataFrame], ...]
    records: RecordsOf | None = None

    @property
    def columns(self) -> list[str]:
        """The params and metrics that any trial of the sweep has."""
        return list(self.rows[0][1].columns)

    def by_string(self, quantity: Quantity) -> dict[int, float]:
        """The values of the replicates for which the quantity is defined, by string seed."""
        values: dict[int, list[float]] = {}
        for trial, rows in self.rows:
            value = quantity(trial, rows)
            if not math.isnan(value):
                values.setdefault(trial.string_seed, []).append(value)
        return {seed: late_median(values[seed]) for seed in sorted(values)}

    def values(self, quantity: Quantity) -> Float[ndarray, " replicates"]:
        """One value a replicate."""
        return np.array([*self.by_string(quantity).values()], dtype=np.float64)

    def held(self, moved: Sequence[str]) -> dict[str, str]:
        """The values of the fields that the study moves, but for those moved here.

        A name that ends with a dot stands for the whole part.
        """
        return {name: str(value) for name, value in self.factors.items() if not _is_among(name, moved)}

    def where(self, moved: Sequence[str] = (), *, unlike: Seen | None = None) -> str:
        """Where the cell stands in its study, for people; empty if all fields that the study moves are moved here.

        Args:
            moved: As in `held`.
            unlike: Only in what the cell differs from this one.
        """
        return ", ".join(
            f"{name.rpartition('.')[2]} {value_text(value)}"
            for name, value in self.factors.items()
            if not _is_among(name, moved) and value != "none" and (unlike is None or value != unlike.factors[name])
        )

    def median(self, quantity: Quantity) -> float:
        """The median over replicates: infinite where it is censored, nan where nothing is defined."""
        values = self.by_string(quantity).values()
        return late_median([*values]) if values else math.nan


def seen_cells(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf | None = None) -> list[Seen]:
    """The cells that have results, in the order of the sweep."""
    if not len(frame):
        return []
    ordered = frame.sort_values("epoch", kind="stable")
    rows = dict(iter(ordered.groupby("trial_id", sort=False)))
    names = [name for name in factors(sweep) if name not in SEEDS]
    cells = []
    for trials in sweep.cells().values():
        present = tuple((trial, rows[trial.trial_id()]) for trial in trials if trial.trial_id() in rows)
        values = spec_values(trials[0])
        moved = {name: values[name] for name in names}
        if present:
            own = Seen(spec=trials[0], params=trials[0].params(), factors=moved, rows=present, records=records)
            cells.append(own)
    return cells


def groups(cells: Iterable[Seen], key: Callable[[Seen], Mapping[str, Any]]) -> list[list[Seen]]:
    """Cells with equal keys, in their order."""
    grouped: dict[tuple[Any, ...], list[Seen]] = {}
    for cell in cells:
        grouped.setdefault(tuple(sorted(key(cell).items())), []).append(cell)
    return list(grouped.values())


def _is_among(name: str, names: Sequence[str]) -> bool:
    return any(name == each or (each.endswith(".") and name.startswith(each)) for each in names)


def late_median(values: Sequence[float]) -> float:
    """The median of values of which infinite ones are censored; infinite where it is itself."""
    found = censored_median(np.array([math.nan if math.isinf(value) else value for value in values]))
    return math.inf if math.isnan(found) else found


# --- quantities ----------------------------------------------------------------------------------------------------


def first_value(rows: pd.DataFrame, key: str) -> float:
    """The first defined value of a metric; nan if there is none."""
    values = _defined(column(rows, key))
    return float(values[0]) if len(values) else math.nan


def last_value(rows: pd.DataFrame, key: str) -> float:
    """The last defined value of a metric; nan if there is none."""
    values = _defined(column(rows, key))
    return float(values[-1]) if len(values) else math.nan


def last_epoch(rows: pd.DataFrame) -> float:
    """How far a trial was followed."""
    return float(column(rows, "epoch")[-1])


def first(key: str) -> Quantity:
    """A metric at the first epoch at which it was measured."""
    return lambda trial, rows: first_value(rows, key)


def last(key: str) -> Quantity:
    """A metric at the last epoch at which it was measured.

    A duration that is missing was never reached, unless the robust measure, from which it is taken, is undefined.
    """

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        value = last_value(rows, key)
        is_censored = key in DURATIONS and math.isnan(value) and not math.isnan(last_value(rows, "recall/robust"))
        return math.inf if is_censored else value

    return quantity


def difference(one: str, other: str) -> Quantity:
    """One metric less another, at the last epoch at which both were measured."""

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        values = _defined(column(rows, one) - column(rows, other))
        return float(values[-1]) if len(values) else math.nan

    return quantity


def spearman(x: Float[ndarray, " points"], y: Float[ndarray, " points"]) -> float:
    """Spearman's correlation of the points at which both are defined; nan where they are few, or one is constant.

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 4.0, 8.0, np.nan]), np.array([1.0, 4.0, 2.0, 5.0, 9.0])), 3)
        0.8
    """
    is_defined = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[is_defined], y[is_defined]
    if len(x) < FEWEST_POINTS or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return math.nan
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


speed = last(SPEED)
onset = last(ONSET)


def speed_in_steps(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """Optimiser steps until robust recall stays at one half."""
    return speed(trial, rows) * trial.steps_per_epoch


def followed(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """Epochs for which a trial was followed."""
    return last_epoch(rows)


def followed_in_steps(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """Optimiser steps for which a trial was followed."""
    return last_epoch(rows) * trial.steps_per_epoch


def up_to_common_horizon(cells: Sequence[Seen], quantity: Quantity, horizon: Quantity = followed) -> Quantity:
    """A duration that is censored alike in cells that are to be compared.

    A trial that was followed for 15 epochs in vain is not slower than one that took 50, for it may take 20. So what
    lies beyond the shortest horizon counts as never reached in all cells; every order that is left is true. Horizons
    of trials that arrived are no bound: theirs are known, however early they stopped. What is no duration stays.

    Args:
        horizon: How far a trial was followed, in the unit of the quantity.
    """
    trials = [each for cell in cells for each in cell.rows]
    shortest = min((horizon(*each) for each in trials if math.isinf(quantity(*each))), default=math.inf)

    def censored(trial: TrialSpec, rows: pd.DataFrame) -> float:
        value = quantity(trial, rows)
        return math.inf if value > shortest else value

    return censored


def plateau(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """Epochs from the distribution's being learned to the onset of memorisation.

    Where memorisation set in and the distribution was never learned, the phases overlap: it would have been learned
    after the last epoch, so that the plateau is below onset minus last epoch, which is taken. A trial that never came
    to memorise says nothing.
    """
    known = last_value(rows, PLATEAU)
    return last_value(rows, ONSET) - last_epoch(rows) if math.isnan(known) else known


def accuracy_at_onset(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """Token accuracy at the epoch at which memorisation sets in: what guessing has come to."""
    is_onset = column(rows, "epoch") == last_value(rows, ONSET)
    values = column(rows, "recall/token_accuracy")[is_onset]
    return float(values[0]) if len(values) else math.nan


def accuracy_beyond_robust(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """What token accuracy says beyond robust recall while the model only guesses: the mean over epochs before onset.

    Robust recall below 0 counts as 0, or the epochs before the alphabet is learned would count for accuracy.
    """
    began = last_value(rows, ONSET)
    # All of them, where memorisation never set in.
    is_guessing = ~(column(rows, "epoch") >= began)
    beyond = column(rows, "recall/token_accuracy") - np.maximum(column(rows, "recall/robust"), 0.0)
    values = _defined(beyond[is_guessing])
    return float(np.mean(values)) if len(values) else math.nan


def extractable_beyond_robust(trial: TrialSpec, rows: pd.DataFrame) -> float:
    """50/50 extractability less robust recall where half is recalled; nan where no probe met partial recall.

    It is taken at the probe whose robust recall is nearest to one half, the first of equals: before memorisation both
    are 0 and after it both are 1, and there no measure could understate the other.
    """
    robust = column(rows, "recall/robust")
    low, high = PARTLY_RECALLED
    beyond = column(rows, "extractable/50") - robust
    usable = np.flatnonzero(~np.isnan(beyond) & (robust >= low) & (robust <= high))
    return float(beyond[usable[np.argmin(np.abs(robust[usable] - 0.5))]]) if len(usable) else math.nan


def _defined(values: Float[ndarray, " _"]) -> Float[ndarray, " defined"]:
    return values[~np.isnan(values)]


# --- the context probe ---------------------------------------------------------------------------------------------


def local_key(k: int | str, replacement: str) -> str:
    """The key of recall from k local tokens, with the context before them replaced."""
    return f"context/local_{k}_{replacement}"


def local_lengths(columns: Iterable[str], replacement: str) -> list[int]:
    """The numbers of local tokens that were probed under a replacement, ascending.

    Example:
        >>> local_lengths(["context/local_10_source", "context/local_2_source", "context/local_full_source"], "source")
        [2, 10]
    """
    pattern = re.compile(rf"context/local_(\d+)_{re.escape(replacement)}")
    return sorted(int(found[1]) for name in columns if (found := pattern.fullmatch(str(name))))


def short_prefix(lengths: Sequence[int], length: int) -> int | None:
    """The k nearest to 5–10 % of the string, the largest of equals; None where none was probed.

    Example:
        >>> short_prefix([1, 10, 20, 30], 256)
        20
    """
    low, high = 0.05 * length, 0.10 * length
    return min((k for k in lengths if k > 0), key=lambda k: (max(low - k, k - high, 0.0), -k), default=None)


def small_prefix(lengths: Sequence[int], length: int) -> int | None:
    """The k nearest to 2 % of the string, the smallest of equals; None where none was probed."""
    return min((k for k in lengths if k > 0), key=lambda k: (abs(k - 0.02 * length), k), default=None)
