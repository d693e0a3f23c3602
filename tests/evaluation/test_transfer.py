"""Transfer: the grid, what selects, the final training, several labels an image, exact resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.small_files import REPOSITORY
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

from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.errors import Interrupted, NonFiniteLoss, UserError
from ffcv_ssl.evaluation import protocol_run
from ffcv_ssl.evaluation.datasets import split_holdout
from ffcv_ssl.evaluation.mean_ap import mean_average_precision
from ffcv_ssl.evaluation.protocol_settings import EvalData
from ffcv_ssl.evaluation.protocols import transfer
from ffcv_ssl.evaluation.protocols.transfer import GridConfig, TransferConfig
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.evaluation.tuning import Classifier, MultiTargets, Tuner

pytestmark = pytest.mark.whole  # whole training runs

CONFIGS = sorted((REPOSITORY / "configs/transfer").glob("*.yaml"))
GRID = {"grid__lrs": "[0.001, 0.3]", "grid__weight_decays": "[0, 0.001]"}


def several_labels(num, seed):
    """(N, 4) of 1, 0 and -1: each label on a third of the images, a tenth of all left out."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num, NUM_CLASSES)) < 1 / 3).astype(np.int8)
    return np.where(rng.random(labels.shape) < 0.1, -1, labels)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        f"{kind}__{part}": write_coloured(folder / f"{kind}_{part}.beton", labels)
        for kind, make in (("data", lambda n, s: np.arange(n) % 4), ("multi", several_labels))
        for part, labels in (("train", make(100, 0)), ("val", make(60, 1)))
    }


@pytest.fixture
def transferred(files, monkeypatch, tmp_path):
    """transferred(name, stop, kind, **settings): the record of a run in the folder `name`."""
    monkeypatch.setattr(protocol_run, "open_encoder", lambda config, world: tiny_encoder())

    def run(name="a", stop=None, kind="data", **settings):
        own = {f"data__{part}": files[f"{kind}__{part}"] for part in ("train", "val")}
        settings = {"steps": 8, "out": tmp_path / name, **own, **GRID, **settings}
        return transfer.run(parse(TransferConfig, **settings), alone(), stop)

    return run


def test_the_grid_is_the_papers():
    grid = GridConfig()
    pairs = grid.trials()
    assert len(pairs) == 7 * 8 == len(set(pairs))
    assert np.allclose(np.diff(np.log10(grid.lrs)), 0.5, atol=1e-3)
    assert (min(grid.lrs), max(grid.lrs)) == (1e-4, 0.1)
    assert np.allclose(np.diff(np.log10(grid.weight_decays[1:])), 0.5, atol=1e-3)
    assert grid.weight_decays[0] == 0 and (grid.weight_decays[1], grid.weight_decays[-1]) == (
        1e-6,
        1e-3,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_the_papers_procedure_on_other_data(path):
    config = parse_config(TransferConfig, [f"--config={path}"], "", "")[0]
    assert replace(config, data=EvalData()) == TransferConfig() and len(CONFIGS) == 3
    assert config.data.train.startswith(f"data/{path.stem}_train")
    default = TransferConfig()
    assert (default.steps, default.momentum, default.data.batch_size) == (20000, 0.9, 256)


def test_a_budget_draws_pairs_of_the_grid_by_its_seed():
    pairs = GridConfig().trials()
    few = GridConfig(max_trials=10).trials()
    assert few == GridConfig(max_trials=10).trials() != GridConfig(max_trials=10, seed=1).trials()
    assert len(few) == 10 and [pair for pair in pairs if pair in few] == few
    assert GridConfig(max_trials=1000).trials() == pairs


def test_the_best_trial_of_the_held_out_part_is_trained_on_everything(
    transferred, tmp_path, monkeypatch
):
    trained, lines = [], {}
    train_step = Tuner._train_step

    def spy(self, batch):
        group = self.optimizer.param_groups[0]
        key = (self.lr_of(0), group["weight_decay"], id(self.loader))
        lines.setdefault(key, set()).update(batch.indices.tolist())
        trained.append(key)
        return train_step(self, batch)

    monkeypatch.setattr(Tuner, "_train_step", spy)
    record = transferred(steps=12, holdout=0.2)
    scores = {
        (r["lr"], r["weight_decay"]): r["holdout/top1"]
        for r in records(tmp_path / "a")
        if "holdout/top1" in r
    }
    metrics = record["metrics"]
    assert len(scores) == metrics["num_trials"] == 4 and len(trained) == 5 * 12
    assert scores[metrics["lr"], metrics["weight_decay"]] == max(scores.values())
    assert metrics["selection_score"] == max(scores.values()) and metrics["top1"] > 0.8
    assert metrics["selected_on"] == "holdout" and metrics["num_diverged"] == 0
    *trials, final = lines.items()
    assert all(len(samples) <= 80 for _, samples in trials) and len(final[1]) > 80
    assert final[0][:2] == pytest.approx((metrics["lr"], metrics["weight_decay"] / metrics["lr"]))


def test_weight_decays_are_divided_by_the_rate(transferred, monkeypatch):
    seen = set()
    train_step = Tuner._train_step

    def spy(self, batch):
        decays = {group["weight_decay"] for group in self.optimizer.param_groups}
        seen.add((round(self.lr_of(0), 6), max(decays)))
        assert self.lr_of(self.step) == pytest.approx(
            self.lr_of(0) * (1 + np.cos(np.pi * self.step / 2)) / 2
        )
        return train_step(self, batch)

    monkeypatch.setattr(Tuner, "_train_step", spy)
    transferred(steps=2)
    assert seen == {(0.001, 0), (0.001, 1), (0.3, 0), (0.3, 0.001 / 0.3)}


def test_a_trial_whose_loss_is_not_finite_is_left_out(transferred, tmp_path):
    metrics = transferred(grid__lrs="[1e30, 0.3]", grid__weight_decays="[0]")["metrics"]
    assert metrics["num_diverged"] == 1 and metrics["lr"] == 0.3
    steps = [r["step"] for r in records(tmp_path / "a")]
    assert steps == sorted(steps)
    with pytest.raises(NonFiniteLoss, match=r"none of 1 trials had a finite loss; lower grid.lrs"):
        transferred("b", grid__lrs="[1e30]", grid__weight_decays="[0]")


@pytest.mark.parametrize("kind", ["data", "multi"])
def test_a_trial_whose_weights_are_finite_but_not_its_outputs_is_left_out(transferred, kind):
    settings = {"steps": 2, "grid__weight_decays": "[0]"}
    metrics = transferred(kind=kind, grid__lrs="[3e8, 0.3]", **settings)["metrics"]
    assert metrics["num_diverged"] == 1 and metrics["lr"] == 0.3
    with pytest.raises(NonFiniteLoss, match=r"none of 1 trials had a finite loss; lower grid.lrs"):
        transferred("b", kind=kind, grid__lrs="[3e8]", **settings)


def norm_momenta(network):
    """The momenta of a network's batch-norms."""
    return {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)}


@pytest.mark.parametrize("steps, kept", [(5, 0.9), (100, 0.9), (200, 0.95), (1000, 0.99)])
def test_batch_norm_keeps_the_papers_share_of_its_statistics_a_step(steps, kept):
    network = Classifier(tiny_encoder().model, "backbone", 3)
    transfer.set_norm_momentum(network, steps)
    images = torch.randn(8, 3, 16, 16)
    before = network.backbone[1].running_mean.clone()
    now = network.backbone[0](images).mean(dim=(0, 2, 3))
    network.train()(images)
    expected = kept * before + (1 - kept) * now
    torch.testing.assert_close(network.backbone[1].running_mean, expected)


def test_each_training_has_the_batch_norm_of_its_own_steps_an_epoch(transferred, monkeypatch):
    seen, set_momentum = set(), transfer.set_norm_momentum
    monkeypatch.setattr(
        transfer, "set_norm_momentum", lambda network, steps: set_momentum(network, 100 * steps)
    )
    train_step = Tuner._train_step

    def spy(self, batch):
        seen.update((self.steps_per_epoch, m) for m in norm_momenta(self.network))
        return train_step(self, batch)

    monkeypatch.setattr(Tuner, "_train_step", spy)
    transferred(steps=2)
    assert seen == {(4, 0.025), (5, 0.02)}


@pytest.mark.parametrize("looks", [0, 3, 7, 8, 12, 17, 22, 25])
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_result(transferred, tmp_path, looks):
    settings = {"grid__weight_decays": "[0]"}
    whole = transferred("whole", **settings)
    with pytest.raises(Interrupted, match="run the same command again"):
        transferred("parts", StopAfter(looks), **settings)
    assert without_clock(transferred("parts", **settings)) == without_clock(whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "finetuned.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_several_labels_an_image_are_learnt_and_measured_by_their_mean_precision(
    transferred, files, tmp_path
):
    record = transferred(kind="multi", steps=40, grid__lrs="[0.3]", grid__weight_decays="[0]")
    metrics = record["metrics"]
    assert metrics["map"] > 0.8 > 0.5 and len(metrics["per_class"]) == 4
    assert metrics["map"] == pytest.approx(np.mean(metrics["per_class"]))
    assert record["data"]["labels"] == "100 images, 4 labels each"
    assert "top1" not in metrics and read_results(tmp_path / "a") == [record]
    assert (record["data"]["num_trained"], record["data"]["num_held_out"]) == (100, 10)


def test_images_of_which_none_has_a_label_select_and_measure_nothing(transferred, tmp_path):
    labels = np.zeros((100, NUM_CLASSES), np.int8)
    labels[::7, 1] = 1
    sparse = write_coloured(tmp_path / "sparse.beton", labels)
    held_out = {s: split_holdout(np.zeros(100, int), 0.02, s)[1] for s in range(50)}
    seed = next(s for s, rows in held_out.items() if not labels[rows].any())
    with pytest.raises(UserError, match="none of the 2 held-out images has a label of 1; use"):
        transferred(kind="multi", data__train=sparse, seed=seed, holdout=0.02)
    empty = write_coloured(tmp_path / "empty.beton", np.zeros((9, NUM_CLASSES), np.int8))
    with pytest.raises(UserError, match=r"empty.beton: field 'label': no image has a label of 1"):
        transferred(kind="multi", data__val=empty)


def test_left_out_labels_give_neither_loss_nor_gradient():
    labels = torch.tensor([[1, 0, -1], [-1, -1, -1]], dtype=torch.int8)
    logits = torch.tensor([[0.3, -0.2, 9.0], [1.0, 2.0, 3.0]], requires_grad=True)
    targets = MultiTargets(labels, torch.device("cpu"))
    loss = targets.loss(logits, torch.arange(2))
    expected = (np.log1p(np.exp(-0.3)) + np.log1p(np.exp(-0.2))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad[labels < 0].abs().sum() == 0


def test_the_precision_is_that_of_the_samples_rows():
    labels = several_labels(30, 3)
    targets = MultiTargets(labels, torch.device("cpu"))
    scores, rows = np.random.default_rng(0).normal(size=(12, 4)), np.arange(29, 5, -2)
    measured = targets.measure(torch.tensor(scores), torch.tensor(rows.copy()))
    assert measured["map"] == mean_average_precision(scores, labels[rows])[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grid__lrs": "[]"}, "grid.lrs: got [], expected one or more"),
        ({"grid__lrs": "[0.1, 0.1]"}, "expected one or more different values"),
        ({"grid__lrs": "[-1]"}, "grid.lrs"),
        ({"momentum": 1}, "momentum: got 1, expected below 1"),
        (
            {"kind": "multi", "labels__fraction": 0.5},
            "labels: got a choice, expected all for images",
        ),
        ({"depth": "projector_9"}, "depth: got 'projector_9'"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(transferred, settings, message):
    with pytest.raises(UserError) as error:
        transferred(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_labels_that_cannot_be_are_named(transferred, tmp_path):
    bad = several_labels(9, 0)
    bad[5, 2] = 3
    bad = write_coloured(tmp_path / "bad.beton", bad)
    with pytest.raises(UserError, match=r"sample 5 has 3 for label 2, expected 1, 0 or -1"):
        transferred(kind="multi", data__train=bad)
    other = write_coloured(tmp_path / "other.beton", np.ones((9, 3), np.int8))
    with pytest.raises(UserError, match="got 3 labels per image, expected 4 as in"):
        transferred(kind="multi", data__val=other)
    single = write_coloured(tmp_path / "single.beton", np.arange(9) % 4)
    with pytest.raises(UserError, match="field 'label': expected an array field of shape"):
        transferred(kind="multi", data__val=single)
