"""Real sweeps through the real command line, each in processes of its own."""

import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import memray

ROOT = Path(memray.__path__[0]).parent

STUDY = '''"""Does a small string reach the ledger and MLflow?

Hypothesis: yes.
"""

from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=24), training=TrainingSpec(epochs=8), probes=ProbesSpec(epochs=(0, 4), num_held_out=2)
)


def sweep(*, scale: Scale = "tiny", seeds: int = 2, alphabet_sizes: tuple[int, ...] = (2, 7), epochs: int = 8) -> Sweep:
    return Sweep(
        vary(BASE, {"strings.alphabet_size": size, "training.epochs": epochs} | seed)
        for size in alphabet_sizes
        for seed in replicates(BASE, seeds)
    )
'''


@dataclass
class StudyFolder:
    """A folder with a study and a storage, and the command line run in it."""

    folder: Path
    study: str = "small.py"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def database(self) -> Path:
        return self.storage / "mlflow.db"

    def command(self, verb: str, *arguments: str) -> list[str]:
        storage = [] if verb == "trial" else ["--storage", str(self.storage)]
        return [sys.executable, "-m", "memray", verb, self.study, *arguments, *storage]

    def options(self) -> dict:
        # Loopback, one machine: without a token, and without what a developer's shell may hold.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MEMRAY_"))}
        environment = inherited | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)} | self.environment
        return {"cwd": self.folder, "env": environment, "text": True}

    def run(self, verb: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(verb, *arguments), capture_output=True, timeout=240, check=False, **self.options()
        )
        assert done.returncode == expect, f"{verb} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(verb, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self.options()
        )

    def count(self, table: str) -> int:
        """Rows of a table of MLflow's database."""
        with sqlite3.connect(self.database) as connection:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def make_study_folder(folder: Path, study: str = STUDY) -> StudyFolder:
    (folder / "small.py").write_text(study)
    return StudyFolder(folder)


@pytest.fixture
def study_folder(tmp_path: Path) -> StudyFolder:
    return make_study_folder(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A sweep of four trials that has been run, on reused actors. Tests read it; one that writes copies it."""
    made = make_study_folder(tmp_path_factory.mktemp("finished"))
    made.run("run", "--max-concurrent", "1")
    return made
