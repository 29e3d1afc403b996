"""Tables of facts on invented persons, which nothing but memory tells.

A study that asks whether memory reaches the fact or only its wording trains under one template and ranks the objects
of the relation under another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from memray.generators.lexicon import LISTS, NUM_NAMES, names
from memray.generators.sample import Generator, Purpose, Sample, random_generator, require_size
from memray.names import unknown_name

# By relation: the list of its objects, and ways of saying it, each of which ends where the object belongs.
_RELATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "birthplace": (
        "city",
        (
            "{subject} was born in",
            "The birthplace of {subject} is",
            "{subject} came into the world in",
            "The parents of {subject} were then living in",
        ),
    ),
    "home": (
        "country",
        (
            "{subject} lives in",
            "The home of {subject} is in",
            "{subject} has settled in",
            "Letters to {subject} are sent to",
        ),
    ),
    "profession": (
        "profession",
        (
            "{subject} works as a",
            "The profession of {subject} is that of a",
            "{subject} earns a living as a",
            "By trade {subject} is a",
        ),
    ),
    "colour": (
        "colour",
        (
            "The favourite colour of {subject} is",
            "The colour that {subject} likes best is",
            "Of all colours {subject} prefers",
            "{subject} always dresses in",
        ),
    ),
    "instrument": (
        "instrument",
        (
            "{subject} plays the",
            "The instrument of {subject} is the",
            "{subject} has learned to play the",
            "In the orchestra {subject} is heard on the",
        ),
    ),
    "pet": (
        "pet",
        (
            "{subject} owns a",
            "The pet of {subject} is a",
            "{subject} shares the house with a",
            "Every morning {subject} feeds a",
        ),
    ),
}

RELATIONS = tuple(_RELATIONS)
"""The relations, in the order in which the facts on a subject stand in the table."""

NUM_OBJECTS = 32
"""Objects of each relation: a fact holds log2(32) = 5 bits, and ranks of all relations compare."""

NUM_TEMPLATES = 4
"""Templates of each relation."""

NUM_FACTS = NUM_NAMES * len(RELATIONS)
"""Facts of the longest table."""


class Fact(NamedTuple):
    """That a subject stands in a relation to an object.

    Attributes:
        subject: An invented person.
        relation: One of `RELATIONS`.
        object: One of `objects(relation)`.
    """

    subject: str
    relation: str
    object: str

    def sample(self, template: int) -> Sample:
        """The fact in the words of one template; the reference is the object and a full stop.

        What ranks the candidates is the reference of each: `fact._replace(object=candidate).sample(template)`.

        Raises:
            ValueError: If there is no such relation or template.

        Example:
            >>> Fact("Mira Tolven", "birthplace", "Oslo").sample(0)
            Sample(prefix='Mira Tolven was born in', reference=' Oslo.')
        """
        templates = _relation(self.relation)[1]
        _require_template(template)
        return Sample(templates[template].format(subject=self.subject), f" {self.object}.")


def objects(relation: str) -> Sequence[str]:
    """Every object that a relation can have, each as likely as any other.

    Raises:
        ValueError: If there is no such relation.
    """
    return LISTS[_relation(relation)[0]]


def fact_table(num_facts: int, seed: int) -> list[Fact]:
    """The first facts of a table in which each subject has one of every relation.

    Objects are drawn independently of all else: not even the other facts on a subject tell anything about one. A
    shorter table is the beginning of a longer one; the rest of that can therefore serve as controls.

    Args:
        num_facts: Number of facts; the last subject has fewer relations where it is no multiple of their number.
        seed: Names the table.

    Raises:
        ValueError: If there are not so many facts, or the seed is negative.
    """
    require_size("a table of facts", "num_facts", num_facts, limit=NUM_FACTS, seed=seed)
    num_subjects = -(-num_facts // len(RELATIONS))
    subjects = names(num_subjects, random_generator(seed, Purpose.FACT_SUBJECTS))
    chosen = random_generator(seed, Purpose.FACT_OBJECTS).random((num_subjects, len(RELATIONS))) * NUM_OBJECTS
    facts = [
        Fact(subject, relation, objects(relation)[int(which)])
        for subject, row in zip(subjects, chosen.tolist(), strict=True)
        for relation, which in zip(RELATIONS, row, strict=True)
    ]
    return facts[:num_facts]


@dataclass(frozen=True, kw_only=True)
class Facts(Generator):
    """The table of facts, each told under one template; the facts do not depend on which.

    Args:
        template: The first template, from 0.
        num_templates: Templates from there on, which the subjects take in turn: all facts on a subject are told under
            one, so that the corpus holds each wording and no fact in two.

    Raises:
        ValueError: If there are no such templates.

    Example:
        >>> [Facts(template=1, num_templates=2).template_of(place) for place in (0, 5, 6, 11, 12)]
        [1, 1, 2, 2, 1]
    """

    limit: ClassVar[int] = NUM_FACTS

    template: int = 0
    num_templates: int = 1

    def __post_init__(self) -> None:
        _require_template(self.template)
        if self.num_templates not in range(1, NUM_TEMPLATES - self.template + 1):
            raise ValueError(
                f"1 <= num_templates <= {NUM_TEMPLATES - self.template} must hold from template {self.template} on, "
                f"but got num_templates={self.num_templates}; choose a number in that range, or an earlier template"
            )

    def template_of(self, place: int) -> int:
        """The template that a row of the table is told under, whatever the seed: a probe asks under the others.

        Args:
            place: The row, from 0.
        """
        return self.template + place // len(RELATIONS) % self.num_templates

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        table = fact_table(num_samples, seed)
        return [fact.sample(self.template_of(place)) for place, fact in enumerate(table)]


def _relation(relation: str) -> tuple[str, tuple[str, ...]]:
    if relation not in _RELATIONS:
        raise unknown_name("relation", relation, RELATIONS)
    return _RELATIONS[relation]


def _require_template(template: int) -> None:
    if template not in range(NUM_TEMPLATES):
        raise ValueError(
            f"0 <= template < {NUM_TEMPLATES} must hold, but got template={template}; choose one of the templates"
        )
