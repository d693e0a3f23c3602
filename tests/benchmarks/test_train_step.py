"""The benchmark of a training step: what it times is the trainer's own step, all of it, once."""

import copy
import json

import pytest
import torch

import train
from benchmarks import step_case, step_record, train_step
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole  # whole training runs

THREADS = ["--threads", "1", "--device", "cpu"]
SMALL = ["--backbone=tiny", "--px=32", "--batch=4", "--image_px=32"]


@pytest.fixture(autouse=True)
def same_number_of_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def open_case(out, path, **others):
    """BYOL, which has every part that a step can have."""
    settings = {
        "data.train": path, "data.batch_size": 4, "out": out, "method": "byol",
        "model.backbone": "tiny", "model.projector": "32-16", "resolution.min": 32,
        "resolution.max": 32, "optim.name": "sgd", "optim.lr_scaling": "none",
        "optim.warmup_epochs": 0, "log.tensorboard": "false", "log.every_steps": 2,
        "data.num_workers": 1, "byol.momentum": 0.5, **others,
    }  # fmt: skip
    config = train.read_config([f"--{name}={value}" for name, value in settings.items()])
    device = others.get("system.device", "cpu")
    return step_case.StepCase(config, World(device=device))


@pytest.fixture(scope="module")
def case(tmp_path_factory, raw_beton):
    found = open_case(tmp_path_factory.mktemp("case") / "run", raw_beton)
    found.prepare()
    yield found
    found.close()


def weights(module):
    return copy.deepcopy([p.detach() for p in module.parameters()])


def are_equal(module, earlier):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), earlier))


class SlowBackward(torch.autograd.Function):
    """The identity, whose backward pass lets a clock advance by 1."""

    @staticmethod
    def forward(ctx, z, clock):
        ctx.clock = clock
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.time += 1
        return gradient, None


class SlowParts:
    """A clock that stands still, but for a second in each of the functions made slow."""

    time = 0

    def __init__(self, case, monkeypatch):
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(case.clock, "now", lambda: self.time)

    def slow(self, owner, name):
        function = getattr(owner, name)

        def run(*arguments, **options):
            self.time += 1
            return function(*arguments, **options)

        self.monkeypatch.setattr(owner, name, run)


SLOW = {
    step_case.MODEL: lambda trainer: (trainer.model.backbone, "forward"),
    step_case.LOSS: lambda trainer: (trainer.method, "loss"),
    step_case.TEACHER: lambda trainer: (trainer.method.teacher, "forward"),
    step_case.AVERAGE: lambda trainer: (trainer.method.teacher, "move"),
    step_case.OPTIMIZER: lambda trainer: (trainer.optimizer, "step"),
    step_case.PROBES: lambda trainer: (trainer.probes.optimizer, "step"),
    step_case.AVERAGES: lambda trainer: (trainer.averages, "add_losses"),
    step_case.WATCH: lambda trainer: (trainer.watch, "see"),
    step_case.REST: lambda trainer: (trainer.done, "add_step"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_part_is_seen_in_its_own_row_and_in_no_other(case, monkeypatch, name):
    clock = SlowParts(case, monkeypatch)
    clock.slow(*SLOW[name](case.trainer))
    rows = case.parts(2)
    assert rows.pop(step_case.WHOLE) == rows[name] == 1
    assert {row for row, seconds in rows.items() if seconds} == {name}


def test_clipping_has_a_row_with_the_other_optimiser_and_only_there(case, monkeypatch):
    clock = SlowParts(case, monkeypatch)
    clock.slow(torch.nn.utils, "clip_grad_norm_")
    rows = case.parts(2, "lars")
    assert rows[step_case.CLIPPING] == rows[step_case.WHOLE] == 1
    assert step_case.CLIPPING not in case.parts(1) and clock.time == 2


def test_backward_of_the_loss_counts_as_loss_and_that_of_the_model_as_model(case, monkeypatch):
    trainer, clock = case.trainer, SlowParts(case, monkeypatch)
    loss, backbone = trainer.method.loss, trainer.model.backbone.forward

    def slow_loss(outputs, labels):
        slow = [{**f, "prediction": SlowBackward.apply(f["prediction"], clock)} for f in outputs]
        return loss(slow, labels)

    monkeypatch.setattr(trainer.method, "loss", slow_loss)
    rows = case.parts(1)
    assert rows[step_case.LOSS] == rows[step_case.WHOLE] == 2  # two views
    monkeypatch.setattr(trainer.method, "loss", loss)
    slow_backbone = lambda images: SlowBackward.apply(backbone(images), clock)  # noqa: E731
    monkeypatch.setattr(trainer.model.backbone, "forward", slow_backbone)
    rows = case.parts(1)
    assert rows[step_case.MODEL] == rows[step_case.WHOLE] == 1 and rows[step_case.LOSS] == 0


def test_the_bare_pass_trains_nothing_and_a_step_does(case):
    model = case.trainer.model
    before = weights(model)
    assert case.bare(2) > 0
    assert are_equal(model, before) and all(p.grad is None for p in model.parameters())
    assert case.step(1) > 0
    assert not are_equal(model, before)


def test_a_step_without_extras_learns_and_does_nothing_else(case):
    trainer = case.trainer
    model, teacher, probes = (
        weights(module) for module in (trainer.model, trainer.method.teacher, trainer.probes.probes)
    )
    trainer.averages.sums = {}
    case.step_without_extras(1)
    assert not are_equal(trainer.model, model)
    assert are_equal(trainer.method.teacher, teacher)
    assert are_equal(trainer.probes.probes, probes) and trainer.averages.sums == {}


def test_timing_leaves_the_trainer_as_it_was(case):
    trainer = case.trainer
    owners = (trainer, trainer.method, trainer.optimizer, trainer.probes, trainer.averages)
    before = [dict(vars(owner)) for owner in owners]
    case.parts(1)
    case.parts(1, "lars")
    case.step_without_extras(1)
    for owner, kept in zip(owners, before):
        assert vars(owner).keys() == kept.keys()
    assert trainer.optimizer is before[0]["optimizer"] and trainer.probes is before[0]["probes"]
    assert trainer.config is case.config


def test_the_bare_pass_of_other_images_is_refused(case, monkeypatch):
    views = list(case.data.unlabelled.views)
    case._check_same_work(views)
    monkeypatch.setattr(case, "joined", [torch.randn_like(images) for images in case.joined])
    with pytest.raises(RuntimeError, match="bare pass and step differ"):
        case._check_same_work(views)


def test_the_loop_takes_the_warm_steps_and_the_others_and_writes_its_log_lines(case):
    trainer = case.trainer
    step, lines = trainer.step, len(read_metrics(trainer.folder.path))
    found = case.loop(2, 4)
    assert trainer.step == step + 6 and len(read_metrics(trainer.folder.path)) == lines + 3
    assert found["images_per_s"] > 0 and 0 <= found["data_wait"] <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_events_on_a_gpu_tell_the_time_that_a_clock_tells(tmp_path, raw_beton):
    large = {"system.device": "cuda", "model.backbone": "resnet18"}
    case = open_case(tmp_path / "run", raw_beton, **large)
    assert case.peak_memory_mib(1, 1) > 40  # ResNet-18's weights alone
    case.prepare()
    case.step(5)
    clock, rows = min(case.step(20) for _ in range(3)), case.parts(20)
    case.close()
    assert rows.pop(step_case.WHOLE) == pytest.approx(clock, rel=0.5)
    assert all(seconds > 0 for seconds in rows.values())
    assert rows[step_case.MODEL] == max(rows.values())


def test_cases_take_turns_and_the_first_run_does_not_count():
    calls = []
    cases = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert train_step.interleave(cases, 2, "test") == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_spread_is_half_of_the_range_over_the_median():
    assert step_record.summarize(iter([8, 10, 14])) == {"median": 10.0, "spread": 0.3}
    assert step_record.summarize([-3, -2, -1]) == {"median": -2.0, "spread": 0.5}


def test_hours_add_up_over_the_ramp_of_the_published_run():
    ramp = train_step.read_ramp(train_step.CONFIGS / "imagenet/simclr_8gpu.yaml")
    assert sum(ramp.values()) == 100 and sorted(ramp) == [160, 192, 224]
    rates = {160: 2000.0, 192: 1500.0, 224: 1000.0}
    loop = {str(px): {"images_per_s": {"median": rate}} for px, rate in rates.items()}
    found = step_record.hours_of(loop, ramp)
    by_hand = sum(ramp[px] * 1281167 / rates[px] for px in ramp) / 3600
    assert found["hours"] == pytest.approx(by_hand, abs=0.01)
    assert step_record.hours_of(loop, {}) is None


def test_methods_of_an_earlier_record_stay_only_if_machine_settings_and_images_are_the_same():
    about = {"machine": {"cpu": "a"}, "settings": {"px": 224}, "images": {"images": 7}}
    earlier = {**about, "methods": {"byol": 1, "simclr": 1}}
    now = {**about, "methods": {"simclr": 2}}
    assert step_record.with_earlier(now, earlier)["methods"] == {"byol": 1, "simclr": 2}
    for key in about:
        assert step_record.with_earlier({**now, key: {}}, earlier)["methods"] == {"simclr": 2}
    assert step_record.with_earlier(now, {}) == now


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", train_step.METHODS)
def test_every_method_has_a_configuration_for_each_kind_of_device(method, device):
    file = train_step.CONFIGS / train_step.config_file(method, device)
    assert train.read_config([f"--config={file}"]).method == method


def test_the_command_ends_with_the_record_as_json_and_adds_to_the_file(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_step, "WARM_STEPS", 2)
    ramp, results = tmp_path / "ramp.yaml", tmp_path / "r.json"
    sides = "resolution: {min: 32, max: 64, start_ramp: 1, end_ramp: 2}\n"
    ramp.write_text(f"epochs: 3\noptim: {{warmup_epochs: 0}}\n{sides}")
    arguments = [*THREADS, *SMALL, "--runs=1", "--steps=1", "--loop_steps=1", f"--ramp={ramp}"]
    arguments += [f"--results={results}", "--log.tensorboard=false", "--quick"]
    assert train_step.main([*arguments, "--methods", "supervised"]) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(results.read_text())
    assert "bare forward and backward" in out and "watch for not finite losses" in out
    entry = record["methods"]["supervised"]
    assert set(entry["loop"]) == {"32", "64"}
    assert entry["imagenet"]["epochs_by_px"] == {"32": 2, "64": 1} and entry["peak_memory_mib"] > 0
    assert record["settings"]["train_py"] == ["--log.tensorboard=false"]
    assert record["images"]["images"] == 12 and record["images"]["source"] == "generated"
    results.write_text(json.dumps({**record, "methods": {"byol": entry}}))
    monkeypatch.setattr(train_step, "measure", lambda *_: entry)
    assert train_step.main([*arguments, "--methods", "supervised"]) == 0
    assert set(json.loads(results.read_text())["methods"]) == {"byol", "supervised"}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--methods", "moco"], "invalid choice: 'moco'"),
        (["--px", "0"], "expected a number from 1 up"),
        (["--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "no such device"),
        (["--beton", "nowhere.beton"], "nowhere.beton"),
        (["--beton", "RAW", "--loop_steps", "100"], "200 images make 50 steps, expected 105"),
        (["--root", "EMPTY"], "--root: "),
        (["--optim.lrr", "1"], "optim: unknown key 'lrr'"),
        (["--ramp", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--results", "nowhere/r.json"], "--results: nowhere/r.json: no such folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, raw_beton, arguments, what):
    places = {"RAW": raw_beton, "EMPTY": str(tmp_path)}
    arguments = [places.get(argument, argument) for argument in arguments]
    quick = [*THREADS, *SMALL, "--quick", "--methods", "simclr"]
    assert train_step.main([*quick, *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("benchmarks.train_step: ") and line.count("\n") == 1 and what in line
