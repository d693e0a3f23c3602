"""What a command knows of its settings besides their types, and the value `auto`.

A file or a command line may give `auto` to some settings, whatever their types. `Rules.choose`
then finds their values before the settings are read, so the rest of the program never sees it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

AUTO = "auto"
Layers = list[tuple[str, dict[str, Any]]]
"""[(file, its own settings)]; later ones win."""


class Rules:
    """These rules change nothing; a command derives its own."""

    choosable: Collection[str] = ()
    """Dotted names of the settings that may be `auto`."""

    def read(self, own: dict[str, Any], earlier: Layers) -> dict[str, Any]:
        """The nested settings of a file as they count. earlier: the files before it, as they count;
        it wins over them."""
        return own

    def choose(
        self, given: dict[str, Any], typed: Collection[str], layers: Layers
    ) -> dict[str, Any]:
        """{dotted name: value} of settings that are chosen; these values win over all others.

        given: nested settings; those of the command line are texts. typed: dotted names of the
        settings on the command line. layers: all files, in order. Raises UserError.
        """
        return {}

    def show(self, settings: dict[str, Any]) -> dict[str, Any]:
        """{dotted name: value} of what `--print_config` shows otherwise than nested settings say
        it."""
        return {}


def words_without_auto(argv: Sequence[str], choosable: Collection[str]) -> list[str]:
    """The words of a command line without `--key auto` and `--key=auto` for choosable keys."""
    words: list[str] = []
    for word in argv:
        key, _, text = word.partition("=")
        if text == AUTO and key.removeprefix("--") in choosable:
            continue
        if word == AUTO and words and words[-1].removeprefix("--") in choosable:
            words.pop()
            continue
        words.append(word)
    return words


def without_auto(
    own: dict[str, Any], choosable: Collection[str], prefix: str = ""
) -> dict[str, Any]:
    """Nested settings without those of `choosable` whose value is `auto`."""
    kept = {}
    for key, value in own.items():
        if isinstance(value, dict):
            value = without_auto(value, choosable, f"{prefix}{key}.")
        if value != AUTO or f"{prefix}{key}" not in choosable:
            kept[key] = value
    return kept
