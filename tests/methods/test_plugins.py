"""Methods from a user's own file: whole runs, every hook, what is said when they are wrong."""

import json
import os
import signal
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from support.small_files import REPOSITORY, write_small

import train
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.methods.find import find_method, source_digest
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics

pytestmark = pytest.mark.whole  # whole training runs


# Every hook, a settings group, a teacher in evaluation mode that sees one view, a queue, a
# normalised and at first frozen head, and a schedule of the weight decay.
MINE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import PositiveFloat
from torch import nn

from ffcv_ssl.methods import EMATeacher, FeatureQueue, Method, set_weight_decay, unit_rows


@dataclass(frozen=True)
class MineConfig:
    """Settings of mine."""

    scale: PositiveFloat = 1.0
    """How much the loss weighs."""
    kind: Literal["cosine", "dot"] = "cosine"
    """A choice."""


class Mine(Method):
    """Pull the head's output of view 1 towards the teacher's view 0, away from a queue."""

    group, Settings = "mine", MineConfig
    target_views = (0,)

    def __init__(self, config, model, num_classes, world):
        super().__init__(config, model, num_classes, world)
        width = model.widths[model.last]
        self.head = nn.Linear(width, width, bias=False)
        self.teacher = EMATeacher(model, 0.9)
        self.queue = FeatureQueue(24, width)
        self.seen = []

    def modules_in_eval(self):
        return [self.teacher]

    def add_heads(self, outputs):
        for features in outputs:
            features["mine"] = self.head(features["embedding"])

    def targets(self, views):
        self.seen.append(("targets", len(views), self.teacher.training, self.head.training))
        return [{"target": embedding} for embedding in self.teacher(views)]

    def before_step(self, progress, optimizer):
        self.seen.append(("before_step", progress))
        set_weight_decay(optimizer, 0.01 * progress)
        with torch.no_grad():
            self.head.weight.copy_(unit_rows(self.head.weight))

    def after_backward(self, progress):
        self.seen.append(("after_backward", self.head.weight.grad is not None))
        if progress < 0.25:
            self.head.weight.grad = None

    def loss(self, outputs, labels):
        query = unit_rows(self.all_gather(outputs[1:], "mine")[0])
        self.keys = unit_rows(self.all_gather(outputs[:1], "target")[0])
        positive = -(query * self.keys).sum(-1).mean()
        negative = (query @ self.queue.rows.T).square().mean()
        return self.settings.scale * (positive + negative), {"negative": negative}

    def after_update(self, model, progress):
        self.teacher.move(model, progress)
        self.queue.push(self.keys)

    def extra_flops(self, sides_px):
        return self.teacher.flops(sides_px[:1])
'''

SETTINGS = {
    "epochs": 2, "data.batch_size": 16, "data.num_workers": 1, "views.small_images": "true",
    "resolution.min": 16, "resolution.max": 16, "model.backbone": "tiny", "model.projector": "12-8",
    "optim.name": "sgd", "optim.lr": 0.1, "optim.warmup_epochs": 0, "evaluation.knn_k": 3,
    "log.every_steps": 1, "log.tensorboard": "false", "system.device": "cpu",
    "system.torch_threads": 1, "precision": "fp32", "mine.scale": 2.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_number_of_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data") / "a.beton", 80, (16, 16), mode="raw")


@pytest.fixture
def mine(tmp_path):
    """The method's name: a class in a file in a folder of its own."""
    file = tmp_path / "method" / "mine.py"
    file.parent.mkdir()
    file.write_text(MINE)
    return f"{file}:Mine"


def arguments(out, method, beton, **changes):
    given = {**SETTINGS, "data.train": beton, "data.val": beton, "method": method}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--out={out}", *(f"--{key}={value}" for key, value in given.items())]


def records(out):
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(out)]


def stop_after(monkeypatch, step):
    """Let SIGTERM arrive in a step."""
    train_step = train.Trainer._train_step

    def stopped(self, data, px):
        train_step(self, data, px)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "_train_step", stopped)


@pytest.mark.parametrize("changes", [{}, {"data__chunk_size": 7}], ids=["whole", "in parts"])
def test_a_users_method_trains_and_resumes_bit_for_bit(
    changes, mine, beton, tmp_path, monkeypatch, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(arguments(whole, mine, beton, **changes)) == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 7)
        assert train.main(arguments(stopped, mine, beton, **changes)) == 75
    assert train.main(arguments(stopped, mine, beton, **changes)) == 0
    assert "the source of" not in capsys.readouterr().out
    assert records(stopped) == records(whole) and len(records(whole)) == 13
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, stopped)]
    for name, value in states[0]["method"].items():
        assert torch.equal(value, states[1]["method"][name]), name
    assert {"teacher.backbone.0.weight", "queue.rows", "queue.position", "head.weight"} <= set(
        states[0]["method"]
    )
    assert states[0]["method_source"] == source_digest(find_method(mine))
    assert states[0]["config"]["mine"] == {"scale": 2.0, "kind": "cosine"}


def test_every_hook_is_called_in_its_place(mine, beton, tmp_path, monkeypatch):
    trainers, decays, weights = [], [], []
    train_step = train.Trainer._train_step

    def spied(self, data, px):
        before = self.method.head.weight.detach().clone()
        train_step(self, data, px)
        trainers.append(self)
        decays.append([group["weight_decay"] for group in self.optimizer.param_groups])
        rows = torch.nn.functional.normalize(before, dim=1)
        weights.append(torch.allclose(self.method.head.weight, rows))

    monkeypatch.setattr(train.Trainer, "_train_step", spied)
    assert train.main(arguments(tmp_path / "run", mine, beton)) == 0
    expected = []
    for step in range(10):
        expected += [("before_step", step / 10), ("targets", 1, False, True)]
        expected += [("after_backward", True)]
    assert trainers[0].method.seen == expected
    assert decays == [[pytest.approx(0.001 * step), 0.0] for step in range(10)]
    assert weights == [True] * 3 + [False] * 7  # frozen at first; weight decay does not move it


@pytest.mark.whole
def test_two_ranks_train_a_users_method_as_one_does(mine, beton, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    # no batch-norm that would see other batches, but in the backbone: the first loss is compared
    command = [sys.executable, *launcher, "train.py", *arguments(tmp_path / "two", mine, beton)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "finished"
    found = records(tmp_path / "two")
    assert [r["step"] for r in found if "train/loss" in r] == list(range(1, 11))
    assert all(-2 < r["train/loss"] < 4 for r in found if "train/loss" in r)
    saved = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert saved["method"]["queue.position"] == 10 * 16 % 24


def test_its_settings_come_from_layers_of_yaml_and_the_command_line(mine, tmp_path, capsys):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text(f"method: {mine}\nmine: {{kind: dot, scale: 3}}\nsupervised:\n  x: 1\n")
    top.write_text("base: base.yaml\nmine.scale: 4\n")
    config = train.read_config([f"--config={top}", "--mine.scale", "5"])
    assert (config.method, config.mine.scale, config.mine.kind) == (mine, 5.0, "dot")
    assert config_dict(train.read_config([f"--config={top}"]))["mine"]["scale"] == 4.0
    for option, expected in (("--help", "How much the loss weighs"), ("--print_config", "mine:")):
        with pytest.raises(SystemExit):
            train.main([f"--config={top}", option])
        assert expected in capsys.readouterr().out
    assert train.main([f"--config={top}", "--mine.kind", "other"]) == 2
    assert "mine.kind" in capsys.readouterr().err


def test_a_changed_source_is_said_on_resume_and_the_run_goes_on(
    mine, beton, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert train.main(arguments(tmp_path / "run", mine, beton, epochs=1)) == 75
    file = mine.rpartition(":")[0]
    with open(file, "a") as source:
        source.write("# changed\n")
    find_method.cache_clear()
    capsys.readouterr()
    assert train.main(arguments(tmp_path / "run", mine, beton, epochs=1)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "the source of" in line]
    assert len(lines) == 1 and mine in lines[0]


def test_evaluation_reads_a_checkpoint_whose_method_is_gone(mine, beton, tmp_path):
    assert train.main(arguments(tmp_path / "run", mine, beton, epochs=1)) == 0
    os.remove(mine.rpartition(":")[0])
    find_method.cache_clear()
    encoder = load_encoder(tmp_path / "run")
    assert encoder.config["method"] == mine
    assert encoder.encode(torch.zeros(2, 3, 16, 16))["projector_2"].shape == (2, 8)


def test_a_method_of_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "my_module.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert find_method("my_package.my_module:Mine").group == "mine"


def module_with(changes):
    """MINE after replacements {old: new}."""
    text = MINE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


BAD = {
    "no class": ("Other", {}, "no class 'Other'; methods in it: Mine"),
    "no Method": ("MineConfig", {}, "expected a subclass of ffcv_ssl.methods.Method"),
    "no loss": ("Mine", {"def loss": "def lost"}, "a Method without loss"),
    "error on import": ("Mine", {"class Mine(": "undefined\nclass Mine("}, "name 'undefined'"),
    "syntax error": ("Mine", {"class Mine(Method):": "class Mine(Method)"}, "SyntaxError"),
    "group is taken": ("Mine", {'"mine", MineConfig': '"optim", MineConfig'}, "a name that is"),
    "no group": ("Mine", {'"mine", MineConfig': '"", MineConfig'}, "group: got ''"),
    "not frozen": ("Mine", {"@dataclass(frozen=True)": "@dataclass"}, "a frozen dataclass"),
    "no default": ("Mine", {"PositiveFloat = 1.0": "PositiveFloat"}, "give every field a default"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_a_method_is_one_line_and_exit_code_2(name, tmp_path, capsys):
    class_name, changes, expected = BAD[name]
    file = tmp_path / "mine.py"
    file.write_text(module_with(changes))
    assert train.main([f"--method={file}:{class_name}", "--data.train=x.beton"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and expected in message and str(file) in message
    if "error" in name:
        number = 1 + file.read_text().split("undefined")[0].count("\n")
        if name == "syntax error":
            number = 1 + file.read_text().split("class Mine(Method)")[0].count("\n")
        assert message.startswith(f"{file}:{number}: ")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("mocoo", "got 'mocoo', expected one of simclr, vicreg, barlow, byol, instance_simclr"),
        ("nowhere/mine.py:Mine", "no file 'nowhere/mine.py'"),
        ("no_such_package.mine:Mine", "no module 'no_such_package.mine'"),
    ],
)
def test_an_unknown_method_is_one_line_that_says_what_is_possible(method, expected, capsys):
    assert train.main([f"--method={method}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"method: {expected}" in message


def test_a_method_named_in_a_file_is_an_error_of_that_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(
        dedent("""\
        method: nope
        """)
    )
    assert train.main([f"--config={tmp_path / 'a.yaml'}"]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'a.yaml'}: method: got 'nope'")


def test_settings_of_other_methods_are_not_compared_on_resume(beton, tmp_path, monkeypatch, capsys):
    given = {key: value for key, value in SETTINGS.items() if not key.startswith("mine.")}
    line = [f"--{k}={v}" for k, v in {**given, "data.train": beton, "epochs": 1}.items()]
    line.append(f"--out={tmp_path / 'run'}")
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert train.main(line) == 75
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["config"]["supervised"] = {"label_smoothing": 0.0}  # as runs of before hold it
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert train.main([*line, "--byol.momentum=0.5"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert train.main([*line, "--simclr.temperature=0.5"]) == 2
    assert "simclr.temperature 0.15 in the checkpoint, 0.5 now" in capsys.readouterr().err
