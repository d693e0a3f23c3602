"""Tiny fine-tunings and chains that trials end, and what undisturbed ones leave."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.states import equal_states
from support.tuning_files import (
    NUM_CLASSES,
    alone,
    parse,
    records,
    tiny_encoder,
    without_clock,
    write_coloured,
)

from ffcv_ssl.errors import Interrupted
from ffcv_ssl.evaluation import protocol_run
from ffcv_ssl.evaluation.protocols import finetune, transfer
from ffcv_ssl.jobs import chain
from ffcv_ssl.training.command import EXIT_INTERRUPTED, StopSignal
from torture.processes import begin, cellar, wait_for
from torture.runs import LONGER, TINY, images, metrics_in, run_ahead, trained_state

# ---- Fine-tuning ---------------------------------------------------------------------------------

PROTOCOLS = {
    "finetune": (finetune.FineTuneConfig, finetune.run, {"epochs": 3, "optim__lr": 0.5}),
    "transfer": (
        transfer.TransferConfig,
        transfer.run,
        {"steps": 8, "grid__lrs": "[0.01, 0.3]", "grid__weight_decays": "[0]"},
    ),
}


@functools.cache
def coloured() -> dict[str, str]:
    """Files of labelled images whose colour tells their class."""
    return {
        f"data__{part}": write_coloured(cellar() / f"c_{part}.beton", np.arange(n) % NUM_CLASSES)
        for part, n in (("train", 120), ("val", 60))
    }


def tune(protocol: str, out: Path, **settings: Any) -> int:
    """The run of a protocol in this process, with an encoder of a thousand weights."""
    config_class, function, usual = PROTOCOLS[protocol]
    protocol_run.open_encoder = lambda config, world: tiny_encoder()
    config = parse(config_class, **usual, **coloured(), out=out, **settings)
    torch.set_num_threads(1)
    with StopSignal() as stop:
        try:
            record = function(config, alone(), stop)
        except Interrupted:
            return EXIT_INTERRUPTED
    kept = without_clock(record)
    del kept["settings"]["saving"]  # how often it is saved is drawn
    (out / "record").write_text(json.dumps(kept, sort_keys=True, default=str))
    return 0


def tuned(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a finished run of a protocol leaves: its result and its metrics."""
    return (out / "record").read_text(), records(out)


@functools.cache
def undisturbed_tuning(protocol: str) -> tuple[tuple[str, list[dict[str, Any]]], float]:
    """What a run of a protocol leaves that nothing ended, and how long it took."""
    out, log = cellar() / protocol, cellar() / f"{protocol}.log"
    coloured()
    run_ahead()
    began = time.monotonic()
    assert wait_for(begin(lambda: tune(protocol, out), log)) == 0, log.read_text()[-2000:]
    return tuned(out), time.monotonic() - began


# ---- Chains --------------------------------------------------------------------------------------


def begin_chain(folder: Path, log: Path) -> int:
    """Fork a chain, the leader of a group with its stages; its id."""
    words = chain_words(folder)
    return begin(lambda: chain.main(words), log)


def chain_words(folder: Path) -> list[str]:
    """The words of a chain that pretrains and then fits a probe, in `folder/out`."""
    usual = {**TINY, **LONGER, **images(), "checkpoint.every_minutes": 1e-6}
    probe = {
        "checkpoint": "{pretrain}", **images(), "data.num_workers": 1, "system.device": "cpu",
        "system.torch_threads": 1,
    }  # fmt: skip
    stages = {
        "pretrain": {"command": "train", "overrides": usual},
        "probe": {"command": "knn", "overrides": probe},
    }
    path = folder / "chain.yaml"
    path.write_text(json.dumps({"out": str(folder / "out"), "stages": stages}))
    return [str(path)]


def check_chain(folder: Path) -> None:
    """Whether a chain left the results of an undisturbed one, in each of its stages."""
    expected, _ = undisturbed_chain()
    assert equal_states(chain_results(folder), expected), "the results differ"


def chain_results(folder: Path) -> dict[str, Any]:
    """What the stages of a chain leave."""
    out = folder / "out"
    pretrained = {"metrics": records(out / "pretrain"), "state": trained_state(out / "pretrain")}
    return {**pretrained, "probe": metrics_in(out / "probe")}


@functools.cache
def undisturbed_chain() -> tuple[dict[str, Any], float]:
    """What a chain leaves that nothing ended, and how long it took."""
    folder = cellar() / "chain"
    folder.mkdir()
    images()
    began, log = time.monotonic(), folder / "log"
    assert wait_for(begin_chain(folder, log)) == 0, log.read_text()[-2000:]
    return chain_results(folder), time.monotonic() - began
