"""A trial on a corpus: fine-tunes on samples, and measures all of them at its probe epochs.

Training never scores a sample: whoever looks does, on the weights of a probe epoch.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from memray.finetune import Engine, scoring_passes, train_epoch
from memray.looks import Keeper, Look, Looker, Prober
from memray.measurement import Measurement
from memray.sample_measurement import SampleScores, measure_samples, sample_table
from memray.samples import Samples
from memray.spec import TrialSpec


@dataclass(frozen=True)
class SampleQuestion:
    """What is asked at a probe epoch: the scores of every sample, or of every so-manieth pass over them.

    Attributes:
        share: Which of the shares,
        shares: of how many.
    """

    epoch: int
    share: int = 0
    shares: int = 1

    def split(self, number: int) -> "list[SampleQuestion]":
        return [replace(self, share=share, shares=number) for share in range(number)]

    def join(self, answers: "Sequence[SampleScores | None]") -> SampleScores:
        return SampleScores.concatenate([answer for answer in answers if answer is not None])

    def answer(self, looker: Looker) -> SampleScores | None:
        """The scores of its share; None where there are fewer passes than shares."""
        samples = looker.material
        assert isinstance(samples, Samples)
        rows, begin = [], 0
        for index, one in enumerate(scoring_passes(samples.scored)):
            if index % self.shares == self.share:
                rows.append(np.arange(begin, begin + len(one.ids)))
            begin += len(one.ids)
        if not rows:
            return None
        own = np.concatenate(rows)
        return SampleScores.of(looker.score(samples.scored.of(own)), samples.order[own])


class Waiting(NamedTuple):
    """A probe epoch whose look is under way."""

    epoch: int
    at_s: float
    look: Look
    weights: Mapping[str, ndarray] | None
    num_trained: int


def measure_corpus(
    spec: TrialSpec, samples: Samples, engine: Engine, *, prober: Prober, keeper: Keeper | None = None
) -> Iterator[Measurement]:
    """Trains the samples over an engine and measures its probe epochs, those before a checkpoint excepted.

    Looks may take their time elsewhere: measurements wait for them, in order, and training does not.
    """
    checkpoint = keeper.newest() if keeper else None
    if checkpoint:
        engine.load(checkpoint.folder)
    training, epochs = spec.training, spec.num_epochs
    probed = {epoch for epoch in spec.probes.epochs if epoch <= epochs} | {epochs}
    num_targets = int(samples.trained.is_target.sum())
    first = checkpoint.epoch if checkpoint else 0
    measured_before = max((epoch for epoch in probed if epoch < first), default=0)
    waiting: deque[Waiting] = deque()
    is_due = False
    for epoch in range(first, epochs + 1):
        is_last = epoch == epochs
        if is_due and keeper and not is_last:
            yield from _measured(spec, samples, waiting, engine, waits=True)
            keeper.keep(epoch, engine)
        if epoch in probed:
            keeps = spec.training.keep_weights
            is_kept = keeps == "probe_epochs" or (keeps == "final" and is_last)
            weights = engine.snapshot() if is_kept else None
            look = prober.look(SampleQuestion(epoch), engine)
            waiting.append(Waiting(epoch, time.monotonic(), look, weights, (epoch - measured_before) * num_targets))
            measured_before = epoch
        yield from _measured(spec, samples, waiting, engine, waits=is_last)
        if not is_last:
            steps = spec.steps_per_epoch
            train_epoch(
                engine,
                samples.trained,
                training,
                epoch,
                order_seed=spec.order_seed,
                done=epoch * steps,
                num_steps=epochs * steps,
            )
        is_due = keeper is not None and not is_last and engine.gather(keeper.is_due())[0]


def _measured(
    spec: TrialSpec, samples: Samples, waiting: deque[Waiting], engine: Engine, *, waits: bool
) -> Iterator[Measurement]:
    """What can be measured now; with `waits` all of it."""
    if not engine.is_main:
        waiting.clear()
    first_probed = min(spec.probes.epochs, default=spec.num_epochs)
    while waiting and (waits or waiting[0].look.is_ready()):
        own = waiting.popleft()
        table = sample_table(own.epoch, own.look.result(), samples.known, with_text=own.epoch == first_probed)
        measured = measure_samples(spec, table, own.at_s, own.num_trained)
        corpus = {"sha256": samples.digest, **samples.report}
        yield replace(measured, weights=own.weights or None, corpus=corpus)
