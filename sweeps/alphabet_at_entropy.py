"""Does the size of the alphabet matter, where the entropy is held?

Hypothesis: no (claim A6): what looks like an effect of the alphabet's size is one of the entropy that moves with it.
Strings of one and of two bits a symbol are drawn from alphabets of every size that has them.

Reads: arXiv 2407.19262, alphabet size and entropy; the second of the first experiments that its summary proposes.

Cost: at tiny scale 9 trials a seed, ten seconds each on one core; at paper scale 9 a seed of Pythia-1B at 1,024
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
SIZES = {1.0: (2, 4, 7, 13, 26), 2.0: (4, 7, 13, 26)}


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.alphabet_size": size, "strings.entropy_bits": entropy_bits} | seed)
        for entropy_bits, sizes in SIZES.items()
        for size in sizes
        for seed in replicates(base, seeds)
    )
