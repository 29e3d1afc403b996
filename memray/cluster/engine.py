"""The engine of many devices: DeepSpeed, at any stage of ZeRO, in one process a device.

The loop above it is the same in every process and sees the same scores. What a step's loss is weighted by, and which
process computes which strings, is decided here; Ray is not known here, so that plain processes can run it.
"""

import contextlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from memray.cluster.communication import CommunicationLog
from memray.cost import BUCKET
from memray.encoding import Batch
from memray.finetune import (
    Stop,
    as_numpy,
    generator_states,
    optimiser,
    parts,
    scoring_passes,
    set_generator_states,
)
from memray.scoring import (
    AlphabetIds,
    LogitColumns,
    TokenScores,
    body_and_head,
    chunks,
    collect,
    fp32_logits,
    score_logits,
    target_states,
    vocabulary_size,
)
from memray.spec import TrialSpec

# All that DeepSpeed's checkpoints name beside tensors and plain values; anything else is refused unread.
CHECKPOINT_GLOBALS = frozenset(
    {
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
# DeepSpeed names a folder within a checkpoint after a tag.
TAG = "state"


class ScoredLoss(nn.Module):
    """A model whose forward pass gives the summed loss of its targets and, on the side, their scores.

    One module, because ZeRO-3 gathers and releases weights by the calls of the module that it was given.
    """

    def __init__(self, model: nn.Module, alphabet: AlphabetIds, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.alphabet = alphabet
        self.columns: dict[int, LogitColumns] = {}

    def forward(self, batch: Batch) -> Tensor:
        body, head = body_and_head(self.model)
        states, target_ids = target_states(body(input_ids=batch.ids).last_hidden_state, batch)
        self.columns = {}
        losses = []
        for part in chunks(len(target_ids), vocabulary_size(head)):
            arguments = (part.start, states[part], target_ids[part], batch.alphabet or self.alphabet)
            # Logits of many chunks are made again in the backward pass, so that one chunk is alive at a time.
            is_whole = part.start == 0 and part.stop == len(target_ids)
            again = torch.is_grad_enabled() and not is_whole
            losses.append(recompute(self._chunk, *arguments, use_reentrant=False) if again else self._chunk(*arguments))
        return torch.stack(losses).sum()

    def _chunk(
        self,
        start: int,
        states: Float[Tensor, "targets hidden"],
        target_ids: Int[Tensor, " targets"],
        alphabet: AlphabetIds,
    ) -> Tensor:
        _, head = body_and_head(self.model)
        logits = fp32_logits(head, states)
        if start not in self.columns:
            with torch.no_grad():
                self.columns[start] = score_logits(logits.detach(), target_ids, alphabet)
        return nn.functional.cross_entropy(logits, target_ids, reduction="sum", label_smoothing=self.label_smoothing)

    def scores(self, batch: Batch) -> TokenScores:
        """The scores of the last forward pass."""
        return collect([self.columns[start] for start in sorted(self.columns)], batch)


def deepspeed_config(spec: TrialSpec) -> dict[str, Any]:
    """DeepSpeed's own settings for a trial; the optimiser and its rate are ours."""
    compute, training = spec.compute, spec.training
    zero: dict[str, Any] = {
        "stage": compute.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
    }
    if compute.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if compute.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        # Only their product counts: the engine is told the boundary of each step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.clip_norm,
        "bf16": {"enabled": compute.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "comms_logger": {"enabled": compute.logs_communication, "prof_all": True, "verbose": False},
    }


class DeepSpeedEngine:
    """One process of many; torch.distributed is initialised before one is made, and every process makes one."""

    def __init__(self, spec: TrialSpec, model: nn.Module, alphabet: AlphabetIds, device: torch.device) -> None:
        os.environ["DS_ACCELERATOR"] = device.type
        import deepspeed

        # It would be compiled on first use, by a lock that a killed process leaves behind, and only the CPU has it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world != spec.compute.workers:
            raise ValueError(
                f"trial {spec.trial_id()} must run on compute.workers={spec.compute.workers} processes, but got "
                f"{self.world}"
            )
        self.is_main = self.rank == 0
        self.spec = spec
        self.device = device
        self.training = spec.training
        # Objects travel apart from tensors, through the memory of the host.
        self.group = dist.new_group(backend="gloo")
        torch.manual_seed(_dropout_seed(spec, self.rank))
        if spec.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.model = model
        self.scored_loss = ScoredLoss(model, alphabet.to(device), spec.training.label_smoothing)
        self.communication_log = CommunicationLog(self.world)
        self.communication_log.install()
        engine, *_ = deepspeed.initialize(
            model=self.scored_loss,
            optimizer=optimiser(weights, spec.training),
            config=deepspeed_config(spec),
        )
        self.engine: Any = engine  # what it has depends on the stage

    # --- one step ----------------------------------------------------------------------------------------------

    def step(self, batch: Batch, learning_rate: float, stop: Stop | None = None) -> TokenScores:
        shares = self._shares(batch)
        own = shares[self.rank % len(shares)]
        # DeepSpeed averages over workers: each counts by its targets, and a step that all of them repeat counts once.
        weight = len(shares) / int(batch.is_target.sum())
        forwards = parts(own, self.training.strings_per_forward or len(own.ids))
        scored = []
        self.engine.train()
        for index, part in enumerate(forwards):
            self.engine.set_gradient_accumulation_boundary(index == len(forwards) - 1)
            scored.append(self._forward(part, weight, backward=True))
        told = self.gather(TokenScores.concatenate(scored))
        scores = TokenScores.concatenate(told[: len(shares)])
        if stop is None or not stop(scores):
            for group in self.engine.optimizer.param_groups:
                group["lr"] = learning_rate
            self.engine.step()
        return scores

    def _shares(self, batch: Batch) -> list[Batch]:
        """What each worker computes of a step; one share where all of them compute all of it."""
        rows = np.arange(len(batch.ids))
        return (
            [batch] if len(rows) < self.world else [batch.of(own).trimmed() for own in np.array_split(rows, self.world)]
        )

    def _forward(self, batch: Batch, weight: float = 1.0, *, backward: bool = False) -> TokenScores:
        loss = self.engine(batch.to(self.device))
        scores = self.scored_loss.scores(batch)
        if backward:
            self.engine.backward(loss * weight, scale_wrt_gas=False)
        return scores

    @torch.no_grad()
    def score(self, batch: Batch) -> TokenScores:
        """The passes are shared out in turn; every process runs as many, because under ZeRO-3 all gather together."""
        self.engine.eval()
        passes = scoring_passes(batch)
        rounds = [passes[begin : begin + self.world] for begin in range(0, len(passes), self.world)]
        own = [self._forward(each[min(self.rank, len(each) - 1)]) for each in rounds]
        told = self.gather(own)
        scored = [told[rank][k] for k, each in enumerate(rounds) for rank in range(len(each))]
        return TokenScores.concatenate(scored)

    def forget(self) -> None:
        inner = self.engine.optimizer
        while hasattr(inner, "optimizer"):  # ours is inside those that shard it
            inner = inner.optimizer
        inner.state.clear()

    # --- between the processes ---------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, value, group=self.group)
        return told

    def snapshot(self) -> dict[str, ndarray]:
        from deepspeed.runtime.zero import GatheredParameters

        weights: dict[str, ndarray] = {}
        # One at a time: together they may not fit a device.
        for name, weight in self.model.state_dict(keep_vars=True).items():
            with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                if self.is_main:
                    weights[name] = as_numpy(weight)
        return weights

    def communication(self) -> dict[str, float]:
        """What this process has sent to others since the engine was made; nothing unless `compute.logs_communication`.

        GiB that it sent and seconds that it spent in collective calls, as `CommunicationLog` counts them: the
        broadcast of the first weights, training steps, scoring passes and snapshots.
        """
        if not self.spec.compute.logs_communication:
            return {}
        log = self.communication_log
        return {"communication_gib": log.sent_bytes / 2**30, "communication_s": log.seconds}

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        (folder / TAG).mkdir()
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        torch.save(generator_states(self.device), folder / f"generators-{self.rank}.pt")

    def load(self, folder: Path) -> None:
        written = sorted(folder.glob("generators-*.pt"))
        if len(written) != self.world:
            raise ValueError(
                f"a checkpoint of DeepSpeed loads on as many workers as wrote it, but {len(written)} wrote this "
                f"one and {self.world} read it; resume it on {len(written)}, or delete it to train from the start"
            )
        for path in (folder / TAG).glob("*.pt"):
            check_pickle(path)
        with _only_weights():
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"DeepSpeed found no checkpoint of its own in {folder}; delete it to train from the start")
        states = torch.load(folder / f"generators-{self.rank}.pt", weights_only=True)
        set_generator_states(states, self.device)


def _dropout_seed(spec: TrialSpec, rank: int) -> int:
    """Of the generator that dropout alone draws from; the same for all workers that repeat the same strings."""
    is_repeated = (spec.training.strings_per_step or spec.strings_together) < spec.compute.workers
    if rank == 0 or is_repeated:
        return spec.order_seed
    return int(np.random.SeedSequence([spec.order_seed, rank]).generate_state(1)[0])


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Keeps torch from running what a file names, though DeepSpeed asks for that.

    The files lie in a storage, where they may change after they were checked.
    """
    known = [pkgutil.resolve_name(name) for name in CHECKPOINT_GLOBALS]
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


def check_pickle(path: Path) -> None:
    """Refuses a checkpoint file that names anything but what DeepSpeed's own files need: reading it would run it.

    Raises:
        ValueError: If it does.
    """
    try:
        strange = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - CHECKPOINT_GLOBALS
    except Exception as error:  # of several kinds: of a file that is no archive, and of what torch never writes
        raise ValueError(f"a checkpoint must be one of torch's, but {path.name} is none: {error}; delete it") from error
    if strange:
        raise ValueError(
            f"a checkpoint must name nothing but DeepSpeed's own classes, but {path.name} names "
            f"{', '.join(sorted(strange))}; it was not written by this engine: delete it"
        )
