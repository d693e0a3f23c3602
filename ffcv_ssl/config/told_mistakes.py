"""A mistake of the user under torchrun: reported once, and not again at each restart.

torchrun starts its ranks again after any failure (`--max_restarts`), but a mistake in the settings
does not go away. The rank that finds it leaves a mark, an empty file named after this torchrun; the
ranks of later starts see the mark and end before they import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

KEPT_S = 24 * 3600
"""Marks that are older are removed: their torchrun has long ended."""


def mark_mistake() -> None:
    """Leave the mark, where torchrun would start this rank again."""
    mark = _mark()
    if mark is None:
        return
    with contextlib.suppress(OSError):
        mark.parent.mkdir(mode=0o700, exist_ok=True)
        for other in mark.parent.glob("mistake-*"):
            if time.time() - other.stat().st_mtime > KEPT_S:
                other.unlink()
        mark.touch(mode=0o600)


def is_told() -> bool:
    """Whether an earlier start under this torchrun has reported a mistake of the user."""
    mark = _mark()
    if mark is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    with contextlib.suppress(OSError):
        return mark.stat().st_uid == os.geteuid()  # and not another user's
    return False


def _mark() -> Path | None:
    """The mark of the torchrun that has started this process; None where it restarts nothing."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    launcher = os.getppid()
    started = ""
    with contextlib.suppress(OSError, IndexError):  # no /proc: the process id has to do
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    about = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {launcher} {started}"
    name = f"mistake-{hashlib.sha256(about.encode()).hexdigest()[:24]}"
    return Path(tempfile.gettempdir(), f"ffcv_ssl-{os.geteuid()}", name)
