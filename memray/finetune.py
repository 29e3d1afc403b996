"""Fine-tuning over an Engine, measured while it trains.

Where an epoch is one optimiser step, the scores of epoch e are read off the forward pass that begins step
e + 1: the weights are the same, so nothing is computed twice. The loop knows nothing of measures or of where
scores go.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor, nn

from memray.encoding import Batch
from memray.scoring import (
    AlphabetIds,
    LogitColumns,
    TokenScores,
    body_and_head,
    chunks,
    collect,
    fp32_logits,
    score,
    score_logits,
    target_states,
    vocabulary_size,
)
from memray.spec import TrainingSpec

# Strings a scoring pass; a constant, because the batch size moves the last bits of a score.
TOKENS_PER_SCORING_PASS = 4096
# The one file of the engine's checkpoints.
TORCH_CHECKPOINT = "torch.pt"

Stop = Callable[[TokenScores], bool]


@runtime_checkable
class Engine(Protocol):
    """The seam between the loop and whatever computes a step, on one device or on many.

    Collective calls are the engine's business alone: every method is called on every rank, in the same order.

    Attributes:
        is_main: Whether this process is the one that records; true of one of an engine's processes.
    """

    is_main: bool

    def step(self, batch: Batch, learning_rate: float, stop: Stop | None = None) -> TokenScores:
        """Scores of the batch under the weights as they are, then one optimiser step on its mean loss.

        If `stop` says so of the scores, the weights stay as they are.
        """
        ...

    def score(self, batch: Batch) -> TokenScores:
        """Scores of any number of strings under the weights as they are, in the passes of :func:`scoring_passes`."""
        ...

    def snapshot(self) -> dict[str, ndarray]:
        """The weights by name, in the type that the forward pass uses; bf16 as the int16 of the same bits.

        Empty where the process is not the main one.
        """
        ...

    def forget(self) -> None:
        """Begins with a fresh optimiser; the weights stay."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What every process says, the main one first: for decisions that hang on a clock or a disk."""
        ...

    def save(self, folder: Path) -> None:
        """Writes this process's part of a checkpoint: all that a resumed trial needs to end bit-identical."""
        ...

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint whose parts, of all processes, lie in one folder.

        Raises:
            ValueError: If it is not one of this engine's.
        """
        ...


def learning_rate(step: int, num_steps: int, training: TrainingSpec) -> float:
    """The rate of optimiser step `step` (from 0) of `num_steps`.

    The linear schedule starts at the peak and would reach 0 one step after the last.
    """
    assert training.learning_rate is not None  # filled in by the spec's validator
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, num_steps - training.warmup_steps)
    shape = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[training.schedule]
    return training.learning_rate * shape


def parts(batch: Batch, size: int) -> list[Batch]:
    """The batch in order, `size` strings at a time."""
    rows = np.arange(len(batch.ids))
    return [batch.of(rows[begin : begin + size]).trimmed() for begin in range(0, len(rows), size)]


def scoring_passes(batch: Batch) -> list[Batch]:
    """Any number of strings in order, a bounded number of tokens at a time.

    Whoever sorts them with the longest first gets passes that are full, and the same ones from every beginning and
    from every selection of whole passes.
    """
    begins, longest = [0], 0
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        longest = max(longest, length)
        if row > begins[-1] and (row - begins[-1] + 1) * longest > TOKENS_PER_SCORING_PASS:
            begins.append(row)
            longest = length
    rows = np.arange(len(batch.ids))
    return [batch.of(own).trimmed() for own in np.split(rows, begins[1:])]


def share_of_passes(batch: Batch, share: int, shares: int) -> Int[ndarray, " rows"] | None:
    """The rows of every so-manieth scoring pass, so that each is scored as if all were; None where there is none."""
    rows, begin = [], 0
    for index, one in enumerate(scoring_passes(batch)):
        if index % shares == share:
            rows.append(np.arange(begin, begin + len(one.ids)))
        begin += len(one.ids)
    return np.concatenate(rows) if rows else None


def finetune(
    engine: Engine,
    batch: Batch,
    training: TrainingSpec,
    *,
    order_seed: int,
    stop: Stop | None = None,
    dropout: bool = False,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    first_epoch: int = 0,
    first_step: int = 0,
    num_steps: int | None = None,
    replayed: Callable[[int], Batch | None] = lambda epoch: None,
) -> Iterator[tuple[int, TokenScores]]:
    """Trains on all strings of the batch and yields (epoch, scores of all strings), epoch 0 before training.

    `before_epoch(e)` is called while the weights are those of epoch e: the place for probes and checkpoints. When the
    iterator ends, the weights are those of the last epoch that it yielded.

    Args:
        first_epoch: The epoch whose weights the engine holds: above 0 where it continues from a checkpoint.
        stop: Told the scores of each epoch, once and in order; True makes that epoch the last.
        dropout: Whether the model drops anything out while it trains; then a training forward measures nothing.
        first_step: Optimiser steps that the schedule has behind it when training begins,
        num_steps: of so many in all; None is those of this call.
        replayed: Strings that each step of an epoch trains beside its own, unscored.
    """
    assert training.epochs is not None
    num_strings = len(batch.ids)
    strings_per_step = training.strings_per_step or num_strings
    steps_per_epoch = num_strings // strings_per_step
    num_steps = num_steps or first_step + steps_per_epoch * training.epochs
    for epoch in range(first_epoch, training.epochs):
        before_epoch(epoch)
        others = replayed(epoch)
        if steps_per_epoch == 1 and not dropout:
            verdict = Verdict(stop, num_strings)
            whole = batch if others is None else batch.beside(others)
            rate = learning_rate(first_step + epoch, num_steps, training)
            yield epoch, engine.step(whole, rate, verdict).first(num_strings)
            if verdict.is_last:
                return
            continue
        scores = engine.score(batch)
        is_last = stop is not None and stop(scores)
        yield epoch, scores
        if is_last:
            return
        done = first_step + epoch * steps_per_epoch
        train_epoch(
            engine, batch, training, epoch, order_seed=order_seed, done=done, num_steps=num_steps, others=others
        )
    before_epoch(training.epochs)
    yield training.epochs, engine.score(batch)


def train_epoch(
    engine: Engine,
    batch: Batch,
    training: TrainingSpec,
    epoch: int,
    *,
    order_seed: int,
    done: int,
    num_steps: int,
    others: Batch | None = None,
) -> None:
    """Trains on all strings of the batch once, in an order of the epoch's own.

    Args:
        done: Optimiser steps that the schedule has behind it,
        num_steps: of so many in all.
        others: Strings that each step trains beside its own.
    """
    order = np.random.default_rng(np.random.SeedSequence([order_seed, epoch])).permutation(len(batch.ids))
    size = training.strings_per_step or len(order)
    for k, begin in enumerate(range(0, len(order), size)):
        own = batch.of(np.sort(order[begin : begin + size])).trimmed()
        rate = learning_rate(done + k, num_steps, training)
        engine.step(own if others is None else own.beside(others), rate)


class Verdict:
    """Remembers what `stop` said of a step's own strings, because the engine asks it in the middle of the step."""

    def __init__(self, stop: Stop | None, num_strings: int) -> None:
        self.stop = stop
        self.num_strings = num_strings
        self.is_last = False

    def __call__(self, scores: TokenScores) -> bool:
        self.is_last = self.stop is not None and self.stop(scores.first(self.num_strings))
        return self.is_last


def optimiser(parameters: list[nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """The optimiser of the recipe; its rate is set before each step."""
    if training.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=True,
    )


def lower_weights(model: nn.Module) -> None:
    """Turns the weights into bf16; parameters alone, for `model.to` would round the rotary frequencies for good."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()


class TorchEngine:
    """One device, plain torch: fp32, or bf16 with fp32 master weights."""

    is_main = True

    def __init__(
        self,
        model: nn.Module,
        alphabet: AlphabetIds,
        training: TrainingSpec,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model = model
        self.device = device
        self.alphabet = alphabet.to(device)
        self.training = training
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = self.weights
        if precision == "bf16":
            self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
            lower_weights(model)
        self.optimiser = optimiser(self.masters, training)
        model.train()
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def step(self, batch: Batch, learning_rate: float, stop: Stop | None = None) -> TokenScores:
        num_targets = int(batch.is_target.sum())
        forwards = parts(batch, self.training.strings_per_forward or len(batch.ids))
        scores = TokenScores.concatenate([self._backward(part, num_targets) for part in forwards])
        if stop is None or not stop(scores):
            self._update(learning_rate)
        self.model.zero_grad(set_to_none=True)
        return scores

    def _backward(self, batch: Batch, num_targets: int) -> TokenScores:
        """Adds the gradients of one forward pass; the head's are taken chunk by chunk, before the body's."""
        batch = batch.to(self.device)
        body, head = body_and_head(self.model)
        states, target_ids = target_states(body(input_ids=batch.ids).last_hidden_state, batch)
        leaf = states.detach().requires_grad_()
        columns: list[LogitColumns] = []
        for part in chunks(len(target_ids), vocabulary_size(head)):
            logits = fp32_logits(head, leaf[part])
            smoothing = self.training.label_smoothing
            loss = nn.functional.cross_entropy(logits, target_ids[part], reduction="sum", label_smoothing=smoothing)
            loss = loss / num_targets
            loss.backward()
            with torch.no_grad():
                columns.append(score_logits(logits.detach(), target_ids[part], batch.alphabet or self.alphabet))
        states.backward(leaf.grad)
        return collect(columns, batch)

    def _update(self, learning_rate: float) -> None:
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        if self.training.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.masters, self.training.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        if self.masters is not self.weights:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)
                    master.grad = None

    def score(self, batch: Batch) -> TokenScores:
        self.model.eval()
        scored = [score(self.model, part.to(self.device), self.alphabet) for part in scoring_passes(batch)]
        self.model.train()
        return TokenScores.concatenate(scored)

    def snapshot(self) -> dict[str, ndarray]:
        return {name: as_numpy(weight) for name, weight in self.model.state_dict().items()}

    def forget(self) -> None:
        self.optimiser.state.clear()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def save(self, folder: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "masters": [each.detach() for each in self.masters] if self.masters is not self.weights else [],
            "optimiser": self.optimiser.state_dict(),
            "generators": generator_states(self.device),
        }
        torch.save(state, folder / TORCH_CHECKPOINT)

    def load(self, folder: Path) -> None:
        if not (folder / TORCH_CHECKPOINT).exists():
            raise ValueError(
                f"a checkpoint of engine 'torch' must hold {TORCH_CHECKPOINT}, but this one holds "
                f"{', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}; resume it with the engine "
                "that wrote it, or delete it to train from the start"
            )
        state = torch.load(folder / TORCH_CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for master, saved in zip(self.masters if state["masters"] else [], state["masters"], strict=True):
                master.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        set_generator_states(state["generators"], self.device)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, which dropout alone draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of :func:`generator_states`; they live on the CPU, wherever a checkpoint was read to."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def as_numpy(weight: Tensor) -> ndarray:
    """A copy on the CPU; numpy has no bf16, so its bits travel as int16."""
    weight = weight.detach().cpu()
    return (weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight).numpy().copy()


def as_tensor(array: ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`as_numpy`; shares memory with a writable array and copies any other."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 and tensor.dtype == torch.int16 else tensor
