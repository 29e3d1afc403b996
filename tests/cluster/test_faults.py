"""Kills and overlaps: nothing is lost, nothing is doubled, and the numbers are those of an undisturbed sweep."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger
from memray.sweep import load

from .conftest import Head, StudyFolder, alone

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

# Two trials, long enough to be met in the middle: what is done to them takes longer where the machine is busy.
LONG_EPOCHS = 900
LONG = ("-p", f"epochs={LONG_EPOCHS}", "-p", "seeds=1")


def assert_undisturbed(study_folder: StudyFolder, **parameters: object) -> None:
    """Every trial once in the ledger and in MLflow, and bit for bit what one process alone computes."""
    sweep = load(study_folder.folder / study_folder.study, **parameters)
    ledger = Ledger(str(study_folder.storage), sweep.name)
    assert audit(sweep, ledger, f"sqlite:///{study_folder.database}") == []
    assert study_folder.count_runs() == 1 + len(sweep.trials) + len(sweep.cells())
    for trial in sweep.trials:
        assert alone(trial) == ledger.trial(trial.trial_id()).measurements()[0]


def wait_for(condition: Callable[[], object], seconds: float, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def finished_trials(study_folder: StudyFolder) -> list[Path]:
    return list(study_folder.storage.glob("small/*/finished.json"))


def running_leases(study_folder: StudyFolder) -> list[dict]:
    leases = [json.loads(path.read_text()) for path in study_folder.storage.glob("small/*/leases/*.json")
              if path.parts[-3] != "mlflow-writer" and not (path.parents[1] / "finished.json").exists()]  # fmt: skip
    return [lease for lease in leases if lease["released_s"] is None]


def tracked_trials(study_folder: StudyFolder) -> dict[str, str]:
    """Status of the run that MLflow holds, by trial; none where it has no tables yet, or is being written."""
    query = """
        SELECT trial.value, runs.status FROM runs
        JOIN tags AS kind ON kind.run_uuid = runs.run_uuid AND kind.key = 'memray.kind' AND kind.value = 'trial'
        JOIN tags AS trial ON trial.run_uuid = runs.run_uuid AND trial.key = 'memray.trial_id'
    """
    # Makes no file where there is none, but may roll back what a kill left half committed, as MLflow would. Of one who
    # writes, and may be stopped at it, nothing is waited for.
    uri = f"file:{study_folder.database}?mode=rw"
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection,
    ):
        return dict(connection.execute(query).fetchall())
    return {}


def test_a_driver_killed_halfway_is_run_again_without_loss(study_folder: StudyFolder) -> None:
    process = study_folder.start("run", *LONG, "--max-concurrent", "1")
    wait_for(lambda: len(finished_trials(study_folder)) == 1 and running_leases(study_folder), 120, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.parent.name: path.read_bytes() for path in finished_trials(study_folder)}
    assert len(done) == 1
    study_folder.run("run", *LONG)
    after = {path.parent.name: path.read_bytes() for path in finished_trials(study_folder)}
    assert done.items() <= after.items()
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1)


def test_a_driver_killed_while_it_writes_to_mlflow_doubles_nothing(study_folder: StudyFolder) -> None:
    process = study_folder.start("run", "-p", "seeds=4")

    def is_halfway() -> bool:
        """Whether MLflow holds all of one trial, and not all of another that is finished too."""
        statuses = tracked_trials(study_folder)
        finished = {path.parent.name for path in finished_trials(study_folder)}
        return {"RUNNING", "FINISHED"} <= {statuses.get(trial_id) for trial_id in finished}

    def is_stopped_halfway() -> bool:
        if not is_halfway():
            return False
        process.send_signal(signal.SIGSTOP)  # that it does not get on between the look and the kill
        if is_halfway():
            return True
        process.send_signal(signal.SIGCONT)
        return False

    wait_for(is_stopped_halfway, 120, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_halfway()
    study_folder.run("run", "-p", "seeds=4")
    assert_undisturbed(study_folder, seeds=4)


def test_a_killed_actor_is_replaced_and_its_trial_done_again(study_folder: StudyFolder) -> None:
    process = study_folder.start("run", *LONG)
    wait_for(lambda: running_leases(study_folder), 120, process)
    victim = running_leases(study_folder)[0]
    os.kill(victim["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    ledger = Ledger(str(study_folder.storage), "small")
    attempts = [json.loads(path.read_text())["attempt"] for path in finished_trials(study_folder)]
    assert max(attempts) >= 2
    assert len(ledger.trial_ids()) == 3  # two trials, and the lease of the writer
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1)


def test_two_overlapping_launches_run_every_trial_once(study_folder: StudyFolder) -> None:
    launches = [study_folder.start("run", *LONG, "--max-concurrent", "1") for _ in range(2)]
    outputs = [launch.communicate(timeout=280)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    attempts = [json.loads(path.read_text())["attempt"] for path in finished_trials(study_folder)]
    assert attempts == [1, 1]
    leases = [(path.parent / "leases" / "0001.json").read_text() for path in finished_trials(study_folder)]
    assert len({json.loads(lease)["launch"] for lease in leases}) == 2  # each of them ran one
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1)


def test_two_overlapping_launches_on_a_bucket_write_each_run_once(
    study_folder: StudyFolder, head: Head, bucket: str
) -> None:
    """Of one cluster, whose actor decides between them."""
    study_folder.storage.mkdir()
    uri = f"sqlite:///{study_folder.database}"
    shared = replace(study_folder, uri=bucket.format("overlap"), environment={"MLFLOW_TRACKING_URI": uri})
    command = ("run", "-p", f"epochs={LONG_EPOCHS}", "--address", head.address, "--max-concurrent", "1")
    launches = [shared.start(*command) for _ in range(2)]
    outputs = [launch.communicate(timeout=280)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    sweep = load(study_folder.folder / study_folder.study, epochs=LONG_EPOCHS)
    ledger = Ledger(bucket.format("overlap"), sweep.name)
    assert audit(sweep, ledger, uri) == []
    assert study_folder.count_runs() == 1 + len(sweep.trials) + len(sweep.cells())
    leases = [ledger.storage.read_bytes(f"small/{trial.trial_id()}/leases/0001.json") for trial in sweep.trials]
    assert len({json.loads(lease)["launch"] for lease in leases}) == 2  # each of them ran some
    for trial in sweep.trials:
        assert alone(trial) == ledger.trial(trial.trial_id()).measurements()[0]
