"""One symbol, one token: character, byte-level and SentencePiece tokenizers, all trained here."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GPTSw3Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from memray.encoding import Encoder, encode, make_encoder, tokenise
from memray.models import character_tokenizer
from memray.strings import ALPHABETS

LETTERS = ALPHABETS["latin"]


def training_text() -> list[str]:
    """Lines of made-up words, so that the learned pieces are longer than a letter."""
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 7))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=8)) for _ in range(300)] + list(ALPHABETS["greek"][:3]) * 50


def sentencepiece_tokenizer(
    folder: Path, loader: type[PreTrainedTokenizerBase], model_type: str, byte_fallback: bool
) -> PreTrainedTokenizerBase:
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(training_text()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420 if byte_fallback else 200,
        model_type=model_type,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        minloglevel=2,
    )
    (folder / "tokenizer.model").with_name("spiece.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return loader.from_pretrained(folder)


def byte_level_tokenizer(
    *, add_prefix_space: bool = False, lower_case: bool = False, **special: str
) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(BPE())
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|endoftext|>"} | special))


def alphabet_ids(tokenizer: PreTrainedTokenizerBase, alphabet: str, alphabet_size: int) -> list[int]:
    encoder = make_encoder(tokenizer, alphabet=alphabet, alphabet_size=alphabet_size, bos=False)
    return encoder.symbol_ids.tolist()


# From symbols to tokens.


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_the_character_tokenizer_has_a_token_for_every_symbol_of_every_alphabet(alphabet: str):
    tokenizer, symbols = character_tokenizer(), ALPHABETS[alphabet]
    ids = alphabet_ids(tokenizer, alphabet, len(symbols))
    assert tokenizer.convert_ids_to_tokens(ids) == list(symbols)


@pytest.mark.parametrize("byte_fallback", [True, False], ids=["byte_fallback", "no_fallback"])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("loader", [LlamaTokenizer, T5Tokenizer, GPTSw3Tokenizer], ids=lambda loader: loader.__name__)
def test_no_word_start_piece_of_sentencepiece_intrudes(
    tmp_path: Path, loader: type[PreTrainedTokenizerBase], model_type: str, byte_fallback: bool
):
    tokenizer = sentencepiece_tokenizer(tmp_path, loader, model_type, byte_fallback)
    lone = [tokenizer.convert_ids_to_tokens(tokenizer.encode(c, add_special_tokens=False))[0] for c in LETTERS]
    assert all(piece.startswith("▁") for piece in lone), "the trap is not there"
    ids = alphabet_ids(tokenizer, "latin", 26)
    # SentencePiece's own table of pieces is the oracle.
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))  # type: ignore[call-arg]
    assert ids == [pieces.piece_to_id(c) for c in LETTERS]  # type: ignore[attr-defined]
    assert tokenizer.decode(ids) == LETTERS


@pytest.mark.parametrize("add_prefix_space", [False, True], ids=["plain", "prefix_space"])
def test_a_byte_level_tokenizer_gives_each_letter_its_own_token_though_runs_of_letters_merge(add_prefix_space: bool):
    tokenizer = byte_level_tokenizer(add_prefix_space=add_prefix_space)
    ids = alphabet_ids(tokenizer, "latin", 26)
    assert tokenizer.convert_ids_to_tokens(ids) == list(LETTERS)
    assert len(tokenizer.encode(LETTERS, add_special_tokens=False)) < 26, "the trap is not there"
    assert tokenizer.decode(ids) == LETTERS


def test_a_symbol_of_several_bytes_is_found_where_they_make_one_token():
    tokenizer = byte_level_tokenizer()
    assert tokenizer.decode(alphabet_ids(tokenizer, "greek", 3)) == "αβγ"


# Texts.


def test_a_text_becomes_the_tokens_that_the_tokenizer_makes_of_it():
    tokenizer, text = byte_level_tokenizer(), "\n".join(training_text()[:20])
    source = tokenise(tokenizer, text)
    ids = source.symbol_ids[source.symbols].tolist()
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) < len(text), "the tokens are more than characters"
    assert tokenizer.decode(ids) == text
    assert source.symbol_ids.tolist() == sorted(set(ids))
    assert list(source.names) == tokenizer.convert_ids_to_tokens(source.symbol_ids.tolist())
    assert source.num_left_out == 0


def test_special_tokens_of_a_text_are_left_out_and_counted():
    source = tokenise(byte_level_tokenizer(), "one<|endoftext|>two<|endoftext|>")
    assert source.num_left_out == 2
    assert "".join(source.names[k] for k in source.symbols) == "onetwo"


def test_what_the_character_tokenizer_does_not_know_is_left_out_of_a_text():
    tokenizer = character_tokenizer()
    source = tokenise(tokenizer, "Ab, 3b: не!")
    assert [source.names[k] for k in source.symbols] == list("Ab3bне")
    assert tokenizer.decode(source.symbol_ids[source.symbols].tolist()) == "Ab3bне"
    assert source.num_left_out == 5


def test_a_text_has_an_encoder_of_its_own():
    tokenizer = character_tokenizer()
    source = tokenise(tokenizer, "abba cab")
    encoder = Encoder.of(tokenizer, source.symbol_ids, bos=True)
    batch = encode([source.symbols[:4]], encoder)
    assert tokenizer.convert_ids_to_tokens(batch.ids[0].tolist()) == ["<bos>", "a", "b", "b", "a"]


# What is refused.


def refusal(tokenizer: PreTrainedTokenizerBase, alphabet: str, alphabet_size: int) -> str:
    with pytest.raises(ValueError, match="each symbol must be exactly one ordinary token") as raised:
        alphabet_ids(tokenizer, alphabet, alphabet_size)
    return str(raised.value)


def offenders(sentence: str) -> list[str]:
    return re.findall(r"'(.)' (?:splits|is|becomes)", sentence)


def test_all_symbols_that_split_are_named_with_the_number_of_their_tokens():
    sentence = refusal(byte_level_tokenizer(), "greek", 24)
    assert offenders(sentence) == list(ALPHABETS["greek"][3:])
    assert "21 of the 24 symbols of alphabet 'greek' are not: 'δ' splits into 2 tokens; " in sentence
    assert "alphabet_size=3" in sentence, "the first three symbols are tokens"


def test_symbols_that_fall_back_to_bytes_are_refused(tmp_path: Path):
    tokenizer = sentencepiece_tokenizer(tmp_path, LlamaTokenizer, "bpe", byte_fallback=True)
    sentence = refusal(tokenizer, "cjk", 64)
    assert offenders(sentence) == list(ALPHABETS["cjk"])
    assert "'的' splits into 3 tokens" in sentence


def test_symbols_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path):
    tokenizer = sentencepiece_tokenizer(tmp_path, GPTSw3Tokenizer, "unigram", byte_fallback=False)
    sentence = refusal(tokenizer, "digits", 10)
    assert offenders(sentence) == list("0123456789")
    assert "'0' is unknown to the tokenizer" in sentence


def test_special_tokens_among_the_symbols_are_refused():
    tokenizer = byte_level_tokenizer(eos_token="e", pad_token="g")
    sentence = refusal(tokenizer, "latin", 26)
    assert offenders(sentence) == ["e", "g"]
    assert "'e' is a special token; 'g' is a special token" in sentence
    assert "alphabet_size=4" in sentence
    assert len(alphabet_ids(tokenizer, "latin", 4)) == 4


def test_symbols_that_the_tokenizer_rewrites_are_refused():
    sentence = refusal(byte_level_tokenizer(lower_case=True), "latin_upper", 2)
    assert offenders(sentence) == ["A", "B"]


def test_a_bos_that_the_tokenizer_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"must have a BOS token, but this tokenizer has none; set model\.bos"):
        make_encoder(byte_level_tokenizer(), alphabet="latin", alphabet_size=2, bos=True)


def test_too_large_an_alphabet_is_refused_before_the_tokenizer_is_asked():
    with pytest.raises(ValueError, match="2 <= alphabet_size <= 10 must hold"):
        make_encoder(character_tokenizer(), alphabet="digits", alphabet_size=11, bos=False)


# The vocabulary alphabet.


def vocabulary_ids(tokenizer: PreTrainedTokenizerBase, alphabet_size: int, seed: int) -> list[int]:
    encoder = make_encoder(
        tokenizer, alphabet="vocabulary", alphabet_size=alphabet_size, bos=False, vocabulary_seed=seed
    )
    return encoder.symbol_ids.tolist()


def test_the_vocabulary_alphabet_can_take_every_ordinary_token_and_no_other():
    tokenizer = byte_level_tokenizer(bos_token="<bos>")
    tokenizer.add_tokens(["added"])
    assert len(tokenizer) > 500
    ordinary = set(range(500)) - {tokenizer.get_vocab()["<|endoftext|>"]}
    assert sorted(vocabulary_ids(tokenizer, 499, seed=0)) == sorted(ordinary)
    with pytest.raises(ValueError, match="2 <= alphabet_size <= 499 must hold for alphabet 'vocabulary'"):
        vocabulary_ids(tokenizer, 500, seed=0)


def test_the_vocabulary_alphabet_is_nested_by_size_and_drawn_by_its_seed():
    tokenizer = character_tokenizer()
    assert vocabulary_ids(tokenizer, 50, seed=1)[:20] == vocabulary_ids(tokenizer, 20, seed=1)
    assert vocabulary_ids(tokenizer, 50, seed=1) != vocabulary_ids(tokenizer, 50, seed=2)


# Batches.


def encoder_of(bos: bool, symbol_ids: tuple[int, ...] = (10, 11, 12)) -> Encoder:
    return Encoder(symbol_ids=np.array(symbol_ids), bos_id=7 if bos else None, pad_id=9)


def test_with_bos_every_symbol_is_a_target():
    batch = encode([np.array([0, 2, 1])], encoder_of(bos=True))
    assert batch.ids.tolist() == [[7, 10, 12, 11]]
    assert batch.is_target.tolist() == [[False, True, True, True]]
    assert batch.num_leading == 1


def test_without_bos_every_symbol_but_the_first_is_a_target():
    batch = encode([np.array([0, 2, 1])], encoder_of(bos=False))
    assert batch.ids.tolist() == [[10, 12, 11]]
    assert batch.is_target.tolist() == [[False, True, True]]
    assert batch.num_leading == 0


def test_shorter_strings_are_padded_on_the_right_with_what_is_no_target():
    batch = encode([np.array([0, 1, 2]), np.array([2])], encoder_of(bos=False))
    assert batch.ids.tolist() == [[10, 11, 12], [12, 9, 9]]
    assert batch.is_target.tolist() == [[False, True, True], [False, False, False]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5), st.booleans())
@settings(deadline=None)
def test_a_batch_can_be_read_back(strings: list[list[int]], bos: bool):
    encoder = encoder_of(bos)
    batch = encode([np.array(string) for string in strings], encoder)
    for row, string in enumerate(strings):
        tokens = batch.ids[row][batch.attention_mask[row].bool()].tolist()
        assert tokens == ([7] if bos else []) + [10 + symbol for symbol in string]
        targets = batch.ids[row][batch.is_target[row]].tolist()
        assert targets == [10 + symbol for symbol in string[0 if bos else 1 :]]


def test_rows_of_a_batch_are_taken_in_the_order_asked_for():
    batch = encode([np.array([k, k]) for k in range(3)], encoder_of(bos=True)).of(np.array([2, 0]))
    assert batch.ids.tolist() == [[7, 12, 12], [7, 10, 10]]
    assert batch.is_target.shape == batch.attention_mask.shape == (2, 3)
    assert batch.num_leading == 1


def test_a_batch_moves_as_a_whole():
    batch = encode([np.array([0, 1])], encoder_of(bos=True)).to("meta")
    assert {batch.ids.device, batch.is_target.device, batch.attention_mask.device} == {torch.device("meta")}


@pytest.mark.parametrize("strings", [[], [np.array([], dtype=np.int64)]])
def test_a_batch_without_symbols_is_refused(strings: list[np.ndarray]):
    with pytest.raises(ValueError, match="needs at least one string, and each string at least one symbol"):
        encode(strings, encoder_of(bos=True))


@pytest.mark.parametrize("bos", [True, False])
def test_padding_has_an_id_whatever_the_tokenizer_lacks(bos: bool):
    tokenizer = byte_level_tokenizer(bos_token="<|endoftext|>")
    encoder = make_encoder(tokenizer, alphabet="latin", alphabet_size=2, bos=bos)
    assert encoder.pad_id == tokenizer.eos_token_id
    assert encoder.bos_id == (tokenizer.bos_token_id if bos else None)
