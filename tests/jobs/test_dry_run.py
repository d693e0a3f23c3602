"""`--slurm.dry_run`: the files that sbatch would get, where there is no Slurm, and nothing else."""

import json
import sys
from pathlib import Path

import pytest
from support.outputs import closed_stdout

import evaluate
import train
from ffcv_ssl.jobs import chain, slurm
from ffcv_ssl.training.run_data import tell_once


@pytest.fixture(autouse=True)
def without_slurm(tmp_path, monkeypatch):
    """An empty folder on a machine without any program of Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    tell_once.cache_clear()


def shown(capsys):
    """(the printed job files, the summary)."""
    printed = capsys.readouterr().out
    *lines, last = printed.splitlines()
    return "\n".join(lines), json.loads(last)


WORDS = ["--data.train=a.beton", "--slurm.dry_run", "--slurm.nodes=2", "--slurm.mem=64GB"]


@pytest.mark.parametrize("partition", [[], ["--slurm.partition=gpu"]])
def test_a_job_file_is_printed_and_nothing_is_written(partition, tmp_path, capsys):
    assert train.main(["--config=demo", "--out=runs/a", *WORDS, *partition]) == 0
    text, summary = shown(capsys)
    command = f"{Path(train.__file__)} --config={tmp_path}/runs/a/slurm/submitted.yaml"
    assert text.startswith(f"# runs/a: this job runs {command}\n#!/bin/bash\n")
    for option in ("nodes=2", "mem=64GB", "job-name=a", "requeue"):
        assert f"#SBATCH --{option}" in text.splitlines()
    assert ("#SBATCH --partition=gpu" in text) == bool(partition)
    assert f"submitit.core._submit {tmp_path}/runs/a/slurm" in text and "\nsrun " in text
    assert summary == {"status": "dry_run", "jobs": [{"out": "runs/a", "command": command}]}
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_file_that_would_be_submitted(monkeypatch, capsys):
    import submitit

    made = []

    def submit(executor, command):
        made.append(executor._make_submission_file_text(command, "dry_run"))
        return submitit.SlurmJob(executor.folder, "7")

    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 1))
    monkeypatch.setattr(submitit.SlurmExecutor, "_submit_command", submit)
    monkeypatch.setattr("submitit.core.utils.JobPaths.move_temporary_file", lambda *_: None)
    words = ["--config=demo", "--out=runs/a", *WORDS]
    assert train.main(words) == 0
    text, _ = shown(capsys)
    slurm._submit(slurm.job_of(train.read_config(words), train.__file__))
    assert [text.partition("\n")[2].strip()] == [file.strip() for file in made]


def test_a_fine_tuning_and_a_list_of_runs_are_shown(tmp_path, capsys):
    words = ["finetune", "--checkpoint=runs/a", "--out=runs/b", *WORDS[1:]]
    assert evaluate.main(words) == 0
    text, summary = shown(capsys)
    assert summary["jobs"][0]["command"].split()[1] == "finetune" and "job-name=b" in text
    (tmp_path / "list.yaml").write_text("- demo\n- {config: demo, name: other}\n")
    assert train.main(["--slurm.batch=list.yaml", *WORDS]) == 0
    text, summary = shown(capsys)
    assert [job["out"] for job in summary["jobs"]] == ["runs/demo", "runs/other"]
    assert text.count("#!/bin/bash") == 2 and "dependency" not in text


@pytest.mark.whole
def test_the_jobs_of_a_chain_wait_for_one_another(tmp_path, capsys):
    (tmp_path / "chain.yaml").write_text(
        "out: runs/c\nstages:\n  first: {command: train, config: demo}\n"
        "  second: {command: finetune, overrides: {checkpoint: '{first}'}}\n"
    )
    assert chain.main(["chain.yaml", "--slurm.dry_run", "--first.data.train=a.beton"]) == 0
    text, summary = shown(capsys)
    assert [job["out"] for job in summary["jobs"]] == ["runs/c/first", "runs/c/second"]
    assert text.count("--dependency='afterok:<the job of runs/c/first>'") == 1


def test_a_reader_that_has_read_enough_is_no_traceback(monkeypatch, capsys):
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert train.main(["--config=demo", "--out=runs/a", *WORDS]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in lines), lines


def test_a_mistake_is_one_line_all_the_same(capsys):
    assert train.main(["--config=demo", "--out=runs/a%j", *WORDS]) == 2
    assert capsys.readouterr().err.startswith("out: got ")
    assert train.main(["--config=demo", "--slurm.dry_run", "--epochs=0"]) == 2
