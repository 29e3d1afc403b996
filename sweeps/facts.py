"""Does memory reach facts, or only the words in which they were told?

Hypothesis: facts too (claim C11). A table of facts on invented people is told in one template, or each fact in one of
four, so that a model learns all wordings and no fact in more than one. Then every object of a relation is ranked under
the templates in which a fact was never told, of people whose facts were trained and of others. By chance an object is
the 16.5th of 32, and better where it is told of many people, so that both are asked for the same objects.

Reads: open question 2 of arXiv 2502.01187.

Cost: at tiny scale 2 trials a seed, about two minutes each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import FactsSpec, ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="facts"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 3, 5, 10, 20), num_held_out=600, facts=FactsSpec(epochs=(0, 10), num_facts=600)),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="facts"), num_samples=480, max_tokens=64),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=20, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 3, 5, 10, 15), num_held_out=48, facts=FactsSpec(epochs=(0, 10), num_facts=48)),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, templates: tuple[int, ...] = (1, 4)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"corpus.rows.options.num_templates": number} | seed)
        for number in templates
        for seed in replicates(base, seeds)
    )
