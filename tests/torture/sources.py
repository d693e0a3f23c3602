"""What a data set is made from: hostile folders, and images whose bytes are damaged."""

import contextlib
import io
import os
import socket
import stat
import sys
import warnings
from collections import Counter
from unittest import mock

import numpy as np
from PIL import Image, ImageOps
from support.beton_files import pattern
from support.process_limits import with_limited_memory

import write_dataset
from ffcv_ssl import DatasetWriter, Reader
from ffcv_ssl.errors import BetonError
from ffcv_ssl.fields import EncodedImage, RGBImageField
from torture.frame import fault

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
MODES = ("raw", "jpg", "smart", "proportion", "passthrough")
TURNED = ("JPEG", "PNG", "WEBP", "TIFF")
MEMORY_BYTES = 2 << 30
QUALITY = 90
"""Of JPEGs that the writer encodes."""


def image_bytes(random, kind=None):
    """A small image file of that or any kind, half of them turned by EXIF where the kind has it;
    JPEGs are progressive, grey or CMYK at times."""
    kind = kind or str(random.choice(KINDS))
    height, width = random.integers(1, 60, 2)
    image = Image.fromarray(pattern(int(random.integers(99)), int(height), int(width)))
    options = {}
    if kind == "JPEG":
        image = image.convert(str(random.choice(["RGB", "RGB", "L", "CMYK"])))
        options = {"progressive": bool(random.integers(2)), "quality": int(random.integers(5, 96))}
    if kind in TURNED and random.integers(2):
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(1, 9))
        options["exif"] = exif
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pillows_pixels(data):
    """What Pillow makes of an image file: upright RGB, uint8 (H, W, 3), white where it is
    transparent; None where it reads none, or one that is larger than the format holds."""
    try:
        with warnings.catch_warnings(), mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if max(image.size) > 65_535 or image.width * image.height > 1 << 28:
                return None
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception:  # its parsers raise nearly anything on damaged files
        return None
    if "A" in image.mode or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def make_image(path, random, root):
    path.write_bytes(image_bytes(random))


def make_link(path, random, root):
    target = path.parent / f"{path.name}.original"  # no image by its name
    target.write_bytes(image_bytes(random))
    path.symlink_to(target)


def make_bad_image(path, random, root):
    data = image_bytes(random)
    how = random.integers(4)
    if how == 0:
        data = data[: int(random.integers(len(data)))]
    elif how == 1:
        data = random.bytes(int(random.integers(0, 3000)))
    elif how == 2:  # a PNG that promises 2^31 - 1 pixels a side
        data = image_bytes(random, "PNG")
        data = data[:16] + b"\x7f\xff\xff\xff" * 2 + data[24:]
    else:
        data = b"\xff\xd8" + data
    path.write_bytes(data)


def make_huge(path, random, root):
    with open(path, "wb") as file:
        file.truncate(int(random.choice([(1 << 30) + 1, 1 << 40])))


def make_device(path, random, root):
    path.symlink_to(str(random.choice(["/dev/zero", "/dev/null", "/dev/urandom", "/dev/tty"])))


def make_socket(path, random, root):
    former = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(former)


def make_loop(path, random, root):
    path.symlink_to(str(random.choice([".", "..", str(root), "/", path.name])))


HARMLESS = (make_image, make_link)
HOSTILE = (
    *(make_bad_image, make_huge, make_device, make_socket, make_loop),
    *(lambda path, *_: os.mkfifo(path), lambda path, *_: path.symlink_to("nowhere")),
)
ODD = (
    "new\nline",
    "tab\t",
    "\x1b[31m",
    os.fsdecode(b"\xff\xfe"),
    "caf\u0301",
    "-rf",
    "\u202e",
    "'",
)


def make_folder(root, random):
    """Fill a folder: half of them hold one to three hostile things."""
    made, folders = set(), [root]
    for number in range(int(random.integers(4))):
        folders.append(
            folders[int(random.integers(len(folders)))] / f"{random.choice(ODD)}{number}"
        )
        folders[-1].mkdir()
    makers = [HARMLESS[i] for i in random.integers(0, 2, int(random.integers(1, 8)))]
    if random.integers(2):
        makers += [HOSTILE[i] for i in random.integers(0, len(HOSTILE), random.integers(1, 4))]
    for number, make in enumerate(makers):
        folder = folders[int(random.integers(len(folders)))]
        path = folder / f"{random.choice(ODD)}{number}.{random.choice(['jpg', 'PNG', 'webp'])}"
        make(path, random, root)
        made.add(path)
    return made


def should_fail(paths):
    """Whether one of the paths is no readable image, or a link to a folder."""
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return True
        too_large = status.st_size > 1 << 30
        if not stat.S_ISREG(status.st_mode) or too_large:
            return True
        if pillows_pixels(path.read_bytes()) is None:
            return True
    return False


@fault("hostile folders", quick=20, full=200, limit_s=20)
def hostile_folder(trial):
    """write_dataset refuses a folder of pipes, devices, sockets, loops, damaged and huge files in
    one printable line and leaves no file, or writes all its images, with the pixels that Pillow
    reads; in 2 GiB and 20 s."""
    root, out = trial.folder / "source", trial.folder / "a.beton"
    root.mkdir()
    paths = make_folder(root, trial.random)
    bad = should_fail(paths)
    arguments = ["--source=imagefolder", f"--root={root}", f"--out={out}", "--workers=1"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = with_limited_memory(MEMORY_BYTES, lambda: write_dataset.main(arguments))
    if bad:
        text = said.getvalue()
        assert code == 2, f"{text}: a bad file was accepted"
        assert text.count("\n") == 1 and text[:-1].isprintable(), repr(text)
        assert os.listdir(trial.folder) == ["source"]
        return "told in one line"
    assert code == 0, said.getvalue()
    with Reader(out) as reader:
        assert set(reader.names) == {path.relative_to(root).as_posix() for path in paths}
        for index, name in enumerate(reader.names):
            data = (root / name).read_bytes()
            check_payload(reader, index, pillows_pixels(data), data)
    return "written"


def check_payload(reader, index, expected, data):
    """A sample has the expected pixels: exactly where they, or the file's own bytes, are kept. What
    was encoded anew decodes as Pillow decodes it, and is about as far from them as what Pillow
    encodes with this quality."""
    got, payload = reader.decode(index, "image"), reader.read(index, "image")
    if payload == data or payload == expected.tobytes():
        np.testing.assert_array_equal(got, expected)
        return
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got, pillows_pixels(payload))
    again = io.BytesIO()
    Image.fromarray(expected).save(again, "JPEG", quality=QUALITY, subsampling="4:2:0")
    assert error_of(got, expected) <= error_of(pillows_pixels(again.getvalue()), expected) + 1


def error_of(pixels, expected):
    """The mean absolute difference, in levels."""
    return np.abs(pixels.astype(int) - expected).mean()


def damaged(random):
    """(bytes, kind) of an image with some bits, bytes or runs changed, or its end cut."""
    kind = str(random.choice(KINDS))
    data = bytearray(image_bytes(random, kind))
    for _ in range(int(random.integers(1, 9))):
        at = int(random.integers(len(data)))
        if random.integers(2):
            at = int(random.integers(min(len(data), 64)))  # headers, where lengths and sizes are
        data[at] = int(random.integers(256)) if random.integers(2) else data[at] ^ 1 << at % 8
    if not random.integers(6):
        del data[int(random.integers(len(data))) :]
    return bytes(data), kind


@fault("damaged images", quick=25, full=2000, limit_s=30)
def damaged_image(trial):
    """In every mode of writing, the writer refuses an image with random damage in one line, or
    writes the pixels that Pillow reads: exactly where pixels or bytes are kept, else as well as a
    JPEG can."""
    data, kind = damaged(trial.random)
    outcomes = Counter()

    def write_in_all_modes():
        for mode in MODES:
            outcomes[f"{kind}: {write_damaged(trial.folder / 'a.beton', data, mode)}"] += 1

    with quiet_descriptor():
        with_limited_memory(MEMORY_BYTES, write_in_all_modes)
    return outcomes


def write_damaged(path, data, mode):
    """Write an image in a mode: "refused", or "written" with the pixels that Pillow reads."""
    writer = DatasetWriter(path, {"image": RGBImageField(mode)}, num_workers=1)
    try:
        writer.from_indexed_dataset([(EncodedImage(data),)])
    except BetonError as error:
        assert "sample 0" in str(error) and len(str(error).splitlines()) == 1
        assert " at 0x" not in str(error), error
        return "refused"
    with Reader(path) as reader:
        if "original bytes kept" in writer.counts["image"]:
            assert reader.read(0, "image") == data
        check_payload(reader, 0, pillows_pixels(data), data)
    return "written"


@contextlib.contextmanager
def quiet_descriptor():
    """Fail if a decoder's C code prints on stderr, past Python."""
    sys.stderr.flush()
    kept, (receiver, sender) = os.dup(2), os.pipe()
    os.dup2(sender, 2)
    os.close(sender)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.set_blocking(receiver, False)
        said = os.read(receiver, 2000)
        os.close(receiver)
    assert said == b"", said
