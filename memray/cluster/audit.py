"""Does what was planned, what the folders hold and what MLflow shows agree? Reads everything, changes nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from mlflow.entities import Metric, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from memray.cluster.ledger import Ledger, TrialFolder
from memray.cluster.storage import without_passwords
from memray.cluster.tracking import all_points, cell_measurements, points, shown
from memray.material import known_strings, source_of
from memray.measurement import remeasure
from memray.sample_measurement import remeasure_samples
from memray.sequence_measurement import BASE, OTHER, SequenceMeasurer, remeasure_sequence
from memray.spec import ProbesSpec, TrialSpec
from memray.sweep import Sweep


def audit(sweep: Sweep, ledger: Ledger, tracking_uri: str) -> list[str]:
    """A sentence for each difference; none if all agree.

    A trial that is not finished is one difference: the plan says it should be. Folders and runs of trials that the
    plan does not name are none: studies grow and shrink.

    Raises:
        ConnectionError: If MLflow cannot be reached.
    """
    try:
        return _differences(sweep, ledger, MlflowClient(tracking_uri))
    except MlflowException as error:
        raise ConnectionError(f"MLflow must answer at {without_passwords(tracking_uri)}, but said: {error}") from error


def _differences(sweep: Sweep, ledger: Ledger, client: MlflowClient) -> list[str]:
    experiment = client.get_experiment_by_name(sweep.name)
    runs: dict[tuple[str, str], list[Run]] = {}
    if experiment is not None:
        for run in client.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY, max_results=50_000):
            tags = run.data.tags
            key = tags.get("memray.trial_id") or tags.get("memray.cell_id") or sweep.name
            runs.setdefault((tags.get("memray.kind", ""), key), []).append(run)
    differences = []
    for trial in sweep.trials:
        folder, own = ledger.trial(trial.trial_id()), runs.get(("trial", trial.trial_id()), [])
        # What the ledger has lost cannot be compared with anything.
        found = list(_in_ledger(trial, folder)) or list(_in_mlflow(trial, folder, client, own))
        differences += [f"trial {trial.trial_id()}: {each}" for each in found]
    if not differences:
        for cell_id, trials in sweep.cells().items():
            found = _cell(trials, ledger, client, runs.get(("cell", cell_id), []))
            differences += [f"cell {cell_id}: {each}" for each in found]
        if len(parents := runs.get(("sweep", sweep.name), [])) != 1:
            differences.append(f"sweep {sweep.name}: MLflow should have exactly one parent run, but has {len(parents)}")
    return differences


def _in_ledger(trial: TrialSpec, folder: TrialFolder) -> Iterator[str]:
    state = folder.state()
    if state != "finished":
        yield f"is planned, but the ledger says {state}; run the sweep"
        return
    if folder.spec() != trial.canonical_json():
        yield "the folder holds the spec of another trial"
    if damages := folder.verify():
        yield from (each.partition(": ")[2] for each in damages)
        return
    measurements = folder.measurements()[0]
    if trial.curriculum is not None:
        stages, number = [each["stage"] for each in measurements], len(trial.stages())
        if stages != [0, *range(number)]:
            yield f"its stages should be 0 before training and then 0 to {number - 1}, each once, but are {stages[:20]}"
        return
    epochs = [each["epoch"] for each in measurements]
    if trial.corpus is not None:
        if epochs != sorted({*epochs}) or epochs[-1:] != [trial.num_epochs]:
            yield f"its probe epochs should ascend and end with {trial.num_epochs}, but are {epochs[:20]}"
        return
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
    created_ms = folder.created_ms()
    assert created_ms is not None  # a finished trial was claimed
    yield from _points(points(shown(folder.measurements()[0], trial), created_ms), client, run)


def _cell(trials: Sequence[TrialSpec], ledger: Ledger, client: MlflowClient, runs: list[Run]) -> Iterator[str]:
    """A cell run may cover more replicates than this plan names; then only the ledger of all of them could tell."""
    if len(runs) != 1:
        yield f"MLflow should have exactly one run of it, but has {len(runs)}"
        return
    folders = [ledger.trial(trial.trial_id()) for trial in trials]
    if len(runs[0].data.tags.get("memray.replicates", "").split(",")) == len(folders):
        created_ms = min(created_ms for folder in folders if (created_ms := folder.created_ms()) is not None)
        measurements = cell_measurements([folder.measurements()[0] for folder in folders])
        yield from _points(points(shown(measurements, trials[0]), created_ms), client, runs[0])


def _points(expected_points: Iterable[Metric], client: MlflowClient, run: Run) -> Iterator[str]:
    expected = Counter((each.key, each.step, each.timestamp, each.value) for each in expected_points)
    there = all_points(client, run, {key for key, *_ in expected})
    found = Counter((point.key, point.step, point.timestamp, point.value) for point in there)
    for what, points_ in (("lacks", expected - found), ("has beside the ledger's", found - expected)):
        if points_:
            key, step, _, value = min(points_)
            yield f"MLflow {what} {points_.total()} points, such as {key} = {value} at epoch {step}"


def remeasured(trial: TrialSpec, folder: TrialFolder) -> list[dict[str, Any]]:
    """The measurements of a finished trial, computed again from its records: per token, or the recall matrix.

    The probes are those that the trial was run with, whatever the study says by now.
    """
    finished = folder.finished()
    assert finished is not None
    probes = ProbesSpec.model_validate_json(finished.summary["probes"])
    spec = trial.model_copy(update={"probes": probes})
    if spec.curriculum is not None:
        return [each.record() for each in remeasure_sequence(_sequence_measurer(spec), folder.matrix())]
    if spec.corpus is not None:
        return [each.record() for each in remeasure_samples(spec, folder.samples())]
    tokens, strings = folder.tokens(), folder.strings()
    symbol_ids = np.array(strings["symbol_ids"][0].as_py())  # the same for every string of a trial
    source = source_of(spec)
    _, trained = known_strings(spec, source, symbol_ids, "trained")
    _, held_out = known_strings(spec, source, symbol_ids, "held_out")
    return [each.record() for each in remeasure(spec, trained, held_out, tokens, strings, folder.context())]


def _sequence_measurer(spec: TrialSpec) -> SequenceMeasurer:
    """Of a trial whose scores are not asked for again: which tokens stand for its symbols does not matter."""
    known = {}
    for source, strings in ((BASE, spec.strings), (OTHER, spec.other_strings())):
        if strings is not None:
            own = spec.model_copy(update={"strings": strings, "curriculum": None})
            drawn_from = source_of(own)
            _, known[source] = known_strings(own, drawn_from, np.arange(drawn_from.alphabet_size), "trained")
    return SequenceMeasurer(spec, known)
