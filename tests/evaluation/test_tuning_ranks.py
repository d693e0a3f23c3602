"""Fine-tuning and transfer on several ranks: the numbers of one rank, and one stop for all."""

import copy
import json

import numpy as np
import pytest
import torch
from support.forked import start_ranks
from support.process_limits import free_port
from support.tuning_files import (
    NUM_CLASSES,
    StopAfter,
    alone,
    parse,
    records,
    tiny_encoder,
    without_clock,
    write_coloured,
)
from torch import nn

from ffcv_ssl.errors import Interrupted
from ffcv_ssl.evaluation import protocol_run
from ffcv_ssl.evaluation.protocols import finetune, transfer
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole

PROTOCOLS = {
    "finetune": (finetune.FineTuneConfig, finetune.run),
    "transfer": (transfer.TransferConfig, transfer.run),
}

SETTINGS = {
    "finetune": {"epochs": 4, "optim__lr": 0.5, "depth": "backbone"},
    "transfer": {"steps": 11, "grid__lrs": "[0.01, 0.3]", "grid__weight_decays": "[0.001]"},
}


def encoder_without_norm(config, world):
    """On the CPU each rank would have batch statistics of its own."""
    encoder = copy.deepcopy(tiny_encoder())
    encoder.model.backbone[1] = nn.Identity()
    return encoder


def run(protocol, folder, world, stop=None):
    """The record of a run in `folder`/out, or "interrupted"."""
    config_class, function = PROTOCOLS[protocol]
    files = {f"data__{part}": folder / f"{part}.beton" for part in ("train", "val")}
    settings = {**files, "log__every_steps": 1, **SETTINGS[protocol]}
    try:
        return function(
            parse(config_class, out=folder / f"{protocol}{world.size}", **settings), world, stop
        )
    except Interrupted:
        return "interrupted"


def rank_main(rank, size, port, folder):
    """What each rank does: both protocols; fine-tuning is stopped first, by the last rank alone."""
    torch.set_num_threads(1)
    protocol_run.open_encoder = encoder_without_norm
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = World.join("cpu", 1, {name: str(value) for name, value in launcher.items()})
    stop = StopAfter(3 if rank == size - 1 else 10**6)
    found = [run("finetune", folder, world, stop)]
    found += [run(protocol, folder, world) for protocol in PROTOCOLS]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    world.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data and the runs of two ranks; the validation file makes uneven parts."""
    folder = tmp_path_factory.mktemp("ranks")
    write_coloured(folder / "train.beton", np.arange(100) % NUM_CLASSES)
    write_coloured(folder / "val.beton", np.arange(47) % NUM_CLASSES)
    start_ranks(rank_main, (2, free_port(), folder), 2)
    return folder


def found_by(folder, rank):
    return json.loads((folder / f"rank{rank}.json").read_text())


def test_a_stop_on_one_rank_ends_all_of_them(folder):
    assert found_by(folder, 0)[0] == found_by(folder, 1)[0] == "interrupted"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_ranks_train_and_measure_as_one(folder, protocol, monkeypatch):
    monkeypatch.setattr(protocol_run, "open_encoder", encoder_without_norm)
    one = run(protocol, folder, alone())
    first, second = (found_by(folder, rank)[1 + list(PROTOCOLS).index(protocol)] for rank in (0, 1))
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["top1"] == pytest.approx(one["metrics"]["top1"], abs=0.03)
    assert len(without_clock(first)["metrics"]["per_class"]) == NUM_CLASSES
    losses = [
        [r["train/loss"] for r in records(folder / f"{protocol}{size}") if "train/loss" in r]
        for size in (1, 2)
    ]
    assert len(losses[0]) == len(losses[1]) > 10
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-5)


def test_a_result_is_reported_once(folder):
    for protocol in PROTOCOLS:
        lines = (folder / f"{protocol}2" / "results.jsonl").read_text().splitlines()
        assert len(lines) == 1 and json.loads(lines[0])["protocol"] == protocol
