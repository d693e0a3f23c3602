"""Damaged bytes, and mutants of YAML texts."""

from __future__ import annotations

import random

from support.yaml_bombs import BOMBS, ENDLESS

WORDS = [
    "null", "true", "-1", "1e400", ".nan", ".inf", "[]", "{}", "''", "[1, 2, 3]", "{a: 1}", "&a",
    "*a", "!!python/object:os.system", "!!binary x", "|", ">", "- ", "? ", "\t", "9" * 400, "0x1f",
    "2020-01-01", "<<: *a", "base: a.yaml", "base: [b.yaml]", "\x00", "\ufeff", "%", "@", "\u2028",
    "&a [*a]", "{<<: &b {<<: *b}}", "simclr", "a.b.c", "...", "---", "!!set {a}", "1_000", "0o7",
]  # fmt: skip


def damaged_bytes(content: bytes, choose: random.Random) -> bytes:
    """The content with flipped bits, bytes lost, added, cut off, repeated or zeroed; never the
    content itself."""
    damaged = content
    while damaged == content:
        damaged = damaged_once(content, choose)
    return damaged


def damaged_once(content: bytes, choose: random.Random) -> bytes:
    """The content after one to three changes, which may undo each other."""
    data = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(data) + 1)
        length, kind = choose.randint(1, 40), choose.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = choose.randbytes(length)
        elif kind == 3 and choose.randrange(3) == 0:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            data[at : at + length] = bytes(min(length, len(data) - at))
        else:
            words = [b"\n", b"\xff", b"99999999999999999999", b"-1", b"null", b"NaN", b"{", b"["]
            data[at:at] = choose.choice(words)
    return bytes(data)


def mutated_text(text: str, choose: random.Random) -> str:
    """A YAML text with other words in it, lines lost, moved or repeated, or one made to explode."""
    kind = choose.randrange(12)
    if kind == 0:
        return choose.choice([*(text for text, _ in BOMBS.values()), *ENDLESS, "", "\n", "a", "5"])
    if kind == 1:
        return damaged_bytes(text.encode(), choose).decode("utf-8", "replace")
    lines = text.split("\n")
    for _ in range(choose.randint(1, 4)):
        at, what = choose.randrange(len(lines)), choose.randrange(6)
        key, colon, _ = lines[at].partition(":")
        word = choose.choice(WORDS)
        if what == 0 and colon:
            lines[at] = f"{key}: {word}"
        elif what == 1:
            lines[at] = word
        elif what == 2:
            lines.insert(at, lines[choose.randrange(len(lines))])
        elif what == 3:
            lines[at] = " " * choose.randrange(6) + lines[at]
        elif what == 4:
            lines[at] = lines[at].replace(":", f": {word} #", 1)
        else:
            lines.insert(at, f"{word}: {choose.choice(WORDS)}")
    return "\n".join(lines)
