"""docs/errors.md: every message has a cure, and a cure is something to do."""

import pytest

from benchmarks import cures, errors_page, refusals


@pytest.fixture(scope="module")
def found():
    return refusals.find_refusals()


def first_word(cure):
    return cure.split()[0].strip(",:")


def test_every_message_has_a_cure_that_begins_with_an_action(found):
    without = {
        f"{refusal.shown()}: {cure}"
        for refusal in found
        if first_word(cure := errors_page.cure_of(refusal) or "none") not in cures.ACTIONS
    }
    assert without == set()


def test_every_cure_of_the_tables_belongs_to_a_message(found):
    used = {errors_page.cure_of(refusal) for refusal in found}
    table = {cure for _, cure in (*cures.BY_WORDS, *cures.BY_LAST_WORDS)}
    assert table - used == set()


def of(template, error="UserError", file="train.py"):
    template = template.replace("<", refusals.OPEN).replace(">", refusals.CLOSE)
    return refusals.Refusal(template, file, 1, "f", error, "")


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("<path>: no such thing; use another --out", "use another --out"),
        ("<path>: cut; truncated or altered, re-write it", "re-write it"),
        ("it is bad; <name> is whole: copy it to <name>", "copy it to <name>"),
        (
            "<n> are bad; re-write the file; the last: <error>",
            "re-write the file; the last: <error>",
        ),
        ("<key>: got <got>, expected one of <known>", "give one of <known>"),
        ("got <got>, expected a or b; <name> is another", "give a or b"),
        ("<key>: got <got>, expected at most 1", "give a value that is at most 1"),
        ("<key>: got <got>, expected 0 to <n - 1>", "give a value from 0 to <n - 1>"),
        ("<key>: got <got>, expected <in_words>", "give a value of the kind that the line names"),
        ("<path>: cannot be written (<reason>)", cures.cure_by_words(of("x cannot be written"))),
    ],
)
def test_a_cure_is_asked_for_or_known_or_what_was_expected(line, cure):
    assert errors_page.cure_of(of(line)) == cure


def test_a_damaged_file_is_cured_whatever_the_message():
    damage = of(
        "<path>: page size is impossible; damaged file", "BetonError", "ffcv_ssl/reader/a.py"
    )
    assert errors_page.cure_of(damage) == cures.DAMAGED
