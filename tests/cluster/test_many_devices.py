"""Trials of many devices through Ray Train, on a real head node, beside trials of one device and probe actors."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from memray.cluster.ledger import Ledger
from memray.cluster.recorder import Recorder
from memray.models import character_tokenizer, load_model
from memray.spec import ModelSpec, TrialSpec
from memray.sweep import Sweep, load
from memray.trial import run_trial

from .conftest import Head, StudyFolder, make_study_folder
from .processes import Whole
from .processes import run as run_processes

pytestmark = pytest.mark.fault

STUDY = '''"""Do one device and many give the same curve?

Hypothesis: yes.
"""

from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, vary

BASE = TrialSpec(
    strings=StringsSpec(length=24, num_strings=2),
    training=TrainingSpec(epochs=20, strings_per_step=0),
    probes=ProbesSpec(epochs=(0, 4, 9), num_held_out=2),
)
SHARDED = {"compute.engine": "deepspeed", "compute.workers": 2}
BROKEN = None


def sweep(*, stages: tuple[int, ...] = (1, 3), checkpoint_s: float = 600, epochs: int = 20) -> Sweep:
    more = {"compute.checkpoint_s": checkpoint_s, "training.epochs": epochs}
    broken = [vary(BASE, SHARDED | {"model.path": BROKEN, "model.pretrained": True})] if BROKEN else []
    return Sweep(
        [vary(BASE, more)] + broken + [vary(BASE, SHARDED | {"compute.zero_stage": stage} | more) for stage in stages]
    )
'''


@pytest.fixture
def study_folder(tmp_path: Path, head: Head) -> Iterator[StudyFolder]:
    yield make_study_folder(tmp_path, STUDY)
    deadline = time.monotonic() + 60  # of a killed driver the cluster hears after a while
    while head.placement_groups() or own_workers():
        assert time.monotonic() < deadline, (head.placement_groups(), own_workers())
        time.sleep(0.5)


def ray_workers() -> list[str]:
    """The titles of Ray's processes of this machine, which say what each is at."""
    titles = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    return [title for title in titles if title.startswith("ray::")]


def own_workers() -> list[str]:
    """Processes that a launch started and should not have left."""
    return [title for title in ray_workers() if title.startswith(("ray::RayTrain", "ray::Implicit", "ray::_Probe"))]


def nll(folder: StudyFolder, sweep: Sweep) -> dict[tuple[str, int], list[float]]:
    ledger = Ledger(str(folder.storage), "small")
    return {
        (trial.compute.engine, trial.compute.zero_stage): [
            each["metrics"]["recall/nll_nats"] for each in ledger.trial(trial.trial_id()).measurements()[0]
        ]
        for trial in sweep.trials
    }


def test_trials_of_one_and_of_many_devices_share_a_cluster_and_give_one_curve(
    study_folder: StudyFolder, head: Head
) -> None:
    done = study_folder.run("run", "--address", head.address, "--probe-actors", "1")
    assert "1 probe actors score snapshots" in done.stdout
    sweep = load(study_folder.folder / study_folder.study)
    curves = nll(study_folder, sweep)
    assert len(curves) == 3
    assert {len(curve) for curve in curves.values()} == {21}
    for curve in curves.values():
        assert curve == pytest.approx(curves["torch", 0], rel=1e-4)
    one = next(trial for trial in sweep.trials if trial.compute.engine == "torch")
    ledger = Ledger(str(study_folder.storage), "small")
    assert [each.record() for each in run_trial(one)] == ledger.trial(one.trial_id()).measurements()[0]
    assert "0 differences" in study_folder.run("audit").stdout
    for trial in sweep.trials:
        finished = ledger.trial(trial.trial_id()).finished()
        assert finished is not None
        assert finished.summary["probe_s"] > 0


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
    assert "1 finished, 0 running, 1 failed, 0 planned" in study_folder.run("status", "-p", "stages=[]").stdout
    (failure,) = study_folder.storage.glob("small/*/failed-*.json")
    assert "all weights must be in the checkpoint" in json.loads(failure.read_text())["traceback"]


# --- kills -----------------------------------------------------------------------------------------------------

LONG = {"epochs": 150, "checkpoint_s": 0.5}
TITLES = {"a worker": "ray::RayTrainWorker", "the actor": "ray::ImplicitFunc", "a probe actor": "ray::_ProbeActor"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digest of every trial's measurements, from processes that no scheduler started and nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.py").write_text(STUDY)
    # Without checkpoints, which leave the ids alone.
    sweep = load(folder / "small.py", stages=(0, 1, 2, 3), epochs=LONG["epochs"])
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


def kill(whom: str, trial: TrialSpec, storage: Path, *, attempt: int = 1) -> None:
    """Waits until an attempt at a trial has made a checkpoint, and kills a process of it."""
    deadline = time.monotonic() + 150
    while not list(storage.glob(f"small/{trial.trial_id()}/checkpoints/{attempt:04d}-*.json")):
        assert time.monotonic() < deadline, f"attempt {attempt} made no checkpoint"
        time.sleep(0.05)
    processes = [(each, " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["cmdline"])]
    chosen = [process for process, title in processes if title.startswith(TITLES[whom])]
    assert chosen, f"{whom} was not met among {ray_workers()}"
    chosen[-1].kill()


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3], ids=["torch", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_a_trial_killed_twice_ends_bit_identical(
    study_folder: StudyFolder, head: Head, undisturbed: dict[str, str], stage: int | None
) -> None:
    stages = f"stages=[{'' if stage is None else stage}]"
    options = [each for name, value in LONG.items() for each in ("-p", f"{name}={value}")] + ["-p", stages]
    stated = () if stage is None else (stage,)
    sweep, ledger = (
        load(study_folder.folder / "small.py", stages=stated, **LONG),
        Ledger(str(study_folder.storage), "small"),
    )
    trial = sweep.trials[0 if stage is None else 1]
    process = study_folder.start("run", *options, "--address", head.address)
    kill("the actor" if stage is None else "a worker", trial, study_folder.storage)
    kill("the actor", trial, study_folder.storage, attempt=2)
    process.kill()
    process.wait()
    study_folder.run("run", *options, "--address", head.address)
    assert {spec.trial_id(): digest_of(ledger, spec) for spec in sweep.trials}.items() <= undisturbed.items()
    finished = ledger.trial(trial.trial_id()).finished()
    assert finished is not None
    assert finished.attempt > 2
    assert finished.summary["resumed_from_epoch"] > 0
    assert "0 differences" in study_folder.run("audit", *options).stdout


def test_a_killed_probe_actor_is_replaced_and_its_work_counts_once(
    study_folder: StudyFolder, head: Head, undisturbed: dict[str, str]
) -> None:
    options = [each for name, value in LONG.items() for each in ("-p", f"{name}={value}")] + ["-p", "stages=[]"]
    process = study_folder.start("run", *options, "--address", head.address, "--probe-actors", "1")
    (trial,) = load(study_folder.folder / "small.py", stages=(), **LONG).trials
    kill("a probe actor", trial, study_folder.storage)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    ledger = Ledger(str(study_folder.storage), "small")
    assert digest_of(ledger, trial) == undisturbed[trial.trial_id()]
    held_out = [row for row in ledger.trial(trial.trial_id()).strings().to_pylist() if row["role"] == "held_out"]
    assert sorted((row["epoch"], row["string"]) for row in held_out) == [(e, k) for e in (0, 4, 9, 150) for k in (0, 1)]
    assert "0 differences" in study_folder.run("audit", *options).stdout
