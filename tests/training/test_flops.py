"""Operations are counted on a twin without memory: same numbers, and no weight is copied."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from ffcv_ssl.config import settings
from ffcv_ssl.training.meters import flops_per_image, meta_twin
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World


def make_learner(method):
    config = train.config_class_of(method)(
        method=method, model=settings.ModelConfig(backbone="tiny", projector="16-8")
    )
    model = Model(config.model)
    made = train.method_class(method)(config, model, 5, World())
    return train.Learner(model, made, nn.Linear(model.widths["backbone"], 5))


def count_on_a_copy(learner, sides_px, num_unlabelled):
    """The same count on a real copy of the learner with real images."""
    twin = copy.deepcopy(learner).train()
    views = [torch.randn(2, 3, px, px) for px in sides_px]
    with FlopCounterMode(display=False) as counter:
        outputs = twin(views, num_unlabelled)
        sum(z.sum() for features in outputs for z in features.values()).backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("method", ["simclr", "byol", "moco", "simsiam"])
def test_operations_are_those_of_a_real_copy_and_no_weight_is_copied(method, monkeypatch):
    learner = make_learner(method)
    expected = count_on_a_copy(learner, [16, 16], 2)
    before = {name: value.clone() for name, value in learner.state_dict().items()}

    def refuse(tensor, memo):
        raise AssertionError("a weight is copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    assert flops_per_image(learner, [16, 16], 2) == expected > 0
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())


def test_a_twin_has_the_same_layers_and_ties_and_no_memory():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    twin = meta_twin(model)
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    assert twin[2].weight is twin[0].weight and not twin[1].weight.requires_grad
    assert [(n, t.shape, t.dtype) for n, t in twin.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in model.state_dict().items()
    ]
    assert not any(t.is_meta for t in model.state_dict().values())
