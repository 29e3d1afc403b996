"""Is a forgotten string memorised faster the second time than a new one from the same weights?

Hypothesis: yes, and the more so the younger the memory (claim B5). After eight strings one trial meets an earlier one
again, and another a ninth; the strings before are the same, and so are the weights.

Reads: Ebbinghaus' savings, of which arXiv 2407.19262 does not speak.

Cost: at tiny scale 5 trials a seed, some ten seconds each on one core (`plan` states it).
"""

from typing import Any

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

NUM_STRINGS = 8
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
# From the youngest memory to the oldest; the last string is still known.
REVISITED = (NUM_STRINGS - 2, NUM_STRINGS - 3, NUM_STRINGS - 5, 0)


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    arms: list[dict[str, Any]] = [{"strings.num_strings": NUM_STRINGS + 1}]
    arms += [{"curriculum.revisits": (stage,)} for stage in REVISITED]
    return Sweep(vary(base, arm | seed) for arm in arms for seed in replicates(base, seeds))
