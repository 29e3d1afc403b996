"""A thousand short trials: nothing grows, and nothing is left behind."""

import threading
import time

import psutil
import pytest

from memray.cluster.audit import audit
from memray.cluster.ledger import Ledger

from .conftest import Head, StudyFolder, alone, sweep_of
from .test_many_devices import LAUNCHED, ray_workers, wait_until_clean

SEEDS = 500
COMPARED = 40


def taken(process: psutil.Process) -> tuple[float, int]:
    """Memory of its own in MiB, and open descriptors."""
    return process.memory_full_info().uss / 2**20, process.num_fds()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_short_trials_grow_nothing_and_leave_nothing(study_folder: StudyFolder, head: Head) -> None:
    daemons = [each for each in psutil.process_iter() if each.name() in ("gcs_server", "raylet")]
    before = {each: each.num_fds() for each in daemons if str(head.folder) in " ".join(each.cmdline())}
    assert len(before) == 2
    options = ("-p", f"seeds={SEEDS}")
    process = study_folder.start("run", *options, "--address", head.address, "--max-concurrent", "2")
    driver, began_s = psutil.Process(process.pid), time.monotonic()
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=output.extend, args=(process.stdout,))  # a full pipe would hold the launch up
    reader.start()
    seen: list[tuple[int, dict[str, tuple[float, int]]]] = []  # finished trials, and what each process took then
    while process.poll() is None:
        time.sleep(5)
        assert time.monotonic() < began_s + 3400
        try:
            actors = [each for each, title in ray_workers(head) if title.startswith(LAUNCHED)]
            took = {f"actor {each.pid}": taken(each) for each in actors} | {"driver": taken(driver)}
        except psutil.NoSuchProcess:
            continue
        seen.append((len(list(study_folder.storage.glob("small/*/finished.json"))), took))
    reader.join()
    assert process.returncode == 0, output[-50:]
    seconds = time.monotonic() - began_s

    # Tune keeps a record of every trial (some 20 KiB were traced): the driver is not flat from the beginning.
    early = next(took for finished, took in seen if finished >= SEEDS)
    assert len(early) == 4
    # The same two trained them all, and one looked at the snapshots of all.
    finished, late = [(finished, took) for finished, took in seen if took.keys() == early.keys()][-1]
    assert finished > 2 * SEEDS - 100
    for name, (mib, descriptors) in late.items():
        print(f"{name}: {early[name][0]:.0f} -> {mib:.0f} MiB, {early[name][1]} -> {descriptors} descriptors")  # noqa: T201, the soak's figures
        assert mib < 1.1 * early[name][0] + 20, name
        assert descriptors <= early[name][1] + 5, name
    print(f"{2 * SEEDS} trials in {seconds:.0f} s")  # noqa: T201

    wait_until_clean(head)
    assert {each: each.num_fds() for each in before}.keys() == before.keys()
    assert all(each.num_fds() <= number + 10 for each, number in before.items())
    sweep, ledger = sweep_of(study_folder, seeds=SEEDS), Ledger(str(study_folder.storage), "small")
    assert audit(sweep, ledger, f"sqlite:///{study_folder.database}") == []
    assert study_folder.count_runs() == 1 + len(sweep.trials) + len(sweep.cells())
    for trial in sweep.trials[:: 2 * SEEDS // COMPARED]:
        assert alone(trial) == ledger.trial(trial.trial_id()).measurements()[0]
