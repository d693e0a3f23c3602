"""Linear probes fitted at once: the optimum of their objective, and features gone wrong."""

import numpy as np
import pytest
import torch

from ffcv_ssl.training.fitted_probes import fit_probe


def make_features(number, width, num_classes, seed=0):
    """Features (N, D) that overlap between classes, around a mean and with scales far from 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, number)
    centers = rng.normal(size=(num_classes, width))
    rows = (centers[labels] + rng.normal(size=(number, width))) * np.logspace(-2, 2, width) + 7
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


def test_the_weights_are_the_optimum_of_regularised_logistic_regression():
    features, labels = make_features(80, 6, 4)
    probe = fit_probe(features, labels, 4)
    rows = features.numpy().astype(np.float64)
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    weight, bias = probe.weight.numpy().astype(np.float64), probe.bias.numpy()
    logits = rows @ weight.T + bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    error = (shares - np.eye(4)[labels]) / len(rows)
    gradient = error.T @ rows + weight / len(rows)
    assert np.abs(gradient).max() < 1e-4 and np.abs(error.sum(axis=0)).max() < 1e-4
    assert np.abs(weight).max() > 0.3  # not the weights of 0 that it begins with
    np.testing.assert_allclose(probe(features), logits, rtol=1e-3, atol=1e-3)


def test_equal_features_give_equal_weights_and_draw_no_random_number():
    features, labels = make_features(50, 5, 3)
    before = torch.get_rng_state()
    first, second = (fit_probe(features, labels, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns_within_no_grad_as_an_evaluation_is():
    features, labels = make_features(90, 20, 3)
    with torch.no_grad():
        probe = fit_probe(features, labels, 3)
    assert (probe(features).argmax(dim=1) == labels).float().mean() > 0.9
    assert not probe.weight.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out(value):
    features, labels = make_features(40, 5, 3)
    bad = torch.cat([features, features[:1]])
    bad[-1, 2] = value
    probe = fit_probe(bad, torch.cat([labels, labels[:1]]), 3)
    assert all(torch.equal(a, b) for a, b in zip(probe, fit_probe(features, labels, 3)))
    nothing = fit_probe(torch.full((4, 2), value), torch.zeros(4, dtype=torch.long), 3)
    assert torch.equal(nothing(torch.ones(2, 2)), torch.zeros(2, 3))


def test_a_feature_that_never_changes_is_harmless():
    features, labels = make_features(40, 5, 3)
    features[:, 1] = 3
    probe = fit_probe(features, labels, 3)
    assert all(part.isfinite().all() for part in probe)
