"""python -m ffcv_ssl.inspect: a table for people, a JSON line for programs, exit codes for both."""

import json
import os
import shutil
import sys

import pytest
from PIL import Image
from support.beton_files import (
    PAGE_BYTES,
    List,
    make_columns,
    pattern,
    without_integrity,
    write_all_fields,
)
from support.outputs import closed_stdout, full_stdout

from ffcv_ssl import fields as f
from ffcv_ssl.inspect import main
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter

NUM_SAMPLES = 30


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Thirty raw or JPEG images of two named classes and some without label."""
    path = tmp_path_factory.mktemp("labelled") / "a.beton"
    items = [(pattern(i, 20 + i, 64), i % 3 - 1) for i in range(NUM_SAMPLES)]
    fields = {"image": f.RGBImageField("smart", smart_threshold=6000), "label": f.IntField()}
    names = {"label": ["[red]cat[/red]", "dog"]}
    writer = DatasetWriter(path, fields, PAGE_BYTES, 1, class_names=names, made={"source": "me"})
    writer.from_indexed_dataset(List(items))
    return path


@pytest.fixture
def copy(labelled, tmp_path):
    return shutil.copy(labelled, tmp_path / "copy.beton")


def inspect(capsys, *arguments):
    """(exit code, stdout lines, stderr)."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def damage(path, samples):
    with Reader(path) as reader:
        pointers = [int(reader.extents("image").pointer[i]) for i in samples]
    with open(path, "r+b") as file:
        for pointer in pointers:
            file.seek(pointer)
            file.write(b"\xaa")


def test_the_last_line_is_json_with_the_facts(labelled, capsys):
    code, out, _ = inspect(capsys, labelled)
    facts = json.loads(out[-1])
    assert code == 0
    assert facts["num_samples"] == NUM_SAMPLES
    assert facts["verified"] is True
    assert facts["file_bytes"] == labelled.stat().st_size
    assert facts["made"]["source"] == "me"
    image, label = facts["fields"]["image"], facts["fields"]["label"]
    assert (image["raw"], image["jpg"]) == (12, 18)
    assert image["height_quantiles_px"][0] == 20
    assert image["height_quantiles_px"][-1] == 49
    assert label["counts"] == {"-1": 10, "0": 10, "1": 10}


def test_the_table_shows_class_names_as_they_are(labelled, capsys):
    _, out, _ = inspect(capsys, labelled)
    text = "\n".join(out[:-1])
    assert "[red]cat[/red]" in text
    assert "unlabelled" in text
    assert "checksums match" in text


def test_every_field_type_is_described(tmp_path, capsys):
    columns = make_columns(3, 8, 6)
    columns["score"][1] = float("nan")
    write_all_fields(tmp_path / "a", columns)
    code, out, _ = inspect(capsys, tmp_path / "a", "--verify")
    facts = json.loads(out[-1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert code == 0
    assert facts["verify"] == {"bad": 0, "values": 24}
    assert facts["fields"]["box"]["shape"] == [2, 3]


def test_a_file_of_ffcvs_is_called_unverified(copy, capsys):
    without_integrity(copy)
    code, out, _ = inspect(capsys, copy, "--verify")
    assert code == 0
    assert "unverified" in "\n".join(out[:-1])
    assert json.loads(out[-1])["verified"] is False


def test_verify_lists_bad_samples_and_exits_1(copy, capsys):
    damage(copy, [3, 20])
    assert inspect(capsys, copy)[0] == 0
    code, out, _ = inspect(capsys, copy, "--verify")
    bad = [line for line in out[:-1] if "checksum does not match" in line]
    assert code == 1
    assert [line.split("sample ")[1].split(",")[0] for line in bad] == ["3", "20"]
    assert json.loads(out[-1])["verify"]["bad"] == 2


def test_verify_lists_twenty_at_most(copy, capsys):
    damage(copy, range(25))
    code, out, _ = inspect(capsys, copy, "--verify")
    assert code == 1
    assert sum("checksum does not match" in line for line in out) == 20
    assert any("and 5 more" in line for line in out)


def test_grid_draws_a_picture(labelled, tmp_path, capsys):
    code, out, _ = inspect(capsys, labelled, "--grid", tmp_path / "grid.png")
    assert code == 0
    assert json.loads(out[-1])["grid"] == str(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 500


@pytest.mark.parametrize("content", [None, b"", b"not a beton file" * 9])
def test_what_is_no_beton_file_is_one_line_and_exit_2(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    code, out, err = inspect(capsys, tmp_path / "a", "--verify")
    assert code == 2
    assert out == []
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "a") in err


def test_a_grid_without_images_or_place_is_one_line_and_exit_2(labelled, tmp_path, capsys):
    writer = DatasetWriter(tmp_path / "n", {"n": f.IntField()}, PAGE_BYTES, 1)
    writer.from_indexed_dataset(List([(1,)]))
    os.mkfifo(tmp_path / "pipe.png")
    for arguments in (
        (tmp_path / "n", "--grid", tmp_path / "g.png"),
        (labelled, "--grid", os.path.join(tmp_path, "none", "g.png")),
        (labelled, "--grid", tmp_path / "pipe.png"),  # in place, its reader would be waited for
    ):
        code, _, err = inspect(capsys, *arguments)
        assert code == 2
        assert len(err.splitlines()) == 1


def test_a_wrong_option_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["a.beton", "--verfy"])
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_grid_leaves_a_users_file_of_a_similar_name_alone(labelled, tmp_path, capsys):
    (tmp_path / "grid.png.tmp").write_text("mine")
    assert main([str(labelled), f"--grid={tmp_path / 'grid.png'}"]) == 0
    assert (tmp_path / "grid.png.tmp").read_text() == "mine"


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_a_full_or_closed_stdout_is_no_traceback(
    labelled, monkeypatch, capsys, options, is_buffered
):
    with full_stdout(is_buffered) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([str(labelled), *options]) == 2
    err = capsys.readouterr().err
    assert err == "stdout: cannot be written (No space left on device); free some space\n"
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([str(labelled), *options]) == 1
    assert capsys.readouterr().err == ""
