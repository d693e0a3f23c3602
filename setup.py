"""Package metadata. `pip install .` needs no compiler and no system package."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ffcv-ssl",
    version="0.1.0",
    description="Fast, dependable self-supervised pretraining of image encoders",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ffcv_ssl", "ffcv_ssl.*", "pipelines", "pipelines.*"]),
    py_modules=["train", "evaluate", "write_dataset"],
    package_data={"ffcv_ssl.monitor": ["assets/*"]},
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
            "coverage>=7.4",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "types-PyYAML>=6.0",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "timm>=1.0",
            "xxhash>=3.4",
        ],
        "wandb": ["wandb>=0.19"],
        "bench": ["nvidia-dali-cuda130>=2.0"],
        "interop": ["ffcv==1.0.2"],
    },
)
