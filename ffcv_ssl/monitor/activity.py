"""Whether a run is running, finished or interrupted, without touching it.

A training command holds the lock of its folder. The kernel lists the locks of this machine; to try
the lock instead could make a run fail that starts at this moment.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ffcv_ssl.training.metrics_log import METRICS_FILE

RUNNING, FINISHED, INTERRUPTED, EMPTY = "running", "finished", "interrupted", "no records yet"
LOCK_FILE, CHECKPOINT = ".lock", "checkpoint.pt"
BACKBONE, FINETUNED = "backbone.safetensors", "finetuned.safetensors"
_LOCKS, _MOUNTS = "/proc/locks", "/proc/self/mountinfo"
_FAR = ("nfs", "cifs", "smb", "lustre", "fuse", "9p", "ceph", "beegfs", "gpfs", "afs", "virtiofs")
_PATIENCE_S = 60.0
"""A run whose lock cannot be seen counts as running this long after its last record, at least."""


def state_of(folder: Path, epoch: float | None, epochs: float | None, interval_s: float) -> str:
    """One of the four words above.

    epoch: of the last record, None without records; epochs: that the run is going to have, if
    known; interval_s: seconds between its last two records, NaN if unknown.
    """
    if is_held(folder / LOCK_FILE):
        return RUNNING
    if (folder / FINETUNED).exists():
        return FINISHED
    has_backbone = (folder / BACKBONE).exists()
    if has_backbone and epochs is None:
        return FINISHED
    # a copy of a run may have come without its large files
    is_whole = has_backbone or not (folder / CHECKPOINT).exists()
    if is_whole and epochs and epoch is not None and epoch >= epochs - 1e-6:
        return FINISHED
    if not _shows_its_lock(folder) and _is_fresh(folder, interval_s):
        return RUNNING
    return EMPTY if epoch is None else INTERRUPTED


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds a lock file."""
    try:
        inode = os.stat(path).st_ino
        lines = Path(_LOCKS).read_text().splitlines()
    except (OSError, ValueError):
        return False
    return any(line.split()[5].endswith(f":{inode}") for line in lines if " FLOCK " in line)


def _shows_its_lock(folder: Path) -> bool:
    """Whether a run that trains in a folder would be seen by its lock, wherever it runs: on a disk
    of the network another machine may hold it."""
    if not (folder / LOCK_FILE).exists() or not os.access(_LOCKS, os.R_OK):
        return False
    try:
        device = os.stat(folder).st_dev
        mounts = Path(_MOUNTS).read_text().splitlines()
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2] for line in mounts if line.split()[2] == name]
    return bool(kinds) and not kinds[0].startswith(_FAR)


def _is_fresh(folder: Path, interval_s: float) -> bool:
    try:
        age_s = time.time() - (folder / METRICS_FILE).stat().st_mtime
    except OSError:
        return False
    return age_s < max(_PATIENCE_S, 3 * interval_s)  # of a NaN, max takes the first
