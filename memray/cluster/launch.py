"""A sweep on Ray Tune: what is left to do, where it fits, and what became of it.

Tune schedules a list of trials and nothing more. Its own snapshots are not used: the ledger alone decides what is left,
so a launch that was killed is simply launched again. A trial that another live launch holds is waited for.
"""

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner even when it is told to be silent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's daemons listen on every interface, whatever is set: without a token anybody could run code here. Ray makes the
# token only if the mode is set before it is imported. A job inherits the mode of its cluster.
if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution import class_cache, tune_controller
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import BasicVariantGenerator
from ray.tune.trainable.function_trainable import wrap_function
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memray.cluster import metrics
from memray.cluster.leaving import GRACE_S, leave_on_sigterm
from memray.cluster.ledger import AlreadyFinished, Busy, Ledger, State
from memray.cluster.probe_pool import ProbePool, probe_pool
from memray.cluster.resources import Resources, concurrency, of_actor, off_spot, phases
from memray.cluster.storage import cluster_claims
from memray.cluster.weights import start_weights_owner
from memray.cost import cost
from memray.spec import TrialSpec
from memray.sweep import Sweep

# Tune would put the driver's keys of a bucket into the runtime environment of its actors, which Ray's agent logs. They
# have them from their node, or from the job.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}

# Retries of a trial whose actor died or raised, before the failure stands. One that has kept a checkpoint since starts
# anew: over weeks a trial may lose more nodes than this.
MAX_FAILURES = 2
# Seconds between two looks at the nodes of the cluster, which come and go.
NODES_S = 10.0
# Seconds between two tellings of Prometheus.
TELL_S = 5.0
# A launch that meets foreign leases looks again after this time.
WAIT_S = 5.0


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


@dataclass(frozen=True)
class Outcome:
    """What became of the trials of a sweep.

    Attributes:
        left: Those that a launch which was asked to leave did not bring to an end.
    """

    finished: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()


def connect(address: str | None) -> None:
    """Joins a Ray cluster, or starts one on this machine.

    Raises:
        ConnectionError: If there is no cluster at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        # Ray itself would try for minutes.
        try:
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"a Ray cluster must listen at the address, but {address} does not answer ({error}); start it, or "
                "leave out --address to run on this machine"
            ) from error
    if address == "local":
        options["include_dashboard"] = False
        with contextlib.suppress(OSError):  # Ray writes its token for everybody on this machine to read
            folder = Path.home() / ".ray"
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)
        os.environ["HF_HUB_OFFLINE"] = "1"  # the driver has downloaded: the hub answers 429 to many workers
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)


def pending(sweep: Sweep, ledger: Ledger, *, adds_probes: bool = False) -> list[TrialSpec]:
    """The trials that are not finished, in order.

    Args:
        adds_probes: Whether trials that were finished under other probes than the sweep's are among them.

    Raises:
        ValueError: If there are such trials, and they are not to be: to look at them again takes a while.
    """
    states = ledger.states(trial.trial_id() for trial in sweep.trials)
    remaining = [trial for trial in sweep.trials if states[trial.trial_id()] != "finished"]
    other = [trial.trial_id() for trial in remaining if ledger.trial(trial.trial_id()).is_added]
    if other and not adds_probes:
        raise ValueError(
            f"a finished trial keeps the probes it was run with, but {len(other)} trials of {sweep.name} were run with "
            f"others than the study asks for now ({', '.join(other[:5])}{', …' if len(other) > 5 else ''}); look at "
            "them again with `probe`, or restore the study's probes"
        )
    return remaining


def launch(
    sweep: Sweep,
    ledger: Ledger,
    watcher: Watcher,
    *,
    address: str | None = None,
    max_concurrent: int | None = None,
    probe_actors: int | None = None,
    adds_probes: bool = False,
) -> Outcome:
    """Runs what is not finished, and returns when every trial is finished or has failed.

    On SIGTERM it returns sooner: trials are given :data:`~memray.cluster.leaving.GRACE_S` to keep a checkpoint.

    Args:
        adds_probes: Whether trials that were finished under other probes are looked at again.
        max_concurrent: Trials side by side at most.
        probe_actors: Actors that score snapshots; with 0 each trial looks for itself. None leaves it to the size of
            the cluster.

    Raises:
        ConnectionError: If the cluster cannot be reached.
        ValueError: If a trial can never run on it.
        StorageError: If the storage refuses to be written.
    """
    mark = ledger.check_writable()
    remaining = pending(sweep, ledger, adds_probes=adds_probes)
    ledger.drop_leftovers({trial.trial_id() for trial in sweep.trials} - {trial.trial_id() for trial in remaining})
    deaths: dict[str, str] = {}
    is_asked = False
    if remaining:
        connect(address)
        try:
            check_shared(ledger, mark)
            if ledger.needs_claims:
                ledger.with_claims(cluster_claims())
            with Leaving(ledger, uuid.uuid4().hex[:12]) as leaving:
                deaths = _launch_on_cluster(remaining, ledger, watcher, max_concurrent, probe_actors, leaving)
            is_asked = leaving.asked_s is not None
        finally:
            gc.collect()  # a handle that is dropped after the shutdown ends the process
            ray.shutdown()
    states = ledger.states(trial.trial_id() for trial in sweep.trials)
    unfinished = [trial_id for trial_id, state in states.items() if state != "finished"]
    left = [trial_id for trial_id in unfinished if is_asked and states[trial_id] != "failed" and trial_id not in deaths]
    return Outcome(
        finished=tuple(trial_id for trial_id, state in states.items() if state == "finished"),
        failed={
            trial_id: ledger.trial(trial_id).failure() or deaths.get(trial_id, "it left no trace")
            for trial_id in unfinished
            if trial_id not in left
        },
        left=tuple(left),
    )


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


def check_shared(ledger: Ledger, mark: str) -> None:
    """Refuses a storage that some node of the cluster does not share with this one.

    Args:
        mark: What was just written to the storage here.

    Raises:
        ValueError: If a node cannot read it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    read = ray.remote(num_cpus=0)(_mark)
    others = [node for node in nodes if node["NodeID"] != here]
    on_each = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in others]
    found = ray.get([read.options(scheduling_strategy=strategy).remote(ledger) for strategy in on_each])
    marks = {mark, ledger.mark()}  # another launch may have written its own in between
    if blind := {node["NodeManagerHostname"] for node, each in zip(others, found, strict=True) if each not in marks}:
        raise ValueError(
            f"every node must reach the storage, but {ledger.storage} is another folder, or none, on "
            f"{', '.join(sorted(blind))}; set --storage or MEMRAY_STORAGE to a shared folder or a URI"
        )


def _mark(ledger: Ledger) -> str | None:
    return ledger.mark()


def _nodes() -> dict[str, Resources]:
    """What each node of the cluster has to give, by its id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def _launch_on_cluster(
    remaining: list[TrialSpec],
    ledger: Ledger,
    watcher: Watcher,
    max_concurrent: int | None,
    probe_actors: int | None,
    leaving: Leaving,
) -> dict[str, str]:
    """Runs the trials, and returns what Ray says of those whose folder could not even take the failure."""
    nodes = _nodes()
    concurrency(remaining, list(nodes.values()))  # before anything is started
    shared = Shared(
        ledger=ledger,
        launch_name=leaving.launch_name,
        owner=start_weights_owner() if any(spec.model.pretrained for spec in remaining) else None,
        probe_actors=[],
    )
    counts = Counts(ledger.sweep, {spec.trial_id() for spec in remaining})
    deaths: dict[str, str] = {}
    has_begun = False
    while remaining:
        busy: dict[str, str] = {}
        with probe_pool(remaining, _nodes() if has_begun else nodes, probe_actors) as pool:
            groups = [Room(group, pool, max_concurrent) for group in phases(remaining)]
            if not has_begun:
                has_begun = True
                if pool.actors:
                    watcher.says(f"{len(pool.actors)} probe actors score snapshots while trials train on")
                watcher.began(len(remaining), max(min(room.now(), len(room.trials)) for room in groups))
            for room in groups:
                announcer = Announcer(ledger, watcher, room, leaving, counts)
                run_on_tune(room.trials, replace(shared, probe_actors=pool.actors), announcer)
                deaths |= announcer.deaths
                busy |= announcer.busy
        remaining = [spec for spec in remaining if spec.trial_id() in busy]
        if leaving.asked_s is not None:
            break
        if remaining:
            watcher.says(next(iter(busy.values())))
            time.sleep(WAIT_S)
    return deaths


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
        held = concurrency(self.trials, self.pool.leaves(_nodes()))
        return min(held, self.max_concurrent or held)


class Counts:
    """The trials of a launch by their state, as Prometheus is told."""

    def __init__(self, sweep: str, planned: Iterable[str]) -> None:
        self.sweep = sweep
        self.states: dict[str, State] = dict.fromkeys(planned, "planned")
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


@dataclass(frozen=True)
class Shared:
    """What every trial of a launch is given."""

    ledger: Ledger
    launch_name: str
    owner: Any
    probe_actors: list[Any]


def run_on_tune(trials: Sequence[TrialSpec], shared: Shared, announcer: "Announcer") -> None:
    """Lets Tune run each of the trials once."""
    by_id = {spec.trial_id(): spec for spec in trials}
    nodes = [node for node in ray.nodes() if node["Alive"]]

    def asked(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        spec = by_id[config["cell"]["trial_id"]]
        actor = of_actor(spec)
        labels = off_spot(nodes, actor["CPU"]) if spec.compute.engine == "deepspeed" else {}
        return tune.PlacementGroupFactory([actor], bundle_label_selector=[labels] if labels else None)

    trainable = tune.with_resources(_leaving_on_sigterm(tune.with_parameters(_run_in_actor, shared=shared)), asked)
    cells = [{"trial_id": trial_id, "spec": spec.model_dump_json()} for trial_id, spec in by_id.items()]
    with tempfile.TemporaryDirectory(prefix="memray-tune-") as scratch:
        tune.Tuner(
            trainable,
            param_space={"cell": tune.grid_search(cells)},
            tune_config=tune.TuneConfig(search_alg=announcer.searcher, reuse_actors=True),
            run_config=tune.RunConfig(
                name=shared.launch_name,
                storage_path=scratch,
                verbose=0,
                stop=announcer.leaving,
                callbacks=[announcer],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        ).fit()


class Actors(RayActorManager):
    """Tune's actors. One that Ray kills because its node runs out of memory has died: Tune would end all the others."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)


tune_controller.RayActorManager = Actors  # pyright: ignore[reportPrivateImportUsage]


def _leaving_on_sigterm(function: Any) -> Any:
    """Tune's class around a function, whose processes SIGTERM asks to leave. The function itself runs in a thread."""

    class Trainable(wrap_function(function)):
        def setup(self, config: dict[str, Any]) -> None:
            leave_on_sigterm()
            super().setup(config)

    return Trainable


def _run_in_actor(config: dict[str, Any], *, shared: Shared) -> None:
    # Imported in the actor alone: the driver has no use for torch and transformers, which take seconds to import.
    from memray.cluster.actor import run_in_actor

    run_in_actor(config, **vars(shared))


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
        self.searcher = BasicVariantGenerator(max_concurrent=room.now())
        self.looked_s = time.monotonic()
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
        elif self.leaving.asked_s is None or self.ledger.trial(trial_id).state() == "finished":
            self._ended(trial_id)

    def _ended(self, trial_id: str) -> None:
        state = "failed" if trial_id in self.deaths else self.ledger.trial(trial_id).state()
        self.counts.states[trial_id] = state
        self.watcher.ended(trial_id, state)

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        self.counts.tell(self.watcher.lag())
        if time.monotonic() - self.looked_s > NODES_S:
            self.looked_s = time.monotonic()
            with contextlib.suppress(ValueError):  # no node now: what has been begun waits for the next
                self.searcher.max_concurrent = self.room.now()

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
        folder = self.ledger.trial(trial_id)
        if folder.state() not in ("failed", "finished"):
            try:
                # An actor that was killed has left no traceback; what Ray says of it stands in its place.
                with folder.claim(spec.canonical_json(), self.leaving.launch_name) as attempt:
                    attempt.fail(said)
            except (Busy, AlreadyFinished, ValueError, OSError) as error:
                # One folder that cannot be written must not end the sweep, as an error in a callback of Tune's would.
                self.deaths[trial_id] = f"{said}\n{error}"
        self._ended(trial_id)
