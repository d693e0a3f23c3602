"""Suites: every dataset is found sound before the first is measured, and each number is in its
place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.small_files import REPOSITORY, SmallImages

import evaluate
from ffcv_ssl import DatasetWriter
from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.evaluation import protocol_calls
from ffcv_ssl.evaluation.protocol_settings import EvalData
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.evaluation.studies import suite
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.sources.shapes import WithDistanceBin
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole  # whole commands on runs of their own

MODEL = {"backbone": "resnet18", "stem": "cifar", "projector": "8-4", "projector_norm": "hidden"}


class TwoTasks(SmallImages):
    """The same images with two labels: by 7 and by 2."""

    def __getitem__(self, i):
        image, label, _, _ = super().__getitem__(i)
        return image, label, i % 2


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """40 images of 16 px with the fields label and parity."""
    path = tmp_path_factory.mktemp("suite") / "two.beton"
    fields = {"image": RGBImageField("raw"), "label": IntField(), "parity": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(TwoTasks(40, (16, 16)))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained checkpoint of a run of 8 px without data."""
    torch.manual_seed(0)
    config = {"model": MODEL, "resolution": {"max": 8}}
    state = Model(ModelConfig(**MODEL)).state_dict()
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"config": config, "model": state, "step": 0}, folder / "checkpoint.pt")
    return str(folder)


def write_suite(path, *entries):
    path.write_text(yaml.safe_dump(list(entries)))
    return str(path)


@pytest.fixture
def tasks(tmp_path, two_tasks):
    """A suite of both tasks."""
    both = {"train": two_tasks, "val": two_tasks}
    parity = {"name": "parity", "label_field": "parity", "batch_size": 8, **both}
    return write_suite(tmp_path / "tasks.yaml", {"name": "seven", **both}, parity)


def test_every_dataset_is_probed_with_its_own_field_and_settings(checkpoint, tasks, capsys):
    words = ["--checkpoint", checkpoint, "--suite", tasks, "--system.torch_threads=1"]
    words += ["--linear.epochs=2", "--mlp.epochs=1", "--mlp.hidden=[8]", "--mlp.lrs=[0.1]"]
    words += ["--data.num_workers=1", "--data.batch_size=40"]
    assert evaluate.main(["suite", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = read_results(checkpoint)
    asked = [
        (r["protocol"], r["data"]["label_field"], r["settings"]["epochs"],
         r["settings"]["data"]["batch_size"]) for r in records
    ]  # fmt: skip
    assert asked == [
        ("linear", "label", 2, 40), ("mlp", "label", 1, 40),
        ("linear", "parity", 2, 8), ("mlp", "parity", 1, 8),
    ]  # fmt: skip
    linear, mlp, linear_2, mlp_2 = (r["metrics"]["backbone"]["top1"] for r in records)
    expected = {
        "linear": {"seven": linear, "parity": linear_2}, "mlp": {"seven": mlp, "parity": mlp_2}
    }  # fmt: skip
    assert found["top1"] == expected
    table = Path(found["table"]).read_text().splitlines()
    assert table[0] == "| top-1, % | linear | mlp |"
    assert table[2] == f"| seven | {100 * linear:.2f} | {100 * mlp:.2f} |"
    assert table[4] == f"| mean | {50 * (linear + linear_2):.2f} | {50 * (mlp + mlp_2):.2f} |"
    assert Path(found["chart"]).read_bytes()[:4] == b"\x89PNG"


def last_record(capsys, *words):
    assert evaluate.main([*words, "--system.torch_threads=1", "--data.num_workers=1"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("protocol", ["knn", "finetune"])
def test_fields_that_are_not_named_are_the_runs(checkpoint, two_tasks, tmp_path, capsys, protocol):
    path = f"{checkpoint}/checkpoint.pt"
    state = torch.load(path)
    state["config"]["data"] = {"train": two_tasks, "val": two_tasks, "label_field": "parity"}
    torch.save(state, path)
    words = [protocol, "--checkpoint", checkpoint]
    if protocol == "finetune":
        words += ["--epochs=1", "--select=last", "--data.batch_size=20", "--log.tensorboard=false"]
    record = last_record(capsys, *words)
    assert record["data"]["label_field"] == "parity" and record["data"]["num_classes"] == 2
    if protocol == "finetune":  # whether named or not, it is one run
        assert record["settings"]["data"]["label_field"] == "parity"
        assert last_record(capsys, *words, "--data.label_field=parity") == record
    record = last_record(capsys, *words, "--data.label_field=label", f"--out={tmp_path}/out")
    assert record["data"]["label_field"] == "label" and record["data"]["num_classes"] == 7
    assert evaluate.main([*words, "--data.label_field=nope", f"--out={tmp_path}/no"]) == 2
    assert "no labels in field 'nope'; name another field with --data.l" in capsys.readouterr().err


def test_one_value_or_several_words_are_a_list_in_a_protocol_of_a_suite_too():
    def settings(*words):
        _, (config,) = evaluate.read_configs(["suite", *words])
        return protocol_calls.protocol_config("knn", config.knn, "knn")

    assert settings("--knn.ks", "5").ks == settings("--knn.ks=[5]").ks == [5]
    assert settings("--knn.ks", "5", "1").ks == [5, 1]
    found = settings("--knn.depths", "backbone", "projector_1", "--knn.temperatures=0.2")
    assert found.depths == ["backbone", "projector_1"] and found.temperatures == [0.2]
    assert settings("--knn.depths=backbone", "--knn.weights", "uniform").weights == "uniform"
    _, (config,) = evaluate.read_configs(["curve", "--settings.grid.lrs", "0.1", "0.2"])
    assert protocol_calls.protocol_config("transfer", config.settings).grid.lrs == [0.1, 0.2]


def test_headings_tell_apart_what_differs():
    names = {"runs/a": "a", "b.pt": "b epoch 3", "x/b": "b epoch 3"}
    same = [("runs/a", "linear", "backbone"), ("runs/a", "mlp", "backbone")]
    assert list(suite.labels_of(same, names).values()) == ["linear", "mlp"]
    assert list(suite.labels_of(same[:1], names).values()) == ["linear"]
    other = [*same, ("b.pt", "mlp", "projector_1")]
    assert list(suite.labels_of(other, {"runs/a": "a", "b.pt": "b"}).values())[1:] == [
        "a, mlp, backbone", "b, mlp, projector_1"
    ]  # fmt: skip
    assert suite.labels_of(other, names)[other[-1]] == "b.pt, mlp, projector_1"


def test_each_setting_of_neighbours_has_one_column(checkpoint, tasks, capsys):
    words = ["suite", "--checkpoint", checkpoint, "--suite", tasks, "--protocols", "knn", "snn"]
    found = last_record(capsys, *words, "--knn.k=1")
    assert list(found["top1"]) == ["knn", "snn"]
    assert Path(found["table"]).read_text().splitlines()[0] == "| top-1, % | knn | snn |"
    found = last_record(capsys, *words, "--knn.k", "1", "5")
    labels = ["knn, backbone.k1_t0.1", "knn, backbone.k5_t0.1", "snn, backbone"]
    assert list(found["top1"]) == labels
    for record in read_results(checkpoint):
        if record["protocol"] == "knn":
            metrics = record["metrics"]["backbone"]
            assert metrics["top1"] == metrics["k1_t0.1"]["top1"]


def test_runs_in_folders_of_one_name_keep_a_column_each(checkpoint, tasks, tmp_path, capsys):
    paths = [str(tmp_path / parent / "run") for parent in "xy"]
    torch.manual_seed(1)
    for path in paths:
        shutil.copytree(checkpoint, path)
        state = torch.load(f"{path}/checkpoint.pt")
        for key, value in state["model"].items():
            if key.endswith("conv1.weight"):
                torch.nn.init.normal_(value)
        torch.save(state, f"{path}/checkpoint.pt")
    words = ["--checkpoint", *paths, "--suite", tasks, "--system.torch_threads=1"]
    words += ["--protocols=knn", "--data.num_workers=1"]
    assert evaluate.main(["suite", *words]) == 0
    top1 = json.loads(capsys.readouterr().out.splitlines()[-1])["top1"]
    for path in paths:
        own = [record["metrics"]["backbone"]["top1"] for record in read_results(path)]
        assert list(top1[f"{path}, knn"].values()) == own and len(own) == 2
    assert len(top1) == 2
    assert len({tuple(values.values()) for values in top1.values()}) == 2


def test_with_out_all_that_is_written_goes_there(checkpoint, tasks, tmp_path, capsys):
    before, out = sorted(Path(checkpoint).iterdir()), tmp_path / "out"
    words = ["--checkpoint", checkpoint, "--suite", tasks, "--system.torch_threads=1"]
    words += ["--protocols=knn", "--data.num_workers=1", f"--out={out}"]
    assert evaluate.main(["suite", *words]) == 0
    assert sorted(Path(checkpoint).iterdir()) == before
    assert len(read_results(out)) == 2 and (out / "suite_tasks.md").is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    checkpoint, tasks, tmp_path, capsys
):
    (tmp_path / "file").touch()
    words = ["--checkpoint", checkpoint, "--suite", tasks, f"--out={tmp_path}/file/out"]
    assert evaluate.main(["suite", *words, "--protocols=knn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file/out: cannot hold results" in line and read_results(checkpoint) == []


def test_several_checkpoints_and_depths_become_columns(checkpoint, tasks, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(checkpoint)

    def call(protocol, config, world, stop):
        value = {"top1": len(config.checkpoint) / 1000, "top5": 0.9, "per_class": [0.1]}
        name = Path(config.checkpoint).name
        return {"name": name, "metrics": dict.fromkeys(config.depths, value)}

    monkeypatch.setattr(protocol_calls, "call_protocol", call)
    config = suite.SuiteConfig(
        checkpoint=[checkpoint, str(other)], suite=tasks, protocols=["linear"],
        linear={"depths": ["backbone", "projector_1"]}, out=str(tmp_path / "out"),
    )  # fmt: skip
    found = suite.run(config, World.join("cpu", 1), None)["top1"]
    assert list(found) == [
        "run, linear, backbone", "run, linear, projector_1",
        "other, linear, backbone", "other, linear, projector_1",
    ]  # fmt: skip
    assert found["other, linear, backbone"]["seven"] == len(str(other)) / 1000


def test_settings_of_an_entry_win_over_those_of_the_command(tmp_path):
    entry = {"name": "a", "train": "t", "val": "v", "batch_size": 3, "mean": [1, 2, 3]}
    path = write_suite(tmp_path / "s.yaml", entry, {**entry, "name": "b", "batch_size": 4})
    read = suite.read_suite(path, EvalData(batch_size=9, num_workers=2, std=(4.0, 5.0, 6.0)))
    assert [data.batch_size for data in read.values()] == [3, 4]
    assert read["a"].num_workers == 2 and read["a"].train == "t"
    assert read["a"].mean == (1, 2, 3) and read["a"].std == (4, 5, 6)
    assert read["a"].label_field == "label"
    assert suite.read_suite(path, EvalData(label_field="x"))["a"].label_field == "x"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": "a"}, "expected a list of {name, train, val, ...}"),
        ([{"name": "a", "train": "t"}], "entry 1: got {'name': 'a', 'train': 't'}, expected"),
        ([{"name": "a", "train": "t", "val": "v"}] * 2, "entry 2: the name 'a' occurs twice"),
        ([{"name": "a", "train": "t", "val": "v", "x": 1}], "entry 1: "),
        ([{"name": "a", "train": "/no", "val": "v"}], "a: data.train or data.val: no file '/no'"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line_before_anything_is_measured(
    tmp_path, checkpoint, capsys, entries, message
):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(entries))
    assert evaluate.main(["suite", "--checkpoint", checkpoint, f"--suite={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and read_results(checkpoint) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "suite: got none"),
        (["--suite=/nope.yaml"], "/nope.yaml: cannot be read"),
        (["--linear.depths=[projector_9]"], "got 'projector_9', but"),
        (["--linear.data.train=x"], "linear.data: got it here, expected it as --data"),
        (["--mlp.layers=3"], "mlp of mlp: unknown key 'layers'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path, checkpoint, tasks, capsys, words, message):
    words = words if words[:1] in ([], ["--suite=/nope.yaml"]) else [f"--suite={tasks}", *words]
    assert evaluate.main(["suite", "--checkpoint", checkpoint, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/suites/*.yaml")))
def test_suites_that_we_ship_are_sound(path):
    assert len(suite.read_suite(path, EvalData())) >= 3


def test_the_suite_of_shapes_asks_for_fields_that_shapes_have():
    from ffcv_ssl.sources import open_source

    source = open_source("shapes", num_samples=1, size_px=8)
    fields = [data.label_field for data in suite.read_suite(
        REPOSITORY / "configs/suites/shapes.yaml", EvalData()).values()]  # fmt: skip
    assert isinstance(source.dataset, WithDistanceBin) and len(fields) == 3
    assert all(isinstance(source.fields[name], IntField) for name in fields)
