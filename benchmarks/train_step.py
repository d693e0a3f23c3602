"""The cost of a training step compared to the model's bare forward and backward pass, by method.

    python -m benchmarks.train_step                          # this machine's GPU, or its CPU
    python -m benchmarks.train_step --root FOLDER_OF_PHOTOGRAPHS --methods simclr byol
    python -m benchmarks.train_step --beton imagenet_train.beton --batch 512 --system.compile true
    python -m benchmarks.train_step --results benchmarks/results/train_step.json

Every step is the step of `train.py` with the method's configuration: configs/imagenet/ on a GPU,
configs/imagenette/cpu_* on a CPU. Further arguments go to train.py. The bare pass and the step use
noise on the device; the loop loads images from a `.beton` file. Runs of all kinds are interleaved;
the first run of each is discarded. Numbers are medians; the spread is half of the range over the
median. Calls with the same settings on the same machine add their methods to one record. Hours are
computed from the loop's measured rate at each resolution of a ramp and ImageNet's number of images.
The last line is JSON.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

import train
from benchmarks import step_record
from benchmarks.photographs import MAX_SIDE_PX, QUALITY, Photographs
from benchmarks.record import write_record
from benchmarks.step_case import StepCase
from ffcv_ssl import BetonError, DatasetWriter, Reader
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.sources import Shapes
from ffcv_ssl.training import command
from ffcv_ssl.training.optimizers import resolution_at
from ffcv_ssl.training.run_data import open_dataset
from ffcv_ssl.training.world import World

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = {
    "cpu": {
        "backbone": "resnet18", "px": 64, "batch": 64, "image_px": 224, "classes": 10,
        "steps": 3, "loop_steps": 5, "ramp": None,
    },
    "cuda": {
        "backbone": "resnet50", "px": 224, "batch": 256, "image_px": MAX_SIDE_PX, "classes": 1000,
        "steps": 10, "loop_steps": 20, "ramp": str(CONFIGS / "imagenet/simclr_8gpu.yaml"),
    },
    "quick": {
        "backbone": "resnet18", "px": 32, "batch": 8, "image_px": 64, "classes": 10,
        "steps": 1, "loop_steps": 2, "ramp": None, "runs": 2,
    },
}  # fmt: skip
METHODS = (*train.METHODS, "supervised", "instance_simclr")
WARM_STEPS = 5
"""Steps of the loop that do not count; more than the number of batches loaded in advance."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message):
        raise UserError(message)


def parse(argv):
    """Command line -> (options, arguments for train.py). Raises UserError; exits for --help."""
    parser = _Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--root", help="folder of photographs; default: images generated here")
    source.add_argument("--beton", help="file to train on, as it is")
    methods = [*METHODS, "all"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=["all"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=_count, default=0, help="of torch (default: the cores)")
    parser.add_argument("--runs", type=_count, help="that count, of each kind (default: 5)")
    parser.add_argument("--backbone", help="on a GPU resnet50, else resnet18")
    parser.add_argument("--px", type=_count, help="side of the views (224 or 64)")
    parser.add_argument("--batch", type=_count, help="images a step (256 or 64)")
    parser.add_argument("--classes", type=_count, help="of written images (1000 or 10)")
    parser.add_argument("--image_px", type=_count, help="longest side of written images (500, 224)")
    parser.add_argument("--steps", type=_count, help="of a run on noise (10 or 3)")
    parser.add_argument("--loop_steps", type=_count, help="of a run with the loader (20 or 5)")
    parser.add_argument("--ramp", help="configuration whose resolutions count for the hours")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it work?")
    parser.add_argument("--results", help="JSON file to write, or to add methods to")
    options, rest = parser.parse_known_args(argv)
    if "all" in options.methods:
        options.methods = list(METHODS)
    return options, rest


def _count(text):
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1 up")
    return value


def fill_defaults(options, device):
    """Fill missing options with the defaults of this kind of device."""
    for name, value in {"runs": 5, **DEFAULTS["quick" if options.quick else device.type]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


# ---- Images --------------------------------------------------------------------------------------


class Images:
    """`count` labelled images; images repeat if there are fewer."""

    def __init__(self, images, count, classes):
        self.images, self.count, self.classes = images, count, classes

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.images[i % len(self.images)][0], i % self.classes


def write_images(options, path):
    """Write a `.beton` file with as many JPEGs as a run of the loop needs. Raises UserError."""
    count = (WARM_STEPS + options.loop_steps) * options.batch
    images = Shapes(num_samples=count, size_px=options.image_px)
    if options.root is not None:
        try:
            images = Photographs(options.root, count)
        except SystemExit as error:
            raise UserError(f"--root: {error.code}") from None
    image = RGBImageField("jpg", options.image_px, jpeg_quality=QUALITY)
    classes = [f"class {number}" for number in range(options.classes)]
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(path, fields, class_names={"label": classes})
    writer.from_indexed_dataset(Images(images, count, options.classes))


def facts_of(path, options):
    """Facts about the images, for the record. Raises UserError where they do not fit a run."""
    open_dataset(path)  # raises for a file that cannot be trained on
    with Reader(path) as reader:
        sizes, shape = reader.extents("image").size, reader.field_metadata("image")
        facts = {
            "source": "file" if options.beton else "photographs" if options.root else "generated",
            "images": reader.num_samples,
            "mean_bytes": round(float(sizes.mean())),
            "mean_height_px": round(float(shape["height"].mean())),
            "mean_width_px": round(float(shape["width"].mean())),
        }
    needed = WARM_STEPS + options.loop_steps
    if facts["images"] < needed * options.batch:
        got = f"{facts['images']} images make {facts['images'] // options.batch} steps"
        raise UserError(f"{path}: {got}, expected {needed}; lower --loop_steps or --batch")
    return facts


# ---- Measuring -----------------------------------------------------------------------------------


def config_file(method, device):
    """A method's configuration for a kind of device, below CONFIGS."""
    if device.startswith("cuda"):
        return f"imagenet/{'simclr_instance' if method == 'instance_simclr' else method}.yaml"
    return f"imagenette/cpu_{method.removesuffix('_simclr')}.yaml"


def read_config(method, px, options, rest, folder):
    """(train.py's configuration of a method at one resolution, its file's name)."""
    file = config_file(method, options.device)
    settings = {
        "config": CONFIGS / file, "data.train": options.path, "data.val": "null",
        "data.batch_size": options.batch, "model.backbone": options.backbone,
        "resolution.min": px, "resolution.max": px,
        "resolution.start_ramp": 0, "resolution.end_ramp": 0,
        # a small learning rate, so that the loss on noise stays finite
        "optim.lr": 1e-3, "optim.lr_scaling": "none", "optim.warmup_epochs": 0,
        "system.device": options.device, "system.torch_threads": options.threads,
        "out": Path(folder) / f"{method}_{px}",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return train.read_config([*arguments, *rest]), f"configs/{file}"


def read_ramp(path):
    """{side in pixels: number of epochs} of a configuration; empty for None."""
    if path is None:
        return {}
    config = train.read_config([f"--config={path}"])
    sides = (resolution_at(epoch, config.resolution) for epoch in range(config.epochs))
    return dict(Counter(sides))


def interleave(cases, runs, what):
    """Run all cases in turn, `runs` times after a run that does not count: {name: [result]}."""
    found = {name: [] for name in cases}
    for number in range(runs + 1):
        print(f"{what}: run {number} of {runs}", file=sys.stderr, flush=True)
        for name, case in cases.items():
            found[name].append(case())
    return {name: values[1:] for name, values in found.items()}


def measure(method, options, rest, world, folder):
    """Measure a method; returns its entry of the record."""
    ramp = read_ramp(options.ramp)
    config, file = read_config(method, options.px, options, rest, folder)
    with contextlib.ExitStack() as stack:
        case = stack.enter_context(contextlib.closing(StepCase(config, world)))
        memory_mib = case.peak_memory_mib(WARM_STEPS, options.loop_steps)
        case.prepare()
        loops = {options.px: case}
        for px in sorted(set(ramp) - {options.px}):
            other, _ = read_config(method, px, options, rest, folder)
            loops[px] = stack.enter_context(contextlib.closing(StepCase(other, world)))
        found = interleave(cases_of(case, loops, options), options.runs, method)
        entry = {"config": file, "date": time.strftime("%Y-%m-%d")}
        entry.update(step_record.describe(case, found, loops))
    entry["peak_memory_mib"] = round(memory_mib)
    entry["imagenet"] = step_record.hours_of(entry["loop"], ramp)
    return entry


def cases_of(case, loops, options):
    """The cases to measure: {name: function without arguments}."""
    steps = options.steps
    cases = {
        "bare": lambda: case.bare(steps),
        "step": lambda: case.step(steps),
        "parts": lambda: case.parts(steps),
        "step without extras": lambda: case.step_without_extras(steps),
        "log line": case.log_line,
    }
    for name in ("lars", "sgd"):
        cases[name] = lambda name=name: case.parts(steps, name)
    for px, other in loops.items():
        cases["loop", px] = lambda o=other: o.loop(WARM_STEPS, options.loop_steps)
    return cases


# ---- The command ---------------------------------------------------------------------------------


def run(argv):
    """Measure and show; returns the record. Raises UserError."""
    options, rest = parse(argv)
    SystemConfig(options.device)  # raises for an unknown device
    earlier = step_record.read_earlier(options.results)
    world = World.join(options.device, options.threads)
    options.device = str(world.device)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    fill_defaults(options, world.device)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        options.path = options.beton or os.path.join(folder, "images.beton")
        settings = settings_of(options, rest, folder)  # reports wrong settings before measuring
        if options.beton is None:
            write_images(options, options.path)
        record = {
            "benchmark": "training step",
            "machine": step_record.machine(world),
            "settings": settings,
            "images": facts_of(options.path, options),
            "paper": step_record.PAPER,
            "methods": {},
        }
        for method in options.methods:
            with contextlib.redirect_stdout(io.StringIO()):  # hides the trainer's output
                record["methods"][method] = measure(method, options, rest, world, folder)
            console.print(step_record.step_table(method, record["methods"][method]))
            record = step_record.with_earlier(record, earlier)
            write_record(record, options.results)  # after each method, because a run takes long
    console.print(step_record.summary_table(record))
    return record


def settings_of(options, rest, folder):
    """The settings that the numbers depend on, for the record. Raises UserError."""
    names = ("backbone", "px", "batch", "classes", "steps", "loop_steps", "runs")
    configs = [read_config(m, options.px, options, rest, folder)[0] for m in options.methods]
    config = configs[0]
    own = {"precision": config.precision, "channels_last": config.channels_last}
    ramp = options.ramp and asdict(train.read_config([f"--config={options.ramp}"]).resolution)
    return {**{n: getattr(options, n) for n in names}, **own, "train_py": rest, "ramp": ramp}


def main(argv=None):
    """Run the command and return its exit code."""
    try:
        record = run(sys.argv[1:] if argv is None else argv)
    except (UserError, BetonError) as error:
        print(f"benchmarks.train_step: {one_line(error)}", file=sys.stderr)
        return command.EXIT_USER_ERROR
    except torch.cuda.OutOfMemoryError as error:
        text = f"{one_line(error)[:200]}; lower --batch"
        print(f"benchmarks.train_step: {text}", file=sys.stderr)
        return command.EXIT_USER_ERROR
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
