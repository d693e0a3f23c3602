"""XXH3-64 against the package xxhash."""

import numpy as np
import pytest
import xxhash

from ffcv_ssl.kernels.hash import xxh3_64

BYTES = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)


def test_every_length_up_to_1500_equals_xxhash():
    for size in range(1501):
        data = BYTES[:size].tobytes()
        assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data), size


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4096, 10_000, 65_537, 262_144, 299_999])
def test_long_inputs_equal_xxhash(size):
    data = BYTES[:size].tobytes()
    assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


def test_any_alignment_equals_xxhash():
    for start in range(1, 9):
        for size in [1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025, 5000]:
            data = BYTES[start : start + size]
            assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data.tobytes()), (start, size)


@pytest.mark.parametrize("value", [0, 255])
def test_equal_bytes_of_any_length_equal_xxhash(value):
    for size in [1, 2, 15, 16, 64, 200, 241, 3000]:
        data = bytes([value]) * size
        assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


def test_all_kinds_of_buffers_have_the_hash_of_their_bytes():
    numbers = np.arange(1000, dtype=np.float64).reshape(10, 100)
    expected = xxhash.xxh3_64_intdigest(numbers.tobytes())
    for data in [numbers, numbers.tobytes(), bytearray(numbers.tobytes())]:
        assert xxh3_64(data) == expected
    assert xxh3_64(memoryview(numbers.tobytes())) == expected
    assert xxh3_64(np.asfortranarray(numbers)) == expected
    numbers.flags.writeable = False
    assert xxh3_64(numbers) == expected
    assert xxh3_64(b"") == xxh3_64(np.empty(0, np.uint8)) == xxhash.xxh3_64_intdigest(b"")


def test_every_flipped_bit_changes_the_hash():
    data = bytearray(BYTES[:300].tobytes())
    seen = {xxh3_64(data)}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(xxh3_64(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * len(data) + 1
