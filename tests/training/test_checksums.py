"""Wrong bits in files of weights: found before their values are used."""

import errno
import io
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.states import equal_states
from torch import nn

from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.checksums import DIGEST, archive_damage, weights_damage

STATE = {
    "model": {"weight": torch.arange(12.0).view(3, 4), "steps": torch.arange(3)},
    "config": {"optim": {"lr": 0.1}, "name": "a"},
    "step": 7,
    "empty": torch.zeros(0),
}


def flipped(content, position, bit):
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def test_a_checkpoint_with_a_wrong_bit_is_refused_or_loads_equal(tmp_path):
    path, chance = tmp_path / "checkpoint.pt", random.Random(0)
    checkpoint.save(path, STATE)
    content, refused = path.read_bytes(), 0
    for _ in range(120):
        position, bit = chance.randrange(len(content)), chance.randrange(8)
        path.write_bytes(flipped(content, position, bit))
        try:
            assert equal_states(checkpoint.load(path), STATE), (position, bit)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: not a readable checkpoint (")
            assert "\n" not in str(error)
            refused += 1
    assert 40 < refused < 120  # the archive's padding holds nothing


def test_a_wrong_bit_in_any_tensor_is_refused_with_the_part_that_has_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    position = content.index(STATE["model"]["weight"].numpy().tobytes())
    path.write_bytes(flipped(content, position + 7, 6))
    with pytest.raises(CheckpointError, match=r"it is damaged: '.*data/\d' fails its checksum"):
        checkpoint.load(path)


def test_a_damaged_checkpoint_is_told_with_the_newest_whole_one_to_go_back_to(tmp_path):
    path = tmp_path / "checkpoint.pt"
    names = ["checkpoint_epoch_0002.pt", "checkpoint_epoch_0004.pt", "checkpoint_previous.pt"]
    for age, name in enumerate(names):
        checkpoint.save(tmp_path / name, STATE)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    content = (tmp_path / names[0]).read_bytes()
    damaged = flipped(content, content.index(b"\x00\x00\x80?"), 0)
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"; {names[2]} is whole: delete checkpoint.pt and"):
        checkpoint.load(path)
    (tmp_path / names[2]).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"; {names[1]} is whole: delete checkpoint.pt and"):
        checkpoint.load(path)
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="restore a kept copy, or delete it"):
        checkpoint.load(path)


def test_the_former_checkpoint_stays_until_the_new_one_is_read_back_whole(tmp_path, monkeypatch):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / checkpoint.PREVIOUS
    checkpoint.save(path, {"step": 1}, previous)
    assert not previous.exists()
    checkpoint.save(path, {"step": 2}, previous)
    assert (checkpoint.load(path), checkpoint.load(previous)) == ({"step": 2}, {"step": 1})

    def rots(new):  # between the flush and the read
        content = new.read_bytes()
        new.write_bytes(flipped(content, content.index(b"step"), 1))

    monkeypatch.setattr(checkpoint, "drop_from_memory", rots)
    said = r"cannot be read back .*; the file before it is kept"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.save(path, {"step": 3}, previous)
    assert (checkpoint.load(path), checkpoint.load(previous)) == ({"step": 2}, {"step": 1})
    assert sorted(tmp_path.iterdir()) == [path, previous]


def test_the_former_checkpoint_is_replaced_after_the_checkpoint(tmp_path, monkeypatch):
    # were it before, a kill between them would leave two names of one file, which may be rotten
    path, previous = tmp_path / "checkpoint.pt", tmp_path / checkpoint.PREVIOUS
    replaced, replace = [], os.replace

    def recorded(source, target):
        replaced.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    for step in (1, 2, 3):
        checkpoint.save(path, {"step": step}, previous)
    assert replaced == [path, path, previous, path, previous]
    assert checkpoint.load(previous) == {"step": 2}


def test_a_kept_copy_is_made_again_where_a_user_wrote_over_it(tmp_path):
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_epoch_0001.pt"
    checkpoint.save(path, {"step": 1})
    former = path.read_bytes()
    checkpoint.save(path, {"step": 2})
    checkpoint.keep_copy(path, kept)
    path.write_bytes(former)  # as cp does: into the same file
    assert checkpoint.load(kept) == {"step": 1}
    checkpoint.save(path, {"step": 2})
    checkpoint.keep_copy(path, kept)
    assert checkpoint.load(kept) == {"step": 2}


def test_the_way_back_is_to_delete_first_what_kept_copies_are_too(tmp_path):
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_epoch_0001.pt"
    checkpoint.save(path, STATE)
    os.mkfifo(tmp_path / "checkpoint_pipe.pt")  # no file to look into
    assert checkpoint.way_back(path) is None
    checkpoint.keep_copy(path, kept)
    said = f"{kept.name} is whole: delete checkpoint.pt and copy it to checkpoint.pt to go on from"
    assert checkpoint.way_back(path).startswith(said)
    path.unlink()
    assert checkpoint.way_back(path).startswith(f"{kept.name} is whole: copy it to checkpoint.pt")


def test_an_archive_that_unpacks_to_far_more_than_it_is_holds_no_weights(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(200 << 20))
    with pytest.raises(CheckpointError, match="it is damaged: unpacked it would have 209715200 b"):
        checkpoint.load(path)


def test_a_copy_that_does_not_fit_leaves_nothing_where_there_are_no_links(tmp_path, monkeypatch):
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "kept.pt"
    checkpoint.save(path, STATE)

    def refuse(*names):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fill(source, copy):
        copy.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr("shutil.copyfileobj", fill)
        checkpoint.keep_copy(path, kept)
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.keep_copy(path, kept)
    assert equal_states(checkpoint.load(kept), STATE)


def test_archives_of_other_programs_load_without_checksums_or_compressed(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert equal_states(checkpoint.load(path), STATE)
    torch.save(STATE, path)
    repacked = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(repacked, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    path.write_bytes(repacked.getvalue())
    assert equal_states(checkpoint.load(path), STATE)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert archive_damage(path) is None and equal_states(checkpoint.load(path), STATE)


def test_a_full_disk_is_told_in_the_words_of_the_system(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})
    resource = pytest.importorskip("resource")
    import signal

    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value) == (
        f"{path}: cannot be written ({os.strerror(errno.EFBIG)}); raise the limit on the size of "
        "files (ulimit -f) and start again, the checkpoint before it is kept"
    )
    assert checkpoint.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


ABOUT = {"model": "tiny", "stem": "imagenet", "about": json.dumps({"a": 1}), "é": "ü"}


def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_equal_weights_give_equal_files_in_any_order_of_metadata(tmp_path):
    contents = set()
    for number in range(10):  # safetensors alone: as many orders as calls
        names = list(ABOUT)
        random.Random(number).shuffle(names)
        checkpoint.save_weights(tmp_path / "a", layer(), {name: ABOUT[name] for name in names})
        contents.add((tmp_path / "a").read_bytes())
    assert len(contents) == 1
    loaded = load_file(tmp_path / "a")
    assert equal_states(loaded, dict(layer().state_dict()))
    assert weights_damage(tmp_path / "a") is None


def test_weights_with_any_wrong_bit_are_found_or_load_equal(tmp_path):
    path, chance = tmp_path / "a.safetensors", random.Random(0)
    checkpoint.save_weights(path, layer(), ABOUT)
    content, expected, found = path.read_bytes(), dict(layer().state_dict()), 0
    for position in range(0, len(content), 3):
        path.write_bytes(flipped(content, position, chance.randrange(8)))
        if weights_damage(path) is not None:
            found += 1
            continue
        try:
            assert equal_states(load_file(path), expected), position
        except Exception as error:  # its class is another one in each version
            assert "afetensor" in type(error).__name__ or isinstance(error, ValueError), position
    assert found > len(content) / 6


@pytest.mark.parametrize("position", [0, 6])
def test_weights_whose_digest_lost_its_name_are_damaged_too(tmp_path, position):
    """Else a second wrong bit, in the weights, would go unseen."""
    path = tmp_path / "a.safetensors"
    checkpoint.save_weights(path, layer(), ABOUT)
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(DIGEST.encode()) + position, 1))
    assert load_file(path).keys() == layer().state_dict().keys()
    assert weights_damage(path) == "it is damaged: it fails its checksum"


def test_weights_of_other_programs_need_no_digest(tmp_path):
    save_file(layer().state_dict(), tmp_path / "a", metadata={"format": "pt"})
    save_file(layer().state_dict(), tmp_path / "b")
    assert weights_damage(tmp_path / "a") is None and weights_damage(tmp_path / "b") is None
    checkpoint.save_weights(tmp_path / "c", layer(), {})
    assert f'"{DIGEST}"'.encode() in (tmp_path / "c").read_bytes()


def test_half_a_code_point_in_the_names_of_weights_is_damage_and_no_traceback(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": {DIGEST: "0" * 32, "a": "\ud800"}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert weights_damage(path) == "it is damaged: it fails its checksum"
