"""Sources against the check values of protocol §1, literal transcriptions, enumeration, and golden hashes."""

import hashlib
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from memray.measures.recall import Truth, best_guesser, measure_string
from memray.strings import (
    ALPHABETS,
    IidSource,
    MarkovSource,
    MotifSource,
    Skew,
    Source,
    Stream,
    TextSource,
    alphabet_symbols,
    draw_strings,
    empirical_entropy_bits,
    max_alphabet_size,
    read_text,
    zlib_bits_per_symbol,
)
from tests.test_recall import in_alphabet, simulate_scores

SKEWS = get_args(Skew)
# What the protocol rounds to 2.807 bits.
LOG2_7 = math.log2(7)
UNIFORM = IidSource(alphabet_size=26)
TWO_BITS = IidSource(alphabet_size=26, entropy_bits=2.0)
GEOMETRIC = IidSource(alphabet_size=7, entropy_bits=2.0, skew="geometric")


def text_source(num_tokens: int, alphabet_size: int = 7) -> TextSource:
    """A text in which no token has as many occurrences as another."""
    symbols = np.sqrt(np.random.default_rng(0).random(num_tokens)) * alphabet_size
    ids = np.arange(alphabet_size) * 3 + 5
    return TextSource(symbols=symbols.astype(np.int64), symbol_ids=ids, names=tuple(f"▁{k}" for k in ids))


SOURCES: list[Source] = [
    IidSource(alphabet_size=2),
    UNIFORM,
    IidSource(alphabet_size=300),
    *(IidSource(alphabet_size=26, entropy_bits=bits, skew=skew) for bits in (1.0, 2.807) for skew in SKEWS),
    MarkovSource(fresh=IidSource(alphabet_size=2), conditional_entropy_bits=0.2, seed=1),
    MarkovSource(fresh=UNIFORM, conditional_entropy_bits=3.0, seed=2),
    MarkovSource(fresh=UNIFORM, order=5, conditional_entropy_bits=1.0, seed=3),
    MarkovSource(fresh=UNIFORM, order=2),
    MarkovSource(fresh=TWO_BITS, order=2, conditional_entropy_bits=0.5, seed=4),
    MarkovSource(fresh=GEOMETRIC, order=3, conditional_entropy_bits=1.0),
    MotifSource(fresh=UNIFORM, motif_length=8),
    MotifSource(fresh=TWO_BITS, motif_length=100),
    MotifSource(fresh=UNIFORM, motif_length=3, depth=2, branching=3),
    MotifSource(fresh=GEOMETRIC, motif_length=4, depth=3, branching=5),
    text_source(3000),
]


def source_name(source: Source) -> str:
    entropies = f"{source.nominal_entropy_bits:.3f}-{source.entropy_rate_bits(40):.3f}"
    order = getattr(source, "order", getattr(source, "depth", ""))
    return f"{source.kind}{order}-{source.alphabet_size}-{entropies}-{getattr(source, 'skew', '')}"


# The contract of every source.


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_a_source_draws_symbols_of_its_alphabet_at_the_rates_of_its_marginal_at_every_position(source: Source):
    num_strings = 400  # one symbol of each: within a string they may depend on each other
    drawn = np.stack([source.draw(16, np.random.default_rng([1, j])) for j in range(num_strings)])
    # 5 standard deviations a symbol, and one count for where the normal approximation is none.
    deviation = np.sqrt(num_strings * source.marginal * (1 - source.marginal))
    for position in (0, 6, 15):
        counts = np.bincount(drawn[:, position], minlength=source.alphabet_size)
        assert len(counts) == source.alphabet_size
        assert (np.abs(counts - num_strings * source.marginal) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_a_shorter_string_is_a_prefix_of_a_longer_one_from_an_equal_generator(source: Source):
    longer = source.draw(100, np.random.default_rng(2))
    assert source.draw(37, np.random.default_rng(2)).tolist() == longer[:37].tolist()


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_the_prediction_of_a_source_is_a_distribution_over_its_alphabet_at_each_position(source: Source):
    assert isinstance(source, Source)
    conditional = source.conditional(source.draw(50, np.random.default_rng(3)))
    assert conditional.shape == (50, source.alphabet_size)
    assert (conditional >= 0).all()
    np.testing.assert_allclose(conditional.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
@pytest.mark.parametrize("position", [0, 1, 7, 30])
def test_the_prediction_of_a_symbol_knows_nothing_of_it_or_of_what_follows(source: Source, position: int):
    string, other = (source.draw(40, np.random.default_rng(seed)) for seed in (4, 5))
    changed = np.concatenate([string[:position], other[position:]])
    known = slice(0, position + 1)
    assert source.conditional(string)[known].tolist() == source.conditional(changed)[known].tolist()


@pytest.mark.parametrize("source", [source for source in SOURCES if source.kind != "text"], ids=source_name)
def test_the_entropy_rate_is_what_the_prediction_costs_on_average(source: Source):
    for length, num_strings in ((2, 200), (64, 50)):
        drawn = [source.draw(length, np.random.default_rng([6, j])) for j in range(num_strings)]
        bits = [-np.log2(source.conditional(string)[np.arange(length), string]).mean() for string in drawn]
        # 5 standard errors of the mean; a uniform source costs the same on every string.
        tolerance = 5 * float(np.std(bits, ddof=1)) / math.sqrt(num_strings) + 1e-9
        assert np.mean(bits) == pytest.approx(source.entropy_rate_bits(length), abs=tolerance)


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_the_marginal_has_the_nominal_entropy_and_cannot_be_written_to(source: Source):
    p = source.marginal[source.marginal > 0]
    assert -float((p * np.log2(p)).sum()) == pytest.approx(source.nominal_entropy_bits, abs=1e-9)
    with pytest.raises(ValueError, match="read-only"):
        source.marginal[0] = 1


# The iid source.


@pytest.mark.parametrize(
    ("entropy_bits", "probability_of_a", "ratio", "exponent"),
    [
        (1.0, 0.8914, 0.2271, 2.957),
        (2.0, 0.7455, 0.5000, 2.050),
        (LOG2_7, 0.6040, 0.6766, 1.591),
        (3.7, 0.4139, 0.8164, 1.131),
    ],
)
def test_the_skews_have_the_check_values_of_the_protocol(
    entropy_bits: float, probability_of_a: float, ratio: float, exponent: float
):
    one_token, geometric, zipf = (
        IidSource(alphabet_size=26, entropy_bits=entropy_bits, skew=skew).marginal for skew in SKEWS
    )
    # The protocol gives four figures, so up to one in the last of them.
    assert one_token[0] == pytest.approx(probability_of_a, abs=1e-4)
    assert geometric[1] / geometric[0] == pytest.approx(ratio, abs=1e-4)
    assert -math.log2(zipf[1] / zipf[0]) == pytest.approx(exponent, abs=1e-3)
    # And the shapes are what they are called.
    np.testing.assert_allclose(one_token[1:], (1 - one_token[0]) / 25, rtol=1e-12)
    np.testing.assert_allclose(geometric[1:] / geometric[:-1], geometric[1] / geometric[0], rtol=1e-9)
    ranks = np.arange(1, 27)
    np.testing.assert_allclose(np.log(zipf) - np.log(zipf[0]), np.log(ranks) * math.log2(zipf[1] / zipf[0]), atol=1e-9)


@given(st.integers(2, 500), st.floats(1e-6, 1), st.sampled_from(SKEWS))
@settings(deadline=None, max_examples=60)
def test_any_entropy_up_to_log2_of_the_alphabet_size_is_met(alphabet_size: int, share: float, skew: Skew):
    target = share * math.log2(alphabet_size)
    marginal = IidSource(alphabet_size=alphabet_size, entropy_bits=target, skew=skew).marginal
    p = marginal[marginal > 0]
    # 1e-10 where it is solved; within 1e-9 of the largest entropy the source is uniform.
    assert -float((p * np.log2(p)).sum()) == pytest.approx(target, abs=1.1e-9)
    assert marginal.sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(marginal) <= 1e-15).all(), "the first symbol is the likeliest"


@given(st.integers(2, 30), st.floats(0.01, 1), st.sampled_from(SKEWS), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_drawing_inverts_the_cumulative_distribution(alphabet_size: int, share: float, skew: Skew, seed: int):
    source = IidSource(alphabet_size=alphabet_size, entropy_bits=share * math.log2(alphabet_size), skew=skew)

    def invert(u: float) -> int:
        cumulative = 0.0
        for symbol, probability in enumerate(source.marginal):
            cumulative += probability
            if u < cumulative:
                return symbol
        return alphabet_size - 1

    expected = [invert(u) for u in np.random.default_rng(seed).random(50)]
    assert source.draw(50, np.random.default_rng(seed)).tolist() == expected


def test_a_lower_entropy_keeps_every_favoured_symbol_of_a_higher_one():
    low, high = (
        IidSource(alphabet_size=26, entropy_bits=bits).draw(1000, np.random.default_rng(4)) for bits in (1.0, 3.7)
    )
    assert (low[high == 0] == 0).all(), "the two must share their random numbers"


@pytest.mark.parametrize("entropy_bits", [None, math.log2(26), math.log2(26) - 1e-10, math.log2(26) + 1e-10])
def test_the_largest_entropy_means_the_uniform_source(entropy_bits: float | None):
    source = IidSource(alphabet_size=26, entropy_bits=entropy_bits, skew="zipf")
    assert source.marginal.tolist() == [1 / 26] * 26
    assert source.nominal_entropy_bits == pytest.approx(math.log2(26), abs=1e-9)


@pytest.mark.parametrize("entropy_bits", [0.0, -1.0, 4.71, math.inf, math.nan])
def test_an_entropy_that_no_distribution_has_is_refused(entropy_bits: float):
    with pytest.raises(ValueError, match=r"0 < entropy_bits <= log2\(alphabet_size\) must hold, but got"):
        IidSource(alphabet_size=26, entropy_bits=entropy_bits)


def test_an_alphabet_of_one_symbol_is_refused():
    with pytest.raises(ValueError, match="alphabet_size >= 2 must hold, but got alphabet_size=1"):
        IidSource(alphabet_size=1)


# The Markov source.


def chance_of_each_string(source: Source, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every string, by the chain rule over the source's own predictions."""
    strings = itertools.product(range(source.alphabet_size), repeat=length)
    rows = np.arange(length)
    return {each: float(source.conditional(np.array(each))[rows, each].prod()) for each in strings}


def entropy(probabilities: Iterator[float]) -> float:
    return -sum(p * math.log2(p) for p in probabilities if p > 0)


SMALL_MARKOV = [
    MarkovSource(fresh=IidSource(alphabet_size=2), order=3, conditional_entropy_bits=0.3, seed=1),
    MarkovSource(fresh=IidSource(alphabet_size=3), order=1, conditional_entropy_bits=0.9, seed=2),
    MarkovSource(fresh=IidSource(alphabet_size=3), order=2, conditional_entropy_bits=0.2, seed=3),
    MarkovSource(fresh=IidSource(alphabet_size=3, entropy_bits=1.2), order=2, conditional_entropy_bits=0.7, seed=4),
    MarkovSource(
        fresh=IidSource(alphabet_size=3, entropy_bits=1.0, skew="zipf"), order=2, conditional_entropy_bits=0.6
    ),
]


@pytest.mark.parametrize("source", SMALL_MARKOV, ids=source_name)
def test_any_order_symbols_in_a_row_are_independent_and_their_successor_has_the_conditional_entropy(
    source: MarkovSource,
):
    length, order = source.order + 3, source.order
    chances = chance_of_each_string(source, length)
    assert sum(chances.values()) == pytest.approx(1)

    def window(begin: int, size: int) -> dict[tuple[int, ...], float]:
        found: dict[tuple[int, ...], float] = {}
        for string, chance in chances.items():
            part = string[begin : begin + size]
            found[part] = found.get(part, 0.0) + chance
        return found

    for begin in range(length - order + 1):
        for symbols, chance in window(begin, order).items():
            assert chance == pytest.approx(math.prod(source.marginal[list(symbols)])), (begin, symbols)
    conditional_bits = [
        entropy(iter(window(begin, order + 1).values())) - entropy(iter(window(begin, order).values()))
        for begin in range(length - order)
    ]
    assert conditional_bits == pytest.approx([source.conditional_entropy_bits] * (length - order), abs=1e-9)
    assert entropy(iter(chances.values())) == pytest.approx(length * source.entropy_rate_bits(length), abs=1e-9)


@given(st.integers(2, 40), st.floats(0.05, 1), st.floats(0.01, 1), st.sampled_from(SKEWS))
@settings(deadline=None, max_examples=40)
def test_any_conditional_entropy_up_to_the_marginals_is_met(
    alphabet_size: int, share: float, conditional_share: float, skew: Skew
):
    fresh = IidSource(alphabet_size=alphabet_size, entropy_bits=share * math.log2(alphabet_size), skew=skew)
    target = conditional_share * fresh.nominal_entropy_bits
    source = MarkovSource(fresh=fresh, conditional_entropy_bits=target)
    # The last symbol after each possible one, which all have their marginal probability.
    rows = [source.conditional(np.array([symbol, 0]))[1] for symbol in range(alphabet_size)]
    bits = sum(p * entropy(iter(row.tolist())) for p, row in zip(fresh.marginal, rows, strict=True))
    assert bits == pytest.approx(target, abs=1e-8)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_without_dependence_the_strings_are_those_of_the_iid_source(order: int):
    for fresh in (UNIFORM, TWO_BITS, GEOMETRIC):
        for bits in (None, fresh.nominal_entropy_bits):
            source = MarkovSource(fresh=fresh, order=order, conditional_entropy_bits=bits, seed=3)
            drawn, expected = (each.draw(200, np.random.default_rng(7)) for each in (source, fresh))
            assert drawn.tolist() == expected.tolist()
            assert source.conditional(drawn).tolist() == fresh.conditional(drawn).tolist()


def successors(source: MarkovSource, *others: int) -> list[int]:
    """The likeliest symbol after each c_1 that is followed by the others."""
    strings = [np.array([symbol, *others, 0]) for symbol in range(source.alphabet_size)]
    return [int((source.conditional(string)[-1] - source.marginal).argmax()) for string in strings]


@pytest.mark.parametrize("seed", range(5))
def test_at_order_one_equally_likely_symbols_follow_each_other_in_one_cycle(seed: int):
    for fresh, favoured in ((UNIFORM, []), (TWO_BITS, [0])):
        g = successors(MarkovSource(fresh=fresh, conditional_entropy_bits=1.0, seed=seed))
        alike = [symbol for symbol in range(26) if symbol not in favoured]
        seen, symbol = [], alike[0]
        for _ in alike:
            seen.append(symbol)
            symbol = g[symbol]
        assert sorted(seen) == alike
        assert symbol == alike[0]
        assert [g[symbol] for symbol in favoured] == favoured


def test_at_a_higher_order_all_symbols_of_the_context_decide_and_every_permutation_occurs():
    source = MarkovSource(fresh=IidSource(alphabet_size=3), order=3, conditional_entropy_bits=0.1, seed=1)
    found = {tuple(successors(source, *others)) for others in itertools.product(range(3), repeat=2)}
    assert len(found) > 3
    wide = MarkovSource(fresh=IidSource(alphabet_size=3), order=6, conditional_entropy_bits=0.1, seed=1)
    found = {tuple(successors(wide, *others)) for others in itertools.product(range(3), repeat=5)}
    assert found == set(itertools.permutations(range(3)))


def test_symbols_unlike_any_other_are_repeated_after_as_many_symbols_as_the_order_has():
    source = MarkovSource(fresh=GEOMETRIC, order=3, conditional_entropy_bits=1e-3)
    string = source.draw(300, np.random.default_rng(0))
    assert np.mean(string[3:] == string[:-3]) > 0.99


def test_the_transitions_move_with_the_seed():
    one, same, other = (MarkovSource(fresh=UNIFORM, conditional_entropy_bits=1.0, seed=seed) for seed in (1, 1, 2))
    assert successors(one) == successors(same) != successors(other)


@pytest.mark.parametrize(("bits", "order"), [(0.0, 1), (-1.0, 1), (4.71, 1), (math.nan, 1), (1.0, 0)])
def test_a_markov_source_that_cannot_be_is_refused(bits: float, order: int):
    with pytest.raises(ValueError, match="must hold, but got"):
        MarkovSource(fresh=UNIFORM, order=order, conditional_entropy_bits=bits)


# The sources of motifs.


@given(st.integers(1, 7), st.integers(0, 4), st.integers(3, 6), st.integers(1, 400), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_motifs_are_tiled_and_nested_as_they_are_defined(
    motif_length: int, depth: int, branching: int, length: int, seed: int
):
    fresh = iter(UNIFORM.draw(motif_length * 2**depth, np.random.default_rng(seed)).tolist())

    def motif(level: int) -> list[int]:
        if level == 0:
            return list(itertools.islice(fresh, motif_length))
        first, second = motif(level - 1), motif(level - 1)
        return [symbol for part in range(branching) for symbol in (second if part % 2 else first)]

    expected = list(itertools.islice(itertools.cycle(motif(depth)), length))
    source = MotifSource(fresh=UNIFORM, motif_length=motif_length, depth=depth, branching=branching)
    assert source.draw(length, np.random.default_rng(seed)).tolist() == expected


@pytest.mark.parametrize("source", [source for source in SOURCES if isinstance(source, MotifSource)], ids=source_name)
def test_a_source_of_motifs_is_certain_of_every_symbol_but_the_fresh_ones(source: MotifSource):
    string = source.draw(1000, np.random.default_rng(0))
    conditional, seen = source.conditional(string), set()
    for position, which in enumerate(source.fresh_symbols(1000).tolist()):
        if which in seen:
            assert conditional[position].tolist() == np.eye(source.alphabet_size)[string[position]].tolist()
        else:
            assert which == len(seen), "fresh symbols are numbered as they appear"
            assert conditional[position].tolist() == source.marginal.tolist()
        seen.add(which)
    assert len(seen) == min(1000, source.motif_length * 2**source.depth)
    assert source.entropy_rate_bits(1000) == len(seen) * source.nominal_entropy_bits / 1000


def test_every_string_has_motifs_of_its_own():
    source = MotifSource(fresh=UNIFORM, motif_length=16)
    drawn = [draw_strings(source, length=64, num_strings=2, seed=0, stream=stream) for stream in get_args(Stream)]
    assert len({tuple(string[:16]) for string in np.concatenate(drawn).tolist()}) == 2 * len(get_args(Stream))


@pytest.mark.parametrize("wrong", [{"motif_length": 0}, {"depth": -1}, {"branching": 2}])
def test_motifs_that_cannot_be_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="must hold, but got motif_length="):
        MotifSource(fresh=UNIFORM, **({"motif_length": 4} | wrong))


# Predictable structure is no memory.

STRUCTURED = [
    MarkovSource(fresh=UNIFORM, conditional_entropy_bits=1.0),
    MarkovSource(fresh=TWO_BITS, order=2, conditional_entropy_bits=0.5),
    *(MotifSource(fresh=fresh, motif_length=32) for fresh in (UNIFORM, TWO_BITS, IidSource(alphabet_size=2))),
    MotifSource(fresh=UNIFORM, motif_length=16, depth=2, branching=4),
]


Predict = Callable[[ndarray, ndarray, Source], ndarray]
READERS: dict[str, Predict] = {
    "one that knows the source": lambda string, rows, source: rows,
    "one that copies, and is sure nine times in ten": lambda string, rows, source: 0.9 * rows + 0.1 * source.marginal,
    "one that copies, and guesses uniformly": lambda string, rows, source: np.where(
        rows.max(axis=1, keepdims=True) == 1, rows, 1 / source.alphabet_size
    ),
    "one that sees no structure": lambda string, rows, source: np.tile(source.marginal, (len(rows), 1)),
}


@cache
def known(source: Source, length: int) -> list[tuple[ndarray, ndarray, Truth]]:
    """60 strings without their first symbol, which is no target without BOS, and what is known of them."""
    found, symbol_ids = [], np.arange(1, source.alphabet_size + 1)
    for j in range(60):
        string = source.draw(length, np.random.default_rng([8, j]))
        rows, targets = source.conditional(string)[1:], string[1:]
        truth = Truth.of(targets, symbol_ids=symbol_ids, conditional=rows, marginal=source.marginal)
        found.append((targets, rows, truth))
    return found


def recall(source: Source, predict: Predict, *, mass: float = 1.0) -> list[float]:
    """What is recalled of each string of two symbols or more, before held-out strings are considered."""
    values = []
    for string, rows, truth in known(source, 128):
        scores = simulate_scores(in_alphabet(predict(string, rows, source), mass), string, source.marginal)
        values.append(measure_string(scores, truth)["recall/uncorrected"])
    return [value for value in values if not math.isnan(value)]


@pytest.mark.parametrize("mass", [1.0, 0.9])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("source", STRUCTURED, ids=source_name)
def test_a_reader_that_continues_the_structure_has_memorised_nothing(source: Source, reader: str, mass: float):
    values = recall(source, READERS[reader], mass=mass)
    assert len(values) > 50
    assert np.mean(values) + 1.645 * np.std(values, ddof=1) / math.sqrt(len(values)) <= 0.01


@pytest.mark.parametrize("source", STRUCTURED, ids=source_name)
def test_full_recall_of_a_structured_string_is_one(source: Source):
    values = recall(source, lambda string, rows, source: np.eye(source.alphabet_size)[string])
    assert values == pytest.approx([1.0] * len(values))


def test_recall_of_a_repeated_string_counts_its_fresh_symbols_alone():
    def half(string: ndarray, rows: ndarray, source: Source) -> ndarray:
        is_fixed = rows.max(axis=1) == 1
        own = np.bincount(string[~is_fixed], minlength=source.alphabet_size) / np.sum(~is_fixed)
        is_known = is_fixed | (np.arange(len(rows)) < 16)
        return np.where(is_known[:, None], np.eye(source.alphabet_size)[string], own)

    # 16 of the 31 fresh targets, which are worth nearly the same each.
    assert np.mean(recall(MotifSource(fresh=UNIFORM, motif_length=32), half)) == pytest.approx(16 / 31, abs=0.01)


@pytest.mark.parametrize("source", [source for source in STRUCTURED if source.kind == "repeated"], ids=source_name)
def test_the_best_guesser_of_a_repeated_string_copies_what_is_fixed(source: MotifSource):
    string = source.draw(256, np.random.default_rng(0))
    guesser = best_guesser(string, source.conditional(string))
    num_fresh = source.motif_length
    counts = np.bincount(string[:num_fresh], minlength=source.alphabet_size)
    assert guesser.accuracy == pytest.approx((counts.max() + 256 - num_fresh) / 256)
    assert guesser.log2_probability[num_fresh:].tolist() == [0.0] * (256 - num_fresh)
    own = np.log2(counts[string[:num_fresh]] / num_fresh)
    assert guesser.log2_probability[:num_fresh] == pytest.approx(own)


@pytest.mark.parametrize("source", [source for source in STRUCTURED if source.kind in ("repeated", "hierarchical")],
                         ids=source_name)  # fmt: skip
def test_copying_with_the_frequencies_of_the_fresh_symbols_is_no_memory(source: MotifSource):
    def copier(string: ndarray, rows: ndarray, source: Source) -> ndarray:
        is_fixed = rows.max(axis=1) == 1
        own = np.bincount(string[~is_fixed], minlength=source.alphabet_size) / np.sum(~is_fixed)
        return np.where(is_fixed[:, None], rows, own)

    values = np.array(recall(source, copier))
    assert values.mean() + 1.96 * values.std(ddof=1) / math.sqrt(len(values)) <= 0.01


# Texts.


def test_the_passages_of_a_text_do_not_overlap_and_are_nested_by_number():
    source = text_source(1000, alphabet_size=600)  # so that a passage is found in one place alone
    text = source.symbols.tolist()

    def places(stream: Stream, num_strings: int, seed: int = 3) -> list[int]:
        drawn = draw_strings(source, length=45, num_strings=num_strings, seed=seed, stream=stream).tolist()
        return [next(k for k in range(1000) if text[k : k + 45] == string) for string in drawn]

    trained, held_out = places("trained", 12), places("held_out", 10)
    for one, other in itertools.combinations(sorted(trained + held_out), 2):
        assert other - one >= 45
    assert places("trained", 4) == trained[:4]
    assert places("held_out", 3) == held_out[:3]
    assert places("trained", 12, seed=4) != trained


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="3 strings of 34 tokens need a text of 102 tokens, but it has 100; take few"):
        draw_strings(text_source(100), length=34, num_strings=3, seed=0, stream="trained")


def test_the_marginal_of_a_text_is_its_token_frequencies_and_its_entropy_rate_is_unknown():
    source = TextSource(symbols=np.array([0, 1, 1, 2]), symbol_ids=np.array([4, 7, 9]), names=("a", "b", "c"))
    assert source.marginal.tolist() == [0.25, 0.5, 0.25]
    assert (source.alphabet_size, source.nominal_entropy_bits) == (3, 1.5)
    assert math.isnan(source.entropy_rate_bits(4))
    assert source.draw(9, np.random.default_rng(0)).tolist() in [
        np.roll([0, 1, 1, 2] * 3, k)[:9].tolist() for k in range(4)
    ]


def test_a_text_is_read_as_it_stands(tmp_path: Path):
    content = "Grüße,\r\nWelt\n".encode()
    (tmp_path / "text").write_bytes(content)
    assert read_text(str(tmp_path / "text")) == ("Grüße,\r\nWelt\n", hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("content", [None, b"caf\xe9"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a text file in UTF-8 wherever .*; correct the path"):
        read_text(str(tmp_path / "text"))


# Drawn strings.

GOLDEN = {
    ("uniform", "trained"): "f1ce3d7009b72326e524e5c804e9182830040d7bff177c7a97ded63468f31289",
    ("uniform", "held_out"): "330b1224c7dbd17119555f3969fefda0a39a6e0303617b2e5cd9f5c06df0d31b",
    ("one-token", "trained"): "85f56b8d84413fd2c4cfe7f8e87698871cdd923b34782d27c719360b1b17f9c7",
    ("geometric", "trained"): "a6a893cfcd61df4fb104092485ae216b6998ba34e67291e1081d5f43052a16a1",
    ("zipf", "trained"): "a087796e86694da8ed65f921236e2a02da7631bb4eacaff1edc28e265839fabb",
}


@pytest.mark.parametrize(("name", "stream"), GOLDEN)
def test_drawn_strings_never_change(name: str, stream: Stream):
    skew = next((skew for skew in SKEWS if skew == name), None)
    source = IidSource(alphabet_size=26, entropy_bits=2.0, skew=skew) if skew else IidSource(alphabet_size=26)
    strings = draw_strings(source, length=1024, num_strings=3, seed=7, stream=stream)
    assert hashlib.sha256(strings.astype("<i8").tobytes()).hexdigest() == GOLDEN[name, stream]


GOLDEN_STRUCTURED = {
    "markov": (
        MarkovSource(fresh=UNIFORM, conditional_entropy_bits=1.0, seed=7),
        "e15fb32b1232f13737791cf7206ad0062902a1c86e726132d2cf0bc888bd19ec",
    ),
    "markov of order 3": (
        MarkovSource(fresh=TWO_BITS, order=3, conditional_entropy_bits=1.0, seed=7),
        "fad0cd1dc78e8503a74a1abd055a3daa5c447eecd37085a6cbaee521681069b3",
    ),
    "repeated": (
        MotifSource(fresh=TWO_BITS, motif_length=64),
        "0f858d0682fca6c3a49fdd8f4a3ed02d44a35ca48ee00b9901fe43f52df4ba0c",
    ),
    "hierarchical": (
        MotifSource(fresh=UNIFORM, motif_length=16, depth=2),
        "f8e7ed04cbce0478906a33008ed4c6d95494e7c435e9adedde564f29ac26fb62",
    ),
    "text": (
        text_source(5000),
        "03d1ed31ccbb72d3602b0cc50966d90ea694b36781c7e6bb634cc631f49870eb",
    ),
}


@pytest.mark.parametrize("name", GOLDEN_STRUCTURED)
def test_drawn_strings_with_structure_never_change(name: str):
    source, expected = GOLDEN_STRUCTURED[name]
    strings = draw_strings(source, length=1024, num_strings=3, seed=7, stream="trained")
    assert hashlib.sha256(strings.astype("<i8").tobytes()).hexdigest() == expected


def test_strings_are_nested_by_number_and_by_length():
    source = IidSource(alphabet_size=26)
    many = draw_strings(source, length=64, num_strings=5, seed=1, stream="trained")
    few = draw_strings(source, length=20, num_strings=2, seed=1, stream="trained")
    assert few.tolist() == many[:2, :20].tolist()


def test_strings_differ_by_number_seed_and_stream():
    source = IidSource(alphabet_size=26)
    drawn = [
        tuple(string)
        for seed in (0, 1)
        for stream in get_args(Stream)
        for string in draw_strings(source, length=64, num_strings=3, seed=seed, stream=stream).tolist()
    ]
    assert len(set(drawn)) == 2 * 3 * len(get_args(Stream))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"num_strings": 0}, {"seed": -1}])
def test_counts_and_seeds_out_of_range_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="must hold, but got"):
        draw_strings(
            IidSource(alphabet_size=2), **({"length": 8, "num_strings": 1, "seed": 0} | wrong), stream="trained"
        )


# Entropy of one string.


@pytest.mark.parametrize(
    ("string", "bits"), [([0, 0, 0], 0.0), ([0, 1, 0, 1], 1.0), ([0, 1, 2, 3], 2.0), ([5, 5, 5, 9], 0.811278)]
)
def test_the_empirical_entropy_is_that_of_the_symbol_frequencies(string: list[int], bits: float):
    assert empirical_entropy_bits(np.array(string)) == pytest.approx(bits, abs=1e-6)


def test_the_compressed_size_lies_above_the_entropy_and_falls_with_structure():
    string = IidSource(alphabet_size=26).draw(4096, np.random.default_rng(0))
    random_bits = zlib_bits_per_symbol(string, alphabet_size=26)
    assert math.log2(26) < random_bits < 1.1 * math.log2(26)
    assert zlib_bits_per_symbol(np.tile(string[:64], 64), alphabet_size=26) < 0.1 * random_bits
    assert zlib_bits_per_symbol(np.zeros(4096, dtype=np.int64), alphabet_size=26) < 0.1


def test_the_compressed_size_sees_every_structure():
    sizes = {
        source.kind: zlib_bits_per_symbol(source.draw(4096, np.random.default_rng(0)), alphabet_size=26)
        for source in (
            MotifSource(fresh=UNIFORM, motif_length=64),
            MotifSource(fresh=UNIFORM, motif_length=64, depth=2),
            MarkovSource(fresh=UNIFORM, conditional_entropy_bits=1.0),
            UNIFORM,
        )
    }
    assert sorted(sizes, key=lambda kind: sizes[kind]) == ["repeated", "hierarchical", "markov", "iid"]


@pytest.mark.parametrize("alphabet_size", [300, 70_000])
def test_the_compressed_size_tells_the_symbols_of_large_alphabets_apart(alphabet_size: int):
    string = IidSource(alphabet_size=alphabet_size).draw(4096, np.random.default_rng(0))
    folded = string % 256
    assert zlib_bits_per_symbol(string, alphabet_size=alphabet_size) > 8
    assert zlib_bits_per_symbol(folded, alphabet_size=256) <= 8.1


# Alphabets.


@pytest.mark.parametrize(
    ("alphabet", "size", "first", "last"),
    [
        ("latin", 26, "a", "z"),
        ("latin_upper", 26, "A", "Z"),
        ("digits", 10, "0", "9"),
        ("greek", 24, "α", "ω"),
        ("cyrillic", 33, "а", "я"),
        ("cjk", 64, "的", "去"),
    ],
)
def test_the_built_in_alphabets_are_complete(alphabet: str, size: int, first: str, last: str):
    symbols = ALPHABETS[alphabet]
    assert (len(symbols), symbols[0], symbols[-1]) == (size, first, last)
    assert max_alphabet_size(alphabet) == size


def test_no_symbol_occurs_twice_in_any_alphabet_and_none_is_changed_by_unicode_normalisation():
    symbols = "".join(ALPHABETS.values())
    assert len(set(symbols)) == len(symbols)
    assert unicodedata.normalize("NFKC", symbols) == symbols


def test_the_symbols_and_their_order_never_change():
    symbols = "|".join(ALPHABETS.values()).encode()
    assert hashlib.sha256(symbols).hexdigest() == "79247342911da9dde282c1f40d105534e1176d06b128aa76b7dcb8887179f061"


def test_a_smaller_alphabet_is_the_beginning_of_a_larger_one():
    assert alphabet_symbols("latin", 4) == "abcd"


def test_the_vocabulary_alphabet_has_no_limit_and_no_symbols_of_its_own():
    assert max_alphabet_size("vocabulary") is None
    with pytest.raises(ValueError, match="no symbols of its own"):
        alphabet_symbols("vocabulary", 4)


def test_an_unknown_alphabet_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown alphabet 'greeek'; did you mean 'greek'\\? alphabets: latin, "):
        max_alphabet_size("greeek")


@pytest.mark.parametrize("alphabet_size", [1, 11])
def test_an_alphabet_with_too_few_symbols_is_refused(alphabet_size: int):
    with pytest.raises(ValueError, match=f"2 <= alphabet_size <= 10 must hold .* got alphabet_size={alphabet_size}"):
        alphabet_symbols("digits", alphabet_size)
