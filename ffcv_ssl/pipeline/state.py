"""FFCV's import path of `State`."""

from ffcv_ssl.pipeline.operation import State

__all__ = ["State"]
