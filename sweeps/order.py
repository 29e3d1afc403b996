"""In which order are the tokens of a string memorised?

Hypothesis: in none that their positions tell (claim A12). Each string is memorised by two models, so that it can be
told whether the same tokens come early in both.

Reads: arXiv 2407.19262, the random order of memorisation.

Cost: at tiny scale 4 trials a seed, ten seconds each on one core; at paper scale 2 a seed of Pythia-1B and 2 of
Pythia-410M at 1,024 symbols over 100 epochs.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
)
TINY = TrialSpec(strings=StringsSpec(length=256), training=TrainingSpec(epochs=200))
MODELS = {
    "paper": [{"model.size": "1b"}, {"model.size": "410m"}],
    "tiny": [{"model.family": "pythia"}, {"model.family": "gpt2"}],
}


def sweep(*, scale: Scale = "tiny", seeds: int = 5, alphabet_sizes: tuple[int, ...] = (7, 26)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, model | {"strings.alphabet_size": size, "string_seed": seed, "model_seed": seed})
        for model in MODELS[scale]
        for size in alphabet_sizes
        for seed in range(seeds)
    )
