"""Keeps MLflow up with a running sweep, beside the driver's own work: no trial waits for it."""

import contextlib
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from memray.cluster.ledger import Busy, Ledger
from memray.cluster.storage import without_passwords
from memray.spec import TrialSpec
from memray.sweep import Sweep

# Seconds between two looks for something to send, and between two attempts at a server that is away.
INTERVAL_S = 1.0
RETRY_S = 10.0
# Seconds that a launch which has ended waits for another one to stop writing to MLflow.
HANDOVER_S = 30.0
# Attempts at sending what is left when a launch has ended.
ATTEMPTS = 3
# The name under which a launch leases the right to write to MLflow, beside the trials of its sweep.
WRITER = "mlflow-writer"


def default_tracking_uri(storage: str) -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the storage.

    Raises:
        ValueError: If neither can be: SQLite needs a local folder.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in storage:
        raise ValueError(
            # Not all of it: it may carry a password.
            f"SQLite needs a local folder, but the storage is a URI ({storage.partition('://')[0]}://…); name a "
            "tracking server with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{Path(storage).absolute() / 'mlflow.db'}"


class Mirror:
    """Sends trials as they advance, and everything that is left at the end.

    Args:
        tracking_uri: Of MLflow. It is first contacted from the thread, so that a launch does not wait for it.
        write_figures: Writes the sweep's figures and tables into a folder.
        trusts_notes: Whether trials that were noted as sent are left alone.
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        tracking_uri: str,
        write_figures: Callable[[Path], None],
        *,
        trusts_notes: bool = True,
    ) -> None:
        self.sweep = sweep
        self.ledger = ledger
        self.uri = tracking_uri
        self.shown_uri = without_passwords(tracking_uri)
        self.error: Exception | None = None
        self._write_figures = write_figures
        self._trusts_notes = trusts_notes
        self._tracker = None
        self._name = uuid.uuid4().hex[:12]
        self._lease = contextlib.ExitStack()
        self._is_writer = False
        self._dirty: set[str] = set()
        self._sending: set[str] = set()
        self._wake = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memray-mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def touch(self, trial_id: str) -> None:
        """Says that a trial has something new."""
        self._dirty.add(trial_id)
        self._wake.set()

    def why(self) -> str:
        """What kept something from being sent, for a person; nothing if all went well."""
        return "" if self.error is None else without_passwords(str(self.error))

    def lag(self) -> int:
        """How many trials have something new that was not sent yet."""
        return len(self._dirty | self._sending)

    def _connected(self):
        """The tracker, once this launch is the one that writes: creating a run is not idempotent."""
        if self._tracker is None:
            from memray.cluster.tracking import Tracker

            # On a bucket the claims are the cluster's, which `sync` never joined and a launch that has ended has left.
            # Who meets another writer there may make a run twice, and whoever looks next deletes the second.
            if not self._is_writer and not self.ledger.needs_claims:
                self._lease.enter_context(self.ledger.trial(WRITER).claim("{}", self._name))
                self._is_writer = True
            self._tracker = Tracker(
                self.sweep, self.ledger, self.uri, tags=code_tags(), trusts_notes=self._trusts_notes
            )
        return self._tracker

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if not self.ledger.needs_claims:  # or the launch has not joined its cluster yet
                    tracker = self._connected()
                    while self._dirty and not self._over.is_set():
                        self._send_some(tracker)
                self.error = None
            except Exception as error:  # whatever the server says, the ledger holds the truth and training goes on
                self.error = error
                self._tracker = None  # an answer may have been lost: what the server has is looked up anew
                self._over.wait(RETRY_S)
            if not self._over.is_set():
                self._wake.wait(INTERVAL_S)
                self._wake.clear()

    def _send_some(self, tracker) -> None:
        """Sends what is new of some trials, each of which is here once: two threads must not make one run twice."""
        self._sending = {self._dirty.pop() for _ in range(min(tracker.calls_at_once, len(self._dirty)))}
        trials = [self.sweep.trial(trial_id) for trial_id in self._sending]
        try:
            are_whole = tracker.send_all(trials)
            tracker.send_cells({trial.cell_id() for trial, is_whole in zip(trials, are_whole, strict=True) if is_whole})
        except Exception:
            self._dirty |= self._sending
            raise
        finally:
            self._sending = set()

    def finish(self, *, failed: int = 0, left: int = 0) -> int:
        """Sends all that is left, and returns the number of finished trials that MLflow still lacks.

        Args:
            failed: Trials that have failed.
            left: Trials that were asked to leave.

        What kept them from being sent is then in `error`.
        """
        self._over.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._is_writer or self.ledger.needs_claims:
            self._tracker = None  # others may have written since it looked
        deadline, attempts = time.monotonic() + HANDOVER_S, 0
        while True:
            self.error, attempts = None, attempts + 1
            try:
                self._send_all(failed, left)
            except Exception as error:  # as in `_run`: training is over and the ledger holds the truth
                self.error, self._tracker = error, None
            is_patient = time.monotonic() < deadline if isinstance(self.error, Busy) else attempts < ATTEMPTS
            if self.error is None or not is_patient:
                break
            time.sleep(INTERVAL_S)
        self._lease.close()
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(self._lacks, self.sweep.trials))

    def _lacks(self, trial: TrialSpec) -> bool:
        """Whether a trial is finished, and MLflow was not told all of it."""
        folder = self.ledger.trial(trial.trial_id())
        note = folder.noted("mlflow") or {}
        is_sent = note.get("complete") and note.get("uri") == self.shown_uri
        return not is_sent and folder.state() == "finished"

    def send_folder(self, folder: Path, name: str) -> None:
        """Puts a folder's files on the sweep's run, under a name; what kept them from it is then in `error`."""
        self.error = None
        try:
            self._connected().log_folder(folder, name)
        except Exception as error:  # as in `_run`
            self.error = error
        self._lease.close()

    def _send_all(self, failed: int, left: int) -> None:
        tracker = self._connected()
        damaged: ValueError | None = None
        try:
            tracker.send_all(self.sweep.trials)
        except ValueError as error:  # one damaged trial keeps no cell but its own from being sent
            damaged = error
        tracker.send_cells(self.sweep.cells())
        if damaged is not None:
            raise damaged
        tracker.close(self._write_figures, failed=failed, left=left)
        if self.ledger.needs_claims:  # without a lease: of two that end at once, the later sees what both have made
            tracker.existing_runs()

    def pages(self) -> dict[str, str]:
        """Where to look in MLflow; nothing if it was never reached."""
        return {} if self._tracker is None else self._tracker.pages()


def code_tags() -> dict[str, str]:
    """The versions that numbers depend on: of this project's code, and of what it stands on."""
    tags = {}
    for package in ("memray", "torch", "transformers", "ray", "mlflow", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            tags[f"version.{package}"] = version(package)
    commit = os.environ.get("MEMRAY_GIT_COMMIT") or git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def git_commit() -> str | None:
    """The commit that the project's files are at; None where they are no repository, as in a job."""
    root = Path(__file__).parents[2]
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
