"""What a launch does when a trial, the tracking server, the cluster or the storage fails."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from memray.cluster.audit import audit, remeasured
from memray.cluster.launch import MAX_FAILURES
from memray.cluster.ledger import Ledger
from memray.trial import run_trial

from ..ports import free_port
from .conftest import STUDY, StudyFolder, attempts_of, make_study_folder, runs_of, sweep_of


@pytest.mark.fault
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
    assert sorted(run.info.status for run in runs_of(study_folder, "trial")) == ["FAILED", "FINISHED"]
    (failed,) = [run for run in runs_of(study_folder, "trial") if run.info.status == "FAILED"]
    assert "Traceback" in failed.data.tags["memray.failure"]
    assert len(list(study_folder.storage.glob("small/*/failed-*.json"))) == 1 + MAX_FAILURES
    assert "1 finished, 0 running, 1 failed, 0 planned" in study_folder.invoke("status", "-p", "seeds=1").stdout
    ledger, tracked = Ledger(str(study_folder.storage), "small"), f"sqlite:///{study_folder.database}"
    assert any(
        "planned, but the ledger says failed" in each
        for each in audit(sweep_of(study_folder, seeds=1), ledger, tracked)
    )


@pytest.mark.fault  # nothing fails, but it takes a launch of its own
def test_pretrained_weights_and_a_text_reach_the_actors_and_give_the_same_bits(tmp_path: Path) -> None:
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=11).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("so that a passage follows on another, and none of them twice. " * 3)
    model = f"ModelSpec(path={str(tmp_path / 'model')!r}, pretrained=True)"
    study = STUDY.replace("TrialSpec(\n", f"TrialSpec(model={model},\n", 1).replace(
        "import Probes", "import ModelSpec, Probes"
    )
    # The path is relative to the study's folder, in which no actor works.
    text = "{'strings.kind': 'text', 'strings.path': 'text'} if size == 7 else {'strings.alphabet_size': size}"
    study = study.replace('{"strings.alphabet_size": size,', f"({text}) | {{")
    study_folder = make_study_folder(tmp_path, study)
    study_folder.run("run", "-p", "seeds=1")
    ledger = Ledger(str(study_folder.storage), "small")
    with contextlib.chdir(tmp_path):
        sweep = sweep_of(study_folder, seeds=1)
    assert [trial.strings.kind for trial in sweep.trials] == ["iid", "text"]
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        assert [each.record() for each in run_trial(trial)] == folder.measurements()[0]
        assert remeasured(trial, folder) == folder.measurements()[0]


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


@pytest.mark.fault
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
