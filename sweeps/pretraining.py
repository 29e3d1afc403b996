"""Are strings memorised faster by a model that was pre-trained?

Hypothesis: yes, and fastest by one that was pre-trained for a while (claim A10). At paper scale the arms are Pythia-1B
without its weights, at intermediate checkpoints, and as published. Nothing can be downloaded at tiny scale: there the
arms are pre-trained here, on fresh random strings, for longer and longer.

Reads: arXiv 2407.19262, pretrained against untrained models, and the authors' data on intermediate checkpoints.

Cost: at tiny scale 3 trials a seed, eight to thirty seconds each on one core (as `plan` has it); at paper scale 5 a
seed of Pythia-1B over 300 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    training=TrainingSpec(epochs=300),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=256, alphabet_size=7), training=TrainingSpec(epochs=150))
ARMS = {
    "paper": [
        {"model.pretrained": False},
        {"model.revision": "step1000"},
        {"model.revision": "step10000"},
        {"model.revision": "step71000"},
        {"model.pretrained": True},
    ],
    "tiny": [{"model.in_context.steps": steps} for steps in (0, 100, 300)],
}


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    # The model's seed moves in every arm, although published weights ignore it: arms differ in nothing but the arm.
    return Sweep(
        vary(base, arm | {"string_seed": seed, "model_seed": seed}) for arm in ARMS[scale] for seed in range(seeds)
    )
