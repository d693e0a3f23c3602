"""Images -> one `.beton` file, in parallel, all or nothing.

    python write_dataset.py --source imagefolder --root imagenette --split train --out train.beton
    python write_dataset.py --source cifar10 --root data --download --out cifar10.beton
    python write_dataset.py --source shapes --num_samples 6000 --size_px 48 --out shapes.beton
    python write_dataset.py --source imagefolder --root imagenet --subset 1percent.txt --out l.beton

The file's bytes depend on the images and the settings alone, never on the number of workers. The
default mode `smart` keeps the original JPEG bytes where that is possible, stores small images as
raw pixels, and encodes all other images anew. The summary counts each kind. The last line on stdout
is JSON. Exit codes: 0 the file is written; 2 a user's mistake, or an image that cannot be read:
then nothing is written, or a full stdout: then the line says that the file is written; 130
interrupted: nothing is written. SIGTERM and SIGHUP end it by the signal once its unfinished file is
removed; what SIGKILL leaves goes when the file is written again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsers import OneLineParser
from ffcv_ssl.config.stdout import has_told
from ffcv_ssl.errors import BetonError, SourceError, UserError
from ffcv_ssl.fields import RGBImageField
from ffcv_ssl.sources import Source, open_source, select
from ffcv_ssl.sources.disk import read_file
from ffcv_ssl.training.command import EXIT_USER_ERROR
from ffcv_ssl.writer import DatasetWriter
from ffcv_ssl.writer.unfinished import remove_unfinished

MODES = ("smart", "jpg", "raw", "passthrough")
DEFAULT_MAX_RESOLUTION_PX = 500


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's settings. Raises UserError; exits for --help."""
    parser = OneLineParser(
        prog="write_dataset.py",
        description="Write images into one .beton file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="imagefolder, shapes, clevr, or a torchvision dataset: cifar10...",
    )
    add(
        "--out",
        required=True,
        metavar="FILE.beton",
        help="the file to make or replace",
    )
    add("--root", metavar="DIR", help="folder of the images, or of torchvision's files")
    add("--split", help="name of the split in the source: train (the default), val, test...")
    add("--download", action="store_true", help="let torchvision download the dataset into --root")
    add("--mode", choices=MODES, default="smart", help="how images are stored (default: smart)")
    add(
        "--max_resolution",
        type=_count,
        metavar="PX",
        help="longest side; larger images are shrunk; 0: no limit (default: 500; shapes: 0)",
    )
    add(
        "--quality",
        type=_count,
        default=90,
        help="of JPEGs encoded here, 1 to 100 (default: 90)",
    )
    add("--subset", metavar="FILE", help="write only these samples: names or indices, one per line")
    add("--limit", type=_count, metavar="N", help="write at most N samples, spread evenly")
    add("--workers", type=_count, help="number of processes (default: one per usable core)")
    shapes = parser.add_argument_group("generated images, --source shapes")
    shapes.add_argument("--num_samples", type=_count, metavar="N", help="default: 10000")
    shapes.add_argument(
        "--size_px", type=_count, metavar="PX", help="side of an image (default: 64)"
    )
    shapes.add_argument("--seed", type=int, help="seed of all random choices (default: 0)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 0")
    return value


def write(args: argparse.Namespace) -> dict:
    """Write the file that the settings ask for. Returns its summary, a dict for JSON.

    Raises SourceError, UserError and BetonError for mistakes that a user can correct.
    """
    source = open_source(
        args.source,
        args.root,
        args.split,
        args.download,
        num_samples=args.num_samples,
        size_px=args.size_px,
        seed=args.seed,
    )
    for remark in source.remarks:
        print(f"write_dataset.py: {one_line(remark)}", file=sys.stderr)
    indices = select(source, _subset_lines(args.subset), args.limit, args.subset)
    writer = _writer(args, source)
    began = time.perf_counter()
    try:
        writer.from_indexed_dataset(source.dataset, indices)
    except BetonError as error:
        raise BetonError(_with_place(str(error), source)) from error
    return _summary(args, source, writer, indices, time.perf_counter() - began)


def _subset_lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return read_file(path, may_be_pipe=True).decode("utf-8").split("\n")
    except SourceError as error:
        raise UserError(f"--subset: {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--subset: {path}: {reason}") from None


def _writer(args: argparse.Namespace, source: Source) -> DatasetWriter:
    max_resolution = args.max_resolution
    if max_resolution is None and not source.is_generated:
        max_resolution = DEFAULT_MAX_RESOLUTION_PX
    made = {
        **source.made,
        "mode": args.mode,
        "max_resolution": max_resolution or None,
        "quality": args.quality,
        "subset": args.subset and os.path.basename(args.subset),
        "limit": args.limit,
    }
    folder = os.path.dirname(os.path.abspath(args.out))
    if not args.out or os.path.isdir(args.out):
        raise UserError(f"--out: got {args.out!r}, expected a file to write, such as train.beton")
    try:
        os.makedirs(folder, exist_ok=True)
        image = RGBImageField(args.mode, max_resolution or None, jpeg_quality=args.quality)
        return DatasetWriter(
            args.out,
            {"image": image, **source.fields},
            num_workers=args.workers or -1,
            class_names=source.class_names,
            made={key: value for key, value in made.items() if value is not None},
            names=source.names,
        )
    except OSError as error:
        raise UserError(
            f"--out: {folder}: cannot be written to ({error.strerror}); use another --out"
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def _with_place(text: str, source: Source) -> str:
    """The writer's message, with the image's file name in place of its number."""
    found = re.search(r"sample \d+ \(dataset index (\d+)\)", text)
    if found is None or source.names is None:
        return text
    return text.replace(found.group(), source.place(int(found.group(1))))


def _summary(
    args: argparse.Namespace,
    source: Source,
    writer: DatasetWriter,
    indices: Sequence[int],
    seconds: float,
) -> dict:
    return {
        "out": args.out,
        "source": args.source,
        "samples": len(indices),
        "bytes": os.path.getsize(args.out),
        "seconds": round(seconds, 3),
        "samples_per_s": round(len(indices) / seconds, 1),
        "fields": ["image", *source.fields],
        "classes": len(source.class_names.get("label", ())) or None,
        "images": dict(writer.counts.get("image", {})),
    }


def show(summary: dict) -> None:
    """Print the summary for people, and as JSON."""
    images = summary["images"]
    # one line, and printable also where the path is not UTF-8
    print(
        f"{one_line(summary['out'])}: {summary['samples']} samples, {summary['bytes'] / 1e6:.1f} MB"
    )
    print(f"  fields: {', '.join(summary['fields'])}; classes: {summary['classes'] or 'none'}")
    for what, count in sorted(images.items(), key=lambda pair: -pair[1]):
        print(f"  images {what}: {count}")
    print(f"  {summary['seconds']:.1f} s, {summary['samples_per_s']:.0f} samples per second")
    print(json.dumps(summary))


@contextlib.contextmanager
def _removing_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP remove the unfinished file before they end the process.

    The handler does it itself: an exception of a handler can get lost, as while a worker is forked.
    Signals that are ignored (nohup) or have a handler stay as they are, and all of them do outside
    the main thread.
    """
    process, former = os.getpid(), {}

    def end(number: int, frame: Any) -> None:
        if os.getpid() == process:  # and not a new worker, which has no handlers of its own yet
            remove_unfinished()
            name = signal.Signals(number).name
            os.write(2, f"write_dataset.py: ended by {name}, nothing is left\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # so that the caller sees which signal it was
        os._exit(128 + number)  # the first process of a container does not get that signal

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    former[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        with _removing_on_signals():
            summary = write(parse(sys.argv[1:] if argv is None else argv))
    except (UserError, SourceError, BetonError) as error:
        print(f"write_dataset.py: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("write_dataset.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    is_told = has_told("write_dataset.py", f"{summary['out']} is written", lambda: show(summary))
    return 0 if is_told else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
