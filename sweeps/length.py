"""Are longer strings memorised later?

Hypothesis: yes, for untrained models. In the authors' data the loss of an untrained model falls below 0.1 at epoch 15,
31, 47 and 85 for 16, 64, 128 and 256 symbols, and not within 100 epochs for 512 and more.

Reads: arXiv 2407.19262, string length, and the authors' data.

Cost: at tiny scale 5 trials a seed, one to eight seconds each on one core (as `plan` has it); at paper scale 7 a seed
of an untrained and 7 of the published Pythia-1B.
"""

from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b"),
    training=TrainingSpec(epochs=100),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(training=TrainingSpec(epochs=150))
LENGTHS = {"paper": (16, 32, 64, 128, 256, 512, 1024), "tiny": (16, 32, 64, 128, 256)}


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(
            base,
            {
                "strings.length": length,
                "model.pretrained": pretrained,
                # Below an untrained model's rate, at which a published one would lose what it knows.
                "training.learning_rate": 1e-5 if scale == "paper" else 1e-3,
                "string_seed": seed,
                "model_seed": seed,
            },
        )
        for pretrained in ((False, True) if scale == "paper" else (False,))
        for length in LENGTHS[scale]
        for seed in range(seeds)
    )
