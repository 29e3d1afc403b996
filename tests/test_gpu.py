"""What the CPU cannot show of the engine of one device: `pytest -m gpu tests/test_gpu.py`, where there is CUDA.

Models have random weights, so that nothing is downloaded; nothing of a cluster is imported.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from memray.accelerators import ACCELERATORS
from memray.cost import PROCESS_GIB, cost
from memray.families import family
from memray.finetune import TorchEngine, as_tensor, lower_weights
from memray.looks import forwards_of_epoch
from memray.material import Material, prepare
from memray.models import character_tokenizer, load_model
from memray.scoring import TokenScores, score
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.trial import make_torch_engine, run_trial, set_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def accelerator_here() -> str:
    """The row of this device: of several, the one whose memory is nearest."""
    device_name, memory_gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    rows = [row for row in ACCELERATORS.values() if row.device == "cuda" and row.device_name in device_name]
    if not rows:
        pytest.skip(f"no row of the accelerator table is {device_name}")
    return min(rows, key=lambda row: abs(row.memory_gib - memory_gib)).name


def trial(precision: str, **fields: Any) -> TrialSpec:
    given = {
        "strings": StringsSpec(length=128, num_strings=2),
        "training": TrainingSpec(strings_per_step=0, epochs=5),
        "probes": ProbesSpec(epochs=(0, 3), num_held_out=2),
        "compute": ComputeSpec(accelerator=accelerator_here(), precision=precision),  # type: ignore[arg-type]
    }
    return TrialSpec(**(given | fields))


def engine_of(spec: TrialSpec) -> tuple[TorchEngine, Material]:
    device, material = set_device(spec), prepare(spec)
    model = load_model(spec.model, seed=spec.model_seed)
    engine = make_torch_engine(spec, model, material.alphabet, device)
    assert isinstance(engine, TorchEngine)
    return engine, material


@each_precision
def test_a_trial_repeats_to_the_last_bit(precision: str) -> None:
    one, other = ([*run_trial(trial(precision))] for _ in range(2))
    assert [each.record() for each in one] == [each.record() for each in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.tokens.keys() == theirs.tokens.keys()
        assert all(scores.is_identical_to(theirs.tokens[role]) for role, scores in mine.tokens.items())


@each_precision
def test_the_scores_of_a_training_forward_are_those_of_a_separate_pass(precision: str) -> None:
    engine, material = engine_of(trial(precision))
    for _ in range(3):
        separate = engine.score(material.trained)
        assert engine.step(material.trained, 1e-3).is_identical_to(separate)


@each_precision
@pytest.mark.parametrize("strings_per_forward", [0, 1])
def test_a_snapshot_scored_elsewhere_gives_the_scores_of_the_trainer(precision: str, strings_per_forward: int) -> None:
    """As a probe actor does it: a model of the same make, the snapshot's weights, the trainer's batches."""
    training = TrainingSpec(strings_per_step=0, strings_per_forward=strings_per_forward, epochs=5)
    spec = trial(precision, training=training)
    engine, material = engine_of(spec)
    engine.step(material.trained, 1e-3)
    snapshot = engine.snapshot()
    theirs = engine.step(material.trained, 1e-3)

    model = load_model(spec.model, seed=spec.model_seed).eval()
    torch.nn.Module.to(model, engine.device)
    if precision == "bf16":
        lower_weights(model)
    dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
    model.load_state_dict({name: as_tensor(array, dtypes[name]) for name, array in snapshot.items()})
    alphabet = material.alphabet.to(engine.device)
    batches = forwards_of_epoch(spec, material.trained, 1)
    scored = TokenScores.concatenate([score(model, batch.to(engine.device), alphabet) for batch in batches])
    assert scored.is_identical_to(theirs)


@each_precision
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_expected_peak_is_near_the_measured_one(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    known = family("pythia")
    config = getattr(transformers, known.config_class)(**known.config_arguments(known.sizes["410m"]))
    config.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    spec = trial(
        precision,
        model=ModelSpec(path=str(tmp_path)),
        strings=StringsSpec(length=1024, num_strings=4),
        training=TrainingSpec(strings_per_step=0, gradient_checkpointing=checkpointing, epochs=2),
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in run_trial(spec):
        pass
    measured = torch.cuda.max_memory_allocated() / 2**30
    # torch does not count the context and the kernels, for which a constant stands.
    assert 0.8 * measured <= cost(spec).peak_gib - PROCESS_GIB <= 1.6 * measured
