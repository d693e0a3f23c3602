"""A slow copy of the trained model, whose weights are a moving average of the model's."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import nn

from ffcv_ssl.training.meters import flops_per_image
from ffcv_ssl.training.optimizers import move_average_


class EMATeacher(nn.Module):
    """teacher <- m teacher + (1 - m) model, for the weights; buffers are the teacher's.

    In training mode its batch-norm uses the statistics of its own batches; a method whose teacher
    stays in evaluation mode lists it in `modules_in_eval`. schedule: `constant`, m is `momentum`;
    `cosine`: m grows from `momentum` to 1 (Grill et al. 2020). Its state dict has the model's keys.
    """

    compiled_apart = True  # it is not part of the learner's forward pass

    def __init__(
        self,
        model: nn.Module,
        momentum: float,
        schedule: Literal["constant", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.stage_widths = {}  # type: ignore[assignment]  # nobody asks a teacher for them
        self.momentum, self.schedule = momentum, schedule
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    @torch.no_grad()
    def forward(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """V views (B, 3, H, W) -> the embedding (B, D) of each."""
        last = self.model.last
        return [features[last] for features in self.model(views)]

    def momentum_at(self, progress: float) -> float:
        """The momentum m at `progress` (0 to 1) of the run."""
        if self.schedule == "constant":
            return self.momentum
        return 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2

    def move(self, model: nn.Module, progress: float) -> None:
        """Move the teacher towards the model; called after each update of the model."""
        move_average_(self.model, model, self.momentum_at(progress))

    def flops(self, sides_px: list[int]) -> int:
        """Floating-point operations per image, for views of these sides."""
        return flops_per_image(self.model, sides_px, backward=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's, under the model's own keys."""
        return self.model.state_dict(*args, **kwargs)


def _add_model_prefix(module: nn.Module, state: dict, prefix: str, *args: Any) -> None:
    """Turn the keys of `EMATeacher.state_dict` into the keys that loading expects, in place."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}model.{key.removeprefix(prefix)}"] = state.pop(key)
