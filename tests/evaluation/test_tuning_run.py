"""A tuning run's folder: what is taken for the same run, what is left alone, what survives a full
disk, and what a record says was trained on."""

import contextlib
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
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

from ffcv_ssl.errors import CheckpointError, Interrupted, UserError
from ffcv_ssl.evaluation import protocol_run, tuning_run
from ffcv_ssl.evaluation.protocols import finetune, transfer
from ffcv_ssl.evaluation.protocols.finetune import FineTuneConfig
from ffcv_ssl.evaluation.protocols.transfer import TransferConfig
from ffcv_ssl.evaluation.tuning import Tuner
from ffcv_ssl.evaluation.tuning_data import TuningData
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole  # whole training runs

PROTOCOLS = {
    "finetune": (FineTuneConfig, finetune.run, {"epochs": 2, "optim__lr": 0.5}),
    "transfer": (
        TransferConfig,
        transfer.run,
        {"steps": 8, "grid__lrs": "[0.01, 0.3]", "grid__weight_decays": "[0]"},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """120 and 60 coloured images, each in its file."""
    folder = tmp_path_factory.mktemp("data")
    return {
        f"data__{part}": write_coloured(folder / f"{part}.beton", np.arange(size) % NUM_CLASSES)
        for part, size in (("train", 120), ("val", 60))
    }


@pytest.fixture
def tune(files, monkeypatch, tmp_path):
    """tune(protocol, name, stop, **settings): the record of a run in the folder `name`."""
    monkeypatch.setattr(protocol_run, "open_encoder", lambda config, world: tiny_encoder())

    def run(protocol="finetune", name="a", stop=None, **settings):
        config_class, function, usual = PROTOCOLS[protocol]
        settings = {**usual, "out": tmp_path / name, **files, **settings}
        return function(parse(config_class, **settings), alone(), stop)

    return run


def write_list(path, start):
    """A list of 60 samples, 15 of each class."""
    path.write_text("".join(f"{index}\n" for index in range(start, start + 60)))
    return {"labels__scheme": "file", "labels__file": path}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("looks", [0, 3, 6, None])  # in an epoch, in a measurement, never
def test_a_list_of_labels_that_changed_under_its_name_is_refused(tune, tmp_path, protocol, looks):
    chosen = write_list(tmp_path / "list.txt", 0)
    with pytest.raises(Interrupted) if looks is not None else contextlib.nullcontext():
        tune(protocol, stop=None if looks is None else StopAfter(looks), **chosen)
    write_list(tmp_path / "list.txt", 60)
    with pytest.raises(UserError) as error:
        tune(protocol, **chosen)
    assert str(error.value).count("(60 labels of 4 classes, 15 each)") == 2
    assert "made by another run: labels data" in str(error.value) and "\n" not in str(error.value)
    write_list(tmp_path / "list.txt", 0)
    assert tune(protocol, **chosen)["data"]["num_labels"] == 60


def test_a_run_from_before_labels_were_on_record_is_refused_in_one_line(tune, tmp_path):
    tune()
    path = tmp_path / "a/checkpoint.pt"
    saved = checkpoint.load(path)
    del saved["datasets"]["labels"]
    checkpoint.save(path, saved)
    with pytest.raises(
        UserError, match=r"labels data not on record in the checkpoint, .* use another --out"
    ):
        tune()


def test_a_folder_of_kept_copies_is_refused_and_they_stay(tune, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/checkpoint_epoch_0100.pt").write_bytes(b"precious")
    with pytest.raises(UserError, match="a pretraining run's folder; use another --out"):
        tune()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint_epoch_0100.pt"]


@contextlib.contextmanager
def full_disk(monkeypatch, owner, name):
    """Within it no file grows beyond 100 bytes while the function `owner.name` runs."""
    function, before = getattr(owner, name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        yield


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["save_encoder", "report"])
def test_a_full_disk_at_the_end_costs_no_training(tune, tmp_path, monkeypatch, protocol, name):
    whole = tune(protocol, "whole")
    with full_disk(monkeypatch, tuning_run, name), pytest.raises(ValueError) as error:
        tune(protocol, "parts")
    assert "cannot be written" in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "parts").glob("*.tmp")) == []
    monkeypatch.setattr(Tuner, "_train_step", None)
    assert without_clock(tune(protocol, "parts")) == without_clock(whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "finetuned.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["write", "write_config", "save"])  # opening a log adds nothing
def test_a_full_disk_at_any_time_is_one_line_with_what_to_do(tune, tmp_path, monkeypatch, name):
    with pytest.raises(Interrupted):
        tune(stop=StopAfter(4))
    folder = tuning_run.RunFolder
    with full_disk(monkeypatch, folder, name), pytest.raises(CheckpointError) as error:
        tune()
    # the disk of this test is full by a limit on the size of files, and the line says so
    assert "(ulimit -f) and start again" in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "a").glob("*.tmp")) == []
    assert tune()["metrics"]["best_epoch"] <= 2


def test_a_rank_that_would_see_one_image_alone_is_refused():
    data = TuningData(None, None, None, "")
    with pytest.raises(UserError) as error:
        data.train_loader(np.arange(40), 4, 0, World(rank=3, size=4))
    assert "data.batch_size: got 4 for 4 ranks, expected at least 8: batch-norm" in str(error.value)
    assert str(error.value).endswith("needs two images per rank")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_that_was_stopped_under_the_old_names_goes_on_to_the_same_result(
    tune, tmp_path, protocol
):
    whole = tune(protocol, "whole", depth="projector_1")
    with pytest.raises(Interrupted):
        tune(protocol, "parts", StopAfter(5), depth="projector_1")
    path = tmp_path / "parts/checkpoint.pt"
    saved = checkpoint.load(path)
    assert saved["config"].pop("depth") == "projector_1"
    saved["config"]["layer"] = 1
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match="depth 'projector_1' in the checkpoint, 'backbone' now"):
        tune(protocol, "parts")
    assert without_clock(tune(protocol, "parts", layer=1)) == without_clock(whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
