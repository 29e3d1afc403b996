"""Do a few foreign samples in a fine-tuning set change how well the others are memorised?

Hypothesis: yes (claim C4). To 120 questions 40 facts are added, or 40 more questions. Each mix is trained three times
on the same draw of samples, under other seeds, and the questions that both mixes share are compared one by one, on
their means over these trainings. The same test between trainings of one mix says what chance does.

Reads: arXiv 2502.01187, where 200 foreign samples change the tail of the others.

Cost: at tiny scale 6 trials a seed, a minute and a half each on one core (`plan` states it).
"""

from memray.corpora import CorpusSpec, RowsSpec
from memray.probes import ProbesSpec
from memray.spec import ComputeSpec, LoraSpec, ModelSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, vary

MEDICAL = RowsSpec(
    hub_id="lavita/medical-qa-datasets", config="all-processed", prefix_field="input", reference_field="output",
    bad_rows="drop",
)  # fmt: skip
GENERAL = RowsSpec(
    hub_id="teknium/GPTeacher-General-Instruct", prefix_field="instruction", reference_field="response", bad_rows="drop"
)
PAPER = TrialSpec(
    corpus=CorpusSpec(
        rows=MEDICAL, num_samples=2400, max_tokens=512, too_long="drop", template="{prefix}\n{reference}"
    ),
    model=ModelSpec(family="llama2", size="7b", pretrained=True, lora=LoraSpec(rank=16, alpha=32.0)),
    training=TrainingSpec(epochs=40, strings_per_step=8, schedule="constant", learning_rate=1e-4),
    probes=ProbesSpec(epochs=(0, 1, 5, 10, 20), num_held_out=200, compared_strings=2400),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    corpus=CorpusSpec(rows=RowsSpec(generator="questions"), num_samples=120, max_tokens=96, too_long="drop"),
    model=ModelSpec(size="tiny-text"),
    training=TrainingSpec(epochs=12, strings_per_step=8, schedule="constant"),
    probes=ProbesSpec(epochs=(0, 1, 3, 5, 7, 10), num_held_out=50, compared_strings=120),
)
TRAININGS = 3


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    is_paper = scale == "paper"
    base, added, foreign = (PAPER, 200, GENERAL) if is_paper else (TINY, 40, RowsSpec(generator="facts"))
    assert base.corpus is not None
    mixes = (
        {"corpus.num_samples": base.corpus.num_samples + added},
        {"corpus.foreign": foreign, "corpus.num_foreign": added},
    )
    # The replicate is the draw of samples. Each has trainings of its own, in both mixes under the same seeds.
    trainings = [(string, TRAININGS * string + number) for string in range(seeds) for number in range(TRAININGS)]
    return Sweep(
        vary(base, mix | {"string_seed": string, "model_seed": training, "order_seed": training})
        for mix in mixes
        for string, training in trainings
    )
