"""A sweep as a Ray job on a head node that was started by hand, through Ray's own command and through `submit`."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from memray.cluster import metrics
from memray.cluster.ledger import Ledger
from memray.cluster.submission import Job, code_sha256, runtime_env

from ..ports import free_port
from .conftest import ROOT, STUDY, Head

# As Ray names them.
TRIALS, BEHIND, IN_FLIGHT = (f"ray_{name}" for name in (metrics.TRIALS, metrics.BEHIND, metrics.IN_FLIGHT))
# One trial of two fails: the directory's tokenizer and config satisfy the plan, and its weights are cut off.
FAILING_STUDY = STUDY.replace(
    "        vary(BASE,",
    "        vary(BASE, {'model.pretrained': size == 7, 'model.path': BROKEN if size == 7 else None} |",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a small study, and with what a checkout gathers that no job needs."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "memray", folder / "memray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "infra", folder / "infra")
    shutil.copy(ROOT / ".rayignore", folder)
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "small.py").write_text(STUDY)
    gathered = (".venv/lib", ".git/objects", "build", "runs/small", "report/small", "mlruns", "docs", "tests")
    for left in (*gathered, "memray.egg-info"):
        (folder / left).mkdir(parents=True)
        (folder / left / "large").write_bytes(os.urandom(1_000_000))
    for cache in (".pytest_cache", ".hypothesis", ".ruff_cache", ".import_linter_cache", "memray/__pycache__"):
        (folder / cache).mkdir()
        (folder / cache / "large").write_bytes(os.urandom(1_000_000))
    return folder


def environment(**variables: str) -> dict[str, str]:
    """Loopback, without a token and without what a developer's shell may hold."""
    foreign = ("MLFLOW_", "MEMRAY_", "RAY_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return inherited | {"RAY_AUTH_MODE": "disabled"} | variables


def memray(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memray", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=600, check=False
    )


def ray_job_submit(folder: Path, head: Head, *command: str) -> subprocess.CompletedProcess[str]:
    """Ray's own command, as the README gives it."""
    words = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head.dashboard]
    words += ["--runtime-env", "infra/runtime_env.yaml", "--working-dir", ".", "--", *command]
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )


@contextmanager
def driver_node(head: Head) -> Iterator[str]:
    """A second node, labelled for drivers; its id.

    Each node unpacks a job's files into the same folder of this machine, and deletes them when it is done with them: so
    this one sees a folder of its own there.
    """
    from ray.util.state import list_nodes

    def alive() -> set[str]:
        nodes: list[Any] = list_nodes(address=head.dashboard)
        return {each.node_id for each in nodes if each.state == "ALIVE"}

    before = alive()
    words = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={head.address}"]
    words += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--labels=role=driver"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = environment(PATH=path, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")
    (unpacked,) = head.folder.glob("session_2*/runtime_resources")
    apart = f"mount -t tmpfs tmpfs {unpacked} && exec {shlex.join(words)}"
    node = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", apart],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (joined := alive() - before):
            if node.poll() is not None:
                assert os.geteuid() != 0
                pytest.skip("a view of its own on the file system needs root")
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.3)
        yield next(iter(joined))
    finally:
        node.terminate()
        node.wait(timeout=60)
    deadline = time.monotonic() + 60
    while alive() & joined:
        assert time.monotonic() < deadline, "the node did not leave"
        time.sleep(0.3)


def last_job(head: Head):
    """The job that was submitted last, as Ray tells of it."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.dashboard)
    job = max(client.list_jobs(), key=lambda each: (each.submission_id is not None, each.start_time))
    return job, client.get_job_logs(job.submission_id) if job.submission_id else ""


def uploaded(head: Head) -> Path:
    """What the last job was given, as its node unpacked it."""
    carried = last_job(head)[0].runtime_env or {}
    package = carried["working_dir"].rpartition("/")[2].removesuffix(".zip")
    (found,) = head.folder.glob(f"session_2*/runtime_resources/working_dir_files/{package}")
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run_states(storage: Path, sweep: str) -> dict[str, list[str]]:
    """The statuses of MLflow's runs of a sweep, by their kind."""
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(sweep)
    assert experiment is not None
    states: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        states.setdefault(run.data.tags["memray.kind"], []).append(run.info.status)
    return {kind: sorted(found) for kind, found in states.items()}


def attempts(storage: Path, sweep: str) -> list[int]:
    ledger = Ledger(str(storage), sweep)
    return [found.attempt for each in ledger.trial_ids() if (found := ledger.trial(each).finished())]


def gauges(head: Head) -> Iterator[tuple[str, dict[str, str], float]]:
    """What Prometheus is told of sweeps now, where Ray says that it is to ask: names, labels and values."""
    for group in json.loads((head.folder / "prom_metrics_service_discovery.json").read_text()):
        for target in group["targets"]:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    if family.name.startswith("ray_memray_"):
                        yield from ((family.name, each.labels, each.value) for each in family.samples)


def check_what_the_dashboard_shows(told: list[tuple[str, dict[str, str], float]]) -> None:
    """Of a sweep of five trials, by the labels that the dashboard's queries ask for."""
    by_state = [(each["state"], value) for name, each, value in told if (name, each.get("sweep")) == (TRIALS, "demo")]
    assert {state for state, value in by_state if value} >= {"planned", "running", "finished"}
    assert {value for _, value in by_state} <= {0, 1, 2, 3, 4, 5}
    behind = [value for name, each, value in told if (name, each.get("sweep")) == (BEHIND, "demo")]
    assert behind
    assert set(behind) <= {0, 1, 2, 3, 4, 5}
    assert [value for name, each, value in told if name == IN_FLIGHT and each["NodeAddress"] and value]


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_ray_job_submit_runs_the_demo_and_mlflow_holds_it(head: Head, tmp_path: Path) -> None:
    options = ["-p", "seeds=1", "--storage", str(tmp_path), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    told: list[tuple[str, dict[str, str], float]] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ray_job_submit, ROOT, head, "python", "-m", "memray", "run", "sweeps/demo.py", *options)
        while not running.done():
            told += gauges(head)
            time.sleep(1)
    done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    check_what_the_dashboard_shows(told)
    job, log = last_job(head)
    assert job.status == "SUCCEEDED"
    assert "5 trials to run" in log
    assert "5/5" in log
    assert "\r" not in log  # a line a trial, and no bar drawn over itself
    assert "\x1b" not in log
    package = uploaded(head)
    assert (package / "memray" / "__main__.py").is_file()
    assert not [path for path in package.rglob("*") if path.name in (".venv", ".git", "__pycache__", "runs", "build")]
    assert size_of(package) < 2_000_000
    assert run_states(tmp_path, "demo") == {
        "sweep": ["FINISHED"],
        "cell": ["FINISHED"] * 5,
        "trial": ["FINISHED"] * 5,
    }
    audit = memray(ROOT, "audit", "sweeps/demo.py", *options)
    assert audit.returncode == 0, audit.stderr
    assert "5 trials, 0 differences" in audit.stdout


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_submit_follows_a_job_that_outlives_it(head: Head, project: Path, tmp_path: Path) -> None:
    arguments = ["submit", "sweeps/small.py", "-p", "seeds=1", "--address", head.dashboard]
    arguments += ["--storage", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [sys.executable, "-m", "memray", *arguments],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal: what is started in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "2 trials to run" in line:
            break
    job, _ = last_job(head)
    assert job.status == "RUNNING"  # the line came while there was more to come
    process.send_signal(signal.SIGINT)
    told = process.stdout.read()
    assert process.wait(timeout=30) == 130
    for verb in ("logs", "stop"):
        assert f"ray job {verb} --address {head.dashboard}" in told
    assert (told.count(job.submission_id), "Traceback" in told) == (3, False)
    # The same job once more is the one that runs.
    done = memray(project, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"job {job.submission_id} runs already" in done.stdout
    ended, _ = last_job(head)
    assert (ended.submission_id, ended.status) == (job.submission_id, "SUCCEEDED")
    assert re.fullmatch(r"small-[0-9a-f]{8}-1", str(ended.submission_id))
    assert {name: (ended.metadata or {})[name] for name in ("sweep", "trials")} == {"sweep": "small", "trials": "2"}
    assert sorted(path.name for path in uploaded(head).iterdir()) == [".rayignore", "infra", "memray", "sweeps"]
    assert size_of(uploaded(head)) < 2_000_000  # the code, and no results

    # Ray lets these variables override the address that its client is given.
    done = memray(project, *arguments[:2], "-p", "seeds=2", *arguments[4:], RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials to run" in done.stdout
    assert done.stdout.count("2/2") == 1
    assert done.stdout.endswith("SUCCEEDED\n")
    assert attempts(tmp_path / "runs", "small") == [1, 1, 1, 1]
    assert str(last_job(head)[0].submission_id).rpartition("-")[0] != str(job.submission_id).rpartition("-")[0]
    assert run_states(tmp_path / "runs", "small")["trial"] == ["FINISHED"] * 4


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_a_job_on_a_node_for_drivers_finishes_the_other_trials_and_fails_with_one(
    head: Head, project: Path, tmp_path: Path
) -> None:
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    broken, storage = tmp_path / "broken", tmp_path / "runs"
    load_model(ModelSpec(), seed=0).save_pretrained(broken)
    character_tokenizer().save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (project / "sweeps" / "small.py").write_text(
        FAILING_STUDY.replace("def sweep", f"BROKEN = {str(broken)!r}\n\n\ndef sweep")
    )
    options = ["-p", "seeds=1", "--storage", str(storage)]
    options += ["--driver-label", "role=driver", "--address", head.dashboard]
    with driver_node(head) as node_id:
        done = memray(project, "submit", "sweeps/small.py", *options)
        job, _ = last_job(head)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 trials to run" in done.stdout
    assert "failed: " in done.stdout
    assert done.stdout.endswith("FAILED\n")
    assert (job.status, job.driver_exit_code) == ("FAILED", 1)
    assert job.driver_node_id == node_id
    assert attempts(storage, "small") == [1]
    assert run_states(storage, "small")["trial"] == ["FAILED", "FINISHED"]


@pytest.mark.fault
def test_a_job_runs_the_uploaded_project_and_keeps_nothing_in_it(head: Head, project: Path) -> None:
    (project / "where.py").write_text(
        "import memray, ray\n"
        "def place() -> str:\n    import memray\n    return memray.__file__\n"
        "ray.init(log_to_driver=False)\n"
        "print(memray.__file__, ray.get(ray.remote(place).remote()), sep='\\n')\n"
        "from memray.cli import main\n"
        "import sys\nsys.argv = ['memray', 'run', 'sweeps/small.py']\nmain()\n"
    )
    done = ray_job_submit(project, head, "python", "where.py")
    assert done.returncode == 1
    job, log = last_job(head)
    assert log.count(str(uploaded(head) / "memray" / "__init__.py")) == 2
    assert job.driver_exit_code == 2
    assert "inside a Ray job the storage must be absolute" in log


# (further arguments, what the refusal must say)
REFUSED = {
    "no storage": ([], "a job's storage must be absolute, but none is set"),
    "a relative storage": (["--storage", "runs"], "a job's storage must be absolute, but it is 'runs'"),
    "a bucket without a tracking server": (
        ["--storage", "s3://key:password@bucket/runs"],
        "the storage is a URI (s3://…); name a tracking server",
    ),
    "a relative database": (
        ["--storage", "/shared/runs", "--tracking-uri", "sqlite:///runs/mlflow.db"],
        "must be absolute, but it is sqlite:///runs/mlflow.db",
    ),
    "a variable that is not set": (
        ["--storage", "/shared/runs", "--send", "MEMRAY_NO_SUCH_KEY"],
        "what is sent to a job must be set here, but MEMRAY_NO_SUCH_KEY is not",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_job_that_would_lose_its_results_is_refused(what: str) -> None:
    arguments, sentence = REFUSED[what]
    done = memray(ROOT, "submit", "sweeps/demo.py", "--address", "http://127.0.0.1:9", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_changed_code_is_another_job(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)

    def base_id() -> str:
        told = {"code_sha256": code_sha256("sweeps/small.py")}
        return Job("small", "command", runtime_env({}), told, {}).base_id()

    assert base_id() == base_id()
    seen = {base_id()}
    for path in ("sweeps/small.py", "memray/cost.py"):
        with (project / path).open("a") as file:
            file.write("# a change that nobody committed\n")
        seen.add(base_id())
    assert len(seen) == 3


def test_a_study_that_the_job_would_not_carry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(STUDY)
    options = ["--address", "http://127.0.0.1:9", "--storage", str(tmp_path)]
    done = memray(ROOT, "submit", str(tmp_path / "small.py"), *options)
    assert done.returncode == 2
    assert f"the study must be a file below {ROOT}" in done.stderr


def test_a_working_directory_that_is_not_the_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(STUDY)
    options = ["--address", "http://127.0.0.1:9", "--storage", str(tmp_path)]
    done = memray(tmp_path, "submit", "small.py", *options, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert f"must be the project's with memray/ and infra/runtime_env.yaml, but {tmp_path} is not" in done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_without_a_dashboard_leaves_with_3_in_seconds(address: str, tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound, so that nobody else takes it, and deaf
        unused.bind(("127.0.0.1", 0))
        address = address.format(unused.getsockname()[1])
        began_s = time.monotonic()
        options = ["--address", address, "--storage", str(tmp_path)]
        done = memray(ROOT, "submit", "sweeps/demo.py", *options, HF_TOKEN="nobody's business")
        assert done.returncode == 3
        assert "does not answer" in done.stderr
        assert "sent as they are, for there is no token to seal them with: HF_TOKEN" in done.stderr
        assert "nobody's business" not in done.stderr
        assert time.monotonic() - began_s < 30  # of which imports take most
