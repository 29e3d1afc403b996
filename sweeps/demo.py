"""What decides how fast a model memorises a random string: how large its alphabet is, or how random it is?

Hypothesis: a model first guesses (it learns which symbols occur, and how often), then recalls. Strings that are harder
to guess, with more symbols or more entropy a symbol, are memorised in fewer epochs.

Reads: arXiv 2407.19262, the two phases, alphabet size and entropy.

Cost: 15 trials of the tiny Pythia, about two minutes on two CPU cores.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=256), training=TrainingSpec(epochs=200))

CELLS = [
    {"strings.alphabet_size": 2},
    {"strings.alphabet_size": 7},
    {"strings.alphabet_size": 26},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 1.0},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 2.807},
]


def sweep(*, scale: Scale = "tiny", seeds: int = 3) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, cell | seed) for cell in CELLS for seed in replicates(base, seeds))
