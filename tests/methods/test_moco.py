"""MoCo v2 against its equation in float64, its queue over several steps, and its keys."""

from collections import deque

import pytest
import torch
from support.method_cases import FlatModel, make_method, run_ranks
from torch import nn

from ffcv_ssl.methods.moco import info_nce
from ffcv_ssl.training.world import World

SETTINGS = {"queue_size": 10, "momentum": 0.7, "temperature": 0.3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def info_nce_equation(queries, keys, negatives, temperature):
    """He et al. 2020, eq. 1, query by query; queries (V, B, D)."""
    losses = []
    for view in queries:
        for q, k in zip(view, keys):
            q, k = q / q.norm(), k / k.norm()
            positive = torch.exp(q @ k / temperature)
            rest = sum(torch.exp(q @ n / temperature) for n in negatives)
            losses.append(-torch.log(positive / (positive + rest)))
    return sum(losses) / len(losses)


# torch's softplus is linear above 20: off by exp(-20) at most
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 3e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("num_views", [1, 3])
def test_info_nce_and_its_gradient_are_those_of_the_equation(
    num_views, temperature, dtype, tolerance
):
    queries, keys = randn(num_views, 6, 5), randn(6, 5, seed=1)
    negatives = nn.functional.normalize(randn(9, 5, seed=2), dim=1)
    expected_at = queries.double().requires_grad_()
    expected = info_nce_equation(expected_at, keys.double(), negatives.double(), temperature)
    expected.backward()
    found_at, found_keys = queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()
    found = info_nce(found_at, found_keys, negatives, temperature)
    found.backward()
    # the queue is float32: its unit rows are so in both
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    largest = expected_at.grad.abs().max()
    assert (found_at.grad.double() - expected_at.grad).abs().max() < 2 * tolerance * largest
    assert found_keys.grad is None


def test_a_loss_close_to_0_keeps_its_digits():
    q = torch.eye(4)[None]
    negatives = -torch.eye(4)[:1].repeat(3, 1)
    found = info_nce(q[:, :1], q[0, :1], negatives, 0.05)
    expected = torch.log1p(3 * torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def train_steps(world, num_steps, batch):
    """Steps of plain SGD on MoCo with views that are split over ranks; (losses, method)."""
    torch.manual_seed(3)
    model = FlatModel(norm=False)
    method = make_method("moco", model, world, SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(num_steps):
        views = [randn(batch, 3, 4, 4, seed=10 * step + v) for v in range(2)]
        views = [view.tensor_split(world.size)[world.rank] for view in views]
        outputs = model(views)
        for features in outputs:
            features["embedding"] = features[model.last]
        (targets,) = method.targets([views[v] for v in method.target_views])
        outputs[method.target_views[0]].update(targets)
        loss, _ = method.loss(outputs, None)
        optimizer.zero_grad()
        loss.backward()
        world.sum_gradients_(model.parameters())
        for parameter in model.parameters():
            parameter.grad /= world.size
        optimizer.step()
        method.after_update(model, (step + 1) / num_steps)
        losses.append(loss.item())
    return losses, method


def test_the_queue_holds_the_last_keys_of_the_teacher_oldest_first():
    torch.manual_seed(3)
    model = FlatModel(norm=False)
    method = make_method("moco", model, World(), SETTINGS)
    queue, expected = method.queue, deque(maxlen=10)
    expected.extend(row for row in queue.rows.clone())
    for step in range(5):
        view = randn(4, 3, 4, 4, seed=step)
        twin = method.teacher.model.double()
        keys = twin([view.double()])[0][twin.last]
        method.teacher.model.float()
        expected.extend(key / key.norm() for key in keys.detach())
        (target,) = method.targets([view])
        outputs = [
            {**features, "embedding": features[model.last]} for features in model([view] * 2)
        ]
        outputs[0] |= target
        method.loss(outputs, None)
        assert torch.equal(queue.position, torch.tensor(4 * step % 10))
        method.after_update(model, step / 5)
        oldest_first = queue.rows.roll(-int(queue.position), 0)
        rows = torch.stack([row.double() for row in expected])
        torch.testing.assert_close(oldest_first.double(), rows, rtol=1e-5, atol=1e-6)
    assert method.keys is None


def test_the_teacher_follows_the_model_with_constant_momentum():
    model = FlatModel(norm=False)
    method = make_method("moco", model, World(), SETTINGS)
    before = [p.detach().double().clone() for p in method.teacher.model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    method.teacher.move(model, 0.9)
    for old, new, p in zip(before, method.teacher.model.parameters(), model.parameters()):
        expected = 0.7 * old + 0.3 * p.double()
        torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6)
        assert not new.requires_grad


def rank_main(world):
    losses, method = train_steps(world, 4, 6)
    with_norm = make_method("moco", FlatModel(norm=True), world, SETTINGS)
    images = randn(8, 3, 4, 4, seed=7).tensor_split(world.size)[world.rank]
    torch.manual_seed(world.rank)  # ranks that would draw different orders shuffle alike
    (target,) = with_norm.targets([images])
    return losses, method.queue.state_dict(), target["key"]


@pytest.mark.whole
def test_two_ranks_have_the_losses_of_one_and_equal_queues(tmp_path):
    first, second = run_ranks(rank_main, tmp_path)
    losses, method = train_steps(World(), 4, 6)
    for found in (first, second):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=0)
        assert torch.equal(found[1]["rows"], first[1]["rows"])
        assert torch.equal(found[1]["position"], method.queue.position)
        torch.testing.assert_close(found[1]["rows"], method.queue.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.whole
def test_a_ranks_keys_are_of_its_images_with_batch_norm_over_a_shuffled_batch(tmp_path):
    found = torch.cat([keys for _, _, keys in run_ranks(rank_main, tmp_path)])
    images, model = randn(8, 3, 4, 4, seed=7), FlatModel(norm=True)
    torch.manual_seed(0)
    order, expected = torch.randperm(8), torch.empty(8, 8)
    for half in order.chunk(2):
        expected[half] = model([images[half]])[0][model.last].detach()
    torch.testing.assert_close(found, expected)
    assert sorted(order[:4].tolist()) != [0, 1, 2, 3]  # else nothing was shuffled among ranks
