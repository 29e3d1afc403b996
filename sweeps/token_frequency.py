"""Does the frequency of words shape how skewed memorisation is?

Hypothesis: yes (claim C12). References of eight words, drawn alike from all words or by Zipf's law: the commoner its
words, the less of a reference is left to memorise.

Reads: a next check of arXiv 2502.01187.

Cost: at tiny scale 3 trials a seed, half a minute each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="frequencies"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="frequencies"), num_samples=400, max_tokens=64),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=10, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9), num_held_out=50),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, skews: tuple[float, ...] = (0.0, 0.5, 1.0)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"corpus.rows.options.skew": skew} | seed) for skew in skews for seed in replicates(base, seeds)
    )
