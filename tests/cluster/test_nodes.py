"""What a launch asks of a cluster of several nodes: one storage for all, and base weights that are read once."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from memray.cluster.launch import check_shared
from memray.cluster.ledger import Ledger
from memray.cluster.weights import fetch, start_weights_owner
from memray.models import load_model
from memray.spec import LoraSpec, ModelSpec

pytestmark = pytest.mark.fault


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node that this process has joined."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
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
