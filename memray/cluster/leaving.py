"""How a process makes room in time: asked with SIGTERM, its trial keeps a checkpoint and leaves.

A cluster that takes a node back says so first, with SIGTERM to what runs there. Who is asked and has others to ask (a
launch its trials, the actor of a trial its workers) does so through the ledger (`Ledger.ask_to_leave`), for they are on
other machines.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# Seconds that a launch gives its trials to leave, and `infra/` gives a launch and a node.
GRACE_S = 60.0

_asked = threading.Event()
_at_work = threading.Event()


class Left(RuntimeError):  # noqa: N818
    """A trial was asked to make room: it kept a checkpoint, from which it goes on elsewhere."""


def leave_on_sigterm() -> None:
    """Lets SIGTERM ask this process to leave, in place of Ray's handler, which ends it at once; in its main thread."""
    signal.signal(signal.SIGTERM, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    _asked.set()
    if not _at_work.is_set():
        sys.exit(1)


def is_asked() -> bool:
    """Whether this process was asked."""
    return _asked.is_set()


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """While a trial is at work SIGTERM waits for it, and raises `Left` in one that has only come."""
    _at_work.set()
    try:
        if is_asked():
            raise Left("this process was asked to leave before the trial began")
        yield
    finally:
        _at_work.clear()
