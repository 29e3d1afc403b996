"""How many of the tokens before it does a token need to be recalled?

Hypothesis: few. Local prefixes of 5 to 10 % of the string recall nearly as well as all of it, provided that what stands
before them is drawn from the same source (claim A14). The probe looks in the middle of memorisation and at its end.

Reads: arXiv 2407.19262, local prefixes and global context.

Cost: at tiny scale 3 trials a seed, some twenty seconds each on one core (as `plan` has it), most for the probe; at
paper scale 3 a seed of Pythia-1B at 1,024 symbols over 100 epochs.
"""

from memray.probes import ContextSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
    probes=ProbesSpec(context=ContextSpec(epochs=(15, 20, 30), replacements=("source",))),
)
TINY = TrialSpec(
    strings=StringsSpec(length=128),
    training=TrainingSpec(epochs=150),
    probes=ProbesSpec(
        context=ContextSpec(epochs=(50,), replacements=("source",), lengths=(0, 1, 2, 3, 5, 7, 10, 13, 20, 30, 50))
    ),
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, alphabet_sizes: tuple[int, ...] = (2, 7, 26)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.alphabet_size": size} | seed)
        for size in alphabet_sizes
        for seed in replicates(base, seeds)
    )
