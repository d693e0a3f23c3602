"""Weights & Biases: the metrics, settings and pictures of a run, for those who ask for `log.wandb`.

Guarantees: nothing imports wandb otherwise. Whatever fails in it costs one line on stderr, and the
run goes on without it. A resumed run goes on in the same run there, whose id is in `wandb.json`,
and sends each record once.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import write_text
from ffcv_ssl.training.run_data import tell_once

ID_FILE = "wandb.json"
INIT_S, FINISH_S = 30.0, 60.0
"""How long wandb may take to answer at the start, and to send the rest at the end."""

Place = tuple[int, bool]
"""(step, whether it is the evaluation) of a record."""


def opener(folder: Path, project: str, config: dict[str, Any]) -> Callable[..., WandbLog]:
    """A function that opens the run's WandbLog. Raises UserError without wandb."""
    try:
        import wandb
    except ImportError:
        wandb = None  # type: ignore[assignment]
    if not hasattr(wandb, "init"):  # a folder of that name, such as wandb's own, is no package
        raise UserError(
            f"log.wandb: got {project!r}, but wandb is not installed; run pip install wandb, or "
            "leave out --log.wandb"
        )
    return partial(WandbLog, wandb, folder, project, config)


class WandbLog:
    """Sends records and pictures to the run of `folder` in a project.

    wandb: the module. records: all that the metrics have; those up to `seen`, a place or None, were
    sent before, unless the run is new there.
    """

    def __init__(
        self,
        wandb: Any,
        folder: Path,
        project: str,
        config: dict[str, Any],
        records: Iterable[dict[str, Any]],
        seen: Place | None,
    ) -> None:
        self.wandb, self.run, self.seen = wandb, None, seen
        known_id = _known_id(folder, project)
        if known_id is None:
            self.seen = None
        self._try(self._open, folder, project, config, known_id)
        for record in records:
            self.write(record)

    def _open(self, folder: Path, project: str, config: dict, known_id: str | None) -> None:
        run_id = known_id or secrets.token_hex(4)
        settings = self.wandb.Settings(
            console="off", silent=True, init_timeout=INIT_S, finish_timeout=FINISH_S,
        )  # fmt: skip
        run = self.wandb.init(
            project=project, id=run_id, resume="allow", name=folder.name, dir=str(folder),
            config=config, allow_val_change=True, reinit="create_new", settings=settings,
        )  # fmt: skip
        self.run = run
        write_text(folder / ID_FILE, json.dumps({"project": project, "id": run_id}) + "\n")
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        is_offline = getattr(run, "offline", False)
        where = f"offline; to send it: wandb sync {Path(run.dir).parent}" if is_offline else run.url
        tell_once(f"log.wandb: {where}")

    def write(self, record: dict[str, Any]) -> None:
        """Send a record, unless it was sent before."""
        place = record["step"], any(key.startswith("val/") for key in record)
        if self.seen is None or place > self.seen:
            self._send({key: value for key, value in record.items() if value is not None})

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Send a PNG, unless it was sent before."""
        if self.seen is None or (step, True) > self.seen:
            self._try(lambda: self._send({"step": step, tag: self.wandb.Image(str(path))}))

    def _send(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            self._try(self.run.log, values)

    def close(self) -> None:
        """Send the rest and end; a second call does nothing."""
        if self.run is not None:
            self._try(self.run.finish)
            self.run = None

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call it; what fails is said once, and wandb is left alone from then on."""
        try:
            call(*arguments)
        except Exception as error:  # of the network, of its server, of its own
            self.run = None
            tell_once(
                f"log.wandb: {type(error).__name__}: {one_line(error)[:300]}; the run goes on "
                "without it"
            )


def _known_id(folder: Path, project: str) -> str | None:
    """The id of this run in a project, from an earlier start; None where there is none."""
    path = folder / ID_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return str(about["id"]) if about["project"] == project else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
