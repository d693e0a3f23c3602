"""Bits flipped in the files of this library's own kernels: the same pixels, no dead process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.small_files import write_small

from ffcv_ssl.kernels import compile as compiling

pytestmark = [pytest.mark.whole, pytest.mark.slow]

# Each load is made by a process forked from this one, which has started no thread yet.
FLIP = """
import hashlib, json, os, random, sys
import torch
from ffcv_ssl import Loader
from ffcv_ssl.kernels import cache_files
from ffcv_ssl.transforms import RandomHorizontalFlip, RandomResizedCrop, ToTensor

path = sys.argv[1]
read, used = cache_files._read, []

def noted(file):
    used.append(file)
    return read(file)

cache_files._read = noted

def load():
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        ops = [RandomResizedCrop(8), RandomHorizontalFlip(), ToTensor()]
        with Loader(path, 4, num_workers=1, seed=3, pipelines={"image": ops}) as loader:
            pixels = next(iter(loader)).image.numpy().tobytes()
        found = [hashlib.sha256(pixels).hexdigest(), sorted({f for f in used if read(f)})]
        os.write(send, json.dumps(found).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as answer:
        text = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the process ended with {code}"
    return json.loads(text)

draw = random.Random(0)
right, files = load()
assert len(files) % 2 == 0  # code and index of each kernel
kernels = [files[k : k + 2] for k in range(0, len(files), 2)]
kernels.sort(key=lambda pair: sum(map(os.path.getsize, pair)))
# the code of one kernel, the index of another; the smallest, as the largest compiles for 40 s
for file in [kernels[0][0], kernels[1][1]]:
    damaged = bytearray(open(file, "rb").read())
    bit = draw.randrange(8 * len(damaged))
    damaged[bit // 8] ^= 1 << bit % 8
    open(file, "wb").write(damaged)
    assert load()[0] == right, f"{file}, bit {bit}: other pixels"
    assert read(file), f"{file}, bit {bit}: not mended"
print(json.dumps([os.path.basename(file) for file in files]))
"""


def test_a_flipped_bit_in_a_file_of_the_real_kernels_costs_a_compilation_only(tmp_path):
    path = write_small(tmp_path / "a.beton", 4)
    ordinary = compiling.cache_folder()
    copy = tmp_path / "cache" / os.path.basename(ordinary)
    if os.path.isdir(ordinary):
        shutil.copytree(ordinary, copy)
    environment = {**os.environ, "FFCV_SSL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FLIP, str(path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names = json.loads(ran.stdout)
    assert len(names) >= 6 and {name[-4:] for name in names} == {".nbi", ".nbc"}
    assert any("hash" in name for name in names) and any("pipeline" in name for name in names)
