"""Where images come from: folders, torchvision's datasets, CLEVR's scenes, or generated shapes, all
as indexed datasets.

`open_source(name, ...)` returns a `Source`. A new kind of source is one module with a function
`open_<name>(root, split) -> Source`, and one entry in `FOLDERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import FloatField, IntField
from ffcv_ssl.files import StrPath
from ffcv_ssl.sources.base import Source, select
from ffcv_ssl.sources.clevr import open_clevr
from ffcv_ssl.sources.imagefolder import open_imagefolder
from ffcv_ssl.sources.shapes import CLASS_NAMES, Shapes, WithDistanceBin
from ffcv_ssl.sources.torchvision_datasets import EXAMPLES, find_class, open_torchvision

__all__ = ["Shapes", "Source", "SourceError", "open_source", "select"]

# Sources that need a folder and nothing else: name -> open(root, split).
FOLDERS: dict[str, Callable[[StrPath, str | None], Source]] = {
    "imagefolder": open_imagefolder,
    "clevr": open_clevr,
}
SHAPES_DEFAULTS = {"num_samples": 10000, "size_px": 64, "seed": 0}


def open_source(
    name: str,
    root: StrPath | None = None,
    split: str | None = None,
    download: bool = False,
    **shapes_settings: int | None,
) -> Source:
    """Open a source by name.

    name: `imagefolder`, `clevr`, `shapes`, or a torchvision dataset class in lower case. root: the
    folder of the images or of the dataset. split: None means `train`, or for a folder without
    splits the folder itself. download: let torchvision fetch the dataset. shapes_settings:
    num_samples, size_px and seed of generated shapes, None for the default. Raises SourceError,
    also for a setting that the source does not have.
    """
    given = {key: value for key, value in shapes_settings.items() if value is not None}
    if name == "shapes":
        _refuse(name, {"root": root is not None, "download": download})
        return open_shapes(split or "train", **given)
    if name not in FOLDERS and find_class(name) is None:
        raise SourceError(
            f"--source: unknown source {name!r}, expected shapes, {', '.join(FOLDERS)} or the "
            f"lower-case name of a torchvision dataset ({', '.join(EXAMPLES)}, ...)"
        )
    _refuse(name, dict.fromkeys(given, True))
    if name not in FOLDERS:
        return open_torchvision(name, root, split, download)
    _refuse(name, {"download": download})
    if root is None:
        raise SourceError("--root: missing, expected the folder of images")
    return FOLDERS[name](root, split)


def open_shapes(split: str, **settings: int) -> Source:
    """Generated shapes; see `Shapes` for the settings. Raises SourceError for impossible ones."""
    settings = SHAPES_DEFAULTS | settings
    try:
        dataset = WithDistanceBin(Shapes(split, **settings))
    except ValueError as error:
        raise SourceError(str(error)) from None
    return Source(
        dataset,
        {
            "label": IntField(),
            "count": IntField(),
            "distance": FloatField(),
            "distance_bin": IntField(),
        },
        {"label": list(CLASS_NAMES)},
        {"source": "shapes", "split": split, **settings},
        is_generated=True,
    )


def _refuse(name: str, is_given_by_option: dict[str, bool]) -> None:
    for option, is_given in is_given_by_option.items():
        if is_given:
            raise SourceError(f"--{option}: source {name!r} has no such setting")
