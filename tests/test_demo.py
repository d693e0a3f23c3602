"""The demo's parts, and the whole of it on next to no data."""

import json

import pytest
import torch

import demo


def blobs(num_samples, seed, spread):
    """Three Gaussian blobs in 8 dimensions: features and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % 3
    centres = torch.eye(8)[:3] * 5
    return centres[labels] + spread * torch.randn(num_samples, 8, generator=generator), labels


@pytest.mark.parametrize("score", [demo.linear_probe, demo.knn])
def test_probes_find_classes_that_are_there_and_none_where_there_are_none(score):
    clear = score(*blobs(300, 0, 0.5), *blobs(90, 1, 0.5), 3)
    features, labels = blobs(300, 0, 0.5)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    chance = score(features, shuffled, *blobs(90, 1, 0.5), 3)
    assert clear == 100 and chance < 60


def test_linear_probe_reaches_the_minimum_of_its_convex_problem():
    features, labels = blobs(300, 0, 4.0)
    val_features, val_labels = blobs(3000, 1, 4.0)
    first = demo.linear_probe(features, labels, val_features, val_labels, 3)
    again = demo.linear_probe(10 * features + 3, labels, 10 * val_features + 3, val_labels, 3)
    assert first == pytest.approx(again, abs=0.5)  # standardised: scale and offset do not matter


def test_a_folder_with_other_peoples_files_is_not_deleted(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert demo.main([f"--out={tmp_path}"]) == 2
    assert (tmp_path / "thesis.tex").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not the demo's" in message


@pytest.mark.slow
def test_a_demo_that_learnt_nothing_says_so_and_exits_1(tmp_path, monkeypatch, capsys):
    for name, value in (("NUM_TRAIN", 130), ("NUM_VAL", 50), ("NUM_PROBE", 100)):
        monkeypatch.setattr(demo, name, value)
    assert demo.main([f"--out={tmp_path / 'demo'}"]) == 1
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["gain_points"] < 15 and "expected 15" in printed.err
    assert summary["chance"] == 10 and set(summary["trained"]) < set(summary["step_0"])
    assert "k-NN, pixels" in printed.out and (tmp_path / "demo" / "report.png").exists()
