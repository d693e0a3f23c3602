"""The self-test: right where all is right, and one line where a part is not."""

import json

import numpy as np
import pytest

from ffcv_ssl import selftest
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import RandomGrayscale


@pytest.fixture
def raw(tmp_path):
    images = selftest.Images(selftest.NUM_RAW, selftest.RAW_SHAPE)
    return selftest.write(tmp_path / "raw.beton", images, "raw")


@pytest.mark.whole
def test_all_is_right_here_and_the_last_line_says_so(capsys):
    assert selftest.main(["--device=cpu", "--seconds=0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["status"] == "right" and summary["images_per_s"] > 0
    assert summary["device"] == "cpu" and summary["versions"]["torch"]
    assert sum(line.startswith("right ") for line in lines) == 7


def test_a_wrong_pixel_is_one_line_and_exit_code_1(monkeypatch, capsys):
    decode = Reader.decode

    def off_by_one(self, index, field):
        value = decode(self, index, field)
        return value ^ 1 if field == "image" and index == 3 else value

    monkeypatch.setattr(Reader, "decode", off_by_one)
    assert selftest.main(["--device=cpu", "--seconds=0.05"]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "selftest: image 3 of raw.beton: got values 1 away from those expected, at most 0.0; "
        "install ffcv-ssl again\n"
    )
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["status"] == "wrong" and summary["wrong"].startswith("image 3 of raw.beton")


def test_each_check_can_fail(raw, monkeypatch):
    monkeypatch.setattr(selftest, "NUM_RAW", 24)
    load_all = selftest.load_all

    def brighter(*args, **kwargs):
        views, drawn = load_all(*args, **kwargs)
        return np.where(views < 255, views + 1, 254).astype(np.uint8), drawn

    for check in (selftest.check_flips, selftest.check_crops, selftest.check_grey):
        check(raw)
        monkeypatch.setattr(selftest, "load_all", brighter)
        with pytest.raises(selftest.Wrong, match="away from those expected"):
            check(raw)
        monkeypatch.setattr(selftest, "load_all", load_all)


def test_a_loader_that_depends_on_its_workers_is_noticed(raw, monkeypatch):
    load_all = selftest.load_all

    def of_workers(path, view, num_workers=1, batch_size=8):
        return load_all(path, [*view, RandomGrayscale(float(num_workers > 1))], 1, batch_size)

    selftest.check_repetition(raw)
    monkeypatch.setattr(selftest, "load_all", of_workers)
    with pytest.raises(selftest.Wrong, match="views of 3 workers: got other pixels"):
        selftest.check_repetition(raw)


def test_damage_that_is_not_noticed_is_noticed(raw, monkeypatch):
    monkeypatch.setattr(selftest, "load_all", lambda *_: None)
    with pytest.raises(selftest.Wrong, match="a changed byte in sample 5: got its pixels"):
        selftest.check_damage(raw)


def test_a_device_that_multiplies_wrongly_is_noticed(monkeypatch):
    monkeypatch.setattr("torch.Tensor.__matmul__", lambda a, b: a)
    with pytest.raises(selftest.Wrong, match="a matrix product on cpu: got values"):
        selftest.check_device("cpu")
