"""Draw the views that a recipe makes of a few images, with their drawn parameters.

    ffcv-ssl views simclr --beton train.beton --out views.png
    ffcv-ssl views --config simclr --data.train train.beton --views.view_1.blur_prob 0.5
    python -m pipelines simclr --beton train.beton --out views.png
    python -m pipelines byol --beton train.beton --out views.png --images 3 --samples 4 --size 96
    python -m pipelines simclr --beton train.beton --out views.png --view_0.blur_prob 1

The picture shows what training sees: the same loader, the same draws. `--config` takes what
train.py takes, and the words that train.py takes may follow it; views are then drawn at
`resolution.max`, with the configuration's seed, from its training file unless `--beton` names
another. The last line on stdout is JSON. Exit codes: 0 drawn, 2 a user's mistake.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jsonargparse.typing import PositiveInt, restricted_number_type

from ffcv_ssl.config.app_files import load_script
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsing import parse_config, read_words
from ffcv_ssl.config.settings import Seed
from ffcv_ssl.config.stdout import has_told
from ffcv_ssl.config.yaml_layers import read_layers
from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import RGBImageField
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.reader import Reader
from ffcv_ssl.training.command import EXIT_USER_ERROR
from ffcv_ssl.transforms import ImageOp
from pipelines.config import Views
from pipelines.picture import draw_grid
from pipelines.view import View, build

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


class Drawing(NamedTuple):
    """What to draw: the settings of the picture, and the views by name."""

    grid: GridConfig
    views: dict[str, View]
    of: str
    """What makes the views: a recipe or a configuration."""
    image_field: str | None = None
    """None: the file's first field of images."""


OWN_KEYS = ("--beton", "--out", "--images", "--samples", "--size")
"""Of the picture; beside a configuration, all other words are the configuration's."""


def read(argv: Sequence[str]) -> Drawing:
    """What a command line asks for. Raises UserError; exits for --help."""
    if _is_training(argv):
        return _of_training(argv)
    config = parse(argv)
    return Drawing(config, config.resolve(), config.recipe)


def parse(argv: Sequence[str]) -> GridConfig:
    """The settings of a command line that names a recipe. Raises UserError; exits for --help."""
    return _parse(_with_named_recipe(argv))


def _parse(words: Sequence[str]) -> GridConfig:
    summary = str(__doc__).split("\n")[0]
    config, _ = parse_config(GridConfig, words, "python -m pipelines RECIPE", summary, _check)
    return config


def _is_training(argv: Sequence[str]) -> bool:
    """Whether `--config` names a configuration of train.py, and not of the picture."""
    files = [text or "" for key, text in read_words(argv) if key == "--config"]
    if "--help" in argv or "-h" in argv:
        return False
    try:
        keys = {key for path in files for _, own in read_layers(path) for key in own}
    except ValueError:  # which reading it for the picture says
        return False
    grid = {field.name for field in fields(GridConfig)}
    return bool(keys - grid) and not keys & (grid - {"out", "seed"})


def _of_training(argv: Sequence[str]) -> Drawing:
    """The views that train.py would train on, from a command line with `--config`."""
    own: list[str] = []
    rest: list[str] = []
    for key, text in read_words(argv):
        if not key.startswith("--"):
            raise UserError(f"recipe: got {key} and --config, expected one of them")
        words = own if key in OWN_KEYS else rest
        words.append(key if text is None else f"{key}={text}")
    config = load_script("train").read_config(rest)
    given = [f"--recipe={config.views.recipe}", f"--size={config.resolution.max}"]
    given += [f"--seed={config.seed}", f"--beton={config.data.train}"]
    (*_, name) = [text for key, text in read_words(argv) if key == "--config"]
    views, field = config.views.resolve(), config.data.image_field
    return Drawing(_parse([*given, *own]), views, str(name), field)


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


def draw(drawing: Drawing) -> dict[str, Any]:
    """Draw the picture and return its summary, a dict for JSON."""
    config, resolved = drawing.grid, drawing.views
    with Reader(config.beton) as reader:
        field = drawing.image_field or _image_field(reader)
        count = min(config.images, reader.num_samples)
        indices = [k * reader.num_samples // count for k in range(count)]
        originals = [reader.decode(index, field) for index in indices]
    size_px = config.size or min(*originals[0].shape[:2], MAX_SIZE_PX)
    pipelines = {name: build(view, size_px) for name, view in resolved.items()}
    draws = _draws(config, pipelines, field, indices)
    op_classes = {name: [type(op) for op in ops] for name, ops in pipelines.items()}
    title = f"{drawing.of}, views of {size_px} px, seed {config.seed}: {config.beton}"
    draw_grid(originals, draws, op_classes, title, config.out)
    return {
        "out": config.out,
        "recipe": config.recipe,
        "of": drawing.of,
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
        summary = draw(read(sys.argv[1:] if argv is None else argv))
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
