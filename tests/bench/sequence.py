"""A sequence in one process. Each part writes or prints one JSON object.

    python tests/bench/sequence.py bare OUT.json num_strings=200 epochs=60
    python tests/bench/sequence.py growth num_strings=200 epochs=60

`bare` is the loop of a researcher who wants nothing but the numbers: Hugging Face's model at two torch threads, the
same strings looked at with the same weights, the same measures; no scheduler, no tracking, no records. `growth` is our
trial, in which nothing but a fixed number of strings is looked at: how long its early and its late stages take.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_loops import scores_of
from torch import nn
from transformers import get_linear_schedule_with_warmup

from memray.curriculum import BEFORE, strings_to_look_at
from memray.material import Material, prepare
from memray.measurement import Measurement
from memray.models import load_model
from memray.sequence_measurement import BASE, Place, SequenceMeasurer, recalled
from memray.spec import TrialSpec
from memray.sweep import load
from memray.trial import run_trial

STAGES = 10  # early and late ones


def train(spec: TrialSpec) -> list[Measurement]:
    """One trial, measured at the end of every stage."""
    material, stages, training = prepare(spec), spec.stages(), spec.training
    assert training.learning_rate is not None
    assert training.epochs is not None
    measurer = SequenceMeasurer(spec, {BASE: material.known_trained})
    model: Any = load_model(spec.model, seed=spec.model_seed).train()
    learned = np.full(len(material.known_trained), BEFORE)

    def look(place: Place) -> None:
        ages = None if place.is_end and spec.probes.retention.stage_ends == "all" else spec.probes.retention.ages
        future = spec.probes.retention.num_future
        asked = strings_to_look_at(stages, place.stage, learned, ages=ages, num_future=future)
        measurer.add(place.block(recall_of(model, material, asked), is_own=False))

    look(Place(BEFORE, 0, 0, 0, True))
    measurements, step = [measurer.close(BEFORE, 0)], 0
    for stage in stages:
        optimiser = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=0.0, fused=True)
        schedule = get_linear_schedule_with_warmup(optimiser, 0, training.epochs)
        own = material.trained.of(np.array(stage.strings))
        known = [material.known_trained[string] for string in stage.strings]
        for epoch in range(training.epochs + 1):
            is_end = epoch == training.epochs
            place = Place(stage.index, stage.index * training.epochs + epoch, epoch, step, is_end)
            if is_end or epoch in spec.probes.epochs:
                look(place)
            with torch.set_grad_enabled(not is_end):
                output = model(input_ids=own.ids, labels=own.ids)
            scores = scores_of(output.logits, own, material.alphabet)
            part = recalled(scores, known, stage.strings, source=BASE, is_held_out=False)
            measurer.add(place.block([part], is_own=True))
            if not is_end:
                output.loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
                step += 1
        measurements.append(measurer.close(stage.index, place.epoch))
        learned[list(stage.strings)] = stage.index
    return measurements


@torch.no_grad()
def recall_of(model: Any, material: Material, asked: list[int]) -> list[dict[str, np.ndarray]]:
    assert material.held_out is not None
    batch, parts = material.trained.of(np.array(asked, dtype=np.int64)).beside(material.held_out), []
    scores = scores_of(model(input_ids=batch.ids).logits, batch, material.alphabet)
    if asked:
        known = [material.known_trained[string] for string in asked]
        parts.append(recalled(scores.first(len(asked)), known, asked, source=BASE, is_held_out=False))
    held_out = material.known_held_out
    ids = range(len(held_out))
    return [*parts, recalled(scores.after(len(asked)), held_out, ids, source=BASE, is_held_out=True)]


def growth(spec: TrialSpec) -> dict[str, list[float]]:
    """Seconds of stages around the tenth, and of as many around the tenth from the end."""
    torch.set_num_threads(1)
    ends = [each.scored_s for each in run_trial(spec)]
    seconds = np.diff(ends).tolist()
    return {"early_s": seconds[5 : 5 + STAGES], "late_s": seconds[-5 - STAGES : -5]}


def main() -> None:
    part, *arguments = sys.argv[1:]
    pairs = [each for each in arguments if "=" in each]
    more = ["all_at_ends=false"] if part == "growth" else []
    sweep = load(Path(__file__).with_name("tiny_sequences.py"), **dict(pair.split("=") for pair in [*pairs, *more]))
    (spec,) = sweep.trials
    if part == "growth":
        print(json.dumps(growth(spec)))
        return
    torch.set_num_threads(2)
    Path(arguments[0]).write_text(json.dumps({spec.trial_id(): [each.record() for each in train(spec)]}))


if __name__ == "__main__":
    main()
