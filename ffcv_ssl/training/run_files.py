"""The files of a pretraining run: images to train on, and labelled images to watch it on."""

from __future__ import annotations

from dataclasses import dataclass

from ffcv_ssl.config.settings import DataConfig, ProbeConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.training.run_data import RunData, open_dataset


@dataclass(frozen=True)
class RunFiles:
    """What training needs to know of the files it was given."""

    train: RunData
    val: RunData | None
    """The file to measure on: probes.val, or else data.val."""
    probes: RunData | None
    """probes.train: labelled images for probes and k-NN; None: those of `train`."""
    label_field: str

    @property
    def bank(self) -> RunData:
        """The file whose images are k-NN's bank."""
        return self.train if self.probes is None else self.probes

    @property
    def has_accuracies(self) -> bool:
        """Whether probes and k-NN can be measured: both files have labels."""
        has_labels = self.val is not None and self.val.labels is not None
        return has_labels and self.bank.labels is not None

    def on_record(self) -> dict[str, RunData | None]:
        """The files by name, as a checkpoint records them."""
        probes = {} if self.probes is None else {"probes.train": self.probes}
        return {"train": self.train, "val": self.val, **probes}

    def what_is_missing(self) -> str | None:
        """A line on why there are no accuracies, and what to do; None where there are, or where
        nobody asked for them."""
        without = f"no labels in field '{self.label_field}'"
        if self.bank.labels is None and self.val is not None and self.val.labels is not None:
            return (
                f"{self.bank.path}: {without} for probes and k-NN, so those of {self.val.path} go "
                "unused; give labelled images with --probes.train FILE.beton"
            )
        if self.bank.labels is None:
            return (
                f"{self.bank.path}: {without}, so the run has no probes and no k-NN; to watch it "
                "on labelled images, give --probes.train and --probes.val"
            )
        if self.val is not None and self.val.labels is None:
            return f"{self.val.path}: {without}, so the run has no accuracies on it"
        return None


def open_files(data: DataConfig, probes: ProbeConfig) -> RunFiles:
    """Open the files that the settings name. Raises as `open_dataset`, and UserError where a file
    of `probes` has no labels."""
    names = data.image_field, data.label_field
    train, own, val = open_dataset(data.train, *names), None, None
    if probes.train is not None:
        own = _open_labelled(probes.train, "probes.train", names)
    if probes.val is not None:
        val = _open_labelled(probes.val, "probes.val", names)
    elif data.val:
        val = open_dataset(data.val, *names)
    if own is not None and (val is None or val.labels is None):
        raise UserError(
            f"probes.train: got {probes.train} and no labelled file to measure on; give one with "
            "--probes.val or --data.val"
        )
    return RunFiles(train, val, own, data.label_field)


def _open_labelled(path: str, setting: str, names: tuple[str, str]) -> RunData:
    """A file that a setting names for its labels."""
    dataset = open_dataset(path, *names, setting)
    if dataset.labels is None:
        raise UserError(
            f"{path}: no labels in field '{names[1]}', but {setting} is for labelled images; write "
            "it from class folders, or leave the setting out"
        )
    return dataset
