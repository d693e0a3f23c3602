"""What a pipeline refuses, and the line that says so."""

import numpy as np
import pytest

from ffcv_ssl import BetonError, Loader
from ffcv_ssl.errors import UserError
from ffcv_ssl.pipeline.plan import ViewPlan
from ffcv_ssl.transforms import (
    CenterCrop,
    NormalizeImage,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToDevice,
    ToTensor,
)
from ffcv_ssl.traversal_order import ClassStratified, QuasiRandom


def crop(**settings):
    return RandomResizedCrop(8, **settings)


def plan(ops, shape=None):
    return ViewPlan("view_0", "image", 0, ops, 0, shape)


class TooManyConstants(RandomGrayscale):
    """An op with more settings than a table has room for."""

    def constants(self):
        return (0.5,) * 9


class TwoAlike(RandomGrayscale):
    columns = (("a", "<f8"), ("a", "<f8"))


REFUSED_VIEWS = [
    (
        [RandomHorizontalFlip()],
        "view 'view_0': the images differ in size, so the first op must be a crop",
    ),
    (
        [ToTensor(), crop()],
        r"view 'view_0': ToTensor\(\) stands before an image op; image ops come first, then "
        r"tensor ops",
    ),
    ([crop(), 3], "view 'view_0': got 3, expected an op or a callable"),
    (
        [crop(), TooManyConstants()],
        r"TooManyConstants: constants\(\) gives 9 numbers, expected at most 8",
    ),
    (
        [crop(), TwoAlike()],
        "view 'view_0': TwoAlike: column 'a' is declared twice; give each its own name",
    ),
]


@pytest.mark.parametrize("ops, line", REFUSED_VIEWS)
def test_a_view_refuses_ops_that_make_none(ops, line):
    with pytest.raises((ValueError, UserError), match=line):
        plan(ops)


def links(first, second):
    return {"a": ("image", [crop(link=first)]), "b": ("image", [crop(link=second)])}


REFUSED_PIPELINES = [
    (links("b", "a"), r"view 'a', RandomResizedCrop\(link='b'\): the links go in a circle"),
    (
        links("c", None),
        r"RandomResizedCrop\(link='c'\): no such view of this field, expected one of",
    ),
    (
        links("b", "zzz"),
        r"view 'b', RandomResizedCrop\(link='zzz'\): no such view of this field",
    ),
    (
        {"a": ("image", [crop(link="b")]), "b": ("image", [CenterCrop(8)])},
        r"RandomResizedCrop\(link='b'\): view 'b' has no such op",
    ),
    (
        {"a": ("picture", [crop()])},
        r"pipeline 'a': the file has no field 'picture', it has image, label, weight, name; a "
        r"view of a "
        r"field is written \('field', \[ops\]\)",
    ),
    ({"image": None, "label": [3]}, "pipeline 'label': got 3, expected an op or a callable"),
    (
        {"valid": ("image", [crop()])},
        "a pipeline cannot have the name 'valid', as batches have an attribute of that name",
    ),
    (
        {"image": [crop(), ToDevice("cuda")]},
        r"got ToDevice\('cuda'\), but torch finds no CUDA device",
    ),
]


@pytest.mark.parametrize("pipelines, line", REFUSED_PIPELINES)
def test_a_loader_refuses_pipelines_that_it_cannot_run(small_beton, pipelines, line, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=line):
        Loader(small_beton, 4, num_workers=1, pipelines=pipelines)


LABELS = np.arange(97) % 7
REFUSED_ARGUMENTS = [
    ({"batch_size": 0}, "Loader: batch_size is 0, must be at least 1"),
    ({"batches_ahead": 0.5}, "Loader: batches_ahead is 0.5, must be at least 1"),
    ({"num_workers": -2}, r"Loader: num_workers is -2, must be -1 \(one per core\) or more"),
    ({"order": "random"}, "Loader: order is 'random', must be an OrderOption or a TraversalOrder"),
    ({"on_error": "skip"}, "Loader: on_error is 'skip', must be 'raise' or 'replace'"),
    ({"indices": [97]}, "got indices from 97 to 97, expected 0 to 96, the samples of the file"),
    (
        {"distributed": True},
        r"Loader: distributed is True, but there is no process group; call "
        r"torch.distributed.init_process_group first, or give rank and world_size",
    ),
    ({"rank": 1}, "Loader: got rank 1 and world_size None; give both or neither"),
    ({"rank": 2, "world_size": 2}, r"Loader: rank is 2, must be 0 to 1 \(world_size - 1\)"),
    ({"seed": -1}, r"Loader: seed is -1, must be an integer from 0 to 2\*\*63 - 1"),
    (
        {"rank": 0, "world_size": 2, "seed": None},
        "Loader: seed is None with several ranks; give all of them the same seed",
    ),
]


@pytest.mark.parametrize("arguments, line", REFUSED_ARGUMENTS)
def test_a_loader_refuses_arguments_out_of_range(small_beton, arguments, line):
    arguments = {"batch_size": 4, "num_workers": 1, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=line):
        Loader(small_beton, pipelines={"image": None}, **arguments)


REFUSED_ORDERS = [
    (lambda: QuasiRandom(0), "QuasiRandom: window_blocks: got 0, expected at least 1"),
    (
        lambda: ClassStratified(LABELS, 0, 1),
        "ClassStratified: classes_per_batch: got 0, expected at least 1",
    ),
    (
        lambda: ClassStratified(LABELS, 1, 0.5),
        "ClassStratified: images_per_class: got 0.5, expected at least 1",
    ),
    (
        lambda: ClassStratified(LABELS, 8, 1),
        "ClassStratified: classes_per_batch: got 8, expected at most 7, the number of classes with "
        "labelled samples",
    ),
    (
        lambda: ClassStratified(LABELS, 2, 2).split(None, np.arange(3), 1),
        r"ClassStratified: got a global batch of 3 samples, expected 2 classes x 2 images; the "
        r"loader's batch size times the number of ranks must be 4",
    ),
    (
        lambda: ClassStratified(LABELS, 2, 2).sequence(None, np.arange(99), 0, 0),
        "ClassStratified: got 97 labels, expected one for every sample of the file; sample 98 "
        "has none",
    ),
]


@pytest.mark.parametrize("make, line", REFUSED_ORDERS)
def test_orders_refuse_what_makes_no_batch(make, line):
    with pytest.raises(ValueError, match=line):
        make()


@pytest.fixture(scope="module")
def loader(small_beton):
    with Loader(small_beton, 4, num_workers=1, seed=0, pipelines={"image": [crop()]}) as made:
        yield made


def test_a_loader_refuses_an_epoch_and_a_view_that_there_are_not(loader):
    with pytest.raises(
        ValueError, match=r"set_epoch: got -1, expected a whole number from 0 to 2\*\*32 - 1"
    ):
        loader.set_epoch(-1)
    with pytest.raises(
        ValueError, match="set_resolution: found no RandomResizedCrop in a pipeline 'label'"
    ):
        loader.set_resolution(16, "label")


def test_a_loader_refuses_the_state_of_another_version_file_or_order(loader, raw_beton):
    state = loader.state_dict()
    with pytest.raises(
        BetonError, match="got a loader state of version 0, expected 1; begin the epoch anew"
    ):
        loader.load_state_dict({**state, "version": 0})
    with pytest.raises(
        BetonError,
        match=r"the loader state was made from dataset \w+.. \(5 samples\), but this is dataset "
        r"\w+.. "
        r"\(97 samples\); resume with the same file and the same indices",
    ):
        loader.load_state_dict({**state, "fingerprint": "0" * 16, "num_samples": 5})
    with pytest.raises(
        BetonError,
        match="the loader state was made with order Other, but this loader has order "
        "Sequential; use the same order",
    ):
        loader.load_state_dict({**state, "order": "Other"})


def test_a_closed_loader_says_so(small_beton):
    loader = Loader(small_beton, 4, num_workers=1, seed=0, pipelines={"image": [crop()]})
    loader.close()
    with pytest.raises(ValueError, match=r"small.beton: this loader is closed; make a new one"):
        iter(loader)


def test_a_loader_says_that_it_was_made_in_another_process(loader, monkeypatch):
    batches = iter(loader)
    next(batches)
    with monkeypatch.context() as patched:
        patched.setattr("ffcv_ssl.loader.iterator.os.getpid", lambda: 1)
        with pytest.raises(
            RuntimeError,
            match=r"this loader was made in another process, and a fork has no threads "
            "of its parent; make a Loader in this process",
        ):
            next(batches)
    batches.close()


def test_code_between_image_ops_must_return_what_they_take(small_beton):
    def halve(batch):
        return batch[:, ::2]

    pipelines = {"image": [crop(), halve, RandomGrayscale(0.5)]}
    with Loader(small_beton, 4, num_workers=1, seed=0, pipelines=pipelines) as loader:
        with pytest.raises(
            Exception,
            match=r"uint8 \(4, 4, 8, 3\), expected uint8 \(4, 8, 8, 3\) for the image ops after it",
        ):
            next(iter(loader))


def test_a_batch_op_that_fails_is_named(small_beton):
    pipelines = {"image": [crop(), NormalizeImage([1], [1])]}
    with Loader(small_beton, 4, num_workers=1, seed=0, pipelines=pipelines) as loader:
        with pytest.raises(RuntimeError, match=r"small.beton: pipeline 'image', op NormalizeImage"):
            next(iter(loader))
