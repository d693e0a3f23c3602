"""What a GPU needs of its machine: cores for the loader, and memory for a step.

    python -m benchmarks.scaling --root PHOTOGRAPHS --results benchmarks/results/scaling.json

CPU time per image of the loader at several resolutions, with one thread, interleaved: the least of
several passes, since other programs only add to it. And the bytes that a forward pass in bf16 keeps
for its backward pass, counted on the CPU: the larger part of a step's memory on a GPU. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import simplejpeg
import torch

import train
from benchmarks.loader import machine
from benchmarks.photographs import write_photographs
from benchmarks.record import write_record
from ffcv_ssl import Loader, Reader
from ffcv_ssl.training.models import Model
from ffcv_ssl.transforms import ToTensor

SIDES_PX = (224, 192, 160, 128, 96)
MEMORY_SIDES_PX = (224, 160, 96)
RECIPES = ("simclr", "ffcv_ssl")
RUNS = 8


def cpu_ms(path: str) -> dict[str, dict[str, float]]:
    """{recipe: {side: milliseconds of CPU time per image, two views}}: up to the uint8 views, which
    a GPU copies and normalises. "decode": of the bare decoding alone."""
    with Reader(path) as reader:
        payloads = [reader.read(i, "image") for i in range(reader.num_samples)]
    decode = []
    loaders: dict[tuple[str, int], Loader] = {}
    for recipe in RECIPES:
        views = train.read_config([f"--views.recipe={recipe}"]).views.resolve()
        for px in SIDES_PX:
            ops = train.make_views(views, px)
            pipelines = {name: ("image", [*ops[name], ToTensor()]) for name in ops}
            loaders[recipe, px] = Loader(
                path, 64, num_workers=1, seed=0, drop_last=False, pipelines=pipelines
            )
    costs: dict[tuple[str, int], list[float]] = {case: [] for case in loaders}
    for _ in range(RUNS + 1):  # the first one loads kernels
        began = time.process_time()
        for payload in payloads:
            simplejpeg.decode_jpeg(payload)
        decode.append(1e3 * (time.process_time() - began) / len(payloads))
        for case, loader in loaders.items():
            began = time.process_time()
            images = sum(len(batch.indices) for batch in loader)
            costs[case].append(1e3 * (time.process_time() - began) / images)
    for loader in loaders.values():
        loader.close()
    found = {
        recipe: {str(px): round(min(costs[recipe, px][1:]), 3) for px in SIDES_PX}
        for recipe in RECIPES
    }
    return {"decode": {"whole": round(min(decode[1:]), 3)}, **found}


def kept_bytes(model: Model, px: int, batch: int) -> int:
    """Bytes that a forward pass of two views in bf16 keeps for the backward pass, without the
    model's own weights."""
    model = model.to(memory_format=torch.channels_last).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that it stays
        return tensor

    views = [torch.randn(batch, 3, px, px).contiguous(memory_format=torch.channels_last)] * 2
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(views)
    del outputs
    return sum(nbytes for _, nbytes in storages.values())


def memory_mib() -> dict[str, dict[str, float]]:
    """{"backbone projector": {side: MiB per image of two views}}, and MiB of weights."""
    found: dict[str, dict[str, float]] = {}
    for backbone, projector in (("resnet50", "2048-512"), ("resnet50", "8192-8192-8192")):
        config = train.read_config(
            [f"--model.backbone={backbone}", f"--model.projector={projector}"]
        )
        model = Model(config.model)
        entry = {}
        for px in MEMORY_SIDES_PX:
            few, more = (kept_bytes(model, px, batch) for batch in (2, 4))
            entry[str(px)] = round((more - few) / 2 / 2**20, 1)
        entry["weights_mib"] = round(sum(4 * p.numel() for p in model.parameters()) / 2**20, 1)
        found[f"{backbone}, projector {projector}"] = entry
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of photographs")
    parser.add_argument("--limit", type=int, default=256, help="photographs at most")
    parser.add_argument("--results", help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "photographs.beton")
        write_photographs(options.root, path, options.limit)
        record = {
            "benchmark": "scaling", "date": time.strftime("%Y-%m-%d"), "machine": machine(1),
            "loader_cpu_ms": cpu_ms(path), "kept_mib_per_image": memory_mib(),
        }  # fmt: skip
    write_record(record, options.results)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
