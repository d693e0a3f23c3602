"""A tiny pretrained encoder, generated images with one or several labels, and stop signals: what
tests of fine-tuning and transfer have in common."""

import functools

import numpy as np
import torch
from torch import nn

from ffcv_ssl import DatasetWriter
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.fields import IntField, NDArrayField, RGBImageField
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics
from ffcv_ssl.training.models import Model, make_mlp
from ffcv_ssl.training.world import World

NUM_CLASSES, PX = 4, 16
METADATA = {
    "model": "resnet18",
    "stem": "imagenet",
    "projector": "16-8",
    "projector_norm": "hidden",
}


class Coloured:
    """Noisy images of 16 x 16 whose colour tells their class; several classes may mix."""

    def __init__(self, labels):
        self.labels = labels  # (N,) classes, or (N, K) of 1, 0, -1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        colours = np.array([[90, 0, 0], [0, 90, 0], [0, 0, 90], [60, 60, 0]])
        label = self.labels[i]
        shown = (
            colours[label] if label.ndim == 0 else colours[np.flatnonzero(label == 1)].sum(axis=0)
        )
        image = 60 + shown + rng.normal(0, 20, (PX, PX, 3))
        return np.clip(image, 0, 255).astype(np.uint8), label if label.ndim else int(label)


def write_coloured(path, labels, class_names=None):
    """A `.beton` of `Coloured` images; labels: (N,) or (N, K)."""
    labels = np.asarray(labels)
    label_field = IntField() if labels.ndim == 1 else NDArrayField(np.int8, labels.shape[1:])
    labels = labels.astype(np.int64 if labels.ndim == 1 else np.int8)
    fields = {"image": RGBImageField(write_mode="raw"), "label": label_field}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Coloured(labels))
    return str(path)


@functools.cache  # nothing that trains changes it
def tiny_encoder():
    """An encoder of a thousand weights with a projector of two blocks, 8 -> 16 -> 8."""
    torch.manual_seed(0)
    model = Model(ModelConfig("resnet18", "imagenet", "16-8"))
    model.backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    model.projector = make_mlp("16-8", 8, "hidden")
    model.widths = {"backbone": 8, "projector_1": 16, "projector_2": 8}
    return Encoder("tiny.pt", "tiny", model.eval(), ModelConfig("resnet18", "imagenet", "16-8"))


def write_pretrained(path):
    """Weights of an untrained ResNet-18 with a projector, as a file that says what it is."""
    torch.manual_seed(0)
    checkpoint.save_weights(path, Model(ModelConfig("resnet18", "imagenet", "16-8")), METADATA)
    return str(path)


def parse(config_class, **settings):
    """A protocol's configuration; `a__b` stands for the key `a.b`."""
    settings = {
        "checkpoint": "tiny.pt", "precision": "fp32", "data.batch_size": 20, "data.num_workers": 1,
        "data.resolution_px": PX, "log.tensorboard": "false", "log.every_steps": 2,
        "system.torch_threads": 1,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return parse_config(config_class, arguments, "evaluate.py", "")[0]


def alone():
    """The world of one process."""
    return World()


class StopAfter:
    """A stop signal that arrives when it has been looked at so many times."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def asked(self):
        self.looks -= 1
        return self.looks < 0


def records(folder):
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]


def without_clock(record):
    """A result without when and where it was made."""
    kept = {k: v for k, v in record.items() if k not in ("time", "finetuned")}
    return {**kept, "settings": {**kept["settings"], "out": None}}
