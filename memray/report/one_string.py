"""One string token by token over the epochs, and the order in which its tokens were memorised: from the records of one
trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from memray.material import known_strings
from memray.measurement import KnownString
from memray.measures.order import acquisition_epochs, has_surprise
from memray.measures.recall import Guesser
from memray.report import column
from memray.report.charts import Chart, HeatMap, Style, Trace
from memray.report.records import Records, RecordsOf
from memray.spec import TrialSpec
from memray.strings import ALPHABETS, Stream
from memray.sweep import Sweep

# Rows of the heat map: more than fit its height show nothing more.
MAX_EPOCHS_SHOWN = 60
TIE = -1


def known_again(
    trial: TrialSpec, strings: pa.Table, stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]] | None:
    """A trial's strings, as `known_strings`; None for those of a text, whose source only a model's tokenizer knows."""
    if trial.strings.kind == "text" or not strings.num_rows:
        return None
    symbol_ids = np.array(strings["symbol_ids"][0].as_py())  # the same for every string of a trial
    return known_strings(trial, trial.source(), symbol_ids, stream)


@dataclass(frozen=True, kw_only=True)
class StringRecord:
    """The first trained string of a trial, with what a model predicted of it.

    Attributes:
        trial: Whose it is.
        positions: Of the scored targets in the string.
        epochs: The evaluated ones, ascending.
        log_prob: ln p of each target.
        argmax: Token id of the top prediction, `TIE` where there is none.
        symbols: The string, symbol by symbol, as people read it.
        names: Symbols by their token id.
        guesser: The best one without memory; None for a text.
    """

    trial: TrialSpec
    positions: Sequence[int]
    epochs: Sequence[int]
    log_prob: Float[ndarray, "epochs targets"]
    argmax: ndarray
    symbols: Sequence[str]
    names: dict[int, str]
    guesser: Guesser | None

    @classmethod
    def of(cls, trial: TrialSpec, records: Records) -> StringRecord | None:
        """From the records of a trial; None where there are none."""
        tokens, strings = records.tokens(), records.strings()
        if not tokens.num_rows or not strings.num_rows:
            return None
        known = known_again(trial, strings, "trained")
        tokens = tokens.select(["epoch", "is_held_out", "string", "position", "log_prob", "argmax"]).to_pandas()
        strings = strings.select(["role", "string", "text", "symbol_ids"]).to_pandas()
        own = tokens.loc[~tokens["is_held_out"] & (tokens["string"] == 0)]
        log_prob = own.pivot(index="epoch", columns="position", values="log_prob").sort_index()
        argmax = own.pivot(index="epoch", columns="position", values="argmax").sort_index()
        (first, *_) = strings.loc[(strings["role"] == "trained") & (strings["string"] == 0)].to_dict("records")
        return cls(
            trial=trial,
            positions=[int(each) for each in log_prob.columns],
            epochs=[int(each) for each in log_prob.index],
            log_prob=log_prob.to_numpy(dtype=np.float64),
            argmax=argmax.to_numpy(),
            symbols=_symbols(str(first["text"]), trial.strings.length),
            names=dict(zip(map(int, first["symbol_ids"]), ALPHABETS.get(trial.strings.alphabet, ""), strict=False)),
            guesser=known[1][0].truth.guesser if known else None,
        )

    def name_of(self, token_id: int) -> str:
        """A top prediction, for people."""
        return "a tie" if token_id == TIE else self.names.get(token_id, f"token {token_id}")

    def acquired(self) -> pd.Series:
        """The epoch at which each token with surprise was memorised, by position; nan if never. Nothing for a text."""
        if self.guesser is None:
            return pd.Series(dtype=np.float64)
        acquired = acquisition_epochs(self.log_prob, np.array(self.epochs), self.guesser)
        has_any = has_surprise(self.guesser)
        return pd.Series(acquired[has_any], index=np.array(self.positions)[has_any])


def _symbols(text: str, length: int) -> list[str]:
    """The symbols of a string's text, which are letters, or stand apart; a dot where they cannot be told."""
    for symbols in (list(text), text.split(" ")):
        if len(symbols) == length:
            return symbols
    return ["·"] * length


def best_recalled(sweep: Sweep, frame: pd.DataFrame) -> TrialSpec | None:
    """The trial whose string is recalled best at its last epoch, the first of equals; None where all have curricula.

    Of a curriculum, the last epoch is about the strings of its last stage, and no string is followed epoch by epoch.
    """
    ordered = frame.sort_values("epoch", kind="stable").groupby("trial_id").tail(1)
    recalled = dict(zip(ordered["trial_id"], np.nan_to_num(column(ordered, "recall/robust"), nan=-np.inf), strict=True))
    whole = [trial for trial in sweep.trials if trial.curriculum is None and trial.trial_id() in recalled]
    return max(whole, key=lambda trial: recalled[trial.trial_id()], default=None)


def best_string(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf) -> StringRecord | None:
    """The string that is recalled best; None where its records are not to be had."""
    trial = best_recalled(sweep, frame)
    return StringRecord.of(trial, records(trial.trial_id())) if trial else None


def token_map(record: StringRecord) -> HeatMap:
    """The probability of every token of the string at every epoch, or at some of them where there are many."""
    count = len(record.epochs)
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_EPOCHS_SHOWN)).round().astype(int))
    probability = np.exp(record.log_prob[rows])
    symbols = [record.symbols[position] for position in record.positions]
    hover = [
        [
            f"epoch {record.epochs[row]}, position {position}<br>{symbol!r}: p = {p:.3f}<br>"
            f"top prediction: {record.name_of(int(top))}"
            for position, symbol, p, top in zip(record.positions, symbols, shown, record.argmax[row], strict=True)
        ]
        for row, shown in zip(rows, probability, strict=True)
    ]
    return HeatMap(
        name="tokens",
        title="Probability of each token by epoch",
        x_title="position in the string",
        y_title="epoch",
        caption=f"The first string of trial {record.trial.trial_id()}: {_shortened(''.join(record.symbols))}",
        x=[str(position) for position in record.positions],
        y=[str(record.epochs[row]) for row in rows],
        values=probability,
        value_title="p of the true token",
        hover=hover,
    )


def _shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def order_chart(record: StringRecord) -> Chart:
    """The epoch at which each token was memorised against its position: half of its own surprise is gone for good."""
    by_position = record.acquired()
    positions, acquired = by_position.index.to_numpy(), by_position.to_numpy()
    arrived = ~np.isnan(acquired)
    above = 1.05 * max(record.epochs)
    hover = [f"position {position}: {record.symbols[position]!r}" for position in positions]
    late = [text for text, has_arrived in zip(hover, arrived, strict=True) if not has_arrived]
    return Chart(
        name="order",
        title="Epoch at which each token was memorised, by position",
        x_title="position in the string",
        y_title="epoch",
        caption=f"The first string of trial {record.trial.trial_id()}; from that epoch on p is at least the square "
        "root of the best guess. Arrows above: never.",
        traces=(
            Trace(
                name="memorised", x=positions[arrived].tolist(), y=acquired[arrived].tolist(),
                style=Style.numbered(0).points(),
                hover=[text for text, has_arrived in zip(hover, arrived, strict=True) if has_arrived],
            ),
            Trace(
                name="never", x=positions[~arrived].tolist(), y=[above] * len(late), hover=late,
                style=Style.numbered(1).points(marker="triangle-up"),
            ),
        ),
    )  # fmt: skip
