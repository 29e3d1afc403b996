"""As many trials as are asked for, ten to a cell. `schedule.py` leaves out what they would compute."""

from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

BASE = TrialSpec(
    strings=StringsSpec(length=16), training=TrainingSpec(epochs=10), probes=ProbesSpec(epochs=(), num_held_out=0)
)
SEEDS = 10


def sweep(*, trials: int = 10) -> Sweep:
    return Sweep(
        vary(BASE, {"training.learning_rate": 1e-3 * (1 + cell / 10_000)} | seed)
        for cell in range(trials // SEEDS)
        for seed in replicates(BASE, SEEDS)
    )
