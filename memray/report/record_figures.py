"""The figures that need the tokens of many trials: how much of its prefix each token needs, and whether models memorise
them in one order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from memray.measurement import HELD_OUT, TRAINED, KnownString, read_context
from memray.measures.order import UNDEFINED, Correlation, agreement, has_surprise, mean_correlation
from memray.measures.prefix import ContextScores, chance_prefix, determining_prefix, minimal_prefix, share_sufficient
from memray.report.charts import Chart, Style, Trace
from memray.report.one_string import StringRecord, known_again
from memray.report.probe_figures import MAX_CELLS_APART, of_cell, replicate_trace
from memray.report.records import Records, RecordsOf
from memray.report.replicates import Quantity, Seen, groups, last_value
from memray.spec import ModelSpec, TrialSpec


def record_figures(cells: Sequence[Seen], records: RecordsOf) -> Iterator[Chart]:
    """Those that the cells allow."""
    yield from _sufficient_prefixes(cells, records)
    yield from _agreements(cells, records)


# --- the prefix that is enough -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """How many of the tokens before it each token with surprise needs; nan where all of them are not enough.

    Only tokens that have the longest finite prefix before them are among these. The others can need no more tokens than
    there are, so that their share within k would rise along the string, whatever is recalled.

    Attributes:
        lengths: The finite numbers of tokens that the last context probe tried.
        trained: What it takes there to recall each token of the trained strings (`minimal_prefix`).
        held_out: The same of the held-out strings, where no memory helps.
        determining: What it takes to look each token of the trained strings up in its string (`determining_prefix`).
    """

    lengths: tuple[int, ...]
    trained: Float[ndarray, " tokens"]
    held_out: Float[ndarray, " heldout_tokens"]
    determining: Float[ndarray, " tokens"]

    @classmethod
    def of(cls, trial: TrialSpec, records: Records) -> Prefixes | None:
        """From the records of a trial; None where they hold no context probe, and for a text."""
        spec, context, strings = trial.probes.context, records.context(), records.strings()
        trained, held_out = known_again(trial, strings, "trained"), known_again(trial, strings, "held_out")
        if spec is None or trained is None or held_out is None or not context.num_rows:
            return None
        epochs = context["epoch"].to_numpy()
        (scores,) = read_context(context.filter(epochs == epochs.max()), strings, spec).values()
        own = scores[TRAINED].first(trial.probes.compared_strings or scores[TRAINED].num_strings)
        length, lengths = trial.strings.length, spec.curve_lengths(trial.strings.length)
        exact = [determining_prefix(string) for string in trained[0][: own.num_strings]]
        return cls(
            lengths=lengths,
            trained=_recalled(own, trained[1], lengths, length),
            held_out=_recalled(scores[HELD_OUT], held_out[1], lengths, length) if HELD_OUT in scores else np.empty(0),
            determining=_compared(exact, trained[1], length - lengths[-1]),
        )


def _recalled(
    scores: ContextScores, known: Sequence[KnownString], lengths: tuple[int, ...], length: int
) -> Float[ndarray, " tokens"]:
    """The minimal prefixes of the strings that were probed, the first ones of those known."""
    guesses = [each.truth.guesser.log2_probability for each in known[: scores.num_strings]]
    minimal = [
        minimal_prefix(scores, string=string, lengths=lengths, length=length, log2_guess=guess)
        for string, guess in enumerate(guesses)
    ]
    return _compared(minimal, known, length - lengths[-1])


def _compared(
    needed: Sequence[Float[ndarray, " _"]], known: Sequence[KnownString], num_last: int
) -> Float[ndarray, " tokens"]:
    """What is needed for those of the last tokens of each string that have surprise."""
    compared = []
    for each, string in zip(needed, known, strict=False):  # not all strings need be probed
        has_any = has_surprise(string.truth.guesser)[-num_last:]
        compared.append(each[-len(has_any) :][has_any])
    return np.concatenate(compared)


def _sufficient_prefixes(cells: Sequence[Seen], records: RecordsOf) -> Iterator[Chart]:
    """The share of tokens that k tokens before them are enough for, by k."""
    for cell in cells[:MAX_CELLS_APART]:
        probed = [trial for trial, rows in cell.rows if not math.isnan(last_value(rows, "context/sufficient_share"))]
        read = {trial.trial_id(): Prefixes.of(trial, records(trial.trial_id())) for trial in probed}
        if found := {trial_id: each for trial_id, each in read.items() if each is not None and len(each.trained)}:
            yield _sufficient_prefix(cell, found)


def _sufficient_prefix(cell: Seen, found: Mapping[str, Prefixes]) -> Chart:
    (lengths, *_), length = (each.lengths for each in found.values()), cell.spec.strings.length
    curves = (
        ("exact", range(lengths[-1] + 1), {key: each.determining for key, each in found.items()}, Style.numbered(1)),
        ("held-out", lengths, {key: each.held_out for key, each in found.items()}, Style(dash="dot", marker="circle")),
        ("trained", lengths, {key: each.trained for key, each in found.items()}, Style.numbered(0)),
    )
    traces: list[Trace] = []
    for name, shown, tokens, style in curves:
        traces.append(replicate_trace(cell, {k: _share(tokens, k) for k in shown}, name, style))
        full = cell.median(_share(tokens, length))
        hollow, hover = style.points(is_open=True), [f"full prefix: {full:.2f}"]
        traces.append(Trace(name="", x=[1.06 * lengths[-1]], y=[full], style=hollow, hover=hover))
    if cell.spec.strings.kind == "iid":  # in others, places agree for more than chance
        k = chance_prefix(cell.spec.source().marginal, length)
        traces.append(Trace(name=f"k* = {k:.3g}", x=[k, k], y=[0.0, 1.0], style=Style(dash="dashdot")))
    return Chart(
        name="sufficient",
        title="Share of tokens for which a prefix is enough" + of_cell(cell),
        x_title="local tokens that stay true (k)",
        y_title="share of tokens",
        caption=f"Of tokens with at least {lengths[-1]} before them. Trained: recalled from the last k, and from any "
        "more, behind fresh symbols of the source, at the last probe epoch. Held-out: the same of strings never "
        "trained. Exact: wherever these k stand in the string, the same symbol follows. k*: in so many tokens about "
        "one pair of places of a random string agrees. Hollow: the full prefix. Medians over replicates; bands: their "
        "range.",
        traces=tuple(traces),
        y_range=(-0.03, 1.04),
    )


def _share(tokens: Mapping[str, Float[ndarray, " tokens"]], k: int) -> Quantity:
    """The share of a trial's tokens that need at most k before them."""

    def quantity(trial: TrialSpec, rows: pd.DataFrame) -> float:
        own = tokens.get(trial.trial_id(), np.empty(0))
        return float(share_sufficient(own, [k])[0]) if len(own) else math.nan

    return quantity


# --- the order in several models -----------------------------------------------------------------------------------

# What may differ between models that are trained on the same string.
MODEL = ("model.",)
# Of the orders that chance makes.
CHANCE = (0.025, 0.975)


def _agreements(cells: Sequence[Seen], records: RecordsOf) -> Iterator[Chart]:
    """Whether models memorise the tokens of a string in one order: a point a string, by what else the study moves."""
    kinds = [(kind, _shared(kind)) for kind in groups(cells, lambda cell: cell.held(MODEL))]
    kinds = [(kind, shared) for kind, shared in kinds if shared][:MAX_CELLS_APART]
    traces: list[Trace] = []
    for index, (kind, shared) in enumerate(kinds):
        agreed = {seed: _agreement(seed, trials, records) for seed, trials in shared.items()}
        hover = {seed: f"string {seed}, {len(trials)} models" for seed, trials in shared.items()}
        traces += _agreement_traces(kind[0].where(MODEL) or "all", agreed, hover, Style.numbered(index))
    if traces:
        yield Chart(
            name="agreement",
            title="Agreement of models on the order in which the tokens of a string are memorised",
            x_title="strings",
            y_title="Spearman's correlation",
            caption="Of the epochs at which each token was memorised: a point a string, the mean over all pairs of the "
            "models that were trained on it. Coloured strokes: means over strings, with their p-value against tokens "
            "permuted in each model; between the grey ones lie 95 % of such permutations of a string. Symbols that "
            "come late in every model for being rare, and weights that began alike, make models agree, too.",
            traces=tuple(traces),
            x_scale="category",
            y_range=(-1.04, 1.04),
        )


def _shared(kind: Sequence[Seen]) -> dict[int, list[TrialSpec]]:
    """By string seed: the trials of different models, where one string has several."""
    models: dict[int, dict[tuple[ModelSpec, int], TrialSpec]] = {}
    for trial, _ in (each for cell in kind for each in cell.rows):
        models.setdefault(trial.string_seed, {}).setdefault((trial.model, trial.model_seed), trial)
    return {seed: [*trials.values()] for seed, trials in sorted(models.items()) if len(trials) > 1}


def _agreement(string_seed: int, trials: Sequence[TrialSpec], records: RecordsOf) -> Correlation:
    """Over the tokens that all of the models predict: with BOS the first symbol is one, without it is none."""
    strings = (StringRecord.of(trial, records(trial.trial_id())) for trial in trials)
    acquired = [each.acquired() for each in strings if each is not None]
    if not acquired:
        return UNDEFINED
    # The same permutations whenever a report is written.
    rng = np.random.default_rng(string_seed)
    return agreement(pd.concat(acquired, axis=1, join="inner").to_numpy().T, rng=rng)


def _agreement_traces(
    where: str, agreed: Mapping[int, Correlation], hover: Mapping[int, str], style: Style
) -> Iterator[Trace]:
    defined = {seed: each for seed, each in agreed.items() if not math.isnan(each.value)}
    if defined:
        mean = mean_correlation([*defined.values()])
        mean_text = f"{mean.value:.2f}".replace("-", "−")
        chance = np.quantile(np.concatenate([each.null for each in defined.values()]), CHANCE)
        yield Trace(
            name=f"{where}: mean {mean_text}, p = {mean.p_value:.2g}", x=[where] * len(defined),
            y=[each.value for each in defined.values()], hover=[hover[seed] for seed in defined],
            style=style.points(size=8),
        )  # fmt: skip
        yield Trace(
            name="", x=[where], y=[mean.value], style=style.points(size=34, marker="line-ew"),
            hover=[f"mean: {mean_text}"],
        )  # fmt: skip
        yield Trace(
            name="", x=[where] * 2, y=chance.tolist(), style=Style().points(size=20, marker="line-ew"),
            hover=["95 % of permutations lie between"] * 2,
        )  # fmt: skip
