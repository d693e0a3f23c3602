"""What every command of ours does alike: one-line errors, configuration from dataclasses, signals.

A user's mistake ends as one line on stderr and exit code 2; an interrupted command ends with 75.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ffcv_ssl.config_files import merge, read_layers

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75


class UserError(ValueError):
    """A mistake that the user can put right: where, got, expected, remedy, on one line."""


class Interrupted(Exception):
    """A signal asked the run to stop, and what was done is saved."""


class NonFiniteLoss(ArithmeticError):
    """The loss or a weight became NaN or infinite; the last checkpoint is from before."""


def parse_config(config_class, argv, prog, description, sort_out=None):
    """Fill a frozen dataclass from `--config FILE.yaml` and dotted overrides.

    A file may build on others (`base:`, see config_files); arguments count in the order in which
    they are given. Returns (config, list of the YAML files given). `sort_out(config)` may raise
    ValueError for values that do not go together. Raises UserError for unknown keys and bad values,
    naming the file where a file is at fault; exits as argparse does for --help and --print_config.
    """
    files = _config_files(argv)
    if "" in files:
        raise UserError("--config: got nothing, expected a YAML file")
    try:
        layers = {path: read_layers(path) for path in files}
    except ValueError as error:
        raise UserError(one_line(error)) from None
    settings = {path: merge(*(own for _, own in layers[path])) for path in files}
    fill = partial(_fill, config_class, prog, description, sort_out)
    try:
        return fill(argv, settings), files
    except UserError as error:
        where = _file_at_fault(fill, [layer for path in files for layer in layers[path]], error)
        raise UserError(f"{where}{error}") from None


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


def one_line(error):
    """An error's text on one line, in this project's words where the parser's are cryptic."""
    text = " ".join(str(error).split())
    text = text.removeprefix("Validation failed: ")
    text = re.sub(
        r"^(?:Option|Key) '([^']+)' is not (accepted|expected)", r"unknown key '\1'", text
    )
    text = re.sub(
        r"Group '([^']+)' does not accept (?:option|nested key) '([^']+)'",
        r"\1: unknown key '\2'",
        text,
    )
    text = re.sub(r"Parser key \"([^\"]+)\":", r"\1:", text)
    text = re.sub(r"Unexpected keys: \{([^}]+)\}\. Got value: .*", r"unknown key \1", text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"unrecognized arguments: --([^\s=]+).*$", r"\1: unknown key", text)
    text = _UNION.sub(_one_of_several, text)
    text = re.sub(
        r"Not of type \w+: (\S+) does not conform to restriction (.*)$",
        lambda found: f"got {found[1]}, expected {_in_words(found[2])}",
        text,
    )
    text = _NO_NUMBER.sub(r"got \1, expected a number", text)
    text = re.sub(r"Expected an? (.*)\. Got value: (.*)$", r"got \2, expected \1", text)
    text = re.sub(r"expected tuple(?: with (\d+) elements)?$", _list_of, text)
    return text.replace("expected Literal", "expected one of ")


_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*?)\] Errors: "
    r"(?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)$"
)
_NO_NUMBER = re.compile(
    r"Not of type \w+: (?:could not convert string to float|invalid literal for int.*?): ('[^']*')$"
)
_BOUNDS = {">": "above", ">=": "of at least", "<": "below", "<=": "of at most"}


def _one_of_several(found):
    """`got V, expected A or null` for a value that fits none of several types."""
    bounds = re.search(r"restriction (v.*?)(?= - |$)", found["errors"])
    number = _in_words(bounds[1]) if bounds else "a number"  # its type is one of jsonargparse's own
    kinds = []
    for name in re.split(r", (?![^\[]*\])", found["types"]):
        if name.startswith("tuple["):
            each = f", each {number}" if bounds else ""
            kinds.append(f"a list of {name.count(',') + 1}{each}")
        else:
            kinds.append(_PLAIN.get(name, number if name.isidentifier() else name))
    return f"got {found['value']}, expected {' or '.join(kinds)}"


_PLAIN = {"NoneType": "null", "str": "text", "int": "a whole number", "float": "a number"}


def _list_of(found):
    return f"expected a list of {found[1]}" if found[1] else "expected a list"


def _in_words(bounds):
    """`v>=0 and v<=1` -> `a number of at least 0 and of at most 1`."""
    return "a number " + re.sub(r"v([<>]=?)", lambda found: f"{_BOUNDS[found[1]]} ", bounds)


def config_dict(config):
    """A configuration as nested dicts and lists, as YAML and checkpoints hold it."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        for kind in (bool, int, float, str):  # the parser's PositiveInt and its like become int
            if isinstance(value, kind):
                return kind(value)
        return value

    return plain(asdict(config))


def _check_finite(settings):
    """Raise UserError for a number that is infinite or not one, in what `config_dict` returns."""
    for key, value in _flatten(settings).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}: got {number}, expected a finite number")


def config_differences(before, now, free_keys=(), free_groups=()):
    """Settings in which two `config_dict`s differ, each as `key VALUE there, VALUE here`.

    Keys in `free_keys`, and those that start with one of `free_groups`, may differ.
    """
    before, now = _flatten(before), _flatten(now)
    free_groups = tuple(free_groups)
    return [
        f"{key} {_shown(before, key)} there, {_shown(now, key)} here"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and key not in free_keys
        and not key.startswith(free_groups)
    ]


def _shown(side, key):
    return repr(side[key]) if key in side else "not set"


def _flatten(nested, prefix=""):
    """Nested dicts -> {"a.b": value}; empty dicts vanish."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class StopSignal:
    """Within its context, `asked` turns true when SIGTERM, SIGINT or SIGUSR2 arrives.

    Slurm sends SIGUSR2 some time before it ends a job. `received` lists the signals in their order.
    Later ones are only noted, so that they cannot break what the first one asked for, but a second
    SIGINT (Ctrl-C twice) acts as if nobody listened. A context within another one knows what that
    one has received, and passes on what it receives itself. The former handlers come back at the
    end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self):
        self.received = []
        self.former = {}

    @property
    def asked(self):
        return bool(self.received)

    def __enter__(self):
        outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(outer, StopSignal):
            self.received = outer.received
        for number in self.SIGNALS:
            self.former[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame):
        if not self.received:
            # not print: the signal may have come in the middle of one
            os.write(2, b"stopping after this step; the run can be resumed\n")
        self.received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, self.former[number])

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)


def run_ranks(run, argv):
    """Call run(argv) -> (exit code, summary) in each rank of a command, and return the exit code;
    the first rank prints the summary as JSON.

    Mistakes become one line on stderr and exit code 2, a loss that is not finite exit code 1.
    """
    from ffcv_ssl import BetonError  # these two import this module
    from ffcv_ssl.checkpoint import CheckpointError

    try:
        code, summary = run(argv)
    except (UserError, NonFiniteLoss, BetonError, CheckpointError) as error:
        # all ranks of a node make these mistakes alike: one says it
        is_common = isinstance(error, UserError | NonFiniteLoss)
        if not is_common or os.environ.get("LOCAL_RANK", "0") == "0":
            print(one_line(error), file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLoss) else EXIT_USER_ERROR
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary), flush=True)
    return code


def choose_device(name):
    """A torch device by name; `auto` is the CUDA device where there is one. Raises UserError."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"system.device: got {name}, but there is no such device here; use cpu")
    return device


@contextlib.contextmanager
def hold_folder(folder, wait_s=0):
    """Make a folder and hold it while the context lasts: two runs in one folder would destroy each
    other's files. Waits `wait_s` seconds for another process to let it go. Raises UserError. The
    lock dies with the process, however that ends."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be the run's folder ({error.strerror})") from None
    with lock:
        if not _is_locked_within(lock, wait_s):
            raise UserError(f"{folder}: another process trains here; use another --out")
        yield folder


def _is_locked_within(lock, wait_s):
    """Try to lock an open file for so many seconds; True also where there are no locks."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(min(1, wait_s))
        except OSError:
            return True  # a file system without locks
        else:
            return True
