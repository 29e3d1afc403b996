"""Does the tail of memorisation grow after the loss is flat, and do a few samples hold most of it?

Hypothesis: both (claims C1, C2 and C5). Two corpora are fine-tuned for fifty epochs and measured all along: the match
lengths of all samples, and beside them the loss. Held-out samples say what a model guesses of a reference that it
never saw. The rate is constant, so that late epochs train as much as early ones.

Reads: arXiv 2502.01187, which fine-tunes Llama-3.1-8B-Instruct for 10 and 100 epochs on 9,723 medical questions.

Cost: at tiny scale 2 trials a seed, some minutes each on one core (`plan` states it). Invented questions and facts,
unless `-p rows=FILE` names others: `sweeps/prepare/wordnet.py` writes real ones.
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import GenerationSpec, ProbesSpec
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

MEDICAL = RowsSpec(
    hub_id="lavita/medical-qa-datasets", config="all-processed", prefix_field="input", reference_field="output",
    bad_rows="drop",
)  # fmt: skip
GENERAL = RowsSpec(
    hub_id="teknium/GPTeacher-General-Instruct", prefix_field="instruction", reference_field="response", bad_rows="drop"
)
PAPER = TrialSpec(
    corpus=CorpusSpec(
        rows=MEDICAL, num_samples=9600, max_tokens=512, too_long="drop", template="{prefix}\n{reference}"
    ),
    model=ModelSpec(family="llama2", size="7b", pretrained=True, lora=LoraSpec(rank=16, alpha=32.0)),
    training=TrainingSpec(epochs=100, strings_per_step=16, schedule="constant", learning_rate=1e-4),
    probes=ProbesSpec(num_held_out=200, generation=GenerationSpec()),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=240, max_tokens=96, too_long="drop"),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=50, strings_per_step=16, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40), num_held_out=100, generation=GenerationSpec()),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, rows: str | None = None, num_samples: int | None = None) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    corpora = [MEDICAL, GENERAL] if scale == "paper" else [RowsSpec(generator=name) for name in ("questions", "facts")]
    stated = {"corpus.num_samples": num_samples} if num_samples else {}
    return Sweep(
        vary(base, stated | {"corpus.rows": each} | seed)
        for each in ([RowsSpec(path=rows)] if rows else corpora)
        for seed in replicates(base, seeds)
    )
