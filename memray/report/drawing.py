"""Draws the figures of a report twice: for a browser with plotly, for a file with matplotlib.

plotly's script is put into the page once, by whoever makes the page; what is drawn here asks nothing of any network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy import ndarray
from plotly.utils import PlotlyJSONEncoder

from memray.report.charts import Chart, Figure, HeatMap, Trace
from memray.report.figure import DPI, quieten

HEIGHT_PX = 430
FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"}
GRID = "#e6e6e6"
# Markers that a line shows along its way.
MARKERS_SHOWN = 9
# Things along an axis that have a tick each.
MAX_COUNTED = 12
# What fits on a line of the legend of a file.
LEGEND_CHARACTERS = 110
# matplotlib's names of what plotly calls otherwise.
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "cross": "P", "star": "*",
    "triangle-down": "v", "line-ew": "_",
}  # fmt: skip
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


# --- for a browser -------------------------------------------------------------------------------------------------


def to_script(figures: Sequence[Figure]) -> str:
    """A script that draws the figures into the elements `plot-<name>`, once plotly's own script was run.

    It belongs behind them: what is drawn before a page is laid out has a width of its own.
    """
    plots = {f"plot-{each.name}": (_plot(each) if isinstance(each, Chart) else _heat(each)).to_plotly_json()
             for each in figures}  # fmt: skip
    # A symbol of a string must not end the script.
    data = json.dumps(plots, cls=PlotlyJSONEncoder, separators=(",", ":")).replace("</", "<\\/")
    config = json.dumps({"responsive": True, "displayModeBar": False, "plotlyServerURL": ""})
    return (
        f"for (const [id, plot] of Object.entries({data})) "
        f"Plotly.newPlot(document.getElementById(id), plot.data, plot.layout, {config});"
    )


def _plot(chart: Chart) -> go.Figure:
    drawn = go.Figure()
    for trace in chart.traces:
        if len(trace.low) and trace.style.dash:
            _add_band(drawn, trace)
        drawn.add_trace(_scatter(trace))
    x_axis, y_axis = (
        {"title": {"text": title, "standoff": 8}, "type": scale, "gridcolor": GRID, "zeroline": False}
        for title, scale in ((chart.x_title, chart.x_scale), (chart.y_title, chart.y_scale))
    )
    if chart.x_scale == "category":
        x_axis |= {"categoryorder": "array", "categoryarray": _categories(chart)}
    if _counts(chart):
        x_axis["dtick"] = 1
    if chart.y_range:
        y_axis["range"] = [math.log10(end) if chart.y_scale == "log" else end for end in chart.y_range]
    for axis in (x_axis, y_axis):
        if axis["type"] == "log":
            axis |= {"exponentformat": "power", "dtick": 1}
    drawn.update_layout(**_layout(), xaxis=x_axis, yaxis=y_axis, legend=_legend(chart))
    # Legends of many entries take their own height.
    drawn.update_layout(height=HEIGHT_PX + 8 * sum(bool(trace.name) for trace in chart.traces))
    return drawn


def _layout() -> dict[str, Any]:
    return {
        "template": "none",
        "height": HEIGHT_PX,
        "font": FONT,
        "margin": {"l": 65, "r": 12, "t": 10, "b": 45},
        "hovermode": "closest",
    }


def _legend(chart: Chart) -> dict[str, Any]:
    """Above, where it takes no width from a narrow page and stands in no axis's way."""
    return {
        "orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0.0, "font": {"size": 12},
        "title": {"text": chart.legend_title},
    }  # fmt: skip


def _scatter(trace: Trace) -> go.Scatter:
    style = trace.style
    modes = [mode for mode, is_drawn in (("lines", style.dash), ("markers", style.marker)) if is_drawn]
    marker: dict[str, Any] = {"symbol": style.marker or "circle", "size": style.size, "color": style.colour}
    if style.dash:
        marker["maxdisplayed"] = MARKERS_SHOWN
    if style.marker == "line-ew":
        marker["line"] = {"width": 3, "color": style.colour}
    return go.Scatter(
        x=list(trace.x),
        y=[_rounded(each) for each in trace.y],
        name=trace.name,
        legendgroup=trace.name or None,
        showlegend=bool(trace.name),
        mode="+".join(modes),
        line={"color": style.colour, "dash": style.dash or "solid", "width": 2},
        marker=marker,
        error_y=None if style.dash or not len(trace.low) else _bars(trace),
        cliponaxis=False if not style.dash else None,
        text=list(trace.hover) or None,
        hovertemplate="%{text}<extra></extra>" if len(trace.hover) else None,
        hoverinfo="skip" if not trace.name and not len(trace.hover) and style.dash else None,
    )


def _bars(trace: Trace) -> dict[str, Any]:
    above, below = ([_rounded(reach) for reach in each] for each in _reach(trace))
    look = {"color": trace.style.colour, "thickness": 1.2, "width": 3}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **look}


def _reach(trace: Trace) -> tuple[Float[ndarray, " points"], Float[ndarray, " points"]]:
    """How far the bars of points reach upwards and downwards."""
    y = np.asarray(trace.y, dtype=np.float64)
    return np.asarray(trace.high) - y, y - np.asarray(trace.low)


def _add_band(drawn: go.Figure, trace: Trace) -> None:
    red, green, blue = (round(255 * part) for part in to_rgb(trace.style.colour))
    around = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "x": list(trace.x)}
    around["legendgroup"] = trace.name
    drawn.add_trace(go.Scatter(y=[_rounded(each) for each in trace.low], **around))
    fill = f"rgba({red},{green},{blue},0.17)"
    drawn.add_trace(go.Scatter(y=[_rounded(each) for each in trace.high], fill="tonexty", fillcolor=fill, **around))


def _heat(figure: HeatMap) -> go.Figure:
    drawn = go.Figure(
        go.Heatmap(
            z=[[_rounded(each, 3) for each in row] for row in figure.values],
            x=list(figure.x),
            y=list(figure.y),
            text=[list(row) for row in figure.hover] or None,
            hovertemplate=("%{text}" if len(figure.hover) else _place(figure)) + "<extra></extra>",
            colorscale="Viridis",
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": figure.value_title, "side": "right"}, "thickness": 12},
        )
    )
    axes = {"type": "category", "showgrid": False, "nticks": 12}
    drawn.update_layout(
        **_layout(),
        xaxis={"title": {"text": figure.x_title, "standoff": 8}, **axes},
        yaxis={"title": {"text": figure.y_title, "standoff": 8}, "autorange": "reversed", **axes},
    )
    return drawn


def _place(figure: HeatMap) -> str:
    return f"{figure.y_title} %{{y}}<br>{figure.x_title} %{{x}}<br>{figure.value_title}: %{{z}}"


def _counts(chart: Chart) -> bool:
    """Whether the horizontal axis counts so few things that there is nothing between its ticks."""
    if chart.x_scale != "linear":
        return False
    x = [float(each) for trace in chart.traces for each in trace.x]
    return all(each.is_integer() for each in x) and max(x, default=0.0) <= MAX_COUNTED


def _categories(chart: Chart) -> list[str]:
    return list(dict.fromkeys(str(x) for trace in chart.traces for x in trace.x))


def _rounded(value: float, digits: int = 5) -> float | None:
    """To so many digits, which a page shows and which keeps it small; None where there is no number."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


# --- for a file ----------------------------------------------------------------------------------------------------


def write_png(figure: Figure, folder: Path) -> Path:
    """Writes the figure into a folder under its name, and returns its path."""
    canvas = Canvas(figsize=(9.0, 5.0), layout="constrained")
    axes = canvas.add_subplot()
    if isinstance(figure, Chart):
        _draw_chart(axes, figure)
    else:
        _draw_heat(canvas, axes, figure)
    axes.set_title(figure.title, loc="left", fontsize=11, fontweight="bold", wrap=True)
    axes.set_xlabel(figure.x_title)
    axes.set_ylabel(figure.y_title)
    path = folder / f"{figure.name}.png"
    canvas.savefig(path, dpi=DPI, facecolor="white")
    return path


def _draw_chart(axes: Axes, chart: Chart) -> None:
    categories = _categories(chart) if chart.x_scale == "category" else []
    for trace in chart.traces:
        style = trace.style
        x = [categories.index(str(each)) for each in trace.x] if categories else [*trace.x]
        if len(trace.low) and style.dash:
            axes.fill_between(x, trace.low, trace.high, color=style.colour, alpha=0.17, lw=0)
        elif len(trace.low):
            axes.errorbar(x, trace.y, yerr=_reach(trace)[::-1], fmt="none", ecolor=style.colour, elinewidth=1.0)
        axes.plot(
            x, trace.y, color=style.colour, ls=DASHES.get(style.dash, "none"), lw=1.7,
            marker=MARKERS.get(style.marker.removesuffix("-open"), ""), ms=0.6 * style.size,
            mfc="white" if style.marker.endswith("-open") else style.colour,
            markevery=max(1, len(x) // MARKERS_SHOWN) if style.dash else 1, label=trace.name or "_",
            mew=2.0 if style.marker == "line-ew" else 1.0,
        )  # fmt: skip
    if categories:
        axes.set_xticks(range(len(categories)), categories)
        axes.set_xlim(-0.5, len(categories) - 0.5)
    else:
        axes.set_xscale(chart.x_scale)
    if _counts(chart):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale(chart.y_scale)
    if chart.y_range:
        axes.set_ylim(chart.y_range)
    quieten(axes)
    if longest := max((len(trace.name) for trace in chart.traces), default=0):
        axes.figure.legend(
            loc="outside lower center",
            ncols=min(4, max(1, LEGEND_CHARACTERS // (longest + 8))),
            frameon=False,
            title=chart.legend_title or None,
        )  # type: ignore[call-arg]


def _draw_heat(canvas: Canvas, axes: Axes, figure: HeatMap) -> None:
    image = axes.imshow(figure.values, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
    for axis, names in ((axes.xaxis, figure.x), (axes.yaxis, figure.y)):
        places = np.unique(np.linspace(0, len(names) - 1, min(len(names), 12)).round().astype(int))
        axis.set_ticks(places.tolist(), [str(names[place]) for place in places])
    canvas.colorbar(image, ax=axes, label=figure.value_title)
