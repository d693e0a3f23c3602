"""The GPU proof as far as a CPU goes: its files, its checks, and all of it on next to nothing."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu, gpu_fast, gpu_files
from benchmarks.gpu_checks import LeftOut, Proof
from ffcv_ssl import Reader
from ffcv_ssl.errors import UserError


@pytest.fixture
def imagenette(tmp_path):
    """Folders of noise, which JPEG cannot make small: two classes, of 8 and 3 images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in (("a", 8), ("b", 3)):
            folder = tmp_path / "imagenette" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (200, 180, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "imagenette"


def test_a_folder_for_the_proof_keeps_to_its_size_and_takes_classes_by_turns(imagenette, tmp_path):
    out = tmp_path / "out"
    given = [f"--imagenette={imagenette}", f"--out={out}", "--mib=0.4"]
    assert gpu_files.main(given) == 0
    sizes, px = {}, {"train.beton": 144, "val.beton": 144, "photographs.beton": 200}
    for name, share in gpu_files.SHARES.items():
        with Reader(str(out / name)) as reader:
            sizes[name] = sum(reader.extents("image").size)
            assert max(reader.field_metadata("image")["height"]) <= px[name]
        assert 0 < sizes[name] <= share * 0.4 * 2**20
    with Reader(str(out / "train.beton")) as reader:
        assert reader.field_metadata("label").ravel()[:4].tolist() == [0, 1, 0, 1]
        assert reader.class_names["label"] == ["a", "b"]
    files = gpu_files.open_files(str(out), tmp_path, 0, 0, 0)
    assert files.train == out / "train.beton" and len(files.photographs) >= 1
    with Reader(str(out / "photographs.beton")) as reader:
        assert files.photographs[0][0].data == bytes(reader.read(0, "image"))


def test_missing_files_and_classes_are_told_with_a_remedy(tmp_path, capsys):
    with pytest.raises(UserError, match="no such file; write it with"):
        gpu_files.open_files(str(tmp_path), tmp_path, 0, 0, 0)
    (tmp_path / "train").mkdir()
    assert gpu_files.main([f"--imagenette={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "expected" in capsys.readouterr().err


def make_proof(device, folder):
    log, began = io.StringIO(), time.perf_counter()
    return Proof(torch.device(device), None, folder, folder, log, limit_s=240, began=began)


def test_a_check_that_fails_is_told_and_kept_and_the_others_go_on(tmp_path, capsys):
    proof = Proof(
        torch.device("cpu"), None, tmp_path, tmp_path, io.StringIO(), 240, time.perf_counter()
    )
    proof.check("right", lambda: "as it should be")
    proof.check("wrong", lambda: proof.expect(False, "memory grows"))
    proof.check("also right", lambda: print("for the log"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAIL", "ok"]
    assert "memory grows" in lines[1] and "Traceback" in proof.log.getvalue()
    assert "for the log" in proof.log.getvalue()
    assert [check["right"] for check in proof.checks.values()] == [True, False, True]


def test_a_check_that_would_end_late_is_left_out_and_said_to_be(tmp_path, capsys):
    proof = Proof(
        torch.device("cuda"), None, tmp_path, tmp_path, io.StringIO(), 240, time.perf_counter()
    )
    proof.leave_out_if_late(200)
    with pytest.raises(LeftOut):
        proof.leave_out_if_late(241)
    proof.check("late", lambda: proof.leave_out_if_late(241))
    assert capsys.readouterr().out.startswith("left  late: 0 of 240 s are over")
    assert proof.checks["late"]["right"] is None


def test_a_part_with_a_wrong_check_ends_with_exit_code_1(tmp_path, monkeypatch, capsys):
    def part(proof):
        """a part"""
        proof.check("wrong", lambda: 1 / 0)
        proof.found["number"] = 3
        raise KeyError("of the part itself")

    monkeypatch.setitem(gpu.PARTS, 1, ("part", part))
    monkeypatch.setattr(gpu, "open_files", lambda *_: gpu_files.Files(Path(), Path(), [], "none"))
    assert gpu.main(["--part=1", "--device=cpu", f"--out={tmp_path}"]) == 1
    record = json.loads((tmp_path / "part.json").read_text())
    assert record["number"] == 3 and not record["checks"]["wrong"]["right"]
    assert not record["checks"]["the part itself"]["right"]
    assert "WRONG: wrong" in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu.main([f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_seconds_between_measured_resolutions_follow_the_pixels():
    measured = {96: 1.0, 160: 2.0, 224: 4.0}
    assert gpu_fast.seconds_at(160, measured) == 2 and gpu_fast.seconds_at(96, measured) == 1
    share = (192**2 - 160**2) / (224**2 - 160**2)
    assert gpu_fast.seconds_at(192, measured) == pytest.approx(2 + 2 * share)
    assert gpu_fast.seconds_at(32, measured) == 1  # nothing smaller was measured


@pytest.mark.whole
@pytest.mark.slow
def test_the_whole_proof_runs_on_a_cpu(tmp_path, capsys):
    threads = torch.get_num_threads()
    code = gpu.main(["--device=cpu", f"--out={tmp_path}"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert code == 0, printed + (tmp_path / "gpu_right.log").read_text()[-5000:]
    for name in ("gpu_right", "gpu_fast", "gpu_learns"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["machine"]["gpu"] is None and record["checks"]
    assert "-- part 3: does it learn" in printed and "FAIL" not in printed
    assert [line for line in printed.splitlines() if line.startswith("left")] == [
        line for line in printed.splitlines() if "from part 2: part 2 has not left them" in line
    ]
