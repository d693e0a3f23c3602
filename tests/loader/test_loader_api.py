"""The public surface: tuple order, defaults, batch attributes, whole-batch code, filter, caching
modes."""

import numpy as np
import pytest
import torch
from support.loading import epoch_of, make_loader, samples_of

from ffcv_ssl import Loader, OrderOption
from ffcv_ssl.fields.basics import FloatDecoder, IntDecoder
from ffcv_ssl.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv_ssl.loader.cache import merge_ranges
from ffcv_ssl.pipeline.allocation_query import AllocationQuery
from ffcv_ssl.pipeline.compiler import Compiler
from ffcv_ssl.pipeline.operation import Operation
from ffcv_ssl.transforms import (
    Convert,
    NormalizeImage,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
    View,
)

CROP = [CenterCropRGBImageDecoder(8), ToTensor()]


def test_names_that_are_fields_follow_ffcvs_order_defaults_and_none(small_beton):
    pipelines = {"label": [IntDecoder(), ToTensor()], "image": CROP, "weight": None}
    with Loader(small_beton, 8, pipelines=pipelines) as loader:
        batch = next(iter(loader))
    assert batch._fields == ("image", "label", "name")
    image, label, name = batch
    assert image.shape == (8, 8, 8, 3) and label.shape == (8, 1) and name.dtype == torch.uint8


def test_other_names_follow_the_dict_then_defaults_of_unused_fields(small_beton):
    pipelines = {
        "label": [IntDecoder(), ToTensor()],
        "b": ("image", CROP),
        "a": ("image", CROP),
        "name": None,
    }
    with Loader(small_beton, 8, pipelines=pipelines) as loader:
        assert next(iter(loader))._fields == ("label", "b", "a", "weight")


def test_a_custom_field_mapper_names_views_as_in_ffcv_ssl(small_beton):
    mapper = {"image_0": "image", "image_1": "image"}
    pipelines = {"image_0": CROP, "image_1": CROP}
    with Loader(small_beton, 8, pipelines=pipelines, custom_field_mapper=mapper) as loader:
        batch = next(iter(loader))
    assert batch._fields == ("image_0", "image_1", "label", "weight", "name")
    assert batch.image_0.equal(batch.image_1)


def test_values_and_their_ops(small_beton):
    pipelines = {
        "image": CROP,
        "label": [IntDecoder(), ToTensor(), Squeeze(), Convert(torch.float32), View(np.int32)],
        "weight": [FloatDecoder(), ToTensor(), Convert(np.float32), ToDevice("cpu")],
    }
    with Loader(small_beton, 97, pipelines=pipelines) as loader:
        batch = next(iter(loader))
    expected = torch.arange(97)
    assert batch.label.view(torch.float32).equal((expected % 7).float())
    assert torch.allclose(batch.weight[:, 0], expected / 3)
    assert bytes(batch.name[12].numpy()).rstrip(b"\0") == b"sample 12"


def test_batches_carry_ids_flags_and_structured_parameters(small_beton):
    with make_loader(small_beton, 50, drop_last=False) as loader:
        batches = list(loader)
    batch = batches[1]
    assert batch.indices.dtype == torch.int64 and batch.valid.dtype == torch.bool
    assert not batch.replaced.any() and batch.valid.all() and len(batch.valid) == 47
    params = batch.params["view_1"]
    assert params.shape == (47,)
    assert params.dtype.names == (
        *("crop", "flip", "jitter", "gray", "sigma", "solarize", "equalize", "noise"),
    )
    assert params["crop"].dtype == np.int32 and params["flip"].dtype == np.bool_
    assert {tuple(sorted(o)) for o in params["jitter"]["order"].tolist()} == {(0, 1, 2, 3)}


def test_an_op_twice_in_a_view_has_two_draws_and_columns(small_beton):
    ops = [RandomResizedCrop(8), RandomHorizontalFlip(), RandomHorizontalFlip(), ToTensor()]
    with Loader(small_beton, 97, pipelines={"v": ("image", ops)}) as loader:
        params = next(iter(loader)).params["v"]
    assert params.dtype.names == ("crop", "flip", "flip_1")
    assert 20 < (params["flip"] != params["flip_1"]).sum() < 80


@pytest.mark.parametrize("as_ffcv", [True, False])
def test_both_forms_of_random_resized_crop_mean_the_same(small_beton, as_ffcv):
    if as_ffcv:
        crop = RandomResizedCropRGBImageDecoder((0.3, 0.5), (1, 2), (8, 10))
    else:
        crop = RandomResizedCrop((8, 10), scale=(0.3, 0.5), ratio=(1, 2))
    assert (crop.output_size, crop.scale, crop.ratio) == ((8, 10), (0.3, 0.5), (1, 2))


@pytest.mark.parametrize("place", ["numpy", "tensor", "torch image"])
def test_normalization_is_right_wherever_it_stands(small_beton, place):
    mean, std = np.array([10.0, 20.0, 30.0]), np.array([2.0, 4.0, 5.0])
    normalize = NormalizeImage(mean, std, np.float32)
    ops = {
        "numpy": [CenterCropRGBImageDecoder(3), normalize, ToTensor(), ToTorchImage()],
        "tensor": [CenterCropRGBImageDecoder(3), ToTensor(), normalize, ToTorchImage()],
        "torch image": [CenterCropRGBImageDecoder(3), ToTensor(), ToTorchImage(), normalize],
    }[place]
    plain = [CenterCropRGBImageDecoder(3), ToTensor(), ToTorchImage(channels_last=False)]
    with Loader(small_beton, 9, pipelines={"v": ("image", ops), "p": ("image", plain)}) as loader:
        batch = next(iter(loader))
    assert batch.p.is_contiguous()
    expected = (batch.p.double().numpy() - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(batch.v.numpy(), expected, atol=1e-5)


class Invert(Operation):
    """FFCV-style, compiled: 255 - v, and the id of the sample in the first pixel."""

    def generate_code(self):
        parallel_range = Compiler.get_iterator()

        def invert(images, destination, indices):
            for i in parallel_range(images.shape[0]):
                destination[i] = 255 - images[i]
                destination[i, 0, 0, 0] = indices[i]
            return destination

        invert.is_parallel = True
        invert.with_indices = True
        return invert

    def declare_state_and_memory(self, previous_state):
        return previous_state, AllocationQuery(previous_state.shape, previous_state.dtype)


def test_an_ffcv_operation_between_two_image_ops_runs_on_the_batch(small_beton):
    def run(*ops):
        views = {"v": ("image", [CenterCropRGBImageDecoder(8), *ops, ToTensor()])}
        with make_loader(small_beton, 16, pipelines=views) as loader:
            return [(b.v.numpy(), b.indices.numpy(), b.params["v"]) for b in loader]

    plain, through = run(RandomHorizontalFlip()), run(Invert(), RandomHorizontalFlip())
    behind = run(RandomHorizontalFlip(), Invert())
    for (image, ids, params), (other, _, other_params), (last, _, _) in zip(plain, through, behind):
        assert (params == other_params).all()
        inverted = 255 - image
        corner = np.where(params["flip"], 7, 0)
        inverted[np.arange(16), 0, corner, 0] = ids
        assert (other == inverted).all()
        assert (last[:, 0, 0, 0] == ids).all() and (last[:, 1:] == 255 - image[:, 1:]).all()


def test_a_crop_may_stand_behind_other_ops_and_starts_a_new_segment(small_beton):
    first = [CenterCropRGBImageDecoder(16, 1.0), RandomHorizontalFlip(0.5)]
    ops = [*first, RandomResizedCrop(8, (0.25, 0.25), (1, 1)), RandomHorizontalFlip(1), ToTensor()]
    pipelines = {"v": ("image", ops), "whole": ("image", [*first, ToTensor()])}
    with Loader(small_beton, 8, seed=3, pipelines=pipelines) as loader:
        batch = next(iter(loader))
    params = batch.params["v"]
    assert params.dtype.names == ("crop", "flip", "crop_1", "flip_1")
    assert (
        params["crop_1"][:, 2:] == 8
    ).all()  # a quarter of 16 x 16: no resizing, so pixels are equal
    for row, (top, left, height, width) in enumerate(params["crop_1"]):
        whole = (
            batch.whole[row] if params["flip"][row] == batch.params["whole"]["flip"][row] else None
        )
        if whole is not None:
            assert batch.v[row].flip(1).equal(whole[top : top + height, left : left + width])
    assert (params["flip"] == batch.params["whole"]["flip"]).any()


def test_any_module_or_callable_runs_on_the_batch_between_and_behind(small_beton):
    def halve(images):
        assert images.shape == (16, 8, 8, 3) and images.dtype == np.uint8
        return images // 2

    pool = torch.nn.AvgPool2d(2)
    ops = [CenterCropRGBImageDecoder(8), halve, RandomHorizontalFlip(0.0)]
    ops += [ToTensor(), ToTorchImage(), Convert(torch.float32), pool, lambda x: x + 1]
    plain = [CenterCropRGBImageDecoder(8), ToTensor(), ToTorchImage(), Convert(torch.float32)]
    with make_loader(small_beton, pipelines={"v": ("image", ops), "p": ("image", plain)}) as loader:
        batch = next(iter(loader))
    assert batch.v.equal(pool((batch.p / 2).floor()) + 1)


def test_whole_batch_code_can_ask_for_seed_epoch_and_indices(small_beton):
    seen = []

    def add(images, context):
        seen.append((context.seed, context.epoch, context.indices.tolist()))
        return images

    ops = [*CROP, add]
    with make_loader(small_beton, 48, pipelines={"v": ("image", ops)}) as loader:
        ids = [b.indices.tolist() for _ in range(2) for b in loader]
    assert seen == [(5, k // 2, i) for k, i in enumerate(ids)]


def test_filter_keeps_the_samples_for_which_the_condition_holds(small_beton):
    with make_loader(small_beton, 4) as loader:
        with loader.filter("label", lambda label: label == 3) as filtered:
            samples = samples_of(filtered)
            assert sorted(filtered.indices.tolist()) == list(range(3, 97, 7))
    assert {s[1] for s in samples} == {3} and len(samples) == 12


def test_stats_count_images_seconds_and_rate(small_beton):
    with make_loader(small_beton, 16) as loader:
        for _ in loader:
            pass
        stats = loader.stats
    assert stats["images"] == 96 and stats["replaced"] == 0
    assert stats["images_per_s"] > 0
    assert all(stats[f"{what}_s"] > 0 for what in ("read", "decode", "render", "waiting"))


def test_uncached_reading_yields_the_same(small_beton):
    for order in OrderOption:
        assert epoch_of(small_beton, os_cache=False, order=order) == epoch_of(
            small_beton, order=order
        )


def test_ranges_to_read_ahead_are_merged():
    pointers, sizes = np.array([900_000, 0, 100], np.uint64), np.array([50, 100, 300], np.uint64)
    assert merge_ranges(pointers, sizes) == [(0, 400), (900_000, 900_050)]


def test_a_validation_loader_of_fewer_samples_than_a_batch_yields_one_short_batch(small_beton):
    with make_loader(small_beton, 64, indices=range(5), drop_last=False) as loader:
        (batch,) = list(loader)
        assert len(loader) == 1 and len(batch.indices) == 5
    with make_loader(small_beton, 64, indices=range(5), drop_last=True) as loader:
        assert len(loader) == 0 and list(loader) == []
        assert loader.state_dict()["epoch"] == 1


def test_ffcvs_import_paths_lead_to_the_same_classes():
    import ffcv_ssl.transforms as t
    from ffcv_ssl.fields import decoders, rgb_image
    from ffcv_ssl.loader import Loader as SameLoader
    from ffcv_ssl.pipeline.state import State
    from ffcv_ssl.transforms import common, ops

    assert SameLoader is Loader and common.Squeeze is t.Squeeze and ops.ToTensor is t.ToTensor
    for home in (decoders, rgb_image, t):
        assert home.RandomResizedCropRGBImageDecoder is t.RandomResizedCrop
        assert home.CenterCropRGBImageDecoder is t.CenterCrop
    assert State(True, "cpu", (3,), np.uint8).shape == (3,)
