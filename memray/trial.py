"""One trial in one process: from a spec to its measurements.

This is the whole laboratory in one call; it needs no cluster and no tracking server, so a trial can be run in a
debugger. Wherever a trial is placed, this is what runs.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import nn
from transformers import PreTrainedModel

from memray.accelerators import accelerator
from memray.context import probe_context
from memray.encoding import Batch, Encoder, encode, make_encoder, tokenise
from memray.finetune import Engine, TorchEngine, finetune, parts, scoring_passes
from memray.measurement import KnownString, Measurement, Measurer, read_scores
from memray.measures.prefix import ContextScores
from memray.models import check_context, freeze_blocks, load_model, load_tokenizer
from memray.pretraining import pretrain_in_context
from memray.replacements import ordinary_ids_outside
from memray.scoring import AlphabetIds, TokenScores
from memray.spec import ModelSpec, StopWhen, TrialSpec
from memray.strings import ALPHABETS, Source, Stream, TextSource, draw_strings

Weights = Mapping[str, ndarray]
CPU = torch.device("cpu")
STREAMS: tuple[Stream, ...] = get_args(Stream)


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


@dataclass(frozen=True)
class Material:
    """The strings of a trial: as symbols, as batches for the model, and with all that is known of them.

    Attributes:
        outside_ids: Ordinary tokens that stand for no symbol.
    """

    source: Source
    encoder: Encoder
    outside_ids: Int[ndarray, " outside"]
    strings: Mapping[Stream, Int[ndarray, "strings length"]]
    trained: Batch
    held_out: Batch | None
    known_trained: list[KnownString]
    known_held_out: list[KnownString]

    @property
    def symbol_ids(self) -> Int[ndarray, " alphabet"]:
        return self.encoder.symbol_ids

    @property
    def alphabet(self) -> AlphabetIds:
        """The alphabet as the model sees it, on the CPU."""
        marginal = torch.as_tensor(np.array(self.source.marginal), dtype=torch.float32)
        return AlphabetIds(torch.as_tensor(self.symbol_ids), marginal)


def source_of(spec: TrialSpec) -> Source:
    """The source of a trial's strings. A text is one only in the tokens of the trial's model.

    Raises:
        ValueError: If the text is not to be had, or too short.
    """
    if spec.strings.kind != "text":
        return spec.source()
    source = tokenise(load_tokenizer(spec.model), spec.strings.text())
    num_held_out, found = spec.probes.num_held_out, len(source.symbols)
    if context := spec.probes.context:  # whose other strings are passages that are never trained
        num_held_out = max(num_held_out, context.num_held_out + context.redraws)
    num_strings = spec.strings.num_strings + num_held_out
    if (needed := num_strings * spec.strings.length) > found:
        raise ValueError(
            f"the text in {spec.strings.path} must have at least {needed} tokens, {spec.strings.length} for each of "
            f"{num_strings} trained and held-out strings, but it has {found} of this model's (and "
            f"{source.num_left_out} special or unknown ones); take a longer text, or fewer or shorter strings"
        )
    return source


def known_strings(
    spec: TrialSpec, source: Source, symbol_ids: Int[ndarray, " alphabet"], stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]]:
    """The trained or the held-out strings of a trial, as symbols and as what is known of them.

    Args:
        source: The trial's, of :func:`source_of`.
        symbol_ids: Token id of each symbol.
    """
    number = spec.strings.num_strings if stream == "trained" else spec.probes.num_held_out
    if number == 0:
        return np.zeros((0, spec.strings.length), dtype=np.int64), []
    strings = draw_strings(source, length=spec.strings.length, num_strings=number, seed=spec.string_seed, stream=stream)
    if isinstance(source, TextSource):
        names, between = source.names, " "
    elif letters := ALPHABETS.get(spec.strings.alphabet):
        names, between = letters, ""
    else:
        names, between = [str(symbol_id) for symbol_id in symbol_ids], " "
    texts = [between.join(names[k] for k in string) for string in strings]
    has_bos = bool(spec.model.bos)
    return strings, [
        KnownString.of(string, source=source, symbol_ids=symbol_ids, text=text, bos=has_bos)
        for string, text in zip(strings, texts, strict=True)
    ]


def prepare(spec: TrialSpec) -> Material:
    """Draws and encodes the strings of a trial.

    Raises:
        ValueError: If a symbol of the alphabet is not exactly one ordinary token of the model, or a text is not to be
            had or too short.
    """
    source, tokenizer, bos = source_of(spec), load_tokenizer(spec.model), bool(spec.model.bos)
    if isinstance(source, TextSource):
        encoder = Encoder.of(tokenizer, source.symbol_ids, bos=bos)
    else:
        encoder = make_encoder(
            tokenizer,
            alphabet=spec.strings.alphabet,
            alphabet_size=spec.strings.alphabet_size,
            bos=bos,
            vocabulary_seed=spec.string_seed,
        )
    trained, known = known_strings(spec, source, encoder.symbol_ids, "trained")
    held_out, known_held_out = known_strings(spec, source, encoder.symbol_ids, "held_out")
    return Material(
        source=source,
        encoder=encoder,
        outside_ids=ordinary_ids_outside(tokenizer, encoder.symbol_ids),
        strings={"trained": trained, "held_out": held_out},
        trained=encode(list(trained), encoder),
        held_out=encode(list(held_out), encoder) if len(held_out) else None,
        known_trained=known,
        known_held_out=known_held_out,
    )


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


def forwards_of_epoch(spec: TrialSpec, trained: Batch, epoch: int) -> list[Batch]:
    """The batches in which the trainer scores its strings at an epoch: whoever repeats them gets the same bits."""
    if spec.steps_per_epoch > 1 or spec.has_dropout or epoch == spec.num_epochs:
        return scoring_passes(trained)
    shares = parts(trained, spec.strings_per_worker)
    return [part for share in shares for part in parts(share, spec.training.strings_per_forward or len(share.ids))]


# --- looks: probes of the weights of an epoch ------------------------------------------------------------------


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


@runtime_checkable
class Look(Protocol):
    """A look that may still be under way."""

    def is_ready(self) -> bool: ...

    def result(self) -> Looked: ...


@runtime_checkable
class Prober(Protocol):
    """Who looks at the weights of probe epochs; called on every rank, because reading weights is collective."""

    def look(self, epoch: int, engine: Engine, *, with_context: bool) -> Look: ...


@dataclass(frozen=True)
class Ready:
    """A look that is over."""

    looked: Looked

    def is_ready(self) -> bool:
        return True

    def result(self) -> Looked:
        return self.looked


@dataclass(frozen=True)
class OwnProber:
    """Looks with the trial's own engine, while training waits.

    Attributes:
        model: The engine's model, where one process has it whole; without it no context can be probed.
    """

    spec: TrialSpec
    material: Material
    model: nn.Module | None

    def look(self, epoch: int, engine: Engine, *, with_context: bool) -> Look:
        held_out = self.material.held_out
        scores = None if held_out is None else engine.score(held_out)
        if not with_context:
            return Ready(Looked(scores))
        assert self.model is not None  # an engine of many devices looks at snapshots
        return Ready(Looked(scores, context=look_at_context(self.spec, self.material, self.model)))


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


# --- checkpoints -----------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """Where an earlier attempt at a trial had come to.

    Attributes:
        epoch: The epoch whose weights the engine's files hold.
        folder: Those files.
        tokens: The per-token records of all epochs before it,
        strings: and the per-string ones.
    """

    epoch: int
    folder: Path
    tokens: pa.Table
    strings: pa.Table


@runtime_checkable
class Keeper(Protocol):
    """Who keeps checkpoints of a trial; called on every rank."""

    def newest(self) -> Checkpoint | None:
        """What to continue from."""
        ...

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint; the main process's answer counts."""
        ...

    def keep(self, epoch: int, engine: Engine) -> None:
        """Keeps the engine's state; every measurement of an earlier epoch was handed on before."""
        ...


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
    material = prepare(spec)
    model = (shelf or ModelShelf()).model(spec, device)
    check_context(model, material.trained.ids.shape[1])
    if spec.model.lora is None:
        freeze_blocks(model, spec.training.frozen_blocks)
    engine = make_engine(spec, model, material.alphabet, device)
    own = OwnProber(spec, material, model if spec.compute.engine == "torch" else None)
    return measure_while_training(spec, material, engine, prober=prober or own, keeper=keeper)


def measure_while_training(
    spec: TrialSpec, material: Material, engine: Engine, *, prober: Prober, keeper: Keeper | None = None
) -> Iterator[Measurement]:
    """Trains the strings over an engine and measures every epoch, those before a checkpoint excepted.

    Looks may take their time elsewhere: measurements wait for them, in order, and training does not.
    """
    measurer = Measurer(spec, material.known_trained, material.known_held_out)
    stopper = Stopper(spec.training.stop_when, measurer) if spec.training.stop_when else None
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
        if looked.trained is not None and not looked.trained.is_identical_to(self.trained):
            raise RuntimeError(
                f"a probe's scores must equal the trainer's to the last bit, but at epoch {self.epoch} of trial "
                f"{measurer.trial_id} they differ: the two ran on different devices or versions, or the snapshot is "
                "not what was trained"
            )
        measurement = measurer.measure(
            self.epoch,
            self.trained,
            looked.held_out,
            context=looked.context,
            is_last=self.is_last,
            weights=self.weights or None,
        )
        return replace(measurement, scored_s=self.scored_s)


def has_context(spec: TrialSpec, epoch: int, *, is_last: bool) -> bool:
    """Whether the context is probed at an epoch."""
    return spec.probes.context is not None and (is_last or epoch in spec.probes.context.epochs)


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
            self.looks[epoch] = self.prober.look(epoch, self.engine, with_context=with_context)
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
            self.is_checkpoint_due = self.engine.gather(self.keeper.is_due())[0]
        while self.waiting:
            look = self.waiting[0].look
            if look is not None and not (is_last or self.is_checkpoint_due or look.is_ready()):
                return
            yield self.waiting.popleft()


class Stopper:
    """Decides, from each epoch's scores, whether the criterion has held for long enough."""

    def __init__(self, rule: StopWhen, measurer: Measurer) -> None:
        self.rule = rule
        self.measurer = measurer
        self.num_met = 0

    @property
    def has_stopped(self) -> bool:
        return self.num_met >= self.rule.epochs

    def __call__(self, scores: TokenScores) -> bool:
        value = self.measurer.trained_metric(self.rule.metric, scores)
        self.num_met = self.num_met + 1 if value >= self.rule.at_least else 0
        return self.has_stopped
