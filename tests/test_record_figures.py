"""The figures that need the tokens of many trials, on planted records whose answer is known."""

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy import ndarray

from memray.measurement import Measurement, context_table
from memray.probes import Condition, ContextSpec
from memray.report.charts import Chart, Trace
from memray.report.one_string import StringRecord
from memray.report.record_figures import Prefixes, record_figures
from memray.report.records import Records
from memray.report.replicates import seen_cells
from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.strings import draw_strings
from memray.sweep import Sweep, vary
from memray.trial import run_trial
from tests.test_order import spearman
from tests.test_prefix import Planted, planted_scores
from tests.test_report import alphabets, falling, planted
from tests.test_report_page import Kept

LENGTH = 40
CONTEXT = ContextSpec(replacements=("source",), lengths=(0, 1, 2, 5, 9), redraws=2)
BASE = TrialSpec(
    strings=StringsSpec(length=LENGTH, alphabet_size=4),
    training=TrainingSpec(epochs=30),
    probes=ProbesSpec(num_held_out=2, context=CONTEXT),
)


class PlantedRecords:
    """The records of one trial with one string of each role, and the tokens or the context given."""

    def __init__(self, trial: TrialSpec, *, tokens: pa.Table | None = None, context: pa.Table | None = None) -> None:
        ids = [*range(trial.strings.alphabet_size or 4)]
        string = {"string": 0, "text": "a" * trial.strings.length, "symbol_ids": ids}
        roles = ("trained", "held_out")
        looks = [{"epoch": epoch, "role": role} for epoch in (0, 10, 30) for role in roles]
        self._strings = pa.Table.from_pylist([look | string for look in looks])
        self._tokens, self._context = tokens, context

    def tokens(self) -> pa.Table:
        return pa.table({}) if self._tokens is None else self._tokens

    def strings(self) -> pa.Table:
        return self._strings

    def context(self) -> pa.Table:
        return pa.table({}) if self._context is None else self._context

    def matrix(self) -> pa.Table:
        return pa.table({})

    samples = matrix


def changed(changes: dict[str, Any]) -> TrialSpec:
    (trial,) = Sweep([vary(BASE, changes)]).trials
    return trial


def charts(sweep: Sweep, records: Mapping[str, Records], columns: Mapping[str, float] = {}) -> dict[str, Chart]:
    frame = planted(sweep, falling).assign(**columns)
    return {each.name: each for each in record_figures(seen_cells(sweep, frame), records.__getitem__)}


def by_name(chart: Chart) -> dict[str, Trace]:
    return {trace.name: trace for trace in chart.traces if trace.name}


# --- the prefix that is enough -------------------------------------------------------------------------------------


def needs(k: int) -> Callable[[Condition | None, int, int, int], Planted]:
    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        return (0.9, 1.0, True) if condition is None or condition.k >= k else (0.01, 0.5, False)

    return plant


def never(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
    return 0.01, 0.5, False


def needing_five(trial: TrialSpec) -> PlantedRecords:
    """What a model leaves that at its last probe recalls each token from the five before it, and before that none."""
    length = trial.strings.length
    recalled, unknown = (planted_scores(CONTEXT, length, plant) for plant in (needs(5), never))
    looks = [
        Measurement(trial.trial_id(), 0, 10, {}, context={"trained": unknown, "held_out": unknown}),
        Measurement(trial.trial_id(), 0, 30, {}, context={"trained": recalled, "held_out": unknown}),
    ]
    return PlantedRecords(trial, context=context_table(looks))


def literal_determining(symbols: list[int], i: int) -> float:
    """The shortest context of symbol i that nothing but that symbol follows."""
    for k in range(i + 1):
        following = {symbols[j] for j in range(k, len(symbols)) if symbols[j - k : j] == symbols[i - k : i]}
        if following == {symbols[i]}:
            return k
    return math.inf


def test_the_share_of_tokens_for_which_a_prefix_is_enough_is_drawn_by_its_length_at_the_last_probe():
    sweep = Sweep([BASE])
    drawn = charts(sweep, {BASE.trial_id(): needing_five(BASE)}, {"context/sufficient_share": 1.0})["sufficient"]
    traces = by_name(drawn)
    # Not the first tokens: one with three before it would be said to need three.
    assert dict(zip(traces["trained"].x, traces["trained"].y, strict=True)) == {0: 0, 1: 0, 2: 0, 5: 1, 9: 1}
    assert dict(zip(traces["held-out"].x, traces["held-out"].y, strict=True)) == dict.fromkeys((0, 1, 2, 5, 9), 0)
    (string,) = draw_strings(BASE.source(), length=LENGTH, num_strings=1, seed=BASE.string_seed, stream="trained")
    needed = np.array([literal_determining(string.tolist(), i) for i in range(9, LENGTH)])
    assert [*traces["exact"].y] == pytest.approx([np.mean(needed <= k) for k in range(10)])
    # The closed form for four equal symbols: each token is worth two bits.
    assert [*traces[f"k* = {math.log2(LENGTH):.3g}"].x] == pytest.approx([math.log2(LENGTH)] * 2)
    hollow = [trace.y[0] for trace in drawn.traces if trace.style.marker.endswith("-open")]
    assert hollow == pytest.approx([np.mean(np.isfinite(needed)), 0, 1])


def test_the_curves_are_medians_over_replicates_with_their_range():
    trials = [changed({"string_seed": seed, "model_seed": seed}) for seed in range(3)]
    unknown = planted_scores(CONTEXT, LENGTH, never)
    records: dict[str, Records] = {trial.trial_id(): needing_five(trial) for trial in trials}
    look = Measurement("", 0, 30, {}, context={"trained": unknown})
    records[trials[1].trial_id()] = PlantedRecords(trials[1], context=context_table([look]))
    traces = by_name(charts(Sweep(trials), records, {"context/sufficient_share": 1.0})["sufficient"])
    assert [traces["trained"].y[-1], traces["trained"].low[-1], traces["trained"].high[-1]] == [1, 0, 1]


def test_tokens_that_structure_fixes_need_no_prefix_and_its_places_agree_for_more_than_chance():
    trial = changed({"strings.kind": "repeated", "strings.motif_length": 20})
    prefixes = Prefixes.of(trial, needing_five(trial))
    assert prefixes is not None
    # Those of the first motif that have nine symbols before them: all behind it are fixed.
    assert len(prefixes.trained) == len(prefixes.determining) == 11
    drawn = charts(Sweep([trial]), {trial.trial_id(): needing_five(trial)}, {"context/sufficient_share": 1.0})
    assert {*by_name(drawn["sufficient"])} == {"trained", "held-out", "exact"}


@pytest.mark.parametrize("bos", [False, True])
def test_where_all_tokens_have_the_longest_prefix_what_is_drawn_of_a_trial_ends_in_its_metrics(bos: bool):
    trial = changed(
        {
            "model.bos": bos,
            "strings.length": 20,
            "strings.num_strings": 2,
            "training.epochs": 60,
            "probes.compared_strings": 1,
            "probes.context": ContextSpec(replacements=("source",), lengths=(0,) if bos else (0, 1), redraws=2),
        }
    )
    measured = list(run_trial(trial))
    metrics = measured[-1].metrics
    assert metrics["context/sufficient_share"] > 0
    prefixes = Prefixes.of(trial, Kept(measured))
    assert prefixes is not None
    assert len(prefixes.trained) == len(prefixes.determining) == len(prefixes.held_out) == (20 if bos else 19)
    assert np.mean(np.isfinite(prefixes.trained)) == metrics["context/sufficient_share"]
    assert np.mean(np.isfinite(prefixes.held_out)) == metrics["context/sufficient_share_heldout"]


# --- the order in several models -----------------------------------------------------------------------------------


def memorised(trial: TrialSpec, epochs: ndarray) -> PlantedRecords:
    """What a model leaves that knows the token at each position from an epoch on; nan: it never does."""
    rows = [
        {"epoch": epoch, "is_held_out": False, "string": 0, "position": position, "argmax": 0,
         "log_prob": math.log(0.95 if epoch >= epochs[position] else 0.01)}
        for epoch in range(12)
        for position in range(0 if trial.model.bos else 1, trial.strings.length)
    ]  # fmt: skip
    return PlantedRecords(trial, tokens=pa.Table.from_pylist(rows))


def models(*families: str, seeds: int = 2, alphabet_sizes: tuple[int, ...] = (4,)) -> Sweep:
    return Sweep(
        vary(BASE, {"model.family": family, "strings.alphabet_size": size, "string_seed": seed, "model_seed": seed})
        for family in families
        for size in alphabet_sizes
        for seed in range(seeds)
    )


def random_epochs(rng: np.random.Generator) -> ndarray:
    return np.where(rng.random(LENGTH) < 0.2, np.nan, rng.integers(1, 11, LENGTH))


def test_models_of_one_string_are_held_against_each_other_over_the_tokens_that_all_of_them_predict():
    """Llama starts with BOS and predicts the first symbol too, the others do not."""
    sweep = models("pythia", "gpt2", "llama2", alphabet_sizes=(4, 13))
    rng = np.random.default_rng(0)
    epochs = {trial.trial_id(): random_epochs(rng) for trial in sweep.trials}
    drawn = charts(sweep, {trial.trial_id(): memorised(trial, epochs[trial.trial_id()]) for trial in sweep.trials})
    points = [trace for trace in drawn["agreement"].traces if trace.name]
    assert [{*trace.x} for trace in points] == [{"alphabet_size 4"}, {"alphabet_size 13"}]
    for size, trace in zip((4, 13), points, strict=True):
        for seed, found in zip(range(2), trace.y, strict=True):
            own = [
                np.nan_to_num(epochs[trial.trial_id()][1:], nan=99)
                for trial in sweep.trials
                if (trial.strings.alphabet_size, trial.string_seed) == (size, seed)
            ]
            assert len(own) == 3
            assert found == pytest.approx(np.mean([spearman(a, b) for a, b in combinations(own, 2)]))
            assert trace.hover[seed] == f"string {seed}, 3 models"


def test_models_that_share_an_order_lie_outside_of_what_permutations_give_and_others_within():
    sweep, rng = models("pythia", "gpt2", seeds=4), np.random.default_rng(1)
    shared = {seed: random_epochs(rng) for seed in range(4)}
    alike = charts(sweep, {trial.trial_id(): memorised(trial, shared[trial.string_seed]) for trial in sweep.trials})
    apart = charts(sweep, {trial.trial_id(): memorised(trial, random_epochs(rng)) for trial in sweep.trials})
    for drawn, is_alike in ((alike, True), (apart, False)):
        points, mean, chance = drawn["agreement"].traces
        assert mean.y == [pytest.approx(np.mean(points.y))]
        # 1.96 standard errors of a correlation of 39 tokens, within a tenth of it for 4 times 999 permutations.
        assert [*chance.y] == pytest.approx([-1.96 / math.sqrt(38), 1.96 / math.sqrt(38)], rel=0.1)
        assert ("p = 0.001" in points.name) == is_alike
        assert (min(points.y) > 0.99) == is_alike


def test_no_record_is_read_where_no_string_has_two_models():
    def refuse(trial_id: str) -> NoReturn:
        raise AssertionError(f"the records of {trial_id} were read")

    again = Sweep([BASE, vary(BASE, {"order_seed": 1})])
    for sweep in (alphabets(2, 7), models("pythia", seeds=3), again):
        assert [*record_figures(seen_cells(sweep, planted(sweep, falling)), refuse)] == []


def test_models_without_any_order_leave_no_figure():
    sweep = models("pythia", "gpt2")
    nothing = np.full(LENGTH, np.nan)
    assert charts(sweep, {trial.trial_id(): memorised(trial, nothing) for trial in sweep.trials}) == {}
    assert charts(sweep, {trial.trial_id(): PlantedRecords(trial) for trial in sweep.trials}) == {}


def test_the_tokens_of_a_text_are_in_no_order_for_its_source_is_not_known_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "text").write_text("two words " * 100)
    trial = TrialSpec(strings=StringsSpec(kind="text", path=str(tmp_path / "text"), length=LENGTH))
    record = StringRecord.of(trial, memorised(trial, np.ones(LENGTH)))
    assert record is not None
    assert record.guesser is None
    pd.testing.assert_series_equal(record.acquired(), pd.Series(dtype=np.float64))
