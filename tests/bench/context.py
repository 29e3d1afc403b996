"""The context probe's packed branches beside independent prompts, and its peak memory. Each prints one JSON object.

python tests/bench/context.py compare length=1024 k=10 threads=2 repetitions=3
python tests/bench/context.py memory length=1024 threads=2

Both sides predict every target of one string after its last k tokens, a fresh context of the same source before them;
they take turns. Tiny Pythia, fp32, CPU. The peak is that of a process which probes one string at all default lengths,
in the packed form and in prompts; further replacements and redraws need no more, because one comes after the other.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memray.context import Reader, probe_context
from memray.encoding import Encoder
from memray.models import load_model
from memray.probes import Condition, ContextSpec, context_cost_tokens
from memray.replacements import Draws
from memray.spec import ModelSpec
from memray.strings import IidSource, draw_strings

SOURCE = IidSource(alphabet_size=26)
ENCODER = Encoder(symbol_ids=np.arange(4, 30), bos_id=None, pad_id=2)
OUTSIDE = np.arange(30, 187)


def compare(*, length: int, k: int, threads: int, repetitions: int) -> dict[str, object]:
    """Seconds of both sides, repetition by repetition, and how far their logits and arg-maxes agree."""
    torch.set_num_threads(threads)
    model = load_model(ModelSpec(), seed=0)
    string = draw_strings(SOURCE, length=length, num_strings=1, seed=0, stream="trained")[0]
    draws = Draws(string, 0, "trained", SOURCE, ENCODER, OUTSIDE, 0)
    reader = Reader.of(model, ENCODER.symbol_ids, SOURCE)
    condition, targets = Condition("local", k, 0.0, "source"), np.arange(k, length)

    def packed() -> Tensor:
        trunk = draws.trunk("source", 0.0, 0)
        return reader.head(reader.behind(reader.trunk(trunk), draws.branches(trunk, condition, targets, 0)))

    def prompts() -> Tensor:
        trunk = draws.trunk("source", 0.0, 0)
        return reader.head(reader.after(draws.branches(trunk, condition, targets, 0).prompts(trunk)))

    seconds: dict[str, list[float]] = {"packed": [], "prompts": []}
    ours = theirs = torch.empty(0)
    with torch.no_grad():
        packed()  # the first forward pass of a process takes longer
        for _ in range(repetitions):
            ours, theirs = timed(packed, seconds["packed"]), timed(prompts, seconds["prompts"])
    return {
        "packed_s": seconds["packed"],
        "prompts_s": seconds["prompts"],
        "largest_difference": float((ours - theirs).abs().max()),
        "num_equal_argmaxes": int((ours.argmax(1) == theirs.argmax(1)).sum()),
        "num_targets": len(targets),
        "threads": threads,
    }


def timed(side: Callable[[], Tensor], seconds: list[float]) -> Tensor:
    began = time.perf_counter()
    logits = side()
    seconds.append(time.perf_counter() - began)
    return logits


def memory(*, length: int, threads: int) -> dict[str, object]:
    """Peak memory of a process that probes a string at all default lengths, and what it had before."""
    torch.set_num_threads(threads)
    model = load_model(ModelSpec(), seed=0)
    strings = draw_strings(SOURCE, length=length, num_strings=1, seed=0, stream="trained")
    spec = ContextSpec(keep=("local", "remote"), replacements=("source", "shuffled"), redraws=1, num_positions=8)
    before_gib, began = resident_gib("VmRSS"), time.perf_counter()
    probe_context(model, strings, source=SOURCE, encoder=ENCODER, outside_ids=OUTSIDE, spec=spec, seed=0)
    return {
        "before_gib": before_gib,
        "peak_gib": resident_gib("VmHWM"),
        "seconds": time.perf_counter() - began,
        "tokens": context_cost_tokens(spec, length, bos=False),
    }


def resident_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def main() -> None:
    part, *pairs = sys.argv[1:]
    numbers = {name: int(value) for name, value in (pair.split("=") for pair in pairs)}
    print(json.dumps({"compare": compare, "memory": memory}[part](**numbers)))


if __name__ == "__main__":
    main()
