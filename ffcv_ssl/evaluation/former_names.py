"""Old names of the protocols' settings: taken for one release, and known for ever in results.

Results, interrupted fine-tunings and scripts of before have the old names. What is read gets the
new names. The keys by which results are recognised are made from the old names, so they stay equal.
"""

from __future__ import annotations

from typing import Any

from ffcv_ssl.config.renamed import NewName, Table, rename


def depth_of_layer(layer: Any) -> Any:
    """`--layer 0` is the depth `backbone`, k is `projector_k`; other values stay as they are."""
    if not str(layer).isdecimal():
        return layer
    return "backbone" if int(layer) == 0 else f"projector_{int(layer)}"


def layer_of_depth(depth: Any) -> Any:
    """The opposite of `depth_of_layer`; a depth of another name stays as it is."""
    number = "0" if depth == "backbone" else str(depth).removeprefix("projector_")
    return int(number) if number.isdecimal() else depth


def _unchanged(value: Any) -> Any:
    return value


RENAMED: Table = {
    "layer": NewName("depth", depth_of_layer),
    "k": "ks",
    "temperature": "temperatures",
    "views": NewName("num_views", _unchanged),  # in configurations of train.py it is a group
    "splits": "max_splits",
}
_OLD_NAMES: Table = {
    "depth": NewName("layer", layer_of_depth),
    "ks": "k",
    "temperatures": "temperature",
    "num_views": "views",
    "max_splits": "splits",
}


def with_new_names(settings: dict) -> dict:
    """A protocol's settings (nested dict), of now or of before, under the names of now."""
    return rename(settings, RENAMED)[0]


def with_old_names(settings: dict) -> dict:
    """A protocol's settings (nested dict) under their first names, for the keys of results."""
    return rename(settings, _OLD_NAMES)[0]
