"""The sequence that the benchmark times: strings of 64 symbols one after another, looked at as `forgetting` does.

It is worth nothing as a study; every side of a comparison reads it from here.
"""

from memray.curriculum import CurriculumSpec
from memray.spec import ProbesSpec, RetentionSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep


def sweep(*, seeds: int = 1, num_strings: int = 200, epochs: int = 60, all_at_ends: bool = True) -> Sweep:
    base = TrialSpec(
        strings=StringsSpec(length=64, num_strings=num_strings),
        training=TrainingSpec(epochs=epochs),
        curriculum=CurriculumSpec(),
        probes=ProbesSpec(
            epochs=(1, 2, 4, 8, 16, 32), retention=RetentionSpec(stage_ends="all" if all_at_ends else "ages")
        ),
    )
    return Sweep(base.model_copy(update={"model_seed": seed, "string_seed": seed}) for seed in range(seeds))
