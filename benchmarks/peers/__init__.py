"""What is measured against what: each peer renders augmented views of the same JPEGs with the same
probabilities.

A peer is a class with `name`, `columns` (the recipes it can do), `setup(files, column, threads)`,
`run() -> images` (one pass over all images), `sample() -> uint8 (N, H, W, 3)` (some of its views,
to compare distributions) and `close()`.
"""

from benchmarks.peers.bare import BareDecode, OurBareDecode
from benchmarks.peers.dali import Dali, DaliFused
from benchmarks.peers.ffcv import Ffcv
from benchmarks.peers.ours import Ours, OursWithSimplejpeg
from benchmarks.peers.torchvision import TorchvisionV1, TorchvisionV2

PEERS = (
    BareDecode, OurBareDecode, Ours, OursWithSimplejpeg, TorchvisionV1, TorchvisionV2, Dali,
    DaliFused, Ffcv,
)  # fmt: skip
__all__ = ["PEERS"]
