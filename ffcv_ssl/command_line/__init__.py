"""The command `ffcv-ssl`: one name for all commands of the project.

    ffcv-ssl write --source imagefolder --root photos --split train --out train.beton
    ffcv-ssl train --config auto --data.train train.beton --out runs/first
    torchrun --nproc_per_node 8 -m ffcv_ssl train --config simclr
    eval "$(ffcv-ssl --completion bash)"

Each sub-command is the script or module of before: same words, same lines, same exit codes, same
signals. Nothing of it is imported before it is chosen, so that help and completion cost no torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ffcv_ssl import __version__
from ffcv_ssl.command_line import completion
from ffcv_ssl.config import app_files, told_mistakes
from ffcv_ssl.config.app_files import COMMAND
from ffcv_ssl.errors import UserError

Main = Callable[[Sequence[str]], int]
EXIT_USER_ERROR = 2  # as in ffcv_ssl.training.command, which imports torch


class Command(NamedTuple):
    """A sub-command: one line about it, and the module whose `main(argv)` returns its exit code."""

    summary: str
    module: str
    """A dotted name; without a dot one of the project's scripts."""


COMMANDS = {
    "write": Command("images -> one .beton file", "write_dataset"),
    "train": Command("pretrain an encoder; linear probes learn along with it", "train"),
    "evaluate": Command("what a checkpoint is worth: probes, k-NN, fine-tuning...", "evaluate"),
    "chain": Command("several commands in order: pretrain, fine-tune...", "ffcv_ssl.jobs.chain"),
    "views": Command("draw what a recipe or a configuration makes of images", "pipelines.__main__"),
    "inspect": Command("what is in a .beton file, and whether it is sound", "ffcv_ssl.inspect"),
    "monitor": Command("a page about runs; --serve keeps it live", "ffcv_ssl.monitor.__main__"),
    "demo": Command("the main job on generated images, in a few minutes", "demo"),
    "selftest": Command("does this installation work, and how fast is it?", "ffcv_ssl.selftest"),
}
OPTIONS = {
    "--help": "show this",
    "--version": "show the version",
    "--completion bash|zsh|fish": "print a script that completes words in that shell",
}


def usage() -> str:
    """The text of `ffcv-ssl --help`."""
    lines = ["usage: ffcv-ssl COMMAND ...", ""]
    for rows in ({name: c.summary for name, c in COMMANDS.items()}, OPTIONS):
        width = max(map(len, rows))
        lines += [f"  {name:{width}}  {summary}" for name, summary in rows.items()] + [""]
    return "\n".join([*lines, "`ffcv-ssl COMMAND --help` shows the settings of a command."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == [completion.WORDS]:  # asked by a shell at each TAB
        return completion.answer(words[1:])
    if told_mistakes.is_told():  # as training.command does, but before torch is imported
        return EXIT_USER_ERROR
    try:
        check_system()
        return _run(words or ["--help"])
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(words: Sequence[str]) -> int:
    from ffcv_ssl.config.stdout import show

    name, *rest = words
    if name in ("--help", "-h"):
        show(usage())
    elif name == "--version":
        show(f"{COMMAND} {__version__}")
    elif name == "--completion":
        show(completion.script(rest))
    else:
        return find(name)(rest)
    return 0


def find(name: str) -> Main:
    """The `main` of a sub-command. Raises UserError for an unknown one."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
        remedy = f"did you mean {close[0]}?" if close else "see --help"
        raise UserError(f"got {name!r}, expected one of {', '.join(COMMANDS)}; {remedy}")
    app_files.is_command[0] = True
    module = COMMANDS[name].module
    if "." not in module:
        return app_files.load_script(module).main
    if module.startswith("pipelines"):
        app_files.load_pipelines()
    return _import(name, module)


def _import(name: str, module: str) -> Main:
    try:
        return importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UserError(f"{name}: this version does not have it; update ffcv-ssl") from None


def check_system(platform: str = sys.platform) -> None:
    """Raise UserError where the commands cannot work: they lock, replace and read files as POSIX
    systems do."""
    if platform in ("win32", "cygwin", "emscripten", "wasi"):
        raise UserError(
            f"got the system {platform}, expected Linux or another POSIX system; on Windows use WSL"
        )
