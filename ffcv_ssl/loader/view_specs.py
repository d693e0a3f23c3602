"""Turns the `pipelines` argument into a plain list: for each output its field and its ops, in the
order of the batch."""

from __future__ import annotations

from typing import Any

from ffcv_ssl.errors import UserError
from ffcv_ssl.fields.base import Decoder
from ffcv_ssl.fields.ndarray import NDArrayField
from ffcv_ssl.fields.rgb_image import RGBImageField
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import SimpleRGBImageDecoder, ToTensor
from ffcv_ssl.transforms.tensor import is_tensor_type


def resolve_pipelines(
    reader: Reader, pipelines: dict[str, Any], field_mapper: dict[str, str] | None = None
) -> list[tuple[str, str, list]]:
    """[(name, field name, ops)] in the order of the batch.

    If every name is a field of the file, FFCV's rule applies: the file's order, default pipelines
    for missing fields, None leaves a field out. Otherwise: the dict's order, then defaults for
    fields that no pipeline uses. ValueError for unknown fields.
    """
    mapper = field_mapper or {}
    given = {name: _split(reader, name, value, mapper) for name, value in pipelines.items()}
    if all(name in reader.fields and field == name for name, (field, _) in given.items()):
        order = list(reader.fields)
    else:
        used = {field for field, _ in given.values()}
        order = list(given) + [name for name in reader.fields if name not in used | set(given)]
    resolved = []
    for name in order:
        field_name, ops = given.get(name, (name, []))
        if ops is not None:
            resolved.append((name, field_name, ops or default_pipeline(reader, field_name)))
    return resolved


def _split(
    reader: Reader, name: str, value: Any, mapper: dict[str, str]
) -> tuple[str, list | None]:
    """(field name, ops or None) of one entry of `pipelines`."""
    field_name = mapper.get(name, name)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        field_name, value = value
    if field_name not in reader.fields:
        known = ", ".join(reader.fields)
        raise ValueError(
            f"{reader.path}: pipeline '{name}': the file has no field '{field_name}', it has "
            f"{known}; a view of a field is written ('field', [ops])"
        )
    if value is None:
        return field_name, None
    ops = [op() if isinstance(op, type) and issubclass(op, Decoder) else op for op in value]
    return field_name, ops


def default_pipeline(reader: Reader, field_name: str) -> list:
    """FFCV's default: the field's decoder, then a tensor. Raises UserError for arrays of a type
    that torch lacks, such as texts and dates."""
    if is_image(reader, field_name):
        return [SimpleRGBImageDecoder(), ToTensor()]
    field = reader.fields[field_name]
    if isinstance(field, NDArrayField) and not is_tensor_type(field.dtype):
        raise UserError(
            f"{reader.path}: field '{field_name}': got arrays of {field.dtype}, expected a type "
            "that torch has too; give the field a pipeline without ToTensor, or None to leave it "
            "out"
        )
    return [field.get_decoder_class()(), ToTensor()]


def is_image(reader: Reader, field_name: str) -> bool:
    return isinstance(reader.fields[field_name], RGBImageField)
