"""What ops refuse, and the line that says so."""

import numpy as np
import pytest
import torch

from ffcv_ssl import transforms as t
from ffcv_ssl.transforms.gaussian_blur import GaussianBlur
from ffcv_ssl.transforms.tensor import torch_dtype
from pipelines.extra_ops import parse_extra_ops

RANGE = r"must be \(min, max\) with"
REFUSED = [
    (lambda: t.RandomResizedCrop(0), r"RandomResizedCrop: output_size is 0, must be pixels or "),
    (
        lambda: t.CenterCrop((3, 70000)),
        r"CenterCrop: output_size is \(3, 70000\), must be pixels or ",
    ),
    (lambda: t.CenterCrop("x"), r"must be pixels or \(height, width\), 1 to 65535"),
    (
        lambda: t.RandomResizedCrop(8, scale=(0.5, 0.1)),
        rf"RandomResizedCrop: scale is \(0.5, 0.1\), {RANGE} 0.0 <= min <= max <= 1.0",
    ),
    (lambda: t.RandomResizedCrop(8, ratio=1), f"RandomResizedCrop: ratio is 1, {RANGE}"),
    (lambda: t.RandomResizedCrop(8, scale=(0, float("nan"))), f"scale is .*nan.*, {RANGE}"),
    (
        lambda: t.RandomResizedCrop(8, scale=(0, 0)),
        r"RandomResizedCrop: scale is \(0, 0\), max must be above 0",
    ),
    (
        lambda: t.RandomResizedCrop(8, interpolation="lanczos"),
        "RandomResizedCrop: interpolation is 'lanczos', must be one of bilinear",
    ),
    (
        lambda: t.RandomHorizontalFlip(1.5).constants(),
        r"RandomHorizontalFlip: flip_prob is 1.5, must be a probability in \[0, 1\]",
    ),
    (
        lambda: GaussianBlur(0.5, 4).constants(),
        "GaussianBlur: kernel_size is 4, must be an odd number of taps, 1 to 9999",
    ),
    (
        lambda: t.NormalizeImage([1, 2], [1, 2, 3]),
        r"NormalizeImage: got mean \[1.0, 2.0\] and std \[1.0, 2.0, 3.0\], expected one number per "
        "channel in each, and std above 0",
    ),
    (
        lambda: t.NormalizeImage([1], [0]),
        r"NormalizeImage: got mean \[1.0\] and std \[0.0\], expected",
    ),
    (
        lambda: t.NormalizeImage([1], [1])(np.zeros((2, 4, 4, 3), np.uint8)),
        r"NormalizeImage: got 3 channels \(shape \(2, 4, 4, 3\)\), expected 1, the length of mean",
    ),
    (
        lambda: t.ToTorchImage()(torch.zeros(2, 3)),
        r"ToTorchImage: got shape \(2, 3\), expected \(N, H, W, C\)",
    ),
    (
        lambda: parse_extra_ops(3, ()),
        "extra_ops: got 3, expected a list of {op: file.py:Class}",
    ),
    (lambda: torch_dtype("complex64"), "got 'complex64', expected a dtype that torch has too"),
]


@pytest.mark.parametrize("make, line", REFUSED)
def test_an_op_refuses_settings_and_batches_that_it_cannot_use(make, line):
    with pytest.raises(ValueError, match=line):
        make()
