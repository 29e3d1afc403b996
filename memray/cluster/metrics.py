"""What Prometheus is told of a sweep, beside what Ray tells of its nodes; Ray puts `ray_` before each name."""

import functools
from collections.abc import Mapping

from ray.util.metrics import Gauge

# Trials of a sweep by their state: planned, running, finished or failed.
TRIALS = "memray_trials"
# Trials of which MLflow lacks something that the ledger has.
BEHIND = "memray_trials_behind_mlflow"
# Snapshots of the weights of a process's trial that probe actors have still to score.
IN_FLIGHT = "memray_snapshots_in_flight"

_ABOUT = {
    TRIALS: ("Trials of a sweep by their state", ("sweep", "state")),
    BEHIND: ("Trials of which MLflow lacks something that the ledger has", ("sweep",)),
    IN_FLIGHT: ("Snapshots of a trial's weights that are still to be scored", ()),
}


@functools.cache
def _gauge(name: str) -> Gauge:
    about, tags = _ABOUT[name]
    return Gauge(name, description=about, tag_keys=tags)


def tell(name: str, value: float, tags: Mapping[str, str]) -> None:
    """Sets a gauge of this module in a process that has joined Ray."""
    _gauge(name).set(value, dict(tags))
