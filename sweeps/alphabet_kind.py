"""Does it matter which symbols a string is made of?

Hypothesis: hardly. Ten symbols are as random in any script; what differs is how often a model has met them, and with
untrained models not even that.

Reads: arXiv 2407.19262, non-Latin alphabets.

Cost: at tiny scale 7 trials a seed, four seconds each on one core (as `plan` has it); at paper scale 5 a seed of
Pythia-1B, without Greek and Chinese, whose symbols a public tokenizer may split.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024, alphabet_size=10),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=128, alphabet_size=10), training=TrainingSpec(epochs=120))
KINDS = {
    "paper": ("latin", "latin_upper", "digits", "cyrillic", "vocabulary"),
    "tiny": ("latin", "latin_upper", "digits", "greek", "cyrillic", "cjk", "vocabulary"),
}


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.alphabet": kind} | seed) for kind in KINDS[scale] for seed in replicates(base, seeds)
    )
