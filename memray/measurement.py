"""From token scores to measurements: of each string, and of the trial as a whole.

The same object measures a trial while it trains and again from the ledger's records, so that both give the same
numbers to the last bit. It knows no model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.measures.phases import centre, string_phases
from memray.measures.recall import Truth, heldout_floor, measure_string, robust
from memray.scoring import TokenScores
from memray.spec import TrialSpec
from memray.strings import Source, empirical_entropy_bits, zlib_bits_per_symbol

TRAINED, HELD_OUT = "trained", "held_out"

# Set when a definition changes, and written with every result: numbers under different versions are not compared.
MEASURE_VERSIONS = {"recall": 1, "phases": 1}


@dataclass(frozen=True)
class Measurement:
    """What one epoch of a trial showed.

    Attributes:
        epoch: 0 is before training.
        metrics: The trial's values by key; what is undefined, or censored, is absent.
        strings: One row a string, trained or held out: its measures, and its mean prediction.
        tokens: The scores behind them, by role.
        weights: The model's weights at this epoch, where the spec keeps them.
        scored_s: When the trained strings were scored, by a clock of the process that trained them.
    """

    trial_id: str
    stage: int
    epoch: int
    metrics: dict[str, float]
    strings: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    tokens: Mapping[str, TokenScores] = field(default_factory=dict, repr=False)
    weights: Mapping[str, ndarray] | None = field(default=None, repr=False)
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
        self.heldout_uncorrected: list[float] = []

    def measure(
        self,
        epoch: int,
        trained: TokenScores,
        held_out: TokenScores | None = None,
        *,
        is_last: bool = False,
        weights: Mapping[str, ndarray] | None = None,
    ) -> Measurement:
        """The measurement of one epoch; the last one carries the phases, which need all of them."""
        metrics: dict[str, float] = {}
        tokens = {TRAINED: trained}
        strings: list[dict[str, Any]] = []
        if held_out is not None:
            tokens[HELD_OUT] = held_out
            strings += self._measure_role(HELD_OUT, epoch, held_out)
            metrics |= self._heldout_metrics(strings)
        floor = heldout_floor(np.array(self.heldout_uncorrected))
        rows = self._measure_role(TRAINED, epoch, trained)
        for row, history in zip(rows, self.histories, strict=True):
            row["recall/robust"] = robust(row["recall/uncorrected"], floor)
            for key, value in row.items():
                if "/" in key:
                    history.setdefault(key, []).append(value)
        self.epochs.append(epoch)
        compared = rows[: self.num_compared]
        averaged = [key for key in compared[0] if "/" in key and (epoch == 0 or not key.startswith("string/"))]
        metrics |= {key: _mean(row[key] for row in compared) for key in averaged}
        if is_last:
            phases = self._phases()
            for row, values in zip(rows, phases, strict=True):
                row.update(values)
            metrics |= _over_strings(phases[: self.num_compared])
        defined = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return Measurement(self.trial_id, 0, epoch, defined, tuple(rows + strings), tokens, weights)

    def trained_metric(self, key: str, scores: TokenScores) -> float:
        """One measure of the trained strings alone, averaged as the trial's metric is."""
        compared = enumerate(self.known[TRAINED][: self.num_compared])
        return _mean(measure_string(scores.of(index), string.truth)[key] for index, string in compared)

    def _measure_role(self, role: str, epoch: int, scores: TokenScores) -> list[dict[str, Any]]:
        rows = []
        for index, string in enumerate(self.known[role]):
            own = scores.of(index)
            named = {"epoch": epoch, "role": role, "string": index, "text": string.text}
            measures = measure_string(own, string.truth)
            alphabet = {"symbol_ids": string.symbol_ids.tolist(), "mean_q": own.mean_q[0].tolist()}
            rows.append(named | alphabet | string.facts | measures)
        return rows

    def _heldout_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        uncorrected = _mean(row["recall/uncorrected"] for row in rows)
        self.heldout_uncorrected.append(uncorrected)
        return {
            "guessing/heldout_accuracy": _mean(row["recall/token_accuracy"] for row in rows),
            "guessing/heldout_nll_nats": _mean(row["recall/nll_nats"] for row in rows),
            "guessing/heldout_kl_bits": _mean(row["guessing/kl_position_bits"] for row in rows),
            "guessing/heldout_uncorrected": uncorrected,
        }

    def _phases(self) -> list[dict[str, float]]:
        return [
            string_phases(
                {key: np.array(values) for key, values in history.items()},
                np.array(self.epochs),
                entropy_bits=self.spec.strings.source().nominal_entropy_bits,
                num_targets=len(known.truth.targets),
                steps_per_epoch=float(self.spec.steps_per_epoch),
            )
            for history, known in zip(self.histories, self.known[TRAINED], strict=True)
        ]


def _mean(values: Iterable[float]) -> float:
    """The mean over the strings where the measure is defined; nan if it is defined for none."""
    defined = [value for value in values if math.isfinite(value)]
    return float(np.mean(defined)) if defined else math.nan


def _over_strings(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The trial's phases: medians over its strings."""
    return {key: centre(key, np.array([each[key] for each in phases])) for key in phases[0]}


# --- records ---------------------------------------------------------------------------------------------------


def token_table(measurements: Sequence[Measurement]) -> pa.Table:
    """The scores of some epochs, one row a target."""
    parts = [(each.epoch, role, scores) for each in measurements for role, scores in each.tokens.items()]
    counts = [len(scores.string) for _, _, scores in parts]
    columns: dict[str, Any] = {
        "epoch": np.repeat(np.array([epoch for epoch, _, _ in parts], dtype=np.int32), counts),
        "is_held_out": np.repeat(np.array([role == HELD_OUT for _, role, _ in parts]), counts),
    }
    for name in TokenScores.COLUMNS:
        columns[name] = np.concatenate([getattr(scores, name) for _, _, scores in parts])
    return pa.table(columns)


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
    columns = {name: tokens[name].to_numpy() for name in tokens.column_names}
    read = []
    for epoch in np.unique(columns["epoch"]):
        scores = {}
        for role in (TRAINED, HELD_OUT):
            chosen = (columns["epoch"] == epoch) & (columns["is_held_out"] == (role == HELD_OUT))
            if chosen.any():
                own = [row["mean_q"] for row in means if row["epoch"] == epoch and row["role"] == role]
                picked = {name: columns[name][chosen] for name in TokenScores.COLUMNS}
                scores[role] = TokenScores(**picked, mean_q=np.array(own))
        read.append((int(epoch), scores[TRAINED], scores.get(HELD_OUT)))
    return read


def remeasure(spec: TrialSpec, trained: Sequence[KnownString], held_out: Sequence[KnownString], tokens: pa.Table,
              strings: pa.Table) -> list[Measurement]:  # fmt: skip
    """Every measure of a trial, computed again from its records."""
    measurer = Measurer(spec, trained, held_out)
    read = read_scores(tokens, strings)
    return [
        measurer.measure(epoch, scores, heldout, is_last=index == len(read) - 1)
        for index, (epoch, scores, heldout) in enumerate(read)
    ]
