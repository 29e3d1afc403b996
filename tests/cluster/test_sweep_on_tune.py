"""The main job on real parts: Ray Tune, the ledger, MLflow and the command line."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.fs as pa_fs
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from memray.cli import app
from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger
from memray.cluster.tracking import results
from memray.report.page import write_report
from memray.trial import run_trial

from .conftest import STUDY, StudyFolder, attempts_of, client_of, make_study_folder, runs_of, sweep_of


def copy_of(finished: StudyFolder, folder: Path) -> StudyFolder:
    """The same sweep elsewhere, with an MLflow that knows it by its new place."""
    shutil.copytree(finished.folder, folder, dirs_exist_ok=True)
    return StudyFolder(folder)


def test_a_sweep_leaves_one_run_a_trial_a_cell_and_a_parent(finished: StudyFolder) -> None:
    sweep = sweep_of(finished)
    trials, cells, parents = (runs_of(finished, kind) for kind in ("trial", "cell", "sweep"))
    assert {run.data.tags["memray.trial_id"] for run in trials} == {trial.trial_id() for trial in sweep.trials}
    assert len(trials) == 4
    assert {run.data.tags["memray.cell_id"] for run in cells} == set(sweep.cells())
    assert len(cells) == 2
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in trials + cells} == {parents[0].info.run_id}
    assert {run.info.status for run in trials + cells + parents} == {"FINISHED"}


def test_every_run_carries_the_same_params_and_trials_carry_their_spec(finished: StudyFolder) -> None:
    by_id = {trial.trial_id(): trial for trial in sweep_of(finished).trials}
    keys = set()
    for run in runs_of(finished, "trial") + runs_of(finished, "cell"):
        keys.add(frozenset(run.data.params))
        if trial := by_id.get(run.data.tags.get("memray.trial_id", "")):
            assert run.data.params == {name: str(value) for name, value in trial.params().items()}
    assert len(keys) == 1


def test_mlflow_holds_every_measurement_at_its_epoch_once(finished: StudyFolder) -> None:
    ledger, client = Ledger(str(finished.storage), "small"), client_of(finished)
    for run in runs_of(finished, "trial"):
        folder = ledger.trial(run.data.tags["memray.trial_id"])
        expected = {
            (key, each["epoch"]): value for each in folder.measurements()[0] for key, value in each["metrics"].items()
        }
        found = [
            (point.key, point.step, point.value)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        assert len(found) == len(expected)
        assert {(key, step): value for key, step, value in found} == expected


def test_a_cell_shows_the_median_of_its_replicates(finished: StudyFolder) -> None:
    frame = results(sweep_of(finished), storage=str(finished.storage))
    client = client_of(finished)
    for run in runs_of(finished, "cell"):
        own = frame[frame.cell_id == run.data.tags["memray.cell_id"]]
        for epoch, rows in own.groupby("epoch"):
            values = np.asarray(rows["recall/nll_nats"])
            for suffix, expected in (("", np.median(values)), ("/low", values.min()), ("/high", values.max())):
                history = client.get_metric_history(run.info.run_id, f"recall/nll_nats{suffix}")
                assert [each.value for each in history if each.step == epoch] == pytest.approx([expected])
        assert run.data.metrics["cell/replicates"] == 2
        assert run.data.metrics["phase/epochs_to_robust_90/censored"] == 2


def test_tables_and_figures_are_artifacts(finished: StudyFolder) -> None:
    client = client_of(finished)
    for run in runs_of(finished, "trial"):
        assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"tokens.parquet", "strings.parquet"}
        tokens = pd.read_parquet(client.download_artifacts(run.info.run_id, "tokens.parquet"))
        assert len(tokens[~tokens.is_held_out]) == 9 * 23
    (parent,) = runs_of(finished, "sweep")
    assert "recall.png" in {each.path for each in client.list_artifacts(parent.info.run_id)}


def test_a_trial_gives_the_same_bits_in_a_process_of_its_own_and_in_a_reused_actor(finished: StudyFolder) -> None:
    ledger, sweep = Ledger(str(finished.storage), "small"), sweep_of(finished)
    for trial in sweep.trials:
        recorded, _ = ledger.trial(trial.trial_id()).measurements()
        assert [each.record() for each in run_trial(trial)] == recorded
    last = sweep.trials[-1].trial_id()
    lines = finished.run("trial", last).stdout.splitlines()
    assert [json.loads(line) for line in lines] == ledger.trial(last).measurements()[0]


def test_running_a_finished_sweep_again_adds_nothing(finished: StudyFolder) -> None:
    tables = ("runs", "metrics", "params", "experiments", "latest_metrics")
    before = {table: finished.count(table) for table in tables}
    done = finished.run("run")
    assert "/#/metric?runs=" in done.stdout
    assert {table: finished.count(table) for table in tables} == before
    assert set(attempts_of(finished).values()) == {1}
    assert "trials to run" not in done.stdout


NO_MODEL_LIBRARY = """
import sys
from memray.cli import app
app(sys.argv[1:], standalone_mode=False)
assert "memray.cluster.launch" in sys.modules
assert not (heavy := {"torch", "transformers", "deepspeed"} & {*sys.modules}), heavy
"""


def test_a_driver_draws_and_shows_results_without_a_model_library(finished: StudyFolder, tmp_path: Path) -> None:
    """To import them takes seconds; trials do so in their own processes."""
    copy, elsewhere = copy_of(finished, tmp_path / "copy"), f"sqlite:///{tmp_path}/mlflow.db"
    words = copy.command("run", "--tracking-uri", elsewhere)[3:]
    subprocess.run([sys.executable, "-c", NO_MODEL_LIBRARY, *words], check=True, timeout=240, **copy.options())
    client = MlflowClient(elsewhere)
    (experiment,) = client.search_experiments(filter_string="name = 'small'")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`memray.kind` = 'sweep'")
    assert "recall.png" in {each.path for each in client.list_artifacts(parent.info.run_id)}


def test_a_finished_sweep_agrees_with_its_plan_ledger_and_mlflow(finished: StudyFolder) -> None:
    assert "0 differences" in finished.invoke("audit").stdout
    assert "0 differ" in finished.invoke("remeasure").stdout
    assert "4 finished, 0 running, 0 failed, 0 planned" in finished.invoke("status").stdout


def test_status_and_report_need_mlflow_alone(finished: StudyFolder, tmp_path: Path) -> None:
    elsewhere = replace(make_study_folder(tmp_path / "elsewhere"), uri=str(tmp_path / "nothing"))
    options = ("--from-mlflow", "--tracking-uri", f"sqlite:///{finished.database}")
    assert "4 finished, 0 running, 0 failed, 0 planned" in elsewhere.invoke("status", *options).stdout
    more = elsewhere.invoke("status", "-p", "seeds=3", *options)
    assert "4 finished, 0 running, 0 failed, 2 planned" in more.stdout
    said = elsewhere.invoke("report", *options).stdout
    page = Path(said.partition("report: ")[2].strip()).read_text()
    assert f"MLflow at sqlite:///{finished.database}, which has no single tokens" in page
    other, *_ = write_report(sweep_of(finished), results(sweep_of(finished), storage=str(finished.storage)), tmp_path)
    found, expected = (re.findall(r"<li><span class=.state.*|<h2.*", text) for text in (page, other.read_text()))
    assert len(expected) > 5
    assert found == expected
    assert not (tmp_path / "nothing").exists()


def test_results_come_alike_from_the_ledger_and_from_mlflow(finished: StudyFolder) -> None:
    sweep = sweep_of(finished)
    from_ledger = results(sweep, storage=str(finished.storage))
    from_mlflow = results(sweep, tracking_uri=f"sqlite:///{finished.database}")
    keys = ["trial_id", "epoch"]
    left, right = (each.sort_values(keys).reset_index(drop=True) for each in (from_ledger, from_mlflow))
    pd.testing.assert_frame_equal(left, right.reindex(columns=left.columns), check_exact=True)
    assert len(left) == 4 * 9


@pytest.mark.fault  # nothing fails, but it takes two launches of its own
def test_a_new_cell_runs_alone_and_a_new_replicate_replaces_its_cell_run(finished: StudyFolder, tmp_path: Path) -> None:
    study_folder = copy_of(finished, tmp_path)
    old_cells = {run.info.run_id for run in runs_of(study_folder, "cell")}
    done = study_folder.run("run", "-p", "alphabet_sizes=[2,7,26]", "-p", "seeds=2")
    assert "2 trials to run" in done.stdout
    assert len(runs_of(study_folder, "trial")) == 6
    assert len(runs_of(study_folder, "cell")) == 3
    assert old_cells < {run.info.run_id for run in runs_of(study_folder, "cell")}
    study_folder.run("run", "-p", "alphabet_sizes=[2]", "-p", "seeds=3")
    assert len(runs_of(study_folder, "trial")) == 7
    assert len(runs_of(study_folder, "cell")) == 3
    assert len(old_cells - {run.info.run_id for run in runs_of(study_folder, "cell")}) == 1
    assert set(attempts_of(study_folder).values()) == {1}


def test_a_report_of_a_bucket_is_written_here_and_put_on_the_sweeps_run(
    finished: StudyFolder, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = StudyFolder(tmp_path)
    pa_fs.copy_files(str(finished.storage / "small"), bucket.format("report/small"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = ["report", str(finished.folder / finished.study), "--storage", bucket.format("report")]
    refused = CliRunner().invoke(app, report)
    assert refused.exit_code == 2
    assert "SQLite needs a local folder, but the storage is a URI (s3://…)" in refused.stderr
    done = CliRunner().invoke(app, [*report, "--tracking-uri", f"sqlite:///{here.database}"])
    assert done.exit_code == 0, done.output
    assert "lacks the report" not in done.stderr
    folder = tmp_path / "report" / "small"
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert "4 of 4 finished, in 2 cells" in (folder / "report.html").read_text(encoding="utf-8")
    (parent,) = runs_of(here, "sweep")
    logged = Path(client_of(here).download_artifacts(parent.info.run_id, "report"))
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"report.html", "recall.png"} < written.keys()
    assert {path.name: path.read_bytes() for path in logged.iterdir()} == written


@pytest.mark.fault  # nothing fails, but it takes a launch of its own
def test_a_text_is_trained_on_into_a_bucket_and_reported(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_folder = make_study_folder(tmp_path, STUDY.replace("length=24", "kind='text', path='text', length=24"))
    study_folder.uri, uri = bucket.format("text"), f"sqlite:///{study_folder.database}"
    (tmp_path / "text").write_text("so that a passage follows on another, and none of them twice. " * 5)
    # A text has an alphabet of its own.
    options = ["-p", "seeds=1", "-p", "alphabet_sizes=[26]", "--tracking-uri", uri]
    study_folder.run("run", *options)
    monkeypatch.chdir(tmp_path)
    assert audit(sweep_of(study_folder, seeds=1, alphabet_sizes=(26,)), Ledger(study_folder.uri, "small"), uri) == []
    done = CliRunner().invoke(app, ["report", study_folder.study, *options, "--storage", study_folder.uri])
    assert done.exit_code == 0, done.output
    (parent,) = runs_of(study_folder, "sweep")
    logged = {each.path for each in client_of(study_folder).list_artifacts(parent.info.run_id, "report")}
    assert logged == {f"report/{path.name}" for path in (tmp_path / "report" / "small").iterdir()}
    assert {"report/report.html", "report/tokens.png"} < logged


@pytest.mark.parametrize("what", ["a param", "a metric", "a lost run", "a second run", "the ledger"])
def test_an_audit_finds_what_was_tampered_with(finished: StudyFolder, tmp_path: Path, what: str) -> None:
    study_folder = copy_of(finished, tmp_path)
    run = runs_of(study_folder, "trial")[0]
    trial_id, run_id = run.data.tags["memray.trial_id"], run.info.run_id
    if what == "the ledger":
        (path, *_) = sorted((study_folder.storage / "small" / trial_id / "measurements").iterdir())
        path.write_text(re.sub(r'"recall/nll_nats":\d', '"recall/nll_nats":9', path.read_text(), count=1))
    elif what == "a second run":
        client_of(study_folder).create_run(run.info.experiment_id, tags=run.data.tags)
    elif what == "a lost run":
        client_of(study_folder).delete_run(run_id)
    else:
        change = {
            "a param": "UPDATE params SET value = '3' WHERE run_uuid = ? AND key = 'strings.alphabet_size'",
            "a metric": "UPDATE metrics SET value = 0.123 WHERE run_uuid = ? AND step = 3 AND key = 'recall/robust'",
        }[what]
        with sqlite3.connect(study_folder.database) as connection:
            assert connection.execute(change, [run_id]).rowcount == 1
    differences = audit(
        sweep_of(study_folder), Ledger(str(study_folder.storage), "small"), f"sqlite:///{study_folder.database}"
    )
    assert differences
    assert all(each.startswith(f"trial {trial_id}: ") for each in differences)
