"""What a trial trains: its strings as symbols, as batches for a model, and all that is known of them.

This module knows no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from memray.encoding import AlphabetIds, Batch, Encoder, encode, make_encoder, tokenise
from memray.measurement import KnownString
from memray.models import load_tokenizer
from memray.replacements import ordinary_ids_outside
from memray.spec import TrialSpec
from memray.strings import ALPHABETS, Source, Stream, TextSource, draw_strings


@dataclass(frozen=True)
class Material:
    """The strings of a trial: as symbols, as batches for the model, and with all that is known of them.

    Attributes:
        outside_ids: Ordinary tokens that stand for no symbol.
        other: The same of the other source of a curriculum; None where it has none. String j of the trial is that of
            whichever source its stage has.
    """

    source: Source
    encoder: Encoder
    outside_ids: Int[ndarray, " outside"]
    strings: Mapping[Stream, Int[ndarray, "strings length"]]
    trained: Batch
    held_out: Batch | None
    known_trained: list[KnownString]
    known_held_out: list[KnownString]
    other: "Material | None" = None

    @property
    def symbol_ids(self) -> Int[ndarray, " alphabet"]:
        return self.encoder.symbol_ids

    @property
    def alphabet(self) -> AlphabetIds:
        """The alphabet as the model sees it, on the CPU."""
        marginal = torch.as_tensor(np.array(self.source.marginal), dtype=torch.float32)
        return AlphabetIds(torch.as_tensor(self.symbol_ids), marginal)


def source_of(spec: TrialSpec) -> Source:
    """The source of a trial's strings. A text is one only in the tokens of the trial's model.

    Raises:
        ValueError: If the text is not to be had, or too short.
    """
    if spec.strings.kind != "text":
        return spec.source()
    source = tokenise(load_tokenizer(spec.model), spec.strings.text())
    num_held_out, found = spec.probes.num_held_out, len(source.symbols)
    if context := spec.probes.context:  # whose other strings are passages that are never trained
        num_held_out = max(num_held_out, context.num_held_out + context.redraws)
    num_strings = spec.strings.num_strings + num_held_out
    if (needed := num_strings * spec.strings.length) > found:
        raise ValueError(
            f"the text in {spec.strings.path} must have at least {needed} tokens, {spec.strings.length} for each of "
            f"{num_strings} trained and held-out strings, but it has {found} of this model's (and "
            f"{source.num_left_out} special or unknown ones); take a longer text, or fewer or shorter strings"
        )
    return source


def known_strings(
    spec: TrialSpec, source: Source, symbol_ids: Int[ndarray, " alphabet"], stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]]:
    """The trained or the held-out strings of a trial, as symbols and as what is known of them.

    Args:
        source: The trial's, of :func:`source_of`.
        symbol_ids: Token id of each symbol.
    """
    number = spec.strings.num_strings if stream == "trained" else spec.probes.num_held_out
    if number == 0:
        return np.zeros((0, spec.strings.length), dtype=np.int64), []
    strings = draw_strings(source, length=spec.strings.length, num_strings=number, seed=spec.string_seed, stream=stream)
    if isinstance(source, TextSource):
        names, between = source.names, " "
    elif letters := ALPHABETS.get(spec.strings.alphabet):
        names, between = letters, ""
    else:
        names, between = [str(symbol_id) for symbol_id in symbol_ids], " "
    texts = [between.join(names[k] for k in string) for string in strings]
    has_bos = bool(spec.model.bos)
    return strings, [
        KnownString.of(string, source=source, symbol_ids=symbol_ids, text=text, bos=has_bos)
        for string, text in zip(strings, texts, strict=True)
    ]


def prepare(spec: TrialSpec) -> Material:
    """Draws and encodes the strings of a trial.

    Raises:
        ValueError: If a symbol of the alphabet is not exactly one ordinary token of the model, or a text is not to be
            had or too short.
    """
    source, tokenizer, bos = source_of(spec), load_tokenizer(spec.model), bool(spec.model.bos)
    if isinstance(source, TextSource):
        encoder = Encoder.of(tokenizer, source.symbol_ids, bos=bos)
    else:
        encoder = make_encoder(
            tokenizer,
            alphabet=spec.strings.alphabet,
            alphabet_size=spec.strings.alphabet_size,
            bos=bos,
            vocabulary_seed=spec.string_seed,
        )
    trained, known = known_strings(spec, source, encoder.symbol_ids, "trained")
    held_out, known_held_out = known_strings(spec, source, encoder.symbol_ids, "held_out")
    other = spec.other_strings()
    return Material(
        source=source,
        encoder=encoder,
        outside_ids=ordinary_ids_outside(tokenizer, encoder.symbol_ids),
        strings={"trained": trained, "held_out": held_out},
        trained=encode(list(trained), encoder),
        held_out=encode(list(held_out), encoder) if len(held_out) else None,
        known_trained=known,
        known_held_out=known_held_out,
        other=prepare(spec.model_copy(update={"strings": other, "curriculum": None})) if other else None,
    )
