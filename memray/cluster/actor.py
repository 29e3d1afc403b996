"""What runs inside a Tune actor: one trial, from its claim to its marker.

The actor is reused from trial to trial, and keeps its model. It writes to the ledger alone.
"""

import functools
import platform
import time
import traceback
from typing import Any

import torch
import transformers
from ray import tune

from memray.accelerators import accelerator
from memray.cluster.ledger import AlreadyFinished, Attempt, Busy, Ledger, Superseded
from memray.cluster.weights import fetch
from memray.measurement import MEASURE_VERSIONS, Measurement, string_table, token_table
from memray.spec import TrialSpec
from memray.trial import ModelShelf, run_trial

# Seconds of measurements that an actor gathers before it writes a segment: what a crash can lose.
SEGMENT_S = 5.0


@functools.cache
def _shelf(owner: Any) -> ModelShelf:
    """One model shelf an actor, which Tune reuses from trial to trial."""
    return ModelShelf(functools.partial(fetch, owner) if owner is not None else None)


def run_in_actor(config: dict[str, Any], *, ledger: Ledger, launch_name: str, owner: Any) -> None:
    """Tune's function: one trial, from its claim to its marker."""
    spec = TrialSpec.model_validate_json(config["cell"]["spec"])
    folder = ledger.trial(spec.trial_id())
    try:
        attempt = folder.claim(spec.canonical_json(), launch_name)
    except AlreadyFinished:
        return
    except Busy as error:
        tune.report({"busy": str(error)})
        return
    with attempt:
        try:
            record_trial(spec, attempt, _shelf(owner))
        except Superseded as error:
            tune.report({"busy": str(error)})
        except ValueError:
            attempt.fail(traceback.format_exc())  # the same spec would be refused again: no retry
        except Exception:
            attempt.fail(traceback.format_exc())
            raise


def record_trial(spec: TrialSpec, attempt: Attempt, shelf: ModelShelf) -> None:
    """Runs a trial and writes what it measures, a few segments in all."""
    gathered: list[Measurement] = []
    began = written = time.monotonic()

    def write() -> None:
        attempt.append([each.record() for each in gathered], token_table(gathered), string_table(gathered))
        for each in gathered:
            if each.weights is not None:
                attempt.keep_weights(each.epoch, each.weights)
        gathered.clear()

    epoch = 0
    for measurement in run_trial(spec, shelf=shelf):
        gathered.append(measurement)
        epoch = measurement.epoch
        if time.monotonic() - written > SEGMENT_S:
            write()
            tune.report({"epoch": epoch})
            written = time.monotonic()
    if gathered:
        write()
    attempt.finish({"epochs": epoch, "seconds": round(time.monotonic() - began, 3), **provenance(spec)})


def provenance(spec: TrialSpec) -> dict[str, Any]:
    """What else the numbers depend on."""
    is_cpu = accelerator(spec.compute.accelerator).device == "cpu"
    return {
        "probes_id": spec.probes.probes_id(),
        "probes": spec.probes.model_dump_json(),
        "measure_versions": MEASURE_VERSIONS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.backends.cpu.get_cpu_capability() if is_cpu else torch.cuda.get_device_name(),
    }
