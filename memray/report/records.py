"""What a trial has shown token by token, as figures read it that metrics do not suffice for.

The tables of a whole study may not fit into memory. So a figure asks for one trial at a time, and keeps of its records
what it draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import pyarrow as pa


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
