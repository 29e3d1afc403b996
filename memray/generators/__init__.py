"""Corpora that need no network: samples of (prefix, reference) on what nothing but memory can tell, and source.

Generators know nothing of tokenizers, prompts or models. To add one, write a dataclass and enter it in `GENERATORS`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from memray.generators.facts import Fact, Facts, fact_table, objects
from memray.generators.prose import Biographies, Questions
from memray.generators.puzzles import Puzzles, solutions
from memray.generators.random_words import Frequencies, Overlapping
from memray.generators.sample import Generator, Sample
from memray.generators.source import PythonSource
from memray.names import unknown_name

__all__ = [
    "GENERATORS",
    "Biographies",
    "Fact",
    "Facts",
    "Frequencies",
    "Generator",
    "Overlapping",
    "Puzzles",
    "PythonSource",
    "Questions",
    "Sample",
    "fact_table",
    "generator",
    "objects",
    "solutions",
]

GENERATORS: Mapping[str, type[Generator]] = {
    "facts": Facts,
    "questions": Questions,
    "biographies": Biographies,
    "puzzles": Puzzles,
    "overlapping": Overlapping,
    "frequencies": Frequencies,
    "python_source": PythonSource,
}
"""Every generator by name; the fields of each are its options."""


def generator(name: str, **options: object) -> Generator:
    """The generator of that name, with these options instead of its defaults.

    Types are checked, because options may come from a spec that does not know them; a whole number stands for the
    equal fraction.

    Raises:
        ValueError: If there is no such generator or option, or an option is of another type or out of range.

    Example:
        >>> generator("biographies", num_templates=2)
        Biographies(num_templates=2, num_sentences=3)
    """
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    kind = GENERATORS[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}:", option, known or ["none"], plural="options")
    types = get_type_hints(kind)
    return kind(**{option: _of_type(option, value, types[option]) for option, value in options.items()})


def _of_type(option: str, value: object, expected: Any) -> object:
    if choices := get_args(expected):
        if value not in choices:
            raise unknown_name(option, str(value), choices, plural="choices")
    elif expected is float and type(value) is int:
        return float(value)
    elif type(value) is not expected:
        raise ValueError(
            f"option {option} must be of type {expected.__name__}, but got {value!r}; give one of that type"
        )
    return value
