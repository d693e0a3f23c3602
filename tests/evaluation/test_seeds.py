"""Means and spreads over seeds: what belongs together, and the numbers."""

import json

import numpy as np
import pytest
import yaml

import evaluate
from ffcv_ssl.evaluation import results
from ffcv_ssl.evaluation.results import report
from ffcv_ssl.evaluation.studies.seeds import common_name

RUN = {"method": "simclr", "seed": 0, "out": "x", "data": {"train": "t", "batch_size": 64}}


def write(folder, top1, seed=0, protocol="knn", run=RUN, step=100, **settings):
    """A run's folder with its configuration and one result."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**run, "seed": seed, "out": str(folder)}))
    return write_result(folder, folder, top1, protocol, step, seed=seed, **settings)


def write_result(folder, checkpoint, top1, protocol="knn", step=100, weights=None, **settings):
    record = {
        "protocol": protocol, "checkpoint": str(checkpoint), "name": "n", "about": {"step": step},
        "weights": weights,
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


def test_each_setting_of_neighbours_is_one_group(tmp_path, summarise):
    folder = tmp_path / "run"
    write(folder, 0.1, protocol="linear")
    for k in ([5], [5, 1]):
        named = {f"k{each}": {"top1": each / 10, "top5": 0.9} for each in k}
        record = {"protocol": "knn", "settings": {"ks": k}, "checkpoint": str(folder)}
        report({**record, "metrics": {"backbone": {"top1": 0.5, **named}}}, folder)
    groups = summarise(str(folder))
    assert [(group["metric"], group["mean"]) for group in groups] == [
        ("backbone.top1", 0.1), ("backbone.top1", 0.5),
        ("backbone.k5.top1", 0.5), ("backbone.k1.top1", 0.1),
    ]  # fmt: skip
    (group,) = summarise(str(folder), metric="backbone.k1.top1")
    assert group["mean"] == 0.1


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


def test_groups_are_told_apart_by_the_settings_in_which_those_of_a_protocol_differ(
    tmp_path, summarise
):
    for seed in (0, 1):
        for fraction in (None, 0.1):
            labels = {"fraction": fraction, "scheme": "bernoulli"}
            write(tmp_path / f"a_{seed}", 0.1, seed=seed, labels=labels, k=[20])
    write(tmp_path / "a_0", 0.1, protocol="linear", epochs=9)
    folders = [str(tmp_path / f"a_{seed}") for seed in (0, 1)]
    groups = summarise(*folders, out=tmp_path)
    assert [(group["protocol"], group["n"], group["settings"]) for group in groups] == [
        ("knn", 2, {"labels.fraction": None}), ("knn", 2, {"labels.fraction": 0.1}),
        ("linear", 1, {}),
    ]  # fmt: skip
    head, _, *rows = (tmp_path / "seeds.md").read_text().splitlines()
    assert head.startswith("| checkpoint | protocol | data | metric | settings | n | mean +- sd")
    cells = [row.split(" | ")[4] for row in rows]
    assert cells == ["labels.fraction=null", "labels.fraction=0.1", ""]
    assert all(row.count("|") == head.count("|") for row in rows)
    labels = {"fraction": None, "scheme": "bernoulli"}
    folders.append(write(tmp_path / "b_0", 0.1, labels=labels, k=[5]))
    found = [g["settings"] for g in summarise(*folders) if g["protocol"] == "knn"]
    assert found[0] == {"ks": "[20]", "labels.fraction": None}
    assert found[-1] == {"ks": "[5]", "labels.fraction": None}


def test_rows_that_look_the_same_are_told_apart_by_their_runs(tmp_path, summarise):
    folders = [
        write(tmp_path / f"x_{n}", 0.1, seed=n, run={**RUN, "method": method}, step=step)
        for n, (method, step) in enumerate((("simclr", 9), ("simclr", 9), ("byol", 8), ("byol", 8)))
    ]
    found = [group["settings"] for group in summarise(*folders)]
    assert found == [{"step": 9, "run.method": "simclr"}, {"step": 8, "run.method": "byol"}]
    other = write(tmp_path / "y", 0.1, run={**RUN, "method": "byol"})
    named = [group["settings"] for group in summarise(folders[0], other)]
    assert named == [{}, {}]  # their paths tell them


def test_files_of_one_name_with_other_content_are_told_apart(tmp_path, summarise):
    folders = [write(tmp_path / name, 0.1) for name in "ab"]
    path = tmp_path / "b" / "results.jsonl"
    (record,) = results.read_results(tmp_path / "b")
    path.write_text(json.dumps(record).replace('"1f"', '"2e"') + "\n")
    found = [group["settings"] for group in summarise(*folders)]
    assert found == [{"val_content": "1f"}, {"val_content": "2e"}]


def test_seeds_of_labels_are_seeds_too_and_paths_make_no_difference(tmp_path, summarise):
    folders = [
        write(tmp_path / f"a_{s}", 0.1 * s, labels={"seed": s}, data={"train": f"/{s}"})
        for s in (1, 2)
    ]
    assert [group["n"] for group in summarise(*folders)] == [2]


def test_a_field_that_is_named_and_the_same_one_that_is_not_are_no_difference(tmp_path, summarise):
    folders = [
        write(tmp_path / f"a_{s}", 0.1, seed=s, data={"label_field": name, "image_field": name})
        for s, name in enumerate((None, "x"))
    ]
    assert [group["n"] for group in summarise(*folders)] == [2]


def test_the_newest_of_one_seed_counts(tmp_path, summarise):
    folder = write(tmp_path / "a_0", 0.1)
    write(tmp_path / "a_0", 0.7)
    (group,) = summarise(folder, write(tmp_path / "a_1", 0.9, seed=1))
    assert group["n"] == 2 and group["mean"] == pytest.approx(0.8)


def rewrite_times(folder, *times):
    """Give the results in a folder other times, in order."""
    path = folder / "results.jsonl"
    records = [record | {"time": t} for record, t in zip(results.read_results(folder), times)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_newest_is_the_one_of_the_latest_time(tmp_path, summarise):
    write(tmp_path / "a", 0.1)
    folder = write(tmp_path / "a", 0.7)
    for times, expected in ((("2026-02", "2026-01"), 0.1), (("2026-01", "2026-01"), 0.7)):
        rewrite_times(tmp_path / "a", *times)
        assert [group["mean"] for group in summarise(folder, f"{folder}/.")] == [expected]


def test_runs_of_equal_seeds_in_different_folders_are_refused_by_name(tmp_path, capsys):
    folders = [write(tmp_path / f"chain_{n}", n / 10, seed=min(n, 1)) for n in range(3)]
    assert evaluate.main(["seeds", "--checkpoint", *folders]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folders[1]}, {folders[2]}: knn on val has equal seeds")


def test_in_one_folder_other_files_of_other_weights_are_other_runs(tmp_path, capsys, summarise):
    folder = tmp_path / "out"
    for name, weights in (("a", "1f"), ("b", "1f"), ("b", "2e"), ("c", "3d")):
        write(tmp_path / name, 0.1)
        write_result(folder, tmp_path / name, 0.2, weights=weights, seed=0)
        if name != "c":  # the same weights under another path, and a run that was made anew
            (group,) = summarise(str(folder))
            assert group["n"] == 1
    assert evaluate.main(["seeds", "--checkpoint", str(folder)]) == 2
    assert f"{tmp_path}/b, {tmp_path}/c: knn on val has equal" in capsys.readouterr().err


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
        (["--out=/proc/nope"], "/proc/nope: cannot hold results"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, message, capsys):
    given = (
        ["--checkpoint", write(tmp_path / "a", 0.1)]
        if "--checkpoint" not in words[:1] and words
        else []
    )
    assert evaluate.main(["seeds", *given, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
