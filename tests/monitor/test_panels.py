"""Every key has a panel, the known ones the right panel, under short labels."""

import pytest
from support.metric_runs import evaluation_record, training_record

from ffcv_ssl.monitor.panels import MAX_OTHER_PANELS, PANELS, arrange
from ffcv_ssl.training.metrics_log import MEASURED, X_AXES


def placed(*keys):
    """{key: (panel, label)}."""
    return {
        one["key"]: (panel["id"], one["label"]) for panel in arrange(keys) for one in panel["keys"]
    }


@pytest.mark.parametrize(
    "key, panel, label",
    [
        ("val/backbone/top1", "probes", "backbone"),
        ("val/layer3/top1", "probes", "layer3"),
        ("val/top1", "probes", "network"),
        ("val/knn/top1", "knn", "top1"),
        ("val/projector_2/top5", "probes_top5", "projector_2"),
        ("train/projector_2/top1", "train_probes", "projector_2"),
        ("train/loss", "loss", "loss"),
        ("train/loss/on_diagonal", "loss", "on_diagonal"),
        ("lr", "lr", ""),
        ("resolution", "resolution", ""),
        ("train/images_per_s", "speed", ""),
        ("train/data_wait", "waits", "data"),
        ("train/rank_wait", "waits", "rank"),
        ("train/peak_memory_mib", "memory", ""),
        ("health/backbone/std", "spread", "backbone"),
        ("health/projector_2/effective_rank", "rank", "projector_2 effective_rank"),
        ("health/backbone/rankme", "rank", "backbone rankme"),
        ("health/alignment", "sphere", "alignment"),
        ("health/uniformity", "sphere", "uniformity"),
        ("mine/a/b", "other/mine/a", "b"),
        ("mine", "other/mine", "mine"),
    ],
)
def test_a_key_stands_in_its_panel(key, panel, label):
    assert placed(key)[key] == (panel, label)


def test_all_that_training_measures_has_a_panel_of_ours():
    keys = {*MEASURED, *training_record(1), *evaluation_record(0)} - set(X_AXES)
    assert {panel for panel, _ in placed(*keys).values()} == {panel.ident for panel in PANELS}


def test_the_most_important_key_comes_first_and_numbers_count():
    keys = [f"val/{depth}/top1" for depth in ("layer10", "projector_1", "layer2", "backbone")]
    (panel,) = arrange(keys)
    assert [one["label"] for one in panel["keys"]] == [
        "backbone",
        "layer2",
        "layer10",
        "projector_1",
    ]
    (panel,) = arrange(["train/loss/a", "train/loss"])
    assert panel["keys"][0]["key"] == "train/loss"


def test_panels_of_foreign_keys_are_bounded():
    assert len(arrange(f"{number}/a" for number in range(999))) == MAX_OTHER_PANELS
