"""The commands from Python, for a notebook or a script of one's own.

    from ffcv_ssl.api import evaluate, pretrain

    files = {"train": "train.beton", "val": "val.beton"}
    run = pretrain("simclr", out="runs/a", epochs=10, data=files)
    run.latest["train/loss"], run.checkpoint, run.values("val/knn/top1")
    result = evaluate("knn", run.out, data={"val": "val.beton"})
    result.metrics

Settings are those of the commands, nested or dotted (`**{"optim.lr": 0.1}`), and the code is the
commands' own. A mistake in them is a UserError, a file that cannot be used a BetonError or a
CheckpointError; nothing ends the process. Both work in any thread; in the main thread Ctrl-C stops
a run after its step, and it can be resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ffcv_ssl.config.app_files import load_script
from ffcv_ssl.config.plain import as_words, flatten
from ffcv_ssl.config.yaml_layers import nested
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import StrPath

__all__ = ["Evaluation", "Run", "evaluate", "pretrain"]

Config = StrPath | Mapping[str, Any] | None
_NO_SETTINGS = ("help", "print_config", "config")


@dataclass(frozen=True)
class Run:
    """A run that has ended, or was submitted."""

    exit_code: int
    """That of the command: 0 finished, or submitted; 75 interrupted with a checkpoint."""
    summary: dict[str, Any]
    """What the command's last line says: status, counters, last losses, last evaluation."""

    @property
    def status(self) -> str:
        """finished, interrupted or submitted."""
        return self.summary["status"]

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.summary["out"])

    @property
    def checkpoint(self) -> Path:
        """`checkpoint.pt`: the state from which the run can be resumed."""
        return self.out / "checkpoint.pt"

    @property
    def backbone(self) -> Path:
        """`backbone.safetensors`: the encoder's weights, once the run is finished."""
        return self.out / "backbone.safetensors"

    @property
    def report(self) -> Path:
        """`report.png`: the run's picture, once it is finished."""
        return self.out / "report.png"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All records of `metrics.jsonl`, in their order."""
        from ffcv_ssl.training.metrics_log import read_metrics

        return read_metrics(self.out)

    @property
    def latest(self) -> dict[str, Any]:
        """The last value of every key in `metrics`."""
        return {key: value for record in self.metrics for key, value in record.items()}

    def values(self, key: str) -> list[tuple[int, Any]]:
        """[(step, value)] of a key, such as `train/loss` or `val/backbone/top1`."""
        return [(record["step"], record[key]) for record in self.metrics if key in record]


@dataclass(frozen=True)
class Evaluation:
    """What a protocol or a study of `evaluate` has found."""

    exit_code: int
    """That of the command: 0 finished, 75 interrupted."""
    summary: dict[str, Any]
    """What the command's last line says."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """A record per checkpoint, as in `results.jsonl`."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The only checkpoint's metrics: accuracies as shares. Raises UserError for several."""
        if len(self.results) != 1:
            got = f"got {len(self.results)} results, expected one"
            raise UserError(f"metrics: {got}; see `results`")
        return self.results[0].get("metrics", self.results[0])


def pretrain(
    config: Config | Sequence[Config] = None, *, out: StrPath | None = None, **settings: Any
) -> Run:
    """Pretrain as `ffcv-ssl train` does, or resume the run in `out`.

    config: a YAML file, the name of one of the project's configurations (`simclr`), a mapping of
    settings, or a list of them, of which later ones win. settings: over those of `config`. Raises
    UserError for a mistake in them, NonFiniteLoss for a loss that is not finite.
    """
    given = {**settings, **({} if out is None else {"out": out})}
    with _as_before():
        return Run(*load_script("train").run([*_config_words(config), *_words(given)]))


def evaluate(
    protocol: str,
    checkpoint: StrPath | Sequence[StrPath] | None = None,
    *,
    config: Config | Sequence[Config] = None,
    out: StrPath | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate as `ffcv-ssl evaluate PROTOCOL` does.

    checkpoint: a run's folder, one of its files, or weights of torchvision or timm; or several.
    config, settings: as for `pretrain`. Raises UserError for a mistake in them.
    """
    given = {**settings, **({} if out is None else {"out": out})}
    words = [protocol, *_config_words(config), *_words(given)]
    several = isinstance(checkpoint, Sequence) and not isinstance(checkpoint, str)
    paths: Any = checkpoint if several else [] if checkpoint is None else [checkpoint]
    if paths or several:
        words += ["--checkpoint", *map(str, paths)]
    with _as_before():
        code, summary = load_script("evaluate").run(words)
    return Evaluation(code, summary, summary.get("results", [summary]))


def _config_words(config: Config | Sequence[Config]) -> list[str]:
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [word for one in config for word in _config_words(one)]
    if isinstance(config, Mapping):
        return _words(config)
    return [] if config is None else [f"--config={config}"]


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Nested or dotted settings as words of a command line. Raises UserError."""
    flat = flatten(nested({key: _plain(value) for key, value in settings.items()}))
    for key in _NO_SETTINGS:
        if key in flat:
            raise UserError(f"{key}: got it in a call from Python, expected settings of a run")
    return as_words(flat)


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths as text, tuples as lists, NumPy's scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return value.item()
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Within the block a command sets torch's threads, flags and seeds; behind it they are as they
    were."""
    import torch

    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
        cudnn.benchmark, cudnn.allow_tf32 = flags
