"""What a sweep has shown. Here: cell by cell, on which the table and the figures beside this file stand.

Everything in this package reads a sweep and the frame of its results (one row a trial and epoch), or the records of
single trials (`records`), and knows neither where these were kept nor how they were computed. The unit is the
replicate. A level that was never reached is censored, which is not a missing value: it counts as later than every
number, and is shown as beyond the last epoch that was looked at.

A trial with a curriculum has a row at the end of each stage, about that stage's own strings. Whatever speaks of a
trial by one number speaks of its last such stage, with epochs counted within it, and has to say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from memray.measures.phases import DURATIONS
from memray.measures.statistics import censored_median, median_interval
from memray.spec import TrialSpec
from memray.sweep import Sweep, states

SPEED = "phase/epochs_to_robust_50"
SEEDS = ("string_seed", "model_seed", "order_seed")
PER_STAGE = "curriculum.strings_per_stage"
# What is said of a table or a trend where trials have a curriculum.
OF_LAST_STAGE = "of a curriculum, all is of the last stage that measured its own strings, with epochs counted within it"


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep, and the replicates of it that have results.

    Attributes:
        trials: The cell's trials, which differ in seeds alone.
        last: The last epoch of each replicate with results, in the order of the trials, of a curriculum that of its
            last stage (see `of_last_stage`); and `is_defined`: whether the robust measure was defined at any epoch.
            Where it never was (a string of one symbol), the phases are not late but undefined.
    """

    trials: tuple[TrialSpec, ...]
    last: pd.DataFrame

    @property
    def present(self) -> tuple[TrialSpec, ...]:
        """The trials that have results."""
        return tuple(trial for trial in self.trials if trial.trial_id() in self.last.index)

    @property
    def spec(self) -> TrialSpec:
        """What all trials of the cell share, with the seeds of the first."""
        return self.trials[0]

    def values(self, key: str) -> Float[ndarray, " replicates"]:
        """The last value of each replicate for which the key is defined; nan only where a phase is censored."""
        values = column(self.last, key)
        return values[self.last["is_defined"]] if key in DURATIONS else values[~np.isnan(values)]

    def last_epochs(self) -> Float[ndarray, " replicates"]:
        """How far each replicate was followed of which `values` gives the phases."""
        return column(self.last, "epoch")[self.last["is_defined"]]

    def centre(self, key: str) -> Centre:
        """The median of a key over the replicates, with its interval."""
        values = self.values(key)
        reached = np.where(np.isnan(values), self.last_epochs(), values) if key in DURATIONS else values
        low, high = median_interval(values)
        least_low, least_high = median_interval(reached)
        return Centre(
            numbers=(censored_median(values), low, high),
            at_least=(censored_median(reached), least_low, least_high),
            num_replicates=len(values),
            decimals=1 if key in DURATIONS else 2,
        )


@dataclass(frozen=True, kw_only=True)
class Centre:
    """A median over replicates, and the low and the high end of its interval.

    Attributes:
        numbers: The three. A censored median is nan, a censored end infinite; all are nan without replicates.
        at_least: The same three with the last epoch in place of every censored value: what is exceeded for certain.
            (Of two replicates, one at epoch 20 and one censored at 200, the median is known to exceed 110.)
        num_replicates: Replicates for which the key is defined.
        decimals: Decimals that are shown.
    """

    numbers: tuple[float, float, float]
    at_least: tuple[float, float, float]
    num_replicates: int
    decimals: int

    def __str__(self) -> str:
        if self.num_replicates == 0:
            return "–"
        median, low, high = (
            _decimal(number, self.decimals) if math.isfinite(number) else f">{_decimal(least, self.decimals)}"
            for number, least in zip(self.numbers, self.at_least, strict=True)
        )
        return median if self.num_replicates == 1 else f"{median} [{low},{high}]"


def cells_of(sweep: Sweep, frame: pd.DataFrame) -> dict[str, Cell]:
    """The cells of a sweep by id, in its order, also those without any result."""
    ordered = of_last_stage(frame).sort_values("epoch", kind="stable")
    last = ordered.groupby("trial_id").tail(1).set_index("trial_id")
    robust = pd.Series(column(ordered, "recall/robust"), index=ordered["trial_id"])
    last = last.assign(is_defined=robust.notna().groupby(level=0).any())
    cells = {}
    for cell_id, trials in sweep.cells().items():
        present = [trial.trial_id() for trial in trials if trial.trial_id() in last.index]
        cells[cell_id] = Cell(trials, last.loc[present])
    return cells


def stage_ends(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a trial and stage: its end, with `epoch` counted from the stage's beginning.

    A trial without a curriculum is one stage, numbered 0, that ends with its last epoch. Where stages are left out, of
    which MLflow holds a part only, those between two rows count as equally long.
    """
    rows = frame.assign(stage=np.nan_to_num(column(frame, "stage")).astype(int))
    ends = rows.sort_values("epoch", kind="stable").groupby(["trial_id", "stage"], sort=False).tail(1)
    by_trial = ends.groupby("trial_id")
    epochs = ends["epoch"] - by_trial["epoch"].shift(fill_value=0)
    return ends.assign(epoch=epochs / (ends["stage"] - by_trial["stage"].shift(fill_value=-1)))


def of_last_stage(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows, but of trials of several stages only the end of the last one that measured its own strings.

    An unrepeated stage has no strings of its own. Without this, what the last stage never reached would be read off
    an earlier one.
    """
    staged = {*frame.loc[column(frame, "stage") > 0, "trial_id"]}
    if not staged:
        return frame
    is_staged = frame["trial_id"].isin([*staged]).to_numpy()
    last = measured_ends(frame.loc[is_staged]).groupby("trial_id", sort=False).tail(1)
    return last if is_staged.all() else pd.concat([frame.loc[~is_staged], last])


def measured_ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Of `stage_ends`, those of stages that measured their own strings."""
    ends = stage_ends(frame)
    return ends.loc[ends.filter(regex="^recall/").notna().any(axis=1)]


def has_curriculum(sweep: Sweep) -> bool:
    """Whether any trial of the sweep trains strings one after another."""
    return any(trial.curriculum is not None for trial in sweep.trials)


def has_corpus(sweep: Sweep) -> bool:
    """Whether any trial of the sweep trains the samples of a corpus."""
    return any(trial.corpus is not None for trial in sweep.trials)


def column(rows: pd.DataFrame, key: str) -> Float[ndarray, " rows"]:
    """The values of a metric, nan where it is missing; it has no column at all when no trial ever had it."""
    return rows[key].to_numpy(dtype=np.float64) if key in rows else np.full(len(rows), np.nan)


def spec_values(trial: TrialSpec) -> dict[str, Any]:
    """The flattened spec as it was written, seeds apart.

    `params()` states the nominal entropy of a uniform source, which follows from its alphabet: two uniform alphabets
    differ in one field, not in two. Here a uniform source has the entropy None. Nor is the number of stages written,
    which follows from the strings.
    """
    values: dict[str, Any] = {**trial.params()}
    del values["curriculum.num_stages"]
    if trial.strings.entropy_bits is None and trial.strings.kind != "text":  # a text has no entropy that is known
        values["strings.entropy_bits"] = None
    return {name: value for name, value in values.items() if name not in SEEDS}


def factors(sweep: Sweep) -> tuple[str, ...]:
    """The fields, seeds apart, that the study moves.

    A field that no trial sets is none, though it may differ: a learning rate that the family table fills in comes
    with the family. A curriculum of defaults beside trials without one moves a field all the same.
    """
    values = [spec_values(trial) for trial in sweep.trials]
    differing = [name for name in values[0] if len({each[name] for each in values}) > 1]
    moved = [name for name in differing if any(states(trial, name) for trial in sweep.trials)]
    if PER_STAGE in differing and not any(name.startswith("curriculum.") for name in moved):
        moved.append(PER_STAGE)
    return tuple(moved)


def is_number(value: Any) -> bool:
    """Whether a field's value has an order; a truth value has none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_text(value: Any) -> str:
    """A value of `spec_values` for people."""
    if value is None:
        return "uniform"  # the entropy alone can be None there
    if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)+", value):
        return _ranges([*map(int, value.split(","))])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """Integers, three and more that follow each other as a range.

    Example:
        >>> _ranges([0, 1, 2, 3, 7, 8])
        '0–3, 7, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def interval_text(cells: Sequence[Sequence[TrialSpec]]) -> str:
    """What the interval of a median over the trials of each cell is; empty where no cell has two.

    Trials of one string seed are trained on the same, and are no independent replicates: claims count them as one.
    """
    cells = [trials for trials in cells if len(trials) > 1]
    if not cells:
        return ""
    fewest = min(map(len, cells))
    # Order statistics of fewer than six replicates cannot cover the median with 95 %.
    text = (
        "interval of the median, at least 95 % by order statistics"
        if fewest >= 6
        else f"range of the replicates, which for {fewest} covers the true median with probability "
        f"{1 - 2 ** (1 - fewest):.2g}"
    )
    counts = [(len({trial.string_seed for trial in trials}), len(trials)) for trials in cells]
    num_seeds, num_trials = min(counts, key=lambda each: each[0] / each[1])
    if num_seeds < num_trials:
        text += (
            f", were trials independent: here each trial is a replicate, but {num_trials} share {num_seeds} string "
            f"seed{'s' if num_seeds > 1 else ''}, and claims count those of one seed as one"
        )
    return text


def _decimal(number: float, decimals: int) -> str:
    text = f"{number:.{decimals}f}"
    # An epoch is whole; only a median lies between two of them.
    return (text.removesuffix(".0") if decimals == 1 else text).replace("-", "−")
