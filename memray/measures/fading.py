"""Curves by which accuracy fades with age, and the most likely one of each kind.

This module knows counts of right tokens by age, and nothing of what they were counted on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

CurveName = Literal["linear", "exponential", "power", "saturating"]
CURVES: tuple[CurveName, ...] = get_args(CurveName)

# Accuracies stay this far from 0 and 1. A line that has fallen to a floor of 0 says that no token is recalled, and one
# lucky token would refute it with a likelihood of 0, from which no search finds back. Like this it costs 14 nats, and
# ten thousand tokens that are as sure as predicted cost 0.01.
SURE = 1e-6

# The search for the most likely curve: points along each side of a grid; nats, and accuracy, to which it is exact; a
# bound on Newton's steps, of which a dozen are usual.
_POINTS, _FLAT, _EXACT, _MAX_STEPS = 7, 1e-5, 1e-8, 100


@dataclass(frozen=True, kw_only=True)
class FadingCurve:
    """One curve p(age) = floor + (accuracy_at_zero - floor) f(age).

    f is the share that is retained, 1 at age 0 and non-increasing:

    * linear: max(0, 1 - rate age);
    * exponential: exp(-rate age);
    * power: (1 + age)^-rate. Without the 1 it would be infinite at age 0, where recall is known best. It also sets a
      scale: age is counted in optimiser steps, and in another unit this would be another family of curves;
    * saturating: asymptote + (1 - asymptote) exp(-rate age).

    Attributes:
        name: Which of them.
        floor: Accuracy of guessing, in (0, 1).
        accuracy_at_zero: Accuracy at age 0, from `floor` to 1.
        rate: Per optimiser step, at least 0; for `power` the exponent, without unit.
        asymptote: Share that is never forgotten, in [0, 1]; 0 but for `saturating`.
    """

    name: CurveName
    floor: float
    accuracy_at_zero: float
    rate: float
    asymptote: float = 0.0

    @property
    def num_parameters(self) -> int:
        """Parameters that are fitted, the floor not among them: 3 for `saturating`, else 2."""
        return 3 if self.name == "saturating" else 2

    @property
    def half_life_steps(self) -> float:
        """Age at which (p - floor) / (accuracy_at_zero - floor) is one half, in optimiser steps; nan if it never is.

        It is what the curve says, however far beyond the ages that it was fitted to.

        Example:
            >>> FadingCurve(name="power", floor=0.1, accuracy_at_zero=0.9, rate=0.5).half_life_steps
            3.0
        """
        if self.rate == 0.0 or self.asymptote >= 0.5:
            return math.nan
        if self.name == "linear":
            return 0.5 / self.rate
        half_life = math.log((1.0 - self.asymptote) / (0.5 - self.asymptote)) / self.rate
        if self.name == "power":
            with np.errstate(over="ignore"):
                half_life = float(np.expm1(half_life))
        return half_life if math.isfinite(half_life) else math.nan

    def accuracy(self, age: Float[ndarray, " ages"] | Int[ndarray, " ages"]) -> Float[ndarray, " ages"]:
        """Expected share of right tokens at each age, from `floor` to 1."""
        share = _retained(self.name, _clock(self.name, age), np.array([self.rate]), np.array([self.asymptote]))[0]
        return self.floor + (self.accuracy_at_zero - self.floor) * share


def most_likely(
    name: CurveName,
    age: Int[ndarray, " ages"],
    right: Int[ndarray, " ages"],
    total: Int[ndarray, " ages"],
    floor: float,
) -> FadingCurve:
    """The curve of one kind with the greatest binomial likelihood.

    A search by grids and not an optimiser: far from its maximum every curve is flat, and a line has a kink wherever it
    reaches the floor at one of the ages. Between two kinks it has one maximum, being linear in accuracy and slope, so
    there is a box of rates between each two ages. A box halves around its best point, or follows it where that lies on
    its edge. It is given up when, holding as much above its best point as below, it still held less than the best box.

    Args:
        name: The kind.
        age: Optimiser steps, ascending; at least one above 0.
        right: Right tokens at each age.
        total: All tokens at each age, at least 1.
        floor: Accuracy of guessing, in [0, 1); the curve's own is kept 1e-6 from 0 and 1.
    """
    floor = float(np.clip(floor, SURE, 1.0 - 2.0 * SURE))
    clock = _clock(name, age)
    later = clock[age > 0]
    # From nothing forgotten at the oldest age to everything at the youngest.
    edges = np.concatenate([[0.0], 1.0 / later[::-1], [20.0 / later[0]]])
    asymptotes = np.linspace(0.0, 1.0, _POINTS) if name == "saturating" else np.zeros(1)
    grid = np.array([(rate, asymptote) for rate in np.linspace(0.0, 1.0, _POINTS) for asymptote in asymptotes])
    least = low = np.stack([edges[:-1], np.zeros(len(edges) - 1)], axis=1)
    largest = high = np.stack([edges[1:], np.ones(len(edges) - 1)], axis=1)
    guess = np.full(len(low), right[0] / total[0])
    while True:
        shapes = low[:, None] + (high - low)[:, None] * grid
        share = _retained(name, clock, shapes[..., 0].ravel(), shapes[..., 1].ravel())
        at_zero, log_likelihood = _profile(right, total - right, floor, share, np.repeat(guess, len(grid)))
        log_likelihood = log_likelihood.reshape(len(low), len(grid))
        greatest, hope = log_likelihood.max(axis=1), np.ptp(log_likelihood, axis=1)
        winner = np.arange(len(low)), log_likelihood.argmax(axis=1)
        guess, centre = at_zero.reshape(log_likelihood.shape)[winner], shapes[winner]
        if (greatest + hope).max() < greatest.max() + _FLAT:
            best = int(greatest.argmax())
            rate, asymptote = centre[best].tolist()
            return FadingCurve(
                name=name, floor=floor, accuracy_at_zero=float(guess[best]), rate=rate, asymptote=asymptote
            )
        on_edge = (centre == low) & (low > least) | (centre == high) & (high < largest)
        reach = np.where(on_edge, 0.5, 0.25) * (high - low)
        kept = greatest + hope >= greatest.max()
        guess, least, largest = guess[kept], least[kept], largest[kept]
        low, high = np.maximum((centre - reach)[kept], least), np.minimum((centre + reach)[kept], largest)


def _profile(
    right: Int[ndarray, " ages"],
    wrong: Int[ndarray, " ages"],
    floor: float,
    share: Float[ndarray, "shapes ages"],
    guess: Float[ndarray, " shapes"],
) -> tuple[Float[ndarray, " shapes"], Float[ndarray, " shapes"]]:
    """The best accuracy at age 0 for each shape, and its log-likelihood without the binomial coefficients.

    The likelihood is concave in it: Newton's steps from the guess, halving the bracket where one would leave it. The
    upper end is tried before the guess, because it is the solution where all tokens are right, and halving would creep
    there.
    """
    low, high = np.full(len(share), floor), np.full(len(share), 1.0 - SURE)
    at_zero = high
    for step in range(_MAX_STEPS):
        accuracy = floor + (at_zero - floor)[:, None] * share
        per_right, per_wrong = right / accuracy, wrong / (1.0 - accuracy)
        slope = (share * (per_right - per_wrong)).sum(axis=1)
        curvature = (share**2 * (per_right / accuracy + per_wrong / (1.0 - accuracy))).sum(axis=1)
        low, high = np.where(slope > 0.0, at_zero, low), np.where(slope > 0.0, high, at_zero)
        # No curvature where a shape retains nothing at any age that was seen: then there is no slope either.
        following = guess if step == 0 else at_zero + slope / np.maximum(curvature, np.finfo(np.float64).tiny)
        is_inside = (following >= low) & (following <= high)
        before, at_zero = at_zero, np.where(is_inside, following, 0.5 * (low + high))
        if step > 0 and np.abs(at_zero - before).max() < _EXACT:
            break
    accuracy = floor + (at_zero - floor)[:, None] * share
    return at_zero, np.log(accuracy) @ right + np.log1p(-accuracy) @ wrong


def _retained(
    name: CurveName,
    clock: Float[ndarray, " ages"],
    rate: Float[ndarray, " shapes"],
    asymptote: Float[ndarray, " shapes"],
) -> Float[ndarray, "shapes ages"]:
    decay = rate[:, None] * clock
    if name == "linear":
        return np.maximum(0.0, 1.0 - decay)
    return asymptote[:, None] + (1.0 - asymptote[:, None]) * np.exp(-decay)


def _clock(name: CurveName, age: Float[ndarray, " ages"] | Int[ndarray, " ages"]) -> Float[ndarray, " ages"]:
    """The time in which a curve decays exponentially: a power is an exponential in log time."""
    return np.log1p(age) if name == "power" else age.astype(np.float64)
