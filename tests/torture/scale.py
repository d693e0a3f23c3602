"""Scale: 14 million labels, thousands of classes, long logs; stored features and results."""

# N samples, K classes, Q queries, D features

from __future__ import annotations

import json
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO

import numpy as np
import torch
from support.evaluations import write_run
from support.small_files import write_small

from ffcv_ssl.evaluation.confusion import draw_confusion
from ffcv_ssl.evaluation.datasets import open_datasets
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.features import extract
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.evaluation.protocols.knn import KNNConfig, KNNScorer
from ffcv_ssl.evaluation.results import RESULTS_FILE, read_results, report
from ffcv_ssl.evaluation.similarity_bank import BANK_ROWS, Tally, unit_rows
from ffcv_ssl.training.label_choice import choose_labels
from ffcv_ssl.training.metrics_log import METRICS_FILE, MetricsLog
from ffcv_ssl.training.world import World
from ffcv_ssl.traversal_order import ClassStratified
from torture.frame import Trial, fault
from torture.usage import MB, peak_bytes, reset_peak, timed

NUM_CLASSES = 22_000


def clusters(num_rows: int, num_classes: int, random: np.random.Generator, width: int = 128):
    """Rows (N, D) float32 around a centre for each class, and labels (N,)."""
    centres = np.random.default_rng(0).standard_normal((num_classes, width), np.float32)
    labels = random.integers(0, num_classes, num_rows)
    rows = centres[labels] + 1.5 * random.standard_normal((num_rows, width), np.float32)
    return torch.from_numpy(rows), torch.from_numpy(labels)


@fault("22,000 classes: k-NN with 12 settings, confusion, picture", quick=1, full=1, limit_s=3600)
def many_classes(trial: Trial) -> dict[str, float]:
    """50,000 queries against 200,000 images take less than 4 GB; 500 of them are compared with
    plain products of all rows, and find the same nearest image's class."""
    size, num_classes = (200, 1200) if trial.quick else (50_000, NUM_CLASSES)
    queries, labels = clusters(size, num_classes, trial.random)
    bank, bank_labels = clusters(4 * size, num_classes, trial.random)
    config = KNNConfig(ks=[20, 1, 5], temperatures=[0.1, 0.05, 0.2, 1.0])
    figures: dict[str, float] = {}
    reset_peak()
    with timed(figures, "for all"):
        scorer = KNNScorer(config, unit_rows(queries), num_classes)
        for begin in range(0, len(bank), BANK_ROWS):
            part = slice(begin, begin + BANK_ROWS)
            scorer.add(unit_rows(bank[part]), bank_labels[part])
        tally = Tally(num_classes)
        tally.add(scorer, labels)
        metrics = tally.metrics()
        draw_confusion(metrics["confusion"], trial.folder / "a.png", "title")
    figures["MB"] = round(peak_bytes() / MB)
    some = slice(0, 500)
    exact = (unit_rows(queries[some]) @ unit_rows(bank).T).argmax(dim=1)
    assert torch.equal(scorer.neighbours.nearest()[1][some, 0], bank_labels[exact])
    assert metrics["k1_t0.1"]["top1"] > 0.05 and figures["MB"] < 4000, (metrics["k1_t0.1"], figures)
    return figures


@fault("14 million labels: choices and stratified order", quick=1, full=1, limit_s=1800)
def many_labels(trial: Trial) -> dict[str, float]:
    """A choice of labels takes at most 30 s of CPU, an epoch's order 120 s, both at most 4 GB; each
    chosen label is its sample's, and each of 400 batches has two of each class in it."""
    size, num_classes = (140_000, 220) if trial.quick else (14_000_000, NUM_CLASSES)
    labels = trial.random.integers(0, num_classes, size)
    figures: dict[str, float] = {}
    reset_peak()
    for name, scheme, settings in (
        ("1 %", "bernoulli", {"fraction": 0.01}),
        ("10 %", "bernoulli", {"fraction": 0.1}),
        ("per class", "balanced", {"count": 13 * num_classes}),
    ):
        with timed(figures, f"for {name}"):
            chosen = choose_labels(labels, num_classes, scheme, **settings)
        assert figures[f"CPU seconds for {name}"] < 30
        kept = chosen >= 0
        assert (chosen[kept] == labels[kept]).all()
    assert (np.bincount(chosen[kept], minlength=num_classes) == 13).all()
    with timed(figures, "for an order"):
        order = ClassStratified(labels, 128, 2)
        samples = order.sequence(None, np.arange(size), 0, 0)
    figures["MB"] = round(peak_bytes() / MB)
    for begin in range(0, 400 * order.batch_size, order.batch_size):
        batch = np.bincount(labels[samples[begin : begin + order.batch_size]])
        assert set(batch.tolist()) == {0, 2}
    assert figures["CPU seconds for an order"] < 120
    assert len(np.unique(samples)) > 0.9 * size and figures["MB"] < 4000, figures
    return figures


@fault("a bit flipped in results.jsonl", quick=1, full=1)
def flipped_results(trial: Trial) -> Counter:
    """All records that are read are as they were written, and in their order; stderr names the line
    of each that is not read."""
    written = [report({"protocol": "knn", "top1": 0.5, "n": n}, trial.folder) for n in range(3)]
    whole, outcomes = (trial.folder / RESULTS_FILE).read_bytes(), Counter()
    for number in range(50 if trial.quick else 1000):
        at = int(trial.random.integers(len(whole)))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(trial.random.integers(8))
        folder = trial.folder / str(number)
        folder.mkdir()
        (folder / RESULTS_FILE).write_bytes(damaged)
        with redirect_stderr(StringIO()) as said:
            records = read_results(folder)
        # a newline that is none any more makes one line of two
        line, lost = whole[:at].count(b"\n"), 1 + (whole[at : at + 1] == b"\n")
        is_read = records == written
        assert is_read or records == written[:line] + written[line + lost :], bytes(damaged)
        assert is_read or f"{RESULTS_FILE}:{line + 1}: " in said.getvalue(), bytes(damaged)
        outcomes["equal" if is_read else "not read, and named"] += 1
    return outcomes


@fault("a bit flipped in a features cache", quick=1, full=1, limit_s=3600)
def flipped_features(trial: Trial) -> Counter:
    """An evaluation notices the bit, whichever file it is in, and computes the features again:
    they and their ids are the true ones."""
    data = write_small(trial.folder / "a.beton", 24, (16, 16), mode="raw")
    write_run(trial.folder / "run", data, data)
    encoder, folder = load_encoder(trial.folder / "run"), trial.folder / "features"
    datasets = open_datasets(EvalData(batch_size=24, num_workers=1), EvalLabels(), encoder)
    seen, encode = Counter(), encoder.encode
    encoder.encode = lambda images: seen.update(images=len(images)) or encode(images)

    def take():
        return extract(encoder, datasets.val, datasets, ["backbone"], folder, "float32", World())

    true, outcomes = np.array(take().rows["backbone"]), Counter()
    for _ in range(3 if trial.quick else 500):
        path = trial.random.choice(sorted(folder.iterdir()))
        damaged = bytearray(path.read_bytes())
        damaged[trial.random.integers(len(damaged))] ^= 1 << int(trial.random.integers(8))
        path.write_bytes(damaged)
        seen.clear()
        found = take()
        np.testing.assert_array_equal(found.rows["backbone"], true)
        assert found.ids.tolist() == list(range(24)) and seen["images"] == 24, path
        outcomes["computed again"] += 1
    return outcomes


@fault("metrics of 250,000 records: resume", quick=1, full=1, limit_s=600)
def long_metrics(trial: Trial) -> dict[str, float]:
    """A run that resumes opens its log and goes on with its events in at most 5 s of CPU;
    lines after the checkpoint are gone, all others are as they were."""
    size = 20_000 if trial.quick else 250_000
    names = ("train/loss", "train/loss/term", "train/images_per_s", "train/data_wait", "lr")
    values = trial.random.random((size, len(names))).round(6).tolist()
    lines = [
        json.dumps({"epoch": step / 1000, "step": step, **dict(zip(names, row))}) + "\n"
        for step, row in enumerate(values, 1)
    ]
    path, figures = trial.folder / METRICS_FILE, dict[str, float]()
    MetricsLog(trial.folder).close()  # so that there are events
    for where, last_step in (
        ("end", size),
        ("last evaluation", size - 1000),
        ("middle", size // 2),
    ):
        path.write_text("".join(lines))
        with timed(figures, f"to open, checkpoint at the {where}"):
            log = MetricsLog(trial.folder, last_step, tensorboard=True)
            newest = log.latest("train/")
        log.write({"step": last_step + 1, "train/loss": 0.5})
        log.close()
        assert figures[f"CPU seconds to open, checkpoint at the {where}"] < 5, figures
        assert newest == json.loads(lines[last_step - 1])
        *kept, last = path.read_text().splitlines(keepends=True)
        assert kept == lines[:last_step] and json.loads(last)["step"] == last_step + 1
    return figures
