"""The match lengths of a corpus from one pass, beside `generate` from six prefixes. Prints one JSON object.

    python tests/bench/corpus.py num_samples=240 epochs=20 threads=2 repetitions=3

Both sides read the same samples with the same weights, of a model that was trained until it recites some of them; they
take turns. The pass tells how many tokens are recited from every prefix of a reference on. The other side does what is
done without it: the greedy continuation of six of those prefixes, in batches padded on the left, up to the end of the
longest reference of a batch. Tiny model, fp32, CPU.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from memray.corpora import CorpusSpec, RowsSpec
from memray.finetune import scoring_passes
from memray.measures.match_length import Correctness
from memray.models import load_model
from memray.probes import ProbesSpec
from memray.sample_measurement import SampleScores
from memray.samples import KnownSample, Samples, prepare_samples
from memray.scoring import TokenScores, score
from memray.spec import ModelSpec, TrainingSpec, TrialSpec
from memray.trial import run_trial

NUM_PREFIXES = 6  # none of the reference is given, a sixth of it, and so on
SAMPLES_PER_BATCH = 64  # of `generate`


def trained(*, num_samples: int, epochs: int) -> tuple[Any, Samples]:
    """A model that was fine-tuned on functions of the standard library, and those."""
    spec = TrialSpec(
        corpus=CorpusSpec(
            rows=RowsSpec(generator="python_source"), num_samples=num_samples, max_tokens=128, too_long="drop",
            template="{prefix}\n{reference}",
        ),
        model=ModelSpec(size="tiny-text"),
        training=TrainingSpec(epochs=epochs, strings_per_step=8, schedule="constant", keep_weights="final"),
        probes=ProbesSpec(epochs=(), num_held_out=0),
    )  # fmt: skip
    *_, last = run_trial(spec)
    assert last.weights is not None
    model = load_model(spec.model, seed=spec.model_seed)
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in last.weights.items()})
    torch.use_deterministic_algorithms(False)
    return model.eval(), prepare_samples(spec)


def from_one_pass(model: Any, samples: Samples) -> list[ndarray]:
    """How many tokens of each reference are recited from each of its tokens on."""
    scores = TokenScores.concatenate(
        [score(model, part, samples.alphabet) for part in scoring_passes(samples.scored)], samples.order
    )
    own = SampleScores.of(scores, np.arange(len(samples.known)))
    length = np.array([len(sample.reference_ids) for sample in samples.known])
    return np.split(Correctness(own.is_right, length).run_lengths(), np.cumsum(length)[:-1])


@torch.no_grad()
def from_generate(model: Any, samples: Samples) -> list[list[int]]:
    """How many tokens of each reference are recited after each of the six prefixes."""
    found: list[list[int]] = [[] for _ in samples.known]
    for sixth in range(NUM_PREFIXES):
        for batch in np.split(samples.order, range(SAMPLES_PER_BATCH, len(samples.order), SAMPLES_PER_BATCH)):
            known = [samples.known[index] for index in batch]
            given = [begin(sample, sixth) for sample in known]
            prompts = [sample.ids[: len(sample.prompt_ids) + k] for sample, k in zip(known, given, strict=True)]
            rests = [sample.reference_ids[k:] for sample, k in zip(known, given, strict=True)]
            for index, rest, said in zip(batch, rests, continued(model, prompts, max(map(len, rests))), strict=True):
                is_wrong = said[: len(rest)] != rest
                found[index].append(int(np.argmax(is_wrong)) if is_wrong.any() else len(rest))
    return found


def begin(sample: KnownSample, sixth: int) -> int:
    """Tokens of a reference that are given: fewer than all."""
    return sixth * len(sample.reference_ids) // NUM_PREFIXES


def continued(model: Any, prompts: list[ndarray], number: int) -> ndarray:
    """So many tokens that follow each prompt."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": number, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    new = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options)
    return new[:, width:].numpy()


def compare(*, num_samples: int, epochs: int, threads: int, repetitions: int) -> dict[str, object]:
    """Seconds of both sides, repetition by repetition, and how many match lengths are the same."""
    model, samples = trained(num_samples=num_samples, epochs=epochs)
    torch.set_num_threads(threads)
    sides: dict[str, Callable[[Any, Samples], Any]] = {"pass": from_one_pass, "generate": from_generate}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    told: dict[str, Any] = {}
    from_one_pass(model, samples)  # the first forward pass of a process takes longer
    for _ in range(repetitions):
        for name, side in sides.items():
            began = time.perf_counter()
            told[name] = side(model, samples)
            seconds[name].append(time.perf_counter() - began)
    pairs = [
        (int(runs[begin(sample, sixth)]), match)
        for sample, runs, matches in zip(samples.known, told["pass"], told["generate"], strict=True)
        for sixth, match in enumerate(matches)
    ]
    return {
        "pass_s": seconds["pass"],
        "generate_s": seconds["generate"],
        "num_equal": sum(ours == theirs for ours, theirs in pairs),
        "num_compared": len(pairs),
        "mean_match": float(np.mean([theirs for _, theirs in pairs])),
        "longest_match": max(theirs for _, theirs in pairs),
        "num_prefixes": sum(len(sample.reference_ids) for sample in samples.known),
        "threads": threads,
    }


def main() -> None:
    numbers = {name: int(value) for name, value in (pair.split("=") for pair in sys.argv[1:])}
    print(json.dumps(compare(**numbers)))


if __name__ == "__main__":
    main()
