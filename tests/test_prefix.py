"""Curves by k and minimal prefixes against planted scores, literal transcriptions and closed forms."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from memray.measures.prefix import (
    FULL,
    ContextScores,
    chance_prefix,
    context_metrics,
    determining_prefix,
    minimal_prefix,
    share_sufficient,
)
from memray.probes import KEEPS, REPLACEMENTS, Condition, ContextSpec, Replacement
from memray.strings import IidSource

# What is planted under a condition (None: the full prefix): probability, alphabet mass and whether it is the arg-max.
Planted = tuple[float, float, bool]
Plant = Callable[[Condition | None, int, int, int], Planted | None]


def planted_scores(
    spec: ContextSpec, length: int, plant: Plant, *, num_strings: int = 1, bos: bool = False
) -> ContextScores:
    """The scores of a model that recalls what `plant(condition, string, redraw, position)` says."""
    rows: list[tuple] = []
    for string in range(num_strings):
        for condition in (None, *spec.conditions(length)):
            codes = (0, FULL, 1.0, -1)
            positions: Sequence[int] = range(0 if bos else 1, length)
            num_draws = 1
            if condition is not None:
                replacement = REPLACEMENTS.index(condition.replacement)
                codes = (KEEPS.index(condition.keep), condition.k, condition.remote_share, replacement)
                positions = spec.positions(condition, length, bos=bos)
                num_draws = spec.redraws if condition.is_random else 1
            for redraw in range(num_draws):
                for position in positions:
                    planted = plant(condition, string, redraw, position)
                    if planted is not None:
                        rows.append((string, *codes, redraw, position, *planted))
    types = ("i4", "i1", "i4", "f4", "i1", "i1", "i4", "f4", "f4", "?")
    columns = dict(zip(ContextScores.COLUMNS, map(np.array, zip(*rows, strict=True), types), strict=True))
    columns["log_prob"], columns["log_mass"] = np.log(columns["log_prob"]), np.log(columns["log_mass"])
    return ContextScores(**columns, extractable=np.full((num_strings, len(spec.extractable)), 0.5))


def metrics_of(spec: ContextSpec, length: int, plant: Plant, *, num_strings: int = 1) -> dict[str, float]:
    guesses = [np.full(length - 1, -2.0)] * num_strings
    return context_metrics(
        planted_scores(spec, length, plant, num_strings=num_strings),
        planted_scores(spec, length, lambda *where: (0.1, 1.0, False), num_strings=1),
        spec=spec,
        length=length,
        log2_guesses=guesses,
        heldout_log2_guesses=guesses[:1],
    )


# --- curves ------------------------------------------------------------------------------------------------------


def test_a_model_that_needs_the_last_five_tokens_is_seen_to() -> None:
    def needs_five(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        is_right = condition is None or (condition.keep == "local" and condition.k >= 5)
        return (0.9, 1.0, True) if is_right else (0.05, 0.5, False)

    spec = ContextSpec(keep=("local", "remote"), lengths=(0, 2, 5, 9), replacements=("source", "none"), redraws=2)
    metrics = metrics_of(spec, 30, needs_five)
    for name in ("source", "none"):
        accuracies = [metrics[f"context/local_{k}_{name}"] for k in (0, 2, 5, 9, "full")]
        assert accuracies == [0, 0, 1, 1, 1]
        # Nothing replaced is the full prefix, and with everything replaced nothing local is left either.
        assert [metrics[f"context/remote_{k}_{name}"] for k in (0, 2, 5, 9, "full")] == [1, 0, 0, 0, 0]
        assert metrics[f"context_nll_nats/local_5_{name}"] == pytest.approx(-math.log(0.9))
        assert metrics[f"context_mass/local_2_{name}"] == pytest.approx(0.5)
        assert metrics[f"context_heldout/local_full_{name}"] == 0
    assert metrics["context/minimal_prefix"] == 5
    assert metrics["context/sufficient_share"] == 1
    assert metrics["context/sufficient_share_heldout"] == 0
    assert "context/minimal_prefix_heldout" not in metrics


def test_all_lengths_are_compared_where_the_longest_of_them_stands_before_the_target() -> None:
    def right_late(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        return 0.6, 1.0, position >= 9

    metrics = metrics_of(ContextSpec(lengths=(0, 9), redraws=1, replacements=("source",)), 20, right_late)
    assert [metrics[f"context/local_{k}_source"] for k in (0, 9, "full")] == [1, 1, 1]
    assert metrics["context/sufficient_share"] == pytest.approx(11 / 19)


def test_a_curve_is_the_mean_over_strings_redraws_and_positions() -> None:
    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        return (0.2 + 0.1 * string + 0.05 * redraw, 1.0, string == 0 and redraw == 1)

    spec = ContextSpec(lengths=(1,), redraws=2, replacements=("wrong",))
    metrics = metrics_of(spec, 5, plant, num_strings=2)
    assert metrics["context/local_1_wrong"] == 0.25
    expected = -np.mean([math.log(0.2 + 0.1 * string + 0.05 * redraw) for string in (0, 1) for redraw in (0, 1)])
    assert metrics["context_nll_nats/local_1_wrong"] == pytest.approx(expected, rel=1e-6)


def test_undefined_is_absent_and_never_zero() -> None:
    def nothing_alone(condition: Condition | None, string: int, redraw: int, position: int) -> Planted | None:
        is_undefined = condition is not None and condition.is_removal and condition.k == 0
        return None if is_undefined else (0.9, 1.0, True)

    spec = ContextSpec(lengths=(0, 3), replacements=("none",), keep=("local", "remote"), extractable=(2, 40))
    metrics = metrics_of(spec, 20, nothing_alone)
    assert not {"context/local_0_none", "context/remote_full_none"} & metrics.keys()
    assert metrics["context/remote_0_none"] == metrics["context/local_full_none"] == 1
    assert not {key for key in metrics if "prefix" in key or "sufficient" in key}, "that is defined for 'source'"
    assert metrics["extractable/2"] == 0.5


def test_an_extractable_share_is_averaged_over_the_strings_that_have_one() -> None:
    spec = ContextSpec(replacements=(), extractable=(2, 4, 30))
    scores = planted_scores(spec, 8, lambda *where: (0.5, 1.0, True), num_strings=3)
    scores.extractable[:] = [[0.25, math.nan, math.nan], [0.5, 1.0, math.nan], [0.75, math.nan, math.nan]]
    metrics = context_metrics(scores, None, spec=spec, length=8, log2_guesses=[np.full(7, -2.0)] * 3)
    assert metrics == {"extractable/2": 0.5, "extractable/4": 1.0}


def test_the_grid_has_a_cell_for_each_pair_and_its_edges_are_the_full_prefix() -> None:
    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        if condition is None:
            return 0.9, 1.0, True
        assert condition.replacement == "constant"
        return 0.1, 1.0, condition.remote_share >= 0.5 or condition.k >= 25

    spec = ContextSpec(replacements=(), grid=True, grid_replacement="constant", redraws=1)
    metrics = metrics_of(spec, 100, plant)
    cells = {key.removeprefix("context_grid/"): value for key, value in metrics.items()}
    expected = {
        f"{local}_{share}": float(local >= 25 or share >= 50)
        for local in (0, 1, 2, 5, 10, 25, 100)
        for share in (0, 25, 50, 75, 100)
    }
    assert cells == expected


# --- the minimal sufficient prefix -------------------------------------------------------------------------------


def literal_minimal_prefix(
    scores: ContextScores, string: int, lengths: Sequence[int], position: int, guess: float, replacement: Replacement
) -> float:
    """By the letter: the smallest k such that, at it and every larger k, the full prefix included, enough is right."""

    def is_enough(k: int) -> bool:
        rows = [
            row
            for row in range(len(scores.string))
            if scores.string[row] == string
            and scores.position[row] == position
            and scores.k[row] == k
            and (k == FULL or (scores.keep[row] == 0 and scores.remote_share[row] == 0))
            and (k == FULL or scores.replacement[row] == REPLACEMENTS.index(replacement))
        ]
        if not rows:
            return False
        right = sum(bool(scores.is_right[row]) for row in rows) / len(rows)
        mean_p = sum(math.exp(scores.log_prob[row]) for row in rows) / len(rows)
        return right >= 0.8 and mean_p >= math.sqrt(guess)

    # What is longer than all that stands before the token is the full prefix.
    finite = [k for k in lengths if k <= position]
    for index, k in enumerate(finite):
        if all(is_enough(larger) for larger in (*finite[index:], FULL)):
            return float(k)
    return float(position) if is_enough(FULL) else math.nan


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 5, 10]), st.booleans(), st.floats(0.5, 1.0))
def test_the_minimal_prefix_equals_a_literal_transcription(seed: int, redraws: int, bos: bool, ease: float) -> None:
    rng, length, first = np.random.default_rng(seed), 9, 0 if bos else 1
    spec = ContextSpec(lengths=(0, 1, 3, 6), replacements=("source", "none"), redraws=redraws)

    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted | None:
        if condition is not None and condition.k == 0 and condition.is_removal:
            return None
        return float(rng.uniform(ease / 2, 1)), 1.0, bool(rng.random() < ease)

    scores = planted_scores(spec, length, plant, num_strings=2, bos=bos)
    log2_guess = np.log2(rng.uniform(0.1, 0.7, length - first))
    lengths = spec.curve_lengths(length)
    for replacement in ("source", "none"):
        for string in (0, 1):
            ours = minimal_prefix(
                scores, string=string, lengths=lengths, length=length, log2_guess=log2_guess, replacement=replacement
            )
            theirs = [
                literal_minimal_prefix(
                    scores, string, lengths, position, 2 ** log2_guess[position - first], replacement
                )
                for position in range(first, length)
            ]
            assert ours.tolist() == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize(("num_right", "expected"), [(3, 6.0), (4, 2.0), (5, 2.0)])
def test_four_of_five_redraws_are_enough_and_three_are_not(num_right: int, expected: float) -> None:
    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        is_short = condition is not None and condition.k == 2
        return 0.9, 1.0, redraw < num_right or not is_short

    spec = ContextSpec(lengths=(2, 6), replacements=("source",), redraws=5)
    minimal = minimal_prefix(
        planted_scores(spec, 12, plant), string=0, lengths=(2, 6), length=12, log2_guess=np.full(11, -2.0)
    )
    assert set(minimal[6:]) == {expected}


def test_a_likely_symbol_is_not_recalled_for_its_frequency() -> None:
    # Always right, and as sure as the guesser is: its probability must reach the square root of the guesser's.
    spec = ContextSpec(lengths=(0,), replacements=("source",), redraws=1)
    scores = planted_scores(spec, 6, lambda *where: (0.81, 1.0, True))
    minimal = [
        minimal_prefix(scores, string=0, lengths=(0,), length=6, log2_guess=np.full(5, math.log2(guess)))
        for guess in (0.81, 0.66, 0.65)
    ]
    assert [np.isnan(each).all() for each in minimal] == [True, True, False]


def test_a_token_that_only_the_whole_prefix_recalls_needs_all_that_stands_before_it() -> None:
    spec = ContextSpec(lengths=(0, 2), replacements=("source",), redraws=1)
    scores = planted_scores(spec, 6, lambda condition, *where: (0.9, 1.0, condition is None))
    minimal = minimal_prefix(scores, string=0, lengths=(0, 2), length=6, log2_guess=np.full(5, -2.0))
    assert minimal.tolist() == [1, 2, 3, 4, 5]


def test_most_tokens_without_a_minimal_prefix_leave_no_median() -> None:
    def plant(condition: Condition | None, string: int, redraw: int, position: int) -> Planted:
        return 0.9, 1.0, position % 3 == 0

    metrics = metrics_of(ContextSpec(lengths=(0,), replacements=("source",), redraws=1), 31, plant)
    assert metrics["context/sufficient_share"] == pytest.approx(1 / 3)
    assert "context/minimal_prefix" not in metrics


# --- chance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alphabet_size", "expected"), [(2, 20.0), (26, 4.2549)])
def test_the_chance_line_has_its_closed_form(alphabet_size: int, expected: float) -> None:
    marginal = np.asarray(IidSource(alphabet_size=alphabet_size).marginal)
    assert chance_prefix(marginal, 1024) == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_the_determining_prefix_equals_brute_force(symbols: list[int]) -> None:
    def shortest(i: int) -> float:
        for k in range(i + 1):
            before = symbols[i - k : i]
            following = {symbols[j] for j in range(k, len(symbols)) if symbols[j - k : j] == before}
            if following == {symbols[i]}:
                return float(k)
        return math.nan

    expected = [shortest(i) for i in range(len(symbols))]
    assert determining_prefix(np.array(symbols)).tolist() == pytest.approx(expected, nan_ok=True)


def test_places_of_a_random_string_are_told_apart_below_the_chance_line() -> None:
    rng = np.random.default_rng(0)
    needed: ndarray = determining_prefix(rng.integers(0, 2, 1024))
    assert np.nanmax(needed) == pytest.approx(chance_prefix(np.full(2, 0.5), 1024), abs=5)
    # Typically a context of log2 n symbols has about one double.
    assert np.nanmedian(needed) == pytest.approx(10, abs=2)


def test_the_chance_curve_ends_at_the_share_of_tokens_that_have_a_minimal_prefix() -> None:
    minimal = np.array([2.0, 5.0, math.nan, 5.0])
    assert share_sufficient(minimal, [1, 2, 5, 100]).tolist() == [0, 0.25, 0.75, 0.75]
