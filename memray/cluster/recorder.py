"""Writes what a trial measures to its folder, and keeps its checkpoints there, whatever engine trains it.

Every process of a trial has a recorder; that of the main one writes measurements, and all put their part of a
checkpoint.
"""

import contextlib
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from memray.cluster import leaving
from memray.cluster.documents import KeptCheckpoint
from memray.cluster.leaving import Left
from memray.cluster.ledger import TrialFolder, Writer
from memray.cluster.replay import as_trained
from memray.cluster.resources import is_on_cpu
from memray.cluster.storage import patiently
from memray.finetune import Engine
from memray.looks import Checkpoint
from memray.measurement import (
    MEASURE_VERSIONS,
    Measurement,
    context_table,
    matrix_table,
    samples_table,
    string_table,
    token_table,
)
from memray.spec import TrialSpec

# The tables of some measurements, in the order of the ledger's.
RECORDS = (token_table, string_table, context_table, matrix_table, samples_table)

# Seconds of measurements that are gathered before a segment is written: what a crash can lose of a view.
SEGMENT_S = 5.0
# Seconds between two looks whether the launch asks the trial to leave.
LEAVE_LOOK_S = 2.0


class Recorder:
    """The keeper of one trial in one of its processes, and in the main one the writer of its measurements.

    Args:
        checkpoint: What to continue from.
        trained: What an earlier run of the trial showed, which this one must repeat.
        told: Told the epoch after each segment.
        is_main: Whether measurements come through this process.
        leave_names: The names under which the ledger may ask the trial to leave: its launch's, for one.
    """

    def __init__(
        self,
        spec: TrialSpec,
        writer: Writer,
        checkpoint: KeptCheckpoint | None = None,
        *,
        trained: TrialFolder | None = None,
        told: Callable[[int], None] = lambda epoch: None,
        is_main: bool = True,
        leave_names: Sequence[str] = (),
    ) -> None:
        self.spec = spec
        self.writer = writer
        self.checkpoint = checkpoint
        self.trained = trained
        self.told = told
        self.is_main = is_main
        self.leave_names = leave_names
        self.is_asked = False
        self.asked_s = 0.0
        self.gathered: list[Measurement] = []
        self.written_s = self.kept_s = self.began_s = time.monotonic()
        self.on_cpu = is_on_cpu(spec)
        reset_peak_memory(self.on_cpu)
        self.scratch = tempfile.TemporaryDirectory(prefix="memray-checkpoint-")

    def record(self, measurements: Iterable[Measurement], summary: Callable[[], dict[str, Any]] = dict) -> None:
        """Writes measurements as they come, a few segments in all, and then that the trial is finished.

        Args:
            summary: What else is to be said of the trial at its end.
        """
        epoch, num_tokens, first_s, last_s = 0, 0, None, 0.0
        corpus: Mapping[str, Any] | None = None
        if self.trained is not None and self.is_main:
            measurements = as_trained(self.spec, measurements, self.trained)
        for measurement in measurements:
            self.gathered.append(measurement)
            epoch, corpus = measurement.epoch, measurement.corpus
            last_s = measurement.scored_s
            if first_s is None:
                first_s = last_s
            else:
                num_tokens += measurement.num_trained
            if time.monotonic() - self.written_s > SEGMENT_S:
                self._write()
                self.told(epoch)
        self._write()
        self.scratch.cleanup()
        if self.is_main:
            told: dict[str, Any] = {"epochs": epoch, "seconds": round(time.monotonic() - self.began_s, 3)}
            if self.checkpoint is not None:
                told["resumed_from_epoch"] = self.checkpoint.epoch
            if first_s is not None and last_s > first_s:
                told["tokens_per_s"] = round(num_tokens / (last_s - first_s), 1)
            if corpus is not None:
                told["corpus"] = dict(corpus)
            told["peak_gib"] = round(peak_memory_gib(self.on_cpu), 3)
            self.writer.finish(told | provenance(self.spec) | summary())

    def _write(self) -> None:
        if self.gathered:
            gathered = self.gathered
            records = [each.record() for each in gathered]
            self.writer.append(records, *(table(gathered) for table in RECORDS))
            for each in gathered:
                if each.weights is not None:
                    self.writer.keep_weights(each.epoch, each.weights)
            self.gathered = []
        self.written_s = time.monotonic()

    # --- checkpoints -------------------------------------------------------------------------------------------

    def newest(self) -> Checkpoint | None:
        """What to continue from, made readable here; what was measured before it becomes this attempt's.

        Raises:
            ValueError: If it is not a checkpoint of this trial on this many workers.
        """
        if self.checkpoint is None:
            return None
        checkpoint = self.checkpoint
        check_resumable(self.spec, checkpoint)
        folder = self.writer.folder
        if self.is_main:
            tables = self.writer.adopt(checkpoint)
        else:
            _, tables = patiently(lambda: folder.before_checkpoint(checkpoint), folder.ledger.patience_s)
        files = Path(self.scratch.name) / "read"
        files.mkdir()
        patiently(lambda: folder.fetch_checkpoint(checkpoint, files), folder.ledger.patience_s)
        return Checkpoint(checkpoint.epoch, files, tables["tokens"], tables["strings"], tables["matrix"])

    def is_due(self) -> bool:
        """Whether enough time has passed since the last one, or the trial is asked to leave."""
        return self._is_asked_to_leave() or time.monotonic() - self.kept_s >= self.spec.compute.checkpoint_s

    def until_asked(self, measurements: Iterable[Measurement]) -> Iterator[Measurement]:
        """Measurements that come without training, and so without checkpoints.

        Raises:
            Left: Between two of them, if the trial is asked to leave.
        """
        for measurement in measurements:
            yield measurement
            if self._is_asked_to_leave():
                raise Left(f"trial {self.spec.trial_id()} was asked to leave, and is looked at again from the start")

    def _is_asked_to_leave(self) -> bool:
        """Whether this process was asked, or the ledger asks through the main one, which looks now and then."""
        self.is_asked = self.is_asked or leaving.is_asked()
        if self.is_main and not self.is_asked and time.monotonic() - self.asked_s > LEAVE_LOOK_S:
            self.asked_s = time.monotonic()
            with contextlib.suppress(OSError):  # a storage that is away for a moment asks nothing
                self.is_asked = any(map(self.writer.folder.ledger.is_asked_to_leave, self.leave_names))
        return self.is_asked

    def keep(self, epoch: int, engine: Engine) -> None:
        """Keeps the engine's state; called by every process at once.

        Raises:
            Left: In all of them, once it is kept, if one of them was asked to leave.
        """
        self._write()
        with tempfile.TemporaryDirectory(dir=self.scratch.name) as scratch:
            engine.save(Path(scratch))
            parts = engine.gather(self.writer.put_checkpoint(epoch, Path(scratch)))
        if self.is_main:
            files = {name: digest for part in parts for name, digest in part.items()}
            self.writer.commit_checkpoint(epoch, files, about_checkpoint(self.spec))
        self.kept_s = time.monotonic()
        if any(engine.gather(self.is_asked)):
            raise Left(f"trial {self.spec.trial_id()} was asked to leave, and goes on from epoch {epoch}")


def about_checkpoint(spec: TrialSpec) -> dict[str, Any]:
    """What decides whether a checkpoint can be continued."""
    named = {"trial_id": spec.trial_id(), "engine": spec.compute.engine, "workers": spec.compute.workers}
    return named | {name: value for name, value in provenance(spec).items() if name != "probes"}


def check_resumable(spec: TrialSpec, checkpoint: KeptCheckpoint) -> None:
    """Refuses a checkpoint of another trial, on another number of workers, or of other versions on another device.

    Its shards would not fit, or the numbers before and after it would not be of one kind.

    Raises:
        ValueError: If it is one.
    """
    wanted = about_checkpoint(spec)
    if checkpoint.about != wanted:
        differing = [
            f"{name}={checkpoint.about.get(name)!r} instead of {value!r}"
            for name, value in wanted.items()
            if checkpoint.about.get(name) != value
        ]
        raise ValueError(
            f"trial {spec.trial_id()} must continue from a checkpoint of its own, but the one of epoch "
            f"{checkpoint.epoch} has {', '.join(differing)}; delete the trial's checkpoints to train it from the start"
        )


def provenance(spec: TrialSpec) -> dict[str, Any]:
    """What else the numbers depend on."""
    return {
        "probes_id": spec.probes.probes_id(),
        "probes": spec.probes.model_dump_json(),
        "measure_versions": MEASURE_VERSIONS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.backends.cpu.get_cpu_capability() if is_on_cpu(spec) else torch.cuda.get_device_name(),
    }


def reset_peak_memory(on_cpu: bool) -> None:
    """Begins a new peak, for processes are reused from trial to trial."""
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(on_cpu: bool) -> float:
    """The peak of this process's device since it was reset: of its accelerator, or of its own memory."""
    if not on_cpu:
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes
