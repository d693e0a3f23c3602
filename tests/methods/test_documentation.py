"""The example in docs/adding_a_method.md is run as it is printed."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from support.small_files import REPOSITORY, write_small

import train
from ffcv_ssl.methods.find import find_method
from ffcv_ssl.training.metrics_log import read_metrics


@pytest.mark.whole
def test_the_documented_method_has_its_equations_gradient_and_trains(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "adding_a_method.md").read_text()
    folder = tmp_path / "my_methods"
    folder.mkdir()
    for name, code in re.findall(r"`my_methods/(\w+\.py)`:\n```python\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(code)
    tested = subprocess.run(
        [sys.executable, "-c", "import test_alignment as t; t.test_the_loss_and_its_gradient_are"
         "_those_of_the_equation()"],
        cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{folder}:{REPOSITORY}", "PATH": ""},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    data = write_small(tmp_path / "a.beton", 40, (16, 16), mode="raw")
    settings = {
        "data.train": data, "data.batch_size": 10, "data.num_workers": 1, "epochs": 1,
        "model.backbone": "tiny", "model.projector": "8", "resolution.min": 16,
        "resolution.max": 16, "optim.warmup_epochs": 0, "log.tensorboard": "false",
        "log.every_steps": 1, "system.device": "cpu", "system.torch_threads": 1,
        "precision": "fp32", "alignment.t": 3, "views.small_images": "true",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    method, threads = "my_methods.alignment:Alignment", torch.get_num_threads()
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    assert train.main([f"--out={tmp_path / 'run'}", f"--method={method}", *arguments]) == 0
    torch.set_num_threads(threads)
    assert find_method(method).Settings().t == 2.0
    losses = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert len(losses) == 4
    for record in losses:
        total = record["train/loss/alignment"] + record["train/loss/uniformity"]
        assert abs(record["train/loss"] - total) < 1e-6
