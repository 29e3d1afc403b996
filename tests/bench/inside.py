"""What our own parts cost: Tune a trial, MLflow a point, and the parts of one trial. Each prints one JSON object.

python inside.py overhead SCRATCH seeds=50 length=16 epochs=1
python inside.py mlflow SCRATCH seeds=5 length=256 epochs=100     (SCRATCH/ours holds the finished sweep)
python inside.py profile SCRATCH seeds=5 length=256 epochs=100
"""

import functools
import json
import sqlite3
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from memray.cluster.launch import launch
from memray.cluster.ledger import Attempt, Ledger, State, TrialFolder
from memray.cluster.tracking import Tracker
from memray.sweep import Sweep, load


class Stopwatch:
    """A watcher that notes when trials began and when the last one ended."""

    def began(self, trials: int, concurrency: int) -> None:
        self.concurrency = concurrency
        self.began_s = time.perf_counter()

    def advanced(self, trial_id: str, epoch: int) -> None: ...

    def ended(self, trial_id: str, state: State) -> None:
        self.ended_s = time.perf_counter()

    def says(self, text: str) -> None: ...

    def lag(self) -> int:
        return 0


def overhead(sweep: Sweep, scratch: Path) -> dict[str, float]:
    """Seconds a trial from when the cluster stands to the last trial's end, and what of them is not the trials' own.

    The trials' own time is shared among those side by side. What is left is scheduling, claiming, finishing and, once,
    the actors' imports; where driver and trials slow each other down, it counts as the trials' own.
    """
    ledger, watch = Ledger(str(scratch), sweep.name), Stopwatch()
    outcome = launch(sweep, ledger, watch)
    assert not outcome.failed, outcome.failed
    finished = [ledger.trial(trial_id).finished() for trial_id in outcome.finished]
    own_s = sum(each.summary["seconds"] for each in finished if each)
    wall_s, num_trials = watch.ended_s - watch.began_s, len(sweep.trials)
    return {"wall_s": wall_s / num_trials, "overhead_s": (wall_s - own_s / watch.concurrency) / num_trials}


def mlflow(sweep: Sweep, scratch: Path) -> dict[str, float]:
    """Points a second into fresh SQLite, its schema made before: all that a trial sends, runs and tables included."""
    database = scratch / f"{time.time_ns()}.db"
    tracker = Tracker(sweep, Ledger(str(scratch / "ours"), sweep.name), f"sqlite:///{database}")
    began = time.perf_counter()
    for trial in sweep.trials:
        tracker.send(trial)
    seconds = time.perf_counter() - began
    with sqlite3.connect(database) as connection:
        return {"points_per_s": connection.execute("SELECT count(*) FROM metrics").fetchone()[0] / seconds}


def profile(sweep: Sweep, scratch: Path) -> dict[str, float]:
    """Seconds by part of one trial, from claim to MLflow in one process, another trial having warmed everything up."""
    from memray import finetune, scoring, trial
    from memray.cluster import recorder
    from memray.measurement import Measurer

    watched: list[tuple[str, Any, str]] = [
        ("training: forward, backward", finetune.TorchEngine, "_backward"),
        ("optimiser: clip, AdamW", finetune.TorchEngine, "_update"),
        ("held-out and last forward", finetune, "score"),
        *(("scores", module, name) for module in (finetune, scoring) for name in ("score_logits", "collect")),
        ("measures", Measurer, "measure"),
        ("strings and model", trial, "prepare"),
        ("strings and model", trial.ModelShelf, "model"),
        *(("records and ledger", recorder, name) for name in ("token_table", "string_table")),
        *(("records and ledger", Attempt, name) for name in ("append", "finish", "__enter__", "__exit__")),
        ("records and ledger", TrialFolder, "claim"),
        ("sending to MLflow", Tracker, "send"),
    ]
    ledger = Ledger(str(scratch / "profile"), sweep.name)
    tracker, shelf = Tracker(sweep, ledger, f"sqlite:///{scratch}/profile.db"), trial.ModelShelf()
    seconds: dict[str, float] = defaultdict(float)
    nested = [0.0]
    for spec in (sweep.trials[0], sweep.trials[-1]):
        if spec is sweep.trials[-1]:
            for name, owner, attribute in watched:
                setattr(owner, attribute, timed(name, getattr(owner, attribute), seconds, nested))
        began = time.perf_counter()
        with ledger.trial(spec.trial_id()).claim(spec.canonical_json(), "profile") as attempt:
            keeper = recorder.Recorder(spec, attempt)
            keeper.record(trial.run_trial(spec, shelf=shelf, keeper=keeper))
        tracker.send(spec)
    return {**seconds, "other": time.perf_counter() - began - sum(seconds.values())}


def timed(name: str, function: Any, seconds: dict[str, float], nested: list[float]) -> Any:
    """The function with a stopwatch that leaves out the time of watched functions within it."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nested.append(0.0)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            whole = time.perf_counter() - began
            seconds[name] += whole - nested.pop()
            nested[-1] += whole

    return watched


def main() -> None:
    part, scratch, *pairs = sys.argv[1:]
    sweep = load(Path(__file__).with_name("tiny_trials.py"), **dict(pair.split("=") for pair in pairs))
    print(json.dumps({"overhead": overhead, "mlflow": mlflow, "profile": profile}[part](sweep, Path(scratch))))


if __name__ == "__main__":
    main()
