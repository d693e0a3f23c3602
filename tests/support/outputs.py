"""Files in place of stdout that take nothing."""

import os


def full_stdout():
    """As with `> /dev/full`: every write fails."""
    return open("/dev/full", "w")


def closed_stdout():
    """As with `| head` once it has read enough: nobody reads what is written."""
    receiver, sender = os.pipe()
    os.close(receiver)
    return os.fdopen(sender, "w")
