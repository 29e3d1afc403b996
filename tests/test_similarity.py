"""Similarity and collapse of embeddings against literal loops, closed forms and known manifolds."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy.spatial import KDTree
from scipy.stats import ortho_group

from memray.measures import similarity as module
from memray.measures.similarity import collapse, intrinsic_dimension, mean_cosine, nearest_neighbour, similarity


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rotated(vectors: ndarray, num_dimensions: int, rng: np.random.Generator) -> ndarray:
    """The same vectors in more dimensions, none of them along an axis."""
    axes = np.asarray(ortho_group.rvs(num_dimensions, random_state=rng))
    return vectors @ axes[: vectors.shape[1]]


def literal_cosines(vectors: ndarray, centred: bool) -> ndarray:
    """Of each pair, nan on the diagonal and where either has no direction."""
    directions = [vector - vectors.mean(axis=0) if centred else vector for vector in vectors]
    cosines = np.full((len(vectors), len(vectors)), np.nan)
    for i, j in itertools.permutations(range(len(vectors)), 2):
        lengths = math.sqrt(sum(directions[i] ** 2)) * math.sqrt(sum(directions[j] ** 2))
        if lengths > 1e-6:
            cosines[i, j] = sum(directions[i] * directions[j]) / lengths
    return cosines


# Small whole numbers: equal vectors, opposite ones and zeros come up.
embeddings = st.integers(2, 4).flatmap(
    lambda hidden: st.lists(
        st.lists(st.integers(-3, 3).map(float), min_size=hidden, max_size=hidden), min_size=2, max_size=8
    )
)


# --- cosines ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(rows=embeddings, centred=st.booleans())
def test_the_mean_cosine_and_the_nearest_neighbour_equal_their_literal_loops(rows, centred):
    vectors = np.array(rows)
    cosines = literal_cosines(vectors, centred)
    defined = cosines[~np.isnan(cosines)]
    expected = defined.mean() if len(defined) else math.nan
    np.testing.assert_allclose(mean_cosine(vectors, centred), expected, atol=1e-12)
    nearest = [max(row[~np.isnan(row)], default=math.nan) for row in cosines]
    np.testing.assert_allclose(nearest_neighbour(vectors, centred), nearest, atol=1e-12)


def test_blocks_of_rows_change_nothing(monkeypatch):
    vectors = generator().normal(size=(37, 5))
    whole, dimension = nearest_neighbour(vectors), intrinsic_dimension(vectors)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 5 * 37)
    np.testing.assert_allclose(nearest_neighbour(vectors), whole, atol=1e-12)
    assert intrinsic_dimension(vectors) == pytest.approx(dimension)


def test_orthogonal_vectors_are_unlike_and_about_their_mean_as_unlike_as_can_be():
    vectors = 3.0 * np.eye(6)
    assert mean_cosine(vectors, centred=False) == pytest.approx(0.0)
    assert mean_cosine(vectors, centred=True) == pytest.approx(-1 / 5)
    np.testing.assert_allclose(nearest_neighbour(vectors, centred=True), np.full(6, -1 / 5))


def test_equal_vectors_are_alike_and_have_no_direction_about_their_mean():
    """A mean of equal numbers is off by rounding, which is a direction too, and a random one."""
    vectors = np.tile(generator().normal(size=7), (11, 1))
    assert np.any(vectors - vectors.mean(axis=0)), "the trap is there"
    assert mean_cosine(vectors, centred=False) == pytest.approx(1.0)
    assert math.isnan(mean_cosine(vectors, centred=True))
    assert np.isnan(nearest_neighbour(vectors, centred=True)).all()
    np.testing.assert_allclose(nearest_neighbour(vectors), np.ones(11))


def test_a_shared_offset_makes_everything_alike_until_the_mean_is_taken_off():
    vectors = generator().normal(size=(400, 30)) + 20.0
    assert mean_cosine(vectors, centred=False) > 0.99
    # The mean of pairs of independent directions in 30 dimensions, about their own mean: -1 / (samples - 1).
    assert mean_cosine(vectors, centred=True) == pytest.approx(-1 / 399, abs=4 * math.sqrt(2 / 30) / 400)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), centred=st.booleans())
def test_neither_order_nor_rotation_nor_scale_matters(seed, centred):
    rng = generator(seed)
    vectors = rng.normal(size=(9, 4)) + rng.normal(size=4)
    order = rng.permutation(9)
    changed = 5.0 * rotated(vectors[order], 6, rng)
    assert mean_cosine(changed, centred) == pytest.approx(mean_cosine(vectors, centred))
    np.testing.assert_allclose(nearest_neighbour(changed, centred), nearest_neighbour(vectors, centred)[order])
    assert collapse(changed) == pytest.approx(collapse(vectors))


def test_similar_prefixes_with_diverse_continuations_have_a_negative_difference():
    prefix = np.tile([1.0, 0.0, 0.0, 0.0], (4, 1)) + 1e-3 * np.eye(4)
    whole = prefix + np.array([[0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    measures = similarity(prefix, whole)
    assert {*measures} == {
        f"similarity/{name}{ending}" for name in ("input", "full", "difference") for ending in ("", "_centred")
    }
    assert measures["similarity/difference"] < -0.3
    for ending, centred in (("", False), ("_centred", True)):
        assert measures[f"similarity/input{ending}"] == mean_cosine(prefix, centred)
        assert measures[f"similarity/full{ending}"] == mean_cosine(whole, centred)
        difference = measures[f"similarity/full{ending}"] - measures[f"similarity/input{ending}"]
        assert measures[f"similarity/difference{ending}"] == pytest.approx(difference)


# --- collapse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_directions", [1, 3, 8])
def test_directions_of_equal_variance_are_counted_exactly(num_directions):
    cross = np.concatenate([np.eye(num_directions), -np.eye(num_directions)]) * 0.01
    measures = collapse(rotated(cross, 10, generator()) + 5.0)
    assert measures["collapse/effective_rank"] == pytest.approx(num_directions)
    assert measures["collapse/participation_ratio"] == pytest.approx(num_directions)


def test_the_directions_of_an_isotropic_gaussian_are_those_it_has_variance_in():
    num_samples, num_directions = 2_000, 6
    vectors = rotated(generator().normal(size=(num_samples, num_directions)), 40, generator(1))
    measures = collapse(vectors)
    # (E trace)^2 and E trace of the square of a Wishart matrix of n = samples - 1 degrees; the ratio of the observed
    # ones varies by less than a hundredth here.
    n, d = num_samples - 1, num_directions
    assert measures["collapse/participation_ratio"] == pytest.approx((n * d + 2) / (n + d + 1), rel=0.01)
    assert measures["collapse/effective_rank"] == pytest.approx(d, rel=0.01)
    assert measures["collapse/effective_rank"] >= measures["collapse/participation_ratio"]
    assert measures["collapse/intrinsic_dimension"] == pytest.approx(d, rel=0.1 + 4 / math.sqrt(num_samples))


def test_both_ranks_equal_their_definitions_on_the_covariance():
    vectors = generator().normal(size=(60, 8)) * np.arange(1, 9) + 3.0
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.T))
    share = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    measures = collapse(vectors)
    assert measures["collapse/effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    ratio = sum(eigenvalues) ** 2 / sum(eigenvalues**2)
    assert measures["collapse/participation_ratio"] == pytest.approx(ratio)


def test_vectors_that_are_all_equal_have_no_dimension_and_never_zero():
    for vectors in (np.full((5, 3), 0.1), np.zeros((4, 2)), np.zeros((1, 2)), np.zeros((0, 3))):
        assert np.isnan([*collapse(vectors).values()]).all()


# --- intrinsic dimension ----------------------------------------------------------------------------------------


def flat_torus(num_samples: int, num_dimensions: int, rng: np.random.Generator) -> ndarray:
    """Without an edge, and evenly dense: only the number of samples makes the estimate uncertain."""
    angle = rng.uniform(0, 2 * math.pi, (num_samples, num_dimensions))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_the_dimension_of_a_torus_is_found_in_whatever_space_it_lies(dimension):
    vectors = rotated(flat_torus(2_000, dimension, generator(2)), 24, generator(3))
    # Maximum likelihood varies by 1 / sqrt(N); pairs that are each other's neighbours share a distance, which adds to
    # that at most by a factor of sqrt(2).
    assert intrinsic_dimension(vectors) == pytest.approx(dimension, rel=3 * math.sqrt(2 / 2_000))
    ranks = collapse(vectors)
    assert ranks["collapse/effective_rank"] == pytest.approx(2 * dimension, rel=0.02), "it bends into twice as many"


def test_the_intrinsic_dimension_is_that_of_the_distances_of_a_search_tree():
    vectors = generator().normal(size=(300, 4)).astype(np.float32)
    distance, _ = KDTree(vectors.astype(np.float64)).query(vectors.astype(np.float64), k=3)
    expected = 300 / np.log(distance[:, 2] / distance[:, 1]).sum()
    assert intrinsic_dimension(vectors) == pytest.approx(expected)
    assert intrinsic_dimension(vectors[:3]) > 0.0


def test_the_intrinsic_dimension_counts_each_vector_once():
    vectors = flat_torus(100, 2, generator())
    assert intrinsic_dimension(np.concatenate([vectors, vectors[:70]])) == pytest.approx(intrinsic_dimension(vectors))


def test_close_neighbours_far_from_the_origin_are_not_lost_to_rounding():
    vectors = flat_torus(300, 2, generator())
    vectors[150:] += 1e5
    expected = 300 / np.log(np.divide(*KDTree(vectors).query(vectors, k=3)[0].T[[2, 1]])).sum()
    assert intrinsic_dimension(vectors) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("vectors", [np.eye(5), np.eye(2), np.array([[1.0], [1.0], [2.0]])])
def test_a_lattice_or_two_vectors_have_no_intrinsic_dimension(vectors):
    assert math.isnan(intrinsic_dimension(vectors))


def test_what_is_no_embedding_is_refused():
    with pytest.raises(ValueError, match="those of the same samples, but got 3 and 2 of them"):
        similarity(np.eye(3), np.eye(3)[:2])
    broken = np.array([[0.0, 1.0], [np.inf, 1.0], [1.0, 0.0]])
    for measure in (nearest_neighbour, collapse, intrinsic_dimension):
        with pytest.raises(ValueError, match="must be finite, but that of sample 1 is not"):
            measure(broken)
    with pytest.raises(ValueError, match="must be finite"):
        mean_cosine(broken, centred=False)
