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


# Up to this share of samples that are recited to the end of their references, match lengths have a tail: where many
# are, the longest references are the longest matches.
FEW_WHOLE = 0.05
# Where fewer than this share are, right and wrong tokens are there to depend on each other, and samples to differ.
HALF_WHOLE = 0.5

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
    def last(trial: TrialSpec, samples: pa.Table) -> SamplesSeen:
        """At the last epoch."""
        return SamplesSeen.at(trial, samples, int(samples["epoch"].to_numpy().max()))

    @staticmethod
    def few_whole(trial: TrialSpec, samples: pa.Table) -> SamplesSeen | None:
        """At the last epoch of training before more than a few of those that are compared are recited whole.

        At the last epoch, where more are from the first look on.
        """
        if not samples.num_columns:
            return None
        found = None
        for epoch in sorted({*samples["epoch"].to_pylist()} - {0}):
            seen = SamplesSeen.at(trial, samples, epoch)
            compared = seen.correctness.is_censored[: trial.probes.compared_strings or None]
            if np.mean(compared) > FEW_WHOLE:
                break
            found = seen
        return found or SamplesSeen.last(trial, samples)

    @staticmethod
    def at(trial: TrialSpec, samples: pa.Table, epoch: int) -> SamplesSeen:
        """At one of the epochs that its records have."""
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
