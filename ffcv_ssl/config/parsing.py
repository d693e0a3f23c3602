"""A command line and YAML files -> a frozen dataclass of settings.

A mistake raises a UserError with one line: the file at fault, the key, got, expected.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from ffcv_ssl.config.app_files import find_config, shown_program
from ffcv_ssl.config.flags import with_true
from ffcv_ssl.config.messages import find_mistake, one_line
from ffcv_ssl.config.plain import as_words, config_dict, flatten
from ffcv_ssl.config.renamed import rename, say_notes
from ffcv_ssl.config.rules import Layers, Rules, without_auto, words_without_auto
from ffcv_ssl.config.stdout import flush_or_drop
from ffcv_ssl.config.yaml_layers import merge, nested, read_layers, read_text
from ffcv_ssl.errors import UserError

Config = TypeVar("Config")

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    prog: str,
    description: str,
    sort_out: Callable[[Config], object] | None = None,
    ignored: Collection[str] = (),
    rules: Rules | None = None,
) -> tuple[Config, list[str]]:
    """Fill a frozen dataclass from `--config FILE.yaml` and dotted overrides.

    FILE.yaml may also be the name of one of the project's configurations. A file may build on other
    files (`base:`, see yaml_layers); a later argument overrides earlier ones. Old names in
    `config_class.RENAMED` are accepted, with a note on stderr. Returns (config, list of the YAML
    files given). `sort_out(config)` may raise ValueError for values that contradict each other.
    ignored: top-level keys of files that are skipped. rules: what the command knows of its settings
    besides their types.

    Raises UserError for unknown keys and bad values, and names the file at fault. Exits as argparse
    does for --help and --print_config.
    """
    argv = _with_found_files(with_true(argv, config_class))
    files = [text or "" for key, text in read_words(argv) if key == "--config"]
    if "" in files:
        raise UserError("--config: got nothing, expected a YAML file")
    rules = rules or Rules()
    try:
        layers = {path: _with_new_names(read_layers(path), config_class) for path in files}
    except ValueError as error:
        raise UserError(one_line(error)) from None
    earlier: Layers = []
    for path in layers:
        for number, (file, own) in enumerate(layers[path]):
            kept = {key: value for key, value in own.items() if key not in ignored}
            layers[path][number] = file, rules.read(kept, earlier)
            earlier.append(layers[path][number])
    argv, notes = rename(argv, getattr(config_class, "RENAMED", {}))
    say_notes(notes)
    argv, layers = _with_choices(argv, layers, rules)
    settings = {path: merge(*(own for _, own in layers[path])) for path in files}
    fill = partial(_fill, config_class, prog, description, sort_out, rules)
    try:
        return fill(argv, settings), files
    except UserError as error:
        where = _file_at_fault(fill, [layer for path in files for layer in layers[path]], error)
        raise UserError(f"{where}{error}") from None


def given_value(argv: Sequence[str], key: str, default: Any) -> tuple[Any, str | None]:
    """The value of a top-level key on the command line or in its files, before any check.

    Returns (value, the file that gives it, or None); the last value counts. Unreadable files are
    skipped: `parse_config` reports them.
    """
    value, source = default, None
    for name, given in read_words(argv):
        if name == f"--{key}":
            value, source = given, None
        if name == "--config":
            with contextlib.suppress(ValueError):
                for file, own in read_layers(given or ""):
                    value, source = (own[key], file) if key in own else (value, source)
    return value, source


def read_words(argv: Iterable[str]) -> list[tuple[str, str | None]]:
    """[(key, text)] of `--key text` and `--key=text`, in order; None for a key without text."""
    pairs: list[tuple[str, str | None]] = []
    takes_text = False
    for word in argv:
        key, equals, text = word.partition("=")
        if takes_text and not word.startswith("--"):
            pairs[-1] = (pairs[-1][0], word)
            takes_text = False
        else:
            pairs.append((key, text if equals else None))
            takes_text = not equals
    return pairs


def _with_found_files(argv: Iterable[str]) -> list[str]:
    """A command line in which each `--config NAME` has the path of the file that it stands for."""
    words: list[str] = []
    for word in argv:
        key, equals, text = word.partition("=")
        if key == "--config" and equals:
            word = f"{key}={find_config(text)}"
        elif words and words[-1] == "--config" and not word.startswith("--"):
            word = find_config(word)
        words.append(word)
    return words


def _with_new_names(layers: list[tuple[str, dict]], config_class: type) -> list[tuple[str, dict]]:
    """[(file, its settings)] with old names in `config_class.RENAMED` replaced; prints notes."""
    renamed = []
    for path, own in layers:
        try:
            own, notes = rename(own, getattr(config_class, "RENAMED", {}))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        say_notes(notes, path)
        renamed.append((path, own))
    return renamed


def _with_choices(
    argv: Sequence[str], layers: dict[str, Layers], rules: Rules
) -> tuple[list[str], dict[str, Layers]]:
    """(the words of a command line with what `rules` choose at their end, the files' layers by
    path), both without the `auto` that stands for a choice."""
    settings = {path: merge(*(own for _, own in layers[path])) for path in layers}
    typed = {key.removeprefix("--") for key, _ in read_words(argv)}
    in_order = [layer for path in layers for layer in layers[path]]
    chosen = rules.choose(_given(argv, settings), typed, in_order)
    kept = {
        path: [(file, without_auto(own, rules.choosable)) for file, own in layers[path]]
        for path in layers
    }
    return [*words_without_auto(argv, rules.choosable), *as_words(nested(chosen))], kept


def _fill(
    config_class: Any,
    prog: str,
    description: str,
    sort_out: Callable | None,
    rules: Rules,
    argv: Sequence[str],
    settings: dict[str, dict],
) -> Any:
    """The configuration of a command line. settings: path -> the settings of that file."""
    from jsonargparse import ArgumentError

    with_help = any(word == "-h" or "help" in word or "comments" in word for word in argv)
    program = shown_program(prog)
    parser = _make_parser(config_class, program, description, settings, with_help, rules)
    try:
        namespace = parser.parse_args(argv)
        namespace.pop("config", None)
        # `instantiate` from jsonargparse 4.49 on; before: `instantiate_classes`
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        config = config_class(**instantiate(namespace).as_dict())
        _check_values(config_dict(config))
        if sort_out is not None:
            sort_out(config)
    except BrokenPipeError:  # nobody reads the rest of --help or --print_config
        parser.exit()
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        message = _raised_by_settings(error) or find_mistake(config_class, _given(argv, settings))
        raise UserError(message or one_line(error)) from None
    return config


def _raised_by_settings(error: BaseException | None) -> str | None:
    """The text of the UserError behind a parser's error, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return None if error is None else str(error)


def _given(argv: Sequence[str], settings: dict[str, dict]) -> dict[str, Any]:
    """The nested settings of a command line and its files; command-line values are texts."""
    merged: dict[str, Any] = {}
    for key, text in read_words(argv):
        name = key.removeprefix("--")
        if name == "config":
            merged = merge(merged, settings[text or ""])
        elif name.endswith("+"):  # `--key+ value` appends to a list
            value = read_text(text or "")
            merged = merge(
                merged, nested({name[:-1]: value if isinstance(value, list) else [value]})
            )
        elif name != "print_config":
            merged = merge(merged, nested({name: text or ""}))
    return merged


def _file_at_fault(
    fill: Callable, layers: list[tuple[str, dict[str, Any]]], error: UserError
) -> str:
    """`FILE: ` for the file that causes the error, else ``. Files are added one by one; the first
    file after which the same error arises is at fault."""
    settings: dict[str, Any] = {}
    for path, own in layers:
        settings = merge(settings, own)
        try:
            fill([f"--config={path}"], {path: settings})
        except UserError as other:
            if str(other) == str(error):
                return f"{path}: "
    return ""


def _make_parser(
    config_class: Any,
    prog: str,
    description: str,
    settings: dict[str, dict],
    with_help: bool,
    rules: Rules,
) -> Any:
    """A parser for the settings of a class; with_help: with their docstrings.

    To find the docstrings, jsonargparse parses the sources of all classes. Without them a command
    is read in half the time. `--help` shows them, and `--print_config=comments`.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    class Parser(ArgumentParser):
        """Takes a file's settings from `settings`; they override earlier arguments."""

        so_far = None

        def parse_path(self, path, *args, **kwargs):
            own = _with_earlier_keys(settings[str(path)], self.so_far)
            return self.parse_string(json.dumps(own, ensure_ascii=False), **kwargs)

        def dump(self, cfg, *args, **kwargs):  # what --print_config prints
            cfg = cfg.clone()
            for key, value in rules.show(cfg.as_dict()).items():
                cfg[key] = value
            return super().dump(cfg, *args, **kwargs)

        def exit(self, *args, **kwargs):
            flush_or_drop()
            super().exit(*args, **kwargs)

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser, namespace, *args, **kwargs):
            parser.so_far = namespace
            super().__call__(parser, namespace, *args, **kwargs)

    with contextlib.suppress(ImportError, TypeError, ValueError):  # docstring-parser is optional
        from jsonargparse import set_parsing_settings

        set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    parser = Parser(prog=prog, exit_on_error=False, description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the keys below")
    parser.add_class_arguments(config_class, None, as_group=False)
    return parser


def _with_earlier_keys(settings: dict[str, Any], so_far: Any, prefix: str = "") -> dict[str, Any]:
    """`settings`, with earlier keys added to each mapping that jsonargparse would replace entirely.

    so_far: the parser's namespace. It merges nested namespaces itself, but not the dicts in them.
    Raises UserError for a group of settings whose value is no mapping; `prefix` begins its name.
    """
    if isinstance(so_far, dict):
        return merge(so_far, settings)
    merged = {}
    for key, value in settings.items():
        before = so_far.get(key)
        if hasattr(before, "get") and not isinstance(value, dict):
            raise UserError(f"{prefix}{key}: got {value!r}, expected a mapping of settings")
        if hasattr(before, "get"):
            value = _with_earlier_keys(value, before, f"{prefix}{key}.")
        merged[key] = value
    return merged


def _check_values(settings: dict[str, Any]) -> None:
    """Raise UserError if a number in nested settings is infinite or NaN, or if a text has a NUL,
    which no file's name can have, or code points that UTF-8 does not have."""
    for key, value in flatten(settings).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{key}: got {item}, expected a finite number")
            if isinstance(item, str) and _NO_TEXT.search(item):
                raise UserError(f"{key}: got {item!r}, expected text of UTF-8 without NUL")
