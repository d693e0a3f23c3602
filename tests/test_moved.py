"""Old import paths give the objects of the new ones, once with a note, and load nothing early."""

import importlib
import json
import pickle
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from ffcv_ssl import moved

# module -> its public names before the move, in one text
DATA = Path(__file__).parent / "data"
OLD_NAMES = json.loads((DATA / "old_names.json").read_text())
# Internal names without a successor: "module:name", or "module" for all of a module.
GONE = frozenset((DATA / "gone_names.txt").read_text().split())


@pytest.fixture
def forgotten(monkeypatch):
    """As in a process that has imported no old path yet."""
    for old in moved.MODULES:
        monkeypatch.delitem(sys.modules, old, raising=False)
        package, _, name = old.rpartition(".")
        if package in sys.modules:
            monkeypatch.delattr(sys.modules[package], name, raising=False)
    monkeypatch.setattr(moved, "_noted", set())


def notes_of(statement, namespace=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(statement, {} if namespace is None else namespace)
    assert all(issubclass(note.category, FutureWarning) for note in caught)
    return [str(note.message) for note in caught]


def find(place):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", [module for module in OLD_NAMES if module not in GONE])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_old_module_and_name_gives_the_object_of_its_new_place(old):
    module = importlib.import_module(old)
    new = moved.MODULES.get(old)
    if new is not None:
        assert module is importlib.import_module(new)
        assert module.__name__ == module.__spec__.name == new
    for name in OLD_NAMES[old].split():
        if f"{old}:{name}" in GONE:
            continue
        if f"{old}.{name}" in OLD_NAMES:  # a package's module is imported, not looked up
            importlib.import_module(f"{old}.{name}")
        value = getattr(module, name)
        if name in moved.NAMES.get(old, {}):
            assert value is find(moved.NAMES[old][name])


def test_the_tables_name_only_what_was_there():
    assert set(moved.MODULES) <= set(OLD_NAMES)
    for old, names in moved.NAMES.items():
        assert set(names) <= set(OLD_NAMES[old].split()), old
    for gone in GONE:
        module, _, name = gone.partition(":")
        assert name in OLD_NAMES[module].split() or not name, gone


@pytest.mark.parametrize(
    "statement, new",
    [
        ("import ffcv_ssl.optim", "ffcv_ssl.training.optimizers"),
        ("from ffcv_ssl.optim import LARS", "ffcv_ssl.training.optimizers"),
        ("from ffcv_ssl import slurm", "ffcv_ssl.jobs.slurm"),
        (
            "from ffcv_ssl.protocols.linear import LinearConfig",
            "ffcv_ssl.evaluation.protocols.linear",
        ),
        (
            "from ffcv_ssl.evaluation import open_evaluation",
            "ffcv_ssl.training.online_evaluation.open_evaluation",
        ),
    ],
)
def test_an_old_path_is_noted_once(statement, new, forgotten):
    (note,) = notes_of(statement)
    assert f"is now {new};" in note
    assert notes_of(statement) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from ffcv_ssl import no_such_module",
        "from ffcv_ssl.command import no_such_name",
        "from ffcv_ssl.evaluation import no_such_name",
        "from ffcv_ssl.protocols import no_such_protocol",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_never_was_is_an_import_error(statement):
    with pytest.raises(ImportError):
        exec(statement, {})


def test_a_name_that_left_a_module_is_noted_too(forgotten):
    namespace = {}
    _, parse_config = notes_of("from ffcv_ssl.command import parse_config", namespace)
    assert "ffcv_ssl.command.parse_config is now ffcv_ssl.config.parsing.parse_config" in (
        parse_config
    )
    assert namespace["parse_config"] is find("ffcv_ssl.config.parsing:parse_config")


def test_the_note_points_at_the_line_of_the_user(forgotten):
    with pytest.warns(FutureWarning, match="optimizers") as caught:
        import ffcv_ssl.optim  # noqa: F401
    assert caught[0].filename == __file__


def test_a_module_of_an_old_package_is_loaded_only_once(forgotten):
    with pytest.warns(FutureWarning):
        from ffcv_ssl.protocols import linear
    assert linear is importlib.import_module("ffcv_ssl.evaluation.protocols.linear")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pickle_that_names_an_old_path_loads(forgotten):
    protocol_0 = b"cffcv_ssl.command\nUserError\n."
    assert pickle.loads(protocol_0) is find("ffcv_ssl.errors:UserError")


def test_python_m_runs_the_new_module_and_says_so(forgotten, capsys):
    names = runpy.run_module("ffcv_ssl.chain", run_name="not_main")
    assert Path(names["__file__"]).match("ffcv_ssl/jobs/chain.py")
    assert callable(names["main"])
    assert capsys.readouterr().err.splitlines() == [
        "python -m ffcv_ssl.chain is now python -m ffcv_ssl.jobs.chain; "
        "the old name works for one release"
    ]


def test_what_has_no_heir_of_its_name_says_where_to_look():
    from ffcv_ssl import moved

    with pytest.raises(ImportError, match=r": its parts have moved, see ffcv_ssl/moved.py"):
        moved._MovedLoader().get_code("ffcv_ssl.protocols")
    with pytest.raises(AttributeError, match=r"module '.*' has no attribute 'nothing'"):
        moved._old_names(next(iter(moved.NAMES)))("nothing")
