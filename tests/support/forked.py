"""Processes that start at once: forks of a server that has imported the trainer.

Importing it anew in each process takes several seconds, longer than what most tests do in it.
"""

import multiprocessing
import os
import sys

import torch.multiprocessing

import train

PRELOADED = ["train", "torchvision", "torch._dynamo", "pytest"]
multiprocessing.set_forkserver_preload(PRELOADED)


def start_ranks(function, arguments, size):
    """Call function(rank, *arguments) in a process each and wait for them; raises what they
    raise."""
    torch.multiprocessing.start_processes(function, arguments, size, start_method="forkserver")


class Training:
    """train.py with these arguments in a process; `stdout`: the lines it prints."""

    def __init__(self, arguments):
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(sender, arguments))
        self.process.start()
        sender.close()
        self.stdout = os.fdopen(os.dup(receiver.fileno()))
        receiver.close()

    def kill(self):
        """End it by SIGKILL."""
        self.process.kill()
        self.wait()

    def wait(self, timeout_s=300):
        """Read its output to the end; returns the exit code, None if it still runs."""
        with self.stdout:
            self.stdout.read()
        self.process.join(timeout_s)
        return self.process.exitcode


def _train(sender, arguments):
    os.dup2(sender.fileno(), sys.stdout.fileno())
    sender.close()  # the reader sees the end of the file when this process ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(train.main(arguments))
