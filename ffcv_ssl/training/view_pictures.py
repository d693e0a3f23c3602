"""What a run's views look like now: `views.png` and `views.json` in its folder, the newest alone.

Guarantees: the pictures are those of the training's own draws, of its first images in the epoch
that is about to begin (after the last one: of the last). Nothing of the run depends on them: a
picture that cannot be made costs one line.
"""

# B images, V views, H W pixels

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffcv_ssl.errors import FfcvSslError
from ffcv_ssl.files import replacing, write_text
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.training.optimizers import resolution_at
from ffcv_ssl.training.run_data import RunData
from ffcv_ssl.training.run_folder import VIEWS_FILE, VIEWS_PICTURE, RunFolder, step_of_views
from ffcv_ssl.training.world import World
from ffcv_ssl.transforms import ToTensor

NUM_IMAGES = 8
MARGIN_PX = 2


class ViewPictures:
    """Writes them into a RunFolder, on the first rank, and shows them beside its metrics.

    config: the trainer's, of which data, resolution, epochs and seed count. ops: name of a view ->
    its ops; views: name -> View, with `crop` and `size_px(px)`. The loader with its thread is made
    at the first picture and kept.
    """

    def __init__(
        self,
        folder: RunFolder,
        dataset: RunData,
        config: Any,
        ops: Mapping[str, list],
        views: Mapping[str, Any],
        world: World,
    ) -> None:
        self.folder, self.dataset, self.config, self.world = folder, dataset, config, world
        self.ops, self.views = ops, views
        self.loader: Loader | None = None
        self.has_failed = False

    def write(self, step: int, epoch: int) -> None:
        """Write both files after so many steps and epochs, unless they are those of this step."""
        folder = self.folder.path
        if not self.world.is_first or self.has_failed or step_of_views(folder) == step:
            return
        drawn_in = min(epoch, self.config.epochs - 1)
        px, path = resolution_at(drawn_in, self.config.resolution), folder / VIEWS_PICTURE
        try:
            batch = self._draw(drawn_in, px)
            about = {"step": step, "epoch": epoch, "drawn_in_epoch": drawn_in, "resolution": px}
            picture = png_grid([np.asarray(getattr(batch, name)) for name in self.ops])
            with replacing(path) as file:
                file.write(picture)
            write_text(folder / VIEWS_FILE, json.dumps({**about, "samples": self._samples(batch)}))
            self.folder.show_picture("views", path, step)
        except (FfcvSslError, OSError) as error:
            self.has_failed = True
            reason = " ".join(str(error).split())
            self.world.say(f"{path}: not drawn ({reason}); the run goes on without it")

    def _draw(self, epoch: int, px: int) -> Any:
        """The batch of the first images in an epoch."""
        if self.loader is None:
            size, data = min(NUM_IMAGES, self.dataset.num_samples), self.config.data
            field = data.image_field
            pipelines: dict[str, Any] = dict.fromkeys(self.dataset.field_names)
            del pipelines[field]
            pipelines |= {name: (field, [*ops, ToTensor()]) for name, ops in self.ops.items()}
            self.loader = Loader(
                self.dataset.path, size, num_workers=1, os_cache=data.os_cache,
                order=OrderOption.SEQUENTIAL, seed=self.config.seed, indices=np.arange(size),
                pipelines=pipelines, batches_ahead=1, on_error=data.on_error, rank=0,
                world_size=1,
            )  # fmt: skip
        for name, view in self.views.items():
            if view.crop == "random":
                self.loader.set_resolution(view.size_px(px), name)
        self.loader.set_epoch(epoch)
        return next(iter(self.loader))

    def _samples(self, batch: Any) -> list[dict[str, Any]]:
        """[{"index", "views": {view: {op: {parameter: value}}}}] of a batch."""
        indices = np.asarray(batch.indices).tolist()
        return [
            {
                "index": index,
                "views": {n: drawn(batch.params[n][row], ops) for n, ops in self.ops.items()},
            }
            for row, index in enumerate(indices)
        ]

    def close(self) -> None:
        """End the loader's thread."""
        if self.loader is not None:
            self.loader.close()


def drawn(row: np.void, ops: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """{op's class: {parameter: value}} of one view; row: an element of `batch.params[view]`."""
    found, known = {}, row.dtype.names or ()
    for op in ops:
        values = {name: _plain(row[name]) for name, _ in op.columns if name in known}
        nested = [value for value in values.values() if isinstance(value, dict)]
        if values:
            found[type(op).__name__] = nested[0] if len(nested) == len(values) == 1 else values
    return found


def _plain(value: Any) -> Any:
    """A NumPy value as JSON has it; floats with the digits of float32."""
    if isinstance(value, np.void):
        return {name: _plain(value[name]) for name in value.dtype.names or ()}
    if isinstance(value, np.floating):
        return float(f"{float(value):.7g}")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def png_grid(views: Sequence[np.ndarray]) -> bytes:
    """A PNG with one row per image and one column per view. views: V of uint8 (B, H, W, 3); smaller
    ones lie in the middle of their cells."""
    from PIL import Image  # 50 ms, and not every command draws

    side = max(max(images.shape[1:3]) for images in views)
    number, cell = len(views[0]), side + MARGIN_PX
    grid = np.full((number * cell - MARGIN_PX, len(views) * cell - MARGIN_PX, 3), 255, np.uint8)
    for column, images in enumerate(views):
        height, width = images.shape[1:3]
        top, left = (side - height) // 2, column * cell + (side - width) // 2
        for row, image in enumerate(images):
            grid[row * cell + top :][:height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(grid).save(file, "PNG", compress_level=1)  # 3 times as fast, 10 % larger
    return file.getvalue()
