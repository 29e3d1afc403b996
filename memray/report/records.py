"""What a trial has shown token by token, as figures read it that metrics do not suffice for.

The tables of a whole study may not fit into memory. So a figure asks for one trial at a time, and keeps of its records
what it draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.material import known_strings
from memray.measurement import KnownString
from memray.measures.match_length import Correctness
from memray.sample_measurement import ScoredSamples
from memray.samples import NATIVE
from memray.spec import TrialSpec
from memray.strings import Stream


@runtime_checkable
class Records(Protocol):
    """The records of one trial, wherever they are kept: each verb reads them anew. A table may have no rows."""

    def tokens(self) -> pa.Table:
        """One row a target and epoch."""
        ...

    def strings(self) -> pa.Table:
        """One row a string and epoch."""
        ...

    def context(self) -> pa.Table:
        """One row a target, epoch, condition and redraw of the context probe."""
        ...

    def matrix(self) -> pa.Table:
        """One row a string and look of a curriculum; it has no columns if there are none."""
        ...

    def samples(self) -> pa.Table:
        """One row a sample and probe epoch of a corpus; it has no columns if there are none."""
        ...


# Samples are partly recited where less than this share of them is recited to the end of its reference.
PARTLY = 0.5

# By the trial's id.
RecordsOf = Callable[[str], Records]


@dataclass(frozen=True)
class SamplesSeen:
    """The native samples of one trial at one of its probe epochs.

    Attributes:
        table: A row a sample.
        correctness: Which tokens of their references are right, in the same order.
    """

    trial: TrialSpec
    table: pa.Table
    correctness: Correctness

    @staticmethod
    def last(trial: TrialSpec, samples: pa.Table) -> SamplesSeen | None:
        """At the last epoch, from the records of a trial; None where there are none."""
        if not samples.num_columns:
            return None
        return SamplesSeen._at(trial, samples, int(samples["epoch"].to_numpy().max()))

    @staticmethod
    def partly(trial: TrialSpec, samples: pa.Table) -> SamplesSeen | None:
        """At the last epoch of training at which fewer than half are recited whole: where all are, there is no tail.

        At the last epoch, where there is no such one.
        """
        if not samples.num_columns:
            return None
        for epoch in sorted({*samples["epoch"].to_pylist()} - {0}, reverse=True):
            seen = SamplesSeen._at(trial, samples, epoch)
            if np.mean(seen.correctness.is_censored) < PARTLY:
                return seen
        return SamplesSeen.last(trial, samples)

    @staticmethod
    def _at(trial: TrialSpec, samples: pa.Table, epoch: int) -> SamplesSeen:
        table = samples.filter(pa.array(samples["epoch"].to_numpy() == epoch))
        (scored,) = ScoredSamples.read(table)
        native = scored.role == NATIVE
        return SamplesSeen(trial, table.filter(pa.array(native)), scored.reference(native)[0])


def known_again(
    trial: TrialSpec, strings: pa.Table, stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]] | None:
    """A trial's strings, as `known_strings`; None for those of a text, whose source only a model's tokenizer knows."""
    if trial.strings.kind == "text" or not strings.num_rows:
        return None
    symbol_ids = np.array(strings["symbol_ids"][0].as_py())  # the same for every string of a trial
    return known_strings(trial, trial.source(), symbol_ids, stream)
