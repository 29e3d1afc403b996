"""Corpora: samples of a prefix and a reference, from files, the hub or a generator, and which of them a trial trains.

A row is what a source holds; a sample is a row that a trial uses. This module knows text alone: what a model's
tokenizer makes of it, and what is too long for a model, is the business of `samples`.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
from pydantic import Field, field_validator, model_validator

from memray.generators import Sample, generator
from memray.part import NOT_HASHED, HubId, Part, Positive, Revision, only_on_hub

FORMATS = (".jsonl", ".csv", ".parquet")

# Rows of a generator that are held out, and never trained however many are. Whole groups of every generator: those
# that are trained begin with one.
NUM_RESERVED = 1176

# What tells the choice of rows, and of those that are shown more than once, from other draws of the same seed.
_ROWS_STREAM, _COPIES_STREAM = 11, 12


class RowsSpec(Part):
    """Where rows come from: exactly one of a generator, a local file and a data set of the hub.

    Attributes:
        generator: A name of `generators.GENERATORS`,
        options: and what it is told; the others of its options keep their defaults.
        path: A file of JSON lines, CSV or Parquet, by its ending. The hash covers its content and not its place.
        sha256: The content of that file, as 64 hexadecimal digits. Filled in when the spec is made; where the file
            differs from it by the time that the trial runs, the trial is refused.
        hub_id: A data set of the hub as owner/name, read by the library `datasets`, which runs none of its code,
        config: its configuration, where it has several,
        split: its split,
        revision: and a commit of it, or a branch or tag, whose rows may change: the digest of what was trained is
            logged with every trial. What was downloaded is kept under it: offline, no other takes its place.
        prefix_field: The field with the prefix, of a row that has two. A generator has its own.
        reference_field: The field with the reference.
        text_field: The field with a text that is cut into prefix and reference, instead of those two.
        bad_rows: What happens to a row that lacks a field or holds nothing in it, or whose text is too short to cut:
            it is named and the trial refused, or it is counted and left out.
    """

    generator: str | None = None
    options: dict[str, int | float | str] = {}
    path: str | None = Field(default=None, json_schema_extra=NOT_HASHED)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    hub_id: HubId | None = None
    config: str | None = None
    split: str = "train"
    revision: Revision = "main"
    prefix_field: str = "prefix"
    reference_field: str = "reference"
    text_field: str | None = None
    bad_rows: Literal["refuse", "drop"] = "refuse"

    @field_validator("options")
    @classmethod
    def _sorted(cls, options: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(options.items()))

    @model_validator(mode="after")
    def _one_source(self) -> "RowsSpec":
        named = [name for name in ("generator", "path", "hub_id") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                "rows must come from exactly one of generator, path and hub_id, but got "
                f"{' and '.join(named) or 'none'}; name one"
            )
        self._check_read_by(named[0])
        if self.generator is not None:
            generator(self.generator, **self.options)
        elif self.path is not None:
            self._resolve_file(Path(self.path))
        return self

    def all_options(self) -> dict[str, int | float | str]:
        """All that a generator is told, defaults too; nothing of a file or a data set."""
        return {} if self.generator is None else asdict(generator(self.generator, **self.options))

    def canonical(self) -> "RowsSpec":
        """Without options that are stated and at their default."""
        if self.generator is None:
            return self
        usual, stated = asdict(generator(self.generator)), self.all_options()
        return self.model_copy(
            update={"options": {name: stated[name] for name in usual if stated[name] != usual[name]}}
        )

    def _check_read_by(self, source: str) -> None:
        """Refuses what the source does not read."""
        read_by = {"options": ("generator",), "sha256": ("path",), "config": ("hub_id",), "revision": ("hub_id",)}
        read_by |= {"split": ("hub_id",)} | dict.fromkeys(
            ("prefix_field", "reference_field", "text_field", "bad_rows"), ("path", "hub_id")
        )
        for name, sources in read_by.items():
            if source not in sources and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} must keep the default of rows from a {source}, which does not read it, but got "
                    f"{getattr(self, name)!r}; leave it out"
                )
        if self.text_field is not None and {"prefix_field", "reference_field"} & self.model_fields_set:
            raise ValueError("a row has a text to cut, or a prefix and a reference, but both are named; choose one")

    def _resolve_file(self, path: Path) -> None:
        if path.suffix not in FORMATS:
            raise ValueError(f"a file of rows must end in {', '.join(FORMATS)}, but got {str(path)!r}; convert it")
        # Absolute, because workers of a cluster have working directories of their own.
        object.__setattr__(self, "path", str(path.absolute()))
        if self.sha256 is None:
            object.__setattr__(self, "sha256", _digest_of(path))


class CorpusSpec(Part):
    """What a trial fine-tunes on (protocol, section 7).

    The samples of a trial are its native ones and then its foreign ones: the first good rows in an order that hangs on
    the trial's `string_seed` alone, so that fewer samples are the first of more. Held-out samples are taken from its
    other end.

    Attributes:
        rows: Where native samples come from.
        num_samples: How many of them.
        foreign: Where samples of another kind come from, that are added to them.
        num_foreign: How many of those.
        copied_share: Share of the native samples that an epoch shows more than once,
        copies: and how often.
        template: The text of a sample. Up to "{reference}" it is the prompt, but for the blanks just before, which
            belong to the reference, as they belong to its first token.
        chat: Whether the tokenizer's chat template makes the prompt, with the prefix as the user's turn.
        prefix_tokens: Of a text that is cut: tokens of the prefix.
        max_tokens: Tokens of a sample at most, with whatever the prompt adds.
        too_long: What happens to a row that has more: refused, left out, or cut at its end.
        targets: What is trained: the reference, or all of the sample.
        ends: Whether an end-of-sequence token is trained behind each reference. It is never part of a match.
        samples_per_row: Samples that stand one behind the other in a row of a batch and see those before them, which
            changes what is memorised: 1 is no packing.
    """

    rows: RowsSpec
    num_samples: Positive = 1000
    foreign: RowsSpec | None = None
    num_foreign: Annotated[int, Field(ge=0)] = 0
    copied_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    copies: Annotated[int, Field(ge=2)] = 2
    template: str = "{prefix} {reference}"
    chat: bool = False
    prefix_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=4)] = 128
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    targets: Literal["reference", "whole"] = "reference"
    ends: bool = True
    samples_per_row: Positive = 1

    @model_validator(mode="after")
    def _consistent(self) -> "CorpusSpec":
        if (self.foreign is None) != (self.num_foreign == 0):
            raise ValueError(
                f"foreign and num_foreign belong together, but got foreign={self.foreign} and num_foreign="
                f"{self.num_foreign}; set both, or neither"
            )
        if not self.copied_share and self.copies != type(self).model_fields["copies"].default:
            raise ValueError(f"copies is read with copied_share alone, but got copies={self.copies}; leave it out")
        is_cut = self.rows.text_field is not None
        if is_cut != (self.prefix_tokens is not None):
            raise ValueError(
                "prefix_tokens says where the text of rows.text_field is cut, so both must be set or neither, but got "
                f"prefix_tokens={self.prefix_tokens} and text_field={self.rows.text_field!r}"
            )
        if self.prefix_tokens is not None and self.prefix_tokens + 1 >= self.max_tokens:
            raise ValueError(
                f"prefix_tokens + 1 < max_tokens must hold, or nothing is left to recall, but got {self.prefix_tokens} "
                f"and {self.max_tokens}"
            )
        self._check_template(is_cut)
        if self.num_rows_shown % self.samples_per_row:
            raise ValueError(
                f"samples_per_row must divide the {self.num_rows_shown} samples that an epoch shows, but got "
                f"{self.samples_per_row}; take a divisor"
            )
        return self

    def _check_template(self, is_cut: bool) -> None:
        default = type(self).model_fields["template"].default
        if (self.chat or is_cut) and self.template != default:
            why = "chat=true takes the tokenizer's" if self.chat else "a text that is cut has none"
            raise ValueError(f"template must be left out where {why}, but got {self.template!r}")
        if self.chat and is_cut:
            raise ValueError("chat puts a prefix into a user's turn, but a text that is cut has none; choose one")
        if self.template.count("{prefix}") != 1 or not self.template.endswith("{reference}"):
            raise ValueError(
                "template must hold {prefix} once and end with {reference}, but got "
                f"{self.template!r}; such as 'Question: {{prefix}} Answer: {{reference}}'"
            )

    @property
    def num_together(self) -> int:
        """Samples that are trained: native and foreign."""
        return self.num_samples + self.num_foreign

    @property
    def num_copied(self) -> int:
        """Native samples that an epoch shows more than once."""
        return round(self.copied_share * self.num_samples)

    @property
    def num_rows_shown(self) -> int:
        """Samples that an epoch shows, each as often as it shows it."""
        return self.num_together + self.num_copied * (self.copies - 1)

    def rendered(self, sample: Sample) -> Sample:
        """What stands before the reference in the template, and the reference with the blanks before it."""
        before = self.template.removesuffix("{reference}").replace("{prefix}", sample.prefix)
        prompt = before.rstrip()
        return Sample(prompt, before[len(prompt) :] + sample.reference)


# --- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a source: where it stands there, and its text; of a text that is cut, all of it is reference.

    Attributes:
        place: Counted from 0 over all rows, bad ones too.
    """

    place: int
    sample: Sample


@dataclass(frozen=True)
class Rows:
    """The good rows of a source, and the others by place.

    Attributes:
        bad: What is wrong with each row that is not among them.
    """

    good: Sequence[Row]
    bad: Mapping[int, str]


def read_rows(spec: RowsSpec, *, num_samples: int, seed: int) -> Rows:
    """All rows of a file or data set; of a generator those that are reserved, and as many samples as are asked for.

    Raises:
        ValueError: If the source cannot be read, is not what it was when the spec was made, or has bad rows that are
            to be refused.
    """
    if spec.generator is not None:
        made = generator(spec.generator, **spec.options).samples(NUM_RESERVED + num_samples, seed=seed)
        return Rows([Row(place, stripped(sample)) for place, sample in enumerate(made)], {})
    good: list[Row] = []
    bad: dict[int, str] = {}
    for place, fields in enumerate(_fields(spec)):
        found = _sample_of(fields, spec)
        if isinstance(found, str):
            bad[place] = found
        else:
            good.append(Row(place, found))
    if bad and spec.bad_rows == "refuse":
        raise ValueError(refusal("every row must hold its fields", bad, name_of(spec), "rows.bad_rows='drop'"))
    return Rows(good, bad)


def refusal(rule: str, bad: Mapping[int, str], where: str, way_out: str) -> str:
    """The sentence that refuses rows: how many, and the first of them."""
    named = "; ".join(f"row {place} {why}" for place, why in list(bad.items())[:5])
    return (
        f"{rule}, but {len(bad)} of {where} do not: {named}{'; …' if len(bad) > 5 else ''}; mend them, or set {way_out}"
    )


def name_of(spec: RowsSpec) -> str:
    """What a source is called in a sentence."""
    return spec.generator or spec.path or f"{spec.hub_id} ({spec.split})"


def _sample_of(fields: Mapping[str, Any] | str, spec: RowsSpec) -> Sample | str:
    """The text of a row, or what is wrong with it."""
    if isinstance(fields, str):
        return fields
    names = (spec.prefix_field, spec.reference_field) if spec.text_field is None else (spec.text_field,)
    for name in names:
        if not isinstance(value := fields.get(name), str):
            return f"has no text in {name!r}" if name in fields else f"has no field {name!r}"
        if not value.strip():
            return f"has nothing in {name!r}"
    texts = [str(fields[name]) for name in names]
    return stripped(Sample(*texts)) if len(texts) == 2 else Sample("", texts[0].strip())


def stripped(sample: Sample) -> Sample:
    """A sample without blanks at its ends: those between prefix and reference are the template's."""
    return Sample(sample.prefix.strip(), sample.reference.strip())


def _fields(spec: RowsSpec) -> Iterator[Mapping[str, Any] | str]:
    """The fields of each row in order, or why it is none."""
    if spec.path is None:
        yield from _hub_rows(spec)
        return
    path = Path(spec.path)
    if (found := _digest_of(path)) != spec.sha256:
        raise ValueError(
            f"rows.path must hold the rows that the spec was made from, with sha256={spec.sha256}, but {path} has "
            f"{found}; restore the file, or leave sha256 out to train on what it holds now"
        )
    try:
        yield from {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path)
    except Exception as error:  # of many kinds: the encoding's, the format's
        raise ValueError(f"{path} must hold rows as {path.suffix[1:]} in UTF-8, but reading it failed: {error}; "
                         "write it anew") from error  # fmt: skip


def _json_rows(path: Path) -> Iterator[Mapping[str, Any] | str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"is no JSON ({error})"
            else:
                yield row if isinstance(row, dict) else "is no JSON object"


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any] | str]:
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield "has more fields than the header" if None in row else row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any] | str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _hub_rows(spec: RowsSpec) -> Iterator[Mapping[str, Any] | str]:
    try:
        from datasets import config, load_dataset
    except ImportError as error:
        raise ValueError(
            "a data set of the hub needs the package datasets, which is not installed; pip install 'memray[hub]'"
        ) from error
    assert spec.hub_id is not None  # the validator refuses rows from nowhere
    # Where the hub does not answer, the library takes the newest in its cache, of whatever revision: each has its own.
    cache = Path(config.HF_DATASETS_CACHE) / "revisions" / quote(spec.revision, safe="")
    try:
        data = load_dataset(
            only_on_hub(spec.hub_id), spec.config, split=spec.split, revision=spec.revision, cache_dir=str(cache)
        )
    except Exception as error:  # of many kinds: the hub's, the network's, the format's
        said = " ".join(str(error).split())
        raise ValueError(
            f"rows must be readable from the hub, but reading {name_of(spec)} at {spec.revision} failed: {said}; "
            "correct rows.hub_id, config, split or revision, or begin the sweep where there is a network"
        ) from error
    yield from (dict(row) for row in data)  # type: ignore[arg-type]


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"rows.path must be a file that can be read, but {path} is none: {error.strerror}") from error


# --- which rows ------------------------------------------------------------------------------------------------------


def in_order(rows: Rows, spec: RowsSpec, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows from which a trial takes its samples, and those from which it takes held-out ones; each in its order.

    The two overlap where both are all of a file: whoever takes from them sees to it that no row is taken twice.
    """
    if spec.generator is not None:  # its rows are random as they come
        return list(rows.good[NUM_RESERVED:]), list(rows.good[:NUM_RESERVED])
    rng = np.random.default_rng([_ROWS_STREAM, seed])
    order = [rows.good[place] for place in rng.permutation(len(rows.good))]
    return order, order[::-1]


def shown(spec: CorpusSpec, seed: int) -> list[int]:
    """The index of each sample that an epoch shows, as often as it shows it."""
    rng = np.random.default_rng([_COPIES_STREAM, seed])
    copied = np.sort(rng.permutation(spec.num_samples)[: spec.num_copied]).tolist()
    return [*range(spec.num_together), *(copied * (spec.copies - 1))]


def duplicates(samples: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, int]:
    """What occurs more than once among the samples of a trial, and what of the held-out ones is trained.

    Case and blanks do not count.
    """
    keys = [_key(sample) for sample in samples]
    trained = set(keys)
    return {
        "duplicates": _num_repeated(keys),
        "duplicate_prefixes": _num_repeated([key[0] for key in keys]),
        "duplicate_references": _num_repeated([key[1] for key in keys]),
        "held_out_trained": sum(_key(sample) in trained for sample in held_out),
    }


def _key(sample: Sample) -> tuple[str, str]:
    return " ".join(sample.prefix.lower().split()), " ".join(sample.reference.lower().split())


def _num_repeated(keys: Sequence[Any]) -> int:
    """How many are there beside the first of their kind."""
    return sum(count - 1 for count in Counter(keys).values())
