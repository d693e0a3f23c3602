"""Runs on a Slurm cluster: submitting them through submitit.

    if slurm.is_batch(argv):                                    # --slurm.batch list.yaml
        return 0, slurm.submit_batch(argv, lambda line: [slurm.job_of(read_config(line), __file__)])
    config = read_config(argv)
    if slurm.wants_submission(config):                          # --slurm.partition P
        return 0, slurm.submit(config, __file__)
    environment = slurm.task_environment()                      # torchrun's variables, or None

A job runs the same script, in the same directory and with the same python, on the settings that the
command line resolved to: they are written to `slurm/submitted.yaml` in the run's folder, without
those of `slurm`. The code is read when the job starts; it is not copied. Every task, one per GPU,
is a rank. The job is requeued until the run is finished: see `slurm_task`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import NonNegativeInt, PositiveInt

from ffcv_ssl.config.app_files import is_installed
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.config.stdout import show
from ffcv_ssl.config.yaml_layers import yaml_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import write_text
from ffcv_ssl.jobs.batch import batch_file, read_batch
from ffcv_ssl.jobs.slurm_ranks import join as join
from ffcv_ssl.jobs.slurm_ranks import task_environment as task_environment
from ffcv_ssl.jobs.slurm_task import PYTHON, RequeueingCommand
from ffcv_ssl.training.run_data import tell_once

TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}"  # as sbatch --time: minutes, or days and hours
FOLDER, SUBMITTED = "slurm", "submitted.yaml"
_NOT_ON_A_LINE = ("Cc", "Zl", "Zp", "Cs")
"""Unicode's categories of control characters, of breaks of lines and paragraphs, of no text."""


@dataclass(frozen=True)
class SlurmConfig:
    """The job to submit; values are sbatch's unless said. A null leaves it to the cluster."""

    partition: str | None = None
    """Partition to submit to. With it the command submits a job instead of training here."""
    batch: str | None = None
    """Only on the command line: a YAML list of runs to submit, one job each; every entry is a
    configuration file, or {config: FILE, name: NAME, overrides: {optim.lr: 0.1}}. Each run's folder
    is runs/NAME, and NAME is that of the file if not given."""
    dry_run: bool = False
    """Print the file that sbatch would get, also where there is no Slurm, and submit nothing."""
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

    def __post_init__(self) -> None:
        if self.time is not None and not re.fullmatch(TIME, self.time):
            expected = "expected minutes, hours:minutes:seconds or days-hours"
            raise UserError(f"slurm.time: got {self.time!r}, {expected}")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            got = f"got {self.tasks_per_node} with {self.gpus_per_node} GPUs"
            raise UserError(f"slurm.tasks_per_node: {got}, expected one task per GPU; leave it out")


class Job(NamedTuple):
    """A command, the settings that it reads, and the Slurm job to run it in."""

    command: RequeueingCommand
    settings: dict[str, Any]
    slurm: SlurmConfig

    @property
    def out(self) -> str:
        """The run's folder as the user typed it."""
        return self.settings["out"]


def make_job(
    script: str,
    words: Sequence[str],
    settings: dict[str, Any],
    slurm: SlurmConfig,
    command: Callable[..., RequeueingCommand] = RequeueingCommand,
) -> Job:
    """The job that runs `SCRIPT WORDS --config FILE` on nested settings with `out`, its folder."""
    settings = {key: value for key, value in settings.items() if key != "slurm"}
    folder = Path(settings["out"]).resolve()
    words = (*words, f"--config={folder / FOLDER / SUBMITTED}")
    script = str(Path(script).resolve())
    return Job(command(script, words, str(folder), slurm.max_requeues), settings, slurm)


def job_of(config: Any, script: str, *words: str) -> Job:
    """The job of a command's configuration, a dataclass; words: those before its settings."""
    return make_job(script, words, config_dict(config), config.slurm)


def wants_submission(config: Any) -> bool:
    """Whether a command should submit its run instead of doing it here, or show how it would. A
    job's own command does not: its settings have no partition."""
    if config.slurm.batch is not None:
        raise UserError("slurm.batch: got it in a file, expected it as --slurm.batch LIST.yaml")
    return config.slurm.partition is not None or config.slurm.dry_run


def is_batch(argv: Sequence[str]) -> bool:
    """Whether a command line asks for a list of runs."""
    return batch_file(argv) is not None


def submit(config: Any, script: str, *words: str) -> dict[str, Any]:
    """Submit the run of a configuration (see `job_of`); returns the command's summary. Raises
    UserError where Slurm refuses, or is not there."""
    launches = [[job_of(config, script, *words)]]
    if config.slurm.dry_run:
        return show_jobs(launches)
    (job,) = submit_jobs(launches)
    show(f"job {job['job_id']}: {job['out']}, log {job['stdout']}")
    return {"status": "submitted", **job}


def submit_batch(
    argv: Sequence[str], read_jobs: Callable[[list[str]], list[Job]]
) -> dict[str, Any]:
    """Submit each run of the list that `argv` names; returns the command's summary.

    `read_jobs(argv)` reads the command line of one run: a job, or several, each to begin after the
    one before it. Nothing is submitted unless all runs are sound and their folders differ. Other
    keys of `argv` hold for every run and win over the list's. Raises UserError.
    """
    path, launches = batch_file(argv) or "", []
    for line in read_batch(path, argv):
        try:
            launches.append(read_jobs(line))
        except ValueError as error:
            raise UserError(f"{path}: {line[0]}: {one_line(error)}") from None
    folders = [job.command.folder for job in itertools.chain(*launches)]
    for job in itertools.chain(*launches):
        if folders.count(job.command.folder) > 1:
            raise UserError(f"{path}: two runs have the folder {job.out}; give one another name")
    if any(job.slurm.dry_run for job in itertools.chain(*launches)):
        return show_jobs(launches)
    jobs = submit_jobs(launches)
    width = max([len(job["out"]) for job in jobs], default=0)
    show(f"{'job':>10}  {'folder':{width}}  log")
    for made in jobs:
        show(f"{made['job_id']:>10}  {made['out']:{width}}  {made['stdout']}")
    return {"status": "submitted", "jobs": jobs}


# ---- Submitting ----------------------------------------------------------------------------------


def submit_jobs(launches: Sequence[Sequence[Job]]) -> list[dict[str, str]]:
    """Submit lists of jobs; a job begins when the job before it in its list ended with exit code 0.

    Returns {out, job_id, stdout, stderr} of each job. Raises UserError where Slurm refuses a job,
    and, before the first one is submitted, where one of the folders has a job in the queue.
    """
    check_sbatch()
    for job in itertools.chain(*launches):
        _check(job)
        if job.slurm.gpus_per_node and job.slurm.cpus_per_task is None:
            tell_once(
                "note: slurm.cpus_per_task is not set, and most clusters then give each task one "
                "core, for its loader too; set it to a node's cores divided by its GPUs"
            )
    done: list[dict[str, str]] = []
    for launch in launches:
        before = None
        for job in launch:
            job = job if before is None else _after(job, before)
            try:
                done.append(_submit(job))
            except UserError as error:
                if sum(map(len, launches)) == 1:
                    raise
                ids = ", ".join(made["job_id"] for made in done) or "none"
                raise UserError(f"{job.out}: {error}; jobs submitted before it: {ids}") from None
            before = done[-1]["job_id"]
    return done


def show_jobs(launches: Sequence[Sequence[Job]]) -> dict[str, Any]:
    """Print what `submit_jobs` would give to sbatch, and write nothing; returns the command's
    summary. Raises UserError as `submit_jobs` does, but not for want of Slurm."""
    shown = []
    for launch in launches:
        before = None
        for job in launch:
            _check(job)
            job = job if before is None else _after(job, f"<the job of {before}>")
            words = shlex.join([job.command.script, *job.command.words])
            show(f"# {job.out}: this job runs {words}\n{_job_file(job)}")
            shown.append({"out": job.out, "command": words})
            before = job.out
    return {"status": "dry_run", "jobs": shown}


def _job_file(job: Job) -> str:
    """The text of the file that sbatch would get."""
    import submitit  # slow to import

    class WithoutSlurm(submitit.SlurmExecutor):
        """It looks for no `srun`."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = WithoutSlurm(Path(job.command.folder) / FOLDER, python=PYTHON)
    executor.update_parameters(**_executor_parameters(job))
    return executor._make_submission_file_text(executor._submitit_command_str, "dry_run")


def _executor_parameters(job: Job) -> dict[str, Any]:
    """The parameters of a job's SlurmExecutor; the job has the name of its run's folder."""
    name = re.sub(r"[^\w.+=@-]", "_", Path(job.command.folder).name)
    return sbatch_parameters(job.slurm, name, Path(job.command.script))


def _after(job: Job, job_id: str) -> Job:
    """A job that begins once another has ended with exit code 0."""
    others = f"{job.slurm.dependency}," if job.slurm.dependency else ""
    return job._replace(slurm=replace(job.slurm, dependency=f"{others}afterok:{job_id}"))


def _check(job: Job) -> None:
    """Refuse a job that cannot do its work. Raises UserError."""
    _check_texts(job)
    data = job.settings.get("data") or {}
    if data.get("train") == "":
        raise UserError("data.train: got no file to train on; write one with write_dataset.py")
    for path in (data.get("train"), data.get("val")):
        if path and not Path(path).exists():  # a file on the nodes' own disks, perhaps
            print(f"note: {path} is not here; the job's nodes must have it", file=sys.stderr)
    if job.slurm.dependency is None:
        check_not_queued(job.out)


def _check_texts(job: Job) -> None:
    """Refuse what would not stay on its line of the script that sbatch runs, and folders that
    sbatch would rename. Quotes do not help there: after a line break in a #SBATCH comment the shell
    begins to read. Raises UserError."""
    texts = {f"slurm.{f.name}": getattr(job.slurm, f.name) for f in fields(job.slurm)}
    texts |= {"out": job.command.folder, "the command": job.command.script}
    for key, text in texts.items():
        if isinstance(text, str) and any(unicodedata.category(c) in _NOT_ON_A_LINE for c in text):
            raise UserError(
                f"{key}: got {text!r}, expected text without line breaks and control characters, "
                "for sbatch"
            )
    if "%" in job.command.folder:  # %j, %x... in the names of logs; submitit undoes a doubled one
        raise UserError(
            f"out: got {job.command.folder!r}, expected a folder without %, which sbatch and "
            "submitit replace in the names of logs; use another --out"
        )


def check_sbatch() -> None:
    """Raise UserError where jobs cannot be submitted."""
    if shutil.which("sbatch") is None:
        raise UserError("slurm.partition: found no sbatch command; submit from a login node")


def check_not_queued(run: str) -> None:
    """Raise UserError where a job that was submitted for the folder `run` still waits or runs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        made = {path.name.partition("_")[0] for path in (Path(run) / FOLDER).iterdir()}
        words = ["squeue", "--me", "--noheader", "--format=%A"]
        queued = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split()
        for job_id in sorted(made & set(queued)):
            remedy = f"wait for it, or end it: scancel {job_id}"
            raise UserError(f"{run}: job {job_id} of this folder is waiting or running; {remedy}")


def sbatch_parameters(config: SlurmConfig, name: str, script: Path) -> dict[str, Any]:
    """A SlurmConfig as the parameters of submitit's SlurmExecutor; in a checkout this package lies
    beside the command `script`."""
    num_tasks = config.tasks_per_node or max(1, config.gpus_per_node)
    srun = ["--kill-on-bad-exit=1"]  # a rank that crashed must not leave the others waiting
    if config.cpus_per_task:  # from 22.05 on, srun no longer takes this from sbatch
        srun.append(f"--cpus-per-task={config.cpus_per_task}")
    # the job must find this package before it can run the script; an installed one it finds
    path = f'export PYTHONPATH={shlex.quote(str(script.parent))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    same = ["partition", "nodes", "cpus_per_task", "mem", "time", "signal_delay_s", "constraint"]
    same += ["account", "qos", "nodelist", "exclude", "comment"]
    more: dict[str, Any] = {"requeue": True}  # also where the cluster's default is not to
    if config.reservation:
        more["reservation"] = config.reservation
    if config.dependency:
        more |= {"dependency": config.dependency, "kill_on_invalid_dep": "yes"}
    return {
        **{key: getattr(config, key) for key in same},
        "job_name": name,
        "ntasks_per_node": num_tasks,
        "gpus_per_node": config.gpus_per_node or None,
        "setup": config.setup if is_installed() else [*config.setup, path],
        "srun_args": srun,
        "additional_parameters": more,
    }


def _submit(job: Job) -> dict[str, str]:
    """Submit a job, named after its run's folder, with its settings and logs in there."""
    import submitit  # slow to import

    folder = Path(job.command.folder) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        write_text(folder / SUBMITTED, yaml_text(job.settings))
        executor = submitit.SlurmExecutor(folder, python=PYTHON)
        executor.update_parameters(**_executor_parameters(job))
        with _no_jobs_environment(), contextlib.redirect_stderr(io.StringIO()):
            made = executor.submit(job.command)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or one_line(error)}") from None
    except submitit.core.utils.FailedJobError as error:
        _remove_rest(folder, before)
        raise UserError(f"slurm: {_reason(error)}") from None
    logs = {"stdout": str(made.paths.stdout), "stderr": str(made.paths.stderr)}
    return {"out": job.out, "job_id": made.job_id, **logs}


@contextlib.contextmanager
def _no_jobs_environment() -> Iterator[None]:
    """Hide that this process runs in a job, but keep what the user tells sbatch."""
    from submitit.helpers import clean_env, environment_variables

    kept = {k: v for k, v in os.environ.items() if k.startswith("SBATCH_") or k == "SLURM_CONF"}
    with clean_env(), environment_variables(**kept):
        yield


def _reason(error: Exception) -> str:
    """sbatch's own words on one line: `sbatch: error: A\\nsbatch: error: B` -> `sbatch: A; B`."""
    lines = [re.sub(r"^sbatch: (error: )?", "", line) for line in str(error).splitlines() if line]
    return f"sbatch: {'; '.join(lines)}"


def _remove_rest(folder: Path, before: set[Path]) -> None:
    """Delete what a refused submission left, and the folders that were made for it."""
    for path in set(folder.iterdir()) - before:
        path.unlink()
    for empty in (folder, folder.parent):
        if not any(empty.iterdir()):
            empty.rmdir()
