"""What a trial will cost, against torch's own counter of operations and against the peak of a process that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from memray import accelerators, finetune, scoring
from memray import cost as costs
from memray.accelerators import ACCELERATORS
from memray.cost import check_fits, cost, shape
from memray.families import FAMILIES, family
from memray.looks import look_at_context
from memray.material import prepare
from memray.models import character_tokenizer, load_model
from memray.probes import ContextSpec
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec

from .ports import free_port

UNSEEN = ProbesSpec(num_held_out=0)

each_family = pytest.mark.parametrize("name", FAMILIES)


def one_epoch(length: int = 256, **fields: Any) -> TrialSpec:
    """One step on one string and one scoring pass, nothing held out."""
    return TrialSpec(strings=StringsSpec(length=length), training=TrainingSpec(epochs=1), probes=UNSEEN, **fields)


def tiny(name: str, **fields: Any) -> ModelSpec:
    return ModelSpec(family=name, bos=False, **fields)


def counted(model: torch.nn.Module, length: int) -> tuple[float, float]:
    """Operations of a forward pass, and of a forward with its backward pass, as torch counts them.

    The models attend eagerly: the counter sees no fused attention on a CPU. What it then counts for attention (the
    batched products) is the whole square of positions, of which causal attention computes one half.
    """

    def causal(counter: FlopCounterMode) -> float:
        by_operation = counter.get_flop_counts()["Global"]
        assert by_operation[torch.ops.aten.bmm] > 0
        return sum(by_operation.values()) - by_operation[torch.ops.aten.bmm] / 2

    ids = torch.arange(length)[None] % 26 + 4
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids, labels=ids).loss.backward()
    return causal(forward), causal(both)


def eager(spec: ModelSpec) -> torch.nn.Module:
    model = load_model(spec, seed=0)
    model.set_attn_implementation("eager")
    return model


# Operations.


@each_family
def test_the_operations_of_a_trial_are_those_that_torch_counts(name: str) -> None:
    forward, both = counted(eager(tiny(name)), 128)
    # One step, and one pass that scores the weights it leaves.
    assert cost(one_epoch(128, model=tiny(name))).flops == pytest.approx(both + forward, rel=0.1)


def test_a_probe_of_the_context_costs_about_what_torch_counts() -> None:
    context = ContextSpec(lengths=(0, 2, 5, 10), replacements=("source", "none"), redraws=2, num_held_out=0)
    plain = one_epoch(128)
    probed = plain.model_copy(update={"probes": ProbesSpec(num_held_out=0, context=context)})
    with FlopCounterMode(display=False) as counter:
        look_at_context(probed, prepare(probed), eager(ModelSpec()))
    counted_flops = sum(counter.get_flop_counts()["Global"].values())
    # Packed branches compute what their mask hides too.
    assert 0.7 * counted_flops < cost(probed).flops - cost(plain).flops < 1.5 * counted_flops


def test_attention_grows_with_the_square_of_the_length_as_torch_counts_it() -> None:
    model = eager(tiny("pythia"))
    for length in (16, 512):
        forward, both = counted(model, length)
        assert cost(one_epoch(length)).flops == pytest.approx(both + forward, rel=0.1)


def test_adapters_save_the_gradients_of_the_frozen_weights() -> None:
    spec = one_epoch(128, model=tiny("pythia", lora=LoraSpec()))
    forward, both = counted(eager(spec.model), 128)
    assert cost(spec).flops == pytest.approx(both + forward, rel=0.15)
    assert cost(spec).flops < cost(one_epoch(128)).flops


def test_the_operations_of_a_trial_are_its_passes_times_those_of_one() -> None:
    one_pass = cost(one_epoch()).flops / 4  # forward, twice as much backward, and one more forward

    def passes(**fields: Any) -> float:
        return cost(TrialSpec(**fields)).flops / one_pass

    strings = {"length": 256}
    assert passes(strings=strings, training={"epochs": 10}, probes=UNSEEN) == pytest.approx(10 * 3 + 1)
    held_out = ProbesSpec(epochs=(0, 5, 99), num_held_out=4)  # at epochs 0, 5 and the last
    assert passes(strings=strings, training={"epochs": 10}, probes=held_out) == pytest.approx(10 * 3 + 1 + 3 * 4)
    many = {"length": 256, "num_strings": 6}
    assert passes(strings=many, training={"epochs": 10}, probes=UNSEEN) == pytest.approx(10 * 6 * 3 + 11 * 6)
    one_step = {"epochs": 10, "strings_per_step": 0}
    assert passes(strings=many, training=one_step, probes=UNSEEN) == pytest.approx(10 * 6 * 3 + 6)
    checkpointed = {"epochs": 10, "gradient_checkpointing": True}
    assert passes(strings=strings, training=checkpointed, probes=UNSEEN) == pytest.approx(10 * 4 + 1)
    dropped_out = passes(strings=strings, training={"epochs": 10}, probes=UNSEEN, model={"dropout": 0.1})
    assert dropped_out == pytest.approx(10 * 3 + 11)  # a training pass with dropout measures nothing


def test_a_bos_is_a_token_too() -> None:
    with_bos = one_epoch(255, model=ModelSpec(bos=True))
    assert cost(with_bos).flops == cost(one_epoch(256)).flops


@pytest.mark.parametrize(
    ("name", "size", "num_parameters"),
    [
        ("pythia", "1b", 1_011_781_632),
        ("llama2", "7b", 6_738_415_616),
        ("llama3", "8b", 8_030_261_248),
        ("mistral", "7b", 7_241_732_096),
        ("gpt2", "1.5b", 1_557_611_200),
    ],
)
def test_a_public_model_takes_about_six_operations_a_parameter_and_token(
    name: str, size: str, num_parameters: int
) -> None:
    spec = one_epoch(128, model=tiny(name, size=size))
    embedding = family(name).sizes[size].vocab_size * family(name).sizes[size].hidden_size
    looked_up = 0 if family(name).ties_embeddings else embedding
    # And two more for the pass that scores; 128 tokens attend to little.
    assert cost(spec).flops == pytest.approx(8 * 128 * (num_parameters - looked_up), rel=0.02)


# Directories.


def saved(directory: Path, name: str, **config: Any) -> str:
    """A random model with its tokenizer, as save_pretrained writes them."""
    known = family(name)
    made = getattr(transformers, known.config_class)(**(known.config_arguments(known.sizes["tiny"]) | config))
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return str(directory)


@each_family
def test_a_directory_has_the_shape_of_the_model_in_it(name: str, tmp_path: Path) -> None:
    tabled = shape(tiny(name))
    found = shape(tiny(name, path=saved(tmp_path, name)))
    assert (found.num_layers, found.hidden_size, found.vocab_size) == (4, 128, 187)
    assert found.matrix_parameters == tabled.matrix_parameters
    assert found.num_parameters == tabled.num_parameters


@each_family
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_parameters_in_a_directory_are_those_of_the_loaded_model(name: str, is_tied: bool, tmp_path: Path) -> None:
    odd = {"num_layers": 3, "hidden_size": 96, "intermediate_size": 200, "max_positions": 64}
    config = {key: value for field, value in odd.items() for key in family(name).config_keys[field]}
    path = saved(tmp_path, name, tie_word_embeddings=is_tied, **config)
    model = load_model(tiny(name, path=path, pretrained=True), seed=0)
    assert shape(tiny(name, path=path)).num_parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("opt", {"word_embed_proj_dim": 64, "do_layer_norm_before": False}),
        ("mistral", {"head_dim": 48}),
        ("llama3", {"num_key_value_heads": 1}),
    ],
)
def test_parameters_are_counted_whatever_else_the_config_says(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(tmp_path, name, **config)
    model = load_model(tiny(name, path=path), seed=0)
    assert shape(tiny(name, path=path)).num_parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral"])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_matrices_are_those_of_the_model_however_many_heads_share_keys(
    name: str, num_key_value_heads: int, tmp_path: Path
) -> None:
    path = saved(tmp_path, name, num_key_value_heads=num_key_value_heads)
    model = load_model(tiny(name, path=path), seed=0)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    matrices = [each for each in model.parameters() if each.ndim == 2 and each is not table]
    assert shape(tiny(name, path=path)).matrix_parameters == sum(each.numel() for each in matrices)


@each_family
def test_matrices_of_a_size_are_those_of_the_model(name: str) -> None:
    model = load_model(tiny(name), seed=0)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    # Tables are only looked up, but one that is the head multiplies too.
    tables = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)} - {id(head)}
    matrices = [each for each in model.parameters() if each.ndim == 2 and id(each) not in tables]
    assert shape(tiny(name)).matrix_parameters == sum(each.numel() for each in matrices)


def test_the_width_of_a_model_is_that_of_its_blocks_not_of_its_embeddings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({
        "num_hidden_layers": 24, "hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16,
        "ffn_dim": 4096, "vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": False,
    }))  # fmt: skip
    found = shape(ModelSpec(family="opt", path=str(tmp_path)))
    assert found.hidden_size == 1024
    assert found.num_parameters == family("opt").sizes["350m"].num_parameters


@pytest.mark.parametrize("written", [None, "{", "[1]", '"words"'])
def test_a_directory_without_a_readable_config_is_refused(written: str | None, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "config.json").write_text(written)
    with pytest.raises(ValueError, match=r"must be a directory written by save_pretrained, but .* name a family and"):
        shape(ModelSpec(path=str(tmp_path)))


def test_a_directory_of_another_family_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "gpt2")
    with pytest.raises(ValueError, match=r"must be the family of the model in .* lacks num_layers, .* saved from"):
        shape(ModelSpec(family="pythia", path=path))


# Memory.

TRAINS = """
import sys
from memray.spec import TrialSpec
from memray.trial import run_trial
for spec in sys.argv[1:]:
    for measurement in run_trial(TrialSpec.model_validate_json(spec)):
        pass
    # Not resource.getrusage: it starts from what the process that started this one held.
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def measured_gib(specs: list[TrialSpec]) -> list[float]:
    """The peak of one process after each of the trials, the smallest first: a peak never falls."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, *(spec.model_dump_json() for spec in specs)],
        capture_output=True, text=True, timeout=240, check=True, env=environment,
    )  # fmt: skip
    return [int(line) / 2**20 for line in done.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read where Linux keeps it")
def test_the_expected_peak_is_near_the_measured_one(tmp_path: Path) -> None:
    wider = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192}
    specs = [
        # Two epochs: the moments of the optimiser exist from the first step on, so that the second has the peak.
        TrialSpec(
            model=ModelSpec(path=path),
            strings=StringsSpec(length=128),
            training=TrainingSpec(epochs=2),
            probes=ProbesSpec(num_held_out=2),
        )
        for path in (None, saved(tmp_path, "pythia", **wider))  # 0.8 and 34 million parameters
    ]
    for spec, measured in zip(specs, measured_gib(specs), strict=True):
        # Too low ends a trial in the middle; too high leaves a device idle.
        assert 0.85 * measured <= cost(spec).peak_gib <= 2 * measured


SHARES = """
import os, sys
rank, world, port = map(int, sys.argv[1:4])
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
import torch
from memray.cluster.engine import DeepSpeedEngine
from memray.spec import TrialSpec
from memray.trial import ModelShelf, run_trial
torch.distributed.init_process_group("gloo")
for spec in sys.argv[4:]:
    shelf = ModelShelf(keeps_model=False)
    for measurement in run_trial(TrialSpec.model_validate_json(spec), shelf=shelf, make_engine=DeepSpeedEngine):
        pass
    print("peak:", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.distributed.destroy_process_group()
"""


def measured_sharded_gib(specs: list[TrialSpec]) -> list[float]:
    """The largest peak of the processes of each trial, the smallest trial first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers, port = specs[0].compute.workers, free_port()
    given = [spec.model_dump_json() for spec in specs]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES, *map(str, (rank, workers, port)), *given],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(workers)
    ]  # fmt: skip
    told = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * workers, told[0][-2000:]
    peaks = [[int(line.split()[1]) / 2**20 for line in text.splitlines() if line.startswith("peak:")] for text in told]
    return [max(each) for each in zip(*peaks, strict=True)]


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read where Linux keeps it")
def test_the_expected_peak_of_a_worker_is_near_the_measured_one(tmp_path: Path) -> None:
    wider = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192}
    path = saved(tmp_path, "pythia", **wider)  # 34 million parameters
    specs = [
        TrialSpec(
            model=ModelSpec(path=path),
            strings=StringsSpec(length=32, num_strings=2),
            training=TrainingSpec(epochs=2, strings_per_step=0),
            probes=ProbesSpec(num_held_out=2),
            compute=ComputeSpec(engine="deepspeed", workers=2, zero_stage=stage),  # type: ignore[arg-type]
        )
        for stage in (2, 3)
    ]
    for spec, measured in zip(specs, measured_sharded_gib(specs), strict=True):
        assert 0.8 * measured <= cost(spec).peak_gib <= 1.6 * measured


def sharded(stage: int, *, workers: int = 4, **fields: Any) -> TrialSpec:
    """A model of 6.9 thousand million parameters on one short string, of which each worker computes all."""
    compute = {"accelerator": "h200", "engine": "deepspeed", "workers": workers, "zero_stage": stage}
    compute |= fields.pop("compute", {})
    given = {"model": {"size": "6.9b"}, "strings": {"length": 2}, "probes": UNSEEN, "compute": compute}
    return TrialSpec(**(given | fields))


def gib_beside_process(spec: TrialSpec) -> float:
    return cost(spec).peak_gib - costs.PROCESS_GIB


def test_each_stage_shares_out_what_it_should() -> None:
    parameters, bucket, live = shape(ModelSpec(size="6.9b")).num_parameters, costs.BUCKET, costs.LIVE
    # bf16: weights and gradients take 2 bytes each; fp32 masters, their gradients and two moments 16.
    expected = {
        0: 20 * parameters + 2 * costs.MESSAGE,
        1: 4 * parameters + 16 * parameters / 4 + 2 * bucket,
        2: 2 * parameters + 18 * parameters / 4 + 2 * bucket,
        3: 20 * parameters / 4 + 2 * live + 8 * bucket,
    }
    for stage, num_bytes in expected.items():
        assert gib_beside_process(sharded(stage)) == pytest.approx(num_bytes / 2**30, rel=5e-3)
    offloaded = gib_beside_process(sharded(2, compute={"offload": "optimiser"}))
    assert offloaded == pytest.approx((2 * parameters + 2 * parameters / 4 + 2 * bucket) / 2**30, rel=5e-3)
    adapters = gib_beside_process(sharded(3, model={"size": "6.9b", "lora": {}}))
    # The model is whole on each device before it is sharded.
    assert adapters == pytest.approx(2 * parameters / 2**30)


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from(["2.8b", "6.9b", "12b"]),
    workers=st.sampled_from([2, 4, 8, 16]),
    precision=st.sampled_from(["fp32", "bf16"]),
    length=st.sampled_from([2, 512]),
    lora=st.sampled_from([None, LoraSpec()]),
)
def test_a_peak_rises_neither_with_the_workers_nor_with_the_stage(
    size: str, workers: int, precision: str, length: int, lora: LoraSpec | None
) -> None:
    """Of a model that is larger than what stage 3 keeps gathered anyway."""

    def peak_of(stage: int, workers: int) -> float:
        model, compute = ModelSpec(size=size, lora=lora), {"precision": precision}
        return cost(sharded(stage, workers=workers, model=model, strings={"length": length}, compute=compute)).peak_gib

    assert [peak_of(stage, workers) for stage in range(4)] == sorted(
        (peak_of(stage, workers) for stage in range(4)), reverse=True
    )
    for stage in range(4):
        assert peak_of(stage, 2 * workers) <= peak_of(stage, workers)


def peak(**fields: Any) -> float:
    spec = {"model": {"size": "1b"}, "compute": {"accelerator": "h200"}, "probes": UNSEEN}
    return cost(TrialSpec(**(spec | fields))).peak_gib


def test_full_training_takes_16_bytes_a_parameter_at_fp32_and_20_with_fp32_masters() -> None:
    gib = shape(ModelSpec(size="1b")).num_parameters / 2**30
    short = {"length": 2}
    beside = costs.PROCESS_GIB + 0.01
    at_fp32 = peak(strings=short, compute={"accelerator": "h200", "precision": "fp32"})
    assert 16 * gib < at_fp32 < 16 * gib + beside
    assert 20 * gib < peak(strings=short) < 20 * gib + beside
    # Without momentum plain gradient descent keeps weights and gradients alone.
    plain = peak(strings=short, compute={"accelerator": "h200", "precision": "fp32"}, training={"optimiser": "sgd"})
    assert 8 * gib < plain < 8 * gib + beside
    # On the CPU, the weights that the next trial is reset to are beside them.
    assert 20 * gib < peak(strings=short, compute={}) < 20 * gib + beside


def test_bf16_halves_what_a_token_keeps_for_the_backward_pass() -> None:
    def token(precision: str) -> float:
        compute = {"accelerator": "h200", "precision": precision}
        return peak(strings={"length": 2048}, compute=compute) - peak(strings={"length": 1024}, compute=compute)

    assert token("bf16") == pytest.approx(token("fp32") / 2, rel=1e-6)


def test_checkpointing_adapters_and_smaller_forward_passes_lower_the_peak() -> None:
    many = {"length": 1024, "num_strings": 16}
    whole = peak(strings=many, training={"strings_per_step": 0})
    assert peak(strings=many, training={"strings_per_step": 0, "gradient_checkpointing": True}) < 0.5 * whole
    assert peak(strings=many, training={"strings_per_step": 0, "strings_per_forward": 1}) < 0.5 * whole
    assert peak(strings=many) == peak(strings=many, training={"strings_per_step": 0, "strings_per_forward": 1})
    assert peak(model={"size": "1b", "lora": {}}) < 0.5 * peak()


def test_adapters_at_bf16_still_load_their_frozen_weights_at_fp32() -> None:
    gib = shape(ModelSpec(size="1b")).num_parameters / 2**30
    assert peak(model={"size": "1b", "lora": {}}, strings={"length": 2}) == pytest.approx(4 * gib + costs.PROCESS_GIB)


def test_held_out_strings_are_scored_in_bounded_passes() -> None:
    few, many, more = (
        peak(strings={"length": 16}, probes=ProbesSpec(num_held_out=number)) for number in (0, 200, 10_000)
    )
    assert few < many == more


def test_what_is_copied_from_modules_that_import_torch_is_what_they_say() -> None:
    assert costs.TOKENS_PER_SCORING_PASS == finetune.TOKENS_PER_SCORING_PASS
    assert costs.LOGITS_PER_CHUNK == scoring.LOGITS_PER_CHUNK


# Time, and what fits.


def test_time_grows_with_the_work_and_falls_with_the_device() -> None:
    def seconds(**fields: Any) -> float:
        return cost(one_epoch(1024, model=tiny("pythia", size="1b"), **fields)).seconds

    assert seconds(compute=ComputeSpec(threads=4)) < seconds() / 3
    assert seconds(compute=ComputeSpec(accelerator="h100-80gb")) < seconds(compute=ComputeSpec(accelerator="t4"))
    assert cost(one_epoch()).device_hours == cost(one_epoch()).seconds / 3600


def many_workers(workers: int, stage: int = 0, *, num_strings: int = 8, **fields: Any) -> TrialSpec:
    return TrialSpec(
        strings=StringsSpec(length=256, num_strings=num_strings),
        training=TrainingSpec(epochs=10, strings_per_step=0),
        compute=ComputeSpec(engine="deepspeed", workers=workers, zero_stage=stage),  # type: ignore[arg-type]
        probes=UNSEEN,
        **fields,
    )


def test_workers_share_the_operations_of_a_step_or_repeat_them() -> None:
    alone = TrialSpec(
        strings=StringsSpec(length=256, num_strings=8),
        training=TrainingSpec(epochs=10, strings_per_step=0),
        probes=UNSEEN,
    )
    for workers in (1, 2, 8):
        assert cost(many_workers(workers)).flops == cost(alone).flops
    # Ten steps of a forward and a backward pass over one string, which both do, and one pass that scores it.
    one_pass = cost(many_workers(1, num_strings=1)).flops / 31
    assert cost(many_workers(2, num_strings=1)).flops == pytest.approx((2 * 30 + 1) * one_pass)


def test_what_workers_tell_each_other_takes_its_time() -> None:
    told = shape(ModelSpec()).num_parameters * 4 * 10 / costs.LINK_BYTES_PER_S["cpu"]
    # Gradients reduced and weights gathered, of which a worker has half already.
    assert seconds_told(many_workers(2)) == pytest.approx(2 * told / 2)
    assert seconds_told(many_workers(8)) == pytest.approx(2 * told * 7 / 8)
    assert seconds_told(many_workers(1)) == 0
    assert seconds_told(many_workers(2, 3)) == seconds_told(many_workers(2, 2))  # so small a model is gathered once
    lora = ModelSpec(lora=LoraSpec())
    assert seconds_told(many_workers(2, 2, model=lora)) == 0
    assert seconds_told(many_workers(2, 3, model=lora)) == pytest.approx(told / 2)
    large = shape(ModelSpec(size="6.9b")).num_parameters * 2 * 300 / costs.LINK_BYTES_PER_S["cuda"]
    assert seconds_told(sharded(3, workers=2)) == pytest.approx(3 * large / 2)


def seconds_told(spec: TrialSpec) -> float:
    """Seconds of a trial beyond those of its operations and its launches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "LINK_BYTES_PER_S", {"cpu": float("inf"), "cuda": float("inf")})
        silent = cost(spec).seconds
    return cost(spec).seconds - silent


def test_two_workers_take_half_the_time_of_one_but_for_what_they_tell_each_other() -> None:
    one, two = many_workers(1, model=tiny("pythia", size="1b")), many_workers(2, model=tiny("pythia", size="1b"))
    assert cost(two).seconds - seconds_told(two) == pytest.approx(cost(one).seconds / 2, rel=0.05)
    assert cost(two).device_hours == pytest.approx(2 * cost(two).seconds / 3600)


@each_family
def test_every_tiny_trial_fits_the_smallest_accelerator(name: str) -> None:
    check_fits(TrialSpec(model=tiny(name), compute=ComputeSpec(accelerator="t4")))


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_what_cannot_fit_is_refused_with_what_it_needs_what_there_is_and_what_to_change(share: float) -> None:
    compute = ComputeSpec(accelerator="t4", device_share=share)
    spec = TrialSpec(model=ModelSpec(size="1.4b"), compute=compute)
    with pytest.raises(ValueError, match="a trial must fit its device") as caught:
        check_fits(spec)
    said = str(caught.value)
    assert f"pythia 1.4b needs about {cost(spec).peak_gib:.1f} GiB" in said
    assert f"t4 offers {ACCELERATORS['t4'].memory_gib * share:.1f} GiB" in said
    for remedy in ("compute.accelerator", "training.strings_per_forward", "training.gradient_checkpointing"):
        assert remedy in said


def test_a_share_of_a_device_is_a_share_of_its_memory() -> None:
    model = ModelSpec(size="410m")
    check_fits(TrialSpec(model=model, compute=ComputeSpec(accelerator="h100-80gb", device_share=0.25)))
    with pytest.raises(ValueError, match=r"h100-80gb offers 7\.9 GiB"):
        check_fits(TrialSpec(model=model, compute=ComputeSpec(accelerator="h100-80gb", device_share=0.1)))


def test_the_cpu_is_this_machine() -> None:
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert ACCELERATORS["cpu"].memory_gib == pytest.approx(num_bytes / 2**30)
    with pytest.raises(ValueError, match="cpu offers"):
        check_fits(TrialSpec(model=ModelSpec(family="opt", size="13b")))


def test_every_accelerator_is_known_by_its_name_and_an_unknown_one_is_answered_with_the_list() -> None:
    for name, row in ACCELERATORS.items():
        assert accelerators.accelerator(name) is row
        assert row.name == name
        assert row.bf16_flops > 0 < row.fp32_flops
    with pytest.raises(ValueError, match=r"unknown accelerator 'h100'; did you mean 'h200'\? accelerators: cpu, t4, "):
        accelerators.accelerator("h100")


def test_looks_at_a_corpus_are_counted_sample_by_sample() -> None:
    fields = {
        "corpus": {"rows": {"generator": "facts"}, "num_samples": 16, "max_tokens": 32},
        "model": {"size": "tiny-text"},
        "training": {"epochs": 4},
    }

    def looked_at(**probes: object) -> float:
        """Forward passes over a sample that looks take."""
        spec = TrialSpec.model_validate(fields | {"probes": {"epochs": (0, 2), "num_held_out": 4, **probes}})
        model = shape(spec.model)
        one_pass = 2.0 * model.matrix_parameters * 32 + 2 * model.num_layers * model.hidden_size * 32**2
        return cost(spec).probe_flops / one_pass

    assert looked_at() == pytest.approx(3 * 20)  # at 0, 2 and the last epoch
    assert looked_at(embeddings={}) == pytest.approx(2 * 3 * 20)
    assert looked_at(facts={"num_facts": 2, "epochs": (2,)}) == pytest.approx(3 * 20 + 2 * (2 * 2 * 4 * 32))
    assert looked_at(generation={"num_samples": 5, "checked_share": 0.25}) == pytest.approx(3 * 20 + 5 + 4)
