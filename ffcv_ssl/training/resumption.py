"""Pretraining runs that go on: settings that may differ, and more epochs (`--extend`).

An extended run goes on as one that was planned for the new number of epochs: learning rate, EMA
momentum and all that depends on the share of the run that is done are drawn anew over all epochs,
old and new. At the end of the first part the learning rate is small; it jumps up to where the new
cosine is at this step, and ends where it always does. That is a pure function of step and epochs,
so an extended run resumes as any other, and may be extended again. A warm-up that was made to fit
into the old epochs is made to fit into the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ffcv_ssl.errors import UserError
from ffcv_ssl.training import runtime
from ffcv_ssl.training.optimizers import lr_at
from ffcv_ssl.training.run_folder import CHECKPOINT, RunFolder
from ffcv_ssl.training.world import World

# (The labels' file may move: the state of the labelled stream holds which labels were chosen.
# init_digest is what the run itself has recorded.)
FREE_KEYS = (
    *runtime.FREE_KEYS, "data.batches_ahead", "labelled.labels.file", "probes.train", "probes.val",
    "evaluation.health", "extend", "init_digest",
)  # fmt: skip
FREE_GROUPS = (*runtime.FREE_GROUPS, "checkpoint.")


def free_settings(
    config: Any, other_groups: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys, groups) of the settings that a resumed run may change. other_groups: settings of
    methods that the run does not use."""
    keys = (*FREE_KEYS, "epochs", "optim.warmup_epochs") if config.extend else FREE_KEYS
    return keys, (*FREE_GROUPS, *(f"{group}." for group in other_groups))


def begin_extension(
    folder: RunFolder, saved: dict[str, Any], config: Any, steps_per_epoch: int, world: World
) -> None:
    """Note in the folder, and say, that a run goes on from `saved` with more epochs; nothing where
    `config` has the checkpoint's epochs. Raises UserError for a run that is not finished, for fewer
    epochs, and for another warm-up without more of them."""
    before, now, step = saved["config"]["epochs"], config.epochs, saved["step"]
    warmup, new_warmup = saved["config"]["optim"]["warmup_epochs"], config.optim.warmup_epochs
    path = folder.path / CHECKPOINT
    if before == now and warmup == new_warmup:
        return
    if before == now:
        raise UserError(
            f"{path}: got optim.warmup_epochs {new_warmup:g}, expected {warmup:g} as in the "
            f"checkpoint, whose {before} epochs are not extended; give --optim.warmup_epochs "
            f"{warmup:g}, or more epochs"
        )
    if now < before:
        raise UserError(
            f"{path}: got epochs {now}, expected more than the {before} epochs in the checkpoint; "
            "raise them, or use another --out"
        )
    if step < before * steps_per_epoch:
        raise UserError(
            f"{path}: got --extend for a run at step {step} of {before * steps_per_epoch}, "
            f"expected a finished run; run it to its end with --epochs {before} first"
        )
    batch_size = config.unlabelled_batch_size or config.labelled_batch_size
    former = replace(config.optim, warmup_epochs=warmup)
    old, new = (
        lr_at(at, optim, batch_size, epochs, steps_per_epoch)
        for at, optim, epochs in ((step - 1, former, before), (step, config.optim, now))
    )
    longer = "" if warmup == new_warmup else f", warm-up from {warmup:g} to {new_warmup:g}"
    remark = (
        f"extended at step {step} from {before} to {now} epochs{longer}: the schedules are drawn "
        f"anew over {now} epochs, so the learning rate goes from {old:.4g} to {new:.4g}"
    )
    folder.remarks.append(remark)
    world.say(f"{folder.path}: {remark}")
