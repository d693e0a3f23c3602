"""Every line with which the project refuses something stands, with its words, in a test.

A template (benchmarks/refusals.py) counts as shown if a string of a test has a run of at least
three of its fixed words, or a whole fixed text of it, that no other message has; or all of its
fixed texts in their order. An f-string and a regular expression count with their fixed parts.

Strings count where they are compared: in `match=`, in an `assert`, in `parametrize`, and in what
such a place names: a name of the test, of its module or of its parameters. This cannot see whether
the test reaches the line: only whether a test expects those words of some message. Nor does it see
messages that another program words, and lines that no `raise` of the project's classes makes.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from support.small_files import REPOSITORY

from benchmarks import refusals

FEWEST_WORDS = 3
# Calls whose arguments are compared; an argument of another call is no expected text.
COMPARING = ("escape", "param", "join", "startswith", "endswith", "fullmatch", "search", "match")
GAP = "\0"  # in a test's text: what an f-string or a regular expression leaves open


def shown_texts(folder=REPOSITORY / "tests"):
    """The strings that tests compare with; not of this file, the torture rows and the support."""
    texts = []
    for path in sorted(Path(folder).rglob("test_*.py")):
        if path.name != Path(__file__).name and "torture" not in path.parts:
            texts += compared_strings(ast.parse(path.read_text()))
    return [plain(text) for text in texts]


def compared_strings(tree):
    """The strings in `match=`, asserts and `parametrize`, and in the values of the names there."""
    assigned = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        assigned[name.id].append(node.value)
        if isinstance(node, ast.For | ast.comprehension):
            for name in ast.walk(node.target):
                if isinstance(name, ast.Name):
                    assigned[name.id].append(node.iter)
    pending = [part for node in ast.walk(tree) for part in compared_parts(node)]
    seen = set()
    while pending:
        part = pending.pop()
        if part in seen or is_call(part):
            continue
        seen.add(part)
        if isinstance(part, ast.Name):
            pending += assigned[part.id]
        elif isinstance(part, ast.JoinedStr) or is_text(part):
            yield from strings_of(part)
        pending += ast.iter_child_nodes(part)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_call(node):
    """Whether what a node is given is not what it is compared as: an argument is no result."""
    name = getattr(getattr(node, "func", None), "attr", "")
    return isinstance(node, ast.Lambda | ast.Call) and name not in COMPARING


def compared_parts(node):
    if isinstance(node, ast.Assert):
        return [node.test]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize":
        return node.args[1:]
    return [word.value for word in getattr(node, "keywords", ()) if word.arg == "match"]


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
        elif is_text(node) and node not in parts:
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


def test_a_parameter_has_its_default_words_and_no_argument_of_a_library(tmp_path):
    source = """
def decode(data, mode, remedy="write it again", on_error="raise"):
    if mode:
        raise ValueError(f"{data}: bad {mode}, see {on_error}; {remedy}")

def use(library, error):
    library.decode("png", "a long word")
    raise ValueError(f"item {len(error) + 1}: {getattr(error, 'strerror', None)} happened")
"""
    assert made_of(tmp_path, source) == [
        "<data>: bad <mode>, see <on_error>; write it again",
        "item <number + 1>: <strerror> happened",
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


def test_strings_count_where_they_are_compared():
    source = """
LINES = ["of a table"]

@pytest.mark.parametrize("line", LINES)
def test_a(line):
    write("given to a function")
    part = "of a name"
    with pytest.raises(ValueError, match="of a match" + part):
        call("not compared")
    assert "of an assert" in seen
"""
    shown = set(compared_strings(ast.parse(source)))
    assert shown == {"of a table", "of a match", "of a name", "of an assert"}


def test_strings_of_a_test_leave_gaps_and_no_docstrings():
    tree = ast.parse('"""got it"""\nf("a", f"b {c} d")')
    assert sorted(strings_of(tree)) == ["a", f"b {GAP} d"]
    assert plain(r"got \d+ of .*\(x\)") == f"got {GAP} of {GAP}(x)"
