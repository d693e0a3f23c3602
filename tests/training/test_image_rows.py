"""Features by image: the same rows for any number of ranks, and only those of the chosen images."""

from types import SimpleNamespace

import numpy as np
import torch

from ffcv_ssl.training.image_rows import ImageRows
from ffcv_ssl.training.world import World


def batch_of(indices, valid=None, replaced=None):
    number = len(indices)
    return SimpleNamespace(
        indices=np.array(indices),
        valid=np.ones(number, bool) if valid is None else np.array(valid),
        replaced=np.zeros(number, bool) if replaced is None else np.array(replaced),
    )


def features_of(indices, dtype=torch.float32):
    return {"a": torch.tensor([[i, -i, 0.1] for i in indices], dtype=dtype)}


class SumOf(World):
    """A world whose sum is that of given tensors, one a rank."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def sum_(self, tensor):
        return sum(self.parts)


def test_rows_are_in_the_order_of_the_images_whatever_the_order_of_batches():
    rows = ImageRows(np.array([2, 5, 9]))
    for indices in ([9, 3], [0, 2], [5, 8]):
        rows.add(batch_of(indices), features_of(indices))
    values, images = rows.take("a", World())
    assert images.tolist() == [2, 5, 9]
    assert torch.equal(values, features_of([2, 5, 9])["a"])


def test_padding_and_replaced_images_do_not_count():
    rows = ImageRows(np.array([1, 2, 3]))
    rows.add(batch_of([1, 1], valid=[True, False]), features_of([1, 7]))
    rows.add(batch_of([2, 2], replaced=[True, False]), features_of([8, 2]))
    values, images = rows.take("a", World())
    assert images.tolist() == [1, 2] and torch.equal(values, features_of([1, 2])["a"])


def test_ranks_that_share_the_images_have_the_rows_of_one_rank():
    images, alone = np.arange(10), ImageRows(np.arange(10))
    alone.add(batch_of(images), features_of(images))
    ranks = [ImageRows(images), ImageRows(images)]
    for rank, part in zip(ranks, (images[::2], images[1::2])):
        rank.add(batch_of(part), features_of(part))
    world = SumOf([rank.values["a"] for rank in ranks])
    (values, found), (expected, all_images) = ranks[0].take("a", world), alone.take("a", World())
    assert torch.equal(values, expected) and found.tolist() == all_images.tolist()


def test_the_precision_of_the_features_is_remembered():
    rows = ImageRows(np.arange(3))
    rows.add(batch_of([0, 1]), features_of([0, 1], torch.bfloat16))
    assert rows.resolution["a"] == torch.finfo(torch.bfloat16).eps
    values, _ = rows.take("a", World())
    assert values.dtype == torch.float32 and rows.values == {}
