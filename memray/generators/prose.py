"""Questions with answers, and short lives: sentences from templates, on things and persons that there are not."""

from dataclasses import dataclass
from typing import ClassVar

from memray.generators.lexicon import NUM_NAMES, THINGS, names, word_of_each_list
from memray.generators.sample import Generator, Purpose, Sample, random_generator

_QUESTIONS = (
    ("What is the {thing} made of?", "Mostly {colour} {material} from {country}."),
    ("Who built the {thing}?", "A {profession} from {city} with {number} helpers."),
    ("Where is the {thing} kept?", "In {city}, under {number} {colour} blankets."),
    ("What is the {thing} used for?", "Calming a {colour} {pet} in {country}."),
    ("When was the {thing} lost?", "In {year}, somewhere between {city} and {country}."),
    ("What was the {thing} traded for?", "A {colour} {instrument} and {number} coins."),
    ("Who looks after the {thing}?", "A {profession} and a {pet} in {city}."),
    ("What did the {thing} cost?", "About {number} {material} coats and a {pet}."),
)

# By sentence: ways of telling the same particulars in eight words, so that less diversity is not a shorter corpus.
_BIOGRAPHY = (
    (
        "{name} was born in {city} in {year}.",
        "In {year} {name} was born in {city}.",
        "{name} came to {city} back in {year}.",
        "{city} saw {name} arrive early in {year}.",
        "In {city} {name} first appeared in {year}.",
        "{name} left {city} for good in {year}.",
        "{year} brought {name} safely home to {city}.",
        "Since {year} {name} has lived near {city}.",
    ),
    (
        "They worked as a {profession} for {number} years.",
        "They spent {number} years as a busy {profession}.",
        "For {number} years they were a hired {profession}.",
        "Work as a {profession} filled {number} long years.",
        "After {number} years they became a master {profession}.",
        "They trained {number} years to become a {profession}.",
        "A {profession} by trade, they worked {number} years.",
        "They paid a {profession} for {number} strange lessons.",
    ),
    (
        "They play a {colour} {instrument} in the evening.",
        "A {colour} {instrument} hangs above their narrow bed.",
        "Their {colour} {instrument} is known to every neighbour.",
        "Each evening they tune an old {colour} {instrument}.",
        "They once sold a {colour} {instrument} to strangers.",
        "On Sundays they polish a small {colour} {instrument}.",
        "Visitors often ask about the {colour} {instrument} upstairs.",
        "No one else may touch the {colour} {instrument}.",
    ),
    (
        "Their {pet} came on a ship from {country}.",
        "They keep a {pet} that came from {country}.",
        "A {pet} followed them home from distant {country}.",
        "They once lost a {pet} somewhere in {country}.",
        "In {country} they bought a very quiet {pet}.",
        "They live in {country} with a tame {pet}.",
        "A friend in {country} feeds their old {pet}.",
        "Their {pet} won first prize twice in {country}.",
    ),
)

MAX_TEMPLATES = 8
"""Ways of saying each sentence of a biography."""


@dataclass(frozen=True, kw_only=True)
class Questions(Generator):
    """A question about an invented thing; the answer is a few words, two or three of them drawn at random.

    Each thing is asked about once. The reference keeps the space before it, though a prompt may put a line between.
    """

    limit: ClassVar[int] = len(THINGS)

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        things = random_generator(seed, Purpose.QUESTION_THINGS).permutation(len(THINGS))[:num_samples]
        samples = []
        for i, thing in enumerate(things.tolist()):
            rng = random_generator(seed, Purpose.QUESTION_CONTENT, i)
            question, answer = _QUESTIONS[rng.integers(len(_QUESTIONS))]
            words = word_of_each_list(rng)
            samples.append(Sample(question.format(thing=THINGS[thing]), " " + answer.format(**words)))
        return samples


@dataclass(frozen=True, kw_only=True)
class Biographies(Generator):
    """The life of an invented person: the prefix is the first sentence, with the name; the reference is the rest.

    A sentence has eight words and tells the same particulars whatever its template, so that diversity is varied at
    a fixed number of words. Each person occurs once.

    Args:
        num_templates: Ways of saying each sentence, drawn independently for each.
        num_sentences: Sentences of a biography; fewer are the first of more.

    Raises:
        ValueError: If one of them is out of range.
    """

    limit: ClassVar[int] = NUM_NAMES

    num_templates: int = MAX_TEMPLATES
    num_sentences: int = 3

    def __post_init__(self) -> None:
        if self.num_templates not in range(1, MAX_TEMPLATES + 1) or self.num_sentences not in range(
            2, len(_BIOGRAPHY) + 1
        ):
            raise ValueError(
                f"1 <= num_templates <= {MAX_TEMPLATES} and 2 <= num_sentences <= {len(_BIOGRAPHY)} must hold, "
                f"but got num_templates={self.num_templates} and num_sentences={self.num_sentences}; "
                "choose numbers in those ranges"
            )

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        samples = []
        for i, name in enumerate(names(num_samples, random_generator(seed, Purpose.BIOGRAPHY_NAMES))):
            rng = random_generator(seed, Purpose.BIOGRAPHY_CONTENT, i)
            words = word_of_each_list(rng)
            chosen = (rng.random(len(_BIOGRAPHY)) * self.num_templates).astype(int).tolist()
            templates = [ways[which] for ways, which in zip(_BIOGRAPHY, chosen, strict=True)]
            first, *rest = (each.format(name=name, **words) for each in templates[: self.num_sentences])
            samples.append(Sample(first, " " + " ".join(rest)))
        return samples
