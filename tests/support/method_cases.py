"""Small models, methods on them, and ranks in processes: what tests of methods share."""

from types import SimpleNamespace

import torch
from torch import nn

from ffcv_ssl.methods.find import find_method
from ffcv_ssl.training.world import World
from support.forked import start_ranks
from support.process_limits import free_port


class FlatModel(nn.Module):
    """A backbone on flattened 4 x 4 images and a projector, as parts of a Model."""

    def __init__(self, norm, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(16)] if norm else []
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), *norms, nn.Tanh())
        self.projector = nn.Linear(16, 8)
        self.widths, self.last = {"backbone": 16, "projector_1": 8}, "projector_1"

    def forward(self, views):
        features = [self.backbone(view) for view in views]
        return [{"backbone": f, "projector_1": self.projector(f)} for f in features]


def make_method(name, model, world, settings, num_classes=0):
    """A method with these of its settings, in a configuration that has little else."""
    method = find_method(name)
    model_settings = SimpleNamespace(projector_norm="hidden")
    groups = {"model": model_settings, method.group: method.Settings(**settings)}
    config = SimpleNamespace(**groups)
    return method(config, model, num_classes, world)


def _rank_main(rank, size, port, function, folder):
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = World.join("cpu", 1, {name: str(value) for name, value in launcher.items()})
    torch.save(function(world), folder / f"rank{rank}.pt")
    world.leave()


def run_ranks(function, folder, size=2):
    """What function(world) returns on each of some ranks, each a process of its own."""
    start_ranks(_rank_main, (size, free_port(), function, folder), size)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]
