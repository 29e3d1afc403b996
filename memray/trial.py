"""One trial in one process: from a spec to its measurements.

This is the whole laboratory in one call; it needs no cluster and no tracking server, so a trial can be run in a
debugger. Wherever a trial is placed, this is what runs.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from numpy import ndarray
from torch import nn
from transformers import PreTrainedModel

from memray.accelerators import accelerator
from memray.corpus_trial import measure_corpus
from memray.fact_ranks import check_facts
from memray.finetune import Engine, TorchEngine, finetune
from memray.looks import EpochQuestion, Keeper, Look, Looked, OwnProber, Prober, check_second_scores, has_context
from memray.material import Material, prepare
from memray.measurement import Measurement, Measurer, Stopper, read_scores
from memray.models import check_context, freeze, load_model
from memray.pretraining import pretrain_in_context
from memray.samples import Samples, prepare_samples
from memray.scoring import AlphabetIds, TokenScores
from memray.sequence import measure_sequence
from memray.spec import ModelSpec, TrialSpec

Weights = Mapping[str, ndarray]
CPU = torch.device("cpu")


class ModelShelf:
    """Keeps one model between trials, and resets it by copying its base weights back.

    Args:
        fetch: Where the weights of a pretrained model come from, if not from its files: a cluster hands them
            out through its object store, so that each machine reads them once.
        keeps_model: Whether the next trial may want the model too; if not, no copy of its weights is kept.
    """

    def __init__(self, fetch: Callable[[ModelSpec], Weights] | None = None, *, keeps_model: bool = True) -> None:
        self._fetch = fetch
        self._keeps_model = keeps_model
        self._key: object = None
        self._model: PreTrainedModel | None = None
        self._base: dict[str, torch.Tensor] = {}

    def model(self, spec: TrialSpec, device: torch.device = CPU) -> PreTrainedModel:
        """The model of a trial with its base weights, in fp32 on the CPU or wherever it was used before.

        Args:
            device: Where it is pre-trained, if the spec asks for that.
        """
        is_seeded = not spec.model.pretrained or spec.model.lora is not None or spec.model.in_context.steps > 0
        key = (spec.model, spec.model_seed if is_seeded else None, spec.training.gradient_checkpointing)
        if key != self._key or self._model is None:
            self._model = None  # two models of the largest size may not fit side by side
            weights = self._fetch(spec.model) if self._fetch and spec.model.pretrained else None
            self._model = load_model(spec.model, seed=spec.model_seed, weights=weights)
            pretrain_in_context(self._model, spec.model, seed=spec.model_seed, device=device)
            if not self._keeps_model:
                return self._model
            self._base = {name: weight.detach().cpu().clone() for name, weight in self._model.named_parameters()}
            self._key = key
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                # A trial at bf16 left bf16 weights behind.
                weight.data = self._base[name].to(weight.device, copy=True)
                weight.grad = None
        return self._model


def set_device(spec: TrialSpec) -> torch.device:
    """The trial's device, with threads and algorithms set so that the same spec gives the same bits.

    Raises:
        ValueError: If this machine has no such device. There is no silent fall-back: it would be another trial.
    """
    torch.set_num_threads(spec.compute.threads)
    row = accelerator(spec.compute.accelerator)
    device = torch.device(row.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"compute.accelerator={spec.compute.accelerator!r} needs a CUDA device, but this machine has none; "
                "run the trial where there is one, or set compute.accelerator='cpu'"
            )
        if row.device_name not in torch.cuda.get_device_name():
            raise ValueError(
                f"compute.accelerator={row.name!r} must be the device that the trial runs on, but this machine has "
                f"{torch.cuda.get_device_name()}: its numbers would stand under the wrong id; name it in the spec"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    return device


def make_torch_engine(spec: TrialSpec, model: nn.Module, alphabet: AlphabetIds, device: torch.device) -> Engine:
    """Plain torch around a model with base weights.

    Raises:
        ValueError: If the spec names an engine of many devices.
    """
    if spec.compute.engine != "torch":
        raise ValueError(
            f"one process runs trials of engine 'torch', but trial {spec.trial_id()} is one of "
            f"{spec.compute.engine!r} on {spec.compute.workers} workers; `run` starts them"
        )
    torch.manual_seed(spec.order_seed)  # dropout alone draws from it
    return TorchEngine(model.to(device), alphabet, spec.training, device, precision=spec.compute.precision or "fp32")


def prepare_trial(spec: TrialSpec) -> Material | Samples:
    """What a trial trains: strings, or the samples of its corpus.

    Raises:
        ValueError: If it is not to be had.
    """
    if spec.corpus is None:
        return prepare(spec)
    samples = prepare_samples(spec)
    check_facts(spec, samples)
    return samples


# --- one trial -------------------------------------------------------------------------------------------------


def run_trial(
    spec: TrialSpec,
    *,
    shelf: ModelShelf | None = None,
    make_engine: Callable[[TrialSpec, nn.Module, AlphabetIds, torch.device], Engine] = make_torch_engine,
    prober: Prober | None = None,
    keeper: Keeper | None = None,
) -> Iterator[Measurement]:
    """Trains one trial and yields the measurement of every epoch, epoch 0 before training.

    The same spec on the same kind of device yields the same numbers to the last bit, in a fresh process or in one
    that has run other trials, in one go or continued from a checkpoint. Where an engine has several processes, the
    main one yields.

    Args:
        shelf: Keeps the model for the next trial; without one it is loaded anew.
        make_engine: Makes the engine around the model with its base weights.
        prober: Looks at probe epochs; without one the engine itself does, while training waits.
        keeper: Keeps checkpoints, and has the one to continue from.

    Raises:
        ValueError: If the device, the model or the alphabet is not to be had.
    """
    device = set_device(spec)
    material = prepare_trial(spec)
    model = (shelf or ModelShelf()).model(spec, device)
    check_context(model, material.trained.ids.shape[1])
    if spec.model.lora is None:
        freeze(model, spec.training.frozen_blocks, embeddings=spec.training.frozen_embeddings)
    engine = make_engine(spec, model, material.alphabet, device)
    prober = prober or OwnProber(spec, material, model if spec.compute.engine == "torch" else None)
    if isinstance(material, Samples):
        return measure_corpus(spec, material, engine, prober=prober, keeper=keeper)
    if spec.curriculum is not None:
        return measure_sequence(spec, material, engine, prober=prober, keeper=keeper)
    return measure_while_training(spec, material, engine, prober=prober, keeper=keeper)


def measure_while_training(
    spec: TrialSpec, material: Material, engine: Engine, *, prober: Prober, keeper: Keeper | None = None
) -> Iterator[Measurement]:
    """Trains the strings over an engine and measures every epoch, those before a checkpoint excepted.

    Looks may take their time elsewhere: measurements wait for them, in order, and training does not.
    """
    measurer = Measurer(spec, material.known_trained, material.known_held_out)
    rule = spec.training.stop_when
    stopper = Stopper(rule, material.known_trained) if rule else None
    checkpoint = keeper.newest() if keeper else None
    if checkpoint:
        engine.load(checkpoint.folder)
        for epoch, trained, held_out in read_scores(checkpoint.tokens, checkpoint.strings):
            measurer.measure(epoch, trained, held_out)
            if stopper:
                stopper(trained)
    watch = Watch(spec, engine, prober, keeper)
    epochs = finetune(
        engine,
        material.trained,
        spec.training,
        order_seed=spec.order_seed,
        stop=stopper,
        dropout=spec.has_dropout,
        before_epoch=watch.before_epoch,
        first_epoch=checkpoint.epoch if checkpoint else 0,
    )
    for epoch, scores in epochs:
        is_last = epoch == spec.num_epochs or (stopper is not None and stopper.has_stopped)
        for scored in watch.scored(epoch, scores, is_last=is_last):
            if engine.is_main:
                yield scored.measure(measurer)
    assert not watch.waiting  # the last epoch lets none wait


@dataclass(frozen=True)
class Scored:
    """One epoch that waits to be measured; `scored_s` is when it was scored, by a clock of this process."""

    epoch: int
    scored_s: float
    trained: TokenScores
    look: Look | None
    weights: Weights | None
    is_last: bool

    def measure(self, measurer: Measurer) -> Measurement:
        looked = self.look.result() if self.look else Looked(None)
        check_second_scores(measurer.trial_id, self.epoch, self.trained, looked.trained)
        measurement = measurer.measure(
            self.epoch,
            self.trained,
            looked.held_out,
            context=looked.context,
            is_last=self.is_last,
            weights=self.weights or None,
        )
        return replace(measurement, scored_s=self.scored_s)


class Watch:
    """Takes looks and checkpoints while an engine trains, and hands scored epochs on once their look is there."""

    def __init__(self, spec: TrialSpec, engine: Engine, prober: Prober, keeper: Keeper | None) -> None:
        self.spec = spec
        self.engine = engine
        self.prober = prober
        self.keeper = keeper
        self.looks: dict[int, Look] = {}
        self.with_context: set[int] = set()
        self.weights: dict[int, Weights] = {}
        self.waiting: deque[Scored] = deque()
        self.is_checkpoint_due = False

    def before_epoch(self, epoch: int) -> None:
        """The weights are those of the epoch."""
        if self.is_checkpoint_due and self.keeper:
            self.keeper.keep(epoch, self.engine)
            self.is_checkpoint_due = False
        if epoch in self.spec.probes.epochs or epoch == self.spec.num_epochs:
            self._look(epoch, is_last=epoch == self.spec.num_epochs)

    def _look(self, epoch: int, *, is_last: bool) -> None:
        with_context = has_context(self.spec, epoch, is_last=is_last)
        # Whether an epoch is the last may be known only after it was looked at.
        if epoch not in self.looks or (with_context and epoch not in self.with_context):
            self.looks[epoch] = self.prober.look(EpochQuestion(epoch, with_context), self.engine)
            self.with_context |= {epoch} if with_context else set()
        keep = self.spec.training.keep_weights
        if epoch not in self.weights and (keep == "probe_epochs" or (keep == "final" and is_last)):
            self.weights[epoch] = self.engine.snapshot()

    def scored(self, epoch: int, scores: TokenScores, *, is_last: bool) -> Iterator[Scored]:
        """What can be measured now that the epoch is scored: all of it at the end, and before a checkpoint."""
        if is_last:
            self._look(epoch, is_last=True)
        look, weights = self.looks.pop(epoch, None), self.weights.pop(epoch, None)
        self.waiting.append(Scored(epoch, time.monotonic(), scores, look, weights, is_last))
        if self.keeper and not is_last:
            self.is_checkpoint_due = any(self.engine.gather(self.keeper.is_due()))
        while self.waiting:
            look = self.waiting[0].look
            if look is not None and not (is_last or self.is_checkpoint_due or look.is_ready()):
                return
            yield self.waiting.popleft()
