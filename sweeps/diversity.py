"""Does the number of templates that a corpus is written in shape how skewed its memorisation is?

Hypothesis: yes (claim C12). Short lives of invented people, told in one, two or eight ways a sentence: all say the
same particulars in equally many words.

Reads: a next check of arXiv 2502.01187.

Cost: at tiny scale 3 trials a seed, half a minute each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="biographies"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="biographies", options={"num_sentences": 2}), num_samples=320),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=10, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9), num_held_out=50),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, templates: tuple[int, ...] = (1, 2, 8)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"corpus.rows.options.num_templates": number} | seed)
        for number in templates
        for seed in replicates(base, seeds)
    )
