"""The demo's parts, what it chooses to train, and the whole of it on next to no data."""

import json
import sys
import time

import pytest
import torch
from support.outputs import closed_stdout, full_stdout

import demo
import train

FULL, SMALLEST = demo.PLANS[0], demo.PLANS[-1]


def machine(**rates):
    """A stand-in for `demo.images_per_second`: {"bf16_1": images/s at 48 px with one thread}, by
    precision and threads; smaller views are faster by their pixels. `asked` notes the questions."""

    def speed(px, threads, precision):
        speed.asked.append((px, threads, precision))
        return rates[f"{precision}_{threads}"] * (48 / px) ** 2

    speed.asked = []
    return speed


def test_a_machine_with_bf16_trains_all_with_one_of_its_two_cores():
    speed = machine(bf16_1=130, fp32_1=75)
    choice = demo.choose(speed, idle=1.9, bf16=True, left_s=200)
    assert (choice.plan, choice.precision, choice.threads) == (FULL, "bf16", 1)
    quick = {(demo.QUICK_PX, 1, kind) for kind in ("bf16", "fp32")}
    assert set(speed.asked) == quick | {(48, 1, "bf16")}  # no more


def test_a_second_thread_is_taken_where_one_is_too_slow():
    speed = machine(bf16_1=90, fp32_1=75, bf16_2=170)
    choice = demo.choose(speed, idle=1.9, bf16=True, left_s=200)
    assert (choice.plan, choice.threads, choice.images_per_s) == (FULL, 2, 170)


def test_emulated_bf16_is_not_even_tried_and_slow_bf16_is_not_taken():
    assert demo.choose(machine(fp32_1=200), 1, False, 200).precision == "fp32"
    assert demo.choose(machine(bf16_1=150, fp32_1=200), 1, True, 200).precision == "fp32"


@pytest.mark.parametrize("two", [60, 70, 80])
def test_two_cores_without_bf16_get_less_to_train_and_are_done_in_time(two):
    choice = demo.choose(machine(fp32_1=44, fp32_2=two), idle=1.9, bf16=False, left_s=160)
    assert choice.plan != FULL and choice.seconds <= 160
    clean_rate = demo.CLEAN_SPEED * (48 / demo.QUICK_PX) ** 2 * {1: 44, 2: two}[choice.threads]
    assert choice.seconds == pytest.approx(choice.plan.seconds(choice.images_per_s, clean_rate))


def test_large_views_are_not_timed_where_even_small_ones_are_too_slow():
    speed = machine(fp32_1=20, fp32_2=35)
    demo.choose(speed, idle=1.9, bf16=False, left_s=150)
    assert {px for px, _, _ in speed.asked} == {demo.QUICK_PX}


def test_a_machine_too_slow_for_any_plan_gets_the_smallest_at_its_best_speed():
    choice = demo.choose(machine(fp32_1=5, fp32_2=1), idle=1.9, bf16=False, left_s=160)
    assert (choice.plan, choice.threads) == (SMALLEST, 1) and choice.seconds > 160


def test_plans_get_smaller():
    seconds = [plan.seconds(50 * (48 / plan.px) ** 2, 50) for plan in demo.PLANS]
    assert seconds == sorted(seconds, reverse=True)


def test_a_view_that_is_only_encoded_counts_a_sixth_of_an_image():
    encoded = 5 * (2000 + demo.NUM_VAL) + 2 * (demo.NUM_PROBE + demo.NUM_VAL)
    assert FULL.seconds(100, 50) == 4 * demo.NUM_TRAIN / 100 + encoded / 6 / 50


def test_the_full_plan_is_what_the_configuration_says():
    config = "--config=configs/demo.yaml"
    assert train.read_config([config, *FULL.arguments()]) == train.read_config([config])


@pytest.mark.parametrize("plan", demo.PLANS)
def test_every_plan_evaluates_as_often_as_it_says_and_keeps_both_ends(plan):
    config = train.read_config(["--config=configs/demo.yaml", *plan.arguments()])
    every, last = config.evaluation.every_epochs, config.epochs
    due = [epoch for epoch in range(last + 1) if epoch % every == 0 or epoch == last]
    assert len(due) == plan.evaluations and config.checkpoint.keep_every == last
    assert config.resolution.min == config.resolution.max == plan.px
    assert config.evaluation.resolution == demo.CLEAN_PX


def test_the_choice_reaches_the_run():
    choice = demo.Choice(FULL, "bf16", 2, 150.0, 160.0)
    config = train.read_config(["--config=configs/demo.yaml", *choice.arguments()])
    assert (config.precision, config.system.torch_threads, config.channels_last) == (
        "bf16",
        2,
        True,
    )
    choice = demo.Choice(SMALLEST, "fp32", 1, 100.0, 180.0)
    config = train.read_config(["--config=configs/demo.yaml", *choice.arguments()])
    assert (config.precision, config.channels_last) == ("fp32", False)
    assert config.epochs == SMALLEST.epochs
    assert config.data.batch_size == demo.batch_size_at(SMALLEST.px)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_timing_trains_and_leaves_the_number_of_threads(precision):
    threads = torch.get_num_threads()
    assert 0 < demo.images_per_second(8, 1, precision, 0.01) < 1e6
    assert torch.get_num_threads() == threads


def test_the_choice_is_told_in_two_lines(monkeypatch, capsys):
    monkeypatch.setattr(demo, "images_per_second", machine(fp32_1=44, fp32_2=70))
    monkeypatch.setattr(demo, "idle_cores", lambda: 1.94)
    monkeypatch.setattr(demo, "has_bf16", lambda: False)
    choice = demo.look_at_machine(time.perf_counter() - 12)
    measured, chosen = capsys.readouterr().out.splitlines()[-2:]
    assert "1.9 of" in measured and "cores idle, no bf16" in measured
    assert (
        f"{choice.images_per_s:.0f} images/s at {max(choice.plan.px, demo.QUICK_PX)} px" in measured
    )
    assert f"chosen: {choice.plan.px} px, {choice.plan.epochs} epochs" in chosen
    total = 12 + choice.seconds + demo.OTHER_S
    assert f"about {total:.0f} s in all" in chosen and total < 240


def blobs(num_samples, seed, spread):
    """Three Gaussian blobs in 8 dimensions: features and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % 3
    centres = torch.eye(8)[:3] * 5
    return centres[labels] + spread * torch.randn(num_samples, 8, generator=generator), labels


@pytest.mark.parametrize("score", [demo.linear_probe, demo.knn])
def test_probes_find_classes_that_are_there_and_none_where_there_are_none(score):
    clear = score(blobs(300, 0, 0.5), blobs(90, 1, 0.5), 3)
    features, labels = blobs(300, 0, 0.5)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    chance = score((features, shuffled), blobs(90, 1, 0.5), 3)
    assert clear == 100 and chance < 60


def test_linear_probe_reaches_the_minimum_of_its_convex_problem():
    features, labels = blobs(300, 0, 4.0)
    val_features, val_labels = blobs(3000, 1, 4.0)
    first = demo.linear_probe((features, labels), (val_features, val_labels), 3)
    moved = (10 * features + 3, labels), (10 * val_features + 3, val_labels)
    again = demo.linear_probe(*moved, 3)
    assert first == pytest.approx(again, abs=0.5)  # standardised: scale and offset do not matter


def test_a_folder_with_other_peoples_files_is_not_deleted(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert demo.main([f"--out={tmp_path}"]) == 2
    assert (tmp_path / "thesis.tex").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not the demo's" in message


def test_a_full_or_closed_stdout_is_no_traceback(tmp_path, monkeypatch, capsys):
    def run(out):
        demo.say("-- a step")
        return 0, {}

    monkeypatch.setattr(demo, "run", run)
    with full_stdout() as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert demo.main([f"--out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err == "stdout: cannot be written (No space left on device); free some space\n"
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert demo.main([f"--out={tmp_path}"]) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(demo, "run", lambda out: (0, {}))
    with full_stdout() as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert demo.main([f"--out={tmp_path}"]) == 2
    assert "all steps are done; free some space" in capsys.readouterr().err


@pytest.mark.slow
def test_a_demo_that_learnt_nothing_says_so_and_exits_1(tmp_path, monkeypatch, capsys):
    for name, value in (("NUM_TRAIN", 130), ("NUM_VAL", 50), ("NUM_PROBE", 100)):
        monkeypatch.setattr(demo, name, value)
    assert demo.main([f"--out={tmp_path / 'demo'}"]) == 1
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["gain_points"] < 15 and "expected at least 15" in printed.err
    assert summary["chance"] == 10 and set(summary["trained"]) == set(summary["step_0"])
    assert "k-NN, pixels" in printed.out and (tmp_path / "demo" / "report.png").exists()
