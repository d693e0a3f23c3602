"""States of runs, compared: what a checkpoint holds."""

import torch


def equal_states(a, b):
    """Whether two states have the same types and values, tensors bit for bit, NaN too."""
    if torch.is_tensor(a):
        if not torch.is_tensor(b) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        bits_a, bits_b = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        return torch.equal(bits_a, bits_b)
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return False
        return all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal_states, a, b))
    return type(a) is type(b) and a == b
