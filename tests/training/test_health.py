"""Numbers of a representation's health: the papers' equations in NumPy, and features gone wrong."""

import math

import numpy as np
import pytest
import torch

from ffcv_ssl.training import health

rng = np.random.default_rng(0)
SHAPES = [(40, 7), (7, 40), (30, 30), (64, 1), (2, 5)]


def features(shape, decay=0.7, offset=0.5):
    """Rows (N, D) whose directions differ in strength, around a mean that is not 0."""
    strengths = decay ** np.arange(shape[1])
    rotation = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))[0]
    return (rng.normal(size=shape) * strengths + offset) @ rotation


def as_rows(values):
    return torch.tensor(values, dtype=torch.float32)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_rankme_is_the_papers_equation_on_singular_values_of_the_uncentred_features(shape):
    rows = features(shape).astype(np.float32).astype(np.float64)
    values = np.linalg.svd(rows, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert health.rankme(as_rows(rows)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_effective_rank_is_that_of_the_covariance_matrix(shape):
    rows = features(shape).astype(np.float32).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(np.cov(rows.T))).clip(min=0)
    shares = eigenvalues / eigenvalues.sum()
    shares = shares[shares > 0]
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert health.effective_rank(as_rows(rows)) == pytest.approx(expected, rel=1e-5)


def test_the_standard_deviation_is_the_mean_over_dimensions_of_unit_rows():
    rows = features((50, 9))
    expected = unit(rows).std(axis=0).mean()
    assert health.standard_deviation(as_rows(rows)) == pytest.approx(expected, rel=1e-6)


def test_alignment_and_uniformity_are_wang_and_isolas():
    first, second = features((30, 6)), features((30, 6))
    x, y = unit(first), unit(second)
    expected = np.mean(np.sum((x - y) ** 2, axis=1))
    assert health.alignment(as_rows(first), as_rows(second)) == pytest.approx(expected, rel=1e-6)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    terms = [math.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i, j in pairs]
    assert health.uniformity(as_rows(first)) == pytest.approx(math.log(np.mean(terms)), rel=1e-6)


def test_embeddings_that_point_anywhere_have_the_values_that_the_documentation_names():
    width = 64
    rows = torch.randn(4000, width, generator=torch.Generator().manual_seed(0))
    assert health.standard_deviation(rows) == pytest.approx(1 / math.sqrt(width), rel=0.01)
    assert 0.97 * width < health.effective_rank(rows) <= width
    assert 0.97 * width < health.rankme(rows) <= width
    assert health.uniformity(rows[:1000]) == pytest.approx(-4 + 8 / width, abs=0.03)
    other = torch.randn(4000, width, generator=torch.Generator().manual_seed(1))
    assert health.alignment(rows, other) == pytest.approx(2, abs=0.05)
    assert health.alignment(rows, 3 * rows) == pytest.approx(0, abs=1e-12)


def test_the_mean_counts_for_rankme_and_not_for_the_effective_rank():
    rows = as_rows(rng.normal(size=(200, 16)))
    shifted = rows + 50
    assert health.effective_rank(shifted) == pytest.approx(health.effective_rank(rows), rel=1e-4)
    assert health.rankme(shifted) < 0.5 * health.rankme(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapsed_representation_has_rank_1_although_rounding_is_left(dtype):
    constant = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    resolution = torch.finfo(dtype).eps
    rows = (constant * (1 + 0.3 * resolution * noise)).to(dtype)
    assert len(rows.unique(dim=0)) > 1
    assert health.effective_rank(rows.float(), resolution) == 1
    assert health.rankme(rows.float()) == pytest.approx(1, abs=0.2)
    assert health.standard_deviation(rows) < resolution
    assert health.uniformity(rows) == pytest.approx(0, abs=1e-3)
    assert health.effective_rank(torch.ones(9, 4)) == health.effective_rank(torch.zeros(9, 4)) == 1
    assert health.rankme(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert health.rankme(torch.zeros(9, 4)) == 1


def test_rows_that_are_not_finite_are_left_out_in_both_views():
    rows = as_rows(features((20, 5)))
    other = as_rows(features((20, 5)))
    bad, bad_other = rows.clone(), other.clone()
    bad[3, 1], bad[7] = math.nan, math.inf
    bad_other[11, 0] = -math.inf
    good = [i for i in range(20) if i not in (3, 7)]
    for measure in (health.effective_rank, health.rankme, health.uniformity):
        assert measure(bad) == measure(rows[good])
    assert health.standard_deviation(bad) == health.standard_deviation(rows[good])
    both = [i for i in good if i != 11]
    assert health.alignment(bad, bad_other) == health.alignment(rows[both], other[both])


def test_one_image_and_no_image_have_defined_numbers():
    one, none = torch.tensor([[3.0, 4.0]]), torch.full((4, 2), math.nan)
    assert health.standard_deviation(one) == 0 and health.uniformity(one) == 0
    assert health.effective_rank(one) == 1 and health.rankme(one) == pytest.approx(1, abs=1e-5)
    assert health.alignment(one, one) == 0
    single = (
        health.standard_deviation, health.effective_rank, health.rankme, health.uniformity
    )  # fmt: skip
    assert all(math.isnan(measure(none)) for measure in single)
    assert math.isnan(health.alignment(none, none))


def test_uniformity_of_rows_of_zeros_is_that_of_equal_rows():
    assert health.uniformity(torch.zeros(5, 3)) == pytest.approx(0)
