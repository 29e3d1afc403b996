"""Does what was planned, what the folders hold and what MLflow shows agree? Reads everything, changes nothing."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient

from memray.cluster.ledger import Ledger, TrialFolder
from memray.cluster.tracking import points
from memray.measurement import remeasure
from memray.spec import ProbesSpec, TrialSpec
from memray.sweep import Sweep
from memray.trial import known_strings


def audit(sweep: Sweep, ledger: Ledger, tracking_uri: str) -> list[str]:
    """A sentence for each difference; none if all agree.

    A trial that is not finished is one difference: the plan says it should be. Folders and runs of trials that the
    plan does not name are none: studies grow and shrink.
    """
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(sweep.name)
    runs: dict[str, list[Run]] = {}
    if experiment is not None:
        found = client.search_runs(
            [experiment.experiment_id], "tags.`memray.kind` = 'trial'", ViewType.ACTIVE_ONLY, max_results=50_000
        )
        for run in found:
            runs.setdefault(run.data.tags.get("memray.trial_id", ""), []).append(run)
    differences = []
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        found = [*_in_ledger(trial, folder), *_in_mlflow(trial, folder, client, runs.get(trial.trial_id(), []))]
        differences += [f"trial {trial.trial_id()}: {each}" for each in found]
    return differences


def _in_ledger(trial: TrialSpec, folder: TrialFolder) -> Iterator[str]:
    state = folder.state()
    if state != "finished":
        yield f"is planned, but the ledger says {state}; run the sweep"
        return
    if folder.spec() != trial.canonical_json():
        yield "the folder holds the spec of another trial"
    yield from (each.partition(": ")[2] for each in folder.verify())
    epochs = [each["epoch"] for each in folder.measurements()[0]]
    if epochs != list(range(len(epochs))):
        yield f"its epochs should be 0 to {len(epochs) - 1}, each once, but are {epochs[:20]}"


def _in_mlflow(trial: TrialSpec, folder: TrialFolder, client: MlflowClient, runs: list[Run]) -> Iterator[str]:
    if folder.finished() is None:
        return
    if len(runs) != 1:
        yield f"MLflow should have exactly one run of it, but has {len(runs)}; `sync` sends a missing one"
        return
    (run,) = runs
    if run.info.status != "FINISHED":
        yield f"its MLflow run {run.info.run_id} should be FINISHED, but is {run.info.status}; `sync` catches up"
    expected = {name: str(value) for name, value in trial.params().items()}
    for name in sorted(expected.keys() | run.data.params.keys()):
        if expected.get(name) != run.data.params.get(name):
            yield f"param {name} should be {expected.get(name)!r}, but MLflow has {run.data.params.get(name)!r}"
    yield from _points(folder, client, run)


def _points(folder: TrialFolder, client: MlflowClient, run: Run) -> Iterator[str]:
    expected = Counter(
        (each.key, each.step, each.timestamp, each.value)
        for each in points(folder.measurements()[0], folder.created_ms())
    )
    keys = {key for key, *_ in expected} | run.data.metrics.keys()
    found = Counter(
        (point.key, point.step, point.timestamp, point.value)
        for key in keys
        for point in client.get_metric_history(run.info.run_id, key)
    )
    for what, points_ in (("lacks", expected - found), ("has beside the ledger's", found - expected)):
        if points_:
            key, step, _, value = min(points_)
            yield f"MLflow {what} {points_.total()} points, such as {key} = {value} at epoch {step}"


def remeasured(trial: TrialSpec, folder: TrialFolder) -> list[dict[str, Any]]:
    """The measurements of a finished trial, computed again from its per-token records.

    The probes are those that the trial was run with, whatever the study says by now.
    """
    finished = folder.finished()
    assert finished is not None
    probes = ProbesSpec.model_validate_json(finished.summary["probes"])
    spec = trial.model_copy(update={"probes": probes})
    tokens, strings = folder.tokens(), folder.strings()
    symbol_ids = np.array(strings["symbol_ids"][0].as_py())  # the same for every string of a trial
    _, trained = known_strings(spec, symbol_ids, "trained")
    _, held_out = known_strings(spec, symbol_ids, "held_out")
    return [each.record() for each in remeasure(spec, trained, held_out, tokens, strings)]
