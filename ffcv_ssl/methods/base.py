"""What a method is: a loss with its settings, heads and teachers, and hooks into a step.

A step of the trainer, in order (all calls on every rank):

    method.before_step(progress, optimizer)          schedules
    features of all views: backbone, projector, method.add_heads(outputs)
    method.targets(views of target_views)            without gradients; a teacher's
    loss, terms = method.loss(outputs, labels)       of the global batch, in float32
    gradients
    method.after_backward(progress)                  frozen layers
    clipping, the optimizer's step
    method.after_update(model, progress)             moving averages, queues

Shapes: B images per batch, V views, D features, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World

Features = dict[str, torch.Tensor]
"""Of one view, by name: `backbone`, `projector_1`... `embedding` (the last depth), (B, D) each, and
what heads and targets add."""

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A scalar loss, and its named terms for the log."""


_RECIPES = ((2, "simclr"), (3, "instance"), (1, "supervised"))
"""(number of views, a recipe that has so many), to name one in a message."""


class Method(nn.Module, ABC):
    """A loss with the heads and teachers it needs. Subclasses override what differs.

    It is a module: its parameters are trained, and all its parameters and buffers are in the
    checkpoint. config: the run's. model: the Model that is trained, (views) -> outputs; it is not
    part of the method. num_classes: of the training file, 0 without labels.
    """

    group: ClassVar[str] = ""
    """Name of the method's settings in YAML files and on the command line: `group.key`."""
    Settings: ClassVar[type | None] = None
    """A frozen dataclass, all of its fields with defaults; a field's docstring is its --help. None:
    the method has no settings."""
    min_views: ClassVar[int] = 2
    max_views: ClassVar[int] = 2
    min_batch: ClassVar[int] = 1
    """Fewest images in the global batch: 2 for a loss that compares images with one another."""
    needs_labels: ClassVar[bool] = False
    """Whether the training file must have labels."""
    target_views: tuple[int, ...] | None = None
    """Numbers of the views that `targets` is called with; None: all of them."""

    def __init__(self, config: Any, model: Model, num_classes: int, world: World) -> None:
        super().__init__()
        self.config, self.world = config, world

    @classmethod
    def check_views(cls, num_views: int) -> None:
        """Raise UserError for a number of views that the method cannot train on."""
        if not cls.min_views <= num_views <= cls.max_views:
            low, high = cls.min_views, cls.max_views
            expected = f"{low}" if low == high else f"{low} to {high}"
            fitting = [name for number, name in _RECIPES if low <= number <= high]
            remedy = f"; give --views.recipe {fitting[0]}" if fitting else ""
            raise UserError(
                f"views: got a recipe of {num_views} views, expected {expected} for {cls.__name__}"
                f"{remedy}"
            )

    @classmethod
    def check_sizes(cls, num_views: int, batch_size: int) -> None:
        """Raise UserError for a number of views, or images of the global batch, that the method
        can learn nothing from."""
        cls.check_views(num_views)
        if batch_size < cls.min_batch:
            raise UserError(
                f"data.batch_size: got {batch_size} for {cls.__name__}, expected at least "
                f"{cls.min_batch}: its loss compares images of a batch; raise it, or "
                f"labelled.unsupervised_batch_size: --data.batch_size {max(2, cls.min_batch)}"
            )

    @property
    def settings(self) -> Any:
        """The run's values of `Settings`."""
        return getattr(self.config, self.group)

    def add_heads(self, outputs: list[Features]) -> None:
        """Add the outputs of heads to the features of each view; part of the forward pass."""

    def targets(self, views: list[torch.Tensor]) -> list[Features]:
        """Features without gradient for each of `views`, those of `target_views`; they are added to
        the view's other features. views: (B of this rank, 3, H, W) each."""
        return [{} for _ in views]

    @abstractmethod
    def loss(self, outputs: list[Features], labels: torch.Tensor | None) -> Loss:
        """The loss of the global batch, and its named terms for the log, all scalars.

        outputs: features of V views of this rank's images; labels: (B of this rank,), -1: none.
        Called once per step, outside autocast. Every rank must return the same number: gather what
        the loss needs with `all_gather`, or take the mean of the ranks' parts with `world.mean`.
        """

    def before_step(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step: the place for schedules. progress in [0, 1) is the share of the
        run that is done. The learning rates are set already; weight decay may be changed with
        `set_weight_decay`. Nothing done here is saved: make it a function of `progress`."""

    def after_backward(self, progress: float) -> None:
        """Called when all gradients exist (unscaled in fp16), before clipping and the
        optimizer's step. To freeze a layer, set its parameters' `grad` to None here."""

    def after_update(self, model: nn.Module, progress: float) -> None:
        """Called after each step of the optimizer; progress in (0, 1]."""

    def modules_in_eval(self) -> Iterable[nn.Module]:
        """Modules of the method that stay in evaluation mode when the others train."""
        return ()

    def train(self, mode: bool = True) -> Method:
        """Set the mode of all modules, except `modules_in_eval`."""
        super().train(mode)
        for module in self.modules_in_eval():
            module.eval()
        return self

    def constant_lr(self) -> dict[nn.Module, float]:
        """{module with a constant learning rate: the rate, as a multiple of the others' peak}."""
        return {}

    def extra_flops(self, sides_px: list[int]) -> int:
        """Floating-point operations per image, for views with these sides, in addition to those of
        the trained model and the heads: a teacher's."""
        return 0

    def all_gather(self, outputs: list[Features], name: str = "embedding") -> torch.Tensor:
        """The features `name` of all these views and all ranks, (V, B, D). Gradients flow."""
        return self.world.gather(stack(outputs, name), dim=1)


def stack(outputs: list[Features], name: str = "embedding") -> torch.Tensor:
    """The features `name` of all these views, (V, B of this rank, D)."""
    return torch.stack([features[name] for features in outputs])


def apply_head(head: nn.Module, outputs: list[Features], name: str) -> None:
    """Add head(embedding) to each view's features as `name`. All views share one pass, and so they
    share batch-norm's statistics."""
    if outputs:
        rows = [len(features["embedding"]) for features in outputs]
        joined = head(torch.cat([features["embedding"] for features in outputs]))
        for features, result in zip(outputs, joined.split(rows)):
            features[name] = result
