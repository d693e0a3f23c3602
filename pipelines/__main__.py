"""Draw the views that a recipe makes of a few images, with their drawn parameters.

    python -m pipelines simclr --beton train.beton --out views.png
    python -m pipelines byol --beton train.beton --out views.png --images 3 --samples 4 --size 96
    python -m pipelines simclr --beton train.beton --out views.png --view_0.blur_prob 1

The picture shows what training sees: the same loader, the same draws. The last line on stdout is
JSON. Exit codes: 0 drawn, 2 a user's mistake.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import RGBImageField
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.reader import Reader
from ffcv_ssl.training.command import EXIT_USER_ERROR
from ffcv_ssl.transforms import ImageOp
from pipelines.config import Views
from pipelines.picture import draw_grid
from pipelines.view import build

MAX_SIZE_PX = 224


@dataclass(frozen=True)
class GridConfig:
    """Which images to show, and how."""

    beton: str
    """The dataset to take images from."""
    out: str = "views.png"
    """The picture to write."""
    images: int = 4
    """Number of images, spread evenly over the file; one row per image."""
    samples: int = 2
    """Number of draws of each view; one column per draw."""
    size: int = 0
    """Side of a global view in pixels; 0: the first image's short side, at most 224."""
    seed: int = 0
    """Seed of all draws; as in training, each epoch draws anew."""

    def __post_init__(self) -> None:
        for key, low in (("images", 1), ("samples", 1), ("size", 0)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected at least {low}")


def parse(argv: Sequence[str]) -> tuple[GridConfig, Views]:
    """Command line -> (GridConfig, Views). Raises UserError; exits for --help."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    with contextlib.suppress(ImportError):  # docstring-parser (optional) adds the texts of --help
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m pipelines", description="Draw a recipe's views.", exit_on_error=False
    )
    parser.add_argument("recipe", help="name of the recipe, e.g. simclr")
    parser.add_class_arguments(GridConfig, as_group=False)
    parser.add_class_arguments(Views, skip={"recipe"}, as_group=False)
    try:
        values = vars(parser.parse_args(argv))
        grid = {key: values.pop(key) for key in GridConfig.__dataclass_fields__}
        return GridConfig(**grid), Views(**values)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from None


def draw(config: GridConfig, views: Views) -> dict[str, Any]:
    """Draw the picture that `config` asks for and return its summary, a dict for JSON."""
    resolved = views.resolve()
    with Reader(config.beton) as reader:
        field = _image_field(reader)
        count = min(config.images, reader.num_samples)
        indices = [k * reader.num_samples // count for k in range(count)]
        originals = [reader.decode(index, field) for index in indices]
    size_px = config.size or min(*originals[0].shape[:2], MAX_SIZE_PX)
    pipelines = {name: build(view, size_px) for name, view in resolved.items()}
    draws = _draws(config, pipelines, field, indices)
    op_classes = {name: [type(op) for op in ops] for name, ops in pipelines.items()}
    title = f"{views.recipe}, views of {size_px} px, seed {config.seed}: {config.beton}"
    draw_grid(originals, draws, op_classes, title, config.out)
    return {
        "out": config.out,
        "recipe": views.recipe,
        "size_px": size_px,
        "views": list(resolved),
        "images": indices,
        "samples": config.samples,
    }


def _image_field(reader: Reader) -> str:
    for name, field in reader.fields.items():
        if isinstance(field, RGBImageField):
            return name
    raise UserError(f"{reader.path}: no image field, it has {', '.join(reader.fields)}")


def _draws(
    config: GridConfig, pipelines: dict[str, list[ImageOp]], field: str, indices: list[int]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The grid's columns (view name, images, parameters): all draws of view_0, then view_1...

    Each draw is one epoch, because the loader draws once per image and epoch.
    """
    columns: dict[str, list] = {name: [] for name in pipelines}
    with Loader(
        config.beton,
        len(indices),
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        seed=config.seed,
        indices=indices,
        pipelines={name: (field, ops) for name, ops in pipelines.items()},
        drop_last=False,
    ) as loader:
        for _ in range(config.samples):
            for batch in loader:
                for name in pipelines:
                    images = np.array(getattr(batch, name))  # a copy: slots are reused
                    columns[name].append((name, images, batch.params[name].copy()))
    return [column for name in pipelines for column in columns[name]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        summary = draw(*parse(sys.argv[1:] if argv is None else argv))
    except OSError as error:
        print(f"pipelines: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ValueError as error:  # includes BetonError, and settings that contradict each other
        print(f"pipelines: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{summary['out']}: {len(summary['images'])} images, {len(summary['views'])} views")
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
