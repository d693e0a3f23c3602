"""A command line and YAML files -> a frozen dataclass of settings.

A mistake becomes a UserError with one line: the file at fault, the key, got, expected.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from functools import partial

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.plain import config_dict, flatten
from ffcv_ssl.config.renamed import rename, say_notes
from ffcv_ssl.config.yaml_layers import merge, read_layers
from ffcv_ssl.errors import UserError


def parse_config(config_class, argv, prog, description, sort_out=None):
    """Fill a frozen dataclass from `--config FILE.yaml` and dotted overrides.

    A file may build on others (`base:`, see config_files); arguments count in the order in which
    they are given. Old names in `config_class.RENAMED` are taken, with a note on stderr. Returns
    (config, list of the YAML files given). `sort_out(config)` may raise
    ValueError for values that do not go together. Raises UserError for unknown keys and bad values,
    naming the file where a file is at fault; exits as argparse does for --help and --print_config.
    """
    files = _config_files(argv)
    if "" in files:
        raise UserError("--config: got nothing, expected a YAML file")
    try:
        layers = {path: _with_new_names(read_layers(path), config_class) for path in files}
    except ValueError as error:
        raise UserError(one_line(error)) from None
    argv, notes = rename(argv, getattr(config_class, "RENAMED", {}))
    say_notes(notes)
    settings = {path: merge(*(own for _, own in layers[path])) for path in files}
    fill = partial(_fill, config_class, prog, description, sort_out)
    try:
        return fill(argv, settings), files
    except UserError as error:
        where = _file_at_fault(fill, [layer for path in files for layer in layers[path]], error)
        raise UserError(f"{where}{error}") from None


def _with_new_names(layers, config_class):
    """[(file, its settings)] without the old names in `config_class.RENAMED`; notes are printed."""
    renamed = []
    for path, own in layers:
        try:
            own, notes = rename(own, getattr(config_class, "RENAMED", {}))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        say_notes(notes, path)
        renamed.append((path, own))
    return renamed


def _fill(config_class, prog, description, sort_out, argv, settings):
    """The configuration that `argv` asks for, with `settings[path]` for the contents of a file."""
    from jsonargparse import ArgumentError

    parser = _make_parser(config_class, prog, description, settings)
    try:
        namespace = parser.parse_args(argv)
        namespace.pop("config", None)
        # its name from jsonargparse 4.49 on, and before
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        config = config_class(**instantiate(namespace).as_dict())
        _check_finite(config_dict(config))
        if sort_out is not None:
            sort_out(config)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise UserError(one_line(error)) from None
    return config


def _file_at_fault(fill, layers, error):
    """`FILE: ` for the first file on top of whose predecessors the same error arises, else ``."""
    settings = {}
    for path, own in layers:
        settings = merge(settings, own)
        try:
            fill([f"--config={path}"], {path: settings})
        except UserError as other:
            if str(other) == str(error):
                return f"{path}: "
    return ""


def _make_parser(config_class, prog, description, settings):
    from jsonargparse import ActionConfigFile, ArgumentParser

    class Parser(ArgumentParser):
        """Takes a file's settings from `settings`, over those of the arguments before it."""

        so_far = None

        def parse_path(self, path, *args, **kwargs):
            own = _with_earlier_keys(settings[str(path)], self.so_far)
            return self.parse_string(json.dumps(own, ensure_ascii=False), **kwargs)

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser, namespace, *args, **kwargs):
            parser.so_far = namespace
            super().__call__(parser, namespace, *args, **kwargs)

    with contextlib.suppress(ImportError, TypeError, ValueError):  # texts of --help, if installed
        from jsonargparse import set_parsing_settings

        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=prog, exit_on_error=False, description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the keys below")
    parser.add_class_arguments(config_class, None, as_group=False)
    return parser


def _with_earlier_keys(settings, so_far, prefix=""):
    """`settings` with the earlier keys of each mapping that jsonargparse would replace as a whole.

    so_far: the parser's namespace; it merges nested namespaces itself, but not the dicts in them.
    Raises ValueError for a group of settings that is given as something else, named with `prefix`.
    """
    if isinstance(so_far, dict):
        return merge(so_far, settings)
    merged = {}
    for key, value in settings.items():
        before = so_far.get(key)
        if hasattr(before, "get") and not isinstance(value, dict):
            raise ValueError(f"{prefix}{key}: got {value!r}, expected a mapping of settings")
        if hasattr(before, "get"):
            value = _with_earlier_keys(value, before, f"{prefix}{key}.")
        merged[key] = value
    return merged


def _config_files(argv):
    pairs = zip(argv, [*argv[1:], ""])
    return [b if a == "--config" else a[9:] for a, b in pairs if re.match(r"--config(=|$)", a)]


def _check_finite(settings):
    """Raise UserError for a number that is infinite or not one, in what `config_dict` returns."""
    for key, value in flatten(settings).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}: got {number}, expected a finite number")
