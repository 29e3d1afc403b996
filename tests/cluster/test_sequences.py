"""A long sequence on Ray: killed again and again, it ends as an undisturbed process does.

The same test is the soak, with a thousand strings: `make soak`.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from memray.cluster.audit import audit, remeasured
from memray.cluster.ledger import Ledger

from .conftest import Head, StudyFolder, make_study_folder, sweep_of

STUDY = '''"""Does a sequence survive?

Hypothesis: yes.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=24, num_strings=NUM_STRINGS),
    training=TrainingSpec(epochs=EPOCHS),
    curriculum=CurriculumSpec(optimiser="carried", replay_share=REPLAY),
    compute=ComputeSpec(checkpoint_s=CHECKPOINT_S),
    probes=ProbesSpec(epochs=(1, 5), num_held_out=2),
)


def sweep(*, seeds: int = 1) -> Sweep:
    return Sweep(vary(BASE, seed) for seed in replicates(BASE, seeds))
'''


PROBE_ACTOR = "ray::_ProbeActor"
AT_WORK = {"trial": "ray::ResourceTrainable.train", "probe actor": PROBE_ACTOR}


def make_sequences(folder: Path, *, num_strings: int, epochs: int, replay: float, checkpoint_s: int) -> StudyFolder:
    values = {"NUM_STRINGS": num_strings, "EPOCHS": epochs, "REPLAY": replay, "CHECKPOINT_S": checkpoint_s}
    study = STUDY
    for name, value in values.items():
        study = study.replace(f"={name}", f"={value}")
    return make_study_folder(folder, study)


def alone(study_folder: StudyFolder, trial_id: str, seeds: int = 1) -> subprocess.Popen[str]:
    """The trial in a process of its own, which says what it measures: into a file, for a pipe would fill up."""
    with said_alone(study_folder, trial_id).open("w") as said:
        return subprocess.Popen(
            study_folder.command("trial", trial_id, "-p", f"seeds={seeds}"), stdout=said, **study_folder.options()
        )


def said_alone(study_folder: StudyFolder, trial_id: str) -> Path:
    return study_folder.folder / f"{trial_id}.jsonl"


def assert_undisturbed(study_folder: StudyFolder, processes: Sequence[subprocess.Popen[str]], seeds: int = 1) -> None:
    """Each trial's measurements are those of one process alone, those of its matrix, and MLflow's."""
    sweep = sweep_of(study_folder, seeds=seeds)
    ledger = Ledger(str(study_folder.storage), sweep.name)
    for trial, process in zip(sweep.trials, processes, strict=True):
        folder = ledger.trial(trial.trial_id())
        assert process.wait() == 0
        said = said_alone(study_folder, trial.trial_id()).read_text().splitlines()
        assert folder.measurements()[0] == [json.loads(line) for line in said] == remeasured(trial, folder)
    assert audit(sweep, ledger, f"sqlite:///{study_folder.database}") == []


def checkpoint(study_folder: StudyFolder) -> tuple[int, int]:
    """Attempt and epoch of the newest whole checkpoint."""
    names = [path.stem for path in study_folder.storage.glob("small/*/checkpoints/*.json")]
    return max((tuple(map(int, name.split("-"))) for name in names), default=(0, 0))  # type: ignore[return-value]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the test's own time is over."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def started_by(driver: subprocess.Popen[str], title: str) -> list[psutil.Process]:
    """The processes of the driver's own cluster that Ray has given such a title."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("num_strings", "epochs", "checkpoint_s"),
    [
        pytest.param(12, 20, 0, id="twelve strings", marks=[pytest.mark.fault, pytest.mark.timeout(600)]),
        pytest.param(1000, 100, 20, id="a thousand strings", marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_a_sequence_whose_actor_probe_actor_and_driver_are_killed_ends_bit_identical(
    tmp_path: Path, num_strings: int, epochs: int, checkpoint_s: int
) -> None:
    replay = 2 / num_strings  # of the strings before: one or two beside each step
    study_folder = make_sequences(
        tmp_path, num_strings=num_strings, epochs=epochs, replay=replay, checkpoint_s=checkpoint_s
    )
    (trial,) = sweep_of(study_folder).trials
    undisturbed = alone(study_folder, trial.trial_id())
    num_epochs = num_strings * epochs
    process = study_folder.start("run", "--probe-actors", "1")
    wait_for(lambda: checkpoint(study_folder) >= (1, num_epochs // 6), process)
    leases = [json.loads(path.read_text()) for path in study_folder.storage.glob("small/*/leases/0001.json")]
    (trainer,) = [lease["pid"] for lease in leases if lease["pid"] != process.pid]
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: checkpoint(study_folder) >= (2, num_epochs // 3), process)
    (probe_actor,) = started_by(process, PROBE_ACTOR)
    probe_actor.kill()
    wait_for(lambda: checkpoint(study_folder) >= (2, num_epochs // 2), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    gib = resident_gib(study_folder.start("run", "--probe-actors", "1"))
    finished = Ledger(str(study_folder.storage), "small").trial(trial.trial_id()).finished()
    assert finished is not None
    assert finished.attempt >= 3
    assert finished.summary["resumed_from_epoch"] >= num_epochs // 2
    # Of a thousand strings the snapshots would not all find room at once, if the actor fell behind.
    assert finished.summary["probe_wait_s"] < 0.01 * finished.summary["seconds"]
    assert_undisturbed(study_folder, [undisturbed])
    print({who: (values[len(values) // 4], values[-5]) for who, values in gib.items()})  # noqa: T201, the soak's figures
    if num_strings >= 1000:  # a short run says nothing about memory
        for who, values in gib.items():
            assert values[-5] < 1.1 * values[len(values) // 4], f"{who} grew: {values[:: len(values) // 20]}"


def resident_gib(driver: subprocess.Popen[str]) -> dict[str, list[float]]:
    """Resident memory of the driver, the trial's actor and the probe actor, each second while the trial goes on."""
    gib: dict[str, list[float]] = defaultdict(list)
    with driver:
        assert driver.stdout is not None
        reader = threading.Thread(target=driver.stdout.read)
        reader.start()
        while driver.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                at_work = {name: started_by(driver, title) for name, title in AT_WORK.items()}
                if at_work["trial"]:  # at its end the driver sends tables and draws figures
                    at_work["driver"] = [psutil.Process(driver.pid)]
                for name, processes in at_work.items():
                    gib[name] += [each.memory_info().rss / 2**30 for each in processes]
            time.sleep(1)
        reader.join()
    assert driver.returncode == 0
    return gib


@pytest.mark.fault
def test_looks_are_shared_out_among_probe_actors_and_training_waits_for_none(tmp_path: Path, head: Head) -> None:
    num_actors, seeds = 3, 2
    study_folder = make_sequences(tmp_path, num_strings=12, epochs=20, replay=0.0, checkpoint_s=600)
    study_folder.run("run", "-p", f"seeds={seeds}", "--probe-actors", str(num_actors), "--address", head.address)
    trials = sweep_of(study_folder, seeds=seeds).trials
    assert_undisturbed(study_folder, [alone(study_folder, trial.trial_id(), seeds) for trial in trials], seeds)
    for trial in trials:
        finished = Ledger(str(study_folder.storage), "small").trial(trial.trial_id()).finished()
        assert finished is not None
        looks = finished.summary["probe_looks"]
        assert len(looks) == num_actors
        assert sum(looks) == 1 + 12 * 3  # before training; within each stage at two epochs, and at its end
        assert max(looks) - min(looks) <= 1
        # Roughly, for a machine may do other things beside; who waited for looks would wait for most of the time.
        assert finished.summary["probe_wait_s"] < 0.1 * finished.summary["seconds"]
