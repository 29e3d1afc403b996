"""What can be wrong with a sweep that its specs alone do not tell: memory, files, and symbols that are no tokens.

Everything is looked for before anything is scheduled, and nothing is asked of a network except to download.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from memray.cost import check_fits
from memray.spec import ModelSpec, TrialSpec
from memray.strings import TextSource
from memray.sweep import Sweep, SweepError


def check(sweep: Sweep) -> list[str]:
    """Refuses a sweep with trials that cannot run.

    Returns:
        What could not be checked, because a model is not downloaded yet, and what is left out of a text.

    Raises:
        SweepError: Lists every trial that cannot run, and why.
    """
    problems, notes = {}, []
    encodings: dict[tuple[Any, ...], str | None] = {}
    for trial in sweep.trials:
        model = trial.model.model_copy(update={"pretrained": False, "lora": None, "dropout": 0.0})
        key = (model, trial.strings.alphabet, trial.strings.alphabet_size)
        if trial.strings.kind == "text":
            key = (model, trial.strings, trial.probes)
        try:
            check_fits(trial)
            _check_files(trial)
            if key not in encodings:
                encodings[key] = _encoding_problem(trial, model, notes)
            if problem := encodings[key]:
                raise ValueError(problem)
        except ValueError as error:
            problems[trial.trial_id()] = str(error)
    if problems:
        lines = [f"{len(problems)} of {len(sweep.trials)} trials of {sweep.name} cannot run:"]
        raise SweepError("\n".join(lines + [f"  {trial_id}: {text}" for trial_id, text in problems.items()]))
    return list(dict.fromkeys(notes))


def _check_files(trial: TrialSpec) -> None:
    """What the family table cannot tell of a directory, what an option needs, and whether a text is still the same."""
    if trial.strings.kind == "text":
        trial.strings.text()
    if trial.model.lora is not None and importlib.util.find_spec("peft") is None:
        raise ValueError("model.lora needs the package peft, which is not installed; pip install 'memray[lora]'")
    if trial.model.path is None:
        return
    from memray.models import check_weight_files

    config = json.loads((Path(trial.model.path) / "config.json").read_text())  # `check_fits` has read it
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if longest is not None and trial.num_tokens > longest:
        raise ValueError(
            f"the model in {trial.model.path} reads at most {longest} tokens, but a string of this trial has "
            f"{trial.num_tokens}, BOS included; shorten them or take another model"
        )
    if trial.model.pretrained:
        check_weight_files(Path(trial.model.path))


def _encoding_problem(trial: TrialSpec, model: ModelSpec, notes: list[str]) -> str | None:
    if model.path is None and model.size == "tiny" and trial.strings.kind != "text":
        return None  # its tokenizer has every built-in symbol
    # Only here, because transformers takes seconds to import.
    from memray.material import prepare
    from memray.models import is_at_hand

    if not is_at_hand(model):
        notes.append(
            f"{model.family} {model.size} is not downloaded yet: whether each symbol is one of its tokens will be "
            "checked when it is"
        )
        return None
    try:
        source = prepare(trial).source
    except ValueError as error:
        return str(error)
    if isinstance(source, TextSource) and source.num_left_out:
        notes.append(
            f"{source.num_left_out} of the {source.num_left_out + len(source.symbols)} tokens of {trial.strings.path} "
            f"are special or unknown to {model.family} {model.size} and are left out"
        )
    return None


def download(sweep: Sweep) -> list[str]:
    """Fetches what the hub has of the sweep's models, once, and then checks what could not be checked before.

    Returns:
        The models that were fetched.

    Raises:
        SweepError: As :func:`check` does.
        ValueError: If the hub cannot be reached.
    """
    public = [trial.model for trial in sweep.trials if trial.model.path is None and trial.model.size != "tiny"]
    models = {model.model_dump_json(): model for model in public}.values()
    if not models:
        return []
    from memray.models import download as fetch
    from memray.models import is_at_hand

    absent = [model for model in models if not is_at_hand(model)]
    for model in absent:
        fetch(model)
    if absent:
        check(sweep)
    return [f"{model.family} {model.size}" for model in absent]
