"""The figures of strings that were trained one after another: how fast each was learned, and what became of it.

By stage they are read off the results, which have a row at the end of each. What became of each string stands in the
recall matrix of a trial, a row for each string and each time that it was looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from memray.measures.phases import DURATIONS
from memray.measures.retention import RetentionCounts, RetentionFit, bootstrap_retention, fit_retention
from memray.measures.statistics import median_interval
from memray.report import SPEED, column, interval_text, stage_ends
from memray.report.charts import Chart, Figure, HeatMap, Style, Trace, numbered
from memray.report.drawing import write_png
from memray.report.figure import Line, lines_of
from memray.report.probe_figures import MAX_CELLS_APART
from memray.report.records import RecordsOf
from memray.report.replicates import ONSET, late_median
from memray.sequence_measurement import Forgetting
from memray.spec import TrialSpec
from memray.sweep import Sweep

ROBUST, ACCURACY = "recall/robust", "recall/token_accuracy"
# Of a recall matrix, what is drawn: that of a thousand strings has half a million rows.
DRAWN = (
    "stage", "step", "string", "is_held_out", "source", "learned_step", "is_own", "is_end", ROBUST, ACCURACY,
)  # fmt: skip
# Rows and columns of a heat map: more show nothing more.
MAX_PLACES = 150
# With more, neighbours are put together: of a thousand single stages a line would show the noise.
MAX_AGES = MAX_STAGES = 30
AGE = "optimiser steps since the end of the string's own stage"
# Of replicates, to say how sure a curve is: enough for the few that there are.
RESAMPLES = 199

# Recall matrices by trial id.
Matrices = Mapping[str, pd.DataFrame]


def drawn_matrices(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf) -> dict[str, pd.DataFrame]:
    """What is drawn of the recall matrices of the trials that have results and a curriculum, by trial id."""
    with_results, found = set(frame["trial_id"]), {}
    for trial_id in (trial.trial_id() for trial in sweep.trials if trial.curriculum is not None):
        if trial_id in with_results and (table := records(trial_id).matrix()).num_columns:
            found[trial_id] = table.select(list(DRAWN)).to_pandas()
    return found


def sequence_figures(sweep: Sweep, frame: pd.DataFrame, matrices: Matrices | None = None) -> list[Figure]:
    """The figures of the cells that have a curriculum, in the order in which they are shown; none without one."""
    lines, factor = lines_of(sweep, frame)
    lines = [line for line in lines if line.trials[0].curriculum is not None]
    panels = {panel: [line for line in lines if line.panel == panel] for panel in dict.fromkeys(x.panel for x in lines)}
    ends = {str(trial_id): rows for trial_id, rows in stage_ends(frame).groupby("trial_id")}
    matrices, legend_title = matrices or {}, factor.rpartition(".")[2]
    found: list[Figure] = []
    # Weights that begin anew with each stage have nothing to forget.
    carrying = [line for line in lines if line.trials[0].curriculum and line.trials[0].curriculum.weights == "carried"]
    for course in COURSES:
        for panel, own in panels.items():
            drawn = [line for line in own if not course.of_carried or line in carrying]
            found += [_by_stage(course, panel, drawn, ends, legend_title)] if drawn else []
    for panel in panels:
        own = [line for line in carrying if line.panel == panel]
        found.append(_retention(own, matrices, where=panel, legend_title=legend_title))
    for line in carrying[:MAX_CELLS_APART]:
        if any(trial.trial_id() in matrices for trial in line.trials):
            found.append(_fading(line, matrices, where=_name(line, lines)))
    for line in carrying[:MAX_CELLS_APART]:
        found += _recall_map(line, _name(line, lines), matrices)
    return [each for each in found if isinstance(each, HeatMap) or any(len(trace.x) for trace in each.traces)]


def write_sequence_figures(sweep: Sweep, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes those that need the results alone into a folder, and returns their paths."""
    return [write_png(each, folder) for each in numbered(sequence_figures(sweep, frame))]


def _name(line: Line, lines: Sequence[Line]) -> str:
    return ", ".join(filter(None, (line.panel, line.label))) if len(lines) > 1 else ""


def _titled(title: str, where: str) -> str:
    return f"{title}, {where}" if where else title


# --- by stage ------------------------------------------------------------------------------------------------------

# Of the ends of a trial's stages: one number each, infinite where it was never reached, nan where it is undefined.
OfStages = Callable[[pd.DataFrame], Float[ndarray, " stages"]]


def _measured(key: str) -> OfStages:
    def values(ends: pd.DataFrame) -> Float[ndarray, " stages"]:
        found = column(ends, key)
        is_late = np.isnan(found) & ~np.isnan(column(ends, ROBUST))
        return np.where(is_late, np.inf, found) if key in DURATIONS else found

    return values


def _memorising(ends: pd.DataFrame) -> Float[ndarray, " stages"]:
    """Epochs from the onset of memorisation to nine tenths of robust recall."""
    reached, began = _measured("phase/epochs_to_robust_90")(ends), column(ends, ONSET)
    return np.where(np.isinf(reached), np.inf, reached - began)


@dataclass(frozen=True, kw_only=True)
class Course:
    """A number of each stage, a line a cell.

    Attributes:
        beside: A metric beside it: hollow points.
        of_carried: Whether it says nothing of weights that begin anew with each stage.
    """

    name: str
    title: str
    of: OfStages
    y_title: str
    caption: str
    beside: str = ""
    of_carried: bool = False


EPOCHS = "epochs, from the stage's beginning"
ARROWS = "Arrows above: stages in which the median replicate never came to it."

COURSES = (
    Course(
        name="acceleration", title="Epochs to half of robust recall by stage", of=_measured(SPEED), y_title=EPOCHS,
        caption=f"Of each stage's own strings. {ARROWS}",
    ),
    Course(
        name="acceleration90", title="Epochs to nine tenths of robust recall by stage",
        of=_measured("phase/epochs_to_robust_90"), y_title=EPOCHS, caption=f"Of each stage's own strings. {ARROWS}",
    ),
    Course(
        name="guessing", title="Guessing phase by stage", of=_measured(ONSET), y_title=EPOCHS,
        caption=f"Epochs before memorisation sets in. {ARROWS}",
    ),
    Course(
        name="memorising", title="Memorisation phase by stage", of=_memorising, y_title="epochs",
        caption=f"Epochs from the onset of memorisation to nine tenths of robust recall. {ARROWS}",
    ),
    Course(
        name="seen", title="Recall of all strings trained so far, by stage", of=_measured("sequence/recall_seen"),
        beside=ROBUST, y_title="robust recall (1 is full)",
        caption="Mean over the strings, at the end of each stage. Hollow points: the stage's own strings alone.",
    ),
    Course(
        name="forgetting", title="Forgetting by stage", of=_measured("sequence/forgetting"),
        y_title="robust recall lost",
        caption="Robust recall of each earlier string at the end of its own stage less that at the end of this one, "
        "mean over them. Backward transfer is its negative.",
        of_carried=True,
    ),
    Course(
        name="forward", title="Forward transfer by stage", of=_measured("sequence/forward_transfer"),
        y_title="robust recall", caption="Of each stage's own strings just before they are trained.",
    ),
)  # fmt: skip


def _by_stage(
    course: Course, panel: str, lines: Sequence[Line], ends: Mapping[str, pd.DataFrame], legend_title: str
) -> Chart:
    seen = [(line, [ends[trial.trial_id()] for trial in line.trials]) for line in lines]
    num_stages = 1 + max(int(column(rows, "stage").max()) for _, each in seen for rows in each)
    longest = max(float(column(rows, "epoch").max()) for _, each in seen for rows in each)
    bins = _stage_bins(num_stages)
    traces = [trace for line, each in seen for trace in _stage_traces(course, line, each, bins, longest)]
    interval, is_long = interval_text([line.trials for line in lines]), len(bins) < num_stages
    return Chart(
        name=course.name,
        title=_titled(course.title, panel),
        x_title="stage, counted from 1",
        y_title=course.y_title,
        caption=course.caption
        + (f" Lines: medians over replicates; bands: {interval}." if interval else "")
        + (" Each replicate is the median of its neighbouring stages, where points are far apart." if is_long else ""),
        traces=tuple(traces),
        legend_title=legend_title,
        x_scale="log" if is_long else "linear",
    )


def _stage_bins(num_stages: int) -> list[range]:
    """Stages one by one, or where there are many in bins that widen with their number."""
    if num_stages <= MAX_STAGES:
        return [range(stage, stage + 1) for stage in range(num_stages)]
    edges = np.unique(np.geomspace(1, num_stages + 1, MAX_STAGES).round().astype(int)) - 1
    return [range(*ends) for ends in pairwise(edges.tolist())]


def _stage_traces(
    course: Course,
    line: Line,
    ends: Sequence[pd.DataFrame],
    bins: Sequence[range],
    longest: float,
) -> Iterator[Trace]:
    style, by_place = Style.of(line), _of_bins(course.of, ends, bins)
    medians = {place: late_median(values.tolist()) for place, values in by_place.items()}
    intervals = [median_interval(np.where(np.isinf(each), np.nan, each)) for each in by_place.values()]
    has_band = len(ends) > 1
    yield Trace(
        name=line.label,
        x=[*by_place],
        y=[median if math.isfinite(median) else math.nan for median in medians.values()],
        # What was never reached lies beyond all epochs of a stage.
        low=[min(each.low, longest) for each in intervals] if has_band else (),
        high=[min(each.high, longest) for each in intervals] if has_band else (),
        style=style,
    )
    late = [place for place, median in medians.items() if math.isinf(median)]
    above = (1.05 + 0.03 * line.rank) * longest  # or the arrows of one line would hide those of another
    yield Trace(name="", x=late, y=[above] * len(late), style=style.points(size=10, marker="triangle-up"))
    if course.beside:
        beside = _of_bins(_measured(course.beside), ends, bins)
        own = [late_median(values.tolist()) for values in beside.values()]
        yield Trace(name="", x=[*beside], y=own, style=style.points(is_open=True))


def _of_bins(of: OfStages, ends: Sequence[pd.DataFrame], bins: Sequence[range]) -> dict[float, Float[ndarray, " _"]]:
    """By place on the axis, on which the first stage is 1: the values of the replicates that have one there."""
    by_stage = [dict(zip(rows["stage"], of(rows).tolist(), strict=True)) for rows in ends]
    found = {}
    for stages in bins:
        values = [[each.get(stage, math.nan) for stage in stages] for each in by_stage]
        defined = [[value for value in each if not math.isnan(value)] for each in values]
        if present := [late_median(each) for each in defined if each]:
            place = math.exp(sum(math.log(stage + 1) for stage in stages) / len(stages))
            found[place if len(stages) > 1 else stages[0] + 1.0] = np.array(present)
    return found


# --- by age --------------------------------------------------------------------------------------------------------


def _retention(lines: Sequence[Line], matrices: Matrices, *, where: str, legend_title: str) -> Chart:
    """Recall of earlier strings against how long ago they were trained."""
    return Chart(
        name="retention",
        title=_titled("Retention by age", where),
        x_title=AGE,
        y_title="robust recall (1 is full)",
        caption=_of_ages(lines),
        traces=tuple(
            trace for line in lines for trace in _aged_traces(line, ROBUST, matrices, line.label, Style.of(line))
        ),
        legend_title=legend_title,
        x_scale="log",
    )


def _fading(line: Line, matrices: Matrices, *, where: str) -> Chart:
    """Token accuracy of earlier strings, and the curves by which it fades."""
    traces = [*_aged_traces(line, ACCURACY, matrices, "measured", Style.numbered(0))]
    counts = [counts for trial in line.trials if (counts := _forgotten(trial, matrices)) is not None]
    pooled = RetentionCounts.pooled(counts) if counts else None
    fit = fit_retention(pooled) if pooled else None
    if pooled and fit:
        ages = np.geomspace(pooled.age[pooled.age > 0][0], pooled.age[-1], 60)
        for index, (name, each) in enumerate(fit.curves.items()):
            style = Style.numbered(index + 1)
            traces.append(Trace(name=name, x=ages.tolist(), y=each.curve.accuracy(ages).tolist(), style=style))
    return Chart(
        name="fits",
        title=_titled("Curves of forgetting", where),
        x_title=AGE,
        y_title="share of tokens right",
        caption=f"{_of_ages([line])} {_best(fit, counts)}",
        traces=tuple(traces),
        x_scale="log",
        y_range=(-0.03, 1.04),
    )


def _of_ages(lines: Sequence[Line]) -> str:
    interval = interval_text([line.trials for line in lines])
    over = f"; medians over replicates, bars: {interval}" if interval else ""
    return (
        f"Points: means over all strings of the trial's own source of that age, whenever they were looked at{over}. "
        "Dotted: held-out strings."
    )


def _forgotten(trial: TrialSpec, matrices: Matrices) -> RetentionCounts | None:
    matrix = matrices.get(trial.trial_id())
    if matrix is None:
        return None
    forgetting = Forgetting(trial.num_targets)
    forgetting.add({name: matrix[name].to_numpy() for name in matrix})
    return forgetting.counts()


def _best(fit: RetentionFit | None, counts: Sequence[RetentionCounts]) -> str:
    """What is known of the curve that describes the data best, and how surely."""
    if fit is None:
        return (
            "No curve is identifiable: strings were looked at at fewer than four ages, or nothing was left at the first"
        )
    half_life = fit.half_life_steps
    found = (
        f"Lines: fitted to all replicates together. The best by AIC is {fit.best.curve.name}, and half is forgotten "
    )
    found += f"beyond {fit.last_age} steps" if math.isnan(half_life) else f"after {half_life:.3g} steps"
    if len(counts) > 1:
        (low, high), shares = bootstrap_retention(counts, rng=np.random.default_rng(0), resamples=RESAMPLES)
        bounds = dict.fromkeys("beyond" if math.isinf(end) else f"{end:.3g}" for end in (max(0.0, low), high))
        found += f" (95 %: {' to '.join(bounds)})"
        found += f"; it is the best of {100 * shares[fit.best.curve.name]:.0f} % of resamples of the replicates"
    return found + f". Lack of fit {fit.best.lack_of_fit:.2g} (about 1 where the curve is true and tokens independent)."


def _aged_traces(line: Line, key: str, matrices: Matrices, name: str, style: Style) -> Iterator[Trace]:
    """Points by age, a bin of ages each where there are many, and the level of held-out strings."""
    seen = [matrices[trial.trial_id()] for trial in line.trials if trial.trial_id() in matrices]
    aged = [_aged(matrix, key) for matrix in seen]
    ages = np.unique(np.concatenate([age for age, _ in aged])) if aged else np.empty(0)
    if not len(ages):
        return
    edges = ages if len(ages) <= MAX_AGES else np.geomspace(ages[0], ages[-1], MAX_AGES)
    bins = [np.searchsorted(edges, age, side="right") for age, _ in aged]
    places, medians, intervals = [], [], []
    for number in np.unique(np.concatenate(bins)):
        own = [(age[each == number], recall[each == number]) for (age, recall), each in zip(aged, bins, strict=True)]
        means = np.array([recall.mean() for _, recall in own if len(recall)])
        places.append(float(np.exp(np.log(np.concatenate([age for age, _ in own])).mean())))
        medians.append(float(np.median(means)))
        intervals.append(median_interval(means))
    has_bars = len(seen) > 1
    yield Trace(
        name=name, x=places, y=medians, low=[each.low for each in intervals] if has_bars else (),
        high=[each.high for each in intervals] if has_bars else (), style=style.points(),
    )  # fmt: skip
    levels = [level for matrix in seen if not math.isnan(level := _held_out(matrix, key))]
    if levels:
        ends, level = [places[0], places[-1]], float(np.median(levels))
        yield Trace(name="", x=ends, y=[level, level], style=Style(colour=style.colour, dash="dot"))


def _aged(matrix: pd.DataFrame, key: str) -> tuple[Float[ndarray, " rows"], Float[ndarray, " rows"]]:
    """Ages in optimiser steps, above 0, and recall: of strings of the trial's source that an earlier stage trained."""
    is_ours = ~matrix["is_own"] & ~matrix["is_held_out"] & (matrix["source"] == 0)
    is_earlier = is_ours & (matrix["learned_step"] >= 0) & matrix[key].notna()
    rows = matrix.loc[is_earlier & (matrix["step"] > matrix["learned_step"])]
    return column(rows, "step") - column(rows, "learned_step"), column(rows, key)


def _held_out(matrix: pd.DataFrame, key: str) -> float:
    """The level of held-out strings of the trial's own source, over the ends of stages; nan where there are none."""
    is_held_out = matrix["is_held_out"] & matrix["is_end"] & (matrix["source"] == 0) & (matrix["stage"] >= 0)
    values = column(matrix.loc[is_held_out], key)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


# --- string by string ----------------------------------------------------------------------------------------------


def _recall_map(line: Line, where: str, matrices: Matrices) -> Iterator[HeatMap]:
    """Robust recall of every string at every end of a stage: of one trial, or the median of those that are alike."""
    seen = [(trial, matrices[trial.trial_id()]) for trial in line.trials if trial.trial_id() in matrices]
    if not seen:
        return
    key = ROBUST if any(matrix[ROBUST].notna().any() for _, matrix in seen) else ACCURACY
    tables = [_at_ends(matrix, key) for _, matrix in seen]
    first = tables[0]
    alike = all(each.index.equals(first.index) and each.columns.equals(first.columns) for each in tables)
    several = alike and len(tables) > 1
    recall = np.median([each.to_numpy() for each in tables], axis=0) if several else first.to_numpy()
    rows, columns = (
        np.unique(np.linspace(0, number - 1, min(number, MAX_PLACES)).round().astype(int)) for number in first.shape
    )
    whose = f"Medians over {len(tables)} replicates" if several else f"Trial {seen[0][0].trial_id()}"
    revisits = sum(stage.is_revisit for stage in line.trials[0].stages())
    yield HeatMap(
        name="strings",
        title=_titled("Recall of each string at the end of each stage", where),
        x_title="string",
        y_title="stage",
        caption=f"{whose}, at least 0. White: not looked at."
        + (f" The last {revisits} stages train earlier strings again." if revisits else "")
        + (
            f" Of {len(first.index)} rows and {len(first.columns)} strings, {len(rows)} and {len(columns)} are shown."
            if len(rows) < len(first.index) or len(columns) < len(first.columns)
            else ""
        ),
        x=[str(first.columns[place]) for place in columns],
        y=["before" if first.index[place] < 0 else str(first.index[place]) for place in rows],
        values=np.clip(recall[np.ix_(rows, columns)], 0.0, 1.0),
        value_title="robust recall" if key == ROBUST else "share of tokens right",
    )


def _at_ends(matrix: pd.DataFrame, key: str) -> pd.DataFrame:
    """A metric by stage and string, at the ends of stages; nan where a string was not looked at."""
    rows = matrix.loc[matrix["is_end"] & ~matrix["is_held_out"], ["stage", "string", key]]
    return rows.drop_duplicates(["stage", "string"], keep="last").pivot(index="stage", columns="string", values=key)
