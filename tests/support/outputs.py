"""Files in place of stdout that take nothing."""

import io
import os


def full_stdout(is_buffered=True):
    """As with `> /dev/full`: every write fails; without a buffer (`python -u`) even of no text."""
    if is_buffered:
        return open("/dev/full", "w")
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)


def closed_stdout():
    """As with `| head` once it has read enough: nobody reads what is written."""
    receiver, sender = os.pipe()
    os.close(receiver)
    return os.fdopen(sender, "w")
