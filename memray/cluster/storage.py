"""Where a ledger lives: a folder or a bucket, behind a few verbs.

What the ledger needs of a storage is small: files that appear whole or not at all, and one verb that only one of
several writers can succeed at. A file system gives both; on an object store the second is the business of one actor.
"""

import contextlib
import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyarrow.fs as pa_fs

# Bytes of a large file that are in memory at once.
COPIED_AT_ONCE = 2**24
# Seconds between two tries at a storage that refuses.
RETRY_S = 1.0

T = TypeVar("T")


class StorageError(OSError):
    """The storage could not be read or written; the message says what and why."""


def without_passwords(text: str) -> str:
    """A text with the passwords left out that stand in its URIs: for whatever is printed or kept.

    Up to the last @ of a word, for keys of buckets have slashes, and URIs that are wrong for that are told too.
    """
    return re.sub(r"(?<=://)([^/\s:@]*):[^\s'\"]*@", r"\1:…@", text)


@contextlib.contextmanager
def _explained(storage: object, verb: str, path: str, *expected: type[OSError]) -> Iterator[None]:
    """Turn every OSError but the `expected` ones into a `StorageError` with a sentence."""
    try:
        yield
    except expected:
        raise
    except OSError as error:
        raise StorageError(
            f"the storage {storage} must be a folder or bucket that can be read and written, but to {verb} "
            f"'{path}' failed: {error.strerror or error}; choose another with --storage or MEMRAY_STORAGE"
        ) from error


def patiently(act: Callable[[], T], patience_s: float) -> T:
    """What an act on a storage gives, tried again for a while if the storage refuses: it may be away for a moment.

    Raises:
        StorageError: The last refusal.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return act()
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


class PosixStorage:
    """Files below a local or mounted folder. Every file appears whole, under its name, or not at all."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read_bytes(self, path: str) -> bytes:
        """The file's content; FileNotFoundError where there is none."""
        with _explained(self, "read", path, FileNotFoundError):
            return (self.root / path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether the file is there. Any doubt (stale mount, no permission) raises instead of saying no."""
        with _explained(self, "look for", path):
            try:
                os.stat(self.root / path)
            except FileNotFoundError:
                return False
            return True

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted, those of folders with a final `/`; none where there is no folder."""
        with _explained(self, "list", folder):
            try:
                with os.scandir(self.root / folder) as entries:
                    return sorted(entry.name + "/" * entry.is_dir() for entry in entries)
            except FileNotFoundError:
                return []

    def write_new(self, path: str, data: bytes) -> None:
        """Write a file that must not exist yet: one caller succeeds, the others get FileExistsError."""
        target = self.root / path
        with (
            _explained(self, "write", path, FileExistsError),
            _temporary_file(target, data, durable=True) as temporary,
        ):
            try:
                # A link fails like O_EXCL where the name is taken, and shows the content whole: a file
                # opened with O_EXCL is empty for a moment, and for ever where its writer dies in it.
                os.link(temporary, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                _create(target, data, durable=True)  # mounted buckets and exFAT have no hard links
        _sync_folder(target.parent)

    def replace(self, path: str, data: bytes | Path, *, durable: bool = True) -> None:
        """Write a file whether it exists or not, from bytes or from a local file, which may be large.

        `durable` waits until it would outlast a power cut.
        """
        target = self.root / path
        with _explained(self, "write", path), _temporary_file(target, data, durable=durable) as temporary:
            os.replace(temporary, target)
        if durable:
            _sync_folder(target.parent)

    def fetch(self, path: str, local: Path) -> None:
        """Make a file readable at a local path, without a copy where that is possible."""
        with _explained(self, "read", path, FileNotFoundError):
            os.stat(self.root / path)
            local.symlink_to(self.root / path)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        with _explained(self, "delete", path):
            (self.root / path).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder and all that is in it, if it is there."""
        with _explained(self, "delete", folder), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / folder)


@contextlib.contextmanager
def _temporary_file(target: Path, data: bytes | Path, *, durable: bool) -> Iterator[Path]:
    """A file with `data` beside its target, gone afterwards under this name."""
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        _create(temporary, data, durable=durable)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, data: bytes | Path, *, durable: bool) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, file, COPIED_AT_ONCE)
        else:
            file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, but each new folder outlasts a power cut as what is written into it does."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        # It would read as a lost race for the file itself.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@runtime_checkable
class ClaimsAuthority(Protocol):
    """Who decides, on an object store, which of several writers was first."""

    def create(self, storage: str, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet.

        Returns:
            Whether the object now holds `data`: asking again after a lost answer is safe.
        """
        ...


class ObjectStorage:
    """Objects below a prefix of a bucket, through pyarrow; an object appears when its upload is complete.

    pyarrow has no conditional put, so that `write_new` asks a claims authority. Reading needs none.
    """

    def __init__(self, uri: str, claims: ClaimsAuthority | None = None):
        self.uri = uri
        self.claims = claims
        self.filesystem, self.root = pa_fs.FileSystem.from_uri(uri)

    def __str__(self) -> str:
        # Not the URI: it may carry a password.
        return f"{self.uri.split('://')[0]}://{self.root}"

    def read_bytes(self, path: str) -> bytes:
        """See `PosixStorage.read_bytes`."""
        with (
            _explained(self, "read", path, FileNotFoundError),
            self.filesystem.open_input_file(f"{self.root}/{path}") as stream,
        ):
            return stream.read()

    def exists(self, path: str) -> bool:
        """See `PosixStorage.exists`."""
        with _explained(self, "look for", path):
            return self.filesystem.get_file_info(f"{self.root}/{path}").type == pa_fs.FileType.File

    def list(self, folder: str) -> list[str]:
        """See `PosixStorage.list`."""
        with _explained(self, "list", folder):
            selector = pa_fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
            entries = self.filesystem.get_file_info(selector)
        return sorted(entry.base_name + "/" * (entry.type == pa_fs.FileType.Directory) for entry in entries)

    def write_new(self, path: str, data: bytes) -> None:
        """See `PosixStorage.write_new`.

        Raises:
            ValueError: If there is no claims authority to ask.
        """
        if self.claims is None:
            raise ValueError(
                f"trials on the object store {self} must be claimed through an authority, and none was "
                "given: run inside a Ray cluster and pass claims=cluster_claims()"
            )
        if not self.claims.create(self.uri, path, data):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def replace(self, path: str, data: bytes | Path, *, durable: bool = True) -> None:
        """See `PosixStorage.replace`; a completed upload is always durable."""
        with (
            _explained(self, "write", path),
            self.filesystem.open_output_stream(f"{self.root}/{path}") as stream,
        ):
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, stream, COPIED_AT_ONCE)
            else:
                stream.write(data)

    def fetch(self, path: str, local: Path) -> None:
        """See `PosixStorage.fetch`."""
        with (
            _explained(self, "read", path, FileNotFoundError),
            self.filesystem.open_input_stream(f"{self.root}/{path}") as stream,
            local.open("wb") as target,
        ):
            shutil.copyfileobj(stream, target, COPIED_AT_ONCE)

    def delete(self, path: str) -> None:
        """See `PosixStorage.delete`."""
        with _explained(self, "delete", path), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{path}")

    def delete_folder(self, folder: str) -> None:
        """See `PosixStorage.delete_folder`."""
        with _explained(self, "delete", folder), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.root}/{folder.rstrip('/')}")


Storage = PosixStorage | ObjectStorage


def open_storage(storage: str, claims: ClaimsAuthority | None = None) -> Storage:
    """A local path (relative ones from the working directory) or any URI that pyarrow opens.

    Raises:
        ValueError: If the URI is none that pyarrow opens.
    """
    if "://" not in storage:
        return PosixStorage(Path(storage).absolute())
    try:
        filesystem, path = pa_fs.FileSystem.from_uri(storage)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the storage must be a local path or a URI that pyarrow opens (file, s3, gs, abfs), but opening "
            f"the {storage.split('://')[0]}:// URI failed: {error}"
        ) from error
    if isinstance(filesystem, pa_fs.LocalFileSystem):
        return PosixStorage(Path(path))
    return ObjectStorage(storage, claims)


class Claims:
    """A claims authority: one lock around "look, then put", for all who share the instance.

    It remembers nothing that the store does not hold: as an actor it may die and be replaced at any time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: dict[str, Storage] = {}

    def create(self, storage: str, path: str, data: bytes) -> bool:
        """See `ClaimsAuthority.create`."""
        with self._lock:
            opened = self._storages.setdefault(storage, open_storage(storage))
            if opened.exists(path):
                return opened.read_bytes(path) == data
            opened.replace(path, data)
            return True


@dataclass(frozen=True)
class ActorClaims:
    """A claims authority that asks the cluster's `Claims` actor; it can be sent to other actors."""

    handle: Any

    def create(self, storage: str, path: str, data: bytes) -> bool:
        """See `ClaimsAuthority.create`."""
        import ray

        return ray.get(self.handle.create.remote(storage, path, data))


def cluster_claims() -> ActorClaims:
    """The one claims authority of the Ray cluster this process is connected to, started where there is none.

    Two clusters have two authorities: sharing a bucket between them is not supported.
    """
    import ray

    from memray.cluster.resources import off_spot

    # Detached, for launches that overlap share it and any of them may end first.
    options = {"name": "memray-claims", "namespace": "memray", "get_if_exists": True, "lifetime": "detached"}
    restarts = {"max_restarts": -1, "max_task_retries": -1}
    labels = {"label_selector": off_spot(ray.nodes())}
    return ActorClaims(ray.remote(Claims).options(num_cpus=0, **labels, **options, **restarts).remote())
