"""Are later strings memorised faster than the first, and are the first ones forgotten?

Hypothesis: both (claims B1 and B2). Ten strings are memorised one after another. The same strings one by one from the
base weights are the control of B1: what the past gives. The same strings all together, for as many steps, say whether a
model of this size can hold them: what is lost in sequence and held together was lost to interference, not to capacity.

Reads: arXiv 2407.19262, which memorises up to ten strings in sequence.

Cost: at tiny scale 6 trials a seed, some ten seconds each on one core (`plan` states it); at paper scale the sequences
of a 1B model are 1,000 steps each.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(num_strings=10),
    curriculum=CurriculumSpec(),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    strings=StringsSpec(length=64, num_strings=10),
    curriculum=CurriculumSpec(),
    training=TrainingSpec(epochs=60),
    probes=ProbesSpec(epochs=(1, 3, 10, 30)),
)
ALONE = {"curriculum.weights": "base"}
TOGETHER = {"curriculum": None}


def sweep(*, scale: Scale = "tiny", seeds: int = 5, alphabet_sizes: tuple[int, ...] = (7, 26)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.alphabet_size": size} | arm | seed)
        for size in alphabet_sizes
        for arm in ({}, ALONE, TOGETHER)
        for seed in replicates(base, seeds)
    )
