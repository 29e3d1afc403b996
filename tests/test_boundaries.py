"""Who may import whom: the laboratory runs without the factory, and a plan without a model library.

Each test runs in a process of its own, and each has a twin which shows that it can fail.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Makes everything that is installed, but the laboratory's own distributions and what these require, as absent as if it
# were not installed: `import` fails, and a library that only asks whether it is there is told no.
LABORATORY_ONLY = """
import re, sys
from importlib import metadata
from importlib.machinery import PathFinder

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

allowed, waiting = set(), ["torch", "transformers", "numpy", "scipy", "pandas", "pyarrow", "pydantic", "jaxtyping",
                           "typer", "rich"]
while waiting:
    name = normal(waiting.pop())
    if name in allowed:
        continue
    allowed.add(name)
    try:
        required = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # required on other platforms
        continue
    waiting += [re.match(r"[\\w.-]+", each)[0] for each in required if "extra ==" not in each]

modules = metadata.packages_distributions()
blocked = {top for top, names in modules.items() if not {normal(name) for name in names} & (allowed | {"memray"})}

class AllowedFinder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **keywords):
        found = PathFinder.find_distributions(*arguments, **keywords)
        return (each for each in found if normal(each.name) in allowed | {"memray"})

sys.meta_path[:] = [AllowedFinder if finder is PathFinder else finder for finder in sys.meta_path]
"""

STUDY = """
from memray.spec import StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep

def sweep():
    return Sweep([TrialSpec(strings=StringsSpec(length=16), training=TrainingSpec(epochs=3))])
"""

# As `python -m memray ARGUMENTS`, in a process that the lines before it have prepared.
COMMAND = """
import runpy, sys
sys.argv[0] = "memray"
try:
    runpy.run_module("memray", run_name="__main__", alter_sys=True)
except SystemExit as left:
    if left.code:
        raise
"""

HEAVY = """
heavy = {"torch", "transformers", "tokenizers", "ray", "mlflow", "deepspeed", "matplotlib"} & {*sys.modules}
assert not heavy, heavy
"""


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "study.py"
    path.write_text(STUDY)
    return str(path)


def trial_id(study: str) -> str:
    from memray.sweep import load

    return load(study).trials[0].trial_id()


def test_memray_is_this_project_and_not_the_profiler_of_that_name() -> None:
    done = python("import memray; print(memray.__file__)")
    assert done.stdout.strip() == str(ROOT / "memray" / "__init__.py"), done.stderr


def test_a_trial_runs_with_nothing_importable_but_the_laboratorys_own_distributions(study: str) -> None:
    done = python(LABORATORY_ONLY + COMMAND, "trial", study, trial_id(study))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert record["trial_id"] == trial_id(study)
        assert 0 <= record["metrics"]["recall/token_accuracy"] <= 1
    assert records[3]["metrics"]["recall/nll_nats"] < records[0]["metrics"]["recall/nll_nats"]


def test_what_is_no_requirement_of_the_laboratory_is_absent_there() -> None:
    names = ["ray", "mlflow", "matplotlib", "peft", "pytest", "hypothesis", "psutil"]
    ask = f"import importlib.util; print([name for name in {names} if importlib.util.find_spec(name)])\n"
    assert python(ask).stdout == f"{names}\n"
    done = python(LABORATORY_ONLY + ask + "import ray")
    assert done.stdout == "[]\n"
    assert "ModuleNotFoundError: No module named 'ray'" in done.stderr
    metadata = python(LABORATORY_ONLY + "metadata.version('ray')")
    assert "PackageNotFoundError" in metadata.stderr


def test_a_plan_imports_no_model_library_and_no_cluster(study: str, tmp_path: Path) -> None:
    for arguments in ([study], ["sweeps/demo.py", "-p", "seeds=1"]):
        done = python(COMMAND + HEAVY, "plan", *arguments, "--storage", str(tmp_path / "runs"))
        assert done.returncode == 0, done.stderr
        assert "to run" in done.stdout


def test_specs_sweeps_costs_and_the_command_line_import_no_model_library() -> None:
    done = python("import sys, memray.spec, memray.sweep, memray.cost, memray.cli\n" + HEAVY)
    assert done.returncode == 0, done.stderr


def test_a_heavy_import_would_be_seen() -> None:
    assert "AssertionError: {'t" in python("import sys, tokenizers\n" + HEAVY).stderr


# The layers.


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_each_layer_imports_only_what_stands_below_it() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("measures/recall.py", "import ray", "the laboratory runs without the factory"),
        ("trial.py", "def f():\n    import mlflow", "the laboratory runs without the factory"),
        ("cost.py", "import torch", "a plan needs no model library"),
        ("report/replicates.py", "def f():\n    import memray.material", "a driver needs no model library"),
        ("spec.py", "from memray.encoding import Batch", "each layer imports only what stands below it"),
    ],
)
def test_a_planted_violation_is_found(module: str, planted: str, contract: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "memray", tmp_path / "memray", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "memray" / module).open("a") as file:
        file.write(f"\n{planted}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())
