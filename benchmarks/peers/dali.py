"""NVIDIA DALI on the CPU: one decode, two views, each op applied to the part of the batch that drew
it.

Needs the package nvidia-dali-cuda130 (it runs without a GPU); left out where that is not installed.
"""

import importlib.util
import math

import numpy as np

from benchmarks import recipe as r


def make_pipeline(column, files, threads):
    """DALI rewrites the function below: its `if`s split a batch by the drawn conditions."""
    from nvidia.dali import fn, pipeline_def, types

    with_blur, with_grey = r.has(column, "+ blur"), r.has(column, "+ grey")
    with_solarize, with_jitter = r.has(column, "+ solarize"), r.has(column, "+ jitter")
    settings = {"batch_size": r.BATCH_SIZE, "num_threads": threads, "device_id": None}

    @pipeline_def(enable_conditionals=True, **settings)
    def two_views():
        encoded, _ = fn.readers.file(
            files=files, random_shuffle=True, name="files", pad_last_batch=True
        )
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        views = []
        for _ in range(r.NUM_VIEWS):
            view = fn.random_resized_crop(
                image,
                size=r.SIZE_PX,
                random_area=r.SCALE,
                random_aspect_ratio=r.RATIO,
                antialias=True,
            )
            view = fn.flip(view, horizontal=fn.random.coin_flip(probability=r.FLIP))
            if with_jitter and fn.random.coin_flip(probability=r.JITTER, dtype=types.BOOL):
                view = fn.color_twist(
                    view,
                    brightness=fn.random.uniform(range=(1 - r.BRIGHTNESS, 1 + r.BRIGHTNESS)),
                    contrast=fn.random.uniform(range=(1 - r.CONTRAST, 1 + r.CONTRAST)),
                    saturation=fn.random.uniform(range=(1 - r.SATURATION, 1 + r.SATURATION)),
                    hue=fn.random.uniform(range=(-360 * r.HUE, 360 * r.HUE)),
                )
            if with_grey and fn.random.coin_flip(probability=r.GREY, dtype=types.BOOL):
                view = fn.hsv(view, saturation=0.0)
            if with_blur and fn.random.coin_flip(probability=r.BLUR, dtype=types.BOOL):
                sigma = fn.random.uniform(range=r.SIGMA)
                view = fn.gaussian_blur(view, window_size=r.TAPS, sigma=sigma)
            if with_solarize and fn.random.coin_flip(probability=r.SOLARIZE, dtype=types.BOOL):
                bright = fn.cast(view >= r.THRESHOLD, dtype=types.UINT8)
                view = bright * (255 - view) + (1 - bright) * view
                view = fn.cast(view, dtype=types.UINT8)
            views.append(view)
        return tuple(views)

    return two_views()


class Dali:
    name = "DALI (CPU)"
    columns = r.COLUMNS if importlib.util.find_spec("nvidia.dali") else ()

    def setup(self, files, column, threads):
        self.num_images = len(files.payloads)
        self.pipeline = make_pipeline(column, files.as_jpegs(), threads)
        self.pipeline.build()
        self.num_batches = math.ceil(self.num_images / r.BATCH_SIZE)

    def run(self):
        for _ in range(self.num_batches):
            self.pipeline.run()
        return self.num_batches * r.BATCH_SIZE  # the last batch is filled up with repeats

    def sample(self):
        return np.concatenate([self.pipeline.run()[0].as_array() for _ in range(4)])

    def close(self):
        del self.pipeline
