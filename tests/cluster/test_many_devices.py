"""Trials of many devices through Ray Train, on a real head node, beside trials of one device and probe actors."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from memray.cluster.ledger import Ledger
from memray.sweep import Sweep, load
from memray.trial import run_trial

from .conftest import Head, StudyFolder, make_study_folder

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
    assert head.placement_groups() == []
    assert not [each for each in ray_workers() if "TrainWorker" in each or "RayTrain" in each]


def ray_workers() -> list[str]:
    """The titles of Ray's processes of this machine, which say what each is at."""
    titles = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    return [title for title in titles if title.startswith("ray::")]


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
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    study = tmp_path / study_folder.study
    study.write_text(STUDY.replace("BROKEN = None", f"BROKEN = {str(tmp_path / 'broken')!r}"))
    done = study_folder.run("run", "--address", head.address, "-p", "stages=[]", expect=1)
    assert "failed" in done.stderr
    assert "1 finished, 0 running, 1 failed, 0 planned" in study_folder.run("status", "-p", "stages=[]").stdout
    (failure,) = study_folder.storage.glob("small/*/failed-*.json")
    assert "SafetensorError" in json.loads(failure.read_text())["traceback"]


# --- kills -----------------------------------------------------------------------------------------------------

LONG = ("-p", "epochs=150", "-p", "checkpoint_s=1")


def kill_once(titles: tuple[str, ...], storage: Path) -> str:
    """Waits for a checkpoint of a running trial, and then kills a process that has one of the titles."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if list(storage.glob("small/*/checkpoints/*.json")):
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith(titles):
                    process.kill()
                    return title
        time.sleep(0.05)
    raise AssertionError(f"no process of {titles} was met: {ray_workers()}")


@pytest.mark.fault
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3], ids=["torch", "zero-0", "zero-1", "zero-2", "zero-3"])
@pytest.mark.parametrize("whom", ["a worker", "the whole trial"])
def test_a_killed_trial_resumes_and_ends_bit_identical(
    tmp_path: Path, head: Head, stage: int | None, whom: str
) -> None:
    stages = f"stages=[{'' if stage is None else stage}]"
    killed, undisturbed = (make_study_folder(tmp_path / name, STUDY) for name in ("killed", "undisturbed"))
    undisturbed.run("run", *LONG, "-p", stages, "--address", head.address)
    process = killed.start("run", *LONG, "-p", stages, "--address", head.address)
    if whom == "a worker" and stage is not None:
        kill_once(("ray::RayTrainWorker", "ray::TrainWorker"), killed.storage)
    elif whom == "a worker":
        kill_once(("ray::ImplicitFunc",), killed.storage)
    else:
        kill_once(("ray::ImplicitFunc",), killed.storage)
        process.kill()
    output, _ = process.communicate(timeout=280)
    if whom == "the whole trial":
        killed.run("run", *LONG, "-p", stages, "--address", head.address)
    else:
        assert process.returncode == 0, output
    sweep = load(killed.folder / killed.study, epochs=150, checkpoint_s=1, stages=() if stage is None else (stage,))
    attempts = {}
    for trial in sweep.trials:
        one, other = (
            Ledger(str(folder.storage), "small").trial(trial.trial_id()).finished() for folder in (killed, undisturbed)
        )
        assert one is not None
        assert other is not None
        assert one.measurements_sha256 == other.measurements_sha256
        attempts[trial.compute.engine] = one
    disturbed = attempts["torch" if stage is None else "deepspeed"]
    assert disturbed.attempt > 1
    assert disturbed.summary["resumed_from_epoch"] > 0
    assert "0 differences" in killed.run("audit", *LONG, "-p", stages).stdout
