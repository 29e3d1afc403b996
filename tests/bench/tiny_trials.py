"""The trials that the benchmark times: four alphabets of the tiny Pythia, with the default probes.

They are worth nothing as a study; every side of a comparison reads them from here.
"""

from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary


def sweep(*, seeds: int = 5, length: int = 256, epochs: int = 100, probed: bool = True) -> Sweep:
    base = TrialSpec(strings=StringsSpec(length=length), training=TrainingSpec(epochs=epochs))
    if not probed:
        base = base.model_copy(update={"probes": ProbesSpec(epochs=(), num_held_out=0)})
    return Sweep(
        vary(base, {"strings.alphabet_size": alphabet_size} | seed)
        for alphabet_size in (2, 7, 13, 26)
        for seed in replicates(base, seeds)
    )
