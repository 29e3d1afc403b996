"""The main job on real parts: Ray Tune, the ledger, MLflow and the command line."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from memray.cluster.audit import audit
from memray.cluster.launch import MAX_FAILURES
from memray.cluster.ledger import Ledger
from memray.cluster.tracking import results
from memray.sweep import Sweep, load
from memray.trial import run_trial

from ..ports import free_port
from .conftest import STUDY, StudyFolder, make_study_folder


def sweep_of(study_folder: StudyFolder, **parameters: object) -> Sweep:
    return load(study_folder.folder / study_folder.study, **parameters)


def copy_of(finished: StudyFolder, folder: Path) -> StudyFolder:
    """The same sweep elsewhere, with an MLflow that knows it by its new place."""
    shutil.copytree(finished.folder, folder, dirs_exist_ok=True)
    return StudyFolder(folder)


def client_of(study_folder: StudyFolder) -> MlflowClient:
    return MlflowClient(f"sqlite:///{study_folder.database}")


def runs_of(study_folder: StudyFolder, kind: str) -> list:
    client = client_of(study_folder)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`memray.kind` = '{kind}'"))


def attempts_of(study_folder: StudyFolder) -> dict[str, int]:
    ledger = Ledger(str(study_folder.storage), "small")
    found = {trial_id: ledger.trial(trial_id).finished() for trial_id in ledger.trial_ids()}
    return {trial_id: each.attempt for trial_id, each in found.items() if each}


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


def test_a_finished_sweep_agrees_with_its_plan_ledger_and_mlflow(finished: StudyFolder) -> None:
    assert "0 differences" in finished.run("audit").stdout
    assert "0 differ" in finished.run("remeasure").stdout
    assert "4 finished, 0 running, 0 failed, 0 planned" in finished.run("status").stdout


def test_results_come_alike_from_the_ledger_and_from_mlflow(finished: StudyFolder) -> None:
    sweep = sweep_of(finished)
    from_ledger = results(sweep, storage=str(finished.storage))
    from_mlflow = results(sweep, tracking_uri=f"sqlite:///{finished.database}")
    keys = ["trial_id", "epoch"]
    left, right = (each.sort_values(keys).reset_index(drop=True) for each in (from_ledger, from_mlflow))
    pd.testing.assert_frame_equal(left, right.reindex(columns=left.columns), check_exact=True)
    assert len(left) == 4 * 9


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


def test_a_sweep_with_a_failing_trial_finishes_the_others_and_leaves_with_1(tmp_path: Path) -> None:
    # The directory's tokenizer and config satisfy the plan; its weights are cut off.
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    study = STUDY.replace(
        "        vary(BASE,",
        "        vary(BASE, {'model.pretrained': size == 7, 'model.path': BROKEN if size == 7 else None} |",
    ).replace("def sweep", f"BROKEN = {str(tmp_path / 'broken')!r}\n\n\ndef sweep")
    study_folder = make_study_folder(tmp_path, study)
    done = study_folder.run("run", "-p", "seeds=1", expect=1)
    assert "failed" in done.stderr
    assert list(attempts_of(study_folder).values()) == [1]
    status = study_folder.run("status", "-p", "seeds=1").stdout
    assert "1 finished, 0 running, 1 failed, 0 planned" in status
    assert sorted(run.info.status for run in runs_of(study_folder, "trial")) == ["FAILED", "FINISHED"]
    (failed,) = [run for run in runs_of(study_folder, "trial") if run.info.status == "FAILED"]
    assert "Traceback" in failed.data.tags["memray.failure"]
    assert len(list(study_folder.storage.glob("small/*/failed-*.json"))) == 1 + MAX_FAILURES
    assert "planned, but the ledger says failed" in study_folder.run("audit", "-p", "seeds=1", expect=1).stderr


def test_pretrained_weights_come_through_the_object_store_with_the_same_bits(tmp_path: Path) -> None:
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=11).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    model = f"ModelSpec(path={str(tmp_path / 'model')!r}, pretrained=True)"
    study = STUDY.replace("TrialSpec(\n", f"TrialSpec(model={model},\n", 1).replace(
        "import Probes", "import ModelSpec, Probes"
    )
    study_folder = make_study_folder(tmp_path, study)
    study_folder.run("run", "-p", "seeds=1")
    ledger = Ledger(str(study_folder.storage), "small")
    for trial in sweep_of(study_folder, seeds=1).trials:
        assert [each.record() for each in run_trial(trial)] == ledger.trial(trial.trial_id()).measurements()[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on loopback."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_server_that_was_away_is_caught_up_with(study_folder: StudyFolder, server: str) -> None:
    away = "http://127.0.0.1:9"
    done = study_folder.run("run", "-p", "seeds=1", "--tracking-uri", away)
    assert "lacks 2 finished trials" in done.stderr
    assert "sync small.py" in done.stderr
    study_folder.run("sync", "-p", "seeds=1", "--tracking-uri", away, expect=3)
    study_folder.run("sync", "-p", "seeds=1", "--tracking-uri", server)
    study_folder.run("sync", "-p", "seeds=1", "--tracking-uri", server)
    assert "0 differences" in study_folder.run("audit", "-p", "seeds=1", "--tracking-uri", server).stdout


def test_a_cluster_that_cannot_be_reached_leaves_with_3(study_folder: StudyFolder) -> None:
    assert study_folder.run("run", "--address", "127.0.0.1:9", expect=3).stderr.strip()


def test_a_storage_that_cannot_be_written_leaves_with_3(study_folder: StudyFolder) -> None:
    study_folder.storage.write_text("this is a file")
    assert "storage" in study_folder.run("run", expect=3).stderr


def test_a_relative_storage_inside_a_ray_job_is_refused(study_folder: StudyFolder) -> None:
    study_folder.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    command = [sys.executable, "-m", "memray", "run", "small.py", "--storage", "runs"]
    done = subprocess.run(command, capture_output=True, check=False, **study_folder.options())
    assert done.returncode == 2
    assert "the storage must be absolute" in done.stderr
