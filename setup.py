"""Package metadata. `pip install .` needs no compiler and no system package.

A wheel has one top-level package, `ffcv_ssl`, and one command, `ffcv-ssl`. The repository's
scripts, view recipes and configurations are in it as `ffcv_ssl/app/`, byte for byte; an editable
install uses them where they are.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SCRIPTS = ["train.py", "evaluate.py", "write_dataset.py", "demo.py"]
APP = "ffcv_ssl/app"


def app_files() -> list[str]:
    """The files of `ffcv_ssl/app/`, as paths from here and from there."""
    found = [*ROOT.glob("pipelines/*.py"), *ROOT.glob("configs/**/*.yaml")]
    return SCRIPTS + sorted(path.relative_to(ROOT).as_posix() for path in found)


class BuildWithApp(build_py):
    """Builds the package, with the scripts and configurations inside."""

    def run(self) -> None:
        super().run()
        for source, target in self._app().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._app().values()]

    def get_output_mapping(self) -> dict[str, str]:
        copies = {target: source for source, target in self._app().items()}
        return {**super().get_output_mapping(), **copies}

    def get_source_files(self) -> list[str]:  # for the sdist
        return [*super().get_source_files(), *app_files()]

    def _app(self) -> dict[str, str]:
        if self.editable_mode:
            return {}
        return {name: f"{self.build_lib}/{APP}/{name}" for name in app_files()}


setup(
    name="ffcv-ssl",
    version="0.1.0",
    description="Fast, dependable self-supervised pretraining of image encoders",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["ffcv_ssl", "ffcv_ssl.*"]),
    package_data={
        "ffcv_ssl.command_line": ["words.json"],
        "ffcv_ssl.monitor": ["assets/*"],
    },
    cmdclass={"build_py": BuildWithApp},
    entry_points={"console_scripts": ["ffcv-ssl = ffcv_ssl.command_line:main"]},
    install_requires=[
        "numpy>=1.24",
        "numba>=0.60",
        "torch>=2.6",  # before it, weights_only=True did not keep a checkpoint from running code
        "torchvision>=0.21",
        "simplejpeg>=1.8",
        "Pillow>=10.0",
        "pyyaml>=6.0",
        "jsonargparse[signatures]>=4.30",
        "safetensors>=0.4",
        "tensorboard>=2.14",
        "rich>=13.0",
        "filelock>=3.13",
        "matplotlib>=3.8",
        "plotly>=5.24",
        "submitit>=1.5",
    ],
    extras_require={
        "dev": [
            "build>=1.2",
            "coverage>=7.4",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "setuptools>=70.1",
            "types-PyYAML>=6.0",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "timm>=1.0",
            "wandb>=0.19",
            "xxhash>=3.4",
        ],
        "wandb": ["wandb>=0.19"],
        "bench": ["nvidia-dali-cuda130>=2.0"],
        "interop": ["ffcv==1.0.2"],
    },
)
