"""The ledger on real files, real processes and an S3 server on loopback."""

import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memray
from memray.cluster import storage
from memray.cluster.documents import START, Cursor
from memray.cluster.ledger import AlreadyFinished, Attempt, Busy, Lease, Ledger, Superseded, TrialFolder
from memray.cluster.storage import Claims, StorageError, open_storage

SPEC = '{"model":{"family":"pythia"}}'
# Started by pytest or by a child: the children below must find the package without an installation.
CHILD_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(memray.__path__[0]).parent)}
HOLD = """
import sys, time
from memray.cluster.ledger import Ledger, Superseded
storage, renewal_s, expiry_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
folder = Ledger(storage, "sweep", renewal_s=renewal_s, expiry_s=expiry_s).trial("trial")
with folder.claim('{"model":{"family":"pythia"}}', "theirs") as attempt:
    attempt.append([{"epoch": 0}])
    print("holding", flush=True)
    sys.stdin.readline()
    try:
        attempt.append([{"epoch": 1}])
    except Superseded as error:
        print(f"superseded: {error}", flush=True)
"""


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed and reaped when the block ends."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, env=CHILD_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[str], words: str) -> None:
    pipe(process.stdin).write(words + "\n")
    pipe(process.stdin).flush()


def hear(process: subprocess.Popen[str]) -> str:
    return pipe(process.stdout).readline().strip()


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def write(ledger: Ledger, name: str, data: bytes) -> None:
    """Put a file into the folder of the trial behind the ledger's back."""
    ledger.storage.replace(f"sweep/trial/{name}", data)


def read(ledger: Ledger, name: str) -> bytes:
    return ledger.storage.read_bytes(f"sweep/trial/{name}")


def table(*values: float) -> pa.Table:
    return pa.table({"log_prob": pa.array(values, pa.float32())})


def finish_a_trial(ledger: Ledger) -> TrialFolder:
    folder = ledger.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        attempt.append([{"epoch": 0, "metrics": {"recall/nll_nats": 3.25}}], tokens=table(-1.5, -0.5))
        attempt.append([{"epoch": 1}, {"epoch": 2}], tokens=table(-0.25), strings=pa.table({"string": [0]}))
        attempt.finish({"epochs": 2})
    return folder


# --- what is written is what is read ---------------------------------------------------------------


def test_a_trial_reads_back_as_it_was_written(ledger: Ledger):
    folder = ledger.trial("trial")
    assert (folder.state(), folder.finished(), folder.measurements()) == ("planned", None, ([], Cursor(0, 0)))
    assert folder.tokens() == pa.table({})

    before_ms = int(time.time() * 1000)
    finish_a_trial(ledger)

    assert folder.state() == "finished"
    assert folder.spec() == SPEC
    created_ms = folder.created_ms()
    assert created_ms is not None
    assert before_ms <= created_ms <= time.time() * 1000
    expected = [{"epoch": 0, "metrics": {"recall/nll_nats": 3.25}}, {"epoch": 1}, {"epoch": 2}]
    assert folder.measurements() == (expected, Cursor(1, 2))
    assert folder.tokens() == table(-1.5, -0.5, -0.25)
    assert folder.strings() == pa.table({"string": [0]})
    finished = folder.finished()
    assert finished is not None
    assert (finished.attempt, finished.segments, finished.summary) == (1, 2, {"epochs": 2})
    assert folder.failure() is None
    assert folder.verify() == []
    assert ledger.trial_ids() == ["trial"]
    assert ledger.states(["trial", "other"]) == {"trial": "finished", "other": "planned"}


def test_a_cursor_gives_only_what_came_after_it(ledger: Ledger):
    folder = ledger.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        attempt.append([{"epoch": 0}])
        first, cursor = folder.measurements(START)
        attempt.append([{"epoch": 1}])
        second, cursor = folder.measurements(Cursor(*json.loads(json.dumps(cursor))))
        attempt.finish({})
        third, cursor = folder.measurements(cursor)
    assert (first, second, third, cursor) == ([{"epoch": 0}], [{"epoch": 1}], [], Cursor(1, 2))
    with pytest.raises(AlreadyFinished, match="trial trial of sweep is finished"):
        folder.claim(SPEC, "theirs")


def test_a_cursor_of_an_older_attempt_starts_again(local: Ledger):
    folder = local.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        attempt.append([{"epoch": 0}])
        attempt.append([{"epoch": 1}])
    _, cursor = folder.measurements()
    with folder.claim(SPEC, "ours") as attempt:
        assert folder.measurements(cursor) == ([], Cursor(2, 0))
        attempt.append([{"epoch": 0}])
        assert folder.measurements(cursor) == ([{"epoch": 0}], Cursor(2, 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=st.lists(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=3), max_size=3))
def test_measurements_round_trip_to_the_last_bit(local: Ledger, segments: list[list[dict]]):
    folder = local.trial(f"trial-{len(local.trial_ids())}")
    with folder.claim(SPEC, "ours") as attempt:
        for segment in segments:
            attempt.append(segment)
        attempt.finish({})
    # repr, for it tells -0.0 from 0.0, 1 from 1.0 and True from 1.
    assert repr(folder.measurements()[0]) == repr([line for segment in segments for line in segment])
    assert folder.verify() == []


def test_the_digest_of_the_measurements_does_not_depend_on_how_they_were_cut(local: Ledger):
    lines = [{"epoch": epoch, "x": 1 / (epoch + 3)} for epoch in range(6)]
    digests = set()
    for name, cuts in {"whole": [0, 6], "halves": [0, 3, 6], "singles": range(7)}.items():
        with local.trial(name).claim(SPEC, "ours") as attempt:
            for start, end in zip(list(cuts), list(cuts)[1:], strict=False):
                attempt.append(lines[start:end])
            attempt.finish({})
        finished = local.trial(name).finished()
        assert finished is not None
        digests.add(finished.measurements_sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, r"\['recall/robust'\] is nan"),
        (-math.inf, r"\['recall/robust'\] is -inf"),
        ({"deep": [1.0, math.inf]}, r"\['recall/robust'\]\['deep'\]\[1\] is inf"),
        (pa.scalar(1.0), r"\['recall/robust'\] is <pyarrow"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(local: Ledger, value: object, place: str):
    folder = local.trial("trial")
    bad = {"epoch": 3, "recall/robust": value}
    with folder.claim(SPEC, "ours") as attempt:
        with pytest.raises(ValueError, match=f"measurement 1 must hold only JSON with finite numbers, but {place}"):
            attempt.append([{"epoch": 2}, bad])
        with pytest.raises(ValueError, match=place):
            attempt.finish(bad)
        with pytest.raises(ValueError, match=place):
            folder.note("bad", bad)
    assert folder.measurements() == ([], Cursor(1, 0))
    assert folder.state() == "planned"


def test_segments_with_different_columns_are_read_as_one_table(local: Ledger):
    folder = local.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        attempt.append([], tokens=pa.table({"epoch": [0]}))
        attempt.append([], tokens=pa.table({"epoch": [1], "kl_bits": [0.5]}))
        attempt.append([])
    assert folder.tokens().to_pydict() == {"epoch": [0, 1], "kl_bits": [None, 0.5]}
    assert folder.measurements() == ([], Cursor(1, 2))


def test_a_note_is_replaced_and_needs_no_claim(ledger: Ledger):
    folder = ledger.trial("trial")
    assert folder.noted("mlflow") is None
    folder.note("mlflow", {"run_id": "a", "sent": [1, 2]})
    folder.note("mlflow", {"run_id": "b"})
    assert folder.noted("mlflow") == {"run_id": "b"}
    assert folder.state() == "planned"


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "-x", "ü", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="a sweep's name must consist of"):
        Ledger(str(tmp_path), name)
    with pytest.raises(ValueError, match="a trial id must consist of"):
        Ledger(str(tmp_path), "sweep").trial(name)
    with pytest.raises(ValueError, match="the name of a note must consist of"):
        Ledger(str(tmp_path), "sweep").trial("trial").note(name, {})


def test_a_folder_keeps_its_first_spec_and_time(local: Ledger):
    folder = local.trial("trial")
    assert folder.created_ms() is None
    with folder.claim(SPEC, "ours"):
        created_ms = folder.created_ms()
    time.sleep(0.01)
    with folder.claim(SPEC, "ours"):
        assert folder.created_ms() == created_ms
    with pytest.raises(ValueError, match=r"spec.json must hold the spec of trial trial, but holds another"):
        folder.claim('{"model":{"family":"opt"}}', "ours")


# --- attempts, failures and crashes ----------------------------------------------------------------


def test_a_failure_is_kept_until_the_next_attempt(ledger: Ledger):
    folder = ledger.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        assert folder.state() == "running"
        attempt.append([{"epoch": 0}])
        attempt.fail("Traceback: out of memory")
        with pytest.raises(RuntimeError, match="attempt 1 at trial trial is over"):
            attempt.append([{"epoch": 1}])
    assert (folder.state(), folder.failure()) == ("failed", "Traceback: out of memory")
    with folder.claim(SPEC, "theirs") as attempt:
        assert (attempt.number, folder.state(), folder.failure()) == (2, "running", None)
        assert folder.measurements() == ([], Cursor(2, 0))
        attempt.finish({})
    assert folder.state() == "finished"


def test_an_interrupted_attempt_leaves_the_trial_planned(local: Ledger):
    folder = local.trial("trial")
    with pytest.raises(KeyboardInterrupt), folder.claim(SPEC, "ours"):
        raise KeyboardInterrupt
    assert folder.state() == "planned"


def test_every_write_of_a_superseded_attempt_is_refused(ledger: Ledger):
    folder = ledger.trial("trial")
    with folder.claim(SPEC, "ours") as old:
        old.append([{"epoch": 0, "by": "old"}], tokens=table(1))
        with folder.claim(SPEC, "ours") as new:  # a retry within the launch
            assert (old.number, new.number) == (1, 2)
            for forbidden in (lambda: old.append([{}]), lambda: old.finish({}), lambda: old.fail("late")):
                with pytest.raises(Superseded, match="attempt 1 at trial trial may write no more: a newer"):
                    forbidden()
            new.append([{"epoch": 0, "by": "new"}], tokens=table(2))
            assert folder.measurements()[0] == [{"epoch": 0, "by": "new"}]
            assert folder.tokens() == table(2)
            new.finish({})
    assert folder.verify() == []


def test_a_write_that_slips_past_a_takeover_is_not_read(local: Ledger, monkeypatch: pytest.MonkeyPatch):
    folder = local.trial("trial")
    with folder.claim(SPEC, "ours") as old, folder.claim(SPEC, "ours") as new:
        new.append([{"by": "new"}], tokens=table(2))
        new.finish({})
        # As if the process had been paused between its check and its write.
        monkeypatch.setattr(Attempt, "_check", lambda self: None)
        old.append([{"by": "old"}], tokens=table(1))
        with pytest.raises(Superseded, match=r"finished\.json was written by another"):
            old.finish({})
    assert folder.measurements()[0] == [{"by": "new"}]
    assert folder.tokens() == table(2)
    assert folder.verify() == []


def test_a_claim_that_comes_as_the_holder_finishes_finds_nothing_to_do(local: Ledger, monkeypatch: pytest.MonkeyPatch):
    folder = local.trial("trial")
    holder = folder.claim(SPEC, "theirs").__enter__()
    look = TrialFolder._newest_attempt

    def finish_meanwhile(self: TrialFolder) -> int:
        monkeypatch.undo()
        holder.finish({})
        holder.__exit__()
        return look(self)

    monkeypatch.setattr(TrialFolder, "_newest_attempt", finish_meanwhile)
    with pytest.raises(AlreadyFinished):
        folder.claim(SPEC, "ours")
    assert folder.measurements()[1] == Cursor(1, 0)
    assert folder.verify() == []


CRASH = """
import os, signal, sys
import pyarrow as pa
from memray.cluster.ledger import Ledger
from memray.cluster.storage import PosixStorage
folder = Ledger(sys.argv[1], "sweep").trial("trial")
attempt = folder.claim('{"model":{"family":"pythia"}}', "theirs").__enter__()
table = pa.table({"log_prob": [1.0]})
attempt.append([{"epoch": 0}], tokens=table)
write = PosixStorage.replace
def replace(self, path, data, durable=True):
    if "/measurements/" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path, data, durable=durable)
PosixStorage.replace = replace
attempt.append([{"epoch": 1}], tokens=table, strings=table)
"""


def test_a_crash_between_tables_and_measurements_leaves_nothing_visible(local: Ledger):
    folder = local.trial("trial")
    with child(CRASH, local.storage) as process:
        assert process.wait(20) == -signal.SIGKILL
    written = Path(str(local.storage), "sweep", "trial")
    assert sorted(path.name for path in (written / "tokens").iterdir()) == [
        "0001-0001.parquet",
        "0001-0002.parquet",
    ]
    assert folder.measurements() == ([{"epoch": 0}], Cursor(1, 1))
    assert folder.tokens().num_rows == 1
    assert folder.strings().num_rows == 0
    assert folder.state() == "planned"


def test_torn_and_foreign_files_are_never_read(local: Ledger):
    folder = local.trial("trial")
    with folder.claim(SPEC, "ours") as attempt:
        attempt.append([{"epoch": 0}], tokens=table(1))
        write(local, "measurements/.0001-0002.jsonl.abc", b'{"epo')
        write(local, "measurements/0001-0003.jsonl", b'{"epoch": 99}\n')  # after a gap
        write(local, "measurements/copy of 0001-0002.jsonl", b'{"epoch": 99}\n')
        write(local, "tokens/0001-0002.parquet", b"PAR1")
        write(local, "leases/notes.txt", b"x")
        assert folder.measurements() == ([{"epoch": 0}], Cursor(1, 1))
        assert folder.tokens() == table(1)
        attempt.finish({})
    write(local, "strings/0001-0001.parquet", b"PAR1")
    assert folder.strings() == pa.table({})
    assert folder.measurements() == ([{"epoch": 0}], Cursor(1, 1))


def test_a_torn_lease_is_a_dead_one(local: Ledger):
    folder = local.trial("trial")
    write(local, "leases/0007.json", b'{"launch": "th')
    with folder.claim(SPEC, "ours") as attempt:
        assert attempt.number == 8


# --- digests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "measurements/0001-0002.jsonl",
            "measurements/0001-0001.jsonl, measurements/0001-0002.jsonl together",
        ),
        ("tokens/0001-0001.parquet", "tokens/0001-0001.parquet does not match its digest"),
        ("strings/0001-0002.parquet", "strings/0001-0002.parquet does not match its digest"),
        ("spec.json", "spec.json does not match its digest"),
        ("created.json", "created.json does not match its digest"),
    ],
)
def test_an_edited_file_is_noticed(local: Ledger, name: str, complaint: str):
    folder = finish_a_trial(local)
    data = read(local, name)
    write(local, name, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    (sentence,) = folder.verify()
    assert sentence.startswith(f"trial trial: {complaint}")


@pytest.mark.parametrize("name", ["measurements/0001-0001.jsonl", "tokens/0001-0001.parquet", "created.json"])
def test_a_missing_file_is_noticed(local: Ledger, name: str):
    folder = finish_a_trial(local)
    Path(str(local.storage), "sweep", "trial", name).unlink()
    assert folder.verify() == [f"trial trial: {name} is missing"]


def test_an_edited_summary_or_an_added_segment_is_noticed(ledger: Ledger):
    folder = finish_a_trial(ledger)
    whole = read(ledger, "finished.json")
    write(ledger, "finished.json", whole.replace(b'"epochs":2', b'"epochs":3'))
    assert folder.verify() == ["trial trial: sweep/trial/finished.json does not match its own digest: it was edited"]
    write(ledger, "finished.json", whole[:-9])
    assert "is torn or was edited" in folder.verify()[0]
    write(ledger, "finished.json", whole)
    write(ledger, "measurements/0001-0003.jsonl", b'{"epoch":3}\n')
    assert folder.verify() == ["trial trial: measurements/0001-0003.jsonl was added after the end"]


# --- leases ----------------------------------------------------------------------------------------


def test_a_live_foreign_lease_is_busy_and_says_who_holds_it(ledger: Ledger):
    with ledger.trial("trial").claim(SPEC, "theirs"), pytest.raises(Busy) as refusal:
        ledger.trial("trial").claim(SPEC, "ours")
    sentence = str(refusal.value)
    assert f"held by launch theirs (attempt 1, process {os.getpid()} on {socket.gethostname()}) since 2" in sentence
    with ledger.trial("trial").claim(SPEC, "ours") as attempt:
        assert attempt.number == 2  # released, so free at once


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_gives_up_its_claim_at_once(local: Ledger, reaped: bool):
    folder = local.trial("trial")
    with child(HOLD, local.storage, 5, 30) as process:
        assert hear(process) == "holding"
        assert folder.state() == "running"
        with pytest.raises(Busy, match=f"process {process.pid} "):
            folder.claim(SPEC, "ours")
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait(5)
        else:  # a zombie still has its number
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert folder.state() == "planned"
        with folder.claim(SPEC, "ours") as attempt:
            assert attempt.number == 2
            assert folder.measurements() == ([], Cursor(2, 0))


def test_a_holder_that_stops_renewing_expires_and_is_refused_when_it_wakes(local: Ledger):
    ledger = Ledger(str(local.storage), "sweep", renewal_s=0.1, expiry_s=1.0)
    folder = ledger.trial("trial")
    with child(HOLD, local.storage, 0.1, 1.0) as process:
        assert hear(process) == "holding"
        time.sleep(1.5)
        with pytest.raises(Busy):  # renewed all the while
            folder.claim(SPEC, "ours")
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        with folder.claim(SPEC, "ours") as attempt:
            process.send_signal(signal.SIGCONT)
            say(process, "go on")
            assert hear(process).startswith("superseded: attempt 1 at trial trial may write no more")
            time.sleep(0.3)  # the old holder's renewals change nothing
            attempt.append([{"epoch": 0}])


def lease_elsewhere(ledger: Ledger, **changes: object) -> None:
    lease = replace(Lease.of_this_process("theirs", 1), machine="another boot", pid=999_999_999)
    write(ledger, "leases/0001.json", json.dumps({**asdict(lease), **changes}).encode())


def test_a_lease_of_another_machine_lives_until_it_expires(local: Ledger):
    folder = local.trial("trial")
    lease_elsewhere(local, renewed_s=time.time() - 29)
    with pytest.raises(Busy, match="renewed 29 s ago; it is free when that ends, or 30 s after its last renewal"):
        folder.claim(SPEC, "ours")
    lease_elsewhere(local, renewed_s=time.time() - 31)
    with folder.claim(SPEC, "ours") as attempt:
        assert attempt.number == 2


def test_a_reused_process_number_is_not_taken_for_the_holder(local: Ledger):
    mine = Lease.of_this_process("theirs", 1)
    assert mine.pid_started is not None
    lease_elsewhere(local, machine=mine.machine, pid=mine.pid, pid_started=mine.pid_started)
    assert local.trial("trial").state() == "running"
    lease_elsewhere(local, machine=mine.machine, pid=mine.pid, pid_started=mine.pid_started - 1)
    assert local.trial("trial").state() == "planned"


def test_renewal_must_be_more_frequent_than_expiry(tmp_path: Path):
    with pytest.raises(ValueError, match=r"0 < renewal_s < expiry_s must hold, but got \(renewal_s=30"):
        Ledger(str(tmp_path), "sweep", renewal_s=30.0, expiry_s=30.0)


RACE = """
import json, sys, time
from memray.cluster.ledger import Busy, Ledger
ledger, launch = Ledger(sys.argv[1], "sweep"), sys.argv[2]
print("ready", flush=True)
start, won = float(sys.stdin.readline()), []
for number in range(50):
    while time.time() < start + number * 0.02:
        pass
    try:
        ledger.trial(f"trial-{number}").claim("{}", launch)
        won.append(number)
    except Busy:
        pass
print(json.dumps(won), flush=True)
sys.stdin.readline()
"""


def test_of_two_processes_that_race_for_fifty_trials_exactly_one_wins_each(local: Ledger):
    with child(RACE, local.storage, "one") as one, child(RACE, local.storage, "two") as two:
        assert (hear(one), hear(two)) == ("ready", "ready")
        start = str(time.time() + 0.2)
        say(one, start)
        say(two, start)
        won = json.loads(hear(one)), json.loads(hear(two))
    assert sorted(won[0] + won[1]) == list(range(50))
    for number in range(50):
        assert local.storage.list(f"sweep/trial-{number}/leases") == ["0001.json"]


# --- storages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["below a file", "/proc/memray"])
def test_a_storage_that_cannot_be_written_is_refused_with_a_sentence(tmp_path: Path, root: str):
    (tmp_path / "file").write_text("")
    ledger = Ledger(str(tmp_path / "file" / "runs") if root == "below a file" else root, "sweep", patience_s=0.0)
    for write in (ledger.check_writable, lambda: ledger.trial("trial").claim(SPEC, "ours")):
        with pytest.raises(StorageError, match=r"(?s)the storage .* must be a folder .* --storage") as refusal:
            write()
        assert str(ledger.storage) in str(refusal.value)
        assert pickle.loads(pickle.dumps(refusal.value)).args == refusal.value.args


def test_a_storage_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ledger = Ledger(str(tmp_path / "file" / "runs"), "sweep")
    for look in (ledger.trial_ids, ledger.trial("trial").state, ledger.trial("trial").spec):
        with pytest.raises(StorageError, match="Not a directory; choose another"):
            look()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_storage_can_be_read_and_is_refused_for_writing(tmp_path: Path):
    with mounted(tmp_path / "mount", "size=1m"):
        ledger = Ledger(str(tmp_path / "mount"), "sweep", patience_s=0.0)
        finish_a_trial(ledger)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "mount")], check=True)
        assert ledger.trial("trial").verify() == []
        with pytest.raises(StorageError, match=r"to write .sweep/other/leases/0001\.json. failed: Read-only file"):
            ledger.trial("other").claim(SPEC, "ours")


def test_a_full_storage_shows_nothing_of_the_segment_which_can_be_appended_again(tmp_path: Path):
    with mounted(tmp_path / "mount", "size=256k"):
        ledger = Ledger(str(tmp_path / "mount"), "sweep", patience_s=0.0)
        folder = ledger.trial("trial")
        ballast = tmp_path / "mount" / "ballast"
        with folder.claim(SPEC, "ours") as attempt:
            ballast.write_bytes(bytes(200_000))
            lines = [{"epoch": epoch, "text": "x" * 1000} for epoch in range(100)]
            with pytest.raises(StorageError, match="No space left on device"):
                attempt.append(lines, tokens=table(1))
            assert folder.measurements() == ([], Cursor(1, 0))
            ballast.unlink()
            attempt.append(lines, tokens=table(1))
            attempt.finish({})
        assert folder.measurements()[0] == lines
        assert folder.verify() == []


def test_a_storage_that_refuses_for_a_moment_is_tried_again(local: Ledger, monkeypatch: pytest.MonkeyPatch):
    refusals = iter([True, True, False, True])
    replace_file = type(local.storage).replace

    def refuse_now_and_then(*arguments: Any, **options: Any) -> None:
        if next(refusals, False):
            raise StorageError("away")
        replace_file(*arguments, **options)

    with local.trial("trial").claim(SPEC, "ours") as attempt:
        monkeypatch.setattr(type(local.storage), "replace", refuse_now_and_then)
        monkeypatch.setattr(storage, "RETRY_S", 0.01)
        attempt.append([{"epoch": 0}], tokens=table(1))
        attempt.finish({})
    assert next(refusals, None) is None
    assert local.trial("trial").measurements()[0] == [{"epoch": 0}]
    assert local.trial("trial").verify() == []


def test_a_file_system_without_hard_links_still_lets_one_writer_win(local: Ledger, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    local.storage.write_new("sweep/a", b"first")
    with pytest.raises(FileExistsError):
        local.storage.write_new("sweep/a", b"second")
    assert local.storage.read_bytes("sweep/a") == b"first"
    assert local.storage.list("sweep") == ["a"]


def test_a_storage_lists_files_and_folders_apart(ledger: Ledger):
    for path in ("b/one", "b/two", "b/c/three"):
        ledger.storage.replace(path, b"x")
    assert ledger.storage.list("b") == ["c/", "one", "two"]
    assert ledger.storage.list("none") == []
    assert ledger.storage.exists("b/one")
    assert not ledger.storage.exists("b/none")
    with pytest.raises(FileNotFoundError):
        ledger.storage.read_bytes("b/none")


def test_a_ledger_opens_paths_and_file_uris_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    finish_a_trial(Ledger("runs", "sweep"))
    assert Ledger(f"file://{tmp_path}/runs", "sweep").states(["trial"]) == {"trial": "finished"}
    with pytest.raises(ValueError, match="must be a local path or a URI that pyarrow opens"):
        Ledger("gopher://somewhere/runs", "sweep")


def test_a_pickled_ledger_reads_the_same_trials(bucket: str, local: Ledger):
    finish_a_trial(local)
    assert pickle.loads(pickle.dumps(local)).trial("trial").state() == "finished"
    remote = pickle.loads(pickle.dumps(Ledger(bucket.format("pickled"), "sweep")))
    assert remote.trial("trial").state() == "planned"


def test_an_object_store_is_read_without_a_claims_authority_but_not_claimed(bucket: str):
    ledger = Ledger(bucket.format("unclaimed"), "sweep")
    assert ledger.trial("trial").state() == "planned"
    with pytest.raises(ValueError, match="the object store s3://bucket/unclaimed must be claimed through an auth"):
        ledger.trial("trial").claim(SPEC, "ours")


def test_variables_may_name_the_server_of_a_bucket_and_its_keys(bucket: str, monkeypatch: pytest.MonkeyPatch):
    [server] = re.findall(r"endpoint_override=([\d.:]+)", bucket)
    there = {"AWS_ENDPOINT_URL": f"http://{server}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    mark = Ledger("s3://bucket/by-variables", "sweep").check_writable()
    assert Ledger(bucket.format("by-variables"), "sweep").mark() == mark


def test_a_bucket_that_does_not_exist_is_refused_without_telling_its_password(bucket: str):
    uri = bucket.format("x").replace("@bucket", "@other-bucket")
    ledger = Ledger(uri, "sweep", claims=Claims())
    with pytest.raises(StorageError, match=r"the storage s3://other-bucket/x must be .*does not exist") as refusal:
        ledger.check_writable()
    assert "test:test" not in str(refusal.value)


def test_of_many_threads_a_claims_authority_lets_one_win_and_repeats_its_answer(bucket: str):
    uri, claims = bucket.format("claims"), Claims()
    answers: dict[bytes, bool] = {}

    def ask(data: bytes) -> None:
        answers[data] = claims.create(uri, "sweep/lease", data)

    threads = [threading.Thread(target=ask, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [data for data, won in answers.items() if won]
    assert open_storage(uri).read_bytes("sweep/lease") == winner
    # The answer may have been lost on its way, or the authority replaced.
    assert Claims().create(uri, "sweep/lease", winner)
    assert not Claims().create(uri, "sweep/lease", b"another")


CLUSTER = """
import sys
import ray
from memray.cluster.ledger import Busy, Ledger
from memray.cluster.storage import cluster_claims
ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)

@ray.remote(num_cpus=0.01)
class Trial:
    def hold(self, ledger):
        self.attempt = ledger.trial("trial").claim("{}", "theirs").__enter__()
        return self.attempt.number

trial = Trial.remote()
assert ray.get(trial.hold.remote(Ledger(sys.argv[1], "sweep", claims=cluster_claims()))) == 1
ours = Ledger(sys.argv[1], "sweep", claims=cluster_claims()).trial("trial")
try:
    ours.claim("{}", "ours")
except Busy as error:
    print("busy", flush=True)
ray.kill(ray.get_actor("memray-claims", namespace="memray"), no_restart=False)
ray.kill(trial)
while ours.state() == "running":
    pass
print(ours.claim("{}", "ours").number, flush=True)
"""


@pytest.mark.fault
def test_a_cluster_has_one_claims_actor_which_may_die(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CHILD_ENVIRONMENT, "RAY_AUTH_MODE", "disabled")
    with child(CLUSTER, bucket.format("cluster")) as process:
        assert (hear(process), hear(process)) == ("busy", "2")
        assert process.wait(30) == 0


def test_the_state_of_a_finished_trial_takes_one_look_at_the_storage(local: Ledger, monkeypatch: pytest.MonkeyPatch):
    names = [f"trial-{number:04d}" for number in range(100)]
    for name in names:
        local.storage.replace(f"sweep/{name}/finished.json", b"{}", durable=False)
    calls: list[str] = []

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return method(*arguments, **options)

        return call

    for name, method in vars(type(local.storage)).items():
        if callable(method) and not name.startswith("_"):
            monkeypatch.setattr(type(local.storage), name, counted(name, method))
    assert local.trial_ids() == names
    assert set(local.states(names).values()) == {"finished"}
    assert {local.trial(name).state() for name in names} == {"finished"}
    assert len(calls) == 1 + 2 * len(names), calls  # one list, and whether each has a marker, by either way
