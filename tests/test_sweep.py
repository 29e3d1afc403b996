"""Sweeps: what a grid becomes, what is refused, and how a study file is read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from memray.cli import app
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import InvalidCell, Sweep, SweepError, explain, load, replicates, vary

SEEDS = [{"string_seed": seed, "model_seed": seed} for seed in range(3)]


def trial(base: TrialSpec, changes: dict[str, Any]) -> TrialSpec:
    made = vary(base, changes)
    assert isinstance(made, TrialSpec), made
    return made


# A grid.


def test_all_invalid_cells_are_reported_together_and_no_sweep_is_made() -> None:
    grid = [
        {"strings.alphabet_size": 26},
        {"strings.alphabet_size": 27},
        {"model.family": "pythai"},
        {"strings.alphabet_size": 2, "strings.entropy_bits": 1.5},
        {"training.epoch": 3},
    ]
    with pytest.raises(SweepError) as caught:
        Sweep(vary(TrialSpec(), changes) for changes in grid)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 5 cells are invalid:"
    assert len(lines) == 5
    for line, changes, sentence in zip(
        lines[1:],
        grid[1:],
        [
            "strings: alphabet 'latin' has 26 symbols, but alphabet_size is 27",
            "model: unknown model family 'pythai'; did you mean 'pythia'?",
            "strings: 0 < entropy_bits <= log2(alphabet_size) must hold",
            "training.epoch: no such field; look for a typing mistake",
        ],
        strict=True,
    ):
        assert line.startswith(f"  {changes}: {sentence}")
        assert "pydantic" not in line


def test_an_invalid_cell_is_a_value_until_the_sweep_is_made() -> None:
    cell = vary(TrialSpec(), {"strings.length": 1})
    assert isinstance(cell, InvalidCell)
    assert cell.changes == {"strings.length": 1}
    assert cell.reason == "strings.length: Input should be greater than or equal to 2, but got 1"


def test_several_mistakes_in_one_cell_are_several_sentences() -> None:
    with pytest.raises(ValidationError) as caught:
        TrialSpec(string_seed=-1, training=TrainingSpec.model_construct(epochs=3), strings={"length": 0, "lenght": 3})  # type: ignore[arg-type]
    assert explain(caught.value) == (
        "strings.length: Input should be greater than or equal to 2, but got 0; "
        "strings.lenght: no such field; look for a typing mistake; "
        "string_seed: Input should be greater than or equal to 0, but got -1"
    )


def test_a_sweep_without_trials_is_refused() -> None:
    with pytest.raises(SweepError, match=r"at least one trial.*check the ranges"):
        Sweep([])


def test_what_is_no_trial_is_refused_and_not_dropped() -> None:
    with pytest.raises(SweepError, match="made of TrialSpecs or of what `vary` returns, but got NoneType, dict"):
        Sweep(cell for cell in (TrialSpec(), None, {}))  # type: ignore[misc]


def test_duplicates_are_dropped_and_the_order_is_kept() -> None:
    sizes = [7, 2, 26, 2, 7]
    sweep = Sweep(vary(TrialSpec(), {"strings.alphabet_size": size}) for size in sizes)
    assert [each.strings.alphabet_size for each in sweep.trials] == [7, 2, 26]


def test_two_spellings_of_one_source_are_one_trial() -> None:
    sweep = Sweep(vary(TrialSpec(), {"strings.alphabet_size": 2, "strings.entropy_bits": bits}) for bits in (None, 1.0))
    assert len(sweep.trials) == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"probes.num_held_out": 3}, "probes"),
        ({"compute.device_share": 0.5}, "compute.device_share"),
        ({"compute.checkpoint_s": 0}, "compute.checkpoint_s"),
    ],
)
def test_one_trial_that_is_to_be_looked_at_or_placed_in_two_ways_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SweepError, match=rf"must agree on {what}, .* give them the same"):
        Sweep([TrialSpec(), vary(TrialSpec(), changes)])


def test_cells_group_the_replicates() -> None:
    sweep = Sweep(
        vary(TrialSpec(), {"strings.alphabet_size": size} | seed)
        for size in (2, 7)
        for seed in [*SEEDS, {"order_seed": 9}]
    )
    cells = sweep.cells()
    assert [len(trials) for trials in cells.values()] == [4, 4]
    assert sum(cells.values(), ()) == sweep.trials
    for cell_id, trials in cells.items():
        assert {each.cell_id() for each in trials} == {cell_id}
        assert len({each.strings.alphabet_size for each in trials}) == 1


def test_what_varies_is_named_seeds_last() -> None:
    sweep = Sweep(vary(TrialSpec(), {"strings.length": length} | seed) for length in (64, 128) for seed in SEEDS)
    assert sweep.varying() == ("strings.length", "model_seed", "string_seed")
    assert Sweep([TrialSpec()]).varying() == ()


def test_what_varies_includes_what_the_family_table_fills_in() -> None:
    sweep = Sweep(vary(TrialSpec(), {"model.family": family}) for family in ("pythia", "llama2"))
    assert sweep.varying() == ("model.bos", "model.family")


def test_a_trial_is_found_by_its_id_or_a_prefix_that_only_it_has() -> None:
    sweep = Sweep(vary(TrialSpec(), {"string_seed": seed}) for seed in range(40))
    wanted = sweep.trials[7]
    assert sweep.trial(wanted.trial_id()) is wanted
    assert sweep.trial(wanted.trial_id()[:8]) is wanted
    with pytest.raises(ValueError, match="40 of them begin with ''; `plan` lists the ids"):
        sweep.trial("")
    with pytest.raises(ValueError, match="0 of them begin with 'ffffffffffff'"):
        sweep.trial("ffffffffffff")


@pytest.mark.parametrize(
    ("model", "moved"),
    [(ModelSpec(), {"string_seed", "model_seed"}), (ModelSpec(size="70m", pretrained=True), {"string_seed"})],
)
def test_a_replicate_moves_the_string_and_the_model_where_it_is_untrained(model: ModelSpec, moved: set[str]) -> None:
    made = replicates(TrialSpec(model=model), 3)
    assert [set(each) for each in made] == [moved] * 3
    assert [set(each.values()) for each in made] == [{0}, {1}, {2}]


# What `vary` carries over.


def test_varying_the_family_takes_the_defaults_of_the_new_family() -> None:
    base = TrialSpec(model=ModelSpec(size="1b", pretrained=True), strings=StringsSpec(length=512))
    assert (base.training.learning_rate, base.model.bos) == (1e-5, False)
    varied = trial(base, {"model.family": "opt", "model.size": "1.3b"})
    assert (varied.training.learning_rate, varied.model.bos) == (5e-6, True)
    assert varied.model.revision == TrialSpec(model=ModelSpec(family="opt", size="1.3b")).model.revision
    assert varied == TrialSpec(
        model=ModelSpec(family="opt", size="1.3b", pretrained=True), strings=StringsSpec(length=512)
    )


def test_varying_pretrained_takes_the_other_number_of_epochs() -> None:
    base = TrialSpec(model=ModelSpec(size="70m"))
    assert base.num_epochs == 300
    assert trial(base, {"model.pretrained": True}).num_epochs == 100


def test_varying_the_accelerator_takes_its_precision() -> None:
    assert trial(TrialSpec(), {"compute.accelerator": "h200"}).compute.precision == "bf16"


def test_what_the_base_states_is_carried_over() -> None:
    base = TrialSpec(
        model=ModelSpec(bos=True),
        training=TrainingSpec(epochs=7, learning_rate=0.5),
        compute=ComputeSpec(precision="fp32"),
    )
    varied = trial(base, {"model.family": "gpt2", "compute.accelerator": "t4"})
    assert (varied.model.bos, varied.num_epochs, varied.training.learning_rate) == (True, 7, 0.5)
    assert varied.compute.precision == "fp32"


def test_an_entropy_is_carried_over_as_written_though_it_was_uniform_there() -> None:
    base = TrialSpec(strings=StringsSpec(alphabet_size=2, entropy_bits=1.0, skew="zipf"))
    varied = trial(base, {"strings.alphabet_size": 26})
    assert varied == TrialSpec(strings=StringsSpec(alphabet_size=26, entropy_bits=1.0, skew="zipf"))


def test_varying_leaves_the_base_alone() -> None:
    base = TrialSpec(strings=StringsSpec(length=64))
    before = base.model_dump_json()
    vary(base, {"strings.length": 128, "model.lora.rank": 4, "training.stop_when.epochs": 3})
    assert base.model_dump_json() == before


def test_a_part_that_was_off_is_switched_on_by_a_field_of_it() -> None:
    varied = trial(TrialSpec(), {"model.lora.rank": 4})
    assert varied.model.lora == LoraSpec(rank=4)
    assert trial(varied, {"model.lora": None}).model.lora is None


def test_a_later_change_reaches_into_a_part_given_whole() -> None:
    varied = trial(TrialSpec(), {"model.lora": LoraSpec(rank=4), "model.lora.alpha": 2.0, "probes": ProbesSpec()})
    assert varied.model.lora == LoraSpec(rank=4, alpha=2.0)
    whole = trial(TrialSpec(), {"strings": StringsSpec(length=64), "strings.num_strings": 2})
    assert whole.strings == StringsSpec(length=64, num_strings=2)


# A study file.

HEAD = """'''Does it
wrap?

Hypothesis: yes.'''

from typing import Literal

from memray.spec import *
from memray.sweep import *

"""
GRID = "    return Sweep(vary(TrialSpec(), {'string_seed': seed}) for seed in range(seeds))\n"

Write = Callable[[str], Path]


@pytest.fixture
def study(tmp_path: Path) -> Write:
    def write(body: str) -> Path:
        path = tmp_path / "study.py"
        path.write_text(HEAD + body)
        return path

    return write


def refusal(path: Path, **parameters: Any) -> str:
    """What `load` says, and `plan` in the same words, with exit code 2 and no traceback."""
    with pytest.raises(SweepError) as caught:
        load(path, **parameters)
    told = CliRunner().invoke(app, ["plan", str(path), *(f"-p{name}={value}" for name, value in parameters.items())])
    assert told.exit_code == 2, told.output
    assert told.stderr.strip() == str(caught.value)
    assert "Traceback" not in told.stderr
    return str(caught.value)


def test_a_loaded_sweep_is_named_by_its_file_and_asks_its_question_in_one_line(study: Write) -> None:
    sweep = load(study(f"def sweep(*, seeds: int = 2):\n{GRID}"))
    assert (sweep.name, sweep.question, len(sweep.trials)) == ("study", "Does it wrap?", 2)


ECHO = """
seen = None
def sweep(*, number: int = 1, share: float = 0.5, flag: bool = False, name: str = '', sizes: tuple[int, ...] = (),
          rates: list[float] = [], families: tuple[str, ...] = (), scale: Scale = 'tiny', either: int | None = 1,
          skew: Literal['zipf', 'geometric'] = 'zipf', loose=None):
    raise SweepError(repr(dict(locals())))
"""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("number", "12", 12),
        ("number", 12, 12),
        ("share", "1e-3", 1e-3),
        ("flag", "true", True),
        ("flag", "no", False),
        ("name", "12", "12"),
        ("name", "a,b", "a,b"),
        ("sizes", "[2, 7]", (2, 7)),
        ("sizes", "2,7", (2, 7)),
        ("sizes", "2", (2,)),
        ("sizes", (2, 7), (2, 7)),
        ("rates", "0.5,1", [0.5, 1.0]),
        ("families", "gpt2,opt", ("gpt2", "opt")),
        ("families", '["gpt2"]', ("gpt2",)),
        ("scale", "paper", "paper"),
        ("either", "null", None),
        ("skew", "geometric", "geometric"),
        ("loose", "as it stands", "as it stands"),
    ],
)
def test_a_parameter_is_parsed_by_its_annotation(study: Write, name: str, text: Any, value: Any) -> None:
    with pytest.raises(SweepError) as caught:
        load(study(ECHO), **{name: text})
    assert f"'{name}': {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("number", "many", "parameter number: Input should be a valid integer, unable to parse string as an integer"),
        ("number", "2,7", "parameter number: Input should be a valid integer"),
        ("flag", "perhaps", "parameter flag: Input should be a valid boolean"),
        ("sizes", "[2,", "parameter sizes: Input should be a valid tuple, but got '[2,'"),
        ("sizes", "2,x", "parameter sizes: Input should be a valid tuple, but got '2,x'"),
        ("scale", "huge", "parameter scale: Input should be 'paper' or 'tiny', but got 'huge'"),
        ("skew", "one", "Input should be 'zipf' or 'geometric', but got 'one'"),
        ("seed", "3", "has no parameter 'seed'; parameters: number, share, flag, name, sizes, rates, families, scale"),
    ],
)
def test_a_parameter_that_does_not_parse_is_refused(study: Write, name: str, text: str, sentence: str) -> None:
    assert sentence in refusal(study(ECHO), **{name: text})


def test_all_bad_parameters_are_reported_together(study: Write) -> None:
    lines = refusal(study(ECHO), number="many", flag="perhaps").splitlines()
    assert ["number" in lines[0], "flag" in lines[1], len(lines)] == [True, True, 2]


def test_a_parameter_without_a_default_must_be_given(study: Write) -> None:
    path = study(f"def sweep(*, seeds: int):\n{GRID}")
    assert refusal(path).endswith("needs a value of seeds; give it with -p seeds=value")
    assert len(load(path, seeds="3").trials) == 3


def test_annotations_may_be_postponed(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n" + HEAD.partition("'''\n\n")[2] +
        f"@dataclass\nclass Arm:\n    seeds: int\n\ndef sweep(*, seeds: int = 1):\n{GRID}"
    )  # fmt: skip
    assert len(load(path, seeds="4").trials) == 4


def test_a_file_without_a_sweep_function_is_refused(study: Write) -> None:
    assert "must define a function `sweep(...) -> Sweep`, but it defines none" in refusal(study("sweep = 3\n"))


@pytest.mark.parametrize(("made", "named"), [("3", "int"), ("None", "NoneType"), ("[TrialSpec()]", "list")])
def test_a_sweep_function_that_returns_something_else_is_refused(study: Write, made: str, named: str) -> None:
    said = refusal(study(f"def sweep():\n    return {made}\n"))
    assert f"must return a Sweep, but it returned {named}; end it with `return Sweep(...)`" in said


def test_a_missing_file_is_refused_with_what_lies_beside_it(study: Write) -> None:
    beside = study("")
    said = refusal(beside.parent / "studdy.py")
    assert said == f"a sweep is a Python file, but {beside.parent / 'studdy.py'} is none; files beside it: {beside}"
    assert "files beside it: none" in refusal(beside.parent / "nowhere" / "study.py")


def test_a_file_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("scale: tiny\n")
    assert "a sweep is a Python file" in refusal(tmp_path / "study.yaml")
    assert "a sweep is a Python file" in refusal(tmp_path)


def test_an_invalid_spec_outside_the_grid_is_a_sentence_too(study: Write) -> None:
    path = study("BASE = TrialSpec(strings=StringsSpec(lenght=3))\ndef sweep():\n    return Sweep([BASE])\n")
    assert refusal(path) == f"{path}: lenght: no such field; look for a typing mistake"


def test_a_syntax_error_shows_its_line(study: Write) -> None:
    said = refusal(study("def sweep(:\n    pass\n"))
    assert "must run without an error, but it raised" in said
    assert "SyntaxError: " in said
    assert "study.py" in said
    assert "def sweep(:" in said


@pytest.mark.parametrize(
    ("body", "error", "line"),
    [
        ("SIZES = {}\ndef sweep():\n    return Sweep(SIZES[k] for k in 'ab')\n", "KeyError: 'a'", "Sweep(SIZES[k] for"),
        ("import nosuchmodule\n", "ModuleNotFoundError: No module named 'nosuchmodule'", "import nosuchmodule"),
        ("def sweep():\n    raise ValueError('an odd seed')\n", "ValueError: an odd seed", "raise ValueError('an odd"),
        ("def sweep(*, n: Nothing = 1):\n    pass\n", "NameError: name 'Nothing' is not", "def sweep(*, n: Nothing"),
        ("def sweep():\n    return TrialSpec().seed\n", "AttributeError: 'TrialSpec'", "return TrialSpec().seed"),
    ],
)  # fmt: skip
def test_an_error_in_a_study_shows_what_it_was_and_the_line_that_made_it(
    study: Write, body: str, error: str, line: str
) -> None:
    path = study(body)
    said = refusal(path)
    assert f"{path} must run without an error, but it raised {error}" in said
    assert line in said
    assert f'File "{path}", line ' in said
    assert "in load" not in said  # none of the frames around the study


def test_python_callers_still_get_the_error_behind_the_sentence(study: Write) -> None:
    with pytest.raises(SweepError) as caught:
        load(study("1 / 0\n"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_study_edited_within_a_second_is_read_anew_and_leaves_no_bytecode(study: Write) -> None:
    for seeds in (2, 3, 4):
        path = study(f"def sweep(*, seeds: int = {seeds}):\n{GRID}")
        assert len(load(path).trials) == seeds
    assert [each.name for each in path.parent.iterdir()] == ["study.py"]


def test_loading_a_study_prints_nothing_writes_nothing_and_imports_no_model_library(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from memray.sweep import load
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    load(path)
heavy = {"torch", "transformers", "ray", "mlflow", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    studies = Path(__file__).parent.parent / "sweeps"
    done = subprocess.run(
        [sys.executable, "-c", program, str(studies)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
