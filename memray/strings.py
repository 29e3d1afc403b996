"""Alphabets, and the sources that strings over them are drawn from.

A string is an array of symbol indices 0 … alphabet_size - 1. Which token stands for a symbol is the
business of `encoding`; this module knows nothing about tokenizers or models.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
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
Stream = Literal["trained", "held_out", "unrepeated"]

# What follows the trial's seed in the seed of whatever is drawn: these numbers must never change.
_STREAM_NUMBERS: dict[Stream, int] = {"trained": 0, "held_out": 1, "unrepeated": 4}
_TRANSITIONS, _PASSAGES = 2, 3


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

    def entropy_rate_bits(self, length: int) -> float:
        """Entropy of a drawn string of `length` symbols, in bits per symbol: its exact value, nan if unknown."""
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

    def entropy_rate_bits(self, length: int) -> float:
        """The nominal entropy, at every length."""
        return self.nominal_entropy_bits


@dataclass(frozen=True, kw_only=True)
class _Structured:
    """What sources have in common whose symbols are each distributed as those of an iid source.

    Args:
        fresh: The source of every symbol that nothing before it decides.
    """

    fresh: IidSource

    @property
    def alphabet_size(self) -> int:
        """Number of symbols."""
        return self.fresh.alphabet_size

    @property
    def nominal_entropy_bits(self) -> float:
        """Entropy of the marginal, in bits per symbol: that of a fresh symbol."""
        return self.fresh.nominal_entropy_bits

    @property
    def marginal(self) -> Float[ndarray, " alphabet"]:
        """P_A: the probability of each symbol at any position, fresh or not; read-only."""
        return self.fresh.marginal


@dataclass(frozen=True, kw_only=True)
class MarkovSource(_Structured):
    """Symbols that depend on the `order` symbols before them, while any `order` in a row are independent.

    After the symbols c_1 … c_k the next one is g(c_1) with probability a, and fresh otherwise:
    P(next | c_1 … c_k) = (1 - a) P_A + a δ(g(c_1)). Here g is a permutation among symbols of equal probability,
    another one for each c_2 … c_k. Any k symbols in a row are therefore exactly independent with distribution P_A: if
    c_1 … c_k are, then given c_2 … c_k both g(c_1) and a fresh symbol have distribution P_A, and so has the next one.
    So a is free to set the conditional entropy, Σ_c P_A(c) H((1 - a) P_A + a δ(c)), and the marginal stays what it is.

    At order 1 each class of equally likely symbols is one random cycle: no symbol follows itself more often than
    chance, and a low entropy makes no runs. At higher orders each permutation is any, all equally likely. Where a
    symbol is like no other (the first one under skew `one-token`, all of them under `geometric` and `zipf`), g leaves
    it alone: such strings repeat the symbol k back.

    Args:
        order: k, at least 1.
        conditional_entropy_bits: Entropy of a symbol given those before it, in bits, in (0, nominal entropy]; None
            means the nominal entropy, where nothing depends on anything.
        seed: Of the permutations. They belong to the trial: its trained and held-out strings share them.

    Raises:
        ValueError: If the order is below 1 or there is no such conditional entropy.
    """

    order: int = 1
    conditional_entropy_bits: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order >= 1 must hold, but got order={self.order}; order 0 is the iid source")
        largest = self.nominal_entropy_bits
        if self.conditional_entropy_bits is not None and not 0 < self.conditional_entropy_bits <= largest + 1e-9:
            raise ValueError(
                "0 < conditional_entropy_bits <= entropy_bits must hold, but got "
                f"conditional_entropy_bits={self.conditional_entropy_bits} with a marginal of {largest:.4f} bits; "
                "lower it or raise the marginal's entropy"
            )

    @property
    def kind(self) -> str:
        """Always "markov"."""
        return "markov"

    def draw(self, length: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        """A string of `length` symbols, of which the first `order` are fresh.

        Its fresh symbols are those that the iid source draws from an equal generator: cells of different conditional
        entropy share them, and at the largest one the strings are the same.
        """
        string = self.fresh.draw(length, rng)
        is_decided = rng.spawn(1)[0].random(length) < self._dependence
        is_decided[: self.order] = False
        for i in np.flatnonzero(is_decided).tolist():
            string[i] = self._successor(string, i)
        return string

    def conditional(self, string: Int[ndarray, " length"]) -> Float[ndarray, "length alphabet"]:
        """P_A for the first `order` symbols, then the row of the transition table."""
        rows = np.tile(self.marginal, (len(string), 1))
        decided = np.arange(self.order, len(string))
        rows[decided] *= 1 - self._dependence
        rows[decided, [self._successor(string, i) for i in decided.tolist()]] += self._dependence
        return rows

    def entropy_rate_bits(self, length: int) -> float:
        """The first `order` symbols have the nominal entropy, all others the conditional one."""
        num_free = min(length, self.order)
        conditional = self.conditional_entropy_bits
        conditional = self.nominal_entropy_bits if conditional is None else conditional
        return (num_free * self.nominal_entropy_bits + (length - num_free) * conditional) / length

    @property
    def _dependence(self) -> float:
        """a: the probability that a symbol is decided by those before it."""
        return 0.0 if self.conditional_entropy_bits is None else _dependence(self.fresh, self.conditional_entropy_bits)

    def _successor(self, string: Int[ndarray, " length"], i: int) -> int:
        """The symbol that the `order` ones before position i point to."""
        earliest, *others = string[i - self.order : i].tolist()
        return int(_permutation(self, tuple(others))[earliest])


@dataclass(frozen=True, kw_only=True)
class MotifSource(_Structured):
    """A motif of fresh symbols that is repeated: as it is, or inside longer motifs that are repeated in their turn.

    A motif of level 0 is `motif_length` fresh symbols. A motif of level j is `branching` parts, A B A B …, where A and
    B are two motifs of level j - 1 of their own. The string is one motif of level `depth`, over and over; every string
    has its own. At depth 0 this is the source `repeated`, above it `hierarchical`.

    Args:
        motif_length: Symbols of a motif of level 0, at least 1.
        depth: Levels above it.
        branching: Parts of a motif of a level above 0; below 3 none would be repeated in it.

    Raises:
        ValueError: If one of them is out of range.
    """

    motif_length: int
    depth: int = 0
    branching: int = 4

    def __post_init__(self) -> None:
        if self.motif_length < 1 or self.depth < 0 or self.branching < 3:
            raise ValueError(
                "motif_length >= 1, depth >= 0 and branching >= 3 must hold, "
                f"but got motif_length={self.motif_length}, depth={self.depth}, branching={self.branching}"
            )

    @property
    def kind(self) -> str:
        """At depth 0 "repeated", above it "hierarchical"."""
        return "hierarchical" if self.depth else "repeated"

    def fresh_symbols(self, length: int) -> Int[ndarray, " length"]:
        """Which of the string's fresh symbols stands at each position; they are numbered as they first appear.

        Example:
            >>> MotifSource(fresh=IidSource(alphabet_size=2), motif_length=1, depth=2, branching=3).fresh_symbols(12)
            array([0, 1, 0, 2, 3, 2, 0, 1, 0, 0, 1, 0])
        """
        positions = np.arange(length)
        which = positions % self.motif_length
        for level in range(self.depth):
            part_length = self.motif_length * self.branching**level
            if part_length >= length:
                break
            is_second = positions // part_length % self.branching % 2
            which = which + is_second * self.motif_length * 2**level
        return which

    def draw(self, length: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        """A string of `length` symbols, the fresh ones drawn in the order in which they appear."""
        which = self.fresh_symbols(length)
        return self.fresh.draw(int(which.max(initial=-1)) + 1, rng)[which]

    def conditional(self, string: Int[ndarray, " length"]) -> Float[ndarray, "length alphabet"]:
        """P_A where a symbol is fresh; elsewhere 1 on the symbol that stood where its part first appeared."""
        which = self.fresh_symbols(len(string))
        _, first = np.unique(which, return_index=True)
        rows = np.zeros((len(string), self.alphabet_size))
        rows[np.arange(len(string)), string[first[which]]] = 1
        rows[first] = self.marginal
        return rows

    def entropy_rate_bits(self, length: int) -> float:
        """The nominal entropy for each fresh symbol among the first `length`, nothing for the others."""
        return (int(self.fresh_symbols(length).max()) + 1) * self.nominal_entropy_bits / length


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSource:
    """Passages of a text, in the tokens of some model.

    Its alphabet are all distinct tokens of the text, and it predicts nothing but how often each of them stands there:
    what a reader knows of the text who has not read it in order. (Not the tokens of a trial's own strings alone: how
    many held-out strings are looked at would then decide what is measured of the trained ones.)

    Attributes:
        symbols: The text.
        symbol_ids: Token id of each symbol, ascending.
        names: How the tokenizer writes each symbol.
        num_left_out: Special and unknown tokens that stood between the symbols and are left out.
    """

    symbols: Int[ndarray, " tokens"]
    symbol_ids: Int[ndarray, " alphabet"]
    names: tuple[str, ...]
    num_left_out: int = 0

    @property
    def kind(self) -> str:
        """Always "text"."""
        return "text"

    @property
    def alphabet_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.symbol_ids)

    @property
    def nominal_entropy_bits(self) -> float:
        """Entropy of the token frequencies, in bits per token."""
        return _entropy_bits(self.marginal)

    @property
    def marginal(self) -> Float[ndarray, " alphabet"]:
        """P_A: the share of each token in the whole text; read-only."""
        return self._shares

    @cached_property
    def _shares(self) -> Float[ndarray, " alphabet"]:
        shares = np.bincount(self.symbols, minlength=self.alphabet_size) / len(self.symbols)
        shares.flags.writeable = False
        return shares

    def draw(self, length: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        """A passage from anywhere, which may overlap any other; behind the end of the text stands its beginning."""
        start = rng.integers(len(self.symbols))
        return self.symbols.take(np.arange(start, start + length), mode="wrap")

    def passages(self, *, length: int, num_strings: int, seed: int, stream: Stream) -> Int[ndarray, "strings length"]:
        """Passages of which no two overlap, nor any trained with any held-out one while the text is long enough.

        The text is cut into passages of `length` tokens and these are shuffled; the trained strings are the first
        ones, the held-out strings the last. They are nested by number, though not by length.

        Raises:
            ValueError: If the text is too short.
        """
        num_passages = len(self.symbols) // length
        if num_strings > num_passages:
            raise ValueError(
                f"{num_strings} strings of {length} tokens need a text of {num_strings * length} tokens, but it has "
                f"{len(self.symbols)}; take fewer or shorter strings, or a longer text"
            )
        order = np.random.default_rng([seed, _PASSAGES]).permutation(num_passages)
        chosen = (order if stream == "trained" else order[::-1])[:num_strings]
        return self.symbols[: num_passages * length].reshape(num_passages, length)[chosen]

    def conditional(self, string: Int[ndarray, " length"]) -> Float[ndarray, "length alphabet"]:
        """P_A in every row; a read-only view."""
        return np.broadcast_to(self.marginal, (len(string), self.alphabet_size))

    def entropy_rate_bits(self, length: int) -> float:
        """nan: nobody knows the entropy of a language."""
        return math.nan


def read_text(path: str) -> tuple[str, str]:
    """The text of a file, line ends as they are, and the SHA-256 of its bytes in hexadecimal digits.

    Raises:
        ValueError: If it cannot be read as UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        return content.decode(), hashlib.sha256(content).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"strings.path must be a text file in UTF-8 wherever a trial runs, but {path!r} cannot be read as one "
            f"({error}); correct the path, or convert the file"
        ) from error


def draw_strings(
    source: Source, *, length: int, num_strings: int, seed: int, stream: Stream, first: int = 0
) -> Int[ndarray, "strings length"]:
    """Draws strings that are nested by number and by length.

    String j has a generator of its own, seeded by (seed, stream, j): more strings never change the
    earlier ones, and the held-out strings never coincide with the trained ones. Passages of a text
    must not overlap and are chosen together, by number alone nested: :meth:`TextSource.passages`.

    Args:
        source: What to draw from.
        length: Symbols a string, at least 1.
        num_strings: Number of strings, at least 1.
        seed: The trial's `string_seed`, not negative.
        stream: Whether the strings are to be trained, held out, or trained once and never again.
        first: The number of the first one; of passages it is 0.

    Raises:
        ValueError: If a count or the seed is out of range, or a text too short.
    """
    if length < 1 or num_strings < 1 or seed < 0:
        raise ValueError(
            "length >= 1, num_strings >= 1 and seed >= 0 must hold, "
            f"but got length={length}, num_strings={num_strings}, seed={seed}"
        )
    if isinstance(source, TextSource):
        assert first == 0
        return source.passages(length=length, num_strings=num_strings, seed=seed, stream=stream)
    seeds = [np.random.SeedSequence([seed, _STREAM_NUMBERS[stream], j]) for j in range(first, first + num_strings)]
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


@cache
def _dependence(fresh: IidSource, conditional_entropy_bits: float) -> float:
    """The probability a that gives a Markov source its conditional entropy, to 1e-10 bits.

    The entropy falls in a all the way from the nominal one to 0: what it lacks, the information that a symbol has of
    the next, is convex in a, and 0 at 0.
    """
    p = fresh.marginal
    if conditional_entropy_bits >= fresh.nominal_entropy_bits - 1e-9:
        return 0.0

    def excess_bits(a: float) -> float:
        # The entropy of each row is that of a row without its spike, but for one symbol.
        others = entr((1 - a) * p)
        rows = others.sum() - others + entr((1 - a) * p + a)
        return float(p @ rows) / math.log(2) - conditional_entropy_bits

    dependence = cast(float, brentq(excess_bits, 0.0, 1.0, xtol=1e-15, maxiter=1000))
    assert abs(excess_bits(dependence)) < 1e-10
    return dependence


@cache
def _classes(fresh: IidSource) -> list[Int[ndarray, " alike"]]:
    """The symbols of equal probability, class by class, without those that are like no other."""
    probabilities, counts = np.unique(fresh.marginal, return_counts=True)
    return [np.flatnonzero(fresh.marginal == probability) for probability in probabilities[counts > 1]]


@lru_cache(maxsize=2**14)  # more than the contexts of a trial's strings
def _permutation(source: MarkovSource, others: tuple[int, ...]) -> Int[ndarray, " alphabet"]:
    """g of a Markov source after the symbols c_2 … c_k: derived when it is asked for, because there are so many."""
    rng = np.random.default_rng([source.seed, _TRANSITIONS, *others])
    permutation = np.arange(source.alphabet_size)
    for alike in _classes(source.fresh):
        shuffled = rng.permutation(alike)
        if source.order == 1:
            permutation[shuffled] = np.roll(shuffled, -1)  # one cycle
        else:
            permutation[alike] = shuffled
    return permutation
