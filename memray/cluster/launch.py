"""A sweep on Ray Tune: what is left to do, where it fits, and what became of it.

Tune schedules a list of trials and nothing more. Its own snapshots are not used: the ledger alone decides what is left,
so a launch that was killed is simply launched again. A trial that another live launch holds is waited for.
"""

import contextlib
import gc
import logging
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")  # or actors start one by one; `Grid` holds them back
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a model's directory may be named from where the launch stands
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
from ray.tune.trainable.function_trainable import wrap_function
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memray.cluster.announcer import Announcer, Counts, Leaving, Room, Watcher, nodes_there
from memray.cluster.leaving import leave_on_sigterm
from memray.cluster.ledger import Ledger, State
from memray.cluster.probe_pool import probe_pool
from memray.cluster.resources import concurrency, of_actor, off_spot, phases
from memray.cluster.storage import cluster_claims
from memray.cluster.weights import start_weights_owner
from memray.spec import TrialSpec
from memray.sweep import Sweep

# Tune would put the driver's keys of a bucket into the runtime environment of its actors, which Ray's agent logs. They
# have them from their node, or from the job.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}

# Retries of a trial whose actor died or raised, before the failure stands. One that has kept a checkpoint since starts
# anew: over weeks a trial may lose more nodes than this.
MAX_FAILURES = 2
# A launch that meets foreign leases looks again after this time.
WAIT_S = 5.0


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


def pending(sweep: Sweep, ledger: Ledger, states: Mapping[str, State], *, adds_probes: bool = False) -> list[TrialSpec]:
    """The trials that are not finished, in order.

    Args:
        states: Of all trials.
        adds_probes: Whether trials that were finished under other probes than the sweep's are among them.

    Raises:
        ValueError: If there are such trials, and they are not to be: to look at them again takes a while.
    """
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
    before = ledger.states(trial.trial_id() for trial in sweep.trials)
    remaining = pending(sweep, ledger, before, adds_probes=adds_probes)
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
                deaths = _launch_on_cluster(remaining, ledger, watcher, max_concurrent, probe_actors, leaving, before)
            is_asked = leaving.asked_s is not None
        finally:
            ledger.with_claims(None)  # which are the cluster's
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


def _launch_on_cluster(
    remaining: list[TrialSpec],
    ledger: Ledger,
    watcher: Watcher,
    max_concurrent: int | None,
    probe_actors: int | None,
    leaving: Leaving,
    states: Mapping[str, State],
) -> dict[str, str]:
    """Runs the trials, and returns what Ray says of those whose folder could not even take the failure.

    Args:
        states: Of all trials of the sweep.
    """
    nodes = nodes_there()
    concurrency(remaining, list(nodes.values()))  # before anything is started
    shared = Shared(
        ledger=ledger,
        launch_name=leaving.launch_name,
        owner=start_weights_owner() if any(spec.model.pretrained for spec in remaining) else None,
        probe_actors=[],
    )
    counts = Counts(ledger.sweep, states)
    deaths: dict[str, str] = {}
    has_begun = False
    while remaining:
        busy: dict[str, str] = {}
        with probe_pool(remaining, nodes_there() if has_begun else nodes, probe_actors) as pool:
            groups = [Room(group, pool, max_concurrent) for group in phases(remaining)]
            if not has_begun:
                has_begun = True
                if pool.actors:
                    watcher.says(f"{len(pool.actors)} probe actors score snapshots while trials train on")
                watcher.began(len(remaining), max(min(room.now(), len(room.trials)) for room in groups))
            for room in groups:
                announcer = Announcer(ledger, watcher, room, leaving, counts)
                run_on_tune(replace(shared, probe_actors=pool.actors), announcer)
                deaths |= announcer.deaths
                busy |= announcer.busy
        remaining = [spec for spec in remaining if spec.trial_id() in busy]
        if leaving.asked_s is not None:
            break
        if remaining:
            watcher.says(next(iter(busy.values())))
            time.sleep(WAIT_S)
    return deaths


@dataclass(frozen=True)
class Shared:
    """What every trial of a launch is given."""

    ledger: Ledger
    launch_name: str
    owner: Any
    probe_actors: list[Any]


def run_on_tune(shared: Shared, announcer: Announcer) -> None:
    """Lets Tune run each of the announcer's trials once."""
    listed = ray.nodes()
    left = announcer.room.pool.leaves({node["NodeID"]: node["Resources"] for node in listed})
    nodes = [node | {"Resources": of_node} for node, of_node in zip(listed, left, strict=True)]

    def asked(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # From the cell: Tune unpickles this function for each trial, with all that it refers to.
        spec = TrialSpec.model_validate_json(config["cell"]["spec"])
        actor = of_actor(spec)
        labels = off_spot(nodes, actor["CPU"]) if spec.compute.engine == "deepspeed" else {}
        return tune.PlacementGroupFactory([actor], bundle_label_selector=[labels] if labels else None)

    trainable = tune.with_resources(_leaving_on_sigterm(tune.with_parameters(_run_in_actor, shared=shared)), asked)
    with tempfile.TemporaryDirectory(prefix="memray-tune-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=announcer.grid, num_samples=len(announcer.room.trials), reuse_actors=True
            ),
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
