"""What a pretrained encoder is worth, by the protocols of the papers.

    python evaluate.py linear --checkpoint runs/simclr
    python evaluate.py knn --checkpoint runs/a/checkpoint_epoch_*.pt --k [1,20] --temperature [0.1]
    python evaluate.py mlp --checkpoint resnet50.pth --model.backbone resnet50 \\
        --data.train data/train.beton --data.val data/val.beton --labels.fraction 0.1
    python evaluate.py --help

A checkpoint is a run's folder, one of its files, or a state dict of a torchvision or timm ResNet;
what the command line and `--config FILE.yaml` leave open is taken from the run. All are opened
before the first is measured. Each result is a line of `results.jsonl` and a row of `results.csv` in
`--out`, or in the checkpoint's folder; the last line on stdout is JSON: the result, or, of several
checkpoints, the list of them. Exit codes: 0 finished, 75 interrupted, 2 a user's mistake, 1 a loss
that is not finite.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation.nested import checked, kind_of
from ffcv_ssl.evaluation.protocols import PROTOCOLS
from ffcv_ssl.evaluation.studies import STUDIES
from ffcv_ssl.jobs import slurm
from ffcv_ssl.training import command
from ffcv_ssl.training.world import World

COMMANDS = {**PROTOCOLS, **STUDIES}


def grouped(words):
    """[(key, its values)] of `--key A B --other=C`. Raises UserError for a word without a key."""
    groups = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("--"):
            if key == "--checkpoint" and key in dict(groups):
                raise UserError("checkpoint: got it twice, expected one --checkpoint A B ...")
            groups.append((key, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"{word}: got no key before it, expected --key {word}")
    return groups


def read_configs(argv):
    """The command line -> (protocol's name, its configurations, one a call). Raises UserError.

    Several words after a key are a list, for a protocol within a suite too: `--k 1 20` is
    `--k [1,20]`.
    """
    name, *words = argv or [""]
    if name not in COMMANDS:
        raise UserError(f"protocol: got {name!r}, expected one of {', '.join(COMMANDS)}")
    config_class, _, summary = COMMANDS[name]
    arguments, paths = [], [""]
    for key, values in grouped(words):
        kind = kind_of(config_class, key)
        is_list = kind is list or (kind is dict and len(values) > 1)
        is_list = is_list and not (values and values[0].startswith("["))
        if key == "--checkpoint" and not all(values or [""]):
            raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
        if key == "--checkpoint" and not is_list:
            paths = values
            arguments.append(f"{key}={values[0]}")
        elif is_list:
            arguments.append(f"{key}=[{', '.join(values)}]")
        else:
            arguments += [key, *values]
    config, _ = parse_config(config_class, arguments, f"evaluate.py {name}", summary)
    return name, [replace(config, checkpoint=path) for path in paths if path] or [config]


def read_config(argv):
    """The configuration of a job's run. Raises UserError for several checkpoints."""
    _, configs = read_configs(argv)
    if len(configs) > 1:
        got = f"got {len(configs)}, expected one per job"
        raise UserError(f"checkpoint: {got}; list the runs in a file for --slurm.batch")
    return configs[0]


def run(argv):
    """The command: returns (exit code, what the last line says)."""
    if slurm.is_batch(argv):
        protocol, *words = argv
        return 0, slurm.submit_batch(
            words, lambda line: [slurm.job_of(read_config([protocol, *line]), __file__, protocol)]
        )
    name, configs = read_configs(argv)
    if hasattr(configs[0], "slurm") and slurm.wants_submission(configs[0]):
        return 0, slurm.submit(read_config(argv), __file__, name)
    system = getattr(configs[0], "system", None)
    where = (system.device, system.torch_threads) if system is not None else ("cpu",)
    world = World.join(*where, launcher=slurm.task_environment())
    results = []
    with command.StopSignal() as stop:
        try:
            if len(configs) > 1:
                configs = [config for config, _ in checked(configs, world)]
            for config in configs:
                results.append(COMMANDS[name][1](config, world, stop))
        except Interrupted as message:
            world.say(message, sys.stderr)
            summary = {"protocol": name, "status": "interrupted", "results": results}
            return command.EXIT_INTERRUPTED, summary
        finally:
            world.leave()
    return 0, results[0] if len(results) == 1 else {"protocol": name, "results": results}


def usage():
    """What `evaluate.py --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(
        [__doc__, "Protocols; `python evaluate.py PROTOCOL --help` lists settings:", *lines]
    )


def main(argv=None):
    """Run the command and return its exit code; the last line on stdout is the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    return command.run_ranks(run, argv)


if __name__ == "__main__":
    sys.exit(main())
