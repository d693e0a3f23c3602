"""Folders and lists that others made: nothing blocks, fills memory or counts twice unnoticed."""

import json
import os
import socket

import pytest
from PIL import Image

import write_dataset
from ffcv_ssl import Reader
from ffcv_ssl.errors import SourceError
from ffcv_ssl.sources import disk, open_source


@pytest.fixture
def photographs(tmp_path):
    """Three images in two classes."""
    root = tmp_path / "photographs"
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/3.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number * 80, 9, 20)).save(path)
    return root


def bind(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (bind, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_regular_file_is_named_and_not_read(photographs, make, kind):
    make(photographs / "cat/z.jpg")
    with pytest.raises(SourceError, match=f"cat/z.jpg: is {kind}, expected a regular file"):
        open_source("imagefolder", photographs)


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_a_file_that_is_replaced_after_the_folder_was_listed_does_not_block(photographs, kind):
    source = open_source("imagefolder", photographs)
    path = photographs / "cat/1.png"
    path.unlink()
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=f"cat/1.png: is {kind}"):
        source.dataset[0]


def test_a_file_that_becomes_a_pipe_between_two_looks_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    stat = os.stat
    monkeypatch.setattr(disk.os, "stat", lambda path: stat(tmp_path / "file"))
    with pytest.raises(SourceError, match="is a pipe"):
        disk.read_file(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(disk.MAX_FILE_BYTES + 1)  # takes no room on the disk
    with pytest.raises(SourceError, match="got a file of 1073741825 bytes, expected at most 1073"):
        disk.read_file(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"12345")
    assert disk.read_file(tmp_path / "b.jpg", max_bytes=5) == b"12345"
    with pytest.raises(SourceError, match="expected at most 4"):
        disk.read_file(tmp_path / "b.jpg", max_bytes=4)


def test_a_file_cut_while_it_is_read_is_said(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(5000))
    read = disk._read

    def cut(file, *limits):
        os.truncate(path, 1000)
        return read(file, *limits)

    monkeypatch.setattr(disk, "_read", cut)
    with pytest.raises(SourceError, match="got 1000 of 5000 bytes, the file became shorter"):
        disk.read_file(path)


def test_a_file_that_grows_while_it_is_read_is_said(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(5000))
    read = disk._read

    def grow(file, *limits):
        with open(path, "ab") as more:
            more.write(bytes(7))
        return read(file, *limits)

    monkeypatch.setattr(disk, "_read", grow)
    with pytest.raises(SourceError, match="got 5007 of 5000 bytes, the file became longer"):
        disk.read_file(path)


def test_a_file_that_the_system_makes_has_no_size_and_is_read():
    assert disk.read_file("/proc/self/status").startswith(b"Name:")


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_a_link_to_a_folder_above_is_refused(photographs, target):
    (photographs / "dog/up").symlink_to(target)
    with pytest.raises(SourceError, match=r"dog/up: leads by a link to the folder .* again"):
        open_source("imagefolder", photographs)


def test_a_folder_under_two_names_is_refused(photographs):
    (photographs / "wolf").symlink_to("dog")
    with pytest.raises(SourceError, match=r"(wolf|dog): leads by a link to the folder .* again"):
        open_source("imagefolder", photographs)


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path, photographs):
    subset = tmp_path / "subset"
    (subset / "cat").mkdir(parents=True)
    (subset / "cat/x.png").symlink_to(photographs / "cat/1.png")
    (subset / "dog").symlink_to(photographs / "dog")
    source = open_source("imagefolder", subset)
    assert source.names == ["cat/x.png", "dog/3.png"] and source.remarks == []
    assert source.dataset[0][0].data == (photographs / "cat/1.png").read_bytes()


def test_a_link_to_a_file_that_is_in_the_data_set_is_refused(photographs):
    (photographs / "dog/4.png").symlink_to("../cat/1.png")
    with pytest.raises(
        SourceError,
        match=r"dog/4.png: leads by a link to the file of .*cat/1.png, so that this image would "
        "count twice; remove one of them",
    ):
        open_source("imagefolder", photographs)


def test_two_links_to_one_file_elsewhere_are_refused(tmp_path, photographs):
    (tmp_path / "elsewhere.png").write_bytes(b"x")
    for name in ("cat/4.png", "dog/5.png"):
        (photographs / name).symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(SourceError, match=r"dog/5.png: leads by a link to the file of .*cat/4.png"):
        open_source("imagefolder", photographs)


def test_a_link_is_found_where_a_folder_lists_other_inode_numbers(photographs, monkeypatch):
    (photographs / "dog/4.png").symlink_to("../cat/1.png")
    listed = disk.ListedFile

    def numbered(name, inode, is_link):  # as overlay file systems do
        return listed(name, inode if is_link else inode + 1000, is_link)

    monkeypatch.setattr(disk, "ListedFile", numbered)
    with pytest.raises(SourceError, match="leads by a link to the file"):
        open_source("imagefolder", photographs)


def test_hard_links_of_one_file_are_samples_and_are_told(photographs):
    os.link(photographs / "cat/2.png", photographs / "cat/same.png")
    source = open_source("imagefolder", photographs)
    assert len(source.names) == 4
    (remark,) = source.remarks
    assert "1 of 4 images are hard links" in remark
    assert "'cat/same.png' and 'cat/2.png'" in remark and "each name is a sample" in remark


def test_a_link_to_nothing_counts_only_if_it_is_chosen(tmp_path, photographs, capsys):
    (photographs / "cat/gone.png").symlink_to("nowhere")
    (tmp_path / "list.txt").write_text("1.png\n3.png\n")
    arguments = ["--source=imagefolder", f"--root={photographs}", f"--out={tmp_path / 'a'}"]
    assert write_dataset.main([*arguments, f"--subset={tmp_path / 'list.txt'}"]) == 0
    capsys.readouterr()
    assert write_dataset.main([*arguments, "--workers=1"]) == 2
    err = capsys.readouterr().err
    assert "cat/gone.png: FileNotFoundError" in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_listed_is_named(photographs, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"dog: cannot be listed .Permission denied"):
        open_source("imagefolder", photographs)


def test_a_link_to_itself_is_named(photographs):
    (photographs / "cat/me.png").symlink_to("me.png")
    with pytest.raises(SourceError, match=r"cat/me.png: Too many levels"):
        open_source("imagefolder", photographs)


def test_classes_that_differ_in_unicode_form_only_are_refused(photographs):
    for name in ("caf\u00e9", "cafe\u0301"):
        (photographs / name).mkdir()
    with pytest.raises(SourceError, match=r"'cafe\\u0301' and 'caf\\xe9' have the same name"):
        open_source("imagefolder", photographs)


def test_classes_that_differ_in_case_only_are_told(photographs, tmp_path, capsys):
    (photographs / "Cat").mkdir()
    arguments = ["--source=imagefolder", f"--root={photographs}", f"--out={tmp_path / 'a'}"]
    assert write_dataset.main([*arguments, "--workers=1"]) == 0
    out, err = capsys.readouterr()
    assert "classes 'Cat' and 'cat' differ in case only" in err and err.count("\n") == 1
    assert json.loads(out.splitlines()[-1])["classes"] == 3


def test_odd_names_are_written_and_told_in_one_printable_line(photographs, tmp_path, capsys):
    odd = os.fsdecode(b"new\nline \x1b[31m\xff\xe2\x80\xae.png")
    os.rename(photographs / "dog/3.png", photographs / "dog" / odd)
    root = os.fsdecode(b"out\xff\n")
    arguments = ["--source=imagefolder", f"--root={photographs}", "--workers=1"]
    assert write_dataset.main([*arguments, f"--out={tmp_path / root / 'a'}"]) == 0
    out = capsys.readouterr().out
    out.encode("utf-8")
    assert len(out.splitlines()) == 5
    with Reader(tmp_path / root / "a") as reader:
        assert reader.names[2] == f"dog/{odd}"
    (photographs / "dog" / odd).write_bytes(b"no image")
    assert write_dataset.main([*arguments, f"--out={tmp_path / 'a'}"]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and err[:-1].isprintable() and "dog/new line" in err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "no entries"),  # nobody writes to it
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (os.mkdir, "is a folder"),
        (lambda path: path.write_bytes(b"\xff\xfe\0"), "not a text file"),
    ],
)
def test_a_subset_that_is_no_list_is_one_line(photographs, tmp_path, capsys, make, message):
    make(tmp_path / "list")
    arguments = ["--source=imagefolder", f"--root={photographs}", f"--out={tmp_path / 'a'}"]
    assert write_dataset.main([*arguments, f"--subset={tmp_path / 'list'}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_subset_may_come_from_another_command(photographs, tmp_path, capsys):
    receiver, sender = os.pipe()  # what a shell's <(...) gives
    try:
        os.write(sender, b"1.png\r\n3.png\n")
        os.close(sender)
        arguments = ["--source=imagefolder", f"--root={photographs}", f"--out={tmp_path / 'a'}"]
        assert write_dataset.main([*arguments, f"--subset=/dev/fd/{receiver}"]) == 0
    finally:
        os.close(receiver)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 2


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """The folder of a torchvision dataset `pets`, with one image."""
    from torchvision import datasets

    class Pets(datasets.ImageFolder):
        def __init__(self, root, split="train"):
            super().__init__(root)

    monkeypatch.setattr(datasets, "Pets", Pets, raising=False)
    (tmp_path / "pets/cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "pets/cat/1.png")
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("cat/0.png", None, r"cat/0.png: is a pipe"),
        ("cat/up", "..", r"leads by a link to the folder .* again"),
        ("dog", "cat", r"(cat|dog): leads by a link to the folder .* again"),
        ("cat/2.png", "1.png", r"2.png: leads by a link to the file of .*cat/1.png"),
    ],
)
def test_torchvisions_folders_are_held_to_the_same(pets, name, target, said):
    if target is None:
        os.mkfifo(pets / name)
    else:
        (pets / name).symlink_to(target)
    with pytest.raises(SourceError, match=said):
        open_source("pets", pets)


@pytest.mark.parametrize("names", [("up", "again"), (".up", ".again")])
def test_torchvision_does_not_walk_a_folder_in_circles(pets, monkeypatch, names):
    from torchvision.datasets import folder

    def walk(*args, **kwargs):
        raise AssertionError("two links to a folder above are 2^40 paths")

    for name in names:
        (pets / "cat" / name).symlink_to("..")
    monkeypatch.setattr(folder, "make_dataset", walk)
    with pytest.raises(SourceError, match=r"leads by a link to the folder .* again"):
        open_source("pets", pets)


def test_clevrs_scenes_name_no_file_elsewhere(tmp_path):
    scene = {"image_filename": "../secret.png", "objects": [{"pixel_coords": [1, 1, 9]}] * 3}
    (tmp_path / "scenes").mkdir()
    path = tmp_path / "scenes/CLEVR_val_scenes.json"
    path.write_text(json.dumps({"scenes": [scene]}))
    with pytest.raises(SourceError, match=r"'../secret.png', expected a name without folders"):
        open_source("clevr", tmp_path, "val")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="is a pipe"):
        open_source("clevr", tmp_path, "val")
