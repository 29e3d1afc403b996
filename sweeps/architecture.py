"""Does the picture hold whatever the architecture: full, grouped-query or sliding-window attention?

Hypothesis: yes (claim C13): the tail grows while the loss is flat (C1) and a few samples hold most of it (C2), in each
of five families. Two heads share keys and values in Llama 3 and Mistral (at paper scale four). A block of Mistral sees
the last 16 tokens alone, of the 25 to 36 of a sample (at paper scale 4,096, which are all of it).

Reads: a next check of arXiv 2502.01187, which fine-tunes Llama-3.1-8B-Instruct.

Cost: at tiny scale 5 trials a seed, about a minute each on one core (`plan` states it); at paper scale 4 a seed.
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=4800),
    model=ModelSpec(size="1b", pretrained=True),
    training=TrainingSpec(epochs=30, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(num_held_out=200),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=320, max_tokens=96),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=20, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18), num_held_out=50),
)
# The rates of the tiny sizes, and of Pythia, are the families' own. They are meant for all weights: the large models
# train adapters, at the rate of `duration`.
ADAPTERS = {"model.lora": LoraSpec(rank=16, alpha=32.0), "training.learning_rate": 1e-4}
PAPER_MODELS = (
    ("pythia", "1b", {}),
    ("llama2", "7b", ADAPTERS),
    ("llama3", "8b", ADAPTERS),
    ("mistral", "7b", ADAPTERS),
)
TINY_MODELS = tuple((family, "tiny-text", {}) for family in ("pythia", "gpt2", "llama2", "llama3", "mistral"))


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base, models = (PAPER, PAPER_MODELS) if scale == "paper" else (TINY, TINY_MODELS)
    return Sweep(
        vary(base, {"model.family": family, "model.size": size} | adapters | seed)
        for family, size, adapters in models
        for seed in replicates(base, seeds)
    )
