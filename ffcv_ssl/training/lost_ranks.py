"""A rank that does not answer: named in one line, instead of what gloo says of an address.

When a call between ranks fails, every rank that is still there writes so to the store that all of
them met in. The ranks that do not are lost: stopped, hanging, or on a machine that is gone.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_BETWEEN_RANKS = re.compile(r"gloo|nccl|c10d|tcpstore|\bstore\b|\branks?\b", re.IGNORECASE)
_SILENT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_ENDED = re.compile(r"connection (was )?(closed|reset)|broken pipe|recv, 0 bytes", re.IGNORECASE)
SILENT_GRACE_S, ENDED_GRACE_S, STORE_PATIENCE_S = 20.0, 2.0, 10.0
"""How long the others have to write that they are there. They give up about when this rank does;
where a process has ended, the others notice it at once. And how long the store has to answer."""
AGAIN = "run the same command again to continue"
T = TypeVar("T")


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is silent or has ended: one of gloo, of NCCL or of
    the store that ranks meet in."""
    text = str(error)
    is_between = isinstance(error, dist.DistError) or _BETWEEN_RANKS.search(text) is not None
    says_so = _ENDED.search(text) or _SILENT.search(text)
    return isinstance(error, RuntimeError) and is_between and says_so is not None


def explain(
    error: BaseException, store: Any, rank: int, size: int, patience_s: float
) -> str | None:
    """The line that says which ranks were lost, for an error of a call between ranks; None for any
    other error.

    store: torch.distributed.Store of this start. patience_s: how long the call waited.
    """
    if not is_loss(error):
        return None
    is_ended = _ENDED.search(str(error)) is not None
    grace_s = ENDED_GRACE_S if is_ended else min(SILENT_GRACE_S, patience_s)
    lost = _silent_ranks(store, rank, size, grace_s)
    waited = f"for {patience_s:g} s"
    if lost is None:
        return f"the machine that ranks meet on does not answer ({size} ranks); {AGAIN}"
    if not lost:
        return f"{size} ranks waited {waited} for one another, though all are there; {AGAIN}"
    names = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} of {size}"
    if is_ended:
        # a rank that does not talk to the one that ended may still wait for another
        names = names if len(lost) == 1 else f"at least one of {names}"
        return f"{names} ended before the others; its own lines say why; {AGAIN}"
    return f"{names} did not answer {waited}: stopped, or its machine is lost; end it and {AGAIN}"


def _silent_ranks(store: Any, rank: int, size: int, grace_s: float) -> list[int] | None:
    """The ranks that do not write to the store that they are there; None where the store itself
    does not answer."""

    def ask() -> list[int]:
        store.set(f"alive/{rank}", "")
        others = set(range(size)) - {rank}
        deadline = time.monotonic() + grace_s
        while others and time.monotonic() < deadline:
            others -= {other for other in others if store.check([f"alive/{other}"])}
            time.sleep(0.05)
        return sorted(others)

    return answer_of(ask, grace_s)


def answer_of(ask: Callable[[], T], seconds: float = 0) -> T | None:
    """What `ask`, which calls a store and may take `seconds` besides, returns; None where the store
    does not answer: the process that holds it has ended, or is stopped and its calls never end."""
    answers: list[T] = []

    def ask_quietly() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=ask_quietly, daemon=True)
    thread.start()
    thread.join(seconds + STORE_PATIENCE_S)
    return answers[0] if answers else None
