"""A sweep: the distinct trials that answer one question, computed by plain Python.

A study is a file with a function `sweep(*, scale, seeds, ...) -> Sweep`. The grid is a comprehension over
:func:`vary`; an invalid cell does not stop it, so that all of them are reported together, before anything is
scheduled. Scheduling is someone else's business.
"""

import importlib.util
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from memray.spec import TrialSpec

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
        trials: Duplicates are dropped: arms of a study may share a cell.
        name: Names the MLflow experiment and the ledger's folder; the file's stem when loaded from one.
        question: The first paragraph of the study's docstring.

    Raises:
        SweepError: If there is no trial, or any cell is invalid; lists all that are.
    """

    trials: tuple[TrialSpec, ...]
    name: str = "sweep"
    question: str = ""

    def __init__(self, trials: Iterable[TrialSpec | InvalidCell], name: str = "sweep", question: str = "") -> None:
        cells = list(trials)
        if invalid := [cell for cell in cells if isinstance(cell, InvalidCell)]:
            lines = [f"  {dict(cell.changes)}: {cell.reason}" for cell in invalid]
            raise SweepError("\n".join([f"{len(invalid)} of {len(cells)} cells are invalid:", *lines]))
        if not cells:
            raise SweepError("a sweep must have at least one trial, but this one has none; check the ranges of its grid")
        distinct = {cell.trial_id(): cell for cell in cells if isinstance(cell, TrialSpec)}
        object.__setattr__(self, "trials", tuple(distinct.values()))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "question", question)

    def varying(self) -> tuple[str, ...]:
        """The flattened fields in which the trials differ, seeds last."""
        params = [trial.params() for trial in self.trials]
        names = [name for name in params[0] if len({str(each[name]) for each in params}) > 1]
        return tuple(sorted(names, key=lambda name: name.endswith("_seed")))

    def cells(self) -> dict[str, tuple[TrialSpec, ...]]:
        """The trials by cell: those that differ in seeds alone are replicates."""
        cells: dict[str, list[TrialSpec]] = {}
        for trial in self.trials:
            cells.setdefault(trial.cell_id(), []).append(trial)
        return {cell_id: tuple(trials) for cell_id, trials in cells.items()}

    def trial(self, trial_id: str) -> TrialSpec:
        """The trial of that id (or of a prefix of it that no other trial has).

        Raises:
            ValueError: If no trial, or more than one, is meant.
        """
        found = [trial for trial in self.trials if trial.trial_id().startswith(trial_id)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} trials of sweep {self.name!r} have an id that begins with {trial_id!r}; `plan` lists the ids"
            )
        return found[0]


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
        target[last] = value
    try:
        return TrialSpec(**fields)
    except ValidationError as error:
        return InvalidCell(changes, explain(error))


def replicates(base: TrialSpec, seeds: int) -> list[dict[str, int]]:
    """The seeds that each replicate of a cell moves: the string's, and the model's where it is untrained."""
    moved = ["string_seed"] if base.model.pretrained else ["string_seed", "model_seed"]
    return [{name: seed for name in moved} for seed in range(seeds)]


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


def load(path: str | Path, **parameters: Any) -> Sweep:
    """The sweep of a study file; parameters go to the file's `sweep(...)`, parsed by their annotations.

    Raises:
        SweepError: If the file, its `sweep` function, a parameter or a cell is not right.
    """
    path = Path(path)
    module = _module(path)
    function = getattr(module, "sweep", None)
    if not callable(function):
        raise SweepError(f"{path} must define a function `sweep(...) -> Sweep`, but it defines none; see sweeps/demo.py")
    try:
        made = function(**_parse(path, function, parameters))
    except ValidationError as error:
        raise SweepError(f"{path}: {explain(error)}") from error
    if not isinstance(made, Sweep):
        raise SweepError(f"`sweep` in {path} must return a Sweep, but it returned {type(made).__name__}")
    question = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
    return Sweep(made.trials, name=path.stem, question=question)


def _module(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        near = ", ".join(sorted(str(each) for each in path.parent.glob("*.py"))) or "none"
        raise SweepError(f"a sweep is a Python file, but {path} is none; files beside it: {near}")
    spec = importlib.util.spec_from_file_location(f"memray_study_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse(path: Path, function: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function, eval_str=True).parameters
    parsed = {}
    for name, value in parameters.items():
        if name not in known:
            raise SweepError(f"{path} has no parameter {name!r}; parameters: {', '.join(known) or 'none'}")
        annotation = known[name].annotation
        adapter = TypeAdapter(Any if annotation is inspect.Parameter.empty else annotation)
        try:
            try:
                parsed[name] = adapter.validate_python(value)
            except ValidationError:
                if not isinstance(value, str) or value[:1] not in "[{":
                    raise
                parsed[name] = adapter.validate_python(json.loads(value))
        except ValidationError as error:
            raise SweepError(f"{path}: parameter {name}: {explain(error)}") from error
    return parsed
