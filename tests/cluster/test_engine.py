"""The engine of many devices against the engine of one, in plain processes.

Two processes run all jobs of this module, because starting them takes longer than most jobs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import nn

from memray.cluster.engine import check_pickle
from memray.cluster.ledger import Ledger
from memray.cluster.probing import linear_of
from memray.corpora import CorpusSpec, RowsSpec
from memray.curriculum import CurriculumSpec, OtherSpec
from memray.finetune import TorchEngine, as_tensor, lower_weights
from memray.looks import look_at_context
from memray.material import prepare
from memray.measurement import read_context
from memray.measures.prefix import ContextScores
from memray.models import load_model
from memray.probes import ContextSpec, EmbeddingsSpec, FactsSpec
from memray.scoring import score
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.trial import run_trial

from .processes import UNIFORM, Steps, Whole, batch_of, run

EQUAL, UNEQUAL = (24, 24, 24, 24), (12, 31, 24, 7)
STAGES = (0, 1, 2, 3)


def spec_of(
    stage: int = 0, *, num_strings: int = 4, compute: dict[str, Any] | None = None, **training: Any
) -> TrialSpec:
    sharded = {"engine": "deepspeed", "workers": 2, "zero_stage": stage} | (compute or {})
    return TrialSpec(
        strings=StringsSpec(num_strings=num_strings, length=24),
        training=TrainingSpec(**({"strings_per_step": 0, "learning_rate": 1e-3, "epochs": 30} | training)),
        compute=ComputeSpec(**sharded),
    )


def with_lora(spec: TrialSpec) -> TrialSpec:
    return spec.model_copy(update={"model": ModelSpec(lora=LoraSpec(rank=4))})


JOBS = {f"equal-{stage}": Steps(spec_of(stage), EQUAL) for stage in STAGES}
JOBS |= {f"unequal-{stage}": Steps(spec_of(stage), UNEQUAL) for stage in STAGES}
JOBS |= {
    "one string-0": Steps(spec_of(0, num_strings=1), (24,), 4),
    "one string-3": Steps(spec_of(3, num_strings=1), (24,), 4),
    "accumulated-1": Steps(spec_of(1, strings_per_forward=1), UNEQUAL, 4),
    "accumulated-2": Steps(spec_of(2, strings_per_forward=1), UNEQUAL, 4),
    "accumulated-3": Steps(spec_of(3, strings_per_forward=1), UNEQUAL, 4),
    "recomputed-3": Steps(spec_of(3, gradient_checkpointing=True), UNEQUAL, 4),
    "sgd-2": Steps(spec_of(2, optimiser="sgd", momentum=0.9), UNEQUAL, 4),
    "optimiser offloaded-2": Steps(spec_of(2, compute={"offload": "optimiser"}), UNEQUAL, 4),
    "parameters offloaded-3": Steps(spec_of(3, compute={"offload": "parameters"}), UNEQUAL, 4),
    "lora-0": Steps(with_lora(spec_of(0)), UNEQUAL, 4),
    "lora-3": Steps(with_lora(spec_of(3)), UNEQUAL, 4),
    # A chunk of five targets or so: the logits of all chunks but one are made twice.
    "chunked-0": Steps(spec_of(0), UNEQUAL, 4, logits_per_chunk=10_000),
    "chunked-3": Steps(spec_of(3), UNEQUAL, 4, logits_per_chunk=10_000),
    "chunked bf16-3": Steps(spec_of(3, compute={"precision": "bf16"}), EQUAL, 4, logits_per_chunk=10_000),
    "bf16-0": Steps(spec_of(0, compute={"precision": "bf16"}), EQUAL, 4),
    "bf16-2": Steps(spec_of(2, compute={"precision": "bf16"}), EQUAL, 4),
    "bf16-3": Steps(spec_of(3, compute={"precision": "bf16"}), EQUAL, 4),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Stage 3 last: it changes torch's linear function for as long as the process lives.
    by_stage = {name: JOBS[name] for name in sorted(JOBS, key=lambda name: name[-1])}
    return run(2, by_stage, tmp_path_factory.mktemp("jobs"))


def alone(job: Steps) -> dict[str, Any]:
    """The same job under the engine of one device."""
    torch.set_num_threads(1)
    model = load_model(job.spec.model, seed=1)
    precision = job.spec.compute.precision or "fp32"
    return job.run(TorchEngine(model, UNIFORM, job.spec.training, torch.device("cpu"), precision=precision))


def model_of(spec: TrialSpec, snapshot: Mapping[str, np.ndarray]) -> nn.Module:
    """A plain model with the weights of a snapshot."""
    model = load_model(spec.model, seed=2).eval()
    if spec.compute.precision == "bf16":
        lower_weights(model)
    dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
    model.load_state_dict({name: as_tensor(array, dtypes[name]) for name, array in snapshot.items()})
    return model


@pytest.mark.parametrize("name", [name for name in JOBS if "bf16" not in name])
def test_every_stage_follows_the_engine_of_one_device(results: dict[str, Any], name: str) -> None:
    theirs = alone(JOBS[name])
    assert results[name]["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert results[name]["losses"][-1] < results[name]["losses"][0]
    assert results[name]["snapshot"].keys() == theirs["snapshot"].keys()


@pytest.mark.parametrize("name", [name for name in JOBS if "bf16" in name])
def test_bf16_trains_with_fp32_masters_under_every_stage(results: dict[str, Any], name: str) -> None:
    # DeepSpeed rounds the weights to bf16 before it copies them to its masters, which is 0.4 % of a weight at most.
    theirs = alone(JOBS[name])
    assert results[name]["losses"] == pytest.approx(theirs["losses"], rel=0.03)
    types = {key: array.dtype for key, array in results[name]["snapshot"].items()}
    assert types == {key: array.dtype for key, array in theirs["snapshot"].items()}
    assert np.dtype(np.int16) in types.values()


@pytest.mark.parametrize("name", ["unequal-0", "unequal-3", "one string-3"])
def test_the_same_weights_give_the_same_scores_to_the_last_bit(results: dict[str, Any], name: str) -> None:
    assert results[name]["before"].is_identical_to(alone(JOBS[name])["before"])


@pytest.mark.parametrize("name", [*(f"equal-{stage}" for stage in STAGES), "bf16-0", "bf16-2", "bf16-3"])
def test_a_snapshot_gives_the_scores_of_its_engine_again_to_the_last_bit(results: dict[str, Any], name: str) -> None:
    job, result = JOBS[name], results[name]
    model = model_of(job.spec, result["snapshot"])
    with linear_of(job.spec, torch.device("cpu")):
        assert score(model, batch_of(EQUAL), UNIFORM).is_identical_to(result["after"])


def test_two_workers_that_share_nothing_but_memory_count_a_string_once(results: dict[str, Any]) -> None:
    theirs = alone(JOBS["one string-3"])
    assert results["one string-3"]["after"].string.tolist() == theirs["after"].string.tolist()


# --- checkpoints -----------------------------------------------------------------------------------------------


# The precision that GPUs train at goes through other optimisers of DeepSpeed's, with other files.
# Sequences, below, are the ones of stage 1.
RESUMED = {f"fp32-{stage}": spec_of(stage, num_strings=2, epochs=5) for stage in (0, 2, 3)}
RESUMED |= {f"bf16-{stage}": spec_of(stage, num_strings=2, epochs=5, compute={"precision": "bf16"}) for stage in (0, 3)}
RESUMED["several steps-2"] = spec_of(2, num_strings=4, epochs=5, strings_per_step=2)
# Strings one after another, and one of those before beside each: two workers for one or two strings a step.
SEQUENCES = ("a sequence-1", "a sequence-3")
RESUMED |= {
    name: spec_of(int(name[-1]), num_strings=6, epochs=3).model_copy(
        update={"curriculum": CurriculumSpec(replay_share=0.5, other=OtherSpec(stages=(1,), alphabet_size=2))}
    )
    for name in SEQUENCES
}
# Samples, with embeddings that stay as they were. Objects of facts are scored by all workers; where vectors of samples
# are asked for too, the main one looks at the weights put together.
FACTS = FactsSpec(num_facts=2)
ASKED = {
    "facts-1": ProbesSpec(epochs=(0,), num_held_out=4, facts=FACTS),
    "embeddings-3": ProbesSpec(epochs=(0,), num_held_out=4, facts=FACTS, embeddings=EmbeddingsSpec()),
}
RESUMED |= {
    name: TrialSpec(
        corpus=CorpusSpec(rows=RowsSpec(generator="facts"), num_samples=8),
        model=ModelSpec(size="tiny-text"),
        training=TrainingSpec(epochs=5, strings_per_step=4, learning_rate=3e-3, frozen_embeddings=True),
        compute=spec_of(int(name[-1])).compute,
        string_seed=seed,  # or two that are only looked at in different ways would be one trial
    )
    for seed, name in enumerate(ASKED)
}
# Those whose context is probed too: with shards, with several steps an epoch, with weights that were rounded.
PROBED = ("fp32-3", "several steps-2", "bf16-0")
# A look of every kind: a trunk, branches behind one, prompts, windows.
CONTEXT = ContextSpec(
    epochs=(2,), keep=("local", "remote"), replacements=("source", "shuffled"), lengths=(3,), redraws=1, num_strings=1,
    num_positions=3, extractable=(4,),
)  # fmt: skip


def resumable(name: str) -> TrialSpec:
    spec = RESUMED[name]
    probes = ProbesSpec(epochs=(0, 2), num_held_out=2, context=CONTEXT if name in PROBED else None)
    probes = ASKED.get(name, probes)
    keeps = name in (*PROBED, *ASKED)
    training = spec.training.model_copy(update={"keep_weights": "probe_epochs" if keeps else "none"})
    compute = spec.compute.model_copy(update={"checkpoint_s": 0.0})
    return spec.model_copy(update={"probes": probes, "training": training, "compute": compute})


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each trial undisturbed, left after its third checkpoint, and resumed by processes that know no more."""
    folder = tmp_path_factory.mktemp("resumed")
    whole, left = Ledger(str(folder / "whole"), "sweep"), Ledger(str(folder / "left"), "sweep")
    # Stage 3 last, as above.
    specs = {name: resumable(name) for name in sorted(RESUMED, key=lambda name: name[-1])}

    def claimed(ledger: Ledger, name: str) -> Any:
        return ledger.trial(specs[name].trial_id()).claim(specs[name].canonical_json(), "launch").elsewhere()

    jobs: dict[str, Any] = {}
    for name, spec in specs.items():
        jobs[f"whole {name}"] = Whole(spec, claimed(whole, name))
        jobs[f"left {name}"] = Whole(spec, claimed(left, name), until=3)
    told = run(2, jobs, folder / "first")
    checkpoints = {name: left.trial(spec.trial_id()).checkpoint() for name, spec in specs.items()}
    jobs = {f"on {name}": Whole(spec, claimed(left, name), checkpoints[name]) for name, spec in specs.items()}
    told |= run(2, jobs, folder / "second")
    return {"told": told, "specs": specs, "whole": whole, "left": left, "checkpoints": checkpoints}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stage_resumes_bit_identical_in_processes_of_its_own(resumed: dict[str, Any], name: str) -> None:
    told = [resumed["told"][f"{what} {name}"] for what in ("whole", "left", "on")]
    assert told == ["finished", "interrupted", "finished"]
    third = 9 if name in SEQUENCES else 3  # of a sequence there is one a stage
    assert resumed["checkpoints"][name].epoch == third
    trial_id = resumed["specs"][name].trial_id()
    one, other = (resumed[which].trial(trial_id).finished() for which in ("left", "whole"))
    assert one.measurements_sha256 == other.measurements_sha256
    assert (one.attempt, one.summary["resumed_from_epoch"]) == (2, third)
    assert resumed["left"].trial(trial_id).verify() == []


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_goes_as_on_one_device(resumed: dict[str, Any], name: str) -> None:
    """Each stage begins with a fresh optimiser there too, and trains the same strings of the stages before."""
    spec = resumed["specs"][name]
    found = resumed["left"].trial(spec.trial_id()).matrix().to_pandas()
    alone = run_trial(spec.model_copy(update={"compute": ComputeSpec()}))
    expected = pa.concat_tables([each.matrix for each in alone if each.matrix is not None]).to_pandas()
    places = ["stage", "stage_epoch", "string", "is_own", "is_held_out", "source", "learned_step"]
    pd.testing.assert_frame_equal(found[places], expected[places])
    np.testing.assert_allclose(found["recall/nll_nats"], expected["recall/nll_nats"], rtol=1e-3)


@pytest.mark.parametrize("name", ASKED)
def test_a_corpus_goes_as_on_one_device(resumed: dict[str, Any], name: str) -> None:
    spec = resumed["specs"][name]
    folder = resumed["left"].trial(spec.trial_id())
    found = folder.measurements()[0]
    alone = list(run_trial(spec.model_copy(update={"compute": ComputeSpec()})))
    assert [each["epoch"] for each in found] == [0, 5]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours["metrics"].keys() == theirs.metrics.keys()
        keys = [key for key in theirs.metrics if key.startswith(("recall/", "collapse/", "similarity/", "facts/"))]
        told = [ours["metrics"][key] for key in keys]
        assert told == pytest.approx([theirs.metrics[key] for key in keys], rel=1e-3), keys
    first, last = found[0]["metrics"], found[-1]["metrics"]
    assert "facts/rank_unseen" in last
    assert ("similarity/full" in first) == ("collapse/effective_rank" in last) == (name == "embeddings-3")
    assert last["recall/nll_nats"] < 0.9 * first["recall/nll_nats"], "it must have trained"


@pytest.mark.parametrize("name", ASKED)
def test_embeddings_that_are_frozen_stay_to_the_last_bit_and_all_else_moves(resumed: dict[str, Any], name: str) -> None:
    spec = resumed["specs"][name]
    folder = resumed["left"].trial(spec.trial_id())
    kept = folder.kept_weights()
    first, last = (folder.read_weights(kept[epoch]) for epoch in (0, 5))
    model = load_model(spec.model, seed=spec.model_seed)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    assert first.keys() == last.keys() == dict(model.named_parameters()).keys()
    for parameter, weight in model.named_parameters():
        assert (first[parameter].tobytes() == last[parameter].tobytes()) == (weight is table), parameter


@pytest.mark.parametrize("name", PROBED)
def test_the_main_process_sees_the_context_as_a_plain_one_does_to_the_last_bit(
    resumed: dict[str, Any], name: str
) -> None:
    spec = resumed["specs"][name]
    folder, material = resumed["left"].trial(spec.trial_id()), prepare(spec)
    found, kept = read_context(folder.context(), folder.strings(), CONTEXT), folder.kept_weights()
    assert [*found] == [2, 5]
    torch.set_num_threads(1)
    for epoch, seen in found.items():
        model = model_of(spec, folder.read_weights(kept[epoch]))
        with linear_of(spec, torch.device("cpu")):
            expected = look_at_context(spec, material, model)
        assert seen.keys() == expected.keys() == {"trained", "held_out"}
        for role, scores in expected.items():
            assert bits(seen[role]) == bits(scores), (epoch, role)


def bits(scores: ContextScores) -> dict[str, bytes]:
    return {name: getattr(scores, name).tobytes() for name in (*ContextScores.COLUMNS, "extractable")}


class Harmful:
    """What a foreign file could carry: reading it runs code."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_checkpoint_that_names_foreign_code_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"optimizer_state_dict": Harmful()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"nothing but DeepSpeed's own classes, but mp_rank_00_.* names \S*print"):
        check_pickle(tmp_path / "mp_rank_00_model_states.pt")
    assert "run" not in capsys.readouterr().out
