"""One teacher-forced pass, turned into everything that is ever asked about a token.

The head runs in chunks of a fixed number of logits, so that a full fp32 logits array never exists; the size of
a chunk is a constant, never read from the machine, because it decides the order of summation. Scoring knows
nothing of training: the training step hands the same chunks over (see `finetune.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int32
from numpy import ndarray
from torch import Tensor, nn

from memray.encoding import AlphabetIds, Batch

# 64 MiB of fp32 logits.
LOGITS_PER_CHUNK = 2**24

BITS_PER_NAT = 1 / float(np.log(2))


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What one pass says of each target, in order of string and position; enough for every measure of recall.

    Attributes:
        string: Row of the batch.
        position: Index in the string of the symbol that is predicted.
        log_prob: ln p(target), nats.
        log_mass: ln of the probability of the whole alphabet, nats.
        argmax: Token id of the top prediction, -1 where several share the top.
        rank: Number of tokens with a larger logit than the target; 0 is the top.
        margin: Logit of the target minus the best other one, nats; the target is recalled when it is above 0.
        entropy_bits: Entropy of q, the prediction renormalised over the alphabet.
        kl_bits: KL(P_A || q).
        mean_q: q averaged over the positions of each string.
    """

    string: Int32[ndarray, " targets"]
    position: Int32[ndarray, " targets"]
    log_prob: Float32[ndarray, " targets"]
    log_mass: Float32[ndarray, " targets"]
    argmax: Int32[ndarray, " targets"]
    rank: Int32[ndarray, " targets"]
    margin: Float32[ndarray, " targets"]
    entropy_bits: Float32[ndarray, " targets"]
    kl_bits: Float32[ndarray, " targets"]
    mean_q: Float64[ndarray, "strings alphabet"]

    COLUMNS = (
        "string", "position", "log_prob", "log_mass", "argmax", "rank", "margin", "entropy_bits", "kl_bits",
    )  # fmt: skip

    @property
    def num_strings(self) -> int:
        return len(self.mean_q)

    def is_identical_to(self, other: "TokenScores") -> bool:
        """Whether all scores are the same to the last bit."""
        names = (*self.COLUMNS, "mean_q")
        return all(getattr(self, name).tobytes() == getattr(other, name).tobytes() for name in names)

    def of(self, string: int) -> "TokenScores":
        """The scores of one string alone, which becomes string 0."""
        begin, end = np.searchsorted(self.string, [string, string + 1])
        columns = {name: getattr(self, name)[begin:end] for name in self.COLUMNS}
        columns["string"] = np.zeros(end - begin, dtype=np.int32)
        return TokenScores(**columns, mean_q=self.mean_q[string : string + 1])

    def first(self, number: int) -> "TokenScores":
        """The scores of the first strings alone."""
        if number == self.num_strings:
            return self
        end = np.searchsorted(self.string, number)
        columns = {name: getattr(self, name)[:end] for name in self.COLUMNS}
        return TokenScores(**columns, mean_q=self.mean_q[:number])

    def after(self, number: int) -> "TokenScores":
        """The scores of the strings after the first ones, counted anew."""
        begin = np.searchsorted(self.string, number)
        columns = {name: getattr(self, name)[begin:] for name in self.COLUMNS}
        columns["string"] = columns["string"] - np.int32(number)
        return TokenScores(**columns, mean_q=self.mean_q[number:])

    @staticmethod
    def concatenate(parts: "list[TokenScores]", order: Int[ndarray, " strings"] | None = None) -> "TokenScores":
        """One record from consecutive batches; `order` says which string each row of them is."""
        rows = np.concatenate([np.arange(part.num_strings) for part in parts])
        offsets = np.cumsum([0] + [part.num_strings for part in parts])
        names = np.arange(len(rows)) if order is None else order
        string = np.concatenate([names[part.string + offsets[k]] for k, part in enumerate(parts)])
        sort = np.argsort(string, kind="stable")
        columns = {name: np.concatenate([getattr(part, name) for part in parts])[sort] for name in TokenScores.COLUMNS}
        columns["string"] = string[sort].astype(np.int32)
        mean_q = np.concatenate([part.mean_q for part in parts])
        return TokenScores(**columns, mean_q=mean_q[np.argsort(names)])


@dataclass(frozen=True)
class LogitColumns:
    """Scores of a chunk of targets, still on the device."""

    log_prob: Float[Tensor, " targets"]
    log_mass: Float[Tensor, " targets"]
    argmax: Int[Tensor, " targets"]
    rank: Int[Tensor, " targets"]
    margin: Float[Tensor, " targets"]
    entropy_bits: Float[Tensor, " targets"]
    kl_bits: Float[Tensor, " targets"]
    q: Float[Tensor, "targets alphabet"]


def score_logits(
    logits: Float[Tensor, "targets vocabulary"], target_ids: Int[Tensor, " targets"], alphabet: AlphabetIds
) -> LogitColumns:
    """Scores of fp32 logits against their targets."""
    log_z = logits.logsumexp(1)
    target = logits.gather(1, target_ids[:, None])[:, 0]
    top = logits.topk(2, dim=1)
    is_tied = top.values[:, 0] == top.values[:, 1]
    best_other = torch.where(top.indices[:, 0] == target_ids, top.values[:, 1], top.values[:, 0])
    inside = logits[:, alphabet.symbol_ids]
    log_inside = inside.logsumexp(1)
    log_q = inside - log_inside[:, None]
    q = log_q.exp()
    p = alphabet.marginal
    p_log_p = torch.special.xlogy(p, p).sum()
    return LogitColumns(
        log_prob=target - log_z,
        log_mass=(log_inside - log_z).clamp(max=0),  # rounding can leave a mass of 1 + 1e-7
        argmax=torch.where(is_tied, -1, top.indices[:, 0]),
        rank=(logits > target[:, None]).sum(1),
        margin=target - best_other,
        entropy_bits=-(q * log_q).sum(1) * BITS_PER_NAT,
        kl_bits=(p_log_p - log_q @ p) * BITS_PER_NAT,
        q=q,
    )


def target_states(
    hidden: Float[Tensor, "strings tokens hidden"], batch: Batch
) -> tuple[Float[Tensor, "targets hidden"], Int[Tensor, " targets"]]:
    """The hidden state that predicts each target, and the target's token id, in order of string and position."""
    is_target = batch.is_target[:, 1:]
    return hidden[:, :-1][is_target], batch.ids[:, 1:][is_target]


def chunks(num_targets: int, vocabulary: int) -> Iterator[slice]:
    """Slices of targets whose logits fill one chunk."""
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    for begin in range(0, num_targets, size):
        yield slice(begin, min(begin + size, num_targets))


def collect(columns: list[LogitColumns], batch: Batch) -> TokenScores:
    """The chunks of one batch as numpy arrays."""
    joined = {field.name: torch.cat([getattr(each, field.name) for each in columns]) for field in fields(LogitColumns)}
    is_target = batch.is_target.cpu().numpy()
    string, column = np.nonzero(is_target)
    # A BOS shifts the columns by one; it is there exactly when the first symbol, in column 1, has index 0.
    position = column - batch.num_leading
    counts = is_target.sum(1)
    q = joined.pop("q").double()
    sums = torch.zeros(len(counts), q.shape[1], dtype=torch.float64, device=q.device)
    sums.index_add_(0, torch.as_tensor(string, device=q.device), q)
    arrays = {name: value.cpu().numpy() for name, value in joined.items()}
    return TokenScores(
        string=string.astype(np.int32),
        position=position.astype(np.int32),
        log_prob=arrays["log_prob"],
        log_mass=arrays["log_mass"],
        argmax=arrays["argmax"].astype(np.int32),
        rank=arrays["rank"].astype(np.int32),
        margin=arrays["margin"],
        entropy_bits=arrays["entropy_bits"],
        kl_bits=arrays["kl_bits"],
        mean_q=sums.cpu().numpy() / counts[:, None],
    )


def body_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The part of a causal model below its head, and the head; adapters sit inside both."""
    return model.base_model, model.get_output_embeddings()  # type: ignore[return-value, operator]


def vocabulary_size(head: nn.Module) -> int:
    """The number of logits that a head gives."""
    return int(head.out_features)  # type: ignore[union-attr, arg-type]


def fp32_logits(head: nn.Module, states: Float[Tensor, "targets hidden"]) -> Float[Tensor, "targets vocabulary"]:
    """The head's logits in fp32, whatever the precision of the model.

    A bf16 product rounds a logit of 16 to the next eighth: two symbols of a small alphabet would often tie, and a tie
    counts as wrong. Where the head is more than one matrix (adapters), its own forward pass is all there is.
    """
    if type(head) is nn.Linear and head.weight.dtype != torch.float32:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(states.float(), head.weight.float(), bias)
    return head(states).float()


@torch.no_grad()
def score(model: nn.Module, batch: Batch, alphabet: AlphabetIds) -> TokenScores:
    """Scores of one batch from one forward pass; against the alphabet given, unless the batch has one of its own.

    No attention mask is needed: padding stands on the right, and causal attention never looks there.
    """
    body, head = body_and_head(model)
    hidden = body(input_ids=batch.ids).last_hidden_state
    states, target_ids = target_states(hidden, batch)
    columns = [
        score_logits(fp32_logits(head, states[part]), target_ids[part], batch.alphabet or alphabet)
        for part in chunks(len(target_ids), vocabulary_size(head))
    ]
    return collect(columns, batch)
