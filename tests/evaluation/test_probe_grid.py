"""Probes trained at once: each is what it would be alone, and a broken one harms no other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffcv_ssl.evaluation.probe_grid import (
    GridProbe,
    GridSGD,
    Selection,
    Totals,
    best_member,
    cosine,
    mean_scores,
    train_step,
)

SETTINGS = [(0.1, 0.0), (1.0, 0.0), (0.5, 0.1)]


def batches(count=6, rows=16, width=10, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, num_classes, (rows,), generator=generator)


def grid_of(hidden, settings):
    """A float64 GridProbe and its optimiser."""
    generator = torch.Generator().manual_seed(0)
    probe = GridProbe(10, hidden, 4, len(settings), generator).double()
    optimizer = GridSGD(probe, *zip(*settings), momentum=0.9)
    optimizer.lrs, optimizer.weight_decays = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in zip(*settings)
    )
    return probe, optimizer


def trained(hidden, settings):
    probe, optimizer = grid_of(hidden, settings)
    for step, (x, labels) in enumerate(batches()):
        train_step(probe, optimizer, x, labels, cosine(step, 6))
    return probe.eval()


def torch_twin(hidden, lr, weight_decay):
    """The same probe of torch's own layers, trained by torch's SGD and cosine."""
    start = GridProbe(10, hidden, 4, 1, torch.Generator().manual_seed(0)).double()
    layers, width = [], 10
    for weight in list(start.weights)[:-1]:
        linear = nn.Linear(width, weight.shape[2], bias=False)
        linear.weight.data = weight[0].T.clone().detach()
        width = weight.shape[2]
        layers += [linear, nn.BatchNorm1d(width), nn.ReLU()]
    last = nn.Linear(width, 4)
    last.weight.data, last.bias.data = start.weights[-1][0].T.clone().detach(), torch.zeros(4)
    network = nn.Sequential(*layers, last).double()
    matrices = [m.weight for m in network if isinstance(m, nn.Linear)]
    others = [p for p in network.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for x, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
def test_every_member_is_torchs_own_probe_trained_alone(hidden):
    probe = trained(hidden, SETTINGS)
    x, _ = next(batches())
    for member, setting in enumerate(SETTINGS):
        expected = torch_twin(hidden, *setting)(x)
        torch.testing.assert_close(probe(x)[member], expected)
        torch.testing.assert_close(probe.member(member).double().eval()(x)[0], expected)


def test_a_member_that_diverges_leaves_the_others_and_is_not_chosen():
    probe = trained((8,), [(1e200, 0.0), SETTINGS[1]])
    alone = trained((8,), SETTINGS[1:2])
    x, labels = next(batches())
    torch.testing.assert_close(probe(x)[1], alone(x)[0])
    totals = Totals()
    totals.add(probe(x), labels)
    assert not probe(x)[0].isfinite().all() and totals.means()[0][0] == -1
    selection = Selection(probe)
    selection.see(totals, 1)
    assert best_member([selection.last_scores]) == selection.winner()[0] == 1


def test_a_member_that_diverges_on_one_split_is_not_chosen_for_its_mean_on_all():
    inf, ones = float("inf"), torch.ones(2)
    good, broken = (torch.tensor([0.9, 0.2]), ones), (torch.tensor([-1.0, 0.2]), ones * inf)
    broken[1][1] = 1.0
    scores = [good, good, broken]
    assert best_member(scores) == 1 and mean_scores(scores)[0].tolist()[0] == -1
    assert best_member([good, good]) == 0


def scored(selection, top1, losses, epoch):
    """Show a selection made-up scores."""
    totals = Totals()
    totals.num_rows = 1
    totals.num_correct, totals.losses = (
        torch.tensor(top1),
        torch.tensor(losses, dtype=torch.float64),
    )
    selection.see(totals, epoch)


def test_selection_keeps_each_members_weights_of_its_best_epoch():
    probe = GridProbe(3, (), 2, 2)
    selection = Selection(probe)
    for epoch, (top1, losses) in enumerate([((0.5, 0.1), (1.0, 1.0)), ((0.4, 0.6), (1, 1)),
                                            ((0.5, 0.6), (0.9, 1.0))], 1):  # fmt: skip
        nn.init.constant_(probe.bias, epoch)
        scored(selection, top1, losses, epoch)
    assert selection.winner() == (1, 2, pytest.approx(0.6))
    assert best_member([selection.last_scores]) == 1
    assert selection.best_epochs.tolist() == [3, 2]  # a lower loss counts where top-1 is equal
    assert selection.probe_at_best(0).bias.unique().tolist() == [3.0]
    assert selection.probe_at_best(1).bias.unique().tolist() == [2.0]


def test_all_members_start_alike_and_a_linear_one_at_zero():
    probe = GridProbe(5, (4,), 3, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(p[0], p[1]) for p in probe.parameters())
    assert probe.weights[0].abs().sum() > 0
    assert all((p == 0).all() for p in GridProbe(5, (), 3, 2).parameters())
