"""Where the ranks of a start meet: the launcher's store, and a part of it for this start alone."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import Any

import torch.distributed as dist

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import LostRank


def reach_launcher(patience: datetime.timedelta) -> dist.Store:
    """The store of torchrun, or else of the first rank, which waits here for all others. Raises
    LostRank where it, or one of the others, is not there in time."""
    try:
        return next(dist.rendezvous("env://", timeout=patience))[0]
    except RuntimeError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        waited = f"within {patience.total_seconds():g} s"
        raise LostRank(
            f"ranks did not meet at {at} {waited} ({one_line(error)}); see the logs of all ranks, "
            "and start again"
        ) from error


def meet(store: Any, rank: int, size: int, patience_s: float) -> dist.Store:
    """A part of `store` (torch.distributed.Store) that only the ranks of this start write to.

    torchrun keeps one store over all its restarts. The store still holds the addresses of killed
    ranks; gloo would connect to these addresses, and fail or wait for ever. So the first rank
    numbers each start and gives the number to every rank that asks with a token of its own. A dead
    rank's token is never answered. Raises LostRank for a rank that does not come.
    """
    deadline = time.monotonic() + patience_s
    if rank == 0:
        start = f"start/{store.add('start', 1)}"
        for other in range(1, size):
            while not store.check([f"{start}/here/{other}"]):
                if time.monotonic() > deadline:
                    raise _not_come(other, size, patience_s)
                if store.check([f"token/{other}"]):
                    token = store.get(f"token/{other}").decode()
                    store.set(f"answer/{token}", start)
                time.sleep(0.01)
    else:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        while not store.check([f"answer/{token}"]):
            if time.monotonic() > deadline:
                raise _not_come(0, size, patience_s)
            time.sleep(0.01)
        start = store.get(f"answer/{token}").decode()
        store.set(f"{start}/here/{rank}", "")
    return dist.PrefixStore(start, store)


def _not_come(rank: int, size: int, patience_s: float) -> LostRank:
    return LostRank(
        f"rank {rank} of {size} did not come to the start within {patience_s:g} s; see its log and "
        "its machine, and start again"
    )
