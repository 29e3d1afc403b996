"""Checkpoints in a trial's folder: whole or not there, and only for the trial and the workers that wrote them."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memray.cluster.documents import KeptCheckpoint
from memray.cluster.ledger import AlreadyFinished, Attempt, Ledger, Superseded, TrialFolder
from memray.cluster.recorder import Recorder, about_checkpoint, check_resumable
from memray.cluster.storage import PosixStorage
from memray.spec import ComputeSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.trial import ModelShelf, run_trial

SPEC = '{"model":{"family":"pythia"}}'


def measured(epochs: range) -> tuple[list[dict], pa.Table, pa.Table]:
    lines = [{"epoch": epoch, "metrics": {"recall/nll_nats": 1 / (epoch + 3)}} for epoch in epochs]
    return lines, pa.table({"epoch": list(epochs)}), pa.table({"epoch": list(epochs)})


def files(folder: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        path = folder / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def with_checkpoint(attempt: Attempt, folder: Path, epoch: int = 3, content: bytes = b"first") -> KeptCheckpoint:
    """An attempt that has measured all epochs before a checkpoint of two processes' files."""
    attempt.append(*measured(range(epoch)))
    put = attempt.put_checkpoint(epoch, files(folder / f"{epoch}-0", zero=content))
    put |= attempt.put_checkpoint(epoch, files(folder / f"{epoch}-1", one=b"second"))
    attempt.commit_checkpoint(epoch, put, {"workers": 2})
    checkpoint = attempt.folder.checkpoint()
    assert checkpoint is not None
    return checkpoint


@pytest.fixture
def folder(ledger: Ledger) -> TrialFolder:
    return ledger.trial("trial")


def test_a_checkpoint_reads_back_as_it_was_put(folder: TrialFolder, tmp_path: Path) -> None:
    with folder.claim(SPEC, "launch") as attempt:
        checkpoint = with_checkpoint(attempt, tmp_path)
    assert (checkpoint.epoch, checkpoint.attempt, checkpoint.about) == (3, 1, {"workers": 2})
    folder.fetch_checkpoint(checkpoint, tmp_path / "read")
    read = {path.name: path.read_bytes() for path in (tmp_path / "read" / "state").iterdir()}
    assert read == {"zero": b"first", "one": b"second"}


def test_a_checkpoint_that_was_not_committed_is_none(folder: TrialFolder, tmp_path: Path) -> None:
    with folder.claim(SPEC, "launch") as attempt:
        attempt.put_checkpoint(3, files(tmp_path, zero=b"first"))
    assert folder.checkpoint() is None


def test_a_newer_checkpoint_takes_the_older_ones_place_and_the_end_takes_all(
    folder: TrialFolder, tmp_path: Path
) -> None:
    with folder.claim(SPEC, "launch") as attempt:
        with_checkpoint(attempt, tmp_path)
        put = attempt.put_checkpoint(5, files(tmp_path / "5", zero=b"later"))
        attempt.commit_checkpoint(5, put, {})
        checkpoint = folder.checkpoint()
        assert checkpoint is not None
        assert checkpoint.epoch == 5
        left = folder.ledger.storage.list("sweep/trial/checkpoints")
        assert left == ["0001-000005.json", "0001-000005/"]
        attempt.finish({})
    assert folder.checkpoint() is None
    assert folder.ledger.storage.list("sweep/trial/checkpoints") == []


def test_an_attempt_that_resumes_has_the_measurements_of_the_one_before(folder: TrialFolder, tmp_path: Path) -> None:
    with folder.claim(SPEC, "launch") as attempt:
        checkpoint = with_checkpoint(attempt, tmp_path)
        attempt.append(*measured(range(3, 5)))  # after the checkpoint: to be measured again
    with folder.claim(SPEC, "launch") as again:
        again.adopt(checkpoint)
        again.append(*measured(range(3, 6)))
        again.finish({})
    assert folder.measurements()[0] == measured(range(6))[0]
    assert folder.tokens()["epoch"].to_pylist() == list(range(6))
    assert folder.verify() == []


@pytest.mark.parametrize(
    "path", ["measurements/0001-0001.jsonl", "tokens/0001-0001.parquet", "weights/0001-000002.safetensors"]
)
def test_what_was_edited_between_two_attempts_is_adopted_by_none(local: Ledger, tmp_path: Path, path: str) -> None:
    folder = local.trial("trial")
    with folder.claim(SPEC, "launch") as attempt:
        attempt.keep_weights(2, {"weight": np.ones(3)})
        checkpoint = with_checkpoint(attempt, tmp_path / "files")
    edited = tmp_path / "runs" / "sweep" / "trial" / path
    data = bytearray(edited.read_bytes())
    data[len(data) // 2] ^= 1
    edited.write_bytes(data)
    with folder.claim(SPEC, "launch") as again, pytest.raises(ValueError, match=r"does not match .*digest"):
        again.adopt(checkpoint)


def test_a_resumed_trial_has_the_digest_of_an_undisturbed_one(local: Ledger, tmp_path: Path) -> None:
    for name in ("resumed", "undisturbed"):
        with local.trial(name).claim(SPEC, "launch") as attempt:
            checkpoint = with_checkpoint(attempt, tmp_path / name)
            if name == "undisturbed":
                attempt.append(*measured(range(3, 6)))
                attempt.finish({})
    with local.trial("resumed").claim(SPEC, "launch") as attempt:
        attempt.adopt(checkpoint)
        attempt.append(*measured(range(3, 6)))
        attempt.finish({})
    one, other = (local.trial(name).finished() for name in ("resumed", "undisturbed"))
    assert one is not None
    assert other is not None
    assert one.measurements_sha256 == other.measurements_sha256


@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_a_damaged_checkpoint_is_refused_with_what_to_do(folder: TrialFolder, tmp_path: Path, damage: str) -> None:
    with folder.claim(SPEC, "launch") as attempt:
        checkpoint = with_checkpoint(attempt, tmp_path)
    path = f"sweep/trial/{checkpoint.name}/state/zero"
    if damage == "edited":
        folder.ledger.storage.replace(path, b"frist")
    else:
        folder.ledger.storage.delete(path)
    with pytest.raises(ValueError, match=r"must match its digest, but .*zero is (another|missing); delete .* to train"):
        folder.fetch_checkpoint(checkpoint, tmp_path / "read")


def test_a_superseded_attempt_keeps_no_checkpoint(folder: TrialFolder, tmp_path: Path) -> None:
    with folder.claim(SPEC, "launch") as attempt, folder.claim(SPEC, "launch"):
        with pytest.raises(Superseded):
            attempt.put_checkpoint(3, files(tmp_path, zero=b"first"))
        with pytest.raises(Superseded):
            attempt.commit_checkpoint(3, {}, {})


def test_a_writer_elsewhere_writes_in_the_attempts_stead(local: Ledger) -> None:
    import pickle

    folder = local.trial("trial")
    with folder.claim(SPEC, "launch") as attempt:
        writer = pickle.loads(pickle.dumps(attempt.elsewhere()))
        writer.append(*measured(range(2)))
        writer.finish({"a": 1})
    assert folder.verify() == []
    finished = folder.finished()
    assert finished is not None
    assert finished.summary == {"a": 1}


def test_a_checkpoint_of_another_trial_or_number_of_workers_is_refused_with_a_sentence() -> None:
    two = TrialSpec(compute=ComputeSpec(engine="deepspeed", workers=2))
    other = TrialSpec(compute=ComputeSpec(engine="deepspeed", workers=2), string_seed=1)

    def kept(about: dict) -> KeptCheckpoint:
        before = {"measurements_sha256": "0" * 64, "records": {}, "weights": {}}
        return KeptCheckpoint(attempt=1, epoch=4, segments=1, **before, files={}, about=about)

    check_resumable(two, kept(about_checkpoint(two)))
    with pytest.raises(ValueError, match=r"checkpoint of its own, but the one of epoch 4 has workers=4 instead of 2; "):
        check_resumable(two, kept(about_checkpoint(two) | {"workers": 4}))
    with pytest.raises(ValueError, match=r"trial_id='[0-9a-f]{12}' instead of '[0-9a-f]{12}'"):
        check_resumable(two, kept(about_checkpoint(other)))


class Killed(BaseException):
    """Nothing that handles errors may handle this: a killed process handles nothing."""


@dataclass
class MortalStorage(PosixStorage):
    """A folder whose writer is killed before its change number `last`, and changes nothing from then on."""

    root: Path
    last: float
    num_changes: int = 0

    def _live(self) -> None:
        self.num_changes += 1
        if self.num_changes >= self.last:
            raise Killed

    def write_new(self, *arguments: Any) -> None:
        self._live()
        super().write_new(*arguments)

    def replace(self, *arguments: Any, **named: Any) -> None:
        self._live()
        super().replace(*arguments, **named)

    def delete(self, path: str) -> None:
        self._live()
        super().delete(path)

    def delete_folder(self, folder: str) -> None:
        self._live()
        super().delete_folder(folder)


@pytest.mark.fault
def test_a_kill_at_any_change_of_the_storage_loses_nothing(tmp_path: Path) -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=8),
        training=TrainingSpec(epochs=3, keep_weights="probe_epochs"),
        probes=ProbesSpec(epochs=(1,), num_held_out=1),
        compute=ComputeSpec(checkpoint_s=0),
    )
    shelf = ModelShelf()

    def run(root: Path, last: float = math.inf) -> tuple[Ledger, int]:
        ledger = Ledger(str(root), "sweep")
        ledger.storage = storage = MortalStorage(root, last)
        folder = ledger.trial(spec.trial_id())
        with contextlib.suppress(Killed, AlreadyFinished), folder.claim(spec.canonical_json(), "launch") as attempt:
            recorder = Recorder(spec, attempt, folder.checkpoint())
            recorder.record(run_trial(spec, shelf=shelf, keeper=recorder))
        return ledger, storage.num_changes

    undisturbed, num_changes = run(tmp_path / "undisturbed")
    expected = undisturbed.trial(spec.trial_id()).finished()
    assert expected is not None
    num_resumed = 0
    for last in range(1, num_changes + 1):
        root = tmp_path / f"{last}"
        run(root, last)
        ledger, _ = run(root)
        ledger.drop_leftovers(ledger.trial_ids())
        folder = ledger.trial(spec.trial_id())
        found = folder.finished()
        assert found is not None, f"killed at change {last}"
        assert found.measurements_sha256 == expected.measurements_sha256, f"killed at change {last}"
        assert folder.verify() == []
        assert folder.tokens().equals(undisturbed.trial(spec.trial_id()).tokens())
        kept = {name.rpartition("-")[2]: digest for name, digest in found.files.items() if name.startswith("weights/")}
        assert len(kept) == 2
        assert sorted(kept.values()) == sorted(
            digest for name, digest in expected.files.items() if name.startswith("weights/")
        )
        assert ledger.storage.list(f"sweep/{spec.trial_id()}/checkpoints") == [], f"killed at change {last}"
        num_resumed += "resumed_from_epoch" in found.summary
    assert num_resumed > num_changes // 2
