"""Which training procedure changes how entropy affects memorisation?

Hypothesis: none is known to (claim A16, an open question of the paper). Strings of low and of high entropy are
memorised by two families, two optimisers, and by full fine-tuning, adapters and half of the blocks; each cell is to be
read at its best rate of three.

Reads: arXiv 2407.19262, open question 1.

Cost: at tiny scale 30 trials a seed, one or two seconds each on one core (as `plan` has it); at paper scale 30 a seed
of Pythia-1B and Phi-1.5.
"""

from memray.spec import ComputeSpec, LoraSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=64), training=TrainingSpec(epochs=100))
PHI = {"paper": "1.5", "tiny": "tiny"}
FROZEN = {"paper": tuple(range(8)), "tiny": (0, 1)}


def procedures(scale: Scale) -> list[tuple[dict[str, object], float]]:
    """What is changed, and the middle one of its three rates."""
    usual = 1e-5 if scale == "paper" else 1e-3
    return [
        ({}, usual),
        ({"model.family": "phi", "model.size": PHI[scale]}, usual),
        ({"training.optimiser": "sgd", "training.momentum": 0.9}, 100 * usual),
        ({"model.lora": LoraSpec(rank=32, alpha=64.0)}, 10 * usual),
        ({"training.frozen_blocks": FROZEN[scale]}, usual),
    ]


def sweep(*, scale: Scale = "tiny", seeds: int = 5, entropies_bits: tuple[float, ...] = (2.0, 4.7)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, procedure | {"training.learning_rate": rate, "strings.entropy_bits": entropy_bits} | seed)
        for procedure, middle in procedures(scale)
        for rate in (middle / 3, middle, middle * 3)
        for entropy_bits in entropies_bits
        for seed in replicates(base, seeds)
    )
