"""Trials of many devices through Ray Train, on a real head node, beside trials of one device and probe actors."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger
from memray.cluster.recorder import Recorder
from memray.models import character_tokenizer, load_model
from memray.spec import ModelSpec, TrialSpec
from memray.sweep import Sweep, load
from memray.trial import run_trial

from .conftest import ROOT, Head, StudyFolder, alone, make_study_folder
from .processes import Whole
from .processes import run as run_processes
from .test_faults import wait_for

pytestmark = pytest.mark.fault

STUDY = '''"""Do one device and many give the same curve?

Hypothesis: yes.
"""

from memray.probes import ContextSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, vary

CONTEXT = ContextSpec(epochs=(4,), replacements=("source", "none"), lengths=(3,), redraws=1, extractable=(4,))
BASE = TrialSpec(
    strings=StringsSpec(length=24, num_strings=2),
    training=TrainingSpec(epochs=20, strings_per_step=0, keep_weights="probe_epochs"),
    probes=ProbesSpec(epochs=(0, 4, 9), num_held_out=2, context=CONTEXT),
)
SHARDED = {"compute.engine": "deepspeed", "compute.workers": 2}
BROKEN = None


def sweep(
    *, stages: tuple[int, ...] = (1, 3), checkpoint_s: float = 600, epochs: int = 20, held_out: int = 2
) -> Sweep:
    more = {"compute.checkpoint_s": checkpoint_s, "training.epochs": epochs, "probes.num_held_out": held_out}
    broken = [vary(BASE, SHARDED | {"model.path": BROKEN, "model.pretrained": True})] if BROKEN else []
    return Sweep(
        [vary(BASE, more)] + broken + [vary(BASE, SHARDED | {"compute.zero_stage": stage} | more) for stage in stages]
    )
'''


@pytest.fixture
def study_folder(tmp_path: Path, head: Head) -> Iterator[StudyFolder]:
    yield make_study_folder(tmp_path, STUDY)
    wait_until_clean(head)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, head: Head) -> StudyFolder:
    """The study as it was run, with an actor that looked at the weights of probe epochs."""
    made = make_study_folder(tmp_path_factory.mktemp("ran"), STUDY)
    done = made.run("run", "--address", head.address, "--probe-actors", "1")
    assert "1 probe actors score snapshots" in done.stdout
    wait_until_clean(head)
    return made


def wait_until_clean(head: Head) -> None:
    """Fails if a launch has left something behind on the cluster."""
    deadline = time.monotonic() + 60  # of a killed driver the cluster hears after a while
    while head.placement_groups() or launched(head):
        assert time.monotonic() < deadline, (head.placement_groups(), launched(head))
        time.sleep(0.5)


def ray_workers(head: Head) -> list[tuple[psutil.Process, str]]:
    """Ray's processes, with the titles that say what each is at: of this head alone, for a machine may have others."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(str(head.folder) in " ".join(parent.cmdline()) for parent in process.parents()):
                    found.append((process, title))
    return found


def launched(head: Head) -> list[str]:
    """The titles of processes that a launch started and should not have left."""
    titles = [title for _, title in ray_workers(head)]
    return [title for title in titles if title.startswith(LAUNCHED)]


def nll(folder: StudyFolder, sweep: Sweep) -> dict[tuple[str, int], list[float]]:
    ledger = Ledger(str(folder.storage), "small")
    return {
        (trial.compute.engine, trial.compute.zero_stage): [
            each["metrics"]["recall/nll_nats"] for each in ledger.trial(trial.trial_id()).measurements()[0]
        ]
        for trial in sweep.trials
    }


def test_trials_of_one_and_of_many_devices_share_a_cluster_and_give_one_curve(ran: StudyFolder) -> None:
    sweep = load(ran.folder / ran.study)
    curves = nll(ran, sweep)
    assert len(curves) == 3
    assert {len(curve) for curve in curves.values()} == {21}
    for curve in curves.values():
        assert curve == pytest.approx(curves["torch", 0], rel=1e-4)
    one = next(trial for trial in sweep.trials if trial.compute.engine == "torch")
    ledger = Ledger(str(ran.storage), "small")
    assert alone(one) == ledger.trial(one.trial_id()).measurements()[0]
    assert "0 differences" in ran.invoke("audit").stdout
    for trial in sweep.trials:
        finished = ledger.trial(trial.trial_id()).finished()
        assert finished is not None
        assert finished.summary["probe_s"] > 0


def test_a_later_look_without_actors_sees_the_same_context_and_many_devices_train_again_for_it(
    ran: StudyFolder, head: Head
) -> None:
    ran.run("probe", "-p", "held_out=3", "-p", "stages=[3]", "--address", head.address, "--probe-actors", "0")
    wait_until_clean(head)
    sweep = load(ran.folder / ran.study, held_out=3, stages=(3,))
    ledger = Ledger(str(ran.storage), "small", probes_ids=sweep.probes_ids())
    for trial in sweep.trials:
        first, again = ledger.as_trained(trial.trial_id()), ledger.trial(trial.trial_id())
        finished = again.finished()
        assert again.is_added
        assert finished is not None
        assert set(first.context()["epoch"].to_pylist()) == {4, 20}
        assert again.context() == first.context()
        assert set(again.strings()["string"].to_pylist()) == {0, 1, 2}
        assert "probe_s" not in finished.summary
        # Although they kept their weights.
        assert ("tokens_per_s" in finished.summary) == (trial.compute.engine == "deepspeed")
        assert first.kept_weights().keys() == {0, 4, 9, 20}
    assert audit(sweep, ledger, f"sqlite:///{ran.database}") == []


def test_a_failing_trial_of_many_devices_leaves_the_cluster_clean(
    study_folder: StudyFolder, head: Head, tmp_path: Path
) -> None:
    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path, metadata={"format": "pt"})
    study = tmp_path / study_folder.study
    study.write_text(STUDY.replace("BROKEN = None", f"BROKEN = {str(tmp_path / 'broken')!r}"))
    done = study_folder.run("run", "--address", head.address, "-p", "stages=[]", expect=1)
    assert "failed" in done.stderr
    assert "1 finished, 0 running, 1 failed, 0 planned" in study_folder.invoke("status", "-p", "stages=[]").stdout
    (failure,) = study_folder.storage.glob("small/*/failed-*.json")
    assert "all weights must be in the checkpoint" in json.loads(failure.read_text())["traceback"]


# --- kills -----------------------------------------------------------------------------------------------------

LONG = {"epochs": 100, "checkpoint_s": 0.5}
# What Ray calls the processes that a launch starts; an actor of Tune's goes by two names.
LAUNCHED = ("ray::RayTrain", "ray::ResourceTrainable", "ray::Trainable", "ray::_ProbeActor")
TITLES = {"a worker": "ray::RayTrainWorker", "the actor": "ray::ResourceTrainable"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digest of every trial's measurements, from processes that no scheduler started and nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.py").write_text(STUDY)
    # Without checkpoints, which leave the ids alone.
    sweep = load(folder / "small.py", stages=(3,), epochs=LONG["epochs"])
    ledger = Ledger(str(folder / "runs"), "small")
    one, *many = sweep.trials
    with ledger.trial(one.trial_id()).claim(one.canonical_json(), "launch") as attempt:
        Recorder(one, attempt).record(run_trial(one))
    jobs = {
        spec.trial_id(): Whole(spec, ledger.trial(spec.trial_id()).claim(spec.canonical_json(), "launch").elsewhere())
        for spec in many
    }
    assert set(run_processes(2, jobs, folder / "jobs").values()) == {"finished"}
    return {spec.trial_id(): digest_of(ledger, spec) for spec in sweep.trials}


def digest_of(ledger: Ledger, spec: TrialSpec) -> str:
    finished = ledger.trial(spec.trial_id()).finished()
    assert finished is not None
    return finished.measurements_sha256


def kill(
    whom: str, trial: TrialSpec, storage: Path, head: Head, process: subprocess.Popen[str], *, attempt: int = 1
) -> None:
    """Waits until an attempt at a trial has made a checkpoint, and kills a process of it."""
    made = f"small/{trial.trial_id()}/checkpoints/{attempt:04d}-*.json"
    wait_for(lambda: list(storage.glob(made)), 240, process)
    workers = ray_workers(head)
    chosen = [each for each, title in workers if title.startswith(TITLES[whom])]
    assert chosen, f"{whom} was not met among {workers}"
    chosen[-1].kill()


# That every stage resumes to the last bit, test_engine says; that one device does, test_leaving.
@pytest.mark.timeout(900)
def test_a_trial_killed_twice_ends_bit_identical(
    study_folder: StudyFolder, head: Head, undisturbed: dict[str, str]
) -> None:
    options = [each for name, value in LONG.items() for each in ("-p", f"{name}={value}")] + ["-p", "stages=[3]"]
    sweep = load(study_folder.folder / "small.py", stages=(3,), **LONG)
    ledger, trial = Ledger(str(study_folder.storage), "small"), sweep.trials[1]
    process = study_folder.start("run", *options, "--address", head.address)
    kill("a worker", trial, study_folder.storage, head, process)
    kill("the actor", trial, study_folder.storage, head, process, attempt=2)
    process.kill()
    process.wait()
    study_folder.run("run", *options, "--address", head.address)
    assert {spec.trial_id(): digest_of(ledger, spec) for spec in sweep.trials}.items() <= undisturbed.items()
    finished = ledger.trial(trial.trial_id()).finished()
    assert finished is not None
    assert finished.attempt > 2
    assert finished.summary["resumed_from_epoch"] > 0
    assert "0 differences" in study_folder.invoke("audit", *options).stdout


@pytest.mark.timeout(900)
def test_a_node_that_is_taken_away_lets_its_trials_keep_a_checkpoint_and_they_go_on_elsewhere(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """Between raylets of one machine: the script ends the workers of the one that it is given, and no others."""
    leave = runpy.run_path(str(ROOT / "infra" / "leave_node.py"))["leave"]
    study_folder = make_study_folder(tmp_path, STUDY)
    options = ["-p", f"epochs={LONG['epochs']}", "-p", "stages=[3]"]
    sweep = load(study_folder.folder / "small.py", stages=(3,), epochs=LONG["epochs"])
    ledger, trial = Ledger(str(study_folder.storage), "small"), sweep.trials[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        node = cluster.add_node(num_cpus=5)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        process = study_folder.start("run", *options, "--address", str(cluster.address), "--probe-actors", "1")
        measured = f"small/{trial.trial_id()}/measurements/0001-*.jsonl"
        wait_for(lambda: list(study_folder.storage.glob(measured)), 150, process)
        assert leave(raylet, grace_s=60) == 0
        assert list(study_folder.storage.glob(f"small/{trial.trial_id()}/checkpoints/0001-*.json"))
        assert raylet.is_running()  # what comes after is the node's end, and not the script's
        time.sleep(5)
        assert ledger.trial(trial.trial_id()).state() == "planned"  # nothing new comes to it
        cluster.add_node(num_cpus=5)
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, output
    finally:
        cluster.shutdown()
    finished = ledger.trial(trial.trial_id()).finished()
    assert finished is not None
    assert finished.summary["resumed_from_epoch"] > 0
    assert {spec.trial_id(): digest_of(ledger, spec) for spec in sweep.trials}.items() <= undisturbed.items()
    assert "0 differences" in study_folder.invoke("audit", *options).stdout


@pytest.mark.timeout(600)
def test_an_actor_that_is_asked_to_leave_asks_its_workers_elsewhere_and_the_trial_goes_on(
    study_folder: StudyFolder, head: Head, undisturbed: dict[str, str]
) -> None:
    options = ["-p", f"epochs={LONG['epochs']}", "-p", "stages=[3]"]
    _, trial = load(study_folder.folder / "small.py", stages=(3,), epochs=LONG["epochs"]).trials
    process = study_folder.start("run", *options, "--address", head.address)
    lease = study_folder.storage / "small" / trial.trial_id() / "leases" / "0001.json"
    wait_for(lease.exists, 150, process)
    os.kill(json.loads(lease.read_text())["pid"], signal.SIGTERM)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    ledger = Ledger(str(study_folder.storage), "small")
    finished = ledger.trial(trial.trial_id()).finished()
    assert finished is not None
    assert finished.attempt == 2
    assert finished.summary["resumed_from_epoch"] > 0
    assert not list(lease.parents[2].glob(".leave-*"))
    assert digest_of(ledger, trial) == undisturbed[trial.trial_id()]
    assert "0 differences" in study_folder.invoke("audit", *options).stdout
