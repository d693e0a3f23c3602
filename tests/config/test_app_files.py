"""Configurations by name, scripts by their place, and users' modules of the same names."""

import sys

import pytest
from support.small_files import REPOSITORY

import train
from ffcv_ssl.config import app_files, user_code
from ffcv_ssl.config.app_files import find_config, similar_configs
from ffcv_ssl.config.yaml_layers import merge, read_layers
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.studies.suite import read_suite
from ffcv_ssl.jobs.batch import read_batch
from ffcv_ssl.jobs.chain_file import read_chain

# ---- Configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["imagenette/cpu_simclr", "imagenette/cpu_simclr.yaml", "configs/imagenette/cpu_simclr.yaml"],
)
def test_a_configuration_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = REPOSITORY / "configs/imagenette/cpu_simclr.yaml"
    assert find_config(name) == str(expected)
    assert read_layers(name) == read_layers(str(expected))
    config = train.read_config([f"--config={name}", "--epochs=3"])
    assert config == train.read_config(["--config", str(expected), "--epochs", "3"])
    assert config.out == "runs/cpu_simclr"


def test_every_configuration_has_a_name():
    names = app_files.config_names()
    assert {"simclr", "demo", "imagenette/cpu_simclr", "suncet/chain_10percent"} <= set(names)
    assert len(names) == len(list((REPOSITORY / "configs").rglob("*.yaml")))


def test_a_file_of_that_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simclr").mkdir()  # a folder is no file
    assert find_config("simclr") == str(REPOSITORY / "configs/simclr.yaml")
    (tmp_path / "demo").write_text("epochs: 77\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/simclr.yaml").write_text("epochs: 78\n")
    assert train.read_config(["--config=demo"]).epochs == 77
    assert train.read_config(["--config=configs/simclr.yaml"]).epochs == 78
    assert train.read_config(["--config=simclr"]).epochs == 100


def test_a_file_builds_on_a_configuration_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.yaml").write_text("base: [imagenette/cpu_simclr, other.yaml]\n")
    (tmp_path / "folder/other.yaml").write_text("epochs: 5\n")
    *below, (last, _) = read_layers("folder/mine.yaml")
    assert last == "folder/mine.yaml" and below[-1] == ("folder/other.yaml", {"epochs": 5})
    assert merge(*(own for _, own in below))["optim"]["lr"] == pytest.approx(
        train.read_config(["--config=imagenette/cpu_simclr"]).optim.lr
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("simclrr", "did you mean simclr"),
        ("cpu_byol", "did you mean imagenette/cpu_byol?"),
        ("configs/imagenete/gpu_byol.yaml", "did you mean imagenette/gpu_byol?"),
    ],
)
def test_an_unknown_name_is_one_line_with_those_near_it(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        train.read_config([f"--config={name}"])
    line = str(error.value)
    assert line.startswith(f"{name}: no such configuration file; ") and near in line


@pytest.mark.parametrize("name", ["nothing/like/it", "/simclr", "../simclr", "", "a\0b", "."])
def test_other_texts_stand_for_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == name
    assert similar_configs("nothing/like/it") == ""


def test_chains_lists_and_suites_are_found_by_name_too(tmp_path, monkeypatch):
    from ffcv_ssl.evaluation.protocol_settings import EvalData

    monkeypatch.chdir(tmp_path)
    first, *_ = read_chain(["imagenette/chain_cpu_simclr"])
    assert first.name == "pretrain"
    lines = read_batch("batches/suncet")
    assert lines[0][0] == "--config=configs/suncet/simclr_100.yaml"
    assert train.read_config(lines[0][:2]).epochs == 100
    assert len(read_suite("suites/shapes", EvalData())) == 3


# ---- Scripts and users' modules ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_modules_afterwards():
    before = ours_and_users()
    yield
    for name in ours_and_users():
        del sys.modules[name]
    sys.modules.update(before)


def ours_and_users():
    """Loaded scripts, pipelines and users' modules."""
    names = ("train", "evaluate", "demo", "pipelines", "mine")
    return {
        key: module
        for key, module in sys.modules.items()
        if key.partition(".")[0] in names or key.startswith(("ffcv_ssl_app_", "user_code_"))
    }


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A user's folder with modules of the scripts' names, as the current one."""
    for name in ("train", "evaluate", "demo"):
        (tmp_path / f"{name}.py").write_text(f"WHOSE = 'the user, {name}'\n")
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").write_text("from pipelines.part import WHOSE\n")
    (tmp_path / "pipelines/part.py").write_text("WHOSE = 'the user, pipelines'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_a_users_train_py_does_not_shadow_the_command(users_folder):
    for name in ("train", "pipelines", "evaluate"):
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            sys.modules.pop(loaded)
    sys.modules.pop("ffcv_ssl_app_train", None)
    script = app_files.load_script("train")
    assert script.__file__ == str(REPOSITORY / "train.py")
    assert sys.modules["pipelines"].__file__ == str(REPOSITORY / "pipelines/__init__.py")
    assert script.read_config(["--config=demo"]).epochs == 4
    assert "train" not in sys.modules


def test_the_scripts_do_not_shadow_a_users_modules(users_folder):
    names = ("train", "evaluate", "demo", "pipelines")
    imports = "\n".join(f"from {name} import WHOSE as {name}" for name in names)
    (users_folder / "mine.py").write_text(imports)
    ours = {name: sys.modules[name] for name in ("train", "pipelines", "pipelines.view")}
    sys.path.insert(0, str(REPOSITORY))  # as for `python train.py`
    for place in (str(users_folder / "mine.py"), "mine"):
        module = user_code.load_module(place)
        assert [getattr(module, name) for name in names] == [f"the user, {n}" for n in names]
        assert {name: sys.modules[name] for name in ours} == ours


def test_a_users_method_can_import_from_train(tmp_path):
    (tmp_path / "mine.py").write_text("from train import nt_xent\nfrom pipelines import View\n")
    module = user_code.load_module(str(tmp_path / "mine.py"))
    assert module.nt_xent is train.nt_xent


def test_a_missing_script_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(app_files, "app_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"absent\.py: no such script; run `pip install`"):
        app_files.load_script("absent")
