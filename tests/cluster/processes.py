"""Plain processes around a DeepSpeed engine, as a scheduler would start them, without one.

Each process runs the jobs in FOLDER/jobs.pickle one after another, and the first one writes what they gave to
FOLDER/results.pickle.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memray import scoring
from memray.cluster.documents import KeptCheckpoint
from memray.cluster.ledger import Writer
from memray.encoding import Batch, Encoder, encode
from memray.finetune import Engine
from memray.models import load_model
from memray.scoring import AlphabetIds
from memray.spec import TrialSpec

from ..ports import free_port

UNIFORM = AlphabetIds(torch.arange(4, 11), torch.full((7,), 1 / 7))


def batch_of(lengths: Sequence[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    encoder = Encoder(symbol_ids=np.arange(4, 11), bos_id=None, pad_id=2)
    return encode([rng.integers(0, 7, length) for length in lengths], encoder)


@dataclass(frozen=True)
class Steps:
    """Some optimiser steps on one batch, each on all of its strings."""

    spec: TrialSpec
    lengths: Sequence[int]
    number: int = 12
    logits_per_chunk: int = scoring.LOGITS_PER_CHUNK

    def run(self, engine: Engine) -> dict[str, Any]:
        scoring.LOGITS_PER_CHUNK = self.logits_per_chunk
        batch, losses = batch_of(self.lengths), []
        before = engine.score(batch)
        for _ in range(self.number):
            losses.append(-float(engine.step(batch, 1e-3).log_prob.mean()))
        return {"before": before, "losses": losses, "after": engine.score(batch), "snapshot": engine.snapshot()}


@dataclass(frozen=True)
class Whole:
    """A whole trial into a ledger, or the part of it up to a checkpoint.

    Attributes:
        until: Checkpoints to make before the processes leave it; None runs it to its end.
    """

    spec: TrialSpec
    writer: Writer
    checkpoint: KeptCheckpoint | None = None
    until: int | None = None


class Interrupted(Exception):  # noqa: N818
    """A process left a trial in the middle."""


def steps_engine(job: Steps) -> Any:
    from memray.cluster.engine import DeepSpeedEngine

    return DeepSpeedEngine(job.spec, load_model(job.spec.model, seed=1), UNIFORM, torch.device("cpu"))


def run_whole(job: Whole, rank: int) -> str:
    from memray.cluster.engine import DeepSpeedEngine
    from memray.cluster.probing import SnapshotProber
    from memray.cluster.recorder import Recorder
    from memray.trial import run_trial

    needs_whole = job.spec.probes.context or job.spec.probes.embeddings
    prober = SnapshotProber(job.spec.model_dump_json()) if needs_whole else None
    recorder = Recorder(job.spec, job.writer, job.checkpoint, is_main=rank == 0)
    kept, keep = [0], recorder.keep

    def keep_and_leave(epoch: int, engine: Engine) -> None:
        keep(epoch, engine)
        kept[0] += 1
        if kept[0] == job.until:
            raise Interrupted

    recorder.keep = keep_and_leave  # type: ignore[method-assign]
    try:
        recorder.record(run_trial(job.spec, make_engine=DeepSpeedEngine, prober=prober, keeper=recorder))
    except Interrupted:
        return "interrupted"
    except ValueError as error:
        return f"refused: {error}"
    return "finished"


def main(rank: int, world: int, port: int, folder_path: str) -> None:
    folder = Path(folder_path)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    jobs: Mapping[str, Any] = pickle.loads((folder / "jobs.pickle").read_bytes())
    results = {
        name: job.run(steps_engine(job)) if isinstance(job, Steps) else run_whole(job, rank)
        for name, job in jobs.items()
    }
    if rank == 0:
        (folder / "results.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def start(world: int, jobs: Mapping[str, Any], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of some jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.pickle").write_bytes(pickle.dumps(dict(jobs)))
    port = free_port()
    return [
        subprocess.Popen(
            # Not as __main__, where the pickled jobs would be of other classes.
            [sys.executable, "-c", f"from {__name__} import main; main({rank}, {world}, {port}, {str(folder)!r})"],
            cwd=Path(__file__).parents[2],
            stdout=(folder / f"log-{rank}").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]


def run(world: int, jobs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs jobs to their end in processes of their own; what each gave, by its name."""
    processes = start(world, jobs, folder)
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    return pickle.loads((folder / "results.pickle").read_bytes())
