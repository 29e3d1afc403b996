"""Are similar samples memorised more, and do diverse continuations of similar prefixes lower it?

Hypothesis: both (claims C8 and C9). An intervention: prefixes that share most of their words within groups of seven or
share none, crossed with continuations that do or do not. Every word is equally frequent in all four arms, so that
nothing differs but which samples share it. Beside them, does the collapse of embeddings drive the skew (claim C10)?
Each arm is trained again with its input embeddings frozen.

Reads: arXiv 2502.01187, whose summary says the first, whose remark 2.7 the second, and whose open question 1 the third.

Cost: at tiny scale 8 trials a seed, half a minute each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import EmbeddingsSpec, ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

# Blocks of 49 are what the frequencies of words are equal in.
PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="overlapping"), num_samples=4704),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=196, embeddings=EmbeddingsSpec()),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="overlapping"), num_samples=392, max_tokens=64),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=10, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9), num_held_out=49, embeddings=EmbeddingsSpec()),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(
            base,
            {
                "corpus.rows.options": {"prefix_overlap": prefix, "continuation_overlap": continuation},
                "training.frozen_embeddings": is_frozen,
            }
            | seed,
        )
        for is_frozen in (False, True)
        for prefix in ("low", "high")
        for continuation in ("low", "high")
        for seed in replicates(base, seeds)
    )
