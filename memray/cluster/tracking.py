"""MLflow as a view of the ledger: sent after the fact, sent again without effect, rebuilt when it is lost.

One experiment a sweep, one parent run, one child run a trial, and one child run a cell, because MLflow cannot
average seeds. A point's timestamp derives from the trial's first claim and its epoch, so that MLflow's own key of a
metric row makes a second sending a no-op. Creating a run has no such key: it is looked up by tag first, by the one
writer of a launch, and its id is kept in the trial's folder.

Nothing here trains, and nothing that trains waits for it.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlencode

# Set before the import: no word to anybody, and no retries, for those of the client would make a run twice where the
# answer to its creation is lost. The mirror tries again, and looks up first what is there.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password that may stand in it

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from memray.cluster.documents import START, Cursor
from memray.cluster.ledger import Ledger, State, TrialFolder
from memray.cluster.storage import without_passwords
from memray.corpora import CorpusSpec, name_of
from memray.measures.phases import DURATIONS, centre
from memray.measures.statistics import median_interval
from memray.spec import TrialSpec
from memray.sweep import Sweep

# Connections that MLflow's client keeps to a server.
CALLS_AT_ONCE = 10
# Lines that a chart can bear, and runs that a link can name.
CELLS_PER_PAGE = 20
# Stages of a curriculum that a chart can bear.
STAGES_SHOWN = 200
# Measures that stand at the last epoch of each trial alone.
AT_LAST = ("phase/", "order/")
# The tag that holds the traceback of a trial that failed.
FAILURE = "memray.failure"
T = TypeVar("T")
R = TypeVar("R")


class Tracker:
    """The one writer of a sweep's experiment.

    Args:
        tags: Set on every trial's run, e.g. the git commit and the versions of packages.
        trusts_notes: Whether a trial that was noted as sent is left alone; otherwise everything is sent again, which
            changes nothing that is there.

    Raises:
        MlflowException, OSError: If the server cannot be reached (as does every method).
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        tracking_uri: str,
        *,
        tags: Mapping[str, str] | None = None,
        trusts_notes: bool = True,
    ) -> None:
        self.sweep = sweep
        self.ledger = ledger
        self.uri = tracking_uri
        self.noted_uri = without_passwords(tracking_uri)
        self.tags = dict(tags or {})
        self.trusts_notes = trusts_notes
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        # A server has many workers; a file has one writer.
        self.calls_at_once = CALLS_AT_ONCE if tracking_uri.startswith("http") else 1
        self.client = MlflowClient(tracking_uri)
        self.experiment_id = self._experiment()
        self.runs = self.existing_runs()
        self.parent_id = self._parent()
        self.cursors: dict[str, Cursor] = {}
        self.failed = {run.info.run_id for run in self.runs.values() if FAILURE in run.data.tags}
        self.ended: set[str] = set()  # runs that this tracker has brought to their end

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.sweep.name)
        if found is not None and found.lifecycle_stage == "active":
            return found.experiment_id
        # With SQLite the artifacts stand beside the database; a server decides for itself.
        location = None
        if self.uri.startswith("sqlite:///"):
            folder = Path(self.uri.removeprefix("sqlite:///")).absolute().parent
            location = (folder / "mlartifacts" / self.sweep.name).as_uri()
        tags = {"mlflow.note.content": self.sweep.question}
        try:
            return self.client.create_experiment(self.sweep.name, artifact_location=location, tags=tags)
        except MlflowException:
            found = self.client.get_experiment_by_name(self.sweep.name)
            if found is None or found.lifecycle_stage != "active":
                raise
            return found.experiment_id

    def existing_runs(self) -> dict[tuple[str, str], Run]:
        """Runs by (kind, key), where the key is the trial's, the cell's or the sweep's.

        A second run of one key is deleted: where an answer comes too late, or two clusters share a bucket, one may have
        been made. Whoever looks keeps the same of the two.
        """
        found: dict[tuple[str, str], list[Run]] = {}
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment_id], run_view_type=ViewType.ACTIVE_ONLY, max_results=1000,
                                           page_token=token)  # fmt: skip
            for run in page:
                tags = run.data.tags
                key = tags.get("memray.trial_id") or tags.get("memray.cell_id") or self.sweep.name
                found.setdefault((tags.get("memray.kind", ""), key), []).append(run)
            token = page.token
            if not token:
                break
        for (kind, _), same in found.items():
            same.sort(key=lambda run: run.info.run_id)
            for run in same[1:] if kind else ():
                self.client.delete_run(run.info.run_id)
        return {key: same[0] for key, same in found.items()}

    def _run_id(self, kind: str, key: str, name: str, tags: Mapping[str, str], created_ms: int | None = None) -> str:
        """The run of that key, created only if the look-up found none."""
        run = self.runs.get((kind, key))
        if run is None:
            all_tags = {"memray.kind": kind, **tags}
            run = self.client.create_run(self.experiment_id, start_time=created_ms, tags=all_tags, run_name=name)
            self.runs[kind, key] = run
        return run.info.run_id

    def _parent(self) -> str:
        return self._run_id("sweep", self.sweep.name, self.sweep.name, {"mlflow.note.content": self.sweep.question})

    # --- trials --------------------------------------------------------------------------------------------

    def send_all(self, trials: Iterable[TrialSpec]) -> list[bool]:
        """Sends what is new of different trials side by side: whether nothing more can come, of each.

        Raises:
            ValueError: If a trial's folder is damaged, once the others are sent (as does `send_cells`).
        """
        return self._side_by_side(self.send, trials)

    def _side_by_side(self, send: Callable[[T], R], items: Iterable[T]) -> list[R]:
        damaged: list[ValueError] = []

        def tried(item: T) -> R | None:
            try:
                return send(item)
            except ValueError as error:
                damaged.append(error)
                return None

        with ThreadPoolExecutor(self.calls_at_once) as pool:
            results = list(pool.map(tried, items))
        if damaged:
            raise damaged[0]
        return cast("list[R]", results)

    def send(self, trial: TrialSpec) -> bool:
        """Sends what the folder of a trial holds and the server lacks; True once nothing more can come."""
        folder = self.ledger.trial(trial.trial_id())
        sent = folder.noted("mlflow") or {}
        run = self.runs.get(("trial", trial.trial_id()))
        is_known = False
        is_ours = run is not None and sent.get("run_id") == run.info.run_id and sent.get("uri") == self.noted_uri
        if self.trusts_notes and run is not None and is_ours:
            if sent.get("complete") and self._has_ended(run):
                return True
            is_known = True
        state = folder.state()
        created_ms = folder.created_ms()
        if created_ms is None:
            return False
        if run is not None and run.info.start_time != created_ms:
            # It shows another ledger's attempt at this trial, whose points would stand beside ours.
            self.client.delete_run(run.info.run_id)
            del self.runs["trial", trial.trial_id()]
            is_known = False
        run_id = self._run_id(
            "trial",
            trial.trial_id(),
            trial_name(trial, self.sweep.varying()),
            {
                "memray.trial_id": trial.trial_id(),
                "memray.cell_of": trial.cell_id(),
                "mlflow.parentRunId": self.parent_id,
                **self.tags,
            },
            created_ms,
        )
        measurements, end = folder.measurements(self.cursors.get(folder.trial_id, START))
        tags: dict[str, str] = {}
        if state == "finished":
            tags = self._send_rest(run_id, trial, folder)
        elif state == "failed" and (failure := folder.failure()) is not None:
            tags = {FAILURE: failure[-4000:]}
        self._log(run_id, points(shown(measurements, trial), created_ms), {} if is_known else trial.params(), tags)
        self.cursors[folder.trial_id] = end
        if state == "finished":
            self._end(run_id, folder)
        elif FAILURE in tags:
            self.failed.add(run_id)
            self.client.set_terminated(run_id, "FAILED")
        elif run_id in self.failed:
            self._forget_failure(run_id)
            self.client.update_run(run_id, status="RUNNING")
        note = {"uri": self.noted_uri, "run_id": run_id} | ({"complete": True} if state == "finished" else {})
        if note != sent:
            folder.note("mlflow", note)
        return state == "finished"

    def _log(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """In as few calls as MLflow allows, for calls are what a sweep of many trials waits for."""
        if metrics or params or tags:
            self.client.log_batch(
                run_id,
                metrics=metrics,
                params=[Param(name, str(value)) for name, value in (params or {}).items()],
                tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            )

    def _send_rest(self, run_id: str, trial: TrialSpec, folder: TrialFolder) -> dict[str, str]:
        """Sends what a finished trial has beside its points and params, and returns the tags that belong to it."""
        finished = folder.finished()
        assert finished is not None
        with tempfile.TemporaryDirectory() as scratch:
            tables = {"tokens": folder.tokens(), "strings": folder.strings(), "context": folder.context(),
                      "matrix": folder.matrix(), "samples": folder.samples()}  # fmt: skip
            for name, table in tables.items():
                if table.num_columns == 0:
                    continue
                path = Path(scratch) / f"{name}.parquet"
                pq.write_table(table, path, compression="zstd")
                self.client.log_artifact(run_id, str(path))
        if trial.corpus is not None:
            self.client.log_inputs(run_id, datasets=[_dataset(trial.corpus, finished.summary["corpus"])])
        return {
            "memray.measurements_sha256": finished.measurements_sha256,
            "memray.attempt": str(finished.attempt),
            **{f"memray.{key}": _tag(value) for key, value in finished.summary.items()},
        }

    def _end(self, run_id: str, folder: TrialFolder) -> None:
        finished = folder.finished()
        assert finished is not None
        if run_id in self.failed:
            self._forget_failure(run_id)
        self.client.set_terminated(run_id, "FINISHED", end_time=finished.finished_ms)
        self.ended.add(run_id)

    def _forget_failure(self, run_id: str) -> None:
        """Of an earlier attempt at a trial that was claimed again."""
        self.client.delete_tag(run_id, FAILURE)
        self.failed.remove(run_id)

    # --- cells ---------------------------------------------------------------------------------------------

    def send_cells(self, cell_ids: Iterable[str]) -> None:
        """Sends the runs of different cells side by side."""
        self._side_by_side(self.send_cell, cell_ids)

    def send_cell(self, cell_id: str) -> None:
        """The run of a cell, once all its replicates are finished: medians over its trials, epoch by epoch.

        A cell that has gained a replicate is another cell run: points cannot be taken back, so the old run goes.
        """
        trials = self.sweep.cells()[cell_id]
        folders = [self.ledger.trial(trial.trial_id()) for trial in trials]
        finished = [each for each in (folder.finished() for folder in folders) if each is not None]
        if len(finished) < len(trials):
            return
        replicates = sorted(each.measurements_sha256[:16] for each in finished)
        old = self.runs.get(("cell", cell_id))
        if old is not None:
            # A run over these replicates and more is left alone: the study was asked for with fewer seeds this time.
            if set(replicates) <= set(old.data.tags.get("memray.replicates", "").split(",")) and self._has_ended(old):
                return
            self.client.delete_run(old.info.run_id)
            del self.runs["cell", cell_id]
        self._send_cell(cell_id, trials, folders, ",".join(replicates))

    def _has_ended(self, run: Run) -> bool:
        """Whether a run was sent to its end; what a launch that was killed left is begun anew."""
        return run.info.run_id in self.ended or run.info.status == "FINISHED"

    def _send_cell(
        self, cell_id: str, trials: Sequence[TrialSpec], folders: Sequence[TrialFolder], replicates: str
    ) -> None:
        created_ms = min(created_ms for folder in folders if (created_ms := folder.created_ms()) is not None)
        tags = {
            "memray.cell_id": cell_id,
            "memray.replicates": replicates,
            "mlflow.parentRunId": self.parent_id,
            **self.tags,
        }
        name = "cell " + trial_name(trials[0], [name for name in self.sweep.varying() if not name.endswith("_seed")])
        run_id = self._run_id("cell", cell_id, name, tags, created_ms)
        params = {name: "none" if name.endswith("_seed") else value for name, value in trials[0].params().items()}
        records = [folder.measurements()[0] for folder in folders]
        self._log(run_id, points(shown(cell_measurements(records), trials[0]), created_ms), params)
        self.client.set_terminated(run_id, "FINISHED", end_time=created_ms)
        self.ended.add(run_id)

    # --- the parent ----------------------------------------------------------------------------------------

    def close(self, write_figures: Callable[[Path], None], *, failed: int, left: int) -> None:
        """Writes the sweep's figures and table to the parent run, unless they are there for these very results."""
        with ThreadPoolExecutor(16) as pool:
            finished = list(pool.map(lambda trial: self.ledger.trial(trial.trial_id()).finished(), self.sweep.trials))
        digests = [each.measurements_sha256 if each else "" for each in finished]
        digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        parent = self.client.get_run(self.parent_id)
        if parent.data.tags.get("memray.results") != digest:
            with tempfile.TemporaryDirectory() as scratch:
                write_figures(Path(scratch))
                self.client.log_artifacts(self.parent_id, scratch)
            num_finished = sum(each is not None for each in finished)
            tags = {"memray.results": digest, "memray.finished_trials": str(num_finished),
                    "memray.trials": str(len(finished))}  # fmt: skip
            self._log(self.parent_id, tags=tags)
        status = "FAILED" if failed else "KILLED" if left else "FINISHED"
        if parent.info.status != status:
            self.client.set_terminated(self.parent_id, status)

    def log_folder(self, folder: Path, name: str) -> None:
        """Puts a folder's files among the artifacts of the parent run, unless these very files are there already."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if self.client.get_run(self.parent_id).data.tags.get(f"memray.{name}") != digest:
            self.client.log_artifacts(self.parent_id, str(folder), name)
            self.client.set_tag(self.parent_id, f"memray.{name}", digest)

    def pages(self) -> dict[str, str]:
        """Where to look in MLflow, by what is seen there; paths below the server's address.

        The page of all runs shows the parent alone until it is unfolded, so the cells' curves have a page of their own.
        """
        pages = {"all runs (unfold the sweep's)": f"/#/experiments/{self.experiment_id}/runs?compareRunsMode=CHART"}
        cells = [
            self.runs["cell", cell_id].info.run_id for cell_id in self.sweep.cells() if ("cell", cell_id) in self.runs
        ]
        if cells:
            key = "recall/robust" if self.sweep.trials[0].corpus is None else "match/mean"
            query = {"runs": cells[:CELLS_PER_PAGE], "metric": key, "experiments": [self.experiment_id],
                     "plot_metric_keys": [key]}  # fmt: skip
            encoded = urlencode({name: json.dumps(value, separators=(",", ":")) for name, value in query.items()})
            pages = {f"{key} by epoch, a line a cell": f"/#/metric?{encoded}"} | pages
        return pages


def trial_name(trial: TrialSpec, varying: Sequence[str]) -> str:
    """What tells a trial from the others of its sweep, for people."""
    params = trial.params()
    return " ".join(f"{name.rpartition('.')[2]}={params[name]}" for name in varying) or trial.trial_id()


def shown(measurements: Iterable[Mapping[str, Any]], trial: TrialSpec) -> list[Mapping[str, Any]]:
    """Of a trial's measurements those that MLflow is sent: of a long curriculum every so many stages, and the last."""
    num_stages = len(trial.stages())
    stride = max(1, math.ceil(num_stages / STAGES_SHOWN))
    return [each for each in measurements if each["stage"] % stride == 0 or each["stage"] == num_stages - 1]


def points(measurements: Iterable[Mapping[str, Any]], created_ms: int) -> list[Metric]:
    """The metric rows of some measurements: one second an epoch after the trial's first claim."""
    return [
        Metric(key, value, created_ms + 1000 * each["epoch"], each["epoch"])
        for each in measurements
        for key, value in each["metrics"].items()
    ]


def cell_measurements(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Median over replicates by epoch and key, with `/low` and `/high` (see `median_interval`) and their counts.

    A phase that some replicates never reached counts as infinitely late: where the median itself is censored,
    the key is absent and the number of censored replicates says why. A curve is drawn as far as all replicates go.
    """
    merged = []
    for stage, epoch, present in _aligned(replicates):
        metrics: dict[str, float] = {}
        if len(present) == len(replicates):
            keys = dict.fromkeys(key for each in present for key in each)
            # The phases stand at each replicate's own last epoch, which `stop_when` may have moved: see below. Those of
            # a curriculum stand at the end of each stage.
            keys = [key for key in keys if not key.startswith(AT_LAST) or _has_stages(replicates)]
            for key in keys:
                metrics |= _over_replicates(key, np.array([each.get(key, np.nan) for each in present]))
        merged.append({"stage": stage, "epoch": epoch, "metrics": metrics})
    last = [records[-1]["metrics"] for records in replicates if records]
    if merged:
        merged[-1]["metrics"] = merged[-1]["metrics"] | _last_of_all(last)
        merged[-1]["metrics"] |= {"cell/replicates": float(len(replicates)), **_censored(last)}
    return merged


def _aligned(
    replicates: Sequence[Sequence[Mapping[str, Any]]],
) -> Iterator[tuple[int, int, list[Mapping[str, float]]]]:
    """The metrics of those replicates that have an epoch, by stage and epoch; of a curriculum, that have a stage.

    Stages that end with a criterion have as many epochs as each replicate needs: the latest stands for all.
    """
    by_place: dict[int, list[Mapping[str, Any]]] = {}
    for records in replicates:
        for index, each in enumerate(records):
            by_place.setdefault(index if _has_stages(replicates) else each["epoch"], []).append(each)
    for place in sorted(by_place):
        present = by_place[place]
        yield present[0]["stage"], max(each["epoch"] for each in present), [each["metrics"] for each in present]


def _has_stages(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    return any(each["stage"] > 0 for records in replicates for each in records)


def _over_replicates(key: str, values: np.ndarray) -> dict[str, float]:
    if key not in DURATIONS and not np.isfinite(values).all():
        return {}
    low, high = median_interval(values)
    found = {key: centre(key, values), f"{key}/low": low, f"{key}/high": high}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _last_of_all(last: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The phases of all replicates."""
    keys = dict.fromkeys(key for each in last for key in each if key.startswith(AT_LAST))
    merged: dict[str, float] = {}
    for key in keys:
        merged |= _over_replicates(key, np.array([each.get(key, np.nan) for each in last]))
    return merged


def _censored(last: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {f"{key}/censored": float(sum(key not in each for each in last)) for key in DURATIONS}


def _dataset(corpus: CorpusSpec, about: Mapping[str, Any]) -> DatasetInput:
    """What a trial was trained on, as MLflow lists it: named by the digest of its exact token ids.

    MLflow cuts a digest at 36 characters; the whole stands in the profile.
    """
    rows = corpus.rows
    kind = "generator" if rows.generator else "file" if rows.path else "hub"
    dataset = Dataset(
        name=Path(name_of(rows)).name if rows.path else name_of(rows),
        digest=str(about["sha256"])[:32],
        source_type=kind,
        source=corpus.model_dump_json(exclude_defaults=True),
        profile=json.dumps(dict(about)),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _tag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _untag(tag: str) -> Any:
    """What a tag was made of; a text that is no JSON stands for itself."""
    try:
        return json.loads(tag)
    except ValueError:
        return tag


def _ledger_of(sweep: Sweep, storage: str | None) -> Ledger:
    return Ledger(storage or os.environ.get("MEMRAY_STORAGE", "runs"), sweep.name, probes_ids=sweep.probes_ids())


def results(sweep: Sweep, *, storage: str | None = None, tracking_uri: str | None = None) -> pd.DataFrame:
    """What a sweep has measured: one row a trial and epoch, params and metrics as columns.

    Args:
        storage: Where the ledger is; `MEMRAY_STORAGE` or `./runs` if not given. Its finished trials are read.
        tracking_uri: Read MLflow instead, where the ledger is out of reach.
    """
    if tracking_uri is not None:
        return _results_from_mlflow(sweep, tracking_uri)
    ledger = _ledger_of(sweep, storage)
    rows = []
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        if folder.finished() is None:
            continue
        named = {"trial_id": trial.trial_id(), "cell_id": trial.cell_id(), **trial.params()}
        measurements = folder.measurements()[0]
        rows += [named | {"stage": each["stage"], "epoch": each["epoch"], **each["metrics"]} for each in measurements]
    return pd.DataFrame(rows)


# What a finished trial says that it took; `Recorder` and `DeepSpeedEngine.communication` write it.
COSTS = ("seconds", "tokens_per_s", "peak_gib", "communication_gib", "communication_s")


def costs(sweep: Sweep, *, storage: str | None = None) -> pd.DataFrame:
    """What the finished trials of a sweep took: one row each, params and costs as columns, nan where one is unknown.

    They differ from run to run, so that they are no measurements; in MLflow they are tags.

    Args:
        storage: Where the ledger is; `MEMRAY_STORAGE` or `./runs` if not given.
    """
    ledger = _ledger_of(sweep, storage)
    rows = []
    for trial in sweep.trials:
        finished = ledger.trial(trial.trial_id()).finished()
        if finished is not None:
            taken = {name: float(finished.summary.get(name, "nan")) for name in COSTS}
            rows.append({"trial_id": trial.trial_id(), "cell_id": trial.cell_id(), **trial.params(), **taken})
    return pd.DataFrame(rows, columns=None if rows else ["trial_id", "cell_id", *COSTS])


def states(sweep: Sweep, tracking_uri: str) -> dict[str, State]:
    """Where the trials of a sweep stand as far as MLflow was told, for where the ledger is out of reach.

    Raises:
        ConnectionError: If MLflow does not answer.
        ValueError: If it knows nothing of the sweep.
    """
    _, runs = _trials_in_mlflow(sweep, tracking_uri)
    told: dict[str, State] = {"FINISHED": "finished", "FAILED": "failed"}
    return {
        trial.trial_id(): told.get(runs[trial.trial_id()].info.status, "running")
        if trial.trial_id() in runs
        else "planned"
        for trial in sweep.trials
    }


def summaries(sweep: Sweep, tracking_uri: str) -> list[dict[str, Any]]:
    """What the finished trials of a sweep ended with, as far as MLflow was told."""
    _, runs = _trials_in_mlflow(sweep, tracking_uri)
    finished = [run.data.tags for run in runs.values() if run.info.status == "FINISHED"]
    return [
        {name.removeprefix("memray."): _untag(tag) for name, tag in tags.items() if name.startswith("memray.")}
        for tags in finished
    ]


def _trials_in_mlflow(sweep: Sweep, tracking_uri: str) -> tuple[MlflowClient, dict[str, Run]]:
    """A client, and the runs of the sweep's trials by their ids."""
    client = MlflowClient(tracking_uri)
    try:
        experiment = client.get_experiment_by_name(sweep.name)
        if experiment is None:
            where = without_passwords(tracking_uri)
            raise ValueError(f"no experiment {sweep.name!r} at {where}; run the sweep, or name another tracking URI")
        query = "tags.`memray.kind` = 'trial'"
        runs, page = [], client.search_runs([experiment.experiment_id], query, max_results=1000)
        while page:
            runs += page
            page = page.token and client.search_runs(
                [experiment.experiment_id], query, max_results=1000, page_token=page.token
            )
    except MlflowException as error:
        raise ConnectionError(f"MLflow at {without_passwords(tracking_uri)} does not answer: {error}") from error
    wanted = {trial.trial_id() for trial in sweep.trials}
    by_id = {run.data.tags.get("memray.trial_id", ""): run for run in runs}
    return client, {trial_id: run for trial_id, run in by_id.items() if trial_id in wanted}


def all_points(client: MlflowClient, run: Run, keys: Iterable[str] = ()) -> list[Metric]:
    """All points of a run by the metrics that it is known to have, and by others.

    MLflow gives the history of one metric a call, so that many calls are made side by side.
    """
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        histories = pool.map(
            lambda key: client.get_metric_history(run.info.run_id, key), sorted({*run.data.metrics, *keys})
        )
        return [point for history in histories for point in history]


def _results_from_mlflow(sweep: Sweep, tracking_uri: str) -> pd.DataFrame:
    client, runs = _trials_in_mlflow(sweep, tracking_uri)
    rows = []
    for trial_id, run in runs.items():
        trial = sweep.trial(trial_id)
        if run.info.status != "FINISHED":
            continue
        epochs: dict[int, dict[str, float]] = {}
        for point in all_points(client, run):
            epochs.setdefault(point.step, {})[point.key] = point.value
        named = {"trial_id": trial.trial_id(), "cell_id": trial.cell_id(), **trial.params()}
        # MLflow knows no stages; of a curriculum the first measurement is of the weights before training.
        stages = [0, *range(len(trial.stages()))] if trial.curriculum else [0] * len(epochs)
        sent = shown([{"stage": stage} for stage in stages], trial)
        rows += [
            named | dict(each) | {"epoch": epoch, **epochs[epoch]}
            for each, epoch in zip(sent, sorted(epochs), strict=True)
        ]
    return pd.DataFrame(rows)
