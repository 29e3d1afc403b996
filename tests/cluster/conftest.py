"""Real sweeps through the real command line, each in processes of its own."""

import contextlib
import functools
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Loopback. Set before Ray is imported anywhere: its clients in this process would else ask for a token.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Ray's processes give way to all others, and beside another test that computes they hardly come to run.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

import memray
from memray.cli import app
from memray.cluster.ledger import Ledger
from memray.cluster.storage import Claims
from memray.spec import TrialSpec
from memray.sweep import Sweep, load
from memray.trial import run_trial

from ..ports import free_port, is_listening
from .servers import s3_bucket

ROOT = Path(memray.__path__[0]).parent

STUDY = '''"""Does a small string reach the ledger and MLflow?

Hypothesis: yes.
"""

from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=24), training=TrainingSpec(epochs=8), probes=ProbesSpec(epochs=(0, 4), num_held_out=2)
)


def sweep(*, scale: Scale = "tiny", seeds: int = 2, alphabet_sizes: tuple[int, ...] = (2, 7), epochs: int = 8) -> Sweep:
    return Sweep(
        vary(BASE, {"strings.alphabet_size": size, "training.epochs": epochs} | seed)
        for size in alphabet_sizes
        for seed in replicates(BASE, seeds)
    )
'''


@dataclass
class StudyFolder:
    """A folder with a study and a storage, and the command line run in it.

    Attributes:
        uri: A storage elsewhere, in place of the folder's own.
    """

    folder: Path
    study: str = "small.py"
    uri: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def database(self) -> Path:
        return self.storage / "mlflow.db"

    def command(self, verb: str, *arguments: str) -> list[str]:
        storage = [] if verb == "trial" else ["--storage", self.uri or str(self.storage)]
        return [sys.executable, "-m", "memray", verb, self.study, *arguments, *storage]

    def options(self) -> dict:
        # Loopback, one machine: without a token, and without what a developer's shell may hold.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MEMRAY_"))}
        environment = inherited | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)} | self.environment
        return {"cwd": self.folder, "env": environment, "text": True}

    def run(self, verb: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(verb, *arguments), capture_output=True, timeout=240, check=False, **self.options()
        )
        assert done.returncode == expect, f"{verb} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def invoke(self, verb: str, *arguments: str, expect: int = 0) -> Result:
        """As `run`, in this process: for verbs that leave no trace in it."""
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(app, self.command(verb, *arguments)[3:])
        assert done.exit_code == expect, f"{verb} left with {done.exit_code}:\n{done.output}"
        return done

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(verb, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self.options()
        )

    def count(self, table: str) -> int:
        """Rows of a table of MLflow's database."""
        with sqlite3.connect(self.database) as connection:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def count_runs(self) -> int:
        """Runs that MLflow shows: a cell's that a killed launch left half written is deleted there, and made anew."""
        with sqlite3.connect(self.database) as connection:
            query = "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'"
            return connection.execute(query).fetchone()[0]


def make_study_folder(folder: Path, study: str = STUDY) -> StudyFolder:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.py").write_text(study)
    return StudyFolder(folder)


def sweep_of(study_folder: StudyFolder, **parameters: object) -> Sweep:
    return load(study_folder.folder / study_folder.study, **parameters)


@functools.cache
def _alone(spec_json: str) -> list[dict]:
    return [each.record() for each in run_trial(TrialSpec.model_validate_json(spec_json))]


def alone(trial: TrialSpec) -> list[dict]:
    """What one process measures by itself; computed once for all tests of this run."""
    return _alone(trial.model_dump_json())


def client_of(study_folder: StudyFolder) -> MlflowClient:
    return MlflowClient(f"sqlite:///{study_folder.database}")


def runs_of(study_folder: StudyFolder, kind: str) -> list:
    client = client_of(study_folder)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`memray.kind` = '{kind}'"))


def attempts_of(study_folder: StudyFolder) -> dict[str, int]:
    ledger = Ledger(str(study_folder.storage), "small")
    found = {trial_id: ledger.trial(trial_id).finished() for trial_id in ledger.trial_ids()}
    return {trial_id: each.attempt for trial_id, each in found.items() if each}


@pytest.fixture
def study_folder(tmp_path: Path) -> StudyFolder:
    return make_study_folder(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A sweep of four trials that has been run, on reused actors. Tests read it; one that writes copies it."""
    made = make_study_folder(tmp_path_factory.mktemp("finished"))
    made.run("run", "--max-concurrent", "1")
    return made


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URI of an empty bucket on an S3 server of this test run."""
    pytest.importorskip("moto")
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """An empty ledger, once in a folder and once in a bucket: the contract holds for both."""
    if request.param == "folder":
        return Ledger(str(tmp_path / "runs"), "sweep")
    uri = request.getfixturevalue("bucket").format(request.node.name.partition("[")[0])
    return Ledger(uri, "sweep", claims=Claims())


@pytest.fixture
def local(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "runs"), "sweep")


@dataclass(frozen=True)
class Head:
    """A Ray head node of five pretended cores, started by hand as on a cluster."""

    address: str
    dashboard: str
    folder: Path

    def placement_groups(self) -> list[str]:
        """Ids of the placement groups that are left."""
        from ray.util.state import list_placement_groups

        groups = list_placement_groups(address=self.dashboard, filters=[("state", "!=", "REMOVED")])
        return [str(group) for group in groups]


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """`ray start --head` on ports of its own; its processes are ended by their ids."""
    import psutil

    port, dashboard, agent = free_port(), free_port(), free_port()
    before = {each.pid for each in psutil.process_iter()}
    temporary = tempfile.mkdtemp(prefix="memray-ray-")  # Ray's sockets need a short path
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=5", "--disable-usage-stats"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    # Where another head on this machine has its usual port, the agent that takes jobs goes without, and says nothing.
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={free_port()}"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={temporary}"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    started = [
        each
        for each in psutil.process_iter(["cmdline"])
        if each.pid not in before and re.search(rf"{temporary}|:{port}\b", " ".join(each.info["cmdline"] or []))
    ]
    try:
        deadline = time.monotonic() + 60
        while not is_listening(agent):
            assert time.monotonic() < deadline, "the head node's agent, which takes jobs, did not start"
            time.sleep(0.3)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(temporary))
    finally:
        for each in started:
            for process in (*each.children(recursive=True), each):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
