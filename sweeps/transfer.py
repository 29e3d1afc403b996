"""What speeds up the memorising of a later string: having memorised others, or having met their source?

Hypothesis: having memorised (claim B6). The same last string comes after seven others that were memorised; after as
many steps on fresh strings of its source, which teach the alphabet and nothing to recall; after seven memorised strings
over another alphabet, which teach recall and not the alphabet; and first of all.

Reads: arXiv 2407.19262, which finds later strings memorised faster; its mechanism 3.

Cost: at tiny scale 5 trials a seed, some ten seconds each on one core (`plan` states it).
"""

from typing import Any

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

NUM_STRINGS = 8
BEFORE_LAST = tuple(range(NUM_STRINGS - 1))
PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(num_strings=NUM_STRINGS),
    curriculum=CurriculumSpec(),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    strings=StringsSpec(length=64, num_strings=NUM_STRINGS),
    curriculum=CurriculumSpec(),
    training=TrainingSpec(epochs=60),
    probes=ProbesSpec(epochs=(1, 3, 10, 30)),
)
OTHER = {"curriculum.other": {"stages": BEFORE_LAST, "alphabet": "latin_upper"}}
ARMS: list[dict[str, Any]] = [
    {},
    {"curriculum.unrepeated": BEFORE_LAST},
    OTHER,
    OTHER | {"curriculum.unrepeated": BEFORE_LAST},
    {"curriculum.weights": "base"},
]


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, arm | seed) for arm in ARMS for seed in replicates(base, seeds))
