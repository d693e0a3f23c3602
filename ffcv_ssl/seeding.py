"""Seeds and stream keys: everything random in the library starts from one of these 64-bit
numbers."""

import hashlib


def derive_key(seed: int, *names: str | int) -> int:
    """A 64-bit key of `seed` (int) and names (str or int): independent streams for different names.

    Example: derive_key(0, "view", 1, "RandomGrayscale", 0). It never changes: it is a digest of
    the text.
    """
    text = "\0".join(str(part) for part in (int(seed), *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_seed(seed: int, stream: str) -> int:
    """The seed of a named stream of one run (for example "labelled"), a non-negative int below
    2**63."""
    return derive_key(seed, "stream", stream) >> 1
