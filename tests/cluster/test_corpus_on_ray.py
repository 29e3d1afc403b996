"""A study on a corpus on real parts: Ray Tune, probe actors that share a look, the ledger, MLflow and the CLI."""

import json
import subprocess
from pathlib import Path

import pytest

from memray.cluster.audit import audit, remeasured
from memray.cluster.ledger import Ledger
from memray.samples import prepare_samples
from memray.trial import run_trial

from .conftest import Head, StudyFolder, client_of, make_study_folder, runs_of, sweep_of

STUDY = '''"""Are smaller corpora recited sooner?

Hypothesis: yes.
"""

from pathlib import Path

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import GenerationSpec, ProbesSpec
from memray.spec import ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(path=str(Path(__file__).with_name("rows.jsonl"))), num_samples=120),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=3, strings_per_step=30, learning_rate=3e-3, keep_weights="probe_epochs"),
    probes=ProbesSpec(epochs=(0, 1), num_held_out=20, compared_strings=60),
)
GENERATES = {"probes.generation": GenerationSpec(num_samples=6, checked_share=0.1)}


def sweep(*, seeds: int = 1, generates: bool = False) -> Sweep:
    return Sweep(
        vary(BASE, {"corpus.num_samples": number} | seed | (GENERATES if generates else {}))
        for number in (60, 120)
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
        alone = [each.record() for each in run_trial(trial)]
        assert folder.measurements()[0] == alone == remeasured(trial, folder)
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
    finished_corpus.run("sync")
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
        alone = [each.record() for each in run_trial(trial)]
        assert ledger.trial(trial.trial_id()).measurements()[0] == alone
