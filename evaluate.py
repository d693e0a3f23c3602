"""What a pretrained encoder is worth, by the protocols of the papers.

    python evaluate.py linear --checkpoint runs/simclr
    python evaluate.py knn --checkpoint runs/a/checkpoint_epoch_*.pt --ks 1 20 --temperatures 0.1
    python evaluate.py mlp --checkpoint resnet50.pth --model.backbone resnet50 \\
        --data.train data/train.beton --data.val data/val.beton --labels.fraction 0.1
    python evaluate.py table --checkpoint runs/simclr
    python evaluate.py --help

A checkpoint is a run's folder, one of its files, or a state dict of a torchvision or timm ResNet;
settings that the command line and `--config FILE.yaml` leave open are taken from the run. All
checkpoints are opened before the first is measured. Each result is a line of `results.jsonl` in
`--out`, or in the checkpoint's folder; `table` makes a CSV file of them. The last line on stdout is
JSON: the result, or the list of results of several checkpoints. Exit codes: 0 finished, 75
interrupted, 2 a user's mistake, 1 a loss that is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ffcv_ssl.config.app_files import shown_program
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.renamed import rename, say_notes
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.config.stdout import show
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation.command_words import grouped, kind_of, with_lists
from ffcv_ssl.evaluation.protocol_calls import checked
from ffcv_ssl.evaluation.protocols import PROTOCOLS
from ffcv_ssl.evaluation.studies import STUDIES
from ffcv_ssl.jobs import slurm
from ffcv_ssl.training import command, console

COMMANDS = {**PROTOCOLS, **STUDIES}


def read_configs(argv: Sequence[str]) -> tuple[str, list[Any]]:
    """The command line -> (the command's name, its configurations, one per call). Raises UserError.

    Several words after a key are a list: `--ks 1 20` is `--ks [1,20]`. Several checkpoints are
    several calls, but for commands that take a list of them.
    """
    name, *words = argv or [""]
    if name not in COMMANDS:
        raise UserError(f"protocol: got {name!r}, expected one of {', '.join(COMMANDS)}")
    config_class = COMMANDS[name].config_class
    words, notes = rename(words, getattr(config_class, "RENAMED", {}))
    say_notes(notes)
    groups = grouped(words)
    paths = [""]
    for index, (key, values) in enumerate(groups):
        if key == "--checkpoint" and not all(values or [""]):
            raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
        if key == "--checkpoint" and kind_of(config_class, key) is not list:
            paths = values
            groups[index] = (f"{key}={values[0]}", [])
    arguments = with_lists(config_class, groups)
    summary = COMMANDS[name].summary
    config: Any
    config, _ = parse_config(config_class, arguments, f"evaluate.py {name}", summary)
    return name, [replace(config, checkpoint=path) for path in paths if path] or [config]


def read_config(argv: Sequence[str]) -> Any:
    """The configuration of a job's run. Raises UserError for several checkpoints."""
    _, configs = read_configs(argv)
    if len(configs) > 1:
        raise UserError(
            f"checkpoint: got {len(configs)}, expected one per job; list the runs in a file for "
            "--slurm.batch"
        )
    return configs[0]


def run(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """The command: returns (exit code, what the last line says)."""
    if slurm.is_batch(argv):
        protocol, *words = argv
        return 0, slurm.submit_batch(
            words, lambda line: [slurm.job_of(read_config([protocol, *line]), __file__, protocol)]
        )
    name, configs = read_configs(argv)
    if hasattr(configs[0], "slurm") and slurm.wants_submission(configs[0]):
        return 0, slurm.submit(read_config(argv), __file__, name)
    world = slurm.join(getattr(configs[0], "system", SystemConfig(device="cpu")))
    results: list[dict[str, Any]] = []
    setting = configs[0].log.progress if hasattr(configs[0], "log") else "auto"
    with world, console.showing(setting, world), command.StopSignal() as stop:
        try:
            if len(configs) > 1:
                configs = [config for config, _ in checked(name, configs, world)]
            for config in configs:
                results.append(COMMANDS[name].run(config, world, stop))
        except Interrupted as message:
            world.say(message, sys.stderr)
            summary = {"protocol": name, "status": "interrupted", "results": results}
            return command.EXIT_INTERRUPTED, summary
    return 0, results[0] if len(results) == 1 else {"protocol": name, "results": results}


def usage() -> str:
    """The text of `evaluate.py --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {found.summary}" for name, found in COMMANDS.items()]
    how = f"Protocols; `{shown_program('evaluate.py PROTOCOL')} --help` lists settings:"
    return "\n".join([str(__doc__), how, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the last line on stdout is the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        show(usage())
        return 0
    return command.run_ranks(run, argv)


if __name__ == "__main__":
    sys.exit(main())
