"""Are the numbers the same? Digests of files, pixels, losses and evaluations, of one source tree.

    python -m benchmarks.fingerprint                           # this tree, as JSON on the last line
    python -m benchmarks.fingerprint --tree ../before > before.json    # another checkout
    python -m benchmarks.fingerprint --against before.json     # names what differs, exit code 1

A refactoring must not change any entry. The entries are digests of a file's samples, of every view
of every recipe with its drawn parameters, of each method's loss at each step, and of the metrics of
evaluations. This program uses only public commands and import paths, so one version of it works
with old and new trees. Digests are comparable only on the same kind of CPU and torch version. A
tree takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "--model.backbone": "resnet18", "--model.projector": "64-32", "--resolution.min": "32",
    "--resolution.max": "32", "--data.batch_size": "32", "--epochs": "2", "--log.every_steps": "1",
    "--log.tensorboard": "false", "--optim.warmup_epochs": "0.5", "--system.device": "cpu",
    "--system.torch_threads": "1", "--data.num_workers": "1", "--seed": "3", "--precision": "fp32",
    "--evaluation.every_epochs": "2",
}  # fmt: skip
LABELLED = {
    "--labelled.labels.fraction": "0.5",
    "--labelled.classes_per_batch": "4",
    "--labelled.images_per_class": "2",
}
RUNS = {
    "simclr": {},
    "simclr, bf16": {"--precision": "bf16"},
    "simclr in chunks": {"--data.chunk_size": "8"},
    "vicreg": {"--method": "vicreg"},
    "barlow": {"--method": "barlow"},
    "byol": {"--method": "byol"},
    "supervised": {"--method": "supervised", "--views.recipe": "supervised"},
    "instance_simclr": {"--method": "instance_simclr", "--views.recipe": "instance"},
    "suncet": {"--labelled.loss": "suncet", **LABELLED},
    "supcon": {"--labelled.loss": "supcon", **LABELLED},
    "cross_entropy": {"--labelled.loss": "cross_entropy", **LABELLED},
    "labels alone": {
        "--labelled.loss": "suncet",
        "--labelled.unsupervised_batch_size": "0",
        **LABELLED,
    },
}
EVALUATIONS = {
    "linear": ["--epochs", "3"],
    "knn": ["--k", "5"],
    "snn": [],
    "finetune": ["--epochs", "2", "--data.batch_size", "32", "--labels.fraction", "0.5"],
}

# Runs in the tree's folder; prints {name: digest} of the views of every recipe.
VIEWS = """
import hashlib, json, sys
import numpy as np
sys.path.insert(0, "")
from ffcv_ssl import Loader, OrderOption
from pipelines import Views, build
from pipelines.recipes import RECIPES

found = {}
for recipe in sorted(RECIPES):
    views = Views(recipe=recipe).resolve()
    pipelines = {name: ("image", build(view, 48)) for name, view in views.items()}
    digest = hashlib.blake2b(digest_size=10)
    with Loader(sys.argv[1], 16, num_workers=1, order=OrderOption.RANDOM, seed=5,
                pipelines=pipelines) as loader:
        for epoch in range(2):
            for batch in loader:
                for name in pipelines:
                    digest.update(np.ascontiguousarray(getattr(batch, name)).tobytes())
                    params = batch.params[name]
                    for column in sorted(params.dtype.names or ()):
                        digest.update(np.ascontiguousarray(params[column]).tobytes())
    found[f"views {recipe}"] = digest.hexdigest()
print(json.dumps(found))
"""


# Runs in the tree's folder: train.py and evaluate.py in one process, because small runs mostly cost
# start-up time. Stops at the first command that fails.
COMMANDS = """
import json, sys
sys.path.insert(0, "")
import evaluate, train

for program, words in json.loads(sys.argv[1]):
    print(program, *words[:2], file=sys.stderr)
    code = {"train": train, "evaluate": evaluate}[program].main(words)
    if code:
        sys.exit(f"{program} {' '.join(words)}: exit code {code}")
"""


def digest(value) -> str:
    """Digest of plain JSON data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()


def numbers(metrics: dict) -> dict:
    """Nested metrics without texts: the names of pictures depend on the folder."""
    return {
        key: numbers(value) if isinstance(value, dict) else value
        for key, value in metrics.items()
        if not isinstance(value, str)
    }


def call(tree: Path, *words: object) -> str:
    """The output of a Python command in a tree. If it fails, raises SystemExit with its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout


def last_json(text: str):
    """The JSON on the last line of a command's output."""
    return json.loads(text.strip().splitlines()[-1])


def options(settings: dict[str, str]) -> list[str]:
    """{"--key": value} as words of a command line."""
    return [word for pair in settings.items() for word in pair]


def losses_of(run: Path) -> list[dict]:
    """All losses and online evaluations of a run, without times and speeds."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = ("train/loss", "val/", "step", "flops", "lr")
    timed = ("train/images_per_s", "train/data_wait")
    return [
        {k: v for k, v in json.loads(line).items() if k.startswith(wanted) and k not in timed}
        for line in lines
    ]


def fingerprint(tree: Path, folder: Path) -> dict[str, str]:
    """{name: digest} of a tree; files are written to `folder`."""
    found: dict[str, str] = {}
    files = {"train": 192, "val": 64}
    for seed, (name, count) in enumerate(files.items()):
        path = folder / f"{name}.beton"
        call(
            tree, "write_dataset.py", "--source", "shapes", "--out", path, "--workers", 1,
            "--num_samples", count, "--size_px", 40, "--seed", seed,
        )  # fmt: skip
        found[f"file {name}"] = hashlib.blake2b(path.read_bytes(), digest_size=10).hexdigest()
    found |= last_json(call(tree, "-c", VIEWS, folder / "train.beton"))
    data = ["--data.train", str(folder / "train.beton"), "--data.val", str(folder / "val.beton")]
    runs = {name: folder / name.replace(",", "").replace(" ", "_") for name in RUNS}
    commands = [
        ("train", [*data, "--out", str(runs[name]), *options({**SMALL, **settings})])
        for name, settings in RUNS.items()
    ]
    device = ["--system.device", "cpu", "--system.torch_threads", "1"]
    for protocol, words in EVALUATIONS.items():
        place = ["--checkpoint", str(runs["simclr"]), "--out", str(folder / protocol)]
        commands.append(("evaluate", [protocol, *place, *device, *words]))
    call(tree, "-c", COMMANDS, json.dumps(commands))
    found |= {f"losses {name}": digest(losses_of(run)) for name, run in runs.items()}
    for protocol in EVALUATIONS:
        result = last_json((folder / protocol / "results.jsonl").read_text(encoding="utf-8"))
        found[f"evaluation {protocol}"] = digest(numbers(result["metrics"]))
    return found


def measured(where: Path) -> dict[str, str]:
    """The fingerprint of a checkout, or the fingerprint on the last line of a file."""
    if where.is_file():
        known = last_json(where.read_text(encoding="utf-8"))
        return {name: value for name, value in known.items() if name != "differs"}
    with tempfile.TemporaryDirectory() as folder:
        return fingerprint(where.resolve(), Path(folder))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fingerprint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument(
        "--against", type=Path, help="another checkout, or a file with what this printed of one"
    )
    arguments = parser.parse_args(argv)
    here = measured(arguments.tree)
    there = here if arguments.against is None else measured(arguments.against)
    differs = {
        name: [there.get(name), here[name]] for name in here if there.get(name) != here[name]
    }
    print(json.dumps({"differs": differs, **here}))
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
