"""What a generator is: a promise of distinct samples, the same ones for the same seed, fewer the first of more."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """A text in two parts, of which the second is to be recited from the first.

    Attributes:
        prefix: What is given. It does not end in white space.
        reference: What is to follow. It begins with the one blank that parts the two, so that the text is
            `prefix + reference`: a space, that a tokenizer with word-initial tokens cuts words alike in both parts; in
            source the end of a line.
    """

    prefix: str
    reference: str


class Purpose(IntEnum):
    """What random numbers are drawn for: each purpose has numbers of its own. These values must never change."""

    FACT_SUBJECTS = 0
    FACT_OBJECTS = 1
    QUESTION_THINGS = 2
    QUESTION_CONTENT = 3
    BIOGRAPHY_NAMES = 4
    BIOGRAPHY_CONTENT = 5
    PUZZLE_NAMES = 6
    PUZZLE_CONTENT = 7
    OVERLAP_WORDS = 8
    FREQUENCY_NAMES = 9
    FREQUENCY_RANKS = 10
    FREQUENCY_WORDS = 11
    SOURCE_ORDER = 12


def random_generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """The random numbers of one purpose, or of one sample's or block's share in it."""
    # A spawn key, because a seed of [seed, purpose] equals one of [seed, purpose, 0]: short seeds are padded with 0.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *indices)))


def require_size(what: str, name: str, num: int, *, limit: int, seed: int) -> None:
    """Refuses more than there is.

    Args:
        what: Who is asked.
        name: Which number is meant.
        num: How many are asked for.
        limit: How many there are.
        seed: The seed that is asked for.

    Raises:
        ValueError: If the number is not in 1 … limit, or the seed is negative.
    """
    if not 1 <= num <= limit:
        raise ValueError(
            f"1 <= {name} <= {limit} must hold for {what}, which has no more that differ, but got {name}={num}; "
            "ask for a number in that range"
        )
    if seed < 0:
        raise ValueError(f"seed >= 0 must hold, but got seed={seed}; choose another seed")


@dataclass(frozen=True, kw_only=True)
class Generator(ABC):
    """What invents a corpus; its fields are its options, checked when it is made.

    Every sample is ASCII, on one line unless it is source, and the prefixes of a corpus are distinct. Equal generators
    give equal samples for equal seeds; sample i does not depend on how many are drawn. Generators of different kinds
    share no random numbers, so that samples of one can be added to those of another under the same seed; those of one
    kind share what their options do not touch, which takes noise out of comparisons between them.

    Attributes:
        limit: How many samples there are.
    """

    limit: ClassVar[int]

    def samples(self, num_samples: int, *, seed: int) -> list[Sample]:
        """The first `num_samples` samples of the corpus that the seed names.

        Raises:
            ValueError: If there are not so many, or the seed is negative.
        """
        require_size(str(self), "num_samples", num_samples, limit=self.limit, seed=seed)
        return self._samples(num_samples, seed)

    @abstractmethod
    def _samples(self, num_samples: int, seed: int) -> list[Sample]: ...
