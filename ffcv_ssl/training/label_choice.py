"""Which labels a method may use: a random fraction, equally many of every class, or a list from a
file.

Guarantees: a choice is a pure function of (labels, scheme, seed), the same on every rank and
machine. With the same seed, a larger fraction or count contains the smaller one.
"""

# N samples, K classes

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ffcv_ssl.errors import SourceError, UserError
from ffcv_ssl.kernels.random import fill_uniforms, shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.sources.disk import read_file

SCHEMES = ("bernoulli", "balanced", "file")
_WHERE = "labelled.labels"  # where a run's configuration has these settings
_MAX_LISTED = 10


def choose_labels(
    labels: np.ndarray | None,
    num_classes: int,
    scheme: str,
    fraction: float | None = None,
    count: int | None = None,
    file: str | None = None,
    seed: int = 0,
    names: Sequence[str] | Callable[[], Sequence[str] | None] | None = None,
) -> np.ndarray:
    """The labels that training may see: a copy of `labels` with -1 where a label is not chosen.

    labels: (N,) int64, 0 to num_classes - 1, or -1: unlabelled; None: no sample has a label.
    Scheme `bernoulli`: each label independently with probability `fraction` (Assran et al. 2020),
    or exactly `count` labels, every subset equally likely. `balanced`: count / K labels of every
    class, or fraction * labels / K, rounded, at least 1. `file`: the samples listed in the text
    file `file`, one index or name per line; blank lines and lines that start with # are skipped.
    A name matches by its last part, or by its whole path where several samples share the last part.
    names: the samples' file names (N,), or a function that returns them, called only if needed.

    Raises UserError, one line, for settings that contradict each other, a class with too few
    labels, and a line of the file that names no labelled sample or repeats one.
    """
    labels = np.asarray([] if labels is None else labels, np.int64)
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise UserError(
            f"{_WHERE}: the dataset has no labelled sample to choose from; name "
            "another field with --data.label_field"
        )
    _check_settings(scheme, fraction, count, file)
    if scheme == "file":
        chosen = _from_file(file, labels, names)
    elif scheme == "balanced":
        chosen = _balanced(labels, num_classes, fraction, count, seed)
    elif fraction is not None:
        uniforms = np.empty((len(labels), 4))
        fill_uniforms(derive_key(seed, "labels", "bernoulli"), 0, 0, 0, uniforms)
        chosen = labelled[uniforms[labelled, 0] < fraction]
    else:
        chosen = _subset(labelled, count, "labelled samples", derive_key(seed, "labels", "count"))
    if not len(chosen):
        raise UserError(
            f"{_WHERE}.fraction: got {fraction:g}, which drew none of {len(labelled)} labels; "
            "give a larger one"
        )
    kept = np.full_like(labels, -1)
    kept[chosen] = labels[chosen]
    return kept


def samples_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The indices of each class' samples, K ascending int64 arrays. labels: (N,) int64, -1:
    unlabelled. One sort: a search per class takes minutes with 22,000 classes."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels[labels >= 0], minlength=num_classes))
    return np.split(order[len(labels) - ends[-1] :], ends[:-1])


def class_counts(labels: np.ndarray, num_classes: int) -> str:
    """One line about chosen labels: `4000 labels of 10 classes, 379 to 421 each`, and the numbers
    of classes without labels. labels: (N,) int64, -1: unlabelled."""
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    low, high = counts.min(), counts.max()
    each = f"{low} each" if low == high else f"{low} to {high} each"
    without = np.flatnonzero(counts == 0).tolist()
    if without:
        listed = ", ".join(map(str, without[:_MAX_LISTED]))
        more = f" and {len(without) - _MAX_LISTED} more" if len(without) > _MAX_LISTED else ""
        each += f"; none of class {listed}{more}"
    return f"{counts.sum()} labels of {num_classes} classes, {each}"


def _check_settings(scheme, fraction, count, file):
    if scheme not in SCHEMES:
        raise UserError(f"{_WHERE}.scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)}")
    given = {"fraction": fraction, "count": count, "file": file}
    given = {key: value for key, value in given.items() if value is not None}
    wanted = ("file",) if scheme == "file" else ("fraction", "count")
    if len(given) != 1 or not set(given) <= set(wanted):
        got = " and ".join(f"{key} {value}" for key, value in given.items()) or "nothing"
        expected = "file alone" if scheme == "file" else "either fraction or count"
        remedy = "file FILE" if scheme == "file" else "fraction 0.1"
        raise UserError(
            f"{_WHERE}: scheme {scheme} got {got}, expected {expected}: --{_WHERE}.{remedy}"
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"{_WHERE}.fraction: got {fraction:g}, expected above 0, at most 1")
    if count is not None and count < 1:
        raise UserError(f"{_WHERE}.count: got {count}, expected at least 1")


def _subset(samples, size, what, key):
    """A random subset of `samples` with `size` elements; every subset is equally likely."""
    if size > len(samples):
        raise UserError(f"{_WHERE}: {size} {what} wanted, there are {len(samples)}; ask for fewer")
    shuffled = samples.copy()
    shuffle_(key, 0, shuffled)
    return shuffled[:size]


def _balanced(labels, num_classes, fraction, count, seed):
    if count is not None and count % num_classes:
        raise UserError(
            f"{_WHERE}.count: got {count}, expected a multiple of the {num_classes} classes"
        )
    if count is None:
        count = num_classes * max(1, round(fraction * (labels >= 0).sum() / num_classes))
    parts = []
    for label, members in enumerate(samples_by_class(labels, num_classes)):
        key = derive_key(seed, "labels", "balanced", label)
        parts.append(_subset(members, count // num_classes, f"labels of class {label}", key))
    return np.concatenate(parts)


def _from_file(path, labels, names):
    """The ids of the samples that a file lists, in the file's order."""
    entries = _entries(path)
    if all(entry.isdecimal() for entry in entries.values()):
        find = _find_index(len(labels))
    else:
        names = names() if callable(names) else names
        if names is None:
            raise UserError(
                f"{path}: got names of samples, but the dataset has no file names; give indices, "
                "or write the dataset anew from an imagefolder"
            )
        find = _find_name(names, entries.values())
    lines = {}  # sample -> the line that named it
    for line, entry in entries.items():
        sample = find(f"{path}:{line}", entry)
        if sample in lines:
            raise UserError(
                f"{path}:{line}: got {entry}, which is sample {sample} again, first named on line "
                f"{lines[sample]}; name each sample once"
            )
        if labels[sample] < 0:
            raise UserError(
                f"{path}:{line}: got {entry}, but sample {sample} has no label; leave it out"
            )
        lines[sample] = line
    return np.fromiter(lines, np.int64, len(lines))


def _entries(path):
    """{line number: entry} of a text file."""
    try:
        text = read_file(path, may_be_pipe=True).decode("utf-8-sig")
    except SourceError as error:
        raise UserError(f"{_WHERE}.file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{_WHERE}.file: {path}: {reason}") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    entries = {number: line.strip() for number, line in enumerate(lines, 1)}
    entries = {number: e for number, e in entries.items() if e and not e.startswith("#")}
    if not entries:
        raise UserError(f"{_WHERE}.file: {path}: no entries, expected one sample per line")
    return entries


def _find_index(num_samples):
    def find(where, entry):
        if len(entry) > 18 or int(entry) >= num_samples:
            raise UserError(f"{where}: got index {entry}, expected 0 to {num_samples - 1}")
        return int(entry)

    return find


def _find_name(names, entries):
    by_base_name = {_base_name(entry): [] for entry in entries}  # a few of a million names
    for sample, name in enumerate(names):
        base_name = _base_name(name)
        if base_name in by_base_name:
            by_base_name[base_name].append(sample)

    def find(where, entry):
        samples = by_base_name[_base_name(entry)]
        if len(samples) > 1:
            path = f"/{entry}"
            same_path = [sample for sample in samples if path.endswith(f"/{names[sample]}")]
            if len(same_path) != 1:
                raise UserError(
                    f"{where}: got {entry}, which may be {names[samples[0]]} or "
                    f"{names[samples[1]]}; give the whole path"
                )
            samples = same_path
        if not samples:
            raise UserError(
                f"{where}: got {entry}, no sample has this name; expected names such as {names[0]}"
            )
        return samples[0]

    return find


def _base_name(name):
    return name.rsplit("/", 1)[-1]
