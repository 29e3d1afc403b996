"""How far the design carries: trials that compute nothing, scheduled by the thousand through the real command.

    python tests/bench/schedule.py 10 100 1000 10000
    python tests/bench/schedule.py --server 1000
    python tests/bench/schedule.py --snapshots

A trial claims its folder, writes the measurements of one that was computed before, and finishes; Tune, the ledger, and
MLflow in an SQLite file do what they always do. So the figures say what the machinery around a trial costs, on this
machine, which should be idle otherwise. `--server` takes an MLflow server on PostgreSQL, as `infra/` has it, with two
workers on this machine too. `--snapshots` measures the way of weights to probe actors on one node.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
STUDY = HERE / "many_trials.py"
SNAPSHOT_GIB = 0.5


@functools.cache
def computed() -> list[dict[str, Any]]:
    """The measurements of one trial."""
    import many_trials

    from memray.trial import run_trial

    return [each.record() for each in run_trial(many_trials.sweep().trials[0])]


def simulated(config: dict[str, Any], *, shared: Any) -> None:
    """What runs in a Tune actor in place of a trial."""
    from memray.cluster.recorder import provenance
    from memray.spec import TrialSpec

    spec = TrialSpec.model_validate_json(config["cell"]["spec"])
    with shared.ledger.trial(spec.trial_id()).claim(spec.canonical_json(), shared.launch_name) as attempt:
        attempt.append(computed())
        attempt.finish({"epochs": 10, "seconds": 0.0, **provenance(spec)})


@contextmanager
def watched(peaks: dict[str, float]) -> Iterator[None]:
    """Notes the peak memory in MiB of this process and of Ray's daemons below it."""
    over = threading.Event()
    own = psutil.Process()

    def watch() -> None:
        while not over.wait(1):
            for process in (own, *own.children(recursive=True)):
                try:
                    name = "driver" if process == own else process.name()
                    mib = process.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    continue
                if name in ("driver", "gcs_server", "raylet"):
                    peaks[name] = max(peaks.get(name, 0.0), mib)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def schedule(number: int, storage: Path) -> dict[str, float]:
    """Runs so many trials, and says what it took."""
    import schedule as importable  # actors find no function of __main__
    import typer

    from memray import cli
    from memray.cluster import launch
    from memray.cluster.ledger import Ledger
    from memray.cluster.tracking import results
    from memray.console import Watching
    from memray.sweep import load

    launch._run_in_actor = importable.simulated
    times: dict[str, float] = {}
    began, ended = Watching.began, Watching.ended

    def noted_began(self: Watching, trials: int, concurrency: int) -> None:
        times["began_s"] = time.perf_counter()
        began(self, trials, concurrency)

    def noted_ended(self: Watching, trial_id: str, state: str) -> None:
        times["ended_s"] = time.perf_counter()
        times["lag"] = self.lag()
        ended(self, trial_id, state)

    Watching.began, Watching.ended = noted_began, noted_ended
    peaks: dict[str, float] = {}
    first_s = time.perf_counter()
    with watched(peaks):
        try:
            cli._run(str(STUDY), [f"trials={number}"], None, str(storage), None, None, None, adds_probes=False)
        except typer.Exit as end:
            code = end.exit_code
    assert code == 0, code
    last_s = time.perf_counter()
    sweep = load(STUDY, trials=number)
    ledger = Ledger(str(storage), sweep.name)
    timed = {}
    for name, act in (
        ("states_s", lambda: ledger.states(trial.trial_id() for trial in sweep.trials)),
        ("results_s", lambda: results(sweep, storage=str(storage))),
    ):
        start_s = time.perf_counter()
        act()
        timed[name] = time.perf_counter() - start_s
    points = sum(len(each["metrics"]) for each in computed()) * number
    files = [path for path in storage.rglob("*") if path.is_file()]
    return {
        "trials": number,
        "trial_s": (times["ended_s"] - times["began_s"]) / number,
        "trials_an_hour": 3600 * number / (times["ended_s"] - times["began_s"]),
        "before_s": times["began_s"] - first_s,
        "unsent_at_end": times["lag"],
        "after_s": last_s - times["ended_s"],
        "mlflow_points": points,
        **timed,
        **{f"{name}_mib": mib for name, mib in peaks.items()},
        "files_a_trial": len(files) / number,
        "kib_a_trial": sum(path.stat().st_size for path in files) / number / 1024,
    }


def snapshots() -> dict[str, float]:
    """GiB a second from a trial's process into the object store, and from there into another process."""
    import numpy as np
    import ray

    ray.init(include_dashboard=False, log_to_driver=False)
    weights = {str(index): np.ones((1024, 1024 * 32), np.float32) for index in range(int(SNAPSHOT_GIB * 8))}

    @ray.remote
    def read(stored: dict[str, Any]) -> float:
        began_s = time.perf_counter()
        copied = [array.copy() for array in stored.values()]
        return len(copied) and time.perf_counter() - began_s

    gib = sum(array.nbytes for array in weights.values()) / 2**30
    put_s, read_s = [], []
    for _ in range(5):
        began_s = time.perf_counter()
        reference = ray.put(weights)
        put_s.append(time.perf_counter() - began_s)
        read_s.append(ray.get(read.remote(reference)))
        del reference
    ray.shutdown()
    return {"gib": gib, "put_gib_per_s": gib / sorted(put_s)[2], "copied_gib_per_s": gib / sorted(read_s)[2]}


@contextmanager
def tracking(on_server: bool) -> Iterator[dict[str, str]]:
    """The environment of whoever writes to an MLflow server of its own, or to a file."""
    if not on_server:
        yield {}
        return
    sys.path.append(str(HERE.parents[1]))
    from tests.cluster.servers import mlflow_server, postgres, s3_bucket

    with postgres() as database, s3_bucket() as bucket, mlflow_server(database, bucket) as server:
        yield server.admin | {"MLFLOW_TRACKING_URI": server.uri}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", type=int)
    parser.add_argument("--snapshots", action="store_true")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    stated = parser.parse_args(arguments)
    if stated.into:
        sys.stderr.write(json.dumps(schedule(stated.trials[0], stated.into)) + "\n")
        return
    if stated.snapshots:
        print(json.dumps(snapshots()))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    for number in stated.trials:
        with tempfile.TemporaryDirectory(prefix="memray-schedule-") as folder, tracking(stated.server) as where:
            command = [sys.executable, __file__, str(number), "--into", f"{folder}/runs"]
            done = subprocess.run(
                command, env=environment | where, cwd=folder, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            print(done.stderr.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
