"""Draw the views that a recipe makes of a few images, with their drawn parameters.

    python -m pipelines simclr --beton train.beton --out views.png
    python -m pipelines byol --beton train.beton --out views.png --images 3 --samples 4 --size 96
    python -m pipelines simclr --beton train.beton --out views.png --view_0.blur_prob 1

The picture shows what training sees: the same loader, the same draws. The last line on stdout is
JSON. Exit codes: 0 drawn, 2 a user's mistake.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt, restricted_number_type

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.settings import Seed
from ffcv_ssl.config.stdout import has_told
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
Side = restricted_number_type("Side", int, [(">=", 0), ("<=", 65535)])


@dataclass(frozen=True)
class GridConfig(Views):
    """Which images and views to show, and how."""

    recipe: str = ""
    """Name of the recipe, e.g. simclr."""
    beton: str = ""
    """The dataset to take images from."""
    out: str = "views.png"
    """The picture to write."""
    images: PositiveInt = 4
    """Number of images, spread evenly over the file; one row per image."""
    samples: PositiveInt = 2
    """Number of draws of each view; one column per draw."""
    size: Side = 0  # type: ignore[valid-type]
    """Side of a global view in pixels; 0: the first image's short side, at most 224."""
    seed: Seed = 0
    """Seed of all draws; as in training, each epoch draws anew."""


def parse(argv: Sequence[str]) -> GridConfig:
    """The command line's settings. Raises UserError; exits for --help."""
    words, summary = _with_named_recipe(argv), str(__doc__).split("\n")[0]
    config, _ = parse_config(GridConfig, words, "python -m pipelines RECIPE", summary, _check)
    return config


def _with_named_recipe(argv: Sequence[str]) -> list[str]:
    """The command line with its only word without a key, the recipe, as `--recipe=NAME`."""
    words, recipes, is_value = [], [], False
    for word in argv:
        is_key = word.startswith("--") or word == "-h"
        if not is_key and not is_value:
            recipes.append(word)
            word = f"--recipe={word}"
        words.append(word)
        is_value = is_key and "=" not in word
    if len(recipes) > 1:
        raise UserError(f"recipe: got {' and '.join(recipes)}, expected one recipe")
    return words


def _check(config: GridConfig) -> None:
    if not config.beton:
        raise UserError("beton: got none, expected --beton FILE.beton")
    if not config.out or os.path.isdir(config.out):
        raise UserError(f"out: got {config.out!r}, expected a file to write, such as views.png")
    try:
        config.resolve()
    except ValueError as error:
        raise UserError(str(error).removeprefix("views.")) from None


def draw(config: GridConfig) -> dict[str, Any]:
    """Draw the picture that `config` asks for and return its summary, a dict for JSON."""
    resolved = config.resolve()
    with Reader(config.beton) as reader:
        field = _image_field(reader)
        count = min(config.images, reader.num_samples)
        indices = [k * reader.num_samples // count for k in range(count)]
        originals = [reader.decode(index, field) for index in indices]
    size_px = config.size or min(*originals[0].shape[:2], MAX_SIZE_PX)
    pipelines = {name: build(view, size_px) for name, view in resolved.items()}
    draws = _draws(config, pipelines, field, indices)
    op_classes = {name: [type(op) for op in ops] for name, ops in pipelines.items()}
    title = f"{config.recipe}, views of {size_px} px, seed {config.seed}: {config.beton}"
    draw_grid(originals, draws, op_classes, title, config.out)
    return {
        "out": config.out,
        "recipe": config.recipe,
        "size_px": size_px,
        "views": list(resolved),
        "images": indices,
        "samples": config.samples,
    }


def _image_field(reader: Reader) -> str:
    for name, field in reader.fields.items():
        if isinstance(field, RGBImageField):
            return name
    raise UserError(f"{reader.path}: no image field; the file has: {', '.join(reader.fields)}")


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
        summary = draw(parse(sys.argv[1:] if argv is None else argv))
    except OSError as error:
        print(f"pipelines: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ValueError as error:  # includes BetonError, and settings that contradict each other
        print(f"pipelines: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    is_told = has_told("pipelines", f"{summary['out']} is drawn", lambda: _show(summary))
    return 0 if is_told else EXIT_USER_ERROR


def _show(summary: dict[str, Any]) -> None:
    out = one_line(summary["out"])
    print(f"{out}: {len(summary['images'])} images, {len(summary['views'])} views")
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
