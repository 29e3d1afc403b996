"""From symbols to tokens: one symbol is exactly one token, and batches of strings are tensors of ids.

Strings never go through text. Each symbol's token id is found once, and a string is then encoded by looking
its symbols up, so that no tokenizer can merge, split or normalise what stands next to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memray.strings import VOCABULARY, TextSource, alphabet_symbols

# Texts to put before a symbol, so that it stands inside a run and not at the start of a word. Several, since
# a tokenizer may merge one with the symbol, or drop it.
_BEFORE = ("\n", "=", "#", "|")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Which token stands for each symbol.

    Attributes:
        symbol_ids: Token id of each symbol; all different, none special.
        bos_id: Token id put before each string; None for none.
        pad_id: Token id that fills up shorter strings. Never a target and never attended to.
    """

    symbol_ids: Int[ndarray, " alphabet"]
    bos_id: int | None
    pad_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, symbol_ids: Int[ndarray, " alphabet"], *, bos: bool) -> "Encoder":
        """The encoder of an alphabet whose tokens are known.

        Args:
            tokenizer: Of the model that will read the strings.
            symbol_ids: Token id of each symbol.
            bos: Whether each string starts with the tokenizer's BOS.

        Raises:
            ValueError: If a BOS is asked for that the tokenizer does not have.
        """
        if bos and tokenizer.bos_token_id is None:
            raise ValueError(
                f"with bos=true the tokenizer must have a BOS token, but {_name(tokenizer)} has none; "
                "set model.bos to false"
            )
        bos_id = tokenizer.bos_token_id if bos else None
        assert bos_id is None or isinstance(bos_id, int)
        # Padding is never attended to: where a tokenizer has no token for it, any id does.
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(symbol_ids=symbol_ids, bos_id=bos_id, pad_id=next(pad for pad in pads if isinstance(pad, int)))


@dataclass(frozen=True)
class AlphabetIds:
    """The alphabet as the model sees it; an empty one where targets are not symbols of any.

    Attributes:
        symbol_ids: Token id of each symbol.
        marginal: P_A, the probability of each symbol under the source.
    """

    symbol_ids: Int[Tensor, " alphabet"]
    marginal: Float[Tensor, " alphabet"]

    @classmethod
    def none(cls) -> "AlphabetIds":
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def to(self, device: torch.device) -> "AlphabetIds":
        return AlphabetIds(self.symbol_ids.to(device), self.marginal.to(device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Strings as rows of token ids, padded on the right.

    Attributes:
        ids: Token ids.
        is_target: Whether the token of that column is predicted, from the tokens before it, and scored. Never
            so in column 0, which has nothing before it, nor for padding.
        attention_mask: 1 for tokens, 0 for padding.
        num_leading: Tokens before the first symbol: 1 with BOS, else 0. Symbol i stands in column
            i + num_leading.
        alphabet: What its strings are scored against; None is the alphabet of the trial.
    """

    ids: Int[Tensor, "strings tokens"]
    is_target: Bool[Tensor, "strings tokens"]
    attention_mask: Int[Tensor, "strings tokens"]
    num_leading: int
    alphabet: AlphabetIds | None = None

    def of(self, rows: Int[ndarray, " rows"]) -> "Batch":
        """The batch of the given rows, in their order; padding stays."""
        index = torch.as_tensor(rows, device=self.ids.device)
        return replace(
            self,
            ids=self.ids[index],
            is_target=self.is_target[index],
            attention_mask=self.attention_mask[index],
        )

    def trimmed(self) -> "Batch":
        """The batch without the columns that are padding in every row."""
        longest = int(self.attention_mask.sum(1).max())
        if longest == self.ids.shape[1]:
            return self
        return replace(
            self,
            ids=self.ids[:, :longest],
            is_target=self.is_target[:, :longest],
            attention_mask=self.attention_mask[:, :longest],
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        return replace(
            self,
            ids=self.ids.to(device),
            is_target=self.is_target.to(device),
            attention_mask=self.attention_mask.to(device),
            alphabet=self.alphabet and self.alphabet.to(torch.device(device)),
        )

    def beside(self, other: "Batch") -> "Batch":
        """These strings and then those of another batch of the same width; scored against the alphabet of these."""
        return replace(
            self,
            ids=torch.cat([self.ids, other.ids]),
            is_target=torch.cat([self.is_target, other.is_target]),
            attention_mask=torch.cat([self.attention_mask, other.attention_mask]),
        )


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    alphabet: str,
    alphabet_size: int,
    bos: bool,
    vocabulary_seed: int = 0,
) -> Encoder:
    """Finds the one token of each symbol of an alphabet.

    Args:
        tokenizer: Of the model that will read the strings.
        alphabet: A built-in alphabet, or `vocabulary`: ordinary tokens drawn at random, the first ones of one
            shuffle, so that a smaller alphabet is part of a larger one.
        alphabet_size: Number of symbols.
        bos: Whether each string starts with the tokenizer's BOS.
        vocabulary_seed: Decides which tokens `vocabulary` draws.

    Raises:
        ValueError: If a symbol is not exactly one ordinary token of its own (all such symbols are named), if
            the alphabet is unknown or too small, or if a BOS is asked for that the tokenizer does not have.
    """
    if alphabet == VOCABULARY:
        symbol_ids = _random_ids(tokenizer, alphabet_size, vocabulary_seed)
    else:
        symbol_ids = _ids_of_symbols(tokenizer, alphabet, alphabet_symbols(alphabet, alphabet_size))
    return Encoder.of(tokenizer, symbol_ids, bos=bos)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> TextSource:
    """A text in the tokens of a model, without those that are special or unknown to it."""
    # In one piece, so that no token is cut; `verbose` would warn that no model reads so much at once.
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    kept = ids[~np.isin(ids, tokenizer.all_special_ids)]
    symbol_ids, symbols = np.unique(kept, return_inverse=True)
    return TextSource(
        symbols=symbols,
        symbol_ids=symbol_ids,
        names=tuple(tokenizer.convert_ids_to_tokens(symbol_ids.tolist())),
        num_left_out=len(ids) - len(kept),
    )


def encode(strings: Sequence[Int[ndarray, " _"]], encoder: Encoder) -> Batch:
    """Strings as one batch on the CPU: with BOS all symbols are targets, without it all but the first.

    Args:
        strings: Symbol indices; lengths may differ.
        encoder: Made for their alphabet.

    Raises:
        ValueError: If there is no string, or one without symbols.
    """
    if len(strings) == 0 or min(map(len, strings)) == 0:
        raise ValueError("a batch needs at least one string, and each string at least one symbol")
    num_leading = 0 if encoder.bos_id is None else 1
    num_tokens = np.array([num_leading + len(string) for string in strings])
    columns = np.arange(num_tokens.max())
    is_token = columns < num_tokens[:, None]
    ids = np.full(is_token.shape, encoder.pad_id)
    for row, string in enumerate(strings):
        ids[row, num_leading : num_tokens[row]] = encoder.symbol_ids[string]
    if encoder.bos_id is not None:
        ids[:, 0] = encoder.bos_id
    return Batch(
        ids=torch.from_numpy(ids),
        is_target=torch.from_numpy(is_token & (columns > 0)),
        attention_mask=torch.from_numpy(is_token.astype(np.int64)),
        num_leading=num_leading,
    )


def _ids_of_symbols(tokenizer: PreTrainedTokenizerBase, alphabet: str, symbols: str) -> Int[ndarray, " alphabet"]:
    found = {symbol: _id_of_symbol(tokenizer, symbol) for symbol in symbols}
    offences = {symbol: why for symbol, why in found.items() if isinstance(why, str)}
    if offences:
        named = "; ".join(f"{symbol!r} {why}" for symbol, why in offences.items())
        usable = symbols.index(next(iter(offences)))
        raise ValueError(
            f"each symbol must be exactly one ordinary token, but with {_name(tokenizer)} {len(offences)} of "
            f"the {len(symbols)} symbols of alphabet {alphabet!r} are not: {named}; take another alphabet"
            + (f", alphabet_size={usable}" if usable >= 2 else "")
            + f" or {VOCABULARY!r}, whose symbols are tokens by construction"
        )
    assert len(set(found.values())) == len(symbols)  # one token cannot read as two symbols
    return np.array(list(found.values()))


def _id_of_symbol(tokenizer: PreTrainedTokenizerBase, symbol: str) -> int | str:
    """The id of the token that is this symbol and nothing more, or why there is none.

    A SentencePiece tokenizer encodes a lone symbol with a word-start piece (`▁a`, or `▁` and `a`). What is
    wanted is the bare piece, as it appears inside a run, so the symbol is also encoded after other texts.
    The proof that a candidate is the bare piece: two of them in a row read as the symbol twice, with nothing
    in between. A token that has the symbol's name, but that the tokenizer never makes of it, will not do:
    the model has not seen it either.
    """
    alone = _encode(tokenizer, symbol)
    pieces = [alone]
    for before in (*_BEFORE, symbol):
        prefix, whole = _encode(tokenizer, before), _encode(tokenizer, before + symbol)
        if whole[: len(prefix)] == prefix:
            pieces.append(whole[len(prefix) :])
    special = set(tokenizer.all_special_ids)
    for token_ids in pieces:
        if len(token_ids) == 1 and _reads_as(tokenizer, token_ids * 2, symbol * 2):
            return token_ids[0] if token_ids[0] not in special else "is a special token"
    if tokenizer.unk_token_id in alone:
        return "is unknown to the tokenizer"
    fewest = min(map(len, pieces))
    if fewest > 1:
        return f"splits into {fewest} tokens"
    return f"becomes {tokenizer.convert_ids_to_tokens(alone)}, which does not read as {symbol!r}"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _reads_as(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str) -> bool:
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) == text


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that are neither special nor added, ascending."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({*tokenizer.get_vocab().values()} - special)


def _random_ids(tokenizer: PreTrainedTokenizerBase, alphabet_size: int, seed: int) -> Int[ndarray, " alphabet"]:
    ordinary = ordinary_ids(tokenizer)
    if not 2 <= alphabet_size <= len(ordinary):
        raise ValueError(
            f"2 <= alphabet_size <= {len(ordinary)} must hold for alphabet 'vocabulary' (the ordinary tokens of "
            f"{_name(tokenizer)}), but got alphabet_size={alphabet_size}; lower it"
        )
    return np.random.default_rng(seed).permutation(ordinary)[:alphabet_size]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer of {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"
