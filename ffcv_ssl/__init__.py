"""ffcv-ssl: one `.beton` file, one decode an image, several augmented views, for self-supervised pretraining."""

from ffcv_ssl.errors import BetonError

__version__ = "0.1.0"
__all__ = ["BetonError"]
