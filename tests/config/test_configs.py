"""The configurations we ship: each one runs, none repeats another, all are listed."""

import functools
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.config.yaml_layers import merge, read_layers
from ffcv_ssl.jobs.batch import read_batch
from ffcv_ssl.jobs.chain_file import read_chain
from ffcv_ssl.training.machine_choice import CHOOSABLE

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted((ROOT / "configs/batches").glob("*.yaml"))
EVALUATIONS = ("finetune", "transfer", "suites")  # of evaluate.py: see the tests of its protocols
CONFIGS = [
    path
    for path in sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LISTS))
    if path.parent.name not in EVALUATIONS and not path.stem.startswith("chain")
]
# Parts of others, not runs of their own.
RUNS = [
    path for path in CONFIGS if path.parent.name != "parts" and not path.stem.startswith("base")
]

each_config = pytest.mark.parametrize(
    "path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs"))
)


def flatten(settings, prefix=""):
    """Nested mappings -> {"a.b": value}."""
    flat = {}
    for key, value in settings.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= nested or {f"{prefix}{key}": value}
    return flat


@functools.cache  # parsing takes a quarter of a second
def read(path):
    return train.read_config([f"--config={path}"])


def resolved(path):
    """A file's settings as a run has them, by dotted name, without its folder."""
    return flatten({**config_dict(read(path)), "out": None})


@each_config
def test_every_configuration_is_one_that_the_trainer_takes(path):
    config = read(path)
    assert config.out == f"runs/{path.stem}" and config.views.resolve()


@each_config
def test_no_configuration_restates_what_its_bases_say(path):
    *below, (_, own) = read_layers(str(path))
    before = flatten(merge(*(settings for _, settings in below)))
    restated = {
        key for key, value in flatten(own).items() if key in before and before[key] == value
    }
    assert restated == set()


@each_config
def test_every_setting_of_a_file_reaches_the_run_unless_a_later_file_sets_it(path):
    given = flatten(merge(*(own for _, own in read_layers(str(path)))))
    expected = {k: v for k, v in given.items() if v != "auto" or k not in CHOOSABLE}
    values = resolved(path)
    assert {key: values[key] for key in expected} == expected


def test_runs_have_folders_of_their_own_unless_they_are_the_same_run():
    runs = {}
    for path in RUNS:
        runs.setdefault(read(path).out, []).append(path)
    for paths in runs.values():
        assert all(resolved(path) == resolved(paths[0]) for path in paths)


def test_no_two_runs_are_the_same_but_for_their_folder():
    runs = {}
    for path in RUNS:
        runs.setdefault(str(sorted(resolved(path).items())), []).append(path)
    same = [paths for paths in runs.values() if len({path.stem for path in paths}) > 1]
    assert same == []


def test_every_part_is_used():
    used = {Path(file).resolve() for path in RUNS for file, _ in read_layers(str(path))}
    assert set(CONFIGS) - used == set()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_run_is_listed_in_the_results_or_the_readme(path):
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")]
    name = str(path.relative_to(ROOT))
    short = name.removeprefix("configs/").removesuffix(".yaml")
    assert any(name in text or f"`{short}`" in text for text in texts)


PROSE = [ROOT / "README.md", ROOT / "docs/watching.md"]
OURS = "data/"
"""The folder of the files that the project's configurations name, which a reader does not have."""


def documented_runs():
    """(file, words after `train`) of each training command that the README and docs/watching.md
    show."""
    for path in PROSE:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            command = re.match(
                r" *(?:.* )?(?:ffcv-ssl train|-m ffcv_ssl train|train\.py) (--.*)", line
            )
            if command and "`" not in line and "..." not in line and "slurm.batch" not in line:
                yield path.name, command[1].partition(" #")[0]


@pytest.mark.parametrize(("file", "words"), [*documented_runs()])
def test_a_documented_training_command_names_all_files_that_it_needs(file, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = train.read_config(shlex.split(words))
    files = (config.data.train, config.data.val, config.probes.train, config.probes.val)
    needed = files if config.probes.val is None else (files[0], *files[2:])
    assert not [name for name in needed if name and name.startswith(OURS)], f"{file}: {words}"


def runs_of(line, command):
    """The folders of the runs that a line of a list stands for."""
    if command == "chains":
        return [str(stage.folder) for stage in read_chain(line)]
    if command == "finetune":
        return [evaluate.read_config([command, *line]).out]
    return [train.read_config(line).out]


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_list_of_runs_can_be_submitted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = read_batch(str(path))
    folders = [out for line in lines for out in runs_of(line, path.stem.split("_")[0])]
    assert len(set(folders)) == len(folders) >= len(lines)


def test_labelled_streams_fit_the_papers_worlds():
    paper = {"suncet_10percent": (64, 44, 20, 2), "suncet_1percent": (64, 44, 20, 2)}
    for stem, (ranks, unlabelled, classes, images) in paper.items():
        config = read(ROOT / f"configs/suncet/{stem}.yaml")
        assert config.unlabelled_batch_size == ranks * unlabelled
        assert config.labelled.classes_per_batch == classes
        assert config.labelled.images_per_class == ranks * images
    config = read(ROOT / "configs/cifar10/suncet_cifar10.yaml")
    assert (config.unlabelled_batch_size, config.labelled_batch_size) == (128, 280)


def test_suncet_on_the_cpu_passes_as_many_views_as_simclr():
    def views(name, num_images=9469):
        config = read(ROOT / f"configs/imagenette/{name}.yaml")
        steps = num_images // config.unlabelled_batch_size
        labelled = round((config.labelled.supervised_epochs or 0) * steps)
        own = config.epochs * steps * config.unlabelled_batch_size * len(config.views.resolve())
        return own + labelled * config.labelled_batch_size * config.labelled.num_views

    assert views("cpu_suncet") == pytest.approx(views("cpu_simclr"), rel=1e-3)
    assert views("cpu_cross_entropy") == views("cpu_suncet")
