"""What a model says instead: greedy generation after the first divergence, and how near it comes to the reference.

The match length needs no generation. What follows it does, and costs so much more that a few samples of every match
length stand for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memray.samples import KnownSample

# What tells the choice of samples from other draws of the same seed.
_CHOICE_STREAM = 13


@dataclass(frozen=True)
class Continuations:
    """What a model generates of some samples.

    Attributes:
        text: By sample: the greedy continuation of its prompt, as long as its reference.
        num_match: By sample, of those whose whole continuation was generated from the prompt alone: how many of its
            tokens are the reference's before the first that is not.
    """

    text: Mapping[int, str]
    num_match: Mapping[int, int]


def strata(num_match: Int[ndarray, " samples"]) -> Int[ndarray, " samples"]:
    """The stratum of each match length: 0, 1, 2 to 3, 4 to 7, and so on."""
    return np.ceil(np.log2(num_match + 1)).astype(np.int64)


def chosen_samples(
    num_match: Int[ndarray, " samples"], number: int, *, seed: int, epoch: int
) -> Int[ndarray, " chosen"]:
    """Samples of every stratum, as many of each as there are and as the number allows; ascending."""
    rng = np.random.default_rng([_CHOICE_STREAM, seed, epoch])
    stratum = strata(num_match)
    shuffled = rng.permutation(len(num_match))
    # The first of every stratum before the second of any.
    turn = np.empty(len(shuffled), dtype=np.int64)
    for each in np.unique(stratum):
        own = shuffled[stratum[shuffled] == each]
        turn[own] = np.arange(len(own))
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return np.sort(order[:number])


def weights_of(num_match: Int[ndarray, " samples"], chosen: Int[ndarray, " chosen"]) -> Float[ndarray, " chosen"]:
    """For how many samples each chosen one stands, as a share of those of the strata that were chosen from."""
    stratum = strata(num_match)
    own = stratum[chosen]
    weights = np.array([np.sum(stratum == each) / np.sum(own == each) for each in own], dtype=np.float64)
    return weights / weights.sum()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: Sequence[KnownSample],
    num_match: Int[ndarray, " samples"],
    chosen: Int[ndarray, " chosen"],
    checked: Int[ndarray, " checked"],
) -> Continuations:
    """Generates from the first divergence of the chosen samples on, and from the prompt of those that are checked."""
    text = {}
    for index in chosen.tolist():
        sample, begin = known[index], int(num_match[index])
        follows = _greedy(model, sample, begin)
        text[index] = tokenizer.decode(np.concatenate([sample.reference_ids[:begin], follows]))
    found = {}
    for index in checked.tolist():
        is_wrong = _greedy(model, known[index], 0) != known[index].reference_ids
        found[index] = int(np.argmax(is_wrong)) if is_wrong.any() else len(is_wrong)
    return Continuations({index: str(each) for index, each in text.items()}, found)


def _greedy(model: PreTrainedModel, sample: KnownSample, begin: int) -> Int[ndarray, " tokens"]:
    """The tokens that follow a prompt and the beginning of its reference, up to where the reference ends."""
    number = len(sample.reference_ids) - begin
    if number == 0:
        return sample.reference_ids[:0]
    ids = torch.as_tensor(sample.ids[: len(sample.prompt_ids) + begin], device=model.device)[None]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": number, "do_sample": False}
    # One sample at a time: padding would move the last bits of a logit, and with them a tie.
    found = model.generate(ids, **options, eos_token_id=None, pad_token_id=0, use_cache=True)  # type: ignore[operator]
    return found[0, ids.shape[1] :].cpu().numpy()


def nearness(reference: str, continuation: str) -> dict[str, float]:
    """How near a continuation comes to its reference, by what they have in common in order.

    Returns:
        ROUGE-L: F-measure of the longest common subsequence of words (Lin 2004), in [0, 1]; and Levenshtein's distance
        in characters as a share of the longer text, in [0, 1], 0 where they are equal.
    """
    from rapidfuzz.distance import Levenshtein  # only here: nothing else needs them
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"]).score(reference, continuation)["rougeL"].fmeasure
    return {"rouge_l": float(rouge), "levenshtein": Levenshtein.normalized_distance(reference, continuation)}
