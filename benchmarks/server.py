"""One peer in a process group of its own, which is stopped while others are measured.

Peers leave threads and worker processes behind their runs that go on working or spinning; side by
side in one process they halve each other's rates. So each lives apart, and gets SIGSTOP until its
turn.

    python -m benchmarks.server PEER COLUMN FILE.beton FOLDER THREADS     # answers "run" and
    "sample" with JSON lines
"""

import json
import os
import signal
import subprocess
import sys
import time


class PeerProcess:
    """The parent's handle: `run()` -> images/s, `sample()` -> `levels_of` some views,
    `close()`."""

    def __init__(self, name, column, path, folder, threads):
        command = [sys.executable, "-m", "benchmarks.server", name, column, path, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, str(threads)], start_new_session=True, **pipes)
        self.name = name
        self._stopped = False

    def _signal(self, number):
        os.killpg(self.process.pid, number)

    def ask(self, request):
        """Wake the group, ask, and stop it again."""
        if self._stopped:
            self._signal(signal.SIGCONT)
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                self._signal(signal.SIGSTOP)
                self._stopped = True
                return json.loads(line)
        raise SystemExit(f"{self.name}: its process ended with {self.process.wait()}")

    def run(self):
        return self.ask("run")["images_per_s"]

    def sample(self):
        return self.ask("sample")["levels"]

    def close(self):
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def levels_of(views):
    """Mean and standard deviation of all numbers, and the standard error of the mean over views."""
    means = views.mean((1, 2, 3))
    return float(views.mean()), float(views.std()), float(means.std() / len(means) ** 0.5)


def serve(name, column, path, folder, threads):
    from benchmarks.peers import PEERS
    from benchmarks.photographs import Files

    (peer_class,) = [peer for peer in PEERS if peer.name == name]
    peer = peer_class()
    peer.setup(Files(path, folder), column, int(threads))
    for request in sys.stdin:
        if request.strip() == "run":
            started = time.perf_counter()
            images = peer.run()
            answer = {"images_per_s": images / (time.perf_counter() - started)}
        else:
            views = peer.sample()
            answer = {"levels": None if views is None else levels_of(views)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
