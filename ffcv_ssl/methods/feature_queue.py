"""Features of past batches, for losses that need more of them than a batch has."""

from __future__ import annotations

import torch
from torch import nn

from ffcv_ssl.methods.numeric import unit_rows


class FeatureQueue(nn.Module):
    """The last K rows (K, D) that were pushed, in float32; a new row replaces the oldest one.

    It starts with random unit rows (He et al. 2020). Its content is in the checkpoint. All ranks
    must push the same rows, those of the global batch. Then all queues are equal, and ranks need
    not exchange them.
    """

    rows: torch.Tensor
    position: torch.Tensor
    equal_on_all_ranks = ("rows", "position")

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", unit_rows(torch.randn(size, width)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # of the oldest row

    @torch.no_grad()
    def push(self, rows: torch.Tensor) -> None:
        """Replace the oldest rows by these (N, D). If N > K, the last K of them stay."""
        size = len(self.rows)
        skipped = max(0, len(rows) - size)
        rows = rows[skipped:].detach().float()
        places = self.position + skipped + torch.arange(len(rows), device=self.rows.device)
        self.rows.index_copy_(0, places % size, rows)
        self.position.add_(skipped + len(rows)).remainder_(size)
