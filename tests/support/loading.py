"""What the loader tests have in common: pipelines with every op, and pixel hashes by sample."""

import hashlib

from ffcv_ssl import Loader, OrderOption
from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.transforms import (
    GaussianBlur,
    GaussianNoise,
    RandomColorJitter,
    RandomEqualize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarization,
    Squeeze,
    ToTensor,
    ToTorchImage,
)


def view(size=24, **crop):
    """All random ops, with probabilities that let each take part."""
    return [
        RandomResizedCrop(size, **crop),
        RandomHorizontalFlip(),
        RandomColorJitter(0.8, 0.4, 0.4, 0.2, 0.1),
        RandomGrayscale(0.2),
        GaussianBlur(0.5, 5),
        RandomSolarization(0.3),
        RandomEqualize(0.2),
        GaussianNoise(0.05, 0.5),
        ToTensor(),
        ToTorchImage(),
    ]


def two_views(size=24):
    return {
        "view_0": ("image", view(size)),
        "view_1": ("image", view(size)),
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }


def make_loader(path, batch_size=16, **arguments):
    defaults = {"num_workers": 2, "order": OrderOption.RANDOM, "seed": 5, "pipelines": two_views()}
    return Loader(path, batch_size, **{**defaults, **arguments})


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def samples_of(batches):
    """[(id, label, digest of view_0, digest of view_1)] of all valid samples, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch.indices)):
            if batch.valid[row]:
                views = digest(batch.view_0[row]), digest(batch.view_1[row])
                found.append((int(batch.indices[row]), int(batch.label[row]), *views))
    return found


def epoch_of(path, **arguments):
    """`samples_of` one epoch, drop_last=False."""
    with make_loader(path, drop_last=False, **arguments) as loader:
        return samples_of(loader)
