"""Sweeps that write to a real MLflow server, with accounts, on a real PostgreSQL; and what its loss does to them."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import requests
from mlflow.tracking import MlflowClient
from pyarrow.fs import FileSelector, FileSystem
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger
from memray.cluster.mirror import WRITER
from memray.cluster.tracking import points, results
from memray.spec import TrialSpec

from ..ports import free_port
from .conftest import ROOT, STUDY, StudyFolder, alone, sweep_of
from .servers import MlflowServer, Postgres, credentials, lossy, mlflow_server, postgres
from .test_faults import wait_for

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

# Two trials in one cell, so that the cell waits for both.
SMALL = {"seeds": 2, "alphabet_sizes": (2,)}
# The runs of a sweep that MLflow shows, by one of their tags.
ACTIVE = (
    "FROM tags JOIN runs USING (run_uuid) JOIN experiments USING (experiment_id) "
    "WHERE runs.lifecycle_stage = 'active' AND experiments.name = %(sweep)s AND tags.key = %(tag)s"
)
# Seconds that what is lost stays away: MLflow is tried in between.
AWAY_S = {"lose_server": 60.0, "lose_database": 10.0}


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as made:
        yield made


@pytest.fixture(scope="module")
def server(database: Postgres, bucket: str) -> Iterator[MlflowServer]:
    with mlflow_server(database, bucket) as made:
        yield made


def study_of(folder: Path, name: str, server: MlflowServer, account: dict[str, str]) -> StudyFolder:
    """The small study under a name of its own, which is that of its experiment; all share one storage."""
    (folder / f"{name}.py").write_text(STUDY)
    return StudyFolder(folder, f"{name}.py", environment=account | {"MLFLOW_TRACKING_URI": server.uri})


def options(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters of a study as the command line takes them."""
    return [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]


def assert_whole(
    study_folder: StudyFolder, server: MlflowServer, database: Postgres, patch: pytest.MonkeyPatch, **parameters: Any
) -> None:
    """The end check: every trial once in the ledger and on the server, each number that of one process alone."""
    for name, value in server.admin.items():
        patch.setenv(name, value)
    sweep = sweep_of(study_folder, **parameters)
    ledger = Ledger(str(study_folder.storage), sweep.name)
    assert audit(sweep, ledger, server.uri) == []
    # Beside the audit, which asks MLflow, what its database holds.
    kinds = database.query(
        "tracking", f"SELECT tags.value, count(*) {ACTIVE} GROUP BY tags.value", sweep=sweep.name, tag="memray.kind"
    )
    assert dict(kinds) == {"sweep": 1, "trial": len(sweep.trials), "cell": len(sweep.cells())}
    for trial in sweep.trials:
        measurements = ledger.trial(trial.trial_id()).measurements()[0]
        assert measurements == alone(trial)
        expected = Counter((point.key, point.step, point.value) for point in points(measurements, 0))
        assert Counter(points_of(database, sweep.name, trial)) == expected


def points_of(database: Postgres, sweep: str, trial: TrialSpec) -> list[tuple]:
    """The rows of a trial in MLflow's database: key, epoch, value."""
    runs = f"SELECT run_uuid {ACTIVE} AND tags.value = %(trial)s"
    query = f"SELECT key, step, value FROM metrics WHERE run_uuid IN ({runs})"
    return database.query("tracking", query, sweep=sweep, tag="memray.trial_id", trial=trial.trial_id())


def test_the_server_admits_only_accounts_and_the_names_it_is_told(server: MlflowServer) -> None:
    page = f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    admin = ("admin", server.admin["MLFLOW_TRACKING_PASSWORD"])
    assert requests.get(page, timeout=60).status_code == 401
    assert requests.get(page, auth=("admin", "another"), timeout=60).status_code == 401
    assert requests.get(page, auth=admin, timeout=60).status_code == 200
    assert requests.get(page, auth=admin, headers={"Host": "another.example"}, timeout=60).status_code == 403


# --- several nodes at once -----------------------------------------------------------------------------------


# Each node has an address of its own. Ray takes 127.0.0.1 for the machine's address on its network.
LOOPBACK = "127.0.0."


@contextlib.contextmanager
def node(cluster: Cluster, number: int, *options: str, **environment: str) -> Iterator[str]:
    """A Ray node with processes and a folder of its own, as on another machine; gives how leases call that machine.

    Without that every driver would find the head's raylet, and join that node wherever it was started.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={cluster.address}", *options]
    command += [f"--node-ip-address={LOOPBACK}{number}", f"--dashboard-agent-listen-port={free_port()}"]
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    namespaces += [] if os.geteuid() == 0 else ["--map-root-user"]
    process = subprocess.Popen(
        [*namespaces, "sh", "-c", f"mount -t tmpfs tmpfs /tmp/ray && exec {shlex.join(command)}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    try:
        deadline = time.monotonic() + 120
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None, "a node of its own could not be made, which takes root, or user namespaces"
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.1)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        yield boot + os.readlink(f"/proc/{children[0].pid}/ns/pid")
    finally:
        process.kill()  # and with it the first process of the node, and so all of them
        process.wait()


@contextlib.contextmanager
def head() -> Iterator[Cluster]:
    """A cluster whose head takes jobs and has no core for trials."""
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    arguments = {"num_cpus": 0, "include_dashboard": True, "node_ip_address": f"{LOOPBACK}2"} | ports
    made = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        yield made
    finally:
        made.shutdown()


def leases_of(study_folder: StudyFolder) -> tuple[list[dict], list[dict]]:
    """The leases of a sweep's trials, and those of who wrote to MLflow."""
    leases: tuple[list[dict], list[dict]] = [], []
    for path in study_folder.storage.glob(f"{Path(study_folder.study).stem}/*/leases/*.json"):
        leases[path.parts[-3] == WRITER].append(json.loads(path.read_text()))
    return leases


def test_launches_on_several_nodes_write_to_one_server_at_once(
    server: MlflowServer, database: Postgres, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"north": SMALL, "south": SMALL | {"alphabet_sizes": (7,)}}
    studies = {name: study_of(tmp_path, name, server, server.account(name)) for name in plans}
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(head())
        workers = {stack.enter_context(node(cluster, number, "--num-cpus=1")) for number in (3, 4)}
        drivers = {
            # Nobody but the driver is told the password: what trains needs none.
            name: stack.enter_context(
                node(cluster, number, "--num-cpus=0", f'--resources={{"{name}": 1}}', **study.environment)
            )
            for number, (name, study) in enumerate(studies.items(), start=5)
        }
        assert len({*workers, *drivers.values()}) == 4  # or the leases below could not tell where their holders were
        deadline = time.monotonic() + 120
        while sum(each["Alive"] for each in cluster.global_state.node_table()) < 1 + len(workers) + len(drivers):
            assert time.monotonic() < deadline, "the nodes did not join"
            time.sleep(0.3)
        client = JobSubmissionClient(f"http://{cluster.webui_url}")
        jobs = [
            client.submit_job(
                entrypoint=f"cd {tmp_path} && exec {shlex.join(study.command('run', *options(plans[name])))}",
                entrypoint_resources={name: 1},
            )
            for name, study in studies.items()
        ]
        deadline = time.monotonic() + 400
        while not all(client.get_job_status(job).is_terminal() for job in jobs):
            assert time.monotonic() < deadline, [client.get_job_logs(job) for job in jobs]
            time.sleep(0.5)
        logs = [client.get_job_logs(job) for job in jobs]
        assert [client.get_job_status(job) for job in jobs] == [JobStatus.SUCCEEDED] * len(jobs), logs
    used, written = set(), []
    for name, study in studies.items():
        assert_whole(study, server, database, monkeypatch, **plans[name])
        assert_same_results(study, server, **plans[name])
        trained, wrote = leases_of(study)
        used |= {each["machine"] for each in trained}
        assert [each["machine"] for each in wrote] == [drivers[name]]
        written += wrote
    assert used == workers
    assert max(each["claimed_s"] for each in written) < min(each["released_s"] for each in written)
    assert_artifacts_went_through(server, studies["north"], bucket, tmp_path / "fetched")


def assert_same_results(study_folder: StudyFolder, server: MlflowServer, **parameters: Any) -> None:
    """MLflow gives a notebook what the ledger gives it."""
    sweep = sweep_of(study_folder, **parameters)
    tracked, kept = (
        frame.sort_values(["trial_id", "epoch"], ignore_index=True)
        for frame in (results(sweep, tracking_uri=server.uri), results(sweep, storage=str(study_folder.storage)))
    )
    pd.testing.assert_frame_equal(tracked, kept, check_like=True, check_exact=True)


def assert_artifacts_went_through(server: MlflowServer, study_folder: StudyFolder, bucket: str, into: Path) -> None:
    """A client that knows nothing of the bucket reads from the server what the server keeps there."""
    client, ledger = MlflowClient(server.uri), Ledger(str(study_folder.storage), Path(study_folder.study).stem)
    into.mkdir()
    experiment = client.get_experiment_by_name(ledger.sweep)
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:/")
    for run in client.search_runs([experiment.experiment_id], "tags.`memray.kind` = 'trial'"):
        path = client.download_artifacts(run.info.run_id, "tokens.parquet", str(into))
        assert pq.read_table(path).equals(ledger.trial(run.data.tags["memray.trial_id"]).tokens())
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`memray.kind` = 'sweep'")
    frame = pd.read_parquet(client.download_artifacts(parent.info.run_id, "results.parquet", str(into)))
    assert len(frame) == sum(len(ledger.trial(trial_id).measurements()[0]) for trial_id in ledger.trial_ids())
    files, folder = FileSystem.from_uri(bucket.format("mlflow"))
    kept = files.get_file_info(FileSelector(folder, recursive=True))
    assert any(each.path.endswith(f"{parent.info.run_id}/artifacts/results.parquet") for each in kept)


# --- passwords -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, str]:
    """A study that was run with a wrong password, and what the launch said."""
    study = study_of(tmp_path_factory.mktemp("refused"), "refused", server, credentials("admin"))
    done = study.run("run", *options(SMALL))
    return study, done.stdout + done.stderr


def test_a_launch_that_the_server_refuses_trains_says_why_and_is_caught_up_with(
    server: MlflowServer, database: Postgres, refused: tuple[StudyFolder, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, said = refused
    assert "lacks 2 finished trials" in said
    assert "401" in said
    assert f"sync refused.py {' '.join(options(SMALL))}" in said
    wrong, nothing = study.environment, {"MLFLOW_TRACKING_URI": server.uri}
    said += "".join(
        study_with(study, environment).run("sync", *options(SMALL), expect=3).stderr for environment in (wrong, nothing)
    )
    assert said.count("401") == 3
    assert wrong["MLFLOW_TRACKING_PASSWORD"] not in said
    study_with(study, nothing | server.account("admitted")).run("sync", *options(SMALL))
    assert_whole(study, server, database, monkeypatch, **SMALL)


def study_with(study_folder: StudyFolder, environment: dict[str, str]) -> StudyFolder:
    return dataclasses.replace(study_folder, environment=environment)


def test_a_run_is_made_once_where_the_answer_to_its_creation_is_lost(
    server: MlflowServer,
    database: Postgres,
    refused: tuple[StudyFolder, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = study_of(tmp_path, "lost", server, server.account("lost"))
    shutil.copytree(refused[0].storage / "refused", study.storage / "lost")

    def makes_a_trial(path: str, body: bytes) -> bool:
        return path.endswith("/runs/create") and b"memray.trial_id" in body

    with lossy(server.uri, makes_a_trial) as uri:
        study.run("sync", *options(SMALL), "--tracking-uri", uri)
    study.run("sync", *options(SMALL))
    assert_whole(study, server, database, monkeypatch, **SMALL)


# --- outages -------------------------------------------------------------------------------------------------


def lose_server(server: MlflowServer, database: Postgres) -> Callable[[], None]:
    server.stop()
    return server.start


def lose_database(server: MlflowServer, database: Postgres) -> Callable[[], None]:
    database.crash()
    return database.start


@pytest.mark.parametrize("lose", [lose_server, lose_database])
def test_what_is_lost_in_mid_sweep_and_returns_is_caught_up_with(
    server: MlflowServer, database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable
) -> None:
    name, parameters = lose.__name__, SMALL | {"seeds": 3, "epochs": 200}
    study = study_of(tmp_path, name, server, server.account(name))
    sweep = sweep_of(study, **parameters)
    ledger, (first, second, last) = Ledger(str(study.storage), name), sweep.trials
    with contextlib.ExitStack() as stack:
        # Held as if by another launch: the second until what is lost is lost, the last until it is back.
        held, held_longer = (stack.enter_context(contextlib.ExitStack()) for _ in range(2))
        for trial, holder in ((second, held), (last, held_longer)):
            holder.enter_context(ledger.trial(trial.trial_id()).claim(trial.canonical_json(), "another"))
        process = study.start("run", *options(parameters), "--max-concurrent", "1")
        stack.callback(process.kill)
        wait_for(lambda: points_of(database, name, first), 120, process)
        lost_s, bring_back = time.monotonic(), lose(server, database)
        held.close()
        wait_for(lambda: ledger.trial(second.trial_id()).finished(), 120, process)
        time.sleep(max(0.0, lost_s + AWAY_S[name] - time.monotonic()))
        bring_back()
        assert process.poll() is None
        held_longer.close()
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "lacks" not in output
    assert_whole(study, server, database, monkeypatch, **parameters)
