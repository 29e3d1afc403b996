"""What the log of communication counts, against what a model's weights say that must be sent."""

import itertools
import time
from dataclasses import dataclass
from typing import Any

import pytest

from memray.cluster.communication import sent_bytes
from memray.finetune import Engine
from memray.models import load_model
from memray.spec import ComputeSpec, StringsSpec, TrainingSpec, TrialSpec

from .processes import Steps, batch_of, run

pytestmark = pytest.mark.fault  # no kill, but half a minute

LENGTHS = (24, 24)


@dataclass(frozen=True)
class Counted(Steps):
    """Some optimiser steps, and what was counted before and after each."""

    def run(self, engine: Engine) -> dict[str, Any]:
        began_s, told = time.monotonic(), [engine.communication()]  # type: ignore[attr-defined]
        for _ in range(self.number):
            engine.step(batch_of(self.lengths), 1e-3)
            told.append(engine.communication())  # type: ignore[attr-defined]
        return {"told": told, "took_s": time.monotonic() - began_s}


def job(stage: int, *, logs_communication: bool = True) -> Counted:
    compute = ComputeSpec(engine="deepspeed", workers=2, zero_stage=stage, logs_communication=logs_communication)  # type: ignore[arg-type]
    spec = TrialSpec(
        strings=StringsSpec(num_strings=2, length=24), training=TrainingSpec(strings_per_step=0), compute=compute
    )
    return Counted(spec, LENGTHS, 10)


JOBS = {"not counted": job(0, logs_communication=False)} | {f"stage {stage}": job(stage) for stage in range(4)}
JOBS["not counted after others"] = JOBS["not counted"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(2, JOBS, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def weights_gib() -> float:
    """What all weights take at fp32."""
    return sum(weight.numel() for weight in load_model(JOBS["stage 0"].spec.model, seed=1).parameters()) * 4 / 2**30


def sent(result: dict[str, Any]) -> list[float]:
    """GiB sent in each step."""
    gib = [told["communication_gib"] for told in result["told"]]
    return [after - before for before, after in itertools.pairwise(gib)]


# Of two workers, each sends half of what is reduced, and half of what is told: the gradients are reduced and told at
# stages 0 to 2 (on which DeepSpeed's buckets shard after the fact), and the new weights told beside them at 1 and 2.
@pytest.mark.parametrize(("stage", "weights"), [(0, 1.0), (1, 1.5), (2, 1.5)])
def test_a_step_sends_the_gradients_and_from_stage_1_the_weights(
    results: dict[str, Any], weights_gib: float, stage: int, weights: float
) -> None:
    assert sent(results[f"stage {stage}"]) == pytest.approx([weights * weights_gib] * 10, rel=1e-3)


def test_stage_3_reduces_gradients_once_and_tells_each_weight_before_it_is_used(
    results: dict[str, Any], weights_gib: float
) -> None:
    # Half of the gradients, and half of the weights from one to three times: small ones stay after a forward pass.
    assert all(weights_gib <= step <= 2.01 * weights_gib for step in sent(results["stage 3"]))


def test_the_first_weights_are_told_before_any_step(results: dict[str, Any], weights_gib: float) -> None:
    first = results["stage 0"]["told"][0]["communication_gib"]
    assert 0.5 * weights_gib <= first <= 1.01 * weights_gib


@pytest.mark.parametrize("stage", range(4))
def test_calls_take_some_of_the_time_that_passes_and_no_more(results: dict[str, Any], stage: int) -> None:
    told, took_s = results[f"stage {stage}"]["told"], results[f"stage {stage}"]["took_s"]
    assert 0 < told[-1]["communication_s"] - told[0]["communication_s"] < took_s


@pytest.mark.parametrize("name", ["not counted", "not counted after others"])
def test_nothing_is_told_where_nothing_is_counted(results: dict[str, Any], name: str) -> None:
    assert results[name]["told"] == [{}] * 11


@pytest.mark.parametrize(
    ("operation", "bytes_sent"),
    [("reduce_scatter_tensor", 6), ("reduce", 6), ("broadcast", 6), ("all_reduce", 12), ("all_reduce_coalesced", 12),
     ("all_gather_into_tensor", 24), ("all_gather", 24)],
)  # fmt: skip
def test_each_of_four_workers_passes_on_what_the_others_lack(operation: str, bytes_sent: float) -> None:
    assert sent_bytes(operation, 8, 4) == bytes_sent
