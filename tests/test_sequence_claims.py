"""What is judged of strings one after another: which stages are compared, and what censoring leaves unknown."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from memray.report import SPEED, of_last_stage, stage_ends
from memray.report.claims import CLAIMS
from memray.report.estimands import Evidence
from memray.report.replicates import seen_cells
from memray.report.sequence_estimands import (
    carried_against_fresh_weights,
    memorising_against_fresh_strings,
    over_stages,
    retention_curves,
    savings_on_relearning,
)
from memray.report.verdicts import judge
from memray.spec import TrialSpec
from memray.sweep import Sweep
from tests.test_claims import LAST, REVISITS, SEQUENCES, TRANSFER, Cells, Rows, grid, planted, staged


def found(estimand: Callable[..., list[Evidence]], sweep: Sweep, plant: Callable[[TrialSpec], Rows]) -> list[Evidence]:
    return estimand(seen_cells(sweep, planted(sweep, plant)))


def speeds(of: Callable[[TrialSpec, int], float]) -> Callable[[TrialSpec], Rows]:
    return lambda trial: staged(trial, lambda stage: {SPEED: of(trial, stage)})


# --- rows of stages ------------------------------------------------------------------------------------------------


def test_the_end_of_a_stage_counts_its_own_epochs():
    sweep = grid("sequential", [{"strings.num_strings": 3, "curriculum.weights": "carried"}], seeds=2)
    frame = planted(
        sweep,
        lambda trial: {
            0: {"stage": 0},
            30: {"stage": 0, SPEED: 20.0},
            50: {"stage": 1, SPEED: 9.0},
            55 + trial.string_seed: {"stage": 2, SPEED: 4.0},
        },
    )
    ends = stage_ends(frame.sample(frac=1.0, random_state=0))
    for seed in (0, 1):
        own = ends.loc[ends["string_seed"] == seed].sort_values(by="stage")
        assert own["epoch"].tolist() == [30, 20, 5 + seed]
        assert own[SPEED].tolist() == [20.0, 9.0, 4.0]
    shown = stage_ends(frame.loc[frame["stage"] != 0])
    assert shown.loc[shown["stage"] == 1, "epoch"].tolist() == [25, 25]  # the mean of two stages
    alone = planted(Sweep([TrialSpec()]), lambda trial: {0: {}, 7: {}, 100: {SPEED: 30.0}})
    (end,) = stage_ends(alone).to_dict("records")
    assert (end["stage"], end["epoch"], end[SPEED]) == (0, 100, 30.0)
    pd.testing.assert_frame_equal(of_last_stage(alone), alone)


def test_the_last_stage_is_the_last_that_measured_its_own_strings_and_lends_nothing_from_the_ones_before():
    sweep = grid("transfer", [{"strings.num_strings": 3, "curriculum.unrepeated": (2,)}], seeds=1)
    frame = planted(sweep, lambda trial: staged(trial, lambda stage: {SPEED: 5.0} if stage == 0 else {}))
    frame.loc[frame["stage"] == 2, "recall/robust"] = math.nan
    (last,) = of_last_stage(frame).to_dict("records")
    assert (last["stage"], last["epoch"]) == (1, LAST)
    assert math.isnan(last[SPEED])


# --- which cells, which stages ---------------------------------------------------------------------------------------


def test_claims_about_sequences_and_about_single_strings_see_each_their_own_cells():
    sizes: Cells = [{"strings.alphabet_size": size, "strings.num_strings": 4} for size in (2, 26)]
    both = [*sizes, *({**cell, "curriculum.strings_per_stage": 1} for cell in sizes)]
    sweep = grid("of_a_user", both, seeds=5)
    frame = planted(sweep, _either)
    judged = judge(sweep, frame)
    assert {each.claim.id for each in judged} == {"A3", "B1"}
    for each in judged:
        expected = 30.0 if each.claim.id == "A3" else 7.0
        assert all((values == expected).all() for values in each.evidence.values)


def _either(trial: TrialSpec) -> Rows:
    if trial.curriculum is None:
        return {0: {}, LAST: {SPEED: 30.0}}
    return staged(trial, lambda stage: {SPEED: 7.0})


def test_stages_are_compared_in_bins_that_double_by_the_median_of_each():
    cell = {"strings.num_strings": 10, "curriculum.weights": "carried"}
    late = {2, 6, 7}  # never reached

    def speed(trial: TrialSpec, stage: int) -> float:
        return math.nan if stage in late else 100.0 - 10 * stage + trial.string_seed

    (evidence,) = found(over_stages, grid("sequential", [cell], seeds=2), speeds(speed))
    assert evidence.levels == ("0", "1", "2–3", "4–7", "8–9")
    # Of one stage that arrived and one that did not, the median is as late as can be; of four, it lies with the third.
    np.testing.assert_array_equal(evidence.values, [[100, 101], [90, 91], [math.inf] * 2, [math.inf] * 2, [15, 16]])


def test_stages_that_train_no_new_strings_of_the_source_belong_to_no_trend():
    other = {"stages": (1,), "alphabet": "latin_upper"}
    cell = {"strings.num_strings": 5, "curriculum.revisits": (0,), "curriculum.unrepeated": (2,),
            "curriculum.other": other}  # fmt: skip
    (evidence,) = found(over_stages, grid("sequential", [cell], seeds=2), speeds(lambda trial, stage: 10.0 * stage + 1))
    assert evidence.levels == ("0", "3", "4")
    np.testing.assert_array_equal(evidence.values, [[1, 1], [31, 31], [41, 41]])


def test_a_stage_that_was_followed_for_less_long_is_not_slower_for_it():
    sweep = grid("sequential", [{"strings.num_strings": 2, "curriculum.weights": "carried"}], seeds=2)
    # The second stage stops in vain after 10 epochs: that the first took 20 does not make it faster.
    (evidence,) = found(
        over_stages, sweep, lambda trial: {0: {"stage": 0}, 40: {"stage": 0, SPEED: 20.0}, 50: {"stage": 1}}
    )
    assert np.isinf(evidence.values).all()


def test_the_control_meets_the_same_strings_and_is_compared_in_the_later_half():
    cells = [cell | {"curriculum.replay_share": 0.0} for cell in SEQUENCES]
    cells.append({"strings.num_strings": 8, "curriculum.weights": "carried", "curriculum.replay_share": 0.5})
    is_base = {"base": 50.0, "carried": 10.0}

    def speed(trial: TrialSpec, stage: int) -> float:
        assert trial.curriculum is not None
        return is_base[trial.curriculum.weights] + (stage if stage >= 4 else 100.0)

    sweep = grid("sequential", cells, seeds=2)
    (evidence,) = found(carried_against_fresh_weights, sweep, speeds(speed))
    assert (evidence.where, evidence.what) == ("replay_share 0", "same strings, stages 4–7")
    assert evidence.levels == ("fresh weights", "carried weights")
    np.testing.assert_array_equal(evidence.values, [[55.5, 55.5], [15.5, 15.5]])
    # Weights that begin anew with each stage show no trend that a claim is about.
    assert len(found(over_stages, sweep, speeds(speed))) == 2


def test_what_is_forgotten_is_read_at_the_very_end_or_not_at_all():
    sweep = grid("forgetting", SEQUENCES[:1], seeds=5)
    early = planted(
        sweep, lambda trial: staged(trial, lambda stage: {"sequence/forgetting": 0.5} if stage == 3 else {})
    )
    assert judge(sweep, early) == []


# --- curves --------------------------------------------------------------------------------------------------------


def test_each_curve_is_held_against_the_best_of_the_others():
    aics = {"linear": 130.0, "exponential": 100.0, "power": 112.0, "saturating": 101.0}
    sweep = grid("forgetting", SEQUENCES[:1], seeds=5)
    measured = {f"retention/aic_{name}": aic for name, aic in aics.items()} | {"retention/identifiable": 1.0}
    rows = found(retention_curves, sweep, lambda trial: staged(trial, lambda stage: measured))
    assert [(each.what, each.values[0][0]) for each in rows] == [
        ("linear curve", 30.0), ("exponential curve", -1.0), ("power curve", 12.0), ("saturating curve", 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize("num_unknown", [2, 5])
def test_curves_that_cannot_be_told_apart_are_left_out_and_said_to_be(num_unknown: int):
    sweep = grid("forgetting", SEQUENCES[:1], seeds=5)

    def plant(trial: TrialSpec) -> Rows:
        aics = {f"retention/aic_{name}": 100.0 for name in ("linear", "exponential", "power", "saturating")}
        is_known = trial.string_seed >= num_unknown
        return staged(trial, lambda stage: {"retention/identifiable": float(is_known)} | (aics if is_known else {}))

    judged = judge(sweep, planted(sweep, plant))
    assert [each.claim.id for each in judged] == ["B3"] * 4
    for each in judged:
        assert each.evidence.notes == (f"not identifiable in {num_unknown} of 5 sequences",)
        assert each.num_replicates == (5 - num_unknown,) * 2
        assert each.verdict == "undecided"
        assert math.isnan(each.estimate) == (num_unknown == 5)


# --- relearning and transfer ---------------------------------------------------------------------------------------


def savings(t_again: dict[int, float], t_anew: dict[int, float], followed: int = LAST) -> list[Evidence]:
    """The evidence of T of the last stage by string seed."""

    def plant(trial: TrialSpec) -> Rows:
        *before, last = trial.stages()
        rows: Rows = {LAST * each.index: {"stage": each.index, SPEED: 99.0} for each in before}
        t_last = (t_again if last.is_revisit else t_anew)[trial.string_seed]
        return rows | {LAST * before[-1].index + followed: {"stage": last.index, SPEED: t_last}}

    return found(savings_on_relearning, grid("relearning", REVISITS, seeds=len(t_again)), plant)


def test_savings_are_those_of_each_sequence_by_the_stage_that_is_visited_again():
    rows = savings({0: 10.0, 1: 30.0, 2: 0.0}, {0: 40.0, 1: 20.0, 2: 8.0})
    assert [(each.where, each.what) for each in rows] == [("", "stage 0 again"), ("", "stage 2 again")]
    for each in rows:
        np.testing.assert_allclose(each.values, [[0.75, -0.5, 1.0]])
        assert each.notes == ()


def test_savings_on_what_was_never_reached_are_bounded_or_unknown():
    nan = math.nan
    rows = savings({0: 10.0, 1: nan, 2: nan, 3: 5.0}, {0: nan, 1: 20.0, 2: nan, 3: 0.0}, followed=50)
    for each in rows:
        # At least that; below all numbers; unknown. A new string that was known leaves nothing to save.
        np.testing.assert_array_equal(each.values, [[0.8, -math.inf, nan]])
        assert each.notes == ("not reached in one or both, in 3 of 3 sequences",)


def test_a_new_string_stands_in_the_place_of_a_revisit_only_after_the_same_strings():
    longer: Cells = [*REVISITS[:2], {"strings.num_strings": 6, "curriculum.revisits": ()}]
    assert found(savings_on_relearning, grid("relearning", longer, seeds=2), speeds(lambda trial, stage: 9.0)) == []


def test_transfer_is_told_apart_by_what_was_memorised_before():
    def speed(trial: TrialSpec, stage: int) -> float:
        assert trial.curriculum is not None
        if stage < 3:
            return 99.0
        fresh = 50.0 if trial.curriculum.other else 40.0
        return fresh if trial.curriculum.unrepeated else 30.0 if trial.curriculum.other else 20.0

    rows = found(memorising_against_fresh_strings, grid("transfer", TRANSFER, seeds=2), speeds(speed))
    assert [each.what for each in rows] == [
        "memorised before: the same source",
        "memorised before: alphabet latin_upper; fresh strings of the same source",
        "memorised before: alphabet latin_upper; fresh strings of that",
    ]
    for each, fresh, memorised in zip(rows, (40.0, 40.0, 50.0), (20.0, 30.0, 30.0), strict=True):
        assert each.levels == ("after fresh strings", "after memorising")
        np.testing.assert_array_equal(each.values, [[fresh, fresh], [memorised, memorised]])


def test_every_claim_about_sequences_says_so():
    about = {"A": "strings", "B": "sequences", "C": "corpora"}
    assert all(claim.about == about[claim.id[0]] for claim in CLAIMS)
