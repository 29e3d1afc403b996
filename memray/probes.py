"""What is looked at while a trial trains: it travels with the spec, and has an identity of its own."""

from typing import Annotated

from pydantic import Field, field_validator

from memray.part import Part, canonical_json, digest, identity_of

# The held-out strings and whatever the probe actors do are looked at here, and at the last epoch.
PROBE_EPOCHS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)


class ProbesSpec(Part):
    """What is looked at while a trial trains.

    Attributes:
        epochs: Probe epochs; the last epoch always is one.
        num_held_out: Fresh strings of the same source that measure guessing.
        compared_strings: The trial's aggregates are taken over its first this many strings (0: all), so that
            cells with different numbers of strings are compared on the strings that they share.
    """

    epochs: tuple[Annotated[int, Field(ge=0)], ...] = PROBE_EPOCHS
    num_held_out: Annotated[int, Field(ge=0)] = 10
    compared_strings: Annotated[int, Field(ge=0)] = 0

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if list(epochs) != sorted(set(epochs)):
            raise ValueError(f"probe epochs must ascend without repetition, but got {list(epochs)}")
        return epochs

    def probes_id(self) -> str:
        """The identity of what is looked at: 12 hexadecimal digits."""
        return digest(canonical_json(identity_of(self)))
