"""argparse's parser as the commands use it: mistakes of one line, and help that `head` reads."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ffcv_ssl.config.app_files import shown_program
from ffcv_ssl.config.stdout import flush_or_drop
from ffcv_ssl.errors import UserError


class QuietParser(argparse.ArgumentParser):
    """A parser whose --help may be read by `head`."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush_or_drop()
        super().exit(status, message)


class OneLineParser(QuietParser):
    """A parser whose mistakes are UserErrors of one line, without the usage text.

    prog: the script's name; help shows how the user has called it.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=shown_program(prog), **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
