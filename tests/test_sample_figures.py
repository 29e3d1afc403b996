"""Figures and the table of a corpus, on tables of samples whose match lengths were planted, against numbers by hand."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from memray.generators import Sample
from memray.measures.paired import paired_comparison
from memray.report.charts import Chart, Figure
from memray.report.drawing import to_script, write_png
from memray.report.health import signs
from memray.report.mixes import control, mixes, overlaps
from memray.report.page import report_page, write_report
from memray.report.records import RecordsOf
from memray.report.replicates import seen_cells
from memray.report.sample_figures import most_memorised, sample_figures
from memray.report.sample_scatters import MAX_POINTS, spaced
from memray.report.study_figures import study_figures
from memray.samples import HELD_OUT, NATIVE
from memray.sweep import Sweep
from tests.test_claims import (
    BASE,
    CORPUS,
    LAST,
    MIXES,
    OBJECTIVES,
    Cells,
    Kept,
    Rows,
    grid,
    mixed,
    of_mixes,
    planted,
    recited,
    sample_rows,
)

BY_EPOCH = {"recall/nll_nats": 1.0, "match/expected_max": 3.0, "match/mean": 2.0}


def corpora(cells: Cells = ({},), *, seeds: int = 1, rows: Rows | None = None) -> tuple[Sweep, pd.DataFrame]:
    sweep = grid("duration", cells, seeds=seeds, base=CORPUS)
    return sweep, planted(sweep, lambda trial: rows or {0: BY_EPOCH, LAST: BY_EPOCH})


def kept(sweep: Sweep, tables: Sequence[pa.Table]) -> RecordsOf:
    """The tables of the trials in their order."""
    return {trial.trial_id(): Kept(each) for trial, each in zip(sweep.trials, tables, strict=True)}.__getitem__


def by_name(figures: Sequence[Figure]) -> dict[str, Chart]:
    return {each.name: each for each in figures if isinstance(each, Chart)}


def drawn(tables: Sequence[pa.Table], cells: Cells = ({},)) -> dict[str, Chart]:
    sweep, frame = corpora(cells, seeds=len(tables) // len(cells))
    return by_name(sample_figures(sweep, frame, kept(sweep, tables)))


def ended(bits: Sequence[str], *, aside: str = "1111111") -> pa.Table:
    """Two epochs, of which the first knows everything; and a held-out sample that is recited whole in both."""
    roles = [NATIVE] * len(bits) + [HELD_OUT]
    before = sample_rows([*("1" * len(each) for each in bits), aside], epoch=0, roles=roles)
    return pa.concat_tables([before, sample_rows([*bits, aside], epoch=LAST, roles=roles)])


# --- the tail ------------------------------------------------------------------------------------------------------

# Recited for 3 of 4 tokens, for both of 2, for none of 4 and for 1 of 2.
BITS = ["1110", "11", "0111", "10"]


def test_a_sweep_without_a_corpus_has_no_figures_of_samples_and_without_records_few():
    strings = grid("alphabet", [{"strings.alphabet_size": 2}], seeds=1, base=BASE)
    rows = {0: {}, LAST: {"recall/nll_nats": 1.0}}
    assert sample_figures(strings, planted(strings, lambda trial: rows), lambda trial_id: Kept(ended(BITS))) == []
    sweep, frame = corpora()
    for records in (None, kept(sweep, [pa.table({})])):
        assert [*by_name(sample_figures(sweep, frame, records))] == ["tail-and-loss"]


def test_the_tail_stands_against_the_loss_epoch_by_epoch_in_medians():
    sweep = grid("duration", [{}], seeds=3, base=CORPUS)
    frame = planted(sweep, lambda trial: {
        epoch: {"recall/nll_nats": loss + trial.string_seed, "match/expected_max": tail * (1 + trial.string_seed)}
        for epoch, loss, tail in ((LAST, 0.5, 8.0), (0, 4.0, 0.0), (10, 0.6, 5.0))
    })  # fmt: skip
    (trace,) = by_name(sample_figures(sweep, frame, None))["tail-and-loss"].traces
    assert trace.x == pytest.approx([5.0, 1.6, 1.5])
    assert trace.y == pytest.approx([0.0, 10.0, 16.0])
    assert trace.hover == ["epoch 0", "epoch 10", f"epoch {LAST}"]


def test_the_share_that_is_recited_is_that_of_kaplan_and_meier_over_all_replicates():
    points, *fitted = drawn([ended(BITS[:2]), ended(BITS[2:])])["survival"].traces
    # Of 4 samples 3 know the first token; of those 2 the second, of which one has no third; the other knows that.
    assert points.x == [0, 1, 2, 3]
    assert points.y == pytest.approx([1.0, 3 / 4, 1 / 2, 1 / 2])
    assert [each.name for each in fitted] == ["geometric", "linear p", "beta-geometric"]
    # Six tokens were recited, and three were not where they could have been.
    assert fitted[0].y == pytest.approx([(6 / 9) ** n for n in range(4)])
    assert sum("best by AIC" in each.hover[0] for each in fitted) == 1


def test_many_cells_have_no_fitted_curves():
    cells: Cells = [{"corpus.num_samples": number} for number in range(100, 105)]
    traces = drawn([ended(BITS)] * 5, cells)["survival"].traces
    assert [each.name for each in traces] == ["100", "101", "102", "103", "104"]


def test_a_token_is_right_given_all_before_it_and_whatever_they_are_where_enough_are_left():
    conditional, marginal = drawn([ended(BITS * 2), ended(BITS * 3)])["hazards"].traces
    # Only 5 samples know two tokens and have a third.
    assert (conditional.x, conditional.y) == ([1, 2], pytest.approx([3 / 4, 2 / 3]))
    assert (marginal.x, marginal.y) == ([1, 2, 3, 4], pytest.approx([3 / 4, 3 / 4, 1.0, 1 / 2]))


def test_what_a_probe_finds_is_the_mean_over_all_probes_and_the_band_its_replicates():
    lengths = [[0, 0, 1, 2, 2, 3, 5, 8, 13, 21], [0, 0, 0, 0, 0, 0, 1, 1, 2, 30]]
    curve, longest = drawn([ended(recited(each)) for each in lengths])["probe-size"].traces
    exact = np.array([[np.mean([max(probe) for probe in itertools.combinations(each, z)]) for z in (1, 2)]
                      for each in lengths])  # fmt: skip
    assert curve.x == [1, 2]
    assert curve.y == pytest.approx(exact.mean(axis=0))
    assert curve.low == pytest.approx(exact.min(axis=0))
    assert curve.high == pytest.approx(exact.max(axis=0))
    assert (longest.x, longest.y) == ([1, 2], [25.5, 25.5])


def test_what_a_probe_misses_is_told_for_each_number_of_samples():
    cells: Cells = [{"corpus.num_samples": number} for number in (10, 12, 30)]
    figures = drawn([ended(BITS[:1] * number) for number in (10, 12, 30)], cells)
    assert [*figures].index("missed") == [*figures].index("probe-size") + 1
    small, large = figures["missed"].traces
    for trace, number in ((small, 12), (large, 30)):
        assert trace.name == f"M = {number}"
        assert trace.x[0] == 1
        assert trace.x[-1] == number
        for z, chance in zip(map(int, trace.x), trace.y, strict=True):
            assert chance == pytest.approx(math.comb(number - 10, z) / math.comb(number, z))
    assert "missed" not in drawn([ended(BITS[:1] * 10)])


# --- which samples -------------------------------------------------------------------------------------------------


def test_the_samples_that_are_recited_for_longest_come_first_with_their_text():
    """Ordered by the median, then by the most, then by the row, and told with the text of the first epoch."""
    texts = [Sample(f"Who {place}?", f" Answer {place}.") for place in range(4)]
    places = [7, 5, 3, 1]

    def table(lengths: Sequence[int]) -> pa.Table:
        before = sample_rows(recited([60] * 4), epoch=0, places=places, texts=texts)
        return pa.concat_tables([before, sample_rows(recited(lengths), epoch=LAST, places=places)])

    sweep, frame = corpora(seeds=3)
    records = kept(sweep, [table(each) for each in ([4, 4, 9, 2], [6, 8, 9, 2], [8, 6, 0, 10])])
    listed = most_memorised(sweep, frame, records)
    assert [each["row"] for each in listed] == [3, 5, 7, 1]
    first = listed[0]
    assert first == {
        "prefix": "Who 2?", "reference": " Answer 2.", "row": 3, "length": 60, "median": 9.0, "least": 0, "most": 9,
        "trials": 3,
    }  # fmt: skip
    # A trial without results says nothing.
    rest = frame.loc[frame["trial_id"] != sweep.trials[0].trial_id()]
    assert {each["trials"] for each in most_memorised(sweep, rest, records)} == {2}
    page = report_page(sweep, frame, [], None, {}, listed)
    assert page.index("Who 2?") < page.index("Who 1?") < page.index("Who 0?")


def test_other_prefixes_of_a_row_are_other_samples_and_only_the_first_are_listed():
    texts = [Sample(f"Who {place}?", "He.") for place in range(25)]
    sweep, frame = corpora([{}, {"corpus.rows": {"generator": "facts"}}])
    told = [[Sample(each.prefix + kind, each.reference) for each in texts] for kind in ("", " Say!")]
    tables = [sample_rows(recited([*range(25)]), epoch=LAST, texts=each) for each in told]
    listed = most_memorised(sweep, frame, kept(sweep, tables))
    assert [(each["row"], each["trials"]) for each in listed] == [(24 - index // 2, 1) for index in range(20)]
    assert {each["prefix"].endswith("Say!") for each in listed[:2]} == {True, False}


# --- a point a sample ----------------------------------------------------------------------------------------------


def of_two_mixes(seeds: int) -> tuple[Sweep, pd.DataFrame]:
    sweep = grid("composition", MIXES, seeds=seeds, base=CORPUS, trainings=3)
    at_end = {trial.trial_id(): mixed(2.0, 1.0)(trial, float(trial.order_seed))[LAST] for trial in sweep.trials}
    return sweep, planted(sweep, lambda trial: {0: BY_EPOCH, LAST: BY_EPOCH | at_end[trial.trial_id()]})


def test_two_mixes_are_drawn_sample_by_sample_with_what_the_test_and_its_control_say():
    sweep, frame = of_two_mixes(seeds=2)
    chart = by_name(sample_figures(sweep, frame, of_mixes(sweep, frame)))["mixes"]
    first, second, diagonal = chart.traces
    sample = np.arange(40)
    # Trainings shift by 0, 1 and 2 tokens, foreign samples by 2 and by 1 to 3 up or down.
    native = 21.0 + sample % 7
    foreign = native + 2 + (1 + sample // 2 % 3) * np.where(sample % 2, 1, -1)
    for string, trace in enumerate((first, second)):
        assert trace.name == f"string {string}"
        assert trace.x == pytest.approx(native)
        assert trace.y == pytest.approx(foreign)
        assert trace.hover[3] == f"row 3 of string {string}: {foreign[3]:.3g} with foreign, {native[3]:.3g} with " \
            "native samples"  # fmt: skip
    assert diagonal.x == diagonal.y == [0.0, foreign.max()]
    effect = paired_comparison(foreign, native, rng=None).effect
    assert f"string by string: {effect:+.2f}, {effect:+.2f}; between mixes p = " in chart.caption
    (pair,) = mixes(seen_cells(sweep, frame, of_mixes(sweep, frame)))
    assert chart.caption.endswith(f"{control(overlaps(*pair))}.")
    assert "the effect is ±1.00" in chart.caption  # one training recites all samples for longer than another
    assert chart.legend_title == "strings"


def test_one_string_has_an_interval_over_its_samples():
    sweep, frame = of_two_mixes(seeds=1)
    caption = by_name(sample_figures(sweep, frame, of_mixes(sweep, frame)))["mixes"].caption
    # Of 40 differences 7 are 0; the others have the ranks 8 to 40, 792 together, and 6 of -1 share 8 to 20 with 7 of 1.
    assert f"native ones: +{(792 - 2 * 6 * 14) / 792:.2f} [" in caption
    assert "mixes" not in by_name(sample_figures(sweep, frame, None))


NEAR = {"nearest_input": [0.1, 0.2, 0.3, 0.4, None], "nearest_full": [None] * 5}


def near(lengths: Sequence[int], columns: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """Columns that stand with the first epoch alone."""
    before = {name: pa.array(values, type=pa.float64()) for name, values in columns.items()}
    after = {name: pa.nulls(len(values), pa.float64()) for name, values in columns.items()}
    tables = [sample_rows(recited(each), epoch=epoch, places=[*range(10, 15)], beside=beside)
              for each, epoch, beside in (([9] * 5, 0, before), (lengths, LAST, after))]  # fmt: skip
    return pa.concat_tables(tables)


def test_samples_are_drawn_by_their_nearest_neighbour_before_training_where_it_was_looked_for():
    figures = drawn([near([1, 3, 2, 4, 50], NEAR), near([1, 2, 3, 4, 0], NEAR)])
    (trace,) = figures["nearest-input"].traces
    assert trace.x == [0.1, 0.2, 0.3, 0.4] * 2
    assert trace.y == [1, 3, 2, 4, 1, 2, 3, 4]
    assert trace.hover[:5] == ["row 10", "row 11", "row 12", "row 13", "row 10"]
    assert figures["nearest-input"].caption.endswith("median over replicates: +0.90.")  # of 0.8 and 1
    assert "nearest-full" not in figures
    assert not {"nearest-input", "nearest-full"} & drawn([ended(BITS)]).keys()


def test_cells_have_correlations_of_their_own():
    figures = drawn([near([1, 3, 2, 4, 50], NEAR), near([5, 5, 5, 5, 0], NEAR)], OBJECTIVES)
    assert "reference +0.80, whole undefined." in figures["nearest-input"].caption
    both = {"nearest_full": NEAR["nearest_input"], "nearest_input": NEAR["nearest_input"]}
    assert {"nearest-input", "nearest-full"} <= drawn([near([4, 3, 2, 1, 0], both)]).keys()


@pytest.mark.parametrize("number", [1, MAX_POINTS, MAX_POINTS + 1, 9_723])
def test_too_many_points_are_thinned_evenly(number: int):
    shown = np.arange(number)[spaced(number)]
    assert len(shown) <= MAX_POINTS
    assert len(shown) > min(number, MAX_POINTS) / 2 - 1
    assert len({*np.diff(shown)}) <= 1


# --- by epoch and by prefix ----------------------------------------------------------------------------------------

ADDED = {
    "collapse/effective_rank": "effective-rank", "collapse/participation_ratio": "participation",
    "collapse/intrinsic_dimension": "intrinsic", "facts/rank_told": "fact-told", "facts/rank_unseen": "fact-unseen",
}  # fmt: skip


@pytest.mark.parametrize("key", ADDED)
def test_a_metric_has_its_curve_where_it_was_measured_and_nowhere_else(key: str):
    rows = {epoch: BY_EPOCH | {key: float(epoch), f"{key}_controls": 16.0} for epoch in (0, 10, LAST)}
    rows[5] = BY_EPOCH  # not probed for it
    figures = by_name(study_figures(*corpora(seeds=2, rows=rows)))
    assert {*ADDED.values()} & figures.keys() == {ADDED[key]}
    line, *controls = figures[ADDED[key]].traces
    assert (line.x, line.y) == ([0, 10, LAST], [0.0, 10.0, float(LAST)])
    assert [each.y for each in controls] == ([[16.0] * 3] if key.startswith("facts/") else [])


def test_what_is_recited_is_drawn_by_what_is_given_at_the_last_epoch():
    def rows(extra: float) -> Rows:
        ends = {f"prefix/match_{given}": given + extra for given in (0, 4, 16)}
        return {0: BY_EPOCH | dict.fromkeys(ends, 0.0), LAST: BY_EPOCH | ends}

    sweep = grid("prefix_length", OBJECTIVES, seeds=3, base=CORPUS)
    frame = planted(sweep, lambda trial: rows(trial.string_seed**2))
    chart = by_name(sample_figures(sweep, frame, None))["given"]
    assert [each.name for each in chart.traces] == ["reference", "whole"]
    for trace in chart.traces:
        assert (trace.x, trace.y) == ([0, 4, 16], [1.0, 5.0, 17.0])
        assert (trace.low, trace.high) == ([0.0, 4.0, 16.0], [4.0, 8.0, 20.0])
    assert "given" not in by_name(sample_figures(*corpora(), None))


# --- the page ------------------------------------------------------------------------------------------------------


def test_every_figure_of_samples_can_be_drawn_twice_and_the_claims_table_knows_the_records(tmp_path: Path):
    sweep, frame = of_two_mixes(seeds=1)
    figures = sample_figures(sweep, frame, of_mixes(sweep, frame))
    assert [each.name for each in figures] == [
        "tail-and-loss", "survival", "hazards", "probe-size", "missed", "mixes",
    ]  # fmt: skip
    assert all(f"plot-{each.name}" in to_script(figures) for each in figures)
    for each in figures:
        assert write_png(each, tmp_path).stat().st_size > 5_000
    page, *files = write_report(sweep, frame, tmp_path / "report", records=of_mixes(sweep, frame))
    assert {"mixes.png", "missed.png"} <= {path.name for path in files}
    written = page.read_text(encoding="utf-8")
    assert "A few foreign samples change the tail of the others." in written
    assert "between trainings of one mix the effect is ±1.00" in written


def test_a_claim_that_something_moves_at_all_is_not_held_to_a_bound_of_zero():
    sweep = grid("similarity", [{"training.frozen_embeddings": each} for each in (True, False)], seeds=5, base=CORPUS)
    frame = planted(sweep, lambda trial: {0: BY_EPOCH, LAST: BY_EPOCH | {"match/skewness": float(trial.string_seed)}})
    assert "off 0" in report_page(sweep, frame, [], None, {})


@pytest.mark.parametrize(
    ("key", "value", "name", "sentence"),
    [
        ("generation/disagreement", 0.02, "Match lengths", "up to 2.0% of the samples that were generated too"),
        ("match/heldout_censored", 0.3, "Held-out samples", "up to 30.0% of the held-out samples are recited whole"),
        ("match/tie_rate", 0.05, "Ties", "up to 5.0% of the predictions of an epoch are ties"),
    ],
)
def test_the_health_of_a_corpus_names_what_is_wrong_and_what_nobody_looked_at(
    key: str, value: float, name: str, sentence: str
) -> None:
    sweep = Sweep([CORPUS])
    row = {"trial_id": CORPUS.trial_id(), "epoch": 1}
    fine = {"generation/disagreement": 0.0, "match/heldout_censored": 0.0, "match/tie_rate": 0.0}
    assert [each.state for each in signs(sweep, pd.DataFrame([row | fine]))] == ["fine"] * 3
    wrong = {each.name: each for each in signs(sweep, pd.DataFrame([row | fine | {key: value}]))}
    assert [each.name for each in wrong.values() if each.state == "found"] == [name]
    assert wrong[name].sentence.startswith(sentence)
    assert {each.state for each in signs(sweep, pd.DataFrame([row]))} == {"not measured"}
