"""How much replay of earlier strings keeps them, and what does it cost the new ones?

Hypothesis: a share of the earlier strings beside every step keeps all of them, because each is met again before it is
lost; the new string is memorised a little later for it.

Reads: arXiv 2407.19262, whose sequences forget; replay is the oldest remedy of continual learning.

Cost: at tiny scale 5 trials a seed, ten seconds to half a minute each on one core (`plan` states it): a share of 1
trains all earlier strings in every step.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(num_strings=10),
    curriculum=CurriculumSpec(),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    strings=StringsSpec(length=64, num_strings=10),
    curriculum=CurriculumSpec(),
    training=TrainingSpec(epochs=60),
    probes=ProbesSpec(epochs=(1, 3, 10, 30)),
)
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"curriculum.replay_share": share} | seed) for share in SHARES for seed in replicates(base, seeds)
    )
