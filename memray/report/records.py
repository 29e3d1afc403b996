"""What a trial has shown token by token, as figures read it that metrics do not suffice for.

The tables of a whole study may not fit into memory. So a figure asks for one trial at a time, and keeps of its records
what it draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from memray.material import known_strings
from memray.measurement import KnownString
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


# By the trial's id.
RecordsOf = Callable[[str], Records]


def known_again(
    trial: TrialSpec, strings: pa.Table, stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]] | None:
    """A trial's strings, as `known_strings`; None for those of a text, whose source only a model's tokenizer knows."""
    if trial.strings.kind == "text" or not strings.num_rows:
        return None
    symbol_ids = np.array(strings["symbol_ids"][0].as_py())  # the same for every string of a trial
    return known_strings(trial, trial.source(), symbol_ids, stream)
