"""Are strings of higher entropy memorised faster, with the alphabet held?

Hypothesis: yes, although they are harder to guess (claim A5). The skew over-samples one symbol; the five levels are
those of uniform alphabets with 2, 4, 7, 13 and 26 symbols.

Reads: arXiv 2407.19262, entropy.

Cost: at tiny scale 5 trials a seed, four seconds each on one core; at paper scale 5 a seed of Pythia-1B at 1,024
symbols over 100 epochs.
"""

from typing import Literal

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
    entropies_bits: tuple[float, ...] = (1.0, 2.0, 2.807, 3.7, 4.7),
    skew: Literal["one-token", "geometric", "zipf"] = "one-token",
) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.entropy_bits": entropy_bits, "strings.skew": skew} | seed)
        for entropy_bits in entropies_bits
        for seed in replicates(base, seeds)
    )
