"""Several commands one after the other, each on what the one before it left: pretrain, fine-tune...

    python -m ffcv_ssl.jobs.chain configs/suncet/chain_10percent.yaml
    python -m ffcv_ssl.jobs.chain CHAIN.yaml --out runs/x --all.data.train A.beton --pretrain.seed 1
    python -m ffcv_ssl.jobs.chain CHAIN.yaml --slurm.partition gpu --slurm.gpus_per_node 8

A chain is a YAML file (it may build on others by `base:`):

    out: runs/chain
    stages:
      pretrain: {command: train, config: configs/simclr.yaml, processes: 8}
      finetune: {command: finetune, config: F.yaml, overrides: {checkpoint: "{pretrain}"}}

Each stage works in a folder of its own, `OUT/STAGE`; `{pretrain}` in a value is that of the stage
`pretrain`. All configurations are read before the first stage starts. A stage that finished with
the same settings is skipped, and refused where a file that they name (labels, data...) has changed
since; one that was interrupted goes on where its command can. With other settings a probe runs
again, and all stages after it; a stage that trains a network refuses them, until its folder is
moved away or the chain has another `--out`. The first exit code that is not 0 ends the chain and is
its own. On Slurm each stage is a job that waits for the one before it. The last line on stdout is
JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import yaml

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import config_dict, flatten_as_text
from ffcv_ssl.config.yaml_layers import merge, read_layers
from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.jobs import slurm
from ffcv_ssl.jobs.stage_marks import (
    how_to_run_anew,
    is_finished,
    mark_finished,
    read_inputs,
    summary_of,
    unmark,
)
from ffcv_ssl.training import command
from ffcv_ssl.training.run_folder import CHECKPOINT

SCRIPTS = Path(__file__).resolve().parent.parent
_STAGE_KEYS = {"command", "config", "overrides", "processes", "slurm"}
_WORD = re.compile(r"--(?P<group>[\w-]+)(?P<key>\.[^=]+)?(=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class JobConfig:
    """The settings of a chain's jobs."""

    slurm: slurm.SlurmConfig = field(default_factory=slurm.SlurmConfig)


class Stage(NamedTuple):
    """One command of a chain."""

    name: str
    script: Path
    """train.py or evaluate.py."""
    argv: list
    """Its arguments."""
    folder: Path
    processes: int
    """Ranks, by torchrun; on Slurm the job's tasks count instead."""
    slurm: dict
    """The chain's settings of its job, over those of its own configuration."""


def read_chain(argv):
    """The stages that a command line asks for, in their order. Raises UserError."""
    path, given = _arguments(argv)
    try:
        chain = merge(*(own for _, own in read_layers(path)))
        stages = chain.get("stages")
        if not isinstance(stages, dict) or not stages:
            raise UserError("stages: expected a mapping of at least one stage")
        unknown = set(chain) - {"out", "stages", "slurm"}
        if unknown:
            expected = "expected out, stages and slurm"
            raise UserError(f"unknown key {sorted(unknown)[0]!r}, {expected}")
        for reserved in {"out", "all", "slurm"} & set(stages):
            raise UserError(f"stages: {reserved!r} is no name for a stage, it has a meaning here")
        for group in given:
            if group not in {"out", "all", "slurm", *stages}:
                expected = f"expected out, all, slurm or a stage: {', '.join(stages)}"
                raise UserError(f"--{group}: no such stage, {expected}")
        out = Path(given.get("out") or chain.get("out") or f"runs/{Path(path).stem}")
        folders = {name: out / name for name in stages}
        jobs = chain.get("slurm") or {}
        return [_stage(name, stage, folders, jobs, given) for name, stage in stages.items()]
    except ValueError as error:
        text = one_line(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _arguments(argv):
    """(the chain's file, {group: {key: value}}) of a command line; `out` is a value itself."""
    if not argv or argv[0].startswith("--"):
        raise UserError(
            "got no chain, expected a YAML file: python -m ffcv_ssl.jobs.chain CHAIN.yaml"
        )
    given, words = {}, list(argv[1:])
    while words:
        found = _WORD.fullmatch(words.pop(0))
        if found is None or (found["group"] == "out") != (found["key"] is None):
            word = argv[len(argv) - len(words) - 1]
            raise UserError(f"got {word!r}, expected --out, --STAGE.KEY, --all.KEY or --slurm.KEY")
        value = found["value"]
        if value is None:
            if not words:
                raise UserError(f"{found[0]}: got nothing, expected a value")
            value = words.pop(0)
        if found["group"] == "out":
            given["out"] = value
        else:
            given.setdefault(found["group"], {})[found["key"][1:]] = value
    return argv[0], given


def _stage(name, stage, folders, jobs, given):
    where = f"stages.{name}"
    if not isinstance(stage, dict) or not isinstance(stage.get("command"), str):
        raise UserError(f"{where}: got {stage!r}, expected a mapping with a command")
    unknown = set(stage) - _STAGE_KEYS
    if unknown:
        expected = f"expected {', '.join(sorted(_STAGE_KEYS))}"
        raise UserError(f"{where}: unknown key {sorted(unknown)[0]!r}, {expected}")
    processes = stage.get("processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise UserError(f"{where}.processes: got {processes!r}, expected at least 1")
    script, argv = SCRIPTS / "train.py", []
    if stage["command"] != "train":
        script, argv = SCRIPTS / "evaluate.py", [stage["command"]]
    if stage.get("config"):
        argv.append(f"--config={stage['config']}")
    own = dict(given.get(name, {}))
    job = {key[6:]: own.pop(key) for key in list(own) if key.startswith("slurm.")}
    settings = {
        **flatten_as_text(stage.get("overrides") or {}),
        **given.get("all", {}),
        **own,
    }
    argv += [f"--{key}={_filled(value, folders, where)}" for key, value in settings.items()]
    argv.append(f"--out={folders[name]}")
    return Stage(name, script, argv, folders[name], processes, _job(stage, jobs, given, job))


def _filled(value, folders, where):
    """A value as it stands on a command line, with `{stage}` replaced by that stage's folder."""
    if not isinstance(value, str):
        return json.dumps(value)
    for name in re.findall(r"\{(\w[\w-]*)\}", value):
        if name not in folders:
            raise UserError(f"{where}: got {{{name}}}, expected one of {', '.join(folders)}")
        value = value.replace(f"{{{name}}}", str(folders[name]))
    return value


def _job(stage, jobs, given, own):
    """Settings of a stage's job: the chain's, the command line's over them, then the stage's, which
    needs a job of its own kind, and the command line's for this stage. Raises UserError."""
    settings = {
        **flatten_as_text(jobs),
        **given.get("slurm", {}),
        **flatten_as_text(stage.get("slurm") or {}),
    }
    settings |= own
    _slurm_config(settings)
    return settings


def _slurm_config(settings):
    words = [f"--slurm.{key}={_filled(value, {}, 'slurm')}" for key, value in settings.items()]
    return parse_config(JobConfig, words, "chain", "")[0].slurm


# ---- Running -------------------------------------------------------------------------------------


def settings_of(stage):
    """All settings of a stage's command as YAML, as that command reads them. Raises UserError for
    what it would refuse."""
    words = [sys.executable, str(stage.script), *stage.argv, "--print_config"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"stages.{stage.name}: {lines[-1]}")
    return done.stdout


def run_stages(unfinished, settings, stop):
    """Run stages one after the other; settings: those of each. Returns (exit code, {stage:
    summary}) of those that ran."""
    summaries = {}
    for number, stage in enumerate(unfinished, start=1):
        _say(f"{stage.name}: {stage.script.name} {' '.join(stage.argv)}")
        inputs = read_inputs(stage.folder, settings[stage.name])
        code, summary = _run(stage, stop)
        summaries[stage.name] = summary
        if code:
            _say(f"{stage.name}: exit code {code}{_remedy(stage, code)}")
            return code, summaries
        unmark(later.folder for later in unfinished[number:])
        mark_finished(stage.folder, settings[stage.name], inputs, summary)
        if stop.asked and stage is not unfinished[-1]:
            _say(f"{stage.name}: finished; stopped here, the same command goes on")
            return command.EXIT_INTERRUPTED, summaries
    return 0, summaries


def _remedy(stage, code):
    """What to do about a stage's exit code, where the stage's own last line does not say it."""
    if code == command.EXIT_INTERRUPTED:
        return "; the same command goes on from here"
    if code == command.EXIT_USER_ERROR and (stage.folder / CHECKPOINT).exists():
        return f"; if that is about another run in its folder, {how_to_run_anew(stage.folder)}"
    return ""


def plan(stages):
    """(the stages from the first that is not finished on, settings by stage). Raises UserError."""
    settings = {stage.name: settings_of(stage) for stage in stages}
    unfinished = list(stages)
    while unfinished and is_finished(unfinished[0].folder, settings[unfinished[0].name]):
        _say(f"{unfinished[0].name}: finished before, in {unfinished[0].folder}")
        unfinished.pop(0)
    return unfinished, settings


def _run(stage, stop):
    """Run a stage's command; returns (exit code, its summary or None). Signals are passed on."""
    words = [sys.executable, str(stage.script), *stage.argv]
    if stage.processes > 1:
        ranks = ["-m", "torch.distributed.run", "--standalone"]
        words[1:1] = [*ranks, f"--nproc_per_node={stage.processes}"]
    last = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=_pass_on, args=(process.stdout, last))
        reader.start()
        try:
            code = _wait(process, stop)
        except BaseException:  # a second Ctrl-C
            process.terminate()
            raise
        finally:
            reader.join()
    with contextlib.suppress(ValueError, IndexError):
        return code, json.loads(last[0])
    return code, None


def _wait(process, stop):
    """Exit code of a process, as a shell gives it; told to stop once when `stop` is asked to."""
    was_told = False
    while True:
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.asked and not was_told:
                process.terminate()
                was_told = True
            continue
        return code if code >= 0 else 128 - code


def _pass_on(lines, last):
    """Print lines as they come; `last` keeps the newest."""
    for line in lines:
        print(line, end="", flush=True)
        last[:] = [line]


# ---- Slurm ---------------------------------------------------------------------------------------


class StageJob(NamedTuple):
    """What each task of a stage's job calls; rank 0 notes that the stage has finished."""

    task: slurm.Task
    settings: str

    def __call__(self):
        is_first = os.environ["SLURM_PROCID"] == "0"
        inputs = read_inputs(self.task.folder, self.settings) if is_first else {}
        self.task()  # SystemExit unless the command ended with 0
        if is_first:
            mark_finished(self.task.folder, self.settings, inputs, None)


def job_of(stage, settings):
    """The SlurmConfig of a stage's job; settings: all of its command's, as YAML."""
    usual, own = config_dict(slurm.SlurmConfig()), (yaml.safe_load(settings) or {}).get("slurm")
    own = {key: value for key, value in (own or {}).items() if value != usual.get(key)}
    return _slurm_config({**own, **stage.slurm})


def submit_stages(stages, settings, jobs):
    """Submit stages as jobs, each after the one before it; returns {stage: job}.

    settings, jobs: the settings and the SlurmConfig of each. Raises UserError where Slurm refuses,
    or has a job for one of them already.
    """
    submitted, before = {}, None
    for stage in stages:
        if jobs[stage.name].dependency is None:
            slurm.check_not_queued(stage.folder)
    unmark(stage.folder for stage in stages[1:])
    for stage in stages:
        config, folder = jobs[stage.name], str(stage.folder.resolve())
        task = slurm.Task(str(stage.script), stage.argv, folder, config.max_requeues)
        config = config if before is None else _after(config, before)
        try:
            job = slurm.submit_task(
                config, StageJob(task, settings[stage.name]), stage.script, folder
            )
        except UserError as error:
            done = ", ".join(made["job_id"] for made in submitted.values()) or "none"
            raise UserError(f"{stage.name}: {error}; submitted before it: {done}") from None
        submitted[stage.name], before = job, job["job_id"]
        _say(f"{stage.name}: job {before}, log {job['stdout']}")
    return submitted


def _after(config, job_id):
    """A SlurmConfig for a job that begins once another has ended with exit code 0."""
    others = f"{config.dependency}," if config.dependency else ""
    return replace(config, dependency=f"{others}afterok:{job_id}")


def run(argv):
    """The command: returns (exit code, summary)."""
    stages = read_chain(argv)
    unfinished, settings = plan(stages)
    jobs = {stage.name: job_of(stage, settings[stage.name]) for stage in unfinished}
    with_job = [name for name, job in jobs.items() if job.partition]
    if with_job:
        slurm.check_sbatch()
        for name in set(jobs) - set(with_job):
            expected = f"expected one, as for {with_job[0]}"
            raise UserError(f"stages.{name}.slurm.partition: got none, {expected}")
        return 0, {"status": "submitted", "stages": submit_stages(unfinished, settings, jobs)}
    summaries = {s.name: summary_of(s.folder) for s in stages if s not in unfinished}
    with command.StopSignal() as stop:
        code, ran = run_stages(unfinished, settings, stop)
    interrupted = code == command.EXIT_INTERRUPTED
    status = "interrupted" if interrupted else "failed" if code else "finished"
    return code, {"status": status, "stages": summaries | ran}


def main(argv=None):
    """Run the command and return its exit code; the last line on stdout is the summary."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    try:
        code, summary = run(argv)
    except (UserError, CheckpointError) as error:
        print(one_line(error), file=sys.stderr)
        return command.EXIT_USER_ERROR
    print(json.dumps(summary), flush=True)
    return code


def _say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from ffcv_ssl.jobs import chain  # a job's pickle must name this module, not __main__

    sys.exit(chain.main())
