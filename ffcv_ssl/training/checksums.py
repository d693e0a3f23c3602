"""Damage in files of weights: a wrong bit is found before its value is used, wherever it is.

torch.save writes a zip archive with the CRC-32 of each member, but torch.load does not compare
them. safetensors' format has no checksum at all: files of ours carry a digest in their metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ffcv_ssl.files import StrPath

DIGEST = "blake2b"
"""Key of the digest in the metadata of our safetensors files."""
_OURS = "stem"
"""Another key in the metadata of a network of ours, which tells that the digest was lost."""
ZIP_START = b"PK\x03\x04"

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field
_IS_FOLDER = 0x10  # torch's reader leaves memory as it was for a member with this attribute
_LENGTH_BYTES = 8  # of a safetensors file: the length of its JSON header
_CHUNK_BYTES = 1 << 20
_MAX_GROWTH = 20
"""A compressed archive with more bytes in it than so many times its own is no file of weights."""


def is_archive(path: StrPath) -> bool:
    """Whether a file begins as those of torch.save do since torch 1.6. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(ZIP_START)) == ZIP_START


def can_be_mapped(path: StrPath) -> bool:
    """Whether torch.load may map a file: an archive without compressed members, which torch would
    take as they are, without a word. Raises OSError, and zipfile's errors for a damaged archive."""
    if not is_archive(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def archive_damage(path: StrPath) -> str | None:
    """What is wrong with a file of torch.save, in words; None where every checksum holds.

    Also None for a file without checksums: a pickle (torch before 1.6), or an archive that was
    written with `torch.serialization.set_crc32_options(False)`. Raises OSError.
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if members and not any(member.CRC for member in members):
                    return None
                unpacked = sum(m.file_size for m in members)
                if unpacked > _MAX_GROWTH * (os.fstat(file.fileno()).st_size + _CHUNK_BYTES):
                    return f"it is damaged: unpacked it would have {unpacked} bytes"
                wrong = next((m.filename for m in members if not _is_whole(archive, m)), None)
        except OSError:
            raise
        except Exception:  # zipfile raises half a dozen types for a damaged directory
            return "it is damaged or cut off"
    return None if wrong is None else f"it is damaged: {wrong!r} fails its checksum"


def _is_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Whether a member has the name and the bytes that the archive's directory says."""
    if member.external_attr & _IS_FOLDER:
        return False
    if member.compress_type != zipfile.ZIP_STORED:  # another program's: torch does not compress
        with archive.open(member) as content:
            while content.read(_CHUNK_BYTES):  # at its end it compares the checksum
                pass
        return True
    file: Any = archive.fp
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    # torch too finds the bytes by these lengths, not by those in the directory
    start, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    name = file.read(name_bytes).decode("utf-8")
    sizes_agree = member.file_size == member.compress_size
    if start != ZIP_START or name != member.orig_filename or not sizes_agree:
        return False
    file.seek(extra_bytes, 1)
    checksum = 0
    for chunk in _chunks(file, member.file_size):
        checksum = zlib.crc32(chunk, checksum)
    return checksum == member.CRC


def signed(weights: bytes) -> tuple[bytes, memoryview]:
    """(header, data) of a safetensors file with the same content as `weights`, another, and with a
    digest. Equal content gives equal bytes: safetensors alone writes metadata in any order."""
    end = _LENGTH_BYTES + int.from_bytes(weights[:_LENGTH_BYTES], "little")
    header, data = json.loads(weights[_LENGTH_BYTES:end]), memoryview(weights)[end:]
    header.setdefault("__metadata__", {})[DIGEST] = _digest(header, [data])
    text = _canonical(header)
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, data


def weights_damage(path: StrPath) -> str | None:
    """What is wrong with a safetensors file of ours, in words; None where its digest holds, and for
    a file of another program. Raises OSError."""
    with open(path, "rb") as file:
        try:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(length, 100_000_000)))  # safetensors' limit
            about = header["__metadata__"]
            expected = about.pop(DIGEST, "") if _OURS in about else about.pop(DIGEST)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        digest = _digest(header, _chunks(file, None))
    return None if digest == expected else "it is damaged: it fails its checksum"


def _digest(header, parts) -> str:
    """32 hex digits of all that a safetensors file holds."""
    digest = hashlib.blake2b(_canonical(header), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _canonical(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")  # a damaged header may have half a code point


def _chunks(file: BinaryIO, size_bytes: int | None) -> Iterator[bytes]:
    """The next `size_bytes` of a file, or fewer where it ends before; None: up to its end."""
    left = float("inf") if size_bytes is None else size_bytes
    while left > 0 and (chunk := file.read(int(min(left, _CHUNK_BYTES)))):
        left -= len(chunk)
        yield chunk
