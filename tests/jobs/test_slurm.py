"""Submission to Slurm: what is asked for, and runs that are stopped, pre-empted and cancelled on a
real cluster of one node."""

import json
import os
import shlex
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
from ffcv_ssl.config.yaml_layers import yaml_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import hold_folder
from ffcv_ssl.jobs import slurm, slurm_task
from ffcv_ssl.jobs.batch import read_batch
from ffcv_ssl.jobs.slurm import SlurmConfig
from ffcv_ssl.training import command
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics
from ffcv_ssl.training.run_data import tell_once

# ---- Without Slurm -------------------------------------------------------------------------------


def test_every_setting_becomes_an_option_of_sbatch(tmp_path):
    from submitit.slurm.slurm import _make_sbatch_string

    config = SlurmConfig(
        partition="gpu", nodes=2, gpus_per_node=8, cpus_per_task=12, mem="64GB", time="1-12",
        signal_delay_s=300, constraint="a100|h100", account="lab", qos="long", nodelist="n[1-4]",
        exclude="n3", reservation="week", comment="a b", setup=["module load cuda"],
    )  # fmt: skip
    parameters = slurm.sbatch_parameters(config, "name", Path("/code dir/train.py"))
    script = _make_sbatch_string("python", tmp_path, **parameters)
    expected = {
        "partition=gpu", "nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=12",
        "mem=64GB", "time=1-12", "signal=USR2@300", "constraint='a100|h100'", "account=lab",
        "qos=long", "nodelist='n[1-4]'", "exclude=n3", "reservation=week", "comment='a b'",
        "job-name=name", "requeue", "open-mode=append",
    }  # fmt: skip
    options = {line[10:] for line in script.splitlines() if line.startswith("#SBATCH --")}
    assert expected <= options
    assert {option.partition("=")[0] for option in options - expected} == {
        "output", "error", "wckey"
    }  # fmt: skip
    lines = script.splitlines()
    (srun,) = [i for i, line in enumerate(lines) if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in lines[srun]
    assert lines.index("module load cuda") < srun


def test_what_is_not_set_is_left_to_the_cluster(tmp_path):
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = slurm.sbatch_parameters(SlurmConfig(), "name", Path("train.py"))
    script = _make_sbatch_string("python", tmp_path, **parameters)
    for key in ("time", "mem", "gpus-per-node", "cpus-per-task", "partition", "account"):
        assert f"--{key}" not in script
    assert "--ntasks-per-node=1" in script


@pytest.mark.parametrize("time", ["90", "90:30", "72:00:00", "3-0", "3-12:30", "3-12:30:00"])
def test_time_limits_are_those_of_sbatch(time):
    assert SlurmConfig(time=time).time == time


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-1", "1-", "3 days", "1\n"])
def test_other_time_limits_are_refused(time):
    with pytest.raises(UserError, match=r"slurm\.time: got .*, expected minutes"):
        SlurmConfig(time=time)


def test_more_tasks_than_gpus_are_refused():
    with pytest.raises(UserError, match="expected one task per GPU"):
        SlurmConfig(gpus_per_node=8, tasks_per_node=4)


RUNS = [
    "configs/demo.yaml", "configs/suncet/suncet_10percent.yaml", "configs/imagenette/cpu_byol.yaml"
]  # fmt: skip


@pytest.mark.parametrize("path", RUNS)
def test_what_a_trainers_job_reads_is_what_the_command_line_resolved_to(path, tmp_path):
    words = [f"--config={REPOSITORY / path}", f"--out={tmp_path}/1e3", "--optim.lr=3e-7"]
    words += ["--views.view_0.blur_prob=0.3", "--data.mean=[1,2,3]"]
    job = slurm.job_of(train.read_config([*words, "--slurm.partition=p"]), "train.py")
    assert (job.command.script, job.out) == (str(Path("train.py").resolve()), f"{tmp_path}/1e3")
    assert read_submitted(job, train.read_config) == train.read_config(words)


def test_what_a_fine_tunings_job_reads_is_what_the_command_line_resolved_to(tmp_path):
    words = [f"--config={REPOSITORY}/configs/finetune/cpu_imagenette_10percent.yaml"]
    words += [f"--out={tmp_path}/run", "--checkpoint", "a.pt", "--data.std", "[1,2,3]"]
    config = evaluate.read_config(["finetune", *words, "--slurm.partition=p"])
    job = slurm.job_of(config, "evaluate.py", "finetune")
    expected = evaluate.read_config(["finetune", *words])
    assert read_submitted(job, evaluate.read_config) == expected
    assert not slurm.wants_submission(expected)


def read_submitted(job, read_config):
    """The configuration that a job's command reads from the file that is written for it."""
    path = Path(job.command.folder) / "slurm/submitted.yaml"
    assert job.command.words[-1] == f"--config={path}"
    path.parent.mkdir(parents=True)
    path.write_text(yaml_text(job.settings))
    return read_config(list(job.command.words))


def test_several_checkpoints_are_no_job(capsys):
    words = ["finetune", "--checkpoint", "a", "b", "--out=c", "--slurm.partition=p"]
    assert evaluate.main(words) == 2
    assert "checkpoint: got 2, expected one per job; list the runs" in capsys.readouterr().err


STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "a[003-004]",
}  # fmt: skip


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("a[003-004]", "a003"),
        ("b-1,c2", "b-1"),
        ("x[2,5-7].org,y", "x2.org"),
        ("r[1-2]n[3,4]", "r1n3"),
    ],
)
def test_ranks_meet_at_the_first_node(nodes, first):
    got = slurm.task_environment({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert (got["RANK"], got["WORLD_SIZE"], got["LOCAL_RANK"]) == ("9", "16", "1")
    assert got["MASTER_ADDR"] == first


def test_ports_differ_between_jobs_steps_and_restarts_and_agree_within_one():
    ports = [
        slurm.task_environment({**STEP, **change})["MASTER_PORT"]
        for change in (
            {}, {"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}
        )
    ]  # fmt: skip
    assert len(set(ports)) == 4 and all(20000 <= int(port) < 32000 for port in ports)
    assert slurm.task_environment({**STEP, "SLURM_PROCID": "3"})["MASTER_PORT"] == ports[0]


def test_a_batch_script_and_torchrun_in_a_job_are_no_tasks_of_slurm():
    batch = {key: value for key, value in STEP.items() if "STEP" not in key}
    assert slurm.task_environment(batch) is None
    assert slurm.task_environment({**STEP, "RANK": "0", "WORLD_SIZE": "2"}) is None


def jobs_of(argv):
    """What a command's reading of a line of a list does, on two keys."""
    given = dict(word[2:].split("=", 1) for word in argv)
    if given.get("lr") == "bad":
        raise UserError("lr: got 'bad'")
    return [slurm.make_job("train.py", [], {"out": given["out"]}, SlurmConfig())]


def batch(tmp_path, text):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    return f"--slurm.batch={path}"


def test_a_batch_names_folders_after_configs_and_the_command_line_wins(tmp_path):
    text = "- a.yaml\n- {config: b.yaml, name: c, overrides: {lr: 0.1, flag: true, w: [1, 2]}}\n"
    word = batch(tmp_path, text)
    for argv in ([word, "--lr=3"], ["--slurm.batch", word.partition("=")[2], "--lr=3"]):
        assert slurm.is_batch(argv)
        assert read_batch(word.partition("=")[2], argv) == [
            ["--config=a.yaml", "--out=runs/a", *argv],
            ["--config=b.yaml", "--out=runs/c", "--lr=0.1", "--flag=true", "--w=[1, 2]", *argv],
        ]
    assert not slurm.is_batch(["--slurm.partition=p"])


def test_times_and_groups_in_a_batch_are_as_in_a_configuration(tmp_path):
    text = "- {config: a.yaml, overrides: {slurm.time: 72:00:00, optim: {lr: 1e-3, name: sgd}}}\n"
    (line,) = read_batch(batch(tmp_path, text).partition("=")[2])
    assert line[2:] == ["--slurm.time=72:00:00", "--optim.lr=0.001", "--optim.name=sgd"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a.yaml\n- x/a.yaml\n", "two runs have the folder runs/a; give one another name"),
        ("- a.yaml\n- {config: b.yaml, overrides: {lr: bad}}\n", "--config=b.yaml: lr: got 'bad'"),
        ("- a.yaml\n- {config: b.yaml, nam: c}\n", "entry 2: unknown key 'nam'"),
        ("- {overrides: {}}\n", "entry 1: got {'overrides': {}}, expected a file or {config"),
        ("- {config: a.yaml, overrides: [1]}\n", "entry 1: overrides: got [1], expected a mapping"),
        ("- {config: a.yaml, name: 3}\n", "entry 1: name: got 3, expected text or null"),
        ("a.yaml\n", "got no list"),
        ("[]\n", "got no list"),
        ("[a: b: c\n", "line 1: "),
        ("- {config: a.yaml, config: b.yaml}\n", "line 1: key 'config' is given twice"),
    ],
)
def test_nothing_of_a_batch_is_submitted_unless_all_of_it_is_sound(
    tmp_path, monkeypatch, text, message
):
    monkeypatch.setattr(slurm, "_submit", lambda *_: pytest.fail("submitted"))
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    with pytest.raises(UserError) as error:
        slurm.submit_batch([batch(tmp_path, text)], jobs_of)
    assert message in str(error.value) and "\n" not in str(error.value)


def submitted_by(monkeypatch, main, words):
    """The jobs that a command submits to a Slurm that is not there."""
    jobs = []

    def submit(job):
        jobs.append(job)
        return {"out": job.out, "job_id": str(40 + len(jobs)), "stdout": "o", "stderr": "e"}

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(slurm, "check_sbatch", lambda: None)
    assert main(words) == 0
    return jobs


def test_a_batch_of_fine_tunings_submits_one_job_for_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    path = "configs/finetune/cpu_imagenette_1percent.yaml"
    runs = [path, {"config": path, "name": "long", "overrides": {"epochs": 99}}]
    (tmp_path / "list.yaml").write_text(json.dumps(runs))
    words = ["finetune", "--slurm.batch", f"{tmp_path}/list.yaml", "--slurm.partition", "p"]
    jobs = submitted_by(monkeypatch, evaluate.main, [*words, "--checkpoint", "runs/a"])
    assert [job.out for job in jobs] == ["runs/cpu_imagenette_1percent", "runs/long"]
    assert all(Path(job.command.script).name == "evaluate.py" for job in jobs)
    assert all(job.command.words[0] == "finetune" for job in jobs)
    assert [job.settings["checkpoint"] for job in jobs] == ["runs/a"] * 2
    assert jobs[1].settings["epochs"] == 99 and jobs[1].slurm.partition == "p"
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [job["job_id"] for job in summary["jobs"]] == ["41", "42"]


@pytest.mark.parametrize(("cores", "notes"), [([], 1), (["--slurm.cpus_per_task=12"], 0)])
def test_gpus_without_cores_for_their_loaders_are_noted_once(monkeypatch, capsys, cores, notes):
    monkeypatch.chdir(REPOSITORY)
    tell_once.cache_clear()
    words = ["finetune", "--checkpoint=a", "--out=runs/a", "--slurm.partition=p"]
    words += ["--slurm.gpus_per_node=8", *cores]
    (job,) = submitted_by(monkeypatch, evaluate.main, words)
    slurm.submit_jobs([[job]])
    assert capsys.readouterr().err.count("slurm.cpus_per_task is not set") == notes


def test_a_batch_of_probes_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- configs/demo.yaml\n")
    assert evaluate.main(["knn", f"--slurm.batch={tmp_path}/list.yaml"]) == 2
    line = capsys.readouterr().err
    assert "list.yaml: " in line and "unknown key" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "asked, state, preempted, restarts, requeued",
    [
        ([signal.SIGUSR2], "RUNNING", "None", 0, True),
        ([signal.SIGTERM, signal.SIGUSR2], "RUNNING", "None", 2, True),
        ([signal.SIGTERM], "RUNNING", "2026-11-20T13:01:18", 0, True),
        ([signal.SIGTERM], "RUNNING", "None", 0, False),  # scancel --signal, or kill
        ([signal.SIGUSR2], "COMPLETING", "None", 0, False),  # scancel
        ([signal.SIGUSR2], "PENDING", "None", 0, False),  # Slurm has requeued it
        ([signal.SIGUSR2], "RUNNING", "None", 3, False),  # max_requeues
    ],
)
def test_a_job_is_requeued_once_and_only_when_slurm_took_its_time_away(
    monkeypatch, asked, state, preempted, restarts, requeued
):
    calls = []

    def scontrol(*words):
        calls.append(words)
        text = f"   JobState={state} Reason=None\n   PreemptTime={preempted}\n"
        return subprocess.CompletedProcess(words, 0, text, "")

    monkeypatch.setattr(slurm_task, "_scontrol", scontrol)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    said = slurm_task.requeue("7", asked, max_requeues=3)
    assert calls.count(("requeue", "7")) == requeued
    assert said.startswith("job 7: requeued (") == requeued and "\n" not in said


def test_signals_that_came_early_or_while_saving_are_remembered():
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal() as outer:
        signal.raise_signal(signal.SIGTERM)
        with StopSignal() as inner:
            assert inner.asked
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
        assert outer.received == [signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR2]
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


@pytest.mark.whole
def test_signals_while_python_starts_wait_until_somebody_listens():
    code = "import signal as s; print('up', flush=True); input(); "
    code += "s.signal(s.SIGUSR2, lambda *_: print('heard', flush=True)); "
    code += "s.pthread_sigmask(s.SIG_UNBLOCK, [s.SIGUSR2])"
    command = f"exec {slurm_task.PYTHON} -c {shlex.quote(code)}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, shell=True, **pipes) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR2)
        assert process.communicate("\n", timeout=60)[0] == "heard\n"
    assert process.returncode == 0


def test_a_task_that_has_stopped_is_not_ended_by_srun_while_it_leaves(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("raise SystemExit(75)")
    monkeypatch.setenv("SLURM_PROCID", "1")
    for name in ("exit_process", "has_own_log"):
        monkeypatch.setattr(command, name, getattr(command, name))
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    try:
        slurm_task.RequeueingCommand(str(tmp_path / "script.py"), (), str(tmp_path), 3)()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in zip(StopSignal.SIGNALS, before):
            signal.signal(number, handler)


def test_a_second_ctrl_c_acts_as_if_nobody_listened():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's process may ignore it
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        signal.raise_signal(signal.SIGINT)


@pytest.mark.whole
def test_a_folder_is_waited_for(tmp_path):
    code = "import sys, time\nfrom ffcv_ssl.files import hold_folder\n"
    code += "with hold_folder(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(1)\n"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains here"):
            with hold_folder(tmp_path / "run"):
                pass
        with hold_folder(tmp_path / "run", wait_s=60):
            pass


# ---- On a cluster --------------------------------------------------------------------------------

SETTINGS = {
    "epochs": 2, "model.backbone": "tiny", "model.projector": "16-8", "optim.name": "sgd",
    "optim.lr": 0.1, "optim.warmup_epochs": 0.5, "resolution.min": 32, "resolution.max": 32,
    "data.batch_size": 20, "data.num_workers": 1, "log.every_steps": 1, "log.tensorboard": "false",
    "system.device": "cpu", "system.torch_threads": 1, "evaluation.every_epochs": 2,
}  # fmt: skip
# Signals come in the middle of a run because its steps wait, and not because they compute: the
# cores are for the tests that run beside.
METHOD = """
import time
import torch.nn.functional as F
from ffcv_ssl.methods import Method

class Waiting(Method):
    def before_step(self, progress, optimizer):
        time.sleep(0.6)

    def loss(self, outputs, labels):
        return -F.cosine_similarity(*self.all_gather(outputs)).mean(), {}
"""


@pytest.fixture(scope="session")
def cluster():
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def settings(raw_beton, tmp_path_factory):
    """A run of 2 epochs of 10 steps."""
    method = tmp_path_factory.mktemp("method") / "waiting.py"
    method.write_text(METHOD)
    given = {**SETTINGS, "data.train": raw_beton, "data.val": raw_beton}
    given["method"] = f"{method}:Waiting"
    return [f"--{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, settings):
    """The metrics of the same run on two ranks, without Slurm."""
    out = tmp_path_factory.mktemp("slurm") / "undisturbed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "train.py", f"--out={out}", *settings],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return records(out)


def records(out):
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(out)]


@pytest.fixture
def submit(cluster, settings, tmp_path, monkeypatch, capsys):
    """Submits a run of two ranks into tmp_path/run; returns what train.py printed last."""
    for key in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(key, cluster.environment[key])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(REPOSITORY)

    def submit(*arguments):
        job = ("--slurm.partition=low", "--slurm.tasks_per_node=2", "--slurm.time=30", *arguments)
        assert train.main([f"--out={tmp_path}/run", *settings, *job]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return submit


def wait_until(is_so, what, timeout_s=300):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def wait_for_step(out, step):
    """Wait until a run has logged this step."""
    wait_until(lambda: any(line["step"] >= step for line in read_metrics(out)), f"step {step}")


@pytest.fixture
def under_way(submit, tmp_path):
    """A submitted run that has logged step 3: what train.py printed last, and the run's folder."""
    summary, out = submit(), tmp_path / "run"
    wait_for_step(out, 3)
    return summary, out


def assert_finished(cluster, summary, out, undisturbed, restarts):
    """A job has ended well, was requeued so often, and left an undisturbed run's metrics."""
    job = cluster.wait_for_end(summary["job_id"])
    logs = Path(summary["stderr"]).read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), logs
    assert records(out) == undisturbed
    assert logs.count("holds step") == restarts and "Traceback" not in logs
    assert '"status": "finished"' in Path(summary["stdout"]).read_text()


@pytest.mark.slurm
def test_a_submitted_run_has_the_metrics_of_a_local_one(cluster, submit, tmp_path, undisturbed):
    summary, out = submit(), tmp_path / "run"
    assert set(summary) == {"status", "job_id", "out", "stdout", "stderr"}
    assert summary["status"] == "submitted" and summary["out"] == str(out)
    assert_finished(cluster, summary, out, undisturbed, restarts=0)


@pytest.mark.slurm
def test_a_run_stopped_before_it_began_and_while_it_trains_ends_as_if_undisturbed(
    cluster, submit, tmp_path, undisturbed
):
    summary, out = submit(), tmp_path / "run"
    log = Path(summary["stdout"])
    wait_until(lambda: log.exists() and "Starting with" in log.read_text(), "the job begins")
    cluster.run("scancel", "--signal=USR2", summary["job_id"])
    wait_for_step(out, 3)
    for _ in range(2):  # the second arrives while it stops or saves
        cluster.run("scancel", "--signal=USR2", summary["job_id"])
    assert_finished(cluster, summary, out, undisturbed, restarts=2)


@pytest.mark.slurm
def test_a_pre_empted_run_makes_way_and_ends_as_if_undisturbed(
    cluster, under_way, tmp_path, undisturbed
):
    summary, out = under_way
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    options = ("--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null")
    urgent = cluster.run("sbatch", *options, str(script)).strip()
    cluster.wait_for_end(urgent)
    assert_finished(cluster, summary, out, undisturbed, restarts=1)


@pytest.mark.slurm
def test_a_cancelled_run_stays_cancelled_and_keeps_its_checkpoint(cluster, under_way, undisturbed):
    summary, out = under_way
    cluster.run("scancel", "--signal=USR2", summary["job_id"])
    cluster.run("scancel", summary["job_id"])
    job = cluster.wait_for_end(summary["job_id"])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "holds step" in Path(summary["stderr"]).read_text()
    assert records(out) == undisturbed[: len(records(out))]


@pytest.mark.slurm
def test_a_job_that_was_requeued_often_enough_stops_and_says_so(cluster, submit, tmp_path):
    summary, out = submit("--slurm.max_requeues=0"), tmp_path / "run"
    wait_for_step(out, 3)
    cluster.run("scancel", "--signal=USR2", summary["job_id"])
    job = cluster.wait_for_end(summary["job_id"])
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "75:0")
    assert "slurm.max_requeues is 0; not requeued" in Path(summary["stderr"]).read_text()


@pytest.mark.slurm
def test_a_users_mistake_in_a_job_is_one_line_in_its_log(cluster, submit, tmp_path):
    summary = submit(f"--data.val={tmp_path}/none.beton")
    job = cluster.wait_for_end(summary["job_id"])
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0") and job["ExitCode"] != "0:0"
    log = Path(summary["stderr"]).read_text()
    assert log.count("none.beton") == 1 and "Traceback" not in log


@pytest.mark.slurm
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--slurm.partition=none"], "Invalid partition name"),
        (["--slurm.partition=low", "--optim.lr=-1"], "optim.lr"),
        (["--slurm.partition=low", "--data.train="], "data.train"),
        (["--slurm.partition=low", "--slurm.nodes=0"], "slurm.nodes"),
        (["--slurm.partition=low", "--slurm.tme=3"], "unknown key"),
    ],
)
def test_a_refused_submission_is_one_line_and_leaves_nothing(
    submit, tmp_path, settings, capsys, arguments, message
):
    assert train.main([f"--out={tmp_path}/run", *settings, *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slurm
def test_a_batch_submits_a_job_for_each_run(cluster, tmp_path, settings):
    runs = [{"config": "configs/demo.yaml", "overrides": {"out": f"{tmp_path}/{i}"}} for i in "ab"]
    (tmp_path / "list.yaml").write_text(json.dumps(runs))
    job = ["--slurm.partition=low", "--slurm.time=30", f"--slurm.batch={tmp_path}/list.yaml"]
    long = "--epochs=1000"  # the jobs still run when they are submitted once more
    command = [sys.executable, "train.py", *settings, long, *job]
    where = {"cwd": REPOSITORY}
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=120, **where
    )
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout.splitlines()[-1])["jobs"]
    assert [entry["out"] for entry in jobs] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    for entry in jobs:
        assert cluster.job(entry["job_id"])["JobName"] == Path(entry["out"]).name
        assert f"{entry['job_id']}  {entry['out']}  {entry['stdout']}" in done.stdout
    again = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=120, **where
    )
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert (
        f"{tmp_path}/a: job {jobs[0]['job_id']} of this folder is waiting or running"
        in again.stderr
    )
    for entry in jobs:
        cluster.run("scancel", entry["job_id"])


def test_without_slurm_a_submission_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = train.read_config([f"--out={tmp_path}/run", "--slurm.partition=p"])
    assert slurm.wants_submission(config)
    with pytest.raises(UserError, match="found no sbatch command; submit from a login node"):
        slurm.submit(config, "train.py")
    assert not (tmp_path / "run").exists()


def test_a_list_of_runs_in_a_configuration_is_refused():
    config = train.read_config(["--slurm.batch=list.yaml"])
    with pytest.raises(UserError, match=r"got it in a file, expected it as --slurm\.batch LIST"):
        slurm.wants_submission(config)
