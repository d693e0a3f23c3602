"""Torchvision's image classification datasets, any of them by its class name in lower case.

Nothing here knows a single dataset: the constructor's parameters say how a split is chosen and
whether there is a download.
"""

from __future__ import annotations

import inspect
import numbers
import os
from pathlib import Path

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage, IntField
from ffcv_ssl.sources.base import Source

EXAMPLES = ("cifar10", "cifar100", "stl10", "svhn", "mnist", "food101", "flowers102", "eurosat")
# Names of the held-out split in datasets that only know train=True and train=False.
HELD_OUT = ("val", "valid", "validation", "test")


class PairDataset:
    """`dataset[i]` is (image, label): what torchvision gives, the label as a plain int."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image, int(label)


def find_class(name):
    """Torchvision's dataset class of that name in lower case, or None."""
    from torchvision import datasets

    classes = {
        key.lower(): value
        for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset)
    }
    for generic in ("visiondataset", "datasetfolder", "imagefolder"):
        classes.pop(generic)
    return classes.get(name)


def open_torchvision(name, root, split=None, download=False):
    """The dataset `name` under `root`; fetched there first if `download`.

    split: as the class calls it, or for classes that only know train or not, `train` or one of
    `HELD_OUT`; None: `train`. Raises SourceError.
    """
    dataset_class = find_class(name)
    dataset = _make(name, dataset_class, root, split or "train", download)
    _check_sample(name, dataset)
    names = _keep_bytes(dataset)
    class_names = _class_names(dataset)
    made = {"source": name, "split": split or "train"}
    return Source(
        PairDataset(dataset),
        {"label": IntField()},
        {} if class_names is None else {"label": class_names},
        made,
        names,
    )


def _make(name, dataset_class, root, split, download):
    parameters = inspect.signature(dataset_class).parameters
    arguments = {}
    if "root" in parameters:
        if root is None:
            raise SourceError(f"--root: missing, expected the folder that {name} lies in")
        arguments["root"] = str(root)
    if "download" in parameters:
        arguments["download"] = download
    elif download:
        raise SourceError(f"--download: torchvision offers no download of {name}; fetch it by hand")
    if "split" in parameters:
        arguments["split"] = split
    elif "train" in parameters:
        if split != "train" and split not in HELD_OUT:
            known = ", ".join(HELD_OUT)
            raise SourceError(f"--split: got {split!r}, {name} has train and test ({known})")
        arguments["train"] = split == "train"
    elif split != "train":
        raise SourceError(f"--split: got {split!r}, {name} has no splits")
    return _call(name, dataset_class, arguments)


def _call(name, dataset_class, arguments):
    try:
        return dataset_class(**arguments)
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())
        can_fetch = arguments.get("download") is False
        remedy = "; add --download to fetch it" if can_fetch and "ownload" in text else ""
        raise SourceError(f"{name}: {text}{remedy}") from error


def _check_sample(name, dataset):
    if len(dataset) == 0:
        raise SourceError(f"{name}: no samples")
    sample = dataset[0]
    label = sample[1] if isinstance(sample, tuple) and len(sample) == 2 else None
    if not isinstance(label, numbers.Integral) and getattr(label, "ndim", None) != 0:
        raise SourceError(
            f"{name}: not a dataset of (image, class label), the only kind that is written"
        )


def _keep_bytes(dataset):
    """Datasets that are folders of files hand on the files' bytes instead of decoded images;
    returns the files' names, relative and with `/`, or None for other datasets."""
    from torchvision.datasets import DatasetFolder

    if not isinstance(dataset, DatasetFolder):
        return None
    dataset.loader = lambda path: EncodedImage(Path(path).read_bytes())
    return [Path(os.path.relpath(path, dataset.root)).as_posix() for path, _ in dataset.samples]


def _class_names(dataset):
    """The dataset's own class names, or None where it has none. ImageNet's are tuples of
    synonyms."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
