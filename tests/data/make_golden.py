"""Makes the golden files of this folder. Run by hand only, and only when the format gains
something:

    python tests/data/make_golden.py FFCV_PYTHON      # the interpreter that .ci/install_ffcv prints

golden_ours.beton.gz and golden_ffcv.beton.gz hold the same samples, written by this library and by
ffcv 1.0.2; golden_values.npz holds the values, and what each file's JPEGs decode to. Tests read
them and never write them: a reader that cannot read these files is broken, whatever it reads of
what it wrote itself.
"""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from support.beton_files import make_columns, write_all_fields  # noqa: E402

from ffcv_ssl.reader import Reader  # noqa: E402

NUM_SAMPLES, HEIGHT_PX, WIDTH_PX = 5, 26, 19


def decoded(path):
    """The JPEGs of a file by the accurate DCT, straight from the decoder: uint8 (N, H, W, 3)."""
    with Reader(path) as reader:
        payloads = [reader.read(i, "jpg") for i in range(NUM_SAMPLES)]
    return np.stack([simplejpeg.decode_jpeg(p, "RGB") for p in payloads])


def compress(path, target):
    target.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def main(ffcv_python):
    columns = make_columns(NUM_SAMPLES, HEIGHT_PX, WIDTH_PX)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.savez(folder / "columns.npz", **columns)
        ours, theirs = folder / "ours.beton", folder / "ffcv.beton"
        names = [f"class {i}" for i in range(3)]
        write_all_fields(ours, columns, made={"by": "make_golden", "names": names})
        script = HERE.parent / "interop_ffcv.py"
        command = [ffcv_python, script, "write", folder / "columns.npz", theirs]
        subprocess.run(command, check=True)
        compress(ours, HERE / "golden_ours.beton.gz")
        compress(theirs, HERE / "golden_ffcv.beton.gz")
        pixels = {"jpg_ours": decoded(ours), "jpg_ffcv": decoded(theirs)}
        np.savez_compressed(HERE / "golden_values.npz", **columns, **pixels)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_golden.py FFCV_PYTHON")
    main(sys.argv[1])
