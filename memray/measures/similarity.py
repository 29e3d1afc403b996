"""Similarity: how alike the embeddings of samples are, and whether they have collapsed into few directions.

The input is a vector a sample, from whichever embedder. This module knows no model, and no matrix of all pairs: it
never holds more than a block of its rows.

A vector without a direction (0 everywhere, or equal to the mean where vectors are centred) has no cosine: it is left
out of means, and nan where samples stand one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import entr

# Elements of the largest block of pairs, so that memory stays flat whatever the number of samples.
_BLOCK_ELEMENTS = 10_000_000

# Smaller relative differences are what rounding leaves of equal numbers.
_ROUNDING = 1e-10


# --- cosines ----------------------------------------------------------------------------------------------------


def mean_cosine(vectors: Float[ndarray, "samples hidden"], centred: bool) -> float:
    """Mean cosine over all pairs of two samples.

    The squared length of the sum of unit vectors is their number and twice the sum over all pairs, which makes the
    mean exact at the cost of one pass.

    Args:
        vectors: One a sample.
        centred: Whether the mean over the samples is taken off first. Hidden states of language models lie in a narrow
            cone: raw cosines are near 1 for any two texts, and centred ones tell them apart (Ethayarajh 2019).

    Returns:
        In [-1 / (samples - 1), 1]; nan where fewer than two samples have a direction.

    Raises:
        ValueError: If a vector is not finite.

    Example:
        >>> mean_cosine(np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), centred=False)
        0.3333333333333333
    """
    unit = _unit(vectors, centred)
    unit = unit[~np.isnan(unit).any(axis=1)]
    count = len(unit)
    if count < 2:
        return math.nan
    total = unit.sum(axis=0)
    return float((total @ total - count) / (count * (count - 1)))


def similarity(
    prefix_vectors: Float[ndarray, "prefixes hidden"], whole_vectors: Float[ndarray, "wholes hidden"]
) -> dict[str, float]:
    """How alike prefixes are, whole sequences, and how much the references add (protocol, section 7).

    Args:
        prefix_vectors: Embedding of each sample's prefix.
        whole_vectors: Embedding of its prefix with its reference, by the same embedder.

    Returns:
        Mean cosines by key: `similarity/input`, `similarity/full`, `similarity/difference` (full less input; below 0
        where similar prefixes have diverse continuations), and each with `_centred`.

    Raises:
        ValueError: If there are not as many vectors of the one kind as of the other, or one is not finite.
    """
    if len(prefix_vectors) != len(whole_vectors):
        raise ValueError(
            "prefixes and whole sequences must be those of the same samples, but got "
            f"{len(prefix_vectors)} and {len(whole_vectors)} of them; embed both of each sample"
        )
    measures = {}
    for ending, centred in (("", False), ("_centred", True)):
        prefix, whole = mean_cosine(prefix_vectors, centred), mean_cosine(whole_vectors, centred)
        measures[f"similarity/input{ending}"] = prefix
        measures[f"similarity/full{ending}"] = whole
        measures[f"similarity/difference{ending}"] = whole - prefix
    return measures


def nearest_neighbour(vectors: Float[ndarray, "samples hidden"], centred: bool = False) -> Float[ndarray, " samples"]:
    """The largest cosine of each sample to another one.

    Args:
        vectors: One a sample.
        centred: Whether the mean over the samples is taken off first.

    Returns:
        Cosines in [-1, 1]; nan where a sample, or every other one, has no direction.

    Raises:
        ValueError: If a vector is not finite.
    """
    unit = _unit(vectors, centred)
    has_direction = ~np.isnan(unit).any(axis=1)
    nearest = np.full(len(unit), np.nan)
    directed = unit[has_direction]
    if len(directed) < 2:
        return nearest
    largest = []
    for rows in _blocks(len(directed)):
        cosines = directed[rows] @ directed.T
        cosines[np.arange(len(cosines)), np.arange(len(directed))[rows]] = -np.inf
        largest.append(cosines.max(axis=1))
    nearest[has_direction] = np.clip(np.concatenate(largest), -1.0, 1.0)
    return nearest


def _unit(vectors: Float[ndarray, "samples hidden"], centred: bool) -> Float[ndarray, "samples hidden"]:
    """Vectors of length 1, nan without a direction."""
    directions = _centre(vectors) if centred else _exact(vectors)
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    return directions / np.where(length > 0.0, length, np.nan)


def _centre(vectors: Float[ndarray, "samples hidden"]) -> Float[ndarray, "samples hidden"]:
    """Vectors about their mean, exactly 0 where nothing but rounding is left."""
    exact = _exact(vectors)
    if len(exact) == 0:
        return exact
    longest = np.linalg.norm(exact, axis=1).max()
    exact -= exact.mean(axis=0)
    exact[np.linalg.norm(exact, axis=1) <= _ROUNDING * longest] = 0.0
    return exact


def _exact(vectors: Float[ndarray, "samples hidden"]) -> Float[ndarray, "samples hidden"]:
    if not np.all(np.isfinite(vectors)):
        sample = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise ValueError(f"vectors must be finite, but that of sample {sample} is not; embed it in a wider dtype")
    return vectors.astype(np.float64)


def _blocks(num_samples: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // num_samples)
    return (slice(begin, min(begin + size, num_samples)) for begin in range(0, num_samples, size))


# --- collapse ---------------------------------------------------------------------------------------------------


def collapse(vectors: Float[ndarray, "samples hidden"]) -> dict[str, float]:
    """In how many directions embeddings vary: fewer as they collapse.

    Args:
        vectors: One a sample. At most one direction fewer than there are samples can be found.

    Returns:
        Numbers of directions by key, nan where all vectors are equal: `collapse/effective_rank`, the exponential of the
        entropy of the normalised singular values of the centred vectors (Roy & Vetterli 2007);
        `collapse/participation_ratio`, (sum lambda)^2 / sum lambda^2 of the eigenvalues of their covariance, which
        weights strong directions more; `collapse/intrinsic_dimension` (`intrinsic_dimension`), which a curved sheet
        keeps low however many directions it bends into.

    Raises:
        ValueError: If a vector is not finite.
    """
    singular = np.linalg.svdvals(_centre(vectors))
    total = singular.sum()
    if total > 0.0:
        effective_rank = float(np.exp(entr(singular / total).sum()))
        variance = (singular / singular[0]) ** 2  # relative, lest the fourth power of small ones vanish
        participation_ratio = float(variance.sum() ** 2 / np.sum(variance**2))
    else:
        effective_rank = participation_ratio = math.nan
    return {
        "collapse/effective_rank": effective_rank,
        "collapse/participation_ratio": participation_ratio,
        "collapse/intrinsic_dimension": intrinsic_dimension(vectors),
    }


def intrinsic_dimension(vectors: Float[ndarray, "samples hidden"]) -> float:
    """Dimension of the manifold that the vectors lie on, by the distances to two nearest neighbours (TwoNN).

    If vectors are evenly dense over the reach of two neighbours, the ratio mu of the second distance to the first has
    the density d mu^(-d - 1), whatever that density is (Facco et al. 2017). Here d is the one of maximum likelihood,
    N / sum ln mu, with a relative error of 1 / sqrt(N); the paper fits a line to the smaller 90 % of the ratios.
    Noise adds dimensions on its own scale, and in many dimensions too few samples make the estimate too small.

    Args:
        vectors: One a sample. Duplicates, which have no ratio, are left out: each vector counts once.

    Returns:
        Dimension above 0; nan with fewer than three distinct vectors, or where all ratios are 1, as on a lattice.

    Raises:
        ValueError: If a vector is not finite.
    """
    distinct = np.unique(_exact(vectors), axis=0)
    if len(distinct) < 3:
        return math.nan
    centred = distinct - distinct.mean(axis=0)
    squared = np.sum(centred**2, axis=1)
    log_ratios = 0.0
    for rows in _blocks(len(distinct)):
        approximate = squared - 2.0 * (centred[rows] @ centred.T)  # less a constant of each row
        approximate[np.arange(len(approximate)), np.arange(len(distinct))[rows]] = np.inf
        # The products say which two are nearest, but lose what sets close neighbours apart.
        two = np.argpartition(approximate, 1, axis=1)[:, :2]
        distance = np.sort(np.linalg.norm(distinct[rows, None] - distinct[two], axis=2), axis=1)
        log_ratios += float(np.sum(np.log(distance[:, 1] / distance[:, 0])))
    return len(distinct) / log_ratios if log_ratios > _ROUNDING * len(distinct) else math.nan
