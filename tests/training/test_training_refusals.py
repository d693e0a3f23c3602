"""What the parts of a training run refuse, and the line that says so."""

import types

import numpy as np
import pytest
import torch
from torch import nn

import demo
import train
from ffcv_ssl import DatasetWriter
from ffcv_ssl.config.settings import LabelledConfig
from ffcv_ssl.errors import CheckpointError, NonFiniteLoss, UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.methods import Method, find
from ffcv_ssl.training import checkpoint, label_choice, memory, world
from ffcv_ssl.training.labelled_stream import LabelledStream
from ffcv_ssl.training.meters import Averages, FiniteWatch
from ffcv_ssl.training.run_data import open_dataset
from ffcv_ssl.training.run_folder import RunFolder
from ffcv_ssl.training.sync_batchnorm import SyncBatchNorm
from ffcv_ssl.training.world import World


def test_a_file_that_is_no_checkpoints_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"a.pt: got a list, expected a checkpoint's dict of state"
    ):
        checkpoint.load(tmp_path / "a.pt")


CHOICES = [
    (
        {"scheme": "half", "count": 1},
        "labelled.labels.scheme: got 'half', expected one of bernoulli",
    ),
    ({"scheme": "bernoulli", "count": 0}, "labelled.labels.count: got 0, expected at least 1"),
    (
        {"scheme": "bernoulli", "fraction": 0.0},
        "labelled.labels.fraction: got 0, expected above 0, at",
    ),
]


@pytest.mark.parametrize("settings, line", CHOICES)
def test_labels_are_chosen_by_settings_in_range(settings, line):
    given = {"fraction": None, "count": None, "file": None, **settings}
    with pytest.raises(UserError, match=line):
        label_choice._check_settings(**given)


def test_running_out_of_memory_while_training_names_what_to_lower():
    class Trainer:
        saver = types.SimpleNamespace(position=lambda: "step 7")

        @memory.names_out_of_memory("data.batch_size")
        def fit(self):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(
        UserError, match=r"cuda.*: out of memory after step 7.*; lower data.batch_size"
    ):
        Trainer().fit()


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        UserError, match=r"system.device: got cuda:3, but there is no such device here; use cpu"
    ):
        world.choose_device("cuda:3")


def test_several_ranks_on_one_device_are_refused(monkeypatch):
    properties = types.SimpleNamespace(uuid="a")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def gather(seats, seat):
        seats[:] = [seat, seat]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(
        UserError,
        match=r"system.device: got several ranks on one CUDA device of .*; "
        "start one rank per device, or",
    ):
        world._share_of_cores(torch.device("cuda:0"))


def test_batch_norm_over_ranks_refuses_what_has_no_channels():
    with pytest.raises(
        ValueError, match="SyncBatchNorm: expected running statistics with a momentum"
    ):
        SyncBatchNorm(nn.BatchNorm1d(3, momentum=None), World())
    with pytest.raises(ValueError, match="SyncBatchNorm: got 1 dimensions, expected 2 or more"):
        SyncBatchNorm(nn.BatchNorm1d(3), World())(torch.zeros(3))


def test_a_label_below_minus_one_is_refused(tmp_path):
    fields = {"image": RGBImageField("raw"), "label": IntField()}
    samples = [(np.zeros((4, 4, 3), np.uint8), -2)]
    path = str(tmp_path / "a.beton")
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(samples)
    with pytest.raises(
        UserError, match=r"a.beton: field 'label': got label -2, expected -1 or more"
    ):
        open_dataset(path)


class Two(Method):
    """A method of two views."""

    min_views = max_views = 2


def test_a_method_refuses_views_that_it_cannot_train_on():
    with pytest.raises(UserError, match="views: got a recipe of 3 views, expected 2 for Two"):
        Two.check_views(3)


def test_a_method_with_settings_needs_the_name_of_a_group():
    class Named(Two):
        group = "no name"
        Settings = dict
        loss = None

    Named.__abstractmethods__ = frozenset()
    with pytest.raises(
        UserError, match=r"mine.py:Named: group: got 'no name', expected a name such as 'mine'"
    ):
        find._check("mine.py:Named", Named)


def test_a_part_of_the_demo_that_fails_is_named(monkeypatch):
    process = types.SimpleNamespace(stdout=[], wait=lambda: 3, returncode=3)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: process)
    with pytest.raises(UserError, match=r"demo: train.py ended with exit code 3; correct what its"):
        demo.run_step("title", "train.py")


def test_a_weight_that_is_not_finite_ends_the_run():
    watch = FiniteWatch(torch.device("cpu"))
    with pytest.raises(
        NonFiniteLoss,
        match=r"runs/a: a weight is not finite after step 5 .sgd.; nothing kept; "
        "lower optim.lr or raise the precision",
    ):
        watch.check([torch.tensor([float("nan")])], 5, "runs/a", "sgd", "nothing kept")


def test_a_folder_of_a_run_whose_checkpoint_is_gone_is_not_begun_anew(tmp_path):
    folder = RunFolder(tmp_path, {}, {}, (), ())
    (tmp_path / "backbone.safetensors").write_bytes(b"")
    line = "got backbone.safetensors but no checkpoint.pt, expected a run's folder or a new one; "
    with pytest.raises(UserError, match=f"{line}move them away, or use another --out"):
        folder.read_checkpoint()
    (tmp_path / "backbone.safetensors").unlink()
    checkpoint.save(tmp_path / checkpoint.PREVIOUS, {})
    back = "checkpoint_previous.pt is whole: copy it to checkpoint.pt to go on from there"
    with pytest.raises(
        UserError, match=f"expected a run's folder or a new one; {back}, or move them away, or use"
    ):
        folder.read_checkpoint()


def test_a_labelled_batch_of_more_classes_than_have_labels_is_refused():
    chosen = types.SimpleNamespace(scheme="bernoulli", fraction=1.0, count=None, file=None, seed=0)
    settings = LabelledConfig(classes_per_batch=4, images_per_class=1, labels=chosen)
    data = types.SimpleNamespace(labels=np.arange(3), num_classes=5, names=None)
    with pytest.raises(
        UserError,
        match=r"labelled.classes_per_batch: got 4, expected at most 3, the number of classes with "
        "labelled images; give --labelled.classes_per_batch 3",
    ):
        LabelledStream(settings, data, None, {}, 0, World(), False)


def test_a_run_needs_the_name_of_a_folder_or_none():
    with pytest.raises(
        UserError, match="out: got ' ', expected a folder; leave it out for runs/NAME"
    ):
        train.check_config(types.SimpleNamespace(out=" "))


def test_averages_refuse_what_are_no_sums():
    with pytest.raises(ValueError, match="averages: got other tensors than pairs of a sum and its"):
        Averages().load({"train/loss": torch.zeros(3)}, world.World())
