"""The command `ffcv-ssl`: its sub-commands, how it refuses, and what a shell completes."""

import json
import os
import subprocess
import sys
import time

import pytest
from support.small_files import REPOSITORY

from benchmarks import completion_words
from ffcv_ssl import command_line
from ffcv_ssl.command_line import COMMANDS, completion, main
from ffcv_ssl.config import app_files
from ffcv_ssl.errors import UserError


@pytest.fixture(autouse=True)
def as_a_new_process(monkeypatch):
    monkeypatch.setattr(app_files, "is_command", [False])


# ---- Sub-commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_every_command_has_one_line_in_the_help(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: ffcv-ssl COMMAND ..."
    for name, found in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [
            f"  {name:{max(map(len, COMMANDS))}}  {found.summary}"
        ]
    assert max(map(len, lines)) <= 80


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "ffcv-ssl 0.1.0\n"
    assert 'version="0.1.0"' in (REPOSITORY / "setup.py").read_text()


def test_an_unknown_command_is_one_line_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "ffcv-ssl: got 'trian', expected one of write, train, evaluate, chain, views, inspect, "
        "monitor, demo, selftest; did you mean train?\n"
    )
    for name in ("xyzzy", ""):
        assert main([name]) == 2
        assert capsys.readouterr().err.endswith("selftest; see --help\n")


@pytest.mark.parametrize("name", [*COMMANDS])
def test_every_command_is_there(name):
    assert callable(command_line.find(name))


def test_a_command_that_is_missing_is_one_line(monkeypatch, capsys, tmp_path):
    missing = command_line.Command("", "ffcv_ssl.missing.__main__")
    monkeypatch.setitem(COMMANDS, "missing", missing)
    assert main(["missing"]) == 2
    assert capsys.readouterr().err == (
        "ffcv-ssl: missing: this version does not have it; update ffcv-ssl\n"
    )
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):  # that is another matter
        command_line._import("a", "needs_more")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--epochs=0"], "epochs: got 0, expected a whole number above 0"),
        (["train", "--config=nothing"], "nothing: no such configuration file"),
        (["evaluate", "lienar"], "protocol: got 'lienar', expected one of export, "),
        (["write", "--out=a"], "write_dataset.py: the following arguments are required: --source"),
        (["chain"], "got no chain, expected a YAML file"),
        (["views", "simclr"], "pipelines: beton: got none, expected --beton FILE.beton"),
        (["inspect", "no.beton"], "no.beton: cannot be opened"),
        (["selftest", "--seconds=0"], "selftest: argument --seconds: got '0', expected seconds"),
        (["selftest", "--device=cuda:99"], "selftest: system.device: got cuda:99, but there is no"),
    ],
)
def test_a_mistake_is_the_scripts_line_and_exit_code(words, line, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line) and printed.err.count("\n") == 1, printed.err


def test_help_of_a_command_says_how_it_was_called(capsys):
    for words, usage in [
        (["write", "--help"], "usage: ffcv-ssl write ["),
        (["demo", "--help"], "usage: ffcv-ssl demo ["),
        (["views", "--help"], "usage: ffcv-ssl views RECIPE ["),
        (["inspect", "--help"], "usage: ffcv-ssl inspect ["),
        (["train", "--help"], "usage: ffcv-ssl train ["),
        (["evaluate", "knn", "--help"], "usage: ffcv-ssl evaluate knn ["),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(usage), printed


@pytest.mark.parametrize("platform", ["win32", "cygwin", "emscripten"])
def test_systems_without_posix_files_are_refused_in_one_line(platform):
    with pytest.raises(UserError, match=f"got the system {platform}, expected Linux or another"):
        command_line.check_system(platform)


# ---- Completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["--ver"], ["--version"]),
        (["--completion", ""], ["bash", "zsh", "fish"]),
        (["train", "--op"], ["--optim."]),
        (["train", "--optim.lr"], ["--optim.lr", "--optim.lr_scaling"]),
        (["train", "--precision", ""], ["bf16", "fp16", "fp32"]),
        (["train", "--precision=b"], ["--precision=bf16"]),
        (["train", "--precision", "=", "f"], ["fp16", "fp32"]),  # as bash splits it
        (["train", "--channels_last", "="], ["true", "false"]),
        (["train", "--config", "imagenette/cpu_s"], None),
        (["train", "--method", "m"], ["moco"]),
        (["train", "--moco.t"], ["--moco.temperature"]),
        (["train", "--views.view_3.blur_s"], ["--views.view_3.blur_sigma"]),
        (["train", "--data.train", ""], []),  # a file
        (["evaluate", "kn"], ["knn"]),
        (["evaluate", "knn", "--temp"], ["--temperatures"]),
        (["views", "byo"], ["byol"]),
        (["write", "--mo"], ["--mode"]),
        (["write", "--mode", "s"], ["smart"]),
        (["inspect", "--v"], ["--verify"]),
        (["chain", "suncet/chain_1p"], ["suncet/chain_1percent"]),
        (["unknown", "--x"], []),
    ],
)
def test_words_are_completed(words, expected):
    found = completion.complete(words)
    if expected is None:
        assert "imagenette/cpu_simclr" in found and "demo" not in found
    else:
        assert [word for word in found if word in expected] == expected, found
        assert len(found) <= max(len(expected), 6)


def test_the_words_that_are_completed_are_all_settings_there_are():
    written = completion_words.FILE.read_text()
    assert written == completion_words.text(), "run: python -m benchmarks.readme"


def test_a_shell_without_a_script_is_refused(capsys):
    for words in (["--completion"], ["--completion", "tcsh"]):
        assert main(words) == 2
        assert "expected one of bash, zsh, fish" in capsys.readouterr().err


@pytest.fixture
def shell(tmp_path):
    """The environment of a shell that finds the command `ffcv-ssl`."""
    command = tmp_path / "ffcv-ssl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ffcv_ssl "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.whole
def test_bash_completes_what_was_typed(shell):
    code = """
        eval "$(ffcv-ssl --completion bash)"
        compopt() { echo "$@"; }
        complete_line() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            _ffcv_ssl
            echo "${COMPREPLY[*]}"
        }
        complete_line ffcv-ssl t
        complete_line ffcv-ssl train --precision = b
        complete_line ffcv-ssl train --opti
        complete -p ffcv-ssl
    """
    done = subprocess.run(["bash", "-c", code], env=shell, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "train", "bf16", "-o nospace", "--optim.", "complete -o default -F _ffcv_ssl ffcv-ssl",
    ], done.stderr  # fmt: skip


@pytest.mark.whole
def test_completion_and_help_import_neither_torch_nor_numpy(shell):
    code = "import sys; from ffcv_ssl.command_line import main; main(sys.argv[1:]); "
    code += "print({'torch', 'numpy', 'numba', 'yaml', 'jsonargparse'} & set(sys.modules))"
    for words in (["--complete-words", "train", "--optim."], ["--complete-words", "ev"]):
        command = [sys.executable, "-c", code, *words]
        began = time.perf_counter()
        done = subprocess.run(command, env=shell, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "set()", time.perf_counter() - began


# ---- Output --------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize(
    "words",
    ["--help", "write --help", "train --help", "train --print_config", "evaluate --help",
     "write --source shapes --num_samples 20 --out a.beton", "chain --help", "inspect --help"],
)  # fmt: skip
def test_a_reader_that_has_read_enough_is_no_traceback(words, shell, tmp_path):
    for count in (0, 1):
        code = f"set -o pipefail; ffcv-ssl {words} | head -n {count}"
        done = subprocess.run(
            ["bash", "-c", code], env=shell, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stderr == "" and done.returncode in (0, 1), done.stderr


@pytest.mark.whole
def test_a_summary_is_the_last_line_of_the_command_too(shell, tmp_path):
    words = ["ffcv-ssl", "write", "--source=shapes", "--num_samples=20", "--out=a.beton"]
    done = subprocess.run(words, env=shell, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 20, done.stderr
