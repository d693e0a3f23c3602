"""The command evaluate.py: frozen protocols on a tiny run, its settings, and its refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.evaluations import ONE_THREAD, write_run
from torchvision.models import resnet34

import evaluate
from ffcv_ssl import DatasetWriter
from ffcv_ssl.config.renamed import say_once
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import protocol_calls, similarity_bank
from ffcv_ssl.evaluation.confusion import confusion_matrix, draw_confusion, per_class_accuracy
from ffcv_ssl.evaluation.datasets import labels_digest, open_datasets
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.image_loaders import augmented_ops, clean_loader, clean_ops
from ffcv_ssl.evaluation.protocol_run import open_frozen
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.evaluation.protocols.linear import LinearConfig
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.training.run_data import open_dataset
from ffcv_ssl.training.world import World
from pipelines import RECIPES, build

pytestmark = pytest.mark.whole  # whole commands on runs of their own


class Colours:
    """Images of 16 x 16 whose class is their colour, with noise; one in ten is unlabelled."""

    def __init__(self, count, num_classes=3):
        self.count, self.num_classes = count, num_classes

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        label = i % self.num_classes
        image = np.random.default_rng(i).normal(110, 25, (16, 16, 3))
        image[:, :, label % 3] += 60 * (1 + label // 3)
        return np.clip(image, 0, 255).astype(np.uint8), -1 if i % 10 == 9 else label


def write_colours(path, count, num_classes=3, names=None):
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    class_names = {"label": names} if names else {}
    writer = DatasetWriter(str(path), fields, num_workers=1, class_names=class_names)
    writer.from_indexed_dataset(Colours(count, num_classes))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    names = ["red", "green", "blue"]
    return (
        write_colours(folder / "train.beton", 120, names=names),
        write_colours(folder / "val.beton", 50, names=names),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    write_run(folder, *files)
    return folder


def result(capsys, *arguments):
    """What a successful command says in its last line."""
    code = evaluate.main([*map(str, arguments), *ONE_THREAD])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out.splitlines()[-1])


def mistake(capsys, *arguments):
    """The one line with which a command is refused."""
    code = evaluate.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error


def test_linear_probes_at_two_depths_learn_and_leave_their_results(run, files, tmp_path, capsys):
    record = result(
        capsys, "linear", "--checkpoint", run, "--depths", "backbone", "projector_1",
        "--epochs", 20, "--out", tmp_path,
    )  # fmt: skip
    assert record["metrics"]["backbone"]["top1"] > 0.8 and record["about"]["epoch"] == 0.5
    assert record["data"]["num_labels"] == 108 and record["data"]["train"] == files[0]
    assert record["settings"]["epochs"] == 20 and record["settings"]["lrs"][0] == 0.3
    assert read_results(tmp_path) == [record]
    assert not list(tmp_path.glob("*.csv"))
    for depth, metrics in record["metrics"].items():
        assert len(metrics["per_class"]) == 3 and metrics["selected_on"] == "holdout"
        assert 1 <= metrics["best_epoch"] <= 20, depth
        assert (tmp_path / metrics["confusion"]).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "features").glob("*-projector_1.npy"))) == 2


def test_the_stages_of_a_resnet_are_depths_of_frozen_features_but_not_of_finetuning(
    run, tmp_path, capsys
):
    words = ("--checkpoint", run, "--depths", "layer1", "backbone", "--out", tmp_path)
    knn = result(capsys, "knn", *words)["metrics"]
    assert knn["layer1"]["top1"] > 0.6 and set(knn) == {"layer1", "backbone"}
    assert mistake(capsys, "finetune", "--checkpoint", run, "--depth", "layer1").endswith(
        "expected one of backbone, projector_1, projector_2\n"
    )
    encoder, images = load_encoder(run), torch.randn(3, 3, 32, 32)
    expected, fingerprint = encoder.encode(images), encoder.fingerprint
    encoder.check_depths(["layer4"])
    features = encoder.encode(images)
    assert features["layer3"].shape == (3, encoder.widths["layer3"]) == (3, 256)
    torch.testing.assert_close(features["layer4"], features["backbone"])
    assert all(torch.equal(features[depth], values) for depth, values in expected.items())
    assert load_encoder(run).fingerprint == fingerprint


def test_mlp_probe_on_augmented_views_and_few_labels(run, tmp_path, capsys):
    record = result(
        capsys, "mlp", "--checkpoint", run, "--hidden", "16", "--lrs", "0.1", "--epochs", 8,
        "--augment", "true", "--labels.scheme", "balanced", "--labels.count", 60,
        "--rows_per_step", 20, "--out", tmp_path,
    )  # fmt: skip
    assert record["data"]["labels"] == "60 labels of 3 classes, 20 each"
    assert record["metrics"]["backbone"]["top1"] > 0.6


def test_neighbours_and_inference_on_stored_and_on_augmented_banks(
    run, tmp_path, capsys, monkeypatch
):
    common_words = ("--checkpoint", run, "--out", tmp_path)
    knn = result(capsys, "knn", *common_words, "--ks", 5, 1)["metrics"]["backbone"]
    assert knn["top1"] == knn["k5_t0.1"]["top1"] > 0.6 and "k1_t0.1" in knn
    snn = result(capsys, "snn", *common_words, "--num_views", 2)["metrics"]["backbone"]
    assert snn["top1"] == snn["t0.1"]["top1"] > 0.6
    monkeypatch.setattr(similarity_bank, "BANK_ROWS", 70)
    words = ("snn", *common_words, "--num_views", 2, "--data.batch_size", 50)
    assert result(capsys, *words)["metrics"]["backbone"]["per_class"] == snn["per_class"]
    clean = result(capsys, "snn", *common_words, "--num_views", 0)["metrics"]["backbone"]
    encoder = load_encoder(run)
    datasets = open_datasets(EvalData(num_workers=1), EvalLabels(), encoder)
    rows, labels = {}, {"train": datasets.labels, "val": datasets.val.labels}
    for name, dataset in (("train", datasets.train), ("val", datasets.val)):
        with clean_loader(dataset, datasets, World()) as loader:
            features = [encoder.encode(batch.view_0)["backbone"] for batch in loader]
        kept = torch.from_numpy(labels[name]) >= 0
        rows[name] = torch.nn.functional.normalize(torch.cat(features)[kept].double(), dim=1)
        labels[name] = torch.from_numpy(labels[name])[kept]
    shares = torch.softmax(rows["val"] @ rows["train"].T / 0.1, dim=1)
    scores = shares @ torch.nn.functional.one_hot(labels["train"], 3).double()
    expected = (scores.argmax(dim=1) == labels["val"]).double().mean()
    assert clean["top1"] == pytest.approx(float(expected))


def test_more_neighbours_than_the_bank_has_images_are_refused(run, tmp_path, capsys):
    words = ("knn", "--checkpoint", run, "--out", tmp_path, "--labels.count", 30)
    line = mistake(capsys, *words, "--ks", 5, 31)
    assert line == "ks: got 31, but the bank has 30 images; give smaller --ks or more labels\n"
    assert "bank has 60 images" in mistake(capsys, *words, "--num_views", 2, "--ks", 61)
    record = result(capsys, *words, "--num_views", 2, "--ks", 60)
    assert "k60_t0.1" in record["metrics"]["backbone"]


def test_several_checkpoints_give_a_list_of_results_each_in_its_folder(run, tmp_path, capsys):
    write_run(tmp_path / "other", "gone.beton", "gone.beton", step=20)
    (data,) = [load_encoder(run).config["data"]]
    summary = result(
        capsys, "knn", "--checkpoint", run, tmp_path / "other", "--ks", "3",
        "--data.train", data["train"], "--data.val", data["val"],
    )  # fmt: skip
    assert [r["name"] for r in summary["results"]] == ["simclr", "other"]
    assert read_results(tmp_path / "other") == summary["results"][1:]
    assert read_results(run)[-1:] == summary["results"][:1]


def test_a_bad_checkpoint_is_found_before_the_first_of_several_is_measured(
    run, files, tmp_path, capsys
):
    write_run(tmp_path / "good", *files)
    write_run(tmp_path / "shallow", *files, "--model.projector=16")
    write_run(tmp_path / "dataless", "gone.beton", "gone.beton")
    (tmp_path / "text.pt").write_text("hello")
    for protocol in ("knn", "finetune"):
        depth = (
            ["--depth", "projector_2"] if protocol == "finetune" else ["--depths", "projector_2"]
        )
        for bad, message in (
            ("none", "no file or folder"), ("text.pt", "text.pt: not a readable checkpoint"),
            ("shallow", "shallow has "), ("dataless", "no file 'gone.beton'"),
        ):  # fmt: skip
            line = mistake(
                capsys, protocol, "--checkpoint", tmp_path / "good", tmp_path / bad, *depth
            )
            assert message in line
            assert [path.name for path in (tmp_path / "good").iterdir()].count("results.jsonl") == 0
    assert "not a readable" in mistake(
        capsys, "export", "--checkpoint", tmp_path / "good", tmp_path / "text.pt"
    )
    assert not (tmp_path / "good/export").exists()


def test_of_several_checkpoints_the_model_is_that_of_files_that_do_not_say_what_they_are(
    run, files, tmp_path, capsys
):
    bare = tmp_path / "bare.pth"
    torch.save(resnet34().state_dict(), bare)
    data = ("--data.train", files[0], "--data.val", files[1], "--out", tmp_path / "out")
    words = ("--ks", 3, "--model.backbone", "resnet34", *data)
    summary = result(capsys, "knn", "--checkpoint", run, bare, *words)
    backbones = [record["settings"]["model"]["backbone"] for record in summary["results"]]
    assert backbones == [None, "resnet34"]  # the run's is what it is where it is measured alone
    line = mistake(capsys, "knn", "--checkpoint", run, *words)
    assert "got a resnet18 with the imagenet stem, but --model asks for a resnet34" in line
    line = mistake(capsys, "knn", "--checkpoint", run, bare, "--ks", 3, *data)
    assert f"{bare}: names no network; give --model.backbone" in line
    suite = tmp_path / "tasks.yaml"
    suite.write_text(f"- {{name: colours, train: {files[0]}, val: {files[1]}}}\n")
    found = result(
        capsys, "suite", "--checkpoint", bare, run, "--suite", suite, "--protocols", "knn",
        "--knn.ks", 3, "--model.backbone", "resnet34", "--out", tmp_path / "out",
    )  # fmt: skip
    assert {label.split(",")[0] for label in found["top1"]} == {"bare", "simclr"}


def test_the_digest_of_labels_tells_apart_choices_and_classes_and_nothing_else(run):
    datasets = open_datasets(EvalData(), EvalLabels(), load_encoder(run))

    def digest(**changes):
        labels = np.full_like(datasets.labels, -1)
        for index, label in changes.items():
            labels[int(index[1:])] = label
        return labels_digest(replace(datasets, labels=labels))

    first = digest(i0=0, i1=1)
    assert first == digest(i1=1, i0=0) and len(bytes.fromhex(first)) == 8
    assert len({first, digest(i0=1, i1=0), digest(i0=0, i2=1), digest(i0=0)}) == 4


def test_several_words_after_a_key_are_a_list_and_one_word_too_where_a_list_is_asked_for():
    def read(*words):
        return evaluate.read_configs(["linear", *words])[1]

    (config,) = read("--lrs", "0.1", "1e-2", "--depths", "projector_1", "--epochs=7")
    assert config.lrs == [0.1, 0.01] and config.depths == ["projector_1"] and config.epochs == 7
    (config,) = read("--lrs", "[0.1,1.0]", "--depths=[backbone]", "--data.mean", "[1,2,3]")
    assert config.lrs == [0.1, 1.0] and config.data.mean == (1, 2, 3)
    assert [c.checkpoint for c in read("--checkpoint", "a b", "c", "--epochs", "2")] == ["a b", "c"]
    assert read()[0] == LinearConfig()


@pytest.mark.parametrize(
    "words, old, key, value",
    [
        (["finetune", "--layer", "1"], "layer", "depth", "projector_1"),
        (["transfer", "--layer=0"], "layer", "depth", "backbone"),
        (["knn", "--k", "1", "20"], "k", "ks", [1, 20]),
        (["snn", "--temperature=[0.1]"], "temperature", "temperatures", [0.1]),
        (["snn", "--views", "3"], "views", "num_views", 3),
        (["mlp", "--splits", "4"], "splits", "max_splits", 4),
    ],
)
def test_old_names_of_settings_work_with_one_note(words, old, key, value, tmp_path, capsys):
    say_once.cache_clear()
    _, (config,) = evaluate.read_configs(words)
    note = f"{old} is now {key}; the old name works for one release"
    assert getattr(config, key) == value
    assert capsys.readouterr().err == f"note: --{note}\n"
    file = tmp_path / "old.yaml"
    old_value = words[-1].partition("=")[2] or words[2:]
    file.write_text(f"{old}: {', '.join(old_value) if isinstance(old_value, list) else old_value}")
    if old != "k":
        _, (config,) = evaluate.read_configs([words[0], f"--config={file}"])
        assert getattr(config, key) == value
        assert capsys.readouterr().err == f"note: {file}: {note}\n"


def test_old_names_work_within_a_suite(capsys):
    say_once.cache_clear()
    _, (config,) = evaluate.read_configs(["suite", "--knn.k", "5", "--knn.views=2"])
    found = protocol_calls.protocol_config("knn", config.knn, "knn")
    assert (found.ks, found.num_views) == ([5], 2)
    assert capsys.readouterr().err.count("\n") == 2


def test_mistakes_end_in_one_line_and_exit_code_2(run, files, tmp_path, capsys):
    tail = ("--checkpoint", run)
    assert "expected one of export, finetune, knn" in mistake(capsys, "linea")
    assert "expected one of export, finetune, knn" in mistake(capsys)
    assert "checkpoint: got none" in mistake(capsys, "linear")
    assert "checkpoint: got none" in mistake(capsys, "linear", "--checkpoint")
    assert "nowhere" in mistake(capsys, "knn", "--checkpoint", "nowhere")
    for protocol in ("knn", "suite"):
        line = mistake(capsys, protocol, "--checkpoint=a", "--checkpoint", "b")
        assert line.startswith("checkpoint: got it twice")
    assert "unknown key 'tempratures'" in mistake(capsys, "knn", *tail, "--tempratures", "1")
    assert "expected --key x" in mistake(capsys, "knn", "x")
    line = mistake(capsys, "linear", *tail, "--lrs", "0.1", "inf")
    assert line == "lrs: got inf, expected a finite number\n"
    assert "no such depth" in mistake(capsys, "linear", *tail, "--depths", "projector_9")
    assert "gone.beton" in mistake(capsys, "linear", *tail, "--data.train", "gone.beton")
    names = tmp_path / "names.txt"
    names.write_text("n01440764_10026.JPEG\n")
    line = mistake(capsys, "snn", *tail, "--labels.scheme=file", f"--labels.file={names}")
    assert str(names) in line
    line = mistake(capsys, "snn", *tail, "--labels.fraction", "2")
    assert line.startswith("labels.fraction: got 2")
    for protocol, scheme, expected in (
        ("linear", "file", "file alone: --labels.file FILE"),
        ("finetune", "balanced", "either fraction or count: --labels.fraction 0.1"),
    ):
        line = mistake(capsys, protocol, *tail, "--labels.scheme", scheme)
        assert line == f"labels: scheme {scheme} got nothing, expected {expected}\n"


def test_training_and_validation_on_the_same_images_is_told_once_and_done(
    run, files, tmp_path, capsys
):
    same = shutil.copy(files[0], tmp_path / "copy.beton")
    words = ["--data.val", same, "--out", tmp_path]
    for lines in (1, 0):
        assert evaluate.main([*map(str, ["knn", "--checkpoint", run, *words]), *ONE_THREAD]) == 0
        assert capsys.readouterr().err.count(f"warning: {same} has the same content") == lines
    result(capsys, "knn", "--checkpoint", run, "--out", tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_classes_that_differ_between_the_files_are_named(run, files, tmp_path, capsys):
    def val(name, num_classes, names):
        path = write_colours(tmp_path / f"{name}.beton", 20, num_classes, names)
        return mistake(capsys, "knn", "--checkpoint", run, "--data.val", path)

    line = val("swapped", 3, ["red", "blue", "green"])
    assert "class 1 is 'blue', expected 'green' as in" in line and files[0] in line
    assert "got 4 classes in field 'label', expected the 3 classes of" in val("four", 4, None)
    assert "got 2 classes in field 'label'" in val("two", 2, ["red", "green"])
    assert "got 4 classes" in val("more", 4, ["red", "green", "blue", "white"])


def test_class_names_in_one_file_alone_are_not_compared_which_is_told_once(
    run, files, tmp_path, capsys
):
    unnamed = write_colours(tmp_path / "unnamed.beton", 20, num_classes=2)

    def notes(train, val):
        words = ("--data.train", train, "--data.val", val, "--out", tmp_path)
        assert evaluate.main([*map(str, ["knn", "--checkpoint", run, *words]), *ONE_THREAD]) == 0
        return capsys.readouterr().err

    assert notes(files[0], unnamed) == (
        f"note: {unnamed}: no class names in field 'label', so they could not be compared with "
        f"the class names in {files[0]}\n"
    )
    assert notes(files[0], unnamed) == ""
    same = write_colours(tmp_path / "same.beton", 40, num_classes=2)
    assert notes(same, unnamed) == ""
    named = write_colours(tmp_path / "named.beton", 30, 2, ["red", "green"])
    without, having = f"note: {same}: no class names in field 'label'", f"class names in {named}"
    line = notes(same, named)
    assert line.startswith(without) and line.endswith(f"{having}\n")


@pytest.mark.parametrize("largest", [99_999, 100_000, 10**7])
def test_a_label_field_of_identifiers_is_refused_before_anything_is_made_of_it(tmp_path, largest):
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    path = str(tmp_path / "a.beton")
    rows = [(np.zeros((8, 8, 3), np.uint8), label) for label in (0, largest, 1)]
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(rows)
    if largest < 100_000:
        assert open_dataset(path).num_classes == 100_000
        return
    with pytest.raises(UserError) as caught:
        open_dataset(path)
    assert str(caught.value) == (
        f"{path}: field 'label': got label {largest}, expected at most 99999; "
        "is this a field of identifiers? name another with --data.label_field"
    )


def test_several_ranks_are_refused(run):
    with pytest.raises(UserError, match="linear: got 2 ranks, expected one"):
        open_frozen("linear", LinearConfig(checkpoint=str(run)), World(0, 2))


def test_an_interrupted_evaluation_exits_with_75(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.command.StopSignal, "asked", True)
    code = evaluate.main(["linear", f"--checkpoint={run}", f"--out={tmp_path}", *ONE_THREAD])
    printed = capsys.readouterr()
    assert code == 75 and "interrupted" in printed.err and read_results(tmp_path) == []
    assert json.loads(printed.out.splitlines()[-1])["status"] == "interrupted"


def test_views_are_those_of_the_recipes_for_evaluation_and_fine_tuning(run):
    encoder = load_encoder(run)
    for small in (False, True):
        data = EvalData(center_ratio=None if small else 224 / 256)
        datasets = open_datasets(data, EvalLabels(), encoder)
        for ours, recipe in (
            (clean_ops, "evaluation"),
            (augmented_ops, "supervised"),
        ):
            theirs = build(RECIPES[recipe](small_images=small)["view_0"], datasets.resolution_px)
            assert [(type(op), vars(op)) for op in ours(datasets)] == [
                (type(op), vars(op)) for op in theirs
            ]


def test_confusion_counts_are_scikit_learns_and_classes_without_images_have_no_accuracy(tmp_path):
    from sklearn.metrics import confusion_matrix as theirs

    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 100), rng.integers(0, 5, 100)
    matrix = confusion_matrix(labels, predictions, 5)
    np.testing.assert_array_equal(matrix.binned(1), theirs(labels, predictions, labels=range(5)))
    accuracies = per_class_accuracy(matrix)
    assert accuracies[4] is None
    assert accuracies[0] == pytest.approx((predictions[labels == 0] == 0).mean(), abs=1e-6)
    draw_confusion(matrix, tmp_path / "a.png", "title", [f"class {i}" for i in range(5)])
    draw_confusion(confusion_matrix(*[range(60)] * 2, 60), tmp_path / "b.png", "many classes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
