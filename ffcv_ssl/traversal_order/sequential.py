"""Samples in the order of `indices`, the same every epoch."""

from ffcv_ssl.traversal_order.base import TraversalOrder


class Sequential(TraversalOrder):
    """File order, or the order of the `indices` given to the loader."""

    def sequence(self, reader, indices, seed, epoch):
        return indices.copy()
