"""Do the effects of alphabet size and entropy hold under a constant learning rate?

Hypothesis: yes (claims A3 and A5 again). Under the usual linear schedule a string that was not memorised when the rate
reached 0 never is, so that being slow and being cut off look alike.

Reads: arXiv 2407.19262, training details, alphabet size and entropy.

Cost: at tiny scale 5 trials a seed, ten seconds each on one core; at paper scale 5 a seed of Pythia-1B at 1,024
symbols over 100 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    training=TrainingSpec(schedule="constant"),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=256), training=TrainingSpec(schedule="constant", epochs=200))
CELLS = [
    {"strings.alphabet_size": 2},
    {"strings.alphabet_size": 7},
    {"strings.alphabet_size": 26},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 1.0},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 2.807},
]


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, cell | seed) for cell in CELLS for seed in replicates(base, seeds))
