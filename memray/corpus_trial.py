"""A trial on a corpus: fine-tunes on samples, and measures all of them at its probe epochs.

Training never scores a sample: whoever looks does, on the weights of a probe epoch.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy import ndarray
from torch import nn

from memray.embedding import Embeddings, embed, embedding_columns, encode
from memray.fact_ranks import ObjectScores, object_ranks, score_objects
from memray.finetune import Engine, share_of_passes, train_epoch
from memray.generation import Continuations, chosen_samples, generate
from memray.looks import Keeper, Look, Looker, Prober
from memray.measurement import Measurement
from memray.probes import FactsSpec, GenerationSpec
from memray.sample_measurement import SampleScores, measure_samples, num_match_of, sample_table
from memray.samples import NATIVE, Samples
from memray.spec import TrialSpec


class SampleAnswer(NamedTuple):
    """What a look at the samples showed.

    Attributes:
        scores: Of every sample, or of a share of them; None where a share has none.
        continuations: What was generated of some; None where nothing was asked for.
        embeddings: Of the same samples; None where they were not asked for.
        compared: By a sentence encoder, of all samples; None where none was asked.
        objects: How likely the objects of facts are; None where none was asked about.
    """

    scores: SampleScores | None
    continuations: Continuations | None = None
    embeddings: Embeddings | None = None
    compared: Embeddings | None = None
    objects: ObjectScores | None = None


@dataclass(frozen=True)
class SampleQuestion:
    """What is asked at a probe epoch: the scores of every sample, or of every so-manieth pass over them.

    Attributes:
        generates: Whether some are generated too, of whose match lengths all must be known: such a look is not shared.
        embeds: Whether the samples are embedded too.
        ranks: Whether the objects of facts are ranked too.
        share: Which of the shares,
        shares: of how many.
    """

    epoch: int
    generates: bool = False
    embeds: bool = False
    ranks: bool = False
    share: int = 0
    shares: int = 1

    @staticmethod
    def of(spec: TrialSpec, epoch: int) -> "SampleQuestion":
        """What a trial asks at one of its probe epochs."""

        def is_asked(stated: GenerationSpec | FactsSpec | None) -> bool:
            return stated is not None and (epoch in stated.epochs or epoch == spec.num_epochs)

        probes = spec.probes
        return SampleQuestion(epoch, generates=is_asked(probes.generation), embeds=probes.embeddings is not None,
                              ranks=is_asked(probes.facts))  # fmt: skip

    def split(self, number: int) -> "list[SampleQuestion]":
        if self.generates:
            return [self]
        return [replace(self, share=share, shares=number) for share in range(number)]

    def join(self, answers: Sequence[SampleAnswer]) -> SampleAnswer:
        scores = [answer.scores for answer in answers if answer.scores is not None]
        embeddings = [answer.embeddings for answer in answers if answer.embeddings is not None]
        objects = [answer.objects for answer in answers if answer.objects is not None]
        return SampleAnswer(
            scores=SampleScores.concatenate(scores),
            continuations=answers[0].continuations,
            embeddings=Embeddings.concatenate(embeddings) if embeddings else None,
            compared=answers[0].compared,
            objects=ObjectScores.concatenate(objects) if objects else None,
        )

    def answer(self, looker: Looker) -> SampleAnswer:
        spec, samples = looker.spec, looker.material
        assert isinstance(samples, Samples)
        own = share_of_passes(samples.scored, self.share, self.shares)
        scores = embeddings = compared = continuations = None
        if own is not None:
            scores = SampleScores.of(looker.score(samples.scored.of(own)), samples.order[own])
        objects = None
        if self.ranks:
            objects = score_objects(spec, samples, looker.score, share=self.share, shares=self.shares)
        if self.embeds and own is not None:
            with evaluated(looker) as model:
                embeddings = embed(model, samples, own, with_prefix=self.epoch == 0)
        encoder = spec.probes.embeddings.encoder if spec.probes.embeddings else None
        if self.embeds and encoder and self.epoch == 0 and self.share == 0:
            compared = encode(encoder, samples.known)
        if self.generates:
            assert scores is not None
            with evaluated(looker) as model:
                continuations = generated(spec, samples, scores, model, self.epoch)
        return SampleAnswer(scores, continuations, embeddings, compared, objects)


@contextmanager
def evaluated(looker: Looker) -> Iterator[nn.Module]:
    """The model of a looker in evaluation mode."""
    model = looker.model
    assert model is not None  # an engine of many devices looks at snapshots
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def generated(spec: TrialSpec, samples: Samples, scores: SampleScores, model: nn.Module, epoch: int) -> Continuations:
    """What a model says instead of some of the native samples."""
    stated = spec.probes.generation
    assert stated is not None
    native = sum(sample.role == NATIVE for sample in samples.known)
    num_match = num_match_of(scores, samples.known)
    chosen = chosen_samples(num_match[:native], stated.num_samples, seed=spec.string_seed, epoch=epoch)
    checked = np.arange(native)[: math.ceil(stated.checked_share * native)]
    return generate(model, samples.tokenizer, samples.known, num_match, chosen, checked)  # type: ignore[arg-type]


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
    probed = probe_epochs(spec)
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
            look = prober.look(SampleQuestion.of(spec, epoch), engine)
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
        is_due = keeper is not None and not is_last and any(engine.gather(keeper.is_due()))


def _measured(
    spec: TrialSpec, samples: Samples, waiting: deque[Waiting], engine: Engine, *, waits: bool
) -> Iterator[Measurement]:
    """What can be measured now; with `waits` all of it."""
    if not engine.is_main:
        waiting.clear()
    while waiting and (waits or waiting[0].look.is_ready()):
        own = waiting.popleft()
        measured = measure_answer(spec, samples, own.epoch, own.look.result())
        yield replace(measured, weights=own.weights or None, scored_s=own.at_s, num_trained=own.num_trained)


def measure_answer(spec: TrialSpec, samples: Samples, epoch: int, answer: SampleAnswer) -> Measurement:
    """The measurement of a probe epoch, from what a look at its weights showed."""
    assert answer.scores is not None
    is_first = epoch == min(probe_epochs(spec))
    beside: dict[str, pa.Array] = {}
    if answer.embeddings is not None:
        compared = (answer.compared or answer.embeddings) if epoch == 0 else None
        beside |= embedding_columns(samples.known, answer.embeddings, compared)
    if spec.probes.facts is not None:
        ranks = object_ranks(spec, samples.known, answer.objects) if answer.objects else {}
        own = [ranks.get(index) for index in range(len(samples.known))]
        beside["object_ranks"] = pa.array(own, type=pa.list_(pa.int32()))
    table = sample_table(epoch, answer.scores, samples.known, answer.continuations, with_text=is_first, beside=beside)
    return replace(measure_samples(spec, table), corpus={"sha256": samples.digest, **samples.report})


def probe_epochs(spec: TrialSpec) -> set[int]:
    """The epochs at which a trial on a corpus is measured."""
    return {epoch for epoch in spec.probes.epochs if epoch <= spec.num_epochs} | {spec.num_epochs}
