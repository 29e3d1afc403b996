"""At which learning rate does a model memorise fastest?

Hypothesis: at one about as large as training bears; the defaults lie below it. The best rate is printed in the form
that a spec takes.

Reads: arXiv 2407.19262, training details, which state one rate a family.

Cost: at tiny scale 5 trials a seed, four seconds each on one core (as `plan` has it); at paper scale 5 a seed of
Pythia-1B at 1,024 symbols over 100 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=128), training=TrainingSpec(epochs=150))
RATES = {"paper": (2e-6, 5e-6, 1e-5, 2e-5, 5e-5), "tiny": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}
SIZES = {"pythia": "1b", "phi": "1.5", "llama2": "7b", "gpt2": "1.5b", "opt": "1.3b"}


def sweep(*, scale: Scale = "tiny", seeds: int = 5, family: str = "pythia") -> Sweep:
    base = PAPER if scale == "paper" else TINY
    size = SIZES.get(family, "tiny") if scale == "paper" else "tiny"
    return Sweep(
        vary(base, {"model.family": family, "model.size": size, "training.learning_rate": rate} | seed)
        for rate in RATES[scale]
        for seed in replicates(base, seeds)
    )
