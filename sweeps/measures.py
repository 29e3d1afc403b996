"""What do older measures of memorisation say, beside recall token by token?

Hypothesis: measures of contiguous tokens understate it, for tokens are memorised in no order; raw accuracy overstates
it while the model guesses (claim A13).

Reads: arXiv 2407.19262, limitations of memorisation measures.

Cost: at tiny scale 2 trials a seed, half a minute each on one core; at paper scale 2 a seed of Pythia-1B at 1,024
symbols over 100 epochs.
"""

from memray.probes import PROBE_EPOCHS, ContextSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

# The k tokens alone as a prompt, which must bring forth the k that follow.
EXTRACTABLE = ContextSpec(epochs=PROBE_EPOCHS, replacements=(), lengths=(), num_held_out=0, extractable=(32, 50))
PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
    probes=ProbesSpec(context=EXTRACTABLE),
)
TINY = TrialSpec(
    strings=StringsSpec(length=256), training=TrainingSpec(epochs=200), probes=ProbesSpec(context=EXTRACTABLE)
)


def sweep(*, scale: Scale = "tiny", seeds: int = 5, alphabet_sizes: tuple[int, ...] = (2, 26)) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(
        vary(base, {"strings.alphabet_size": size} | seed)
        for size in alphabet_sizes
        for seed in replicates(base, seeds)
    )
