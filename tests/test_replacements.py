"""What stands in for replaced tokens: its distribution, its independence of the target, and that it is drawn alike."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from memray.encoding import Encoder
from memray.models import character_tokenizer
from memray.probes import REPLACEMENTS, Condition, Replacement
from memray.replacements import BLOCK, Draws, ordinary_ids_outside
from memray.strings import IidSource, MarkovSource, Source, Stream, TextSource, draw_strings

LENGTH = 4000
DRAWN: tuple[Replacement, ...] = ("source", "other_string", "wrong", "outside", "constant")


def draws_of(
    source: Source, *, length: int = LENGTH, number: int = 0, stream: Stream = "trained", seed: int = 0
) -> Draws:
    string = draw_strings(source, length=length, num_strings=number + 1, seed=seed, stream=stream)[number]
    symbol_ids = np.arange(4, 4 + source.alphabet_size)
    encoder = Encoder(symbol_ids=symbol_ids, bos_id=0, pad_id=2)
    return Draws(string, number, stream, source, encoder, np.arange(40, 60), seed)


def shares_of(ids: ndarray, alphabet_size: int) -> ndarray:
    return np.bincount(ids - 4, minlength=alphabet_size) / len(ids)


# Five standard deviations of a share.
WITHIN = 5 * 0.5 / np.sqrt(LENGTH)

SKEWED, UNIFORM = IidSource(alphabet_size=7, entropy_bits=1.5), IidSource(alphabet_size=7)


@pytest.mark.parametrize("replacement", ["source", "other_string"])
def test_fresh_symbols_have_the_distribution_of_the_source(replacement: Replacement) -> None:
    ids = draws_of(SKEWED).replaced(replacement, 0)
    assert shares_of(ids, 7) == pytest.approx(np.asarray(SKEWED.marginal), abs=WITHIN)


def test_another_string_has_the_structure_of_its_source_and_fresh_symbols_have_not() -> None:
    markov = MarkovSource(fresh=UNIFORM, order=1, conditional_entropy_bits=0.5, seed=0)
    draws = draws_of(markov)
    bits = []
    for ids in (draws.replaced("other_string", 0), draws.replaced("source", 0)):
        symbols = ids - 4
        predicted = markov.conditional(symbols)[np.arange(1, LENGTH), symbols[1:]]
        bits.append(float(np.mean(-np.log2(predicted))))
        # Five times further off than independent symbols would be: those of a chain come in runs.
        assert shares_of(ids, 7) == pytest.approx(np.full(7, 1 / 7), abs=5 * WITHIN)
    assert bits[0] == pytest.approx(0.5, abs=0.1)
    assert bits[1] > 2


def test_the_wrong_distribution_is_uniform_where_the_source_is_skewed() -> None:
    assert shares_of(draws_of(SKEWED).replaced("wrong", 0), 7) == pytest.approx(np.full(7, 1 / 7), abs=WITHIN)


def test_the_wrong_distribution_has_half_the_entropy_of_a_uniform_source_and_any_favourite() -> None:
    draws, favourites = draws_of(UNIFORM), set()
    expected = np.sort(IidSource(alphabet_size=7, entropy_bits=np.log2(7) / 2).marginal)
    for redraw in range(12):
        shares = shares_of(draws.replaced("wrong", redraw), 7)
        assert np.sort(shares) == pytest.approx(expected, abs=WITHIN)
        favourites.add(int(shares.argmax()))
    assert len(favourites) > 3


def test_a_constant_is_one_symbol_of_the_alphabet_and_not_always_the_same() -> None:
    draws = draws_of(UNIFORM)
    found = [set(draws.replaced("constant", redraw)) for redraw in range(12)]
    assert all(len(each) == 1 for each in found)
    assert 1 < len(set.union(*found)) <= 7
    assert set.union(*found) <= set(range(4, 11))


def test_symbols_from_outside_are_none_of_the_alphabets() -> None:
    assert set(draws_of(UNIFORM).replaced("outside", 0)) == set(range(40, 60))


def test_an_alphabet_that_is_the_whole_vocabulary_has_no_outside() -> None:
    draws = replace(draws_of(UNIFORM), outside_ids=np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="'outside' must have ordinary tokens outside the alphabet"):
        draws.replaced("outside", 0)


def test_the_ordinary_tokens_outside_an_alphabet_are_all_but_its_own_and_the_special_ones() -> None:
    tokenizer = character_tokenizer()
    outside = ordinary_ids_outside(tokenizer, np.arange(4, 30))
    assert outside.tolist() == list(range(30, len(tokenizer)))


def test_another_passage_of_a_text_is_never_a_trained_one_nor_the_string_itself() -> None:
    text = TextSource(symbols=np.arange(200), symbol_ids=np.arange(4, 204), names=("",) * 200)
    trained = draw_strings(text, length=10, num_strings=5, seed=0, stream="trained")
    draws = [draws_of(text, length=10, number=number) for number in range(5)]
    draws += [draws_of(text, length=10, number=number, stream="held_out") for number in range(3)]
    for each in draws:
        for redraw in range(5):
            other = each.replaced("other_string", redraw) - 4
            assert not set(other) & (set(trained.ravel()) | set(each.string))


# Seeds.


@pytest.mark.parametrize("replacement", [*DRAWN, "shuffled"])
def test_a_draw_depends_on_seed_stream_string_and_redraw_and_on_nothing_else(replacement: Replacement) -> None:
    def drawn(draws: Draws, redraw: int = 0) -> list[int]:
        draws = replace(draws, string=draws_of(UNIFORM).string)  # the same string throughout
        if replacement == "shuffled":
            return draws.shuffled(np.arange(LENGTH), redraw).tolist()
        return draws.replaced(replacement, redraw).tolist()

    draws = draws_of(UNIFORM)
    first = drawn(draws)
    others = [drawn(draws_of(UNIFORM, seed=seed)) for seed in range(1, 9)]
    others += [drawn(draws_of(UNIFORM, number=number)) for number in range(1, 9)]
    others += [drawn(draws, redraw) for redraw in range(1, 9)]
    others += [drawn(draws_of(UNIFORM, stream="held_out"))]
    assert drawn(draws_of(UNIFORM)) == first
    # A constant is one of seven: 25 of them are not all equal.
    assert any(other != first for other in others) if replacement == "constant" else first not in others


def test_no_replacement_draws_what_a_string_is_drawn_from() -> None:
    draws = draws_of(UNIFORM)
    strings = [*draw_strings(UNIFORM, length=LENGTH, num_strings=9, seed=0, stream="trained")]
    strings += [*draw_strings(UNIFORM, length=LENGTH, num_strings=9, seed=0, stream="held_out")]
    for replacement in ("source", "other_string"):
        for redraw in range(5):
            symbols = draws.replaced(replacement, redraw) - 4
            assert max(np.mean(symbols == string) for string in strings) < 1 / 7 + WITHIN


def test_the_codes_of_the_replacements_never_change() -> None:
    # They stand in records, and seed the draws.
    assert REPLACEMENTS == (
        "source", "shuffled", "other_string", "wrong", "outside", "constant", "none", "none_in_place",
    )  # fmt: skip


# Shuffled contexts, and shares of tokens left true.


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.data())
def test_a_shuffled_context_is_a_permutation_of_the_remote_tokens_that_are_not_left_true(
    length: int, data: st.DataObject
) -> None:
    source = IidSource(alphabet_size=60)
    draws = draws_of(source, length=length)
    k, share = data.draw(st.integers(0, length - 1)), data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75]))
    targets = np.arange(k, length)
    prompts = draws.prompts(Condition("local", k, share, "shuffled"), targets, 0)
    is_left = draws.left_true(share, 0)
    for target, prompt in zip(targets, prompts, strict=True):
        tokens, remote = prompt.ids[1:], target - k
        assert prompt.ids[0] == 0
        assert prompt.positions.tolist() == list(range(target + 1))
        assert tokens[remote:].tolist() == draws.ids[remote:target].tolist()
        assert tokens[:remote][is_left[:remote]].tolist() == draws.ids[:remote][is_left[:remote]].tolist()
        assert sorted(tokens[:remote]) == sorted(draws.ids[:remote])


def test_a_shuffled_context_is_in_any_order() -> None:
    draws = replace(draws_of(UNIFORM, length=3), string=np.array([0, 1, 2]))
    orders = {tuple(draws.shuffled(np.arange(3), redraw)) for redraw in range(60)}
    assert len(orders) == 6


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 100), st.integers(0, 4))
def test_every_context_has_the_share_of_true_tokens_to_within_a_block_and_keeps_those_of_smaller_shares(
    length: int, redraw: int
) -> None:
    draws = draws_of(UNIFORM, length=length)
    smaller = np.zeros(length, dtype=bool)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        is_true = draws.left_true(share, redraw)
        counts, sizes = np.cumsum(is_true), np.arange(1, length + 1)
        assert np.all(np.abs(counts - share * sizes) <= BLOCK / 4)
        assert np.all(counts[BLOCK - 1 :: BLOCK] == share * sizes[BLOCK - 1 :: BLOCK])
        assert np.all(is_true >= smaller)
        smaller = is_true
