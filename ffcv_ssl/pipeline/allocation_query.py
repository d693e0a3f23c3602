"""FFCV's import path of `AllocationQuery`."""

from ffcv_ssl.pipeline.operation import AllocationQuery

__all__ = ["AllocationQuery"]
