"""Studies: protocols over several checkpoints, datasets or seeds, each in a module."""

from __future__ import annotations

from ffcv_ssl.evaluation.commands import find_commands

STUDIES = find_commands(__name__, __path__)
