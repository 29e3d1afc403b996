"""What fits side by side, and what is refused before Ray would wait for ever."""

import pytest
from ray.tune.search import Searcher

from memray.cluster.announcer import Grid
from memray.cluster.resources import MARKET, SPOT, WAITING_CPU, concurrency, of_actor, of_worker, off_spot, phases
from memray.spec import ComputeSpec, StringsSpec, TrialSpec

GIB = 2**30


def test_trials_are_given_once_in_order_and_not_more_than_there_is_room_for() -> None:
    trials = [TrialSpec(strings=StringsSpec(length=length)) for length in (32, 64, 96, 128)]
    grid = Grid(trials)
    grid.max_concurrent = 2

    def suggested(tune_id: str) -> str | None:
        given = grid.suggest(tune_id)
        assert given is None or isinstance(given, dict)
        return None if given is None else given["cell"]["trial_id"]

    assert [suggested(each) for each in "abc"] == [trials[0].trial_id(), trials[1].trial_id(), None]
    grid.on_trial_complete("another")
    assert suggested("c") is None
    grid.on_trial_complete("a", error=True)
    assert [suggested(each) for each in "cd"] == [trials[2].trial_id(), None]
    grid.is_over = True
    assert grid.suggest("d") == Searcher.FINISHED


def trial(**compute: object) -> TrialSpec:
    return TrialSpec(strings=StringsSpec(length=64), compute=ComputeSpec(**compute))  # type: ignore[arg-type]


def test_cores_limit_trials_on_the_cpu() -> None:
    node = {"CPU": 8.0, "memory": 64.0 * GIB}
    assert concurrency([trial()], [node]) == 8
    assert concurrency([trial(threads=3)], [node]) == 2
    assert concurrency([trial(), trial(threads=3)], [node]) == 2


def test_memory_limits_trials_on_the_cpu() -> None:
    assert concurrency([trial()], [{"CPU": 64.0, "memory": 2.0 * GIB}]) < 5


def test_shares_of_a_device_count() -> None:
    node = {"CPU": 64.0, "GPU": 2.0, "memory": 64.0 * GIB}
    assert concurrency([trial(accelerator="h200")], [node]) == 2
    assert concurrency([trial(accelerator="h200", device_share=0.25)], [node]) == 8
    assert of_actor(trial(accelerator="h200", device_share=0.25)) == {"CPU": 1.0, "GPU": 0.25}


def test_nodes_add_up_but_no_trial_spans_two() -> None:
    nodes = [{"CPU": 4.0, "memory": 64.0 * GIB}] * 4
    assert concurrency([trial(threads=2)], nodes) == 8
    with pytest.raises(
        ValueError, match=r"each process of a trial must fit on one node, but trial .* each needs 8 CPU"
    ):
        concurrency([trial(threads=8)], nodes)


def test_a_trial_that_no_node_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs 1 CPU, 1 GPU, and the nodes have 8 CPU, 0 GPU"):
        concurrency([trial(accelerator="h200")], [{"CPU": 8.0, "memory": 64.0 * GIB}])


def sharded(workers: int, **compute: object) -> TrialSpec:
    return trial(engine="deepspeed", workers=workers, **compute)


def test_the_workers_of_a_trial_and_the_actor_that_waits_for_them_fit_the_cores_that_they_compute_on() -> None:
    asked = [of_actor(sharded(2)), of_worker(sharded(2)), of_worker(sharded(2))]
    assert sum(each["CPU"] for each in asked) <= 2
    assert asked[0].keys() == {"CPU"}
    assert of_worker(sharded(2, accelerator="h200", threads=4)) == {"CPU": 3.9, "GPU": 1.0}


def test_a_trial_of_many_workers_may_span_nodes_and_counts_all_of_them() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0, "memory": 64.0 * GIB}] * 2
    assert concurrency([sharded(2, accelerator="h200")], nodes) == 4
    assert concurrency([sharded(8, accelerator="h200")], nodes) == 1
    assert concurrency([trial(accelerator="h200"), sharded(4, accelerator="h200")], nodes) == 2
    with pytest.raises(
        ValueError, match=r"has 16 of them, each needs 0\.9 CPU, 1 GPU, and the nodes have 8 CPU, 4 GPU;"
    ):
        concurrency([sharded(16, accelerator="h200")], nodes)


def test_trials_of_many_workers_run_before_those_of_one_and_never_beside_them() -> None:
    alone, two, four = [trial(), trial(threads=2)], [sharded(2), sharded(2, zero_stage=3)], [sharded(4)]
    assert phases([alone[0], *two, *four, alone[1]]) == [four, two, alone]
    assert phases([sharded(1), trial()]) == [[sharded(1)], [trial()]]


def test_what_must_outlive_a_trial_asks_for_nodes_that_stay_where_one_of_them_holds_it() -> None:
    spot = {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {MARKET: SPOT}}
    head, driver, bare = (
        {"Alive": True, "Resources": resources, "Labels": labels}
        for resources, labels in (
            ({}, {MARKET: "on-demand"}),
            ({"CPU": 4.0}, {MARKET: "on-demand"}),
            ({"CPU": 1.0}, {}),
        )
    )
    kept_off = {MARKET: "!spot"}
    assert off_spot([spot, head]) == kept_off
    assert off_spot([spot, head], WAITING_CPU) == {}
    assert off_spot([spot, head, driver], WAITING_CPU) == kept_off
    assert off_spot([spot, bare], WAITING_CPU) == kept_off
    assert off_spot([spot]) == {}
    assert off_spot([spot, driver | {"Alive": False}]) == {}
