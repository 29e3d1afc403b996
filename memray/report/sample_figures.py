"""The figures of studies on a corpus: the tail of the match lengths, the curves that could have made it, what a small
probe sees of it, and which samples are memorised most.

Metrics say how a trial went; the match lengths themselves stand in the records of its samples, of which the last epoch
is drawn. Replicates of a cell are pooled where a figure shows a distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.measures.match_length import Correctness, Hazards, fit_all
from memray.measures.skew import LARGEST_SHARE, expected_max
from memray.report.charts import Chart, Style, Trace
from memray.report.figure import Line, lines_of
from memray.report.records import RecordsOf
from memray.sample_measurement import ScoredSamples
from memray.samples import NATIVE
from memray.spec import TrialSpec
from memray.sweep import Sweep

MAX_CELLS_APART = 4
NUM_LISTED = 20
FIT_NAMES = {"geometric": "geometric", "linear": "linear p", "beta_geometric": "beta-geometric"}
# Fewer samples at risk than this say nothing of a hazard.
FEWEST_AT_RISK = 10


@dataclass(frozen=True)
class LastEpoch:
    """The native samples of one trial at its last epoch."""

    trial: TrialSpec
    table: pa.Table
    correctness: Correctness

    @staticmethod
    def of(trial: TrialSpec, samples: pa.Table) -> LastEpoch | None:
        """From the records of a trial; None where there are none."""
        if not samples.num_columns:
            return None
        epochs = samples["epoch"].to_numpy()
        table = samples.filter(pa.array(epochs == epochs.max()))
        (scored,) = ScoredSamples.read(table)
        native = scored.role == NATIVE
        return LastEpoch(trial, table.filter(pa.array(native)), scored.reference(native)[0])


# The cells that have records, with the samples of each of their trials.
Pooled = Sequence[tuple[Line, Sequence[LastEpoch]]]


def sample_figures(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf | None) -> list[Chart]:
    """The figures of the cells that have a corpus, in the order in which they are shown; none without one."""
    lines, factor = lines_of(sweep, frame)
    lines = [line for line in lines if line.trials[0].corpus is not None]
    found = [_tail_and_loss(lines, frame)] if lines else []
    if records is not None:
        pooled = [(line, own) for line in lines if (own := _last_epochs(line, frame, records))]
        found += [*_survival(pooled), *_hazards(pooled), *_small_probes(pooled)]
    legend_title = factor.rpartition(".")[2]
    return [replace(chart, legend_title=legend_title) for chart in found]


def _last_epochs(line: Line, frame: pd.DataFrame, records: RecordsOf) -> list[LastEpoch]:
    with_results = set(frame["trial_id"])
    present = [trial for trial in line.trials if trial.trial_id() in with_results]
    found = (LastEpoch.of(trial, records(trial.trial_id()).samples()) for trial in present)
    return [each for each in found if each is not None]


def _name(line: Line) -> str:
    return ", ".join(filter(None, (line.panel, line.label))) or "all"


def _pooled(own: Sequence[LastEpoch]) -> Correctness:
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
                name=_name(line), x=medians["recall/nll_nats"].tolist(), y=medians["match/expected_max"].tolist(),
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
            Trace(name=_name(line), x=numbers.tolist(), y=survival[numbers].tolist(), style=style.points(size=5))
        )
        if len(pooled) <= MAX_CELLS_APART:
            traces += _fitted(correctness, numbers, style, is_first=line is pooled[0][0])
    yield Chart(
        name="survival",
        title="Match lengths: share of samples that are recited for at least n tokens",
        x_title="n, tokens of the reference",
        y_title="P(N ≥ n)",
        caption="At the last epoch, replicates together, ended references allowed for (Kaplan and Meier). Lines: "
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
            (hazards.conditional, hazards.num_at_risk, _name(line), style),
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
                name=_name(line), x=sizes.tolist(), y=np.median(curves, axis=0).tolist(), style=style,
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
        caption="Exact, from the order statistics of all samples at the last epoch, up to a fifth of them: beyond it "
        "the curve is about these samples alone. Bands: from the least to the largest replicate. Dotted: the longest "
        "match of all.",
        traces=tuple(traces),
        x_scale="log",
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
        last = LastEpoch.of(trial, samples)
        if last is None:
            continue
        texts = _texts(samples)
        ends = zip(last.table["sample"].to_pylist(), last.table["row"].to_pylist(), last.correctness.num_match.tolist(),
                   last.correctness.length.tolist(), strict=True)  # fmt: skip
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
