"""NVIDIA DALI on the CPU: one decode, two views, each op applied to the part of the batch that drew
it.

Needs the package nvidia-dali-cuda130 (it runs without a GPU); left out where that is not installed.
"""

import importlib.util
import math

import numpy as np

from benchmarks import recipe as r


def make_pipeline(column, files, threads, is_fused):
    """DALI rewrites the function below: its `if`s split a batch by the drawn conditions. is_fused:
    each view decodes only its own crop, instead of one decode for both."""
    from nvidia.dali import fn, pipeline_def, types

    with_blur, with_grey = r.has(column, "+ blur"), r.has(column, "+ grey")
    with_solarize, with_jitter = r.has(column, "+ solarize"), r.has(column, "+ jitter")
    settings = {"batch_size": r.BATCH_SIZE, "num_threads": threads, "device_id": None}

    @pipeline_def(enable_conditionals=True, **settings)
    def two_views():
        encoded, _ = fn.readers.file(
            files=files, random_shuffle=True, name="files", pad_last_batch=True
        )
        decode = {"device": "cpu", "output_type": types.RGB}
        box = {"random_area": r.SCALE, "random_aspect_ratio": r.RATIO}
        image = None if is_fused else fn.decoders.image(encoded, **decode)
        views = []
        for _ in range(r.NUM_VIEWS):
            if is_fused:
                crop = fn.decoders.image_random_crop(encoded, **decode, **box)
                view = fn.resize(crop, size=(r.SIZE_PX, r.SIZE_PX), antialias=True)
            else:
                view = fn.random_resized_crop(image, size=r.SIZE_PX, antialias=True, **box)
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
    name, is_fused = "DALI (CPU)", False
    columns = r.COLUMNS if importlib.util.find_spec("nvidia.dali") else ()

    def setup(self, files, column, threads):
        self.num_images = len(files.payloads)
        self.pipeline = make_pipeline(column, files.as_jpegs(), threads, self.is_fused)
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


class DaliFused(Dali):
    name, is_fused = "DALI (CPU), a decode for each crop", True
