"""Folders of image files: `root/split/class/*.jpg`, `root/class/*.jpg`, or images without classes.

Samples are in the order of the sorted paths, and labels number the sorted class folders, so both
are the same on every machine. Images stay encoded, so that the writer can keep the files' bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage, IntField
from ffcv_ssl.files import StrPath
from ffcv_ssl.sources.base import Source

IMAGE_SUFFIXES = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
UNLABELLED = -1
# Names of folders that are splits and not classes, even where the user names no split.
SPLITS = ("val", "valid", "validation", "test")


class ImageFiles:
    """`dataset[i]` is (EncodedImage,), or (EncodedImage, label) where there are labels."""

    def __init__(self, folder: Path, names: list[str], labels: list[int] | None = None) -> None:
        self.folder, self.names, self.labels = folder, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[EncodedImage] | tuple[EncodedImage, int]:
        image = EncodedImage((self.folder / self.names[index]).read_bytes())
        return (image,) if self.labels is None else (image, self.labels[index])


def open_imagefolder(root: StrPath, split: str | None = None) -> Source:
    """The images under `root/split`; without `split` under `root/train`, or else `root`.

    Every folder is a class, except `unlabelled` or `unlabeled`. Images in such a folder and images
    beside the class folders have label -1. Without class folders there is no label at all. Where
    `root/train` exists its classes number those of all splits, so that a class missing from another
    split shifts no label. Folders within a class belong to that class. Hidden files and files that
    are not images are skipped. Raises SourceError.
    """
    root = Path(root)
    folder = _split_folder(root, split)
    classes = _class_folders(folder)
    names = _image_names(folder)
    if not names:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{folder}: no image files, expected some ending in {known}")
    made = {"source": "imagefolder", "split": folder.name if folder != root else None}
    if not classes:
        return Source(ImageFiles(folder, names), {}, made=made, names=names)
    class_names = _shared_class_names(root, folder, classes)
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = [_label(name, numbers) for name in names]
    dataset = ImageFiles(folder, names, labels)
    return Source(dataset, {"label": IntField()}, {"label": class_names}, made, names)


def _split_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise SourceError(f"--root: {root}: no such folder")
    if split is None:
        splits = [name for name in _folders(root) if name.lower() in SPLITS]
        if splits and not (root / "train").is_dir():
            raise SourceError(
                f"--split: missing, expected one of {', '.join(splits)}; {root} has no train"
            )
        return root / "train" if (root / "train").is_dir() else root
    if not (root / split).is_dir():
        found = ", ".join(_folders(root)[:5]) or "no folders"
        raise SourceError(f"--split: {root / split}: no such folder, {root} has {found}")
    return root / split


def _folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _class_folders(folder: Path) -> list[str]:
    return [name for name in _folders(folder) if name.lower() not in UNLABELLED_FOLDERS]


def _image_names(folder: Path) -> list[str]:
    """All image files under `folder`: paths relative to it, with `/`, sorted by their parts."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(folder)
        found += [relative / name for name in files if _is_image(name)]
    return [path.as_posix() for path in sorted(found, key=lambda path: path.parts)]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _shared_class_names(root: Path, folder: Path, classes: list[str]) -> list[str]:
    train = root / "train"
    if folder in (root, train) or not train.is_dir():
        return classes
    shared = _class_folders(train)
    unknown = [name for name in classes if name not in shared]
    if unknown:
        raise SourceError(
            f"{folder}: got class {unknown[0]!r}, expected one of the {len(shared)} classes of "
            f"{train}, so that the labels of both agree"
        )
    return shared


def _label(name: str, numbers: dict[str, int]) -> int:
    first, separator, _ = name.partition("/")
    return numbers.get(first, UNLABELLED) if separator else UNLABELLED
