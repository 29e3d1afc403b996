"""Strings one after another: against a plain loop, across interruptions, and at a cost that does not grow."""

import contextlib
import gc
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memray.cost import cost
from memray.curriculum import BEFORE, CurriculumSpec, strings_to_look_at
from memray.encoding import Batch
from memray.finetune import Engine, learning_rate
from memray.looks import Checkpoint, Look, OwnProber, Question
from memray.material import Material, prepare
from memray.measurement import Measurement, matrix_table, string_table, token_table
from memray.models import load_model
from memray.sequence import SequenceQuestion
from memray.sequence_measurement import BASE, SequenceMeasurer, remeasure_sequence
from memray.spec import TrialSpec
from memray.strings import draw_strings
from memray.sweep import vary
from memray.trial import ModelShelf, run_trial


def changed(changes: dict[str, Any], base: TrialSpec | None = None) -> TrialSpec:
    spec = vary(base or FOUR, changes)
    assert isinstance(spec, TrialSpec), spec
    return spec


FOUR = changed(
    {
        "strings.length": 24, "strings.alphabet_size": 7, "strings.num_strings": 4, "training.epochs": 8,
        "probes.epochs": (1, 4), "probes.num_held_out": 2, "probes.retention.ages": (1, 2),
    },
    TrialSpec(curriculum=CurriculumSpec()),
)  # fmt: skip
SHELF = ModelShelf()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def measured(spec: TrialSpec, **options: Any) -> list[Measurement]:
    return list(run_trial(spec, shelf=SHELF, **options))


def matrix_of(measurements: list[Measurement]) -> Any:  # a frame, whose columns pyright does not know
    return matrix_table(measurements).to_pandas()


def ends_of(measurements: list[Measurement]) -> Any:
    """The loss of every trained string that was looked at, by the stage at whose end, by string."""
    rows = matrix_of(measurements)
    rows = rows[rows["is_end"] & ~rows["is_held_out"]]
    return rows.pivot(index="stage", columns="string", values="recall/nll_nats")


# --- against a plain loop --------------------------------------------------------------------------------------------


class PlainLoop:
    """The same curriculum without an engine: Hugging Face's loss, torch's AdamW, and one string at a time."""

    def __init__(self, spec: TrialSpec) -> None:
        torch.manual_seed(spec.order_seed)
        self.spec = spec
        self.material = prepare(spec)
        self.model = load_model(spec.model, seed=spec.model_seed).train()
        self.base = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.renew()

    def renew(self) -> None:
        training = self.spec.training
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=(training.beta1, training.beta2), eps=training.eps, weight_decay=0.0
        )

    def step(self, batch: Batch, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        self.model(input_ids=batch.ids, labels=batch.ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.training.clip_norm)
        self.optimiser.step()

    @torch.no_grad()
    def nll_nats(self, material: Material, string: int) -> float:
        ids = material.trained.ids[string : string + 1]
        self.model.eval()
        loss = float(self.model(input_ids=ids, labels=ids).loss)
        self.model.train()
        return loss

    def rate(self, step: int, num_steps: int) -> float:
        return learning_rate(step, num_steps, self.spec.training)


def test_a_sequence_is_a_plain_loop_over_strings() -> None:
    loop, found = PlainLoop(FOUR), ends_of(measured(FOUR))
    assert found.index.tolist() == [BEFORE, 0, 1, 2, 3]
    for stage in range(4):
        loop.renew()
        for epoch in range(8):
            loop.step(loop.material.trained.of(np.array([stage])), loop.rate(epoch, 8))
        for string in found.columns[found.loc[stage].notna()]:
            assert found.loc[stage, string] == pytest.approx(loop.nll_nats(loop.material, string), rel=2e-4)
    assert found.loc[3].notna().all()


def test_optimiser_and_schedule_can_be_carried_over() -> None:
    spec = changed({"curriculum.optimiser": "carried", "curriculum.schedule": "trial"})
    loop, found = PlainLoop(spec), ends_of(measured(spec))
    for step in range(32):
        loop.step(loop.material.trained.of(np.array([step // 8])), loop.rate(step, 32))
    assert found.loc[3, 3] == pytest.approx(loop.nll_nats(loop.material, 3), rel=2e-4)
    assert found.loc[3, 0] == pytest.approx(loop.nll_nats(loop.material, 0), rel=2e-4)


def test_from_base_weights_every_string_is_trained_as_if_it_were_alone() -> None:
    spec = changed({"curriculum.weights": "base"})
    found = ends_of(measured(spec))
    for stage in range(4):
        loop = PlainLoop(spec)
        for epoch in range(8):
            loop.step(loop.material.trained.of(np.array([stage])), loop.rate(epoch, 8))
        assert found.loc[stage, stage] == pytest.approx(loop.nll_nats(loop.material, stage), rel=2e-4)


def test_an_unrepeated_stage_trains_fresh_strings_and_its_own_never() -> None:
    spec = changed({"curriculum.unrepeated": (0, 1)})
    loop, found = PlainLoop(spec), measured(spec)
    material = loop.material
    for stage in range(2):
        loop.renew()
        for epoch in range(8):
            (string,) = draw_strings(
                material.source, length=24, num_strings=1, seed=0, stream="unrepeated", first=8 * stage + epoch
            )
            ids = torch.as_tensor(material.encoder.symbol_ids[string])[None]
            batch = Batch(
                ids=ids, is_target=torch.ones_like(ids, dtype=torch.bool), attention_mask=torch.ones_like(ids),
                num_leading=0,
            )  # fmt: skip
            loop.step(batch, loop.rate(epoch, 8))
    nll = matrix_of(found).query("stage == 1 and is_end and not is_held_out").set_index("string")["recall/nll_nats"]
    assert nll.index.tolist() == [2, 3]  # those that come next: nothing was memorised yet
    assert nll[2] == pytest.approx(loop.nll_nats(material, 2), rel=2e-4)
    assert [("recall/robust" in each.metrics, len(each.strings)) for each in found] == [
        (False, 0), (False, 0), (False, 0), (True, 1), (True, 1),
    ]  # fmt: skip
    assert "sequence/forgetting" not in found[2].metrics


def test_replay_trains_a_share_of_the_earlier_strings_beside_each_step() -> None:
    steps: list[int] = []

    def make_engine(*arguments: Any) -> Engine:
        from memray.trial import make_torch_engine

        engine = make_torch_engine(*arguments)
        step = engine.step

        def counted(batch: Batch, rate: float, stop: Any = None) -> Any:
            steps.append(len(batch.ids))
            scores = step(batch, rate, stop)
            assert scores.num_strings == len(batch.ids)
            return scores

        engine.step = counted  # type: ignore[method-assign]
        return engine

    spec = changed({"curriculum.replay_share": 0.5})
    found = measured(spec, make_engine=make_engine)
    assert [set(steps[8 * stage : 8 * stage + 8]) for stage in range(4)] == [{1}, {2}, {2}, {3}]
    without = ends_of(measured(FOUR))
    assert ends_of(found).loc[1, 0] < without.loc[1, 0]
    own = matrix_of(found).query("is_own").groupby("stage").size()
    assert own.tolist() == [9, 9, 9, 9]  # what is trained beside them is not measured as their own


def test_the_other_strings_are_scored_against_their_own_alphabet() -> None:
    changes = {"other.stages": (1,), "other.alphabet": "digits", "other.alphabet_size": 2}
    spec = changed({f"curriculum.{name}": value for name, value in changes.items()} | {"training.epochs": 20})
    found = measured(spec)
    own = matrix_of(found).query("is_own and is_end").set_index("stage")
    assert own["source"].tolist() == [0, 1, 0, 0]
    rows = matrix_of(found).query("is_held_out and is_end and stage == 1").set_index("source")
    assert rows.index.tolist() == [0, 0, 1, 1]
    # After digits, digits are likely and letters are not; each string is asked for the mass of its own symbols.
    mass = rows["guessing/alphabet_mass"]
    assert mass[1].min() > mass[0].max()
    assert own.loc[1, "guessing/alphabet_mass"] > mass[0].max()
    assert set(found[2].strings[0]["text"]) == {"0", "1"}


def test_a_revisited_stage_is_trained_again_and_begins_with_what_is_left() -> None:
    found = measured(changed({"curriculum.revisits": (1, 0)}))
    rows = matrix_of(found)
    own = rows[rows["is_own"]]
    assert [own[own["stage"] == stage]["string"].unique().tolist() for stage in range(6)] == [
        [0],
        [1],
        [2],
        [3],
        [1],
        [0],
    ]
    assert found[-2].metrics["sequence/forward_transfer"] > found[2].metrics["sequence/forward_transfer"]
    # String 0 is three stages old when it comes again, and string 1 then one.
    last = rows.query("stage == 5 and is_end and not is_own and not is_held_out").set_index("string")
    assert last["learned_stage"].to_dict() == {1: 4, 2: 2, 3: 3}


def test_several_strings_a_stage_are_trained_together_and_each_is_followed() -> None:
    spec = changed({"curriculum.strings_per_stage": 2, "training.strings_per_step": 1})
    found = measured(spec)
    assert [len(each.strings) for each in found] == [0, 2, 2]
    assert matrix_of(found).query("is_own").groupby(["stage", "string"]).size().tolist() == [9] * 4
    assert found[-1].metrics["sequence/steps"] == 32


@pytest.mark.parametrize(
    "changes",
    [{}, {"curriculum.replay_share": 0.5}, {"training.stop_when": {"at_least": 0.3, "epochs": 2}}],
    ids=["plain", "replay", "criterion"],
)
def test_strings_are_scored_a_second_time_only_where_they_were_scored_apart(changes: dict[str, Any]) -> None:
    """Scores read off a step that trained other strings too are of another batch: nobody gets their last bits again."""
    asked: list[SequenceQuestion] = []

    class Recording(OwnProber):
        def look(self, question: Any, engine: Engine) -> Look:
            asked.append(question)
            return super().look(question, engine)

    spec = changed({"training.epochs": 60, "training.schedule": "constant"} | changes)
    found = measured(spec, prober=Recording(spec, prepare(spec), None))
    at_ends = [each for each in asked if each.place.is_end and each.place.stage >= 0]
    assert len(at_ends) == 4
    lasts = [each.place.stage_epoch == 60 for each in at_ends]
    assert all(lasts) == ("training.stop_when" not in changes)
    assert [bool(each.own) for each in at_ends] == lasts
    assert found[-1].num_trained == spec.num_targets * at_ends[-1].place.stage_epoch


# --- what is measured ------------------------------------------------------------------------------------------------


def test_each_stage_is_measured_from_its_rows() -> None:
    found = measured(FOUR)
    assert [(each.stage, each.epoch) for each in found] == [(0, 0), (0, 8), (1, 16), (2, 24), (3, 32)]
    rows = matrix_of(found)
    ends = rows[rows["is_end"] & ~rows["is_held_out"]]
    recall = ends.pivot(index="stage", columns="string", values="recall/robust")
    last = found[-1].metrics
    at_end = {string: recall.loc[string, string] for string in range(3)}
    forgotten = [at_end[string] - recall.loc[3, string] for string in range(3)]
    assert last["sequence/forgetting"] == pytest.approx(np.mean(forgotten))
    assert last["sequence/backward_transfer"] == -last["sequence/forgetting"]
    assert last["sequence/recall_age_1"] == pytest.approx(recall.loc[3, 2])
    assert last["sequence/recall_age_2"] == pytest.approx(recall.loc[3, 1])
    assert last["sequence/recall_seen"] == pytest.approx(recall.loc[3].mean())
    assert found[2].metrics["sequence/recall_future"] == pytest.approx(recall.loc[1, [2, 3]].mean())
    first = rows.query("stage == 3 and stage_epoch == 0 and is_own")["recall/robust"].item()
    assert last["sequence/forward_transfer"] == pytest.approx(first)
    held_out = rows.query("stage == 3 and is_end and is_held_out")["recall/nll_nats"].mean()
    # Of three earlier strings the older half is those at least as old as the median.
    oldest = rows.query("stage == 3 and is_end and string in [0, 1] and not is_held_out")["recall/nll_nats"].mean()
    bits = (oldest - held_out) / math.log(2)
    assert last["sequence/oldest_beyond_heldout_bits"] == pytest.approx(bits)


def test_within_a_stage_only_the_stated_ages_are_looked_at() -> None:
    rows = matrix_of(measured(FOUR)).query("not is_end and not is_own and not is_held_out")
    looked = {key: part["string"].tolist() for key, part in rows.groupby(["stage", "stage_epoch"])}
    expected = {0: [1, 2], 1: [0, 2, 3], 2: [0, 1, 3], 3: [1, 2]}
    assert looked == {(stage, epoch): expected[stage] for stage in range(4) for epoch in (1, 4)}


def test_the_matrix_gives_the_same_measurements_again() -> None:
    spec = changed(
        {"curriculum.other.stages": (1,), "curriculum.other.alphabet_size": 4, "curriculum.revisits": (0,)}, FOUR
    )
    found, material = measured(spec), prepare(spec)
    assert material.other is not None
    measurer = SequenceMeasurer(spec, {BASE: material.known_trained, 1: material.other.known_trained})
    again = list(remeasure_sequence(measurer, matrix_table(found)))
    assert [each.record() for each in again] == [each.record() for each in found]
    assert matrix_table(again).equals(matrix_table(found))


def test_a_stage_ends_with_its_criterion_and_the_next_begins() -> None:
    rule = {"metric": "recall/token_accuracy", "at_least": 0.5, "epochs": 2}
    found = measured(changed({"training.stop_when": rule, "training.epochs": 60, "training.schedule": "constant"}))
    rows = matrix_of(found).query("is_own")
    lengths = rows.groupby("stage")["stage_epoch"].max()
    assert (lengths < 60).all()
    assert [each.epoch for each in found] == [0, *np.cumsum(lengths)]
    for _, part in rows.groupby("stage"):
        accuracy = part["recall/token_accuracy"].to_numpy()
        assert (accuracy[-2:] >= 0.5).all()
        assert not ((accuracy[:-2] >= 0.5) & (accuracy[1:-1] >= 0.5)).any()
        assert part["is_end"].tolist() == [False] * (len(part) - 1) + [True]


class LateProber:
    """The trial's own looks, whose answers come only when they are asked for."""

    def __init__(self, spec: TrialSpec) -> None:
        self.own = OwnProber(spec, prepare(spec), None)

    def look(self, question: Question, engine: Engine) -> Look:
        ready = self.own.look(question, engine)

        class Late:
            def is_ready(self) -> bool:
                return False

            def result(self) -> Any:
                return ready.result()

        return Late()


def test_measurements_wait_for_their_looks_and_training_does_not() -> None:
    late = measured(FOUR, prober=LateProber(FOUR))
    assert [each.record() for each in late] == [each.record() for each in measured(FOUR)]


# --- long runs -------------------------------------------------------------------------------------------------------


class FolderKeeper:
    """Keeps one checkpoint, and what was measured before it, and leaves the trial there."""

    def __init__(self, folder: Path, leave_after: int | None) -> None:
        self.folder = folder
        self.leave_after = leave_after
        self.checkpoint: Checkpoint | None = None
        self.measured: list[Measurement] = []

    def newest(self) -> Checkpoint | None:
        return self.checkpoint

    def is_due(self) -> bool:
        return self.leave_after is not None

    def keep(self, epoch: int, engine: Engine) -> None:
        if len(self.measured) - 2 == self.leave_after:
            engine.save(self.folder)
            tables = token_table(self.measured), string_table(self.measured), matrix_table(self.measured)
            self.checkpoint = Checkpoint(epoch, self.folder, *tables)
            raise KeyboardInterrupt

    def run(self, spec: TrialSpec) -> list[Measurement]:
        self.measured = []
        with contextlib.suppress(KeyboardInterrupt):
            for each in run_trial(spec, shelf=SHELF, keeper=self):
                self.measured.append(each)
        return self.measured


@pytest.mark.parametrize(
    ("leave_after", "changes"),
    [
        (0, {}),
        (2, {"curriculum.optimiser": "carried", "curriculum.schedule": "trial", "curriculum.replay_share": 0.4}),
        (1, {"curriculum.weights": "base", "training.optimiser": "sgd"}),
        (3, {"curriculum.revisits": (2, 0), "curriculum.unrepeated": (1,), "model.dropout": 0.1}),
        (1, {"training.stop_when": {"at_least": 0.3, "epochs": 2}, "training.schedule": "constant"}),
    ],
    ids=["plain", "carried over, with replay", "from base weights", "revisited, with dropout", "to a criterion"],
)
def test_a_resumed_sequence_ends_bit_identical(tmp_path: Path, leave_after: int, changes: dict[str, Any]) -> None:
    spec = changed(changes)
    undisturbed, keeper = measured(spec), FolderKeeper(tmp_path, leave_after)
    before = list(keeper.run(spec))
    assert len(before) == leave_after + 2
    keeper.leave_after = None
    after = keeper.run(spec)
    assert [each.record() for each in before + after] == [each.record() for each in undisturbed]
    assert matrix_table(before + after).equals(matrix_table(undisturbed))
    assert string_table(before + after).equals(string_table(undisturbed))


def test_the_same_sequence_gives_the_same_bits_whatever_ran_before() -> None:
    first = measured(FOUR)
    measured(changed({"curriculum.optimiser": "carried"}))
    assert matrix_table(measured(FOUR)).equals(matrix_table(first))


def test_what_a_look_within_a_stage_costs_does_not_grow() -> None:
    stages = CurriculumSpec().stages(1000)
    learned = np.arange(1000)
    sizes = []
    for stage in (200, 400, 900):
        seen = np.where(learned < stage, learned, BEFORE)
        sizes.append(len(strings_to_look_at(stages, stage, seen, ages=(1, 2, 3, 5, 10, 20, 50, 100), num_future=2)))
        assert len(strings_to_look_at(stages, stage, seen, ages=None, num_future=2)) == stage + 2
    assert sizes == [10, 10, 10]


def test_memory_stays_flat_over_stages() -> None:
    changes = {"strings.num_strings": 36, "training.epochs": 1, "probes.num_held_out": 1, "model.family": "gpt2"}
    spec = changed(changes | {"probes.retention.stage_ends": "ages", "probes.epochs": ()})
    sizes: list[int] = []
    tracemalloc.start()
    try:
        for each in run_trial(spec, shelf=SHELF):
            if each.stage in (12, 24, 35):
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            del each
    finally:
        tracemalloc.stop()
    # The tables of one measurement take 11 KiB: those of the stages between would be 120.
    assert max(sizes) - min(sizes) < 40 * 1024


def test_the_cost_of_a_sequence_counts_its_steps_and_looks() -> None:
    spec = changed({"curriculum.replay_share": 0.5})
    scored: list[int] = []
    trained: list[int] = []

    def make_engine(*arguments: Any) -> Engine:
        from memray.trial import make_torch_engine

        engine = make_torch_engine(*arguments)
        step, score = engine.step, engine.score

        def counted_step(batch: Batch, *rest: Any) -> Any:
            trained.append(len(batch.ids))
            return step(batch, *rest)

        def counted_score(batch: Batch) -> Any:
            scored.append(len(batch.ids))
            return score(batch)

        engine.step, engine.score = counted_step, counted_score  # type: ignore[method-assign]
        return engine

    measured(spec, make_engine=make_engine)
    one = cost(TrialSpec(strings=spec.strings.model_copy(update={"num_strings": 1}))).probe_flops
    forward = one / (10 * len({*TrialSpec().probes.epochs}))  # ten held-out strings at each probe epoch, 300 the last
    own = 4  # each stage's own string, once at its end
    assert cost(spec).probe_flops == pytest.approx((sum(scored) - own) * forward)
    assert cost(spec).flops == pytest.approx((3 * sum(trained) + sum(scored)) * forward)
