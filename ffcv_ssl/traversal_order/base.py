"""The contract of an order.

An order turns (indices, seed, epoch) into one global sequence of sample ids. The loader cuts that
sequence into global batches, so the *set* of samples of a batch depends on nothing else; `split`
only says which rank takes which part.
"""

from abc import ABC, abstractmethod

import numpy as np


class TraversalOrder(ABC):
    """Subclass it and hand an instance to `Loader(order=...)` for an order of your own."""

    @property
    def name(self):
        """What `state_dict` records: a resumed loader must have an order of the same name."""
        return type(self).__name__

    @abstractmethod
    def sequence(self, reader, indices, seed, epoch):
        """The epoch's sample ids, int64, in order; ids may repeat.

        reader: the open `Reader`. indices: int64, the samples that take part. Must depend on the
        arguments alone.
        """

    def split(self, reader, samples, world_size):
        """Positions in `samples` (one global batch) for each rank: `world_size` int64 arrays of
        sizes that differ by at most one, the larger ones first. Default: consecutive parts."""
        return np.array_split(np.arange(len(samples)), world_size)

    def replacements(self, sample):
        """Ids that may stand in for a bad sample, or None for any sample of the loader."""
        return None
