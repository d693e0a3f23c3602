"""Several commands in order, each on what the one before it left: pretrain, fine-tune...

    python -m ffcv_ssl.jobs.chain configs/suncet/chain_10percent.yaml
    python -m ffcv_ssl.jobs.chain CHAIN.yaml --out runs/x --all.data.train A.beton --pretrain.seed 1
    python -m ffcv_ssl.jobs.chain CHAIN.yaml --slurm.partition gpu --slurm.gpus_per_node 8
    python -m ffcv_ssl.jobs.chain --slurm.batch CHAINS.yaml --slurm.partition gpu

A chain is a YAML file (it may build on others by `base:`):

    out: runs/chain
    stages:
      pretrain: {command: train, config: configs/simclr.yaml, processes: 8}
      finetune: {command: finetune, config: F.yaml, overrides: {checkpoint: "{pretrain}"}}

Each stage works in a folder of its own, `OUT/STAGE`; `{pretrain}` in a value is the folder of the
stage `pretrain`. All configurations are resolved and checked before the first stage starts, and the
stages run on them as they were then. A stage that finished with the same settings is skipped; it is
refused where a file that they name (labels, data...) has changed since. An interrupted stage goes
on where its command can. With other settings a probe runs again, and all stages after it; a stage
that trains a network refuses them, until its folder is moved away or the chain has another `--out`.
The first exit code that is not 0 ends the chain and is the chain's own. On Slurm each stage is a
job that waits for the job before it. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import as_words, config_dict
from ffcv_ssl.config.stdout import show
from ffcv_ssl.config.yaml_layers import merge, yaml_text
from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.files import explained, hold_folder, write_text
from ffcv_ssl.jobs import slurm
from ffcv_ssl.jobs.chain_file import Stage, read_chain, resolved
from ffcv_ssl.jobs.stage_marks import (
    StageCommand,
    how_to_run_anew,
    is_finished,
    mark_finished,
    read_inputs,
    summary_of,
)
from ffcv_ssl.training import command

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class JobConfig:
    """The settings of a stage's job."""

    slurm: slurm.SlurmConfig = field(default_factory=slurm.SlurmConfig)


def unfinished_of(stages: Sequence[Stage]) -> list[Stage]:
    """The resolved stages from the first unfinished one on. Raises UserError."""
    for number, stage in enumerate(stages):
        if not is_finished(stage.folder, stage.settings):
            return list(stages[number:])
        _say(f"{stage.name}: already finished, in {stage.folder}")
    return []


# ---- Running -------------------------------------------------------------------------------------


def run_stages(unfinished: list[Stage], stop: command.StopSignal) -> tuple[int, dict[str, Any]]:
    """Run stages in order. Returns (exit code, {stage: summary}) of those that ran."""
    summaries = {}
    for number, stage in enumerate(unfinished, start=1):
        _say(f"{stage.name}: {' '.join([*stage.command, *stage.words])}")
        inputs = read_inputs(stage.folder, stage.settings)
        code, summaries[stage.name] = _run(_process(stage), stop)
        if code:
            _say(f"{stage.name}: exit code {code}{_remedy(stage, code)}")
            return code, summaries
        later = [other.folder for other in unfinished[number:]]
        mark_finished(stage.folder, stage.settings, inputs, summaries[stage.name], later)
        if stop.asked and later:
            _say(f"{stage.name}: finished, then stopped; run the same command again to continue")
            return command.EXIT_INTERRUPTED, summaries
    return 0, summaries


def _process(stage: Stage) -> list[str]:
    """The words of a process that runs a stage on its resolved settings, `OUT/STAGE.yaml`."""
    path = stage.folder.with_name(f"{stage.name}.yaml")
    settings = {key: value for key, value in _read(stage).items() if key != "slurm"}
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml_text(settings))
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stage.processes}"]
    launcher = ranks if stage.processes > 1 else []
    return [sys.executable, *launcher, *stage.command, f"--config={path}"]


def _run(words: list[str], stop: command.StopSignal) -> tuple[int, Any]:
    """Run a process, which is told to stop when `stop` is asked to; pass on what it prints.

    Returns (exit code as a shell gives it, the JSON in its last line or None).
    """
    last = ""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        threading.Thread(target=_pass_on, args=(stop, process), daemon=True).start()
        assert process.stdout is not None
        for last in process.stdout:
            print(last, end="", flush=True)
        code = process.wait()
    try:
        summary = json.loads(last)
    except ValueError:
        summary = None
    if stop.asked and isinstance(summary, dict) and summary.get("status") == "interrupted":
        code = command.EXIT_INTERRUPTED  # torchrun has codes of its own for what a signal ended
    return code if code >= 0 else 128 - code, summary


def _pass_on(stop: command.StopSignal, process: subprocess.Popen) -> None:
    """Tell a process to stop, once, when `stop` is asked to."""
    while process.poll() is None:
        if stop.asked:
            process.terminate()
            return
        time.sleep(0.2)


def _remedy(stage: Stage, code: int) -> str:
    """What to do about a stage's exit code, where the stage's own last line does not say it."""
    if code == command.EXIT_INTERRUPTED:
        return "; run the same command again to continue from here"
    if code == command.EXIT_USER_ERROR and (stage.folder / CHECKPOINT).exists():
        return f"; if the folder holds another run, {how_to_run_anew(stage.folder)}"
    return ""


# ---- Slurm ---------------------------------------------------------------------------------------


def make_jobs(unfinished: Sequence[Stage]) -> list[slurm.Job]:
    """The jobs of resolved stages, in their order. Raises UserError."""
    folders = [str(stage.folder.resolve()) for stage in unfinished]
    jobs = []
    for number, stage in enumerate(unfinished, start=1):
        later = tuple(folders[number:])
        as_stage = partial(StageCommand, settings=stage.settings, later=later)
        script, *words = stage.command
        jobs.append(slurm.make_job(script, words, _read(stage), _slurm_config(stage), as_stage))
    return jobs


def _slurm_config(stage: Stage) -> slurm.SlurmConfig:
    """The settings of a stage's job: the chain's over those that its own configuration changes."""
    usual = config_dict(slurm.SlurmConfig())
    own = _read(stage).get("slurm") or {}
    own = {key: value for key, value in own.items() if value != usual.get(key)}
    words = as_words({"slurm": {**merge(own, stage.slurm), "batch": None}})
    return parse_config(JobConfig, words, "chain", "")[0].slurm


def _read(stage: Stage) -> dict[str, Any]:
    return yaml.safe_load(stage.settings) or {}


def _submit(unfinished: Sequence[Stage], jobs: list[slurm.Job]) -> dict[str, Any]:
    """Submit a chain's jobs; returns the command's summary. Raises UserError."""
    names = [stage.name for stage in unfinished]
    (first, *_) = [name for name, job in zip(names, jobs) if job.slurm.partition]
    for name, job in zip(names, jobs):
        if not job.slurm.partition:
            expected = f"expected one, as for {first}"
            raise UserError(f"stages.{name}.slurm.partition: got none, {expected}")
    submitted = slurm.submit_jobs([jobs])
    for name, made in zip(names, submitted):
        _say(f"{name}: job {made['job_id']}, log {made['stdout']}")
    return {"status": "submitted", "stages": dict(zip(names, submitted))}


# ---- The command ---------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """The command: returns (exit code, summary)."""
    if slurm.is_batch(argv):
        return 0, slurm.submit_batch(
            argv, lambda line: make_jobs(unfinished_of(list(map(resolved, read_chain(line)))))
        )
    stages = [resolved(stage) for stage in read_chain(argv)]
    unfinished = unfinished_of(stages)
    jobs = make_jobs(unfinished)
    if any(job.slurm.dry_run for job in jobs):
        return 0, slurm.show_jobs([jobs])
    if any(job.slurm.partition for job in jobs):
        return 0, _submit(unfinished, jobs)
    summaries = {s.name: summary_of(s.folder) for s in stages if s not in unfinished}
    with hold_folder(stages[0].folder.parent), command.StopSignal() as stop:
        code, ran = run_stages(unfinished, stop)
    interrupted = code == command.EXIT_INTERRUPTED
    status = "interrupted" if interrupted else "failed" if code else "finished"
    return code, {"status": status, "stages": summaries | ran}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the last line on stdout is the summary."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        show((__doc__ or "").strip())
        return 0
    try:
        code, summary = run(argv)
    except (UserError, CheckpointError) as error:
        print(one_line(error), file=sys.stderr)
        return command.EXIT_USER_ERROR
    print(json.dumps(summary), flush=True)
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
