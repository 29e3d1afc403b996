"""What is looked at while a trial trains: it travels with the spec, and has an identity of its own."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, field_validator, model_validator

from memray.part import Part, Positive, canonical_json, digest, identity_of
from memray.strings import Stream

# The held-out strings and whatever the probe actors do are looked at here, and at the last epoch.
PROBE_EPOCHS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)

Keep = Literal["local", "remote"]
Replacement = Literal[
    "source", "shuffled", "other_string", "wrong", "outside", "constant", "none", "none_in_place",
]  # fmt: skip

# Their places are their codes in the records of the context probe, and seed its draws: append only.
KEEPS: tuple[Keep, ...] = get_args(Keep)
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)

# The two axes of the full grid: the local share of the string, and the share of remote tokens left true.
GRID_LOCAL_PERCENTS = (0, 1, 2, 5, 10, 25, 100)
GRID_CONTEXT_PERCENTS = (0, 25, 50, 75, 100)


class Condition(NamedTuple):
    """What the context probe leaves of the prefix of a target.

    Attributes:
        keep: Which side of the prefix stays true.
        k: Local tokens: those that stand last before the target.
        remote_share: Share of the remote tokens that are left true; 0 where `keep` is "remote".
        replacement: What stands for the side that is not kept.
    """

    keep: Keep
    k: int
    remote_share: float
    replacement: Replacement

    @property
    def needs_prompts(self) -> bool:
        """Whether each target has a context of its own, so that nothing can be computed once for all of them."""
        return self.keep == "local" and self.replacement == "shuffled"

    @property
    def is_removal(self) -> bool:
        """Whether nothing stands for the side that is not kept."""
        return self.replacement in ("none", "none_in_place")

    @property
    def is_random(self) -> bool:
        """Whether two redraws may differ."""
        return self.remote_share > 0 or not self.is_removal


class ContextSpec(Part):
    """The prefix and context probe: which part of its prefix a token needs to be recalled (protocol, section 4).

    Attributes:
        epochs: Probe epochs at which the context is probed too; the last epoch always is one.
        keep: "local" keeps the k tokens before the target and replaces all before them; "remote" is the reverse.
        replacements: What the replaced tokens become.
        lengths: k in tokens, ascending. Those that are not below the string's length fall away; the full prefix always
            is looked at.
        shares: More k, as shares of the string's length.
        grid: Whether local shares are crossed with shares of remote tokens left true.
        grid_replacement: What the other remote tokens become there.
        redraws: How often each random replacement is drawn.
        num_strings: Trained strings that are probed, the first ones (0: all).
        num_held_out: Held-out strings that get the same treatment, the first ones.
        num_positions: Targets that "shuffled" is probed at, evenly spaced (0: all). It costs a prompt for each of them,
            and so the square of the string's length.
        extractable: For each k here, the share of windows whose second k tokens follow from their first k alone.
    """

    epochs: tuple[Annotated[int, Field(ge=0)], ...] = ()
    keep: tuple[Keep, ...] = ("local",)
    replacements: tuple[Replacement, ...] = REPLACEMENTS
    lengths: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    grid: bool = False
    grid_replacement: Replacement = "source"
    redraws: Annotated[int, Field(gt=0, le=127)] = 5
    num_strings: Annotated[int, Field(ge=0)] = 0
    num_held_out: Annotated[int, Field(ge=0)] = 1
    num_positions: Annotated[int, Field(ge=0)] = 0
    extractable: tuple[Positive, ...] = ()

    @field_validator("epochs", "lengths", "shares", "extractable")
    @classmethod
    def _ascending(cls, values: tuple[int | float, ...]) -> tuple[int | float, ...]:
        _check_ascending("epochs, lengths, shares and extractable of a context probe", values)
        return values

    @field_validator("keep", "replacements")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"keep and replacements of a context probe must name each once, but got {list(names)}")
        return names

    @model_validator(mode="after")
    def _looks_at_something(self) -> "ContextSpec":
        has_curve = bool(self.keep and self.replacements and (self.lengths or self.shares))
        if not (has_curve or self.grid or self.extractable):
            raise ValueError(
                "a context probe must look at something, but it has neither a curve (keep, replacements, and lengths "
                "or shares), nor grid, nor extractable; set one of them, or leave probes.context out"
            )
        if not self.grid and self.grid_replacement != type(self).model_fields["grid_replacement"].default:
            raise ValueError(
                f"grid_replacement is read with grid=true alone, but got grid_replacement={self.grid_replacement!r}; "
                "set grid, or leave it out"
            )
        return self

    def canonical(self) -> "ContextSpec":
        """Names in the order of their tables: in any other they mean the same."""
        keep, replacements = sorted(self.keep, key=KEEPS.index), sorted(self.replacements, key=REPLACEMENTS.index)
        return self.model_copy(update={"keep": tuple(keep), "replacements": tuple(replacements)})

    def num_probed(self, stream: Stream, available: int) -> int:
        """How many of the strings of a stream are probed: its first ones."""
        return min(available, self.num_held_out if stream == "held_out" else self.num_strings or available)

    def curve_lengths(self, length: int) -> tuple[int, ...]:
        """The finite k of a string of `length` tokens, ascending."""
        by_share = {max(1, _rounded(share * length)) for share in self.shares}
        return tuple(sorted(k for k in {*self.lengths, *by_share} if k < length))

    def grid_lengths(self, length: int) -> dict[int, int | None]:
        """k by local percent, None for the full prefix; empty without a grid."""
        if not self.grid:
            return {}
        found = {percent: _rounded(percent * length / 100) for percent in GRID_LOCAL_PERCENTS}
        return {percent: k if k < length else None for percent, k in found.items()}

    def conditions(self, length: int) -> tuple[Condition, ...]:
        """All that a string of `length` tokens is put through, each once, besides its full true prefix.

        Nothing kept is "local" with k = 0 whichever side is to be kept, and "remote" with k = 0 is the full prefix.
        """
        found: dict[Condition, None] = {}
        for replacement in self.replacements:
            lengths = self.curve_lengths(length)
            if "local" in self.keep:
                found.update(dict.fromkeys(Condition("local", k, 0.0, replacement) for k in lengths))
            if "remote" in self.keep and lengths:
                found[Condition("local", 0, 0.0, replacement)] = None
                found.update(dict.fromkeys(Condition("remote", k, 0.0, replacement) for k in lengths if k))
        for k in self.grid_lengths(length).values():
            if k is not None:
                shares = (percent / 100 for percent in GRID_CONTEXT_PERCENTS if percent < 100)
                found.update(dict.fromkeys(Condition("local", k, share, self.grid_replacement) for share in shares))
        return tuple(found)

    def positions(self, condition: Condition, length: int, *, bos: bool) -> tuple[int, ...]:
        """The targets of a condition, ascending: those that have k tokens before them, and at least one of any kind."""
        first = max(condition.k, 0 if bos else 1)
        if not (condition.needs_prompts and self.num_positions):
            return tuple(range(first, length))
        first = max([first, *(each.k for each in self.conditions(length))])  # where all of them can be compared
        step = max(1.0, (length - first) / self.num_positions)
        count = min(self.num_positions, length - first)
        return tuple(first + math.floor(step * j) for j in range(count))


def context_cost_tokens(spec: ContextSpec, length: int, *, bos: bool) -> int:
    """Tokens that a model reads in one context probe of one string, padding left out.

    Exact, but for what "none" leaves of a share, which is known to a token a block, and for "none_in_place" where it is
    the same as "none" and costs nothing.
    """
    leading = int(bos)
    num_inputs = length - 1  # the last symbol is only predicted
    tokens = leading + num_inputs
    trunks: dict[tuple[float, str], int] = {}
    for condition in spec.conditions(length):
        positions = spec.positions(condition, length, bos=bos)
        redraws = spec.redraws if condition.is_random else 1
        if condition.needs_prompts:
            tokens += redraws * sum(leading + i for i in positions)
        elif condition.keep == "remote":
            tokens += 0 if condition.is_removal else redraws * condition.k * len(positions)
        elif condition.is_removal and not condition.remote_share:
            tokens += (leading + condition.k) * len(positions)
        else:
            tokens += redraws * condition.k * len(positions)
            kept = round(num_inputs * condition.remote_share) if condition.is_removal else num_inputs
            trunks[condition.remote_share, condition.replacement] = redraws * (leading + kept)
    windows = sum((length - 2 * k + 1) * (leading + 2 * k - 1) for k in spec.extractable if 2 * k <= length)
    return tokens + sum(trunks.values()) + windows


class RetentionSpec(Part):
    """Which strings of other stages are looked at while a curriculum goes on (protocol, section 5).

    Attributes:
        ages: At the probe epochs within a stage, the strings that were last trained so many stages ago: a number that
            does not grow with the stages gone by.
        num_future: Of the strings that come next, so many are looked at too: they show what is learned of the source.
        stage_ends: Whether the end of a stage asks for all strings trained so far, or for these ages alone.
    """

    ages: tuple[Positive, ...] = (1, 2, 3, 5, 10, 20, 50, 100)
    num_future: Annotated[int, Field(ge=0)] = 2
    stage_ends: Literal["all", "ages"] = "all"

    @field_validator("ages")
    @classmethod
    def _ascending(cls, ages: tuple[int, ...]) -> tuple[int, ...]:
        _check_ascending("ages of probes.retention", ages)
        return ages


class GenerationSpec(Part):
    """What the samples of a corpus are generated for: what a model says instead (protocol, section 7).

    Attributes:
        epochs: Probe epochs at which it is generated; the last epoch always is one.
        num_samples: Native samples whose continuation is generated, from the first divergence on: as many of every
            stratum of match lengths (0, 1, 2 to 3, 4 to 7, and so on).
        checked_share: Share of the native samples that are generated from their prompt alone: do the teacher-forced
            match lengths hold?
    """

    epochs: tuple[Annotated[int, Field(ge=0)], ...] = ()
    num_samples: Annotated[int, Field(ge=0)] = 100
    checked_share: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        _check_ascending("epochs of probes.generation", epochs)
        return epochs


class EmbeddingsSpec(Part):
    """How alike the samples of a corpus are, and whether what the model makes of them collapses (protocol, section 7).

    Attributes:
        encoder: A sentence encoder, by directory or hub id, that says how alike samples are; None takes the model as
            it was before training, the mean of its last hidden states. It is never the model as it was trained.
    """

    encoder: str | None = None


class FactsSpec(Part):
    """Whether memory reaches facts or only their wording: the rank of a fact's object among all of its relation, under
    templates in which the fact was never told (protocol, section 7).

    Attributes:
        epochs: Probe epochs at which it is asked; the last epoch always is one.
        num_facts: Facts that were trained, the first ones, and as many held-out ones beside them.
    """

    epochs: tuple[Annotated[int, Field(ge=0)], ...] = ()
    num_facts: Positive = 32

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        _check_ascending("epochs of probes.facts", epochs)
        return epochs


class ProbesSpec(Part):
    """What is looked at while a trial trains.

    Attributes:
        epochs: Probe epochs, of a curriculum those within each stage; the last epoch always is one.
        num_held_out: Fresh strings of the same source that measure guessing.
        compared_strings: The trial's aggregates are taken over its first this many strings (0: all), so that
            cells with different numbers of strings are compared on the strings that they share.
        context: The prefix and context probe; None is none.
        retention: Which strings of other stages are looked at, where there is a curriculum.
        generation: What is generated of the samples of a corpus; None is nothing.
        embeddings: How alike samples are, and how many directions the model tells them apart in; None is not asked.
        facts: Whether facts are known in words in which they were not told; None is not asked.
        prefix_lengths: Tokens of the reference that are given beforehand: for each, how many more are recited, of the
            samples that go on beyond the most of them, and up to as many tokens for each.
    """

    epochs: tuple[Annotated[int, Field(ge=0)], ...] = PROBE_EPOCHS
    num_held_out: Annotated[int, Field(ge=0)] = 10
    compared_strings: Annotated[int, Field(ge=0)] = 0
    context: ContextSpec | None = None
    retention: RetentionSpec = RetentionSpec()
    generation: GenerationSpec | None = None
    embeddings: EmbeddingsSpec | None = None
    facts: FactsSpec | None = None
    prefix_lengths: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _ascending(self) -> "ProbesSpec":
        _check_ascending("probe epochs", self.epochs)
        _check_ascending("probes.prefix_lengths", self.prefix_lengths)
        return self

    @model_validator(mode="after")
    def _parts_are_within(self) -> "ProbesSpec":
        for name in ("context", "generation", "facts"):
            stated = getattr(self, name)
            if stated is not None and (strange := sorted({*stated.epochs} - {*self.epochs})):
                raise ValueError(
                    f"probes.{name}.epochs must be among probes.epochs, but {strange} are not; add them there, or "
                    "leave them out"
                )
        if self.embeddings is not None and 0 not in self.epochs:
            raise ValueError(
                "probes.embeddings compares samples before training, so that probes.epochs must begin with 0, but got "
                f"{list(self.epochs)}; add it"
            )
        if self.facts is not None and self.facts.num_facts > self.num_held_out:
            raise ValueError(
                "probes.facts compares as many held-out facts as trained ones, so that facts.num_facts <= num_held_out "
                f"must hold, but got {self.facts.num_facts} > {self.num_held_out}; hold out more, or ask of fewer"
            )
        return self

    @model_validator(mode="after")
    def _context_is_within(self) -> "ProbesSpec":
        if self.context is None:
            return self
        if self.context.num_held_out > self.num_held_out:
            raise ValueError(
                f"probes.context.num_held_out must be at most probes.num_held_out, but got {self.context.num_held_out} "
                f"> {self.num_held_out}; probe the context of fewer strings"
            )
        return self

    def probes_id(self) -> str:
        """The identity of what is looked at: 12 hexadecimal digits."""
        return digest(canonical_json(identity_of(self)))


def _check_ascending(what: str, values: Sequence[int | float]) -> None:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{what} must ascend without repetition, but got {list(values)}")


def _rounded(value: float) -> int:
    """To the nearest integer, halves upwards."""
    return math.floor(value + 0.5)
