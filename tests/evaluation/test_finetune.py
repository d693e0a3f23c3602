"""Fine-tuning: what it trains, what decides, that it resumes exactly, and what it refuses."""

import json
from types import SimpleNamespace

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
    write_pretrained,
)

from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import config_dict, flatten
from ffcv_ssl.config.yaml_layers import merge, read_layers
from ffcv_ssl.errors import Interrupted, NonFiniteLoss, UserError
from ffcv_ssl.evaluation import protocol_run, tuning_data
from ffcv_ssl.evaluation.datasets import split_holdout
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.protocols import finetune
from ffcv_ssl.evaluation.protocols.finetune import FineTuneConfig, FineTuning
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.evaluation.tuning import Classifier, ClassTargets, evaluate, make_tuning_optimizer
from ffcv_ssl.training.optimizers import lr_at

pytestmark = pytest.mark.whole  # whole training runs

CONFIGS = sorted((REPOSITORY / "configs/finetune").glob("*.yaml"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files: 120 and 50 coloured images, five of the latter without a label."""
    folder, labels = tmp_path_factory.mktemp("data"), np.arange(120) % NUM_CLASSES
    val = np.append(np.arange(45) % NUM_CLASSES, [-1] * 5)
    return {
        "data__train": write_coloured(folder / "train.beton", labels),
        "data__val": write_coloured(folder / "val.beton", val),
    }


@pytest.fixture
def tiny(monkeypatch):
    """All checkpoints are the tiny encoder."""
    monkeypatch.setattr(protocol_run, "open_encoder", lambda config, world: tiny_encoder())


@pytest.fixture
def tune(files, tiny, tmp_path):
    """tune(name, stop, **settings): the record of a run in the folder `name`."""

    def tune(name="a", stop=None, **settings):
        settings = {"epochs": 3, "optim__lr": 0.5, "out": tmp_path / name, **files, **settings}
        return finetune.run(parse(FineTuneConfig, **settings), alone(), stop)

    return tune


def test_it_learns_the_classes_and_reports_all_that_decided(tune, tmp_path):
    record = tune(epochs=8, depth="projector_1")
    metrics = record["metrics"]
    assert metrics["top1"] > 0.9 and metrics["top5"] == 1 and len(metrics["per_class"]) == 4
    assert metrics["selected_on"] == "holdout" and 1 <= metrics["best_epoch"] <= 8
    assert record["protocol"] == "finetune" and record["data"]["num_labels"] == 120
    assert (record["data"]["num_trained"], record["data"]["num_held_out"]) == (108, 12)
    assert read_results(tmp_path / "a") == [record]
    assert records(tmp_path / "a")[-1]["val/top1"] == metrics["top1"]


def test_the_first_loss_is_that_of_a_classifier_of_zeros(tune, tmp_path):
    tune(epochs=1, select="last", log__every_steps=1)
    assert records(tmp_path / "a")[0]["train/loss"] == pytest.approx(np.log(NUM_CLASSES), abs=1e-6)


@pytest.mark.parametrize("depth", ["backbone", "projector_1", "projector_2"])
def test_the_classifier_sees_the_models_features_of_that_depth(depth):
    model, images = tiny_encoder().model, torch.randn(5, 3, 16, 16)
    network = Classifier(model, depth, 3).eval()
    network.classifier.weight.data.normal_()
    features = model.encode(images)[depth]
    assert torch.equal(network(images), network.classifier(features))
    assert sum(p.requires_grad for p in network.parameters()) == len(list(network.parameters()))


def test_training_leaves_the_pretrained_model_alone():
    model = tiny_encoder().model
    network = Classifier(model, "projector_1", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.optim.SGD(network.parameters(), 1.0)
    network(torch.randn(5, 3, 16, 16)).square().sum().backward()
    for parameter in network.parameters():
        parameter.data += 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_held_out_samples_and_unchosen_labels_are_never_trained_on(tune, monkeypatch):
    seen, held_out = set(), []
    train_step, split = finetune.Tuner._train_step, split_holdout

    def spy(self, batch):
        seen.update(batch.indices.tolist())
        return train_step(self, batch)

    monkeypatch.setattr(finetune.Tuner, "_train_step", spy)
    monkeypatch.setattr(
        tuning_data, "split_holdout", lambda *a: held_out.append(split(*a)) or held_out[0]
    )
    tune(labels__fraction=0.5, labels__scheme="balanced", epochs=4, holdout=0.25)
    rest, held = held_out[0]
    assert len(held) == 16 and len(rest) == 44
    assert seen == set(rest.tolist()) and not seen & set(held.tolist())


def test_the_epoch_that_counts_is_the_best_of_the_held_out_part(tune, tmp_path):
    record = tune(epochs=5, optim__lr=0.3, holdout=0.3)
    curve = [r["holdout/top1"] for r in records(tmp_path / "a") if "holdout/top1" in r]
    assert len(curve) == 5
    assert record["metrics"]["best_epoch"] == 1 + int(np.argmax(curve))
    assert record["metrics"]["selection_score"] == max(curve)


def test_the_weights_that_are_measured_and_saved_are_those_of_the_best_epoch(
    tune, tmp_path, monkeypatch
):
    weights, scores = [], iter([0.2, 0.9, 0.9, 0.1])
    measure = FineTuning.measure

    def scripted(self, network, part):
        metrics = measure(self, network, part)
        if part == "holdout":
            weights.append({k: v.clone() for k, v in network.state_dict().items()})
            metrics["top1"] = next(scores)
        return metrics

    monkeypatch.setattr(FineTuning, "measure", scripted)
    record = tune(epochs=4)
    saved = load_file(tmp_path / "a" / "finetuned.safetensors")
    assert record["metrics"]["best_epoch"] == 2
    assert all(torch.equal(saved[key], value) for key, value in weights[1].items())
    assert any(not torch.equal(saved[key], value) for key, value in weights[3].items())


def test_selecting_on_the_validation_file_is_said_so_and_trains_on_all_labels(tune, tmp_path):
    record = tune(select="val")
    assert record["metrics"]["selected_on"] == "val"
    lines = records(tmp_path / "a")
    assert lines[-1]["val/top1"] == max(r["val/top1"] for r in lines if "val/top1" in r)
    assert lines[-1]["epoch"] == 3 and lines[-1]["step"] == 3 * 6
    assert (record["data"]["num_trained"], record["data"]["num_held_out"]) == (120, 0)


def test_without_a_selection_the_last_epoch_counts(tune):
    metrics = tune(select="last")["metrics"]
    assert metrics["selected_on"] == "last" and metrics["best_epoch"] == 3
    assert metrics["top1"] == metrics["last_top1"] and "selection_score" not in metrics


@pytest.mark.parametrize("looks", [0, 3, 4, 5, 9, 13, 17])
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_result(tune, tmp_path, looks):
    whole = tune("whole")
    with pytest.raises(Interrupted, match="run the same command again"):
        tune("parts", StopAfter(looks))
    resumed = tune("parts")
    assert without_clock(resumed) == without_clock(whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "finetuned.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tune, tmp_path, monkeypatch):
    whole = tune("whole", saving__every_minutes=1e-9)
    log = FineTuning._log

    def die(self):
        log(self)
        if self.tuner.step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(FineTuning, "_log", die)
    with pytest.raises(KeyboardInterrupt):
        tune("parts", saving__every_minutes=1e-9)
    monkeypatch.setattr(FineTuning, "_log", log)
    assert without_clock(tune("parts", saving__every_minutes=1e-9)) == without_clock(whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_a_finished_run_is_not_trained_or_reported_again(tune, tmp_path, monkeypatch):
    first = tune()
    monkeypatch.setattr(FineTuning, "fit", None)
    assert tune() == first
    assert len((tmp_path / "a" / "results.jsonl").read_text().splitlines()) == 1


def test_another_run_in_the_same_folder_is_refused_with_what_differs(tune):
    tune()
    with pytest.raises(
        UserError,
        match="made by another run: depth 'backbone' in the checkpoint, 'projector_1' now; restore",
    ):
        tune(depth="projector_1")


def test_an_untrained_choice_of_folder_tells_runs_apart(files, tiny, tmp_path):
    for settings in ({}, {"depth": "projector_1"}, {"seed": 1}, {"labels__count": 40}):
        config = parse(
            FineTuneConfig, checkpoint=tmp_path / "tiny.pt", epochs=1, **files, **settings
        )
        finetune.run(config, alone())
    names = sorted(path.name for path in tmp_path.glob("finetune*"))
    assert names == [
        "finetune_40labels_layer0_seed0", "finetune_all_layer0_seed0", "finetune_all_layer0_seed1",
        "finetune_all_layer1_seed0",
    ]  # fmt: skip
    assert len(read_results(tmp_path)) == 4


def test_rows_that_only_pad_a_batch_count_nowhere():
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1]])  # right, wrong, right
    batch = SimpleNamespace(
        view_0=logits, indices=torch.tensor([0, 1, 1]), valid=torch.tensor([True, True, False])
    )
    targets = ClassTargets(np.array([0, 1]), 2, torch.device("cpu"))
    rest = (alone(), "fp32", lambda: None, "a")
    metrics = evaluate(torch.nn.Identity(), [batch], targets, *rest)
    assert metrics == {"top1": 0.5, "top5": 1.0, "per_class": [1.0, 0.0]}


def test_lars_adapts_the_network_but_not_the_classifier():
    network = Classifier(tiny_encoder().model, "projector_1", 3)
    network.classifier.weight.data.normal_()  # at zero nothing is adapted
    config = parse(FineTuneConfig, optim__name="lars", optim__lr=0.5, optim__weight_decay=0.1)
    optimizer = make_tuning_optimizer(config.optim, network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = dict(network.named_parameters())
    for name in ("classifier.weight", "classifier.bias", "backbone.0.bias"):
        assert torch.allclose(before[name] - after[name], torch.tensor(0.5)), name
    weight = before["projector.0.0.weight"]
    update = 1 + 0.1 * weight
    expected = 0.5 * 0.001 * weight.norm() / update.norm() * update
    assert torch.allclose(weight - after["projector.0.0.weight"], expected, rtol=1e-4)


def test_a_finetuned_file_is_read_as_a_checkpoint_with_the_blocks_it_used(files, tmp_path):
    path = write_pretrained(tmp_path / "w.safetensors")
    settings = {"checkpoint": path, "data__resolution_px": 32, "epochs": 1, "depth": "projector_1"}
    settings |= {"labels__count": 48, "select": "last", "out": tmp_path / "ft", **files}
    record = finetune.run(parse(FineTuneConfig, **settings), alone())
    tuned, before = load_encoder(record["finetuned"]), load_encoder(path)
    assert list(tuned.widths) == ["backbone", "projector_1"]
    assert tuned.fingerprint != before.fingerprint
    images = torch.randn(4, 3, 32, 32)
    network, saved = (
        Classifier(before.model, "projector_1", NUM_CLASSES),
        load_file(record["finetuned"]),
    )
    network.load_state_dict(saved)
    expected = network.eval()(images)
    features = tuned.encode(images)["projector_1"]
    logits = features @ saved["classifier.weight"].T + saved["classifier.bias"]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_do(tune):
    with pytest.raises(NonFiniteLoss, match="lower optim"):
        tune(optim__lr=1e30)
    with pytest.raises(NonFiniteLoss, match=r"/b: an output of the network is not finite .* lower"):
        tune("b", optim__lr=3e8, optim__lr_scaling="none", data__batch_size=54)


def read(name):
    """A configuration of configs/finetune."""
    path = f"--config={REPOSITORY / 'configs/finetune' / name}.yaml"
    return parse_config(FineTuneConfig, [path], "", "")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_taken_and_states_nothing_twice(path):
    config, layers = read(path.stem), read_layers(str(path))
    assert len(CONFIGS) >= 8
    before = flatten(merge(*(own for _, own in layers[:-1])))
    own, values = flatten(layers[-1][1]), flatten(config_dict(config))
    assert all(before.get(key, "new") != value for key, value in own.items())
    assert all(values[key] == value for key, value in own.items())


@pytest.mark.parametrize(
    "name, epochs, batch_size, lr, depth",
    [
        ("suncet_10percent", 30, 4096, 0.8, "backbone"),
        ("suncet_1percent", 60, 4096, 0.8, "backbone"),
        ("suncet_cifar10", 90, 256, 0.05, "backbone"),
        ("simclrv2_10percent", 30, 1024, 0.16, "projector_1"),
        ("simclrv2_1percent", 60, 1024, 0.16, "projector_1"),
        ("simclrv2_100percent", 30, 1024, 0.16, "backbone"),
    ],
)
def test_the_papers_configurations_have_their_settings(name, epochs, batch_size, lr, depth):
    config, optim = read(name), read(name).optim
    assert (config.epochs, config.data.batch_size, config.depth) == (epochs, batch_size, depth)
    assert (optim.weight_decay, optim.momentum, optim.warmup_epochs) == (0, 0.9, 0)
    assert (optim.name, optim.nesterov) == (("lars", False) if lr == 0.16 else ("sgd", True))
    assert lr_at(0, optim, batch_size, epochs, 10) == pytest.approx(lr)
    assert lr_at(10 * epochs, optim, batch_size, epochs, 10) == pytest.approx(0)
    assert config.select == "last"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depth": "projector_3"}, "depth: got 'projector_3', but tiny.pt has no such depth; exp"),
        ({"layer": 3}, "depth: got 'projector_3', but tiny.pt has no such depth; expected one of"),
        ({"holdout": 0}, "holdout: got 0, expected above 0, below 1"),
        (
            {"data__batch_size": 121},
            "labelled samples, expected at least one batch of 121; give --data.batch_size ",
        ),
        (
            {"data__batch_size": 1, "depth": "projector_1"},
            "got 1 for 1 ranks, expected at least 2: batch-norm needs two images",
        ),
        (
            {"labels__count": 4, "labels__scheme": "balanced"},
            "every class has fewer than two labels",
        ),
        ({"optim__warmup_epochs": 3}, "optim.warmup_epochs: got 3, expected less than epochs"),
        ({"optim__name": "adam"}, "optim.name: got 'adam'"),
        ({"optim__momentum": 0}, "optim.nesterov: got true with momentum 0"),
        ({"slurm__partition": "gpu", "out": "null"}, "out: got none, expected a folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(tune, settings, message):
    with pytest.raises(UserError) as error:
        tune(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("checkpoint", ["elsewhere/w.pt", "a/w.pt"])
def test_a_pretraining_runs_folder_is_not_taken_for_its_own(tune, tmp_path, checkpoint):
    (tmp_path / "a").mkdir()
    if checkpoint.startswith("elsewhere"):
        (tmp_path / "a" / "backbone.safetensors").touch()
    before = list((tmp_path / "a").iterdir())
    with pytest.raises(UserError, match="a pretraining run's folder; use another --out"):
        tune(checkpoint=tmp_path / checkpoint)
    assert list((tmp_path / "a").iterdir()) == before


def test_the_last_line_of_the_command_is_the_record(files, tmp_path, capsys):
    import evaluate

    path = write_pretrained(tmp_path / "w.safetensors")
    arguments = {
        "checkpoint": path, "data.train": files["data__train"], "data.val": files["data__val"],
        "data.resolution_px": 32, "data.batch_size": 16, "epochs": 1, "labels.count": 32,
        "out": tmp_path / "ft", "log.tensorboard": "false", "select": "last",
        "system.torch_threads": 1, "data.num_workers": 1,
    }  # fmt: skip
    assert evaluate.main(["finetune", *(f"--{k}={v}" for k, v in arguments.items())]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == read_results(tmp_path / "ft")[0]
