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
import re
import subprocess
import sys
from collections import Counter

from support.process_limits import with_limited_memory
from support.small_files import REPOSITORY

from ffcv_ssl.config.yaml_layers import read_layers
from ffcv_ssl.errors import UserError
from torture import values
from torture.failing_reads import (
    try_custom_fields,
    try_failing_read,
    try_no_file,
    try_wrong_questions,
)
from torture.frame import Trial, choices_of, fault
from torture.mutant_trials import try_loaded_mutant, try_many
from torture.processes import folder_in_memory, one_line
from torture.seeds import make_seeds
from torture.text_mutants import mutated_text
from torture.text_readings import try_label_list, try_metrics

LIMIT_BYTES = 256 << 20
"""Of memory that writing and reading a value may take: Pillow's own formats are not bounded."""


EXECUTIONS, SEARCH_S = 20_000, 1200
"""Of the coverage-guided search, at most: they take 4 minutes on an idle core."""


@functools.cache
def seeds():
    return make_seeds(folder_in_memory())


@fault("mutated .beton files", quick=1, full=260, limit_s=600)
def beton_files(trial: Trial) -> Counter:
    """A small file of any kind, changed anywhere, half of them with checksums that are right for
    the change, is refused by a BetonError, or gives exactly the values, names and counts that other
    programs read from the same bytes. Reading one takes no more memory than its size allows."""
    return try_many(seeds(), 2000, choices_of(trial))


@fault("mutated .beton files through a loader", quick=1, full=100, limit_s=1800)
def beton_files_loaded(trial: Trial) -> Counter:
    """An epoch of a mutant has every sample once, with the views that its image, decoded by other
    programs, gives; or it ends in a BetonError of one line, where the file has a cause, or in a
    ValueError of one line, where its fields are others than the pipelines'."""
    # the first trial of a machine compiles kernels that check: 40 s of an idle core
    number = 100 if trial.quick else 500
    return try_many(seeds(), number, choices_of(trial), try_loaded_mutant)


@fault("reads that fail", quick=1, full=20)
def failing_reads(trial: Trial) -> Counter:
    """A read that fails, or finds the file cut from there on, is a BetonError, and all other values
    are right. Reads that give less than was asked change no value."""
    chosen, sound = choices_of(trial), [seed for seed in seeds() if len(seed.values) < 50]
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
    chosen = choices_of(trial)
    return with_limited_memory(
        LIMIT_BYTES,
        lambda: Counter(
            [values.try_value(chosen) for _ in range(400)]
            + [values.try_names(chosen) for _ in range(20)]
        ),
    )


@fault("damaged checkpoints", quick=1, full=40, limit_s=600)
def checkpoints(trial: Trial) -> Counter:
    """A damaged checkpoint, or file of weights that this library or torch.save wrote, is refused
    in one line, or loads exactly as it was written: as a state, and as a network."""
    from torture.weights import try_checked  # slow to import

    chosen, number = choices_of(trial), 100 if trial.quick else 500
    return Counter(itertools.chain(*(try_checked(trial.folder, chosen) for _ in range(number))))


@fault("damaged weights without checksums", quick=1, full=10, limit_s=600)
def weights_without_checksums(trial: Trial) -> Counter:
    """A damaged file of weights that has no checksums (another program's .safetensors, torch.save's
    before torch 1.6) is refused in one line, or loads as finite numbers in the network's shapes.
    Nothing can tell that a number in it changed."""
    from torture.weights import try_unchecked  # slow to import

    chosen, number = choices_of(trial), 20 if trial.quick else 500
    return Counter(try_unchecked(trial.folder, chosen) for _ in range(number))


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

    chosen, outcomes = choices_of(trial), Counter()
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
            outcomes[one_line(error)] += 1
    return outcomes


@fault("mutated label lists", quick=1, full=40)
def label_lists(trial: Trial) -> Counter:
    """A damaged list of labelled samples chooses exactly the labels of the samples that it still
    names; it is refused, in one line, only where it names none, one twice, or one without label."""
    chosen = choices_of(trial)
    return Counter(try_label_list(trial.folder, chosen) for _ in range(500))


@fault("damaged metrics", quick=1, full=40)
def metrics(trial: Trial) -> Counter:
    """A damaged metrics.jsonl is read as its whole lines with a step, in order, and nothing else. A
    run that goes on from step 6 keeps these lines up to the last of step 6 or before, and writes
    behind them."""
    chosen = choices_of(trial)
    return Counter(try_metrics(trial.folder, chosen) for _ in range(500))


@fault("branches that these trials take", quick=0, full=1, limit_s=1800)
def branches(trial: Trial) -> dict[str, float]:
    """A few trials of these rows take at least 95 % of the branches of the reader, the layout and
    the fields."""
    assert importlib.util.find_spec("coverage"), "coverage is not installed: make setup"
    measured = json.loads(run_fuzz("--coverage").stdout.splitlines()[-1])
    share = measured["share"]
    assert share >= 0.95, f"{share:.1%} of the branches: {measured['not taken']}"
    return {"share of branches": round(share, 3), "branches": measured["branches"]}


@fault("coverage-guided search", quick=0, full=1, limit_s=1800)
def search(trial: Trial) -> Counter | str:
    """A fuzzer that follows the branches of the reader, the layout and the fields finds no mutant
    of a .beton file that ends in another way than those above."""
    if importlib.util.find_spec("atheris") is None:
        return f"{frame.LEFT_OUT}atheris is not installed"
    limits = [f"--executions={EXECUTIONS}", f"--seconds={SEARCH_S}"]
    ran = run_fuzz(*limits, f"--corpus={trial.folder / 'corpus'}")
    return Counter({"executions": int(re.findall(r"Done (\d+) runs", ran.stderr)[-1])})


def run_fuzz(*words: str) -> subprocess.CompletedProcess:
    """torture.fuzz in a process of its own. Raises AssertionError where it fails."""
    command = [sys.executable, "-m", "torture.fuzz", *words]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran
