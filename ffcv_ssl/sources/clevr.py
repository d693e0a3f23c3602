"""CLEVR's rendered scenes as two tasks: how many objects, and how near the nearest one is.

Labels are those of VTAB (Zhai et al. 2020): `count` is the number of objects minus 3, 0 to 7;
`distance_bin` is the class of the depth of the object nearest to the camera, 0 to 5. Samples are in
the order of the scenes' file. Images stay encoded, as the files hold them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import EncodedImage, IntField
from ffcv_ssl.files import StrPath
from ffcv_ssl.sources.base import Source
from ffcv_ssl.sources.disk import read_file

FEWEST_OBJECTS, MOST_OBJECTS = 3, 10
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # in the units of the scenes' depths


class ClevrImages:
    """`dataset[i]` is (EncodedImage, count, distance_bin)."""

    def __init__(self, folder: Path, names: list[str], labels: list[tuple[int, int]]) -> None:
        self.folder, self.names, self.labels = folder, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[EncodedImage, int, int]:
        return EncodedImage(read_file(self.folder / self.names[index])), *self.labels[index]


def open_clevr(root: StrPath, split: str | None = None) -> Source:
    """The scenes of `train` (default) or `val` under `root`, the unpacked folder CLEVR_v1.0 or the
    one above it; the test split has no scenes. Raises SourceError."""
    split, root = split or "train", Path(root)
    if split not in ("train", "val"):
        raise SourceError(f"--split: got {split!r}, expected train or val, which have labels")
    if (root / "CLEVR_v1.0").is_dir():
        root = root / "CLEVR_v1.0"
    path = root / "scenes" / f"CLEVR_{split}_scenes.json"
    try:
        scenes = json.loads(read_file(path))["scenes"]
        names = [_checked_name(path, scene["image_filename"]) for scene in scenes]
        labels = [_labels(path, scene) for scene in scenes]
    except OSError as error:
        raise SourceError(
            f"--root: {path}: {error.strerror}; expected CLEVR_v1.0 with the folders images and "
            "scenes"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: got no scenes of CLEVR ({error!r}); fetch it anew") from None
    numbers = range(FEWEST_OBJECTS, MOST_OBJECTS + 1)
    return Source(
        ClevrImages(root / "images" / split, names, labels),
        {"count": IntField(), "distance_bin": IntField()},
        {"count": [f"{number} objects" for number in numbers]},
        {"source": "clevr", "split": split},
        names,
    )


def _checked_name(path: Path, name: str) -> str:
    """A scene's file name. A path could lead out of the folder of images."""
    if "/" in name or "\0" in name:
        raise SourceError(f"{path}: got image_filename {name!r}, expected a name without folders")
    return name


def _labels(path: Path, scene: dict[str, Any]) -> tuple[int, int]:
    """(count, distance_bin) of a scene. An object's place in the image is (x, y, depth)."""
    depths = [float(thing["pixel_coords"][2]) for thing in scene["objects"]]
    if not FEWEST_OBJECTS <= len(depths) <= MOST_OBJECTS:
        raise SourceError(
            f"{path}: got {len(depths)} objects in {scene['image_filename']}, expected "
            f"{FEWEST_OBJECTS} to {MOST_OBJECTS}"
        )
    # a depth on an edge belongs to the nearer class, as in VTAB
    nearest = int(np.searchsorted(DISTANCE_EDGES, min(depths), side="left"))
    return len(depths) - FEWEST_OBJECTS, nearest
