"""`.beton` file -> validated samples."""

from ffcv_ssl.reader.reader import Extents, Reader

__all__ = ["Extents", "Reader"]
