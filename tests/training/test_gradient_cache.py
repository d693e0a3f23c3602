"""Large batches in parts: the gradients of the whole batch, with one part's graph at a time."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from ffcv_ssl.config import settings
from ffcv_ssl.errors import UserError
from ffcv_ssl.training.gradient_cache import check_parts, frozen_statistics, split_views
from ffcv_ssl.training.step_data import NO_IMAGES, Images, StepData, StepKind
from ffcv_ssl.training.world import World

BATCH, LABELLED, CLASSES = 12, 10, 4
METHODS = ["simclr", "vicreg", "barlow", "byol", "supervised", "instance_simclr"]
CASES = [(method, "none") for method in METHODS] + [("simclr", "suncet"), ("byol", "cross_entropy")]
NAMES = [" ".join(case) for case in CASES]
COUPLED = [("simclr", "none"), ("vicreg", "none"), ("barlow", "none"), ("simclr", "suncet")]


class SmallModel(nn.Module):
    """The parts of `train.Model` that a step needs; views share one pass, as there."""

    def __init__(self, norm=False):
        super().__init__()
        norms = [nn.BatchNorm1d(16)] if norm else []
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), *norms, nn.Tanh())
        self.projector = nn.Linear(16, 8)
        self.widths, self.last = {"backbone": 16, "projector_1": 8}, "projector_1"

    def forward(self, views):
        rows = [len(view) for view in views]
        features = self.backbone(torch.cat(views))
        both = zip(features.split(rows), self.projector(features).split(rows))
        return [{"backbone": first, "projector_1": second} for first, second in both]


def make_trainer(case, chunk_size, norm=False):
    """A trainer with all that `_backward` uses and no more, in float64."""
    torch.manual_seed(3)
    method, stream = case
    trainer = object.__new__(train.Trainer)
    projector = settings.ModelConfig(projector="8", projector_norm="all" if norm else "none")
    trainer.config = train.config_class_of(method)(
        method=method, model=projector, precision="fp32",
        data=settings.DataConfig(chunk_size=chunk_size),
        labelled=settings.LabelledConfig(loss=stream),
    )  # fmt: skip
    trainer.world = World()
    trainer.model = SmallModel(norm)
    make = train.method_class(method)
    trainer.method = make(trainer.config, trainer.model, CLASSES, trainer.world)
    classifier = nn.Linear(16, CLASSES) if stream == "cross_entropy" else None
    trainer.learner = train.Learner(trainer.model, trainer.method, classifier).double()
    trainer.network = trainer.learner
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return trainer


def make_views(case):
    """(all views of a batch, number of unlabelled ones)."""
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    num_unlabelled = 3 if case[0] == "instance_simclr" else 2
    views = [torch.randn(BATCH, 3, 4, 4, **draw) for _ in range(num_unlabelled)]
    if case[1] != "none":
        views += [torch.randn(LABELLED, 3, 4, 4, **draw)]
    return views, num_unlabelled


def backward(trainer, views, num_unlabelled, rows=slice(None)):
    """The trainer's backward pass for the unlabelled rows given; what it returns, and the
    gradients."""
    unlabelled = [view[rows] for view in views[:num_unlabelled]]
    labelled = [view[rows] for view in views[num_unlabelled:]]
    unlabelled = Images(unlabelled, (torch.arange(BATCH) % CLASSES)[rows])
    data = StepData(StepKind.UNLABELLED, unlabelled, NO_IMAGES)
    if labelled:
        labels = (torch.arange(LABELLED) % CLASSES)[: len(labelled[0])]
        data = StepData(StepKind.UNLABELLED_AND_LABELLED, unlabelled, Images(labelled, labels))
    result = trainer._backward(data)
    named = trainer.learner.named_parameters()
    return result, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("chunk_size", [4, 5, 1, 12])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_batch_in_parts_has_the_gradients_of_the_whole_batch(case, chunk_size):
    views = make_views(case)
    (outputs, loss, terms), expected = backward(make_trainer(case, 0), *views)
    (same, again, others), gradients = backward(make_trainer(case, chunk_size), *views)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(others, terms, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close([dict(f) for f in same], [dict(f) for f in outputs])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4


@pytest.mark.parametrize("case", COUPLED, ids=[" ".join(case) for case in COUPLED])
def test_plain_accumulation_has_other_gradients_where_a_loss_couples_images(case):
    views, num_unlabelled = make_views(case)
    _, expected = backward(make_trainer(case, 0), views, num_unlabelled)
    trainer = make_trainer(case, 0)
    for start in range(0, BATCH, 4):  # gradients add up over calls
        _, summed = backward(trainer, views, num_unlabelled, slice(start, start + 4))
    largest = max(gradient.abs().max() for gradient in expected.values())
    differences = [(summed[name] / 3 - expected[name]).abs().max() for name in expected]
    assert max(differences) > 0.05 * largest


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_statistics_are_those_of_one_pass_over_the_parts(case):
    views, num_unlabelled = make_views(case)
    trainer = make_trainer(case, 5, norm=True)
    twin = make_trainer(case, 0, norm=True)
    for part in split_views(views, 5):
        twin._forward(twin.learner, part, num_unlabelled)
    backward(trainer, views, num_unlabelled)
    expected = dict(twin.learner.named_buffers())
    assert [name for name in expected if name.endswith("num_batches_tracked")]
    for name, buffer in trainer.learner.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=lambda text, n=name: f"{n}: {text}")


def test_frozen_statistics_normalises_by_the_batch_and_thaws_after_an_error():
    norm, rows = nn.BatchNorm1d(3), 5 + 2 * torch.randn(40, 3)
    before, expected = copy.deepcopy(norm.state_dict()), nn.BatchNorm1d(3)(rows)
    with contextlib.suppress(KeyError), frozen_statistics(norm):
        torch.testing.assert_close(norm(rows), expected)
        assert norm.track_running_stats  # CUDA's kernel needs the statistics, in bf16
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(rows)
    assert norm.num_batches_tracked == 1


class LiveGraph(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that graphs keep for a backward pass: now, and at most."""

    def __init__(self):
        self.now = self.peak = 0
        super().__init__(lambda tensor: Kept(tensor, self), lambda kept: kept.tensor)


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor, graph):
        self.tensor, self.graph = tensor.detach(), graph
        graph.now += tensor.numel()
        graph.peak = max(graph.peak, graph.now)

    def __del__(self):
        self.graph.now -= self.tensor.numel()


def test_only_one_parts_graph_is_alive_at_a_time_and_the_first_pass_keeps_none():
    views, num_unlabelled = make_views(("byol", "none"))
    peaks = {}
    for chunk_size in (0, 2):
        trainer = make_trainer(("byol", "none"), chunk_size)
        graph = LiveGraph()
        with graph:
            (outputs, _, _), _ = backward(trainer, views, num_unlabelled)
        peaks[chunk_size] = graph.peak
        kept = [value.grad_fn for features in outputs for value in features.values()]
        assert not any(kept) if chunk_size else any(kept)
    assert graph.now == 0 and peaks[2] < 0.6 * peaks[0]


def assert_parts_checked(own, labelled, num_views, chunk_size, sides, world=None):
    config = SimpleNamespace(
        unlabelled_batch_size=own, labelled_batch_size=labelled,
        labelled=SimpleNamespace(num_views=num_views), data=SimpleNamespace(chunk_size=chunk_size),
        system=SimpleNamespace(sync_batchnorm="auto"),
    )  # fmt: skip
    assert check_parts(config, sides, world or World()) is None


SMALL = [
    (8, 0, 1, 1, [32]), (5, 0, 1, 2, [32]), (8, 0, 1, 1, [32, 32, 16]), (1, 0, 1, 0, [32]),
    (0, 10, 1, 1, [32]), (0, 1, 1, 0, [32]), (1, 4, 1, 0, [32]), (2, 16, 1, 1, [32, 16]),
]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_part_of_a_single_row_is_refused(case):
    got = "data.batch_size or labelled.classes_per_batch: got 1 image"
    if case[3]:
        got = f"data.chunk_size: got {case[3]} for "
    with pytest.raises(UserError, match=got):
        assert_parts_checked(*case)


@pytest.mark.parametrize(
    "case",
    [(8, 0, 1, 0, [32]), (8, 0, 1, 2, [32]), (8, 0, 1, 1, [32, 32]), (1, 0, 1, 0, [32, 32]),
     (0, 10, 2, 1, [32, 32]), (0, 10, 1, 2, [32, 32]), (2, 4, 1, 2, [32, 32])],
    ids=str,
)  # fmt: skip
def test_parts_of_two_rows_and_whole_batches_are_not_refused(case):
    assert_parts_checked(*case)


def test_a_single_row_is_enough_where_batch_norm_sees_other_ranks():
    assert_parts_checked(2, 0, 1, 0, [32], World(1, 2, device="cuda:1"))
    with pytest.raises(UserError, match="got 1 image per rank"):
        assert_parts_checked(2, 0, 1, 0, [32], World(1, 2))


def test_views_are_split_into_parts_of_at_most_so_many_rows_that_make_up_the_whole():
    views = [torch.arange(12), torch.arange(12) + 20, torch.arange(3) + 50]
    for chunk_size, num_parts in ((0, 1), (12, 1), (5, 3), (4, 3), (1, 12)):
        parts = split_views(views, chunk_size)
        assert len(parts) == num_parts
        assert all(len(view) <= (chunk_size or 12) for part in parts for view in part)
        for number, view in enumerate(views):
            assert torch.equal(torch.cat([part[number] for part in parts]), view)
