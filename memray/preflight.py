"""What can be wrong with a sweep that its specs alone do not tell: memory, files, and symbols that are no tokens.

Everything is looked for before anything is scheduled, and nothing is asked of a network except to download.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memray import families
from memray.corpora import name_of
from memray.cost import check_fits
from memray.spec import ModelSpec, TrialSpec
from memray.strings import TextSource
from memray.sweep import Sweep, SweepError


def check(sweep: Sweep, *, asks_network: bool = False) -> list[str]:
    """Refuses a sweep with trials that cannot run.

    Args:
        asks_network: Whether data sets of the hub are fetched, to be checked too. What else the hub has must be here.

    Returns:
        What could not be checked, because it is not downloaded yet, and what is left out of a text.

    Raises:
        SweepError: Lists every trial that cannot run, and why.
    """
    problems, notes = {}, []
    encoders, absent = _flawed_encoders(sweep, on_hub=False), _flawed_encoders(sweep, on_hub=True)
    if asks_network:
        encoders |= absent
    else:
        notes += [
            f"the sentence encoder {where} is not downloaded yet and will be checked when it is; its branch main may "
            "hold another one tomorrow, a directory would not"
            for where in absent
        ]
    encodings: dict[tuple[Any, ...], str | None] = {}
    for trial in sweep.trials:
        model = trial.model.model_copy(update={"pretrained": False, "lora": None, "dropout": 0.0})
        key = (model, trial.strings.alphabet, trial.strings.alphabet_size)
        if trial.strings.kind == "text":
            key = (model, trial.strings, trial.probes)
        if trial.corpus is not None:
            key = (model, trial.corpus.model_dump_json(), trial.corpus.rows.path, trial.string_seed, trial.probes)
        try:
            check_fits(trial)
            _check_files(trial)
            if key not in encodings:
                encodings[key] = _encoding_problem(trial, model, notes, asks_network=asks_network)
            if problem := encodings[key] or encoders.get(_encoder_of(trial) or ""):
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


def _encoder_of(trial: TrialSpec) -> str | None:
    """The sentence encoder that a trial compares its samples by."""
    return trial.probes.embeddings.encoder if trial.probes.embeddings else None


def _flawed_encoders(sweep: Sweep, *, on_hub: bool) -> dict[str, str]:
    """The sentence encoders, of the hub or in directories, that cannot be read here as they are, and why."""
    named = sorted({found for trial in sweep.trials if (found := _encoder_of(trial))})
    if not named:
        return {}
    from memray.embedding import check_encoder, is_on_hub

    flaws = {}
    for where in named:
        if is_on_hub(where) == on_hub:
            try:
                check_encoder(where)
            except ValueError as error:
                flaws[where] = str(error)
    return flaws


def _hub_data(trial: TrialSpec) -> list[str]:
    """The data sets of the hub that a trial reads."""
    corpus = trial.corpus
    sources = [] if corpus is None else [corpus.rows, corpus.foreign]
    return [name_of(each) for each in sources if each is not None and each.hub_id is not None]


def _unpinned(trial: TrialSpec) -> list[str]:
    corpus = trial.corpus
    sources = [] if corpus is None else [corpus.rows, corpus.foreign]
    return [
        f"revision {each.revision!r} of {name_of(each)} may hold other rows tomorrow; a commit would not"
        for each in sources
        if each is not None and each.hub_id is not None and not re.fullmatch("[0-9a-f]{40}", each.revision)
    ]


def _left_out(trial: TrialSpec, report: Mapping[str, int]) -> list[str]:
    """What a user should know of the samples of a trial before it is run."""
    assert trial.corpus is not None
    told = {
        "bad_rows": "rows are bad and left out",
        "too_long": "rows are too long and left out",
        "cut": "samples are cut at their end",
        "duplicates": "samples are there more than once",
        "held_out_trained": "held-out samples are trained too",
    }
    found = [f"{report[key]} {text}" for key, text in told.items() if report[key]]
    return [f"of {name_of(trial.corpus.rows)}, " + ", ".join(found)] if found else []


def _encoding_problem(trial: TrialSpec, model: ModelSpec, notes: list[str], *, asks_network: bool) -> str | None:
    if model.path is None and model.size == "tiny" and trial.strings.kind != "text":
        return None  # its tokenizer has every built-in symbol
    # Only here, because transformers takes seconds to import.
    from memray.fact_ranks import check_facts
    from memray.material import prepare
    from memray.models import is_at_hand
    from memray.sample_measurement import check_prefix_lengths
    from memray.samples import prepare_samples

    if not is_at_hand(model):
        notes.append(
            f"{model.family} {model.size} is not downloaded yet: whether each symbol is one of its tokens will be "
            "checked when it is"
        )
        return None
    if trial.corpus is not None and not asks_network and (names := _hub_data(trial)):
        notes.append(f"the rows of {' and '.join(names)} lie on the hub and will be checked when they are fetched")
        notes += _unpinned(trial)
        return None
    try:
        if trial.corpus is not None:
            samples = prepare_samples(trial)
            check_facts(trial, samples)
            check_prefix_lengths(trial, samples.known)
            notes += _left_out(trial, samples.report)
            return None
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
    """Fetches what the hub has of the sweep's models, sentence encoders and rows, once, and checks what could not be
    checked before.

    Returns:
        The models and encoders that were fetched, and the data sets.

    Raises:
        SweepError: As :func:`check` does.
        ValueError: If the hub cannot be reached.
    """
    public = [trial.model for trial in sweep.trials if _is_public(trial.model)]
    models = {model.model_dump_json(): model for model in public}.values()
    data = sorted({name for trial in sweep.trials for name in _hub_data(trial)})
    encoders = [*_flawed_encoders(sweep, on_hub=True)]
    if not models and not data and not encoders:
        return []
    from memray.embedding import download_encoder
    from memray.models import download as fetch
    from memray.models import is_at_hand

    absent = [model for model in models if not is_at_hand(model)]
    for model in absent:
        fetch(model)
    for where in encoders:
        download_encoder(where)
    if absent or encoders or data:
        check(sweep, asks_network=True)
    return [f"{model.family} {model.size}" for model in absent] + encoders + data


def _is_public(model: ModelSpec) -> bool:
    return model.path is None and families.size(model.family, model.size).hub_id is not None
