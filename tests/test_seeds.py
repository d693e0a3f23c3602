"""Means and spreads over seeds: what belongs together, and the numbers."""

import json

import numpy as np
import pytest
import yaml

import evaluate
from ffcv_ssl.protocols.seeds import common_name
from ffcv_ssl.results import report

RUN = {"method": "simclr", "seed": 0, "out": "x", "data": {"train": "t", "batch_size": 64}}


def write(folder, top1, seed=0, protocol="knn", run=RUN, step=100, **settings):
    """A run's folder with its configuration and one result."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**run, "seed": seed, "out": str(folder)}))
    return write_result(folder, folder, top1, protocol, step, seed=seed, **settings)


def write_result(folder, checkpoint, top1, protocol="knn", step=100, **settings):
    record = {
        "protocol": protocol, "checkpoint": str(checkpoint), "name": "n", "about": {"step": step},
        "data": {"val": "/data/val.beton", "val_content": "1f"}, "settings": settings,
        "metrics": {"backbone": {"top1": top1, "top5": 0.9, "per_class": [1, 2]}},
    }  # fmt: skip
    report(record, folder)
    return str(folder)


@pytest.fixture
def summarise(capsys):
    """The groups that the command finds in some folders."""

    def summarise(*folders, **settings):
        words = [f"--{key}={value}" for key, value in settings.items()]
        code = evaluate.main(["seeds", "--checkpoint", *folders, *words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out.splitlines()[-1])["groups"]

    return summarise


def test_mean_and_spread_are_those_of_numpy(tmp_path, summarise):
    values = [0.61, 0.64, 0.66]
    folders = [write(tmp_path / f"a_seed{s}", v, seed=s) for s, v in enumerate(values)]
    (group,) = summarise(*folders, out=tmp_path)
    assert group["n"] == 3 and group["mean"] == pytest.approx(np.mean(values))
    assert group["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (group["min"], group["max"]) == (0.61, 0.66)
    assert group["checkpoint"] == str(tmp_path / "a_seed*")
    row = (tmp_path / "seeds.md").read_text().splitlines()[2]
    assert "| knn | val | backbone.top1 | 3 | 63.67 +- 2.52 | 61.00 to 66.00 |" in row


def test_runs_protocols_settings_and_ages_that_differ_are_apart(tmp_path, summarise):
    folders = [
        write(tmp_path / "a_0", 0.1), write(tmp_path / "a_1", 0.2, seed=1),
        write(tmp_path / "b_0", 0.3, run={**RUN, "method": "byol"}),
        write(tmp_path / "c_0", 0.4, protocol="snn"), write(tmp_path / "d_0", 0.5, k=5),
        write(tmp_path / "e_0", 0.6, step=200),
    ]  # fmt: skip
    groups = summarise(*folders)
    assert [group["n"] for group in groups] == [2, 1, 1, 1, 1]
    assert groups[1]["sd"] is None


def test_seeds_of_labels_are_seeds_too_and_paths_make_no_difference(tmp_path, summarise):
    folders = [
        write(tmp_path / f"a_{s}", 0.1 * s, labels={"seed": s}, data={"train": f"/{s}"})
        for s in (1, 2)
    ]
    assert [group["n"] for group in summarise(*folders)] == [2]


def test_the_newest_of_one_seed_counts(tmp_path, summarise):
    folder = write(tmp_path / "a_0", 0.1)
    write(tmp_path / "a_0", 0.7)
    (group,) = summarise(folder, write(tmp_path / "a_1", 0.9, seed=1))
    assert group["n"] == 2 and group["mean"] == pytest.approx(0.8)


def test_a_fine_tuned_network_belongs_to_the_run_it_began_with(tmp_path, summarise):
    folders = []
    for name, method in (("x", "simclr"), ("y", "byol")):
        for seed in (0, 1):
            pretrained = tmp_path / f"{name}_{seed}"
            write(pretrained, 0.1, seed=seed, run={**RUN, "method": method})
            run = {"epochs": 3, "checkpoint": str(pretrained)}
            tuned = tmp_path / f"{name}_{seed}_tuned"
            tuned.mkdir()
            (tuned / "config.yaml").write_text(yaml.safe_dump(run))
            weights = tuned / "finetuned.safetensors"
            folders.append(write_result(tuned, weights, 0.5 + seed / 10, "snn"))
    assert [group["n"] for group in summarise(*folders)] == [2, 2]


def test_a_groups_name_is_what_its_paths_have_in_common():
    assert common_name(["r/a_seed0/x", "r/a_seed1/x", "r/a_seed12/x"]) == "r/a_seed*/x"
    assert common_name(["r/a", "r/a"]) == "r/a"


def test_a_metric_is_taken_by_its_name(tmp_path, summarise):
    (group,) = summarise(write(tmp_path / "a", 0.1), metric="backbone.top5")
    assert group["mean"] == 0.9 and group["metric"] == "backbone.top5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint: got none"),
        (["--checkpoint", "/nope"], "/nope: no results.jsonl"),
        (["--metric=x"], "metric: got 'x', but no result has it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, message, capsys):
    given = ["--checkpoint", write(tmp_path / "a", 0.1)] if "metric" in message else []
    assert evaluate.main(["seeds", *given, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
