"""Hand-over to a CUDA device: what the consumer sees is complete, and a slot is not reused while it
is being copied."""

import numpy as np
import pytest
import torch
from support.loading import digest, make_loader, view

from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.loader.device import Delivery
from ffcv_ssl.transforms import NormalizeImage, Squeeze, ToDevice, ToTensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
MEAN, STD = np.array([120.0, 110.0, 100.0]), np.array([60.0, 55.0, 50.0])
_DELAY_CYCLES = 20_000_000  # some 10 ms of a copy stream


def pipelines(device, normalize=False):
    ops = [*view(32), ToDevice(device)]
    if normalize:
        ops.append(NormalizeImage(MEAN, STD, np.float32))
    label = [IntDecoder(), ToTensor(), Squeeze(), ToDevice(device)]
    return {"view_0": ("image", ops), "view_1": ("image", list(ops)), "label": label}


def digests(path, device, **arguments):
    with make_loader(path, 8, pipelines=pipelines(device), **arguments) as loader:
        return [digest(batch.view_1.cpu()) for _ in range(3) for batch in loader]


def test_without_a_cuda_device_the_loader_says_so(small_beton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        make_loader(small_beton, pipelines=pipelines("cuda"))


def test_two_devices_in_one_loader_are_refused(small_beton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    two = {
        "a": ("image", [*view(32), ToDevice("cuda:0")]),
        "b": ("image", [*view(32), ToDevice("cuda:1")]),
    }
    with pytest.raises(ValueError, match="got ToDevice for cuda:0, cuda:1, expected one device"):
        make_loader(small_beton, pipelines={**two, "label": None})


@pytest.mark.gpu
@needs_gpu
def test_all_epochs_share_one_copy_stream_and_memory_stays(raw_beton):
    with make_loader(raw_beton, 8, pipelines=pipelines("cuda")) as loader:
        reserved, streams = [], set()
        for _ in range(6):
            for batch in loader:
                batch.view_0.float().mean()
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
            streams.add(loader._shared.copy_stream)
    assert len(streams) == 1 and reserved[-1] == reserved[1]


@pytest.mark.gpu
@needs_gpu
def test_batches_on_the_device_equal_those_on_the_cpu(raw_beton):
    assert digests(raw_beton, "cuda") == digests(raw_beton, "cpu")


@pytest.mark.gpu
@needs_gpu
def test_the_consumer_never_sees_an_unfinished_copy(raw_beton, monkeypatch):
    """Every copy is held up on its stream; without the wait for its event, old memory would
    show."""
    expected = digests(raw_beton, "cpu")
    original = Delivery._stream_on

    def delayed(self, device):
        stream = original(self, device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_DELAY_CYCLES)
        return stream

    monkeypatch.setattr(Delivery, "_stream_on", delayed)
    found = []
    with make_loader(raw_beton, 8, pipelines=pipelines("cuda"), batches_ahead=1) as loader:
        for _ in range(3):
            for batch in loader:
                found.append(batch.view_1.clone())  # on the current stream, without a sync
                batch.view_1.zero_()
    assert [digest(views.cpu()) for views in found] == expected


@pytest.mark.gpu
@needs_gpu
def test_normalization_runs_on_the_device_and_equals_the_cpus(raw_beton):
    batches = []
    for device in ("cpu", "cuda"):
        with make_loader(raw_beton, 8, pipelines=pipelines(device, normalize=True)) as loader:
            batch = next(iter(loader))
            assert batch.view_0.device.type == device and batch.view_0.dtype == torch.float32
            batches.append(batch.view_0.cpu())
    assert torch.allclose(*batches, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_slots_are_page_locked_and_their_number_stays(raw_beton):
    with make_loader(raw_beton, 8, pipelines=pipelines("cuda"), batches_ahead=2) as loader:
        for _ in range(4):
            for batch in loader:
                batch.view_0.float().mean()
        torch.cuda.synchronize()
        assert loader.stats["slots"] <= 2 + 2 + 1
