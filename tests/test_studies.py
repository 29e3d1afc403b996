"""What every study in `sweeps/` keeps to; a new file is held to it without being named here."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from memray.accelerators import accelerator
from memray.cost import check_fits, cost
from memray.sweep import Scale, Sweep, load

STUDIES = sorted((Path(__file__).parent.parent / "sweeps").glob("*.py"))
SCALES: list[Scale] = ["tiny", "paper"]

# The demo shows how a study looks and claims nothing: it must be over in minutes. The study of scale compares a trial
# with itself, placed elsewhere, and not one kind of trial with another.
FEWER_REPLICATES = {"demo": 3, "scale": 1}

# A replicate is a draw of samples, which each cell is trained on so many times.
TRAININGS = {"composition": 3}

# Studies whose question is what pre-training does.
COMPARE_UNTRAINED = {"pretraining", "length"}

each_study = pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
each_scale = pytest.mark.parametrize("scale", SCALES)


def paragraphs(path: Path) -> dict[str, str]:
    """The docstring by heading, each on one line; the first paragraph is the question."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, *others = [" ".join(each.split()) for each in docstring.split("\n\n")]
    headed = [each.partition(": ") for each in others]
    return {"Question": first} | {heading: text for heading, _, text in headed}


def replicates_of(sweep: Sweep) -> set[float]:
    trainings = TRAININGS.get(sweep.name, 1)
    return {len(trials) / trainings for trials in sweep.cells().values()}


def test_there_are_studies() -> None:
    assert {"demo", "model_family", "alphabet", "entropy", "dataset_size"} <= {path.stem for path in STUDIES}


@each_study
def test_a_study_states_its_question_hypothesis_sources_and_cost_before_it_runs(path: Path) -> None:
    said = paragraphs(path)
    assert list(said) == ["Question", "Hypothesis", "Reads", "Cost"]
    assert said["Question"].endswith("?")
    for heading in ("Hypothesis", "Reads", "Cost"):
        assert said[heading].endswith("."), heading
    assert load(path).question == said["Question"]


@each_study
def test_a_study_takes_a_scale_and_a_number_of_seeds_by_keyword_with_defaults(path: Path) -> None:
    namespace: dict[str, object] = {}
    exec(compile(path.read_bytes(), str(path), "exec"), namespace)
    function = namespace["sweep"]
    assert callable(function)
    parameters = inspect.signature(function).parameters
    assert parameters["scale"].annotation == Scale
    assert parameters["scale"].default == "tiny"
    assert parameters["seeds"].annotation is int
    assert {each.kind for each in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert not [
        name for name, each in parameters.items() if each.default is each.empty or each.annotation is each.empty
    ]


@each_study
@each_scale
def test_a_study_builds_distinct_trials_that_fit_their_device(path: Path, scale: Scale) -> None:
    sweep = load(path, scale=scale)
    assert len({trial.trial_id() for trial in sweep.trials}) == len(sweep.trials)
    for trial in sweep.trials:
        # The CPU is whichever machine this runs on: what a study may ask of it is in the test of its scale.
        if accelerator(trial.compute.accelerator).device != "cpu":
            check_fits(trial)


@each_study
@each_scale
def test_the_number_of_seeds_is_the_number_of_replicates_of_every_cell(path: Path, scale: Scale) -> None:
    one, four = (load(path, scale=scale, seeds=seeds) for seeds in (1, 4))
    assert replicates_of(one) == {1}
    assert replicates_of(four) == {4}
    assert one.cells().keys() == four.cells().keys()
    assert {trial.trial_id() for trial in one.trials} <= {trial.trial_id() for trial in four.trials}


@each_study
def test_a_study_has_five_replicates_a_cell_unless_it_compares_no_kinds_of_trial(path: Path) -> None:
    assert replicates_of(load(path, scale="paper")) == {FEWER_REPLICATES.get(path.stem, 5)}


@each_study
def test_the_tiny_scale_runs_on_a_laptop(path: Path) -> None:
    for trial in load(path, scale="tiny").trials:
        size, most = ("tiny", 4096) if trial.corpus is None else ("tiny-text", 65_536)
        assert (trial.model.size, trial.model.path, trial.compute.accelerator) == (size, None, "cpu")
        number = trial.strings.num_strings if trial.corpus is None else trial.strings_together
        assert trial.num_tokens * number <= most
        assert trial.num_epochs <= (3000 if trial.curriculum else 1000)  # of all stages together
        assert cost(trial).peak_gib < 2
        assert cost(trial).seconds < 600


@each_study
def test_the_paper_scale_trains_published_weights_on_an_accelerator(path: Path) -> None:
    trials = load(path, scale="paper").trials
    assert any(trial.model.pretrained for trial in trials)
    for trial in trials:
        assert trial.model.pretrained or path.stem in COMPARE_UNTRAINED
        assert accelerator(trial.compute.accelerator).device == "cuda"
        assert trial.compute.precision == "bf16"


@each_study
def test_the_stated_cost_names_the_number_of_trials(path: Path) -> None:
    stated = re.findall(r"(\d+) trials( a seed)?", paragraphs(path)["Cost"])
    assert stated
    number, is_per_seed = stated[0]
    sweep = load(path, scale="tiny")
    assert int(number) == len(sweep.trials) / (replicates_of(sweep).pop() if is_per_seed else 1)


@each_study
@each_scale
def test_what_a_study_moves_is_seen_in_its_params(path: Path, scale: Scale) -> None:
    sweep = load(path, scale=scale)
    varying = sweep.varying()
    assert [name for name in varying if not name.endswith("_seed")]
    rows = [tuple(trial.params()[name] for name in varying) for trial in sweep.trials]
    assert len(set(rows)) == len(rows)
