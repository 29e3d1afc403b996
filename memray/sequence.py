"""A curriculum over any engine: strings one after another, and what becomes of those that were trained before.

Each stage is the loop of :func:`finetune`. What is seen on the way waits, in order of time, until its look is there;
training does not. The strings of other stages are looked at together, in one question to whoever looks.
"""

import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from memray.curriculum import BEFORE, Stage, num_replayed, strings_to_look_at
from memray.encoding import Batch, encode
from memray.finetune import Engine, finetune, learning_rate, scoring_passes
from memray.looks import Keeper, Look, Looker, Prober, Undivided, check_second_scores
from memray.material import Material
from memray.measurement import KnownString, Measurement, Stopper
from memray.scoring import TokenScores
from memray.sequence_measurement import (
    BASE,
    OTHER,
    Block,
    Learned,
    Place,
    SequenceMeasurer,
    recalled,
    remeasure_sequence,
)
from memray.spec import TrialSpec
from memray.strings import draw_strings

# What tells the choice of replayed strings from other random numbers of the same seed.
_REPLAY_STREAM = 3


def measure_sequence(
    spec: TrialSpec, material: Material, engine: Engine, *, prober: Prober, keeper: Keeper | None = None
) -> Iterator[Measurement]:
    """Trains stage after stage and measures each, those before a checkpoint excepted.

    The first measurement is of the weights before training. Checkpoints lie between stages.
    """
    with tempfile.TemporaryDirectory(prefix="memray-base-") as scratch:
        base = Path(scratch) if spec.curriculum and spec.curriculum.weights == "base" else None
        if base:
            engine.save(base)
        walk = Walk(spec, material, engine, prober, base)
        checkpoint = keeper.newest() if keeper else None
        if checkpoint:
            engine.load(checkpoint.folder)
            assert checkpoint.matrix is not None
            walk.resume(checkpoint.matrix)
        else:
            walk.look(BEFORE, 0, is_end=True)
            walk.end(BEFORE)
        for stage in walk.stages[walk.next_stage :]:
            walk.train(stage)
            is_last = stage.index == len(walk.stages) - 1
            is_due = keeper is not None and not is_last and any(engine.gather(keeper.is_due()))
            weights = engine.snapshot() if is_last and spec.training.keep_weights == "final" else None
            for measurement in walk.measured(waits=is_last or is_due):
                yield replace(measurement, weights=weights) if walk.is_over else measurement
            if is_due and keeper:
                keeper.keep(walk.epoch, engine)


# --- looks -----------------------------------------------------------------------------------------------------------


class SequenceAnswer(NamedTuple):
    """What a look showed.

    Attributes:
        block: The recall of all strings that were asked for, those held out last; None where none was.
        own: Scores of the stage's own strings, where they were scored a second time.
    """

    block: Block
    own: TokenScores | None


@dataclass(frozen=True)
class SequenceQuestion(Undivided):
    """Which strings are looked at.

    Attributes:
        place: Where the sequence stands.
        asked: Indices of the strings of the trial's source, and of the other one.
        own: The stage's own strings, which end its training here, and are scored a second time where somebody else
            than the trainer looks.
        own_source: Theirs.
    """

    place: Place
    asked: tuple[tuple[int, ...], tuple[int, ...]]
    own: tuple[int, ...] = ()
    own_source: int = BASE

    @property
    def epoch(self) -> int:
        return self.place.epoch

    def answer(self, looker: Looker) -> SequenceAnswer:
        parts: list[Block] = []
        assert isinstance(looker.material, Material)
        for source, asked in enumerate(self.asked):
            material = _of_source(looker.material, source)
            if material is not None:
                parts += _recall(looker, material, asked, source)
        own = None
        if looker.repeat and self.own:
            own = looker.repeat(scoring_passes(own_batch(looker.material, self.own, self.own_source)))
        return SequenceAnswer(self.place.block(parts, is_own=False), own)


def _of_source(material: Material, source: int) -> Material | None:
    return material if source == BASE else material.other


def _recall(looker: Looker, material: Material, asked: Sequence[int], source: int) -> Iterator[Block]:
    """Strings and held-out strings of one source, scored together."""
    assert isinstance(looker.material, Material)
    batch, number = own_batch(looker.material, asked, source), len(asked)
    assert material.held_out is not None  # the spec asks for some
    scores = looker.score(batch.beside(material.held_out) if number else _of(material.held_out, material, source))
    known = [material.known_trained[index] for index in asked]
    if number:
        yield recalled(scores.first(number), known, asked, source=source, is_held_out=False)
    held_out = material.known_held_out
    yield recalled(scores.after(number), held_out, range(len(held_out)), source=source, is_held_out=True)


def own_batch(material: Material, strings: Sequence[int], source: int) -> Batch:
    """Some strings of one source, with the alphabet that they are scored against."""
    own = _of_source(material, source)
    assert own is not None
    return _of(own.trained.of(np.array(strings, dtype=np.int64)), own, source)


def _of(batch: Batch, material: Material, source: int) -> Batch:
    return replace(batch, alphabet=material.alphabet) if source == OTHER else batch


# --- the walk --------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What waits to be measured: a look, the scores of a stage's own strings, or its end.

    Attributes:
        at_s: When it happened, by a clock of this process.
    """

    place: Place
    at_s: float
    look: Look | None = None
    own: TokenScores | None = None
    ends: bool = False


class Walk:
    """Walks through the stages with an engine.

    Attributes:
        learned: Which strings were trained in which stage, as far as training has come; what is measured lags behind.
    """

    def __init__(self, spec: TrialSpec, material: Material, engine: Engine, prober: Prober, base: Path | None) -> None:
        assert spec.curriculum is not None
        self.spec = spec
        self.curriculum = spec.curriculum
        self.material = material
        self.engine = engine
        self.prober = prober
        self.base = base
        self.stages = spec.stages()
        known = {BASE: material.known_trained}
        self.measurer = SequenceMeasurer(
            spec, known | ({OTHER: material.other.known_trained} if material.other else {})
        )
        self.learned = Learned.none_of(spec.strings.num_strings).stage
        self.source = np.zeros(spec.strings.num_strings, dtype=np.int64)
        for stage in self.stages:
            self.source[list(stage.strings)] = OTHER if stage.is_other else BASE
        self.next_stage = self.epoch = self.step = 0
        self.waiting: deque[Event] = deque()

    def resume(self, matrix: pa.Table) -> None:
        """Goes to the end of the last stage that was measured."""
        self.next_stage = BEFORE  # the first measurement is of the weights before training
        for measured in remeasure_sequence(self.measurer, matrix):
            self.next_stage += 1
            self.epoch, self.step = measured.epoch, int(measured.metrics["sequence/steps"])
        for stage in self.stages[: self.next_stage]:
            self._remember(stage)

    def _remember(self, stage: Stage) -> None:
        if not stage.is_unrepeated:
            self.learned[list(stage.strings)] = stage.index

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, stage: Stage) -> None:
        """Trains a stage, to its last epoch or to its criterion."""
        if stage.index > 0:
            if self.base:
                self.engine.load(self.base)
            elif self.curriculum.optimiser == "fresh":
                self.engine.forget()
        (self._expose if stage.is_unrepeated else self._memorise)(stage)
        self.end(stage.index)
        self._remember(stage)
        self.next_stage = stage.index + 1

    def _memorise(self, stage: Stage) -> None:
        training, source = self.spec.training, OTHER if stage.is_other else BASE
        rule = training.stop_when
        stopper = Stopper(rule, self._known(stage.strings, source)) if rule else None
        began = self.epoch, self.step
        epochs = finetune(
            self.engine,
            own_batch(self.material, stage.strings, source),
            training,
            order_seed=self.spec.order_seed,
            stop=stopper,
            dropout=self.spec.has_dropout,
            before_epoch=lambda epoch: self._advance(stage, epoch, began),
            replayed=lambda epoch: self._replayed(stage, epoch),
            **self._schedule(stage),
        )
        for epoch, scores in epochs:
            is_end = epoch == training.epochs or (stopper is not None and stopper.has_stopped)
            self._goto(epoch, began)
            if is_end:
                # Scores read off a step are of another batch: nobody else gets their last bits again.
                were_scored = epoch == training.epochs or self.spec.scores_apart
                self.look(stage.index, epoch, is_end=True, repeats_own=were_scored)
            place = self._place(stage.index, epoch, is_end=is_end)
            self.waiting.append(Event(place, time.monotonic(), own=scores))

    def _expose(self, stage: Stage) -> None:
        """As many steps as any other stage has, on strings that are never seen again."""
        training, source = self.spec.training, OTHER if stage.is_other else BASE
        assert training.epochs is not None
        began, steps = (self.epoch, self.step), self.spec.steps_per_epoch
        schedule = self._schedule(stage)
        num_steps = schedule["num_steps"] or steps * training.epochs
        for epoch in range(training.epochs):
            self._advance(stage, epoch, began)
            fresh = self._fresh(stage, epoch, source)
            others = self._replayed(stage, epoch)
            rows = np.split(np.arange(len(fresh.ids)), steps)
            for k, own in enumerate(fresh.of(each) for each in rows):
                rate = learning_rate(schedule["first_step"] + epoch * steps + k, num_steps, training)
                self.engine.step(own if others is None else own.beside(others), rate)
        self._goto(training.epochs, began)
        self.look(stage.index, training.epochs, is_end=True)

    def _fresh(self, stage: Stage, epoch: int, source: int) -> Batch:
        """The strings of one epoch of an unrepeated stage."""
        material, number, epochs = _of_source(self.material, source), len(stage.strings), self.spec.training.epochs
        assert material is not None
        assert epochs is not None
        strings = draw_strings(
            material.source,
            length=self.spec.strings.length,
            num_strings=number,
            seed=self.spec.string_seed,
            stream="unrepeated",
            first=(stage.index * epochs + epoch) * number,
        )
        return _of(encode(list(strings), material.encoder), material, source)

    def _replayed(self, stage: Stage, epoch: int) -> Batch | None:
        """The strings of earlier stages that an epoch trains as well."""
        earlier = np.flatnonzero(self.learned > BEFORE)
        earlier = earlier[~np.isin(earlier, stage.strings)]
        number = num_replayed(self.curriculum.replay_share, len(earlier))
        if number == 0:
            return None
        rng = np.random.default_rng([_REPLAY_STREAM, self.spec.order_seed, stage.index, epoch])
        chosen = np.sort(rng.choice(earlier, size=number, replace=False))
        rows = [own_batch(self.material, [index], int(self.source[index])) for index in chosen.tolist()]
        batch = rows[0]
        for row in rows[1:]:
            batch = batch.beside(row)
        return batch

    def _schedule(self, stage: Stage) -> dict[str, int]:
        """Where the stage stands in the learning rate's schedule; one of its own has 0 steps behind it."""
        assert self.spec.training.epochs is not None
        steps = self.spec.training.epochs * self.spec.steps_per_epoch
        if self.curriculum.schedule == "stage":
            return {"first_step": 0, "num_steps": steps}
        return {"first_step": stage.index * steps, "num_steps": len(self.stages) * steps}

    def _advance(self, stage: Stage, epoch: int, began: tuple[int, int]) -> None:
        """Before an epoch trains on: looks, if it is one of the probe epochs within the stage."""
        self._goto(epoch, began)
        if 0 < epoch < (self.spec.training.epochs or 0) and epoch in self.spec.probes.epochs:
            self.look(stage.index, epoch, is_end=False)

    def _goto(self, stage_epoch: int, began: tuple[int, int]) -> None:
        self.epoch, self.step = began[0] + stage_epoch, began[1] + stage_epoch * self.spec.steps_per_epoch

    # --- looking -------------------------------------------------------------------------------------------------

    def _place(self, stage: int, stage_epoch: int, *, is_end: bool) -> Place:
        return Place(stage, self.epoch, stage_epoch, self.step, is_end)

    def _known(self, strings: Sequence[int], source: int) -> list[KnownString]:
        return [self.measurer.known[source][index] for index in strings]

    def look(self, stage: int, stage_epoch: int, *, is_end: bool, repeats_own: bool = False) -> None:
        """Asks for what the weights say of the strings of other stages, and whether they say the same of its own."""
        place = self._place(stage, stage_epoch, is_end=is_end)
        asked = self._asked(stage, is_end=is_end)
        by_source = tuple(tuple(int(each) for each in asked if self.source[each] == source) for source in (BASE, OTHER))
        question = SequenceQuestion(place, (by_source[0], by_source[1]))
        if repeats_own:
            own = self.stages[stage]
            question = replace(question, own=own.strings, own_source=OTHER if own.is_other else BASE)
        self.waiting.append(Event(place, time.monotonic(), look=self.prober.look(question, self.engine)))

    def _asked(self, stage: int, *, is_end: bool) -> list[int]:
        """The strings that are looked at in a stage, beside its own."""
        stated = self.spec.probes.retention
        ages = None if is_end and stated.stage_ends == "all" else stated.ages
        return strings_to_look_at(self.stages, stage, self.learned, ages=ages, num_future=stated.num_future)

    @property
    def is_over(self) -> bool:
        """Whether all stages were trained, and nothing waits any more."""
        return self.next_stage == len(self.stages) and not self.waiting

    # --- measuring -----------------------------------------------------------------------------------------------

    def end(self, stage: int) -> None:
        """Says that all of a stage was seen."""
        self.waiting.append(Event(self._place(stage, 0, is_end=True), time.monotonic(), ends=True))

    def measured(self, *, waits: bool) -> Iterator[Measurement]:
        """The stages all of whose looks are there; with `waits` all of them."""
        if not self.engine.is_main:
            self.waiting.clear()
        again: TokenScores | None = None
        while self.waiting and (waits or self._is_next_stage_ready()):
            event = self.waiting.popleft()
            if event.look is not None:
                answer: SequenceAnswer = event.look.result()
                again = answer.own
                self.measurer.add(answer.block)
            elif event.own is not None:
                self._measure_own(event, again)
            else:
                yield replace(self.measurer.close(event.place.stage, event.place.epoch), scored_s=event.at_s)

    def _is_next_stage_ready(self) -> bool:
        """Whether all looks up to the next end of a stage are there: a stage is measured as a whole."""
        for event in self.waiting:
            if event.ends:
                return True
            if event.look is not None and not event.look.is_ready():
                return False
        return False

    def _measure_own(self, event: Event, again: TokenScores | None) -> None:
        assert event.own is not None
        stage = self.stages[event.place.stage]
        source = OTHER if stage.is_other else BASE
        if event.place.is_end:
            check_second_scores(self.measurer.trial_id, event.place.epoch, event.own, again)
        part = recalled(event.own, self._known(stage.strings, source), stage.strings, source=source, is_held_out=False)
        self.measurer.add(event.place.block([part], is_own=True))
