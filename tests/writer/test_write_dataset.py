"""`write_dataset.py` writes what was asked for, or says in one line why not and leaves nothing."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.outputs import closed_stdout, full_stdout

import write_dataset
from ffcv_ssl import Reader
from ffcv_ssl.sources import Shapes

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, capsys):
    """Run the command in this process: (exit code, last stdout line as JSON or None, stderr)."""
    code = write_dataset.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


@pytest.fixture
def photographs(tmp_path):
    """Twelve smooth JPEGs in two classes and one unlabelled, 80 x 60 but for a large one."""
    root = tmp_path / "photographs"
    for index in range(12):
        folder = root / "train" / ("cat", "dog", "unlabelled")[0 if index < 6 else 1 + index // 11]
        folder.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 255, 80)[None, :, None] * np.array([1, 0.5, index / 12])
        image = Image.fromarray(np.broadcast_to(ramp, (60, 80, 3)).astype(np.uint8))
        if index == 3:
            image = image.resize((800, 600))
        image.save(folder / f"{index:02}.jpg", quality=95)
    return root


def test_a_folder_becomes_a_file_with_labels_and_class_names(tmp_path, photographs, capsys):
    out = tmp_path / "new" / "a.beton"
    code, summary, _ = run(
        "--source=imagefolder",
        f"--root={photographs}",
        f"--out={out}",
        "--workers=1",
        capsys=capsys,
    )
    assert code == 0
    assert summary["samples"] == 12 and summary["bytes"] == out.stat().st_size
    assert summary["fields"] == ["image", "label"] and summary["classes"] == 2
    assert summary["images"] == {
        "original bytes kept": 11,
        "encoded: larger than max_resolution": 1,
    }
    with Reader(out) as reader:
        assert reader.class_names == {"label": ["cat", "dog"]}
        labels = [reader.decode(index, "label") for index in range(12)]
        assert labels == [0] * 6 + [1] * 5 + [-1]
        assert reader.decode(3, "image").shape == (375, 500, 3)
        assert reader.read(0, "image") == (photographs / "train/cat/00.jpg").read_bytes()
        assert reader.made["source"] == "imagefolder" and reader.made["max_resolution"] == 500
        assert str(tmp_path) not in json.dumps(reader.made)
        assert reader.names[:2] == ("cat/00.jpg", "cat/01.jpg")
        assert reader.names[-2:] == ("dog/10.jpg", "unlabelled/11.jpg")


def test_the_number_of_workers_changes_no_byte(tmp_path, photographs, capsys):
    contents = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.beton"
        arguments = ("--source=imagefolder", f"--root={photographs}", "--split=train", "--mode=jpg")
        assert run(*arguments, f"--out={out}", f"--workers={workers}", capsys=capsys)[0] == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("options", "shape", "images"),
    [
        ([], (80, 80, 3), {"encoded: given as pixels": 7}),
        (["--mode=raw"], (80, 80, 3), {"raw": 7}),
        (["--mode=jpg", "--max_resolution=32"], (32, 32, 3), {"encoded": 7}),
    ],
)
def test_modes_and_resolution_are_obeyed(tmp_path, capsys, options, shape, images):
    out = tmp_path / "a.beton"
    code, summary, _ = run(
        "--source=shapes",
        "--num_samples=7",
        "--size_px=80",
        f"--out={out}",
        "--workers=1",
        *options,
        capsys=capsys,
    )
    assert (code, summary["images"]) == (0, images)
    with Reader(out) as reader:
        assert reader.decode(6, "image").shape == shape


def test_generated_images_are_never_shrunk_unasked(tmp_path, capsys):
    out = tmp_path / "a.beton"
    arguments = ("--source=shapes", "--num_samples=1", "--size_px=600", "--workers=1")
    assert run(*arguments, f"--out={out}", capsys=capsys)[0] == 0
    with Reader(out) as reader:
        assert reader.decode(0, "image").shape == (600, 600, 3)


def test_a_better_quality_takes_more_bytes(tmp_path, photographs, capsys):
    sizes = []
    for quality in (20, 95):
        arguments = ("--source=imagefolder", f"--root={photographs}", "--mode=jpg", "--workers=1")
        out = tmp_path / "a.beton"
        run(*arguments, f"--quality={quality}", f"--out={out}", capsys=capsys)
        with Reader(out) as reader:
            sizes.append(sum(len(reader.read(index, "image")) for index in range(12)))
    assert sizes[0] < sizes[1]


def test_shapes_are_written_with_all_their_fields(tmp_path, capsys):
    out = tmp_path / "shapes.beton"
    arguments = ("--source=shapes", "--num_samples=20", "--size_px=32", "--seed=5", "--split=val")
    code, summary, _ = run(*arguments, f"--out={out}", "--workers=2", capsys=capsys)
    assert code == 0 and summary["classes"] == 10
    expected = Shapes("val", 20, 32, seed=5)
    with Reader(out) as reader:
        assert reader.made["seed"] == 5 and reader.made["split"] == "val"
        assert reader.names is None  # drawn, not files
        for index in range(20):
            image, label, count, distance = expected[index]
            np.testing.assert_array_equal(reader.decode(index, "image"), image)
            assert reader.decode(index, "label") == label
            assert reader.decode(index, "count") == count
            assert reader.decode(index, "distance") == pytest.approx(distance)
            nearer = [edge for edge in (0.33, 0.39, 0.45, 0.5, 0.55) if edge <= distance]
            assert reader.decode(index, "distance_bin") == len(nearer)


def test_subset_and_limit_choose_samples(tmp_path, photographs, capsys):
    subset = tmp_path / "half.txt"
    subset.write_text("03.jpg\ndog/07.jpg\n00.jpg\n")
    out = tmp_path / "a.beton"
    common = ("--source=imagefolder", f"--root={photographs}", f"--out={out}", "--workers=1")
    assert run(*common, f"--subset={subset}", capsys=capsys)[1]["samples"] == 3
    with Reader(out) as reader:
        assert [reader.decode(index, "label") for index in range(3)] == [0, 0, 1]
        assert reader.made["subset"] == "half.txt"
        assert reader.names == ("cat/00.jpg", "cat/03.jpg", "dog/07.jpg")
    assert run(*common, "--limit=4", capsys=capsys)[1]["samples"] == 4


@pytest.mark.parametrize(
    ("content", "reason"), [(b"no image at all", "not a readable image"), (None, "corrupt image")]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_is_named_and_nothing_is_left(
    tmp_path, photographs, capsys, content, reason, workers
):
    bad = photographs / "train/dog/08.jpg"
    bad.write_bytes(content or bad.read_bytes()[:-400])
    out = tmp_path / "out"
    code, _, err = run(
        "--source=imagefolder",
        f"--root={photographs}",
        f"--out={out / 'a.beton'}",
        f"--workers={workers}",
        capsys=capsys,
    )
    assert code == 2
    assert "dog/08.jpg" in err and reason in err and err.count("\n") == 1
    assert list(out.iterdir()) == []


def test_an_unreadable_file_is_named(tmp_path, photographs, capsys):
    (photographs / "train/dog/08.jpg").unlink()
    (photographs / "train/dog/08.jpg").symlink_to(tmp_path / "gone.jpg")
    code, _, err = run(
        "--source=imagefolder",
        f"--root={photographs}",
        f"--out={tmp_path / 'a.beton'}",
        capsys=capsys,
    )
    assert code == 2 and "dog/08.jpg" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --source, --out"),
        (["--source=shapes"], "required: --out"),
        (["--source=hf:x", "--out=a.beton"], "unknown source 'hf:x', expected shapes, imagefolder"),
        (["--source=imagefolder", "--out=a.beton"], "--root: missing"),
        (["--source=shapes", "--out=a.beton", "--root=."], "--root: source 'shapes' has no such"),
        (["--source=shapes", "--out=a.beton", "--bogus=1"], "unrecognized arguments: --bogus=1"),
        (["--source=shapes", "--out=a.beton", "--mode=png"], "--mode: invalid choice: 'png'"),
        (["--source=shapes", "--out=a.beton", "--limit=0"], "limit: got 0"),
        (["--source=shapes", "--out=a.beton", "--limit=few"], "--limit: got 'few'"),
        (["--source=shapes", "--out=a.beton", "--workers=-1"], "--workers: got '-1'"),
        (
            ["--source=shapes", "--out=a.beton", "--quality=101"],
            "quality: got 101, expected 1 to",
        ),
        (["--source=shapes", "--out=a.beton", "--subset=none.txt"], "--subset: none.txt: No such"),
        (["--source=shapes", "--out=/dev/null/a.beton"], "--out: /dev/null: "),
    ],
)
def test_a_users_mistake_exits_2_with_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert message in err and err.startswith("write_dataset.py: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.whole
def test_the_command_itself_prints_its_result_last_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "write_dataset.py"), "--source", "shapes", "--out"]
    done = subprocess.run(
        [*command, "a.beton", "--num_samples", "30"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 30
    failed = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_real_photographs_keep_their_bytes(tmp_path, data_folder, capsys):
    archive = data_folder / "imagenette224.tar"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    root = tmp_path / "imagenette"
    with tarfile.open(archive) as tar:
        for member, _ in zip((m for m in tar if m.isfile()), range(40)):
            target = root / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
    (split,) = (path.name for path in root.iterdir())
    out = tmp_path / "a.beton"
    code, summary, _ = run(
        "--source=imagefolder", f"--root={root}", f"--split={split}", f"--out={out}", capsys=capsys
    )
    assert code == 0 and summary["images"] == {"original bytes kept": 40}
    files = sorted(root.glob("*/*/*"))
    with Reader(out) as reader:
        assert [reader.read(i, "image") for i in range(40)] == [f.read_bytes() for f in files]


def test_a_full_or_closed_stdout_is_no_traceback_and_the_file_is_written(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "a"
    arguments = ["--source=shapes", "--num_samples=2", "--workers=1", "--size_px=8", f"--out={out}"]
    with full_stdout() as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert write_dataset.main(arguments) == 2
    line = f"stdout: cannot be written (No space left on device); {out} is written; free some space"
    assert capsys.readouterr().err == f"write_dataset.py: {line}\n"
    out.unlink()
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert write_dataset.main(arguments) == 0
    assert capsys.readouterr().err == "" and out.exists()
    monkeypatch.setattr(sys, "stdout", None)  # as with `>&-`
    assert write_dataset.main(arguments) == 0
