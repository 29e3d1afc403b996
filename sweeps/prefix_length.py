"""How much more of a text is recited if more of it is given?

Hypothesis: more, and less so with each token that is given. Lives of invented people are trained, with the names that
they begin with or without. After 0 to 12 tokens of each the recited ones are counted, of the samples that go on long
enough and up to equally many tokens for each number given: what differs is the prefix, and where in a life they stand.
One pass answers for all.

Reads: arXiv 2502.01187, which cuts its texts at one length.

Cost: at tiny scale 2 trials a seed, half a minute each on one core (`plan` states it). No claim is judged here.
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

GIVEN = (0, 1, 2, 4, 8, 12)

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="biographies"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200, prefix_lengths=GIVEN),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="biographies"), num_samples=320),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=10, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9), num_held_out=50, prefix_lengths=GIVEN),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"corpus.targets": targets} | seed)
        for targets in ("reference", "whole")
        for seed in replicates(base, seeds)
    )
