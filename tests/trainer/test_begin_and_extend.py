"""Where a run begins (`init_from`) and how it goes on for longer (`extend`)."""

import shutil

import pytest
import torch
import torchvision
import yaml
from support.small_files import write_small
from support.small_runs import RESNET, SETTINGS, assert_same_state, records, run, state_of

import train
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.optimizers import lr_at

pytestmark = [pytest.mark.whole, pytest.mark.usefixtures("no_picture")]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The files of a run: 22 images."""
    path = write_small(tmp_path_factory.mktemp("few") / "few.beton", 22, (16, 16), mode="raw")
    return {"data__train": path, "data__val": path}


TINY = {"data__batch_size": 10, "probes__lr": 0.01}


@pytest.fixture(scope="module")
def other(tmp_path_factory, few):
    """A finished run of 2 epochs of 2 steps, to begin with."""
    out = tmp_path_factory.mktemp("other") / "other"
    return run(out, seed=5, checkpoint__keep_every=2, **TINY, **few)


def start(out):
    """The weights with which a run began."""
    return torch.load(out / "checkpoint_epoch_0000.pt", weights_only=True)["model"]


def begin(out, code=0, **given):
    return run(out, code=code, checkpoint__keep_every=1, **{"epochs": 1, **TINY, **given})


# ---- init_from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["", "checkpoint.pt", "checkpoint_epoch_0002.pt"])
def test_a_run_begins_with_the_weights_of_another_to_the_bit(tmp_path, other, few, file, capsys):
    out = begin(tmp_path / "run", init_from=other / file, **few)
    expected = state_of(other)["model"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in start(out).items())
    said = capsys.readouterr().out
    assert "backbone and projector taken as first weights" in said
    recorded = yaml.safe_load((out / "config.yaml").read_text())
    assert recorded["init_from"] == str(other / file)
    assert recorded["init_digest"] == load_encoder(other).fingerprint
    assert recorded["init_digest"] in said


def test_another_projector_is_left_as_it_is_drawn(tmp_path, other, few, capsys):
    without = begin(tmp_path / "without", model__projector="16-4", **few)
    capsys.readouterr()
    out = begin(tmp_path / "run", model__projector="16-4", init_from=other, **few)
    expected = state_of(other)["model"]
    for name, tensor in start(out).items():
        is_own = name.startswith("projector.")
        assert torch.equal(tensor, start(without)[name] if is_own else expected[name]), name
    assert "backbone, but not the projector taken" in capsys.readouterr().out


def test_the_weights_that_a_run_leaves_are_its_backbone_alone(tmp_path, other, few, capsys):
    out = begin(tmp_path / "run", init_from=other / "backbone.safetensors", **few)
    assert "backbone, but not the projector taken" in capsys.readouterr().out
    expected, found = state_of(other)["model"], start(out)
    for name in found:
        if name.startswith("backbone."):
            assert torch.equal(found[name], expected[name]), name
    name = "projector.0.0.weight"
    assert not torch.equal(found[name], expected[name])


def test_byols_teacher_begins_with_the_same_weights(tmp_path, other, few):
    out = begin(tmp_path / "run", method="byol", init_from=other, **few)
    saved = torch.load(out / "checkpoint_epoch_0000.pt", weights_only=True)
    for name, tensor in saved["model"].items():
        assert torch.equal(saved["method"][f"teacher.{name}"], tensor)


def test_a_torchvision_state_dict_is_the_backbone_to_the_bit(tmp_path, few):
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "net.pth")
    out = begin(tmp_path / "run", init_from=tmp_path / "net.pth", **{**few, **RESNET})
    expected = {f"backbone.{k}": v for k, v in network.state_dict().items() if k[:3] != "fc."}
    found = {k: v for k, v in start(out).items() if k.startswith("backbone.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_same_numbers_are_drawn_with_first_weights_as_without(tmp_path, other, few):
    """Probes, heads and order do not depend on where the weights come from."""
    without, out = begin(tmp_path / "a", **few), begin(tmp_path / "b", init_from=other, **few)
    states = [torch.load(o / "checkpoint_epoch_0000.pt", weights_only=True) for o in (without, out)]
    for part in ("probes", "rng"):
        assert str(states[0][part]) == str(states[1][part])


def test_another_architecture_is_refused_in_one_line(tmp_path, other, few, capsys):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "net.pth")
    cases = [
        ({"init_from": other, "model__backbone": "resnet18"}, "got a tiny with the imagenet stem"),
        (
            {"init_from": other, "model__backbone": "resnet50"},
            "; give it the file's model.backbone and model.stem, or another file",
        ),
        ({"init_from": tmp_path / "net.pth", "model__backbone": "resnet18"}, "not a resnet18 with"),
        ({"init_from": tmp_path / "gone"}, "init_from: no file or folder"),
        ({"init_from": few["data__train"]}, "not a readable checkpoint"),
        (
            {"init_from": other, "init_digest": "ab" * 16},
            "as in init_digest; restore the file, or leave init_digest out",
        ),
    ]
    for given, said in cases:
        begin(tmp_path / "run", code=2, **few, **given)
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1


def test_a_resumed_run_needs_the_file_no_more_and_keeps_its_record(tmp_path, other, few):
    given = {**few, **TINY, "init_from": tmp_path / "moved", "epochs": 2}
    shutil.copytree(other, tmp_path / "moved")
    whole = run(tmp_path / "whole", **given)
    out = run(tmp_path / "run", code=75, stop_at=3, **given)
    digest = yaml.safe_load((out / "config.yaml").read_text())["init_digest"]
    shutil.rmtree(tmp_path / "moved")
    assert records(run(out, **given)) == records(whole)
    assert yaml.safe_load((out / "config.yaml").read_text())["init_digest"] == digest
    assert state_of(out)["config"]["init_digest"] == digest is not None


def test_a_resumed_run_cannot_begin_elsewhere(tmp_path, other, few, capsys):
    out = begin(tmp_path / "run", init_from=other, **few)
    begin(out, code=2, **few)
    assert "init_from" in capsys.readouterr().err


def test_a_runs_configuration_begins_a_run_with_the_same_weights_or_none(tmp_path, other, few):
    out = begin(tmp_path / "run", init_from=other, **few)
    again = tmp_path / "again"
    assert train.main([f"--config={out}/config.yaml", f"--out={again}"]) == 0
    assert records(again) == records(out)


# ---- extend --------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, other):
    return shutil.copytree(other, tmp_path / "finished")


EXTENDED = {"seed": 5, "checkpoint__keep_every": 2, **TINY}


def test_more_epochs_are_refused_with_the_remedy_named(finished, few, capsys):
    run(finished, code=2, epochs=4, **EXTENDED, **few)
    message = capsys.readouterr().err
    assert "epochs 2 in the checkpoint, 4 now" in message and "--extend gives" in message
    assert message.count("\n") == 1


def test_an_extended_run_goes_on_from_its_last_step_on_the_schedule_of_all_epochs(
    finished, few, capsys
):
    before, kept = records(finished), (finished / "checkpoint_epoch_0002.pt").read_bytes()
    backbone = (finished / "backbone.safetensors").read_bytes()
    config = train.read_config([f"--config={finished}/config.yaml"])
    run(finished, epochs=4, extend="true", **EXTENDED, **few)
    lines = records(finished)
    assert lines[: len(before)] == before
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    for step in range(4, 8):
        assert rates[step + 1] == pytest.approx(lr_at(step, config.optim, 10, 4, 2))
    assert rates[5] > 2 * rates[4]  # it jumps up to the new cosine
    said = capsys.readouterr().out
    assert train.read_config(["--extend", "--epochs=40"]).extend
    remark = f"from 2 to 4 epochs: the schedules are drawn anew over 4 epochs, so the learning rate goes from {rates[4]:.4g} to {rates[5]:.4g}"  # noqa: E501
    assert remark in said and remark in (finished / "config.yaml").read_text()
    assert (finished / "checkpoint_epoch_0002.pt").read_bytes() == kept
    assert (finished / "checkpoint_epoch_0004.pt").exists()
    assert (finished / "backbone.safetensors").read_bytes() != backbone
    assert not (finished / "checkpoint_previous.pt").exists()
    again = run(finished, epochs=4, extend="true", **EXTENDED, **few)
    assert records(again) == lines


@pytest.mark.parametrize("stop_at", [5, 6])
def test_an_interrupted_extension_goes_on_with_or_without_the_flag(
    finished, tmp_path, few, stop_at
):
    out = shutil.copytree(finished, tmp_path / "run")
    backbone = (out / "backbone.safetensors").read_bytes()
    run(finished, epochs=4, extend="true", **EXTENDED, **few)
    run(out, code=75, stop_at=stop_at, epochs=4, extend="true", **EXTENDED, **few)
    assert (out / "backbone.safetensors").read_bytes() == backbone  # until the new end
    run(out, epochs=4, **EXTENDED, **few)
    assert records(out) == records(finished)
    assert_same_state(out, finished, "model", "optimizer", "probes", "rng")
    assert state_of(out)["remarks"] == state_of(finished)["remarks"]


def test_a_run_is_extended_a_second_time(finished, few):
    for epochs in (3, 4):
        run(finished, epochs=epochs, extend="true", **EXTENDED, **few)
    remarks = state_of(finished)["remarks"]
    assert [remark[:41] for remark in remarks] == [
        "extended at step 4 from 2 to 3 epochs: th", "extended at step 6 from 3 to 4 epochs: th",
    ]  # fmt: skip
    text = (finished / "config.yaml").read_text()
    assert all(f"# {remark}\n" in text for remark in remarks)
    assert train.read_config([f"--config={finished}/config.yaml"]).epochs == 4


@pytest.mark.parametrize("config", [None, "auto"])
def test_a_warmup_that_was_made_to_fit_is_made_to_fit_anew(config, tmp_path, few, capsys):
    """Nobody typed it: neither for the first epoch nor for the next ones."""
    given = {key: value for key, value in {**SETTINGS, **TINY}.items() if "warmup" not in key}
    words = [f"--{key.replace('__', '.')}={value}" for key, value in {**given, **few}.items()]
    words = [*([f"--config={config}"] if config else []), *words, f"--out={tmp_path}/run"]
    assert train.main([*words, "--epochs=1"]) == 0
    assert state_of(tmp_path / "run")["config"]["optim"]["warmup_epochs"] == 0.1
    capsys.readouterr()
    assert train.main([*words, "--epochs=2", "--extend"]) == 0
    said = capsys.readouterr().out
    assert "extended at step 2 from 1 to 2 epochs, warm-up from 0.1 to 0.2: the sch" in said
    assert train.main([*words, "--epochs=2"]) == 0
    assert state_of(tmp_path / "run")["step"] == 4
    # a warm-up alone is no extension
    again = [*words, "--epochs=2", "--extend", "--optim.warmup_epochs=0.5"]
    assert train.main(again) == 2
    message = capsys.readouterr().err
    assert "got optim.warmup_epochs 0.5, expected 0.2 as in the" in message
    assert message.count("\n") == 1


def test_an_unfinished_run_is_not_extended_and_no_run_is_shortened(tmp_path, few, capsys):
    out = run(tmp_path / "run", code=75, stop_at=3, **EXTENDED, **few)
    capsys.readouterr()
    run(out, code=2, epochs=4, extend="true", **EXTENDED, **few)
    message = capsys.readouterr().err
    assert "got --extend for a run at step 3 of 4" in message and message.count("\n") == 1
    run(out, code=2, epochs=1, extend="true", **EXTENDED, **few)
    message = capsys.readouterr().err
    assert "got epochs 1, expected more than the 2 epochs" in message and message.count("\n") == 1
    assert state_of(out)["step"] == 3


def test_a_checkpoint_from_before_these_settings_goes_on(tmp_path, other, few):
    out = run(tmp_path / "run", code=75, stop_at=3, **EXTENDED, **few)
    saved = state_of(out)
    config = saved["config"]
    for name in ("extend", "init_from", "init_digest"):
        del config[name]
    for name in ("train", "val", "stages"):
        del config["probes"][name]
    del config["evaluation"]["health"]
    del saved["remarks"]
    checkpoint.save(out / "checkpoint.pt", saved)
    assert records(run(out, **EXTENDED, **few)) == records(other)
