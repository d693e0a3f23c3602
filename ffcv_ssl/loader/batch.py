"""The batch that a loader yields: a named tuple of the pipelines' outputs, with the sample ids and
the drawn parameters."""

from __future__ import annotations

import functools
import keyword
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

_ATTRIBUTES = ("indices", "valid", "replaced", "params")


def make_batch_type(names: Sequence[str]) -> Any:
    """A tuple class with these field names (names that are no identifiers: by position only).

    Instances also have: indices, int64 tensor (B,), the sample ids; valid, bool (B,), False for
    padding; replaced, bool (B,), True where another sample replaces a bad one; params, dict:
    view -> structured array (B,).
    """
    return _make_batch_type(tuple(names))


@functools.lru_cache(maxsize=64)  # a batch that is unpickled has the loader's own type
def _make_batch_type(names: tuple[str, ...]) -> Any:
    clash = [name for name in names if name in _ATTRIBUTES]
    if clash:
        raise ValueError(
            f"Loader: pipelines: a pipeline cannot have the name '{clash[0]}', as batches have an "
            "attribute of that name; choose another name"
        )
    bad = [n for n in names if not n.isidentifier() or keyword.iskeyword(n) or n.startswith("_")]
    make: Any = namedtuple  # Any: a type checker would require literal names
    base = make("Batch", names, rename=bool(bad))

    class Batch(base):  # type: ignore[valid-type, misc]
        __doc__ = make_batch_type.__doc__

        def __repr__(self) -> str:
            parts = []
            for name, value in zip(self._fields, self):
                parts.append(f"{name}: {tuple(value.shape)} {value.dtype}")
            return f"Batch({', '.join(parts)})"

        def __reduce__(self) -> tuple:
            return _make_batch, (names, tuple(self), self.__dict__)

    return Batch


def _make_batch(names: tuple[str, ...], values: tuple, attributes: dict[str, Any]) -> Any:
    """The batch that was pickled or copied."""
    batch = _make_batch_type(names)(*values)
    batch.__dict__.update(attributes)
    return batch
