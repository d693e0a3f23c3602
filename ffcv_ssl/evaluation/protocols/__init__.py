"""Protocols that measure one checkpoint, each in the module of its name."""

from __future__ import annotations

from ffcv_ssl.evaluation.commands import find_commands

PROTOCOLS = find_commands(__name__, __path__)
