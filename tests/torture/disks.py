"""Disks: full, slow, replaced under a run; clocks set back; two runs in one folder."""
