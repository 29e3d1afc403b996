"""What runs inside a Tune actor: one trial, from its claim to its marker.

The actor is reused from trial to trial, and keeps its model. It writes to the ledger alone.
"""

import functools
import traceback
from typing import Any

from ray import tune

from memray.cluster.leaving import Left, at_work
from memray.cluster.ledger import AlreadyFinished, Attempt, Busy, Ledger, Superseded
from memray.cluster.storage import StorageError, patiently
from memray.spec import TrialSpec


def run_in_actor(
    config: dict[str, Any], *, ledger: Ledger, launch_name: str, owner: Any, probe_actors: list[Any]
) -> None:
    """Tune's function: one trial, from its claim to its marker."""
    spec = TrialSpec.model_validate_json(config["cell"]["spec"])
    try:
        with at_work():
            _claim_and_run(spec, ledger, launch_name, owner, probe_actors)
    except (Busy, Superseded) as error:
        tune.report({"busy": str(error)})
    except StorageError:
        tune.report({"died": traceback.format_exc()})  # it was tried for a while, and would not take the failure either
    except Left as error:
        if not ledger.is_asked_to_leave(launch_name):
            raise  # this node alone is taken back: elsewhere the trial goes on
        tune.report({"left": str(error)})


def _claim_and_run(spec: TrialSpec, ledger: Ledger, launch_name: str, owner: Any, probe_actors: list[Any]) -> None:
    if patiently(lambda: ledger.is_asked_to_leave(launch_name), ledger.patience_s):
        raise Left("the launch was asked to leave before the trial began")
    if patiently(ledger.mark, ledger.patience_s) is None:  # a node that joined after the launch had looked at all
        raise RuntimeError(f"every node must reach the storage, but on this one {ledger.storage} is another folder")
    try:
        folder = patiently(lambda: ledger.trial(spec.trial_id()), ledger.patience_s)
        attempt = folder.claim(spec.canonical_json(), launch_name)
    except AlreadyFinished:
        return
    with attempt:
        try:
            _run(spec, attempt, launch_name, owner, probe_actors)
        except (Superseded, StorageError, Left):
            raise
        except ValueError:
            attempt.fail(traceback.format_exc())  # the same spec would be refused again: no retry
        except Exception:
            attempt.fail(traceback.format_exc())
            raise


def _run(spec: TrialSpec, attempt: Attempt, launch_name: str, owner: Any, probe_actors: list[Any]) -> None:
    """Trains here, or starts the workers that do, from where an earlier attempt had come to."""

    def told(epoch: int) -> None:
        tune.report({"epoch": epoch})

    folder = attempt.folder
    trained = folder.ledger.as_trained(spec.trial_id()) if folder.is_added else None
    if trained is not None:
        from memray.cluster.recorder import Recorder
        from memray.cluster.replay import from_kept_weights, is_kept

        # Of a trial of many devices this process has none: there the trial is trained again.
        if spec.compute.engine == "torch" and is_kept(spec, trained):
            recorder = Recorder(spec, attempt, told=told, leave_names=(launch_name,))
            recorder.record(recorder.until_asked(from_kept_weights(spec, trained)))
            return
    checkpoint = patiently(folder.checkpoint, folder.ledger.patience_s)
    if spec.compute.engine == "deepspeed":
        from memray.cluster.training import train

        train(
            spec,
            attempt,
            checkpoint,
            trained=trained,
            launch_name=launch_name,
            owner=owner,
            probe_actors=probe_actors,
            told=told,
        )
        return
    # Only here, for they take seconds to import, and an actor that waits for workers has no use for them.
    from memray.cluster.probing import ActorProber
    from memray.cluster.recorder import Recorder
    from memray.cluster.weights import ensure_at_hand
    from memray.trial import run_trial

    ensure_at_hand(spec.model, owner)
    prober = ActorProber(spec.model_dump_json(), probe_actors) if probe_actors else None
    recorder = Recorder(spec, attempt, checkpoint, trained=trained, told=told, leave_names=(launch_name,))
    measurements = run_trial(spec, shelf=_shelf(owner), prober=prober, keeper=recorder)
    recorder.record(measurements, prober.summary if prober else dict)


@functools.cache
def _shelf(owner: Any) -> Any:
    """One model shelf an actor, which Tune reuses from trial to trial."""
    from memray.cluster.weights import fetch
    from memray.trial import ModelShelf

    return ModelShelf(functools.partial(fetch, owner) if owner is not None else None)
