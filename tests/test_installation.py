"""An installed package: what is in the wheel, and every flow from an empty folder.

The wheel is built from the sdist, and installed into a fresh environment. The folder in which its
commands run has modules of the scripts' names that end everything.
"""

import json
import shlex
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import installations, slurm_cluster
from support.installations import Environment, app_files

from ffcv_ssl.training.metrics_log import read_metrics

pytestmark = [pytest.mark.whole, pytest.mark.slow]

SMALL = [
    "--epochs=1", "--data.batch_size=16", "--data.num_workers=1", "--resolution.min=16",
    "--resolution.max=16", "--model.backbone=tiny", "--model.projector=16-8",
    "--evaluation.resolution=16", "--evaluation.batch_size=16", "--evaluation.knn_bank=50",
    "--optim.warmup_epochs=0", "--log.every_steps=1", "--log.tensorboard=false",
    "--system.device=cpu", "--precision=fp32",
]  # fmt: skip
DATA = ["--data.train=train.beton", "--data.val=val.beton"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel)."""
    folder = tmp_path_factory.mktemp("built")
    sources = installations.copy_sources(tmp_path_factory.mktemp("sources"))
    return installations.build(sources, folder)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel."""
    return Environment(tmp_path_factory.mktemp("installed"), built[1])


def misleading_folder(folder):
    """A folder whose modules must not be run in place of the scripts."""
    for name in ("train", "evaluate", "write_dataset", "demo"):
        (folder / f"{name}.py").write_text("raise SystemExit('this is the user\\'s own')\n")
    (folder / "pipelines").mkdir()
    (folder / "pipelines/__init__.py").write_text("raise SystemExit('this is the user\\'s')\n")
    return folder


@pytest.fixture(scope="module")
def folder(installed, tmp_path_factory):
    """A user's folder with two small datasets."""
    made = misleading_folder(tmp_path_factory.mktemp("empty"))
    for split, count in (("train", 64), ("val", 40)):
        words = ["--source=shapes", f"--split={split}", f"--num_samples={count}", "--size_px=32"]
        done = installed.run("ffcv-ssl", "write", *words, f"--out={split}.beton", cwd=made)
        assert summary_of(done)["samples"] == count
    return made


@pytest.fixture(scope="module")
def trained(installed, folder):
    """(the summary of a training run, its folder)."""
    words = ["--config=demo", *DATA, *SMALL, "--out=runs/first"]
    done = installed.run("ffcv-ssl", "train", *words, cwd=folder)
    return summary_of(done), folder / "runs/first"


def summary_of(done):
    return json.loads(done.stdout.splitlines()[-1])


# ---- What is in it -------------------------------------------------------------------------------


def test_nothing_but_the_package_is_at_the_top_of_a_wheel(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    assert installations.top_level(names) == {"ffcv_ssl", "ffcv_ssl-0.1.0.dist-info"}
    assert "ffcv_ssl/command_line/words.json" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_scripts_recipes_and_configurations_are_in_it_byte_for_byte(built):
    with zipfile.ZipFile(built[1]) as wheel:
        prefix = "ffcv_ssl/app/"
        inside = {name.removeprefix(prefix): name for name in wheel.namelist() if prefix in name}
        assert set(inside) == set(app_files())
        for name, path in app_files().items():
            assert wheel.read(inside[name]) == path.read_bytes(), name


def test_every_module_of_the_package_is_in_it(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    package = installations.REPOSITORY / "ffcv_ssl"
    modules = {f"ffcv_ssl/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert modules == {n for n in names if n.endswith(".py") and "/app/" not in n}
    assets = (package / "monitor/assets").iterdir()
    assert {f"ffcv_ssl/monitor/assets/{path.name}" for path in assets} <= names


def test_the_sources_of_a_release_have_what_the_wheel_is_made_of(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(app_files()) | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_installed_package_is_the_one_that_runs(installed, folder):
    code = "import ffcv_ssl, sys; from ffcv_ssl.config import app_files as a; "
    code += "print(ffcv_ssl.__file__, a.app_folder(), sep='\\n')"
    lines = installed.run("python", "-c", code, cwd=folder).stdout.splitlines()
    assert lines == [f"{installed.site}/ffcv_ssl/__init__.py", f"{installed.site}/ffcv_ssl/app"]
    code = "import importlib.util as u; names = 'train evaluate write_dataset demo pipelines'; "
    code += "print([name for name in names.split() if u.find_spec(name)])"
    done = installed.run("python", "-P" if has_safe_path() else "-I", "-c", code, cwd=folder)
    assert done.stdout.strip() in ("[]", "['evaluate']")  # another library's name


def has_safe_path():
    import sys

    return sys.version_info >= (3, 11)


# ---- Flows ---------------------------------------------------------------------------------------


def test_a_run_is_trained_from_a_configuration_by_name(trained):
    summary, out = trained
    assert summary["status"] == "finished" and summary["step"] == 4
    assert (out / "backbone.safetensors").exists()


def test_a_checkpoint_is_evaluated(installed, trained, folder):
    words = ["knn", "--checkpoint", "runs/first", "--system.device=cpu"]
    done = installed.run("ffcv-ssl", "evaluate", *words, cwd=folder)
    assert summary_of(done)["protocol"] == "knn"


def test_views_of_a_configuration_are_drawn(installed, folder):
    words = ["--config=demo", "--beton=train.beton", "--out=views.png", "--images=1"]
    done = installed.run("ffcv-ssl", "views", *words, cwd=folder)
    assert summary_of(done)["size_px"] == 48 and (folder / "views.png").exists()


def test_a_file_is_inspected(installed, folder):
    done = installed.run("ffcv-ssl", "inspect", "train.beton", "--verify", cwd=folder)
    assert summary_of(done)["verify"]["bad"] == 0


def test_the_self_test_is_right(installed, folder):
    done = installed.run("ffcv-ssl", "selftest", "--seconds=0.1", "--device=cpu", cwd=folder)
    summary = summary_of(done)
    assert summary["status"] == "right" and summary["scripts"] == f"{installed.site}/ffcv_ssl/app"


def test_a_chain_runs(installed, folder):
    (folder / "chain.yaml").write_text(
        "stages:\n  pretrain: {command: train, config: demo}\n"
        "  neighbours: {command: knn, overrides: {checkpoint: '{pretrain}'}}\n"
    )
    words = [f"--pretrain.{word[2:]}" for word in [*DATA, *SMALL]]
    words += ["--neighbours.system.device=cpu", "--out=runs/chain"]
    done = installed.run("ffcv-ssl", "chain", "chain.yaml", *words, cwd=folder)
    assert summary_of(done)["status"] == "finished"


def test_two_ranks_train_under_torchrun(installed, folder, trained):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["-m", "ffcv_ssl", "train", "--config=demo", *DATA, *SMALL, "--out=runs/ranks"]
    done = installed.run("python", *words, cwd=folder)
    assert summary_of(done)["status"] == "finished"
    steps = [r["step"] for r in read_metrics(folder / "runs/ranks") if "train/loss" in r]
    assert steps == [1, 2, 3, 4]


def test_a_users_method_finds_the_users_modules(installed, folder):
    (folder / "mine").mkdir()
    (folder / "mine/evaluate.py").write_text("WEIGHT = 2.0\n")
    (folder / "mine/pipelines").mkdir()
    (folder / "mine/pipelines/__init__.py").write_text("from pipelines.part import SCALE\n")
    (folder / "mine/pipelines/part.py").write_text("SCALE = 3.0\n")
    (folder / "mine/method.py").write_text(
        "import evaluate\nimport pipelines\nfrom ffcv_ssl.methods.simsiam import SimSiam\n\n"
        "class Mine(SimSiam):\n"
        "    def loss(self, outputs, labels):\n"
        "        loss, terms = super().loss(outputs, labels)\n"
        "        return evaluate.WEIGHT * pipelines.SCALE * loss, terms\n"
    )
    words = ["--config=demo", *DATA, *SMALL, "--method=mine/method.py:Mine", "--out=runs/mine"]
    done = installed.run("ffcv-ssl", "train", *words, cwd=folder)
    assert summary_of(done)["status"] == "finished"
    assert summary_of(done)["train/loss"] < -1.5  # SimSiam's is above -1


def test_a_run_is_called_from_python(installed, folder):
    code = "from ffcv_ssl.api import pretrain\n"
    code += f"given = dict(w[2:].split('=') for w in {[*DATA, *SMALL]!r})\n"
    code += "print(pretrain('demo', out='runs/api', **given).latest['step'])"
    done = installed.run("python", "-c", code, cwd=folder)
    assert done.stdout.splitlines()[-1] == "4"


def test_the_job_file_is_shown_where_there_is_no_slurm(installed, folder):
    words = ["--config=demo", *DATA, "--out=runs/job", "--slurm.dry_run=true"]
    words += ["--slurm.partition=gpu", "--slurm.nodes=2"]
    done = installed.run("ffcv-ssl", "train", *words, cwd=folder, PATH="/nowhere")
    script = f"{installed.site}/ffcv_ssl/app/train.py"
    (job,) = summary_of(done)["jobs"]
    submitted = folder / "runs/job/slurm/submitted.yaml"
    assert job["command"] == shlex.join([script, f"--config={submitted}"])
    assert "#SBATCH --partition=gpu" in done.stdout and "#SBATCH --nodes=2" in done.stdout
    assert f"{installed.bin}/python" in done.stdout and "PYTHONPATH" not in done.stdout
    assert not (folder / "runs/job").exists()


@pytest.mark.slurm
def test_a_slurm_job_runs_the_installed_script(installed, folder, trained):
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.Cluster() as cluster:
        words = ["--config=demo", *DATA, *SMALL, "--out=runs/slurm", "--slurm.partition=low"]
        words += ["--slurm.tasks_per_node=2"]
        given = {key: cluster.environment[key] for key in ("PATH", "SLURM_CONF")}
        done = installed.run("ffcv-ssl", "train", *words, cwd=folder, **given)
        made = summary_of(done)
        job = cluster.wait_for_end(made["job_id"])
        log = Path(made["stdout"]).read_text() + Path(made["stderr"]).read_text()
    assert job["JobState"] == "COMPLETED", log
    steps = [r["step"] for r in read_metrics(folder / "runs/slurm") if "train/loss" in r]
    assert steps == [1, 2, 3, 4]


# ---- Editable ------------------------------------------------------------------------------------


def test_an_editable_install_uses_the_repositorys_own_files(tmp_path_factory, tmp_path):
    sources = installations.copy_sources(tmp_path_factory.mktemp("editable"))
    installed = Environment(tmp_path_factory.mktemp("environment"), "--editable", sources)
    (sources / "configs/mine.yaml").write_text("base: demo.yaml\nepochs: 7\n")
    folder = misleading_folder(tmp_path)
    done = installed.run("ffcv-ssl", "train", "--config=mine", "--print_config", cwd=folder)
    assert "epochs: 7" in done.stdout
    code = "from ffcv_ssl.config.app_files import app_folder; print(app_folder())"
    assert installed.run("python", "-c", code, cwd=folder).stdout.strip() == str(sources)
    assert not (sources / "ffcv_ssl/app").exists()
