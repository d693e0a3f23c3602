"""What a run measures of itself: its representation's health, probes on stages, and on files of
their own. None of it changes a loss, and a resumed run measures the same."""

import dataclasses

import numpy as np
import pytest
import torch
from support.forked import start_ranks
from support.process_limits import free_port
from support.small_files import write_small
from support.small_runs import RESNET, assert_same_state, records, run, state_of
from torch import nn

import train
from ffcv_ssl import DatasetWriter
from ffcv_ssl.config import settings
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.training import health
from ffcv_ssl.training.health_check import pair_of
from ffcv_ssl.training.online_evaluation import open_evaluation
from ffcv_ssl.training.run_files import open_files
from ffcv_ssl.training.world import World
from pipelines import Views, make_views

pytestmark = [pytest.mark.whole, pytest.mark.usefixtures("no_picture")]


class Labelled:
    """Small images of a colour of their class; label -1 where there is none."""

    def __init__(self, labels, seed):
        self.labels, self.seed = labels, seed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        image = rng.integers(0, 100, (16, 16, 3))
        image[..., i % 3] += 100
        return image.astype(np.uint8), self.labels[i]


def write(path, labels, seed=0):
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Labelled(labels, seed))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by name: labelled, partly labelled (41 of 60) and unlabelled ones of 60 images; val."""
    folder = tmp_path_factory.mktemp("files")
    classes = [i % 3 for i in range(60)]
    partly = [label if i % 3 or i < 3 else -1 for i, label in enumerate(classes)]
    return {
        "train": write(folder / "train.beton", classes),
        "partly": write(folder / "partly.beton", partly),
        "unlabelled": write(folder / "unlabelled.beton", [-1] * 60),
        "probes": write(folder / "probes.beton", [*classes[:45], -1, -1], seed=1),
        "val": write(folder / "val.beton", [*classes[:31], -1], seed=2),
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory, files):
    """A run with labels, a validation file and the health check."""
    out = tmp_path_factory.mktemp("watched") / "run"
    return run(out, data__train=files["train"], data__val=files["val"])


# ---- health --------------------------------------------------------------------------------------


def test_the_health_check_changes_no_loss_no_accuracy_and_no_random_state(watched, tmp_path, files):
    data = {"data__train": files["train"], "data__val": files["val"]}
    without = run(tmp_path / "run", evaluation__health="false", **data)
    assert records(watched, "health/") == records(without)
    assert records(watched) != records(without)
    assert_same_state(watched, without, "model", "optimizer", "probes", "rng")


def test_a_resumed_run_has_the_health_of_one_that_was_not_interrupted(watched, tmp_path, files):
    data = {"data__train": files["train"], "data__val": files["val"]}
    out = run(tmp_path / "run", code=75, stop_at=2, **data)
    assert records(run(out, data__num_workers=2, **data)) == records(watched)


def test_a_run_without_labels_is_watched_by_its_health_alone(watched, tmp_path, files, capsys):
    out = run(tmp_path / "run", data__train=files["unlabelled"])
    printed = capsys.readouterr().out
    assert printed.count("no labels in field 'label'") == 1 and "--probes.train" in printed
    evaluations = [r for r in records(out) if "health/alignment" in r]
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    assert not [key for r in records(out) for key in r if key.startswith("val/")]
    # labels have no part in these numbers: the images and the weights are those of the other run
    expected = [r for r in records(watched) if "health/alignment" in r]
    for record, other in zip(evaluations, expected):
        for key, value in record.items():
            if key.startswith("health/"):
                assert value == other[key], key
    again = run(out, data__train=files["unlabelled"])
    assert len(records(again)) == len(records(out))


def test_a_labelled_run_without_a_validation_file_has_no_evaluation(tmp_path, files):
    out = run(tmp_path / "run", data__train=files["train"], epochs=1)
    assert not [key for r in records(out) for key in r if key.startswith(("val/", "health/"))]


class Fixed(nn.Module):
    """An encoder with weights of its own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            torch.randn(shape, generator=generator) / shape[0] ** 0.5
            for shape in ((3 * 16 * 16, 12), (12, 5))
        ]

    def forward(self, images):
        hidden = (images.flatten(1) @ self.weights[0]).relu()
        return {"backbone": hidden, "projector_1": hidden @ self.weights[1]}


def evaluate(world, files, train_file, probes_file=None):
    """What an evaluation of the encoder `Fixed` says on this rank."""
    data = settings.DataConfig(train=files[train_file], val=files["val"], num_workers=1)
    probes = settings.ProbeConfig(train=probes_file and files[probes_file])
    views = Views(small_images=True).resolve()
    clean = make_views(Views(recipe="evaluation", small_images=True).resolve(), 16)
    evaluation = open_evaluation(
        open_files(data, probes), data, settings.EvaluationConfig(batch_size=14), clean,
        make_views(pair_of(views), 16), 0, world, False,
    )  # fmt: skip
    given = None if probes_file else lambda features: {"backbone": features["backbone"][:, :3]}
    results = [evaluation.run(Fixed(), given, lambda: None) for _ in range(2)]
    evaluation.close()
    assert results[0] == results[1], "the same views, and so the same numbers, each time"
    return results[0]


CASES = [("train", None), ("partly", None), ("unlabelled", "probes")]


def rank_main(rank, size, port, folder, files):
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = World.join("cpu", 1, {name: str(value) for name, value in launcher.items()})
    torch.save([evaluate(world, files, *case) for case in CASES], folder / f"{rank}.pt")
    world.leave()


def test_two_ranks_have_the_numbers_of_one(tmp_path, files):
    start_ranks(rank_main, (2, free_port(), tmp_path, files), 2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert of_ranks[0] == of_ranks[1]
    for case, found in zip(CASES, of_ranks[0]):
        expected = evaluate(World(), files, *case)
        assert found.keys() == expected.keys() and "health/uniformity" in found
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_numbers_are_those_of_the_labelled_images_in_the_order_of_the_file(files):
    found = evaluate(World(), files, "partly")
    labels = [i % 3 if i % 3 or i < 3 else -1 for i in range(60)]
    images = np.stack([Labelled(labels, 0)[i][0] for i in range(60) if labels[i] >= 0])
    mean, std = (np.array(getattr(settings.DataConfig, name)) for name in ("mean", "std"))
    images = torch.tensor((images - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    for depth, rows in Fixed()(images).items():
        for name, measure in (
            ("std", health.standard_deviation), ("rankme", health.rankme),
            ("effective_rank", health.effective_rank),
        ):  # fmt: skip
            assert found[f"health/{depth}/{name}"] == pytest.approx(measure(rows), rel=1e-4)


def test_the_pair_is_the_first_two_views_the_only_one_twice_or_all_that_are_linked():
    two = Views(recipe="simclr").resolve()
    assert list(pair_of(two)) == ["view_0", "view_1"]
    assert list(pair_of({**two, "view_2": two["view_1"]})) == ["view_0", "view_1"]
    one = Views(recipe="supervised").resolve()
    assert list(pair_of(one)) == ["view_0", "view_0_again"]
    elsewhere = {**two, "view_1": dataclasses.replace(two["view_1"], link="view_2"), "view_2": None}
    assert list(pair_of(elsewhere)) == ["view_0", "view_1", "view_2"]


# ---- probes on files of their own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, files):
    """An unlabelled run that is watched on labelled files."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    data = {"probes__train": files["probes"], "probes__val": files["val"]}
    return run(out, data__train=files["unlabelled"], **data)


def test_probes_of_a_file_of_their_own_watch_a_run_on_unlabelled_images(fitted):
    evaluations = [r for r in records(fitted) if "val/knn/top1" in r]
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    depths = ("backbone", "projector_1", "projector_2", "knn")
    for record in evaluations:
        assert {f"val/{depth}/top{k}" for depth in depths for k in (1, 5)} <= set(record)
        count = 31 * record["val/backbone/top1"]  # an image without label does not count
        assert count == pytest.approx(round(count)) and record["val/backbone/top5"] == 1
    assert evaluations[-1]["val/backbone/top1"] > 0.6  # colours are easy
    assert not [key for r in records(fitted) for key in r if key.startswith("train/backbone")]


def test_files_for_probes_change_no_loss(fitted, tmp_path, files):
    without = run(tmp_path / "run", data__train=files["unlabelled"])
    assert records(fitted, "val/", "health/") == records(without, "health/")
    assert_same_state(fitted, without, "model", "optimizer", "rng")


def test_a_run_with_files_for_probes_resumes_with_equal_numbers_also_where_they_moved(
    fitted, tmp_path, files
):
    data = {"data__train": files["unlabelled"], "probes__train": files["probes"]}
    out = run(tmp_path / "run", code=75, stop_at=4, probes__val=files["val"], **data)
    moved = write(tmp_path / "moved.beton", [*([0, 1, 2] * 15), -1, -1], seed=1)
    data["probes__train"] = moved
    assert records(run(out, probes__val=files["val"], **data)) == records(fitted)


def test_a_run_with_other_files_for_probes_or_none_is_refused(fitted, files, capsys):
    data = {"data__train": files["unlabelled"], "probes__val": files["val"]}
    run(fitted, code=2, probes__train=files["train"], **data)
    message = capsys.readouterr().err
    assert "probes.train data" in message and "(47 samples) in the checkpoint" in message
    run(fitted, code=2, **data)
    assert "(47 samples) in the checkpoint, None now" in capsys.readouterr().err


def test_the_labels_of_a_training_file_are_not_for_probes_that_have_their_own(tmp_path, files):
    data = {"data__train": files["train"], "data__val": files["val"]}
    out = run(tmp_path / "run", probes__train=files["probes"], epochs=1, **data)
    keys = {key for r in records(out) for key in r}
    assert "val/backbone/top1" in keys and "train/backbone/top1" not in keys


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("unlabelled", "unlabelled", "val"), "but probes.train is for labelled images"),
        (("train", "probes", None), "no labelled file to measure on; give one with --probes.val"),
        (("train", "nowhere", "val"), "probes.train: no file 'nowhere'"),
    ],
)
def test_files_that_probes_cannot_use_are_refused(tmp_path, files, capsys, given, said):
    names = ("data__train", "probes__train", "probes__val")
    data = {key: files.get(name, name) for key, name in zip(names, given) if name}
    run(tmp_path / "run", code=2, **data)
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_labels_that_go_unused_are_said_with_the_remedy(tmp_path, files, capsys):
    data = {"data__train": files["unlabelled"], "data__val": files["val"]}
    run(tmp_path / "run", epochs=1, **data)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "go unused;" in x]
    assert files["val"] in line and "--probes.train" in line


# ---- probes on stages ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    path = write_small(folder / "few.beton", 22, (16, 16), mode="raw")
    return {"data__train": path, "data__val": path}


@pytest.mark.parametrize("method", [{}, {"method": "byol", "data__chunk_size": 5}])
def test_probes_on_stages_change_nothing_else(tmp_path, few, method):
    without = run(tmp_path / "without", **RESNET, **few, **method)
    out = run(tmp_path / "with", probes__stages="true", **RESNET, **few, **method)
    stages = tuple(f"{part}/layer" for part in ("train", "val"))
    assert records(out, *stages) == records(without)
    assert_same_state(out, without, "model", "optimizer", "rng")
    assert state_of(out)["probes"]["probes"]["layers.layer3.weight"].shape == (7, 256)
    keys = {key for r in records(out) for key in r}
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        assert {f"train/{stage}/top1", f"val/{stage}/top1", f"val/{stage}/top5"} <= keys


def test_layer4_has_the_features_of_the_backbone_and_no_stage_has_gradients():
    model = train.Model(settings.ModelConfig("resnet18", projector="8"), stages=True).eval()
    features = model.encode(torch.randn(2, 3, 32, 32))
    assert list(features) == [*(f"layer{k}" for k in range(1, 5)), "backbone", "projector_1"]
    assert [features[f"layer{k}"].shape[1] for k in range(1, 5)] == [64, 128, 256, 512]
    torch.testing.assert_close(features["layer4"], features["backbone"].detach())
    assert not features["layer4"].requires_grad and features["backbone"].requires_grad
    assert model.last == "projector_1" and list(model.widths) == ["backbone", "projector_1"]


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_pass_through_stages_is_the_backbones_own_to_the_bit(stem):
    torch.manual_seed(0)
    model = train.Model(settings.ModelConfig("resnet50", stem, projector=""), stages=True)
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval().backbone(images)
    assert torch.equal(model.encode(images)["backbone"], expected)
    widths = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
    assert model.stage_widths == widths


def test_a_backbone_without_stages_is_refused_in_one_line(tmp_path, few, capsys):
    run(tmp_path / "run", code=2, probes__stages="true", **few)
    message = capsys.readouterr().err
    assert "the backbone tiny has no stages layer1 to layer4" in message
    assert message.count("\n") == 1


def test_a_resumed_run_has_the_accuracies_of_its_stages(tmp_path, few):
    given = {**RESNET, **few, "probes__stages": "true", "epochs": 2}
    whole = run(tmp_path / "whole", **given)
    out = run(tmp_path / "run", code=75, stop_at=3, **given)
    assert records(run(out, **given)) == records(whole)
