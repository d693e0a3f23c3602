"""Seeds and keys of random streams: all randomness in the library starts from such numbers."""

import hashlib


def derive_key(seed: int, *names: str | int) -> int:
    """A 64-bit key of a seed and names; different names give independent streams.

    Example: derive_key(0, "view", 1, "RandomGrayscale", 0). A digest of the text, so it never
    changes.
    """
    text = "\0".join(str(part) for part in (int(seed), *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_seed(seed: int, stream: str) -> int:
    """The seed of a named stream of a run, for example "labelled"; 0 <= seed < 2**63."""
    return derive_key(seed, "stream", stream) >> 1
