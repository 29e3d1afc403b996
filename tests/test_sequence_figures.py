"""Figures, tables and signs of sweeps whose trials train strings one after another, on planted results."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from memray.report import OF_LAST_STAGE, SPEED, factors, value_text
from memray.report.charts import Chart, Figure, HeatMap
from memray.report.drawing import to_script, write_png
from memray.report.figure import write_sweep_figure
from memray.report.health import signs
from memray.report.one_string import best_recalled
from memray.report.page import report_page, write_report
from memray.report.rates import best_rates
from memray.report.records import RecordsOf
from memray.report.sequence_figures import (
    DRAWN,
    Matrices,
    drawn_matrices,
    sequence_figures,
    write_sequence_figures,
)
from memray.report.study_figures import study_figures
from memray.report.table import cell_table, health_warnings, trends
from memray.spec import CurriculumSpec, StringsSpec, TrialSpec
from memray.sweep import Sweep
from tests.test_claims import LAST, SEQUENCES, Cells, grid, planted, staged
from tests.test_report import planted_trial

BY_EPOCH = {"robust", "accuracy", "loss", "mass", "kl", "measures", "onset"}
STEPS = 10  # of a stage


def measures(trial: TrialSpec, stage: int) -> dict[str, float]:
    """Of stage k: T is 40 - 4 k plus the seed, half of it guessing; a tenth of what is forgotten a stage."""
    speed = 40.0 - 4 * stage + trial.string_seed
    return {
        SPEED: speed, "phase/memorisation": speed / 2, "phase/plateau": 3.0, "phase/epochs_to_robust_90": 2 * speed,
        "recall/token_accuracy": 1.0, "sequence/recall_seen": 1 - 0.1 * stage, "sequence/forgetting": 0.1 * stage,
        "sequence/forward_transfer": 0.0, "guessing/heldout_uncorrected": -0.1, "health/tie_rate": 0.0,
    }  # fmt: skip


def sequences(cells: Cells = SEQUENCES, *, seeds: int = 3) -> tuple[Sweep, pd.DataFrame]:
    sweep = grid("sequential", cells, seeds=seeds)
    return sweep, planted(sweep, lambda trial: staged(trial, lambda stage: measures(trial, stage)))


def matrix(trial: TrialSpec, *, lost: float = 0.5, level: float = 0.0) -> pd.DataFrame:
    """What remains of a string halves with each stage after its own, over what held-out strings show."""
    rows, strings = [], range(trial.strings.num_strings)
    learned = dict.fromkeys(strings, -1)
    for stage in trial.stages():
        step = STEPS * (stage.index + 1)
        place = {"stage": stage.index, "step": step, "is_held_out": False, "source": 0, "is_end": True}
        for string in strings:
            is_own = string in stage.strings
            recall = 1.0 if is_own else level
            if learned[string] >= 0 and not is_own:
                recall = level + (1 - level) * lost ** (stage.index - learned[string])
            learned_step = STEPS * (learned[string] + 1) if learned[string] >= 0 else -1
            rows.append({**place, "string": string, "learned_step": learned_step, "is_own": is_own,
                         "recall/robust": recall, "recall/token_accuracy": max(0.0, 0.1 + 0.9 * recall)})  # fmt: skip
        rows.append({**place, "string": 0, "is_held_out": True, "learned_step": -1, "is_own": False,
                     "recall/robust": level, "recall/token_accuracy": 0.1})  # fmt: skip
        learned |= dict.fromkeys(stage.strings, stage.index)
    return pd.DataFrame(rows, columns=[*DRAWN])


def matrices(sweep: Sweep, **planted: float) -> dict[str, pd.DataFrame]:
    return {trial.trial_id(): matrix(trial, **planted) for trial in sweep.trials}


class Kept:
    """The records of one trial of which there is a matrix alone."""

    def __init__(self, rows: pd.DataFrame | None = None) -> None:
        self.rows = rows

    def tokens(self) -> pa.Table:
        return pa.table({})

    strings = context = samples = tokens

    def matrix(self) -> pa.Table:
        return pa.table({}) if self.rows is None else pa.Table.from_pandas(self.rows, preserve_index=False)


def records(sweep: Sweep) -> RecordsOf:
    return {trial_id: Kept(rows) for trial_id, rows in matrices(sweep).items()}.__getitem__


def shown(sweep: Sweep, frame: pd.DataFrame, seen: Matrices | None = None) -> dict[str, Figure]:
    return {each.name: each for each in sequence_figures(sweep, frame, seen)}


def charts(found: Mapping[str, object], name: str) -> Chart:
    each = found[name]
    assert isinstance(each, Chart)
    return each


def maps(found: Mapping[str, object], name: str = "strings") -> HeatMap:
    each = found[name]
    assert isinstance(each, HeatMap)
    return each


# --- which figures -------------------------------------------------------------------------------------------------


def test_a_curriculum_has_no_course_by_epoch_and_figures_of_its_own():
    sweep, frame = sequences()
    names = [each.name for each in study_figures(sweep, frame, records(sweep))]
    assert names == ["acceleration", "acceleration90", "guessing", "memorising", "seen", "forgetting", "forward",
                     "retention", "fits", "strings", "speed"]  # fmt: skip


def test_what_has_no_curriculum_beside_it_keeps_its_courses():
    cells: Cells = [{"strings.num_strings": 4, "curriculum.weights": "carried"}, {"strings.num_strings": 4}]
    sweep = grid("sequential", cells, seeds=2)
    parts = [
        planted_trial(trial, 20.0) if trial.curriculum is None
        else planted(Sweep([trial]), lambda trial: staged(trial, lambda stage: measures(trial, stage)))
        for trial in sweep.trials
    ]  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    figures = {each.name: each for each in study_figures(sweep, frame)}
    assert {"robust", "accuracy", "acceleration"} <= figures.keys()
    assert len([each for each in charts(figures, "robust").traces if each.name != "guessing"]) == 1
    assert len([each for each in charts(figures, "acceleration").traces if each.name]) == 1
    states = {each.name: each for each in signs(sweep, frame)}
    assert states["Guessing"].state == "fine"
    assert states["Guessing"].sentence.endswith("curricula were not looked at")
    best = best_recalled(sweep, frame)
    assert best is not None
    assert best.curriculum is None


def test_a_curriculum_of_defaults_is_told_apart_from_none():
    sweep = Sweep([TrialSpec(strings=StringsSpec(num_strings=4), curriculum=each) for each in (None, CurriculumSpec())])
    assert factors(sweep) == ("curriculum.strings_per_stage",)


def test_longer_sequences_differ_in_one_field():
    cells: Cells = [{"strings.num_strings": number, "curriculum.weights": "carried"} for number in (2, 4)]
    sweep, frame = sequences(cells, seeds=2)
    assert factors(sweep) == ("strings.num_strings",)
    (trend,) = trends(sweep, frame)
    assert trend.direction == "falls"


def test_a_sweep_without_a_curriculum_has_none_of_these_figures():
    sweep = grid("alphabet", [{"strings.alphabet_size": 2}], seeds=2)
    frame = pd.concat([planted_trial(trial, 20.0) for trial in sweep.trials], ignore_index=True)
    assert sequence_figures(sweep, frame) == []
    assert OF_LAST_STAGE not in str(study_figures(sweep, frame)).lower()


def test_the_figure_by_epoch_is_not_drawn_of_curricula_and_those_by_stage_are(tmp_path: Path):
    sweep, frame = sequences()
    assert write_sweep_figure(sweep, frame, tmp_path) == []
    names = [path.name for path in write_sequence_figures(sweep, frame, tmp_path)]
    assert "acceleration.png" in names
    assert "forgetting.png" in names
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


# --- by stage ------------------------------------------------------------------------------------------------------


def test_each_quantity_by_stage_is_a_line_a_cell_with_its_replicates_as_a_band():
    sweep, frame = sequences()
    figures = shown(sweep, frame)
    stages = np.arange(8)
    for name, expected in (
        ("acceleration", 41 - 4 * stages),
        ("acceleration90", 2 * (41 - 4 * stages)),
        ("guessing", (41 - 4 * stages) / 2),
        ("memorising", 1.5 * (41 - 4 * stages)),
        ("seen", 1 - 0.1 * stages),
        ("forgetting", 0.1 * stages),
    ):
        lines = [each for each in charts(figures, name).traces if each.name]
        # Weights that begin anew with each stage have nothing to forget.
        assert [each.name for each in lines] == (["carried"] if name == "forgetting" else ["carried", "base"])
        for line in lines:
            assert [*line.x] == [1, 2, 3, 4, 5, 6, 7, 8]
            np.testing.assert_allclose(line.y, expected)
    line = next(each for each in charts(figures, "acceleration").traces if each.name)
    np.testing.assert_allclose([line.low, line.high], [40 - 4 * stages, 42 - 4 * stages])
    hollow = [each for each in charts(figures, "seen").traces if each.style.marker.endswith("-open")]
    assert [[*each.y] for each in hollow] == [[0.9] * 8] * 2


def test_a_stage_that_most_replicates_never_memorised_is_an_arrow_above_and_breaks_the_line():
    sweep, frame = sequences(SEQUENCES[:1])
    is_late = (frame["stage"] == 3) & (frame["string_seed"] > 0)
    frame.loc[is_late, [SPEED, "phase/epochs_to_robust_90"]] = math.nan
    drawn = charts(shown(sweep, frame), "acceleration")
    line, arrows = drawn.traces
    assert math.isnan(line.y[3])
    assert (line.low[3], line.high[3]) == (28.0, LAST)
    assert [*arrows.x] == [4]
    assert arrows.y[0] > LAST


def test_an_unrepeated_stage_has_no_place_in_what_it_did_not_measure():
    sweep = grid("transfer", [{"strings.num_strings": 3, "curriculum.unrepeated": (0, 1)}], seeds=2)
    frame = planted(sweep, lambda trial: staged(trial, lambda stage: measures(trial, 2) if stage == 2 else {}))
    frame.loc[frame["stage"] < 2, "recall/robust"] = math.nan
    drawn = charts(shown(sweep, frame), "acceleration")
    assert [[*each.x] for each in drawn.traces] == [[3], []]


def test_many_stages_are_put_together_along_a_logarithmic_axis():
    sweep = grid("sequential", [{"strings.num_strings": 600, "curriculum.weights": "carried"}], seeds=1)
    # One stage of a hundred is as late as can be, which moves no median of its neighbours.
    speeds = [math.nan if stage == 400 else 30.0 - stage / 100 for stage in range(600)]
    frame = planted(sweep, lambda trial: staged(trial, lambda stage: {SPEED: speeds[stage]}))
    drawn = charts(shown(sweep, frame), "acceleration")
    line, arrows = drawn.traces
    assert drawn.x_scale == "log"
    assert [*line.x[:4]] == pytest.approx([1, 2, 3, 4])
    assert 15 < len(line.x) <= 30
    assert "median of its neighbouring stages" in drawn.caption
    assert [*line.y] == pytest.approx([30.0 - (float(x) - 1) / 100 for x in line.x], abs=0.05)
    assert len(arrows.x) == 0


# --- by age --------------------------------------------------------------------------------------------------------


def test_retention_is_recall_by_steps_since_a_string_was_learned_beside_the_held_out_level():
    sweep, frame = sequences()
    found = shown(sweep, frame, matrices(sweep, level=0.02))
    drawn = charts(found, "retention")
    points, held_out = drawn.traces  # weights that begin anew with each stage have nothing to forget
    assert points.name == "carried"
    assert points.style.dash == ""
    assert [*points.x] == pytest.approx(STEPS * np.arange(1, 8))
    np.testing.assert_allclose(points.y, 0.02 + 0.98 * 0.5 ** np.arange(1, 8))
    np.testing.assert_allclose(held_out.y, [0.02, 0.02])
    assert drawn.x_scale == "log"


def test_points_by_age_are_medians_over_replicates_with_bars():
    sweep, frame = sequences(SEQUENCES[:1])
    lost = (0.5, 0.6, 0.9)
    seen = {trial.trial_id(): matrix(trial, lost=lost[trial.string_seed]) for trial in sweep.trials}
    points = charts(shown(sweep, frame, seen), "retention").traces[0]
    for values, share in ((points.low, 0.5), (points.y, 0.6), (points.high, 0.9)):
        np.testing.assert_allclose(values, share ** np.arange(1, 8))


def test_bars_of_points_are_drawn_as_bars_and_not_as_a_band(tmp_path: Path):
    sweep, frame = sequences(SEQUENCES[:1])
    lost = (0.5, 0.6, 0.9)
    seen = {trial.trial_id(): matrix(trial, lost=lost[trial.string_seed]) for trial in sweep.trials}
    drawn = charts(shown(sweep, frame, seen), "retention")
    script = to_script([drawn])
    plots = json.loads(re.findall(r"entries\((.*)\)\) Plotly", script)[0])["plot-retention"]["data"]
    assert len(plots) == len(drawn.traces)
    bars = plots[0]["error_y"]
    np.testing.assert_allclose(bars["array"], 0.9 ** np.arange(1, 8) - 0.6 ** np.arange(1, 8), rtol=1e-4)
    np.testing.assert_allclose(bars["arrayminus"], 0.6 ** np.arange(1, 8) - 0.5 ** np.arange(1, 8), rtol=1e-4)
    assert write_png(drawn, tmp_path).stat().st_size > 10_000


def test_a_string_that_is_visited_again_is_young_again():
    sweep, frame = sequences([{"strings.num_strings": 3, "curriculum.revisits": (0,)}])
    seen = {trial.trial_id(): matrix(trial) for trial in sweep.trials}
    points = charts(shown(sweep, frame, seen), "retention").traces[0]
    assert [*points.x] == pytest.approx([10.0, 20.0])
    assert [*points.y] == pytest.approx([0.5, 0.25])


def test_many_ages_are_put_into_bins():
    sweep = grid("sequential", [{"strings.num_strings": 60, "curriculum.weights": "carried"}], seeds=2)
    frame = planted(sweep, lambda trial: staged(trial, lambda stage: {SPEED: 30.0}))
    points = charts(shown(sweep, frame, matrices(sweep)), "retention").traces[0]
    assert 10 <= len(points.x) <= 30
    assert (points.x[0], points.y[0]) == (pytest.approx(10.0), pytest.approx(0.5))
    assert [*points.y] == sorted(points.y, reverse=True)


def test_curves_are_fitted_to_the_accuracies_of_a_cell_and_the_caption_says_which_is_best():
    """What remains halves with each stage of ten steps: an exponential curve, from all tokens right to a tenth."""
    sweep, frame = sequences()
    points, held_out, *curves = charts(shown(sweep, frame, matrices(sweep)), "fits").traces
    np.testing.assert_allclose(points.y, 0.1 + 0.9 * 0.5 ** np.arange(1, 8))
    np.testing.assert_allclose(held_out.y, [0.1, 0.1])
    assert [each.name for each in curves] == ["linear", "exponential", "power", "saturating"]
    exponential = curves[1]
    np.testing.assert_allclose(exponential.y, 0.1 + 0.9 * 0.5 ** (np.array(exponential.x) / 10), atol=0.01)
    assert len({each.style.dash + each.style.colour for each in curves}) == 4
    caption = charts(shown(sweep, frame, matrices(sweep)), "fits").caption
    assert "The best by AIC is exponential, and half is forgotten after 9.94 steps (95 %: 9.94)" in caption
    assert "the best of 100 % of resamples" in caption


def test_a_half_life_beyond_what_was_looked_at_is_not_named():
    sweep, frame = sequences()
    caption = charts(shown(sweep, frame, matrices(sweep, lost=0.95)), "fits").caption
    assert "half is forgotten beyond 70 steps (95 %: beyond)" in caption


def test_where_nothing_is_left_at_the_first_look_no_curve_is_named():
    sweep, frame = sequences()
    drawn = charts(shown(sweep, frame, matrices(sweep, lost=0.0)), "fits")
    assert [each.name for each in drawn.traces] == ["measured", ""]
    assert "No curve is identifiable" in drawn.caption


# --- string by string ----------------------------------------------------------------------------------------------


def test_the_map_shows_every_string_at_every_end_of_a_stage_clipped_to_shares():
    sweep, frame = sequences(SEQUENCES[:1])
    found = shown(sweep, frame, matrices(sweep, level=-0.2))
    drawn = maps(found)
    assert [*drawn.x] == [*drawn.y] == [str(number) for number in range(8)]
    expected = [[1.0 if j == t else max(0.0, -0.2 + 1.2 * 0.5 ** (t - j)) if j < t else 0.0 for j in range(8)]
                for t in range(8)]  # fmt: skip
    np.testing.assert_allclose(drawn.values, expected)
    assert drawn.caption.startswith("Medians over 3 replicates")


def test_replicates_that_are_not_alike_are_not_put_together():
    sweep, frame = sequences(SEQUENCES[:1])
    seen = matrices(sweep)
    first, second, _ = seen
    seen[second] = seen[second].loc[seen[second]["string"] != 5]
    drawn = maps(shown(sweep, frame, seen))
    assert drawn.caption.startswith(f"Trial {first}")


def test_what_was_not_looked_at_stays_white_and_a_look_before_training_has_its_row():
    sweep, frame = sequences(SEQUENCES[:1], seeds=1)
    (trial,) = sweep.trials
    seen = matrix(trial)
    seen = seen.loc[~((seen["stage"] == 5) & (seen["string"] == 1))]
    before = seen.loc[seen["stage"] == 0].assign(stage=-1, step=0, is_own=False)
    before["recall/robust"] = 0.0
    drawn = maps(shown(sweep, frame, {trial.trial_id(): pd.concat([before, seen])}))
    assert [*drawn.y] == ["before", *map(str, range(8))]
    assert (drawn.values[0] == 0).all()
    assert math.isnan(drawn.values[6, 1])
    assert np.isnan(drawn.values).sum() == 1


def test_the_map_of_a_thousand_strings_stays_small(tmp_path: Path):
    cell = {"strings.num_strings": 1000, "curriculum.weights": "carried"}
    sweep = grid("sequential", [cell], seeds=1)
    (trial,) = sweep.trials
    stage, string = np.tril_indices(1000)
    own = stage == string
    step = (stage + 1) * STEPS
    columns = {"stage": stage, "step": step, "string": string, "is_held_out": False, "source": 0,
               "learned_step": np.where(own, -1, (string + 1) * STEPS), "is_own": own, "is_end": True,
               "recall/robust": np.exp((string - stage) / 100), "recall/token_accuracy": 1.0}  # fmt: skip
    frame = planted(sweep, lambda trial: staged(trial, lambda stage: {SPEED: 30.0}))
    figures = sequence_figures(sweep, frame, {trial.trial_id(): pd.DataFrame(columns)})
    drawn = maps({each.name: each for each in figures})
    assert drawn.values.shape == (150, 150)
    assert (drawn.x[0], drawn.x[-1], drawn.y[-1]) == ("0", "999", "999")
    assert "Of 1000 rows and 1000 strings, 150 and 150 are shown." in drawn.caption
    for row, name in enumerate(drawn.y):  # what is shown is where it says
        assert drawn.x[row] == name
        assert drawn.values[row, row] == 1.0
    script = to_script([drawn])
    assert len(script) < 300_000
    plot = json.loads(re.findall(r"entries\((.*)\)\) Plotly", script)[0])["plot-strings"]["data"][0]
    assert plot["hovertemplate"] == "stage %{y}<br>string %{x}<br>robust recall: %{z}<extra></extra>"
    assert write_png(drawn, tmp_path).stat().st_size > 10_000


def test_of_the_records_what_is_drawn_is_kept_and_trials_without_a_matrix_are_left_out():
    sweep, frame = sequences(SEQUENCES[:1], seeds=3)
    first, second, third = (trial.trial_id() for trial in sweep.trials)
    wide = matrix(sweep.trials[0]).assign(epoch=0, **{"recall/nll_nats": 1.0})
    kept = {first: Kept(wide), second: Kept(), third: Kept(wide)}
    found = drawn_matrices(sweep, frame.loc[frame["trial_id"] != third], kept.__getitem__)
    assert [*found] == [first]
    pd.testing.assert_frame_equal(found[first], matrix(sweep.trials[0]))


# --- what is said --------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_last_stage_and_says_so():
    sweep, frame = sequences()
    # The last stage of one replicate never came to it; that earlier ones did is no answer.
    last = frame["stage"] == 7
    frame.loc[last & (frame["string_seed"] == 2), [SPEED, "phase/memorisation"]] = math.nan
    table = cell_table(sweep, frame)
    for row in table.to_dict("records"):
        assert row["replicates"] == 3
        assert row["censored"] == 1
        assert row[SPEED] == 13.0
        assert math.isinf(row[f"{SPEED}/high"])
        assert row["sequence/forgetting"] == pytest.approx(0.7)
    page = report_page(sweep, frame, [], None, {})
    assert OF_LAST_STAGE.capitalize() in page
    # Shown as beyond the epochs of that stage, not of all.
    assert f"13 [12,&gt;{LAST}]" in page


def test_trends_and_rates_of_curricula_say_that_they_are_of_the_last_stage():
    cells: Cells = [
        {"strings.num_strings": 4, "curriculum.weights": "carried", "training.learning_rate": rate}
        for rate in (1e-3, 2e-3)
    ]
    sweep, frame = sequences(cells)
    (trend,) = trends(sweep, frame)
    assert trend.notes[-1] == OF_LAST_STAGE
    (sentence,) = best_rates(sweep, frame)
    assert sentence.endswith(OF_LAST_STAGE)


def test_speed_by_cell_is_that_of_the_last_stage():
    sweep, frame = sequences(SEQUENCES[:1])
    drawn = charts({each.name: each for each in study_figures(sweep, frame)}, "speed")
    assert drawn.title == "Epochs to half of robust recall in the last stage"
    assert [*drawn.traces[0].y] == [12.0, 13.0, 14.0]
    assert OF_LAST_STAGE.capitalize() in drawn.caption


def test_signs_of_failure_are_read_where_a_curriculum_shows_them():
    sweep, frame = sequences()
    # Later stages know the alphabet from their beginning, which is no failure; and stage ends are no run of epochs.
    frame.loc[frame["stage"] > 0, "phase/plateau"] = 0.0
    frame = frame.assign(**{"string/guesser_accuracy": 0.9, "recall/token_accuracy": 0.1})
    states = {each.name: each for each in signs(sweep, frame)}
    assert health_warnings(sweep, frame) == {}
    assert states["Plateau"].state == "fine"
    assert states["Plateau"].sentence.endswith("in the first stage that measured its own strings")
    assert (states["Guessing"].state, states["Guessing"].sentence) == (
        "not measured", "the results of a curriculum are those at its stages' ends"
    )  # fmt: skip
    frame.loc[frame["stage"] == 0, "phase/plateau"] = 0.0
    (warning,) = health_warnings(sweep, frame).values()
    assert warning.startswith("no plateau between guessing and memorisation in 6 of 6 trials, in the first stage")


def test_no_string_of_a_curriculum_is_shown_token_by_token():
    assert best_recalled(*sequences()) is None


def test_many_stages_are_named_in_short():
    assert value_text(",".join(map(str, [*range(99), 120]))) == "0–98, 120"
    assert value_text("0") == "0"


def test_a_report_of_curricula_is_whole(tmp_path: Path):
    sweep, frame = sequences(seeds=5)
    page, *files = write_report(sweep, frame, tmp_path, records=records(sweep))
    text = page.read_text(encoding="utf-8")
    for path in files:
        assert f'id="plot-{path.stem}"' in text
    assert not {path.stem for path in files} & {*BY_EPOCH, "recall", "tokens"}
    assert "Later strings are memorised faster." in text
    assert "0 → 1 → 2–3 → 4–7" in text
