"""The samples of a trial as token ids: what is trained, what is scored, and all that is known of each.

This module knows no weights. Prompt and reference become tokens apart, so that none straddles the two, and nothing is
ever decoded and made tokens again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from jinja2 import TemplateError  # of torch's own requirements
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from memray.corpora import (
    CorpusSpec,
    Row,
    Rows,
    RowsSpec,
    duplicates,
    in_order,
    name_of,
    read_rows,
    refusal,
    shown,
    stripped,
)
from memray.encoding import AlphabetIds, Batch
from memray.generators import Sample
from memray.models import load_tokenizer
from memray.spec import TrialSpec

NATIVE, FOREIGN, HELD_OUT = "native", "foreign", "held_out"
ROLES = (NATIVE, FOREIGN, HELD_OUT)


@dataclass(frozen=True)
class KnownSample:
    """One sample with all that is known of it before any model has seen it.

    Attributes:
        role: Whether it is trained, and from which of the sources; or held out.
        place: Its row in that source.
        text: Prefix and reference, without what the template adds.
        prompt_ids: All tokens before the reference.
        reference_ids: At least one; without an end-of-sequence token.
        is_cut: Whether the reference goes on beyond the most tokens of a sample.
    """

    role: str
    place: int
    text: Sample
    prompt_ids: Int[ndarray, " prompt"]
    reference_ids: Int[ndarray, " reference"]
    is_cut: bool = False

    @property
    def ids(self) -> Int[ndarray, " tokens"]:
        return np.concatenate([self.prompt_ids, self.reference_ids])


@dataclass(frozen=True)
class Samples:
    """The samples of a trial.

    Attributes:
        known: Those that are trained, native ones first, and then those that are held out.
        trained: Rows as they are trained, each as often as an epoch shows it.
        scored: One row a sample, the longest first, without end-of-sequence tokens.
        order: Which sample each row of `scored` is.
        digest: Of the exact token ids of all of them, and of what is trained of them: 64 hexadecimal digits.
        report: What was left out, and what occurs more than once.
        tokenizer: Of the model that reads them.
    """

    known: list[KnownSample]
    trained: Batch
    scored: Batch
    order: Int[ndarray, " samples"]
    digest: str
    report: dict[str, int]
    tokenizer: PreTrainedTokenizerBase

    @property
    def alphabet(self) -> AlphabetIds:
        """Targets are not symbols of any."""
        return AlphabetIds.none()

    @property
    def num_held_out(self) -> int:
        return sum(sample.role == HELD_OUT for sample in self.known)


def prepare_samples(spec: TrialSpec) -> Samples:
    """Reads, chooses and encodes the samples of a trial.

    Raises:
        ValueError: If rows cannot be had, are too few, or hold what the spec refuses.
    """
    assert spec.corpus is not None
    corpus, tokenizer = spec.corpus, load_tokenizer(spec.model)
    encoder = _Encoder(corpus, tokenizer, bos=bool(spec.model.bos))
    native = _chosen(encoder, corpus.rows, corpus.num_samples, spec.probes.num_held_out, seed=spec.string_seed)
    found = [native]
    if corpus.foreign is not None:
        found.append(_chosen(encoder, corpus.foreign, corpus.num_foreign, 0, seed=spec.string_seed, role=FOREIGN))
    trained = [sample for each in found for sample in each.trained]
    held_out = native.held_out
    order, epoch_rows = _longest_first([*trained, *held_out]), shown(corpus, spec.string_seed)
    rows = [encoder.trained(trained[index]) for index in epoch_rows]
    packed = [_joined(rows[k : k + corpus.samples_per_row]) for k in range(0, len(rows), corpus.samples_per_row)]
    known = [*trained, *held_out]
    scored = [encoder.scored(known[index]) for index in order]
    report = duplicates([sample.text for sample in trained], [sample.text for sample in held_out])
    left_out = {"bad_rows": sum(each.num_bad for each in found), "too_long": sum(each.num_too_long for each in found)}
    batch = _batch(packed, encoder.pad_id)
    return Samples(
        known=known,
        trained=batch,
        scored=_batch(scored, encoder.pad_id),
        order=order,
        digest=_digest(batch, known),
        report=report | left_out | {"cut": sum(sample.is_cut for sample in known)},
        tokenizer=tokenizer,
    )


def encode_texts(spec: TrialSpec, samples: Samples, texts: Sequence[Sample]) -> Batch:
    """Other samples as rows of which the references are scored, in the tokens of a trial.

    Raises:
        ValueError: If one is longer than the trial's samples may be.
    """
    assert spec.corpus is not None
    encoder = _Encoder(spec.corpus, samples.tokenizer, bos=bool(spec.model.bos))
    rows = []
    for place, text in enumerate(texts):
        encoded = encoder.encoded(Row(place, stripped(text)), HELD_OUT)
        if isinstance(encoded, KnownSample) and encoded.is_cut:
            encoded = f"has more than {spec.corpus.max_tokens} tokens"
        if isinstance(encoded, str):
            raise ValueError(refusal(_FITS, {place: encoded}, f"what is asked about {name_of(spec.corpus.rows)}",
                                     "a larger corpus.max_tokens"))  # fmt: skip
        rows.append(_TokenRow(encoded.ids, np.arange(len(encoded.ids)) >= len(encoded.prompt_ids)))
    return _batch(rows, encoder.pad_id)


def _longest_first(known: Sequence[KnownSample]) -> Int[ndarray, " samples"]:
    return np.argsort([-len(sample.ids) for sample in known], kind="stable")


# --- which rows ------------------------------------------------------------------------------------------------------


@dataclass
class _Chosen:
    """Samples of one source, and how many rows were passed over for them."""

    trained: list[KnownSample]
    held_out: list[KnownSample]
    num_bad: int
    num_too_long: int = 0


def _chosen(
    encoder: "_Encoder", source: RowsSpec, number: int, num_held_out: int, *, seed: int, role: str = NATIVE
) -> _Chosen:
    corpus = encoder.corpus
    # Of a generator's rows some may be passed over for their length.
    spare = number if corpus.too_long == "drop" else 0
    rows = read_rows(source, num_samples=number + spare, seed=seed)
    first, last = in_order(rows, source, seed)
    chosen = _Chosen([], [], len(rows.bad))
    problems: dict[int, str] = {}
    taken: set[int] = set()
    for wanted, candidates, samples in ((number, first, chosen.trained), (num_held_out, last, chosen.held_out)):
        own = role if samples is chosen.trained else HELD_OUT
        for row in candidates:
            if len(samples) == wanted:
                break
            if row.place in taken and (source.generator is None):
                break  # the two ends have met
            encoded = encoder.encoded(row, own)
            taken.add(row.place)
            if isinstance(encoded, KnownSample):
                samples.append(encoded)
            elif corpus.too_long == "drop":
                chosen.num_too_long += 1
            else:
                problems[row.place] = encoded
                if len(problems) + len(samples) >= wanted:
                    break
    if problems:
        raise ValueError(refusal(_FITS, problems, name_of(source), "corpus.too_long='drop' or 'cut'"))
    _check_enough(source, rows, chosen, number, num_held_out)
    return chosen


_FITS = "a sample must have at most corpus.max_tokens tokens and one of a reference"


def _check_enough(source: RowsSpec, rows: Rows, chosen: _Chosen, number: int, num_held_out: int) -> None:
    if len(chosen.trained) == number and len(chosen.held_out) == num_held_out:
        return
    raise ValueError(
        f"{name_of(source)} must have {number} rows to train and {num_held_out} to hold out, but of {len(rows.good)} "
        f"good rows {chosen.num_too_long} are too long, and {len(chosen.trained)} and {len(chosen.held_out)} were "
        "found; train fewer, hold fewer out, or raise corpus.max_tokens"
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TokenRow:
    """Token ids, and which of them are predicted."""

    ids: Int[ndarray, " tokens"]
    is_target: ndarray


class _Encoder:
    """Turns rows into samples of token ids, and samples into rows of a batch."""

    def __init__(self, corpus: CorpusSpec, tokenizer: PreTrainedTokenizerBase, *, bos: bool) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        if bos and not corpus.chat and tokenizer.bos_token_id is None:
            raise ValueError(
                f"with bos=true the tokenizer must have a BOS token, but that of {tokenizer.name_or_path!r} has none; "
                "set model.bos to false"
            )
        if corpus.ends and tokenizer.eos_token_id is None:
            raise ValueError(
                "with corpus.ends=true the tokenizer must have an end-of-sequence token, but that of "
                f"{tokenizer.name_or_path!r} has none; set corpus.ends to false"
            )
        if corpus.chat and tokenizer.chat_template is None:
            raise ValueError(
                f"corpus.chat needs a tokenizer with a chat template, but that of {tokenizer.name_or_path!r} has none; "
                "set corpus.template"
            )
        # A chat template has its own.
        self.leading: list[int] = [tokenizer.bos_token_id] if bos and not corpus.chat else []  # type: ignore[list-item]
        self.end: list[int] = [tokenizer.eos_token_id] if corpus.ends else []  # type: ignore[list-item]
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(pad for pad in pads if isinstance(pad, int))

    def encoded(self, row: Row, role: str) -> KnownSample | str:
        """The row as a sample, or why it is none."""
        corpus = self.corpus
        prompt, reference = self._pair(row.sample)
        # Text of users may spell special tokens; there it is text.
        prompt = [*self.leading, *prompt]
        room = corpus.max_tokens - len(prompt) - len(self.end)
        is_cut = len(reference) > room
        if is_cut and (corpus.too_long != "cut" or room < 1):
            return f"has {len(prompt) + len(reference) + len(self.end)} tokens, {len(prompt)} of them a prompt"
        if not reference:
            return f"has {len(prompt)} tokens, and is cut at {corpus.prefix_tokens}"
        reference = reference[:room]
        text = row.sample
        if corpus.prefix_tokens is not None:
            text = Sample(self._text(prompt[len(self.leading) :]), self._text(reference))
        prompt_ids, reference_ids = (np.array(each, dtype=np.int64) for each in (prompt, reference))
        return KnownSample(role, row.place, text, prompt_ids, reference_ids, is_cut)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def _pair(self, sample: Sample) -> tuple[list[int], list[int]]:
        corpus = self.corpus
        if corpus.prefix_tokens is not None:
            ids = self._ids(sample.reference)
            return ids[: corpus.prefix_tokens], ids[corpus.prefix_tokens :]
        if corpus.chat:
            turns = [{"role": "user", "content": sample.prefix}]
            try:
                prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            except TemplateError as error:
                raise ValueError(
                    f"the tokenizer must have a chat template that can be filled in, but its own fails: {error}; write "
                    "corpus.template instead"
                ) from error
            return list(prompt), self._ids(sample.reference)  # type: ignore[arg-type]
        rendered = corpus.rendered(sample)
        return self._ids(rendered.prefix), self._ids(rendered.reference)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]  # type: ignore[return-value]

    def trained(self, sample: KnownSample) -> _TokenRow:
        """A sample as it is trained: a reference that was cut has no end."""
        ids = np.concatenate([sample.ids, np.array([] if sample.is_cut else self.end, dtype=np.int64)])
        return _TokenRow(ids, self._is_target(sample, len(ids)))

    def scored(self, sample: KnownSample) -> _TokenRow:
        return _TokenRow(sample.ids, self._is_target(sample, len(sample.ids)))

    def _is_target(self, sample: KnownSample, num_tokens: int) -> ndarray:
        first = len(sample.prompt_ids) if self.corpus.targets == "reference" else 0
        # Nothing predicts the first token.
        return np.arange(num_tokens) >= max(1, first)


def _joined(rows: Sequence[_TokenRow]) -> _TokenRow:
    """Samples one behind the other; each sees those before it."""
    return _TokenRow(np.concatenate([row.ids for row in rows]), np.concatenate([row.is_target for row in rows]))


def _batch(rows: Sequence[_TokenRow], pad_id: int) -> Batch:
    num_tokens = np.array([len(row.ids) for row in rows])
    is_token = np.arange(num_tokens.max()) < num_tokens[:, None]
    ids, is_target = np.full(is_token.shape, pad_id), np.zeros(is_token.shape, dtype=bool)
    ids[is_token] = np.concatenate([row.ids for row in rows])
    is_target[is_token] = np.concatenate([row.is_target for row in rows])
    return Batch(
        ids=torch.from_numpy(ids),
        is_target=torch.from_numpy(is_target),
        attention_mask=torch.from_numpy(is_token.astype(np.int64)),
        num_leading=0,
    )


def _digest(trained: Batch, known: Sequence[KnownSample]) -> str:
    """Of every token id that is trained or scored, in order."""
    digest = hashlib.sha256()
    rows = zip(trained.ids, trained.attention_mask, trained.is_target, strict=True)
    for ids, mask, is_target in rows:
        number = int(mask.sum())
        digest.update(_line([ids[:number].tolist(), is_target[:number].int().tolist()]))
    for sample in known:
        digest.update(_line([sample.role, sample.prompt_ids.tolist(), sample.reference_ids.tolist()]))
    return digest.hexdigest()


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def by_role(known: Sequence[KnownSample]) -> Iterator[tuple[str, Int[ndarray, " samples"]]]:
    """The indices of the samples of each role that has any."""
    roles = np.array([sample.role for sample in known])
    for role in ROLES:
        if (indices := np.flatnonzero(roles == role)).size:
            yield role, indices
