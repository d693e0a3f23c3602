"""The trainer's parts: model, counted work, probes, k-NN and averages."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import train
from ffcv_ssl.config import settings
from ffcv_ssl.training.meters import Averages, flops_per_image
from ffcv_ssl.training.models import make_backbone
from ffcv_ssl.training.probes import Probes, knn_scores, probe_loss, topk_correct
from ffcv_ssl.training.world import World


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


def test_the_backbones_that_a_configuration_may_name_are_all_of_torchvisions_resnets():
    assert set(settings._RESNETS) == set(
        torchvision.models.list_models(torchvision.models, "*resne*t*")
    )


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
    assert [int(topk_correct(scores, labels, k)) for k in (1, 2, 3, 5)] == [1, 2, 3, 3]


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
