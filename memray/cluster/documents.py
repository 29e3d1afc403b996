"""The documents and segments of a trial's folder: how they are written, and that they are read as they were written.

Others may be able to write to a storage, so whatever is read from one is checked before anything follows from it.
"""

import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from memray.sweep import explain

Json = dict[str, Any]
T = TypeVar("T")
# The kinds of records beside the measurements.
TABLES = ("tokens", "strings", "context", "matrix", "samples")


def encode(document: Json, what: str) -> bytes:
    """One line of JSON whose floats read back to the last bit.

    Raises:
        ValueError: If a value is no JSON: nan and infinity included, for a missing number is left out.
    """
    try:
        return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        place, value = next(_offenders(document, ""), ("a value", error))
        raise ValueError(
            f"{what} must hold only JSON with finite numbers, but {place} is {value!r}; leave a missing "
            "number out, and turn arrays into lists"
        ) from error


def _offenders(value: object, place: str) -> Iterator[tuple[str, object]]:
    """Everything in a nested value that JSON cannot say, with where it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _offenders(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _offenders(item, f"{place}[{index}]")
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        yield place, value


def read_object(data: bytes, where: str) -> Json:
    """A JSON object that was written here.

    Raises:
        ValueError: If it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object, but is torn or was edited: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{where} must be a JSON object, but is torn or was edited: it is a {type(document).__name__}")
    return document


def read_objects(data: bytes, where: str) -> list[Json]:
    return [read_object(line, f"line {number} of {where}") for number, line in enumerate(data.splitlines(), start=1)]


@functools.cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def parsed(kind: type[T], document: Json, where: str) -> T:
    """A document as what it says, with every field of the type that it must have.

    Raises:
        ValueError: If it is another one.
    """
    try:
        return _adapter(kind).validate_python(document)
    except ValidationError as error:
        raise ValueError(
            f"{where} must say all that this version reads, but was edited or is of another version: {explain(error)}"
        ) from error


def read_table(data: bytes, where: str) -> pa.Table:
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        table.column_names  # noqa: B018, they are decoded when they are asked for
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} must be a table of Parquet, but is torn or was edited: {error}") from error


def _inside(path: str) -> str:
    """A path from a document, which must lead below the folder that it is taken from."""
    if not re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)*", path, flags=re.ASCII):
        raise ValueError(f"a path must lead into the trial's folder, but got {path[:200]!r}")
    return path


# What documents from a storage may name: others who write to it must not have files read or written elsewhere.
_InsidePath = Annotated[str, AfterValidator(_inside)]
_TablePath = Annotated[str, Field(pattern=r"^[a-z]+/[0-9]{4,}-[0-9]{4,}\.parquet$")]
_WeightsPath = Annotated[str, Field(pattern=r"^weights/[0-9]{4,}-[0-9]{6,}\.safetensors$")]
_Number = Annotated[int, Field(ge=0, le=10**6)]


def segment_path(kind: str, attempt: int, number: int) -> str:
    extension = "jsonl" if kind == "measurements" else "parquet"
    return f"{kind}/{attempt:04d}-{number:04d}.{extension}"


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Cursor(NamedTuple):
    """How far a reader has come: the segments of one attempt. It survives JSON as a list of two."""

    attempt: int
    segment: int


START = Cursor(attempt=0, segment=0)


def segment_paths(kind: str, end: Cursor) -> list[str]:
    """The paths of an attempt's segments up to a cursor."""
    return [segment_path(kind, end.attempt, number) for number in range(1, end.segment + 1)]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What `finished.json` says.

    Attributes:
        attempt: The attempt whose segments are the result.
        segments: How many it committed, numbered from 1.
        finished_ms: When, in milliseconds since 1970.
        measurements_sha256: Over all measurement lines in order, however they were cut into segments: two
            trials that measured the same bits have the same digest.
        files: sha256 of every other file of the result, by its path in the folder.
        summary: What the caller had to say of the whole trial.
    """

    attempt: _Number
    segments: _Number
    finished_ms: int
    measurements_sha256: str
    files: dict[_InsidePath, str]
    summary: Json


@dataclass(frozen=True)
class Created:
    """What `created.json` says."""

    created_ms: int


@dataclass(frozen=True)
class Failed:
    """What of `failed-<attempt>.json` is read."""

    traceback: str


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoint:
    """What a checkpoint's JSON says.

    Attributes:
        attempt: The attempt that made it.
        epoch: The epoch whose weights it holds.
        segments: The attempt's committed segments, which hold all earlier epochs.
        measurements_sha256: Over their measurement lines, as in `Finished`.
        records: sha256 of each of their tables, by its path.
        weights: And of each of the kept weights of these epochs.
        files: sha256 of each of the engine's files, by name.
        about: What the caller had to say of it.
    """

    attempt: _Number
    epoch: _Number
    segments: _Number
    measurements_sha256: str
    records: dict[_TablePath, str]
    weights: dict[_WeightsPath, str]
    files: dict[_InsidePath, str]
    about: Json

    @property
    def name(self) -> str:
        return checkpoint_path(self.attempt, self.epoch)


def checkpoint_path(attempt: int, epoch: int) -> str:
    return f"checkpoints/{attempt:04d}-{epoch:06d}"


def sealed(finished: Finished) -> Json:
    """The document of finished.json: what it says, and the digest of that."""
    document = asdict(finished)
    return {**document, "sha256": sha256(encode(document, "the summary of a trial"))}
