"""Runs on a Slurm cluster: submitting them through submitit, and surviving there.

    if slurm.is_batch(argv):                                    # --slurm.batch list.yaml
        return 0, slurm.submit_batch(argv, read_config, __file__)
    config = read_config(argv)
    if slurm.wants_submission(config):                          # --slurm.partition P
        return 0, slurm.submit(config, argv, __file__)
    environment = slurm.task_environment()                      # torchrun's variables, or None

A job runs the same command without the keys of `slurm`, in the same directory and with the same
python, one task a GPU; code and configuration files are read when it starts, not copied. Every task
is a rank, and it is requeued until it is finished: see `slurm_job`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.jobs.slurm_task import PYTHON, Task

TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}"  # as sbatch --time: minutes, or days and hours


@dataclass(frozen=True)
class SlurmConfig:
    """The job to submit; values are sbatch's unless said. A null leaves it to the cluster."""

    partition: str | None = None
    """Partition to submit to. With it the command submits a job instead of training here."""
    batch: str | None = None
    """Only on the command line: a YAML list of runs to submit, one job each; every entry is a
    configuration file, or {config: FILE, name: NAME, overrides: {optim.lr: 0.1}}. Each run's folder
    is runs/NAME, and NAME is that of the file if not given."""
    nodes: PositiveInt = 1
    """Nodes of the job."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs, and as many tasks, on each node."""
    tasks_per_node: PositiveInt | None = None
    """Tasks on each node where no GPU is asked for; null: 1."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of each task: the loader's threads run there."""
    mem: str | None = None
    """Memory of each node: 64GB."""
    time: str | None = None
    """Time limit: minutes, hours:minutes:seconds or days-hours; in YAML in quotes."""
    signal_delay_s: PositiveInt = 120
    """Seconds before the time limit at which the run is told to save: longer than ten steps and a
    checkpoint. Slurm may be up to 60 s early."""
    max_requeues: NonNegativeInt = 100
    """A job that was requeued so many times is not requeued again."""
    constraint: str | None = None
    """Features that the nodes must have."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    nodelist: str | None = None
    """Nodes that must be used."""
    exclude: str | None = None
    """Nodes that must not be used."""
    reservation: str | None = None
    """Reservation to use."""
    comment: str | None = None
    """Comment on the job."""
    dependency: str | None = None
    """Jobs to wait for: afterok:4711. A job that waits in vain is cancelled."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before the job's command: ["module load cuda"]."""

    def __post_init__(self):
        if self.time is not None and not re.fullmatch(TIME, self.time):
            expected = "expected minutes, hours:minutes:seconds or days-hours"
            raise UserError(f"slurm.time: got {self.time!r}, {expected}")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            got = f"got {self.tasks_per_node} with {self.gpus_per_node} GPUs"
            raise UserError(f"slurm.tasks_per_node: {got}, expected one task a GPU; leave it out")


def wants_submission(config):
    """Whether this command should submit a run rather than train it: never inside a job of ours."""
    if config.slurm.batch is not None:
        raise UserError("slurm.batch: got a key in a file, expected --slurm.batch LIST.yaml")
    is_own_job = "SUBMITIT_EXECUTOR" in os.environ and "SLURM_STEP_ID" in os.environ
    return config.slurm.partition is not None and not is_own_job


def is_batch(argv):
    """Whether a command line asks for a list of runs."""
    return _batch_file(argv) is not None


def submit(config, argv, script):
    """Submit the run that `argv` describes to `script`; returns the command's summary.

    config: that command line, parsed, with its folder in `out`. Raises UserError where Slurm
    refuses, or is not there.
    """
    _check(config)
    job = _submit_job(config, argv, Path(script).resolve())
    print(f"job {job['job_id']}: {job['out']}, log {job['stdout']}", flush=True)
    return {"status": "submitted", **job}


def submit_batch(argv, read_config, script):
    """Submit each run of a list; returns the command's summary.

    Every run's command line is first parsed by `read_config(argv) -> config`: nothing is submitted
    unless all are sound and their folders differ. Other keys of `argv` hold for every run and win
    over the list's. Raises UserError.
    """
    path = _batch_file(argv)
    runs = [(line, _read_entry(line, read_config, path)) for line in read_batch(path, argv)]
    folders = set()
    for _, config in runs:
        folder = Path(config.out).resolve()
        if folder in folders:
            raise UserError(f"{path}: two runs in {config.out}; give one a name of its own")
        folders.add(folder)
    for _, config in runs:
        _check(config)
    jobs = []
    for line, config in runs:
        try:
            jobs.append(_submit_job(config, line, Path(script).resolve()))
        except UserError as error:
            before = ", ".join(job["job_id"] for job in jobs) or "none"
            raise UserError(f"{config.out}: {error}; submitted before it: {before}") from None
    width = max(len(job["out"]) for job in jobs)
    print(f"{'job':>10}  {'folder':{width}}  log")
    for job in jobs:
        print(f"{job['job_id']:>10}  {job['out']:{width}}  {job['stdout']}", flush=True)
    return {"status": "submitted", "jobs": jobs}


def read_batch(path, argv=()):
    """The command line of each run in a list of runs, `argv`'s other keys last.

    Raises UserError for a list that is not one.
    """
    try:
        entries = read_yaml(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: got no list, expected one of configuration files")
    others = [word for word in argv if word != f"--slurm.batch={path}"]
    if "--slurm.batch" in others:
        at = others.index("--slurm.batch")
        del others[at : at + 2]
    if any(re.match(r"--config(=|$)", word) for word in others):
        raise UserError(f"{path}: got --config too, expected it in the list's entries")
    numbered = enumerate(entries, 1)
    return [[*_entry_arguments(entry, f"{path}: entry {i}"), *others] for i, entry in numbered]


def _entry_arguments(entry, where):
    entry = {"config": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), str):
        raise UserError(f"{where}: got {entry!r}, expected a file or {{config, name, overrides}}")
    unknown = set(entry) - {"config", "name", "overrides"}
    overrides, name = entry.get("overrides") or {}, entry.get("name", Path(entry["config"]).stem)
    if unknown or not isinstance(overrides, dict) or not isinstance(name, str) or not name:
        got = f"name {name!r}" if isinstance(overrides, dict) else "overrides are no mapping"
        got = f"unknown key {sorted(unknown, key=str)[0]!r}" if unknown else got
        raise UserError(f"{where}: {got}, expected {{config, name, overrides}}")
    arguments = [f"--config={entry['config']}", f"--out=runs/{name}"]
    for key, value in flatten_as_text(overrides).items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments.append(f"--{key}={text}")
    return arguments


def _read_entry(line, read_config, path):
    try:
        return read_config(line)
    except ValueError as error:
        raise UserError(f"{path}: {line[0]}: {one_line(error)}") from None


def _batch_file(argv):
    for word, following in zip(argv, [*argv[1:], ""]):
        if word.startswith("--slurm.batch="):
            return word.partition("=")[2]
        if word == "--slurm.batch":
            return following
    return None


def without_slurm_keys(argv):
    """A command line without the keys of `slurm` and their values."""
    kept, is_value = [], False
    for word in argv:
        if is_value:
            is_value = False
        elif re.match(r"--slurm(\.[^=]*)?(=|$)", word):
            is_value = "=" not in word
        else:
            kept.append(word)
    return kept


# ---- Submitting ----------------------------------------------------------------------------------


def sbatch_parameters(config, name, script):
    """A SlurmConfig as the parameters of submitit's SlurmExecutor."""
    num_tasks = config.tasks_per_node or max(1, config.gpus_per_node)
    srun = ["--kill-on-bad-exit=1"]  # a rank that crashed must not leave the others waiting
    if config.cpus_per_task:  # from 22.05 on, srun no longer takes this from sbatch
        srun.append(f"--cpus-per-task={config.cpus_per_task}")
    # the job must find this package before it can run the script, installed or not
    path = f'export PYTHONPATH={shlex.quote(str(script.parent))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    same = ("partition", "nodes", "cpus_per_task", "mem", "time", "signal_delay_s", "constraint")
    same += ("account", "qos", "nodelist", "exclude", "comment")
    more = {"requeue": True}  # also where the cluster's default is not to
    if config.reservation:
        more["reservation"] = config.reservation
    if config.dependency:
        more |= {"dependency": config.dependency, "kill_on_invalid_dep": "yes"}
    return {
        **{key: getattr(config, key) for key in same},
        "job_name": name,
        "ntasks_per_node": num_tasks,
        "gpus_per_node": config.gpus_per_node or None,
        "setup": [*config.setup, path],
        "srun_args": srun,
        "additional_parameters": more,
    }


def _check(config):
    """Refuse what no job could do; raises UserError."""
    check_sbatch()
    if not config.data.train:
        raise UserError("data.train: got no file to train on; write one with write_dataset.py")
    for path in (config.data.train, config.data.val):
        if path and not Path(path).exists():  # a file on the nodes' own disks, perhaps
            print(f"note: {path} is not here; the job's nodes must have it", file=sys.stderr)
    if config.slurm.dependency is None:
        check_not_queued(config.out)


def check_sbatch():
    """Raise UserError where jobs cannot be submitted."""
    if shutil.which("sbatch") is None:
        raise UserError("slurm.partition: there is no sbatch here; submit from a login node")


def check_not_queued(run):
    """Raise UserError where a job that was submitted for the folder `run` still waits or runs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        made = {path.name.partition("_")[0] for path in (Path(run) / "slurm").iterdir()}
        words = ["squeue", "--me", "--noheader", "--format=%A"]
        asked = made and subprocess.run(words, capture_output=True, text=True, timeout=60)
        for job_id in sorted(made & set(asked.stdout.split()) if made else ()):
            remedy = f"wait for it, or end it: scancel {job_id}"
            raise UserError(f"{run}: job {job_id} of this folder waits or runs; {remedy}")


def _submit_job(config, argv, script):
    """Returns {job_id, out, stdout, stderr}. Raises UserError where Slurm refuses."""
    folder = str(Path(config.out).resolve())
    task = Task(str(script), without_slurm_keys(argv), folder, config.slurm.max_requeues)
    return {"out": config.out, **submit_task(config.slurm, task, script, folder)}


def submit_task(config, task, script, run):
    """Submit a call of `task` by every task of a job, named after the folder `run`, with its logs
    there; a SlurmConfig says which job. Returns {job_id, stdout, stderr}.

    script: the Path of the command, beside which this package lies. Raises UserError where Slurm
    refuses.
    """
    import submitit

    folder = Path(run) / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        executor = submitit.SlurmExecutor(folder, python=PYTHON)
        executor.update_parameters(**sbatch_parameters(config, folder.parent.name, script))
        with _no_jobs_environment(), contextlib.redirect_stderr(io.StringIO()):
            job = executor.submit(task)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or one_line(error)}") from None
    except submitit.core.utils.FailedJobError as error:
        _remove_rest(folder, before)
        raise UserError(f"slurm: {_reason(error)}") from None
    paths = {"stdout": str(job.paths.stdout), "stderr": str(job.paths.stderr)}
    return {"job_id": job.job_id, **paths}


@contextlib.contextmanager
def _no_jobs_environment():
    """Hide that this process runs in a job, but keep what the user tells sbatch."""
    from submitit.helpers import clean_env, environment_variables

    kept = {k: v for k, v in os.environ.items() if k.startswith("SBATCH_") or k == "SLURM_CONF"}
    with clean_env(), environment_variables(**kept):
        yield


def _reason(error):
    """sbatch's own words on one line: `sbatch: error: A\\nsbatch: error: B` -> `sbatch: A; B`."""
    lines = [re.sub(r"^sbatch: (error: )?", "", line) for line in str(error).splitlines() if line]
    return f"sbatch: {'; '.join(lines)}"


def _remove_rest(folder, before):
    """Delete what a refused submission left, and the folders that were made for it."""
    for path in set(folder.iterdir()) - before:
        path.unlink()
    for empty in (folder, folder.parent):
        if not any(empty.iterdir()):
            empty.rmdir()


# ---- Ranks --------------------------------------------------------------------------------------


def task_environment(environment=os.environ):
    """torchrun's variables for this task of a Slurm job step, or None outside one.

    Returns {RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT}, all str. A batch script that
    calls python without srun is no step, and under torchrun its own variables hold.
    """
    if "SLURM_STEP_ID" not in environment or "RANK" in environment:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]  # node[003-005,7],other: rank 0 is on the first
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": "127.0.0.1" if environment["SLURM_STEP_NUM_NODES"] == "1" else first,
        "MASTER_PORT": str(_port(environment)),
    }


def _port(environment):
    """A port below those that Linux gives out by itself, of this start of this step alone."""
    keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, start = (int(environment.get(key, 0)) for key in keys)
    return 20000 + (job + 997 * step + 4999 * start) % 12000
