"""Match length: how many tokens of a reference greedy decoding recites, and what its distribution is made of.

The input is whether each token of each reference is the top prediction given the true tokens before it. This module
knows no model, no prefix and no text. A match that reaches the end of its reference is right-censored there: the model
might have gone on. "Position" counts the tokens of a reference from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray


@dataclass(frozen=True)
class Correctness:
    """Which tokens of many references are right, laid end to end.

    Attributes:
        is_right: Whether each token was the top prediction given the true tokens before it; a tie is wrong.
        length: Tokens of each reference, at least 1.

    Raises:
        ValueError: If there is no sample, a reference is empty, or the lengths do not add up to the tokens.
    """

    is_right: Bool[ndarray, " tokens"]
    length: Int[ndarray, " samples"]

    def __post_init__(self) -> None:
        if len(self.length) == 0 or self.length.min() < 1:
            raise ValueError(
                "there must be at least one sample, and a token in each reference, but got lengths "
                f"{self.length.tolist()[:20]}; leave out samples without a reference"
            )
        if int(self.length.sum()) != len(self.is_right):
            raise ValueError(
                f"lengths must add up to the tokens, but got {int(self.length.sum())} for {len(self.is_right)} tokens; "
                "lay the references end to end, without padding"
            )

    @property
    def num_samples(self) -> int:
        """Number of references."""
        return len(self.length)

    @cached_property
    def num_match(self) -> Int[ndarray, " samples"]:
        """Right tokens before the first wrong one, in each reference: what greedy decoding recites of it."""
        return self.run_lengths()[np.cumsum(self.length) - self.length]

    @property
    def is_censored(self) -> Bool[ndarray, " samples"]:
        """Whether each match reaches the end of its reference."""
        return self.num_match == self.length

    def run_lengths(self) -> Int[ndarray, " tokens"]:
        """Right tokens in a row from each token on, within its reference: the match length if all before it is prefix.

        Greedy decoding follows a reference until its first error, so one pass answers for every length of prefix.

        Example:
            >>> Correctness(np.array([True, True, False, True, True]), np.array([4, 1])).run_lengths().tolist()
            [2, 1, 0, 1, 1]
        """
        num_tokens = len(self.is_right)
        token = np.arange(num_tokens)
        next_wrong = np.minimum.accumulate(np.where(self.is_right, num_tokens, token)[::-1])[::-1]
        return np.minimum(next_wrong, np.repeat(np.cumsum(self.length), self.length)) - token

    def as_matrix(self) -> tuple[Bool[ndarray, "samples longest"], Bool[ndarray, "samples longest"]]:
        """Whether each token is right, and whether it is there at all; what is not there is not right."""
        is_there = np.arange(self.length.max()) < self.length[:, None]
        bits = np.zeros(is_there.shape, dtype=np.bool_)
        bits[is_there] = self.is_right
        return bits, is_there


@dataclass(frozen=True)
class Hazards:
    """How often the token at each position is right: among samples right so far, and among all.

    P(N = n) = p_1 ... p_n (1 - p_{n+1}) with the conditional p is an identity, whatever the tokens depend on. With the
    marginal p it holds only where samples do not differ and their tokens are independent.

    Attributes:
        num_at_risk: Samples that have a token there and all tokens before it right.
        num_right: Those of them whose token is right too.
        num_there: Samples that have a token there.
        num_right_there: Those of them whose token is right, whatever stands before it.
    """

    num_at_risk: Int[ndarray, " positions"]
    num_right: Int[ndarray, " positions"]
    num_there: Int[ndarray, " positions"]
    num_right_there: Int[ndarray, " positions"]

    @classmethod
    def of(cls, correctness: Correctness) -> Hazards:
        """Counts of all positions up to the longest reference."""
        length = correctness.length
        num_at_risk, num_right = counts_at_risk(correctness.num_match, length)
        position = np.arange(len(correctness.is_right)) - np.repeat(np.cumsum(length) - length, length)
        num_there = np.bincount(position)
        return cls(
            num_at_risk=num_at_risk,
            num_right=num_right,
            num_there=num_there,
            num_right_there=np.bincount(position[correctness.is_right], minlength=len(num_there)),
        )

    @property
    def conditional(self) -> Float[ndarray, " positions"]:
        """P(right | all before it right); nan where no sample is left."""
        return np.where(self.num_at_risk > 0, self.num_right / np.maximum(self.num_at_risk, 1), np.nan)

    @property
    def marginal(self) -> Float[ndarray, " positions"]:
        """P(right), whatever stands before it."""
        return self.num_right_there / self.num_there

    @property
    def survival(self) -> Float[ndarray, " matches"]:
        """P(N >= n) for n from 0 to the longest reference, by Kaplan and Meier (1958).

        It takes the samples whose reference has ended to go on like those that are left, which they do not where
        short references are known better. Once 0 it stays 0; beyond the last sample that has a token left it is nan.
        """
        conditional = self.conditional
        is_over = np.cumsum(conditional == 0.0) > 0
        return np.concatenate([[1.0], np.where(is_over, 0.0, np.cumprod(conditional))])

    @property
    def pmf(self) -> Float[ndarray, " positions"]:
        """P(N = n) for n from 0 to one less than the longest reference; the rest is P(N >= its length)."""
        return -np.diff(self.survival)


def require_matches(num_match: Int[ndarray, " samples"], length: Int[ndarray, " samples"]) -> None:
    """Refuse match lengths that cannot be.

    Raises:
        ValueError: If there is no sample, or 0 <= num_match <= length and length >= 1 do not hold.
    """
    if len(length) == 0:
        raise ValueError("there must be at least one sample, but got 0")
    is_wrong = (num_match < 0) | (num_match > length) | (length < 1)
    if np.any(is_wrong):
        raise ValueError(
            "0 <= num_match <= length and length >= 1 must hold for every sample, but got "
            f"num_match={num_match[is_wrong].tolist()[:5]}, length={length[is_wrong].tolist()[:5]}; "
            "a match ends with its reference"
        )


def counts_at_risk(
    num_match: Int[ndarray, " samples"], length: Int[ndarray, " samples"]
) -> tuple[Int[ndarray, " positions"], Int[ndarray, " positions"]]:
    """Samples at risk at each position, and those of them that are right."""
    longest = int(length.max())
    num_right = np.cumsum(np.bincount(num_match, minlength=longest + 1)[:0:-1])[::-1]
    num_wrong = np.bincount(num_match[num_match < length], minlength=longest)
    return num_right + num_wrong, num_right


# --- sampling at temperature 1 ----------------------------------------------------------------------------------


def extraction_probability(log_prob: Float[ndarray, " samples"], num_draws: int) -> Float[ndarray, " samples"]:
    """P(at least one of several independent draws at temperature 1 is the whole reference): 1 - (1 - p)^n.

    Greedy decoding recites a reference or not; this says how soon it comes up by chance (Hayes et al. 2024, with p the
    product of the probabilities of its tokens). Exact, so nothing needs to be drawn.

    Args:
        log_prob: Log-probability of each reference, nats, at most 0.
        num_draws: n, at least 1.

    Raises:
        ValueError: If a log-probability is above 0 or nan, or there is no draw.

    Example:
        >>> extraction_probability(np.log([0.5, 1.0]), 2).tolist()
        [0.75, 1.0]
    """
    if num_draws < 1:
        raise ValueError(f"at least one draw must be made, but got num_draws={num_draws}")
    return -np.expm1(-np.exp(math.log(num_draws) + _log_rate(log_prob)))


def num_draws_needed(log_prob: Float[ndarray, " samples"], probability: float) -> Float[ndarray, " samples"]:
    """Fewest draws of which at least one is the whole reference with this probability: (n, p)-discoverable extraction.

    The inverse of `extraction_probability`; a probability that is reached up to rounding counts as reached.

    Args:
        log_prob: Log-probability of each reference, nats, at most 0.
        probability: In (0, 1).

    Returns:
        Whole numbers, at least 1; infinite where no float holds them.

    Raises:
        ValueError: If a log-probability is above 0 or nan, or the probability is not inside (0, 1).

    Example:
        >>> num_draws_needed(np.log([0.5, 1.0]), 0.75).tolist()
        [2.0, 1.0]
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"the probability must lie inside (0, 1), but got {probability}")
    with np.errstate(over="ignore"):
        draws = np.exp(math.log(-math.log1p(-probability)) - _log_rate(log_prob))
    return np.maximum(np.ceil(draws * (1.0 - 1e-12)), 1.0)


def _log_rate(log_prob: Float[ndarray, " samples"]) -> Float[ndarray, " samples"]:
    """ln(-ln(1 - p)), infinite at p = 1."""
    if not np.all(log_prob <= 0.0):
        raise ValueError(
            f"log-probabilities must be at most 0, but got {float(np.max(log_prob))}; clip what rounding put above it"
        )
    with np.errstate(divide="ignore"):
        near = np.log(-np.log(-np.expm1(np.maximum(log_prob, -1.0))))
        far = np.log(-np.log1p(-np.exp(np.clip(log_prob, -40.0, -1.0))))
    # Below e^-40, -ln(1 - p) is p to the last digit, and p itself need not be a float.
    return np.where(log_prob < -40.0, log_prob, np.where(log_prob < -1.0, far, near))
