"""The table, the trends and the figure of a sweep, on planted results whose answer is known."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from matplotlib.lines import Line2D
from numpy import ndarray
from rich.console import Console

from memray.corpora import CorpusSpec, RowsSpec
from memray.curriculum import CurriculumSpec
from memray.measures.statistics import holm
from memray.report import SPEED, cells_of, factors, interval_text
from memray.report.figure import curves, lines_of, panel_factor, sweep_figure, write_sweep_figure
from memray.report.page import report_page
from memray.report.placement_figure import differences, placement_figure, write_placement_figures
from memray.report.placements import cost_text, placement_groups, placement_table, varies_placement
from memray.report.study_figures import study_figures
from memray.report.table import Trend, cell_table, epochs_below_guessing, health_warnings, result_table, trends
from memray.spec import LoraSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(strings=StringsSpec(length=64), training=TrainingSpec(epochs=40))

Speed = Callable[[TrialSpec], float]


def grid(cells: list[dict[str, Any]], *, seeds: int = 3, base: TrialSpec = BASE) -> Sweep:
    trials = [vary(base, cell | seed) for cell in cells for seed in replicates(base, seeds)]
    return Sweep(trials, name="planted", question="Is what was planted found again?")


def alphabets(*sizes: int, seeds: int = 3) -> Sweep:
    return grid([{"strings.alphabet_size": size} for size in sizes], seeds=seeds)


def planted_trial(
    trial: TrialSpec, speed: float, *, num_epochs: int | None = None, constant: Mapping[str, float] = {}
) -> pd.DataFrame:
    """One trial's rows: recall grows along a logistic curve that passes 1/2 at `speed` (nan: stays at 0)."""
    epochs = np.arange((num_epochs or trial.num_epochs) + 1)
    recall = np.zeros(len(epochs)) if math.isnan(speed) else 1 / (1 + np.exp(-(epochs - speed) / 3))
    guessing = 1 / trial.strings.alphabet_size + 0.02
    rows = pd.DataFrame(
        {
            "trial_id": trial.trial_id(),
            "cell_id": trial.cell_id(),
            **trial.params(),
            "epoch": epochs,
            "recall/robust": recall,
            "recall/token_accuracy": guessing + (1 - guessing) * recall,
            "health/tie_rate": 0.0,
        }
    )
    rows.loc[rows["epoch"] == 0, "string/guesser_accuracy"] = guessing
    probes = rows["epoch"].isin([0, 1, 2, 5, 10, 20, epochs[-1]])
    rows.loc[probes, ["guessing/heldout_accuracy", "guessing/heldout_uncorrected"]] = [guessing - 0.01, -0.1]
    phases = {SPEED: speed, "phase/memorisation": speed / 2, "phase/plateau": 3.0}
    for key, value in phases.items():
        if not math.isnan(value):  # a censored phase is absent
            rows.loc[rows["epoch"] == epochs[-1], key] = value
    return rows.assign(**constant)


def planted(sweep: Sweep, speed: Speed) -> pd.DataFrame:
    return pd.concat([planted_trial(trial, speed(trial)) for trial in sweep.trials], ignore_index=True)


def by_seed(*speeds: float) -> Speed:
    """The speed of the replicate with that string seed."""
    return lambda trial: speeds[trial.string_seed]


def falling(trial: TrialSpec) -> float:
    return 30.0 - 8 * math.log10(trial.strings.alphabet_size) + trial.string_seed


def rising(trial: TrialSpec) -> float:
    return 10.0 + trial.strings.alphabet_size / 2 + trial.string_seed


def printed(sweep: Sweep, frame: pd.DataFrame, width: int = 160) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for renderable in result_table(sweep, frame):
            console.print(renderable)
    return capture.get()


def without(frame: pd.DataFrame, is_dropped: Any) -> pd.DataFrame:
    return frame.drop(index=frame.index[is_dropped])


def xy(line: Line2D) -> tuple[ndarray, ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speeds", "median", "low", "high", "num_censored", "shown"),
    [
        ((20.0, 10.0, 30.0), 20.0, 10.0, 30.0, 0, "20 [10,30]"),
        ((20.0, math.nan, 30.0), 30.0, 20.0, math.inf, 1, "30 [20,>40]"),
        ((20.0, math.nan, math.nan), math.nan, 20.0, math.inf, 2, ">40 [20,>40]"),
        ((math.nan, math.nan, math.nan), math.nan, math.inf, math.inf, 3, ">40 [>40,>40]"),
        ((20.0, 31.0), 25.5, 20.0, 31.0, 0, "25.5 [20,31]"),
        # Half of an even number arrived: (20 + more than 40) / 2 is known to exceed 30, and no more.
        ((20.0, math.nan), math.nan, 20.0, math.inf, 1, ">30 [20,>40]"),
        ((20.0,), 20.0, 20.0, 20.0, 0, "20"),
    ],
)
def test_a_replicate_that_never_arrived_counts_as_the_latest(
    speeds: tuple[float, ...], median: float, low: float, high: float, num_censored: int, shown: str
):
    sweep = grid([{}], seeds=len(speeds))
    frame = planted(sweep, by_seed(*speeds))
    row = cell_table(sweep, frame).iloc[0]
    np.testing.assert_equal([row[SPEED], row[f"{SPEED}/low"], row[f"{SPEED}/high"]], [median, low, high])
    assert (row["replicates"], row["censored"]) == (len(speeds), num_censored)
    (cell,) = cells_of(sweep, frame).values()
    assert str(cell.centre(SPEED)) == shown


def test_the_table_has_a_row_a_cell_in_the_order_of_the_sweep():
    sweep = alphabets(26, 2, 7)
    table = cell_table(sweep, planted(sweep, falling).sample(frac=1, random_state=0))
    assert table["strings.alphabet_size"].tolist() == [26, 2, 7]
    assert table.index.tolist() == list(sweep.cells())
    assert not {"string_seed", "model_seed"} & set(table)
    assert table["recall/robust"].tolist() == pytest.approx(
        [1 / (1 + math.exp(-(40 - (30 - 8 * math.log10(size) + 1)) / 3)) for size in (26, 2, 7)]
    )


def test_a_cell_whose_trials_are_unfinished_keeps_its_row():
    sweep = alphabets(2, 7)
    frame = planted(sweep, falling)
    lacking = [trial.trial_id() for trial in sweep.trials if trial.strings.alphabet_size == 7][1:]
    text = printed(sweep, without(frame, frame["trial_id"].isin(lacking)))
    assert "1 of 3" in text
    table = cell_table(sweep, without(frame, frame["strings.alphabet_size"] == 7))
    assert table["replicates"].tolist() == [3, 0]
    assert math.isnan(table[SPEED].iloc[1])


def test_a_replicate_without_a_robust_measure_is_undefined_and_not_late():
    sweep = grid([{}])
    frame = planted(sweep, by_seed(20.0, 30.0, math.nan))
    frame.loc[frame["string_seed"] == 2, "recall/robust"] = math.nan
    row = cell_table(sweep, frame).iloc[0]
    assert (row["replicates"], row["censored"], row[SPEED]) == (3, 0, 25.0)
    assert not math.isnan(row["recall/robust"])


def test_a_sweep_without_any_robust_measure_shows_no_trend_and_no_number():
    sweep = alphabets(2, 7)
    frame = planted(sweep, lambda trial: math.nan).drop(columns="recall/robust")
    assert trends(sweep, frame) == []
    (first, _) = cells_of(sweep, frame).values()
    assert str(first.centre(SPEED)) == str(first.centre("recall/robust")) == "–"


def test_a_part_that_some_trials_lack_is_shown_by_what_they_state_of_it():
    base = TrialSpec(
        corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=12), model=ModelSpec(size="tiny-text")
    )
    foreign = {"corpus.foreign": RowsSpec(generator="facts"), "corpus.num_foreign": 4}
    sweep = grid([{"corpus.num_samples": 16}, foreign], base=base)
    told = ["corpus.foreign.generator", "corpus.num_foreign", "corpus.num_samples"]
    assert list(sweep.varying()) == [*told, "model_seed", "string_seed"]
    frame = planted(sweep, lambda trial: 20.0)
    assert list(cell_table(sweep, frame).columns[:4]) == [*told, "replicates"]
    assert "split" not in printed(sweep, frame)


def test_a_part_of_defaults_that_some_trials_lack_still_tells_them_apart():
    base = TrialSpec(strings=StringsSpec(num_strings=4))
    sweep = grid([{}, {"curriculum": CurriculumSpec()}, {"model.lora": LoraSpec()}], base=base, seeds=1)
    rows = {tuple(trial.params()[name] for name in sweep.varying()) for trial in sweep.trials}
    assert len(rows) == 3


def test_a_single_trial_is_a_table_without_intervals_and_without_trends():
    sweep = Sweep([BASE])
    text = printed(sweep, planted(sweep, lambda trial: 20.0))
    assert "Medians over replicates;" in text
    assert "rises over" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_narrow_terminal_folds_the_table_and_loses_nothing(width: int):
    sweep = alphabets(2, 7)
    frame = planted(sweep, by_seed(11.0, 22.0, math.nan))
    table = "".join(printed(sweep, frame, width).split("Medians")[0].split())
    for character in "…":
        assert character not in table
    assert sorted(c for c in table if c.isdigit()) == sorted(
        c for c in "".join(printed(sweep, frame).split("Medians")[0].split()) if c.isdigit()
    )


# --- trends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("speed", "direction"), [(falling, "falls"), (rising, "rises")])
def test_a_planted_trend_is_found_with_its_direction(speed: Speed, direction: str):
    sweep = alphabets(7, 2, 26)
    (trend,) = trends(sweep, planted(sweep, speed))
    assert trend.direction == direction
    assert trend.levels == (2, 7, 26)
    # All 27 pairs in order, one way of 1,680 to deal nine replicates to three levels; twice that is two-sided.
    assert (trend.statistic, trend.num_pairs) == (0.0 if direction == "falls" else 27.0, 27)
    assert trend.p_value == trend.adjusted_p_value == pytest.approx(2 / 1680)
    assert trend.sentence().startswith(
        f"{SPEED} {direction} as strings.alphabet_size rises over 2, 7, 26 "
        "(Jonckheere–Terpstra, Holm-adjusted p = 0.0012, 3 replicates a level); fewer than 5 replicates a level;"
    )


def test_noise_is_called_undecided():
    sweep = alphabets(2, 7, 26, seeds=5)
    noise = np.random.default_rng(3).permutation(15.0 + np.arange(15.0)).reshape(3, 5)
    frame = planted(sweep, lambda trial: noise[(2, 7, 26).index(trial.strings.alphabet_size), trial.string_seed])
    (trend,) = trends(sweep, frame)
    assert trend.adjusted_p_value > 0.05
    assert trend.sentence().startswith(f"undecided whether {SPEED} moves as strings.alphabet_size rises")


def test_replicates_that_never_arrived_come_last_in_a_trend():
    sweep = alphabets(2, 7, 26)
    frame = planted(sweep, lambda trial: math.nan if trial.strings.alphabet_size == 2 else falling(trial))
    (trend,) = trends(sweep, frame)
    assert (trend.direction, trend.statistic) == ("falls", 0.0)
    assert "3 of 9 replicates did not reach it in 40 epochs and count as the latest" in trend.notes


def test_a_sweep_in_which_nothing_was_reached_stays_level():
    sweep = alphabets(2, 7)
    frame = planted(sweep, lambda trial: math.nan)
    assert SPEED not in frame
    (trend,) = trends(sweep, frame)
    assert (trend.direction, trend.p_value) == ("stays level", 1.0)


def test_the_entropy_that_follows_from_the_alphabet_is_no_trend_of_its_own():
    sweep = alphabets(2, 7, 26)
    assert "strings.entropy_bits" in sweep.varying()
    assert factors(sweep) == ("strings.alphabet_size",)
    (trend,) = trends(sweep, planted(sweep, falling))
    assert trend.factor == "strings.alphabet_size"
    assert "strings.entropy_bits moves with it, from 1 to 4.7" in trend.notes


def test_cells_are_compared_only_where_all_other_fields_are_equal():
    sweep = grid(
        [{"strings.alphabet_size": size} for size in (2, 7, 26)]
        + [{"strings.alphabet_size": 26, "strings.entropy_bits": bits} for bits in (2.807, 1.0)]
    )
    found = {trend.factor: trend for trend in trends(sweep, planted(sweep, falling))}
    assert found["strings.alphabet_size"].levels == (2, 7, 26)
    assert found["strings.alphabet_size"].held == {"strings.entropy_bits": None}
    # The uniform source is the level of the largest entropy, log2(26).
    assert found["strings.entropy_bits"].levels == (1.0, 2.807, pytest.approx(math.log2(26), abs=1e-6))
    assert found["strings.entropy_bits"].held == {"strings.alphabet_size": 26}
    assert "at strings.alphabet_size = 26 (" in found["strings.entropy_bits"].sentence()


def test_fields_that_move_together_belong_to_no_trend():
    sweep = grid([{"strings.num_strings": 1, "strings.length": 64}, {"strings.num_strings": 2, "strings.length": 32}])
    assert trends(sweep, planted(sweep, lambda trial: 20.0 + trial.string_seed)) == []


def test_a_field_without_an_order_has_no_trend():
    sweep = grid([{"model.family": family} for family in ("pythia", "gpt2", "llama2")])
    assert "model.family" in factors(sweep)
    assert trends(sweep, planted(sweep, lambda trial: 20.0 + trial.string_seed)) == []


def test_trends_are_adjusted_together_by_holm():
    cells = [{"strings.alphabet_size": size, "strings.length": length} for size in (2, 7, 26) for length in (32, 64)]
    sweep = grid(cells)
    frame = planted(sweep, lambda trial: falling(trial) - 5 + trial.strings.length / 32)
    found = trends(sweep, frame)
    assert [trend.factor for trend in found] == ["strings.alphabet_size"] * 2 + ["strings.length"] * 3
    p_values = np.array([trend.p_value for trend in found])
    assert [trend.adjusted_p_value for trend in found] == holm(p_values).tolist()
    assert found[0].adjusted_p_value == pytest.approx(5 * 2 / 1680)
    alone = alphabets(2, 7, 26)
    assert trends(alone, planted(alone, falling))[0].p_value == found[0].p_value


def test_two_levels_of_three_replicates_are_said_to_be_too_few():
    sweep = alphabets(2, 26)
    (trend,) = trends(sweep, planted(sweep, falling))
    assert trend.p_value == pytest.approx(0.1)
    assert "fewer than 5 replicates a level, too few for this test to give p below 0.1" in trend.notes


def test_five_replicates_a_level_need_no_reservation():
    sweep = alphabets(2, 26, seeds=5)
    (trend,) = trends(sweep, planted(sweep, falling))
    assert not any("fewer" in note for note in trend.notes)


def test_a_level_without_results_is_left_out_of_its_trend():
    sweep = alphabets(2, 7, 26)
    frame = planted(sweep, falling)
    (trend,) = trends(sweep, without(frame, frame["strings.alphabet_size"] == 7))
    assert trend.levels == (2, 26)


def test_a_tiny_p_value_is_not_printed_as_zero():
    trend = Trend(
        factor="strings.length", levels=(1.0, 2.0), held={}, replicates=(9, 8), statistic=0.0, num_pairs=72,
        p_value=1e-5, adjusted_p_value=1e-5, notes=(),
    )  # fmt: skip
    assert trend.sentence().endswith("Holm-adjusted p < 0.001, 8 to 9 replicates a level)")


def test_of_many_levels_the_first_and_the_last_are_named():
    levels = tuple(map(float, range(1, 101)))
    trend = Trend(
        factor="strings.length", levels=levels, held={}, replicates=(5,) * 100, statistic=0.0, num_pairs=72,
        p_value=0.5, adjusted_p_value=0.5, notes=(),
    )  # fmt: skip
    assert "as strings.length rises over 100 levels from 1 to 100 (" in trend.sentence()


# --- health ------------------------------------------------------------------------------------------------------


def health_of(constant: Mapping[str, float]) -> dict[str, str]:
    return health_warnings(Sweep([BASE]), planted_trial(BASE, 20.0, constant=constant))


def test_a_healthy_trial_has_no_warning():
    assert health_of({}) == {}


@pytest.mark.parametrize(
    ("constant", "sign"),
    [
        ({"health/tie_rate": 0.02}, "tie rate above 1 %"),
        ({"recall/token_accuracy": 0.0}, "token accuracy below guessing"),
        ({"guessing/heldout_uncorrected": 0.2}, "memory shown on held-out strings"),
        ({"phase/plateau": 0.0}, "no plateau between guessing and memorisation in 1 of 1 trials"),
        ({"phase/plateau": math.nan}, "no plateau between guessing and memorisation in 1 of 1 trials"),
    ],
)
def test_each_sign_of_failure_is_named(constant: Mapping[str, float], sign: str):
    (warning,) = health_of(constant).values()
    assert warning.startswith(sign)


def test_held_out_strings_that_were_guessed_well_before_they_fell_are_no_leak():
    rows = planted_trial(BASE, 20.0)
    rows.loc[rows["epoch"] == 5, "guessing/heldout_uncorrected"] = 0.5
    assert health_warnings(Sweep([BASE]), rows) == {}


@pytest.mark.parametrize(
    ("below", "longest"),
    [([], 0), ([1, 2, 3, 4, 5], 5), ([1, 2, 3, 4, 5, 6], 6), ([1, 3, 5, 7, 9, 11, 13], 1)],
)
def test_the_longest_run_below_guessing_is_counted(below: list[int], longest: int):
    rows = planted_trial(BASE, 20.0)
    rows.loc[rows["epoch"].isin(below), "recall/token_accuracy"] = 0.0
    assert epochs_below_guessing(BASE, rows) == longest


def test_one_standard_error_below_guessing_is_chance():
    guessing = 1 / 26 + 0.02
    num_targets = 63  # 64 symbols without BOS
    error = math.sqrt(guessing * (1 - guessing) / num_targets)
    for num_errors, longest in ((0.99, 0), (1.01, 41)):
        rows = planted_trial(BASE, 20.0, constant={"recall/token_accuracy": guessing - num_errors * error})
        assert epochs_below_guessing(BASE, rows) == longest


@pytest.mark.parametrize(("counts", "words"), [([1], ""), ([], ""), ([3, 1], "for 3 covers"), ([6], "at least 95 %")])
def test_the_interval_is_named_for_what_it_covers(counts: list[int], words: str):
    text = interval_text([[TrialSpec(string_seed=seed) for seed in range(count)] for count in counts])
    assert words in text
    assert bool(words) == bool(text)
    assert "claims" not in text


def test_trials_that_share_what_they_are_trained_on_are_said_to_be_no_independent_replicates():
    trainings = [{"string_seed": seed, "order_seed": order} for seed in range(2) for order in range(3)]
    sweep = Sweep([vary(BASE, cell | seeds) for cell in ({}, {"strings.alphabet_size": 2}) for seeds in trainings])
    frame = planted(sweep, lambda trial: 20.0)
    told = "each trial is a replicate, but 6 share 2 string seeds, and claims count those of one seed as one"
    assert told in " ".join(printed(sweep, frame, width=1000).split())
    assert told in report_page(sweep, frame, [], None, {})
    captions = [each.caption for each in study_figures(sweep, frame) if "bands" in each.caption]
    assert captions
    assert all(told in caption for caption in captions)


# --- the figure --------------------------------------------------------------------------------------------------


def test_a_figure_is_written_and_shows_something(tmp_path: Path):
    sweep = alphabets(2, 7, 26)
    (path,) = write_sweep_figure(sweep, planted(sweep, falling), tmp_path / "new" / "folder")
    assert path.name == "recall.png"
    pixels = np.asarray(imread(path))[..., :3]
    width = pixels.shape[1]
    assert width >= 1500
    is_coloured = pixels.max(axis=2) - pixels.min(axis=2) > 0.2
    # Curves in each of the two panels, and their names beside them.
    for left, right in ((0.08, 0.38), (0.46, 0.74), (0.76, 0.82)):
        assert is_coloured[:, int(left * width) : int(right * width)].sum() > 50


def test_figures_are_equal_where_the_data_are_and_differ_where_they_differ(tmp_path: Path):
    sweep = alphabets(2, 7, seeds=2)
    frames = [planted(sweep, speed) for speed in (falling, falling, rising)]
    first, again, other = (
        write_sweep_figure(sweep, frame, tmp_path / str(index))[0].read_bytes() for index, frame in enumerate(frames)
    )
    assert first == again
    assert first != other


def test_a_line_is_the_median_over_replicates_and_ends_with_the_first_of_them():
    sweep = grid([{}])
    frame = pd.concat(
        [
            planted_trial(trial, 10.0 + 5 * trial.string_seed, num_epochs=40 - 10 * trial.string_seed)
            for trial in sweep.trials
        ]
    )
    figure = sweep_figure(sweep, frame)
    (drawn,) = [xy(line) for line in figure.axes[1].lines if len(xy(line)[0]) > 2]
    np.testing.assert_array_equal(drawn[0], np.arange(21))
    np.testing.assert_allclose(drawn[1], 1 / (1 + np.exp(-(np.arange(21) - 15.0) / 3)))


def test_baselines_are_drawn():
    sweep = alphabets(2, 26)
    accuracy, robust = sweep_figure(sweep, planted(sweep, falling)).axes
    dotted = [xy(line)[1] for line in accuracy.lines if line.get_linestyle() == ":"]
    assert {round(float(heights[0]), 3) for heights in dotted} == {0.52, round(1 / 26 + 0.02, 3)}
    markers = [xy(line)[0].tolist() for line in accuracy.lines if line.get_marker() == "o"]
    assert markers == [[0, 1, 2, 5, 10, 20, 40]] * 2
    assert [xy(line)[1].tolist() for line in robust.lines if line.get_linestyle() == ":"] == [[0.0, 0.0]]


def test_replicates_without_a_metric_are_left_out_of_its_line():
    sweep = grid([{}])
    frame = planted(sweep, by_seed(10.0, 20.0, 30.0))
    frame.loc[frame["string_seed"] == 2, "recall/robust"] = math.nan
    assert curves(frame, sweep.trials, "recall/robust").shape == (41, 2)
    assert curves(frame, sweep.trials, "no/such_metric").empty


@pytest.mark.parametrize("robust", [math.nan, None])
def test_a_sweep_without_a_robust_measure_still_has_a_figure(robust: float | None, tmp_path: Path):
    sweep = Sweep([BASE])
    frame = planted(sweep, lambda trial: math.nan)
    frame = frame.drop(columns="recall/robust") if robust is None else frame.assign(**{"recall/robust": robust})
    assert write_sweep_figure(sweep, frame, tmp_path)[0].stat().st_size > 10_000


def test_levels_are_drawn_in_their_order_whatever_the_order_of_the_sweep():
    sweep = alphabets(26, 2, 13, 7)
    lines, title = lines_of(sweep, planted(sweep, falling))
    assert title == "strings.alphabet_size"
    assert [line.label for line in lines] == ["2", "7", "13", "26"]


def test_a_large_grid_gets_a_row_of_panels_a_level_and_equal_levels_equal_colours():
    cells = [
        {"strings.alphabet_size": size, "strings.length": length} for size in (2, 4, 7, 13, 26) for length in (16, 32)
    ]
    sweep = grid(cells, seeds=1)
    frame = planted(sweep, falling)
    lines, title = lines_of(sweep, frame)
    assert title == "strings.alphabet_size"
    assert list(dict.fromkeys(line.panel for line in lines)) == ["strings.length = 16", "strings.length = 32"]
    assert len({(line.label, tuple(line.colour)) for line in lines}) == 5
    assert len(sweep_figure(sweep, frame).axes) == 4


def test_a_small_sweep_has_one_panel_and_a_single_field_is_never_split():
    trials = [vary(BASE, {"strings.alphabet_size": size}) for size in range(2, 27)]
    specs = [trial for trial in trials if isinstance(trial, TrialSpec)]
    assert panel_factor(specs, ["strings.alphabet_size"]) is None
    assert panel_factor(specs[:8], ["strings.alphabet_size", "strings.entropy_bits"]) is None


def test_an_unordered_field_has_colours_without_an_order_and_brings_no_field_that_comes_with_it():
    sweep = grid(
        [{"model.family": family} for family in ("pythia", "gpt2", "llama2")], base=TrialSpec(model=ModelSpec())
    )
    assert "model.bos" in sweep.varying()  # the rule of each family
    lines, title = lines_of(sweep, planted(sweep, lambda trial: 20.0))
    assert (title, [line.label for line in lines]) == ("model.family", ["pythia", "gpt2", "llama2"])
    assert all(isinstance(line.colour, str) for line in lines)


@pytest.mark.parametrize(("longest", "scale"), [(60, "linear"), (400, "symlog")])
def test_budgets_of_different_orders_are_seen_on_a_logarithmic_axis(longest: int, scale: str):
    sweep = grid([{"training.epochs": epochs} for epochs in (20, longest)], seeds=1)
    figure = sweep_figure(sweep, planted(sweep, lambda trial: 10.0))
    assert {axes.get_xscale() for axes in figure.axes} == {scale}


def test_a_trial_without_results_is_counted_in_the_caption():
    sweep = alphabets(2, 7)
    frame = planted(sweep, falling)
    figure = sweep_figure(sweep, without(frame, frame["trial_id"] == sweep.trials[0].trial_id()))
    assert "1 of 6 trials have no result" in figure.get_supxlabel().replace("\n", " ")


# --- placements --------------------------------------------------------------------------------------------------


PLACEMENTS: list[dict[str, Any]] = [
    {},
    {"compute.engine": "deepspeed", "compute.workers": 2},
    {"compute.engine": "deepspeed", "compute.workers": 2, "compute.zero_stage": 3},
]
FOUR_STRINGS = vary(BASE, {"strings.num_strings": 4, "training.strings_per_step": 0})


def placed(*, seeds: int = 1, others: tuple[dict[str, Any], ...] = ({},)) -> Sweep:
    assert isinstance(FOUR_STRINGS, TrialSpec)
    return grid([other | cell for other in others for cell in PLACEMENTS], seeds=seeds, base=FOUR_STRINGS)


def losses(sweep: Sweep) -> pd.DataFrame:
    """A loss that falls alike everywhere, and from epoch 5 on lies 1e-6 higher for each stage of ZeRO."""
    frame = planted(sweep, lambda trial: 20.0)
    stage_of = {trial.trial_id(): trial.compute.zero_stage for trial in sweep.trials}
    later = 1e-6 * np.array([stage_of[trial_id] for trial_id in frame["trial_id"]]) * (frame["epoch"] >= 5)
    return frame.assign(**{"recall/nll_nats": (5 - 0.1 * frame["epoch"] + frame["string_seed"]) * (1 + later)})


def taken(sweep: Sweep, *, communication: bool = True) -> pd.DataFrame:
    """Costs that follow from the spec: 1000 tokens a second on one device, 500 and 250 on two, a tenth more a seed."""
    rows = []
    for trial in sweep.trials:
        compute = trial.compute
        is_counted = communication and compute.engine == "deepspeed"
        slower = compute.workers * (2 if compute.zero_stage == 3 else 1)
        costs = {
            "seconds": 10.0 * slower,
            "tokens_per_s": 1000 / slower * (1 + 0.1 * trial.string_seed) * trial.strings.alphabet_size / 26,
            "peak_gib": 0.75 / compute.workers,
            "communication_gib": 0.125 * (1 + compute.zero_stage) if is_counted else math.nan,
            "communication_s": 1.5 if is_counted else math.nan,
        }
        rows.append({"trial_id": trial.trial_id(), "cell_id": trial.cell_id(), **trial.params(), **costs})
    return pd.DataFrame(rows)


def rows_of(sweep: Sweep, costs: pd.DataFrame) -> list[list[str]]:
    """The table's rows as a person reads them."""
    columns = [column.cells for column in placement_table(sweep, costs).columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]


def test_a_placement_is_a_row_with_what_it_costs_and_its_ratio_to_the_first():
    sweep = placed()
    assert rows_of(sweep, taken(sweep)) == [
        ["torch", "1000", "1.00", "0.750", "–", "–"],
        ["ZeRO 0, 2 workers", "500", "0.50", "0.375", "0.125", "1.50"],
        ["ZeRO 3, 2 workers", "250", "0.25", "0.375", "0.500", "1.50"],
    ]


def test_costs_of_replicates_are_told_from_lowest_to_highest():
    sweep = placed(seeds=3)
    first, second, _ = rows_of(sweep, taken(sweep))
    assert first[1:3] == ["1100 [1000,1200]", "1.00"]
    assert second[1:3] == ["550 [500,600]", "0.50"]


def test_costs_that_nobody_counted_and_trials_that_are_unfinished_are_dashes():
    sweep = placed()
    costs = taken(sweep, communication=False).drop(columns=["communication_gib", "communication_s"])
    unfinished = costs["trial_id"] == sweep.trials[2].trial_id()
    assert [row[1:] for row in rows_of(sweep, without(costs, unfinished))] == [
        ["1000", "1.00", "0.750", "–", "–"],
        ["500", "0.50", "0.375", "–", "–"],
        ["–"] * 5,
    ]


def test_without_the_first_placement_there_is_no_ratio():
    sweep = placed()
    costs = taken(sweep)
    first = costs["trial_id"] == sweep.trials[0].trial_id()
    assert [row[2] for row in rows_of(sweep, without(costs, first))] == ["–"] * 3


def test_placements_are_compared_among_cells_that_are_equal_in_all_else():
    sweep = placed(others=({"strings.alphabet_size": 26}, {"strings.alphabet_size": 13}))
    assert [len(group) for group in placement_groups(sweep).values()] == [3, 3]
    rows = rows_of(sweep, taken(sweep))
    assert [row[0] for row in rows[::3]] == ["strings.alphabet_size = 26", "strings.alphabet_size = 13"]
    assert [row[2:4] for row in rows] == [["1000", "1.00"], ["500", "0.50"], ["250", "0.25"],
                                          ["500", "1.00"], ["250", "0.50"], ["125", "0.25"]]  # fmt: skip


def test_a_sweep_on_one_placement_has_no_table_of_placements():
    assert varies_placement(placed())
    assert not varies_placement(alphabets(2, 7))


def test_a_placement_is_named_by_its_engine_and_by_what_else_of_compute_the_sweep_moves():
    sharded = {"compute.engine": "deepspeed", "compute.workers": 2, "compute.zero_stage": 1}
    cells = [{}, {"compute.threads": 2}, sharded, sharded | {"compute.offload": "optimiser"}]
    sweep = grid(cells, seeds=1, base=vary(FOUR_STRINGS, {}))  # type: ignore[arg-type]
    (group,) = placement_groups(sweep).values()
    assert [placement.label for placement in group] == [
        "torch, threads 1",
        "torch, threads 2",
        "ZeRO 1, 2 workers, threads 1",
        "ZeRO 1, 2 workers, offload optimiser, threads 1",
    ]


@pytest.mark.parametrize(
    ("values", "digits", "shown"),
    [([], 3, "–"), ([0.64], 3, "0.640"), ([1976.1], 4, "1976"), ([123456.0], 4, "123456"), ([0.0], 3, "0"),
     ([1.0, 4.0], 3, "2.50 [1.00,4.00]")],
)  # fmt: skip
def test_a_cost_has_its_significant_digits(values: list[float], digits: int, shown: str):
    assert cost_text(np.array(values, dtype=np.float64), digits) == shown


def test_the_difference_of_a_loss_is_that_of_the_replicates_with_the_same_seeds():
    sweep = placed(seeds=2)
    (placements,) = placement_groups(sweep).values()
    first, _, third = placements
    found = differences(first, third, losses(sweep))
    assert found.shape == (41, 2)
    np.testing.assert_allclose(found.loc[5:], 3e-6, rtol=1e-6)
    np.testing.assert_array_equal(found.loc[:4], 0.0)


def test_the_figure_of_placements_shows_every_loss_and_every_difference_from_the_first():
    sweep = placed()
    (placements,) = placement_groups(sweep).values()
    figure = placement_figure(sweep, placements, losses(sweep), taken(sweep))
    loss, difference, *bars = figure.axes
    assert [line.get_label() for line in loss.lines] == ["torch", "ZeRO 0, 2 workers", "ZeRO 3, 2 workers"]
    stage_0, stage_3, _ = (xy(line)[1] for line in difference.lines)
    assert np.isnan(stage_0).all()  # equal to the last bit
    np.testing.assert_allclose(stage_3[5:], 3e-6, rtol=1e-6)
    assert difference.get_yscale() == "log"
    assert [[round(bar.get_width(), 3) for bar in axes.patches] for axes in bars] == [  # type: ignore[attr-defined]
        [1000, 500, 250], [0.75, 0.375, 0.375], [0.125, 0.5], [1.5, 1.5],
    ]  # fmt: skip


def test_a_figure_of_placements_is_written_where_two_of_them_have_results(tmp_path: Path):
    sweep = placed()
    frame, costs = losses(sweep), taken(sweep)
    (path,) = write_placement_figures(sweep, frame, costs, tmp_path / "new")
    assert path.name == "placements.png"
    assert path.stat().st_size > 10_000
    alone = without(frame, frame["trial_id"] != sweep.trials[0].trial_id())
    assert write_placement_figures(sweep, alone, costs, tmp_path) == []


def test_a_figure_of_placements_is_written_for_each_level_of_what_else_moves(tmp_path: Path):
    sweep = placed(others=({"strings.alphabet_size": 26}, {"strings.alphabet_size": 13}))
    paths = write_placement_figures(sweep, losses(sweep), taken(sweep, communication=False), tmp_path)
    assert [path.name for path in paths] == ["placements-1.png", "placements-2.png"]
