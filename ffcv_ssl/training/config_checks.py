"""What train.py's settings owe one another, and the training file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.machine_choice import fitting_batch, fitting_warmup
from ffcv_ssl.training.run_data import RunData
from ffcv_ssl.training.world import World


def check_run(config: Any, method_class: Callable[[str], Any]) -> None:
    """Raise UserError for settings of a run that do not go together. config: the trainer's;
    method_class: the class of a method by its name."""
    if config.out is not None and not config.out.strip():
        raise UserError(f"out: got {config.out!r}, expected a folder; leave it out for runs/NAME")
    warmup, epochs, num_views = config.optim.warmup_epochs, config.epochs, config.labelled.num_views
    if warmup >= epochs:
        raise UserError(
            f"optim.warmup_epochs: got {warmup}, expected less than epochs ({epochs}); give "
            f"--optim.warmup_epochs {fitting_warmup(epochs):g}"
        )
    views, method = config.views.resolve(), method_class(config.method)
    if config.unlabelled_batch_size:
        method.check_sizes(len(views), config.unlabelled_batch_size)
    if num_views > len(views):
        raise UserError(f"labelled.num_views: got {num_views}, but the run has {len(views)} views")
    for name, view in views.items():
        if view.crop != "random" and config.resolution.min < config.resolution.max:
            raise UserError(
                f"views.{name}.crop: got {view.crop}, expected random where resolution.min is "
                "below resolution.max; make them equal"
            )


def check_labels(config: Any, method: Any, train: RunData) -> None:
    """Raise UserError where the training file has no labels, but the run needs them."""
    needs_labels = method.needs_labels or config.labelled.loss != "none"
    if needs_labels and train.labels is None:
        raise UserError(
            f"{train.path}: no labels in field '{config.data.label_field}', but method "
            f"{config.method} with labelled.loss {config.labelled.loss} needs them"
        )


def check_enough_images(train: RunData, batch: int, steps_per_epoch: int, world: World) -> None:
    """Raise UserError where an epoch has no step, because a `batch` of all ranks has more images
    than the training file."""
    if steps_per_epoch:
        return
    fitting = fitting_batch(batch, train.num_samples, world.size)
    remedy = f"give --data.batch_size {fitting}"
    if fitting > train.num_samples:
        remedy = "write a file with more images"
    raise UserError(
        f"{train.path}: got {train.num_samples} samples, expected at least one batch of {batch}; "
        f"{remedy}"
    )
