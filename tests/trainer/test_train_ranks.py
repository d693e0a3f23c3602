"""Several ranks on CPUs: the losses, gradients and numbers of one rank, and life after a kill."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.forked import start_ranks
from support.process_limits import free_port
from support.small_files import REPOSITORY, write_small
from torch import nn
from torture.processes import children_of

import train
from ffcv_ssl.config import settings
from ffcv_ssl.training.data_parallel import share_learning
from ffcv_ssl.training.meeting import meet
from ffcv_ssl.training.meters import Averages
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.probes import Probes, ProbeTrainer
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole

BATCH, CLASSES = 12, 5
METHODS = ["simclr", "vicreg", "barlow", "byol", "supervised", "instance_simclr", "moco", "simsiam"]
STREAMS = ["none", "suncet", "supcon", "cross_entropy"]
CASES = [(m, "none") for m in METHODS] + [("simclr", s) for s in STREAMS[1:]]


class SmallModel(nn.Module):
    """A model without batch-norm, with the parts of `train.Model` that a step needs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh())
        self.projector = nn.Linear(16, 8)
        self.widths, self.last = {"backbone": 16, "projector_1": 8}, "projector_1"

    def forward(self, views):
        features = [self.backbone(view) for view in views]
        return [{"backbone": f, "projector_1": self.projector(f)} for f in features]


def make_batch(num_views):
    generator = torch.Generator().manual_seed(7)
    views = [torch.randn(BATCH, 3, 4, 4, generator=generator) for _ in range(num_views)]
    labelled = [torch.randn(BATCH, 3, 4, 4, generator=generator) for _ in range(2)]
    labels = torch.randint(-1, CLASSES, (2, BATCH), generator=generator)
    return views, labelled, labels


def part_of(tensor, world):
    return tensor.tensor_split(world.size)[world.rank]


def one_step(world, method_name, stream):
    """(loss, gradients of learner and probes by name, means) of one step on this rank's part."""
    torch.manual_seed(3)
    config = train.config_class_of(method_name)(
        method=method_name, model=settings.ModelConfig(projector="8", projector_norm="none"),
        labelled=settings.LabelledConfig(loss=stream),
    )  # fmt: skip
    model = SmallModel()
    method = train.method_class(method_name)(config, model, CLASSES, world)
    classifier = nn.Linear(16, CLASSES) if stream == "cross_entropy" else None
    learner = train.Learner(model, method, classifier)
    network = share_learning(
        learner, world, settings.SystemConfig(), unreached=stream == "cross_entropy"
    )
    num_views = 3 if method_name == "instance_simclr" else 2
    views, labelled, labels = make_batch(num_views)
    views = [part_of(view, world) for view in views]
    first_labels, labels = (part_of(row, world) for row in labels)
    if stream != "none":
        views += [part_of(view, world) for view in labelled]
    outputs = network(views, num_views)
    chosen = method.target_views or range(num_views)
    for view, targets in zip(chosen, method.targets([views[view] for view in chosen])):
        outputs[view].update(targets)
    loss, _ = method.loss(outputs[:num_views], first_labels)
    if stream != "none":
        loss = loss + train.labelled_loss(outputs[num_views:], labels, config, world)
    loss.backward()
    gradients = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    torch.manual_seed(4)  # MoCo on several ranks has drawn an order
    probes = ProbeTrainer(Probes(model.widths, CLASSES), settings.ProbeConfig(), world)
    averages = Averages()
    probes.train_step(outputs[0], first_labels, averages)
    gradients |= {f"probe {n}": p.grad for n, p in probes.probes.named_parameters()}
    return loss.detach(), gradients, averages.take(world)


def rank_main(rank, size, port, folder):
    """What each rank of the test does: all cases, saved by the first one."""
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = World.join("cpu", 1, {name: str(value) for name, value in launcher.items()})
    results = {case: one_step(world, *case) for case in CASES}
    if world.is_first:
        torch.save(results, folder / "ranks.pt")
    world.leave()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """{number of ranks: {case: result of the first rank}}."""
    results = {}
    for size in (2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        start_ranks(rank_main, (size, free_port(), folder), size)
        results[size] = torch.load(folder / "ranks.pt")
    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=[" ".join(case) for case in CASES])
def test_ranks_with_parts_of_a_batch_have_the_loss_and_gradients_of_one_with_all(
    of_ranks, case, size
):
    loss, gradients, means = one_step(World(), *case)
    other_loss, other_gradients, other_means = of_ranks[size][case]
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    assert other_gradients.keys() == gradients.keys()
    # of the largest gradient: some are 0 but for rounding, as those of a shift before a mean
    tolerance = 1e-5 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=tolerance)
    assert other_means == pytest.approx(means)


# ---- whole runs under torchrun -------------------------------------------------------------------

SETTINGS = {
    "epochs": 2, "data.batch_size": 16, "data.num_workers": 1, "views.small_images": True,
    "resolution.min": 16, "resolution.max": 16, "model.backbone": "tiny",
    "model.projector": "16-8", "optim.name": "sgd", "optim.lr": 0.05,
    "optim.warmup_epochs": 0, "evaluation.batch_size": 20, "evaluation.knn_bank": 50,
    "log.every_steps": 1, "log.tensorboard": False, "system.device": "cpu",
    "system.torch_threads": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    train_file = write_small(folder / "train.beton", 100, (16, 16), mode="raw")
    val_file = write_small(folder / "val.beton", 33, (16, 16), mode="raw")
    return {"data.train": train_file, "data.val": val_file}


def start(out, size, files, max_restarts=0, **changes):
    """A run under torchrun, as a process of its own group."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(size), "--standalone"]
    launcher += ["--max_restarts", str(max_restarts), "--monitor_interval", "0.1"]
    given = {**SETTINGS, **files, **{k.replace("__", "."): v for k, v in changes.items()}}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, *launcher, "train.py", f"--out={out}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    """The exit code and output of a run."""
    try:
        printed, _ = process.communicate(timeout=240)
    finally:
        stop(process)
    return process.returncode, printed


def stop(process):
    """End a run and its ranks."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def evaluations(out):
    """The validation figures of a run by step."""
    records = read_metrics(out)
    keys = [{k: v for k, v in r.items() if k.startswith("val/")} for r in records]
    return {r["step"]: found for r, found in zip(records, keys) if found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, files):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = finish(start(out, 2, files))
    assert code == 0, printed
    return out, printed


def test_the_first_rank_alone_writes_and_speaks(undisturbed):
    out, printed = undisturbed
    lines = [line for line in printed.splitlines() if line.startswith("step 1/")]
    assert len(lines) == 1
    assert json.loads(printed.splitlines()[-1])["status"] == "finished"
    steps = [r["step"] for r in read_metrics(out) if "train/loss" in r]
    assert steps == list(range(1, 13))


def test_a_rank_killed_mid_epoch_is_restarted_and_ends_with_the_undisturbed_numbers(
    undisturbed, tmp_path, files
):
    out = tmp_path / "run"
    process = start(out, 2, files, max_restarts=2, checkpoint__every_minutes=1e-6)
    wait_for_step(out, 3, process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    wait_for_step(out, 7, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, printed = finish(process)
    assert code == 0, printed
    assert printed.count("resumed at step") == 2
    assert evaluations(out) == evaluations(undisturbed[0])
    steps = [r["step"] for r in read_metrics(out) if "train/loss" in r]
    assert steps == list(range(1, 13))


def test_ranks_that_meet_in_a_store_of_dead_ones_read_nothing_of_theirs():
    store, size = torch.distributed.HashStore(), 3

    def join(rank, attempt):
        found = meet(store, rank, size, patience_s=60)
        addresses_left = found.check(["address"])
        if rank == 0:
            found.set("address", attempt)
        return addresses_left, found.get("address").decode()

    for attempt in ("first", "second", "third"):
        store.set("token/1", "of a dead rank")  # as if it had been killed before it was answered
        with ThreadPoolExecutor(size) as pool:
            seen = list(pool.map(join, range(size), [attempt] * size))
        assert [address for _, address in seen] == [attempt] * size
        assert not seen[0][0]


def wait_for_step(out, step, process):
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in read_metrics(out)):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(process)
            pytest.fail(f"{out} did not reach step {step}: {process.communicate()[0]}")
        time.sleep(0.002)  # on a fast machine a run ends some hundredths of a second later


def workers_of(parent):
    """Process ids of torchrun's workers. (`ps` takes longer than a few steps.)"""
    return sorted(children_of(parent))


def test_sigterm_to_all_ranks_saves_one_step_and_two_ranks_go_on_as_one(
    undisturbed, tmp_path, files, capsys
):
    out = tmp_path / "run"
    process = start(out, 2, files)
    wait_for_step(out, 3, process)
    for pid in workers_of(process.pid):
        os.kill(pid, signal.SIGTERM)
    code, printed = finish(process)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert code != 0 and f"interrupted; checkpoint.pt holds step {saved['step']}" in printed
    assert 3 <= saved["step"] < 12
    assert '{"status": "interrupted"' in printed
    # torchrun tells a rank to stop when the other has ended; it ends as it would have
    assert set(re.findall(r"exitcode *: *(-?\d+)", printed)) == {"75"}, printed
    threads = torch.get_num_threads()
    try:
        given = {**SETTINGS, **files}
        assert train.main([f"--out={out}", *(f"--{k}={v}" for k, v in given.items())]) == 0
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    mine, other = read_metrics(out), read_metrics(undisturbed[0])
    assert [r["step"] for r in mine] == [r["step"] for r in other]
    assert [(r["images"], r["views"]) for r in mine] == [(r["images"], r["views"]) for r in other]


def test_a_rank_that_is_stopped_for_good_is_named_in_one_line(tmp_path, files):
    out = tmp_path / "run"
    process = start(out, 2, files, epochs=500, system__patience_minutes=0.1)
    wait_for_step(out, 3, process)
    stopped = rank_of(workers_of(process.pid), 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        process.wait(timeout=150)  # torchrun ends the stopped rank after 30 s
    finally:
        with contextlib.suppress(ProcessLookupError):  # torchrun has ended it
            os.kill(stopped, signal.SIGKILL)
    code, printed = finish(process)
    assert code != 0
    said = [line for line in printed.splitlines() if "did not answer" in line]
    assert len(said) == 1 and said[0].startswith("rank 1 of 2 did not answer for 6 s: "), printed
    assert "gloo" not in printed


def rank_of(workers, rank):
    """The process id of a rank."""
    variables = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in workers}
    (found,) = [pid for pid in workers if f"RANK={rank}" in variables[pid]]
    return found


def test_a_batch_that_ranks_cannot_share_is_one_line_and_exit_code_2(tmp_path, files):
    code, printed = finish(start(tmp_path / "run", 2, files, data__batch_size=15))
    assert code != 0
    assert printed.count("data.batch_size: got 15, expected a multiple of 2 ranks") == 1


def test_a_mistake_met_before_the_ranks_meet_is_one_line_for_all_ranks_and_restarts(
    tmp_path, files
):
    code, printed = finish(start(tmp_path / "run", 2, files, 1, optim__lr=-1))
    assert code != 0 and printed.count("optim.lr: got -1") == 1, printed


def test_a_mistake_of_a_single_rank_is_one_line_for_all_restarts(tmp_path, files):
    code, printed = finish(start(tmp_path / "run", 1, {"data.train": "no.beton"}, 2))
    assert code != 0 and printed.count("no file 'no.beton'") == 1, printed


FAILING = """
import time
import torch.distributed
from dataclasses import dataclass
from ffcv_ssl.errors import UserError
from ffcv_ssl.methods import Method

# as NCCL: whoever leaves waits for ranks that are in a collective
torch.distributed.destroy_process_group = lambda *_: time.sleep(3600)

@dataclass(frozen=True)
class NoSettings:
    '''None.'''

class Failing(Method):
    group, Settings, steps = "failing", NoSettings, 0

    def loss(self, outputs, labels):
        self.steps += 1
        if self.steps == 3 and self.world.rank == 1:
            raise {error}("the second rank fails alone")
        return self.all_gather(outputs).square().mean(), {{}}
"""


@pytest.mark.parametrize("error", ["UserError", "ZeroDivisionError"])
def test_a_rank_that_fails_alone_says_why_and_ends_the_run(error, tmp_path, files):
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING.format(error=error))
    method = f"{plugin}:Failing"
    began = time.monotonic()
    code, printed = finish(start(tmp_path / "run", 2, files, 1, method=method, epochs=20))
    assert code != 0 and time.monotonic() - began < 200
    # a user's mistake is not tried, and not told, again; a crash is
    if error == "UserError":
        assert printed.count("the second rank fails alone") == 1
    else:
        assert printed.count("ZeroDivisionError: the second rank fails alone") == 2
    assert [r["step"] for r in read_metrics(tmp_path / "run")][-1] == 2
