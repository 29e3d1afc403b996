"""The training loop against plain loops over Hugging Face models, and what an engine owes its callers."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from memray.encoding import Batch, Encoder, encode
from memray.families import FAMILIES
from memray.finetune import TorchEngine, as_numpy, as_tensor, finetune, learning_rate, scoring_passes
from memray.models import load_model
from memray.scoring import AlphabetIds, TokenScores, score
from memray.spec import LoraSpec, ModelSpec, TrainingSpec

UNIFORM = AlphabetIds(torch.arange(4, 11), torch.full((7,), 1 / 7))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    encoder = Encoder(symbol_ids=np.arange(4, 11), bos_id=None, pad_id=2)
    return encode([rng.integers(0, 7, length) for length in lengths], encoder)


def recipe(**fields: object) -> TrainingSpec:
    return TrainingSpec(**{"epochs": 10, "learning_rate": 1e-3} | fields)  # type: ignore[arg-type]


def engine_of(training: TrainingSpec, model: ModelSpec | None = None, **options: str) -> TorchEngine:
    return TorchEngine(load_model(model or ModelSpec(), seed=1), UNIFORM, training, CPU, **options)  # type: ignore[arg-type]


def curve(engine: TorchEngine, batch: Batch, training: TrainingSpec, **options: object) -> list[float]:
    options = {"order_seed": 0} | options
    return [-float(scores.log_prob.mean()) for _, scores in finetune(engine, batch, training, **options)]  # type: ignore[arg-type]


def plain_loop(model: nn.Module, batch: Batch, training: TrainingSpec) -> list[float]:
    """What one would write by hand: Hugging Face's loss, its schedule, torch's own optimiser, all in fp32."""
    model.train()
    assert training.epochs is not None
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, training.warmup_steps, training.epochs)
    losses = []
    labels = torch.where(batch.attention_mask == 1, batch.ids, -100)
    for _ in range(training.epochs):
        loss = model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels).loss  # type: ignore[operator]
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        losses.append(model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels).loss.item())  # type: ignore[operator]
    return losses


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_training_follows_a_plain_loop_over_hugging_face(family: str) -> None:
    training, batch, spec = recipe(), batch_of([64]), ModelSpec(family=family)
    theirs = plain_loop(load_model(spec, seed=1), batch, training)
    assert curve(engine_of(training, spec), batch, training) == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] < 0.8 * theirs[0]


def test_unequal_strings_weigh_by_their_targets_like_one_large_batch() -> None:
    training, batch = recipe(strings_per_step=0), batch_of([20, 50, 33])
    theirs = plain_loop(load_model(ModelSpec(), seed=1), batch, training)
    assert curve(engine_of(training), batch, training) == pytest.approx(theirs, rel=1e-4)


def test_accumulation_gives_the_step_of_the_whole_batch() -> None:
    batch = batch_of([20, 50, 33, 9])
    whole = curve(engine_of(recipe(strings_per_step=0)), batch, recipe(strings_per_step=0))
    accumulated = recipe(strings_per_step=0, strings_per_forward=2)
    assert curve(engine_of(accumulated), batch, accumulated) == pytest.approx(whole, rel=1e-4)


def test_checkpointing_gradients_changes_no_number() -> None:
    batch = batch_of([64])
    with_checkpoints = recipe(gradient_checkpointing=True)
    assert curve(engine_of(with_checkpoints), batch, with_checkpoints) == pytest.approx(
        curve(engine_of(recipe()), batch, recipe()), rel=1e-6
    )


def test_the_training_forward_measures_what_a_separate_pass_measures() -> None:
    engine, batch = engine_of(recipe()), batch_of([64])
    for _ in range(5):
        separate = engine.score(batch)
        from_training = engine.step(batch, 1e-3)
        for name in TokenScores.COLUMNS:
            assert getattr(from_training, name) == pytest.approx(getattr(separate, name), abs=1e-5), name
        assert from_training.mean_q == pytest.approx(separate.mean_q, abs=1e-6)


def test_an_epoch_of_one_step_costs_one_extra_pass_at_the_end_alone() -> None:
    engine, batch = engine_of(recipe()), batch_of([64])
    passes: list[int] = []
    score_of_engine = engine.score
    engine.score = lambda each: passes.append(1) or score_of_engine(each)  # type: ignore[method-assign, assignment]
    assert len(curve(engine, batch, recipe())) == 11
    assert len(passes) == 1


def test_both_ways_of_measuring_an_epoch_give_one_curve() -> None:
    batch = batch_of([64])
    from_training = curve(engine_of(recipe()), batch, recipe())
    from_passes = curve(engine_of(recipe()), batch, recipe(), dropout=True)
    assert from_training == pytest.approx(from_passes, rel=1e-5)


def test_several_steps_an_epoch_visit_every_string_once_in_a_seeded_order() -> None:
    training, batch = recipe(epochs=3), batch_of([16, 16, 16, 16])
    visited: dict[int, list[int]] = {}
    for seed in (0, 0, 1):
        engine = engine_of(training)
        order: list[int] = []
        step = engine.step
        rows = {tuple(batch.ids[k].tolist()): k for k in range(4)}
        engine.step = lambda each, rate, stop=None: order.append(rows[tuple(each.ids[0].tolist())]) or step(each, rate)  # type: ignore[method-assign, assignment]  # noqa: B023
        curve(engine, batch, training, order_seed=seed)
        assert [sorted(order[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
        assert visited.setdefault(seed, order) == order
    assert visited[0] != visited[1]


@pytest.mark.parametrize("stop_at", [0, 4, 10])
@pytest.mark.parametrize("strings_per_step", [0, 1])
def test_a_stop_leaves_the_weights_of_the_epoch_that_was_yielded_last(stop_at: int, strings_per_step: int) -> None:
    training, batch = recipe(strings_per_step=strings_per_step), batch_of([32, 32])
    engine = engine_of(training)
    seen = 0

    def stop(scores: TokenScores) -> bool:
        nonlocal seen
        seen += 1
        return seen == stop_at + 1

    epochs = list(finetune(engine, batch, training, order_seed=0, stop=stop))
    assert [epoch for epoch, _ in epochs] == list(range(stop_at + 1))
    assert engine.score(batch).log_prob == pytest.approx(epochs[-1][1].log_prob, abs=1e-5)
    unstopped = curve(engine_of(training), batch, training)
    assert -epochs[-1][1].log_prob.mean() == pytest.approx(unstopped[stop_at], rel=1e-6)


def test_probes_see_the_weights_of_their_epoch() -> None:
    training, batch = recipe(), batch_of([32])
    engine = engine_of(training)
    seen: dict[int, float] = {}
    losses = curve(
        engine, batch, training, before_epoch=lambda epoch: seen.update({epoch: -engine.score(batch).log_prob.mean()})
    )
    assert list(seen) == list(range(11))
    assert list(seen.values()) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("linear", transformers.get_linear_schedule_with_warmup),
        ("cosine", transformers.get_cosine_schedule_with_warmup),
        (
            "constant",
            lambda optimiser, warmup, total: transformers.get_constant_schedule_with_warmup(optimiser, warmup),
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_those_of_transformers(schedule: str, theirs, warmup: int) -> None:
    training = recipe(schedule=schedule, warmup_steps=warmup, learning_rate=0.5)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = theirs(optimiser, warmup, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    # transformers starts its warm-up with a step at rate 0, which would be a wasted epoch; ours begins one step in.
    expected = rates[:0] + [0.5 * (k + 1) / warmup for k in range(warmup)] + rates[warmup:]
    assert [learning_rate(k, 20, training) for k in range(20)] == pytest.approx(expected)


def test_sgd_is_plain_gradient_descent() -> None:
    training, batch = recipe(optimiser="sgd", clip_norm=0.0), batch_of([32])
    engine = engine_of(training)
    model = copy.deepcopy(engine.model)
    model(input_ids=batch.ids, labels=batch.ids).loss.backward()
    engine.step(batch, 0.1)
    for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_engine_ends_bit_identical(tmp_path: Path, precision: str) -> None:
    training, batch = recipe(), batch_of([32])
    undisturbed, first = (engine_of(training, precision=precision) for _ in range(2))
    for k in range(6):
        undisturbed.step(batch, learning_rate(k, 6, training))
    for k in range(3):
        first.step(batch, learning_rate(k, 6, training))
    second = engine_of(training, precision=precision)
    first.save(tmp_path)
    second.load(tmp_path)
    for k in range(3, 6):
        second.step(batch, learning_rate(k, 6, training))
    for name, weight in undisturbed.snapshot().items():
        assert np.array_equal(weight, second.snapshot()[name]), name


def test_a_checkpoint_of_another_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match=r"must hold torch.pt, but this one holds state; resume it with the engine"):
        engine_of(recipe()).load(tmp_path)


def test_at_bf16_the_forward_is_bf16_and_the_masters_are_fp32() -> None:
    training, batch = recipe(epochs=30), batch_of([32])
    engine = engine_of(training, precision="bf16")
    initial = load_model(ModelSpec(), seed=1)
    for master, weight in zip(engine.masters, initial.parameters(), strict=True):
        assert torch.equal(master, weight)
    assert {weight.dtype for weight in engine.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in engine.model.buffers() if buffer.is_floating_point()} <= {torch.float32}
    losses = curve(engine, batch, training)
    in_fp32 = curve(engine_of(training), batch, training)
    assert losses[0] == pytest.approx(in_fp32[0], rel=0.01)
    assert losses[-1] == pytest.approx(in_fp32[-1], abs=0.15)
    for master, weight in zip(engine.masters, engine.weights, strict=True):
        assert torch.equal(master.bfloat16(), weight)


def test_a_bf16_snapshot_travels_as_its_bits() -> None:
    engine = engine_of(recipe(), precision="bf16")
    for name, array in engine.snapshot().items():
        weight = engine.model.state_dict()[name]
        assert array.dtype == (np.int16 if weight.dtype == torch.bfloat16 else as_numpy(weight).dtype)
        assert torch.equal(as_tensor(array, weight.dtype), weight)


def test_lora_trains_its_adapters_alone() -> None:
    training, batch = recipe(), batch_of([32])
    engine = engine_of(training, ModelSpec(lora=LoraSpec(rank=4)))
    before = engine.snapshot()
    losses = curve(engine, batch, training)
    assert losses[-1] < losses[0]
    for name, weight in engine.snapshot().items():
        assert np.array_equal(weight, before[name]) == ("lora_" not in name), name


def test_many_strings_are_scored_in_bounded_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = engine_of(recipe()), batch_of([30] * 7)
    monkeypatch.setattr("memray.finetune.TOKENS_PER_SCORING_PASS", 60)
    assert [len(each.ids) for each in scoring_passes(batch)] == [2, 2, 2, 1]
    in_passes, at_once = engine.score(batch), score(engine.model, batch, UNIFORM)
    assert in_passes.string.tolist() == at_once.string.tolist()
    assert in_passes.log_prob == pytest.approx(at_once.log_prob, abs=1e-5)
