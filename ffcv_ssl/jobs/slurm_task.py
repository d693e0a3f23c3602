"""What each task of a Slurm job runs: a command that survives pre-emption and time limits.

- Slurm sends SIGUSR2 some time before the time limit, and on pre-emption where the cluster says so
  (preempt_send_user_signal). It sends SIGTERM on other pre-emption and on scancel. After either
  signal, the command finishes its step, saves and returns 75. Then rank 0 requeues the job, once,
  under the same id; when the job starts again, the command goes on from its checkpoint.
- Rank 0 requeues the job after SIGUSR2, or if Slurm says that the job is being pre-empted, and only
  while Slurm calls the job running: a cancelled job stays cancelled, and a job that Slurm requeues
  by itself is not requeued twice. A user's mistake (exit code 2) or a crash is never requeued.
- Only rank 0 ends with 75, the other ranks with 0: srun ends all tasks when one fails.

submitit's own signal handler is switched off: it would act in the middle of a step, it deletes the
job's pickle before it writes the new one, and it would bring a cancelled job back to life.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_ssl.config import app_files
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import hold_folder
from ffcv_ssl.training import command
from ffcv_ssl.training.command import EXIT_INTERRUPTED, StopSignal

# The interpreter of a job, for a shell. Python and submitit take seconds to start, and by default
# either signal would end them: they stay blocked until `RequeueingCommand` listens.
_BLOCK = (
    "import os, signal as s, sys; s.pthread_sigmask(s.SIG_BLOCK, (s.SIGUSR2, s.SIGTERM)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
PYTHON = shlex.join([sys.executable, "-S", "-c", _BLOCK])

LOCK_PATIENCE_S = 300
"""How long a requeued job waits for the run's folder: on a network file system the lock of a failed
node is released late."""


@dataclass(frozen=True)
class RequeueingCommand:
    """A command that each task of a job runs; rank 0 then requeues the job where it should."""

    script: str
    """train.py or evaluate.py, absolute."""
    words: tuple[str, ...]
    """Its arguments."""
    folder: str
    """The run's folder, absolute."""
    max_requeues: int

    def __call__(self) -> None:
        """Run the command; raises SystemExit unless it ended with exit code 0."""
        if num_requeues() > self.max_requeues:  # by Slurm itself
            _say(f"{_too_often(self.max_requeues)}; run the command again to continue")
            raise SystemExit(EXIT_INTERRUPTED)
        for number in StopSignal.SIGNALS:  # submitit's handlers must not come back; see above
            signal.signal(number, lambda number, frame: None)
        command.exit_process, command.has_own_log = self._exit_process, True
        with StopSignal() as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignal.SIGNALS)
            code = self._run()
            if code == EXIT_INTERRUPTED:
                code = self._after_stop(stop.received)
        if code:
            self._wait_for_first_task()
            raise SystemExit(code)  # for an Exception submitit would print a traceback
        # when rank 0 ends with 75, srun ends tasks that are still leaving: they would exit with 143
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _wait_for_first_task(self) -> None:
        """srun ends all tasks when one fails: give rank 0 the time to say why, and keep this task's
        exit code as the job's."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not is_first_task():
            time.sleep(5)

    def _exit_process(self, code: int) -> None:
        self._wait_for_first_task()
        os._exit(code)

    def _run(self) -> Any:
        """Run the script as __main__; returns its exit code."""
        if num_requeues() and is_first_task():
            with contextlib.suppress(UserError):  # the script will say it
                with hold_folder(self.folder, LOCK_PATIENCE_S):
                    pass
        sys.argv = [self.script, *self.words]
        if Path(self.script).parent == app_files.app_folder():
            app_files.load_pipelines()  # an installed script does not find it by itself
        try:
            runpy.run_path(self.script, run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    def _after_stop(self, received: Sequence[signal.Signals]) -> int:
        if not is_first_task():
            return 0
        _say(requeue(os.environ["SLURM_JOB_ID"], received, self.max_requeues))
        return EXIT_INTERRUPTED


def requeue(job_id: str, received: Sequence[signal.Signals], max_requeues: int) -> str:
    """Put a job whose command was stopped back into the queue, where it should be.

    received: the signals that stopped it. Returns a line for the log that says what was done.
    """
    job = f"job {job_id}"
    state, preempt_time = _job_state(job_id)
    if state != "RUNNING":
        return f"{job}: not requeued, since Slurm reports it as {state.lower()}"
    if signal.SIGUSR2 not in received and preempt_time == "None":
        names = ", ".join(number.name for number in received)
        return f"{job}: stopped by {names}, not requeued; run the command again to continue"
    if num_requeues() >= max_requeues:
        return f"{job}: {_too_often(max_requeues)}; not requeued; run the command again to continue"
    done = _scontrol("requeue", job_id)
    if done.returncode:
        return f"{job}: not requeued: {one_line(done.stderr)}; run the command again to continue"
    return f"{job}: requeued ({num_requeues() + 1} of at most {max_requeues} times)"


def num_requeues() -> int:
    """Number of times that this job has been requeued; 0 outside a job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _job_state(job_id: str) -> tuple[str, str]:
    """(state, time at which its pre-emption began or "None") of a job, in Slurm's words.

    Where Slurm does not answer, the job counts as running, since it can ask.
    """
    answer = dict(
        re.findall(r"\b(JobState|PreemptTime)=(\S+)", _scontrol("show", "job", job_id).stdout)
    )
    return answer.get("JobState", "RUNNING"), answer.get("PreemptTime", "None")


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", one_line(error))


def is_first_task() -> bool:
    """Whether this process is rank 0 of its job."""
    return os.environ["SLURM_PROCID"] == "0"


def _too_often(max_requeues: int) -> str:
    return f"requeued {num_requeues()} times, slurm.max_requeues is {max_requeues}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
