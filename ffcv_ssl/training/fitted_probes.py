"""Linear probes that are fitted anew at each evaluation, to clean features of a labelled file.

For runs whose training images have no labels (`probes.train`). Guarantees: the weights are a pure
function of features and labels, without a random number or a state that a checkpoint would have to
hold; training notices nothing of them.

Shapes: B images per batch, N images of the file, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

MAX_ITERATIONS = 100


class LinearProbe(NamedTuple):
    """A linear classifier: logits = (features - mean) / std @ weight.T + bias."""

    mean: torch.Tensor
    """(D,)."""
    std: torch.Tensor
    """(D,), above 0."""
    weight: torch.Tensor
    """(K, D)."""
    bias: torch.Tensor
    """(K,)."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D), any float type -> (B, K) float32."""
        return F.linear((features.float() - self.mean) / self.std, self.weight, self.bias)


def fit_probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> LinearProbe:
    """Multinomial logistic regression on standardised features, from weights of 0.

    Minimises the mean cross-entropy + |W|^2 / 2N (scikit-learn's LogisticRegression with C 1) by
    L-BFGS, in at most MAX_ITERATIONS. features: (N, D) float32; labels: (N,) in [0, K). Rows that
    are not finite are left out.
    """
    is_finite = features.isfinite().all(dim=1)
    features, labels = features[is_finite], labels[is_finite]
    number, width = features.shape
    if number == 0:
        zeros = features.new_zeros(width)
        weight = features.new_zeros(num_classes, width)
        return LinearProbe(zeros, zeros + 1, weight, weight.new_zeros(num_classes))
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    rows = (features - mean) / std
    weight = rows.new_zeros(num_classes, width, requires_grad=True)
    bias = rows.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels)
        loss = loss + weight.square().sum() / (2 * number)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearProbe(mean, std, weight.detach(), bias.detach())
