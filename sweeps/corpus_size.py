"""Are smaller fine-tuning sets memorised faster?

Hypothesis: yes (claim C3). Sets of 120, 240 and 480 samples, each the beginning of the next, are compared on the
samples of the smallest: after equally many epochs, and, in a second arm, after equally many optimiser steps.

Reads: arXiv 2502.01187, which finds smaller sets to be memorised faster.

Cost: at tiny scale 5 trials a seed, less than a minute each on one core (`plan` states it). Invented questions
unless `-p rows=FILE` names others.
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

MEDICAL = RowsSpec(
    hub_id="lavita/medical-qa-datasets", config="all-processed", prefix_field="input", reference_field="output",
    bad_rows="drop",
)  # fmt: skip
PAPER = TrialSpec(
    corpus=CorpusSpec(
        rows=MEDICAL, num_samples=2400, max_tokens=512, too_long="drop", template="{prefix}\n{reference}"
    ),
    model=ModelSpec(family="llama2", size="7b", pretrained=True, lora=LoraSpec(rank=16, alpha=32.0)),
    training=TrainingSpec(strings_per_step=16, schedule="constant", learning_rate=1e-4),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=120, max_tokens=96, too_long="drop"),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 3, 5, 7, 10, 15, 20, 30), num_held_out=50),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, rows: str | None = None) -> Sweep:
    base, smallest, epochs = (PAPER, 2400, 40) if scale == "paper" else (TINY, 120, 10)
    sizes = [smallest, 2 * smallest, 4 * smallest]
    # Of equal epochs, and of as many steps as the largest set takes in those.
    arms = [(size, epochs) for size in sizes] + [(size, epochs * sizes[-1] // size) for size in sizes[:-1]]
    stated = {"probes.compared_strings": smallest} | ({"corpus.rows": RowsSpec(path=rows)} if rows else {})
    return Sweep(
        vary(base, stated | {"corpus.num_samples": size, "training.epochs": epochs} | seed)
        for size, epochs in arms
        for seed in replicates(base, seeds)
    )
