"""The figure of a sweep whose trials are placed in more than one way: are the curves the same, and what do they cost?

The loss by epoch, how far each placement's lies from that of the first, and its costs as bars. A figure for each group
of cells that are equal in all but `compute`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memray.report import SEEDS
from memray.report.figure import (
    CAPTION_CHARACTERS,
    DPI,
    GREY,
    TITLE_CHARACTERS,
    UNORDERED,
    WIDTH_INCHES,
    curves,
    quieten,
)
from memray.report.placements import CAPTION, COSTS, Cost, Placement, cost_text, placement_groups
from memray.sweep import Sweep

LOSS = "recall/nll_nats"
# What every placement is held to: at fp32, the loss of the first one to this for so many optimiser steps.
TOLERANCE, TOLERANCE_STEPS = 1e-4, 30
# The first line is broad and pale, because the others lie on it; these are theirs.
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (3, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (9, 4)))
# Below the rounding of fp32 there are differences of averages, which mean as little as none.
LEAST_DIFFERENCE = 1e-8


def write_placement_figures(sweep: Sweep, frame: pd.DataFrame, costs: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes `placements.png` into a folder, which is made; numbered, where the sweep moves more than placements.

    A group that has results of fewer than two placements compares nothing, and has no figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have_results = set(frame["trial_id"])
    groups = {
        held: shown
        for held, placements in placement_groups(sweep).items()
        if len(shown := [each for each in placements if any(t.trial_id() in have_results for t in each.trials)]) > 1
    }
    paths = []
    for number, (held, placements) in enumerate(groups.items(), start=1):
        paths.append(folder / ("placements.png" if len(groups) == 1 else f"placements-{number}.png"))
        placement_figure(sweep, placements, frame, costs, held).savefig(paths[-1], dpi=DPI, facecolor="white")
    return paths


def placement_figure(
    sweep: Sweep, placements: Sequence[Placement], frame: pd.DataFrame, costs: pd.DataFrame, held: str = ""
) -> Figure:
    """The figure of one group; `held` says which, where there are several."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.9 + 0.19 * len(placements)))
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.0, 1.0 + 0.19 * len(placements)])
    loss, difference = above.subplots(1, 2, sharex=True)
    _draw_losses(loss, placements, frame)
    _draw_differences(difference, placements, frame)
    bars = below.subplots(1, len(COSTS), sharey=True)
    for axes, cost in zip(bars, COSTS, strict=True):
        _draw_cost(axes, placements, costs, cost)
    for axes in (loss, difference, *bars):
        quieten(axes)
        axes.tick_params(labelsize=8.5)
    for axes in bars:
        axes.grid(visible=False, axis="y")
    question = " ".join(sweep.question.split()) or sweep.name
    title = textwrap.fill(f"{question} Here: {held}." if held else question, TITLE_CHARACTERS)
    figure.suptitle(title, x=0.008, ha="left", fontsize=12)
    caption = textwrap.fill(_caption(sweep, placements, costs), CAPTION_CHARACTERS, break_on_hyphens=False)
    figure.supxlabel(caption, x=0.008, ha="left", fontsize=8, color=GREY)
    return figure


def differences(first: Placement, other: Placement, frame: pd.DataFrame) -> pd.DataFrame:
    """How far the loss of a placement lies from that of the first, relative to it: by epoch and by replicate.

    Of the replicates that both have, each against that with the same seeds.
    """
    theirs = {_seeds(trial): trial for trial in first.trials}
    columns = {}
    for trial in other.trials:
        if _seeds(trial) in theirs:
            one, two = (curves(frame, [each], LOSS) for each in (trial, theirs[_seeds(trial)]))
            if len(one) and len(two):
                columns[trial.trial_id()] = (one.iloc[:, 0] / two.iloc[:, 0] - 1.0).abs()
    return pd.DataFrame(columns).dropna()


def _seeds(trial: Any) -> tuple[int, ...]:
    return tuple(getattr(trial, name) for name in SEEDS)


# --- panels ------------------------------------------------------------------------------------------------------


def _draw_losses(axes: Axes, placements: Sequence[Placement], frame: pd.DataFrame) -> None:
    last = 1
    for rank, placement in enumerate(placements):
        values = curves(frame, placement.trials, LOSS)
        if len(values):
            median = np.median(values.to_numpy(), axis=1)
            axes.plot(values.index, median, **_style(rank), zorder=3 + rank, label=placement.label)
            last = max(last, values.index[-1])
    axes.set_xlim(0, last)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("the loss, line upon line", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5, handlelength=3.2, ncols=1 + (len(placements) - 1) // 8)


def _draw_differences(axes: Axes, placements: Sequence[Placement], frame: pd.DataFrame) -> None:
    first, *others = placements
    drawn = []
    for rank, placement in enumerate(others, start=1):
        values = differences(first, placement, frame)
        largest = values.max(axis=1)
        drawn.append(largest)
        if len(values):
            # What is equal to the last bit has no place on the axis, and leaves a gap.
            axes.plot(largest.index, largest.where(largest >= LEAST_DIFFERENCE), **_style(rank), zorder=3 + rank)
    epochs = TOLERANCE_STEPS / first.trials[0].steps_per_epoch
    axes.plot([0, epochs, epochs], [TOLERANCE, TOLERANCE, LEAST_DIFFERENCE], color=GREY, ls=":", lw=1.2, zorder=2)
    axes.annotate(f"within {TOLERANCE:g} for {TOLERANCE_STEPS} optimiser steps", (0, TOLERANCE), (4, 3),
                  textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
    most = max((float(each.max()) for each in drawn if len(each)), default=0.0)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_DIFFERENCE, 10 ** math.ceil(math.log10(max(most, TOLERANCE) * 2)))
    axes.set_xlabel("epoch")
    axes.set_ylabel("relative difference")
    axes.set_title(f"difference of the loss from {first.label}", loc="left", fontsize=10)


def _draw_cost(axes: Axes, placements: Sequence[Placement], costs: pd.DataFrame, cost: Cost) -> None:
    """A bar a placement, the first on top: the median, with a line from lowest to highest."""
    most = 0.0
    for rank, placement in enumerate(placements):
        values = placement.values(costs, cost.key)
        text = cost_text(values[:0] if not len(values) else np.array([np.median(values)]), cost.digits)
        end = 0.0
        if len(values):
            axes.barh(rank, np.median(values), height=0.62, color=_colour(rank), alpha=0.85)
            axes.plot([values.min(), values.max()], [rank, rank], color="black", lw=1.0)
            end = float(values.max())
        axes.annotate(text, (end, rank), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        most = max(most, end)
    axes.set_xlim(0, most * 1.32 or 1)  # room for the number beside the longest bar
    axes.set_yticks(range(len(placements)), [placement.label for placement in placements])
    axes.set_ylim(len(placements) - 0.45, -0.55)
    axes.locator_params(axis="x", nbins=4)
    axes.set_title(cost.title, loc="left", fontsize=10)


def _colour(rank: int) -> str:
    return UNORDERED[rank % len(UNORDERED)]


def _style(rank: int) -> dict[str, Any]:
    if rank == 0:
        return {"color": _colour(0), "lw": 6.0, "alpha": 0.35, "ls": "solid", "solid_capstyle": "butt"}
    return {"color": _colour(rank), "lw": 1.6, "ls": DASHES[rank % len(DASHES)]}


# --- words -------------------------------------------------------------------------------------------------------


def _caption(sweep: Sweep, placements: Sequence[Placement], costs: pd.DataFrame) -> str:
    trial = placements[0].trials[0]
    most = max(len(placement.values(costs, "seconds")) for placement in placements)
    over = f"Medians over {most} replicates, and the largest of their differences. " if most > 1 else ""
    steps = trial.steps_per_epoch
    devices = dict.fromkeys(each.trials[0].compute.accelerator for each in placements)
    held = (
        f"{trial.model.family} {trial.model.size}, {trial.strings.num_strings} strings of {trial.strings.length}, "
        f"{steps} optimiser step{'s' if steps > 1 else ''} an epoch, {', '.join(devices)}"
    )
    return f"{over}Differences below the axis are not drawn. {CAPTION} All: {held}."
