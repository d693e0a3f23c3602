"""A run's folder as the trainer leaves it, made in no time, for tests of evaluations."""

import torch

import train
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.models import Model

COUNTS = {"updates": 10, "images": 400, "views": 800, "flops": 10**12, "seconds": 30.5}
ONE_THREAD = ["--system.device=cpu", "--system.torch_threads=1", "--data.num_workers=1"]


def write_run(folder, train_path, val_path, *arguments, step=10):
    """An untrained ResNet-18 with a projector of two layers, saved after 10 of 20 steps; returns
    the model."""
    config = train.read_config([
        f"--data.train={train_path}", f"--data.val={val_path}", "--model.backbone=resnet18",
        "--model.projector=16-8", "--resolution.min=16", "--resolution.max=16",
        "--optim.warmup_epochs=0", "--views.small_images=true", "--data.mean=[100,101,102]",
        "--epochs=2", *arguments,
    ])  # fmt: skip
    torch.manual_seed(0)
    model = Model(config.model).eval()
    folder.mkdir(exist_ok=True)
    state = {"format": 1, "config": config_dict(config), "model": model.state_dict(), "step": step}
    state["method"] = {"teacher.backbone.conv1.weight": torch.zeros(1)}  # BYOL's, to be left alone
    checkpoint.save(folder / "checkpoint.pt", {**state, **COUNTS})
    record = '{"epoch": 0.4, "step": 8, "images": 320, "train/loss": 1.0}\n'
    (folder / "metrics.jsonl").write_text(record)
    return model
