"""Every line with which the project refuses something stands, with its words, in a test.

A template (benchmarks/refusals.py) counts as shown if a string of a test has a run of at least
three of its fixed words, or a whole fixed text of it, that no other message has; or all of its
fixed texts in their order. An f-string and a regular expression count with their fixed parts.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from support.small_files import REPOSITORY

from benchmarks import refusals

FEWEST_WORDS = 3
GAP = "\0"  # in a test's text: what an f-string or a regular expression leaves open


def shown_texts(folder=REPOSITORY / "tests"):
    """The strings of all tests but this file, without docstrings."""
    texts = []
    for path in sorted(Path(folder).rglob("*.py")):
        if path.name != Path(__file__).name:
            texts += strings_of(ast.parse(path.read_text()))
    return [plain(text) for text in texts]


def strings_of(tree):
    """All strings of a tree: an f-string with a GAP for each value; no docstrings."""
    parts = {
        part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    parts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                getattr(part, "value", None) if isinstance(part, ast.Constant) else GAP
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.value


def plain(text):
    """A regular expression as the text that it matches: wildcards are GAPs, escapes are gone."""
    text = re.sub(r"\.[*+]\??|\[[^\]]*\][*+]|\\[dw][*+]?", GAP, text)
    return " ".join(re.sub(r"\\(\W)", r"\1", text).split())


def runs(piece):
    """Runs of FEWEST_WORDS words of a fixed text, and the text itself."""
    words = piece.split()
    found = {" ".join(words[i : i + FEWEST_WORDS]) for i in range(len(words) - FEWEST_WORDS + 1)}
    return found | ({piece} if len(words) > 1 else set())


def not_shown(found, texts):
    """The refusals whose words no text has."""
    everything, owners, places = "\n".join(texts), defaultdict(set), defaultdict(set)
    for refusal in found:
        for run in {run for piece in refusal.pieces() for run in runs(piece)}:
            owners[run].add(refusal.template)
            places[run].add(place(refusal))
    are_shown = {run for run in owners if run in everything}

    def is_shown(refusal):
        its = {run for piece in refusal.pieces() for run in runs(piece)}
        if any(run in are_shown and 1 in (len(owners[run]), len(places[run])) for run in its):
            return True
        pattern = re.compile(".*".join(map(re.escape, refusal.pieces())))
        return bool(pattern.search(everything))

    shown_places = {place(refusal) for refusal in found if is_shown(refusal)}
    return [refusal for refusal in found if place(refusal) not in shown_places]


def place(refusal):
    """The `raise` that a template belongs to. A test of one of its templates is enough."""
    return refusal.file, refusal.line


def test_every_refusal_is_shown_by_a_test():
    missing = not_shown(refusals.find_refusals(), shown_texts())
    assert [f"{r.file}:{r.line}: {r.shown()}" for r in missing] == []


def made_of(folder, source):
    """The templates found in a project of one module."""
    (folder / "ffcv_ssl").mkdir()
    (folder / "ffcv_ssl/errors.py").write_text("class UserError(Exception): pass\n")
    (folder / "ffcv_ssl/a.py").write_text(source)
    for name in refusals.PLACES:
        if name.endswith(".py"):
            (folder / name).write_text("")
    return [refusal.shown() for refusal in refusals.find_refusals(folder)]


def test_a_template_has_the_texts_that_its_names_may_have(tmp_path):
    source = """
LIMIT = "at most 9"

def check(size, path):
    got = f"got {size}"
    remedy = "give less"
    if size > 99:
        remedy = "give much less"
    if size > 9:
        raise UserError(f"{path}: {got}, expected {LIMIT}; {remedy}")
    for name in ("first", "last"):
        if not getattr(size, name):
            raise UserError(f"{name}: missing in {path}")

def fail(reason):
    raise ValueError(f"it failed: {reason}")

def use():
    fail("no room")
    try:
        fail("no time")
    except OSError as error:
        raise UserError(f"{error}") from None
"""
    assert made_of(tmp_path, source) == [
        "<path>: got <size>, expected at most 9; give much less",
        "<path>: got <size>, expected at most 9; give less",
        "first: missing in <path>",
        "last: missing in <path>",
        "it failed: no room",
        "it failed: no time",
    ]


def of(template, line):
    template = template.replace("<", refusals.OPEN).replace(">", refusals.CLOSE)
    return refusals.Refusal(template, "a.py", line, "f", "UserError", "")


def test_a_refusal_without_its_words_in_a_test_is_found():
    size = of("size: got <size>, expected at least 1", 1)
    count = of("count: got <count>, expected at least 1", 2)
    place = of("<path>: the place of it is impossible", 3)
    found = [size, count, place]
    assert not_shown(found, [plain("expected at least 1")]) == found
    assert not_shown(found, [plain(r"size: got 0, .* at least 1")]) == [count, place]
    assert not_shown(found, [plain("a: the place of it"), plain("count: got 3")]) == [size]


def test_strings_of_a_test_leave_gaps_and_no_docstrings():
    tree = ast.parse('"""got it"""\nf("a", f"b {c} d")')
    assert sorted(strings_of(tree)) == ["a", f"b {GAP} d"]
    assert plain(r"got \d+ of .*\(x\)") == f"got {GAP} of {GAP}(x)"
