"""Chains of commands: what runs, what is skipped, how they stop and what they refuse; here with
stand-ins for train.py and evaluate.py, and at the end on a real Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import slurm_cluster
from support.small_files import REPOSITORY

import evaluate
import train
from ffcv_ssl.errors import UserError
from ffcv_ssl.jobs import chain, slurm, stage_marks
from ffcv_ssl.training.command import StopSignal

pytestmark = pytest.mark.whole

# Notes that it ran, with which arguments; fails, waits or counts ranks where it is told to.
COMMAND = """
import json, os, pathlib, signal, sys, time
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
if "bad" in given:
    sys.exit("bad: got x\\nbad: unknown key")
if "print_config" in given:
    settings = {key: value for key, value in given.items() if key != "print_config"}
    if "job" in given:
        settings["slurm"] = {"partition": given["job"], "nodes": 1, "mem": "3G"}
    print(settings)
    sys.exit(0)
folder = pathlib.Path(given["out"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as file:
    file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if "wait" in given:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waits").touch()
    time.sleep(60)
print("working")
print(json.dumps({"rank": os.environ.get("RANK"), "stage": folder.name}))
sys.exit(int(given.get("code", 0)))
"""
CHAIN = """
out: {folder}/out
stages:
  pretrain: {{command: train, config: a.yaml, overrides: {{data.train: a.beton, epochs: 3}}}}
  finetune:
    command: finetune
    overrides: {{checkpoint: "{{pretrain}}", holdout: null, lrs: [0.1, 1]}}
  npi:
    command: snn
    overrides: {{checkpoint: "{{finetune}}/finetuned.safetensors"}}
    slurm: {{nodes: 1, gpus_per_node: 1}}
"""
CHAINS = sorted(REPOSITORY.glob("configs/*/chain*.yaml"))
STAGES = ["pretrain", "finetune", "npi"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A chain of three stages over stand-ins for the commands."""
    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).write_text(COMMAND)
    monkeypatch.setattr(chain, "SCRIPTS", tmp_path)
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(folder=tmp_path))
    return path


def labels_of(stage):
    """The labels that a stage may use."""
    _, (config,) = evaluate.read_configs(stage.argv)
    return config.labels


def calls(file, stage):
    """The command lines that ran in a stage's folder, without the script's folder."""
    path = file.parent / "out" / stage / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(file, *words):
    """Exit code of a chain."""
    return chain.main([str(file), *words])


def test_stages_run_in_order_each_with_its_settings_and_its_folder(file, capfd):
    assert run(file) == 0
    out = file.parent / "out"
    (pretrain,), (finetune,), (npi,) = (calls(file, stage) for stage in STAGES)
    assert pretrain == [
        "train.py", "--config=a.yaml", "--data.train=a.beton", "--epochs=3", f"--out={out}/pretrain"
    ]  # fmt: skip
    assert finetune == [
        "evaluate.py", "finetune", f"--checkpoint={out}/pretrain", "--holdout=null",
        "--lrs=[0.1, 1]", f"--out={out}/finetune",
    ]  # fmt: skip
    assert npi[2] == f"--checkpoint={out}/finetune/finetuned.safetensors"
    lines = capfd.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["status"] == "finished" and list(summary["stages"]) == STAGES
    assert [stage["stage"] for stage in summary["stages"].values()] == STAGES
    assert lines.count("working") == 3


def test_finished_stages_are_skipped_and_still_told(file, capfd):
    run(file)
    first = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert run(file) == 0
    assert [len(calls(file, stage)) for stage in STAGES] == [1, 1, 1]
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == first


def test_another_setting_runs_its_stage_again_where_that_takes_it_and_those_after_it(file):
    run(file)
    assert run(file, "--finetune.lr", "0.5") == 0
    assert [len(calls(file, stage)) for stage in STAGES] == [1, 2, 2]
    assert "--lr=0.5" in calls(file, "finetune")[1]


def test_the_command_line_wins_over_the_file_and_reaches_the_stages_it_names(file):
    words = ["--all.data.train=b.beton", "--pretrain.epochs", "1", "--npi.t=--x"]
    assert run(file, *words, "--out", str(file.parent / "out")) == 0
    (pretrain,), (finetune,), (npi,) = (calls(file, stage) for stage in STAGES)
    assert "--data.train=b.beton" in pretrain and "--epochs=1" in pretrain
    assert "--data.train=a.beton" not in pretrain
    assert "--data.train=b.beton" in finetune and "--data.train=b.beton" in npi
    assert "--t=--x" in npi and "--t=--x" not in finetune


def test_an_exit_code_ends_the_chain_and_is_its_own_and_it_goes_on_from_there(file, capfd):
    assert run(file, "--finetune.code=7") == 7
    assert calls(file, "npi") == []
    printed = capfd.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["status"] == "failed"
    assert printed.err.splitlines()[-1] == "finetune: exit code 7"
    assert run(file, "--finetune.code=75") == 75
    line = "finetune: exit code 75; the same command goes on from here"
    assert capfd.readouterr().err.splitlines()[-1] == line
    assert run(file) == 0
    assert [len(calls(file, stage)) for stage in STAGES] == [1, 3, 1]


def test_a_chain_that_was_killed_after_a_stage_ran_again_runs_those_after_it_again(file):
    run(file)
    assert run(file, "--finetune.lr=0.5", "--npi.code=7") == 7
    assert run(file, "--finetune.lr=0.5") == 0
    assert [len(calls(file, stage)) for stage in STAGES] == [1, 2, 3]


def test_a_mistake_in_a_late_stage_is_found_before_the_first_one_starts(file, capfd):
    assert run(file, "--npi.bad=1") == 2
    printed = capfd.readouterr().err.splitlines()
    assert printed == ["stages.npi: bad: unknown key"]
    assert calls(file, "pretrain") == []


def test_a_signal_stops_the_running_stage_and_the_chain_with_it(file):
    lines = [
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})",
        "from pathlib import Path; from ffcv_ssl import chain",
        f"chain.SCRIPTS = Path({str(file.parent)!r}); sys.exit(chain.main(sys.argv[1:]))",
    ]
    words = [sys.executable, "-c", "\n".join(lines)]
    process = subprocess.Popen([*words, str(file), "--finetune.wait=1"], stdout=subprocess.PIPE)
    waits = file.parent / "out/finetune/waits"
    end = time.monotonic() + 300
    while not waits.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads(printed.splitlines()[-1])["status"] == "interrupted"
    assert calls(file, "npi") == []


def test_a_stage_may_have_several_ranks(file):
    (stage, *_) = chain.read_chain([str(file)])
    with StopSignal() as stop:
        code, _ = chain._run(stage._replace(processes=2, argv=[f"--out={stage.folder}"]), stop)
    assert code == 0 and len(calls(file, "pretrain")) == 2


def test_a_chain_may_build_on_another(file):
    other = file.with_name("other.yaml")
    other.write_text("base: chain.yaml\nstages: {finetune: {overrides: {lr: 0.5}}}\n")
    assert [stage.name for stage in chain.read_chain([str(other)])] == STAGES
    assert "--lr=0.5" in chain.read_chain([str(other)])[1].argv
    assert "--holdout=null" in chain.read_chain([str(other)])[1].argv


@pytest.mark.parametrize(
    "text, words, message",
    [
        ("stages: {}", [], "stages: expected a mapping of at least one stage"),
        ("stages: {a: {command: train}}\nx: 1", [], "unknown key 'x', expected out, stages"),
        ("stages: {all: {command: train}}", [], "'all' is no name for a stage"),
        ("stages: {a: train}", [], "stages.a: got 'train', expected a mapping with a command"),
        ("stages: {a: {command: train, x: 1}}", [], "stages.a: unknown key 'x'"),
        ("stages: {a: {command: train, processes: 0}}", [], "stages.a.processes: got 0"),
        ("stages: {a: {command: snn, overrides: {b: '{c}'}}}", [], "got {c}, expected one of a"),
        ("stages: {a: {command: train}}", ["--b.c=1"], "--b: no such stage, expected out, all"),
        ("stages: {a: {command: train}}", ["--epochs", "1"], "got '--epochs', expected --out"),
        ("stages: {a: {command: train}}", ["--a.b"], "--a.b: got nothing"),
        ("stages: {a: {command: train}}", ["--slurm.x=1"], "slurm.x: unknown key"),
        ("stages: [", [], "line 1"),
    ],
)
def test_a_mistake_in_a_chain_is_one_line_that_names_it(tmp_path, capsys, text, words, message):
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    assert chain.main([str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("argv", [["--help"], ["chain.yaml", "-h"]], ids=str)
def test_help_shows_how_a_chain_is_written_and_started(argv, capsys):
    assert chain.main(argv) == 0
    printed = capsys.readouterr().out
    assert "python -m ffcv_ssl.jobs.chain CHAIN.yaml" in printed and "stages:" in printed


def test_no_chain_is_one_line(capsys):
    assert chain.main([]) == 2 and chain.main(["/nope.yaml"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "expected a YAML file" in first and "no such configuration file" in second


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_stage_of_the_chains_that_we_ship_is_one_that_its_command_takes(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    stages = chain.read_chain([str(path)])
    for stage in stages:
        if stage.script.name == "train.py":
            pretraining = train.read_config(stage.argv)
            assert pretraining.out == str(stage.folder)
        else:
            _, (config,) = evaluate.read_configs(stage.argv)
            assert Path(config.checkpoint).is_relative_to(stages[0].folder.parent)
    labels = [vars(labels_of(stage)) for stage in stages[1:]]
    if pretraining.labelled.loss != "none":
        labels.append(vars(pretraining.labelled.labels))
    assert all(other == labels[0] for other in labels)


# ---- Slurm ---------------------------------------------------------------------------------------


def submit_chain(stages):
    """Submit a chain; {stage: job}."""
    unfinished, settings = chain.plan(stages)
    jobs = {stage.name: chain.job_of(stage, settings[stage.name]) for stage in unfinished}
    return chain.submit_stages(unfinished, settings, jobs)


def test_a_configuration_that_names_a_partition_makes_jobs_and_the_chain_wins(
    file, monkeypatch, capsys
):
    given = {}
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    monkeypatch.setattr(
        slurm, "submit_task",
        lambda config, job, script, folder: given.setdefault(
            Path(folder).name, {"job_id": config.partition, "stdout": config.mem}),
    )  # fmt: skip
    assert run(file, "--all.job=q", "--pretrain.slurm.partition=r") == 0
    assert [job["job_id"] for job in given.values()] == ["r", "q", "q"]
    assert {job["stdout"] for job in given.values()} == {"3G"}
    assert calls(file, "pretrain") == []
    assert run(file, "--finetune.job=q") == 2
    assert "slurm.partition: got none, expected one, as for fin" in capsys.readouterr().err


def test_jobs_wait_for_one_another_and_finished_stages_are_not_submitted(file, monkeypatch):
    given = []

    def submit(config, job, script, folder):
        given.append((Path(folder).name, config, job.task.argv))
        return {"job_id": str(40 + len(given)), "stdout": "", "stderr": ""}

    monkeypatch.setattr(slurm, "submit_task", submit)
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    words = ["--slurm.partition=p", "--slurm.nodes=4", "--npi.slurm.gpus_per_node=2"]
    words += ["--finetune.slurm.dependency=after:9"]
    assert run(file, *words) == 0
    assert [name for name, _, _ in given] == STAGES
    waits = [config.dependency for _, config, _ in given]
    assert waits == [None, "after:9,afterok:41", "afterok:42"]
    assert [config.nodes for _, config, _ in given] == [4, 4, 1]
    assert [config.gpus_per_node for _, config, _ in given] == [0, 0, 2]
    assert not any("slurm" in word for _, _, argv in given for word in argv)
    (stage, *_) = chain.read_chain([str(file)])
    stage_marks.mark_finished(stage.folder, chain.settings_of(stage), {}, None)
    given.clear()
    run(file, *words)
    assert [name for name, _, _ in given] == STAGES[1:]


def test_only_the_first_rank_of_a_job_notes_that_it_finished_and_only_if_it_did(
    tmp_path, monkeypatch
):
    class Ends:
        folder = str(tmp_path)

        def __init__(self, code):
            self.code = code

        def __call__(self):
            if self.code:
                raise SystemExit(self.code)

    mark = tmp_path / stage_marks.MARK
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit):
        chain.StageJob(Ends(75), "a: settings")()
    assert not mark.exists()
    monkeypatch.setenv("SLURM_PROCID", "1")
    chain.StageJob(Ends(0), "a: settings")()
    assert not mark.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    chain.StageJob(Ends(0), "a: settings")()
    assert stage_marks.is_finished(tmp_path, "a: settings")


def test_without_slurm_a_chain_of_jobs_is_refused_in_one_line(file, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(file, "--slurm.partition=p") == 2
    assert "there is no sbatch here" in capsys.readouterr().err


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
def test_a_chain_on_slurm_runs_in_order_and_a_failed_stage_cancels_the_rest(file, monkeypatch):
    package = file.parent / "ffcv_ssl"
    package.symlink_to(REPOSITORY / "ffcv_ssl")  # jobs import what lies beside the script
    with slurm_cluster.Cluster() as cluster:
        for key in ("PATH", "SLURM_CONF"):
            monkeypatch.setitem(os.environ, key, cluster.environment[key])
        words = ["--slurm.partition=low", "--slurm.cpus_per_task=1", "--npi.slurm.gpus_per_node=0"]
        stages = chain.read_chain([str(file), *words])
        jobs = submit_chain(stages)
        with pytest.raises(UserError, match=r"pretrain: job \d+ of this folder waits or runs"):
            submit_chain(stages)
        ends = {name: cluster.wait_for_end(job["job_id"], 120) for name, job in jobs.items()}
        assert [end["JobState"] for end in ends.values()] == ["COMPLETED"] * 3
        starts = [end["StartTime"] for end in ends.values()]
        assert starts == sorted(starts) and all(calls(file, stage) for stage in STAGES)
        assert chain.plan(stages)[0] == []
        other = chain.read_chain([str(file), *words, "--finetune.code=3"])
        jobs = submit_chain(other)
        ends = {name: cluster.wait_for_end(job["job_id"], 120) for name, job in jobs.items()}
        assert [end["JobState"] for end in ends.values()] == ["FAILED", "CANCELLED"]
        assert len(calls(file, "npi")) == 1


def test_a_dependency_becomes_an_option_of_sbatch_that_never_waits_in_vain():
    config = slurm.SlurmConfig(partition="p", dependency="afterok:7")
    more = slurm.sbatch_parameters(config, "n", Path("train.py"))["additional_parameters"]
    assert more["dependency"] == "afterok:7" and more["kill_on_invalid_dep"] == "yes"
    config = slurm.SlurmConfig(partition="p")
    more = slurm.sbatch_parameters(config, "n", Path("train.py"))["additional_parameters"]
    assert "dependency" not in more


def test_a_refused_job_tells_which_were_submitted_before_it(file, monkeypatch):
    def submit(config, job, script, folder):
        if Path(folder).name == "finetune":
            raise UserError("slurm: sbatch: no")
        return {"job_id": "41", "stdout": "", "stderr": ""}

    monkeypatch.setattr(slurm, "submit_task", submit)
    with pytest.raises(UserError, match="finetune: slurm: sbatch: no; submitted before it: 41"):
        submit_chain(chain.read_chain([str(file), "--slurm.partition=p"]))
