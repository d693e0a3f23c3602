"""k-NN and SuNCEt's non-parametric inference against scikit-learn and a float64 twin."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import similarity_bank
from ffcv_ssl.evaluation.protocols import knn
from ffcv_ssl.evaluation.protocols.knn import (
    KNNConfig,
    KNNScorer,
    NearestNeighbours,
    first_largest,
    vote,
)
from ffcv_ssl.evaluation.protocols.snn import ClassSimilarity, NPIConfig
from ffcv_ssl.evaluation.similarity_bank import Scores, Tally, classify, unit_rows


def features(num_rows, seed=0, width=12, num_classes=5):
    """Unit rows (N, D) around one centre a class, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    rows = centres[labels] + rng.normal(scale=1.2, size=(num_rows, width))
    return unit_rows(torch.from_numpy(rows)), torch.from_numpy(labels)


def shown_in_parts(state, bank, labels, part):
    """A state that has seen a bank in parts of so many rows."""
    for begin in range(0, len(bank), part):
        state.add(bank[begin : begin + part], labels[begin : begin + part])
    return state


class Given:
    """A scorer with the scores (Q, K) of all classes by the name of their setting."""

    def __init__(self, named):
        self.named = named
        self.num_columns = next(iter(named.values())).shape[1]

    def scores(self, chosen):
        for name, values in self.named.items():
            classes = torch.arange(self.num_columns).expand_as(values)
            yield Scores(name, values[chosen], classes[chosen])


def measure(named, labels, num_classes):
    """Metrics of scores (Q, K) by the name of their setting."""
    tally = Tally(num_classes)
    tally.add(Given(named), labels)
    return tally.metrics()


@pytest.fixture
def few_similarities(monkeypatch):
    """Queries go in many small parts, too."""
    monkeypatch.setattr(similarity_bank, "MAX_SIMILARITIES", 500)


@pytest.mark.parametrize("part", [1000, 97, 7])
@pytest.mark.parametrize("temperature", [None, 0.1, 1e-4])
@pytest.mark.parametrize("k", [1, 20, 500])
def test_votes_are_scikit_learns_for_any_parts_of_the_bank(few_similarities, part, temperature, k):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels = features(300)
    queries, _ = features(61, seed=1)
    state = shown_in_parts(NearestNeighbours(queries, k), bank, labels, part)
    shares = torch.softmax(vote(*state.nearest(), 5, k, temperature), dim=1).numpy()

    def weights(distances):
        return np.exp((1 - distances - (1 - distances).max(axis=1, keepdims=True)) / temperature)

    sklearns = KNeighborsClassifier(
        min(k, 300), weights=weights if temperature else "uniform", metric="cosine",
        algorithm="brute",
    ).fit(bank.double().numpy(), labels)  # fmt: skip
    expected = sklearns.predict_proba(queries.double().numpy())
    np.testing.assert_allclose(shares, expected, atol=1e-10)


def test_of_equally_similar_images_the_earlier_ones_are_neighbours(few_similarities):
    bank = unit_rows(torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0, 1]]))
    labels = torch.arange(6)
    queries = unit_rows(torch.tensor([[1.0, 0], [0, 1]]))
    for part in (1, 2, 4, 6):
        state = shown_in_parts(NearestNeighbours(queries, 4), bank, labels, part)
        assert state.nearest()[1].tolist() == [[0, 3, 4, 1], [1, 2, 5, 0]]


def test_first_largest_is_a_stable_sort_of_rows_full_of_ties():
    values = torch.randint(0, 4, (50, 30), generator=torch.Generator().manual_seed(0)).float()
    expected = values.argsort(dim=1, descending=True, stable=True)
    for k in (1, 7, 30, 99):
        assert torch.equal(first_largest(values, k), expected[:, :k])


def npi_twin(queries, bank, labels, num_classes, temperature):
    """Assran et al. 2020, eq. 3, image by image in float64."""
    result = np.zeros((len(queries), num_classes))
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for row, query in enumerate(queries):
        logits = bank @ (query / np.linalg.norm(query)) / temperature
        weights = np.exp(logits - logits.max())
        for label, weight in zip(labels, weights / weights.sum()):
            result[row, label] += weight
    return result


@pytest.mark.parametrize("part", [1000, 64, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 1.0])
def test_class_probabilities_are_those_of_equation_3_for_any_parts(
    few_similarities, part, temperature
):
    bank, labels = features(200)
    queries, _ = features(33, seed=1)
    state = shown_in_parts(ClassSimilarity(queries, 5, temperature), bank, labels, part)
    expected = npi_twin(*(x.double().numpy() for x in (queries, bank)), labels, 5, temperature)
    found = state.log_probabilities().exp().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_temperature_near_zero_neither_overflows_nor_underflows():
    bank, labels = features(50)
    queries, _ = features(9, seed=1)
    state = shown_in_parts(ClassSimilarity(queries, 5, 1e-6), bank, labels, 8)
    found = state.log_probabilities()
    nearest = labels[(queries @ bank.T).argmax(dim=1)]
    assert found.isfinite().all() and torch.equal(found.argmax(dim=1), nearest)


@pytest.mark.parametrize("temperature", [0.1, 1e-3, 1e-6])
def test_the_second_class_is_second_however_low_the_temperature(temperature):
    bank, labels = unit_rows(torch.eye(3)), torch.arange(3)
    queries = unit_rows(torch.tensor([[1.0, 0.5, 0.0]]))
    npi = shown_in_parts(ClassSimilarity(queries, 9, temperature), bank, labels, 3)
    neighbours = shown_in_parts(NearestNeighbours(queries, 3), bank, labels, 3)
    votes = vote(*neighbours.nearest(), 9, 3, temperature)
    for scores in (npi.log_probabilities(), votes):
        for label, found in ((0, 1.0), (1, 1.0), (2, 1.0), (3, 0.0)):
            assert measure({"a": scores}, torch.tensor([label]), 9)["top5"] == found
        assert measure({"a": scores}, torch.tensor([1]), 9)["top1"] == 0


def test_scores_that_are_not_numbers_find_nothing():
    scores = torch.full((2, 3), torch.nan, dtype=torch.float64)
    scores[1] = torch.tensor([0.0, torch.nan, -torch.inf])
    results = measure({"a": scores}, torch.tensor([0, 1]), 3)
    assert results["top1"] == results["top5"] == 0


def test_a_class_without_images_has_no_share_and_one_class_alone_has_all():
    bank, _ = features(20)
    state = shown_in_parts(ClassSimilarity(bank[:4], 3, 0.1), bank, torch.full((20,), 1), 6)
    assert state.log_probabilities().tolist() == [[-np.inf, 0.0, -np.inf]] * 4
    found = shown_in_parts(NearestNeighbours(bank[:4], 50), bank, torch.full((20,), 1), 6)
    assert vote(*found.nearest(), 3, 50, 0.1).argmax(dim=1).tolist() == [1] * 4


def test_a_class_without_votes_is_never_among_the_best_five():
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).log()
    results = measure({"k2": scores}, torch.tensor([0, 1]), 3)
    assert results["k2"] == {"top1": 0.0, "top5": 0.5}  # the tie goes to the smaller class
    assert results["top1"] == 0.0 and results["per_class"] == [0.0, 0.0, None]
    assert results["confusion"].binned(1).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def exact_neighbours(queries, bank, labels, k):
    """Labels (Q, k) by float64 similarities that are equal for copies, the earlier first."""
    order = [
        (bank * query).sum(dim=1).argsort(descending=True, stable=True)[:k] for query in queries
    ]
    return labels[torch.stack(order)]


def near_copies(num_rows, distance, seed=0, width=24):
    """Unit rows (N, D) float64 at a distance of each other that float32 cannot see."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, width)) + 0.3
    return unit_rows(torch.from_numpy(base + distance * rng.normal(size=(num_rows, width))))


@pytest.mark.parametrize("max_share", [0.0, 1 / 32, 1.0])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-5, 1e-7])
def test_neighbours_that_float32_cannot_tell_apart_are_those_of_float64(
    monkeypatch, max_share, distance
):
    monkeypatch.setattr(knn, "MAX_EXACT_SHARE", max_share)
    bank, labels = near_copies(600, distance), torch.arange(600)
    queries = near_copies(20, 1.0, seed=1)
    for k in (1, 7):
        state = shown_in_parts(NearestNeighbours(queries, k), bank, labels, 250)
        assert torch.equal(state.nearest()[1], exact_neighbours(queries, bank, labels, k))


def count_float32_products(monkeypatch):
    """A list that grows by one with each block of queries that float32 looks at."""
    products, rough_error = [], knn.rough_error
    monkeypatch.setattr(knn, "rough_error", lambda width: products.append(1) or rough_error(width))
    return products


def test_float32_is_tried_once_where_it_tells_no_images_apart(monkeypatch, few_similarities):
    products = count_float32_products(monkeypatch)
    bank, labels, queries = near_copies(600, 1e-7), torch.arange(600), near_copies(20, 1.0, seed=1)
    state = shown_in_parts(NearestNeighbours(queries, 3), bank, labels, 250)
    assert len(products) == 1
    assert torch.equal(state.nearest()[1], exact_neighbours(queries, bank, labels, 3))


@pytest.mark.parametrize("k", [3, 7, 50])
def test_float32_is_used_again_where_a_first_part_is_small_for_k(monkeypatch, k):
    products = count_float32_products(monkeypatch)
    bank, labels, queries = near_copies(600, 1.0), torch.arange(600), near_copies(20, 1.0, seed=1)
    state = shown_in_parts(NearestNeighbours(queries, k), bank, labels, 200)
    assert len(products) >= 2 and state.float32_helps
    assert torch.equal(state.nearest()[1], exact_neighbours(queries, bank, labels, k))


def test_of_copies_in_any_parts_the_earlier_ones_are_neighbours(monkeypatch):
    monkeypatch.setattr(knn, "MAX_EXACT_SHARE", 1.0)
    some, _ = features(40, width=37)
    bank, labels = some.repeat(10, 1), torch.arange(400)
    queries, _ = features(15, seed=1, width=37)
    for part in (400, 90, 13):
        state = shown_in_parts(NearestNeighbours(queries, 25), bank, labels, part)
        assert torch.equal(state.nearest()[1], exact_neighbours(queries, bank, labels, 25))


@pytest.mark.parametrize("width", [1, 3, 100, 2048, 65535])
def test_float32_similarities_are_never_further_off_than_their_bound(width):
    rng = np.random.default_rng(width)
    for rows in (rng.random((40, width)), rng.normal(size=(40, width)) ** 9):
        rows = unit_rows(torch.from_numpy(rows))
        error = (rows.float() @ rows.float().T).double() - rows @ rows.T
        assert error.abs().max() < knn.rough_error(width)


@pytest.mark.parametrize("weights", ["exp", "uniform"])
def test_scores_of_the_neighbours_classes_are_those_of_all_classes(weights):
    bank, labels = features(300, num_classes=40)
    queries, expected = features(50, seed=1, num_classes=40)
    config = KNNConfig(ks=[5, 20], temperatures=[0.07, 1.0], weights=weights)
    scorer = shown_in_parts(KNNScorer(config, queries, 40), bank, labels, 70)
    nearest = scorer.neighbours.nearest()
    dense = {
        f"k{k}" if weights == "uniform" else f"k{k}_t{t:g}": vote(
            *nearest, 40, k, t if weights == "exp" else None
        )
        for k in config.ks
        for t in config.temperatures
    }
    tally = Tally(40)
    tally.add(scorer, expected)
    found, wanted = tally.metrics(), measure(dense, expected, 40)
    assert (found.pop("confusion").binned(1) == wanted.pop("confusion").binned(1)).all()
    assert found == wanted


def test_settings_and_classes_cost_no_memory():
    num_classes, num_queries = 5000, 3000  # a matrix of scores would take 120 MB
    labels = torch.arange(num_queries)
    config = KNNConfig(ks=[1, 5, 20], temperatures=[0.05, 0.1, 0.2, 1.0])
    bank, queries = near_copies(400, 1.0), near_copies(num_queries, 1.0, seed=1)
    scorer = shown_in_parts(KNNScorer(config, queries, num_classes), bank, torch.arange(400), 400)
    tally = Tally(num_classes)
    with TensorMemory() as memory:
        tally.add(scorer, labels)
        metrics = tally.metrics()
    assert len(metrics) == 12 + 4
    assert 1e6 < memory.peak_bytes < 12e6


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made, and live, within `with`. A process' memory is no
    measure: it keeps what earlier tests took."""

    def __init__(self):
        super().__init__()
        self.live, self.peak_bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.live.values()))
        return made


def test_the_queries_own_features_count_in_what_is_held_at_once(monkeypatch):
    widths, num_queries, passes = {"a": 2048, "b": 128}, 200_000, []

    class Passed(Exception):
        """Ends `classify` once the passes are known."""

    def take_slices(*args):
        passes.extend(slices(*args))
        raise Passed

    slices = similarity_bank.query_slices
    labels = np.zeros(num_queries, np.int64)
    datasets = SimpleNamespace(chosen=range(50), val_labels=labels, num_classes=10)
    replaced = {
        "open_frozen": lambda *_: SimpleNamespace(widths=widths),
        "open_datasets": lambda *_: datasets,
        "extract_labelled": lambda *_: SimpleNamespace(ids=np.arange(num_queries)),
        "query_slices": take_slices,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(similarity_bank, name, function)
    config = KNNConfig(depths=list(widths))
    with pytest.raises(Passed):
        classify("knn", config, SimpleNamespace(device="cpu"), None, KNNScorer)
    numbers = config.state_size(10) * 2 + sum(widths.values())
    assert passes[0].stop * numbers <= similarity_bank.MAX_STATE and len(passes) > 1


def test_more_images_than_the_disk_takes_are_refused_when_they_are_kept(tmp_path, monkeypatch):
    def full(**_):
        return open("/dev/full", "r+b")

    monkeypatch.setattr(similarity_bank.tempfile, "TemporaryFile", full)
    bank = similarity_bank._Repeated([({"a": torch.zeros(4, 2)}, torch.zeros(4))], tmp_path)
    line = (
        r"cannot be kept there \(No space left on device\); free some space, or use another --out"
    )
    with pytest.raises(UserError, match=line):
        bank.__enter__()


class Batches(list):
    """A loader of given batches."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("valid", [True, False])
def test_crops_whose_features_are_not_finite_are_refused(monkeypatch, valid):
    batch = SimpleNamespace(
        indices=np.arange(2), valid=np.array([True, valid]), view_0=torch.zeros(2, 3)
    )
    broken = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    encoder = SimpleNamespace(path="runs/a", encode=lambda images: {"a": broken})
    monkeypatch.setattr(similarity_bank, "augmented_loader", lambda *_, **__: Batches([batch]))
    datasets = SimpleNamespace(
        train=None, chosen=None, labels=np.arange(2), loading=SimpleNamespace(batch_size=2)
    )
    bank = similarity_bank._augmented_bank(NPIConfig(depths=["a"]), encoder, datasets, None)
    if valid:
        with pytest.raises(UserError, match=r"^runs/a: features at a are not finite; take"):
            list(bank)
    else:  # a row of padding
        assert len(list(bank)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["knn", "snn"])
@pytest.mark.parametrize("num_views", [0, 2])
def test_several_passes_over_the_bank_measure_what_one_does(
    monkeypatch, tmp_path, raw_beton, protocol, num_views, capsys
):
    from support.evaluations import ONE_THREAD, write_run

    import evaluate

    write_run(tmp_path / "run", raw_beton, raw_beton)
    words = [protocol, f"--checkpoint={tmp_path / 'run'}", f"--num_views={num_views}", *ONE_THREAD]
    found, passes = [], []
    slices = similarity_bank.query_slices
    monkeypatch.setattr(  # the first call is for the passes
        similarity_bank, "query_slices", lambda *args: passes.append(slices(*args)) or passes[-1]
    )
    for max_state in (1 << 28, 9000):
        passes.clear()
        monkeypatch.setattr(similarity_bank, "MAX_STATE", max_state)
        code, record = evaluate.run([*words, f"--out={tmp_path / str(max_state)}"])
        record["metrics"]["backbone"].pop("confusion")
        found.append(record["metrics"])
        assert (len(passes[0]) > 1) == (max_state == 9000)
        size, said = 200 * max(1, num_views), capsys.readouterr().out
        what = f"{protocol}: comparing 200 images with {size}"
        assert f"{what}: {size * len(passes[0]):,} images\n" in said
        is_kept = max_state == 9000 and num_views > 0
        assert ("features of the bank: 400 images\n" in said) == is_kept
    assert code == 0 and found[0] == found[1]
