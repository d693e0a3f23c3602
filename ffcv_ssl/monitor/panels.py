"""Which keys of the metrics go together into one panel, and what they are called there.

A panel is shown if a run has one of its keys. A key that no panel knows, such as one of a user's
own method, gets a panel with its like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Panel:
    """A panel of the page."""

    ident: str
    title: str
    pattern: str
    """Of the whole key; its groups, joined by a space, are the key's label; none: it needs none."""
    about: str = ""
    """One sentence below the title, for who does not know the number."""
    unit: str = ""
    """Of the y axis; `%` for shares in [0, 1]."""
    can_be_log: bool = False
    is_step: bool = False
    """Whether values hold until the next one."""
    whole: str = "network"
    """The label of a key whose groups are empty: of fine-tuning, which has no depths."""


PANELS = (
    Panel(
        "probes", "Probe top-1 by depth", r"val/(?:(?!knn/)([^/]+)/)?top1",
        "Linear probes on validation images.", unit="%",
    ),
    Panel("knn", "k-NN on the backbone", r"val/knn/(.+)", "On validation images.", unit="%"),
    Panel("loss", "Loss and its terms", r"train/loss(?:/(.+))?", can_be_log=True, whole="loss"),
    Panel(
        "rank", "Rank of the embeddings", r"health/(?:([^/]+)/)?(effective_rank|rankme)",
        "How many directions they use; a fall is a collapse.",
    ),
    Panel(
        "spread", "Spread of the embeddings", r"health/(?:([^/]+)/)?std",
        "Standard deviation; 0 is a collapse.",
    ),
    Panel(
        "sphere", "Alignment and uniformity", r"health/(?:[^/]+/)?(alignment|uniformity)",
        "Lower is better: views of an image close, images far apart.",
    ),
    Panel("lr", "Learning rate", r"lr", can_be_log=True),
    Panel("speed", "Images per second", r"train/images_per_s", unit="images/s"),
    Panel(
        "waits", "Waits", r"train/(\w+)_wait", "Share of the time that steps wait for it.", unit="%"
    ),
    Panel("train_probes", "Probe top-1 on training views", r"train/(?:([^/]+)/)?top1", unit="%"),
    Panel("probes_top5", "Probe top-5 by depth", r"val/(?:(?!knn/)([^/]+)/)?top5", unit="%"),
    Panel("resolution", "Resolution", r"resolution", unit="px", is_step=True),
    Panel("memory", "Peak memory", r"train/peak_memory_mib", unit="MiB"),
)  # fmt: skip
_COMPILED = [(panel, re.compile(panel.pattern)) for panel in PANELS]
MAX_OTHER_PANELS = 24


def arrange(keys: Iterable[str]) -> list[dict[str, Any]]:
    """The panels of some keys, in order, as {id, title, about, unit, log, step, keys}.

    keys: [{key, label}], the most important one first.
    """
    of_panels: dict[str, dict[str, Any]] = {}
    for key in keys:
        panel, label = _place(key)
        shown = of_panels.setdefault(panel.ident, {**_described(panel), "keys": []})
        shown["keys"].append({"key": key, "label": label})
    for shown in of_panels.values():
        shown["keys"].sort(key=lambda one: _importance(one["key"], one["label"]))
    order = [panel.ident for panel in PANELS]
    known = [of_panels[ident] for ident in order if ident in of_panels]
    others = sorted(set(of_panels) - set(order))
    return known + [of_panels[ident] for ident in others[:MAX_OTHER_PANELS]]


def _place(key: str) -> tuple[Panel, str]:
    """(the panel of a key, the key's label in it)."""
    for panel, pattern in _COMPILED:
        if match := pattern.fullmatch(key):
            label = " ".join(part for part in match.groups() if part)
            return panel, label or (panel.whole if match.groups() else "")
    room, _, rest = key.rpartition("/")
    return Panel(f"other/{room or key}", room or key, ""), rest or key


def _described(panel: Panel) -> dict[str, Any]:
    return {
        "id": panel.ident, "title": panel.title, "about": panel.about, "unit": panel.unit,
        "log": panel.can_be_log, "step": panel.is_step,
    }  # fmt: skip


def _importance(key: str, label: str) -> tuple[Any, ...]:
    """The backbone, whole losses and waits for data come first; numbers in names count."""
    is_first = label in ("loss", "data", "top1") or "backbone" in key.split("/")
    numbered = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label)]
    return (not is_first, [(isinstance(part, str), part) for part in numbered])
