"""The disk cache of kernels, in processes of its own on a copy of the kernel sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ffcv_ssl

pytestmark = pytest.mark.whole

# A kernel that calls a function of another file: numba alone would miss an edit of the callee.
CALLEE = """
from ffcv_ssl.kernels.compile import device

@device
def callee(x):
    return x + {added}
"""
CALLER = """
from ffcv_ssl.kernels.callee import callee
from ffcv_ssl.kernels.compile import kernel

@kernel("int64(int64)")
def caller(x):
    return 10 * callee(x)
"""
RUN = """
import json
from ffcv_ssl.kernels import compile as c
from ffcv_ssl.kernels.caller import caller
compiled = caller.load()
print(json.dumps({"compiled": compiled, "result": int(caller(1)), "folder": c.cache_folder()}))
"""


class Package:
    """A copy of the kernel sources with the two functions above, and a cache folder of its own."""

    def __init__(self, root):
        self.kernels = root / "sources" / "ffcv_ssl" / "kernels"
        shutil.copytree(Path(ffcv_ssl.__file__).parent / "kernels", self.kernels)
        (self.kernels.parent / "__init__.py").write_text("")
        self.set_callee(1)
        (self.kernels / "caller.py").write_text(CALLER)
        self.cache = root / "cache"

    def set_callee(self, added):
        (self.kernels / "callee.py").write_text(CALLEE.format(added=added))

    def start(self, code=RUN, **environment):
        variables = {
            **os.environ,
            "FFCV_SSL_CACHE": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.Popen(
            command,
            cwd=self.kernels.parent.parent,  # where -c looks for modules first
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment):
        return finish(self.start(**environment))

    def files(self, suffix):
        return sorted(self.cache.glob(f"kernels-*/*{suffix}"))


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


def test_a_second_process_loads_and_does_not_compile(package):
    first, second = package.run(), package.run()
    assert first["compiled"] and not second["compiled"]
    assert first["result"] == second["result"] == 20
    assert len(package.files(".nbc")) == 1


def test_an_edited_callee_in_another_file_is_noticed(package):
    assert package.run()["result"] == 20
    package.set_callee(2)
    edited = package.run()
    assert edited["compiled"] and edited["result"] == 30
    package.set_callee(1)
    back = package.run()
    assert not back["compiled"] and back["result"] == 20


def test_a_file_edited_after_its_import_does_not_poison_the_cache(package):
    edit_late = RUN.replace(
        "compiled =",
        "import pathlib, ffcv_ssl.kernels.callee as m\n"
        "path = pathlib.Path(m.__file__)\n"
        "path.write_text(path.read_text().replace('x + 1', 'x + 5'))\n"
        "compiled =",
    )
    assert finish(package.start(edit_late))["result"] == 20
    assert package.run()["result"] == 60


def test_eight_processes_at_once_compile_once(package):
    results = [finish(process) for process in [package.start() for _ in range(8)]]
    assert {result["result"] for result in results} == {20}
    assert sum(result["compiled"] for result in results) == 1
    assert len(package.files(".nbi")) == len(package.files(".nbc")) == 1
    assert package.files(".tmp.*") == []


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_cache_file_costs_a_compilation_and_is_replaced(package, suffix, damage):
    package.run()
    (path,) = package.files(suffix)
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])
    again, then = package.run(), package.run()
    assert again["compiled"] and not then["compiled"]
    assert again["result"] == then["result"] == 20


def test_an_unusable_cache_folder_is_replaced_by_the_users_own(package, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    home = tmp_path / "home"
    result = package.run(FFCV_SSL_CACHE=str(blocked), XDG_CACHE_HOME=str(home))
    assert result["result"] == 20 and result["folder"].startswith(str(home / "ffcv_ssl"))


def test_without_any_writable_home_a_private_temporary_folder_serves(package, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    places = dict.fromkeys(("FFCV_SSL_CACHE", "XDG_CACHE_HOME"), str(blocked))
    first = package.run(**places, TMPDIR=str(temporary))
    second = package.run(**places, TMPDIR=str(temporary))
    assert first["compiled"] and not second["compiled"]
    (folder,) = temporary.glob("ffcv_ssl-*")
    assert first["folder"].startswith(str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700


def test_other_arguments_than_the_signatures_are_refused_and_not_compiled(package):
    code = (
        RUN
        + "try:\n    caller('text')\nexcept TypeError:\n    pass\nelse:\n    raise SystemExit(3)"
    )
    assert finish(package.start(code))["result"] == 20
