"""What a pretrained encoder is worth, by the protocols of the papers.

    python evaluate.py linear --checkpoint runs/simclr
    python evaluate.py knn --checkpoint runs/a/checkpoint_epoch_*.pt --k [1,20] --temperature [0.1]
    python evaluate.py mlp --checkpoint resnet50.pth --model.backbone resnet50 \\
        --data.train data/train.beton --data.val data/val.beton --labels.fraction 0.1
    python evaluate.py --help

A checkpoint is a run's folder, one of its files, or a state dict of a torchvision or timm ResNet;
what the command line and `--config FILE.yaml` leave open is taken from the run. Each result is a
line of `results.jsonl` and a row of `results.csv` in `--out`, or in the checkpoint's folder; the
last line on stdout is JSON: the result, or, of several checkpoints, the list of them. Exit codes: 0
finished, 75 interrupted, 2 a user's mistake, 1 a loss that is not finite.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields, replace

from ffcv_ssl import BetonError, checkpoint, command, slurm
from ffcv_ssl.command import Interrupted, NonFiniteLoss, UserError
from ffcv_ssl.distributed import World
from ffcv_ssl.protocols import PROTOCOLS


def split_checkpoints(argv):
    """(values of `--checkpoint A B ...`, the other words). Raises UserError for a key without."""
    found, others, is_value = [], [], False
    for word in argv:
        if word.startswith("--"):
            is_value = word == "--checkpoint"
            if word.startswith("--checkpoint="):
                found.append(word.partition("=")[2])
            elif not is_value:
                others.append(word)
        else:
            (found if is_value else others).append(word)
    if not all(found) or ("--checkpoint" in argv and not found):
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
    return found, others


def read_configs(argv):
    """The command line -> (protocol's name, its configurations, one a call). Raises UserError."""
    name, *words = argv or [""]
    if name not in PROTOCOLS:
        raise UserError(f"protocol: got {name!r}, expected one of {', '.join(PROTOCOLS)}")
    config_class, _, summary = PROTOCOLS[name]
    paths, words = split_checkpoints(words)
    kind = {field.name: str(field.type) for field in fields(config_class)}.get("checkpoint")
    if kind is None and paths:
        raise UserError(f"checkpoint: unknown key, {name} takes none")
    takes_all = kind is not None and "list" in kind
    given = [f"--checkpoint={json.dumps(paths) if takes_all else paths[0]}"] if paths else []
    config, _ = command.parse_config(config_class, [*words, *given], f"evaluate.py {name}", summary)
    if takes_all or not paths:
        return name, [config]
    return name, [replace(config, checkpoint=path) for path in paths]


def run(argv):
    """The command: returns (exit code, what the last line says)."""
    name, configs = read_configs(argv)
    for config in configs:
        if hasattr(config, "slurm") and slurm.wants_submission(config):
            return 0, slurm.submit(config, argv, __file__)
    system = getattr(configs[0], "system", None)
    where = (system.device, system.torch_threads) if system is not None else ("cpu",)
    world = World.join(*where, launcher=slurm.task_environment())
    results = []
    with command.StopSignal() as stop:
        try:
            for config in configs:
                results.append(PROTOCOLS[name][1](config, world, stop))
        except Interrupted as message:
            world.say(message, sys.stderr)
            summary = {"protocol": name, "status": "interrupted", "results": results}
            return command.EXIT_INTERRUPTED, summary
        finally:
            world.leave()
    return 0, results[0] if len(results) == 1 else {"protocol": name, "results": results}


def usage():
    """What `evaluate.py --help` prints."""
    width = max(map(len, PROTOCOLS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, _, summary) in PROTOCOLS.items()]
    return "\n".join(
        [__doc__, "Protocols; `python evaluate.py PROTOCOL --help` lists settings:", *lines]
    )


def main(argv=None):
    """Run the command and return its exit code; the last line on stdout is the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    try:
        code, summary = run(argv)
    except (UserError, NonFiniteLoss, BetonError, checkpoint.CheckpointError) as error:
        # all ranks of a node make these mistakes alike: one says it
        is_common = isinstance(error, UserError | NonFiniteLoss)
        if not is_common or os.environ.get("LOCAL_RANK", "0") == "0":
            print(command.one_line(error), file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLoss) else command.EXIT_USER_ERROR
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
