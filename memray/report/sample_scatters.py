"""The figures of a corpus with a point a sample: the samples that two mixes share, and how near each has others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from memray.measures.paired import paired_comparison
from memray.report.charts import Chart, Style, Trace
from memray.report.figure import Line
from memray.report.mixes import MIX, Overlap, control, mixes, overlaps
from memray.report.replicates import Seen, spearman
from memray.report.samples_seen import SamplesSeen

# More points than these hide each other, and make the page slow.
MAX_POINTS = 2000
THINNED = f" Of more than {MAX_POINTS} samples, every so-manieth is drawn."
NEAREST = {"nearest_input": "prefixes", "nearest_full": "whole samples"}


def spaced(number: int) -> slice:
    """Evenly spaced ones of so many samples, no more than are drawn."""
    return slice(None, None, max(1, math.ceil(number / MAX_POINTS)))


# --- two mixes -----------------------------------------------------------------------------------------------------


def mix_charts(cells: Sequence[Seen]) -> Iterator[Chart]:
    """Mean match length of each shared sample where foreign samples were added, against where native ones were."""
    for foreign, native in mixes(cells):
        if shared := overlaps(foreign, native):
            yield _mix_chart(foreign, shared)


def _mix_chart(foreign: Seen, shared: Sequence[Overlap]) -> Chart:
    traces = []
    for index, overlap in enumerate(shared):
        under_foreign, under_native = overlap.means
        drawn = spaced(len(overlap.rows))
        hover = [
            f"row {row} of string {overlap.string_seed}: {y:.3g} with foreign, {x:.3g} with native samples"
            for row, x, y in zip(overlap.rows[drawn], under_native[drawn], under_foreign[drawn], strict=True)
        ]
        style = Style.numbered(index).points(size=5, is_open=True)
        traces.append(
            Trace(
                name=f"string {overlap.string_seed}", x=under_native[drawn].tolist(), y=under_foreign[drawn].tolist(),
                style=style, hover=hover,
            )
        )  # fmt: skip
    longest = float(max(max(map(np.max, overlap.means)) for overlap in shared))
    traces.append(Trace(name="", x=[0.0, longest], y=[0.0, longest], style=Style(dash="dot")))
    where = foreign.where(MIX)
    thinned = THINNED if any(len(each.rows) > MAX_POINTS for each in shared) else ""
    return Chart(
        name="mixes",
        title="Paired comparison of the overlap set" + (f", {where}" if where else ""),
        x_title="mean match length with native samples added, tokens",
        y_title="mean match length with foreign ones added, tokens",
        caption=f"A point a sample that both mixes train, the mean over its {shared[0].num_trainings} training seeds "
        f"at the last probe epoch at which in none half of them are recited whole. {_effects(shared)}; "
        f"{control(shared)}.{thinned}",
        traces=tuple(traces),
        legend_title="strings",
    )


def _effects(shared: Sequence[Overlap]) -> str:
    """The effect of each string; of a single one with its interval over samples."""
    if len(shared) > 1:
        effects = ", ".join(_signed(each.between.effect) for each in shared)
        return f"Rank-biserial effect of foreign against native ones, string by string: {effects}"
    found = paired_comparison(*shared[0].means, rng=np.random.default_rng(shared[0].string_seed))
    low, high = map(_signed, found.interval)
    return f"Rank-biserial effect of foreign against native ones: {_signed(found.effect)} [{low}, {high}]"


# --- near samples --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """How near each native sample of a trial has another before training, and how long it is recited while not all are.

    Attributes:
        cosine: With its nearest neighbour, by column of the records; nan where it has none.
    """

    cosine: Mapping[str, Float[ndarray, " samples"]]
    num_match: Float[ndarray, " samples"]
    rows: Sequence[int]

    @classmethod
    def of(cls, seen: SamplesSeen, samples: pa.Table) -> Neighbours:
        """From the records of a trial, which may lack the columns."""
        told = {}
        for name in NEAREST:
            if name in samples.column_names:
                known = samples.filter(samples[name].is_valid()).select(["sample", name]).to_pylist()
                by_sample = {row["sample"]: row[name] for row in known}
                if by_sample:
                    own = [by_sample.get(sample, math.nan) for sample in seen.table["sample"].to_pylist()]
                    told[name] = np.array(own)
        return cls(told, seen.correctness.num_match.astype(np.float64), seen.table["row"].to_pylist())


def neighbour_charts(found: Sequence[tuple[Line, Sequence[Neighbours]]]) -> Iterator[Chart]:
    """The match length of each sample by its cosine with the nearest other one, where that was measured."""
    for name, what in NEAREST.items():
        present = [(line, [each for each in own if name in each.cosine]) for line, own in found]
        present = [(line, own) for line, own in present if own]
        if not present:
            continue
        traces, said, is_thinned = [], [], False
        for line, own in present:
            correlations = np.array([spearman(each.cosine[name], each.num_match) for each in own])
            defined = correlations[~np.isnan(correlations)]
            middle = _signed(float(np.median(defined))) if len(defined) else "undefined"
            said.append(f"{line.name} {middle}" if len(present) > 1 else middle)
            traces.append(_neighbour_trace(line, own, name))
            is_thinned |= sum(len(each.rows) for each in own) > MAX_POINTS
        yield Chart(
            name=name.replace("_", "-"),
            title=f"Match length by the nearest neighbour, of {what}",
            x_title=f"cosine with the nearest other sample before training ({what}, mean-centred)",
            y_title="match length, tokens",
            caption="A point a native sample and replicate, at the last probe epoch at which few are recited "
            "whole. Spearman's correlation, median over replicates: "
            f"{', '.join(said)}.{THINNED if is_thinned else ''}",
            traces=tuple(traces),
        )


def _neighbour_trace(line: Line, own: Sequence[Neighbours], name: str) -> Trace:
    cosine = np.concatenate([each.cosine[name] for each in own])
    num_match = np.concatenate([each.num_match for each in own])
    rows = np.array([row for each in own for row in each.rows])
    kept = np.flatnonzero(~np.isnan(cosine))
    kept = kept[spaced(len(kept))]
    return Trace(
        name=line.name, x=cosine[kept].tolist(), y=num_match[kept].tolist(),
        style=Style.of(line).points(size=5, is_open=True), hover=[f"row {row}" for row in rows[kept].tolist()],
    )  # fmt: skip


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")
