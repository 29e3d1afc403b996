"""Looks at the weights of a trial while it trains: what is asked of them, and who answers.

Training goes on while somebody else looks at a snapshot; without anybody else, the trial looks for itself. Checkpoints
are the other thing that happens between two epochs, and stand here too.
"""

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa
from torch import nn

from memray.context import probe_context
from memray.encoding import Batch
from memray.finetune import Engine, parts, scoring_passes
from memray.material import Material
from memray.measures.prefix import ContextScores
from memray.samples import Samples
from memray.scoring import TokenScores
from memray.spec import TrialSpec
from memray.strings import Stream

STREAMS: tuple[Stream, ...] = ("trained", "held_out")


@dataclass(frozen=True, kw_only=True)
class Looker:
    """Who looks at some weights.

    Attributes:
        score: Scores any number of strings, in the passes of :func:`scoring_passes`.
        repeat: Scores batches just as the trainer forwarded them; None where the trainer itself is looking.
        model: The model, where one process has it whole; without it no context can be probed.
    """

    spec: TrialSpec
    material: Material | Samples
    score: Callable[[Batch], TokenScores]
    repeat: Callable[[Sequence[Batch]], TokenScores] | None
    model: nn.Module | None


@runtime_checkable
class Question(Protocol):
    """What is asked of the weights of an epoch; it can be pickled, and so can its answer."""

    @property
    def epoch(self) -> int: ...

    def answer(self, looker: Looker) -> Any: ...

    def split(self, number: int) -> "Sequence[Question]":
        """The same in at most so many shares, for as many to answer."""
        ...

    def join(self, answers: Sequence[Any]) -> Any:
        """The answer to the whole, from those to its shares."""
        ...


class Looked(NamedTuple):
    """What a look at the weights of one epoch showed.

    Attributes:
        held_out: Scores of the held-out strings; None if there are none.
        trained: Scores of the trained strings, where they were scored a second time.
        context: What the context probe showed, by role; empty where the epoch has none.
    """

    held_out: TokenScores | None
    trained: TokenScores | None = None
    context: Mapping[str, ContextScores] = MappingProxyType({})


class Undivided:
    """A question that one alone answers."""

    def split(self, number: int) -> "Sequence[Question]":
        return [self]  # type: ignore[list-item]

    def join(self, answers: Sequence[Any]) -> Any:
        (answer,) = answers
        return answer


@dataclass(frozen=True)
class EpochQuestion(Undivided):
    """What is asked at a probe epoch of a trial without a curriculum."""

    epoch: int
    with_context: bool

    def answer(self, looker: Looker) -> Looked:
        spec, material = looker.spec, looker.material
        assert isinstance(material, Material)
        held_out = None if material.held_out is None else looker.score(material.held_out)
        trained = looker.repeat(forwards_of_epoch(spec, material.trained, self.epoch)) if looker.repeat else None
        if not self.with_context:
            return Looked(held_out, trained)
        assert looker.model is not None  # an engine of many devices looks at snapshots
        return Looked(held_out, trained, look_at_context(spec, material, looker.model))


@runtime_checkable
class Look(Protocol):
    """A look that may still be under way."""

    def is_ready(self) -> bool: ...

    def result(self) -> Any:
        """The answer to its question."""
        ...


@runtime_checkable
class Prober(Protocol):
    """Who looks at the weights of probe epochs; called on every rank, because reading weights is collective."""

    def look(self, question: Question, engine: Engine) -> Look: ...


@dataclass(frozen=True)
class Ready:
    """A look that is over."""

    answer: Any

    def is_ready(self) -> bool:
        return True

    def result(self) -> Any:
        return self.answer


@dataclass(frozen=True)
class OwnProber:
    """Looks with the trial's own engine, while training waits.

    Attributes:
        model: The engine's model, where one process has it whole.
    """

    spec: TrialSpec
    material: Material | Samples
    model: nn.Module | None

    def look(self, question: Question, engine: Engine) -> Look:
        looker = Looker(spec=self.spec, material=self.material, score=engine.score, repeat=None, model=self.model)
        answer = question.answer(looker)
        give_memory_back()
        return Ready(answer)


def give_memory_back() -> None:
    """Gives the system what looks have freed.

    Each look at the end of a stage asks for a little more than the one before, which fits no hole that this one left:
    over four hundred stages of a thousand the heap grew by 180 MiB, of which nothing was in use.
    """
    with contextlib.suppress(AttributeError, OSError):  # only the GNU library has it, and needs it
        ctypes.CDLL(None).malloc_trim(0)


def forwards_of_epoch(spec: TrialSpec, trained: Batch, epoch: int) -> list[Batch]:
    """The batches in which the trainer scores its strings at an epoch: whoever repeats them gets the same bits."""
    if spec.scores_apart or epoch == spec.num_epochs:
        return scoring_passes(trained)
    shares = parts(trained, spec.strings_per_worker)
    return [part for share in shares for part in parts(share, spec.training.strings_per_forward or len(share.ids))]


def look_at_context(spec: TrialSpec, material: Material, model: nn.Module) -> dict[str, ContextScores]:
    """What the context probe shows of a model, by role."""
    stated = spec.probes.context
    assert stated is not None
    found = {}
    for stream in STREAMS:
        strings = material.strings[stream]
        if number := stated.num_probed(stream, len(strings)):
            found[stream] = probe_context(
                model,
                strings[:number],
                source=material.source,
                encoder=material.encoder,
                outside_ids=material.outside_ids,
                spec=stated,
                seed=spec.string_seed,
                stream=stream,
            )
    return found


def has_context(spec: TrialSpec, epoch: int, *, is_last: bool) -> bool:
    """Whether the context is probed at an epoch."""
    return spec.probes.context is not None and (is_last or epoch in spec.probes.context.epochs)


def check_second_scores(trial_id: str, epoch: int, trained: TokenScores, again: TokenScores | None) -> None:
    """Refuses a look at other weights than those that were trained.

    Raises:
        RuntimeError: If trained strings scored a second time differ in a bit.
    """
    if again is not None and not again.is_identical_to(trained):
        raise RuntimeError(
            f"a probe's scores must equal the trainer's to the last bit, but at epoch {epoch} of trial {trial_id} they "
            "differ: the two ran on different devices or versions, or the snapshot is not what was trained"
        )


# --- checkpoints -----------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """Where an earlier attempt at a trial had come to.

    Attributes:
        epoch: The epoch whose weights the engine's files hold.
        folder: Those files.
        tokens: The per-token records of all epochs before it,
        strings: and the per-string ones,
        matrix: and the recall matrix of a curriculum, which goes as far as its weights.
    """

    epoch: int
    folder: Path
    tokens: pa.Table
    strings: pa.Table
    matrix: pa.Table | None = None


@runtime_checkable
class Keeper(Protocol):
    """Who keeps checkpoints of a trial; called on every rank."""

    def newest(self) -> Checkpoint | None:
        """What to continue from."""
        ...

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint: where one process says so, all keep one."""
        ...

    def keep(self, epoch: int, engine: Engine) -> None:
        """Keeps the engine's state; every measurement of an earlier epoch was handed on before."""
        ...
