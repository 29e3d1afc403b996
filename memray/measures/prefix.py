"""Which part of its prefix a token needs to be recalled: curves by k, and the minimal sufficient prefix (protocol §4).

The input are the records of the context probe. They say what a model predicts after prefixes that are true in part
only; which conditions there are, and what their names mean, says `probes`. This module knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, Int32
from numpy import ndarray

from memray.measures.statistics import censored_median
from memray.probes import GRID_CONTEXT_PERCENTS, KEEPS, REPLACEMENTS, Condition, ContextSpec, Replacement

FULL = -1
"""The k of the full true prefix, whose replacement is -1 too: nothing was replaced."""

# What rounding can leave of log2 of a guesser's probability of 1.
NO_SURPRISE = -1e-9

# A token is recalled in a condition if it is the arg-max in at least 4 of 5 redraws.
LEAST_SHARE_RIGHT = (4, 5)


@dataclass(frozen=True, kw_only=True)
class ContextScores:
    """What a model predicts of each target under each condition: one row a string, condition, redraw and position.

    Conditions that are undefined, for want of anything before the target, have no row.

    Attributes:
        string: Number of the string.
        keep: Index into `KEEPS`.
        k: Local tokens, those last before the target; `FULL` for the full true prefix.
        remote_share: Share of the remote tokens that are left true.
        replacement: Index into `REPLACEMENTS`; -1 where nothing is replaced.
        redraw: Number of the draw.
        position: Index in the string of the target.
        log_prob: ln p(target), nats.
        log_mass: ln of the probability of the whole alphabet, nats.
        is_right: Whether the target is the top prediction; a tie is wrong.
        extractable: Share of each string's windows that are extractable, a column each k of the spec; nan where the
            string is too short.
    """

    string: Int32[ndarray, " rows"]
    keep: Int8[ndarray, " rows"]
    k: Int32[ndarray, " rows"]
    remote_share: Float32[ndarray, " rows"]
    replacement: Int8[ndarray, " rows"]
    redraw: Int8[ndarray, " rows"]
    position: Int32[ndarray, " rows"]
    log_prob: Float32[ndarray, " rows"]
    log_mass: Float32[ndarray, " rows"]
    is_right: Bool[ndarray, " rows"]
    extractable: Float[ndarray, "strings windows"]

    COLUMNS = (
        "string", "keep", "k", "remote_share", "replacement", "redraw", "position", "log_prob", "log_mass", "is_right",
    )  # fmt: skip

    @property
    def num_strings(self) -> int:
        return len(self.extractable)

    def where(self, chosen: Bool[ndarray, " rows"]) -> ContextScores:
        """The chosen rows."""
        columns = {name: getattr(self, name)[chosen] for name in self.COLUMNS}
        return ContextScores(**columns, extractable=self.extractable)

    def first(self, number: int) -> ContextScores:
        """The scores of the first strings."""
        chosen = self.where(self.string < number)
        return replace(chosen, extractable=self.extractable[:number])

    def of(self, condition: Condition | None) -> ContextScores:
        """The rows of a condition; None is the full true prefix."""
        if condition is None:
            return self.where(self.k == FULL)
        return self.where(
            (self.k == condition.k)
            & (self.replacement == REPLACEMENTS.index(condition.replacement))
            & (self.keep == KEEPS.index(condition.keep))
            & (self.remote_share == np.float32(condition.remote_share))
        )


class Recall(NamedTuple):
    """What is recalled under one condition: means over strings, redraws and positions."""

    accuracy: float
    nll_nats: float
    mass: float

    @classmethod
    def of(cls, scores: ContextScores) -> Recall | None:
        """None where there is no row."""
        if len(scores.string) == 0:
            return None
        return cls(
            accuracy=float(np.mean(scores.is_right)),
            nll_nats=-float(np.mean(scores.log_prob, dtype=np.float64)),
            mass=float(np.mean(np.exp(scores.log_mass.astype(np.float64)))),
        )


def context_metrics(
    trained: ContextScores,
    held_out: ContextScores | None,
    *,
    spec: ContextSpec,
    length: int,
    log2_guesses: Sequence[Float[ndarray, " targets"]],
    heldout_log2_guesses: Sequence[Float[ndarray, " targets"]] = (),
) -> dict[str, float]:
    """The metrics of one context probe; what is undefined is absent.

    Accuracy, nll and alphabet mass by `{keep}_{k}_{replacement}` are compared on common positions: those with the
    largest finite k before them. The minimal sufficient prefix is that of `keep="local"` under "source".

    Args:
        trained: Scores of the trained strings.
        held_out: Scores of held-out strings: what a model recalls of the local prefix without memory.
        spec: What was probed.
        length: Symbols a string.
        log2_guesses: Of each trained string, log2 of the guesser's probability of each target.
        heldout_log2_guesses: The same of each held-out string.
    """
    metrics: dict[str, float] = {}
    for name, recall in curves(trained, spec, length):
        metrics[f"context/{name}"] = recall.accuracy
        metrics[f"context_nll_nats/{name}"] = recall.nll_nats
        metrics[f"context_mass/{name}"] = recall.mass
    for name, recall in grid(trained, spec, length):
        metrics[f"context_grid/{name}"] = recall.accuracy
    metrics |= _prefix_metrics(trained, spec, length, log2_guesses, "")
    if held_out is not None:
        metrics |= {f"context_heldout/{name}": recall.accuracy for name, recall in curves(held_out, spec, length)}
        metrics |= _prefix_metrics(held_out, spec, length, heldout_log2_guesses, "_heldout")
    for k, shares in zip(spec.extractable, trained.extractable.T, strict=True):
        if np.isfinite(shares).any():
            metrics[f"extractable/{k}"] = float(np.nanmean(shares))
    return metrics


def curves(scores: ContextScores, spec: ContextSpec, length: int) -> Iterator[tuple[str, Recall]]:
    """Recall by `{keep}_{k}_{replacement}` on the common positions, k being a number of tokens or "full"."""
    lengths = spec.curve_lengths(length)
    common = scores.where(scores.position >= max(lengths, default=0))
    true = Recall.of(common.of(None))
    for replacement in spec.replacements if lengths else ():
        nothing = Recall.of(common.of(Condition("local", 0, 0.0, replacement)))
        for keep in spec.keep:
            # Keeping everything local is the full prefix, replacing nothing local is too.
            ends = {"local": {"full": true}, "remote": {"0": true, "full": nothing}}[keep]
            inner = {
                str(k): Recall.of(common.of(Condition(keep, k, 0.0, replacement)))
                for k in lengths
                if str(k) not in ends
            }
            for k, recall in (inner | ends).items():
                if recall is not None:
                    yield f"{keep}_{k}_{replacement}", recall


def grid(scores: ContextScores, spec: ContextSpec, length: int) -> Iterator[tuple[str, Recall]]:
    """Recall by `{local percent}_{context percent}` on the positions that all cells of the grid have."""
    lengths = spec.grid_lengths(length)
    common = scores.where(scores.position >= max((k for k in lengths.values() if k is not None), default=0))
    for local, k in lengths.items():
        for context in GRID_CONTEXT_PERCENTS:
            condition = None
            if k is not None and context < 100:
                condition = Condition("local", k, context / 100, spec.grid_replacement)
            if (recall := Recall.of(common.of(condition))) is not None:
                yield f"{local}_{context}", recall


def minimal_prefix(
    scores: ContextScores,
    *,
    string: int,
    lengths: Sequence[int],
    length: int,
    log2_guess: Float[ndarray, " targets"],
    replacement: Replacement = "source",
) -> Float[ndarray, " targets"]:
    """The shortest local prefix that each token of one string is recalled from, whatever stands before it.

    It is the smallest k such that, at it and at every larger one up to the full prefix, the token is the arg-max in at
    least 4 of 5 redraws and its mean probability is at least the square root of the guesser's: half of its surprise
    is gone. The second part keeps a likely symbol from being recalled for its frequency.

    Args:
        scores: Scores under `keep="local"`.
        string: Which string.
        lengths: The finite k, ascending. One that exceeds what stands before a token is its full prefix.
        length: Symbols of the string.
        log2_guess: log2 of the guesser's probability of each target: of all symbols, or of all but the first.
        replacement: What stands for the rest of the prefix.

    Returns:
        Tokens, at most all that stand before the target; nan where not even the full prefix is enough.
    """
    first = length - len(log2_guess)
    own = scores.where(scores.string == string)
    of_length = [own.of(Condition("local", k, 0.0, replacement)) for k in lengths]
    is_enough = np.stack([_is_enough(each, first, log2_guess) for each in (*of_length, own.of(None))])
    before = np.arange(first, length)
    for row, k in enumerate(lengths):
        is_enough[row] |= (k > before) & is_enough[-1]
    from_here_on = np.logical_and.accumulate(is_enough[::-1])[::-1]
    tokens = np.minimum(np.append(lengths, length)[:, None], before)
    minimal = tokens[from_here_on.argmax(axis=0), np.arange(len(before))].astype(np.float64)
    return np.where(from_here_on[-1], minimal, np.nan)


def _is_enough(scores: ContextScores, first: int, log2_guess: Float[ndarray, " targets"]) -> Bool[ndarray, " targets"]:
    """Whether each target is recalled in one condition; not where the condition has no row."""
    target, count = scores.position - first, len(log2_guess)
    num_draws = np.bincount(target, minlength=count)
    num_right = np.bincount(target, weights=scores.is_right, minlength=count)
    total_p = np.bincount(target, weights=np.exp(scores.log_prob.astype(np.float64)), minlength=count)
    least, of = LEAST_SHARE_RIGHT
    return (num_draws > 0) & (of * num_right >= least * num_draws) & (total_p >= num_draws * 2 ** (log2_guess / 2))


def share_sufficient(minimal: Float[ndarray, " tokens"], lengths: Sequence[int]) -> Float[ndarray, " lengths"]:
    """The share of tokens whose minimal prefix is at most each k; over held-out strings it is the chance curve.

    Example:
        >>> share_sufficient(np.array([0.0, 3.0, np.nan, 10.0]), [0, 5, 10]).tolist()
        [0.25, 0.5, 0.75]
    """
    return np.mean(minimal[None] <= np.asarray(lengths)[:, None], axis=1)


def chance_prefix(marginal: Float[ndarray, " alphabet"], length: int) -> float:
    """The tokens that tell the places of a random string apart: below it a context recurs by chance.

    2 log2 n / H2 with H2 = -log2 of the probability that two symbols of the source agree: among the pairs of places of
    a string of n symbols about one agrees in so many symbols.

    Example:
        >>> chance_prefix(np.array([0.5, 0.5]), 1024)
        20.0
    """
    return 2 * math.log2(length) / -math.log2(float(np.sum(np.square(marginal, dtype=np.float64))))


def determining_prefix(string: Int[ndarray, " length"]) -> Float[ndarray, " length"]:
    """The shortest context of each symbol that is always followed by that symbol in its string.

    It is what a perfect memory of the string alone needs. A context may recur, as long as the same symbol follows.

    Returns:
        Tokens; nan where even all that stands before the symbol is followed by another one elsewhere.

    Example:
        >>> determining_prefix(np.array([0, 1, 0, 1, 0, 2])).tolist()
        [nan, nan, 1.0, nan, 1.0, 4.0]
    """
    length = len(string)
    needed = np.zeros(length)
    agreement = np.zeros(length, dtype=np.int64)  # common suffix of what stands before i and before each other place
    for i in range(length):
        if i:
            agreement[1:] = np.where(string[:-1] == string[i - 1], agreement[:-1] + 1, 0)
        others = agreement[string != string[i]]
        needed[i] = others.max() + 1 if len(others) else 0
    return np.where(needed <= np.arange(length), needed, np.nan)


def _prefix_metrics(
    scores: ContextScores, spec: ContextSpec, length: int, log2_guesses: Sequence[Float[ndarray, " targets"]], role: str
) -> dict[str, float]:
    lengths = spec.curve_lengths(length)
    if not (lengths and "source" in spec.replacements and "local" in spec.keep and scores.num_strings):
        return {}
    minimal = [
        minimal_prefix(scores, string=string, lengths=lengths, length=length, log2_guess=log2_guesses[string])
        for string in range(scores.num_strings)
    ]
    # A token that the guesser is sure of holds nothing to be recalled, and no prefix could be enough for it.
    tokens = np.concatenate([each[guess < NO_SURPRISE] for each, guess in zip(minimal, log2_guesses, strict=False)])
    if len(tokens) == 0:
        return {}
    metrics = {f"context/sufficient_share{role}": float(np.mean(np.isfinite(tokens)))}
    if math.isfinite(median := censored_median(tokens)):
        metrics[f"context/minimal_prefix{role}"] = median
    return metrics
