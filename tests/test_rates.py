"""The best learning rate of planted results."""

import math

import pytest

from memray.report.rates import best_rates
from memray.spec import TrainingSpec

from .test_report import alphabets, grid, planted

RATES = [{"training.learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]


def test_the_best_rate_is_given_as_a_spec_takes_it() -> None:
    speeds = {1e-4: 30.0, 1e-3: 12.0, 1e-2: 20.0}
    (said,) = best_rates(sweep := grid(RATES), planted(sweep, lambda trial: speeds[trial.training.learning_rate or 0]))
    assert "best rate of pythia tiny: TrainingSpec(learning_rate=0.001)" in said
    assert "may lie beyond" not in said
    stated = said.partition(": ")[2].partition(" (")[0]
    assert eval(stated, {"TrainingSpec": TrainingSpec}).learning_rate == 1e-3


@pytest.mark.parametrize(("falls", "edge"), [(True, "highest"), (False, "lowest")])
def test_a_best_rate_at_the_edge_of_the_grid_is_said_to_be_there(falls: bool, edge: str) -> None:
    sweep = grid(RATES)
    (said,) = best_rates(
        sweep,
        planted(sweep, lambda trial: 20 + (-1 if falls else 1) * 4 * math.log10(trial.training.learning_rate or 1)),
    )
    assert f"it is the {edge} that was tried" in said


def test_a_rate_under_which_most_replicates_are_censored_is_no_candidate() -> None:
    sweep = grid(RATES)

    def speed(trial) -> float:
        if trial.training.learning_rate == 1e-2:
            return 5.0 if trial.string_seed == 0 else math.nan
        return 20.0 if trial.training.learning_rate == 1e-3 else 30.0

    assert "learning_rate=0.001" in best_rates(sweep, planted(sweep, speed))[0]
    assert best_rates(sweep, planted(sweep, lambda trial: math.nan))[0].startswith("no rate of pythia tiny brought")


def test_each_setting_has_a_best_rate_of_its_own() -> None:
    sweep = grid([rate | {"strings.alphabet_size": size} for rate in RATES for size in (2, 26)])
    best = {2: 1e-3, 26: 1e-2}
    said = best_rates(
        sweep,
        planted(
            sweep,
            lambda trial: 10.0 if trial.training.learning_rate == best[trial.strings.alphabet_size] else 20.0,
        ),
    )
    assert ["learning_rate=0.001" in said[0], "learning_rate=0.01" in said[1]] == [True, True]
    assert "strings.alphabet_size=2" in said[0]


def test_a_study_that_moves_no_rate_is_told_nothing() -> None:
    sweep = alphabets(2, 26)
    assert best_rates(sweep, planted(sweep, lambda trial: 10.0)) == []
