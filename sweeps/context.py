"""Does it matter what stands before the tokens that a recalled token needs?

Hypothesis: its distribution does (claim A15), its symbols do not (claim A14): replaced by fresh symbols of the same
source, the context serves nearly as well as the true one; replaced by another distribution or by symbols from outside
the alphabet, it does not. The grid crosses the share of local tokens with the share of the context that is left true.

Reads: arXiv 2407.19262, global context; the third of the checks that its summary proposes.

Cost: at tiny scale 2 trials a seed, a minute each on one core, most of it for the probe; at paper scale 2 a seed of
Pythia-1B at 1,024 symbols over 100 epochs.
"""

from memray.probes import ContextSpec
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024),
    compute=ComputeSpec(accelerator="h100-80gb"),
    probes=ProbesSpec(context=ContextSpec(epochs=(20, 30), keep=("local", "remote"), grid=True, num_positions=64)),
)
TINY = TrialSpec(
    strings=StringsSpec(length=128),
    training=TrainingSpec(epochs=150),
    probes=ProbesSpec(
        context=ContextSpec(keep=("local", "remote"), lengths=(0, 1, 3, 6, 10, 20), grid=True, num_positions=32)
    ),
)
CELLS = [
    {"strings.alphabet_size": 7},
    {"strings.alphabet_size": 26, "strings.entropy_bits": 2.807},
]


def sweep(*, scale: Scale = "tiny", seeds: int = 5) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    return Sweep(vary(base, cell | seed) for cell in CELLS for seed in replicates(base, seeds))
