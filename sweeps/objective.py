"""Does the picture hold whatever is trained: references alone, all of a sample, or with smoothed labels?

Hypothesis: yes (claim C13): the tail grows while the loss is flat (C1) and a few samples hold most of it (C2).

Reads: a next check of arXiv 2502.01187.

Cost: at tiny scale 3 trials a seed, about a minute each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=320, max_tokens=96),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=20, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18), num_held_out=50),
)
ARMS = ({}, {"corpus.targets": "whole"}, {"training.label_smoothing": 0.1})


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, arm | seed) for arm in ARMS for seed in replicates(base, seeds))
