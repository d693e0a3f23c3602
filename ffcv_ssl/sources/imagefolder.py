"""Folders of image files: `root/split/class/*.jpg`, `root/class/*.jpg`, or images without classes.

Samples are in the order of the sorted paths, and labels number the sorted class folders, so both
are the same on every machine. Images stay encoded, so that the writer can keep the files' bytes.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage, IntField
from ffcv_ssl.files import StrPath
from ffcv_ssl.sources.base import Source
from ffcv_ssl.sources.disk import ListedFile, find_files, find_hard_links, folders_in, read_file

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
        image = EncodedImage(read_file(self.folder / self.names[index]))
        return (image,) if self.labels is None else (image, self.labels[index])


def open_imagefolder(root: StrPath, split: str | None = None) -> Source:
    """The images under `root/split`; without `split` under `root/train`, or else `root`.

    Every folder is a class, except `unlabelled` or `unlabeled`. Images in such a folder and images
    beside the class folders have label -1. Without class folders there is no label at all. Where
    `root/train` exists its classes number those of all splits, so that a class missing from another
    split shifts no label. Folders within a class belong to that class. Hidden files and files that
    are not images are skipped. Links to files and folders elsewhere are followed. A file or folder
    that links lead to twice is refused, and so is all that is no regular file. Each hard link is a
    sample, which `remarks` tells. Raises SourceError.
    """
    root = Path(root)
    folder = _split_folder(root, split)
    classes = _class_folders(folder)
    files = find_files(folder, _is_image)
    names = [file.name for file in files]
    if not names:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{folder}: no image files, expected some ending in {known}")
    made = {"source": "imagefolder", "split": folder.name if folder != root else None}
    remarks = [*_same_but_for_case(folder, classes), *_hard_links(folder, files)]
    if not classes:
        return Source(ImageFiles(folder, names), {}, made=made, names=names, remarks=remarks)
    class_names = _shared_class_names(root, folder, classes)
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = [_label(name, numbers) for name in names]
    dataset = ImageFiles(folder, names, labels)
    return Source(
        dataset, {"label": IntField()}, {"label": class_names}, made, names, remarks=remarks
    )


def _split_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise SourceError(f"--root: {root}: no such folder")
    if split is None:
        splits = [name for name in folders_in(root) if name.lower() in SPLITS]
        if splits and not (root / "train").is_dir():
            raise SourceError(
                f"--split: missing, expected one of {', '.join(splits)}; {root} has no train"
            )
        return root / "train" if (root / "train").is_dir() else root
    if not (root / split).is_dir():
        known = ", ".join(folders_in(root)[:5]) or "no folders"
        raise SourceError(f"--split: {root / split}: no such folder, {root} has {known}")
    return root / split


def _class_folders(folder: Path) -> list[str]:
    classes = [name for name in folders_in(folder) if name.lower() not in UNLABELLED_FOLDERS]
    for one, other in _same(classes, lambda name: unicodedata.normalize("NFC", name)):
        raise SourceError(
            f"{folder}: class folders {one!a} and {other!a} have the same name in two "
            "Unicode forms; join them into one"
        )
    return classes


def _same(names: list[str], form: Callable[[str], str]) -> list[tuple[str, str]]:
    """[(first name, later name)] of names whose form(name) is the same."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(form(name), name), name) for name in names]
    return [(one, other) for one, other in pairs if one != other]


def _same_but_for_case(folder: Path, classes: list[str]) -> list[str]:
    return [
        f"{folder}: classes {one!r} and {other!r} differ in case only"
        for one, other in _same(classes, str.casefold)[:1]
    ]


def _hard_links(folder: Path, files: list[ListedFile]) -> list[str]:
    again = find_hard_links(folder, files)
    if not again:
        return []
    return [
        f"{folder}: {len(again)} of {len(files)} images are hard links of images that have another "
        f"name here, such as {again[0][0]!r} and {again[0][1]!r}; each name is a sample"
    ]


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
