"""Weights & Biases: the same records once, whatever fails in it, and nothing of it otherwise."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.small_files import REPOSITORY

from ffcv_ssl.errors import UserError
from ffcv_ssl.training import wandb_log
from ffcv_ssl.training.metrics_log import MetricsLog


class Service:
    """Stands in for the module: `runs` are {id: what was logged}."""

    def __init__(self):
        self.runs, self.settings, self.fails_at = {}, [], None

    Settings = Image = staticmethod(lambda *values, **named: named or values[0])

    def init(self, **settings):
        self._fail("init")
        self.settings.append(settings)
        logged = self.runs.setdefault(settings["id"], [])

        def log(values):
            self._fail("log")
            logged.append(values)

        def ignore(*_, **__):
            self._fail("finish")

        return SimpleNamespace(
            log=log, finish=ignore, define_metric=lambda *_, **__: None, url="https://x/y"
        )

    def _fail(self, where):
        if self.fails_at == where:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def service(monkeypatch):
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    wandb_log.tell_once.cache_clear()
    return made


def open_log(folder, last_step=None):
    follow = wandb_log.opener(folder, "proj", {"seed": 0, "optim": {"lr": 0.1}})
    return MetricsLog(folder, last_step, tensorboard=False, follow=follow)


def write(log, *steps):
    for step in steps:
        log.write({"step": step, "train/loss": 1.0 / (step + 1)})
        log.write({"step": step, "val/knn/top1": 0.5})


def sent(service):
    (records,) = service.runs.values()
    return [(r["step"], next(key for key in r if key != "step")) for r in records]


def test_a_resumed_run_goes_on_in_its_run_and_sends_each_record_once(service, tmp_path):
    log = open_log(tmp_path)
    write(log, 1, 2, 3)  # the checkpoint is of step 2
    log.close()
    log = open_log(tmp_path, last_step=2)
    write(log, 3, 4)
    log.close()
    each = [(step, key) for step in (1, 2, 3, 4) for key in ("train/loss", "val/knn/top1")]
    assert sent(service) == each
    assert [s["project"] for s in service.settings] == ["proj", "proj"]
    assert service.settings[0]["config"] == {"seed": 0, "optim": {"lr": 0.1}}


def test_a_run_that_asks_for_it_later_sends_all_that_it_has(service, tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    write(log, 1, 2)
    log.close()
    log = open_log(tmp_path, last_step=2)
    write(log, 3)
    log.close()
    assert [step for step, _ in sent(service)] == [1, 1, 2, 2, 3, 3]


def test_a_run_that_starts_anew_is_another_one(service, tmp_path):
    for _ in range(2):
        log = open_log(tmp_path / "a")
        write(log, 1)
        log.close()
        (tmp_path / "a" / "wandb.json").unlink()
    assert len(service.runs) == 2


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "a").mkdir()


def test_pictures_are_sent_with_their_step_and_once(service, tmp_path):
    (tmp_path / "views.png").write_bytes(b"png")
    log = open_log(tmp_path)
    write(log, 2)
    log.picture("views", tmp_path / "views.png", 2)
    log.close()
    log = open_log(tmp_path, last_step=2)
    log.picture("views", tmp_path / "views.png", 2)
    log.close()
    (records,) = service.runs.values()
    assert [r for r in records if "views" in r] == [
        {"step": 2, "views": str(tmp_path / "views.png")}
    ]


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_what_fails_is_said_once_and_the_metrics_go_on(service, tmp_path, capsys, place):
    service.fails_at = place
    log = open_log(tmp_path)
    write(log, 1, 2)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    failed = "log.wandb: ConnectionError: no route to host; the run goes on without it"
    assert [line for line in lines if "Connection" in line] == [failed]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("module", [None, SimpleNamespace()])
def test_without_wandb_a_line_says_how_to_get_it(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, "wandb", module)  # None: an import fails
    with pytest.raises(UserError) as refused:
        open_log(tmp_path)
    assert str(refused.value) == (
        "log.wandb: got 'proj', but wandb is not installed; run pip install wandb, or leave out "
        "--log.wandb"
    )


@pytest.mark.whole
def test_an_offline_run_is_written_beside_the_metrics_and_changes_no_loss(tmp_path, raw_beton):
    pytest.importorskip("wandb")
    losses = []
    for name, more in (("without", []), ("with", ["--log.wandb=proj"])):
        words = [
            f"--out={tmp_path / name}", f"--data.train={raw_beton}", "--epochs=1",
            "--model.backbone=tiny", "--model.projector=8", "--resolution.min=32",
            "--resolution.max=32", "--data.batch_size=40", "--data.num_workers=1",
            "--log.every_steps=1", "--system.device=cpu", "--system.torch_threads=1", *more,
        ]  # fmt: skip
        environment = {**os.environ, "WANDB_MODE": "offline"}
        done = subprocess.run(
            [sys.executable, "train.py", *words], cwd=REPOSITORY, env=environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["status"] == "finished"
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
        assert ("offline; to send it: wandb sync" in done.stderr) == bool(more)
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert len(list((tmp_path / "with/wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not (tmp_path / "without/wandb").exists()


@pytest.mark.whole
def test_nothing_imports_wandb_that_does_not_ask_for_it():
    code = "import sys, train, evaluate; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
