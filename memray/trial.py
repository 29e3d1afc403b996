"""One trial in one process: from a spec to its measurements.

This is the whole laboratory in one call; it needs no cluster and no tracking server, so a trial can be run in a
debugger. Wherever a trial is placed, this is what runs.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import nn
from transformers import PreTrainedModel

from memray.accelerators import accelerator
from memray.encoding import Batch, Encoder, encode, make_encoder
from memray.finetune import Engine, TorchEngine, finetune, score_in_passes
from memray.measurement import KnownString, Measurement, Measurer
from memray.models import check_context, load_model, load_tokenizer
from memray.scoring import AlphabetIds, TokenScores
from memray.spec import ModelSpec, StopWhen, TrialSpec
from memray.strings import ALPHABETS, Stream, draw_strings

Weights = Mapping[str, ndarray]


class ModelShelf:
    """Keeps one model between trials, and resets it by copying its base weights back.

    Args:
        fetch: Where the weights of a pretrained model come from, if not from its files: a cluster hands them
            out through its object store, so that each machine reads them once.
    """

    def __init__(self, fetch: Callable[[ModelSpec], Weights] | None = None) -> None:
        self._fetch = fetch
        self._key: object = None
        self._model: PreTrainedModel | None = None
        self._base: dict[str, torch.Tensor] = {}

    def model(self, spec: TrialSpec) -> PreTrainedModel:
        """The model of a trial with its base weights, in fp32 on the CPU or wherever it was used before."""
        is_seeded = not spec.model.pretrained or spec.model.lora is not None
        key = (spec.model, spec.model_seed if is_seeded else None, spec.training.gradient_checkpointing)
        if key != self._key or self._model is None:
            self._model = None  # two models of the largest size may not fit side by side
            weights = self._fetch(spec.model) if self._fetch and spec.model.pretrained else None
            self._model = load_model(spec.model, seed=spec.model_seed, weights=weights)
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
    """The strings of a trial: as batches for the model, and with all that is known of them."""

    encoder: Encoder
    trained: Batch
    held_out: Batch | None
    known_trained: list[KnownString]
    known_held_out: list[KnownString]

    @property
    def symbol_ids(self) -> Int[ndarray, " alphabet"]:
        return self.encoder.symbol_ids


def known_strings(
    spec: TrialSpec, symbol_ids: Int[ndarray, " alphabet"], stream: Stream
) -> tuple[Int[ndarray, "strings length"], list[KnownString]]:
    """The trained or the held-out strings of a trial, as symbols and as what is known of them."""
    number = spec.strings.num_strings if stream == "trained" else spec.probes.num_held_out
    if number == 0:
        return np.zeros((0, spec.strings.length), dtype=np.int64), []
    source = spec.strings.source()
    strings = draw_strings(source, length=spec.strings.length, num_strings=number, seed=spec.string_seed, stream=stream)
    letters = ALPHABETS.get(spec.strings.alphabet)
    texts = [
        "".join(letters[k] for k in string) if letters else " ".join(str(symbol_ids[k]) for k in string)
        for string in strings
    ]
    has_bos = bool(spec.model.bos)
    return strings, [
        KnownString.of(string, source=source, symbol_ids=symbol_ids, text=text, bos=has_bos)
        for string, text in zip(strings, texts, strict=True)
    ]


def prepare(spec: TrialSpec) -> Material:
    """Draws and encodes the strings of a trial.

    Raises:
        ValueError: If a symbol of the alphabet is not exactly one ordinary token of the model.
    """
    encoder = make_encoder(
        load_tokenizer(spec.model),
        alphabet=spec.strings.alphabet,
        alphabet_size=spec.strings.alphabet_size,
        bos=bool(spec.model.bos),
        vocabulary_seed=spec.string_seed,
    )
    trained, known = known_strings(spec, encoder.symbol_ids, "trained")
    held_out, known_held_out = known_strings(spec, encoder.symbol_ids, "held_out")
    return Material(
        encoder=encoder,
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


def make_engine(spec: TrialSpec, model: nn.Module, alphabet: AlphabetIds, device: torch.device) -> Engine:
    """The engine that the spec names, around a model with base weights."""
    torch.manual_seed(spec.order_seed)  # dropout alone draws from it
    return TorchEngine(model.to(device), alphabet, spec.training, device, precision=spec.compute.precision or "fp32")


def run_trial(spec: TrialSpec, *, shelf: ModelShelf | None = None) -> Iterator[Measurement]:
    """Trains one trial and yields the measurement of every epoch, epoch 0 before training.

    The same spec on the same kind of device yields the same numbers to the last bit, in a fresh process or in one
    that has run other trials.

    Args:
        shelf: Keeps the model for the next trial; without one it is loaded anew.

    Raises:
        ValueError: If the device, the model or the alphabet is not to be had.
    """
    device = set_device(spec)
    material = prepare(spec)
    symbol_ids = torch.as_tensor(material.symbol_ids)
    marginal = torch.as_tensor(np.array(spec.strings.source().marginal), dtype=torch.float32)
    model = (shelf or ModelShelf()).model(spec)
    check_context(model, material.trained.ids.shape[1])
    engine = make_engine(spec, model, AlphabetIds(symbol_ids, marginal), device)
    return measure_while_training(spec, material, engine)


def measure_while_training(spec: TrialSpec, material: Material, engine: Engine) -> Iterator[Measurement]:
    """Trains the strings over an engine and measures every epoch."""
    measurer = Measurer(spec, material.known_trained, material.known_held_out)
    probed: dict[int, TokenScores] = {}
    kept: dict[int, Weights] = {}
    keep = spec.training.keep_weights

    def look(epoch: int) -> None:
        is_probe_epoch = epoch in spec.probes.epochs or epoch == spec.num_epochs
        if is_probe_epoch and material.held_out is not None and epoch not in probed:
            probed[epoch] = score_in_passes(engine, material.held_out)
        if is_probe_epoch and keep == "probe_epochs":
            kept[epoch] = engine.snapshot()

    stopper = Stopper(spec.training.stop_when, measurer) if spec.training.stop_when else None
    epochs = finetune(
        engine,
        material.trained,
        spec.training,
        order_seed=spec.order_seed,
        stop=stopper,
        dropout=spec.has_dropout,
        before_epoch=look,
    )
    for epoch, scores in epochs:
        is_last = epoch == spec.num_epochs or (stopper is not None and stopper.has_stopped)
        if is_last and material.held_out is not None and epoch not in probed:
            probed[epoch] = score_in_passes(engine, material.held_out)
        if is_last and keep != "none":
            kept[epoch] = engine.snapshot()
        measurement = measurer.measure(epoch, scores, probed.pop(epoch, None), is_last=is_last)
        yield replace(measurement, weights=kept.pop(epoch, None))


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
