"""The disk cache of kernels, in processes of its own on a copy of the kernel sources."""

import json
import os
import random
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
# A process that flips bits of a cache file: each time, a process forked from it loads the kernel.
FLIP = """
import json, os, sys
from ffcv_ssl.kernels import compile as c
from ffcv_ssl.kernels.caller import caller
path, bits = sys.argv[1], json.loads(sys.argv[2])
sound = open(path, "rb").read()

def load():
    child = os.fork()
    if child == 0:
        compiled = caller.load()
        os._exit(100 + compiled if caller(1) == 20 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 100

found = []
for bit in bits:
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    open(path, "wb").write(damaged)
    found.append([load(), load()])  # 0: loaded, 1: compiled, else: dead
    open(path, "wb").write(sound)
print(json.dumps(found))
"""
# A process that is forked while a thread of it compiles; the child needs the same kernel, then a
# second one.
FORK = """
import json, os, signal, threading, time
from ffcv_ssl.kernels import caller as module, compile as c
compiling, find = threading.Event(), c.FunctionCache.load_overload

def slow(*arguments):
    found = find(*arguments)  # within numba's compiler lock
    compiling.set()
    time.sleep(0.5)
    return found

c.FunctionCache.load_overload = slow
thread = threading.Thread(target=module.caller.load)
thread.start()
compiling.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    other = c.kernel("int64(int64)")(module.caller.dispatcher.py_func)
    os._exit(7 if (module.caller(1), other(1)) == (20, 20) else 8)
thread.join()
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), module.caller(1)]))
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

    def start(self, code=RUN, *arguments, within=(), **environment):
        variables = {
            **os.environ,
            "FFCV_SSL_CACHE": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        command = [*within, sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        return subprocess.Popen(
            command,
            cwd=self.kernels.parent.parent,  # where -c looks for modules first
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, within=(), **environment):
        return finish(self.start(within=within, **environment))

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


def test_a_fork_while_a_kernel_is_compiled_can_load_kernels_of_its_own(package):
    assert finish(package.start(FORK)) == [7, 20]


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


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_flipped_bits_cost_one_compilation_and_never_the_process(package, suffix):
    package.run()
    (path,) = package.files(suffix)
    bits = random.Random(0).sample(range(8 * path.stat().st_size), 12)
    found = finish(package.start(FLIP, path, json.dumps(bits)))
    assert found == [[1, 0]] * len(bits)


def test_eight_processes_that_find_a_damaged_file_compile_once(package):
    package.run()
    (path,) = package.files(".nbc")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    results = [finish(process) for process in [package.start() for _ in range(8)]]
    assert {result["result"] for result in results} == {20}
    assert sum(result["compiled"] for result in results) == 1


def test_kernels_with_bounds_checks_have_a_cache_of_their_own(package):
    plain, checked = package.run(), package.run(NUMBA_BOUNDSCHECK="1")
    assert plain["compiled"] and checked["compiled"]
    assert plain["folder"] != checked["folder"]
    again = package.run(), package.run(NUMBA_BOUNDSCHECK="1")
    assert not again[0]["compiled"] and not again[1]["compiled"]


# Root may write everywhere; without this capability it may not write to read-only folders.
READER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def make_read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def reader():
    """The command before that of a process that obeys the modes of files."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv (util-linux) to take a privilege from root with")
    return READER


def test_a_complete_read_only_cache_is_used(package, reader, tmp_path):
    package.run()
    make_read_only(package.cache)
    home = tmp_path / "home"
    result = package.run(within=reader, XDG_CACHE_HOME=str(home))
    assert result["result"] == 20 and not result["compiled"]
    assert not list(home.rglob("*.nbc"))


def test_what_is_damaged_in_a_read_only_cache_is_compiled_once_elsewhere(package, reader, tmp_path):
    package.run()
    (path,) = package.files(".nbc")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    make_read_only(package.cache)
    home = tmp_path / "home"
    first, second = (package.run(within=reader, XDG_CACHE_HOME=str(home)) for _ in range(2))
    assert first["compiled"] and not second["compiled"]
    assert first["folder"].startswith(str(home)) and second["result"] == 20


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("which", ["root", "kernels"])
def test_a_folder_that_others_can_write_to_is_refused_in_one_line(package, tmp_path, mode, which):
    package.run()
    folder = package.cache if which == "root" else package.files(".nbc")[0].parent
    folder.chmod(mode)
    process = package.start(XDG_CACHE_HOME=str(tmp_path / "home"))
    out, err = process.communicate(timeout=300)
    result = json.loads(out)
    assert result["compiled"] and result["result"] == 20
    assert result["folder"].startswith(str(tmp_path / "home"))
    (line,) = [line for line in err.splitlines() if "lets others write" in line]
    assert line.startswith(f"{folder}: mode {mode:o} of user {os.geteuid()}")


def test_a_cache_of_another_user_is_refused(package, tmp_path):
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    package.run()
    os.chown(package.cache, 12345, 12345)
    result = package.run(XDG_CACHE_HOME=str(tmp_path / "home"))
    assert result["compiled"] and result["folder"].startswith(str(tmp_path / "home"))


def test_a_cache_made_under_a_lax_umask_serves(package):
    old = os.umask(0)
    try:
        first, second = package.run(), package.run()
    finally:
        os.umask(old)
    assert first["compiled"] and not second["compiled"]
    assert all(path.stat().st_mode & 0o022 == 0 for path in package.files(".nb?"))


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
