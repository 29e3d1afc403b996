"""Are strings of higher entropy memorised faster in structured strings too?

Hypothesis: yes (claim A9), counted by novel symbol. In repeated strings a motif is tiled, in hierarchical ones motifs
are composed of motifs; both have the same number of novel symbols at any entropy, and compress better than random
strings of the same entropy (claim A8).

Reads: arXiv 2407.19262; the first of the checks that its summary proposes.

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
# A quarter of a string's symbols is novel in both: one motif of n / 4, or 2^2 motifs of n / 16 in 3^2 places.
MOTIFS = {"paper": 1024 // 4, "tiny": 256 // 4}


def structures(scale: Scale) -> list[dict[str, object]]:
    novel = MOTIFS[scale]
    return [
        {"strings.kind": "iid"},
        {"strings.kind": "repeated", "strings.motif_length": novel},
        {
            "strings.kind": "hierarchical",
            "strings.motif_length": novel // 4,
            "strings.depth": 2,
            "strings.branching": 3,
        },
    ]


def sweep(*, scale: Scale = "tiny", seeds: int = 5, entropies_bits: tuple[float, ...] = (1.0, 2.807, 4.7)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, structure | {"strings.entropy_bits": entropy_bits} | seed)
        for structure in structures(scale)
        for entropy_bits in entropies_bits
        for seed in replicates(base, seeds)
    )
