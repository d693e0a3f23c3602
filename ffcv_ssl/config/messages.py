"""The parser's messages in this project's words, on one line."""

from __future__ import annotations

import re


def one_line(error):
    """An error's text on one line, in this project's words where the parser's are cryptic."""
    text = " ".join(str(error).split())
    text = text.removeprefix("Validation failed: ")
    text = re.sub(
        r"^(?:Option|Key) '([^']+)' is not (accepted|expected)", r"unknown key '\1'", text
    )
    text = re.sub(
        r"Group '([^']+)' does not accept (?:option|nested key) '([^']+)'",
        r"\1: unknown key '\2'",
        text,
    )
    text = re.sub(r"Parser key \"([^\"]+)\":", r"\1:", text)
    text = re.sub(r"Unexpected keys: \{([^}]+)\}\. Got value: .*", r"unknown key \1", text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"unrecognized arguments: --([^\s=]+).*$", r"\1: unknown key", text)
    text = _UNION.sub(_one_of_several, text)
    text = re.sub(
        r"Not of type \w+: (\S+) does not conform to restriction (.*)$",
        lambda found: f"got {found[1]}, expected {_in_words(found[2])}",
        text,
    )
    text = _NO_NUMBER.sub(r"got \1, expected a number", text)
    text = re.sub(r"Expected an? (.*)\. Got value: (.*)$", r"got \2, expected \1", text)
    text = re.sub(r"expected tuple(?: with (\d+) elements)?$", _list_of, text)
    return text.replace("expected Literal", "expected one of ")


_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*?)\] Errors: "
    r"(?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)$"
)
_NO_NUMBER = re.compile(
    r"Not of type \w+: (?:could not convert string to float|invalid literal for int.*?): ('[^']*')$"
)
_BOUNDS = {">": "above", ">=": "of at least", "<": "below", "<=": "of at most"}


def _one_of_several(found):
    """`got V, expected A or null` for a value that fits none of several types."""
    bounds = re.search(r"restriction (v.*?)(?= - |$)", found["errors"])
    number = _in_words(bounds[1]) if bounds else "a number"  # its type is one of jsonargparse's own
    kinds = []
    for name in re.split(r", (?![^\[]*\])", found["types"]):
        if name.startswith("tuple["):
            each = f", each {number}" if bounds else ""
            kinds.append(f"a list of {name.count(',') + 1}{each}")
        else:
            kinds.append(_PLAIN.get(name, number if name.isidentifier() else name))
    return f"got {found['value']}, expected {' or '.join(kinds)}"


_PLAIN = {"NoneType": "null", "str": "text", "int": "a whole number", "float": "a number"}


def _list_of(found):
    return f"expected a list of {found[1]}" if found[1] else "expected a list"


def _in_words(bounds):
    """`v>=0 and v<=1` -> `a number of at least 0 and of at most 1`."""
    return "a number " + re.sub(r"v([<>]=?)", lambda found: f"{_BOUNDS[found[1]]} ", bounds)
