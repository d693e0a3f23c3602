"""Gradients of a batch that does not fit on the device at once (Gao et al. 2021, gradient caching).

A loss that couples all images of a batch cannot be summed over parts. So: features of all parts
first, without gradients; then the loss of the whole batch and its gradient at the features; then
each part again, with gradients, from there on. The gradients are those of the whole batch, except
that batch-norm normalises within a part.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.data_parallel import is_batchnorm_synced
from ffcv_ssl.training.world import World

Outputs = list[dict[str, torch.Tensor]]
"""Features by name, of each view."""


def split_views(views: Sequence[torch.Tensor], chunk_size: int) -> list[tuple[torch.Tensor, ...]]:
    """V views (B, ...), whose B may differ -> parts of the batch: V tensors each, of at most
    chunk_size rows. chunk_size 0: one part."""
    rows = max(len(view) for view in views)
    num_parts = -(-rows // chunk_size) if chunk_size else 1
    return list(zip(*[view.tensor_split(num_parts) for view in views]))


def check_parts(config: Any, sides_px: Sequence[int], world: World) -> None:
    """Raise UserError where batch-norm would see a single row in a pass, which has no spread.

    config: the trainer's; sides_px: the side of each of its views. Views of one side share a pass.
    """
    if is_batchnorm_synced(config.system.sync_batchnorm, world):
        return  # batch-norm sees the rows of all ranks
    rows, labelled_rows = (
        size // world.size for size in (config.unlabelled_batch_size, config.labelled_batch_size)
    )
    unlabelled = [(rows, side) for side in sides_px]
    labelled = [(labelled_rows, side) for side in sides_px[: config.labelled.num_views]]
    for views in (unlabelled, unlabelled + labelled):  # the labelled stream may end
        most_rows = max(number for number, _ in views)
        chunk_size = config.data.chunk_size
        num_parts = -(-most_rows // chunk_size) if chunk_size else 1
        rows_by_side: Counter = Counter()
        for number, side in views:
            rows_by_side[side] += number // max(1, num_parts)
        if 1 not in rows_by_side.values():
            continue
        if num_parts == 1:
            raise UserError(
                "data.batch_size or labelled.classes_per_batch: got 1 image per rank in a forward "
                "pass, expected at least 2 for batch-norm; give larger batches"
            )
        raise UserError(
            f"data.chunk_size: got {chunk_size} for {most_rows} images per rank, which leaves 1 "
            "image in a forward pass, expected at least 2 for batch-norm; give a larger one"
        )


def join_parts(outputs: Sequence[Outputs]) -> Outputs:
    """The outputs of all parts, computed without gradients, as those of one batch: leaves of the
    loss' graph, so that its backward pass leaves their gradients in them."""
    return [
        {name: torch.cat([f[name] for f in view]).requires_grad_() for name in view[0]}
        for view in zip(*outputs)
    ]


def backward_part(outputs: Outputs, joined: Outputs, number: int, num_parts: int) -> None:
    """Add to the parameters' gradients what part `number` contributes.

    outputs: of that part, computed with gradients; joined: of `join_parts`, after the backward pass
    of the loss.
    """
    tensors, gradients = [], []
    for features, whole in zip(outputs, joined):
        for name, tensor in features.items():
            gradient = whole[name].grad
            if gradient is not None and tensor.requires_grad:
                tensors.append(tensor)
                gradients.append(gradient.tensor_split(num_parts)[number])
    torch.autograd.backward(tensors, gradients)


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch-norm layers in training mode update copies of their running statistics.

    Without running statistics (`track_running_stats = False`), synchronised batch-norm on CUDA
    expects the numbers of rows in the input's dtype, and fails in bf16 and fp16.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept):
        norm._buffers.update({n: None if b is None else b.clone() for n, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)
