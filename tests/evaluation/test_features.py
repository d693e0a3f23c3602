"""Stored features: computed once, the right ones, and never half a file."""

import errno
import os

import numpy as np
import pytest
import torch
from support.evaluations import write_run

from ffcv_ssl.config import settings
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation import features
from ffcv_ssl.evaluation.datasets import open_datasets, resolve_loading, with_field_names
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.features import extract
from ffcv_ssl.evaluation.image_loaders import clean_loader
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.training.world import World

DATA = EvalData(batch_size=64, num_workers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, raw_beton):
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    write_run(folder, raw_beton, raw_beton)
    return folder


@pytest.fixture
def encoder(run):
    """The run's encoder, which counts the images that it sees."""
    encoder = load_encoder(run)
    encoder.seen, encode = 0, encoder.encode

    def counting(images):
        encoder.seen += len(images)
        return encode(images)

    encoder.encode = counting
    return encoder


def take(encoder, folder, depths=("backbone",), data=DATA, dtype="float32", **options):
    datasets = open_datasets(data, EvalLabels(), encoder)
    return extract(encoder, datasets.train, datasets, depths, folder, dtype, World(), **options)


def test_rows_are_the_features_of_centre_crops_in_the_files_order(encoder, tmp_path, raw_beton):
    found = take(encoder, tmp_path, ["projector_1", "backbone"])
    datasets = open_datasets(DATA, EvalLabels(), encoder)
    assert (
        datasets.resolution_px == 16 and datasets.center_ratio == 1.0
    )  # the run's images were small
    with clean_loader(datasets.train, datasets, World()) as loader:
        batch = next(iter(loader))
    expected = encoder.encode(batch.view_0)
    for depth, rows in found.rows.items():
        assert rows.shape == (200, encoder.widths[depth]) and rows.dtype == np.float32
        np.testing.assert_allclose(rows[:64], expected[depth].numpy(), rtol=1e-4, atol=1e-5)
    assert found.ids.tolist() == list(range(200))


def test_files_are_used_again_and_only_missing_depths_are_computed(encoder, tmp_path):
    first = take(encoder, tmp_path)
    assert encoder.seen == 200
    again = take(encoder, tmp_path)
    assert encoder.seen == 200
    np.testing.assert_array_equal(first.rows["backbone"], again.rows["backbone"])
    both = take(encoder, tmp_path, ["backbone", "projector_2"])
    assert encoder.seen == 400 and both.rows["projector_2"].shape == (200, 8)
    assert isinstance(both.rows["backbone"], np.memmap)


def test_some_samples_come_from_the_whole_sets_file_or_from_their_own(encoder, tmp_path):
    some = np.array([3, 50, 199])
    own = take(encoder, tmp_path / "own", indices=some)
    assert encoder.seen == 3 and own.ids.tolist() == some.tolist()
    whole = take(encoder, tmp_path / "whole")
    part = take(encoder, tmp_path / "whole", indices=some)
    assert encoder.seen == 203 and part.ids.tolist() == some.tolist()
    np.testing.assert_array_equal(part.rows["backbone"], whole.rows["backbone"][some])
    np.testing.assert_allclose(own.rows["backbone"], part.rows["backbone"], rtol=1e-4, atol=1e-5)


def test_other_weights_pixels_or_precision_never_share_a_file(encoder, run, tmp_path):
    variants = [
        {}, {"data": EvalData(resolution_px=24)}, {"data": EvalData(mean=(1, 2, 3))},
        {"data": EvalData(center_ratio=0.5)}, {"dtype": "float16"},
    ]  # fmt: skip
    for count, variant in enumerate(variants, 1):
        take(encoder, tmp_path, **variant)
        assert len(list(tmp_path.glob("*-backbone.npy"))) == count
    encoder.precision = "bf16"
    take(encoder, tmp_path)
    other = load_encoder(run)
    other.model.backbone.bn1.running_mean += 0.1
    take(other, tmp_path)
    assert len(list(tmp_path.glob("*-backbone.npy"))) == len(variants) + 2


def test_float16_is_half_the_size_and_comes_back_as_float32(encoder, tmp_path):
    exact, half = take(encoder, tmp_path), take(encoder, tmp_path, dtype="float16")
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*-backbone.npy"))
    assert sizes == [128 + 200 * 512 * 2, 128 + 200 * 512 * 4]
    rows = half.take("backbone", slice(None))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, exact.take("backbone", slice(None)), rtol=1e-3, atol=1e-4)


class Stop:
    """Asks to stop at the third look."""

    looks = 0

    @property
    def asked(self):
        self.looks += 1
        return self.looks > 2


def test_an_interrupted_or_failed_write_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        take(encoder, tmp_path, stop=Stop())
    assert os.listdir(tmp_path) == []

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; free some space, use"):
        take(encoder, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [(torch.nan, "float32", "take another"), (1e6, "float16", "use --features.dtype float32")],
)
def test_features_that_are_not_finite_are_refused(encoder, tmp_path, value, dtype, advice):
    encode = encoder.encode

    def broken(images):
        features = encode(images)
        features["backbone"][-1, 7] = value
        return features

    encoder.encode = broken
    with pytest.raises(UserError, match=f"simclr: features at backbone are not finite; .*{advice}"):
        take(encoder, tmp_path, dtype=dtype)
    assert os.listdir(tmp_path) == []


def store(folder, num_rows=6):
    """The files of a few samples' features, without an encoder, and their batches."""
    files = features._Files.__new__(features._Files)
    files.folder, files.key, files.checkpoint = folder, "key", "a.pt"
    files.dtype, files.widths, files.num_rows = np.dtype(np.float32), {"backbone": 3}, num_rows
    rows = np.arange(3.0 * num_rows, dtype=np.float32).reshape(num_rows, 3)
    return files, [({"backbone": rows}, np.arange(num_rows))]


def test_writers_of_the_same_features_do_not_disturb_each_other(tmp_path, monkeypatch):
    files, batches = store(tmp_path)
    replace, done = os.replace, []

    def replace_after_another_writer(source, target):
        if str(target).endswith(features.DIGEST) and not done:  # between its file and its digest
            done.append("begun")
            files.write(batches, ["backbone"])
            done.append("ended")
        replace(source, target)

    monkeypatch.setattr(features.os, "replace", replace_after_another_writer)
    files.write(batches, ["backbone"])
    assert done == ["begun", "ended"] and files.have(["backbone"])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("ending", [".npy", features.DIGEST])
@pytest.mark.parametrize("name", ["backbone", "ids"])
def test_a_pipe_in_place_of_a_file_is_refused_before_any_is_computed(tmp_path, name, ending):
    files, batches = store(tmp_path)
    files.write(batches, ["backbone"])
    path = files.path(name).with_suffix(ending)
    path.unlink()
    os.mkfifo(path)
    for use in (files.have, lambda depths: files.write(iter(()), depths)):
        with pytest.raises(UserError, match=f"{path}: is a pipe, expected a regular file"):
            use(["backbone"])


def test_features_that_cannot_fit_are_refused_before_any_is_computed(
    encoder, tmp_path, monkeypatch
):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="got 0 MB free, the features need 0 MB; use another"):
        take(encoder, tmp_path)
    assert encoder.seen == 0


def test_fields_are_those_named_or_the_runs_or_the_usual_ones(encoder):
    def fields(**given):
        data = with_field_names(EvalData(**given), encoder)
        return data.image_field, data.label_field

    assert fields() == ("image", "label")
    encoder.config = {"data": {"image_field": "photo", "label_field": "kind"}}
    assert fields() == ("photo", "kind")
    assert fields(image_field="image", label_field="x") == ("image", "x")
    encoder.config = None
    assert fields() == ("image", "label")


def test_open_settings_are_the_runs_and_imagenets_without_one(encoder):
    named = with_field_names(DATA, encoder)
    loading, side, ratio = resolve_loading(named, encoder)
    assert (loading.mean, side, ratio) == ((100, 101, 102), 16, 1.0)
    assert loading.std == settings.DataConfig().std
    encoder.config = None
    loading, side, ratio = resolve_loading(with_field_names(DATA, encoder), encoder)
    assert (loading.mean, side, ratio) == (settings.DataConfig().mean, 224, 224 / 256)
    given = EvalData(mean=(1, 2, 3), std=(4, 5, 6), resolution_px=40, center_ratio=0.5)
    loading, side, ratio = resolve_loading(with_field_names(given, encoder), encoder)
    assert (loading.mean, loading.std, side, ratio) == ((1, 2, 3), (4, 5, 6), 40, 0.5)
    assert torch.is_tensor(encoder.encode(torch.zeros(1, 3, 16, 16))["backbone"])


@pytest.mark.parametrize("name", ["backbone", "ids"])
def test_a_damaged_file_is_computed_again(encoder, tmp_path, name, capsys):
    expected = np.array(take(encoder, tmp_path).rows["backbone"])
    (path,) = tmp_path.glob(f"*-{name}.npy")
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-77] + bytes([whole[-77] ^ 4]) + whole[-76:], b""):
        path.write_bytes(damaged)
        seen = encoder.seen
        found = take(encoder, tmp_path)
        assert encoder.seen == seen + 200
        np.testing.assert_array_equal(found.rows["backbone"], expected)
        assert found.ids.tolist() == list(range(200))
    assert f"{path}: damaged" in capsys.readouterr().err


def test_the_whole_sets_file_is_not_read_where_the_samples_have_their_own(
    encoder, tmp_path, monkeypatch
):
    some, read = np.array([3, 50, 199]), []
    take(encoder, tmp_path, indices=some)
    take(encoder, tmp_path)
    digest = features._known_digest
    monkeypatch.setattr(features, "_known_digest", lambda *a: read.append(a[1]) or digest(*a))
    part = take(encoder, tmp_path, indices=some)
    assert part.ids.tolist() == some.tolist() and encoder.seen == 203
    assert read and max(read) < 200 * 512 * 4


def test_a_damaged_file_is_read_once_and_then_computed_again(tmp_path, capsys, monkeypatch):
    files, batches = store(tmp_path)
    files.write(batches, ["backbone"])
    path, read, digest = files.path("backbone"), [], features._known_digest
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(features, "_known_digest", lambda *a: read.append(a[0]) or digest(*a))
    for _ in range(3):
        assert not files.have(["backbone"])
    assert read == [path] and capsys.readouterr().err.count("\n") == 1
    files.write(batches, ["backbone"])
    assert files.have(["backbone"])


def test_some_rows_of_a_file_are_read_only_when_asked_for(encoder, tmp_path):
    whole, some = take(encoder, tmp_path), np.array([3, 50, 199])
    part = take(encoder, tmp_path, indices=some)
    assert isinstance(part.rows["backbone"].whole, np.memmap)
    assert part.rows["backbone"].shape == (3, 512)
    for chosen in (slice(1, 3), np.array([2, 0])):
        expected = whole.take("backbone", some[chosen])
        np.testing.assert_array_equal(part.take("backbone", chosen), expected)
