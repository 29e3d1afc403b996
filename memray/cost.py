"""What a trial will cost: floating-point operations, peak memory, seconds. Estimates, before anything is loaded.

The operations are counted (every matrix product, causal attention at half its square), the memory is summed from what
a step keeps alive, the seconds follow from a share of the peak rate that training steps of this kind reach and a fixed
overhead a layer. Tests hold the operations to torch's own counter and the memory to a measured peak. Of a corpus each
sample is taken at its longest: how many tokens it has, a tokenizer alone knows. A sliding window is counted as none: it
is made by a mask, and what a mask hides is computed all the same, so that it saves nothing (a window shorter than the
string even costs the whole square, of which half is counted).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memray import families
from memray.accelerators import Accelerator, accelerator
from memray.curriculum import BEFORE, num_replayed, strings_to_look_at
from memray.generators.facts import NUM_OBJECTS, NUM_TEMPLATES
from memray.probes import context_cost_tokens
from memray.spec import ModelSpec, TrialSpec

# A process with torch and transformers, before any model: 0.43 GiB was measured with torch's wheels for the CPU, the
# rest is for Ray's worker and for what the allocator holds back. On an accelerator, its context and kernels take
# about as much.
PROCESS_GIB = 0.6
# Elements that a block keeps for its backward pass, in units of the hidden size: norms, q, k, v and their rotated
# copies, the attention's output, twice the feed-forward width of four. Measured: OPT 15, Pythia 19, Llama 27, Phi and
# GPT-2, whose activation function keeps its steps, 35.
SAVED_PER_BLOCK = 30
# Tokens of a scoring pass (it keeps nothing for a backward pass), and logits of a chunk, as in `finetune` and
# `scoring`; a plan does not import them, because they import torch.
TOKENS_PER_SCORING_PASS = 4096
LOGITS_PER_CHUNK = 2**24
# Copies of a chunk of fp32 logits that are alive at once: logits, log-probabilities, gradient, sort keys.
LOGIT_COPIES = 4
# Elements of the buckets in which ZeRO reduces gradients and gathers weights, as the engine configures it.
BUCKET = 50_000_000
# DeepSpeed's own: elements of the message in which stage 0 reduces gradients, and of the weights that stage 3 keeps
# gathered because it will read them again. A smaller model is held whole by each worker.
MESSAGE = 500_000_000
LIVE = 1_000_000_000
# Bytes a second between devices, one way: gloo on one machine; NVLink or InfiniBand, cautiously.
LINK_BYTES_PER_S = {"cpu": 1e9, "cuda": 5e10}
# Share of the peak rate that matrix products of this size reach.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.4}
# Seconds to launch the kernels of one block, forward; a backward pass launches twice as many.
LAUNCH_S = {"cpu": 5e-4, "cuda": 2e-4}


@dataclass(frozen=True)
class Shape:
    """What the cost depends on.

    Attributes:
        num_parameters: All of them.
        matrix_parameters: Those that multiply every token: the matrices of the blocks and the head. The tables of
            tokens and positions are only looked up.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    matrix_parameters: int


@dataclass(frozen=True)
class Cost:
    """What one trial is expected to take.

    Attributes:
        flops: Floating-point operations, probes included, all workers together,
        probe_flops: and those of the probes alone: strings that are scored and not trained, and contexts.
        peak_gib: Peak memory of each of its devices (on the CPU: of each process).
        seconds: Wall-clock time on devices of the kind that the spec names.
        workers: How many of them.
    """

    flops: float
    peak_gib: float
    seconds: float
    workers: int = 1
    probe_flops: float = 0.0

    @property
    def device_hours(self) -> float:
        return self.seconds * self.workers / 3600


def shape(model: ModelSpec) -> Shape:
    """The shape of a model, from the family table or from the config in its directory.

    Raises:
        ValueError: If the directory holds no config of a model of that family.
    """
    family = families.family(model.family)
    if model.path is not None:
        return _shape_in(Path(model.path), family)
    size = families.size(model.family, model.size)
    matrices = _matrices_of(size, family)
    head = size.vocab_size * size.hidden_size
    return Shape(size.num_layers, size.hidden_size, size.vocab_size, size.num_parameters, matrices + head)


def _attention_matrices(
    hidden_size: int, num_heads: int | None, num_key_value_heads: int | None, head_size: int | None = None
) -> int:
    """Parameters of the four matrices of one block's attention; two are narrower where heads share keys and values."""
    num_heads = num_heads or 1
    head_size = head_size or hidden_size // num_heads
    return 2 * hidden_size * head_size * (num_heads + (num_key_value_heads or num_heads))


def _num_feedforward(family: families.Family) -> int:
    """Matrices of a feed-forward layer: two, or three where it is gated.

    Read off the exact parameter count of the family's largest size, where everything else is small.
    """
    size = max(family.sizes.values(), key=lambda each: each.num_parameters)
    embeddings = size.vocab_size * size.hidden_size * _num_tables(family)
    block = (size.num_parameters - embeddings) / size.num_layers
    feedforward = block - _attention_matrices(size.hidden_size, size.num_heads, size.num_key_value_heads)
    return round(feedforward / (size.hidden_size * size.intermediate_size))


def _num_tables(family: families.Family) -> int:
    return 1 if family.ties_embeddings else 2


def _matrices_of(size: families.Size, family: families.Family) -> int:
    """Parameters of the matrices of all blocks."""
    attention = _attention_matrices(size.hidden_size, size.num_heads, size.num_key_value_heads)
    return size.num_layers * (attention + _num_feedforward(family) * size.hidden_size * size.intermediate_size)


class _Vectors(NamedTuple):
    """What the models of a family have beside matrices and tables of tokens: norms, biases and positions.

    Attributes:
        in_block: Vectors of the hidden width in each block,
        feedforward: and of the width of its feed-forward layer.
        in_model: Of the hidden width beside the blocks. OPT's positions begin with two that no token has.
        vocabulary: Of the size of the vocabulary: a bias of the head.
        positions: Tables of positions: none where positions rotate.
    """

    in_block: int
    feedforward: int
    in_model: int
    vocabulary: int
    positions: int


@cache
def _vectors(name: str) -> _Vectors:
    """Read off the exact parameter counts of a family's sizes.

    Two that differ in their vocabulary alone show a bias of the head, and two of different depth how many vectors
    a block has. Gated layers have no biases.
    """
    family = families.family(name)
    tiny, largest = family.sizes["tiny"], max(family.sizes.values(), key=lambda each: each.num_parameters)
    text = family.sizes[families.TEXT_SIZE]
    a_token = (text.num_parameters - tiny.num_parameters) // (text.vocab_size - tiny.vocab_size)
    vocabulary = a_token - _num_tables(family) * tiny.hidden_size
    feedforward = 0 if _num_feedforward(family) == 3 else 1

    def beside(size: families.Size) -> int:
        """Parameters that are no matrices, nor anything of a token."""
        tokens = size.vocab_size * (_num_tables(family) * size.hidden_size + vocabulary)
        return size.num_parameters - _matrices_of(size, family) - tokens

    positions = int(beside(tiny) >= tiny.max_positions * tiny.hidden_size)

    def in_all(size: families.Size) -> int:
        """Vectors of the hidden width."""
        wide = size.num_layers * feedforward * size.intermediate_size
        return (beside(size) - wide) // size.hidden_size - positions * size.max_positions

    in_block = (in_all(largest) - in_all(tiny)) // (largest.num_layers - tiny.num_layers)
    in_model = in_all(tiny) - in_block * tiny.num_layers
    return _Vectors(in_block, feedforward, in_model, vocabulary, positions)


def _shape_in(path: Path, family: families.Family) -> Shape:
    try:
        config = dict(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.path must be a directory written by save_pretrained, but {path} holds no readable config.json "
            f"({type(error).__name__}); save the model there, or name a family and a size"
        ) from error
    # The first of the keys: OPT-350m has embeddings narrower than its blocks.
    found: dict[str, Any] = {name: config.get(keys[0]) for name, keys in family.config_keys.items()}
    needed = ("num_layers", "hidden_size", "vocab_size", "max_positions")
    if missing := [name for name in needed if not isinstance(found.get(name), int)]:
        raise ValueError(
            f"model.family={family.name!r} must be the family of the model in {path}, but its config.json lacks "
            f"{', '.join(missing)} under the names of that family; name the family that it was saved from"
        )
    layers, hidden_size, vocab_size = found["num_layers"], found["hidden_size"], found["vocab_size"]
    intermediate_size = found.get("intermediate_size") or 4 * hidden_size  # so GPT-2 where its config says nothing
    heads = found.get("num_heads"), found.get("num_key_value_heads"), config.get("head_dim")
    attention = _attention_matrices(hidden_size, *heads)
    matrices = layers * (attention + _num_feedforward(family) * hidden_size * intermediate_size)
    # Of a table's rows: the last of the keys.
    width = config.get(family.config_keys["hidden_size"][-1]) or hidden_size
    matrices += 2 * hidden_size * width if width != hidden_size else 0
    table = vocab_size * width
    vectors = _vectors(family.name)
    # A norm behind the last block has nothing to do where each block ends with its own.
    in_model = vectors.in_model - (0 if config.get("do_layer_norm_before", True) else 2)
    num_parameters = (
        matrices
        + table * (1 if config.get("tie_word_embeddings", family.ties_embeddings) else 2)
        + layers * (vectors.in_block * hidden_size + vectors.feedforward * intermediate_size)
        + hidden_size * (in_model + vectors.positions * found["max_positions"])
        + vectors.vocabulary * vocab_size
    )
    return Shape(layers, hidden_size, vocab_size, num_parameters, matrices + table)


@dataclass(frozen=True)
class Work:
    """What a trial computes, in strings.

    Attributes:
        trained: Strings of all steps together, that each worker trains.
        steps: Optimiser steps.
        scored: Strings of each scoring pass over the trained ones.
        looked_at: Strings of each look.
    """

    trained: int
    steps: int
    scored: tuple[int, ...]
    looked_at: tuple[int, ...]


def cost(spec: TrialSpec) -> Cost:
    """The expected cost of a trial."""
    device = accelerator(spec.compute.accelerator)
    model = shape(spec.model)
    tokens = spec.num_tokens
    work = _sequence_work(spec) if spec.curriculum else _work(spec)
    one_pass = _forward_flops(model, tokens)
    backward = 2.0 if spec.model.lora is None else 1.0
    step_flops = one_pass * (1 + backward + spec.training.gradient_checkpointing)
    workers = spec.compute.workers
    # Every worker computes all strings of a step that has fewer of them than workers.
    flops = workers * work.trained * step_flops + sum(work.scored) * one_pass
    probe_flops = sum(work.looked_at) * one_pass + _context_flops(spec, model)
    pretraining = spec.model.in_context
    in_context_flops = 3 * pretraining.steps * pretraining.strings_per_step * _forward_flops(model, pretraining.length)
    flops += in_context_flops * workers + probe_flops
    peak = device.fp32_flops if spec.compute.precision == "fp32" else device.bf16_flops
    in_a_pass = max(1, TOKENS_PER_SCORING_PASS // tokens)
    passes = sum(math.ceil(each / in_a_pass / workers) for each in (*work.scored, *work.looked_at))
    forwards = 3 * work.steps * spec.strings_per_worker / _strings_per_forward(spec) + passes
    cores = spec.compute.threads if device.device == "cpu" else 1
    seconds = flops / (peak * cores * workers * EFFICIENCY[device.device])
    seconds += forwards * model.num_layers * LAUNCH_S[device.device]
    seconds += work.steps * _bytes_told(spec, model) / LINK_BYTES_PER_S[device.device]
    return Cost(flops, _peak_gib(spec, model, device, tokens), seconds, workers, probe_flops)


def _work(spec: TrialSpec) -> Work:
    epochs, steps = spec.num_epochs, spec.num_epochs * spec.steps_per_epoch
    num_probes = _num_looks(spec, spec.probes.epochs)
    if spec.corpus is not None:
        return Work(steps * spec.strings_per_worker, steps, (), _samples_looked_at(spec))
    return Work(
        trained=steps * spec.strings_per_worker,
        steps=steps,
        scored=(spec.strings.num_strings,) * (epochs + 1 if spec.scores_apart else 1),
        looked_at=(spec.probes.num_held_out,) * num_probes,
    )


def _num_looks(spec: TrialSpec, epochs: Sequence[int]) -> int:
    """At how many of these epochs a trial is looked at, its last one among them."""
    return len({epoch for epoch in epochs if epoch <= spec.num_epochs} | {spec.num_epochs})


def _samples_looked_at(spec: TrialSpec) -> tuple[int, ...]:
    """Samples of each look at a corpus; what is generated costs a pass, as if with a cache nothing were computed twice,
    and each object that a fact could have, under each template, is a sample."""
    corpus, probes = spec.corpus, spec.probes
    assert corpus is not None
    number = corpus.num_together + probes.num_held_out
    looks = [number] * _num_looks(spec, probes.epochs) * (1 if probes.embeddings is None else 2)
    if probes.generation is not None:
        generated = probes.generation.num_samples + math.ceil(probes.generation.checked_share * corpus.num_samples)
        looks += [generated] * _num_looks(spec, probes.generation.epochs)
    if probes.facts is not None:
        ranked = 2 * probes.facts.num_facts * NUM_TEMPLATES * NUM_OBJECTS
        looks += [ranked] * _num_looks(spec, probes.facts.epochs)
    return tuple(looks)


def _sequence_work(spec: TrialSpec) -> Work:
    """Stage by stage, as `sequence` goes: looks within a stage are of fixed size, those at its end grow with it."""
    assert spec.curriculum is not None
    stages, retention = spec.stages(), spec.probes.retention
    epochs = spec.num_epochs // len(stages)
    within = sum(0 < epoch < epochs for epoch in spec.probes.epochs)
    held_out = spec.probes.num_held_out * (2 if spec.curriculum.other else 1)
    at_end = None if retention.stage_ends == "all" else retention.ages
    learned = np.full(spec.strings.num_strings, BEFORE)
    looked_at = [retention.num_future + held_out]
    num_beside = 0
    for stage in stages:
        for ages, number in ((retention.ages, within), (at_end, 1)):
            asked = strings_to_look_at(stages, stage.index, learned, ages=ages, num_future=retention.num_future)
            looked_at += [len(asked) + held_out] * number
        num_beside += num_replayed(spec.curriculum.replay_share, int(np.sum(learned > BEFORE))) * epochs
        if not stage.is_unrepeated:
            learned[list(stage.strings)] = stage.index
    steps = spec.num_epochs * spec.steps_per_epoch
    return Work(
        trained=steps * spec.strings_per_worker + math.ceil(num_beside * spec.steps_per_epoch / spec.compute.workers),
        steps=steps,
        scored=(spec.strings_together,) * (len(stages) * (epochs + 1 if spec.scores_apart else 1)),
        looked_at=tuple(looked_at),
    )


def _context_flops(spec: TrialSpec, model: Shape) -> float:
    """What the probes of the context compute; each of their tokens may attend to a whole string."""
    stated, length = spec.probes.context, spec.strings.length
    if stated is None:
        return 0.0
    num_looks = len({epoch for epoch in stated.epochs if epoch < spec.num_epochs}) + 1
    num_strings = (stated.num_strings or spec.strings.num_strings) + stated.num_held_out
    per_token = 2.0 * model.matrix_parameters + 4.0 * model.num_layers * model.hidden_size * length
    return num_looks * num_strings * context_cost_tokens(stated, length, bos=bool(spec.model.bos)) * per_token


def _bytes_told(spec: TrialSpec, model: Shape) -> float:
    """Bytes that a worker sends in a step: gradients are reduced, and weights gathered.

    Stage 0 sums gradients on every worker, stages 1 and 2 sum them where they belong and gather the new weights, which
    is as much. Stage 3 gathers weights as they are read: again in the backward pass, if they were released meanwhile.
    """
    workers, width = spec.compute.workers, 4 if spec.compute.precision == "fp32" else 2
    trained = _num_trained(spec, model)
    gathered = trained
    if spec.compute.zero_stage == 3:
        gathered = model.num_parameters * (1 if model.num_parameters <= LIVE else 2)
    return width * (trained + gathered) * (workers - 1) / workers


def _num_trained(spec: TrialSpec, model: Shape) -> int:
    """Parameters that are trained; of adapters, whose number hardly counts, none."""
    if spec.model.lora is not None:
        return 0
    block = (model.matrix_parameters - model.vocab_size * model.hidden_size) // model.num_layers
    frozen = len(spec.training.frozen_blocks) * block
    frozen += model.vocab_size * model.hidden_size if spec.training.frozen_embeddings else 0
    return model.num_parameters - frozen


def _strings_per_forward(spec: TrialSpec) -> int:
    return spec.training.strings_per_forward or spec.strings_per_worker


def _most_replayed(spec: TrialSpec) -> int:
    """Strings of earlier stages that a step of the last stage trains beside its own."""
    if spec.curriculum is None:
        return 0
    return num_replayed(spec.curriculum.replay_share, spec.strings.num_strings - spec.curriculum.strings_per_stage)


def _forward_flops(model: Shape, tokens: int) -> float:
    """One forward pass over one string: two operations a weight and token, and causal attention."""
    attention = 2 * 2 * model.num_layers * model.hidden_size * tokens**2 / 2
    return 2.0 * model.matrix_parameters * tokens + attention


def _peak_gib(spec: TrialSpec, model: Shape, device: Accelerator, tokens: int) -> float:
    on_cpu = device.device == "cpu"
    width = 4 if spec.compute.precision == "fp32" else 2
    trained = _num_trained(spec, model)
    moments = {"adamw": 8, "sgd": 4 if spec.training.momentum else 0}[spec.training.optimiser]
    is_sharded = spec.compute.engine == "deepspeed"
    if is_sharded:
        weights = _sharded_bytes(spec, model, trained, width, moments)
    else:
        masters = 0 if width == 4 else 8  # the fp32 weights and their gradients
        weights = model.num_parameters * width + trained * (width + moments + masters)
    loaded = 4 * model.num_parameters  # fp32, whatever it is cast to
    if on_cpu:
        weights += 0 if is_sharded else loaded  # the base weights that the model is reset from
        weights += width * model.num_parameters if spec.training.keep_weights != "none" else 0
        loaded *= 2
    elif is_sharded:
        loaded = width * model.num_parameters  # cast before it is moved, and moved whole before it is sharded
    in_forward = tokens * (_strings_per_forward(spec) + _most_replayed(spec) / spec.compute.workers)
    block = SAVED_PER_BLOCK * model.hidden_size * width
    saved = model.hidden_size * width * model.num_layers + block
    saved = saved if spec.training.gradient_checkpointing else block * model.num_layers
    in_scoring = min(TOKENS_PER_SCORING_PASS, tokens * max(spec.strings.num_strings, spec.probes.num_held_out))
    logits = LOGIT_COPIES * 4 * min(LOGITS_PER_CHUNK, max(in_forward, in_scoring) * model.vocab_size)
    return max(loaded, weights + in_forward * saved + logits) / 2**30 + PROCESS_GIB


def _sharded_bytes(spec: TrialSpec, model: Shape, trained: int, width: int, moments: int) -> float:
    """What a worker's device keeps of weights, gradients and the optimiser's state under DeepSpeed.

    ZeRO keeps fp32 copies of the weights and gradients that it updates even at fp32; only stage 3 does without there.
    """
    compute, parameters = spec.compute, model.num_parameters
    stage, workers = compute.zero_stage, compute.workers
    if stage == 0:
        masters, message = 0 if width == 4 else 8, width * min(MESSAGE, trained)
        return float(parameters * width + trained * (width + moments + masters) + message)
    masters = 0 if stage == 3 and width == 4 else 8
    state = trained * (moments + masters) / workers
    gradients = trained * width / (workers if stage >= 2 else 1)
    buckets = width * min(BUCKET, trained) * (2 if stage == 3 else 1)  # two: one is filled while the other is sent
    weights = parameters * width / (workers if stage == 3 else 1)
    if accelerator(compute.accelerator).device != "cpu":  # there the host is the device
        state = state if compute.offload == "none" else 0.0
        weights = weights if compute.offload != "parameters" else 0.0
    elif stage == 3:
        weights += 4 * parameters  # the C library keeps what the whole model took before it was sharded
    # What arrives is a bucket of shards, and then weights.
    gathered = width * (min(LIVE, parameters) + 2 * min(BUCKET, parameters)) if stage == 3 else 0
    return weights + gathered + gradients + state + buckets


def check_fits(spec: TrialSpec) -> None:
    """Refuses a trial that its device cannot hold.

    Raises:
        ValueError: If the estimated peak exceeds the share of the device's memory that the trial asks for.
    """
    device = accelerator(spec.compute.accelerator)
    available, needed = available_gib(spec), cost(spec).peak_gib
    if needed > available:
        raise ValueError(
            f"a trial must fit its device, but {spec.model.family} {spec.model.size} needs about {needed:.1f} GiB and "
            f"{device.name} offers {available:.1f} GiB; take a larger compute.accelerator, "
            "compute.engine='deepspeed' over more compute.workers, fewer strings a forward pass "
            "(training.strings_per_forward), training.gradient_checkpointing, or a smaller model"
        )


def available_gib(spec: TrialSpec) -> float:
    """What a device of the kind that the spec names offers a trial."""
    device = accelerator(spec.compute.accelerator)
    return device.memory_gib * (spec.compute.device_share if device.device != "cpu" else 1)
