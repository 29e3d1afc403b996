"""Phases and speeds against planted histories whose phases are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from memray.measures.phases import PhaseRules, first_at, stays_from, string_phases

EPOCHS = np.arange(41)


def planted_history(epochs: ndarray = EPOCHS, **changes: ndarray) -> dict[str, ndarray]:
    """Alphabet learned at epoch 3, frequencies at 5, memorisation from 12 on, all recalled from 32 on.

    Recall grows by 0.05 an epoch between 12 and 32, and 2 bits a symbol are memorised in all.
    """
    recall = np.clip((epochs - 12) / 20, 0.0, 1.0)
    history = {
        "guessing/alphabet_mass": np.where(epochs >= 3, 0.99, 0.1),
        "guessing/kl_own_bits": np.where(epochs >= 5, 0.01, 1.0),
        "recall/mixture_bits": np.where(epochs >= 12, 0.5, -0.1),
        "recall/mixture_bits_se": np.full(len(epochs), 0.1),
        "recall/robust": recall,
        "recall/token_accuracy": 0.25 + 0.75 * recall,
        "recall/memorised_bits": 2.0 * recall,
    }
    return history | {key.replace("__", "/"): value for key, value in changes.items()}


def phases_of(history: dict[str, ndarray], epochs: ndarray = EPOCHS, **changes: float) -> dict[str, float]:
    settings = {"entropy_bits": 2.0, "num_targets": 100, "steps_per_epoch": 1.0} | changes
    return string_phases(history, epochs, **settings)  # type: ignore[arg-type]


def test_the_phases_and_speeds_of_a_planted_history_are_recovered():
    assert phases_of(planted_history()) == {
        "phase/memorisation": 12.0,
        "phase/distribution_learned": 5.0,
        "phase/plateau": 7.0,
        "phase/epochs_to_robust_25": 17.0,
        "phase/epochs_to_robust_50": 22.0,
        "phase/epochs_to_robust_75": 27.0,
        "phase/epochs_to_robust_90": 30.0,
        "phase/epochs_to_accuracy_50": 19.0,
        "phase/epochs_to_accuracy_90": 30.0,
        "phase/epochs_to_accuracy_99": 32.0,
        # 2 bits a symbol x 100 symbols x half of the recall in 10 epochs of one step
        "phase/bits_per_step": pytest.approx(10.0),
    }


def test_phases_are_epochs_and_not_rows_where_evaluation_is_sparse():
    epochs = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40])
    phases = phases_of(planted_history(epochs), epochs)
    assert phases["phase/memorisation"] == 15.0
    assert phases["phase/distribution_learned"] == 5.0
    assert phases["phase/epochs_to_robust_50"] == 30.0
    assert phases["phase/bits_per_step"] == pytest.approx(2.0 * 100 * (0.9 - 0.4) / 10)


@given(holds=st.lists(st.booleans(), min_size=1, max_size=12))
def test_stays_from_equals_its_literal_definition(holds):
    epochs = 3 * np.arange(len(holds)) + 1
    literal = [int(epochs[i]) for i in range(len(holds)) if all(holds[i:])]
    first = [int(epochs[i]) for i in range(len(holds)) if holds[i]]
    np.testing.assert_equal(stays_from(np.array(holds), epochs), min(literal, default=math.nan))
    np.testing.assert_equal(first_at(np.array(holds), epochs), min(first, default=math.nan))


def test_a_level_that_is_lost_again_is_reached_where_it_begins_to_stay():
    recall = planted_history()["recall/robust"].copy()
    recall[2] = 0.6  # touched by chance during guessing
    recall[35] = 0.7  # lost for one epoch
    phases = phases_of(planted_history(recall__robust=recall))
    assert phases["phase/epochs_to_robust_50"] == 22.0
    assert phases["phase/epochs_to_robust_75"] == 36.0


def test_the_onset_is_where_memory_is_significant_at_every_later_epoch():
    mixture = planted_history()["recall/mixture_bits"].copy()
    mixture[20] = 0.3  # 3 standard errors exactly: not beyond them
    assert phases_of(planted_history(recall__mixture_bits=mixture))["phase/memorisation"] == 21.0


def test_the_distribution_is_learned_at_the_first_epoch_even_if_memorisation_changes_it_later():
    divergence = np.where((EPOCHS >= 5) & (EPOCHS < 12), 0.1, 1.0)  # 0.1 is 5 % of 2 bits
    phases = phases_of(planted_history(guessing__kl_own_bits=divergence))
    assert phases["phase/distribution_learned"] == 5.0


def test_levels_that_are_never_reached_are_missing_values():
    """A string that stays in its guessing phase, as when training stops early."""
    epochs = np.arange(10)
    phases = phases_of(planted_history(epochs), epochs)
    reached = {key: value for key, value in phases.items() if not math.isnan(value)}
    assert reached == {"phase/distribution_learned": 5.0}


def test_a_level_that_is_lost_at_the_last_epoch_is_censored():
    recall = planted_history()["recall/robust"].copy()
    recall[-1] = 0.4
    phases = phases_of(planted_history(recall__robust=recall))
    assert phases["phase/epochs_to_robust_25"] == 17.0
    assert math.isnan(phases["phase/epochs_to_robust_50"])


def test_a_missing_recall_reaches_no_level():
    phases = phases_of(planted_history(recall__robust=np.full(len(EPOCHS), np.nan)))
    speeds = [value for key, value in phases.items() if "robust" in key or key == "phase/bits_per_step"]
    assert len(speeds) == 5
    assert all(math.isnan(value) for value in speeds)
    assert phases["phase/epochs_to_accuracy_50"] == 19.0


def test_overlapping_phases_have_a_negative_plateau():
    late = np.where(EPOCHS >= 20, 0.01, 1.0)
    assert phases_of(planted_history(guessing__kl_own_bits=late))["phase/plateau"] == -8.0


def test_the_plateau_is_missing_where_the_distribution_is_never_learned():
    phases = phases_of(planted_history(guessing__kl_own_bits=np.full(len(EPOCHS), 1.0)))
    assert phases["phase/memorisation"] == 12.0
    assert math.isnan(phases["phase/distribution_learned"])
    assert math.isnan(phases["phase/plateau"])


def test_a_divergence_that_is_missing_is_not_a_learned_distribution():
    phases = phases_of(planted_history(guessing__kl_own_bits=np.full(len(EPOCHS), np.nan)))
    assert math.isnan(phases["phase/distribution_learned"])


def test_the_threshold_of_the_distribution_scales_with_the_entropy():
    divergence = np.where(EPOCHS >= 5, 0.06, 1.0)
    history = planted_history(guessing__kl_own_bits=divergence)
    assert phases_of(history, entropy_bits=2.0)["phase/distribution_learned"] == 5.0
    assert math.isnan(phases_of(history, entropy_bits=1.0)["phase/distribution_learned"])


def test_bits_per_step_count_the_steps_of_an_epoch():
    assert phases_of(planted_history(), steps_per_epoch=4.0)["phase/bits_per_step"] == pytest.approx(2.5)


def test_bits_per_step_are_missing_where_recall_jumps_between_two_evaluations():
    jump = np.where(EPOCHS >= 12, 0.9, 0.0)
    assert math.isnan(phases_of(planted_history(recall__robust=jump))["phase/bits_per_step"])


def test_bits_per_step_are_missing_where_recall_stops_in_between():
    half = np.minimum(planted_history()["recall/robust"], 0.5)
    phases = phases_of(planted_history(recall__robust=half))
    assert phases["phase/epochs_to_robust_25"] == 17.0
    assert math.isnan(phases["phase/bits_per_step"])


def test_the_rules_can_be_changed():
    rules = PhaseRules(onset_standard_errors=5.0, min_alphabet_mass=0.995, max_kl_share=0.5)
    phases = string_phases(
        planted_history(), EPOCHS, entropy_bits=2.0, num_targets=100, steps_per_epoch=1.0, rules=rules
    )
    assert math.isnan(phases["phase/memorisation"]), "0.5 bits are 5 standard errors, not more"
    assert math.isnan(phases["phase/distribution_learned"])
