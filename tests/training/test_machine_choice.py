"""What `auto` means for a setting: by the device, the processor and the number of images."""

import pytest

import train
from ffcv_ssl.config.plain import config_dict, flatten
from ffcv_ssl.training import machine_choice
from ffcv_ssl.training.machine_choice import CHOOSABLE, SMALL_RUN, Machine, choose, fitting_batch

CPU, GPU = Machine(False, 1, False), Machine(True, 1, True)
BELOW = flatten(config_dict(train.Config()))


def test_a_gpu_gets_what_the_files_below_say():
    assert choose(sorted(CHOOSABLE), BELOW, GPU, 10_000) == {"data.batch_size": 256}


def test_a_cpu_gets_a_small_run_of_its_own_precision():
    chosen = choose(sorted(CHOOSABLE), BELOW, CPU, 10_000)
    assert {name: chosen[name] for name in SMALL_RUN} == SMALL_RUN
    assert (chosen["precision"], chosen["channels_last"]) == ("fp32", False)
    fast = choose(sorted(CHOOSABLE), BELOW, CPU._replace(bf16=True), 10_000)
    assert (fast["precision"], fast["channels_last"]) == ("bf16", True)


def test_only_settings_that_are_asked_for_are_chosen():
    below = {**BELOW, "epochs": 7, "precision": "fp16"}
    chosen = choose(["optim.warmup_epochs", "channels_last"], below, CPU, 50)
    assert chosen == {"optim.warmup_epochs": 0.7, "channels_last": True}


def test_one_side_of_the_resolution_that_is_given_is_the_other_too():
    below = {**BELOW, "resolution.max": 32}
    assert choose(["resolution.min"], below, CPU, 50) == {"resolution.min": 32}


@pytest.mark.parametrize(
    "most, num_images, ranks, expected",
    [
        (256, 10_000, 1, 256), (256, None, 1, 256), (256, 512, 1, 256), (256, 511, 1, 128),
        (256, 24, 1, 8), (256, 4, 1, 2), (256, 2, 1, 2), (256, 1, 1, 2),
        (256, 10_000, 3, 192), (256, 24, 4, 8), (4096, 10_000, 8, 4096), (256, 10_000, 8, 256),
    ],
)  # fmt: skip
def test_a_batch_is_filled_twice_an_epoch_and_divided_by_the_ranks(
    most, num_images, ranks, expected
):
    assert fitting_batch(most, num_images, ranks) == expected


def test_a_small_run_has_about_as_many_steps_for_any_number_of_images():
    for num_images in (2_000, 5_000, 10_000, 20_000):
        steps = num_images // 256 * machine_choice.num_epochs(num_images, 256)
        assert 700 <= steps <= 1300
    assert machine_choice.num_epochs(24, 8) == 100
    assert machine_choice.num_epochs(10_000_000, 256) == 10


def test_ranks_on_several_machines_do_not_choose_by_their_own_processors(monkeypatch):
    monkeypatch.setattr(machine_choice, "is_bf16_fast", lambda timed: True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Machine.of_this_process("cpu") == Machine(False, 1, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Machine.of_this_process("cpu") == Machine(False, 4, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Machine.of_this_process("cpu") == Machine(False, 4, True)
    assert Machine.of_job(8, 2, 1) == Machine(True, 16, True)
    assert Machine.of_job(0, 2, 4) == Machine(False, 8, False)
