"""How is a string forgotten while others are memorised after it: linearly, exponentially, by a power law, or in part?

Hypothesis: fast at first, and down to the loss of strings never seen (claims B2 to B4), not to that of the untrained
model. Which curve describes it is open, and whether a larger model forgets more slowly (`sizes`); where the first look
already finds nothing left, no curve can be told.

Reads: arXiv 2407.19262, and a next check: does forgetting keep its shape beyond ten strings? None is published.

Cost: at tiny scale 2 trials a seed, about a minute on one core for 50 strings (`plan` states it); with 200 it takes
more than four times as long, for each stage ends with a look at all strings.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True), curriculum=CurriculumSpec(), compute=ComputeSpec(accelerator="h200")
)
TINY = TrialSpec(
    strings=StringsSpec(length=64),
    curriculum=CurriculumSpec(),
    training=TrainingSpec(epochs=60),
    probes=ProbesSpec(epochs=(1, 2, 4, 8, 16, 32)),
)


NUM_STRINGS: dict[Scale, tuple[int, ...]] = {"paper": (50, 100, 500), "tiny": (20, 50)}
SIZES: dict[Scale, tuple[str, ...]] = {"paper": ("70m", "1b"), "tiny": ("tiny",)}


def sweep(
    *, scale: Scale = "tiny", seeds: int = 5, num_strings: tuple[int, ...] = (), sizes: tuple[str, ...] = ()
) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"model.size": size, "strings.num_strings": number} | seed)
        for size in sizes or SIZES[scale]
        for number in num_strings or NUM_STRINGS[scale]
        for seed in replicates(base, seeds)
    )
