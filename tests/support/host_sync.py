"""A guard against operations that make the host wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
    aten._unique2, aten.unique_dim,
}  # fmt: skip


class NoHostSync(TorchDispatchMode):
    """Within it, an operation whose result the host must wait for raises: .item(), bool(), nonzero,
    indexing with a mask. `counters`: tensors that lie on the host wherever the model is."""

    def __init__(self, counters=()):
        super().__init__()
        self.counters = counters

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.overloadpacket
        is_mask = kind in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (is_mask or kind in WAITING) and not any(args[0] is c for c in self.counters):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
