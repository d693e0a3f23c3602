"""What sources of images refuse, and the line that says so."""

import json

import pytest

from ffcv_ssl.errors import SourceError
from ffcv_ssl.sources import base, clevr, disk, torchvision_datasets
from ffcv_ssl.sources.shapes import Shapes


class Numbers(list):
    """A dataset of (image, class)."""


SOURCE = base.Source(Numbers([0, 1]), {}, {}, {}, None)


def test_an_index_that_the_source_lacks_is_refused():
    with pytest.raises(
        SourceError, match=r"list.txt: got index 2, expected 0 to 1, the samples of the source"
    ):
        base._subset(SOURCE, ["0\n", "2\n"], "list.txt")


def test_shapes_refuse_an_index_past_their_end():
    with pytest.raises(IndexError, match="shapes: got index 3, expected 0 to 2"):
        Shapes(num_samples=3)[3]


def test_clevr_names_the_file_that_it_misses(tmp_path):
    with pytest.raises(
        SourceError,
        match=r"--root: .*scenes.json: No such file or directory; expected "
        "CLEVR_v1.0 with the folders images and scenes",
    ):
        clevr.open_clevr(tmp_path, "train")
    (tmp_path / "scenes").mkdir()
    scenes = tmp_path / "scenes/CLEVR_train_scenes.json"
    scenes.write_text(json.dumps({"scenes": [{}]}))
    with pytest.raises(
        SourceError, match=r"got no scenes of CLEVR \(KeyError\('image_filename'\)\); fetch it anew"
    ):
        clevr.open_clevr(tmp_path, "train")


class Plain:
    """A torchvision dataset with a flag for the training part."""

    def __init__(self, root, train=True, download=False):
        raise RuntimeError("Dataset not found. You can use download=True to download it")


def test_a_torchvision_dataset_refuses_what_it_cannot_give():
    with pytest.raises(
        SourceError, match=r"--split: got 'x', expected train or test \(.*\) for plain"
    ):
        torchvision_datasets._make("plain", Plain, "r", "x", False)
    with pytest.raises(
        SourceError, match=r"plain: Dataset not found.*; add --download to fetch it"
    ):
        torchvision_datasets._make("plain", Plain, "r", "train", False)
    with pytest.raises(SourceError, match="plain: got no samples, expected at least 1"):
        torchvision_datasets._check_sample("plain", [])
    with pytest.raises(
        SourceError, match=r"plain: expected a dataset of \(image, class label\), got another kind"
    ):
        torchvision_datasets._check_sample("plain", [(1, "x")])


def test_folders_that_links_lead_to_again_are_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/up").symlink_to("..")
    with pytest.raises(
        SourceError,
        match=r"cat/up: leads by a link to the folder .* again, so that its images would "
        "count several times; remove the link",
    ):
        disk.find_files(tmp_path, lambda name: True)


def test_a_file_that_grows_past_the_limit_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"xx")
    read = disk._read

    def grow(file, *limits):
        path.write_bytes(bytes(9))
        return read(file, *limits)

    monkeypatch.setattr(disk, "_read", grow)
    with pytest.raises(
        SourceError, match=r"a.jpg: got more than 4 bytes, expected at most that many"
    ):
        disk.read_file(path, max_bytes=4)
