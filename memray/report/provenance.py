"""What a study's numbers stand on: its seeds, devices, versions and code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memray.report import SEEDS
from memray.sweep import Sweep

# What a finished trial's summary says, and how a reader calls it.
SUMMARIES = {"device": "Devices", "torch": "torch", "transformers": "transformers", "python": "Python"}


def provenance(sweep: Sweep, summaries: Sequence[Mapping[str, Any]], tags: Mapping[str, str]) -> dict[str, str]:
    """What the numbers stand on, by what it is.

    Args:
        summaries: Of the finished trials.
        tags: Versions and the commit of the code that reads them, as MLflow has them; a commit may be missing.
    """
    found = {
        "Trials": f"{len(summaries)} of {len(sweep.trials)} finished, in {len(sweep.cells())} cells",
        **{name: _range(getattr(trial, name) for trial in sweep.trials) for name in SEEDS},
        "Engine": _all(f"{trial.compute.engine} on {trial.compute.accelerator}" for trial in sweep.trials),
    }
    found |= {name: _all(each[key] for each in summaries if key in each) for key, name in SUMMARIES.items()}
    versions = [each["measure_versions"] for each in summaries if "measure_versions" in each]
    found["Measures"] = _all(", ".join(f"{name} {number}" for name, number in each.items()) for each in versions)
    seconds = [float(each["seconds"]) for each in summaries if "seconds" in each]
    found["Training"] = f"{sum(seconds):.0f} s in all" if seconds else ""
    found["Report"] = _all(f"{name.removeprefix('version.')} {tags[name]}" for name in tags if "version." in name)
    found["Commit of the report's code"] = tags.get("mlflow.source.git.commit", "")
    return {name: value or "not known" for name, value in found.items()}


def _all(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _range(values: Iterable[int]) -> str:
    """Integers, shortened where they follow each other.

    Example:
        >>> _range([2, 0, 1, 1]), _range([0, 5])
        ('0–2', '0, 5')
    """
    seen = sorted(set(values))
    if len(seen) > 1 and seen[-1] - seen[0] == len(seen) - 1:
        return f"{seen[0]}–{seen[-1]}"
    return _all(seen)
