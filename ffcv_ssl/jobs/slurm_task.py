"""A task of a job of ours on Slurm: it runs a command and survives pre-emption and time limits.

- SIGUSR2 comes some time before the time limit, and on pre-emption where the cluster says so
  (preempt_send_user_signal); SIGTERM on other pre-emption and on scancel. After either, the trainer
  finishes its step, saves and returns 75. Only then rank 0 requeues the job, once, under its own
  id; started again, it goes on from the checkpoint.
- It does so after SIGUSR2, or if Slurm says that the job is being pre-empted, and only while Slurm
  still counts it as running: a cancelled job stays cancelled, and one that Slurm requeues by itself
  is not requeued twice. A user's mistake (exit code 2) or a crash is never requeued.
- Only rank 0 ends with 75, the others with 0: srun ends all tasks when one fails.

submitit's own signal handler does not act here: it would in the middle of a step, it replaces the
job's pickle by deleting it first, and it would bring a cancelled job back to life.
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
from typing import NamedTuple

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import hold_folder
from ffcv_ssl.training.command import EXIT_INTERRUPTED, StopSignal

# The interpreter of a job, for a shell. Python and submitit take seconds to start, and by default
# either signal would end them: they stay blocked until `Task` listens.
_BLOCK = (
    "import os, signal as s, sys; s.pthread_sigmask(s.SIG_BLOCK, (s.SIGUSR2, s.SIGTERM)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
PYTHON = shlex.join([sys.executable, "-S", "-c", _BLOCK])

LOCK_PATIENCE_S = 300
"""How long a requeued job waits for the run's folder: on a network's file system the lock of a node
that failed is freed late."""


class Task(NamedTuple):
    """What each task of a job calls: the command of a script, and then, in rank 0, the requeue.

    folder: that of the run, absolute, str.
    """

    script: str
    argv: list
    folder: str
    max_requeues: int

    def __call__(self):
        if num_requeues() > self.max_requeues:  # by Slurm itself
            _say(f"{_too_often(self.max_requeues)}; not started again; the same command goes on")
            raise SystemExit(EXIT_INTERRUPTED)
        for number in StopSignal.SIGNALS:  # submitit's are not to come back; see above
            signal.signal(number, _do_nothing)
        with StopSignal() as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignal.SIGNALS)
            code = self._run()
            if code == EXIT_INTERRUPTED:
                code = self._after_stop(stop.received)
        if code:
            # srun ends all tasks when one fails: rank 0 is to say why, and `code` to stay the job's
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if not _is_first():
                time.sleep(5)
            raise SystemExit(code)  # no Exception: submitit would add a traceback

    def _run(self):
        if num_requeues() and _is_first():
            with contextlib.suppress(UserError):  # then the script says so itself
                with hold_folder(self.folder, LOCK_PATIENCE_S):
                    pass
        sys.argv = [self.script, *self.argv]
        try:
            runpy.run_path(self.script, run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    def _after_stop(self, received):
        if not _is_first():
            return 0
        _say(requeue(os.environ["SLURM_JOB_ID"], received, self.max_requeues))
        return EXIT_INTERRUPTED


def requeue(job_id, received, max_requeues):
    """Put a job that has stopped itself back into the queue, if it should be.

    received: the signals that stopped it. Returns what was done, in words for the log.
    """
    job = f"job {job_id}"
    state, preempt_time = _job_state(job_id)
    if state != "RUNNING":
        return f"{job}: not requeued from here, since Slurm calls it {state.lower()}"
    if signal.SIGUSR2 not in received and preempt_time == "None":
        names = ", ".join(number.name for number in received)
        return f"{job}: stopped by {names}, not requeued; the same command goes on"
    if num_requeues() >= max_requeues:
        return f"{job}: {_too_often(max_requeues)}; not requeued again; the same command goes on"
    done = _scontrol("requeue", job_id)
    if done.returncode:
        return f"{job}: not requeued: {one_line(done.stderr)}; the same command goes on"
    return f"{job}: requeued ({num_requeues() + 1} of at most {max_requeues} times)"


def num_requeues():
    """How often this job has been requeued; 0 outside a job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _job_state(job_id):
    """A job's state, and when its pre-emption began or "None", as Slurm words them.

    Where Slurm does not answer, a job that can ask is taken to be running.
    """
    answer = dict(
        re.findall(r"\b(JobState|PreemptTime)=(\S+)", _scontrol("show", "job", job_id).stdout)
    )
    return answer.get("JobState", "RUNNING"), answer.get("PreemptTime", "None")


def _scontrol(*words):
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", one_line(error))


def _is_first():
    return os.environ["SLURM_PROCID"] == "0"


def _too_often(max_requeues):
    return f"requeued {num_requeues()} times, slurm.max_requeues is {max_requeues}"


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _do_nothing(number, frame):
    pass
