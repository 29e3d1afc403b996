"""Embeddings of samples: the mean of a model's last hidden states over the tokens of a prefix, and of the whole.

A causal model needs one pass for both, for no state knows of what comes later.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jaxtyping import Float32, Int
from numpy import ndarray
from torch import nn

from memray.finetune import scoring_passes
from memray.measures.similarity import collapse, nearest_neighbour, similarity
from memray.models import fetch
from memray.samples import NATIVE, KnownSample, Samples
from memray.scoring import body_and_head

TEXTS_PER_PASS = 64

# The columns of a table of samples: what is said of all together, by metric, and of each sample.
TOGETHER = (
    *(f"collapse/{name}" for name in ("effective_rank", "participation_ratio", "intrinsic_dimension")),
    *(f"similarity/{name}{ending}" for name in ("input", "full", "difference") for ending in ("", "_centred")),
)
NEAREST = ("nearest_input", "nearest_full")


@dataclass(frozen=True)
class Embeddings:
    """One vector a sample of each kind.

    Attributes:
        sample: Index of the sample.
        whole: Of the prompt with its reference, a BOS left out.
        prefix: Of the prompt alone; None where it was not asked for.
    """

    sample: Int[ndarray, " samples"]
    whole: Float32[ndarray, "samples hidden"]
    prefix: Float32[ndarray, "samples hidden"] | None = None

    @staticmethod
    def concatenate(parts: "Sequence[Embeddings]") -> "Embeddings":
        """Those of different samples together, in the order of samples."""
        sample = np.concatenate([part.sample for part in parts])
        order = np.argsort(sample, kind="stable")
        prefixes = [part.prefix for part in parts if part.prefix is not None]
        whole = np.concatenate([part.whole for part in parts])[order]
        return Embeddings(sample[order], whole, np.concatenate(prefixes)[order] if prefixes else None)

    def of(self, chosen: Int[ndarray, " chosen"]) -> "Embeddings":
        """Those of some samples, ascending."""
        is_chosen = np.isin(self.sample, chosen)
        prefix = None if self.prefix is None else self.prefix[is_chosen]
        return Embeddings(self.sample[is_chosen], self.whole[is_chosen], prefix)


@torch.no_grad()
def embed(model: nn.Module, samples: Samples, rows: Int[ndarray, " rows"], *, with_prefix: bool = True) -> Embeddings:
    """The embeddings of some rows of the scored batch, by a model in evaluation mode."""
    body, _ = body_and_head(model)
    device = next(body.parameters()).device
    found, begin = [], 0
    for batch in scoring_passes(samples.scored.of(rows)):
        own = samples.order[rows[begin : begin + len(batch.ids)]]
        begin += len(own)
        states = body(input_ids=batch.ids.to(device)).last_hidden_state.float()
        prefix, whole = [], []
        for row, index in enumerate(own.tolist()):
            sample = samples.known[index]
            # The state of a BOS is of another size than all others.
            has_bos = len(sample.prompt_ids) > 1 and sample.prompt_ids[0] == samples.tokenizer.bos_token_id
            prefix.append(states[row, int(has_bos) : len(sample.prompt_ids)].mean(0))
            whole.append(states[row, int(has_bos) : len(sample.ids)].mean(0))
        prefixes = torch.stack(prefix).cpu().numpy() if with_prefix else None
        found.append(Embeddings(own, torch.stack(whole).cpu().numpy(), prefixes))
    return Embeddings.concatenate(found)


def encode(where: str, known: Sequence[KnownSample]) -> Embeddings:
    """The embeddings of samples by a sentence encoder: the mean of its last hidden states.

    Raises:
        ValueError: If it cannot be read, or lacks weights.
    """
    from transformers import AutoModel, AutoTokenizer

    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # as for models

    source = str(_folder(where) or where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModel.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _refusal(where, f"cannot be read: {error}") from error
    encoder, report = loaded
    # A pooler stands behind the hidden states, and many checkpoints go without.
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise _refusal(where, f"lacks weights, which would be random: {', '.join(missing[:5])}")
    return _encoded(tokenizer, encoder.eval(), known)


def check_encoder(where: str) -> None:
    """Refuses a sentence encoder that a trial could not load; of its weights only the files are looked for.

    Raises:
        ValueError: If it is no directory, not downloaded yet, or a part of it is missing.
    """
    folder = _folder(where)
    if found := "is not downloaded yet" if folder is None else _flaw(folder):
        raise _refusal(where, found)


def download_encoder(where: str) -> None:
    """Fetches a sentence encoder into the hub's cache.

    Raises:
        ValueError: If the hub cannot be reached, or has no such encoder.
    """
    try:
        fetch(where, None, ["*.json", "*.model", "*.txt", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise _refusal(where, f"cannot be fetched: {' '.join(str(error).split())}") from error


def is_on_hub(where: str) -> bool:
    """Whether a sentence encoder is a repository of the hub: what is no directory, and is named like one."""
    try:
        validate_repo_id(where)
    except HFValidationError:
        return False
    return not os.path.isdir(where)


def _folder(where: str) -> Path | None:
    """The directory of an encoder, of the hub that of its cache; None where it is not downloaded."""
    if not is_on_hub(where):
        return Path(where)
    found = try_to_load_from_cache(where, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _refusal(where: str, found: str) -> ValueError:
    return ValueError(
        "probes.embeddings.encoder must be a directory or a repository of the hub with an encoder as save_pretrained "
        f"writes it, and its tokenizer, but {where!r} {found}; mend it, or leave it out to compare by the model before "
        "training"
    )


def _flaw(folder: Path) -> str | None:
    """What keeps an encoder from being read."""
    from transformers import AutoConfig, AutoTokenizer

    if not os.path.isdir(folder):  # of Path, the verb raises where a name is too long
        return "is no directory"
    if not folder.is_absolute():
        return "is no absolute path, and the workers of a cluster have working directories of their own"
    if not {"model.safetensors", "model.safetensors.index.json"} & {each.name for each in folder.iterdir()}:
        return "has no model.safetensors (pickled weights are never read)"
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {' '.join(str(error).split())}"
    # Without tokenizer files transformers makes an empty tokenizer of the model's type.
    if not {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}:
        return "has no tokenizer"
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        return "has a tokenizer without a token to pad with"
    return None


@torch.no_grad()
def _encoded(tokenizer: Any, encoder: Any, known: Sequence[KnownSample]) -> Embeddings:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def vectors(texts: Sequence[str]) -> Float32[ndarray, "texts hidden"]:
        found = []
        for begin in range(0, len(texts), TEXTS_PER_PASS):
            own = list(texts[begin : begin + TEXTS_PER_PASS])
            told: Any = tokenizer(own, return_tensors="pt", padding=True, truncation=True)
            states = encoder(input_ids=told["input_ids"], attention_mask=told["attention_mask"]).last_hidden_state
            mask = told["attention_mask"][..., None].to(states.dtype)
            found.append(((states * mask).sum(1) / mask.sum(1)).float().numpy())
        return np.concatenate(found)

    prefixes = [sample.text.prefix or sample.text.reference for sample in known]
    wholes = [f"{sample.text.prefix} {sample.text.reference}" for sample in known]
    return Embeddings(np.arange(len(known)), vectors(wholes), vectors(prefixes))


def embedding_columns(
    known: Sequence[KnownSample], vectors: Embeddings, compared: Embeddings | None
) -> dict[str, pa.Array]:
    """What embeddings of the native samples say, as columns of a table with one row a sample.

    What is said of all of them together stands in each row. How alike samples are is said before training alone.

    Args:
        vectors: By the model as it is: in how many directions does it tell samples apart?
        compared: By the embedder that says how alike they are; None where that is not asked.
    """
    natives = np.flatnonzero([sample.role == NATIVE for sample in known])
    whole = vectors.of(natives).whole
    # Of a model that diverged nothing can be said.
    together: dict[str, float] = dict(collapse(whole)) if np.isfinite(whole).all() else {}
    alone: dict[str, ndarray] = {name: np.full(len(known), np.nan) for name in NEAREST}
    if compared is not None:
        own = compared.of(natives)
        assert own.prefix is not None  # before training they are asked for
        together |= similarity(own.prefix, own.whole)
        # Centred, for hidden states of any two texts point almost the same way.
        for name, each in zip(NEAREST, (own.prefix, own.whole), strict=True):
            alone[name][natives] = nearest_neighbour(each, centred=True)
    columns = {key: np.full(len(known), together.get(key, np.nan)) for key in TOGETHER}
    return {name: pa.array(values, from_pandas=True) for name, values in (columns | alone).items()}


def read_together(table: pa.Table) -> dict[str, float]:
    """What a table says of all samples together; nothing where embeddings were not asked for."""
    found = {key: table[key][0].as_py() for key in TOGETHER if key in table.column_names}
    return {key: value for key, value in found.items() if value is not None}
