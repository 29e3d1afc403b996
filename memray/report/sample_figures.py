"""The figures of studies on a corpus: the tail of the match lengths, the curves that could have made it, what a small
probe sees of it, and which samples are memorised most.

Metrics say how a trial went; the match lengths themselves stand in the records of its samples, of which the last epoch
is drawn at which few are recited whole. Replicates of a cell are pooled where a figure shows a
distribution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.measures.match_curves import fit_all
from memray.measures.match_length import Correctness, Hazards
from memray.measures.skew import LARGEST_SHARE, expected_max, miss_probability
from memray.report.charts import Chart, Style, Trace
from memray.report.figure import Line, lines_of
from memray.report.probe_figures import replicate_trace
from memray.report.records import RecordsOf
from memray.report.replicates import Seen, last, seen_cells
from memray.report.sample_scatters import Neighbours, mix_charts, neighbour_charts
from memray.report.samples_seen import FEW_WHOLE, SamplesSeen
from memray.sweep import Sweep

MAX_CELLS_APART = 4
NUM_LISTED = 20
FIT_NAMES = {"geometric": "geometric", "linear": "linear p", "beta_geometric": "beta-geometric"}
# Fewer samples at risk than this say nothing of a hazard.
FEWEST_AT_RISK = 10
# The longest matches that a small probe is to find.
WORST_CASES = 10
WHEN = f"At the last probe epoch with at most {FEW_WHOLE:.0%} of the samples recited whole (or the last of all)"
PREFIX_MATCH = re.compile(r"prefix/match_(\d+)")

# The cells that have records, with the samples of each of their trials.
Pooled = Sequence[tuple[Line, Sequence[SamplesSeen]]]


def sample_figures(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf | None) -> list[Chart]:
    """The figures of the cells that have a corpus, in the order in which they are shown; none without one."""
    lines, factor = lines_of(sweep, frame)
    lines = [line for line in lines if line.trials[0].corpus is not None]
    if not lines:
        return []
    cells = [cell for cell in seen_cells(sweep, frame, records) if cell.spec.corpus is not None]
    pooled, near = _read(lines, records)
    found = [_tail_and_loss(lines, frame)]
    if pooled:
        found += [*_survival(pooled), *_hazards(pooled), *_small_probes(pooled), *_missed(pooled)]
    found += [*_by_prefix(lines, cells), *neighbour_charts(near), *mix_charts(cells)]
    legend_title = factor.rpartition(".")[2]
    return [replace(chart, legend_title=chart.legend_title or legend_title) for chart in found]


def _read(lines: Sequence[Line], records: RecordsOf | None) -> tuple[Pooled, list[tuple[Line, Sequence[Neighbours]]]]:
    """What is drawn of the records of each cell, which are read once."""
    pooled, near = [], []
    for line in lines if records is not None else ():
        assert records is not None
        ended, neighbours = [], []
        for trial in line.trials:  # one after another, for all of their tables may not fit into memory
            samples = records(trial.trial_id()).samples()
            if (seen := SamplesSeen.few_whole(trial, samples)) is not None:
                ended.append(seen)
                neighbours.append(Neighbours.of(seen, samples))
        if ended:
            pooled.append((line, ended))
            near.append((line, neighbours))
    return pooled, near


def _pooled(own: Sequence[SamplesSeen]) -> Correctness:
    return Correctness(
        np.concatenate([each.correctness.is_right for each in own]),
        np.concatenate([each.correctness.length for each in own]),
    )


def _tail_and_loss(lines: Sequence[Line], frame: pd.DataFrame) -> Chart:
    """E[max_z] against the loss, a point a probe epoch and a line a cell: a tail that grows while the loss is flat
    rises steeply at the end."""
    traces = []
    for line in lines:
        rows = frame.loc[frame["trial_id"].isin([trial.trial_id() for trial in line.trials])]
        medians = rows.groupby("epoch")[["recall/nll_nats", "match/expected_max"]].median()
        traces.append(
            Trace(
                name=line.name, x=medians["recall/nll_nats"].tolist(), y=medians["match/expected_max"].tolist(),
                style=Style.of(line), hover=[f"epoch {epoch}" for epoch in medians.index],
            )
        )  # fmt: skip
    return Chart(
        name="tail-and-loss",
        title="The tail against the loss",
        x_title="loss on references, nats a token",
        y_title="E[max_z], tokens",
        caption="A point a probe epoch (medians over replicates); training goes from right to left. E[max_z] is the "
        f"expected longest match among a fifth of the samples (z = M/{LARGEST_SHARE}).",
        traces=tuple(traces),
    )


def _survival(pooled: Pooled) -> Iterator[Chart]:
    """P(N >= n), on a logarithmic axis: a geometric distribution is a straight line."""
    traces = []
    for line, own in pooled:
        correctness = _pooled(own)
        survival = Hazards.of(correctness).survival
        # The curve ends where no sample is left.
        numbers = np.flatnonzero(survival > 0)
        style = Style.of(line)
        traces.append(
            Trace(name=line.name, x=numbers.tolist(), y=survival[numbers].tolist(), style=style.points(size=5))
        )
        if len(pooled) <= MAX_CELLS_APART:
            traces += _fitted(correctness, numbers, style, is_first=line is pooled[0][0])
    yield Chart(
        name="survival",
        title="Match lengths: share of samples that are recited for at least n tokens",
        x_title="n, tokens of the reference",
        y_title="P(N ≥ n)",
        caption=f"{WHEN}, replicates together, ended references allowed for (Kaplan and Meier). Lines: "
        "curves fitted to each cell: geometric (straight here), linear in position, beta-geometric (samples differ).",
        traces=tuple(traces),
        y_scale="log",
    )


FIT_DASHES = {"geometric": "dot", "linear": "dash", "beta_geometric": "solid"}


def _fitted(correctness: Correctness, numbers: Int[ndarray, " n"], style: Style, *, is_first: bool) -> list[Trace]:
    """The fitted curves; the legend names each kind once."""
    fits = fit_all(correctness.num_match, correctness.length)
    best = min(fits, key=lambda name: fits[name].aic)
    traces = []
    for name, each in fits.items():
        label = FIT_NAMES[name] + (", best by AIC" if name == best else "")
        colour = Style(colour=style.colour, dash=FIT_DASHES[name])
        traces.append(
            Trace(
                name=FIT_NAMES[name] if is_first else "", x=numbers.tolist(), y=each.survival(numbers).tolist(),
                style=colour,
                hover=[f"{label}: AIC {each.aic:.1f}"] * len(numbers),
            )
        )  # fmt: skip
    return traces


def _hazards(pooled: Pooled) -> Iterator[Chart]:
    """p_j, given that all tokens before are right, and whatever they are."""
    traces = []
    for line, own in pooled:
        hazards = Hazards.of(_pooled(own))
        position = 1 + np.arange(len(hazards.num_at_risk))
        style = Style.of(line)
        for values, counts, name, shape in (
            (hazards.conditional, hazards.num_at_risk, line.name, style),
            (hazards.marginal, hazards.num_there, "", style.points(size=5, is_open=True)),
        ):
            enough = counts >= FEWEST_AT_RISK
            traces.append(Trace(name=name, x=position[enough].tolist(), y=values[enough].tolist(), style=shape))
    yield Chart(
        name="hazards",
        title="Probability that a token is right, by its position",
        x_title="position in the reference",
        y_title="share right",
        caption="Lines: given that all tokens before it are right; it rises where samples differ, although no token "
        f"gets easier. Hollow points: of all samples. Where fewer than {FEWEST_AT_RISK} samples are left, nothing is "
        "drawn.",
        traces=tuple(traces),
        y_range=(-0.03, 1.04),
    )


def _small_probes(pooled: Pooled) -> Iterator[Chart]:
    """E[max_z] by z: what is the longest match that a probe of z samples finds."""
    traces = []
    for line, own in pooled:
        each_size = min(each.correctness.num_samples for each in own)
        sizes = np.unique(np.geomspace(1, max(1, each_size // LARGEST_SHARE), 25).round().astype(int))
        curves = np.stack([expected_max(each.correctness.num_match, sizes) for each in own])
        style = Style.of(line)
        has_band = len(own) > 1
        traces.append(
            Trace(
                name=line.name, x=sizes.tolist(), y=np.median(curves, axis=0).tolist(), style=style,
                low=curves.min(axis=0).tolist() if has_band else (),
                high=curves.max(axis=0).tolist() if has_band else (),
            )
        )  # fmt: skip
        longest = float(np.median([each.correctness.num_match.max() for each in own]))
        traces.append(Trace(name="", x=[int(sizes[0]), int(sizes[-1])], y=[longest, longest], style=Style(dash="dot")))
    yield Chart(
        name="probe-size",
        title="The longest match that a small probe finds",
        x_title="z, samples probed",
        y_title="E[max_z], tokens",
        caption=f"{WHEN}, exact, from the order statistics of all samples, up to a fifth of them: beyond it "
        "the curve is about these samples alone. Bands: from the least to the largest replicate. Dotted: the longest "
        "match of all.",
        traces=tuple(traces),
        x_scale="log",
    )


def _missed(pooled: Pooled) -> Iterator[Chart]:
    """C(M - k, z) / C(M, z) by z, for each number M of samples that a trial has."""
    numbers = sorted({each.correctness.num_samples for _, own in pooled for each in own})
    traces = []
    for index, number in enumerate(number for number in numbers if number > WORST_CASES):
        sizes = np.unique(np.geomspace(1, number, 40).round().astype(int))
        chances = miss_probability(number, WORST_CASES, sizes)
        hover = [f"z = {z}: {chance:.3g}" for z, chance in zip(sizes, chances, strict=True)]
        style = Style.numbered(index)
        traces.append(Trace(name=f"M = {number}", x=sizes.tolist(), y=chances.tolist(), style=style, hover=hover))
    if traces:
        yield Chart(
            name="missed",
            title=f"Probability that a small probe misses the {WORST_CASES} longest matches",
            x_title="z, samples probed",
            y_title="probability",
            caption=f"That z of the M native samples, drawn without replacement, hold none of the {WORST_CASES} that "
            f"are recited for longest: C(M−{WORST_CASES}, z) / C(M, z), whatever their lengths.",
            traces=tuple(traces),
            legend_title="samples",
            x_scale="log",
            y_range=(-0.03, 1.04),
        )


# --- given more ------------------------------------------------------------------------------------------------------


def _by_prefix(lines: Sequence[Line], cells: Sequence[Seen]) -> Iterator[Chart]:
    """Mean match length by how many tokens of the reference are given beforehand; at the last epoch."""
    by_trial = {trial.trial_id(): cell for cell in cells for trial, _ in cell.rows}
    given = sorted({int(found[1]) for cell in cells for key in cell.columns if (found := PREFIX_MATCH.fullmatch(key))})
    traces = []
    for line in lines if given else ():
        quantities = {number: last(f"prefix/match_{number}") for number in given}
        traces.append(replicate_trace(by_trial[line.trials[0].trial_id()], quantities, line.name, Style.of(line)))
    if any(len(trace.x) for trace in traces):
        yield Chart(
            name="given",
            title="Match length by how much of the reference is given",
            x_title="tokens of the reference that are given",
            y_title="mean match length beyond them, tokens",
            caption="At the last epoch, of the references that are longer than the most that is given, and up to as "
            "many tokens for each number of them: what differs is the prefix, and where in a reference they stand. "
            "Medians over replicates; bands: their range.",
            traces=tuple(traces),
        )


# --- which samples -------------------------------------------------------------------------------------------------


def most_memorised(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf) -> list[dict[str, Any]]:
    """The samples that are recited for longest, of all trials together, for a table: a row a sample of a source.

    Ordered by the median match length over the trials that trained the sample.
    """
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with_results = set(frame["trial_id"])
    for trial in sweep.trials:
        if trial.corpus is None or trial.trial_id() not in with_results:
            continue
        samples = records(trial.trial_id()).samples()
        ended = SamplesSeen.few_whole(trial, samples)
        if ended is None:
            continue
        texts = _texts(samples)
        ends = zip(ended.table["sample"].to_pylist(), ended.table["row"].to_pylist(),
                   ended.correctness.num_match.tolist(), ended.correctness.length.tolist(), strict=True)  # fmt: skip
        for sample, row, num_match, length in ends:
            prefix, reference = texts[sample]
            key = (prefix, row)
            one = {"prefix": prefix, "reference": reference, "row": row, "match": num_match, "length": length}
            found.setdefault(key, []).append(one)
    return _listed(found)


def _texts(samples: pa.Table) -> dict[int, tuple[str, str]]:
    """Prefix and reference of each sample: they stand with the first probe epoch alone."""
    told = samples.filter(samples["prefix"].is_valid()).select(["sample", "prefix", "reference"]).to_pylist()
    return {row["sample"]: (row["prefix"], row["reference"]) for row in told}


def _listed(found: Mapping[Any, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for each in found.values():
        matches = np.array([one["match"] for one in each])
        first = each[0]
        rows.append(
            {
                "prefix": first["prefix"],
                "reference": first["reference"],
                "row": first["row"],
                "length": first["length"],
                "median": float(np.median(matches)),
                "least": int(matches.min()),
                "most": int(matches.max()),
                "trials": len(each),
            }
        )
    rows.sort(key=lambda row: (-row["median"], -row["most"], row["row"]))
    return rows[:NUM_LISTED]
