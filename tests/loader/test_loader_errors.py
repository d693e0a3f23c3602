"""Errors reach the consumer with their place; replacement is deterministic; nothing stale is ever
shown."""

import os
import shutil

import pytest
from support.beton_files import write
from support.loading import make_loader, samples_of, two_views
from support.process_limits import with_limited_memory

from ffcv_ssl import BetonError, Loader, OrderOption, Reader
from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import BytesField
from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.loader.workers import Scratch
from ffcv_ssl.transforms import RandomResizedCrop, ToTensor


def damage(path, source, samples, field="image"):
    """A copy of a file in which one byte of some samples' payloads is flipped."""
    shutil.copy(source, path)
    with Reader(source) as reader:
        extents = reader.extents(field)
        places = [int(extents.pointer[s]) + int(extents.size[s]) // 2 for s in samples]
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))
    return str(path)


@pytest.fixture
def damaged(small_beton, tmp_path):
    return damage(tmp_path / "damaged.beton", small_beton, [41])


def test_an_altered_sample_raises_at_its_batch_with_file_sample_and_field(damaged):
    with make_loader(damaged, 10, order=OrderOption.SEQUENTIAL) as loader:
        iterator = iter(loader)
        for _ in range(4):
            next(iterator)
        with pytest.raises(
            BetonError, match=r"damaged.beton: sample 41, field 'image': .*checksum"
        ):
            next(iterator)
        assert next(iterator, None) is None


@pytest.mark.parametrize("num_workers", [1, 4])
def test_of_several_bad_samples_the_error_names_the_first_of_the_batch(
    small_beton, tmp_path, num_workers
):
    path = damage(tmp_path / "bad.beton", small_beton, [23, 41, 60, 62])
    settings = {"order": OrderOption.SEQUENTIAL, "num_workers": num_workers}
    for _ in range(10):
        with make_loader(path, 64, **settings) as loader:
            with pytest.raises(BetonError, match="sample 23,"):
                next(iter(loader))


def test_a_bad_sample_is_replaced_by_the_same_one_for_any_workers_and_batches(
    damaged, small_beton, caplog
):
    def run(**arguments):
        with make_loader(damaged, drop_last=False, on_error="replace", **arguments) as loader:
            batches = list(loader)
            assert loader.stats["replaced"] == 1
        return samples_of(batches), [int(i) for b in batches for i in b.indices[b.replaced]]

    samples, replaced = run(batch_size=16)
    assert (samples, replaced) == run(batch_size=7, num_workers=1, batches_ahead=1)
    assert len(samples) == 97 and len(replaced) == 1 and replaced[0] != 41
    assert all(
        label == sample % 7 for sample, label, *_ in samples
    )  # all fields are the replacement's
    with make_loader(small_beton, drop_last=False) as loader:
        intact = samples_of(loader)
    differing = [i for i, pair in enumerate(zip(samples, intact)) if pair[0] != pair[1]]
    assert [intact[i][0] for i in differing] == [41]
    assert sum("sample 41" in r.getMessage() for r in caplog.records) == 2  # once a loader


def test_more_than_one_percent_replaced_is_an_error(small_beton, tmp_path):
    path = damage(tmp_path / "bad.beton", small_beton, range(20, 30))
    with make_loader(path, drop_last=False, on_error="replace") as loader:
        with pytest.raises(BetonError, match="more than 1 %"):
            list(loader)


def test_damage_to_another_field_replaces_the_whole_sample(small_beton, tmp_path):
    path = damage(tmp_path / "name.beton", small_beton, [5], field="name")
    pipelines = {**two_views()}
    with make_loader(path, 97, pipelines=pipelines, on_error="replace") as loader:
        (batch,) = list(loader)
    row = int(batch.replaced.nonzero()[0])
    sample = int(batch.indices[row])
    assert bytes(batch.name[row].numpy()).rstrip(b"\0") == f"sample {sample}".encode()


def test_a_file_truncated_while_open_gives_an_error_and_not_a_dead_process(small_beton, tmp_path):
    path = tmp_path / "cut.beton"
    shutil.copy(small_beton, path)
    with make_loader(str(path), 8, order=OrderOption.SEQUENTIAL) as loader:
        iterator = iter(loader)
        next(iterator)
        os.truncate(path, 4 << 20)
        with pytest.raises(BetonError, match="the file ends inside this sample"):
            for _ in iterator:
                pass
            next(iter(loader))


def test_an_error_in_whole_batch_code_names_pipeline_and_op(small_beton):
    def broken(batch):
        raise KeyError("oh")

    for ops in (
        [RandomResizedCrop(8), ToTensor(), broken],
        [RandomResizedCrop(8), broken, RandomResizedCrop(4), ToTensor()],
    ):
        with make_loader(small_beton, pipelines={"v": ("image", ops)}) as loader:
            with pytest.raises(RuntimeError, match=r"pipeline 'v', op .*broken.*KeyError"):
                next(iter(loader))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -2}, "num_workers is -2"),
        ({"batches_ahead": 0}, "batches_ahead is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"decoder": "turbo"}, "decoder is 'turbo', must be 'auto' or 'simplejpeg'"),
        ({"order": "random"}, "order is 'random'"),
        ({"indices": [0, 97]}, "got indices from 0 to 97, expected 0 to 96"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"rank": 0}, "give both or neither"),
        ({"distributed": True}, "process group"),
        ({"seed": -1}, "seed is -1"),
        ({"pipelines": {"v": ("picture", [])}}, "no field 'picture'"),
        ({"pipelines": {"image": [ToTensor()]}}, "the first op must be a crop"),
        (
            {"pipelines": {"v": ("image", [ToTensor(), RandomResizedCrop(8)])}},
            "image ops come first",
        ),
        (
            {"pipelines": {"v": ("image", [RandomResizedCrop(8), 3])}},
            "got 3, expected an op or a callable",
        ),
        ({"pipelines": {"image": None, "label": [IntDecoder(), 3]}}, "'label': got 3, expected an"),
        (
            {"pipelines": {"image": None, "label": [RandomResizedCrop(8), ToTensor()]}},
            "which is for images; the field 'label' is of type IntField",
        ),
        ({"pipelines": {"valid": ("image", [RandomResizedCrop(8)])}}, "'valid'"),
    ],
)
def test_wrong_arguments_raise_one_clear_line_at_once(small_beton, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Loader(small_beton, **{"batch_size": 8, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pipeline", "where"), [(None, "any view"), ("v", "a pipeline 'v'")])
def test_a_resolution_without_a_random_crop_is_refused(small_beton, pipeline, where):
    with Loader(small_beton, 8, pipelines={"image": None}) as loader:
        with pytest.raises(ValueError, match=f"found no RandomResizedCrop in {where}"):
            loader.set_resolution(8, pipeline)


def test_a_closed_loader_says_so(small_beton):
    loader = make_loader(small_beton)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        iter(loader)


@pytest.fixture(scope="module")
def long_beton(tmp_path_factory):
    """300 values of one byte, but sample 7 has 8 MB."""
    path = tmp_path_factory.mktemp("long") / "long.beton"
    items = [(bytes(8 << 20 if i == 7 else 1),) for i in range(300)]
    write(path, {"blob": BytesField()}, items, page_size=1 << 24)
    return path


def test_a_value_that_is_too_long_for_a_batch_is_named(long_beton):
    with Loader(long_beton, 256, num_workers=1) as loader:
        with pytest.raises(
            UserError, match=r"no memory for 256 rows of 8388608 .* sample 7"
        ) as got:
            with_limited_memory(1 << 30, lambda: next(iter(loader)))
    assert str(got.value).startswith(f"{long_beton}: field 'blob': ")


def test_samples_that_are_too_large_to_be_read_together_are_named(long_beton, monkeypatch):
    def refuse(scratch, name, *_):
        raise MemoryError

    monkeypatch.setattr(Scratch, "take", refuse)
    with Loader(long_beton, 2, num_workers=1, indices=[7, 8]) as loader:
        with pytest.raises(UserError, match=r"for 8388608 bytes of 1 .* is sample 7, 8388608 "):
            next(iter(loader))
