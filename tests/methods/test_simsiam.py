"""SimSiam against its equation in float64; its predictor and the stop-gradient."""

import pytest
import torch
from support.method_cases import FlatModel, make_method

from ffcv_ssl.methods.simsiam import simsiam
from ffcv_ssl.training.world import World


def simsiam_equation(p, z):
    """Chen and He 2021, eq. 1 and 2, image by image, over all ordered pairs of views."""
    losses = []
    for v in range(len(p)):
        for w in range(len(p)):
            for prediction, target in zip(p[v], z[w]) if v != w else ():
                target = target.detach()
                cosine = (prediction / prediction.norm()) @ (target / target.norm())
                losses.append(-cosine)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_views", [2, 3])
def test_the_loss_and_its_gradient_are_those_of_the_equation(num_views, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    p, z = (torch.randn(num_views, 6, 5, generator=generator) for _ in range(2))
    expected_p, expected_z = p.double().requires_grad_(), z.double().requires_grad_()
    expected = simsiam_equation(expected_p, expected_z)
    expected.backward()
    found_p, found_z = p.to(dtype).requires_grad_(), z.to(dtype).requires_grad_()
    found = simsiam(found_p, found_z)
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    largest = expected_p.grad.abs().max()
    assert (found_p.grad.double() - expected_p.grad).abs().max() < 4 * tolerance * largest
    assert found_z.grad is None and expected_z.grad is None


def test_equal_directions_have_loss_minus_1_whatever_their_lengths():
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))[:1].repeat(2, 1, 1)
    assert simsiam(3 * z, 0.1 * z).item() == pytest.approx(-1)


@pytest.mark.parametrize("constant", [True, False])
def test_the_predictor_is_a_bottleneck_whose_rate_is_constant_if_asked(constant):
    settings = {"predictor": 3, "constant_predictor_lr": constant}
    method = make_method("simsiam", FlatModel(norm=False), World(), settings)
    shapes = [tuple(p.shape) for p in method.predictor.parameters() if p.ndim == 2]
    assert shapes == [(3, 8), (8, 3)]
    assert method.constant_lr() == ({method.predictor: 1.0} if constant else {})


def test_all_views_share_one_pass_through_the_predictor():
    method = make_method("simsiam", FlatModel(norm=False), World(), {"predictor": 3})
    outputs = [{"embedding": torch.randn(5, 8)} for _ in range(2)]
    method.add_heads(outputs)
    joined = method.predictor(torch.cat([features["embedding"] for features in outputs]))
    found = torch.cat([features["prediction"] for features in outputs])
    torch.testing.assert_close(found, joined)
