"""Are right tokens nearly independent of each other in reasoning and in code too?

Hypothesis: yes (claim C6). Answers that are drawn at random, solutions that follow from their puzzles, and bodies of
functions that follow, in part, from their signatures and from themselves: whether tokens are recalled one by one or
together should show in how far right ones stand beside right ones, beyond what samples and positions explain. Published
models have read the standard library before: what they recite of held-out functions says how much of it.

Reads: open question 3 of arXiv 2502.01187, which finds them nearly independent in question answering.

Cost: at tiny scale 3 trials a seed, about a minute each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

CORPORA = ("questions", "puzzles", "python_source")
# As many functions as the standard library has beside those that are held out, and as many of everything.
PAPER = TrialSpec(
    corpus=CorpusSpec(
        rows=RowsSpec(generator="questions"), num_samples=3200, max_tokens=512, template="{prefix}\n{reference}"
    ),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
# One function in five is longer.
TINY = TrialSpec(
    corpus=CorpusSpec(
        rows=RowsSpec(generator="questions"), num_samples=320, max_tokens=144, too_long="drop",
        template="{prefix}\n{reference}",
    ),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=12, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 2, 4, 6, 8, 10), num_held_out=50),
)  # fmt: skip


def sweep(*, scale: Scale = "tiny", seeds: int = 5, corpora: tuple[str, ...] = CORPORA) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"corpus.rows.generator": name} | seed) for name in corpora for seed in replicates(base, seeds)
    )
