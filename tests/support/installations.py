"""Distributions built from the sources, and environments of their own to install them in."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from support.small_files import REPOSITORY

SOURCES = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py",
    "write_dataset.py", "demo.py", "pipelines", "configs", "ffcv_ssl",
)  # fmt: skip
APP_FOLDERS = ("pipelines", "configs")
APP_FILES = ("train.py", "evaluate.py", "write_dataset.py", "demo.py")


def copy_sources(folder):
    """The repository's sources in a folder of their own: building leaves files beside them."""
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    return folder


def app_files():
    """{name below ffcv_ssl/app: path of the repository's file}."""
    found = [REPOSITORY / name for name in APP_FILES]
    for folder in APP_FOLDERS:
        found += [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("*.yaml")]
    return {path.relative_to(REPOSITORY).as_posix(): path for path in found}


def build(sources, out):
    """An sdist, and the wheel that is built from it: (sdist, wheel)."""
    run([sys.executable, "-m", "build", "--no-isolation", f"--outdir={out}", str(sources)])
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


class Environment:
    """A fresh virtual environment with one package; other packages are those of this process."""

    def __init__(self, folder, *words):
        """words: of pip, that say what to install."""
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        (self.site,) = folder.glob("lib/python*/site-packages")
        # behind the environment's own packages, and its .pth files (the editable install of these
        # sources may be there) are not read
        (self.site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", f"--python={self.bin}/python", "install", "--quiet"]
        # without --ignore-installed pip would take those packages for ones to replace
        pip += ["--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation"]
        run([*pip, *words])

    def run(self, *words, cwd, code=0, **more):
        """Run a program of this environment; returns what it has printed."""
        return run([str(self.bin / words[0]), *words[1:]], cwd=cwd, code=code, **more)


def run(command, cwd=None, code=0, **more):
    """Run a command without this process's PYTHONPATH; returns subprocess.CompletedProcess."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def top_level(names):
    """The first parts of paths, each once."""
    return {Path(name).parts[0] for name in names}
