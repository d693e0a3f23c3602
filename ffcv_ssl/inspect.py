"""What is in a `.beton` file, and whether it is sound.

    python -m ffcv_ssl.inspect train.beton
    python -m ffcv_ssl.inspect train.beton --verify            # read and check every sample
    python -m ffcv_ssl.inspect train.beton --grid images.png   # a picture of a few dozen images

The last line on stdout is one JSON object. Exit code 0: the file is sound; 1: --verify found bad
samples, or nobody reads on; 2: the file cannot be read, or stdout is full.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.config.app_files import shown_program
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsers import QuietParser
from ffcv_ssl.config.stdout import printing, say
from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.fields import Field, IntField, NDArrayField, RGBImageField
from ffcv_ssl.files import own_temporary, save_figure
from ffcv_ssl.reader import Reader

if TYPE_CHECKING:
    from rich.console import Console

_MAX_LISTED = 20
_VERIFY_CHUNK = 128  # samples that a thread takes at once
_MAX_CLASSES_SHOWN = 20
_MAX_CLASSES_COUNTED = 10_000
_QUANTILES = (0, 5, 50, 95, 100)
_GRID_COLUMNS, _GRID_ROWS = 8, 5
_PROGRESS_INTERVAL_S = 10.0


def summarize(reader: Reader) -> dict[str, Any]:
    """Facts about an open file, serialisable as JSON."""
    return {
        "path": reader.path,
        "file_bytes": os.fstat(reader.fd).st_size,
        "format_version": beton.VERSION,
        "num_samples": reader.num_samples,
        "page_size": reader.page_size,
        "verified": reader.verified,
        "fingerprint": reader.fingerprint,
        "made": reader.made,
        "names": None if reader.names is None else [reader.names[0], reader.names[-1]],
        "fields": {name: _summarize_field(reader, name) for name in reader.fields},
    }


def _summarize_field(reader: Reader, name: str) -> dict[str, Any]:
    field, column = reader.fields[name], reader.field_metadata(name)
    facts: dict[str, Any] = {"type": type(field).__name__}
    extents = reader.extents(name)
    if extents is not None:
        facts["payload_bytes"] = int(extents.size.sum(dtype=np.uint64))
        facts["payload_quantiles_bytes"] = _quantiles(extents.size)
    if isinstance(field, RGBImageField):
        facts["jpg"] = int((column["mode"] == beton.IMAGE_MODE_JPG).sum())
        facts["raw"] = int((column["mode"] == beton.IMAGE_MODE_RAW).sum())
        facts["width_quantiles_px"] = _quantiles(column["width"])
        facts["height_quantiles_px"] = _quantiles(column["height"])
    elif column.dtype.kind in "if":
        facts["min"], facts["max"] = _plain(column.min()), _plain(column.max())
    if isinstance(field, IntField):
        facts["counts"] = _count_labels(column)
        names = reader.class_names.get(name)
        if names is not None:
            facts["class_names"] = names
    if isinstance(field, NDArrayField):
        facts["dtype"], facts["shape"] = str(field.dtype), list(field.shape)
    return facts


def _plain(value: np.generic) -> int | float | str:
    """A JSON number. JSON has no NaN and no infinities: those become text."""
    number = value.item()
    return number if np.isfinite(number) else str(number)


def _quantiles(values: np.ndarray) -> list[int]:
    """The values at 0, 5, 50, 95 and 100 %; nothing is interpolated."""
    return [int(v) for v in np.percentile(values, _QUANTILES, method="nearest")]


def _count_labels(column: np.ndarray) -> dict[str, int] | None:
    """{label: number of samples}, or None where there are too many integers to be labels."""
    labels, counts = np.unique(column, return_counts=True)
    if len(labels) > _MAX_CLASSES_COUNTED:
        return None
    return {str(label): int(count) for label, count in zip(labels, counts)}


def verify(reader: Reader, report: Callable[[str], object] = print) -> int:
    """Read, check and decode every sample of every field; return the number of bad values.

    report(line) is called for each of the first 20.
    """
    num_bad, spoke = 0, time.monotonic()
    starts = range(0, reader.num_samples, _VERIFY_CHUNK)
    pool = ThreadPoolExecutor(len(usable_cores()))
    try:
        for start, errors in zip(starts, pool.map(partial(_find_bad, reader), starts)):
            for error in errors[: max(0, _MAX_LISTED - num_bad)]:
                report(error)
            num_bad += len(errors)
            if time.monotonic() - spoke >= _PROGRESS_INTERVAL_S:
                spoke = time.monotonic()
                print(f"{reader.path}: {start} of {reader.num_samples} samples", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    if num_bad > _MAX_LISTED:
        report(f"{reader.path}: and {num_bad - _MAX_LISTED} more")
    return num_bad


def _find_bad(reader: Reader, start: int) -> list[str]:
    """The error messages of the chunk of samples at `start`."""
    errors = []
    for sample in range(start, min(start + _VERIFY_CHUNK, reader.num_samples)):
        for name in reader.fields:
            try:
                reader.decode(sample, name)
            except BetonError as error:
                errors.append(str(error))
    return errors


def draw_grid(reader: Reader, path: str) -> None:
    """Save a picture of up to 40 images, evenly spread over the file, with sample id and label.

    Raises BetonError, and UserError for a path that is no file's.
    """
    from matplotlib.figure import Figure

    if not path or os.path.isdir(path):
        raise UserError(f"--grid: got {path!r}, expected a file to write, such as grid.png")
    image_name = _first_of(reader, RGBImageField)
    if image_name is None:
        raise BetonError(
            f"{reader.path}: got the fields {reader.field_names}, expected one of images to draw"
        )
    label_name = _first_of(reader, IntField)
    num_samples = reader.num_samples
    num_images = min(num_samples, _GRID_COLUMNS * _GRID_ROWS)
    chosen = [i * num_samples // num_images for i in range(num_images)]
    figure = Figure(figsize=(2 * _GRID_COLUMNS, 2.2 * _GRID_ROWS), layout="constrained")
    for place, sample in enumerate(chosen, 1):
        axes = figure.add_subplot(_GRID_ROWS, _GRID_COLUMNS, place)
        axes.imshow(reader.decode(sample, image_name), interpolation="nearest")
        axes.set_title(_title(reader, sample, label_name), fontsize=8)
        axes.axis("off")
    try:
        save_figure(figure, path, 80, own_temporary(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BetonError(
            f"{path}: picture cannot be written ({reason}); use another --grid"
        ) from None


def _first_of(reader: Reader, field_class: type[Field]) -> str | None:
    return next((name for name, f in reader.fields.items() if isinstance(f, field_class)), None)


def _title(reader: Reader, sample: int, label_name: str | None) -> str:
    if label_name is None:
        return str(sample)
    label = reader.decode(sample, label_name)
    names = reader.class_names.get(label_name, [])
    return f"{sample}: {names[label] if 0 <= label < len(names) else label}"


def _print_tables(facts: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    head = Table(title=facts["path"], show_header=False, title_justify="left")
    verified = "yes, checksums match" if facts["verified"] else "unverified (written by FFCV?)"
    names = "none" if facts["names"] is None else "{!r} to {!r}".format(*facts["names"])
    for key, value in (
        ("format", f".beton version {facts['format_version']}"),
        ("samples", f"{facts['num_samples']:,}"),
        ("file", _size(facts["file_bytes"])),
        ("page size", _size(facts["page_size"])),
        ("verified", verified),
        ("fingerprint", facts["fingerprint"]),
        ("made", json.dumps(facts["made"])),
        ("file names", names),
    ):
        head.add_row(key, value)
    console.print(head)
    body = Table(title="fields", title_justify="left")
    for column in ("name", "type", "payload", "content"):
        body.add_column(column)
    for name, field in facts["fields"].items():
        payload = _size(field["payload_bytes"]) if "payload_bytes" in field else "-"
        body.add_row(name, field["type"], payload, _describe(field))
    console.print(body)
    for name, field in facts["fields"].items():
        if field.get("counts"):
            _print_classes(name, field, console)


def _describe(field: dict[str, Any]) -> str:
    if "jpg" in field:
        quantiles = ", ".join(f"{q} %" for q in _QUANTILES)
        return (
            f"{field['jpg']:,} jpg, {field['raw']:,} raw; at {quantiles}: "
            f"width {field['width_quantiles_px']} px, height {field['height_quantiles_px']} px, "
            f"{field['payload_quantiles_bytes']} bytes"
        )
    if "dtype" in field:
        return f"{field['dtype']} {tuple(field['shape'])}"
    if "min" in field:
        return f"{field['min']} to {field['max']}"
    if "payload_quantiles_bytes" in field:
        least, *_, most = field["payload_quantiles_bytes"]
        return f"{least} to {most} bytes"
    return ""


def _print_classes(name: str, field: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    names, counts = field.get("class_names", []), field["counts"]
    if not names and len(counts) > _MAX_CLASSES_SHOWN:
        console.print(f"{name}: {len(counts):,} different values")
        return
    table = Table(title=f"{name}: {len(counts)} classes", title_justify="left")
    for column in ("label", "name", "samples"):
        table.add_column(column)
    labels = sorted({*map(int, counts), *range(len(names))})
    for label in labels[:_MAX_CLASSES_SHOWN]:
        known = names[label] if 0 <= label < len(names) else "unlabelled" if label == -1 else ""
        table.add_row(str(label), known, f"{counts.get(str(label), 0):,}")
    console.print(table)
    if len(labels) > _MAX_CLASSES_SHOWN:
        console.print(f"and {len(labels) - _MAX_CLASSES_SHOWN} more")


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 10:
        return f"{num_bytes} bytes"
    for unit, shift in (("KiB", 10), ("MiB", 20)):
        if num_bytes < 1 << (shift + 10):
            return f"{num_bytes / (1 << shift):,.1f} {unit}"
    return f"{num_bytes / (1 << 30):,.1f} GiB"


class _Parser(QuietParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = shown_program("python -m ffcv_ssl.inspect")
    parser = _Parser(prog=prog, description="What is in a .beton file.")
    parser.add_argument("file", help="the .beton file")
    parser.add_argument("--verify", action="store_true", help="read and check every sample")
    parser.add_argument("--grid", metavar="PNG", help="draw a few dozen images")
    options = parser.parse_args(arguments)
    try:
        with _open(options.file) as reader:
            return _inspect(reader, options)
    except (BetonError, UserError) as error:
        print(one_line(error), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        return 1


def _open(path: str) -> Reader:
    try:
        return Reader(path)
    except OSError as error:
        raise BetonError(f"{path}: cannot be opened ({error.strerror or error})") from None


def _inspect(reader: Reader, options: argparse.Namespace) -> int:
    from rich.console import Console

    facts = summarize(reader)
    console = Console(markup=False, emoji=False, highlight=False)
    with printing():
        with console.capture() as tables:  # by itself it ends the process where nobody reads
            _print_tables(facts, console)
        print(tables.get(), end="")
    num_bad = 0
    if options.verify:
        num_bad = verify(reader, say)
        facts["verify"] = {"bad": num_bad, "values": reader.num_samples * len(reader.fields)}
    if options.grid is not None:
        draw_grid(reader, options.grid)
        facts["grid"] = options.grid
    say(json.dumps(facts))
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
