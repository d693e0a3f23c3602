"""The monitor's live page, served in a thread of this process."""

import contextlib
import threading

from ffcv_ssl.monitor import serve
from ffcv_ssl.monitor.board import Board


@contextlib.contextmanager
def serving(*paths):
    """A server of the board of some runs."""
    with serve.Server(Board(paths), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
