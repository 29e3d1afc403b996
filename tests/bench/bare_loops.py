"""The bare training loops: what a researcher writes who wants nothing but the numbers.

All trials one after another in one process at two torch threads, on Hugging Face's model, with the same measures at
the same epochs. No scheduler, no tracking, no records. Written to be fast: an epoch's scores are read off the training
forward, and algorithms need not be deterministic.

    python bare_loops.py OUT.json seeds=5 length=256 epochs=100
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from memray.encoding import Batch
from memray.material import prepare
from memray.measurement import Measurement, Measurer
from memray.models import load_model
from memray.scoring import AlphabetIds, TokenScores, collect, score_logits, target_states
from memray.spec import TrialSpec
from memray.sweep import load


def train(spec: TrialSpec) -> list[Measurement]:
    """One trial of one string, measured at every epoch."""
    material = prepare(spec)
    alphabet = material.alphabet
    measurer = Measurer(spec, material.known_trained, material.known_held_out)
    assert material.held_out is not None
    assert spec.training.learning_rate is not None
    model: Any = load_model(spec.model, seed=spec.model_seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), spec.training.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimiser, 0, spec.num_epochs)
    ids, measurements = material.trained.ids, []
    for epoch in range(spec.num_epochs + 1):
        is_last, held_out = epoch == spec.num_epochs, None
        if is_last or epoch in spec.probes.epochs:
            with torch.no_grad():
                logits = model(input_ids=material.held_out.ids).logits
            held_out = scores_of(logits, material.held_out, alphabet)
        with torch.set_grad_enabled(not is_last):
            output = model(input_ids=ids, labels=ids)
        scores = scores_of(output.logits, material.trained, alphabet)
        measurements.append(measurer.measure(epoch, scores, held_out, is_last=is_last))
        if not is_last:
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.training.clip_norm)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    return measurements


@torch.no_grad()
def scores_of(logits: Tensor, batch: Batch, alphabet: AlphabetIds) -> TokenScores:
    states, target_ids = target_states(logits, batch)
    return collect([score_logits(states, target_ids, alphabet)], batch)


def main() -> None:
    out, *pairs = sys.argv[1:]
    torch.set_num_threads(2)
    sweep = load(Path(__file__).with_name("tiny_trials.py"), **dict(pair.split("=") for pair in pairs))
    records = {spec.trial_id(): [each.record() for each in train(spec)] for spec in sweep.trials}
    Path(out).write_text(json.dumps(records))


if __name__ == "__main__":
    main()
