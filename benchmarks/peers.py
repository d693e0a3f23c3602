"""What is measured against what: each peer renders two augmented views of the same JPEGs with the
same probabilities.

A peer is a class with `name`, `columns` (the recipes it can do), `setup(files, recipe, threads)`,
`run() -> images` and
`close()`. One run is one pass over all images; warm-up passes are the caller's business.
"""

import io
import threading

import numpy as np
import simplejpeg

# The cumulative columns of the FFCV-SSL paper's Table 2. Blur stands on view 0 and solarization on
# view 1 in the paper; here every view has every op at these probabilities, which costs more.
COLUMNS = ("crops", "+ blur", "+ grey", "+ solarize", "+ jitter")
SIZE_PX, BATCH_SIZE = 224, 64
FLIP, BLUR, GREY, SOLARIZE, JITTER = 0.5, 0.5, 0.2, 0.2, 0.8
JITTER_STRENGTH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
TAPS, SIGMA = 23, (0.1, 2.0)


def has(column, op):
    """Does the cumulative column include this op?"""
    return COLUMNS.index(column) >= COLUMNS.index(op)


class BareDecode:
    """The floor: every payload of the file decoded once, into a reused buffer, nothing else."""

    name, columns = "bare decode", COLUMNS[:1]

    def setup(self, files, column, threads):
        self.payloads, self.threads = files.payloads, threads
        self.max_bytes = files.max_pixels * 3

    def _decode(self, payloads):
        buffer = np.empty(self.max_bytes, np.uint8)
        for payload in payloads:
            simplejpeg.decode_jpeg(payload, "RGB", buffer=buffer)

    def run(self):
        parts = [self.payloads[i :: self.threads] for i in range(self.threads)]
        workers = [threading.Thread(target=self._decode, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return len(self.payloads)

    def close(self):
        self.payloads = None


class Ours:
    """This library: integrity checks on, on_error='raise'."""

    name, columns = "ffcv-ssl", COLUMNS

    def setup(self, files, column, threads):
        from ffcv_ssl import Loader, OrderOption

        views = {f"view_{i}": ("image", our_ops(column)) for i in range(2)}
        self.loader = Loader(
            files.path,
            BATCH_SIZE,
            num_workers=threads,
            order=OrderOption.RANDOM,
            seed=0,
            pipelines=views,
            drop_last=False,
        )

    def run(self):
        return sum(len(batch.indices) for batch in self.loader)

    def close(self):
        self.loader.close()


def our_ops(column):
    from ffcv_ssl import transforms as t

    ops = [t.RandomResizedCrop(SIZE_PX), t.RandomHorizontalFlip(FLIP)]
    if has(column, "+ jitter"):
        ops.append(t.RandomColorJitter(JITTER, *JITTER_STRENGTH))
    if has(column, "+ grey"):
        ops.append(t.RandomGrayscale(GREY))
    if has(column, "+ blur"):
        ops.append(t.GaussianBlur(BLUR, TAPS, SIGMA))
    if has(column, "+ solarize"):
        ops.append(t.RandomSolarization(SOLARIZE))
    return [*ops, t.ToTensor(), t.ToTorchImage()]


class TorchvisionDataset:
    """The same JPEG bytes, decoded once by Pillow, two views by torchvision's transforms on Pillow
    images."""

    def __init__(self, payloads, transform):
        self.payloads, self.transform = payloads, transform

    def __len__(self):
        return len(self.payloads)

    def __getitem__(self, i):
        from PIL import Image

        image = Image.open(io.BytesIO(self.payloads[i])).convert("RGB")
        return self.transform(image), self.transform(image)


class TorchvisionV1:
    """torchvision's classic transforms and torch's DataLoader, one worker process a thread of
    ours."""

    name, columns = "torchvision + DataLoader", COLUMNS

    def setup(self, files, column, threads):
        import torch

        dataset = TorchvisionDataset(files.payloads, torchvision_ops(column))
        self.loader = torch.utils.data.DataLoader(
            dataset,
            BATCH_SIZE,
            shuffle=True,
            num_workers=threads,
            persistent_workers=True,
            prefetch_factor=3,
        )

    def run(self):
        return sum(len(first) for first, _ in self.loader)

    def close(self):
        del self.loader


def torchvision_ops(column):
    from torchvision import transforms as t

    ops = [t.RandomResizedCrop(SIZE_PX), t.RandomHorizontalFlip(FLIP)]
    if has(column, "+ jitter"):
        ops.append(t.RandomApply([t.ColorJitter(*JITTER_STRENGTH)], p=JITTER))
    if has(column, "+ grey"):
        ops.append(t.RandomGrayscale(GREY))
    if has(column, "+ blur"):
        ops.append(t.RandomApply([t.GaussianBlur(TAPS, SIGMA)], p=BLUR))
    if has(column, "+ solarize"):
        ops.append(t.RandomSolarize(128, p=SOLARIZE))
    return t.Compose([*ops, t.PILToTensor()])


PEERS = (BareDecode, Ours, TorchvisionV1)
