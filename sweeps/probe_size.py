"""What of the tail of memorisation does a probe of few samples miss?

Hypothesis: the worst cases (claim C7): the longest match that a probe is expected to find still rises at a fifth of
all samples. A set of 1,024 samples, and its first 256: a probe of a hundred misses the ten longest matches of the
small one in 6 of 1,000 draws, and those of the large one in 36 of 100.

Reads: arXiv 2502.01187, whose probes of 200 among 9,723 samples miss the ten longest matches in four of five draws.

Cost: at tiny scale 2 trials a seed, three minutes at most on one core (`plan` states it). Invented questions unless
`-p rows=FILE` names others.
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
        rows=MEDICAL, num_samples=9600, max_tokens=512, too_long="drop", template="{prefix}\n{reference}"
    ),
    model=ModelSpec(family="llama2", size="7b", pretrained=True, lora=LoraSpec(rank=16, alpha=32.0)),
    training=TrainingSpec(epochs=20, strings_per_step=16, schedule="constant", learning_rate=1e-4),
    probes=ProbesSpec(epochs=(0, 5, 10), num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=1024, max_tokens=48, too_long="drop"),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=8, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 2, 4, 6), num_held_out=100),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, rows: str | None = None) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    assert base.corpus is not None
    stated = {"corpus.rows": RowsSpec(path=rows)} if rows else {}
    return Sweep(
        vary(base, stated | {"corpus.num_samples": number} | seed)
        for number in (base.corpus.num_samples // 4, base.corpus.num_samples)
        for seed in replicates(base, seeds)
    )
