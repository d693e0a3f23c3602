"""YAML texts of a few lines that overwhelm whoever reads them without a limit."""

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
"""Ten lists, each of nine times the list before: 3.5 billion words when written out."""
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
"""The same with keys that are merged: 387 million pairs."""
BOMBS = {
    "billion laughs": (LAUGHS, "more than 100000 values"),
    "merged keys": (MERGES, "more than 100000 values"),
    "deep lists": ("optim: " + "[" * 400 + "]" * 400, "more than 32 levels"),
    "deep mappings": ("{a: " * 400 + "1" + "}" * 400, "more than 32 levels"),
    "a list of itself": ("optim: &a [*a]\n", "more than 32 levels"),
    "a hundred levels": ("optim: " + "[" * 100 + "]" * 100, "more than 32 levels"),
}
"""{name: (text, what its refusal says)}"""
ENDLESS = [
    "[" * 2000, "{a: " * 500, "a: " + "- " * 3000, "- " * 3000, "a:\n" + " " * 9 + "- [" * 900,
]  # fmt: skip
"""Levels that are opened and never closed."""
