"""A checkpoint that is read is mapped from its file; what happens to the file changes nothing."""

from pathlib import Path

import pytest
import torch

from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.training import checkpoint


def mapped_files():
    return Path("/proc/self/maps").read_text()


def test_a_checkpoint_is_mapped_and_stays_what_it_was_when_the_next_replaces_it(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weights": torch.arange(1000.0), "step": 1})
    loaded = checkpoint.load(path)
    assert str(path) in mapped_files()
    checkpoint.save(path, {"weights": torch.zeros(1000), "step": 2})
    assert torch.equal(loaded["weights"], torch.arange(1000.0))
    assert torch.equal(checkpoint.load(path)["weights"], torch.zeros(1000))
    del loaded
    assert f"{path} (deleted)" not in mapped_files()


def test_weights_changed_in_place_do_not_change_the_file(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weights": torch.arange(10.0)})
    before = path.read_bytes()
    checkpoint.load(path)["weights"].mul_(7)
    assert path.read_bytes() == before


def test_a_file_of_before_torch_1_6_is_read_too(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"weights": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.load(path)["weights"], torch.ones(3))


@pytest.mark.parametrize("text", [b"", b"PK", b"PK\x03\x04", b"PK\x03\x04" + bytes(999)])
def test_a_file_that_only_begins_like_a_checkpoint_is_one_line(tmp_path, text):
    (tmp_path / "c.pt").write_bytes(text)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "c.pt")
