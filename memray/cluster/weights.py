"""Base weights, read once and handed to every trial of a cluster through Ray's object store.

An actor owns them, because objects die with their owner and a trial's actor may die early. numpy arrays are read by
every process of a node without a copy.
"""

from typing import Any

import ray
from numpy import ndarray
from ray.exceptions import ObjectLostError

from memray.cluster.resources import off_spot
from memray.spec import ModelSpec

# How often weights are asked for whose owner dies.
TRIES = 3


class WeightsOwner:
    """Loads the weights of a model when they are first asked for, and keeps them."""

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}

    def reference(self, model_json: str) -> list[Any]:
        """A reference to the weights by name (in a list: a bare one would be resolved, and copied, on the way)."""
        if model_json not in self._references:
            # Imported in the actor alone, as in `launch`.
            from memray.finetune import as_numpy
            from memray.models import load_model

            model = load_model(ModelSpec.model_validate_json(model_json), seed=0)
            self._references[model_json] = ray.put({name: as_numpy(each) for name, each in model.named_parameters()})
        return [self._references[model_json]]


def start_weights_owner() -> Any:
    """The actor, which lives as long as its handle or the launch that made it. It waits most of the time: no CPU."""
    labels = off_spot(ray.nodes())
    return ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3, label_selector=labels)(WeightsOwner).remote()


def ensure_at_hand(model: ModelSpec, owner: Any) -> None:
    """Fetches what this node lacks of a public model: it may have joined after the launch had fetched all.

    Args:
        owner: Who gives the weights; without one they are fetched too.

    Raises:
        ConnectionError: If the hub does not give it.
    """
    from memray.models import download, is_at_hand

    lacking = model if owner is None else model.model_copy(update={"pretrained": False})
    if not is_at_hand(lacking):
        try:
            download(lacking)
        except ValueError as error:  # not of the spec: preflight has read the model elsewhere
            raise ConnectionError(str(error)) from error


def fetch(owner: Any, model: ModelSpec) -> dict[str, ndarray]:
    """The weights of a pretrained model, before any adapter; read-only arrays in shared memory."""
    bare = model.model_copy(update={"lora": None, "dropout": 0.0})
    for left in reversed(range(TRIES)):
        (reference,) = ray.get(owner.reference.remote(bare.model_dump_json()))
        try:
            return ray.get(reference)
        except ObjectLostError:  # its owner has died, and a new one loads the weights again
            if not left:
                raise
    raise AssertionError
