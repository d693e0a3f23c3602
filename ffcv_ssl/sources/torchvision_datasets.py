"""All of torchvision's image classification datasets, by their class names in lower case.

No dataset is treated specially: the parameters of its constructor say how a split is chosen and
whether there is a download.
"""

from __future__ import annotations

import inspect
import numbers
import os
from pathlib import Path
from typing import Any

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage, IntField
from ffcv_ssl.files import StrPath
from ffcv_ssl.sources.base import Source
from ffcv_ssl.sources.disk import find_files, find_hard_links, read_file

EXAMPLES = ("cifar10", "cifar100", "stl10", "svhn", "mnist", "food101", "flowers102", "eurosat")
# Names of the held-out split in datasets that only know train=True and train=False.
HELD_OUT = ("val", "valid", "validation", "test")


class PairDataset:
    """`dataset[i]` is torchvision's (image, label), the label as a plain int."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return image, int(label)


def find_class(name: str) -> type | None:
    """The torchvision dataset class with this name in lower case, or None."""
    from torchvision import datasets

    classes = {
        key.lower(): value
        for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset)
    }
    for generic in ("visiondataset", "datasetfolder", "imagefolder"):
        classes.pop(generic)
    return classes.get(name)


def open_torchvision(
    name: str, root: StrPath | None, split: str | None = None, download: bool = False
) -> Source:
    """The dataset `name` under `root`, which `download` fetches first.

    split: a name that the class knows; for classes with a parameter `train`, either `train` or one
    of `HELD_OUT`. None means `train`. Raises SourceError.
    """
    dataset = _make(name, find_class(name), root, split or "train", download)
    names = _keep_bytes(dataset)
    _check_sample(name, dataset)
    class_names = _class_names(dataset)
    made = {"source": name, "split": split or "train"}
    return Source(
        PairDataset(dataset),
        {"label": IntField()},
        {} if class_names is None else {"label": class_names},
        made,
        names,
    )


def _make(name: str, dataset_class: Any, root: StrPath | None, split: str, download: bool) -> Any:
    parameters = inspect.signature(dataset_class).parameters
    arguments: dict[str, Any] = {}
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
            raise SourceError(
                f"--split: got {split!r}, expected train or test ({', '.join(HELD_OUT)}) for {name}"
            )
        arguments["train"] = split == "train"
    elif split != "train":
        raise SourceError(f"--split: got {split!r}, expected none or train; {name} has no splits")
    return _call(name, dataset_class, arguments)


def _call(name: str, dataset_class: Any, arguments: dict[str, Any]) -> Any:
    try:
        return _with_checked_folder(dataset_class)(**arguments)
    except SourceError:
        raise
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())
        can_fetch = arguments.get("download") is False
        remedy = "; add --download to fetch it" if can_fetch and "ownload" in text else ""
        raise SourceError(f"{name}: {text}{remedy}") from error


def _check_sample(name: str, dataset: Any) -> None:
    if len(dataset) == 0:
        raise SourceError(f"{name}: got no samples, expected at least 1")
    sample = dataset[0]
    label = sample[1] if isinstance(sample, tuple) and len(sample) == 2 else None
    if not isinstance(label, numbers.Integral) and getattr(label, "ndim", None) != 0:
        raise SourceError(f"{name}: expected a dataset of (image, class label), got another kind")


def _keep_bytes(dataset: Any) -> list[str] | None:
    """Make a dataset that is a folder of files return encoded images, and return the files' names,
    relative and with `/`. Other datasets stay as they are: None."""
    from torchvision.datasets import DatasetFolder

    if not isinstance(dataset, DatasetFolder):
        return None
    dataset.loader = lambda path: EncodedImage(read_file(path))
    return [Path(os.path.relpath(path, dataset.root)).as_posix() for path, _ in dataset.samples]


def _with_checked_folder(dataset_class: Any) -> Any:
    """The class, but a folder of files is looked through for links before torchvision walks it: two
    links to a folder above would be 2^40 paths to it."""
    from torchvision.datasets import DatasetFolder

    if not issubclass(dataset_class, DatasetFolder):
        return dataset_class

    class Checked(dataset_class):
        def make_dataset(self, directory: StrPath, *args: Any, **kwargs: Any) -> Any:
            find_hard_links(Path(directory), find_files(Path(directory), _is_image, True))
            return super().make_dataset(directory, *args, **kwargs)

    return Checked


def _is_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return name.lower().endswith(IMG_EXTENSIONS)


def _class_names(dataset: Any) -> list[str] | None:
    """The dataset's class names, or None where it has none. ImageNet's are tuples of synonyms."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
