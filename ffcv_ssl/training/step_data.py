"""The images of each training step: unlabelled ones, labelled ones of a second stream, or both.

Shapes: B images of a rank, V views, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch

from ffcv_ssl.loader import Loader
from ffcv_ssl.training.labelled_stream import LabelledStream
from ffcv_ssl.training.online_evaluation import labels_of
from ffcv_ssl.training.run_data import RunData, set_resolution
from ffcv_ssl.training.world import World


class StepKind(Enum):
    """Which images a step trains on."""

    UNLABELLED = "unlabelled images: the method's loss"
    UNLABELLED_AND_LABELLED = "both: the method's loss and the labelled loss"
    LABELS_ALONE = "labelled images: the labelled loss alone"


class Images(NamedTuple):
    """What one stream gives to a step, on each rank."""

    views: Sequence[torch.Tensor]
    """V of (B, 3, H, W)."""
    labels: torch.Tensor | None
    """(B,), -1: none. None where the file has no labels."""

    @property
    def number(self) -> int:
        """Images of this rank."""
        return len(self.views[0]) if self.views else 0


NO_IMAGES = Images((), None)


class StepData(NamedTuple):
    """The images of one step; a stream that takes no part has NO_IMAGES."""

    kind: StepKind
    unlabelled: Images
    labelled: Images


def images_of(batch: Any, views: Iterable[str], label_field: str) -> Images:
    """Some views of a loader's batch, by name, and its labels."""
    return Images([getattr(batch, name) for name in views], labels_of(batch, label_field))


class Streams:
    """The loader of unlabelled images and the stream of labelled ones; one of them may be None.

    views: by name, with `crop` and `size_px(px)`; num_labelled_views: how many of them labelled
    images have. epochs: of the run; an epoch is a pass over the loader, or over the labels where
    they train alone.
    """

    def __init__(
        self,
        loader: Loader | None,
        labelled: LabelledStream | None,
        views: Mapping[str, Any],
        num_labelled_views: int,
        label_field: str,
        epochs: int,
    ) -> None:
        self.loader, self.labelled, self.label_field = loader, labelled, label_field
        self.views, self.labelled_views = views, list(views)[:num_labelled_views]
        assert loader is not None or labelled is not None
        self.loaders = [loader] if loader is not None else []
        self.loaders += [labelled.loader] if labelled is not None else []
        self.steps_per_epoch = len(loader if loader is not None else labelled)  # type: ignore[arg-type]
        self.total_steps = epochs * self.steps_per_epoch
        self.labelled_until: float = 0
        if labelled is not None:
            self.labelled_until = labelled.end_step(self.steps_per_epoch)

    def describe_labelled(self) -> str:
        """The labelled stream in words; there must be one."""
        assert self.labelled is not None
        until = min(self.labelled_until, self.total_steps)
        return f"labelled stream: {self.labelled.description}; until step {until}"

    def describe_step(self, batch_size: int, labelled_batch_size: int) -> str:
        """The views of a step of so many images of all ranks, in words."""
        streams = [(batch_size, "images", len(self.views))]
        if self.labelled_until:
            streams += [(labelled_batch_size, "labelled", len(self.labelled_views))]
        number = sum(size * views for size, _, views in streams)
        parts = ", ".join(f"{size} {what} x {views}" for size, what, views in streams if size)
        return f"{number} views per step: {parts}"

    def noise(
        self,
        px: int,
        sizes: tuple[int, int],
        num_classes: int | None,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> StepData:
        """A step of all streams on random pixels, for a resolution of `px`.

        sizes: images of this rank, unlabelled and labelled. num_classes: of the random labels; None
        where there are none.
        """
        streams = []
        for is_there, size, names in (
            (self.loader is not None, sizes[0], list(self.views)),
            (self.labelled_until > 0, sizes[1], self.labelled_views),
        ):
            sides = [self.views[name].size_px(px) for name in names] if is_there else []
            views = [torch.randn(size, 3, side, side, device=device) for side in sides]
            labels = None
            if views and num_classes is not None:
                labels = torch.randint(max(1, num_classes), (size,), device=device)
            views = [view.contiguous(memory_format=memory_format) for view in views]
            streams.append(Images(views, labels) if views else NO_IMAGES)
        kind = StepKind.UNLABELLED_AND_LABELLED if streams[1].views else StepKind.UNLABELLED
        return StepData(kind if streams[0].views else StepKind.LABELS_ALONE, *streams)

    def largest(
        self, config: Any, train: RunData, world: World, memory_format: torch.memory_format
    ) -> StepData:
        """A step at `resolution.max` on random pixels, for the trainer's config and this rank."""
        sizes = config.unlabelled_batch_size, config.labelled_batch_size
        num_classes = None if train.labels is None else train.num_classes
        rows = (sizes[0] // world.size, sizes[1] // world.size)
        return self.noise(config.resolution.max, rows, num_classes, world.device, memory_format)

    def steps(self, step: int, px: int) -> Iterator[StepData]:
        """The data of step `step` and of all others up to the end of its epoch, with views for a
        resolution of `px`. The labelled stream is closed when it has ended."""
        epoch, done = divmod(step, self.steps_per_epoch)
        sides = {n: v.size_px(px) for n, v in self.views.items() if v.crop == "random"}
        if self.labelled is not None and step < self.labelled_until:
            self.labelled.start({n: side for n, side in sides.items() if n in self.labelled_views})
        if self.loader is None:
            for _ in range(done, self.steps_per_epoch):
                yield StepData(StepKind.LABELS_ALONE, NO_IMAGES, self._next_labelled())
            return
        set_resolution(self.loader, sides)
        if done == 0:
            self.loader.set_epoch(epoch)
        for number, batch in enumerate(self.loader, start=step):
            unlabelled = images_of(batch, self.views, self.label_field)
            kind, labelled = StepKind.UNLABELLED, NO_IMAGES
            if number < self.labelled_until:
                kind, labelled = StepKind.UNLABELLED_AND_LABELLED, self._next_labelled()
            elif self.labelled is not None:
                self.labelled.close()  # from here on it costs nothing
            yield StepData(kind, unlabelled, labelled)

    def _next_labelled(self) -> Images:
        assert self.labelled is not None
        return images_of(self.labelled.next(), self.labelled_views, self.label_field)
