"""The figures of what probes have seen: recall by prefix, and older measures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd

from memray.measures.extraction import WINDOWS, windows_right_if_independent
from memray.report.charts import Chart, Figure, HeatMap, Style, Trace
from memray.report.figure import LEAST_ROBUST_SHOWN, curves
from memray.report.replicates import Quantity, Seen, last, local_lengths

MAX_CELLS_APART = 6

X = TypeVar("X", int, str)


def probe_figures(cells: Sequence[Seen]) -> list[Figure]:
    """Those that the columns allow."""
    return [*_context(cells), *_measures(cells)]


# --- by prefix -----------------------------------------------------------------------------------------------------

REPLACEMENTS = re.compile(r"context/local_(?:\d+|full)_(\w+)")
GRID = re.compile(r"context_grid/(\d+)_(\d+)")


def _context(cells: Sequence[Seen]) -> Iterator[Figure]:
    """Accuracy by k, a line a replacement, and the grid of local and remote shares; at the last probe."""
    for cell in cells[:MAX_CELLS_APART]:
        names = list(dict.fromkeys(found[1] for key in cell.columns if (found := REPLACEMENTS.fullmatch(key))))
        traces = []
        for index, name in enumerate(names):
            keys = {str(k): last(f"context/local_{k}_{name}") for k in (*local_lengths(cell.columns, name), "full")}
            traces.append(replicate_trace(cell, keys, name, Style.numbered(index)))
        held_out = {
            str(k): last(f"context_heldout/local_{k}_source") for k in (*local_lengths(cell.columns, "source"), "full")
        }
        traces.append(replicate_trace(cell, held_out, "held-out, source", Style(dash="dot")))
        shown = tuple(trace for trace in traces if len(trace.x))
        if shown:
            yield Chart(
                name="prefix",
                title="Recall by the length of the local prefix" + of_cell(cell),
                x_title="local tokens that stay true (k)",
                y_title="share of tokens right",
                caption="What stands before them is replaced as the legend says; at the last probe epoch. Medians over "
                "replicates; bands: their range.",
                traces=shown,
                legend_title="replacement",
                x_scale="category",
                y_range=(-0.03, 1.04),
            )
        yield from _grid(cell)


def _grid(cell: Seen) -> Iterator[HeatMap]:
    places = [tuple(map(int, found.groups())) for key in cell.columns if (found := GRID.fullmatch(key))]
    if not places:
        return
    rows, columns = (sorted({place[axis] for place in places}) for axis in (0, 1))
    values = np.array([[cell.median(last(f"context_grid/{r}_{c}")) for c in columns] for r in rows])
    if np.isfinite(values).any():
        yield HeatMap(
            name="grid",
            title="Recall by what is left true of the prefix" + of_cell(cell),
            x_title="share of the context left true, %",
            y_title="local share of the string, %",
            caption="Medians over replicates, at the last probe epoch.",
            x=[str(each) for each in columns],
            y=[str(each) for each in rows],
            values=values,
            value_title="share of tokens right",
        )


def replicate_trace(cell: Seen, quantities: Mapping[X, Quantity], name: str, style: Style) -> Trace:
    """A line over quantities, with the range of the replicates; no point where none is defined."""
    values = {x: cell.values(quantity) for x, quantity in quantities.items()}
    values = {x: each for x, each in values.items() if len(each)}
    return Trace(
        name=name,
        x=[*values],
        y=[float(np.median(each)) for each in values.values()],
        low=[float(each.min()) for each in values.values()],
        high=[float(each.max()) for each in values.values()],
        style=style,
    )


def of_cell(cell: Seen) -> str:
    """What the title of a cell's own figure ends with."""
    where = cell.where()
    return f", {where}" if where else ""


# --- older measures ------------------------------------------------------------------------------------------------

ACCURACY = "recall/token_accuracy"
OLDER = re.compile(r"(extractable|older)/(?!.*_(tokens|bits)$).*")


def _measures(cells: Sequence[Seen]) -> Iterator[Chart]:
    """All measures of recall that lie in [0, 1], by epoch, on one axis."""
    for cell in cells[:MAX_CELLS_APART]:
        older = [key for key in cell.columns if OLDER.fullmatch(key)]
        frame = pd.concat([rows for _, rows in cell.rows])
        traces = []
        for index, key in enumerate((ACCURACY, "recall/robust", *older)):
            values = curves(frame, [trial for trial, _ in cell.rows], key)
            if len(values):
                medians = np.median(values.to_numpy(dtype=np.float64), axis=1).tolist()
                epochs = [int(epoch) for epoch in values.index]
                traces.append(Trace(name=key, x=epochs, y=medians, style=Style.numbered(index)))
        if older and traces:
            yield Chart(
                name="measures",
                title="Old and new measures of recall by epoch" + of_cell(cell),
                x_title="epoch",
                y_title="measure, of 1",
                caption=f"Medians over replicates. Dotted: the share of windows of {WINDOWS[-1]} tokens that would be "
                "right at this token accuracy if errors were independent.",
                traces=(*traces, *_if_independent(traces)),
                y_range=(LEAST_ROBUST_SHOWN, 1.04),
            )


def _if_independent(traces: Sequence[Trace]) -> Iterator[Trace]:
    """What the longest windows are to be held against, where they were measured."""
    by_name = {trace.name: trace for trace in traces}
    length = WINDOWS[-1]
    if ACCURACY in by_name and f"older/windows_right_{length}" in by_name:
        accuracy = by_name[ACCURACY]
        expected = [windows_right_if_independent(each, length) for each in accuracy.y]
        yield replace(accuracy, name=f"{length} if independent", y=expected, style=Style(dash="dot"))
