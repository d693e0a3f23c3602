"""Whole runs of the trainer, tiny: what they leave, how they stop, resume and refuse."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support.forked import Training
from support.small_files import REPOSITORY, SmallImages, write_small

import train
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import hold_folder
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics
from ffcv_ssl.training.models import make_backbone

pytestmark = pytest.mark.whole

SETTINGS = {
    "epochs": 2, "model.backbone": "tiny", "model.projector": "16-8", "optim.name": "sgd",
    "optim.lr": 0.1, "optim.warmup_epochs": 0.5, "resolution.min": 32, "resolution.max": 32,
    "data.batch_size": 40, "data.num_workers": 1, "log.every_steps": 2, "log.tensorboard": "false",
    "system.device": "cpu", "system.torch_threads": 1,
}  # fmt: skip


def arguments(out, **settings):
    """A command line for a run of 2 epochs of 5 steps; `a__b` stands for the key `a.b`."""
    settings = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    return [f"--out={out}", *(f"--{key}={value}" for key, value in settings.items())]


def records(out):
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(out)]


class Relabelled(SmallImages):
    """The same images with given labels."""

    def __init__(self, labels):
        super().__init__(len(labels), (16, 16))
        self.labels = labels

    def __getitem__(self, i):
        return super().__getitem__(i)[0], self.labels[i]


def write_labelled(path, labels, names=None):
    from ffcv_ssl import DatasetWriter
    from ffcv_ssl.fields import IntField, RGBImageField

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    class_names = {"label": names} if names else {}
    writer = DatasetWriter(str(path), fields, num_workers=1, class_names=class_names)
    writer.from_indexed_dataset(Relabelled(labels))
    return str(path)


@pytest.fixture(scope="session")
def val_beton(tmp_path_factory):
    """23 images, of which 19 are labelled."""
    labels = [i % 7 if i < 19 else -1 for i in range(23)]
    return write_labelled(tmp_path_factory.mktemp("val") / "val.beton", labels)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, raw_beton, val_beton):
    """An uninterrupted run: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    command = [sys.executable, "train.py", *arguments(out, data__train=raw_beton)]
    done = subprocess.run(
        [*command, f"--data.val={val_beton}", "--checkpoint.keep_every=2"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_records_every_key_of_its_metrics(finished):
    out, _ = finished
    counters = {"epoch", "step", "updates", "images", "views", "flops", "seconds"}
    depths = ("backbone", "projector_1", "projector_2")
    training = {"resolution", "lr", "train/loss", "train/images_per_s", "train/data_wait"}
    training.add("train/peak_memory_mib")
    training |= {f"train/{depth}/top1" for depth in depths}
    training |= {"train/loss/alignment", "train/loss/uniformity"}
    measured = {f"val/{name}/top{k}" for name in (*depths, "knn") for k in (1, 5)}
    numbers, watched = ("std", "effective_rank", "rankme"), ("backbone", "projector_2")
    measured |= {f"health/{depth}/{number}" for depth in watched for number in numbers}
    measured |= {"health/alignment", "health/uniformity"}
    lines = read_metrics(out)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines if "val/knn/top1" in line] == [0, 5, 10]
    for line in lines:
        assert set(line) == counters | (training if "train/loss" in line else measured)
    last = lines[-1]
    assert (last["epoch"], last["updates"], last["images"], last["views"]) == (2.0, 10, 400, 800)
    # convolutions to 15x15x8 and 7x7x16, then 16 to 16 to 8: forward, gradients of weights, and of
    # inputs but for the first layer
    per_view = [15 * 15 * 8 * 27, 7 * 7 * 16 * 8 * 9, 16 * 16, 16 * 8]
    assert last["flops"] == 800 * 2 * (2 * per_view[0] + 3 * sum(per_view[1:]))


def test_a_run_leaves_config_checkpoint_copies_picture_and_backbone(finished):
    out, printed = finished
    summary = json.loads(printed.splitlines()[-1])
    assert (summary["status"], summary["step"], summary["out"]) == ("finished", 10, str(out))
    backbone, _ = make_backbone("tiny", "imagenet")
    backbone.load_state_dict(load_file(out / "backbone.safetensors"))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    conv = saved["model"]["backbone.0.weight"]
    assert torch.equal(conv, backbone[0].weight)
    start = torch.load(out / "checkpoint_epoch_0000.pt", weights_only=True)
    assert start["step"] == 0 and not torch.equal(start["model"]["backbone.0.weight"], conv)
    assert (out / "checkpoint_epoch_0002.pt").exists() and (out / "report.png").exists()
    assert train.read_config([f"--config={out}/config.yaml"]).optim.lr == 0.1


def test_a_finished_run_started_again_changes_nothing(finished, raw_beton, val_beton, capsys):
    out, printed = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    lines = read_metrics(out)
    code = train.main(arguments(out, data__train=raw_beton, data__val=val_beton))
    assert code == 0 and read_metrics(out) == lines
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.pt")} == before
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["train/loss"] == json.loads(printed.splitlines()[-1])["train/loss"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_has_the_losses_of_one_that_was_not(
    finished, tmp_path, raw_beton, val_beton
):
    out, chance = tmp_path / "killed", random.Random(os.getpid())
    given = ["--checkpoint.keep_every=2", "--checkpoint.every_minutes=0.001"]
    given += [f"--data.val={val_beton}", *arguments(out, data__train=raw_beton)]
    resumed = []
    for _ in range(5):
        run = Training(given)
        for _ in range(chance.randint(1, 3)):
            resumed += [line for line in [run.stdout.readline()] if "resumed at step" in line]
        time.sleep(0.15 * chance.random())  # the whole training takes a second
        run.kill()
    assert Training(given).wait() == 0
    assert resumed, "no attempt came far enough to be resumed"
    assert records(out) == records(finished[0])
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names if name.endswith(".tmp")]
    assert names == {path.name for path in finished[0].iterdir()}
    weights = [torch.load(o / "checkpoint.pt", weights_only=True) for o in (out, finished[0])]
    for name, tensor in weights[0]["model"].items():
        assert torch.equal(tensor, weights[1]["model"][name]), name


def interrupt_at(monkeypatch, step):
    """Let SIGTERM arrive during the given step."""
    train_step = train.Trainer._train_step

    def interrupted(self, data, px):
        train_step(self, data, px)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "_train_step", interrupted)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.cuda.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"
            ),
            "out of memory after step 6 (asked for 2.50 GiB)",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
            ),
            "out of memory after step 6 (asked for 7 bytes)",
        ),
    ],
)
def test_running_out_of_memory_is_one_line_with_the_settings_to_lower(
    tmp_path, raw_beton, monkeypatch, capsys, error, said
):
    train_step = train.Trainer._train_step

    def too_large(self, data, px):
        if self.step == 6:
            raise error
        train_step(self, data, px)

    monkeypatch.setattr(train.Trainer, "_train_step", too_large)
    assert train.main(arguments(tmp_path / "run", data__train=raw_beton)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message and "lower data.batch_size, data.chunk_size or res" in message


def test_an_error_of_torch_that_is_not_about_memory_keeps_its_traceback(
    tmp_path, raw_beton, monkeypatch
):
    def broken(self, data, px):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train.Trainer, "_train_step", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train.main(arguments(tmp_path / "run", data__train=raw_beton))


@pytest.mark.parametrize("step", [3, 5])
def test_sigterm_saves_the_step_exits_75_and_the_run_goes_on_with_other_workers(
    finished, tmp_path, raw_beton, val_beton, monkeypatch, capsys, step
):
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    data = {"data__train": raw_beton, "data__val": val_beton}
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        assert train.main(arguments(out, **data)) == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["status"] == "interrupted"
    assert f"holds step {step}" in printed.err
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == step and saved["threads"] == 1
    others = {"data__num_workers": 2, "data__batches_ahead": 1, "checkpoint__every_minutes": 3}
    assert train.main(arguments(out, **data, **others)) == 0
    assert records(out) == records(finished[0])


def test_a_checkpoint_from_before_a_setting_existed_resumes(
    tmp_path, raw_beton, monkeypatch, capsys
):
    out, data = tmp_path / "run", {"data__train": raw_beton}
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert train.main(arguments(out, **data)) == 75
    saved = torch.load(out / "checkpoint.pt", weights_only=False)
    del saved["config"]["optim"]["fused"]
    checkpoint.save(out / "checkpoint.pt", saved)
    assert train.main(arguments(out, **data)) == 0
    assert "resumed at step 3" in capsys.readouterr().out


def test_a_checkpoint_of_other_settings_is_refused_with_both_sides(finished, raw_beton, capsys):
    out, _ = finished
    code = train.main(arguments(out, data__train=raw_beton, optim__lr=0.2))
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1
    assert "optim.lr 0.1 in the checkpoint, 0.2 now" in message
    assert "val data" in message and "23 samples) in the checkpoint, None now" in message


def test_a_checkpoint_of_another_dataset_is_refused_with_both_sides(
    finished, tmp_path, val_beton, capsys
):
    other = write_small(tmp_path / "other.beton", 80, (16, 16), mode="raw")
    code = train.main(arguments(finished[0], data__train=other, data__val=val_beton))
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1
    assert "(200 samples) in the checkpoint" in message and "(80 samples) now" in message


def test_two_processes_cannot_train_in_one_folder(tmp_path, raw_beton, capsys):
    with hold_folder(tmp_path / "run"):
        assert train.main(arguments(tmp_path / "run", data__train=raw_beton)) == 2
    assert "another process trains here" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, raw_beton, monkeypatch, capsys
):
    def poisoned(embeddings, temperature, world):
        loss, terms = nt_xent(embeddings, temperature, world)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 7 else 1.0), terms

    nt_xent, calls = train.nt_xent, []
    monkeypatch.setattr(train, "nt_xent", poisoned)
    out = tmp_path / "run"
    code = train.main(arguments(out, data__train=raw_beton, checkpoint__every_minutes=0.0001))
    message = capsys.readouterr().err
    assert code == 1 and message.count("\n") == 1
    assert f"{out}: the loss of step 7 is not finite" in message
    assert "lower optim.lr or raise the precision in a new run with another --out" in message
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 6 and f"holds step {saved['step']}" in message
    assert all(torch.isfinite(v).all() for v in saved["model"].values())
    assert [r["step"] for r in read_metrics(out)][-1] == 6


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, raw_beton, capsys):
    code = train.main(arguments(tmp_path / "run", data__train=raw_beton, optim__lr=1e38))
    assert code == 1 and "is not finite" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 0


def test_a_file_without_labels_trains_without_probes_and_says_so_once(tmp_path, val_beton, capsys):
    path = write_labelled(tmp_path / "none.beton", [-1] * 90)
    out = tmp_path / "run"
    code = train.main(arguments(out, data__train=path, data__val=val_beton, epochs=1))
    printed = capsys.readouterr().out
    assert code == 0 and printed.count("no labels in field 'label'") == 1
    assert not [k for r in read_metrics(out) for k in r if k.startswith("val/") or "top1" in k]


def test_a_run_without_a_label_field_and_without_validation_trains(tmp_path, raw_beton, capsys):
    settings = {"data__train": raw_beton, "data__label_field": "species", "epochs": 1}
    assert train.main(arguments(tmp_path / "run", **settings)) == 0
    assert "no labels in field 'species'" in capsys.readouterr().out


def test_every_labelled_validation_sample_counts_once_and_no_other_does(finished):
    for record in read_metrics(finished[0]):
        for key in ("val/backbone/top1", "val/projector_2/top5", "val/knn/top1"):
            if key in record:
                count = record[key] * 19
                assert abs(count - round(count)) < 1e-9


@pytest.mark.parametrize(
    ("names", "got"),
    [("ab", "got 2 classes"), ("acb", "class 1 is 'c', expected 'b'"), ("abcd", "got 4 classes")],
)
def test_a_validation_file_of_other_classes_is_refused(tmp_path, capsys, names, got):
    data = write_labelled(tmp_path / "train.beton", [i % 3 for i in range(40)], list("abc"))
    val = write_labelled(tmp_path / "val.beton", [0, 1, 1, 0], list(names))
    assert train.main(arguments(tmp_path / "run", data__train=data, data__val=val)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{val}: {got}") and line.count("\n") == 1 and data in line


def test_unlabelled_training_images_train_the_encoder_but_no_probe(tmp_path, capsys):
    labels = [i % 3 if i % 4 == 0 else -1 for i in range(90)]
    path = write_labelled(tmp_path / "some.beton", labels)
    out = tmp_path / "run"
    assert train.main(arguments(out, data__train=path, data__val=path, epochs=1)) == 0
    last = [r for r in read_metrics(out) if "val/knn/top1" in r][-1]
    count = last["val/knn/top1"] * sum(label >= 0 for label in labels)
    assert last["images"] == 80 and abs(count - round(count)) < 1e-9


def test_one_step_passes_the_backbone_once(tmp_path, raw_beton, monkeypatch):
    passes = []
    encode = train.Model.encode

    def counted(self, images):
        passes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(train.Model, "encode", counted)
    assert train.main(arguments(tmp_path / "run", data__train=raw_beton, epochs=1)) == 0
    assert [n for n in passes if n == 80] == [80] * 5 and set(passes) <= {80, 4}


def test_resolution_grows_from_epoch_to_epoch_and_the_counted_work_with_it(tmp_path, raw_beton):
    settings = {"resolution__max": 64, "resolution__start_ramp": 1, "resolution__end_ramp": 1}
    settings |= {"precision": "fp32", "optim__name": "lars", "views__recipe": "byol"}
    assert train.main(arguments(tmp_path / "run", data__train=raw_beton, **settings)) == 0
    lines = read_metrics(tmp_path / "run")
    assert [r["resolution"] for r in lines] == [32, 32, 32, 64, 64, 64]
    first, second = lines[2]["flops"], lines[-1]["flops"] - lines[2]["flops"]
    assert second > 3 * first


def test_fp16_trains_with_scaled_gradients(tmp_path):
    # two steps of few images: half precision is emulated on most CPUs
    data = write_small(tmp_path / "few.beton", 8, (16, 16), mode="raw")
    settings = {"data__train": data, "data__batch_size": 4, "epochs": 1, "precision": "fp16"}
    out = tmp_path / "run"
    assert train.main(arguments(out, optim__name="adamw", optim__lr=1e-4, **settings)) == 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 1 and saved["step"] == 2
    assert read_metrics(out)[-1]["updates"] == saved["updates"] <= 2


BAD_COMMANDS = {
    "unknown option": (["--optim.warmup_epoch=3"], "warmup_epoch"),
    "bad number": (["--optim.lr=fast"], "optim.lr"),
    "number out of range": (["--optim.lr=-1"], "optim.lr"),
    "bad choice": (["--precision=fp8"], "precision"),
    "bad projector": (["--model.projector=a-b"], "model.projector: got 'a-b'"),
    "unknown backbone": (["--model.backbone=vit"], "model.backbone: got 'vit'"),
    "unknown recipe": (["--views.recipe=nope"], "views.recipe"),
    "view setting out of range": (["--views.view_0.blur_prob=2"], "blur_prob"),
    "nothing to train on": (["--labelled.unsupervised_batch_size=0"], "choose a labelled.loss"),
    "two ends": (
        ["--labelled.supervised_epochs=1", "--labelled.supervised_passes=1"],
        "expected one of them",
    ),
    "more labelled views than views": (["--labelled.num_views=3"], "labelled.num_views: got 3"),
    "one view": (["--views.recipe=supervised"], "expected 2 to 12 for SimCLR"),
    "warm-up as long as the run": (
        ["--epochs=5", "--optim.warmup_epochs=5"],
        "optim.warmup_epochs: got 5.0, expected less than epochs (5); give --optim.warmup_epochs",
    ),
    "ramp the wrong way": (
        ["--resolution.min=300"],
        "resolution: got min 300, max 224, start_ramp 0",
    ),
    "nesterov without momentum": (
        ["--optim.name=sgd", "--optim.nesterov=true", "--optim.momentum=0"],
        "optim.nesterov: got true with momentum 0",
    ),
    "betas that never forget": (
        ["--optim.name=adamw", "--optim.betas=[0.9,1.0]"],
        "optim.betas: got [0.9, 1.0]",
    ),
    "no folder": (["--out="], "out: got ''"),
    "one image to compare with none": (
        ["--data.batch_size=1"],
        "data.batch_size: got 1 for SimCLR, expected at least 2",
    ),
    "labels without positives": (
        ["--labelled.loss=suncet", "--labelled.images_per_class=1"],
        "labelled.images_per_class: got 1 with one view, expected at least 2 for suncet",
    ),
    "labels without negatives": (
        ["--labelled.loss=supcon", "--labelled.classes_per_batch=1"],
        "labelled.classes_per_batch: got 1, expected at least 2 for supcon",
    ),
    "no data": ([], "no file ''"),
    "missing configuration": (["--config=configs/nope.yaml"], "configs/nope.yaml: no such"),
    "no such device": (["--system.device=cuda:99"], "cuda:99"),
    "no such field": (["--data.image_field=photo"], "no image field 'photo'"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_mistake_in_the_command_is_one_line_and_exit_code_2(name, tmp_path, raw_beton, capsys):
    given, expected = BAD_COMMANDS[name]
    data = [] if name == "no data" else [f"--data.train={raw_beton}"]
    code = train.main([f"--out={tmp_path / 'run'}", *data, *given])
    message = capsys.readouterr().err
    assert (code, message.count("\n")) == (2, 1) and expected in message


@pytest.mark.parametrize("method", ["vicreg", "barlow"])
def test_a_method_that_compares_images_refuses_a_batch_of_one(method):
    with pytest.raises(UserError, match=r"data.batch_size: got 1 for .* compares images"):
        train.read_config([f"--method={method}", "--data.batch_size=1"])
    assert train.read_config(["--method=byol", "--data.batch_size=1"]).data.batch_size == 1


FOREIGN = {
    "checkpoint_epoch_0002.pt": b"weights",
    "backbone.safetensors": b"weights",
    "config.yaml": b"settings: of another program\n",
    "metrics.jsonl": b"of another program\n",
    "report.png": b"a picture",
    "tensorboard/events": b"of another program",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_does_not_begin_over_files_that_it_would_destroy(name, tmp_path, raw_beton, capsys):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(FOREIGN[name])
    assert train.main(arguments(tmp_path / "run", data__train=raw_beton)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path / 'run'}: got {name.split('/')[0]} but no checkpoint.pt")
    assert line.count("\n") == 1 and file.read_bytes() == FOREIGN[name]


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "config.yaml"])
def test_a_pipe_in_place_of_a_file_holds_no_run_up(name, tmp_path, raw_beton, capsys):
    out = tmp_path / "run"
    out.mkdir()
    os.mkfifo(out / name)
    assert train.main(arguments(out, data__train=raw_beton)) == 2
    line = capsys.readouterr().err
    assert name in line and line.count("\n") == 1


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(
    finished, tmp_path, raw_beton, val_beton, monkeypatch, capsys
):
    out, data = tmp_path / "run", {"data__train": raw_beton, "data__val": val_beton}
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7)
        assert train.main(arguments(out, **data)) == 75
    content = bytearray((out / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 64
    (out / "checkpoint.pt").write_bytes(content)
    capsys.readouterr()
    assert train.main(arguments(out, **data)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{out / 'checkpoint.pt'}: not a readable checkpoint (it is damaged")
    assert "checkpoint_previous.pt is whole: delete checkpoint.pt and copy it to checkpoint" in line
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").write_bytes((out / "checkpoint_previous.pt").read_bytes())
    assert train.main(arguments(out, **data)) == 0
    assert "resumed at step 5" in capsys.readouterr().out
    assert records(out) == records(finished[0])
    assert not (out / "checkpoint_previous.pt").exists()


def test_a_checkpoint_that_lacks_a_part_is_one_line(tmp_path, raw_beton, capsys):
    out = tmp_path / "run"
    given = arguments(out, data__train=raw_beton)
    out.mkdir()
    checkpoint.save(out / "checkpoint.pt", {"format": 1})
    assert train.main(given) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{out / 'checkpoint.pt'}: lacks what the run goes on from, or contra")
    assert "KeyError: 'config'" in line and line.count("\n") == 1


@pytest.mark.parametrize("part", ["rng", "averages", "optimizer", "model"])
def test_a_checkpoint_whose_parts_contradict_the_run_is_one_line(
    part, tmp_path, raw_beton, monkeypatch, capsys
):
    out = tmp_path / "run"
    given = arguments(out, data__train=raw_beton)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert train.main(given) == 75
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint.save(out / "checkpoint.pt", {**state, part: {"a": torch.zeros(3)}})
    capsys.readouterr()
    assert train.main(given) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith(f"{out / 'checkpoint.pt'}: lacks what the run goes on from")
        and line.count("\n") == 1
    )


def test_a_picture_that_cannot_be_drawn_costs_no_weights(tmp_path, raw_beton, monkeypatch, capsys):
    out = tmp_path / "run"
    given = arguments(out, data__train=raw_beton, epochs=1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("ffcv_ssl.training.report.save_figure", full)
        assert train.main(given) == 2
    assert "report.png: cannot be written (No space left on device)" in capsys.readouterr().err
    weights = (out / "backbone.safetensors").read_bytes()
    assert train.main(given) == 0  # the same command draws it
    assert (out / "report.png").exists() and not (out / "checkpoint_previous.pt").exists()
    assert (out / "backbone.safetensors").read_bytes() == weights


def test_a_mistake_in_a_configuration_names_its_file(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("optim:\n  warmup_epoch: 3\n")
    assert train.main([f"--config={path}"]) == 2
    assert capsys.readouterr().err == f"{path}: optim: unknown key 'warmup_epoch'\n"


def test_command_line_overrides_the_file_and_print_config_shows_it(capsys):
    config = ["--config", str(REPOSITORY / "configs/simclr.yaml")]
    given = [*config, "--optim.lr", "0.5", "--views.view_1.blur_prob", "0.25"]
    assert train.read_config(given).optim.lr == 0.5
    assert train.read_config(given).views.resolve()["view_1"].blur_prob == 0.25
    with pytest.raises(SystemExit) as end:
        train.main([*given, "--print_config"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "lr: 0.5" in printed and "blur_prob: 0.25" in printed


def test_a_trace_holds_as_many_steps_as_asked_for_and_changes_no_number(
    finished, tmp_path, raw_beton, val_beton, capsys
):
    out = tmp_path / "run"
    given = arguments(out, data__train=raw_beton, data__val=val_beton, system__profile=3)
    assert train.main(given) == 0
    path = out / "trace_rank_0.json.gz"
    assert f"trace of 3 steps: {path}" in capsys.readouterr().out
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert sum(str(name).startswith("Optimizer.step#SGD") for name in names) == 3
    assert records(out) == records(finished[0])


def test_a_run_too_short_for_a_trace_says_so(tmp_path, raw_beton, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, data__train=raw_beton, epochs=1, system__profile=3)) == 0
    assert "no trace: the first 5 steps are not traced" in capsys.readouterr().out
    assert not (out / "trace_rank_0.json.gz").exists()
