"""A study on a corpus on real parts: Ray Tune, probe actors that share a look, the ledger, MLflow and the CLI."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from memray.cluster.audit import audit, remeasured
from memray.cluster.ledger import Ledger
from memray.samples import prepare_samples

from .conftest import Head, StudyFolder, alone, client_of, make_study_folder, runs_of, sweep_of

STUDY = '''"""Are smaller corpora recited sooner?

Hypothesis: yes.
"""

from pathlib import Path

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import EmbeddingsSpec, GenerationSpec, ProbesSpec
from memray.spec import ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(path=str(Path(__file__).with_name("rows.jsonl"))), num_samples=120),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=3, strings_per_step=30, learning_rate=3e-3, keep_weights="probe_epochs"),
    probes=ProbesSpec(epochs=(0, 1), num_held_out=20, compared_strings=60, embeddings=EmbeddingsSpec()),
)
GENERATES = {"probes.generation": GenerationSpec(num_samples=6, checked_share=0.1)}
SHARDED = {"compute.engine": "deepspeed", "compute.workers": 2, "compute.zero_stage": 1}


def sweep(
    *, seeds: int = 1, generates: bool = False, sharded: bool = False, numbers: tuple[int, ...] = (60, 120),
    epochs: int = 3, checkpoint_s: float = 600,
) -> Sweep:
    more = {"training.epochs": epochs, "compute.checkpoint_s": checkpoint_s} | (GENERATES if generates else {})
    return Sweep(
        vary(BASE, {"corpus.num_samples": number} | seed | placed | more)
        for number in numbers
        for placed in ([{}, SHARDED] if sharded else [{}])
        for seed in replicates(BASE, seeds)
    )
'''


def corpus_folder(folder: Path) -> StudyFolder:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prefix": f"What is {k} and {k}?", "reference": f"It is {2 * k}, as all know."} for k in range(150)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_study_folder(folder, STUDY)


@pytest.fixture(scope="module")
def finished_corpus(tmp_path_factory: pytest.TempPathFactory, head: Head) -> StudyFolder:
    study_folder = corpus_folder(tmp_path_factory.mktemp("corpus"))
    study_folder.run("run", "--probe-actors", "3", "--address", head.address)
    return study_folder


def test_a_look_that_three_actors_share_gives_the_numbers_of_one_process(finished_corpus: StudyFolder) -> None:
    sweep = sweep_of(finished_corpus)
    ledger = Ledger(str(finished_corpus.storage), sweep.name)
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        assert folder.measurements()[0] == alone(trial) == remeasured(trial, folder)
        finished = folder.finished()
        assert finished is not None
        assert finished.summary["probe_looks"] == [3, 3, 3]  # a share each, at epochs 0, 1 and 3
        samples = folder.samples()
        assert samples.num_rows == 3 * (trial.strings_together + 20)
    assert audit(sweep, ledger, f"sqlite:///{finished_corpus.database}") == []


def test_the_digest_of_the_exact_token_ids_is_a_dataset_of_the_run(finished_corpus: StudyFolder) -> None:
    by_id = {trial.trial_id(): trial for trial in sweep_of(finished_corpus).trials}
    client = client_of(finished_corpus)
    for run in runs_of(finished_corpus, "trial"):
        digest = prepare_samples(by_id[run.data.tags["memray.trial_id"]]).digest
        inputs = client.get_run(run.info.run_id).inputs
        assert inputs is not None
        (logged,) = inputs.dataset_inputs
        assert logged.dataset.name == "rows.jsonl"
        assert logged.dataset.digest == digest[:32]
        assert json.loads(logged.dataset.profile or "")["sha256"] == digest
        assert {each.path for each in client.list_artifacts(run.info.run_id)} >= {"samples.parquet"}


def test_sending_all_again_changes_nothing(finished_corpus: StudyFolder) -> None:
    before = [finished_corpus.count(table) for table in ("metrics", "inputs", "datasets", "runs")]
    finished_corpus.invoke("sync")
    assert [finished_corpus.count(table) for table in ("metrics", "inputs", "datasets", "runs")] == before


@pytest.mark.fault
def test_generation_that_is_added_later_is_done_with_the_weights_that_were_kept(
    tmp_path: Path, head: Head, finished_corpus: StudyFolder
) -> None:
    done: subprocess.CompletedProcess[str] = finished_corpus.run(
        "probe", "-p", "generates=true", "--address", head.address
    )
    sweep = sweep_of(finished_corpus, generates=True)
    ledger = Ledger(str(finished_corpus.storage), sweep.name, probes_ids=sweep.probes_ids())
    for trial in sweep.trials:
        *_, last = ledger.trial(trial.trial_id()).measurements()[0]
        assert last["metrics"]["generation/disagreement"] == 0, done.stdout
        assert ledger.trial(trial.trial_id()).measurements()[0] == alone(trial)


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_many_devices_train_a_corpus_as_one_does_and_record_all_of_it(tmp_path: Path, head: Head) -> None:
    study_folder = corpus_folder(tmp_path)
    process = study_folder.start("run", "-p", "sharded=true", "-p", "numbers=[60]", "--address", head.address)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    sweep = sweep_of(study_folder, sharded=True, numbers=(60,))
    ledger = Ledger(str(study_folder.storage), sweep.name)
    folders = {trial.compute.engine: ledger.trial(trial.trial_id()) for trial in sweep.trials}
    one, many = folders["torch"].measurements()[0], folders["deepspeed"].measurements()[0]
    assert [each["epoch"] for each in many] == [each["epoch"] for each in one] == [0, 1, 3]
    for key in ("recall/nll_nats", "recall/heldout_nll_nats", "collapse/effective_rank"):
        theirs = [each["metrics"][key] for each in one]
        assert [each["metrics"][key] for each in many] == pytest.approx(theirs, rel=1e-3)
    assert one[-1]["metrics"]["recall/nll_nats"] < 0.9 * one[0]["metrics"]["recall/nll_nats"], "it must have trained"
    tables = {engine: folder.samples() for engine, folder in folders.items()}
    for name in ("epoch", "sample", "role", "row", "prompt_tokens", "reference_tokens", "prefix", "reference"):
        assert tables["deepspeed"][name].to_pylist() == tables["torch"][name].to_pylist(), name
    for row in tables["deepspeed"].to_pylist():
        assert len(row["is_right"]) == len(row["log_prob"]) == len(row["predicted"]) == row["reference_tokens"]
        assert np.isfinite(row["log_prob"]).all()
    assert tables["deepspeed"].num_rows == 3 * (60 + 20)
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        assert folder.measurements()[0] == remeasured(trial, folder)
        assert folder.kept_weights().keys() == {0, 1, 3}
    assert audit(sweep, ledger, f"sqlite:///{study_folder.database}") == []


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_trial_on_a_corpus_whose_actor_is_killed_halfway_ends_bit_identical(tmp_path: Path, head: Head) -> None:
    study_folder, epochs = corpus_folder(tmp_path), 60
    options = ("numbers=[60]", f"epochs={epochs}", "checkpoint_s=0")
    stated = [part for option in options for part in ("-p", option)]
    sweep = sweep_of(study_folder, numbers=(60,), epochs=epochs, checkpoint_s=0)
    (trial,) = sweep.trials
    ledger = Ledger(str(study_folder.storage), sweep.name)
    folder = ledger.trial(trial.trial_id())
    process = study_folder.start("run", *stated, "--address", head.address)
    while (kept := folder.checkpoint()) is None or kept.epoch < epochs // 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    (lease,) = study_folder.storage.glob(f"small/{trial.trial_id()}/leases/0001.json")
    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    finished = folder.finished()
    assert finished is not None
    assert finished.attempt == 2
    assert epochs // 2 <= finished.summary["resumed_from_epoch"] < epochs
    assert folder.measurements()[0] == alone(trial) == remeasured(trial, folder)
    assert folder.samples().num_rows == 3 * (60 + 20)
    assert audit(sweep, ledger, f"sqlite:///{study_folder.database}") == []
