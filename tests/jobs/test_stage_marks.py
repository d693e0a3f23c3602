"""What makes a chain's stage finished: its settings and what their files hold; with a real command
that refuses other settings, and what to do then."""

import json
import shutil

import numpy as np
import pytest
from support.small_files import REPOSITORY
from support.tuning_files import NUM_CLASSES, write_coloured, write_pretrained

from ffcv_ssl.errors import UserError
from ffcv_ssl.jobs import chain, chain_file, stage_marks

SETTINGS = "labels: {{file: {0}/list.txt}}\ndata: {{train: {0}/a.beton, num_workers: 1}}\n"


@pytest.fixture
def stage(tmp_path):
    """(folder of a finished stage, its settings), which name a list and a data file."""
    write_coloured(tmp_path / "a.beton", np.arange(8) % NUM_CLASSES)
    (tmp_path / "list.txt").write_text("0\n1\n")
    folder, settings = tmp_path / "out/finetune", SETTINGS.format(tmp_path)
    inputs = stage_marks.read_inputs(folder, settings)
    stage_marks.mark_finished(folder, settings, inputs, {"top1": 0.5})
    return folder, settings


def test_a_stage_is_finished_with_its_own_settings_and_files_wherever_they_were_touched(stage):
    folder, settings = stage
    (folder.parent.parent / "list.txt").write_text("0\n1\n")
    assert stage_marks.is_finished(folder, settings)
    assert stage_marks.summary_of(folder) == {"top1": 0.5}
    assert not stage_marks.is_finished(folder, settings.replace("num_workers: 1", "num_workers: 2"))
    assert not stage_marks.is_finished(folder.with_name("other"), settings)


def test_a_file_that_changed_since_is_named_with_what_to_do(stage):
    folder, settings = stage
    data = folder.parent.parent
    (data / "list.txt").write_text("2\n3\n")
    with pytest.raises(UserError) as error:
        stage_marks.is_finished(folder, settings)
    assert f"{data}/list.txt has changed since this stage finished; restore it, or move" in str(
        error.value
    )
    assert str(error.value).endswith("or give the chain another --out")
    (data / "list.txt").write_text("0\n1\n")
    write_coloured(data / "a.beton", np.arange(9) % NUM_CLASSES)
    with pytest.raises(UserError, match=r"a\.beton has changed"):
        stage_marks.is_finished(folder, settings)


def test_files_that_other_stages_make_or_that_are_gone_do_not_count(stage):
    folder, settings = stage
    made = folder.parent / "pretrain/backbone.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"weights")
    more = f"{settings}checkpoint: {made}\n"
    assert stage_marks.read_inputs(folder, more) == stage_marks.read_inputs(folder, settings)
    (folder.parent.parent / "list.txt").unlink()
    assert stage_marks.is_finished(folder, settings)


def test_a_mark_of_another_kind_is_none(stage):
    folder, settings = stage
    for text in ("", "{}", json.dumps({"settings": settings})):
        (folder / stage_marks.MARK).write_text(text)
        assert not stage_marks.is_finished(folder, settings)


# ---- With a real command -------------------------------------------------------------------------

STAND_IN = """
import json, pathlib, sys, yaml
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
if "config" in given:
    given = yaml.safe_load(pathlib.Path(given["config"]).read_text())
if "print_config" not in given:
    folder = pathlib.Path(given["out"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as file:
        file.write("x")
print(json.dumps({"out": given["out"]}))
"""
REAL = """
import runpy, sys
sys.path.insert(0, {0!r})
runpy.run_path({0!r} + "/evaluate.py", run_name="__main__")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A chain of a real fine-tuning between two stand-ins for train.py."""
    (tmp_path / "evaluate.py").write_text(REAL.format(str(REPOSITORY)))
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(chain_file, "SCRIPTS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "list.txt").write_text("".join(f"{i}\n" for i in range(32)))
    write_pretrained(tmp_path / "w.safetensors")
    data = write_coloured(tmp_path / "a.beton", np.arange(64) % NUM_CLASSES)
    settings = {
        "checkpoint": str(tmp_path / "w.safetensors"), "epochs": 1, "select": "last",
        "data": {"train": data, "val": data, "batch_size": 16, "resolution_px": 32},
        "labels": {"scheme": "file", "file": str(tmp_path / "list.txt")},
        "log.tensorboard": False, "system.device": "cpu", "system.torch_threads": 1,
    }  # fmt: skip
    stages = {
        "pretrain": {"command": "train"},
        "finetune": {"command": "finetune", "overrides": settings},
        "after": {"command": "train", "overrides": {"of": "{finetune}"}},
    }
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps({"out": str(tmp_path / "out"), "stages": stages}))
    return path


def calls(file):
    """How often the stand-ins ran."""
    return [
        len((file.parent / "out" / name / "calls").read_text()) for name in ("pretrain", "after")
    ]


@pytest.mark.slow
def test_a_fine_tuning_refuses_other_settings_and_labels_and_the_chain_says_what_works(file, capfd):
    assert chain.main([str(file)]) == 0 and calls(file) == [1, 1]
    capfd.readouterr()
    assert chain.main([str(file), "--finetune.epochs=2"]) == 2
    refusal, remedy = capfd.readouterr().err.splitlines()[-2:]
    folder = file.parent / "out/finetune"
    assert "made by another run: epochs 1 in the checkpoint, 2 now" in refusal
    assert f"move {folder} away to run the stage anew, or give the chain another --out" in remedy
    assert "again to continue" not in remedy and calls(file) == [1, 1]
    (file.parent / "list.txt").write_text("".join(f"{i}\n" for i in range(32, 64)))
    assert chain.main([str(file)]) == 2
    (line,) = capfd.readouterr().err.splitlines()[1:]
    assert f"{file.parent}/list.txt has changed since this stage finished" in line
    shutil.move(folder, folder.with_name("first"))
    assert chain.main([str(file), "--finetune.epochs=2"]) == 0 and calls(file) == [1, 2]
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["stages"]["finetune"]["settings"]["epochs"] == 2
