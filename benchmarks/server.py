"""Runs one peer in its own process group, which is stopped while other peers are measured.

After a run, a peer's threads and worker processes keep working or spinning. In one process the
peers would halve each other's rates. So each peer has its own processes; SIGSTOP stops them until
the peer's turn.

    python -m benchmarks.server PEER COLUMN FILE.beton FOLDER THREADS

reads "run" or "sample" from stdin, line by line, and answers with JSON lines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class PeerProcess:
    """The parent's handle: `run()` -> images/s, `sample()` -> `levels_of` some views,
    `close()`."""

    def __init__(self, name: str, column: str, path: str, folder: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.server", name, column, path, folder]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, str(threads)], start_new_session=True, **pipes)
        self.name = name
        self._stopped = False

    def _signal(self, number):
        os.killpg(self.process.pid, number)

    def ask(self, request: str) -> dict:
        """Continue the process group, send the request, and stop the group again."""
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

    def run(self) -> float:
        """images/s of one pass."""
        return self.ask("run")["images_per_s"]

    def sample(self) -> list[float] | None:
        """`levels_of` some views; None for a peer without views."""
        return self.ask("sample")["levels"]

    def close(self) -> None:
        """Kill the process group."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def levels_of(views: np.ndarray) -> tuple[float, float, float]:
    """Mean and standard deviation of all values, and the standard error of the mean over views."""
    means = views.mean((1, 2, 3))
    return float(views.mean()), float(views.std()), float(means.std() / len(means) ** 0.5)


def serve(name: str, column: str, path: str, folder: str, threads: str) -> None:
    """Answer requests until stdin ends."""
    from benchmarks.peers import PEERS
    from benchmarks.photographs import Files

    (peer_class,) = [peer for peer in PEERS if peer.name == name]
    peer = peer_class()
    peer.setup(Files(path, folder), column, int(threads))
    for request in sys.stdin:
        if request.strip() == "run":
            started = time.perf_counter()
            images = peer.run()
            answer: dict = {"images_per_s": images / (time.perf_counter() - started)}
        else:
            views = peer.sample()
            answer = {"levels": None if views is None else levels_of(views)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
