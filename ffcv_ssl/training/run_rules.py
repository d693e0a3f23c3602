"""The rules of train.py's settings: what `auto` becomes, warm-ups that fit, views in full.

Guarantees: a resumed run has the values that were chosen when it began, on whatever machine; what
`--print_config` and `config.yaml` show gives the same run when it is read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ffcv_ssl.config.plain import config_dict, flatten
from ffcv_ssl.config.rules import AUTO, Layers, Rules, without_auto
from ffcv_ssl.config.yaml_layers import merge, read_text, read_yaml
from ffcv_ssl.errors import BetonError
from ffcv_ssl.reader import Reader
from ffcv_ssl.training import machine_choice
from ffcv_ssl.training.machine_choice import CHOOSABLE, Machine, fitting_warmup
from ffcv_ssl.training.run_folder import CHECKPOINT, CONFIG

EPOCHS, WARMUP = "epochs", "optim.warmup_epochs"


class RunRules(Rules):
    """The rules for one command line; `notes(config)` then says what was chosen.

    defaults: the settings as they are where nobody gives them, a dataclass. views: the class of
    the group `views`, with `complete` and `reduced` for mappings of its settings. `out` is the
    run's folder.
    """

    choosable = CHOOSABLE

    def __init__(self, defaults: Any, views: Any) -> None:
        self.defaults, self.views = flatten(config_dict(defaults)), views
        self.names: list[str] = []
        self.machine: Machine | None = None
        self.num_images: int | None = None
        self.recorded_in: Path | None = None
        self.full_recipe: str | None = None
        self.warmup_before: float | None = None
        self.out = ""

    def read(self, own: dict[str, Any], earlier: Layers) -> dict[str, Any]:
        """A file's settings; views that it has in full become changes to its recipe, and to what
        earlier files say of these views."""
        if not isinstance(own.get("views"), dict):
            return own
        given: dict[str, set[str]] = {}
        for _, layer in earlier:
            views = layer.get("views")
            for name, view in views.items() if isinstance(views, dict) else ():
                given.setdefault(name, set()).update(view if isinstance(view, dict) else ())
        return {**own, "views": self.views.reduced(own["views"], given)}

    def show(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Every probability and range of every view, by the dotted name of the view."""
        views = self.views.complete(settings["views"])
        return {f"views.{name}": view for name, view in views.items() if name.startswith("view_")}

    def choose(
        self, given: dict[str, Any], typed: Collection[str], layers: Layers
    ) -> dict[str, Any]:
        """The values of `auto`, and a warm-up that fits where only the epochs were given."""
        flat = {**self.defaults, **_read(given)}
        self.out = default_out(flat.get("out"), layers)
        self.names = sorted(name for name in CHOOSABLE if flat.get(name) == AUTO)
        below = {**self.defaults, **_read(merge(*(without_auto(o, CHOOSABLE) for _, o in layers)))}
        below |= {key: flat[key] for key in typed if flat.get(key, AUTO) != AUTO}
        chosen: dict[str, Any] = {}
        with contextlib.suppress(TypeError):  # of another type: the check of types will name it
            if self.names:
                self.full_recipe = _file_below_auto(layers)
                chosen = self._recorded(flat) or self._for_machine(below)
            chosen |= self._fitting_warmup({**below, **chosen}, typed, layers)
        return chosen

    def _recorded(self, flat: dict[str, Any]) -> dict[str, Any]:
        """What was chosen when the run in this folder began; empty for a new run. flat: what is
        given now. A run that is extended has a warm-up that fits as well as before."""
        checkpoint, config = Path(self.out) / CHECKPOINT, Path(self.out) / CONFIG
        if not (checkpoint.exists() and config.is_file()):
            return {}
        try:
            saved = flatten(read_yaml(config))
        except (ValueError, AttributeError):  # lost or damaged: the checkpoint is compared later
            return {}
        self.recorded_in = Path(self.out)
        found = {name: saved[name] for name in self.names if name in saved}
        was_fitted = WARMUP in found and found[WARMUP] == fitting_warmup(saved.get(EPOCHS, 0))
        if was_fitted and flat.get("extend") is True:
            found[WARMUP] = fitting_warmup(found.get(EPOCHS, flat[EPOCHS]))
        return found

    def _for_machine(self, below: dict[str, Any]) -> dict[str, Any]:
        """What this machine, or the job that is to be submitted, gets to do."""
        if below.get("slurm.partition") is not None:
            gpus, nodes = below["slurm.gpus_per_node"], below["slurm.nodes"]
            self.machine = Machine.of_job(gpus, nodes, below["slurm.tasks_per_node"] or 1)
        else:
            self.machine = Machine.of_this_process(str(below["system.device"]))
        self.num_images = _num_images(str(below["data.train"]))
        return machine_choice.choose(self.names, below, self.machine, self.num_images)

    def _fitting_warmup(
        self, flat: dict[str, Any], typed: Collection[str], layers: Layers
    ) -> dict[str, Any]:
        """A shorter warm-up where it would take all epochs, and the epochs were given after it: a
        file or a default that lies below cannot know of them."""
        epochs, warmup = flat[EPOCHS], flat[WARMUP]
        if not 0 < epochs <= warmup:
            return {}
        if WARMUP in typed or _place(WARMUP, typed, layers) >= _place(EPOCHS, typed, layers):
            return {}
        self.warmup_before = warmup
        return {WARMUP: fitting_warmup(epochs)}

    def notes(self, config: Any) -> list[str]:
        """What was chosen and why, in a few lines; `config`: the settings that came of it."""
        lines, side = [], config.resolution
        px = f"{side.max}" if side.min == side.max else f"{side.min} to {side.max}"
        of = f" of {self.num_images} images" if self.num_images else ""
        about = (
            f"{config.model.backbone} at {px} px, batch {config.data.batch_size}{of}, "
            f"{_epochs(config.epochs)}, {config.precision}"
        )
        if self.recorded_in is not None:
            lines.append(f"{self.recorded_in}: goes on as it was chosen at its start: {about}")
        elif self.machine is not None:
            what = "GPU: the full recipe" if self.machine.has_gpu else "no GPU: a small run"
            lines.append(f"{what}: {about}")
            if self.full_recipe is not None and not self.machine.has_gpu:
                lines.append(
                    f"the full recipe, which wants a GPU: --config {self.full_recipe}; any single "
                    "setting can be given, too: --epochs 50"
                )
        if self.warmup_before is not None:
            lines.append(
                f"{WARMUP}: {config.optim.warmup_epochs:g} instead of {self.warmup_before:g}, to "
                f"fit into {_epochs(config.epochs)}; or give --{WARMUP}"
            )
        return lines


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


def default_out(given: Any, layers: Layers) -> str:
    """A run's folder: the one that was given, or runs/NAME for a last file NAME.yaml."""
    if given is not None:
        return str(given)
    return f"runs/{Path(layers[-1][0]).stem if layers else 'train'}"


def _read(nested: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, texts of the command line as values."""
    flat = flatten(nested)
    return {key: read_text(v) if isinstance(v, str) else v for key, v in flat.items()}


def _place(name: str, typed: Collection[str], layers: Layers) -> int:
    """Where the value of a setting comes from: -1 its default, 0... a file, then the command
    line."""
    places = [number for number, (_, own) in enumerate(layers) if name in flatten(own)]
    return len(layers) if name in typed else max(places, default=-1)


def _file_below_auto(layers: Layers) -> str | None:
    """The last file that another one builds on to say `auto`; None where there is none."""
    for number, (_, own) in reversed(list(enumerate(layers))):
        if AUTO in (flatten(own).get(name) for name in CHOOSABLE):
            return layers[number - 1][0] if number else None
    return None


def _num_images(path: str) -> int | None:
    """Images in a `.beton` file; None where it cannot be read, which the run will say."""
    try:
        with Reader(path) as reader:
            return reader.num_samples
    except (BetonError, OSError, ValueError):
        return None
