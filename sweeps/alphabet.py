"""Are strings over a smaller alphabet memorised later?

Hypothesis: yes. A small alphabet is guessed well, so that little loss is left to drive recall, and the onset of
memorisation comes later (claims A3 and A4).

Reads: arXiv 2407.19262, alphabet size; strings are uniform, so that the entropy moves with the size.

Cost: at tiny scale 5 trials a seed, four seconds each on one core; at paper scale 5 a seed of Pythia-1B at 1,024
symbols over 100 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=256), training=TrainingSpec(epochs=200))


def sweep(
    *,
    scale: Scale = "tiny",
    seeds: int = 5,
    alphabet_sizes: tuple[int, ...] = (2, 4, 7, 13, 26),
    family: str = "pythia",
) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"model.family": family, "strings.alphabet_size": alphabet_size} | seed)
        for alphabet_size in alphabet_sizes
        for seed in replicates(base, seeds)
    )
