"""The figures of a study: every measure by epoch, a line a cell with its seeds as a band, and speed by cell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from memray.measures.statistics import median_interval
from memray.report import OF_LAST_STAGE, SPEED, interval_text, of_last_stage
from memray.report.charts import Chart, Figure, HeatMap, Scale, Style, Trace, numbered
from memray.report.figure import LEAST_ROBUST_SHOWN, MAX_LINEAR_RATIO, Line, curves, lines_of
from memray.report.probe_figures import probe_figures
from memray.report.record_figures import record_figures
from memray.report.records import RecordsOf
from memray.report.replicates import ONSET, Seen, first, last_epoch, onset, seen_cells, speed
from memray.report.sample_figures import sample_figures
from memray.report.sequence_figures import drawn_matrices, sequence_figures
from memray.sweep import Sweep

LN2 = math.log(2.0)


def study_figures(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf | None = None) -> list[Figure]:
    """The figures that a study's columns and records allow, in the order in which they are shown.

    A curriculum has no course by epoch: its rows are the ends of stages, each about other strings. It has figures of
    its own, and is among others where its last stage stands for it.
    """
    last = of_last_stage(frame)
    lines, factor = lines_of(sweep, last)
    legend_title = factor.rpartition(".")[2]
    of_samples = [line for line in lines if line.trials[0].corpus is not None]
    of_strings = [line for line in lines if line.trials[0].corpus is None]
    whole = _by_panel([line for line in of_strings if line.trials[0].curriculum is None])
    found: list[Figure] = []
    for curve in CURVES:
        found += [_curves(curve, panel, own, frame) for panel, own in whole.items()]
    ended = seen_cells(sweep, last)
    found[len(whole) : len(whole)] = [
        _speeds(panel, own, ended, legend_title or "cell") for panel, own in _by_panel(of_strings).items()
    ]
    for curve in CURVES_OF_SAMPLES:
        found += [_curves(curve, panel, own, frame) for panel, own in _by_panel(of_samples).items()]
    named = [replace(each, legend_title=legend_title) if isinstance(each, Chart) else each for each in found]
    cells = [cell for cell in seen_cells(sweep, frame) if cell.spec.curriculum is None and cell.spec.corpus is None]
    staged = sequence_figures(sweep, frame, drawn_matrices(sweep, frame, records) if records else {})
    by_token = record_figures(cells, records) if records else ()
    by_sample = sample_figures(sweep, frame, records) if of_samples else ()
    together = (*staged, *named, *by_sample, *_onsets(cells), *probe_figures(cells), *by_token)
    shown = [each for each in together if _shows(each)]
    return numbered(shown)


def _by_panel(lines: Sequence[Line]) -> dict[str, list[Line]]:
    return {panel: [line for line in lines if line.panel == panel] for panel in dict.fromkeys(x.panel for x in lines)}


def _shows(figure: Figure) -> bool:
    return isinstance(figure, HeatMap) or any(len(trace.x) for trace in figure.traces)


# --- by epoch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric by epoch, a line a cell, with what it is to be held against.

    Attributes:
        held_out: The metric of held-out strings beside it: hollow points.
        level: A metric at epoch 0 that gives each line a level to compare it with: a dotted line; times `scale`.
    """

    name: str
    title: str
    key: str
    y_title: str
    caption: str
    held_out: str = ""
    level: str = ""
    scale: float = 1.0
    zero: bool = False
    y_scale: Scale = "linear"
    y_range: tuple[float, float] | None = None


CURVES = (
    Curve(
        name="robust", title="Robust recall by epoch", key="recall/robust", y_title="robust recall (1 is full)",
        caption="What is recalled beyond the best guess, of which no guesser gets above 0 (dotted).",
        zero=True, y_range=(LEAST_ROBUST_SHOWN, 1.04),
    ),
    Curve(
        name="accuracy", title="Token accuracy by epoch", key="recall/token_accuracy", y_title="share of tokens right",
        caption="Dotted: G, what always naming the likeliest symbol gets right. Hollow points: held-out strings.",
        held_out="guessing/heldout_accuracy", level="string/guesser_accuracy", y_range=(-0.03, 1.04),
    ),
    Curve(
        name="loss", title="Loss by epoch", key="recall/nll_nats", y_title="nats a token",
        caption="Dotted: the entropy of the string's own symbol frequencies, the loss of one who knows no more. Hollow "
        "points: held-out strings.",
        held_out="guessing/heldout_nll_nats", level="string/empirical_entropy_bits", scale=LN2,
    ),
    Curve(
        name="mass", title="Guessing: probability of the alphabet by epoch", key="guessing/alphabet_mass",
        y_title="probability of all symbols together",
        caption="The alphabet is learned where it comes to 0.95.", y_range=(-0.03, 1.04),
    ),
    Curve(
        name="kl", title="Guessing: distance from own frequencies by epoch", key="guessing/kl_own_bits",
        y_title="KL divergence, bits",
        caption="Of the mean prediction over positions from the string's symbol frequencies. Hollow points: of the "
        "prediction at each position of held-out strings from their source, their mean.",
        held_out="guessing/heldout_kl_bits", y_scale="log", y_range=(1e-4, 10.0),
    ),
)  # fmt: skip


CURVES_OF_SAMPLES = (
    Curve(
        name="expected-max", title="The tail by epoch: E[max_z]", key="match/expected_max", y_title="tokens",
        caption="The longest match that is expected among a fifth of the samples. Hollow points: among held-out ones, "
        "of which there are fewer.",
        held_out="match/heldout_expected_max",
    ),
    Curve(
        name="q99", title="The tail by epoch: 99 % of samples are below", key="match/q99", y_title="tokens",
        caption="Hollow points: held-out samples.", held_out="match/heldout_q99",
    ),
    Curve(
        name="mean", title="Mean match length by epoch", key="match/mean", y_title="tokens",
        caption="Tokens of the reference that greedy decoding recites from the prompt. Hollow points: held-out "
        "samples.", held_out="match/heldout_mean",
    ),
    Curve(
        name="whole", title="Share of references that are recited whole", key="match/censored",
        y_title="share of samples", caption="Hollow points: held-out samples.", held_out="match/heldout_censored",
        y_range=(-0.03, 1.04),
    ),
    Curve(
        name="sample-loss", title="Loss on references by epoch", key="recall/nll_nats", y_title="nats a token",
        caption="Hollow points: held-out samples.", held_out="recall/heldout_nll_nats",
    ),
    Curve(
        name="top-share", title="Share of all matched tokens that the top 1 % of samples hold", key="match/top_share",
        y_title="share", caption="Of equal samples it would be 0.01.", y_range=(-0.03, 1.04),
    ),
    Curve(
        name="effective-rank", title="Collapse by epoch: effective rank", key="collapse/effective_rank",
        y_title="directions",
        caption="In how many directions the model's mean hidden states tell the native samples apart: the exponential "
        "of the entropy of their singular values.",
    ),
    Curve(
        name="participation", title="Collapse by epoch: participation ratio", key="collapse/participation_ratio",
        y_title="directions", caption="The same by the variances, of which the large ones weigh more.",
    ),
    Curve(
        name="intrinsic", title="Collapse by epoch: intrinsic dimension", key="collapse/intrinsic_dimension",
        y_title="dimensions", caption="The same near each sample, by the distances of its two nearest neighbours.",
    ),
    Curve(
        name="fact-told", title="Facts by epoch: rank of the object as it was told", key="facts/rank_told",
        y_title="mean rank", caption="Among all objects of its relation, under the template in which the fact was "
        "trained; 1 is the best. Hollow points: facts that were never trained.",
        held_out="facts/rank_told_controls",
    ),
    Curve(
        name="fact-unseen", title="Facts by epoch: rank of the object under other templates",
        key="facts/rank_unseen", y_title="mean rank", caption="Under the templates in which the fact was not trained. "
        "Hollow points: facts that were never trained.",
        held_out="facts/rank_unseen_controls",
    ),
)  # fmt: skip


def _curves(curve: Curve, panel: str, lines: Sequence[Line], frame: pd.DataFrame) -> Chart:
    traces: list[Trace] = []
    medians = [(line, curves(frame, line.trials, curve.key)) for line in lines]
    medians = [(line, values) for line, values in medians if len(values)]
    ends = [int(values.index[-1]) for _, values in medians]
    is_wide = bool(ends) and max(ends) > MAX_LINEAR_RATIO * max(1, min(ends))
    for line, values in medians:
        traces.append(_median_trace(line, values))
        if curve.level and len(level := curves(frame, line.trials, curve.level)):
            traces.append(_level_trace(line, values, float(np.median(level.to_numpy()[0])) * curve.scale))
        if curve.held_out and len(held_out := curves(frame, line.trials, curve.held_out)):
            traces.append(_held_out_trace(line, held_out))
    if curve.zero and ends:
        traces.append(Trace(name="guessing", x=[1 if is_wide else 0, max(ends)], y=[0.0, 0.0], style=Style(dash="dot")))
    interval = interval_text([line.trials for line in lines])
    return Chart(
        name=curve.name,
        title=curve.title + (f", {panel}" if panel else ""),
        x_title="epoch",
        y_title=curve.y_title,
        caption=curve.caption + (f" Lines: medians over replicates; bands: {interval}." if interval else ""),
        traces=tuple(traces),
        x_scale="log" if is_wide else "linear",
        y_scale=curve.y_scale,
        y_range=curve.y_range,
    )


def _median_trace(line: Line, values: pd.DataFrame) -> Trace:
    rows = np.sort(values.to_numpy(dtype=np.float64), axis=1)
    # The same order statistics at every epoch: the interval of the ranks says which.
    low, high = map(int, median_interval(np.arange(rows.shape[1], dtype=np.float64))) if rows.shape[1] > 1 else (0, 0)
    has_band = rows.shape[1] > 1
    return Trace(
        name=line.label,
        x=[int(epoch) for epoch in values.index],
        y=[float(each) for each in np.median(rows, axis=1)],
        low=rows[:, low].tolist() if has_band else (),
        high=rows[:, high].tolist() if has_band else (),
        style=Style.of(line),
    )


def _level_trace(line: Line, values: pd.DataFrame, height: float) -> Trace:
    ends = [int(values.index[0]), int(values.index[-1])]
    return Trace(name="", x=ends, y=[height, height], style=Style(colour=Style.of(line).colour, dash="dot"))


def _held_out_trace(line: Line, values: pd.DataFrame) -> Trace:
    return Trace(
        name="",
        x=[int(epoch) for epoch in values.index],
        y=[float(each) for each in np.median(values.to_numpy(dtype=np.float64), axis=1)],
        style=Style.of(line).points(is_open=True),
    )


# --- by cell -------------------------------------------------------------------------------------------------------


def _speeds(panel: str, lines: Sequence[Line], cells: Sequence[Seen], x_title: str) -> Chart:
    """T by cell: a point a replicate, a stroke for the median, an arrow above the axis for what never came.

    Of a curriculum, that of its last stage.
    """
    by_trial = {trial.trial_id(): cell for cell in cells for trial, _ in cell.rows}
    seen = [(line, by_trial[line.trials[0].trial_id()]) for line in lines]
    reached = [value for _, cell in seen for value in cell.values(speed) if math.isfinite(value)]
    top = max([*reached, *(last_epoch(rows) for _, cell in seen for _, rows in cell.rows)])
    has_stages = any(cell.spec.curriculum is not None for _, cell in seen)
    title = "Epochs to half of robust recall" + (" in the last stage" if has_stages else "")
    return Chart(
        name="speed",
        title=title + (f", {panel}" if panel else ""),
        x_title=x_title,
        y_title=SPEED,
        caption="A point a replicate; strokes: medians; arrows above: replicates that never came to it."
        + (f" {OF_LAST_STAGE.capitalize()}." if has_stages else ""),
        traces=tuple(trace for line, cell in seen for trace in _speed_traces(line, cell, above=1.08 * top)),
        x_scale="category",
        y_range=(0.0, 1.14 * top),
    )


def _speed_traces(line: Line, cell: Seen, *, above: float) -> Iterator[Trace]:
    style, values, median = Style.of(line), cell.by_string(speed), cell.median(speed)
    arrived = {seed: value for seed, value in values.items() if math.isfinite(value)}
    late = [seed for seed, value in values.items() if math.isinf(value)]
    yield Trace(
        name="", x=[line.label] * len(arrived), y=[*arrived.values()], style=style.points(size=8),
        hover=[f"string {seed}: epoch {value:g}" for seed, value in arrived.items()],
    )  # fmt: skip
    yield Trace(
        name="", x=[line.label] * len(late), y=[above] * len(late), style=style.points(size=12, marker="triangle-up"),
        hover=[f"string {seed}: not within the epochs trained" for seed in late],
    )  # fmt: skip
    if math.isfinite(median):
        stroke = style.points(size=34, marker="line-ew")
        yield Trace(name="", x=[line.label], y=[median], style=stroke, hover=[f"median: epoch {median:g}"])


def _onsets(cells: Sequence[Seen]) -> Iterator[Chart]:
    """Onset against what the model infers in context before training, where the study moves its pre-training."""
    moved = {name for cell in cells for name in cell.factors if name.startswith("model.")}
    kl = first("guessing/heldout_kl_bits")
    if not any(name.startswith(("model.in_context.", "model.revision", "model.pretrained")) for name in moved):
        return
    traces = []
    for index, cell in enumerate(cells):
        x, y = cell.by_string(kl), cell.by_string(onset)
        seeds = [seed for seed in x if math.isfinite(y.get(seed, math.inf))]
        traces.append(
            Trace(
                name=cell.where(), x=[x[seed] for seed in seeds], y=[y[seed] for seed in seeds],
                style=Style.numbered(index).points(size=8), hover=[f"string {seed}" for seed in seeds],
            )
        )  # fmt: skip
    yield Chart(
        name="onset",
        title="Length of the guessing phase against inference in context",
        x_title="held-out KL divergence before training, bits",
        y_title=ONSET,
        caption="A point a replicate; those that never came to memorise are left out.",
        traces=tuple(traces),
    )
