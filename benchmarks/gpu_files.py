"""The images of the GPU proof: a small folder to carry to a machine without network, or drawn here.

    python -m benchmarks.gpu_files --imagenette imagenette2 --photographs photos --out gpu_data

--imagenette is a folder with train/<class>/* and val/<class>/*; --photographs any folder of images
(default: those of Imagenette). Writes train.beton, val.beton (longest side 144) and
photographs.beton (longest side 500), of at most --mib MiB together.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.photographs import MAX_SIDE_PX, QUALITY, Photographs
from ffcv_ssl import DatasetWriter, Reader
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.fields.image_codec import EncodedImage, encode_jpeg, shrink, to_rgb
from ffcv_ssl.sources import Shapes
from ffcv_ssl.sources.shapes import CLASS_NAMES
from ffcv_ssl.writer.writer import MIN_PAGE_SIZE

TRAIN, VAL, PHOTOGRAPHS = "train.beton", "val.beton", "photographs.beton"
SHARES = {TRAIN: 0.52, VAL: 0.09, PHOTOGRAPHS: 0.17}
"""Of the bytes; the rest is for the files' tables, which take up to a page of 2 MiB each."""
SMALL_PX, SMALL_QUALITY = 144, 80

Sample = tuple[EncodedImage, int]
"""A JPEG and its class."""


class Samples:
    """An indexed dataset of samples, `count` of them, in turn where there are fewer."""

    def __init__(self, samples: Sequence[Sample], count: int | None = None) -> None:
        self.samples, self.count = samples, len(samples) if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i % len(self.samples)]


def write_samples(path: Path, samples: Samples, class_names: Sequence[str]) -> None:
    """Write a `.beton` file with the very bytes of the samples."""
    fields = {"image": RGBImageField("passthrough"), "label": IntField()}
    names = {"label": list(class_names)}
    writer = DatasetWriter(str(path), fields, page_size=MIN_PAGE_SIZE, class_names=names)
    writer.from_indexed_dataset(samples)


def encoded(image: Image.Image, max_side_px: int, quality: int) -> EncodedImage:
    """A picture as a JPEG whose sides are at most max_side_px."""
    return EncodedImage(encode_jpeg(shrink(to_rgb(image), max_side_px), quality))


def within(images: Iterable[tuple[Image.Image, int]], px: int, quality: int, budget: float) -> list:
    """The first images as samples, as many as have `budget` bytes together."""
    samples: list[Sample] = []
    for image, label in images:
        sample = encoded(image, px, quality), label
        budget -= len(sample[0].data)
        if budget < 0:
            break
        samples.append(sample)
    return samples


def by_turns(root: Path) -> tuple[Iterable[tuple[Image.Image, int]], list[str]]:
    """(images of root/<class>/* with their classes, one of each class in turn; names of classes).
    Raises UserError."""
    classes = sorted(folder for folder in root.glob("*") if folder.is_dir())
    if not classes:
        raise UserError(f"{root}: got no folder of a class, expected {root}/<class>/*.jpg")
    rounds = itertools.zip_longest(*(sorted(folder.iterdir()) for folder in classes))
    pairs = ((path, label) for paths in rounds for label, path in enumerate(paths) if path)
    return ((Image.open(path), label) for path, label in pairs), [f.name for f in classes]


def write_folder(imagenette: Path, photographs: Path | None, out: Path, mib: float) -> None:
    """Write the three files. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    budget = {name: share * mib * 2**20 for name, share in SHARES.items()}
    for name in (TRAIN, VAL):
        images, names = by_turns(imagenette / name.removesuffix(".beton"))
        samples = within(images, SMALL_PX, SMALL_QUALITY, budget[name])
        write_samples(out / name, Samples(samples), names)
    try:
        paths = Photographs(str(photographs or imagenette / "train"), 10**6).paths
    except SystemExit as error:
        raise UserError(f"--photographs: {error.code}") from None
    step = max(1, len(paths) // 1000)  # of all folders, not of the first one
    pictures = ((Image.open(path), 0) for path in paths[::step])
    samples = within(pictures, MAX_SIDE_PX, QUALITY, budget[PHOTOGRAPHS])
    write_samples(out / PHOTOGRAPHS, Samples(samples), ["photograph"])


@dataclass(frozen=True)
class Files:
    """What the proof works on."""

    train: Path
    val: Path
    photographs: list[Sample]
    source: str
    """What they show, in words."""


def open_files(given: str | None, folder: Path, num_drawn: int, px: int, photo_px: int) -> Files:
    """The files of a folder that `write_folder` made, or images drawn here in `folder`.

    num_drawn: training images to draw; px, photo_px: their sides. Raises UserError.
    """
    if given is not None:
        paths = [Path(given) / name for name in (TRAIN, VAL, PHOTOGRAPHS)]
        for path in paths:
            if not path.is_file():
                raise UserError(f"DATA: {path}: no such file; write it with benchmarks.gpu_files")
        with Reader(str(paths[2])) as reader:
            payloads = [reader.read(i, "image") for i in range(reader.num_samples)]
        samples = [(EncodedImage(payload), 0) for payload in payloads]
        return Files(*paths[:2], samples, "a subset of Imagenette, and photographs")
    train, val = (
        draw(folder / name, split, count, px)
        for name, split, count in ((TRAIN, "train", num_drawn), (VAL, "val", num_drawn // 4))
    )
    drawn = Shapes("photographs", 32, photo_px)
    samples = [(encoded(drawn[i][0], MAX_SIDE_PX, QUALITY), 0) for i in range(len(drawn))]
    return Files(train, val, samples, "shapes drawn here (no DATA)")


def draw(path: Path, split: str, count: int, px: int) -> Path:
    """Write a file of raw images of shapes."""
    shapes = Shapes(split, count, px)
    fields = {"image": RGBImageField("raw"), "label": IntField()}
    writer = DatasetWriter(str(path), fields, class_names={"label": list(CLASS_NAMES)})
    writer.from_indexed_dataset(_Labelled(shapes))
    return path


class _Labelled:
    """Shapes with their class alone."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: int) -> tuple:
        return self.shapes[i][:2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--imagenette", type=Path, required=True)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu_data"))
    parser.add_argument("--mib", type=float, default=30)
    options = parser.parse_args(argv)
    try:
        write_folder(options.imagenette, options.photographs, options.out, options.mib)
    except (UserError, BetonError) as error:
        print(f"benchmarks.gpu_files: {one_line(error)}", file=sys.stderr)
        return 2
    for name in SHARES:
        with Reader(str(options.out / name)) as reader:
            size = (options.out / name).stat().st_size / 2**20
            print(f"{options.out / name}: {reader.num_samples} images, {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
