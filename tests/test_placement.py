"""Where a trial runs when its spec leaves that open: the smallest placement that holds it, and nothing else changed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memray.cli import app
from memray.cost import available_gib, check_fits, cost
from memray.placement import WORKERS, num_probe_actors, place
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, load, vary

# 111 GiB of weights, gradients and optimiser's state at bf16 with fp32 masters; a device has 39.5 GiB.
LARGE, SMALL = ModelSpec(size="6.9b"), ModelSpec(size="160m")
CHOSEN = ("engine", "workers", "zero_stage", "offload")


def trial(model: ModelSpec = LARGE, **compute: Any) -> TrialSpec:
    """Eight strings in one step, so that any of the usual numbers of workers can share them out."""
    return TrialSpec(
        model=model,
        strings=StringsSpec(length=256, num_strings=8),
        training=TrainingSpec(strings_per_step=0),
        compute=ComputeSpec.model_validate({"accelerator": "a100-40gb"} | compute),
    )


def needs(spec: TrialSpec, **compute: Any) -> float:
    """GiB that each device of another placement of the trial would need."""
    fields = spec.model_dump(exclude_unset=True)
    fields["compute"] |= compute
    return cost(TrialSpec.model_validate(fields)).peak_gib


# What is chosen.


def test_a_trial_that_fits_one_device_stays_as_it_is() -> None:
    spec = trial(SMALL)
    assert place(spec) == (spec, "")
    assert place(spec)[0] is spec


def test_a_trial_that_does_not_fit_is_sharded_over_the_fewest_devices_at_the_lowest_stage() -> None:
    spec = trial()
    placed, why = place(spec)
    check_fits(placed)
    compute = placed.compute
    assert (compute.engine, compute.offload) == ("deepspeed", "none")
    assert compute.workers > 1
    assert why.startswith(f"{compute.workers} x a100-40gb under DeepSpeed, ZeRO stage {compute.zero_stage}, ")
    assert f"{cost(placed).peak_gib:.1f} GiB each" in why
    assert f"(one device) it would need {cost(spec).peak_gib:.1f} GiB, and a100-40gb offers 39.5 GiB" in why


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from(["1b", "2.8b", "6.9b", "12b"]),
    accelerator=st.sampled_from(["t4", "l4", "a100-40gb", "h200"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    length=st.sampled_from([64, 1024]),
    lora=st.sampled_from([None, LoraSpec()]),
)
def test_every_smaller_placement_would_not_fit(
    size: str, accelerator: str, precision: str, length: int, lora: LoraSpec | None
) -> None:
    spec = TrialSpec(
        model=ModelSpec(size=size, lora=lora),
        strings=StringsSpec(length=length, num_strings=8),
        training=TrainingSpec(strings_per_step=0),
        compute=ComputeSpec(accelerator=accelerator, precision=precision),  # type: ignore[arg-type]
    )
    placed, why = place(spec)
    compute = placed.compute
    assert bool(why) == (compute.engine == "deepspeed")
    available = available_gib(spec)
    if not why and cost(spec).peak_gib <= available:
        return
    order = [(offload, workers, stage) for offload in ("none", "optimiser", "parameters") for workers in WORKERS
             for stage in range(4) if stage >= {"none": 0, "optimiser": 1, "parameters": 3}[offload]]  # fmt: skip
    chosen = order.index((compute.offload, compute.workers, compute.zero_stage)) if why else len(order)
    for offload, workers, stage in order[:chosen]:
        assert needs(spec, engine="deepspeed", workers=workers, zero_stage=stage, offload=offload) > available


def test_nothing_but_the_placement_is_changed() -> None:
    spec = TrialSpec(model=ModelSpec(size="12b"), compute=ComputeSpec(accelerator="h200", threads=3, checkpoint_s=9))
    placed, why = place(spec)
    assert why
    fields = {name: getattr(placed.compute, name) for name in CHOSEN}
    assert placed == spec.model_copy(update={"compute": spec.compute.model_copy(update=fields)})


def test_adapters_need_less() -> None:
    assert place(trial())[1]
    assert place(trial(LARGE.model_copy(update={"lora": LoraSpec()})))[1] == ""


@pytest.mark.parametrize("num_strings", [1, 3, 6])
def test_only_placements_that_the_strings_allow_are_chosen(num_strings: int) -> None:
    spec = TrialSpec(
        model=LARGE,
        strings=StringsSpec(length=64, num_strings=num_strings),
        training=TrainingSpec(strings_per_step=0),
        compute=ComputeSpec(accelerator="a100-40gb"),
    )
    placed, why = place(spec)
    assert why
    assert num_strings <= placed.compute.workers or num_strings % placed.compute.workers == 0


def test_offloading_comes_last() -> None:
    placed, why = place(trial(engine="deepspeed", workers=1))
    assert placed.compute.workers == 1
    assert placed.compute.offload != "none"
    assert f"offload {placed.compute.offload}" in why
    check_fits(placed)


# What is not.


@pytest.mark.parametrize(
    "named",
    [
        {"engine": "torch"},
        {"device_share": 0.5},
        {"engine": "deepspeed", "workers": 1, "zero_stage": 0, "offload": "none"},
    ],
)
def test_a_trial_that_names_its_placement_is_refused_where_it_does_not_fit(named: dict[str, Any]) -> None:
    spec = trial(**named)
    assert place(spec) == (spec, "")
    with pytest.raises(ValueError, match=r"a trial must fit its device, but pythia 6\.9b needs about"):
        check_fits(spec)


@settings(deadline=None, max_examples=60)
@given(
    named=st.fixed_dictionaries(
        {},
        optional={
            "workers": st.sampled_from([1, 2, 4, 8]),
            "zero_stage": st.integers(0, 3),
            "offload": st.sampled_from(["none", "optimiser", "parameters"]),
            "threads": st.integers(1, 4),
            "precision": st.sampled_from(["fp32", "bf16"]),
        },
    ),
    size=st.sampled_from(["160m", "1.4b", "6.9b"]),
)
def test_what_is_named_is_never_changed(named: dict[str, Any], size: str) -> None:
    needed = {"none": 0, "optimiser": 1, "parameters": 3}[named.get("offload", "none")]
    if needed > named.get("zero_stage", 0):
        return
    spec = trial(ModelSpec(size=size), engine="deepspeed", **named)
    placed, why = place(spec)
    assert {name: getattr(placed.compute, name) for name in named} == named
    assert placed.compute.engine == "deepspeed"
    assert (placed == spec) == (why == "")


def test_a_trial_on_the_cpu_is_never_placed_anew() -> None:
    for spec in (
        trial(ModelSpec(family="opt", size="13b"), accelerator="cpu"),
        trial(ModelSpec(family="opt", size="13b"), accelerator="cpu", engine="deepspeed"),
    ):
        assert place(spec) == (spec, "")


def test_a_trial_that_fits_nowhere_is_refused_with_what_to_change() -> None:
    spec = TrialSpec(
        model=ModelSpec(family="opt", size="13b"),
        strings=StringsSpec(length=2047),
        compute=ComputeSpec(accelerator="t4"),
    )
    assert place(spec) == (spec, "")
    with pytest.raises(ValueError, match=r"opt 13b needs about .* t4 offers 14\.6 GiB; take a larger compute\.accel"):
        check_fits(spec)


def test_a_model_that_cannot_be_read_is_left_to_whoever_says_so() -> None:
    spec = trial(ModelSpec(path="nowhere"))
    assert place(spec) == (spec, "")


# Identity.


def test_placing_what_is_placed_changes_nothing() -> None:
    for spec in (trial(), trial(SMALL), trial(engine="deepspeed", workers=1), trial(engine="torch")):
        placed, _ = place(spec)
        assert place(placed) == (placed, "")
        again = TrialSpec.model_validate_json(placed.model_dump_json())
        assert place(again) == (again, "")
        assert again.trial_id() == placed.trial_id()
    sweep = Sweep([trial(), trial(SMALL)])
    assert Sweep(sweep.trials).trials == sweep.trials


def test_a_trial_written_open_and_the_same_trial_written_out_are_one() -> None:
    placed, _ = place(trial())
    written = trial(**{name: getattr(placed.compute, name) for name in CHOSEN})
    assert place(written)[0].trial_id() == placed.trial_id()
    assert len(Sweep([trial(), written]).trials) == 1


def test_varying_a_placed_trial_keeps_where_it_runs() -> None:
    placed, _ = place(trial())
    moved = vary(placed, {"string_seed": 3})
    assert isinstance(moved, TrialSpec)
    assert moved.compute == placed.compute


STUDY = '''"""Does a large model need many devices?"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=64, num_strings=4),
    training=TrainingSpec(strings_per_step=0),
    compute=ComputeSpec(accelerator="a100-40gb"),
)


def sweep(*, seeds: int = 2) -> Sweep:
    return Sweep(
        vary(BASE, {"model.size": size} | seed) for size in ("tiny", "6.9b") for seed in replicates(BASE, seeds)
    )
'''


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "large.py"
    path.write_text(STUDY)
    return str(path)


def test_a_study_has_the_same_ids_each_time_it_is_loaded_and_in_its_plan(study: str, tmp_path: Path) -> None:
    ids = [each.trial_id() for each in load(study).trials]
    assert [each.trial_id() for each in load(study).trials] == ids
    done = CliRunner().invoke(app, ["plan", study, "--json", "--storage", str(tmp_path / "runs")])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["trial_id"] for row in rows] == ids
    assert [row["engine"] for row in rows] == ["torch", "torch", "deepspeed", "deepspeed"]
    large = load(study).trials[2]
    assert [row["devices"] for row in rows] == [1, 1, large.compute.workers, large.compute.workers]
    assert [row["zero_stage"] for row in rows] == [None, None, large.compute.zero_stage, large.compute.zero_stage]
    assert [row["placed"] is not None for row in rows] == [False, False, True, True]


def test_a_plan_shows_where_each_trial_runs_and_says_why(study: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", study, "--storage", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    sweep = load(study)
    ids, compute = [each.trial_id() for each in sweep.trials], sweep.trials[2].compute
    assert f"deepspeed, ZeRO {compute.zero_stage}" in done.stdout
    assert f"{compute.workers} x a100-40gb" in done.stdout
    # One line for all replicates.
    assert f"{ids[2]}, {ids[3]}: {sweep.placements[ids[2]]}" in done.stdout
    assert set(sweep.placements) == set(ids[2:])


def test_probes_have_actors_from_three_devices_on() -> None:
    trials = [TrialSpec(string_seed=seed) for seed in range(100)]
    assert [num_probe_actors(devices, trials) for devices in (1, 2, 3, 8, 15, 16, 64)] == [0, 0, 1, 1, 1, 2, 8]


def test_devices_that_few_trials_leave_idle_look_at_them() -> None:
    one, wide = TrialSpec(), TrialSpec(compute=ComputeSpec(engine="deepspeed", workers=2))
    assert [num_probe_actors(devices, [one]) for devices in (1, 2, 3, 8, 16)] == [0, 1, 1, 1, 2]
    assert [num_probe_actors(devices, [wide, one]) for devices in (2, 3, 4, 5)] == [0, 1, 1, 2]
