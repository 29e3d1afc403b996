"""A long sequence on Ray: killed again and again, it ends as an undisturbed process does."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from memray.cluster.ledger import Ledger

from .conftest import Head, StudyFolder, make_study_folder, sweep_of

STUDY = '''"""Does a sequence survive?

Hypothesis: yes.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=24, num_strings=12),
    training=TrainingSpec(epochs=20),
    curriculum=CurriculumSpec(optimiser="carried", replay_share=0.2),
    compute=ComputeSpec(checkpoint_s=0),
    probes=ProbesSpec(epochs=(1, 5), num_held_out=2),
)


def sweep(*, seeds: int = 1) -> Sweep:
    return Sweep(vary(BASE, seed) for seed in replicates(BASE, seeds))
'''


@pytest.fixture
def study_folder(tmp_path: Path) -> StudyFolder:
    return make_study_folder(tmp_path, STUDY)


def assert_undisturbed(study_folder: StudyFolder, seeds: int = 1) -> None:
    """Each trial's measurements are those of one process alone, and those of its matrix, and MLflow agrees."""
    trials = sweep_of(study_folder, seeds=seeds).trials
    for trial in trials:
        folder = Ledger(str(study_folder.storage), "small").trial(trial.trial_id())
        alone = study_folder.run("trial", trial.trial_id(), "-p", f"seeds={seeds}").stdout
        assert folder.measurements()[0] == [json.loads(line) for line in alone.splitlines()]
    assert "0 differences" in study_folder.run("audit", "-p", f"seeds={seeds}").stdout
    again = study_folder.run("remeasure", "-p", f"seeds={seeds}").stdout
    assert f"{len(trials)} finished trials measured again, 0 differ" in again


def checkpoint(study_folder: StudyFolder) -> tuple[int, int]:
    """Attempt and epoch of the newest whole checkpoint."""
    names = [path.stem for path in study_folder.storage.glob("small/*/checkpoints/*.json")]
    return max((tuple(map(int, name.split("-"))) for name in names), default=(0, 0))  # type: ignore[return-value]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def probe_actors() -> set[int]:
    titles = {each.pid: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
    return {pid for pid, title in titles.items() if title.startswith("ray::_ProbeActor")}


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_sequence_whose_actor_probe_actor_and_driver_are_killed_ends_bit_identical(study_folder: StudyFolder) -> None:
    foreign = probe_actors()
    process = study_folder.start("run", "--probe-actors", "1")
    wait_for(lambda: checkpoint(study_folder) >= (1, 2 * 20), process)
    leases = [json.loads(path.read_text()) for path in study_folder.storage.glob("small/*/leases/0001.json")]
    (trainer,) = [lease["pid"] for lease in leases if lease["pid"] != process.pid]
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: checkpoint(study_folder) >= (2, 5 * 20), process)
    for actor in probe_actors() - foreign:
        os.kill(actor, signal.SIGKILL)
    wait_for(lambda: checkpoint(study_folder) >= (2, 8 * 20), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    study_folder.run("run", "--probe-actors", "1")
    sweep = sweep_of(study_folder)
    finished = Ledger(str(study_folder.storage), "small").trial(sweep.trials[0].trial_id()).finished()
    assert finished is not None
    assert finished.attempt >= 3
    assert finished.summary["resumed_from_epoch"] >= 8 * 20
    assert_undisturbed(study_folder)


@pytest.mark.fault
@pytest.mark.parametrize(("num_actors", "seeds"), [(1, 1), (2, 2), (4, 1)])
def test_looks_are_shared_out_among_probe_actors_and_training_waits_for_none(
    study_folder: StudyFolder, num_actors: int, seeds: int, head: Head
) -> None:
    study = study_folder.folder / study_folder.study
    study.write_text(STUDY.replace("checkpoint_s=0", "checkpoint_s=600").replace("replay_share=0.2", "replay_share=0"))
    study_folder.run("run", "-p", f"seeds={seeds}", "--probe-actors", str(num_actors), "--address", head.address)
    assert_undisturbed(study_folder, seeds)
    for trial in sweep_of(study_folder, seeds=seeds).trials:
        finished = Ledger(str(study_folder.storage), "small").trial(trial.trial_id()).finished()
        assert finished is not None
        looks = finished.summary["probe_looks"]
        assert len(looks) == num_actors
        assert sum(looks) == 1 + 12 * 3  # before training; within each stage at two epochs, and at its end
        assert max(looks) - min(looks) <= 1
        assert finished.summary["probe_wait_s"] < 0.01 * finished.summary["seconds"] / 12
