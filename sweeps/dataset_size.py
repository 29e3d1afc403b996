"""Does a model memorise a string more slowly when it has to memorise others beside it?

Hypothesis: yes (claim A17). Three arms tell what "slowly" means: the same number of epochs, the same number of
optimiser steps, and the same number of tokens in all (num_strings x length = 1,024). Strings are nested, and every
cell is compared on the one string that all cells share (in the last arm, on its first symbols).

Reads: arXiv 2407.19262, dataset size.

Cost: at tiny scale 10 trials a seed, from two seconds to two minutes on one core; at paper scale 10 trials a seed of
Pythia-1B.
"""

from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PROBES = ProbesSpec(compared_strings=1)
PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    training=TrainingSpec(epochs=100),
    compute=ComputeSpec(accelerator="h100-80gb"),
    probes=PROBES,
)
TINY = TrialSpec(strings=StringsSpec(length=64), training=TrainingSpec(epochs=60), probes=PROBES)
TOTAL_TOKENS = 1024
STEPS_MATCHED_AT = 16  # the number of strings at which the first two arms share a cell


def sweep(*, scale: Scale = "tiny", seeds: int = 5, num_strings: tuple[int, ...] = (1, 4, 16, 64)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    num_steps = base.num_epochs * STEPS_MATCHED_AT
    cells = []
    for count in num_strings:
        cells += [
            {"strings.num_strings": count},
            {"strings.num_strings": count, "training.epochs": max(1, num_steps // count)},
            {"strings.num_strings": count, "strings.length": TOTAL_TOKENS // count},
        ]
    return Sweep(vary(base, cell | seed) for cell in cells for seed in replicates(base, seeds))
