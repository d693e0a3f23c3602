"""How a command ends: exit codes, signals that ask it to stop, one line for a user's mistake.

A user's mistake gives one line on stderr and exit code 2; an interrupted command exits with 75. A
rank that fails while it is connected to other ranks ends its process at once. It does not
disconnect first: that would wait for ranks that may be waiting for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ffcv_ssl.config import told_mistakes
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.stdout import has_told
from ffcv_ssl.errors import (
    BetonError,
    CheckpointError,
    LostRank,
    NonFiniteLoss,
    ToldBefore,
    UserError,
)
from ffcv_ssl.training import world
from ffcv_ssl.training.console import ERASE
from ffcv_ssl.training.memory import what_ran_out

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75

exit_process: Callable[[int], Any] = os._exit
"""Ends a rank that is still connected to others; a Slurm job's task replaces it by its own."""

has_own_log = False
"""Whether each rank writes to a log of its own, as the tasks of a Slurm job do."""


class StopSignal:
    """Within its context, `asked` turns true when SIGTERM, SIGINT or SIGUSR2 arrives.

    Slurm sends SIGUSR2 some time before it ends a job. `received` lists the signals in their order.
    Signals after the first are only noted, so that they cannot break the orderly stop. But a second
    SIGINT (Ctrl-C twice) interrupts at once, as without this class. A nested context knows the
    signals of the outer context, and passes its own signals on to it. At the end the former
    handlers are restored. Python handles signals in the main thread alone: in another one, as a
    notebook may use, nothing is listened to.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.former: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> StopSignal:
        outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(outer, StopSignal):
            self.received = outer.received
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self.SIGNALS:
            self.former[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame):
        if not self.received:
            # not print: the signal may interrupt another print
            start = ERASE.encode() if os.isatty(2) else b""  # of a live line
            os.write(2, start + b"stopping after this step; the run can be resumed\n")
        self.received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, self.former[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


def run_ranks(run: Callable[[Sequence[str]], tuple[int, Any]], argv: Sequence[str]) -> int:
    """Call run(argv) -> (exit code, summary) in each rank of a command, and return the exit code.

    The first rank prints the summary as JSON. A user's mistake gives one line on stderr and exit
    code 2; a loss that is not finite, and a rank that does not answer, one line and exit code 1. If
    this rank is still connected to others when it fails, the process ends here, so that torchrun or
    Slurm ends the other ranks.
    """
    if told_mistakes.is_told():
        return EXIT_USER_ERROR
    try:
        code, summary = run(argv)
    except ToldBefore:
        return EXIT_USER_ERROR
    except (UserError, NonFiniteLoss, LostRank, BetonError, CheckpointError) as error:
        code = 1 if isinstance(error, NonFiniteLoss | LostRank) else EXIT_USER_ERROR
        return _say_and_end(one_line(error), code)
    except BaseException as error:
        if (found := what_ran_out(error)) is not None:
            line = f"{found[0]}: out of memory{found[1]}; lower the batch size or the resolution"
            return _say_and_end(line, EXIT_USER_ERROR)
        if (lost := world.explain_loss(error)) is not None:
            return _say_and_end(lost, 1)
        if world.is_connected():
            _end_process(1, traceback.format_exc())
        raise
    if os.environ.get("RANK", "0") == "0":
        is_told = has_told("summary", "all is saved", lambda: print(json.dumps(summary)))
        code = code if is_told else code or EXIT_USER_ERROR
    if world.was_connected() and exit_process is os._exit:
        _end_finished_rank(code)
    return code


def _end_finished_rank(code: int) -> None:
    """End a rank that is done without Python's clean-up: threads of gloo and of the store that
    outlive their interpreter can abort the process (exit code 134) when all is long saved."""
    sys.stdout.flush()
    sys.stderr.flush()
    exit_process(code)


def _say_and_end(line: str, code: int) -> int:
    """Say in one line why this rank fails, and end the process if it is connected to others."""
    if code == EXIT_USER_ERROR:
        told_mistakes.mark_mistake()
    if world.is_connected():
        _end_process(code, line)
    if world.tell_before_meeting(line, is_mistake=code == EXIT_USER_ERROR):
        print(line, file=sys.stderr)
    return code


def _end_process(code: int, text: str) -> None:
    """Say why, unless another rank has said the same here, and end without any clean-up."""
    if world.tell_first(text, is_mistake=code == EXIT_USER_ERROR) or has_own_log:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    exit_process(code)
