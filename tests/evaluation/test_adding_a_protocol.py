"""The example of docs/adding_a_protocol.md: found by its name, run as it stands, right."""

import re
import sys

import numpy as np
import pytest
from support.evaluations import ONE_THREAD, write_run
from support.small_files import REPOSITORY
from support.tuning_files import NUM_CLASSES, write_coloured

import evaluate
from ffcv_ssl.evaluation.commands import find_commands
from ffcv_ssl.evaluation.results import read_results

DOCUMENT = REPOSITORY / "docs/adding_a_protocol.md"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of a package that holds nothing but the example."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    package = tmp_path / "own_protocols"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "centroid.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield find_commands("own_protocols", [str(package)])
    for name in [name for name in sys.modules if name.startswith("own_protocols")]:
        del sys.modules[name]


def test_the_example_is_a_command_that_measures_a_run(commands, tmp_path, monkeypatch, capsys):
    files = [
        write_coloured(tmp_path / f"{name}.beton", np.arange(count) % NUM_CLASSES)
        for name, count in (("train", 80), ("val", 40))
    ]
    write_run(tmp_path / "run", *files)
    assert list(commands) == ["centroid"]
    monkeypatch.setitem(evaluate.COMMANDS, "centroid", commands["centroid"])
    words = ["centroid", f"--checkpoint={tmp_path}/run", "--depths", "backbone", "projector_1"]
    assert evaluate.main([*words, *ONE_THREAD]) == 0
    (record,) = read_results(tmp_path / "run")
    assert record["settings"]["center"] is True and set(record["metrics"]) == {
        "backbone", "projector_1"
    }  # fmt: skip
    assert record["metrics"]["backbone"]["top1"] > 0.5
    assert evaluate.main(["centroid", f"--checkpoint={tmp_path}/run", "--depths=projector_9"]) == 2
    assert "'projector_9', but" in capsys.readouterr().err


def test_the_examples_classes_are_those_of_a_loop(commands):
    module = sys.modules["own_protocols.centroid"]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    rows = rng.normal(size=(3, 6))[labels] + rng.normal(size=(50, 6))
    queries = rng.normal(size=(20, 6))
    for center in (True, False):
        shift = rows.mean(axis=0) if center else np.zeros(6)
        expected = []
        for query in queries - shift:
            means = [rows[labels == k].mean(axis=0) - shift for k in range(3)]
            expected.append(np.argmax([query @ m / np.linalg.norm(m) for m in means]))
        assert module.nearest_mean(rows, labels, queries, 3, center).tolist() == expected
