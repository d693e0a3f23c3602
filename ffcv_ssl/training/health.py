"""How healthy a representation is: pure functions of features, for a run without labels too.

A collapsed representation gives one embedding to all images (complete collapse), or embeddings that
leave most directions unused (dimensional collapse). What each number means to a reader:
docs/watching.md. Guarantees: computed in float64, equal for rows in any order but for rounding, and
defined for any features: rows with NaN or infinity are left out, and collapse has rank 1. Where no
row is left, every number is NaN.

Shapes: N images, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

RANKME_EPS = 1e-7
"""RankMe's epsilon, for float32 features."""


def finite_rows(*features: torch.Tensor) -> list[torch.Tensor]:
    """Features (N, D) each -> those of the images that are finite in all of them, in float64."""
    is_finite = torch.stack([rows.isfinite().all(dim=1) for rows in features]).all(dim=0)
    return [rows[is_finite].double() for rows in features]


def standard_deviation(features: torch.Tensor) -> float:
    """Standard deviation of unit embeddings over images, the mean over dimensions (Chen and He
    2021, section 4.1). Embeddings that point anywhere have 1/sqrt(D), collapsed ones 0."""
    (rows,) = finite_rows(features)
    if len(rows) == 0:
        return math.nan
    return F.normalize(rows, dim=1).std(dim=0, unbiased=False).mean().item()


def effective_rank(features: torch.Tensor, resolution: float = 0.0) -> float:
    """Effective rank (Roy and Vetterli 2007) of the features' covariance matrix, in [1, min(N, D)].

    exp(-sum_k p_k log p_k), p_k = l_k / sum_j l_j, for the eigenvalues l of the covariance, which
    are its singular values. Features with the same variance in d directions, and no other, have d.
    resolution: the relative precision of the features, such as 2**-7 for bfloat16. A spread below
    it is rounding, not signal, and counts as collapse: rank 1.
    """
    (rows,) = finite_rows(features)
    if len(rows) == 0:
        return math.nan
    variances = _squared_singular_values(rows - rows.mean(dim=0))
    total = variances.sum()
    if total <= resolution**2 * rows.square().sum() or total == 0:
        return 1.0
    return torch.special.entr(variances / total).sum().exp().item()


def rankme(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1) of the feature matrix, about 1 to min(N, D).

    exp(-sum_k p_k log p_k), p_k = s_k / sum_j s_j + 1e-7, for the min(N, D) singular values s of
    the matrix (N, D). Unlike `effective_rank`, it does not subtract the mean, and it weighs with
    singular values instead of their squares, so that weak directions count for more.
    """
    (rows,) = finite_rows(features)
    if len(rows) == 0:
        return math.nan
    values = _squared_singular_values(rows).sqrt()
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total + RANKME_EPS
    return torch.special.entr(shares).sum().exp().item()


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of two views' unit embeddings (Wang and Isola 2020, eq. 2, alpha 2), in
    [0, 4]: 0 where the views agree, 2 where they have nothing in common. first, second: (N, D)."""
    first, second = finite_rows(first, second)
    difference = F.normalize(first, dim=1) - F.normalize(second, dim=1)
    return difference.square().sum(dim=1).mean().item()


def uniformity(features: torch.Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different images' unit embeddings (Wang
    and Isola 2020, eq. 3, t 2), in [-8, 0]: 0 where all are one, about -4 + 8/D where they are
    spread over the sphere. One image has no pair: 0."""
    (rows,) = finite_rows(features)
    if len(rows) < 2:
        return 0.0 if len(rows) else math.nan
    unit = F.normalize(rows, dim=1)
    squares = unit.square().sum(dim=1)  # 1, or 0 for a row of zeros
    distances = (squares[:, None] + squares - 2 * unit @ unit.T).clamp(min=0)  # (N, N), squared
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    sums = (-2 * distances).masked_fill(itself, -math.inf).flatten().logsumexp(dim=0)
    return sums.item() - math.log(len(rows) * (len(rows) - 1))


def _squared_singular_values(rows: torch.Tensor) -> torch.Tensor:
    """The min(N, D) squared singular values of float64 rows (N, D). Eigenvalues of the smaller of
    the two matrices of products: several times as fast as a decomposition of the rows."""
    products = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    return torch.linalg.eigvalsh(products).clamp(min=0)
