"""Every method in whole runs of a tiny model: what it learns from, counts, logs and resumes."""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.host_sync import NoHostSync
from support.small_files import write_small
from torch import nn

import train
from ffcv_ssl import BetonError
from ffcv_ssl.config import settings
from ffcv_ssl.errors import Interrupted
from ffcv_ssl.training import models
from ffcv_ssl.training.backbones import tiny
from ffcv_ssl.training.label_choice import choose_labels
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics
from ffcv_ssl.training.online_evaluation import labels_of
from ffcv_ssl.training.step_data import NO_IMAGES, StepData, StepKind, images_of
from ffcv_ssl.training.world import World
from pipelines import Views

pytestmark = pytest.mark.whole  # whole training runs

SAMPLES, BATCH, STEPS, CLASSES, PX = 100, 20, 5, 7, 16
WIDTH = tiny.WIDTH
METHODS = ["simclr", "vicreg", "barlow", "byol", "supervised", "instance_simclr", "moco", "simsiam"]
LABELLED = {
    "labelled__labels": settings.LabelsConfig(scheme="balanced", count=21),
    "labelled__classes_per_batch": 4, "labelled__images_per_class": 2,
}  # fmt: skip
SETTINGS = {
    "epochs": 2, "data__batch_size": BATCH, "data__num_workers": 1, "model__projector": "12-8",
    "model__backbone": "tiny", "optim__name": "lars", "optim__warmup_epochs": 0.5,
    "optim__lr": 5.0, "log__every_steps": 1, "log__tensorboard": False, "evaluation__knn_k": 3,
    "resolution__min": PX, "resolution__max": PX, "system__device": "cpu",
}  # fmt: skip
RECIPES = {"supervised": "supervised", "instance_simclr": "instance"}
TERMS = {
    "simclr": {"alignment", "uniformity"}, "vicreg": {"invariance", "variance", "covariance"},
    "barlow": {"on_diagonal", "off_diagonal"}, "byol": set(), "supervised": set(),
    "instance_simclr": set(), "moco": set(), "simsiam": set(),
}  # fmt: skip

CASES = {method: {"method": method} for method in METHODS}
CASES["moco"] |= {"moco__queue_size": 50}  # smaller than an epoch: its oldest keys are replaced
CASES["byol"] |= {"log__every_steps": 3}  # so that a checkpoint holds half of a line's means
CASES |= {
    "simclr + suncet": {
        "labelled__loss": "suncet", **LABELLED, "labelled__num_views": 2, "log__every_steps": 3
    },
    "simclr + supcon for 7 steps": {
        "labelled__loss": "supcon", **LABELLED, "labelled__supervised_epochs": 1.4
    },
    "simclr + cross_entropy": {"labelled__loss": "cross_entropy", **LABELLED},
    "labels alone": {
        "labelled__loss": "suncet", **LABELLED, "labelled__unsupervised_batch_size": 0, "epochs": 3
    },
    "byol in parts": {"method": "byol", "data__chunk_size": 8},
    "simclr + suncet in parts": {"labelled__loss": "suncet", **LABELLED, "data__chunk_size": 6},
    "byol with a rate of its own": {"method": "byol", "byol__predictor_lr": 3.0},
    "vicreg clipped": {"method": "vicreg", "optim__clip_norm": 0.5, "optim__name": "adamw"},
    "barlow in fp32": {"method": "barlow", "precision": "fp32", "optim__name": "sgd"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread(no_picture):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    train_file = write_small(folder / "train.beton", SAMPLES, (PX, PX), mode="raw")
    val_file = write_small(folder / "val.beton", 23, (PX, PX), mode="raw")
    return {"data__train": train_file, "data__val": val_file}


def configure(out, files, **changes):
    """A Config with `a__b` for the key a.b; makes its folder."""
    recipe = RECIPES.get(changes.get("method"), "simclr")
    views = Views(recipe=recipe, small_images=True)
    config_class = train.config_class_of(changes.get("method", "simclr"))
    config = config_class(out=str(out), views=views)
    for key, value in {**SETTINGS, **files, **changes}.items():
        group, _, name = key.rpartition("__")
        if group:
            key, value = group, dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{key: value})
    train.check_config(config)
    Path(out).mkdir(exist_ok=True)
    return config


def fit(config, stop_after=None, around=None, world=None):
    """Train to the end, or to the interruption during a step; the trainer, closed.

    around(trainer, train_step, data) runs each step by calling train_step().
    """
    stop = SimpleNamespace(asked=False)
    trainer = train.Trainer(config, World() if world is None else world, stop)
    train_step = trainer._train_step

    def one_step(data, px):
        if around is None:
            train_step(data, px)
        else:
            around(trainer, lambda: train_step(data, px), data)
        stop.asked = trainer.step == stop_after

    trainer._train_step = one_step
    try:
        trainer.fit()
    except Interrupted:
        assert trainer.step == stop_after
    finally:
        trainer.close()
    return trainer


def unlabelled(trainer, batch):
    """The data of a step on a batch of unlabelled images."""
    images = images_of(batch, trainer.views, "label")
    return StepData(StepKind.UNLABELLED, images, NO_IMAGES)


def records(out):
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(out)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, files):
    """Runs by case, each trained when it is first asked for: (folder, trainer)."""
    runs = {}

    def run(case):
        if case not in runs:
            out = tmp_path_factory.mktemp("run") / "run"
            runs[case] = out, fit(configure(out, files, **CASES[case]))
        return runs[case]

    return run


def assert_same(a, b, where="checkpoint"):
    """Equal bit for bit, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_in_two_epochs_is_bit_for_bit_the_undisturbed_one(
    case, undisturbed, tmp_path, files
):
    expected, _ = undisturbed(case)
    config = configure(tmp_path / "run", files, **CASES[case])
    for step in (4, 8):
        assert fit(config, stop_after=step).step == step
    fit(config)
    assert records(tmp_path / "run") == records(expected)
    saved = [torch.load(out / "checkpoint.pt") for out in (tmp_path / "run", expected)]
    for state in saved:
        del state["seconds"], state["config"]
    assert_same(*saved)
    assert {"model", "method", "optimizer", "probes", "rng"} <= saved[0].keys()


# ---- what a run says -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_term_is_logged_by_name_and_every_depth_is_probed(case, undisturbed):
    out, trainer = undisturbed(case)
    method, loss = trainer.config.method, trainer.config.labelled.loss
    terms = TERMS[method] if trainer.loader is not None else set()
    terms = terms | ({loss} - {"none"})
    depths = ("backbone", "projector_1", "projector_2")
    for record in read_metrics(out):
        losses = {key for key in record if key.startswith("train/loss/")}
        if "train/loss" in record:
            has_ended = record["step"] > trainer.streams.labelled_until > 0
            assert losses == {f"train/loss/{t}" for t in terms - ({loss} if has_ended else set())}
            assert {f"train/{depth}/top1" for depth in depths} <= record.keys()
            assert all(math.isfinite(v) for v in record.values())
        else:
            assert {f"val/{depth}/top1" for depth in depths} <= record.keys()
    weights = trainer.learner.state_dict().values()
    assert all(torch.isfinite(value).all() for value in weights)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_lowers_its_loss_on_one_batch(method, precision, tmp_path, files):
    config = configure(tmp_path, files, method=method, precision=precision)
    trainer = train.Trainer(config, World(), SimpleNamespace(asked=False))
    try:
        batch, losses = next(iter(trainer.loader)), []
        for _ in range(12):
            trainer._train_step(unlabelled(trainer, batch), PX)
            losses.append(trainer.averages.take(World())["train/loss"])
            trainer.done.step = 3  # the rate of a step in the middle
    finally:
        trainer.close()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("norm", ["hidden", "all", "none"])
@pytest.mark.parametrize("projector", ["", "9", "9-5"])
@pytest.mark.parametrize("method", METHODS)
def test_probes_are_at_every_depth_of_every_projector(method, projector, norm, tmp_path, files):
    changes = {"method": method, "model__projector": projector, "model__projector_norm": norm}
    trainer = train.Trainer(
        configure(tmp_path, files, **changes), World(), SimpleNamespace(asked=False)
    )
    try:
        before = copy.deepcopy(trainer.probes.probes.state_dict())
        trainer._train_step(unlabelled(trainer, next(iter(trainer.loader))), PX)
    finally:
        trainer.close()
    widths = {"backbone": WIDTH, **({"projector_1": 9} if projector else {})}
    widths |= {"projector_2": 5} if projector == "9-5" else {}
    assert trainer.model.widths == widths and set(trainer.probes.probes.layers) == set(widths)
    for name, value in trainer.probes.probes.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert {f"train/{depth}/top1" for depth in widths} <= set(trainer.averages.sums)
    assert math.isfinite(trainer.averages.take(World())["train/loss"])


# ---- single methods ------------------------------------------------------------------------------


def test_byols_teacher_moves_by_the_momentum_of_the_moment_and_by_nothing_else(tmp_path, files):
    total, seen = 2 * STEPS, []

    def around(trainer, train_step, data):
        before = copy.deepcopy(trainer.method.teacher.model)
        train_step()
        progress = trainer.step / total
        momentum = 1 - (1 - 0.6) * (math.cos(math.pi * progress) + 1) / 2
        seen.append(momentum)
        student = dict(trainer.model.named_parameters())
        for (name, teacher), old in zip(
            trainer.method.teacher.model.named_parameters(), before.parameters()
        ):
            expected = momentum * old.double() + (1 - momentum) * student[name].double()
            torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-7)
            assert teacher.grad is None and not teacher.requires_grad
            if trainer.step == total // 2 and teacher.ndim > 1:
                assert not torch.equal(teacher, old) and not torch.equal(teacher, student[name])

    config = configure(tmp_path / "run", files, method="byol", byol__momentum=0.6)
    trainer = fit(config, around=around)
    assert len(seen) == total and seen == sorted(seen) and seen[-1] == 1
    assert seen[total // 2 - 1] == pytest.approx(0.8)
    teacher = {id(p) for p in trainer.method.teacher.parameters()}
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not teacher & trained
    assert {id(p) for p in trainer.method.predictor.parameters() if p.requires_grad} <= trained


@pytest.mark.parametrize("norm", ["hidden", "all", "none"])
def test_byols_predictor_ends_without_batch_norm(tmp_path, files, norm):
    config = configure(tmp_path, files, method="byol", model__projector_norm=norm)
    method = train.method_class("byol")(config, models.Model(config.model), CLASSES, World())
    normed = [isinstance(m, nn.BatchNorm1d) for m in method.predictor.modules()]
    assert any(normed) == (norm != "none")
    assert isinstance(list(method.predictor.modules())[-1], nn.Linear)


def test_byols_predictor_keeps_its_own_rate_and_the_encoder_follows_the_schedule(tmp_path, files):
    seen = []

    def around(trainer, train_step, data):
        train_step()
        groups = trainer.optimizer.param_groups
        predictor = {id(p) for p in trainer.method.predictor.parameters()}
        rates = {True: set(), False: set()}
        for group in groups:
            rates[{id(p) for p in group["params"]} <= predictor].add(group["lr"])
        seen.append(rates)

    settings = {"method": "byol", "byol__predictor_lr": 3.0, "optim__warmup_epochs": 1}
    config = configure(tmp_path / "run", files, **settings)
    fit(config, around=around)
    peak = max(max(rates[False]) for rates in seen)
    assert [rates[True] for rates in seen] == [{3 * peak}] * len(seen)
    assert [len(rates[False]) for rates in seen] == [1] * len(seen)
    assert len({min(rates[False]) for rates in seen}) > STEPS


def test_the_supervised_baseline_learns_nothing_from_images_without_a_label(tmp_path, files):
    config = configure(tmp_path, files, method="supervised")
    model = models.Model(config.model)
    method = train.method_class("supervised")(config, model, CLASSES, World())
    learner = train.Learner(model, method, None).eval()  # no statistics that couple images
    images, labels = torch.randn(10, 3, PX, PX), torch.arange(10) % CLASSES
    hidden = torch.where(torch.arange(10) % 3 == 0, -1, labels)
    gradients = []
    for rows, known in ((slice(None), hidden), (hidden >= 0, hidden[hidden >= 0])):
        outputs = learner([images[rows]], 1)
        loss, _ = method.loss(outputs, known)
        learner.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in learner.parameters())])
    torch.testing.assert_close(*gradients)
    loss, _ = method.loss(learner([images], 1), torch.full((10,), -1))
    assert loss == 0


# ---- the labelled stream -------------------------------------------------------------------------


def chosen_labels(config):
    labels = np.arange(SAMPLES) % CLASSES
    return choose_labels(labels, CLASSES, "balanced", count=21, seed=config.labelled.labels.seed)


@pytest.mark.parametrize("loss", ["suncet", "supcon", "cross_entropy"])
def test_the_labelled_loss_sees_chosen_labels_only_and_their_counts_are_printed(
    loss, tmp_path, files, monkeypatch, capsys
):
    labelled_loss, seen = train.labelled_loss, []

    def spied(outputs, labels, *rest):
        seen.append(labels.clone())
        return labelled_loss(outputs, labels, *rest)

    def next_batch(stream):
        batches.append(next_of_stream(stream))
        return batches[-1]

    def around(trainer, train_step, data):
        train_step()
        assert torch.equal(seen[-1], batches[-1].indices % CLASSES)
        indices.extend(batches[-1].indices.tolist())
        classes, counts = seen[-1].unique(return_counts=True)
        assert len(classes) == 4 and set(counts.tolist()) == {2}

    indices, batches, next_of_stream = [], [], train.LabelledStream.next
    monkeypatch.setattr(train.LabelledStream, "next", next_batch)
    monkeypatch.setattr(train, "labelled_loss", spied)
    config = configure(tmp_path / "run", files, labelled__loss=loss, **LABELLED)
    fit(config, around=around)
    assert len(seen) == 2 * STEPS
    chosen = np.flatnonzero(chosen_labels(config) >= 0)
    assert set(indices) <= set(chosen.tolist()) and len(set(indices)) > 14
    printed = capsys.readouterr().out
    assert "labelled stream: 21 labels of 7 classes, 3 each; until step " in printed
    assert "48 views per step: 20 images x 2, 8 labelled x 1\n" in printed


ENDS = [{"labelled__supervised_epochs": 1.4}, {"labelled__supervised_passes": 2.3}]


@pytest.mark.parametrize("end", ENDS, ids=["epochs", "passes"])
def test_a_labelled_stream_that_has_ended_is_neither_loaded_nor_forwarded_nor_counted(
    end, tmp_path, files, monkeypatch
):
    encode, forwarded, loaded = train.Model.encode, [], []

    def spied(self, images):
        if self.training and images.device.type == "cpu":  # not the twin that counts operations
            forwarded.append(len(images))
        return encode(self, images)

    def around(trainer, train_step, data):
        train_step()
        loaded.append(trainer.labelled.loader.stats["images"])
        alive.append(trainer.labelled.loader._finalizer.alive)

    alive = []
    monkeypatch.setattr(train.Model, "encode", spied)
    config = configure(tmp_path / "run", files, labelled__loss="suncet", **LABELLED, **end)
    fit(config, around=around)
    last = 7  # 1.4 epochs of 5 steps; 2.3 passes of 3 batches
    assert forwarded == [2 * BATCH + 8] * last + [2 * BATCH] * (10 - last)
    assert loaded == [8 * step for step in range(1, last + 1)] + [8 * last] * (10 - last)
    assert alive == [True] * last + [False] * (10 - last)
    lines = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    steps = {
        key: np.diff([0, *(line[key] for line in lines)]).tolist()
        for key in ("images", "views", "flops")
    }
    assert steps["images"] == [BATCH + 8] * last + [BATCH] * (10 - last)
    assert steps["views"] == [2 * BATCH + 8] * last + [2 * BATCH] * (10 - last)
    view = flops_of_a_view()
    assert steps["flops"] == [count * view for count in steps["views"]]


def flops_of_a_view(passes=(2, 3, 3, 3)):
    """Operations of a training step by the shapes: forward, and gradients of weights and, but for
    the first layer, of inputs."""
    conv1, conv2 = 7 * 7 * 8 * 27, 3 * 3 * WIDTH * 8 * 9
    return sum(2 * n * p for n, p in zip((conv1, conv2, WIDTH * 12, 12 * 8), passes))


def test_a_stream_that_never_begins_is_not_counted_at_the_start_either(tmp_path, files, capsys):
    end = {"labelled__supervised_epochs": 0.0, "epochs": 1}
    fit(configure(tmp_path / "run", files, labelled__loss="suncet", **LABELLED, **end))
    printed = capsys.readouterr().out
    assert "3 each; until step 0\n" in printed and "40 views per step: 20 images x 2\n" in printed
    assert read_metrics(tmp_path / "run")[-1]["views"] == 2 * STEPS * BATCH


def test_a_list_of_labels_may_move_but_not_change(tmp_path, files):
    def run(name, indices, **rest):
        (tmp_path / name).write_text("".join(f"{index}\n" for index in indices))
        chosen = {"labelled__labels": settings.LabelsConfig("file", file=str(tmp_path / name))}
        more = {**LABELLED, **chosen, "labelled__loss": "suncet"}
        return fit(configure(tmp_path / "run", files, **more), **rest)

    run("a.txt", range(21), stop_after=7)
    with pytest.raises(BetonError, match="resume with the same file and the same indices"):
        run("b.txt", range(1, 22))
    assert run("c.txt", reversed(range(21))).step == 2 * STEPS


def test_a_stream_resumed_after_its_end_is_not_started_again(tmp_path, files, monkeypatch):
    config = configure(tmp_path / "run", files, **CASES["simclr + supcon for 7 steps"])
    fit(config, stop_after=8)
    monkeypatch.setattr(train.LabelledStream, "start", lambda self, sides: pytest.fail("started"))
    assert fit(config).labelled.loader.stats["images"] == 0


def test_labels_alone_train_and_are_all_that_is_counted(undisturbed):
    out, trainer = undisturbed("labels alone")
    assert trainer.loader is None and trainer.steps_per_epoch == 3
    last = read_metrics(out)[-1]
    view = flops_of_a_view()
    assert (last["step"], last["images"], last["views"]) == (9, 72, 72)
    assert last["flops"] == 72 * view
    start = train.Model(trainer.config.model)
    assert not torch.equal(start.backbone[0].weight, trainer.model.backbone[0].weight)


def test_images_views_and_operations_are_counted_exactly(undisturbed, capsys):
    view, images = flops_of_a_view(), 2 * STEPS * BATCH
    last = read_metrics(undisturbed("simclr")[0])[-1]
    assert (last["step"], last["updates"], last["images"], last["views"]) == (
        10,
        10,
        images,
        2 * images,
    )
    assert last["flops"] == 2 * images * view
    last = read_metrics(undisturbed("simclr + suncet")[0])[-1]
    views = 2 * images + 2 * 10 * 8
    assert (last["images"], last["views"]) == (images + 80, views)
    assert last["flops"] == views * view
    in_parts = read_metrics(undisturbed("simclr + suncet in parts")[0])[-1]
    views = 2 * images + 10 * 8
    assert in_parts["views"] == views  # one more forward pass costs, but shows no new view
    assert in_parts["flops"] == views * (view + flops_of_a_view((1, 1, 1, 1)))


# ---- no waiting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case, tmp_path, files):
    def around(trainer, train_step, data):
        if trainer.step == 0:  # optimisers make their states
            return train_step()
        # AdamW's step counters lie on the host
        optimizers = (trainer.optimizer, trainer.probes.optimizer)
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        with NoHostSync([state["step"] for state in states if "step" in state]):
            train_step()
        return steps.append(trainer.step)

    steps, changes = [], {"epochs": 1, "labelled__supervised_epochs": None, "data__val": None}
    fit(configure(tmp_path / "run", files, **{**CASES[case], **changes}), around=around)
    assert steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["as it is", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_a_gpu(case, precision, tmp_path, files):
    def around(trainer, train_step, data):
        assert all(view.is_cuda for view in (*data.unlabelled.views, *data.labelled.views))
        if trainer.step == 0:
            return train_step()
        torch.cuda.set_sync_debug_mode("error")  # copies from unpinned memory are among its errors
        try:
            train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return steps.append(trainer.step)

    steps, changes = [], {"epochs": 1, "labelled__supervised_epochs": None, "data__val": None}
    changes["system__device"] = "cuda"
    if precision == "fp16":
        changes["precision"] = "fp16"
    config = configure(tmp_path / "run", files, **{**CASES[case], **changes})
    fit(config, around=around, world=World(device="cuda:0"))
    assert steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_wait_in_a_step_is_seen_on_a_gpu():
    tensor = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            tensor.sum().item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.arange(100).to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
def test_trying_the_largest_step_changes_no_number(case, tmp_path, files, undisturbed):
    config = configure(tmp_path / "run", files, **CASES[case])
    trainer = train.Trainer(config, World(), SimpleNamespace(asked=False))
    random_state = torch.get_rng_state()
    trainer._try_largest_step()
    assert torch.equal(torch.get_rng_state(), random_state)
    try:
        trainer.fit()
    finally:
        trainer.close()
    assert records(tmp_path / "run") == records(undisturbed(case)[0])


def test_labels_are_known_without_a_copy_and_padding_has_none():
    batch = SimpleNamespace(label=torch.tensor([[3], [1]]), valid=torch.tensor([True, True]))
    labels = labels_of(batch, "label")
    assert labels.tolist() == [3, 1] and labels.data_ptr() == batch.label.data_ptr()
    batch.valid[1] = False
    assert labels_of(batch, "label").tolist() == [3, -1] and labels_of(batch, "other") is None
