"""Curves over checkpoints and the compute to reach a value, on numbers known beforehand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small_files import write_small

import evaluate
from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import protocol_calls
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.evaluation.studies import curve
from ffcv_ssl.training.metrics_log import MetricsLog
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World

pytestmark = pytest.mark.whole  # whole commands on runs of their own

MODEL = {"backbone": "resnet18", "stem": "cifar", "projector": "", "projector_norm": "hidden"}


def points(*values, per_epoch=10):
    """A point after each of epochs 0, 1, ...; FLOPs and the like grow by `per_epoch`."""
    return [
        {"epoch": epoch, "step": epoch, "value": value, "checkpoint": str(epoch)}
        | dict.fromkeys(curve.AXES[1:], per_epoch * epoch)
        for epoch, value in enumerate(values)
    ]


def measure(*paths, **settings):
    config = curve.CurveConfig(checkpoint=[str(path) for path in paths], **settings)
    return curve.run(config, World.join("cpu", 1), None)


def write_run(folder, values, per_epoch=10, **data):
    """A run's folder with an evaluation after each epoch, and with `data` a checkpoint that says
    what it is of: val, val_content, label_field."""
    folder.mkdir()
    if data:
        state = {"datasets": {"val": data.pop("val_content")}, "config": {"data": data}}
        torch.save(state, folder / "checkpoint.pt")
    log = MetricsLog(folder, tensorboard=False)
    for point in points(*values, per_epoch=per_epoch):
        known = {axis: point[axis] for axis in curve.AXES[:-1]}
        log.write({**known, "step": point["step"], "seconds": 3600 * point["hours"],
                   "val/knn/top5": 0.9, "val/knn/top1": point["value"]})  # fmt: skip
        log.write({**known, "step": point["step"], "train/loss": 1.0})
    log.close()
    return folder


def test_a_value_between_two_points_is_reached_in_proportion():
    run = points(0.1, 0.2, 0.6)
    assert curve.first_crossing(run, "flops", 0.3) == pytest.approx(10 + 10 * 0.1 / 0.4)
    assert curve.first_crossing(run, "epoch", 0.15) == pytest.approx(0.5)


def test_a_value_counts_where_it_is_first_reached_and_exactly_at_a_point():
    run = points(0.1, 0.5, 0.2, 0.5, 0.7)
    assert curve.first_crossing(run, "epoch", 0.5) == 1
    assert curve.first_crossing(run, "epoch", 0.05) == 0


def test_a_value_above_all_points_and_an_axis_that_is_not_known_are_never_reached():
    run = points(0.1, 0.5)
    assert curve.first_crossing(run, "epoch", 0.51) is None
    assert curve.first_crossing([{"value": 0.9, "epoch": 1}], "flops", 0.5) is None


def test_savings_are_shares_of_what_the_first_run_needs_for_its_best():
    runs = {"a": points(0.1, 0.5, 0.6, 0.55), "b": points(0.2, 0.7, per_epoch=8)}
    target, savings = curve.compare(runs)
    assert target == 0.6
    assert savings["a"]["flops"] == {"cost": 20, "share": 1}
    assert savings["b"]["flops"]["cost"] == pytest.approx(6.4)  # 8 x (0.6 - 0.2) / (0.7 - 0.2)
    assert savings["b"]["flops"]["share"] == pytest.approx(0.32)
    assert savings["b"]["epoch"]["share"] == pytest.approx(0.4)


def test_a_run_that_never_gets_there_has_no_share():
    _, savings = curve.compare({"a": points(0.1, 0.6), "b": points(0.1, 0.5)})
    assert savings["b"]["flops"] == {"cost": None, "share": None}
    _, savings = curve.compare({"a": points(0.1, 0.4), "b": points(0.1, 0.5)}, reach=0.45)
    assert savings["b"]["flops"]["cost"] == pytest.approx(8.75)
    assert savings["b"]["flops"]["share"] is None


def test_recorded_evaluations_become_a_table_a_picture_and_savings(tmp_path):
    slow = write_run(tmp_path / "slow", [0.1, 0.3, 0.5])
    fast = write_run(tmp_path / "fast", [0.1, 0.5, 0.6])
    result = measure(slow, fast, protocol="online")
    assert result["metric"] == "knn.top1" and result["reach"] == 0.5
    assert [point["value"] for point in result["runs"]["fast"]] == [0.1, 0.5, 0.6]
    assert result["savings"]["fast"]["hours"] == {"cost": 10, "share": 0.5}
    assert result["selected_on"] == "val"
    other = {"protocol": "online", "out": str(tmp_path / "other")}
    assert measure(slow, fast, reach=0.3, **other)["selected_on"] is None
    assert measure(slow, **other)["selected_on"] is None
    table = (slow / "curve_online_knn.top1.md").read_text()
    assert "| fast | 1 (50%) | 10 (50%) |" in table and "| slow | 2 | 20 | 20 | 20 | 20 |" in table
    assert (slow / "curve_online_knn.top1.png").read_bytes()[:4] == b"\x89PNG"
    assert json.dumps(result)


def test_runs_that_recorded_on_other_validation_data_are_refused_by_name(tmp_path, capsys):
    data = {"val": "a/val.beton", "val_content": "1f (9 samples)", "label_field": "label"}
    first = write_run(tmp_path / "first", [0.1, 0.3], **data)
    same = write_run(tmp_path / "same", [0.1, 0.3], **{**data, "val": "b/val.beton"})
    assert measure(first, same, protocol="online")["data"]["first"] == data
    other = write_run(tmp_path / "other", [0.1, 0.3], **{**data, "val_content": "2e (9 samples)"})
    field = write_run(tmp_path / "field", [0.1, 0.3], **{**data, "label_field": "count"})
    capsys.readouterr()
    for run, shown in ((other, "'label', 2e (9 samples)"), (field, "'count', 1f (9 samples)")):
        assert evaluate.main(["curve", "--protocol=online", "--checkpoint", str(first), str(run)])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run.name}: measured on a/val.beton, field {shown}, but first on" in line
        assert "on a/val.beton, field 'label', 1f (9 samples); choose another --protocol" in line


def test_a_run_that_does_not_say_its_validation_data_is_taken_and_named(tmp_path, capsys):
    data = {"val": "val.beton", "val_content": "1f", "label_field": "label"}
    known = write_run(tmp_path / "known", [0.1, 0.3], **data)
    bare = write_run(tmp_path / "bare", [0.1, 0.3])
    result = measure(known, bare, protocol="online")
    assert result["data"]["bare"] is None and result["savings"]["bare"]["epoch"]["share"] == 1
    assert capsys.readouterr().err.startswith("bare: does not name the validation file")
    measure(bare, protocol="online")
    assert capsys.readouterr().err == ""


def test_another_metric_is_taken_by_its_name(tmp_path):
    run = write_run(tmp_path / "run", [0.1, 0.3])
    assert measure(run, protocol="online", metric="knn.top5")["runs"]["run"][0]["value"] == 0.9
    with pytest.raises(UserError, match=r"metric: got 'x', expected one of knn\.top5, knn\.top1"):
        measure(run, protocol="online", metric="x")


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run", [0.1])
    paths = [tmp_path / "x/run", tmp_path / "y/run"]
    assert list(measure(*paths, protocol="online")["runs"]) == [str(path) for path in paths]


def test_a_folder_stands_for_its_kept_copies_in_order_each_measured_with_the_settings(
    checkpoint, tmp_path, monkeypatch
):
    for name in ("checkpoint_epoch_0010.pt", "checkpoint_epoch_0002.pt"):
        shutil.copy(checkpoint / "checkpoint.pt", tmp_path / name)
    asked = []

    def call(protocol, config, world, stop):
        asked.append((protocol, config.ks, config.checkpoint))
        about = {"step": len(asked), "epoch": len(asked), "seconds": 1800}
        return {"about": about, "metrics": {"backbone": {"top1": len(asked) / 10, "k5": {}}}}

    monkeypatch.setattr(protocol_calls, "call_protocol", call)
    result = measure(tmp_path, protocol="knn", settings={"ks": [5]})
    copies = [str(tmp_path / f"checkpoint_epoch_{epoch:04}.pt") for epoch in (2, 10)]
    assert asked == [("knn", [5], copy) for copy in copies]
    ((_, (first, second)),) = result["runs"].items()
    assert (first["value"], second["hours"]) == (0.1, 0.5) and "flops" not in first


@pytest.fixture
def checkpoint(tmp_path, raw_beton):
    """An untrained checkpoint of a run on `raw_beton`."""
    torch.manual_seed(0)
    config = {"model": MODEL, "resolution": {"max": 8}}
    config["data"] = {"train": raw_beton, "val": raw_beton}
    state = Model(ModelConfig(**MODEL)).state_dict()
    torch.save({"config": config, "model": state, "step": 0}, tmp_path / "checkpoint.pt")
    return tmp_path


def test_a_bad_checkpoint_is_found_before_the_first_is_measured(checkpoint, capsys):
    shutil.copy(checkpoint / "checkpoint.pt", checkpoint / "checkpoint_epoch_0001.pt")
    (checkpoint / "checkpoint_epoch_0002.pt").write_bytes(b"half of it")
    assert evaluate.main(["curve", f"--checkpoint={checkpoint}", "--protocol=knn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint_epoch_0002.pt: not a readable checkpoint" in line
    assert read_results(checkpoint) == []


def measured(checkpoint, k=5, **settings):
    """The record of k-NN, and how many are now in the checkpoint's folder."""
    settings = {"ks": [k], "data": {"num_workers": 1}, **settings}
    config = protocol_calls.protocol_config("knn", settings, checkpoint=str(checkpoint))
    record = protocol_calls.call_protocol("knn", config, World.join("cpu", 1), None)
    return record, len(read_results(checkpoint))


def test_runs_that_would_be_measured_on_other_data_are_refused_before_any_is(
    checkpoint, raw_beton, tmp_path, capsys
):
    runs = []
    for name, count in (("a", 20), ("b", 30)):
        val = tmp_path / f"{name}.beton"
        write_small(str(val), count, (16, 16), mode="raw")
        state = torch.load(checkpoint / "checkpoint.pt")
        state["config"]["data"]["val"] = str(val)
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "checkpoint.pt")
        runs.append(tmp_path / name)
    words = ["curve", "--checkpoint", *map(str, runs), "--settings.ks=1"]
    words += ["--settings.data.num_workers=1", "--system.torch_threads=1"]
    assert evaluate.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"b: measured on {tmp_path}/b.beton") and "a.beton" in line
    assert "(30 samples), but a on" in line and "give one with --settings.data.val" in line
    assert read_results(runs[0]) == []
    assert evaluate.main([*words, f"--settings.data.val={raw_beton}"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert data["a"] == data["b"] and data["a"]["val"] == raw_beton


def test_what_is_on_record_is_not_measured_again_but_other_settings_are(checkpoint):
    for k, lines in ((5, 1), (5, 1), (7, 2)):
        record, count = measured(checkpoint, k)
        assert record["settings"]["ks"] == [k] and count == lines


def test_what_is_on_record_beside_the_checkpoint_counts_with_out_too(checkpoint, tmp_path):
    record, out = measured(checkpoint)[0], tmp_path / "out"
    assert measured(checkpoint, out=str(out)) == (record, 1) and read_results(out) == []
    assert measured(checkpoint, 7, out=str(out))[1] == 1 and len(read_results(out)) == 1
    assert measured(checkpoint, 7, out=str(out))[0] == read_results(out)[0]


def test_with_out_probes_report_there_and_fine_tunings_have_a_folder_each_there(tmp_path):
    for name in ("x/run/checkpoint_epoch_0001.pt", "x/run/checkpoint_epoch_0002.pt", "y/run/a.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = [str(tmp_path / "x/run"), str(tmp_path / "y/run/a.pt")]
    for protocol in ("knn", "finetune"):
        config = curve.CurveConfig(checkpoint=paths, protocol=protocol, out="out")
        outs = [call.out for call in curve.calls_of(config)]
        if protocol == "knn":
            assert outs == ["out"] * 3
        else:
            assert len(set(outs)) == 3 and outs[1].endswith("x_run_checkpoint_epoch_0002")
            assert all(Path(out).parent == Path("out") for out in outs)
    assert [call.out for call in curve.calls_of(replace(config, out=None))] == [None] * 3


def test_other_weights_in_the_same_file_are_measured_again(checkpoint):
    (first, _), path = measured(checkpoint), checkpoint / "checkpoint.pt"
    state = torch.load(path)
    for key, value in state["model"].items():
        if key.endswith("conv1.weight"):
            torch.nn.init.normal_(value)
    torch.save(state, path)
    second, count = measured(checkpoint)
    assert count == 2 and second["weights"] != first["weights"]
    pictures = [record["metrics"]["backbone"]["confusion"] for record in (first, second)]
    assert pictures[0] != pictures[1]
    assert measured(checkpoint) == (second, 2)


def test_other_labels_in_the_same_list_are_measured_again(checkpoint, tmp_path):
    chosen, labels = (
        tmp_path / "labels.txt",
        {"scheme": "file", "file": str(tmp_path / "labels.txt")},
    )
    records = []
    for first in (0, 70):  # as many of each class
        chosen.write_text("\n".join(map(str, range(first, first + 14))))
        for _ in range(2):
            record, count = measured(checkpoint, labels=labels)
        records.append(record)
        assert count == len(records)
    assert records[0]["data"]["labels"] == records[1]["data"]["labels"]


def test_other_images_under_the_same_path_are_measured_again(checkpoint, raw_beton, tmp_path):
    data = {"num_workers": 1, "train": str(tmp_path / "a.beton"), "val": raw_beton}
    for count in (1, 2):
        write_small(data["train"], 20 * count, (16, 16), mode="raw")
        for _ in range(2):
            assert measured(checkpoint, data=data)[1] == count


def test_a_record_that_does_not_say_its_weights_and_labels_is_not_used(checkpoint):
    measured(checkpoint)
    path = checkpoint / "results.jsonl"
    (record,) = read_results(checkpoint)
    for keys in (["weights"], ["data", "labels_digest"], ["settings"]):
        old = json.loads(json.dumps(record))
        *outer, key = keys
        del (old[outer[0]] if outer else old)[key]
        path.write_text(json.dumps(old) + "\n")
        assert measured(checkpoint)[1] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint: got none"),
        (["--checkpoint=x", "--settings.kk=5"], "settings of knn: unknown key 'kk'"),
        (
            ["--checkpoint=x", "--settings.checkpoint=5"],
            "settings.checkpoint: got it here, expected it as --checkpoint",
        ),
        (
            ["--checkpoint=x", "--protocol=nope"],
            "protocol: got 'nope', expected one of online, finetune, knn",
        ),
        (["--checkpoint=/nope", "--protocol=online"], "no file or folder '/nope'"),
        (["--checkpoint=/", "--protocol=online"], "/: no evaluations in its metrics"),
        (["--checkpoint=/", "--out=/proc/nope"], "/proc/nope: cannot hold results"),
        (["--checkpoint=/nope"], "no file or folder"),
        (["--checkpoint=x", "--protocol=online", "--settings.k=5"], "protocol online has none"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert evaluate.main(["curve", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_mistyped_run_is_not_taken_for_the_folder_around_it(tmp_path, capsys):
    run = write_run(tmp_path / "run", [0.1, 0.3])
    assert evaluate.main(["curve", f"--checkpoint={run}/typo", "--protocol=online"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint: no file or folder '{run}/typo'")


@pytest.mark.parametrize("protocol", ["suite", "curve", "seeds", "export"])
def test_several_ranks_are_refused_where_one_process_writes(protocol):
    config_class, run = evaluate.COMMANDS[protocol][:2]
    with pytest.raises(UserError, match=f"{protocol}: got 2 ranks, expected one"):
        run(config_class(), SimpleNamespace(size=2), None)
