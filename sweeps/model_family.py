"""Do the guessing phase and the memorisation phase appear in every model family?

Hypothesis: yes, with lengths that differ (claims A1 and A2). Each family runs at its own default rate and BOS rule.

Reads: arXiv 2407.19262, dynamics by family; GPT-2 and OPT come from its earlier version.

Cost: at tiny scale 5 trials a seed, four seconds each on one core; at paper scale 5 a seed on one
accelerator of 141 GB, Llama-2 by far the largest.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1023),  # one less than the 1,024 of the other studies: GPT-2 with BOS reads no more
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(strings=StringsSpec(length=256), training=TrainingSpec(epochs=200))
SIZES = {"pythia": "1b", "phi": "1.5", "llama2": "7b", "gpt2": "1.5b", "opt": "1.3b"}


def sweep(*, scale: Scale = "tiny", seeds: int = 5, families: tuple[str, ...] = tuple(SIZES)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"model.family": family, "model.size": SIZES[family] if scale == "paper" else "tiny"} | seed)
        for family in families
        for seed in replicates(base, seeds)
    )
