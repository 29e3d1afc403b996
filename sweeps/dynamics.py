"""Does a model that memorises a random string first guess its alphabet, and only then recall its tokens?

Hypothesis: yes, with a plateau between the two phases (claim A1). The arm of low entropy tells whether the phases part
where guessing alone already does well.

Reads: arXiv 2407.19262, the two phases.

Cost: at tiny scale 3 trials a seed, ten seconds each on one core; at paper scale 3 a seed of Pythia-1B at 1,024
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
ARMS = [
    {"strings.alphabet_size": 2},
    {"strings.alphabet_size": 26},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 1.0},
]


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, arm | seed) for arm in ARMS for seed in replicates(base, seeds))
