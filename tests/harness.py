"""Run image ops on arrays without a file: what the op tests have in common."""

import numpy as np

from ffcv_ssl.pipeline.plan import ViewPlan


def run_ops(ops, images, raw=None, seed=0, epoch=0, samples=None):
    """Views of `images` by `ops`: (uint8 (N, H, W, 3), raw draws (N, K), the plan).

    images: list of uint8 (H, W, 3). raw: parameters to use instead of drawing them.
    """
    count = len(images)
    shapes = {image.shape[:2] for image in images}
    plan = ViewPlan("view_0", "image", 0, ops, seed, shapes.pop() if len(shapes) == 1 else None)
    (segment,) = plan.segments
    heights = np.array([image.shape[0] for image in images])
    widths = np.array([image.shape[1] for image in images])
    samples = np.arange(count) if samples is None else samples
    if raw is None:
        raw = np.zeros((count, plan.num_columns))
        segment.draw(epoch, samples, np.zeros(count, np.int64), heights, widths, raw)
    pixels = np.concatenate([image.reshape(-1) for image in images])
    sizes = heights * widths * 3
    scratch_size = segment.work_floats + segment.scratch_floats((heights.max(), widths.max()))
    out = np.empty((count, *segment.shape, 3), np.uint8)
    scratch = np.full(scratch_size, np.nan, np.float32)
    ones = np.ones(count, np.int64)
    offsets = np.cumsum(sizes) - sizes
    segment.render(raw, pixels, offsets, heights, widths, ones, scratch, out)
    return out, raw, plan
