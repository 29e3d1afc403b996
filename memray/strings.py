"""Alphabets, and the sources that random strings over them are drawn from.

A string is an array of symbol indices 0 … alphabet_size - 1. Which token stands for a symbol is the
business of `encoding`; this module knows nothing about tokenizers or models.
"""

import math
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import entr

from memray.names import unknown_name

ALPHABETS: dict[str, str] = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "latin_upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digits": "0123456789",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    # The 64 most frequent characters of written Chinese: the likeliest to be single tokens.
    "cjk": (
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可"
        "也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    ),
}
"""The symbols of each alphabet, in order: an alphabet of size k is the first k of them."""

VOCABULARY = "vocabulary"
"""The alphabet that has no symbols of its own: its symbols are ordinary token ids drawn at random."""

Skew = Literal["one-token", "geometric", "zipf"]
Stream = Literal["trained", "held_out"]

# A stream's number is part of every string's seed: it must never change.
_STREAM_NUMBERS: dict[Stream, int] = {"trained": 0, "held_out": 1}


def max_alphabet_size(alphabet: str) -> int | None:
    """The number of symbols that an alphabet has; None for `vocabulary`, which the tokenizer limits.

    Raises:
        ValueError: If there is no such alphabet.
    """
    if alphabet == VOCABULARY:
        return None
    if alphabet not in ALPHABETS:
        raise unknown_name("alphabet", alphabet, [*ALPHABETS, VOCABULARY])
    return len(ALPHABETS[alphabet])


def alphabet_symbols(alphabet: str, alphabet_size: int) -> str:
    """The first `alphabet_size` symbols of an alphabet, one character each, in order.

    Raises:
        ValueError: If there is no such alphabet, if it has fewer symbols, or if it is `vocabulary`.
    """
    largest = max_alphabet_size(alphabet)
    if largest is None:
        raise ValueError(f"alphabet {alphabet!r} has no symbols of its own: its symbols are token ids")
    if not 2 <= alphabet_size <= largest:
        raise ValueError(
            f"2 <= alphabet_size <= {largest} must hold for alphabet {alphabet!r}, "
            f"but got alphabet_size={alphabet_size}; lower it or choose another alphabet"
        )
    return ALPHABETS[alphabet][:alphabet_size]


@runtime_checkable
class Source(Protocol):
    """What draws strings, and what it would itself predict of them.

    A model that only knows the source cannot do better than `conditional`: measures of memory are
    taken against it, since otherwise predictable structure would count as memory.
    """

    @property
    def kind(self) -> str:
        """Name of the source, as in `StringsSpec.kind`."""
        ...

    @property
    def alphabet_size(self) -> int:
        """Number of symbols."""
        ...

    @property
    def nominal_entropy_bits(self) -> float:
        """Entropy of the marginal, in bits per symbol."""
        ...

    @property
    def marginal(self) -> Float[ndarray, " alphabet"]:
        """P_A: the probability of each symbol at a random position."""
        ...

    def draw(self, length: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        """A string of `length` symbols; with an equal generator, a prefix of any longer one."""
        ...

    def conditional(self, string: Int[ndarray, " length"]) -> Float[ndarray, "length alphabet"]:
        """Row i: the source's own prediction of symbol i from the symbols before it."""
        ...


@dataclass(frozen=True, kw_only=True)
class IidSource:
    """Symbols drawn independently, uniformly or skewed to a target entropy (protocol §1).

    Args:
        alphabet_size: Number of symbols, at least 2.
        entropy_bits: Target entropy in bits per symbol, in (0, log2 alphabet_size]; None is uniform.
        skew: Where the lost entropy goes. `one-token` over-samples the first symbol and leaves the
            others equally likely; `geometric` has p_i ∝ r^i; `zipf` has p_i ∝ i^-s.

    Raises:
        ValueError: If the alphabet is too small or no distribution over it has that entropy.
    """

    alphabet_size: int
    entropy_bits: float | None = None
    skew: Skew = "one-token"

    def __post_init__(self) -> None:
        if self.alphabet_size < 2:
            raise ValueError(
                f"alphabet_size >= 2 must hold, but got alphabet_size={self.alphabet_size}; "
                "a string over a single symbol has no entropy"
            )
        if self.skew not in get_args(Skew):
            raise unknown_name("skew", self.skew, get_args(Skew))
        largest = math.log2(self.alphabet_size)
        if self.entropy_bits is not None and not 0 < self.entropy_bits <= largest + 1e-9:
            raise ValueError(
                f"0 < entropy_bits <= log2(alphabet_size) must hold, but got entropy_bits={self.entropy_bits} "
                f"with alphabet_size={self.alphabet_size} (log2 = {largest:.4f}); "
                "lower the entropy or enlarge the alphabet"
            )

    @property
    def kind(self) -> str:
        """Always "iid"."""
        return "iid"

    @property
    def nominal_entropy_bits(self) -> float:
        """The target entropy in bits per symbol: log2(alphabet_size) where uniform."""
        uniform = math.log2(self.alphabet_size)
        return uniform if self.entropy_bits is None else min(self.entropy_bits, uniform)

    @property
    def marginal(self) -> Float[ndarray, " alphabet"]:
        """P_A: the probability of each symbol, which is the same at every position; read-only."""
        return _marginal(self.alphabet_size, self.nominal_entropy_bits, self.skew)

    def draw(self, length: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        """A string of `length` symbols by inverting the CDF of one uniform number a symbol.

        The uniform numbers do not depend on the length, the entropy or the skew. So a shorter string
        is a prefix of a longer one, and cells of different entropy share their random numbers, which
        takes noise out of comparisons between them.
        """
        # The last step of the CDF is left out: rounding could leave it below 1.
        steps = np.cumsum(self.marginal)[:-1]
        return np.searchsorted(steps, rng.random(length), side="right").astype(np.int64)

    def conditional(self, string: Int[ndarray, " length"]) -> Float[ndarray, "length alphabet"]:
        """P_A in every row: nothing before a symbol tells anything about it. A read-only view."""
        return np.broadcast_to(self.marginal, (len(string), self.alphabet_size))


def draw_strings(
    source: Source, *, length: int, num_strings: int, seed: int, stream: Stream
) -> Int[ndarray, "strings length"]:
    """Draws strings that are nested by number and by length.

    String j has a generator of its own, seeded by (seed, stream, j): more strings never change the
    earlier ones, and the held-out strings never coincide with the trained ones.

    Args:
        source: What to draw from.
        length: Symbols a string, at least 1.
        num_strings: Number of strings, at least 1.
        seed: The trial's `string_seed`, not negative.
        stream: Whether the strings are to be trained or held out.

    Raises:
        ValueError: If a count or the seed is out of range.
    """
    if length < 1 or num_strings < 1 or seed < 0:
        raise ValueError(
            "length >= 1, num_strings >= 1 and seed >= 0 must hold, "
            f"but got length={length}, num_strings={num_strings}, seed={seed}"
        )
    seeds = [np.random.SeedSequence([seed, _STREAM_NUMBERS[stream], j]) for j in range(num_strings)]
    return np.stack([source.draw(length, np.random.default_rng(each)) for each in seeds])


def empirical_entropy_bits(string: Int[ndarray, " length"]) -> float:
    """Entropy of a string's own symbol frequencies, in bits per symbol.

    Below the nominal entropy by about (alphabet_size - 1) / (2 n ln 2) on average: frequencies fit
    the string they were counted in.

    Example:
        >>> empirical_entropy_bits(np.array([0, 1, 0, 1]))
        1.0
    """
    _, counts = np.unique(string, return_counts=True)
    return _entropy_bits(counts / len(string))


def zlib_bits_per_symbol(string: Int[ndarray, " length"], *, alphabet_size: int) -> float:
    """Size of a string compressed by zlib at level 9, in bits per symbol.

    A check on the nominal entropy that sees structure beyond symbol frequencies. It lies above the
    entropy, by a header of 8 bytes or more: for short strings by several bits a symbol.

    Args:
        string: The symbols.
        alphabet_size: Sets the bytes that a symbol takes before compression: one up to 256 symbols,
            two up to 65,536, else four. Taken from the alphabet, so that strings of one source compare.
    """
    width = 1 if alphabet_size <= 1 << 8 else 2 if alphabet_size <= 1 << 16 else 4
    return 8 * len(zlib.compress(string.astype(f"<u{width}").tobytes(), level=9)) / len(string)


def _entropy_bits(probabilities: Float[ndarray, " alphabet"]) -> float:
    return float(entr(probabilities).sum() / math.log(2))


@cache
def _marginal(alphabet_size: int, entropy_bits: float, skew: Skew) -> Float[ndarray, " alphabet"]:
    if entropy_bits >= math.log2(alphabet_size) - 1e-9:
        marginal = np.full(alphabet_size, 1 / alphabet_size)
    else:
        marginal = _skewed(alphabet_size, entropy_bits, skew)
    marginal.flags.writeable = False
    return marginal


def _skewed(alphabet_size: int, entropy_bits: float, skew: Skew) -> Float[ndarray, " alphabet"]:
    """The distribution of the given shape whose entropy is the target, to 1e-10 bits."""
    # From the uniform distribution to one that is (nearly) constant; the entropy falls all the way.
    brackets = {"one-token": (1 / alphabet_size, 1.0), "geometric": (1.0, 0.0), "zipf": (0.0, 1000.0)}

    def excess_bits(parameter: float) -> float:
        return _entropy_bits(_shape(skew, parameter, alphabet_size)) - entropy_bits

    parameter = cast(float, brentq(excess_bits, *brackets[skew], xtol=1e-15, maxiter=1000))
    assert abs(excess_bits(parameter)) < 1e-10
    return _shape(skew, parameter, alphabet_size)


def _shape(skew: Skew, parameter: float, alphabet_size: int) -> Float[ndarray, " alphabet"]:
    ranks = np.arange(1.0, alphabet_size + 1)
    match skew:
        case "one-token":
            weights = np.where(ranks == 1, parameter, (1 - parameter) / (alphabet_size - 1))
        case "geometric":
            weights = parameter ** (ranks - 1)
        case "zipf":
            weights = ranks**-parameter
    return weights / weights.sum()
