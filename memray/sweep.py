"""A sweep: the distinct trials that answer one question, computed by plain Python.

A study is a file with a function `sweep(*, scale, seeds, ...) -> Sweep`. The grid is a comprehension over
:func:`vary`; an invalid cell does not stop it, so that all of them are reported together, before anything is
scheduled. Scheduling is someone else's business.
"""

import copy
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from memray.placement import place
from memray.spec import UNHASHED, TrialSpec

Scale = Literal["paper", "tiny"]


class SweepError(ValueError):
    """A sweep that cannot be scheduled; its text lists everything that is wrong with it."""


@dataclass(frozen=True)
class InvalidCell:
    """A cell that no trial can be made of, kept until the whole sweep has been looked at."""

    changes: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Sweep:
    """Distinct trials, in the order they were written.

    Attributes:
        trials: Duplicates are dropped (arms of a study may share a cell), if they are looked at in the same way.
        name: Names the MLflow experiment and the ledger's folder; the file's stem when loaded from one.
        question: The first paragraph of the study's docstring.
        placements: Why a trial runs where it does, by its id, where its spec left that open and one device is too
            small.

    Raises:
        SweepError: If there is no trial, or any cell is invalid (lists all that are), or one trial is to be probed or
            placed in two ways.
    """

    trials: tuple[TrialSpec, ...]
    name: str = "sweep"
    question: str = ""
    placements: Mapping[str, str] = field(default_factory=dict)

    def __init__(self, trials: Iterable[TrialSpec | InvalidCell], name: str = "sweep", question: str = "") -> None:
        cells = list(trials)
        if strange := {type(cell).__name__ for cell in cells if not isinstance(cell, TrialSpec | InvalidCell)}:
            raise SweepError(
                f"a sweep must be made of TrialSpecs or of what `vary` returns, but got {', '.join(sorted(strange))}"
            )
        if invalid := [cell for cell in cells if isinstance(cell, InvalidCell)]:
            lines = [f"  {dict(cell.changes)}: {cell.reason}" for cell in invalid]
            raise SweepError("\n".join([f"{len(invalid)} of {len(cells)} cells are invalid:", *lines]))
        if not cells:
            raise SweepError(
                "a sweep must have at least one trial, but this one has none; check the ranges of its grid"
            )
        distinct: dict[str, TrialSpec] = {}
        placements: dict[str, str] = {}
        for cell in cells:
            assert isinstance(cell, TrialSpec)
            placed, why = place(cell)
            _check_same_look(distinct.setdefault(placed.trial_id(), placed), placed)
            if why:
                placements[placed.trial_id()] = why
        object.__setattr__(self, "trials", tuple(distinct.values()))
        object.__setattr__(self, "placements", placements)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "question", question)

    def named(self, name: str, question: str) -> "Sweep":
        """The same trials under another name."""
        other = copy.copy(self)
        object.__setattr__(other, "name", name)
        object.__setattr__(other, "question", question)
        return other

    def varying(self) -> tuple[str, ...]:
        """The flattened fields in which the trials differ, seeds last.

        What no trial states and some of them do not have (the defaults of a part that others go without) says only what
        the part's own fields say already, and is left out unless it alone tells trials apart.
        """
        return self._varying

    @cached_property
    def _varying(self) -> tuple[str, ...]:
        params = [trial.params() for trial in self.trials]
        differing = [name for name in params[0] if len({str(each[name]) for each in params}) > 1]
        seeds = [name for name in differing if name.endswith("_seed")]
        implied = {
            name
            for name in differing
            if any(each[name] == "none" for each in params) and not any(states(trial, name) for trial in self.trials)
        }
        shown = [name for name in differing if name not in implied and name not in seeds]
        num_told = len({tuple(each[name] for name in shown) for each in params})
        for name in sorted(implied):
            number = len({tuple(each[other] for other in (*shown, name)) for each in params})
            if number > num_told:
                shown, num_told = [*shown, name], number
        return (*sorted(shown), *seeds)

    def cells(self) -> dict[str, tuple[TrialSpec, ...]]:
        """The trials by cell: those that differ in seeds alone are replicates."""
        return self._cells

    @cached_property
    def _cells(self) -> dict[str, tuple[TrialSpec, ...]]:
        cells: dict[str, list[TrialSpec]] = {}
        for trial in self.trials:
            cells.setdefault(trial.cell_id(), []).append(trial)
        return {cell_id: tuple(trials) for cell_id, trials in cells.items()}

    def probes_ids(self) -> dict[str, str]:
        """The identity of what each trial is looked at through, by its id."""
        return {trial.trial_id(): trial.probes.probes_id() for trial in self.trials}

    def trial(self, trial_id: str) -> TrialSpec:
        """The trial of that id (or of a prefix of it that no other trial has).

        Raises:
            ValueError: If no trial, or more than one, is meant.
        """
        if trial_id in self._by_id:
            return self._by_id[trial_id]
        found = [trial for each, trial in self._by_id.items() if each.startswith(trial_id)]
        if len(found) != 1:
            raise ValueError(
                f"a trial id must name one trial of sweep {self.name!r}, but {len(found)} of them begin with "
                f"{trial_id!r}; `plan` lists the ids"
            )
        return found[0]

    @cached_property
    def _by_id(self) -> dict[str, TrialSpec]:
        return {trial.trial_id(): trial for trial in self.trials}


def states(trial: TrialSpec, name: str) -> bool:
    """Whether a trial states a flattened field outright, and does not leave it to a default or to what fills it in."""
    part: Any = trial
    for each in name.split("."):
        if part is None or each not in part.model_fields_set:
            return False
        part = getattr(part, each)
    return True


def _check_same_look(one: TrialSpec, other: TrialSpec) -> None:
    """Of two cells that are one trial, only one would be heard on what no trial id hashes."""
    if one.probes != other.probes:
        raise SweepError(
            f"cells that are one trial must agree on probes, but trial {one.trial_id()} has ({one.probes}) and "
            f"({other.probes}); give them the same"
        )
    for name in UNHASHED:
        values = getattr(one.compute, name), getattr(other.compute, name)
        if values[0] != values[1]:
            raise SweepError(
                f"cells that are one trial must agree on compute.{name}, but trial {one.trial_id()} has {values[0]} "
                f"and {values[1]}; give them the same"
            )


def vary(base: TrialSpec, changes: Mapping[str, Any]) -> TrialSpec | InvalidCell:
    """The base trial with dotted fields changed, e.g. `vary(base, {"strings.alphabet_size": 7})`.

    Only what the base states outright is carried over: what the family table filled in is filled in anew.
    """
    fields = base.model_dump(exclude_unset=True)
    for name, value in changes.items():
        *parts, last = name.split(".")
        target = fields
        for part in parts:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        # As a dict, so that a later change can reach into it.
        target[last] = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
    try:
        return TrialSpec(**fields)
    except ValidationError as error:
        return InvalidCell(changes, explain(error))


def replicates(base: TrialSpec, seeds: int) -> list[dict[str, int]]:
    """The seeds that each replicate of a cell moves: the string's, and the model's where it is untrained."""
    moved = ["string_seed"] if base.model.pretrained else ["string_seed", "model_seed"]
    return [dict.fromkeys(moved, seed) for seed in range(seeds)]


def explain(error: ValidationError) -> str:
    """One sentence a mistake, without pydantic's machinery."""
    sentences = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "no such field; look for a typing mistake"
        elif detail["type"] != "value_error":
            message = f"{message}, but got {detail['input']!r}"
        sentences.append(f"{where}: {message}" if where else message)
    return "; ".join(sentences)


def load(path: str | Path, /, **parameters: Any) -> Sweep:
    """The sweep of a study file; parameters go to the file's `sweep(...)`, parsed by their annotations.

    Raises:
        SweepError: If the file, its `sweep` function, a parameter or a cell is not right.
    """
    path = Path(path)
    with _explained(path):
        module = _module(path)
        function = getattr(module, "sweep", None)
        if not callable(function):
            raise SweepError(
                f"{path} must define a function `sweep(...) -> Sweep`, but it defines none; see sweeps/demo.py"
            )
        made = function(**_parse(path, function, parameters))
    if not isinstance(made, Sweep):
        raise SweepError(
            f"`sweep` in {path} must return a Sweep, but it returned {type(made).__name__}; end it with "
            "`return Sweep(...)`"
        )
    question = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
    return made.named(path.stem, " ".join(question.split()))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns whatever a study raises into a sentence, with the lines of the study that led there.

    A study is its user's code: a mistake in it is the user's to mend, and the machinery around it is no help.
    """
    try:
        yield
    except SweepError:
        raise
    except ValidationError as error:
        raise SweepError(f"{path}: {explain(error)}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        first = next((k for k, frame in enumerate(frames) if frame.filename == str(path)), len(frames))
        what = "".join(traceback.format_exception_only(error)).rstrip()
        where = "".join(traceback.format_list(frames[first:])).rstrip()
        raise SweepError(f"{path} must run without an error, but it raised {what}\n{where}".rstrip()) from error


def _module(path: Path) -> ModuleType:
    if not os.path.isfile(path) or path.suffix != ".py":  # of Path, the verb raises where a name is too long
        beside = path.parent.glob("*.py") if os.path.isdir(path.parent) else ()
        near = ", ".join(sorted(map(str, beside))) or "none"
        raise SweepError(f"a sweep is a Python file, but {path} is none; files beside it: {near}")
    module = ModuleType(f"memray_study_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    # Not through importlib, which would write a __pycache__ beside the study, and read a stale one when the file is
    # edited twice within a second.
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _parse(path: Path, function: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function, eval_str=True).parameters
    if unknown := [name for name in parameters if name not in known]:
        names = ", ".join(map(repr, unknown))
        raise SweepError(f"{path} has no parameter {names}; parameters: {', '.join(known) or 'none'}")
    empty = inspect.Parameter.empty
    keywords = [each for each in known.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if missing := [each.name for each in keywords if each.default is empty and each.name not in parameters]:
        raise SweepError(f"{path} needs a value of {', '.join(missing)}; give it with -p {missing[0]}=value")
    parsed, problems = {}, []
    for name, value in parameters.items():
        annotation = known[name].annotation
        try:
            parsed[name] = _parse_value(TypeAdapter(Any if annotation is empty else annotation), value)
        except ValidationError as error:
            problems.append(f"{path}: parameter {name}: {explain(error)}")
    if problems:
        raise SweepError("\n".join(problems))
    return parsed


def _parse_value(adapter: TypeAdapter, value: Any) -> Any:
    """The value as it stands, else what it spells: as JSON (`[2,7]`), or as a list with commas (`2,7`).

    Raises:
        ValidationError: If no reading of it fits; says what is wrong with the first.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError:
        for read in (json.loads, lambda text: text.split(",")) if isinstance(value, str) else ():
            try:
                return adapter.validate_python(read(value))
            except (ValueError, RecursionError):  # of the first, JSON's and pydantic's errors are kinds
                continue
        raise
