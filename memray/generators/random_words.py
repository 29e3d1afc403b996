"""Samples of random words, which say nothing.

What remains of such a corpus is how alike its samples are, and how often each word stands there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from memray.generators.lexicon import NUM_NAMES, WORDS, names
from memray.generators.sample import Generator, Purpose, Sample, random_generator
from memray.names import unknown_name

Overlap = Literal["low", "high"]

NUM_WORDS = 8
"""Words of a reference, and of an overlapping prefix."""

GROUP_SIZE = 7
"""Samples of a group of similar ones: sample i belongs to group i // 7."""

BLOCK_SIZE = GROUP_SIZE**2
"""Samples of a block: what a group shares in one arm is spread over its block in another."""

_NUM_SHARED = 6


@dataclass(frozen=True, kw_only=True)
class Overlapping(Generator):
    """Prefixes that are alike within groups of seven or are not, and continuations likewise.

    Under "high" overlap all members of a group have six of eight words in common, at the same places. Under "low"
    overlap members of a group have none in common, nor do any two samples of a block of 49 have more than one. Words
    of different blocks are alike by chance alone.

    What differs between the arms is only which samples a word is shared by. In a whole number of blocks each word
    stands equally often at each place of the prefixes, and of the references, in all four arms; the two words that a
    sample has to itself on each side are even the same. It follows that the *mean* number of words that two prefixes
    share, taken over all pairs of the corpus, is the same in all arms too: equal frequencies fix it. High overlap
    gathers in few pairs what low overlap scatters, and is to be seen within groups or in nearest neighbours.

    Nor does a word stand on both sides in one block. Two prefixes are equal only where the same eight words are drawn
    for two blocks in the same order, which has a probability below 1e-8 in the longest corpus.

    Args:
        prefix_overlap: Of the prefixes in a group.
        continuation_overlap: Of the references in a group.

    Raises:
        ValueError: If one of them is neither "low" nor "high".
    """

    limit: ClassVar[int] = 1_000_000 // BLOCK_SIZE * BLOCK_SIZE

    prefix_overlap: Overlap = "low"
    continuation_overlap: Overlap = "low"

    def __post_init__(self) -> None:
        for name in ("prefix_overlap", "continuation_overlap"):
            overlap = getattr(self, name)
            if overlap not in get_args(Overlap):
                raise unknown_name(name, overlap, get_args(Overlap), plural="choices")

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        num_blocks = -(-num_samples // BLOCK_SIZE)
        samples = [sample for block in range(num_blocks) for sample in self._block(block, seed)]
        return samples[:num_samples]

    def _block(self, block: int, seed: int) -> list[Sample]:
        rng = random_generator(seed, Purpose.OVERLAP_WORDS, block)
        num_words = _NUM_SHARED * GROUP_SIZE + (NUM_WORDS - _NUM_SHARED) * BLOCK_SIZE
        words = rng.permutation(WORDS)
        prefixes = _side(words[:num_words], self.prefix_overlap, rng)
        references = _side(words[num_words : 2 * num_words], self.continuation_overlap, rng)
        return [Sample(prefix, f" {reference}") for prefix, reference in zip(prefixes, references, strict=True)]


def _side(words: ndarray, overlap: Overlap, rng: np.random.Generator) -> list[str]:
    """The prefixes or the references of a block.

    Six rows of seven words are for sharing. Under high overlap the members of group g have word g of each row. Under
    low overlap member m has word g + (j + 1) m (mod 7) of row j: over the members of a group it takes every value
    once, over the block each value seven times, and, because 7 is prime, two samples agree in one row at most.
    """
    split = _NUM_SHARED * GROUP_SIZE
    rows, own = words[:split].reshape(_NUM_SHARED, GROUP_SIZE), words[split:].reshape(BLOCK_SIZE, -1)
    group, member = np.divmod(np.arange(BLOCK_SIZE)[:, None], GROUP_SIZE)
    row = np.arange(_NUM_SHARED)
    which = (group + (row + 1) * member * (overlap == "low")) % GROUP_SIZE
    chosen = np.hstack([rows[row, which], own])
    return [" ".join(each) for each in chosen[:, rng.permutation(NUM_WORDS)].tolist()]


@dataclass(frozen=True, kw_only=True)
class Frequencies(Generator):
    """References of eight words drawn independently, the word of rank r with a probability ∝ r^-skew.

    The seed decides which word has which rank. Prefixes name a person and do not depend on the skew; the random
    numbers of the words do not either. Under a large skew words recur within a reference, and less is to be
    memorised: that is what such frequencies mean.

    Args:
        skew: Zipf's exponent, 0 … 4; at 0 all words are equally likely.

    Raises:
        ValueError: If it is out of range.
    """

    limit: ClassVar[int] = NUM_NAMES

    skew: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.skew <= 4:
            raise ValueError(
                f"0 <= skew <= 4 must hold, but got skew={self.skew}; natural text has about 1, and above 4 nearly "
                "all words are one"
            )

    @property
    def probabilities(self) -> Float[ndarray, " ranks"]:
        """The probability of each word, by rank, the most frequent first."""
        weights = np.arange(1.0, len(WORDS) + 1) ** -self.skew
        return weights / weights.sum()

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        words = random_generator(seed, Purpose.FREQUENCY_RANKS).permutation(WORDS)
        persons = names(num_samples, random_generator(seed, Purpose.FREQUENCY_NAMES))
        uniform = random_generator(seed, Purpose.FREQUENCY_WORDS).random((num_samples, NUM_WORDS))
        # The last step of the distribution function is left out: rounding could leave it below 1.
        ranks = np.searchsorted(np.cumsum(self.probabilities)[:-1], uniform, side="right")
        return [
            Sample(f"{person} said:", " " + " ".join(row))
            for person, row in zip(persons, words[ranks].tolist(), strict=True)
        ]
