"""The figure of a sweep: token accuracy and robust recall by epoch, a line a cell, with what guessing gives.

matplotlib's objects only, and no pyplot: figures are drawn in a thread of a running sweep, where global state would
belong to everybody.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from memray.measures.statistics import median_interval
from memray.report import SEEDS, factors, interval_text, is_number, spec_values, value_text
from memray.spec import TrialSpec
from memray.sweep import Sweep

DPI = 150
WIDTH_INCHES = 11.0
# What fits on a line of that width.
TITLE_CHARACTERS = 118
CAPTION_CHARACTERS = 185
MAX_LINES_A_PANEL = 8
# Cells whose budgets differ by more than this are seen only on a logarithmic axis.
MAX_LINEAR_RATIO = 4
# Until the alphabet is learned, recall is far below guessing; drawn in full, that would flatten everything else.
LEAST_ROBUST_SHOWN = -0.25

# Okabe and Ito's colours for levels without an order, but for yellow, which is too pale on white.
UNORDERED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (2.5, 1.2)), (0, (7, 1.5, 2, 1.5)))
GREY = "0.35"


@dataclass(frozen=True)
class Line:
    """One cell, and how it is drawn. Its rank is the place of its label in the legend."""

    trials: tuple[TrialSpec, ...]
    panel: str
    rank: int
    label: str
    colour: Any
    dash: Any

    @property
    def name(self) -> str:
        """What tells it from the lines of all panels."""
        return ", ".join(filter(None, (self.panel, self.label))) or "all"


def write_sweep_figure(sweep: Sweep, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figure of a sweep as `recall.png` into a folder, which is made, and returns its path in a list.

    A curriculum has no course by epoch and no line in it, nor has a corpus, whose measures are others; the list is
    empty where no other cell has results.

    Each line is the median over the replicates of a cell, and as long as its shortest replicate; the band is the
    interval of the median. Baselines: G, what naming the likeliest symbol gets right, and the accuracy on held-out
    strings in the left panels; 0, which no guesser exceeds, in the right ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with_results = set(frame["trial_id"])
    drawn = [trial for trial in sweep.trials if trial.curriculum is None and trial.corpus is None]
    if not any(trial.trial_id() in with_results for trial in drawn):
        return []
    path = folder / "recall.png"
    sweep_figure(sweep, frame).savefig(path, dpi=DPI, facecolor="white")
    return [path]


def sweep_figure(sweep: Sweep, frame: pd.DataFrame) -> Figure:
    """The figure: token accuracy on the left, robust recall on the right, a row for each level of the field that
    splits a large sweep into readable panels."""
    lines, title = lines_of(sweep, frame)
    lines = [line for line in lines if line.trials[0].curriculum is None and line.trials[0].corpus is None]
    panels = list(dict.fromkeys(line.panel for line in lines)) or [""]
    is_single = len(panels) == 1
    figure = Figure(figsize=(WIDTH_INCHES, 1.9 + (3.1 if is_single else 2.05 * len(panels))))
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    axes = figure.subplots(len(panels), 2, sharex=True, sharey="col", squeeze=False)
    for (accuracy, robust), panel in zip(axes, panels, strict=True):
        own = [line for line in lines if line.panel == panel]
        draw_accuracy(accuracy, own, frame)
        draw_robust(robust, own, frame)
        if panel:
            accuracy.set_title(panel, loc="left", fontsize=9, fontweight="bold")
    _set_scales(axes, lines, frame)
    _add_legend(figure, lines, title)
    question = " ".join(sweep.question.split()) or sweep.name
    figure.suptitle(textwrap.fill(question, TITLE_CHARACTERS), x=0.008, ha="left", fontsize=12)
    caption = textwrap.fill(_caption(sweep, lines, frame), CAPTION_CHARACTERS, break_on_hyphens=False)
    figure.supxlabel(caption, x=0.008, ha="left", fontsize=8, color=GREY)
    return figure


# --- panels ------------------------------------------------------------------------------------------------------


def draw_accuracy(axes: Axes, lines: Sequence[Line], frame: pd.DataFrame) -> None:
    """Token accuracy, with G as a dotted line and the accuracy on held-out strings as circles."""
    for line in lines:
        _draw_curve(axes, line, frame, "recall/token_accuracy")
        guessing = curves(frame, line.trials, "string/guesser_accuracy")
        if len(guessing):
            axes.axhline(np.median(guessing.to_numpy()[0]), color=line.colour, ls=":", lw=1.0, alpha=0.9, zorder=1)
        held_out = curves(frame, line.trials, "guessing/heldout_accuracy")
        if len(held_out):
            medians = np.median(held_out.to_numpy(), axis=1)
            axes.plot(held_out.index, medians, "o", ms=3.2, mfc="white", mec=line.colour, mew=0.9, ls="none", zorder=4,
                      clip_on=False)  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("token accuracy\n(share of tokens)")


def draw_robust(axes: Axes, lines: Sequence[Line], frame: pd.DataFrame) -> None:
    """Robust recall, with a line at 0."""
    axes.axhline(0.0, color=GREY, ls=":", lw=1.2, zorder=1)
    for line in lines:
        _draw_curve(axes, line, frame, "recall/robust")
    if not axes.lines[1:]:
        axes.text(0.5, 0.5, "undefined here", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_ylim(LEAST_ROBUST_SHOWN, 1.03)
    axes.set_ylabel("robust recall\n(0: guessing, 1: full)")


def _draw_curve(axes: Axes, line: Line, frame: pd.DataFrame, key: str) -> None:
    values = curves(frame, line.trials, key)
    if values.empty:
        return
    epochs, rows = values.index.to_numpy(), values.to_numpy()
    axes.plot(epochs, np.median(rows, axis=1), color=line.colour, ls=line.dash, lw=1.7, zorder=3)
    num_replicates = rows.shape[1]
    if num_replicates > 1:
        # The same order statistics at every epoch: the interval of the ranks says which.
        low, high = map(int, median_interval(np.arange(num_replicates, dtype=np.float64)))
        ordered = np.sort(rows, axis=1)
        axes.fill_between(epochs, ordered[:, low], ordered[:, high], color=line.colour, alpha=0.18, lw=0, zorder=2)


def curves(frame: pd.DataFrame, trials: Sequence[TrialSpec], key: str) -> pd.DataFrame:
    """A metric by epoch (the index, ascending) and trial, at the epochs at which every replicate has it.

    A median over the replicates that went on would jump where one stops. A replicate that never has the metric (the
    robust measure of a string of one symbol) is left out.
    """
    if key not in frame:
        return pd.DataFrame()
    is_own = frame["trial_id"].isin([trial.trial_id() for trial in trials])
    rows = frame.loc[is_own, ["epoch", "trial_id", key]]
    values = rows.pivot(index="epoch", columns="trial_id", values=key).sort_index().dropna(axis=1, how="all")
    return values.dropna() if values.shape[1] else pd.DataFrame()


def quieten(axes: Axes) -> None:
    """No frame, and a grid that stays behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)


def _set_scales(axes: Any, lines: Sequence[Line], frame: pd.DataFrame) -> None:
    ends = [epochs.index[-1] for line in lines if len(epochs := curves(frame, line.trials, "recall/token_accuracy"))]
    for each in axes.flat:
        quieten(each)
        each.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0) if each in axes[:, 0] else ScalarFormatter())
        if ends and max(ends) > MAX_LINEAR_RATIO * min(ends):
            each.set_xscale("symlog", linthresh=1.0, linscale=0.4)  # epoch 0 has a place on it
            each.xaxis.set_major_formatter(ScalarFormatter())
        each.set_xlim(0, max(ends, default=1) or 1)
    for each in axes[-1]:
        each.set_xlabel("epoch")


# --- lines -------------------------------------------------------------------------------------------------------


def lines_of(sweep: Sweep, frame: pd.DataFrame) -> tuple[list[Line], str]:
    """The cells that have results, panel after panel in the order of their levels, and what heads the legend."""
    have_results = set(frame["trial_id"])
    cells = [tuple(each for each in trials if each.trial_id() in have_results) for trials in sweep.cells().values()]
    cells = [trials for trials in cells if trials]
    names = list(factors(sweep))
    split = panel_factor([trials[0] for trials in cells], names)
    rest = [name for name in names if name != split]
    cells.sort(key=lambda trials: _order(trials[0], rest, sweep))
    firsts = [trials[0] for trials in cells]
    is_ordered = all(is_number(first.params()[name]) for first in firsts for name in rest)
    colours = _colours(list(dict.fromkeys(_label(first, rest) for first in firsts)), is_ordered=is_ordered)
    dashes = _dashes(firsts, rest)
    if split:
        cells.sort(key=lambda trials: _order(trials[0], [split], sweep))
    lines = []
    for trials in cells:
        label = _label(trials[0], rest)
        panel = f"{split} = {value_text(spec_values(trials[0])[split])}" if split else ""
        lines.append(Line(trials, panel, list(colours).index(label), label, colours[label], dashes[label]))
    return lines, rest[0] if len(rest) == 1 else ""


def panel_factor(cells: Sequence[TrialSpec], names: Sequence[str]) -> str | None:
    """The field whose levels get a row of panels each: none in a small sweep, or in one with a single field.

    Else the one with the fewest levels among those that leave few enough lines in every panel; of equals, the later.
    """
    if len(cells) <= MAX_LINES_A_PANEL or len(names) < 2:
        return None
    costs = {}
    for index, name in enumerate(names):
        levels = [spec_values(cell)[name] for cell in cells]
        most = max(levels.count(level) for level in set(levels))
        costs[most > MAX_LINES_A_PANEL, len(set(levels)), most, -index] = name
    return costs[min(costs)]


def _order(trial: TrialSpec, names: Sequence[str], sweep: Sweep) -> tuple[tuple[float, str], ...]:
    """Sorts by the fields in turn: numbers by size, anything else in the order of the sweep."""
    keys = []
    for name in names:
        value = trial.params()[name]
        if is_number(value):
            keys.append((float(value), ""))
        else:
            seen = [each.params()[name] for each in sweep.trials]
            keys.append((float(seen.index(value)), f"{value}"))
    return tuple(keys)


def _label(trial: TrialSpec, names: Sequence[str]) -> str:
    values = spec_values(trial)
    if len(names) < 2:
        return ", ".join(value_text(values[name]) for name in names) or "all"
    # A value of None is a word of its own: "uniform".
    return ", ".join(
        value_text(values[name]) if values[name] is None else f"{name.rpartition('.')[2]} {value_text(values[name])}"
        for name in names
    )


def _colours(labels: Sequence[str], *, is_ordered: bool) -> dict[str, Any]:
    """Colours that colour-blind readers tell apart: from dark to light along an order, else Okabe and Ito's."""
    if len(labels) == 1 or (not is_ordered and len(labels) <= len(UNORDERED)):
        return dict(zip(labels, UNORDERED, strict=False))
    # The pale end of viridis does not show on white.
    return dict(zip(labels, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.84, len(labels))), strict=True))


def _dashes(cells: Sequence[TrialSpec], names: Sequence[str]) -> dict[str, Any]:
    """A dash a label: they tell the levels of a second field apart once more, where there are few enough of them."""
    level_of = {_label(cell, names): spec_values(cell)[names[1]] if len(names) > 1 else None for cell in cells}
    # What is not restricted comes first, and is solid.
    levels = sorted(set(level_of.values()), key=lambda level: (level is not None, list(level_of.values()).index(level)))
    if len(levels) > len(DASHES):
        return dict.fromkeys(level_of, DASHES[0])
    return {label: DASHES[levels.index(level)] for label, level in level_of.items()}


# --- words -------------------------------------------------------------------------------------------------------


def _add_legend(figure: Figure, lines: Sequence[Line], title: str) -> None:
    handles: list[Any] = []
    if len(lines) > 1:
        for line in {line.label: line for line in sorted(lines, key=lambda line: line.rank)}.values():
            handles.append(Line2D([], [], color=line.colour, ls=line.dash, lw=1.9, label=line.label))
        handles.append(Line2D([], [], ls="none", label=" "))
    interval = interval_text([line.trials for line in lines])
    handles.append(Line2D([], [], color=GREY, lw=1.7, label="median over replicates" if interval else "one replicate"))
    if interval:
        handles.append(Patch(color=GREY, alpha=0.25, lw=0, label=interval.partition(",")[0]))
    handles += [
        Line2D([], [], color=GREY, ls="none", marker="o", ms=3.6, mfc="white", label="held-out strings"),
        Line2D([], [], color=GREY, ls=":", lw=1.2, label="guessing (G; 0)"),
    ]
    legend = figure.legend(
        handles=handles,
        loc="outside right center",  # not upper: there it would stand in the title
        title=title or None,
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        handlelength=2.6,
        alignment="left",
    )
    legend.get_title().set_fontweight("bold")


def _caption(sweep: Sweep, lines: Sequence[Line], frame: pd.DataFrame) -> str:
    sentences = []
    if interval := interval_text([line.trials for line in lines]):
        sentences.append(f"Bands: {interval}.")
    sentences.append(
        "G: share of tokens that naming the likeliest symbol gets right. Held-out strings: fresh ones of the same "
        "source. Guessing alone gives no robust recall above 0."
    )
    robust = [curves(frame, line.trials, "recall/robust") for line in lines]
    if any((values.to_numpy() < LEAST_ROBUST_SHOWN).any() for values in robust):
        sentences.append(f"Robust recall below {LEAST_ROBUST_SHOWN:g} is off the panel.".replace("-", "−"))
    held = [f"{name} {value_text(value)}" for name, value in _held(sweep)]
    sentences.append(f"All: {', '.join(held)}.")
    planned = sum(trial.curriculum is None for trial in sweep.trials)
    missing = planned - sum(len(line.trials) for line in lines)
    if missing:
        sentences.append(f"{missing} of {planned} trials have no result.")
    if planned < len(sweep.trials):
        sentences.append("Cells with a curriculum are not shown.")
    return " ".join(sentences)


def _held(sweep: Sweep) -> list[tuple[str, Any]]:
    """The fields that a reader needs to place the figure, where the whole sweep shares them."""
    names = ("model.family", "model.size", "strings.length", "training.epochs")
    values = spec_values(sweep.trials[0])
    return [(name.rpartition(".")[2], values[name]) for name in names if name not in (*factors(sweep), *SEEDS)]
