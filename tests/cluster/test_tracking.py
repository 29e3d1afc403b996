"""Cells: medians over replicates, where a censored one is late and an undefined one is unknown."""

import math
from pathlib import Path

import pytest

from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger
from memray.cluster.tracking import FAILURE, Tracker, all_points, cell_measurements, costs, points
from memray.spec import StringsSpec, TrialSpec
from memray.sweep import Sweep


def replicate(*metrics: dict[str, float]) -> list[dict]:
    return [{"stage": 0, "epoch": epoch, "metrics": each} for epoch, each in enumerate(metrics)]


def test_a_cell_is_the_median_of_its_replicates_with_their_range() -> None:
    merged = cell_measurements([replicate({"recall/robust": value}) for value in (0.1, 0.5, 0.2)])
    assert merged[0]["metrics"]["recall/robust"] == 0.2
    assert merged[0]["metrics"]["recall/robust/low"] == 0.1
    assert merged[0]["metrics"]["recall/robust/high"] == 0.5
    assert merged[0]["metrics"]["cell/replicates"] == 3


def test_a_replicate_that_never_arrived_is_late_and_counted() -> None:
    key = "phase/epochs_to_robust_50"
    (merged,) = cell_measurements([replicate({key: 40.0}), replicate({key: 60.0}), replicate({})])
    assert merged["metrics"][key] == 60.0
    assert merged["metrics"][f"{key}/low"] == 40.0
    assert f"{key}/high" not in merged["metrics"]
    assert merged["metrics"][f"{key}/censored"] == 1


def test_a_cell_whose_median_never_arrived_has_none() -> None:
    key = "phase/epochs_to_robust_50"
    (merged,) = cell_measurements([replicate({key: 40.0}), replicate({}), replicate({})])
    assert key not in merged["metrics"]
    assert merged["metrics"][f"{key}/low"] == 40.0
    assert merged["metrics"][f"{key}/censored"] == 2


def test_what_is_undefined_for_one_replicate_is_unknown_for_the_cell() -> None:
    (merged,) = cell_measurements([replicate({"phase/plateau": 3.0, "phase/bits_per_step": 9.0}), replicate({})])
    assert not any(key.startswith(("phase/plateau", "phase/bits_per_step")) for key in merged["metrics"])


def test_phases_stand_at_the_last_epoch_and_curves_end_with_the_shortest_replicate() -> None:
    key = "phase/memorisation"
    short = replicate({"recall/nll_nats": 3.0}, {"recall/nll_nats": 1.0, key: 1.0})
    long = replicate({"recall/nll_nats": 3.0}, {"recall/nll_nats": 2.0}, {"recall/nll_nats": 1.0, key: 2.0})
    merged = cell_measurements([short, long])
    assert [each["metrics"]["recall/nll_nats"] for each in merged[:2]] == [3.0, 1.5]
    assert "recall/nll_nats" not in merged[2]["metrics"]
    assert merged[2]["metrics"][key] == 1.5
    assert not any(k.startswith("phase/") for each in merged[:2] for k in each["metrics"])


def test_points_carry_times_that_derive_from_their_epoch() -> None:
    first, second = points(replicate({"recall/robust": 0.1}, {"recall/robust": 0.2}), created_ms=5_000)
    assert (first.step, first.timestamp, first.value) == (0, 5_000, 0.1)
    assert (second.step, second.timestamp, second.value) == (1, 6_000, 0.2)


def test_costs_have_a_row_a_finished_trial_and_nan_where_nothing_was_counted(tmp_path: Path) -> None:
    sweep = Sweep([TrialSpec(string_seed=seed) for seed in range(2)], name="study")
    assert costs(sweep, storage=str(tmp_path)).columns.tolist()[:3] == ["trial_id", "cell_id", "seconds"]
    trial = sweep.trials[1]
    with Ledger(str(tmp_path), "study").trial(trial.trial_id()).claim(trial.canonical_json(), "ours") as attempt:
        attempt.finish({"epochs": 3, "seconds": 7.5, "tokens_per_s": 100, "peak_gib": 0.5})
    (row,) = costs(sweep, storage=str(tmp_path)).to_dict("records")
    assert (row["trial_id"], row["string_seed"], row["seconds"], row["tokens_per_s"]) == (trial.trial_id(), 1, 7.5, 100)
    assert math.isnan(row["communication_gib"])


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.mark.parametrize("is_new", [False, True], ids=["by one tracker", "by a new one"])
def test_a_trial_that_failed_and_then_finished_shows_no_failure(
    tmp_path: Path, tracking_uri: str, is_new: bool
) -> None:
    sweep = Sweep([TrialSpec()], name=f"failed-{is_new}")
    (trial,) = sweep.trials
    ledger = Ledger(str(tmp_path), sweep.name)
    tracker = Tracker(sweep, ledger, tracking_uri)
    folder = ledger.trial(trial.trial_id())
    measurements = replicate({"recall/robust": 0.1}, {"recall/robust": 0.2})
    with folder.claim(trial.canonical_json(), "ours") as attempt:
        attempt.append(measurements[:1])
        assert tracker.send_all([trial]) == [False]  # what runs is shown as it goes
        attempt.fail("it broke")
    assert tracker.send_all([trial]) == [False]
    run_id = tracker.runs["trial", trial.trial_id()].info.run_id
    run = tracker.client.get_run(run_id)
    assert (run.info.status, run.data.tags[FAILURE]) == ("FAILED", "it broke")
    assert run.data.params == {name: str(value) for name, value in trial.params().items()}
    with folder.claim(trial.canonical_json(), "ours") as attempt:
        attempt.append(measurements)
        attempt.finish({"epochs": 1})
    tracker = Tracker(sweep, ledger, tracking_uri) if is_new else tracker
    assert tracker.send_all([trial]) == [True]
    run = tracker.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert FAILURE not in run.data.tags
    assert run.data.tags["memray.epochs"] == "1"
    assert sorted((point.step, point.value) for point in all_points(tracker.client, run)) == [(0, 0.1), (1, 0.2)]


def test_what_exceeds_one_call_of_mlflow_arrives_whole(tmp_path: Path, tracking_uri: str) -> None:
    sweep = Sweep([TrialSpec()], name="large")
    (trial,) = sweep.trials
    ledger = Ledger(str(tmp_path), sweep.name)
    metrics = {f"metric/{number}": float(number) for number in range(10)}
    with ledger.trial(trial.trial_id()).claim(trial.canonical_json(), "ours") as attempt:
        attempt.append(replicate(*[metrics] * 250))
        attempt.finish({f"said_{number}": number for number in range(150)})
    tracker = Tracker(sweep, ledger, tracking_uri)
    assert tracker.send_all(sweep.trials) == [True]
    run = tracker.client.get_run(tracker.runs["trial", trial.trial_id()].info.run_id)
    assert sum(name.startswith("memray.said_") for name in run.data.tags) == 150
    assert run.data.params == {name: str(value) for name, value in trial.params().items()}
    found = {(point.key, point.step, point.value) for point in all_points(tracker.client, run)}
    assert found == {(key, step, value) for key, value in metrics.items() for step in range(250)}
    tracker.send_cells(sweep.cells())
    assert not [each for each in audit(sweep, ledger, tracking_uri) if "MLflow" in each]


def finish_all(sweep: Sweep, folder: Path) -> Ledger:
    ledger = Ledger(str(folder), sweep.name)
    for trial in sweep.trials:
        with ledger.trial(trial.trial_id()).claim(trial.canonical_json(), "ours") as attempt:
            attempt.append(replicate({"recall/robust": 0.1}))
            attempt.finish({"epochs": 0})
    return ledger


def test_of_two_runs_that_two_writers_made_whoever_looks_next_deletes_one(tmp_path: Path, tracking_uri: str) -> None:
    sweep = Sweep([TrialSpec(string_seed=seed) for seed in range(2)], name="doubled")
    ledger = finish_all(sweep, tmp_path)
    writers = [Tracker(sweep, ledger, tracking_uri) for _ in range(2)]  # both have looked before either wrote
    for writer in writers:
        writer.send_all(sweep.trials)
        writer.send_cells(sweep.cells())
    number = lambda: len(writers[0].client.search_runs([writers[0].experiment_id]))  # noqa: E731
    assert number() == 1 + 2 * 2 + 2 * 1
    third = Tracker(sweep, ledger, tracking_uri)
    assert number() == 1 + 2 + 1
    assert third.send_all(sweep.trials) == [True, True]
    assert number() == 1 + 2 + 1
    assert not [each for each in audit(sweep, ledger, tracking_uri) if "MLflow" in each]


def test_a_damaged_folder_keeps_only_its_own_trial_from_mlflow(tmp_path: Path, tracking_uri: str) -> None:
    other_cell = StringsSpec(alphabet_size=3)
    sweep = Sweep([TrialSpec(), TrialSpec(string_seed=1), TrialSpec(strings=other_cell)], name="damaged")
    ledger = finish_all(sweep, tmp_path)
    damaged, *others = sweep.trials
    (tmp_path / "damaged" / damaged.trial_id() / "measurements" / "0001-0001.jsonl").write_text("edited")
    tracker = Tracker(sweep, ledger, tracking_uri)
    with pytest.raises(ValueError, match="does not match the digest"):
        tracker.send_all(sweep.trials)
    for trial in others:
        run = tracker.client.get_run(tracker.runs["trial", trial.trial_id()].info.run_id)
        assert run.info.status == "FINISHED"
    with pytest.raises(ValueError, match="does not match the digest"):
        tracker.send_cells(sweep.cells())
    assert ("cell", others[-1].cell_id()) in tracker.runs
