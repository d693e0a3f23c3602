"""Completion of sub-commands, settings and their values, in bash, zsh and fish.

The shell's script calls `ffcv-ssl --complete-words WORD...` at each TAB; the answer takes a tenth
of a second, because nothing of torch is imported: all settings are in `words.json` beside this
file, which `python -m benchmarks.readme` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ffcv_ssl.errors import UserError

WORDS = "--complete-words"
_TABLE = Path(__file__).with_name("words.json")

# `-o default`: files, where nothing is found
_BASH = """\
_ffcv_ssl() {
    local IFS=$'\\n'
    COMPREPLY=($(ffcv-ssl --complete-words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    case "${COMPREPLY[*]}" in *.) compopt -o nospace ;; esac
}
complete -o default -F _ffcv_ssl ffcv-ssl
"""
_ZSH = """\
#compdef ffcv-ssl
_ffcv_ssl() {
    local -a found
    found=("${(@f)$(ffcv-ssl --complete-words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z "$found" ]]; then
        _files
        return
    fi
    compadd -S '' -- ${(M)found:#*.}
    compadd -- ${found:#*.}
}
compdef _ffcv_ssl ffcv-ssl
"""
_FISH = """\
function __ffcv_ssl
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -e before[1]
    ffcv-ssl --complete-words $before "$current" 2>/dev/null
end
complete -c ffcv-ssl -a '(__ffcv_ssl)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(words: Sequence[str]) -> str:
    """The script for the shell that the words after `--completion` name. Raises UserError."""
    if len(words) != 1 or words[0] not in SCRIPTS:
        got = " ".join(words) or "none"
        raise UserError(f"--completion: got {got}, expected one of {', '.join(SCRIPTS)}")
    return SCRIPTS[words[0]]


def answer(words: Sequence[str]) -> int:
    """Print the completions of a command line's last word, one per line."""
    print("\n".join(complete(words)))
    return 0


def complete(words: Sequence[str]) -> list[str]:
    """The completions of the last of `words`, those after `ffcv-ssl`; [] where a file is likely.

    Settings are completed group by group: `--op` to `--optim.`, `--optim.` to `--optim.lr`...
    """
    from ffcv_ssl.command_line import COMMANDS, OPTIONS  # which imports this module

    *before, current = _without_equals(words) or [""]
    if not before:
        options = [word.partition(" ")[0] for word in OPTIONS]
        return _starting(current, [*COMMANDS, *(options if current.startswith("-") else [])])
    if before[0] == "--completion":
        return _starting(current, SCRIPTS)
    table = json.loads(_TABLE.read_text(encoding="utf-8")).get(before[0], {})
    settings, places = table.get("settings", {}), table.get("words", [])
    if "protocols" in table:
        if len(before) == 1:
            return _starting(current, [*table["protocols"], "--help"])
        settings = table["protocols"].get(before[1], {})
    key, equals, text = current.partition("=")
    if equals:
        return [f"{key}={value}" for value in _starting(text, _values(key, settings))]
    if before[-1].startswith("--") and not current.startswith("-"):
        return _starting(current, _values(before[-1], settings))
    if current.startswith("-"):
        return _next_level(current, [*settings, "--help"])
    return _starting(current, _values("--config", {}) if before[0] == "chain" else places)


def _without_equals(words: Sequence[str]) -> list[str]:
    """bash gives `--key=text` as the three words `--key`, `=` and `text`: without the second."""
    kept = [word for word in words[:-1] if word != "="]
    return [*kept, *("" if word == "=" else word for word in words[-1:])]


def _values(key: str, settings: dict[str, list[str]]) -> list[str]:
    if key == "--config":
        from ffcv_ssl.config.app_files import config_names

        return config_names()
    return settings.get(key, [])


def _starting(current: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]


def _next_level(current: str, keys: Iterable[str]) -> list[str]:
    """Keys that begin with `current`, cut behind the next dot: each group once."""
    found: dict[str, None] = {}
    for key in _starting(current, keys):
        dot = key.find(".", len(current))
        found[key if dot < 0 else key[: dot + 1]] = None
    return list(found)
