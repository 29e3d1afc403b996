"""The figures of what probes have seen: recall by prefix, older measures, and one string token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from memray.report.charts import Chart, Figure, HeatMap, Style, Trace
from memray.report.figure import LEAST_ROBUST_SHOWN, curves
from memray.report.replicates import Seen, last, local_lengths

MAX_CELLS_APART = 6


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
            keys = {str(k): f"context/local_{k}_{name}" for k in (*local_lengths(cell.columns, name), "full")}
            traces.append(_replicate_trace(cell, keys, name, index))
        held_out = {
            str(k): f"context_heldout/local_{k}_source" for k in (*local_lengths(cell.columns, "source"), "full")
        }
        traces.append(replace(_replicate_trace(cell, held_out, "held-out, source", 0), style=Style(dash="dot")))
        shown = tuple(trace for trace in traces if len(trace.x))
        if shown:
            yield Chart(
                name="prefix",
                title="Recall by the length of the local prefix" + _of(cell),
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
            title="Recall by what is left true of the prefix" + _of(cell),
            x_title="share of the context left true, %",
            y_title="local share of the string, %",
            caption="Medians over replicates, at the last probe epoch.",
            x=[str(each) for each in columns],
            y=[str(each) for each in rows],
            values=values,
            value_title="share of tokens right",
        )


def _replicate_trace(cell: Seen, keys: Mapping[str, str], name: str, index: int) -> Trace:
    """A line over metrics at the last epoch, with the range of the replicates."""
    values = {x: cell.values(last(key)) for x, key in keys.items()}
    values = {x: each for x, each in values.items() if len(each)}
    return Trace(
        name=name,
        x=[*values],
        y=[float(np.median(each)) for each in values.values()],
        low=[float(each.min()) for each in values.values()],
        high=[float(each.max()) for each in values.values()],
        style=Style.numbered(index),
    )


def _of(cell: Seen) -> str:
    where = cell.where()
    return f", {where}" if where else ""


# --- older measures ------------------------------------------------------------------------------------------------

OLDER = re.compile(r"(extractable|older)/(?!.*_(tokens|bits)$).*")


def _measures(cells: Sequence[Seen]) -> Iterator[Chart]:
    """All measures of recall that lie in [0, 1], by epoch, on one axis."""
    for cell in cells[:MAX_CELLS_APART]:
        older = [key for key in cell.columns if OLDER.fullmatch(key)]
        frame = pd.concat([rows for _, rows in cell.rows])
        traces = []
        for index, key in enumerate(("recall/token_accuracy", "recall/robust", *older)):
            values = curves(frame, [trial for trial, _ in cell.rows], key)
            if len(values):
                medians = np.median(values.to_numpy(dtype=np.float64), axis=1).tolist()
                epochs = [int(epoch) for epoch in values.index]
                traces.append(Trace(name=key, x=epochs, y=medians, style=Style.numbered(index)))
        if older and traces:
            yield Chart(
                name="measures",
                title="Old and new measures of recall by epoch" + _of(cell),
                x_title="epoch",
                y_title="measure, of 1",
                caption="Medians over replicates.",
                traces=tuple(traces),
                y_range=(LEAST_ROBUST_SHOWN, 1.04),
            )
