"""Names and paths that a shell would run: a job's script treats them as text, or they are refused.

sbatch and srun are replaced by scripts: this sbatch runs the job's script at once, as a node would.
"""

import os
from pathlib import Path

import pytest

from ffcv_ssl.errors import UserError
from ffcv_ssl.jobs import slurm
from ffcv_ssl.jobs.slurm import SlurmConfig

HOSTILE = [
    "$(touch owned)",
    "`touch owned`",
    "a; touch owned;",
    "a' ; touch owned ; '",
    'a" ; touch owned ; "',
    "a b && touch owned",
    "a | touch owned #",
    "-rf $HOME ${IFS}touch",
    "*",
    "ü 漢 字",
    "10\u00a0000\u3000a",
]
TWO_LINES = ["a\ntouch owned\n", "a\rtouch owned", "a\x1bb", "a\x0btouch owned", "a\u2028b"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Runs what is submitted, in `tmp_path / "work"`, where `owned` must not appear."""
    programs, work = tmp_path / "programs", tmp_path / "work"
    programs.mkdir(), work.mkdir()
    scripts = {
        "sbatch": '#!/bin/sh\nfor last; do :; done\nsh "$last" >&2\necho Submitted batch job 7\n',
        "srun": "#!/bin/sh\nexit 0\n",
        "squeue": "#!/bin/sh\nexit 0\n",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(work)
    return work


def submit(out, **options):
    job = slurm.make_job("train.py", [], {"out": str(out)}, SlurmConfig(partition="p", **options))
    return slurm.submit_jobs([[job]])


@pytest.mark.whole
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_or_setting_is_submitted_as_text_and_nothing_of_it_runs(cluster, name):
    (made,) = submit(cluster / "runs" / name, comment=f"%j %x {name}", nodelist=f"%j %x {name}")
    assert made["job_id"] == "7" and (cluster / "runs" / name / "slurm").is_dir()
    assert sorted(path.name for path in cluster.iterdir()) == ["runs"]


@pytest.mark.parametrize("name", TWO_LINES)
@pytest.mark.parametrize("where", ["out", "comment", "nodelist", "dependency"])
def test_text_of_two_lines_is_refused_before_anything_is_written(cluster, name, where):
    out, options = cluster / "runs", {"partition": "p"}
    out, options = (out / name, options) if where == "out" else (out, options | {where: name})
    job = slurm.make_job("train.py", [], {"out": str(out)}, SlurmConfig(**options))
    expected = "expected text without line breaks and control characters, for sbatch"
    with pytest.raises(UserError, match=expected) as error:
        slurm.submit_jobs([[job]])
    assert "\n" not in str(error.value)
    assert list(Path(cluster).iterdir()) == []


@pytest.mark.parametrize("name", ["%j", "50%", "a%%x/b"])
def test_a_folder_whose_logs_sbatch_would_rename_is_refused(cluster, name):
    job = slurm.make_job("train.py", [], {"out": f"runs/{name}"}, SlurmConfig(partition="p"))
    with pytest.raises(UserError, match=r"^out: got '.*%.*', expected a folder without %, which"):
        slurm.submit_jobs([[job]])
    assert list(Path(cluster).iterdir()) == []


def test_spaces_that_do_not_print_as_such_are_text(cluster):
    job = slurm.make_job("train.py", [], {"out": "10\u00a0000\u3000a"}, SlurmConfig(partition="p"))
    slurm._check_texts(job)
