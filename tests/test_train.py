"""The trainer's pure parts: losses, optimisers, schedules, model, probes and k-NN."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import train
from ffcv_ssl import settings
from ffcv_ssl.distributed import World
from ffcv_ssl.meters import Averages, flops_per_image
from ffcv_ssl.models import make_backbone
from ffcv_ssl.optim import LARS, lr_at, parameter_groups, resolution_at
from ffcv_ssl.probing import Probes, hits, knn_scores, probe_loss


def nt_xent_by_the_equation(z, temperature):
    """SimCLR's eq. 1 anchor by anchor, in float64: z (V, B, D)."""
    _, batch, width = z.shape
    z = z.reshape(-1, width).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similarity = z @ z.T / temperature
    losses = []
    for i in range(len(z)):
        others = np.exp(np.delete(similarity[i], i)).sum()
        for j in range(len(z)):
            if j != i and j % batch == i % batch:
                losses.append(-similarity[i, j] + np.log(others))
    return np.mean(losses)


@pytest.mark.parametrize(("num_views", "temperature"), [(2, 0.5), (2, 0.1), (3, 0.2)])
def test_nt_xent_is_equation_1_and_its_terms_add_up(num_views, temperature):
    z = torch.randn(num_views, 7, 5, generator=torch.Generator().manual_seed(0))
    loss, terms = train.nt_xent(z, temperature)
    assert loss.item() == pytest.approx(nt_xent_by_the_equation(z.numpy(), temperature), rel=1e-5)
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-6)


def test_nt_xent_is_finite_and_float32_for_low_temperatures_and_half_precision():
    z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    z.requires_grad_()
    loss, _ = train.nt_xent(z, 1e-3)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0


def lars_by_hand(p, g, buf, lr, decay, adapt, lr_inside, joint_norm):
    """One step for one parameter, in NumPy float64, momentum 0.9, trust 0.001."""
    u = g + decay * p
    p_norm = np.linalg.norm(p)
    norm = np.linalg.norm(u) if joint_norm else np.linalg.norm(g) + decay * p_norm
    if adapt and p_norm > 0 and norm > 0:
        u = u * 0.001 * p_norm / (norm + 1e-8)
    if lr_inside:
        buf = 0.9 * buf + lr * u
        return p - buf, buf
    buf = 0.9 * buf + u
    return p - lr * buf, buf


@pytest.mark.parametrize("lr_inside", [True, False])
@pytest.mark.parametrize("joint_norm", [True, False])
def test_lars_follows_its_equation_in_each_variant(lr_inside, joint_norm):
    rng = np.random.default_rng(0)
    shapes = {True: [(3, 4), (2, 3, 3, 3)], False: [(5,)]}
    values = {adapt: [rng.normal(size=s) for s in group] for adapt, group in shapes.items()}
    values[True].append(np.zeros((2, 2)))  # a norm of 0: no adaptation, no division by it
    parameters = {
        adapt: [torch.nn.Parameter(torch.tensor(v)) for v in group]
        for adapt, group in values.items()
    }
    groups = [
        {"params": group, "weight_decay": 0.1 if adapt else 0.0, "adapt": adapt}
        for adapt, group in parameters.items()
    ]
    optimizer = LARS(groups, lr=1.0, lr_inside=lr_inside, joint_norm=joint_norm)
    buffers = {adapt: [np.zeros_like(v) for v in group] for adapt, group in values.items()}
    for lr in (0.5, 2.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for adapt, group in parameters.items():
            decay = 0.1 if adapt else 0.0
            for n, parameter in enumerate(group):
                gradient = rng.normal(size=parameter.shape)
                parameter.grad = torch.tensor(gradient)
                values[adapt][n], buffers[adapt][n] = lars_by_hand(
                    values[adapt][n], gradient, buffers[adapt][n], lr, decay, adapt, lr_inside,
                    joint_norm,
                )  # fmt: skip
        optimizer.step()
    for adapt, group in parameters.items():
        for parameter, value in zip(group, values[adapt]):
            np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-10, atol=1e-12)


def test_norm_layers_and_biases_are_neither_decayed_nor_adapted_wherever_they_are():
    model = train.Model(settings.ModelConfig(backbone="resnet18", projector="32-16"))
    weights, rest = parameter_groups(model, 0.1)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert {id(p) for p in weights["params"]} == {id(m.weight) for m in convolutions}
    assert id(model.backbone.layer2[0].downsample[1].weight) in {id(p) for p in rest["params"]}
    assert len(weights["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (weights["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert weights["adapt"] and not rest["adapt"]


def rate_at(step, batch_size=512, steps_per_epoch=5, **optim):
    return lr_at(step, settings.OptimConfig(**optim), batch_size, 100, steps_per_epoch)


def test_learning_rate_warms_up_by_step_then_follows_the_cosine_to_its_end():
    rates = [rate_at(step, lr=0.4, warmup_epochs=10, end_ratio=0.01) for step in range(500)]
    peak = 0.4 * 512 / 256
    assert rates[0] == pytest.approx(peak / 50)
    assert max(rates) == rates[49] == pytest.approx(peak)
    middle = 0.5 * (1 + 0.01) * peak
    assert rates[50 + 225] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(0.01 * peak, rel=0.01)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_warm_up_can_start_above_zero():
    first, last = (rate_at(s, lr=0.4, warmup_epochs=10, warmup_start=0.125) for s in (0, 49))
    assert first == pytest.approx(last * (0.125 + 0.875 / 50))


def test_learning_rate_scales_with_the_batch_as_asked():
    rates = {
        scaling: rate_at(0, lr=0.1, lr_scaling=scaling, warmup_epochs=0.0)
        for scaling in ("linear", "sqrt", "none")
    }
    assert rates == pytest.approx({"linear": 0.2, "sqrt": 0.1 * math.sqrt(512), "none": 0.1})


def test_resolution_ramps_from_min_to_max_in_steps_of_32():
    config = settings.ResolutionConfig(min=160, max=256, start_ramp=10, end_ramp=20)
    sizes = [resolution_at(epoch, config) for epoch in range(25)]
    assert sizes[:11] == [160] * 11 and sizes[20:] == [256] * 5
    assert set(sizes) == {160, 192, 224, 256} and sizes == sorted(sizes)
    fixed = settings.ResolutionConfig(min=40, max=40, start_ramp=0, end_ramp=9)
    assert {resolution_at(epoch, fixed) for epoch in range(10)} == {40}


def test_views_of_one_size_share_one_forward_pass_and_come_back_in_order():
    model = train.Model(settings.ModelConfig(backbone="resnet18", projector="16-8"))
    seen = []
    model.backbone.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    views = [torch.randn(4, 3, side, side) for side in (64, 32, 64, 32)]
    outputs = model(views)
    assert seen == [8, 8]
    model.eval()
    outputs = model(views)
    for view, features in zip(views, outputs):
        for name, expected in model.encode(view).items():
            torch.testing.assert_close(features[name], expected, rtol=1e-3, atol=1e-4)


def test_model_has_torchvisions_weights_and_a_projector_as_written():
    model = train.Model(settings.ModelConfig(backbone="resnet18", projector="40-24"))
    bare = torchvision.models.resnet18()
    bare.fc = torch.nn.Identity()
    bare.load_state_dict(model.backbone.state_dict())
    assert model.widths == {"backbone": 512, "projector_1": 40, "projector_2": 24}
    kinds = [[type(layer).__name__ for layer in block] for block in model.projector]
    assert kinds == [["Linear", "BatchNorm1d", "ReLU"], ["Linear"]]
    assert all(block[0].bias is None for block in model.projector)


def test_cifar_stem_keeps_the_resolution_of_small_images():
    images = torch.zeros(2, 3, 32, 32)
    sides = {}
    for stem in ("imagenet", "cifar"):
        backbone, _ = make_backbone("resnet18", stem)
        hook = backbone.layer4.register_forward_hook(
            lambda module, args, output, stem=stem: sides.update({stem: output.shape[-1]})
        )
        backbone(images)
        hook.remove()
    assert sides == {"imagenet": 1, "cifar": 4}


def test_counted_flops_of_a_step_are_those_of_the_convolutions_three_times():
    model = train.Model(settings.ModelConfig(backbone="resnet18", projector="8"))
    before = torch.get_rng_state()
    counted = flops_per_image(model, [224, 224])
    assert torch.equal(torch.get_rng_state(), before)
    # 1.81 GMACs is torchvision's figure with its classifier; backward costs twice the forward
    assert counted == pytest.approx(2 * 3 * 2 * 1.81e9, rel=0.05)


def test_probes_learn_from_detached_features_only():
    features = {"backbone": torch.randn(6, 5, requires_grad=True)}
    probes = Probes({"backbone": 5}, num_classes=3)
    probe_loss(probes(features), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert features["backbone"].grad is None
    assert probes.layers["backbone"].weight.grad.abs().sum() > 0


def test_unlabelled_images_do_not_count_in_the_probes_loss():
    logits = {"a": torch.randn(6, 4), "b": torch.randn(6, 4)}
    labels = torch.tensor([3, -1, 0, -1, -1, 1])
    known = labels >= 0
    expected = sum(F.cross_entropy(x[known], labels[known]) for x in logits.values())
    torch.testing.assert_close(probe_loss(logits, labels), expected)
    assert probe_loss(logits, torch.full((6,), -1)).item() == 0


def test_hits_counts_labels_among_the_k_best_and_never_an_unlabelled_one():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    labels = torch.tensor([1, 2, 1, -1])
    assert [int(hits(scores, labels, k)) for k in (1, 2, 3, 5)] == [1, 2, 3, 3]


def test_knn_votes_are_those_of_a_brute_force_search():
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    queries, bank = unit(rng.normal(size=(9, 6))), unit(rng.normal(size=(50, 6)))
    labels = rng.integers(0, 4, 50)
    scores = knn_scores(
        torch.tensor(queries, dtype=torch.float32), torch.tensor(bank, dtype=torch.float32),
        torch.tensor(labels), num_classes=4, k=7, temperature=0.1,
    )  # fmt: skip
    for query, row in zip(queries, scores.numpy() * math.exp(1 / 0.1)):
        similarity = bank @ query
        expected = np.zeros(4)
        for n in np.argsort(-similarity)[:7]:
            expected[labels[n]] += math.exp(similarity[n] / 0.1)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_knn_takes_a_bank_smaller_than_k():
    scores = knn_scores(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), 2, k=20, temperature=0.1)
    assert scores.argmax(dim=1).tolist() == [1, 0]


def test_averages_weigh_by_their_weights_and_start_anew():
    averages, one = Averages(), torch.ones(())
    for value in (1.0, 2.0, 6.0):
        averages.add("loss", torch.tensor(value), one)
    averages.add("top1", torch.tensor(3), torch.tensor(4))
    averages.add("top1", torch.tensor(0), torch.tensor(0))
    averages.add("nothing", torch.tensor(0), torch.tensor(0))
    assert averages.take(World()) == {"loss": 3.0, "top1": 0.75}
    assert averages.take(World()) == {}
