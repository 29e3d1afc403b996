"""Who holds a trial: leases that are renewed while a process works, and die with it.

Exclusion may fail all the same (a paused process, a wrong clock); the ledger is built so that this costs work, never
numbers.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who holds a trial. Times are seconds since 1970 by the holder's clock; hosts agree to a few seconds.

    `host` is for people; `machine` (boot and process namespace) says whether `pid` means anything here, and
    `pid_started` (clock ticks since boot) that it is still the same process.
    """

    launch: str
    attempt: int
    host: str
    machine: str | None
    pid: int
    pid_started: int | None
    claimed_s: float
    renewed_s: float
    released_s: float | None = None

    @classmethod
    def of_this_process(cls, launch: str, attempt: int) -> "Lease":
        """A lease that this process takes now."""
        now, pid = time.time(), os.getpid()
        stat = _process_stat(pid)
        return cls(
            launch=launch,
            attempt=attempt,
            host=socket.gethostname(),
            machine=_this_machine(),
            pid=pid,
            pid_started=None if stat is None else stat[1],
            claimed_s=now,
            renewed_s=now,
        )

    def is_live(self, expiry_s: float) -> bool:
        """Whether the holder may still be at work: not released, renewed lately, not known to be gone."""
        # A time far ahead is no time: its lease would never end.
        if self.released_s is not None or not abs(time.time() - self.renewed_s) <= expiry_s:
            return False
        here = self.machine is not None and self.machine == _this_machine()
        return not here or _is_running(self.pid, self.pid_started)


def _this_machine() -> str | None:
    """Names the boot and the process namespace, for containers share host names and count their own pids.

    None where there is no /proc (macOS): there a dead holder's lease is waited out.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_stat(pid: int) -> tuple[str, int] | None:
    """A process's state letter and its start in clock ticks since boot; None where they cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in brackets and may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _is_running(pid: int, started: int | None) -> bool:
    """Whether a process of this machine is there, is more than a zombie, and is the one that started then."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process, which /proc may hide from us
    stat = _process_stat(pid)
    return stat is None or (stat[0] not in "ZX" and stat[1] == started)
