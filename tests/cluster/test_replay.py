"""Probes that are added to a finished trial, from kept weights or by training it again."""

from dataclasses import replace
from pathlib import Path

import pytest

from memray.cluster.audit import remeasured
from memray.cluster.leaving import Left
from memray.cluster.ledger import Ledger, TrialFolder
from memray.cluster.recorder import Recorder
from memray.cluster.replay import as_trained, from_kept_weights, is_kept
from memray.cluster.tracking import results
from memray.measurement import Measurement
from memray.probes import ContextSpec
from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, load
from memray.trial import ModelShelf, run_trial

from .conftest import StudyFolder, alone, make_study_folder

SHELF = ModelShelf()
FIRST = TrialSpec(
    strings=StringsSpec(length=16, alphabet_size=2),
    training=TrainingSpec(epochs=4, keep_weights="probe_epochs"),
    probes=ProbesSpec(epochs=(0, 2), num_held_out=1),
)
CONTEXT = ContextSpec(epochs=(2,), lengths=(0, 3), replacements=("source", "none"), redraws=2, extractable=(4,))
LATER = FIRST.model_copy(update={"probes": ProbesSpec(epochs=(2,), num_held_out=3, context=CONTEXT)})


def ledger_of(spec: TrialSpec, folder: Path) -> Ledger:
    return Ledger(str(folder), "sweep", probes_ids=Sweep([spec]).probes_ids())


def run(spec: TrialSpec, ledger: Ledger) -> TrialFolder:
    folder = ledger.trial(spec.trial_id())
    with folder.claim(spec.canonical_json(), "launch") as attempt:
        trained = ledger.as_trained(spec.trial_id()) if folder.is_added else None
        Recorder(spec, attempt, trained=trained).record(run_trial(spec, shelf=SHELF))
    return folder


def records(measurements: list[Measurement]) -> list[dict]:
    return [each.record() for each in measurements]


def test_a_later_look_that_is_asked_to_leave_is_begun_anew(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    ledger = ledger_of(LATER, tmp_path)
    folder = ledger.trial(LATER.trial_id())
    ledger.ask_to_leave("launch")
    with folder.claim(LATER.canonical_json(), "launch") as attempt:
        recorder = Recorder(LATER, attempt, leave_names=("launch",))
        with pytest.raises(Left, match="looked at again from the start"):
            recorder.record(recorder.until_asked(from_kept_weights(LATER, own)))
    assert folder.state() == "planned"
    ledger.forget_launch("launch")
    with folder.claim(LATER.canonical_json(), "launch") as attempt:
        recorder = Recorder(LATER, attempt, leave_names=("launch",))
        recorder.record(recorder.until_asked(from_kept_weights(LATER, own)))
    assert folder.measurements()[0] == records(list(run_trial(LATER, shelf=SHELF)))


def test_a_trial_that_was_finished_under_other_probes_has_a_place_for_these(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    assert not own.is_added
    again = ledger_of(LATER, tmp_path).trial(LATER.trial_id())
    assert again.is_added
    assert again.state() == "planned"
    assert ledger_of(FIRST, tmp_path).trial(FIRST.trial_id()).state() == "finished"


def test_kept_weights_and_training_again_show_the_same(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    assert is_kept(LATER, own)
    expected = records(list(run_trial(LATER, shelf=SHELF)))
    assert "context/local_3_source" in expected[2]["metrics"]
    assert records(list(from_kept_weights(LATER, own))) == expected
    again = run(LATER, ledger_of(LATER, tmp_path))
    assert again.measurements()[0] == expected
    assert remeasured(LATER, again) == expected
    assert again.verify() == []
    assert own.verify() == []


def test_weights_of_every_epoch_that_is_looked_at_must_have_been_kept(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    other = FIRST.model_copy(update={"probes": ProbesSpec(epochs=(1,), num_held_out=3)})
    beyond = FIRST.model_copy(update={"probes": ProbesSpec(epochs=(0, 2, 9), num_held_out=3)})
    assert not is_kept(other, own)
    assert is_kept(beyond, own)


def test_a_trial_that_does_not_repeat_itself_is_refused(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    other = LATER.model_copy(update={"string_seed": 1})
    with pytest.raises(ValueError, match=r"as it did, to the last bit, but at epoch 2 of trial \w+ it does not"):
        list(from_kept_weights(other, own))
    with (
        ledger_of(other, tmp_path).trial(other.trial_id()).claim(other.canonical_json(), "launch") as attempt,
        pytest.raises(ValueError, match="to the last bit, but at epoch 0"),
    ):
        Recorder(other, attempt, trained=own).record(run_trial(other, shelf=SHELF))


def test_a_trial_that_ends_sooner_or_later_than_it_did_is_refused(tmp_path: Path) -> None:
    own = run(FIRST, ledger_of(FIRST, tmp_path))
    measurements = list(run_trial(FIRST, shelf=SHELF))
    assert len(list(as_trained(FIRST, measurements, own))) == 5
    with pytest.raises(ValueError, match="to the last bit, but at epoch 4"):
        list(as_trained(FIRST, measurements[:-1], own))
    beyond = replace(measurements[-1], epoch=5)
    with pytest.raises(ValueError, match="to the last bit, but at epoch 5"):
        list(as_trained(FIRST, [*measurements, beyond], own))


STUDY = '''"""Is a finished trial looked at again?

Hypothesis: yes.
"""

from memray.probes import ContextSpec
from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, vary


def sweep(*, scale: Scale = "tiny", seeds: int = 1, held_out: int = 1) -> Sweep:
    base = TrialSpec(
        strings=StringsSpec(length=16, alphabet_size=2),
        training=TrainingSpec(epochs=4),
        probes=ProbesSpec(epochs=(0, 2), num_held_out=held_out),
    )
    return Sweep(vary(base, {"training.keep_weights": keep}) for keep in ("none", "probe_epochs"))
'''


@pytest.mark.fault
def test_a_finished_sweep_is_probed_again_and_keeps_what_it_was(tmp_path: Path) -> None:
    folder: StudyFolder = make_study_folder(tmp_path, STUDY)
    folder.run("run")
    runs = folder.count("runs")
    refused = folder.run("run", "-p", "held_out=3", expect=2)
    assert "look at them again with `probe`" in " ".join(refused.stderr.split())
    folder.run("probe", "-p", "held_out=3")
    folder.invoke("audit", "-p", "held_out=3")
    folder.invoke("remeasure", "-p", "held_out=3")
    sweep = load(folder.folder / folder.study, held_out="3")
    frame = results(sweep, storage=str(folder.storage))
    expected = [each for trial in sweep.trials for each in alone(trial)]
    assert frame["guessing/heldout_nll_nats"].dropna().tolist() == [
        each["metrics"]["guessing/heldout_nll_nats"]
        for each in expected
        if "guessing/heldout_nll_nats" in each["metrics"]
    ]
    assert folder.count("runs") >= runs  # those of the trials and cells made anew, the old ones marked as deleted
    assert "0 to run" in folder.invoke("plan", "-p", "held_out=3").stdout
    assert "0 to run" in folder.invoke("plan").stdout
    folder.run("run")  # the first probes again: what MLflow shows must follow
    folder.invoke("audit")
