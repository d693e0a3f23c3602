"""How each kind of value is written to a `.beton` file and read back; FFCV's names at FFCV's
places.
"""

from ffcv_ssl.fields.base import Decoder, Field
from ffcv_ssl.fields.basics import FloatField, IntField
from ffcv_ssl.fields.bytes import BytesField
from ffcv_ssl.fields.json import JSONField
from ffcv_ssl.fields.ndarray import NDArrayField, TorchTensorField
from ffcv_ssl.fields.rgb_image import EncodedImage, RGBImageField

__all__ = [
    "BytesField",
    "Decoder",
    "EncodedImage",
    "Field",
    "FloatField",
    "IntField",
    "JSONField",
    "NDArrayField",
    "RGBImageField",
    "TorchTensorField",
]

BUILT_IN = {
    field.TYPE_ID: field
    for field in (
        FloatField,
        IntField,
        RGBImageField,
        BytesField,
        NDArrayField,
        JSONField,
        TorchTensorField,
    )
}
