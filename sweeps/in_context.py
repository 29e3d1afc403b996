"""Does a model that infers an alphabet in context guess for a shorter time before it memorises?

Hypothesis: yes (claim A11, an open question of the paper). The models are pre-trained here on fresh random strings over
random alphabets, for longer and longer, which moves in-context learning and nothing else; at paper scale they are
published ones of several families and sizes.

Reads: arXiv 2407.19262, open question 3: Llama-2 infers the alphabet in context and seems to skip the guessing phase.

Cost: at tiny scale 12 trials a seed, four to thirty seconds each on one core (as `plan` has it); at paper scale 8 a
seed, Llama-2 by far the largest.
"""

from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1023, alphabet_size=7),
    compute=ComputeSpec(accelerator="h200"),
)
TINY = TrialSpec(
    strings=StringsSpec(length=128, alphabet_size=7),
    training=TrainingSpec(epochs=100),
    probes=ProbesSpec(num_held_out=20),
)
PUBLISHED = [
    ("pythia", "160m"), ("pythia", "410m"), ("pythia", "1b"), ("pythia", "2.8b"), ("phi", "1.5"), ("llama2", "7b"),
    ("gpt2", "1.5b"), ("opt", "1.3b"),
]  # fmt: skip


def models(scale: Scale) -> list[dict[str, object]]:
    if scale == "paper":
        return [{"model.family": family, "model.size": size} for family, size in PUBLISHED]
    return [
        {"model.family": family, "model.in_context.steps": steps}
        for family in ("pythia", "gpt2")
        for steps in (0, 25, 50, 100, 200, 400)
    ]


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, model | seed) for model in models(scale) for seed in replicates(base, seeds))
