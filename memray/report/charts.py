"""What a figure shows, as data: it is drawn twice, for a browser and for a file (`drawing`).

Nothing is told by colour alone: lines have dashes and markers of their own as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float
from matplotlib.colors import to_hex
from numpy import ndarray

from memray.report.figure import DASHES as LINE_DASHES
from memray.report.figure import UNORDERED, Line

# As plotly calls them.
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
GREY = "#595959"

Scale = Literal["linear", "log", "category"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a trace looks.

    Attributes:
        colour: In hexadecimal digits.
        dash: One of `DASHES`; empty: points alone.
        marker: One of `MARKERS`, or empty. A trailing "-open" leaves it hollow; "line-ew" is a horizontal stroke.
        size: Of a marker, pixels.
    """

    colour: str = GREY
    dash: str = "solid"
    marker: str = ""
    size: int = 6

    @classmethod
    def of(cls, line: Line) -> Style:
        """As the line of a cell is drawn elsewhere."""
        dash = LINE_DASHES.index(line.dash) if line.dash in LINE_DASHES else 0
        return cls(colour=to_hex(line.colour), dash=DASHES[dash], marker=MARKERS[line.rank % len(MARKERS)])

    @classmethod
    def numbered(cls, index: int) -> Style:
        """Of something without an order."""
        return cls(
            colour=UNORDERED[index % len(UNORDERED)],
            dash=DASHES[index // len(UNORDERED) % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
        )

    def points(self, *, size: int = 6, is_open: bool = False, marker: str = "") -> Style:
        """The same without a line."""
        shape = marker or self.marker
        return replace(self, dash="", marker=f"{shape}-open" if is_open else shape, size=size)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One line, or some points.

    Attributes:
        name: In the legend; empty: it has no entry there.
        x: Numbers, or names of categories.
        y: As many numbers.
        low: The lower edge of the band around a line, or the lower ends of the bars of points alone; empty: none.
        high: The upper ones.
        style: How it looks.
        hover: What to say of each point, instead of its numbers.
    """

    name: str
    x: Sequence[float | int | str]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Style = Style()
    hover: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with two axes.

    Attributes:
        name: Of its file and its place on the page.
        alt: What it shows, for those who do not see it.
        y_range: What is shown of the vertical axis; all of it, if not given.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    caption: str
    traces: tuple[Trace, ...]
    legend_title: str = ""
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    y_range: tuple[float, float] | None = None

    @property
    def alt(self) -> str:
        named = [each.name for each in self.traces if each.name]
        return f"{self.title}: {self.y_title} against {self.x_title}, for {', '.join(dict.fromkeys(named))}."


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A figure of shares in [0, 1], from dark to light, by row and column.

    Attributes:
        hover: What to say of each place; empty: its row, column and value.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    caption: str
    x: Sequence[str]
    y: Sequence[str]
    values: Float[ndarray, "rows columns"]
    value_title: str
    hover: Sequence[Sequence[str]] = field(default=(), repr=False)

    @property
    def alt(self) -> str:
        return f"{self.title}: {self.value_title} by {self.y_title} (down) and {self.x_title} (across)."


Figure = Chart | HeatMap


def numbered(figures: Sequence[Figure]) -> list[Figure]:
    """The same with names of their own."""
    names = [each.name for each in figures]
    return [
        replace(each, name=f"{each.name}-{names[: index + 1].count(each.name)}") if names.count(each.name) > 1 else each
        for index, each in enumerate(figures)
    ]
