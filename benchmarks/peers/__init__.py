"""What is measured against what: each peer renders augmented views of the same JPEGs with the same
probabilities.

A peer is a class with `name`, `columns` (the recipes it can do), `setup(files, column, threads)`,
`run() -> images` (one pass over all images), `sample() -> uint8 (N, H, W, 3)` (some of its views,
to compare distributions) and `close()`.
"""

from benchmarks.peers.bare import BareDecode
from benchmarks.peers.dali import Dali
from benchmarks.peers.ffcv import Ffcv
from benchmarks.peers.ours import Ours
from benchmarks.peers.torchvision import TorchvisionV1, TorchvisionV2

PEERS = (BareDecode, Ours, TorchvisionV1, TorchvisionV2, Dali, Ffcv)
__all__ = ["PEERS"]
