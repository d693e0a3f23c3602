"""A Slurm cluster of one node on this machine, for tests: started, used, and ended without a trace.

It has its own folder, ports and munge, so that it disturbs no Slurm that runs here already. Its
node pretends to have two CPUs. Jobs in the partition `high` pre-empt those in `low`, which get the
signal that they asked for and then a minute's grace.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    names = ", no ".join(absent)
    return f"no {names} here; .ci/install_slurm installs Slurm" if absent else None


class Cluster:
    """A running cluster while its context lasts; `environment` is for Slurm's commands."""

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        self.daemons: list[subprocess.Popen] = []
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            self._wait(
                "the node is idle", lambda: self.run("sinfo", "-h", "-o%T").strip() == "idle"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # munge last: the others end at once only while it answers
        for process in self.daemons[1:] + self.daemons[:1]:
            self._end(process)
            for pid in self._job_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}{self._logs()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows about a job: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        text = self.run("scontrol", "show", "job", str(job_id))
        return dict(re.findall(r"(\S+?)=(\S+)", text))

    def wait_for_end(self, job_id: str, timeout_s: float = 300) -> dict[str, str]:
        """Wait until a job has ended for good; returns what Slurm knows about it."""
        alive = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self._wait(
            f"job {job_id} has ended", lambda: self.job(job_id)["JobState"] not in alive, timeout_s
        )
        return self.job(job_id)

    def _configure(self):
        self.folder.chmod(0o755)  # munge wants its socket within everyone's reach
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], two.getsockname()[1]
        text = CONFIGURATION.format(
            folder=self.folder,
            user=pwd.getpwuid(os.getuid()).pw_name,
            host=socket.gethostname().split(".")[0],
            controller_port=ports[0],
            node_port=ports[1],
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_munge(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        files |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("log", "pid", "seed")}
        self._start("munged", "--foreground", *(f"--{name}={path}" for name, path in files.items()))
        self._wait("munge listens", files["socket"].exists)

    def _start(self, name, *options):
        # so that it ends with this process, however that ends
        command = ["setpriv", "--pdeathsig=TERM", shutil.which(name, path=PATH), *options]
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.daemons.append(process)

    def _end(self, process):
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _job_processes(self):
        """Processes that this cluster's jobs left: they know its configuration's path."""
        mark, own = f"SLURM_CONF={self.folder}/slurm.conf".encode(), os.getpid()
        daemons = {process.pid for process in self.daemons}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in daemons | {own}:
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)
                except OSError:
                    continue  # it has ended

    def _wait(self, what, is_so, timeout_s=60):
        end = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout_s} s: {what}{self._logs()}")
            dead = [process.args[2] for process in self.daemons if process.poll() is not None]
            if dead:
                raise AssertionError(f"{dead[0]} has ended{self._logs()}")
            time.sleep(0.1)

    def _logs(self):
        parts = [
            f"\n{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log")
        ]
        return "".join(sorted(parts))
