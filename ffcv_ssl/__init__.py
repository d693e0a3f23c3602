"""ffcv-ssl: a `.beton` file, one decode per image, several augmented views of each.

The names are FFCV's; they are loaded when first used, so that importing the package costs little.
"""

import importlib

from ffcv_ssl import moved
from ffcv_ssl.errors import BetonError

__version__ = "0.1.0"
__all__ = ["BetonError", "DatasetWriter", "Loader", "OrderOption", "Reader"]

_HOMES = {
    "DatasetWriter": "ffcv_ssl.writer",
    "Loader": "ffcv_ssl.loader",
    "OrderOption": "ffcv_ssl.loader",
    "Reader": "ffcv_ssl.reader",
}

TYPE_CHECKING = False  # importing it from `typing` would double the time that this module takes
if TYPE_CHECKING:
    from ffcv_ssl.loader import Loader, OrderOption
    from ffcv_ssl.reader import Reader
    from ffcv_ssl.writer import DatasetWriter

moved.install()


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ffcv_ssl' has no attribute '{name}'")
