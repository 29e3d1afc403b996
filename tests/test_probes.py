"""What is looked at: its identity, what is refused, and what the context probe comes to for a string."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from memray.probes import KEEPS, REPLACEMENTS, Condition, ContextSpec, ProbesSpec, context_cost_tokens


def test_a_context_probe_changes_the_identity_of_what_is_looked_at_and_none_leaves_it() -> None:
    assert ProbesSpec(context=None).probes_id() == ProbesSpec().probes_id()
    # Ids of finished looks are kept in ledgers: they never change.
    assert ProbesSpec(context=ContextSpec()).probes_id() == "5b9c9a10d180"
    assert ProbesSpec(context=ContextSpec(epochs=(0, 10), grid=True, keep=KEEPS)).probes_id() == "e5c7221721ed"


def test_the_order_of_names_does_not_matter() -> None:
    one, other = (ContextSpec(keep=keep, replacements=("none", "source")) for keep in (KEEPS, KEEPS[::-1]))
    third = ContextSpec(keep=KEEPS, replacements=("source", "none"))
    assert len({ProbesSpec(context=each).probes_id() for each in (one, other, third)}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (0, 5, 3)}, r"must ascend without repetition, but got \[0, 5, 3\]"),
        ({"epochs": (1, 1)}, "must ascend without repetition"),
        ({"shares": (0.5, 0.2)}, "must ascend without repetition"),
        ({"shares": (1.0,)}, "less than 1"),
        ({"keep": ("local", "local")}, "must name each once"),
        ({"replacements": ("source", "source")}, "must name each once"),
        ({"replacements": ("fresh",)}, "'source', 'shuffled'"),
        ({"replacements": ()}, "must look at something, but it has neither a curve .*, nor grid, nor extractable"),
        ({"lengths": ()}, "must look at something"),
        ({"keep": ()}, "must look at something"),
        ({"grid_replacement": "none"}, "read with grid=true alone, but got grid_replacement='none'; set grid"),
        ({"redraws": 0}, "greater than 0"),
        ({"k": 3}, "Extra inputs"),
    ],
)
def test_a_context_probe_that_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContextSpec(**fields)


def test_the_context_is_probed_at_probe_epochs_alone() -> None:
    ProbesSpec(epochs=(0, 5, 9), context=ContextSpec(epochs=(5,)))
    with pytest.raises(ValidationError, match=r"context.epochs must be among probes.epochs, but \[7, 8\] are not; add"):
        ProbesSpec(epochs=(0, 5, 9), context=ContextSpec(epochs=(5, 7, 8)))


def test_no_more_held_out_strings_are_probed_than_there_are() -> None:
    ProbesSpec(num_held_out=0, context=ContextSpec(num_held_out=0))
    with pytest.raises(
        ValidationError, match=r"at most probes.num_held_out, but got 1 > 0; probe the context of fewer"
    ):
        ProbesSpec(num_held_out=0, context=ContextSpec())


def test_lengths_that_a_string_has_not_fall_away_and_shares_become_lengths() -> None:
    spec = ContextSpec(lengths=(0, 3, 10, 100), shares=(0.01, 0.1, 0.25))
    assert spec.curve_lengths(100) == (0, 1, 3, 10, 25)
    assert spec.curve_lengths(10) == (0, 1, 3)
    assert ContextSpec().curve_lengths(1024) == (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)


def test_the_grid_has_the_protocols_shares() -> None:
    assert ContextSpec(grid=True).grid_lengths(1024) == {0: 0, 1: 10, 2: 20, 5: 51, 10: 102, 25: 256, 100: None}
    assert ContextSpec().grid_lengths(1024) == {}
    only = ContextSpec(replacements=(), grid=True, grid_replacement="wrong").conditions(1024)
    assert len(only) == len(set(only)) == 6 * 4
    assert {each.remote_share for each in only} == {0, 0.25, 0.5, 0.75}
    assert {each.replacement for each in only} == {"wrong"}


def test_both_sides_are_kept_in_turn_and_what_comes_to_the_same_is_named_once() -> None:
    spec = ContextSpec(keep=("local", "remote"), lengths=(0, 4), replacements=("source",))
    assert set(spec.conditions(10)) == {
        Condition("local", 0, 0.0, "source"),
        Condition("local", 4, 0.0, "source"),
        Condition("remote", 4, 0.0, "source"),
    }
    # Nothing local kept is what keeping the remote side ends in.
    remote = ContextSpec(keep=("remote",), lengths=(4,), replacements=("source",))
    assert set(remote.conditions(10)) == {Condition("local", 0, 0.0, "source"), Condition("remote", 4, 0.0, "source")}


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(0, 20), st.booleans(), st.booleans())
def test_positions_have_the_local_tokens_before_them_and_are_evenly_spaced(
    length: int, num_positions: int, bos: bool, grid: bool
) -> None:
    spec = ContextSpec(num_positions=num_positions, grid=grid, keep=KEEPS)
    longest = max(each.k for each in spec.conditions(length))
    for condition in spec.conditions(length):
        positions = spec.positions(condition, length, bos=bos)
        first = max(condition.k, 0 if bos else 1)
        if not (num_positions and condition.needs_prompts):
            assert positions == tuple(range(first, length))
            continue
        first = max(first, longest)
        steps = {after - before for before, after in itertools.pairwise(positions)}
        assert len(positions) == min(num_positions, length - first)
        assert positions[0] == first
        assert positions[-1] < length
        assert len(steps) <= 2
        assert max(steps, default=0) - min(steps, default=0) <= 1


def test_the_first_strings_of_each_stream_are_probed() -> None:
    spec = ContextSpec(num_strings=3, num_held_out=2)
    assert [spec.num_probed("trained", 10), spec.num_probed("trained", 2)] == [3, 2]
    assert [spec.num_probed("held_out", 10), spec.num_probed("held_out", 1)] == [2, 1]
    assert ContextSpec().num_probed("trained", 10) == 10


def test_only_shuffled_contexts_cost_the_square_of_a_string() -> None:
    shared = ContextSpec(replacements=tuple(name for name in REPLACEMENTS if name != "shuffled"))
    shuffled = ContextSpec(replacements=("shuffled",))
    assert context_cost_tokens(shared, 2048, bos=False) < 2.3 * context_cost_tokens(shared, 1024, bos=False)
    assert context_cost_tokens(shuffled, 2048, bos=False) > 3.7 * context_cost_tokens(shuffled, 1024, bos=False)
    few = ContextSpec(replacements=("shuffled",), num_positions=32)
    assert context_cost_tokens(few, 1024, bos=False) < 0.04 * context_cost_tokens(shuffled, 1024, bos=False)
