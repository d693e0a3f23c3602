"""Old import paths, for one release: modules and names that moved are found at their new places.

`import ffcv_ssl.optim` gives the very module `ffcv_ssl.training.optimizers`, with a FutureWarning
that names the new place; `python -m ffcv_ssl.chain` runs the new module and says so on stderr.
Nothing is imported before somebody asks for it. To drop the old paths, delete this file, the line
in `__init__.py` that installs it, and `tests/test_moved.py`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

TYPE_CHECKING = False  # that of `typing`, which would be half of what importing ffcv_ssl costs
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, ModuleType
    from typing import Any

# Old module -> new module, the same object. None: its names went to several modules (see NAMES).
MODULES: dict[str, str | None] = {
    "ffcv_ssl.accumulate": "ffcv_ssl.training.gradient_cache",
    "ffcv_ssl.chain": "ffcv_ssl.jobs.chain",
    "ffcv_ssl.checkpoint": "ffcv_ssl.training.checkpoint",
    "ffcv_ssl.command": "ffcv_ssl.training.command",
    "ffcv_ssl.config_files": "ffcv_ssl.config.yaml_layers",
    "ffcv_ssl.confusion": "ffcv_ssl.evaluation.confusion",
    "ffcv_ssl.distributed": "ffcv_ssl.training.world",
    "ffcv_ssl.labelled": "ffcv_ssl.training.labelled_stream",
    "ffcv_ssl.labels": "ffcv_ssl.training.label_choice",
    "ffcv_ssl.loader.pipelines": "ffcv_ssl.loader.view_specs",
    "ffcv_ssl.loader.program": "ffcv_ssl.loader.epoch_program",
    "ffcv_ssl.loader.sources": "ffcv_ssl.loader.decoding",
    "ffcv_ssl.mean_ap": "ffcv_ssl.evaluation.mean_ap",
    "ffcv_ssl.meters": "ffcv_ssl.training.meters",
    "ffcv_ssl.metrics_log": "ffcv_ssl.training.metrics_log",
    "ffcv_ssl.model_card": "ffcv_ssl.evaluation.model_card",
    "ffcv_ssl.models": "ffcv_ssl.training.models",
    "ffcv_ssl.optim": "ffcv_ssl.training.optimizers",
    "ffcv_ssl.pipeline.program": "ffcv_ssl.pipeline.dispatch",
    "ffcv_ssl.pretrained": "ffcv_ssl.evaluation.encoder",
    "ffcv_ssl.probing": "ffcv_ssl.training.probes",
    "ffcv_ssl.protocols": None,
    "ffcv_ssl.protocols.common": None,
    "ffcv_ssl.protocols.curve": "ffcv_ssl.evaluation.studies.curve",
    "ffcv_ssl.protocols.export": "ffcv_ssl.evaluation.protocols.export",
    "ffcv_ssl.protocols.features": "ffcv_ssl.evaluation.features",
    "ffcv_ssl.protocols.finetune": "ffcv_ssl.evaluation.protocols.finetune",
    "ffcv_ssl.protocols.grid": "ffcv_ssl.evaluation.probe_grid",
    "ffcv_ssl.protocols.linear": "ffcv_ssl.evaluation.protocols.linear",
    "ffcv_ssl.protocols.neighbours": None,
    "ffcv_ssl.protocols.nested": None,
    "ffcv_ssl.protocols.probe_data": "ffcv_ssl.evaluation.probe_data",
    "ffcv_ssl.protocols.seeds": "ffcv_ssl.evaluation.studies.seeds",
    "ffcv_ssl.protocols.suite": "ffcv_ssl.evaluation.studies.suite",
    "ffcv_ssl.protocols.transfer": "ffcv_ssl.evaluation.protocols.transfer",
    "ffcv_ssl.protocols.tuning": "ffcv_ssl.evaluation.tuning",
    "ffcv_ssl.protocols.tuning_run": "ffcv_ssl.evaluation.tuning_run",
    "ffcv_ssl.report": "ffcv_ssl.training.report",
    "ffcv_ssl.results": "ffcv_ssl.evaluation.results",
    "ffcv_ssl.run_data": "ffcv_ssl.training.run_data",
    "ffcv_ssl.run_folder": "ffcv_ssl.training.run_folder",
    "ffcv_ssl.seeds": "ffcv_ssl.seeding",
    "ffcv_ssl.settings": "ffcv_ssl.config.settings",
    "ffcv_ssl.slurm": "ffcv_ssl.jobs.slurm",
    "ffcv_ssl.slurm_job": "ffcv_ssl.jobs.slurm_task",
    "ffcv_ssl.stage_marks": "ffcv_ssl.jobs.stage_marks",
    "ffcv_ssl.writer_pool": "ffcv_ssl.writer.pool",
    "pipelines.grid": "pipelines.picture",
}

# Old module -> {old name: "new.module:new_name"}, for names that did not go with their module or
# were renamed. The module may still be where it was.
NAMES: dict[str, dict[str, str]] = {
    "ffcv_ssl.chain": {
        "SCRIPTS": "ffcv_ssl.jobs.chain_file:SCRIPTS",
    },
    "ffcv_ssl.checkpoint": {
        "CheckpointError": "ffcv_ssl.errors:CheckpointError",
        "explained": "ffcv_ssl.files:explained",
        "sync_folder": "ffcv_ssl.files:sync_folder",
        "write_text": "ffcv_ssl.files:write_text",
    },
    "ffcv_ssl.command": {
        "Interrupted": "ffcv_ssl.errors:Interrupted",
        "NonFiniteLoss": "ffcv_ssl.errors:NonFiniteLoss",
        "UserError": "ffcv_ssl.errors:UserError",
        "choose_device": "ffcv_ssl.training.world:choose_device",
        "config_dict": "ffcv_ssl.config.plain:config_dict",
        "config_differences": "ffcv_ssl.config.plain:config_differences",
        "hold_folder": "ffcv_ssl.files:hold_folder",
        "one_line": "ffcv_ssl.config.messages:one_line",
        "parse_config": "ffcv_ssl.config.parsing:parse_config",
    },
    "ffcv_ssl.distributed": {
        "meet": "ffcv_ssl.training.meeting:meet",
        "share_learning": "ffcv_ssl.training.data_parallel:share_learning",
    },
    "ffcv_ssl.evaluation": {
        "OnlineEvaluation": "ffcv_ssl.training.online_evaluation:OnlineEvaluation",
        "labels_of": "ffcv_ssl.training.online_evaluation:labels_of",
        "open_evaluation": "ffcv_ssl.training.online_evaluation:open_evaluation",
    },
    "ffcv_ssl.kernels.color": {
        "BRIGHTNESS": "ffcv_ssl.transforms.color_jitter:BRIGHTNESS",
        "CONTRAST": "ffcv_ssl.transforms.color_jitter:CONTRAST",
        "HUE": "ffcv_ssl.transforms.color_jitter:HUE",
        "SATURATION": "ffcv_ssl.transforms.color_jitter:SATURATION",
    },
    "ffcv_ssl.pretrained": {
        "COMPILED": "ffcv_ssl.training.weight_files:COMPILED",
        "FINETUNED": "ffcv_ssl.training.weight_files:FINETUNED",
        "HEADS": "ffcv_ssl.training.weight_files:HEADS",
        "PREFIXES": "ffcv_ssl.training.weight_files:PREFIXES",
    },
    "ffcv_ssl.protocols": {
        "PROTOCOLS": "ffcv_ssl.evaluation.protocols:PROTOCOLS",
    },
    "ffcv_ssl.protocols.common": {
        "Architecture": "ffcv_ssl.evaluation.protocol_settings:Architecture",
        "EvalData": "ffcv_ssl.evaluation.protocol_settings:EvalData",
        "EvalLabels": "ffcv_ssl.evaluation.protocol_settings:EvalLabels",
        "Evaluation": "ffcv_ssl.evaluation.protocol_settings:ProtocolConfig",
        "Pair": "ffcv_ssl.evaluation.datasets:EvalDatasets",
        "allowed_labels": "ffcv_ssl.evaluation.datasets:usable_labels",
        "augmented_loader": "ffcv_ssl.evaluation.image_loaders:augmented_loader",
        "augmented_ops": "ffcv_ssl.evaluation.image_loaders:augmented_ops",
        "clean_loader": "ffcv_ssl.evaluation.image_loaders:clean_loader",
        "clean_ops": "ffcv_ssl.evaluation.image_loaders:clean_ops",
        "finish": "ffcv_ssl.evaluation.protocol_run:finish_frozen",
        "labels_digest": "ffcv_ssl.evaluation.datasets:labels_digest",
        "open_encoder": "ffcv_ssl.evaluation.protocol_run:open_encoder",
        "open_frozen": "ffcv_ssl.evaluation.protocol_run:open_frozen",
        "open_pair": "ffcv_ssl.evaluation.datasets:open_datasets",
        "refuse_ranks": "ffcv_ssl.evaluation.protocol_run:refuse_ranks",
        "resolve_data": "ffcv_ssl.evaluation.datasets:resolve_loading",
        "results_folder": "ffcv_ssl.evaluation.results:results_folder",
        "split_holdout": "ffcv_ssl.evaluation.datasets:split_holdout",
        "stop_if_asked": "ffcv_ssl.evaluation.protocol_run:stop_if_asked",
        "with_fields": "ffcv_ssl.evaluation.datasets:with_field_names",
        "writable_folder": "ffcv_ssl.evaluation.results:writable_folder",
    },
    "ffcv_ssl.protocols.finetune": {
        "FineTune": "ffcv_ssl.evaluation.protocols.finetune:FineTuneConfig",
    },
    "ffcv_ssl.protocols.linear": {
        "ENOUGH_HELD_OUT": "ffcv_ssl.evaluation.probe_training:ENOUGH_HELD_OUT",
        "MLPConfig": "ffcv_ssl.evaluation.protocols.mlp:MLPConfig",
        "evaluate_probes": "ffcv_ssl.evaluation.probe_training:evaluate_probes",
        "measure": "ffcv_ssl.evaluation.probe_training:measure",
        "run_linear": "ffcv_ssl.evaluation.protocols.linear:run",
        "run_mlp": "ffcv_ssl.evaluation.protocols.mlp:run",
        "train_probes": "ffcv_ssl.evaluation.probe_training:train_probes",
    },
    "ffcv_ssl.protocols.neighbours": {
        "BANK_ROWS": "ffcv_ssl.evaluation.similarity_bank:BANK_ROWS",
        "ClassSimilarity": "ffcv_ssl.evaluation.protocols.snn:ClassSimilarity",
        "KNNConfig": "ffcv_ssl.evaluation.protocols.knn:KNNConfig",
        "MAX_SIMILARITIES": "ffcv_ssl.evaluation.similarity_bank:MAX_SIMILARITIES",
        "NearestNeighbours": "ffcv_ssl.evaluation.protocols.knn:NearestNeighbours",
        "SNNConfig": "ffcv_ssl.evaluation.protocols.snn:NPIConfig",
        "first_largest": "ffcv_ssl.evaluation.protocols.knn:first_largest",
        "run_knn": "ffcv_ssl.evaluation.protocols.knn:run",
        "run_snn": "ffcv_ssl.evaluation.protocols.snn:run",
        "unit_rows": "ffcv_ssl.evaluation.similarity_bank:unit_rows",
        "vote": "ffcv_ssl.evaluation.protocols.knn:vote",
    },
    "ffcv_ssl.protocols.nested": {
        "MAIN_METRICS": "ffcv_ssl.evaluation.results:MAIN_METRICS",
        "accuracies": "ffcv_ssl.evaluation.results:accuracies",
        "call": "ffcv_ssl.evaluation.protocol_calls:call_protocol",
        "check_paths": "ffcv_ssl.evaluation.protocol_calls:check_paths",
        "checked": "ffcv_ssl.evaluation.protocol_calls:checked",
        "kind_of": "ffcv_ssl.evaluation.command_words:kind_of",
        "main_metric": "ffcv_ssl.evaluation.results:main_metric",
        "opened": "ffcv_ssl.evaluation.protocol_calls:opened",
        "protocol_config": "ffcv_ssl.evaluation.protocol_calls:protocol_config",
        "run_folder": "ffcv_ssl.evaluation.results:checkpoint_folder",
        "words_of": "ffcv_ssl.evaluation.command_words:words_of",
    },
    "ffcv_ssl.protocols.transfer": {
        "Transfer": "ffcv_ssl.evaluation.protocols.transfer:TransferConfig",
    },
    "ffcv_ssl.protocols.tuning_run": {
        "AGREE_EVERY": "ffcv_ssl.training.runtime:AGREE_EVERY",
        "Tuning": "ffcv_ssl.evaluation.tuning_run:TuningConfig",
    },
    "ffcv_ssl.results": {
        "JSON_FILE": "ffcv_ssl.evaluation.results:RESULTS_FILE",
        "PATIENCE_S": "ffcv_ssl.evaluation.results:LOCK_PATIENCE_S",
        "flatten": "ffcv_ssl.config.plain:flatten",
    },
    "ffcv_ssl.settings": {
        "SupervisedConfig": "ffcv_ssl.methods.supervised:SupervisedConfig",
    },
    "ffcv_ssl.writer": {
        "MAX_PAGE_SIZE": "ffcv_ssl.writer.writer:MAX_PAGE_SIZE",
        "MIN_PAGE_SIZE": "ffcv_ssl.writer.writer:MIN_PAGE_SIZE",
    },
    "pipelines.grid": {
        "COLOURS": "pipelines.picture:COLORS",
    },
    "ffcv_ssl.probing": {
        "hits": "ffcv_ssl.training.probes:topk_correct",
    },
    "pipelines.recipes": {
        "BYOL_COLOUR": "pipelines.recipes:BYOL_COLOR",
    },
    "pipelines.view": {
        "CROPS": "ffcv_ssl.transforms.crop:CROPS",
    },
}


_noted: set[str] = set()


def install() -> None:
    """Make the old paths importable. They are looked up first: where a package has moved, the
    normal search would find its modules in the new folder and load them a second time."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())


class _MovedFinder:
    """Knows the old modules, and the modules that lost some of their names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            new = MODULES[fullname]
            origin = None if new is None else _spec(new).origin
            loader: Any = _MovedLoader()
            return ModuleSpec(fullname, loader, origin=origin, is_package=new is None)
        if fullname in NAMES:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and isinstance(spec.loader, SourceFileLoader):
                spec.loader = _LoaderWithOldNames(spec.loader.name, spec.loader.path)
            return spec
        return None


class _MovedLoader:
    """Puts the new module under the old name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # an empty module: exec_module replaces it, or gives it the old names

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MODULES[old]
        if new is None:
            _add_old_names(module, old)
            return
        warnings.warn(_note(old, new), FutureWarning, stacklevel=2)
        heir = importlib.import_module(new)
        _add_old_names(heir, old)
        sys.modules[old] = heir  # the import system hands on what it finds here

    def get_code(self, old: str) -> CodeType | None:
        """The code for `python -m`."""
        new = MODULES[old]
        if new is None:
            raise ImportError(f"{old}: its parts have moved, see ffcv_ssl/moved.py")
        print(_note(f"python -m {old}", f"python -m {new}"), file=sys.stderr)
        loader: Any = _spec(new).loader
        return loader.get_code(new)


class _LoaderWithOldNames(SourceFileLoader):
    """Loads a module that is where it was, and adds the names that left it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _add_old_names(module, module.__name__)


def _add_old_names(module: ModuleType, old: str) -> None:
    if old in NAMES and "__getattr__" not in vars(module):
        vars(module)["__getattr__"] = _old_names(old)


def _old_names(old: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, which is asked only for names that the module does not have."""

    def find(name: str) -> Any:
        if name not in NAMES[old]:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        home, _, new_name = NAMES[old][name].partition(":")
        note = _note(f"{old}.{name}", f"{home}.{new_name}")
        if note not in _noted:  # `from module import name` may ask twice
            _noted.add(note)
            warnings.warn(note, FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new_name)

    return find


def _note(old: str, new: str) -> str:
    return f"{old} is now {new}; the old name works for one release"


def _spec(new: str) -> ModuleSpec:
    from importlib.util import find_spec

    spec = find_spec(new)
    assert spec is not None, f"{new} is in the table but not in the package"
    return spec
