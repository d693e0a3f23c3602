"""The rules of train.py's settings: `auto`, warm-ups that fit, views in full."""

import json
import re
from pathlib import Path

import pytest
from support.small_files import REPOSITORY

import train
from ffcv_ssl.config.plain import config_dict, flatten
from ffcv_ssl.config.yaml_layers import read_yaml, yaml_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import machine_choice
from ffcv_ssl.training.machine_choice import CHOOSABLE, Machine
from ffcv_ssl.training.run_folder import RunFolder
from pipelines.view import SETTINGS

AUTO_FILE = str(REPOSITORY / "configs/auto.yaml")
CPU, GPU = Machine(False, 1, False), Machine(True, 1, True)


@pytest.fixture
def on(monkeypatch):
    """on(machine): from now on settings are chosen for this machine."""

    def use(machine):
        monkeypatch.setattr(Machine, "of_this_process", lambda device: machine)

    return use


def settings_of(*words):
    config, notes = train.read_with_notes(list(words))
    return config_dict(config), notes


def printed(capsys, *words):
    with pytest.raises(SystemExit):
        train.read_config([*words, "--print_config"])
    return capsys.readouterr().out


def test_the_file_names_every_setting_that_can_be_chosen():
    own = read_yaml(AUTO_FILE)
    named = {name for name, value in flatten(own).items() if value == "auto"}
    assert named == CHOOSABLE


def test_with_a_gpu_auto_is_the_full_recipe(on):
    on(GPU)
    config, notes = settings_of("--config", AUTO_FILE, "--data.train=x.beton", "--out=o")
    full, _ = settings_of("--config", str(REPOSITORY / "configs/simclr.yaml"), "--out=o")
    full["data"] |= {"train": "x.beton", "val": None}
    assert config == full
    assert notes == ["GPU: the full recipe: resnet50 at 160 to 192 px, batch 256, 100 epochs, bf16"]


def test_without_a_gpu_two_lines_say_what_was_chosen_and_the_way_to_the_full_recipe(on, raw_beton):
    on(CPU)
    config, notes = settings_of("--config", AUTO_FILE, f"--data.train={raw_beton}")
    assert config["data"]["batch_size"] == 64 and config["precision"] == "fp32"
    assert notes[0] == (
        "no GPU: a small run: resnet18 at 64 px, batch 64 of 200 images, 100 epochs, fp32"
    )
    assert f"--config {REPOSITORY}/configs/simclr.yaml" in notes[1] and len(notes) == 2


def test_what_is_given_wins_over_what_would_be_chosen(on, raw_beton):
    on(CPU)
    config, _ = settings_of(
        "--config", AUTO_FILE, f"--data.train={raw_beton}", "--epochs=4", "--data.batch_size", "50"
    )
    assert (config["epochs"], config["data"]["batch_size"]) == (4, 50)
    assert config["optim"]["warmup_epochs"] == 0.4 and config["model"]["backbone"] == "resnet18"


@pytest.mark.parametrize("words", [["--data.batch_size", "auto"], ["--data.batch_size=auto"]])
def test_any_command_line_can_leave_a_setting_to_the_machine(on, raw_beton, words):
    on(CPU)
    config, _ = settings_of(f"--data.train={raw_beton}", *words)
    assert config["data"]["batch_size"] == 64 and config["model"]["backbone"] == "resnet50"


def test_a_run_keeps_what_was_chosen_at_its_start_on_any_machine(on, raw_beton, tmp_path):
    words = ("--config", AUTO_FILE, f"--data.train={raw_beton}", f"--out={tmp_path}")
    on(CPU)
    began, _ = settings_of(*words)
    (tmp_path / "config.yaml").write_text(yaml_text(train.views_in_full(began)))
    on(GPU)
    (tmp_path / "checkpoint.pt").touch()
    resumed, (note,) = settings_of(*words)
    assert resumed == began
    assert note.startswith(f"{tmp_path}: goes on as it was chosen at its start: resnet18 at 64 px")
    (tmp_path / "checkpoint.pt").unlink()  # a run that never began
    assert settings_of(*words)[0]["model"]["backbone"] == "resnet50"


def test_a_job_is_chosen_for_what_it_asks_for_when_it_is_submitted(on):
    on(CPU)
    words = ("--config", AUTO_FILE, "--data.train=x.beton", "--slurm.partition=p")
    assert settings_of(*words)[0]["model"]["backbone"] == "resnet18"
    config, _ = settings_of(*words, "--slurm.gpus_per_node=8", "--slurm.nodes=2")
    assert (config["model"]["backbone"], config["precision"]) == ("resnet50", "bf16")


def test_printed_settings_have_what_was_chosen(on, capsys, tmp_path):
    on(CPU)
    words = ("--config", AUTO_FILE, "--data.train=x.beton")
    (tmp_path / "printed.yaml").write_text(printed(capsys, *words))
    values = flatten(read_yaml(tmp_path / "printed.yaml"))
    assert {name for name in CHOOSABLE if values[name] == "auto"} == set()
    assert (values["model.backbone"], values["precision"]) == ("resnet18", "fp32")


@pytest.mark.parametrize("words", [["--slurm.partition=p", "--slurm.gpus_per_node=two"],
                                   ["--epochs=few"], ["--optim.warmup_epochs=[1]"]])  # fmt: skip
def test_a_value_of_another_type_is_still_the_mistake_that_is_told(on, words):
    on(CPU)
    key = words[-1].removeprefix("--").partition("=")[0]
    with pytest.raises(UserError, match=f"^{re.escape(key)}: got .*, expected a"):
        settings_of("--config", AUTO_FILE, *words)


# ---- Warm-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [[], ["--config", str(REPOSITORY / "configs/simclr.yaml")]])
def test_a_warmup_that_nobody_typed_fits_into_fewer_epochs(config):
    settings, (note,) = settings_of(*config, "--epochs", "1")
    assert settings["optim"]["warmup_epochs"] == 0.1
    assert note == (
        "optim.warmup_epochs: 0.1 instead of 10, to fit into 1 epoch; or give --optim.warmup_epochs"
    )


def test_a_warmup_that_was_typed_is_refused_with_the_value_that_fits():
    with pytest.raises(UserError) as refused:
        settings_of("--epochs=5", "--optim.warmup_epochs=5")
    assert str(refused.value) == (
        "optim.warmup_epochs: got 5.0, expected less than epochs (5); "
        "give --optim.warmup_epochs 0.5"
    )
    assert settings_of("--epochs=5", "--optim.warmup_epochs", "0.5")[1] == []


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("epochs: 3\noptim: {warmup_epochs: 4}\n")
    with pytest.raises(UserError, match=r"a\.yaml: optim\.warmup_epochs: got 4\.0, expected less"):
        settings_of("--config", str(path))
    path.write_text("epochs: 3\n")
    assert settings_of("--config", str(path))[0]["optim"]["warmup_epochs"] == 0.3


# ---- Views in full -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["simclr", "ffcv_ssl", "dino", "instance"])
def test_printed_settings_have_every_setting_of_every_view_and_give_the_same_run(
    recipe, capsys, tmp_path
):
    words = ["--views.recipe", recipe, "--views.view_1.blur_prob=0.25", "--out=o"]
    text = printed(capsys, *words)
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    views = read_yaml(path)["views"]
    config = train.read_config(words)
    for name, view in config.views.resolve().items():
        assert views[name].keys() == SETTINGS.keys()
        assert views[name] == json.loads(json.dumps(vars(view)))
    assert views["view_1"]["blur_prob"] == 0.25
    assert train.read_config([f"--config={path}"]) == config
    assert printed(capsys, f"--config={path}") == text


def test_another_recipe_replaces_printed_views_but_not_own_changes(capsys, tmp_path):
    path = Path(tmp_path / "printed.yaml")
    path.write_text(printed(capsys, "--views.recipe=simclr", "--views.view_0.gray_prob=0.5"))
    config = train.read_config([f"--config={path}", "--views.recipe=byol"])
    assert config.views == train.Views("byol", view_0={"gray_prob": 0.5})


def test_views_in_full_of_a_later_file_override_all_that_an_earlier_one_says(capsys, tmp_path):
    """Where the later file says what its recipe says, the earlier file's changes count no more."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(printed(capsys, "--views.recipe=byol", "--views.view_0.blur_prob=0.25"))
    text = printed(capsys, "--views.recipe=simclr", "--views.view_1.gray_prob=0.5", "--out=o")
    second.write_text(text)
    both = [f"--config={first}", f"--config={second}"]
    assert train.read_config(both).views.resolve() == (
        train.read_config([f"--config={second}"]).views.resolve()
    )
    assert train.read_config(both).views.resolve()["view_0"].blur_prob == 0.5  # SimCLR's
    assert printed(capsys, *both) == text


def test_a_warmup_that_was_fitted_at_the_start_is_fitted_anew_in_an_extended_run(
    on, raw_beton, tmp_path
):
    words = ("--config", AUTO_FILE, f"--data.train={raw_beton}", f"--out={tmp_path}")
    on(CPU)
    for given, warmup in (([], 0.1), (["--optim.warmup_epochs=0.3"], 0.3)):
        began, _ = settings_of(*words, "--epochs=1", *given)
        (tmp_path / "config.yaml").write_text(yaml_text(train.views_in_full(began)))
        (tmp_path / "checkpoint.pt").touch()
        assert settings_of(*words, "--epochs=1")[0]["optim"]["warmup_epochs"] == warmup
        extended, _ = settings_of(*words, "--epochs=4", "--extend")
        assert extended["optim"]["warmup_epochs"] == (0.4 if warmup == 0.1 else 0.3)


def test_settings_that_cannot_be_chosen_are_left_alone():
    with pytest.raises(UserError, match="seed: got 'auto'"):
        settings_of("--seed=auto")
    assert machine_choice.CHOOSABLE.isdisjoint({"system.device", "seed", "method"})


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_checkpoint_whose_views_say_less_or_as_much_belongs_to_the_same_run(
    is_complete, tmp_path
):
    config = config_dict(train.read_config(["--views.view_0.blur_prob=0.25"]))
    saved = train.views_in_full(config) if is_complete else config
    saved = {**saved, "views": dict(saved["views"])}
    options = ({}, (), ())
    folder = RunFolder(tmp_path, config, *options, complete=train.views_in_full)
    assert folder._differences({"config": saved, "datasets": {}}) == []
    other = config_dict(train.read_config(["--views.view_0.blur_prob=0.5"]))
    folder = RunFolder(tmp_path, other, *options, complete=train.views_in_full)
    assert folder._differences({"config": saved, "datasets": {}}) == [
        "views.view_0.blur_prob 0.25 in the checkpoint, 0.5 now"
    ]
    saved["views"]["recipe"] = "gone"
    assert len(folder._differences({"config": saved, "datasets": {}})) >= 1
