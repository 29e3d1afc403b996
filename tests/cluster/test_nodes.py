"""What a launch asks of a cluster of several nodes, which come and go: one storage for all, and weights read once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from memray.cluster.launch import check_shared
from memray.cluster.ledger import Ledger
from memray.cluster.resources import MARKET, SPOT
from memray.cluster.storage import cluster_claims
from memray.cluster.weights import fetch, start_weights_owner
from memray.models import character_tokenizer, load_model
from memray.spec import LoraSpec, ModelSpec

from .conftest import STUDY, StudyFolder, make_study_folder
from .test_faults import LONG, LONG_EPOCHS, assert_undisturbed, finished_trials, running_leases, wait_for
from .test_many_devices import STUDY as STUDY_OF_MANY

pytestmark = pytest.mark.fault


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node that trains nothing, which this process has joined."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_a_storage_that_every_node_shares_is_taken(cluster: Cluster, tmp_path: Path) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ledger = Ledger(str(tmp_path), "sweep")
    check_shared(ledger, ledger.check_writable())


def test_a_storage_that_one_node_cannot_see_is_refused_with_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    hidden = tmp_path / "runs"
    hidden.mkdir()
    start = f"{Path(sys.executable).parent / 'ray'} start --address={cluster.address} --num-cpus=1 --block"
    # A node with a view of its own on the file system, in which the storage is another, empty folder.
    command = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {hidden} && exec {start}"]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len([each for each in ray.nodes() if each["Alive"]]) < 2:
            if node.poll() is not None:
                assert os.geteuid() != 0
                pytest.skip("a view of its own on the file system needs root")
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.3)
        ledger = Ledger(str(hidden), "sweep")
        with pytest.raises(
            ValueError, match=r"every node must reach the storage, but .* is another folder, or none, on"
        ):
            check_shared(ledger, ledger.check_writable())
    finally:
        node.terminate()
        node.wait(timeout=30)


def test_base_weights_are_read_once_whatever_trials_ask_for_them(cluster: Cluster, tmp_path: Path) -> None:
    load_model(ModelSpec(), seed=3).save_pretrained(tmp_path)
    spec, owner = ModelSpec(path=str(tmp_path), pretrained=True), start_weights_owner()
    first = fetch(owner, spec)
    (tmp_path / "model.safetensors").unlink()
    for other in (spec, spec.model_copy(update={"dropout": 0.1}), spec.model_copy(update={"lora": LoraSpec()})):
        again = fetch(owner, other)
        assert again.keys() == first.keys()
        assert all((again[name] == array).all() for name, array in first.items())


def test_what_serves_all_trials_is_kept_off_nodes_that_may_be_taken_away(cluster: Cluster) -> None:
    spot = [cluster.add_node(num_cpus=1, labels={MARKET: SPOT}).node_id for _ in range(4)]
    cluster.wait_for_nodes()
    owner, claims = start_weights_owner(), cluster_claims().handle
    for actor in (owner, claims):
        ray.get(actor.__ray_ready__.remote())
    found: list[Any] = list_actors(address=cluster.address)
    nodes = {each.class_name: each.node_id for each in found}
    assert set(nodes) == {"WeightsOwner", "Claims"}
    assert not set(nodes.values()) & set(spot)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_probe_actors", [0, 1])
def test_the_actor_that_waits_for_a_trial_of_many_devices_is_kept_off_nodes_that_may_be_taken_away(
    cluster: Cluster, tmp_path: Path, num_probe_actors: int
) -> None:
    """Its workers are not: they are what such nodes are for. A probe actor may take all of the node that stays."""
    study_folder = make_study_folder(tmp_path, STUDY_OF_MANY.replace("[vary(BASE, more)] + broken", "broken"))
    spot = cluster.add_node(num_cpus=3, labels={MARKET: SPOT})
    staying = cluster.add_node(num_cpus=1)
    options = ["-p", "stages=[0]", "-p", "epochs=3000", "--probe-actors", str(num_probe_actors)]
    process = study_folder.start("run", *options, "--address", str(cluster.address))

    def where(title: str) -> list[Any]:
        return [node for node in (spot, staying) for found in titles_on(node) if found.startswith(title)]

    try:
        wait_for(lambda: len(where("ray::RayTrainWorker")) == 2, 120, process)
        assert spot in where("ray::RayTrainWorker")
        [waiting] = where("ray::ResourceTrainable")
        assert waiting == (spot if staying in where("ray::_ProbeActor") else staying)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(600)
def test_nodes_that_join_are_used_and_one_that_is_lost_in_mid_trial_loses_nothing(
    cluster: Cluster, study_folder: StudyFolder
) -> None:
    first = cluster.add_node(num_cpus=1)
    process = study_folder.start("run", "-p", f"epochs={LONG_EPOCHS}", "--address", str(cluster.address))
    wait_for(lambda: running_leases(study_folder), 120, process)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(running_leases(study_folder)) == 2, 90, process)
    held = running_leases(study_folder)
    cluster.remove_node(first, allow_graceful=False)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert "4 trials to run, 1 at a time" in output
    finished = [ledger_of(study_folder).trial(path.parent.name).finished() for path in finished_trials(study_folder)]
    assert max(each.attempt for each in finished if each) == 2, held
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS)


# Which would wait ten minutes for another node.
IMPATIENT = "from memray.cluster import probe_pool; probe_pool.RETURN_S = 5.0; from memray.cli import app; app()"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_said", [True, False], ids=["that leaves", "that is cut off"])
def test_trials_answer_for_a_probe_actor_whose_node_is_lost_for_good(
    cluster: Cluster, tmp_path: Path, *, is_said: bool
) -> None:
    """The trial has the only device that is left, and waits for its looks: neither it nor the actor could go on."""
    study_folder = make_study_folder(tmp_path, STUDY.replace("(0, 4)", "tuple(range(0, 300, 10))"))
    one = {"epochs": 300, "alphabet_sizes": [7], "seeds": 1}
    words = [word for name, value in one.items() for word in ("-p", f"{name}={json.dumps(value)}")]
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = study_folder.command("run", *words, "--address", str(cluster.address), "--probe-actors", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *command[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **study_folder.options(),
    )
    wait_for(lambda: running_leases(study_folder), 120, process)
    (lost,) = [node for node in nodes if any("_ProbeActor" in title for title in titles_on(node))]
    cluster.remove_node(lost, allow_graceful=is_said)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    if is_said:  # looks wait for the actor to return; those of a node that is cut off fail
        assert "1 probe actors lost their node and found no room: trials answer in their place" in output
    (finished,) = [ledger_of(study_folder).trial(path.parent.name).finished() for path in finished_trials(study_folder)]
    assert finished is not None
    assert finished.attempt == 1
    assert finished.summary["probe_looks_own"] > 0
    assert_undisturbed(study_folder, **one)


def titles_on(node: Any) -> list[str]:
    """What the workers of a node are called."""
    titles = []
    for worker in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            titles.append(" ".join(worker.cmdline()))
    return titles


def ledger_of(study_folder: StudyFolder) -> Ledger:
    return Ledger(str(study_folder.storage), "small")


@pytest.mark.timeout(600)
def test_weights_whose_owner_is_killed_are_loaded_again(tmp_path: Path) -> None:
    load_model(ModelSpec(), seed=3).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    model = f"ModelSpec(path={str(tmp_path / 'model')!r}, pretrained=True)"
    study = STUDY.replace("TrialSpec(\n", f"TrialSpec(model={model},\n", 1).replace(
        "import Probes", "import ModelSpec, Probes"
    )
    study_folder = make_study_folder(tmp_path, study)
    process = study_folder.start("run", *LONG, "--max-concurrent", "1")
    wait_for(lambda: list(study_folder.storage.glob("small/*/measurements/*.jsonl")), 120, process)
    (owner,) = [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if "ray::WeightsOwner" in " ".join(each.cmdline())
    ]
    owner.kill()
    # Its actor goes too: the one that takes its place has to ask for the weights.
    os.kill(running_leases(study_folder)[0]["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert_undisturbed(study_folder, epochs=LONG_EPOCHS, seeds=1)
