"""The probe actors of a launch: how many, where, and for how long.

They live for one round of trials. A launch that only waits for another one's leases gives their devices back, which
the other may be waiting for.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import actors as told_of_actors  # what is public asks the dashboard, which may not run
from ray.exceptions import GetTimeoutError

from memray.cluster.resources import Resources, concurrency, phases
from memray.placement import num_probe_actors
from memray.spec import TrialSpec

# Seconds that actors have to find room on a cluster that others use too.
START_S = 120.0
# And that one has to find room anew, whose node was lost: longer than a cluster takes to replace the node.
RETURN_S = 600.0


class _ProbeActor:
    """A probe actor that imports torch in its own process alone."""

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def look(self, *arguments: Any) -> Any:
        from memray.cluster.probing import look

        return look(*arguments)


@dataclass(frozen=True)
class ProbePool:
    """Actors that score snapshots.

    Attributes:
        held: What they take of each node, by its id.
        missed_s: Since when each actor that is not there has been away, by its place.
    """

    actors: list[Any] = field(default_factory=list)
    held: dict[str, Resources] = field(default_factory=dict)
    missed_s: dict[int, float] = field(default_factory=dict)

    def leaves(self, nodes: Mapping[str, Resources]) -> list[Resources]:
        """What is left of each node for trials."""
        return [
            {name: amount - self.held.get(node_id, {}).get(name, 0.0) for name, amount in node.items()}
            for node_id, node in nodes.items()
        ]

    def give_up(self) -> int:
        """Ends actors that have been away for too long; how many.

        The trials have all other devices, and wait for what these were asked: unless somebody ends them, both wait
        for ever. A trial answers itself what an actor that has ended cannot.
        """
        given_up = 0
        for place, actor in enumerate(self.actors):
            state = told_of_actors(actor._actor_id.hex()).get("State")
            if state == "ALIVE":
                self.missed_s.pop(place, None)
            elif state != "DEAD" and time.monotonic() - self.missed_s.setdefault(place, time.monotonic()) > RETURN_S:
                ray.kill(actor)
                given_up += 1
        return given_up


@contextlib.contextmanager
def probe_pool(trials: Sequence[TrialSpec], nodes: Mapping[str, Resources], number: int | None) -> Iterator[ProbePool]:
    """Actors that score snapshots, for as long as they are needed.

    Args:
        nodes: What each node has to give, by its id.
        number: None means as many as the number of devices suggests, or none where the trials need them all.

    Raises:
        ValueError: If that many are asked for, and they do not fit, or the trials run on several kinds of device.
    """
    kinds = sorted({(spec.compute.accelerator, spec.compute.threads) for spec in trials})
    kind, threads = kinds[0]
    asked: Resources = {"CPU": float(threads)} | ({} if kind == "cpu" else {"GPU": 1.0})
    if number is None:
        number = _fitting(trials, list(nodes.values()), asked) if len(kinds) == 1 else 0
    elif number and len(kinds) > 1:
        raise ValueError(
            f"probe actors score on the kind of device that trains, but the trials run on several: {kinds}; set "
            "--probe-actors 0, or split the study"
        )
    # Restarted when they die, and what they were at is done once more.
    remote = ray.remote(num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0), max_restarts=-1, max_task_retries=1)
    actors: list[Any] = [remote(_ProbeActor).remote() for _ in range(number)]
    try:
        try:
            node_ids = ray.get([actor.node_id.remote() for actor in actors], timeout=START_S)
        except GetTimeoutError as error:
            raise ValueError(
                f"the probe actors must fit the cluster, but {number} of {asked} found no room in {START_S:g} s; lower "
                "--probe-actors, or wait until the cluster is freer"
            ) from error
        held: dict[str, Resources] = {}
        for node_id in node_ids:
            on_node = held.setdefault(node_id, dict.fromkeys(asked, 0.0))
            for name, amount in asked.items():
                on_node[name] += amount
        yield ProbePool(actors, held)
    finally:
        for actor in actors:
            ray.kill(actor)


def _fitting(trials: Sequence[TrialSpec], nodes: list[Resources], asked: Resources) -> int:
    """How many actors the devices suggest, if every trial still fits beside them; else none."""
    rarest = "GPU" if "GPU" in asked else "CPU"
    number = num_probe_actors(sum(int(node.get(rarest, 0) / asked[rarest]) for node in nodes), trials)
    left = [dict(node) for node in nodes]
    for _ in range(number):
        freest = max(left, key=lambda node: node.get(rarest, 0))
        for name, amount in asked.items():
            freest[name] = freest.get(name, 0) - amount
    try:
        for group in phases(trials):
            concurrency(group, left)
    except ValueError:
        return 0
    return number
