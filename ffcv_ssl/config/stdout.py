"""What a command prints on stdout: a full disk, or a pipe that nobody reads any more (`| head -1`).

Neither is a bug of the command: a full one is one line on stderr, a closed one ends it quietly.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import remedy_for


@contextlib.contextmanager
def printing(done: str = "") -> Iterator[None]:
    """Print within the block; at its end all is flushed.

    done: what is done all the same, for the end of the line. Raises UserError where stdout takes no
    more, BrokenPipeError where nobody reads it; what is printed later is dropped.
    """
    try:
        yield
        if sys.stdout is not None:  # it is None in a process that was started without one
            sys.stdout.flush()
    except OSError as error:
        _drop_rest()
        if isinstance(error, BrokenPipeError):
            raise
        reason = error.strerror or error
        raise UserError(
            f"stdout: cannot be written ({reason}){done}; {remedy_for(error)}"
        ) from None


def say(text: str, end: str = "\n") -> None:
    """Print a text at once. Raises what `printing` raises."""
    with printing():
        print(text, end=end)


def show(text: str) -> None:
    """Print a text at once, such as help; a reader that has read enough of it is no failure."""
    with contextlib.suppress(BrokenPipeError):
        say(text)


def say_if_possible(text: str) -> None:
    """Print a text at once. Where stdout takes no more, stderr says so once, and the work goes on
    without its lines: a terminal that is closed costs no training."""
    try:
        with printing():
            print(text)
    except (UserError, BrokenPipeError) as error:
        reason = error if isinstance(error, UserError) else "stdout: nobody reads it any more"
        with contextlib.suppress(OSError):
            print(f"{one_line(reason)}; the work goes on without its lines", file=sys.stderr)


def has_told(command: str, done: str, show: Callable[[], object]) -> bool:
    """Print the result of a command whose work is done; show() prints it.

    Returns False where stdout takes no more, after a line on stderr that says `done`. A pipe that
    nobody reads is no failure.
    """
    try:
        with printing(f"; {done}"):
            show()
    except BrokenPipeError:
        return True
    except UserError as error:
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return False
    return True


def flush_or_drop() -> None:
    """Flush what a command has printed before it ends; where nobody reads it, drop it. Without this
    the interpreter would complain of it, with an exit code of its own. Raises UserError."""
    with contextlib.suppress(BrokenPipeError), printing():
        pass


def _drop_rest() -> None:
    """Let the rest go nowhere: the interpreter flushes stdout at its end, and would complain."""
    with contextlib.suppress(OSError, ValueError):  # stdout may be no file of the system
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
