"""Linear and MLP probes on given features: accuracy, the choice of a setting, early stopping."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ffcv_ssl.errors import NonFiniteLoss, UserError
from ffcv_ssl.evaluation import probe_data as probe_data_file
from ffcv_ssl.evaluation import probe_training
from ffcv_ssl.evaluation.datasets import split_holdout
from ffcv_ssl.evaluation.features import Features
from ffcv_ssl.evaluation.probe_data import ProbeData, standardisation
from ffcv_ssl.evaluation.probe_training import evaluate_probes
from ffcv_ssl.evaluation.protocols.linear import LinearConfig
from ffcv_ssl.evaluation.protocols.mlp import MLPConfig

NUM_CLASSES = 6


def made(num_rows, seed, width=40):
    """Features of very different scales, (N, D) float32, with overlapping classes, and labels."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(5)
    centres = fixed.normal(size=(NUM_CLASSES, width))
    mixing = fixed.normal(size=(width, width)) * np.logspace(-2, 2, width)
    labels = rng.integers(0, NUM_CLASSES, num_rows)
    rows = (centres[labels] + rng.normal(scale=2.5, size=(num_rows, width))) @ mixing + 30
    return rows.astype(np.float32), labels


def probe_data(config, train, val, allowed=None):
    """A ProbeData of two (features, labels); allowed: the labels (N,) to learn from."""
    (rows, labels), (val_rows, val_labels) = train, val
    chosen = np.arange(len(rows)) if allowed is None else np.flatnonzero(allowed >= 0)
    datasets = SimpleNamespace(
        labels=labels if allowed is None else allowed, num_classes=NUM_CLASSES,
        val_labels=val_labels,
    )  # fmt: skip
    features = Features({"backbone": rows[chosen]}, chosen)
    val_features = Features({"backbone": val_rows}, np.arange(len(val_rows)))
    return ProbeData(config, datasets, features, val_features, torch.device("cpu"))


def silent(text):
    pass


def sklearn_top1(train, val):
    """Accuracy of scikit-learn's logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return model.fit(*train).score(*val)


@pytest.mark.parametrize("num_rows", [150, 800])
def test_default_linear_probe_is_within_two_points_of_scikit_learns_logistic_regression(num_rows):
    train, val = made(num_rows, 0), made(4000, 1)
    config = LinearConfig()
    metrics = evaluate_probes(config, probe_data(config, train, val), say=silent)["backbone"]
    assert metrics["top1"] > sklearn_top1(train, val) - 0.02
    assert metrics["selected_on"] == "holdout" and metrics["lr"] in config.lrs
    assert metrics["confusion"].sum() == 4000
    assert metrics["top1"] == metrics["confusion"].trace() / 4000 <= metrics["top5"]
    shares = metrics["confusion"].diagonal() / metrics["confusion"].sum(axis=1)
    np.testing.assert_allclose(metrics["per_class"], shares, atol=1e-6)


def test_few_held_out_images_are_drawn_several_times_and_the_best_on_average_is_chosen(monkeypatch):
    train, val = made(150, 0), made(200, 1)
    config = LinearConfig(lrs=[0.01, 3.0], epochs=3, max_splits=4)
    data, seen, train_probes = probe_data(config, train, val), [], probe_training.train_probes

    def noting(*arguments):
        probes, selections = train_probes(*arguments)
        if arguments[4] == "holdout":
            seen.append((data.rows["holdout"][1], selections["backbone"].last_scores[0]))
        return probes, selections

    monkeypatch.setattr(probe_training, "train_probes", noting)
    metrics = evaluate_probes(config, data, say=silent)["backbone"]
    assert len(seen) == 4 and len({tuple(held) for held, _ in seen}) == 4
    means = torch.stack([scores for _, scores in seen]).mean(dim=0)
    assert metrics["selection_top1"] == pytest.approx(means.max().item())
    assert metrics["lr"] == config.lrs[int(means.argmax())]


def rings(num_rows, seed):
    """Classes by the distance from the origin, which no linear classifier can tell apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, num_rows)
    rows = rng.normal(size=(num_rows, 3))
    rows *= (1 + labels[:, None]) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), labels


def test_mlp_probe_learns_what_no_linear_probe_can():
    train, val = rings(3000, 0), rings(600, 1)
    linear, mlp = LinearConfig(epochs=10), MLPConfig(epochs=10, hidden=[64, 64], lrs=[0.1])
    top1 = [
        evaluate_probes(kind, probe_data(kind, train, val), say=silent)["backbone"]["top1"]
        for kind in (linear, mlp)
    ]
    assert top1[0] < 0.4 and top1[1] > 0.8


def test_the_setting_is_chosen_without_a_look_at_val():
    train, val = made(400, 0), made(300, 1)
    shuffled = (val[0], np.random.default_rng(3).permutation(val[1]))
    config = LinearConfig(epochs=5)
    honest, blind = (
        evaluate_probes(config, probe_data(config, train, each), say=silent)["backbone"]
        for each in (val, shuffled)
    )
    assert honest["top1"] > blind["top1"]
    for key in ("lr", "best_lr", "best_epoch", "selection_top1", "best_selection_top1"):
        assert honest[key] == blind[key]


def test_chosen_on_val_reports_the_best_there_and_says_so():
    train, val = made(300, 0), made(300, 1)
    config = LinearConfig(epochs=5, select="val", lrs=[0.1, 1.0, 10.0])
    data = probe_data(config, train, val)
    metrics = evaluate_probes(config, data, say=silent)["backbone"]
    assert metrics["selected_on"] == "val" and data.size("holdout") == 0
    assert metrics["top1"] == pytest.approx(metrics["selection_top1"])
    assert metrics["best_top1"] == pytest.approx(metrics["best_selection_top1"])
    alone = [
        evaluate_probes(LinearConfig(epochs=5, select="val", lrs=[lr]), data, say=silent)[
            "backbone"
        ]
        for lr in config.lrs
    ]
    assert metrics["top1"] == max(each["top1"] for each in alone)
    assert metrics["best_top1"] == max(each["best_top1"] for each in alone)


def test_the_final_probe_is_trained_on_the_held_out_labels_too():
    train, val = made(400, 0), made(300, 1)
    config = LinearConfig(epochs=3, lrs=[1.0])
    chosen = evaluate_probes(config, probe_data(config, train, val), say=silent)["backbone"]
    config = LinearConfig(epochs=3, lrs=[1.0], holdout=0.0)
    everything = evaluate_probes(config, probe_data(config, train, val), say=silent)["backbone"]
    assert everything["selected_on"] == "nothing" and "best_top1" not in everything
    assert (chosen["confusion"].binned(1) == everything["confusion"].binned(1)).all()


def test_labels_that_are_not_allowed_are_never_seen():
    train, val = made(300, 0), made(300, 1)
    allowed = np.where(np.arange(300) % 3 == 0, train[1], -1)
    wrong = train[0], np.where(allowed >= 0, train[1], (train[1] + 1) % NUM_CLASSES)
    config = LinearConfig(epochs=3, lrs=[1.0])
    results = [
        evaluate_probes(config, probe_data(config, each, val, allowed), say=silent)["backbone"]
        for each in (train, wrong)
    ]
    assert (results[0]["confusion"].binned(1) == results[1]["confusion"].binned(1)).all()


def test_a_choice_without_held_out_labels_is_refused_with_a_remedy():
    one_each = (made(300, 0)[0][:NUM_CLASSES], np.arange(NUM_CLASSES))
    config = LinearConfig(epochs=1)
    data = probe_data(config, one_each, made(50, 1))
    with pytest.raises(
        UserError,
        match="holds out no label to choose settings on; use more labels, or one value for lrs",
    ):
        evaluate_probes(config, data, say=silent)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"holdout": 1.0}, "holdout: got 1, expected below 1"),
        ({"momentum": 1.0}, "momentum: got 1, expected below 1"),
    ],
)
@pytest.mark.parametrize("kind", [LinearConfig, MLPConfig])
def test_settings_with_which_no_probe_can_learn_are_refused(kind, settings, line):
    with pytest.raises(UserError) as caught:
        kind(**settings)
    assert str(caught.value) == line


def diverging(**settings):
    """An MLPConfig and data on which rates of 1e20 and more diverge."""
    config = MLPConfig(checkpoint="runs/a", hidden=[16], epochs=3, **settings)
    return config, probe_data(config, made(200, 0), made(100, 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"lrs": [1e20]}, {"lrs": [1e20], "holdout": 0.0}, {"lrs": [1e20, 1e30], "select": "val"},
        {"lrs": [1e20, 1e30], "weight_decays": [0.0, 1.0]},
    ],
)  # fmt: skip
def test_a_probe_that_diverged_has_no_accuracy(settings):
    config, data = diverging(**settings)
    with pytest.raises(NonFiniteLoss) as caught:
        evaluate_probes(config, data, say=silent)
    pattern = r"runs/a: probe on backbone, lr 1e\+20, weight_decay 0: the loss or a weight is not "
    assert re.fullmatch(pattern + "finite; lower --lrs", str(caught.value))


@pytest.mark.parametrize("select", ["holdout", "val"])
def test_a_setting_that_diverges_never_wins_over_one_that_does_not(select):
    config, data = diverging(lrs=[1e20, 1e-9], select=select)
    metrics = evaluate_probes(config, data, say=silent)["backbone"]
    assert metrics["lr"] == metrics["best_lr"] == 1e-9 and metrics["selection_top1"] >= 0


def test_holdout_takes_its_share_of_every_class_and_leaves_each_at_least_one():
    labels = np.repeat([0, 1, 2, -1], [100, 30, 1, 50])
    rest, held = split_holdout(labels, 0.1, seed=0)
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 3, 0]
    assert sorted([*rest, *held]) == list(range(131))
    assert not np.array_equal(held, split_holdout(labels, 0.1, seed=1)[1])
    assert np.array_equal(held, split_holdout(labels, 0.1, seed=0)[1])


def test_standardisation_is_scikit_learns_but_for_features_that_do_not_vary():
    from sklearn.preprocessing import StandardScaler

    rows = made(5000, 0)[0]
    rows[:, 3] = 7.5
    features = Features({"backbone": rows}, np.arange(len(rows)))
    chosen = np.arange(0, len(rows), 2)
    for to_unit_length in (False, True):
        mean, scale = standardisation(features, "backbone", chosen, to_unit_length, "cpu")
        ours = (torch.from_numpy(rows) - mean) * scale
        expected = StandardScaler().fit(rows[chosen].astype(float)).transform(rows)
        expected[:, 3] = 0
        expected /= np.sqrt(rows.shape[1]) if to_unit_length else 1
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)
    assert (ours[chosen] ** 2).sum(dim=1).mean() == pytest.approx(39 / 40, rel=1e-3)


def test_features_that_fit_on_the_device_are_taken_from_there_and_give_the_same_probe(monkeypatch):
    train, val = made(150, 0), made(200, 1)
    config, found = LinearConfig(lrs=[0.1, 3.0], epochs=3), []
    for spare, copied_at_once in ((0, 1), (10**9, 64)):
        monkeypatch.setattr(probe_data_file, "spare_bytes", lambda device, spare=spare: spare)
        monkeypatch.setattr(probe_data_file, "ROWS_COPIED_AT_ONCE", copied_at_once)
        data = probe_data(config, train, val)
        assert bool(data.on_device) == (spare > 0)
        if spare:  # from now on the files are not read
            monkeypatch.setattr(Features, "take", None)
        found.append(evaluate_probes(config, data, say=silent)["backbone"])
    for result in found:
        result["confusion"] = result["confusion"].binned(1)
    for key, value in found[0].items():
        np.testing.assert_array_equal(found[1][key], value)
