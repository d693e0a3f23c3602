"""Runs of the trainer that take a second, in this process, and what they leave."""

import signal

import pytest
import torch

import train
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics

SETTINGS = {
    "epochs": 2, "model.backbone": "tiny", "model.projector": "16-8", "optim.name": "sgd",
    "optim.lr": 0.1, "optim.warmup_epochs": 0.5, "resolution.min": 16, "resolution.max": 16,
    "data.batch_size": 20, "data.num_workers": 1, "log.every_steps": 1, "log.tensorboard": "false",
    "system.device": "cpu", "system.torch_threads": 1, "precision": "fp32",
    "views.small_images": "true", "evaluation.batch_size": 20,
}  # fmt: skip
"""Of a tiny network on images of 16 px."""
RESNET = {"model__backbone": "resnet18", "data__batch_size": 10, "epochs": 1}
"""More settings, for a network with stages."""


def run(out, code=0, stop_at=None, **given):
    """Train with `a__b` for the key a.b; stop_at: interrupt the run during this step."""
    given = {**SETTINGS, **{key.replace("__", "."): value for key, value in given.items()}}
    train_step = train.Trainer._train_step

    def interrupted(self, data, px):
        train_step(self, data, px)
        if self.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        if stop_at is not None:
            patched.setattr(train.Trainer, "_train_step", interrupted)
        words = [f"--{key}={value}" for key, value in given.items()]
        assert train.main([f"--out={out}", *words]) == code
    return out


def records(out, *without):
    """A run's metrics without what the clock decides, and without keys of some prefixes."""
    return [
        {k: v for k, v in r.items() if k not in MEASURED and not k.startswith(without)}
        for r in read_metrics(out)
    ]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_state(one, other, *parts):
    """Two runs' checkpoints have equal tensors in these parts."""
    states = [state_of(out) for out in (one, other)]
    for part in parts:
        tensors = [leaves(state[part]) for state in states]
        assert tensors[0].keys() == tensors[1].keys()
        for name, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][name]), name


def leaves(value, name=""):
    if torch.is_tensor(value):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list | tuple) else ()  # fmt: skip
    return {k: v for key, item in items for k, v in leaves(item, f"{name}.{key}").items()}
