"""Hostile files: fuzzed and mutated data, checkpoints, YAML, label lists and metrics.

Reading a mutant may take a bounded amount of memory only. In a whole run the kernels check every
index (NUMBA_BOUNDSCHECK); `--quick` takes the ordinary ones, which are compiled already.
"""

from __future__ import annotations

import contextlib
import os

from torture import frame

if not frame.IS_QUICK:
    os.environ.setdefault("NUMBA_BOUNDSCHECK", "1")  # before numba is imported

import functools
import importlib.util
import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import torch
from safetensors.torch import save_file
from support.process_limits import with_limited_memory
from support.small_files import REPOSITORY

from ffcv_ssl import Loader
from ffcv_ssl.config.yaml_layers import read_layers
from ffcv_ssl.errors import BetonError, CheckpointError, FfcvSslError, UserError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.label_choice import choose_labels
from ffcv_ssl.training.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from torture import values
from torture.failing_reads import (
    try_custom_fields,
    try_failing_read,
    try_no_file,
    try_wrong_questions,
)
from torture.frame import Trial, fault
from torture.mutants import Mutant, try_many
from torture.processes import folder_in_memory
from torture.seeds import make_seeds
from torture.text_mutants import damaged_bytes, mutated_text

LIMIT_BYTES = 256 << 20
"""Of memory that writing and reading a value may take: Pillow's own formats are not bounded."""


def at_random(trial: Trial) -> random.Random:
    return random.Random(int(trial.random.integers(2**62)))


@functools.cache
def seeds():
    return make_seeds(folder_in_memory())


def is_one_line(error: Exception) -> str:
    text = str(error)
    assert text and "\n" not in text and len(text) < 3000, f"not one short line: {text!r}"
    return "refused"


@fault("mutated .beton files", quick=1, full=205, limit_s=600)
def beton_files(trial: Trial) -> Counter:
    """Of small files of every kind, changed anywhere, half of them with checksums that are right
    for the change: a BetonError, or exactly the values that other programs read from the same
    bytes. Reading one takes no more memory than its size allows."""
    return try_many(seeds(), 2000, at_random(trial))


@fault("mutated .beton files through a loader", quick=1, full=13, limit_s=1800)
def beton_files_loaded(trial: Trial) -> Counter:
    """An epoch of a mutant ends, in batches, in a BetonError of one line, or in a ValueError of one
    line where a pipeline does not fit the field any more."""
    # the first trial of a machine compiles kernels that check: 40 s of an idle core
    outcomes: Counter = Counter()
    chosen, sound = at_random(trial), [seed for seed in seeds() if len(seed.values) < 50]
    for _ in range(100 if trial.quick else 400):
        seed = chosen.choice(sound)
        Mutant(seed, chosen.randbytes(96)).apply()
        try:
            settings = {"pipelines": seed.crops, "drop_last": False}
            with Loader(seed.path, 3, num_workers=1, seed=1, **settings) as loader:
                assert sum(int(batch.valid.sum()) for batch in itertools.islice(loader, 30))
            outcomes["loaded"] += 1
        except (BetonError, ValueError) as error:
            outcomes[is_one_line(error)] += 1
        finally:
            seed.restore()
    return outcomes


@fault("reads that fail", quick=1, full=20)
def failing_reads(trial: Trial) -> Counter:
    """Where a read of a sound file fails, gives less than was asked, or finds the file cut: a
    BetonError, or the right values; short reads go on to the right values."""
    chosen, sound = at_random(trial), [seed for seed in seeds() if len(seed.values) < 50]
    try_no_file(trial.folder)
    for seed in sound:
        try_wrong_questions(seed)
        try_custom_fields(seed)
    return Counter(
        try_failing_read(chosen.choice(sound), chosen) for _ in range(200 if trial.quick else 500)
    )


@fault("mutated values for the writer", quick=1, full=50)
def written_values(trial: Trial) -> Counter:
    """A field refuses settings or a value by ValueError or TypeError, or what it stores is read
    back as it was given, by the reader and by the loader's decoder; so are samples' names."""
    chosen = at_random(trial)
    return with_limited_memory(
        LIMIT_BYTES,
        lambda: Counter(
            [values.try_value(chosen) for _ in range(400)]
            + [values.try_names(chosen) for _ in range(20)]
        ),
    )


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    """A run's checkpoint and the weights of a network, small."""
    folder = folder_in_memory()
    state = {
        "step": 5, "model": {"a.weight": torch.arange(24.0).reshape(4, 6), "b": torch.zeros(3)},
        "config": {"out": "runs/x", "model": {"backbone": "tiny"}}, "list": [1, 2.5, None, "x"],
    }  # fmt: skip
    checkpoint.save(folder / "a.pt", state)
    save_file({k: v.clone() for k, v in state["model"].items()}, folder / "a.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@fault("damaged checkpoints", quick=1, full=14, limit_s=600)
def checkpoints(trial: Trial) -> Counter:
    """A damaged checkpoint, or file of weights, is refused in one line, or loads as a dict."""
    from ffcv_ssl.evaluation.encoder import load_encoder  # slow to import

    chosen, outcomes = at_random(trial), Counter()
    for _ in range(100 if trial.quick else 500):
        name, content = chosen.choice(sorted(checkpoint_files().items()))
        path = trial.folder / name
        path.write_bytes(damaged_bytes(content, chosen))
        for load in (checkpoint.load, load_encoder):
            if load is checkpoint.load and path.suffix == ".safetensors":
                continue
            try:
                load(path)
                outcomes["loaded"] += 1
            except (CheckpointError, UserError) as error:
                outcomes[is_one_line(error)] += 1
    return outcomes


@functools.cache
def yaml_texts() -> list[str]:
    folder = REPOSITORY / "configs"
    texts = [path.read_text() for path in sorted(folder.rglob("*.yaml"))]
    return [text for text in texts if "base:" not in text][:10]


@fault("mutated configurations", quick=1, full=50, limit_s=600)
def configurations(trial: Trial) -> Counter:
    """A YAML file of any content gives settings, or a ValueError of one line; with the settings'
    own checks behind it, which are slow, so only every tenth file gets there, a configuration or a
    UserError of one line."""
    import train  # slow to import

    chosen, outcomes = at_random(trial), Counter()
    path = trial.folder / "a.yaml"
    for number in range(20 if trial.quick else 200):
        text = mutated_text(chosen.choice(yaml_texts()), chosen)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            if number % 10 == 0:
                with contextlib.redirect_stderr(None):
                    train.read_config(["--config", str(path), "--data.train", "a.beton"])
                outcomes["a configuration"] += 1
            else:
                assert isinstance(read_layers(str(path)), list)
                outcomes["settings"] += 1
        except (UserError, ValueError) as error:
            assert number % 10 or isinstance(error, UserError), f"no UserError: {error!r}"
            outcomes[is_one_line(error)] += 1
    return outcomes


@fault("mutated label lists", quick=1, full=40)
def label_lists(trial: Trial) -> Counter:
    """A list of labelled samples is refused in one line, or chooses labels of the data."""
    chosen, outcomes = at_random(trial), Counter()
    labels = np.arange(40) % 4
    labels[7] = -1
    names = [f"c{index % 4}/image {index}.jpg" for index in range(40)]
    path = trial.folder / "list.txt"
    sound = ["0\n5\n9\n# a comment\n12\n", "".join(f"{name}\n" for name in names[8:20])]
    for _ in range(500):
        content = damaged_bytes(chosen.choice(sound).encode(), chosen)
        path.write_bytes(content)
        try:
            kept = choose_labels(labels, 4, "file", file=str(path), names=names)
            assert ((kept == -1) | (kept == labels)).all() and (kept >= 0).any()
            outcomes["read"] += 1
        except UserError as error:
            outcomes[is_one_line(error)] += 1
    return outcomes


@fault("damaged metrics", quick=1, full=40)
def metrics(trial: Trial) -> Counter:
    """Of a damaged metrics.jsonl, the whole lines are read, and a run goes on behind them."""
    chosen, outcomes = at_random(trial), Counter()
    records = [{"epoch": k / 4, "step": k, "train/loss": 1 / (k + 1)} for k in range(12)]
    sound = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = trial.folder / METRICS_FILE
    for _ in range(500):
        path.write_bytes(damaged_bytes(sound, chosen))
        read = read_metrics(trial.folder)
        assert all(isinstance(record["step"], int) for record in read)
        outcomes["all lines" if read == records else "other lines"] += 1
        try:
            log = MetricsLog(trial.folder, last_step=6, tensorboard=False)
        except FfcvSslError as error:
            outcomes[is_one_line(error)] += 1
            continue
        log.write({"step": 7, "train/loss": 0.5})
        log.close()
        assert read_metrics(trial.folder)[-1] == {"step": 7, "train/loss": 0.5}
    return outcomes


@fault("branches that these trials take", quick=1, full=1, limit_s=1800)
def branches(trial: Trial) -> str | dict[str, float]:
    """A few trials of these rows take at least 95 % of the branches of the reader, the layout and
    the fields."""
    if trial.quick or importlib.util.find_spec("coverage") is None:
        return "not measured: needs a whole run and the package coverage"
    command = [sys.executable, "-m", "torture.fuzz", "--coverage"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    share = json.loads(ran.stdout.splitlines()[-1])["share"]
    assert share >= 0.95, f"{share:.1%} of the branches"
    return {"share of branches": round(share, 3)}
