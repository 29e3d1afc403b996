"""The ledger: what a trial has measured, kept in a folder that is the truth about it.

    <storage>/<sweep>/<trial_id>/
        spec.json, created.json             written once; MLflow timestamps derive from `created_ms`
        leases/<attempt>.json               who holds the trial, renewed while it runs
        tokens/<attempt>-<segment>.parquet, and so strings/, context/ and matrix/
        measurements/<attempt>-<segment>.jsonl    written last: it commits the segment
        weights/<attempt>-<epoch>.safetensors   where the spec keeps them
        checkpoints/<attempt>-<epoch>/...   an engine's files, until a newer checkpoint or the end
        checkpoints/<attempt>-<epoch>.json  written after them: it commits the checkpoint
        failed-<attempt>.json               the traceback of an attempt that failed
        finished.json                       written last of all: attempt, digests, summary
        probed/<probes_id>/...              all of this again, as looked at later through other probes
        notes/<name>.json                   small facts beside the truth, such as an MLflow run id

Exclusion may fail (a paused process, a wrong clock, a slow network file system), and the truth must
not: attempts never share a segment, and readers take all they read from one attempt, the finished one
or else the newest. So an exclusion that failed costs work, never numbers.

The ledger knows nothing of what the numbers mean, of MLflow, or of who schedules trials.
"""

import contextlib
import functools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import pyarrow as pa
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from memray.cluster.documents import (
    START,
    TABLES,
    Created,
    Cursor,
    Failed,
    Finished,
    Json,
    KeptCheckpoint,
    checkpoint_path,
    encode,
    parquet,
    parsed,
    read_object,
    read_objects,
    read_table,
    sealed,
    segment_path,
    segment_paths,
    sha256,
    sha256_of_file,
)
from memray.cluster.lease import Lease
from memray.cluster.storage import ClaimsAuthority, ObjectStorage, open_storage, patiently

State = Literal["planned", "running", "failed", "finished"]

# What the file begins with that asks trials to leave.
LEAVE = ".leave-"


class Busy(RuntimeError):  # noqa: N818
    """Another launch holds the trial; the message says who, and since when."""


class Superseded(RuntimeError):  # noqa: N818
    """A newer attempt owns the trial: whoever meets this must stop writing."""


class AlreadyFinished(RuntimeError):  # noqa: N818
    """The trial is finished, and there is nothing to claim."""


# --- The ledger -----------------------------------------------------------------------------------


class Ledger:
    """The trial folders of one sweep. It can be pickled where its claims authority can.

    Args:
        storage: A local path, or any URI that pyarrow opens.
        sweep: The sweep's name.
        claims: Who decides between writers on an object store; not asked on a file system.
        renewal_s: Seconds between renewals of a lease.
        expiry_s: Seconds without renewal after which a lease is dead; well above `renewal_s`.
        patience_s: Seconds for which a claim or a writer tries again where the storage refuses.
        probes_ids: The probes that are asked for, by trial. A trial that was finished under others has a result under
            these in a folder inside its own.

    Raises:
        ValueError: If the storage cannot be opened, or the name is no file name.
    """

    def __init__(
        self,
        storage: str,
        sweep: str,
        claims: ClaimsAuthority | None = None,
        *,
        renewal_s: float = 5.0,
        expiry_s: float = 30.0,
        patience_s: float = 60.0,
        probes_ids: Mapping[str, str] = MappingProxyType({}),
    ):
        if not 0 < renewal_s < expiry_s:
            raise ValueError(
                f"0 < renewal_s < expiry_s must hold, but got (renewal_s={renewal_s}, expiry_s={expiry_s})"
            )
        self.storage = open_storage(storage, claims)
        self.sweep = _file_name(sweep, "a sweep's name")
        self.renewal_s = renewal_s
        self.expiry_s = expiry_s
        self.patience_s = patience_s
        self.probes_ids = dict(probes_ids)

    @property
    def needs_claims(self) -> bool:
        """Whether writers have to ask a claims authority, and have none to ask."""
        return isinstance(self.storage, ObjectStorage) and self.storage.claims is None

    def with_claims(self, claims: ClaimsAuthority | None) -> None:
        """Gives an object store the authority that decides between its writers, or takes it away."""
        if isinstance(self.storage, ObjectStorage):
            self.storage.claims = claims

    def trial(self, trial_id: str) -> "TrialFolder":
        """The folder of a trial under the probes that are asked for, whether it exists yet or not."""
        own, wanted = self.as_trained(trial_id), self.probes_ids.get(trial_id)
        finished = own.finished() if wanted else None
        if finished is None or finished.summary.get("probes_id", wanted) == wanted:
            return own
        return TrialFolder(self, trial_id, probes_id=wanted)

    def as_trained(self, trial_id: str) -> "TrialFolder":
        """The folder of a trial under the probes that it was first run with."""
        return TrialFolder(self, trial_id)

    def trial_ids(self) -> list[str]:
        """Ids of all trials that have a folder, sorted; also of trials no longer in the sweep."""
        return [name[:-1] for name in self.storage.list(self.sweep) if name.endswith("/")]

    def states(self, trial_ids: Iterable[str]) -> dict[str, State]:
        """The state of many trials, asked for side by side: an object store answers each in milliseconds."""
        names = list(trial_ids)
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(names, pool.map(lambda name: self.trial(name).state(), names), strict=True))

    def drop_leftovers(self, trial_ids: Iterable[str]) -> None:
        """Remove the checkpoints of finished trials, which a kill between a trial's end and its tidying leaves."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: drop_checkpoints(self.trial(name)), trial_ids))

    def check_writable(self) -> str:
        """Write a small file, so that a storage that refuses is found before anything is scheduled.

        Returns:
            What was written: who reads the same with `mark` sees the same storage.

        Raises:
            StorageError: With a sentence, if it refuses.
        """
        mark = uuid.uuid4().hex
        self.storage.replace(f"{self.sweep}/.writable", mark.encode())
        return mark

    def check_still_writable(self) -> None:
        """Write another, whose content says nothing, without waiting until it would outlast a power cut.

        Raises:
            StorageError: With a sentence, if the storage refuses.
        """
        self.storage.replace(f"{self.sweep}/.still-writable", b"yes", durable=False)

    def ask_to_leave(self, name: str) -> None:
        """Ask the trials of a launch, or one attempt of one, to keep a checkpoint and leave.

        Args:
            name: The launch's, or one that begins with it and that one attempt alone looks for.
        """
        self.storage.replace(f"{self.sweep}/{LEAVE}{name}", b"")

    def is_asked_to_leave(self, name: str) -> bool:
        """Whether they were asked."""
        return self.storage.exists(f"{self.sweep}/{LEAVE}{name}")

    def forget_launch(self, launch: str) -> None:
        """Tidy up after a launch that has ended."""
        with contextlib.suppress(OSError):  # a leftover asks nobody: no other launch has this name
            for file in self.storage.list(self.sweep):
                if file.startswith(f"{LEAVE}{launch}"):
                    self.storage.delete(f"{self.sweep}/{file}")

    def mark(self) -> str | None:
        """What `check_writable` wrote last; None where it never did."""
        try:
            return self.storage.read_bytes(f"{self.sweep}/.writable").decode(errors="replace")
        except FileNotFoundError:
            return None


def _file_name(name: str, what: str) -> str:
    if not re.fullmatch(r"\w[\w.\-]*", name, flags=re.ASCII):
        raise ValueError(
            f"{what} must consist of letters, digits, '_', '-' and '.' and begin with none of '-.', but got {name!r}"
        )
    # File systems take 255, of which the name of a file that is being written needs some.
    if len(name) > 200:
        raise ValueError(f"{what} must have at most 200 letters, but has {len(name)}: {name!r}")
    return name


class TrialFolder:
    """One trial's folder: reading it, and claiming it in order to write. Made by `Ledger.trial`."""

    def __init__(self, ledger: Ledger, trial_id: str, probes_id: str | None = None):
        self.ledger = ledger
        self.trial_id = _file_name(trial_id, "a trial id")
        self.probes_id = None if probes_id is None else _file_name(probes_id, "an id of probes")

    @property
    def is_added(self) -> bool:
        """Whether the trial was finished under other probes, and this is the place of a later look at it."""
        return self.probes_id is not None

    def _path(self, name: str) -> str:
        inside = f"probed/{self.probes_id}/" if self.probes_id else ""
        return f"{self.ledger.sweep}/{self.trial_id}/{inside}{name}"

    def _exists(self, name: str) -> bool:
        return self.ledger.storage.exists(self._path(name))

    def _read(self, name: str) -> bytes:
        return self.ledger.storage.read_bytes(self._path(name))

    def _write_new(self, name: str, data: bytes) -> None:
        self.ledger.storage.write_new(self._path(name), data)

    def _replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.ledger.storage.replace(self._path(name), data, durable=durable)

    def _read_json(self, name: str) -> Json | None:
        """The document, or None where there is no such file."""
        try:
            data = self._read(name)
        except FileNotFoundError:
            return None
        return read_object(data, self._path(name))

    def _newest_attempt(self) -> int:
        """The highest attempt that was ever claimed; 0 before the first."""
        names = self.ledger.storage.list(self._path("leases"))
        return max((int(name[:-5]) for name in names if re.fullmatch(r"\d{4,}\.json", name)), default=0)

    def _live_lease(self, attempt: int) -> Lease | None:
        """The lease of an attempt if it is live; a torn one is dead, which costs at most work."""
        name = f"leases/{attempt:04d}.json"
        try:
            lease = parsed(Lease, self._read_json(name) or {}, self._path(name))
        except ValueError:
            return None
        return lease if lease.is_live(self.ledger.expiry_s) else None

    def state(self) -> State:
        """Where the trial stands. One look at one file where it is finished.

        An attempt that died without recording a failure leaves the trial "planned": it is to be run.
        """
        if self._exists("finished.json"):
            return "finished"
        attempt = self._newest_attempt()
        if attempt == 0:
            return "planned"
        if self._exists(f"failed-{attempt:04d}.json"):
            return "failed"
        return "planned" if self._live_lease(attempt) is None else "running"

    def spec(self) -> str | None:
        """The spec's JSON as it was claimed; None before the first claim."""
        try:
            return self._read("spec.json").decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path('spec.json')} must be JSON, but is torn or was edited: {error}") from error

    def created_ms(self) -> int | None:
        """When the trial was first claimed, in milliseconds since 1970; the same for all its attempts.

        None if it never was.
        """
        document = self._read_json("created.json")
        return None if document is None else parsed(Created, document, self._path("created.json")).created_ms

    def finished(self) -> Finished | None:
        """What the trial ended with; None while it has not.

        Raises:
            ValueError: If the document was edited.
        """
        document = self._read_json("finished.json")
        if document is None:
            return None
        finished = parsed(Finished, document, self._path("finished.json"))
        if document != sealed(finished):
            raise ValueError(f"{self._path('finished.json')} does not match its own digest: it was edited")
        return finished

    def failure(self) -> str | None:
        """The traceback of the newest attempt, if that failed and the trial did not finish."""
        if self._exists("finished.json"):
            return None
        name = f"failed-{self._newest_attempt():04d}.json"
        document = self._read_json(name)
        return None if document is None else parsed(Failed, document, self._path(name)).traceback

    def _committed(self) -> tuple[Cursor, Finished | None]:
        """The attempt that readers read and its number of whole segments."""
        finished = self.finished()
        if finished is not None:
            return Cursor(finished.attempt, finished.segments), finished
        attempt, number = self._newest_attempt(), 0
        names = set(self.ledger.storage.list(self._path("measurements"))) if attempt else set()
        while f"{attempt:04d}-{number + 1:04d}.jsonl" in names:
            number += 1
        return Cursor(attempt, number), None

    def measurements(self, after: Cursor = START) -> tuple[list[Json], Cursor]:
        """Measurements committed since a cursor, in the order they were appended.

        Where a newer attempt has taken over since, all of its measurements are new: a trial is deterministic
        and its points carry derived timestamps, so that sending them again changes nothing.

        Returns:
            The measurements, and the cursor to ask with next.

        Raises:
            ValueError: If some were edited or are gone; of a finished trial, if all are asked for and any was.
        """
        end, finished = self._committed()
        start = after.segment if after.attempt == end.attempt else 0
        names = [segment_path("measurements", end.attempt, number) for number in range(start + 1, end.segment + 1)]
        try:
            lines = b"".join(map(self._read, names))
        except FileNotFoundError as error:
            raise ValueError(f"{self._path('measurements')} must hold {end.segment} segments of attempt {end.attempt}, "
                             f"but one is missing ({error})") from error  # fmt: skip
        if finished is not None and start == 0 and sha256(lines) != finished.measurements_sha256:
            raise ValueError(f"{self._path('measurements')} does not match the digest of what the trial ended with")
        return read_objects(lines, self._path("measurements")), end

    def tokens(self) -> pa.Table:
        """All per-token records in the order of appending; a table without columns if there are none."""
        return self._table("tokens")

    def strings(self) -> pa.Table:
        """All per-string records in the order of appending; a table without columns if there are none."""
        return self._table("strings")

    def context(self) -> pa.Table:
        """All records of the context probe in the order of appending; a table without columns if there are none."""
        return self._table("context")

    def matrix(self) -> pa.Table:
        """The recall matrix of a curriculum in the order of appending; a table without columns if there is none."""
        return self._table("matrix")

    def samples(self) -> pa.Table:
        """All records of samples in the order of appending; a table without columns if there are none."""
        return self._table("samples")

    def _table(self, kind: str) -> pa.Table:
        end, finished = self._committed()
        return self._read_tables(kind, end, None if finished is None else finished.files)

    def _read_tables(self, kind: str, end: Cursor, digests: Mapping[str, str | None] | None = None) -> pa.Table:
        """The records of an attempt's segments up to a cursor, of which not all must have some.

        Args:
            digests: The paths that must be there, with their digests where these are known; None reads those that are.
        """
        if digests is None:
            digests = dict.fromkeys(f"{kind}/{name}" for name in self.ledger.storage.list(self._path(kind)))
        paths = [path for path in segment_paths(kind, end) if path in digests]
        tables = [read_table(self._read_checked(path, digests[path]), self._path(path)) for path in paths]
        try:
            # A later segment may have columns that an earlier one lacks.
            return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
        except pa.ArrowException as error:
            raise ValueError(f"the tables in {self._path(kind)} must be of one kind, but are not: {error}") from error

    def _read_checked(self, path: str, digest: str | None) -> bytes:
        """A file of a result, as it was written.

        Raises:
            ValueError: If it was edited.
        """
        data = self._read(path)
        if digest is not None and sha256(data) != digest:
            raise ValueError(f"{self._path(path)} does not match its digest: it was edited")
        return data

    def kept_weights(self) -> dict[int, str]:
        """The epochs whose weights a finished trial keeps, with the file of each."""
        finished = self.finished()
        paths = finished.files if finished else {}
        found = {path: re.fullmatch(r"weights/\d+-(\d+)\.safetensors", path) for path in paths}
        return {int(match[1]): path for path, match in found.items() if match}

    def read_weights(self, path: str) -> dict[str, ndarray]:
        """The weights in one of these files, by name.

        Raises:
            ValueError: If the file was edited.
        """
        finished = self.finished()
        data = self._read_checked(path, finished.files.get(path) if finished else None)
        try:
            return load_safetensors(data)
        except SafetensorError as error:
            raise ValueError(f"{self._path(path)} must hold safetensors, but does not: {error}") from error

    def checkpoint(self) -> KeptCheckpoint | None:
        """The newest whole checkpoint; None if there is none."""
        names = self.ledger.storage.list(self._path("checkpoints"))
        newest = max((name for name in names if re.fullmatch(r"\d{4,}-\d{6,}\.json", name)), default=None)
        if newest is None:
            return None
        try:
            document = self._read_json(f"checkpoints/{newest}")
            return None if document is None else parsed(KeptCheckpoint, document, "a checkpoint")
        except ValueError as error:
            raise ValueError(
                f"a checkpoint must say all that this version reads, but {self._path('checkpoints')}/{newest} does not "
                f"({error}); delete that folder to train from the start"
            ) from error

    def before_checkpoint(self, checkpoint: KeptCheckpoint) -> tuple[list[Json], dict[str, pa.Table]]:
        """The measurements of all epochs before a checkpoint, and their records by kind.

        Raises:
            ValueError: If some are gone, or were edited.
            StorageError: If the storage cannot be read.
        """
        cursor = Cursor(checkpoint.attempt, checkpoint.segments)
        try:
            lines = b"".join(self._read(path) for path in segment_paths("measurements", cursor))
            tables = {kind: self._read_tables(kind, cursor, checkpoint.records) for kind in TABLES}
        except FileNotFoundError as error:
            raise ValueError(
                f"a checkpoint needs all measurements before it, but one is gone ({error}); delete "
                f"{self._path('checkpoints')} to train from the start"
            ) from error
        if sha256(lines) != checkpoint.measurements_sha256:
            raise ValueError(
                f"{self._path('measurements')} does not match the digest that {checkpoint.name} gives of it; delete "
                f"{self._path('checkpoints')} to train from the start"
            )
        return read_objects(lines, self._path("measurements")), tables

    def fetch_checkpoint(self, checkpoint: KeptCheckpoint, into: Path) -> None:
        """Make the engine's files of a checkpoint readable in a local folder.

        Raises:
            ValueError: If a file is missing, or does not match its digest.
            StorageError: If the storage cannot be read.
        """
        for name, digest in checkpoint.files.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.ledger.storage.fetch(self._path(f"{checkpoint.name}/{name}"), target)
                found = sha256_of_file(target)
            except FileNotFoundError:
                found = "missing"
            if found != digest:
                raise ValueError(
                    f"each file of a checkpoint must match its digest, but {self._path(checkpoint.name)}/{name} is "
                    f"{'missing' if found == 'missing' else 'another'}; delete {self._path('checkpoints')} to train "
                    "from the start"
                )

    def verify(self) -> list[str]:
        """Compare a finished trial with its digests.

        Returns:
            A sentence for each file that does not match; none if all do, or if the trial is not finished.
        """
        try:
            finished = self.finished()
        except ValueError as error:
            return [f"trial {self.trial_id}: {error}"]
        if finished is None:
            return []
        found = [f"{name} {how}" for name, how in self._differences(finished.files)]
        numbers = range(1, finished.segments + 1)
        names = [segment_path("measurements", finished.attempt, number) for number in numbers]
        missing = [name for name in names if not self._exists(name)]
        found += [f"{name} is missing" for name in missing]
        if not missing and sha256(b"".join(map(self._read, names))) != finished.measurements_sha256:
            found.append(f"{', '.join(names)} together do not match their digest")
        extra = segment_path("measurements", finished.attempt, finished.segments + 1)
        found += [f"{extra} was added after the end"] if self._exists(extra) else []
        return [f"trial {self.trial_id}: {sentence}" for sentence in found]

    def _differences(self, digests: dict[str, str]) -> Iterator[tuple[str, str]]:
        for name, digest in digests.items():
            try:
                if sha256(self._read(name)) != digest:
                    yield name, "does not match its digest"
            except FileNotFoundError:
                yield name, "is missing"

    def note(self, name: str, document: Json) -> None:
        """Keep a small fact beside the truth, in place of what the name held before. It needs no claim."""
        self._replace(f"notes/{_file_name(name, 'the name of a note')}.json", encode(document, f"note {name}"))

    def noted(self, name: str) -> Json | None:
        """What was noted last under a name; None if nothing was."""
        return self._read_json(f"notes/{_file_name(name, 'the name of a note')}.json")

    def claim(self, spec_json: str, launch: str) -> "Attempt":
        """Take the trial in order to run it, from nobody, from a dead holder, or from the launch itself.

        Enter the attempt at once (`with folder.claim(...) as attempt:`): it is renewed only while entered.

        Args:
            spec_json: The spec as the canonical JSON that the trial id hashes; kept as it was first given.
            launch: Names the launch, unique to one `run`. A retry within it takes over even a live lease.

        Raises:
            Busy: If another launch holds it.
            AlreadyFinished: If there is nothing left to do.
            ValueError: If the folder belongs to another spec.
            StorageError: If the storage cannot be written, for all the ledger's patience.
        """
        return patiently(lambda: self._claim(spec_json, launch), self.ledger.patience_s)

    def _claim(self, spec_json: str, launch: str) -> "Attempt":
        spec = spec_json.encode()
        if self.spec() not in (None, spec_json):
            raise ValueError(
                f"{self._path('spec.json')} must hold the spec of trial {self.trial_id}, but holds another: "
                "it was edited, or two versions of the code write one spec differently; move the folder away"
            )
        lease = self._take_lease(launch)
        if self._exists("finished.json"):
            # Its last holder finished between our look and its release.
            self._release(lease)
            raise self._already_finished()
        created = encode({"created_ms": int(time.time() * 1000)}, "created.json")
        for name, data in (("spec.json", spec), ("created.json", created)):
            if not self._exists(name):
                with contextlib.suppress(FileExistsError):
                    self._write_new(name, data)
        files = {name: sha256(self._read(name)) for name in ("spec.json", "created.json")}
        return Attempt(self, lease, files)

    def _take_lease(self, launch: str) -> Lease:
        while True:
            if self._exists("finished.json"):
                raise self._already_finished()
            newest = self._newest_attempt()
            holder = self._live_lease(newest)
            if holder is not None and holder.launch != launch:
                raise self._busy(holder)
            lease = Lease.of_this_process(launch, newest + 1)
            try:
                self._write_new(_lease_file(lease), encode(asdict(lease), "a lease"))
            except FileExistsError:
                continue  # somebody was faster: look who
            return lease

    def _release(self, lease: Lease) -> None:
        released = replace(lease, released_s=time.time())
        with contextlib.suppress(OSError):  # it expires by itself
            self._replace(_lease_file(lease), encode(asdict(released), "a lease"), durable=False)

    def _already_finished(self) -> AlreadyFinished:
        return AlreadyFinished(f"trial {self.trial_id} of {self.ledger.sweep} is finished")

    def _busy(self, holder: Lease) -> Busy:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.claimed_s))
        return Busy(
            f"trial {self.trial_id} of {self.ledger.sweep} is held by launch {holder.launch} (attempt "
            f"{holder.attempt}, process {holder.pid} on {holder.host}) since {since}, renewed "
            f"{time.time() - holder.renewed_s:.0f} s ago; it is free when that ends, or "
            f"{self.ledger.expiry_s:g} s after its last renewal"
        )


def _lease_file(lease: Lease) -> str:
    return f"leases/{lease.attempt:04d}.json"


def drop_checkpoints(folder: TrialFolder, but: str = "") -> None:
    """Remove a trial's checkpoints, or all but one."""
    storage, kept = folder.ledger.storage, but.rpartition("/")[2]
    root = folder._path("checkpoints")
    with contextlib.suppress(OSError):  # a leftover costs room alone
        names = [name for name in storage.list(root) if not kept or not name.startswith(kept)]
        for name in (name for name in names if not name.endswith("/")):
            storage.delete(f"{root}/{name}")  # first what commits it
        for name in (name for name in names if name.endswith("/")):
            storage.delete_folder(f"{root}/{name}")


class Writer:
    """Writes what one attempt at a trial measures. Every write raises `Superseded` once a newer attempt exists.

    A storage that refuses is tried again for as long as the ledger has patience: training waits, and loses nothing.

    One process and thread of an attempt writes measurements; its other processes may put files of a checkpoint. A
    writer can be sent to another process before its first write.

    Attributes:
        number: Which attempt at the trial this is, from 1.
    """

    def __init__(self, folder: TrialFolder, number: int, files: Mapping[str, str]):
        self.folder = folder
        self.number = number
        self._files = dict(files)
        self._num_segments = 0
        self._lines: list[bytes] = []
        self._is_over = False

    def _check(self) -> None:
        if self._is_over:
            raise RuntimeError(f"attempt {self.number} at trial {self.folder.trial_id} is over: claim the trial anew")
        # Attempts are numbered without gaps, so that one look is enough.
        if self.folder._exists(f"leases/{self.number + 1:04d}.json"):
            raise self._superseded("a newer attempt has taken over")

    def _superseded(self, why: str) -> Superseded:
        return Superseded(
            f"attempt {self.number} at trial {self.folder.trial_id} may write no more: {why}; stop it here"
        )

    def _write(self, path: str, data: bytes) -> None:
        self._patiently(lambda: self.folder._replace(path, data))

    def _patiently(self, act: Callable[[], None]) -> None:
        """Acts as the owner of the trial, which is looked at before each try."""

        def checked() -> None:
            self._check()
            act()

        patiently(checked, self.folder.ledger.patience_s)

    def append(
        self,
        measurements: Sequence[Json],
        tokens: pa.Table | None = None,
        strings: pa.Table | None = None,
        context: pa.Table | None = None,
        matrix: pa.Table | None = None,
        samples: pa.Table | None = None,
    ) -> None:
        """Commit one segment: all of it becomes visible to readers at once, or nothing.

        Each call writes a file for each part, so gather many epochs before it. After an error the same
        segment can be appended again.

        Args:
            measurements: JSON objects with finite numbers; a number that is missing is left out.
            tokens: Per-token records that belong to them.
            strings: Per-string records that belong to them.
            context: Records of the context probe that belong to them.
            matrix: Rows of the recall matrix that belong to them.
            samples: Records of the samples of a corpus that belong to them.

        Raises:
            ValueError: If a measurement is no JSON, or holds nan or infinity.
            Superseded: If a newer attempt exists.
            StorageError: If the storage cannot be written.
        """
        lines = [encode(line, f"measurement {index}") + b"\n" for index, line in enumerate(measurements)]
        given = dict(zip(TABLES, (tokens, strings, context, matrix, samples), strict=True))
        tables = {kind: table for kind, table in given.items() if table is not None and table.num_columns}
        if not lines and not tables:
            return
        number = self._num_segments + 1
        files = {}
        for kind, table in tables.items():
            path, data = segment_path(kind, self.number, number), parquet(table)
            self._write(path, data)
            files[path] = sha256(data)
        self._write(segment_path("measurements", self.number, number), b"".join(lines))
        self._num_segments = number
        self._files |= files
        self._lines += lines

    def keep_weights(self, epoch: int, weights: Mapping[str, ndarray]) -> None:
        """Keep the weights of an epoch as `weights/<attempt>-<epoch>.safetensors`.

        Raises:
            Superseded, StorageError: As `append` does.
        """
        self._keep_weights(f"{epoch:06d}.safetensors", save_safetensors(dict(weights)))

    def _keep_weights(self, name: str, data: bytes) -> None:
        path = f"weights/{self.number:04d}-{name}"
        self._write(path, data)
        self._files[path] = sha256(data)

    def put_checkpoint(self, epoch: int, folder: Path) -> dict[str, str]:
        """Put files of a checkpoint that `commit_checkpoint` will commit; their sha256 by name.

        Args:
            epoch: The epoch whose weights it holds.
            folder: Every file in it; processes that put files for one checkpoint name them differently.

        Raises:
            Superseded, StorageError: As `append` does.
        """
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            target = self.folder._path(f"{checkpoint_path(self.number, epoch)}/{name}")
            self._patiently(functools.partial(self.folder.ledger.storage.replace, target, path))
            files[name] = sha256_of_file(path)
        return files

    def commit_checkpoint(self, epoch: int, files: Mapping[str, str], about: Json) -> None:
        """Declare a checkpoint whole, and drop older ones. All earlier epochs were appended before.

        Args:
            files: What every process's `put_checkpoint` returned, together.
            about: What a resuming attempt checks; JSON as in `append`.

        Raises:
            ValueError, Superseded, StorageError: As `append` does.
        """
        weights = {path: digest for path, digest in self._files.items() if path.startswith("weights/")}
        records = {path: digest for path, digest in self._files.items() if path.partition("/")[0] in TABLES}
        kept = KeptCheckpoint(
            attempt=self.number,
            epoch=epoch,
            segments=self._num_segments,
            measurements_sha256=sha256(b"".join(self._lines)),
            records=records,
            weights=weights,
            files=dict(files),
            about=about,
        )
        data = encode(asdict(kept), "a checkpoint")
        self._write(f"{kept.name}.json", data)
        drop_checkpoints(self.folder, but=kept.name)

    def adopt(self, checkpoint: KeptCheckpoint) -> dict[str, pa.Table]:
        """Append what an earlier attempt had measured up to its checkpoint; its records by kind.

        Raises:
            ValueError: If some of it is gone, or was edited.
            Superseded, StorageError: As `append` does.
        """
        lines, tables = patiently(lambda: self.folder.before_checkpoint(checkpoint), self.folder.ledger.patience_s)
        self.append(lines, **{kind: table for kind, table in tables.items() if table.num_columns})
        for path, digest in checkpoint.weights.items():
            self._keep_weights(path.rpartition("-")[2], self.folder._read_checked(path, digest))
        return tables

    def finish(self, summary: Json) -> None:
        """Declare what was appended the trial's result.

        Args:
            summary: What is to be known of the whole trial without reading its segments; JSON as in `append`.

        Raises:
            ValueError, Superseded, StorageError: As `append` does.
        """
        finished = Finished(
            attempt=self.number,
            segments=self._num_segments,
            finished_ms=int(time.time() * 1000),
            measurements_sha256=sha256(b"".join(self._lines)),
            files=self._files,
            summary=summary,
        )
        self._conclude("finished.json", sealed(finished))
        drop_checkpoints(self.folder)

    def fail(self, traceback: str) -> None:
        """Record that the attempt failed, and why. The trial may be claimed again.

        Raises:
            Superseded, StorageError: As `append` does.
        """
        failed_ms = int(time.time() * 1000)
        document = {"attempt": self.number, "failed_ms": failed_ms, "traceback": traceback}
        self._conclude(f"failed-{self.number:04d}.json", document)

    def _conclude(self, name: str, document: Json) -> None:
        data = encode(document, name)
        try:
            self._patiently(lambda: self.folder._write_new(name, data))
        except FileExistsError as error:
            # The storage may have refused only after it was written.
            if self.folder._read(name) != data:
                raise self._superseded(f"{name} was written by another") from error
        self._is_over = True


class Attempt(Writer):
    """The right to write one trial, made by `TrialFolder.claim`; while entered, a thread renews its lease.

    Leaving releases the lease and records nothing: an attempt that was neither finished nor failed is one
    that was interrupted.
    """

    def __init__(self, folder: TrialFolder, lease: Lease, files: Mapping[str, str]):
        super().__init__(folder, lease.attempt, files)
        self._lease = lease
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name=f"lease-{folder.trial_id}", daemon=True)

    def __enter__(self) -> "Attempt":
        self._renewer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._renewer.join()
        self.folder._release(self._lease)

    def _renew(self) -> None:
        while not self._stop.wait(self.folder.ledger.renewal_s):
            self._lease = replace(self._lease, renewed_s=time.time())
            data = encode(asdict(self._lease), "a lease")
            with contextlib.suppress(OSError):  # the storage may come back before the lease expires
                # Not durable: a sync can wait longer than a lease lives, behind a large checkpoint.
                self.folder._replace(_lease_file(self._lease), data, durable=False)

    def elsewhere(self) -> Writer:
        """Writes in this attempt's stead in another process, while the lease is renewed here."""
        return Writer(self.folder, self.number, self._files)
