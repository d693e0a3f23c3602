"""Gradients of a batch that does not fit on the device at once (Gao et al. 2021, gradient caching).

A loss that couples all images of a batch cannot be summed over parts. So: features of all parts
first, without gradients; then the loss of the whole batch and its gradient at the features; then
each part again, with gradients, from there on. The gradients are those of the whole batch, except
that batch-norm normalises within a part.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import torch
from torch import nn

from ffcv_ssl.errors import UserError


def split_views(views, chunk_size):
    """A list of V (B, ...), of any B -> parts of it, lists of V, with at most chunk_size rows a
    view; 0: one part."""
    rows = max(len(view) for view in views)
    num_parts = -(-rows // chunk_size) if chunk_size else 1
    return list(zip(*[view.tensor_split(num_parts) for view in views]))


def check_parts(config, sides_px, world):
    """Raise UserError where a pass would show batch-norm a single row, of which there is no spread.

    config: the trainer's; sides_px: of each of its views. Views of one side share a pass.
    """
    if world.device.type == "cuda" and world.size > 1:
        return  # batch-norm sees the rows of all ranks
    own, labelled = config.own_batch_size // world.size, config.labelled_batch_size // world.size
    own, some = [(own, side) for side in sides_px], sides_px[: config.labelled.num_views]
    for views in (own, own + [(labelled, side) for side in some]):  # the second kind may end
        rows = max(number for number, _ in views)
        chunk_size = config.data.chunk_size
        num_parts = -(-rows // chunk_size) if chunk_size else 1
        together = Counter()
        for number, side in views:
            together[side] += number // max(1, num_parts)
        if 1 in together.values():
            what = f"data.chunk_size: got {chunk_size} for {rows} images a rank"
            if num_parts == 1:
                what = "data.batch_size, labelled: got 1 image a rank in one view of its size"
            raise UserError(f"{what}, but batch-norm needs two at once; give it more")


def backward_in_parts(forward, again, parts, loss_of, scale, no_sync=contextlib.nullcontext):
    """Leave the whole batch's gradients in the parameters.

    forward(part) -> list of dicts of features, called without gradients; again(part) -> the same
    with gradients, called within `no_sync()` for all parts but the last. loss_of(outputs) ->
    (loss, anything) of the joined outputs; scale(loss) is what backward starts from. Returns
    (outputs, loss, anything).
    """
    with torch.no_grad():
        outputs = _join([forward(part) for part in parts])
    loss, rest = loss_of(outputs)
    scale(loss).backward()
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        with contextlib.nullcontext() if is_last else no_sync():
            tensors, gradients = [], []
            for features, joined in zip(again(part), outputs):
                for name, tensor in features.items():
                    if joined[name].grad is not None and tensor.requires_grad:
                        tensors.append(tensor)
                        gradients.append(joined[name].grad.tensor_split(len(parts))[number])
            torch.autograd.backward(tensors, gradients)
    return outputs, loss, rest


def _join(outputs):
    """Outputs of all parts as those of one batch, ready to collect gradients."""
    return [
        {name: torch.cat([f[name] for f in view]).requires_grad_() for name in view[0]}
        for view in zip(*outputs)
    ]


@contextlib.contextmanager
def frozen_statistics(module):
    """Within it, batch-norm layers in training mode leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
