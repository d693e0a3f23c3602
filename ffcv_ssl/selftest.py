"""Does this installation work? Writes a small file, loads it, and checks the pixels.

    ffcv-ssl selftest
    ffcv-ssl selftest --device cpu --seconds 10

Nothing of it stays: the file is in a temporary folder. Pixels are compared with NumPy and with
torchvision; the first time, kernels are compiled, which takes a minute. Then it loads SimCLR's two
views at 224 px for `--seconds` and says how many images a second that are. The last line on stdout
is JSON. Exit codes: 0 all is right; 1 something is wrong, and a line says what; 2 a user's mistake.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl import transforms as ops
from ffcv_ssl.config.app_files import app_folder
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsers import OneLineParser
from ffcv_ssl.config.stdout import has_told, say
from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter

# N samples, H W pixels, C channels.

PACKAGES = ("torch", "torchvision", "numpy", "numba", "simplejpeg", "Pillow", "jsonargparse")
NUM_RAW, RAW_SHAPE = 24, (60, 80)
NUM_JPEG, JPEG_SHAPE = 64, (375, 500)
ONE_ROUNDING = 0.51
"""In levels: an op rounds once, half a level, and both sides compute in float32."""
JPEG_LEVELS = 4.0
"""Mean distance in levels of a smooth image from its JPEG of quality 90."""


class Wrong(Exception):
    """A check failed; its text says which, with what was got and expected."""


class Images:
    """`count` generated photograph-like images: uint8 (H, W, 3), smooth, with edges and noise."""

    def __init__(self, count: int, shape: tuple[int, int]) -> None:
        self.count, self.shape = count, shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(index)
        phases, speeds = rng.uniform(0, 6, (2, 3)), rng.uniform(0.004, 0.03, (2, 3))
        rows, columns = (
            np.sin(np.arange(side)[:, None] * speed + phase)
            for side, speed, phase in zip(self.shape, speeds, phases)
        )
        noise = rng.integers(-5, 6, (*self.shape, 3), dtype=np.int8)
        image = 127 + 60 * (rows[:, None] + columns) + noise
        return np.clip(image, 0, 255).astype(np.uint8), index % 10

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return (self[index] for index in range(len(self)))


# ---- Checks --------------------------------------------------------------------------------------


def check_reading(raw: str, jpeg: str) -> str:
    """Raw pixels, labels and JPEGs come back as they were written."""
    for path, images, limit in (
        (raw, Images(NUM_RAW, RAW_SHAPE), 0.0), (jpeg, Images(4, JPEG_SHAPE), JPEG_LEVELS),
    ):  # fmt: skip
        with Reader(path) as reader:
            for index in range(len(images)):
                image, label = images[index]
                got = reader.decode(index, "image").astype(np.float64)
                _compare(f"image {index} of {Path(path).name}", np.abs(got - image).mean(), limit)
                if reader.decode(index, "label") != label:
                    raise Wrong(f"label {index}: got another one than the {label} written")
    return "raw pixels and labels are those written, JPEGs are near"


def check_flips(raw: str) -> str:
    """Flips and solarization are exact."""
    flips = [ops.SimpleRGBImageDecoder(), ops.RandomHorizontalFlip(0.5)]
    views, drawn = load_all(raw, [*flips, ops.RandomSolarization(0.5)])
    images = np.stack([image for image, _ in Images(NUM_RAW, RAW_SHAPE)])
    expected = np.where(drawn["flip"][:, None, None, None], images[:, :, ::-1], images)
    inverted = np.where(expected >= 128, 255 - expected, expected)
    expected = np.where(drawn["solarize"][:, None, None, None], inverted, expected)
    for name in ("flip", "solarize"):
        if len(set(drawn[name].tolist())) != 2:
            raise Wrong(f"{name} with probability 0.5: got the same for all of {NUM_RAW} images")
    _compare("flip and solarization", _distance(views, expected), 0)
    return "flip and solarization equal NumPy's to the bit"


def check_crops(raw: str) -> str:
    """Crops are torchvision's, on the boxes that were drawn."""
    import torch
    from torchvision.transforms.v2 import functional

    views, drawn = load_all(raw, [ops.RandomResizedCrop(32)])
    for index, (image, _) in enumerate(Images(NUM_RAW, RAW_SHAPE)):
        top, left, height, width = (int(side) for side in drawn["crop"][index])
        box = image[top : top + height, left : left + width]
        pixels = torch.tensor(box).permute(2, 0, 1)[None].float() / 255
        resized = functional.resize(pixels, [32, 32], antialias=True)
        expected = 255 * resized[0].permute(1, 2, 0).numpy()
        _compare(f"crop of image {index}", _distance(views[index], expected), ONE_ROUNDING)
    return "crops equal torchvision's antialiased resize within one rounding"


def check_grey(raw: str) -> str:
    """Greyscale is ITU-R 601's luma, as torchvision has it."""
    views, _ = load_all(raw, [ops.SimpleRGBImageDecoder(), ops.RandomGrayscale(1.0)])
    images = np.stack([image for image, _ in Images(NUM_RAW, RAW_SHAPE)])
    luma = images @ np.array([0.2989, 0.587, 0.114])
    _compare("greyscale", _distance(views, luma[..., None]), ONE_ROUNDING)
    return "greyscale equals NumPy's within one rounding"


def check_repetition(jpeg: str) -> str:
    """The same pixels with any number of workers, and others in the next epoch."""
    one = load_all(jpeg, simclr_view(64), num_workers=1, batch_size=16)[0]
    many = load_all(jpeg, simclr_view(64), num_workers=3, batch_size=7)[0]
    if not np.array_equal(one, many):
        raise Wrong("views of 3 workers: got other pixels than those of 1 worker, expected equal")
    return "views are the same with 1 worker and with 3"


def check_damage(raw: str) -> str:
    """A changed byte in an image is noticed."""
    with Reader(raw) as reader:
        extents = reader.extents("image")
        assert extents is not None  # an image has a payload
        place = int(extents.pointer[5]) + 100
    with open(raw, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    try:
        load_all(raw, [ops.SimpleRGBImageDecoder()])
    except BetonError:
        return "a changed byte in a sample is refused"
    raise Wrong("a changed byte in sample 5: got its pixels, expected a BetonError")


def check_device(device: str) -> str:
    """The device of training multiplies as NumPy does."""
    import torch

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 64)).astype(np.float32)
    got = (torch.tensor(a, device=device) @ torch.tensor(b, device=device)).cpu().numpy()
    _compare(f"a matrix product on {device}", np.abs(got - a @ b).max(), 0.05)  # TF32 rounds
    return f"matrix products on {device} are NumPy's"


def _compare(what: str, distance: float, limit: float) -> None:
    if not distance <= limit:
        raise Wrong(f"{what}: got values {distance:.4g} away from those expected, at most {limit}")


def _distance(views: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(views.astype(np.float64) - expected).max())


# ---- Files, loaders and speed --------------------------------------------------------------------


def write(path: Path, images: Images, mode: str) -> str:
    """Write a small file of images and labels."""
    fields = {"image": RGBImageField(mode), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(images)
    return str(path)


def load_all(
    path: str, view: list, num_workers: int = 1, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch of one view, in the file's order: (uint8 (N, H, W, 3), what was drawn)."""
    views, drawn = [], []
    with Loader(
        path, batch_size, num_workers=num_workers, order=OrderOption.SEQUENTIAL, seed=0,
        pipelines={"view_0": ("image", view), "label": [IntDecoder()]}, drop_last=False,
    ) as loader:  # fmt: skip
        for batch in loader:
            views.append(np.array(batch.view_0))  # a copy: slots are reused
            drawn.append(batch.params["view_0"].copy())
    return np.concatenate(views), np.concatenate(drawn)


def simclr_view(size_px: int) -> list:
    """SimCLR's ops (Chen et al. 2020, appendix A)."""
    return [
        ops.RandomResizedCrop(size_px), ops.RandomHorizontalFlip(),
        ops.RandomColorJitter(0.8, 0.8, 0.8, 0.8, 0.2), ops.RandomGrayscale(0.2),
        ops.GaussianBlur(0.5),
    ]  # fmt: skip


def images_per_second(path: str, seconds: float) -> float:
    """Images a second of a loader with two views of 224 px, all cores, after its first batch."""
    pipelines = {f"view_{k}": ("image", simclr_view(224)) for k in range(2)}
    with Loader(
        path, 32, order=OrderOption.RANDOM, seed=0, pipelines=pipelines
    ) as loader:  # fmt: skip
        next(iter(loader))
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for batch in loader:
                images += len(batch.indices)
        return images / (time.perf_counter() - began)


# ---- The command ---------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The version of Python, of this package and of those that matter to it."""
    found = {"python": platform.python_version()}
    for name in ("ffcv-ssl", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(device_name: str, seconds: float) -> tuple[int, dict[str, Any]]:
    """Run all checks; returns (exit code, summary)."""
    from ffcv_ssl.kernels.compile import cache_folder
    from ffcv_ssl.training.world import choose_device

    began, device = time.perf_counter(), choose_device(device_name)
    summary: dict[str, Any] = {
        "status": "right", "versions": versions(), "system": " ".join(os.uname()[::2]),
        "cores": len(usable_cores()), "device": _describe(device), "kernels": cache_folder(),
        "package": str(Path(__file__).parent), "scripts": str(app_folder()),
    }  # fmt: skip
    for key in ("system", "cores", "device", "kernels", "scripts"):
        say(f"{key:8} {summary[key]}")
    say(f"{'versions':8} {', '.join(f'{name} {v}' for name, v in summary['versions'].items())}")
    code = 0
    with tempfile.TemporaryDirectory(prefix="ffcv-ssl-selftest-") as folder:
        raw = write(Path(folder, "raw.beton"), Images(NUM_RAW, RAW_SHAPE), "raw")
        jpeg = write(Path(folder, "jpeg.beton"), Images(NUM_JPEG, JPEG_SHAPE), "jpg")
        checks: list[Callable[[], str]] = [
            lambda: check_reading(raw, jpeg), lambda: check_flips(raw), lambda: check_crops(raw),
            lambda: check_grey(raw), lambda: check_repetition(jpeg), lambda: check_damage(raw),
            lambda: check_device(str(device)),
        ]  # fmt: skip
        try:
            for check in checks:
                say(f"right    {check()}")
            summary["images_per_s"] = round(images_per_second(jpeg, seconds), 1)
            say(f"speed    {summary['images_per_s']:.0f} images/s, two views of 224 px each")
        except (Wrong, BetonError) as error:
            print(f"selftest: {one_line(error)}; install ffcv-ssl again", file=sys.stderr)
            code, summary["status"], summary["wrong"] = 1, "wrong", one_line(error)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    return code, summary


def _describe(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return str(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the last line on stdout is the summary."""
    try:
        parser = OneLineParser(prog="selftest", description=str(__doc__).split("\n")[0])
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument(
            "--seconds", type=_seconds, default=2.0, help="how long speed is measured (default: 2)"
        )
        options = parser.parse_args(argv)
        code, summary = run(options.device, options.seconds)
    except UserError as error:
        print(f"selftest: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody watches any more
        return 1
    is_told = has_told("selftest", "all is checked", lambda: print(json.dumps(summary)))
    return code if is_told else 2


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0, at most 3600")
    return value


if __name__ == "__main__":
    sys.exit(main())
