"""Knights, who tell the truth, and knaves, who lie: puzzles that say enough to be solved."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np

from memray.generators.lexicon import GIVEN_NAMES
from memray.generators.sample import Generator, Purpose, Sample, random_generator

Connective = Literal["is", "same", "and", "or", "if"]
_CONNECTIVES: tuple[Connective, ...] = get_args(Connective)

Kinds = tuple[bool, ...]
"""Of each inhabitant, whether it is a knight."""


class Claim(NamedTuple):
    """That an inhabitant is a knight, or that it is a knave."""

    inhabitant: int
    is_knight: bool

    def text(self, names: Sequence[str]) -> str:
        """Such as "Mira is a knave"."""
        return f"{names[self.inhabitant]} is a {'knight' if self.is_knight else 'knave'}"


class Statement(NamedTuple):
    """What an inhabitant says: one claim, or two that are connected.

    Attributes:
        connective: "is" has one claim, the first. "same" says that both inhabitants are of one kind, whatever the
            claims say of these. "if" is true where its first claim is false.
        first: The first claim.
        second: The second claim.
    """

    connective: Connective
    first: Claim
    second: Claim

    def holds(self, kinds: Kinds) -> bool:
        """Whether it is true where the inhabitants are of these kinds."""
        first, second = (kinds[claim.inhabitant] == claim.is_knight for claim in (self.first, self.second))
        match self.connective:
            case "is":
                return first
            case "same":
                return kinds[self.first.inhabitant] == kinds[self.second.inhabitant]
            case "and":
                return first and second
            case "or":
                return first or second
            case "if":
                return not first or second

    def text(self, names: Sequence[str]) -> str:
        """The statement as it is said, without a full stop."""
        first, second = self.first.text(names), self.second.text(names)
        match self.connective:
            case "is":
                return first
            case "same":
                return f"{names[self.first.inhabitant]} and {names[self.second.inhabitant]} are of the same kind"
            case "and" | "or":
                return f"{first} {self.connective} {second}"
            case "if":
                return f"if {first} then {second}"


def solutions(statements: Sequence[Statement]) -> list[Kinds]:
    """Every way in which the inhabitants can be of kinds such that knights alone say what is true.

    Args:
        statements: What each inhabitant says, in their order.

    Example:
        >>> both_are_knaves = Statement("and", Claim(0, False), Claim(1, False))
        >>> first_is_a_knave = Statement("is", Claim(0, False), Claim(1, True))
        >>> solutions([both_are_knaves, first_is_a_knave])
        [(False, True)]
    """
    return [
        kinds
        for kinds in itertools.product((True, False), repeat=len(statements))
        if all(statement.holds(kinds) == is_knight for statement, is_knight in zip(statements, kinds, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class Puzzles(Generator):
    """A puzzle with exactly one solution, and the solution.

    The solution is drawn first, each one equally likely: otherwise nearly half of the puzzles for two would be about
    two knights, and guessing would pay. Then each inhabitant is given a random statement that it can make, until
    nothing else solves the puzzle. The first two names, in their order, belong to one puzzle alone.

    Args:
        num_inhabitants: Inhabitants of a puzzle, each of whom makes one statement.

    Raises:
        ValueError: If it is out of range.
    """

    limit: ClassVar[int] = len(GIVEN_NAMES) * (len(GIVEN_NAMES) - 1)

    num_inhabitants: int = 2

    def __post_init__(self) -> None:
        if self.num_inhabitants not in range(2, 5):
            raise ValueError(
                f"2 <= num_inhabitants <= 4 must hold, but got num_inhabitants={self.num_inhabitants}; "
                "choose a number in that range"
            )

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        pairs = random_generator(seed, Purpose.PUZZLE_NAMES).permutation(self.limit)[:num_samples]
        rngs = (random_generator(seed, Purpose.PUZZLE_CONTENT, i) for i in range(num_samples))
        return [self._sample(pair, rng) for pair, rng in zip(pairs.tolist(), rngs, strict=True)]

    def _sample(self, pair: int, rng: np.random.Generator) -> Sample:
        names = _names(pair, self.num_inhabitants, rng)
        kinds = tuple((rng.random(self.num_inhabitants) < 0.5).tolist())
        statements = _statements(kinds, rng)
        while solutions(statements) != [kinds]:
            statements = _statements(kinds, rng)
        said = (f'{name} says: "{each.text(names)}."' for name, each in zip(names, statements, strict=True))
        each_is = (Claim(inhabitant, is_knight).text(names) for inhabitant, is_knight in enumerate(kinds))
        inhabitants = f"{', '.join(names[:-1])} and {names[-1]}"
        return Sample(f"{inhabitants} are knights or knaves. {' '.join(said)}", f" {', '.join(each_is)}.")


def _names(pair: int, num_inhabitants: int, rng: np.random.Generator) -> list[str]:
    """Distinct names, of which the number of an ordered pair decides the first two."""
    first, second = divmod(pair, len(GIVEN_NAMES) - 1)
    chosen = [first, second + (second >= first)]
    while len(chosen) < num_inhabitants:
        another = int(rng.integers(len(GIVEN_NAMES)))
        if another not in chosen:
            chosen.append(another)
    return [GIVEN_NAMES[k] for k in chosen]


def _statements(kinds: Kinds, rng: np.random.Generator) -> list[Statement]:
    """What each inhabitant could say if they were of these kinds."""
    statements = []
    for speaker, is_knight in enumerate(kinds):
        statement = _statement(speaker, len(kinds), rng)
        while statement.holds(kinds) != is_knight:
            statement = _statement(speaker, len(kinds), rng)
        statements.append(statement)
    return statements


def _statement(speaker: int, num_inhabitants: int, rng: np.random.Generator) -> Statement:
    """A statement of a random form about two inhabitants, among them perhaps the speaker."""
    of_form, of_first, of_second, *of_kinds = rng.random(5).tolist()
    connective = _CONNECTIVES[int(of_form * len(_CONNECTIVES))]
    first = int(of_first * num_inhabitants)
    second = (first + 1 + int(of_second * (num_inhabitants - 1))) % num_inhabitants
    if connective == "is" and first == speaker:  # "I am a knight" says nothing, and nobody can say "I am a knave"
        first, second = second, first
    is_first_knight, is_second_knight = (u < 0.5 for u in of_kinds)
    return Statement(connective, Claim(first, is_first_knight), Claim(second, is_second_knight))
