"""Pre-training a model here, so that it infers an alphabet and its frequencies in context.

Published models differ in how well they do this, and in everything else. Models that are pre-trained on fresh random
strings for longer or shorter differ in nothing else, so that its effect on the guessing phase can be told (open
question 3 of arXiv 2407.19262). This module knows nothing of the strings that a trial memorises.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from transformers import PreTrainedModel

from memray.encoding import encode, make_encoder, ordinary_ids
from memray.finetune import TorchEngine
from memray.models import load_tokenizer
from memray.scoring import AlphabetIds
from memray.spec import InContextSpec, ModelSpec, TrainingSpec
from memray.strings import VOCABULARY

# Sets these draws apart from all others that a seed decides.
_STREAM = 0x1C


def pretrain_in_context(model: PreTrainedModel, spec: ModelSpec, *, seed: int, device: torch.device) -> None:
    """Trains a model in place, in fp32; where the spec asks for no step, nothing is done.

    Args:
        seed: Decides every string: the trial's `model_seed`.

    Raises:
        ValueError: If the tokenizer has too few ordinary tokens.
    """
    stated = spec.in_context
    if stated.steps == 0:
        return
    tokenizer = load_tokenizer(spec)
    encoder = make_encoder(
        tokenizer, alphabet=VOCABULARY, alphabet_size=len(ordinary_ids(tokenizer)), bos=bool(spec.bos)
    )
    unread = AlphabetIds(torch.arange(2), torch.full((2,), 0.5))  # the scores of a step are dropped
    engine = TorchEngine(model.to(device), unread, TrainingSpec(), device)  # type: ignore[arg-type]
    for strings in random_strings(stated, num_tokens=len(encoder.symbol_ids), seed=seed):
        engine.step(encode(list(strings), encoder), stated.learning_rate)
    model.eval()


def random_strings(
    spec: InContextSpec, *, num_tokens: int, seed: int
) -> Iterator[Int[ndarray, "strings_per_step length"]]:
    """The strings of each step, as indices below `num_tokens`; more steps go on where fewer end.

    Raises:
        ValueError: If there are fewer tokens than the largest alphabet has symbols.
    """
    if num_tokens < spec.max_alphabet_size:
        raise ValueError(
            f"in_context.max_alphabet_size must be at most the {num_tokens} ordinary tokens of the model, but is "
            f"{spec.max_alphabet_size}; lower it"
        )
    for step in range(spec.steps):
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, step]))
        yield np.stack([_string(spec, num_tokens, rng) for _ in range(spec.strings_per_step)])


def _string(spec: InContextSpec, num_tokens: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
    alphabet = rng.choice(num_tokens, size=rng.integers(2, spec.max_alphabet_size + 1), replace=False)
    return rng.choice(alphabet, size=spec.length, p=rng.dirichlet(np.ones(len(alphabet))))
