"""Are strings whose short prefixes tell more of the next symbol memorised faster?

Hypothesis: no (claim A7), and compression is therefore not the mechanism (claim A8). Each string is a Markov chain with
a uniform marginal; only the entropy that is left, given the symbol before, is moved.

Reads: arXiv 2407.19262, on predictive prefixes.

Cost: at tiny scale 4 trials a seed, ten seconds each on one core; at paper scale 4 a seed of Pythia-1B at 1,024
symbols over 100 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(kind="markov", length=1024, alphabet_size=8),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(kind="markov", length=256, alphabet_size=8), training=TrainingSpec(epochs=200))


def sweep(
    *, scale: Scale = "tiny", seeds: int = 5, conditional_entropies_bits: tuple[float, ...] = (0.75, 1.5, 2.25, 3.0)
) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.conditional_entropy_bits": bits} | seed)
        for bits in conditional_entropies_bits
        for seed in replicates(base, seeds)
    )
