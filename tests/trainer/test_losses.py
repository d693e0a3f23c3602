"""Losses of the trainer against the papers' equations, anchor by anchor in float64.

Nothing here is shared with `train.py`. Gradients are those of the equations, by autograd in
float64. Errors are relative to the largest gradient unless a test says otherwise.
"""

import pytest
import torch
import torch.nn.functional as F

import train
from ffcv_ssl.methods.instance_simclr import instance_nt_xent

EPS = torch.finfo(torch.float32).eps


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the equations -------------------------------------------------------------------------------


def unit(row):
    """A row of length 1; a row of zeros has no direction and stays."""
    length = row.norm()
    return row / length if length > 0 else torch.zeros_like(row)


def odds_against(chosen, rest):
    """-log(chosen / (chosen + rest)) of sums of exponentials, exact where it is small."""
    return torch.log1p(rest / chosen)


def mean(losses, like):
    return sum(losses) / len(losses) if losses else like.sum() * 0


def exp_similarities(z, temperature):
    rows = torch.stack([unit(row) for row in z])
    return torch.exp(rows @ rows.T / temperature)


def suncet_equation(z, labels, temperature):
    """Assran et al. 2021, eq. 2."""
    e, losses, labels = exp_similarities(z, temperature), [], labels.tolist()
    members = [i for i, label in enumerate(labels) if label >= 0]
    for i in members:
        same = [j for j in members if labels[j] == labels[i] and j != i]
        other = [k for k in members if labels[k] != labels[i]]
        if same:
            losses.append(odds_against(e[i, same].sum(), e[i, other].sum()))
    return mean(losses, z)


def supcon_equation(z, labels, temperature):
    """Khosla et al. 2020, eq. 2."""
    e, losses, labels = exp_similarities(z, temperature), [], labels.tolist()
    members = [i for i, label in enumerate(labels) if label >= 0]
    for i in members:
        same = [j for j in members if labels[j] == labels[i] and j != i]
        terms = [
            odds_against(e[i, j], e[i, [k for k in members if k not in (i, j)]].sum()) for j in same
        ]
        if same:
            losses.append(mean(terms, z))
    return mean(losses, z)


def nt_xent_equation(z, temperature):
    """Chen et al. 2020, eq. 1, of all ordered pairs of views; z (V, B, D)."""
    num_views, batch, width = z.shape
    e, losses = exp_similarities(z.reshape(-1, width), temperature), []
    for image in range(batch):
        views = [v * batch + image for v in range(num_views)]
        for i in views:
            for j in views:
                if i != j:
                    rest = [k for k in range(len(e)) if k not in (i, j)]
                    losses.append(odds_against(e[i, j], e[i, rest].sum()))
    return mean(losses, z)


def instance_equation(anchor, positive, negative, temperature):
    """Bordes et al. 2023, section 3.4."""
    losses = []
    for a, p, n in zip(anchor, positive, negative):
        a, p, n = unit(a), unit(p), unit(n)
        losses.append(odds_against(torch.exp(a @ p / temperature), torch.exp(a @ n / temperature)))
    return mean(losses, anchor)


def vicreg_equation(z, z2, invariance=25.0, variance=25.0, covariance=1.0):
    """Bardes et al. 2022, eq. 1 to 6, with the variance term averaged over the two views."""
    width = z.shape[1]
    loss = invariance * sum(((a - b) ** 2).sum() for a, b in zip(z, z2)) / (len(z) * width)
    for view in (z, z2):
        c = torch.cov(view.T).reshape(width, width)
        for d in range(width):
            hinge = torch.relu(1 - torch.sqrt(c[d, d] + 1e-4))
            loss = loss + variance * hinge / width / 2
            rest = [c[d, other] ** 2 for other in range(width) if other != d]
            loss = loss + covariance * sum(rest) / width
    return loss


def barlow_equation(z, z2, off_diagonal=0.0025):
    """Zbontar et al. 2021, eq. 1 and 2, with the constant of batch-norm in the square roots."""
    batch, width = z.shape
    a, b = z - z.mean(0), z2 - z2.mean(0)
    loss = 0.0
    for i in range(width):
        for j in range(width):
            power = ((a[:, i] ** 2).sum() / batch + 1e-5) * ((b[:, j] ** 2).sum() / batch + 1e-5)
            c = (a[:, i] * b[:, j]).sum() / batch / torch.sqrt(power)
            loss = loss + ((1 - c) ** 2 if i == j else off_diagonal * c**2)
    return loss


def byol_equation(predictions, targets):
    """Grill et al. 2020, eq. 2, both directions; the mean over pairs of views, times two."""
    losses = []
    for v, p in enumerate(predictions):
        for w, t in enumerate(targets):
            if v != w:
                pairs = [((unit(a) - unit(b)) ** 2).sum() for a, b in zip(p, t)]
                losses.append(mean(pairs, p))
    return 2 * mean(losses, predictions)


def cross_entropy_equation(logits, labels, label_smoothing=0.0):
    """-sum_k q_k log softmax(logits)_k, q the smoothed target, over rows with a label."""
    losses, num_classes = [], logits.shape[1]
    for row, label in zip(logits, labels.tolist()):
        if label < 0:
            continue
        for k in range(num_classes):
            q = label_smoothing / num_classes + (1 - label_smoothing) * (k == label)
            losses.append(q * torch.logsumexp(row - row[k], dim=0))
    known = (labels >= 0).sum().clamp(min=1)
    return mean(losses, logits) * len(losses) / known


def value_of(result):
    """Losses that have terms return them too."""
    return result[0] if isinstance(result, tuple) else result


def with_gradients(loss_of, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = value_of(loss_of(*leaves))
    loss.backward()
    zero = [torch.zeros_like(leaf) for leaf in leaves]
    return loss.detach(), [z if leaf.grad is None else leaf.grad for z, leaf in zip(zero, leaves)]


def assert_equation(loss_of, equation, *tensors, slope=0.0, rel=1e-5, floor=0.0):
    """Value and gradients within `rel`; `slope`: a scale of gradients where theirs is nearly 0."""
    loss, gradients = with_gradients(loss_of, tensors)
    expected, exact = with_gradients(equation, [tensor.double() for tensor in tensors])
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert abs(loss.double() - expected) <= rel * abs(expected) + floor, (loss, expected)
    for gradient, other in zip(gradients, exact):
        error, scale = (gradient.double() - other).abs().max(), other.abs().max()
        assert error <= rel * max(scale, slope), (error, scale)
    return loss


# ---- random inputs, and hard ones ----------------------------------------------------------------

ROWS, WIDTH = 10, 6
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, -1, -1, 2, 1])
LABELLINGS = {
    "some unlabelled": LABELS,
    "a class with one sample": torch.tensor([0] * 9 + [1]),
    "one class only": torch.zeros(ROWS, dtype=torch.int64),
    "one labelled row": torch.tensor([-1] * 9 + [3]),
    "pairs": torch.arange(ROWS) // 2,
}
ZERO_ROWS = torch.cat([randn(ROWS - 2, WIDTH), torch.zeros(2, WIDTH)])
ANY_SIZE = {f"of size {size:g}": size * randn(ROWS, WIDTH) for size in (1, 1e4, 1e18, 1e-6, 1e-20)}
ANY_SIZE["with rows of zeros"] = ZERO_ROWS
COLLAPSED = {
    "all rows equal": torch.full((ROWS, WIDTH), 0.7),
    "all rows nearly equal": 1 + 1e-3 * randn(ROWS, WIDTH),
}
TEMPERATURES = [0.5, 0.1]

PAIRED = {"suncet": (train.suncet, suncet_equation), "supcon": (train.supcon, supcon_equation)}


def views_of(z, num_views, size=0.3):
    """(V, B, D): z and noisy copies of it."""
    noise = size * z.abs().mean()
    return torch.stack([z, *(z + noise * randn(*z.shape, seed=v) for v in range(1, num_views))])


def slope_of(z, temperature):
    """How steep a contrastive loss is where nothing balances: 1 / (t |z|), mean over anchors.

    The gradient of a row is a difference of unit rows times this. Where they are nearly equal, or
    their weights are, it is much smaller than its terms, which float32 rounds at EPS of them.
    """
    return (1 / (temperature * z.norm(dim=-1).mean() * len(z.flatten(0, -2)))).item()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("labelling", LABELLINGS)
@pytest.mark.parametrize("kind", ANY_SIZE)
@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_labels_are_their_equations(name, kind, labelling, temperature):
    z, labels, (loss, equation) = ANY_SIZE[kind], LABELLINGS[labelling], PAIRED[name]
    assert_equation(
        lambda x: loss(x, labels, temperature), lambda x: equation(x, labels, temperature), z
    )  # fmt: skip


@pytest.mark.parametrize("labelling", LABELLINGS)
@pytest.mark.parametrize("kind", COLLAPSED)
@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_labels_are_their_equations_when_all_collapses(name, kind, labelling):
    z, labels, (loss, equation) = COLLAPSED[kind], LABELLINGS[labelling], PAIRED[name]
    slope = slope_of(z, 0.1)
    assert_equation(
        lambda x: loss(x, labels, 0.1), lambda x: equation(x, labels, 0.1), z, slope=slope
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("kind", ANY_SIZE)
def test_nt_xent_is_its_equation_and_its_terms_add_up(kind, num_views, temperature):
    z = views_of(ANY_SIZE[kind], num_views)
    loss = assert_equation(
        lambda x: train.nt_xent(x, temperature), lambda x: nt_xent_equation(x, temperature), z
    )  # fmt: skip
    torch.testing.assert_close(sum(train.nt_xent(z, temperature)[1].values()), loss)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("kind", COLLAPSED)
def test_nt_xent_is_its_equation_when_all_collapses(kind, num_views):
    z = COLLAPSED[kind].expand(num_views, -1, -1).contiguous()
    slope = slope_of(z, 0.1)
    assert_equation(
        lambda x: train.nt_xent(x, 0.1), lambda x: nt_xent_equation(x, 0.1), z, slope=slope
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_views", [2, 3])
def test_nt_xent_of_one_or_two_images_is_its_equation(num_views, batch):
    z = randn(num_views, batch, WIDTH)
    assert_equation(lambda x: train.nt_xent(x, 0.2), lambda x: nt_xent_equation(x, 0.2), z)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ANY_SIZE)
def test_instance_nt_xent_is_its_equation(kind, temperature):
    anchor, positive, negative = views_of(ANY_SIZE[kind], 3)
    negative = negative.roll(1, dims=1)
    assert_equation(
        lambda *x: instance_nt_xent(*x, temperature),
        lambda *x: instance_equation(*x, temperature), anchor, positive, negative,
    )  # fmt: skip


@pytest.mark.parametrize("kind", COLLAPSED)
def test_instance_nt_xent_is_its_equation_when_all_collapses(kind):
    z = COLLAPSED[kind]
    views = (z, z.roll(1, dims=0), z.roll(2, dims=0))
    assert_equation(
        lambda *x: instance_nt_xent(*x, 0.1), lambda *x: instance_equation(*x, 0.1),
        *views, slope=slope_of(z, 0.1),
    )  # fmt: skip


def separated(num_views=1):
    """Rows of 5 classes, 2 of each, at right angles but for some noise: (V, 10, D)."""
    z = torch.eye(WIDTH)[torch.arange(ROWS) // 2]
    return torch.stack([z + 0.05 * randn(ROWS, WIDTH, seed=v) for v in range(num_views)])


@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_labels_near_zero_keep_their_digits_and_gradients(name):
    labels, (loss, equation) = LABELLINGS["pairs"], PAIRED[name]
    z = separated()[0]
    assert (
        assert_equation(lambda x: loss(x, labels, 0.05), lambda x: equation(x, labels, 0.05), z)
        < 1e-6
    )


def test_losses_of_views_near_zero_keep_their_digits_and_gradients():
    z = separated(2)[:, ::2]
    assert (
        assert_equation(lambda x: train.nt_xent(x, 0.05), lambda x: nt_xent_equation(x, 0.05), z)
        < 1e-6
    )
    views = (*z, z[0].roll(1, dims=0))
    value = assert_equation(
        lambda *x: instance_nt_xent(*x, 0.05), lambda *x: instance_equation(*x, 0.05), *views
    )  # fmt: skip
    assert value < 1e-6


def test_a_cross_entropy_near_zero_keeps_its_digits_and_gradients():
    logits, labels = 20 * torch.eye(WIDTH) + randn(WIDTH, WIDTH), torch.arange(WIDTH)
    loss, equation = train.cross_entropy, cross_entropy_equation
    assert assert_equation(lambda x: loss(x, labels), lambda x: equation(x, labels), logits) < 1e-6


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_low_temperatures_lose_no_more_than_the_rounding_of_a_similarity(name, temperature):
    # a similarity is known to EPS, its logit to EPS / t: so is a small loss, relative to itself
    z, (loss, equation) = randn(ROWS, WIDTH), PAIRED[name]
    bound = max(1e-5, 2 * EPS / temperature)
    assert_equation(
        lambda x: loss(x, LABELS, temperature), lambda x: equation(x, LABELS, temperature), z,
        rel=bound,
    )  # fmt: skip
    assert_equation(
        lambda x: train.nt_xent(x, temperature), lambda x: nt_xent_equation(x, temperature),
        views_of(z, 2), rel=bound,
    )  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_rows_without_a_label_have_no_say_and_no_gradient(name):
    z, loss = randn(ROWS, WIDTH), PAIRED[name][0]
    unlabelled = LABELS < 0
    first, (gradient,) = with_gradients(lambda x: loss(x, LABELS, 0.1), [z])
    for value in (0.0, 1e-20, 1e30):
        other = torch.where(unlabelled[:, None], torch.full_like(z, value), z)
        again, (same,) = with_gradients(lambda x: loss(x, LABELS, 0.1), [other])
        assert torch.equal(again, first) and torch.equal(same, gradient)
    assert not gradient[unlabelled].any() and gradient[~unlabelled].any()
    alone, (few,) = with_gradients(lambda x: loss(x, LABELS[LABELS >= 0], 0.1), [z[~unlabelled]])
    torch.testing.assert_close(alone, first, rtol=1e-6, atol=0)
    torch.testing.assert_close(few, gradient[~unlabelled], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("labels", [[-1] * 4, [0, 1, 2, -1], [5, -1, -1, -1]])
def test_a_batch_without_positives_has_loss_zero_and_gradient_zero(name, labels):
    labels = torch.tensor(labels)
    loss, (gradient,) = with_gradients(lambda x: PAIRED[name][0](x, labels, 0.1), [randn(4, 3)])
    assert loss == 0 and not gradient.any()


def test_rows_of_zeros_get_no_gradient():
    z, own = ZERO_ROWS, torch.arange(ROWS) % 3
    two = torch.stack([z, z.roll(1, dims=0)])
    losses = {
        "suncet": (lambda x: train.suncet(x, own, 0.1), z),
        "supcon": (lambda x: train.supcon(x, own, 0.1), z),
        "nt_xent": (lambda x: train.nt_xent(x, 0.1), two),
        "byol": (lambda x: train.byol(x, two + 1), two),
        "instance": (lambda x: instance_nt_xent(*x, 0.1), torch.stack([z, z + 1, z - 1])),
    }
    for name, (loss, inputs) in losses.items():
        value, (gradient,) = with_gradients(loss, [inputs])
        zero = ~inputs.any(dim=-1)
        assert torch.isfinite(value) and torch.isfinite(gradient).all(), name
        assert not gradient[zero].any() and gradient[~zero].any(), name


# ---- losses of statistics ------------------------------------------------------------------------

STATISTICAL = {
    "vicreg": (train.vicreg, vicreg_equation), "barlow": (train.barlow_twins, barlow_equation),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 30, 1e4, 1e-6, 1e-20])
@pytest.mark.parametrize("name", STATISTICAL)
def test_losses_of_statistics_are_their_equations(name, size):
    loss, equation = STATISTICAL[name]
    assert_equation(loss, equation, size * randn(ROWS, WIDTH), size * randn(ROWS, WIDTH, seed=1))


@pytest.mark.parametrize("name", STATISTICAL)
def test_losses_of_statistics_of_two_images_are_their_equations(name):
    # two images correlate by 1 or -1, and Barlow Twins' gradient is next to nothing: see below
    loss, equation = STATISTICAL[name]
    assert_equation(loss, equation, randn(2, WIDTH), randn(2, WIDTH, seed=1), slope=1.0)


@pytest.mark.parametrize("offset", [0.7, 12345.67])
@pytest.mark.parametrize("name", STATISTICAL)
def test_collapsed_embeddings_have_their_equations_loss_whatever_they_collapsed_to(name, offset):
    loss, equation = STATISTICAL[name]
    z = torch.full((ROWS, WIDTH), offset)
    value, gradients = with_gradients(loss, [z, z])
    torch.testing.assert_close(value.double(), equation(z.double(), z.double()), rtol=1e-5, atol=0)
    assert not any(gradient.any() for gradient in gradients)
    nearly = [offset * (1 + 1e-3 * randn(ROWS, WIDTH, seed=s)) for s in (1, 2)]
    assert_equation(loss, equation, *nearly)


def test_barlow_twins_of_1e18_is_its_equation():
    assert_equation(train.barlow_twins, barlow_equation, *(1e18 * randn(2, ROWS, WIDTH)))


def test_barlow_twins_of_agreeing_views_is_its_equation():
    # the gradient is of c_ii - 1, nearly 0: float32 rounds it at EPS of c_ii, so its terms' scale
    # counts: 2 / (B std)
    z = 3 * randn(ROWS, WIDTH)
    assert_equation(
        train.barlow_twins, barlow_equation, z, z + 0.05 * randn(ROWS, WIDTH, seed=1), slope=0.07
    )


@pytest.mark.parametrize("name", STATISTICAL)
def test_one_image_alone_has_no_spread_and_a_finite_loss(name):
    value, gradients = with_gradients(STATISTICAL[name][0], [randn(1, 4), randn(1, 4, seed=1)])
    assert torch.isfinite(value) and all(torch.isfinite(g).all() for g in gradients)


def test_weights_of_vicreg_and_barlow_weigh_their_terms():
    z, z2 = randn(2, ROWS, WIDTH)
    assert_equation(
        lambda *x: train.vicreg(*x, 3.0, 5.0, 7.0), lambda *x: vicreg_equation(*x, 3, 5, 7), z, z2
    )
    assert_equation(
        lambda *x: train.barlow_twins(*x, 0.5), lambda *x: barlow_equation(*x, 0.5), z, z2
    )
    loss, terms = train.vicreg(z, z2, 3.0, 5.0, 7.0)
    assert set(terms) == {"invariance", "variance", "covariance"}
    whole = 3 * terms["invariance"] + 5 * terms["variance"] + 7 * terms["covariance"]
    torch.testing.assert_close(loss, whole)
    loss, terms = train.barlow_twins(z, z2, 0.5)
    torch.testing.assert_close(loss, terms["on_diagonal"] + 0.5 * terms["off_diagonal"])


# ---- BYOL and cross-entropy ----------------------------------------------------------------------


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("kind", ANY_SIZE)
def test_byol_is_its_equation_and_targets_get_no_gradient(kind, num_views):
    z = ANY_SIZE[kind]
    targets = views_of(z.roll(1, dims=1), num_views).requires_grad_()
    assert_equation(
        lambda p: train.byol(p, targets), lambda p: byol_equation(p, targets.detach().double()),
        views_of(z, num_views),
    )  # fmt: skip
    assert targets.grad is None


@pytest.mark.parametrize("kind", COLLAPSED)
def test_byol_is_its_equation_when_all_collapses(kind):
    # a difference of equal unit rows, known to EPS, whose square is the loss
    p = COLLAPSED[kind].expand(2, -1, -1).contiguous()
    targets = p.roll(1, dims=1)
    scale = 1 / (p.norm(dim=-1).mean().item() * ROWS)
    assert_equation(
        lambda x: train.byol(x, targets), lambda x: byol_equation(x, targets.double()), p,
        slope=scale, rel=1e-5, floor=1e-5 * 1e-4,
    )  # fmt: skip


def test_byol_of_two_views_is_2_minus_2_cosines_both_ways():
    p, t = randn(2, ROWS, WIDTH), randn(2, ROWS, WIDTH, seed=1)
    expected = sum(2 - 2 * F.cosine_similarity(p[v], t[1 - v]).mean() for v in (0, 1))
    torch.testing.assert_close(train.byol(p, t), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", [*ANY_SIZE, *COLLAPSED])
def test_cross_entropy_is_its_equation(kind, smoothing):
    # with all smoothing, equal logits balance: slope 1 / N is of the terms
    logits, slope = (ANY_SIZE | COLLAPSED)[kind], 0.1 if smoothing == 1 else 0.0
    assert_equation(
        lambda x: train.cross_entropy(x, LABELS, smoothing),
        lambda x: cross_entropy_equation(x, LABELS, smoothing), logits, slope=slope,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs_where_all_rows_have_labels(smoothing):
    logits, labels = 3 * randn(ROWS, WIDTH), torch.arange(ROWS) % WIDTH
    expected = F.cross_entropy(logits.double(), labels, label_smoothing=smoothing)
    ours = train.cross_entropy(logits.double(), labels, smoothing)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_cross_entropy_ignores_rows_without_a_label_whatever_their_size():
    logits = torch.where(LABELS[:, None] < 0, torch.full((), 1e30), randn(ROWS, WIDTH))
    loss, (gradient,) = with_gradients(lambda x: train.cross_entropy(x, LABELS), [logits])
    expected = F.cross_entropy(logits[LABELS >= 0], LABELS[LABELS >= 0])
    torch.testing.assert_close(loss, expected)
    assert not gradient[LABELS < 0].any()
    none = torch.full((ROWS,), -1)
    loss, (gradient,) = with_gradients(lambda x: train.cross_entropy(x, none), [logits])
    assert loss == 0 and not gradient.any()


def test_cross_entropy_of_a_single_class_is_zero():
    loss, (gradient,) = with_gradients(
        lambda x: train.cross_entropy(x, torch.zeros(4, dtype=torch.int64), 0.1), [randn(4, 1)]
    )
    assert loss == 0 and not gradient.any()


# ---- number types --------------------------------------------------------------------------------

ALL = {
    "nt_xent": lambda x: train.nt_xent(x[:2], 0.1),
    "nt_xent of three views": lambda x: train.nt_xent(x, 0.1),
    "nt_xent at 1e-3": lambda x: train.nt_xent(x, 1e-3),
    "suncet": lambda x: train.suncet(x[0], LABELS, 0.1),
    "supcon": lambda x: train.supcon(x[0], LABELS, 0.1),
    "instance": lambda x: instance_nt_xent(*x, 0.1),
    "vicreg": lambda x: train.vicreg(x[0], x[1]),
    "barlow": lambda x: train.barlow_twins(x[0], x[1]),
    "byol": lambda x: train.byol(x[:2], x[1:]),
    "cross_entropy": lambda x: train.cross_entropy(x[0], LABELS, 0.1),
}


@pytest.mark.parametrize("size", [1, 30, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_inputs_have_the_float32_loss_of_the_same_numbers(name, dtype, size):
    z = (size * randn(3, ROWS, WIDTH)).to(dtype)
    loss, (gradient,) = with_gradients(ALL[name], [z])
    expected, (exact,) = with_gradients(ALL[name], [z.float()])
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and torch.isfinite(loss)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()
    step = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(gradient.float(), exact, rtol=0, atol=step)


@pytest.mark.parametrize("name", ALL)
def test_float64_inputs_stay_float64(name):
    z = randn(3, ROWS, WIDTH).double()
    loss, (gradient,) = with_gradients(ALL[name], [z])
    assert loss.dtype == gradient.dtype == torch.float64
    assert torch.isfinite(loss) and gradient.any()
