"""torch.compile of what is trained: one graph per resolution, without breaks."""

import pytest
import torch
from support.method_cases import run_ranks
from torch._dynamo import utils

import train
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.methods.ema_teacher import EMATeacher
from ffcv_ssl.training.data_parallel import share_learning
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole

NUM_VIEWS, ROWS = 2, 4


def make_learner(method, world, backbone="tiny"):
    argv = [f"--method={method}", f"--model.backbone={backbone}", "--model.projector=64-32"]
    config = train.read_config([*argv, "--data.train=a.beton"])
    model = train.Model(config.model)
    return train.Learner(model, train.method_class(method)(config, model, 10, world), None)


def count_graphs(learner, network, sides):
    """(graphs, reasons for breaks) of a forward and backward pass at each side, in order."""
    utils.counters.clear()
    for side in sides:
        views = [torch.randn(ROWS, 3, side, side) for _ in range(NUM_VIEWS)]
        outputs = network(views, NUM_VIEWS)
        if hasattr(learner.method, "teacher"):
            learner.method.targets(views)
        sum(features["embedding"].sum() for features in outputs).backward()
    return utils.counters["stats"]["unique_graphs"], dict(utils.counters["graph_break"])


@pytest.fixture
def eager(monkeypatch):
    """Graphs are made but not compiled to machine code, which takes long and changes no count."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="eager", **how)
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "backbone"), [("simclr", "resnet18"), ("byol", "tiny")])
def test_each_resolution_is_one_graph_for_the_learner_and_one_for_the_teacher(
    method, backbone, eager
):
    world = World()
    learner = make_learner(method, world, backbone)
    network = share_learning(learner, world, SystemConfig(compile=True))
    graphs, breaks = count_graphs(learner, network, [32, 64, 32, 64, 32])
    modules = 2 if method == "byol" else 1
    assert not breaks and graphs == 2 * modules
    assert isinstance(getattr(learner.method, "teacher", None), EMATeacher) == (modules == 2)


def graphs_of_ranks(world):
    """Graphs and breaks on two ranks with synchronised batch-norm."""
    compile_ = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **how: compile_(self, backend="eager", **how)
    learner = make_learner("simclr", world)
    system = SystemConfig(compile=True, sync_batchnorm="on")
    graphs, breaks = count_graphs(learner, share_learning(learner, world, system), [32, 64, 32])
    return torch.tensor([graphs, sum(breaks.values())])


def test_synchronised_batch_norm_is_part_of_the_graph(tmp_path):
    for graphs, breaks in run_ranks(graphs_of_ranks, tmp_path):
        assert (int(graphs), int(breaks)) == (2, 0)


def test_a_networks_stages_are_in_the_same_graph(eager):
    world = World()
    learner = make_learner("simclr", world, "resnet18")
    learner.model = train.Model(learner.method.config.model, stages=True)
    network = share_learning(learner, world, SystemConfig(compile=True))
    graphs, breaks = count_graphs(learner, network, [32, 64, 32])
    assert not breaks and graphs == 2
    views = [torch.randn(ROWS, 3, 32, 32)]
    assert {"layer1", "layer4", "embedding"} <= set(network(views, 1)[0])
