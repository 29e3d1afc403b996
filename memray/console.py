"""What a person sees: the plan as a table, how a launch goes on, and where to look afterwards."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from memray.accelerators import accelerator
from memray.cost import cost
from memray.placement import num_probe_actors
from memray.spec import TrialSpec
from memray.sweep import Sweep

# A job log is no terminal, and a table cut at 80 columns helps nobody there.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# What a plan shows of every trial, whether it varies or not.
_IN_EVERY_PLAN = ("compute.engine", "compute.accelerator", "compute.workers", "compute.zero_stage", "compute.offload")


def plan_row(trial: TrialSpec, sweep: Sweep, state: str) -> dict[str, Any]:
    """One trial of a plan, as `plan --json` prints it."""
    estimate, params = cost(trial), trial.params()
    return {
        "trial_id": trial.trial_id(),
        "cell_id": trial.cell_id(),
        "varying": {name: params[name] for name in sweep.varying()},
        "engine": trial.compute.engine,
        "accelerator": trial.compute.accelerator,
        "devices": trial.compute.workers * trial.compute.device_share,
        "zero_stage": trial.compute.zero_stage if trial.compute.engine == "deepspeed" else None,
        "offload": trial.compute.offload if trial.compute.engine == "deepspeed" else None,
        "flops": estimate.flops,
        "probe_flops": estimate.probe_flops,
        "peak_gib": round(estimate.peak_gib, 3),
        "device_hours": estimate.device_hours,
        "placed": sweep.placements.get(trial.trial_id()),
        "state": state,
    }


def plan_table(rows: list[dict[str, Any]], sweep: Sweep) -> Table:
    """The rows of a plan for a person."""
    varying = [name for name in sweep.varying() if name not in _IN_EVERY_PLAN]
    table = Table(title=f"{sweep.name}: {sweep.question}", title_justify="left", caption_justify="left")
    for name in ("trial", *(name.rpartition(".")[2] for name in varying), "engine", "device"):
        table.add_column(name)
    for name in ("FLOPs", "GiB", "hours"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for row in rows:
        table.add_row(
            row["trial_id"],
            *(str(row["varying"][name]) for name in varying),
            _engine_of(row),
            row["accelerator"] if row["devices"] == 1 else f"{row['devices']:g} x {row['accelerator']}",
            f"{row['flops']:.2g}",
            f"{row['peak_gib']:.1f}",
            f"{row['device_hours']:.2g}",
            row["state"],
        )
    if any(trial.corpus is not None for trial in sweep.trials):
        # How many tokens a sample has its tokenizer knows, and costs do without: they decide where a trial is placed.
        table.caption = (
            "Costs are those of samples of corpus.max_tokens each, the longest that there can be; shorter ones take "
            "less."
        )
    return table


def _engine_of(row: dict[str, Any]) -> str:
    """The engine of a row, with what it shards and keeps off its devices."""
    said = [row["engine"]]
    if row["zero_stage"] is not None:
        said.append(f"ZeRO {row['zero_stage']}")
    if row["offload"] not in (None, "none"):
        said.append(f"{row['offload']} offloaded")
    return ", ".join(said)


def why_placed(sweep: Sweep) -> Iterator[str]:
    """A sentence for each reason that placed some of the trials."""
    by_reason: dict[str, list[str]] = {}
    for trial_id, why in sweep.placements.items():
        by_reason.setdefault(why, []).append(trial_id)
    for why, trial_ids in by_reason.items():
        yield f"{', '.join(trial_ids)}: {why}"


def where_probes_run(sweep: Sweep) -> str:
    """Who looks at the weights of probe epochs, on a cluster of this machine alone."""
    on_cpu = all(trial.compute.accelerator == "cpu" for trial in sweep.trials)
    threads = max(trial.compute.threads for trial in sweep.trials)
    number = num_probe_actors((os.cpu_count() or 1) // threads, sweep.trials) if on_cpu else 0
    if number:
        return f"On this machine alone, {number} actors score the snapshots of probe epochs, beside the trials."
    why = (
        f"it has {os.cpu_count()} cores, and actors that score snapshots need three devices, or one that is idle"
        if on_cpu
        else "its accelerators are the trials'"
    )
    return f"On this machine alone, probes run inside the trials: {why}. On a cluster --probe-actors says how many."


def what_overfills_memory(sweep: Sweep) -> Iterator[str]:
    """A sentence where as many trials as this machine has cores for may together take more than its memory."""
    on_cpu = [trial for trial in sweep.trials if trial.compute.accelerator == "cpu"]
    if not on_cpu:
        return
    has = accelerator("cpu").memory_gib
    side_by_side = (os.cpu_count() or 1) // min(trial.compute.threads for trial in on_cpu)
    peaks = sorted((cost(trial).peak_gib * trial.compute.workers for trial in on_cpu), reverse=True)
    if (needed := sum(peaks[:side_by_side])) > has:
        yield (
            f"Side by side on this machine alone, the largest trials may take {needed:.1f} GiB, and it has {has:.1f}: "
            "Ray would end some of them. Run fewer with --max-concurrent, or give more threads to each."
        )


def say_where(mirror: Any, lag: int, sweep: str, parameters: list[str] | None, storage: str) -> None:
    """Where the runs can be compared, or how far MLflow lags and the command that catches up."""
    arguments = " ".join([sweep, *(f"-p {each}" for each in parameters or []), f"--storage {storage}"])
    uri = mirror.shown_uri
    if lag or mirror.error is not None:
        err.print(
            f"MLflow at {uri} lacks {lag} finished trials ({mirror.why()}); the ledger holds them. Catch up with:\n"
            f"  python -m memray sync {arguments} --tracking-uri {uri}",
            markup=False,
        )
        return
    server = uri
    if uri.startswith("sqlite"):
        server = "http://127.0.0.1:5000"
        out.print(f"MLflow: mlflow server --backend-store-uri {uri} --host 127.0.0.1 --port 5000", soft_wrap=True)
    for what, page in mirror.pages().items():
        out.print(f"{what}: {server}{page}", soft_wrap=True, markup=False)


class Watching:
    """Tells the person, and the mirror, how a launch goes on."""

    def __init__(self, sweep: Sweep, mirror: Any, progress: Progress | None) -> None:
        self.mirror = mirror
        self.progress = progress
        self.epochs = {trial.trial_id(): trial.num_epochs for trial in sweep.trials}
        self.reached: dict[str, int] = {}
        self.ended_trials = 0
        self.total = 0
        self.began_s = time.monotonic()

    def began(self, trials: int, concurrency: int) -> None:
        self.total, self.began_s = trials, time.monotonic()
        self.says(f"{trials} trials to run, {concurrency} at a time")
        if self.progress:
            self.bar = self.progress.add_task("trials", total=trials)

    def advanced(self, trial_id: str, epoch: int) -> None:
        self.reached[trial_id] = epoch
        self.mirror.touch(trial_id)

    def ended(self, trial_id: str, state: str) -> None:
        self.mirror.touch(trial_id)
        self.ended_trials += 1
        if self.progress:
            self.progress.advance(self.bar)
        elapsed = time.monotonic() - self.began_s
        left = elapsed / self.ended_trials * (self.total - self.ended_trials)
        if not self.progress or state == "failed":
            self.says(
                f"{self.ended_trials}/{self.total} {trial_id} {state}, {elapsed:.0f} s elapsed, about {left:.0f} s left"
            )

    def lag(self) -> int:
        return self.mirror.lag()

    def says(self, text: str) -> None:
        console = self.progress.console if self.progress else out
        console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def watcher(sweep: Sweep, mirror: Any) -> Iterator[Watching]:
    """A progress bar on a terminal, plain lines in a job log."""
    if not sys.stdout.isatty():
        yield Watching(sweep, mirror, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=out) as progress:
        yield Watching(sweep, mirror, progress)
