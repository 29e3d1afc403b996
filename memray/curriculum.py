"""Strings one after another: the part of a spec that says what each stage trains, and what it takes over.

A stage is what a trial without a curriculum is as a whole: some strings, trained for `training.epochs` epochs. The
strings of a trial are shared out among its stages in order: `strings.num_strings` is how long a sequence is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from pydantic import Field, field_validator, model_validator

from memray.part import Part, Positive

# The stage that ends before the first begins: where a string stands that no stage has trained.
BEFORE = -1

StageNumber = Annotated[int, Field(ge=0)]


class OtherSpec(Part):
    """Stages whose strings come from another source than the trial's: its structure and length, other symbols.

    Attributes:
        stages: Which stages, from 0.
        alphabet: As in the strings' own spec, and so the rest; None leaves what that says.
    """

    stages: Annotated[tuple[StageNumber, ...], Field(min_length=1)]
    alphabet: Literal["latin", "latin_upper", "digits", "greek", "cyrillic", "cjk", "vocabulary"] | None = None
    alphabet_size: Annotated[int, Field(ge=2)] | None = None
    entropy_bits: float | None = None
    skew: Literal["one-token", "geometric", "zipf"] | None = None

    @field_validator("stages")
    @classmethod
    def _ascending(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending("curriculum.other.stages", stages)

    @model_validator(mode="after")
    def _is_another(self) -> "OtherSpec":
        if not self.changes():
            raise ValueError(
                "curriculum.other must change something about the strings of its stages, but it names no alphabet, "
                "alphabet_size, entropy_bits or skew; name one, or leave it out"
            )
        return self

    def changes(self) -> dict[str, Any]:
        """The fields of the strings' spec that are others in these stages."""
        return {name: value for name, value in self.model_dump(exclude={"stages"}).items() if value is not None}


class CurriculumSpec(Part):
    """Stages, and what one stage takes over from the one before (protocol, section 5).

    Attributes:
        strings_per_stage: The first so many strings are stage 0, the next ones stage 1, and so on.
        weights: Whether a stage begins from the weights that the one before ended with, or from the base weights: the
            control that meets the same strings one by one without a past.
        optimiser: Whether each stage has a fresh optimiser, or the state of the one before.
        schedule: Whether the learning rate's schedule spans one stage, and begins anew with each, or the whole trial.
        replay_share: Share of the strings of earlier stages, rounded up, that each step trains beside its own; drawn
            anew each epoch.
        revisits: Stages that are trained once more, in this order, after all the others.
        unrepeated: Stages that train as many strings as any other, but fresh ones each epoch, which never come again.
            Their own strings are left out: what is learned there is the source, and no string.
        other: Stages whose strings come from another source.
    """

    strings_per_stage: Positive = 1
    weights: Literal["carried", "base"] = "carried"
    optimiser: Literal["fresh", "carried"] = "fresh"
    schedule: Literal["stage", "trial"] = "stage"
    replay_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    revisits: tuple[StageNumber, ...] = ()
    unrepeated: tuple[StageNumber, ...] = ()
    other: OtherSpec | None = None

    @field_validator("unrepeated")
    @classmethod
    def _unrepeated_ascend(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending("curriculum.unrepeated", stages)

    @model_validator(mode="after")
    def _base_weights_carry_nothing(self) -> "CurriculumSpec":
        carries = {
            "optimiser='carried'": self.optimiser == "carried",
            "schedule='trial'": self.schedule == "trial",
            "replay_share": self.replay_share > 0,
            "revisits": bool(self.revisits),
            "unrepeated": bool(self.unrepeated),
        }
        if self.weights == "base" and any(carries.values()):
            named = ", ".join(name for name, is_set in carries.items() if is_set)
            raise ValueError(
                f"weights='base' begins every stage without a past, but got {named}; leave them out, or carry the "
                "weights"
            )
        return self

    def stages(self, num_strings: int) -> "tuple[Stage, ...]":
        """What each stage trains, in order.

        Raises:
            ValueError: If the strings cannot be shared out so, or a stage is named that there is not.
        """
        size = self.strings_per_stage
        if num_strings % size:
            raise ValueError(
                "curriculum.strings_per_stage must divide strings.num_strings, so that every stage is the same size, "
                f"but got {size} and {num_strings}; change one of them"
            )
        count = num_strings // size
        named = {"revisits": self.revisits, "unrepeated": self.unrepeated}
        named |= {"other.stages": self.other.stages} if self.other else {}
        for name, numbers in named.items():
            if strange := sorted({number for number in numbers if number >= count}):
                raise ValueError(
                    f"curriculum.{name} must be among the stages 0 to {count - 1}, but got {strange}; there are "
                    f"{num_strings} strings, {size} a stage"
                )
        if forgotten := sorted({*self.revisits} & {*self.unrepeated}):
            raise ValueError(
                f"a stage that is visited again must have had strings of its own, but stages {forgotten} of "
                "curriculum.revisits are unrepeated; leave them out of one of the two"
            )
        foreign = set(self.other.stages) if self.other else set()
        numbers = [*range(count), *self.revisits]
        return tuple(
            Stage(
                index=index,
                strings=tuple(range(number * size, (number + 1) * size)),
                is_other=number in foreign,
                is_revisit=index >= count,
                is_unrepeated=index < count and number in self.unrepeated,
            )
            for index, number in enumerate(numbers)
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
        index: In the order of training, from 0; a stage that is visited again comes after all others.
        strings: Indices of the trial's strings that are its own. An unrepeated stage trains others instead.
        is_other: Whether they come from the other source.
        is_revisit: Whether they were trained before.
        is_unrepeated: Whether it trains fresh strings each epoch.
    """

    index: int
    strings: tuple[int, ...]
    is_other: bool
    is_revisit: bool
    is_unrepeated: bool


def strings_to_look_at(
    stages: Sequence[Stage],
    stage: int,
    learned: Int[ndarray, " strings"],
    *,
    ages: Sequence[int] | None,
    num_future: int,
) -> list[int]:
    """The strings beside its own that are looked at in a stage, ascending.

    Args:
        stage: Its number, or `BEFORE`.
        learned: The last earlier stage that trained each string; `BEFORE` if none has.
        ages: Those last trained so many stages ago, which does not grow with the stages gone by; None: all.
        num_future: How many of those that come next.
    """
    own = set() if stage == BEFORE or stages[stage].is_unrepeated else {*stages[stage].strings}
    chosen = learned > BEFORE
    if ages is not None:
        chosen &= np.isin(stage - learned, ages)
    coming = [
        string
        for later in stages[stage + 1 : stage + 2 + num_future]
        if not later.is_unrepeated
        for string in later.strings
        if learned[string] == BEFORE and string not in own
    ]
    return sorted(({*np.flatnonzero(chosen).tolist()} - own) | {*coming[:num_future]})


def num_replayed(share: float, num_earlier: int) -> int:
    """Strings of earlier stages that each step trains beside its own, of so many."""
    return math.ceil(share * num_earlier)


def _ascending(what: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    if list(numbers) != sorted(set(numbers)):
        raise ValueError(f"{what} must ascend without repetition, but got {list(numbers)}")
    return numbers
