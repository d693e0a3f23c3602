"""The same pixels: for any workers, prefetch, batch size, ranks and resume point."""

import itertools

import numpy as np
import pytest
from support.beton_files import without_integrity
from support.loading import epoch_of, make_loader, samples_of, view
from support.small_files import write_small

from ffcv_ssl import BetonError, Loader, OrderOption, Reader
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.jpeg import is_fast_here
from ffcv_ssl.kernels.resample import resample
from ffcv_ssl.transforms import (
    CenterCrop,
    Crop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    SimpleRGBImageDecoder,
    ToTensor,
)


@pytest.fixture(scope="module")
def reference_epoch(small_beton):
    return epoch_of(small_beton)


def test_an_epoch_has_every_sample_once_with_its_label(reference_epoch):
    assert sorted(s[0] for s in reference_epoch) == list(range(97))
    assert all(label == sample % 7 for sample, label, *_ in reference_epoch)


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "batches_ahead"),
    list(itertools.product((1, 2, 5), (7, 64), (1, 5))),
)
def test_views_are_identical_for_any_workers_batch_size_and_prefetch(
    small_beton, reference_epoch, num_workers, batch_size, batches_ahead
):
    settings = {"num_workers": num_workers, "batches_ahead": batches_ahead}
    assert epoch_of(small_beton, batch_size=batch_size, **settings) == reference_epoch


@pytest.mark.parametrize(
    "views",
    [
        [[RandomResizedCrop(24)]],
        [[RandomResizedCrop(24)], [RandomResizedCrop(40, scale=(0.1, 0.3))]],
        [[RandomResizedCrop(24)], [CenterCrop(32)]],
    ],
    ids=["one crop", "two crops", "a crop and a centre crop"],
)
def test_views_are_identical_for_both_decoders(small_beton, views):
    """Ours decodes only the box that all crops of a sample lie in."""
    if not is_fast_here():
        pytest.skip("our decoder is not used on this processor")
    pixels = {}
    for decoder in ("auto", "simplejpeg"):
        pipelines = {f"view_{k}": ("image", [*ops, ToTensor()]) for k, ops in enumerate(views)}
        with Loader(
            small_beton, 8, num_workers=2, seed=3, pipelines=pipelines, drop_last=False,
            decoder=decoder,
        ) as loader:  # fmt: skip
            batches = [
                [b[k].numpy().copy() for k in range(len(views))] for _ in "ab" for b in loader
            ]
            pixels[decoder] = [np.concatenate(parts) for parts in zip(*batches)]
            stats = loader.stats
        by_ours, by_simplejpeg = stats["decoded_by_ours"], stats["decoded_by_simplejpeg"]
        assert (by_ours > 50 and by_simplejpeg == 0) if decoder == "auto" else by_ours == 0
    assert all(np.array_equal(*pair) for pair in zip(pixels["auto"], pixels["simplejpeg"]))


class EdgeCrop(Crop):
    """A crop of a user's: more numbers than its box, which lies between pixels."""

    num_raw_columns = 7

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        raw[0], raw[1] = 0.3 * height, 0.25 * width
        raw[2], raw[3] = 0.4 * height, 0.5 * width

    def describe(self, raw, out):
        out["crop"] = raw[:, :4].astype(np.int32)


class Elsewhere(EdgeCrop):
    """It looks beside its box."""

    @staticmethod
    @device
    def start(view, constants, raw, scratch, pixels, at, height, width, factor, flip):
        resample(pixels, at, height, width, (0.0, 0.0, height, width), False, flip, view, scratch)


@pytest.mark.slow
@pytest.mark.parametrize("crop", [EdgeCrop, Elsewhere])
def test_a_users_crop_is_identical_for_both_decoders(small_beton, crop):
    pixels = []
    for decoder in ("auto", "simplejpeg"):
        views = {"view_0": ("image", [crop(16), ToTensor()])}
        with Loader(small_beton, 97, pipelines=views, decoder=decoder) as loader:
            (batch,) = loader
            pixels.append(batch.view_0.numpy().copy())
    assert np.array_equal(*pixels)


def test_a_whole_image_view_is_identical_for_both_decoders(tmp_path):
    path = write_small(tmp_path / "a.beton", 12, (40, 56), mode="jpg")
    pixels = []
    for decoder in ("auto", "simplejpeg"):
        views = {"view_0": ("image", [SimpleRGBImageDecoder(), ToTensor()])}
        views["view_1"] = ("image", [RandomResizedCrop(16), ToTensor()])
        with Loader(path, 12, seed=0, pipelines=views, decoder=decoder) as loader:
            (batch,) = loader
            pixels.append((batch.view_0.numpy().copy(), batch.view_1.numpy().copy()))
    assert all(np.array_equal(*pair) for pair in zip(*pixels))


@pytest.mark.parametrize("decoder", ["auto", "simplejpeg"])
def test_damage_behind_the_crop_is_an_error_where_no_checksum_would_tell(tmp_path, decoder):
    path = tmp_path / "a.beton"
    write_small(path, 1, (200, 60), mode="jpg")
    without_integrity(path)
    with Reader(path) as reader:
        extents = reader.extents("image")
        end = int(extents.pointer[0] + extents.size[0])
    with open(path, "r+b") as file:
        file.seek(end - 40)
        file.write(bytes(20))
    top = RandomResizedCrop(8, scale=(0.02, 0.03))
    views = {"view_0": ("image", [top, ToTensor()])}
    with Loader(path, 1, seed=0, pipelines=views, decoder=decoder) as loader:
        with pytest.raises(BetonError, match="sample 0, field 'image': corrupt JPEG"):
            next(iter(loader))


@pytest.mark.parametrize("order", list(OrderOption))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_views_are_identical_for_any_world_size_in_every_order(small_beton, order, world_size):
    alone = {s[0]: s for s in epoch_of(small_beton, order=order)}
    together = []
    for rank in range(world_size):
        together += epoch_of(small_beton, order=order, rank=rank, world_size=world_size)
    assert len(together) == 97  # no sample twice
    assert {s[0]: s for s in together} == alone


@pytest.mark.parametrize("order", list(OrderOption))
def test_a_global_batch_is_the_same_set_for_any_split_into_ranks(small_beton, order):
    def sets(world_size):
        ranks = []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size}
            with make_loader(small_beton, 12 // world_size, order=order, **place) as loader:
                ranks.append([set(batch.indices.tolist()) for batch in loader])
        assert len({len(batches) for batches in ranks}) == 1
        return [set().union(*parts) for parts in zip(*ranks)]

    assert sets(1) == sets(2) == sets(3) == sets(12)


@pytest.mark.parametrize("world_size", [2, 3, 5, 40])
def test_all_ranks_make_equal_steps_of_equal_shape_without_drop_last(small_beton, world_size):
    shapes, valid = [], 0
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "drop_last": False}
        with make_loader(small_beton, 9, **place) as loader:
            batches = list(loader)
        assert len(batches) == len(loader)
        shapes.append([tuple(b.view_0.shape) for b in batches])
        valid += sum(int(b.valid.sum()) for b in batches)
    assert all(s == shapes[0] for s in shapes)
    assert valid == 97


@pytest.mark.parametrize("taken", [0, 1, 4, 10, 13])
def test_a_resumed_epoch_goes_on_exactly(small_beton, reference_epoch, taken):
    """13 batches of 7 of the 97 samples, and one of 6."""
    with make_loader(small_beton, 7, drop_last=False) as loader:
        iterator = iter(loader)
        before = samples_of(itertools.islice(iterator, taken))
        state = loader.state_dict()
    with make_loader(small_beton, 20, drop_last=False, num_workers=1, seed=99) as loader:
        loader.load_state_dict(state)
        iterator = iter(loader)
        middle = samples_of(itertools.islice(iterator, 1))
        state = loader.state_dict()
    after = []
    for rank in range(3):  # a second resume, with other ranks and another batch size
        place = {"rank": rank, "world_size": 3, "drop_last": False}
        with make_loader(small_beton, 5, **place) as loader:
            loader.load_state_dict(state)
            if taken < 13:  # at 13 the first resume took the epoch's last batch
                after += samples_of(loader)
    seen = before + middle + after
    assert before + middle == reference_epoch[: len(before) + len(middle)]
    assert sorted(seen) == sorted(reference_epoch)


def test_epochs_and_seeds_differ_and_repeat(small_beton, reference_epoch):
    with make_loader(small_beton, drop_last=False) as loader:
        first, second = samples_of(loader), samples_of(loader)
    assert first == reference_epoch
    assert [s[0] for s in second] != [s[0] for s in first]
    by_id = {s[0]: s for s in first}
    assert all(s[2] != by_id[s[0]][2] for s in second)
    other = epoch_of(small_beton, seed=6)
    assert all(s[2] != by_id[s[0]][2] for s in other)


def test_the_two_views_of_a_sample_differ(reference_epoch):
    assert all(first != second for _, _, first, second in reference_epoch)


def test_adding_a_view_or_an_op_changes_no_other_draw(small_beton):
    def params(pipelines):
        with Loader(small_beton, 97, seed=1, pipelines=pipelines) as loader:
            return next(iter(loader)).params

    plain = params({"view_0": ("image", [RandomResizedCrop(8), ToTensor()])})
    ops = [RandomResizedCrop(8), RandomHorizontalFlip(), ToTensor()]
    more = params({"view_0": ("image", ops), "view_1": ("image", view(8))})
    assert (plain["view_0"]["crop"] == more["view_0"]["crop"]).all()
    assert (more["view_0"]["crop"] != more["view_1"]["crop"]).any()


def test_repeated_indices_get_draws_of_their_own(small_beton):
    arguments = {"indices": [3, 3, 3, 8], "order": OrderOption.SEQUENTIAL}
    with make_loader(small_beton, 4, **arguments) as loader:
        batch = next(iter(loader))
    assert batch.indices.tolist() == [3, 3, 3, 8]
    assert len({s[2] for s in samples_of([batch])}) == 4


def test_a_linked_crop_is_the_same_in_both_views(small_beton):
    pipelines = {
        "view_0": ("image", [RandomResizedCrop(12, link="view_1"), ToTensor()]),
        "view_1": ("image", [RandomResizedCrop(12), ToTensor()]),
    }
    with Loader(small_beton, 97, seed=1, pipelines=pipelines) as loader:
        batch = next(iter(loader))
    assert (batch.params["view_0"]["crop"] == batch.params["view_1"]["crop"]).all()
    assert batch.view_0.equal(batch.view_1)


@pytest.mark.parametrize(("link", "message"), [("view_9", "no such view"), ("view_0", "circle")])
def test_a_link_to_nothing_or_to_itself_is_refused(small_beton, link, message):
    pipelines = {"view_0": ("image", [RandomResizedCrop(12, link=link), ToTensor()])}
    with pytest.raises(ValueError, match=message):
        Loader(small_beton, 8, pipelines=pipelines)


def test_raw_and_jpeg_chunks_render_alike_one_by_one_or_together(raw_beton):
    """Raw chunks are rendered in one call; with a batch of one, sample by sample."""
    assert epoch_of(raw_beton, batch_size=64) == epoch_of(raw_beton, batch_size=1)


def test_set_resolution_takes_effect_at_the_next_iteration(small_beton):
    with make_loader(small_beton) as loader:
        iterator = iter(loader)
        loader.set_resolution(10)
        assert next(iterator).view_0.shape[-1] == 24
        assert next(iter(loader)).view_0.shape[-2:] == (10, 10)
        loader.set_resolution((8, 12), "view_1")
        batch = next(iter(loader))
        assert batch.view_0.shape[-2:] == (10, 10) and batch.view_1.shape[-2:] == (8, 12)
        with pytest.raises(ValueError, match="'label'"):
            loader.set_resolution(10, "label")


def test_scaled_decode_is_close_to_the_full_decode(tmp_path):
    from support.small_files import write_small

    path = write_small(tmp_path / "large.beton", 12, (300, 400), mode="jpg")
    ops = {"view_0": ("image", [CenterCrop(32, 1.0), ToTensor()])}
    batches = []
    for scaled in (False, True):
        with Loader(path, 12, pipelines=ops, scaled_decode=scaled) as loader:
            batches.append(next(iter(loader)).view_0.float())
    difference = (batches[0] - batches[1]).abs()
    assert 0 < difference.max() < 40 and difference.mean() < 2
