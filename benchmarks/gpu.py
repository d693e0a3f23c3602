"""The proof that all of it works on a GPU: is it right, is it fast, does it learn.

    make gpu                               # all three parts on this machine's GPU
    make gpu PART=1 OUT=results DATA=gpu_data WHEELS=wheels
    make gpu DEVICE=cpu                    # next to nothing, to see that the proof itself works
    python -m benchmarks.gpu --part 2 --device cuda --data gpu_data --out results

No network is needed. --data: a folder that benchmarks.gpu_files has written; without it, images are
drawn here. Each check is a line; what programs print goes to PART.log in --out. The results are
PART.json in --out, by default benchmarks/results for a GPU and runs/gpu_cpu for a CPU. Exit codes:
0 all checks hold, 1 one fails, 2 a user's mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_fast, gpu_learns, gpu_right
from benchmarks.gpu_checks import Proof
from benchmarks.gpu_files import open_files
from benchmarks.record import write_record
from benchmarks.step_record import machine
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.training.world import World, choose_device

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    1: ("gpu_right", gpu_right.run), 2: ("gpu_fast", gpu_fast.run),
    3: ("gpu_learns", gpu_learns.run),
}  # fmt: skip
LIMITS_S = {1: 240, 2: 240, 3: 300}
"""What a part may take on a GPU."""


def run_part(number: int, options: argparse.Namespace, device: torch.device) -> bool:
    """Run one part and say how long it took; whether all its checks hold. Its JSON is written anew
    after each check."""
    (name, function), began = PARTS[number], time.perf_counter()
    print(f"\n-- part {number}: {function.__doc__}", flush=True)
    with tempfile.TemporaryDirectory() as folder, open(options.out / f"{name}.log", "w") as log:
        px, photo_px, num_drawn = (144, 400, 4096) if device.type == "cuda" else (32, 64, 256)
        num_drawn = num_drawn if number == 3 else 64  # the other parts do not train on them
        with contextlib.redirect_stderr(log):
            files = open_files(options.data, Path(folder), num_drawn, px, photo_px)
        print(f"images: {files.source}", flush=True)
        proof = Proof(device, files, Path(folder), options.out, log, LIMITS_S[number], began)
        about = {"benchmark": name, "date": time.strftime("%Y-%m-%d")}
        about |= {"machine": machine(World(device=device)), "images": files.source}

        def save() -> None:
            seconds = {"seconds": round(proof.seconds, 1)}
            record = {**about, **seconds, "checks": proof.checks, **proof.found}
            write_record(record, str(options.out / f"{name}.json"))

        proof.save = save
        try:
            function(proof)
        except UserError:
            raise
        except Exception as error:  # in what the checks share
            print(traceback.format_exc(), file=log)
            proof.check("the part itself", partial(proof.expect, False, one_line(error)))
        if proof.is_cuda:
            proof.check(f"done in {proof.limit_s} s", proof.time_taken)
    wrong = [name for name, check in proof.checks.items() if check["right"] is False]
    left = [name for name, check in proof.checks.items() if check["right"] is None]
    end = f"; left out: {', '.join(left)}" if left else ""
    end += f"; WRONG: {', '.join(wrong)}; see {options.out / name}.log" if wrong else ""
    print(f"part {number}: {len(proof.checks)} checks in {proof.seconds:.0f} s{end}", flush=True)
    return not wrong


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The command line, and the device. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--part", type=int, choices=PARTS, action="append")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--data", help="folder that benchmarks.gpu_files has written")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    World.join(str(device))  # torch's settings of a run: cuDNN, number of threads
    default = ROOT / "benchmarks" / "results" if device.type == "cuda" else ROOT / "runs/gpu_cpu"
    options.out = options.out or default
    options.out.mkdir(parents=True, exist_ok=True)
    return options, device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        options, device = parse(argv)
        are_right = [run_part(n, options, device) for n in options.part or PARTS]
    except (UserError, BetonError) as error:
        print(f"benchmarks.gpu: {one_line(error)}", file=sys.stderr)
        return 2
    return int(not all(are_right))


if __name__ == "__main__":
    sys.exit(main())
