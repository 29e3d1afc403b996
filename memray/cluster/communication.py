"""Counts what a worker tells the others, in place of DeepSpeed's own log, which it takes the calls from.

DeepSpeed 0.19.8 keeps every call for ever, and notes for each the time of *all* calls of its kind so far: forty epochs
of a tiny model under ZeRO-3, 44 seconds in all, added up to 34 minutes, and a call took longer the more there had been.
"""

from typing import Any


class CommunicationLog:
    """Bytes and seconds of the collective calls that go through `deepspeed.comm`, scoring passes included.

    DeepSpeed names the bytes of the tensor that a worker hands over: all of it where it is reduced or broadcast, its
    own shard where shards are gathered. `sent_bytes` makes one measure of them: what a worker sends, on average over
    the workers, when each part of a tensor travels once to everyone who needs it (a ring). Objects (the scores that
    the engine gathers) and barriers have no tensor and count nothing.

    `seconds` is the time in the calls. With a log, an accelerator is waited for after each. On the CPU a call that
    returns before its work is done counts up to its return alone; ZeRO-3 gathers weights in that way.

    Args:
        world: Workers that every call is for.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.sent_bytes = 0.0
        self.seconds = 0.0
        self._timers: Any = None

    def install(self) -> None:
        """Takes over what DeepSpeed logs in this process; `deepspeed.initialize` switches that on, if its config does.

        A log of DeepSpeed's own is made anew, because none is ever switched off again.
        """
        from deepspeed.comm import comm
        from deepspeed.utils.comms_logging import CommsLogger

        self._timers = comm.timers
        comm.comms_logger = CommsLogger()
        comm.comms_logger.append = self._append

    def _append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        """One call, as DeepSpeed tells it: `latency` in milliseconds, `msg_size` in bytes."""
        self.sent_bytes += sent_bytes(raw_name, msg_size, self.world)
        self.seconds += latency / 1000
        self._timers(record_name).reset()  # or the next latency would contain this one


def sent_bytes(operation: str, size: int, world: int) -> float:
    """What each worker sends on average in one call, where `size` bytes are handed over and parts travel in a ring.

    Example:
        >>> [sent_bytes(name, 8, 4) for name in ("reduce_scatter_tensor", "all_reduce", "all_gather_into_tensor")]
        [6.0, 12.0, 24.0]
    """
    once = size * (world - 1) / world
    if operation.startswith("all_gather"):
        return once * world  # a shard was handed over
    # To be reduced and then to be told.
    return once * 2 if "all_reduce" in operation else once
