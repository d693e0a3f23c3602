"""A dataset -> a `.beton` file, written in parallel and atomically."""

from ffcv_ssl.writer.writer import DatasetWriter

__all__ = ["DatasetWriter"]
