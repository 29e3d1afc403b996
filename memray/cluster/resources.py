"""What a trial asks of Ray, and how many trials a cluster holds side by side."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memray.accelerators import accelerator
from memray.cost import cost
from memray.spec import TrialSpec

# What the Tune function of a trial asks for while its workers, elsewhere, do the work; Ray refuses 0.
WAITING_CPU = 0.01

Resources = dict[str, float]

# How Ray labels nodes that may be taken away, and how what must outlive a trial asks for the others.
MARKET = "ray.io/market-type"
SPOT = "spot"


def off_spot(nodes: Iterable[Mapping[str, Any]], cpus: float = 0.0) -> dict[str, str]:
    """The labels to ask for, so that what waits for trials, or serves them, is kept off nodes that may be taken away.

    Args:
        nodes: As Ray lists them. Where none that stays can hold it nothing is asked for: it would wait for ever.
        cpus: What it needs.
    """
    staying = [node for node in nodes if node["Alive"] and node.get("Labels", {}).get(MARKET) != SPOT]
    fits = any(node["Resources"].get("CPU", 0.0) >= cpus for node in staying)
    return {MARKET: f"!{SPOT}"} if fits else {}


def is_on_cpu(spec: TrialSpec) -> bool:
    return accelerator(spec.compute.accelerator).device == "cpu"


def of_actor(spec: TrialSpec) -> Resources:
    """What the Tune actor of a trial asks for: all of it, or next to nothing where workers of its own do the work."""
    return {"CPU": WAITING_CPU} if spec.compute.engine == "deepspeed" else of_worker(spec)


def of_worker(spec: TrialSpec) -> Resources:
    """What each process that trains asks for."""
    asked = {"CPU": float(spec.compute.threads)}
    if spec.compute.engine == "deepspeed":
        asked["CPU"] -= 0.1  # the waiting actor must fit beside its workers
    return asked if is_on_cpu(spec) else asked | {"GPU": spec.compute.device_share}


def concurrency(trials: Iterable[TrialSpec], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials run side by side: as many as the scarcest resource of the nodes holds.

    Args:
        nodes: What each node has to give, as Ray names it: "CPU", "GPU", "memory" in bytes.

    Raises:
        ValueError: If the nodes together can never hold some trial: Ray would wait for ever.
    """
    limits = []
    for spec in trials:
        asked = of_worker(spec)
        if is_on_cpu(spec):
            asked["memory"] = cost(spec).peak_gib * 2**30
        held = sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items()) for node in nodes)
        if held < spec.compute.workers:
            needs = ", ".join(f"{amount:.3g} {name}" for name, amount in asked.items())
            has = "; ".join(", ".join(f"{node.get(name, 0):.3g} {name}" for name in asked) for node in nodes)
            raise ValueError(
                f"each process of a trial must fit on one node, but trial {spec.trial_id()} has {spec.compute.workers} "
                f"of them, each needs {needs}, and the nodes have {has}; join a larger cluster, or ask for less in the "
                "spec's compute"
            )
        limits.append(held // spec.compute.workers)
    return min(limits)


def phases(trials: Sequence[TrialSpec]) -> list[list[TrialSpec]]:
    """The trials in groups that are run one after another, those of many workers first.

    Side by side, trials of one device would keep taking what a trial of many waits for.
    """
    by_workers: dict[int, list[TrialSpec]] = {}
    for spec in trials:
        key = spec.compute.workers if spec.compute.engine == "deepspeed" else 0
        by_workers.setdefault(key, []).append(spec)
    return [by_workers[key] for key in sorted(by_workers, reverse=True)]
