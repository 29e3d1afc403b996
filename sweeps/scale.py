"""Does a trial give the same curves on one device and on many, and what does each way of sharing it cost?

Hypothesis: yes, until rounding has grown: the loss is that of one device to 1e-4 over the first thirty optimiser steps,
whatever ZeRO shards. Higher stages keep less on each device and tell each other more.

Reads: nothing; it is a study of this tool, and its replicates are the same trial placed anew. The seconds and bytes
that DeepSpeed counts cost time themselves, on an accelerator most, because it is waited for after each call.

Cost: at tiny scale 5 trials a seed, about half a minute each on two cores; at paper scale Pythia-1B on one device and
at every stage on each number of `workers`, which is 2, 4 and 8 unless the cluster has others: name what it has.
"""

from memray.spec import ComputeSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Scale, Sweep, replicates, vary

PAPER = TrialSpec(
    model=ModelSpec(size="1b", pretrained=True),
    strings=StringsSpec(length=1024, num_strings=16),
    training=TrainingSpec(strings_per_step=0),
    compute=ComputeSpec(accelerator="h100-80gb", logs_communication=True),
)
TINY = TrialSpec(
    strings=StringsSpec(length=128, num_strings=4),
    training=TrainingSpec(strings_per_step=0, epochs=100),
    compute=ComputeSpec(logs_communication=True),
)


def sweep(
    *,
    scale: Scale = "tiny",
    seeds: int = 1,
    workers: tuple[int, ...] = (),
    zero_stages: tuple[int, ...] = (0, 1, 2, 3),
) -> Sweep:
    base = PAPER if scale == "paper" else TINY
    cells = [{"compute.engine": "torch"}]
    cells += [
        {"compute.engine": "deepspeed", "compute.workers": number, "compute.zero_stage": stage}
        for number in workers or ((2, 4, 8) if scale == "paper" else (2,))
        for stage in zero_stages
    ]
    return Sweep(vary(base, cell | seed) for cell in cells for seed in replicates(base, seeds))
