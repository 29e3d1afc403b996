"""SIGTERM with a grace period: a trial keeps a checkpoint and leaves, and goes on from it, here or elsewhere."""

import os
import signal

import pytest

from memray.cluster.launch import MAX_FAILURES
from memray.cluster.ledger import Ledger

from .conftest import StudyFolder
from .test_faults import LONG, LONG_EPOCHS, assert_undisturbed, running_leases, wait_for

pytestmark = pytest.mark.fault


def resumed(study_folder: StudyFolder) -> list[int]:
    """The epochs from which finished trials went on."""
    ledger = Ledger(str(study_folder.storage), "small")
    found = [ledger.trial(trial_id).finished() for trial_id in ledger.trial_ids()]
    return [each.summary["resumed_from_epoch"] for each in found if each and "resumed_from_epoch" in each.summary]


def epochs_written(study_folder: StudyFolder) -> int:
    """Segments of measurements that trials have written."""
    return len(list(study_folder.storage.glob("small/*/measurements/*.jsonl")))


@pytest.mark.timeout(600)
def test_a_launch_that_is_asked_to_leave_keeps_checkpoints_and_is_continued(study_folder: StudyFolder) -> None:
    process = study_folder.start("run", *LONG)
    wait_for(lambda: epochs_written(study_folder) >= 1, 120, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    assert "asked to leave: " in output
    assert "failed" not in output
    assert running_leases(study_folder) == []
    assert list(study_folder.storage.glob("small/*/checkpoints/*.json"))
    assert not list(study_folder.storage.glob("small/.leave-*"))
    study_folder.run("run", *LONG)
    assert min(resumed(study_folder)) > 0
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1)


@pytest.mark.timeout(600)
def test_a_trial_whose_processes_are_taken_back_time_and_again_goes_on_elsewhere(study_folder: StudyFolder) -> None:
    options = (*LONG, "-p", "alphabet_sizes=[7]")
    process = study_folder.start("run", *options)
    # More often than a trial that comes no further is tried again.
    for _ in range(MAX_FAILURES + 2):
        wait_for(lambda: running_leases(study_folder), 120, process)
        (holder,) = running_leases(study_folder)
        os.kill(holder["pid"], signal.SIGTERM)
        wait_for(lambda gone=holder["pid"]: not is_held_by(study_folder, gone), 60, process)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert len(resumed(study_folder)) == 1
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1, alphabet_sizes=(7,))


def is_held_by(study_folder: StudyFolder, pid: int) -> bool:
    return pid in {lease["pid"] for lease in running_leases(study_folder)}
