"""What a loader yields: a named tuple of the pipelines' outputs, with the samples' ids and drawn
parameters."""

import keyword
from collections import namedtuple

_OWN = ("indices", "valid", "replaced", "params")


def make_batch_type(names):
    """A tuple class with these field names (not identifiers: reachable by position only).

    Instances also have: indices, int64 tensor (B,), the samples' ids; valid, bool (B,), False for
    padding; replaced, bool (B,), True where another sample stands in for a bad one; params, dict:
    view -> structured array (B,).
    """
    clash = [name for name in names if name in _OWN]
    if clash:
        raise ValueError(
            f"a pipeline cannot be called '{clash[0]}': batches have an attribute of that name"
        )
    bad = [n for n in names if not n.isidentifier() or keyword.iskeyword(n) or n.startswith("_")]
    base = namedtuple("Batch", names, rename=bool(bad))

    class Batch(base):
        __doc__ = make_batch_type.__doc__

        def __repr__(self):
            parts = []
            for name, value in zip(self._fields, self):
                parts.append(f"{name}: {tuple(value.shape)} {value.dtype}")
            return f"Batch({', '.join(parts)})"

        def __reduce__(self):
            return tuple, (tuple(self),)

    return Batch
