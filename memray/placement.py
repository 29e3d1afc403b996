"""Where a trial runs, when its spec leaves that open: the smallest placement that holds it.

A spec that names no engine runs on one device with plain torch, if it fits there. If not, DeepSpeed shards it: over
the fewest devices, and at the lowest stage of ZeRO that fits them, because each stage makes its workers talk more.
Offloading comes last: it makes a step many times slower. What a spec names outright is never changed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from memray.cost import available_gib, cost
from memray.spec import ComputeSpec, TrialSpec

# Devices that are tried, a node's first; a larger number is the user's to name.
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def place(spec: TrialSpec) -> tuple[TrialSpec, str]:
    """The trial with its placement, and why it is placed so; no reason where nothing was chosen.

    A trial that fits nowhere comes back as it is, and is refused where every other one that does not fit is. One that
    was placed names its whole placement, so that placing it again, or reading it back from JSON, changes nothing.
    """
    if not _is_open(spec.compute):
        return spec, ""
    try:
        alone = cost(spec).peak_gib
    except ValueError:
        return spec, ""  # no readable model: said later, with all else that is wrong
    if alone <= available_gib(spec):
        return spec, ""
    for fields in _candidates():
        placed = _with_compute(spec, fields)
        if placed is not None and (needed := cost(placed).peak_gib) <= available_gib(placed):
            return placed, _reason(spec, alone, placed, needed)
    return spec, ""


def _is_open(compute: ComputeSpec) -> bool:
    """Whether there is anything to choose. On the CPU there is not: more workers find no more memory there."""
    named = compute.model_fields_set
    if compute.accelerator == "cpu" or compute.device_share != 1:  # a share is of one device
        return False
    return "engine" not in named or (
        compute.engine == "deepspeed" and not {"workers", "zero_stage", "offload"} <= named
    )


def _candidates() -> Iterator[dict[str, Any]]:
    """Placements under DeepSpeed, the smallest first."""
    for offload in ("none", "optimiser", "parameters"):
        for workers in WORKERS:
            for stage in range(4):
                yield {"engine": "deepspeed", "workers": workers, "zero_stage": stage, "offload": offload}


def _with_compute(spec: TrialSpec, fields: dict[str, Any]) -> TrialSpec | None:
    """The trial with these fields of its compute; None where it names another value itself, or no trial is so."""
    named = spec.compute.model_fields_set
    if any(name in named and getattr(spec.compute, name) != value for name, value in fields.items()):
        return None
    # What is stated alone, as in `vary`: what the family table filled in stays filled in.
    stated = spec.model_dump(exclude_unset=True)
    stated["compute"] = stated.get("compute", {}) | fields
    try:
        return TrialSpec.model_validate(stated)
    except ValueError:
        return None


def _reason(spec: TrialSpec, alone: float, placed: TrialSpec, needed: float) -> str:
    compute = placed.compute
    offload = "" if compute.offload == "none" else f", offload {compute.offload}"
    return (
        f"{compute.workers} x {compute.accelerator} under DeepSpeed, ZeRO stage {compute.zero_stage}{offload}, "
        f"{needed:.1f} GiB each: as its spec stood ({_spelled(spec.compute)}) it would need {alone:.1f} GiB, and "
        f"{compute.accelerator} offers {available_gib(spec):.1f} GiB"
    )


def _spelled(compute: ComputeSpec) -> str:
    if compute.engine == "torch":
        return "one device"
    return f"{compute.workers} x {compute.accelerator}, ZeRO stage {compute.zero_stage}"


def num_probe_actors(devices: int, trials: Sequence[TrialSpec]) -> int:
    """Probe actors for some trials on a cluster of that many devices.

    One for every eight devices, and none below three; or as many as the trials leave idle, at most one a trial.
    """
    trained_on = sum(trial.compute.workers * trial.compute.device_share for trial in trials)
    idle = max(0, devices - math.ceil(trained_on))
    return max(0 if devices < 3 else max(1, devices // 8), min(idle, len(trials)))
