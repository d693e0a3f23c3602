"""The commands from Python: the numbers of the command, mistakes as exceptions, any thread."""

import json
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_files import write_small

import train
from ffcv_ssl.api import evaluate, pretrain
from ffcv_ssl.errors import BetonError, FfcvSslError, UserError
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics

SETTINGS = {
    "epochs": 2, "data": {"batch_size": 16, "num_workers": 1}, "views.small_images": True,
    "resolution": {"min": 16, "max": 16}, "model.backbone": "tiny", "model.projector": "16-8",
    "optim": {"name": "sgd", "lr": np.float64(0.05), "warmup_epochs": 0},
    "evaluation": {"batch_size": 20, "knn_bank": 50}, "log.every_steps": 1,
    "log.tensorboard": False, "system": {"device": "cpu", "torch_threads": 1}, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    train_file = write_small(folder / "train.beton", 64, (16, 16), mode="raw")
    val_file = write_small(folder / "val.beton", 33, (16, 16), mode="raw")
    return {"data.train": Path(train_file), "data.val": Path(val_file)}


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    return pretrain(SETTINGS, out=tmp_path_factory.mktemp("api") / "run", **files)


def same(records):
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


@pytest.mark.whole
def test_a_run_from_python_is_that_of_the_command(run, files, tmp_path, capsys):
    assert (run.status, run.exit_code) == ("finished", 0)
    assert run.checkpoint.exists() and run.backbone.exists() and run.report.exists()
    again = train.main([f"--config={run.out}/config.yaml", f"--out={tmp_path}/run"])
    assert again == 0
    assert same(run.metrics) == same(read_metrics(tmp_path / "run"))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert same([summary]) == same([{**run.summary, "out": f"{tmp_path}/run"}])


@pytest.mark.whole
def test_metrics_are_there_by_key(run):
    steps = [step for step, _ in run.values("train/loss")]
    assert steps == list(range(1, 9))
    assert [step for step, _ in run.values("val/knn/top1")] == [0, 4, 8]
    assert (
        run.latest["step"] == 8 and run.latest["val/knn/top1"] == run.values("val/knn/top1")[-1][1]
    )
    assert run.values("no/such/key") == []


@pytest.mark.whole
def test_a_call_on_a_finished_run_returns_it(run, files):
    again = pretrain([SETTINGS], out=str(run.out), **files)
    assert (again.status, same(again.metrics)) == ("finished", same(run.metrics))


@pytest.mark.whole
def test_an_evaluation_returns_its_metrics(run):
    result = evaluate("knn", run.out, ks=[1, 5], **{"system.device": "cpu"})
    assert result.exit_code == 0 and result.results == [result.summary]
    assert result.metrics == result.summary["metrics"] and len(result.metrics) > 0
    both = evaluate("knn", [run.out, run.checkpoint], **{"system.device": "cpu"})
    assert len(both.results) == 2
    with pytest.raises(UserError, match="metrics: got 2 results, expected one; see `results`"):
        _ = both.metrics


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pretrain("nothing"), "nothing: no such configuration file"),
        (lambda: pretrain("demo", epochs=0), "epochs: got 0, expected a whole number above 0"),
        (lambda: pretrain("demo", optim={"lr": "x"}), "optim.lr: got 'x', expected a number"),
        (lambda: pretrain({"epoch": 3}), "unknown key 'epoch'"),
        (
            lambda: pretrain(data={"train": "no.beton"}),
            "data.train or data.val: no file 'no.beton'",
        ),
        (lambda: pretrain("demo", print_config=True), "print_config: got it in a call from"),
        (lambda: pretrain("demo", help=""), "help: got it in a call from Python"),
        (lambda: evaluate("lienar", "x"), "protocol: got 'lienar', expected one of"),
        (lambda: evaluate("knn"), "checkpoint: got none"),
        (lambda: evaluate("knn", []), "checkpoint: got none"),
        (lambda: evaluate("knn", "no/run"), "checkpoint: no file or folder 'no/run'"),
    ],
)
def test_a_mistake_is_a_user_error_and_ends_nothing(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FfcvSslError) as error:
        call()
    assert str(error.value).startswith(message), error.value


@pytest.mark.whole
def test_a_damaged_file_is_named(tmp_path, run, files):
    (tmp_path / "a.beton").write_bytes(b"nothing")
    with pytest.raises(BetonError, match=r"a\.beton"):
        pretrain(SETTINGS, out=tmp_path / "run", **{**files, "data.train": tmp_path / "a.beton"})


@pytest.mark.whole
def test_it_works_in_a_thread_without_stdout_and_leaves_the_process_as_it_was(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    runs = []
    out = tmp_path / "run"
    thread = threading.Thread(target=lambda: runs.append(pretrain(SETTINGS, out=out, **files)))
    thread.start()
    thread.join(60)
    assert [run.status for run in runs] == ["finished"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.whole
def test_ctrl_c_in_a_notebook_leaves_a_run_that_goes_on(files, tmp_path):
    def interrupt_at_step_3(number, frame):
        raise AssertionError("the run's own handler was expected")

    method = tmp_path / "stopping.py"
    method.write_text(
        "import signal\nfrom ffcv_ssl.methods.simsiam import SimSiam\n\n"
        "class Stopping(SimSiam):\n    steps = 0\n"
        "    def before_step(self, progress, optimizer):\n"
        "        Stopping.steps += 1\n"
        "        if Stopping.steps == 3:\n            signal.raise_signal(signal.SIGINT)\n"
    )
    given = {**SETTINGS, **files, "method": f"{method}:Stopping"}
    before = signal.signal(signal.SIGINT, interrupt_at_step_3)
    try:
        stopped = pretrain(given, out=tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stopped.status, stopped.exit_code, stopped.summary["step"]) == ("interrupted", 75, 3)
    assert pretrain(given, out=tmp_path / "run").status == "finished"
