"""Probe actors: they score snapshots of a trial's weights while it trains on.

A trial puts the weights of a probe epoch into the object store and goes on; an actor on a device of its own loads
them into a model of the same make and scores the held-out strings, and the trained ones once more, in the batches in
which the trainer scored them: the trial compares the two to the last bit.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from numpy import ndarray
from ray.exceptions import RayActorError

from memray.cluster import metrics
from memray.encoding import Batch
from memray.finetune import Engine, as_tensor, lower_weights, scoring_passes
from memray.looks import Look, Looker, Question, Ready, give_memory_back
from memray.material import Material
from memray.models import load_model
from memray.samples import Samples
from memray.scoring import TokenScores, score
from memray.spec import TrialSpec
from memray.trial import prepare_trial, set_device

# Snapshots of one trial that exist at once: as many as fit into this, and two at least. Probe epochs come thick and
# fast at the start, so that small models queue up there; a trial that is looked at faster than it is scored waits.
IN_FLIGHT_GIB = 0.5
IN_FLIGHT_AT_LEAST = 2


def look(spec_json: str, question: Question, weights: Mapping[str, ndarray]) -> tuple[Any, float]:
    """In an actor: what the weights of an epoch say, and the time at which that was known (seconds since 1970).

    The strings and the model of the last trial are kept.
    """
    answer = look_at_snapshot(prepared(spec_json), question, weights)
    give_memory_back()
    return answer, time.time()


@dataclass(frozen=True)
class Prepared:
    """What a look at a trial needs beside its weights."""

    spec: TrialSpec
    device: torch.device
    material: Material | Samples
    model: torch.nn.Module


@functools.lru_cache(maxsize=1)
def prepared(spec_json: str) -> Prepared:
    """A trial's strings, and a model of its make to load snapshots into; the last one is kept."""
    spec = TrialSpec.model_validate_json(spec_json)
    device = set_device(spec)
    # The snapshot has all weights: none are read from disk.
    model = load_model(spec.model.model_copy(update={"pretrained": False}), seed=spec.model_seed).eval()
    torch.nn.Module.to(model, device)
    if spec.compute.precision == "bf16":
        lower_weights(model)
    return Prepared(spec, device, prepare_trial(spec), model)


def look_at_snapshot(own: Prepared, question: Question, weights: Mapping[str, ndarray]) -> Any:
    """The answer of a snapshot to a question."""
    model = own.model
    dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
    model.load_state_dict({name: as_tensor(array, dtypes[name]) for name, array in weights.items()})
    alphabet = own.material.alphabet.to(own.device)

    def repeat(batches: Sequence[Batch]) -> TokenScores:
        return TokenScores.concatenate([score(model, batch.to(own.device), alphabet) for batch in batches])

    looker = Looker(
        spec=own.spec,
        material=own.material,
        score=lambda batch: repeat(scoring_passes(batch)),
        repeat=repeat,
        model=model,
    )
    with linear_of(own.spec, own.device):
        return question.answer(looker)


@contextlib.contextmanager
def linear_of(spec: TrialSpec, device: torch.device) -> Iterator[None]:
    """Matrix products as the trainer computes them: ZeRO-3 has its own, which rounds the bias apart."""
    if spec.compute.zero_stage != 3:
        yield
        return
    os.environ["DS_ACCELERATOR"] = device.type
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    usual = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = usual


@dataclass(frozen=True)
class SnapshotProber:
    """Looks at snapshots in the main one of several processes that train, while training waits."""

    spec_json: str

    def look(self, question: Question, engine: Engine) -> Look:
        snapshot = engine.snapshot()
        if not engine.is_main:
            return Ready(None)
        return Ready(look_at_snapshot(prepared(self.spec_json), question, snapshot))


@dataclass
class ActorProber:
    """Hands a trial's snapshots to probe actors, in turn, a few at a time; a question that can be shared, to all.

    Attributes:
        seconds: From each snapshot to its result, as results come in, by the clocks of the two nodes.
        waited_s: How long training waited because too many snapshots were on their way.
        drained_s: How long it waited for answers, before a checkpoint and at the end.
        num_looks: How many looks, or shares of them, each actor was given.
        num_own: How many of them the trial answered in the place of an actor that has ended.
    """

    spec_json: str
    actors: Sequence[Any]
    seconds: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    drained_s: float = 0.0
    in_flight: list["RemoteLook"] = field(default_factory=list)
    num_looks: list[int] = field(default_factory=list)
    num_own: int = 0

    def __post_init__(self) -> None:
        self.drop_scored()  # of the process's last trial, which may have ended in the middle

    def look(self, question: Question, engine: Engine) -> Look:
        began_s = time.time()
        snapshot = engine.snapshot()
        if not engine.is_main:
            return Ready(None)
        self._make_room(sum(weight.nbytes for weight in snapshot.values()) / 2**30)
        kept = ray.put(snapshot)  # once, however many look at it
        shares = question.split(len(self.actors))
        look = RemoteLook(self, question, shares, [self._ask(share, kept) for share in shares], began_s, kept)
        self.in_flight.append(look)
        self.drop_scored()
        return look

    def _ask(self, question: Question, snapshot: Any) -> Any:
        self.num_looks = self.num_looks or [0] * len(self.actors)
        turn = sum(self.num_looks) % len(self.actors)
        self.num_looks[turn] += 1
        return self.actors[turn].look.remote(self.spec_json, question, snapshot)

    def _make_room(self, gib: float) -> None:
        began_s = time.monotonic()
        while len(self.in_flight) >= max(IN_FLIGHT_AT_LEAST, IN_FLIGHT_GIB // gib):
            if pending := [reference for look in self.in_flight for reference in look.pending()]:
                ray.wait(pending, num_returns=1)  # which refuses an empty list: all may be answered by now
            self.drop_scored()
        self.waited_s += time.monotonic() - began_s

    def drop_scored(self) -> None:
        """Takes the answers that are there, counts again what is in flight, and tells of it."""
        for look in self.in_flight:
            if not look.pending():
                look.take()
        self.in_flight = [look for look in self.in_flight if not look.is_over]
        metrics.tell(metrics.IN_FLIGHT, len(self.in_flight), {})

    def summary(self) -> dict[str, Any]:
        """For the end of a trial: how long its looks took, how long training waited for them, and who took them."""
        if not self.seconds:
            return {}
        return {
            "probe_s": round(float(np.median(self.seconds)), 3),
            "probe_wait_s": round(self.waited_s, 3),
            "probe_drain_s": round(self.drained_s, 3),
            "probe_looks": self.num_looks,
            "probe_looks_own": self.num_own,
        }


@dataclass
class RemoteLook:
    """A look by an actor, or by several that have a share of it each."""

    prober: ActorProber
    question: Question
    shares: Sequence[Question]
    references: list[Any]
    began_s: float
    snapshot: Any
    answers: list[tuple[Any, float]] | None = None

    def pending(self) -> list[Any]:
        """Shares that nobody has answered yet."""
        return ray.wait(self.references, num_returns=len(self.references), timeout=0)[1]

    @property
    def is_over(self) -> bool:
        return self.answers is not None

    def is_ready(self) -> bool:
        return self.is_over or not self.pending()

    def take(self) -> None:
        """Waits for the answers, and lets go of the snapshot."""
        if self.answers is None:
            self.answers = [self._answer(*each) for each in zip(self.shares, self.references, strict=True)]
            self.snapshot = None

    def _answer(self, share: Question, reference: Any) -> tuple[Any, float]:
        try:
            return ray.get(reference)
        except RayActorError:  # its node is lost, or `ProbePool.give_up` has ended it
            self.prober.num_own += 1
            return look(self.prober.spec_json, share, ray.get(self.snapshot))

    def result(self) -> Any:
        began_s = time.monotonic()
        self.take()
        self.prober.drained_s += time.monotonic() - began_s
        self.prober.drop_scored()
        assert self.answers is not None
        self.prober.seconds.append(max(ended_s for _, ended_s in self.answers) - self.began_s)
        return self.question.join([answer for answer, _ in self.answers])
