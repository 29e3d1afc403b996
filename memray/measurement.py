"""From token scores to measurements: of each string, and of the trial as a whole.

The same object measures a trial while it trains and again from the ledger's records, so that both give the same
numbers to the last bit. It knows no model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.measures.extraction import compare_with_heldout, measure_extraction
from memray.measures.order import OrderHistory, StringOrder, measure_order
from memray.measures.phases import centre, string_phases
from memray.measures.prefix import ContextScores, context_metrics
from memray.measures.recall import Truth, heldout_floor, measure_string, measure_strings, robust
from memray.probes import ContextSpec
from memray.scoring import TokenScores
from memray.spec import StopWhen, TrialSpec
from memray.strings import Source, empirical_entropy_bits, zlib_bits_per_symbol

TRAINED, HELD_OUT = "trained", "held_out"

# Set when a definition changes, and written with every result: numbers under different versions are not compared.
MEASURE_VERSIONS = {"recall": 1, "phases": 1, "order": 1, "extraction": 1, "context": 1, "match": 2}

# What tells the permutations of the order from other random numbers of the same seeds.
_ORDER_STREAM = 2


@dataclass(frozen=True)
class Measurement:
    """What one epoch of a trial showed.

    Attributes:
        epoch: 0 is before training.
        metrics: The trial's values by key; what is undefined, or censored, is absent.
        strings: One row a string, trained or held out: its measures, and its mean prediction.
        tokens: The scores behind them, by role.
        context: What the context probe showed, by role.
        weights: The model's weights at this epoch, where the spec keeps them.
        matrix: Of a curriculum: the recall of every string that was looked at since the last measurement.
        samples: Of a corpus: every sample, with the scores behind its measures,
        corpus: and the digest of its token ids, with what was left out and what occurs more than once.
        num_trained: Targets that were trained since the last measurement.
        scored_s: When the trained strings were scored, by a clock of the process that trained them.
    """

    trial_id: str
    stage: int
    epoch: int
    metrics: dict[str, float]
    strings: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    tokens: Mapping[str, TokenScores] = field(default_factory=dict, repr=False)
    context: Mapping[str, ContextScores] = field(default_factory=dict, repr=False)
    weights: Mapping[str, ndarray] | None = field(default=None, repr=False)
    matrix: pa.Table | None = field(default=None, repr=False)
    samples: pa.Table | None = field(default=None, repr=False)
    corpus: Mapping[str, Any] | None = field(default=None, repr=False)
    num_trained: int = field(default=0, repr=False)
    scored_s: float = field(default=0.0, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The part that is one line of JSON."""
        return {"trial_id": self.trial_id, "stage": self.stage, "epoch": self.epoch, "metrics": self.metrics}


@dataclass(frozen=True)
class KnownString:
    """One string with all that is known of it before any model has seen it."""

    text: str
    symbol_ids: Int[ndarray, " alphabet"]
    truth: Truth
    facts: dict[str, float]

    @classmethod
    def of(
        cls,
        string: Int[ndarray, " length"],
        *,
        source: Source,
        symbol_ids: Int[ndarray, " alphabet"],
        text: str,
        bos: bool,
    ) -> "KnownString":
        """With BOS every symbol is a target, without it all but the first."""
        first = 0 if bos else 1
        conditional = np.asarray(source.conditional(string))
        truth = Truth.of(
            string[first:], symbol_ids=symbol_ids, conditional=conditional[first:], marginal=np.asarray(source.marginal)
        )
        facts = {
            "string/nominal_entropy_bits": float(source.nominal_entropy_bits),
            "string/entropy_rate_bits": source.entropy_rate_bits(len(string)),
            "string/empirical_entropy_bits": empirical_entropy_bits(string),
            "string/zlib_bits": zlib_bits_per_symbol(string, alphabet_size=source.alphabet_size),
            "string/guesser_accuracy": truth.guesser.accuracy,
            "string/guesser_bits": -float(np.mean(truth.guesser.log2_probability)),
        }
        return cls(text, symbol_ids, truth, facts)


class Measurer:
    """Measures one trial, epoch after epoch."""

    def __init__(self, spec: TrialSpec, trained: Sequence[KnownString], held_out: Sequence[KnownString]) -> None:
        self.spec = spec
        self.trial_id = spec.trial_id()
        self.known = {TRAINED: trained, HELD_OUT: held_out}
        self.num_compared = spec.probes.compared_strings or len(trained)
        self.epochs: list[int] = []
        self.histories: list[dict[str, list[float]]] = [{} for _ in trained]
        self.orders = [OrderHistory.of(known.truth) for known in trained]
        self.heldout_uncorrected: list[float] = []
        self.least_heldout_nll = math.nan

    def measure(
        self,
        epoch: int,
        trained: TokenScores,
        held_out: TokenScores | None = None,
        *,
        context: Mapping[str, ContextScores] = MappingProxyType({}),
        is_last: bool = False,
        weights: Mapping[str, ndarray] | None = None,
    ) -> Measurement:
        """The measurement of one epoch; the last one carries the phases and the order, which need all of them."""
        metrics: dict[str, float] = {}
        tokens = {TRAINED: trained}
        strings: list[dict[str, Any]] = []
        if held_out is not None:
            tokens[HELD_OUT] = held_out
            strings += self._measure_role(HELD_OUT, epoch, held_out)
            metrics |= self._heldout_metrics(strings)
        floor = heldout_floor(np.array(self.heldout_uncorrected))
        rows = self._measure_role(TRAINED, epoch, trained)
        self._compare_with_heldout(rows, strings)
        for row, history in zip(rows, self.histories, strict=True):
            row["recall/robust"] = robust(row["recall/uncorrected"], floor)
            for key, value in row.items():
                if "/" in key:
                    history.setdefault(key, []).append(value)
        self._follow_order(epoch, trained, rows)
        self.epochs.append(epoch)
        compared = rows[: self.num_compared]
        averaged = [key for key in compared[0] if "/" in key and (epoch == 0 or not key.startswith("string/"))]
        metrics |= {key: mean(row[key] for row in compared) for key in averaged}
        if is_last:
            phases = self._phases()
            for row, values in zip(rows, phases, strict=True):
                row.update(values)
            metrics |= over_strings(phases[: self.num_compared])
            orders = self._orders()
            for row, order in zip(rows, orders, strict=True):
                row.update(measure_order([order]))
            metrics |= measure_order(orders[: self.num_compared])
        if context:
            metrics |= self._context_metrics(context)
            for role, own in ((TRAINED, rows), (HELD_OUT, strings)):
                self._add_extractable(own, context.get(role))
        defined = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return Measurement(
            self.trial_id,
            0,
            epoch,
            defined,
            tuple(rows + strings),
            tokens,
            context,
            weights,
            num_trained=len(trained.string) if epoch else 0,
        )

    def _measure_role(self, role: str, epoch: int, scores: TokenScores) -> list[dict[str, Any]]:
        rows = []
        for index, string in enumerate(self.known[role]):
            own = scores.of(index)
            named = {"epoch": epoch, "role": role, "string": index, "text": string.text}
            measures = measure_string(own, string.truth) | measure_extraction(own, string.truth)
            alphabet = {"symbol_ids": string.symbol_ids.tolist(), "mean_q": own.mean_q[0].tolist()}
            rows.append(named | alphabet | string.facts | measures)
        return rows

    def _heldout_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        uncorrected = mean(row["recall/uncorrected"] for row in rows)
        self.heldout_uncorrected.append(uncorrected)
        nll_nats = mean(row["recall/nll_nats"] for row in rows)
        self.least_heldout_nll = float(np.fmin(self.least_heldout_nll, nll_nats))
        return {
            "guessing/heldout_accuracy": mean(row["recall/token_accuracy"] for row in rows),
            "guessing/heldout_nll_nats": nll_nats,
            "guessing/heldout_kl_bits": mean(row["guessing/kl_position_bits"] for row in rows),
            "guessing/heldout_uncorrected": uncorrected,
        }

    def _context_metrics(self, context: Mapping[str, ContextScores]) -> dict[str, float]:
        stated = self.spec.probes.context
        assert stated is not None
        context = {**context, TRAINED: context[TRAINED].first(self.num_compared)}
        guesses = {
            role: [known.truth.guesser.log2_probability for known in self.known[role][: scores.num_strings]]
            for role, scores in context.items()
        }
        return context_metrics(
            context[TRAINED],
            context.get(HELD_OUT),
            spec=stated,
            length=self.spec.strings.length,
            log2_guesses=guesses[TRAINED],
            heldout_log2_guesses=guesses.get(HELD_OUT, []),
        )

    def _add_extractable(self, rows: Sequence[dict[str, Any]], context: ContextScores | None) -> None:
        if context is not None and self.spec.probes.context is not None:
            for row, shares in zip(rows, context.extractable, strict=False):  # not all strings need be probed
                row |= {
                    f"extractable/{k}": float(share)
                    for k, share in zip(self.spec.probes.context.extractable, shares, strict=True)
                }

    def _compare_with_heldout(self, rows: Sequence[dict[str, Any]], heldout: Sequence[Mapping[str, Any]]) -> None:
        compared = compare_with_heldout(
            np.array([row["recall/nll_nats"] for row in rows]),
            np.array([row["recall/nll_nats"] for row in heldout]),
            least_heldout=self.least_heldout_nll,
        )
        for index, row in enumerate(rows):
            row.update({key: float(values[index]) for key, values in compared.items()})

    def _follow_order(self, epoch: int, scores: TokenScores, rows: Sequence[Mapping[str, Any]]) -> None:
        self.orders = [
            order.after(epoch, scores.of(index), known.truth, corrected_accuracy=row["recall/corrected_accuracy"])
            for index, (order, known, row) in enumerate(zip(self.orders, self.known[TRAINED], rows, strict=True))
        ]

    def _orders(self) -> list[StringOrder]:
        """The permutations come from the trial's seeds, so that the same records give the same p-values."""
        seeds = [_ORDER_STREAM, self.spec.string_seed, self.spec.model_seed, self.spec.order_seed]
        return [
            StringOrder.of(history, known.truth, rng=np.random.default_rng([*seeds, index]))
            for index, (history, known) in enumerate(zip(self.orders, self.known[TRAINED], strict=True))
        ]

    def _phases(self) -> list[dict[str, float]]:
        return [
            string_phases(
                {key: np.array(values) for key, values in history.items()},
                np.array(self.epochs),
                entropy_bits=known.facts["string/nominal_entropy_bits"],
                num_targets=len(known.truth.targets),
                steps_per_epoch=float(self.spec.steps_per_epoch),
            )
            for history, known in zip(self.histories, self.known[TRAINED], strict=True)
        ]


class Stopper:
    """Decides, from each epoch's scores, whether the criterion has held for long enough.

    It looks at all trained strings: which of them are compared must not decide when training stops.
    """

    def __init__(self, rule: StopWhen, known: Sequence[KnownString]) -> None:
        self.rule = rule
        self.known = known
        self.num_met = 0

    @property
    def has_stopped(self) -> bool:
        return self.num_met >= self.rule.epochs

    def __call__(self, scores: TokenScores) -> bool:
        measured = measure_strings(scores, [string.truth for string in self.known])
        self.num_met = self.num_met + 1 if mean(measured[self.rule.metric]) >= self.rule.at_least else 0
        return self.has_stopped


def mean(values: Iterable[float]) -> float:
    """The mean over the strings where the measure is defined; nan if it is defined for none."""
    defined = [value for value in values if math.isfinite(value)]
    return float(np.mean(defined)) if defined else math.nan


def over_strings(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The trial's phases: medians over its strings."""
    return {key: centre(key, np.array([each[key] for each in phases])) for key in phases[0]}


# --- records ---------------------------------------------------------------------------------------------------


def token_table(measurements: Sequence[Measurement]) -> pa.Table:
    """The scores of some epochs, one row a target; of a curriculum none, which keeps what each string comes to.

    This and all other tables are without columns where they have no rows.
    """
    parts = [(each.epoch, role, scores) for each in measurements for role, scores in each.tokens.items()]
    return _score_table(parts, TokenScores.COLUMNS)


def context_table(measurements: Sequence[Measurement]) -> pa.Table:
    """What the context probe showed at some epochs, one row a target, condition and redraw."""
    parts = [(each.epoch, role, scores) for each in measurements for role, scores in each.context.items()]
    return _score_table(parts, ContextScores.COLUMNS)


def matrix_table(measurements: Sequence[Measurement]) -> pa.Table:
    """The recall matrix of some stages of a curriculum, one row a string and look."""
    return _joined([each.matrix for each in measurements])


def samples_table(measurements: Sequence[Measurement]) -> pa.Table:
    """The samples of a corpus at some epochs, one row a sample and epoch."""
    return _joined([each.samples for each in measurements])


def _joined(parts: Sequence[pa.Table | None]) -> pa.Table:
    tables = [part for part in parts if part is not None]
    return pa.concat_tables(tables) if tables else pa.table({})


def _score_table(parts: Sequence[tuple[int, str, TokenScores | ContextScores]], names: tuple[str, ...]) -> pa.Table:
    """The named columns of scores by epoch and role."""
    if not parts:
        return pa.table({})
    counts = [len(scores.string) for _, _, scores in parts]
    columns: dict[str, Any] = {
        "epoch": np.repeat(np.array([epoch for epoch, _, _ in parts], dtype=np.int32), counts),
        "is_held_out": np.repeat(np.array([role == HELD_OUT for _, role, _ in parts]), counts),
    }
    for name in names:
        columns[name] = np.concatenate([getattr(scores, name) for _, _, scores in parts])
    return pa.table(columns)


def _parts_of(table: pa.Table, names: tuple[str, ...]) -> Iterator[tuple[int, str, dict[str, ndarray]]]:
    """The inverse: epoch, role and columns, epochs ascending."""
    columns = {name: table[name].to_numpy() for name in table.column_names}
    for epoch in np.unique(columns["epoch"]):
        for role in (TRAINED, HELD_OUT):
            chosen = (columns["epoch"] == epoch) & (columns["is_held_out"] == (role == HELD_OUT))
            if chosen.any():
                yield int(epoch), role, {name: columns[name][chosen] for name in names}


def read_context(context: pa.Table, strings: pa.Table, spec: ContextSpec) -> dict[int, dict[str, ContextScores]]:
    """The inverse: by epoch and role. What is extractable stands with the strings."""
    rows = strings.select(["epoch", "role", "string", *(f"extractable/{k}" for k in spec.extractable)]).to_pylist()
    read: dict[int, dict[str, ContextScores]] = {}
    for epoch, role, columns in _parts_of(context, ContextScores.COLUMNS):
        own = [row for row in rows if row["epoch"] == epoch and row["role"] == role]
        shares = [
            [math.nan if (share := row[f"extractable/{k}"]) is None else share for k in spec.extractable]
            for row in own[: columns["string"].max() + 1]
        ]
        extractable = np.array(shares, dtype=np.float64).reshape(len(shares), len(spec.extractable))
        read.setdefault(epoch, {})[role] = ContextScores(**columns, extractable=extractable)
    return read


def string_table(measurements: Sequence[Measurement]) -> pa.Table:
    """The measures of each string at some epochs, one row a string and epoch; undefined values are null."""
    rows = [row for each in measurements for row in each.strings]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pa.table(
        {
            name: pa.array(values, from_pandas=True, type=pa.float64() if "/" in name else None)
            for name, values in columns.items()
        }
    )


def read_scores(tokens: pa.Table, strings: pa.Table) -> list[tuple[int, TokenScores, TokenScores | None]]:
    """The inverse of the two tables: (epoch, scores of the trained strings, of the held-out ones or None)."""
    means = strings.select(["epoch", "role", "string", "mean_q"]).to_pylist()
    read: dict[int, dict[str, TokenScores]] = {}
    for epoch, role, columns in _parts_of(tokens, TokenScores.COLUMNS):
        own = [row["mean_q"] for row in means if row["epoch"] == epoch and row["role"] == role]
        read.setdefault(epoch, {})[role] = TokenScores(**columns, mean_q=np.array(own))
    return [(epoch, scores[TRAINED], scores.get(HELD_OUT)) for epoch, scores in read.items()]


def remeasure(
    spec: TrialSpec,
    trained: Sequence[KnownString],
    held_out: Sequence[KnownString],
    tokens: pa.Table,
    strings: pa.Table,
    context: pa.Table | None = None,
) -> list[Measurement]:
    """Every measure of a trial, computed again from its records."""
    measurer = Measurer(spec, trained, held_out)
    read = read_scores(tokens, strings)
    stated = spec.probes.context
    by_epoch = read_context(context, strings, stated) if stated and context is not None and context.num_rows else {}
    return [
        measurer.measure(epoch, scores, heldout, context=by_epoch.get(epoch, {}), is_last=index == len(read) - 1)
        for index, (epoch, scores, heldout) in enumerate(read)
    ]
