"""What a launch does when a trial, the tracking server, the cluster or the storage fails."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from memray.cluster.audit import audit, remeasured
from memray.cluster.launch import MAX_FAILURES
from memray.cluster.ledger import Ledger
from memray.models import BUSY_HUB_S

from ..ports import free_port
from .conftest import STUDY, StudyFolder, alone, attempts_of, make_study_folder, runs_of, sweep_of
from .test_faults import wait_for


@pytest.mark.fault
def test_a_sweep_with_a_failing_trial_finishes_the_others_and_leaves_with_1(tmp_path: Path) -> None:
    # The directory's tokenizer and config satisfy the plan; its weights are cut off.
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    study = STUDY.replace(
        "        vary(BASE,",
        "        vary(BASE, {'model.pretrained': size == 7, 'model.path': BROKEN if size == 7 else None} |",
    ).replace("def sweep", f"BROKEN = {str(tmp_path / 'broken')!r}\n\n\ndef sweep")
    study_folder = make_study_folder(tmp_path, study)
    done = study_folder.run("run", "-p", "seeds=1", expect=1)
    assert "failed" in done.stderr
    assert list(attempts_of(study_folder).values()) == [1]
    assert sorted(run.info.status for run in runs_of(study_folder, "trial")) == ["FAILED", "FINISHED"]
    (failed,) = [run for run in runs_of(study_folder, "trial") if run.info.status == "FAILED"]
    assert "Traceback" in failed.data.tags["memray.failure"]
    assert len(list(study_folder.storage.glob("small/*/failed-*.json"))) == 1 + MAX_FAILURES
    assert "1 finished, 0 running, 1 failed, 0 planned" in study_folder.invoke("status", "-p", "seeds=1").stdout
    ledger, tracked = Ledger(str(study_folder.storage), "small"), f"sqlite:///{study_folder.database}"
    assert any(
        "planned, but the ledger says failed" in each
        for each in audit(sweep_of(study_folder, seeds=1), ledger, tracked)
    )


@pytest.mark.fault  # nothing fails, but it takes a launch of its own
def test_pretrained_weights_and_a_text_reach_the_actors_and_give_the_same_bits(tmp_path: Path) -> None:
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=11).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("so that a passage follows on another, and none of them twice. " * 3)
    model = f"ModelSpec(path={str(tmp_path / 'model')!r}, pretrained=True)"
    study = STUDY.replace("TrialSpec(\n", f"TrialSpec(model={model},\n", 1).replace(
        "import Probes", "import ModelSpec, Probes"
    )
    # Both paths are relative to the study's folder.
    text = "{'strings.kind': 'text', 'strings.path': 'text'} if size == 7 else {'strings.alphabet_size': size}"
    study = study.replace('{"strings.alphabet_size": size,', f"({text}) | {{")
    study_folder = make_study_folder(tmp_path, study)
    study_folder.run("run", "-p", "seeds=1")
    ledger = Ledger(str(study_folder.storage), "small")
    with contextlib.chdir(tmp_path):
        sweep = sweep_of(study_folder, seeds=1)
    assert [trial.strings.kind for trial in sweep.trials] == ["iid", "text"]
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        assert alone(trial) == folder.measurements()[0]
        assert remeasured(trial, folder) == folder.measurements()[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on loopback."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.fault
def test_a_server_that_was_away_is_caught_up_with(study_folder: StudyFolder, server: str) -> None:
    away = "http://127.0.0.1:9"
    done = study_folder.run("run", "-p", "seeds=1", "--tracking-uri", away)
    assert "lacks 2 finished trials" in done.stderr
    assert "sync small.py" in done.stderr
    study_folder.invoke("sync", "-p", "seeds=1", "--tracking-uri", away, expect=3)
    study_folder.invoke("sync", "-p", "seeds=1", "--tracking-uri", server)
    study_folder.invoke("sync", "-p", "seeds=1", "--tracking-uri", server)
    assert "0 differences" in study_folder.invoke("audit", "-p", "seeds=1", "--tracking-uri", server).stdout
    ledger = Ledger(str(study_folder.storage), "small")
    for trial in sweep_of(study_folder, seeds=1).trials:
        assert alone(trial) == ledger.trial(trial.trial_id()).measurements()[0]


# One trial with many segments, of which the first is seen long before the last.
LONGER = {"epochs": 1600, "seeds": 1, "alphabet_sizes": (7,)}


# --- storage that refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[StudyFolder]:
    """A study whose storage is a file system of 24 MiB, and MLflow's database elsewhere."""
    made = make_study_folder(tmp_path)
    made.storage.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(made.storage)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        assert os.geteuid() != 0
        pytest.skip("to mount a small file system needs root")
    made.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    try:
        yield made
    finally:
        subprocess.run(["umount", "--lazy", str(made.storage)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no room beside it."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def assert_undisturbed_here(study_folder: StudyFolder, **parameters: object) -> None:
    sweep, ledger = sweep_of(study_folder, **parameters), Ledger(str(study_folder.storage), "small")
    assert audit(sweep, ledger, study_folder.environment["MLFLOW_TRACKING_URI"]) == []
    for trial in sweep.trials:
        assert alone(trial) == ledger.trial(trial.trial_id()).measurements()[0]


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_full_disk_is_waited_for_a_while_then_said_and_the_sweep_goes_on_once_there_is_room(
    small_disk: StudyFolder,
) -> None:
    longer = [word for name, value in LONGER.items() for word in ("-p", f"{name}={json.dumps(value)}")]
    process = small_disk.start("run", *longer)

    def written() -> int:
        """Segments of measurements; one that is being written has another name."""
        return len(list(small_disk.storage.glob("small/*/measurements/0001-*.jsonl")))

    wait_for(written, 120, process)
    filler = fill(small_disk.storage)
    time.sleep(15)
    assert process.poll() is None
    before = written()
    filler.unlink()
    wait_for(lambda: written() > before, 120, process)  # by the attempt that waited
    filler = fill(small_disk.storage)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert re.search(r"trials wait to write, each for 60 s at most: .* failed: No space left on device", output), output
    assert "No space left on device; choose another with --storage or MEMRAY_STORAGE" in output
    filler.unlink()
    small_disk.run("run", *longer)
    assert_undisturbed_here(small_disk, **LONGER)


# --- memory and the hub --------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.quiet  # what is too much is told by what the machine has free
def test_a_trial_that_runs_out_of_memory_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    large = '"strings.length": 1000, "strings.num_strings": 64, "training.strings_per_step": 64'
    study = STUDY.replace('"training.epochs": epochs}', '"training.epochs": epochs} | (LARGE if size == 7 else {})')
    study_folder = make_study_folder(tmp_path, study.replace("\n\ndef sweep", f"\nLARGE = {{{large}}}\n\n\ndef sweep"))
    memory = psutil.virtual_memory()
    # What the launch itself takes, and a small trial, fit; the large one does not.
    at_most = (memory.total - memory.available + 3 * 2**30) / memory.total
    study_folder.environment |= {
        "RAY_memory_usage_threshold": f"{at_most:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    options = ["-p", "seeds=1", "-p", "alphabet_sizes=[2,7,26]", "--max-concurrent", "1"]
    assert " 4.5 " in study_folder.invoke("plan", *options[:-2]).stdout
    done = study_folder.run("run", *options, expect=1)
    assert "out of memory: Ray ended the trial as its node ran low. It was planned to take 4.5 GiB" in done.stderr
    assert "2 finished, 0 running, 1 failed" in study_folder.invoke("status", *options[:-2]).stdout
    assert sorted(run.info.status for run in runs_of(study_folder, "trial")) == ["FAILED", "FINISHED", "FINISHED"]
    sweep = sweep_of(study_folder, seeds=1, alphabet_sizes=(2, 7, 26))
    ledger = Ledger(str(study_folder.storage), "small")
    for trial in sweep.trials:
        folder = ledger.trial(trial.trial_id())
        assert folder.state() == "failed" or folder.measurements()[0] == alone(trial)
    differences = audit(sweep, ledger, f"sqlite:///{study_folder.database}")
    assert [each for each in differences if "the ledger says failed" not in each and "cell" not in each] == []


class BusyHub(http.server.BaseHTTPRequestHandler):
    """A hub that is asked too often."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(429)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.mark.fault
@pytest.mark.parametrize("is_there", [True, False], ids=["answers 429", "is away"])
def test_a_hub_that_gives_nothing_is_said_before_anything_is_scheduled(tmp_path: Path, is_there: bool) -> None:
    study = STUDY.replace("TrialSpec(\n", "TrialSpec(model=ModelSpec(size='70m', pretrained=True),\n", 1)
    study_folder = make_study_folder(tmp_path, study.replace("import Probes", "import ModelSpec, Probes"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BusyHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        port = hub.server_port if is_there else 9
        study_folder.environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hub")}
        done = study_folder.run("run", expect=2)
        hub.shutdown()
    assert ("429 Too Many Requests" if is_there else "Connection refused") in done.stderr
    assert "set model.path to a local copy" in done.stderr
    assert not list(study_folder.storage.glob("small/*/spec.json"))
    asked = [path for path in BusyHub.asked if "pythia-70m" in path]
    assert len(asked) >= (1 + len(BUSY_HUB_S) if is_there else 0)


def test_a_cluster_that_cannot_be_reached_leaves_with_3(study_folder: StudyFolder) -> None:
    assert study_folder.run("run", "--address", "127.0.0.1:9", expect=3).stderr.strip()


def test_a_storage_that_cannot_be_written_leaves_with_3(study_folder: StudyFolder) -> None:
    study_folder.storage.write_text("this is a file")
    assert "storage" in study_folder.run("run", expect=3).stderr


def test_a_relative_storage_inside_a_ray_job_is_refused(study_folder: StudyFolder) -> None:
    study_folder.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    command = [sys.executable, "-m", "memray", "run", "small.py", "--storage", "runs"]
    done = subprocess.run(command, capture_output=True, check=False, **study_folder.options())
    assert done.returncode == 2
    assert "the storage must be absolute" in done.stderr
