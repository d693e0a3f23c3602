"""What evaluations refuse, and the line that says so."""

import errno
import types

import numpy as np
import pytest
import torch

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation import encoder, features, mean_ap, protocol_run, results, tuning_data
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.evaluation.studies import curve, seeds, suite, table
from ffcv_ssl.training.world import World


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="mean_average_precision: got a score that is not finite"):
        mean_ap.mean_average_precision(np.array([[np.nan]]), np.array([[1]]))


def test_a_protocol_of_one_device_refuses_several_ranks():
    with pytest.raises(
        UserError, match="knn: got 2 ranks, expected one; start it without torchrun"
    ):
        protocol_run.refuse_ranks("knn", types.SimpleNamespace(size=2))


def test_an_evaluation_that_is_asked_to_stop_says_how_to_go_on():
    with pytest.raises(Interrupted, match="evaluation: interrupted; run the same command again"):
        protocol_run.stop_if_asked(types.SimpleNamespace(asked=True))


def test_results_name_the_folder_that_cannot_hold_them(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"file/a: results cannot be written \(Not a directory\); this one is on stdout",
    ):
        results.report({}, tmp_path / "file/a")
    with pytest.raises(
        UserError, match=r"file/a: cannot hold results \(Not a directory\); use --out"
    ):
        results.writable_folder(tmp_path / "file/a")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="results cannot be written there; use --out"):
        results.writable_folder(tmp_path)


def test_a_folder_of_results_that_another_process_holds_is_named(tmp_path, monkeypatch):
    def held(*_):
        raise TimeoutError

    monkeypatch.setattr("ffcv_ssl.evaluation.results.locked", held)
    with pytest.raises(UserError, match=r"held by another process for [\d.]+ s; end that process"):
        with results._only_writer(tmp_path):
            pass


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_study_names_the_file_that_it_cannot_write(tmp_path, monkeypatch):
    for module in (seeds, suite, table):
        monkeypatch.setattr(module, "write_text", full)
    line = r": cannot be written \(.*No space left on device\); use --out"
    with pytest.raises(UserError, match=line):
        seeds._write(tmp_path / "a.md", "")
    with pytest.raises(UserError, match=line):
        suite.write(tmp_path, "a", {}, [])
    monkeypatch.setattr(table, "read_results", lambda folder: [{"a": 1}])
    with pytest.raises(UserError, match=line):
        table.run(table.TableConfig(checkpoint=[str(tmp_path)], out=str(tmp_path)), World(), None)


def test_features_name_the_folder_that_cannot_hold_them(tmp_path):
    store = types.SimpleNamespace(folder=tmp_path)
    error = features._Files._disk_error(store, OSError(errno.EACCES, "Permission denied"))
    assert str(error).endswith(
        "features cannot be written (Permission denied); use another --features.folder"
    )
    error = features._Files._disk_error(store, OSError(errno.ENOSPC, "No space left on device"))
    assert "the disk is full; free some space, use another --features.folder, or" in str(error)


def test_weights_of_another_network_are_refused(tmp_path):
    config = ModelConfig("resnet18", "imagenet", "16-8")
    weights = encoder.Model(config).state_dict()
    first = next(iter(weights))
    changed = {**weights, first: torch.zeros(1)}
    with pytest.raises(
        UserError,
        match=rf"a.pt: not a resnet18 with the imagenet stem: {first} is \[1\], expected \[",
    ):
        encoder._build(tmp_path / "a.pt", config, changed, first)


def test_images_with_several_labels_need_files_of_their_own():
    with pytest.raises(
        UserError, match="labels: got a choice, expected all for images with several labels"
    ):
        tuning_data._open_several_labels(EvalData(), EvalLabels(fraction=0.5), None, World())
    with pytest.raises(UserError, match=r"data.val: got none, expected --data.val FILE.beton"):
        tuning_data._open_several_labels(EvalData(val=""), EvalLabels(), None, World())


def test_a_curve_names_the_folder_that_it_cannot_write(tmp_path, monkeypatch):
    points = {"a": [{"step": 1, "value": 0.5}, {"step": 2, "value": 0.6}]}
    for name, value in {
        "calls_of": [], "recorded_data": {}, "refuse_other_data": None,
        "recorded_points": ("top1", points), "render": "",
    }.items():  # fmt: skip
        monkeypatch.setattr(curve, name, lambda *_, value=value: value)
    monkeypatch.setattr(curve, "write_text", full)
    config = curve.CurveConfig(checkpoint=[str(tmp_path)], out=str(tmp_path))
    with pytest.raises(
        UserError, match=r": cannot be written \(.*No space left on device\); use --out"
    ):
        curve.run(config, World(), None)


def test_a_file_of_results_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / results.RESULTS_FILE).mkdir()
    with pytest.raises(
        UserError, match=rf"{results.RESULTS_FILE}: cannot be read \(Is a directory\)"
    ):
        results.read_results(tmp_path)
