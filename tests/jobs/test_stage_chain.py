"""Chains of commands: what runs, what is skipped, how they stop and what they refuse; here with
stand-ins for train.py and evaluate.py, and at the end on a real Slurm."""

import json
import os
import pickle
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
from ffcv_ssl.files import hold_folder
from ffcv_ssl.jobs import chain, chain_file, slurm, stage_marks
from ffcv_ssl.jobs.stage_marks import StageCommand
from ffcv_ssl.training.command import StopSignal

pytestmark = pytest.mark.whole

# Notes that it ran, with which arguments; fails, waits or counts ranks where it is told to.
COMMAND = """
import json, os, pathlib, signal, sys, time, yaml
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
if "print_config" not in given:
    given = yaml.safe_load(pathlib.Path(given["config"]).read_text())
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
    command = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:-1]]
    file.write(json.dumps([command, given]) + "\\n")
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
CHAINS = sorted(REPOSITORY.glob("configs/*/chain_*.yaml"))
STAGES = ["pretrain", "finetune", "npi"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A chain of three stages over stand-ins for the commands."""
    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).write_text(COMMAND)
    monkeypatch.setattr(chain_file, "SCRIPTS", tmp_path)
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(folder=tmp_path))
    return path


def evaluation_of(stage):
    """The configuration of a stage's protocol."""
    return evaluate.read_config([*stage.command[1:], *stage.words])


def calls(file, stage):
    """[(command without the script's folder, its settings)] of what ran in a stage's folder."""
    path = file.parent / "out" / stage / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(file, *words):
    """Exit code of a chain."""
    return chain.main([str(file), *words])


def test_stages_run_in_order_each_with_its_settings_and_its_folder(file, capfd):
    assert run(file) == 0
    out = file.parent / "out"
    (pretrain,), (finetune,), (npi,) = (calls(file, stage) for stage in STAGES)
    settings = {"config": "a.yaml", "data.train": "a.beton", "epochs": "3"}
    assert pretrain == [["train.py"], {**settings, "out": f"{out}/pretrain"}]
    settings = {"checkpoint": f"{out}/pretrain", "holdout": "null", "lrs": "[0.1, 1]"}
    assert finetune == [["evaluate.py", "finetune"], {**settings, "out": f"{out}/finetune"}]
    assert npi[1]["checkpoint"] == f"{out}/finetune/finetuned.safetensors"
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
    assert calls(file, "finetune")[1][1]["lr"] == "0.5"


def test_the_command_line_wins_over_the_file_and_reaches_the_stages_it_names(file):
    words = ["--all.data.train=b.beton", "--pretrain.epochs", "1", "--npi.t=--x"]
    assert run(file, *words, "--out", str(file.parent / "out")) == 0
    (_, pretrain), (_, finetune), (_, npi) = (calls(file, stage)[0] for stage in STAGES)
    assert [stage["data.train"] for stage in (pretrain, finetune, npi)] == ["b.beton"] * 3
    assert pretrain["epochs"] == "1"
    assert npi["t"] == "--x" and "t" not in finetune


def test_an_exit_code_ends_the_chain_and_is_its_own_and_it_goes_on_from_there(file, capfd):
    assert run(file, "--finetune.code=7") == 7
    assert calls(file, "npi") == []
    printed = capfd.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["status"] == "failed"
    assert printed.err.splitlines()[-1] == "finetune: exit code 7"
    assert run(file, "--finetune.code=75") == 75
    line = "finetune: exit code 75; run the same command again to continue from here"
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
        "from pathlib import Path; from ffcv_ssl.jobs import chain, chain_file",
        f"chain_file.SCRIPTS = Path({str(file.parent)!r}); sys.exit(chain.main(sys.argv[1:]))",
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


def test_a_second_chain_in_the_folder_is_refused_in_one_line_and_disturbs_nothing(file, capfd):
    with hold_folder(file.parent / "out"):  # as a chain that runs
        assert run(file, "--pretrain.epochs=4") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "another process" in line]
    assert line == f"{file.parent}/out: another process trains here; use another --out"
    assert calls(file, "pretrain") == [] and not (file.parent / "out/pretrain.yaml").exists()
    assert run(file) == 0


@pytest.mark.parametrize("code", [0, 1, 134])
def test_a_stage_that_stopped_when_asked_is_interrupted_whatever_torchrun_makes_of_it(
    code, monkeypatch
):
    monkeypatch.setattr(chain, "_pass_on", lambda stop, process: None)  # it stops by itself
    lines = f'import sys; print(\'{{"status": "interrupted"}}\'); sys.exit({code})'
    stop = StopSignal()
    assert chain._run([sys.executable, "-c", lines], stop)[0] == code
    stop.received.append(signal.SIGTERM)
    found, summary = chain._run([sys.executable, "-c", lines], stop)
    assert (found, summary) == (75, {"status": "interrupted"})


def test_a_stage_may_have_several_ranks(file):
    (stage, *_) = chain.read_chain([str(file)])
    with StopSignal() as stop:
        code, _ = chain.run_stages([chain.resolved(stage)._replace(processes=2)], stop)
    assert code == 0 and len(calls(file, "pretrain")) == 2


def test_a_chain_may_build_on_another(file):
    other = file.with_name("other.yaml")
    other.write_text("base: chain.yaml\nstages: {finetune: {overrides: {lr: 0.5}}}\n")
    assert [stage.name for stage in chain.read_chain([str(other)])] == STAGES
    assert {"--lr=0.5", "--holdout=null"} <= set(chain.read_chain([str(other)])[1].words)


@pytest.mark.parametrize(
    "text, words, message",
    [
        ("stages: {}", [], "stages: got none, expected a mapping of at"),
        ("stages: {a: {command: train}}\nx: 1", [], "chain.yaml: unknown key 'x'"),
        ("stages: {all: {command: train}}", [], "'all' is a reserved word; rename the stage"),
        ("stages: {a: train}", [], "stages.a: got 'train', expected a mapping of settings"),
        ("stages: {a: {config: a.yaml}}", [], "stages.a.command: got none, expected train"),
        ("stages: {a: {command: train, slurm: {x: 1}}}", [], "a.slurm: unknown key 'x'"),
        ("stages: {a: {command: train}}", ["--out="], "--out: got nothing, expected a value"),
        ("stages: {a: {command: train, x: 1}}", [], "stages.a: unknown key 'x'"),
        ("stages: {a: {command: train, processes: 0}}", [], "stages.a.processes: got 0"),
        ("stages: {a: {command: snn, overrides: {b: '{c}'}}}", [], "got {c}, expected one of a"),
        ("stages: {a: {command: train}}", ["--b.c=1"], "--b: no such stage, expected out, all"),
        ("stages: {a: {command: train}}", ["--epochs", "1"], "got '--epochs', expected --out"),
        ("stages: {a: {command: train}}", ["--a.b"], "--a.b: got nothing"),
        ("stages: {a: {command: train}}", ["--slurm.x=1"], "slurm: unknown key 'x'"),
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
        if Path(stage.command[0]) == REPOSITORY / "train.py":
            pretraining = train.read_config(stage.words)
            assert pretraining.out == str(stage.folder)
        else:
            checkpoint = Path(evaluation_of(stage).checkpoint)
            assert checkpoint.is_relative_to(stages[0].folder.parent)
    labels = [vars(evaluation_of(stage).labels) for stage in stages[1:]]
    if pretraining.labelled.loss != "none":
        labels.append(vars(pretraining.labelled.labels))
    assert all(other == labels[0] for other in labels)


# ---- Slurm ---------------------------------------------------------------------------------------


def submit_chain(stages):
    """Submit a chain; {stage: job}."""
    unfinished = chain.unfinished_of([chain.resolved(stage) for stage in stages])
    jobs = slurm.submit_jobs([chain.make_jobs(unfinished)])
    return {stage.name: job for stage, job in zip(unfinished, jobs)}


@pytest.fixture
def submitted(monkeypatch):
    """The jobs that were submitted to a Slurm that is not there."""
    jobs = []

    def submit(job):
        jobs.append(job)
        return {"out": job.out, "job_id": str(40 + len(jobs)), "stdout": "", "stderr": ""}

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    return jobs


def test_a_configuration_that_names_a_partition_makes_jobs_and_the_chain_wins(
    file, submitted, capsys
):
    assert run(file, "--all.job=q", "--pretrain.slurm.partition=r") == 0
    assert [job.slurm.partition for job in submitted] == ["r", "q", "q"]
    assert {job.slurm.mem for job in submitted} == {"3G"}
    assert calls(file, "pretrain") == []
    assert run(file, "--finetune.job=q") == 2
    assert "slurm.partition: got none, expected one, as for fin" in capsys.readouterr().err


def test_jobs_wait_for_one_another_and_finished_stages_are_not_submitted(file, submitted):
    words = ["--slurm.partition=p", "--slurm.nodes=4", "--npi.slurm.gpus_per_node=2"]
    words += ["--finetune.slurm.dependency=after:9"]
    assert run(file, *words) == 0
    assert [Path(job.out).name for job in submitted] == STAGES
    waits = [job.slurm.dependency for job in submitted]
    assert waits == [None, "after:9,afterok:41", "afterok:42"]
    assert [job.slurm.nodes for job in submitted] == [4, 4, 1]
    assert [job.slurm.gpus_per_node for job in submitted] == [0, 0, 2]
    out = file.parent / "out"
    assert submitted[2].settings["checkpoint"] == f"{out}/finetune/finetuned.safetensors"
    assert submitted[2].command.words == ("snn", f"--config={out}/npi/slurm/submitted.yaml")
    assert not any("slurm" in job.settings for job in submitted)
    stage = chain.resolved(chain.read_chain([str(file)])[0])
    stage_marks.mark_finished(stage.folder, stage.settings, {}, None)
    submitted.clear()
    run(file, *words)
    assert [Path(job.out).name for job in submitted] == STAGES[1:]


def test_a_batch_of_chains_submits_the_jobs_of_each(file, submitted, capsys):
    runs = [{"config": str(file), "name": "a"}, {"config": str(file), "overrides": {"npi.t": 1}}]
    path = file.with_name("list.yaml")
    path.write_text(json.dumps(runs))
    assert chain.main([f"--slurm.batch={path}", "--slurm.partition=p", "--all.seed=1"]) == 0
    folders = [f"runs/{run}/{stage}" for run in ("a", "chain") for stage in STAGES]
    assert [job.out for job in submitted] == folders
    waits = [None, "afterok:41", "afterok:42", None, "afterok:44", "afterok:45"]
    assert [job.slurm.dependency for job in submitted] == waits
    assert [job.settings.get("t") for job in submitted] == [None] * 5 + ["1"]
    assert all(job.settings["seed"] == "1" and job.slurm.batch is None for job in submitted)
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["jobs"]) == 6


def test_only_the_first_rank_of_a_job_notes_that_it_finished_and_only_if_it_did(
    tmp_path, monkeypatch
):
    script, mark = tmp_path / "script.py", tmp_path / stage_marks.MARK
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    other = tmp_path / "later" / stage_marks.MARK
    other.parent.mkdir()
    other.touch()
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def run_task(code, rank):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        later = (str(other.parent),)
        settings = {"settings": "a: settings", "later": later}
        before = signal.getsignal(signal.SIGTERM)
        try:
            StageCommand(str(script), (str(code),), str(tmp_path), 0, **settings)()
        finally:
            signal.signal(signal.SIGTERM, before)

    for code, rank in ((3, 0), (3, 1)):
        with pytest.raises(SystemExit):
            run_task(code, rank)
    run_task(0, rank=1)
    assert other.exists() and not mark.exists()
    run_task(0, rank=0)
    assert stage_marks.is_finished(tmp_path, "a: settings") and not other.exists()
    assert type(pickle.loads(pickle.dumps(StageCommand("s", (), "f", 0, "", ())))) is StageCommand


def test_without_slurm_a_chain_of_jobs_is_refused_in_one_line(file, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(file, "--slurm.partition=p") == 2
    assert "found no sbatch command" in capsys.readouterr().err


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
        with pytest.raises(
            UserError, match=r"pretrain: job \d+ of this folder is waiting or running"
        ):
            submit_chain(stages)
        ends = {name: cluster.wait_for_end(job["job_id"], 120) for name, job in jobs.items()}
        assert [end["JobState"] for end in ends.values()] == ["COMPLETED"] * 3
        starts = [end["StartTime"] for end in ends.values()]
        assert starts == sorted(starts) and all(calls(file, stage) for stage in STAGES)
        assert chain.unfinished_of([chain.resolved(stage) for stage in stages]) == []
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
    def submit(job):
        if Path(job.out).name == "finetune":
            raise UserError("slurm: sbatch: no")
        return {"out": job.out, "job_id": "41", "stdout": "", "stderr": ""}

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    with pytest.raises(
        UserError, match="finetune: slurm: sbatch: no; jobs submitted before it: 41"
    ):
        submit_chain(chain.read_chain([str(file), "--slurm.partition=p"]))
