"""What a trial will cost: floating-point operations, peak memory, seconds. Estimates, before anything is loaded.

The operations are counted (every matrix product, causal attention at half its square), the memory is summed from what
a step keeps alive, the seconds follow from a share of the peak rate that training steps of this kind reach and a fixed
overhead a layer. Tests hold the operations to torch's own counter and the memory to a measured peak.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from memray import families
from memray.accelerators import Accelerator, accelerator
from memray.spec import ModelSpec, TrialSpec

# A process with torch and transformers, before any model.
PROCESS_GIB = 0.8
# Elements that a block keeps for its backward pass, in units of the hidden size: norms, q, k, v and their rotated
# copies, the attention's output, twice the feed-forward width of four.
SAVED_PER_BLOCK = 24
# Copies of a chunk of fp32 logits that are alive at once: logits, log-probabilities, gradient, sort keys.
LOGIT_COPIES = 4
# Share of the peak rate that matrix products of this size reach.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.4}
# Seconds to launch the kernels of one block, forward; a backward pass launches twice as many.
LAUNCH_S = {"cpu": 5e-4, "cuda": 2e-4}


@dataclass(frozen=True)
class Shape:
    """What the cost depends on.

    Attributes:
        num_parameters: All of them.
        matrix_parameters: Those that multiply every token: the blocks and the head, not the input embedding.
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
        flops: Floating-point operations, probes included.
        peak_gib: Peak memory of its device (on the CPU: of its process).
        seconds: Wall-clock time on one device of the kind that the spec names.
    """

    flops: float
    peak_gib: float
    seconds: float

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600


def shape(model: ModelSpec) -> Shape:
    """The shape of a model, from the family table or from the config in its directory."""
    size = families.size(model.family, model.size)
    if model.path is not None:
        size = _from_directory(model, Path(model.path))
    embedding = size.vocab_size * size.hidden_size
    is_tied = families.family(model.family).ties_embeddings
    return Shape(
        size.num_layers,
        size.hidden_size,
        size.vocab_size,
        size.num_parameters,
        size.num_parameters - (0 if is_tied else embedding),
    )


def _from_directory(model: ModelSpec, path: Path) -> families.Size:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path must be a directory written by save_pretrained, but {path} holds no readable config.json "
            f"({type(error).__name__}); save the model there, or name a family and a size"
        ) from error
    shape = {
        name: config[key]
        for name, keys in families.family(model.family).config_keys.items()
        for key in keys
        if config.get(key) is not None
    }
    missing = {"num_layers", "hidden_size", "vocab_size", "max_positions"} - shape.keys()
    if missing:
        raise ValueError(
            f"model.family={model.family!r} must be the family of the model in {path}, but its config.json lacks "
            f"{', '.join(sorted(missing))} under the names of that family; name the family that it was saved from"
        )
    shape.setdefault("intermediate_size", 4 * shape["hidden_size"])
    blocks = shape["num_layers"] * (4 * shape["hidden_size"] ** 2 + 2 * shape["hidden_size"] * shape["intermediate_size"])
    embeddings = 2 * shape["vocab_size"] * shape["hidden_size"]
    return families.Size(hub_id=None, revision=None, num_parameters=blocks + embeddings, **shape)


def cost(spec: TrialSpec) -> Cost:
    """The expected cost of a trial."""
    device = accelerator(spec.compute.accelerator)
    model = shape(spec.model)
    tokens = spec.strings.length + bool(spec.model.bos)
    epochs = spec.num_epochs
    num_probes = len({epoch for epoch in spec.probes.epochs if epoch <= epochs} | {epochs})
    one_pass = _forward_flops(model, tokens)
    backward = 2.0 if spec.model.lora is None else 1.0
    trained = epochs * spec.strings.num_strings
    step_flops = one_pass * (1 + backward + spec.training.gradient_checkpointing)
    needs_scoring = spec.steps_per_epoch > 1 or spec.model.dropout > 0
    scored = num_probes * spec.probes.num_held_out + spec.strings.num_strings * (epochs if needs_scoring else 1)
    flops = trained * step_flops + scored * one_pass
    peak = device.fp32_flops if spec.compute.precision == "fp32" else device.bf16_flops
    forwards = 3 * trained / (spec.training.strings_per_forward or spec.training.strings_per_step or 1) + scored / 8
    cores = spec.compute.threads if device.device == "cpu" else 1
    seconds = flops / (peak * cores * EFFICIENCY[device.device])
    seconds += forwards * model.num_layers * LAUNCH_S[device.device]
    return Cost(flops, _peak_gib(spec, model, device, tokens), seconds)


def _forward_flops(model: Shape, tokens: int) -> float:
    """One forward pass over one string: two operations a weight and token, and causal attention."""
    attention = 2 * 2 * model.num_layers * model.hidden_size * tokens**2 / 2
    return 2.0 * model.matrix_parameters * tokens + attention


def _peak_gib(spec: TrialSpec, model: Shape, device: Accelerator, tokens: int) -> float:
    on_cpu = device.device == "cpu"
    width = 4 if spec.compute.precision == "fp32" else 2
    trained = model.num_parameters if spec.model.lora is None else 0
    moments = {"adamw": 8, "sgd": 4 if spec.training.momentum else 0}[spec.training.optimiser]
    masters = 0 if width == 4 else 8  # the fp32 weights and their gradients
    weights = model.num_parameters * width + trained * (width + moments + masters)
    if on_cpu:
        weights += 4 * model.num_parameters  # the base weights that the model is reset from
    in_step = spec.training.strings_per_step or spec.strings.num_strings
    in_forward = tokens * (spec.training.strings_per_forward or in_step)
    block = SAVED_PER_BLOCK * model.hidden_size * width
    saved = model.hidden_size * width * model.num_layers + block
    saved = saved if spec.training.gradient_checkpointing else block * model.num_layers
    logits = LOGIT_COPIES * 4 * min(2**24, in_forward * model.vocab_size)
    total = weights + in_forward * saved + logits
    return total / 2**30 + (PROCESS_GIB if on_cpu else 0)


def check_fits(spec: TrialSpec) -> None:
    """Refuses a trial that its device cannot hold.

    Raises:
        ValueError: If the estimated peak exceeds the share of the device's memory that the trial asks for.
    """
    device = accelerator(spec.compute.accelerator)
    available = device.memory_gib * (spec.compute.device_share if device.device != "cpu" else 1)
    needed = cost(spec).peak_gib
    if needed > available:
        raise ValueError(
            f"a trial must fit its device, but {spec.model.family} {spec.model.size} needs about {needed:.1f} GiB and "
            f"{device.name} offers {available:.1f} GiB; take a larger compute.accelerator, fewer strings a forward pass "
            "(training.strings_per_forward), training.gradient_checkpointing, or a smaller model"
        )
