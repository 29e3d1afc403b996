"""One trial of many devices as a Ray Train run: the same loop in every worker, over a DeepSpeed engine.

Train starts the workers and notices their death. What is measured, and the checkpoints, go to the trial's folder;
Train's own storage holds nothing that is read again. The process that called holds the lease.
"""

import contextlib
import functools
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from memray.cluster.documents import START, Cursor, KeptCheckpoint
from memray.cluster.leaving import at_work, is_asked, leave_on_sigterm
from memray.cluster.ledger import Attempt, TrialFolder
from memray.cluster.resources import is_on_cpu, of_worker
from memray.spec import TrialSpec

# Seconds between two looks at how far the workers have come.
PROGRESS_S = 5.0


def train(
    spec: TrialSpec,
    attempt: Attempt,
    checkpoint: KeptCheckpoint | None,
    *,
    trained: TrialFolder | None = None,
    launch_name: str,
    owner: Any,
    probe_actors: list[Any],
    told: Callable[[int], None],
) -> None:
    """Runs the trial to its end, or raises what its first worker to fail raised.

    Args:
        trained: What an earlier run of it showed, to be repeated.
        launch_name: The launch that may ask it to leave.
        owner: Of the base weights.
        told: Told now and then how far the trial has come.
    """
    on_gpu = not is_on_cpu(spec)
    waiting = Waiting(attempt, told, leave_name=f"{launch_name}-{spec.trial_id()}-{attempt.number}")
    with tempfile.TemporaryDirectory(prefix="memray-train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "spec": spec.model_dump_json(),
                "writer": attempt.elsewhere(),
                "checkpoint": checkpoint,
                "trained": trained,
                "leave_names": (launch_name, waiting.leave_name),
                "owner": owner,
                "probe_actors": probe_actors,
            },
            scaling_config=ScalingConfig(
                num_workers=spec.compute.workers, use_gpu=on_gpu, resources_per_worker=of_worker(spec)
            ),
            torch_config=LeavingConfig(backend="nccl" if on_gpu else "gloo"),
            run_config=RunConfig(name=spec.trial_id(), storage_path=scratch),
        )
        errors = _fit(trainer, waiting.look)
    for error in errors:
        raise _of_worker(error)


class LeavingBackend(TorchConfig().backend_cls):
    """Torch's processes, which SIGTERM asks to leave. Train runs their loop in a thread, and handlers need the main."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(leave_on_sigterm)


class LeavingConfig(TorchConfig):
    """Torch's configuration, with these processes."""

    @property
    def backend_cls(self) -> type[LeavingBackend]:
        return LeavingBackend


def _fit(trainer: TorchTrainer, look: Callable[[], None]) -> list[Exception]:
    """Fits in a thread, because only this one may report to Tune; what it raised."""
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(PROGRESS_S)
        look()
    return errors


@dataclass
class Waiting:
    """Looks into the trial's folder how far its workers have come, and asks them to leave if this process was asked.

    Attributes:
        leave_name: The name under which it asks: of this attempt alone, or the next one would leave too.
    """

    attempt: Attempt
    told: Callable[[int], None]
    leave_name: str
    has_asked: bool = False
    cursor: Cursor = START
    epoch: int = 0

    def look(self) -> None:
        if is_asked() and not self.has_asked:
            with contextlib.suppress(OSError):  # asked again at the next look
                self.attempt.folder.ledger.ask_to_leave(self.leave_name)
                self.has_asked = True
        with contextlib.suppress(OSError):  # a storage that is away for a moment ends no training
            lines, self.cursor = self.attempt.folder.measurements(self.cursor)
            self.epoch = lines[-1]["epoch"] if lines else self.epoch
        self.told(self.epoch)


def _of_worker(error: Exception) -> Exception:
    """What a worker raised, if one did: a refusal in the main one says more than its peers' lost connections."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return error
    refusals = [each for each in failures.values() if isinstance(each, ValueError)]
    first = (refusals or list(failures.values()))[0]
    first.__cause__ = error
    return first


def _work(config: dict[str, Any]) -> None:
    """What runs in each worker."""
    from memray.cluster.engine import DeepSpeedEngine
    from memray.cluster.probing import ActorProber, SnapshotProber
    from memray.cluster.recorder import Recorder
    from memray.cluster.weights import ensure_at_hand, fetch
    from memray.trial import ModelShelf, run_trial

    spec = TrialSpec.model_validate_json(config["spec"])
    owner, actors = config["owner"], config["probe_actors"]
    rank = ray.train.get_context().get_world_rank()
    if not is_on_cpu(spec):
        torch.cuda.set_device(get_device())
    ensure_at_hand(spec.model, owner)
    shelf = ModelShelf(functools.partial(fetch, owner) if owner is not None else None, keeps_model=False)
    # Where the weights are shards, a probe of the context and generation need them whole.
    needs_whole = spec.probes.context or spec.probes.generation or spec.probes.embeddings
    own = SnapshotProber(config["spec"]) if needs_whole else None
    prober = ActorProber(config["spec"], actors) if actors else own
    recorder = Recorder(
        spec,
        config["writer"],
        config["checkpoint"],
        trained=config["trained"],
        is_main=rank == 0,
        leave_names=config["leave_names"],
    )
    engines: list[DeepSpeedEngine] = []

    def make_engine(*arguments: Any) -> DeepSpeedEngine:
        engines.append(DeepSpeedEngine(*arguments))
        return engines[0]

    def summary() -> dict[str, Any]:
        return engines[0].communication() | (prober.summary() if isinstance(prober, ActorProber) else {})

    with at_work():
        recorder.record(run_trial(spec, shelf=shelf, make_engine=make_engine, prober=prober, keeper=recorder), summary)
