"""From a `.beton` file to batches: threads, slots, orders, device transfer, state."""

from ffcv_ssl.loader.loader import Loader, OrderOption

__all__ = ["Loader", "OrderOption"]
