"""The driver while Tune runs trials: it hears how they end, follows nodes and storage, and can be asked to leave."""

import contextlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from memray.cluster import metrics
from memray.cluster.leaving import GRACE_S
from memray.cluster.ledger import AlreadyFinished, Busy, Ledger, State
from memray.cluster.probe_pool import ProbePool
from memray.cluster.resources import Resources, concurrency
from memray.cluster.storage import StorageError
from memray.cost import cost
from memray.spec import TrialSpec

# Seconds between two looks at the nodes of the cluster and at the storage, which come and go.
LOOK_S = 10.0
# Seconds between two tellings of Prometheus.
TELL_S = 5.0


@runtime_checkable
class Watcher(Protocol):
    """Who is told how a launch goes on."""

    def began(self, trials: int, concurrency: int) -> None: ...

    def advanced(self, trial_id: str, epoch: int) -> None: ...

    def ended(self, trial_id: str, state: State) -> None: ...

    def says(self, text: str) -> None: ...

    def lag(self) -> int:
        """Trials of which MLflow lacks something."""
        ...


class Leaving(tune.Stopper):
    """SIGTERM at a launch: it asks its trials to leave, and Tune ends once they have, or the time of grace is over.

    Attributes:
        asked_s: When it came.
        running: The trials that have to leave.
    """

    def __init__(self, ledger: Ledger, launch_name: str) -> None:
        self.ledger = ledger
        self.launch_name = launch_name
        self.asked_s: float | None = None
        self.has_asked = False
        self.running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as `Announcer`'s

    def __enter__(self) -> "Leaving":
        self.is_main = threading.current_thread() is threading.main_thread()
        if self.is_main:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_main:
            signal.signal(signal.SIGTERM, self.before)
        self.ledger.forget_launch(self.launch_name)

    def _note(self, *signalled: object) -> None:
        self.asked_s = self.asked_s or time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether Tune is to end; asked between its events."""
        if self.asked_s is None:
            return False
        if not self.has_asked:
            with contextlib.suppress(OSError):  # asked again at the next event
                self.ledger.ask_to_leave(self.launch_name)
                self.has_asked = True
        return not self.running or time.monotonic() > self.asked_s + GRACE_S


def nodes_there() -> dict[str, Resources]:
    """What each node of the cluster has to give, by its id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


class Room:
    """How many of some trials run side by side, as nodes come and go."""

    def __init__(self, trials: Sequence[TrialSpec], pool: ProbePool, max_concurrent: int | None) -> None:
        self.trials = trials
        self.pool = pool
        self.max_concurrent = max_concurrent

    def now(self) -> int:
        """
        Raises:
            ValueError: If a trial does not fit the nodes that are there now.
        """
        held = concurrency(self.trials, self.pool.leaves(nodes_there()))
        return min(held, self.max_concurrent or held)


class Grid(Searcher):
    """Gives Tune each trial once, and not more side by side than there is room for.

    Tune's own grid search copies the whole grid for each of its trials: at ten thousand it takes minutes to begin.

    Attributes:
        max_concurrent: Trials side by side at most.
        is_over: Whether those that wait are no longer to be run.
    """

    def __init__(self, trials: Sequence[TrialSpec]) -> None:
        super().__init__()
        self.max_concurrent = 1
        self.is_over = False
        self._waiting = iter(trials)
        self._running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as `Announcer`'s

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration, of as many as Tune was told to ask for; None while there is no room."""
        if self.is_over:
            return Searcher.FINISHED
        if len(self._running) >= self.max_concurrent:
            return None
        self._running.add(trial_id)
        spec = next(self._waiting)
        return {"cell": {"trial_id": spec.trial_id(), "spec": spec.model_dump_json()}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        pass  # the ledger says what is left


class Counts:
    """The trials of a sweep by their state, as Prometheus is told."""

    def __init__(self, sweep: str, states: Mapping[str, State]) -> None:
        self.sweep = sweep
        # One that has failed is tried again.
        self.states: dict[str, State] = {
            trial_id: "finished" if state == "finished" else "planned" for trial_id, state in states.items()
        }
        self.told_s = 0.0

    def tell(self, lag: int) -> None:
        """Tells, unless it was told just now."""
        if time.monotonic() - self.told_s < TELL_S:
            return
        self.told_s = time.monotonic()
        states = list(self.states.values())
        for state in get_args(State):
            metrics.tell(metrics.TRIALS, states.count(state), {"sweep": self.sweep, "state": state})
        metrics.tell(metrics.BEHIND, lag, {"sweep": self.sweep})


class Announcer(TrialProgressCallback):
    """Hears from Tune how trials end, and tells the watcher; on the driver.

    It takes the place of the callback that prints, which Tune adds whatever verbosity it is given.
    """

    def __init__(self, ledger: Ledger, watcher: Watcher, room: Room, leaving: Leaving, counts: Counts) -> None:
        super().__init__()
        self.ledger = ledger
        self.watcher = watcher
        self.room = room
        self.leaving = leaving
        self.counts = counts
        self.grid = Grid(room.trials)
        self._follow_nodes()
        self.is_refused = False
        self.checkpoints: dict[str, str] = {}
        self.busy: dict[str, str] = {}
        self.deaths: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into a snapshot that is never restored

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        trial_id = trial.config["cell"]["trial_id"]
        if "busy" in result:
            self.busy[trial_id] = result["busy"]
        elif "died" in result:
            self.deaths[trial_id] = result["died"]
        elif "epoch" in result:
            self.watcher.advanced(trial_id, result["epoch"])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        trial_id = trial.config["cell"]["trial_id"]
        self.leaving.running.discard(trial_id)
        if trial_id in self.busy:
            self.counts.states[trial_id] = "planned"
        elif self.leaving.asked_s is None:
            self._ended(trial_id)
        else:
            with contextlib.suppress(ValueError, OSError):  # a launch that leaves has no more to say of it
                if self.ledger.trial(trial_id).state() == "finished":
                    self._ended(trial_id)

    def _ended(self, trial_id: str) -> None:
        try:
            state = "failed" if trial_id in self.deaths else self.ledger.trial(trial_id).state()
        except (ValueError, OSError) as error:
            self.deaths[trial_id], state = str(error), "failed"
        self.counts.states[trial_id] = state
        self.watcher.ended(trial_id, state)

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        self.grid.is_over = self.leaving.asked_s is not None
        self.counts.tell(self.watcher.lag())
        if time.monotonic() - self.looked_s > LOOK_S:
            self._follow_nodes()
            self._follow_storage()

    def _follow_nodes(self) -> None:
        self.looked_s = time.monotonic()
        with contextlib.suppress(ValueError):  # no node now: what has been begun waits for the next
            self.grid.max_concurrent = self.room.now()
        if number := self.room.pool.give_up():
            self.watcher.says(f"{number} probe actors lost their node and found no room: trials answer in their place")

    def _follow_storage(self) -> None:
        """Tells why trials stand still, once the storage refuses."""
        try:
            self.ledger.check_still_writable()
            self.is_refused = False
        except StorageError as error:
            if not self.is_refused:
                self.watcher.says(f"trials wait to write, each for {self.ledger.patience_s:g} s at most: {error}")
            self.is_refused = True

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        trial_id = trial.config["cell"]["trial_id"]
        self.counts.states[trial_id] = "running"
        if self.leaving.asked_s is None:
            self.leaving.running.add(trial_id)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        trial_id = trial.config["cell"]["trial_id"]
        self.leaving.running.discard(trial_id)
        self.counts.states[trial_id] = "planned"
        with contextlib.suppress(ValueError, OSError):  # one that cannot be read is no progress
            checkpoint = self.ledger.trial(trial_id).checkpoint()
            if checkpoint is not None and checkpoint.name != self.checkpoints.get(trial_id):
                self.checkpoints[trial_id] = checkpoint.name
                trial.run_metadata.num_failures = 0

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        trial_id = trial.config["cell"]["trial_id"]
        spec = TrialSpec.model_validate_json(trial.config["cell"]["spec"])
        said = Path(trial.error_file).read_text() if trial.error_file else "the actor died and Ray gave no reason"
        if "OutOfMemoryError" in said:
            said += (
                f"\nout of memory: Ray ended the trial as its node ran low. It was planned to take "
                f"{cost(spec).peak_gib:.1f} GiB a device; run fewer side by side with --max-concurrent, set "
                "training.strings_per_forward, or give it larger nodes"
            )
        self.leaving.running.discard(trial_id)
        try:
            folder = self.ledger.trial(trial_id)
            if folder.state() not in ("failed", "finished"):
                # An actor that was killed has left no traceback; what Ray says of it stands in its place.
                with folder.claim(spec.canonical_json(), self.leaving.launch_name) as attempt:
                    attempt.fail(said)
        except (Busy, AlreadyFinished, ValueError, OSError) as error:
            # A folder that cannot be read or written must not end the sweep, as an error in a callback of Tune's would.
            self.deaths[trial_id] = f"{said}\n{error}"
        self._ended(trial_id)
