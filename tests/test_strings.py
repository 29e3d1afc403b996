"""Sources against the check values of protocol §1, a literal transcription, and golden hashes."""

import hashlib
import math
import unicodedata
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memray.strings import (
    ALPHABETS,
    IidSource,
    Skew,
    Source,
    Stream,
    alphabet_symbols,
    draw_strings,
    empirical_entropy_bits,
    max_alphabet_size,
    zlib_bits_per_symbol,
)

SKEWS = get_args(Skew)
# What the protocol rounds to 2.807 bits.
LOG2_7 = math.log2(7)
SOURCES: list[Source] = [
    IidSource(alphabet_size=2),
    IidSource(alphabet_size=26),
    IidSource(alphabet_size=300),
    *(IidSource(alphabet_size=26, entropy_bits=bits, skew=skew) for bits in (1.0, 2.807) for skew in SKEWS),
]


def source_name(source: Source) -> str:
    return f"{source.kind}-{source.alphabet_size}-{source.nominal_entropy_bits:.3f}-{getattr(source, 'skew', '')}"


# The contract of every source.


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_a_source_draws_symbols_of_its_alphabet_at_the_rates_of_its_marginal(source: Source):
    length = 20_000
    string = source.draw(length, np.random.default_rng(1))
    counts = np.bincount(string, minlength=source.alphabet_size)
    assert len(counts) == source.alphabet_size
    # 5 standard deviations a symbol, and one count for where the normal approximation is none.
    deviation = np.sqrt(length * source.marginal * (1 - source.marginal))
    assert (np.abs(counts - length * source.marginal) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_a_shorter_string_is_a_prefix_of_a_longer_one_from_an_equal_generator(source: Source):
    longer = source.draw(100, np.random.default_rng(2))
    assert source.draw(37, np.random.default_rng(2)).tolist() == longer[:37].tolist()


@pytest.mark.parametrize("source", SOURCES, ids=source_name)
def test_the_prediction_of_a_source_is_a_distribution_over_its_alphabet_at_each_position(source: Source):
    assert isinstance(source, Source)
    conditional = source.conditional(source.draw(10, np.random.default_rng(3)))
    assert conditional.shape == (10, source.alphabet_size)
    assert (conditional >= 0).all()
    np.testing.assert_allclose(conditional.sum(axis=1), 1, rtol=1e-12)


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
    assert len(set(drawn)) == 12


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
