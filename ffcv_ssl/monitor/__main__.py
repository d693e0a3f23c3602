"""A page of what runs have done so far: their curves, numbers, views and settings.

    ffcv-ssl monitor runs/a runs/b                    # writes report.html
    ffcv-ssl monitor runs --out all.html              # of all runs below a folder
    ffcv-ssl monitor runs --serve --port 8000         # the same, live while they train

The page is one file that loads nothing. With --serve it is shown at 127.0.0.1 alone, until Ctrl-C.
`python -m ffcv_ssl.monitor` is the same command. The last line on stdout is one JSON object. Exit
code 0: done; 1: nobody reads stdout; 2: a user's mistake.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsers import OneLineParser
from ffcv_ssl.config.stdout import say
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import check_target, own_temporary, remedy_for, write_text
from ffcv_ssl.monitor import serve
from ffcv_ssl.monitor.board import Board
from ffcv_ssl.monitor.find import check_paths
from ffcv_ssl.monitor.page import GENERATOR, make_page

DEFAULT_OUT = "report.html"
_HEAD_BYTES = 300  # of a page: they name what wrote it


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="ffcv-ssl monitor",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", help="runs' folders, or folders of runs")
    parser.add_argument("--out", metavar="HTML", help=f"the page; default {DEFAULT_OUT}")
    parser.add_argument("--serve", action="store_true", help="show it live in the browser")
    parser.add_argument("--port", help="of --serve, 0 to 65535; default 0: any that is free")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        options = make_parser().parse_args(argv)
        port = _check(options)
        if options.serve:
            summary = serve.run(Board(options.runs), port)
        else:
            summary = _write(options.runs, options.out)
        say(json.dumps(summary))
        return 0
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:  # while it reads or writes; --serve takes it as its end
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _check(options: argparse.Namespace) -> int:
    """The port. Raises UserError for options that do not go together and paths without runs."""
    if options.serve and options.out is not None:
        raise UserError(
            f"--out: got {options.out!r} with --serve, which writes no file; leave one out"
        )
    if not options.serve and options.port is not None:
        raise UserError(f"--port: got {options.port!r} without --serve; add --serve")
    port = options.port or "0"
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"--port: got {port!r}, expected 0 to 65535")
    check_paths(options.runs, may_come_later=options.serve)
    if not options.serve:
        _check_out(options.out)
    return int(port)


def _check_out(out: str | None) -> None:
    """Raise UserError where the page cannot be written, or another program's file has its name."""
    path = Path(check_target(DEFAULT_OUT if out is None else out))
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written (no folder {path.parent}); make it first")
    if out is None and path.exists():
        with path.open("rb") as file:
            if GENERATOR.encode() not in file.read(_HEAD_BYTES):
                raise UserError(f"{path}: is not a page of this command; use --out HTML")


def _write(runs: Sequence[str], out: str | None) -> dict[str, Any]:
    """Write the page; returns the summary. Raises UserError."""
    path = check_target(DEFAULT_OUT if out is None else out)
    board = Board(runs)
    board.refresh()
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    text = make_page(board.since("", 0), {"written": written})
    try:
        write_text(path, text, own_temporary(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy_for(error)}"
        ) from None
    for run in board.runs:
        for note in run.notes():
            print(one_line(f"{run.name}: {note}"), file=sys.stderr)
    num_bytes = os.path.getsize(path)
    say(f"{path}: {len(board.runs)} runs, {num_bytes / 1e6:.1f} MB; open it in a browser")
    return {"status": "written", "out": path, "bytes": num_bytes, "runs": board.summary()}


if __name__ == "__main__":
    sys.exit(main())
