"""A uniformly random permutation an epoch, from the library's own generator (NumPy promises no
stable streams)."""

from ffcv_ssl.kernels.random import shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder


class Random(TraversalOrder):
    """Every sample once an epoch, every permutation equally likely. Reads all over the file: best
    when it is cached."""

    def sequence(self, reader, indices, seed, epoch):
        shuffled = indices.copy()
        shuffle_(derive_key(seed, "order", "random"), epoch, shuffled)
        return shuffled
